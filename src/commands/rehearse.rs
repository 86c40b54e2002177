//! Runs a whole job on this machine, twice: first with an empty cache, then with the cache of the
//! first.
//!
//! The main step and the post step run as on a runner: each in its own process, with the runner's
//! files, and with the address and the token of a cache service. That service runs in this process,
//! on a temporary store. The build between them has the environment of later steps, and no token.
//!
//! Cargo builds the sample if it is installed and its crates are available; if not, only the
//! sample's C files are compiled, so that a rehearsal needs no more than a C compiler.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use backon::{ExponentialBuilder, Retryable};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use crate::cache_protocol::temporary::TemporaryService;
use crate::cache_protocol::{self, Snapshot};
use crate::runner::environment::Environment;
use crate::runner::files::read_entries;
use crate::stop_signal::stop_signal;

/// The project for a rehearsal without a command: `sample/` of the repository.
const SAMPLE: [(&str, &str); 19] = [
    ("Cargo.lock", include_str!("../../sample/Cargo.lock")),
    ("Cargo.toml", include_str!("../../sample/Cargo.toml")),
    (
        "app/Cargo.toml",
        include_str!("../../sample/app/Cargo.toml"),
    ),
    (
        "app/src/main.rs",
        include_str!("../../sample/app/src/main.rs"),
    ),
    (
        "native/Cargo.toml",
        include_str!("../../sample/native/Cargo.toml"),
    ),
    (
        "native/build.rs",
        include_str!("../../sample/native/build.rs"),
    ),
    (
        "native/c/adler32.c",
        include_str!("../../sample/native/c/adler32.c"),
    ),
    (
        "native/c/crc32.c",
        include_str!("../../sample/native/c/crc32.c"),
    ),
    (
        "native/c/digest.h",
        include_str!("../../sample/native/c/digest.h"),
    ),
    (
        "native/c/djb2.c",
        include_str!("../../sample/native/c/djb2.c"),
    ),
    (
        "native/c/fletcher.c",
        include_str!("../../sample/native/c/fletcher.c"),
    ),
    (
        "native/c/fnv1a.c",
        include_str!("../../sample/native/c/fnv1a.c"),
    ),
    (
        "native/c/jenkins.c",
        include_str!("../../sample/native/c/jenkins.c"),
    ),
    (
        "native/c/pearson.c",
        include_str!("../../sample/native/c/pearson.c"),
    ),
    (
        "native/c/sdbm.c",
        include_str!("../../sample/native/c/sdbm.c"),
    ),
    (
        "native/src/lib.rs",
        include_str!("../../sample/native/src/lib.rs"),
    ),
    (
        "text/Cargo.toml",
        include_str!("../../sample/text/Cargo.toml"),
    ),
    (
        "text/src/lib.rs",
        include_str!("../../sample/text/src/lib.rs"),
    ),
    (".gitignore", include_str!("../../sample/.gitignore")),
];

/// How long a step that is told to end may take for it. Windows has no way to tell it.
#[cfg(unix)]
const TIME_TO_END: Duration = Duration::from_secs(10);

/// The parameters of a rehearsal.
#[derive(Clone, Debug)]
pub struct Rehearsal {
    /// This binary.
    pub program: PathBuf,
    /// The environment it was started in, with the action's inputs as `INPUT_` variables.
    pub environment: Environment,
    /// The build, or nothing for the sample project.
    pub build: Vec<OsString>,
}

/// The reason why a rehearsal stopped early.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    /// A file of the stage could not be written.
    #[error("cannot prepare the working directory: {0}")]
    Stage(#[from] io::Error),
    /// The cache service did not start.
    #[error("cannot start the cache service: {0}")]
    Service(#[source] io::Error),
    /// The sample cannot be built here.
    #[error(
        "cannot build the sample: PATH has neither cargo with its crates nor a C compiler called \
         cc. Pass your own build after `--`"
    )]
    NoCompiler,
    /// The process was told to end.
    #[error("interrupted; the servers of the job are stopped")]
    Interrupted,
    /// The process was told to end, and the post step was interrupted too or failed.
    #[error("interrupted, and the post step failed: the servers of the job may still run")]
    ServersLeft,
    /// A step could not be run at all.
    #[error("cannot run the step `{step}`: {error}")]
    NotRun {
        /// The step.
        step: String,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// A step failed.
    #[error("the step `{step}` of the {job} job failed ({status})")]
    Step {
        /// The step.
        step: String,
        /// The job.
        job: &'static str,
        /// How it ended.
        status: ExitStatus,
    },
}

