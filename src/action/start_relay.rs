//! The relay of a job: the main step starts it, the post step ends it and replaces it if it
//! crashed. In modes without one, the process that keeps sccache's server.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::action::inputs::Inputs;
use crate::cache_client::Endpoint;
use crate::http::BearerToken;
use crate::install::Platform;
use crate::packs::flush::FlushLimits;
use crate::packs::index::RunStats;
use crate::relay::activity::Activity;
use crate::relay::process::{self, Lifeline, ProcessError, RunningRelay};
use crate::relay::{FREE_FLOOR, RelayConfig, RelayTask};
use crate::runner::environment::Environment;
use crate::runner::log::Log;
use crate::runner::scopes::{self, Permission, Scopes};
use crate::sccache::state_dir::StateDir;

/// The message for a job whose token may not write.
pub const READ_ONLY_TOKEN: &str =
    "The job's token is read-only, so the job writes nothing to GitHub's cache.";

/// The message for a job that may not read.
pub const WRITE_ONLY: &str =
    "The job may only write to GitHub's cache (cache mode `write-only`), so it reads nothing.";

/// How long a relay that replaces a crashed one may take to read the indexes of what is saved
/// already.
const PREFILL_WAIT: Duration = Duration::from_secs(20);

/// A relay, and the token that it accepts. It ends with this process, even if that is killed,
/// unless [`StartedRelay::leave`] detaches it before.
#[derive(Debug)]
pub struct StartedRelay {
    /// The relay.
    pub running: RunningRelay,
    /// The token that sccache's server sends it.
    pub client_token: BearerToken,
    /// Whether it saves anything.
    pub may_write: bool,
    /// Whether it is a cache, and not only the server's keeper.
    pub stores: bool,
    lifeline: Lifeline,
}

impl StartedRelay {
    /// Lets it live on when this process ends.
    ///
    /// # Errors
    /// Fails if it is gone.
    pub async fn leave(self) -> io::Result<()> {
        self.lifeline.detach().await
    }

    /// Ends a relay that is not needed.
    pub async fn stop(&self) {
        // A relay that does not answer ends itself, and holds nothing.
        let _ = self.running.finish(Duration::ZERO, None).await;
    }
}

/// Why there is no relay. The texts follow "because".
#[derive(Debug, thiserror::Error)]
pub enum NoRelay {
    /// The runner names no cache service.
    #[error("the address of the runner's cache service is invalid")]
    NoService,
    /// The system gives no random numbers.
    #[error("cannot read from the system's random generator: {0}")]
    Random(#[from] getrandom::Error),
    /// Its process did not start or does not answer.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The relay's folders cannot be read or removed.
    #[error(transparent)]
    Disk(#[from] io::Error),
    /// There is nothing that a replacement could save.
    #[error("there were no objects on sccache's disk")]
    NothingToSave,
}

/// Starts the relay of a job.
///
/// # Errors
/// [`NoRelay`] says why there is none.
pub async fn start(
    environment: &Environment,
    inputs: &Inputs,
    program: &Path,
    state_dir: &StateDir,
    log: &Log,
) -> Result<StartedRelay, NoRelay> {
    let permission = Permission::of(environment, inputs.read_only);
    let scopes = Scopes::of(environment, permission);
    if !permission.write && inputs.read_only.is_none() {
        log.info(READ_ONLY_TOKEN);
    }
    if !permission.read {
        log.info(WRITE_ONLY);
    }
    start_for(
        environment,
        inputs,
        program,
        state_dir,
        (RelayTask::Store, scopes),
        log,
    )
    .await
}

/// Starts the keeper of sccache's server in a mode without a relay: a process that has the server's
/// environment, which no later step has, and restarts the server after a crash.
///
/// # Errors
/// Fails with the reason: see [`NoRelay`].
pub async fn start_keeper(
    environment: &Environment,
    inputs: &Inputs,
    program: &Path,
    state_dir: &StateDir,
    log: &Log,
) -> Result<StartedRelay, NoRelay> {
    let scopes = Scopes {
        read: Vec::new(),
        write: None,
    };
    start_for(
        environment,
        inputs,
        program,
        state_dir,
        (RelayTask::KeepServer, scopes),
        log,
    )
    .await
}

async fn start_for(
    environment: &Environment,
    inputs: &Inputs,
    program: &Path,
    state_dir: &StateDir,
    (task, scopes): (RelayTask, Scopes),
    log: &Log,
) -> Result<StartedRelay, NoRelay> {
    let endpoint = Endpoint::of(environment).ok_or(NoRelay::NoService)?;
    let (client_token, control_token) = (BearerToken::random()?, BearerToken::random()?);
    for secret in [&client_token, &control_token] {
        log.mask(secret.reveal());
    }
    let platform = Platform::of(environment).runner();
    let may_write = scopes.write.is_some();
    let flush_age = environment
        .get("SCCACHE_ACTION_FLUSH_SECONDS")
        .and_then(|seconds| seconds.parse().ok());
    let free_floor = environment
        .get("SCCACHE_ACTION_FREE_FLOOR")
        .and_then(|bytes| bytes.parse().ok());
    let config = RelayConfig {
        task,
        endpoint,
        client_token: client_token.clone(),
        control_token,
        folder: state_dir.relay(),
        namespace: inputs.namespace.as_deref().unwrap_or("default").to_owned(),
        lane: scopes::lane(environment, &inputs.matrix, &platform),
        platform,
        read: scopes.read,
        write: scopes.write,
        max_size: inputs.max_size,
        flush_age: flush_age.map_or(FlushLimits::default().age, Duration::from_secs),
        free_floor: free_floor.unwrap_or(FREE_FLOOR),
    };
    let log = state_dir.relay_log();
    let (running, lifeline) = process::start(program, environment, &config, &log).await?;
    Ok(StartedRelay {
        running,
        client_token,
        may_write,
        stores: task == RelayTask::Store,
        lifeline,
    })
}

/// Replaces a crashed relay: a new one saves the objects on sccache's disk and the numbers of the
/// run within `limit`.
///
/// # Errors
/// Fails with the reason: see [`NoRelay`].
pub async fn replace(
    environment: &Environment,
    inputs: &Inputs,
    program: &Path,
    state_dir: &StateDir,
    (limit, run_stats): (Duration, Option<RunStats>),
    log: &Log,
) -> Result<Activity, NoRelay> {
    let disk_tier = state_dir.disk_tier();
    let mut entries = std::fs::read_dir(&disk_tier)?;
    if entries.next().is_none() {
        return Err(NoRelay::NothingToSave);
    }
    // The crashed relay's files are useless without it.
    match std::fs::remove_dir_all(state_dir.relay()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let relay = start(environment, inputs, program, state_dir, log).await?;
    let prefilled = relay.running.prefill(Some(disk_tier), PREFILL_WAIT).await;
    if let Err(error) = prefilled {
        relay.stop().await;
        return Err(error.into());
    }
    Ok(relay.running.finish(limit, run_stats).await?)
}
