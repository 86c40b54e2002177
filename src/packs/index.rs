//! The index of the packs of one scope, and how the indexes of concurrent jobs merge.
//!
//! Merging is commutative, associative and idempotent, so jobs that never heard of each other end
//! with the same index, in whatever order they learn of each other.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::digest::Digest;

/// How long, in hours, an unused object stays in an index: as long as GitHub keeps an entry that nobody
/// reads (its documentation of dependency caching: seven days).
pub const LIFETIME: u32 = 7 * 24;

/// For how long jobs look up an entry again that exists and could not be read. Its writer may
/// still be uploading it; a writer that was killed will never finish it.
pub const UNMERGED_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// The largest object that the store takes, in bytes: a library of that size costs more to move than to
/// compile.
pub const OBJECT_LIMIT: u64 = 1 << 30;

/// How many runs of a lane an index keeps.
pub const RUNS_KEPT: usize = 20;

/// The relay joins packs smaller than this, in bytes, when there are several.
pub const SMALL_PACK: u64 = 8 << 20;

/// The key of an object of sccache's: the 256 bits that its 64 hexadecimal digits stand for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectKey(pub [u8; 32]);

impl fmt::Display for ObjectKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for ObjectKey {
    type Err = hex::FromHexError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut key = [0; 32];
        // Two spellings of one key would be two files on sccache's disk.
        if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(hex::FromHexError::InvalidHexCharacter { c: 'A', index: 0 });
        }
        hex::decode_to_slice(text, &mut key)?;
        Ok(Self(key))
    }
}

/// An object in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Object {
    /// Its offset in the pack's data, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Its digest.
    pub digest: Digest,
    /// When it was last used, in hours since 1970.
    pub used: u32,
}

impl Object {
    pub(super) fn identity(&self) -> (u64, u64, Digest) {
        (self.offset, self.length, self.digest)
    }
}

/// Objects by their keys. A clone shares them until one of the two is changed: the relay copies the index
/// for each pack that it writes, and most of the packs in it stay as they were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(ObjectKey, Object)>", into = "Vec<(ObjectKey, Object)>")]
pub struct ObjectMap(Arc<Vec<(ObjectKey, Object)>>);

impl From<Vec<(ObjectKey, Object)>> for ObjectMap {
    /// If several objects have one key, the last counts.
    fn from(mut objects: Vec<(ObjectKey, Object)>) -> Self {
        objects.sort_by_key(|(key, _)| *key);
        // The first of equal ones stays, so from the end.
        objects.reverse();
        objects.dedup_by_key(|(key, _)| *key);
        objects.reverse();
        objects.shrink_to_fit();
        Self(Arc::new(objects))
    }
}

impl From<ObjectMap> for Vec<(ObjectKey, Object)> {
    fn from(objects: ObjectMap) -> Self {
        Arc::unwrap_or_clone(objects.0)
    }
}

impl FromIterator<(ObjectKey, Object)> for ObjectMap {
    fn from_iter<T: IntoIterator<Item = (ObjectKey, Object)>>(objects: T) -> Self {
        Self::from(objects.into_iter().collect::<Vec<_>>())
    }
}

impl<const COUNT: usize> From<[(ObjectKey, Object); COUNT]> for ObjectMap {
    fn from(objects: [(ObjectKey, Object); COUNT]) -> Self {
        objects.into_iter().collect()
    }
}

impl std::ops::Index<&ObjectKey> for ObjectMap {
    type Output = Object;

    fn index(&self, key: &ObjectKey) -> &Object {
        #[allow(clippy::expect_used, reason = "what an index operator does")]
        self.get(key).expect("the key is there")
    }
}

impl ObjectMap {
    fn position(&self, key: &ObjectKey) -> Result<usize, usize> {
        self.0.binary_search_by_key(key, |(key, _)| *key)
    }

