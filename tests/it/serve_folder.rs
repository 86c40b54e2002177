//! The cache service as a process of ours: its folder, its restarts, its end. The conformance suite
//! has the behaviours that clients may expect.

use crate::support::tools;
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::conformance::target::{Target, Who, noise};
use sccache_action::cache_protocol;
use sccache_action::http::BearerToken;
use sccache_action::serve::server::{self, ClientTimeouts, RunningServer, ServerConfig};

/// A service on a store in this folder.
async fn start(folder: &Path) -> (RunningServer, Target) {
    let (token, tokens) = cache_protocol::single_token("refs/heads/main").unwrap();
    let config = ServerConfig::on_loopback(folder, tokens);
    let running = server::start(config).await.unwrap();
    let target = at(&running, &token);
    (running, target)
}

fn at(running: &RunningServer, token: &BearerToken) -> Target {
    let token = token.reveal().to_owned();
    Target::new(vec![running.url()], HashMap::from([(Who::Default, token)]))
}

#[tokio::test]
async fn entries_and_urls_outlive_a_restart() {
    let store = tempfile::tempdir().unwrap();
    let (running, before) = start(store.path()).await;
    let cache = before.cache();
    cache.save("k", "content").await;
    let old = cache.locate("k").await;
    let version = cache.version.clone();
    drop(before);
    running.shutdown().await.unwrap();

    let (_running, after) = start(store.path()).await;
    let mut cache = after.cache();
    cache.version = version;
    assert_eq!(cache.load("k").await, "content");
    let (path, query) = old.split_once('?').unwrap();
    let (_, path) = path.split_once("/entries/").unwrap();
    let old = format!("{}entries/{path}?{query}", after.url());
    assert_eq!(after.get(&old).await.expect(200).text(), "content");
}

#[tokio::test]
async fn an_entry_whose_content_vanished_is_a_miss() {
    let store = tempfile::tempdir().unwrap();
    let (_running, target) = start(store.path()).await;
    let cache = target.cache();
    cache.save("k", noise(300_000)).await;
    let url = cache.locate("k").await;
    fs::remove_dir_all(store.path().join("blobs")).unwrap();
    target.get(&url).await.expect(404);
    assert_eq!(cache.matched(&["k"]).await, None);
    cache.save("k", "again").await;
}

/// All files in this folder and those below it.
fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    let mut left = vec![folder.to_owned()];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else {
            files.push(path);
        }
    }
    files
}

#[tokio::test]
async fn an_entry_whose_content_was_cut_off_or_changed_is_a_miss_and_is_saved_again() {
    let store = tempfile::tempdir().unwrap();
    let (_running, target) = start(store.path()).await;
    let cache = target.cache();
    let changes: [fn(&mut Vec<u8>); 4] = [
        |bytes| bytes.clear(),
        |bytes| bytes.truncate(bytes.len() - 1),
        |bytes| bytes[0] ^= 1,
        |bytes| *bytes.last_mut().unwrap() ^= 1,
    ];
    for change in changes {
        for size in [300_000, 500_000, 900_000] {
            cache.save("k", noise(size)).await;
            let url = cache.locate("k").await;
            for file in files(&store.path().join("blobs")) {
                let mut bytes = fs::read(&file).unwrap();
                if bytes.len() == size {
                    change(&mut bytes);
                    fs::write(&file, bytes).unwrap();
                }
            }
            target.get(&url).await.expect(404);
            assert_eq!(cache.matched(&["k"]).await, None);
            cache.save("k", noise(size)).await;
            let url = cache.locate("k").await;
            assert!(target.get(&url).await.expect(200).body == noise(size));
            for file in files(&store.path().join("blobs")) {
                fs::remove_file(file).unwrap();
            }
            target.get(&url).await.expect(404);
        }
    }
}

