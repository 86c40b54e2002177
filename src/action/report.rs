//! The post step: asks sccache how it went, tells the job's users, and stops the server. Whatever
//! goes wrong here, the job stays as it is, unless the user has set a hit rate to be reached.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::action::environment::Environment;
use crate::action::inputs::{Inputs, OnFailure};
use crate::action::relay;
use crate::action::runner_files::RunnerFiles;
use crate::action::state::{Setup, State};
use crate::action::summary::{self, Report};
use crate::action::workflow_command::Log;
use crate::relay::activity::Activity;
use crate::sccache::server::{Server, ServerError};
use crate::sccache::stats::Stats;
use crate::service::auth;
use crate::store::index::Ran;

const TITLE: &str = "sccache";

/// How long the server may take to write what it has still to write. It writes objects after it has
/// answered the compile, and drops what it has not written when it is stopped.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// How long the writes may stand still before the rest is given up. The server does not say whether
/// anything is left, so this is also the cost of a count that was off.
const DRAIN_STALL: Duration = Duration::from_secs(10);

/// How often the server is asked meanwhile.
const DRAIN_INTERVAL: Duration = Duration::from_millis(50);

/// How long the relay may take to save what it has still to save. A job ends later by as much, so
/// it is no longer than compiling the same again might take.
const SAVE_LIMIT: Duration = Duration::from_secs(120);

/// How much of the end of the server's log is shown, in bytes.
const LOG_SHOWN: u64 = 16 * 1024;

/// What becomes of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is green, whatever went wrong.
    Done,
    /// It is red: the hit rate is lower than the user wants, and the user asked for strictness.
    Failed,
}

/// Runs the step. `program` is the path of this process's binary.
pub async fn run(environment: &Environment, program: &Path, log: &Log) -> Outcome {
    for secret in ["INPUT_TOKEN", "ACTIONS_RUNTIME_TOKEN"] {
        if let Some(secret) = environment.get(secret) {
            log.mask(secret);
        }
    }
    let files = RunnerFiles::of(environment);
    // The main step has said what is wrong with an input.
    let wishes = Inputs::parse(environment).map_or_else(|_| Wishes::default(), Wishes::of);
    match Setup::of(environment) {
        None => log.info("sccache was not set up in this job; there is nothing to report."),
        Some(Setup::Failed { reason }) => {
            log.info(format!("sccache was not used in this job: {reason}"));
            if wishes.summary {
                add_to_summary(&files, &summary::without_sccache(&reason), log);
            }
        }
        Some(Setup::Done(state)) => {
            let mut ending = end(&state, log).await;
            let ran = ending.ran();
            ending.relay = end_relay(&state, environment, program, ran, log).await;
            let outcome = tell(&state, &ending, &files, &wishes, log);
            remove_elsewhere(&state, environment);
            return outcome;
        }
    }
    Outcome::Done
}

/// Removes a state folder that is not where the runner cleans up by itself.
fn remove_elsewhere(state: &State, environment: &Environment) {
    let root = state.state_dir.root();
    let temporary = environment.path("RUNNER_TEMP");
    if temporary.is_some_and(|temporary| !root.starts_with(temporary)) {
        // What a server that ends still writes stays.
        let _ = std::fs::remove_dir_all(root);
    }
}

/// What the user wants of the report.
#[derive(Clone, Debug)]
struct Wishes {
    summary: bool,
    annotations: bool,
    min_hit_rate: Option<f64>,
    on_failure: OnFailure,
}

impl Default for Wishes {
    fn default() -> Self {
        Self {
            summary: true,
            annotations: true,
            min_hit_rate: None,
            on_failure: OnFailure::Warn,
        }
    }
}

