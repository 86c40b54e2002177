//! Collects the uses of entries, and records them in the database from time to time.

use std::time::Duration;

use tracing::warn;

use crate::cache_protocol::ids::EntryId;
use crate::clock::Timestamp;
use crate::serve::entry_store::{EntryStore, lock};

/// How often the uses of entries are recorded in the database. A service that is killed loses those
/// of this time, which only affects the order of eviction.
pub(super) const RECORD_USES_EVERY: Duration = Duration::from_secs(30);

/// How many uses wait in memory at most.
const MAX_RECENT_USES: usize = 10_000;

/// How many uses are recorded in one transaction.
const USES_PER_TRANSACTION: usize = 250;

impl EntryStore {
    /// Records the uses of entries and the time in the database.
    pub(super) async fn record_uses(&self) {
        match self.inner.catalog.record_time(self.inner.time.now()).await {
            Ok(time) => self.inner.time.catch_up(time),
            Err(error) => warn!(cause = error.cause(), "cannot record the time"),
        }
        let used: Vec<(EntryId, Timestamp)> = lock(&self.inner.recent_uses).drain().collect();
        if used.is_empty() {
            return;
        }
        // Some at a time, since commits wait for it.
        for used in used.chunks(USES_PER_TRANSACTION) {
            if let Err(error) = self.inner.catalog.record_use(used).await {
                // The next use would record them; no entry is lost for it.
                warn!(
                    cause = error.cause(),
                    "cannot record when entries were used"
                );
                return;
            }
        }
    }

    pub(super) fn used(&self, entry: EntryId) {
        let now = self.inner.time.now();
        let mut recent_uses = lock(&self.inner.recent_uses);
        if recent_uses.len() < MAX_RECENT_USES || recent_uses.contains_key(&entry) {
            recent_uses.insert(entry, now);
        }
    }
}
