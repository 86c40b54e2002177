//! What is known of entries and uploads, in a database: SQLite for one service alone, PostgreSQL
//! for several that share a storage.
//!
//! ```text
//! settings   what the replicas have in common: the store's name, the key of signed URLs
//! uploads    reserved names
//! parts      what was received for them; size is NULL while it is being written
//! entries    what was committed, with the list of its parts
//! garbage    blobs that nothing names any more and that are to be deleted
//! ```
//!
//! A blob has a row before it has a byte, and until it is deleted: whenever a process is killed,
//! no blob is left that nobody knows of. Committing is one transaction, so an entry is there as a
//! whole or not at all.
//!
//! The statements are the same for both databases, but for the columns that number themselves.

use std::path::{Path, PathBuf};
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use sqlx::any::{AnyPoolOptions, AnyRow};
use sqlx::{Any, AnyPool, Executor, Row, Transaction};

use crate::service::parts::{self, Part, Received};
use crate::service::store::{Entry, EntryName, KEY_LIMIT, Query, StoreError};

/// How long a request waits for a connection to the database.
const CONNECTION_WAIT: Duration = Duration::from_secs(30);

/// Connections to PostgreSQL, and those to SQLite that only read.
const CONNECTIONS: u32 = 8;

/// How many rows one transaction of the sweep deletes.
const SWEEP_ROWS: i64 = 500;

/// Where the database is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Database {
    /// A file of SQLite's.
    Sqlite(PathBuf),
    /// PostgreSQL at this URL, which may have a password in it.
    Postgres(PostgresUrl),
}

/// A URL with a password, shown to nobody who prints it by accident.
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
    /// The same as `read` in PostgreSQL. SQLite has one writer at a time, and it is better to wait
    /// for it here than in the file's lock.
    write: AnyPool,
}

/// What the store holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Committed entries.
    pub entries: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// Reserved uploads.
    pub uploads: u64,
    /// What was received for those, in bytes.
    pub upload_bytes: u64,
}

/// A part that is about to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BegunPart {
    /// The number of its blob.
    pub blob: u64,
    /// Whether its upload has no other so far, and no list of blocks.
    pub is_first: bool,
}

/// A part of an upload that was committed or given up has no upload any more.
const END_PART: &str = "UPDATE parts SET size = $2, used = $3 WHERE id = $1 \
                        AND EXISTS (SELECT 1 FROM uploads WHERE id = parts.upload)";

/// What one sweep of a kind took away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
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
fn schema(numbered: &str, text: &str) -> Vec<String> {
    vec![
        "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)".into(),
        format!(
            "CREATE TABLE IF NOT EXISTS uploads (id {numbered}, scope {text}, version {text}, \
             key {text}, used BIGINT NOT NULL, blocks TEXT, UNIQUE (scope, version, key))"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS parts (id {numbered}, upload BIGINT NOT NULL, block TEXT, \
             start BIGINT NOT NULL, size BIGINT, used BIGINT NOT NULL)"
        ),
        "CREATE INDEX IF NOT EXISTS parts_of_upload ON parts (upload)".into(),
        format!(
            "CREATE TABLE IF NOT EXISTS entries (id {numbered}, scope {text}, version {text}, \
             key {text}, size BIGINT NOT NULL, created BIGINT NOT NULL, used BIGINT NOT NULL, \
             parts TEXT NOT NULL, UNIQUE (scope, version, key))"
        ),
        "CREATE INDEX IF NOT EXISTS entries_by_use ON entries (used, id)".into(),
        "CREATE TABLE IF NOT EXISTS garbage (blob BIGINT PRIMARY KEY, since BIGINT NOT NULL)"
            .into(),
    ]
}

/// The number of the schema above. A database of a later one is left alone.
const SCHEMA: &str = "1";

/// A text that is greater than all keys that begin with `prefix` and not greater than any that is
/// behind those, in the order of code points, which is that of the bytes of UTF-8.
fn behind(prefix: &str) -> String {
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
    // Nothing is behind those but what is longer than a key may be.
    "\u{10ffff}".repeat(KEY_LIMIT + 1)
}

