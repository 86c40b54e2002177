//! The catalog of entries and uploads, in a database: SQLite for one service alone, PostgreSQL for
//! several that share a storage.
//!
//! ```text
//! settings   what the replicas have in common: the store's name, the key of signed URLs
//! uploads    reserved names
//! parts      what was received for them; size is NULL while it is being written
//! contents   the bytes of small parts, which need no blob elsewhere
//! entries    what was committed, with the list of its parts
//! garbage    blobs that nothing names any more and that are to be deleted
//! ```
//!
//! A blob has a row before it has a byte, and until it is deleted: whenever a process is killed, no
//! blob is left without a row. Committing is one transaction, so an entry is there as a whole or
//! not at all. In SQLite commits that come at once share one transaction and one wait for the disk.
//!
//! Times are those of the store's own clock, which runs only while a service is up and is recorded
//! in `settings`: a machine's wrong clock makes nothing old.
//!
//! The statements are the same for both databases, except for the columns that number themselves
//! and for the search of a text in another.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use sqlx::any::{AnyPoolOptions, AnyRow};
use sqlx::{Any, AnyPool, Connection, Executor, Row, Transaction};
use tracing::warn;

use crate::cache_protocol::blob_digests::Digests;
use crate::cache_protocol::parts::{self, Part, ReceivedPart};
use crate::cache_protocol::store::{Entry, EntryName, KEY_LIMIT, PARTS_LIMIT, Query, StoreError};
use crate::serve::blob_store::WrittenBlob;

/// How long a request waits for a connection to the database.
const CONNECTION_WAIT: Duration = Duration::from_secs(30);

/// Connections to PostgreSQL, and those to SQLite that only read.
const CONNECTIONS: u32 = 8;

/// Connections to SQLite for batched queries.
const QUICK_CONNECTIONS: u32 = 3;

/// The pages of SQLite's log at which a commit writes them back into the database. Usually a task
/// beside the commits does this, so that they need not wait for it: see [`Catalog::checkpoint`].
const LOG_PAGES: u32 = 8192;

/// The size of a page of a new database of SQLite's, in bytes. A content of 20 KiB takes three
/// pages of this size, and each is written twice with its own system call.
const PAGE: u32 = 8192;

/// How many rows one statement writes or reads; more rows are split into steps of these sizes, so
/// that each connection keeps its statements prepared.
const ROWS: [usize; 7] = [64, 32, 16, 8, 4, 2, 1];

/// How many rows one transaction of the sweep deletes.
const SWEEP_ROWS: i64 = 500;

/// The address of the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Database {
    /// A file of SQLite's.
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

/// The database's tables.
#[derive(Clone, Debug)]
pub struct Catalog {
    read: AnyPool,
    /// The same as `read` in PostgreSQL. In SQLite it is for batched queries: a few connections
    /// whose statements stay prepared.
    quick: AnyPool,
    /// The same as `read` in PostgreSQL. SQLite has one writer at a time, and it is better to wait
    /// for it here than in the file's lock.
    write: AnyPool,
    dialect: Dialect,
}

/// The SQL dialect of a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    /// The repository of a row: the part of its scope before the first colon.
    fn repository(self) -> &'static str {
        match self {
            Self::Sqlite => "SUBSTR(scope, 1, MAX(INSTR(scope, ':') - 1, 0))",
            Self::Postgres => "SUBSTR(scope, 1, GREATEST(STRPOS(scope, ':') - 1, 0))",
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

/// A part that is about to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BegunPart {
    /// The number of its blob.
    pub blob: u64,
    /// Whether its upload has no other so far, and no list of blocks.
    pub is_first: bool,
    /// The bytes of its upload's other parts, without those that this part replaces.
    pub others: u64,
}

/// A part that is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FinishedPart {
    /// The number of its blob.
    pub blob: u64,
    /// The size and digests of its content.
    pub content: WrittenBlob,
    /// Its bytes, if they are to be in the database and nowhere else.
    pub inside: Option<Bytes>,
    /// Which older parts of its upload it replaces.
    pub replaces: Replaces,
}

/// Which older parts of its upload a new one replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replaces {
    /// No older part.
    Nothing,
    /// The part of the same name, or that begins at the same byte.
    Same,
    /// All, and the list of blocks.
    All,
}

/// A small part, whose bytes are in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmallPart {
    /// The number of its blob.
    pub blob: u64,
    /// Its bytes.
    pub bytes: Bytes,
    /// Their digests.
    pub digests: Digests,
}

impl SmallPart {
    /// This content as a part of an entry.
    pub fn part(&self) -> Part {
        Part {
            blob: self.blob,
            size: self.bytes.len() as u64,
            digests: self.digests.clone(),
            inside: true,
        }
    }
}

/// An upload that the database does not have yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unwritten {
    /// Its number.
    pub upload: u64,
    /// The name under which it was reserved.
    pub name: EntryName,
    /// When it was used last.
    pub used: u64,
    /// The content received for it.
    pub content: Option<SmallPart>,
}

/// An upload to commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The upload.
    pub what: CommitSource,
    /// The size that its client says it has.
    pub size: u64,
    /// When it is, in milliseconds after 1970.
    pub created: u64,
    /// When it is by the store's clock.
    pub moments: Moments,
}

/// The source of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommitSource {
    /// The upload of this number.
    Upload(u64),
    /// An upload that the database does not have.
    Unwritten(EntryName, Option<SmallPart>),
}

/// The result of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedUpload {
    /// The entry.
    pub entry: Entry,
    /// Its parts.
    pub parts: Vec<Part>,
    /// The bytes of its upload's parts in the database.
    pub upload_bytes: u64,
}

/// Whether a name can be reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameStatus {
    /// The name is free.
    Free,
    /// There is an upload of that name.
    Reserved,
    /// There is an entry of that name.
    Committed,
}

/// The storage that an entry takes: its blobs, each once.
const STORED: &str = "COALESCE(stored, size)";

/// A part of an upload that was committed or given up has no upload any more.
const FINISH_PART: &str = "UPDATE parts SET size = $2, used = $3, digests = $4, inside = $5 \
                        WHERE id = $1 \
                        AND EXISTS (SELECT 1 FROM uploads WHERE id = parts.upload)";

/// The current time, and the time since which unused uploads count as abandoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moments {
    /// Now.
    pub now: u64,
    /// Uploads that were not used since then are given up.
    pub abandoned: u64,
}

