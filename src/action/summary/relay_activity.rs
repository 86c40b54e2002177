//! Describes in rows what the relay and the cargo cache did.

use std::fmt::Write as _;
use std::time::Duration;

use crate::format::{group_digits, pluralize, size, time};
use crate::relay::activity::Activity;
use crate::relay::cargo::{CargoActivity, CompileReason};
use crate::sccache::stats::Stats;

/// The relay's activity, as pairs of a label and an amount.
pub(super) fn relay_rows(
    activity: &Activity,
    stats: Option<&Stats>,
) -> Vec<(&'static str, String)> {
    let mut requests = group_digits(activity.requests());
    if let Some(stats) = stats {
        let alone = requests_of_single_entries(stats);
        if alone > activity.requests() {
            let _ = write!(requests, " instead of {}", group_digits(alone));
        }
    }
    let upstream = &activity.upstream;
    let mut rows = vec![
        ("Requests to the cache service", requests),
        (
            "Packs read and written",
            format!(
                "{} and {}",
                group_digits(activity.fetched_packs),
                group_digits(activity.saved_packs)
            ),
        ),
        (
            "Received and sent",
            format!(
                "{} and {}",
                size(upstream.bytes_down),
                size(upstream.bytes_up)
            ),
        ),
        (
            "In the cache at the start",
            format!(
                "{} in {}, {}",
                pluralize(activity.known_objects, "object"),
                pluralize(activity.known_packs, "pack"),
                size(activity.known_bytes)
            ),
        ),
    ];
    for (what, count) in [
        (
            "Uploads avoided beyond GitHub's 200 a minute",
            activity.uploads_avoided,
        ),
        ("Rate-limited, then retried", upstream.throttled),
        ("Timed out", activity.late),
        ("Objects not saved", activity.unsaved),
    ] {
        if count > 0 {
            rows.push((what, group_digits(count)));
        }
    }
    if let Some(cargo) = &activity.cargo {
        rows.push(("Cargo cache", cargo_in_words(cargo)));
    }
    if activity.read_only {
        rows.push(("Saved", "nothing: the cache is read-only".to_owned()));
    }
    rows
}

/// The cargo cache's activity.
fn cargo_in_words(cargo: &CargoActivity) -> String {
    let milliseconds = |milliseconds| time(Duration::from_millis(milliseconds));
    let mut text = format!(
        "{} restored ({}, {}, {} in {})",
        pluralize(cargo.restored_dependencies, "dependency"),
        pluralize(cargo.restored_units, "compiled unit"),
        pluralize(cargo.restored_crates, "crate"),
        size(cargo.restored_bytes),
        milliseconds(cargo.restore_milliseconds),
    );
    let compiled: u64 = cargo.compiled.iter().map(|(_, count)| count).sum();
    if compiled > 0 {
        let why = |(why, count): &(CompileReason, u64)| {
            let why = why_compiled_in_words(*why);
            match cargo.compiled.len() {
                1 => why.to_owned(),
                _ => format!("{} {why}", group_digits(*count)),
            }
        };
        let whys: Vec<String> = cargo.compiled.iter().map(why).collect();
        let _ = write!(
            text,
            "; {} compiled: {}",
            group_digits(compiled),
            whys.join(", ")
        );
    }
    let _ = match cargo.new_parts {
        0 => write!(text, "; nothing new to save"),
        new => write!(
            text,
            "; {} to save, {}",
            pluralize(new, "new part"),
            size(cargo.new_bytes)
        ),
    };
    text
}

/// Why dependencies were compiled.
fn why_compiled_in_words(why: CompileReason) -> &'static str {
    match why {
        CompileReason::FirstRun => "no earlier run has left any",
        CompileReason::OtherBuildKey => {
            "what earlier runs left is for another compiler, system or settings"
        }
        CompileReason::New => "new in the lockfile, or compiled from what is",
        CompileReason::Path => "tied to the path of another checkout",
        CompileReason::Missed => "could not be restored",
        CompileReason::Changed => "restored, and wanted with other features, flags or profile",
    }
}

/// How many requests an entry for each object takes: two for a hit (its address, then the object
/// itself), one for a miss, three for an object that is written.
fn requests_of_single_entries(stats: &Stats) -> u64 {
    2 * stats.hits() + stats.misses() + 3 * stats.writes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::mode::Mode;
    use crate::action::summary::fixtures::{activity, assert_is_fixture, fixture, report, runs};
    use crate::action::summary::{Report, has_problems, log_text, markdown};

    #[test]
    fn what_the_relay_did_is_said_beside_what_an_entry_for_each_object_would_take() {
        let raw = fixture("0.16.0.json");
        let stats = Stats::parse(&raw).unwrap();
        let activity = Activity {
            earlier_runs: runs(11),
            ..activity()
        };
        let report = Report {
            mode: Mode::Packed,
            cache_location: "GitHub's cache, in packs",
            relay: Some(Ok(&activity)),
            ..report(Ok(&stats), &raw)
        };
        assert!(!has_problems(&report));
        assert_is_fixture("packed.md", &markdown(&report));
        assert_is_fixture("packed.txt", &log_text(&report));
    }
}
