//! The bytes of small parts: in a segment if the database is SQLite, otherwise in their row.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use sqlx::any::AnyRow;
use sqlx::{Any, Row, Transaction};
use tokio::sync::OwnedRwLockReadGuard;

use crate::cache_protocol::azure_blob::is_missing;
use crate::cache_protocol::ids::BlobId;
use crate::serve::catalog::rows::{in_steps, number, placeholders, unsigned};
use crate::serve::catalog::segments::{ContentLocation, Segments};
use crate::serve::catalog::{Catalog, GarbageLeft};

/// How often a content is looked for: it may move to another segment after its row was read.
pub(super) const ATTEMPTS: usize = 3;

/// Contents whose rows are still to be written.
#[derive(Debug)]
pub(super) struct NewContents {
    rows: Vec<ContentRow>,
    /// In a segment they are dead unless their rows are written.
    dead: Option<GarbageLeft>,
    _unnamed: Option<OwnedRwLockReadGuard<()>>,
}

impl NewContents {
    /// Call this when their rows are written.
    pub(super) fn written(self) {
        if let Some(dead) = self.dead {
            dead.forget();
        }
    }
}

#[derive(Debug)]
struct ContentRow {
    blob: BlobId,
    bytes: ContentBytes,
}

/// Where the bytes of a content are.
#[derive(Clone, Debug)]
pub(super) enum ContentBytes {
    InRow(Bytes),
    InSegment(ContentLocation),
}

impl Catalog {
    /// Appends contents to a segment, where the database has those. They are on the disk when this returns.
    /// The caller keeps the result until their rows are written: a compaction waits for that.
    ///
    /// # Errors
    /// An error of the disk.
    pub(super) async fn store_contents(
        &self,
        contents: Vec<(BlobId, Bytes)>,
    ) -> Result<NewContents, sqlx::Error> {
        let (blobs, bytes): (Vec<BlobId>, Vec<Bytes>) = contents.into_iter().unzip();
        let mut unnamed = None;
        let stored: Vec<ContentBytes> = match self.segments() {
            // Nothing waits for a compaction then.
            _ if bytes.is_empty() => Vec::new(),
            None => bytes.into_iter().map(ContentBytes::InRow).collect(),
            Some(segments) => {
                unnamed = Some(segments.unnamed().await);
                let locations = blocking(segments, move |segments| segments.append(&bytes)).await?;
                locations.into_iter().map(ContentBytes::InSegment).collect()
            }
        };
        let stored = blobs.into_iter().zip(stored);
        Ok(NewContents {
            dead: unnamed
                .as_ref()
                .and(self.sqlite.clone())
                .map(GarbageLeft::of),
            rows: stored
                .map(|(blob, bytes)| ContentRow { blob, bytes })
                .collect(),
            _unnamed: unnamed,
        })
    }

    /// The bytes of these blobs, as far as they are there, in any order. One that cannot be read has an error
    /// of its own.
    ///
    /// # Errors
    /// An error of the database.
    pub async fn contents(
        &self,
        blobs: &[BlobId],
    ) -> Result<Vec<(BlobId, io::Result<Bytes>)>, sqlx::Error> {
        let mut contents = Vec::with_capacity(blobs.len());
        let mut left = blobs.to_vec();
        for _ in 0..ATTEMPTS {
            let mut located = Vec::new();
            for (blob, bytes) in self.stored_contents(&left).await? {
                match bytes {
                    ContentBytes::InRow(bytes) => contents.push((blob, Ok(bytes))),
                    ContentBytes::InSegment(location) => located.push((blob, location)),
                }
            }
            left.clear();
            let Some(segments) = self.segments() else {
                break;
            };
            if located.is_empty() {
                break;
            }
            let read = blocking(segments, move |segments| {
                let read = |(blob, location)| (blob, segments.read(location));
                Ok(located.into_iter().map(read).collect::<Vec<_>>())
            });
            for (blob, bytes) in read.await? {
                match bytes {
                    Err(error) if is_missing(&error) => left.push(blob),
                    bytes => contents.push((blob, bytes)),
                }
            }
        }
        Ok(contents)
    }

    async fn stored_contents(
        &self,
        blobs: &[BlobId],
    ) -> Result<Vec<(BlobId, ContentBytes)>, sqlx::Error> {
        let mut stored = Vec::with_capacity(blobs.len());
        for blobs in in_steps(blobs) {
            let query = format!(
                "SELECT blob, content, segment, start, length FROM contents WHERE blob IN {}",
                placeholders(1, blobs.len())
            );
            let mut query = sqlx::query(sqlx::AssertSqlSafe(query));
            for blob in blobs {
                query = query.bind(number(*blob));
            }
            for row in query.fetch_all(&self.quick).await? {
                stored.push((BlobId(unsigned(&row, "blob")?), stored_bytes(&row)?));
            }
        }
        Ok(stored)
    }
}

/// Does something that waits for the disk.
pub(super) async fn blocking<T: Send + 'static>(
    segments: &Arc<Segments>,
    work: impl FnOnce(&Segments) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let segments = segments.clone();
    let done = tokio::task::spawn_blocking(move || work(&segments)).await;
    done.map_err(io::Error::other)?
}

fn stored_bytes(row: &AnyRow) -> Result<ContentBytes, sqlx::Error> {
    if let Some(location) = stored_location(row)? {
        return Ok(ContentBytes::InSegment(location));
    }
    let content: &[u8] = row.try_get("content")?;
    Ok(ContentBytes::InRow(Bytes::copy_from_slice(content)))
}

/// Where a content lies, if it is in a segment.
pub(super) fn stored_location(row: &AnyRow) -> Result<Option<ContentLocation>, sqlx::Error> {
    let segment: Option<i64> = row.try_get("segment")?;
    if segment.is_none() {
        return Ok(None);
    }
    Ok(Some(ContentLocation {
        segment: unsigned(row, "segment")?,
        start: unsigned(row, "start")?,
        length: unsigned(row, "length")?,
    }))
}

pub(super) async fn insert_contents(
    transaction: &mut Transaction<'_, Any>,
    contents: &NewContents,
) -> Result<(), sqlx::Error> {
    for contents in in_steps(&contents.rows) {
        let query = format!(
            "INSERT INTO contents (blob, content, segment, start, length) VALUES {}",
            placeholders(contents.len(), 5)
        );
        let mut query = sqlx::query(sqlx::AssertSqlSafe(query));
        for ContentRow { blob, bytes } in contents {
            let (row, location) = match bytes {
                ContentBytes::InRow(bytes) => (&bytes[..], None),
                ContentBytes::InSegment(location) => (&[][..], Some(location)),
            };
            query = query
                .bind(number(*blob))
                .bind(row)
                .bind(location.map(|location| number(location.segment)))
                .bind(location.map(|location| number(location.start)))
                .bind(location.map(|location| number(location.length)));
        }
        query.execute(&mut **transaction).await?;
    }
    Ok(())
}
