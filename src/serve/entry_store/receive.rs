//! Receives the content of uploads: in memory if it is small, otherwise as a blob.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use tracing::warn;

use crate::cache_protocol::ids::{BlobId, UploadId};
use crate::cache_protocol::store::{Chunk, StoreError};
use crate::serve::blob_store::{Gathered, WrittenBlob, digests_of_all, gather};
use crate::serve::catalog::{BegunPart, FinishedPart, Replaces, SmallPart};
use crate::serve::entry_store::EntryStore;
use crate::serve::entry_store::exclusive::ExclusiveState;
use crate::serve::entry_store::sweep::EVICT_AHEAD;
use crate::serve::small_contents::SMALL;
use crate::serve::uploads_in_memory::{HeldWrite, UploadLocation};

/// How often a writer says that it is still there.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(60);

/// The bytes of all arriving content beyond which only a quarter of the usual size is gathered in
/// memory.
const GATHER_BUDGET: u64 = 64 << 20;

impl EntryStore {
    /// Receives a part: in memory if possible, otherwise from the row that announces it to the row
    /// that has its size.
    pub(super) async fn receive(
        &self,
        upload: UploadId,
        block: Option<&str>,
        (start, truncate): (u64, bool),
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        self.check_upload_limit()?;
        let mut arriving = ReceivingPart {
            store: self.clone(),
            bytes: 0,
            unfinished: None,
        };
        let ReceivingPart {
            bytes, unfinished, ..
        } = &mut arriving;
        let may_be_held = block.is_none() && start == 0;
        let Some((held_write, exclusive)) = self.begin_write(upload, may_be_held).await? else {
            let begun = self.begin_part(upload, block, start).await?;
            let others = if truncate { 0 } else { begun.others };
            let pieces = self.checked(start, others, bytes, pieces);
            return self
                .receive_part(upload, &begun, truncate, unfinished, pieces)
                .await;
        };
        let mut pieces = pin!(self.checked(0, 0, bytes, pieces));
        let with_heartbeat =
            (&mut pieces).inspect_ok(|_| held_write.heartbeat(self.inner.time.now()));
        let rest = match gather(&mut pin!(with_heartbeat), self.small()).await? {
            Gathered::Part(begin) => {
                drop(held_write);
                self.persist_one(upload).await?;
                begin
            }
            Gathered::All(all) => {
                let numbers = &exclusive.numbers;
                let small = SmallPart {
                    blob: numbers.blob(&self.inner.catalog).await?,
                    digests: digests_of_all(&all),
                    bytes: all,
                };
                let size = small.bytes.len() as u64;
                match held_write.end(small, self.inner.time.now()) {
                    Ok(before) => {
                        self.inner.finished.fetch_add(size, Ordering::Relaxed);
                        self.subtract_finished(before);
                        return Ok(());
                    }
                    // Another task persisted the upload meanwhile.
                    Err(small) => vec![small.bytes],
                }
            }
        };
        let pieces = stream::iter(rest.into_iter().map(Ok)).chain(pieces);
        let begun = self.begin_part(upload, None, 0).await?;
        self.receive_part(upload, &begun, truncate, unfinished, pieces)
            .await
    }

    /// How much of an upload may be gathered in memory. It is less while many uploads arrive.
    fn small(&self) -> usize {
        if self.inner.arriving.load(Ordering::Relaxed) > GATHER_BUDGET {
            SMALL / 4
        } else {
            SMALL
        }
    }

    /// Begins to write to `upload` if it is in memory and the content `may_be_held` there.
    /// Otherwise the database has the upload from now on, if there is one.
    pub(super) async fn begin_write(
        &self,
        upload: UploadId,
        may_be_held: bool,
    ) -> Result<Option<(HeldWrite, &ExclusiveState)>, StoreError> {
        let Some(exclusive) = &self.inner.exclusive else {
            return Ok(None);
        };
        match exclusive.held.begin_write(upload, self.inner.time.now()) {
            UploadLocation::InMemory(held_write) if may_be_held => {
                return Ok(Some((held_write, exclusive)));
            }
            // Wait for the task that persists it.
            UploadLocation::InMemory(_) | UploadLocation::Leaving => {
                self.persist_one(upload).await?
            }
            UploadLocation::NotInMemory => {}
        }
        Ok(None)
    }

    async fn begin_part(
        &self,
        upload: UploadId,
        block: Option<&str>,
        start: u64,
    ) -> Result<BegunPart, StoreError> {
        let inner = &*self.inner;
        let now = inner.time.now();
        self.with_room(|| inner.catalog.begin_part(upload, block, start, now))
            .await
    }

