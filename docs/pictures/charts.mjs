// Draws the charts of the benchmarks' figures.
//
// usage: node charts.mjs FOLDER_OF_NODE_MODULES FOLDER_OF_FIGURES FOLDER_OF_PICTURES
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const [, , modules, figures, pictures] = process.argv;
const resolve = createRequire(pathToFileURL(path.resolve(modules, 'package.json'))).resolve;
const vega = await import(pathToFileURL(resolve('vega')));
const { compile } = await import(pathToFileURL(resolve('vega-lite')));

// Without a browser vega takes each letter to be 0.8 em wide, which leaves wide margins.
vega.textMetrics.width = (item, text) => String(text ?? '').length * 0.6 * (item.fontSize ?? 11);

const THEMES = {
  light: { text: '#1f2328', quiet: '#59636e', line: '#d1d9e0', ours: '#2da44e', other: '#6c8ebf', third: '#a9b4c0' },
  dark: { text: '#e6edf3', quiet: '#9198a1', line: '#3d444d', ours: '#3fb950', other: '#6f94c9', third: '#6e7681' },
};

function config(theme) {
  const font = '-apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif';
  return {
    background: null,
    font,
    view: { stroke: null },
    title: { color: theme.text, fontSize: 15, fontWeight: 600, anchor: 'start', offset: 14,
      subtitleColor: theme.quiet, subtitleFontSize: 12, subtitlePadding: 5 },
    axis: { labelColor: theme.text, titleColor: theme.quiet, titleFontWeight: 'normal', labelFontSize: 12,
      titleFontSize: 12, gridColor: theme.line, gridOpacity: 0.6, labelLimit: 240, labelFlush: false, domain: false, ticks: false, labelPadding: 8 },
    legend: { labelColor: theme.text, labelFontSize: 12, title: null, orient: 'top', symbolType: 'square', offset: 8 },
    text: { color: theme.text, fontSize: 11 },
  };
}

const CONTENDERS = { action: 'this action', archive: 'an archive of target/', sccache: 'sccache alone' };
const MODES = {
  none: 'no cache',
  disk: 'sccache on a disk that stays',
  archive: 'that disk in an archive',
  packed: 'this action',
};
const SITUATIONS = ['cold', 'exact warm', 'code changed', 'dependency bumped', 'fresh branch',
  'three jobs at once', 'toolchain changed'];

function cargoChart({ rows, settings }, theme) {
  const names = Object.keys(CONTENDERS)
    .filter((contender) => rows.some((row) => row.contender === contender))
    .map((contender) => CONTENDERS[contender]);
  const values = rows.map((row) => ({ ...row, contender: CONTENDERS[row.contender] }));
  const y = { field: 'job', type: 'nominal', sort: SITUATIONS, axis: { title: null, grid: false } };
  const yOffset = { field: 'contender', sort: names };
  const seconds = { field: 'seconds', aggregate: 'median', type: 'quantitative' };
  return {
    title: { text: 'Seconds of a whole Rust job', subtitle: `cargo’s ${settings.layout} layout, restore and save included; less is better` },
    width: 560,
    height: { step: 15 },
    data: { values },
    encoding: { y, yOffset },
    layer: [
      { mark: { type: 'bar', cornerRadiusEnd: 2 },
        encoding: {
          x: { ...seconds, axis: { title: null, tickCount: 6 } },
          color: { field: 'contender', scale: { domain: names, range: [theme.ours, theme.other, theme.third] } },
        } },
      { mark: { type: 'text', align: 'left', dx: 4 },
        encoding: { x: seconds, text: { ...seconds, format: '.1f' } } },
    ],
  };
}

