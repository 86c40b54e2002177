//! Lists the files, folders and links of a part on the disk, as the manifest has them.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::cargo_cache::files::paths::relative_name;
use crate::cargo_cache::manifest::{FileEntry, FileKind};

/// The entry of the file, folder or symbolic link at `path` below `root`, without hard links. `None` for
/// anything else, and for names that are not Unicode.
fn entry(root: &Path, path: &Path, metadata: &fs::Metadata) -> io::Result<Option<FileEntry>> {
    let Some(name) = path.strip_prefix(root).ok().and_then(relative_name) else {
        return Ok(None);
    };
    let kind = if metadata.is_file() {
        FileKind::File {
            length: metadata.len(),
            mode: mode(metadata),
        }
    } else if metadata.is_dir() {
        FileKind::Folder
    } else if metadata.is_symlink() {
        match fs::read_link(path)?.to_str() {
            Some(target) => FileKind::Symlink(target.to_owned()),
            None => return Ok(None),
        }
    } else {
        return Ok(None);
    };
    Ok(Some(FileEntry {
        path: name,
        kind,
        modified: metadata.modified()?.into(),
    }))
}

/// The entries of everything at these paths and below, folders before their content. `None` if a part
/// cannot have one of them.
///
/// # Errors
/// [`io::Error`] if the disk cannot be read.
pub fn entries(root: &Path, paths: &[PathBuf]) -> io::Result<Option<Vec<FileEntry>>> {
    let mut found = Vec::new();
    let mut first_names: HashMap<(u64, u64), u32> = HashMap::new();
    let mut left: Vec<PathBuf> = paths.iter().rev().cloned().collect();
    while let Some(path) = left.pop() {
        let metadata = fs::symlink_metadata(&path)?;
        let Some(mut entry) = entry(root, &path, &metadata)? else {
            return Ok(None);
        };
        if metadata.is_dir() {
            let mut inner: Vec<PathBuf> = fs::read_dir(&path)?
                .map(|entry| Ok(entry?.path()))
                .collect::<io::Result<_>>()?;
            inner.sort_unstable_by(|one, other| other.cmp(one));
            left.append(&mut inner);
        } else if metadata.is_file()
            && let Some(identity) = shared_identity(&metadata)
        {
            let number = u32::try_from(found.len()).map_err(io::Error::other)?;
            let first = *first_names.entry(identity).or_insert(number);
            if first != number {
                entry.kind = FileKind::Link(first);
            }
        }
        found.push(entry);
    }
    Ok(Some(found))
}

/// The identity of a file that has several names; `None` for a file with a single name.
#[cfg(unix)]
fn shared_identity(metadata: &fs::Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    (metadata.nlink() > 1).then(|| (metadata.dev(), metadata.ino()))
}

#[cfg(not(unix))]
fn shared_identity(_metadata: &fs::Metadata) -> Option<(u64, u64)> {
    None
}

#[cfg(unix)]
fn mode(metadata: &fs::Metadata) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    metadata.permissions().mode() & 0o777
}

#[cfg(not(unix))]
fn mode(_metadata: &fs::Metadata) -> u32 {
    0
}
