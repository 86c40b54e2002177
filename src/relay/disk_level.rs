//! sccache's disk cache in front of the relay.
//!
//! sccache keeps its preprocessor cache, which spares it most of the work of a hit for C, on disk
//! only. So it gets a disk cache of the job's own as the first level of a chain; before the build
//! the relay puts there what the last run of this lane used and what is small, and afterwards it
//! takes from there what is new.
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

use crate::relay::modified;
use crate::store::index::ObjectKey;

/// Objects up to this size, in bytes, are put on sccache's disk before the build; it gets larger
/// ones from the relay, where two more copies of the bytes do not count.
pub(super) const SMALL_OBJECT: u64 = 64 * 1024;

/// What was put on sccache's disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hydrated {
    /// Objects.
    pub objects: u64,
    /// Entries of the preprocessor cache.
    pub entries: u64,
    /// Whether everything was there that was waited for.
    pub complete: bool,
    /// What went wrong so far, in words.
    pub trouble: Option<String>,
}

/// Which of sccache's two caches a file belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Object,
    Preprocessor,
}

/// A file of sccache's disk cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) kind: Kind,
    pub(super) key: ObjectKey,
    pub(super) path: PathBuf,
    /// When it was last changed.
    pub(super) modified: SystemTime,
    /// Whether sccache has written it, or read it since it was put there.
    pub(super) touched: bool,
}

/// When files were last changed that were put there and not yet used: sccache sets the time of a
/// file that it reads.
fn untouched() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_000_000_000)
}

/// The path of an entry in `folder`, as sccache has it (`make_key_path` of `src/cache/disk.rs`,
/// `normalize_key` of `src/cache/utils.rs`).
pub(super) fn path_of(folder: &Path, kind: Kind, key: ObjectKey) -> PathBuf {
    let key = key.to_string();
    let (one, two, three) = (&key[0..1], &key[1..2], &key[2..3]);
    match kind {
        Kind::Object => folder.join(one).join(two).join(&key),
        Kind::Preprocessor => folder
            .join("preprocessor")
            .join(one)
            .join(two)
            .join(three)
            .join(&key),
    }
}

/// Puts an entry there, unless there is one. Says whether it did.
pub(super) fn put(folder: &Path, kind: Kind, key: ObjectKey, content: &[u8]) -> io::Result<bool> {
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
    // Half an entry would be read as a whole one.
    written.inspect_err(|_| drop(fs::remove_file(&path)))?;
    Ok(true)
}

/// All entries in `folder`. What is no entry of sccache's, or goes while this looks, is left out.
pub(super) fn scan(folder: &Path) -> Vec<Found> {
    let mut found = Vec::new();
    let mut folders = vec![(folder.to_owned(), Kind::Object, 0)];
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
                    "preprocessor" => Kind::Preprocessor,
                    _ => kind,
                };
                folders.push((entry.path(), kind, depth + 1));
            } else if file_type.is_file()
                && let Ok(key) = name.parse()
                && let Ok(metadata) = entry.metadata()
            {
                found.push(Found {
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
        put(folder.path(), Kind::Object, one, b"object").unwrap();
        put(folder.path(), Kind::Preprocessor, two, b"entry").unwrap();
        // sccache's is not replaced.
        put(folder.path(), Kind::Object, one, b"other").unwrap();
        fs::write(folder.path().join("a").join(".sccachetmp123"), "half").unwrap();
        let path = path_of(folder.path(), Kind::Object, one);
        assert_eq!(fs::read(&path).unwrap(), b"object");
        let mut found = scan(folder.path());
        found.sort_by_key(|found| found.key);
        let kinds: Vec<_> = found.iter().map(|found| (found.kind, found.key)).collect();
        assert_eq!(kinds, [(Kind::Object, one), (Kind::Preprocessor, two)]);
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
