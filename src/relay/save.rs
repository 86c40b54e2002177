//! Writing packs: now and then while the build runs, and what is left at the end of the job.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::stream;
use tokio::time::{Instant, sleep_until};

use crate::github::cache_client::CacheError;
use crate::relay::disk_level::{self, Kind};
use crate::relay::fetch::unpack;
use crate::relay::objects::{MemberSlot, PackSlot, PackState, Place};
use crate::relay::{Relay, lock, now};
use crate::store::chain::Known;
use crate::store::flush::{Decision, Limits};
use crate::store::index::{
    Bundle, Digest, Lane, Member, Object, ObjectKey, Pack, SMALL_PACK, hours,
};
use crate::store::local::LocalFile;
use crate::store::pack::{self, OWN, PackError};

/// How many small packs there may be before they become one.
const SMALL_PACKS: usize = 4;

/// How many bytes of packs are moved to a new one at most, beside what is new. The next job goes on.
const MOVED_AT_ONCE: u64 = 96 << 20;

/// How much of a pack is in memory at once as it is sent, in bytes.
const SENT_AT_ONCE: u64 = 256 * 1024;

/// How hard a bundle is compressed: zstd's fastest level but two. Its entries repeat each other, so
/// more effort gains little.
const BUNDLE_LEVEL: i32 = 3;

/// How old, in hours, the note may be that an object was used, before a job that has nothing else
/// to write writes it anew.
const USE_NOTE_AGE: u32 = 24;

/// How often in a row the cache service may fail at the end of a job before the rest is given up:
/// whoever is down is not back in a minute.
const LAST_ATTEMPTS: u32 = 3;

/// What became of an attempt to write a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    /// It was written, or there is no reason to try again.
    Done,
    /// The service wants to be left alone for a while.
    Throttled,
    /// It failed.
    Failed,
}

