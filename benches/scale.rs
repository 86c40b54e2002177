//! How the relay grows with the number of objects: time, requests to the cache service, memory.
//!
//! A client talks to a real relay process like sccache, since as many real compiles would take
//! hours. Behind the relay is the simulated cache service of `benches/modes.rs`. The first job
//! writes all objects and ends; the second, with a new relay, reads each of them. Beside it the
//! same client writes the same bytes to files and reads them back, which gives the time of a local
//! disk.
//!
//! Before that, it measures how long the service on a temporary store, which rehearsals, tests and
//! benchmarks share, takes from its start to its first answer: the median of many starts and the
//! spread of the others.
//!
//! With `--year` no process runs: the indexes of a year of jobs are written, 200 jobs a day, most of them
//! of pull requests, beside what they would have been had each been full.
//!
//! usage: cargo bench --bench scale -- [--starts 500] [--objects 1000,5000,20000,50000,200000]
//!                                     [--bytes 8192] [--program ANOTHER_BINARY] [--year [--days 365]]
//!                                     [--json FILE]

#![allow(clippy::unwrap_used)]

#[path = "shared/json.rs"]
mod json;
#[path = "../tests/it/support/upstream.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod upstream;
#[path = "scale/year.rs"]
mod year;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Parser;
use futures_util::{StreamExt, stream};
use sccache_action::cache_client::{CacheClient, Endpoint, Protocol, Reservation};
use sccache_action::cache_protocol;
use sccache_action::cache_protocol::temporary::TemporaryService;
use sccache_action::http::BearerToken;
use sccache_action::http::Timeouts;
use sccache_action::relay::activity::Activity;
use sccache_action::relay::process::{self, RunningRelay};
use sccache_action::relay::{FREE_FLOOR, RelayConfig, RelayTask};
use sccache_action::runner::environment::Environment;
use serde_json::Value;
use upstream::{DEFAULT_BRANCH, Options as Distance, Upstream};

/// Measures a relay with more and more objects.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo bench --bench scale --")]
struct Options {
    /// How often the service on a temporary store is started
    #[arg(long, default_value_t = 500)]
    starts: usize,
    /// How many objects
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1000,5000,20000,50000,200000"
    )]
    objects: Vec<u64>,
    /// How large an object is on average, in bytes
    #[arg(long, default_value_t = 8192)]
    bytes: u64,
    /// The relay to be measured, where it is not the one that was just built
    #[arg(long, default_value = env!("CARGO_BIN_EXE_sccache-action"))]
    program: PathBuf,
    /// Write the indexes of a year of jobs
    #[arg(long)]
    year: bool,
    /// How many days the year has
    #[arg(long, default_value_t = 365)]
    days: u64,
    /// Writes the rows to this file too, for docs/pictures/charts
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What `cargo bench` adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// How many requests are under way at once: those of a build on as many cores.
const AT_ONCE: usize = 4;