impl Catalog {
    /// Opens the database, and makes the tables where there are none.
    ///
    /// # Errors
    /// Where it cannot be reached, or is of a later version.
    pub async fn open(database: &Database) -> Result<Self, sqlx::Error> {
        sqlx::any::install_default_drivers();
        let options = || AnyPoolOptions::new().acquire_timeout(CONNECTION_WAIT);
        let catalog = match database {
            Database::Sqlite(path) => {
                let url = sqlite_url(path);
                // Committed transactions are not lost when the process is killed, and the last of
                // them may be when the machine is.
                let pragmas = "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; \
                               PRAGMA busy_timeout = 10000; PRAGMA journal_size_limit = 67108864";
                let open = |connections| {
                    options()
                        .max_connections(connections)
                        .after_connect(move |connection, _| {
                            Box::pin(async move {
                                connection.execute(pragmas).await?;
                                Ok(())
                            })
                        })
                        .connect(&url)
                };
                let write = open(1).await?;
                let read = open(CONNECTIONS).await?;
                let numbered = "INTEGER PRIMARY KEY AUTOINCREMENT";
                prepare(&write, &schema(numbered, "TEXT NOT NULL")).await?;
                Self { read, write }
            }
            Database::Postgres(PostgresUrl(url)) => {
                let pool = options().max_connections(CONNECTIONS).connect(url).await?;
                let numbered = "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY";
                // Prefixes are compared by their bytes, whatever the database's language is.
                let schema = schema(numbered, "TEXT COLLATE \"C\" NOT NULL");
                prepare(&pool, &schema).await?;
                let (read, write) = (pool.clone(), pool);
                Self { read, write }
            }
        };
        let version = catalog.setting("schema", SCHEMA).await?;
        if version != SCHEMA {
            let message = format!("the database is of version {version}, this service of {SCHEMA}");
            return Err(sqlx::Error::Configuration(message.into()));
        }
        Ok(catalog)
    }

    /// The setting called `name`, which is `default` where there was none: of services that start
    /// at once, all get the same.
    ///
    /// # Errors
    /// The database's.
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

