//! Sweeps: removes what is too old or too much, and deletes the blobs that nothing names.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use crate::cache_protocol::store::StoreError;
use crate::clock::Timestamp;
use crate::serve::catalog::{Compaction, Moments, Removed};
use crate::serve::entry_store::uses::RECORD_USES_EVERY;
use crate::serve::entry_store::{EntryStore, StoreInner};
use crate::serve::reserved_space::{self, RESERVE};
use crate::serve::shared_fetch;

/// How long a blob stays that no entry has any more: a client may be reading it.
const GARBAGE_STAYS: Duration = Duration::from_secs(5 * 60);

/// How much of a segment of small contents is dead when a sweep empties it, as a percentage of what it takes
/// of the disk. After a sweep the segments take at most about half as much again as the contents in them. A
/// content is rarely copied: the oldest segments die as a whole, and Linux frees the room of dead contents
/// itself.
const DEAD_PERCENT: u64 = 34;

/// How much room a sweep of a full disk makes before all else, in bytes.
const FIRST_ROOM: u64 = 4 * RESERVE;

/// An eviction removes this fraction of the limit in addition (1/20), so that not each upload
/// evicts.
pub(super) const EVICT_AHEAD: u64 = 20;

/// The result of a sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Entries that expired.
    pub expired: u64,
    /// Entries that were evicted.
    pub evicted: u64,
    /// Uploads that were abandoned.
    pub abandoned: u64,
    /// Blobs that were deleted.
    pub deleted: u64,
}

impl EntryStore {
    /// Sweeps for ever: at once, each `every`, and when much was received; and persists uploads
    /// that stay in memory.
    pub async fn run_sweeps(&self, every: Duration) {
        // Two tasks, since a sweep may take long.
        tokio::join!(self.sweep_periodically(every), self.persist_periodically());
    }

    async fn sweep_periodically(&self, every: Duration) {
        let mut touch = tokio::time::interval(RECORD_USES_EVERY);
        let mut sweep = tokio::time::interval(every);
        loop {
            tokio::select! {
                _ = touch.tick() => self.record_uses().await,
                _ = sweep.tick() => self.sweep_and_log().await,
                () = self.inner.sweep_now.notified() => self.sweep_and_log().await,
            }
        }
    }

    async fn sweep_and_log(&self) {
        match self.sweep().await {
            Ok(SweepReport {
                expired: 0,
                evicted: 0,
                abandoned: 0,
                ..
            }) => {}
            Ok(SweepReport {
                expired,
                evicted,
                abandoned,
                deleted,
            }) => info!(expired, evicted, abandoned, deleted, "swept"),
            Err(error) if reserved_space::is_full(&error) => self.make_room(Instant::now()).await,
            Err(error) => error!(cause = error.cause(), "the sweep failed"),
        }
    }

    /// Removes entries that exceed a limit or are too old, and abandoned uploads, and deletes
    /// unused blobs.
    ///
    /// # Errors
    /// Errors of the database and of the storage of blobs. The next sweep does the rest.
    pub async fn sweep(&self) -> Result<SweepReport, StoreError> {
        self.sweep_with(Urgency::Usual).await
    }

    pub(super) async fn sweep_with(&self, urgency: Urgency) -> Result<SweepReport, StoreError> {
        let StoreInner {
            catalog, limits, ..
        } = &*self.inner;
        let mut sweep = SweepReport::default();
        if urgency == Urgency::Full {
            sweep.evicted = self.make_first_room(&mut sweep.deleted).await?;
        }
        self.inner.received.store(0, Ordering::Relaxed);
        // Recently used entries must not go first.
        self.record_uses().await;
        let Moments { now, abandoned } = self.moments();
        match self.persist(now, None).await {
            // They stay in memory.
            Err(error) if urgency == Urgency::Full && reserved_space::is_full(&error) => {}
            written => written?,
        }
        sweep.abandoned = catalog.abandon(abandoned, now).await?;
        if let Some(age) = limits.unused {
            let before = now - age;
            let expired = catalog.expire(before, now).await;
            let expired = expired.map(|swept| swept.count);
            self.invalidate_lookups_after(&expired);
            sweep.expired = expired?;
        }
        let ended = self.totals().await?.upload_bytes;
        self.inner.finished.store(ended, Ordering::Relaxed);
        let evicted = self.evict(urgency, now).await;
        self.invalidate_lookups_after(&evicted);
        sweep.evicted += evicted?;
        let until = match urgency {
            Urgency::Usual => now - GARBAGE_STAYS,
            Urgency::Full => Timestamp::MAX,
        };
        sweep.deleted += self.delete_garbage(until).await?;
        let compaction = Compaction {
            dead_percent: DEAD_PERCENT,
            enough: u64::MAX,
        };
        catalog.compact(compaction).await?;
        if urgency == Urgency::Full {
            catalog.give_back().await?;
        }
        Ok(sweep)
    }

