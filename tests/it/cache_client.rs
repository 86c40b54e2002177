//! The client of cache services, against the embedded service in both protocols, and against servers
//! that misbehave.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use sccache_action::cache_client::{
    CacheClient, CacheError, Download, Endpoint, FoundEntry, Protocol, RequestCounts, Reservation,
    UploadHandle,
};
use sccache_action::cache_protocol;
use sccache_action::cache_protocol::auth::{Access, Tokens};
use sccache_action::http::BearerToken;
use sccache_action::http::Timeouts;
use sccache_action::serve::server::{self, RunningServer, ServerConfig};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const TOKEN: &str = "hunter2-0123456789abcdef";
const BOTH: [Protocol; 2] = [Protocol::V1, Protocol::V2];
const EVERYTHING: Range<u64> = 0..u64::MAX;

/// How long the tests' servers may stay silent.
const READ: Duration = Duration::from_millis(400);

/// The time that a busy machine may take for some of those waits. A client that waits for another
/// limit than [`READ`] takes longer.
const SOON: Duration = Duration::from_secs(20);

fn client_of(url: &str, protocol: Protocol, read: Duration) -> CacheClient {
    let endpoint = Endpoint {
        protocol,
        url: url.parse().unwrap(),
        token: BearerToken::new(TOKEN),
    };
    let timeouts = Timeouts {
        connect: Duration::from_secs(5),
        read,
        slow: Duration::from_secs(60),
    };
    CacheClient::new(endpoint, "0123abcd", timeouts).unwrap()
}

/// A client of a server that is quick if it answers at all.
fn client(url: &str, protocol: Protocol) -> CacheClient {
    client_of(url, protocol, Duration::from_secs(10))
}

/// The embedded service, which lets the tests' token write and read, or only read.
async fn embedded(folder: &Path, may_write: bool) -> RunningServer {
    let mut access = Access::to("refs/heads/main".into());
    if !may_write {
        access.write = None;
    }
    let tokens = Tokens::default().with(&BearerToken::new(TOKEN), access);
    let config = ServerConfig::on_loopback(folder, tokens);
    server::start(config).await.unwrap()
}

fn body_of(content: &[u8]) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let pieces: Vec<io::Result<Bytes>> = content
        .chunks(1000)
        .map(|piece| Ok(Bytes::copy_from_slice(piece)))
        .collect();
    stream::iter(pieces)
}

async fn reserve(client: &CacheClient, key: &str) -> UploadHandle {
    match client.reserve(key, None).await.unwrap() {
        Reservation::Granted(upload) => upload,
        Reservation::AlreadyExists => panic!("{key} is taken"),
    }
}

async fn save(client: &CacheClient, key: &str, content: &[u8]) {
    let size = content.len() as u64;
    let upload = reserve(client, key).await;
    client
        .upload(&upload, size, body_of(content))
        .await
        .unwrap();
    client.commit(upload, size).await.unwrap();
}

async fn found(client: &CacheClient, key: &str, restore_keys: &[&str]) -> Option<String> {
    let found = client.find(key, restore_keys).await.unwrap();
    found.map(|found| found.key)
}

async fn entry(client: &CacheClient, key: &str) -> FoundEntry {
    client.find(key, &[]).await.unwrap().unwrap()
}

async fn content(download: Download) -> io::Result<Vec<u8>> {
    let add = |mut all: Vec<u8>, piece: Bytes| async move {
        all.extend_from_slice(&piece);
        Ok(all)
    };
    download.stream.try_fold(Vec::new(), add).await
}

/// A part of the content of an entry, with its position and the size of the entry.
async fn part(client: &CacheClient, found: &FoundEntry, range: Range<u64>) -> (u64, u64, Vec<u8>) {
    let download = client.download(found, range).await.unwrap();
    let (start, total) = (download.start, download.total);
    (start, total, content(download).await.unwrap())
}

#[tokio::test]
async fn an_entry_comes_back_whole_and_in_parts() {
    for protocol in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let service = embedded(folder.path(), true).await;
        let client = client(&service.url(), protocol);
        let saved: Vec<u8> = (0..300_000u32).map(|i| (i / 7) as u8).collect();
        save(&client, "a key/with (signs)&=+%", &saved).await;
        let found = entry(&client, "a key/with (signs)&=+%").await;
        for (range, expected) in [
            (EVERYTHING, 0..300_000),
            (0..1, 0..1),
            (0..300_000, 0..300_000),
            (299_999..u64::MAX, 299_999..300_000),
            (1000..200_000, 1000..200_000),
            (200_000..400_000, 200_000..300_000),
        ] {
            let start = range.start;
            let expected = (start, 300_000, saved[expected].to_vec());
            assert!(
                part(&client, &found, range).await == expected,
                "{protocol:?} {start}"
            );
        }
        let counts = RequestCounts {
            lookups: 1,
            lookup_hits: 1,
            reservations: 1,
            uploads: 1,
            commits: 1,
            downloads: 6,
            bytes_up: 300_000,
            bytes_down: 300_000 + 1 + 300_000 + 1 + 199_000 + 100_000,
            ..RequestCounts::default()
        };
        assert_eq!(client.requests(), counts, "{protocol:?}");
        let error = client
            .download(&found, 300_000..u64::MAX)
            .await
            .unwrap_err();
        assert_eq!(error, CacheError::Gone);
        let by_version_1 = service.counters().version_1;
        assert_eq!(by_version_1 > 0, protocol == Protocol::V1, "{by_version_1}");
    }
}

