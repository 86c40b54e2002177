//! Reservations: names that are taken, and uploads that are not entries yet.

use sqlx::{Any, Executor};

use crate::cache_protocol::ids::{BlobId, UploadId};
use crate::cache_protocol::store::{EntryName, StoreError};
use crate::clock::Timestamp;
use crate::serve::catalog::Catalog;
use crate::serve::catalog::contents::insert_contents;
use crate::serve::catalog::garbage::{discard_part, discard_parts_of};
use crate::serve::catalog::rows::{entry_name, in_steps, milliseconds, number, unsigned};
use crate::serve::catalog::upload_parts::SmallPart;

/// An upload that the database does not have yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unwritten {
    /// Its number.
    pub upload: UploadId,
    /// The name under which it was reserved.
    pub name: EntryName,
    /// When it was used last.
    pub used: Timestamp,
    /// The content received for it.
    pub content: Option<SmallPart>,
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

impl Catalog {
    /// Reserves `name` at `now`. A reservation that was not used since `abandoned` is given up.
    /// Times are those of the store's clock, here and below.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] if the name is taken.
    pub async fn reserve(
        &self,
        name: &EntryName,
        now: Timestamp,
        abandoned: Timestamp,
    ) -> Result<UploadId, StoreError> {
        if let Some(upload) = insert_upload(&mut *self.writer().await?, name, now).await? {
            return Ok(upload);
        }
        let mut writer = self.writer().await?;
        let mut transaction = writer.begin().await?;
        let given_up = sqlx::query(
            "DELETE FROM uploads WHERE scope = $1 AND version = $2 AND key = $3 AND used < $4 \
             AND NOT EXISTS (SELECT 1 FROM parts WHERE upload = uploads.id AND parts.used >= $4) \
             RETURNING id",
        )
        .bind(name.scope.0.to_string())
        .bind(name.version.as_str())
        .bind(name.key.as_str())
        .bind(milliseconds(abandoned))
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(given_up) = given_up else {
            return Err(StoreError::AlreadyExists);
        };
        let mut discarded = self.discarding(now);
        let given_up = UploadId(unsigned(&given_up, "id")?);
        discard_parts_of(&mut transaction, given_up, &mut discarded).await?;
        let upload = insert_upload(&mut *transaction, name, now)
            .await?
            .ok_or(StoreError::AlreadyExists)?;
        transaction.commit().await?;
        drop(writer);
        self.free(discarded).await;
        Ok(upload)
    }

    /// The upload that was reserved under `name`.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] if there is none.
    pub async fn upload_of(&self, name: &EntryName) -> Result<UploadId, StoreError> {
        let row =
            sqlx::query("SELECT id FROM uploads WHERE scope = $1 AND version = $2 AND key = $3")
                .bind(name.scope.0.to_string())
                .bind(name.version.as_str())
                .bind(name.key.as_str())
                .fetch_optional(&self.read)
                .await?;
        let row = row.ok_or(StoreError::NoSuchUpload)?;
        Ok(UploadId(unsigned(&row, "id")?))
    }

    /// The name under which `upload` was reserved.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] if there is none.
    pub async fn name_of(&self, upload: UploadId) -> Result<EntryName, StoreError> {
        let row = sqlx::query("SELECT scope, version, key FROM uploads WHERE id = $1")
            .bind(number(upload))
            .fetch_optional(&self.read)
            .await?;
        Ok(entry_name(&row.ok_or(StoreError::NoSuchUpload)?)?)
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

    /// Takes `count` numbers of uploads and as many of blobs out of those that the tables assign,
    /// and returns the first of each. They are never given again.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn take_numbers(&self, count: u64) -> Result<(UploadId, BlobId), sqlx::Error> {
        let mut connection = self.writer().await?;
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
        Ok((UploadId(first[0]), BlobId(first[1])))
    }

    /// Persists uploads that the database does not have.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn persist(&self, uploads: &[Unwritten]) -> Result<(), StoreError> {
        let contents = uploads.iter().filter_map(|upload| upload.content.as_ref());
        let contents = contents.map(|small| (small.blob, small.bytes.clone()));
        let contents = self.store_contents(contents.collect()).await?;
        let mut connection = self.writer().await?;
        let mut transaction = connection.begin().await?;
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
            .bind(milliseconds(*used))
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
            .bind(milliseconds(*used))
            .bind(small.digests.encode())
            .execute(&mut *transaction)
            .await?;
        }
        insert_contents(&mut transaction, &contents).await?;
        transaction.commit().await?;
        contents.written();
        Ok(())
    }

    /// Removes uploads that were not used since `abandoned`, and parts without an upload.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn abandon(&self, abandoned: Timestamp, now: Timestamp) -> Result<u64, StoreError> {
        let mut count = 0;
        let mut discarded = self.discarding(now);
        let mut writer = self.writer().await?;
        let mut transaction = writer.begin().await?;
        let uploads = sqlx::query(
            "DELETE FROM uploads WHERE used < $1 AND NOT EXISTS \
             (SELECT 1 FROM parts WHERE upload = uploads.id AND parts.used >= $1) RETURNING id",
        )
        .bind(milliseconds(abandoned))
        .fetch_all(&mut *transaction)
        .await?;
        for row in uploads {
            count += 1;
            let upload = UploadId(unsigned(&row, "id")?);
            discard_parts_of(&mut transaction, upload, &mut discarded).await?;
        }
        // These parts were begun at the moment when their upload was committed, and their writer
        // was killed then.
        let parts = sqlx::query(
            "DELETE FROM parts WHERE used < $1 AND upload NOT IN (SELECT id FROM uploads) \
             RETURNING id, inside",
        )
        .bind(milliseconds(abandoned))
        .fetch_all(&mut *transaction)
        .await?;
        for row in parts {
            discard_part(&mut transaction, &row, &mut discarded).await?;
        }
        transaction.commit().await?;
        drop(writer);
        self.free(discarded).await;
        Ok(count)
    }
}

async fn insert_upload(
    executor: impl Executor<'_, Database = Any>,
    name: &EntryName,
    now: Timestamp,
) -> Result<Option<UploadId>, sqlx::Error> {
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
    .bind(milliseconds(now))
    .fetch_optional(executor)
    .await?;
    row.map(|row| unsigned(&row, "id").map(UploadId))
        .transpose()
}