    /// Reserves `name` at `now`. A reservation that was not used since `abandoned` is given up.
    /// Times are in milliseconds since 1970, here and below.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] where the name is taken.
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
        let upload = insert_upload(&mut *transaction, name, now).await?;
        let upload = upload.ok_or(StoreError::AlreadyExists)?;
        transaction.commit().await?;
        Ok(upload)
    }

    /// The upload that was reserved under `name`.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] where there is none.
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
    /// [`StoreError::NoSuchUpload`] where there is none.
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
    /// [`StoreError::NoSuchUpload`] where there is none.
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
             AND others.id < parts.id) + \
             (SELECT COUNT(blocks) FROM uploads AS own WHERE own.id = $1) AS others",
        )
        .bind(number(upload))
        .bind(block)
        .bind(number(start))
        .bind(number(now))
        .fetch_optional(&self.write)
        .await?;
        let row = row.ok_or(StoreError::NoSuchUpload)?;
        Ok(BegunPart {
            blob: unsigned(&row, "id")?,
            is_first: unsigned(&row, "others")? == 0,
        })
    }

    /// Notes that a part is still being written at `now`: neither it nor its upload is abandoned.
    ///
    /// # Errors
    /// The database's.
    pub async fn still_writing(&self, blob: u64, now: u64) -> Result<(), StoreError> {
        sqlx::query("UPDATE parts SET used = $2 WHERE id = $1")
            .bind(number(blob))
            .bind(number(now))
            .execute(&self.write)
            .await?;
        Ok(())
    }

    /// Notes that a part is written and has `size` bytes.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] where the upload is gone by now.
    pub async fn end_part(&self, blob: u64, size: u64, now: u64) -> Result<(), StoreError> {
        let ended = sqlx::query(END_PART)
            .bind(number(blob))
            .bind(number(size))
            .bind(number(now))
            .execute(&self.write)
            .await?;
        match ended.rows_affected() {
            0 => Err(StoreError::NoSuchUpload),
            _ => Ok(()),
        }
    }

    /// The same for a part that is all there is, whatever came before.
    ///
    /// # Errors
    /// As [`Catalog::end_part`].
    pub async fn end_whole(
        &self,
        upload: u64,
        blob: u64,
        size: u64,
        now: u64,
    ) -> Result<(), StoreError> {
        let mut transaction = self.write.begin().await?;
        sqlx::query("UPDATE uploads SET blocks = NULL WHERE id = $1")
            .bind(number(upload))
            .execute(&mut *transaction)
            .await?;
        let ended = sqlx::query(END_PART)
            .bind(number(blob))
            .bind(number(size))
            .bind(number(now))
            .execute(&mut *transaction)
            .await?;
        if ended.rows_affected() == 0 {
            return Err(StoreError::NoSuchUpload);
        }
        let older = sqlx::query("DELETE FROM parts WHERE upload = $1 AND id < $2 RETURNING id")
            .bind(number(upload))
            .bind(number(blob))
            .fetch_all(&mut *transaction)
            .await?;
        for row in older {
            discard(&mut transaction, unsigned(&row, "id")?, now).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Gives a part up: its blob is garbage, whatever was written of it.
    ///
    /// # Errors
    /// The database's.
    pub async fn drop_part(&self, blob: u64, now: u64) -> Result<(), StoreError> {
        let mut transaction = self.write.begin().await?;
        sqlx::query("DELETE FROM parts WHERE id = $1")
            .bind(number(blob))
            .execute(&mut *transaction)
            .await?;
        discard(&mut transaction, blob, now).await?;
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
        let rows = sqlx::query("SELECT id, block, start, size FROM parts WHERE upload = $1")
            .bind(number(upload))
            .fetch_all(&mut *transaction)
            .await?;
        let received: Vec<Received> = rows
            .iter()
            .filter_map(|row| received(row).transpose())
            .collect::<Result<_, _>>()?;
        if parts::total(&parts::listed(&received, blocks)?) > limit {
            return Err(StoreError::TooLarge { limit });
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Makes `upload` an entry of `size` bytes. Parts that are being written since before
    /// `abandoned` are given up.
    ///
    /// # Errors
    /// [`StoreError::Busy`] where one is still being written, [`StoreError::SizeMismatch`],
    /// [`StoreError::NoSuchUpload`], [`StoreError::AlreadyExists`].
    pub async fn commit(
        &self,
        upload: u64,
        size: u64,
        now: u64,
        abandoned: u64,
    ) -> Result<(Entry, Vec<Part>), StoreError> {
        let mut transaction = self.write.begin().await?;
        // Of two commits at once, the other finds none from here on.
        let row =
            sqlx::query("DELETE FROM uploads WHERE id = $1 RETURNING scope, version, key, blocks")
                .bind(number(upload))
                .fetch_optional(&mut *transaction)
                .await?;
        let row = row.ok_or(StoreError::NoSuchUpload)?;
        let name = entry_name(&row)?;
        let blocks: Option<String> = row.try_get("blocks")?;
        let blocks: Option<Vec<String>> = blocks
            .map(|text| serde_json::from_str(&text))
            .transpose()
            .map_err(|error| sqlx::Error::Decode(error.into()))?;
        let rows = sqlx::query(
            "DELETE FROM parts WHERE upload = $1 RETURNING id, block, start, size, used",
        )
        .bind(number(upload))
        .fetch_all(&mut *transaction)
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
            "INSERT INTO entries (scope, version, key, size, created, used, parts) \
             VALUES ($1, $2, $3, $4, $5, $5, $6) ON CONFLICT (scope, version, key) DO NOTHING \
             RETURNING id",
        )
        .bind(name.scope.0.to_string())
        .bind(name.version.as_str())
        .bind(name.key.as_str())
        .bind(number(size))
        .bind(number(now))
        .bind(encode(&parts)?)
        .fetch_optional(&mut *transaction)
        .await?;
        let row = row.ok_or(StoreError::AlreadyExists)?;
        for unused in &rows {
            let blob = unsigned(unused, "id")?;
            if !parts.iter().any(|part| part.blob == blob) {
                discard(&mut transaction, blob, now).await?;
            }
        }
        transaction.commit().await?;
        let entry = Entry {
            id: unsigned(&row, "id")?,
            name,
            size,
            created: now,
        };
        Ok((entry, parts))
    }

    /// The entry that `query` asks for: scope by scope, key by key, the one of that very key, or
    /// else the newest whose key begins with it (GitHub's documentation of dependency caching).
    ///
    /// # Errors
    /// The database's.
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
                .bind(behind(key))
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

    /// The parts of an entry, or `None` where it is gone.
    ///
    /// # Errors
    /// The database's.
    pub async fn parts_of(&self, entry: u64) -> Result<Option<Vec<Part>>, sqlx::Error> {
        let row = sqlx::query("SELECT parts FROM entries WHERE id = $1")
            .bind(number(entry))
            .fetch_optional(&self.read)
            .await?;
        row.map(|row| decode_parts(row.try_get("parts")?))
            .transpose()
    }

    /// Takes an entry away, whose content turned out to be gone.
    ///
    /// # Errors
    /// The database's.
    pub async fn forget(&self, entry: u64, now: u64) -> Result<(), StoreError> {
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
    /// The database's.
    pub async fn touch(&self, used: &[(u64, u64)]) -> Result<(), StoreError> {
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

    /// What is there.
    ///
    /// # Errors
    /// The database's.
    pub async fn totals(&self) -> Result<Totals, sqlx::Error> {
        let row = sqlx::query(
            "SELECT (SELECT COUNT(*) FROM entries) AS entries, \
             (SELECT CAST(COALESCE(SUM(size), 0) AS BIGINT) FROM entries) AS bytes, \
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

    /// Takes entries away that were not used since `before`.
    ///
    /// # Errors
    /// The database's.
    pub async fn expire(&self, before: u64, now: u64) -> Result<Swept, StoreError> {
        let mut swept = Swept::default();
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

    /// Takes the entries away that were used longest ago, until at least `bytes` are gone.
    ///
    /// # Errors
    /// The database's.
    pub async fn evict(&self, bytes: u64, now: u64) -> Result<Swept, StoreError> {
        let mut swept = Swept::default();
        while swept.bytes < bytes {
            let mut transaction = self.write.begin().await?;
            let oldest = sqlx::query("SELECT id, size FROM entries ORDER BY used, id LIMIT $1")
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
                let gone = sqlx::query("DELETE FROM entries WHERE id = $1 RETURNING size, parts")
                    .bind(number(unsigned(row, "id")?))
                    .fetch_optional(&mut *transaction)
                    .await?;
                // Another replica that sweeps as well may have been quicker, to the same end.
                swept.bytes += unsigned(row, "size")?;
                if let Some(gone) = gone {
                    swept.count += 1;
                    discard_entry(&mut transaction, &gone, now).await?;
                }
            }
            transaction.commit().await?;
        }
        Ok(swept)
    }

    /// Takes uploads away that were not used since `abandoned`, and parts that none of them has.
    ///
    /// # Errors
    /// The database's.
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
        // Of a part that was begun in the moment in which its upload was committed, and whose
        // writer was killed then.
        let parts = sqlx::query(
            "DELETE FROM parts WHERE used < $1 AND upload NOT IN (SELECT id FROM uploads) \
             RETURNING id",
        )
        .bind(number(abandoned))
        .fetch_all(&mut *transaction)
        .await?;
        for row in parts {
            discard(&mut transaction, unsigned(&row, "id")?, now).await?;
        }
        transaction.commit().await?;
        Ok(count)
    }

    /// Gives up all parts that are being written: those of a process that is no more. Only for a
    /// database that no other service has.
    ///
    /// # Errors
    /// The database's.
    pub async fn drop_unfinished(&self, now: u64) -> Result<u64, StoreError> {
        let mut transaction = self.write.begin().await?;
        let parts = sqlx::query("DELETE FROM parts WHERE size IS NULL RETURNING id")
            .fetch_all(&mut *transaction)
            .await?;
        for row in &parts {
            discard(&mut transaction, unsigned(row, "id")?, now).await?;
        }
        transaction.commit().await?;
        Ok(parts.len() as u64)
    }

    /// Some of the blobs that are garbage since before `before`.
    ///
    /// # Errors
    /// The database's.
    pub async fn garbage(&self, before: u64) -> Result<Vec<u64>, sqlx::Error> {
        let rows = sqlx::query("SELECT blob FROM garbage WHERE since < $1 ORDER BY since LIMIT $2")
            .bind(number(before))
            .bind(SWEEP_ROWS)
            .fetch_all(&self.read)
            .await?;
        rows.iter().map(|row| unsigned(row, "blob")).collect()
    }

    /// Forgets blobs that were deleted.
    ///
    /// # Errors
    /// The database's.
    pub async fn deleted(&self, blobs: &[u64]) -> Result<(), StoreError> {
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

    /// Closes the connections; SQLite then leaves one file.
    pub async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        Self::Behind(error.into())
    }
}

/// The driver takes all behind the colon for the path, once it is decoded. So nothing in it may look
/// like a part of a URL: a drive, a server, a first folder that would be the host.
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
                    || matches!(error.code().as_deref(), Some("42P07" | "42710")) => {}
            Err(error) => return Err(error),
            Ok(_) => {}
        }
    }
    Ok(())
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

/// A part as it was received, or `None` where it is still being written.
fn received(row: &AnyRow) -> Result<Option<Received>, sqlx::Error> {
    let size: Option<i64> = row.try_get("size")?;
    let Some(size) = size else { return Ok(None) };
    Ok(Some(Received {
        blob: unsigned(row, "id")?,
        block: row.try_get("block")?,
        start: unsigned(row, "start")?,
        size: u64::try_from(size).unwrap_or(0),
    }))
}

async fn discard(
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

async fn discard_parts_of(
    transaction: &mut Transaction<'_, Any>,
    upload: u64,
    now: u64,
) -> Result<(), sqlx::Error> {
    let parts = sqlx::query("DELETE FROM parts WHERE upload = $1 RETURNING id")
        .bind(number(upload))
        .fetch_all(&mut **transaction)
        .await?;
    for row in parts {
        discard(transaction, unsigned(&row, "id")?, now).await?;
    }
    Ok(())
}

async fn discard_entry(
    transaction: &mut Transaction<'_, Any>,
    row: &AnyRow,
    now: u64,
) -> Result<u64, sqlx::Error> {
    for part in decode_parts(row.try_get("parts")?)? {
        discard(transaction, part.blob, now).await?;
    }
    unsigned(row, "size")
}
