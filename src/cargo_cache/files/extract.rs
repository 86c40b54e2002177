//! Extracts a part after checks of its length and paths, and tells whether a part exists.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use crate::cargo_cache::files::ExtractError;
use crate::cargo_cache::files::extractor::Extractor;
use crate::cargo_cache::files::paths::is_inside;
use crate::cargo_cache::files::staged::CommitMarker;
use crate::cargo_cache::manifest::{CachePart, FileEntry};
use crate::cargo_cache::open_below::OpenFolder;

/// The largest part, in bytes: a larger one costs more to move than to build again.
pub const PART_LIMIT: u64 = 1 << 30;

/// Whether a part exists on the disk: its commit marker, or without one all of its files.
pub fn exists(root: &Path, part: &CachePart) -> bool {
    match &part.commit_marker {
        Some(commit_marker) => root.join(commit_marker).symlink_metadata().is_ok(),
        None => part
            .entries
            .iter()
            .all(|entry| root.join(&entry.path).symlink_metadata().is_ok()),
    }
}

/// Called with the length of each piece of content in bytes; an error ends the extraction.
pub type Checkpoint<'a> = &'a dyn Fn(u64) -> io::Result<()>;

/// A reader that calls the checkpoint at each piece.
pub(in crate::cargo_cache) struct CheckedReader<'a, R> {
    pub(in crate::cargo_cache) content: R,
    pub(in crate::cargo_cache) checkpoint: Checkpoint<'a>,
}

impl<R: Read> Read for CheckedReader<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.content.read(bytes)?;
        (self.checkpoint)(read as u64)?;
        Ok(read)
    }
}

/// The conditions of extracting a part.
#[derive(Clone, Copy)]
pub struct Conditions<'a> {
    /// Decides whether a file may have its name, given its entry and the file at its beginning.
    pub accepts: &'a dyn Fn(&FileEntry, &mut File) -> io::Result<bool>,
    /// Called at each piece of content.
    pub checkpoint: Checkpoint<'a>,
}

/// Extracts a part to the disk, given its compressed content. Existing files stay as they are; if the
/// commit marker exists, nothing is extracted. A file that `accepts` refuses does not get its name.
///
/// # Errors
/// [`ExtractError::UnsafePath`] if a path leads outside, [`ExtractError::AlreadyExists`] if the commit
/// marker exists, [`ExtractError::Io`] if the content is too large or damaged, the disk refuses it, or
/// `checkpoint` ends it. The commit marker is absent after an error, unless it existed before.
pub fn extract(
    root: &Path,
    part: &CachePart,
    compressed: impl Read,
    conditions: Conditions<'_>,
) -> Result<(), ExtractError> {
    check(part)?;
    fs::create_dir_all(root)?;
    let below = OpenFolder::open(root)?;
    let commit_marker = match &part.commit_marker {
        Some(commit_marker) => Some(CommitMarker::of(&below, commit_marker)?),
        None => None,
    };
    let extractor = Extractor {
        part,
        root,
        below,
        commit_marker,
        conditions,
    };
    let result = extractor.extract(compressed);
    if result.is_err()
        && let Some(commit_marker) = &extractor.commit_marker
    {
        let _ = fs::remove_dir_all(root.join(&commit_marker.staged));
    }
    result
}

