//! A store in a folder.
//!
//! ```text
//! lock        held as long as a service uses the folder
//! journal     a line of JSON per committed entry, appended
//! entries/N   the content of entry N
//! uploads/N/  what was received for upload N so far
//! ```
//!
//! An entry is committed once its line is in the journal, which happens after its content has its
//! place: a process that is killed loses no committed entry and shows no half one. Nothing is
//! forced to the disk, since that costs milliseconds an object: where the whole machine loses
//! power, the last seconds' entries may be lost, and entries whose content is shorter or longer
//! than their line says are dropped at the next start.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::{Stream, StreamExt};
use tokio::fs::File;
use tokio::io::{AsyncSeekExt, AsyncWriteExt};

use crate::service::store::{Content, Entry, EntryName, Index, Piece, Query, Store, StoreError};

/// How long a reservation holds without a byte being written to it. A client that was killed must
/// not block its key for good, as it does at GitHub.
const RESERVATION_LIFETIME: Duration = Duration::from_secs(10 * 60);

/// A store in a folder.
#[derive(Debug)]
pub struct DiskStore {
    root: PathBuf,
    entry_limit: u64,
    inner: Mutex<Inner>,
    /// Held open: the lock ends with it.
    _lock: fs::File,
}

#[derive(Debug)]
struct Inner {
    index: Index,
    names: HashMap<u64, EntryName>,
    sizes: HashMap<u64, u64>,
    uploads: HashMap<u64, Upload>,
    reserved: HashMap<EntryName, u64>,
    journal: fs::File,
    next: u64,
}

#[derive(Debug)]
struct Upload {
    name: EntryName,
    used: Instant,
    /// Requests that write to it right now.
    writers: usize,
    /// Set as long as it is being committed: an entry must not change, so nobody may hold its file
    /// open for writing.
    committing: bool,
}

impl Upload {
    fn is_abandoned(&self) -> bool {
        self.writers == 0 && !self.committing && self.used.elapsed() >= RESERVATION_LIFETIME
    }
}

/// A request that writes to an upload.
struct Writing<'a> {
    store: &'a DiskStore,
    upload: u64,
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if let Some(upload) = self.store.lock().uploads.get_mut(&self.upload) {
            upload.writers -= 1;
            upload.used = Instant::now();
        }
    }
}

/// Why a folder cannot be a store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another service has it.
    #[error("{} is in use by another cache service", .0.display())]
    InUse(PathBuf),
    /// It cannot be read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
}

