// Turns Markdown of a job summary into a page that looks like GitHub's.
//
// usage: node page.mjs FOLDER_OF_NODE_MODULES FILE light|dark > PAGE
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const [, , folder, file, theme] = process.argv;
const isDark = theme === 'dark';
const resolve = createRequire(pathToFileURL(path.resolve(folder, 'package.json'))).resolve;
const { marked } = await import(pathToFileURL(resolve('marked')));
marked.use({
  renderer: {
    code({ text, lang }) {
      return lang === 'mermaid' ? `<pre class="mermaid">${text}</pre>` : false;
    },
  },
});
const body = marked
  .parse(readFileSync(file, 'utf8'))
  .replace(/<blockquote>\s*<p>\[!(\w)(\w+)\]\s*/g, (_, first, rest) =>
    `<blockquote><p><b>${first}${rest.toLowerCase()}</b><br>`);
console.log(`<!doctype html><meta charset="utf-8"><style>
  body { font: 16px/1.5 -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; margin: 24px 32px;
         color: var(--text); background: var(--page) }
  :root { ${
    isDark
      ? '--text: #f0f6fc; --page: #0d1117; --line: #3d444d; --row: #151b23; --code: #656c7633; --quiet: #9198a1; --warning: #d29922'
      : '--text: #1f2328; --page: #fff; --line: #d1d9e0; --row: #f6f8fa; --code: #818b981f; --quiet: #59636e; --warning: #9a6700'
  } }
  h3 { font-size: 20px; margin: 0 0 12px }
  table { border-collapse: collapse; margin: 12px 0 }
  th, td { border: 1px solid var(--line); padding: 4px 12px }
  tr:nth-child(2n) { background: var(--row) }
  code { background: var(--code); border-radius: 6px; padding: 2px 5px; font-size: 85% }
  pre.mermaid { margin: 8px 0 }
  pre.mermaid svg { max-width: 640px !important }
  pre.mermaid svg[aria-roledescription="pie"] { max-width: 440px !important }
  blockquote { margin: 12px 0; padding: 2px 16px; border-left: 4px solid var(--warning) }
  blockquote b { color: var(--warning) }
  sub { color: var(--quiet); font-size: 12px }
  summary { color: var(--text) }
</style><body>${body}<script src="mermaid.min.js"></script>
<script>mermaid.initialize({ startOnLoad: true, securityLevel: 'strict', theme: '${isDark ? 'dark' : 'default'}' });</script>`);
