//! What sccache asks of the relay: the objects of this job, by the protocol of a cache service.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use tempfile::SpooledTempFile;
use tokio::sync::watch;

use crate::github::cache_client::Found;
use crate::relay::{Relay, lock};
use crate::service::store::{Content, Entry, EntryName, Piece, Query, Store, StoreError};
use crate::store::chain::Known;
use crate::store::flush::Pending;
use crate::store::index::{Digest, Object, ObjectKey};
use crate::store::local::{self, LocalFile};
use crate::words;

/// The largest object that is taken, in bytes: a library of that size costs more to move than to
/// compile.
const OBJECT_LIMIT: u64 = 1 << 30;

/// An upload is in memory up to this size, in bytes, and in a file beyond it.
const UPLOAD_IN_MEMORY: usize = 256 * 1024;

/// An object up to this size, in bytes, is read and checked in one go; a larger one is checked piece
/// by piece and then read once more as it is sent.
const READ_AT_ONCE: u64 = 4 << 20;

/// How many entries that are no objects the relay keeps: sccache's probe is the one there is.
const OTHERS_LIMIT: usize = 64;

/// The largest of these, in bytes.
const OTHER_LIMIT: u64 = 64 * 1024;

/// How many uploads may be under way. A client that was killed leaves its own behind.
const UPLOADS_LIMIT: usize = 512;

/// How long a request waits for the indexes to be read, from the relay's start.
const LOAD_WAIT: Duration = Duration::from_secs(15);

/// Where an object's bytes are.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// In a file on this machine, from this offset.
    File(Arc<LocalFile>, u64),
    /// In the pack with this number, from this offset of its data.
    Pack(usize, u64),
}

/// An object that this job can have.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) number: u64,
    pub(super) digest: Digest,
    pub(super) length: u64,
    pub(super) place: Place,
    /// Whether this job used or wrote it.
    pub(super) used: bool,
    /// Whether it waits to be saved.
    waiting: bool,
}

/// How far a download is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) bytes: u64,
    pub(super) failed: bool,
}

/// Where a pack is.
#[derive(Clone, Debug)]
pub(super) enum PackState {
    /// At the cache service; so many of its objects were asked for.
    Remote { asked: u32 },
    /// On its way.
    Fetching(watch::Receiver<Progress>, Arc<LocalFile>),
    /// On this machine.
    Local(Arc<LocalFile>),
    /// Nowhere that could be found: gone for good, or out of reach in this job.
    Lost { gone: bool },
}

/// A pack that holds objects of this job.
#[derive(Clone, Debug)]
pub(super) struct PackSlot {
    pub(super) name: String,
    /// Where it was found, if that was asked already.
    pub(super) found: Option<Found>,
    /// The first bytes of its data, if they came along with its index.
    pub(super) first: Vec<u8>,
    pub(super) data_start: u64,
    pub(super) data_length: u64,
    pub(super) state: PackState,
}

impl PackSlot {
    /// The file with what of the pack is on this machine.
    pub(super) fn file(&self) -> Option<&Arc<LocalFile>> {
        match &self.state {
            PackState::Local(file) | PackState::Fetching(_, file) => Some(file),
            PackState::Remote { .. } | PackState::Lost { .. } => None,
        }
    }
}

/// An entry of sccache's preprocessor cache, as a pack has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemberSlot {
    pub(super) digest: Digest,
    /// When its file on sccache's disk was last changed as it was last read; `None` where it was
    /// not.
    pub(super) seen: Option<SystemTime>,
}

#[derive(Debug)]
struct Upload {
    name: EntryName,
    content: Arc<Mutex<SpooledTempFile>>,
    blocks: BTreeMap<String, Arc<Mutex<SpooledTempFile>>>,
}

/// All that the relay knows of objects.
#[derive(Debug)]
pub(super) struct Objects {
    folder: PathBuf,
    table: HashMap<ObjectKey, Slot>,
    by_number: HashMap<u64, Named>,
    others: HashMap<String, (u64, Bytes)>,
    uploads: HashMap<u64, Upload>,
    next: u64,
    pub(super) packs: Vec<PackSlot>,
    pack_numbers: HashMap<String, usize>,
    pub(super) members: HashMap<ObjectKey, MemberSlot>,
    pub(super) used_members: HashSet<ObjectKey>,
    /// What is written in this job.
    spool: Arc<LocalFile>,
    /// What was fetched object by object.
    pub(super) fetched: Arc<LocalFile>,
    waiting: Vec<ObjectKey>,
    waiting_bytes: u64,
    waiting_since: Option<Duration>,
    /// Whether objects are saved at all.
    writable: bool,
    /// How many objects may still be fetched one by one.
    pub(super) single_reads: u32,
    pub(super) disk_level: Option<PathBuf>,
}

