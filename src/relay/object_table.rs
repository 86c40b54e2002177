//! The table of the objects and packs that the relay knows, and the decisions that depend on them: values,
//! without a clock or a network.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use indexmap::IndexMap;
use tokio::sync::watch;

use crate::cache_client::FoundEntry;
use crate::cache_protocol::ids::EntryId;
use crate::clock::Timestamp;
use crate::digest::Digest;
use crate::packs::chain::ChainState;
use crate::packs::flush::Pending;
use crate::packs::index::{
    BundleMember, Index, Lane, Object, ObjectKey, Pack, RunStats, SMALL_PACK, hours,
};
use crate::packs::local_file::LocalFile;
use crate::packs::pack::OWN;
use crate::relay::disk_tier::SMALL_OBJECT;
use crate::relay::lock;

/// How many objects of a pack the relay fetches alone before it fetches the whole pack.
const SINGLE_READS_BEFORE_PACK: u32 = 2;

/// How many small packs there may be before they are joined.
const SMALL_PACKS: usize = 4;

/// How many bytes of packs one job repacks at most, besides new objects. The next job goes on.
const REPACK_LIMIT: u64 = 96 << 20;

/// How old, in hours, the note of an object's use may be before a job that has nothing else to write writes
/// it again.
const USE_NOTE_AGE: u32 = 24;

/// The first number of what is no object. No relay knows so many objects, and JSON's numbers hold it.
const FIRST_OTHER: u64 = 1 << 40;

/// The number of the object at this position of the table.
fn number_at(position: usize) -> EntryId {
    EntryId(position as u64 + 1)
}

/// The place of an object's bytes.
#[derive(Clone, Debug)]
pub(super) enum Location {
    /// In a file on this machine, from this offset.
    File(Arc<LocalFile>, u64),
    /// In the pack with this number, from this offset of its data.
    Pack(usize, u64),
}

/// An object that this job can read.
#[derive(Clone, Debug)]
pub(super) struct ObjectRecord {
    pub(super) digest: Digest,
    pub(super) length: u64,
    pub(super) location: Location,
    /// Whether this job used or wrote it.
    pub(super) used: bool,
    /// Whether it is pending.
    pending: bool,
}

/// The progress of a download.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) bytes: u64,
    pub(super) failed: bool,
}

/// The state of a pack.
#[derive(Clone, Debug)]
pub(super) enum PackState {
    /// At the cache service; `asked` of its objects were looked up.
    Remote { asked: u32 },
    /// On its way.
    Fetching(watch::Receiver<Progress>, Arc<LocalFile>),
    /// On this machine.
    Local(Arc<LocalFile>),
    /// Unavailable: gone for good, or out of reach in this job.
    Lost { gone: bool },
}

/// A pack that holds objects of this job.
#[derive(Clone, Debug)]
pub(super) struct PackRecord {
    pub(super) name: String,
    /// Where it was found, if that was asked already.
    pub(super) found: Option<FoundEntry>,
    /// The first bytes of its data, if they came along with its index.
    pub(super) first: Vec<u8>,
    pub(super) data_start: u64,
    pub(super) data_length: u64,
    pub(super) state: PackState,
}

impl PackRecord {
    /// The file with the part of the pack that is on this machine.
    pub(super) fn file(&self) -> Option<&Arc<LocalFile>> {
        match &self.state {
            PackState::Local(file) | PackState::Fetching(_, file) => Some(file),
            PackState::Remote { .. } | PackState::Lost { .. } => None,
        }
    }
}

/// An entry of sccache's preprocessor cache, as a pack has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemberRecord {
    pub(super) digest: Digest,
    /// The modification time of its file on sccache's disk when the relay last read it; `None` if it never
    /// did.
    pub(super) seen: Option<SystemTime>,
}

