//! The sccache server of one job: started, asked and stopped through sccache's own commands.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use crate::runner::environment::Environment;

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

/// How much of sccache's output an error keeps, in characters.
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
    #[error("cannot run {}: {error}", sccache.display())]
    NotRun {
        /// The binary.
        sccache: PathBuf,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
    /// It took longer than it may.
    #[error("`sccache {call}` did not answer within {} s", limit.as_secs())]
    TimedOut {
        /// The arguments.
        call: String,
        /// The time it had.
        limit: Duration,
    },
    /// Its server did not start, for the reason that it gave.
    #[error("{reason}")]
    NotStarted {
        /// The reason.
        reason: String,
    },
    /// It ran and failed.
    #[error("`sccache {call}` failed ({status}): {output}")]
    Failed {
        /// The arguments.
        call: String,
        /// Its exit status, in words.
        status: String,
        /// Its output, shortened.
        output: String,
    },
}

impl ServerError {
    /// Whether this build of sccache was made without the storage it was asked for, as Debian's is
    /// (it has local disk only).
    pub fn storage_not_built_in(&self) -> bool {
        self.says("cache type is not enabled")
    }

    /// Whether the server's port was taken.
    pub fn port_taken(&self) -> bool {
        ["Address already in use", ADDRESS_IN_USE, "os error 10048"]
            .iter()
            .any(|words| self.says(words))
    }

    fn says(&self, words: &str) -> bool {
        match self {
            Self::Failed { output: said, .. } | Self::NotStarted { reason: said } => {
                said.contains(words)
            }
            Self::NotRun { .. } | Self::TimedOut { .. } => false,
        }
    }
}

const ADDRESS_IN_USE: &str = "Address in use";

/// The message for a failure of sccache that prints nothing.
const NO_REASON: &str = "sccache gave no reason";

/// A server that this process started. It is killed when this value is dropped, unless
/// [`ServerProcess::leave`] was called.
#[derive(Debug)]
pub struct ServerProcess {
    /// `None` if sccache itself put the server into the background.
    child: Option<Child>,
}

impl ServerProcess {
    /// Lets the server live on when this process ends.
    pub fn leave(self) {
        // tokio's only way to keep a child that is killed when it is dropped.
        std::mem::forget(self.child);
    }

    /// Waits until the server ends. Returns `None` if it ended with success, otherwise its status in words.
    /// Never returns for a server in the background.
    pub async fn end(&mut self) -> Option<String> {
        let Some(child) = &mut self.child else {
            return std::future::pending().await;
        };
        match child.wait().await {
            Ok(status) if status.success() => None,
            Ok(status) => Some(status.to_string()),
            Err(error) => Some(error.to_string()),
        }
    }
}

impl Server {
    /// A server of `sccache` on 127.0.0.1:`port`. Nothing is started yet.
    pub fn new(sccache: PathBuf, port: u16) -> Self {
        Self { sccache, port }
    }