#[tokio::test]
async fn blocks_with_names_that_look_like_paths_stay_where_they_belong() {
    let store = tempfile::tempdir().unwrap();
    let (_running, target) = start(store.path()).await;
    let url = target.cache().reserve("k").await;
    for name in ["../../journal", "../../../outside", "/etc/x"] {
        target
            .put_block(&url, name, noise(70_000))
            .await
            .expect(201);
    }
    let names = |folder: &Path| -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(
        names(store.path()),
        [
            "blobs",
            "catalog.sqlite",
            "catalog.sqlite-shm",
            "catalog.sqlite-wal",
            "contents",
            "lock",
            "reserve"
        ]
    );
    // The store's own folder, and below it one for each of some numbers.
    let stores = names(&store.path().join("blobs"));
    assert_eq!(stores.len(), 1);
    let shards = names(&store.path().join("blobs").join(&stores[0]));
    assert!(shards.iter().all(|shard| shard.len() == 2), "{shards:?}");
}

#[tokio::test]
async fn what_is_asked_is_counted() {
    let store = tempfile::tempdir().unwrap();
    let (running, target) = start(store.path()).await;
    let cache = target.cache();
    cache.save("k", "content").await;
    cache.create("k").await.expect(409);
    // Two look-ups, one in each version of the protocol.
    let url = cache.locate("k").await;
    target.get(&url).await.expect(200);
    cache.look_up(&["x"]).await.expect(200);
    cache.with_token("wrong").look_up(&["k"]).await.expect(401);
    target.get(url.split_once('?').unwrap().0).await.expect(403);
    let expected = cache_protocol::Snapshot {
        lookups: 3,
        hits: 2,
        reservations: 2,
        conflicts: 1,
        commits: 1,
        uploads: 1,
        downloads: 1,
        refused: 2,
        version_1: 1,
        bytes_in: 7,
        bytes_out: 7,
    };
    assert_eq!(running.counters(), expected);
}

#[tokio::test]
async fn a_shutdown_lets_a_download_finish() {
    let store = tempfile::tempdir().unwrap();
    let (running, target) = start(store.path()).await;
    let content = noise(8 << 20);
    let cache = target.cache();
    cache.save("k", content.clone()).await;
    let url = cache.locate("k").await;
    let mut answer = target
        .content(reqwest::Method::GET, &url)
        .send()
        .await
        .unwrap();
    let mut received = answer.chunk().await.unwrap().unwrap().to_vec();
    let shutdown = tokio::spawn(running.shutdown());
    while let Some(piece) = answer.chunk().await.unwrap() {
        received.extend_from_slice(&piece);
    }
    assert!(received == content);
    // A connection that is kept open for later must not keep the service.
    drop((answer, target));
    shutdown.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_folder_that_is_in_use_is_named() {
    let store = tempfile::tempdir().unwrap();
    let (running, _target) = start(store.path()).await;
    let (_, tokens) = cache_protocol::single_token("s").unwrap();
    let config = ServerConfig::on_loopback(store.path(), tokens);
    let error = server::start(config).await.unwrap_err().to_string();
    let folder = store.path().display().to_string();
    assert!(error.contains(&folder), "{error}");
    running.shutdown().await.unwrap();
}

#[test]
fn debians_sccache_has_no_such_storage_and_says_so() {
    let home = tempfile::tempdir().unwrap();
    let port = sccache_action::sccache::server::free_port().unwrap();
    let output = Command::new(tools::sccache("debian"))
        .arg("--start-server")
        .env_clear()
        .env("HOME", home.path())
        .env("SCCACHE_SERVER_PORT", port.to_string())
        .env("SCCACHE_GHA_ENABLED", "on")
        .output()
        .unwrap();
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("cache type is not enabled"), "{stderr}");
}

