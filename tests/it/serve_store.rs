//! The store of the cache service, over each database and each place for blobs: SQLite and
//! PostgreSQL, a folder and a bucket that speaks S3.

use crate::support::tools;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::support::postgres::Postgres;
use crate::support::s3::S3;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use proptest::prelude::*;
use sccache_action::cache_protocol::auth::Purpose;
use sccache_action::cache_protocol::ids::{EntryId, UploadId};
use sccache_action::cache_protocol::store::{
    Chunk, Content, Entry, EntryName, Query, Scope, Store, StoreError,
};
use sccache_action::clock::Timestamp;
use sccache_action::serve::blob_store::Location;
use sccache_action::serve::catalog::{Database, PostgresUrl};
use sccache_action::serve::entry_store::{
    EntryStore, OpenError, StorageConfig, StoreLimits, SweepReport,
};
use tempfile::TempDir;

const LIMIT: u64 = 64 << 20;

/// A storage of its own, and the servers that it needs as long as it is used.
struct Place {
    name: &'static str,
    storage: StorageConfig,
    /// The folder of its blobs, if they are files.
    blobs: PathBuf,
    time: Arc<AtomicU64>,
    _folder: TempDir,
    _postgres: Option<Arc<Postgres>>,
    _s3: Option<S3>,
}

impl Place {
    async fn new(name: &'static str, limits: StoreLimits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut storage = StorageConfig::in_folder(folder.path(), limits);
        let mut blobs = folder.path().join("blobs");
        let postgres = name.contains("PostgreSQL").then(Postgres::shared);
        if let Some(postgres) = &postgres {
            storage.database = Database::Postgres(PostgresUrl(postgres.new_database().await));
            storage.lock = None;
        }
        let s3 = name.contains("S3").then(|| S3::start(&tools::s3()));
        if let Some(s3) = &s3 {
            storage.blobs = s3.location("some/prefix");
            blobs = s3.folder();
        }
        Self {
            name,
            storage,
            blobs,
            time: Arc::new(AtomicU64::new(1_000_000_000)),
            _folder: folder,
            _postgres: postgres,
            _s3: s3,
        }
    }

    async fn all(limits: StoreLimits) -> Vec<Self> {
        let names = [
            "SQLite and a folder",
            "SQLite and S3",
            "PostgreSQL and a folder",
            "PostgreSQL and S3",
        ];
        stream::iter(names)
            .then(|name| Self::new(name, limits))
            .collect()
            .await
    }

    async fn open(&self) -> EntryStore {
        let time = self.time.clone();
        let clock = Arc::new(move || Duration::from_millis(time.load(Ordering::Relaxed)));
        EntryStore::open(&self.storage, clock).await.unwrap()
    }

    fn pass(&self, time: Duration) {
        let milliseconds = u64::try_from(time.as_millis()).unwrap();
        self.time.fetch_add(milliseconds, Ordering::Relaxed);
    }

    /// How many blobs there are.
    fn count(&self) -> usize {
        fn files(folder: &Path) -> usize {
            let entries = std::fs::read_dir(folder).into_iter().flatten();
            entries
                .map(|entry| match entry.unwrap().path() {
                    path if path.is_dir() => files(&path),
                    // The server keeps its metadata of an object in files of its own.
                    path => usize::from(path.file_name().unwrap().as_encoded_bytes()[0] != b'.'),
                })
                .sum()
        }
        files(&self.blobs)
    }
}

const MINUTE: Duration = Duration::from_secs(60);

fn name(key: &str) -> EntryName {
    EntryName {
        scope: "s".into(),
        version: "v".to_owned(),
        key: key.to_owned(),
    }
}

