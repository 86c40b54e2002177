//! The layout of a pack in its cache entry.
//!
//! ```text
//! bytes   content
//! 8       "sccpack3"
//! 4       the length of the index in bytes, little endian
//! 16      the digest of the index
//! …       the index: postcard's encoding of what all packs of the scope have, and behind it that of
//!         the last runs of each lane, which older versions neither write nor read
//! …       data: the bundle of preprocessor entries, then objects, one behind the other
//! ```
//!
//! The index comes first because Azure's storage has no ranges that count from the end: one request for the
//! first bytes gets the index, wherever the data ends. An entry's index names its own pack by the empty
//! string, since its writer does not know the key yet.
//!
//! An index is full, or the difference to a full one in an earlier entry, its base. It lists all packs of
//! the scope either way. So if the base is gone, a reader can read the packs themselves.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::digest::Digest;
use crate::packs::index::{
    Bundle, Index, Lane, OBJECT_LIMIT, ObjectKey, ObjectMap, Pack, RUNS_KEPT, RunStats, Runs,
};

/// The first bytes of every pack: the layout's name and number.
pub const MAGIC: &[u8; 8] = b"sccpack3";

/// The length of the header before the index, in bytes.
pub const HEADER_LENGTH: u64 = 28;

/// The longest index, in bytes: some million objects.
pub const INDEX_LIMIT: u32 = 64 << 20;

/// The name by which an entry's index knows its own pack.
pub const OWN: &str = "";

/// The relay writes a full index up to this size, in bytes, into each entry: a reader then needs one entry
/// only. The limit is lower in tests, so that the simulation, which has few objects, has differences too.
pub const SMALL_INDEX: u64 = if cfg!(test) { 256 } else { 8 * 1024 };

/// Why bytes are not a pack.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// They do not begin with [`MAGIC`].
    #[error("not a pack, or an unsupported version")]
    Foreign,
    /// The index is longer than [`INDEX_LIMIT`].
    #[error("the index is too large ({0} bytes)")]
    TooLong(u32),
    /// The indexes that were read before take all the memory that indexes may take.
    #[error("the indexes of all scopes are too large together")]
    TooMuch,
    /// The index is not the one that was written.
    #[error("the index is damaged")]
    Damaged,
    /// The index is inconsistent.
    #[error("cannot read the index: {0}")]
    Malformed(String),
}

/// The header before the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    length: u32,
    digest: Digest,
}

impl Header {
    /// Reads the first [`HEADER_LENGTH`] bytes of an entry.
    ///
    /// # Errors
    /// [`PackError::Foreign`] if they are not a pack's, [`PackError::TooLong`] if the index is too long.
    pub fn parse(bytes: &[u8]) -> Result<Self, PackError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(PackError::Foreign)?;
        let (length, rest) = rest.split_first_chunk().ok_or(PackError::Foreign)?;
        let (digest, _) = rest.split_first_chunk::<16>().ok_or(PackError::Foreign)?;
        let length = u32::from_le_bytes(*length);
        if length > INDEX_LIMIT {
            return Err(PackError::TooLong(length));
        }
        Ok(Self {
            length,
            digest: Digest::from(*digest),
        })
    }

    /// The bytes of the entry that the index takes. The data begins where it ends.
    pub fn index(&self) -> Range<u64> {
        HEADER_LENGTH..HEADER_LENGTH + u64::from(self.length)
    }

    /// Reads the index of the entry that is stored under `name`.
    ///
    /// # Errors
    /// [`PackError::Damaged`] if it is not the index that was written, [`PackError::Malformed`] if it is
    /// inconsistent.
    pub fn read_index(&self, bytes: &[u8], name: &str) -> Result<StoredIndex, PackError> {
        if Digest::of(bytes) != self.digest {
            return Err(PackError::Damaged);
        }
        let malformed = |error: &dyn ToString| PackError::Malformed(error.to_string());
        let (wire, rest): (WireIndex, &[u8]) =
            postcard::take_from_bytes(bytes).map_err(|error| malformed(&error))?;
        let histories: Vec<WireHistory> = match rest {
            [] => Vec::new(),
            rest => postcard::from_bytes(rest).map_err(|error| malformed(&error))?,
        };
        let mut stored = wire
            .into_stored(histories)
            .ok_or_else(|| malformed(&"a name is missing"))?;
        if let Some(mut own) = stored.index.packs.remove(OWN) {
            own.data_start = self.index().end;
            stored.index.packs.insert(name.to_owned(), own);
        }
        if let Some(base) = &mut stored.base {
            base.length = bytes.len() as u64;
        }
        if !stored.index.packs.values().all(Pack::is_sound) {
            return Err(malformed(&"an object is outside of its pack"));
        }
        for pack in stored.index.packs.values_mut() {
            // No relay stores such an object.
            pack.objects.retain(|object| object.length <= OBJECT_LIMIT);
        }
        Ok(stored)
    }
}