/// A service with little patience.
async fn start_impatient(folder: &Path, patience: ClientTimeouts) -> (RunningServer, Target) {
    let (token, tokens) = cache_protocol::single_token("refs/heads/main").unwrap();
    let config = ServerConfig {
        patience,
        ..ServerConfig::on_loopback(folder, tokens)
    };
    let running = server::start(config).await.unwrap();
    let target = at(&running, &token);
    (running, target)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_on_which_nothing_moves_is_closed() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let store = tempfile::tempdir().unwrap();
    let patience = ClientTimeouts {
        silence: Duration::from_millis(500),
        ..ClientTimeouts::default()
    };
    let (running, target) = start_impatient(store.path(), patience).await;
    let cache = target.cache();
    let path = |url: &str| format!("/{}", url.splitn(4, '/').nth(3).unwrap());
    let upload = path(&cache.reserve("half").await);
    for request in [
        // A client that sends nothing, half a head, half a body of either kind.
        String::new(),
        "GET /health HTTP/1.1\r\nHost: x\r\n".to_owned(),
        format!(
            "PUT {upload} HTTP/1.1\r\nHost: x\r\nx-ms-blob-type: BlockBlob\r\nContent-Length: 9\r\n\r\nhalf"
        ),
        format!(
            "POST /_apis/artifactcache/caches HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: 9\r\n\r\n{{",
            target.token(Who::Default)
        ),
    ] {
        let mut stream = tokio::net::TcpStream::connect(running.address())
            .await
            .unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // Closed, with or without a word.
        let _ = stream.read_to_end(&mut answer).await;
        assert!(!answer.starts_with(b"HTTP/1.1 2"), "{request}");
    }
    // A client that sends requests now and then is served.
    cache.look_up(&["k"]).await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_has_as_many_connections_as_it_may() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let store = tempfile::tempdir().unwrap();
    let (_, tokens) = cache_protocol::single_token("refs/heads/main").unwrap();
    let config = ServerConfig {
        connections: Some(3),
        ..ServerConfig::on_loopback(store.path(), tokens)
    };
    let running = server::start(config).await.unwrap();
    let health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n";
    // Whether it is answered; the connection stays open then.
    let ask = async || {
        let mut stream = tokio::net::TcpStream::connect(running.address())
            .await
            .ok()?;
        stream.write_all(health).await.ok()?;
        let mut begin = [0; 12];
        stream.read_exact(&mut begin).await.ok()?;
        assert_eq!(&begin, b"HTTP/1.1 200");
        Some(stream)
    };
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(ask().await.unwrap());
    }
    assert!(ask().await.is_none());
    open.pop();
    // The service notices that later.
    while ask().await.is_none() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_too_slow_for_a_shutdown_is_no_failure() {
    use tokio::io::AsyncWriteExt;
    let store = tempfile::tempdir().unwrap();
    let patience = ClientTimeouts {
        drain: Duration::from_millis(200),
        ..ClientTimeouts::default()
    };
    let (running, target) = start_impatient(store.path(), patience).await;
    let mut stream = tokio::net::TcpStream::connect(running.address())
        .await
        .unwrap();
    let head = b"GET /health HTTP/1.1\r\nHost: x\r\n";
    stream.write_all(head).await.unwrap();
    target.cache().look_up(&["k"]).await.expect(200);
    running.shutdown().await.unwrap();
}

#[tokio::test]
async fn numbers_at_the_end_of_their_range_change_nothing() {
    let store = tempfile::tempdir().unwrap();
    let (_running, target) = start(store.path()).await;
    let cache = target.cache();
    for number in [u64::MAX, i64::MAX as u64, 1 << 63] {
        cache.patch(number, "bytes 0-2/*", "one").await.expect(404);
        cache.commit(number, 3).await.expect(404);
        cache.create_v1("k", Some(number)).await.expect(400);
    }
    let upload = cache.reserve_v1("k").await;
    for range in [
        "bytes 18446744073709551613-18446744073709551615/*",
        "bytes 18446744073709551612-18446744073709551614/*",
        "bytes 9223372036854775805-9223372036854775807/*",
        "bytes 0-18446744073709551615/*",
    ] {
        cache.patch(upload, range, "one").await.expect(400);
    }
    cache.patch(upload, "bytes 0-2/*", "one").await.expect(204);
    for size in [usize::MAX, i64::MAX as usize, 4] {
        cache.commit(upload, size).await.expect(400);
    }
    cache.commit(upload, 3).await.expect(204);
    let url = cache.locate("k").await;
    for (range, status) in [
        ("bytes=18446744073709551614-18446744073709551615", 416),
        ("bytes=9223372036854775807-", 416),
        ("bytes=-18446744073709551615", 206),
        ("bytes=0-18446744073709551615", 206),
    ] {
        let asked = target
            .content(reqwest::Method::GET, &url)
            .header("range", range);
        let answer = crate::conformance::target::send(asked).await;
        answer.expect(status);
    }
    assert_eq!(cache.load("k").await, "one");
}
