//! Reads the bytes of small parts that the catalog stores: in place if it is SQLite, otherwise in batches.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use bytes::Bytes;

use crate::cache_protocol::ids::BlobId;
use crate::cache_protocol::parts::Part;
use crate::serve::batch::Batcher;
use crate::serve::catalog::Catalog;

/// The largest part that the catalog stores itself, in bytes. Nearly all objects of a compiler cache are
/// smaller. There they cost less than a file of their own, which must be announced before, and must be on
/// the disk with its name. Larger parts would be in memory as a whole.
pub(crate) const SMALL: usize = 256 * 1024;

/// How many are read with one statement.
const AT_ONCE: usize = 32;

/// How many statements are under way at once.
const GROUPS: usize = 2;

type ReadResult = Result<Option<Bytes>, Arc<sqlx::Error>>;

/// Reads them. Clones share the queue.
#[derive(Clone)]
pub(crate) struct SmallContents {
    catalog: Catalog,
    asked: Arc<Batcher<BlobId, ReadResult>>,
}

impl std::fmt::Debug for SmallContents {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("SmallContents")
    }
}

impl SmallContents {
    /// Reads from `catalog`.
    pub(crate) fn of(catalog: Catalog) -> Self {
        let asked = catalog.clone();
        let read = move |blobs: Vec<BlobId>| {
            let catalog = asked.clone();
            async move {
                match catalog.contents(&blobs).await {
                    Ok(contents) => {
                        let contents = contents.into_iter().map(|(blob, bytes)| {
                            let error = |error: io::Error| Arc::new(sqlx::Error::from(error));
                            (blob, bytes.map_err(error))
                        });
                        let contents: HashMap<BlobId, _> = contents.collect();
                        let answers = blobs
                            .iter()
                            .map(|blob| contents.get(blob).cloned().transpose());
                        answers.collect()
                    }
                    Err(error) => {
                        let error = Arc::new(error);
                        blobs.iter().map(|_| Err(error.clone())).collect()
                    }
                }
            }
        };
        Self {
            catalog,
            asked: Arc::new(Batcher::new(AT_ONCE, GROUPS, read)),
        }
    }

    /// All bytes of `part`, as they were written.
    ///
    /// # Errors
    /// An error for which [`is_missing`](crate::cache_protocol::azure_blob::is_missing) holds if
    /// the bytes are gone or changed; another error if the database cannot be read.
    pub(crate) async fn read(&self, part: &Part) -> io::Result<Bytes> {
        let content = match self.catalog.content_in_place(part.blob) {
            Some(content) => content,
            None => self.read_in_batch(part.blob).await?,
        };
        let bytes = content.ok_or(io::ErrorKind::NotFound)?;
        let is_whole =
            bytes.len() as u64 == part.size && part.digests.are_of(0, std::slice::from_ref(&bytes));
        if is_whole {
            Ok(bytes)
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a part does not match its digests",
            ))
        }
    }

    async fn read_in_batch(&self, blob: BlobId) -> io::Result<Option<Bytes>> {
        let answer = self.asked.ask(blob).await;
        answer
            .ok_or_else(|| io::Error::other("the database is closed"))?
            .map_err(io::Error::other)
    }
}
