//! Makes room on a disk that is full.

use std::time::Instant;

use tracing::{error, warn};

use crate::cache_protocol::store::StoreError;
use crate::serve::entry_store::EntryStore;
use crate::serve::entry_store::sweep::{SweepReport, Urgency};
use crate::serve::reserved_space;

impl EntryStore {
    pub(super) fn keep_reserve(&self) {
        let Some(path) = &self.inner.reserve else {
            return;
        };
        if let Err(error) = reserved_space::keep(path) {
            warn!(%error, "the disk has no room for the reserve");
        }
    }

    /// Makes room on a disk that was full at `when`, unless another task has since: it deletes
    /// garbage at once, then some entries.
    pub(super) async fn make_room(&self, when: Instant) {
        let mut made = self.inner.made_room.lock().await;
        if made.is_some_and(|made| made > when) {
            return;
        }
        self.inner
            .reserve
            .iter()
            .for_each(|path| reserved_space::give_up(path));
        match self.sweep_with(Urgency::Full).await {
            Ok(SweepReport {
                evicted, deleted, ..
            }) => warn!(
                evicted,
                deleted,
                "the disk was full; the service deleted entries to make \
                                           room"
            ),
            Err(error) => error!(
                cause = error.cause(),
                "the disk is full, and the service cannot make room"
            ),
        }
        self.keep_reserve();
        *made = Some(Instant::now());
    }

    /// Does `operation`. If the disk is full, makes room and does it once more.
    ///
    /// # Errors
    /// Its errors, and [`StoreError::Full`] if there is no room even then.
    pub(super) async fn with_room<T, Done>(
        &self,
        operation: impl Fn() -> Done,
    ) -> Result<T, StoreError>
    where
        Done: Future<Output = Result<T, StoreError>>,
    {
        let done = operation().await;
        if !self.made_room_for(done.as_ref().err()).await {
            return done;
        }
        match operation().await {
            Err(error) if reserved_space::is_full(&error) => Err(StoreError::Full),
            done => done,
        }
    }

    /// Makes room if `error` says that the disk is full. `true` means that the operation may be
    /// retried.
    pub(super) async fn made_room_for(&self, error: Option<&StoreError>) -> bool {
        let when = Instant::now();
        match error {
            Some(error) if reserved_space::is_full(error) => {
                let store = self.clone();
                // Its request may be cancelled, and must not leave it half way.
                let made = tokio::spawn(async move { store.make_room(when).await });
                made.await.is_ok()
            }
            _ => false,
        }
    }
}
