//! Makes uploads of the database's entries.

use sqlx::{Any, Connection, Row, Transaction};

use crate::cache_protocol::ids::{EntryId, UploadId};
use crate::cache_protocol::parts::{self, Part};
use crate::cache_protocol::store::{Entry, StoreError};
use crate::clock::Timestamp;
use crate::serve::catalog::garbage::{Discarded, discard_blob, discard_part};
use crate::serve::catalog::rows::{
    encode, entry_name, milliseconds, number, received, timestamp, unsigned,
};
use crate::serve::catalog::schema::Dialect;
use crate::serve::catalog::{Catalog, Moments};

/// An upload of the database's to commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Its number.
    pub upload: UploadId,
    /// The size that its client says it has.
    pub size: u64,
    /// When it is by this machine's clock.
    pub created: Timestamp,
    /// When it is by the store's clock.
    pub moments: Moments,
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

impl Catalog {
    /// Makes an upload of the database's an entry. Parts that are being written since before `abandoned` are
    /// given up. When this returns, the entry is on the disk.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if the upload is still being written, [`StoreError::SizeMismatch`],
    /// [`StoreError::NoSuchUpload`], [`StoreError::AlreadyExists`], or an error of the database.
    pub async fn commit(&self, commit: &Commit) -> Result<CommittedUpload, StoreError> {
        let mut connection = self.writer().await?;
        let mut transaction = match self.dialect() {
            Dialect::Postgres => connection.begin().await?,
            // A transaction that reads first cannot write any more once another program has
            // written.
            Dialect::Sqlite => connection.begin_with("BEGIN IMMEDIATE").await?,
        };
        let mut discarded = self.discarding(commit.moments.now);
        match commit_upload(&mut transaction, commit, &mut discarded).await {
            Ok(committed) => {
                transaction.commit().await?;
                drop(connection);
                self.free(discarded).await;
                Ok(committed)
            }
            Err(error) => {
                // If SQLite has ended it by itself, this fails, and the connection is not used again.
                let _ = transaction.rollback().await;
                Err(error)
            }
        }
    }
}

async fn commit_upload(
    transaction: &mut Transaction<'_, Any>,
    &Commit {
        upload,
        size,
        created,
        moments: Moments { now, abandoned },
    }: &Commit,
    discarded: &mut Discarded,
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
    let mut given_up = Vec::new();
    for row in &rows {
        match received(row)? {
            Some(part) => known.push(part),
            None if timestamp(row, "used")? < abandoned => given_up.push(row),
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
    .bind(milliseconds(created))
    .bind(milliseconds(now))
    .bind(encode(&parts)?)
    .bind(number(parts::stored(&parts)))
    .fetch_optional(&mut **transaction)
    .await?
    .ok_or(StoreError::AlreadyExists)?;
    for unused in parts::unused(&known, &parts) {
        discard_blob(transaction, unused.blob, unused.inside, discarded).await?;
    }
    for row in given_up {
        discard_part(transaction, row, discarded).await?;
    }
    let entry = Entry {
        id: EntryId(unsigned(&row, "id")?),
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
