//! The store of the standalone service: a catalog of entries, and blobs.
//!
//! In a store that no other service uses, an upload begins in memory (`held`), and a small one ends
//! there too: the database only gets its commit, together with others at that moment.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, Stream, StreamExt, TryStreamExt, stream};
use moka::sync::Cache;
use tokio::sync::Notify;
use tracing::{error, info, warn};

use crate::cache_protocol::auth::UrlSigner;
use crate::cache_protocol::azure_blob::is_missing;
use crate::cache_protocol::parts::Part;
use crate::cache_protocol::store::{
    Bytestream, Chunk, Content, Entry, EntryName, Query, RangeRead, Scope, Store, StoreError,
};
use crate::serve::batch::Batcher;
use crate::serve::blob_store::{
    BlobStore, Gathered, Location, StoredContent, WrittenBlob, digests_of_all, gather,
};
use crate::serve::catalog::{
    BegunPart, Catalog, Commit, CommitSource, CommittedUpload, Database, FinishedPart, Moments,
    NameStatus, Replaces, SmallPart, Totals,
};
use crate::serve::private_files;
use crate::serve::reserved_space::{self, RESERVE};
use crate::serve::shared_fetch;
use crate::serve::small_contents::{SMALL, SmallContents};
use crate::serve::uploads_in_memory::{HeldUploads, HeldWrite, UploadLocation};

/// How long a reservation holds without a byte being written to it. A client that was killed must
/// not block its key for ever, as it does at GitHub.
const RESERVATION: Duration = Duration::from_secs(10 * 60);

/// How long a blob stays that no entry has any more: a client may be reading it.
const GARBAGE_STAYS: Duration = Duration::from_secs(5 * 60);

/// How often a writer says that it is still there.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(60);

/// How often the uses of entries are recorded in the database. A service that is killed loses those
/// of this time, which only affects the order of eviction.
const RECORD_USES_EVERY: Duration = Duration::from_secs(30);

/// How many uses wait in memory at most.
const MAX_RECENT_USES: usize = 10_000;

/// How many uses are recorded in one transaction.
const USES_PER_TRANSACTION: usize = 250;

/// How much the lists of parts that are kept in memory may take, in bytes.
const PARTS_CACHE_SIZE: u64 = 16 << 20;

/// How much the entries that were looked up last may take in memory, in bytes.
const LOOKUP_CACHE_SIZE: u64 = 32 << 20;

/// How long an upload may be in memory only. A process that is killed loses those of this time:
/// their clients get the error that there is no such upload.
const MEMORY_ONLY: Duration = Duration::from_secs(1);

/// The bytes of all arriving content beyond which only a quarter of the usual size is gathered in
/// memory.
const GATHER_BUDGET: u64 = 64 << 20;

/// The size of SQLite's log, in bytes, at which it is written back into the database.
const CHECKPOINT_SIZE: u64 = 8 << 20;

/// How many commits may share a transaction.
const COMMITS_PER_TRANSACTION: usize = 128;

/// How many names are looked for at once.
const NAMES_PER_QUERY: usize = 32;

/// How many numbers of uploads and of blobs are taken from the database at once.
const NUMBERS_PER_CLAIM: u64 = 1 << 20;

/// An eviction removes this fraction of the limit in addition (1/20), so that not each upload
/// evicts.
const EVICT_AHEAD: u64 = 20;

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

/// A clock in milliseconds that never goes back. Tests have their own clock.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The system's clock that no setting of the time changes.
pub fn system_clock() -> Clock {
    let begun = Instant::now();
    Arc::new(move || milliseconds(begun.elapsed()))
}

/// The milliseconds since 1970.
fn since_1970() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    time.map_or(0, milliseconds)
}

/// The time of a store: its time when it was opened, and the time that has passed since.
struct StoreTime {
    clock: Clock,
    opened: u64,
    begun: AtomicU64,
}

impl StoreTime {
    fn new(clock: Clock, begun: u64) -> Self {
        Self {
            opened: clock(),
            begun: begun.into(),
            clock,
        }
    }

    fn now(&self) -> u64 {
        let passed = (self.clock)().saturating_sub(self.opened);
        self.begun.load(Ordering::Relaxed).saturating_add(passed)
    }

