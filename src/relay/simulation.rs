//! A simulation of relays and the cache service in one process, with time that the test controls: jobs that
//! overlap and are killed, and a service that fails, lags, evicts, and returns damaged bytes.
//!
//! A seed decides what happens. `SCCACHE_ACTION_TEST_SEEDS=FIRST..LAST` runs others.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::ops::Range;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::*;
use crate::cache_client::{InProcess, Protocol};
use crate::cache_protocol::store::{Content, Store};
use crate::packs::index::ObjectKey;

/// Numbers that follow from a seed (SplitMix64).
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    fn seconds(&mut self, end: u64) -> Duration {
        Duration::from_millis(self.below(end * 1000))
    }
}

#[derive(Debug)]
struct StoredEntry {
    id: u64,
    content: Bytes,
    seen_from: Instant,
    /// When it was last found or read.
    used: Instant,
}

#[derive(Debug)]
struct ServiceState {
    dice: Dice,
    /// Whether anything goes wrong.
    is_faulty: bool,
    entries: BTreeMap<String, StoredEntry>,
    reserved: BTreeMap<u64, (String, Bytes)>,
    next: u64,
    evicted: Vec<Bytes>,
}

impl ServiceState {
    fn note_use(&mut self, id: u64) {
        let used = Instant::now();
        if let Some(entry) = self.entries.values_mut().find(|entry| entry.id == id) {
            entry.used = used;
        }
    }
}

/// GitHub's cache service as far as a relay sees it.
#[derive(Debug)]
struct Service(Mutex<ServiceState>);

impl Service {
    fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self(Mutex::new(ServiceState {
            dice: Dice(seed),
            is_faulty: !seed.is_multiple_of(4),
            entries: BTreeMap::new(),
            reserved: BTreeMap::new(),
            next: 1,
            evicted: Vec::new(),
        })))
    }

    /// Takes a while, and may fail. The service may have done the request all the same.
    async fn answer<T>(&self, value: T) -> Result<T, CacheError> {
        let (wait, fault) = {
            let mut state = lock(&self.0);
            let wait = Duration::from_millis(state.dice.below(400));
            let fault = if state.is_faulty {
                state.dice.below(40)
            } else {
                40
            };
            (wait, fault)
        };
        tokio::time::sleep(wait).await;
        match fault {
            0 => Err(CacheError::Unavailable("a fault".to_owned())),
            1 => Err(CacheError::Throttled { retry_after: None }),
            _ => Ok(value),
        }
    }

    /// Evicts the entry that was used the longest ago, as GitHub does, but none that was used just now, and
    /// not the last entry: the service would grant its number again while jobs run that have read it.
    fn evict(&self) {
        let mut state = lock(&self.0);
        let oldest = state.entries.iter().min_by_key(|(_, entry)| entry.used);
        let Some(key) = oldest.map(|(key, _)| key.clone()) else {
            return;
        };
        let is_last = state.entries.keys().next_back() == Some(&key);
        let old = |entry: &StoredEntry| entry.used.elapsed() > Duration::from_secs(60);
        let is_old = state.entries.get(&key).is_some_and(old);
        if is_old
            && !is_last
            && let Some(entry) = state.entries.remove(&key)
        {
            state.evicted.push(entry.content);
        }
    }

    /// Ends all faults and makes all entries visible.
    fn heal(&self) {
        let mut state = lock(&self.0);
        state.is_faulty = false;
        for entry in state.entries.values_mut() {
            entry.seen_from = Instant::now();
        }
    }

    /// Each entry with the packs that it lists, those marked that have the object, and the entries that it
    /// names.
    fn describe(&self, key: ObjectKey) -> String {
        let state = lock(&self.0);
        let short = |name: &String| name.rsplit('#').next().unwrap_or_default().to_owned();
        let describe = |(name, entry): (&String, &StoredEntry)| {
            let Ok(stored) = crate::packs::pack::read(&entry.content, name) else {
                return format!("{name}: damaged");
            };
            let packs = stored.index.packs.iter().map(|(name, pack)| {
                let mark = if pack.objects.contains_key(&key) {
                    "*"
                } else {
                    ""
                };
                format!(
                    "{}{mark}@{}",
                    short(name),
                    pack.created.since(BEGIN).as_secs()
                )
            });
            let packs: Vec<String> = packs.collect();
            let named: Vec<String> = stored.index.unmerged.keys().map(short).collect();
            format!(
                "{} made {}: {packs:?}, names {named:?}",
                short(name),
                entry.id
            )
        };
        let entries: Vec<String> = state.entries.iter().map(describe).collect();
        entries.join("\n")
    }

    fn had(&self, object: &[u8]) -> bool {
        let state = lock(&self.0);
        let holds = |content: &Bytes| content.windows(object.len()).any(|part| part == object);
        state.evicted.iter().any(holds)
    }
}

