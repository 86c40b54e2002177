//! The store of a service of its own: a catalog of entries, and blobs.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::{Stream, TryStreamExt};
use moka::sync::Cache;
use tokio::sync::Notify;
use tracing::{error, info, warn};

use crate::service::auth::UrlSigner;
use crate::service::blobs::{Blobs, Location, Parts};
use crate::service::catalog::{BegunPart, Catalog, Database, Totals};
use crate::service::parts::Part;
use crate::service::store::{Content, Entry, EntryName, Piece, Query, Store, StoreError};

/// How long a reservation holds without a byte being written to it. A client that was killed must
/// not block its key for good, as it does at GitHub.
const RESERVATION: Duration = Duration::from_secs(10 * 60);

/// How long a blob stays that no entry has any more: a client may be reading it.
const GARBAGE_STAYS: Duration = Duration::from_secs(5 * 60);

/// How often a writer says that it is still there.
const STILL_WRITING: Duration = Duration::from_secs(60);

/// How often the uses of entries are noted in the database. A service that is killed forgets those
/// of this time, which only matters to what is evicted first.
const TOUCH_EVERY: Duration = Duration::from_secs(30);

/// How many uses are noted at the latest.
const TOUCHED: usize = 10_000;

/// How much the lists of parts that are kept in memory may take, in bytes.
const PARTS_KEPT: u64 = 16 << 20;

/// What is evicted beyond what must be, so that each upload does not evict: a part in so many of
/// the limit.
const EVICT_AHEAD: u64 = 20;

/// How a store is set up.
#[derive(Clone, Debug)]
pub struct Storage {
    /// Where entries are listed.
    pub database: Database,
    /// Where their bytes are.
    pub blobs: Location,
    /// A file that is locked as long as the store is open, where no other process may use it.
    pub lock: Option<PathBuf>,
    /// What is kept.
    pub limits: Limits,
}

/// What a store keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest entry, in bytes.
    pub entry: u64,
    /// What all entries and uploads together may take, in bytes. Those that were used longest ago
    /// go first.
    pub total: Option<u64>,
    /// How long an entry is kept that nobody reads.
    pub unused: Option<Duration>,
}

impl Limits {
    /// Entries of up to `entry` bytes, however many and for ever.
    pub fn of_entries(entry: u64) -> Self {
        Self {
            entry,
            total: None,
            unused: None,
        }
    }
}

