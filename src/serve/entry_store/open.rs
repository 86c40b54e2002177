//! Opens a store, and cleans up after a service that was killed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use moka::sync::Cache;
use tokio::sync::Notify;
use tracing::warn;

use crate::cache_protocol::auth::UrlSigner;
use crate::cache_protocol::parts::Part;
use crate::cache_protocol::store::StoreError;
use crate::clock::Timestamp;
use crate::serve::blob_store::{BlobStore, Location};
use crate::serve::catalog::Catalog;
use crate::serve::entry_store::config::{StorageConfig, database_file, private_folders};
use crate::serve::entry_store::exclusive::ExclusiveState;
use crate::serve::entry_store::store_time::{Clock, StoreTime};
use crate::serve::entry_store::{EntryStore, StoreInner};
use crate::serve::private_files;
use crate::serve::reserved_space;
use crate::serve::small_contents::SmallContents;

/// How much the lists of parts that are kept in memory may take, in bytes.
const PARTS_CACHE_SIZE: u64 = 16 << 20;

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another service has it.
    #[error("{} is in use by another cache service", .0.display())]
    InUse(PathBuf),
    /// A file or folder cannot be read or written.
    #[error("cannot use {}: {error}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
    /// The database cannot be used.
    #[error("cannot use the database: {0}")]
    Catalog(#[from] sqlx::Error),
    /// The leftovers of an earlier service in it cannot be cleaned up.
    #[error("cannot use the database: {}", .0.cause())]
    Unfinished(#[from] StoreError),
    /// The storage of blobs cannot be used.
    #[error("cannot use the storage of blobs: {0}")]
    BlobStore(#[from] opendal::Error),
    /// The system has no random numbers.
    #[error("cannot read random numbers from the system: {0}")]
    Random(#[from] getrandom::Error),
}

impl EntryStore {
    /// Opens the store that `storage` describes. It creates the store if it is missing.
    ///
    /// # Errors
    /// [`OpenError::InUse`] if another service uses it; other errors if its files, its database or
    /// its storage of blobs cannot be used.
    pub async fn open(storage: &StorageConfig, clock: Clock) -> Result<Self, OpenError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |error| OpenError::Io { path, error }
        };
        let database = database_file(&storage.database);
        for folder in private_folders(storage) {
            if !private_files::folder(folder).map_err(at(folder))? {
                warn!(
                    folder = %folder.display(),
                    "another user owns this folder, so its content is not private"
                );
            }
        }
        let lock = match &storage.lock {
            None => None,
            Some(path) => Some(lock_file(path)?),
        };
        let mut was_open = false;
        if let Some(path) = database {
            was_open = private_files::file(path).map_err(at(path))?;
            // A service that was killed leaves them, and SQLite takes them as they are.
            for path in ["-wal", "-shm"].map(|end| with_suffix(path, end)) {
                if path.exists() {
                    private_files::file(&path).map_err(at(&path))?;
                }
            }
        }
        let (catalog, was_full) = open_catalog(storage).await?;
        for folder in private_folders(storage) {
            private_files::keep_name(folder).map_err(at(folder))?;
        }
        let name = uuid::Uuid::new_v4().simple().to_string();
        let name = catalog.setting("store", &name).await?;
        if was_open {
            warn!("other users could read the database: signed URLs get a new key");
            catalog.drop_setting("signing-key").await?;
        }
        let signing_key = signing_key(&catalog).await?;
        let blobs = BlobStore::open(&storage.blobs, &name)?;
        if lock.is_some() {
            warn_of_other_stores(&storage.blobs, &name);
        }
        let time = catalog.time(Timestamp::now()).await?;
        let is_alone = lock.is_some() && database.is_some();
        let inner = StoreInner {
            exclusive: is_alone.then(|| ExclusiveState::of(&catalog)),
            inside: SmallContents::of(catalog.clone()),
            catalog,
            blobs,
            limits: storage.limits,
            time: StoreTime::new(clock, time),
            signing_key,
            parts: Cache::builder()
                .weigher(|_, parts: &Arc<[Part]>| {
                    let digests: usize = parts.iter().map(|part| part.digests.size()).sum();
                    u32::try_from(64 + 48 * parts.len() + digests).unwrap_or(u32::MAX)
                })
                .max_capacity(PARTS_CACHE_SIZE)
                .build(),
            recent_uses: Mutex::default(),
            received: AtomicU64::new(0),
            sweep_now: Notify::new(),
            finished: AtomicU64::new(0),
            arriving: AtomicU64::new(0),
            reserve: storage.reserve.clone(),
            made_room: tokio::sync::Mutex::new(None),
            lock,
        };
        let store = Self {
            inner: Arc::new(inner),
        };
        store.recover(was_full).await?;
        Ok(store)
    }

    /// Checks the storage, and removes the unfinished parts of an earlier service that was killed.
    /// A full disk is no reason not to start: only a service that runs makes room. It `was_full` if the
    /// database could not be opened without the reserve's room.
    async fn recover(&self, was_full: bool) -> Result<(), OpenError> {
        let StoreInner { catalog, blobs, .. } = &*self.inner;
        let name = uuid::Uuid::new_v4().simple().to_string();
        let mut full = match blobs.check(&name).await {
            Err(error) if reserved_space::is_full(&error) => true,
            checked => {
                checked?;
                was_full
            }
        };
        if self.inner.lock.is_some() {
            match catalog.drop_unfinished().await {
                Err(error) if reserved_space::is_full(&error) => full = true,
                dropped => {
                    dropped?;
                }
            }
        }
        if full {
            warn!("the disk is full");
            self.make_room(Instant::now()).await;
        } else {
            self.keep_reserve();
        }
        Ok(())
    }
}

/// Opens the database, with the reserve's room if the disk is full: in that case with `true`.
async fn open_catalog(storage: &StorageConfig) -> Result<(Catalog, bool), sqlx::Error> {
    match (Catalog::open(&storage.database).await, &storage.reserve) {
        (Err(error), Some(reserve)) if reserved_space::is_full(&error) => {
            reserved_space::give_up(reserve);
            Ok((Catalog::open(&storage.database).await?, true))
        }
        (opened, _) => Ok((opened?, false)),
    }
}

/// The key of signed URLs, which all services of this database share.
async fn signing_key(catalog: &Catalog) -> Result<[u8; 32], OpenError> {
    let key = catalog
        .setting("signing-key", &UrlSigner::new_key()?)
        .await?;
    let unreadable =
        || sqlx::Error::Configuration("cannot read the signing key in the database".into());
    Ok(UrlSigner::parse_key(&key).ok_or_else(unreadable)?)
}

/// Warns of the folders of stores whose database is gone. No limit counts their files, and no
/// service finds them.
fn warn_of_other_stores(blobs: &Location, own: &str) {
    let Location::Folder(folder) = blobs else {
        return;
    };
    // A folder that cannot be read is reported when it is used.
    let stores = fs::read_dir(folder).into_iter().flatten().flatten();
    for store in stores.filter(|store| store.file_name() != own) {
        warn!(
            folder = %store.path().display(),
            "this folder belongs to no store in this database: delete it if no other database \
             uses it"
        );
    }
}

/// The path of the file whose name has `end` appended.
fn with_suffix(path: &Path, end: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(end);
    path.into()
}

/// The file at `path`, locked.
fn lock_file(path: &Path) -> Result<fs::File, OpenError> {
    let at = |error| OpenError::Io {
        path: path.to_owned(),
        error,
    };
    private_files::file(path).map_err(at)?;
    let lock = fs::File::create(path).map_err(at)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => {
            let folder = path.parent().unwrap_or(path);
            Err(OpenError::InUse(folder.to_owned()))
        }
        Err(fs::TryLockError::Error(error)) => Err(at(error)),
    }
}