/// How one job went.
#[derive(Clone, Debug)]
pub struct JobResult {
    /// `cold` or `warm`.
    pub job: &'static str,
    /// The time of the main step.
    pub setup: Duration,
    /// The time of the build.
    pub build: Duration,
    /// The time of the post step.
    pub report: Duration,
    /// The job summary.
    pub summary: String,
    /// The annotation's text, or the line that replaces it.
    pub headline: String,
    /// The requests to the cache service in this job.
    pub requests: Snapshot,
}

/// Runs the job twice and returns both results. The output of the steps goes to this process's
/// standard output as it comes.
///
/// # Errors
/// [`RehearsalError::Step`] if a step fails; [`RehearsalError::Interrupted`] if the process is told to end
/// meanwhile; other errors if the working directory, the cache service or the sample cannot be prepared.
pub async fn run(rehearsal: &Rehearsal) -> Result<Vec<JobResult>, RehearsalError> {
    let told_to_end = stop_signal()?;
    let stop = Stop::default();
    let waiting = tokio::spawn({
        let stop = stop.clone();
        async move {
            told_to_end.await;
            stop.build.cancel();
            if let Ok(told_again) = stop_signal() {
                told_again.await;
                stop.post_step.cancel();
            }
        }
    });
    let results = run_until(rehearsal, &stop).await;
    waiting.abort();
    match results {
        Err(RehearsalError::ServersLeft) => Err(RehearsalError::ServersLeft),
        Err(_) if stop.build.is_cancelled() => Err(RehearsalError::Interrupted),
        results => results,
    }
}

/// What ends when the process is told to end: first the build, then the post step too.
#[derive(Clone, Debug, Default)]
struct Stop {
    build: CancellationToken,
    post_step: CancellationToken,
}

async fn run_until(rehearsal: &Rehearsal, stop: &Stop) -> Result<Vec<JobResult>, RehearsalError> {
    let stage = tempfile::Builder::new()
        .prefix("sccache-action-rehearsal-")
        .tempdir()?;
    let random = |error| RehearsalError::Service(io::Error::other(error));
    let (token, tokens) = cache_protocol::single_token("refs/heads/main").map_err(random)?;
    let running = TemporaryService::start(&stage.path().join("service"), tokens)
        .await
        .map_err(RehearsalError::Service)?;
    let mut environment = rehearsal.environment.clone();
    for (name, value) in [
        ("ACTIONS_RESULTS_URL", running.url().as_str()),
        // For sccache before 0.10, which speaks version 1 of the protocol.
        ("ACTIONS_CACHE_URL", running.url().as_str()),
        ("ACTIONS_RUNTIME_TOKEN", token.reveal()),
        ("GITHUB_SERVER_URL", "https://github.com"),
    ] {
        environment.set(name, value);
    }
    // Built elsewhere, the sample would not be built again in the second job.
    for name in ["CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR"] {
        if rehearsal.build.is_empty() {
            environment.remove(name);
        }
    }
    if !environment.has("RUNNER_TOOL_CACHE") {
        let tools = stage.path().join("tools");
        environment.set("RUNNER_TOOL_CACHE", tools.display().to_string());
    }
    let build = match rehearsal.build.as_slice() {
        [] => sample_build(stage.path(), &environment, &stop.build).await?,
        build => Build {
            commands: vec![build.to_vec()],
            in_workspace: false,
        },
    };
    if build.is_of_c_only() && !environment.has("INPUT_WRAP") {
        environment.set("INPUT_WRAP", "c");
    }
    let mut results = Vec::new();
    for job in ["cold", "warm"] {
        let stage = SimulatedRunner::set(stage.path(), job, &environment).await?;
        let job = Job {
            program: &rehearsal.program,
            build: &build,
            stage,
            stop,
        };
        results.push(job.run(&running).await?);
    }
    Ok(results)
}

