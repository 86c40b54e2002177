//! The cache service as a process of ours: its folder, its restarts, its end. What clients may
//! expect of it is in the conformance suite.

use crate::support::tools;
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::conformance::target::{Target, Who, noise};
use sccache_action::service::auth::BearerToken;
use sccache_action::service::{self, Config, Running};

/// A service on a store in this folder.
async fn start(folder: &Path) -> (Running, Target) {
    let (token, tokens) = service::single_token("refs/heads/main").unwrap();
    let config = Config::on_loopback(folder, tokens);
    let running = service::start(config).await.unwrap();
    let target = at(&running, &token);
    (running, target)
}

fn at(running: &Running, token: &BearerToken) -> Target {
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
    cache.save("k", "content").await;
    let url = cache.locate("k").await;
    fs::remove_dir_all(store.path().join("blobs")).unwrap();
    target.get(&url).await.expect(404);
    assert_eq!(cache.matched(&["k"]).await, None);
    cache.save("k", "again").await;
}

#[tokio::test]
async fn blocks_with_names_that_look_like_paths_stay_where_they_belong() {
    let store = tempfile::tempdir().unwrap();
    let (_running, target) = start(store.path()).await;
    let url = target.cache().reserve("k").await;
    for name in ["../../journal", "../../../outside", "/etc/x"] {
        target.put_block(&url, name, "part").await.expect(201);
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
            "lock"
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
    let expected = service::Snapshot {
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
    let (_, tokens) = service::single_token("s").unwrap();
    let config = Config::on_loopback(store.path(), tokens);
    let error = service::start(config).await.unwrap_err().to_string();
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
