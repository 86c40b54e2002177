//! `sccache-action serve` as a process: what it does when it is killed or told to end, whom it lets
//! in, what it tells.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::conformance::target::{Answer, Cache, Target, V1, Who, noise, send};
use crate::support::postgres::Postgres;
use crate::support::served::Served;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use hmac::{Hmac, Mac};
use reqwest::Method;
use sccache_action::clock::Timestamp;
use sccache_action::serve::catalog::{Database, PostgresUrl};
use sccache_action::serve::entry_store::{EntryStore, StorageConfig, StoreLimits};
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// The service with its default branch's token.
fn target(served: &Served, token: &str) -> Target {
    let tokens = HashMap::from([(Who::Default, token.to_owned())]);
    Target::new(vec![served.url.clone()], tokens)
}

fn files(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries
        .map(|entry| match entry.unwrap().path() {
            path if path.is_dir() => files(&path),
            _ => 1,
        })
        .sum()
}

/// Clients that save at once.
const WRITERS: u64 = 8;

/// Clients that read at once.
const READERS: u64 = 2;

/// For how long a service is killed again and again.
const KILLING: Duration = Duration::from_secs(20);

/// Its result.
#[derive(Debug, Default)]
struct Counts {
    rounds: u64,
    commits: u64,
    reads: u64,
    lost: u64,
    changed: u64,
}

/// The result of reading an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Read {
    /// It is unchanged.
    Same,
    Changed,
    Lost,
    /// The service is gone.
    NoService,
}

impl Counts {
    fn read(&mut self, read: Read) {
        match read {
            Read::Same => self.reads += 1,
            Read::Changed => self.changed += 1,
            Read::Lost => self.lost += 1,
            Read::NoService => {}
        }
    }

    /// Prints it, even if the test runner captures output.
    fn say(&self, over: &str) {
        let Self {
            rounds,
            commits,
            reads,
            lost,
            changed,
        } = self;
        let mut output = std::io::stderr();
        std::io::Write::write_fmt(
            &mut output,
            format_args!(
                "kill -9 over {over}: {rounds} rounds, {commits} commits, {reads} reads, {lost} lost, \
                 {changed} changed\n"
            ),
        )
        .unwrap();
    }
}

/// Saves and reads until a number of entries is saved, and returns them; the service is killed in
/// the middle.
async fn save_until_killed(
    served: Served,
    version: &str,
    round: u64,
    known: &[String],
    counts: &mut Counts,
) -> Vec<String> {
    let target = target(&served, &served.token);
    let mut cache = target.cache();
    version.clone_into(&mut cache.version);
    let mut saved = Vec::new();
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let writers = (0..WRITERS).map(|writer| {
        let (target, cache, told) = (&target, &cache, told.clone());
        async move {
            for number in 0.. {
                let key = format!("{round}-{writer}-{number}");
                if save(target, cache, &key).await.is_none() {
                    return;
                }
                told.send(key).unwrap();
            }
        }
    });
    let readers = (0..READERS).map(|reader| {
        let (target, cache) = (&target, &cache);
        async move {
            let mut counts = Counts::default();
            for number in 0u64.. {
                let Some(key) =
                    known.get(((number * 7 + reader) % known.len().max(1) as u64) as usize)
                else {
                    break;
                };
                let read = load(target, cache, key).await;
                counts.read(read);
                if read == Read::NoService {
                    break;
                }
            }
            counts
        }
    });
    let killer = async {
        // Never at the same moment of what goes on.
        for _ in 0..100 + round * 37 % 100 {
            saved.push(heard.recv().await.unwrap());
        }
        served.kill();
    };
    let (_, read, ()) = tokio::join!(
        futures_util::future::join_all(writers),
        futures_util::future::join_all(readers),
        killer
    );
    drop(told);
    while let Some(key) = heard.recv().await {
        saved.push(key);
    }
    for read in read {
        counts.reads += read.reads;
        counts.lost += read.lost;
        counts.changed += read.changed;
    }
    counts.commits += saved.len() as u64;
    saved
}

/// Reads all of `keys`.
async fn read_all(served: &Served, version: &str, keys: &[String], counts: &mut Counts) {
    let target = target(served, &served.token);
    let mut cache = target.cache();
    version.clone_into(&mut cache.version);
    for key in keys {
        let read = load(&target, &cache, key).await;
        assert_ne!(read, Read::NoService);
        counts.read(read);
    }
}

