//! Commits uploads that the database does not have: many in one transaction, in one thread. Only in SQLite.
//!
//! Through sqlx each statement crosses to SQLite's thread and back, which costs more than the statement.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rusqlite::{CachedStatement, Connection, ErrorCode, OpenFlags, Transaction, params};

use crate::cache_protocol::ids::EntryId;
use crate::cache_protocol::parts::{self, Part};
use crate::cache_protocol::store::{Entry, EntryName, StoreError};
use crate::clock::Timestamp;
use crate::serve::catalog::Catalog;
use crate::serve::catalog::commit::CommittedUpload;
use crate::serve::catalog::connections::{BEGIN_LOG_AGAIN, pragmas};
use crate::serve::catalog::rows::{encode, milliseconds, number};
use crate::serve::catalog::segments::ContentLocation;
use crate::serve::catalog::upload_parts::SmallPart;

/// An upload to commit that the database does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnwrittenCommit {
    /// The name under which it was reserved.
    pub name: EntryName,
    /// Its content, which is missing if it is empty.
    pub content: Option<SmallPart>,
    /// The size that its client says it has.
    pub size: u64,
    /// When it is by this machine's clock.
    pub created: Timestamp,
    /// When it is by the store's clock.
    pub now: Timestamp,
}

/// The connection that commits them.
#[derive(Debug)]
pub(super) struct BatchWriter {
    /// `None` once it is closed.
    connection: Mutex<Option<Connection>>,
}

type Committed = Vec<Result<CommittedUpload, StoreError>>;

impl Catalog {
    /// Makes uploads entries that the database does not have. When this returns, all commits that succeeded
    /// are on the disk.
    ///
    /// # Errors
    /// Each result may be [`StoreError::AlreadyExists`]. An error of the database or of the disk fails all
    /// of them.
    pub async fn commit_unwritten(
        &self,
        commits: &Arc<[UnwrittenCommit]>,
    ) -> Result<Committed, sqlx::Error> {
        let Some(sqlite) = self.sqlite.clone() else {
            let error = "only a database of this service alone has uploads elsewhere";
            return Err(sqlx::Error::Configuration(error.into()));
        };
        let unnamed = sqlite.segments.unnamed().await;
        let commits = commits.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _unnamed = unnamed;
            let contents = commits.iter().filter_map(|commit| commit.content.as_ref());
            let contents: Vec<Bytes> = contents.map(|small| small.bytes.clone()).collect();
            // Others write to the database while this waits for the disk.
            let locations = sqlite.segments.append(&contents)?;
            let _turn = sqlite.turn.blocking_lock();
            if sqlite.has_little_room.load(Ordering::Relaxed) {
                sqlite.batch_writer.begin_log_again();
            }
            let committed = sqlite.batch_writer.commit(&commits, locations);
            let all = committed
                .as_ref()
                .map(|done| done.iter().all(Result::is_ok));
            if !all.unwrap_or(false) {
                // Contents without rows.
                sqlite.has_new_garbage.store(true, Ordering::Relaxed);
            }
            committed
        });
        done.await.map_err(|error| sqlx::Error::Io(error.into()))?
    }
}