#[derive(Clone, Debug)]
enum Named {
    Object(ObjectKey),
    Other(String),
}

/// The object that a key of sccache's names: `sccache/a/b/c/abc…`, whatever stands before the last
/// part.
fn object_key(key: &str) -> Option<ObjectKey> {
    key.rsplit('/').next()?.parse().ok()
}

impl Objects {
    pub(super) fn new(
        folder: PathBuf,
        spool: Arc<LocalFile>,
        fetched: Arc<LocalFile>,
        writable: bool,
    ) -> Self {
        Self {
            folder,
            table: HashMap::new(),
            by_number: HashMap::new(),
            others: HashMap::new(),
            uploads: HashMap::new(),
            next: 1,
            packs: Vec::new(),
            pack_numbers: HashMap::new(),
            members: HashMap::new(),
            used_members: HashSet::new(),
            spool,
            fetched,
            waiting: Vec::new(),
            waiting_bytes: 0,
            waiting_since: None,
            writable,
            single_reads: 32,
            disk_level: None,
        }
    }

    fn number(&mut self, named: Named) -> u64 {
        let number = self.next;
        self.next += 1;
        self.by_number.insert(number, named);
        number
    }

    /// Takes in what the packs of a scope hold. What this job has already is not replaced.
    pub(super) fn learn(&mut self, known: &mut Known) {
        for (name, pack) in known.index.oldest_first() {
            let number = match self.pack_numbers.get(name) {
                Some(number) => *number,
                None => {
                    let number = self.packs.len();
                    let (found, first) = known.found.remove(name).unzip();
                    self.pack_numbers.insert(name.to_owned(), number);
                    self.packs.push(PackSlot {
                        name: name.to_owned(),
                        found,
                        first: first.unwrap_or_default(),
                        data_start: pack.data_start,
                        data_length: pack.data_length,
                        state: PackState::Remote { asked: 0 },
                    });
                    number
                }
            };
            for (key, object) in &pack.objects {
                self.learn_object(*key, object, number);
            }
            for member in pack.bundle.iter().flat_map(|bundle| &bundle.members) {
                let slot = MemberSlot {
                    digest: member.digest,
                    seen: None,
                };
                self.members.insert(member.key, slot);
            }
        }
    }

    fn learn_object(&mut self, key: ObjectKey, object: &Object, pack: usize) {
        let place = Place::Pack(pack, object.offset);
        if let Some(slot) = self.table.get_mut(&key) {
            if matches!(slot.place, Place::Pack(..)) {
                slot.digest = object.digest;
                slot.length = object.length;
                slot.place = place;
            }
            return;
        }
        let number = self.number(Named::Object(key));
        let slot = Slot {
            number,
            digest: object.digest,
            length: object.length,
            place,
            used: false,
            waiting: false,
        };
        self.table.insert(key, slot);
    }

    pub(super) fn object(&self, key: ObjectKey) -> Option<&Slot> {
        self.table.get(&key)
    }

