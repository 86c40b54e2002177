//! The relay of a job: started by the main step, ended by the post step, replaced where it died.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::action::environment::Environment;
use crate::action::inputs::Inputs;
use crate::action::scopes::{self, Scopes};
use crate::action::workflow_command::Log;
use crate::github::cache_client::Endpoint;
use crate::install::Platform;
use crate::relay::activity::Activity;
use crate::relay::process::{self, RunningRelay, Tie};
use crate::relay::{Config, FREE_FLOOR};
use crate::sccache::state::StateDir;
use crate::service::auth::BearerToken;
use crate::store::flush::Limits;
use crate::store::index::Ran;

/// What is said of a job whose token may not write.
pub const READ_ONLY_TOKEN: &str =
    "The job's token may only read GitHub's cache, so nothing will be written to it.";

/// How long a relay that replaces one that died may take to learn what is saved already.
const LEARN_WAIT: Duration = Duration::from_secs(20);

/// A relay, and what it lets in. It ends with this process, also where that is killed, unless it is
/// left to itself before.
#[derive(Debug)]
pub struct StartedRelay {
    /// The relay.
    pub running: RunningRelay,
    /// What sccache's server shows it.
    pub client_token: BearerToken,
    /// Whether it saves anything.
    pub may_write: bool,
    tie: Tie,
}

impl StartedRelay {
    /// Lets it live on when this process ends.
    ///
    /// # Errors
    /// Where it is gone.
    pub async fn leave(self) -> io::Result<()> {
        self.tie.untie().await
    }

    /// Ends a relay that is not needed.
    pub async fn stop(&self) {
        // One that does not answer ends by itself, and holds nothing.
        let _ = self.running.finish(Duration::ZERO, None).await;
    }
}

/// Starts the relay of a job, or says why it cannot be had, in words that follow "because".
///
/// # Errors
/// The words.
pub async fn start(
    environment: &Environment,
    inputs: &Inputs,
    program: &Path,
    state_dir: &StateDir,
    log: &Log,
) -> Result<StartedRelay, String> {
    let endpoint = Endpoint::of(environment)
        .ok_or("the address of the runner's cache service cannot be understood")?;
    let token = || BearerToken::random().map_err(|error| error.to_string());
    let (client_token, control_token) = (token()?, token()?);
    for secret in [&client_token, &control_token] {
        log.mask(secret.reveal());
    }
    let by_token = scopes::token_is_read_only(environment);
    let scopes = Scopes::of(environment, inputs.read_only.unwrap_or(by_token));
    if by_token && inputs.read_only.is_none() {
        log.info(READ_ONLY_TOKEN);
    }
    let platform = Platform::current().runner();
    let may_write = scopes.write.is_some();
    let flush_age = environment
        .get("SCCACHE_ACTION_FLUSH_SECONDS")
        .and_then(|seconds| seconds.parse().ok());
    let free_floor = environment
        .get("SCCACHE_ACTION_FREE_FLOOR")
        .and_then(|bytes| bytes.parse().ok());
    let config = Config {
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
        flush_age: flush_age.map_or(Limits::default().age, Duration::from_secs),
        free_floor: free_floor.unwrap_or(FREE_FLOOR),
    };
    let (running, tie) = process::start(program, environment, &config, &state_dir.relay_log())
        .await
        .map_err(|error| error.to_string())?;
    Ok(StartedRelay {
        running,
        client_token,
        may_write,
        tie,
    })
}

/// Has another relay save what is on sccache's disk within `limit`, where the one of the job died,
/// and what came of the run.
///
/// # Errors
/// Why that is not done, in words.
pub async fn replace(
    environment: &Environment,
    inputs: &Inputs,
    program: &Path,
    state_dir: &StateDir,
    (limit, ran): (Duration, Option<Ran>),
    log: &Log,
) -> Result<Activity, String> {
    let disk_level = state_dir.disk_level();
    let mut entries = std::fs::read_dir(&disk_level).map_err(|error| error.to_string())?;
    if entries.next().is_none() {
        return Err("nothing was left on sccache's disk".to_owned());
    }
    // What the dead one had is of no use without it.
    match std::fs::remove_dir_all(state_dir.relay()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.to_string()),
        _ => {}
    }
    let relay = start(environment, inputs, program, state_dir, log).await?;
    let learnt = relay.running.hydrate(Some(disk_level), LEARN_WAIT).await;
    if let Err(error) = learnt {
        relay.stop().await;
        return Err(error.to_string());
    }
    let finished = relay.running.finish(limit, ran).await;
    finished.map_err(|error| error.to_string())
}