impl Wishes {
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
struct Ending {
    /// Whether it was there and did not answer.
    hangs: bool,
    stats: Result<Stats, String>,
    raw_stats: String,
    server_log: String,
    relay: Option<Result<Activity, String>>,
}

impl Ending {
    /// What the next run's summary shows of this one; nothing where nothing was looked up.
    fn ran(&self) -> Option<Ran> {
        let stats = self.stats.as_ref().ok()?;
        let ran = Ran {
            ended: auth::now(),
            hits: stats.hits(),
            lookups: stats.lookups(),
        };
        (ran.lookups > 0).then_some(ran)
    }
}

async fn end(state: &State, log: &Log) -> Ending {
    let sccache = state.state_dir.sccache().map(|sccache| sccache.path);
    let mut hangs = false;
    let (stats, raw_stats) = match sccache {
        None => (Err("sccache is no longer there".to_owned()), String::new()),
        Some(sccache) => {
            let server = Server::new(sccache, state.port);
            let last = last_statistics(&server, log).await;
            hangs = last.as_ref().is_err_and(|silence| silence.hangs);
            // Only where one listens: sccache's client would start a server to stop it. One that hangs
            // would not hear, and goes with the relay.
            if !(hangs && state.relay.is_some())
                && server.is_listening().await
                && let Err(error) = server.stop().await
            {
                log.info(format!("The sccache server did not stop: {error}"));
            }
            match last {
                Ok((stats, raw)) => (Ok(stats), raw),
                Err(silence) => (Err(silence.why), String::new()),
            }
        }
    };
    Ending {
        hangs,
        stats,
        raw_stats,
        relay: None,
        server_log: noteworthy(&end_of(&state.state_dir.server_log()).unwrap_or_default()),
    }
}

/// Has the relay save what is left, after sccache's server, which writes to it up to its end.
async fn end_relay(
    state: &State,
    environment: &Environment,
    program: &Path,
    ran: Option<Ran>,
    log: &Log,
) -> Option<Result<Activity, String>> {
    let relay = state.relay.as_ref()?;
    // One that hangs would be waited for as long as saving may take.
    let gone = match relay.answers().await {
        false => "it does not answer".to_owned(),
        true => match relay.finish(SAVE_LIMIT, ran).await {
            Ok(activity) => return Some(Ok(activity)),
            Err(error) => error.to_string(),
        },
    };
    if relay.is_listening().await {
        return Some(Err(gone));
    }
    let Ok(inputs) = Inputs::parse(environment) else {
        return Some(Err(gone));
    };
    let state_dir = &state.state_dir;
    let last = (SAVE_LIMIT, ran);
    let replaced = relay::replace(environment, &inputs, program, state_dir, last, log);
    Some(match replaced.await {
        Ok(mut activity) => {
            activity.troubles += 1;
            activity.first_trouble.get_or_insert_with(|| {
                "the relay died during the job; another one saved what was on sccache's disk"
                    .to_owned()
            });
            Ok(activity)
        }
        Err(why) => {
            log.debug(format!("the relay was not replaced: {why}"));
            Err(gone)
        }
    })
}

/// Why there are no statistics.
struct Silence {
    why: String,
    /// Whether the server is there and does not answer.
    hangs: bool,
}

async fn statistics(server: &Server) -> Result<(Stats, String), Silence> {
    let raw = server.statistics().await.map_err(|error| Silence {
        hangs: matches!(error, ServerError::TimedOut { .. }),
        why: error.to_string(),
    })?;
    let stats = Stats::parse(&raw).map_err(|error| Silence {
        hangs: false,
        why: error.to_string(),
    })?;
    Ok((stats, raw))
}

/// The statistics once the server has written what it had to write.
async fn last_statistics(server: &Server, log: &Log) -> Result<(Stats, String), Silence> {
    if !server.is_listening().await {
        return Err(Silence {
            why: "sccache's server was gone at the end of the job".to_owned(),
            hangs: false,
        });
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
        "waited {} ms for writes; {} may be left",
        begin.elapsed().as_millis(),
        last.0.pending_writes()
    ));
    Ok(last)
}

/// The end of a file that another process writes.
fn end_of(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_SHOWN)))?;
    let mut bytes = Vec::new();
    file.take(LOG_SHOWN).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The log without what is no trouble: each miss is a warning of opendal's, and so is that the
/// object by which sccache tries the cache is there already.
fn noteworthy(log: &str) -> String {
    let routine = |line: &&str| {
        line.contains(" opendal::")
            && (line.contains(": read failed NotFound ")
                || line.contains(": write failed AlreadyExists "))
    };
    let lines: Vec<&str> = log.lines().filter(|line| !routine(line)).collect();
    lines.join("\n")
}

fn tell(
    state: &State,
    ending: &Ending,
    files: &RunnerFiles,
    wishes: &Wishes,
    log: &Log,
) -> Outcome {
    let reason = state.state_dir.first_uncached_reason();
    let gave_up = state.state_dir.why_given_up();
    let (refused, refused_why) = state.state_dir.refusals();
    let times = state.state_dir.compile_times();
    let report = Report {
        version: &state.version,
        mode: state.mode,
        cache_location: &state.cache_location,
        read_only: state.read_only,
        stats: ending.stats.as_ref().map_err(String::as_str),
        raw_stats: &ending.raw_stats,
        uncached: state.state_dir.uncached_compiles(),
        uncached_reason: reason.as_deref(),
        gave_up: gave_up.as_deref(),
        refusals: (refused, refused_why.as_deref()),
        times: Some(&times),
        of_other_users: state.state_dir.compiles_of_other_users(),
        server_log: &ending.server_log,
        relay: ending
            .relay
            .as_ref()
            .map(|relay| relay.as_ref().map_err(String::as_str)),
        min_hit_rate: wishes.min_hit_rate,
        now: auth::now(),
    };
    log.group("sccache statistics", summary::log_text(&report));
    if !ending.server_log.trim().is_empty() {
        log.group("The sccache server's log", ending.server_log.trim());
    }
    if wishes.summary {
        add_to_summary(files, &log.redact(&summary::markdown(&report)), log);
    }
    if wishes.on_failure == OnFailure::Fail && summary::shortfall(&report).is_some() {
        log.error(TITLE, summary::annotation(&report));
        return Outcome::Failed;
    }
    if summary::is_troubled(&report) || ending.hangs {
        log.warning(TITLE, summary::annotation(&report));
    } else if wishes.annotations {
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
    Outcome::Done
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
        let shown = noteworthy(log);
        assert_eq!(shown.lines().count(), 2, "{shown}");
        assert!(shown.contains("RateLimited") && shown.contains("sccache::server"));
    }
}