/// The objects and packs that the relay knows, as values.
#[derive(Debug)]
pub(super) struct ObjectTable {
    folder: PathBuf,
    /// The objects in the order in which they became known. Their positions are the numbers by which
    /// sccache knows them, so a removed one leaves its place.
    records: IndexMap<ObjectKey, Option<ObjectRecord>>,
    next: u64,
    pub(super) packs: Vec<PackRecord>,
    pack_numbers: HashMap<String, usize>,
    pub(super) members: HashMap<ObjectKey, MemberRecord>,
    pub(super) used_members: HashSet<ObjectKey>,
    /// The file for objects that this job writes.
    pub(super) spool: Arc<LocalFile>,
    /// The file for objects that were fetched alone.
    pub(super) fetched: Arc<LocalFile>,
    pending: Vec<ObjectKey>,
    pending_bytes: u64,
    pending_since: Option<Duration>,
    /// Whether the relay saves objects at all.
    writable: bool,
    /// How many objects the relay may still fetch alone.
    pub(super) single_reads: u32,
    pub(super) disk_tier: Option<PathBuf>,
}

#[cfg(test)]
impl ObjectTable {
    /// Adds an object that is all of a pack in this state.
    pub(super) fn add_test_object(&mut self, key: ObjectKey, object: &[u8], state: PackState) {
        let pack = self.packs.len();
        self.packs.push(PackRecord {
            name: "pack".to_owned(),
            found: None,
            first: Vec::new(),
            data_start: 0,
            data_length: object.len() as u64,
            state,
        });
        let object = Object {
            offset: 0,
            length: object.len() as u64,
            digest: Digest::of(object),
            used: 0,
        };
        self.add_object(key, &object, pack);
    }
}

impl ObjectTable {
    pub(super) fn new(
        folder: PathBuf,
        spool: Arc<LocalFile>,
        fetched: Arc<LocalFile>,
        writable: bool,
    ) -> Self {
        Self {
            folder,
            records: IndexMap::new(),
            next: FIRST_OTHER,
            packs: Vec::new(),
            pack_numbers: HashMap::new(),
            members: HashMap::new(),
            used_members: HashSet::new(),
            spool,
            fetched,
            pending: Vec::new(),
            pending_bytes: 0,
            pending_since: None,
            writable,
            single_reads: 32,
            disk_tier: None,
        }
    }

    /// A new number for what is no object: sccache knows other entries and uploads by their numbers too.
    pub(super) fn new_number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// The object that sccache knows by this number.
    pub(super) fn by_number(&self, number: EntryId) -> Option<ObjectKey> {
        let position = usize::try_from(number.0.checked_sub(1)?).ok()?;
        let (key, record) = self.records.get_index(position)?;
        record.as_ref().map(|_| *key)
    }

    /// The number of an object that is or was known.
    pub(super) fn number_of(&self, key: ObjectKey) -> Option<EntryId> {
        self.records.get_index_of(&key).map(number_at)
    }

