// Drives the real @actions/cache, as a step of a workflow would.
//
// usage: node actions_cache.mjs FOLDER_OF_NODE_MODULES save KEY PATH...
//        node actions_cache.mjs FOLDER_OF_NODE_MODULES restore KEY,RESTORE_KEY... PATH...
//        node actions_cache.mjs FOLDER_OF_NODE_MODULES download FUNCTION URL FILE
//
// Prints what the call gave: the entry's number, or the key that was found or "none". The third
// calls one of the functions with which the toolkit downloads from Azure's own hosts.
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const [, , folder, command, ...rest] = process.argv;
// By path: the package may be one of ES modules only, and may not export what is internal.
const load = file =>
  import(pathToFileURL(path.join(folder, 'node_modules/@actions/cache/lib', file)));

if (command === 'download') {
  const [name, url, file] = rest;
  const { [name]: download } = await load('internal/downloadUtils.js');
  await download(url, file, { timeoutInMs: 30000, downloadConcurrency: 8 });
} else {
  const cache = await load('cache.js');
  const [keys, ...paths] = rest;
  const [key, ...restoreKeys] = keys.split(',');
  const result =
    command === 'save'
      ? `saved ${await cache.saveCache(paths, key)}`
      : `restored ${(await cache.restoreCache(paths, key, restoreKeys)) ?? 'none'}`;
  console.log(result);
}
