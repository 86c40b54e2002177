//! The entries of one scope, numbered one after the other.
//!
//! ```text
//! sccache-packs/NAMESPACE/linux-x64/refs/heads/main#00000007
//! ```
//!
//! Each entry has the index of all packs of the scope, so a reader needs the newest only. The cache
//! service grants a key once, which makes the number a lock that nobody has to hold: whoever finds
//! the next number taken reads that entry, or, where its writer is still at it, notes its key as
//! not merged, and takes the number after it. Thus every entry's index has all entries before it, or
//! names them, and no job's objects are lost however many jobs end at the same moment.
//!
//! Keys carry the scope's name because entries of a job's own ref hide those of its base in a
//! look-up by prefix.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use futures_util::TryStreamExt;

use crate::github::cache_client::{CacheClient, CacheError, Download, Found, Reserved, Upload};
use crate::service::auth;
use crate::store::index::{Digest, Index};
use crate::store::pack::{HEADER_LENGTH, Header, PackError};

/// How much of an entry is read at first, in bytes: more than most indexes have.
const FIRST_READ: u64 = 256 * 1024;

/// How many entries are read at most for one scope. Each is one that several jobs wrote at the same
/// time, and the next to be written has them all.
const ENTRIES_READ: usize = 24;

/// How many entries before one that is damaged are tried in its place.
const STEPS_BACK: u64 = 2;

/// How many numbers in a row may turn out to be taken.
const RESERVATION_ATTEMPTS: usize = 12;

/// The longest part of a key that a namespace or a scope makes up, in characters. A key has at most
/// 512.
const PART_LIMIT: usize = 180;

/// The keys of one scope's entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    prefix: String,
}

impl Chain {
    /// The chain of `scope` (a ref) for objects of `namespace` on `platform`.
    pub fn new(namespace: &str, platform: &str, scope: &str) -> Self {
        let namespace = key_part(namespace);
        let scope = key_part(scope);
        Self {
            prefix: format!("{PREFIX}{namespace}/{platform}/{scope}#"),
        }
    }

    /// The key of the entry with this number.
    pub fn key(&self, number: u64) -> String {
        format!("{}{number:08}", self.prefix)
    }

    /// The number of the entry with this key, where a writer would have written it so.
    pub fn number(&self, key: &str) -> Option<u64> {
        let number = key.strip_prefix(&self.prefix)?.parse().ok()?;
        (self.key(number) == key).then_some(number)
    }
}

/// What the key of one of our entries says of it to whoever lists the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackName {
    /// The namespace, as it is in keys.
    pub namespace: String,
    /// The platform, such as `linux-x64`.
    pub platform: String,
    /// The scope, as it is in keys: the ref, but for letters that a key cannot have.
    pub scope: String,
    /// Its number in the chain.
    pub number: u64,
}

/// What the keys of all our entries begin with.
pub const PREFIX: &str = "sccache-packs/";

impl PackName {
    /// Takes apart the key of an entry of the ref `reference`, where that is known. `None` where
    /// the key is not one of ours.
    pub fn parse(key: &str, reference: Option<&str>) -> Option<Self> {
        let (chain, number) = key.strip_prefix(PREFIX)?.rsplit_once('#')?;
        if number.len() < 8 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        // Both a namespace and a ref may have slashes. The ref is known where GitHub tells it; else
        // it is what follows the first part that looks like a platform.
        let by_reference = reference.and_then(|reference| {
            let scope = key_part(reference);
            let before = chain.strip_suffix(&scope)?.strip_suffix('/')?;
            let (namespace, platform) = before.rsplit_once('/')?;
            Some((namespace, platform, scope))
        });
        let (namespace, platform, scope) = by_reference.or_else(|| {
            let mut from = 0;
            loop {
                let start = from + chain.get(from..)?.find('/')? + 1;
                let (platform, scope) = chain.get(start..)?.split_once('/')?;
                if is_platform(platform) {
                    return Some((chain.get(..start - 1)?, platform, scope.to_owned()));
                }
                from = start;
            }
        })?;
        let is_whole = is_platform(platform) && !namespace.is_empty() && !scope.is_empty();
        Some(Self {
            namespace: namespace.to_owned(),
            platform: platform.to_owned(),
            scope,
            number: number.parse().ok()?,
        })
        .filter(|_| is_whole)
    }