    /// Advances this clock to at least `time`, the time of another service.
    fn catch_up(&self, time: u64) {
        let backend = time.saturating_sub(self.now());
        self.begun.fetch_add(backend, Ordering::Relaxed);
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A catalog and blobs. Clones share the store.
#[derive(Clone)]
pub struct EntryStore {
    inner: Arc<StoreInner>,
}

impl std::fmt::Debug for EntryStore {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("EntryStore")
            .field("blobs", &self.inner.blobs)
            .finish_non_exhaustive()
    }
}

struct StoreInner {
    catalog: Catalog,
    blobs: BlobStore,
    inside: SmallContents,
    /// The state of a store that no other service uses.
    exclusive: Option<ExclusiveState>,
    limits: StoreLimits,
    time: StoreTime,
    signing_key: [u8; 32],
    /// Entries do not change, so cached parts stay valid until their entry is removed.
    parts: Cache<u64, Arc<[Part]>>,
    /// When entries were used, as far as the database does not know.
    recent_uses: Mutex<HashMap<u64, u64>>,
    /// The bytes received since the last sweep.
    received: AtomicU64,
    /// Says that a sweep should not wait for its time.
    sweep_now: Notify,
    /// The bytes received for uncommitted uploads: finished parts, as far as this service knows
    /// since the last sweep, and arriving ones.
    finished: AtomicU64,
    arriving: AtomicU64,
    reserve: Option<PathBuf>,
    /// Held while room is made; when that was done last.
    made_room: tokio::sync::Mutex<Option<Instant>>,
    /// Locked until [`EntryStore::close`].
    lock: Option<fs::File>,
}

/// The state of a store that no other service uses: it holds in memory uploads that the database
/// does not have.
struct ExclusiveState {
    held: HeldUploads,
    /// Held while uploads are persisted.
    leaving: tokio::sync::Mutex<()>,
    numbers: NumberPool,
    names: Batcher<EntryName, Result<NameStatus, Arc<sqlx::Error>>>,
    commits: Batcher<(Option<u64>, Commit), Result<CommittedUpload, StoreError>>,
    found: LookupCache,
}

impl ExclusiveState {
    fn of(catalog: &Catalog) -> Self {
        let held = HeldUploads::default();
        let names = {
            let catalog = catalog.clone();
            move |names: Vec<EntryName>| {
                let catalog = catalog.clone();
                async move {
                    match catalog.name_statuses(&names).await {
                        Ok(taken) => taken.into_iter().map(Ok).collect(),
                        Err(error) => repeated(&Arc::new(error), names.len(), Err),
                    }
                }
            }
        };
        let commits = {
            let (catalog, held) = (catalog.clone(), held.clone());
            let log = WalTracker::default();
            move |asked: Vec<(Option<u64>, Commit)>| {
                let (catalog, held, log) = (catalog.clone(), held.clone(), log.clone());
                let (ours, commits): (Vec<_>, Vec<_>) = asked.into_iter().unzip();
                async move {
                    let mut done = match catalog.commit(&commits).await {
                        Ok(done) => done,
                        Err(error) => {
                            let backend = |error| Err(StoreError::Backend(Box::new(error)));
                            repeated(&Arc::new(error), commits.len(), backend)
                        }
                    };
                    // Here, since the request may be gone by now.
                    for (own, done) in ours.iter().zip(&mut done) {
                        let Some(own) = own else { continue };
                        let upload_bytes = held.end_commit(*own, done.is_ok());
                        if let Ok(committed) = done {
                            committed.upload_bytes = upload_bytes;
                            log.grew(upload_bytes, &catalog);
                        }
                    }
                    done
                }
            }
        };
        Self {
            held,
            leaving: tokio::sync::Mutex::default(),
            numbers: NumberPool::default(),
            names: Batcher::new(NAMES_PER_QUERY, 1, names),
            commits: Batcher::new(COMMITS_PER_TRANSACTION, 1, commits),
            found: LookupCache::default(),
        }
    }
}

/// How much is in SQLite's log that is not in the database.
#[derive(Clone, Default)]
struct WalTracker {
    bytes: Arc<AtomicU64>,
    emptying: Arc<AtomicBool>,
}

impl WalTracker {
    /// Counts growth of the log. If that is enough, a task writes it back into the database, while
    /// commits continue.
    fn grew(&self, bytes: u64, catalog: &Catalog) {
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes < CHECKPOINT_SIZE || self.emptying.swap(true, Ordering::Relaxed) {
            return;
        }
        self.bytes.store(0, Ordering::Relaxed);
        let (catalog, emptying) = (catalog.clone(), self.emptying.clone());
        tokio::spawn(async move {
            // If this fails, a commit writes it back.
            if let Err(error) = catalog.checkpoint().await {
                warn!(%error, "cannot write the database's log back into it");
            }
            emptying.store(false, Ordering::Relaxed);
        });
    }
}

/// The same error for each request of a group.
fn repeated<T>(
    error: &Arc<sqlx::Error>,
    count: usize,
    each: impl Fn(Arc<sqlx::Error>) -> T,
) -> Vec<T> {
    (0..count).map(|_| each(error.clone())).collect()
}

/// The error after the answering task has ended.
fn closed() -> StoreError {
    StoreError::Io(io::Error::other("the store is closed"))
}

/// Numbers of uploads and of blobs that the database assigns to no other service.
#[derive(Default)]
struct NumberPool {
    left: Mutex<NumberRanges>,
    taking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct NumberRanges {
    uploads: Range<u64>,
    blobs: Range<u64>,
}

impl NumberPool {
    async fn take(
        &self,
        catalog: &Catalog,
        kind: impl Fn(&mut NumberRanges) -> &mut Range<u64>,
    ) -> Result<u64, StoreError> {
        loop {
            if let Some(number) = kind(&mut lock(&self.left)).next() {
                return Ok(number);
            }
            let _taking = self.taking.lock().await;
            if kind(&mut lock(&self.left)).is_empty() {
                let (uploads, blobs) = catalog.take_numbers(NUMBERS_PER_CLAIM).await?;
                *lock(&self.left) = NumberRanges {
                    uploads: uploads..uploads + NUMBERS_PER_CLAIM,
                    blobs: blobs..blobs + NUMBERS_PER_CLAIM,
                };
            }
        }
    }
}

/// Caches entries that were found by their exact key, in the first scope of the look-up: such a
/// look-up finds the same entry again, until an entry is removed.
struct LookupCache {
    entries: Cache<String, (u64, Entry)>,
    /// How often entries went.
    age: AtomicU64,
}

impl Default for LookupCache {
    fn default() -> Self {
        Self {
            entries: Cache::builder()
                .weigher(|key: &String, _: &(u64, Entry)| {
                    u32::try_from(256 + 2 * key.len()).unwrap_or(u32::MAX)
                })
                .max_capacity(LOOKUP_CACHE_SIZE)
                .build(),
            age: AtomicU64::new(0),
        }
    }
}

impl LookupCache {
    fn key(scope: &Scope, version: &str, key: &str) -> String {
        // None of the three contains a NUL.
        [&scope.0, "\0", version, "\0", key].concat()
    }

