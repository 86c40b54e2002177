//! The relay's process, as the action's steps start it and talk to it.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use reqwest::Client;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{ChildStdin, Command};
use tokio::time::timeout;

use crate::http;
use crate::http::BearerToken;
use crate::packs::index::RunStats;
use crate::relay::activity::Activity;
use crate::relay::cargo::{CargoActivity, CargoRequest};
use crate::relay::disk_tier::PrefillReport;
use crate::relay::sccache_server::{ServerAnswer, ServerRequest};
#[cfg(windows)]
use crate::relay::windows_handles;
use crate::relay::{FinishRequest, PrefillRequest, RelayConfig, RelayReady};
use crate::runner::environment::Environment;
use crate::sccache::server::{Server, ServerError};

/// Time for a relay to print its port. Before that it opens three files and a socket.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Time for a connection on loopback.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Time for an answer beyond the limit of the work itself.
const GRACE: Duration = Duration::from_secs(10);

/// Why a relay did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not be run.
    #[error("cannot run the relay: {0}")]
    NotRun(#[from] io::Error),
    /// It ended at once, or printed something other than its port.
    #[error("the relay did not start{0}")]
    NotReady(String),
    /// It did not answer.
    #[error("the relay does not answer: {0}")]
    Silent(String),
}

/// A relay that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningRelay {
    /// Its port on 127.0.0.1.
    pub port: u16,
    /// The token for its control requests.
    pub control_token: BearerToken,
}

/// The lifeline between a relay and the step that started it: the relay ends when this is dropped, even if
/// the step is killed, unless it was detached before.
#[derive(Debug)]
pub struct Lifeline(ChildStdin);

impl Lifeline {
    /// Lets the relay live on when this process ends.
    ///
    /// # Errors
    /// [`io::Error`] if the relay is gone.
    pub async fn detach(mut self) -> io::Result<()> {
        self.0.write_all(b"\n").await?;
        self.0.flush().await
    }
}

/// Starts a relay, which ends with the returned lifeline.
///
/// # Errors
/// [`ProcessError::NotRun`] if the program cannot be run, [`ProcessError::NotReady`] if it does not print
/// its port.
pub async fn start(
    program: &Path,
    environment: &Environment,
    config: &RelayConfig,
    log: &Path,
) -> Result<(RunningRelay, Lifeline), ProcessError> {
    let mut command = Command::new(program);
    command
        .arg("relay")
        .env_clear()
        // The token comes through standard input: a process's environment can be read.
        .envs(environment.for_programs().iter())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create(log)?);
    #[cfg(unix)]
    // Signals that a terminal or a runner sends to this step's group are not meant for it.
    command.process_group(0);
    #[cfg(windows)]
    {
        windows_handles::keep_standard_handles();
        command.creation_flags(windows_handles::OWN_GROUP_AND_CONSOLE);
        // Nobody could remove its working folder.
        if let Some(folder) = program.parent() {
            command.current_dir(folder);
        }
    }
    let mut child = command.spawn()?;
    let started = async {
        let mut stdin = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        // The configuration is one line; the rest of the pipe is the lifeline.
        let mut line = serde_json::to_vec(config)?;
        line.push(b'\n');
        stdin.write_all(&line).await?;
        let stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).await?;
        let ready: Option<RelayReady> = serde_json::from_str(&line).ok();
        Ok::<_, io::Error>(ready.map(|ready| (ready, Lifeline(stdin))))
    };
    let why = match timeout(START_TIMEOUT, started).await {
        Ok(Ok(Some((ready, lifeline)))) => {
            let running = RunningRelay {
                port: ready.port,
                control_token: config.control_token.clone(),
            };
            return Ok((running, lifeline));
        }
        Ok(Ok(None)) => std::fs::read_to_string(log).unwrap_or_default(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("it printed nothing within {} s", START_TIMEOUT.as_secs()),
    };
    let _ = child.start_kill();
    Err(ProcessError::NotReady(format!(": {}", why.trim())))
}

impl RunningRelay {
    /// The URL for sccache's server.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    /// Whether something listens on its port.
    pub async fn is_listening(&self) -> bool {
        let connected = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        matches!(timeout(CONNECT_TIMEOUT, connected).await, Ok(Ok(_)))
    }

    /// Has it start sccache's server, and start the server again if it dies.
    ///
    /// # Errors
    /// [`ServerError::NotStarted`] if the server did not start, or the relay does not answer.
    pub async fn start_server(
        &self,
        server: &Server,
        environment: &Environment,
    ) -> Result<(), ServerError> {
        let request = ServerRequest::new(server, environment);
        let answer: Result<ServerAnswer, _> = self.ask("server", &request, START_TIMEOUT * 4).await;
        let reason = match answer {
            Ok(ServerAnswer { failure: None }) => return Ok(()),
            Ok(ServerAnswer {
                failure: Some(failure),
            }) => failure,
            Err(error) => error.to_string(),
        };
        Err(ServerError::NotStarted { reason })
    }

    /// Whether it answers. A relay that is stopped or hangs accepts connections all the same.
    pub async fn answers(&self) -> bool {
        let answer: Result<Activity, _> = self.ask("activity", &(), Duration::ZERO).await;
        answer.is_ok()
    }

    /// Waits until it has read the indexes, and has it fill sccache's disk.
    ///
    /// # Errors
    /// [`ProcessError::Silent`] if it does not answer.
    pub async fn prefill(
        &self,
        folder: Option<PathBuf>,
        wait: Duration,
    ) -> Result<PrefillReport, ProcessError> {
        let request = PrefillRequest { folder, wait };
        self.ask("prefill", &request, wait).await
    }

    /// Has it restore the cargo cache of earlier jobs, and save this job's at its end.
    ///
    /// # Errors
    /// [`ProcessError::Silent`] if it does not answer.
    pub async fn restore_cargo(
        &self,
        request: &CargoRequest,
    ) -> Result<CargoActivity, ProcessError> {
        self.ask("cargo", request, request.wait).await
    }

    /// Has it write the pending objects, and the results of the run if they are known, and end.
    ///
    /// # Errors
    /// [`ProcessError::Silent`] if it does not answer.
    pub async fn finish(
        &self,
        deadline: Duration,
        run_stats: Option<RunStats>,
    ) -> Result<Activity, ProcessError> {
        self.ask(
            "finish",
            &FinishRequest {
                deadline,
                run_stats,
            },
            deadline,
        )
        .await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        what: &str,
        request: &impl Serialize,
        limit: Duration,
    ) -> Result<T, ProcessError> {
        let silent = |error: reqwest::Error| ProcessError::Silent(error.without_url().to_string());
        let client: Client = http::builder(CONNECT_TIMEOUT)
            .no_proxy()
            .timeout(limit + GRACE)
            .build()
            .map_err(silent)?;
        let answer = client
            .post(format!("{}relay/{what}", self.url()))
            .bearer_auth(self.control_token.reveal())
            .header("content-type", "application/json")
            .body(serde_json::to_vec(request).map_err(io::Error::from)?)
            .send()
            .await
            .and_then(reqwest::Response::error_for_status)
            .map_err(silent)?;
        let bytes = answer.bytes().await.map_err(silent)?;
        Ok(serde_json::from_slice(&bytes).map_err(io::Error::from)?)
    }
}