    /// Whether it is of this namespace, as the input has it.
    pub fn is_of(&self, namespace: &str) -> bool {
        self.namespace == key_part(namespace)
    }
}

/// Whether text has the form of a runner's platform: node's names of a system and of a processor.
fn is_platform(text: &str) -> bool {
    let systems = ["linux", "darwin", "win32", "freebsd"];
    text.split_once('-').is_some_and(|(system, processor)| {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        systems.contains(&system) && !processor.is_empty() && processor.chars().all(plain)
    })
}

/// Text as part of a key: what a key may not have, or would make two keys alike, is replaced, with
/// a digest behind it so that different texts stay different.
fn key_part(text: &str) -> String {
    // No capitals: the services of `act` and its kin answer with keys in small letters.
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_./".contains(c);
    if !text.is_empty() && text.len() <= PART_LIMIT && text.chars().all(plain) {
        return text.to_owned();
    }
    let kept: String = text
        .chars()
        .map(|c| c.to_ascii_lowercase())
        .map(|c| if plain(c) { c } else { '_' })
        .take(PART_LIMIT)
        .collect();
    let digest = hex::encode(Digest::of(text.as_bytes()).as_bytes());
    format!("{kept}~{digest}")
}

/// What is known of a chain.
#[derive(Debug)]
pub struct Known {
    /// The keys of its entries.
    pub chain: Chain,
    /// All that its entries say.
    pub index: Index,
    /// The greatest number that is known to be taken.
    pub newest: u64,
    /// Entries that were found on the way, which need not be looked up again, each with the first
    /// bytes of its data that came along with the index.
    pub found: HashMap<String, (Found, Vec<u8>)>,
    /// The keys whose index is in `index`.
    merged: HashSet<String>,
    /// The first entry that could not be read, and why.
    pub unreadable: Option<String>,
}

impl Known {
    /// Nothing yet of `chain`.
    pub fn nothing(chain: Chain) -> Self {
        Self {
            chain,
            index: Index::default(),
            newest: 0,
            found: HashMap::new(),
            merged: HashSet::new(),
            unreadable: None,
        }
    }

    /// Reads what was written since.
    ///
    /// # Errors
    /// Where the service does not answer. Entries that are gone or damaged are no error: what they
    /// had is not found.
    pub async fn catch_up(&mut self, client: &CacheClient) -> Result<(), CacheError> {
        let prefix = self.chain.prefix.clone();
        // The key alone would do at GitHub; others take only restore keys for prefixes.
        let Some(newest) = client.find(&prefix, &[&prefix]).await? else {
            return Ok(());
        };
        let Some(number) = self.chain.number(&newest.key) else {
            return Ok(());
        };
        self.read(client, newest).await?;
        let mut number = number;
        // Look-ups lag behind what was written, and the newest by time may not be the last by
        // number.
        while let Some(following) = number.checked_add(1)
            && let Some(next) = find_exactly(client, &self.chain.key(following)).await?
        {
            self.read(client, next).await?;
            number = following;
            if self.merged.len() >= ENTRIES_READ {
                break;
            }
        }
        let mut back = 0;
        while self.merged.is_empty() && back < STEPS_BACK && number > back + 1 {
            back += 1;
            if let Some(earlier) = find_exactly(client, &self.chain.key(number - back)).await? {
                self.read(client, earlier).await?;
            }
        }
        self.newest = self.newest.max(number);
        self.follow(client).await
    }

    /// Reads the entries that others name as not merged.
    async fn follow(&mut self, client: &CacheClient) -> Result<(), CacheError> {
        let mut tried: HashSet<String> = HashSet::new();
        while self.merged.len() < ENTRIES_READ && tried.len() < ENTRIES_READ {
            // The newest first: the others are more likely gone.
            let next = self.index.unmerged.keys().rev().find(|key| {
                self.chain.number(key).is_some()
                    && !self.merged.contains(*key)
                    && !tried.contains(*key)
            });
            let Some(key) = next.cloned() else {
                break;
            };
            if let Some(found) = find_exactly(client, &key).await? {
                self.read(client, found).await?;
            }
            tried.insert(key);
        }
        let merged = &self.merged;
        self.index.unmerged.retain(|key, _| !merged.contains(key));
        Ok(())
    }