    /// The binary.
    pub fn sccache(&self) -> &Path {
        &self.sccache
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Starts the server with `environment` and nothing else in its environment.
    ///
    /// On Unix it is a child of this process in a group of its own. sccache's `--start-server` would detach
    /// it, and set a umask of 027, so that each object would have the mode 640; and it would put a socket
    /// into the folder for temporary files, whose path may be too long.
    ///
    /// # Errors
    /// [`ServerError`] if it did not start, with its message.
    pub async fn start(&self, environment: &Environment) -> Result<ServerProcess, ServerError> {
        #[cfg(unix)]
        if let Some(startup) = startup::StartupSocket::listen(environment) {
            return self.start_as_child(environment, startup).await;
        }
        self.start_in_background(environment).await?;
        Ok(ServerProcess { child: None })
    }

    #[cfg(unix)]
    async fn start_as_child(
        &self,
        environment: &Environment,
        startup: startup::StartupSocket,
    ) -> Result<ServerProcess, ServerError> {
        let mut command = self.command::<&str>(&[], Some(environment));
        let said = tempfile::tempfile().ok();
        let stderr = said.as_ref().and_then(|file| file.try_clone().ok());
        command
            .env("SCCACHE_START_SERVER", "1")
            .env("SCCACHE_NO_DAEMON", "1")
            .env("SCCACHE_STARTUP_NOTIFY", startup.path())
            // It must not keep anybody from removing the folder that this step runs in.
            .current_dir("/")
            .process_group(0)
            .stdout(Stdio::null())
            .stderr(stderr.map_or_else(Stdio::null, Stdio::from));
        let not_run = |error| ServerError::NotRun {
            sccache: self.sccache.clone(),
            error,
        };
        let mut child = command.spawn().map_err(not_run)?;
        let started = timeout(START_TIMEOUT, async {
            tokio::select! {
                biased;
                notified = startup.wait() => notified.map_err(|error| error.to_string()),
                status = child.wait() => Ok(startup::StartupOutcome::Ended(
                    status.map_or_else(|error| error.to_string(), |status| status.to_string()),
                )),
            }
        });
        let call = "--start-server".to_owned();
        let reason = match started.await {
            Ok(Ok(startup::StartupOutcome::Listening)) => {
                return Ok(ServerProcess { child: Some(child) });
            }
            Ok(Ok(startup::StartupOutcome::AddressInUse)) => ADDRESS_IN_USE.to_owned(),
            Ok(Ok(startup::StartupOutcome::Refused(reason))) => reason,
            Ok(Ok(startup::StartupOutcome::Ended(status))) => {
                let output = shortened(&[what_was_written(said)]);
                return Err(ServerError::Failed {
                    call,
                    status,
                    output,
                });
            }
            Ok(Err(error)) => format!("its startup message is unreadable: {error}"),
            Err(_) => {
                let limit = START_TIMEOUT;
                return Err(ServerError::TimedOut { call, limit });
            }
        };
        let reason = shortened(&[reason.into_bytes()]);
        Err(ServerError::NotStarted { reason })
    }

    async fn start_in_background(&self, environment: &Environment) -> Result<(), ServerError> {
        let call = "--start-server";
        let mut command = self.command(&[call], Some(environment));
        // The server may hold what this call prints to for as long as it lives, so the end is that of the
        // call and not that of a pipe. Without files only the message of a failure is lost.
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
        self.check_output(output.await, call.to_owned(), START_TIMEOUT)
            .map(drop)
    }

    /// Whether something listens on the server's port. Asking sccache itself would not work: its client
    /// starts a server if there is none.
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
    /// [`ServerError`] if the server did not answer.
    pub async fn statistics(&self) -> Result<String, ServerError> {
        let call = ["--show-stats", "--stats-format", "json"];
        let output = self.call(&call, None, ASK_TIMEOUT).await?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets the statistics to zero.
    ///
    /// # Errors
    /// [`ServerError`] if the server did not answer.
    pub async fn zero_statistics(&self) -> Result<(), ServerError> {
        self.call(&["--zero-stats"], None, ASK_TIMEOUT)
            .await
            .map(drop)
    }

    /// Stops the server, once it has finished what is in flight.
    ///
    /// # Errors
    /// [`ServerError`] if it did not stop.
    pub async fn stop(&self) -> Result<(), ServerError> {
        self.call(&["--stop-server"], None, STOP_TIMEOUT)
            .await
            .map(drop)
    }

    /// Runs one compile through the server, in `folder`.
    ///
    /// # Errors
    /// [`ServerError`] if sccache or the compiler failed.
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

    fn command<A: AsRef<OsStr>>(
        &self,
        arguments: &[A],
        environment: Option<&Environment>,
    ) -> Command {
        let mut command = Command::new(&self.sccache);
        command.args(arguments);
        // sccache's client starts a server if none listens, so no call may see a token that is the runner's
        // alone.
        let own = environment
            .is_none()
            .then(Environment::of_this_process)
            .map(|environment| environment.for_programs());
        if let Some(environment) = environment.or(own.as_ref()) {
            command.env_clear().envs(environment.iter());
        }
        command
            .env("SCCACHE_SERVER_PORT", self.port.to_string())
            // Newer versions prefer a socket if one is named; this server has a port.
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
        self.check_output(output, call, limit)
    }

    fn check_output(
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
/// [`io::Error`] if the system has none left.
pub fn free_port() -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}

fn what_was_written(file: Option<File>) -> Vec<u8> {
    let mut text = Vec::new();
    if let Some(mut file) = file {
        let read = file.rewind().and_then(|()| file.read_to_end(&mut text));
        // Only the message of a failure would be lost.
        drop(read);
    }
    text
}

/// sccache's message about its failure, without the stack trace that some versions print after it.
fn what_was_said(output: &Output) -> String {
    shortened(&[output.stderr.clone(), output.stdout.clone()])
}

fn shortened(texts: &[Vec<u8>]) -> String {
    let lines = texts.iter().map(|bytes| String::from_utf8_lossy(bytes));
    let mut said = String::new();
    for text in lines {
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            if ["Backtrace:", "Stack backtrace:", "Run with SCCACHE_LOG"]
                .iter()
                .any(|start| line.starts_with(start))
            {
                return cut(said);
            }
            if !said.is_empty() {
                said.push_str("; ");
            }
            said.push_str(line);
            if said.len() > KEPT_OUTPUT {
                return cut(said);
            }
        }
    }
    if said.is_empty() {
        return NO_REASON.to_owned();
    }
    cut(said)
}

fn cut(said: String) -> String {
    match said.char_indices().nth(KEPT_OUTPUT) {
        Some((end, _)) => format!("{}…", &said[..end]),
        None => said,
    }
}

/// The startup message of a server, sent through a socket whose path is in its environment
/// (`notify_server_startup` in `src/server.rs` of sccache).
#[cfg(unix)]
mod startup {
    use std::io;
    use std::path::{Path, PathBuf};

    use tempfile::TempDir;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixListener;

    use crate::runner::environment::Environment;

    /// The longest message that is accepted, in bytes.
    const MESSAGE_LIMIT: u32 = 1 << 20;

    /// The outcome of starting a server.
    #[derive(Debug, PartialEq, Eq)]
    pub enum StartupOutcome {
        Listening,
        AddressInUse,
        Refused(String),
        /// It ended without a message; with its status.
        Ended(String),
    }

    pub struct StartupSocket {
        listener: UnixListener,
        path: PathBuf,
        _folder: TempDir,
    }

    impl StartupSocket {
        /// Opens a socket in the first folder for temporary files that can have one.
        pub fn listen(environment: &Environment) -> Option<Self> {
            let named = environment.path("TMPDIR");
            let folders = named.into_iter().chain([PathBuf::from("/tmp")]);
            folders
                .chain([tempfile::env::temp_dir()])
                .find_map(|folder| {
                    let builder = tempfile::Builder::new()
                        .prefix("sccache-")
                        .tempdir_in(folder);
                    let folder = builder.ok()?;
                    let path = folder.path().join("start");
                    let listener = UnixListener::bind(&path).ok()?;
                    Some(Self {
                        listener,
                        path,
                        _folder: folder,
                    })
                })
        }

        pub fn path(&self) -> &Path {
            &self.path
        }

        pub async fn wait(&self) -> io::Result<StartupOutcome> {
            let (mut stream, _) = self.listener.accept().await?;
            let length = stream.read_u32().await?;
            if length > MESSAGE_LIMIT {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut message = vec![0; length as usize];
            stream.read_exact(&mut message).await?;
            parse_message(&message).ok_or_else(|| io::ErrorKind::InvalidData.into())
        }
    }

    /// The message is in bincode: the number of the variant in four bytes, a text with its length in
    /// eight before it, all of them little-endian.
    pub fn parse_message(message: &[u8]) -> Option<StartupOutcome> {
        let (variant, rest) = message.split_first_chunk()?;
        match u32::from_le_bytes(*variant) {
            0 => Some(StartupOutcome::Listening),
            1 => Some(StartupOutcome::AddressInUse),
            2 => Some(StartupOutcome::Refused("it took too long".to_owned())),
            3 => {
                let (length, text) = rest.split_first_chunk()?;
                let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
                let text = String::from_utf8_lossy(text.get(..length)?);
                Some(StartupOutcome::Refused(text.into_owned()))
            }
            _ => None,
        }
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

    #[cfg(unix)]
    #[test]
    fn a_failure_without_a_word_says_that_there_was_none() {
        assert_eq!(what_was_said(&failure("\n")), NO_REASON);
    }

    #[cfg(unix)]
    #[test]
    fn what_a_server_says_of_its_start_is_understood_or_refused() {
        use startup::{StartupOutcome, parse_message};
        let refused =
            |length: u64| [&3u32.to_le_bytes()[..], &length.to_le_bytes(), b"why"].concat();
        assert_eq!(
            parse_message(&[0, 0, 0, 0, 9]),
            Some(StartupOutcome::Listening)
        );
        assert_eq!(
            parse_message(&[1, 0, 0, 0]),
            Some(StartupOutcome::AddressInUse)
        );
        assert_eq!(
            parse_message(&refused(3)),
            Some(StartupOutcome::Refused("why".to_owned()))
        );
        for bad in [
            &refused(4)[..],
            &refused(u64::MAX),
            &[4, 0, 0, 0],
            &[0, 0],
            b"",
        ] {
            assert_eq!(parse_message(bad), None, "{bad:?}");
        }
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
