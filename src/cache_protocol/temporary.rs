//! A store that lives as long as its process: the list of entries is in memory, their content in a
//! folder.
//!
//! [`crate::commands::rehearse`], tests and benchmarks use it. It has the behaviours of the
//! standalone service (`docs/cache-service.md`) without a database, so it is in every build and
//! starts at once. Nothing is evicted, and a reservation holds until the end.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, SeekFrom};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, Stream, StreamExt, TryStreamExt, stream};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::io::ReaderStream;

use crate::cache_protocol::auth::{Tokens, UrlSigner};
use crate::cache_protocol::blob_digests::Digests;
use crate::cache_protocol::ids::{BlobId, EntryId, UploadId};
use crate::cache_protocol::parts::{self, Part, ReceivedPart, Segment};
use crate::cache_protocol::store::{
    Bytestream, Chunk, Content, Entry, EntryName, Query, RangeRead, Scope, Store, StoreError,
};
use crate::cache_protocol::{AppState, ENTRY_LIMIT, Snapshot, router};
use crate::clock::Timestamp;

/// How much of a file is in memory at once, in bytes.
const READ_SIZE: usize = 128 * 1024;

/// The store. Clones are the same one.
#[derive(Clone, Debug)]
pub struct TemporaryStore {
    inner: Arc<TemporaryInner>,
}

#[derive(Debug)]
struct TemporaryInner {
    folder: PathBuf,
    state: Mutex<StoreState>,
}

/// The entries and uploads.
#[derive(Debug, Default)]
struct StoreState {
    /// The last number that was given to an upload, a blob or an entry.
    last: u64,
    uploads: HashMap<UploadId, OpenUpload>,
    reserved: HashMap<EntryName, UploadId>,
    entries: HashMap<EntryId, CommittedEntry>,
    /// The entries' numbers by scope, version and key.
    names: BTreeMap<(Scope, String, String), EntryId>,
}

#[derive(Debug)]
struct OpenUpload {
    name: EntryName,
    received: Vec<ReceivedPart>,
    blocks: Option<Vec<String>>,
    /// How many requests are sending content.
    writing: usize,
}

#[derive(Debug)]
struct CommittedEntry {
    entry: Entry,
    parts: Arc<[Part]>,
}

impl StoreState {
    fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn upload(&mut self, upload: UploadId) -> Result<&mut OpenUpload, StoreError> {
        self.uploads
            .get_mut(&upload)
            .ok_or(StoreError::NoSuchUpload)
    }

    /// The newest entry whose key begins with `key`, or the one with exactly that key.
    fn find(&self, scope: &Scope, version: &str, key: &str) -> Option<&Entry> {
        let from = (scope.clone(), version.to_owned(), key.to_owned());
        let mut newest = None;
        for ((of, its_version, its_key), number) in self.names.range(from..) {
            if of != scope || its_version != version || !its_key.starts_with(key) {
                break;
            }
            if its_key == key {
                newest = Some(*number);
                break;
            }
            newest = newest.max(Some(*number));
        }
        Some(&self.entries.get(&newest?)?.entry)
    }
}

fn indexed(name: &EntryName) -> (Scope, String, String) {
    (name.scope.clone(), name.version.clone(), name.key.clone())
}

fn lock(inner: &TemporaryInner) -> MutexGuard<'_, StoreState> {
    inner.state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn blob_path(folder: &Path, blob: BlobId) -> PathBuf {
    folder.join(blob.to_string())
}