    /// Adds the packs of a scope and their objects. Objects that this job has already stay.
    pub(super) fn add_index(&mut self, chain: &mut ChainState) {
        for (name, pack) in chain.index.oldest_first() {
            let number = match self.pack_numbers.get(name) {
                Some(number) => *number,
                None => {
                    let number = self.packs.len();
                    let (found, first) = chain.found.remove(name).unzip();
                    self.pack_numbers.insert(name.to_owned(), number);
                    self.packs.push(PackRecord {
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
            self.records.reserve(pack.objects.len());
            for (key, object) in pack.objects.iter() {
                self.add_object(*key, object, number);
            }
            for member in pack.bundle.iter().flat_map(|bundle| bundle.members.iter()) {
                let record = MemberRecord {
                    digest: member.digest,
                    seen: None,
                };
                self.members.insert(member.key, record);
            }
        }
    }

    fn add_object(&mut self, key: ObjectKey, object: &Object, pack: usize) {
        let location = Location::Pack(pack, object.offset);
        if let Some(record) = self.object_mut(key) {
            if matches!(record.location, Location::Pack(..)) {
                record.digest = object.digest;
                record.length = object.length;
                record.location = location;
            }
            return;
        }
        let record = ObjectRecord {
            digest: object.digest,
            length: object.length,
            location,
            used: false,
            pending: false,
        };
        self.records.insert(key, Some(record));
    }

    pub(super) fn object(&self, key: ObjectKey) -> Option<&ObjectRecord> {
        self.records.get(&key)?.as_ref()
    }

    fn object_mut(&mut self, key: ObjectKey) -> Option<&mut ObjectRecord> {
        self.records.get_mut(&key)?.as_mut()
    }

    pub(super) fn objects(&self) -> impl Iterator<Item = (&ObjectKey, &ObjectRecord)> {
        let records = self.records.iter();
        records.filter_map(|(key, record)| Some((key, record.as_ref()?)))
    }

    pub(super) fn pack_number(&self, name: &str) -> Option<usize> {
        self.pack_numbers.get(name).copied()
    }

    /// Whether an object is here, or in a pack that is available.
    pub(super) fn is_available(&self, record: &ObjectRecord) -> bool {
        match record.location {
            Location::File(..) => true,
            Location::Pack(pack, _) => {
                let state = self.packs.get(pack).map(|pack| &pack.state);
                state.is_some_and(|state| !matches!(state, PackState::Lost { .. }))
            }
        }
    }

    /// Whether an object is available, as far as the relay knows.
    pub(super) fn has(&self, key: ObjectKey) -> bool {
        self.object(key)
            .is_some_and(|record| self.is_available(record))
    }

    /// Whether a look-up showed that a pack is gone.
    pub(super) fn is_gone(&self, name: &str) -> bool {
        let pack = self
            .pack_number(name)
            .and_then(|number| self.packs.get(number));
        pack.is_some_and(|pack| matches!(pack.state, PackState::Lost { gone: true }))
    }

    /// Notes that this job used the object.
    pub(super) fn mark_used(&mut self, key: ObjectKey) {
        if let Some(record) = self.object_mut(key) {
            record.used = true;
        }
    }

    /// Removes an object whose bytes are missing or damaged.
    pub(super) fn remove(&mut self, key: ObjectKey) {
        let record = self.records.get_mut(&key).and_then(Option::take);
        if record.is_some_and(|record| record.pending) {
            self.pending.retain(|pending| *pending != key);
        }
    }

    /// Notes another location of an object's bytes.
    pub(super) fn relocate(&mut self, key: ObjectKey, location: Location) {
        if let Some(record) = self.object_mut(key) {
            record.location = location;
        }
    }

    /// Adds an object whose bytes are at `offset` of `file`. Returns its number.
    pub(super) fn insert(
        &mut self,
        key: ObjectKey,
        (file, offset): (Arc<LocalFile>, u64),
        (digest, length): (Digest, u64),
        now: Duration,
    ) -> EntryId {
        let waits = self.object(key).is_some_and(|record| record.pending);
        let record = ObjectRecord {
            digest,
            length,
            location: Location::File(file, offset),
            used: true,
            pending: self.writable,
        };
        let (position, _) = self.records.insert_full(key, Some(record));
        if self.writable && !waits {
            self.pending.push(key);
            self.pending_bytes = self.pending_bytes.saturating_add(length);
            self.pending_since.get_or_insert(now);
        }
        number_at(position)
    }

    /// How many objects are pending, and their bytes and age for the flush policy.
    pub(super) fn pending(&self) -> (u64, Pending) {
        let pending = Pending {
            bytes: self.pending_bytes,
            since: self.pending_since,
        };
        (self.pending.len() as u64, pending)
    }

    /// The objects to save next: the pending ones, oldest first, up to `limit` bytes but at least one.
    pub(super) fn batch(&self, limit: u64) -> Vec<ObjectKey> {
        let mut bytes = 0u64;
        let length = |key: &ObjectKey| self.object(*key).map_or(0, |record| record.length);
        self.pending
            .iter()
            .enumerate()
            .take_while(|(position, key)| {
                bytes = bytes.saturating_add(length(key));
                *position == 0 || bytes <= limit
            })
            .map(|(_, key)| *key)
            .collect()
    }

    /// Notes that these objects, the oldest pending ones, are saved.
    pub(super) fn mark_saved(&mut self, batch: &[ObjectKey], now: Duration) {
        for key in batch {
            if let Some(record) = self.object_mut(*key) {
                record.pending = false;
            }
        }
        let mut pending = std::mem::take(&mut self.pending);
        pending.retain(|key| self.object(*key).is_some_and(|record| record.pending));
        self.pending = pending;
        let lengths = self
            .pending
            .iter()
            .filter_map(|key| Some(self.object(*key)?.length));
        self.pending_bytes = lengths.sum();
        self.pending_since = (!self.pending.is_empty()).then_some(now);
    }

    /// Sends later writes to another file, so that the bytes of pending objects can be released once they
    /// are saved. If no file can be created, they stay.
    fn replace_spool(&mut self) {
        let path = self.folder.join(format!("new-{}", self.packs.len()));
        if let Ok(spool) = LocalFile::create(&path) {
            self.spool = spool;
        }
    }

    /// Prepares a pack of so many bytes. Returns whether their bytes are released once it is written, since
    /// sccache's own disk has them. Small packs may be joined with others later, so they stay.
    pub(super) fn start_pack(&mut self, bytes: u64) -> bool {
        let releases = self.disk_tier.is_some() && bytes >= SMALL_PACK;
        if releases {
            self.replace_spool();
        }
        releases
    }

    /// Releases the bytes of these objects, which the new pack `name` has. If sccache looks one up, the
    /// relay fetches it from there.
    pub(super) fn release(&mut self, saved: &[ObjectKey], name: &str, pack: &Pack) {
        let number = self.packs.len();
        self.pack_numbers.insert(name.to_owned(), number);
        self.packs.push(PackRecord {
            name: name.to_owned(),
            found: None,
            first: Vec::new(),
            data_start: pack.data_start,
            data_length: pack.data_length,
            state: PackState::Remote { asked: 0 },
        });
        for key in saved {
            if let Some(object) = pack.objects.get(key)
                && let Some(record) = self.object_mut(*key)
                && record.digest == object.digest
            {
                record.location = Location::Pack(number, object.offset);
            }
        }
    }

    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Stops saving objects.
    pub(super) fn disable_writes(&mut self) {
        self.writable = false;
        for key in std::mem::take(&mut self.pending) {
            if let Some(record) = self.object_mut(key) {
                record.pending = false;
            }
        }
        self.pending_bytes = 0;
        self.pending_since = None;
    }

    /// The next action towards having an object on this machine.
    pub(super) fn next_action(&mut self, key: ObjectKey) -> FetchAction {
        let Some(record) = self.object(key) else {
            return FetchAction::Done(false);
        };
        let length = record.length;
        let Location::Pack(pack, offset) = record.location else {
            return FetchAction::Done(true);
        };
        let end = offset.saturating_add(length);
        match self.packs.get_mut(pack).map(|record| &mut record.state) {
            // A small pack costs no more than one object of it, and a job that reads three objects of a
            // pack will read more.
            Some(PackState::Remote { asked }) => {
                *asked += 1;
                if *asked > SINGLE_READS_BEFORE_PACK || end < SMALL_OBJECT {
                    FetchAction::FetchPack(pack)
                } else {
                    FetchAction::FetchSingle(pack)
                }
            }
            Some(state @ PackState::Fetching(..)) => FetchAction::Wait(state.clone(), end),
            Some(PackState::Local(_)) => FetchAction::Done(true),
            Some(PackState::Lost { .. }) | None => FetchAction::Done(false),
        }
    }

    /// The packs of the own scope to repack into the new one.
    pub(super) fn packs_to_repack(&self, own: &Index, new: &Pack) -> BTreeSet<String> {
        let mut index = own.clone();
        if new.data_length > 0 {
            index.packs.insert(OWN.to_owned(), new.clone());
        }
        let movable = |name: &str| {
            let Some(pack) = own.packs.get(name) else {
                return false;
            };
            let local = self
                .pack_number(name)
                .and_then(|number| self.packs.get(number))
                .is_some_and(|record| matches!(record.state, PackState::Local(_)));
            if local {
                return pack.bundle.is_none() || self.disk_tier.is_some();
            }
            // Or this job wrote the pack.
            let mut members = pack.bundle.iter().flat_map(|bundle| bundle.members.iter());
            let has_members = members.all(|member| {
                let record = self.members.get(&member.key);
                record.is_some_and(|record| record.seen.is_some())
            });
            has_members
                && pack.objects.keys().all(|key| {
                    let record = self.object(*key);
                    record.is_some_and(|record| matches!(record.location, Location::File(..)))
                })
        };
        let small_packs = if new.data_length < SMALL_PACK {
            SMALL_PACKS - 1
        } else {
            SMALL_PACKS
        };
        // Pending objects must not be lost because the rest takes too long to send.
        let mut room = REPACK_LIMIT;
        let candidates = index.repack_candidates(small_packs, movable).into_iter();
        candidates
            .filter(|name| {
                let pack = own.packs.get(name);
                let rest = room.checked_sub(pack.map_or(0, |pack| pack.data_length));
                room = rest.unwrap_or(room);
                rest.is_some()
            })
            .collect()
    }

    /// The file and offset of a pack's object on this machine.
    pub(super) fn bytes_of(
        &self,
        key: ObjectKey,
        pack: &str,
        object: &Object,
    ) -> Option<(Arc<LocalFile>, u64)> {
        if let Some(record) = self.object(key)
            && let Location::File(file, offset) = &record.location
            && record.digest == object.digest
        {
            return Some((file.clone(), *offset));
        }
        let number = self.pack_number(pack)?;
        match &self.packs.get(number)?.state {
            PackState::Local(file) => Some((file.clone(), object.offset)),
            _ => None,
        }
    }

    /// Notes in the index which objects this job used, and which packs its lane wants next time. Returns
    /// whether a note has become so old that it should be written even if nothing else is.
    pub(super) fn note_use(
        &self,
        own: &mut Index,
        others: &[&Index],
        lane: u64,
        (time, run_stats): (Timestamp, Option<RunStats>),
    ) -> bool {
        let is_used = |key: &ObjectKey| self.object(*key).is_some_and(|record| record.used);
        let used_member = |member: &BundleMember| self.used_members.contains(&member.key);
        let hour = hours(time);
        let mut is_due = false;
        // A day is fine enough.
        let is_old = |noted: u32| noted.saturating_add(USE_NOTE_AGE) <= hour;
        let mut note = |noted: &mut u32| {
            *noted = hour;
            is_due = true;
        };
        let mut wanted = BTreeSet::new();
        let mut due: BTreeMap<String, Vec<ObjectKey>> = BTreeMap::new();
        let mut found = HashSet::new();
        for (key, name, object) in own.objects().filter(|(key, ..)| is_used(key)) {
            found.insert(key);
            if !wanted.contains(name) {
                wanted.insert(name.to_owned());
            }
            if is_old(object.used) {
                due.entry(name.to_owned()).or_default().push(*key);
            }
        }
        for index in others {
            let elsewhere = index
                .objects()
                .filter(|(key, ..)| is_used(key) && !found.contains(key));
            let names: BTreeSet<&str> = elsewhere.map(|(_, name, _)| name).collect();
            wanted.extend(names.into_iter().map(str::to_owned));
            let bundled = index.packs.iter().filter(|(_, pack)| {
                let mut members = pack.bundle.iter().flat_map(|bundle| bundle.members.iter());
                members.any(used_member)
            });
            wanted.extend(bundled.map(|(name, _)| name.clone()));
        }
        drop(found);
        for (name, keys) in due {
            let Some(pack) = own.packs.get_mut(&name) else {
                continue;
            };
            for key in keys {
                if let Some(object) = pack.objects.get_mut(&key) {
                    note(&mut object.used);
                }
            }
        }
        for (name, pack) in &mut own.packs {
            let Some(bundle) = &mut pack.bundle else {
                continue;
            };
            if bundle.members.iter().any(used_member) {
                wanted.insert(name.clone());
            }
            let is_due = |member: &BundleMember| used_member(member) && is_old(member.used);
            if bundle.members.iter().any(is_due) {
                let members = Arc::make_mut(&mut bundle.members).iter_mut();
                for member in members.filter(|member| is_due(member)) {
                    note(&mut member.used);
                }
            }
        }
        let before = own
            .lanes
            .get(&lane)
            .into_iter()
            .flat_map(|lane| lane.runs.iter().copied());
        let noted = Lane {
            run: time,
            packs: wanted,
            // A run that did not reach its post step has no results.
            runs: before.chain(run_stats).collect(),
        };
        own.lanes.insert(lane, noted);
        is_due
    }
}

/// The action that brings an object here.
pub(super) enum FetchAction {
    /// Nothing: it is here, or unavailable.
    Done(bool),
    /// Wait until its pack is here up to this offset.
    Wait(PackState, u64),
    /// Fetch it without its pack, which has this number.
    FetchSingle(usize),
    /// Fetch the pack with this number.
    FetchPack(usize),
}

/// The table, as the parts of the relay share it. No holder of the lock waits for anything else.
#[derive(Debug)]
pub(super) struct SharedTable(Mutex<ObjectTable>);

impl SharedTable {
    pub(super) fn new(table: ObjectTable) -> Self {
        Self(Mutex::new(table))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ObjectTable> {
        lock(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LANE: u64 = 7;

    /// A table that has nothing, and its folder.
    fn table() -> (tempfile::TempDir, ObjectTable) {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| LocalFile::create(&folder.path().join(name)).unwrap();
        let (spool, fetched) = (file("new"), file("fetched"));
        let table = ObjectTable::new(folder.path().to_owned(), spool, fetched, true);
        (folder, table)
    }

    fn key(number: u8) -> ObjectKey {
        ObjectKey([number; 32])
    }

    fn object(offset: u64, bytes: &[u8]) -> Object {
        Object {
            offset,
            length: bytes.len() as u64,
            digest: Digest::of(bytes),
            used: 0,
        }
    }

    /// Adds `bytes` to the table as sccache writes them.
    fn write(table: &mut ObjectTable, key: ObjectKey, bytes: &[u8]) -> EntryId {
        let file = table.spool.clone();
        let offset = file.append(bytes).unwrap();
        let measured = (Digest::of(bytes), bytes.len() as u64);
        table.insert(key, (file, offset), measured, Duration::ZERO)
    }

    /// An index with a pack called `name`, of these objects.
    fn index(name: &str, objects: Vec<(ObjectKey, Object)>, length: u64) -> Index {
        let pack = Pack {
            objects: objects.into(),
            data_length: length,
            ..Pack::default()
        };
        let mut index = Index::default();
        index.packs.insert(name.to_owned(), pack);
        index
    }

    #[test]
    fn bytes_of_what_a_pack_has_are_let_go_where_sccaches_disk_has_them() {
        let (folder, mut table) = table();
        let spool = folder.path().join("new");
        let (saved, waits) = (key(1), key(2));
        write(&mut table, saved, b"saved");
        assert!(!table.start_pack(SMALL_PACK));
        table.disk_tier = Some(folder.path().to_owned());
        assert!(!table.start_pack(SMALL_PACK - 1));
        assert!(table.start_pack(SMALL_PACK));
        write(&mut table, waits, b"waits");
        let pack = Pack {
            objects: vec![(saved, object(7, b"saved"))].into(),
            ..Pack::default()
        };
        table.mark_saved(&[saved], Duration::ZERO);
        table.release(&[saved], "pack", &pack);
        assert!(!spool.exists());
        let location = |key| table.object(key).map(|record| record.location.clone());
        assert!(matches!(location(saved), Some(Location::Pack(0, 7))));
        assert!(matches!(location(waits), Some(Location::File(..))));
        assert!(table.has(saved));
        assert_eq!(table.pending().0, 1);
    }

    #[test]
    fn two_objects_of_a_pack_are_fetched_alone_and_then_the_pack_is() {
        let (_folder, mut table) = table();
        let far = SMALL_OBJECT * 2;
        let state = PackState::Remote { asked: 0 };
        table.add_test_object(key(1), b"x", state);
        for (number, offset) in [(2, far), (3, far + 1), (4, far + 2)] {
            table.add_object(key(number), &object(offset, b"x"), 0);
        }
        assert!(matches!(
            table.next_action(key(2)),
            FetchAction::FetchSingle(0)
        ));
        assert!(matches!(
            table.next_action(key(3)),
            FetchAction::FetchSingle(0)
        ));
        assert!(matches!(
            table.next_action(key(4)),
            FetchAction::FetchPack(0)
        ));
        assert!(matches!(
            table.next_action(key(9)),
            FetchAction::Done(false)
        ));
        table.packs[0].state = PackState::Lost { gone: true };
        assert!(matches!(
            table.next_action(key(4)),
            FetchAction::Done(false)
        ));
        assert!(!table.has(key(4)));
        write(&mut table, key(4), b"own");
        assert!(matches!(table.next_action(key(4)), FetchAction::Done(true)));
    }

    #[test]
    fn an_object_near_the_beginning_of_a_pack_has_the_pack_fetched_at_once() {
        let (_folder, mut table) = table();
        table.add_test_object(key(1), b"x", PackState::Remote { asked: 0 });
        assert!(matches!(
            table.next_action(key(1)),
            FetchAction::FetchPack(0)
        ));
    }

    #[test]
    fn what_this_job_wrote_is_not_replaced_by_what_a_pack_has() {
        let (_folder, mut table) = table();
        let number = write(&mut table, key(1), b"own");
        table.add_test_object(key(1), b"others", PackState::Remote { asked: 0 });
        let record = table.object(key(1)).unwrap();
        assert_eq!(record.digest, Digest::of(b"own"));
        assert_eq!(table.number_of(key(1)), Some(number));
        assert_eq!(table.by_number(number), Some(key(1)));
        table.remove(key(1));
        assert_eq!(table.by_number(number), None);
        assert_eq!(table.pending().0, 0);
        assert_eq!(write(&mut table, key(2), b"other").0, number.0 + 1);
        assert_eq!(write(&mut table, key(1), b"again"), number);
        assert_eq!(table.by_number(number), Some(key(1)));
    }

    #[test]
    fn a_batch_has_the_first_objects_up_to_the_limit_and_at_least_one() {
        let (_folder, mut table) = table();
        for number in 1..=3 {
            write(&mut table, key(number), b"12345");
        }
        assert_eq!(table.batch(1), [key(1)]);
        assert_eq!(table.batch(10), [key(1), key(2)]);
        assert_eq!(table.pending().1.bytes, 15);
        table.mark_saved(&[key(1), key(2)], Duration::from_secs(1));
        let (count, pending) = table.pending();
        assert_eq!((count, pending.bytes), (1, 5));
        assert_eq!(pending.since, Some(Duration::from_secs(1)));
        // An object that is written again while it is pending is saved once.
        write(&mut table, key(3), b"123");
        assert_eq!(table.batch(u64::MAX), [key(3)]);
        table.disable_writes();
        write(&mut table, key(4), b"x");
        assert_eq!(table.pending().0, 0);
    }

    #[test]
    fn many_small_packs_that_are_here_become_one_and_those_elsewhere_stay() {
        let (_folder, mut table) = table();
        let mut own = Index::default();
        for number in 1..=6 {
            let name = format!("pack-{number}");
            let record = vec![(key(number), object(0, &[number]))];
            own.packs.extend(index(&name, record, 1).packs);
            if number > 1 {
                write(&mut table, key(number), &[number]);
            }
        }
        let found = table.packs_to_repack(&own, &Pack::default());
        let expected: BTreeSet<String> = (2..=6).map(|number| format!("pack-{number}")).collect();
        assert_eq!(found, expected);
        let few = index("pack", vec![(key(2), object(0, &[2]))], 1);
        assert!(table.packs_to_repack(&few, &Pack::default()).is_empty());
    }

    #[test]
    fn a_lane_notes_the_packs_that_its_run_used_in_any_scope() {
        let (_folder, mut table) = table();
        table.add_test_object(key(1), b"1", PackState::Remote { asked: 0 });
        table.add_test_object(key(2), b"2", PackState::Remote { asked: 0 });
        table.mark_used(key(1));
        table.mark_used(key(2));
        let mut own = index("own", vec![(key(1), object(0, b"1"))], 1);
        let other = index("other", vec![(key(2), object(0, b"2"))], 1);
        let unused = index("unused", vec![(key(3), object(0, b"3"))], 1);
        let time = Timestamp::from_seconds(1_800_000_000);
        let is_due = table.note_use(&mut own, &[&other, &unused], LANE, (time, None));
        // The note was a day old and more.
        assert!(is_due);
        let lane = &own.lanes[&LANE];
        let packs: Vec<&str> = lane.packs.iter().map(String::as_str).collect();
        assert_eq!((lane.run, packs), (time, vec!["other", "own"]));
        let used = own.packs["own"]
            .objects
            .get(&key(1))
            .map(|object| object.used);
        assert_eq!(used, Some(hours(time)));
        assert!(!table.note_use(
            &mut own,
            &[&other],
            LANE,
            (time + Duration::from_secs(60), None)
        ));
    }
}
