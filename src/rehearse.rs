//! A whole job on this machine, twice: first with an empty cache, then with what the first left.
//!
//! The main step and the post step run as a runner would run them: each in a process of its own,
//! with the runner's files, the address and the token of a cache service, which here is the
//! embedded one. The build between them sees what later steps would see, and no token.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use backon::{ExponentialBuilder, Retryable};
use tokio::process::Command;

use crate::action::environment::Environment;
use crate::action::runner_files::read_entries;
use crate::service::{self, Config, Running, ServiceError, Snapshot};

/// The project that is built where no command is given: `sample/` of the repository.
const SAMPLE: [(&str, &str); 19] = [
    ("Cargo.lock", include_str!("../sample/Cargo.lock")),
    ("Cargo.toml", include_str!("../sample/Cargo.toml")),
    ("app/Cargo.toml", include_str!("../sample/app/Cargo.toml")),
    ("app/src/main.rs", include_str!("../sample/app/src/main.rs")),
    (
        "native/Cargo.toml",
        include_str!("../sample/native/Cargo.toml"),
    ),
    ("native/build.rs", include_str!("../sample/native/build.rs")),
    (
        "native/c/adler32.c",
        include_str!("../sample/native/c/adler32.c"),
    ),
    (
        "native/c/crc32.c",
        include_str!("../sample/native/c/crc32.c"),
    ),
    (
        "native/c/digest.h",
        include_str!("../sample/native/c/digest.h"),
    ),
    ("native/c/djb2.c", include_str!("../sample/native/c/djb2.c")),
    (
        "native/c/fletcher.c",
        include_str!("../sample/native/c/fletcher.c"),
    ),
    (
        "native/c/fnv1a.c",
        include_str!("../sample/native/c/fnv1a.c"),
    ),
    (
        "native/c/jenkins.c",
        include_str!("../sample/native/c/jenkins.c"),
    ),
    (
        "native/c/pearson.c",
        include_str!("../sample/native/c/pearson.c"),
    ),
    ("native/c/sdbm.c", include_str!("../sample/native/c/sdbm.c")),
    (
        "native/src/lib.rs",
        include_str!("../sample/native/src/lib.rs"),
    ),
    ("text/Cargo.toml", include_str!("../sample/text/Cargo.toml")),
    ("text/src/lib.rs", include_str!("../sample/text/src/lib.rs")),
    (".gitignore", include_str!("../sample/.gitignore")),
];

/// What is rehearsed.
#[derive(Clone, Debug)]
pub struct Rehearsal {
    /// This binary.
    pub program: PathBuf,
    /// The environment it was started in, with the action's inputs as `INPUT_` variables.
    pub environment: Environment,
    /// The build, or nothing for the sample project.
    pub build: Vec<OsString>,
}

/// Why a rehearsal did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    /// A file of the stage could not be written.
    #[error("the stage could not be set: {0}")]
    Stage(#[from] io::Error),
    /// The embedded cache service did not start.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// A step could not be run at all.
    #[error("the step `{step}` cannot be run: {error}")]
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
    /// The annotation's text, or what else stands in its place.
    pub verdict: String,
    /// What the cache service was asked in this job.
    pub requests: Snapshot,
}

/// Runs the job twice and gives both results. What the steps print goes to this process's standard
/// output as it comes.
///
/// # Errors
/// Where a step fails or the stage cannot be set.
pub async fn run(rehearsal: &Rehearsal) -> Result<Vec<JobResult>, RehearsalError> {
    let stage = tempfile::Builder::new()
        .prefix("sccache-action-rehearsal-")
        .tempdir()?;
    let (token, tokens) = service::single_token("refs/heads/main").map_err(ServiceError::from)?;
    let config = Config::on_loopback(stage.path().join("service"), tokens);
    let running = service::start(config).await?;
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
    let mut results = Vec::new();
    for job in ["cold", "warm"] {
        let stage = Stage::set(stage.path(), job, &environment).await?;
        results.push(run_job(rehearsal, &stage, &running).await?);
    }
    // What is left of it is a folder that goes with the stage.
    let _ = running.shutdown().await;
    Ok(results)
}

