//! The main step: installs sccache, starts its server, tries it, and only then tells later steps
//! of it.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::action::cargo;
use crate::action::environment::Environment;
use crate::action::inputs::{Inputs, OnFailure, Secret, Wrap};
use crate::action::mode::{
    self, CHAIN_SINCE, CONFIGURATION_FILE, Choice, Mode, READ_ONLY_SINCE, RelayAccess, Storage,
};
use crate::action::probe;
use crate::action::relay::{self, StartedRelay};
use crate::action::runner_files::{RunnerFiles, Variable};
use crate::action::scopes;
use crate::action::state::{Setup, State};
use crate::action::workflow_command::Log;
use crate::github;
use crate::http_client::Timeouts;
use crate::install::{self, InstallError, Installed, Platform};
use crate::sccache::server::{self, Server, ServerError, ServerProcess};
use crate::sccache::state::{SetUpSccache, StateDir, sccache_on_path};
use crate::sccache::stats::Stats;
use crate::stop_signal::stop_signal;
use crate::wrapper;

const TITLE: &str = "sccache";

/// How often a port is chosen anew when another process takes it first.
const PORT_ATTEMPTS: usize = 3;

/// How long the set-up waits for what the packs hold for sccache's disk, at most. Without it the
/// build is as right, and slower by less than this.
const HYDRATE_WAIT: Duration = Duration::from_secs(20);

/// What becomes of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The step is green, with sccache or without.
    Done,
    /// The step is red: the user's inputs cannot be followed, or the user asked for strictness.
    Failed,
}