impl TemporaryStore {
    /// An empty store that keeps content in `folder`. It creates the folder if it is missing.
    /// Nothing else should be in it.
    ///
    /// # Errors
    /// Fails if the folder cannot be made.
    pub fn open(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let inner = TemporaryInner {
            folder: folder.to_owned(),
            state: Mutex::default(),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The bytes of all entries.
    pub fn stored(&self) -> u64 {
        let state = lock(&self.inner);
        state.entries.values().map(|known| known.entry.size).sum()
    }

    /// The files of the entry that was committed first, or none.
    pub fn first_entry(&self) -> Vec<PathBuf> {
        let state = lock(&self.inner);
        let first = state.entries.keys().min();
        let parts = first.and_then(|first| state.entries.get(first));
        let parts = parts.iter().flat_map(|known| known.parts.iter());
        parts
            .map(|part| blob_path(&self.inner.folder, part.blob))
            .collect()
    }

    /// Receives the content of one request.
    async fn receive(
        &self,
        upload: UploadId,
        block: Option<&str>,
        (start, truncate): (u64, bool),
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        let mut receiving = Receiving::begin(self, upload)?;
        let mut file = File::create(receiving.path()).await?;
        let mut pieces = std::pin::pin!(pieces);
        let mut size = 0u64;
        while let Some(piece) = pieces.try_next().await? {
            size = size.saturating_add(piece.len() as u64);
            self.check_size(start.saturating_add(size))?;
            file.write_all(&piece).await?;
        }
        file.flush().await?;
        receiving.end(
            ReceivedPart {
                blob: receiving.blob,
                block: block.map(str::to_owned),
                start,
                size,
                digests: Digests::default(),
                inside: false,
            },
            truncate,
        )
    }
}

/// A request that brings content. It may end at any await, when its client disconnects, and then
/// leaves nothing.
struct Receiving {
    inner: Arc<TemporaryInner>,
    upload: UploadId,
    blob: BlobId,
    /// Whether the received content belongs to the upload.
    kept: bool,
}

impl Receiving {
    fn begin(store: &TemporaryStore, upload: UploadId) -> Result<Self, StoreError> {
        let mut state = lock(&store.inner);
        state.upload(upload)?.writing += 1;
        Ok(Self {
            inner: store.inner.clone(),
            upload,
            blob: BlobId(state.number()),
            kept: false,
        })
    }

    fn path(&self) -> PathBuf {
        blob_path(&self.inner.folder, self.blob)
    }

    /// Keeps the content; `truncate` drops everything before it.
    fn end(&mut self, received: ReceivedPart, truncate: bool) -> Result<(), StoreError> {
        let mut state = lock(&self.inner);
        let upload = state.upload(self.upload)?;
        if truncate {
            upload.blocks = None;
            let older = upload
                .received
                .extract_if(.., |part| part.blob < received.blob);
            remove(&self.inner.folder, older.map(|part| part.blob));
        }
        upload.received.push(received);
        self.kept = true;
        Ok(())
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        if let Some(upload) = lock(&self.inner).uploads.get_mut(&self.upload) {
            upload.writing -= 1;
        }
        if !self.kept {
            remove(&self.inner.folder, [self.blob]);
        }
    }
}

/// Deletes blobs. A file that cannot be deleted goes with the folder.
fn remove(folder: &Path, blobs: impl IntoIterator<Item = BlobId>) {
    for blob in blobs {
        let _ = fs::remove_file(blob_path(folder, blob));
    }
}

/// Content in several files.
#[derive(Debug)]
struct JoinedFiles {
    folder: PathBuf,
    parts: Arc<[Part]>,
}

async fn read_segment(path: PathBuf, segment: Segment) -> io::Result<Bytestream> {
    let mut file = File::open(path).await?;
    file.seek(SeekFrom::Start(segment.start)).await?;
    Ok(ReaderStream::with_capacity(file.take(segment.length), READ_SIZE).boxed())
}

impl RangeRead for JoinedFiles {
    fn size(&self) -> u64 {
        parts::total(&self.parts)
    }

    fn read(&self, first: u64, length: u64) -> BoxFuture<'_, io::Result<Bytestream>> {
        let segments = parts::segments(&self.parts, first, length);
        let segments = segments
            .into_iter()
            .map(|segment| (blob_path(&self.folder, segment.blob), segment));
        let mut content = stream::iter(segments.collect::<Vec<_>>())
            .then(|(path, segment)| read_segment(path, segment))
            .try_flatten()
            .boxed();
        async move {
            let begin = content.try_next().await?.unwrap_or_default();
            Ok(stream::iter([Ok(begin)]).chain(content).boxed())
        }
        .boxed()
    }
}

impl Store for TemporaryStore {
    async fn reserve(&self, name: EntryName) -> Result<UploadId, StoreError> {
        let mut state = lock(&self.inner);
        if state.reserved.contains_key(&name) || state.names.contains_key(&indexed(&name)) {
            return Err(StoreError::AlreadyExists);
        }
        let number = UploadId(state.number());
        state.reserved.insert(name.clone(), number);
        let upload = OpenUpload {
            name,
            received: Vec::new(),
            blocks: None,
            writing: 0,
        };
        state.uploads.insert(number, upload);
        Ok(number)
    }

    fn check_size(&self, size: u64) -> Result<(), StoreError> {
        if size > ENTRY_LIMIT {
            Err(StoreError::TooLarge { limit: ENTRY_LIMIT })
        } else {
            Ok(())
        }
    }

    async fn upload_of(&self, name: &EntryName) -> Result<UploadId, StoreError> {
        let state = lock(&self.inner);
        let upload = state.reserved.get(name).copied();
        upload.ok_or(StoreError::NoSuchUpload)
    }

    async fn name_of(&self, upload: UploadId) -> Result<EntryName, StoreError> {
        Ok(lock(&self.inner).upload(upload)?.name.clone())
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
        let mut state = lock(&self.inner);
        let upload = state.upload(upload)?;
        let parts = parts::listed(&upload.received, &blocks)?;
        self.check_size(parts::total(&parts))?;
        upload.blocks = Some(blocks);
        Ok(())
    }

    async fn commit(&self, upload: UploadId, size: u64) -> Result<Entry, StoreError> {
        self.check_size(size)?;
        let mut state = lock(&self.inner);
        let known = state.upload(upload)?;
        if known.writing > 0 {
            return Err(StoreError::Busy);
        }
        let parts = parts::content(&known.received, known.blocks.as_deref(), size)?;
        let known = state
            .uploads
            .remove(&upload)
            .ok_or(StoreError::NoSuchUpload)?;
        state.reserved.remove(&known.name);
        let unused = parts::unused(&known.received, &parts).map(|part| part.blob);
        remove(&self.inner.folder, unused);
        let entry = Entry {
            id: EntryId(state.number()),
            name: known.name,
            size,
            created: Timestamp::now(),
        };
        state.names.insert(indexed(&entry.name), entry.id);
        let committed = CommittedEntry {
            entry: entry.clone(),
            parts: parts.into(),
        };
        state.entries.insert(entry.id, committed);
        Ok(entry)
    }