/// The simulated runner of one job. The workspace and the folder for temporary files are at the
/// same paths in both jobs, and empty at first, as they are on a runner.
struct SimulatedRunner {
    job: &'static str,
    runner: PathBuf,
    workspace: PathBuf,
    environment: Environment,
}

const RUNNER_FILES: [&str; 5] = [
    "GITHUB_ENV",
    "GITHUB_PATH",
    "GITHUB_OUTPUT",
    "GITHUB_STATE",
    "GITHUB_STEP_SUMMARY",
];

impl SimulatedRunner {
    async fn set(root: &Path, job: &'static str, environment: &Environment) -> io::Result<Self> {
        let runner = root.join(job);
        let workspace = root.join("workspace");
        let temporary = root.join("temporary");
        let mut environment = environment.clone();
        for folder in [&temporary, &workspace] {
            if folder.exists() {
                // On Windows a folder stays as long as a stopped server is still ending there.
                let ending =
                    ExponentialBuilder::default().with_min_delay(Duration::from_millis(20));
                let remove = || async { fs::remove_dir_all(folder) };
                remove.retry(ending.with_max_times(8)).await?;
            }
        }
        for folder in [&temporary, &workspace, &runner] {
            fs::create_dir_all(folder)?;
        }
        for name in RUNNER_FILES {
            let file = runner.join(name);
            fs::write(&file, "")?;
            environment.set(name, file.display().to_string());
        }
        environment.set("RUNNER_TEMP", temporary.display().to_string());
        environment.set("GITHUB_WORKSPACE", workspace.display().to_string());
        // Cargo's folders are this machine's own, not a runner's.
        environment.set("INPUT_CACHE-CARGO", "false");
        // A runner's disk is empty at first, so the job must find nothing on this one; unless
        // objects are to be kept on the disk.
        let keeper = match environment.get("INPUT_MODE") {
            Some("local") => root,
            _ => &runner,
        };
        let disk = keeper.join("disk-cache").display().to_string();
        environment.set("SCCACHE_DIR", disk);
        write_sample(&workspace)?;
        Ok(Self {
            job,
            runner,
            workspace,
            environment,
        })
    }

    fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.runner.join(file))
    }

    /// The environment of a step that is no part of the action: without the variables for actions
    /// only, with those that the main step exported.
    fn later_step(&self) -> io::Result<Environment> {
        let mut environment = self.environment.for_programs();
        for (name, value) in read_entries(&self.read("GITHUB_ENV")?) {
            environment.set(name, value);
        }
        let folders = self.read("GITHUB_PATH")?;
        let mut path: Vec<&str> = folders.lines().rev().collect();
        path.extend(environment.get("PATH"));
        let separator = if cfg!(windows) { ";" } else { ":" };
        let path = path.join(separator);
        environment.set("PATH", path);
        Ok(environment)
    }

    /// The environment of the post step: the main step's, with its saved state.
    fn post_step(&self) -> io::Result<Environment> {
        let mut environment = self.later_step()?;
        for (name, value) in self.environment.iter() {
            if !environment.has(name) {
                environment.set(name, value);
            }
        }
        for (name, value) in read_entries(&self.read("GITHUB_STATE")?) {
            environment.set(format!("STATE_{name}"), value);
        }
        Ok(environment)
    }
}

/// The build between the two steps.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Build {
    /// The commands, one after the other.
    commands: Vec<Vec<OsString>>,
    /// Whether they run in the job's workspace, and not in the folder of this process.
    in_workspace: bool,
}

impl Build {
    /// The sample as cargo builds it.
    fn with_cargo() -> Self {
        Self {
            commands: vec![["cargo", "build", "--locked"].map(OsString::from).to_vec()],
            in_workspace: true,
        }
    }

    /// The sample's C files alone.
    fn with_cc() -> Self {
        let sources = SAMPLE
            .iter()
            .map(|(path, _)| Path::new(*path))
            .filter(|path| path.extension().is_some_and(|end| end == "c"));
        let compile = |source: &Path| {
            let object = source.with_extension("o");
            let words = ["sccache", "cc", "-O2", "-c"].map(OsString::from);
            let files = [source.into(), "-o".into(), object.into()];
            words.into_iter().chain(files).collect()
        };
        Self {
            commands: sources.map(compile).collect(),
            in_workspace: true,
        }
    }

