//! Results, as text.

use std::time::Duration;

use sccache_action::sccache::stats::Stats;
use serde_json::Value;

use crate::job::JobResult;
use crate::upstream::Counts;
use crate::{Mode, json};

/// A column's value for a job, given all jobs.
type Cell = fn(&JobResult, &[JobResult]) -> String;

/// The columns. The columns of [`NAMES`] are text, the others numbers.
const COLUMNS: [(&str, Cell); 19] = [
    ("mode", |job, _| job.mode.name()),
    ("job", |job, _| job.name.to_owned()),
    ("setup s", |job, _| seconds(job.setup)),
    ("build s", |job, _| seconds(job.build)),
    ("report s", |job, _| seconds(job.report)),
    ("sum s", |job, _| seconds(job.total())),
    ("vs disk", |job, all| or_dash(ratio_to_disk(job, all))),
    ("hits", |job, _| {
        or_dash(job.stats.as_ref().map(|stats| stats.hits()))
    }),
    ("misses", |job, _| {
        or_dash(job.stats.as_ref().map(|stats| stats.misses()))
    }),
    ("write errors", |job, _| or_dash(job.write_errors())),
    ("look-ups", |job, _| count(job, |counts| counts.lookups)),
    ("reserved", |job, _| {
        count(job, |counts| counts.reservations)
    }),
    ("uploads", |job, _| count(job, |counts| counts.uploads)),
    ("commits", |job, _| count(job, |counts| counts.commits)),
    ("downloads", |job, _| count(job, |counts| counts.downloads)),
    ("429s", |job, _| count(job, |counts| counts.refused)),
    ("MB up", |job, _| bytes(job, |counts| counts.bytes_up)),
    ("MB down", |job, _| bytes(job, |counts| counts.bytes_down)),
    ("relay MB", |job, _| {
        or_dash(job.relay_peak.map(|kib| megabytes(kib * 1024)))
    }),
];

/// How many columns are text: the mode and the job.
const NAMES: usize = 2;

/// A line for each job, under the names of the columns.
pub fn of(results: &[JobResult]) -> String {
    let head = COLUMNS.map(|(name, _)| name.to_owned());
    let rows = results
        .iter()
        .map(|job| COLUMNS.map(|(_, cell)| cell(job, results)));
    let rows: Vec<[String; COLUMNS.len()]> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max();
    let widths: Vec<usize> = (0..COLUMNS.len()).filter_map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(column, (cell, width))| {
            if column < NAMES {
                format!("{cell:<width$}")
            } else {
                format!("{cell:>width$}")
            }
        });
        let line: Vec<String> = cells.collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A job of the project of this name, as JSON. A value that a mode does not have is null.
pub fn json(project: &str, job: &JobResult) -> Value {
    let seconds = |time: Duration| json::rounded(time.as_secs_f64());
    let stats = job.stats.as_ref();
    let counts = job.counts.as_ref();
    serde_json::json!({
        "project": project,
        "mode": job.mode.name(),
        "job": job.name,
        "setup_seconds": seconds(job.setup),
        "build_seconds": seconds(job.build),
        "report_seconds": seconds(job.report),
        "seconds": seconds(job.total()),
        "hits": stats.map(Stats::hits),
        "misses": stats.map(Stats::misses),
        "write_errors": job.write_errors(),
        "requests": counts.map(Counts::requests),
        "refused": counts.map(|counts| counts.refused),
        "bytes_up": counts.map(|counts| counts.bytes_up),
        "bytes_down": counts.map(|counts| counts.bytes_down),
        "relay_memory_bytes": job.relay_peak.map(|kib| kib * 1024),
    })
}

/// How long the job took, as a multiple of the job of the same name with a disk that stays.
fn ratio_to_disk(job: &JobResult, all: &[JobResult]) -> Option<String> {
    let disk = all
        .iter()
        .find(|other| other.mode == Mode::Disk && other.name == job.name)?;
    let ratio = job.total().as_secs_f64() / disk.total().as_secs_f64();
    Some(format!("{ratio:.2}"))
}

fn count(job: &JobResult, of: fn(&Counts) -> u64) -> String {
    or_dash(job.counts.as_ref().map(of))
}

fn bytes(job: &JobResult, of: fn(&Counts) -> u64) -> String {
    or_dash(job.counts.as_ref().map(of).map(megabytes))
}

fn megabytes(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / 1e6)
}

fn seconds(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64())
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}
