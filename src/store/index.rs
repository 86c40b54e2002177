//! What is in the packs of one scope, and how the indexes of concurrent jobs become one.
//!
//! Merging is commutative, associative and idempotent, so jobs that never heard of each other end
//! with the same index, in whatever order they learn of each other.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How long, in hours, what nobody uses stays in an index: as long as GitHub keeps an entry that
/// nobody reads (its documentation of dependency caching: seven days).
pub const LIFETIME: u32 = 7 * 24;

/// How long, in seconds, an entry that exists and could not be read is asked for again. Its writer
/// may still be uploading it; a writer that was killed will never finish it.
pub const UNMERGED_LIFETIME: u64 = 24 * 60 * 60;

/// A pack smaller than this, in bytes, is merged with others when there are several.
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

/// The first 128 bits of a BLAKE3 digest of content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Digest([u8; 16]);

impl Digest {
    /// The digest of `content`.
    pub fn of(content: &[u8]) -> Self {
        Self::from_hash(blake3::hash(content))
    }

    /// The digest that a hasher which was fed piece by piece came to.
    pub fn from_hash(hash: blake3::Hash) -> Self {
        let (first, _) = hash.as_bytes().split_at(16);
        let mut digest = [0; 16];
        digest.copy_from_slice(first);
        Self(digest)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl From<[u8; 16]> for Digest {
    fn from(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&hex::encode(self.0))
    }
}

/// An object in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Object {
    /// Where it begins in the pack's data, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Its digest.
    pub digest: Digest,
    /// When it was last used, in hours since 1970.
    pub used: u32,
}

impl Object {
    fn identity(&self) -> (u64, u64, Digest) {
        (self.offset, self.length, self.digest)
    }
}

/// An entry of sccache's preprocessor cache in a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Member {
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
    /// Where it begins in the pack's data, in bytes.
    pub offset: u64,
    /// Its length in bytes, compressed with zstd.
    pub length: u64,
    /// What is in it, one behind the other.
    pub members: Vec<Member>,
}

impl Bundle {
    fn identity(&self) -> (u64, u64, Vec<(ObjectKey, u64, Digest)>) {
        let members = self.members.iter();
        let members = members.map(|member| (member.key, member.length, member.digest));
        (self.offset, self.length, members.collect())
    }

    /// Its length in bytes, uncompressed.
    pub fn raw_length(&self) -> u64 {
        let lengths = self.members.iter().map(|member| member.length);
        lengths.fold(0, u64::saturating_add)
    }

    fn merge(&mut self, other: Self) {
        match self.identity().cmp(&other.identity()) {
            Ordering::Greater => {}
            Ordering::Less => *self = other,
            Ordering::Equal => {
                for (mine, theirs) in self.members.iter_mut().zip(other.members) {
                    mine.used = mine.used.max(theirs.used);
                }
            }
        }
    }
}

/// A pack: one immutable cache entry with the content of many objects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pack {
    /// When it was written, in seconds since 1970.
    pub created: u64,
    /// Where its data begins in the cache entry, in bytes.
    pub data_start: u64,
    /// The length of its data in bytes.
    pub data_length: u64,
    /// Its part of the preprocessor cache.
    pub bundle: Option<Bundle>,
    /// Its objects.
    pub objects: BTreeMap<ObjectKey, Object>,
}

impl Pack {
    fn merge(&mut self, other: Self) {
        self.created = self.created.max(other.created);
        self.data_start = self.data_start.max(other.data_start);
        self.data_length = self.data_length.max(other.data_length);
        match (&mut self.bundle, other.bundle) {
            (Some(mine), Some(theirs)) => mine.merge(theirs),
            (mine @ None, theirs) => *mine = theirs,
            (Some(_), None) => {}
        }
        for (key, theirs) in other.objects {
            self.objects
                .entry(key)
                .and_modify(|mine| match mine.identity().cmp(&theirs.identity()) {
                    Ordering::Greater => {}
                    Ordering::Less => *mine = theirs,
                    Ordering::Equal => mine.used = mine.used.max(theirs.used),
                })
                .or_insert(theirs);
        }
    }

    /// When anything of it was last used, in hours since 1970.
    pub fn used(&self) -> u32 {
        let members = self.bundle.iter().flat_map(|bundle| &bundle.members);
        let members = members.map(|member| member.used);
        let objects = self.objects.values().map(|object| object.used);
        members.chain(objects).max().unwrap_or(0)
    }

