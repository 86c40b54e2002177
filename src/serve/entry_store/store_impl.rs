//! The store as the cache protocols see it: reservations, commits and look-ups.

use std::sync::Arc;

use futures_util::Stream;
use tracing::{error, warn};

use crate::cache_protocol::azure_blob::is_missing;
use crate::cache_protocol::ids::{EntryId, UploadId};
use crate::cache_protocol::parts::Part;
use crate::cache_protocol::store::{Chunk, Content, Entry, EntryName, Query, Store, StoreError};
use crate::clock::Timestamp;
use crate::serve::blob_store::StoredContent;
use crate::serve::catalog::{Commit, CommittedUpload, Moments, NameStatus, UnwrittenCommit};
use crate::serve::entry_store::content::WatchedContent;
use crate::serve::entry_store::exclusive::closed;
use crate::serve::entry_store::look_up_cache::LookupCache;
use crate::serve::entry_store::{EntryStore, StoreInner};
use crate::serve::uploads_in_memory::UploadLocation;

impl EntryStore {
    /// Reserves a name, in memory if possible.
    async fn reserve_once(&self, name: &EntryName) -> Result<UploadId, StoreError> {
        let StoreInner {
            catalog, exclusive, ..
        } = &*self.inner;
        let Moments { now, abandoned } = self.moments();
        let Some(exclusive) = exclusive else {
            return catalog.reserve(name, now, abandoned).await;
        };
        let numbers = &exclusive.numbers;
        let upload = numbers.upload(catalog).await?;
        let (reserving, given_up) = exclusive.held.reserve(name, upload, now, abandoned)?;
        self.subtract_finished(given_up);
        let status = match catalog.name_status_in_place(name) {
            Some(status) => status,
            None => {
                let status = exclusive.names.ask(name.clone()).await;
                let status = status.ok_or_else(closed)?;
                status.map_err(|error| StoreError::Backend(Box::new(error)))?
            }
        };
        match status {
            NameStatus::Free => {
                reserving.keep();
                Ok(upload)
            }
            NameStatus::Committed => Err(StoreError::AlreadyExists),
            // It may be abandoned. No other task reserves the name meanwhile.
            NameStatus::Reserved => catalog.reserve(name, now, abandoned).await,
        }
    }

    /// Makes an upload an entry, wherever it is.
    async fn commit_once(
        &self,
        upload: UploadId,
        size: u64,
    ) -> Result<CommittedUpload, StoreError> {
        let Moments { now, abandoned } = self.moments();
        let created = Timestamp::now();
        while let Some(exclusive) = &self.inner.exclusive {
            match exclusive.held.commit(upload, size)? {
                UploadLocation::InMemory((name, content)) => {
                    let commit = UnwrittenCommit {
                        name,
                        content,
                        size,
                        created,
                        now,
                    };
                    let committed = exclusive.commits.ask((upload, commit)).await;
                    return committed.ok_or_else(closed)?;
                }
                UploadLocation::Leaving => self.persist_one(upload).await?,
                UploadLocation::NotInMemory => break,
            }
        }
        let commit = Commit {
            upload,
            size,
            created,
            moments: Moments { now, abandoned },
        };
        self.inner.catalog.commit(&commit).await
    }
}

impl Store for EntryStore {
    async fn reserve(&self, name: EntryName) -> Result<UploadId, StoreError> {
        self.with_room(|| self.reserve_once(&name)).await
    }

    fn check_size(&self, size: u64) -> Result<(), StoreError> {
        let limit = self.inner.limits.entry;
        if size > limit {
            return Err(StoreError::TooLarge { limit });
        }
        Ok(())
    }

    async fn upload_of(&self, name: &EntryName) -> Result<UploadId, StoreError> {
        let exclusive = self.inner.exclusive.as_ref();
        match exclusive.and_then(|exclusive| exclusive.held.upload_of(name)) {
            Some(upload) => Ok(upload),
            None => self.inner.catalog.upload_of(name).await,
        }
    }

    async fn name_of(&self, upload: UploadId) -> Result<EntryName, StoreError> {
        let exclusive = self.inner.exclusive.as_ref();
        match exclusive.and_then(|exclusive| exclusive.held.name_of(upload)) {
            Some(name) => Ok(name),
            None => self.inner.catalog.name_of(upload).await,
        }
    }

