//! The parts of uploads: announced, written, replaced.

use bytes::Bytes;
use sqlx::{Any, Executor, Row};

use crate::cache_protocol::blob_digests::Digests;
use crate::cache_protocol::ids::{BlobId, UploadId};
use crate::cache_protocol::parts::{self, Part, ReceivedPart};
use crate::cache_protocol::store::{PARTS_LIMIT, StoreError};
use crate::clock::Timestamp;
use crate::serve::blob_store::WrittenBlob;
use crate::serve::catalog::Catalog;
use crate::serve::catalog::contents::insert_contents;
use crate::serve::catalog::garbage::{discard_part, mark_garbage};
use crate::serve::catalog::rows::{encode, milliseconds, number, received, unsigned};

/// A part that is about to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BegunPart {
    /// The number of its blob.
    pub blob: BlobId,
    /// Whether its upload has no other so far, and no list of blocks.
    pub is_first: bool,
    /// The bytes of its upload's other parts, without those that this part replaces.
    pub others: u64,
}

/// A part that is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FinishedPart {
    /// The number of its blob.
    pub blob: BlobId,
    /// The size and digests of its content.
    pub content: WrittenBlob,
    /// Its bytes, if only the database is to have them.
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
    pub blob: BlobId,
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

/// A part of an upload that was committed or given up has no upload any more.
const FINISH_PART: &str = "UPDATE parts SET size = $2, used = $3, digests = $4, inside = $5 \
                        WHERE id = $1 \
                        AND EXISTS (SELECT 1 FROM uploads WHERE id = parts.upload)";

impl Catalog {
    /// Notes that a part of `upload` is about to be written.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] if there is none, [`StoreError::TooManyParts`].
    pub async fn begin_part(
        &self,
        upload: UploadId,
        block: Option<&str>,
        start: u64,
        now: Timestamp,
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
        .bind(milliseconds(now))
        .fetch_optional(&mut *self.writer().await?)
        .await?
        .ok_or(StoreError::NoSuchUpload)?;
        let (blob, others) = (BlobId(unsigned(&row, "id")?), unsigned(&row, "others")?);
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
    pub async fn heartbeat(&self, blob: BlobId, now: Timestamp) -> Result<(), StoreError> {
        sqlx::query("UPDATE parts SET used = $2 WHERE id = $1")
            .bind(number(blob))
            .bind(milliseconds(now))
            .execute(&mut *self.writer().await?)
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
        upload: UploadId,
        part: &FinishedPart,
        now: Timestamp,
    ) -> Result<u64, StoreError> {
        if part.replaces == Replaces::Nothing && part.inside.is_none() {
            // Most large uploads take this path, so it needs no transaction.
            record_finish(&mut *self.writer().await?, part, now).await?;
            return Ok(0);
        }
        let content = part.inside.iter().map(|bytes| (part.blob, bytes.clone()));
        let content = self.store_contents(content.collect()).await?;
        let mut connection = self.writer().await?;
        let mut transaction = connection.begin().await?;
        if part.replaces == Replaces::All {
            sqlx::query("UPDATE uploads SET blocks = NULL WHERE id = $1")
                .bind(number(upload))
                .execute(&mut *transaction)
                .await?;
        }
        record_finish(&mut *transaction, part, now).await?;
        insert_contents(&mut transaction, &content).await?;
        if part.replaces == Replaces::Nothing {
            transaction.commit().await?;
            content.written();
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
        let mut discarded = self.discarding(now);
        for row in older {
            let size: Option<i64> = row.try_get("size")?;
            replaced += size.map_or(0, |size| u64::try_from(size).unwrap_or(0));
            discard_part(&mut transaction, &row, &mut discarded).await?;
        }
        transaction.commit().await?;
        content.written();
        drop(connection);
        self.free(discarded).await;
        Ok(replaced)
    }

    /// Gives a part up: its blob becomes garbage, whatever was written of it.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn abandon_part(&self, blob: BlobId) -> Result<(), StoreError> {
        let mut writer = self.writer().await?;
        let mut transaction = writer.begin().await?;
        sqlx::query("DELETE FROM parts WHERE id = $1")
            .bind(number(blob))
            .execute(&mut *transaction)
            .await?;
        // The bytes of an interrupted part are not in the database.
        mark_garbage(&mut transaction, blob, Timestamp::UNIX_EPOCH).await?;
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
        upload: UploadId,
        blocks: &[String],
        limit: u64,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let mut writer = self.writer().await?;
        let mut transaction = writer.begin().await?;
        let updated = sqlx::query("UPDATE uploads SET blocks = $2, used = $3 WHERE id = $1")
            .bind(number(upload))
            .bind(encode(blocks)?)
            .bind(milliseconds(now))
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

    /// Gives up all parts that are being written: their process has ended, so nobody reads them.
    /// Call this only for a database that no other service uses.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn drop_unfinished(&self) -> Result<u64, StoreError> {
        let mut writer = self.writer().await?;
        let mut transaction = writer.begin().await?;
        let parts = sqlx::query("DELETE FROM parts WHERE size IS NULL RETURNING id")
            .fetch_all(&mut *transaction)
            .await?;
        for row in &parts {
            mark_garbage(
                &mut transaction,
                BlobId(unsigned(row, "id")?),
                Timestamp::UNIX_EPOCH,
            )
            .await?;
        }
        transaction.commit().await?;
        Ok(parts.len() as u64)
    }
}

async fn record_finish(
    executor: impl Executor<'_, Database = Any>,
    part: &FinishedPart,
    now: Timestamp,
) -> Result<(), StoreError> {
    let ended = sqlx::query(FINISH_PART)
        .bind(number(part.blob))
        .bind(number(part.content.size))
        .bind(milliseconds(now))
        .bind(part.content.digests.encode())
        .bind(i64::from(part.inside.is_some()))
        .execute(executor)
        .await?;
    match ended.rows_affected() {
        0 => Err(StoreError::NoSuchUpload),
        _ => Ok(()),
    }
}
