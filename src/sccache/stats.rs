//! The statistics that `sccache --show-stats --stats-format json` prints.
//!
//! Versions differ: 0.4.0-pre.6 (Debian's) names no version, 0.7 added counts by compiler, 0.9 the number
//! of compilations, 0.14 the base directories. A count that a version does not have is `None` here rather
//! than 0, and this reader ignores fields that it does not know.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::format::pluralize;

/// sccache's statistics of itself and its cache.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Stats {
    #[serde(rename = "stats")]
    counts: Counts,
    /// The location of the objects, in sccache's words.
    #[serde(default)]
    pub cache_location: Option<String>,
    /// The size of the cache, in bytes; local disk only.
    #[serde(default)]
    pub cache_size: Option<u64>,
    /// The size limit of the cache, in bytes; local disk only.
    #[serde(default)]
    pub max_cache_size: Option<u64>,
    /// The version of the client that printed this (0.4.0 and newer).
    #[serde(default)]
    pub version: Option<String>,
    /// How many compiles failed, if somebody counted them; see [`Stats::set_failures`].
    #[serde(skip)]
    failures: Option<u64>,
}

/// The counters. Each counts since the server started or since they were set to zero.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
struct Counts {
    compile_requests: u64,
    requests_executed: u64,
    #[serde(default)]
    requests_unsupported_compiler: u64,
    #[serde(default)]
    requests_not_compile: u64,
    #[serde(default)]
    requests_not_cacheable: u64,
    #[serde(default)]
    cache_errors: PerLanguage,
    #[serde(default)]
    cache_hits: PerLanguage,
    #[serde(default)]
    cache_misses: PerLanguage,
    #[serde(default)]
    cache_timeouts: u64,
    #[serde(default)]
    cache_read_errors: u64,
    #[serde(default)]
    cache_write_errors: u64,
    #[serde(default)]
    cache_writes: u64,
    #[serde(default)]
    cache_write_duration: Elapsed,
    #[serde(default)]
    cache_read_hit_duration: Elapsed,
    #[serde(default)]
    compiler_write_duration: Elapsed,
    #[serde(default)]
    compilations: Option<u64>,
    #[serde(default)]
    compile_fails: u64,
    #[serde(default)]
    forced_recaches: u64,
    #[serde(default)]
    non_cacheable_compilations: u64,
    #[serde(default)]
    not_cached: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
struct PerLanguage {
    #[serde(default)]
    counts: BTreeMap<String, u64>,
}

impl PerLanguage {
    fn total(&self) -> u64 {
        self.counts
            .values()
            .fold(0, |sum, n| sum.saturating_add(*n))
    }

    fn of(&self, language: &str) -> u64 {
        self.counts.get(language).copied().unwrap_or(0)
    }
}

/// serde's form of a [`Duration`], but one that does not fail on nanoseconds that overflow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Elapsed(Duration);

impl<'de> Deserialize<'de> for Elapsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct SecondsAndNanos {
            secs: u64,
            nanos: u32,
        }
        let parts = SecondsAndNanos::deserialize(deserializer)?;
        let seconds = Duration::from_secs(parts.secs);
        let total = seconds.saturating_add(Duration::from_nanos(u64::from(parts.nanos)));
        Ok(Self(total))
    }
}

/// Text that is not statistics.
#[derive(Debug, thiserror::Error)]
#[error("cannot read sccache's statistics: {0}")]
pub struct StatsError(#[from] serde_json::Error);

/// The counts of one language.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LanguageRow<'a> {
    /// The language in sccache's words: `C/C++`, `Rust`, `CUDA`, `Assembler`.
    pub language: &'a str,
    /// Compiles answered from the cache.
    pub hits: u64,
    /// Compiles that were not in the cache.
    pub misses: u64,
    /// Compiles that failed before they were looked up: the compiler could not preprocess them.
    pub failed: u64,
}

impl LanguageRow<'_> {
    /// Hits, misses and failures.
    pub fn total(&self) -> u64 {
        self.lookups().saturating_add(self.failed)
    }

    fn lookups(&self) -> u64 {
        self.hits.saturating_add(self.misses)
    }

    /// See [`Stats::hit_rate`].
    pub fn hit_rate(&self) -> Option<f64> {
        ratio(self.hits, self.lookups())
    }
}

