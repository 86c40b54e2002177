//! The catalog of entries and uploads, in a database: SQLite for one service alone, PostgreSQL for
//! several that share a storage.
//!
//! ```text
//! settings   what the replicas have in common: the store's name, the key of signed URLs
//! uploads    reserved names
//! parts      what was received for them; size is NULL while it is being written
//! contents   the small parts, which need no blob elsewhere: their bytes, or in SQLite where in a segment
//!            these are
//! entries    what was committed, with the list of its parts
//! garbage    blobs that nothing names any more and that are to be deleted
//! ```
//!
//! A blob has a row before it has a byte, and until it is deleted: whenever a process is killed, no
//! blob is left without a row. Committing is one transaction, so an entry is there as a whole or
//! not at all. In SQLite commits of small entries that come at once share one transaction and one
//! wait for the disk.
//!
//! Times are those of the store's own clock, which runs only while a service is up and is recorded
//! in `settings`: a machine's wrong clock makes nothing old.
//!
//! The statements are the same for both databases, except for the columns that number themselves
//! and for the search of a text in another.

mod commit;
mod compaction;
mod connections;
mod contents;
mod entries;
mod eviction;
mod garbage;
mod in_place;
mod rows;
mod schema;
mod segments;
mod settings;
mod unwritten;
mod upload_parts;
mod uploads;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use sqlx::{AnyPool, Executor, Row};
use tokio::sync::Mutex;

use crate::cache_protocol::ids::BlobId;
use crate::cache_protocol::store::{EntryName, StoreError};
use crate::clock::Timestamp;
use crate::serve::catalog::connections::BEGIN_LOG_AGAIN;
use crate::serve::catalog::in_place::InPlaceReader;
use crate::serve::catalog::rows::unsigned;
use crate::serve::catalog::schema::Dialect;
use crate::serve::catalog::segments::Segments;
use crate::serve::catalog::unwritten::BatchWriter;

pub use crate::serve::catalog::commit::{Commit, CommittedUpload};
pub use crate::serve::catalog::compaction::Compaction;
pub use crate::serve::catalog::connections::{Database, PostgresUrl};
pub use crate::serve::catalog::eviction::Removed;
pub use crate::serve::catalog::unwritten::UnwrittenCommit;
pub use crate::serve::catalog::upload_parts::{BegunPart, FinishedPart, Replaces, SmallPart};
pub use crate::serve::catalog::uploads::{NameStatus, Unwritten};

/// How many rows one transaction of the sweep deletes.
const SWEEP_ROWS: i64 = 500;

/// The same on a full disk: a row is in some five pages of the database, and each of them goes to the log.
const FEW_SWEEP_ROWS: i64 = 32;

/// Gives so many pages back at once: the pages that move to their places go to the log.
const GIVE_BACK: &str = "PRAGMA incremental_vacuum(256)";

/// The database's tables.
#[derive(Clone, Debug)]
pub struct Catalog {
    read: AnyPool,
    /// The same as `read` in PostgreSQL. In SQLite it is for batched queries: a few connections
    /// whose statements stay prepared.
    quick: AnyPool,
    /// The same as `read` in PostgreSQL. [`Catalog::writer`] lends its connections.
    write: AnyPool,
    /// `None` in PostgreSQL.
    sqlite: Option<Arc<SqliteState>>,
}

/// What a catalog in SQLite has besides connections of sqlx's.
#[derive(Debug)]
struct SqliteState {
    /// SQLite has one writer at a time, and it is better to wait for it here than in the file's lock.
    turn: Arc<Mutex<()>>,
    in_place: InPlaceReader,
    batch_writer: BatchWriter,
    segments: Arc<Segments>,
    /// Whether the segments may have dead bytes that the last compaction did not see.
    has_new_garbage: AtomicBool,
    /// Whether the disk is full.
    has_little_room: AtomicBool,
}

/// Tells the next compaction when it is dropped that it has something to do, unless one calls
/// [`forget`](Self::forget).
#[derive(Debug)]
struct GarbageLeft(Option<Arc<SqliteState>>);

impl GarbageLeft {
    fn of(sqlite: Arc<SqliteState>) -> Self {
        Self(Some(sqlite))
    }

    fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for GarbageLeft {
    fn drop(&mut self) {
        if let Some(sqlite) = &self.0 {
            sqlite.has_new_garbage.store(true, Ordering::Relaxed);
        }
    }
}

/// As long as this exists, the catalog writes as on a full disk.
#[derive(Debug)]
pub struct LittleRoom(Option<Arc<SqliteState>>);

impl Drop for LittleRoom {
    fn drop(&mut self) {
        if let Some(sqlite) = &self.0 {
            sqlite.has_little_room.store(false, Ordering::Relaxed);
        }
    }
}

/// The totals of the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Committed entries.
    pub entries: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// Reserved uploads.
    pub uploads: u64,
    /// The bytes received for those.
    pub upload_bytes: u64,
}

