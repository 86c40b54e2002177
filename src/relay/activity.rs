//! The counts of a relay's work in a job.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::cache_client::RequestCounts;
use crate::packs::index::Runs;
use crate::relay::cargo::CargoActivity;
use crate::relay::lock;

/// How many entries a minute GitHub takes from a repository (its announcement of January 2026).
pub const UPLOADS_PER_MINUTE: u64 = 200;

/// The counts of a relay's work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Activity {
    /// Objects that sccache asked the relay for and got.
    pub hits: u64,
    /// Objects that it asked for and that a pack has, but that were unavailable in time.
    pub late: u64,
    /// Objects that sccache wrote, or left on its disk.
    pub written: u64,
    /// Objects whose bytes were not those that had been written, and that were not served.
    pub corrupt: u64,
    /// Objects in the packs that the job can read.
    pub known_objects: u64,
    /// Those packs.
    pub known_packs: u64,
    /// Those packs' bytes.
    pub known_bytes: u64,
    /// The results of the last runs of the same job that saved anything: on the same ref, and before these
    /// on its base and the default branch. None in a first run.
    pub earlier_runs: Runs,
    /// Packs downloaded.
    pub fetched_packs: u64,
    /// Packs written.
    pub saved_packs: u64,
    /// The bytes of all entries written.
    pub saved_bytes: u64,
    /// The bytes of the indexes in them.
    pub saved_index_bytes: u64,
    /// Objects that are not in any pack yet.
    pub unsaved: u64,
    /// Uploads beyond GitHub's limit that an entry for each object would have needed.
    pub uploads_avoided: u64,
    /// Whether the cache service takes no entries from this job.
    pub read_only: bool,
    /// How often something went wrong that cost hits, now or in the next job.
    pub errors: u64,
    /// The first of these errors, in words.
    pub first_error: Option<String>,
    /// The first error after which the relay tried again, in words.
    pub first_retried_error: Option<String>,
    /// How often sccache's server died in the job.
    pub server_deaths: u64,
    /// How it died first, in words.
    pub first_server_death: Option<String>,
    /// Why it was not started again, if so.
    pub server_not_restarted: Option<String>,
    /// The counts of the cargo cache, if the job uses it.
    pub cargo: Option<CargoActivity>,
    /// The requests to the cache service.
    pub upstream: RequestCounts,
    /// The most memory the relay had, in bytes; 0 if the system does not say.
    pub peak_memory: u64,
    /// The objects written in the minute that is being counted.
    #[serde(skip)]
    pub(crate) this_minute: u64,
    #[serde(skip)]
    pub(crate) minute: u64,
}

impl Activity {
    /// All requests to the cache service.
    pub fn requests(&self) -> u64 {
        let RequestCounts {
            lookups,
            reservations,
            uploads,
            commits,
            downloads,
            ..
        } = self.upstream;
        lookups + reservations + uploads + commits + downloads
    }

    /// Counts an object that was written `minute` minutes after the relay's start.
    pub fn count_write(&mut self, minute: u64) {
        self.written += 1;
        if minute != self.minute {
            self.minute = minute;
            self.this_minute = 0;
        }
        self.this_minute += 1;
        if self.this_minute > UPLOADS_PER_MINUTE {
            self.uploads_avoided += 1;
        }
    }
}

/// The counts so far. Each part of the relay adds to them.
#[derive(Debug, Default)]
pub(super) struct ActivityLog(Mutex<Activity>);

impl ActivityLog {
    /// A copy of the counts.
    pub(super) fn snapshot(&self) -> Activity {
        lock(&self.0).clone()
    }

    /// Changes the counts.
    pub(super) fn note(&self, change: impl FnOnce(&mut Activity)) {
        change(&mut lock(&self.0));
    }

    /// Notes an error that costs hits, now or in the next job.
    pub(super) fn error(&self, what: &str, error: &dyn std::fmt::Display) {
        self.note(|activity| {
            activity.errors += 1;
            activity
                .first_error
                .get_or_insert_with(|| format!("{what}: {error}"));
        });
    }

    /// Notes an error after which the relay tries again.
    pub(super) fn retry(&self, what: &str, error: &dyn std::fmt::Display) {
        self.note(|activity| {
            activity
                .first_retried_error
                .get_or_insert_with(|| format!("{what}: {error}"));
        });
    }
}

/// The most memory this process had, in bytes (`VmHWM` of Linux); 0 elsewhere.
pub fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB"))
        .and_then(|kilobytes| kilobytes.trim().parse::<u64>().ok())
        .map_or(0, |kilobytes| kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_two_hundred_a_minute_was_spared() {
        let mut activity = Activity::default();
        (0..250).for_each(|_| activity.count_write(0));
        (0..201).for_each(|_| activity.count_write(3));
        assert_eq!((activity.written, activity.uploads_avoided), (451, 51));
    }
}