    fn is_empty(&self) -> bool {
        self.bundle.is_none() && self.objects.is_empty()
    }

    /// Whether what it says of its content lies within its data.
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

/// What jobs of one kind (the same workflow, job and matrix entry) did last.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Lane {
    /// When the last run began, in seconds since 1970.
    pub run: u64,
    /// The packs that it used.
    pub packs: BTreeSet<String>,
    /// What came of the last run that said so. In the index since that is the smallest place: some
    /// six bytes a lane, where an object of its own takes sixty and a stretch of a pack.
    pub last: Option<Ran>,
}

/// What came of a run, as its own summary said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ran {
    /// When it ended, in seconds since 1970.
    pub ended: u64,
    /// Compiles that came from the cache.
    pub hits: u64,
    /// Compiles that were looked up there.
    pub lookups: u64,
}

impl Ran {
    /// The share of the hits, from 0 to 1; `None` where nothing was looked up.
    pub fn hit_rate(&self) -> Option<f64> {
        // Counters stay far below the 2^53 from which on a float is inexact.
        #[allow(clippy::cast_precision_loss)]
        (self.lookups > 0).then(|| self.hits as f64 / self.lookups as f64)
    }
}

/// What is in the packs of one scope.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// The packs by the keys of their cache entries.
    pub packs: BTreeMap<String, Pack>,
    /// The lanes by their numbers.
    pub lanes: BTreeMap<u64, Lane>,
    /// Keys of entries that are known to exist and whose index is not in this one, with when that
    /// became known, in seconds since 1970.
    pub unmerged: BTreeMap<String, u64>,
}

impl Index {
    /// Adds what `other` knows.
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
            self.lanes
                .entry(number)
                .and_modify(|mine| {
                    if *mine < lane {
                        *mine = lane.clone();
                    }
                })
                .or_insert(lane);
        }
        for (key, since) in other.unmerged {
            self.unmerged
                .entry(key)
                .and_modify(|mine| *mine = since.min(*mine))
                .or_insert(since);
        }
    }

    /// Where each object is best read from: where several packs have it, from the newest. Gives the
    /// pack's name with the object.
    pub fn objects(&self) -> BTreeMap<ObjectKey, (&str, &Object)> {
        let mut best: BTreeMap<ObjectKey, (&str, &Object)> = BTreeMap::new();
        for (name, pack) in self.oldest_first() {
            for (key, object) in &pack.objects {
                best.insert(*key, (name, object));
            }
        }
        best
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

    /// Drops what nobody has used for [`LIFETIME`], and then the packs that were used the longest
    /// ago until all together have at most `limit` bytes. `now` is in seconds since 1970.
    pub fn retain(&mut self, now: u64, limit: u64) {
        let oldest = hours(now).saturating_sub(LIFETIME);
        for pack in self.packs.values_mut() {
            pack.objects.retain(|_, object| object.used >= oldest);
            let members = pack.bundle.iter().flat_map(|bundle| &bundle.members);
            // A bundle is read as a whole.
            if members.map(|member| member.used).max() < Some(oldest) {
                pack.bundle = None;
            }
        }
        self.packs.retain(|_, pack| !pack.is_empty());
        let mut size = self.size();
        let mut by_use: Vec<(u32, u64, String)> = self
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
            .retain(|_, since| since.saturating_add(UNMERGED_LIFETIME) >= now);
    }

    /// Packs whose content is better moved to a new pack: more than half of it is dead (dropped, or
    /// also in a newer pack), or they are small and there are at least `small` of them. `movable`
    /// says which can be moved at all.
    pub fn wasteful(&self, small: usize, movable: impl Fn(&str) -> bool) -> BTreeSet<String> {
        let mut live: BTreeMap<&str, u64> = BTreeMap::new();
        for (name, object) in self.objects().into_values() {
            let bytes = live.entry(name).or_default();
            *bytes = bytes.saturating_add(object.length);
        }
        let mut wasteful = BTreeSet::new();
        let mut smalls = BTreeSet::new();
        for (name, pack) in self.packs.iter().filter(|(name, _)| movable(name)) {
            let bundle = pack.bundle.as_ref().map_or(0, |bundle| bundle.length);
            let live = live.get(name.as_str()).copied().unwrap_or(0);
            if live.saturating_add(bundle).saturating_mul(2) < pack.data_length {
                wasteful.insert(name.clone());
            } else if pack.data_length < SMALL_PACK {
                smalls.insert(name.clone());
            }
        }
        if smalls.len() >= small {
            wasteful.append(&mut smalls);
        }
        wasteful
    }
}