/// Why sccache is not set up.
#[derive(Debug, thiserror::Error)]
enum SetupError {
    #[error(transparent)]
    Install(#[from] InstallError),
    #[error("objects cannot be kept where they should be: {0}")]
    Mode(String),
    #[error("the sccache server did not start: {0}")]
    Start(#[source] ServerError),
    #[error("sccache does not get a compile done: {0}")]
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
struct Ready {
    installed: Installed,
    state_dir: StateDir,
    server: Server,
    mode: Mode,
    cache_location: String,
    read_only: bool,
    relay: Option<StartedRelay>,
    /// The server where it is a child of this process; else the relay's.
    process: Option<ServerProcess>,
}

impl Ready {
    /// Lets everything live on that later steps have been told of.
    async fn leave(self) {
        if let Some(process) = self.process {
            process.leave();
        }
        if let Some(relay) = self.relay {
            // The post step finds out, and says so, where it is gone already.
            let _ = relay.leave().await;
        }
    }
}

/// Runs the step to its end, or until the job is cancelled: then what it started is ended, and later
/// steps are told that there is no sccache. Parameters are those of [`run`].
pub async fn run_unless_cancelled(environment: &Environment, program: &Path, log: &Log) -> Outcome {
    // From here on: the first thing that the set-up does is to copy files.
    let cancelled = cancelled();
    tokio::select! {
        outcome = run(environment, program, log) => outcome,
        () = cancelled => {
            log.info("The set-up was cancelled; what it had started is ended.");
            let reason = "the job was cancelled during the set-up".to_owned();
            let setup = Setup::Failed { reason };
            // Without it the post step only has less to say.
            let _ = RunnerFiles::of(environment).save_state(&setup.to_variables());
            Outcome::Done
        }
    }
}

/// Ends when the runner cancels the job: it sends SIGINT, SIGTERM 7.5 s later, and kills 2.5 s after.
/// A job whose signals cannot be had is set up all the same.
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
/// of sccache (see [`wrapper`]).
pub async fn run(environment: &Environment, program: &Path, log: &Log) -> Outcome {
    for secret in ["INPUT_TOKEN", "ACTIONS_RUNTIME_TOKEN"] {
        if let Some(secret) = environment.get(secret) {
            log.mask(secret);
        }
    }
    let inputs = match Inputs::parse(environment) {
        Ok(inputs) => inputs,
        Err(error) => {
            log.error(TITLE, error.to_string());
            return Outcome::Failed;
        }
    };
    let files = RunnerFiles::of(environment);
    let outcome = match set_up(environment, &inputs, program, log).await {
        Ok(ready) => match publish(environment, &inputs, &ready, program, &files) {
            Ok(()) => Ok(ready),
            Err(error) => {
                // Later steps know nothing of it, so nothing would stop it either.
                let _ = ready.server.stop().await;
                if let Some(relay) = &ready.relay {
                    relay.stop().await;
                }
                Err(error)
            }
        },
        Err(error) => Err(error),
    };
    match outcome {
        Ok(ready) => {
            log.info(greeting(&ready));
            ready.leave().await;
            Outcome::Done
        }
        Err(error) => failed(environment, &error, &inputs, program, &files, log),
    }
}

fn greeting(ready: &Ready) -> String {
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
) -> Outcome {
    if inputs.on_failure == OnFailure::Fail {
        log.error(TITLE, format!("sccache cannot be set up: {error}"));
        return Outcome::Failed;
    }
    let mut text = format!("sccache is not used, and the build goes on without a cache: {error}");
    if let Err(error) = stand_in(environment, program, files) {
        let _ = write!(
            text,
            "\nA stand-in for sccache could not be made, for steps that call it: {error}"
        );
    }
    log.warning(TITLE, text);
    let setup = Setup::Failed {
        reason: log.redact(&error.to_string()),
    };
    // Without it the post step only has less to say.
    let _ = files.save_state(&setup.to_variables());
    Outcome::Done
}

/// Whether a variable of the workflow's own calls `sccache`, wherever on `PATH` that is.
fn names_sccache(environment: &Environment) -> bool {
    [
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_RUSTC_WRAPPER",
        "CMAKE_C_COMPILER_LAUNCHER",
        "CMAKE_CXX_COMPILER_LAUNCHER",
        "CMAKE_CUDA_COMPILER_LAUNCHER",
        "CC",
        "CXX",
        "NVCC",
    ]
    .into_iter()
    .any(|name| {
        environment.get(name).is_some_and(|value| {
            value
                .split_whitespace()
                .next()
                .is_some_and(|program| program == "sccache" || program == "sccache.exe")
        })
    })
}

/// Makes a `sccache` that only runs the compiler, for later steps: they may call it whether anything is
/// exported or not, by a variable of this job's, or by a command or a setting that cannot be seen from
/// here. Where the runner has an sccache of its own, the latter call that one, as they would without
/// this action.
fn stand_in(environment: &Environment, program: &Path, files: &RunnerFiles) -> io::Result<()> {
    let wrapper = folder_for_programs(environment, program)?.wrapper();
    if let Some(folder) = wrapper.parent()
        && (names_sccache(environment) || sccache_on_path(environment).is_none())
    {
        files.add_to_path(folder)?;
    }
    if environment.has("SCCACHE_PATH") {
        return Ok(());
    }
    files.export(&[("SCCACHE_PATH".to_owned(), wrapper.display().to_string())])
}

/// The runner's folder for temporary files, which it empties between jobs.
fn temporary_folder(environment: &Environment) -> PathBuf {
    environment
        .path("RUNNER_TEMP")
        .unwrap_or_else(std::env::temp_dir)
}

/// A new state folder with the wrapper in it: in the runner's folder for temporary files, or where that is
/// full, or on a file system on which nothing can be run, in the first other one that will do.
///
/// # Errors
/// Where none will, with the reason of the first.
fn folder_for_programs(environment: &Environment, program: &Path) -> io::Result<StateDir> {
    let mut first_error = None;
    let named = [
        Some(temporary_folder(environment)),
        environment.path("RUNNER_TOOL_CACHE"),
        Some(std::env::temp_dir()),
    ];
    for folder in named.into_iter().flatten() {
        let tried = StateDir::create(&folder, None).and_then(|state_dir| {
            let installed = wrapper::install(program, &state_dir);
            // On a full disk half a copy would take the rest of it.
            installed.inspect_err(|_| drop(std::fs::remove_dir_all(state_dir.root())))?;
            Ok(state_dir)
        });
        match tried {
            Ok(state_dir) => return Ok(state_dir),
            Err(error) => {
                first_error.get_or_insert_with(|| {
                    io::Error::new(error.kind(), format!("{}: {error}", folder.display()))
                });
            }
        }
    }
    Err(first_error.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
}

async fn set_up(
    environment: &Environment,
    inputs: &Inputs,
    program: &Path,
    log: &Log,
) -> Result<Ready, SetupError> {
    let temporary = temporary_folder(environment);
    let state_dir = folder_for_programs(environment, program).map_err(SetupError::io(
        "no folder in which sccache's wrapper can be run",
    ))?;
    let mut choice = mode::choose(inputs.mode, environment);
    // Before anything else, since it reads its indexes while sccache is installed.
    let mut relay = None;
    if choice.mode == Mode::Packed {
        match relay::start(environment, inputs, program, &state_dir, log).await {
            Ok(started) => relay = Some(started),
            Err(why) => {
                choice = Choice {
                    mode: Mode::Local,
                    warning: Some(why),
                };
            }
        }
    }
    let begun = Begun {
        environment,
        inputs,
        state_dir: &state_dir,
        temporary: &temporary,
        relay: relay.as_ref(),
    };
    // The two wait for each other nowhere.
    let (ready, ()) = tokio::join!(begun.set_up(choice, log), begun.restore_cargo(log));
    let ready = match (ready, relay) {
        (Ok(ready), Some(relay)) if ready.mode == Mode::Packed => Ok(Ready {
            read_only: ready.read_only || !relay.may_write,
            relay: Some(relay),
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
        // Nobody was told of it.
        let _ = std::fs::remove_dir_all(state_dir.root());
    }
    ready
}

/// A set-up that is under way.
struct Begun<'a> {
    environment: &'a Environment,
    inputs: &'a Inputs,
    state_dir: &'a StateDir,
    temporary: &'a Path,
    relay: Option<&'a StartedRelay>,
}

impl Begun<'_> {
    async fn restore_cargo(&self, log: &Log) {
        let rust = rust_goes_through_sccache(self.environment, self.inputs.wrap);
        if let Some(relay) = self.relay
            && cargo::is_wanted(self.environment, self.inputs, rust, log)
        {
            let relay = &relay.running;
            cargo::restore(self.environment, self.inputs, self.state_dir, relay, log).await;
        }
    }

    async fn set_up(&self, choice: Choice, log: &Log) -> Result<Ready, SetupError> {
        let installed = install(self.environment, self.inputs, log).await?;
        let sccache = SetUpSccache {
            version: Some(installed.version.clone()),
            ..SetUpSccache::at(&installed.path)
        };
        self.state_dir
            .set_sccache(&sccache)
            .map_err(SetupError::io("sccache's path cannot be written down"))?;
        let started = self.start(choice, &installed, log).await?;
        let server = started.server;
        let tried = async {
            let wrap = self.inputs.wrap;
            probe::run(&server, self.environment, wrap, self.temporary, log)
                .await
                .map_err(SetupError::Probe)?;
            server.zero_statistics().await.map_err(SetupError::Start)
        };
        if let Err(error) = tried.await {
            let _ = server.stop().await;
            return Err(error);
        }
        Ok(Ready {
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

async fn install(
    environment: &Environment,
    inputs: &Inputs,
    log: &Log,
) -> Result<Installed, SetupError> {
    let request = install::Request {
        version: &inputs.version,
        sources: &inputs.install_from,
        token: inputs.token.as_ref().map(Secret::reveal),
        checksum: inputs.checksum,
        // sccache's releases are on GitHub itself, also for a job of an Enterprise Server.
        api_url: environment
            .get("SCCACHE_ACTION_API_URL")
            .unwrap_or(github::API_URL),
        releases_url: &inputs.mirror,
        environment,
        platform: Platform::current(),
        timeouts: Timeouts::default(),
    };
    Ok(install::install(&request, log).await?)
}

/// A server that runs.
struct Started {
    server: Server,
    process: Option<ServerProcess>,
    mode: Mode,
    cache_location: String,
    read_only: bool,
}

impl Begun<'_> {
    /// Starts the server in the mode of this job, or where that cannot be had on the local disk.
    async fn start(
        &self,
        choice: Choice,
        installed: &Installed,
        log: &Log,
    ) -> Result<Started, SetupError> {
        let inputs = self.inputs;
        if let Some(why) = choice.warning {
            settle_for_the_disk(inputs, why, log)?;
        }
        let mut storage = Storage {
            mode: choice.mode,
            namespace: inputs.namespace.as_deref(),
            read_only: read_only(self.environment, inputs, installed, choice.mode, log),
            relay: None,
        };
        if storage.mode == Mode::Packed {
            storage.relay = self.relay_access(installed, log).await?;
        }
        let version = &installed.version;
        let why = match self.start_with(&storage, installed, log).await {
            // A build that does not know the variables goes to its disk without a word.
            Ok(started)
                if storage.mode.needs_cache_service() && is_local(&started.cache_location) =>
            {
                let _ = started.server.stop().await;
                format!("sccache {version} does not use GitHub's cache")
            }
            Ok(mut started) => {
                if is_local(&started.cache_location) {
                    started.mode = Mode::Local;
                }
                if storage.mode == Mode::Packed {
                    started.cache_location = PACKED_LOCATION.to_owned();
                }
                return Ok(started);
            }
            Err(error) if storage.mode == Mode::Local => return Err(SetupError::Start(error)),
            Err(error) if error.storage_not_built_in() => format!(
                "this build of sccache {version} was made without the storage of mode {}",
                storage.mode
            ),
            Err(error) => format!("mode {} cannot be had: {error}", storage.mode),
        };
        settle_for_the_disk(inputs, why, log)?;
        storage.read_only = if storage.mode == Mode::Packed {
            // The relay was to see to it.
            read_only(self.environment, inputs, installed, Mode::Local, log)
        } else {
            inputs.read_only == Some(true) && storage.read_only
        };
        storage.mode = Mode::Local;
        self.start_with(&storage, installed, log)
            .await
            .map_err(SetupError::Start)
    }

    /// How the server reaches the relay. Where it can have a disk cache in front, that is filled
    /// first.
    async fn relay_access(
        &self,
        installed: &Installed,
        log: &Log,
    ) -> Result<Option<RelayAccess<'_>>, SetupError> {
        let Some(relay) = self.relay else {
            return Ok(None);
        };
        let disk_level = (installed.version >= CHAIN_SINCE).then(|| self.state_dir.disk_level());
        // An sccache without a disk cache in front waits for nothing.
        let strict = self.inputs.on_failure == OnFailure::Fail;
        if strict || disk_level.is_some() {
            let hydrated = relay
                .running
                .hydrate(disk_level.clone(), HYDRATE_WAIT)
                .await;
            let trouble = match hydrated {
                Ok(hydrated) => {
                    log.debug(format!("hydrated: {hydrated:?}"));
                    hydrated.trouble
                }
                Err(error) => Some(error.to_string()),
            };
            match trouble {
                Some(trouble) if strict => return Err(SetupError::Mode(trouble)),
                // It may pass, and if not the post step warns of it.
                Some(trouble) => log.info(format!("GitHub's cache: {trouble}")),
                None => {}
            }
        }
        Ok(Some(RelayAccess {
            url: relay.running.url(),
            token: relay.client_token.reveal(),
            disk_level,
        }))
    }
}

/// Where objects are in mode `packed`, in the words of the output `cache-location`.
const PACKED_LOCATION: &str = "GitHub's cache, in packs";

/// Says why objects are kept on the disk and not where they should be, or fails where the user
/// wants no less than asked for.
fn settle_for_the_disk(inputs: &Inputs, why: String, log: &Log) -> Result<(), SetupError> {
    if inputs.on_failure == OnFailure::Fail {
        return Err(SetupError::Mode(why));
    }
    log.warning(
        TITLE,
        format!("Objects are kept on this machine's disk only, because {why}"),
    );
    Ok(())
}

fn is_local(cache_location: &str) -> bool {
    cache_location.starts_with("Local disk")
}

fn read_only(
    environment: &Environment,
    inputs: &Inputs,
    installed: &Installed,
    mode: Mode,
    log: &Log,
) -> bool {
    if mode == Mode::Packed {
        // The relay's to see to.
        return false;
    }
    let by_token = mode == Mode::Direct && scopes::token_is_read_only(environment);
    let read_only = inputs.read_only.unwrap_or(by_token);
    if read_only && installed.version < READ_ONLY_SINCE {
        let version = &installed.version;
        if inputs.read_only == Some(true) {
            log.warning(
                TITLE,
                format!(
                    "sccache {version} cannot be kept from writing; `read-only` needs \
                     {READ_ONLY_SINCE} or newer."
                ),
            );
        }
        return false;
    }
    if read_only && inputs.read_only.is_none() {
        log.info(relay::READ_ONLY_TOKEN);
    }
    if read_only && mode == Mode::External && environment.has(CONFIGURATION_FILE) {
        log.warning(
            TITLE,
            format!(
                "`read-only` does not reach the storages of the file that {CONFIGURATION_FILE} \
                 names: set `rw_mode = \"READ_ONLY\"` for each of them there."
            ),
        );
    }
    read_only
}

impl Begun<'_> {
    /// Starts the server and asks it where it keeps objects.
    async fn start_with(
        &self,
        storage: &Storage<'_>,
        installed: &Installed,
        log: &Log,
    ) -> Result<Started, ServerError> {
        let environment = self.environment;
        let mut server_environment = mode::server_environment(environment, storage);
        without_unusable_temporary_folder(&mut server_environment);
        if !server_environment.has("SCCACHE_ERROR_LOG") {
            let path = self.state_dir.server_log().display().to_string();
            server_environment.set("SCCACHE_ERROR_LOG", path);
            if !server_environment.has("SCCACHE_LOG") {
                let level = match storage.mode {
                    // opendal warns of each miss, and the relay has its own say of what went wrong.
                    Mode::Packed => "warn,opendal=error",
                    _ => "warn",
                };
                server_environment.set("SCCACHE_LOG", level);
            }
        }
        let mut wanted = environment
            .get("SCCACHE_SERVER_PORT")
            .and_then(|port| port.parse().ok());
        let mut attempt = 1;
        let (server, process) = loop {
            let port = match wanted.take() {
                Some(port) => port,
                None => server::free_port().map_err(|error| ServerError::NotRun {
                    sccache: installed.path.clone(),
                    error,
                })?,
            };
            let server = Server::new(installed.path.clone(), port);
            // Starting where another job's server listens would speak to that one.
            let error = if server.is_listening().await {
                None
            } else {
                match self
                    .start_server(&server, &server_environment, storage)
                    .await
                {
                    Ok(process) => break (server, process),
                    Err(error) if error.port_taken() && attempt < PORT_ATTEMPTS => Some(error),
                    Err(error) => return Err(error),
                }
            };
            log.debug(format!(
                "port {port} is taken{}",
                error.map_or_else(String::new, |error| format!(": {error}"))
            ));
            attempt += 1;
        };
        let location = match server.statistics().await {
            Ok(json) => Stats::parse(&json)
                .ok()
                .and_then(|stats| stats.cache_location),
            Err(error) => {
                let _ = server.stop().await;
                return Err(error);
            }
        };
        Ok(Started {
            server,
            process,
            mode: storage.mode,
            cache_location: location.unwrap_or_default(),
            read_only: storage.read_only,
        })
    }
}

impl Begun<'_> {
    /// Starts the server: the relay does it where there is one, which starts it again where it dies.
    async fn start_server(
        &self,
        server: &Server,
        environment: &Environment,
        storage: &Storage<'_>,
    ) -> Result<Option<ServerProcess>, ServerError> {
        match self.relay.filter(|_| storage.mode == Mode::Packed) {
            Some(relay) => {
                let started = relay.running.start_server(server, environment).await;
                started.map(|()| None)
            }
            None => server.start(environment).await.map(Some),
        }
    }
}

/// Takes a TMPDIR out of the server's environment in which nothing can be written: compilers then use
/// `/tmp`, and so should sccache, which does not by itself.
fn without_unusable_temporary_folder(server: &mut Environment) {
    if let Some(folder) = server.path("TMPDIR")
        && tempfile::tempfile_in(folder).is_err()
    {
        server.remove("TMPDIR");
    }
}

/// Tells the post step and later steps.
fn publish(
    environment: &Environment,
    inputs: &Inputs,
    ready: &Ready,
    program: &Path,
    files: &RunnerFiles,
) -> Result<(), SetupError> {
    let state = State {
        state_dir: ready.state_dir.clone(),
        port: ready.server.port(),
        mode: ready.mode,
        version: ready.installed.version.to_string(),
        cache_location: ready.cache_location.clone(),
        read_only: ready.read_only,
        relay: ready.relay.as_ref().map(|relay| relay.running.clone()),
    };
    let sccache = SetUpSccache {
        path: ready.installed.path.clone(),
        version: Some(ready.installed.version.clone()),
        port: Some(ready.server.port()),
        relay: ready.relay.as_ref().map(|relay| relay.running.port),
    };
    // Without it the wrapper only goes by the environment, and cannot ask the relay whether it lives.
    let _ = ready.state_dir.set_sccache(&sccache);
    // Without it `stats` and `doctor` only have less to say.
    let _ = ready.state_dir.set_about(&state.about(program));
    let setup = Setup::Done(state);
    let has_disk_level = ready.relay.is_some() && ready.installed.version >= CHAIN_SINCE;
    let disk_level = has_disk_level.then(|| ready.state_dir.disk_level());
    let told = || {
        files.save_state(&setup.to_variables())?;
        files.set_outputs(&outputs(ready))?;
        if let Some(folder) = ready.state_dir.wrapper().parent() {
            files.add_to_path(folder)?;
        }
        files.export(&exports(
            environment,
            inputs.wrap,
            ready.mode,
            ready.server.port(),
            &ready.state_dir.wrapper(),
            disk_level.as_deref(),
        ))
    };
    told().map_err(SetupError::io("the runner's files cannot be written"))
}

fn outputs(ready: &Ready) -> Vec<Variable> {
    [
        ("version", ready.installed.version.to_string()),
        ("path", ready.installed.path.display().to_string()),
        ("mode", ready.mode.to_string()),
        ("cache-location", ready.cache_location.clone()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// The variables that later steps get: each one that the user has not set.
fn exports(
    environment: &Environment,
    wrap: Wrap,
    mode: Mode,
    port: u16,
    wrapper: &Path,
    disk_level: Option<&Path>,
) -> Vec<Variable> {
    let wrapper = wrapper.display().to_string();
    // Where this set-up's server is, is never the user's to say: another's would be asked.
    let mut exports = vec![
        ("SCCACHE_SERVER_PORT", port.to_string()),
        ("SCCACHE_PATH", wrapper.clone()),
    ];
    if let Some(folder) = disk_level {
        // Where this server's disk cache is neither. One that sccache starts in place of it goes on
        // with what is there, and what that adds is saved all the same.
        exports.push(("SCCACHE_DIR", folder.display().to_string()));
    }
    let mut unless_set = |name: &'static str, value: &str| {
        if !environment.has(name) {
            exports.push((name, value.to_owned()));
        }
    };
    match mode {
        // The wrapper keeps it from a server that sccache would start by itself.
        Mode::Packed | Mode::Direct => unless_set("SCCACHE_GHA_ENABLED", "true"),
        Mode::Local | Mode::External => {}
    }
    unless_set("SCCACHE_IDLE_TIMEOUT", "0");
    unless_set("SCCACHE_IGNORE_SERVER_IO_ERROR", "1");
    if wrap.rust {
        unless_set("RUSTC_WRAPPER", &wrapper);
    }
    let launcher = as_cmake_writes_it(&wrapper);
    if wrap.c {
        unless_set("CMAKE_C_COMPILER_LAUNCHER", &launcher);
        unless_set("CMAKE_CXX_COMPILER_LAUNCHER", &launcher);
    }
    if wrap.cuda {
        unless_set("CMAKE_CUDA_COMPILER_LAUNCHER", &launcher);
    }
    // sccache does not cache what rustc compiles incrementally: since 0.5 it even refuses to
    // run it, so this one is not left to what the user has set for builds without sccache.
    if rust_goes_through_sccache(environment, wrap) {
        exports.push(("CARGO_INCREMENTAL", "0".to_owned()));
    }
    exports
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// A path as CMake writes paths. Projects hand launchers on to others that they build, as text of
/// CMake's language, in which a backslash is the beginning of an escape.
fn as_cmake_writes_it(path: &str) -> String {
    if cfg!(windows) {
        path.replace('\\', "/")
    } else {
        path.to_owned()
    }
}

/// Whether cargo will call sccache: ours, or the workflow's own word for it.
fn rust_goes_through_sccache(environment: &Environment, wrap: Wrap) -> bool {
    match environment.get("RUSTC_WRAPPER") {
        None => wrap.rust,
        Some(wrapper) => wrapper::is_wrapper(wrapper.as_ref()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exported(environment: &Environment, wrap: Wrap, mode: Mode) -> Environment {
        let wrapper = Path::new("/s/bin/sccache");
        let disk_level = (mode == Mode::Packed).then_some(Path::new("/s/disk"));
        exports(environment, wrap, mode, 7, wrapper, disk_level)
            .into_iter()
            .collect()
    }

    #[test]
    fn each_language_that_is_wrapped_gets_its_launcher_and_no_other_does() {
        let all = Wrap {
            rust: true,
            c: true,
            cuda: true,
        };
        let launchers = [
            "RUSTC_WRAPPER",
            "CMAKE_C_COMPILER_LAUNCHER",
            "CMAKE_CXX_COMPILER_LAUNCHER",
            "CMAKE_CUDA_COMPILER_LAUNCHER",
        ];
        let none = exported(&Environment::default(), Wrap::default(), Mode::Direct);
        let every = exported(&Environment::default(), all, Mode::Direct);
        for launcher in launchers {
            assert!(!none.has(launcher), "{launcher}");
            assert_eq!(every.get(launcher), Some("/s/bin/sccache"));
        }
        assert_eq!(every.get("CARGO_INCREMENTAL"), Some("0"));
        assert!(!none.has("CARGO_INCREMENTAL"));
    }

    #[test]
    fn a_path_is_given_to_cmake_as_cmake_writes_it() {
        let written = as_cmake_writes_it(r"C:\a\_temp\sccache.exe");
        if cfg!(windows) {
            assert_eq!(written, "C:/a/_temp/sccache.exe");
        } else {
            assert_eq!(written, r"C:\a\_temp\sccache.exe");
        }
    }

    #[test]
    fn what_the_user_set_is_left_alone() {
        let user = Environment::from_iter([
            ("RUSTC_WRAPPER", "other"),
            ("CARGO_INCREMENTAL", "1"),
            ("SCCACHE_IDLE_TIMEOUT", "60"),
            ("SCCACHE_SERVER_PORT", "4226"),
        ]);
        let rust = Wrap {
            rust: true,
            ..Wrap::default()
        };
        let exported = exported(&user, rust, Mode::Direct);
        for name in ["RUSTC_WRAPPER", "CARGO_INCREMENTAL", "SCCACHE_IDLE_TIMEOUT"] {
            assert!(!exported.has(name), "{name}");
        }
        assert_eq!(exported.get("SCCACHE_SERVER_PORT"), Some("7"));
    }

    #[test]
    fn incremental_builds_are_switched_off_where_sccache_would_refuse_them() {
        for (wrapper, expected) in [("sccache", Some("0")), ("", None), ("other", None)] {
            let user =
                Environment::from_iter([("RUSTC_WRAPPER", wrapper), ("CARGO_INCREMENTAL", "1")]);
            let exported = exported(&user, Wrap::default(), Mode::Direct);
            assert_eq!(exported.get("CARGO_INCREMENTAL"), expected, "{wrapper}");
        }
    }

    #[test]
    fn githubs_cache_is_switched_on_for_later_steps_only_where_it_is_used() {
        for (mode, expected) in [
            (Mode::Direct, Some("true")),
            (Mode::Packed, Some("true")),
            (Mode::Local, None),
            (Mode::External, None),
        ] {
            let exported = exported(&Environment::default(), Wrap::default(), mode);
            assert_eq!(exported.get("SCCACHE_GHA_ENABLED"), expected, "{mode}");
            assert_eq!(exported.has("SCCACHE_DIR"), mode == Mode::Packed, "{mode}");
        }
    }

    #[test]
    fn no_token_and_no_service_url_is_exported() {
        let environment = Environment::from_iter([
            ("ACTIONS_RUNTIME_TOKEN", "secret"),
            ("ACTIONS_RESULTS_URL", "https://results.example/"),
        ]);
        let all = exported(&environment, Wrap::default(), Mode::Direct);
        assert!(
            all.iter()
                .all(|(name, value)| !name.starts_with("ACTIONS_") && !value.contains("secret"))
        );
    }

    #[test]
    fn a_workflow_that_calls_sccache_by_itself_is_recognised() {
        let calls =
            |name: &str, value: &str| names_sccache(&Environment::from_iter([(name, value)]));
        assert!(calls("RUSTC_WRAPPER", "sccache"));
        assert!(calls("CC", "sccache gcc"));
        assert!(!calls("RUSTC_WRAPPER", "/opt/sccache"));
        assert!(!calls("CC", "gcc"));
    }
}