    fn age(&self) -> u64 {
        self.age.load(Ordering::Acquire)
    }

    fn get(&self, query: &Query<'_>) -> Option<Entry> {
        let (scope, key) = (query.scopes.first()?, query.keys.first()?);
        let (age, entry) = self.entries.get(&Self::key(scope, query.version, key))?;
        (age == self.age()).then_some(entry)
    }

    /// Caches an entry that existed at that `age`.
    fn keep(&self, entry: &Entry, age: u64) {
        let EntryName {
            scope,
            version,
            key,
        } = &entry.name;
        let key = Self::key(scope, version, key);
        self.entries.insert(key, (age, entry.clone()));
    }

    /// Some entries are gone.
    fn forget(&self) {
        self.age.fetch_add(1, Ordering::AcqRel);
    }
}

/// The result of a sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
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
        let catalog = match Catalog::open(&storage.database).await {
            Err(error) if reserved_space::is_full(&error) && storage.reserve.is_some() => {
                storage
                    .reserve
                    .iter()
                    .for_each(|path| reserved_space::give_up(path));
                Catalog::open(&storage.database).await?
            }
            opened => opened?,
        };
        for folder in private_folders(storage) {
            private_files::keep_name(folder).map_err(at(folder))?;
        }
        let name = uuid::Uuid::new_v4().simple().to_string();
        let name = catalog.setting("store", &name).await?;
        if was_open {
            warn!("other users could read the database: signed URLs get a new key");
            catalog.drop_setting("signing-key").await?;
        }
        let key = catalog
            .setting("signing-key", &UrlSigner::new_key()?)
            .await?;
        let signing_key = UrlSigner::parse_key(&key).ok_or_else(|| {
            sqlx::Error::Configuration("cannot read the signing key in the database".into())
        })?;
        let blobs = BlobStore::open(&storage.blobs, &name)?;
        if lock.is_some() {
            warn_of_other_stores(&storage.blobs, &name);
        }
        let time = catalog.time(since_1970()).await?;
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
        store.recover().await?;
        Ok(store)
    }

