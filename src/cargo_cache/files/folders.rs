//! Opens and creates folders below the root through no link, and sets their times.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use crate::cargo_cache::files::ExtractError;
use crate::cargo_cache::files::paths::relative_name;
use crate::cargo_cache::open_below::OpenFolder;

/// The parent folder of `path`, created if missing, and the name in it.
pub(super) fn parent_of<'p>(
    below: &OpenFolder,
    path: &'p str,
) -> Result<(OpenFolder, &'p str), ExtractError> {
    let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
    let folder = below
        .make_all(parent)
        .map_err(|error| not_through_a_link(error, path))?;
    Ok((folder, name))
}

/// The file at `path` below `root`, through no link.
///
/// # Errors
/// [`ExtractError::Io`] if there is none, or if a link leads there.
pub(crate) fn open_below(root: &Path, path: &str) -> Result<File, ExtractError> {
    let below = OpenFolder::open(root)?;
    let (parent, name) = parent_of(&below, path)?;
    Ok(parent.read(name)?)
}

/// Creates the folder `folder` below `root`, through no link.
///
/// # Errors
/// [`ExtractError::UnsafePath`] if a link leads there, [`ExtractError::Io`] if the disk refuses it.
pub(crate) fn make_below(root: &Path, folder: &Path) -> Result<(), ExtractError> {
    let outside = || ExtractError::UnsafePath(folder.display().to_string());
    let below = folder.strip_prefix(root).ok().and_then(relative_name);
    let path = below.ok_or_else(outside)?;
    let made = OpenFolder::open(root)?.make_all(&path);
    made.map(drop)
        .map_err(|error| not_through_a_link(error, &path))
}

/// Translates the system's error for a name that should be a folder and is a link or a file.
pub(super) fn not_through_a_link(error: io::Error, path: &str) -> ExtractError {
    match error.kind() {
        io::ErrorKind::NotADirectory => ExtractError::UnsafePath(path.to_owned()),
        _ => ExtractError::Io(error),
    }
}

/// Sets a folder's modification time, if the system allows it: cargo checks the times of folders that a
/// build script names.
pub fn set_folder_time(folder: &Path, time: SystemTime) {
    // Windows does not open a folder like a file.
    let _ = filetime::set_file_mtime(folder, time.into());
}

#[cfg(all(test, unix))]
mod tests {
    use std::fs;

    use super::*;
    use crate::cargo_cache::files::fixtures::{extract, part, source};
    use crate::cargo_cache::manifest::{CachePart, FileEntry, FileKind};

    #[test]
    fn a_link_that_is_there_already_is_not_followed() {
        let source = source();
        let (good, content) = part(source.path(), &["deps/file"], None);
        let target = tempfile::tempdir().unwrap();
        let [root, elsewhere] = ["root", "elsewhere"].map(|name| target.path().join(name));
        fs::create_dir(&root).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, root.join("deps")).unwrap();
        let refused = extract(&root, &good, &content);
        assert!(matches!(refused, Err(ExtractError::UnsafePath(_))));
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    }

    #[test]
    fn a_part_that_makes_links_cannot_lead_one_that_is_put_at_the_same_time_out_of_the_folder() {
        let source = source();
        let (good, content) = part(source.path(), &["deps/file"], None);
        let file = good.entries[0].clone();
        let linking = CachePart {
            entries: vec![FileEntry {
                path: "deps/inner".to_owned(),
                kind: FileKind::Symlink("../other".to_owned()),
                modified: file.modified,
            }],
            ..good.clone()
        };
        let through = CachePart {
            entries: vec![FileEntry {
                path: "deps/inner/ESCAPED".to_owned(),
                ..file
            }],
            ..good.clone()
        };
        for _ in 0..50 {
            let target = tempfile::tempdir().unwrap();
            let root = target.path();
            fs::create_dir(root.join("other")).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| extract(root, &linking, &[]));
                scope.spawn(|| extract(root, &through, &content));
            });
            // Either the link was first, or the folder.
            assert_eq!(fs::read_dir(root.join("other")).unwrap().count(), 0);
        }
    }
}