    fn is_of_c_only(&self) -> bool {
        *self == Self::with_cc()
    }
}

/// How the sample can be built on this machine. It fetches the crates first, which is no part of
/// either job.
async fn sample_build(
    root: &Path,
    environment: &Environment,
    stopped: &CancellationToken,
) -> Result<Build, RehearsalError> {
    let folder = root.join("crates");
    write_sample(&folder)?;
    let environment = environment.for_programs();
    let mut fetch = Command::new("cargo");
    fetch
        .args(["fetch", "--locked"])
        .current_dir(&folder)
        .stdout(Stdio::null());
    match run_in(fetch, &environment, stopped).await {
        Ok(status) if status.success() => return Ok(Build::with_cargo()),
        _ if stopped.is_cancelled() => return Err(RehearsalError::Interrupted),
        Ok(_) => println!("The sample's crates are unavailable, so only its C files are compiled."),
        Err(_) => println!("cargo is not on PATH, so only the sample's C files are compiled."),
    }
    let mut compiler = Command::new("cc");
    compiler
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    match run_in(compiler, &environment, stopped).await {
        Ok(status) if status.success() => Ok(Build::with_cc()),
        _ => Err(RehearsalError::NoCompiler),
    }
}

/// Runs `command` in `environment` alone, to its end or until `stopped`.
async fn run_in(
    mut command: Command,
    environment: &Environment,
    stopped: &CancellationToken,
) -> io::Result<ExitStatus> {
    command
        .env_clear()
        .envs(environment.iter())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    // A step may start others, which end with it.
    #[cfg(unix)]
    command.process_group(0);
    let mut child = command.spawn()?;
    tokio::select! {
        status = child.wait() => status,
        () = stopped.cancelled() => {
            end(&mut child).await;
            Err(io::ErrorKind::Interrupted.into())
        }
    }
}

/// Asks a step, and what it has started, to end. What does not is killed.
async fn end(child: &mut Child) {
    #[cfg(unix)]
    if let Some(group) = child
        .id()
        .and_then(|id| rustix::process::Pid::from_raw(id.cast_signed()))
    {
        use rustix::process::{Signal, kill_process_group};
        // A process that has ended meanwhile is still this one's child, so the number is nobody else's.
        let _ = kill_process_group(group, Signal::TERM);
        let _ = tokio::time::timeout(TIME_TO_END, child.wait()).await;
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.kill().await;
}

fn write_sample(folder: &Path) -> io::Result<()> {
    for (path, text) in SAMPLE {
        let path = folder.join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(path, text)?;
    }
    Ok(())
}

/// A job: the action's main step, the build, and the action's post step.
struct Job<'a> {
    program: &'a Path,
    build: &'a Build,
    stage: SimulatedRunner,
    stop: &'a Stop,
}

