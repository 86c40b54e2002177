//! The manifest of a run's dependencies, and the choice of parts that another run wants.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::cargo_cache::build_key::BuildKey;
use crate::cargo_cache::lockfile::Lockfile;
use crate::cargo_cache::places::{PathsDigest, Place};
use crate::packs::index::{LIFETIME, ObjectKey};

/// The prefix of the keys of chunks. sccache's keys are digests, which do not begin so.
const CHUNK: [u8; 8] = *b"cargochk";

/// The prefix of the keys of manifests.
const MANIFEST: [u8; 8] = *b"cargoman";

/// The longest manifest that a reader accepts, in bytes, uncompressed.
const MANIFEST_LIMIT: usize = 64 << 20;

/// The zstd level for manifests.
const MANIFEST_LEVEL: i32 = 3;

/// How old, in hours, the note of a part's use may be before it is written again.
const USE_NOTE_AGE: u32 = 24;

/// Whether an object of the store belongs to the cargo cache and not to sccache.
pub fn is_cargo_key(key: ObjectKey) -> bool {
    key.0.starts_with(&CHUNK) || key.0.starts_with(&MANIFEST)
}

/// The key of the chunk with this content.
pub fn chunk_key(content: blake3::Hash) -> ObjectKey {
    joined(CHUNK, &content.as_bytes()[..24])
}

/// The key of the manifest of a lane's runs with this build key.
pub fn manifest_key(build_key: BuildKey, lane: u64) -> ObjectKey {
    joined(
        MANIFEST,
        &[build_key.0, lane.to_be_bytes(), [0; 8]].concat(),
    )
}

fn joined(kind: [u8; 8], rest: &[u8]) -> ObjectKey {
    let mut key = [0; 32];
    let (begin, end) = key.split_at_mut(8);
    begin.copy_from_slice(&kind);
    end.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    ObjectKey(key)
}

/// How well a manifest matches a run: whether it has the same build key, then whether it has the same lane.
/// `None` for a key that is no manifest's.
pub fn match_rank(key: ObjectKey, build_key: BuildKey, lane: u64) -> Option<(bool, bool)> {
    let (kind, rest) = key.0.split_first_chunk::<8>()?;
    let (its_build_key, rest) = rest.split_first_chunk::<8>()?;
    let (its_lane, _) = rest.split_first_chunk::<8>()?;
    let same = (
        *its_build_key == build_key.0,
        *its_lane == lane.to_be_bytes(),
    );
    (*kind == MANIFEST).then_some(same)
}

/// The folder that a part's paths begin in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum BaseDir {
    /// A build directory, by its number in [`CacheManifest::builds`].
    Build(u32),
    /// `registry` in cargo's home.
    Registry,
    /// `git` in cargo's home.
    Git,
}

/// The package that a part belongs to, by which a lockfile asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Package {
    /// A package of a registry, as `name-version`.
    Crate(String),
    /// A commit of a git repository, by the digits that cargo calls its checkout.
    Commit(String),
    /// Several packages.
    Several,
}

/// When a file was last changed: seconds since 1970, and nanoseconds beyond.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileTime {
    seconds: i64,
    nanoseconds: u32,
}

