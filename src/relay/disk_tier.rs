//! The disk tier: sccache's disk cache in front of the relay.
//!
//! sccache keeps its preprocessor cache, which saves most of the work of a hit for C, on disk only. So
//! sccache gets a disk cache of the job's own as the first tier of its chain. Before the build the relay
//! writes there the preprocessor entries that the last run of this lane used, and small objects. Afterwards
//! it reads from there what is new.
//!
//! ```text
//! a/b/abc…                  an object
//! preprocessor/a/b/c/abc…   an entry of the preprocessor cache
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::packs::index::ObjectKey;
use crate::relay::modified;

/// The relay writes objects up to this size, in bytes, to sccache's disk before the build. sccache gets
/// larger ones from the relay: two more copies of the bytes cost little.
pub(super) const SMALL_OBJECT: u64 = 64 * 1024;

/// The result of filling sccache's disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefillReport {
    /// Objects.
    pub objects: u64,
    /// Entries of the preprocessor cache.
    pub entries: u64,
    /// Whether no pack has an object that sccache could ask for. The relay then takes new objects from the
    /// disk, and sccache needs neither to look up objects in the relay nor to send its own.
    pub nothing_known: bool,
    /// Whether all packs arrived that the relay waited for.
    pub complete: bool,
    /// The first error so far, in words.
    pub error: Option<String>,
}

/// The cache of sccache's that a file belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CacheFileKind {
    Object,
    Preprocessor,
}

/// A file of sccache's disk cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CacheFile {
    pub(super) kind: CacheFileKind,
    pub(super) key: ObjectKey,
    pub(super) path: PathBuf,
    /// When it was last changed.
    pub(super) modified: SystemTime,
    /// Whether sccache has written it, or read it since the relay wrote it.
    pub(super) touched: bool,
}

/// The modification time of files that the relay wrote and sccache has not used: sccache sets the time of a
/// file that it reads.
fn untouched() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_000_000_000)
}

/// The path of an entry in `folder`, as sccache has it (`make_key_path` of `src/cache/disk.rs`,
/// `normalize_key` of `src/cache/utils.rs`).
pub(super) fn path_of(folder: &Path, kind: CacheFileKind, key: ObjectKey) -> PathBuf {
    let key = key.to_string();
    let (one, two, three) = (&key[0..1], &key[1..2], &key[2..3]);
    match kind {
        CacheFileKind::Object => folder.join(one).join(two).join(&key),
        CacheFileKind::Preprocessor => folder
            .join("preprocessor")
            .join(one)
            .join(two)
            .join(three)
            .join(&key),
    }
}

/// Writes an entry unless it exists. Returns whether it did.
pub(super) fn put(
    folder: &Path,
    kind: CacheFileKind,
    key: ObjectKey,
    content: &[u8],
) -> io::Result<bool> {
    let path = path_of(folder, kind, key);
    let create = || File::options().write(true).create_new(true).open(&path);
    let mut file = match create() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            create()?
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        created => created?,
    };
    let written = file
        .write_all(content)
        .and_then(|()| file.set_modified(untouched()));
    // sccache would read half an entry as a whole one.
    written.inspect_err(|_| drop(fs::remove_file(&path)))?;
    Ok(true)
}

/// All entries in `folder`, without files that are no entries of sccache's or that vanish during the scan.
pub(super) fn scan(folder: &Path) -> Vec<CacheFile> {
    let mut found = Vec::new();
    let mut folders = vec![(folder.to_owned(), CacheFileKind::Object, 0)];
    while let Some((folder, kind, depth)) = folders.pop() {
        let Ok(entries) = fs::read_dir(folder) else {
            continue;
        };
        for entry in entries.flatten() {
            let Ok(file_type) = entry.file_type() else {
                continue;
            };
            let name = entry.file_name();
            let Some(name) = name.to_str() else {
                continue;
            };
            if file_type.is_dir() && depth < 5 {
                let kind = match name {
                    "preprocessor" => CacheFileKind::Preprocessor,
                    _ => kind,
                };
                folders.push((entry.path(), kind, depth + 1));
            } else if file_type.is_file()
                && let Ok(key) = name.parse()
                && let Ok(metadata) = entry.metadata()
            {
                found.push(CacheFile {
                    kind,
                    key,
                    path: entry.path(),
                    modified: modified(&metadata),
                    touched: modified(&metadata) != untouched(),
                });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_is_found_and_known_to_be_used_once_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (ObjectKey([0xab; 32]), ObjectKey([0xcd; 32]));
        put(folder.path(), CacheFileKind::Object, one, b"object").unwrap();
        put(folder.path(), CacheFileKind::Preprocessor, two, b"entry").unwrap();
        // An entry of sccache's is not replaced.
        put(folder.path(), CacheFileKind::Object, one, b"other").unwrap();
        fs::write(folder.path().join("a").join(".sccachetmp123"), "half").unwrap();
        let path = path_of(folder.path(), CacheFileKind::Object, one);
        assert_eq!(fs::read(&path).unwrap(), b"object");
        let mut found = scan(folder.path());
        found.sort_by_key(|found| found.key);
        let kinds: Vec<_> = found.iter().map(|found| (found.kind, found.key)).collect();
        assert_eq!(
            kinds,
            [
                (CacheFileKind::Object, one),
                (CacheFileKind::Preprocessor, two)
            ]
        );
        assert!(found.iter().all(|found| !found.touched));
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(SystemTime::now())
            .unwrap();
        let touched = scan(folder.path())
            .iter()
            .filter(|found| found.touched)
            .count();
        assert_eq!(touched, 1);
    }
}
