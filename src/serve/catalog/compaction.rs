//! Empties segments that are mostly dead, and deletes them.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::warn;

use crate::cache_protocol::azure_blob::is_missing;
use crate::cache_protocol::ids::BlobId;
use crate::cache_protocol::store::StoreError;
use crate::serve::catalog::contents::{blocking, stored_location};
use crate::serve::catalog::rows::{number, placeholders, unsigned};
use crate::serve::catalog::segments::{ContentLocation, FullSegment, Segments};
use crate::serve::catalog::{Catalog, GarbageLeft};
use crate::serve::reserved_space::is_full;

/// How many contents move in one transaction. Commits wait meanwhile.
const MOVED_AT_ONCE: usize = 64;

/// How many segments are emptied with one reading of the table.
const READ_AT_ONCE: usize = 64;

/// A content, and where it lies.
type Located = (BlobId, ContentLocation);

/// Which segments a compaction empties. It deletes all that are dead as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compaction {
    /// Those of which at least this percentage is dead, counted in what they take of the disk.
    pub dead_percent: u64,
    /// It empties no more when so many bytes of the disk are free again.
    pub enough: u64,
}

impl Compaction {
    /// One that empties no segment, so that it writes nothing.
    pub const DEAD: Self = Self {
        dead_percent: 100,
        enough: 0,
    };
}

impl Catalog {
    /// Moves the contents out of segments that are mostly dead, and deletes these segments, unless no small
    /// content was discarded since the last time. Returns how many bytes of the disk it freed. A segment
    /// stays if it cannot be deleted or not all of it can be read.
    ///
    /// # Errors
    /// An error of the database, and of a full disk. The next compaction does the rest.
    pub async fn compact(&self, compaction: Compaction) -> Result<u64, StoreError> {
        let Some(sqlite) = &self.sqlite else {
            return Ok(0);
        };
        let segments = &sqlite.segments;
        if !sqlite.has_new_garbage.swap(false, Ordering::Relaxed) {
            return Ok(0);
        }
        // Also if this is cancelled.
        let left = GarbageLeft::of(sqlite.clone());
        let freed = self.compact_segments(segments, compaction).await?;
        // One that may end early leaves some.
        if compaction.enough == u64::MAX {
            left.forget();
        }
        Ok(freed)
    }

    async fn compact_segments(
        &self,
        segments: &Arc<Segments>,
        compaction: Compaction,
    ) -> Result<u64, StoreError> {
        let full = blocking(segments, |segments| segments.full()).await?;
        // Nobody appends to these any more. Once each content in them has its row, they get no new rows.
        drop(segments.all_named().await);
        // A transaction whose request is gone may still end in this connection.
        drop(self.writer().await?);
        let live = self.live_bytes().await?;
        let (mut freed, mut mostly_dead) = (0, Vec::new());
        for segment in full {
            let Some(live) = live.get(&segment.number) else {
                freed += delete(segments, segment).await;
                continue;
            };
            let dead = segment.taken.saturating_sub(*live);
            if dead > 0 && dead >= segment.taken * compaction.dead_percent / 100 {
                mostly_dead.push((dead, segment));
            }
        }
        mostly_dead.sort_by_key(|(dead, segment)| (Reverse(*dead), segment.number));
        if freed >= compaction.enough {
            return Ok(freed);
        }
        for mostly_dead in mostly_dead.chunks(READ_AT_ONCE) {
            let numbers = mostly_dead.iter().map(|(_, segment)| segment.number);
            let mut located = self.located(&numbers.collect::<Vec<_>>()).await?;
            for (dead, segment) in mostly_dead {
                let located = located.remove(&segment.number).unwrap_or_default();
                match self.empty(segments, &located).await {
                    // At once, since on a full disk the next one needs its room.
                    Ok(true) => {
                        let taken = *dead;
                        let emptied = FullSegment { taken, ..*segment };
                        freed += delete(segments, emptied).await;
                    }
                    // The next job that asks for what is missing is told so, and its entry goes.
                    Ok(false) => {}
                    Err(error) if is_full(&error) => return Err(error),
                    Err(error) => cannot_free(*segment, error.cause()),
                }
                if freed >= compaction.enough {
                    return Ok(freed);
                }
            }
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

    /// The contents in these segments. It reads the whole table: an index would make each commit slower, and
    /// segments are rarely emptied.
    async fn located(&self, segments: &[u64]) -> Result<HashMap<u64, Vec<Located>>, sqlx::Error> {
        let query = format!(
            "SELECT blob, segment, start, length FROM contents WHERE segment IN {}",
            placeholders(1, segments.len())
        );
        let mut query = sqlx::query(sqlx::AssertSqlSafe(query));
        for segment in segments {
            query = query.bind(number(*segment));
        }
        let mut located: HashMap<u64, Vec<Located>> = HashMap::new();
        for row in query.fetch_all(&self.read).await? {
            if let Some(location) = stored_location(&row)? {
                let content = (BlobId(unsigned(&row, "blob")?), location);
                located.entry(location.segment).or_default().push(content);
            }
        }
        Ok(located)
    }

    /// Moves the contents of a segment, as far as they can be read. `false` if some could not.
    async fn empty(
        &self,
        segments: &Arc<Segments>,
        located: &[Located],
    ) -> Result<bool, StoreError> {
        let mut moved = 0;
        for located in located.chunks(MOVED_AT_ONCE) {
            moved += self.copy(segments, located).await?;
        }
        Ok(moved == located.len())
    }

    async fn copy(
        &self,
        segments: &Arc<Segments>,
        located: &[Located],
    ) -> Result<usize, StoreError> {
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
                    Err(error) if is_missing(&error) => {}
                    Err(error) => return Err(error),
                }
            }
            let new = segments.append(&contents)?;
            Ok(found.into_iter().zip(new).collect::<Vec<_>>())
        });
        let moved = moved.await?;
        let count = moved.len();
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
        Ok(count)
    }
}