impl BatchWriter {
    /// Writes to the database at `path`, which exists.
    ///
    /// # Errors
    /// An error of the database.
    pub(super) fn open(path: &Path) -> Result<Self, sqlx::Error> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags).map_err(told)?;
        connection.execute_batch(&pragmas()).map_err(told)?;
        Ok(Self {
            connection: Mutex::new(Some(connection)),
        })
    }

    /// Writes the rows of uploads whose contents are at `locations`.
    fn commit(
        &self,
        commits: &[UnwrittenCommit],
        locations: Vec<ContentLocation>,
    ) -> Result<Committed, sqlx::Error> {
        let mut locations = locations.into_iter();
        let mut connection = self.lock();
        let connection = connection.as_mut().ok_or(sqlx::Error::PoolClosed)?;
        // A transaction that reads first cannot write any more once another program has written.
        let behavior = rusqlite::TransactionBehavior::Immediate;
        let transaction = connection
            .transaction_with_behavior(behavior)
            .map_err(told)?;
        let mut statements = Statements::prepare(&transaction).map_err(told)?;
        let committed = commits
            .iter()
            .map(|commit| {
                let location = commit.content.as_ref().and_then(|_| locations.next());
                statements.insert(commit, location)
            })
            .collect::<Result<_, _>>()?;
        drop(statements);
        transaction.commit().map_err(told)?;
        Ok(committed)
    }

    fn begin_log_again(&self) {
        if let Some(connection) = &*self.lock() {
            // If it fails, there may be room for the next transaction even so.
            let _ = connection.query_row(BEGIN_LOG_AGAIN, [], |_| Ok(()));
        }
    }

    /// Closes the connection.
    pub(super) fn close(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Connection>> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The statements of a commit, prepared.
struct Statements<'a> {
    transaction: &'a Transaction<'a>,
    entry: CachedStatement<'a>,
    content: CachedStatement<'a>,
}

impl<'a> Statements<'a> {
    fn prepare(transaction: &'a Transaction<'a>) -> rusqlite::Result<Self> {
        let entry = "INSERT INTO entries (scope, version, key, size, created, used, parts, stored) \
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) \
                     ON CONFLICT (scope, version, key) DO NOTHING";
        let content = "INSERT INTO contents (blob, content, segment, start, length) \
                       VALUES (?1, x'', ?2, ?3, ?4)";
        Ok(Self {
            transaction,
            entry: transaction.prepare_cached(entry)?,
            content: transaction.prepare_cached(content)?,
        })
    }

    /// Makes an upload an entry whose content, if it has one, is at `location`.
    fn insert(
        &mut self,
        commit: &UnwrittenCommit,
        location: Option<ContentLocation>,
    ) -> Result<Result<CommittedUpload, StoreError>, sqlx::Error> {
        let UnwrittenCommit { name, content, .. } = commit;
        let parts: Vec<Part> = content.iter().map(SmallPart::part).collect();
        let written = self.entry.execute(params![
            &*name.scope.0,
            name.version,
            name.key,
            number(commit.size),
            milliseconds(commit.created),
            milliseconds(commit.now),
            encode(&parts)?,
            number(parts::stored(&parts)),
        ]);
        if written.map_err(told)? == 0 {
            // Another program that writes to this database took the name.
            return Ok(Err(StoreError::AlreadyExists));
        }
        let id = self.transaction.last_insert_rowid();
        if let (Some(small), Some(location)) = (content, location) {
            let written = self.content.execute([
                number(small.blob),
                number(location.segment),
                number(location.start),
                number(location.length),
            ]);
            written.map_err(told)?;
        }
        Ok(Ok(CommittedUpload {
            entry: Entry {
                id: EntryId(u64::try_from(id).unwrap_or(0)),
                name: name.clone(),
                size: commit.size,
                created: commit.created,
            },
            parts,
            upload_bytes: 0,
        }))
    }
}

/// An error of SQLite's as sqlx tells it.
fn told(error: rusqlite::Error) -> sqlx::Error {
    // A file that all connections share in memory could not grow.
    let has_no_shared_memory = error
        .sqlite_error()
        .is_some_and(|error| error.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE);
    if has_no_shared_memory || error.sqlite_error_code() == Some(ErrorCode::DiskFull) {
        return std::io::Error::new(std::io::ErrorKind::StorageFull, error).into();
    }
    sqlx::Error::AnyDriverError(error.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::reserved_space::is_full;

    #[test]
    fn a_full_disk_is_told_from_other_errors_of_sqlite() {
        use rusqlite::ffi;
        for (code, full) in [
            (ffi::SQLITE_FULL, true),
            (ffi::SQLITE_IOERR_SHMSIZE, true),
            (ffi::SQLITE_IOERR_WRITE, false),
            (ffi::SQLITE_CORRUPT, false),
        ] {
            let error = rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
            assert_eq!(is_full(&told(error)), full, "{code}");
        }
    }
}
