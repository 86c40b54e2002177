//! Removes entries that are too old or too many.

use sqlx::Row;

use crate::cache_protocol::store::StoreError;
use crate::clock::Timestamp;
use crate::serve::catalog::Catalog;
use crate::serve::catalog::garbage::discard_entry;
use crate::serve::catalog::rows::{milliseconds, number, unsigned};

/// The storage that an entry takes: its blobs, each once.
const STORED: &str = "COALESCE(stored, size)";

/// The entries that a sweep removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// How many.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Catalog {
    /// Removes entries that were not used since `before`.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn expire(&self, before: Timestamp, now: Timestamp) -> Result<Removed, StoreError> {
        let mut swept = Removed::default();
        loop {
            let mut writer = self.writer().await?;
            let mut transaction = writer.begin().await?;
            let mut discarded = self.discarding(now);
            let rows = sqlx::query(
                "DELETE FROM entries WHERE id IN \
                 (SELECT id FROM entries WHERE used < $1 ORDER BY used, id LIMIT $2) \
                 RETURNING size, parts",
            )
            .bind(milliseconds(before))
            .bind(self.sweep_rows())
            .fetch_all(&mut *transaction)
            .await?;
            for row in &rows {
                swept.count += 1;
                swept.bytes += discard_entry(&mut transaction, row, &mut discarded).await?;
            }
            transaction.commit().await?;
            drop(writer);
            self.free(discarded).await;
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
        let repository = self.dialect().repository();
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
        now: Timestamp,
    ) -> Result<Removed, StoreError> {
        let oldest = format!(
            "SELECT id, {STORED} AS stored FROM entries WHERE {} = $1 ORDER BY used, id LIMIT $2",
            self.dialect().repository()
        );
        let mut swept = Removed::default();
        while swept.bytes < bytes {
            let mut writer = self.writer().await?;
            let mut transaction = writer.begin().await?;
            let mut discarded = self.discarding(now);
            let oldest = sqlx::query(sqlx::AssertSqlSafe(oldest.clone()))
                .bind(repository)
                .bind(self.sweep_rows())
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
                    discard_entry(&mut transaction, &gone, &mut discarded).await?;
                }
            }
            transaction.commit().await?;
            drop(writer);
            self.free(discarded).await;
        }
        Ok(swept)
    }
}
