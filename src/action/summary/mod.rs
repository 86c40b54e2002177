//! The texts for a job's users at its end: the job summary in Markdown, a line for an annotation,
//! and the log. Functions of values only.

mod charts;
mod escape;
#[cfg(test)]
mod fixtures;
mod headline;
mod markdown;
mod plain_text;
mod problems;
mod relay_activity;
mod runs;
mod statistics;

pub use headline::headline;
pub use markdown::{markdown, without_sccache};
pub use plain_text::log_text;
pub use problems::{annotation, has_problems, hit_rate_failure};
pub use runs::ran;

use crate::action::mode::Mode;
use crate::clock::Timestamp;
use crate::packs::index::{RUNS_KEPT, RunStats};
use crate::relay::activity::Activity;
use crate::sccache::stats::Stats;
use crate::sccache::times::CompileTimes;

/// How many of a list's items are shown.
const SHOWN: usize = 25;

/// All that is known at the end of a job.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    /// sccache's version.
    pub version: &'a str,
    /// The storage for objects.
    pub mode: Mode,
    /// The cache location in sccache's words.
    pub cache_location: &'a str,
    /// Whether objects were only read.
    pub read_only: bool,
    /// The statistics, or why there are none.
    pub stats: Result<&'a Stats, &'a str>,
    /// The statistics as sccache printed them.
    pub raw_stats: &'a str,
    /// Compiles that ran without sccache because it had failed.
    pub uncached: usize,
    /// The reason of the first of these.
    pub uncached_reason: Option<&'a str>,
    /// The reason why later compiles no longer asked sccache, if they did not.
    pub gave_up: Option<&'a str>,
    /// How many compiles sccache's server could not do, and why it could not do the first.
    pub refusals: (u64, Option<&'a str>),
    /// How long compiles through sccache took.
    pub times: Option<&'a CompileTimes>,
    /// Compiles that ran without sccache because their steps run as another user than the action.
    pub of_other_users: u64,
    /// Compiles of dependencies that did not ask sccache, since the cargo cache keeps them.
    pub dependencies: u64,
    /// The log of sccache's server.
    pub server_log: &'a str,
    /// The relay's activity, or why it is unknown; `None` if there was no relay.
    pub relay: Option<Result<&'a Activity, &'a str>>,
    /// The keeper's activity, if a process other than a relay kept the server.
    pub keeper: Option<&'a Activity>,
    /// The hit rate, in percent, that the user wants at least.
    pub min_hit_rate: Option<f64>,
    /// The time.
    pub now: Timestamp,
}

impl Report<'_> {
    /// How many compiles could have come from a cache: those that sccache looked up, and those of
    /// dependencies that the cargo cache did not have.
    fn compiles(&self) -> u64 {
        self.stats.map_or(0, Stats::lookups) + self.dependencies
    }

    /// The hits among these, from 0 to 1. `None` if there was no such compile.
    fn hit_rate(&self) -> Option<f64> {
        let hits = self.stats.ok()?.hits();
        let compiles = self.compiles();
        (compiles > 0).then(|| hits as f64 / compiles as f64)
    }

    /// The last runs of the job and then this one. It is empty if this run has no hit rate.
    fn runs(&self) -> Vec<RunStats> {
        let this = self
            .stats
            .ok()
            .and_then(|stats| ran(stats, self.dependencies, self.now));
        let (Some(this), Some(Ok(activity))) = (this, self.relay) else {
            return Vec::new();
        };
        let earlier: Vec<RunStats> = activity.earlier_runs.iter().copied().collect();
        let room = earlier.len().saturating_sub(RUNS_KEPT - 1);
        let earlier = earlier.into_iter().skip(room);
        earlier
            .chain([this])
            .filter(|ran| ran.lookups > 0)
            .collect()
    }
}
