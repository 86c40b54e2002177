//! Tests a new sccache server with a small compile, before any build depends on it.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use crate::action::inputs::Wrap;
use crate::runner::environment::Environment;
use crate::runner::log::Log;
use crate::sccache::server::{Server, ServerError};

/// A compile to try.
struct Probe {
    file: &'static str,
    source: &'static str,
    command: &'static [&'static str],
}

const RUST: Probe = Probe {
    file: "probe.rs",
    source: "pub fn probe() -> u32 {\n    42\n}\n",
    // sccache caches a rustc call only with these (`src/compiler/rust.rs`).
    command: &[
        "rustc",
        "--crate-name=sccache_action_probe",
        "--crate-type=lib",
        "--emit=dep-info,metadata,link",
        "--out-dir=.",
        "probe.rs",
    ],
};

const C: Probe = Probe {
    file: "probe.c",
    source: "int sccache_action_probe(void) { return 42; }\n",
    command: &["cc", "-c", "probe.c", "-o", "probe.o"],
};

/// Runs a compile of each language in `wrap` whose compiler is there and works.
///
/// It compiles in the same folder of `temporary` each time and the same source, so that the cache
/// gets one object and not one for each job. The folder is outside the workspace, where a toolchain
/// file would make rustup download a toolchain that the job has not asked for yet.
///
/// # Errors
/// Fails if a compile fails with sccache that succeeds without it.
pub async fn run(
    server: &Server,
    environment: &Environment,
    wrap: Wrap,
    temporary: &Path,
    log: &Log,
) -> Result<(), ServerError> {
    let folder = temporary.join("sccache-action-probe");
    let mut environment = environment.for_programs();
    // Later steps have the same setting: sccache refuses to run incremental compiles.
    environment.set("CARGO_INCREMENTAL", "0");
    let probes = [(wrap.rust, RUST), (wrap.c || wrap.cuda, C)];
    for probe in probes
        .iter()
        .filter_map(|(wanted, probe)| wanted.then_some(probe))
    {
        if let Some(skipped) = try_out(server, &environment, &folder, probe).await? {
            log.debug(format!("no probe with {}: {skipped}", probe.command[0]));
        }
    }
    // No other step needs its files.
    let _ = fs::remove_dir_all(&folder);
    Ok(())
}

/// Why the probe could not be made, or `None` if it was and succeeded.
async fn try_out(
    server: &Server,
    environment: &Environment,
    folder: &Path,
    probe: &Probe,
) -> Result<Option<String>, ServerError> {
    let Some(compiler) = environment.find_program(probe.command[0]) else {
        return Ok(Some("it is not on PATH".to_owned()));
    };
    let prepared =
        fs::create_dir_all(folder).and_then(|()| fs::write(folder.join(probe.file), probe.source));
    if let Err(error) = prepared {
        return Ok(Some(format!("{}: {error}", folder.display())));
    }
    let mut command: Vec<String> = vec![compiler.display().to_string()];
    command.extend(probe.command[1..].iter().map(|word| (*word).to_owned()));
    let Err(error) = server.compile(environment, folder, &command).await else {
        return Ok(None);
    };
    // A compiler that is not set up yet (rustup's without a toolchain) fails without sccache too.
    if compiles_without_sccache(environment, folder, &command).await {
        return Err(error);
    }
    Ok(Some("it fails without sccache too".to_owned()))
}

async fn compiles_without_sccache(
    environment: &Environment,
    folder: &Path,
    command: &[String],
) -> bool {
    let Some((program, arguments)) = command.split_first() else {
        return false;
    };
    let status = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .envs(environment.iter())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    let limited = tokio::time::timeout(crate::sccache::server::COMPILE_TIMEOUT, status);
    matches!(limited.await, Ok(Ok(status)) if status.success())
}