    async fn read(&mut self, client: &CacheClient, found: Found) -> Result<(), CacheError> {
        let key = found.key.clone();
        if self.merged.contains(&key) {
            return Ok(());
        }
        match read_index(client, &found).await {
            Ok((index, data)) => {
                self.index.merge(index);
                self.merged.insert(key.clone());
                self.found.insert(key, (found, data));
                Ok(())
            }
            Err(ReadError::Cache(CacheError::Gone)) => {
                self.remember(key);
                Ok(())
            }
            Err(ReadError::Cache(error)) => Err(error),
            Err(ReadError::Pack(error)) => {
                self.remember(key.clone());
                self.unreadable
                    .get_or_insert_with(|| format!("{key}: {error}"));
                Ok(())
            }
        }
    }

    /// Notes an entry that could not be read this time, so that later ones still lead to it.
    fn remember(&mut self, key: String) {
        self.index.unmerged.entry(key).or_insert_with(auth::now);
    }

    /// Reserves the next number. `now` is in seconds since 1970.
    ///
    /// # Errors
    /// Where the service does not grant one.
    pub async fn reserve(
        &mut self,
        client: &CacheClient,
        now: u64,
    ) -> Result<(String, Upload), CacheError> {
        for _ in 0..RESERVATION_ATTEMPTS {
            let number = self.newest.saturating_add(1);
            let key = self.chain.key(number);
            match client.reserve(&key, None).await? {
                Reserved::Upload(upload) => {
                    self.newest = number;
                    return Ok((key, upload));
                }
                Reserved::AlreadyExists => {
                    self.catch_up(client).await?;
                    if !self.merged.contains(&key) {
                        self.index.unmerged.insert(key, now);
                    }
                    self.newest = self.newest.max(number);
                }
            }
        }
        Err(CacheError::Unavailable(format!(
            "{RESERVATION_ATTEMPTS} numbers in a row were taken by other jobs"
        )))
    }

    /// Notes that the entry under `key` has the index as it is now.
    pub fn committed(&mut self, key: &str) {
        self.merged.insert(key.to_owned());
    }
}

async fn find_exactly(client: &CacheClient, key: &str) -> Result<Option<Found>, CacheError> {
    let found = client.find(key, &[]).await?;
    Ok(found.filter(|found| found.key == key))
}

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Pack(#[from] PackError),
}

/// The index of an entry, and what was read of the data behind it.
async fn read_index(client: &CacheClient, found: &Found) -> Result<(Index, Vec<u8>), ReadError> {
    let mut bytes = read_range(client, found, 0..FIRST_READ).await?;
    let header = Header::parse(&bytes)?;
    let range = header.index();
    let have = bytes.len() as u64;
    if have < range.end {
        let rest = read_range(client, found, have..range.end).await?;
        bytes.extend_from_slice(&rest);
    }
    let start = usize::try_from(HEADER_LENGTH).unwrap_or(usize::MAX);
    let end = usize::try_from(range.end).unwrap_or(usize::MAX);
    let index = bytes.get(start..end).ok_or(PackError::Damaged)?;
    let index = header.read_index(index, &found.key)?;
    Ok((index, bytes.split_off(end)))
}