/// An index as an entry has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredIndex {
    /// The full index that it is the difference to; `None` if it is full itself.
    pub base: Option<Base>,
    /// All of a full index, otherwise the part that the base does not have.
    pub index: Index,
    /// The packs that are the same as in the base, each with the later uses of its objects.
    same: BTreeMap<String, Uses>,
}

/// The full index that another one is the difference to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// The key of the entry that has it.
    pub key: String,
    /// The bytes of all differences to it that were written before this one.
    pub before: u64,
    /// The bytes of this one.
    pub length: u64,
}

impl Base {
    /// The full index in the entry under `key`.
    pub fn full(key: &str) -> Self {
        Self {
            key: key.to_owned(),
            before: 0,
            length: 0,
        }
    }

    /// The same for the next difference.
    pub fn for_next_difference(self) -> Self {
        Self {
            before: self.before.saturating_add(self.length),
            length: 0,
            ..self
        }
    }
}

/// The uses of a pack's objects that are later than in its base: an hour, and a bit for each object and
/// then each entry of the bundle, in their order.
type Uses = Vec<(u32, Vec<u8>)>;

impl StoredIndex {
    /// The whole index, completed from `base`. The second value names the packs of which nothing is known
    /// then.
    pub fn resolve(self, base: Option<&Index>) -> (Index, Vec<String>) {
        let mut index = self.index;
        if let Some(base) = base {
            for (number, lane) in &base.lanes {
                let known = index
                    .lanes
                    .entry(*number)
                    .and_modify(|known| known.runs.merge(&lane.runs));
                known.or_insert_with(|| lane.clone());
            }
        }
        let mut missing = Vec::new();
        for (name, uses) in self.same {
            match base.and_then(|base| base.packs.get(&name)) {
                Some(pack) => {
                    let mut pack = pack.clone();
                    note_uses(&mut pack, &uses);
                    index.packs.insert(name, pack);
                }
                None => missing.push(name),
            }
        }
        (index, missing)
    }
}

fn bit(bits: &[u8], position: usize) -> bool {
    let byte = bits.get(position / 8).copied().unwrap_or(0);
    byte & (1 << (position % 8)) != 0
}

fn note_uses(pack: &mut Pack, uses: &Uses) {
    for (hour, bits) in uses {
        let keys: Vec<ObjectKey> = pack.objects.keys().copied().collect();
        let count = keys.len();
        let used = keys.iter().enumerate();
        for (_, key) in used.filter(|(position, _)| bit(bits, *position)) {
            if let Some(object) = pack.objects.get_mut(key) {
                object.used = object.used.max(*hour);
            }
        }
        let Some(bundle) = &mut pack.bundle else {
            continue;
        };
        let positions = count..count + bundle.members.len();
        if positions.clone().any(|position| bit(bits, position)) {
            let members = Arc::make_mut(&mut bundle.members);
            for (position, member) in positions.zip(members) {
                if bit(bits, position) {
                    member.used = member.used.max(*hour);
                }
            }
        }
    }
}

