//! The sccache server of one job: started, asked and stopped through sccache's own commands.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use crate::action::environment::Environment;

/// Time for the server to start. It reads and writes a probe object meanwhile, so this spans a few
/// slow requests; sccache itself gives its server 10 s before it reports a time-out.
const START_TIMEOUT: Duration = Duration::from_secs(40);

/// Time for a question about statistics. The server computes the size of a disk cache first.
const ASK_TIMEOUT: Duration = Duration::from_secs(15);

/// Time for the server to stop. It waits up to 10 s for requests in flight (`src/server.rs` of
/// sccache).
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Time for the probe compile. A cold rustc on a slow disk takes seconds.
pub(crate) const COMPILE_TIMEOUT: Duration = Duration::from_secs(60);

/// How much of what sccache prints is kept in an error, in characters.
const KEPT_OUTPUT: usize = 2_000;

/// An sccache binary and the port its server has or will have.
#[derive(Clone, Debug)]
pub struct Server {
    sccache: PathBuf,
    port: u16,
}

/// Why sccache did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The binary could not be run at all.
    #[error("{} cannot be run: {error}", sccache.display())]
    NotRun {
        /// The binary.
        sccache: PathBuf,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
    /// It took longer than it may.
    #[error("`sccache {call}` gave no answer in {} s", limit.as_secs())]
    TimedOut {
        /// The arguments.
        call: String,
        /// The time it had.
        limit: Duration,
    },
    /// It ran and failed.
    #[error("`sccache {call}` failed ({status}): {output}")]
    Failed {
        /// The arguments.
        call: String,
        /// Its exit status, in words.
        status: String,
        /// What it printed, shortened.
        output: String,
    },
}

impl ServerError {
    /// Whether this build of sccache was made without the storage it was asked for, as Debian's is
    /// (it has local disk only).
    pub fn storage_not_built_in(&self) -> bool {
        matches!(self, Self::Failed { output, .. } if output.contains("cache type is not enabled"))
    }

    /// Whether the server's port was taken.
    pub fn port_taken(&self) -> bool {
        matches!(self, Self::Failed { output, .. }
            if output.contains("Address already in use") || output.contains("Address in use")
                || output.contains("os error 10048"))
    }
}