/// Where one job runs. The workspace and the folder for temporary files are at the same paths in
/// both jobs, and empty at first, as they are on a runner.
struct Stage {
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

impl Stage {
    async fn set(root: &Path, job: &'static str, environment: &Environment) -> io::Result<Self> {
        let runner = root.join(job);
        let workspace = root.join("workspace");
        let temporary = root.join("temporary");
        let mut environment = environment.clone();
        for folder in [&temporary, &workspace] {
            if folder.exists() {
                // On Windows a folder stays as long as a server that was stopped is still ending
                // there.
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
        // A runner's disk is empty at first, so nothing may be found on this one's; unless the disk
        // is where objects are to be kept.
        let keeper = match environment.get("INPUT_MODE") {
            Some("local") => root,
            _ => &runner,
        };
        let disk = keeper.join("disk-cache").display().to_string();
        environment.set("SCCACHE_DIR", disk);
        for (path, text) in SAMPLE {
            let path = workspace.join(path);
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::write(path, text)?;
        }
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

    /// The environment of a step that is no part of the action: without what only actions get,
    /// with what the main step exported.
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

    /// The environment of the post step: the main step's, with the state that it left.
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

async fn run_job(
    rehearsal: &Rehearsal,
    stage: &Stage,
    running: &Running,
) -> Result<JobResult, RehearsalError> {
    let result = run_steps(rehearsal, stage, running).await;
    // A runner runs the post step whatever became of the others; without it the job's servers would
    // stay.
    if result.is_err()
        && let Ok(environment) = stage.post_step()
    {
        let report = [rehearsal.program.as_os_str(), "report".as_ref()];
        let _ = step(stage, &report, &environment).await;
    }
    result
}

async fn run_steps(
    rehearsal: &Rehearsal,
    stage: &Stage,
    running: &Running,
) -> Result<JobResult, RehearsalError> {
    let before = running.counters();
    let program = rehearsal.program.as_os_str();
    let setup = step(stage, &[program, "setup".as_ref()], &stage.environment).await?;
    let sample = ["cargo", "build", "--locked"].map(OsString::from);
    let build: &[OsString] = match rehearsal.build.as_slice() {
        [] => &sample,
        build => build,
    };
    let folder = rehearsal.build.is_empty().then_some(&*stage.workspace);
    let later = stage.later_step()?;
    let build = step_in(stage, build, &later, folder).await?;
    let report = step(stage, &[program, "report".as_ref()], &stage.post_step()?).await?;
    let summary = stage.read("GITHUB_STEP_SUMMARY")?;
    let verdict = summary
        .lines()
        .find_map(|line| line.strip_prefix("**")?.strip_suffix(".**"))
        .unwrap_or("no summary was written");
    Ok(JobResult {
        job: stage.job,
        setup,
        build,
        report,
        verdict: verdict.to_owned(),
        requests: running.counters().since(&before),
        summary,
    })
}

async fn step(
    stage: &Stage,
    command: &[impl AsRef<std::ffi::OsStr>],
    environment: &Environment,
) -> Result<Duration, RehearsalError> {
    step_in(stage, command, environment, Some(&stage.workspace)).await
}

/// Runs a step to its end and gives the time it took.
async fn step_in(
    stage: &Stage,
    command: &[impl AsRef<std::ffi::OsStr>],
    environment: &Environment,
    folder: Option<&Path>,
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
    step.args(arguments)
        .env_clear()
        .envs(environment.iter())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    if let Some(folder) = folder {
        step.current_dir(folder);
    }
    let status = step.status().await;
    let status = status.map_err(|error| RehearsalError::NotRun {
        step: words.join(" "),
        error,
    })?;
    if !status.success() {
        return Err(RehearsalError::Step {
            step: words.join(" "),
            job: stage.job,
            status,
        });
    }
    Ok(begin.elapsed())
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
            ("cache look-ups", requests.lookups.to_string()),
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
        text.push_str(&format!("\n{}: {}", result.job, result.verdict));
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
            verdict: format!("{hits} hits"),
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