/// The time that one of something took, on average.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MeanTimes {
    /// Reading an object from the cache.
    pub read: Option<Duration>,
    /// Writing one to it.
    pub write: Option<Duration>,
    /// Compiling what was not in it.
    pub compile: Option<Duration>,
}

/// The kinds of cache errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A failed read from the cache.
    Read,
    /// A read from the cache that took too long.
    Timeout,
    /// A failed write to the cache.
    Write,
}

impl ErrorKind {
    /// That it happened so often, as a clause: `1 cache write failed`.
    pub fn counted(self, count: u64) -> String {
        let (what, became) = match self {
            Self::Read => ("cache read", "failed"),
            Self::Timeout => ("cache read", "timed out"),
            Self::Write => ("cache write", "failed"),
        };
        format!("{} {became}", pluralize(count, what))
    }
}

/// A kind of error, and how often it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorCount {
    /// The kind.
    pub kind: ErrorKind,
    /// How often.
    pub count: u64,
}

/// Why calls were not cacheable, and how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason<'a> {
    /// sccache's own word for it.
    pub reason: &'a str,
    /// How often.
    pub count: u64,
    /// Its meaning and its fix, or `None` if unknown.
    pub explanation: Option<&'static str>,
}

impl Stats {
    /// Parses sccache's output.
    ///
    /// # Errors
    /// [`StatsError`] if it is not the JSON of statistics.
    pub fn parse(json: &str) -> Result<Self, StatsError> {
        Ok(serde_json::from_str(json)?)
    }

    /// Calls of sccache with a compiler, whatever their outcome.
    pub fn requests(&self) -> u64 {
        self.counts.compile_requests
    }

    /// Compiles that sccache took on: those it looked up, and those that failed.
    pub fn executed(&self) -> u64 {
        self.counts.requests_executed
    }

    /// Compiles answered from the cache.
    pub fn hits(&self) -> u64 {
        self.counts.cache_hits.total()
    }

    /// Compiles that were not in the cache.
    pub fn misses(&self) -> u64 {
        self.counts.cache_misses.total()
    }

    /// Sets how many compiles failed, as the wrapper counted them. sccache counts these, under
    /// `compile_fails` and `cache_errors`, together with failed reads from the cache
    /// (`MissType::CacheReadError` in its `src/server.rs`), so the one number is needed to get the other.
    pub fn set_failures(&mut self, failures: u64) {
        self.failures = Some(failures);
    }

    /// All failures that sccache counts, of any kind.
    fn all_failures(&self) -> u64 {
        let of_cache = self.counts.cache_errors.total();
        self.counts.compile_fails.saturating_add(of_cache)
    }

    /// Reads from the cache that failed. Each such compile is a miss too.
    fn read_errors(&self) -> u64 {
        let named = self.counts.cache_read_errors;
        let left = self.failures.map_or(0, |failures| {
            let left = self.all_failures().saturating_sub(failures);
            left.min(self.misses())
                .min(self.counts.cache_errors.total())
        });
        named.max(left)
    }

    /// Reads from the cache that failed or took too long. These compiles are among the misses.
    pub fn errors(&self) -> u64 {
        self.read_errors()
            .saturating_add(self.counts.cache_timeouts)
    }

    /// Compiles that sccache looked up: hits and misses.
    pub fn lookups(&self) -> u64 {
        self.hits().saturating_add(self.misses())
    }

    /// Hits among [`Stats::lookups`], from 0 to 1; `None` if nothing was looked up. Compiles that failed
    /// before are not in it: configure scripts have compiles that must fail.
    pub fn hit_rate(&self) -> Option<f64> {
        ratio(self.hits(), self.lookups())
    }

    /// Calls that cannot be cached, for the reasons that [`Stats::reasons`] lists.
    pub fn not_cacheable(&self) -> u64 {
        self.counts.requests_not_cacheable
    }

    /// Calls that compile nothing, such as `--version` or linking.
    pub fn not_compiles(&self) -> u64 {
        self.counts.requests_not_compile
    }

    /// Calls of a compiler that sccache does not know.
    pub fn unsupported_compiler(&self) -> u64 {
        self.counts.requests_unsupported_compiler
    }