    /// Makes some room on a full disk, with as little as there is. Returns how many entries it evicted, and
    /// counts `deleted` blobs.
    async fn make_first_room(&self, deleted: &mut u64) -> Result<u64, StoreError> {
        let catalog = &self.inner.catalog;
        let _little_room = catalog.with_little_room();
        // This comes before any write, since there may be no room for one. If it fails, evicting may do even
        // so.
        if let Err(error) = catalog.compact(Compaction::DEAD).await {
            warn!(cause = error.cause(), "cannot delete what is dead");
        }
        match self.delete_garbage(Timestamp::MAX).await {
            Ok(garbage) => *deleted += garbage,
            Err(error) => warn!(cause = error.cause(), "cannot delete garbage"),
        }
        // Recently used entries must not go first.
        self.record_uses().await;
        let now = self.moments().now;
        let sizes = catalog.repositories().await?;
        let evicted = self.evict_bytes(&sizes, FIRST_ROOM, now).await;
        self.invalidate_lookups_after(&evicted.as_ref().map(|evicted| evicted.count));
        let evicted = evicted?;
        *deleted += self.delete_garbage(Timestamp::MAX).await?;
        catalog.give_back().await?;
        if !catalog.frees_at_once() {
            let compaction = Compaction {
                dead_percent: 1,
                enough: FIRST_ROOM,
            };
            catalog.compact(compaction).await?;
        }
        Ok(evicted.count)
    }

    /// So many entries are gone; after an error some may be.
    fn invalidate_lookups_after<E>(&self, removed: &Result<u64, E>) {
        if !matches!(removed, Ok(0)) {
            self.invalidate_lookups();
        }
    }

    /// Some entries may be gone.
    pub(super) fn invalidate_lookups(&self) {
        if let Some(exclusive) = &self.inner.exclusive {
            exclusive.found.forget();
        }
    }

    /// Evicts entries until each repository, and all of them together, are within their limits.
    async fn evict(&self, urgency: Urgency, now: Timestamp) -> Result<u64, StoreError> {
        let StoreInner {
            catalog, limits, ..
        } = &*self.inner;
        let mut sizes = catalog.repositories().await?;
        let mut evicted = 0;
        if let Some(limit) = limits.repository {
            for (repository, size) in &mut sizes {
                let too_much = size.saturating_sub(limit);
                if too_much > 0 {
                    let bytes = too_much + limit / EVICT_AHEAD;
                    let swept = catalog.evict(repository, bytes, now).await?;
                    evicted += swept.count;
                    *size = size.saturating_sub(swept.bytes);
                }
            }
        }
        let all = sizes
            .iter()
            .fold(0u64, |all, (_, size)| all.saturating_add(*size));
        let mut too_much = match limits.total {
            Some(limit) if all > limit => all - limit + limit / EVICT_AHEAD,
            _ => 0,
        };
        if urgency == Urgency::Full {
            // The first room is a part of it.
            let first = all.saturating_add(FIRST_ROOM) / EVICT_AHEAD;
            too_much = too_much.max(first.saturating_sub(FIRST_ROOM));
        }
        if too_much == 0 {
            return Ok(evicted);
        }
        let more = self.evict_bytes(&sizes, too_much, now).await?;
        Ok(evicted + more.count)
    }

    /// Evicts so many bytes of entries, of the largest repositories first, whose `sizes` these are.
    async fn evict_bytes(
        &self,
        sizes: &[(String, u64)],
        bytes: u64,
        now: Timestamp,
    ) -> Result<Removed, StoreError> {
        let mut removed = Removed::default();
        for (repository, bytes) in shared_fetch::to_evict(sizes, bytes) {
            let more = self.inner.catalog.evict(&repository, bytes, now).await?;
            removed.count += more.count;
            removed.bytes += more.bytes;
        }
        Ok(removed)
    }

    /// Deletes blobs that are garbage since `until` or before.
    async fn delete_garbage(&self, until: Timestamp) -> Result<u64, StoreError> {
        let StoreInner { catalog, blobs, .. } = &*self.inner;
        let mut deleted = 0;
        loop {
            let garbage = catalog.garbage(until).await?;
            if garbage.is_empty() {
                return Ok(deleted);
            }
            blobs.delete(garbage.iter().copied()).await?;
            catalog.forget_garbage(&garbage).await?;
            deleted += garbage.len() as u64;
        }
    }
}

/// How a sweep is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    Usual,
    /// The disk is full.
    Full,
}
