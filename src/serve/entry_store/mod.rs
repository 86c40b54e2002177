//! The store of the standalone service: a catalog of entries, and blobs.
//!
//! In a store that no other service uses, an upload begins in memory (`held`), and a small one ends
//! there too: the database only gets its commit, together with others at that moment.

mod config;
mod content;
mod exclusive;
mod look_up_cache;
mod number_pool;
mod open;
mod persist;
mod receive;
mod room;
mod store_impl;
mod store_time;
mod sweep;
mod uses;

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use moka::sync::Cache;
use tokio::sync::Notify;
use tracing::warn;

use crate::cache_protocol::auth::UrlSigner;
use crate::cache_protocol::ids::EntryId;
use crate::cache_protocol::parts::Part;
use crate::clock::Timestamp;
use crate::serve::blob_store::BlobStore;
use crate::serve::catalog::{Catalog, Moments, Totals};
use crate::serve::entry_store::exclusive::ExclusiveState;
use crate::serve::entry_store::store_time::StoreTime;
use crate::serve::small_contents::SmallContents;

pub use crate::serve::entry_store::config::{StorageConfig, StoreLimits};
pub use crate::serve::entry_store::open::OpenError;
pub use crate::serve::entry_store::store_time::{Clock, system_clock};
pub use crate::serve::entry_store::sweep::SweepReport;

/// How long a reservation holds without a byte being written to it. A client that was killed must
/// not block its key for ever, as it does at GitHub.
const RESERVATION: Duration = Duration::from_secs(10 * 60);

/// A catalog and blobs. Clones share the store.
#[derive(Clone)]
pub struct EntryStore {
    inner: Arc<StoreInner>,
}

impl std::fmt::Debug for EntryStore {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("EntryStore")
            .field("blobs", &self.inner.blobs)
            .finish_non_exhaustive()
    }
}

struct StoreInner {
    catalog: Catalog,
    blobs: BlobStore,
    inside: SmallContents,
    /// The state of a store that no other service uses.
    exclusive: Option<ExclusiveState>,
    limits: StoreLimits,
    time: StoreTime,
    signing_key: [u8; 32],
    /// Entries do not change, so cached parts stay valid until their entry is removed.
    parts: Cache<EntryId, Arc<[Part]>>,
    /// When entries were used, as far as the database does not know.
    recent_uses: Mutex<HashMap<EntryId, Timestamp>>,
    /// The bytes received since the last sweep.
    received: AtomicU64,
    /// Says that a sweep should not wait for its time.
    sweep_now: Notify,
    /// The bytes received for uncommitted uploads: finished parts, as far as this service knows
    /// since the last sweep, and arriving ones.
    finished: AtomicU64,
    arriving: AtomicU64,
    reserve: Option<PathBuf>,
    /// Held while room is made; when that was done last.
    made_room: tokio::sync::Mutex<Option<Instant>>,
    /// Locked until [`EntryStore::close`].
    lock: Option<fs::File>,
}

impl EntryStore {
    /// The time by the store's clock, and the time since which unused uploads count as abandoned.
    fn moments(&self) -> Moments {
        let now = self.inner.time.now();
        Moments {
            now,
            abandoned: now - RESERVATION,
        }
    }

    /// A signer whose URLs are valid at each service of this store, even after a restart.
    pub fn signer(&self) -> UrlSigner {
        UrlSigner::with_key(self.inner.signing_key)
    }

    /// The totals of the store.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn totals(&self) -> Result<Totals, sqlx::Error> {
        let mut totals = self.inner.catalog.totals().await?;
        if let Some(exclusive) = &self.inner.exclusive {
            let (uploads, bytes) = exclusive.held.totals();
            totals.uploads += uploads;
            totals.upload_bytes += bytes;
        }
        Ok(totals)
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// The database's error if it does not.
    pub async fn ping(&self) -> Result<(), sqlx::Error> {
        self.inner.catalog.ping().await
    }

    /// Records the last uses, persists uploads, closes the database, and unlocks the folder.
    pub async fn close(&self) {
        self.record_uses().await;
        if let Err(error) = self.persist(Timestamp::MAX, None).await {
            warn!(cause = error.cause(), "cannot save uncommitted uploads");
        }
        self.inner.catalog.close().await;
        // If only its file were closed, a connection that is still closing would keep the lock, or
        // another program that is just being started. If unlocking fails, the lock ends with the
        // process.
        if let Some(lock) = &self.inner.lock {
            let _ = lock.unlock();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
