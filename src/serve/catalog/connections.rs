//! Opens the database: its address, its connections and their settings.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;
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
        // This allows giving free pages back to the disk. It writes to the file, so only one
        // connection sets it.
        let first = format!("PRAGMA auto_vacuum = INCREMENTAL; {pragmas}");
        let open = |connections, pragmas: &str| {
            let pragmas = pragmas.to_owned();
            options()
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
        let write = open(1, &first).await?;
        let read = open(CONNECTIONS, &pragmas).await?;
        let quick = open(QUICK_CONNECTIONS, &pragmas).await?;
        let threads = tokio::runtime::Handle::current().metrics().num_workers();
        prepare(&write, &schema(Dialect::Sqlite)).await?;
        let segments = Arc::new(Segments::open(&path.with_file_name("contents"))?);
        let sqlite = SqliteState {
            turn: Arc::default(),
            in_place: InPlaceReader::new(path, threads, segments.clone()),
            batch_writer: BatchWriter::open(path)?,
            segments,
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
        let connection = self.write.acquire().await?;
        Ok(DatabaseWriter { connection, _turn })
    }
}

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