impl Server {
    /// A server of `sccache` on 127.0.0.1:`port`. Nothing is started yet.
    pub fn new(sccache: PathBuf, port: u16) -> Self {
        Self { sccache, port }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Starts the server with `environment` and nothing else in its environment. It lives on when
    /// this process ends.
    ///
    /// # Errors
    /// Where it did not start, with what it printed.
    pub async fn start(&self, environment: &Environment) -> Result<(), ServerError> {
        let call = "--start-server";
        let mut command = self.command(&[call], Some(environment));
        // The server may hold what this call prints to for as long as it lives, so the end is that
        // of the call and not that of a pipe. Without files only the words of a failure are lost.
        let said = [tempfile::tempfile().ok(), tempfile::tempfile().ok()];
        let [stdout, stderr] = said.each_ref().map(|file| {
            let file = file.as_ref().and_then(|file| file.try_clone().ok());
            file.map_or_else(Stdio::null, Stdio::from)
        });
        command.stdout(stdout).stderr(stderr);
        let ended = timeout(START_TIMEOUT, async { command.spawn()?.wait().await });
        let output = async {
            let status = ended.await?;
            let [stdout, stderr] = said.map(what_was_written);
            Ok(status.map(|status| Output {
                status,
                stdout,
                stderr,
            }))
        };
        self.judge(output.await, call.to_owned(), START_TIMEOUT)
            .map(drop)
    }

    /// Whether something listens on the server's port. Asking sccache itself would not do: its
    /// client starts a server where there is none.
    pub async fn is_listening(&self) -> bool {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        matches!(
            timeout(ASK_TIMEOUT, TcpStream::connect(address)).await,
            Ok(Ok(_))
        )
    }

    /// The statistics, as sccache prints them in JSON.
    ///
    /// # Errors
    /// Where the server did not answer.
    pub async fn statistics(&self) -> Result<String, ServerError> {
        let call = ["--show-stats", "--stats-format", "json"];
        let output = self.call(&call, None, ASK_TIMEOUT).await?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets the statistics to zero.
    ///
    /// # Errors
    /// Where the server did not answer.
    pub async fn zero_statistics(&self) -> Result<(), ServerError> {
        self.call(&["--zero-stats"], None, ASK_TIMEOUT)
            .await
            .map(drop)
    }

    /// Stops the server, once it has finished what is in flight.
    ///
    /// # Errors
    /// Where it did not stop.
    pub async fn stop(&self) -> Result<(), ServerError> {
        self.call(&["--stop-server"], None, STOP_TIMEOUT)
            .await
            .map(drop)
    }

    /// Runs one compile through the server, in `folder`.
    ///
    /// # Errors
    /// Where it failed, be it sccache or the compiler.
    pub async fn compile(
        &self,
        environment: &Environment,
        folder: &Path,
        command: &[String],
    ) -> Result<(), ServerError> {
        let mut process = self.command(command, Some(environment));
        process.current_dir(folder);
        self.run(process, command.join(" "), COMPILE_TIMEOUT)
            .await
            .map(drop)
    }

    fn command(
        &self,
        arguments: &[impl AsRef<OsStr>],
        environment: Option<&Environment>,
    ) -> Command {
        let mut command = Command::new(&self.sccache);
        command.args(arguments);
        if let Some(environment) = environment {
            command.env_clear().envs(environment.iter());
        }
        command
            .env("SCCACHE_SERVER_PORT", self.port.to_string())
            // Newer versions prefer a socket where one is named; this server has a port.
            .env_remove("SCCACHE_SERVER_UDS")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn call(
        &self,
        arguments: &[&str],
        environment: Option<&Environment>,
        limit: Duration,
    ) -> Result<Output, ServerError> {
        let command = self.command(arguments, environment);
        self.run(command, arguments.join(" "), limit).await
    }

    async fn run(
        &self,
        mut command: Command,
        call: String,
        limit: Duration,
    ) -> Result<Output, ServerError> {
        let output = timeout(limit, command.output()).await;
        self.judge(output, call, limit)
    }

    fn judge(
        &self,
        output: Result<io::Result<Output>, Elapsed>,
        call: String,
        limit: Duration,
    ) -> Result<Output, ServerError> {
        let output = match output {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => {
                let sccache = self.sccache.clone();
                return Err(ServerError::NotRun { sccache, error });
            }
            Err(_) => return Err(ServerError::TimedOut { call, limit }),
        };
        if output.status.success() {
            return Ok(output);
        }
        Err(ServerError::Failed {
            call,
            status: output.status.to_string(),
            output: what_was_said(&output),
        })
    }
}

/// A port of 127.0.0.1 that nothing listened on just now.
///
/// # Errors
/// Where the system has none left.
pub fn free_port() -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}

fn what_was_written(file: Option<File>) -> Vec<u8> {
    let mut text = Vec::new();
    if let Some(mut file) = file {
        let read = file.rewind().and_then(|()| file.read_to_end(&mut text));
        // What cannot be read was never more than the words of a failure.
        drop(read);
    }
    text
}

/// What sccache said of its failure, without the stack trace some versions print after it.
fn what_was_said(output: &Output) -> String {
    let both = [&output.stderr, &output.stdout].map(|bytes| String::from_utf8_lossy(bytes));
    let lines = both.iter().flat_map(|text| text.lines());
    let mut said = String::new();
    for line in lines.map(str::trim).filter(|line| !line.is_empty()) {
        if ["Backtrace:", "Stack backtrace:", "Run with SCCACHE_LOG"]
            .iter()
            .any(|start| line.starts_with(start))
        {
            break;
        }
        if !said.is_empty() {
            said.push_str("; ");
        }
        said.push_str(line);
        if said.len() > KEPT_OUTPUT {
            break;
        }
    }
    match said.char_indices().nth(KEPT_OUTPUT) {
        Some((end, _)) => format!("{}…", &said[..end]),
        None => said,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    fn failure(stderr: &str) -> Output {
        use std::os::unix::process::ExitStatusExt;
        Output {
            status: std::process::ExitStatus::from_raw(2 << 8),
            stdout: Vec::new(),
            stderr: stderr.as_bytes().to_vec(),
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_failure_is_told_without_its_stack_trace() {
        let said = what_was_said(&failure(
            "sccache: error: Server startup failed: x\n\nContext:\n  url: y\n\nBacktrace:\n 0: z\n",
        ));
        assert_eq!(
            said,
            "sccache: error: Server startup failed: x; Context:; url: y"
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_long_failure_is_shortened_at_a_character() {
        let said = what_was_said(&failure(&"é".repeat(5_000)));
        assert_eq!(said.chars().count(), KEPT_OUTPUT + 1);
    }

    #[tokio::test]
    async fn a_port_without_a_server_is_not_listening() {
        let server = Server::new(PathBuf::from("sccache"), free_port().unwrap());
        assert!(!server.is_listening().await);
    }

    #[tokio::test]
    async fn a_missing_binary_is_named_in_the_error() {
        let server = Server::new(PathBuf::from("/nowhere/sccache"), 1);
        let error = server.stop().await.unwrap_err();
        assert!(error.to_string().contains("/nowhere/sccache"), "{error}");
    }
}