impl InProcess for Service {
    fn find(&self, keys: Vec<String>) -> BoxFuture<'_, Result<Option<(String, u64)>, CacheError>> {
        async move {
            let found = {
                let mut state = lock(&self.0);
                let seen = |entry: &&StoredEntry| entry.seen_from <= Instant::now();
                let found = keys.iter().find_map(|key| {
                    let of_key = state.entries.get_key_value(key);
                    let exact = of_key.filter(|(_, entry)| seen(entry));
                    let begins = state
                        .entries
                        .iter()
                        .filter(|(name, _)| name.starts_with(key));
                    let newest = begins
                        .filter(|(_, entry)| seen(entry))
                        .max_by_key(|(_, entry)| entry.id);
                    let (name, entry) = exact.or(newest)?;
                    Some((name.clone(), entry.id))
                });
                if let Some((_, id)) = &found {
                    state.note_use(*id);
                }
                found
            };
            self.answer(found).await
        }
        .boxed()
    }

    fn reserve(&self, key: String) -> BoxFuture<'_, Result<Option<u64>, CacheError>> {
        async move {
            let granted = {
                let mut state = lock(&self.0);
                let taken = state.entries.contains_key(&key)
                    || state
                        .reserved
                        .values()
                        .any(|(reserved, _)| *reserved == key);
                (!taken).then(|| {
                    state.next += 1;
                    let upload = state.next;
                    state.reserved.insert(upload, (key, Bytes::new()));
                    upload
                })
            };
            self.answer(granted).await
        }
        .boxed()
    }

    fn upload(&self, upload: u64, content: Vec<u8>) -> BoxFuture<'_, Result<(), CacheError>> {
        async move {
            self.answer(()).await?;
            let mut state = lock(&self.0);
            let reserved = state.reserved.get_mut(&upload).ok_or(CacheError::Gone)?;
            reserved.1 = content.into();
            Ok(())
        }
        .boxed()
    }

    fn commit(&self, upload: u64) -> BoxFuture<'_, Result<(), CacheError>> {
        async move {
            let wait = lock(&self.0).dice.seconds(3);
            tokio::time::sleep(wait).await;
            {
                let mut state = lock(&self.0);
                let (key, content) = state.reserved.remove(&upload).ok_or(CacheError::Gone)?;
                state.next += 1;
                let lag = if state.is_faulty {
                    state.dice.seconds(5)
                } else {
                    Duration::ZERO
                };
                let entry = StoredEntry {
                    id: state.next,
                    content,
                    seen_from: Instant::now() + lag,
                    used: Instant::now(),
                };
                state.entries.insert(key, entry);
            }
            self.answer(()).await
        }
        .boxed()
    }

    fn content(&self, id: u64) -> BoxFuture<'_, Result<Bytes, CacheError>> {
        async move {
            self.answer(()).await?;
            let mut state = lock(&self.0);
            state.note_use(id);
            let mut entries = state.entries.values();
            let entry = entries
                .find(|entry| entry.id == id)
                .ok_or(CacheError::Gone)?;
            let content = entry.content.clone();
            if !state.is_faulty || !state.dice.one_in(20) || content.is_empty() {
                return Ok(content);
            }
            let mut flipped = content.to_vec();
            let place = state.dice.below(flipped.len() as u64) as usize;
            flipped[place] ^= 1;
            Ok(flipped.into())
        }
        .boxed()
    }
}