/// The uses of `pack` that are later than in `base`; `None` if `base` is not the same pack, or does not
/// have all of it.
fn uses_since(base: &Pack, pack: &Pack) -> Option<Uses> {
    let same = base.identity() == pack.identity()
        && match (&base.bundle, &pack.bundle) {
            (_, None) => true,
            (Some(base), Some(bundle)) => base.is_same(bundle),
            (None, Some(_)) => false,
        };
    if !same {
        return None;
    }
    let mut hours: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    let count = base.objects.len() + base.bundle.as_ref().map_or(0, |b| b.members.len());
    let mut note = |position: usize, hour: u32| {
        let bits = hours
            .entry(hour)
            .or_insert_with(|| vec![0; count.div_ceil(8)]);
        if let Some(byte) = bits.get_mut(position / 8) {
            *byte |= 1 << (position % 8);
        }
    };
    let mut found = 0;
    for (position, (key, before)) in base.objects.iter().enumerate() {
        // A reader drops again what was dropped since.
        let Some(object) = pack.objects.get(key) else {
            continue;
        };
        if object.identity() != before.identity() {
            return None;
        }
        found += 1;
        if object.used > before.used {
            note(position, object.used);
        }
    }
    if found != pack.objects.len() {
        return None;
    }
    if let (Some(before), Some(bundle)) = (&base.bundle, &pack.bundle) {
        let members = before.members.iter().zip(bundle.members.iter());
        for (position, (before, member)) in (base.objects.len()..).zip(members) {
            if member.used > before.used {
                note(position, member.used);
            }
        }
    }
    Some(hours.into_iter().collect())
}

/// A name as it is written: the number of its prefix, which all names share, then its own number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct WireName {
    prefix: u32,
    number: Option<u64>,
}

#[derive(Default)]
struct Prefixes(Vec<String>);

impl Prefixes {
    fn name(&mut self, name: &str) -> WireName {
        let split = name.rfind('#').map(|at| name.split_at(at + 1));
        let numbered = split.and_then(|(prefix, digits)| {
            let number: u64 = digits.parse().ok()?;
            (format!("{number:08}") == digits).then_some((prefix, number))
        });
        let (prefix, number) = match numbered {
            Some((prefix, number)) => (prefix, Some(number)),
            None => (name, None),
        };
        let known = self.0.iter().position(|known| known == prefix);
        let position = known.unwrap_or_else(|| {
            self.0.push(prefix.to_owned());
            self.0.len() - 1
        });
        WireName {
            prefix: u32::try_from(position).unwrap_or(u32::MAX),
            number,
        }
    }
}

fn name_of(prefixes: &[String], name: WireName) -> Option<String> {
    let prefix = prefixes.get(usize::try_from(name.prefix).ok()?)?;
    Some(match name.number {
        Some(number) => format!("{prefix}{number:08}"),
        None => prefix.clone(),
    })
}

/// The index as it is written.
#[derive(Serialize, Deserialize)]
struct WireIndex {
    prefixes: Vec<String>,
    base: Option<(WireName, u64)>,
    packs: Vec<(WireName, WirePack)>,
    lanes: Vec<WireLane>,
    unmerged: Vec<(WireName, u64)>,
}

#[derive(Serialize, Deserialize)]
enum WirePack {
    Whole {
        created: u64,
        data_start: u64,
        data_length: u64,
        bundle: Option<Bundle>,
        objects: ObjectMap,
    },
    Same(Uses),
}

#[derive(Serialize, Deserialize)]
struct WireLane {
    number: u64,
    run: u64,
    packs: Vec<WireName>,
    last: Option<WireLast>,
}

/// A lane's last run, as far as the first version knew of it.
#[derive(Serialize, Deserialize)]
struct WireLast {
    ended: u64,
    hits: u64,
    lookups: u64,
}

/// The part of a lane's runs that a [`WireLane`] does not have.
#[derive(Default, Serialize, Deserialize)]
struct WireHistory {
    /// The time that the last run saved, in seconds.
    saved: Option<u64>,
    /// The runs before it that the base does not have, the last one first.
    earlier: Vec<WireRun>,
}

#[derive(Serialize, Deserialize)]
struct WireRun {
    /// How long it ended before the one after it, in seconds.
    before: u64,
    hits: u64,
    lookups: u64,
    saved: Option<u64>,
}

impl WireHistory {
    /// All of `runs` but the last one and what `base` has.
    fn of(runs: &Runs, base: Option<&Runs>) -> Self {
        let mut history = Self::default();
        let mut latest_first = runs.iter().rev();
        let Some(last) = latest_first.next() else {
            return history;
        };
        history.saved = last.saved;
        let is_known =
            |run: &&RunStats| base.is_some_and(|base| base.iter().any(|known| known == *run));
        let mut end = last.ended.seconds();
        for run in latest_first.filter(|run| !is_known(run)) {
            history.earlier.push(WireRun {
                before: end.saturating_sub(run.ended.seconds()),
                hits: run.hits,
                lookups: run.lookups,
                saved: run.saved,
            });
            end = run.ended.seconds();
        }
        history
    }