/// The entries that a sweep removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// How many.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// A number as the databases have them. Ids, sizes and times stay far below.
fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unsigned(row: &AnyRow, column: &str) -> Result<u64, sqlx::Error> {
    let value: i64 = row.try_get(column)?;
    Ok(u64::try_from(value).unwrap_or(0))
}

fn decode_parts(text: &str) -> Result<Vec<Part>, sqlx::Error> {
    serde_json::from_str(text).map_err(|error| sqlx::Error::Decode(error.into()))
}

fn encode<T: serde::Serialize + ?Sized>(value: &T) -> Result<String, sqlx::Error> {
    serde_json::to_string(value).map_err(|error| sqlx::Error::Encode(error.into()))
}

/// The columns that number themselves; SQLite's `AUTOINCREMENT` never gives a number twice.
fn schema(dialect: Dialect) -> Vec<String> {
    let (numbered, text, content) = match dialect {
        // An integer key is the place of the row itself; any other key would be an extra index.
        Dialect::Sqlite => (
            "INTEGER PRIMARY KEY AUTOINCREMENT",
            "TEXT NOT NULL",
            "blob INTEGER PRIMARY KEY, content BLOB NOT NULL",
        ),
        // Prefixes are compared by their bytes, in any locale of the database.
        Dialect::Postgres => (
            "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
            "TEXT COLLATE \"C\" NOT NULL",
            "blob BIGINT PRIMARY KEY, content BYTEA NOT NULL",
        ),
    };
    vec![
        "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)".into(),
        format!(
            "CREATE TABLE IF NOT EXISTS uploads (id {numbered}, scope {text}, version {text}, \
             key {text}, used BIGINT NOT NULL, blocks TEXT, UNIQUE (scope, version, key))"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS parts (id {numbered}, upload BIGINT NOT NULL, block TEXT, \
             start BIGINT NOT NULL, size BIGINT, used BIGINT NOT NULL, digests TEXT, \
             inside BIGINT)"
        ),
        "CREATE INDEX IF NOT EXISTS parts_of_upload ON parts (upload)".into(),
        format!(
            "CREATE TABLE IF NOT EXISTS entries (id {numbered}, scope {text}, version {text}, \
             key {text}, size BIGINT NOT NULL, created BIGINT NOT NULL, used BIGINT NOT NULL, \
             parts TEXT NOT NULL, stored BIGINT, UNIQUE (scope, version, key))"
        ),
        "CREATE INDEX IF NOT EXISTS entries_by_use ON entries (used, id)".into(),
        "CREATE TABLE IF NOT EXISTS garbage (blob BIGINT PRIMARY KEY, since BIGINT NOT NULL)"
            .into(),
        format!("CREATE TABLE IF NOT EXISTS contents ({content})"),
    ]
}

/// The number of the schema above. A database of a later schema is refused.
const SCHEMA: &str = "3";

/// The statements that upgrade a database to the next version; missing tables exist by then.
const UPGRADES: [(&str, &[&str]); 2] = [
    (
        "1",
        &[
            "ALTER TABLE parts ADD COLUMN digests TEXT",
            "ALTER TABLE entries ADD COLUMN stored BIGINT",
        ],
    ),
    ("2", &["ALTER TABLE parts ADD COLUMN inside BIGINT"]),
];

/// The least upper bound of the keys that begin with `prefix`, in the order of code points, which
/// is that of the bytes of UTF-8.
fn prefix_upper_bound(prefix: &str) -> String {
    let mut rest = prefix.to_owned();
    while let Some(last) = rest.pop() {
        let next = match last {
            '\u{d7ff}' => Some('\u{e000}'),
            last => char::from_u32(last as u32 + 1),
        };
        if let Some(next) = next {
            rest.push(next);
            return rest;
        }
    }
    // No key is as long as this one.
    "\u{10ffff}".repeat(KEY_LIMIT + 1)
}

impl Catalog {
    /// Opens the database, and makes the tables if there are none.
    ///
    /// # Errors
    /// Fails if the database is unreachable, or has a later schema.
    pub async fn open(database: &Database) -> Result<Self, sqlx::Error> {
        sqlx::any::install_default_drivers();
        let options = || AnyPoolOptions::new().acquire_timeout(CONNECTION_WAIT);
        let catalog = match database {
            Database::Sqlite(path) => {
                let url = sqlite_url(path);
                // Readers do not wait, and each transaction waits for the disk.
                let pragmas = format!(
                    "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
                     PRAGMA busy_timeout = 10000; PRAGMA journal_size_limit = 67108864; \
                     PRAGMA wal_autocheckpoint = {LOG_PAGES}"
                );
                // This allows giving free pages back to the disk. It writes to the file, so only
                // one connection sets it.
                let first = format!(
                    "PRAGMA page_size = {PAGE}; PRAGMA auto_vacuum = INCREMENTAL; {pragmas}"
                );
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
                let dialect = Dialect::Sqlite;
                prepare(&write, &schema(dialect)).await?;
                Self {
                    read,
                    quick,
                    write,
                    dialect,
                }
            }
            Database::Postgres(PostgresUrl(url)) => {
                let pool = options().max_connections(CONNECTIONS).connect(url).await?;
                let dialect = Dialect::Postgres;
                prepare(&pool, &schema(dialect)).await?;
                Self {
                    read: pool.clone(),
                    quick: pool.clone(),
                    write: pool,
                    dialect,
                }
            }
        };
        let mut version = catalog.setting("schema", SCHEMA).await?;
        for (older, statements) in UPGRADES {
            let begin = UPGRADES.iter().position(|(of, _)| *of == version);
            let own = UPGRADES.iter().position(|(of, _)| *of == older);
            if begin.is_some() && begin <= own {
                let statements: Vec<String> = statements.iter().map(|one| (*one).into()).collect();
                prepare(&catalog.write, &statements).await?;
            }
        }
        if UPGRADES.iter().any(|(of, _)| *of == version) {
            catalog.drop_setting("schema").await?;
            version = catalog.setting("schema", SCHEMA).await?;
            if catalog.dialect == Dialect::Sqlite
                // This allows giving free pages back to the disk. The database has no contents yet,
                // so this is fast.
                && let Err(error) = catalog.write.execute("VACUUM").await
            {
                warn!(%error, "cannot shrink the database");
            }
        }
        if version != SCHEMA {
            let message = format!("the database is of version {version}, this service of {SCHEMA}");
            return Err(sqlx::Error::Configuration(message.into()));
        }
        Ok(catalog)
    }

