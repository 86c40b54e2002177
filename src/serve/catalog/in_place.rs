//! Asks SQLite for small contents and for names in the thread that needs them. Each other query crosses to
//! the database's own thread and back, which costs about as much as this read.
//!
//! A read that waits for the disk stops a thread of the runtime. So one of its threads never reads, and after
//! a slow read the database's own threads make the next ones.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, params};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::cache_protocol::azure_blob::is_missing;
use crate::cache_protocol::ids::BlobId;
use crate::cache_protocol::store::EntryName;
use crate::serve::catalog::contents::{ATTEMPTS, ContentBytes};
use crate::serve::catalog::rows::number;
use crate::serve::catalog::segments::{ContentLocation, Segments};
use crate::serve::catalog::uploads::NameStatus;

/// A read that takes longer waited for the disk, as other requests then do for the thread. A read of what
/// the system has in memory takes some ten microseconds, one of a solid state disk some hundred.
const SLOW: Duration = Duration::from_millis(4);

/// How many reads after a slow one are not made in place.
const SKIPPED: u32 = 32;

/// Connections that only read, each used by one thread at a time.
#[derive(Debug)]
pub(super) struct InPlaceReader {
    path: PathBuf,
    /// `None` once they are closed.
    idle: Mutex<Option<Vec<Connection>>>,
    /// How many reads are still to be left to the database's own threads.
    skipped: AtomicU32,
    /// A permit for each thread that may read.
    readers: Semaphore,
    segments: Arc<Segments>,
}

impl InPlaceReader {
    /// A reader of the database at `path` for a runtime of so many `threads`. It opens its connections when
    /// they are needed.
    pub(super) fn new(path: &Path, threads: usize, segments: Arc<Segments>) -> Self {
        Self {
            path: path.to_owned(),
            idle: Mutex::new(Some(Vec::new())),
            skipped: AtomicU32::new(0),
            readers: Semaphore::new(threads.saturating_sub(1)),
            segments,
        }
    }

    /// The bytes of `blob`, if the database has it. `None` if it must be asked otherwise: all other threads
    /// read, the disk was slow lately, the reader is closed, or the read failed.
    pub(super) fn content(&self, blob: BlobId) -> Option<Option<Bytes>> {
        self.read(|connection| self.content_by(connection, blob))
    }

    /// Whether `name` can be reserved. `None` as above.
    pub(super) fn name_status(&self, name: &EntryName) -> Option<NameStatus> {
        self.read(|connection| name_status(connection, name).ok())
    }

    fn read<T>(&self, read: impl FnOnce(&Connection) -> Option<T>) -> Option<T> {
        let _permit = self.begin()?;
        let begun = Instant::now();
        let connection = self.take()?;
        let found = read(&connection);
        if let Ok(mut idle) = self.idle.lock()
            && let Some(idle) = &mut *idle
        {
            idle.push(connection);
        }
        self.observe(begun.elapsed());
        found
    }

    fn content_by(&self, connection: &Connection, blob: BlobId) -> Option<Option<Bytes>> {
        for _ in 0..ATTEMPTS {
            let location = match stored_content(connection, blob).ok()? {
                None => return Some(None),
                Some(ContentBytes::InRow(bytes)) => return Some(Some(bytes)),
                Some(ContentBytes::InSegment(location)) => location,
            };
            match self.segments.read(location) {
                Ok(bytes) => return Some(Some(bytes)),
                // It may have moved since.
                Err(error) if is_missing(&error) => {}
                Err(_) => return None,
            }
        }
        None
    }

    /// Closes the connections: SQLite removes its log when the last connection is closed.
    pub(super) fn close(&self) {
        if let Ok(mut idle) = self.idle.lock() {
            *idle = None;
        }
    }

    fn take(&self) -> Option<Connection> {
        let idle = self.idle.lock().ok()?.as_mut()?.pop();
        idle.or_else(|| open(&self.path).ok())
    }

    /// `None` if this thread must not read now.
    fn begin(&self) -> Option<SemaphorePermit<'_>> {
        let one_less = |left: u32| left.checked_sub(1);
        let is_skipped = self
            .skipped
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less)
            .is_ok();
        if is_skipped {
            return None;
        }
        self.readers.try_acquire().ok()
    }

    fn observe(&self, read: Duration) {
        if read > SLOW {
            self.skipped.store(SKIPPED, Ordering::Relaxed);
        }
    }
}

/// It never waits for another connection's lock: the read is then made otherwise.
fn open(path: &Path) -> rusqlite::Result<Connection> {
    // In this mode a reader writes to the file that all connections share.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.execute_batch("PRAGMA query_only = 1; PRAGMA busy_timeout = 0")?;
    Ok(connection)
}

