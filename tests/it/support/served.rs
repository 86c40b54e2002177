//! The cache service as its own process: `sccache-action serve`.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A running service. It is killed when it is dropped.
pub struct Served {
    child: Child,
    /// Its URL, with a slash at the end.
    pub url: String,
    /// The token that it printed, empty if it printed none.
    pub token: String,
    log: Arc<Mutex<String>>,
    logging: Option<JoinHandle<()>>,
}

/// Why a service did not start: what it said.
#[derive(Debug)]
pub struct NotStarted(pub String);

impl Served {
    /// A service on a free port with its cache in `folder`, and these `arguments`.
    pub fn start(folder: &Path, arguments: &[&str]) -> Self {
        Self::with_environment(folder, arguments, &[])
    }

    /// The same with variables in its environment.
    pub fn with_environment(
        folder: &Path,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        Self::try_start(folder, arguments, environment).unwrap()
    }

    /// The same, which may fail.
    pub fn try_start(
        folder: &Path,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self, NotStarted> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_sccache-action"))
            .arg("serve")
            .args(arguments)
            .env_clear()
            .env("SCCACHE_ACTION_LISTEN", "127.0.0.1:0")
            .env("SCCACHE_ACTION_FOLDER", folder)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let logging = std::thread::spawn({
            let log = log.clone();
            move || gather(stderr, &log)
        });
        let mut served = Self {
            child,
            url: String::new(),
            token: String::new(),
            log,
            logging: Some(logging),
        };
        // It prints nothing after these lines; a token is the last of them, if there is one.
        let lines = BufReader::new(stdout).lines().map(Result::unwrap);
        for line in lines {
            match line.split_once('=').unwrap() {
                ("ACTIONS_RESULTS_URL", url) => url.clone_into(&mut served.url),
                ("ACTIONS_RUNTIME_TOKEN", token) => token.clone_into(&mut served.token),
                _ => {}
            }
            let has_gate = arguments
                .iter()
                .any(|argument| argument.contains("token") || argument.contains("forgejo"));
            if line.starts_with("ACTIONS_CACHE_URL=") && has_gate || !served.token.is_empty() {
                return Ok(served);
            }
        }
        served.child.wait().unwrap();
        Err(NotStarted(served.end_of_log()))
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The address that it listens at, from its log.
    pub fn address(&self) -> String {
        loop {
            let log = self.log();
            let line = log.split_once("listening at ").map(|(_, rest)| rest);
            if let Some((address, _)) = line.and_then(|rest| rest.split_once('\n')) {
                return address.to_owned();
            }
            std::thread::yield_now();
        }
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits until its log has `text`, which comes through a pipe and so a moment after it was written.
    pub fn wait_for_log(&self, text: &str) {
        while !self.log().contains(text) {
            std::thread::yield_now();
        }
    }

    fn end_of_log(&mut self) -> String {
        if let Some(logging) = self.logging.take() {
            logging.join().unwrap();
        }
        self.log()
    }

    /// Tells it to end, as service managers do.
    pub fn terminate(&self) {
        let pid = self.pid().to_string();
        let status = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(status.unwrap().success());
    }

    /// Waits for its end, and gives all that it logged.
    pub fn ended(mut self) -> (ExitStatus, String) {
        let status = self.child.wait().unwrap();
        (status, self.end_of_log())
    }

    /// Kills it, at once and without a word.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn gather(stderr: ChildStderr, log: &Mutex<String>) {
    for line in BufReader::new(stderr).lines() {
        let Ok(line) = line else { return };
        let mut log = log.lock().unwrap();
        log.push_str(&line);
        log.push('\n');
    }
}
