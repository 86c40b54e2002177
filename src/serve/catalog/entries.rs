//! Finds entries, and notes that they were used or that their content is gone.

use sqlx::Row;

use crate::cache_protocol::ids::EntryId;
use crate::cache_protocol::parts::Part;
use crate::cache_protocol::store::{Entry, KEY_LIMIT, Query, StoreError};
use crate::clock::Timestamp;
use crate::serve::catalog::Catalog;
use crate::serve::catalog::garbage::discard_entry;
use crate::serve::catalog::rows::{
    decode_parts, entry_name, in_steps, milliseconds, number, placeholders, timestamp, unsigned,
};

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
                        id: EntryId(unsigned(&row, "id")?),
                        name: entry_name(&row)?,
                        size: unsigned(&row, "size")?,
                        created: timestamp(&row, "created")?,
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
    pub async fn parts_of(&self, entry: EntryId) -> Result<Option<Vec<Part>>, sqlx::Error> {
        let row = sqlx::query("SELECT parts FROM entries WHERE id = $1")
            .bind(number(entry))
            .fetch_optional(&self.read)
            .await?;
        row.map(|row| decode_parts(row.try_get("parts")?))
            .transpose()
    }

    /// Removes an entry whose content is missing. `false` if it was gone.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn remove_entry(&self, entry: EntryId, now: Timestamp) -> Result<bool, StoreError> {
        let mut writer = self.writer().await?;
        let mut transaction = writer.begin().await?;
        let mut discarded = self.discarding(now);
        let row = sqlx::query("DELETE FROM entries WHERE id = $1 RETURNING size, parts")
            .bind(number(entry))
            .fetch_optional(&mut *transaction)
            .await?;
        if let Some(row) = &row {
            discard_entry(&mut transaction, row, &mut discarded).await?;
        }
        transaction.commit().await?;
        drop(writer);
        self.free(discarded).await;
        Ok(row.is_some())
    }

    /// Notes when entries were last used.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn record_use(&self, used: &[(EntryId, Timestamp)]) -> Result<(), StoreError> {
        let mut writer = self.writer().await?;
        let mut transaction = writer.begin().await?;
        for used in in_steps(used) {
            let update = format!(
                "WITH recent (id, used) AS (VALUES {}) UPDATE entries SET used = recent.used \
                 FROM recent WHERE entries.id = recent.id AND entries.used < recent.used",
                placeholders(used.len(), 2)
            );
            let mut query = sqlx::query(sqlx::AssertSqlSafe(update));
            for (entry, when) in used {
                query = query.bind(number(*entry)).bind(milliseconds(*when));
            }
            query.execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
        Ok(())
    }
}