    /// The objects in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&ObjectKey, &Object)> {
        self.0.iter().map(|(key, object)| (key, object))
    }

    /// The keys in their order.
    pub fn keys(&self) -> impl Iterator<Item = &ObjectKey> {
        self.iter().map(|(key, _)| key)
    }

    /// The objects without their keys.
    pub fn values(&self) -> impl Iterator<Item = &Object> {
        self.iter().map(|(_, object)| object)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The object with this key.
    pub fn get(&self, key: &ObjectKey) -> Option<&Object> {
        let (_, object) = self.0.get(self.position(key).ok()?)?;
        Some(object)
    }

    /// The object with this key, to be changed.
    pub fn get_mut(&mut self, key: &ObjectKey) -> Option<&mut Object> {
        let position = self.position(key).ok()?;
        let (_, object) = Arc::make_mut(&mut self.0).get_mut(position)?;
        Some(object)
    }

    /// Whether there is one with this key.
    pub fn contains_key(&self, key: &ObjectKey) -> bool {
        self.position(key).is_ok()
    }

    /// Inserts an object. For many of them [`ObjectMap::from`] is quicker.
    pub fn insert(&mut self, key: ObjectKey, object: Object) {
        let position = self.position(&key);
        let objects = Arc::make_mut(&mut self.0);
        match position {
            Ok(position) => {
                if let Some(there) = objects.get_mut(position) {
                    there.1 = object;
                }
            }
            Err(position) => objects.insert(position, (key, object)),
        }
    }

    /// Keeps the objects for which `keep` returns true.
    pub fn retain(&mut self, mut keep: impl FnMut(&Object) -> bool) {
        if self.values().all(&mut keep) {
            return;
        }
        Arc::make_mut(&mut self.0).retain(|(_, object)| keep(object));
    }

    /// Lowers each later time of use to `hour`.
    fn clamp_times(&mut self, hour: u32) {
        if self.values().any(|object| object.used > hour) {
            for (_, object) in Arc::make_mut(&mut self.0) {
                object.used = object.used.min(hour);
            }
        }
    }

    /// Whether both are the same memory.
    fn is_shared_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn merge(&mut self, other: Self) {
        if self.is_shared_with(&other) {
            return;
        }
        if self.is_empty() {
            *self = other;
            return;
        }
        let mut new = Vec::new();
        for (key, theirs) in other.iter() {
            let Some(mine) = self.get(key) else {
                new.push((*key, *theirs));
                continue;
            };
            let merged = match mine.identity().cmp(&theirs.identity()) {
                Ordering::Greater => continue,
                Ordering::Less => *theirs,
                Ordering::Equal if mine.used >= theirs.used => continue,
                Ordering::Equal => *theirs,
            };
            self.insert(*key, merged);
        }
        if !new.is_empty() {
            let mine = std::mem::take(self);
            *self = Vec::from(mine).into_iter().chain(new).collect();
        }
    }
}

/// An entry of sccache's preprocessor cache in a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BundleMember {
    /// Its key: of another kind than the keys of objects.
    pub key: ObjectKey,
    /// Its length in bytes, uncompressed.
    pub length: u64,
    /// Its digest.
    pub digest: Digest,
    /// When it was last used, in hours since 1970.
    pub used: u32,
}

/// Entries of sccache's preprocessor cache, compressed together: they repeat the same headers, and
/// all of them are wanted before the first compile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    /// Its offset in the pack's data, in bytes.
    pub offset: u64,
    /// Its length in bytes, compressed with zstd.
    pub length: u64,
    /// Its entries, one behind the other. Clones share them.
    pub members: Arc<Vec<BundleMember>>,
}

impl Bundle {
    pub(super) fn identity(&self) -> (u64, u64, Vec<(ObjectKey, u64, Digest)>) {
        let members = self
            .members
            .iter()
            .map(|member| (member.key, member.length, member.digest));
        (self.offset, self.length, members.collect())
    }

