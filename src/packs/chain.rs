//! The entries of one scope, numbered one after the other.
//!
//! ```text
//! sccache-packs/NAMESPACE/linux-x64/refs/heads/main#00000007
//! ```
//!
//! Each entry has the index of all packs of the scope, or names an earlier entry that has the rest. So a
//! reader needs the newest entry and at most one other. The cache service grants a key once, which makes
//! the number a lock that nobody has to hold: a job that finds the next number taken notes it as unmerged,
//! and takes the number after it. Thus every entry's index has all entries before it, or names them, and no
//! job's objects are lost however many jobs end at the same moment. `walk` decides which entries to look
//! up; this module looks them up.
//!
//! A job that may not read knows no number. It stores its entry apart, under a random number of sixteen
//! digits, with nothing in the index but its own packs. A job whose row has no number left does the same.
//! If the newest entry is one apart, a reader reads it, and the newest entry of the row as well.
//!
//! Keys carry the scope's name because entries of a job's own ref hide those of its base in a
//! look-up by prefix.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::TryStreamExt;

use crate::cache_client::{
    CacheClient, CacheError, Download, FoundEntry, Reservation, UploadHandle,
};
use crate::clock::Timestamp;
use crate::digest::Digest;
use crate::packs::index::{Index, UNMERGED_LIFETIME};
use crate::packs::pack::{Base, HEADER_LENGTH, Head, Header, PackError, StoredIndex};
use crate::packs::walk::{Lookup, Walk};

/// How much of an entry is read at first, in bytes: more than most indexes have.
const FIRST_READ: u64 = 256 * 1024;

/// For how long a job relies on knowing the newest entry. GitHub evicts nothing that is so
/// young.
const NEWEST_LIFETIME: Duration = Duration::from_secs(30);

/// How long reading the index of one entry may take.
const INDEX_WAIT: Duration = Duration::from_secs(60);

/// How many bytes of indexes a job reads at most, of all its scopes together. An index takes about ten
/// times as much memory.
const INDEXES_LIMIT: u64 = 96 << 20;

/// How many bytes of indexes a job may still read. All its scopes share one.
#[derive(Clone, Debug)]
pub struct IndexBudget(Arc<AtomicU64>);

impl Default for IndexBudget {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(INDEXES_LIMIT)))
    }
}

impl IndexBudget {
    /// Takes so many bytes, and returns whether that many were left.
    fn take(&self, bytes: u64) -> bool {
        let less = |left: u64| left.checked_sub(bytes);
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        taken.is_ok()
    }
}

/// The last number of the row. Each begins with a zero, so a look-up by prefix finds the newest entry of
/// the row even if the newest of all is one apart. A row of one entry a minute gets there in nineteen
/// years.
const LAST_NUMBER: u64 = 9_999_999;

/// The numbers of entries apart: those with sixteen digits.
const APART: Range<u64> = 1_000_000_000_000_000..10_000_000_000_000_000;

/// How many random numbers may turn out to be taken. By chance that happens to none.
const APART_ATTEMPTS: usize = 3;

/// How many characters of a key a namespace or a scope may take. A key has at most 512.
const PART_LIMIT: usize = 180;

/// The keys of one scope's entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryKeys {
    prefix: String,
}

impl EntryKeys {
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

    /// The number of the entry with this key, if the key is as a writer writes it and the entry is of the
    /// row.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.any_number(key).filter(|number| *number <= LAST_NUMBER)
    }

    fn is_apart(&self, key: &str) -> bool {
        self.any_number(key)
            .is_some_and(|number| APART.contains(&number))
    }

    /// The random key of a new entry apart. By chance no other job has the same.
    fn key_apart(&self) -> Result<String, CacheError> {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).map_err(|error| {
            CacheError::Unavailable(format!(
                "cannot read random numbers from the \
                                                              system: {error}"
            ))
        })?;
        let count = APART.end - APART.start;
        Ok(self.key(APART.start + u64::from_le_bytes(bytes) % count))
    }

    fn any_number(&self, key: &str) -> Option<u64> {
        let number = key.strip_prefix(&self.prefix)?.parse().ok()?;
        (self.key(number) == key).then_some(number)
    }
}

/// The parts of the key of one of our entries, for anyone who lists the cache.
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

/// The prefix of the keys of all our entries.
pub const PREFIX: &str = "sccache-packs/";

