//! The entries that were looked up last.

use std::sync::atomic::{AtomicU64, Ordering};

use moka::sync::Cache;

use crate::cache_protocol::store::{Entry, EntryName, Query, Scope};

/// How much the entries that were looked up last may take in memory, in bytes.
const LOOKUP_CACHE_SIZE: u64 = 32 << 20;

/// Caches entries that were found by their exact key, in the first scope of the look-up: such a
/// look-up finds the same entry again, until an entry is removed.
pub(super) struct LookupCache {
    entries: Cache<String, (u64, Entry)>,
    /// How often entries went.
    age: AtomicU64,
}

impl Default for LookupCache {
    fn default() -> Self {
        Self {
            entries: Cache::builder()
                .weigher(|key: &String, _: &(u64, Entry)| {
                    u32::try_from(256 + 2 * key.len()).unwrap_or(u32::MAX)
                })
                .max_capacity(LOOKUP_CACHE_SIZE)
                .build(),
            age: AtomicU64::new(0),
        }
    }
}

impl LookupCache {
    fn key(scope: &Scope, version: &str, key: &str) -> String {
        // None of the three contains a NUL.
        [&scope.0, "\0", version, "\0", key].concat()
    }

    pub(super) fn age(&self) -> u64 {
        self.age.load(Ordering::Acquire)
    }

    pub(super) fn get(&self, query: &Query<'_>) -> Option<Entry> {
        let (scope, key) = (query.scopes.first()?, query.keys.first()?);
        let (age, entry) = self.entries.get(&Self::key(scope, query.version, key))?;
        (age == self.age()).then_some(entry)
    }

    /// Caches an entry that existed at that `age`.
    pub(super) fn keep(&self, entry: &Entry, age: u64) {
        let EntryName {
            scope,
            version,
            key,
        } = &entry.name;
        let key = Self::key(scope, version, key);
        self.entries.insert(key, (age, entry.clone()));
    }

    /// Some entries are gone.
    pub(super) fn forget(&self) {
        self.age.fetch_add(1, Ordering::AcqRel);
    }
}