    /// Whether it is the same but for when its entries were used.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (Arc::ptr_eq(&self.members, &other.members) && self.offset == other.offset)
            || self.identity() == other.identity()
    }

    /// Its length in bytes, uncompressed.
    pub fn raw_length(&self) -> u64 {
        let lengths = self.members.iter().map(|member| member.length);
        lengths.fold(0, u64::saturating_add)
    }

    fn merge(&mut self, other: Self) {
        if Arc::ptr_eq(&self.members, &other.members) && self.offset == other.offset {
            return;
        }
        match self.identity().cmp(&other.identity()) {
            Ordering::Greater => {}
            Ordering::Less => *self = other,
            Ordering::Equal => {
                let members = Arc::make_mut(&mut self.members).iter_mut();
                for (mine, theirs) in members.zip(other.members.iter()) {
                    mine.used = mine.used.max(theirs.used);
                }
            }
        }
    }
}

/// A pack: one immutable cache entry with the content of many objects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pack {
    /// When it was written, in whole seconds.
    pub created: Timestamp,
    /// The offset of its data in the cache entry, in bytes.
    pub data_start: u64,
    /// The length of its data in bytes.
    pub data_length: u64,
    /// Its part of the preprocessor cache.
    pub bundle: Option<Bundle>,
    /// Its objects.
    pub objects: ObjectMap,
}

impl Pack {
    /// Tells this pack from another one of the same name: the service may give the key of an evicted entry
    /// to another job.
    pub(super) fn identity(&self) -> (Timestamp, u64, u64) {
        (self.created, self.data_start, self.data_length)
    }

    /// Merges `other` into this: both if they are the same pack, else the later one replaces the other.
    fn merge(&mut self, other: Self) {
        match self.identity().cmp(&other.identity()) {
            Ordering::Greater => return,
            Ordering::Less => {
                *self = other;
                return;
            }
            Ordering::Equal => {}
        }
        match (&mut self.bundle, other.bundle) {
            (Some(mine), Some(theirs)) => mine.merge(theirs),
            (mine @ None, theirs) => *mine = theirs,
            (Some(_), None) => {}
        }
        self.objects.merge(other.objects);
    }

    /// When any object or entry in it was last used, in hours since 1970.
    pub fn used(&self) -> u32 {
        let members = self
            .bundle
            .iter()
            .flat_map(|bundle| bundle.members.iter())
            .map(|member| member.used);
        let objects = self.objects.values().map(|object| object.used);
        members.chain(objects).max().unwrap_or(0)
    }

    fn is_empty(&self) -> bool {
        self.bundle.is_none() && self.objects.is_empty()
    }

    /// Whether all its objects and its bundle lie within its data.
    pub fn is_sound(&self) -> bool {
        let within = |offset: u64, length: u64| {
            offset
                .checked_add(length)
                .is_some_and(|end| end <= self.data_length)
        };
        let bundle = self.bundle.as_ref();
        bundle.is_none_or(|bundle| within(bundle.offset, bundle.length))
            && self
                .objects
                .values()
                .all(|object| within(object.offset, object.length))
            && self.data_start.checked_add(self.data_length).is_some()
    }
}

/// The last runs of a job (the same workflow, job and matrix entry).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Lane {
    /// When the last run began, in whole seconds.
    pub run: Timestamp,
    /// The packs that it used.
    pub packs: BTreeSet<String>,
    /// The results of the last runs that reported any. They are in the index since that takes least: about
    /// eight bytes a run, where an object of its own takes sixty and a part of a pack.
    pub runs: Runs,
}

impl Lane {
    /// Merges `other` into this: the packs of the later run, and the last runs of both.
    fn merge(&mut self, other: Self) {
        self.runs.merge(&other.runs);
        if (self.run, &self.packs) < (other.run, &other.packs) {
            self.run = other.run;
            self.packs = other.packs;
        }
    }
}

/// The last runs of a lane, the last one at the end: at most [`RUNS_KEPT`], no two of them equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "Vec<RunStats>", into = "Vec<RunStats>")]
pub struct Runs(Vec<RunStats>);

impl FromIterator<RunStats> for Runs {
    /// Equal runs count once: they are the same run in two indexes.
    fn from_iter<T: IntoIterator<Item = RunStats>>(runs: T) -> Self {
        let mut runs: Vec<RunStats> = runs.into_iter().collect();
        runs.sort_unstable_by(|one, other| other.cmp(one));
        runs.dedup();
        runs.truncate(RUNS_KEPT);
        runs.reverse();
        Self(runs)
    }
}

