//! The content of an entry, which drops its entry if bytes are missing or changed.

use std::io;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, TryStreamExt};

use crate::cache_protocol::azure_blob::is_missing;
use crate::cache_protocol::ids::EntryId;
use crate::cache_protocol::store::{Bytestream, RangeRead, Store};
use crate::serve::blob_store::StoredContent;
use crate::serve::entry_store::EntryStore;

impl EntryStore {
    /// Drops an entry whose content was missing or changed when it was read.
    fn drop_missing(&self, entry: EntryId) {
        let store = self.clone();
        tokio::spawn(async move { store.mark_missing(entry).await });
    }
}

/// The content of an entry. It drops the entry if the bytes are not the ones that were written.
#[derive(Debug)]
pub(super) struct WatchedContent {
    pub(super) store: EntryStore,
    pub(super) entry: EntryId,
    pub(super) parts: StoredContent,
}

impl RangeRead for WatchedContent {
    fn size(&self) -> u64 {
        self.parts.size()
    }

    fn read(&self, first: u64, length: u64) -> BoxFuture<'_, io::Result<Bytestream>> {
        let (store, entry) = (self.store.clone(), self.entry);
        let reading = self.parts.read(first, length);
        async move {
            let stream = reading.await?;
            let watched = stream.inspect_err(move |error| {
                if is_missing(error) {
                    store.drop_missing(entry);
                }
            });
            Ok(watched.boxed())
        }
        .boxed()
    }
}
