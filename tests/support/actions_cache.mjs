// Drives the real @actions/cache, as a step of a workflow would.
//
// usage: node actions_cache.mjs FOLDER_OF_NODE_MODULES save KEY PATH...
//        node actions_cache.mjs FOLDER_OF_NODE_MODULES restore KEY,RESTORE_KEY... PATH...
//
// Prints what the call gave: the entry's number, or the key that was found or "none".
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const [, , folder, command, keys, ...paths] = process.argv;
const resolve = createRequire(pathToFileURL(path.join(folder, 'package.json'))).resolve;
let entry;
try {
  entry = resolve('@actions/cache');
} catch {
  // A package of ES modules only.
  entry = path.join(folder, 'node_modules/@actions/cache/lib/cache.js');
}
const cache = await import(pathToFileURL(entry));
const [key, ...restoreKeys] = keys.split(',');

if (command === 'save') {
  console.log(`saved ${await cache.saveCache(paths, key)}`);
} else {
  console.log(`restored ${(await cache.restoreCache(paths, key, restoreKeys)) ?? 'none'}`);
}