fn stored_content(connection: &Connection, blob: BlobId) -> rusqlite::Result<Option<ContentBytes>> {
    connection
        .prepare_cached("SELECT segment, start, length, content FROM contents WHERE blob = ?1")?
        .query_row([number(blob)], |row| {
            let Some(segment) = unsigned(row, 0)? else {
                let content = Bytes::copy_from_slice(row.get_ref(3)?.as_blob()?);
                return Ok(ContentBytes::InRow(content));
            };
            Ok(ContentBytes::InSegment(ContentLocation {
                segment,
                start: unsigned(row, 1)?.unwrap_or(0),
                length: unsigned(row, 2)?.unwrap_or(0),
            }))
        })
        .optional()
}

fn name_status(connection: &Connection, name: &EntryName) -> rusqlite::Result<NameStatus> {
    let name = params![&*name.scope.0, name.version, name.key];
    let mut found = connection.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM entries WHERE scope = ?1 AND version = ?2 AND key = ?3), \
         EXISTS (SELECT 1 FROM uploads WHERE scope = ?1 AND version = ?2 AND key = ?3)",
    )?;
    found.query_row(name, |row| {
        Ok(match (row.get(0)?, row.get(1)?) {
            (true, _) => NameStatus::Committed,
            (false, true) => NameStatus::Reserved,
            (false, false) => NameStatus::Free,
        })
    })
}

fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<u64>> {
    let value: Option<i64> = row.get(column)?;
    Ok(value.map(|value| u64::try_from(value).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(path: &Path, threads: usize) -> InPlaceReader {
        let segments = Segments::open(&path.with_file_name("contents")).unwrap();
        InPlaceReader::new(path, threads, Arc::new(segments))
    }

    fn database(folder: &Path) -> PathBuf {
        let path = folder.join("catalog");
        let connection = Connection::open(&path).unwrap();
        connection
            .execute_batch(
                "PRAGMA journal_mode = WAL; \
                 CREATE TABLE contents (blob INTEGER PRIMARY KEY, content BLOB NOT NULL, \
                 segment BIGINT, start BIGINT, length BIGINT); \
                 INSERT INTO contents VALUES (7, x'616263', NULL, NULL, NULL)",
            )
            .unwrap();
        path
    }

    #[test]
    fn a_content_is_read_and_one_that_is_not_there_is_known_to_be_missing() {
        let folder = tempfile::tempdir().unwrap();
        let reader = reader(&database(folder.path()), 2);
        for _ in 0..2 {
            let content = reader.content(BlobId(7));
            assert_eq!(content, Some(Some(Bytes::from_static(b"abc"))));
            assert_eq!(reader.content(BlobId(8)), Some(None));
        }
    }

    #[test]
    fn after_a_slow_read_the_databases_own_threads_make_the_next_ones() {
        let folder = tempfile::tempdir().unwrap();
        let reader = reader(&database(folder.path()), 2);
        reader.observe(SLOW);
        assert!(reader.content(BlobId(7)).is_some());
        reader.observe(SLOW + Duration::from_nanos(1));
        let skipped = std::iter::from_fn(|| reader.content(BlobId(7)).is_none().then_some(()));
        assert_eq!(skipped.count() as u32, SKIPPED);
    }

    #[test]
    fn one_thread_of_the_runtime_never_reads() {
        let folder = tempfile::tempdir().unwrap();
        let path = database(folder.path());
        assert_eq!(reader(&path, 1).content(BlobId(7)), None);
        let reader = reader(&path, 3);
        let first = reader.begin().unwrap();
        let second = reader.begin().unwrap();
        assert_eq!(reader.content(BlobId(7)), None);
        drop(first);
        assert!(reader.content(BlobId(7)).is_some());
        drop(second);
        assert_eq!(reader.readers.available_permits(), 2);
    }

    #[test]
    fn a_database_that_cannot_be_read_and_a_closed_reader_leave_the_read_to_others() {
        let folder = tempfile::tempdir().unwrap();
        let missing = reader(&folder.path().join("missing"), 2);
        assert_eq!(missing.content(BlobId(7)), None);
        assert!(!folder.path().join("missing").exists());
        let path = database(folder.path());
        let reader = reader(&path, 2);
        assert!(reader.content(BlobId(7)).is_some());
        let log = folder.path().join("catalog-wal");
        assert!(log.exists());
        reader.close();
        assert!(!log.exists());
        assert_eq!(reader.content(BlobId(7)), None);
    }
}
