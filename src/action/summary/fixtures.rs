//! Makes reports, statistics and runs for the tests, and compares texts with the files in
//! `tests/fixtures`.

use std::time::Duration;

use crate::action::mode::Mode;
use crate::action::summary::Report;
use crate::cache_client::RequestCounts;
use crate::clock::Timestamp;
use crate::packs::index::{RunStats, Runs};
use crate::relay::activity::Activity;
use crate::sccache::stats::Stats;

pub(super) fn report<'a>(stats: Result<&'a Stats, &'a str>, raw_stats: &'a str) -> Report<'a> {
    Report {
        version: "0.16.0",
        mode: Mode::Direct,
        cache_location: "GHA, name: sccache-v0.16.0, prefix: /sccache/",
        read_only: false,
        stats,
        raw_stats,
        uncached: 0,
        uncached_reason: None,
        gave_up: None,
        refusals: (0, None),
        times: None,
        of_other_users: 0,
        dependencies: 0,
        server_log: "",
        relay: None,
        keeper: None,
        min_hit_rate: None,
        now: NOW,
    }
}

pub(super) const NOW: Timestamp = Timestamp::from_seconds(1_800_000_000);

fn folder() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Compares with the file of this name, or writes it if `UPDATE_FIXTURES` is set.
pub(super) fn assert_is_fixture(name: &str, text: &str) {
    let path = folder().join("summary").join(name);
    if std::env::var_os("UPDATE_FIXTURES").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, expected, "{}", path.display());
}

pub(super) fn fixture(name: &str) -> String {
    std::fs::read_to_string(folder().join("stats").join(name)).unwrap()
}

pub(super) fn activity() -> Activity {
    Activity {
        written: 1,
        known_objects: 10_021,
        known_packs: 3,
        known_bytes: 81_500_000,
        fetched_packs: 2,
        saved_packs: 1,
        upstream: RequestCounts {
            lookups: 4,
            reservations: 1,
            uploads: 1,
            commits: 1,
            downloads: 3,
            throttled: 1,
            bytes_up: 4_250,
            bytes_down: 64_123_456,
            ..RequestCounts::default()
        },
        ..Activity::default()
    }
}

pub(super) fn one_run(hits: u64, lookups: u64, ago: u64) -> Runs {
    let ran = RunStats {
        ended: NOW - Duration::from_secs(ago),
        hits,
        lookups,
        saved: None,
    };
    [ran].into_iter().collect()
}

/// The hits of `count` runs a day apart, of 40 look-ups each, and their saved times.
pub(super) fn runs(count: u64) -> Runs {
    let run = |i: u64| RunStats {
        ended: NOW - Duration::from_secs(i * 86_400),
        hits: 40 - (i * 7) % 40,
        lookups: 40,
        saved: (i % 4 != 3).then_some(60 * i),
    };
    (1..=count).map(run).collect()
}

pub(super) fn stats(hits: u64, misses: u64, write_errors: u64, not_cacheable: u64) -> Stats {
    Stats::parse(
        &serde_json::json!({ "stats": {
            "compile_requests": hits + misses + not_cacheable,
            "requests_executed": hits + misses,
            "requests_not_cacheable": not_cacheable,
            "cache_hits": { "counts": { "Rust": hits } },
            "cache_misses": { "counts": { "Rust": misses } },
            "cache_write_errors": write_errors,
        }})
        .to_string(),
    )
    .unwrap()
}