impl From<Vec<RunStats>> for Runs {
    fn from(runs: Vec<RunStats>) -> Self {
        runs.into_iter().collect()
    }
}

impl From<Runs> for Vec<RunStats> {
    fn from(runs: Runs) -> Self {
        runs.0
    }
}

impl Runs {
    /// The runs, the last one at the end.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &RunStats> {
        self.0.iter()
    }

    /// The last one.
    pub fn last(&self) -> Option<RunStats> {
        self.0.last().copied()
    }

    /// Merges `other` into this.
    pub fn merge(&mut self, other: &Self) {
        if self != other {
            *self = self.iter().chain(other.iter()).copied().collect();
        }
    }

    /// Adds the runs of `other` that ended before the first of these.
    pub fn extend_backwards(&mut self, other: &Self) {
        let first = self.0.first().map_or(Timestamp::MAX, |run| run.ended);
        let before = other.iter().filter(|run| run.ended < first);
        *self = self.iter().chain(before).copied().collect();
    }

    /// Lowers each later end to `now`.
    fn clamp_times(&mut self, now: Timestamp) {
        if self.last().is_some_and(|run| run.ended > now) {
            let runs = self.iter().map(|run| RunStats {
                ended: run.ended.min(now),
                ..*run
            });
            *self = runs.collect();
        }
    }
}

/// The results of a run, as its own summary gave them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RunStats {
    /// When it ended, in whole seconds.
    pub ended: Timestamp,
    /// Compiles that came from the cache.
    pub hits: u64,
    /// Compiles that were looked up there.
    pub lookups: u64,
    /// The compiler time that the hits saved, in seconds; `None` if it is unknown.
    pub saved: Option<u64>,
}

impl RunStats {
    /// The share of the hits, from 0 to 1; `None` if nothing was looked up.
    pub fn hit_rate(&self) -> Option<f64> {
        // Counters stay far below the 2^53 from which on a float is inexact.
        #[allow(clippy::cast_precision_loss)]
        (self.lookups > 0).then(|| self.hits.min(self.lookups) as f64 / self.lookups as f64)
    }
}

/// The packs of one scope and their objects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// The packs by the keys of their cache entries.
    pub packs: BTreeMap<String, Pack>,
    /// The lanes by their numbers.
    pub lanes: BTreeMap<u64, Lane>,
    /// Keys of entries that are known to exist and whose index is not in this one, with when that
    /// became known, in whole seconds.
    pub unmerged: BTreeMap<String, Timestamp>,
}

impl Index {
    /// Merges `other` into this.
    pub fn merge(&mut self, other: Self) {
        for (name, pack) in other.packs {
            match self.packs.get_mut(&name) {
                Some(mine) => mine.merge(pack),
                None => {
                    self.packs.insert(name, pack);
                }
            }
        }
        for (number, lane) in other.lanes {
            match self.lanes.get_mut(&number) {
                Some(mine) => mine.merge(lane),
                None => {
                    self.lanes.insert(number, lane);
                }
            }
        }
        for (key, since) in other.unmerged {
            self.unmerged
                .entry(key)
                .and_modify(|mine| *mine = since.min(*mine))
                .or_insert(since);
        }
    }

    /// Lowers each later time to `now`. The writer's clock may have been wrong, and
    /// an object used in a hundred years would never be dropped.
    pub fn clamp_times(&mut self, now: Timestamp) {
        let hour = hours(now);
        for pack in self.packs.values_mut() {
            pack.created = pack.created.min(now);
            pack.objects.clamp_times(hour);
            let Some(bundle) = &mut pack.bundle else {
                continue;
            };
            if bundle.members.iter().any(|member| member.used > hour) {
                for member in Arc::make_mut(&mut bundle.members) {
                    member.used = member.used.min(hour);
                }
            }
        }
        for lane in self.lanes.values_mut() {
            lane.run = lane.run.min(now);
            lane.runs.clamp_times(now);
        }
        for since in self.unmerged.values_mut() {
            *since = now.min(*since);
        }
    }

