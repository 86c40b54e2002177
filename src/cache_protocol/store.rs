//! The interface between a cache service and its storage, and the limits of keys and versions.

use std::future::Future;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};
use tokio::fs::File;

use crate::cache_protocol::ids::{EntryId, UploadId};
use crate::clock::Timestamp;

pub use crate::cache_protocol::store_error::StoreError;

/// The longest key, in characters (GitHub's documentation of dependency caching).
pub const KEY_LIMIT: usize = 512;

/// How many keys one look-up may name: the key and its restore keys (`checkKey` and
/// `restoreCache` of `@actions/cache`).
pub const KEYS_LIMIT: usize = 10;

/// The longest version, in bytes. Clients send a digest of 64 hexadecimal digits, or the text that
/// their user configures.
pub const VERSION_LIMIT: usize = 512;

/// How many blocks or pieces an upload may have: as many blocks as Azure's block lists.
pub const PARTS_LIMIT: u64 = 50_000;

/// The part of the cache that belongs to one ref. Jobs of another scope do not see its entries,
/// unless their token allows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Scope(pub Arc<str>);

impl From<&str> for Scope {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

/// The name of an entry: no two entries have the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EntryName {
    /// Its scope.
    pub scope: Scope,
    /// Its version: a digest by which clients tell entries of one key apart.
    pub version: String,
    /// Its key.
    pub key: String,
}

/// A committed entry. It never changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its number.
    pub id: EntryId,
    /// Its name.
    #[serde(flatten)]
    pub name: EntryName,
    /// Its size in bytes.
    pub size: u64,
    /// When it was committed.
    pub created: Timestamp,
}

/// A look-up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query<'a> {
    /// The scopes to look in, best first.
    pub scopes: &'a [Scope],
    /// The version the entry must have.
    pub version: &'a str,
    /// The keys to look for, best first.
    pub keys: &'a [&'a str],
}

/// An entry's content.
#[derive(Debug)]
pub enum Content {
    /// All of it.
    Bytes(Bytes),
    /// A part of a file.
    File {
        /// The file.
        file: File,
        /// The position of the content in it, in bytes.
        start: u64,
        /// The content's size in bytes.
        size: u64,
    },
    /// Content that is not on this machine, or not in one file.
    Remote(Box<dyn RangeRead>),
}

/// A stream of content.
pub type Bytestream = BoxStream<'static, io::Result<Bytes>>;

/// Content that is not on this machine, or not in one file.
pub trait RangeRead: std::fmt::Debug + Send + Sync {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// The `length` bytes from `first` on, which must be within it, as a stream whose first item is
    /// available at once.
    ///
    /// # Errors
    /// Fails if the first of them cannot be read.
    fn read(&self, first: u64, length: u64) -> BoxFuture<'_, io::Result<Bytestream>>;
}

impl Content {
    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { size, .. } => *size,
            Self::Remote(content) => content.size(),
        }
    }
}

/// A piece of an upload, or why it ends.
pub type Chunk = Result<Bytes, StoreError>;