impl DiskStore {
    /// Opens the store in `root`, which is made where it is missing. Entries may have up to
    /// `entry_limit` bytes.
    ///
    /// # Errors
    /// Where another service has it, or it cannot be read and written.
    pub fn open(root: &Path, entry_limit: u64) -> Result<Self, OpenError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |error| OpenError::Io { path, error }
        };
        fs::create_dir_all(root).map_err(at(root))?;
        let lock_path = root.join("lock");
        let lock = fs::File::create(&lock_path).map_err(at(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(OpenError::InUse(root.to_owned())),
            Err(fs::TryLockError::Error(error)) => return Err(at(&lock_path)(error)),
        }
        let uploads = root.join("uploads");
        match fs::remove_dir_all(&uploads) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(at(&uploads)(error));
            }
            _ => {}
        }
        for folder in [&uploads, &root.join("entries")] {
            fs::create_dir_all(folder).map_err(at(folder))?;
        }
        let inner = Inner::read(root).map_err(at(&root.join("journal")))?;
        Ok(Self {
            root: root.to_owned(),
            entry_limit,
            inner: Mutex::new(inner),
            _lock: lock,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry_path(&self, entry: u64) -> PathBuf {
        self.root.join("entries").join(entry.to_string())
    }

    fn upload_path(&self, upload: u64) -> PathBuf {
        self.root.join("uploads").join(upload.to_string())
    }

    fn content_path(&self, upload: u64) -> PathBuf {
        self.upload_path(upload).join("content")
    }

    /// Blocks have names that the client chose, so their files have other names.
    fn block_path(&self, upload: u64, block: &str) -> PathBuf {
        self.upload_path(upload)
            .join(format!("block-{}", hex::encode(block)))
    }

    /// Lets a request write to `upload` until what this gives is dropped.
    fn begin_writing(&self, upload: u64) -> Result<Writing<'_>, StoreError> {
        let mut inner = self.lock();
        let found = inner
            .uploads
            .get_mut(&upload)
            .filter(|upload| !upload.committing)
            .ok_or(StoreError::NoSuchUpload)?;
        found.writers += 1;
        Ok(Writing {
            store: self,
            upload,
        })
    }

    /// Moves the content of `upload` to its place as an entry and writes its line.
    fn commit_content(&self, upload: u64, size: u64) -> Result<Entry, StoreError> {
        let content = self.content_path(upload);
        let actual = match fs::metadata(&content) {
            Ok(metadata) => metadata.len(),
            // Nothing was written, as of an empty entry.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::File::create(&content)?;
                0
            }
            Err(error) => return Err(error.into()),
        };
        if actual != size {
            let claimed = size;
            return Err(StoreError::SizeMismatch { actual, claimed });
        }
        let created = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| {
                u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
            });
        let mut inner = self.lock();
        let name = inner
            .uploads
            .get(&upload)
            .map(|upload| upload.name.clone())
            .ok_or(StoreError::NoSuchUpload)?;
        let entry = Entry {
            id: inner.next(),
            name,
            size,
            created,
        };
        fs::rename(&content, self.entry_path(entry.id))?;
        inner.append(&line(&entry)?)?;
        inner.forget_upload(upload);
        inner.names.insert(entry.id, entry.name.clone());
        inner.sizes.insert(entry.id, entry.size);
        inner.index.insert(entry.clone());
        Ok(entry)
    }

    async fn write_to(
        &self,
        file: &mut File,
        offset: u64,
        pieces: impl Stream<Item = Piece> + Send,
    ) -> Result<(), StoreError> {
        let mut end = offset;
        let mut pieces = std::pin::pin!(pieces);
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            end = end.saturating_add(piece.len() as u64);
            if end > self.entry_limit {
                let limit = self.entry_limit;
                return Err(StoreError::TooLarge { limit });
            }
            file.write_all(&piece).await?;
        }
        file.flush().await?;
        Ok(())
    }
}

impl Inner {
    /// Reads the journal and drops what it says of content that is not there.
    fn read(root: &Path) -> io::Result<Self> {
        let path = root.join("journal");
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            read => read?,
        };
        let mut index = Index::default();
        let mut lines = 0;
        let mut next = 1;
        // A line that was cut off by a kill, or is no line of ours, is no entry.
        let entries = text
            .split_inclusive(|byte| *byte == b'\n')
            .inspect(|_| lines += 1)
            .filter(|line| line.ends_with(b"\n"))
            .filter_map(|line| serde_json::from_slice::<Entry>(line).ok());
        for entry in entries {
            next = next.max(entry.id.saturating_add(1));
            let content = root.join("entries").join(entry.id.to_string());
            let size = fs::metadata(&content).map(|metadata| metadata.len());
            if size.is_ok_and(|size| size == entry.size) {
                index.insert(entry);
            }
        }
        let live: HashMap<u64, EntryName> = index
            .iter()
            .map(|entry| (entry.id, entry.name.clone()))
            .collect();
        for content in fs::read_dir(root.join("entries"))? {
            let content = content?;
            let id = content.file_name().to_str().and_then(|id| id.parse().ok());
            // A number stays taken as long as its content is there.
            next = next.max(id.map_or(0, |id: u64| id.saturating_add(1)));
            if id.is_none_or(|id| !live.contains_key(&id)) {
                fs::remove_file(content.path())?;
            }
        }
        if lines != live.len() {
            rewrite(&path, &index)?;
        }
        let journal = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)?;
        Ok(Self {
            sizes: index.iter().map(|entry| (entry.id, entry.size)).collect(),
            index,
            names: live,
            uploads: HashMap::new(),
            reserved: HashMap::new(),
            journal,
            next,
        })
    }

    /// Adds a line to the journal, all of it or nothing: half a line would spoil the next one.
    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let end = self.journal.metadata()?.len();
        self.journal.write_all(line).inspect_err(|_| {
            // Where that fails too, the next start drops the spoilt line.
            let _ = self.journal.set_len(end);
        })
    }

    fn next(&mut self) -> u64 {
        let next = self.next;
        self.next += 1;
        next
    }

    fn forget_upload(&mut self, upload: u64) {
        if let Some(upload) = self.uploads.remove(&upload) {
            self.reserved.remove(&upload.name);
        }
    }

    fn forget_entry(&mut self, entry: u64) {
        if let Some(name) = self.names.remove(&entry) {
            self.index.remove(&name);
        }
        self.sizes.remove(&entry);
    }
}

