//! The relay as sccache sees it: the trait [`Store`] of the cache protocol, in which each object is an
//! entry.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use tempfile::SpooledTempFile;

use crate::cache_protocol::ids::{EntryId, UploadId};
use crate::cache_protocol::store::{Chunk, Content, Entry, EntryName, Query, Store, StoreError};
use crate::clock::Timestamp;
use crate::digest::Digest;
use crate::format;
use crate::packs::index::{OBJECT_LIMIT, ObjectKey};
use crate::packs::local_file;
use crate::relay::object_table::{Location, ObjectRecord};
use crate::relay::{Relay, lock};

/// An upload is in memory up to this size, in bytes, and in a file beyond it.
const UPLOAD_IN_MEMORY: usize = 256 * 1024;

/// The relay reads and checks an object up to this size, in bytes, in one go. It checks a larger one piece
/// by piece and reads it once more while sending it.
const READ_AT_ONCE: u64 = 4 << 20;

/// How many entries that are no objects the relay keeps. In practice there is one, sccache's probe.
const OTHERS_LIMIT: usize = 64;

/// The largest of these, in bytes.
const OTHER_LIMIT: u64 = 64 * 1024;

/// How many uploads may be under way. A client that was killed leaves its own behind.
const UPLOADS_LIMIT: usize = 512;

/// How long a request waits for the indexes to be read, from the relay's start.
const LOAD_WAIT: Duration = Duration::from_secs(15);

#[derive(Debug)]
struct PendingUpload {
    name: EntryName,
    content: Arc<Mutex<SpooledTempFile>>,
    blocks: BTreeMap<String, Arc<Mutex<SpooledTempFile>>>,
}

/// Uploads that sccache has begun, and entries of its own that are no objects.
#[derive(Debug)]
pub(super) struct Uploads {
    /// The folder for large ones.
    folder: PathBuf,
    under_way: HashMap<UploadId, PendingUpload>,
    /// By their keys, each with its number.
    others: HashMap<String, (EntryId, Bytes)>,
}

impl Uploads {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            under_way: HashMap::new(),
            others: HashMap::new(),
        }
    }

    fn upload(&self, upload: UploadId) -> Result<&PendingUpload, StoreError> {
        self.under_way.get(&upload).ok_or(StoreError::NoSuchUpload)
    }

    fn spooled(&self) -> SpooledTempFile {
        tempfile::spooled_tempfile_in(UPLOAD_IN_MEMORY, &self.folder)
    }

    /// The entry with this number that is no object.
    fn other(&self, number: EntryId) -> Option<Bytes> {
        let mut others = self.others.values();
        others.find_map(|(known, bytes)| (*known == number).then(|| bytes.clone()))
    }
}

/// The object that a key of sccache's names: `sccache/a/b/c/abc…`. Only the last part matters.
fn object_key(key: &str) -> Option<ObjectKey> {
    key.rsplit('/').next()?.parse().ok()
}

/// The digest and the length of `content`. Rewinds it.
fn measure(content: &mut (impl Read + Seek)) -> io::Result<(Digest, u64)> {
    content.seek(SeekFrom::Start(0))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&mut *content)?;
    content.seek(SeekFrom::Start(0))?;
    Ok((Digest::from_hash(hasher.finalize()), hasher.count()))
}