    /// Compiles that failed as they would have without sccache. Its cache errors are compiles that could
    /// not be preprocessed, whose output is the compiler's own, and failed reads. The wrapper notes
    /// sccache's own failures.
    pub fn compile_failures(&self) -> u64 {
        self.all_failures().saturating_sub(self.read_errors())
    }

    /// Compiles whose object was written again because `SCCACHE_RECACHE` asked for it.
    pub fn forced_recaches(&self) -> u64 {
        self.counts.forced_recaches
    }

    /// Objects written to the cache.
    pub fn writes(&self) -> u64 {
        self.counts.cache_writes
    }

    /// Objects that are still on their way to the cache: missed and compiled, but neither written
    /// nor failed to be. An estimate, as sccache does not count it: a miss whose compile turned out
    /// not to be cacheable stays in it for good.
    pub fn pending_writes(&self) -> u64 {
        let settled = [
            self.counts.cache_writes,
            self.counts.cache_write_errors,
            self.counts.non_cacheable_compilations,
        ];
        settled.into_iter().fold(self.misses(), u64::saturating_sub)
    }

    /// The counts by language, the busiest first.
    pub fn languages(&self) -> Vec<LanguageRow<'_>> {
        let counts = &self.counts;
        let all = [
            &counts.cache_hits,
            &counts.cache_misses,
            &counts.cache_errors,
        ];
        let names: BTreeSet<&str> = all
            .iter()
            .flat_map(|each| each.counts.keys().map(String::as_str))
            .collect();
        let mut rows: Vec<LanguageRow<'_>> = names
            .into_iter()
            .map(|language| LanguageRow {
                language,
                hits: counts.cache_hits.of(language),
                misses: counts.cache_misses.of(language),
                failed: counts.cache_errors.of(language),
            })
            .filter(|row| row.total() > 0)
            .collect();
        rows.sort_by_key(|row| std::cmp::Reverse(row.total()));
        rows
    }

    /// The average times.
    pub fn mean_times(&self) -> MeanTimes {
        let counts = &self.counts;
        MeanTimes {
            read: mean(counts.cache_read_hit_duration, self.hits()),
            write: mean(counts.cache_write_duration, counts.cache_writes),
            // Before 0.9 only compiles whose object was written were timed.
            compile: mean(
                counts.compiler_write_duration,
                counts.compilations.unwrap_or(counts.cache_writes),
            ),
        }
    }

    /// The compiler time that hits saved, if each had taken as long as the average compile that was not in
    /// the cache. An estimate, and `None` if there was no compile to measure.
    pub fn saved(&self) -> Option<Duration> {
        let times = self.mean_times();
        let saved = times.compile?.saturating_sub(times.read?);
        let nanoseconds = saved.as_nanos().checked_mul(u128::from(self.hits()))?;
        u64::try_from(nanoseconds).ok().map(Duration::from_nanos)
    }

    /// The errors that happened, by kind.
    pub fn error_counts(&self) -> Vec<ErrorCount> {
        let counts = &self.counts;
        [
            (ErrorKind::Read, self.read_errors()),
            (ErrorKind::Timeout, counts.cache_timeouts),
            (ErrorKind::Write, counts.cache_write_errors),
        ]
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(kind, count)| ErrorCount { kind, count })
        .collect()
    }

    /// Why calls were not cacheable, the most frequent first.
    pub fn reasons(&self) -> Vec<Reason<'_>> {
        let mut reasons: Vec<Reason<'_>> = self
            .counts
            .not_cached
            .iter()
            .map(|(reason, count)| Reason {
                reason,
                count: *count,
                explanation: explanation(reason),
            })
            .collect();
        reasons.sort_by_key(|reason| std::cmp::Reverse(reason.count));
        reasons
    }
}