/// A time in seconds since 1970 in whole hours.
pub fn hours(seconds: u64) -> u32 {
    u32::try_from(seconds / 3600).unwrap_or(u32::MAX)
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
        let objects: BTreeMap<ObjectKey, Object> = objects
            .iter()
            .map(|(byte, object)| (key(*byte), *object))
            .collect();
        Pack {
            created,
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

    fn arbitrary_object() -> impl Strategy<Value = Object> {
        (0..40u64, 0..40u64, any::<[u8; 16]>(), 0..500u32).prop_map(
            |(offset, length, digest, used)| Object {
                offset,
                length,
                digest: Digest(digest),
                used,
            },
        )
    }

    fn arbitrary_bundle() -> impl Strategy<Value = Bundle> {
        let member = (0..4u8, 0..9u64, 0..500u32).prop_map(|(byte, length, used)| Member {
            key: key(byte),
            length,
            digest: Digest([byte; 16]),
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
                members,
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
                created,
                data_start,
                data_length,
                bundle,
                objects,
            })
    }

    pub(crate) fn arbitrary_index() -> impl Strategy<Value = Index> {
        let ran = (0..9u64, 0..9u64).prop_map(|(ended, hits)| Ran {
            ended,
            hits,
            lookups: 9,
        });
        let packs = proptest::collection::btree_set("[ab]", 0..2);
        let lane = (0..9u64, packs, proptest::option::of(ran))
            .prop_map(|(run, packs, last)| Lane { run, packs, last });
        (
            proptest::collection::btree_map("[abc]", arbitrary_pack(), 0..3),
            proptest::collection::btree_map(0..3u64, lane, 0..3),
            proptest::collection::btree_map("[xy]", 0..9u64, 0..2),
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
        fn nothing_of_either_index_is_missing_in_the_merged_one(
            a in arbitrary_index(), b in arbitrary_index(),
        ) {
            let both = merged(a.clone(), &b);
            for index in [a, b] {
                let known = index.objects();
                let merged = both.objects();
                prop_assert!(known.keys().all(|key| merged.contains_key(key)));
                prop_assert!(index.lanes.keys().all(|lane| both.lanes.contains_key(lane)));
                prop_assert!(index.unmerged.keys().all(|key| both.unmerged.contains_key(key)));
            }
        }

        #[test]
        fn what_is_retained_fits_the_limit_and_was_there_before(
            index in arbitrary_index(), now in 0..4_000_000u64, limit in 0..200u64,
        ) {
            let mut kept = index.clone();
            kept.retain(now, limit);
            prop_assert!(kept.size() <= limit);
            for (name, pack) in &kept.packs {
                prop_assert!(index.packs[name].objects.len() >= pack.objects.len());
            }
            let again = { let mut again = kept.clone(); again.retain(now, limit); again };
            prop_assert_eq!(again, kept);
        }
    }

    #[test]
    fn an_object_that_two_packs_have_is_read_from_the_newer() {
        let index = index(&[
            ("b", pack(1, &[(1, object(0, 5, 0))])),
            ("a", pack(2, &[(1, object(0, 7, 0))])),
        ]);
        let objects = index.objects();
        assert_eq!(objects[&key(1)].0, "a");
    }

    #[test]
    fn what_nobody_used_for_a_week_is_dropped_and_what_somebody_used_is_not() {
        let now = 1_000 * 3600;
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
        index.retain(902 * 3600, 100);
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
        let wasteful = |index: &Index| index.wasteful(2, |_| true).into_iter().collect::<Vec<_>>();
        assert_eq!(wasteful(&index), ["dead"]);
        index
            .packs
            .insert("s2".to_owned(), pack(2, &[(4, object(0, 10, 9))]));
        assert_eq!(wasteful(&index), ["dead", "s1", "s2"]);
        assert!(index.wasteful(2, |_| false).is_empty());
        // What a newer pack has too is dead in the older.
        index
            .packs
            .insert("s3".to_owned(), pack(3, &[(2, object(0, large, 9))]));
        assert!(wasteful(&index).contains(&"alive".to_owned()));
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