    /// The setting called `name`; if there was none, it is set to `default`. All services that
    /// start at once get the same value.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn setting(&self, name: &str, default: &str) -> Result<String, sqlx::Error> {
        sqlx::query(
            "INSERT INTO settings (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING",
        )
        .bind(name)
        .bind(default)
        .execute(&self.write)
        .await?;
        let row = sqlx::query("SELECT value FROM settings WHERE name = $1")
            .bind(name)
            .fetch_one(&self.write)
            .await?;
        row.try_get("value")
    }

    /// Forgets the setting called `name`.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn drop_setting(&self, name: &str) -> Result<(), sqlx::Error> {
        sqlx::query("DELETE FROM settings WHERE name = $1")
            .bind(name)
            .execute(&self.write)
            .await?;
        Ok(())
    }

    /// The time of this store, in milliseconds: `begin` if it has none yet.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn time(&self, begin: u64) -> Result<u64, sqlx::Error> {
        let text = self.setting("time", &begin.to_string()).await?;
        Ok(text.parse().unwrap_or(begin))
    }

    /// Records that it is `now` by this store's clock, and returns the time of the service whose
    /// clock is ahead.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn record_time(&self, now: u64) -> Result<u64, StoreError> {
        let row = sqlx::query(
            "UPDATE settings SET value = CASE WHEN CAST(value AS BIGINT) < CAST($1 AS BIGINT) \
             THEN CAST(CAST($1 AS BIGINT) AS TEXT) ELSE value END WHERE name = 'time' \
             RETURNING value",
        )
        .bind(number(now))
        .fetch_optional(&self.write)
        .await?;
        let Some(row) = row else { return Ok(now) };
        let value: String = row.try_get("value")?;
        Ok(value.parse().unwrap_or(now))
    }

    /// Reserves `name` at `now`. A reservation that was not used since `abandoned` is given up.
    /// Times are in milliseconds by the store's clock, here and below.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] if the name is taken.
    pub async fn reserve(
        &self,
        name: &EntryName,
        now: u64,
        abandoned: u64,
    ) -> Result<u64, StoreError> {
        if let Some(upload) = insert_upload(&self.write, name, now).await? {
            return Ok(upload);
        }
        let mut transaction = self.write.begin().await?;
        let given_up = sqlx::query(
            "DELETE FROM uploads WHERE scope = $1 AND version = $2 AND key = $3 AND used < $4 \
             AND NOT EXISTS (SELECT 1 FROM parts WHERE upload = uploads.id AND parts.used >= $4) \
             RETURNING id",
        )
        .bind(name.scope.0.to_string())
        .bind(name.version.as_str())
        .bind(name.key.as_str())
        .bind(number(abandoned))
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(given_up) = given_up else {
            return Err(StoreError::AlreadyExists);
        };
        discard_parts_of(&mut transaction, unsigned(&given_up, "id")?, now).await?;
        let upload = insert_upload(&mut *transaction, name, now)
            .await?
            .ok_or(StoreError::AlreadyExists)?;
        transaction.commit().await?;
        Ok(upload)
    }

    /// The upload that was reserved under `name`.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] if there is none.
    pub async fn upload_of(&self, name: &EntryName) -> Result<u64, StoreError> {
        let row =
            sqlx::query("SELECT id FROM uploads WHERE scope = $1 AND version = $2 AND key = $3")
                .bind(name.scope.0.to_string())
                .bind(name.version.as_str())
                .bind(name.key.as_str())
                .fetch_optional(&self.read)
                .await?;
        Ok(unsigned(&row.ok_or(StoreError::NoSuchUpload)?, "id")?)
    }

    /// The name under which `upload` was reserved.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] if there is none.
    pub async fn name_of(&self, upload: u64) -> Result<EntryName, StoreError> {
        let row = sqlx::query("SELECT scope, version, key FROM uploads WHERE id = $1")
            .bind(number(upload))
            .fetch_optional(&self.read)
            .await?;
        Ok(entry_name(&row.ok_or(StoreError::NoSuchUpload)?)?)
    }

    /// Notes that a part of `upload` is about to be written.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] if there is none, [`StoreError::TooManyParts`].
    pub async fn begin_part(
        &self,
        upload: u64,
        block: Option<&str>,
        start: u64,
        now: u64,
    ) -> Result<BegunPart, StoreError> {
        let row = sqlx::query(
            "INSERT INTO parts (upload, block, start, used) \
             SELECT id, CAST($2 AS TEXT), CAST($3 AS BIGINT), CAST($4 AS BIGINT) \
             FROM uploads WHERE id = $1 RETURNING id, \
             (SELECT COUNT(*) FROM parts AS others WHERE others.upload = $1 \
             AND others.id < parts.id) AS others, \
             (SELECT COUNT(blocks) FROM uploads AS own WHERE own.id = $1) AS lists, \
             (SELECT CAST(COALESCE(SUM(others.size), 0) AS BIGINT) FROM parts AS others \
             WHERE others.upload = $1 AND others.id < parts.id \
             AND (COALESCE(others.block, '') <> COALESCE(parts.block, '') \
             OR others.start <> parts.start)) AS bytes",
        )
        .bind(number(upload))
        .bind(block)
        .bind(number(start))
        .bind(number(now))
        .fetch_optional(&self.write)
        .await?
        .ok_or(StoreError::NoSuchUpload)?;
        let (blob, others) = (unsigned(&row, "id")?, unsigned(&row, "others")?);
        if others >= PARTS_LIMIT {
            self.abandon_part(blob).await?;
            return Err(StoreError::TooManyParts);
        }
        Ok(BegunPart {
            blob,
            is_first: others == 0 && unsigned(&row, "lists")? == 0,
            others: unsigned(&row, "bytes")?,
        })
    }

    /// Notes that a part is still being written at `now`: neither it nor its upload is abandoned.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn heartbeat(&self, blob: u64, now: u64) -> Result<(), StoreError> {
        sqlx::query("UPDATE parts SET used = $2 WHERE id = $1")
            .bind(number(blob))
            .bind(number(now))
            .execute(&self.write)
            .await?;
        Ok(())
    }

    /// Records at `now` that a part of `upload` is written, and returns the bytes of the parts that
    /// it replaces.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] if the upload is gone by now.
    pub async fn finish_part(
        &self,
        upload: u64,
        part: &FinishedPart,
        now: u64,
    ) -> Result<u64, StoreError> {
        if part.replaces == Replaces::Nothing && part.inside.is_none() {
            // Most large uploads take this path, so it needs no transaction.
            record_finish(&self.write, part, now).await?;
            return Ok(0);
        }
        let mut transaction = self.write.begin().await?;
        if part.replaces == Replaces::All {
            sqlx::query("UPDATE uploads SET blocks = NULL WHERE id = $1")
                .bind(number(upload))
                .execute(&mut *transaction)
                .await?;
        }
        record_finish(&mut *transaction, part, now).await?;
        if let Some(content) = &part.inside {
            let content = [(part.blob, content.clone())];
            insert_contents(&mut transaction, &content).await?;
        }
        if part.replaces == Replaces::Nothing {
            transaction.commit().await?;
            return Ok(0);
        }
        let older = match part.replaces {
            Replaces::All => {
                "DELETE FROM parts WHERE upload = $1 AND id < $2 RETURNING id, size, inside"
            }
            Replaces::Same | Replaces::Nothing => {
                "DELETE FROM parts WHERE upload = $1 AND id < $2 AND size IS NOT NULL \
                 AND EXISTS (SELECT 1 FROM parts AS own WHERE own.id = $2 \
                 AND COALESCE(own.block, '') = COALESCE(parts.block, '') \
                 AND own.start = parts.start) RETURNING id, size, inside"
            }
        };
        let older = sqlx::query(older)
            .bind(number(upload))
            .bind(number(part.blob))
            .fetch_all(&mut *transaction)
            .await?;
        let mut replaced = 0;
        for row in older {
            let size: Option<i64> = row.try_get("size")?;
            replaced += size.map_or(0, |size| u64::try_from(size).unwrap_or(0));
            discard_part(&mut transaction, &row, now).await?;
        }
        transaction.commit().await?;
        Ok(replaced)
    }

    /// Gives a part up: its blob becomes garbage, whatever was written of it.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn abandon_part(&self, blob: u64) -> Result<(), StoreError> {
        let mut transaction = self.write.begin().await?;
        sqlx::query("DELETE FROM parts WHERE id = $1")
            .bind(number(blob))
            .execute(&mut *transaction)
            .await?;
        // The bytes of an interrupted part are not in the database.
        mark_garbage(&mut transaction, blob, 0).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Makes `blocks`, in this order, the content of `upload`, unless they have more than `limit`
    /// bytes.
    ///
    /// # Errors
    /// [`StoreError::NoSuchBlock`], [`StoreError::NoSuchUpload`], [`StoreError::TooLarge`].
    pub async fn join_blocks(
        &self,
        upload: u64,
        blocks: &[String],
        limit: u64,
        now: u64,
    ) -> Result<(), StoreError> {
        let mut transaction = self.write.begin().await?;
        let updated = sqlx::query("UPDATE uploads SET blocks = $2, used = $3 WHERE id = $1")
            .bind(number(upload))
            .bind(encode(blocks)?)
            .bind(number(now))
            .execute(&mut *transaction)
            .await?;
        if updated.rows_affected() == 0 {
            return Err(StoreError::NoSuchUpload);
        }
        let rows = sqlx::query(
            "SELECT id, block, start, size, digests, inside FROM parts WHERE upload = $1",
        )
        .bind(number(upload))
        .fetch_all(&mut *transaction)
        .await?;
        let received: Vec<ReceivedPart> = rows
            .iter()
            .filter_map(|row| received(row).transpose())
            .collect::<Result<_, _>>()?;
        if parts::total(&parts::listed(&received, blocks)?) > limit {
            return Err(StoreError::TooLarge { limit });
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Makes uploads entries, in this order. Parts that are being written since before `abandoned`
    /// are given up. When this returns, all commits that succeeded are on the disk.
    ///
    /// # Errors
    /// Each result may be [`StoreError::Busy`] if the upload is still being written,
    /// [`StoreError::SizeMismatch`], [`StoreError::NoSuchUpload`] or [`StoreError::AlreadyExists`].
    /// An error of the database fails all of them.
    pub async fn commit(
        &self,
        commits: &[Commit],
    ) -> Result<Vec<Result<CommittedUpload, StoreError>>, sqlx::Error> {
        let mut connection = self.write.acquire().await?;
        let mut transaction = match self.dialect {
            Dialect::Postgres => connection.begin().await?,
            // A transaction that reads first cannot write any more once another program has
            // written.
            Dialect::Sqlite => connection.begin_with("BEGIN IMMEDIATE").await?,
        };
        if let [
            commit @ Commit {
                what: CommitSource::Upload(upload),
                ..
            },
        ] = commits
        {
            let committed = match commit_upload(&mut transaction, *upload, commit).await {
                Ok(committed) => transaction.commit().await.map(|()| Ok(committed))?,
                Err(error) => {
                    transaction.rollback().await?;
                    Err(error)
                }
            };
            return Ok(vec![committed]);
        }
        let mut unwritten = self.commit_unwritten(&mut transaction, commits).await?;
        let mut done = Vec::with_capacity(commits.len());
        for commit in commits {
            done.push(match commit.what {
                CommitSource::Unwritten(..) => {
                    unwritten.next().unwrap_or(Err(StoreError::AlreadyExists))
                }
                CommitSource::Upload(upload) => {
                    let mut own = transaction.begin().await?;
                    match commit_upload(&mut own, upload, commit).await {
                        Ok(committed) => {
                            own.commit().await?;
                            Ok(committed)
                        }
                        Err(StoreError::Backend(error)) => match error.downcast() {
                            Ok(error) => return Err(*error),
                            Err(error) => Err(StoreError::Backend(error)),
                        },
                        Err(error) => {
                            own.rollback().await?;
                            Err(error)
                        }
                    }
                }
            });
        }
        transaction.commit().await?;
        Ok(done)
    }

    /// Commits uploads that the database does not have, in few statements.
    async fn commit_unwritten(
        &self,
        transaction: &mut Transaction<'_, Any>,
        commits: &[Commit],
    ) -> Result<std::vec::IntoIter<Result<CommittedUpload, StoreError>>, sqlx::Error> {
        let own: Vec<(&Commit, &EntryName, Option<&SmallPart>)> = commits
            .iter()
            .filter_map(|commit| match &commit.what {
                CommitSource::Unwritten(name, small) => Some((commit, name, small.as_ref())),
                CommitSource::Upload(_) => None,
            })
            .collect();
        if own.is_empty() {
            return Ok(Vec::new().into_iter());
        }
        // These are the numbers that the table itself would assign, so no query for each is needed.
        let last = sqlx::query("SELECT seq FROM sqlite_sequence WHERE name = 'entries'")
            .fetch_optional(&mut **transaction)
            .await?
            .map_or(Ok(0), |row| unsigned(&row, "seq"))?;
        let contents: Vec<(u64, Bytes)> = own
            .iter()
            .filter_map(|(_, _, small)| small.map(|small| (small.blob, small.bytes.clone())))
            .collect();
        insert_contents(transaction, &contents).await?;
        let committed: Vec<CommittedUpload> = (last + 1..)
            .zip(&own)
            .map(|(id, (commit, name, small))| CommittedUpload {
                entry: Entry {
                    id,
                    name: (*name).clone(),
                    size: commit.size,
                    created: commit.created,
                },
                parts: small.iter().map(|small| small.part()).collect(),
                upload_bytes: 0,
            })
            .collect();
        let mut written = 0;
        let rows: Vec<(&CommittedUpload, u64)> = committed
            .iter()
            .zip(own.iter().map(|(commit, _, _)| commit.moments.now))
            .collect();
        for rows in in_steps(&rows) {
            let query = format!(
                "INSERT INTO entries (id, scope, version, key, size, created, used, parts, stored) \
                 VALUES {} ON CONFLICT (scope, version, key) DO NOTHING",
                placeholders(rows.len(), 9)
            );
            let mut query = sqlx::query(sqlx::AssertSqlSafe(query));
            for (committed, now) in rows {
                let Entry {
                    id,
                    name,
                    size,
                    created,
                } = &committed.entry;
                query = query
                    .bind(number(*id))
                    .bind(name.scope.0.to_string())
                    .bind(name.version.clone())
                    .bind(name.key.clone())
                    .bind(number(*size))
                    .bind(number(*created))
                    .bind(number(*now))
                    .bind(encode(&committed.parts)?)
                    .bind(number(parts::stored(&committed.parts)));
            }
            written += query.execute(&mut **transaction).await?.rows_affected();
        }
        if written == committed.len() as u64 {
            return Ok(committed
                .into_iter()
                .map(Ok)
                .collect::<Vec<_>>()
                .into_iter());
        }
        // Another program that writes to this database has taken the name.
        let mut done = Vec::with_capacity(committed.len());
        for committed in committed {
            let there = sqlx::query("SELECT 1 FROM entries WHERE id = $1")
                .bind(number(committed.entry.id))
                .fetch_optional(&mut **transaction)
                .await?;
            done.push(match there {
                Some(_) => Ok(committed),
                None => {
                    for part in &committed.parts {
                        discard_blob(transaction, part.blob, part.inside, 0).await?;
                    }
                    Err(StoreError::AlreadyExists)
                }
            });
        }
        Ok(done.into_iter())
    }

    /// Whether these names can be reserved.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn name_statuses(&self, names: &[EntryName]) -> Result<Vec<NameStatus>, sqlx::Error> {
        let mut taken = vec![NameStatus::Free; names.len()];
        let mut begin = 0;
        for names in in_steps(names) {
            let queries: Vec<String> = (0..names.len())
                .map(|own| {
                    let of = |table: &str, kind: usize| {
                        format!(
                            "SELECT {} AS own, {kind} AS kind FROM {table} WHERE scope = ${} \
                             AND version = ${} AND key = ${}",
                            own,
                            own * 3 + 1,
                            own * 3 + 2,
                            own * 3 + 3
                        )
                    };
                    format!("{} UNION ALL {}", of("uploads", 0), of("entries", 1))
                })
                .collect();
            let mut query = sqlx::query(sqlx::AssertSqlSafe(queries.join(" UNION ALL ")));
            for name in names {
                query = query
                    .bind(name.scope.0.to_string())
                    .bind(name.version.clone())
                    .bind(name.key.clone());
            }
            for row in query.fetch_all(&self.quick).await? {
                let own = begin + usize::try_from(unsigned(&row, "own")?).unwrap_or(usize::MAX);
                let by = match unsigned(&row, "kind")? {
                    0 => NameStatus::Reserved,
                    _ => NameStatus::Committed,
                };
                if let Some(taken) = taken.get_mut(own)
                    && *taken != NameStatus::Committed
                {
                    *taken = by;
                }
            }
            begin += names.len();
        }
        Ok(taken)
    }

    /// The bytes of these blobs, as far as they are in the database, in any order.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn contents(&self, blobs: &[u64]) -> Result<Vec<(u64, Bytes)>, sqlx::Error> {
        let mut contents = Vec::with_capacity(blobs.len());
        for blobs in in_steps(blobs) {
            let query = format!(
                "SELECT blob, content FROM contents WHERE blob IN {}",
                placeholders(1, blobs.len())
            );
            let mut query = sqlx::query(sqlx::AssertSqlSafe(query));
            for blob in blobs {
                query = query.bind(number(*blob));
            }
            for row in query.fetch_all(&self.quick).await? {
                let content: &[u8] = row.try_get("content")?;
                contents.push((unsigned(&row, "blob")?, Bytes::copy_from_slice(content)));
            }
        }
        Ok(contents)
    }

    /// Takes `count` numbers of uploads and as many of blobs out of those that the tables assign,
    /// and returns the first of each. They are never given again.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn take_numbers(&self, count: u64) -> Result<(u64, u64), sqlx::Error> {
        let mut connection = self.write.acquire().await?;
        let mut transaction = connection.begin().await?;
        let mut first = [0, 0];
        for (table, first) in ["uploads", "parts"].into_iter().zip(&mut first) {
            let row = sqlx::query(
                "UPDATE sqlite_sequence SET seq = seq + $2 WHERE name = $1 RETURNING seq",
            )
            .bind(table)
            .bind(number(count))
            .fetch_optional(&mut *transaction)
            .await?;
            let last = match row {
                Some(row) => unsigned(&row, "seq")?,
                None => {
                    sqlx::query("INSERT INTO sqlite_sequence (name, seq) VALUES ($1, $2)")
                        .bind(table)
                        .bind(number(count))
                        .execute(&mut *transaction)
                        .await?;
                    count
                }
            };
            *first = last.saturating_sub(count) + 1;
        }
        transaction.commit().await?;
        Ok((first[0], first[1]))
    }

    /// Persists uploads that the database does not have.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn persist(&self, uploads: &[Unwritten]) -> Result<(), StoreError> {
        let mut transaction = self.write.begin().await?;
        for Unwritten {
            upload,
            name,
            used,
            content,
        } in uploads
        {
            sqlx::query(
                "INSERT INTO uploads (id, scope, version, key, used) VALUES ($1, $2, $3, $4, $5)",
            )
            .bind(number(*upload))
            .bind(name.scope.0.to_string())
            .bind(name.version.clone())
            .bind(name.key.clone())
            .bind(number(*used))
            .execute(&mut *transaction)
            .await?;
            let Some(small) = content else { continue };
            sqlx::query(
                "INSERT INTO parts (id, upload, start, size, used, digests, inside) \
                 VALUES ($1, $2, 0, $3, $4, $5, 1)",
            )
            .bind(number(small.blob))
            .bind(number(*upload))
            .bind(number(small.bytes.len() as u64))
            .bind(number(*used))
            .bind(small.digests.encode())
            .execute(&mut *transaction)
            .await?;
            insert_contents(&mut transaction, &[(small.blob, small.bytes.clone())]).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Writes SQLite's log back into the database, while others write to the log.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn checkpoint(&self) -> Result<(), sqlx::Error> {
        if self.dialect == Dialect::Sqlite {
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
        if self.dialect == Dialect::Sqlite {
            let mut connection = self.write.acquire().await?;
            connection.execute("PRAGMA incremental_vacuum").await?;
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").await?;
        }
        Ok(())
    }

    /// The entry that `query` asks for: scope by scope, key by key, the one with exactly that key,
    /// or else the newest whose key begins with it (GitHub's documentation of dependency caching).
    ///
    /// # Errors
    /// An error of the database.
    pub async fn find(&self, query: &Query<'_>) -> Result<Option<Entry>, sqlx::Error> {
        for scope in query.scopes {
            for key in query.keys {
                let found = sqlx::query(
                    "SELECT id, scope, version, key, size, created FROM entries \
                     WHERE scope = $1 AND version = $2 AND key >= $3 AND key < $4 \
                     ORDER BY CASE WHEN key = $3 THEN 0 ELSE 1 END, id DESC LIMIT 1",
                )
                .bind(scope.0.to_string())
                .bind(query.version)
                .bind(*key)
                .bind(prefix_upper_bound(key))
                .fetch_optional(&self.read)
                .await?;
                if let Some(row) = found {
                    return Ok(Some(Entry {
                        id: unsigned(&row, "id")?,
                        name: entry_name(&row)?,
                        size: unsigned(&row, "size")?,
                        created: unsigned(&row, "created")?,
                    }));
                }
            }
        }
        Ok(None)
    }

    /// The parts of an entry, or `None` if it is gone.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn parts_of(&self, entry: u64) -> Result<Option<Vec<Part>>, sqlx::Error> {
        let row = sqlx::query("SELECT parts FROM entries WHERE id = $1")
            .bind(number(entry))
            .fetch_optional(&self.read)
            .await?;
        row.map(|row| decode_parts(row.try_get("parts")?))
            .transpose()
    }

    /// Removes an entry whose content is missing.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn remove_entry(&self, entry: u64, now: u64) -> Result<(), StoreError> {
        let mut transaction = self.write.begin().await?;
        let row = sqlx::query("DELETE FROM entries WHERE id = $1 RETURNING size, parts")
            .bind(number(entry))
            .fetch_optional(&mut *transaction)
            .await?;
        if let Some(row) = row {
            discard_entry(&mut transaction, &row, now).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Notes when entries were last used.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn record_use(&self, used: &[(u64, u64)]) -> Result<(), StoreError> {
        let mut transaction = self.write.begin().await?;
        for (entry, when) in used {
            sqlx::query("UPDATE entries SET used = $2 WHERE id = $1 AND used < $2")
                .bind(number(*entry))
                .bind(number(*when))
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        Ok(())
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

    /// Removes entries that were not used since `before`.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn expire(&self, before: u64, now: u64) -> Result<Removed, StoreError> {
        let mut swept = Removed::default();
        loop {
            let mut transaction = self.write.begin().await?;
            let rows = sqlx::query(
                "DELETE FROM entries WHERE id IN \
                 (SELECT id FROM entries WHERE used < $1 ORDER BY used, id LIMIT $2) \
                 RETURNING size, parts",
            )
            .bind(number(before))
            .bind(SWEEP_ROWS)
            .fetch_all(&mut *transaction)
            .await?;
            for row in &rows {
                swept.count += 1;
                swept.bytes += discard_entry(&mut transaction, row, now).await?;
            }
            transaction.commit().await?;
            if rows.is_empty() {
                return Ok(swept);
            }
        }
    }

    /// The storage that the entries of each repository take, in bytes.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn repositories(&self) -> Result<Vec<(String, u64)>, sqlx::Error> {
        let repository = self.dialect.repository();
        let query = format!(
            "SELECT repository, CAST(SUM(stored) AS BIGINT) AS bytes FROM \
             (SELECT {repository} AS repository, {STORED} AS stored FROM entries) AS own \
             GROUP BY repository ORDER BY repository"
        );
        let rows = sqlx::query(sqlx::AssertSqlSafe(query))
            .fetch_all(&self.read)
            .await?;
        rows.iter()
            .map(|row| Ok((row.try_get("repository")?, unsigned(row, "bytes")?)))
            .collect()
    }

    /// Removes the least recently used entries of `repository`, until at least `bytes` are gone.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn evict(
        &self,
        repository: &str,
        bytes: u64,
        now: u64,
    ) -> Result<Removed, StoreError> {
        let oldest = format!(
            "SELECT id, {STORED} AS stored FROM entries WHERE {} = $1 ORDER BY used, id LIMIT $2",
            self.dialect.repository()
        );
        let mut swept = Removed::default();
        while swept.bytes < bytes {
            let mut transaction = self.write.begin().await?;
            let oldest = sqlx::query(sqlx::AssertSqlSafe(oldest.clone()))
                .bind(repository)
                .bind(SWEEP_ROWS)
                .fetch_all(&mut *transaction)
                .await?;
            if oldest.is_empty() {
                return Ok(swept);
            }
            for row in &oldest {
                if swept.bytes >= bytes {
                    break;
                }
                let gone =
                    sqlx::query("DELETE FROM entries WHERE id = $1 RETURNING stored, size, parts")
                        .bind(number(unsigned(row, "id")?))
                        .fetch_optional(&mut *transaction)
                        .await?;
                // Another replica that sweeps as well may have removed it already.
                swept.bytes += unsigned(row, "stored")?;
                if let Some(gone) = gone {
                    swept.count += 1;
                    discard_entry(&mut transaction, &gone, now).await?;
                }
            }
            transaction.commit().await?;
        }
        Ok(swept)
    }

    /// Removes uploads that were not used since `abandoned`, and parts without an upload.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn abandon(&self, abandoned: u64, now: u64) -> Result<u64, StoreError> {
        let mut count = 0;
        let mut transaction = self.write.begin().await?;
        let uploads = sqlx::query(
            "DELETE FROM uploads WHERE used < $1 AND NOT EXISTS \
             (SELECT 1 FROM parts WHERE upload = uploads.id AND parts.used >= $1) RETURNING id",
        )
        .bind(number(abandoned))
        .fetch_all(&mut *transaction)
        .await?;
        for row in uploads {
            count += 1;
            discard_parts_of(&mut transaction, unsigned(&row, "id")?, now).await?;
        }
        // These parts were begun at the moment when their upload was committed, and their writer
        // was killed then.
        let parts = sqlx::query(
            "DELETE FROM parts WHERE used < $1 AND upload NOT IN (SELECT id FROM uploads) \
             RETURNING id, inside",
        )
        .bind(number(abandoned))
        .fetch_all(&mut *transaction)
        .await?;
        for row in parts {
            discard_part(&mut transaction, &row, now).await?;
        }
        transaction.commit().await?;
        Ok(count)
    }

    /// Gives up all parts that are being written: their process has ended, so nobody reads them.
    /// Call this only for a database that no other service uses.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn drop_unfinished(&self) -> Result<u64, StoreError> {
        let mut transaction = self.write.begin().await?;
        let parts = sqlx::query("DELETE FROM parts WHERE size IS NULL RETURNING id")
            .fetch_all(&mut *transaction)
            .await?;
        for row in &parts {
            mark_garbage(&mut transaction, unsigned(row, "id")?, 0).await?;
        }
        transaction.commit().await?;
        Ok(parts.len() as u64)
    }

    /// Some of the blobs that are garbage since `until` or before.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn garbage(&self, until: u64) -> Result<Vec<u64>, sqlx::Error> {
        let rows =
            sqlx::query("SELECT blob FROM garbage WHERE since <= $1 ORDER BY since LIMIT $2")
                .bind(number(until))
                .bind(SWEEP_ROWS)
                .fetch_all(&self.read)
                .await?;
        rows.iter().map(|row| unsigned(row, "blob")).collect()
    }

    /// Forgets blobs that were deleted.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn forget_garbage(&self, blobs: &[u64]) -> Result<(), StoreError> {
        let mut transaction = self.write.begin().await?;
        for blob in blobs {
            sqlx::query("DELETE FROM garbage WHERE blob = $1")
                .bind(number(*blob))
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// The database's error if it does not.
    pub async fn ping(&self) -> Result<(), sqlx::Error> {
        sqlx::query("SELECT 1").execute(&self.read).await?;
        Ok(())
    }

    /// Closes the connections; SQLite then leaves one file.
    pub async fn close(&self) {
        self.read.close().await;
        self.quick.close().await;
        self.write.close().await;
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        Self::Backend(error.into())
    }
}