/// Deletes a segment that no row names. Returns how many bytes of the disk are free now.
async fn delete(segments: &Arc<Segments>, segment: FullSegment) -> u64 {
    let deleted = blocking(segments, move |segments| segments.delete(segment.number));
    match deleted.await {
        Ok(()) => segment.taken,
        Err(error) => {
            cannot_free(segment, error);
            0
        }
    }
}

fn cannot_free(segment: FullSegment, error: impl std::fmt::Display) {
    let segment = segment.number;
    warn!(segment, %error, "cannot free the room of a file of small contents");
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use bytes::Bytes;
    use sqlx::Executor;

    use super::*;
    use crate::cache_protocol::store::EntryName;
    use crate::clock::Timestamp;
    use crate::serve::blob_store::digests_of_all;
    use crate::serve::catalog::{Database, SmallPart, UnwrittenCommit};

    const USUAL: Compaction = Compaction {
        dead_percent: 34,
        enough: u64::MAX,
    };

    /// A content that no other blob has, in length neither.
    fn content(blob: u64) -> Bytes {
        vec![blob as u8; 40_000 + blob as usize * 100].into()
    }

    /// A catalog with some segments full of contents.
    async fn catalog(folder: &Path, blobs: u64) -> Catalog {
        let database = Database::Sqlite(folder.join("catalog.sqlite"));
        let catalog = Catalog::open(&database).await.unwrap();
        let commits: Vec<UnwrittenCommit> = (0..blobs)
            .map(|blob| {
                let bytes = content(blob);
                UnwrittenCommit {
                    name: EntryName {
                        scope: "o/a:main".into(),
                        version: "v".into(),
                        key: format!("k{blob}"),
                    },
                    size: bytes.len() as u64,
                    content: Some(SmallPart {
                        blob: BlobId(blob),
                        digests: digests_of_all(&bytes),
                        bytes,
                    }),
                    created: Timestamp::now(),
                    now: Timestamp::now(),
                }
            })
            .collect();
        for commits in commits.chunks(20) {
            catalog.commit_unwritten(&commits.into()).await.unwrap();
        }
        catalog
    }

    fn taken(folder: &Path) -> u64 {
        let files = fs::read_dir(folder.join("contents")).unwrap();
        files
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum()
    }

    async fn delete_three_of_four(catalog: &Catalog) {
        let mut writer = catalog.writer().await.unwrap();
        writer
            .execute("DELETE FROM contents WHERE blob % 4 <> 0")
            .await
            .unwrap();
    }

    async fn read(catalog: &Catalog, blobs: &[BlobId]) -> HashMap<BlobId, std::io::Result<Bytes>> {
        catalog.contents(blobs).await.unwrap().into_iter().collect()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn each_content_that_moves_keeps_its_own_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let catalog = catalog(folder.path(), 400).await;
        delete_three_of_four(&catalog).await;
        let before = taken(folder.path());
        catalog.compact(USUAL).await.unwrap();
        let after = taken(folder.path());
        assert!(after < before / 2, "{before} {after}");
        let blobs: Vec<BlobId> = (0..400).map(BlobId).collect();
        let mut found = read(&catalog, &blobs).await;
        assert_eq!(found.len(), 100);
        for blob in (0..400).step_by(4) {
            let bytes = found.remove(&BlobId(blob)).unwrap().unwrap();
            assert!(bytes == content(blob), "{blob}");
            let in_place = catalog.content_in_place(BlobId(blob)).flatten();
            assert!(
                in_place.is_none_or(|bytes| bytes == content(blob)),
                "{blob}"
            );
        }
        // Nothing was discarded since.
        assert_eq!(catalog.compact(USUAL).await.unwrap(), 0);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_segment_that_cannot_be_read_stops_neither_the_others_nor_their_readers() {
        let folder = tempfile::tempdir().unwrap();
        let catalog = catalog(folder.path(), 400).await;
        delete_three_of_four(&catalog).await;
        catalog.close().await;
        // Reading a folder is an error of the disk, and not one that says that it is missing.
        let path = folder.path().join("contents/0000000002.segment");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let database = Database::Sqlite(folder.path().join("catalog.sqlite"));
        let catalog = Catalog::open(&database).await.unwrap();
        let before = taken(folder.path());
        catalog.compact(USUAL).await.unwrap();
        let after = taken(folder.path());
        assert!(after < before / 2, "{before} {after}");
        let blobs: Vec<BlobId> = (0..400).map(BlobId).collect();
        let found = read(&catalog, &blobs).await;
        let (good, bad): (Vec<_>, Vec<_>) = found.into_iter().partition(|(_, read)| read.is_ok());
        assert!(good.len() > 50 && !bad.is_empty(), "{}", bad.len());
        for (BlobId(blob), bytes) in good {
            assert!(bytes.unwrap() == content(blob), "{blob}");
        }
    }
}
