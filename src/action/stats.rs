//! The command `stats`: what the sccache server of this job has done so far, for a person, as the
//! job summary has it, or as JSON of a form that stays.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::action::environment::Environment;
use crate::action::mode::Mode;
use crate::action::state::Found;
use crate::action::summary::{self, Report};
use crate::sccache::server::{Server, ServerError};
use crate::sccache::state::sccache_on_path;
use crate::sccache::stats::{ErrorKind, LanguageRow, Stats, StatsError};
use crate::sccache::times::CompileTimes;
use crate::service::auth;

/// The port of a server that nobody gave one (`DEFAULT_PORT` in `src/config.rs` of sccache).
pub const DEFAULT_PORT: u16 = 4226;

/// In which form the statistics are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A table for a person.
    Table,
    /// As the job summary has it.
    Markdown,
    /// As [`json()`] describes it.
    Json,
}

/// Why there are no statistics.
#[derive(Debug, thiserror::Error)]
pub enum StatsCommandError {
    /// There is no sccache.
    #[error("there is no sccache: this job has not set it up, and none is on PATH")]
    NoSccache,
    /// No server listens.
    #[error("no sccache server listens on port {0} of this machine")]
    NoServer(u16),
    /// The server or its client failed.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// What it said is not understood.
    #[error(transparent)]
    Stats(#[from] StatsError),
}

/// The sccache and the port that a step of this job would use.
pub(crate) fn server_of(environment: &Environment, found: Option<&Found>) -> Option<Server> {
    let sccache: Option<PathBuf> = found
        .and_then(|found| found.state_dir.sccache())
        .map(|sccache| sccache.path)
        .or_else(|| sccache_on_path(environment));
    Some(Server::new(sccache?, port(environment)))
}

fn port(environment: &Environment) -> u16 {
    let port = environment.get("SCCACHE_SERVER_PORT");
    let port = port.and_then(|port| port.parse().ok());
    port.unwrap_or(DEFAULT_PORT)
}

/// Runs the command. Gives what is to be printed.
///
/// # Errors
/// Where no server answers. None is started to be asked.
pub async fn run(environment: &Environment, form: Form) -> Result<String, StatsCommandError> {
    let found = Found::of(environment);
    let server = server_of(environment, found.as_ref()).ok_or(StatsCommandError::NoSccache)?;
    if !server.is_listening().await {
        return Err(StatsCommandError::NoServer(server.port()));
    }
    let raw = server.statistics().await?;
    let stats = Stats::parse(&raw)?;
    let location = stats.cache_location.clone().unwrap_or_default();
    let version = stats.version.clone().unwrap_or_default();
    let about = found.as_ref().and_then(|found| found.about.as_ref());
    let state_dir = found.as_ref().map(|found| &found.state_dir);
    let reason = state_dir.and_then(|state_dir| state_dir.first_uncached_reason());
    let gave_up = state_dir.and_then(|state_dir| state_dir.why_given_up());
    let refusals = state_dir.map(|state_dir| state_dir.refusals());
    let (refused, refused_why) = refusals.unwrap_or_default();
    let times = state_dir.map(|state_dir| state_dir.compile_times());
    let report = Report {
        version: about.map_or(&version, |about| &about.version),
        mode: about.map_or_else(|| mode_of(&location), |about| about.mode),
        cache_location: about.map_or(&location, |about| &about.cache_location),
        read_only: about.is_some_and(|about| about.read_only),
        stats: Ok(&stats),
        raw_stats: &raw,
        uncached: state_dir.map_or(0, |state_dir| state_dir.uncached_compiles()),
        uncached_reason: reason.as_deref(),
        gave_up: gave_up.as_deref(),
        refusals: (refused, refused_why.as_deref()),
        times: times.as_ref(),
        of_other_users: state_dir.map_or(0, |state_dir| state_dir.compiles_of_other_users()),
        server_log: "",
        // It has its say at its end.
        relay: None,
        min_hit_rate: None,
        now: auth::now(),
    };
    Ok(match form {
        Form::Table => format!("{}\n", summary::log_text(&report)),
        Form::Markdown => summary::markdown(&report),
        Form::Json => format!("{:#}\n", json(&report, &stats)),
    })
}

/// The mode of a server that this action did not set up: that of the disk, or one of its own.
fn mode_of(cache_location: &str) -> Mode {
    match cache_location.starts_with("Local disk") {
        true => Mode::Local,
        false => Mode::External,
    }
}

/// The statistics as JSON. `format` is 1 as long as nothing that is here goes or changes its
/// meaning; what is new may be added.
///
/// | | |
/// |---|---|
/// | `sccache` | `version`, `mode` (as the output of the action), `cache_location`, `read_only` |
/// | `compiles` | `requests` (calls of a compiler through sccache), `lookups` (`hits` and `misses` together), `errors` (reads from the cache that failed, among the misses), `hit_rate` from 0 to 1 or null, `not_cacheable`, `failed` (as they would have without sccache), `refused` (what sccache could not do, so that the compiler ran), `without_sccache` (since it had failed) |
/// | `languages` | for each, the busiest first: `language`, `hits`, `misses`, `failed`, `hit_rate` |
/// | `writes` | objects written to the cache |
/// | `errors` | what went wrong how often: `read`, `timeout`, `write` |
/// | `mean_seconds` | `read` of a hit, `write` of an object, `compile` of a miss; null where there was none |
/// | `saved_seconds` | the compiler time that hits saved, estimated, or null |
/// | `timed` | compiles through sccache, hits and misses: `compiles`, `seconds` together, and the `slowest` ten, each with `seconds` and `subject` (crate or source file); null where nothing was noted |
/// | `not_cacheable` | why calls could not be cached: `reason` in sccache's words, `count` |
pub fn json(report: &Report<'_>, stats: &Stats) -> Value {
    let seconds = |time: Option<std::time::Duration>| time.map(|time| time.as_secs_f64());
    let times = stats.mean_times();
    let languages = stats.languages();
    let languages = languages.iter().map(language_json);
    let reasons = stats.reasons();
    let reasons = reasons
        .iter()
        .map(|reason| json!({ "reason": reason.reason, "count": reason.count }));
    let errors = stats.error_counts();
    let count = |kind: ErrorKind| {
        let found = errors.iter().find(|error| error.kind == kind);
        found.map_or(0, |error| error.count)
    };
    json!({
        "format": 1,
        "sccache": {
            "version": report.version,
            "mode": report.mode,
            "cache_location": report.cache_location,
            "read_only": report.read_only,
        },
        "compiles": {
            "requests": stats.requests(),
            "lookups": stats.lookups(),
            "hits": stats.hits(),
            "misses": stats.misses(),
            "errors": stats.errors(),
            "hit_rate": stats.hit_rate(),
            "not_cacheable": stats.not_cacheable(),
            "failed": stats.compile_failures(),
            "refused": report.refusals.0,
            "without_sccache": report.uncached,
        },
        "languages": languages.collect::<Vec<_>>(),
        "writes": stats.writes(),
        "errors": {
            "read": count(ErrorKind::Read),
            "timeout": count(ErrorKind::Timeout),
            "write": count(ErrorKind::Write),
        },
        "mean_seconds": {
            "read": seconds(times.read),
            "write": seconds(times.write),
            "compile": seconds(times.compile),
        },
        "saved_seconds": seconds(stats.saved()),
        "not_cacheable": reasons.collect::<Vec<_>>(),
        "timed": report.times.map(times_json),
    })
}

fn times_json(times: &CompileTimes) -> Value {
    let slowest = times.slowest.iter();
    let slowest =
        slowest.map(|(time, subject)| json!({ "seconds": time.as_secs_f64(), "subject": subject }));
    json!({
        "compiles": times.compiles,
        "seconds": times.total.as_secs_f64(),
        "slowest": slowest.collect::<Vec<_>>(),
    })
}

fn language_json(row: &LanguageRow<'_>) -> Value {
    json!({
        "language": row.language,
        "hits": row.hits,
        "misses": row.misses,
        "failed": row.failed,
        "hit_rate": row.hit_rate(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
    }

    #[test]
    fn the_json_of_the_oldest_and_the_newest_sccache_is_as_in_its_fixture() {
        for version in ["0.4.0-pre.6", "0.16.0"] {
            let raw = folder().join("stats").join(format!("{version}.json"));
            let stats = Stats::parse(&std::fs::read_to_string(raw).unwrap()).unwrap();
            let report = Report {
                version,
                mode: Mode::Packed,
                cache_location: "GitHub's cache, in packs",
                read_only: false,
                stats: Ok(&stats),
                raw_stats: "",
                uncached: 2,
                uncached_reason: None,
                gave_up: None,
                refusals: (1, None),
                times: Some(&CompileTimes::read("2000\tserde\n4000\ta.c\n")),
                of_other_users: 0,
                server_log: "",
                relay: None,
                min_hit_rate: None,
                now: 0,
            };
            let text = format!("{:#}\n", json(&report, &stats));
            let path = folder().join("summary").join(format!("{version}.json"));
            if std::env::var_os("UPDATE_FIXTURES").is_some() {
                std::fs::write(&path, &text).unwrap();
            }
            assert_eq!(text, std::fs::read_to_string(&path).unwrap(), "{version}");
        }
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_not_started_to_be_asked() {
        let folder = tempfile::tempdir().unwrap();
        let program = format!("sccache{}", std::env::consts::EXE_SUFFIX);
        let program = folder.path().join(program);
        let touched = folder.path().join("touched");
        std::fs::write(
            &program,
            format!("#!/bin/sh\ntouch {}\n", touched.display()),
        )
        .unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(&program, mode).unwrap();
        }
        let port = crate::sccache::server::free_port().unwrap();
        let environment = Environment::from_iter([
            ("PATH", folder.path().display().to_string()),
            ("SCCACHE_SERVER_PORT", port.to_string()),
        ]);
        let error = run(&environment, Form::Json).await.unwrap_err();
        assert!(
            matches!(error, StatsCommandError::NoServer(at) if at == port),
            "{error}"
        );
        assert!(!touched.exists());
    }
}
