//! An open folder, below which files are created by single names, so that no link leads anywhere else.
//!
//! It resolves a path name by name, each from the open folder before it, and the system itself refuses a
//! name that is a link. So nobody can insert a link between a check and a write.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::SystemTime;

/// A folder that is open.
#[derive(Debug)]
pub(crate) struct OpenFolder(system::Handle);

impl OpenFolder {
    /// The folder at `path`. It may lead through links: those are the user's own.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        system::open(path).map(Self)
    }

    /// The folder `name` in this one. A link is an error.
    pub(crate) fn folder(&self, name: &str) -> io::Result<Self> {
        system::folder(&self.0, name).map(Self)
    }

    /// The folder `name` in this one, created if missing.
    pub(crate) fn make_folder(&self, name: &str) -> io::Result<Self> {
        match self.make_new_folder(name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.folder(name),
            made => made,
        }
    }

    /// The new folder `name` in this one.
    pub(crate) fn make_new_folder(&self, name: &str) -> io::Result<Self> {
        system::make_folder(&self.0, name)?;
        self.folder(name)
    }

    /// The folder at a path of such names, created if missing.
    pub(crate) fn make_all(&self, path: &str) -> io::Result<Self> {
        let mut names = path.split('/').filter(|name| !name.is_empty());
        let mut folder = match names.next() {
            Some(name) => self.make_folder(name)?,
            None => return system::again(&self.0).map(Self),
        };
        for name in names {
            folder = folder.make_folder(name)?;
        }
        Ok(folder)
    }

    /// A new file, which can be read as well.
    pub(crate) fn create(&self, name: &str, mode: u32) -> io::Result<File> {
        system::create(&self.0, name, mode)
    }

    /// The file `name`, to be read. A link is an error.
    pub(crate) fn read(&self, name: &str) -> io::Result<File> {
        system::read(&self.0, name)
    }

    /// Whether there is anything called `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        system::has(&self.0, name)
    }

    /// Gives the file `name` the name `new` in the same folder. A file that has that name stays, and is an
    /// error.
    pub(crate) fn rename_file(&self, name: &str, new: &str) -> io::Result<()> {
        match self.link(name, self, new) {
            Ok(()) => self.remove_file(name),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(error),
            // A file system without hard links.
            Err(_) if !self.has(new) => self.rename(name, new),
            Err(error) => Err(error),
        }
    }

    /// Gives the folder `name` the name `new` in the same folder. A folder of that name that is not empty
    /// stays, and is an error.
    pub(crate) fn rename(&self, name: &str, new: &str) -> io::Result<()> {
        system::rename(&self.0, name, new)
    }

    /// Gives the file `name` another name in `folder`.
    pub(crate) fn link(&self, name: &str, folder: &Self, new: &str) -> io::Result<()> {
        system::link(&self.0, name, &folder.0, new)
    }

    /// Creates a symbolic link, on systems that have them.
    pub(crate) fn symlink(&self, target: &str, name: &str) -> io::Result<()> {
        system::symlink(&self.0, target, name)
    }

    /// Removes a file.
    pub(crate) fn remove_file(&self, name: &str) -> io::Result<()> {
        system::remove_file(&self.0, name)
    }

    /// Sets this folder's modification time, if the system allows it.
    pub(crate) fn set_time(&self, time: SystemTime) {
        system::set_time(&self.0, time);
    }
}

#[cfg(unix)]
mod system {
    use std::fs::File;
    use std::io;
    use std::os::fd::OwnedFd;
    use std::path::Path;
    use std::time::SystemTime;

    use rustix::fs::{
        AtFlags, Mode, OFlags, RawMode, linkat, mkdirat, openat, renameat, statat, unlinkat,
    };
    use rustix::io::Errno;

    pub(super) type Handle = OwnedFd;

