//! How the relay grows with the number of objects: time, requests to the cache service, memory.
//!
//! A client speaks to a real relay process as sccache does, since so many real compiles would take
//! hours. Behind the relay is the simulated cache service of `benches/modes.rs`. The first job writes
//! all objects and ends; the second, with a new relay, reads each of them. Beside it the same client
//! writes the same bytes to files and reads them back, which is what a local disk takes.
//!
//! usage: cargo bench --bench scale -- [--objects 1000,5000,20000,50000] [--bytes 8192]

#![allow(clippy::unwrap_used)]

#[path = "../tests/it/support/upstream.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod upstream;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Parser;
use futures_util::{StreamExt, stream};
use sccache_action::action::environment::Environment;
use sccache_action::github::cache_client::{CacheClient, Endpoint, Protocol, Reserved};
use sccache_action::http_client::Timeouts;
use sccache_action::relay::activity::Activity;
use sccache_action::relay::process::{self, RunningRelay};
use sccache_action::relay::{Config, FREE_FLOOR};
use sccache_action::service::auth::BearerToken;
use upstream::{DEFAULT_BRANCH, Options as Distance, Upstream};

/// Measures a relay with more and more objects.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo bench --bench scale --")]
struct Options {
    /// How many objects
    #[arg(long, value_delimiter = ',', default_value = "1000,5000,20000,50000")]
    objects: Vec<u64>,
    /// How large an object is on average, in bytes
    #[arg(long, default_value_t = 8192)]
    bytes: u64,
    /// What `cargo bench` adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// How many requests are under way at once: those of a build on as many cores.
const AT_ONCE: usize = 4;

fn main() {
    let options = Options::parse();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    println!(
        "{:>8} {:>8} | {:>8} {:>8} {:>8} {:>6} | {:>8} {:>8} {:>8} {:>6} {:>8}",
        "objects",
        "MB",
        "write s",
        "vs files",
        "requests",
        "MB mem",
        "load s",
        "read s",
        "vs files",
        "requests",
        "MB mem"
    );
    for count in options.objects {
        println!("{}", runtime.block_on(measure(count, options.bytes)));
    }
}

async fn measure(count: u64, bytes: u64) -> String {
    let upstream = Upstream::start(Distance {
        api_latency: Duration::from_millis(40),
        blob_latency: Duration::from_millis(25),
        uploads_per_minute: Some(200),
    });
    let folder = tempfile::tempdir().unwrap();
    let total: u64 = (0..count).map(|i| content(i, bytes).len() as u64).sum();

    let files = folder.path().join("files");
    let begin = Instant::now();
    each(count, async |i| {
        let path = file_of(&files, i);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content(i, bytes)).unwrap();
    })
    .await;
    let files_written = begin.elapsed();
    let begin = Instant::now();
    each(count, async |i| {
        assert_eq!(fs::read(file_of(&files, i)).unwrap(), content(i, bytes));
    })
    .await;
    let files_read = begin.elapsed();

    let before = upstream.counts();
    let (relay, client) = relay(&upstream, &folder.path().join("first")).await;
    let begin = Instant::now();
    each(count, async |i| write(&client, i, bytes).await).await;
    let written = begin.elapsed();
    let first = finish(&relay).await;
    let first_requests = upstream.counts().since(&before).requests();
    assert_eq!((first.written, first.unsaved), (count, 0), "{first:?}");

    let before = upstream.counts();
    let (relay, client) = self::relay(&upstream, &folder.path().join("second")).await;
    let begin = Instant::now();
    relay.hydrate(None, Duration::from_secs(60)).await.unwrap();
    let loaded = begin.elapsed();
    let begin = Instant::now();
    each(count, async |i| read(&client, i, bytes).await).await;
    let read = begin.elapsed();
    let second = finish(&relay).await;
    let second_requests = upstream.counts().since(&before).requests();
    assert_eq!((second.hits, second.unsaved), (count, 0), "{second:?}");

