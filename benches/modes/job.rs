//! One job: what its steps do in each mode, and what they took.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use sccache_action::runner::files::RunnerFiles;
use sccache_action::sccache::server::{Server, ServerError, free_port};
use sccache_action::sccache::stats::{ErrorKind, Stats};

use crate::Mode;
use crate::project::{Project, TARGET};
use crate::relay::{self, Relay};
use crate::runner::Job;
use crate::upstream::{Counts, Upstream};

/// The key of the archive in the cache service.
const KEY: &str = "archive";

/// How long sccache's writes may stand still before they count as lost.
const STALL: Duration = Duration::from_secs(2);

/// How often it is asked for them.
const INTERVAL: Duration = Duration::from_millis(20);

/// The build.
pub struct Occasion<'a> {
    /// The parent of the job's folder; the files that stay until the next job are beside that.
    pub root: &'a Path,
    /// The sccache.
    pub sccache: &'a Path,
    /// The project.
    pub project: Project,
    /// The mode.
    pub mode: Mode,
    /// `cold` or `warm`.
    pub name: &'static str,
    /// The cache service, if the mode has one.
    pub upstream: Option<&'a Upstream>,
}

/// How a job went.
pub struct JobResult {
    /// The mode.
    pub mode: Mode,
    /// `cold` or `warm`.
    pub name: &'static str,
    /// The time until the build could begin.
    pub setup: Duration,
    /// The time of the build.
    pub build: Duration,
    /// The time after it.
    pub report: Duration,
    /// How many compiles the build was, sccache's answers among them.
    pub compiles: usize,
    /// sccache's statistics, if there are any.
    pub stats: Option<Stats>,
    /// The requests to the cache service, if there is one.
    pub counts: Option<Counts>,
    /// The peak memory of the relay, in KiB, if there is one.
    pub relay_peak: Option<u64>,
}

impl JobResult {
    /// The time of the whole job.
    pub fn total(&self) -> Duration {
        self.setup + self.build + self.report
    }

    /// Objects that sccache could not write.
    pub fn write_errors(&self) -> Option<u64> {
        let errors = self.stats.as_ref()?.error_counts();
        let writes = errors.iter().filter(|error| error.kind == ErrorKind::Write);
        Some(writes.map(|error| error.count).sum())
    }
}

/// Runs one job on an empty runner.
pub fn run(occasion: &Occasion<'_>) -> JobResult {
    let Occasion { mode, upstream, .. } = *occasion;
    let mut job = empty_runner(occasion);
    occasion.project.check_out(&mut job);
    let before = upstream.map(Upstream::counts);

    let earlier = relay::running();
    let (setup, ()) = timed(|| set_up(occasion, &job));
    let server = server(&job, occasion.sccache);
    let relay = Relay::started_since(&earlier);
    let (build, step) = timed(|| occasion.project.build(&job).green());
    let compiles = occasion.project.compiles(&job, &step);
    let end = || timed(|| end(occasion, &job, server.as_ref()));
    let ((report, stats), relay_peak) = match &relay {
        Some(relay) => {
            let (ended, peak) = relay.watch(end);
            relay.ends();
            (ended, Some(peak))
        }
        None => (end(), None),
    };
    if server.is_some() {
        job.server_ends();
    }
    JobResult {
        mode,
        name: occasion.name,
        setup,
        build,
        report,
        compiles,
        stats,
        counts: upstream
            .zip(before)
            .map(|(upstream, before)| upstream.counts().since(&before)),
        relay_peak,
    }
}

fn timed<T>(step: impl FnOnce() -> T) -> (Duration, T) {
    let begin = Instant::now();
    let given = step();
    (begin.elapsed(), given)
}

/// A job at the same path as the one before, which leaves nothing behind but its caches.
fn empty_runner(occasion: &Occasion<'_>) -> Job {
    let folder = occasion.root.join("runner");
    if folder.exists() {
        fs::remove_dir_all(&folder).unwrap();
    }
    let mut job = Job::in_folder(folder);
    // A server that an interrupted benchmark leaves behind ends itself.
    job.set("SCCACHE_IDLE_TIMEOUT", "600");
    if occasion.mode == Mode::Disk {
        let disk = occasion.root.join("disk-cache");
        job.set("SCCACHE_DIR", disk.display().to_string());
    }
    if let Some(upstream) = occasion.upstream {
        job.use_service(&upstream.url, &upstream.token);
        job.set("ACTIONS_CACHE_SERVICE_V2", "on");
    }
    if matches!(occasion.mode, Mode::Direct | Mode::Packed) {
        job.use_sccache(occasion.sccache);
        job.set("INPUT_MODE", occasion.mode.name());
        job.set("INPUT_WRAP", occasion.project.wrap());
        // Another benchmark measures its effect.
        job.set("INPUT_CACHE-CARGO", "false");
    }
    job
}