impl From<SystemTime> for FileTime {
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

impl From<FileTime> for SystemTime {
    fn from(time: FileTime) -> Self {
        let seconds = Duration::from_secs(time.seconds.unsigned_abs());
        let whole = if time.seconds >= 0 {
            UNIX_EPOCH.checked_add(seconds)
        } else {
            UNIX_EPOCH.checked_sub(seconds)
        };
        let nanoseconds = Duration::from_nanos(u64::from(time.nanoseconds));
        let time = whole.and_then(|whole| whole.checked_add(nanoseconds));
        time.unwrap_or(UNIX_EPOCH)
    }
}

/// The kind of a file, with the data of that kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A file: its length in bytes, and its permissions as Unix has them.
    File {
        /// The length.
        length: u64,
        /// The permissions; 0 if the system has none of this kind.
        mode: u32,
    },
    /// A text with a placeholder for each occurrence of the build directory's path, so that it can be
    /// extracted to another one.
    Text {
        /// The length in bytes with the placeholders.
        length: u64,
        /// The permissions, as a file's.
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
pub struct FileEntry {
    /// The path from the part's base directory, with `/` between its components.
    pub path: String,
    /// The kind of the file.
    pub kind: FileKind,
    /// When it was last changed.
    pub modified: FileTime,
}

/// Files that are of use only together: a compiled unit, a crate's archive, a checkout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachePart {
    /// The folder that its paths begin in.
    pub base: BaseDir,
    /// Its name, unique in its base directory.
    pub name: String,
    /// The commit marker, if it has one: the folder that is renamed last when the part is extracted.
    /// Without it cargo uses nothing of the part.
    pub commit_marker: Option<String>,
    /// The package that it belongs to.
    pub package: Package,
    /// Its paths, in the order in which files' contents are in the chunk.
    pub entries: Vec<FileEntry>,
    /// The chunk with its content.
    pub chunk: ObjectKey,
    /// The parts that it was compiled from, by their numbers in the manifest.
    pub needs: Vec<u32>,
    /// When a run last used it, in hours since 1970.
    pub used: u32,
    /// Whether its files hold the path of the build directory or of the checkout, so that it is right only
    /// in a job with the same paths.
    pub path_dependent: bool,
}

impl CachePart {
    /// The length in bytes of its files.
    pub fn length(&self) -> u64 {
        length(&self.entries)
    }

    /// Whether it is a compiled unit.
    pub fn is_unit(&self) -> bool {
        matches!(self.base, BaseDir::Build(_))
    }

    /// Its identity among the parts of a manifest.
    pub fn id(&self) -> (BaseDir, &str) {
        (self.base, &self.name)
    }
}

/// The length in bytes of all files among `entries`.
pub fn length(entries: &[FileEntry]) -> u64 {
    let lengths = entries.iter().map(|entry| match entry.kind {
        FileKind::File { length, .. } | FileKind::Text { length, .. } => length,
        FileKind::Link(_) | FileKind::Folder | FileKind::Symlink(_) => 0,
    });
    lengths.fold(0, u64::saturating_add)
}

/// A build directory that a run left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildDirectory {
    /// Its place.
    pub place: Place,
    /// The digest of its path and the checkout's, for parts that depend on these paths.
    pub paths: PathsDigest,
}

/// The dependencies that a run left for later ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheManifest {
    /// The build directories that parts are in.
    pub builds: Vec<BuildDirectory>,
    /// The parts.
    pub parts: Vec<CachePart>,
}

impl CacheManifest {
    /// The manifest as it is stored.
    ///
    /// # Errors
    /// [`io::Error`] if it cannot be encoded or compressed.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let bytes = postcard::to_stdvec(self).map_err(io::Error::other)?;
        zstd::bulk::compress(&bytes, MANIFEST_LEVEL)
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// [`io::Error`] if the bytes are no manifest.
    pub fn from_bytes(bytes: &[u8]) -> io::Result<Self> {
        let mut plain = Vec::new();
        let decoder = zstd::Decoder::new(bytes)?;
        let mut limited = io::Read::take(decoder, MANIFEST_LIMIT as u64);
        io::Read::read_to_end(&mut limited, &mut plain)?;
        postcard::from_bytes(&plain).map_err(io::Error::other)
    }