/// Refuses a part that is too large, or has a path outside of its root.
fn check(part: &CachePart) -> Result<(), ExtractError> {
    if part.length() > PART_LIMIT {
        return Err(ExtractError::Io(io::ErrorKind::FileTooLarge.into()));
    }
    let paths = part.entries.iter().map(|entry| &entry.path);
    match paths
        .chain(&part.commit_marker)
        .find(|path| !is_inside(path))
    {
        Some(path) => Err(ExtractError::UnsafePath(path.clone())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::{extract as extract_if, *};
    use crate::cargo_cache::files::fixtures::{extract, part, source};
    use crate::cargo_cache::manifest::FileKind;

    #[cfg(unix)]
    #[test]
    fn a_part_is_put_back_with_its_modes_times_and_links() {
        use std::os::unix::fs::MetadataExt;

        use crate::cargo_cache::files::entries;

        let source = source();
        let (part, content) = part(source.path(), &["guard", "deps"], Some("guard"));
        assert_eq!(part.length(), 700_007);
        // The content of a file with two names is there once.
        assert!(content.len() < 1000);
        let target = tempfile::tempdir().unwrap();
        let root = target.path();
        assert!(!exists(root, &part));
        extract(root, &part, &content).unwrap();
        assert!(exists(root, &part));
        let paths = ["guard", "deps"].map(|folder| root.join(folder));
        let mut again = entries(root, &paths).unwrap().unwrap();
        // The times of links, and of a folder that the part does not list, do not matter.
        for (entry, before) in again.iter_mut().zip(&part.entries) {
            if matches!(entry.kind, FileKind::Symlink(_)) || entry.path == "deps" {
                entry.modified = before.modified;
            }
        }
        assert_eq!(again, part.entries);
        let inode = |name: &str| fs::metadata(root.join(name)).unwrap().ino();
        assert_eq!(inode("deps/file"), inode("deps/other"));
        assert_eq!(fs::read(root.join("guard/link")).unwrap(), b"content");
    }

    #[test]
    fn content_that_ends_early_leaves_no_guard() {
        let source = source();
        let (part, content) = part(source.path(), &["guard", "deps"], Some("guard"));
        for bytes in [&content[..content.len() / 2], b""] {
            let target = tempfile::tempdir().unwrap();
            assert!(extract(target.path(), &part, bytes).is_err());
            assert!(!target.path().join("guard").exists());
            let left: Vec<_> = fs::read_dir(target.path())
                .unwrap()
                .flatten()
                .map(|entry| entry.file_name())
                .collect();
            assert!(left.iter().all(|name| name == "deps"), "{left:?}");
        }
    }

    #[test]
    fn a_part_that_is_ended_in_the_middle_leaves_neither_guard_nor_half_a_file() {
        let source = source();
        let parts = [
            part(source.path(), &["guard", "deps"], Some("guard")),
            part(source.path(), &["guard/large"], None),
        ];
        for (part, content) in parts {
            let target = tempfile::tempdir().unwrap();
            let read = std::cell::Cell::new(0);
            let ended = extract_if(
                target.path(),
                &part,
                &*content,
                Conditions {
                    accepts: &|_, _| Ok(true),
                    checkpoint: &|length| {
                        read.set(read.get() + length);
                        if read.get() > 100_000 {
                            Err(io::ErrorKind::TimedOut.into())
                        } else {
                            Ok(())
                        }
                    },
                },
            );
            let is_late = |error: &io::Error| error.kind() == io::ErrorKind::TimedOut;
            assert!(
                matches!(&ended, Err(ExtractError::Io(error)) if is_late(error)),
                "{ended:?}"
            );
            // Long before the 700,000 bytes of its file.
            assert!(read.get() < 400_000, "{}", read.get());
            let mut left = fs::read_dir(target.path()).unwrap().flatten();
            assert!(left.all(|entry| {
                entry.file_name() == "guard" && fs::read_dir(entry.path()).unwrap().count() == 0
            }));
            assert_eq!(
                target.path().join("guard").exists(),
                part.commit_marker.is_none()
            );
        }
    }

    #[test]
    fn what_is_there_is_not_replaced() {
        let source = source();
        let (with_marker, content) = part(source.path(), &["guard", "deps"], Some("guard"));
        let target = tempfile::tempdir().unwrap();
        fs::create_dir(target.path().join("guard")).unwrap();
        let refused = extract(target.path(), &with_marker, &content);
        assert!(
            matches!(refused, Err(ExtractError::AlreadyExists(_))),
            "{refused:?}"
        );
        // The rest of a part without a commit marker is extracted.
        let (free, content) = part(source.path(), &["deps/file", "guard/large"], None);
        fs::create_dir(target.path().join("deps")).unwrap();
        fs::write(target.path().join("deps/file"), b"own").unwrap();
        extract(target.path(), &free, &content).unwrap();
        assert_eq!(fs::read(target.path().join("deps/file")).unwrap(), b"own");
        let large = fs::read(target.path().join("guard/large")).unwrap();
        assert_eq!(large.len(), 700_000);
    }

    #[test]
    fn a_part_that_unpacks_to_too_much_is_not_put_there() {
        let source = source();
        let (mut part, content) = part(source.path(), &["deps/file"], None);
        part.entries[0].kind = FileKind::File {
            length: PART_LIMIT + 1,
            mode: 0,
        };
        let target = tempfile::tempdir().unwrap();
        assert!(extract(target.path(), &part, &content).is_err());
        assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
    }
}