    /// Checks the storage, and removes the unfinished parts of an earlier service that was killed.
    /// A full disk is no reason not to start: only a service that runs makes room.
    async fn recover(&self) -> Result<(), OpenError> {
        let StoreInner { catalog, blobs, .. } = &*self.inner;
        let name = uuid::Uuid::new_v4().simple().to_string();
        let mut full = match blobs.check(&name).await {
            Err(error) if reserved_space::is_full(&error) => true,
            checked => {
                checked?;
                false
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

    fn keep_reserve(&self) {
        let Some(path) = &self.inner.reserve else {
            return;
        };
        if let Err(error) = reserved_space::keep(path) {
            warn!(%error, "the disk has no room for the reserve");
        }
    }

    /// Makes room on a disk that was full at `when`, unless another task has since: it deletes
    /// garbage at once, then some entries.
    async fn make_room(&self, when: Instant) {
        let mut made = self.inner.made_room.lock().await;
        if made.is_some_and(|made| made > when) {
            return;
        }
        self.inner
            .reserve
            .iter()
            .for_each(|path| reserved_space::give_up(path));
        match self.sweep_with(Urgency::Full).await {
            Ok(SweepReport {
                evicted, deleted, ..
            }) => warn!(
                evicted,
                deleted,
                "the disk was full; the service deleted entries to make \
                                           room"
            ),
            Err(error) => error!(
                cause = error.cause(),
                "the disk is full, and the service cannot make room"
            ),
        }
        self.keep_reserve();
        *made = Some(Instant::now());
    }

    /// Makes room if `error` says that the disk is full. `true` means that the operation may be
    /// retried.
    async fn made_room_for(&self, error: Option<&StoreError>) -> bool {
        let when = Instant::now();
        match error {
            Some(error) if reserved_space::is_full(error) => {
                self.make_room(when).await;
                true
            }
            _ => false,
        }
    }

    /// The time by the store's clock, and the time since which unused uploads count as abandoned.
    fn moments(&self) -> Moments {
        let now = self.inner.time.now();
        Moments {
            now,
            abandoned: now.saturating_sub(milliseconds(RESERVATION)),
        }
    }

    /// A signer whose URLs are valid at each service of this store, even after a restart.
    pub fn signer(&self) -> UrlSigner {
        UrlSigner::with_key(self.inner.signing_key)
    }

    /// The totals of the store.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn totals(&self) -> Result<Totals, sqlx::Error> {
        let mut totals = self.inner.catalog.totals().await?;
        if let Some(exclusive) = &self.inner.exclusive {
            let (uploads, bytes) = exclusive.held.totals();
            totals.uploads += uploads;
            totals.upload_bytes += bytes;
        }
        Ok(totals)
    }

    /// Persists uploads that were last used at `until` or before, or the one in `only`.
    async fn persist(&self, until: u64, only: Option<u64>) -> Result<(), StoreError> {
        if self.inner.exclusive.is_none() {
            return Ok(());
        }
        let store = self.clone();
        // Its request may be cancelled, and must not leave them half way.
        let written = tokio::spawn(async move {
            let StoreInner {
                catalog, exclusive, ..
            } = &*store.inner;
            let Some(exclusive) = exclusive else {
                return Ok(());
            };
            let _leaving = exclusive.leaving.lock().await;
            let leaving = exclusive.held.begin_move(until, only);
            if leaving.is_empty() {
                return Ok(());
            }
            let written = catalog.persist(&leaving).await;
            exclusive.held.end_move(&leaving, written.is_ok());
            written
        });
        written.await.map_err(io::Error::other)?
    }

    /// Persists one upload that a request needs in the database, and makes room for it if the
    /// disk is full.
    async fn persist_one(&self, upload: u64) -> Result<(), StoreError> {
        let written = self.persist(0, Some(upload)).await;
        if self.made_room_for(written.as_ref().err()).await {
            self.persist(0, Some(upload)).await
        } else {
            written
        }
    }

    /// Persists uploads that have been in memory for a while.
    async fn persist_old(&self) {
        let until = self
            .inner
            .time
            .now()
            .saturating_sub(milliseconds(MEMORY_ONLY));
        if let Err(error) = self.persist(until, None).await {
            warn!(
                cause = error.cause(),
                "cannot save uploads; they are only in memory"
            );
        }
    }

    /// Sweeps for ever: at once, each `every`, and when much was received; and persists uploads
    /// that stay in memory.
    pub async fn run_sweeps(&self, every: Duration) {
        // Two tasks, since a sweep may take long.
        tokio::join!(self.sweep_periodically(every), self.persist_periodically());
    }

    async fn sweep_periodically(&self, every: Duration) {
        let mut touch = tokio::time::interval(RECORD_USES_EVERY);
        let mut sweep = tokio::time::interval(every);
        loop {
            tokio::select! {
                _ = touch.tick() => self.record_uses().await,
                _ = sweep.tick() => self.sweep_and_log().await,
                () = self.inner.sweep_now.notified() => self.sweep_and_log().await,
            }
        }
    }

    async fn persist_periodically(&self) {
        let mut tick = tokio::time::interval(MEMORY_ONLY);
        loop {
            tick.tick().await;
            self.persist_old().await;
        }
    }

    async fn sweep_and_log(&self) {
        match self.sweep().await {
            Ok(SweepReport {
                expired: 0,
                evicted: 0,
                abandoned: 0,
                ..
            }) => {}
            Ok(SweepReport {
                expired,
                evicted,
                abandoned,
                deleted,
            }) => info!(expired, evicted, abandoned, deleted, "swept"),
            Err(error) if reserved_space::is_full(&error) => self.make_room(Instant::now()).await,
            Err(error) => error!(cause = error.cause(), "the sweep failed"),
        }
    }

    /// Removes entries that exceed a limit or are too old, and abandoned uploads, and deletes
    /// unused blobs.
    ///
    /// # Errors
    /// Errors of the database and of the storage of blobs. The next sweep does the rest.
    pub async fn sweep(&self) -> Result<SweepReport, StoreError> {
        self.sweep_with(Urgency::Usual).await
    }

    async fn sweep_with(&self, urgency: Urgency) -> Result<SweepReport, StoreError> {
        let StoreInner {
            catalog, limits, ..
        } = &*self.inner;
        let mut sweep = SweepReport::default();
        if urgency == Urgency::Full {
            // This comes before any write, since there may be no room for one.
            sweep.deleted = self.delete_garbage(u64::MAX).await?;
        }
        self.inner.received.store(0, Ordering::Relaxed);
        // Recently used entries must not go first.
        self.record_uses().await;
        let Moments { now, abandoned } = self.moments();
        match self.persist(now, None).await {
            // They stay in memory.
            Err(error) if urgency == Urgency::Full && reserved_space::is_full(&error) => {}
            written => written?,
        }
        sweep.abandoned = catalog.abandon(abandoned, now).await?;
        if let Some(age) = limits.unused {
            let before = now.saturating_sub(milliseconds(age));
            let expired = catalog.expire(before, now).await;
            self.invalidate_lookups();
            sweep.expired = expired?.count;
        }
        let ended = self.totals().await?.upload_bytes;
        self.inner.finished.store(ended, Ordering::Relaxed);
        let evicted = self.evict(urgency, now).await;
        self.invalidate_lookups();
        sweep.evicted = evicted?;
        let until = match urgency {
            Urgency::Usual => now.saturating_sub(milliseconds(GARBAGE_STAYS)),
            Urgency::Full => u64::MAX,
        };
        sweep.deleted += self.delete_garbage(until).await?;
        if urgency == Urgency::Full {
            catalog.give_back().await?;
        }
        Ok(sweep)
    }

    /// Some entries may be gone.
    fn invalidate_lookups(&self) {
        if let Some(exclusive) = &self.inner.exclusive {
            exclusive.found.forget();
        }
    }

    /// Evicts entries until each repository, and all of them together, are within their limits.
    async fn evict(&self, urgency: Urgency, now: u64) -> Result<u64, StoreError> {
        let StoreInner {
            catalog, limits, ..
        } = &*self.inner;
        let mut sizes = catalog.repositories().await?;
        let mut evicted = 0;
        if let Some(limit) = limits.repository {
            for (repository, size) in &mut sizes {
                let too_much = size.saturating_sub(limit);
                if too_much > 0 {
                    let bytes = too_much + limit / EVICT_AHEAD;
                    let swept = catalog.evict(repository, bytes, now).await?;
                    evicted += swept.count;
                    *size = size.saturating_sub(swept.bytes);
                }
            }
        }
        let all = sizes
            .iter()
            .fold(0u64, |all, (_, size)| all.saturating_add(*size));
        let mut too_much = match limits.total {
            Some(limit) if all > limit => all - limit + limit / EVICT_AHEAD,
            _ => 0,
        };
        if urgency == Urgency::Full {
            too_much = too_much.max(all / EVICT_AHEAD).max(4 * RESERVE);
        }
        if too_much == 0 {
            return Ok(evicted);
        }
        for (repository, bytes) in shared_fetch::to_evict(&sizes, too_much) {
            evicted += catalog.evict(&repository, bytes, now).await?.count;
        }
        Ok(evicted)
    }

    /// Deletes blobs that are garbage since `until` or before.
    async fn delete_garbage(&self, until: u64) -> Result<u64, StoreError> {
        let StoreInner { catalog, blobs, .. } = &*self.inner;
        let mut deleted = 0;
        loop {
            let garbage = catalog.garbage(until).await?;
            if garbage.is_empty() {
                return Ok(deleted);
            }
            blobs.delete(garbage.iter().copied()).await?;
            catalog.forget_garbage(&garbage).await?;
            deleted += garbage.len() as u64;
        }
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// The database's error if it does not.
    pub async fn ping(&self) -> Result<(), sqlx::Error> {
        self.inner.catalog.ping().await
    }

    /// Records the uses of entries and the time in the database.
    async fn record_uses(&self) {
        match self.inner.catalog.record_time(self.inner.time.now()).await {
            Ok(time) => self.inner.time.catch_up(time),
            Err(error) => warn!(cause = error.cause(), "cannot record the time"),
        }
        let used: Vec<(u64, u64)> = lock(&self.inner.recent_uses).drain().collect();
        if used.is_empty() {
            return;
        }
        // Some at a time, since commits wait for it.
        for used in used.chunks(USES_PER_TRANSACTION) {
            if let Err(error) = self.inner.catalog.record_use(used).await {
                // The next use would record them; no entry is lost for it.
                warn!(
                    cause = error.cause(),
                    "cannot record when entries were used"
                );
                return;
            }
        }
    }

    /// Records the last uses, persists uploads, closes the database, and unlocks the folder.
    pub async fn close(&self) {
        self.record_uses().await;
        if let Err(error) = self.persist(u64::MAX, None).await {
            warn!(cause = error.cause(), "cannot save uncommitted uploads");
        }
        self.inner.catalog.close().await;
        // If only its file were closed, a connection that is still closing would keep the lock, or
        // another program that is just being started. If unlocking fails, the lock ends with the
        // process.
        if let Some(lock) = &self.inner.lock {
            let _ = lock.unlock();
        }
    }

    fn used(&self, entry: u64) {
        let now = self.inner.time.now();
        let mut recent_uses = lock(&self.inner.recent_uses);
        if recent_uses.len() < MAX_RECENT_USES || recent_uses.contains_key(&entry) {
            recent_uses.insert(entry, now);
        }
    }

    /// Receives a part: in memory if possible, otherwise from the row that announces it to the row
    /// that has its size.
    async fn receive(
        &self,
        upload: u64,
        block: Option<&str>,
        (start, truncate): (u64, bool),
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        self.check_upload_limit()?;
        let mut arriving = ReceivingPart {
            store: self.clone(),
            bytes: 0,
            unfinished: None,
        };
        let ReceivingPart {
            bytes, unfinished, ..
        } = &mut arriving;
        let may_be_held = block.is_none() && start == 0;
        let Some((held_write, exclusive)) = self.begin_write(upload, may_be_held).await? else {
            let begun = self.begin_part(upload, block, start).await?;
            let others = if truncate { 0 } else { begun.others };
            let pieces = self.checked(start, others, bytes, pieces);
            return self
                .receive_part(upload, &begun, truncate, unfinished, pieces)
                .await;
        };
        let mut pieces = pin!(self.checked(0, 0, bytes, pieces));
        let with_heartbeat =
            (&mut pieces).inspect_ok(|_| held_write.heartbeat(self.inner.time.now()));
        let rest = match gather(&mut pin!(with_heartbeat), self.small()).await? {
            Gathered::Part(begin) => {
                drop(held_write);
                self.persist_one(upload).await?;
                begin
            }
            Gathered::All(all) => {
                let numbers = &exclusive.numbers;
                let small = SmallPart {
                    blob: numbers
                        .take(&self.inner.catalog, |left| &mut left.blobs)
                        .await?,
                    digests: digests_of_all(&all),
                    bytes: all,
                };
                let size = small.bytes.len() as u64;
                match held_write.end(small, self.inner.time.now()) {
                    Ok(before) => {
                        self.inner.finished.fetch_add(size, Ordering::Relaxed);
                        self.subtract_finished(before);
                        return Ok(());
                    }
                    // Another task persisted the upload meanwhile.
                    Err(small) => vec![small.bytes],
                }
            }
        };
        let pieces = stream::iter(rest.into_iter().map(Ok)).chain(pieces);
        let begun = self.begin_part(upload, None, 0).await?;
        self.receive_part(upload, &begun, truncate, unfinished, pieces)
            .await
    }

    /// How much of an upload may be gathered in memory. It is less while many uploads arrive.
    fn small(&self) -> usize {
        if self.inner.arriving.load(Ordering::Relaxed) > GATHER_BUDGET {
            SMALL / 4
        } else {
            SMALL
        }
    }

    /// Begins to write to `upload` if it is in memory and the content `may_be_held` there.
    /// Otherwise the database has the upload from now on, if there is one.
    async fn begin_write(
        &self,
        upload: u64,
        may_be_held: bool,
    ) -> Result<Option<(HeldWrite, &ExclusiveState)>, StoreError> {
        let Some(exclusive) = &self.inner.exclusive else {
            return Ok(None);
        };
        match exclusive.held.begin_write(upload, self.inner.time.now()) {
            UploadLocation::InMemory(held_write) if may_be_held => {
                return Ok(Some((held_write, exclusive)));
            }
            // Wait for the task that persists it.
            UploadLocation::InMemory(_) | UploadLocation::Leaving => {
                self.persist_one(upload).await?
            }
            UploadLocation::NotInMemory => {}
        }
        Ok(None)
    }

    async fn begin_part(
        &self,
        upload: u64,
        block: Option<&str>,
        start: u64,
    ) -> Result<BegunPart, StoreError> {
        let inner = &*self.inner;
        let now = inner.time.now();
        let begun = inner.catalog.begin_part(upload, block, start, now).await;
        if self.made_room_for(begun.as_ref().err()).await {
            inner.catalog.begin_part(upload, block, start, now).await
        } else {
            begun
        }
    }

    /// Receives a part that the database knows of. Its blob is in `unfinished` until this ends.
    async fn receive_part(
        &self,
        upload: u64,
        begun: &BegunPart,
        truncate: bool,
        unfinished: &mut Option<u64>,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        let inner = &*self.inner;
        *unfinished = Some(begun.blob);
        let replaces = match (begun.is_first, truncate) {
            // Most uploads have no earlier part, so there is nothing to replace.
            (true, _) => Replaces::Nothing,
            (false, true) => Replaces::All,
            (false, false) => Replaces::Same,
        };
        let mut pieces = pin!(self.with_heartbeat(begun.blob, pieces));
        let received = async {
            Ok(match gather(&mut pieces, self.small()).await? {
                Gathered::All(all) => {
                    let content = WrittenBlob {
                        size: all.len() as u64,
                        digests: digests_of_all(&all),
                    };
                    (content, Some(all))
                }
                Gathered::Part(begin) => {
                    (inner.blobs.write(begun.blob, begin, pieces).await?, None)
                }
            })
        };
        let ended = match received.await {
            Ok((content, inside)) => {
                let part = FinishedPart {
                    blob: begun.blob,
                    content,
                    inside,
                    replaces,
                };
                self.finish_part(upload, &part).await
            }
            Err(error) => Err(error),
        };
        *unfinished = None;
        let Err(error) = ended else { return Ok(()) };
        let full = self.made_room_for(Some(&error)).await;
        if full {
            // The bytes written so far take room; if they cannot be deleted now, a sweep does it.
            let _ = inner.blobs.delete([begun.blob]).await;
        }
        // This comes before the answer, so that the client's retry does not meet the old part.
        self.give_up(begun.blob).await;
        Err(if full { StoreError::Full } else { error })
    }

    async fn finish_part(&self, upload: u64, part: &FinishedPart) -> Result<(), StoreError> {
        let inner = &*self.inner;
        let now = inner.time.now();
        let ended = inner.catalog.finish_part(upload, part, now).await;
        let replaced = if self.made_room_for(ended.as_ref().err()).await {
            inner.catalog.finish_part(upload, part, now).await?
        } else {
            ended?
        };
        inner
            .finished
            .fetch_add(part.content.size, Ordering::Relaxed);
        self.subtract_finished(replaced);
        Ok(())
    }

    /// Subtracts the bytes of an upload that is committed now, or was replaced.
    fn subtract_finished(&self, bytes: u64) {
        let less = |finished: u64| Some(finished.saturating_sub(bytes));
        let relaxed = Ordering::Relaxed;
        // The closure never refuses.
        let _ = self.inner.finished.fetch_update(relaxed, relaxed, less);
    }

    /// Whether more may be received of uploads that are not committed. Entries are not evicted for
    /// content that may never become an entry.
    fn check_upload_limit(&self) -> Result<(), StoreError> {
        let Some(limit) = self.inner.limits.total else {
            return Ok(());
        };
        let ended = self.inner.finished.load(Ordering::Relaxed);
        let arriving = self.inner.arriving.load(Ordering::Relaxed);
        if ended.saturating_add(arriving) > limit {
            Err(StoreError::Crowded { limit })
        } else {
            Ok(())
        }
    }

    /// `pieces` of a part that begins at `start`, counted in `bytes`, as long as there is room for
    /// them.
    fn checked<'a>(
        &'a self,
        start: u64,
        others: u64,
        bytes: &'a mut u64,
        pieces: impl Stream<Item = Chunk> + Send + 'a,
    ) -> impl Stream<Item = Chunk> + Send + 'a {
        let limit = self.inner.limits.entry;
        pieces.map(move |piece| {
            let piece = piece?;
            let length = piece.len() as u64;
            *bytes += length;
            self.received(length);
            let upload_bytes = others.max(start).saturating_add(*bytes);
            if upload_bytes > limit {
                return Err(StoreError::TooLarge { limit });
            }
            self.check_upload_limit()?;
            Ok(piece)
        })
    }

    /// `pieces`, with a heartbeat in the database from time to time.
    fn with_heartbeat<'a>(
        &'a self,
        blob: u64,
        pieces: impl Stream<Item = Chunk> + Send + 'a,
    ) -> impl Stream<Item = Chunk> + Send + 'a {
        let inner = &*self.inner;
        let mut last_heartbeat = inner.time.now();
        pieces.and_then(move |piece| {
            let now = inner.time.now();
            let silent = now.saturating_sub(last_heartbeat) >= milliseconds(HEARTBEAT_EVERY);
            if silent {
                last_heartbeat = now;
            }
            async move {
                if silent {
                    inner.catalog.heartbeat(blob, now).await?;
                }
                Ok(piece)
            }
        })
    }

    fn received(&self, bytes: u64) {
        self.inner.arriving.fetch_add(bytes, Ordering::Relaxed);
        let Some(limit) = self.inner.limits.total else {
            return;
        };
        let before = self.inner.received.fetch_add(bytes, Ordering::Relaxed);
        let enough = limit / EVICT_AHEAD;
        if before < enough && before + bytes >= enough {
            self.inner.sweep_now.notify_one();
        }
    }

    /// Reserves a name, in memory if possible.
    async fn reserve_once(&self, name: &EntryName) -> Result<u64, StoreError> {
        let StoreInner {
            catalog, exclusive, ..
        } = &*self.inner;
        let Moments { now, abandoned } = self.moments();
        let Some(exclusive) = exclusive else {
            return catalog.reserve(name, now, abandoned).await;
        };
        let numbers = &exclusive.numbers;
        let upload = numbers.take(catalog, |left| &mut left.uploads).await?;
        let (reserving, given_up) = exclusive.held.reserve(name, upload, now, abandoned)?;
        self.subtract_finished(given_up);
        let taken = exclusive.names.ask(name.clone()).await.ok_or_else(closed)?;
        match taken.map_err(|error| StoreError::Backend(Box::new(error)))? {
            NameStatus::Free => {
                reserving.keep();
                Ok(upload)
            }
            NameStatus::Committed => Err(StoreError::AlreadyExists),
            // It may be abandoned. No other task reserves the name meanwhile.
            NameStatus::Reserved => catalog.reserve(name, now, abandoned).await,
        }
    }

    /// Makes an upload an entry, wherever it is.
    async fn commit_once(&self, upload: u64, size: u64) -> Result<CommittedUpload, StoreError> {
        let mut commit = Commit {
            what: CommitSource::Upload(upload),
            size,
            created: since_1970(),
            moments: self.moments(),
        };
        let Some(exclusive) = &self.inner.exclusive else {
            let done = self.inner.catalog.commit(&[commit]).await?;
            return done.into_iter().next().ok_or_else(closed)?;
        };
        let mut held = None;
        loop {
            match exclusive.held.commit(upload, size)? {
                UploadLocation::InMemory((name, small)) => {
                    commit.what = CommitSource::Unwritten(name, small);
                    held = Some(upload);
                }
                UploadLocation::Leaving => {
                    self.persist_one(upload).await?;
                    continue;
                }
                UploadLocation::NotInMemory => {}
            }
            break;
        }
        exclusive
            .commits
            .ask((held, commit))
            .await
            .ok_or_else(closed)?
    }

    /// Gives up a part that broke off. Nobody reads uncommitted content, so the next sweep deletes
    /// its bytes.
    async fn give_up(&self, blob: u64) {
        let dropped = self.inner.catalog.abandon_part(blob).await;
        let dropped = if self.made_room_for(dropped.as_ref().err()).await {
            self.inner.catalog.abandon_part(blob).await
        } else {
            dropped
        };
        if let Err(error) = dropped {
            // A sweep finds it when it is old.
            warn!(cause = error.cause(), "cannot discard an interrupted part");
        }
    }

    /// Drops an entry whose content was missing or changed when it was read.
    fn drop_missing(&self, entry: u64) {
        let store = self.clone();
        tokio::spawn(async move { store.mark_missing(entry).await });
    }
}