    let ratio = |time: Duration, base: Duration| time.as_secs_f64() / base.as_secs_f64();
    let megabytes = |bytes: u64| bytes / 1_000_000;
    format!(
        "{count:>8} {:>8} | {:>8.2} {:>8.1} {first_requests:>8} {:>6} | {:>8.2} {:>8.2} {:>8.1} {second_requests:>6} {:>8}",
        megabytes(total),
        written.as_secs_f64(),
        ratio(written, files_written),
        megabytes(first.peak_memory),
        loaded.as_secs_f64(),
        read.as_secs_f64(),
        ratio(read, files_read),
        megabytes(second.peak_memory),
    )
}

async fn each(count: u64, work: impl AsyncFn(u64)) {
    stream::iter(0..count)
        .for_each_concurrent(AT_ONCE, |i| work(i))
        .await;
}

/// Bytes that cannot be compressed, half to one and a half times as many as `bytes`.
fn content(i: u64, bytes: u64) -> Vec<u8> {
    let mut content = Vec::new();
    let mut reader = blake3::Hasher::new()
        .update(&i.to_le_bytes())
        .finalize_xof();
    let length = bytes / 2 + i.wrapping_mul(0x9e37_79b9) % bytes.max(1);
    content.resize(usize::try_from(length).unwrap(), 0);
    reader.fill(&mut content);
    content
}

fn key(i: u64) -> String {
    blake3::hash(&i.to_le_bytes()).to_hex().to_string()
}

fn file_of(folder: &Path, i: u64) -> std::path::PathBuf {
    let key = key(i);
    folder.join(&key[0..1]).join(&key[1..2]).join(&key)
}

fn object_key(i: u64) -> String {
    let key = key(i);
    format!("sccache/{}/{}/{}/{key}", &key[0..1], &key[1..2], &key[2..3])
}

async fn relay(upstream: &Upstream, folder: &Path) -> (RunningRelay, CacheClient) {
    fs::create_dir_all(folder).unwrap();
    let token = || BearerToken::random().unwrap();
    let client_token = token();
    let config = Config {
        endpoint: Endpoint {
            protocol: Protocol::V2,
            url: upstream.url.parse().unwrap(),
            token: BearerToken::new(&upstream.token),
        },
        client_token: client_token.clone(),
        control_token: token(),
        folder: folder.join("relay"),
        namespace: "default".to_owned(),
        platform: "bench".to_owned(),
        read: vec![DEFAULT_BRANCH.to_owned()],
        write: Some(DEFAULT_BRANCH.to_owned()),
        lane: 1,
        max_size: 10 << 30,
        flush_age: Duration::from_secs(45),
        free_floor: FREE_FLOOR,
    };
    let program = Path::new(env!("CARGO_BIN_EXE_sccache-action"));
    let environment = Environment::of_this_process();
    let log = folder.join("relay.log");
    let relay = process::start(program, &environment, &config, &log).await;
    let (relay, tie) = relay.unwrap();
    tie.untie().await.unwrap();
    let endpoint = Endpoint {
        protocol: Protocol::V2,
        url: relay.url().parse().unwrap(),
        token: client_token,
    };
    let client = CacheClient::new(endpoint, "bench", Timeouts::default()).unwrap();
    (relay, client)
}

async fn finish(relay: &RunningRelay) -> Activity {
    relay.finish(Duration::from_secs(120), None).await.unwrap()
}

async fn write(client: &CacheClient, i: u64, bytes: u64) {
    let content = content(i, bytes);
    let size = content.len() as u64;
    let Reserved::Upload(upload) = client.reserve(&object_key(i), Some(size)).await.unwrap() else {
        panic!("{i} is taken");
    };
    let body = stream::iter([Ok(content.into())]);
    client.upload(&upload, size, body).await.unwrap();
    client.commit(upload, size).await.unwrap();
}

async fn read(client: &CacheClient, i: u64, bytes: u64) {
    let found = client.find(&object_key(i), &[]).await.unwrap().unwrap();
    let download = client.download(&found, 0..u64::MAX).await.unwrap();
    let mut stream = std::pin::pin!(download.stream);
    let mut read = Vec::new();
    while let Some(piece) = stream.next().await {
        read.extend_from_slice(&piece.unwrap());
    }
    assert!(read == content(i, bytes), "{i} is not what was written");
}