    /// Receives a part that the database knows of. Its blob is in `unfinished` until this ends.
    async fn receive_part(
        &self,
        upload: UploadId,
        begun: &BegunPart,
        truncate: bool,
        unfinished: &mut Option<BlobId>,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        let inner = &*self.inner;
        *unfinished = Some(begun.blob);
        let replaces = match (begun.is_first, truncate) {
            // Most uploads have no earlier part, so there is nothing to replace.
            (true, _) => Replaces::Nothing,
            (false, true) => Replaces::All,
            (false, false) => Replaces::Same,
        };
        let mut pieces = pin!(self.with_heartbeat(begun.blob, pieces));
        let received = async {
            Ok(match gather(&mut pieces, self.small()).await? {
                Gathered::All(all) => {
                    let content = WrittenBlob {
                        size: all.len() as u64,
                        digests: digests_of_all(&all),
                    };
                    (content, Some(all))
                }
                Gathered::Part(begin) => {
                    (inner.blobs.write(begun.blob, begin, pieces).await?, None)
                }
            })
        };
        let ended = match received.await {
            Ok((content, inside)) => {
                let part = FinishedPart {
                    blob: begun.blob,
                    content,
                    inside,
                    replaces,
                };
                self.finish_part(upload, &part).await
            }
            Err(error) => Err(error),
        };
        *unfinished = None;
        let Err(error) = ended else { return Ok(()) };
        let full = matches!(error, StoreError::Full) || self.made_room_for(Some(&error)).await;
        if full {
            // The bytes written so far take room; if they cannot be deleted now, a sweep does it.
            let _ = inner.blobs.delete([begun.blob]).await;
        }
        // This comes before the answer, so that the client's retry does not meet the old part.
        self.give_up(begun.blob).await;
        Err(if full { StoreError::Full } else { error })
    }

    async fn finish_part(&self, upload: UploadId, part: &FinishedPart) -> Result<(), StoreError> {
        let inner = &*self.inner;
        let now = inner.time.now();
        let replaced = self
            .with_room(|| inner.catalog.finish_part(upload, part, now))
            .await?;
        inner
            .finished
            .fetch_add(part.content.size, Ordering::Relaxed);
        self.subtract_finished(replaced);
        Ok(())
    }

    /// Subtracts the bytes of an upload that is committed now, or was replaced.
    pub(super) fn subtract_finished(&self, bytes: u64) {
        let less = |finished: u64| Some(finished.saturating_sub(bytes));
        let relaxed = Ordering::Relaxed;
        // The closure never refuses.
        let _ = self.inner.finished.fetch_update(relaxed, relaxed, less);
    }

    /// Whether more may be received of uploads that are not committed. Entries are not evicted for
    /// content that may never become an entry.
    fn check_upload_limit(&self) -> Result<(), StoreError> {
        let Some(limit) = self.inner.limits.total else {
            return Ok(());
        };
        let ended = self.inner.finished.load(Ordering::Relaxed);
        let arriving = self.inner.arriving.load(Ordering::Relaxed);
        if ended.saturating_add(arriving) > limit {
            Err(StoreError::Crowded { limit })
        } else {
            Ok(())
        }
    }

    /// `pieces` of a part that begins at `start`, counted in `bytes`, as long as there is room for
    /// them.
    fn checked<'a>(
        &'a self,
        start: u64,
        others: u64,
        bytes: &'a mut u64,
        pieces: impl Stream<Item = Chunk> + Send + 'a,
    ) -> impl Stream<Item = Chunk> + Send + 'a {
        let limit = self.inner.limits.entry;
        pieces.map(move |piece| {
            let piece = piece?;
            let length = piece.len() as u64;
            *bytes += length;
            self.received(length);
            let upload_bytes = others.max(start).saturating_add(*bytes);
            if upload_bytes > limit {
                return Err(StoreError::TooLarge { limit });
            }
            self.check_upload_limit()?;
            Ok(piece)
        })
    }

    /// `pieces`, with a heartbeat in the database from time to time.
    fn with_heartbeat<'a>(
        &'a self,
        blob: BlobId,
        pieces: impl Stream<Item = Chunk> + Send + 'a,
    ) -> impl Stream<Item = Chunk> + Send + 'a {
        let inner = &*self.inner;
        let mut last_heartbeat = inner.time.now();
        pieces.and_then(move |piece| {
            let now = inner.time.now();
            let silent = now.since(last_heartbeat) >= HEARTBEAT_EVERY;
            if silent {
                last_heartbeat = now;
            }
            async move {
                if silent {
                    inner.catalog.heartbeat(blob, now).await?;
                }
                Ok(piece)
            }
        })
    }

    fn received(&self, bytes: u64) {
        self.inner.arriving.fetch_add(bytes, Ordering::Relaxed);
        let Some(limit) = self.inner.limits.total else {
            return;
        };
        let before = self.inner.received.fetch_add(bytes, Ordering::Relaxed);
        let enough = limit / EVICT_AHEAD;
        if before < enough && before + bytes >= enough {
            self.inner.sweep_now.notify_one();
        }
    }

    /// Gives up a part that broke off. Nobody reads uncommitted content, so the next sweep deletes
    /// its bytes.
    async fn give_up(&self, blob: BlobId) {
        let dropped = self.with_room(|| self.inner.catalog.abandon_part(blob));
        if let Err(error) = dropped.await {
            // A sweep finds it when it is old.
            warn!(cause = error.cause(), "cannot discard an interrupted part");
        }
    }
}

/// A part that is being received. Its request may end at any await, when its client disconnects.
struct ReceivingPart {
    store: EntryStore,
    /// The bytes that came so far.
    bytes: u64,
    /// Its blob, as long as it is unfinished.
    unfinished: Option<BlobId>,
}

impl Drop for ReceivingPart {
    fn drop(&mut self) {
        let arriving = &self.store.inner.arriving;
        arriving.fetch_sub(self.bytes, Ordering::Relaxed);
        if let (Some(blob), Ok(runtime)) = (self.unfinished, tokio::runtime::Handle::try_current())
        {
            let store = self.store.clone();
            runtime.spawn(async move { store.give_up(blob).await });
        }
    }
}
