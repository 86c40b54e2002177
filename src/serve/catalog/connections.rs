//! Opens the database: its address, its connections and their settings.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use sqlx::any::AnyPoolOptions;
use sqlx::pool::PoolConnection;
use sqlx::{Any, AnyConnection, Connection, Executor, Transaction};
use tokio::sync::OwnedMutexGuard;
use tokio::time::timeout;

use crate::serve::catalog::in_place::InPlaceReader;
use crate::serve::catalog::schema::{Dialect, prepare, schema};
use crate::serve::catalog::segments::Segments;
use crate::serve::catalog::unwritten::BatchWriter;
use crate::serve::catalog::{Catalog, SqliteState};
use crate::serve::reserved_space::is_full;

/// How long a request waits for a connection to the database.
const CONNECTION_WAIT: Duration = Duration::from_secs(30);

/// How long one more connection is tried whose error says why there is none.
const CAUSE_WAIT: Duration = Duration::from_secs(5);

/// Connections to PostgreSQL, and those to SQLite that only read.
const CONNECTIONS: u32 = 8;

/// Connections to SQLite for batched queries.
const QUICK_CONNECTIONS: u32 = 3;

/// The pages of SQLite's log at which a commit writes them back into the database. Usually a task
/// beside the commits does this, so that they need not wait for it: see [`Catalog::checkpoint`].
const LOG_PAGES: u32 = 4096;

/// The address of the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Database {
    /// A file of SQLite's. Small contents are in files of the folder `contents` beside it.
    Sqlite(PathBuf),
    /// PostgreSQL at this URL, which may have a password in it.
    Postgres(PostgresUrl),
}

/// A URL with a password, which `Debug` does not show.
#[derive(Clone, PartialEq, Eq)]
pub struct PostgresUrl(pub String);

impl std::fmt::Debug for PostgresUrl {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("PostgresUrl(***)")
    }
}

impl Catalog {
    /// Opens the database, and makes the tables if there are none.
    ///
    /// # Errors
    /// Fails if the database is unreachable, or has a later schema.
    pub async fn open(database: &Database) -> Result<Self, sqlx::Error> {
        sqlx::any::install_default_drivers();
        let catalog = match database {
            Database::Sqlite(path) => Self::open_sqlite(path).await?,
            Database::Postgres(url) => Self::open_postgres(url).await?,
        };
        catalog.upgrade().await?;
        Ok(catalog)
    }

    async fn open_sqlite(path: &Path) -> Result<Self, sqlx::Error> {
        let url = sqlite_url(path);
        let pragmas = pragmas();
        // A pool would try again and again, and say nothing of why.
        let mut connection = AnyConnection::connect(&url).await?;
        // This allows giving free pages back to the disk. It writes to the file, which a new one needs, and
        // for which a full disk may have no room.
        match connection.execute("PRAGMA auto_vacuum = INCREMENTAL").await {
            Err(error) if is_full(&error) => {}
            set => {
                set?;
            }
        }
        let settings = sqlx::AssertSqlSafe(pragmas.clone());
        connection.execute(settings).await?;
        let open = |connections, pragmas: &str| {
            let pragmas = pragmas.to_owned();
            options()
                // On a full disk SQLite ends a transaction by itself, which sqlx does not see.
                .before_acquire(|connection, _| {
                    let is_usable = !connection.is_in_transaction();
                    Box::pin(async move { Ok(is_usable) })
                })
                .max_connections(connections)
                // A connection to a file does not break, and testing it costs time.
                .test_before_acquire(false)
                .after_connect(move |connection, _| {
                    let pragmas = sqlx::AssertSqlSafe(pragmas.clone());
                    Box::pin(async move {
                        connection.execute(pragmas).await?;
                        Ok(())
                    })
                })
                .connect(&url)
        };
        let write = open(1, &pragmas).await?;
        let read = open(CONNECTIONS, &pragmas).await?;
        let quick = open(QUICK_CONNECTIONS, &pragmas).await?;
        // Not before: the last connection to be closed removes SQLite's log, and a full disk has no room for
        // another.
        connection.close().await?;
        let threads = tokio::runtime::Handle::current().metrics().num_workers();
        prepare(&write, &schema(Dialect::Sqlite)).await?;
        let segments = Arc::new(Segments::open(&path.with_file_name("contents"))?);
        let sqlite = SqliteState {
            turn: Arc::default(),
            in_place: InPlaceReader::new(path, threads, segments.clone()),
            batch_writer: BatchWriter::open(path)?,
            segments,
            has_new_garbage: AtomicBool::new(true),
            has_little_room: AtomicBool::new(false),
        };
        Ok(Self {
            read,
            quick,
            write,
            sqlite: Some(Arc::new(sqlite)),
        })
    }