    async fn find(&self, query: &Query<'_>) -> Option<Entry> {
        let state = lock(&self.inner);
        let mut scopes = query.scopes.iter();
        let found = scopes.find_map(|scope| {
            let mut keys = query.keys.iter();
            keys.find_map(|key| state.find(scope, query.version, key))
        });
        found.cloned()
    }

    async fn open(&self, entry: EntryId) -> Option<Content> {
        let folder = &self.inner.folder;
        let parts = lock(&self.inner).entries.get(&entry)?.parts.clone();
        match &*parts {
            [] => Some(Content::Bytes(Bytes::new())),
            [Part { blob, size, .. }] => match File::open(blob_path(folder, *blob)).await {
                Ok(file) => Some(Content::File {
                    file,
                    start: 0,
                    size: *size,
                }),
                Err(_) => {
                    self.mark_missing(entry).await;
                    None
                }
            },
            _ => Some(Content::Remote(Box::new(JoinedFiles {
                folder: folder.clone(),
                parts,
            }))),
        }
    }

    async fn mark_missing(&self, entry: EntryId) {
        let mut state = lock(&self.inner);
        let Some(gone) = state.entries.remove(&entry) else {
            return;
        };
        state.names.remove(&indexed(&gone.entry.name));
        remove(&self.inner.folder, gone.parts.iter().map(|part| part.blob));
    }
}

/// A cache service on a temporary store, on a free port of 127.0.0.1 in this process. It ends when
/// this is dropped.
#[derive(Debug)]
pub struct TemporaryService {
    shared: Arc<AppState<TemporaryStore>>,
    served: JoinHandle<io::Result<()>>,
}

impl TemporaryService {
    /// Starts one that keeps content in `folder` and accepts `tokens`.
    ///
    /// # Errors
    /// Fails if the folder or a port is unavailable.
    pub async fn start(folder: &Path, tokens: Tokens) -> io::Result<Self> {
        let store = TemporaryStore::open(folder)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let signer = UrlSigner::random().map_err(io::Error::other)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(AppState::new(store, tokens, address, signer));
        let served = axum::serve(listener, router(shared.clone()));
        Ok(Self {
            shared,
            served: tokio::spawn(served.into_future()),
        })
    }

    /// Its URL, with a slash at the end as clients expect of `ACTIONS_RESULTS_URL`.
    pub fn url(&self) -> String {
        format!("http://{}/", self.shared.address)
    }

    /// The requests so far.
    pub fn counters(&self) -> Snapshot {
        self.shared.counters()
    }
}

impl Drop for TemporaryService {
    fn drop(&mut self) {
        self.served.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(key: &str) -> EntryName {
        EntryName {
            scope: "s".into(),
            version: "v".to_owned(),
            key: key.to_owned(),
        }
    }

    fn pieces(content: &'static str) -> impl Stream<Item = Chunk> + Send {
        stream::iter([Ok(Bytes::from_static(content.as_bytes()))])
    }

    fn files(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[tokio::test]
    async fn what_was_replaced_left_out_or_broken_off_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let store = TemporaryStore::open(folder.path()).unwrap();
        let upload = store.reserve(name("k")).await.unwrap();
        for content in ["old", "content"] {
            let pieces = pieces(content);
            store.write(upload, 0, true, pieces).await.unwrap();
        }
        assert_eq!(files(folder.path()), 1);
        let broken = stream::iter([Err(StoreError::Interrupted("gone".to_owned()))]);
        assert!(store.write_block(upload, "b", broken).await.is_err());
        store
            .write_block(upload, "a", pieces("unused"))
            .await
            .unwrap();
        assert_eq!(files(folder.path()), 2);
        let entry = store.commit(upload, 7).await.unwrap();
        assert_eq!(files(folder.path()), 1);
        assert_eq!(store.stored(), 7);
        store.mark_missing(entry.id).await;
        assert_eq!(files(folder.path()), 0);
        assert!(store.open(entry.id).await.is_none());
        assert!(store.reserve(name("k")).await.is_ok());
    }

    #[tokio::test]
    async fn an_upload_that_is_being_written_is_not_committed() {
        let folder = tempfile::tempdir().unwrap();
        let store = TemporaryStore::open(folder.path()).unwrap();
        let upload = store.reserve(name("k")).await.unwrap();
        let writing = Receiving::begin(&store, upload).unwrap();
        let refused = store.commit(upload, 0).await;
        assert!(matches!(refused, Err(StoreError::Busy)));
        drop(writing);
        assert!(store.commit(upload, 0).await.is_ok());
    }
}
