//! What a relay did in a job.

use serde::{Deserialize, Serialize};

use crate::github::cache_client::RequestCounts;
use crate::relay::cargo::CargoActivity;
use crate::store::index::Ran;

/// How many entries a minute GitHub takes from a repository (its announcement of January 2026).
pub const UPLOADS_PER_MINUTE: u64 = 200;

/// What a relay did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Activity {
    /// Objects that sccache asked the relay for and got.
    pub hits: u64,
    /// Objects that it asked for and that a pack has, but that could not be had in time.
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
    /// What came of the last run of the same job that saved anything: on the same ref, else on its
    /// base or the default branch. `None` in a first run.
    pub previous: Option<Ran>,
    /// Packs downloaded.
    pub fetched_packs: u64,
    /// Packs written.
    pub saved_packs: u64,
    /// Objects that are not in any pack yet.
    pub unsaved: u64,
    /// Uploads beyond GitHub's limit that an entry for each object would have been.
    pub spared: u64,
    /// Whether the cache service takes no entries from this job.
    pub read_only: bool,
    /// How often something went wrong that cost hits, now or in the next job.
    pub troubles: u64,
    /// What did first, in words.
    pub first_trouble: Option<String>,
    /// What went wrong first and was tried again, in words.
    pub first_setback: Option<String>,
    /// How often sccache's server died in the job.
    pub server_deaths: u64,
    /// How it did first, in words.
    pub first_server_death: Option<String>,
    /// Why it was not started again, where it was not.
    pub server_not_restarted: Option<String>,
    /// What was done for cargo, where it was asked for.
    pub cargo: Option<CargoActivity>,
    /// What was asked of the cache service.
    pub upstream: RequestCounts,
    /// The most memory the relay had, in bytes; 0 where the system does not tell.
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
    pub fn wrote(&mut self, minute: u64) {
        self.written += 1;
        if minute != self.minute {
            self.minute = minute;
            self.this_minute = 0;
        }
        self.this_minute += 1;
        if self.this_minute > UPLOADS_PER_MINUTE {
            self.spared += 1;
        }
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
        (0..250).for_each(|_| activity.wrote(0));
        (0..201).for_each(|_| activity.wrote(3));
        assert_eq!((activity.written, activity.spared), (451, 51));
    }
}
