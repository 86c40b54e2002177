//! The post step: gets sccache's statistics, reports them, and stops the server. The job's result
//! stays as it is, whatever fails here, unless the user has set a minimum hit rate.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::action::inputs::{Inputs, OnFailure};
use crate::action::mode::Mode;
use crate::action::start_relay;
use crate::action::state::{Setup, SetupState};
use crate::action::summary::{self, Report};
use crate::clock::Timestamp;
use crate::packs::index::RunStats;
use crate::relay::activity::Activity;
use crate::relay::process::ProcessError;
use crate::runner::environment::Environment;
use crate::runner::files::RunnerFiles;
use crate::runner::log::Log;
use crate::sccache::server::{Server, ServerError};
use crate::sccache::stats::{Stats, StatsError};

const TITLE: &str = "sccache";

/// How long the server may take for its remaining writes. It writes objects after it has answered
/// the compile, and drops what it has not written when it is stopped.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// How long the writes may make no progress before the rest is given up. The server does not say
/// whether anything is left, so a wrong count costs this time too.
const DRAIN_STALL: Duration = Duration::from_secs(10);

/// How often the server is polled meanwhile.
const DRAIN_INTERVAL: Duration = Duration::from_millis(50);

/// How long the relay may take to save the rest. It delays the end of the job, so it is no longer
/// than compiling the same again might take.
const SAVE_LIMIT: Duration = Duration::from_secs(120);

/// How much of the end of the server's log is shown, in bytes.
const LOG_SHOWN: u64 = 16 * 1024;

/// The result of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReportOutcome {
    /// Success, whatever went wrong.
    Done,
    /// Failure: the hit rate is lower than the user wants, and the user asked for strictness.
    Failed,
}

/// Runs the step. `program` is the path of this process's binary.
pub async fn run(environment: &Environment, program: &Path, log: &Log) -> ReportOutcome {
    for secret in ["INPUT_TOKEN", "ACTIONS_RUNTIME_TOKEN"] {
        if let Some(secret) = environment.get(secret) {
            log.mask(secret);
        }
    }
    let files = RunnerFiles::of(environment);
    // The main step has reported invalid inputs.
    let options =
        Inputs::parse(environment).map_or_else(|_| ReportOptions::default(), ReportOptions::of);
    match Setup::of(environment) {
        None => log.info("sccache was not set up in this job; there is nothing to report."),
        Some(Setup::Failed { reason }) => {
            log.info(format!("sccache was not used in this job: {reason}"));
            if options.summary {
                add_to_summary(&files, &summary::without_sccache(&reason), log);
            }
        }
        Some(Setup::Done(state)) => {
            let mut final_state = end(&state, log).await;
            let dependencies = state.state_dir.compiled_dependencies().len();
            let ran = final_state.ran(dependencies as u64);
            match state.mode {
                Mode::Packed => {
                    final_state.relay = end_relay(&state, environment, program, ran, log).await;
                }
                _ => final_state.keeper = end_keeper(&state).await,
            }
            let outcome = publish(&state, &final_state, &files, &options, log);
            remove_elsewhere(&state, environment);
            return outcome;
        }
    }
    ReportOutcome::Done
}

/// Removes a state folder outside the folders that the runner itself cleans up.
fn remove_elsewhere(state: &SetupState, environment: &Environment) {
    let root = state.state_dir.root();
    let temporary = environment.path("RUNNER_TEMP");
    if temporary.is_some_and(|temporary| !root.starts_with(temporary)) {
        // Files that a stopping server still writes stay.
        let _ = std::fs::remove_dir_all(root);
    }
}

/// The user's settings for the report.
#[derive(Clone, Debug)]
struct ReportOptions {
    summary: bool,
    annotations: bool,
    min_hit_rate: Option<f64>,
    on_failure: OnFailure,
}

impl Default for ReportOptions {
    fn default() -> Self {
        Self {
            summary: true,
            annotations: true,
            min_hit_rate: None,
            on_failure: OnFailure::Warn,
        }
    }
}

impl ReportOptions {
    fn of(inputs: Inputs) -> Self {
        Self {
            summary: inputs.summary,
            annotations: inputs.annotations,
            min_hit_rate: inputs.min_hit_rate,
            on_failure: inputs.on_failure,
        }
    }
}

/// How the server ended.
struct FinalState {
    /// Whether it was there and did not answer.
    hangs: bool,
    stats: Result<Stats, NoStatistics>,
    raw_stats: String,
    server_log: String,
    relay: Option<Result<Activity, RelayLost>>,
    /// The activity of a keeper: a process other than a relay that kept the server.
    keeper: Option<Activity>,
}

