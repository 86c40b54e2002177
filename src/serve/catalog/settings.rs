//! The settings that services of one store share, and the store's time.

use sqlx::Row;

use crate::cache_protocol::store::StoreError;
use crate::clock::Timestamp;
use crate::serve::catalog::Catalog;
use crate::serve::catalog::rows::milliseconds;

impl Catalog {
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
        .execute(&mut *self.writer().await?)
        .await?;
        let row = sqlx::query("SELECT value FROM settings WHERE name = $1")
            .bind(name)
            .fetch_one(&mut *self.writer().await?)
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
            .execute(&mut *self.writer().await?)
            .await?;
        Ok(())
    }

    /// The time of this store: `begin` if it has none yet.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn time(&self, begin: Timestamp) -> Result<Timestamp, sqlx::Error> {
        let text = self
            .setting("time", &begin.milliseconds().to_string())
            .await?;
        Ok(text.parse().map_or(begin, Timestamp::from_milliseconds))
    }

    /// Records that it is `now` by this store's clock, and returns the time of the service whose
    /// clock is ahead.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn record_time(&self, now: Timestamp) -> Result<Timestamp, StoreError> {
        let row = sqlx::query(
            "UPDATE settings SET value = CASE WHEN CAST(value AS BIGINT) < CAST($1 AS BIGINT) \
             THEN CAST(CAST($1 AS BIGINT) AS TEXT) ELSE value END WHERE name = 'time' \
             RETURNING value",
        )
        .bind(milliseconds(now))
        .fetch_optional(&mut *self.writer().await?)
        .await?;
        let Some(row) = row else { return Ok(now) };
        let value: String = row.try_get("value")?;
        Ok(value.parse().map_or(now, Timestamp::from_milliseconds))
    }
}