/// The bytes of `range`, or as many of them as the entry has.
async fn read_range(
    client: &CacheClient,
    found: &Found,
    range: Range<u64>,
) -> Result<Vec<u8>, CacheError> {
    let Download {
        mut start, stream, ..
    } = client.download(found, range.clone()).await?;
    let mut stream = std::pin::pin!(stream);
    let mut bytes = Vec::new();
    let interrupted = |error: std::io::Error| CacheError::Unavailable(error.to_string());
    while let Some(piece) = stream.try_next().await.map_err(interrupted)? {
        let end = start.saturating_add(piece.len() as u64);
        // A server without ranges sends it all from the beginning.
        let from = range.start.clamp(start, end) - start;
        let to = range.end.clamp(start, end) - start;
        let within = usize::try_from(from).ok().zip(usize::try_from(to).ok());
        if let Some(wanted) = within.and_then(|(from, to)| piece.get(from..to)) {
            bytes.extend_from_slice(wanted);
        }
        start = end;
        if start >= range.end {
            break;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_says_what_it_is_to_whoever_lists_the_cache() {
        let chain = Chain::new("default", "linux-x64", "refs/heads/main");
        let key = chain.key(7);
        assert_eq!(
            key,
            "sccache-packs/default/linux-x64/refs/heads/main#00000007"
        );
        assert_eq!(chain.number(&key), Some(7));
        let other = Chain::new("default", "linux-x64", "refs/heads/main/2");
        assert_eq!(other.number(&key), None);
        assert_eq!(chain.number(&other.key(7)), None);
    }

    #[test]
    fn a_key_that_is_not_one_of_ours_is_not_taken_for_one() {
        for key in [
            "sccache-packs",
            "sccache-packs/default/linux-x64/refs/heads/main",
            "sccache-packs/default/linux-x64/refs/heads/main#7",
            "sccache-packs/default/linux-x64/refs/heads/main#0000000x",
            "sccache-packs/default/refs/heads/main#00000007",
            "sccache-packs//linux-x64/refs/heads/main#00000007",
            "my/sccache-packs/default/linux-x64/refs/heads/main#00000007",
            "sccache-packs-of-mine/default/linux-x64/refs/heads/main#00000007",
        ] {
            for reference in [None, Some("refs/heads/main")] {
                assert_eq!(PackName::parse(key, reference), None, "{key}");
            }
        }
    }

    #[test]
    fn a_namespace_and_a_ref_that_look_like_each_other_are_told_apart_by_the_ref() {
        let (namespace, reference) = ("a/linux-x64/b", "refs/heads/linux-x64/B");
        let key = Chain::new(namespace, "linux-x64", reference).key(7);
        let name = PackName::parse(&key, Some(reference)).unwrap();
        assert!(name.is_of(namespace) && !name.is_of("a"));
        assert_eq!((name.platform.as_str(), name.number), ("linux-x64", 7));
        let key = Chain::new("default", "linux-x64", "refs/heads/main").key(1);
        let by_form = PackName::parse(&key, None).unwrap();
        assert_eq!(by_form.scope, "refs/heads/main");
        assert!(by_form.is_of("default"));
    }

    proptest! {
        #[test]
        fn the_key_of_every_chain_is_taken_apart_again(
            namespace in "[a-zA-Z0-9._/+-]{1,40}", scope in "\\PC{1,200}", number: u64,
        ) {
            let key = Chain::new(&namespace, "linux-x64", &scope).key(number);
            let name = PackName::parse(&key, Some(&scope));
            let name = name.ok_or_else(|| TestCaseError::fail(key.clone()))?;
            prop_assert!(name.is_of(&namespace));
            prop_assert_eq!((name.platform.as_str(), name.number), ("linux-x64", number));
        }

        #[test]
        fn keys_of_different_scopes_are_different_and_never_begin_like_each_other(
            one in "\\PC{0,300}", two in "\\PC{0,300}",
        ) {
            let (first, second) = (Chain::new(&one, "p", &two), Chain::new(&two, "p", &one));
            for chain in [&first, &second] {
                let key = chain.key(u64::MAX);
                prop_assert_eq!(&key, &key.to_lowercase());
                prop_assert!(key.chars().count() <= 512 && !key.contains(','));
            }
            if one != two {
                prop_assert!(!first.prefix.starts_with(&second.prefix));
                prop_assert!(!second.prefix.starts_with(&first.prefix));
            }
        }
    }

    #[test]
    fn a_number_counts_only_as_a_writer_writes_it() {
        let chain = Chain::new("default", "linux-x64", "refs/heads/main");
        for number in [0, 1, 99_999_999] {
            assert_eq!(chain.number(&chain.key(number)), Some(number));
        }
        for odd in ["1", "+0000001", "000000001", "0000000x", ""] {
            let key = format!("{}{odd}", chain.prefix);
            assert_eq!(chain.number(&key), None, "{odd}");
        }
    }
}