/// The object of this number: its key, and its bytes.
fn object(number: u64) -> (ObjectKey, Vec<u8>) {
    let key = blake3::hash(&number.to_le_bytes());
    let mut bytes = vec![0; 50 + (number % 5 * 3000) as usize];
    blake3::Hasher::new_derive_key("content")
        .update(key.as_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    (ObjectKey(*key.as_bytes()), bytes)
}

/// A whole machine's jobs, one after the other and at the same time.
struct World {
    service: Arc<Service>,
    folder: tempfile::TempDir,
    started: Instant,
}

/// When the simulated time begins.
const BEGIN: Timestamp = Timestamp::from_seconds(1_800_000_000);

impl World {
    fn new(seed: u64) -> Self {
        Self {
            service: Service::new(seed),
            folder: tempfile::tempdir().unwrap(),
            started: Instant::now(),
        }
    }

    fn relay(&self, name: &str) -> Arc<Relay> {
        let token = || BearerToken::new("none");
        let config = RelayConfig {
            task: RelayTask::Store,
            endpoint: Endpoint {
                protocol: Protocol::V2,
                url: "http://localhost/".parse().unwrap(),
                token: token(),
            },
            client_token: token(),
            control_token: token(),
            folder: self.folder.path().join(name),
            namespace: "default".to_owned(),
            platform: "linux-x64".to_owned(),
            read: vec!["main".to_owned()],
            write: Some("main".to_owned()),
            lane: 1,
            max_size: 10 << 30,
            flush_age: Duration::from_secs(20),
            free_floor: 0,
        };
        let client = CacheClient::in_process(self.service.clone());
        let began = BEGIN + self.started.elapsed();
        Relay::with(config, client, began).unwrap()
    }
}

/// Whether the relay has an object. Its bytes must be right then.
async fn reads(relay: &Arc<Relay>, number: u64) -> bool {
    let (key, bytes) = object(number);
    let Some((id, size)) = relay.find_object(key).await else {
        return false;
    };
    assert_eq!(size, bytes.len() as u64);
    match relay.open(id).await {
        Some(Content::Bytes(read)) => {
            assert_eq!(read, bytes, "other bytes were served");
            true
        }
        Some(_) => panic!("a small object is in memory"),
        None => false,
    }
}

/// A job that reads objects of earlier ones and writes its own. Returns those that it reports as saved.
async fn job(world: &World, name: u64, mut dice: Dice) -> Vec<u64> {
    tokio::time::sleep(dice.seconds(60)).await;
    let relay = world.relay(&name.to_string());
    let reading = tokio::spawn(relay.clone().load());
    let saving = tokio::spawn(relay.writer.clone().run(relay.stop.clone()));
    let killed_after = if dice.one_in(4) {
        dice.seconds(200)
    } else {
        Duration::MAX
    };
    let work = async {
        let mut written = Vec::new();
        for place in 0..dice.below(6) {
            tokio::time::sleep(dice.seconds(60)).await;
            reads(&relay, dice.below(60)).await;
            let number = name * 10 + place;
            let (key, bytes) = object(number);
            relay.store_object(key, &mut Cursor::new(bytes)).unwrap();
            written.push(number);
        }
        relay.finish(Duration::from_secs(300)).await;
        match relay.activity().unsaved {
            0 => written,
            _ => Vec::new(),
        }
    };
    let saved = tokio::time::timeout(killed_after, work).await;
    reading.abort();
    saving.abort();
    saved.unwrap_or_default()
}

async fn simulate(seed: u64) {
    let world = World::new(seed);
    let mut dice = Dice(seed ^ 0x5eed);
    let jobs = 2 + dice.below(5);
    let jobs = (0..jobs).map(|name| job(&world, name, Dice(dice.next())));
    let evictions = eviction_times(seed);
    let evict = async {
        for wait in evictions {
            tokio::time::sleep(wait).await;
            world.service.evict();
        }
    };
    let all = futures_util::future::join(futures_util::future::join_all(jobs), evict);
    let day = Duration::from_secs(24 * 60 * 60);
    let (saved, ()) = tokio::time::timeout(day, all)
        .await
        .expect("every job ends");
    world.service.heal();
    let later = world.relay("later");
    later.clone().load().await;
    for number in saved.into_iter().flatten() {
        let found = reads(&later, number).await;
        let (key, bytes) = object(number);
        assert!(
            found || world.service.had(&bytes),
            "object {number} was saved and is not found; the service has\n{}",
            world.service.describe(key)
        );
    }
}

fn eviction_times(seed: u64) -> Vec<Duration> {
    let mut dice = Dice(seed ^ 0xe71c);
    let count = dice.below(5);
    (0..count).map(|_| dice.seconds(200)).collect()
}

fn in_paused_time(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(test);
}

fn seeds() -> Range<u64> {
    let range = std::env::var("SCCACHE_ACTION_TEST_SEEDS").ok();
    let Some(range) = range else {
        return 0..100;
    };
    let ends = range.split_once("..").unwrap_or((&range, &range));
    let first: u64 = ends.0.parse().expect("FIRST..LAST");
    let last: u64 = ends.1.parse().expect("FIRST..LAST");
    first..last.max(first + 1)
}

#[test]
fn whatever_the_service_does_what_is_served_is_right_and_what_is_saved_is_found() {
    for seed in seeds() {
        let run = std::panic::AssertUnwindSafe(|| in_paused_time(simulate(seed)));
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("the seed is {seed}: SCCACHE_ACTION_TEST_SEEDS={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn what_is_used_every_few_days_stays_and_what_is_not_goes_after_a_week() {
    in_paused_time(async {
        let world = World::new(0);
        let run = async |name: u64, read: &[u64], write: &[u64]| {
            let relay = world.relay(&name.to_string());
            relay.clone().load().await;
            for number in read {
                assert!(reads(&relay, *number).await, "{number} on day {name}");
            }
            for number in write {
                let (key, bytes) = object(*number);
                relay.store_object(key, &mut Cursor::new(bytes)).unwrap();
            }
            relay.finish(Duration::from_secs(300)).await;
            assert_eq!(relay.activity().unsaved, 0);
            relay
        };
        run(0, &[], &[1, 2]).await;
        for day in 1..=9 {
            tokio::time::sleep(Duration::from_secs(24 * 60 * 60)).await;
            let read: &[u64] = if day % 3 == 0 { &[1] } else { &[] };
            run(day, read, &[100 + day]).await;
        }
        let later = world.relay("later");
        later.clone().load().await;
        let index = &later.writer.chains().lock().await[0].index;
        let has = |number| index.objects().any(|(key, ..)| *key == object(number).0);
        assert!(has(1) && !has(2));
    });
}