fn main() {
    let options = Options::parse();
    if options.year {
        let rows = tell_of_a_year(options.days);
        if let Some(file) = &options.json {
            let settings = serde_json::json!({ "days": options.days });
            json::write(file, "year", &settings, &rows);
        }
        return;
    }
    if options.starts > 0 {
        println!("{}\n", starts(options.starts));
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    println!(
        "{:>8} {:>8} | {:>8} {:>8} {:>8} {:>6} {:>6} | {:>8} {:>8} {:>8} {:>8} {:>6} {:>8}",
        "objects",
        "MB",
        "write s",
        "vs files",
        "requests",
        "extra %",
        "MB mem",
        "load s",
        "look-ups",
        "read s",
        "vs files",
        "requests",
        "MB mem"
    );
    let mut rows = Vec::new();
    for count in options.objects {
        let (line, row) = runtime.block_on(measure(count, options.bytes, &options.program));
        println!("{line}");
        rows.push(row);
    }
    if let Some(file) = &options.json {
        let settings = serde_json::json!({ "bytes": options.bytes });
        json::write(file, "scale", &settings, &rows);
    }
}

/// The times of `count` starts of the service on a temporary store.
fn starts(count: usize) -> String {
    let before = processor_time();
    let mut times: Vec<Duration> = (0..count).map(|_| start()).collect();
    let worked = processor_time() - before;
    times.sort();
    let share = |percent: usize| {
        let time = times[(count - 1) * percent / 100];
        format!("{:.2}", time.as_secs_f64() * 1000.0)
    };
    let slow = times.iter().filter(|time| **time > SLOW_START).count();
    format!(
        "{count} starts of the service on a temporary store, to its first answer: median {} ms, 5 % {} ms, \
         95 % {} ms, 99 % {} ms, longest {} ms; {slow} took more than {} ms; {:.2} ms of processor time on average",
        share(50),
        share(5),
        share(95),
        share(99),
        share(100),
        SLOW_START.as_millis(),
        worked.as_secs_f64() * 1000.0 / count as f64,
    )
}

/// The processor time of this process so far, its client included. A start that took much longer than
/// its share of this waited for a core.
fn processor_time() -> Duration {
    // In units of 1/100 s (`man 5 proc`); the name before them may contain blanks.
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(10 * ticks)
}

/// The time that a start of the service may take.
const SLOW_START: Duration = Duration::from_millis(3);

/// Starts the service like `rehearse`, with its own runtime and an empty folder, and waits for the
/// first byte of an answer.
fn start() -> Duration {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("store");
    let begin = Instant::now();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (_, tokens) = cache_protocol::single_token(DEFAULT_BRANCH).unwrap();
    let started = TemporaryService::start(&folder, tokens);
    let service = runtime.block_on(started).unwrap();
    let address = service.url();
    let address = address.trim_start_matches("http://").trim_end_matches('/');
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    stream.read_exact(&mut [0]).unwrap();
    begin.elapsed()
}

/// Gives a line of the table, and the same as JSON.
async fn measure(count: u64, bytes: u64, program: &Path) -> (String, Value) {
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
    let (relay, client) = relay(&upstream, program, &folder.path().join("first")).await;
    let begin = Instant::now();
    each(count, async |i| write(&client, i, bytes).await).await;
    let written = begin.elapsed();
    let first = finish(&relay).await;
    let uploaded = upstream.counts().since(&before);
    let first_requests = uploaded.requests();
    assert_eq!((first.written, first.unsaved), (count, 0), "{first:?}");

    let before = upstream.counts();
    let (relay, client) = self::relay(&upstream, program, &folder.path().join("second")).await;
    let begin = Instant::now();
    relay.prefill(None, Duration::from_secs(60)).await.unwrap();
    let loaded = begin.elapsed();
    let lookups = upstream.counts().since(&before).lookups;
    let begin = Instant::now();
    each(count, async |i| read(&client, i, bytes).await).await;
    let read = begin.elapsed();
    let second = finish(&relay).await;
    let second_requests = upstream.counts().since(&before).requests();
    assert_eq!((second.hits, second.unsaved), (count, 0), "{second:?}");

    let ratio = |time: Duration, base: Duration| time.as_secs_f64() / base.as_secs_f64();
    let megabytes = |bytes: u64| bytes / 1_000_000;
    let seconds = |time: Duration| json::rounded(time.as_secs_f64());
    let row = serde_json::json!({
        "objects": count,
        "object_bytes": total,
        "uploaded_bytes": uploaded.bytes_up,
        "index_bytes": first.saved_index_bytes,
        "write_seconds": seconds(written),
        "write_requests": first_requests,
        "write_memory_bytes": first.peak_memory,
        "files_write_seconds": seconds(files_written),
        "load_seconds": seconds(loaded),
        "load_lookups": lookups,
        "read_seconds": seconds(read),
        "read_requests": second_requests,
        "read_memory_bytes": second.peak_memory,
        "files_read_seconds": seconds(files_read),
    });
    let line = format!(
        "{count:>8} {:>8} | {:>8.2} {:>8.1} {first_requests:>8} {:>6.2} {:>6} | {:>8.2} {lookups:>8} {:>8.2} {:>8.1} {second_requests:>6} {:>8}",
        megabytes(total),
        written.as_secs_f64(),
        ratio(written, files_written),
        100.0 * (uploaded.bytes_up as f64 / total as f64 - 1.0),
        megabytes(first.peak_memory),
        loaded.as_secs_f64(),
        read.as_secs_f64(),
        ratio(read, files_read),
        megabytes(second.peak_memory),
    );
    (line, row)
}

/// Prints what the indexes of each month were, and of all. Gives the days that it prints.
fn tell_of_a_year(days: u64) -> Vec<Value> {
    let mut rows = Vec::new();
    let share = |indexes: u64, objects: u64| 100.0 * indexes as f64 / objects as f64;
    println!(
        "{:>6} {:>10} {:>12} {:>10} {:>10}",
        "day", "objects", "uploaded MB", "index %", "all full %"
    );
    let mut all = year::Written::default();
    year::live(days, |day, written| {
        all.objects += written.objects;
        all.indexes += written.indexes;
        all.full += written.full;
        if day % 30 == 0 || day + 1 == days {
            println!(
                "{day:>6} {:>10} {:>12} {:>10.2} {:>10.2}",
                written.known,
                written.objects / 1_000_000,
                share(written.indexes, written.objects),
                share(written.full, written.objects),
            );
            rows.push(serde_json::json!({
                "day": day,
                "objects": written.known,
                "object_bytes": written.objects,
                "index_bytes": written.indexes,
                "full_index_bytes": written.full,
                "longest_index_bytes": written.longest,
            }));
        }
    });
    println!(
        "{:>6} {:>10} {:>12} {:>10.2} {:>10.2}",
        "all",
        "",
        all.objects / 1_000_000,
        share(all.indexes, all.objects),
        share(all.full, all.objects),
    );
    rows
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

async fn relay(upstream: &Upstream, program: &Path, folder: &Path) -> (RunningRelay, CacheClient) {
    fs::create_dir_all(folder).unwrap();
    let token = || BearerToken::random().unwrap();
    let client_token = token();
    let config = RelayConfig {
        task: RelayTask::Store,
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
    let environment = Environment::of_this_process();
    let log = folder.join("relay.log");
    let relay = process::start(program, &environment, &config, &log).await;
    let (relay, lifeline) = relay.unwrap();
    lifeline.detach().await.unwrap();
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
    let Reservation::Granted(upload) = client.reserve(&object_key(i), Some(size)).await.unwrap()
    else {
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