/// Writes the journal anew, without dead lines, and puts it in place of the old one.
fn rewrite(path: &Path, index: &Index) -> io::Result<()> {
    let mut entries: Vec<&Entry> = index.iter().collect();
    entries.sort_by_key(|entry| entry.id);
    let new = path.with_extension("new");
    let mut file = io::BufWriter::new(fs::File::create(&new)?);
    for entry in entries {
        file.write_all(&line(entry)?)?;
    }
    file.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .sync_all()?;
    fs::rename(new, path)
}

fn line(entry: &Entry) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(entry)?;
    line.push(b'\n');
    Ok(line)
}

impl Store for DiskStore {
    fn reserve(&self, name: EntryName) -> Result<u64, StoreError> {
        let mut inner = self.lock();
        if inner.index.contains(&name) {
            return Err(StoreError::AlreadyExists);
        }
        if let Some(upload) = inner.reserved.get(&name).copied() {
            let abandoned = inner.uploads.get(&upload).is_none_or(Upload::is_abandoned);
            if !abandoned {
                return Err(StoreError::AlreadyExists);
            }
            inner.forget_upload(upload);
            // What its client left goes at the next start, where not now.
            let _ = fs::remove_dir_all(self.upload_path(upload));
        }
        let upload = inner.next();
        fs::create_dir(self.upload_path(upload))?;
        inner.reserved.insert(name.clone(), upload);
        let reserved = Upload {
            name,
            used: Instant::now(),
            writers: 0,
            committing: false,
        };
        inner.uploads.insert(upload, reserved);
        Ok(upload)
    }

    fn check_size(&self, size: u64) -> Result<(), StoreError> {
        let limit = self.entry_limit;
        if size > limit {
            return Err(StoreError::TooLarge { limit });
        }
        Ok(())
    }

    fn upload_of(&self, name: &EntryName) -> Option<u64> {
        self.lock().reserved.get(name).copied()
    }

    fn name_of(&self, upload: u64) -> Option<EntryName> {
        let inner = self.lock();
        inner.uploads.get(&upload).map(|upload| upload.name.clone())
    }

    async fn write(
        &self,
        upload: u64,
        offset: u64,
        whole: bool,
        pieces: impl Stream<Item = Piece> + Send,
    ) -> Result<(), StoreError> {
        let _writing = self.begin_writing(upload)?;
        let mut file = File::options()
            .create(true)
            .write(true)
            .truncate(whole)
            .open(self.content_path(upload))
            .await?;
        file.seek(io::SeekFrom::Start(offset)).await?;
        self.write_to(&mut file, offset, pieces).await
    }

    async fn write_block(
        &self,
        upload: u64,
        block: &str,
        pieces: impl Stream<Item = Piece> + Send,
    ) -> Result<(), StoreError> {
        let _writing = self.begin_writing(upload)?;
        let mut file = File::create(self.block_path(upload, block)).await?;
        self.write_to(&mut file, 0, pieces).await
    }

    async fn join_blocks(&self, upload: u64, blocks: Vec<String>) -> Result<(), StoreError> {
        let _writing = self.begin_writing(upload)?;
        let content = self.content_path(upload);
        let paths: Vec<PathBuf> = blocks
            .iter()
            .map(|block| self.block_path(upload, block))
            .collect();
        let limit = self.entry_limit;
        blocking(move || join(&paths, &content, limit)).await
    }

    async fn commit(&self, upload: u64, size: u64) -> Result<Entry, StoreError> {
        {
            let mut inner = self.lock();
            let found = inner
                .uploads
                .get_mut(&upload)
                .ok_or(StoreError::NoSuchUpload)?;
            if found.writers > 0 || found.committing {
                return Err(StoreError::Busy);
            }
            found.committing = true;
        }
        // Two system calls of microseconds and a line in a file: less than a thread's change.
        let committed = self.commit_content(upload, size);
        if let Some(upload) = self.lock().uploads.get_mut(&upload) {
            upload.committing = false;
        }
        if committed.is_ok() {
            let _ = fs::remove_dir_all(self.upload_path(upload));
        }
        committed
    }

    async fn find(&self, query: &Query<'_>) -> Option<Entry> {
        self.lock().index.find(query).cloned()
    }

