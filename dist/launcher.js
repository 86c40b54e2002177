// Runs the prebuilt binary for this runner, after checking its digest.
//
// GitHub gives the cache service's address and token, and a post step, to JavaScript actions only.
// So this much is JavaScript, without dependencies; all else is the binary.
'use strict';

const { createHash } = require('node:crypto');
const { spawn } = require('node:child_process');
const fs = require('node:fs');
const path = require('node:path');

// The binary's statuses: 0 for done (also for a failure it has already warned of), 1 for a failure
// that the step must show, having said which. Anything else is a crash.
const DONE = 0;
const FAILED = 1;

const WITHOUT_CACHE = 'The build continues without a cache.';

// The runner also takes `##[name]` for a command, wherever it stands in a line.
function escapeMessage(text) {
  const message = text.replace(/%/g, '%25').replace(/\r/g, '%0D').replace(/\n/g, '%0A');
  return message.replace(/##\[/g, '## [');
}

function annotate(kind, text) {
  process.stdout.write(`::${kind} title=sccache-action::${escapeMessage(text)}\n`);
}

// Runners that run the binary of another: Windows on Arm has an emulation of x64.
const RUNS_OTHERS = { 'win32-arm64': 'win32-x64' };

/** The path of the binary for this runner. Throws where there is none, or not the one we shipped. */
function binary(folder) {
  const manifest = JSON.parse(fs.readFileSync(path.join(folder, 'manifest.json'), 'utf8'));
  const here = `${process.platform}-${process.arch}`;
  const runner = Object.hasOwn(manifest.binaries, here) ? here : RUNS_OTHERS[here] || here;
  if (!Object.hasOwn(manifest.binaries, runner)) {
    const supported = Object.keys(manifest.binaries).sort().join(', ');
    throw new Error(
      `There is no binary of this action for ${here}; there is one for ${supported}. ` +
        'sccache itself may have a release for it, which works without this action.',
    );
  }
  const { file, sha256 } = manifest.binaries[runner];
  const program = path.join(folder, file);
  const actual = createHash('sha256').update(fs.readFileSync(program)).digest('hex');
  if (actual !== sha256) {
    throw new Error(
      `${file} does not match the manifest (sha256 ${actual}, ` +
        `expected ${sha256}). It was not run.`,
    );
  }
  // An archive or a checkout on some file systems loses the executable bit.
  if ((fs.statSync(program).mode & 0o100) === 0) {
    fs.chmodSync(program, 0o755);
  }
  return program;
}

/** Runs `program` to its end; resolves to `{status, signal}`, or rejects where it did not start. */
function runToEnd(program, command) {
  return new Promise((resolve, reject) => {
    let child;
    // A cancelled job signals this process; the binary is the one that cleans up. Without a handler
    // a signal ends this process at once, so there is one before there is a child.
    for (const signal of ['SIGINT', 'SIGTERM']) {
      process.on(signal, () => child.kill(signal));
    }
    child = spawn(program, [command], { stdio: 'inherit', windowsHide: true });
    child.on('error', reject);
    child.on('exit', (status, signal) => resolve({ status, signal }));
  });
}

// The variables by which a workflow can have its builds call sccache.
const CALLS = [
  'RUSTC_WRAPPER',
  'RUSTC_WORKSPACE_WRAPPER',
  'CARGO_BUILD_RUSTC_WRAPPER',
  'CMAKE_C_COMPILER_LAUNCHER',
  'CMAKE_CXX_COMPILER_LAUNCHER',
  'CMAKE_CUDA_COMPILER_LAUNCHER',
  'CC',
  'CXX',
  'NVCC',
];

/** Whether `program` is a file, or a name that `PATH` has one for. */
function isThere(program) {
  const folders = path.isAbsolute(program) ? [''] : (process.env.PATH || '').split(path.delimiter);
  const names = process.platform === 'win32' ? [program, `${program}.exe`] : [program];
  return folders.some((folder) => names.some((name) => fs.existsSync(path.join(folder, name))));
}

/** Where the workflow itself names sccache and there is none, every compile would fail. */
function unsetMissingSccache() {
  if (!process.env.GITHUB_ENV) {
    return;
  }
  for (const name of CALLS) {
    const value = (process.env[name] || '').trim();
    const whole = path.parse(value).name === 'sccache';
    // A path may have spaces in it; what has words behind it is a command.
    const program = whole ? value : value.split(/\s/, 1)[0];
    if (path.parse(program).name === 'sccache' && !isThere(program) && !/[\r\n]/.test(value)) {
      fs.appendFileSync(process.env.GITHUB_ENV, `${name}=${value.slice(program.length).trim()}\n`);
    }
  }
}

/** Runs `command` (`setup` or `report`) of the binary. A fault of ours never fails the job. */
async function launch(command) {
  let problem;
  try {
    const { status, signal } = await runToEnd(binary(__dirname), command);
    // The post step has nothing to fail but a hit rate that the user wants to be reached.
    const strict = command === 'setup' || process.env['INPUT_ON-FAILURE'] === 'fail';
    if (status === DONE || (status === FAILED && strict)) {
      process.exitCode = status;
      return;
    }
    problem = `sccache-action ${command} ended with ${signal || `status ${status}`}.`;
  } catch (error) {
    problem = `sccache-action ${command} could not run: ${error.message}`;
  }
  if (command === 'setup') {
    if (process.env['INPUT_ON-FAILURE'] === 'fail') {
      annotate('error', problem);
      process.exitCode = FAILED;
      return;
    }
    problem = `${problem} ${WITHOUT_CACHE}`;
    try {
      unsetMissingSccache();
    } catch (error) {
      problem = `${problem} Could not unset the variables that name sccache: ${error.message}`;
    }
  }
  annotate('warning', problem);
  process.exitCode = DONE;
}

module.exports = { launch };