/// The current time, and the time since which unused uploads count as abandoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moments {
    /// Now.
    pub now: Timestamp,
    /// Uploads that were not used since then are given up.
    pub abandoned: Timestamp,
}

impl Catalog {
    /// Writes SQLite's log back into the database, while others write to the log.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn checkpoint(&self) -> Result<(), sqlx::Error> {
        if self.sqlite.is_some() {
            let mut connection = self.read.acquire().await?;
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").await?;
        }
        Ok(())
    }

    /// Gives free room in the database back to the disk, if the database is SQLite.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn give_back(&self) -> Result<(), StoreError> {
        if self.sqlite.is_none() {
            return Ok(());
        }
        let mut before = i64::MAX;
        loop {
            let mut connection = self.writer().await?;
            let free = sqlx::query("PRAGMA freelist_count")
                .fetch_one(&mut *connection)
                .await?;
            let free: i64 = free.try_get(0)?;
            // A database of a very old version cannot give pages back.
            if free == 0 || free >= before {
                return Ok(());
            }
            before = free;
            connection.execute(GIVE_BACK).await?;
            // If it fails, there may be room for the next step even so.
            let _ = connection.execute(BEGIN_LOG_AGAIN).await;
        }
    }

    /// The totals of the database.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn totals(&self) -> Result<Totals, sqlx::Error> {
        let row = sqlx::query(
            "SELECT (SELECT COUNT(*) FROM entries) AS entries, \
             (SELECT CAST(COALESCE(SUM(COALESCE(stored, size)), 0) AS BIGINT) FROM entries) \
             AS bytes, \
             (SELECT COUNT(*) FROM uploads) AS uploads, \
             (SELECT CAST(COALESCE(SUM(size), 0) AS BIGINT) FROM parts) AS upload_bytes",
        )
        .fetch_one(&self.read)
        .await?;
        Ok(Totals {
            entries: unsigned(&row, "entries")?,
            bytes: unsigned(&row, "bytes")?,
            uploads: unsigned(&row, "uploads")?,
            upload_bytes: unsigned(&row, "upload_bytes")?,
        })
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// The database's error if it does not.
    pub async fn ping(&self) -> Result<(), sqlx::Error> {
        sqlx::query("SELECT 1").execute(&self.read).await?;
        Ok(())
    }

    /// The bytes of `blob`, if the database has it, read in the thread that asks. `None` if
    /// [`contents`](Self::contents) must be asked: in PostgreSQL, or while the disk is slow.
    pub fn content_in_place(&self, blob: BlobId) -> Option<Option<Bytes>> {
        self.sqlite.as_ref()?.in_place.content(blob)
    }

    /// Whether `name` can be reserved, read in the thread that asks. `None` if
    /// [`name_statuses`](Self::name_statuses) must be asked.
    pub fn name_status_in_place(&self, name: &EntryName) -> Option<NameStatus> {
        self.sqlite.as_ref()?.in_place.name_status(name)
    }

    /// Closes the connections; SQLite then leaves one file.
    pub async fn close(&self) {
        if let Some(sqlite) = &self.sqlite {
            sqlite.in_place.close();
            sqlite.batch_writer.close();
        }
        self.read.close().await;
        self.quick.close().await;
        self.write.close().await;
        if let Some(segments) = self.segments() {
            segments.close();
        }
    }

    /// On a full disk: from now on each transaction of a sweep is small, and each write begins SQLite's log
    /// again, so that it does not grow. [`LittleRoom`] ends that when it is dropped.
    #[must_use]
    pub fn with_little_room(&self) -> LittleRoom {
        if let Some(sqlite) = &self.sqlite {
            sqlite.has_little_room.store(true, Ordering::Relaxed);
        }
        LittleRoom(self.sqlite.clone())
    }

    fn has_little_room(&self) -> bool {
        let sqlite = self.sqlite.as_ref();
        sqlite.is_some_and(|sqlite| sqlite.has_little_room.load(Ordering::Relaxed))
    }

    fn sweep_rows(&self) -> i64 {
        if self.has_little_room() {
            FEW_SWEEP_ROWS
        } else {
            SWEEP_ROWS
        }
    }

    /// Whether the room of a discarded small content is free at once.
    pub fn frees_at_once(&self) -> bool {
        self.segments().is_some_and(|segments| segments.can_free())
    }

    fn segments(&self) -> Option<&Arc<Segments>> {
        self.sqlite.as_ref().map(|sqlite| &sqlite.segments)
    }

    fn dialect(&self) -> Dialect {
        match self.sqlite {
            Some(_) => Dialect::Sqlite,
            None => Dialect::Postgres,
        }
    }
}