impl FinalState {
    /// The numbers of this run for the next run's summary; `None` if no compile was looked up.
    fn ran(&self, dependencies: u64) -> Option<RunStats> {
        summary::ran(self.stats.as_ref().ok()?, dependencies, Timestamp::now())
    }
}

async fn end(state: &SetupState, log: &Log) -> FinalState {
    let sccache = state.state_dir.sccache().map(|sccache| sccache.path);
    let mut hangs = false;
    let (stats, raw_stats) = match sccache {
        None => (Err(NoStatistics::NoSccache), String::new()),
        Some(sccache) => {
            let server = Server::new(sccache, state.port);
            let last = last_statistics(&server, log).await;
            hangs = last.as_ref().is_err_and(NoStatistics::hangs);
            // Only if one listens: sccache's client would start a server to stop it. A server that
            // hangs would not react; the relay ends it.
            if !(hangs && state.relay.is_some())
                && server.is_listening().await
                && let Err(error) = server.stop().await
            {
                log.info(format!("The sccache server did not stop: {error}"));
            }
            match last {
                Ok((mut stats, raw)) => {
                    stats.set_failures(state.state_dir.failed_compiles());
                    (Ok(stats), raw)
                }
                Err(failure) => (Err(failure), String::new()),
            }
        }
    };
    FinalState {
        hangs,
        stats,
        raw_stats,
        relay: None,
        keeper: None,
        server_log: filter_routine_lines(&tail(&state.state_dir.server_log()).unwrap_or_default()),
    }
}

/// Makes the relay save the rest. This comes after the end of sccache's server, which writes to the
/// relay until then.
async fn end_relay(
    state: &SetupState,
    environment: &Environment,
    program: &Path,
    ran: Option<RunStats>,
    log: &Log,
) -> Option<Result<Activity, RelayLost>> {
    let relay = state.relay.as_ref()?;
    // A relay that hangs would delay the job by the whole time limit for saving.
    let gone = if relay.answers().await {
        match relay.finish(SAVE_LIMIT, ran).await {
            Ok(activity) => return Some(Ok(activity)),
            Err(error) => error.into(),
        }
    } else {
        RelayLost::Hangs
    };
    if relay.is_listening().await {
        return Some(Err(gone));
    }
    let Ok(inputs) = Inputs::parse(environment) else {
        return Some(Err(gone));
    };
    let state_dir = &state.state_dir;
    let last = (SAVE_LIMIT, ran);
    let replaced = start_relay::replace(environment, &inputs, program, state_dir, last, log);
    Some(match replaced.await {
        Ok(mut activity) => {
            activity.errors += 1;
            activity.first_error.get_or_insert_with(|| {
                "the relay crashed; its replacement saved the objects on disk".to_owned()
            });
            Ok(activity)
        }
        Err(why) => {
            log.debug(format!("the relay was not replaced: {why}"));
            Err(gone)
        }
    })
}

/// Ends the keeper of the server. If it is gone, nothing is lost.
async fn end_keeper(state: &SetupState) -> Option<Activity> {
    let keeper = state.relay.as_ref()?;
    keeper.finish(Duration::ZERO, None).await.ok()
}

/// Why there are no statistics.
#[derive(Debug, thiserror::Error)]
enum NoStatistics {
    #[error("sccache no longer exists")]
    NoSccache,
    #[error("sccache's server was gone at the end of the job")]
    NoServer,
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Unreadable(#[from] StatsError),
}

impl NoStatistics {
    /// Whether the server is there and does not answer.
    fn hangs(&self) -> bool {
        matches!(self, Self::Server(ServerError::TimedOut { .. }))
    }
}

/// Why it is not known what the relay did.
#[derive(Debug, thiserror::Error)]
enum RelayLost {
    #[error("it does not answer")]
    Hangs,
    #[error(transparent)]
    Process(#[from] ProcessError),
}

async fn statistics(server: &Server) -> Result<(Stats, String), NoStatistics> {
    let raw = server.statistics().await?;
    Ok((Stats::parse(&raw)?, raw))
}

/// The statistics after the server's last writes.
async fn last_statistics(server: &Server, log: &Log) -> Result<(Stats, String), NoStatistics> {
    if !server.is_listening().await {
        return Err(NoStatistics::NoServer);
    }
    let begin = Instant::now();
    let mut last = statistics(server).await?;
    let mut progress = Instant::now();
    while last.0.pending_writes() > 0
        && begin.elapsed() < DRAIN_LIMIT
        && progress.elapsed() < DRAIN_STALL
    {
        // sccache has no event for this that one could wait for.
        sleep(DRAIN_INTERVAL).await;
        let Ok(next) = statistics(server).await else {
            break;
        };
        if next.0.pending_writes() < last.0.pending_writes() {
            progress = Instant::now();
        }
        last = next;
    }
    log.debug(format!(
        "waited {} ms for writes; {} may be unfinished",
        begin.elapsed().as_millis(),
        last.0.pending_writes()
    ));
    Ok(last)
}

/// The end of a file that another process writes.
fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_SHOWN)))?;
    let mut bytes = Vec::new();
    file.take(LOG_SHOWN).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The log without routine lines: opendal warns of each miss, and of the existing object with which