    const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC);
    const NO_LINK: OFlags = OFlags::NOFOLLOW.union(OFlags::CLOEXEC);

    fn mode_of(mode: u32) -> Mode {
        // Only nine bits of a mode are used, and each system's type has these.
        #[allow(clippy::cast_possible_truncation)]
        Mode::from_raw_mode((mode & 0o777) as RawMode)
    }

    pub(super) fn open(path: &Path) -> io::Result<Handle> {
        Ok(rustix::fs::open(path, FOLDER, Mode::empty())?)
    }

    pub(super) fn again(handle: &Handle) -> io::Result<Handle> {
        handle.try_clone()
    }

    pub(super) fn folder(handle: &Handle, name: &str) -> io::Result<Handle> {
        let flags = FOLDER.union(OFlags::NOFOLLOW);
        openat(handle, name, flags, Mode::empty()).map_err(|error| match error {
            // Some systems return this for a link and others for a file.
            Errno::LOOP => io::ErrorKind::NotADirectory.into(),
            error => error.into(),
        })
    }

    pub(super) fn make_folder(handle: &Handle, name: &str) -> io::Result<()> {
        Ok(mkdirat(handle, name, mode_of(0o777))?)
    }

    pub(super) fn create(handle: &Handle, name: &str, mode: u32) -> io::Result<File> {
        let new = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | NO_LINK;
        Ok(File::from(openat(handle, name, new, mode_of(mode))?))
    }

    pub(super) fn read(handle: &Handle, name: &str) -> io::Result<File> {
        // Opening a pipe without a writer must not block.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | NO_LINK;
        Ok(File::from(openat(handle, name, flags, Mode::empty())?))
    }

    pub(super) fn has(handle: &Handle, name: &str) -> bool {
        statat(handle, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    pub(super) fn rename(handle: &Handle, name: &str, new: &str) -> io::Result<()> {
        Ok(renameat(handle, name, handle, new)?)
    }

    pub(super) fn link(handle: &Handle, name: &str, other: &Handle, new: &str) -> io::Result<()> {
        Ok(linkat(handle, name, other, new, AtFlags::empty())?)
    }

    pub(super) fn symlink(handle: &Handle, target: &str, name: &str) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(target, handle, name)?)
    }

    pub(super) fn remove_file(handle: &Handle, name: &str) -> io::Result<()> {
        Ok(unlinkat(handle, name, AtFlags::empty())?)
    }

    pub(super) fn set_time(handle: &Handle, time: SystemTime) {
        if let Ok(handle) = handle.try_clone() {
            // If this fails, cargo runs a build script that names the folder again.
            let _ = File::from(handle).set_modified(time);
        }
    }
}

/// No part creates a link on these systems, so none can put one in another's way.
#[cfg(not(unix))]
mod system {
    use std::fs::{self, File};
    use std::io;
    use std::path::{Path, PathBuf};
    use std::time::SystemTime;

    pub(super) type Handle = PathBuf;

    pub(super) fn open(path: &Path) -> io::Result<Handle> {
        if path.is_dir() {
            Ok(path.to_owned())
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    pub(super) fn again(handle: &Handle) -> io::Result<Handle> {
        Ok(handle.clone())
    }

    pub(super) fn folder(handle: &Handle, name: &str) -> io::Result<Handle> {
        let path = handle.join(name);
        if path.symlink_metadata()?.is_dir() {
            Ok(path)
        } else {
            Err(io::ErrorKind::NotADirectory.into())
        }
    }

    pub(super) fn make_folder(handle: &Handle, name: &str) -> io::Result<()> {
        fs::create_dir(handle.join(name))
    }

    pub(super) fn create(handle: &Handle, name: &str, _mode: u32) -> io::Result<File> {
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        options.open(handle.join(name))
    }

    pub(super) fn read(handle: &Handle, name: &str) -> io::Result<File> {
        let path = handle.join(name);
        if path.symlink_metadata()?.is_file() {
            File::open(path)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    pub(super) fn has(handle: &Handle, name: &str) -> bool {
        handle.join(name).symlink_metadata().is_ok()
    }

    pub(super) fn rename(handle: &Handle, name: &str, new: &str) -> io::Result<()> {
        fs::rename(handle.join(name), handle.join(new))
    }

    pub(super) fn link(handle: &Handle, name: &str, other: &Handle, new: &str) -> io::Result<()> {
        fs::hard_link(handle.join(name), other.join(new))
    }

    pub(super) fn symlink(_handle: &Handle, _target: &str, _name: &str) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn remove_file(handle: &Handle, name: &str) -> io::Result<()> {
        fs::remove_file(handle.join(name))
    }

    pub(super) fn set_time(_handle: &Handle, _time: SystemTime) {}
}
