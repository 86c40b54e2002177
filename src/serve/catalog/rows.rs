//! Reads and writes values of rows, and lays out statements of several rows.

use sqlx::Row;
use sqlx::any::AnyRow;

use crate::cache_protocol::blob_digests::Digests;
use crate::cache_protocol::ids::BlobId;
use crate::cache_protocol::parts::{Part, ReceivedPart};
use crate::cache_protocol::store::{EntryName, StoreError};
use crate::clock::Timestamp;

/// How many rows one statement writes or reads; more rows are split into steps of these sizes, so
/// that each connection keeps its statements prepared.
const ROWS: [usize; 7] = [64, 32, 16, 8, 4, 2, 1];

/// A number as the databases have them. Ids and sizes stay far below.
pub(super) fn number(value: impl Into<u64>) -> i64 {
    i64::try_from(value.into()).unwrap_or(i64::MAX)
}

/// A time as the databases have them: in milliseconds since 1970.
pub(super) fn milliseconds(time: Timestamp) -> i64 {
    number(time.milliseconds())
}

pub(super) fn timestamp(row: &AnyRow, column: &str) -> Result<Timestamp, sqlx::Error> {
    unsigned(row, column).map(Timestamp::from_milliseconds)
}

pub(super) fn unsigned(row: &AnyRow, column: &str) -> Result<u64, sqlx::Error> {
    let value: i64 = row.try_get(column)?;
    Ok(u64::try_from(value).unwrap_or(0))
}

pub(super) fn decode_parts(text: &str) -> Result<Vec<Part>, sqlx::Error> {
    serde_json::from_str(text).map_err(|error| sqlx::Error::Decode(error.into()))
}

pub(super) fn encode<T: serde::Serialize + ?Sized>(value: &T) -> Result<String, sqlx::Error> {
    serde_json::to_string(value).map_err(|error| sqlx::Error::Encode(error.into()))
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        Self::Backend(error.into())
    }
}

pub(super) fn entry_name(row: &AnyRow) -> Result<EntryName, sqlx::Error> {
    let scope: &str = row.try_get("scope")?;
    Ok(EntryName {
        scope: scope.into(),
        version: row.try_get("version")?,
        key: row.try_get("key")?,
    })
}

/// A part as it was received, or `None` if it is still being written.
pub(super) fn received(row: &AnyRow) -> Result<Option<ReceivedPart>, sqlx::Error> {
    let size: Option<i64> = row.try_get("size")?;
    let Some(size) = size else { return Ok(None) };
    Ok(Some(ReceivedPart {
        blob: BlobId(unsigned(row, "id")?),
        block: row.try_get("block")?,
        start: unsigned(row, "start")?,
        size: u64::try_from(size).unwrap_or(0),
        digests: digests(row)?,
        inside: is_inside(row)?,
    }))
}

/// Whether the bytes of a part are in the database. Older services have no such column.
pub(super) fn is_inside(row: &AnyRow) -> Result<bool, sqlx::Error> {
    let inside: Option<i64> = row.try_get("inside")?;
    Ok(inside.is_some_and(|inside| inside != 0))
}

/// The digests of a part; none if an older service wrote it without digests.
fn digests(row: &AnyRow) -> Result<Digests, sqlx::Error> {
    let text: Option<String> = row.try_get("digests")?;
    let unreadable = || sqlx::Error::Decode("unreadable digests".into());
    text.map_or(Ok(Digests::default()), |text| {
        Digests::decode(&text).ok_or_else(unreadable)
    })
}

/// `all` in slices of as many as a statement takes.
pub(super) fn in_steps<T>(mut all: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = ROWS.into_iter().find(|size| *size <= all.len())?;
        let (step, rest) = all.split_at(size);
        all = rest;
        Some(step)
    })
}

/// The placeholders of `rows` rows with `columns` columns.
pub(super) fn placeholders(rows: usize, columns: usize) -> String {
    let row = |row: usize| {
        let own: Vec<String> = (1..=columns)
            .map(|column| format!("${}", row * columns + column))
            .collect();
        format!("({})", own.join(", "))
    };
    (0..rows).map(row).collect::<Vec<_>>().join(", ")
}
