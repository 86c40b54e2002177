//! Blobs that nothing names any more: they become garbage, and are forgotten once deleted.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use sqlx::any::AnyRow;
use sqlx::{Any, Row, Transaction};

use crate::cache_protocol::ids::{BlobId, UploadId};
use crate::cache_protocol::store::StoreError;
use crate::clock::Timestamp;
use crate::serve::catalog::contents::{blocking, stored_location};
use crate::serve::catalog::rows::{decode_parts, is_inside, milliseconds, number, unsigned};
use crate::serve::catalog::segments::ContentLocation;
use crate::serve::catalog::{Catalog, SqliteState};

/// What a transaction discards.
#[derive(Debug)]
pub(super) struct Discarded {
    now: Timestamp,
    /// Where contents are whose rows it deletes. Their room is given back once it is committed, see
    /// [`Catalog::free`].
    contents: Vec<ContentLocation>,
    sqlite: Option<Arc<SqliteState>>,
}

impl Discarded {
    fn content_at(&mut self, location: Option<ContentLocation>) {
        self.contents.extend(location);
        // Already here, since the request may be gone when the transaction ends.
        if let (Some(_), Some(sqlite)) = (location, &self.sqlite) {
            sqlite.has_new_garbage.store(true, Ordering::Relaxed);
        }
    }
}

impl Catalog {
    /// Some of the blobs that are garbage since `until` or before.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn garbage(&self, until: Timestamp) -> Result<Vec<BlobId>, sqlx::Error> {
        let rows =
            sqlx::query("SELECT blob FROM garbage WHERE since <= $1 ORDER BY since LIMIT $2")
                .bind(milliseconds(until))
                .bind(self.sweep_rows())
                .fetch_all(&self.read)
                .await?;
        rows.iter()
            .map(|row| unsigned(row, "blob").map(BlobId))
            .collect()
    }

    /// Forgets blobs that were deleted.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn forget_garbage(&self, blobs: &[BlobId]) -> Result<(), StoreError> {
        let mut writer = self.writer().await?;
        let mut transaction = writer.begin().await?;
        for blob in blobs {
            sqlx::query("DELETE FROM garbage WHERE blob = $1")
                .bind(number(*blob))
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Begins to discard at `now`.
    pub(super) fn discarding(&self, now: Timestamp) -> Discarded {
        Discarded {
            now,
            contents: Vec::new(),
            sqlite: self.sqlite.clone(),
        }
    }

    /// Gives the room of discarded contents back to the disk, where the file system can do that. Call this
    /// when the transaction is committed.
    pub(super) async fn free(&self, discarded: Discarded) {
        let contents = discarded.contents;
        if let Some(segments) = self.segments().filter(|_| !contents.is_empty()) {
            let freed = blocking(segments, move |segments| {
                segments.free(contents);
                Ok(())
            });
            // If it fails, a compaction does it.
            let _ = freed.await;
        }
    }
}

pub(super) async fn mark_garbage(
    transaction: &mut Transaction<'_, Any>,
    blob: BlobId,
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO garbage (blob, since) VALUES ($1, $2) ON CONFLICT (blob) DO NOTHING")
        .bind(number(blob))
        .bind(milliseconds(now))
        .execute(&mut **transaction)
        .await?;
    Ok(())
}

/// Removes a blob. A small content goes at once: each read of it is one read of a row and of a file, and one
/// that comes too late finds other bytes than the digests say.
pub(super) async fn discard_blob(
    transaction: &mut Transaction<'_, Any>,
    blob: BlobId,
    inside: bool,
    discarded: &mut Discarded,
) -> Result<(), sqlx::Error> {
    if !inside {
        return mark_garbage(transaction, blob, discarded.now).await;
    }
    let row = sqlx::query("DELETE FROM contents WHERE blob = $1 RETURNING segment, start, length")
        .bind(number(blob))
        .fetch_optional(&mut **transaction)
        .await?;
    if let Some(row) = row {
        discarded.content_at(stored_location(&row)?);
    }
    Ok(())
}

/// Removes the blob of a part's row.
pub(super) async fn discard_part(
    transaction: &mut Transaction<'_, Any>,
    row: &AnyRow,
    discarded: &mut Discarded,
) -> Result<(), sqlx::Error> {
    let blob = BlobId(unsigned(row, "id")?);
    discard_blob(transaction, blob, is_inside(row)?, discarded).await
}

pub(super) async fn discard_parts_of(
    transaction: &mut Transaction<'_, Any>,
    upload: UploadId,
    discarded: &mut Discarded,
) -> Result<(), sqlx::Error> {
    let parts = sqlx::query("DELETE FROM parts WHERE upload = $1 RETURNING id, inside")
        .bind(number(upload))
        .fetch_all(&mut **transaction)
        .await?;
    for row in parts {
        discard_part(transaction, &row, discarded).await?;
    }
    Ok(())
}

pub(super) async fn discard_entry(
    transaction: &mut Transaction<'_, Any>,
    row: &AnyRow,
    discarded: &mut Discarded,
) -> Result<u64, sqlx::Error> {
    for part in decode_parts(row.try_get("parts")?)? {
        discard_blob(transaction, part.blob, part.inside, discarded).await?;
    }
    unsigned(row, "size")
}