/// The driver takes all behind the colon for the path, once it is decoded. So no part of it may
/// look like a part of a URL: a drive, a server, a first folder that would be the host.
fn sqlite_url(path: &Path) -> String {
    let path = percent_encode(path.as_os_str().as_encoded_bytes(), NON_ALPHANUMERIC);
    format!("sqlite:{path}?mode=rwc")
}

async fn prepare(pool: &AnyPool, schema: &[String]) -> Result<(), sqlx::Error> {
    for statement in schema {
        let statement = sqlx::AssertSqlSafe(statement.clone());
        match pool.execute(statement).await {
            // Another replica makes the same table in this moment: PostgreSQL finds it when it has
            // begun to make it, or when it enters its name or its type's.
            Err(sqlx::Error::Database(error))
                if error.is_unique_violation()
                    || matches!(error.code().as_deref(), Some("42P07" | "42710" | "42701"))
                    // SQLite has no specific code for an existing column.
                    || error.message().contains("duplicate column name") => {}
            Err(error) => return Err(error),
            Ok(_) => {}
        }
    }
    Ok(())
}

async fn record_finish(
    executor: impl Executor<'_, Database = Any>,
    part: &FinishedPart,
    now: u64,
) -> Result<(), StoreError> {
    let ended = sqlx::query(FINISH_PART)
        .bind(number(part.blob))
        .bind(number(part.content.size))
        .bind(number(now))
        .bind(part.content.digests.encode())
        .bind(i64::from(part.inside.is_some()))
        .execute(executor)
        .await?;
    match ended.rows_affected() {
        0 => Err(StoreError::NoSuchUpload),
        _ => Ok(()),
    }
}