fn ratio(part: u64, whole: u64) -> Option<f64> {
    // Counters stay far below the 2^53 from which on a float is inexact.
    #[allow(clippy::cast_precision_loss)]
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn mean(total: Elapsed, count: u64) -> Option<Duration> {
    let count = u128::from(count);
    let nanoseconds = total.0.as_nanos().checked_div(count)?;
    u64::try_from(nanoseconds).ok().map(Duration::from_nanos)
}

/// The meanings of sccache's reasons (`cannot_cache!` in `src/compiler/` of sccache; those of Rust and gcc
/// were checked by calling sccache 0.16 so that it gives them).
fn explanation(reason: &str) -> Option<&'static str> {
    // sccache 0.19 names the crate types: `crate-type (bin)`.
    let kind = reason.split_once(" (").map_or(reason, |(kind, _)| kind);
    Some(match kind {
        "crate-type" => {
            "Rust binaries, tests, proc macros and dynamic libraries: they are linked, and what the \
             linker makes is not cached"
        }
        "incremental" => {
            "compiled incrementally, which cannot be cached: set CARGO_INCREMENTAL=0, and \
             `incremental = false` in profiles that switch it on"
        }
        "missing input" => {
            "calls without a source file, such as cargo asking rustc for its version"
        }
        "-" => "source from standard input, as cargo uses to ask rustc about the target",
        "no input file" => "compiler calls without a source file",
        "multiple input files" => "several source files in one call: compile each in its own",
        "-o" => "rustc called with -o: use --out-dir",
        "unsupported --emit" => {
            "rustc asked for output that sccache does not keep, such as assembly"
        }
        "more than one --emit" => "rustc called with --emit more than once",
        "missing crate_name" => "rustc called without --crate-name",
        "missing output_dir" => "rustc called without --out-dir",
        "-E" => "preprocessing only, as configure scripts do",
        "-M" | "-MM" => "listing dependencies only",
        "-x" => "a source language given with -x that sccache does not cache",
        "-fprofile-use" | "-fprofile-generate" | "-fprofile-instr-use" => {
            "built by or for a profile, which sccache cannot tell apart"
        }
        "-fsyntax-only" => "checked without being compiled",
        "-save-temps" => "asked to keep intermediate files, which are not cached",
        "unknown source language" => "a source file whose name does not tell its language",
        "@" => "arguments from a response file that cannot be read",
        "output to nul" => "output thrown away, as configure scripts do",
        "shared pdb" | "pdb" | "/Zi" => {
            "debug information in a file shared by several compiles: use /Z7"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fixture(version: &str) -> Stats {
        let path = format!(
            "{}/tests/fixtures/stats/{version}.json",
            env!("CARGO_MANIFEST_DIR")
        );
        Stats::parse(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    /// Every version ran the same calls (`tests/fixtures/stats/make.sh`).
    const VERSIONS: [&str; 11] = [
        "0.4.0-pre.6",
        "0.4.0",
        "0.5.3",
        "0.7.7",
        "0.8.2",
        "0.9.1",
        "0.10.0",
        "0.14.0",
        "0.15.0",
        "0.16.0",
        "0.19.0",
    ];

    #[test]
    fn a_reason_means_the_same_in_each_version() {
        for (version, reason) in [("0.16.0", "crate-type"), ("0.19.0", "crate-type (bin)")] {
            let stats = fixture(version);
            let reasons = stats.reasons();
            let found = reasons.iter().find(|found| found.reason == reason).unwrap();
            let explanation = found.explanation.unwrap();
            assert!(
                explanation.starts_with("Rust binaries"),
                "{version} {explanation}"
            );
        }
    }

    #[test]
    fn the_statistics_of_every_version_say_the_same_of_the_same_calls() {
        for version in VERSIONS {
            let stats = fixture(version);
            let row = |language: &str| {
                let rows = stats.languages();
                let row = rows.iter().find(|row| row.language == language);
                row.map(|row| (row.hits, row.misses, row.failed))
            };
            assert_eq!(stats.requests(), 24, "{version}");
            assert_eq!(row("C/C++"), Some((3, 5, 0)), "{version}");
            assert_eq!(row("Rust"), Some((1, 1, 0)), "{version}");
            assert_eq!(stats.compile_failures(), 1, "{version}");
            assert_eq!(stats.pending_writes(), 0, "{version}");
            assert!(stats.error_counts().is_empty(), "{version}");
            let times = stats.mean_times();
            assert!(times.compile > times.read, "{version} {times:?}");
            assert!(stats.saved() > Some(Duration::ZERO), "{version}");
            let location = stats.cache_location.unwrap();
            assert!(location.starts_with("Local disk"), "{version} {location}");
            let expected = (version != "0.4.0-pre.6").then(|| version.to_owned());
            assert_eq!(stats.version, expected);
        }
    }

    #[test]
    fn every_reason_that_a_version_gave_is_explained() {
        for version in VERSIONS {
            let stats = fixture(version);
            let sum: u64 = stats.reasons().iter().map(|reason| reason.count).sum();
            assert_eq!(sum, stats.not_cacheable(), "{version}");
            for reason in stats.reasons() {
                assert!(reason.explanation.is_some(), "{version} {reason:?}");
            }
        }
    }

    #[test]
    fn what_fails_does_not_count_against_the_rate_and_nothing_looked_up_has_none() {
        let json = r#"{"stats": {"compile_requests": 9, "requests_executed": 8,
            "cache_hits": {"counts": {"Rust": 4}}, "cache_misses": {"counts": {"C/C++": 3}},
            "cache_errors": {"counts": {"Rust": 1}}, "cache_write_errors": 2}}"#;
        let stats = Stats::parse(json).unwrap();
        assert_eq!(stats.hit_rate(), Some(4.0 / 7.0));
        assert_eq!(stats.languages()[0].language, "Rust");
        assert_eq!(stats.languages()[0].hit_rate(), Some(1.0));
        assert_eq!(stats.compile_failures(), 1);
        assert_eq!(stats.error_counts().len(), 1);
        assert_eq!(stats.pending_writes(), 1);
        assert_eq!(stats.saved(), None);
        let none = r#"{"stats": {"compile_requests": 0, "requests_executed": 0}}"#;
        assert_eq!(Stats::parse(none).unwrap().hit_rate(), None);
    }

    #[test]
    fn reads_that_failed_are_what_is_left_of_sccaches_errors_without_the_compiles_that_failed() {
        let stats = |failures: Option<u64>, misses: u64, errors: u64, fails: u64| {
            let json = serde_json::json!({ "stats": {
                "compile_requests": 9, "requests_executed": 9, "compile_fails": fails,
                "cache_misses": { "counts": { "C/C++": misses } },
                "cache_errors": { "counts": { "C/C++": errors } },
            }});
            let mut stats = Stats::parse(&json.to_string()).unwrap();
            if let Some(failures) = failures {
                stats.set_failures(failures);
            }
            (stats.errors(), stats.compile_failures())
        };
        assert_eq!(stats(Some(2), 6, 8, 0), (6, 2));
        assert_eq!(stats(Some(3), 6, 2, 1), (0, 3));
        assert_eq!(stats(Some(9), 6, 2, 1), (0, 3));
        // Compiles that failed past the wrapper are no reads.
        assert_eq!(stats(Some(0), 0, 2, 1), (0, 3));
        assert_eq!(stats(Some(0), 6, 0, 4), (0, 4));
        assert_eq!(stats(None, 6, 8, 0), (0, 8));
    }

    #[test]
    fn what_is_not_statistics_is_an_error() {
        for text in [
            "",
            "{}",
            "null",
            "{\"stats\": {\"compile_requests\": -1}}",
            "{\"st",
        ] {
            assert!(Stats::parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_counter_however_large_breaks_the_sums(
            numbers in prop::collection::vec(any::<u64>(), 8),
            nanos in any::<u32>(),
        ) {
            let json = serde_json::json!({ "stats": {
                "compile_requests": numbers[0],
                "requests_executed": numbers[1],
                "cache_hits": { "counts": { "A": numbers[2], "B": numbers[3] } },
                "cache_misses": { "counts": { "B": numbers[4] } },
                "cache_errors": { "counts": { "C": numbers[5] } },
                "compiler_write_duration": { "secs": numbers[6], "nanos": nanos },
                "cache_read_hit_duration": { "secs": 0, "nanos": 1 },
                "compilations": numbers[7],
            }});
            let stats = Stats::parse(&json.to_string()).unwrap();
            let rate = stats.hit_rate();
            prop_assert!(rate.is_none_or(|rate| (0.0..=1.0).contains(&rate)));
            let _ = (stats.saved(), stats.languages(), stats.pending_writes());
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in ".{0,200}") {
            let _ = Stats::parse(&text);
        }
    }
}