#[tokio::test]
async fn an_empty_entry_comes_back_empty() {
    for protocol in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let service = embedded(folder.path(), true).await;
        let client = client(&service.url(), protocol);
        save(&client, "empty", b"").await;
        let found = entry(&client, "empty").await;
        assert_eq!(part(&client, &found, EVERYTHING).await, (0, 0, Vec::new()));
    }
}

#[tokio::test]
async fn an_entry_is_found_by_its_key_or_as_the_newest_that_begins_so() {
    for protocol in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let service = embedded(folder.path(), true).await;
        let client = client(&service.url(), protocol);
        for key in ["index", "index-1", "index-2", "other-1"] {
            save(&client, key, key.as_bytes()).await;
        }
        let find = async |key, restore_keys| found(&client, key, restore_keys).await;
        let some = |key: &str| Some(key.to_owned());
        assert_eq!(find("index-1", &[]).await, some("index-1"));
        assert_eq!(find("index", &["other-"]).await, some("index"));
        assert_eq!(find("index-", &[]).await, some("index-2"));
        assert_eq!(find("none", &["other-", "index-"]).await, some("other-1"));
        assert_eq!(find("none", &["nothing", "index-"]).await, some("index-2"));
        assert_eq!(find("none", &["nothing"]).await, None);
        let counts = client.requests();
        assert_eq!(
            (counts.lookups, counts.lookup_hits, counts.failed),
            (6, 5, 0)
        );
    }
}

#[tokio::test]
async fn a_key_that_is_taken_is_an_answer_and_no_error() {
    for protocol in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let service = embedded(folder.path(), true).await;
        let client = client(&service.url(), protocol);
        let upload = reserve(&client, "key").await;
        let second = client.reserve("key", Some(4)).await.unwrap();
        assert!(matches!(second, Reservation::AlreadyExists));
        client.upload(&upload, 4, body_of(b"kept")).await.unwrap();
        client.commit(upload, 4).await.unwrap();
        let third = client.reserve("key", None).await.unwrap();
        assert!(matches!(third, Reservation::AlreadyExists));
        let found = entry(&client, "key").await;
        assert_eq!(part(&client, &found, EVERYTHING).await.2, b"kept");
        let counts = client.requests();
        assert_eq!(
            (counts.reservations, counts.conflicts, counts.failed),
            (3, 2, 0)
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_upload_goes_in_pieces_in_version_1_and_at_once_in_version_2() {
    const SIZE: u64 = 70 << 20;
    // Each piece of the stream differs, and none ends at the end of a request.
    const PIECE: usize = 1_000_003;
    let pieces = || {
        (0..)
            .map(|i| vec![i as u8; PIECE])
            .scan(SIZE, |left, mut piece| {
                piece.truncate(usize::try_from(*left).unwrap().min(PIECE));
                *left -= piece.len() as u64;
                (!piece.is_empty()).then(|| Bytes::from(piece))
            })
    };
    let mut digest = Sha256::new();
    pieces().for_each(|piece| digest.update(&piece));
    let expected = digest.finalize();

    for (protocol, requests) in [(Protocol::V1, 3), (Protocol::V2, 1)] {
        let folder = tempfile::tempdir().unwrap();
        let service = embedded(folder.path(), true).await;
        let client = client(&service.url(), protocol);
        let upload = reserve(&client, "large").await;
        let body = stream::iter(pieces().map(Ok));
        client.upload(&upload, SIZE, body).await.unwrap();
        client.commit(upload, SIZE).await.unwrap();
        assert_eq!(service.counters().uploads, requests);
        assert_eq!(client.requests().uploads, requests);
        assert_eq!(client.requests().bytes_up, SIZE);

        let found = entry(&client, "large").await;
        let download = client.download(&found, EVERYTHING).await.unwrap();
        assert_eq!(download.total, SIZE);
        let add = |mut digest: Sha256, piece: Bytes| async move {
            digest.update(&piece);
            Ok(digest)
        };
        let digest = download.stream.try_fold(Sha256::new(), add).await.unwrap();
        assert_eq!(digest.finalize(), expected, "{protocol:?}");
    }
}

#[tokio::test]
async fn a_token_that_may_only_read_is_denied_and_still_reads() {
    for protocol in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let writing = embedded(folder.path(), true).await;
        save(&client(&writing.url(), protocol), "key", b"content").await;
        writing.shutdown().await.unwrap();

        let service = embedded(folder.path(), false).await;
        let client = client(&service.url(), protocol);
        let error = client.reserve("other", None).await.unwrap_err();
        let CacheError::Denied(text) = &error else {
            panic!("{error:?}");
        };
        assert!(text.contains("cache write denied"), "{text}");
        assert!(!error.is_passing());
        let found = entry(&client, "key").await;
        assert_eq!(part(&client, &found, EVERYTHING).await.2, b"content");
    }
}

#[tokio::test]
async fn a_token_that_the_service_does_not_know_is_denied() {
    for protocol in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let tokens = cache_protocol::single_token("main").unwrap().1;
        let config = ServerConfig::on_loopback(folder.path(), tokens);
        let service = server::start(config).await.unwrap();
        let client = client(&service.url(), protocol);
        for error in [
            client.find("key", &[]).await.unwrap_err(),
            client.reserve("key", None).await.unwrap_err(),
        ] {
            assert!(matches!(error, CacheError::Denied(_)), "{error:?}");
        }
    }
}

