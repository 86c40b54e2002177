//! Creates a folder and files that only this user may access, if the system has such modes: anyone
//! who reads the catalog has the key of the signed URLs, and with it every repository's entries.

use std::fs;
use std::io;
use std::path::Path;

/// Creates `folder` if it is missing, for this user alone, and removes the rights of others if it
/// exists. `false` if it belongs to another user, who decides who reads it.
///
/// # Errors
/// Fails if it cannot be made, or its mode cannot be read or set.
#[cfg(unix)]
pub fn folder(folder: &Path) -> io::Result<bool> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};

    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    let metadata = fs::metadata(folder)?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Ok(metadata.mode() & 0o077 == 0);
    }
    narrow(folder, metadata.mode(), 0o700)?;
    Ok(true)
}

/// The same on systems whose folders inherit their rights from the folder above.
///
/// # Errors
/// Fails if it cannot be made.
#[cfg(not(unix))]
pub fn folder(folder: &Path) -> io::Result<bool> {
    fs::create_dir_all(folder)?;
    Ok(true)
}

/// Syncs the names in `folder`, and its own name, to the disk, so that they survive a power cut.
///
/// # Errors
/// Fails if it cannot be read.
#[cfg(unix)]
pub fn keep_name(folder: &Path) -> io::Result<()> {
    sync(folder)?;
    let above = match folder.parent() {
        Some(above) if above.as_os_str().is_empty() => Some(Path::new(".")),
        above => above,
    };
    // A parent that this user may not read is not this user's to sync.
    match above.map(fs::File::open) {
        Some(Ok(above)) => above.sync_all(),
        Some(Err(_)) | None => Ok(()),
    }
}

/// Syncs the names in `folder` to the disk.
///
/// # Errors
/// Fails if it cannot be read.
#[cfg(unix)]
pub fn sync(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}

/// On these systems folders are no files and cannot be synced.
///
/// # Errors
/// It never fails.
#[cfg(not(unix))]
pub fn sync(_folder: &Path) -> io::Result<()> {
    Ok(())
}

/// On these systems folders are no files and cannot be synced.
///
/// # Errors
/// It never fails.
#[cfg(not(unix))]
pub fn keep_name(_folder: &Path) -> io::Result<()> {
    Ok(())
}

/// Creates the file at `path` if it is missing, for this user alone, and removes the rights of
/// others if it exists: `true` if they had some.
///
/// # Errors
/// Fails if it cannot be made, or its mode cannot be read or set.
pub fn file(path: &Path) -> io::Result<bool> {
    let mut options = fs::OpenOptions::new();
    options.append(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(path)?;
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::MetadataExt::mode(&file.metadata()?);
        narrow(path, mode, 0o600)
    }
    #[cfg(not(unix))]
    {
        drop(file);
        Ok(false)
    }
}

/// Creates the file at `path` for this user alone, to be read and written.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] if it is there, or another error if it cannot be made.
pub fn new_file(path: &Path) -> io::Result<fs::File> {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// Sets the mode of `path` to `ours` if its current `mode` gives rights to others.
#[cfg(unix)]
fn narrow(path: &Path, mode: u32, ours: u32) -> io::Result<bool> {
    if mode & 0o077 == 0 {
        return Ok(false);
    }
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(ours))?;
    Ok(true)
}

#[cfg(unix)]
#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_is_new_and_what_was_open_to_others_is_the_users_alone() {
        let outer = tempfile::tempdir().unwrap();
        let inner = outer.path().join("a/b");
        let path = inner.join("file");
        assert!(folder(&inner).unwrap());
        assert!(!file(&path).unwrap());
        assert!(new_file(&path).is_err());
        let new = inner.join("new");
        new_file(&new).unwrap();
        assert_eq!(mode(&new), 0o600);
        for (path, ours, open) in [(&inner, 0o700, 0o755), (&path, 0o600, 0o640)] {
            assert_eq!(mode(path), ours);
            fs::set_permissions(path, PermissionsExt::from_mode(open)).unwrap();
        }
        assert!(folder(&inner).unwrap());
        assert!(file(&path).unwrap());
        assert_eq!((mode(&inner), mode(&path)), (0o700, 0o600));
        // A private file stays as it is.
        fs::set_permissions(&path, PermissionsExt::from_mode(0o400)).unwrap();
        if fs::OpenOptions::new().append(true).open(&path).is_ok() {
            assert!(!file(&path).unwrap());
            assert_eq!(mode(&path), 0o400);
        }
    }
}
