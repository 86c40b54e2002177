//! What a run left of its dependencies, and which of it another run wants.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::cargo::layout::Layout;
use crate::cargo::lockfile::Lockfile;
use crate::store::index::{LIFETIME, ObjectKey};

/// What the keys of chunks begin with. sccache's keys are digests, which do not.
const CHUNK: [u8; 8] = *b"cargochk";

/// What the keys of manifests begin with.
const MANIFEST: [u8; 8] = *b"cargoman";

/// The greatest length of a manifest that is believed, in bytes, uncompressed.
const MANIFEST_LIMIT: usize = 64 << 20;

/// How hard a manifest is compressed.
const MANIFEST_LEVEL: i32 = 3;

/// How old, in hours, the note may be that a part was used, before it is written anew.
const USE_NOTE_AGE: u32 = 24;

/// Whether an object of the store is the cargo cache's and not sccache's.
pub fn is_cargos(key: ObjectKey) -> bool {
    key.0.starts_with(&CHUNK) || key.0.starts_with(&MANIFEST)
}

/// The key of the chunk with this content.
pub fn chunk_key(content: blake3::Hash) -> ObjectKey {
    joined(CHUNK, &content.as_bytes()[..24])
}

/// The key of the manifest of a lane's runs with this layout.
pub fn manifest_key(layout: Layout, lane: u64) -> ObjectKey {
    joined(MANIFEST, &[layout.0, lane.to_be_bytes(), [0; 8]].concat())
}

fn joined(kind: [u8; 8], rest: &[u8]) -> ObjectKey {
    let mut key = [0; 32];
    let (begin, end) = key.split_at_mut(8);
    begin.copy_from_slice(&kind);
    end.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    ObjectKey(key)
}

/// How well a manifest suits a run: the same layout first, then the same lane. `None` for a key
/// that is no manifest's.
pub fn suits(key: ObjectKey, layout: Layout, lane: u64) -> Option<(bool, bool)> {
    let (kind, rest) = key.0.split_first_chunk::<8>()?;
    let (its_layout, rest) = rest.split_first_chunk::<8>()?;
    let (its_lane, _) = rest.split_first_chunk::<8>()?;
    let same = (*its_layout == layout.0, *its_lane == lane.to_be_bytes());
    (*kind == MANIFEST).then_some(same)
}

/// The folder that a part's paths begin in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Root {
    /// A target folder of the job, by its number.
    Target(u32),
    /// `registry` in cargo's home.
    Registry,
    /// `git` in cargo's home.
    Git,
}

/// What a part is of, by which a lockfile asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Package {
    /// A package of a registry, as `name-version`.
    Crate(String),
    /// A commit of a git repository, by the digits that cargo calls its checkout.
    Commit(String),
    /// Several.
    Several,
}

/// When a file was last changed: seconds since 1970, and nanoseconds beyond.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Time {
    seconds: i64,
    nanoseconds: u32,
}

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        match time.duration_since(UNIX_EPOCH) {
            Ok(since) => Self {
                seconds: seconds(since),
                nanoseconds: since.subsec_nanos(),
            },
            Err(before) => Self {
                seconds: seconds(before.duration()).saturating_neg(),
                nanoseconds: 0,
            },
        }
    }
}

impl From<Time> for SystemTime {
    fn from(time: Time) -> Self {
        let seconds = Duration::from_secs(time.seconds.unsigned_abs());
        let whole = match time.seconds >= 0 {
            true => UNIX_EPOCH.checked_add(seconds),
            false => UNIX_EPOCH.checked_sub(seconds),
        };
        let nanoseconds = Duration::from_nanos(u64::from(time.nanoseconds));
        let time = whole.and_then(|whole| whole.checked_add(nanoseconds));
        time.unwrap_or(UNIX_EPOCH)
    }
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A file: its length in bytes, and its permissions as Unix has them.
    File {
        /// The length.
        length: u64,
        /// The permissions; 0 where the system has none of this kind.
        mode: u32,
    },
    /// Another name of the file of this number in the part.
    Link(u32),
    /// A folder.
    Folder,
    /// A symbolic link with this target.
    Symlink(String),
}

