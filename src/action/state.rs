//! The main step's results: for the post step through the runner, as `STATE_` variables; for
//! commands that a person runs in later steps, in the state folder.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::action::mode::Mode;
use crate::http::BearerToken;
use crate::relay::process::RunningRelay;
use crate::runner::environment::Environment;
use crate::runner::files::Variable;
use crate::sccache::state_dir::StateDir;

/// How the main step ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Setup {
    /// sccache was set up.
    Done(SetupState),
    /// It was not, and the build ran without sccache.
    Failed {
        /// The reason, without secrets.
        reason: String,
    },
}

/// A set-up sccache as the post step finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetupState {
    /// The set-up's folder.
    pub state_dir: StateDir,
    /// The server's port on 127.0.0.1.
    pub port: u16,
    /// The storage for objects.
    pub mode: Mode,
    /// sccache's version.
    pub version: String,
    /// The cache location in sccache's words.
    pub cache_location: String,
    /// Whether objects are only read.
    pub read_only: bool,
    /// The relay, in mode `packed`; else the keeper, if later steps lack a variable that the server
    /// needs.
    pub relay: Option<RunningRelay>,
}

/// The part of the set-up that any step of the job may know: all of [`SetupState`] except the
/// relay's token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupInfo {
    /// sccache's version.
    pub version: String,
    /// The storage for objects.
    pub mode: Mode,
    /// The cache location in sccache's words.
    pub cache_location: String,
    /// Whether objects are only read.
    pub read_only: bool,
    /// The server's port on 127.0.0.1.
    pub port: u16,
    /// The relay's port, in mode `packed`; else the keeper's.
    pub relay_port: Option<u16>,
    /// The action's own binary.
    pub program: PathBuf,
}

impl SetupState {
    /// The part that any step may know. `program` is the action's own binary.
    pub fn about(&self, program: &Path) -> SetupInfo {
        SetupInfo {
            version: self.version.clone(),
            mode: self.mode,
            cache_location: self.cache_location.clone(),
            read_only: self.read_only,
            port: self.port,
            relay_port: self.relay.as_ref().map(|relay| relay.port),
            program: program.to_owned(),
        }
    }
}

/// A job's set-up as a later step finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExistingSetup {
    /// Its folder.
    pub state_dir: StateDir,
    /// The information that it left there; `None` if the set-up did not get that far.
    pub about: Option<SetupInfo>,
}

impl ExistingSetup {
    /// The set-up that the exported variables name; `None` if they name none.
    pub fn of(environment: &Environment) -> Option<Self> {
        let wrapper = environment.path("SCCACHE_PATH")?;
        let state_dir = StateDir::of_wrapper(&wrapper)?;
        // Any program may be called so.
        let is_ours = state_dir.sccache().is_some() && state_dir.wrapper() == wrapper;
        is_ours.then(|| Self {
            about: state_dir.about(),
            state_dir,
        })
    }
}

const FOLDER: &str = "state-dir";
const PORT: &str = "port";
const MODE: &str = "mode";
const VERSION: &str = "version";
const LOCATION: &str = "cache-location";
const READ_ONLY: &str = "read-only";
const RELAY_PORT: &str = "relay-port";
const RELAY_TOKEN: &str = "relay-token";
const FAILED: &str = "failed";

impl Setup {
    /// The names and values to keep. [`Setup::of`] reads them back.
    pub fn to_variables(&self) -> Vec<Variable> {
        let pairs: Vec<(&str, String)> = match self {
            Self::Done(state) => [
                (FOLDER, state.state_dir.root().display().to_string()),
                (PORT, state.port.to_string()),
                (MODE, state.mode.to_string()),
                (VERSION, state.version.clone()),
                (LOCATION, state.cache_location.clone()),
                (READ_ONLY, state.read_only.to_string()),
            ]
            .into_iter()
            .chain(state.relay.iter().flat_map(|relay| {
                let token = relay.control_token.reveal().to_owned();
                [(RELAY_PORT, relay.port.to_string()), (RELAY_TOKEN, token)]
            }))
            .collect(),
            Self::Failed { reason } => vec![(FAILED, reason.clone())],
        };
        pairs
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    /// Reads the main step's result from `environment`; `None` if there is none.
    pub fn of(environment: &Environment) -> Option<Self> {
        let get = |name: &str| environment.get(&format!("STATE_{name}"));
        if let Some(reason) = get(FAILED) {
            let reason = reason.to_owned();
            return Some(Self::Failed { reason });
        }
        Some(Self::Done(SetupState {
            state_dir: StateDir::at(PathBuf::from(get(FOLDER)?)),
            port: get(PORT)?.parse().ok()?,
            mode: Mode::named(get(MODE)?)?,
            version: get(VERSION)?.to_owned(),
            cache_location: get(LOCATION).unwrap_or_default().to_owned(),
            read_only: get(READ_ONLY) == Some("true"),
            relay: get(RELAY_PORT)
                .zip(get(RELAY_TOKEN))
                .and_then(|(port, token)| {
                    Some(RunningRelay {
                        port: port.parse().ok()?,
                        control_token: BearerToken::new(token),
                    })
                }),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_step_finds_the_set_up_and_not_what_opens_the_relay() {
        let parent = tempfile::tempdir().unwrap();
        let state_dir = StateDir::create(parent.path(), Some(Path::new("/x"))).unwrap();
        let state = SetupState {
            state_dir: state_dir.clone(),
            port: 4711,
            mode: Mode::Packed,
            version: "0.16.0".to_owned(),
            cache_location: "somewhere".to_owned(),
            read_only: false,
            relay: Some(RunningRelay {
                port: 4712,
                control_token: BearerToken::new("hunter2"),
            }),
        };
        state_dir
            .set_about(&state.about(Path::new("/dist/x")))
            .unwrap();
        let wrapper = state_dir.wrapper().display().to_string();
        let found =
            ExistingSetup::of(&Environment::from_iter([("SCCACHE_PATH", wrapper)])).unwrap();
        assert_eq!(found.about, Some(state.about(Path::new("/dist/x"))));
        for entry in std::fs::read_dir(state_dir.root()).unwrap().flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            assert!(!text.contains("hunter2"), "{entry:?}");
        }
        let others = Environment::from_iter([("SCCACHE_PATH", "/usr/bin/sccache")]);
        assert_eq!(ExistingSetup::of(&others), None);
    }

    #[test]
    fn the_post_step_reads_what_the_main_step_left() {
        let done = Setup::Done(SetupState {
            state_dir: StateDir::at(PathBuf::from("/t/s")),
            port: 4711,
            mode: Mode::External,
            version: "0.16.0".to_owned(),
            cache_location: "Local disk: \"/x\"".to_owned(),
            read_only: true,
            relay: Some(RunningRelay {
                port: 4712,
                control_token: BearerToken::new("secret"),
            }),
        });
        let failed = Setup::Failed {
            reason: "no network".to_owned(),
        };
        for setup in [done, failed] {
            let environment: Environment = setup
                .to_variables()
                .into_iter()
                .map(|(name, value)| (format!("STATE_{name}"), value))
                .collect();
            assert_eq!(Setup::of(&environment), Some(setup));
        }
        assert_eq!(Setup::of(&Environment::default()), None);
    }
}