async fn insert_upload(
    executor: impl Executor<'_, Database = Any>,
    name: &EntryName,
    now: u64,
) -> Result<Option<u64>, sqlx::Error> {
    let row = sqlx::query(
        "INSERT INTO uploads (scope, version, key, used) \
         SELECT CAST($1 AS TEXT), CAST($2 AS TEXT), CAST($3 AS TEXT), CAST($4 AS BIGINT) \
         WHERE NOT EXISTS \
         (SELECT 1 FROM entries WHERE scope = $1 AND version = $2 AND key = $3) \
         ON CONFLICT (scope, version, key) DO NOTHING RETURNING id",
    )
    .bind(name.scope.0.to_string())
    .bind(name.version.clone())
    .bind(name.key.clone())
    .bind(number(now))
    .fetch_optional(executor)
    .await?;
    row.map(|row| unsigned(&row, "id")).transpose()
}

fn entry_name(row: &AnyRow) -> Result<EntryName, sqlx::Error> {
    let scope: &str = row.try_get("scope")?;
    Ok(EntryName {
        scope: scope.into(),
        version: row.try_get("version")?,
        key: row.try_get("key")?,
    })
}

/// A part as it was received, or `None` if it is still being written.
fn received(row: &AnyRow) -> Result<Option<ReceivedPart>, sqlx::Error> {
    let size: Option<i64> = row.try_get("size")?;
    let Some(size) = size else { return Ok(None) };
    Ok(Some(ReceivedPart {
        blob: unsigned(row, "id")?,
        block: row.try_get("block")?,
        start: unsigned(row, "start")?,
        size: u64::try_from(size).unwrap_or(0),
        digests: digests(row)?,
        inside: is_inside(row)?,
    }))
}