    pub(super) fn objects(&self) -> impl Iterator<Item = (&ObjectKey, &Slot)> {
        self.table.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    pub(super) fn pack_number(&self, name: &str) -> Option<usize> {
        self.pack_numbers.get(name).copied()
    }

    /// Whether an object is here, or in a pack that is.
    fn is_somewhere(&self, slot: &Slot) -> bool {
        match slot.place {
            Place::File(..) => true,
            Place::Pack(pack, _) => {
                let state = self.packs.get(pack).map(|pack| &pack.state);
                state.is_some_and(|state| !matches!(state, PackState::Lost { .. }))
            }
        }
    }

    /// Whether an object can be had, as far as is known.
    pub(super) fn has(&self, key: ObjectKey) -> bool {
        self.object(key).is_some_and(|slot| self.is_somewhere(slot))
    }

    /// Whether a pack was looked for and is no more.
    pub(super) fn is_gone(&self, name: &str) -> bool {
        let pack = self
            .pack_number(name)
            .and_then(|number| self.packs.get(number));
        pack.is_some_and(|pack| matches!(pack.state, PackState::Lost { gone: true }))
    }

    /// Notes that this job used the object.
    pub(super) fn used(&mut self, key: ObjectKey) {
        if let Some(slot) = self.table.get_mut(&key) {
            slot.used = true;
        }
    }

    /// Forgets an object whose bytes are not there or not its own.
    pub(super) fn forget(&mut self, key: ObjectKey) {
        if let Some(slot) = self.table.remove(&key) {
            self.by_number.remove(&slot.number);
            if slot.waiting {
                self.waiting.retain(|waiting| *waiting != key);
            }
        }
    }

    /// Puts the bytes of an object in another place.
    pub(super) fn moved(&mut self, key: ObjectKey, place: Place) {
        if let Some(slot) = self.table.get_mut(&key) {
            slot.place = place;
        }
    }

    /// Takes in an object whose bytes are at `offset` of `file`. Gives its number.
    fn wrote(
        &mut self,
        key: ObjectKey,
        (file, offset): (Arc<LocalFile>, u64),
        (digest, length): (Digest, u64),
        now: Duration,
    ) -> u64 {
        let (number, waits) = match self.table.get(&key) {
            Some(slot) => (slot.number, slot.waiting),
            None => (self.number(Named::Object(key)), false),
        };
        let slot = Slot {
            number,
            digest,
            length,
            place: Place::File(file, offset),
            used: true,
            waiting: self.writable,
        };
        self.table.insert(key, slot);
        if self.writable && !waits {
            self.waiting.push(key);
            self.waiting_bytes = self.waiting_bytes.saturating_add(length);
            self.waiting_since.get_or_insert(now);
        }
        number
    }

    /// How many objects wait to be saved, and what the flush policy wants to know of them.
    pub(super) fn pending(&self) -> (u64, Pending) {
        let pending = Pending {
            bytes: self.waiting_bytes,
            since: self.waiting_since,
        };
        (self.waiting.len() as u64, pending)
    }

    /// The objects to be saved next: those that wait, the first ones first, up to `limit` bytes but
    /// at least one.
    pub(super) fn batch(&self, limit: u64) -> Vec<ObjectKey> {
        let mut bytes = 0u64;
        let length = |key: &ObjectKey| self.table.get(key).map_or(0, |slot| slot.length);
        self.waiting
            .iter()
            .enumerate()
            .take_while(|(position, key)| {
                bytes = bytes.saturating_add(length(key));
                *position == 0 || bytes <= limit
            })
            .map(|(_, key)| *key)
            .collect()
    }

    /// Notes that these objects, the first of those that wait, are saved.
    pub(super) fn saved(&mut self, batch: &[ObjectKey], now: Duration) {
        for key in batch {
            if let Some(slot) = self.table.get_mut(key) {
                slot.waiting = false;
            }
        }
        let still_waits = |key: &ObjectKey| self.table.get(key).is_some_and(|slot| slot.waiting);
        self.waiting.retain(still_waits);
        let lengths = self
            .waiting
            .iter()
            .filter_map(|key| Some(self.table.get(key)?.length));
        self.waiting_bytes = lengths.sum();
        self.waiting_since = (!self.waiting.is_empty()).then_some(now);
    }

    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Gives up saving objects.
    pub(super) fn only_read(&mut self) {
        self.writable = false;
        for key in std::mem::take(&mut self.waiting) {
            if let Some(slot) = self.table.get_mut(&key) {
                slot.waiting = false;
            }
        }
        self.waiting_bytes = 0;
        self.waiting_since = None;
    }

    fn upload(&self, upload: u64) -> Result<&Upload, StoreError> {
        self.uploads.get(&upload).ok_or(StoreError::NoSuchUpload)
    }

    fn spooled(&self) -> SpooledTempFile {
        tempfile::spooled_tempfile_in(UPLOAD_IN_MEMORY, &self.folder)
    }
}

/// The digest and the length of what is in `content`, which is then at its beginning again.
fn measure(content: &mut (impl Read + Seek)) -> io::Result<(Digest, u64)> {
    content.seek(SeekFrom::Start(0))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&mut *content)?;
    content.seek(SeekFrom::Start(0))?;
    Ok((Digest::from_hash(hasher.finalize()), hasher.count()))
}