/// A path of a part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The path from the part's root, with `/` between its components.
    pub path: String,
    /// What is there.
    pub what: What,
    /// When that was last changed.
    pub modified: Time,
}

/// Files that are of use only together: a compiled unit, a crate's archive, a checkout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Where its paths begin.
    pub root: Root,
    /// What tells it from the others of its root.
    pub name: String,
    /// The folder that appears last and as a whole when the part is put on the disk, if it has one:
    /// without it cargo takes nothing of the part for good.
    pub guard: Option<String>,
    /// What it is of.
    pub package: Package,
    /// Its paths, in the order in which files' contents are in the chunk.
    pub entries: Vec<Entry>,
    /// The chunk with its content.
    pub chunk: ObjectKey,
    /// The parts that it was compiled from, by their numbers in the manifest.
    pub needs: Vec<u32>,
    /// When a run last used it, in hours since 1970.
    pub used: u32,
}

impl Part {
    /// The length in bytes of its files.
    pub fn length(&self) -> u64 {
        length(&self.entries)
    }

    /// What tells it from all other parts of a manifest.
    pub fn id(&self) -> (Root, &str) {
        (self.root, &self.name)
    }
}

/// The length in bytes of all files among `entries`.
pub fn length(entries: &[Entry]) -> u64 {
    let lengths = entries.iter().map(|entry| match entry.what {
        What::File { length, .. } => length,
        What::Link(_) | What::Folder | What::Symlink(_) => 0,
    });
    lengths.fold(0, u64::saturating_add)
}

/// What a run left of its dependencies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The parts.
    pub parts: Vec<Part>,
}

impl Manifest {
    /// The manifest as it is stored.
    ///
    /// # Errors
    /// Where it cannot be compressed.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let bytes = postcard::to_stdvec(self).map_err(io::Error::other)?;
        zstd::bulk::compress(&bytes, MANIFEST_LEVEL)
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// Where the bytes are none.
    pub fn from_bytes(bytes: &[u8]) -> io::Result<Self> {
        let mut plain = Vec::new();
        let decoder = zstd::Decoder::new(bytes)?;
        let mut limited = io::Read::take(decoder, MANIFEST_LIMIT as u64);
        io::Read::read_to_end(&mut limited, &mut plain)?;
        postcard::from_bytes(&plain).map_err(io::Error::other)
    }

    /// The parts that a run with this lockfile wants, by their numbers: those of packages that it
    /// asks for, compiled from nothing else. Compiled units are among them only where `units`.
    pub fn wanted(&self, lockfile: &Lockfile, units: bool) -> Vec<usize> {
        let mut wanted: Vec<bool> = self
            .parts
            .iter()
            .map(|part| match &part.package {
                _ if matches!(part.root, Root::Target(_)) && !units => false,
                Package::Crate(name) => lockfile.has_crate(name),
                Package::Commit(prefix) => lockfile.has_commit(prefix),
                Package::Several => !lockfile.is_empty(),
            })
            .collect();
        self.close(&mut wanted);
        let numbers = wanted.iter().enumerate();
        numbers
            .filter(|(_, wanted)| **wanted)
            .map(|(number, _)| number)
            .collect()
    }

    /// Takes out of a choice of parts those that were compiled from any that is not in it.
    fn close(&self, chosen: &mut [bool]) {
        let mut settled = false;
        while !settled {
            settled = true;
            for (number, part) in self.parts.iter().enumerate() {
                let has = |need: &u32| chosen.get(*need as usize) == Some(&true);
                if chosen.get(number) == Some(&true) && !part.needs.iter().all(has) {
                    settled = false;
                    if let Some(chosen) = chosen.get_mut(number) {
                        *chosen = false;
                    }
                }
            }
        }
    }

