//! Blobs that nothing names any more: they become garbage, and are forgotten once deleted.

use sqlx::any::AnyRow;
use sqlx::{Any, Row, Transaction};

use crate::cache_protocol::ids::{BlobId, UploadId};
use crate::cache_protocol::store::StoreError;
use crate::clock::Timestamp;
use crate::serve::catalog::rows::{decode_parts, is_inside, milliseconds, number, unsigned};
use crate::serve::catalog::{Catalog, SWEEP_ROWS};

impl Catalog {
    /// Some of the blobs that are garbage since `until` or before.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn garbage(&self, until: Timestamp) -> Result<Vec<BlobId>, sqlx::Error> {
        let rows =
            sqlx::query("SELECT blob FROM garbage WHERE since <= $1 ORDER BY since LIMIT $2")
                .bind(milliseconds(until))
                .bind(SWEEP_ROWS)
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

/// Removes a blob: its bytes at once if they are in the database, since each read of them is a
/// single statement.
pub(super) async fn discard_blob(
    transaction: &mut Transaction<'_, Any>,
    blob: BlobId,
    inside: bool,
    now: Timestamp,
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
pub(super) async fn discard_part(
    transaction: &mut Transaction<'_, Any>,
    row: &AnyRow,
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    discard_blob(
        transaction,
        BlobId(unsigned(row, "id")?),
        is_inside(row)?,
        now,
    )
    .await
}

pub(super) async fn discard_parts_of(
    transaction: &mut Transaction<'_, Any>,
    upload: UploadId,
    now: Timestamp,
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

pub(super) async fn discard_entry(
    transaction: &mut Transaction<'_, Any>,
    row: &AnyRow,
    now: Timestamp,
) -> Result<u64, sqlx::Error> {
    for part in decode_parts(row.try_get("parts")?)? {
        discard_blob(transaction, part.blob, part.inside, now).await?;
    }
    unsigned(row, "size")
}