impl Relay {
    /// Keeps an object that sccache wrote. Gives its number, or `None` where the relay has just
    /// that already.
    pub(super) fn keep(
        &self,
        key: ObjectKey,
        content: &mut (impl Read + Seek),
    ) -> io::Result<(u64, u64)> {
        let (digest, length) = measure(content)?;
        {
            let mut objects = lock(&self.objects);
            let same = |slot: &&Slot| slot.digest == digest && slot.length == length;
            let known = objects.table.get(&key).filter(same).cloned();
            if let Some(slot) = known.filter(|slot| objects.is_somewhere(slot)) {
                objects.used(key);
                return Ok((slot.number, length));
            }
        }
        self.has_room(length)?;
        let spool = lock(&self.objects).spool.clone();
        let offset = spool.append_from(content, length)?;
        let now = self.elapsed();
        self.note(|activity| activity.wrote(now.as_secs() / 60));
        let number = lock(&self.objects).wrote(key, (spool, offset), (digest, length), now);
        self.waiting.notify_one();
        Ok((number, length))
    }

    /// Whether the disk may take `length` bytes more.
    fn has_room(&self, length: u64) -> io::Result<()> {
        let floor = self.config.free_floor;
        match local::free(&self.config.folder) {
            Some(free) if free.saturating_sub(length) < floor => Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!(
                    "{} are free on the disk of {}, and nothing more is kept below {}",
                    words::size(free),
                    self.config.folder.display(),
                    words::size(floor)
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Waits until the indexes are read, but not for ever.
    pub(super) async fn is_loaded(&self) {
        let mut loaded = self.loaded.subscribe();
        if *loaded.borrow_and_update() {
            return;
        }
        let rest = LOAD_WAIT.saturating_sub(self.elapsed());
        let _ = tokio::time::timeout(rest, loaded.wait_for(|loaded| *loaded)).await;
    }

    async fn find_object(self: &Arc<Self>, key: ObjectKey) -> Option<(u64, u64)> {
        self.is_loaded().await;
        let found = self.bring(key).await;
        let slot = {
            let mut objects = lock(&self.objects);
            if found {
                objects.used(key);
            }
            objects.object(key).cloned()
        };
        match (found, slot) {
            (true, Some(slot)) => {
                self.note(|activity| activity.hits += 1);
                Some((slot.number, slot.length))
            }
            (_, slot) => {
                self.note(|activity| activity.late += u64::from(slot.is_some()));
                None
            }
        }
    }

    /// The object's bytes, if they are here and its own.
    async fn content(self: &Arc<Self>, key: ObjectKey) -> Option<Content> {
        let (file, offset, slot) = {
            let objects = lock(&self.objects);
            let slot = objects.object(key)?.clone();
            let (file, offset) = match &slot.place {
                Place::File(file, offset) => (file.clone(), *offset),
                Place::Pack(pack, offset) => (objects.packs.get(*pack)?.file()?.clone(), *offset),
            };
            (file, offset, slot)
        };
        let (length, digest) = (slot.length, slot.digest);
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
            self.note(|activity| activity.corrupt += 1);
            lock(&self.objects).forget(key);
        }
        checked
    }
}

impl Store for Arc<Relay> {
    async fn reserve(&self, name: EntryName) -> Result<u64, StoreError> {
        let mut objects = lock(&self.objects);
        // Objects may be written again: sccache does so when it is told to, and two compiles of
        // the same source may end at the same time.
        if object_key(&name.key).is_none()
            && (objects.others.contains_key(&name.key) || objects.others.len() >= OTHERS_LIMIT)
        {
            return Err(StoreError::AlreadyExists);
        }
        if objects.uploads.len() >= UPLOADS_LIMIT
            && let Some(abandoned) = objects.uploads.keys().min().copied()
        {
            objects.uploads.remove(&abandoned);
        }
        let upload = objects.next;
        objects.next += 1;
        let content = Arc::new(Mutex::new(objects.spooled()));
        let blocks = BTreeMap::new();
        let reserved = Upload {
            name,
            content,
            blocks,
        };
        objects.uploads.insert(upload, reserved);
        Ok(upload)
    }

    fn check_size(&self, size: u64) -> Result<(), StoreError> {
        match size > OBJECT_LIMIT {
            true => Err(StoreError::TooLarge {
                limit: OBJECT_LIMIT,
            }),
            false => Ok(()),
        }
    }

    async fn upload_of(&self, name: &EntryName) -> Result<u64, StoreError> {
        let objects = lock(&self.objects);
        let uploads = objects.uploads.iter();
        uploads
            .filter(|(_, upload)| upload.name == *name)
            .map(|(number, _)| *number)
            .min()
            .ok_or(StoreError::NoSuchUpload)
    }

    async fn name_of(&self, upload: u64) -> Result<EntryName, StoreError> {
        let objects = lock(&self.objects);
        Ok(objects.upload(upload)?.name.clone())
    }

    async fn write(
        &self,
        upload: u64,
        offset: u64,
        whole: bool,
        pieces: impl Stream<Item = Piece> + Send,
    ) -> Result<(), StoreError> {
        let content = lock(&self.objects).upload(upload)?.content.clone();
        if whole {
            lock(&content).set_len(0)?;
        }
        write_pieces(self, &content, offset, pieces).await
    }

    async fn write_block(
        &self,
        upload: u64,
        block: &str,
        pieces: impl Stream<Item = Piece> + Send,
    ) -> Result<(), StoreError> {
        let content = {
            let mut objects = lock(&self.objects);
            let content = Arc::new(Mutex::new(objects.spooled()));
            let found = objects.uploads.get_mut(&upload);
            let found = found.ok_or(StoreError::NoSuchUpload)?;
            found.blocks.insert(block.to_owned(), content.clone());
            content
        };
        write_pieces(self, &content, 0, pieces).await
    }

    async fn join_blocks(&self, upload: u64, blocks: Vec<String>) -> Result<(), StoreError> {
        let (content, blocks) = {
            let objects = lock(&self.objects);
            let upload = objects.upload(upload)?;
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

    async fn commit(&self, upload: u64, size: u64) -> Result<Entry, StoreError> {
        let reserved = lock(&self.objects).uploads.remove(&upload);
        let Upload { name, content, .. } = reserved.ok_or(StoreError::NoSuchUpload)?;
        let actual = lock(&content).seek(SeekFrom::End(0))?;
        if actual != size {
            let claimed = size;
            return Err(StoreError::SizeMismatch { actual, claimed });
        }
        let id = match object_key(&name.key) {
            Some(key) => {
                let relay = self.clone();
                let keep = move || relay.keep(key, &mut *lock(&content));
                // What is in memory costs less than a thread's change.
                let kept = match size <= UPLOAD_IN_MEMORY as u64 {
                    true => keep(),
                    false => tokio::task::spawn_blocking(keep)
                        .await
                        .map_err(io::Error::other)?,
                };
                kept.inspect_err(|error| self.trouble("an object was not kept", error))?
                    .0
            }
            None => {
                self.check_other(size)?;
                let mut bytes = Vec::new();
                let mut content = lock(&content);
                content.seek(SeekFrom::Start(0))?;
                content.read_to_end(&mut bytes)?;
                let mut objects = lock(&self.objects);
                let number = objects.number(Named::Other(name.key.clone()));
                objects
                    .others
                    .insert(name.key.clone(), (number, bytes.into()));
                number
            }
        };
        Ok(Entry {
            id,
            name,
            size,
            created: 0,
        })
    }

    async fn find(&self, query: &Query<'_>) -> Option<Entry> {
        for key in query.keys {
            let found = match object_key(key) {
                Some(object) => self.find_object(object).await,
                None => lock(&self.objects)
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
                    created: 0,
                });
            }
        }
        None
    }

    async fn lost(&self, entry: u64) {
        let mut objects = lock(&self.objects);
        if let Some(Named::Object(key)) = objects.by_number.get(&entry).cloned() {
            objects.forget(key);
        }
    }

    async fn open(&self, entry: u64) -> Option<Content> {
        let named = lock(&self.objects).by_number.get(&entry).cloned()?;
        match named {
            Named::Object(key) => self.content(key).await,
            Named::Other(key) => {
                let objects = lock(&self.objects);
                let (_, bytes) = objects.others.get(&key)?;
                Some(Content::Bytes(bytes.clone()))
            }
        }
    }
}

impl Relay {
    fn check_other(&self, size: u64) -> Result<(), StoreError> {
        match size > OTHER_LIMIT {
            true => Err(StoreError::TooLarge { limit: OTHER_LIMIT }),
            false => Ok(()),
        }
    }
}

async fn write_pieces(
    relay: &Arc<Relay>,
    content: &Mutex<SpooledTempFile>,
    offset: u64,
    pieces: impl Stream<Item = Piece> + Send,
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
            .inspect_err(|error| relay.trouble("an object was not kept", error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