    /// Each object, with the pack to read it from: the newest of those that have it.
    pub fn objects(&self) -> impl Iterator<Item = (&ObjectKey, &str, &Object)> {
        let count = self.packs.values().map(|pack| pack.objects.len()).sum();
        let mut found = HashSet::with_capacity(count);
        let newest_first = self.oldest_first().into_iter().rev();
        let objects = newest_first.flat_map(|(name, pack)| {
            let objects = pack.objects.iter();
            objects.map(move |(key, object)| (key, name, object))
        });
        objects.filter(move |(key, ..)| found.insert(*key))
    }

    /// The packs by age, then by name.
    pub fn oldest_first(&self) -> Vec<(&str, &Pack)> {
        let mut packs: Vec<(&str, &Pack)> = self
            .packs
            .iter()
            .map(|(name, pack)| (name.as_str(), pack))
            .collect();
        packs.sort_by_key(|(name, pack)| (pack.created, *name));
        packs
    }

    /// The length in bytes of all packs' data.
    pub fn size(&self) -> u64 {
        let lengths = self.packs.values().map(|pack| pack.data_length);
        lengths.fold(0, u64::saturating_add)
    }

    /// Drops objects that nobody has used for [`LIFETIME`], and then the packs that were used the longest
    /// ago until all packs together have at most `limit` bytes.
    pub fn retain(&mut self, now: Timestamp, limit: u64) {
        let oldest = hours(now).saturating_sub(LIFETIME);
        for pack in self.packs.values_mut() {
            pack.objects.retain(|object| object.used >= oldest);
            let members = pack.bundle.iter().flat_map(|bundle| bundle.members.iter());
            // A bundle is read as a whole.
            if members.map(|member| member.used).max() < Some(oldest) {
                pack.bundle = None;
            }
        }
        self.packs.retain(|_, pack| !pack.is_empty());
        let mut size = self.size();
        let mut by_use: Vec<(u32, Timestamp, String)> = self
            .packs
            .iter()
            .map(|(name, pack)| (pack.used(), pack.created, name.clone()))
            .collect();
        by_use.sort();
        for (_, _, name) in by_use {
            if size <= limit {
                break;
            }
            if let Some(pack) = self.packs.remove(&name) {
                size = size.saturating_sub(pack.data_length);
            }
        }
        self.lanes.retain(|_, lane| hours(lane.run) >= oldest);
        self.unmerged
            .retain(|_, since| *since + UNMERGED_LIFETIME >= now);
    }

    /// The packs to move to a new pack: more than half of the pack is dead (dropped, or also in a newer
    /// pack), or the pack is small and there are at least `small` such packs. `movable` says which packs
    /// can be moved at all.
    pub fn repack_candidates(
        &self,
        small: usize,
        movable: impl Fn(&str) -> bool,
    ) -> BTreeSet<String> {
        let mut live: BTreeMap<&str, u64> = BTreeMap::new();
        for (_, name, object) in self.objects() {
            let bytes = live.entry(name).or_default();
            *bytes = bytes.saturating_add(object.length);
        }
        let mut repack_candidates = BTreeSet::new();
        let mut smalls = BTreeSet::new();
        for (name, pack) in self.packs.iter().filter(|(name, _)| movable(name)) {
            let bundle = pack.bundle.as_ref().map_or(0, |bundle| bundle.length);
            let live = live.get(name.as_str()).copied().unwrap_or(0);
            if live.saturating_add(bundle).saturating_mul(2) < pack.data_length {
                repack_candidates.insert(name.clone());
            } else if pack.data_length < SMALL_PACK {
                smalls.insert(name.clone());
            }
        }
        if smalls.len() >= small {
            repack_candidates.append(&mut smalls);
        }
        repack_candidates
    }
}