    async fn open_postgres(PostgresUrl(url): &PostgresUrl) -> Result<Self, sqlx::Error> {
        let pool = match options().max_connections(CONNECTIONS).connect(url).await {
            // It has tried again and again until then, and says nothing of why.
            Err(sqlx::Error::PoolTimedOut) => {
                let again = timeout(CAUSE_WAIT, AnyConnection::connect(url));
                return Err(match again.await {
                    Ok(Err(cause)) => cause,
                    _ => sqlx::Error::PoolTimedOut,
                });
            }
            pool => pool?,
        };
        prepare(&pool, &schema(Dialect::Postgres)).await?;
        Ok(Self {
            read: pool.clone(),
            quick: pool.clone(),
            write: pool,
            sqlite: None,
        })
    }
}

/// A connection that writes; in SQLite also the turn to do so, which ends when this is dropped.
pub(super) struct DatabaseWriter {
    connection: PoolConnection<Any>,
    _turn: Option<OwnedMutexGuard<()>>,
}

impl DatabaseWriter {
    /// Begins a transaction.
    ///
    /// # Errors
    /// An error of the database.
    pub(super) async fn begin(&mut self) -> Result<Transaction<'_, Any>, sqlx::Error> {
        self.connection.begin().await
    }
}

impl Deref for DatabaseWriter {
    type Target = AnyConnection;

    fn deref(&self) -> &AnyConnection {
        &self.connection
    }
}

impl DerefMut for DatabaseWriter {
    fn deref_mut(&mut self) -> &mut AnyConnection {
        &mut self.connection
    }
}

impl Catalog {
    /// A connection that writes, once it is this request's turn.
    ///
    /// # Errors
    /// An error of the database.
    pub(super) async fn writer(&self) -> Result<DatabaseWriter, sqlx::Error> {
        let _turn = match &self.sqlite {
            Some(sqlite) => Some(sqlite.turn.clone().lock_owned().await),
            None => None,
        };
        let mut connection = self.write.acquire().await?;
        if self.has_little_room() {
            // If it fails, there may be room for this transaction even so.
            let _ = connection.execute(BEGIN_LOG_AGAIN).await;
        }
        Ok(DatabaseWriter { connection, _turn })
    }
}

/// Writes SQLite's log back into the database, so that the next transaction begins it again.
pub(super) const BEGIN_LOG_AGAIN: &str = "PRAGMA wal_checkpoint(RESTART)";

/// The settings of a connection to SQLite: readers do not wait, and each transaction waits for the disk.
pub(super) fn pragmas() -> String {
    format!(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 10000; \
         PRAGMA journal_size_limit = 67108864; PRAGMA wal_autocheckpoint = {LOG_PAGES}"
    )
}

fn options() -> AnyPoolOptions {
    AnyPoolOptions::new().acquire_timeout(CONNECTION_WAIT)
}

/// The driver takes all behind the colon for the path, once it is decoded. So no part of it may
/// look like a part of a URL: a drive, a server, a first folder that would be the host.
fn sqlite_url(path: &Path) -> String {
    let path = percent_encode(path.as_os_str().as_encoded_bytes(), NON_ALPHANUMERIC);
    format!("sqlite:{path}?mode=rwc")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache_protocol::ids::UploadId;
    use crate::cache_protocol::store::{EntryName, StoreError};
    use crate::clock::Timestamp;
    use crate::serve::catalog::{Commit, Moments, Unwritten};

    fn upload(number: u64, key: &str) -> Unwritten {
        Unwritten {
            upload: UploadId(number),
            name: EntryName {
                scope: "o/a:main".into(),
                version: "v".into(),
                key: format!("{key}{number}"),
            },
            used: Timestamp::now(),
            content: None,
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn after_a_full_disk_what_is_written_is_there_for_all_connections() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog.sqlite");
        let catalog = Catalog::open(&Database::Sqlite(path)).await.unwrap();
        let pages = async |most: u64| {
            let pragma = sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {most}"));
            catalog.writer().await.unwrap().execute(pragma).await
        };
        pages(20).await.unwrap();
        let long = "k".repeat(400);
        let many: Vec<Unwritten> = (1000..1400).map(|number| upload(number, &long)).collect();
        let error = catalog.persist(&many).await.unwrap_err();
        assert!(is_full(&error), "{error:?}");
        pages(1_000_000).await.unwrap();
        let now = Timestamp::now();
        let moments = Moments {
            now,
            abandoned: Timestamp::UNIX_EPOCH,
        };
        for number in [2, 3] {
            catalog.persist(&[upload(number, "k")]).await.unwrap();
            // An error of a client, which ends a transaction too.
            let unknown = catalog.join_blocks(UploadId(99), &[], 1, now).await;
            assert!(matches!(unknown, Err(StoreError::NoSuchUpload)));
            assert!(catalog.name_of(UploadId(number)).await.is_ok());
            let commit = Commit {
                upload: UploadId(number),
                size: 0,
                created: now,
                moments,
            };
            catalog.commit(&commit).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_database_that_cannot_be_opened_says_why_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog.sqlite");
        std::fs::write(&path, "not a database, whatever its name says").unwrap();
        let database = Database::Sqlite(path);
        let error = timeout(CAUSE_WAIT, Catalog::open(&database))
            .await
            .unwrap()
            .unwrap_err();
        assert!(error.to_string().contains("not a database"), "{error}");
    }
}