/// How a sweep is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Urgency {
    Usual,
    /// The disk is full.
    Full,
}

/// The content of an entry. It drops the entry if the bytes are not the ones that were written.
#[derive(Debug)]
struct WatchedContent {
    store: EntryStore,
    entry: u64,
    parts: StoredContent,
}

impl RangeRead for WatchedContent {
    fn size(&self) -> u64 {
        self.parts.size()
    }

    fn read(&self, first: u64, length: u64) -> BoxFuture<'_, io::Result<Bytestream>> {
        let (store, entry) = (self.store.clone(), self.entry);
        let reading = self.parts.read(first, length);
        async move {
            let stream = reading.await?;
            let watched = stream.inspect_err(move |error| {
                if is_missing(error) {
                    store.drop_missing(entry);
                }
            });
            Ok(watched.boxed())
        }
        .boxed()
    }
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

fn database_file(database: &Database) -> Option<&Path> {
    match database {
        Database::Sqlite(path) => Some(path),
        Database::Postgres(_) => None,
    }
}

/// The folders that only this user may read.
fn private_folders(storage: &StorageConfig) -> impl Iterator<Item = &Path> {
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A part that is being received. Its request may end at any await, when its client disconnects.
struct ReceivingPart {
    store: EntryStore,
    /// The bytes that came so far.
    bytes: u64,
    /// Its blob, as long as it is unfinished.
    unfinished: Option<u64>,
}

impl Drop for ReceivingPart {
    fn drop(&mut self) {
        let arriving = &self.store.inner.arriving;
        arriving.fetch_sub(self.bytes, Ordering::Relaxed);
        if let (Some(blob), Ok(runtime)) = (self.unfinished, tokio::runtime::Handle::try_current())
        {
            let store = self.store.clone();
            runtime.spawn(async move { store.give_up(blob).await });
        }
    }
}

impl Store for EntryStore {
    async fn reserve(&self, name: EntryName) -> Result<u64, StoreError> {
        let reserved = self.reserve_once(&name).await;
        if self.made_room_for(reserved.as_ref().err()).await {
            self.reserve_once(&name).await
        } else {
            reserved
        }
    }

    fn check_size(&self, size: u64) -> Result<(), StoreError> {
        let limit = self.inner.limits.entry;
        if size > limit {
            return Err(StoreError::TooLarge { limit });
        }
        Ok(())
    }

    async fn upload_of(&self, name: &EntryName) -> Result<u64, StoreError> {
        let exclusive = self.inner.exclusive.as_ref();
        match exclusive.and_then(|exclusive| exclusive.held.upload_of(name)) {
            Some(upload) => Ok(upload),
            None => self.inner.catalog.upload_of(name).await,
        }
    }

    async fn name_of(&self, upload: u64) -> Result<EntryName, StoreError> {
        let exclusive = self.inner.exclusive.as_ref();
        match exclusive.and_then(|exclusive| exclusive.held.name_of(upload)) {
            Some(name) => Ok(name),
            None => self.inner.catalog.name_of(upload).await,
        }
    }

    async fn write(
        &self,
        upload: u64,
        offset: u64,
        truncate: bool,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        self.receive(upload, None, (offset, truncate), pieces).await
    }

    async fn write_block(
        &self,
        upload: u64,
        block: &str,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<(), StoreError> {
        self.receive(upload, Some(block), (0, false), pieces).await
    }

    async fn join_blocks(&self, upload: u64, blocks: Vec<String>) -> Result<(), StoreError> {
        let StoreInner {
            catalog,
            limits,
            time,
            ..
        } = &*self.inner;
        let now = time.now();
        self.begin_write(upload, false).await?;
        let joined = catalog
            .join_blocks(upload, &blocks, limits.entry, now)
            .await;
        if self.made_room_for(joined.as_ref().err()).await {
            catalog
                .join_blocks(upload, &blocks, limits.entry, now)
                .await
        } else {
            joined
        }
    }

    async fn commit(&self, upload: u64, size: u64) -> Result<Entry, StoreError> {
        self.check_size(size)?;
        let found = self
            .inner
            .exclusive
            .as_ref()
            .map(|exclusive| &exclusive.found);
        let age = found.map_or(0, LookupCache::age);
        let committed = self.commit_once(upload, size).await;
        let CommittedUpload {
            entry,
            parts,
            upload_bytes,
        } = if self.made_room_for(committed.as_ref().err()).await {
            self.commit_once(upload, size).await?
        } else {
            committed?
        };
        self.subtract_finished(upload_bytes);
        // Later jobs read the entry that this one saved.
        self.inner.parts.insert(entry.id, parts.into());
        if let Some(found) = found {
            found.keep(&entry, age);
        }
        Ok(entry)
    }

    async fn find(&self, query: &Query<'_>) -> Option<Entry> {
        let found = self
            .inner
            .exclusive
            .as_ref()
            .map(|exclusive| &exclusive.found);
        if let Some(entry) = found.and_then(|found| found.get(query)) {
            self.used(entry.id);
            return Some(entry);
        }
        let age = found.map_or(0, LookupCache::age);
        match self.inner.catalog.find(query).await {
            Ok(None) => None,
            Ok(Some(entry)) => {
                let is_first = query.scopes.first() == Some(&entry.name.scope)
                    && query.keys.first() == Some(&entry.name.key.as_str());
                if let Some(found) = found.filter(|_| is_first) {
                    found.keep(&entry, age);
                }
                // The client is about to read it. Even if it does not, GitHub counts a look-up as a
                // use too.
                self.used(entry.id);
                Some(entry)
            }
            Err(error) => {
                error!(cause = %error, "a lookup failed and was answered as a miss");
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
                    error!(cause = %error, "cannot look up an entry");
                    return None;
                }
            },
        };
        self.used(entry);
        let StoreInner { blobs, inside, .. } = &*self.inner;
        if let [part] = &*parts
            && part.inside
        {
            return match inside.read(part).await {
                Ok(bytes) => Some(Content::Bytes(bytes)),
                Err(error) if is_missing(&error) => {
                    self.mark_missing(entry).await;
                    None
                }
                Err(error) => {
                    error!(cause = %error, "cannot read an entry");
                    None
                }
            };
        }
        Some(Content::Remote(Box::new(WatchedContent {
            store: self.clone(),
            entry,
            parts: StoredContent::new(blobs.clone(), inside.clone(), parts),
        })))
    }

    async fn mark_missing(&self, entry: u64) {
        self.inner.parts.invalidate(&entry);
        warn!(
            entry,
            "the content of an entry is gone or changed; the entry is dropped"
        );
        let now = self.inner.time.now();
        let forgotten = self.inner.catalog.remove_entry(entry, now).await;
        self.invalidate_lookups();
        if let Err(error) = forgotten {
            error!(cause = error.cause(), "cannot drop an entry");
        }
    }
}
