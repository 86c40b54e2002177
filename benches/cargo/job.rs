//! One job: what its steps do for each contender, and what they took.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::project::member;
use crate::runner::Job;
use crate::{BuildLayout, Contender};

/// How many compiles run at the same time.
const PARALLEL: &str = "2";

/// The build.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Occasion {
    /// The contender.
    pub contender: Contender,
    /// The runner's folder.
    pub place: PathBuf,
    /// The project's sources.
    pub sources: PathBuf,
    /// How often the workspace's code was changed.
    pub code: usize,
    /// The sccache.
    pub sccache: PathBuf,
    /// The cache service's address, and the job's token for it.
    pub service: (String, String),
    /// The job's name.
    pub job: String,
    /// Its toolchain, if it is not the default one.
    pub toolchain: Option<String>,
    /// The layout of its build directory.
    pub layout: BuildLayout,
}

/// The measurements of a job.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Times {
    /// The time until the build could begin.
    pub setup: Duration,
    /// The time of the build.
    pub build: Duration,
    /// The time after it.
    pub post: Duration,
    /// How many packages cargo did not find fresh.
    pub compiled: usize,
}

impl Times {
    /// The time of all steps.
    pub fn total(&self) -> Duration {
        self.setup + self.build + self.post
    }
}

/// Runs one job on an empty runner.
pub fn run(occasion: &Occasion) -> Times {
    let job = check_out(occasion);
    let (setup, restored) = timed(|| set_up(occasion, &job));
    let build = || {
        let arguments = ["cargo", "build", "--locked", "--jobs", PARALLEL];
        job.step(&arguments).green()
    };
    let (build, step) = timed(build);
    assert!(job.path("workspace/target/debug/server").is_file());
    let compiling = |line: &&str| line.trim_start().starts_with("Compiling ");
    let compiled = step.stderr.lines().filter(compiling).count();
    let (post, ()) = timed(|| end(occasion, &job, &restored));
    if occasion.contender != Contender::Archive {
        job.server_ends();
    }
    Times {
        setup,
        build,
        post,
        compiled,
    }
}

fn timed<T>(step: impl FnOnce() -> T) -> (Duration, T) {
    let begin = Instant::now();
    let given = step();
    (begin.elapsed(), given)
}

/// An empty runner with the sources in its workspace, changed just now as by a checkout.
fn check_out(occasion: &Occasion) -> Job {
    fs::create_dir_all(&occasion.place).unwrap();
    // The place itself may be a mount.
    for entry in fs::read_dir(&occasion.place).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }
    let mut job = Job::in_folder(occasion.place.clone());
    copy(&occasion.sources, &job.path("workspace"));
    let changed = job.path("workspace/member0/src/lib.rs");
    fs::write(changed, member(0, occasion.code)).unwrap();
    job.set("CARGO_HOME", job.path("cargo-home").display().to_string());
    job.set("CARGO_INCREMENTAL", "0");
    job.set("SCCACHE_IDLE_TIMEOUT", "600");
    job.set("GITHUB_WORKFLOW", "CI");
    job.set("GITHUB_JOB", occasion.job.clone());
    job.use_service(&occasion.service.0, &occasion.service.1);
    job.set("ACTIONS_CACHE_SERVICE_V2", "on");
    if occasion.layout == BuildLayout::Newer {
        job.set("RUSTC_BOOTSTRAP", "1");
        job.set("CARGO_UNSTABLE_BUILD_DIR_NEW_LAYOUT", "true");
    }
    if let Some(toolchain) = &occasion.toolchain {
        job.set("RUSTUP_TOOLCHAIN", toolchain.clone());
    }
    match occasion.contender {
        Contender::Archive => {}
        Contender::Action => job.use_sccache(&occasion.sccache),
        Contender::Sccache => {
            job.use_sccache(&occasion.sccache);
            job.set("INPUT_MODE", "direct");
        }
    }
    job
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(&path, to).unwrap();
        }
    }
}

