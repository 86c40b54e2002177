// Turns Markdown of a job summary into a page that looks like GitHub's.
//
// usage: node page.mjs FOLDER_OF_NODE_MODULES FILE > PAGE
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const [, , folder, file] = process.argv;
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
         color: #1f2328; background: #fff }
  h3 { font-size: 20px; margin: 0 0 12px }
  table { border-collapse: collapse; margin: 12px 0 }
  th, td { border: 1px solid #d1d9e0; padding: 4px 12px }
  tr:nth-child(2n) { background: #f6f8fa }
  code { background: #eff1f3; border-radius: 6px; padding: 2px 5px; font-size: 85% }
  pre.mermaid { margin: 8px 0 }
  pre.mermaid svg { max-width: 440px !important }
  blockquote { margin: 12px 0; padding: 2px 16px; border-left: 4px solid #9a6700 }
  blockquote b { color: #9a6700 }
  sub { color: #59636e; font-size: 12px }
  summary { color: #1f2328 }
</style><body>${body}<script src="mermaid.min.js"></script>
<script>mermaid.initialize({ startOnLoad: true, securityLevel: 'strict' });</script>`);