#[tokio::test]
async fn what_the_service_no_longer_knows_is_gone() {
    for protocol in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let service = embedded(folder.path(), true).await;
        let client = client(&service.url(), protocol);
        let upload = reserve(&client, "key").await;
        client.upload(&upload, 1, body_of(b"x")).await.unwrap();
        let found = {
            save(&client, "other", b"x").await;
            entry(&client, "other").await
        };
        // Another service at the same address, which has neither.
        let address = service.url();
        service.shutdown().await.unwrap();
        let other = tempfile::tempdir().unwrap();
        let tokens = Tokens::default().with(&BearerToken::new(TOKEN), Access::to("main".into()));
        let mut config = ServerConfig::on_loopback(other.path(), tokens);
        let url: reqwest::Url = address.parse().unwrap();
        config.address.set_port(url.port().unwrap());
        let _service = server::start(config).await.unwrap();

        let error = client.download(&found, EVERYTHING).await.unwrap_err();
        assert_eq!(error, CacheError::Gone, "{protocol:?}");
        let error = client.upload(&upload, 1, body_of(b"x")).await.unwrap_err();
        assert_eq!(error, CacheError::Gone, "{protocol:?}");
        let error = client.commit(upload, 1).await.unwrap_err();
        assert_eq!(error, CacheError::Gone, "{protocol:?}");
        assert!(!error.is_passing());
    }
}

/// A request as a server saw it.
#[derive(Clone, Debug)]
struct Seen {
    method: Method,
    /// Path and query.
    target: String,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Seen {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// A URL of the same server.
    fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.header("host").unwrap())
    }
}

