//! The main step. It does the following in order:
//!
//! 1. reads the inputs (`inputs`) and chooses where objects are kept (`mode`, `storage`);
//! 2. makes the set-up's folder with the wrapper in it (`folders`);
//! 3. starts the relay, which reads its indexes while the next steps go on (`start_relay`);
//! 4. gets sccache (`install`), and beside that has the relay restore cargo's folders (`restore_cargo`);
//! 5. starts sccache's server (`server`);
//! 6. tries a compile of each language (`probe`);
//! 7. tells the post step and later steps (`publish`).
//!
//! If a step fails, the action undoes those before it, and `stand_in` keeps later steps running.

mod folders;
mod install;
mod probe;
mod publish;
mod server;
mod stand_in;
mod storage;

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use crate::action::inputs::{Inputs, OnFailure};
use crate::action::mode::{self, CHAIN, FallbackReason, Mode, ModeSelection};
use crate::action::restore_cargo;
use crate::action::setup::storage::{drop_github_from_chain, recache_variable};
use crate::action::start_relay::{self, StartedRelay};
use crate::action::state::Setup;
use crate::install::{InstallError, Installed};
use crate::runner::environment::Environment;
use crate::runner::files::RunnerFiles;
use crate::runner::log::Log;
use crate::runner::scopes::Permission;
use crate::sccache::server::{Server, ServerError, ServerProcess};
use crate::sccache::state_dir::{SetUpSccache, StateDir};
use crate::stop_signal::stop_signal;

const TITLE: &str = "sccache";

/// The result of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetupOutcome {
    /// The step is green, with sccache or without.
    Done,
    /// Failure: the user's inputs cannot be followed, or the user asked for strictness.
    Failed,
}

/// Why sccache is not set up.
#[derive(Debug, thiserror::Error)]
enum SetupError {
    #[error(transparent)]
    Install(#[from] InstallError),
    #[error("cannot use the configured storage: {0}")]
    Mode(String),
    #[error("the sccache server did not start: {0}")]
    Start(#[source] ServerError),
    #[error("the test compile failed: {0}")]
    Probe(#[source] ServerError),
    #[error("{what}: {error}")]
    Io {
        what: String,
        #[source]
        error: io::Error,
    },
}

impl SetupError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |error| Self::Io { what, error }
    }
}

/// A set-up sccache.
struct SetupResult {
    installed: Installed,
    state_dir: StateDir,
    server: Server,
    mode: Mode,
    cache_location: String,
    read_only: bool,
    /// The relay, or the server's keeper.
    relay: Option<StartedRelay>,
    /// The server, if it is a child of this process; else the relay owns it.
    process: Option<ServerProcess>,
}

impl SetupResult {
    /// Detaches the processes that later steps know of.
    async fn leave(self) {
        if let Some(process) = self.process {
            process.leave();
        }
        if let Some(relay) = self.relay {
            // If it is gone already, the post step reports it.
            let _ = relay.leave().await;
        }
    }
}

/// Runs the step to its end, or until the job is cancelled: then it ends the processes that it
/// started, and tells later steps that there is no sccache. Parameters are those of [`run`].
pub async fn run_unless_cancelled(
    environment: &Environment,
    program: &Path,
    log: &Log,
) -> SetupOutcome {
    // It starts here, because the set-up copies files first.
    let cancelled = cancelled();
    tokio::select! {
        outcome = run(environment, program, log) => outcome,
        () = cancelled => {
            log.info("The set-up was cancelled. All of its processes have ended.");
            let reason = "the job was cancelled during the set-up".to_owned();
            let setup = Setup::Failed { reason };
            // Without it the post step only has less to report.
            let _ = RunnerFiles::of(environment).save_state(&setup.to_variables());
            SetupOutcome::Done
        }
    }
}

/// Ends when the runner cancels the job: it sends SIGINT, SIGTERM 7.5 s later, and kills 2.5 s
/// after. If signals are unavailable, the job is set up all the same.
fn cancelled() -> impl Future<Output = ()> {
    let signal = stop_signal();
    async move {
        match signal {
            Ok(signal) => signal.await,
            Err(_) => std::future::pending().await,
        }
    }
}

/// Runs the step. `program` is the path of this process's binary, which later steps call in place
/// of sccache (see [`crate::wrapper`]).
pub async fn run(environment: &Environment, program: &Path, log: &Log) -> SetupOutcome {
    for secret in ["INPUT_TOKEN", "ACTIONS_RUNTIME_TOKEN"] {
        if let Some(secret) = environment.get(secret) {
            log.mask(secret);
        }
    }
    let inputs = match Inputs::parse(environment) {
        Ok(inputs) => inputs,
        Err(error) => {
            log.error(TITLE, error.to_string());
            return SetupOutcome::Failed;
        }
    };
    let files = RunnerFiles::of(environment);
    let outcome = match set_up(environment, &inputs, program, log).await {
        Ok(ready) => match publish::publish(environment, &inputs, &ready, program, &files) {
            Ok(()) => Ok(ready),
            Err(error) => {
                // Later steps know nothing of it, so nothing would stop it either.
                let _ = ready.server.stop().await;
                if let Some(relay) = &ready.relay {
                    relay.stop().await;
                }
                Err(SetupError::io("cannot write the runner's files")(error))
            }
        },
        Err(error) => Err(error),
    };
    match outcome {
        Ok(ready) => {
            log.info(greeting(&ready));
            ready.leave().await;
            SetupOutcome::Done
        }
        Err(error) => failed(environment, &error, &inputs, program, &files, log),
    }
}

fn greeting(ready: &SetupResult) -> String {
    let installed = &ready.installed;
    format!(
        "sccache {} ({}) is ready; mode {}; {}",
        installed.version, installed.source, ready.mode, ready.cache_location
    )
}

/// Ends a step without sccache.
fn failed(
    environment: &Environment,
    error: &SetupError,
    inputs: &Inputs,
    program: &Path,
    files: &RunnerFiles,
    log: &Log,
) -> SetupOutcome {
    if inputs.on_failure == OnFailure::Fail {
        log.error(TITLE, format!("sccache cannot be set up: {error}"));
        return SetupOutcome::Failed;
    }
    let mut text = format!("sccache is disabled; the build continues without a cache: {error}");
    if let Err(error) = stand_in::install_passthrough(environment, program, files) {
        let _ = write!(
            text,
            "\nCould not install a passthrough for steps that call sccache: {error}"
        );
    }
    log.warning(TITLE, text);
    let setup = Setup::Failed {
        reason: log.redact(&error.to_string()),
    };
    // Without it the post step only has less to report.
    let _ = files.save_state(&setup.to_variables());
    SetupOutcome::Done
}

async fn set_up(
    environment: &Environment,
    inputs: &Inputs,
    program: &Path,
    log: &Log,
) -> Result<SetupResult, SetupError> {
    let permission = Permission::of(environment, inputs.read_only);
    let mut selection = mode::select(inputs.mode, environment, permission);
    let with_other_chain;
    let environment = match &selection.chain {
        Some(chain) => {
            drop_github_from_chain(inputs, log)?;
            let mut other = environment.clone();
            other.set(CHAIN, chain.clone());
            with_other_chain = other;
            &with_other_chain
        }
        None => environment,
    };
    let state_dir = folders::with_wrapper(environment, program)
        .map_err(SetupError::io("no folder allows sccache's wrapper to run"))?;
    // It starts first, since it reads its indexes while sccache is installed.
    let mut relay = None;
    if selection.mode == Mode::Packed {
        match start_relay::start(environment, inputs, program, &state_dir, log).await {
            Ok(started) => relay = Some(started),
            Err(why) => {
                selection = ModeSelection {
                    mode: Mode::Local,
                    fallback: Some(FallbackReason::Unavailable(why.to_string())),
                    chain: None,
                };
            }
        }
    } else if mode::has_a_token_of_its_own(environment, selection.mode) {
        match start_relay::start_keeper(environment, inputs, program, &state_dir, log).await {
            Ok(started) => relay = Some(started),
            // Then nothing restarts the server; that is the only loss.
            Err(why) => log.debug(format!("no process can restart sccache's server: {why}")),
        }
    }
    let probes_in = folders::of_probes(environment, &state_dir);
    let context = SetupContext {
        environment,
        inputs,
        state_dir: &state_dir,
        probes: &probes_in,
        relay: relay.as_ref(),
        log,
    };
    // Neither of the two ever waits for the other.
    let (ready, ()) = tokio::join!(context.set_up_sccache(selection), context.restore_cargo());
    let ready = match (ready, relay) {
        (Ok(ready), Some(relay)) if ready.mode == Mode::Packed => Ok(SetupResult {
            read_only: ready.read_only || !relay.may_write,
            relay: Some(relay),
            ..ready
        }),
        (Ok(ready), Some(keeper)) if ready.mode != Mode::Local => Ok(SetupResult {
            relay: Some(keeper),
            ..ready
        }),
        (ready, relay) => {
            if let Some(relay) = relay {
                relay.stop().await;
            }
            ready
        }
    };
    if ready.is_err() {
        // No step knows of it.
        let _ = std::fs::remove_dir_all(state_dir.root());
    }
    ready
}

/// The inputs of the steps after the relay's start.
struct SetupContext<'a> {
    environment: &'a Environment,
    inputs: &'a Inputs,
    state_dir: &'a StateDir,
    /// The folder for probe compiles.
    probes: &'a Path,
    relay: Option<&'a StartedRelay>,
    log: &'a Log,
}