    /// The parts that a run with this lockfile wants, by their numbers: those of packages that it asks for,
    /// compiled from nothing else. Compiled units are among them only if they are `usable`.
    pub fn wanted(&self, lockfile: &Lockfile, usable: impl Fn(&CachePart) -> bool) -> Vec<usize> {
        let mut wanted: Vec<bool> = self
            .parts
            .iter()
            .map(|part| match &part.package {
                _ if part.is_unit() && !usable(part) => false,
                Package::Crate(name) => lockfile.has_crate(name),
                Package::Commit(prefix) => lockfile.has_commit(prefix),
                Package::Several => !lockfile.is_empty(),
            })
            .collect();
        self.retain_closed(&mut wanted);
        let numbers = wanted.iter().enumerate();
        numbers
            .filter(|(_, wanted)| **wanted)
            .map(|(number, _)| number)
            .collect()
    }

    /// Removes from a choice of parts those that were compiled from a part that is not in it.
    fn retain_closed(&self, chosen: &mut [bool]) {
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

    /// Carries over the times of last use from the manifest that the run began with. `used` says whether
    /// this run used a part, and `hour` is now. Drops parts that no run has used for a week. Returns
    /// whether the manifest differs enough to be written.
    pub fn carry_over_usage(
        &mut self,
        before: &Self,
        hour: u32,
        used: impl Fn(&CachePart) -> bool,
    ) -> bool {
        let earlier: HashMap<(BaseDir, &str), &CachePart> =
            before.parts.iter().map(|part| (part.id(), part)).collect();
        let mut differs = self.parts.len() != before.parts.len() || self.builds != before.builds;
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

    /// Sets the chunks of the parts, in the parts' order. Drops parts without one, and the parts that were
    /// compiled from them.
    pub fn set_chunks(&mut self, chunks: &[Option<ObjectKey>]) {
        let kept: Vec<bool> = (0..self.parts.len())
            .map(|number| matches!(chunks.get(number), Some(Some(_))))
            .collect();
        for (part, chunk) in self.parts.iter_mut().zip(chunks) {
            if let Some(chunk) = chunk {
                part.chunk = *chunk;
            }
        }
        self.keep_only(kept);
    }

    /// Drops parts, and the parts that were compiled from them.
    fn drop_all(&mut self, dropped: impl Fn(&CachePart) -> bool) {
        self.keep_only(self.parts.iter().map(|part| !dropped(part)).collect());
    }

    fn keep_only(&mut self, mut kept: Vec<bool>) {
        self.retain_closed(&mut kept);
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
    use crate::cargo_cache::lockfile::tests::asking_for;

    fn part(name: &str, package: &str, needs: &[u32]) -> CachePart {
        CachePart {
            base: BaseDir::Build(0),
            name: name.to_owned(),
            commit_marker: None,
            package: Package::Crate(package.to_owned()),
            entries: vec![FileEntry {
                path: format!("deps/{name}"),
                kind: FileKind::File {
                    length: 3,
                    mode: 0o644,
                },
                modified: UNIX_EPOCH.into(),
            }],
            chunk: chunk_key(blake3::hash(name.as_bytes())),
            needs: needs.to_vec(),
            used: 1000,
            path_dependent: false,
        }
    }

    fn chain() -> CacheManifest {
        let archive = CachePart {
            base: BaseDir::Registry,
            ..part("archive", "a-1.0.0", &[])
        };
        let parts = vec![
            part("c", "c-1.0.0", &[1]),
            part("b", "b-1.0.0", &[2]),
            part("a", "a-1.0.0", &[]),
            part("d", "d-1.0.0", &[]),
            archive,
        ];
        CacheManifest {
            builds: Vec::new(),
            parts,
        }
    }

    #[test]
    fn a_manifest_is_read_back_as_it_was_and_nothing_else_is_one() {
        let bytes = chain().to_bytes().unwrap();
        assert_eq!(CacheManifest::from_bytes(&bytes).unwrap(), chain());
        assert!(CacheManifest::from_bytes(&bytes[..bytes.len() / 2]).is_err());
        assert!(CacheManifest::from_bytes(b"").is_err());
    }

    #[test]
    fn what_was_compiled_from_another_version_is_not_wanted() {
        let all = [
            ("a", "1.0.0"),
            ("b", "1.0.0"),
            ("c", "1.0.0"),
            ("d", "1.0.0"),
        ];
        assert_eq!(chain().wanted(&asking_for(&all), |_| true), [0, 1, 2, 3, 4]);
        // Another toolchain wants only the archive.
        assert_eq!(chain().wanted(&asking_for(&all), |_| false), [4]);
        let bumped = [
            ("a", "1.0.1"),
            ("b", "1.0.0"),
            ("c", "1.0.0"),
            ("d", "1.0.0"),
        ];
        assert_eq!(chain().wanted(&asking_for(&bumped), |_| true), [3]);
        assert_eq!(
            chain().wanted(&Lockfile::default(), |_| true),
            [] as [usize; 0]
        );
        let mut broken = chain();
        broken.parts[2].needs = vec![77];
        assert_eq!(broken.wanted(&asking_for(&all), |_| true), [3, 4]);
    }

    #[test]
    fn a_run_that_changed_nothing_has_nothing_to_write_until_a_day_has_gone() {
        let mut next = chain();
        assert!(!next.carry_over_usage(&chain(), 1001, |_| true));
        assert_eq!(next, chain());
        assert!(next.carry_over_usage(&chain(), 1024, |_| true));
        assert!(next.parts.iter().all(|part| part.used == 1024));
    }

    #[test]
    fn what_no_run_used_for_a_week_is_dropped_with_what_was_compiled_from_it() {
        let mut next = chain();
        let hour = 1001 + LIFETIME;
        assert!(next.carry_over_usage(&chain(), hour, |part| part.name != "b"));
        let names: Vec<&str> = next.parts.iter().map(|part| part.name.as_str()).collect();
        assert_eq!(names, ["a", "d", "archive"]);
        assert!(next.parts.iter().all(|part| part.needs.is_empty()));
        // New parts are kept.
        let mut first = chain();
        assert!(first.carry_over_usage(&CacheManifest::default(), hour, |_| false));
        assert_eq!(first.parts.len(), 5);
        assert!(first.parts.iter().all(|part| part.used == hour));
    }

    #[test]
    fn keys_tell_what_they_are_of() {
        let (one, two) = (BuildKey([1; 8]), BuildKey([2; 8]));
        let key = manifest_key(one, 7);
        assert_eq!(match_rank(key, one, 7), Some((true, true)));
        assert_eq!(match_rank(key, two, 7), Some((false, true)));
        assert_eq!(match_rank(key, one, 8), Some((true, false)));
        let chunk = chunk_key(blake3::hash(b"content"));
        assert_eq!(match_rank(chunk, one, 7), None);
        assert!(is_cargo_key(key) && is_cargo_key(chunk));
        assert!(!is_cargo_key(ObjectKey([7; 32])));
    }

    #[test]
    fn times_are_kept_to_the_nanosecond() {
        for time in [
            UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789),
            UNIX_EPOCH,
            UNIX_EPOCH - Duration::from_secs(5),
        ] {
            assert_eq!(SystemTime::from(FileTime::from(time)), time);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
            at: usize,
            change: u8,
        ) {
            let _ = CacheManifest::from_bytes(&bytes);
            let mut plain = postcard::to_stdvec(&chain()).unwrap();
            let at = at % plain.len();
            plain[at] ^= change;
            for plain in [bytes, plain] {
                let disguised = zstd::bulk::compress(&plain, 1).unwrap();
                if let Ok(manifest) = CacheManifest::from_bytes(&disguised) {
                    let lockfile = asking_for(&[("a", "1.0.0"), ("b", "1.0.0")]);
                    let wanted = manifest.wanted(&lockfile, |_| true);
                    proptest::prop_assert!(wanted.iter().all(|part| *part < manifest.parts.len()));
                }
            }
        }
    }
}