    async fn write(
        &self,
        upload: UploadId,
        offset: u64,
        truncate: bool,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        self.receive(upload, None, (offset, truncate), pieces).await
    }

    async fn write_block(
        &self,
        upload: UploadId,
        block: &str,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        self.receive(upload, Some(block), (0, false), pieces).await
    }

    async fn join_blocks(&self, upload: UploadId, blocks: Vec<String>) -> Result<(), StoreError> {
        let StoreInner {
            catalog,
            limits,
            time,
            ..
        } = &*self.inner;
        let now = time.now();
        self.begin_write(upload, false).await?;
        self.with_room(|| catalog.join_blocks(upload, &blocks, limits.entry, now))
            .await
    }

    async fn commit(&self, upload: UploadId, size: u64) -> Result<Entry, StoreError> {
        self.check_size(size)?;
        let found = self
            .inner
            .exclusive
            .as_ref()
            .map(|exclusive| &exclusive.found);
        let age = found.map_or(0, LookupCache::age);
        let CommittedUpload {
            entry,
            parts,
            upload_bytes,
        } = self.with_room(|| self.commit_once(upload, size)).await?;
        self.subtract_finished(upload_bytes);
        // Later jobs read the entry that this one saved.
        self.inner.parts.insert(entry.id, parts.into());
        if let Some(found) = found {
            found.keep(&entry, age);
        }
        Ok(entry)
    }

    async fn find(&self, query: &Query<'_>) -> Option<Entry> {
        let found = self
            .inner
            .exclusive
            .as_ref()
            .map(|exclusive| &exclusive.found);
        if let Some(entry) = found.and_then(|found| found.get(query)) {
            self.used(entry.id);
            return Some(entry);
        }
        let age = found.map_or(0, LookupCache::age);
        match self.inner.catalog.find(query).await {
            Ok(None) => None,
            Ok(Some(entry)) => {
                let is_first = query.scopes.first() == Some(&entry.name.scope)
                    && query.keys.first() == Some(&entry.name.key.as_str());
                if let Some(found) = found.filter(|_| is_first) {
                    found.keep(&entry, age);
                }
                // The client is about to read it. Even if it does not, GitHub counts a look-up as a
                // use too.
                self.used(entry.id);
                Some(entry)
            }
            Err(error) => {
                error!(cause = %error, "a lookup failed and was answered as a miss");
                None
            }
        }
    }

    async fn open(&self, entry: EntryId) -> Option<Content> {
        let parts = match self.inner.parts.get(&entry) {
            Some(parts) => parts,
            None => match self.inner.catalog.parts_of(entry).await {
                Ok(parts) => {
                    let parts: Arc<[Part]> = parts?.into();
                    self.inner.parts.insert(entry, parts.clone());
                    parts
                }
                Err(error) => {
                    error!(cause = %error, "cannot look up an entry");
                    return None;
                }
            },
        };
        self.used(entry);
        let StoreInner { blobs, inside, .. } = &*self.inner;
        if let [part] = &*parts
            && part.inside
        {
            return match inside.read(part).await {
                Ok(bytes) => Some(Content::Bytes(bytes)),
                Err(error) if is_missing(&error) => {
                    self.mark_missing(entry).await;
                    None
                }
                Err(error) => {
                    error!(cause = %error, "cannot read an entry");
                    None
                }
            };
        }
        Some(Content::Remote(Box::new(WatchedContent {
            store: self.clone(),
            entry,
            parts: StoredContent::new(blobs.clone(), inside.clone(), parts),
        })))
    }

    async fn mark_missing(&self, entry: EntryId) {
        self.inner.parts.invalidate(&entry);
        let now = self.inner.time.now();
        let removed = self.inner.catalog.remove_entry(entry, now).await;
        self.invalidate_lookups();
        match removed {
            Ok(true) => warn!(
                %entry,
                "the content of an entry was gone or changed; the entry is dropped"
            ),
            // It was evicted while it was read.
            Ok(false) => {}
            Err(error) => error!(cause = error.cause(), "cannot drop an entry"),
        }
    }
}
