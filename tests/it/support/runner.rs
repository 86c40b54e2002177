//! A runner in small: a folder with the files that a runner gives its steps, and the environment
//! that goes with them.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use sccache_action::runner::environment::Environment;
use sccache_action::runner::files::read_entries;
use tempfile::TempDir;

/// The binary under test, if it is not the one that cargo built for it.
pub static OTHER_BINARY: OnceLock<String> = OnceLock::new();

/// The binary under test.
pub fn binary() -> &'static str {
    let other = OTHER_BINARY.get().map(String::as_str);
    other.unwrap_or(env!("CARGO_BIN_EXE_sccache-action"))
}

/// One job of a runner. Its processes are stopped when it is dropped.
pub struct Job {
    folder: PathBuf,
    environment: Environment,
    /// Removes the folder, if it is the job's own.
    _temporary: Option<TempDir>,
}

const FILES: [&str; 5] = [
    "GITHUB_ENV",
    "GITHUB_PATH",
    "GITHUB_OUTPUT",
    "GITHUB_STATE",
    "GITHUB_STEP_SUMMARY",
];

/// The output of a step.
pub struct Step {
    /// Its exit status; `None` if a signal ended it.
    pub status: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl From<Output> for Step {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// The command that the runner takes a line for (`TryParseV2` and `TryParse` of `ActionCommand.cs` in
/// actions/runner).
fn command(line: &str) -> Option<&str> {
    let second = line.trim_start().strip_prefix("::");
    let second = second.and_then(|rest| Some(rest.split_once("::")?.0));
    let first = line.split_once("##[").map(|(_, rest)| rest);
    let first = first.and_then(|rest| Some(rest.split_once(']')?.0));
    let command = second.or(first)?;
    command.split(' ').next()
}

/// Fails if this output has workflow commands that the action does not need.
#[track_caller]
pub fn assert_no_foreign_command(output: &str) {
    const OWN: [&str; 7] = [
        "add-mask", "debug", "endgroup", "error", "group", "notice", "warning",
    ];
    for line in output.split(['\n', '\r']) {
        if let Some(command) = command(line) {
            assert!(OWN.contains(&command), "{line}");
        }
    }
}

impl Step {
    /// This step, which must have succeeded.
    #[track_caller]
    pub fn green(self) -> Self {
        assert_eq!(self.status, Some(0), "{}{}", self.stdout, self.stderr);
        self
    }

    /// This step, whose output gives the runner no commands but those that the action has reason to
    /// give.
    #[track_caller]
    pub fn with_no_foreign_command(self) -> Self {
        assert_no_foreign_command(&self.stdout);
        assert_no_foreign_command(&self.stderr);
        self
    }

    /// The warnings among the workflow commands.
    pub fn warnings(&self) -> Vec<&str> {
        let lines = self.stdout.lines();
        lines.filter(|line| line.starts_with("::warning")).collect()
    }

    /// Asserts that it warned once, and what of.
    #[track_caller]
    #[allow(dead_code, reason = "benches have no use for it")]
    pub fn warns_once(&self, of: &str) -> &Self {
        let warnings = self.warnings();
        assert_eq!(warnings.len(), 1, "{}", self.stdout);
        assert!(warnings[0].contains(of), "{warnings:?}");
        self
    }

    /// Asserts that it warned of nothing.
    #[track_caller]
    #[allow(dead_code, reason = "benches have no use for it")]
    pub fn warns_never(&self) -> &Self {
        let warnings = self.warnings();
        assert!(warnings.is_empty(), "{warnings:?}\n{}", self.stdout);
        self
    }

    /// Asserts that it printed this text.
    #[track_caller]
    #[allow(dead_code, reason = "benches have no use for it")]
    pub fn prints(&self, text: &str) -> &Self {
        assert!(self.stdout.contains(text), "{}", self.stdout);
        self
    }

    /// The errors among the workflow commands.
    pub fn errors(&self) -> Vec<&str> {
        let lines = self.stdout.lines();
        lines.filter(|line| line.starts_with("::error")).collect()
    }
}

impl Job {
    /// A job without a cache service, with an empty disk, and with the sccache at this path on
    /// `PATH` and asked for.
    pub fn with_sccache(sccache: &Path) -> Self {
        let mut job = Self::new();
        job.use_sccache(sccache);
        job
    }

    /// A job without sccache.
    pub fn new() -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let mut job = Self::in_folder(temporary.path().to_owned());
        job._temporary = Some(temporary);
        job
    }

    /// A job without sccache in this folder, which stays when the job is dropped.
    pub fn in_folder(folder: PathBuf) -> Self {
        let mut job = Self {
            folder,
            environment: Environment::default(),
            _temporary: None,
        };
        // The machine's own variables for sccache must not reach the test.
        for name in [
            "HOME",
            "PATH",
            "RUSTUP_HOME",
            "CARGO_HOME",
            "RUSTUP_TOOLCHAIN",
        ] {
            if let Ok(value) = std::env::var(name) {
                job.set(name, value);
            }
        }
        fs::create_dir_all(&job.folder).unwrap();
        for name in FILES {
            let file = job.path(name);
            fs::write(&file, "").unwrap();
            job.set(name, file.display().to_string());
        }
        for (name, folder) in [
            ("RUNNER_TEMP", "temporary"),
            ("RUNNER_TOOL_CACHE", "tools"),
            ("SCCACHE_DIR", "disk-cache"),
            ("GITHUB_WORKSPACE", "workspace"),
        ] {
            let path = job.path(folder);
            fs::create_dir_all(&path).unwrap();
            job.set(name, path.display().to_string());
        }
        job.set("GITHUB_ACTIONS", "true");
        job.set("GITHUB_SERVER_URL", "https://github.com");
        job
    }

    /// A path in the job's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Sets a variable for all steps, as `env:` of a workflow does.
    pub fn set(&mut self, name: &str, value: impl Into<String>) {
        self.environment.set(name, value);
    }

    /// The variable as the first step has it.
    pub fn get(&self, name: &str) -> &str {
        self.environment.get(name).unwrap_or_default()
    }

    /// Puts this sccache on `PATH` and asks the action for it.
    pub fn use_sccache(&mut self, sccache: &Path) {
        let tools = self.path("tools-on-path");
        fs::create_dir_all(&tools).unwrap();
        let program = tools.join(format!("sccache{}", std::env::consts::EXE_SUFFIX));
        #[cfg(unix)]
        std::os::unix::fs::symlink(sccache, program).unwrap();
        #[cfg(not(unix))]
        fs::copy(sccache, program).unwrap();
        let path = format!("{}:{}", tools.display(), self.get("PATH"));
        self.set("PATH", path);
        self.set("INPUT_INSTALL-FROM", "path");
        self.set("INPUT_VERSION", "latest");
    }

    /// Gives the action's steps a cache service.
    pub fn use_service(&mut self, url: &str, token: &str) {
        self.set("ACTIONS_RESULTS_URL", url);
        self.set("ACTIONS_RUNTIME_TOKEN", token);
    }

    /// The text that a step has written to one of the runner's files.
    pub fn file(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// The variables that were exported, or set as outputs or as state.
    pub fn entries(&self, file: &str) -> Environment {
        read_entries(&self.file(file)).into_iter().collect()
    }

    /// The environment of a later step that is not the action's.
    pub fn later_environment(&self) -> Environment {
        let mut environment = self.environment.for_programs();
        for (name, value) in self.entries("GITHUB_ENV").iter() {
            environment.set(name, value);
        }
        for folder in self.file("GITHUB_PATH").lines() {
            let path = format!("{folder}:{}", environment.get("PATH").unwrap_or_default());
            environment.set("PATH", path);
        }
        environment
    }

    /// The environment of the action's main step.
    pub fn main_environment(&self) -> &Environment {
        &self.environment
    }

    /// The relays of this job, also those that no step was told of.
    pub fn relays(&self) -> Vec<u32> {
        let own = format!("RUNNER_TEMP={}", self.get("RUNNER_TEMP"));
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let processes = processes.filter(|process| {
            let read = |name: &str| fs::read(process.path().join(name)).unwrap_or_default();
            let has = |text: Vec<u8>, wanted: &str| {
                let mut parts = text.split(|byte| *byte == 0);
                parts.any(|part| part == wanted.as_bytes())
            };
            has(read("cmdline"), "relay") && has(read("environ"), &own)
        });
        processes
            .filter_map(|process| process.file_name().to_str()?.parse().ok())
            .collect()
    }

    /// The environment of the action's post step.
    pub fn post_environment(&self) -> Environment {
        let mut environment = self.later_environment();
        for (name, value) in self.environment.iter() {
            if !environment.has(name) {
                environment.set(name, value);
            }
        }
        for (name, value) in self.entries("GITHUB_STATE").iter() {
            environment.set(format!("STATE_{name}"), value);
        }
        environment
    }

    fn run(&self, environment: &Environment, command: &[impl AsRef<OsStr>]) -> Step {
        let (program, arguments) = command.split_first().unwrap();
        let step: Step = Command::new(program)
            .args(arguments)
            .env_clear()
            .envs(environment.iter())
            .current_dir(self.path("workspace"))
            .output()
            .unwrap()
            .into();
        // The compiler's output is the build's own.
        let own = [OsStr::new(binary()), OsStr::new("node")];
        if own.contains(&program.as_ref()) {
            step.with_no_foreign_command()
        } else {
            step
        }
    }

    /// The action's main step.
    pub fn setup(&self) -> Step {
        self.run(&self.environment, &[binary(), "setup"])
    }

    /// A step that is not the action's.
    pub fn step(&self, command: &[impl AsRef<OsStr>]) -> Step {
        self.run(&self.later_environment(), command)
    }

    /// A step that runs these lines of shell.
    pub fn shell(&self, lines: &str) -> Step {
        self.step(&["sh", "-e", "-c", lines])
    }

    /// The action's post step.
    pub fn report(&self) -> Step {
        self.run(&self.post_environment(), &[binary(), "report"])
    }

    /// Runs the real `@actions/cache` as a step of the job. Gives what it printed.
    #[allow(dead_code, reason = "tests have a step of their own for it")]
    pub fn toolkit(&self, post: bool, arguments: &[&str]) -> String {
        let script = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/it/support/actions_cache.mjs"
        );
        let modules = super::tools::actions_cache(super::tools::ACTIONS_CACHE)
            .display()
            .to_string();
        let command = [&["node", script, &modules], arguments].concat();
        let step = self.action_step(post, &command).green();
        format!("{}{}", step.stdout, step.stderr)
    }

    /// Runs any command with the environment of the action's main step or post step.
    pub fn action_step(&self, post: bool, command: &[impl AsRef<OsStr>]) -> Step {
        let environment = if post {
            self.post_environment()
        } else {
            self.environment.clone()
        };
        self.run(&environment, command)
    }

    /// Waits until nothing listens on sccache's port: a server that was stopped answers first and
    /// ends then.
    #[track_caller]
    pub fn server_ends(&self) {
        let begin = Instant::now();
        while let Some(pid) = self.server_pid() {
            assert!(begin.elapsed() < Duration::from_secs(10), "{pid} serves");
            std::thread::yield_now();
        }
    }

    /// The job's relay, if it has one that runs.
    pub fn relay_pid(&self) -> Option<u32> {
        let state = self.entries("GITHUB_STATE");
        self.own_listener(state.get("relay-port")?)
    }

    /// The process that serves sccache's port, if there is one.
    pub fn server_pid(&self) -> Option<u32> {
        let port = self.entries("GITHUB_ENV");
        self.own_listener(port.get("SCCACHE_SERVER_PORT")?)
    }

    /// The process of this job that serves a port: another job may have got it since.
    fn own_listener(&self, port: &str) -> Option<u32> {
        let pid = listener(port.parse().ok()?)?;
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let own = format!("RUNNER_TEMP={}", self.get("RUNNER_TEMP"));
        let mut variables = environment.split(|byte| *byte == 0);
        variables
            .any(|variable| variable == own.as_bytes())
            .then_some(pid)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for pid in [self.server_pid(), self.relay_pid()].into_iter().flatten() {
            kill(pid);
        }
    }
}

/// All files below a folder.
pub fn all_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            files.append(&mut all_files(&entry.path()));
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    files
}

