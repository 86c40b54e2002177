//! The command `stats`: prints the statistics of this job's sccache server so far: as a table, as
//! the Markdown of the job summary, or as JSON in a stable format.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::action::mode::Mode;
use crate::action::state::ExistingSetup;
use crate::action::summary::{self, Report};
use crate::clock::Timestamp;
use crate::runner::environment::Environment;
use crate::sccache::server::{Server, ServerError};
use crate::sccache::state_dir::sccache_on_path;
use crate::sccache::stats::{ErrorKind, LanguageRow, Stats, StatsError};
use crate::sccache::times::CompileTimes;

/// The default port of a server (`DEFAULT_PORT` in `src/config.rs` of sccache).
pub const DEFAULT_PORT: u16 = 4226;

/// The format of the statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputFormat {
    /// A table for a person.
    Table,
    /// The Markdown of the job summary.
    Markdown,
    /// The JSON that [`json()`] describes.
    Json,
}

/// Why there are no statistics.
#[derive(Debug, thiserror::Error)]
pub enum StatsCommandError {
    /// There is no sccache.
    #[error("no sccache: this job has not set it up, and it is not on PATH")]
    NoSccache,
    /// No server listens.
    #[error("no sccache server listens on port {0} of this machine")]
    NoServer(u16),
    /// The server or its client failed.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The answer is not understood.
    #[error(transparent)]
    Stats(#[from] StatsError),
}

/// The sccache and the port that a step of this job would use.
pub(crate) fn server_of(
    environment: &Environment,
    found: Option<&ExistingSetup>,
) -> Option<Server> {
    let sccache: Option<PathBuf> = found
        .and_then(|found| found.state_dir.sccache())
        .map(|sccache| sccache.path)
        .or_else(|| sccache_on_path(environment));
    Some(Server::new(sccache?, port(environment)))
}

fn port(environment: &Environment) -> u16 {
    environment
        .get("SCCACHE_SERVER_PORT")
        .and_then(|port| port.parse().ok())
        .unwrap_or(DEFAULT_PORT)
}

/// Runs the command. Returns the text to print.
///
/// # Errors
/// Fails if no server answers. The command starts none.
pub async fn run(
    environment: &Environment,
    format: OutputFormat,
) -> Result<String, StatsCommandError> {
    let found = ExistingSetup::of(environment);
    let server = server_of(environment, found.as_ref()).ok_or(StatsCommandError::NoSccache)?;
    if !server.is_listening().await {
        return Err(StatsCommandError::NoServer(server.port()));
    }
    let raw = server.statistics().await?;
    let mut stats = Stats::parse(&raw)?;
    let location = stats.cache_location.clone().unwrap_or_default();
    let version = stats.version.clone().unwrap_or_default();
    let about = found.as_ref().and_then(|found| found.about.as_ref());
    let state_dir = found.as_ref().map(|found| &found.state_dir);
    if let Some(state_dir) = state_dir {
        stats.set_failures(state_dir.failed_compiles());
    }
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
        dependencies: state_dir.map_or(0, |its| its.compiled_dependencies().len() as u64),
        server_log: "",
        // The relay reports at its end.
        relay: None,
        keeper: None,
        min_hit_rate: None,
        now: Timestamp::now(),
    };
    Ok(match format {
        OutputFormat::Table => format!("{}\n", summary::log_text(&report)),
        OutputFormat::Markdown => summary::markdown(&report),
        OutputFormat::Json => format!("{:#}\n", json(&report, &stats)),
    })
}

/// The mode of a server that this action did not set up: local if it keeps objects on the disk,
/// else external.
fn mode_of(cache_location: &str) -> Mode {
    if cache_location.starts_with("Local disk") {
        Mode::Local
    } else {
        Mode::External
    }
}

#[doc = include_str!("../../docs/stats.md")]
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
            "dependencies": report.dependencies,
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
                dependencies: 0,
                server_log: "",
                relay: None,
                keeper: None,
                min_hit_rate: None,
                now: Timestamp::UNIX_EPOCH,
            };
            let text = format!("{:#}\n", json(&report, &stats));
            let path = folder().join("summary").join(format!("{version}.json"));
            if std::env::var_os("UPDATE_FIXTURES").is_some() {
                std::fs::write(&path, &text).unwrap();
            }
            assert_eq!(text, std::fs::read_to_string(&path).unwrap(), "{version}");
        }
    }

    fn names_in(value: &Value, names: &mut std::collections::BTreeSet<String>) {
        match value {
            Value::Object(members) => {
                for (name, member) in members {
                    names.insert(name.clone());
                    names_in(member, names);
                }
            }
            Value::Array(members) => members.iter().for_each(|member| names_in(member, names)),
            _ => {}
        }
    }

    #[test]
    fn the_document_names_what_is_in_the_json_and_nothing_else() {
        let fixture = folder().join("summary/0.16.0.json");
        let fixture = std::fs::read_to_string(fixture).unwrap();
        let mut names = std::collections::BTreeSet::new();
        names_in(&serde_json::from_str(&fixture).unwrap(), &mut names);
        let document = include_str!("../../docs/stats.md");
        let rows = document.lines().filter(|line| line.starts_with("| `"));
        let told: std::collections::BTreeSet<String> = rows
            .flat_map(|row| row.split('`').skip(1).step_by(2))
            .map(str::to_owned)
            .collect();
        assert_eq!(told, names);
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
        let error = run(&environment, OutputFormat::Json).await.unwrap_err();
        assert!(
            matches!(error, StatsCommandError::NoServer(at) if at == port),
            "{error}"
        );
        assert!(!touched.exists());
    }
}