/// Why no pack was written.
#[derive(Debug, thiserror::Error)]
enum SaveError {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Pack(#[from] PackError),
    #[error("this machine's disk: {0}")]
    Disk(#[from] io::Error),
}

/// A stretch of a file.
#[derive(Clone, Debug)]
struct Segment {
    file: Arc<LocalFile>,
    offset: u64,
    length: u64,
}

/// What a pack is made of.
#[derive(Debug, Default)]
struct Draft {
    pack: Pack,
    segments: Vec<Segment>,
}

impl Draft {
    fn is_empty(&self) -> bool {
        self.pack.bundle.is_none() && self.pack.objects.is_empty()
    }

    fn add(&mut self, segment: Segment) -> u64 {
        let offset = self.pack.data_length;
        self.pack.data_length += segment.length;
        match self.segments.last_mut() {
            // What was written one behind the other is sent in one go.
            Some(last)
                if Arc::ptr_eq(&last.file, &segment.file)
                    && last.offset + last.length == segment.offset =>
            {
                last.length += segment.length;
            }
            _ => self.segments.push(segment),
        }
        offset
    }
}

impl Relay {
    /// Writes packs as the flush policy says.
    pub(super) async fn save_now_and_then(self: Arc<Self>) {
        loop {
            let pending = lock(&self.objects).pending().1;
            let decision = lock(&self.policy).decide(self.elapsed(), pending);
            match decision {
                Decision::Flush => {
                    self.save(false).await;
                }
                Decision::Idle => self.waiting.notified().await,
                Decision::Wait(at) => {
                    let at = Instant::from_std(self.started + at);
                    tokio::select! {
                        () = sleep_until(at) => {}
                        () = self.waiting.notified() => {}
                    }
                }
            }
        }
    }

    /// Writes all that waits, for up to `deadline`.
    pub(super) async fn finish(self: &Arc<Self>, deadline: Duration) {
        let deadline = Instant::now() + deadline;
        let _ = tokio::time::timeout_at(deadline, self.is_loaded()).await;
        let relay = self.clone();
        let work = move || relay.save_cargo(deadline.into_std());
        if let Err(error) = tokio::task::spawn_blocking(work).await {
            self.trouble("what cargo left is not kept", &error);
        }
        self.take_from_disk();
        let work = async {
            let mut failures = 0;
            while failures < LAST_ATTEMPTS {
                let at = lock(&self.policy).earliest(self.elapsed());
                sleep_until(Instant::from_std(self.started + at)).await;
                let pending = lock(&self.objects).pending().1;
                let last = pending.bytes <= Limits::default().bytes;
                match self.save(last).await {
                    Attempt::Done if last => return,
                    Attempt::Done => failures = 0,
                    Attempt::Throttled => {}
                    Attempt::Failed => failures += 1,
                }
            }
        };
        if lock(&self.objects).is_writable() {
            let _ = tokio::time::timeout_at(deadline, work).await;
        }
        if lock(&self.objects).pending().0 > 0 {
            let why = lock(&self.activity).first_setback.clone();
            let why = why.unwrap_or_else(|| "there was no time left".to_owned());
            self.trouble("objects are not saved", &why);
        }
    }

    /// Takes in the objects that are on sccache's disk and that it did not bring to the relay, and
    /// notes which of those that were put there it has used.
    fn take_from_disk(&self) {
        let Some(folder) = lock(&self.objects).disk_level.clone() else {
            return;
        };
        for found in disk_level::scan(&folder) {
            if !found.touched {
                continue;
            }
            match found.kind {
                Kind::Preprocessor => {
                    lock(&self.objects).used_members.insert(found.key);
                }
                Kind::Object => {
                    let known = {
                        let mut objects = lock(&self.objects);
                        objects.used(found.key);
                        objects.object(found.key).is_some()
                    };
                    if !known {
                        let kept = File::open(&found.path)
                            .and_then(|mut file| self.keep(found.key, &mut file));
                        if let Err(error) = kept {
                            self.trouble("an object on sccache's disk was not kept", &error);
                        }
                    }
                }
            }
        }
    }

    /// Writes one pack.
    async fn save(self: &Arc<Self>, last: bool) -> Attempt {
        if !lock(&self.objects).is_writable() {
            return Attempt::Done;
        }
        lock(&self.policy).started(self.elapsed());
        let Err(error) = self.write_pack(last).await else {
            lock(&self.policy).succeeded();
            return Attempt::Done;
        };
        self.setback("a pack was not written", &error);
        let mut policy = lock(&self.policy);
        match &error {
            SaveError::Cache(CacheError::Denied(_)) => {
                if lock(&self.activity).saved_packs > 0 {
                    // The token was good before: it is void after about six hours.
                    self.trouble("objects are no longer saved", &error);
                }
                lock(&self.objects).only_read();
                self.note(|activity| activity.read_only = true);
                Attempt::Done
            }
            SaveError::Cache(CacheError::Throttled { retry_after }) => {
                policy.throttled(self.elapsed(), *retry_after);
                Attempt::Throttled
            }
            _ => {
                policy.failed(self.elapsed());
                Attempt::Failed
            }
        }
    }

    async fn write_pack(self: &Arc<Self>, last: bool) -> Result<(), SaveError> {
        let mut scopes = self.known.lock().await;
        let Some((own, others)) = scopes.split_first_mut() else {
            return Ok(());
        };
        let batch = lock(&self.objects).batch(Limits::default().bytes);
        let time = now();
        let (mut draft, mut members) = self.draft(&batch, &[], time)?;
        let mut moved = BTreeSet::new();
        if last {
            let objects = lock(&self.objects);
            own.index.packs.retain(|name, _| !objects.is_gone(name));
            drop(objects);
            // First, so that nothing is dropped that this job has just used.
            let note_is_due = self.note_use(own, others, time);
            own.index.retain(time, self.config.max_size);
            moved = self.wasteful(own, &draft);
            if !note_is_due && draft.is_empty() && moved.is_empty() {
                return Ok(());
            }
        } else if draft.is_empty() {
            return Ok(());
        }
        let (key, upload) = own.reserve(&self.client, time).await?;
        if !moved.is_empty() {
            // Made anew: the bundle stands before the objects, and now has more in it.
            let bundles = self.moved_bundles(own, &moved);
            (draft, members) = self.draft(&batch, &bundles, time)?;
            self.draft_moved(&mut draft, own, &moved);
        }
        let data_length = draft.pack.data_length;
        let mut index = own.index.clone();
        index.packs.retain(|name, _| !moved.contains(name));
        if !draft.is_empty() {
            index.packs.insert(OWN.to_owned(), draft.pack.clone());
            for (number, lane) in &mut index.lanes {
                let before = lane.packs.len();
                lane.packs.retain(|name| !moved.contains(name));
                // Other lanes find there what was moved.
                if *number == self.config.lane || lane.packs.len() < before {
                    lane.packs.insert(key.clone());
                }
            }
        }
        let head = pack::begin(index.clone())?;
        draft.pack.data_start = head.len() as u64;
        let size = draft.pack.data_start + data_length;
        let body = body(head, std::mem::take(&mut draft.segments));
        self.client.upload(&upload, size, body).await?;
        self.client.commit(upload, size).await?;
        own.committed(&key);
        index.packs.remove(OWN);
        if !draft.is_empty() {
            index.packs.insert(key, draft.pack);
            self.note(|activity| activity.saved_packs += 1);
        }
        own.index = index;
        let mut objects = lock(&self.objects);
        objects.saved(&batch, self.elapsed());
        objects.members.extend(members);
        Ok(())
    }

    /// The bundles of packs to be moved, each with the file that has it, if that is here.
    fn moved_bundles(&self, own: &Known, moved: &BTreeSet<String>) -> Vec<MovedBundle> {
        let objects = lock(&self.objects);
        let packs = own.index.packs.iter();
        let packs = packs.filter(|(name, _)| moved.contains(*name));
        packs
            .filter_map(|(name, pack)| {
                let number = objects.pack_number(name);
                let slot = number.and_then(|number| objects.packs.get(number));
                let file = slot.and_then(PackSlot::file).cloned();
                Some((pack.bundle.clone()?, file))
            })
            .collect()
    }

    /// A pack of these objects, and of the entries of the preprocessor cache that no pack has or
    /// that are in bundles to be moved. Gives what these entries are then.
    fn draft(
        &self,
        keys: &[ObjectKey],
        moved: &[MovedBundle],
        time: u64,
    ) -> Result<(Draft, HashMap<ObjectKey, MemberSlot>), SaveError> {
        let mut draft = Draft::default();
        draft.pack.created = time;
        let members = self.draft_members(&mut draft, moved, time)?;
        self.draft_objects(&mut draft, keys, time);
        Ok((draft, members))
    }

    fn draft_members(
        &self,
        draft: &mut Draft,
        moved: &[MovedBundle],
        time: u64,
    ) -> Result<HashMap<ObjectKey, MemberSlot>, SaveError> {
        let (folder, known) = {
            let objects = lock(&self.objects);
            (objects.disk_level.clone(), objects.members.clone())
        };
        let Some(folder) = folder else {
            return Ok(HashMap::new());
        };
        let members = moved.iter().flat_map(|(bundle, _)| &bundle.members);
        let moved_members: HashMap<ObjectKey, u32> =
            members.map(|member| (member.key, member.used)).collect();
        let path = self.config.folder.join(format!("bundle-{}", unique()));
        let mut bundle = BundleDraft::new(&path)?;
        for found in disk_level::scan(&folder) {
            let before = known.get(&found.key);
            let moves = moved_members.get(&found.key).copied();
            let looked_at = before.is_some_and(|slot| slot.seen == Some(found.modified));
            let may_be_new = before.is_none() || (found.touched && !looked_at);
            if found.kind != Kind::Preprocessor || (!may_be_new && moves.is_none()) {
                continue;
            }
            // sccache may replace it meanwhile; what was read is what counts.
            let Ok(bytes) = fs::read(&found.path) else {
                continue;
            };
            let same = before.is_some_and(|slot| slot.digest == Digest::of(&bytes));
            if same && moves.is_none() {
                continue;
            }
            let used = moves.filter(|_| !found.touched);
            let used = used.unwrap_or_else(|| hours(time));
            bundle.add(found.key, &bytes, used, Some(found.modified))?;
        }
        // What was not put on the disk before the build is moved from pack to pack.
        for (moved, file) in moved {
            let Some(file) = file else {
                continue;
            };
            let unpacked = unpack(file, moved, |key, bytes| {
                let counts = known.get(&key);
                let counts = counts.is_some_and(|slot| slot.digest == Digest::of(bytes));
                match (counts, moved_members.get(&key)) {
                    (true, Some(used)) if !bundle.has(key) => bundle.add(key, bytes, *used, None),
                    _ => Ok(()),
                }
            });
            if let Err(error) = unpacked {
                self.trouble("a part of the preprocessor cache cannot be used", &error);
            }
        }
        let (members, slots) = (bundle.members.clone(), bundle.slots.clone());
        let file = bundle.finish()?;
        if !members.is_empty() {
            let length = file.length();
            let offset = draft.add(Segment {
                file,
                offset: 0,
                length,
            });
            draft.pack.bundle = Some(Bundle {
                offset,
                length,
                members,
            });
        }
        Ok(slots)
    }

    fn draft_objects(&self, draft: &mut Draft, keys: &[ObjectKey], time: u64) {
        let objects = lock(&self.objects);
        for key in keys {
            let Some(slot) = objects.object(*key) else {
                continue;
            };
            let Place::File(file, offset) = &slot.place else {
                continue;
            };
            let segment = Segment {
                file: file.clone(),
                offset: *offset,
                length: slot.length,
            };
            let object = Object {
                offset: draft.add(segment),
                length: slot.length,
                digest: slot.digest,
                used: hours(time),
            };
            draft.pack.objects.insert(*key, object);
        }
    }

    /// Puts what lives in the packs to be moved in the draft.
    fn draft_moved(&self, draft: &mut Draft, own: &Known, moved: &BTreeSet<String>) {
        for (key, (name, object)) in own.index.objects() {
            if !moved.contains(name) || draft.pack.objects.contains_key(&key) {
                continue;
            }
            let Some((file, offset)) = self.bytes_of(key, name, object) else {
                continue;
            };
            // It may have been downloaded and never looked at.
            if !file.holds(offset, object.length, object.digest) {
                continue;
            }
            let segment = Segment {
                file,
                offset,
                length: object.length,
            };
            let offset = draft.add(segment);
            let object = Object { offset, ..*object };
            draft.pack.objects.insert(key, object);
        }
    }

    /// Where an object of a pack lies on this machine.
    fn bytes_of(
        &self,
        key: ObjectKey,
        pack: &str,
        object: &Object,
    ) -> Option<(Arc<LocalFile>, u64)> {
        let objects = lock(&self.objects);
        if let Some(slot) = objects.object(key)
            && let Place::File(file, offset) = &slot.place
            && slot.digest == object.digest
        {
            return Some((file.clone(), *offset));
        }
        let number = objects.pack_number(pack)?;
        match &objects.packs.get(number)?.state {
            PackState::Local(file) => Some((file.clone(), object.offset)),
            _ => None,
        }
    }

    /// The packs of the own scope whose content is better moved to the one being made.
    fn wasteful(&self, own: &Known, draft: &Draft) -> BTreeSet<String> {
        let mut index = own.index.clone();
        if draft.pack.data_length > 0 {
            index.packs.insert(OWN.to_owned(), draft.pack.clone());
        }
        let movable = |name: &str| {
            let Some(pack) = own.index.packs.get(name) else {
                return false;
            };
            let objects = lock(&self.objects);
            let local = objects
                .pack_number(name)
                .and_then(|number| objects.packs.get(number))
                .is_some_and(|slot| matches!(slot.state, PackState::Local(_)));
            if local {
                return pack.bundle.is_none() || objects.disk_level.is_some();
            }
            // Or this job wrote it.
            let mut members = pack.bundle.iter().flat_map(|bundle| &bundle.members);
            let has_members = members.all(|member| {
                let slot = objects.members.get(&member.key);
                slot.is_some_and(|slot| slot.seen.is_some())
            });
            has_members
                && pack.objects.keys().all(|key| {
                    let slot = objects.object(*key);
                    slot.is_some_and(|slot| matches!(slot.place, Place::File(..)))
                })
        };
        let small_packs = match draft.pack.data_length < SMALL_PACK {
            true => SMALL_PACKS - 1,
            false => SMALL_PACKS,
        };
        // What waits must not be lost because the rest takes too long to send.
        let mut room = MOVED_AT_ONCE;
        let wasteful = index.wasteful(small_packs, movable).into_iter();
        wasteful
            .filter(|name| {
                let pack = own.index.packs.get(name);
                let rest = room.checked_sub(pack.map_or(0, |pack| pack.data_length));
                room = rest.unwrap_or(room);
                rest.is_some()
            })
            .collect()
    }

    /// Notes in the index what this job used, and which packs its lane wants next time. Says
    /// whether a note has become so old that it should be written even if nothing else is.
    fn note_use(&self, own: &mut Known, others: &[Known], time: u64) -> bool {
        let objects = lock(&self.objects);
        let used: BTreeSet<ObjectKey> = objects
            .objects()
            .filter(|(_, slot)| slot.used)
            .map(|(key, _)| *key)
            .collect();
        let used_member = |member: &&mut Member| objects.used_members.contains(&member.key);
        let hour = hours(time);
        let mut is_due = false;
        let mut note = |noted: &mut u32| {
            // A day is fine enough.
            if *noted + USE_NOTE_AGE <= hour {
                *noted = hour;
                is_due = true;
            }
        };
        let mut wanted = BTreeSet::new();
        let best: BTreeMap<ObjectKey, String> = own
            .index
            .objects()
            .into_iter()
            .filter(|(key, _)| used.contains(key))
            .map(|(key, (name, _))| (key, name.to_owned()))
            .collect();
        for (key, name) in &best {
            let pack = own.index.packs.get_mut(name);
            if let Some(object) = pack.and_then(|pack| pack.objects.get_mut(key)) {
                note(&mut object.used);
            }
            wanted.insert(name.clone());
        }
        for (name, pack) in &mut own.index.packs {
            let members = pack
                .bundle
                .iter_mut()
                .flat_map(|bundle| &mut bundle.members);
            for member in members.filter(used_member) {
                note(&mut member.used);
                wanted.insert(name.clone());
            }
        }
        for index in others.iter().map(|known| &known.index) {
            let elsewhere = index.objects().into_iter();
            let elsewhere =
                elsewhere.filter(|(key, _)| used.contains(key) && !best.contains_key(key));
            wanted.extend(elsewhere.map(|(_, (name, _))| name.to_owned()));
            let bundled = index.packs.iter().filter(|(_, pack)| {
                let mut members = pack.bundle.iter().flat_map(|bundle| &bundle.members);
                members.any(|member| objects.used_members.contains(&member.key))
            });
            wanted.extend(bundled.map(|(name, _)| name.clone()));
        }
        let before = own.index.lanes.get(&self.config.lane);
        let lane = Lane {
            run: time,
            packs: wanted,
            // A run that did not come to its post step says nothing of what came of it.
            last: lock(&self.ran).or(before.and_then(|lane| lane.last)),
        };
        own.index.lanes.insert(self.config.lane, lane);
        is_due
    }
}

/// A number that no other call in this process got.
fn unique() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A bundle that is to be moved, with the file of its pack, if that is here.
type MovedBundle = (Bundle, Option<Arc<LocalFile>>);

/// A bundle that is being made.
struct BundleDraft {
    file: Arc<LocalFile>,
    encoder: zstd::Encoder<'static, Appending>,
    members: Vec<Member>,
    slots: HashMap<ObjectKey, MemberSlot>,
}

impl BundleDraft {
    fn new(path: &Path) -> io::Result<Self> {
        let file = LocalFile::create(path)?;
        let encoder = zstd::Encoder::new(Appending(file.clone()), BUNDLE_LEVEL)?;
        Ok(Self {
            file,
            encoder,
            members: Vec::new(),
            slots: HashMap::new(),
        })
    }

    fn has(&self, key: ObjectKey) -> bool {
        self.slots.contains_key(&key)
    }

    fn add(
        &mut self,
        key: ObjectKey,
        bytes: &[u8],
        used: u32,
        seen: Option<SystemTime>,
    ) -> io::Result<()> {
        let slot = MemberSlot {
            digest: Digest::of(bytes),
            seen,
        };
        self.encoder.write_all(bytes)?;
        self.members.push(Member {
            key,
            length: bytes.len() as u64,
            digest: slot.digest,
            used,
        });
        self.slots.insert(key, slot);
        Ok(())
    }

    /// The file with the bundle.
    fn finish(self) -> io::Result<Arc<LocalFile>> {
        self.encoder.finish()?;
        Ok(self.file)
    }
}

/// Writes at the end of a file.
struct Appending(Arc<LocalFile>);

impl Write for Appending {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.append(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The bytes of an entry, read as they are sent.
fn body(
    head: Vec<u8>,
    segments: Vec<Segment>,
) -> impl stream::Stream<Item = io::Result<Bytes>> + Send + 'static {
    let state = (
        Some(Bytes::from(head)),
        segments.into_iter(),
        None::<Segment>,
    );
    stream::unfold(state, |(head, mut segments, current)| async move {
        if let Some(head) = head {
            return Some((Ok(head), (None, segments, None)));
        }
        let mut segment = match current {
            Some(segment) => segment,
            None => segments.next()?,
        };
        let length = segment.length.min(SENT_AT_ONCE);
        let read = segment.file.read(segment.offset, length).map(Bytes::from);
        segment.offset += length;
        segment.length -= length;
        let rest = (segment.length > 0).then_some(segment);
        Some((read, (None, segments, rest)))
    })
}