fn pieces(pieces: &[&'static str]) -> impl Stream<Item = Chunk> + Send + use<> {
    let pieces: Vec<Chunk> = pieces
        .iter()
        .map(|piece| Ok(Bytes::from_static(piece.as_bytes())))
        .collect();
    stream::iter(pieces)
}

/// `size` bytes that are different in each place, in pieces as a connection has them.
fn long(size: usize) -> impl Stream<Item = Chunk> + Send {
    let bytes: Bytes = (0..size).map(|at| ((at * 31) >> 5) as u8).collect();
    let chunks: Vec<Chunk> = (0..size)
        .step_by(50_000)
        .map(|at| Ok(bytes.slice(at..(at + 50_000).min(size))))
        .collect();
    stream::iter(chunks)
}

async fn put(store: &EntryStore, key: &str, content: &'static str) -> Entry {
    let upload = store.reserve(name(key)).await.unwrap();
    store
        .write(upload, 0, true, pieces(&[content]))
        .await
        .unwrap();
    store.commit(upload, content.len() as u64).await.unwrap()
}

/// The same with content that is too large for the database.
async fn put_long(store: &EntryStore, key: &str) -> Entry {
    put_as(store, name(key), LONG).await.unwrap()
}

/// A size, in bytes, that is not in a database but has its own blob.
const LONG: usize = 300_000;

async fn find(store: &EntryStore, key: &str) -> Option<Entry> {
    let query = Query {
        scopes: &["s".into()],
        version: "v",
        keys: &[key],
    };
    store.find(&query).await
}

async fn read(store: &EntryStore, entry: EntryId, first: u64, length: u64) -> Option<Vec<u8>> {
    let parts = match store.open(entry).await? {
        Content::Remote(parts) => parts,
        Content::Bytes(bytes) => {
            let first = usize::try_from(first).unwrap();
            let end = first + usize::try_from(length).unwrap();
            return Some(bytes[first..end].to_vec());
        }
        Content::File { .. } => panic!("this store has no files of one entry"),
    };
    let bytes = parts.read(first, length).await.ok()?;
    let bytes: Vec<Bytes> = bytes.try_collect().await.unwrap();
    Some(bytes.concat())
}

async fn get(store: &EntryStore, key: &str) -> Option<String> {
    let found = find(store, key).await?;
    let bytes = read(store, found.id, 0, found.size).await?;
    Some(String::from_utf8(bytes).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_committed_is_there_after_a_restart_and_never_changes() {
    for place in Place::all(StoreLimits::of_entries(LIMIT)).await {
        let store = place.open().await;
        put(&store, "a", "one").await;
        let half = store.reserve(name("b")).await.unwrap();
        store.write(half, 0, true, pieces(&["tw"])).await.unwrap();
        assert!(matches!(
            store.reserve(name("a")).await,
            Err(StoreError::AlreadyExists)
        ));
        store.close().await;
        drop(store);
        let store = place.open().await;
        assert_eq!(
            get(&store, "a").await.as_deref(),
            Some("one"),
            "{}",
            place.name
        );
        assert_eq!(get(&store, "b").await, None);
        // A client in the middle of its upload continues after the restart.
        store.write(half, 0, true, pieces(&["two"])).await.unwrap();
        store.commit(half, 3).await.unwrap();
        assert_eq!(get(&store, "b").await.as_deref(), Some("two"));
        let late = store.write(half, 0, true, pieces(&["xxx"])).await;
        assert!(matches!(late, Err(StoreError::NoSuchUpload)));
        assert_eq!(get(&store, "b").await.as_deref(), Some("two"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pieces_and_blocks_make_up_an_entry_of_which_any_part_is_read() {
    for place in Place::all(StoreLimits::of_entries(LIMIT)).await {
        let store = place.open().await;
        let size = 9_300_000;
        let whole: Vec<Bytes> = long(size).try_collect().await.unwrap();
        let whole = whole.concat();
        // Blocks that are large enough for a multipart upload, and one that is not.
        let upload = store.reserve(name("blocks")).await.unwrap();
        for (block, bytes) in [("b", &whole[9_000_000..]), ("a/../x", &whole[..9_000_000])] {
            let bytes = Bytes::copy_from_slice(bytes);
            let chunks: Vec<Chunk> = (0..bytes.len())
                .step_by(70_000)
                .map(|at| Ok(bytes.slice(at..(at + 70_000).min(bytes.len()))))
                .collect();
            store
                .write_block(upload, block, stream::iter(chunks))
                .await
                .unwrap();
        }
        let missing = store.join_blocks(upload, vec!["c".to_owned()]).await;
        assert!(matches!(missing, Err(StoreError::NoSuchBlock)));
        let list = vec!["a/../x".to_owned(), "b".to_owned()];
        store.join_blocks(upload, list).await.unwrap();
        let entry = store.commit(upload, size as u64).await.unwrap();
        for (first, length) in [
            (0, size),
            (8_999_999, 2),
            (0, 1),
            (size - 1, 1),
            (5, 8_000_000),
        ] {
            let part = read(&store, entry.id, first as u64, length as u64).await;
            let expected = &whole[first..first + length];
            assert!(
                part.as_deref() == Some(expected),
                "{} {first}+{length}",
                place.name
            );
        }
        let upload = store.reserve(name("pieces")).await.unwrap();
        for (start, piece) in [(3, "de"), (0, "abc"), (0, "ABC")] {
            store
                .write(upload, start, false, pieces(&[piece]))
                .await
                .unwrap();
        }
        assert!(matches!(
            store.commit(upload, 6).await,
            Err(StoreError::SizeMismatch {
                actual: 5,
                claimed: 6
            })
        ));
        store.commit(upload, 5).await.unwrap();
        assert_eq!(get(&store, "pieces").await.as_deref(), Some("ABCde"));
        // Content that comes as a whole counts, whatever came before.
        let upload = store.reserve(name("whole")).await.unwrap();
        store.join_blocks(upload, Vec::new()).await.unwrap();
        for text in ["one", "two"] {
            store.write(upload, 0, true, pieces(&[text])).await.unwrap();
        }
        store.commit(upload, 3).await.unwrap();
        assert_eq!(get(&store, "whole").await.as_deref(), Some("two"));
        put(&store, "empty", "").await;
        assert_eq!(get(&store, "empty").await.as_deref(), Some(""));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_many_reservations_and_one_of_many_commits_is_granted() {
    for place in Place::all(StoreLimits::of_entries(LIMIT)).await {
        let store = place.open().await;
        let tries = (0..20).map(|_| store.reserve(name("a")));
        let granted: Vec<UploadId> = futures_util::future::join_all(tries)
            .await
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(granted.len(), 1, "{}", place.name);
        store
            .write(granted[0], 0, true, pieces(&["a"]))
            .await
            .unwrap();
        let tries = (0..20).map(|_| store.commit(granted[0], 1));
        let committed = futures_util::future::join_all(tries).await;
        let committed = committed.iter().filter(|result| result.is_ok()).count();
        assert_eq!(committed, 1, "{}", place.name);
        assert_eq!(get(&store, "a").await.as_deref(), Some("a"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_is_being_written_is_not_committed() {
    for place in Place::all(StoreLimits::of_entries(LIMIT)).await {
        let store = place.open().await;
        let upload = store.reserve(name("a")).await.unwrap();
        let first = stream::once(async { Ok(Bytes::from_static(b"one")) });
        let then_commit = stream::once(async {
            assert!(matches!(
                store.commit(upload, 3).await,
                Err(StoreError::Busy)
            ));
            Ok(Bytes::new())
        });
        store
            .write(upload, 0, true, first.chain(then_commit))
            .await
            .unwrap();
        store.commit(upload, 3).await.unwrap();
        assert_eq!(get(&store, "a").await.as_deref(), Some("one"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_breaks_off_or_is_too_large_leaves_nothing() {
    for place in Place::all(StoreLimits::of_entries(9_000_000)).await {
        let store = place.open().await;
        let upload = store.reserve(name("a")).await.unwrap();
        let broken = || stream::once(async { Err(StoreError::Interrupted("gone".to_owned())) });
        for pieces in [
            long(10).chain(broken()).boxed(),
            long(8_600_000).chain(broken()).boxed(),
        ] {
            let error = store.write(upload, 0, false, pieces).await.unwrap_err();
            assert!(matches!(error, StoreError::Interrupted(_)), "{error:?}");
        }
        let large = store.write(upload, 0, false, long(9_000_001)).await;
        assert!(matches!(
            large,
            Err(StoreError::TooLarge { limit: 9_000_000 })
        ));
        let far = store.write(upload, u64::MAX, false, pieces(&["x"])).await;
        assert!(matches!(far, Err(StoreError::TooLarge { .. })));
        // A client that is gone: the request's future is dropped at an await.
        let silent = long(200_000).chain(stream::pending());
        let waited = store.write(upload, 0, false, silent);
        let waited = tokio::time::timeout(Duration::from_millis(200), waited).await;
        assert!(waited.is_err());
        place.pass(11 * MINUTE);
        let sweep = store.sweep().await.unwrap();
        assert_eq!(sweep.abandoned, 1);
        place.pass(6 * MINUTE);
        store.sweep().await.unwrap();
        assert_eq!(place.count(), 0, "{}", place.name);
        put(&store, "a", "again").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reservation_that_nobody_uses_is_given_up_and_one_in_use_is_not() {
    for place in Place::all(StoreLimits::of_entries(LIMIT)).await {
        let store = place.open().await;
        let idle = store.reserve(name("idle")).await.unwrap();
        store.write(idle, 0, true, pieces(&["old"])).await.unwrap();
        let busy = store.reserve(name("busy")).await.unwrap();
        place.pass(9 * MINUTE);
        store.write(busy, 0, false, pieces(&["a"])).await.unwrap();
        assert!(store.reserve(name("idle")).await.is_err());
        // An upload that takes long is in use as well.
        let slow = store.reserve(name("slow")).await.unwrap();
        let slowly = stream::iter(0..30).map(|_| {
            place.pass(MINUTE / 2);
            Ok(Bytes::from_static(b"x"))
        });
        store.write(slow, 0, true, slowly).await.unwrap();
        store.write(busy, 1, false, pieces(&["b"])).await.unwrap();
        assert_eq!(store.sweep().await.unwrap().abandoned, 1, "{}", place.name);
        store.commit(slow, 30).await.unwrap();
        store.commit(busy, 2).await.unwrap();
        let again = store.reserve(name("idle")).await.unwrap();
        assert_ne!(again, idle);
        let late = store.write(idle, 0, true, pieces(&["old"])).await;
        assert!(matches!(late, Err(StoreError::NoSuchUpload)));
        // Without a sweep, the next reservation of the name takes it.
        place.pass(11 * MINUTE);
        assert_ne!(store.reserve(name("idle")).await.unwrap(), again);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_that_were_not_used_for_long_go_and_those_in_use_stay() {
    let limits = StoreLimits {
        unused: Some(60 * MINUTE),
        ..StoreLimits::of_entries(LIMIT)
    };
    for place in Place::all(limits).await {
        let store = place.open().await;
        put_long(&store, "used").await;
        put(&store, "used and small", "1").await;
        put_long(&store, "unused").await;
        put(&store, "unused and small", "2").await;
        place.pass(45 * MINUTE);
        assert!(find(&store, "used").await.is_some());
        assert!(find(&store, "used and small").await.is_some());
        place.pass(30 * MINUTE);
        let sweep = store.sweep().await.unwrap();
        assert_eq!(sweep.expired, 2, "{}", place.name);
        assert!(find(&store, "unused").await.is_none());
        assert!(find(&store, "unused and small").await.is_none());
        assert_eq!(get(&store, "used and small").await.as_deref(), Some("1"));
        // Its name is free, and its bytes go when nobody can be reading them any more.
        put_long(&store, "unused").await;
        put(&store, "unused and small", "3").await;
        assert_eq!(get(&store, "unused and small").await.as_deref(), Some("3"));
        assert_eq!(place.count(), 3);
        place.pass(6 * MINUTE);
        assert_eq!(store.sweep().await.unwrap().deleted, 1);
        assert_eq!(place.count(), 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_used_longest_ago_goes_first_when_there_is_too_much() {
    let limits = StoreLimits {
        total: Some(1_000),
        ..StoreLimits::of_entries(LIMIT)
    };
    for place in Place::all(limits).await {
        let store = place.open().await;
        let content: &'static str = "x".repeat(100).leak();
        let key = |number: u32| format!("{number:02}");
        for number in 0..10 {
            put(&store, &key(number), content).await;
            place.pass(MINUTE);
        }
        assert_eq!(store.sweep().await.unwrap(), SweepReport::default());
        // The oldest was read since.
        assert!(get(&store, "00").await.is_some());
        place.pass(MINUTE);
        put(&store, "10", content).await;
        let evicted = store.sweep().await.unwrap().evicted;
        // The excess, and a twentieth ahead.
        assert_eq!(evicted, 2, "{}", place.name);
        let mut left = Vec::new();
        for number in 0..11 {
            if find(&store, &key(number)).await.is_some() {
                left.push(number);
            }
        }
        assert_eq!(left, [0, 3, 4, 5, 6, 7, 8, 9, 10]);
        let totals = store.totals().await.unwrap();
        assert_eq!((totals.entries, totals.bytes, totals.uploads), (9, 900, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_whose_blob_is_gone_or_cut_off_is_not_read_and_can_be_dropped() {
    for place in Place::all(StoreLimits::of_entries(LIMIT)).await {
        let store = place.open().await;
        let gone = put_long(&store, "gone").await;
        let large = store.reserve(name("large")).await.unwrap();
        store.write(large, 0, true, long(300_000)).await.unwrap();
        let large = store.commit(large, 300_000).await.unwrap();
        let blobs: Vec<PathBuf> = std::fs::read_dir(&place.blobs)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        for blob in blobs {
            if blob.is_dir() {
                std::fs::remove_dir_all(blob).unwrap();
            } else {
                std::fs::remove_file(blob).unwrap();
            }
        }
        assert_eq!(read(&store, gone.id, 0, 7).await, None, "{}", place.name);
        assert_eq!(read(&store, large.id, 0, 300_000).await, None);
        for entry in [gone, large] {
            store.mark_missing(entry.id).await;
        }
        assert!(find(&store, "gone").await.is_none());
        put(&store, "gone", "again").await;
        assert_eq!(get(&store, "gone").await.as_deref(), Some("again"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_behind_the_end_of_a_shortened_blob_is_the_end_of_a_file() {
    let place = Place::new("SQLite and a folder", StoreLimits::of_entries(LIMIT)).await;
    let store = place.open().await;
    let entry = put_long(&store, "short").await;
    let mut left = vec![place.blobs.clone()];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        } else {
            std::fs::write(&path, "").unwrap();
        }
    }
    let Content::Remote(content) = store.open(entry.id).await.unwrap() else {
        panic!("content of a folder is read through the store");
    };
    let error = content.read(0, 7).await.err().unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_services_on_one_storage_are_one_store() {
    for name_of_place in ["PostgreSQL and a folder", "PostgreSQL and S3"] {
        let place = Place::new(name_of_place, StoreLimits::of_entries(LIMIT)).await;
        let (one, two) = tokio::join!(place.open(), place.open());
        // An upload may be reserved at one, written at both and committed at the other.
        let upload = one.reserve(name("a")).await.unwrap();
        assert!(two.reserve(name("a")).await.is_err());
        one.write_block(upload, "1", pieces(&["one "]))
            .await
            .unwrap();
        two.write_block(upload, "2", pieces(&["two"]))
            .await
            .unwrap();
        let list = vec!["1".to_owned(), "2".to_owned()];
        one.join_blocks(upload, list).await.unwrap();
        two.commit(upload, 7).await.unwrap();
        for store in [&one, &two] {
            assert_eq!(get(store, "a").await.as_deref(), Some("one two"));
            assert!(store.reserve(name("a")).await.is_err());
        }
        // URLs of one are good at the other.
        let purpose = Purpose::Download(EntryId(7));
        let expiry = Timestamp::from_seconds(100);
        let query = one.signer().query(purpose, expiry, None);
        let (_, signature) = query.split_once("sig=").unwrap();
        assert!(
            two.signer()
                .is_valid(purpose, (expiry, None), signature, expiry)
        );
        // Both sweep at once, and evict no more for it.
        for key in 0..20 {
            put(&one, &format!("k{key}"), "0123456789").await;
        }
        let (first, second) = tokio::join!(one.sweep(), two.sweep());
        assert_eq!((first.unwrap(), second.unwrap()), Default::default());
    }
}

#[tokio::test]
async fn a_folder_of_any_name_holds_a_storage_also_one_named_from_here() {
    let here = std::env::current_dir().unwrap();
    let mut named = tempfile::Builder::new();
    let folder = named.prefix("a [b]%2f").tempdir_in(&here).unwrap();
    let odd = if cfg!(windows) {
        "a b#c%20d"
    } else {
        "a b?c#d%20e:f"
    };
    let inside = folder.path().join(odd);
    let from_here = inside.strip_prefix(&here).unwrap().to_owned();
    for named in [inside.clone(), from_here] {
        std::fs::create_dir_all(&inside).unwrap();
        let storage = StorageConfig::in_folder(&named, StoreLimits::of_entries(LIMIT));
        let store = EntryStore::open(&storage, Arc::new(|| Duration::from_millis(1_000_000_000)));
        put(&store.await.unwrap(), "key", "content").await;
        assert!(inside.join("catalog.sqlite").exists(), "{named:?}");
        std::fs::remove_dir_all(&inside).unwrap();
    }
}

#[tokio::test]
async fn a_folder_serves_one_service_at_a_time() {
    let place = Place::new("SQLite and a folder", StoreLimits::of_entries(LIMIT)).await;
    let store = place.open().await;
    let clock = sccache_action::serve::entry_store::system_clock();
    let second = EntryStore::open(&place.storage, clock).await;
    assert!(matches!(second, Err(OpenError::InUse(_))));
    // The next service gets the folder as soon as this one is closed, even if parts of it are still
    // ending.
    store.close().await;
    place.open().await;
    drop(store);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_cannot_be_used_is_known_at_the_start() {
    let mut place = Place::new("SQLite and S3", StoreLimits::of_entries(LIMIT)).await;
    if let Location::Bucket(bucket) = &mut place.storage.blobs {
        bucket.credentials.as_mut().unwrap().secret_key = "wrong".to_owned();
    }
    let clock = sccache_action::serve::entry_store::system_clock();
    let error = EntryStore::open(&place.storage, clock).await.unwrap_err();
    assert!(matches!(error, OpenError::BlobStore(_)), "{error}");
    assert!(!error.to_string().contains("wrong"), "{error}");
}

/// The definition of a look-up, spelt out: scope by scope, key by key, the very key or else the
/// newest that begins with it.
fn defined<'a>(
    entries: &'a BTreeMap<(String, String), EntryId>,
    asked: &[String],
) -> Option<&'a EntryId> {
    ["s", "t"].iter().find_map(|scope| {
        let mine = || {
            entries
                .iter()
                .filter(|((in_scope, _), _)| in_scope == scope)
        };
        asked.iter().find_map(|key| {
            let exact = mine().find(|((_, known), _)| known == key);
            let newest = || {
                mine()
                    .filter(|((_, known), _)| known.starts_with(key.as_str()))
                    .max_by_key(|(_, id)| **id)
            };
            exact.or_else(newest).map(|(_, id)| id)
        })
    })
}

#[test]
fn a_look_up_finds_what_the_definition_says() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let places = ["SQLite and a folder", "PostgreSQL and a folder"].map(|name| {
        let limits = StoreLimits::of_entries(LIMIT);
        let place = runtime.block_on(Place::new(name, limits));
        let store = runtime.block_on(place.open());
        (place, store)
    });
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    // Letters that languages order otherwise than bytes do, what LIKE and globs take for patterns,
    // and the ends of the ranges of code points.
    let key = "[abAÉé_%*\u{d7ff}\u{e000}\u{10ffff}]{1,4}";
    let keys = prop::collection::vec((prop::bool::ANY, key), 1..12);
    let asked = prop::collection::vec("[abAÉé_%*\u{d7ff}\u{e000}\u{10ffff}]{1,2}", 1..4);
    let version = AtomicU64::new(0);
    runner
        .run(&(keys, asked), |(keys, asked)| {
            for (_, store) in &places {
                let version = version.fetch_add(1, Ordering::Relaxed).to_string();
                let mut entries = BTreeMap::new();
                for (in_s, key) in &keys {
                    let scope = if *in_s { "s" } else { "t" };
                    let name = EntryName {
                        scope: scope.into(),
                        version: version.clone(),
                        key: key.clone(),
                    };
                    let id = runtime.block_on(async {
                        let upload = store.reserve(name).await.ok()?;
                        Some(store.commit(upload, 0).await.unwrap().id)
                    });
                    if let Some(id) = id {
                        entries.insert((scope.to_owned(), key.clone()), id);
                    }
                }
                let texts: Vec<&str> = asked.iter().map(String::as_str).collect();
                let scopes: [Scope; 2] = ["s".into(), "t".into()];
                let query = Query {
                    scopes: &scopes,
                    version: &version,
                    keys: &texts,
                };
                let found = runtime.block_on(store.find(&query)).map(|entry| entry.id);
                prop_assert_eq!(found.as_ref(), defined(&entries, &asked));
            }
            Ok(())
        })
        .unwrap();
}

/// Changes a byte in each blob of a place that has them as files, at `at` or in the middle.
fn damage(blobs: &Path, at: Option<usize>) {
    let mut left = vec![blobs.to_owned()];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            continue;
        }
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at.unwrap_or(bytes.len() / 2);
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changed_bytes_are_never_read_and_the_rest_is() {
    let place = Place::new("PostgreSQL and a folder", StoreLimits::of_entries(LIMIT)).await;
    let store = place.open().await;
    let small = put_long(&store, "small").await;
    let size = 5_000_000u64;
    let upload = store.reserve(name("large")).await.unwrap();
    store.write(upload, 0, true, long(5_000_000)).await.unwrap();
    let large = store.commit(upload, size).await.unwrap();
    let whole: Vec<Bytes> = long(5_000_000).try_collect().await.unwrap();
    let whole = whole.concat();
    damage(&place.blobs, None);
    let Content::Remote(content) = store.open(small.id).await.unwrap() else {
        panic!("content of a folder is read through the store");
    };
    let error = content.read(0, 7).await.err().unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "{error}");
    // A range without the changed part is read as before.
    for (first, length) in [(0, 2_000_000), (3_200_000, 1_800_000), (size - 1, 1)] {
        let read = read(&store, large.id, first, length).await.unwrap();
        let first = usize::try_from(first).unwrap();
        assert!(read == whole[first..first + usize::try_from(length).unwrap()]);
    }
    for (first, length) in [(2_500_000, 1), (2_400_000, 200_000), (2_499_999, 500)] {
        assert_eq!(read(&store, large.id, first, length).await, None);
    }
    // A read that meets it ends there, and the entry is dropped.
    let Content::Remote(content) = store.open(large.id).await.unwrap() else {
        panic!("content of a folder is read through the store");
    };
    let mut stream = content.read(0, size).await.unwrap();
    let mut received = Vec::new();
    let error = loop {
        match stream.next().await.unwrap() {
            Ok(bytes) => received.extend_from_slice(&bytes),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "{error}");
    assert!(received.len() < 2_500_000 && received == whole[..received.len()]);
    while find(&store, "large").await.is_some() {
        tokio::task::yield_now().await;
    }
    put(&store, "large", "again").await;
    assert_eq!(get(&store, "large").await.as_deref(), Some("again"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_clock_that_is_wrong_makes_entries_old() {
    let limits = StoreLimits {
        unused: Some(60 * MINUTE),
        ..StoreLimits::of_entries(LIMIT)
    };
    for place in Place::all(limits).await {
        // A start with the clock ten years ahead, one at 1970, and one after years without a service.
        let years = 10 * 365 * 24 * 60 * 60 * 1000;
        for (round, clock) in [years, 0, 3 * years].into_iter().enumerate() {
            place.time.store(clock, Ordering::Relaxed);
            let store = place.open().await;
            put_long(&store, &round.to_string()).await;
            assert_eq!(store.sweep().await.unwrap(), SweepReport::default());
            store.close().await;
        }
        let store = place.open().await;
        assert_eq!(store.totals().await.unwrap().entries, 3, "{}", place.name);
        // Only time that a service saw pass counts, even if it was an earlier one.
        place.pass(45 * MINUTE);
        store.sweep().await.unwrap();
        store.close().await;
        let store = place.open().await;
        place.pass(20 * MINUTE);
        assert_eq!(store.sweep().await.unwrap().expired, 3, "{}", place.name);
        place.pass(6 * MINUTE);
        assert_eq!(store.sweep().await.unwrap().deleted, 3);
        assert_eq!(place.count(), 0);
    }
}

fn of_repository(repository: &str, key: &str) -> EntryName {
    EntryName {
        scope: format!("{repository}:refs/heads/main").as_str().into(),
        ..name(key)
    }
}

async fn put_as(store: &EntryStore, name: EntryName, size: usize) -> Result<Entry, StoreError> {
    let upload = store.reserve(name).await?;
    store.write(upload, 0, true, long(size)).await?;
    store.commit(upload, size as u64).await
}

/// How many entries of the first twenty keys a repository has.
async fn count_of(store: &EntryStore, repository: &str) -> usize {
    let mut count = 0;
    for key in 0..20 {
        let name = of_repository(repository, &format!("{key:02}"));
        let query = Query {
            scopes: &[name.scope],
            version: "v",
            keys: &[&name.key],
        };
        count += usize::from(store.find(&query).await.is_some());
    }
    count
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_that_fills_the_store_loses_its_own_entries_and_no_others() {
    let limits = StoreLimits {
        total: Some(1_000_000),
        ..StoreLimits::of_entries(LIMIT)
    };
    for place in Place::all(limits).await {
        let store = place.open().await;
        for key in 0..3 {
            let name = of_repository("1", &format!("{key:02}"));
            put_as(&store, name, 50_000).await.unwrap();
            place.pass(MINUTE);
        }
        for key in 0..20 {
            let name = of_repository("2", &format!("{key:02}"));
            put_as(&store, name, 100_000).await.unwrap();
            place.pass(MINUTE / 10);
            store.sweep().await.unwrap();
        }
        assert_eq!(count_of(&store, "1").await, 3, "{}", place.name);
        let own = count_of(&store, "2").await;
        assert!((5..=8).contains(&own), "{own}");
        assert!(store.totals().await.unwrap().bytes <= 1_000_000);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_never_committed_evicts_nothing_and_is_limited() {
    let limits = StoreLimits {
        total: Some(1_000_000),
        ..StoreLimits::of_entries(700_000)
    };
    for place in Place::all(limits).await {
        let store = place.open().await;
        for key in 0..9 {
            let name = of_repository("1", &format!("{key:02}"));
            put_as(&store, name, 100_000).await.unwrap();
        }
        // One upload takes what an entry may, however its blocks are called.
        let upload = store.reserve(of_repository("2", "a")).await.unwrap();
        for block in 0..7 {
            let block = block.to_string();
            store
                .write_block(upload, &block, long(100_000))
                .await
                .unwrap();
        }
        let more = store.write_block(upload, "7", long(100_000)).await;
        assert!(matches!(more, Err(StoreError::TooLarge { limit: 700_000 })));
        // A piece that is sent again replaces the first.
        store.write_block(upload, "6", long(100_000)).await.unwrap();
        // All uploads together take what all entries may.
        let other = store.reserve(of_repository("2", "b")).await.unwrap();
        store.write_block(other, "0", long(250_000)).await.unwrap();
        let more = store.write_block(other, "1", long(250_000)).await;
        let limit = 1_000_000;
        assert!(
            matches!(more, Err(StoreError::Crowded { limit: l }) if l == limit),
            "{more:?}"
        );
        assert_eq!(store.sweep().await.unwrap().evicted, 0, "{}", place.name);
        assert_eq!(count_of(&store, "1").await, 9);
        // Once they are given up there is room again, and a commit frees its own.
        place.pass(11 * MINUTE);
        assert_eq!(store.sweep().await.unwrap().abandoned, 2);
        for key in 0..5 {
            let name = of_repository("3", &format!("{key:02}"));
            put_as(&store, name, 600_000).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_that_is_named_often_is_counted_once_and_a_repository_keeps_to_its_limit() {
    let limits = StoreLimits {
        total: Some(1_000_000),
        repository: Some(300_000),
        ..StoreLimits::of_entries(1 << 40)
    };
    for place in Place::all(limits).await {
        let store = place.open().await;
        put_as(&store, of_repository("1", "00"), 250_000)
            .await
            .unwrap();
        let upload = store.reserve(of_repository("2", "00")).await.unwrap();
        store.write_block(upload, "x", long(100_000)).await.unwrap();
        store
            .join_blocks(upload, vec!["x".to_owned(); 20_000])
            .await
            .unwrap();
        store.commit(upload, 2_000_000_000).await.unwrap();
        assert_eq!(store.totals().await.unwrap().bytes, 350_000);
        assert_eq!(store.sweep().await.unwrap(), SweepReport::default());
        for key in 1..4 {
            place.pass(MINUTE);
            let name = of_repository("2", &format!("{key:02}"));
            put_as(&store, name, 90_000).await.unwrap();
        }
        // The oldest of the repository that has too much.
        assert_eq!(store.sweep().await.unwrap().evicted, 1, "{}", place.name);
        assert_eq!(count_of(&store, "1").await, 1);
        assert_eq!(count_of(&store, "2").await, 3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_that_do_not_get_on_stop_no_others() {
    let place = Place::new("SQLite and a folder", StoreLimits::of_entries(LIMIT)).await;
    let store = place.open().await;
    let mut slow = Vec::new();
    for number in 0..60 {
        let upload = store
            .reserve(name(&format!("slow-{number}")))
            .await
            .unwrap();
        // Each exceeds the gathering limit before anything is written, and sends no more.
        let (told, begun) = tokio::sync::oneshot::channel();
        let waits = stream::once(async move {
            let _ = told.send(());
            std::future::pending::<Chunk>().await
        });
        let store = store.clone();
        slow.push(tokio::spawn(async move {
            store
                .write(upload, 0, true, long(300_000).chain(waits))
                .await
        }));
        begun.await.unwrap();
    }
    let upload = store.reserve(name("quick")).await.unwrap();
    store.write(upload, 0, true, long(1_000_000)).await.unwrap();
    store.commit(upload, 1_000_000).await.unwrap();
    for slow in slow {
        assert!(!slow.is_finished());
        slow.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_entry_needs_no_blob_of_its_own_and_a_large_one_is_in_none_of_the_databases_rows() {
    for place in Place::all(StoreLimits::of_entries(LIMIT)).await {
        let store = place.open().await;
        for (size, blobs) in [(1, 0), (20_000, 0), (256 * 1024, 0), (256 * 1024 + 1, 1)] {
            let entry = put_as(&store, name(&size.to_string()), size).await.unwrap();
            assert_eq!(place.count(), blobs, "{} {size}", place.name);
            let expected: Vec<Bytes> = long(size).try_collect().await.unwrap();
            let read = read(&store, entry.id, 0, size as u64).await.unwrap();
            assert!(read == expected.concat(), "{} {size}", place.name);
        }
        // The same of its pieces and blocks: the last of a large entry is often small.
        let upload = store.reserve(name("blocks")).await.unwrap();
        for (block, size) in [("1", 270_000), ("2", 700)] {
            store.write_block(upload, block, long(size)).await.unwrap();
        }
        let list = ["1", "2", "1"].map(str::to_owned).to_vec();
        store.join_blocks(upload, list).await.unwrap();
        let entry = store.commit(upload, 540_700).await.unwrap();
        assert_eq!(place.count(), 2);
        let whole: Vec<Bytes> = long(270_000).try_collect().await.unwrap();
        let whole = whole.concat();
        let all = [&whole[..], &whole[..700], &whole[..]].concat();
        for (first, length) in [(0, 540_700), (269_999, 702), (270_001, 5), (540_699, 1)] {
            let part = read(&store, entry.id, first, length).await.unwrap();
            let range = usize::try_from(first).unwrap()..usize::try_from(first + length).unwrap();
            assert!(part == all[range], "{} {first}+{length}", place.name);
        }
    }
}

/// The segments of a place, oldest first.
fn segments(place: &Place) -> Vec<PathBuf> {
    let folder = place._folder.path().join("contents");
    let files = std::fs::read_dir(folder).unwrap();
    let mut segments: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    segments.sort();
    segments
}

/// How many bytes of the disk the segments of a place take.
fn segment_bytes(place: &Place) -> u64 {
    let taken = |path: &std::path::PathBuf| {
        let metadata = path.metadata().unwrap();
        #[cfg(unix)]
        let blocks = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
        #[cfg(not(unix))]
        let blocks = u64::MAX;
        metadata.len().min(blocks)
    };
    segments(place).iter().map(taken).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn content_that_changed_in_the_database_or_its_segment_is_a_miss_and_is_saved_again() {
    type Change = fn(&Path);
    let place = Place::new("SQLite and a folder", StoreLimits::of_entries(LIMIT)).await;
    let mut store = place.open().await;
    for change in [
        "UPDATE contents SET start = start + 1",
        "UPDATE contents SET length = length - 1",
        "UPDATE contents SET length = 1 << 60",
        "UPDATE contents SET segment = 99",
        "UPDATE contents SET segment = NULL, content = X'636f6e74656e75'",
        "DELETE FROM contents",
    ] {
        let entry = put(&store, "k", "content").await;
        assert_eq!(get(&store, "k").await.as_deref(), Some("content"));
        change_sqlite(&place, &[change]).await;
        assert!(store.open(entry.id).await.is_none(), "{change}");
        assert!(find(&store, "k").await.is_none(), "{change}");
    }
    let changes: [(&str, Change); 3] = [
        ("changed", |segment| {
            let length = std::fs::read(segment).unwrap().len();
            std::fs::write(segment, "x".repeat(length)).unwrap();
        }),
        ("emptied", |segment| std::fs::write(segment, "").unwrap()),
        ("deleted", |segment| std::fs::remove_file(segment).unwrap()),
    ];
    for (what, change) in changes {
        let entry = put(&store, "k", "content").await;
        assert_eq!(get(&store, "k").await.as_deref(), Some("content"));
        store.close().await;
        change(segments(&place).last().unwrap());
        store = place.open().await;
        assert!(store.open(entry.id).await.is_none(), "{what}");
        assert!(find(&store, "k").await.is_none(), "{what}");
    }
    put(&store, "k", "content").await;
    assert_eq!(get(&store, "k").await.as_deref(), Some("content"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn segments_that_are_mostly_dead_are_emptied_while_jobs_read_and_write() {
    const SIZE: usize = 200_000;
    let limits = StoreLimits {
        unused: Some(60 * MINUTE),
        ..StoreLimits::of_entries(LIMIT)
    };
    let place = Place::new("SQLite and a folder", limits).await;
    let store = place.open().await;
    let content: Vec<Bytes> = long(SIZE).try_collect().await.unwrap();
    let content = content.concat();
    for number in 0..100 {
        put_as(&store, name(&format!("{number}")), SIZE)
            .await
            .unwrap();
    }
    let before = segment_bytes(&place);
    assert_eq!(before, 100 * SIZE as u64);
    place.pass(40 * MINUTE);
    let used: Vec<String> = (0..100)
        .step_by(10)
        .map(|number| number.to_string())
        .collect();
    for key in &used {
        assert!(find(&store, key).await.is_some());
    }
    place.pass(40 * MINUTE);
    let reads = async {
        for _ in 0..20 {
            for key in &used {
                let found = find(&store, key).await.unwrap();
                let read = read(&store, found.id, 0, SIZE as u64).await;
                assert!(read.is_some_and(|read| read == content), "{key}");
            }
        }
    };
    let writes = async {
        for number in 0..10 {
            let key = format!("new {number}");
            put_as(&store, name(&key), SIZE).await.unwrap();
        }
    };
    let (swept, (), ()) = tokio::join!(store.sweep(), reads, writes);
    assert_eq!(swept.unwrap().expired, 90);
    // The segment that is appended to stays as it is.
    store.sweep().await.unwrap();
    let live = 20 * SIZE as u64;
    let after = segment_bytes(&place);
    assert!(after >= live && after < live + (5 << 20), "{after}");
    store.close().await;
    let store = place.open().await;
    store.sweep().await.unwrap();
    let after = segment_bytes(&place);
    assert!(after >= live && after < live * 3 / 2, "{after}");
    for key in used
        .into_iter()
        .chain((0..10).map(|number| format!("new {number}")))
    {
        let found = find(&store, &key).await.unwrap();
        let read = read(&store, found.id, 0, SIZE as u64).await;
        assert!(read.is_some_and(|read| read == content), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn segments_that_a_killed_service_or_another_database_left_are_deleted() {
    let place = Place::new("SQLite and a folder", StoreLimits::of_entries(LIMIT)).await;
    let store = place.open().await;
    put(&store, "k", "content").await;
    let folder = place._folder.path().join("contents");
    let left = folder.join("0000000007.segment");
    let other = folder.join("notes");
    for path in [&left, &other] {
        std::fs::write(path, "left").unwrap();
    }
    store.sweep().await.unwrap();
    assert!(!left.exists() && other.exists());
    store.close().await;
    let store = place.open().await;
    store.sweep().await.unwrap();
    assert_eq!(get(&store, "k").await.as_deref(), Some("content"));
}

/// Has the database of a place do this, as another program would.
async fn change_sqlite(place: &Place, statements: &[&str]) {
    use sqlx::{Connection, Executor, SqliteConnection};
    let Database::Sqlite(path) = &place.storage.database else {
        panic!("{} has another database", place.name);
    };
    let url = format!("sqlite:{}", path.display());
    let mut connection = SqliteConnection::connect(&url).await.unwrap();
    for statement in statements {
        let statement = sqlx::AssertSqlSafe((*statement).to_owned());
        connection.execute(statement).await.unwrap();
    }
    connection.close().await.unwrap();
}

/// The same in PostgreSQL.
async fn change_postgres(place: &Place, statements: &[&str]) {
    use sqlx::{Connection, Executor, PgConnection};
    let Database::Postgres(PostgresUrl(url)) = &place.storage.database else {
        panic!("{} has another database", place.name);
    };
    let mut connection = PgConnection::connect(url).await.unwrap();
    for statement in statements {
        let statement = sqlx::AssertSqlSafe((*statement).to_owned());
        connection.execute(statement).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_of_an_older_version_is_read_and_written_on() {
    // A service that had small contents in their rows, one before that, and one before there were digests.
    let to_3 = [
        "ALTER TABLE contents DROP COLUMN segment",
        "ALTER TABLE contents DROP COLUMN start",
        "ALTER TABLE contents DROP COLUMN length",
    ];
    let in_row = "UPDATE contents SET content = CAST('content' AS BLOB)";
    let to_2 = [
        "DROP TABLE contents",
        "ALTER TABLE parts DROP COLUMN inside",
    ];
    let to_1 = [
        "ALTER TABLE parts DROP COLUMN digests",
        "ALTER TABLE entries DROP COLUMN stored",
    ];
    for place in Place::all(StoreLimits::of_entries(LIMIT)).await {
        for version in ["3", "2", "1"] {
            let store = place.open().await;
            let key = format!("before {version}");
            let entry = put_long(&store, &key).await;
            if version == "3" {
                put(&store, "small before 3", "content").await;
            }
            let half = store
                .reserve(name(&format!("half {version}")))
                .await
                .unwrap();
            store.write_block(half, "1", long(LONG)).await.unwrap();
            store.close().await;
            let set = format!("UPDATE settings SET value = '{version}' WHERE name = 'schema'");
            let bare = "UPDATE entries SET parts = '[[' || SUBSTR(parts, 3, \
                        POSITION(',' IN SUBSTR(parts, 3)) - 1) || ',300000]]'";
            let bare_in_sqlite = "UPDATE entries SET parts = '[[' || SUBSTR(parts, 3, \
                        INSTR(SUBSTR(parts, 3), ',') - 1) || ',300000]]'";
            let mut statements = Vec::new();
            match version {
                "3" => statements.extend(to_3),
                "2" => statements.extend(to_2),
                _ => statements.extend(to_2.into_iter().chain(to_1)),
            }
            statements.push(&set);
            if place.name.contains("SQLite") {
                // A part without digests, as the first version had them.
                statements.extend((version == "1").then_some(bare_in_sqlite));
                statements.extend((version == "3").then_some(in_row));
                if version == "1" {
                    statements.extend(["PRAGMA auto_vacuum = NONE", "VACUUM"]);
                }
                change_sqlite(&place, &statements).await;
            } else {
                statements.extend((version == "1").then_some(bare));
                change_postgres(&place, &statements).await;
            }
            let store = place.open().await;
            let whole: Vec<Bytes> = long(LONG).try_collect().await.unwrap();
            let found = find(&store, &key).await.unwrap();
            assert_eq!(found.id, entry.id, "{} {version}", place.name);
            let read = read(&store, entry.id, 0, LONG as u64).await.unwrap();
            assert!(read == whole.concat(), "{} {version}", place.name);
            if version == "3" {
                let small = get(&store, "small before 3").await;
                assert_eq!(small.as_deref(), Some("content"), "{}", place.name);
                let small = find(&store, "small before 3").await.unwrap();
                store.mark_missing(small.id).await;
            }
            // An upload continues at its place.
            store.write_block(half, "2", long(7)).await.unwrap();
            let list = ["1", "2"].map(str::to_owned).to_vec();
            store.join_blocks(half, list).await.unwrap();
            store.commit(half, LONG as u64 + 7).await.unwrap();
            let small = format!("small after {version}");
            put(&store, &small, "content").await;
            assert_eq!(get(&store, &small).await.as_deref(), Some("content"));
            store.mark_missing(found.id).await;
            // The next round begins with what an older version may have.
            let half = find(&store, &format!("half {version}")).await.unwrap();
            store.mark_missing(half.id).await;
            store
                .mark_missing(find(&store, &small).await.unwrap().id)
                .await;
            store.close().await;
            if let Database::Sqlite(path) = &place.storage.database {
                use sqlx::{Connection, SqliteConnection};
                let url = format!("sqlite:{}", path.display());
                let mut connection = SqliteConnection::connect(&url).await.unwrap();
                let vacuum: i64 = sqlx::query_scalar("PRAGMA auto_vacuum")
                    .fetch_one(&mut connection)
                    .await
                    .unwrap();
                assert_eq!(vacuum, 2, "it gives free pages back, {version}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_stays_in_memory_is_written_down_after_a_second() {
    let place = Place::new("SQLite and a folder", StoreLimits::of_entries(LIMIT)).await;
    let store = place.open().await;
    let sweeping = tokio::spawn({
        let store = store.clone();
        async move { store.run_sweeps(60 * MINUTE).await }
    });
    let upload = store.reserve(name("a")).await.unwrap();
    store
        .write(upload, 0, true, pieces(&["content"]))
        .await
        .unwrap();
    place.pass(MINUTE / 60);
    // The view of another program, and the state after the process is killed.
    let written = async {
        while written_uploads(&place).await == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(MINUTE, written).await.unwrap();
    sweeping.abort();
    store.commit(upload, 7).await.unwrap();
    assert_eq!(get(&store, "a").await.as_deref(), Some("content"));
    assert_eq!(written_uploads(&place).await, 0);
}

/// How many uploads a place's database has.
async fn written_uploads(place: &Place) -> i64 {
    use sqlx::{Connection, Row, SqliteConnection};
    let Database::Sqlite(path) = &place.storage.database else {
        panic!("{} has another database", place.name);
    };
    let url = format!("sqlite:{}", path.display());
    let mut connection = SqliteConnection::connect(&url).await.unwrap();
    let row = sqlx::query("SELECT COUNT(*) FROM uploads")
        .fetch_one(&mut connection)
        .await;
    row.unwrap().try_get(0).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_that_went_is_not_found_by_what_was_known_of_it() {
    let limits = StoreLimits {
        total: Some(1_000),
        unused: Some(60 * MINUTE),
        ..StoreLimits::of_entries(LIMIT)
    };
    for place in Place::all(limits).await {
        let store = place.open().await;
        let content: &'static str = "x".repeat(600).leak();
        let first = put(&store, "a", content).await;
        assert!(find(&store, "a").await.is_some());
        place.pass(MINUTE);
        put(&store, "b", content).await;
        assert_eq!(store.sweep().await.unwrap().evicted, 1, "{}", place.name);
        assert!(find(&store, "a").await.is_none(), "{}", place.name);
        let again = put(&store, "a", "again").await;
        assert!(again.id > first.id);
        assert_eq!(find(&store, "a").await.unwrap().id, again.id);
        place.pass(61 * MINUTE);
        store.sweep().await.unwrap();
        assert!(find(&store, "a").await.is_none() && find(&store, "b").await.is_none());
    }
}