/// Whether the bytes of a part are in the database. Older services have no such column.
fn is_inside(row: &AnyRow) -> Result<bool, sqlx::Error> {
    let inside: Option<i64> = row.try_get("inside")?;
    Ok(inside.is_some_and(|inside| inside != 0))
}

/// The digests of a part; none if an older service wrote it without digests.
fn digests(row: &AnyRow) -> Result<Digests, sqlx::Error> {
    let text: Option<String> = row.try_get("digests")?;
    let unreadable = || sqlx::Error::Decode("unreadable digests".into());
    text.map_or(Ok(Digests::default()), |text| {
        Digests::decode(&text).ok_or_else(unreadable)
    })
}

async fn mark_garbage(
    transaction: &mut Transaction<'_, Any>,
    blob: u64,
    now: u64,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO garbage (blob, since) VALUES ($1, $2) ON CONFLICT (blob) DO NOTHING")
        .bind(number(blob))
        .bind(number(now))
        .execute(&mut **transaction)
        .await?;
    Ok(())
}

/// Removes a blob: its bytes at once if they are in the database, since each read of them is a
/// single statement.
async fn discard_blob(
    transaction: &mut Transaction<'_, Any>,
    blob: u64,
    inside: bool,
    now: u64,
) -> Result<(), sqlx::Error> {
    if !inside {
        return mark_garbage(transaction, blob, now).await;
    }
    sqlx::query("DELETE FROM contents WHERE blob = $1")
        .bind(number(blob))
        .execute(&mut **transaction)
        .await?;
    Ok(())
}

