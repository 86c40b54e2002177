//! Starts sccache's server, in the mode of this job or on the disk.

use std::time::Duration;

use crate::action::inputs::OnFailure;
use crate::action::mode::{
    self, CHAIN_SINCE, FallbackReason, Mode, ModeSelection, RelayAccess, ServerSettings,
};
use crate::action::setup::storage::{fall_back_to_local, read_only};
use crate::action::setup::{SetupContext, SetupError};
use crate::install::Installed;
use crate::runner::environment::Environment;
use crate::sccache::server::{self, Server, ServerError, ServerProcess};
use crate::sccache::stats::Stats;

/// How often a port is chosen again when another process takes it first.
const PORT_ATTEMPTS: usize = 3;

/// How long the set-up waits at most for the relay to fill sccache's disk from the packs. Without
/// it the build is just as correct, and slower by less than this.
const PREFILL_WAIT: Duration = Duration::from_secs(20);

/// The output `cache-location` in mode `packed`.
const PACKED_LOCATION: &str = "GitHub's cache, in packs";

/// A server that runs.
pub(super) struct StartedServer {
    pub(super) server: Server,
    pub(super) process: Option<ServerProcess>,
    pub(super) mode: Mode,
    pub(super) cache_location: String,
    pub(super) read_only: bool,
}

impl SetupContext<'_> {
    /// Starts the server in the mode of this job; if that mode is unavailable, on the local disk.
    pub(super) async fn start_server(
        &self,
        selection: ModeSelection,
        installed: &Installed,
    ) -> Result<StartedServer, SetupError> {
        let (inputs, log) = (self.inputs, self.log);
        if let Some(why) = selection.fallback {
            fall_back_to_local(inputs, why, log)?;
        }
        let mut settings = ServerSettings {
            mode: selection.mode,
            namespace: inputs.namespace.as_deref(),
            read_only: read_only(self.environment, inputs, installed, selection.mode, log),
            relay: None,
        };
        if settings.mode == Mode::Packed {
            settings.relay = self.relay_access(installed).await?;
        }
        let version = &installed.version;
        let why = match self.start_with(&settings, installed).await {
            // A build without support for these variables silently uses its disk.
            Ok(started)
                if settings.mode.needs_cache_service() && is_local(&started.cache_location) =>
            {
                let _ = started.server.stop().await;
                format!("sccache {version} does not use GitHub's cache")
            }
            Ok(mut started) => {
                if is_local(&started.cache_location) {
                    started.mode = Mode::Local;
                }
                if settings.mode == Mode::Packed {
                    started.cache_location = PACKED_LOCATION.to_owned();
                }
                return Ok(started);
            }
            Err(error) if settings.mode == Mode::Local => return Err(SetupError::Start(error)),
            Err(error) if error.storage_not_built_in() => format!(
                "this build of sccache {version} does not support the storage of mode {}",
                settings.mode
            ),
            Err(error) => format!("mode {} is unavailable: {error}", settings.mode),
        };
        fall_back_to_local(inputs, FallbackReason::Unavailable(why), log)?;
        settings.read_only = if settings.mode == Mode::Packed {
            // The relay was to see to it.
            read_only(self.environment, inputs, installed, Mode::Local, log)
        } else {
            inputs.read_only == Some(true) && settings.read_only
        };
        settings.mode = Mode::Local;
        self.start_with(&settings, installed)
            .await
            .map_err(SetupError::Start)
    }

    /// How the server reaches the relay. If it can have a disk cache in front, that is filled
    /// first.
    async fn relay_access(
        &self,
        installed: &Installed,
    ) -> Result<Option<RelayAccess<'_>>, SetupError> {
        let Some(relay) = self.relay else {
            return Ok(None);
        };
        let disk_tier = (installed.version >= CHAIN_SINCE).then(|| self.state_dir.disk_tier());
        // An sccache without a disk cache in front waits for nothing.
        let strict = self.inputs.on_failure == OnFailure::Fail;
        let mut is_asked = true;
        if strict || disk_tier.is_some() {
            let prefilled = relay.running.prefill(disk_tier.clone(), PREFILL_WAIT).await;
            let problem = match prefilled {
                Ok(prefilled) => {
                    self.log.debug(format!("prefilled: {prefilled:?}"));
                    is_asked = !prefilled.nothing_known;
                    prefilled.error
                }
                Err(error) => Some(error.to_string()),
            };
            match problem {
                Some(problem) if strict => return Err(SetupError::Mode(problem)),
                // The problem may pass; if not, the post step warns of it.
                Some(problem) => self.log.info(format!("GitHub's cache: {problem}")),
                None => {}
            }
        }
        Ok(Some(RelayAccess {
            url: relay.running.url(),
            token: relay.client_token.reveal(),
            disk_tier,
            is_asked,
        }))
    }

    /// Starts the server and asks it where it keeps objects.
    async fn start_with(
        &self,
        settings: &ServerSettings<'_>,
        installed: &Installed,
    ) -> Result<StartedServer, ServerError> {
        let environment = self.environment;
        let mut server_environment = mode::server_environment(environment, settings);
        without_unusable_temporary_folder(&mut server_environment);
        if !server_environment.has("SCCACHE_ERROR_LOG") {
            let path = self.state_dir.server_log().display().to_string();
            server_environment.set("SCCACHE_ERROR_LOG", path);
            if !server_environment.has("SCCACHE_LOG") {
                let level = match settings.mode {
                    // opendal warns of each miss, and the relay itself reports failures.
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
            // If another job's server listens there, sccache would talk to that one.
            let error = if server.is_listening().await {
                None
            } else {
                match self.start_at(&server, &server_environment, settings).await {
                    Ok(process) => break (server, process),
                    Err(error) if error.port_taken() && attempt < PORT_ATTEMPTS => Some(error),
                    Err(error) => return Err(error),
                }
            };
            self.log.debug(format!(
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
        Ok(StartedServer {
            server,
            process,
            mode: settings.mode,
            cache_location: location.unwrap_or_default(),
            read_only: settings.read_only,
        })
    }

    /// Starts the server. If there is a relay or a keeper, it starts the server, and restarts it
    /// after a crash. The disk needs neither.
    async fn start_at(
        &self,
        server: &Server,
        environment: &Environment,
        settings: &ServerSettings<'_>,
    ) -> Result<Option<ServerProcess>, ServerError> {
        match self.relay.filter(|_| settings.mode != Mode::Local) {
            Some(relay) => {
                let started = relay.running.start_server(server, environment).await;
                started.map(|()| None)
            }
            None => server.start(environment).await.map(Some),
        }
    }
}

fn is_local(cache_location: &str) -> bool {
    cache_location.starts_with("Local disk")
}

/// Removes a TMPDIR that is not writable from the server's environment: compilers then use `/tmp`,
/// and so should sccache, which does not do this itself.
fn without_unusable_temporary_folder(server: &mut Environment) {
    if let Some(folder) = server.path("TMPDIR")
        && tempfile::tempfile_in(folder).is_err()
    {
        server.remove("TMPDIR");
    }
}