impl SetupContext<'_> {
    async fn restore_cargo(&self) {
        let rust = publish::rust_goes_through_sccache(self.environment, self.inputs.wrap);
        if let Some(relay) = self.relay.filter(|relay| relay.stores)
            && restore_cargo::is_wanted(self.environment, self.inputs, rust, self.log)
        {
            let relay = &relay.running;
            restore_cargo::restore(
                self.environment,
                self.inputs,
                self.state_dir,
                relay,
                self.log,
            )
            .await;
        }
    }

    async fn set_up_sccache(&self, selection: ModeSelection) -> Result<SetupResult, SetupError> {
        let installed = install::install(self.environment, self.inputs, self.log).await?;
        let sccache = SetUpSccache {
            version: Some(installed.version.clone()),
            ..SetUpSccache::at(&installed.path)
        };
        self.state_dir
            .set_sccache(&sccache)
            .map_err(SetupError::io("sccache's path cannot be saved"))?;
        let started = self.start_server(selection, &installed).await?;
        let server = started.server;
        let tried = async {
            let wrap = self.inputs.wrap;
            let mut environment = self.environment.clone();
            if let Some((name, value)) = recache_variable(&environment, self.inputs, started.mode) {
                environment.set(name, value);
            }
            probe::run(&server, &environment, wrap, self.probes, self.log)
                .await
                .map_err(SetupError::Probe)?;
            server.zero_statistics().await.map_err(SetupError::Start)
        };
        if let Err(error) = tried.await {
            let _ = server.stop().await;
            return Err(error);
        }
        Ok(SetupResult {
            installed,
            state_dir: self.state_dir.clone(),
            server,
            mode: started.mode,
            cache_location: started.cache_location,
            read_only: started.read_only,
            relay: None,
            process: started.process,
        })
    }
}