impl Relay {
    /// Stores an object that sccache wrote, unless the relay has the same already. Returns its number and
    /// length.
    pub(super) fn store_object(
        &self,
        key: ObjectKey,
        content: &mut (impl Read + Seek),
    ) -> io::Result<(EntryId, u64)> {
        let (digest, length) = measure(content)?;
        {
            let mut objects = self.table.lock();
            let same = |record: &&ObjectRecord| record.digest == digest && record.length == length;
            let known = objects.object(key).filter(same);
            if known.is_some_and(|record| objects.is_available(record))
                && let Some(number) = objects.number_of(key)
            {
                objects.mark_used(key);
                return Ok((number, length));
            }
        }
        if length > OBJECT_LIMIT {
            // No reader accepts it.
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.has_room(length)?;
        let spool = self.table.lock().spool.clone();
        let offset = spool.append_from(content, length)?;
        let now = self.clock.elapsed();
        self.activity
            .note(|activity| activity.count_write(now.as_secs() / 60));
        let number = self
            .table
            .lock()
            .insert(key, (spool, offset), (digest, length), now);
        self.pending.notify_one();
        Ok((number, length))
    }

    /// An error if `length` more bytes would leave too little free space.
    fn has_room(&self, length: u64) -> io::Result<()> {
        let floor = self.config.free_floor;
        match local_file::free(&self.config.folder) {
            Some(free) if free.saturating_sub(length) < floor => Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!(
                    "{} are free on the disk of {}, and the relay keeps nothing below {}",
                    format::size(free),
                    self.config.folder.display(),
                    format::size(floor)
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Waits until the indexes are read, up to [`LOAD_WAIT`] after the relay's start.
    pub(super) async fn is_loaded(&self) {
        let mut loaded = self.loaded.subscribe();
        if *loaded.borrow_and_update() {
            return;
        }
        let rest = LOAD_WAIT.saturating_sub(self.clock.elapsed());
        let _ = tokio::time::timeout(rest, loaded.wait_for(|loaded| *loaded)).await;
    }

    pub(super) async fn find_object(self: &Arc<Self>, key: ObjectKey) -> Option<(EntryId, u64)> {
        self.is_loaded().await;
        let found = self.downloads.ensure_local(key).await;
        let (known, answer) = {
            let mut objects = self.table.lock();
            let length = objects.object(key).map(|record| record.length);
            let answer = objects.number_of(key).zip(length).filter(|_| found);
            if answer.is_some() {
                objects.mark_used(key);
            }
            (length.is_some(), answer)
        };
        self.activity.note(|activity| match answer {
            Some(_) => activity.hits += 1,
            None => activity.late += u64::from(known),
        });
        answer
    }

    /// The object's bytes, if they are here and undamaged.
    async fn content(self: &Arc<Self>, key: ObjectKey) -> Option<Content> {
        let (file, offset, record) = {
            let objects = self.table.lock();
            let record = objects.object(key)?.clone();
            let (file, offset) = match &record.location {
                Location::File(file, offset) => (file.clone(), *offset),
                Location::Pack(pack, offset) => {
                    (objects.packs.get(*pack)?.file()?.clone(), *offset)
                }
            };
            (file, offset, record)
        };
        let (length, digest) = (record.length, record.digest);
        let checked = if length <= READ_AT_ONCE {
            let bytes = file.read(offset, length).ok();
            bytes
                .filter(|bytes| Digest::of(bytes) == digest)
                .map(|bytes| Content::Bytes(bytes.into()))
        } else {
            let check = move || {
                let good = file.holds(offset, length, digest);
                good.then(|| file.reopen().ok()).flatten()
            };
            let file = tokio::task::spawn_blocking(check).await.ok().flatten();
            file.map(|file| Content::File {
                file: tokio::fs::File::from_std(file),
                start: offset,
                size: length,
            })
        };
        if checked.is_none() {
            self.activity.note(|activity| activity.corrupt += 1);
            self.table.lock().remove(key);
        }
        checked
    }
}

impl Store for Arc<Relay> {
    async fn reserve(&self, name: EntryName) -> Result<UploadId, StoreError> {
        let mut uploads = lock(&self.uploads);
        // Objects may be written again: sccache does so when it is told to, and two compiles of
        // the same source may end at the same time.
        if object_key(&name.key).is_none()
            && (uploads.others.contains_key(&name.key) || uploads.others.len() >= OTHERS_LIMIT)
        {
            return Err(StoreError::AlreadyExists);
        }
        if uploads.under_way.len() >= UPLOADS_LIMIT
            && let Some(abandoned) = uploads.under_way.keys().min().copied()
        {
            uploads.under_way.remove(&abandoned);
        }
        let upload = UploadId(self.table.lock().new_number());
        let content = Arc::new(Mutex::new(uploads.spooled()));
        let blocks = BTreeMap::new();
        let reserved = PendingUpload {
            name,
            content,
            blocks,
        };
        uploads.under_way.insert(upload, reserved);
        Ok(upload)
    }

    fn check_size(&self, size: u64) -> Result<(), StoreError> {
        if size > OBJECT_LIMIT {
            Err(StoreError::TooLarge {
                limit: OBJECT_LIMIT,
            })
        } else {
            Ok(())
        }
    }

    async fn upload_of(&self, name: &EntryName) -> Result<UploadId, StoreError> {
        let uploads = lock(&self.uploads);
        let under_way = uploads.under_way.iter();
        under_way
            .filter(|(_, upload)| upload.name == *name)
            .map(|(number, _)| *number)
            .min()
            .ok_or(StoreError::NoSuchUpload)
    }

    async fn name_of(&self, upload: UploadId) -> Result<EntryName, StoreError> {
        Ok(lock(&self.uploads).upload(upload)?.name.clone())
    }

    async fn write(
        &self,
        upload: UploadId,
        offset: u64,
        truncate: bool,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        let content = lock(&self.uploads).upload(upload)?.content.clone();
        if truncate {
            lock(&content).set_len(0)?;
        }
        write_pieces(self, &content, offset, pieces).await
    }

    async fn write_block(
        &self,
        upload: UploadId,
        block: &str,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        let content = {
            let mut uploads = lock(&self.uploads);
            let content = Arc::new(Mutex::new(uploads.spooled()));
            let found = uploads
                .under_way
                .get_mut(&upload)
                .ok_or(StoreError::NoSuchUpload)?;
            found.blocks.insert(block.to_owned(), content.clone());
            content
        };
        write_pieces(self, &content, 0, pieces).await
    }

    async fn join_blocks(&self, upload: UploadId, blocks: Vec<String>) -> Result<(), StoreError> {
        let (content, blocks) = {
            let uploads = lock(&self.uploads);
            let upload = uploads.upload(upload)?;
            let blocks: Option<Vec<_>> = blocks
                .iter()
                .map(|block| upload.blocks.get(block).cloned())
                .collect();
            (
                upload.content.clone(),
                blocks.ok_or(StoreError::NoSuchBlock)?,
            )
        };
        let mut content = lock(&content);
        content.set_len(0)?;
        content.seek(SeekFrom::Start(0))?;
        for block in blocks {
            let mut block = lock(&block);
            block.seek(SeekFrom::Start(0))?;
            io::copy(&mut *block, &mut *content)?;
        }
        Ok(())
    }

    async fn commit(&self, upload: UploadId, size: u64) -> Result<Entry, StoreError> {
        let content = lock(&self.uploads).upload(upload)?.content.clone();
        let actual = lock(&content).seek(SeekFrom::End(0))?;
        if actual != size {
            // A client that gave a wrong size may commit again.
            let claimed = size;
            return Err(StoreError::SizeMismatch { actual, claimed });
        }
        let reserved = lock(&self.uploads).under_way.remove(&upload);
        let PendingUpload { name, content, .. } = reserved.ok_or(StoreError::NoSuchUpload)?;
        let id = match object_key(&name.key) {
            Some(key) => {
                let relay = self.clone();
                let store = move || relay.store_object(key, &mut *lock(&content));
                // Storing from memory costs less than a change of threads.
                let kept = if size <= UPLOAD_IN_MEMORY as u64 {
                    store()
                } else {
                    tokio::task::spawn_blocking(store)
                        .await
                        .map_err(io::Error::other)?
                };
                kept.inspect_err(|error| self.activity.error("an object was not stored", error))?
                    .0
            }
            None => {
                self.check_other(size)?;
                let mut bytes = Vec::new();
                let mut content = lock(&content);
                content.seek(SeekFrom::Start(0))?;
                content.read_to_end(&mut bytes)?;
                let number = EntryId(self.table.lock().new_number());
                lock(&self.uploads)
                    .others
                    .insert(name.key.clone(), (number, bytes.into()));
                number
            }
        };
        Ok(Entry {
            id,
            name,
            size,
            created: Timestamp::UNIX_EPOCH,
        })
    }

    async fn find(&self, query: &Query<'_>) -> Option<Entry> {
        for key in query.keys {
            let found = match object_key(key) {
                Some(object) => self.find_object(object).await,
                None => lock(&self.uploads)
                    .others
                    .get(*key)
                    .map(|(number, bytes)| (*number, bytes.len() as u64)),
            };
            if let Some((id, size)) = found {
                let scope = query.scopes.first()?.clone();
                let name = EntryName {
                    scope,
                    version: query.version.to_owned(),
                    key: (*key).to_owned(),
                };
                return Some(Entry {
                    id,
                    name,
                    size,
                    created: Timestamp::UNIX_EPOCH,
                });
            }
        }
        None
    }

    async fn mark_missing(&self, entry: EntryId) {
        let mut objects = self.table.lock();
        if let Some(key) = objects.by_number(entry) {
            objects.remove(key);
        }
    }

    async fn open(&self, entry: EntryId) -> Option<Content> {
        let object = self.table.lock().by_number(entry);
        match object {
            Some(key) => self.content(key).await,
            None => lock(&self.uploads).other(entry).map(Content::Bytes),
        }
    }
}

impl Relay {
    fn check_other(&self, size: u64) -> Result<(), StoreError> {
        if size > OTHER_LIMIT {
            Err(StoreError::TooLarge { limit: OTHER_LIMIT })
        } else {
            Ok(())
        }
    }
}

async fn write_pieces(
    relay: &Arc<Relay>,
    content: &Mutex<SpooledTempFile>,
    offset: u64,
    pieces: impl Stream<Item = Chunk> + Send,
) -> Result<(), StoreError> {
    let mut end = offset;
    let mut pieces = std::pin::pin!(pieces);
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        let begin = end;
        end = end.saturating_add(piece.len() as u64);
        relay.check_size(end)?;
        let mut content = lock(content);
        content.seek(SeekFrom::Start(begin))?;
        content
            .write_all(&piece)
            .inspect_err(|error| relay.activity.error("an object was not stored", error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::RelayConfig;

    #[tokio::test]
    async fn a_commit_of_another_size_leaves_the_upload_to_be_committed_with_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let config = RelayConfig::for_test(folder.path().join("relay"));
        let relay = Relay::new(config).unwrap();
        let name = EntryName {
            scope: "job".into(),
            key: "sccache/.sccache_check".to_owned(),
            version: "v".to_owned(),
        };
        let upload = relay.reserve(name).await.unwrap();
        let refused = relay.commit(upload, 7).await;
        assert!(
            matches!(refused, Err(StoreError::SizeMismatch { .. })),
            "{refused:?}"
        );
        let entry = relay.commit(upload, 0).await.unwrap();
        assert_eq!(entry.size, 0);
        let again = relay.commit(upload, 0).await;
        assert!(matches!(again, Err(StoreError::NoSuchUpload)), "{again:?}");
    }

    #[test]
    fn only_sccaches_own_keys_name_objects() {
        let digits = "0b".repeat(32);
        let key = format!("sccache/0/b/0/{digits}");
        assert_eq!(object_key(&key), digits.parse().ok());
        for other in ["sccache/.sccache_check", "", &digits[1..], "a/b/"] {
            assert_eq!(object_key(other), None, "{other}");
        }
    }
}