    /// The runs of which `last` is the last.
    fn runs(self, last: Option<WireLast>) -> Runs {
        let Some(last) = last else {
            return Runs::default();
        };
        let mut ended = last.ended;
        let last = RunStats {
            ended: Timestamp::from_seconds(ended),
            hits: last.hits,
            lookups: last.lookups,
            saved: self.saved,
        };
        let earlier = self.earlier.into_iter().take(RUNS_KEPT).map(|run| {
            ended = ended.saturating_sub(run.before);
            RunStats {
                ended: Timestamp::from_seconds(ended),
                hits: run.hits,
                lookups: run.lookups,
                saved: run.saved,
            }
        });
        std::iter::once(last).chain(earlier).collect()
    }
}

impl WireIndex {
    fn of(index: &Index, base: Option<(&Base, &Index)>) -> Self {
        let mut prefixes = Prefixes::default();
        let named = base.map(|(base, _)| (prefixes.name(&base.key), base.before));
        let of_base = base.map(|(_, index)| index);
        let packs = index
            .packs
            .iter()
            .map(|(name, pack)| {
                let before = of_base.and_then(|base| base.packs.get(name));
                let same = before.and_then(|before| uses_since(before, pack));
                let whole = || WirePack::Whole {
                    created: pack.created.seconds(),
                    data_start: pack.data_start,
                    data_length: pack.data_length,
                    bundle: pack.bundle.clone(),
                    objects: pack.objects.clone(),
                };
                (prefixes.name(name), same.map_or_else(whole, WirePack::Same))
            })
            .collect();
        let changed = index.lanes.iter().filter(|(number, lane)| {
            of_base.is_none_or(|base| base.lanes.get(number) != Some(lane))
        });
        let lanes = changed
            .map(|(number, lane)| WireLane {
                number: *number,
                run: lane.run.seconds(),
                packs: lane.packs.iter().map(|name| prefixes.name(name)).collect(),
                last: lane.runs.last().map(|run| WireLast {
                    ended: run.ended.seconds(),
                    hits: run.hits,
                    lookups: run.lookups,
                }),
            })
            .collect();
        let unmerged = index
            .unmerged
            .iter()
            .map(|(name, since)| (prefixes.name(name), since.seconds()))
            .collect();
        Self {
            prefixes: prefixes.0,
            base: named,
            packs,
            lanes,
            unmerged,
        }
    }

    /// The part behind it: the earlier runs of its lanes, in their order.
    fn histories(&self, index: &Index, base: Option<&Index>) -> Vec<WireHistory> {
        let history = |lane: &WireLane| {
            let runs = index.lanes.get(&lane.number).map(|lane| &lane.runs);
            let of_base = base
                .and_then(|base| base.lanes.get(&lane.number))
                .map(|lane| &lane.runs);
            runs.map(|runs| WireHistory::of(runs, of_base))
        };
        let histories = self.lanes.iter().map(history);
        histories.map(Option::unwrap_or_default).collect()
    }

    /// `None` if it uses a prefix that it does not list. An older version wrote no `histories`.
    fn into_stored(self, histories: Vec<WireHistory>) -> Option<StoredIndex> {
        let prefixes = &self.prefixes;
        let mut stored = StoredIndex::default();
        if let Some((name, before)) = self.base {
            let key = name_of(prefixes, name)?;
            stored.base = Some(Base {
                key,
                before,
                length: 0,
            });
        }
        for (name, pack) in self.packs {
            let name = name_of(prefixes, name)?;
            match pack {
                WirePack::Same(uses) => {
                    stored.same.insert(name, uses);
                }
                WirePack::Whole {
                    created,
                    data_start,
                    data_length,
                    bundle,
                    objects,
                } => {
                    let pack = Pack {
                        created: Timestamp::from_seconds(created),
                        data_start,
                        data_length,
                        bundle,
                        objects,
                    };
                    stored.index.packs.insert(name, pack);
                }
            }
        }
        let mut histories = histories.into_iter();
        for lane in self.lanes {
            let history = histories.next().unwrap_or_default();
            let packs = lane.packs.iter().map(|name| name_of(prefixes, *name));
            let read = Lane {
                run: Timestamp::from_seconds(lane.run),
                packs: packs.collect::<Option<_>>()?,
                runs: history.runs(lane.last),
            };
            stored.index.lanes.insert(lane.number, read);
        }
        for (name, since) in self.unmerged {
            let name = name_of(prefixes, name)?;
            stored
                .index
                .unmerged
                .insert(name, Timestamp::from_seconds(since));
        }
        Some(stored)
    }
}

