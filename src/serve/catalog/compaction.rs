//! Empties segments that are mostly dead, and deletes them.

use std::cmp::Reverse;
use std::collections::HashMap;

use crate::cache_protocol::azure_blob::is_missing;
use crate::cache_protocol::ids::BlobId;
use crate::cache_protocol::store::StoreError;
use crate::serve::catalog::Catalog;
use crate::serve::catalog::contents::{blocking, location};
use crate::serve::catalog::rows::{number, unsigned};
use crate::serve::catalog::segments::ContentLocation;

/// How many contents move in one transaction. Commits wait meanwhile.
const MOVED_AT_ONCE: usize = 64;

/// Which segments a compaction empties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compaction {
    /// Those of which at least this percentage is dead.
    pub dead_percent: u64,
    /// It ends when so many bytes of the disk are free again.
    pub enough: u64,
}

impl Catalog {
    /// Moves the contents out of segments that are mostly dead, and deletes these segments. Returns how many
    /// bytes of the disk it freed.
    ///
    /// # Errors
    /// An error of the database or of the disk. The next compaction does the rest.
    pub async fn compact(&self, compaction: Compaction) -> Result<u64, StoreError> {
        let Some(segments) = self.segments() else {
            return Ok(0);
        };
        let full = blocking(segments, |segments| segments.full()).await?;
        let live = self.live_bytes().await?;
        let (mut dead, mut mostly_dead) = (Vec::new(), Vec::new());
        for (segment, length) in full {
            let Some(live) = live.get(&segment) else {
                dead.push((segment, length));
                continue;
            };
            let unused = length.saturating_sub(*live);
            if unused >= length * compaction.dead_percent / 100 {
                mostly_dead.push((segment, unused));
            }
        }
        let mut freed = self.delete_dead(&dead).await?;
        mostly_dead.sort_by_key(|(segment, unused)| (Reverse(*unused), *segment));
        for emptied in mostly_dead {
            if freed >= compaction.enough {
                break;
            }
            self.empty(emptied.0).await?;
            // On a full disk the next one needs its room.
            freed += self.delete_dead(&[emptied]).await?;
        }
        Ok(freed)
    }

    /// The bytes of the contents in each segment.
    async fn live_bytes(&self) -> Result<HashMap<u64, u64>, sqlx::Error> {
        let rows = sqlx::query(
            "SELECT segment, SUM(length) AS length FROM contents WHERE segment IS NOT NULL \
             GROUP BY segment",
        )
        .fetch_all(&self.read)
        .await?;
        rows.iter()
            .map(|row| Ok((unsigned(row, "segment")?, unsigned(row, "length")?)))
            .collect()
    }

    /// Moves the contents of `segment`, as far as they can be read.
    async fn empty(&self, segment: u64) -> Result<(), StoreError> {
        let rows = sqlx::query(
            "SELECT blob, segment, start, length FROM contents WHERE segment = $1 ORDER BY blob",
        )
        .bind(number(segment))
        .fetch_all(&self.read)
        .await?;
        let located: Vec<(BlobId, ContentLocation)> = rows
            .iter()
            .map(|row| Ok((BlobId(unsigned(row, "blob")?), location(row)?)))
            .collect::<Result<_, sqlx::Error>>()?;
        for located in located.chunks(MOVED_AT_ONCE) {
            self.copy(located).await?;
        }
        Ok(())
    }

    async fn copy(&self, located: &[(BlobId, ContentLocation)]) -> Result<(), StoreError> {
        let Some(segments) = self.segments() else {
            return Ok(());
        };
        let _unnamed = segments.unnamed().await;
        let mut writer = self.writer().await?;
        let (blobs, locations): (Vec<BlobId>, Vec<ContentLocation>) =
            located.iter().copied().unzip();
        let moved = blocking(segments, move |segments| {
            let mut found = Vec::with_capacity(locations.len());
            let mut contents = Vec::with_capacity(locations.len());
            for (blob, location) in blobs.into_iter().zip(locations) {
                match segments.read(location) {
                    Ok(content) => {
                        found.push((blob, location));
                        contents.push(content);
                    }
                    // The next job that asks for it is told so, and the entry goes.
                    Err(error) if is_missing(&error) => {}
                    Err(error) => return Err(error),
                }
            }
            let new = segments.append(&contents)?;
            Ok(found.into_iter().zip(new).collect::<Vec<_>>())
        });
        let moved = moved.await?;
        let mut transaction = writer.begin().await?;
        for ((blob, old), new) in moved {
            // The row of a content that was deleted meanwhile is not there.
            sqlx::query(
                "UPDATE contents SET segment = $2, start = $3 WHERE blob = $1 AND segment = $4",
            )
            .bind(number(blob))
            .bind(number(new.segment))
            .bind(number(new.start))
            .bind(number(old.segment))
            .execute(&mut *transaction)
            .await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Deletes those of these segments that no row names. Each comes with its `unused` bytes. Returns how many
    /// of these are free now.
    async fn delete_dead(&self, unused: &[(u64, u64)]) -> Result<u64, StoreError> {
        let Some(segments) = self.segments().filter(|_| !unused.is_empty()) else {
            return Ok(0);
        };
        let _all_named = segments.all_named().await;
        let live = self.live_bytes().await?;
        let mut freed = 0;
        for &(segment, bytes) in unused {
            if !live.contains_key(&segment) {
                blocking(segments, move |segments| segments.delete(segment)).await?;
                freed += bytes;
            }
        }
        Ok(freed)
    }
}
