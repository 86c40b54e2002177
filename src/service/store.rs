//! What a cache service needs of its storage, and the rules by which entries are found.

use std::future::Future;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};
use tokio::fs::File;

/// The longest key, in characters (GitHub's documentation of dependency caching).
pub const KEY_LIMIT: usize = 512;

/// How many keys one look-up may name: the key and its restore keys (`checkKey` and
/// `restoreCache` of `@actions/cache`).
pub const KEYS_LIMIT: usize = 10;

/// The longest version, in bytes. Clients send a digest in hex, 64 of them, or what they are asked to.
pub const VERSION_LIMIT: usize = 512;

/// The part of the cache that belongs to one ref. Entries of one scope are unseen from another,
/// unless a token says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Scope(pub Arc<str>);

impl From<&str> for Scope {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

/// What names an entry: no two entries have the same.
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
    /// The entry's number. Later ones are greater.
    pub id: u64,
    /// Its name.
    #[serde(flatten)]
    pub name: EntryName,
    /// Its size in bytes.
    pub size: u64,
    /// When it was committed, in milliseconds since 1970.
    pub created: u64,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query<'a> {
    /// The scopes to look in, best first.
    pub scopes: &'a [Scope],
    /// The version the entry must have.
    pub version: &'a str,
    /// The keys to look for, best first.
    pub keys: &'a [&'a str],
}

/// Why a storage did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is an entry of this name, or one is being uploaded.
    #[error("cache entry with the same key, version, and scope already exists")]
    AlreadyExists,
    /// No entry of this name or number is being uploaded.
    #[error("there is no such upload")]
    NoSuchUpload,
    /// The upload is being written or committed right now.
    #[error("the upload is still being written")]
    Busy,
    /// The upload is not as long as its client says.
    #[error("the upload has {actual} bytes, not {claimed}")]
    SizeMismatch {
        /// What was received.
        actual: u64,
        /// What the client says.
        claimed: u64,
    },
    /// The upload names a block that was not uploaded.
    #[error("the block list names a block that was not uploaded")]
    NoSuchBlock,
    /// The entry is larger than the service takes.
    #[error("a cache entry may have at most {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// The client broke off.
    #[error("the request ended early: {0}")]
    Interrupted(String),
    /// The storage itself failed. Clients are told no more than that; the log says what it was.
    #[error("the storage failed")]
    Io(#[from] io::Error),
    /// A database or another service that the storage is on failed.
    #[error("the storage failed")]
    Behind(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl StoreError {
    /// What the log says of it; of the storage's own errors that is more than clients are told.
    pub fn cause(&self) -> String {
        match self {
            Self::Io(error) => error.to_string(),
            Self::Behind(error) => error.to_string(),
            error => error.to_string(),
        }
    }

    /// Logs it where it is the storage that is to blame, not who asked.
    pub fn log(&self) {
        if matches!(self, Self::Io(_) | Self::Behind(_)) {
            tracing::error!(cause = self.cause(), "a request failed");
        }
    }
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
        /// Where the content begins in it, in bytes.
        start: u64,
        /// The content's size in bytes.
        size: u64,
    },
    /// What is elsewhere.
    Elsewhere(Box<dyn Readable>),
}

/// A stream of content.
pub type Bytestream = BoxStream<'static, io::Result<Bytes>>;

/// Content that is not on this machine, or not in one file.
pub trait Readable: std::fmt::Debug + Send + Sync {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// The `length` bytes from `first` on, which must be within it, as a stream whose first item is
    /// there already.
    ///
    /// # Errors
    /// Where the first of them cannot be read.
    fn read(&self, first: u64, length: u64) -> BoxFuture<'_, io::Result<Bytestream>>;
}

impl Content {
    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { size, .. } => *size,
            Self::Elsewhere(content) => content.size(),
        }
    }
}

/// A piece of an upload, or why it ends.
pub type Piece = Result<Bytes, StoreError>;

