//! Makes uploads entries: those of the database one by one, those that it does not have together.

use bytes::Bytes;
use sqlx::{Any, Connection, Row, Transaction};

use crate::cache_protocol::ids::{BlobId, EntryId, UploadId};
use crate::cache_protocol::parts::{self, Part};
use crate::cache_protocol::store::{Entry, EntryName, StoreError};
use crate::clock::Timestamp;
use crate::serve::catalog::contents::{StoredContent, insert_contents};
use crate::serve::catalog::garbage::{discard_blob, discard_part};
use crate::serve::catalog::rows::{
    encode, entry_name, in_steps, milliseconds, number, placeholders, received, timestamp, unsigned,
};
use crate::serve::catalog::schema::Dialect;
use crate::serve::catalog::upload_parts::SmallPart;
use crate::serve::catalog::{Catalog, Moments};

/// An upload to commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The upload.
    pub what: CommitSource,
    /// The size that its client says it has.
    pub size: u64,
    /// When it is by this machine's clock.
    pub created: Timestamp,
    /// When it is by the store's clock.
    pub moments: Moments,
}

/// The source of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommitSource {
    /// The upload of this number.
    Upload(UploadId),
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

impl Catalog {
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
        let contents = self.store_contents(small_contents(commits)).await?;
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
        let mut unwritten = commit_unwritten(&mut transaction, commits, &contents).await?;
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
}

/// The small contents of uploads that the database does not have.
fn small_contents(commits: &[Commit]) -> Vec<(BlobId, Bytes)> {
    let small = commits.iter().filter_map(|commit| match &commit.what {
        CommitSource::Unwritten(_, small) => small.as_ref(),
        CommitSource::Upload(_) => None,
    });
    small
        .map(|small| (small.blob, small.bytes.clone()))
        .collect()
}

/// Commits uploads that the database does not have, in few statements.
async fn commit_unwritten(
    transaction: &mut Transaction<'_, Any>,
    commits: &[Commit],
    contents: &[StoredContent],
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
    insert_contents(transaction, contents).await?;
    let committed: Vec<CommittedUpload> = (last + 1..)
        .zip(&own)
        .map(|(id, (commit, name, small))| CommittedUpload {
            entry: Entry {
                id: EntryId(id),
                name: (*name).clone(),
                size: commit.size,
                created: commit.created,
            },
            parts: small.iter().map(|small| small.part()).collect(),
            upload_bytes: 0,
        })
        .collect();
    let used: Vec<Timestamp> = own
        .iter()
        .map(|(commit, _, _)| commit.moments.now)
        .collect();
    let written = insert_entries(transaction, &committed, &used).await?;
    if written == committed.len() as u64 {
        return Ok(committed
            .into_iter()
            .map(Ok)
            .collect::<Vec<_>>()
            .into_iter());
    }
    Ok(without_taken(transaction, committed).await?.into_iter())
}

/// Writes new entries that were last used at `used`, as far as their names are free. Returns how
/// many.
async fn insert_entries(
    transaction: &mut Transaction<'_, Any>,
    committed: &[CommittedUpload],
    used: &[Timestamp],
) -> Result<u64, sqlx::Error> {
    let mut written = 0;
    let rows: Vec<(&CommittedUpload, &Timestamp)> = committed.iter().zip(used).collect();
    for rows in in_steps(&rows) {
        let query = format!(
            "INSERT INTO entries (id, scope, version, key, size, created, used, parts, stored) \
             VALUES {} ON CONFLICT (scope, version, key) DO NOTHING",
            placeholders(rows.len(), 9)
        );
        let mut query = sqlx::query(sqlx::AssertSqlSafe(query));
        for (committed, used) in rows {
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
                .bind(milliseconds(*created))
                .bind(milliseconds(**used))
                .bind(encode(&committed.parts)?)
                .bind(number(parts::stored(&committed.parts)));
        }
        written += query.execute(&mut **transaction).await?.rows_affected();
    }
    Ok(written)
}

/// Finds out which of `committed` are entries now. The names of the others were taken by another
/// program that writes to this database.
async fn without_taken(
    transaction: &mut Transaction<'_, Any>,
    committed: Vec<CommittedUpload>,
) -> Result<Vec<Result<CommittedUpload, StoreError>>, sqlx::Error> {
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
                    discard_blob(transaction, part.blob, part.inside, Timestamp::UNIX_EPOCH)
                        .await?;
                }
                Err(StoreError::AlreadyExists)
            }
        });
    }
    Ok(done)
}

/// Makes an upload of the database's an entry.
async fn commit_upload(
    transaction: &mut Transaction<'_, Any>,
    upload: UploadId,
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
        discard_blob(transaction, unused.blob, unused.inside, now).await?;
    }
    for row in given_up {
        discard_part(transaction, row, now).await?;
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
