//! How the action's steps start a relay, and talk to it.

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

use crate::action::environment::Environment;
use crate::http_client;
use crate::relay::activity::Activity;
use crate::relay::cargo::{CargoActivity, CargoRequest};
use crate::relay::disk_level::Hydrated;
#[cfg(windows)]
use crate::relay::inheritance;
use crate::relay::server::{ServerAnswer, ServerRequest};
use crate::relay::{Config, FinishRequest, HydrateRequest, Ready};
use crate::sccache::server::{Server, ServerError};
use crate::service::auth::BearerToken;
use crate::store::index::Ran;

/// Time for a relay to say its port. It opens three files and a socket before.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Time for a connection on loopback.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Time for an answer beyond what was granted for the work itself.
const GRACE: Duration = Duration::from_secs(10);

/// Why a relay did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not be run.
    #[error("the relay cannot be run: {0}")]
    NotRun(#[from] io::Error),
    /// It ended at once, or said something else than its port.
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
    /// What opens its control.
    pub control_token: BearerToken,
}

/// What ties a relay to the step that started it: it ends when this is dropped, also where the step
/// is killed, unless it is left to itself before.
#[derive(Debug)]
pub struct Tie(ChildStdin);

impl Tie {
    /// Lets the relay live on when this process ends.
    ///
    /// # Errors
    /// Where it is gone.
    pub async fn untie(mut self) -> io::Result<()> {
        self.0.write_all(b"\n").await?;
        self.0.flush().await
    }
}

/// Starts a relay, which ends with the returned tie.
///
/// # Errors
/// Where it does not come about.
pub async fn start(
    program: &Path,
    environment: &Environment,
    config: &Config,
    log: &Path,
) -> Result<(RunningRelay, Tie), ProcessError> {
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
    // What a terminal or a runner sends to this step's group is not meant for it.
    command.process_group(0);
    #[cfg(windows)]
    {
        inheritance::keep_standard_handles();
        command.creation_flags(inheritance::OWN_GROUP_AND_CONSOLE);
        // Nobody could remove the folder that it is in.
        if let Some(folder) = program.parent() {
            command.current_dir(folder);
        }
    }
    let mut child = command.spawn()?;
    let started = async {
        let mut stdin = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        // A line, since the rest of what could be sent is the tie.
        let mut line = serde_json::to_vec(config)?;
        line.push(b'\n');
        stdin.write_all(&line).await?;
        let stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).await?;
        let ready: Option<Ready> = serde_json::from_str(&line).ok();
        Ok::<_, io::Error>(ready.map(|ready| (ready, Tie(stdin))))
    };
    let why = match timeout(START_TIMEOUT, started).await {
        Ok(Ok(Some((ready, tie)))) => {
            let running = RunningRelay {
                port: ready.port,
                control_token: config.control_token.clone(),
            };
            return Ok((running, tie));
        }
        Ok(Ok(None)) => std::fs::read_to_string(log).unwrap_or_default(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("it said nothing in {} s", START_TIMEOUT.as_secs()),
    };
    let _ = child.start_kill();
    Err(ProcessError::NotReady(format!(": {}", why.trim())))
}

impl RunningRelay {
    /// The URL that sccache's server is given.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    /// Whether it is there.
    pub async fn is_listening(&self) -> bool {
        let connected = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        matches!(timeout(CONNECT_TIMEOUT, connected).await, Ok(Ok(_)))
    }

    /// Has it start sccache's server, and start it again where that dies.
    ///
    /// # Errors
    /// Where the server did not start, or the relay does not answer.
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

    /// Whether it answers. One that is stopped or hangs takes connections all the same.
    pub async fn answers(&self) -> bool {
        let answer: Result<Activity, _> = self.ask("activity", &(), Duration::ZERO).await;
        answer.is_ok()
    }

    /// Waits until it knows what the packs hold, and has it put that on sccache's disk.
    ///
    /// # Errors
    /// Where it does not answer.
    pub async fn hydrate(
        &self,
        folder: Option<PathBuf>,
        wait: Duration,
    ) -> Result<Hydrated, ProcessError> {
        let request = HydrateRequest { folder, wait };
        self.ask("hydrate", &request, wait).await
    }

    /// Has it put on the disk what earlier jobs left of cargo's, and keep at its end what this job
    /// leaves.
    ///
    /// # Errors
    /// Where it does not answer.
    pub async fn restore_cargo(
        &self,
        request: &CargoRequest,
    ) -> Result<CargoActivity, ProcessError> {
        self.ask("cargo", request, request.wait).await
    }

    /// Has it write what waits, with what came of the run where that is known, and end.
    ///
    /// # Errors
    /// Where it does not answer.
    pub async fn finish(
        &self,
        deadline: Duration,
        ran: Option<Ran>,
    ) -> Result<Activity, ProcessError> {
        self.ask("finish", &FinishRequest { deadline, ran }, deadline)
            .await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        what: &str,
        request: &impl Serialize,
        limit: Duration,
    ) -> Result<T, ProcessError> {
        let silent = |error: reqwest::Error| ProcessError::Silent(error.without_url().to_string());
        let client: Client = http_client::builder(CONNECT_TIMEOUT)
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