    async fn open(&self, entry: u64) -> Option<Content> {
        let size = self.lock().sizes.get(&entry).copied()?;
        let path = self.entry_path(entry);
        let opened = blocking(move || {
            let file = fs::File::open(path)?;
            let length = file.metadata()?.len();
            Ok((file, length))
        });
        match opened.await {
            Ok((file, length)) if length == size => Some(Content::File {
                file: File::from_std(file),
                start: 0,
                size,
            }),
            // Content that was deleted or changed behind our back is no entry any more.
            _ => {
                self.lock().forget_entry(entry);
                None
            }
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| io::Error::other(error).into())
        .and_then(|result| result)
}

fn join(blocks: &[PathBuf], content: &Path, limit: u64) -> Result<(), StoreError> {
    let missing = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => StoreError::NoSuchBlock,
        _ => StoreError::Io(error),
    };
    let total = blocks.iter().try_fold(0u64, |total, block| {
        let length = fs::metadata(block).map_err(missing)?.len();
        Ok::<_, StoreError>(total.saturating_add(length))
    })?;
    if total > limit {
        return Err(StoreError::TooLarge { limit });
    }
    // A list may name a block twice, so blocks stay until the upload ends.
    let mut file = fs::File::create(content)?;
    for block in blocks {
        let mut block = fs::File::open(block).map_err(missing)?;
        io::copy(&mut block, &mut file)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::stream;
    use tokio::io::AsyncReadExt;

    use super::*;

    const LIMIT: u64 = 1 << 20;

    fn name(key: &str) -> EntryName {
        EntryName {
            scope: "s".into(),
            version: "v".to_owned(),
            key: key.to_owned(),
        }
    }

    fn pieces(pieces: &[&'static str]) -> impl Stream<Item = Piece> + Send + use<> {
        let pieces: Vec<Piece> = pieces
            .iter()
            .map(|piece| Ok(Bytes::from_static(piece.as_bytes())))
            .collect();
        stream::iter(pieces)
    }

    async fn put(store: &DiskStore, key: &str, content: &'static str) -> Entry {
        let upload = store.reserve(name(key)).unwrap();
        store
            .write(upload, 0, true, pieces(&[content]))
            .await
            .unwrap();
        store.commit(upload, content.len() as u64).await.unwrap()
    }

    async fn get(store: &DiskStore, key: &str) -> Option<String> {
        let query = Query {
            scopes: &["s".into()],
            version: "v",
            keys: &[key],
        };
        let found = store.find(&query).await?;
        let Content::File { mut file, size, .. } = store.open(found.id).await? else {
            panic!("a store on disk has files");
        };
        let mut text = String::new();
        file.read_to_string(&mut text).await.unwrap();
        assert_eq!(text.len() as u64, size);
        Some(text)
    }

    fn open(root: &Path) -> DiskStore {
        DiskStore::open(root, LIMIT).unwrap()
    }

    #[tokio::test]
    async fn what_was_committed_is_there_after_a_kill_and_half_an_upload_is_not() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        put(&store, "a", "one").await;
        let half = store.reserve(name("b")).unwrap();
        store.write(half, 0, true, pieces(&["tw"])).await.unwrap();
        // A kill runs no destructor but closes the files, which ends the lock.
        drop(store);
        let store = open(root.path());
        assert_eq!(get(&store, "a").await.as_deref(), Some("one"));
        assert_eq!(get(&store, "b").await, None);
        assert_eq!(
            fs::read_dir(root.path().join("uploads")).unwrap().count(),
            0
        );
        put(&store, "b", "two").await;
        assert_eq!(get(&store, "b").await.as_deref(), Some("two"));
    }

    #[tokio::test]
    async fn a_line_that_was_cut_off_is_no_entry_and_hides_no_later_one() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        put(&store, "a", "one").await;
        put(&store, "b", "two").await;
        drop(store);
        let journal = root.path().join("journal");
        let text = fs::read(&journal).unwrap();
        fs::write(&journal, &text[..text.len() - 5]).unwrap();
        let store = open(root.path());
        assert_eq!(get(&store, "a").await.as_deref(), Some("one"));
        assert_eq!(get(&store, "b").await, None);
        put(&store, "c", "three").await;
        drop(store);
        let store = open(root.path());
        assert_eq!(get(&store, "a").await.as_deref(), Some("one"));
        assert_eq!(get(&store, "c").await.as_deref(), Some("three"));
    }

