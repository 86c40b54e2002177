//! Moves uploads from memory to the database.

use std::io;
use std::time::Duration;

use tracing::warn;

use crate::cache_protocol::ids::UploadId;
use crate::cache_protocol::store::StoreError;
use crate::clock::Timestamp;
use crate::serve::entry_store::{EntryStore, StoreInner};

/// How long an upload may be in memory only. A process that is killed loses those of this time:
/// their clients get the error that there is no such upload.
const MEMORY_ONLY: Duration = Duration::from_secs(1);

impl EntryStore {
    /// Persists uploads that were last used at `until` or before, or the one in `only`.
    pub(super) async fn persist(
        &self,
        until: Timestamp,
        only: Option<UploadId>,
    ) -> Result<(), StoreError> {
        if self.inner.exclusive.is_none() {
            return Ok(());
        }
        let store = self.clone();
        // Its request may be cancelled, and must not leave them half way.
        let written = tokio::spawn(async move {
            let StoreInner {
                catalog, exclusive, ..
            } = &*store.inner;
            let Some(exclusive) = exclusive else {
                return Ok(());
            };
            let _leaving = exclusive.leaving.lock().await;
            let leaving = exclusive.held.begin_move(until, only);
            if leaving.is_empty() {
                return Ok(());
            }
            let written = catalog.persist(&leaving).await;
            exclusive.held.end_move(&leaving, written.is_ok());
            written
        });
        written.await.map_err(io::Error::other)?
    }

    /// Persists one upload that a request needs in the database, and makes room for it if the
    /// disk is full.
    pub(super) async fn persist_one(&self, upload: UploadId) -> Result<(), StoreError> {
        self.with_room(|| self.persist(Timestamp::UNIX_EPOCH, Some(upload)))
            .await
    }

    /// Persists uploads that have been in memory for a while.
    async fn persist_old(&self) {
        let until = self.inner.time.now() - MEMORY_ONLY;
        if let Err(error) = self.persist(until, None).await {
            warn!(
                cause = error.cause(),
                "cannot save uploads; they are only in memory"
            );
        }
    }

    pub(super) async fn persist_periodically(&self) {
        let mut tick = tokio::time::interval(MEMORY_ONLY);
        loop {
            tick.tick().await;
            self.persist_old().await;
        }
    }
}