/// A server that answers to order.
struct Fake {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Fake {
    async fn start(answer: impl Fn(&Seen) -> Response + Clone + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let router = Router::new().fallback(async move |request: Request| {
            let (head, body) = request.into_parts();
            let seen = Seen {
                method: head.method,
                target: head.uri.to_string(),
                headers: head.headers,
                body: to_bytes(body, usize::MAX)
                    .await
                    .unwrap_or_default()
                    .to_vec(),
            };
            log.lock().unwrap().push(seen.clone());
            answer(&seen)
        });
        tokio::spawn(axum::serve(listener, router).into_future());
        Self { url, seen }
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

/// A service whose API is in order in both protocols, and whose content is at `content`.
fn api(seen: &Seen, content: &str) -> Option<Response> {
    let (_, method) = seen.target.rsplit_once('/')?;
    let answer = match (method, &seen.method) {
        ("GetCacheEntryDownloadURL", _) => {
            json!({ "ok": true, "signed_download_url": content, "matched_key": "key" })
        }
        ("CreateCacheEntry", _) => json!({ "ok": true, "signed_upload_url": content }),
        ("FinalizeCacheEntryUpload", _) => json!({ "ok": true, "entry_id": "1" }),
        ("caches", _) => json!({ "cacheId": 7 }),
        ("7", &Method::POST) => json!({}),
        _ if method.starts_with("cache?") => {
            json!({ "cacheKey": "key", "archiveLocation": content })
        }
        _ => return None,
    };
    Some(axum::Json(answer).into_response())
}

/// A server whose API is in order and that answers `answer` for content.
async fn fake_content(answer: impl Fn(&Seen) -> Response + Clone + Send + Sync + 'static) -> Fake {
    Fake::start(move |seen| api(seen, &seen.url("c/7?sig=s3cret")).unwrap_or_else(|| answer(seen)))
        .await
}

#[tokio::test]
async fn requests_are_those_of_the_toolkit() {
    let fake = fake_content(|_| StatusCode::CREATED.into_response()).await;
    // Services may be below a path.
    let client = client(&format!("{}below/", fake.url), Protocol::V2);
    save(&client, "key", b"content").await;
    client.find("key", &[]).await.unwrap();
    client.find("key", &["ke", "k"]).await.unwrap();
    let seen = fake.seen();
    let calls: Vec<Value> = [0, 2, 3, 4]
        .iter()
        .map(|&i: &usize| seen[i].json())
        .collect();
    assert_eq!(
        calls,
        [
            json!({ "key": "key", "version": "0123abcd" }),
            json!({ "key": "key", "version": "0123abcd", "size_bytes": "7" }),
            json!({ "key": "key", "version": "0123abcd" }),
            json!({ "key": "key", "version": "0123abcd", "restore_keys": ["ke", "k"] }),
        ]
    );
    let api = "/below/twirp/github.actions.results.api.v1.CacheService/CreateCacheEntry";
    assert_eq!(
        (seen[0].target.as_str(), &seen[0].method),
        (api, &Method::POST)
    );
    assert_eq!(seen[0].header("content-type"), Some("application/json"));
    let put = &seen[1];
    assert_eq!(
        (put.target.as_str(), &put.method),
        ("/c/7?sig=s3cret", &Method::PUT)
    );
    assert_eq!(put.header("x-ms-blob-type"), Some("BlockBlob"));
    assert_eq!(put.header("content-length"), Some("7"));
    assert_eq!(put.header("transfer-encoding"), None);
    assert_eq!(put.body, b"content");

    let fake = fake_content(|_| StatusCode::NO_CONTENT.into_response()).await;
    let client = self::client(&format!("{}below/", fake.url), Protocol::V1);
    let Reservation::Granted(upload) = client.reserve("key", Some(7)).await.unwrap() else {
        panic!("taken");
    };
    client
        .upload(&upload, 7, body_of(b"content"))
        .await
        .unwrap();
    client.commit(upload, 7).await.unwrap();
    client.find("k y", &["k"]).await.unwrap();
    let seen = fake.seen();
    let targets: Vec<_> = seen
        .iter()
        .map(|seen| format!("{} {}", seen.method, seen.target))
        .collect();
    assert_eq!(
        targets,
        [
            "POST /below/_apis/artifactcache/caches",
            "PATCH /below/_apis/artifactcache/caches/7",
            "POST /below/_apis/artifactcache/caches/7",
            "GET /below/_apis/artifactcache/cache?keys=k+y%2Ck&version=0123abcd",
        ]
    );
    let reserved = json!({ "key": "key", "version": "0123abcd", "cacheSize": 7 });
    assert_eq!(seen[0].json(), reserved);
    assert_eq!(seen[1].header("content-range"), Some("bytes 0-6/*"));
    assert_eq!(seen[1].header("content-length"), Some("7"));
    assert_eq!(seen[2].json(), json!({ "size": 7 }));
    for seen in &seen {
        let accepted = Some("application/json;api-version=6.0-preview.1");
        assert_eq!(seen.header("accept"), accepted);
        let token = format!("Bearer {TOKEN}");
        assert_eq!(seen.header("authorization"), Some(token.as_str()));
    }
}

#[tokio::test]
async fn a_server_that_has_had_enough_says_for_how_long() {
    let in_a_minute = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(60));
    for (status, wait, expected) in [
        (429, None, None),
        (429, Some("7"), Some(7..8)),
        (429, Some(in_a_minute.as_str()), Some(50..61)),
        (429, Some("later"), None),
        (503, Some("7"), Some(7..8)),
    ] {
        let wait = wait.map(str::to_owned);
        let busy = move || {
            let mut answer = StatusCode::from_u16(status).unwrap().into_response();
            if let Some(wait) = &wait {
                let wait = wait.parse().unwrap();
                answer.headers_mut().insert("retry-after", wait);
            }
            answer
        };
        for protocol in BOTH {
            let busy_content = busy.clone();
            let content = fake_content(move |_| busy_content()).await;
            let everything = {
                let busy = busy.clone();
                Fake::start(move |_| busy()).await
            };
            let kind = |client: CacheClient| async move {
                let found = entry(&client, "key").await;
                let upload = reserve(&client, "key").await;
                vec![
                    client.download(&found, EVERYTHING).await.unwrap_err(),
                    client.upload(&upload, 1, body_of(b"x")).await.unwrap_err(),
                ]
            };
            let mut errors = kind(client(&content.url, protocol)).await;
            let client = client(&everything.url, protocol);
            errors.push(client.find("key", &[]).await.unwrap_err());
            errors.push(client.reserve("key", None).await.unwrap_err());
            assert_eq!(client.requests().throttled, 2);
            assert_eq!(client.requests().failed, 0);
            for error in errors {
                let CacheError::Throttled { retry_after } = error else {
                    panic!("{error:?}");
                };
                assert!(error.is_passing());
                match (&expected, retry_after) {
                    (Some(range), Some(wait)) => assert!(range.contains(&wait.as_secs())),
                    (expected, wait) => assert_eq!((expected, wait), (&None, None)),
                }
            }
        }
    }
}

#[tokio::test]
async fn a_server_that_knows_no_ranges_sends_everything_from_the_start() {
    let fake = fake_content(|_| "0123456789".into_response()).await;
    let client = client(&fake.url, Protocol::V2);
    let found = entry(&client, "key").await;
    let whole = (0, 10, b"0123456789".to_vec());
    assert_eq!(part(&client, &found, 4..6).await, whole);
    let ranges = |seen: &Seen| seen.header("range").map(str::to_owned);
    assert_eq!(
        fake.seen().iter().rev().find_map(ranges).unwrap(),
        "bytes=4-5"
    );
}

#[tokio::test]
async fn another_range_than_was_asked_for_is_refused() {
    for (status, range) in [
        (206, Some("bytes 3-5/10")),
        (206, Some("bytes 5-5/10")),
        (206, Some("bytes 4-4/10")),
        (206, Some("bytes 4-6/10")),
        (206, Some("bytes 4-5/*")),
        (206, Some("nonsense")),
        (206, None),
        (204, None),
    ] {
        let fake = fake_content(move |_| {
            let mut answer = Response::builder().status(status);
            if let Some(range) = range {
                answer = answer.header("content-range", range);
            }
            answer.body(Body::from("x")).unwrap()
        })
        .await;
        let client = client(&fake.url, Protocol::V2);
        let found = entry(&client, "key").await;
        let error = client.download(&found, 4..6).await.unwrap_err();
        assert!(
            matches!(error, CacheError::Unavailable(_)),
            "{range:?} {error:?}"
        );
    }
}

/// A server's reaction to a connection.
#[derive(Clone, Copy)]
enum Behaviour {
    /// Reads a request, and closes.
    Close,
    /// Reads a request, writes this and closes.
    Say(&'static str),
    /// Reads a request, writes this and waits.
    Hang(&'static str),
    /// Does not even read.
    Deaf,
}

/// A server that behaves so to the first connection, so to the second, and to all others as to the
/// last; and the number of connections it has had.
async fn raw(behaviours: &'static [Behaviour]) -> (String, Arc<Mutex<usize>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let count = Arc::new(Mutex::new(0));
    let connections = count.clone();
    tokio::spawn(async move {
        loop {
            let (connection, _) = listener.accept().await.unwrap();
            let behaviour = {
                let mut count = connections.lock().unwrap();
                *count += 1;
                behaviours[(*count - 1).min(behaviours.len() - 1)]
            };
            tokio::spawn(behave(connection, behaviour));
        }
    });
    (url, count)
}

async fn behave(mut connection: TcpStream, behaviour: Behaviour) {
    if !matches!(behaviour, Behaviour::Deaf) {
        let mut request = Vec::new();
        while !request.windows(4).any(|end| end == b"\r\n\r\n") {
            let mut piece = [0; 4096];
            let length = connection.read(&mut piece).await.unwrap();
            request.extend_from_slice(&piece[..length]);
        }
    }
    match behaviour {
        Behaviour::Close => {}
        Behaviour::Say(answer) => connection.write_all(answer.as_bytes()).await.unwrap(),
        Behaviour::Hang(answer) => {
            connection.write_all(answer.as_bytes()).await.unwrap();
            std::future::pending().await
        }
        Behaviour::Deaf => std::future::pending().await,
    }
}

/// A server whose API is in order and whose content is on a server of that behaviour.
async fn raw_content(behaviours: &'static [Behaviour]) -> Fake {
    let (url, _) = raw(behaviours).await;
    let content = format!("{url}c/7?sig=s3cret");
    Fake::start(move |seen| api(seen, &content).unwrap()).await
}

#[tokio::test]
async fn content_that_ends_early_or_late_is_an_error_and_no_end() {
    for answer in [
        "HTTP/1.1 206 P\r\ncontent-range: bytes 0-9/10\r\ncontent-length: 10\r\n\r\n01234",
        "HTTP/1.1 206 P\r\ncontent-range: bytes 0-9/10\r\ncontent-length: 5\r\n\r\n01234",
        "HTTP/1.1 206 P\r\ncontent-range: bytes 0-9/10\r\ntransfer-encoding: chunked\r\n\r\n\
         5\r\n01234\r\n0\r\n\r\n",
        "HTTP/1.1 206 P\r\ncontent-range: bytes 0-9/10\r\ntransfer-encoding: chunked\r\n\r\n\
         5\r\n01234\r\n",
        "HTTP/1.1 206 P\r\ncontent-range: bytes 0-9/10\r\n\r\n01234",
        "HTTP/1.1 206 P\r\ncontent-range: bytes 0-9/10\r\n\r\n",
        "HTTP/1.1 206 P\r\ncontent-range: bytes 0-9/10\r\n\r\n0123456789x",
        "HTTP/1.1 200 O\r\ncontent-length: 10\r\n\r\n01234",
    ] {
        let fake = raw_content(vec![Behaviour::Say(answer)].leak()).await;
        let client = client(&fake.url, Protocol::V2);
        let found = entry(&client, "key").await;
        let download = client.download(&found, EVERYTHING).await.unwrap();
        assert_eq!((download.start, download.total), (0, 10));
        let error = content(download).await.unwrap_err();
        assert!(!error.to_string().contains("s3cret"), "{error}");
        assert_eq!(client.requests().failed, 1, "{answer}");
    }
    let unknown = "HTTP/1.1 200 O\r\n\r\n01234";
    let fake = raw_content(vec![Behaviour::Say(unknown)].leak()).await;
    let client = client(&fake.url, Protocol::V2);
    let found = entry(&client, "key").await;
    let error = client.download(&found, EVERYTHING).await.unwrap_err();
    assert!(matches!(error, CacheError::Unavailable(_)), "{error:?}");
}

#[tokio::test]
async fn a_server_that_stays_silent_is_given_up() {
    let begin = Instant::now();
    for behaviour in [
        Behaviour::Deaf,
        Behaviour::Hang("HTTP/1.1 200 OK\r\ncontent-le"),
        Behaviour::Hang("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"),
        Behaviour::Hang("HTTP/1.1 500 Oh\r\ncontent-length: 100\r\n\r\n{"),
    ] {
        let (url, connections) = raw(vec![behaviour].leak()).await;
        for protocol in BOTH {
            let client = client_of(&url, protocol, READ);
            let error = client.find("key", &[]).await.unwrap_err();
            assert!(matches!(error, CacheError::Unavailable(_)), "{error:?}");
        }
        // After one slow answer it is not asked again.
        assert_eq!(*connections.lock().unwrap(), 2);
    }
    let part = "HTTP/1.1 200 O\r\ncontent-length: 10\r\n\r\n01234";
    let fake = raw_content(vec![Behaviour::Hang(part)].leak()).await;
    let client = client_of(&fake.url, Protocol::V2, READ);
    let found = entry(&client, "key").await;
    let download = client.download(&found, EVERYTHING).await.unwrap();
    let error = content(download).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
}

#[tokio::test]
async fn an_upload_may_take_long_as_long_as_it_moves() {
    let slow = |pieces: usize| {
        stream::iter(0..pieces).then(|_| async {
            tokio::time::sleep(READ / 4).await;
            Ok(Bytes::from_static(b"0123456789"))
        })
    };
    for protocol in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let service = embedded(folder.path(), true).await;
        let client = client_of(&service.url(), protocol, READ);
        let upload = reserve(&client, "key").await;
        client.upload(&upload, 120, slow(12)).await.unwrap();
        client.commit(upload, 120).await.unwrap();
    }
    // More than the system takes for a server that takes nothing.
    let fake = raw_content(&[Behaviour::Deaf]).await;
    let client = client_of(&fake.url, Protocol::V2, READ);
    let upload = reserve(&client, "key").await;
    let piece = Bytes::from(vec![0; 1 << 20]);
    let body = stream::repeat_with(move || Ok(piece.clone()));
    let begin = Instant::now();
    let error = client.upload(&upload, 1 << 30, body).await.unwrap_err();
    assert!(matches!(error, CacheError::Unavailable(_)), "{error:?}");
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
}

#[tokio::test]
async fn content_of_another_size_than_was_said_is_no_upload() {
    for protocol in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let service = embedded(folder.path(), true).await;
        let client = client(&service.url(), protocol);
        let broken = || {
            let pieces = [Ok(Bytes::from_static(b"01")), Err(io::Error::other("disk"))];
            stream::iter(pieces)
        };
        let upload = reserve(&client, "key").await;
        let texts = [
            client.upload(&upload, 11, body_of(b"0123456789")).await,
            client.upload(&upload, 9, body_of(b"0123456789")).await,
            client.upload(&upload, 0, body_of(b"0123456789")).await,
            client.upload(&upload, 10, broken()).await,
            client.upload(&upload, 2, broken()).await,
        ]
        .map(|result| result.unwrap_err().to_string());
        for (text, part) in texts
            .iter()
            .zip(["shorter", "longer", "longer", "disk", "disk"])
        {
            assert!(text.contains(part), "{protocol:?} {text}");
        }
        // None of it prevents a correct one.
        client
            .upload(&upload, 10, body_of(b"0123456789"))
            .await
            .unwrap();
        client.commit(upload, 10).await.unwrap();
    }
}

#[tokio::test]
async fn a_connection_that_is_closed_is_tried_once_more_for_what_may_be_repeated() {
    const HIT: &str = "HTTP/1.1 200 O\r\ncontent-length: 2\r\n\r\n{}";
    let (url, connections) = raw(&[Behaviour::Close, Behaviour::Say(HIT)]).await;
    let client = client(&url, Protocol::V2);
    assert_eq!(found(&client, "key", &[]).await, None);
    assert_eq!(*connections.lock().unwrap(), 2);
    assert_eq!(
        (client.requests().lookups, client.requests().failed),
        (1, 0)
    );

    const CONTENT: &str = "HTTP/1.1 200 O\r\ncontent-length: 2\r\n\r\nok";
    let fake = raw_content(&[Behaviour::Close, Behaviour::Say(CONTENT)]).await;
    let client = self::client(&fake.url, Protocol::V1);
    let entry = entry(&client, "key").await;
    assert_eq!(part(&client, &entry, EVERYTHING).await.2, b"ok");

    let (url, connections) = raw(&[Behaviour::Close]).await;
    let client = self::client(&url, Protocol::V2);
    let error = client.find("key", &[]).await.unwrap_err();
    assert!(matches!(error, CacheError::Unavailable(_)), "{error:?}");
    assert_eq!(*connections.lock().unwrap(), 2);
    for protocol in BOTH {
        let before = *connections.lock().unwrap();
        let client = self::client(&url, protocol);
        let error = client.reserve("key", None).await.unwrap_err();
        assert!(matches!(error, CacheError::Unavailable(_)), "{error:?}");
        assert_eq!(*connections.lock().unwrap(), before + 1);
    }
}

#[tokio::test]
async fn an_answer_that_makes_no_sense_is_a_service_that_cannot_be_used() {
    let long = || json!({ "ok": false, "cacheId": 7, "more": "x".repeat(70_000) }).to_string();
    let answers: [(u16, String); 9] = [
        (200, String::new()),
        (200, "<html>".to_owned()),
        (200, "null".to_owned()),
        (200, json!({ "ok": true }).to_string()),
        (
            200,
            json!({ "ok": true, "signed_download_url": "x", "matched_key": "k" }).to_string(),
        ),
        (200, long()),
        (500, long()),
        (
            404,
            json!({ "code": "bad_route", "msg": "no such service" }).to_string(),
        ),
        (302, String::new()),
    ];
    for (status, body) in answers {
        let shown: String = body.chars().take(60).collect();
        let fake = Fake::start(move |_| {
            let status = StatusCode::from_u16(status).unwrap();
            (status, [("location", "/elsewhere")], body.clone()).into_response()
        })
        .await;
        for protocol in BOTH {
            let client = client(&fake.url, protocol);
            for error in [
                client.find("key", &[]).await.unwrap_err(),
                client.reserve("key", None).await.unwrap_err(),
            ] {
                let is_unavailable = matches!(error, CacheError::Unavailable(_));
                assert!(is_unavailable, "{protocol:?} {shown} {error:?}");
                assert!(error.is_passing());
                assert!(error.to_string().chars().count() < 300, "{error}");
            }
            assert_eq!(client.requests().failed, 2);
        }
    }
    let not_done = Fake::start(|_| axum::Json(json!({ "ok": false })).into_response()).await;
    let client = client(&not_done.url, Protocol::V2);
    let error = client.reserve("key", None).await.unwrap_err();
    assert!(matches!(error, CacheError::Unavailable(_)), "{error:?}");
}

#[tokio::test]
async fn a_refusal_is_understood_by_its_text_whatever_its_status() {
    for (status, message, taken) in [
        (200, "cache write denied: the token is read-only", false),
        (409, "cache write denied: the token is read-only", false),
        (200, "a cache entry with this key already exists", true),
        (400, "already exist", true),
    ] {
        for protocol in BOTH {
            if (status, protocol) == (200, Protocol::V1) {
                continue;
            }
            let fake = Fake::start(move |_| {
                let status = StatusCode::from_u16(status).unwrap();
                let body = json!({ "ok": false, "message": message });
                (status, axum::Json(body)).into_response()
            })
            .await;
            match client(&fake.url, protocol).reserve("key", None).await {
                Ok(Reservation::AlreadyExists) => assert!(taken),
                Err(CacheError::Denied(text)) => assert!(!taken && text.ends_with(message)),
                other => panic!("{status} {message} {other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn answers_in_camel_case_are_read_too() {
    let fake = Fake::start(|seen| {
        let url = seen.url("c/7?sig=s3cret");
        let answer = match seen.target.rsplit('/').next() {
            Some("CreateCacheEntry") => json!({ "ok": true, "signedUploadUrl": url }),
            _ => json!({ "ok": true, "signedDownloadUrl": url, "matchedKey": "key" }),
        };
        axum::Json(answer).into_response()
    })
    .await;
    let client = client(&fake.url, Protocol::V2);
    reserve(&client, "key").await;
    assert_eq!(entry(&client, "key").await.key, "key");
}

#[tokio::test]
async fn the_token_goes_to_the_service_and_nowhere_else() {
    for protocol in BOTH {
        // A service, a storage on another host, and one more that the storage sends readers to.
        let last = Fake::start(|_| "content".into_response()).await;
        let next = format!("{}last?sig=0ther", last.url);
        let storage = Fake::start(move |seen| match seen.method {
            Method::GET => (StatusCode::FOUND, [("location", next.clone())]).into_response(),
            _ => StatusCode::CREATED.into_response(),
        })
        .await;
        let content = format!("{}c/7?sig=s3cret", storage.url);
        let service = Fake::start(move |seen| {
            api(seen, &content).unwrap_or_else(|| StatusCode::NO_CONTENT.into_response())
        })
        .await;
        let client = client(&service.url, protocol);
        save(&client, "key", b"content").await;
        let found = entry(&client, "key").await;
        assert_eq!(part(&client, &found, EVERYTHING).await.2, b"content");

        let token = format!("Bearer {TOKEN}");
        let calls = service.seen();
        assert!(calls.len() >= 3);
        assert!(
            calls
                .iter()
                .all(|seen| seen.header("authorization") == Some(&token))
        );
        let uploads = usize::from(protocol == Protocol::V2);
        assert_eq!((storage.seen().len(), last.seen().len()), (1 + uploads, 1));
        for seen in storage.seen().iter().chain(&last.seen()) {
            assert!(!format!("{seen:?}").contains(TOKEN), "{seen:?}");
            assert_eq!(seen.header("referer"), None);
        }
        assert_eq!(last.seen()[0].header("range"), Some("bytes=0-"));
    }
}

#[tokio::test]
async fn a_call_follows_no_redirect_and_a_download_not_endlessly() {
    let other = Fake::start(|_| axum::Json(json!({ "ok": false })).into_response()).await;
    let location = other.url.clone();
    let fake = Fake::start(move |_| {
        (
            StatusCode::TEMPORARY_REDIRECT,
            [("location", location.clone())],
        )
            .into_response()
    })
    .await;
    for protocol in BOTH {
        let client = client(&fake.url, protocol);
        client.find("key", &[]).await.unwrap_err();
        client.reserve("key", None).await.unwrap_err();
    }
    assert_eq!(other.seen().len(), 0);

    let endless = fake_content(|seen| {
        (
            StatusCode::FOUND,
            [("location", seen.url("c/7?sig=s3cret"))],
        )
            .into_response()
    })
    .await;
    let client = client(&endless.url, Protocol::V2);
    let found = entry(&client, "key").await;
    let error = client.download(&found, EVERYTHING).await.unwrap_err();
    assert!(matches!(error, CacheError::Unavailable(_)), "{error:?}");
    assert!(endless.seen().len() < 10);
}

#[tokio::test]
async fn what_is_shown_holds_no_secret() {
    // A server that repeats all it was told.
    let echo = |seen: &Seen| {
        let told = format!("{seen:?} {}", seen.url(&seen.target));
        (StatusCode::BAD_REQUEST, told).into_response()
    };
    for protocol in BOTH {
        let content = fake_content(echo).await;
        let everything = Fake::start(echo).await;
        let good = client(&content.url, protocol);
        let found = entry(&good, "key").await;
        let upload = reserve(&good, "key").await;
        let bad = client(&everything.url, protocol);
        let unreachable = client("http://127.0.0.1:9/", protocol);
        let mut shown = format!("{found:?} {upload:?} {good:?}");
        for error in [
            good.download(&found, EVERYTHING).await.unwrap_err(),
            good.upload(&upload, 1, body_of(b"x")).await.unwrap_err(),
            bad.find("key", &[]).await.unwrap_err(),
            bad.reserve("key", None).await.unwrap_err(),
            bad.commit(upload, 1).await.unwrap_err(),
            unreachable.find("key", &[]).await.unwrap_err(),
            unreachable.download(&found, EVERYTHING).await.unwrap_err(),
        ] {
            shown = format!("{shown}\n{error} {error:?}");
        }
        assert!(
            !shown.contains(TOKEN) && !shown.contains("s3cret"),
            "{shown}"
        );
        assert!(
            shown.contains("127.0.0.1") && shown.contains("400 Bad Request"),
            "{shown}"
        );
    }
}

/// Marks a process as the test below.
const BEHIND_PROXY: &str = "CACHE_CLIENT_TEST_BEHIND_PROXY";

#[tokio::test]
async fn a_service_on_this_machine_is_not_asked_through_a_proxy() {
    if std::env::var_os(BEHIND_PROXY).is_some() {
        let folder = tempfile::tempdir().unwrap();
        let service = embedded(folder.path(), true).await;
        let client = self::client(&service.url(), Protocol::V2);
        save(&client, "key", b"content").await;
        let found = entry(&client, "key").await;
        assert_eq!(part(&client, &found, EVERYTHING).await.2, b"content");
        // Others go to the proxy, which nobody runs, so this is an error of the proxy.
        let other = self::client("http://results.example/", Protocol::V2);
        let error = other.find("key", &[]).await.unwrap_err().to_string();
        assert!(error.contains("Connection refused"), "{error}");
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "cache_client::a_service_on_this_machine_is_not_asked_through_a_proxy",
        ])
        .env(BEHIND_PROXY, "1")
        .env("HTTP_PROXY", "http://127.0.0.1:9")
        .env("http_proxy", "http://127.0.0.1:9")
        .env_remove("NO_PROXY")
        .env_remove("no_proxy")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}