/// Storage for cache entries. A method's cost in memory does not depend on an entry's size.
pub trait Store: Send + Sync + 'static {
    /// Reserves `name` and gives the upload's number.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] where the name is taken.
    fn reserve(&self, name: EntryName) -> impl Future<Output = Result<u64, StoreError>> + Send;

    /// Whether an entry of `size` bytes would be taken.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] where not.
    fn check_size(&self, size: u64) -> Result<(), StoreError>;

    /// The number of the upload that was reserved under `name`.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] where there is none.
    fn upload_of(&self, name: &EntryName) -> impl Future<Output = Result<u64, StoreError>> + Send;

    /// The name under which `upload` was reserved.
    ///
    /// # Errors
    /// [`StoreError::NoSuchUpload`] where there is none.
    fn name_of(&self, upload: u64) -> impl Future<Output = Result<EntryName, StoreError>> + Send;

    /// Writes at `offset` of `upload`; `whole` drops what was written before.
    ///
    /// # Errors
    /// Where there is no such upload, the entry grows too large, or the stream or the disk fails.
    fn write(
        &self,
        upload: u64,
        offset: u64,
        whole: bool,
        pieces: impl Stream<Item = Piece> + Send,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Writes one block of `upload`, to be put in its place by [`Store::join_blocks`].
    ///
    /// # Errors
    /// As [`Store::write`].
    fn write_block(
        &self,
        upload: u64,
        block: &str,
        pieces: impl Stream<Item = Piece> + Send,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Makes `blocks`, in this order, the content of `upload`.
    ///
    /// # Errors
    /// [`StoreError::NoSuchBlock`] besides those of [`Store::write`].
    fn join_blocks(
        &self,
        upload: u64,
        blocks: Vec<String>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Makes `upload` an entry, which from then on is found.
    ///
    /// # Errors
    /// [`StoreError::SizeMismatch`] where it has not `size` bytes.
    fn commit(
        &self,
        upload: u64,
        size: u64,
    ) -> impl Future<Output = Result<Entry, StoreError>> + Send;

    /// The entry that `query` asks for.
    fn find(&self, query: &Query<'_>) -> impl Future<Output = Option<Entry>> + Send;

    /// The content of the entry of this number, or `None` where it is gone.
    fn open(&self, entry: u64) -> impl Future<Output = Option<Content>> + Send;

    /// Told that the content of an entry cannot be read: it is no entry any more.
    fn lost(&self, entry: u64) -> impl Future<Output = ()> + Send;
}

/// Why a key or a list of keys is refused.
///
/// # Errors
/// Where a key is empty, longer than [`KEY_LIMIT`] or has a comma or a NUL, or there are more than
/// [`KEYS_LIMIT`].
pub fn check_keys<'a>(keys: impl IntoIterator<Item = &'a str>) -> Result<(), String> {
    let mut count = 0;
    for key in keys {
        count += 1;
        if key.is_empty() {
            return Err("a key must not be empty".to_owned());
        }
        if key.chars().count() > KEY_LIMIT {
            return Err(format!("a key may have at most {KEY_LIMIT} characters"));
        }
        if key.contains(',') {
            return Err("a key must not contain a comma".to_owned());
        }
        // PostgreSQL keeps none in a text.
        if key.contains('\0') {
            return Err("a key must not contain a NUL".to_owned());
        }
    }
    if count > KEYS_LIMIT {
        return Err(format!("at most {KEYS_LIMIT} keys may be named"));
    }
    Ok(())
}

/// Why a version is refused.
///
/// # Errors
/// Where it is longer than [`VERSION_LIMIT`] or has a NUL.
pub fn check_version(version: &str) -> Result<(), String> {
    if version.len() > VERSION_LIMIT {
        return Err(format!("a version may have at most {VERSION_LIMIT} bytes"));
    }
    if version.contains('\0') {
        return Err("a version must not contain a NUL".to_owned());
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