/// The whole hours since 1970 at that time.
pub fn hours(time: Timestamp) -> u32 {
    u32::try_from(time.seconds() / 3600).unwrap_or(u32::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn key(byte: u8) -> ObjectKey {
        ObjectKey([byte; 32])
    }

    pub(crate) fn object(offset: u64, length: u64, used: u32) -> Object {
        Object {
            offset,
            length,
            digest: Digest::of(b"x"),
            used,
        }
    }

    fn pack(created: u64, objects: &[(u8, Object)]) -> Pack {
        let objects: ObjectMap = objects
            .iter()
            .map(|(byte, object)| (key(*byte), *object))
            .collect();
        Pack {
            created: Timestamp::from_seconds(created),
            data_start: 100,
            data_length: objects.values().map(|object| object.length).sum(),
            bundle: None,
            objects,
        }
    }

    fn index(packs: &[(&str, Pack)]) -> Index {
        Index {
            packs: packs
                .iter()
                .map(|(name, pack)| ((*name).to_owned(), pack.clone()))
                .collect(),
            ..Index::default()
        }
    }

    #[test]
    fn no_time_is_later_than_the_reader_says_it_is() {
        let now = Timestamp::from_seconds(1_000_000_000);
        let mut one = index(&[("a", pack(u64::MAX, &[(1, object(0, 9, u32::MAX))]))]);
        let run = RunStats {
            ended: Timestamp::MAX,
            ..RunStats::default()
        };
        let lane = Lane {
            run: Timestamp::MAX,
            packs: BTreeSet::new(),
            runs: [run].into_iter().collect(),
        };
        one.lanes.insert(7, lane);
        one.unmerged.insert("b".to_owned(), Timestamp::MAX);
        one.clamp_times(now);
        assert_eq!(one.packs["a"].created, now);
        assert_eq!(one.packs["a"].used(), hours(now));
        assert_eq!((one.lanes[&7].run, one.unmerged["b"]), (now, now));
        assert_eq!(one.lanes[&7].runs.last().map(|run| run.ended), Some(now));
        // So it is dropped when nobody has used it for long.
        let later = now + Duration::from_secs(u64::from(LIFETIME + 1) * 3600);
        one.retain(later, u64::MAX);
        assert!(one.packs.is_empty() && one.lanes.is_empty());
        // Earlier times stay as they were.
        let mut old = index(&[("a", pack(5, &[(1, object(0, 9, 3))]))]);
        let before = old.clone();
        old.clamp_times(now);
        assert_eq!(old, before);
    }

    fn arbitrary_object() -> impl Strategy<Value = Object> {
        (0..40u64, 0..40u64, any::<[u8; 16]>(), 0..500u32).prop_map(
            |(offset, length, digest, used)| Object {
                offset,
                length,
                digest: Digest::from(digest),
                used,
            },
        )
    }

    fn arbitrary_bundle() -> impl Strategy<Value = Bundle> {
        let member = (0..4u8, 0..9u64, 0..500u32).prop_map(|(byte, length, used)| BundleMember {
            key: key(byte),
            length,
            digest: Digest::from([byte; 16]),
            used,
        });
        (
            0..3u64,
            0..3u64,
            proptest::collection::vec(member, 0..3usize),
        )
            .prop_map(|(offset, length, members)| Bundle {
                offset,
                length,
                members: Arc::new(members),
            })
    }

    fn arbitrary_pack() -> impl Strategy<Value = Pack> {
        let objects =
            proptest::collection::btree_map((0..6u8).prop_map(key), arbitrary_object(), 0..4);
        (
            0..3u64,
            0..3u64,
            0..99u64,
            proptest::option::of(arbitrary_bundle()),
            objects,
        )
            .prop_map(|(created, data_start, data_length, bundle, objects)| Pack {
                created: Timestamp::from_seconds(created),
                data_start,
                data_length,
                bundle,
                objects: objects.into_iter().collect(),
            })
    }

    /// Often more than are kept, often several that ended in the same second.
    fn arbitrary_runs() -> impl Strategy<Value = Runs> {
        let saved = proptest::option::of(0..3u64);
        let run = (0..40u64, 0..3u64, saved).prop_map(|(ended, hits, saved)| RunStats {
            ended: Timestamp::from_seconds(ended),
            hits,
            lookups: 9,
            saved,
        });
        proptest::collection::vec(run, 0..30usize).prop_map(Runs::from)
    }

    pub(crate) fn arbitrary_index() -> impl Strategy<Value = Index> {
        let packs = proptest::collection::btree_set("[ab]", 0..2);
        let lane = (0..9u64, packs, arbitrary_runs()).prop_map(|(run, packs, runs)| Lane {
            run: Timestamp::from_seconds(run),
            packs,
            runs,
        });
        (
            proptest::collection::btree_map("[abc]", arbitrary_pack(), 0..3),
            proptest::collection::btree_map(0..3u64, lane, 0..3),
            proptest::collection::btree_map(
                "[xy]",
                (0..9u64).prop_map(Timestamp::from_seconds),
                0..2,
            ),
        )
            .prop_map(|(packs, lanes, unmerged)| Index {
                packs,
                lanes,
                unmerged,
            })
    }

    fn merged(mut one: Index, other: &Index) -> Index {
        one.merge(other.clone());
        one
    }

    proptest! {
        #[test]
        fn indexes_merge_to_the_same_in_any_order_and_any_number_of_times(
            a in arbitrary_index(), b in arbitrary_index(), c in arbitrary_index(),
        ) {
            prop_assert_eq!(merged(a.clone(), &b), merged(b.clone(), &a));
            prop_assert_eq!(
                merged(merged(a.clone(), &b), &c),
                merged(a.clone(), &merged(b.clone(), &c))
            );
            prop_assert_eq!(merged(a.clone(), &a), a.clone());
            let both = merged(a, &b);
            prop_assert_eq!(merged(both.clone(), &b), both);
        }

        #[test]
        fn of_the_runs_of_two_indexes_the_last_are_kept(
            a in arbitrary_runs(), b in arbitrary_runs(),
        ) {
            let mut both = a.clone();
            both.merge(&b);
            let mut all: BTreeSet<RunStats> = a.iter().chain(b.iter()).copied().collect();
            while all.len() > RUNS_KEPT {
                all.pop_first();
            }
            prop_assert!(both.iter().eq(&all));
        }

        #[test]
        fn runs_from_before_are_put_before_the_first_and_displace_none(
            a in arbitrary_runs(), b in arbitrary_runs(),
        ) {
            let mut both = a.clone();
            both.extend_backwards(&b);
            let earlier = both.iter().count() - a.iter().count();
            prop_assert!(both.iter().skip(earlier).eq(a.iter()));
            if let Some(first) = a.iter().next() {
                prop_assert!(both.iter().take(earlier).all(|run| run.ended < first.ended));
            } else {
                prop_assert_eq!(both, b);
            }
        }

        #[test]
        fn nothing_of_either_index_is_missing_in_the_merged_one(
            a in arbitrary_index(), b in arbitrary_index(),
        ) {
            let both = merged(a.clone(), &b);
            for index in [a, b] {
                for (name, pack) in &index.packs {
                    let merged = &both.packs[name];
                    let replaced = merged.identity() != pack.identity();
                    let kept = pack.objects.keys().all(|key| merged.objects.contains_key(key));
                    prop_assert!(replaced || kept);
                }
                prop_assert!(index.lanes.keys().all(|lane| both.lanes.contains_key(lane)));
                prop_assert!(index.unmerged.keys().all(|key| both.unmerged.contains_key(key)));
            }
        }

        #[test]
        fn what_is_retained_fits_the_limit_and_was_there_before(
            index in arbitrary_index(), now in 0..4_000_000u64, limit in 0..200u64,
        ) {
            let mut kept = index.clone();
            kept.retain(Timestamp::from_seconds(now), limit);
            prop_assert!(kept.size() <= limit);
            for (name, pack) in &kept.packs {
                prop_assert!(index.packs[name].objects.len() >= pack.objects.len());
            }
            let again = { let mut again = kept.clone(); again.retain(Timestamp::from_seconds(now), limit); again };
            prop_assert_eq!(again, kept);
        }
    }

    #[test]
    fn an_object_that_two_packs_have_is_read_from_the_newer() {
        let index = index(&[
            ("b", pack(1, &[(1, object(0, 5, 0))])),
            ("a", pack(2, &[(1, object(0, 7, 0))])),
        ]);
        let packs: Vec<&str> = index.objects().map(|(_, name, _)| name).collect();
        assert_eq!(packs, ["a"]);
    }

    #[test]
    fn of_two_packs_under_one_name_the_later_counts_and_nothing_of_the_other() {
        let first = index(&[("a", pack(1, &[(1, object(0, 5, 9)), (2, object(5, 5, 9))]))]);
        let mut later = pack(2, &[(1, object(0, 7, 3))]);
        later.data_start = 50;
        let later = index(&[("a", later)]);
        assert_eq!(merged(first.clone(), &later), later);
        assert_eq!(merged(later.clone(), &first), later);
    }

    #[test]
    fn what_nobody_used_for_a_week_is_dropped_and_what_somebody_used_is_not() {
        let now = Timestamp::from_seconds(1_000 * 3600);
        let mut index = index(&[
            ("old", pack(0, &[(1, object(0, 5, 1000 - LIFETIME - 1))])),
            (
                "mixed",
                pack(
                    0,
                    &[(2, object(0, 5, 1000 - LIFETIME)), (3, object(5, 5, 0))],
                ),
            ),
        ]);
        index.retain(now, u64::MAX);
        assert_eq!(index.packs.len(), 1);
        assert_eq!(
            index.packs["mixed"].objects.keys().collect::<Vec<_>>(),
            [&key(2)]
        );
    }

    #[test]
    fn the_packs_that_were_used_the_longest_ago_make_room() {
        let mut index = index(&[
            ("a", pack(1, &[(1, object(0, 50, 900))])),
            ("b", pack(2, &[(2, object(0, 50, 800))])),
            ("c", pack(3, &[(3, object(0, 50, 901))])),
        ]);
        index.retain(Timestamp::from_seconds(902 * 3600), 100);
        assert_eq!(index.packs.keys().collect::<Vec<_>>(), ["a", "c"]);
    }

    #[test]
    fn a_pack_that_is_mostly_dead_and_many_small_ones_are_to_be_moved() {
        let large = SMALL_PACK * 4;
        let mut half_dead = pack(1, &[(1, object(0, large / 3, 9))]);
        half_dead.data_length = large;
        let mut alive = pack(1, &[(2, object(0, large, 9))]);
        alive.data_length = large;
        let small = pack(1, &[(3, object(0, 10, 9))]);
        let mut index = index(&[("dead", half_dead), ("alive", alive), ("s1", small)]);
        let repack_candidates = |index: &Index| {
            index
                .repack_candidates(2, |_| true)
                .into_iter()
                .collect::<Vec<_>>()
        };
        assert_eq!(repack_candidates(&index), ["dead"]);
        index
            .packs
            .insert("s2".to_owned(), pack(2, &[(4, object(0, 10, 9))]));
        assert_eq!(repack_candidates(&index), ["dead", "s1", "s2"]);
        assert!(index.repack_candidates(2, |_| false).is_empty());
        // An object that a newer pack has too is dead in the older one.
        index
            .packs
            .insert("s3".to_owned(), pack(3, &[(2, object(0, large, 9))]));
        assert!(repack_candidates(&index).contains(&"alive".to_owned()));
    }

    #[test]
    fn a_key_is_sccaches_in_small_letters_only() {
        let text = "0a".repeat(32);
        assert_eq!(text.parse::<ObjectKey>().unwrap().to_string(), text);
        for wrong in [
            "",
            "0a",
            &"0A".repeat(32),
            &"zz".repeat(32),
            &"0a".repeat(33),
        ] {
            assert!(wrong.parse::<ObjectKey>().is_err(), "{wrong}");
        }
    }
}