/// The bytes of an entry before its data.
#[derive(Clone, Debug)]
pub struct Head {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Whether the index in it is a full one.
    pub is_full: bool,
}

/// Encodes the bytes of an entry before its data. If there is a `base`, and the differences to it so far
/// are together not yet as long as a full index, the index is one more difference; otherwise it is full. So
/// all differences cost as much as all full indexes, which minimizes the cost of both kinds together.
///
/// # Errors
/// [`PackError::TooLong`] if the index is longer than [`INDEX_LIMIT`].
pub fn encode_head(index: &Index, base: Option<(&Base, &Index)>) -> Result<Head, PackError> {
    if let Some((named, of_base)) = base {
        let full = full_length(of_base);
        let difference = encode(index, base)?;
        let spent = named.before.saturating_add(difference.len() as u64);
        if full > SMALL_INDEX && spent <= full {
            let bytes = framed(&difference)?;
            let is_full = false;
            return Ok(Head { bytes, is_full });
        }
    }
    let bytes = framed(&encode(index, None)?)?;
    let is_full = true;
    Ok(Head { bytes, is_full })
}

/// About how many bytes a full index has.
fn full_length(index: &Index) -> u64 {
    /// Bytes of an object, or of an entry of a bundle, as they are written.
    const OBJECT: u64 = 58;
    let count = |pack: &Pack| {
        let members = pack
            .bundle
            .as_ref()
            .map_or(0, |bundle| bundle.members.len());
        (pack.objects.len() + members) as u64
    };
    index
        .packs
        .values()
        .map(count)
        .sum::<u64>()
        .saturating_mul(OBJECT)
}

fn encode(index: &Index, base: Option<(&Base, &Index)>) -> Result<Vec<u8>, PackError> {
    let wire = WireIndex::of(index, base);
    let histories = wire.histories(index, base.map(|(_, index)| index));
    postcard::to_stdvec(&wire)
        .and_then(|bytes| postcard::to_extend(&histories, bytes))
        .map_err(|error| PackError::Malformed(error.to_string()))
}

fn framed(index: &[u8]) -> Result<Vec<u8>, PackError> {
    let length = u32::try_from(index.len()).unwrap_or(u32::MAX);
    if length > INDEX_LIMIT {
        return Err(PackError::TooLong(length));
    }
    let mut bytes = Vec::with_capacity(index.len() + MAGIC.len() + 20);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(Digest::of(index).as_bytes());
    bytes.extend_from_slice(index);
    Ok(bytes)
}