/// The time before the build.
fn set_up(occasion: &Occasion<'_>, job: &Job) {
    match occasion.mode {
        Mode::None => {}
        Mode::Disk => start_sccache(occasion, job),
        Mode::Archive => {
            restore(occasion, job, job.get("SCCACHE_DIR"));
            start_sccache(occasion, job);
        }
        Mode::ArchiveTarget => restore(occasion, job, TARGET),
        Mode::Direct | Mode::Packed => {
            let setup = job.setup().green();
            let mode = job.entries("GITHUB_OUTPUT");
            let mode = mode.get("mode").unwrap_or_default();
            assert_eq!(mode, occasion.mode.name(), "{}", setup.stdout);
        }
    }
}

/// The time after the build.
fn end(occasion: &Occasion<'_>, job: &Job, server: Option<&Server>) -> Option<Stats> {
    let stats = server.map(last_statistics);
    match occasion.mode {
        Mode::None => {}
        Mode::Disk => stop_sccache(server),
        Mode::Archive => {
            stop_sccache(server);
            save(occasion, job, job.get("SCCACHE_DIR"));
        }
        Mode::ArchiveTarget => save(occasion, job, TARGET),
        Mode::Direct | Mode::Packed => {
            job.report().green();
        }
    }
    stats
}

/// Starts sccache's server by sccache's own means, and has the build use it.
fn start_sccache(occasion: &Occasion<'_>, job: &Job) {
    let server = Server::new(occasion.sccache.to_owned(), free_port().unwrap());
    let environment = job.later_environment();
    wait_for(server.start(&environment)).unwrap();
    let sccache = occasion.sccache.display().to_string();
    let files = RunnerFiles::of(
        &[("GITHUB_ENV", job.get("GITHUB_ENV"))]
            .into_iter()
            .collect(),
    );
    files
        .export(&[
            ("RUSTC_WRAPPER".to_owned(), sccache.clone()),
            ("SCCACHE_PATH".to_owned(), sccache),
            ("SCCACHE_SERVER_PORT".to_owned(), server.port().to_string()),
        ])
        .unwrap();
}

fn stop_sccache(server: Option<&Server>) {
    if let Some(server) = server {
        wait_for(server.stop()).unwrap();
    }
}

/// The job's sccache server, if it has one.
fn server(job: &Job, sccache: &Path) -> Option<Server> {
    let exported = job.entries("GITHUB_ENV");
    let port = exported.get("SCCACHE_SERVER_PORT")?.parse().unwrap();
    Some(Server::new(sccache.to_owned(), port))
}

fn wait_for<T>(asked: impl Future<Output = Result<T, ServerError>>) -> Result<T, ServerError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(asked)
}

/// The statistics once the server has written what it had to write: it answers a compile first.
fn last_statistics(server: &Server) -> Stats {
    let ask = || Stats::parse(&wait_for(server.statistics()).unwrap()).unwrap();
    let mut stats = ask();
    let mut progress = Instant::now();
    while stats.pending_writes() > 0 && progress.elapsed() < STALL {
        thread::sleep(INTERVAL);
        let next = ask();
        if next.pending_writes() < stats.pending_writes() {
            progress = Instant::now();
        }
        stats = next;
    }
    stats
}

/// Restores `path` as the main step of `actions/cache` does.
fn restore(occasion: &Occasion<'_>, job: &Job, path: &str) {
    let said = job.toolkit(false, &["restore", KEY, path]);
    let expected = match occasion.name {
        "cold" => "restored none",
        _ => "restored archive",
    };
    assert!(said.contains(expected), "{said}");
}

/// Saves `path` like the post step of `actions/cache`, which does nothing if its key was found.
fn save(occasion: &Occasion<'_>, job: &Job, path: &str) {
    if occasion.name == "cold" {
        let said = job.toolkit(true, &["save", KEY, path]);
        assert!(
            said.contains("saved ") && !said.contains("saved -1"),
            "{said}"
        );
    }
}