/// Kills a service repeatedly while clients save and read, and looks for the entries that were
/// answered as committed: each time for those of the last round and in the end for all.
async fn kill_again_and_again(
    over: &str,
    storage: StorageConfig,
    arguments: &[&str],
    folder: &Path,
) {
    let version = "0".repeat(64);
    let begun = Instant::now();
    let (mut all, mut last, mut counts) = (Vec::new(), Vec::new(), Counts::default());
    while begun.elapsed() < KILLING || counts.rounds < 3 {
        let served = Served::start(folder, arguments);
        read_all(&served, &version, &last, &mut counts).await;
        last = save_until_killed(served, &version, counts.rounds, &all, &mut counts).await;
        all.extend(last.iter().cloned());
        counts.rounds += 1;
    }
    let served = Served::start(folder, arguments);
    read_all(&served, &version, &all, &mut counts).await;
    served.kill();
    counts.say(over);
    assert_eq!((counts.lost, counts.changed), (0, 0), "{counts:?}");
    // The leftovers of the kills go in time, and nothing else does.
    let time = Arc::new(AtomicU64::new(Timestamp::now().milliseconds()));
    let clock = {
        let time = time.clone();
        Arc::new(move || Duration::from_millis(time.load(Ordering::Relaxed)))
    };
    let store = EntryStore::open(&storage, clock).await.unwrap();
    let mut abandoned = 0;
    for _ in 0..3 {
        time.fetch_add(11 * 60 * 1000, Ordering::Relaxed);
        abandoned += store.sweep().await.unwrap().abandoned;
    }
    let totals = store.totals().await.unwrap();
    let tried = WRITERS * counts.rounds;
    assert!(abandoned <= tried);
    assert_eq!(totals.uploads, 0);
    // One per writer and round may have been committed without an answer that came through.
    let extra = totals.entries - all.len() as u64;
    assert!(extra <= tried, "{totals:?} {}", all.len());
    // Small ones are in the database.
    let large = all.iter().filter(|key| is_large(key)).count() as u64;
    let files = files(&folder.join("blobs")) as u64;
    assert!((large..=large + extra).contains(&files), "{large} {files}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_loses_no_committed_entry_and_leaves_no_half_one() {
    let folder = tempfile::tempdir().unwrap();
    let storage = StorageConfig::in_folder(folder.path(), StoreLimits::of_entries(1 << 30));
    kill_again_and_again("SQLite", storage, &[], folder.path()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_loses_no_committed_entry_in_postgresql_and_leaves_no_half_one() {
    let folder = tempfile::tempdir().unwrap();
    let postgres = Postgres::shared();
    let url = postgres.new_database().await;
    let storage = StorageConfig {
        database: Database::Postgres(PostgresUrl(url.clone())),
        lock: None,
        ..StorageConfig::in_folder(folder.path(), StoreLimits::of_entries(1 << 30))
    };
    let arguments = ["--database", &url];
    kill_again_and_again("PostgreSQL", storage, &arguments, folder.path()).await;
}

fn is_large(key: &str) -> bool {
    key.ends_with('7')
}

/// Some ten or some hundred thousand bytes, the key's own.
fn content(key: &str) -> Vec<u8> {
    let mut bytes = noise(if is_large(key) { 300_000 } else { 20_000 });
    bytes.extend_from_slice(key.as_bytes());
    bytes
}

/// Calls version 2; `None` if the service is gone.
async fn call(target: &Target, cache: &Cache<'_>, method: &str, mut body: Value) -> Option<Value> {
    body["version"] = json!(cache.version);
    let path = format!("{}/{method}", crate::conformance::target::V2);
    let request = target
        .request(Method::POST, &path)
        .bearer_auth(target.token(Who::Default))
        .header("content-type", "application/json")
        .body(body.to_string());
    let answer = request.send().await.ok()?;
    assert_eq!(answer.status(), 200, "{method}");
    serde_json::from_slice(&answer.bytes().await.ok()?).ok()
}

/// Saves an entry, unless the service goes away.
async fn save(target: &Target, cache: &Cache<'_>, key: &str) -> Option<()> {
    let created = call(target, cache, "CreateCacheEntry", json!({ "key": key })).await?;
    let url = created["signed_upload_url"].as_str()?.to_owned();
    let content = content(key);
    let size = content.len().to_string();
    let put = target.content(Method::PUT, &url);
    let put = put.header("x-ms-blob-type", "BlockBlob").body(content);
    assert_eq!(put.send().await.ok()?.status(), 201);
    let name = json!({ "key": key, "size_bytes": size });
    call(target, cache, "FinalizeCacheEntryUpload", name).await?;
    Some(())
}

/// Looks an entry up and reads it.
async fn load(target: &Target, cache: &Cache<'_>, key: &str) -> Read {
    let found = call(
        target,
        cache,
        "GetCacheEntryDownloadURL",
        json!({ "key": key }),
    )
    .await;
    let Some(found) = found else {
        return Read::NoService;
    };
    if found["matched_key"] != key {
        return Read::Lost;
    }
    let url = found["signed_download_url"].as_str().unwrap();
    let Ok(answer) = target.content(Method::GET, url).send().await else {
        return Read::NoService;
    };
    let status = answer.status();
    let Ok(bytes) = answer.bytes().await else {
        return Read::NoService;
    };
    match status {
        StatusCode::OK if bytes == content(key) => Read::Same,
        StatusCode::OK => Read::Changed,
        _ => Read::Lost,
    }
}

/// A disk whose content after a power cut is known at any time: a file with a file system in it.
/// Bytes that a process wrote without a sync are in memory only, and not in that file.
#[cfg(target_os = "linux")]
struct CutDisk {
    images: tempfile::TempDir,
    mounted: tempfile::TempDir,
}

#[cfg(target_os = "linux")]
impl CutDisk {
    /// A disk with an empty file system, or `None` if this user may not mount one.
    fn new() -> Option<Self> {
        let images = tempfile::tempdir().unwrap();
        let image = images.path().join("disk");
        fs::File::create(&image)
            .unwrap()
            .set_len(256 << 20)
            .unwrap();
        let made = Command::new("mkfs.ext4").arg("-q").arg(&image).output();
        let disk = Self {
            images,
            mounted: tempfile::tempdir().unwrap(),
        };
        let made = made.is_ok_and(|output| output.status.success());
        let disk = Some(disk).filter(|disk| made && disk.mount("disk"));
        if disk.is_none() {
            eprintln!("skipped: this user may not mount a file system");
        }
        disk
    }

    /// Without the commits that the file system makes itself every few seconds.
    fn mount(&self, image: &str) -> bool {
        let mounted = Command::new("mount")
            .args(["-t", "ext4", "-o", "loop,commit=300"])
            .arg(self.images.path().join(image))
            .arg(self.mounted.path())
            .output();
        mounted.is_ok_and(|output| output.status.success())
    }

    fn unmount(&self) {
        let status = Command::new("umount").arg(self.mounted.path()).status();
        assert!(status.unwrap().success());
    }

    /// Cuts the power while this process is at work.
    fn cut(&self, served: Served) {
        let pid = served.pid().to_string();
        let stop = Command::new("kill").args(["-STOP", &pid]).status();
        assert!(stop.unwrap().success());
        // The kernel completes the work that it does for the process at this moment.
        while !is_stopped(&pid) {
            std::thread::yield_now();
        }
        let image = |name: &str| self.images.path().join(name);
        fs::copy(image("disk"), image("left")).unwrap();
        served.kill();
        self.unmount();
        fs::rename(image("left"), image("disk")).unwrap();
        assert!(self.mount("disk"), "the file system is left in order");
    }
}

#[cfg(target_os = "linux")]
fn is_stopped(pid: &str) -> bool {
    let mut threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.all(|thread| {
        let stat = fs::read_to_string(thread.unwrap().path().join("stat"));
        let stat = stat.unwrap_or_default();
        stat.rsplit_once(") ")
            .is_none_or(|(_, rest)| rest.starts_with('T'))
    })
}

#[cfg(target_os = "linux")]
impl Drop for CutDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(self.mounted.path())
            .status();
    }
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_loses_no_committed_entry() {
    let Some(disk) = CutDisk::new() else { return };
    let folder = disk.mounted.path().join("cache");
    let version = "0".repeat(64);
    let (mut all, mut counts) = (Vec::new(), Counts::default());
    for round in 0..3 {
        let served = Served::start(&folder, &[]);
        let target = target(&served, &served.token);
        let mut cache = target.cache();
        cache.version.clone_from(&version);
        let saved = Mutex::new(Vec::new());
        let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let writers = (0..WRITERS).map(|writer| {
            let (target, cache, saved, told) = (&target, &cache, &saved, told.clone());
            async move {
                for number in 0.. {
                    let key = format!("{round}-{writer}-{number}");
                    if save(target, cache, &key).await.is_none() {
                        return;
                    }
                    saved.lock().unwrap().push(key);
                    let _ = told.send(());
                }
            }
        });
        let cut = async {
            for _ in 0..50 + round * 70 {
                heard.recv().await.unwrap();
            }
            // Whatever is answered later may or may not be there.
            let answered = saved.lock().unwrap().clone();
            tokio::task::block_in_place(|| disk.cut(served));
            answered
        };
        let (_, answered) = tokio::join!(futures_util::future::join_all(writers), cut);
        counts.commits += answered.len() as u64;
        counts.rounds += 1;
        all.extend(answered);
        let served = Served::start(&folder, &[]);
        read_all(&served, &version, &all, &mut counts).await;
    }
    assert_eq!((counts.lost, counts.changed), (0, 0), "{counts:?}");
    assert!(
        all.iter().any(|key| is_large(key)) && counts.commits > 200,
        "{counts:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_with_many_requests_does_not_delay_one_with_few() {
    const NOISY: usize = 1000;
    const ASKED: usize = 40;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens.yaml");
    let tokens = "- token: noisy-token\n  repository: o/noisy\n- token: quiet-token\n  repository: o/quiet\n";
    fs::write(&file, tokens).unwrap();
    let served = Served::start(folder.path(), &["--token-file", file.to_str().unwrap()]);
    let answered = Arc::new(AtomicU64::new(0));
    let target_of = |token: &str| target(&served, token);
    // It has its own thread, so that the measurement is of the service and not of the other clients
    // here.
    let quiet = {
        let (answered, quiet) = (answered.clone(), target_of("quiet-token"));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async {
                let cache = quiet.cache();
                while answered.load(Ordering::Relaxed) < 2 * NOISY as u64 {
                    tokio::task::yield_now().await;
                }
                let mut others = Vec::new();
                for _ in 0..ASKED {
                    let before = answered.load(Ordering::Relaxed);
                    cache.look_up(&["quiet"]).await.expect(200);
                    others.push(answered.load(Ordering::Relaxed) - before);
                }
                others.sort_unstable();
                others
            })
        })
    };
    let noisy = target_of("noisy-token");
    let cache = noisy.cache();
    let ask = |_| async {
        while !quiet.is_finished() {
            cache.look_up(&["noisy"]).await.expect(200);
            answered.fetch_add(1, Ordering::Relaxed);
        }
    };
    futures_util::future::join_all((0..NOISY).map(ask)).await;
    let others = quiet.join().unwrap();
    // Were all served in the order in which they came, each would wait for some thousand.
    let median = others[ASKED / 2];
    assert!(median < NOISY as u64 / 3, "{others:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn told_to_end_it_answers_what_is_in_flight_and_takes_nothing_new() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path(), &[]);
    let target = target(&served, &served.token);
    let cache = target.cache();
    let large = noise(32 << 20);
    cache.save("k", large.clone()).await;
    let url = cache.locate("k").await;
    // More than any buffer between the two takes, so that it is in flight until it is read.
    let mut answer = target.content(Method::GET, &url).send().await.unwrap();
    let mut received = answer.chunk().await.unwrap().unwrap().to_vec();
    served.terminate();
    while target.request(Method::GET, "health").send().await.is_ok() {
        tokio::task::yield_now().await;
    }
    while let Some(chunk) = answer.chunk().await.unwrap() {
        received.extend_from_slice(&chunk);
    }
    assert!(received == large);
    drop(answer);
    let (status, log) = served.ended();
    assert!(status.success(), "{log}");
    // It closed its database, which then is one file.
    assert!(!folder.path().join("catalog.sqlite-wal").exists());
    let served = Served::start(folder.path(), &[]);
    // A signed URL is good after a restart.
    let again = self::target(&served, &served.token);
    let path = url.splitn(4, '/').nth(3).unwrap();
    let answer = send(again.request(Method::GET, path)).await.expect(200);
    assert!(answer.body == large);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_tokens_says_who_may_do_what() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens.yaml");
    fs::write(
        &file,
        "- token: main-token\n  repository: o/one\n\
         - token: pull-token\n  repository: o/one\n  write: refs/pull/1/merge\n  read: [refs/heads/main]\n\
         - token: reader-token\n  repository: o/one\n  read: [refs/heads/main]\n\
         - token: other-token\n  repository: o/two\n",
    )
    .unwrap();
    let served = Served::start(folder.path(), &["--token-file", file.to_str().unwrap()]);
    assert_eq!(served.token, "");
    let target = target(&served, "main-token");
    let cache = target.cache();
    cache.save("k", "main").await;
    let by = |token| cache.with_token(token);
    assert_eq!(by("pull-token").load("k").await, "main");
    assert_eq!(by("reader-token").load("k").await, "main");
    assert_eq!(by("other-token").find(&["k"]).await, None);
    by("pull-token").save("k", "pull").await;
    assert_eq!(by("pull-token").load("k").await, "pull");
    assert_eq!(cache.load("k").await, "main");
    by("reader-token").create_v1("x", None).await.expect(403);
    by("nobodys-token").look_up(&["k"]).await.expect(401);
}

/// A token as a runner's server makes it, signed with HS256.
fn signed(secret: &[u8], claims: &Value) -> String {
    let key = jsonwebtoken::EncodingKey::from_secret(secret);
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), claims, &key).unwrap()
}