/// Reads the index from the bytes of an entry, which may end anywhere behind the index.
///
/// # Errors
/// [`PackError::Foreign`] if the bytes are no pack's, [`PackError::Damaged`] if they are too few or
/// damaged, and as [`Header::read_index`].
pub fn read(bytes: &[u8], name: &str) -> Result<StoredIndex, PackError> {
    let header = Header::parse(bytes)?;
    let range = header.index();
    let index = usize::try_from(range.start)
        .ok()
        .zip(usize::try_from(range.end).ok())
        .and_then(|(start, end)| bytes.get(start..end))
        .ok_or(PackError::Damaged)?;
    header.read_index(index, name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packs::index::Object;
    use crate::packs::index::tests::{arbitrary_index, key, object};

    fn example() -> Index {
        let mut index = Index::default();
        let pack = Pack {
            created: Timestamp::from_seconds(5),
            data_length: 30,
            objects: [(key(1), object(10, 20, 3))].into(),
            ..Pack::default()
        };
        index.packs.insert(OWN.to_owned(), pack);
        index
            .unmerged
            .insert("other".to_owned(), Timestamp::from_seconds(7));
        index
    }

    #[test]
    fn an_entrys_own_pack_is_found_under_its_key_with_its_data_behind_the_index() {
        let bytes = encode_head(&example(), None).unwrap().bytes;
        let index = read(&bytes, "key#1").unwrap().index;
        let pack = &index.packs["key#1"];
        assert_eq!(pack.data_start, bytes.len() as u64);
        assert_eq!(pack.objects[&key(1)].offset, 10);
        assert_eq!(index.unmerged["other"], Timestamp::from_seconds(7));
        assert_eq!(index.packs.len(), 1);
    }

    #[test]
    fn what_is_no_pack_is_told_from_a_damaged_one() {
        let bytes = encode_head(&example(), None).unwrap().bytes;
        assert_eq!(read(b"", "k"), Err(PackError::Foreign));
        assert_eq!(
            read(b"<html>not found</html>", "k"),
            Err(PackError::Foreign)
        );
        assert_eq!(read(&bytes[..20], "k"), Err(PackError::Foreign));
        assert_eq!(
            read(&bytes[..bytes.len() - 1], "k"),
            Err(PackError::Damaged)
        );
        let mut long = bytes;
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(read(&long, "k"), Err(PackError::TooLong(u32::MAX)));
    }

    #[test]
    fn an_object_larger_than_any_that_is_stored_is_left_out() {
        let mut index = example();
        let pack = index.packs.get_mut(OWN).unwrap();
        pack.data_length = u64::MAX / 2;
        pack.objects.insert(key(2), object(0, OBJECT_LIMIT, 0));
        pack.objects.insert(key(3), object(0, OBJECT_LIMIT + 1, 0));
        pack.objects.insert(key(4), object(0, 7 << 30, 0));
        let bytes = encode_head(&index, None).unwrap().bytes;
        let index = read(&bytes, "k").unwrap().index;
        let left: Vec<_> = index.packs["k"].objects.keys().copied().collect();
        assert_eq!(left, [key(1), key(2)]);
    }

    #[test]
    fn an_object_outside_of_its_pack_is_refused() {
        for outside in [
            object(11, 20, 0),
            object(u64::MAX, 2, 0),
            object(2, u64::MAX, 0),
        ] {
            let mut index = example();
            let pack = index.packs.get_mut(OWN).unwrap();
            pack.objects.insert(key(2), outside);
            let bytes = encode_head(&index, None).unwrap().bytes;
            assert!(matches!(read(&bytes, "k"), Err(PackError::Malformed(_))));
        }
    }

    /// An index that is genuine by its digest and nonsense otherwise.
    fn disguised(index: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&u32::try_from(index.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(Digest::of(index).as_bytes());
        bytes.extend_from_slice(index);
        bytes
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(mut index in arbitrary_index()) {
            index.packs.retain(|_, pack| pack.is_sound());
            let bytes = encode_head(&index, None).unwrap().bytes;
            let stored = read(&bytes, "k").unwrap();
            prop_assert_eq!(&stored.base, &None);
            prop_assert_eq!(stored.resolve(None), (index, Vec::new()));
        }

        #[test]
        fn a_changed_byte_is_noticed(index in arbitrary_index(), at: usize, change in 1..=255u8) {
            let mut bytes = encode_head(&index, None).unwrap().bytes;
            let at = at % bytes.len();
            bytes[at] ^= change;
            prop_assert!(read(&bytes, "k").is_err());
        }

        #[test]
        fn no_bytes_make_the_reader_panic_or_give_an_unsound_index(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            index in arbitrary_index(), at: usize, change: u8,
        ) {
            let _ = read(&bytes, "k");
            let genuine = encode_head(&index, None).unwrap().bytes;
            let mut mutated = genuine[28..].to_vec();
            if !mutated.is_empty() {
                let at = at % mutated.len();
                mutated[at] ^= change;
            }
            for bytes in [disguised(&bytes), disguised(&mutated)] {
                if let Ok(index) = read(&bytes, "k") {
                    prop_assert!(index.index.packs.values().all(Pack::is_sound));
                    let (index, _) = index.resolve(Some(&Index::default()));
                    // Any index that was read is written and read unchanged.
                    let bytes = encode_head(&index, None).unwrap().bytes;
                    prop_assert_eq!(read(&bytes, "l").unwrap().resolve(None).0, index);
                }
            }
        }
    }

    fn runs(count: u64) -> Runs {
        let runs = (0..count).map(|i| RunStats {
            ended: Timestamp::from_seconds(1_800_000_000 + i * 3_600),
            hits: 1_000 + i,
            lookups: 1_200,
            saved: (i % 3 > 0).then_some(600 + i),
        });
        runs.collect()
    }

    fn index_of_lane(runs: Runs) -> Index {
        let mut index = Index::default();
        let lane = Lane {
            run: Timestamp::from_seconds(50),
            packs: std::collections::BTreeSet::new(),
            runs,
        };
        index.lanes.insert(7, lane);
        index
    }

    #[test]
    fn an_index_of_an_older_version_has_the_last_run_of_a_lane() {
        // No prefixes, no base, no packs, one lane: 7, run 50, no packs, last run 40, 3, 9; none unmerged.
        let bytes = disguised(&[0, 0, 0, 1, 7, 50, 0, 1, 40, 3, 9, 0]);
        let run = RunStats {
            ended: Timestamp::from_seconds(40),
            hits: 3,
            lookups: 9,
            saved: None,
        };
        let expected = index_of_lane([run].into_iter().collect());
        assert_eq!(read(&bytes, "k").unwrap().index, expected);
        // An older version reads what this version writes, but for the runs before the last.
        let bytes = encode_head(&index_of_lane(runs(3)), None).unwrap().bytes;
        let wire: WireIndex = postcard::from_bytes(&bytes[28..]).unwrap();
        let last = wire.lanes[0].last.as_ref().unwrap();
        assert_eq!(
            (last.ended, last.hits, last.lookups),
            (1_800_007_200, 1_002, 1_200)
        );
    }

    #[test]
    fn a_run_costs_eight_bytes_and_a_difference_has_only_what_is_new() {
        let length = |count| {
            encode_head(&index_of_lane(runs(count)), None)
                .unwrap()
                .bytes
                .len()
        };
        let one = length(1);
        let all = length(RUNS_KEPT as u64);
        assert!(all <= one + (RUNS_KEPT - 1) * 9, "{one} {all}");
        assert_eq!(length(1_000), all);
        let before = index_of_lane(runs(20));
        let mut index = before.clone();
        index.merge(index_of_lane(runs(22)));
        let encoded = encode(&index, Some((&base(0), &before))).unwrap();
        let stored = read(&framed(&encoded).unwrap(), "k").unwrap();
        assert_eq!(stored.index.lanes[&7].runs.iter().count(), 2);
        assert_eq!(stored.resolve(Some(&before)).0, index);
    }

    #[test]
    fn more_runs_than_are_kept_and_times_before_all_time_are_read_as_what_can_be() {
        // One lane whose last run ended in second 5, and behind it 100 runs, each 3 seconds before.
        let mut index = vec![0, 0, 0, 1, 7, 50, 0, 1, 5, 3, 9, 0];
        index.extend([1, 0, 100]);
        index.extend([3, 200, 1, 9, 0].repeat(100));
        let read = read(&disguised(&index), "k").unwrap().index;
        let ends: Vec<u64> = read.lanes[&7]
            .runs
            .iter()
            .map(|run| run.ended.seconds())
            .collect();
        assert_eq!(ends, [0, 2, 5]);
        assert_eq!(
            read.lanes[&7].runs.iter().next().unwrap().hit_rate(),
            Some(1.0)
        );
        index.truncate(index.len() - 1);
        assert!(matches!(
            self::read(&disguised(&index), "k"),
            Err(PackError::Malformed(_))
        ));
    }

    #[test]
    fn an_index_with_times_beyond_all_time_is_written_and_read_unchanged() {
        // No packs; one lane: 7, its run and its last run at the last number there is.
        let last = [[0xff; 9].as_slice(), &[1]].concat();
        let lane = [&[0, 0, 0, 1, 7], &*last, &[0, 1], &*last, &[3, 9]].concat();
        let bytes = disguised(&[lane, vec![0]].concat());
        let index = read(&bytes, "k").unwrap().index;
        assert_eq!(index.lanes[&7].run.seconds(), u64::MAX / 1000);
        let written = encode_head(&index, None).unwrap().bytes;
        assert_eq!(read(&written, "l").unwrap().index, index);
    }

    /// A scope of packs with so many objects each, all used at the same hour.
    fn scope(packs: std::ops::Range<u64>, objects: u64, used: u32) -> Index {
        let mut index = Index::default();
        for number in packs {
            let objects = (0..objects).map(|i| {
                let key = *blake3::hash(&((number << 20) + i).to_le_bytes()).as_bytes();
                (ObjectKey(key), object(i * 10, 10, used))
            });
            let objects: ObjectMap = objects.collect();
            let pack = Pack {
                created: Timestamp::from_seconds(number),
                data_length: objects.len() as u64 * 10,
                objects,
                ..Pack::default()
            };
            index.packs.insert(format!("scope#{number:08}"), pack);
        }
        index
    }

    fn base(before: u64) -> Base {
        Base {
            key: "scope#00000009".to_owned(),
            before,
            length: 0,
        }
    }

    #[test]
    fn a_difference_has_what_is_new_and_what_was_used_and_reads_as_the_whole_index() {
        let before = scope(1..9, 200, 100);
        let mut index = scope(1..10, 200, 100);
        index.packs.remove("scope#00000004");
        let pack = index.packs.get_mut("scope#00000002").unwrap();
        let key = *pack.objects.keys().nth(77).unwrap();
        pack.objects.get_mut(&key).unwrap().used = 130;
        let bytes = encode_head(&index, Some((&base(0), &before)))
            .unwrap()
            .bytes;
        let full = encode_head(&index, None).unwrap().bytes;
        assert!(
            bytes.len() * 6 < full.len(),
            "{} {}",
            bytes.len(),
            full.len()
        );
        let stored = read(&bytes, "scope#00000010").unwrap();
        let length = bytes.len() as u64 - HEADER_LENGTH;
        assert_eq!(stored.base, Some(Base { length, ..base(0) }));
        assert_eq!(stored.clone().resolve(Some(&before)), (index, Vec::new()));
        // Without its base it names the packs that it does not have.
        let (index, missing) = stored.resolve(None);
        assert_eq!(index.packs.keys().collect::<Vec<_>>(), ["scope#00000009"]);
        assert_eq!(missing.len(), 7);
    }

    #[test]
    fn once_the_differences_are_as_long_as_a_full_index_there_is_a_new_one() {
        let before = scope(1..9, 200, 100);
        let index = scope(1..10, 200, 100);
        let is_full = |spent: u64| {
            let bytes = encode_head(&index, Some((&base(spent), &before)))
                .unwrap()
                .bytes;
            read(&bytes, "scope#00000010").unwrap().base.is_none()
        };
        assert!(!is_full(0) && is_full(full_length(&before)));
    }

    proptest! {
        #[test]
        fn a_difference_to_any_index_reads_as_what_was_written(
            mut index in arbitrary_index(), other in arbitrary_index(),
        ) {
            index.packs.retain(|_, pack| pack.is_sound());
            let mut before = index.clone();
            before.merge(other);
            let encoded = encode(&index, Some((&base(0), &before))).unwrap();
            let bytes = framed(&encoded).unwrap();
            let (read, missing) = read(&bytes, "k").unwrap().resolve(Some(&before));
            prop_assert!(missing.is_empty());
            prop_assert_eq!(read.packs.keys().collect::<Vec<_>>(), index.packs.keys().collect::<Vec<_>>());
            for (name, pack) in &index.packs {
                let read = &read.packs[name];
                let has = |(key, object): (&ObjectKey, &Object)| {
                    let read = read.objects.get(key);
                    read.is_some_and(|read| read.identity() == object.identity())
                        && read.is_some_and(|read| read.used >= object.used)
                };
                prop_assert!(pack.objects.iter().all(has));
            }
            prop_assert_eq!(&read.unmerged, &index.unmerged);
            let mut both = before;
            both.merge(index);
            for (number, lane) in &both.lanes {
                prop_assert_eq!(&read.lanes[number].runs, &lane.runs);
            }
        }
    }
}