impl Job<'_> {
    async fn run(&self, service: &TemporaryService) -> Result<JobResult, RehearsalError> {
        let result = self.run_steps(service).await;
        if result.is_ok() {
            return result;
        }
        // A runner always runs the post step, of a cancelled job too; without it the job's servers would
        // stay.
        let done = match self.stage.post_step() {
            Ok(environment) => {
                let stopped = &self.stop.post_step;
                self.own_step("report", &environment, stopped).await
            }
            Err(error) => Err(error.into()),
        };
        match done {
            Err(_) if self.stop.build.is_cancelled() => Err(RehearsalError::ServersLeft),
            _ => result,
        }
    }

    async fn run_steps(&self, service: &TemporaryService) -> Result<JobResult, RehearsalError> {
        let stage = &self.stage;
        let before = service.counters();
        let stopped = &self.stop.build;
        let setup = self.own_step("setup", &stage.environment, stopped).await?;
        let later = stage.later_step()?;
        let folder = self.build.in_workspace.then_some(&*stage.workspace);
        let mut build = Duration::ZERO;
        for command in &self.build.commands {
            build += self.step(command, &later, folder, stopped).await?;
        }
        let report = self
            .own_step("report", &stage.post_step()?, stopped)
            .await?;
        let summary = stage.read("GITHUB_STEP_SUMMARY")?;
        let headline = summary
            .lines()
            .find_map(|line| line.strip_prefix("**")?.strip_suffix(".**"))
            .unwrap_or("no summary was written");
        Ok(JobResult {
            job: stage.job,
            setup,
            build,
            report,
            headline: headline.to_owned(),
            requests: service.counters().since(&before),
            summary,
        })
    }

    /// A step of the action.
    async fn own_step(
        &self,
        name: &str,
        environment: &Environment,
        stopped: &CancellationToken,
    ) -> Result<Duration, RehearsalError> {
        let command = [self.program.as_os_str(), name.as_ref()];
        let folder = Some(&*self.stage.workspace);
        self.step(&command, environment, folder, stopped).await
    }

    /// Runs a step to its end and returns its duration.
    async fn step(
        &self,
        command: &[impl AsRef<std::ffi::OsStr>],
        environment: &Environment,
        folder: Option<&Path>,
        stopped: &CancellationToken,
    ) -> Result<Duration, RehearsalError> {
        let words: Vec<String> = command
            .iter()
            .map(|word| word.as_ref().to_string_lossy().into_owned())
            .collect();
        let Some((program, arguments)) = command.split_first() else {
            return Ok(Duration::ZERO);
        };
        let begin = Instant::now();
        let mut step = Command::new(program);
        step.args(arguments);
        if let Some(folder) = folder {
            step.current_dir(folder);
        }
        let status =
            run_in(step, environment, stopped)
                .await
                .map_err(|error| RehearsalError::NotRun {
                    step: words.join(" "),
                    error,
                })?;
        if !status.success() {
            return Err(RehearsalError::Step {
                step: words.join(" "),
                job: self.stage.job,
                status,
            });
        }
        Ok(begin.elapsed())
    }
}

/// The results side by side.
pub fn table(results: &[JobResult]) -> String {
    let mut rows: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for result in results {
        let requests = &result.requests;
        let cells = [
            ("", result.job.to_owned()),
            ("setup", seconds(result.setup)),
            ("build", seconds(result.build)),
            ("report", seconds(result.report)),
            ("cache lookups", requests.lookups.to_string()),
            ("  that found an entry", requests.hits.to_string()),
            ("cache entries written", requests.commits.to_string()),
            ("KiB up", (requests.bytes_in >> 10).to_string()),
            ("KiB down", (requests.bytes_out >> 10).to_string()),
        ];
        for (position, (name, cell)) in cells.into_iter().enumerate() {
            rows.entry(position)
                .or_insert_with(|| vec![name.to_owned()])
                .push(cell);
        }
    }
    let mut text = String::new();
    for row in rows.values() {
        let mut cells = row.iter();
        let name = cells.next().map_or("", String::as_str);
        let line = cells.fold(format!("{name:<24}"), |line, cell| {
            format!("{line}{cell:>12}")
        });
        text.push_str(line.trim_end());
        text.push('\n');
    }
    for result in results {
        text.push_str(&format!("\n{}: {}", result.job, result.headline));
    }
    text
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_that_is_brought_along_is_the_whole_sample() {
        fn files(folder: &Path, into: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true if path.ends_with("target") => {}
                    true => files(&path, into),
                    false => into.push(path),
                }
            }
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("sample");
        let mut found = Vec::new();
        files(&root, &mut found);
        found.sort();
        let mut brought: Vec<PathBuf> = SAMPLE.iter().map(|(path, _)| root.join(path)).collect();
        brought.sort();
        assert_eq!(found, brought);
    }

    #[test]
    fn results_stand_side_by_side() {
        let result = |job, hits| JobResult {
            job,
            setup: Duration::from_millis(120),
            build: Duration::from_secs(9),
            report: Duration::from_millis(30),
            summary: String::new(),
            headline: format!("{hits} hits"),
            requests: Snapshot {
                lookups: 30,
                hits,
                ..Snapshot::default()
            },
        };
        let table = table(&[result("cold", 0), result("warm", 30)]);
        assert!(
            table.contains("build                         9.00 s      9.00 s\n"),
            "{table}"
        );
        assert!(
            table.contains("  that found an entry              0          30\n"),
            "{table}"
        );
        assert!(table.ends_with("cold: 0 hits\nwarm: 30 hits"), "{table}");
    }
}