fn scopes(scopes: &[(&str, u8)]) -> String {
    let scopes: Vec<Value> = scopes
        .iter()
        .map(|(scope, permission)| json!({ "Scope": scope, "Permission": permission }))
        .collect();
    Value::from(scopes).to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_that_gitea_signs_are_taken_and_those_that_others_sign_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret");
    fs::write(&file, "the-secret\n").unwrap();
    let served = Served::start(
        folder.path(),
        &["--token-secret-file", file.to_str().unwrap()],
    );
    let later = Timestamp::now().seconds() + 600;
    let claims = json!({ "exp": later, "scp": "Actions.Results:1:2", "ac": scopes(&[("", 2)]) });
    let token = signed(b"the-secret", &claims);
    let target = target(&served, &token);
    let cache = target.cache();
    cache.save("k", "content").await;
    assert_eq!(cache.load("k").await, "content");
    let old = json!({ "exp": Timestamp::now().seconds() - 3600, "ac": scopes(&[("", 2)]) });
    let nothing = json!({ "exp": later });
    for wrong in [
        signed(b"another", &claims),
        signed(b"the-secret", &old),
        signed(b"the-secret", &nothing),
        unsigned(&claims),
    ] {
        cache.with_token(&wrong).look_up(&["k"]).await.expect(401);
    }
}

