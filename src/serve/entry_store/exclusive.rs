//! What a store has in memory that no other service uses: uploads, and batches of queries.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tracing::warn;

use crate::cache_protocol::ids::UploadId;
use crate::cache_protocol::store::{EntryName, StoreError};
use crate::serve::batch::Batcher;
use crate::serve::catalog::{Catalog, CommittedUpload, NameStatus, UnwrittenCommit};
use crate::serve::entry_store::look_up_cache::LookupCache;
use crate::serve::entry_store::number_pool::NumberPool;
use crate::serve::uploads_in_memory::HeldUploads;

/// After how many commits SQLite's log is written back into the database. A commit changes up to three
/// pages of 4 KiB that no other one of its transaction does.
const COMMITS_PER_CHECKPOINT: u64 = 512;

/// How many commits may share a transaction.
const COMMITS_PER_TRANSACTION: usize = 128;

/// How many names are looked for at once.
const NAMES_PER_QUERY: usize = 32;

/// The state of a store that no other service uses: it holds in memory uploads that the database
/// does not have.
pub(super) struct ExclusiveState {
    pub(super) held: HeldUploads,
    /// Held while uploads are persisted.
    pub(super) leaving: tokio::sync::Mutex<()>,
    pub(super) numbers: NumberPool,
    pub(super) names: Batcher<EntryName, Result<NameStatus, Arc<sqlx::Error>>>,
    pub(super) commits: Batcher<(UploadId, UnwrittenCommit), Result<CommittedUpload, StoreError>>,
    pub(super) found: LookupCache,
}

impl ExclusiveState {
    pub(super) fn of(catalog: &Catalog) -> Self {
        let held = HeldUploads::default();
        let names = {
            let catalog = catalog.clone();
            move |names: Vec<EntryName>| {
                let catalog = catalog.clone();
                async move {
                    match catalog.name_statuses(&names).await {
                        Ok(taken) => taken.into_iter().map(Ok).collect(),
                        Err(error) => repeated(&Arc::new(error), names.len(), Err),
                    }
                }
            }
        };
        let commits = {
            let (catalog, held) = (catalog.clone(), held.clone());
            let log = WalTracker::default();
            move |asked: Vec<(UploadId, UnwrittenCommit)>| {
                let (catalog, held, log) = (catalog.clone(), held.clone(), log.clone());
                let (uploads, commits): (Vec<_>, Vec<_>) = asked.into_iter().unzip();
                let commits: Arc<[UnwrittenCommit]> = commits.into();
                async move {
                    let mut done = match catalog.commit_unwritten(&commits).await {
                        Ok(done) => done,
                        Err(error) => {
                            let backend = |error| Err(StoreError::Backend(Box::new(error)));
                            repeated(&Arc::new(error), commits.len(), backend)
                        }
                    };
                    // Here, since the request may be gone by now.
                    for (upload, done) in uploads.iter().zip(&mut done) {
                        let upload_bytes = held.end_commit(*upload, done.is_ok());
                        if let Ok(committed) = done {
                            committed.upload_bytes = upload_bytes;
                        }
                    }
                    log.grew(commits.len() as u64, &catalog);
                    done
                }
            }
        };
        Self {
            held,
            leaving: tokio::sync::Mutex::default(),
            numbers: NumberPool::default(),
            names: Batcher::new(NAMES_PER_QUERY, 1, names),
            commits: Batcher::new(COMMITS_PER_TRANSACTION, 1, commits),
            found: LookupCache::default(),
        }
    }
}

/// How many commits of small entries were written to SQLite's log since it was last written back into the
/// database. What else is written there is little.
#[derive(Clone, Default)]
struct WalTracker {
    commits: Arc<AtomicU64>,
    emptying: Arc<AtomicBool>,
}

impl WalTracker {
    /// Counts commits. If they are enough, a task writes the log back into the database, while more
    /// commits continue.
    fn grew(&self, commits: u64, catalog: &Catalog) {
        let before = self.commits.fetch_add(commits, Ordering::Relaxed);
        if before + commits < COMMITS_PER_CHECKPOINT || self.emptying.swap(true, Ordering::Relaxed)
        {
            return;
        }
        self.commits.store(0, Ordering::Relaxed);
        let (catalog, emptying) = (catalog.clone(), self.emptying.clone());
        tokio::spawn(async move {
            // If this fails, a commit writes it back.
            if let Err(error) = catalog.checkpoint().await {
                warn!(%error, "cannot write the database's log back into it");
            }
            emptying.store(false, Ordering::Relaxed);
        });
    }
}

/// The same error for each request of a group.
fn repeated<T>(
    error: &Arc<sqlx::Error>,
    count: usize,
    each: impl Fn(Arc<sqlx::Error>) -> T,
) -> Vec<T> {
    (0..count).map(|_| each(error.clone())).collect()
}

/// The error after the answering task has ended.
pub(super) fn closed() -> StoreError {
    StoreError::Io(io::Error::other("the store is closed"))
}