// Each makes of a benchmark's figures a specification for vega-lite, but for the theme's settings.
const CHARTS = {
  'chart-cargo': ['cargo', cargoChart],
  'chart-cargo-newer': ['cargo-newer', cargoChart],
  'chart-modes': ['modes', ({ rows, settings }, theme) => {
    const names = Object.values(MODES);
    const values = rows
      .filter((row) => row.project === 'c' && row.job === 'warm' && MODES[row.mode])
      .map((row) => ({ ...row, name: MODES[row.mode] }));
    const seconds = { field: 'seconds', aggregate: 'median', type: 'quantitative' };
    return {
      title: { text: 'Seconds of a warm C job', subtitle: `${settings.c_files.toLocaleString('en')} files; less is better` },
      width: 500,
      height: { step: 30 },
      data: { values },
      encoding: {
        y: { field: 'name', type: 'nominal', sort: names, axis: { title: null, grid: false } },
      },
      layer: [
        { mark: { type: 'bar', cornerRadiusEnd: 2, height: 20 },
          encoding: {
            x: { ...seconds, axis: { title: null, tickCount: 6 } },
            color: { field: 'name', legend: null,
              scale: { domain: names, range: [theme.third, theme.other, theme.other, theme.ours] } },
          } },
        { mark: { type: 'text', align: 'left', dx: 4 },
          encoding: { x: seconds, text: { ...seconds, format: '.1f' } } },
      ],
    };
  }],
  'chart-scale': ['scale', ({ rows }, theme) => {
    const values = rows.flatMap((row) => [
      { objects: row.objects, panel: 'index, MB', value: row.index_bytes / 1e6 },
      { objects: row.objects, panel: 'index, % of the upload', value: (100 * row.index_bytes) / row.uploaded_bytes },
      { objects: row.objects, panel: 'relay’s memory, MB', value: Math.max(row.write_memory_bytes, row.read_memory_bytes) / 1e6 },
    ]).filter(({ value }) => value > 0);
    return {
      title: { text: 'What grows with the number of objects' },
      data: { values },
      facet: { field: 'panel', type: 'nominal', title: null,
        sort: ['index, MB', 'index, % of the upload', 'relay’s memory, MB'],
        header: { labelColor: theme.text, labelFontSize: 12 } },
      columns: 3,
      bounds: 'flush',
      spacing: 55,
      resolve: { scale: { y: 'independent' } },
      spec: {
        width: 175,
        height: 150,
        mark: { type: 'line', color: theme.ours, point: { color: theme.ours, filled: true }, strokeWidth: 2 },
        encoding: {
          x: { field: 'objects', type: 'quantitative', axis: { title: 'objects', grid: false, tickCount: 3, labelExpr: "format(datum.value, datum.value < 1000 ? 'd' : '~s')" } },
          y: { field: 'value', type: 'quantitative', axis: { title: null, tickCount: 4 }, scale: { zero: true } },
        },
      },
    };
  }],
  'chart-service': ['service', ({ rows, settings }, theme) => {
    const sections = {
      small: `${settings.entries.toLocaleString('en')} small entries`,
      connections: `${settings.connections.toLocaleString('en')} clients at once`,
      large: `an entry of ${settings.large_gib} GiB`,
    };
    const phases = { 'Create, Put Blob, Finalize': 'saved (3 requests to 1)', 'look-up and GET': 'look-up and content (2 to 1)',
      'GET of known URLs': 'content', 'Put Block, 4 at once, and List': 'up in blocks, 4 at once',
      'Put Blob in one': 'up in one request', 'the same in ranges, 4 at once': 'down in ranges, 4 at once',
      'the same, twice at once': 'down, twice at once', 'of that Put Block List, Finalize': null };
    const values = rows
      .filter((row) => row.server === 'service' && row.against && phases[row.phase] !== null)
      .map((row) => {
        const base = rows.find((other) => other.server === 'nginx' && other.section === row.section
          && other.phase === row.against);
        const rate = row.section === 'large' ? `${(row.bytes / row.seconds / 1e9).toFixed(2)} GB/s`
          : `${Math.round(row.count / row.seconds).toLocaleString('en')} a second`;
        const whole = row.section === 'large' && row.phase === 'look-up and GET';
        return { section: sections[row.section],
          phase: whole ? 'down in one request' : phases[row.phase] ?? row.phase,
          ratio: base.seconds / row.seconds, label: `${(base.seconds / row.seconds).toFixed(2)}  (${rate})` };
      });
    const ratio = { field: 'ratio', type: 'quantitative' };
    return {
      title: { text: 'The cache service beside nginx, which stores and sends plain files',
        subtitle: 'its rate as a multiple of nginx’s (the dashed line), with the same clients and bytes' },
      data: { values },
      facet: { row: { field: 'section', type: 'nominal', sort: Object.values(sections), title: null,
        header: { labelColor: theme.quiet, labelFontSize: 12, labelAngle: 0, labelAlign: 'left', labelOrient: 'top', labelAnchor: 'start', labelPadding: 0 } } },
      resolve: { scale: { y: 'independent' } },
      spacing: 10,
      spec: {
        width: 420,
        height: { step: 22 },
        encoding: { y: { field: 'phase', type: 'nominal', sort: null, axis: { title: null, grid: false, minExtent: 185 } } },
        layer: [
          { mark: { type: 'bar', cornerRadiusEnd: 2, height: 14, color: theme.ours },
            encoding: { x: { ...ratio, axis: { title: null, tickCount: 5 } } } },
          { mark: { type: 'rule', color: theme.quiet, strokeDash: [4, 3] },
            encoding: { x: { datum: 1 }, y: null } },
          { mark: { type: 'text', align: 'left', dx: 4 }, encoding: { x: ratio, text: { field: 'label' } } },
        ],
      },
    };
  }],
};

for (const [picture, [name, chart]] of Object.entries(CHARTS)) {
  const file = path.join(figures, `${name}.json`);
  if (!existsSync(file)) {
    console.error(`${picture} is not drawn: there is no ${file}`);
    continue;
  }
  const measured = JSON.parse(readFileSync(file, 'utf8'));
  for (const [suffix, theme] of Object.entries(THEMES)) {
    const specification = { ...chart(measured, theme), config: config(theme), padding: 10 };
    const view = new vega.View(vega.parse(compile(specification, { logger: vega.logger(vega.Error) }).spec), { renderer: 'none' });
    // Shown as an image, it is read by its alternative text.
    const svg = (await view.toSVG()).replace(/ (aria-[a-z]+|role)="[^"]*"/g, '');
    writeFileSync(path.join(pictures, `${picture}-${suffix}.svg`), `${svg}\n`);
  }
}