    /// Takes over from the manifest that the run began with when parts were last used. `used` says
    /// of a part whether this run did, and `hour` is now; a part that no run has used for a week is
    /// dropped. Gives whether anything differs that is worth writing.
    pub fn follow(&mut self, before: &Self, hour: u32, used: impl Fn(&Part) -> bool) -> bool {
        let earlier: HashMap<(Root, &str), &Part> =
            before.parts.iter().map(|part| (part.id(), part)).collect();
        let mut differs = self.parts.len() != before.parts.len();
        for part in &mut self.parts {
            let old = earlier.get(&part.id()).copied();
            let same = old.filter(|old| old.chunk == part.chunk && old.entries == part.entries);
            let noted = same.map(|old| old.used);
            part.used = match noted {
                // A day is fine enough.
                Some(noted) if !used(part) || noted.saturating_add(USE_NOTE_AGE) > hour => noted,
                _ => hour,
            };
            differs |= noted != Some(part.used);
        }
        let oldest = hour.saturating_sub(LIFETIME);
        let before = self.parts.len();
        self.drop_all(|part| part.used < oldest);
        differs || self.parts.len() < before
    }

    /// Gives the parts their chunks, which are in the parts' order. Parts without one are dropped,
    /// and what was compiled from them.
    pub fn fill_in(&mut self, chunks: &[Option<ObjectKey>]) {
        let kept = (0..self.parts.len()).map(|number| matches!(chunks.get(number), Some(Some(_))));
        let kept: Vec<bool> = kept.collect();
        for (part, chunk) in self.parts.iter_mut().zip(chunks) {
            if let Some(chunk) = chunk {
                part.chunk = *chunk;
            }
        }
        self.keep_only(kept);
    }

    /// Drops parts, and what was compiled from them.
    fn drop_all(&mut self, dropped: impl Fn(&Part) -> bool) {
        self.keep_only(self.parts.iter().map(|part| !dropped(part)).collect());
    }