/// sccache tests the cache.
fn filter_routine_lines(log: &str) -> String {
    let routine = |line: &&str| {
        line.contains(" opendal::")
            && (line.contains(": read failed NotFound ")
                || line.contains(": write failed AlreadyExists "))
    };
    let lines: Vec<&str> = log.lines().filter(|line| !routine(line)).collect();
    lines.join("\n")
}

fn publish(
    state: &SetupState,
    final_state: &FinalState,
    files: &RunnerFiles,
    options: &ReportOptions,
    log: &Log,
) -> ReportOutcome {
    let reason = state.state_dir.first_uncached_reason();
    let gave_up = state.state_dir.why_given_up();
    let (refused, refused_why) = state.state_dir.refusals();
    let times = state.state_dir.compile_times();
    // The report has texts, since it is all values.
    let no_stats = final_state.stats.as_ref().err().map(ToString::to_string);
    let no_stats = no_stats.unwrap_or_default();
    let lost = final_state
        .relay
        .as_ref()
        .and_then(|relay| relay.as_ref().err());
    let lost = lost.map(ToString::to_string).unwrap_or_default();
    let report = Report {
        version: &state.version,
        mode: state.mode,
        cache_location: &state.cache_location,
        read_only: state.read_only,
        stats: final_state.stats.as_ref().map_err(|_| no_stats.as_str()),
        raw_stats: &final_state.raw_stats,
        uncached: state.state_dir.uncached_compiles(),
        uncached_reason: reason.as_deref(),
        gave_up: gave_up.as_deref(),
        refusals: (refused, refused_why.as_deref()),
        times: Some(&times),
        of_other_users: state.state_dir.compiles_of_other_users(),
        dependencies: state.state_dir.compiled_dependencies().len() as u64,
        server_log: &final_state.server_log,
        relay: final_state
            .relay
            .as_ref()
            .map(|relay| relay.as_ref().map_err(|_| lost.as_str())),
        keeper: final_state.keeper.as_ref(),
        min_hit_rate: options.min_hit_rate,
        now: Timestamp::now(),
    };
    log.group("sccache statistics", summary::log_text(&report));
    if !final_state.server_log.trim().is_empty() {
        log.group("The sccache server's log", final_state.server_log.trim());
    }
    if options.summary {
        add_to_summary(files, &log.redact(&summary::markdown(&report)), log);
    }
    if options.on_failure == OnFailure::Fail && summary::hit_rate_failure(&report).is_some() {
        log.error(TITLE, summary::annotation(&report));
        return ReportOutcome::Failed;
    }
    if summary::has_problems(&report) || final_state.hangs {
        log.warning(TITLE, summary::annotation(&report));
    } else if options.annotations {
        log.notice(TITLE, summary::annotation(&report));
    }
    if let Some(folder) = state.state_dir.first_of_unknown_layout() {
        log.notice(
            TITLE,
            format!(
                "The cargo cache does not know the layout of cargo's build directory ({folder}). \
                 Dependencies went through sccache instead."
            ),
        );
    }
    ReportOutcome::Done
}

fn add_to_summary(files: &RunnerFiles, markdown: &str, log: &Log) {
    if let Err(error) = files.add_to_summary(markdown) {
        log.info(format!("The job summary could not be written: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_miss_is_no_trouble_and_a_refused_write_is() {
        let log = "[T WARN  opendal::services] service=ghac path=a: read failed NotFound (permanent) at read\n\
                   [T WARN  opendal::services] service=ghac path=.sccache_check: write failed AlreadyExists (permanent)\n\
                   [T WARN  opendal::services] service=ghac path=b: write failed RateLimited (temporary)\n\
                   [T ERROR sccache::server] NotFound";
        let shown = filter_routine_lines(log);
        assert_eq!(shown.lines().count(), 2, "{shown}");
        assert!(shown.contains("RateLimited") && shown.contains("sccache::server"));
    }
}