impl Storage {
    /// A store in `folder` alone, with SQLite.
    pub fn in_folder(folder: &Path, limits: Limits) -> Self {
        Self {
            database: Database::Sqlite(folder.join("catalog.sqlite")),
            blobs: Location::Folder(folder.join("blobs")),
            lock: Some(folder.join("lock")),
            limits,
        }
    }
}

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another service has it.
    #[error("{} is in use by another cache service", .0.display())]
    InUse(PathBuf),
    /// A file or folder cannot be read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
    /// The database cannot be used.
    #[error("the database cannot be used: {0}")]
    Catalog(#[from] sqlx::Error),
    /// What an earlier service left in it cannot be put in order.
    #[error("the database cannot be used: {}", .0.cause())]
    Unfinished(#[from] StoreError),
    /// What keeps the blobs cannot be used.
    #[error("the storage of blobs cannot be used: {0}")]
    Blobs(#[from] opendal::Error),
    /// The system has no random numbers.
    #[error("no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

/// The time in milliseconds since 1970, from a clock that tests can set.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The system's clock.
pub fn system_clock() -> Clock {
    Arc::new(|| {
        let time = SystemTime::now().duration_since(UNIX_EPOCH);
        time.map_or(0, |time| {
            u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
        })
    })
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A catalog and blobs. It can be cloned: all clones are the same store.
#[derive(Clone)]
pub struct EntryStore {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for EntryStore {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("EntryStore")
            .field("blobs", &self.inner.blobs)
            .finish_non_exhaustive()
    }
}

struct Inner {
    catalog: Catalog,
    blobs: Blobs,
    limits: Limits,
    clock: Clock,
    signing_key: [u8; 32],
    /// Entries do not change, so what was read of them stays true until they are gone.
    parts: Cache<u64, Arc<[Part]>>,
    /// When entries were used, as far as the database does not know.
    touched: Mutex<HashMap<u64, u64>>,
    /// What was received since the last sweep, in bytes.
    received: AtomicU64,
    /// Says that a sweep should not wait for its time.
    crowded: Notify,
    /// Held open, and let go of by [`EntryStore::close`].
    lock: Option<fs::File>,
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Entries that expired.
    pub expired: u64,
    /// Entries that were evicted.
    pub evicted: u64,
    /// Uploads that were abandoned.
    pub abandoned: u64,
    /// Blobs that were deleted.
    pub deleted: u64,
}

impl EntryStore {
    /// Opens the store that `storage` describes, which is made where it is missing.
    ///
    /// # Errors
    /// Where another service has it, or it cannot be read and written.
    pub async fn open(storage: &Storage, clock: Clock) -> Result<Self, OpenError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |error| OpenError::Io { path, error }
        };
        for folder in [storage.lock.as_deref(), database_file(&storage.database)]
            .into_iter()
            .flatten()
            .filter_map(Path::parent)
        {
            fs::create_dir_all(folder).map_err(at(folder))?;
        }
        let lock = match &storage.lock {
            None => None,
            Some(path) => {
                let lock = fs::File::create(path).map_err(at(path))?;
                match lock.try_lock() {
                    Ok(()) => Some(lock),
                    Err(fs::TryLockError::WouldBlock) => {
                        let folder = path.parent().unwrap_or(path);
                        return Err(OpenError::InUse(folder.to_owned()));
                    }
                    Err(fs::TryLockError::Error(error)) => return Err(at(path)(error)),
                }
            }
        };
        let catalog = Catalog::open(&storage.database).await?;
        let name = uuid::Uuid::new_v4().simple().to_string();
        let name = catalog.setting("store", &name).await?;
        let key = catalog
            .setting("signing-key", &UrlSigner::new_key()?)
            .await?;
        let signing_key = UrlSigner::parse_key(&key).ok_or_else(|| {
            sqlx::Error::Configuration("the signing key in the database cannot be read".into())
        })?;
        let blobs = Blobs::open(&storage.blobs, &name)?;
        blobs
            .check(&uuid::Uuid::new_v4().simple().to_string())
            .await?;
        if lock.is_some() {
            catalog.drop_unfinished(clock()).await?;
        }
        let inner = Inner {
            catalog,
            blobs,
            limits: storage.limits,
            clock,
            signing_key,
            parts: Cache::builder()
                .weigher(|_, parts: &Arc<[Part]>| {
                    u32::try_from(64 + 16 * parts.len()).unwrap_or(u32::MAX)
                })
                .max_capacity(PARTS_KEPT)
                .build(),
            touched: Mutex::default(),
            received: AtomicU64::new(0),
            crowded: Notify::new(),
            lock,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// A signer whose URLs are good at each service of this store, also after a restart.
    pub fn signer(&self) -> UrlSigner {
        UrlSigner::with_key(self.inner.signing_key)
    }

    /// What is there.
    ///
    /// # Errors
    /// The database's.
    pub async fn totals(&self) -> Result<Totals, sqlx::Error> {
        self.inner.catalog.totals().await
    }

    /// Sweeps for ever: at once, each `every`, and when much was received.
    pub async fn keep_swept(&self, every: Duration) {
        let mut touch = tokio::time::interval(TOUCH_EVERY);
        let mut sweep = tokio::time::interval(every);
        loop {
            tokio::select! {
                _ = touch.tick() => self.note_uses().await,
                _ = sweep.tick() => self.sweep_and_say().await,
                () = self.inner.crowded.notified() => self.sweep_and_say().await,
            }
        }
    }

    async fn sweep_and_say(&self) {
        match self.sweep().await {
            Ok(Sweep {
                expired: 0,
                evicted: 0,
                abandoned: 0,
                ..
            }) => {}
            Ok(Sweep {
                expired,
                evicted,
                abandoned,
                deleted,
            }) => info!(expired, evicted, abandoned, deleted, "swept"),
            Err(error) => error!(cause = error.cause(), "the sweep failed"),
        }
    }

    /// Takes away what is too much, too old or abandoned, and deletes blobs that nothing has.
    ///
    /// # Errors
    /// Those of the database and of the storage of blobs. What is left is left to the next sweep.
    pub async fn sweep(&self) -> Result<Sweep, StoreError> {
        let Inner {
            catalog,
            blobs,
            limits,
            clock,
            ..
        } = &*self.inner;
        self.inner.received.store(0, Ordering::Relaxed);
        // What was used a moment ago must not go first.
        self.note_uses().await;
        let now = clock();
        let before = |age: Duration| now.saturating_sub(milliseconds(age));
        let mut sweep = Sweep {
            abandoned: catalog.abandon(before(RESERVATION), now).await?,
            ..Sweep::default()
        };
        if let Some(age) = limits.unused {
            sweep.expired = catalog.expire(before(age), now).await?.count;
        }
        if let Some(limit) = limits.total {
            let Totals {
                bytes,
                upload_bytes,
                ..
            } = catalog.totals().await?;
            let too_much = (bytes + upload_bytes).saturating_sub(limit);
            if too_much > 0 {
                let ahead = limit / EVICT_AHEAD;
                sweep.evicted = catalog.evict(too_much + ahead, now).await?.count;
            }
        }
        loop {
            let garbage = catalog.garbage(before(GARBAGE_STAYS)).await?;
            if garbage.is_empty() {
                return Ok(sweep);
            }
            blobs.delete(garbage.iter().copied()).await?;
            catalog.deleted(&garbage).await?;
            sweep.deleted += garbage.len() as u64;
        }
    }

    /// Notes in the database when entries were used.
    async fn note_uses(&self) {
        let used: Vec<(u64, u64)> = lock(&self.inner.touched).drain().collect();
        if used.is_empty() {
            return;
        }
        if let Err(error) = self.inner.catalog.touch(&used).await {
            // They would be noted with the next use; no entry is lost for it.
            warn!(
                cause = error.cause(),
                "when entries were used could not be noted"
            );
        }
    }

    /// Notes what must not be forgotten, closes the database, and lets another have the folder.
    pub async fn close(&self) {
        self.note_uses().await;
        self.inner.catalog.close().await;
        // Where only its file were closed, a connection that is not quite gone would keep the lock, or
        // another program that is being started just now. A lock that cannot be let go of ends then.
        if let Some(lock) = &self.inner.lock {
            let _ = lock.unlock();
        }
    }

    fn used(&self, entry: u64) {
        let now = (self.inner.clock)();
        let mut touched = lock(&self.inner.touched);
        if touched.len() < TOUCHED || touched.contains_key(&entry) {
            touched.insert(entry, now);
        }
    }

    /// Receives a part, from the row that announces it to the row that has its size.
    async fn receive(
        &self,
        upload: u64,
        block: Option<&str>,
        (start, whole): (u64, bool),
        pieces: impl Stream<Item = Piece> + Send,
    ) -> Result<(), StoreError> {
        let inner = &*self.inner;
        let BegunPart { blob, is_first } = inner
            .catalog
            .begin_part(upload, block, start, (inner.clock)())
            .await?;
        let mut unfinished = Unfinished {
            store: self.clone(),
            blob: Some(blob),
        };
        let limit = inner.limits.entry;
        let (mut end, mut said) = (start, (inner.clock)());
        let pieces = pieces.and_then(|piece| {
            let length = piece.len() as u64;
            self.received(length);
            end = end.saturating_add(length);
            let fits = end <= limit;
            let now = (inner.clock)();
            let silent = now.saturating_sub(said) >= milliseconds(STILL_WRITING);
            if silent {
                said = now;
            }
            async move {
                if !fits {
                    return Err(StoreError::TooLarge { limit });
                }
                if silent {
                    inner.catalog.still_writing(blob, now).await?;
                }
                Ok(piece)
            }
        });
        let received = async {
            let size = inner.blobs.write(blob, pieces).await?;
            let now = (inner.clock)();
            // Where nothing came before, nothing has to make way, and that is most uploads.
            match whole && !is_first {
                true => inner.catalog.end_whole(upload, blob, size, now).await,
                false => inner.catalog.end_part(blob, size, now).await,
            }
        };
        let received = received.await;
        unfinished.blob = None;
        if received.is_err() {
            // Before the answer, so that the client's next try does not find it in its way.
            self.give_up(blob).await;
        }
        received
    }

    fn received(&self, bytes: u64) {
        let Some(limit) = self.inner.limits.total else {
            return;
        };
        let before = self.inner.received.fetch_add(bytes, Ordering::Relaxed);
        let enough = limit / EVICT_AHEAD;
        if before < enough && before + bytes >= enough {
            self.inner.crowded.notify_one();
        }
    }

    async fn give_up(&self, blob: u64) {
        let now = (self.inner.clock)();
        if let Err(error) = self.inner.catalog.drop_part(blob, now).await {
            // A sweep finds it when it is old.
            warn!(
                cause = error.cause(),
                "a part that broke off could not be given up"
            );
        }
    }
}

fn database_file(database: &Database) -> Option<&Path> {
    match database {
        Database::Sqlite(path) => Some(path),
        Database::Postgres(_) => None,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A part whose request may end at any await, when its client goes away.
struct Unfinished {
    store: EntryStore,
    blob: Option<u64>,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let (Some(blob), Ok(runtime)) = (self.blob, tokio::runtime::Handle::try_current()) {
            let store = self.store.clone();
            runtime.spawn(async move { store.give_up(blob).await });
        }
    }
}

impl Store for EntryStore {
    async fn reserve(&self, name: EntryName) -> Result<u64, StoreError> {
        let now = (self.inner.clock)();
        let abandoned = now.saturating_sub(milliseconds(RESERVATION));
        self.inner.catalog.reserve(&name, now, abandoned).await
    }

    fn check_size(&self, size: u64) -> Result<(), StoreError> {
        let limit = self.inner.limits.entry;
        if size > limit {
            return Err(StoreError::TooLarge { limit });
        }
        Ok(())
    }

    async fn upload_of(&self, name: &EntryName) -> Result<u64, StoreError> {
        self.inner.catalog.upload_of(name).await
    }

    async fn name_of(&self, upload: u64) -> Result<EntryName, StoreError> {
        self.inner.catalog.name_of(upload).await
    }

    async fn write(
        &self,
        upload: u64,
        offset: u64,
        whole: bool,
        pieces: impl Stream<Item = Piece> + Send,
    ) -> Result<(), StoreError> {
        self.receive(upload, None, (offset, whole), pieces).await
    }

    async fn write_block(
        &self,
        upload: u64,
        block: &str,
        pieces: impl Stream<Item = Piece> + Send,
    ) -> Result<(), StoreError> {
        self.receive(upload, Some(block), (0, false), pieces).await
    }

    async fn join_blocks(&self, upload: u64, blocks: Vec<String>) -> Result<(), StoreError> {
        let Inner {
            catalog,
            limits,
            clock,
            ..
        } = &*self.inner;
        catalog
            .join_blocks(upload, &blocks, limits.entry, clock())
            .await
    }

    async fn commit(&self, upload: u64, size: u64) -> Result<Entry, StoreError> {
        let now = (self.inner.clock)();
        let abandoned = now.saturating_sub(milliseconds(RESERVATION));
        self.check_size(size)?;
        let (entry, parts) = self
            .inner
            .catalog
            .commit(upload, size, now, abandoned)
            .await?;
        // A job that saves an entry is followed by those that read it.
        self.inner.parts.insert(entry.id, parts.into());
        Ok(entry)
    }

    async fn find(&self, query: &Query<'_>) -> Option<Entry> {
        match self.inner.catalog.find(query).await {
            Ok(found) => {
                // Whoever asks is about to read it, and need not: GitHub counts it as a use too.
                found.inspect(|entry| self.used(entry.id))
            }
            Err(error) => {
                error!(cause = %error, "a look-up failed and was answered as a miss");
                None
            }
        }
    }

    async fn open(&self, entry: u64) -> Option<Content> {
        let parts = match self.inner.parts.get(&entry) {
            Some(parts) => parts,
            None => match self.inner.catalog.parts_of(entry).await {
                Ok(parts) => {
                    let parts: Arc<[Part]> = parts?.into();
                    self.inner.parts.insert(entry, parts.clone());
                    parts
                }
                Err(error) => {
                    error!(cause = %error, "an entry could not be looked up");
                    return None;
                }
            },
        };
        self.used(entry);
        let content = Parts::new(self.inner.blobs.clone(), parts);
        Some(Content::Elsewhere(Box::new(content)))
    }

    async fn lost(&self, entry: u64) {
        self.inner.parts.invalidate(&entry);
        warn!(
            entry,
            "the content of an entry is gone; the entry is dropped"
        );
        if let Err(error) = self.inner.catalog.forget(entry, (self.inner.clock)()).await {
            error!(cause = error.cause(), "an entry could not be dropped");
        }
    }
}