/// Removes the blob of a part's row.
async fn discard_part(
    transaction: &mut Transaction<'_, Any>,
    row: &AnyRow,
    now: u64,
) -> Result<(), sqlx::Error> {
    discard_blob(transaction, unsigned(row, "id")?, is_inside(row)?, now).await
}

async fn discard_parts_of(
    transaction: &mut Transaction<'_, Any>,
    upload: u64,
    now: u64,
) -> Result<(), sqlx::Error> {
    let parts = sqlx::query("DELETE FROM parts WHERE upload = $1 RETURNING id, inside")
        .bind(number(upload))
        .fetch_all(&mut **transaction)
        .await?;
    for row in parts {
        discard_part(transaction, &row, now).await?;
    }
    Ok(())
}

async fn discard_entry(
    transaction: &mut Transaction<'_, Any>,
    row: &AnyRow,
    now: u64,
) -> Result<u64, sqlx::Error> {
    for part in decode_parts(row.try_get("parts")?)? {
        discard_blob(transaction, part.blob, part.inside, now).await?;
    }
    unsigned(row, "size")
}

async fn insert_contents(
    transaction: &mut Transaction<'_, Any>,
    contents: &[(u64, Bytes)],
) -> Result<(), sqlx::Error> {
    for contents in in_steps(contents) {
        let query = format!(
            "INSERT INTO contents (blob, content) VALUES {}",
            placeholders(contents.len(), 2)
        );
        let mut query = sqlx::query(sqlx::AssertSqlSafe(query));
        for (blob, content) in contents {
            query = query.bind(number(*blob)).bind(&content[..]);
        }
        query.execute(&mut **transaction).await?;
    }
    Ok(())
}