/// The time before the build. Gives the key of the archive that was found.
fn set_up(occasion: &Occasion, job: &Job) -> String {
    match occasion.contender {
        Contender::Archive => {
            let (prefix, key) = keys(occasion, job);
            let said = archive(job, false, "restore", &format!("{key},{prefix}"));
            let found = said.lines().find_map(|line| line.strip_prefix("restored "));
            found.unwrap_or_else(|| panic!("{said}")).to_owned()
        }
        Contender::Action | Contender::Sccache => {
            start_node(job, false);
            let setup = job.setup().green();
            assert!(setup.warnings().is_empty(), "{}", setup.stdout);
            String::new()
        }
    }
}

/// The time after the build.
fn end(occasion: &Occasion, job: &Job, restored: &str) {
    match occasion.contender {
        Contender::Archive => {
            let (_, key) = keys(occasion, job);
            if restored != key {
                clean(job);
                let said = archive(job, true, "save", &key);
                assert!(
                    said.contains("saved ") && !said.contains("saved -1"),
                    "{said}"
                );
            }
        }
        Contender::Action | Contender::Sccache => {
            start_node(job, true);
            let report = job.report().green();
            if occasion.contender == Contender::Action {
                assert!(report.warnings().is_empty(), "{}", report.stdout);
            }
        }
    }
}

/// The prefix and the whole of an archive's key, from the same parts as in `rust-cache` if jobs
/// share a key (`shared-key`): the compiler, then the lockfile.
fn keys(occasion: &Occasion, job: &Job) -> (String, String) {
    let mut rustc = Command::new("rustc");
    if let Some(toolchain) = &occasion.toolchain {
        rustc.env("RUSTUP_TOOLCHAIN", toolchain);
    }
    let rustc = rustc.arg("-vV").output().unwrap().stdout;
    let lockfile = fs::read(job.path("workspace/Cargo.lock")).unwrap();
    let digest = |bytes: &[u8]| hex::encode(&Sha256::digest(bytes)[..8]);
    let prefix = format!("rust-{}-", digest(&rustc));
    let key = format!("{prefix}{}", digest(&lockfile));
    (prefix, key)
}

/// Removes the files that `rust-cache` removes before it saves: the workspace's own, those that
/// cargo unpacked, and incremental compiles.
fn clean(job: &Job) {
    let profile = job.path("workspace/target/debug");
    let is_own = |name: &str| {
        let name = name.strip_prefix("lib").unwrap_or(name);
        name.starts_with("server") || name.starts_with("member")
    };
    for folder in [".fingerprint", "deps", "build", "."] {
        // One layout has all in `build`, the other in three folders.
        for entry in fs::read_dir(profile.join(folder)).into_iter().flatten() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let is_extra = folder == "." && ["incremental", "examples"].contains(&name);
            match path.is_dir() {
                true if is_extra || (is_own(name) && folder != ".") => {
                    fs::remove_dir_all(&path).unwrap();
                }
                false if is_own(name) => fs::remove_file(&path).unwrap(),
                _ => {}
            }
        }
    }
    for registry in fs::read_dir(job.path("cargo-home/registry/src")).unwrap() {
        for package in fs::read_dir(registry.unwrap().path()).unwrap() {
            let path = package.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            // It keeps these for the file times that their build scripts check.
            if !name.contains("-sys-") {
                fs::remove_dir_all(path).unwrap();
            }
        }
    }
}

/// Saves or restores the archive of the registry and `target`.
fn archive(job: &Job, post: bool, command: &str, keys: &str) -> String {
    let registry = job.path("cargo-home/registry").display().to_string();
    let git = job.path("cargo-home/git").display().to_string();
    job.toolkit(post, &[command, keys, &registry, &git, "target"])
}

/// The additional time of a step's launcher.
fn start_node(job: &Job, post: bool) {
    job.action_step(post, &["node", "--eval", "0"]).green();
}