    fn keep_only(&mut self, mut kept: Vec<bool>) {
        self.close(&mut kept);
        let mut numbers = BTreeMap::new();
        for (number, _) in kept.iter().enumerate().filter(|(_, kept)| **kept) {
            numbers.insert(number as u32, numbers.len() as u32);
        }
        let parts = std::mem::take(&mut self.parts).into_iter().enumerate();
        self.parts = parts
            .filter(|(number, _)| kept.get(*number) == Some(&true))
            .map(|(_, mut part)| {
                part.needs = part
                    .needs
                    .iter()
                    .filter_map(|need| numbers.get(need).copied())
                    .collect();
                part
            })
            .collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cargo::lockfile::tests::asking_for;

    fn part(name: &str, package: &str, needs: &[u32]) -> Part {
        Part {
            root: Root::Target(0),
            name: name.to_owned(),
            guard: None,
            package: Package::Crate(package.to_owned()),
            entries: vec![Entry {
                path: format!("deps/{name}"),
                what: What::File {
                    length: 3,
                    mode: 0o644,
                },
                modified: UNIX_EPOCH.into(),
            }],
            chunk: chunk_key(blake3::hash(name.as_bytes())),
            needs: needs.to_vec(),
            used: 1000,
        }
    }

    fn chain() -> Manifest {
        let archive = Part {
            root: Root::Registry,
            ..part("archive", "a-1.0.0", &[])
        };
        let parts = vec![
            part("c", "c-1.0.0", &[1]),
            part("b", "b-1.0.0", &[2]),
            part("a", "a-1.0.0", &[]),
            part("d", "d-1.0.0", &[]),
            archive,
        ];
        Manifest { parts }
    }

    #[test]
    fn a_manifest_is_read_back_as_it_was_and_nothing_else_is_one() {
        let bytes = chain().to_bytes().unwrap();
        assert_eq!(Manifest::from_bytes(&bytes).unwrap(), chain());
        assert!(Manifest::from_bytes(&bytes[..bytes.len() / 2]).is_err());
        assert!(Manifest::from_bytes(b"").is_err());
    }

    #[test]
    fn what_was_compiled_from_another_version_is_not_wanted() {
        let all = [
            ("a", "1.0.0"),
            ("b", "1.0.0"),
            ("c", "1.0.0"),
            ("d", "1.0.0"),
        ];
        assert_eq!(chain().wanted(&asking_for(&all), true), [0, 1, 2, 3, 4]);
        // Another toolchain takes the archive only.
        assert_eq!(chain().wanted(&asking_for(&all), false), [4]);
        let bumped = [
            ("a", "1.0.1"),
            ("b", "1.0.0"),
            ("c", "1.0.0"),
            ("d", "1.0.0"),
        ];
        assert_eq!(chain().wanted(&asking_for(&bumped), true), [3]);
        assert_eq!(chain().wanted(&Lockfile::default(), true), [] as [usize; 0]);
        let mut broken = chain();
        broken.parts[2].needs = vec![77];
        assert_eq!(broken.wanted(&asking_for(&all), true), [3, 4]);
    }

    #[test]
    fn a_run_that_changed_nothing_has_nothing_to_write_until_a_day_has_gone() {
        let mut next = chain();
        assert!(!next.follow(&chain(), 1001, |_| true));
        assert_eq!(next, chain());
        assert!(next.follow(&chain(), 1024, |_| true));
        assert!(next.parts.iter().all(|part| part.used == 1024));
    }

    #[test]
    fn what_no_run_used_for_a_week_is_dropped_with_what_was_compiled_from_it() {
        let mut next = chain();
        let hour = 1001 + LIFETIME;
        assert!(next.follow(&chain(), hour, |part| part.name != "b"));
        let names: Vec<&str> = next.parts.iter().map(|part| part.name.as_str()).collect();
        assert_eq!(names, ["a", "d", "archive"]);
        assert!(next.parts.iter().all(|part| part.needs.is_empty()));
        // And what is new is not.
        let mut first = chain();
        assert!(first.follow(&Manifest::default(), hour, |_| false));
        assert_eq!(first.parts.len(), 5);
        assert!(first.parts.iter().all(|part| part.used == hour));
    }

    #[test]
    fn keys_tell_what_they_are_of() {
        let (one, two) = (Layout([1; 8]), Layout([2; 8]));
        let key = manifest_key(one, 7);
        assert_eq!(suits(key, one, 7), Some((true, true)));
        assert_eq!(suits(key, two, 7), Some((false, true)));
        assert_eq!(suits(key, one, 8), Some((true, false)));
        let chunk = chunk_key(blake3::hash(b"content"));
        assert_eq!(suits(chunk, one, 7), None);
        assert!(is_cargos(key) && is_cargos(chunk));
        assert!(!is_cargos(ObjectKey([7; 32])));
    }

    #[test]
    fn times_are_kept_to_the_nanosecond() {
        for time in [
            UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789),
            UNIX_EPOCH,
            UNIX_EPOCH - Duration::from_secs(5),
        ] {
            assert_eq!(SystemTime::from(Time::from(time)), time);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
            at: usize,
            change: u8,
        ) {
            let _ = Manifest::from_bytes(&bytes);
            let mut plain = postcard::to_stdvec(&chain()).unwrap();
            let at = at % plain.len();
            plain[at] ^= change;
            for plain in [bytes, plain] {
                let disguised = zstd::bulk::compress(&plain, 1).unwrap();
                if let Ok(manifest) = Manifest::from_bytes(&disguised) {
                    let lockfile = asking_for(&[("a", "1.0.0"), ("b", "1.0.0")]);
                    let wanted = manifest.wanted(&lockfile, true);
                    proptest::prop_assert!(wanted.iter().all(|part| *part < manifest.parts.len()));
                }
            }
        }
    }
}