/// A token whose header says that it is unsigned.
fn unsigned(claims: &Value) -> String {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = json!({ "alg": "none", "typ": "JWT" });
    format!("{}.{}.", encode(&header), encode(claims))
}

/// An issuer of tokens, and what it answers when it is asked for its keys.
struct Issuer {
    url: String,
    tokens: Vec<String>,
    /// Its keys, in JSON.
    keys: String,
    /// The status and the text that it answers instead.
    instead: Arc<Mutex<Option<(u16, String)>>>,
    /// How often it was asked.
    asked: Arc<AtomicU64>,
    /// One of these is taken for each answer.
    answers: Arc<Semaphore>,
}

/// An issuer whose key has signed tokens for these claims. The claims have its URL put in.
async fn issuer(claims: &[Value]) -> Issuer {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let claims = claims.iter().map(|claims| {
        let mut claims = claims.clone();
        if claims.get("iss").is_none() {
            claims["iss"] = json!(url);
        }
        claims.to_string()
    });
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/support/issuer.mjs");
    let node = Command::new("node")
        .arg(script)
        .args(claims)
        .output()
        .unwrap();
    assert!(
        node.status.success(),
        "{}",
        String::from_utf8_lossy(&node.stderr)
    );
    let made: Value = serde_json::from_slice(&node.stdout).unwrap();
    let tokens = made["tokens"].as_array().unwrap();
    let tokens = tokens
        .iter()
        .map(|token| token.as_str().unwrap().to_owned());
    let issuer = Issuer {
        tokens: tokens.collect(),
        keys: made["jwks"].to_string(),
        instead: Arc::default(),
        asked: Arc::default(),
        answers: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
        url,
    };
    let discovery = json!({ "jwks_uri": format!("{}/keys", issuer.url) }).to_string();
    let keys = {
        let (keys, instead) = (issuer.keys.clone(), issuer.instead.clone());
        let (asked, answers) = (issuer.asked.clone(), issuer.answers.clone());
        async move || {
            asked.fetch_add(1, Ordering::Relaxed);
            answers.acquire().await.unwrap().forget();
            let (status, text) = instead.lock().unwrap().clone().unwrap_or((200, keys));
            (StatusCode::from_u16(status).unwrap(), text)
        }
    };
    let router = Router::new()
        .route("/.well-known/openid-configuration", get(async || discovery))
        .route("/keys", get(keys));
    tokio::spawn(axum::serve(listener, router).into_future());
    issuer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_good_token_is_let_in_however_many_come_while_the_issuers_keys_are_fetched() {
    let later = Timestamp::now().seconds() + 600;
    let main = scopes(&[("refs/heads/main", 3)]);
    let issuer = issuer(&[json!({ "exp": later, "repository_id": "1", "ac": main })]).await;
    issuer.answers.forget_permits(Semaphore::MAX_PERMITS);
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path(), &["--github-tokens", &issuer.url]);
    let target = target(&served, &issuer.tokens[0]);
    let cache = target.cache();
    // All of them are on their way before the issuer answers.
    let asked = futures_util::future::join_all((0..8).map(|_| cache.look_up(&["k"])));
    let answer = async {
        while issuer.asked.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        issuer.answers.add_permits(1);
    };
    let (answers, ()) = tokio::join!(asked, answer);
    for answer in answers {
        answer.expect(200);
    }
    assert_eq!(issuer.asked.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_issuer_that_answers_no_keys_locks_nobody_out_and_is_asked_again() {
    let later = Timestamp::now().seconds() + 600;
    let main = scopes(&[("refs/heads/main", 3)]);
    let claims = json!({ "exp": later, "repository_id": "1", "ac": main });
    let other = json!({ "exp": later, "repository_id": "2", "ac": main });
    let issuer = issuer(&[claims.clone(), other]).await;
    let folder = tempfile::tempdir().unwrap();
    *issuer.instead.lock().unwrap() = Some((200, "rubbish".to_owned()));
    let served = Served::start(folder.path(), &["--github-tokens", &issuer.url]);
    let target = target(&served, &issuer.tokens[0]);
    let cache = target.cache();
    let refused = cache.look_up(&["k"]).await.expect(503);
    assert_eq!(refused.header("retry-after"), "1");
    *issuer.instead.lock().unwrap() = None;
    // As soon as the issuer is back, and not a minute later.
    let again = async {
        while cache.look_up(&["k"]).await.status == 503 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), again)
        .await
        .unwrap();
    cache.look_up(&["k"]).await.expect(200);
    // Its answer to an invented key removes nothing.
    for (status, text) in [(200, "{\"keys\":[]}"), (500, ""), (200, "[")] {
        *issuer.instead.lock().unwrap() = Some((status, text.to_owned()));
        let invented = with_key_id(&issuer.tokens[0], "invented");
        let answer = cache.with_token(&invented).look_up(&["k"]).await;
        assert!([401, 503].contains(&answer.status), "{}", answer.status);
        let other = cache.with_token(&issuer.tokens[1]);
        other.look_up(&["k"]).await.expect(200);
    }
}

/// `token` with the signature of the key of this name.
fn with_key_id(token: &str, name: &str) -> String {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let header = json!({ "alg": "RS256", "typ": "JWT", "kid": name }).to_string();
    let (_, rest) = token.split_once('.').unwrap();
    format!("{}.{rest}", URL_SAFE_NO_PAD.encode(header))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_repositories_that_are_not_on_the_list_are_not_let_in() {
    let later = Timestamp::now().seconds() + 600;
    let of = |name: &str, id: &str| {
        let extra = json!({ "repository": name }).to_string();
        let main = scopes(&[("refs/heads/main", 3)]);
        json!({ "exp": later, "repository_id": id, "oidc_extra": extra, "ac": main })
    };
    let issuer = issuer(&[
        of("us/a", "1"),
        of("them/b", "2"),
        of("them/c", "3"),
        of("x/y", "4"),
    ])
    .await;
    let folder = tempfile::tempdir().unwrap();
    let arguments = [
        "--github-tokens",
        &issuer.url,
        "--allow",
        "us",
        "--allow",
        "them/b",
        "--allow",
        "id:4",
    ];
    let served = Served::start(folder.path(), &arguments);
    let target = target(&served, "nobodys");
    let cache = target.cache();
    for (token, status) in issuer.tokens.iter().zip([200, 200, 401, 200]) {
        cache.with_token(token).look_up(&["k"]).await.expect(status);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_of_githubs_jobs_open_their_repositorys_scopes() {
    let later = Timestamp::now().seconds() + 600;
    let main = scopes(&[("refs/heads/main", 3)]);
    let pull = scopes(&[("refs/pull/1/merge", 3), ("refs/heads/main", 1)]);
    let issued = issuer(&[
        json!({ "exp": later, "repository_id": "1", "ac": main }),
        json!({ "exp": later, "repository_id": "1", "ac": pull }),
        json!({ "exp": later, "repository_id": "2", "ac": main }),
        json!({ "exp": later, "repository_id": "1", "ac": scopes(&[("refs/heads/main", 1)]) }),
        json!({ "exp": Timestamp::now().seconds() - 3600, "repository_id": "1", "ac": main }),
        json!({ "exp": later, "repository_id": "1", "ac": main, "iss": "https://elsewhere" }),
        json!({ "repository_id": "1", "ac": main }),
        json!({ "exp": later, "nbf": later, "repository_id": "1", "ac": main }),
    ])
    .await;
    let Issuer { url, tokens, .. } = &issued;
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path(), &["--github-tokens", url]);
    let target = target(&served, &tokens[0]);
    let cache = target.cache();
    cache.save("k", "main").await;
    assert_eq!(cache.with_token(&tokens[1]).load("k").await, "main");
    assert_eq!(cache.with_token(&tokens[2]).find(&["k"]).await, None);
    let reader = cache.with_token(&tokens[3]);
    reader.create_v1("x", None).await.expect(403);
    for wrong in &tokens[4..] {
        cache.with_token(wrong).look_up(&["k"]).await.expect(401);
    }
    // The same claims, signed by somebody who is not the issuer.
    let forged =
        issuer(&[json!({ "exp": later, "repository_id": "1", "ac": main, "iss": url })]).await;
    cache
        .with_token(&forged.tokens[0])
        .look_up(&["k"])
        .await
        .expect(401);
    let public = "anything".as_bytes();
    let confused = signed(
        public,
        &json!({ "exp": later, "repository_id": "1", "ac": main, "iss": url }),
    );
    cache
        .with_token(&confused)
        .look_up(&["k"])
        .await
        .expect(401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgejo_runner_vouches_for_its_jobs_and_takes_their_downloads_through_itself() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret");
    fs::write(&file, "secret\n").unwrap();
    let served = Served::start(
        folder.path(),
        &["--forgejo-secret-file", file.to_str().unwrap()],
    );
    let target = target(&served, "of-no-use");
    let request = |method: Method, path: &str, isolation: &str| {
        let mut mac = Hmac::<Sha256>::new_from_slice(b"secret").unwrap();
        mac.update(format!("o/r>7>1>{isolation}").as_bytes());
        let mac = hex::encode(mac.finalize().into_bytes());
        let request = target.request(method, path);
        let request = match isolation {
            "" => request,
            key => request.header("Forgejo-Cache-WriteIsolationKey", key),
        };
        request
            .header("Forgejo-Cache-Repo", "o/r")
            .header("Forgejo-Cache-RunNumber", "7")
            .header("Forgejo-Cache-RunId", "a1b2")
            .header("Forgejo-Cache-Timestamp", "1")
            .header("Forgejo-Cache-MAC", mac)
            .header("Forgejo-Cache-Host", "http://10.0.0.1:4000")
            .header("content-type", "application/json")
    };
    let post = async |path: &str, body: Value, isolation: &str| -> Answer {
        send(request(Method::POST, path, isolation).body(body.to_string())).await
    };
    let caches = format!("{V1}/caches");
    let save = async |content: &'static str, isolation: &str| {
        let name = json!({ "key": "k", "version": "v" });
        let reserved = post(&caches, name, isolation).await.expect(201).json();
        let upload = format!("{caches}/{}", reserved["cacheId"]);
        let range = format!("bytes 0-{}/*", content.len() - 1);
        let patch = request(Method::PATCH, &upload, isolation);
        send(patch.header("content-range", range).body(content))
            .await
            .expect(204);
        post(&upload, json!({ "size": content.len() }), isolation)
            .await
            .expect(204);
    };
    let load = async |isolation: &str| {
        let find = request(
            Method::GET,
            &format!("{V1}/cache?keys=k&version=v"),
            isolation,
        );
        let found = send(find).await.expect(200).json();
        let url = found["archiveLocation"].as_str().unwrap().to_owned();
        let path = url.strip_prefix("http://10.0.0.1:4000/a1b2/").unwrap();
        send(request(Method::GET, path, isolation))
            .await
            .expect(200)
            .text()
    };
    save("main", "").await;
    assert_eq!(load("").await, "main");
    assert_eq!(load("pull-1").await, "main");
    save("pull", "pull-1").await;
    assert_eq!(load("pull-1").await, "pull");
    assert_eq!(load("").await, "main");
    let forged = request(Method::GET, &format!("{V1}/cache?keys=k&version=v"), "");
    let forged = forged.header("Forgejo-Cache-WriteIsolationKey", "pull-1");
    send(forged).await.expect(401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_that_nobody_checks_are_taken_at_their_word_only_where_that_is_asked_for() {
    let claims = json!({ "ac": scopes(&[("refs/heads/main", 3)]) });
    let token = signed(b"a secret of somebody's", &claims);
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path(), &[]);
    let target = target(&served, &token);
    target.cache().look_up(&["k"]).await.expect(401);
    served.kill();
    let served = Served::start(folder.path(), &["--unchecked-tokens"]);
    let target = self::target(&served, &token);
    let cache = target.cache();
    cache.save("k", "content").await;
    assert_eq!(cache.load("k").await, "content");
    for wrong in ["no.token.at.all", "", &unsigned(&claims)] {
        cache.with_token(wrong).look_up(&["k"]).await.expect(401);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_count_and_the_log_tells_without_a_secret() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--log-format", "json", "--log-level", "debug"];
    let served = Served::start(folder.path(), &arguments);
    let target = target(&served, &served.token);
    let cache = target.cache();
    cache.save("k", "content").await;
    let url = cache.locate("k").await;
    target.get(&url).await.expect(200);
    cache
        .with_token("stranger")
        .look_up(&["k"])
        .await
        .expect(401);
    assert_eq!(
        send(target.request(Method::GET, "health"))
            .await
            .expect(200)
            .text(),
        "ok\n"
    );
    let metrics = send(target.request(Method::GET, "metrics"))
        .await
        .expect(200);
    assert!(
        metrics
            .header("content-type")
            .starts_with("application/openmetrics-text")
    );
    let metrics = metrics.text();
    for line in [
        "sccache_action_cache_commits_total 1",
        "sccache_action_cache_refused_total 1",
        "sccache_action_cache_bytes_in_total 7",
        "sccache_action_cache_bytes_out_total 7",
        "sccache_action_cache_entries 1",
        "sccache_action_cache_entry_size_bytes 7",
        "sccache_action_cache_open_uploads 0",
        "sccache_action_cache_request_seconds_count{request=\"download\",status=\"200\"} 1",
        "sccache_action_cache_request_seconds_count{request=\"find\",status=\"401\"} 1",
        "# EOF",
    ] {
        assert!(
            metrics.lines().any(|found| found == line),
            "{line}\n{metrics}"
        );
    }
    let token = served.token.clone();
    served.terminate();
    let (status, log) = served.ended();
    assert!(status.success(), "{log}");
    let answered: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &Value| line["message"] == "answered")
        .collect();
    assert!(
        answered
            .iter()
            .any(|line| line["request"] == "create" && line["status"] == 200)
    );
    assert!(answered.iter().all(|line| line["seconds"].is_f64()));
    for secret in [token.as_str(), "stranger", "sig="] {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_proxy_its_urls_are_the_public_ones() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--public-url", "https://cache.example/actions/"];
    let served = Served::start(folder.path(), &arguments);
    assert_eq!(served.url, "https://cache.example/actions/");
    let tokens = HashMap::from([(Who::Default, served.token.clone())]);
    let target = Target::new(vec![format!("http://{}/", served.address())], tokens);
    let created = target.cache().create("k").await.expect(200).json();
    let url = created["signed_upload_url"].as_str().unwrap();
    assert!(
        url.starts_with("https://cache.example/actions/uploads/"),
        "{url}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_entry_is_what_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path(), &["--max-entry-size", "1KiB"]);
    let target = target(&served, &served.token);
    let cache = target.cache();
    cache.save("fits", noise(1024)).await;
    let url = cache.reserve("does-not").await;
    target.put(&url, noise(1025)).await.expect(413);
    cache
        .create_v1("does-not-either", Some(1025))
        .await
        .expect(400);
}

#[test]
fn what_it_cannot_do_is_said_in_one_line_that_names_the_option_or_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let _first = Served::start(folder.path(), &[]);
    let elsewhere = tempfile::tempdir().unwrap();
    let broken = elsewhere.path().join("tokens");
    fs::write(&broken, "- tokn: x\n").unwrap();
    let broken = broken.to_str().unwrap();
    let port = sccache_action::sccache::server::free_port().unwrap();
    let nobody = format!("postgres://user:hunter2@127.0.0.1:{port}/db");
    for (folder, arguments, says) in [
        (folder.path(), vec![], "is in use by another cache service"),
        (
            elsewhere.path(),
            vec!["--token-file", "/missing"],
            "--token-file: /missing",
        ),
        (
            elsewhere.path(),
            vec!["--token-file", broken],
            "--token-file: ",
        ),
        (
            elsewhere.path(),
            vec!["--database", &nobody],
            "cannot use the database",
        ),
        (
            elsewhere.path(),
            vec!["--listen", "203.0.113.1:1"],
            "cannot listen on 203.0.113.1:1",
        ),
    ] {
        let said = Served::try_start(folder, &arguments, &[]).err().unwrap().0;
        assert!(said.contains(says), "{says}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        assert!(!said.contains("hunter2"), "{said}");
    }
}

#[tokio::test]
async fn a_disk_that_is_full_fails_the_request_and_not_the_service() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path(), &[]);
    let target = target(&served, &served.token);
    let cache = target.cache();
    cache.save("before", "content").await;
    // A folder that cannot be created stands for a full disk.
    let blobs = folder.path().join("blobs");
    let kept = folder.path().join("kept");
    fs::rename(&blobs, &kept).unwrap();
    fs::write(&blobs, "").unwrap();
    let url = cache.reserve("k").await;
    let refused = target.put(&url, noise(300_000)).await.expect(500);
    assert!(!refused.text().contains("blobs"), "{}", refused.text());
    served.wait_for_log("a request failed");
    fs::remove_file(&blobs).unwrap();
    fs::rename(&kept, &blobs).unwrap();
    target.put(&url, noise(300_000)).await.expect(201);
    cache.finalize("k", 300_000).await.expect(200);
    let url = cache.locate("k").await;
    assert!(target.get(&url).await.expect(200).body == noise(300_000));
    assert_eq!(cache.load("before").await, "content");
    tokio::time::timeout(Duration::from_secs(5), cache.load("k"))
        .await
        .unwrap();
}

/// The modes of all that is in this folder, itself included.
#[cfg(unix)]
fn modes(folder: &Path) -> Vec<(std::path::PathBuf, u32)> {
    use std::os::unix::fs::PermissionsExt;
    let mut modes = Vec::new();
    let mut left = vec![folder.to_owned()];
    while let Some(path) = left.pop() {
        let metadata = fs::metadata(&path).unwrap();
        if metadata.is_dir() {
            left.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
        modes.push((path, metadata.permissions().mode() & 0o777));
    }
    modes
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_other_user_of_the_machine_reads_or_writes_its_folder_also_where_it_was_open() {
    use std::os::unix::fs::PermissionsExt;
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("cache");
    let served = Served::start(&folder, &[]);
    let target = target(&served, &served.token);
    let cache = target.cache();
    cache.save("k", noise(300_000)).await;
    cache.save("small", "content").await;
    let url = cache.locate("k").await;
    let modes_now = modes(&folder);
    assert!(modes_now.len() > 8, "{modes_now:?}");
    for (path, mode) in &modes_now {
        assert_eq!(mode & 0o077, 0, "{} {mode:o}", path.display());
    }
    // The state that an older service left, with a usual umask.
    served.kill();
    for (path, mode) in modes_now {
        let open = if mode == 0o700 { 0o755 } else { 0o644 };
        fs::set_permissions(&path, PermissionsExt::from_mode(open)).unwrap();
    }
    let served = Served::start(&folder, &[]);
    for name in [
        "",
        "catalog.sqlite",
        "catalog.sqlite-wal",
        "catalog.sqlite-shm",
        "lock",
        "blobs",
        "contents",
    ] {
        let path = folder.join(name);
        let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode & 0o077, 0, "{} {mode:o}", path.display());
    }
    // Anyone who could read the key cannot sign anything any more; the entries are there.
    let path = url.splitn(4, '/').nth(3).unwrap();
    let again = self::target(&served, &served.token);
    send(again.request(Method::GET, path)).await.expect(403);
    let mut again = again.cache();
    again.version.clone_from(&cache.version);
    assert!(again.find(&["k"]).await.is_some());
}

/// A file system of this size in memory, or `None` if this user may not mount one.
#[cfg(target_os = "linux")]
struct SmallDisk(tempfile::TempDir);

#[cfg(target_os = "linux")]
impl SmallDisk {
    fn new(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(folder.path())
            .output();
        let mounted = mounted.is_ok_and(|output| output.status.success());
        if !mounted {
            eprintln!("skipped: this user may not mount a file system");
        }
        mounted.then_some(Self(folder))
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(self.0.path())
            .status();
    }
}

/// Saves entries of 1 MB until one does not fit, and gives how many did.
#[cfg(target_os = "linux")]
async fn fill(target: &Target, cache: &Cache<'_>) -> usize {
    for number in 0..100 {
        let key = format!("fill-{number:03}");
        let url = cache.reserve(&key).await;
        let put = target.put(&url, noise(1_000_000)).await;
        if put.status != 201 {
            assert_eq!(put.status, 503);
            return number;
        }
        cache.finalize(&key, 1_000_000).await.expect(200);
    }
    panic!("100 MB were taken by a smaller disk");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_small_entries_fill_up_makes_room_by_some_of_them() {
    let Some(disk) = SmallDisk::new("64m") else {
        return;
    };
    let served = Served::start(disk.0.path(), &["--max-size", "100MiB"]);
    let target = target(&served, &served.token);
    let cache = target.cache();
    for number in 0..1000 {
        cache.save(&format!("{number:04}"), noise(100_000)).await;
    }
    served.wait_for_log("the disk was full");
    // What is left of them is whole, also after the segments were emptied.
    let mut left = 0;
    for number in 0..1000 {
        let key = format!("{number:04}");
        if cache.matched(&[&key]).await.is_some() {
            let url = cache.locate(&key).await;
            assert!(target.get(&url).await.expect(200).body == noise(100_000));
            left += 1;
        }
    }
    assert!(left > 0 && left < 1000, "{left}");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_what_is_evicted_is_free_wherever_it_lies_and_no_save_fails() {
    use sqlx::{Connection, Executor, SqliteConnection};
    const BEFORE: usize = 1200;
    const AFTER: usize = 600;
    let Some(disk) = SmallDisk::new("160m") else {
        return;
    };
    let folder = disk.0.path();
    let noise = noise(100_000);
    let content = |number: usize| {
        let mut content = noise[number % 512..].to_vec();
        content[..8].copy_from_slice(&number.to_le_bytes());
        content
    };
    let save = async |target: &Target, cache: &Cache<'_>, number: usize| {
        let (key, content) = (format!("{number:04}"), content(number));
        let (url, size) = (cache.reserve(&key).await, content.len());
        target.put(&url, content).await.expect(201);
        cache.finalize(&key, size).await.expect(200);
    };
    let served = Served::start(folder, &["--max-size", "1GiB"]);
    let first = target(&served, &served.token);
    let cache = first.cache();
    for number in 0..BEFORE {
        save(&first, &cache, number).await;
    }
    served.kill();
    // The entries that go first are in all files.
    let database = format!("sqlite:{}", folder.join("catalog.sqlite").display());
    let mut database = SqliteConnection::connect(&database).await.unwrap();
    database
        .execute("UPDATE entries SET used = used - abs(random()) % 3000000")
        .await
        .unwrap();
    database.close().await.unwrap();
    let served = Served::start(folder, &["--max-size", "1GiB"]);
    let target = target(&served, &served.token);
    let mut again = target.cache();
    again.version.clone_from(&cache.version);
    for number in BEFORE..BEFORE + AFTER {
        save(&target, &again, number).await;
    }
    served.wait_for_log("the disk was full");
    let mut left = 0;
    for number in 0..BEFORE + AFTER {
        let key = format!("{number:04}");
        if again.matched(&[&key]).await.is_some() {
            let url = again.locate(&key).await;
            assert!(target.get(&url).await.expect(200).body == content(number));
            left += 1;
        }
    }
    // About 1500 fit, and each time some 340 go.
    assert!(left > 1000 && left < 1600, "{left}");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_commit_on_a_disk_that_others_keep_full_is_to_be_tried_again() {
    let Some(disk) = SmallDisk::new("24m") else {
        return;
    };
    let served = Served::start(disk.0.path(), &[]);
    let target = target(&served, &served.token);
    let cache = target.cache();
    cache.save("before", noise(100_000)).await;
    let path = disk.0.path().join("other");
    let mut other = fs::File::create(&path).unwrap();
    let mut refused = 0;
    for number in 0..20 {
        // It takes the room of the reserve too, once that is given up.
        while std::io::Write::write_all(&mut other, &noise(4096)).is_ok() {}
        let key = format!("{number}");
        let url = cache.reserve(&key).await;
        target.put(&url, noise(100_000)).await.expect(201);
        let committed = cache.finalize(&key, 100_000).await;
        if committed.status != 200 {
            let text = committed.text();
            assert_eq!(committed.status, 503, "{text}");
            assert!(text.contains("try again"), "{text}");
            refused += 1;
        }
    }
    assert!(refused > 0);
    drop(other);
    fs::remove_file(path).unwrap();
    cache.save("after", noise(100_000)).await;
    assert!(cache.find(&["after"]).await.is_some());
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fills_up_makes_room_by_entries_and_takes_the_next_upload() {
    let Some(disk) = SmallDisk::new("24m") else {
        return;
    };
    let served = Served::start(disk.0.path(), &["--max-size", "100MiB"]);
    let target = target(&served, &served.token);
    let cache = target.cache();
    let number = fill(&target, &cache).await;
    assert!(number > 10, "{number}");
    // The client tries again, as it was told to.
    let key = format!("fill-{number:03}");
    cache.create(&key).await.expect(409);
    cache.save("next", noise(1_000_000)).await;
    assert!(cache.load("next").await.len() > 1);
    served.wait_for_log("the disk was full");
    served.kill();
    // Full again, and by files of others: it starts, and has no entries left to give.
    let mut other = fs::File::create(disk.0.path().join("other")).unwrap();
    while std::io::Write::write_all(&mut other, &noise(4096)).is_ok() {}
    let served = Served::start(disk.0.path(), &["--max-size", "10MiB"]);
    served.wait_for_log("the disk is full");
    let again = self::target(&served, &served.token);
    let mut cache_again = again.cache();
    cache_again.version.clone_from(&cache.version);
    cache_again.look_up(&["next"]).await.expect(200);
    // An entry takes the room that evicting freed, though the others' file is still there.
    cache_again.save("after", noise(1_000_000)).await;
    served.kill();
    // Not a byte is left, and no reserve: it starts, and makes room by its entries.
    fs::remove_file(disk.0.path().join("reserve")).unwrap();
    while std::io::Write::write_all(&mut other, &noise(4096)).is_ok() {}
    let served = Served::start(disk.0.path(), &["--max-size", "10MiB"]);
    served.wait_for_log("the disk was full");
    let again = self::target(&served, &served.token);
    again.cache().save("at last", noise(100_000)).await;
}
