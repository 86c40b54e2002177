//! What a cache service needs of its storage, and the rules by which entries are found.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::Stream;
use serde::{Deserialize, Serialize};
use tokio::fs::File;

/// The longest key, in characters (GitHub's documentation of dependency caching).
pub const KEY_LIMIT: usize = 512;

/// How many keys one look-up may name: the key and its restore keys (`checkKey` and
/// `restoreCache` of `@actions/cache`).
pub const KEYS_LIMIT: usize = 10;

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
    /// The storage itself failed.
    #[error(transparent)]
    Io(#[from] io::Error),
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
}

impl Content {
    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { size, .. } => *size,
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
    fn reserve(&self, name: EntryName) -> Result<u64, StoreError>;

    /// Whether an entry of `size` bytes would be taken.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] where not.
    fn check_size(&self, size: u64) -> Result<(), StoreError>;

    /// The number of the upload that was reserved under `name`.
    fn upload_of(&self, name: &EntryName) -> Option<u64>;

    /// The name under which `upload` was reserved.
    fn name_of(&self, upload: u64) -> Option<EntryName>;

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
}

/// The entries that a look-up goes through: by scope and version, then by key.
#[derive(Debug, Default)]
pub struct Index {
    entries: BTreeMap<(Scope, String), BTreeMap<String, Entry>>,
}

impl Index {
    /// Adds `entry`, in place of one with the same name.
    pub fn insert(&mut self, entry: Entry) {
        let group = (entry.name.scope.clone(), entry.name.version.clone());
        self.entries
            .entry(group)
            .or_default()
            .insert(entry.name.key.clone(), entry);
    }

    /// Takes the entry called `name` out.
    pub fn remove(&mut self, name: &EntryName) -> Option<Entry> {
        let group = (name.scope.clone(), name.version.clone());
        self.entries.get_mut(&group)?.remove(&name.key)
    }

    /// Whether there is an entry called `name`.
    pub fn contains(&self, name: &EntryName) -> bool {
        let group = (name.scope.clone(), name.version.clone());
        self.entries
            .get(&group)
            .is_some_and(|keys| keys.contains_key(&name.key))
    }

    /// The entry that `query` asks for, in the order of GitHub's documentation: scope by scope, key
    /// by key, first the entry with exactly that key, then the newest of those that begin with it.
    pub fn find(&self, query: &Query<'_>) -> Option<&Entry> {
        query.scopes.iter().find_map(|scope| {
            let group = (scope.clone(), query.version.to_owned());
            let keys = self.entries.get(&group)?;
            query
                .keys
                .iter()
                .find_map(|key| keys.get(*key).or_else(|| newest_with_prefix(keys, key)))
        })
    }

    /// All entries, in no order of meaning.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().flat_map(BTreeMap::values)
    }
}

fn newest_with_prefix<'a>(keys: &'a BTreeMap<String, Entry>, prefix: &str) -> Option<&'a Entry> {
    keys.range(prefix.to_owned()..)
        .take_while(|(key, _)| key.starts_with(prefix))
        .map(|(_, entry)| entry)
        .max_by_key(|entry| entry.id)
}

/// Why a key or a list of keys is refused.
///
/// # Errors
/// Where a key is empty, longer than [`KEY_LIMIT`] or has a comma, or there are more than
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
    }
    if count > KEYS_LIMIT {
        return Err(format!("at most {KEYS_LIMIT} keys may be named"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(id: u64, scope: &str, version: &str, key: &str) -> Entry {
        let name = EntryName {
            scope: scope.into(),
            version: version.to_owned(),
            key: key.to_owned(),
        };
        Entry {
            id,
            name,
            size: 0,
            created: 0,
        }
    }

    fn index(entries: &[Entry]) -> Index {
        let mut index = Index::default();
        for entry in entries {
            index.insert(entry.clone());
        }
        index
    }

    fn found(index: &Index, scopes: &[&str], version: &str, keys: &[&str]) -> Option<u64> {
        let scopes: Vec<Scope> = scopes.iter().map(|scope| Scope::from(*scope)).collect();
        let query = Query {
            scopes: &scopes,
            version,
            keys,
        };
        index.find(&query).map(|entry| entry.id)
    }

    #[test]
    fn an_exact_key_wins_over_a_newer_one_that_begins_with_it() {
        let index = index(&[entry(1, "s", "v", "a"), entry(2, "s", "v", "ab")]);
        assert_eq!(found(&index, &["s"], "v", &["a"]), Some(1));
        assert_eq!(found(&index, &["s"], "v", &["x", "a"]), Some(1));
    }

    #[test]
    fn among_those_that_begin_with_a_key_the_newest_wins() {
        let index = index(&[
            entry(3, "s", "v", "a-1"),
            entry(9, "s", "v", "a-2"),
            entry(5, "s", "v", "a-3"),
            entry(11, "s", "v", "b"),
        ]);
        assert_eq!(found(&index, &["s"], "v", &["a-"]), Some(9));
        assert_eq!(found(&index, &["s"], "v", &["c"]), None);
    }

    #[test]
    fn an_own_entry_shadows_the_default_branchs_newer_one() {
        let index = index(&[entry(1, "pr", "v", "a-1"), entry(2, "main", "v", "a-2")]);
        assert_eq!(found(&index, &["pr", "main"], "v", &["a-"]), Some(1));
        assert_eq!(found(&index, &["main"], "v", &["a-"]), Some(2));
        assert_eq!(found(&index, &["other"], "v", &["a-"]), None);
    }

    #[test]
    fn another_version_is_unseen() {
        let index = index(&[entry(1, "s", "v", "a")]);
        assert_eq!(found(&index, &["s"], "w", &["a"]), None);
    }

    #[test]
    fn keys_that_github_refuses_are_refused() {
        let long = "é".repeat(KEY_LIMIT);
        assert!(check_keys([long.as_str()]).is_ok());
        assert!(check_keys([format!("{long}x").as_str()]).is_err());
        assert!(check_keys(["a,b"]).is_err());
        assert!(check_keys([""]).is_err());
        assert!(check_keys(vec!["a"; KEYS_LIMIT]).is_ok());
        assert!(check_keys(vec!["a"; KEYS_LIMIT + 1]).is_err());
    }

    proptest! {
        /// Against the definition, spelt out without a sorted map.
        #[test]
        fn a_look_up_finds_what_the_definition_says(
            keys in prop::collection::vec("[ab]{1,4}", 1..12),
            asked in prop::collection::vec("[ab]{1,3}", 1..4),
        ) {
            let entries: Vec<Entry> = keys
                .iter()
                .enumerate()
                .map(|(id, key)| entry(id as u64, if id % 2 == 0 { "s" } else { "t" }, "v", key))
                .collect();
            // A later entry of the same name replaces the earlier one.
            let live: Vec<&Entry> = entries
                .iter()
                .filter(|entry| entries.iter().rfind(|other| other.name == entry.name) == Some(entry))
                .collect();
            let expected = ["s", "t"].iter().find_map(|scope| {
                asked.iter().find_map(|key| {
                    let mine = || live.iter().filter(|entry| &*entry.name.scope.0 == *scope);
                    mine().find(|entry| entry.name.key == *key).or_else(|| {
                        mine()
                            .filter(|entry| entry.name.key.starts_with(key.as_str()))
                            .max_by_key(|entry| entry.id)
                    })
                })
            });
            let asked: Vec<&str> = asked.iter().map(String::as_str).collect();
            prop_assert_eq!(
                found(&index(&entries), &["s", "t"], "v", &asked),
                expected.map(|entry| entry.id)
            );
        }
    }
}