    #[tokio::test]
    async fn content_that_vanished_or_shrank_is_a_miss_and_can_be_written_anew() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let gone = put(&store, "a", "one").await;
        let shrunk = put(&store, "b", "two").await;
        fs::remove_file(store.entry_path(gone.id)).unwrap();
        fs::write(store.entry_path(shrunk.id), "t").unwrap();
        for key in ["a", "b"] {
            assert_eq!(get(&store, key).await, None);
            put(&store, key, "new").await;
            assert_eq!(get(&store, key).await.as_deref(), Some("new"));
        }
        fs::write(store.entry_path(1_000), "stray").unwrap();
        drop(store);
        let store = open(root.path());
        assert_eq!(get(&store, "a").await.as_deref(), Some("new"));
        assert!(!store.entry_path(1_000).exists());
    }

    #[tokio::test]
    async fn one_of_many_reservations_of_a_name_is_granted() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let granted = (0..50).filter(|_| store.reserve(name("a")).is_ok()).count();
        assert_eq!(granted, 1);
    }

    #[tokio::test]
    async fn an_upload_of_another_size_than_claimed_is_not_committed() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let upload = store.reserve(name("a")).unwrap();
        store.write(upload, 0, true, pieces(&["on"])).await.unwrap();
        let error = store.commit(upload, 3).await.unwrap_err();
        assert!(matches!(
            error,
            StoreError::SizeMismatch {
                actual: 2,
                claimed: 3
            }
        ));
        assert_eq!(get(&store, "a").await, None);
        // The client may send the rest.
        store.write(upload, 2, false, pieces(&["e"])).await.unwrap();
        store.commit(upload, 3).await.unwrap();
        assert_eq!(get(&store, "a").await.as_deref(), Some("one"));
        assert!(matches!(
            store.commit(upload, 3).await,
            Err(StoreError::NoSuchUpload)
        ));
    }

    #[tokio::test]
    async fn an_upload_that_is_being_written_is_not_committed() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let upload = store.reserve(name("a")).unwrap();
        let pieces_then_commit =
            stream::once(async { Ok(Bytes::from_static(b"one")) }).chain(stream::once(async {
                // The first piece is written by now, and the file still open.
                assert!(matches!(
                    store.commit(upload, 3).await,
                    Err(StoreError::Busy)
                ));
                Ok(Bytes::new())
            }));
        store
            .write(upload, 0, true, pieces_then_commit)
            .await
            .unwrap();
        store.commit(upload, 3).await.unwrap();
        let late = store.write(upload, 0, true, pieces(&["two"])).await;
        assert!(matches!(late, Err(StoreError::NoSuchUpload)));
        assert_eq!(get(&store, "a").await.as_deref(), Some("one"));
    }

    #[tokio::test]
    async fn blocks_are_joined_in_the_order_of_the_list() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let upload = store.reserve(name("a")).unwrap();
        for (block, text) in [("../2", "two"), ("1", "one"), ("unused", "x")] {
            store
                .write_block(upload, block, pieces(&[text]))
                .await
                .unwrap();
        }
        let list = |blocks: &[&str]| blocks.iter().map(|block| (*block).to_owned()).collect();
        assert!(matches!(
            store.join_blocks(upload, list(&["1", "3"])).await,
            Err(StoreError::NoSuchBlock)
        ));
        store
            .join_blocks(upload, list(&["1", "../2"]))
            .await
            .unwrap();
        store.commit(upload, 6).await.unwrap();
        assert_eq!(get(&store, "a").await.as_deref(), Some("onetwo"));
    }

    #[tokio::test]
    async fn an_upload_beyond_the_limit_is_refused_while_it_runs() {
        let root = tempfile::tempdir().unwrap();
        let store = DiskStore::open(root.path(), 4).unwrap();
        let upload = store.reserve(name("a")).unwrap();
        let error = store.write(upload, 0, true, pieces(&["one", "two"])).await;
        assert!(matches!(error, Err(StoreError::TooLarge { limit: 4 })));
        let error = store.write(upload, u64::MAX, false, pieces(&["x"])).await;
        assert!(error.is_err());
    }

    #[test]
    fn a_folder_serves_one_service_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        assert!(matches!(
            DiskStore::open(root.path(), LIMIT),
            Err(OpenError::InUse(_))
        ));
        drop(store);
        open(root.path());
    }
}