/// Waits until nothing listens on this port.
#[track_caller]
pub fn port_is_left(port: &str) {
    let port = port.parse().unwrap();
    let begin = Instant::now();
    while listener(port).is_some() {
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "{port} is served"
        );
        std::thread::yield_now();
    }
}

/// Kills a process at once.
pub fn kill(pid: u32) {
    let status = Command::new("kill").args(["-9", &pid.to_string()]).status();
    assert!(status.unwrap().success());
    // Until it is gone its port still answers.
    while Path::new(&format!("/proc/{pid}/fd"))
        .read_dir()
        .is_ok_and(|mut files| files.next().is_some())
    {
        std::thread::yield_now();
    }
}

/// The process that listens on this port of 127.0.0.1, from the system's own tables.
fn listener(port: u16) -> Option<u32> {
    const LISTEN: &str = "0A";
    let table = fs::read_to_string("/proc/net/tcp").ok()?;
    let address = format!(":{port:04X}");
    let inode = table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        (fields[1].ends_with(&address) && fields[3] == LISTEN).then(|| fields[9].to_owned())
    })?;
    let socket = format!("socket:[{inode}]");
    fs::read_dir("/proc").ok()?.find_map(|process| {
        let process = process.ok()?.path();
        let pid: u32 = process.file_name()?.to_str()?.parse().ok()?;
        let mut files = fs::read_dir(process.join("fd")).ok()?;
        let holds = files.any(|file| {
            let target = file.and_then(|file| fs::read_link(file.path()));
            target.is_ok_and(|target| target.as_os_str() == socket.as_str())
        });
        holds.then_some(pid)
    })
}