impl PackName {
    /// Parses the key of an entry of the ref `reference`, if that is known. `None` if the key is not one of
    /// ours.
    pub fn parse(key: &str, reference: Option<&str>) -> Option<Self> {
        let (chain, number) = key.strip_prefix(PREFIX)?.rsplit_once('#')?;
        if number.len() < 8 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        // Both a namespace and a ref may have slashes. GitHub may tell the ref. Otherwise the ref is all
        // that follows the first part that looks like a platform.
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

/// Text as part of a key. Replaces characters that a key may not have or that would make two keys alike,
/// and appends a digest so that different texts stay different.
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

/// The state of a chain: a job's knowledge of a scope's entries.
#[derive(Debug)]
pub struct ChainState {
    /// The keys of its entries.
    pub keys: EntryKeys,
    /// The merged index of its entries.
    pub index: Index,
    /// The numbers whose entries were read, and those that are only known to be taken.
    walk: Walk,
    /// The full index that the next entry may be the difference to.
    base: Option<(Base, Index)>,
    /// The full indexes that entries named as their base; `None` for one that is gone.
    bases: HashMap<String, Option<Index>>,
    /// Entries that were found on the way, which need not be looked up again, each with the first
    /// bytes of its data that came along with the index.
    pub found: HashMap<String, (FoundEntry, Vec<u8>)>,
    /// The first entry that could not be read, and why.
    pub unreadable: Option<String>,
    /// Whether anything may be read.
    reads: bool,
    /// When the service last said which entry is the newest.
    newest_known_at: Option<Timestamp>,
    budget: IndexBudget,
}

impl ChainState {
    /// The state before anything was read.
    pub fn new(keys: EntryKeys) -> Self {
        Self {
            keys,
            index: Index::default(),
            walk: Walk::default(),
            base: None,
            bases: HashMap::new(),
            found: HashMap::new(),
            unreadable: None,
            reads: true,
            newest_known_at: None,
            budget: IndexBudget::default(),
        }
    }

    /// The same with a budget that it shares with others.
    #[must_use]
    pub fn with_budget(self, budget: &IndexBudget) -> Self {
        Self {
            budget: budget.clone(),
            ..self
        }
    }

    /// The state of a job that may only write, and never reads anything.
    pub fn write_only(keys: EntryKeys) -> Self {
        Self {
            reads: false,
            ..Self::new(keys)
        }
    }

    /// Reads what other jobs wrote since.
    ///
    /// # Errors
    /// [`CacheError`] if the service does not answer. Entries that are gone or damaged are no error: their
    /// objects are not found.
    pub async fn refresh(
        &mut self,
        client: &CacheClient,
        now: Timestamp,
    ) -> Result<(), CacheError> {
        if !self.reads {
            return Ok(());
        }
        self.walk.start();
        self.continue_walk(client, now).await
    }

    async fn continue_walk(
        &mut self,
        client: &CacheClient,
        now: Timestamp,
    ) -> Result<(), CacheError> {
        while let Some(lookup) = self.walk.next_lookup() {
            let found = self.look_up(client, &lookup, now).await?;
            if lookup == Lookup::Newest {
                self.newest_known_at = Some(now);
            }
            let number = found
                .as_ref()
                .and_then(|found| self.keys.number(&found.key));
            let to_read = self.walk.record_answer(&lookup, number, now);
            if let Some((number, found)) = to_read.zip(found) {
                self.read_entry(client, number, found, now).await?;
            }
        }
        Ok(())
    }

    async fn look_up(
        &mut self,
        client: &CacheClient,
        lookup: &Lookup,
        now: Timestamp,
    ) -> Result<Option<FoundEntry>, CacheError> {
        match lookup {
            Lookup::Newest => self.look_up_newest(client, now).await,
            Lookup::FirstOf(numbers) => {
                let keys: Vec<String> = numbers.iter().map(|n| self.keys.key(*n)).collect();
                let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
                let Some((first, others)) = keys.split_first() else {
                    return Ok(None);
                };
                client.find(first, others).await
            }
        }
    }

    /// The newest entry of the row. If the newest of all is one apart, this reads that entry too.
    async fn look_up_newest(
        &mut self,
        client: &CacheClient,
        now: Timestamp,
    ) -> Result<Option<FoundEntry>, CacheError> {
        let prefix = self.keys.prefix.clone();
        let newest = find_newest(client, &prefix).await?;
        let Some(other) = newest
            .as_ref()
            .filter(|newest| self.keys.number(&newest.key).is_none())
        else {
            return Ok(newest);
        };
        if self.keys.is_apart(&other.key) && !self.found.contains_key(&other.key) {
            match read_index(client, other, &self.budget).await {
                Ok((stored, data)) => {
                    // One apart is full.
                    let (mut index, _) = stored.resolve(None);
                    index.clamp_times(now);
                    self.index.merge(index);
                    self.found.insert(other.key.clone(), (other.clone(), data));
                }
                Err(IndexReadError::Cache(CacheError::Gone)) => {}
                Err(IndexReadError::Cache(error)) => return Err(error),
                Err(IndexReadError::Pack(error)) => {
                    self.unreadable
                        .get_or_insert_with(|| format!("{}: {error}", other.key));
                }
            }
        }
        find_newest(client, &format!("{prefix}0")).await
    }

    async fn read_entry(
        &mut self,
        client: &CacheClient,
        number: u64,
        found: FoundEntry,
        now: Timestamp,
    ) -> Result<(), CacheError> {
        match read_index(client, &found, &self.budget).await {
            Ok((stored, data)) => {
                let added = self
                    .add_index(client, number, &found.key, stored, now)
                    .await;
                if let Err(error) = added {
                    // A job that saves all the same has to name it.
                    self.walk.mark_unreadable(number, now);
                    return Err(error);
                }
                self.found.insert(found.key.clone(), (found, data));
            }
            Err(IndexReadError::Cache(CacheError::Gone)) => self.walk.mark_unreadable(number, now),
            Err(IndexReadError::Cache(error)) => {
                // A job that saves all the same has to name it.
                self.walk.mark_unreadable(number, now);
                return Err(error);
            }
            Err(IndexReadError::Pack(error)) => {
                self.walk.mark_unreadable(number, now);
                self.unreadable
                    .get_or_insert_with(|| format!("{}: {error}", found.key));
            }
        }
        Ok(())
    }

    /// Adds the index of an entry.
    async fn add_index(
        &mut self,
        client: &CacheClient,
        number: u64,
        key: &str,
        stored: StoredIndex,
        now: Timestamp,
    ) -> Result<(), CacheError> {
        let (base, of_base) = match &stored.base {
            None => (None, None),
            Some(base) => (
                Some(base.clone()),
                self.full_index(client, &base.key).await?,
            ),
        };
        let (mut index, missing) = stored.resolve(of_base.as_ref());
        index.clamp_times(now);
        let keys = &self.keys;
        let unmerged = std::mem::take(&mut index.unmerged).into_iter();
        let others = unmerged.filter_map(|(key, since)| Some((keys.number(&key)?, since)));
        self.walk.mark_read(number, others);
        let missing = missing.iter().filter_map(|key| keys.number(key));
        self.walk.mark_base_lost(number, missing, now);
        let next = match (base, of_base) {
            (Some(base), Some(of_base)) => Some((base.for_next_difference(), of_base)),
            (Some(_), None) => None,
            (None, _) => Some((Base::full(key), index.clone())),
        };
        if let Some((base, of_base)) = next {
            self.prefer_base(base, of_base);
        }
        self.index.merge(index);
        Ok(())
    }

    /// The next entry is the difference to this one, unless a later one is known.
    fn prefer_base(&mut self, base: Base, index: Index) {
        let rank = |base: &Base| (self.keys.number(&base.key), base.before);
        if self
            .base
            .as_ref()
            .is_none_or(|(mine, _)| rank(mine) < rank(&base))
        {
            self.base = Some((base, index));
        }
    }

    /// The full index of the entry under `key`, or `None` if the entry is gone, damaged, or not full.
    async fn full_index(
        &mut self,
        client: &CacheClient,
        key: &str,
    ) -> Result<Option<Index>, CacheError> {
        if let Some((base, index)) = &self.base
            && base.key == key
        {
            return Ok(Some(index.clone()));
        }
        if let Some(known) = self.bases.get(key) {
            return Ok(known.clone());
        }
        let found = client
            .find(key, &[])
            .await?
            .filter(|found| found.key == key);
        let read = match &found {
            Some(found) => read_index(client, found, &self.budget).await,
            None => Err(CacheError::Gone.into()),
        };
        let full = match read {
            Ok((stored, data)) if stored.base.is_none() => {
                if let Some(found) = found {
                    self.found.insert(key.to_owned(), (found, data));
                }
                Some(stored.resolve(None).0)
            }
            Err(IndexReadError::Cache(error)) if !matches!(error, CacheError::Gone) => {
                return Err(error);
            }
            // Its packs are read one by one then.
            Ok(_) | Err(IndexReadError::Cache(_)) => None,
            Err(IndexReadError::Pack(error)) => {
                self.unreadable
                    .get_or_insert_with(|| format!("{key}: {error}"));
                None
            }
        };
        self.bases.insert(key.to_owned(), full.clone());
        Ok(full)
    }

    /// The base of the next entry's index, if it has one.
    pub fn base(&self) -> Option<(&Base, &Index)> {
        self.base.as_ref().map(|(base, index)| (base, index))
    }

    /// Whether other jobs may have used the next known number and the service may have evicted their entry
    /// since. The service would grant that number again, and an entry under it, the newest of all, would
    /// know of none behind it.
    fn is_behind(&self, now: Timestamp) -> bool {
        let known_at = self.newest_known_at;
        self.reads && known_at.is_none_or(|known_at| now.since(known_at) > NEWEST_LIFETIME)
    }

    /// Reserves the next number of the row, or one apart if the job may not read or the row is at its end.
    ///
    /// # Errors
    /// [`CacheError`] if the service grants no number, or does not say which entry is the newest.
    pub async fn reserve(
        &mut self,
        client: &CacheClient,
        now: Timestamp,
    ) -> Result<(String, UploadHandle), CacheError> {
        if self.is_behind(now) {
            // The entry that is written now names what cannot be read here.
            let read = self.refresh(client, now).await;
            if self.is_behind(now) {
                read?;
            }
        }
        while let Some(number) = self.walk.next_number() {
            if !self.reads || number > LAST_NUMBER {
                return self.reserve_apart(client).await;
            }
            let key = self.keys.key(number);
            match client.reserve(&key, None).await? {
                Reservation::Granted(upload) => {
                    self.walk.mark_granted(number);
                    return Ok((key, upload));
                }
                Reservation::AlreadyExists => {
                    self.walk.mark_refused(number, now);
                    // The entry that is written now names what cannot be read here.
                    let _ = self.continue_walk(client, now).await;
                }
            }
        }
        self.walk.reset_refusals();
        let taken = "other jobs took too many numbers in a row";
        Err(CacheError::Unavailable(taken.to_owned()))
    }

    async fn reserve_apart(
        &self,
        client: &CacheClient,
    ) -> Result<(String, UploadHandle), CacheError> {
        for _ in 0..APART_ATTEMPTS {
            let key = self.keys.key_apart()?;
            if let Reservation::Granted(upload) = client.reserve(&key, None).await? {
                return Ok((key, upload));
            }
        }
        let taken = "other jobs took the random numbers";
        Err(CacheError::Unavailable(taken.to_owned()))
    }

    /// Drops what nobody has used for long, as [`Index::retain`] does.
    pub fn retain(&mut self, now: Timestamp, limit: u64) {
        self.index.retain(now, limit);
        self.walk.drop_unmerged_before(now - UNMERGED_LIFETIME);
    }

    /// The keys that an entry written now has to name, with when they became known.
    pub fn unmerged(&self) -> BTreeMap<String, Timestamp> {
        let unmerged = self.walk.unmerged().iter();
        unmerged
            .map(|(number, since)| (self.keys.key(*number), *since))
            .collect()
    }

    /// Notes that the entry under `key` is written, with this index.
    pub fn committed(&mut self, key: &str, head: &Head, index: Index) {
        if let Some(number) = self.keys.number(key) {
            self.walk.mark_committed(number);
        }
        if head.is_full {
            // No other entry is the difference to one apart.
            if self.keys.number(key).is_some() {
                self.prefer_base(Base::full(key), index.clone());
            }
        } else if let Some((base, _)) = &mut self.base {
            base.before = base.before.saturating_add(head.bytes.len() as u64);
        }
        self.index = index;
    }
}

/// The newest entry whose key begins with `prefix`.
async fn find_newest(client: &CacheClient, prefix: &str) -> Result<Option<FoundEntry>, CacheError> {
    // The key alone would do at GitHub; others take only restore keys for prefixes.
    client.find(prefix, &[prefix]).await
}

#[derive(Debug, thiserror::Error)]
enum IndexReadError {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Pack(#[from] PackError),
}

/// The index of an entry, and the bytes of the data behind it that came along.
async fn read_index(
    client: &CacheClient,
    found: &FoundEntry,
    budget: &IndexBudget,
) -> Result<(StoredIndex, Vec<u8>), IndexReadError> {
    let read = read_whole_index(client, found, budget);
    tokio::time::timeout(INDEX_WAIT, read)
        .await
        .unwrap_or_else(|_| {
            let text = format!("the index did not arrive within {} s", INDEX_WAIT.as_secs());
            Err(CacheError::Unavailable(text).into())
        })
}

async fn read_whole_index(
    client: &CacheClient,
    found: &FoundEntry,
    budget: &IndexBudget,
) -> Result<(StoredIndex, Vec<u8>), IndexReadError> {
    let mut bytes = read_range(client, found, 0..FIRST_READ).await?;
    let header = Header::parse(&bytes)?;
    let range = header.index();
    if !budget.take(range.end) {
        return Err(PackError::TooMuch.into());
    }
    let have = bytes.len() as u64;
    if have < range.end {
        let rest = read_range(client, found, have..range.end).await?;
        bytes.extend_from_slice(&rest);
    }
    let start = usize::try_from(HEADER_LENGTH).unwrap_or(usize::MAX);
    let end = usize::try_from(range.end).unwrap_or(usize::MAX);
    let index = bytes.get(start..end).ok_or(PackError::Damaged)?;
    let stored = header.read_index(index, &found.key)?;
    Ok((stored, bytes.split_off(end)))
}

/// The bytes of `range`, or as many of them as the entry has.
async fn read_range(
    client: &CacheClient,
    found: &FoundEntry,
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
        let chain = EntryKeys::new("default", "linux-x64", "refs/heads/main");
        let key = chain.key(7);
        assert_eq!(
            key,
            "sccache-packs/default/linux-x64/refs/heads/main#00000007"
        );
        assert_eq!(chain.number(&key), Some(7));
        let other = EntryKeys::new("default", "linux-x64", "refs/heads/main/2");
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
        let key = EntryKeys::new(namespace, "linux-x64", reference).key(7);
        let name = PackName::parse(&key, Some(reference)).unwrap();
        assert!(name.is_of(namespace) && !name.is_of("a"));
        assert_eq!((name.platform.as_str(), name.number), ("linux-x64", 7));
        let key = EntryKeys::new("default", "linux-x64", "refs/heads/main").key(1);
        let by_form = PackName::parse(&key, None).unwrap();
        assert_eq!(by_form.scope, "refs/heads/main");
        assert!(by_form.is_of("default"));
    }

    proptest! {
        #[test]
        fn the_key_of_every_chain_is_taken_apart_again(
            namespace in "[a-zA-Z0-9._/+-]{1,40}", scope in "\\PC{1,200}", number: u64,
        ) {
            let key = EntryKeys::new(&namespace, "linux-x64", &scope).key(number);
            let name = PackName::parse(&key, Some(&scope)).ok_or_else(|| TestCaseError::fail(key.clone()))?;
            prop_assert!(name.is_of(&namespace));
            prop_assert_eq!((name.platform.as_str(), name.number), ("linux-x64", number));
        }

        #[test]
        fn keys_of_different_scopes_are_different_and_never_begin_like_each_other(
            one in "\\PC{0,300}", two in "\\PC{0,300}",
        ) {
            let (first, second) = (EntryKeys::new(&one, "p", &two), EntryKeys::new(&two, "p", &one));
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
    fn the_indexes_of_all_scopes_have_one_limit() {
        let budget = IndexBudget::default();
        let known = || ChainState::new(EntryKeys::new("n", "p", "s")).with_budget(&budget);
        let (one, two) = (known(), known());
        assert!(one.budget.take(INDEXES_LIMIT - 10));
        assert!(!two.budget.take(11));
        assert!(two.budget.take(10));
        assert!(!one.budget.take(1));
    }

    #[test]
    fn a_number_counts_only_as_a_writer_writes_it() {
        let chain = EntryKeys::new("default", "linux-x64", "refs/heads/main");
        for number in [0, 1, LAST_NUMBER] {
            assert_eq!(chain.number(&chain.key(number)), Some(number));
        }
        for beyond in [LAST_NUMBER + 1, APART.start, u64::MAX] {
            assert_eq!(chain.number(&chain.key(beyond)), None, "{beyond}");
        }
        for (number, apart) in [
            (LAST_NUMBER, false),
            (APART.start - 1, false),
            (APART.start, true),
            (APART.end - 1, true),
            (APART.end, false),
        ] {
            assert_eq!(chain.is_apart(&chain.key(number)), apart, "{number}");
        }
        assert!(chain.is_apart(&chain.key_apart().unwrap()));
        for odd in ["1", "+0000001", "000000001", "0000000x", ""] {
            let key = format!("{}{odd}", chain.prefix);
            assert_eq!(chain.number(&key), None, "{odd}");
        }
    }
}