/// Makes an upload of the database's an entry.
async fn commit_upload(
    transaction: &mut Transaction<'_, Any>,
    upload: u64,
    &Commit {
        size,
        created,
        moments: Moments { now, abandoned },
        ..
    }: &Commit,
) -> Result<CommittedUpload, StoreError> {
    // If two commits run at once, the second finds no upload from here on.
    let row =
        sqlx::query("DELETE FROM uploads WHERE id = $1 RETURNING scope, version, key, blocks")
            .bind(number(upload))
            .fetch_optional(&mut **transaction)
            .await?;
    let row = row.ok_or(StoreError::NoSuchUpload)?;
    let name = entry_name(&row)?;
    let blocks: Option<String> = row.try_get("blocks")?;
    let blocks: Option<Vec<String>> = blocks
        .map(|text| serde_json::from_str(&text))
        .transpose()
        .map_err(|error| sqlx::Error::Decode(error.into()))?;
    let rows = sqlx::query(
        "DELETE FROM parts WHERE upload = $1 \
         RETURNING id, block, start, size, used, digests, inside",
    )
    .bind(number(upload))
    .fetch_all(&mut **transaction)
    .await?;
    let mut known = Vec::with_capacity(rows.len());
    for row in &rows {
        match received(row)? {
            Some(part) => known.push(part),
            None if unsigned(row, "used")? < abandoned => {}
            None => return Err(StoreError::Busy),
        }
    }
    let parts = parts::content(&known, blocks.as_deref(), size)?;
    let row = sqlx::query(
        "INSERT INTO entries (scope, version, key, size, created, used, parts, stored) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (scope, version, key) DO NOTHING \
         RETURNING id",
    )
    .bind(name.scope.0.to_string())
    .bind(name.version.as_str())
    .bind(name.key.as_str())
    .bind(number(size))
    .bind(number(created))
    .bind(number(now))
    .bind(encode(&parts)?)
    .bind(number(parts::stored(&parts)))
    .fetch_optional(&mut **transaction)
    .await?
    .ok_or(StoreError::AlreadyExists)?;
    for unused in &rows {
        let blob = unsigned(unused, "id")?;
        if !parts.iter().any(|part| part.blob == blob) {
            discard_part(transaction, unused, now).await?;
        }
    }
    let entry = Entry {
        id: unsigned(&row, "id")?,
        name,
        size,
        created,
    };
    let upload_bytes = known.iter().fold(0u64, |upload_bytes, part| {
        upload_bytes.saturating_add(part.size)
    });
    Ok(CommittedUpload {
        entry,
        parts,
        upload_bytes,
    })
}

/// `all` in slices of as many as a statement takes.
fn in_steps<T>(mut all: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = ROWS.into_iter().find(|size| *size <= all.len())?;
        let (step, rest) = all.split_at(size);
        all = rest;
        Some(step)
    })
}

/// The placeholders of `rows` rows with `columns` columns.
fn placeholders(rows: usize, columns: usize) -> String {
    let row = |row: usize| {
        let own: Vec<String> = (1..=columns)
            .map(|column| format!("${}", row * columns + column))
            .collect();
        format!("({})", own.join(", "))
    };
    (0..rows).map(row).collect::<Vec<_>>().join(", ")
}
