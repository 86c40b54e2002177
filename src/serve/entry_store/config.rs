//! How a store is set up: where it is, and its limits.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::serve::blob_store::Location;
use crate::serve::catalog::Database;

/// How a store is set up.
#[derive(Clone, Debug)]
pub struct StorageConfig {
    /// The database of entries.
    pub database: Database,
    /// The storage of their bytes.
    pub blobs: Location,
    /// A file that is locked as long as the store is open, if no other process may use the store.
    pub lock: Option<PathBuf>,
    /// A file that reserves room for the database on its disk, if the disk is this machine's.
    pub reserve: Option<PathBuf>,
    /// The limits.
    pub limits: StoreLimits,
}

/// The limits of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreLimits {
    /// The largest entry, in bytes.
    pub entry: u64,
    /// The limit of all entries together, in bytes. The least recently used entries of the largest
    /// repository go first. Uncommitted uploads may take the same amount again.
    pub total: Option<u64>,
    /// The limit of the entries of one repository, in bytes.
    pub repository: Option<u64>,
    /// How long an entry is kept that no job reads.
    pub unused: Option<Duration>,
}

impl StoreLimits {
    /// Entries of up to `entry` bytes, without other limits.
    pub fn of_entries(entry: u64) -> Self {
        Self {
            entry,
            total: None,
            repository: None,
            unused: None,
        }
    }
}

impl StorageConfig {
    /// A store in `folder` alone, with SQLite.
    pub fn in_folder(folder: &Path, limits: StoreLimits) -> Self {
        Self {
            database: Database::Sqlite(folder.join("catalog.sqlite")),
            blobs: Location::Folder(folder.join("blobs")),
            lock: Some(folder.join("lock")),
            reserve: Some(folder.join("reserve")),
            limits,
        }
    }
}

pub(super) fn database_file(database: &Database) -> Option<&Path> {
    match database {
        Database::Sqlite(path) => Some(path),
        Database::Postgres(_) => None,
    }
}

/// The folders that only this user may read.
pub(super) fn private_folders(storage: &StorageConfig) -> impl Iterator<Item = &Path> {
    let blobs = match &storage.blobs {
        Location::Folder(folder) => Some(folder.as_path()),
        Location::Bucket(_) => None,
    };
    let files = [storage.lock.as_deref(), database_file(&storage.database)];
    let folders = files.into_iter().flatten().filter_map(Path::parent);
    // A path of one name has an empty one before it.
    let folders = folders.filter(|folder| !folder.as_os_str().is_empty());
    folders.chain(blobs)
}