/// Storage for cache entries. A method's cost in memory does not depend on an entry's size.
pub trait Store: Send + Sync + 'static {
    /// Reserves `name` and returns the upload's number.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] if the name is taken.
    fn reserve(&self, name: EntryName)
    -> impl Future<Output = Result<UploadId, StoreError>> + Send;

    /// Whether the store accepts an entry of `size` bytes.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] if not.
    fn check_size(&self, size: u64) -> Result<(), StoreError>;

    /// The number of the upload that was reserved under `name`.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] if there is none.
    fn upload_of(
        &self,
        name: &EntryName,
    ) -> impl Future<Output = Result<UploadId, StoreError>> + Send;

    /// The name under which `upload` was reserved.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] if there is none.
    fn name_of(
        &self,
        upload: UploadId,
    ) -> impl Future<Output = Result<EntryName, StoreError>> + Send;

    /// Writes at `offset` of `upload`; `truncate` drops everything that was written before.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] if there is none, [`StoreError::TooLarge`] if the entry exceeds
    /// its limit, [`StoreError::Crowded`] or [`StoreError::Full`] if there is no room, and the
    /// errors of the stream and of the storage.
    fn write(
        &self,
        upload: UploadId,
        offset: u64,
        truncate: bool,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Writes one block of `upload`. [`Store::join_blocks`] puts it in its place.
    ///
    /// # Errors
    /// As [`Store::write`].
    fn write_block(
        &self,
        upload: UploadId,
        block: &str,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Makes `blocks`, in this order, the content of `upload`.
    ///
    /// # Errors
    /// [`StoreError::NoSuchBlock`], and those of [`Store::write`].
    fn join_blocks(
        &self,
        upload: UploadId,
        blocks: Vec<String>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Makes `upload` an entry, which from then on is found.
    ///
    /// # Errors
    /// [`StoreError::SizeMismatch`] if it has not `size` bytes.
    fn commit(
        &self,
        upload: UploadId,
        size: u64,
    ) -> impl Future<Output = Result<Entry, StoreError>> + Send;

    /// The entry that `query` asks for.
    fn find(&self, query: &Query<'_>) -> impl Future<Output = Option<Entry>> + Send;

    /// The content of the entry of this number, or `None` if it is gone.
    fn open(&self, entry: EntryId) -> impl Future<Output = Option<Content>> + Send;

    /// Marks the content of an entry as missing or damaged: the store drops the entry.
    fn mark_missing(&self, entry: EntryId) -> impl Future<Output = ()> + Send;
}

/// A request names keys or a version that no service takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A key is empty.
    #[error("a key must not be empty")]
    EmptyKey,
    /// A key is longer than [`KEY_LIMIT`].
    #[error("a key may have at most {KEY_LIMIT} characters")]
    LongKey,
    /// A key has a comma, which separates keys in version 1.
    #[error("a key must not contain a comma")]
    CommaInKey,
    /// A key has a NUL, which PostgreSQL keeps in no text.
    #[error("a key must not contain a NUL")]
    NulInKey,
    /// There are more keys than [`KEYS_LIMIT`].
    #[error("at most {KEYS_LIMIT} keys may be named")]
    ManyKeys,
    /// The version is longer than [`VERSION_LIMIT`].
    #[error("a version may have at most {VERSION_LIMIT} bytes")]
    LongVersion,
    /// The version has a NUL.
    #[error("a version must not contain a NUL")]
    NulInVersion,
}

/// Checks the keys of a request.
///
/// # Errors
/// Fails with the first rule that a key breaks.
pub fn check_keys<'a>(keys: impl IntoIterator<Item = &'a str>) -> Result<(), NameError> {
    let mut count = 0;
    for key in keys {
        count += 1;
        if key.is_empty() {
            return Err(NameError::EmptyKey);
        }
        if key.chars().count() > KEY_LIMIT {
            return Err(NameError::LongKey);
        }
        if key.contains(',') {
            return Err(NameError::CommaInKey);
        }
        if key.contains('\0') {
            return Err(NameError::NulInKey);
        }
    }
    if count > KEYS_LIMIT {
        return Err(NameError::ManyKeys);
    }
    Ok(())
}

/// Checks the version of a request.
///
/// # Errors
/// Fails with [`NameError::LongVersion`] or [`NameError::NulInVersion`].
pub fn check_version(version: &str) -> Result<(), NameError> {
    if version.len() > VERSION_LIMIT {
        return Err(NameError::LongVersion);
    }
    if version.contains('\0') {
        return Err(NameError::NulInVersion);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_github_refuses_are_refused() {
        let long = "é".repeat(KEY_LIMIT);
        assert!(check_keys([long.as_str()]).is_ok());
        assert!(check_keys([format!("{long}x").as_str()]).is_err());
        assert!(check_keys(["a,b"]).is_err());
        assert!(check_keys(["a\0b"]).is_err());
        assert!(check_keys([""]).is_err());
        assert!(check_keys(vec!["a"; KEYS_LIMIT]).is_ok());
        assert!(check_keys(vec!["a"; KEYS_LIMIT + 1]).is_err());
    }

    #[test]
    fn a_version_has_a_limit_too() {
        assert!(check_version("").is_ok());
        assert!(check_version(&"f".repeat(VERSION_LIMIT)).is_ok());
        assert!(check_version(&"f".repeat(VERSION_LIMIT + 1)).is_err());
        assert!(check_version("a\0").is_err());
    }
}
