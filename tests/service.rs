//! The cache service, asked by its real clients and by raw requests: sccache of every protocol
//! version, `@actions/cache`, and clients that misbehave.

#![allow(clippy::unwrap_used)]

#[path = "support/tools.rs"]
mod tools;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use sccache_action::http_client::Timeouts;
use sccache_action::service::auth::{Access, BearerToken, Tokens};
use sccache_action::service::{self, Config, Running, Snapshot};
use serde_json::{Value, json};

const V2: &str = "twirp/github.actions.results.api.v1.CacheService";

/// A service, and a client with its token.
struct Service {
    running: Running,
    url: String,
    token: String,
    client: reqwest::Client,
}

impl Service {
    async fn start(folder: &Path) -> Self {
        let (token, tokens) = service::single_token("refs/heads/main").unwrap();
        Self::with_tokens(folder, token.reveal(), tokens).await
    }

    async fn with_tokens(folder: &Path, token: &str, tokens: Tokens) -> Self {
        let config = Config::on_loopback(folder.to_owned(), tokens);
        let running = service::start(config).await.unwrap();
        Self {
            url: running.url(),
            token: token.to_owned(),
            client: sccache_action::http_client::build(Timeouts::default()).unwrap(),
            running,
        }
    }

    fn counters(&self) -> Snapshot {
        self.running.counters()
    }

    async fn stop(self) {
        self.running.shutdown().await.unwrap();
    }

    /// A call of version 2 in JSON, with this token.
    async fn call_as(&self, token: &str, method: &str, body: Value) -> (StatusCode, Value) {
        let answer = self
            .client
            .post(format!("{}{V2}/{method}", self.url))
            .bearer_auth(token)
            .header("content-type", "application/json")
            .body(body.to_string())
            .send()
            .await
            .unwrap();
        let status = answer.status();
        let body = answer.bytes().await.unwrap();
        (status, serde_json::from_slice(&body).unwrap())
    }

    async fn call(&self, method: &str, body: Value) -> (StatusCode, Value) {
        self.call_as(&self.token, method, body).await
    }

    async fn put(&self, url: &str, body: impl Into<reqwest::Body>) -> StatusCode {
        let request = self.client.put(url).header("x-ms-blob-type", "BlockBlob");
        request.body(body).send().await.unwrap().status()
    }

    /// Saves an entry through version 2.
    async fn save(&self, key: &str, content: &[u8]) {
        let name = json!({ "key": key, "version": "v" });
        let (status, created) = self.call("CreateCacheEntry", name).await;
        assert_eq!(status, StatusCode::OK, "{created}");
        let url = created["signed_upload_url"].as_str().unwrap();
        assert_eq!(self.put(url, content.to_vec()).await, StatusCode::CREATED);
        let (status, done) = self.finalize(key, content.len()).await;
        assert_eq!(status, StatusCode::OK, "{done}");
        assert_eq!(done["ok"], true);
    }

    async fn finalize(&self, key: &str, size: usize) -> (StatusCode, Value) {
        let name = json!({ "key": key, "version": "v", "size_bytes": size.to_string() });
        self.call("FinalizeCacheEntryUpload", name).await
    }

    async fn find(&self, key: &str) -> Option<String> {
        self.find_as(&self.token, key).await
    }

    /// The URL of the entry, or `None` for a miss.
    async fn find_as(&self, token: &str, key: &str) -> Option<String> {
        let body = json!({ "key": key, "restore_keys": [], "version": "v" });
        let (status, found) = self.call_as(token, "GetCacheEntryDownloadURL", body).await;
        assert_eq!(status, StatusCode::OK, "{found}");
        let url = found["signed_download_url"].as_str().unwrap();
        assert_eq!(found["ok"].as_bool(), Some(!url.is_empty()));
        (!url.is_empty()).then(|| url.to_owned())
    }

    async fn get(&self, url: &str, range: Option<&str>) -> (StatusCode, String, Vec<u8>) {
        let mut request = self.client.get(url);
        if let Some(range) = range {
            request = request.header("range", range);
        }
        let answer = request.send().await.unwrap();
        let range = answer.headers().get("content-range");
        let range = range.map_or("", |value| value.to_str().unwrap()).to_owned();
        (
            answer.status(),
            range,
            answer.bytes().await.unwrap().to_vec(),
        )
    }
}

/// An sccache server that is stopped when this is dropped.
struct Sccache {
    binary: std::path::PathBuf,
    home: tempfile::TempDir,
    environment: Vec<(String, String)>,
}

impl Sccache {
    fn new(version: &str, environment: &[(&str, &str)]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let port = sccache_action::sccache::server::free_port().unwrap();
        let mut all: Vec<(String, String)> = environment
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        for (name, value) in [
            ("PATH", std::env::var("PATH").unwrap()),
            ("HOME", home.path().display().to_string()),
            ("SCCACHE_SERVER_PORT", port.to_string()),
            ("SCCACHE_IDLE_TIMEOUT", "0".to_owned()),
            ("SCCACHE_GHA_ENABLED", "on".to_owned()),
            ("NO_PROXY", "127.0.0.1".to_owned()),
        ] {
            all.push((name.to_owned(), value));
        }
        Self {
            binary: tools::sccache(version),
            home,
            environment: all,
        }
    }

    fn call(&self, arguments: &[&str]) -> Output {
        Command::new(&self.binary)
            .args(arguments)
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(self.home.path())
            .output()
            .unwrap()
    }

    #[track_caller]
    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.call(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn stats(&self) -> Value {
        let json = self.succeed(&["--show-stats", "--stats-format", "json"]);
        serde_json::from_str::<Value>(&json).unwrap()["stats"].take()
    }
}

impl Drop for Sccache {
    fn drop(&mut self) {
        self.call(&["--stop-server"]);
    }
}

const OBJECTS: u64 = 8;

/// Compiles eight files cold and warm, each with a server of its own, and asserts that the second
/// has all of them from the service.
async fn cold_then_warm(version: &str, service: &Service, environment: &[(&str, &str)]) {
    let mut all = vec![
        ("ACTIONS_RESULTS_URL", service.url.as_str()),
        ("ACTIONS_RUNTIME_TOKEN", service.token.as_str()),
    ];
    all.extend(environment);
    for (job, hits) in [("cold", 0), ("warm", OBJECTS)] {
        let sccache = Sccache::new(version, &all);
        // Blocking calls leave this thread's runtime to the service's own threads.
        tokio::task::block_in_place(|| {
            sccache.succeed(&["--start-server"]);
            for i in 0..OBJECTS {
                // The version is in the source: entries of one must not answer another.
                let source = format!("int f{i}(void) {{ return {i}; }} /* {version} */\n");
                fs::write(sccache.home.path().join("a.c"), source).unwrap();
                sccache.succeed(&["gcc", "-c", "a.c", "-o", "a.o"]);
            }
            let begin = Instant::now();
            loop {
                let stats = sccache.stats();
                let count = |name: &str| {
                    let counts = stats[name]["counts"].as_object().unwrap();
                    counts.values().filter_map(Value::as_u64).sum::<u64>()
                };
                assert_eq!(count("cache_hits"), hits, "{version} {job} {stats}");
                assert_eq!(count("cache_errors"), 0, "{version} {job} {stats}");
                assert_eq!(stats["cache_write_errors"], 0, "{version} {job} {stats}");
                // sccache has no event for a write that is done.
                if stats["cache_writes"] == OBJECTS - hits {
                    break;
                }
                assert!(
                    begin.elapsed() < Duration::from_secs(20),
                    "{version} {stats}"
                );
                std::thread::sleep(Duration::from_millis(20));
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sccaches_that_speak_version_2_find_what_they_stored() {
    for version in ["0.16.0", "0.15.0", "0.14.0", "0.10.0"] {
        let store = tempfile::tempdir().unwrap();
        let service = Service::start(store.path()).await;
        cold_then_warm(version, &service, &[("ACTIONS_CACHE_SERVICE_V2", "on")]).await;
        let counters = service.counters();
        assert_eq!(counters.version_1, 0, "{version} {counters:?}");
        assert!(counters.hits >= OBJECTS, "{version} {counters:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sccaches_that_speak_version_1_find_what_they_stored() {
    for version in ["0.9.1", "0.8.2", "0.7.7", "0.5.3", "0.4.0"] {
        let store = tempfile::tempdir().unwrap();
        let service = Service::start(store.path()).await;
        cold_then_warm(version, &service, &[("ACTIONS_CACHE_URL", &service.url)]).await;
        let counters = service.counters();
        assert!(counters.version_1 > 2 * OBJECTS, "{version} {counters:?}");
        assert!(counters.hits >= OBJECTS, "{version} {counters:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_sccache_speaks_version_1_where_the_server_is_not_githubs() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let environment = [
        ("GITHUB_SERVER_URL", "https://ghes.example"),
        ("ACTIONS_CACHE_SERVICE_V2", "on"),
        ("ACTIONS_CACHE_URL", &service.url),
    ];
    cold_then_warm("0.16.0", &service, &environment).await;
    assert!(service.counters().version_1 > 2 * OBJECTS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn debians_sccache_has_no_such_storage_and_says_so() {
    let sccache = Sccache::new("debian", &[]);
    let output = sccache.call(&["--start-server"]);
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("cache type is not enabled"), "{stderr}");
}

/// What a step has that uses `@actions/cache`.
struct Toolkit {
    folder: tempfile::TempDir,
    environment: Vec<(&'static str, String)>,
}

impl Toolkit {
    fn new(service: &Service, server_url: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["workspace", "temporary"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let path = |name: &str| folder.path().join(name).display().to_string();
        let environment = vec![
            ("PATH", std::env::var("PATH").unwrap()),
            ("HOME", path("temporary")),
            ("RUNNER_TEMP", path("temporary")),
            ("GITHUB_WORKSPACE", path("workspace")),
            ("GITHUB_SERVER_URL", server_url.to_owned()),
            ("ACTIONS_CACHE_SERVICE_V2", "1".to_owned()),
            ("NO_PROXY", "127.0.0.1".to_owned()),
        ];
        let mut toolkit = Self {
            folder,
            environment,
        };
        toolkit.point_to(service);
        toolkit
    }

    /// From here on asks this service.
    fn point_to(&mut self, service: &Service) {
        self.environment.extend([
            ("ACTIONS_RESULTS_URL", service.url.clone()),
            ("ACTIONS_CACHE_URL", service.url.clone()),
            ("ACTIONS_RUNTIME_TOKEN", service.token.clone()),
        ]);
    }

    fn file(&self) -> std::path::PathBuf {
        self.folder.path().join("workspace/data/file")
    }

    fn write(&self, content: &[u8]) {
        fs::create_dir_all(self.file().parent().unwrap()).unwrap();
        fs::write(self.file(), content).unwrap();
    }

    async fn run(&self, command: &str, keys: &str) -> String {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/actions_cache.mjs");
        let output = tokio::process::Command::new("node")
            .arg(script)
            .arg(tools::npm())
            .args([command, keys, "data"])
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(self.folder.path().join("workspace"))
            .output()
            .await
            .unwrap();
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{text}");
        text
    }

    async fn restored(&self, keys: &str) -> Option<Vec<u8>> {
        let _ = fs::remove_dir_all(self.file().parent().unwrap());
        let text = self.run("restore", keys).await;
        if text.contains("restored none") {
            return None;
        }
        assert!(text.contains("restored "), "{text}");
        Some(fs::read(self.file()).unwrap())
    }
}

/// Bytes that no compression makes smaller.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_toolkit_saves_and_restores_also_after_a_restart() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let mut toolkit = Toolkit::new(&service, "https://github.com");
    toolkit.write(b"content");
    let saved = toolkit.run("save", "linux-1").await;
    assert!(
        saved.contains("saved ") && !saved.contains("saved -1"),
        "{saved}"
    );
    assert_eq!(
        toolkit.restored("linux-1").await.as_deref(),
        Some(&b"content"[..])
    );
    assert_eq!(
        toolkit.restored("linux-2,linux-").await.as_deref(),
        Some(&b"content"[..])
    );
    assert_eq!(toolkit.restored("windows-1").await, None);
    assert_eq!(service.counters().version_1, 0);

    // The second job with the same key keeps the first one's entry and goes on.
    toolkit.write(b"other");
    toolkit.run("save", "linux-1").await;
    assert_eq!(
        toolkit.restored("linux-1").await.as_deref(),
        Some(&b"content"[..])
    );
    assert_eq!(service.counters().conflicts, 1);

    service.stop().await;
    let service = Service::start(store.path()).await;
    toolkit.point_to(&service);
    assert_eq!(
        toolkit.restored("linux-1").await.as_deref(),
        Some(&b"content"[..])
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_toolkit_saves_and_restores_an_entry_of_many_blocks() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let content = noise(150 << 20);
    for (server, uploads) in [("https://github.com", 3), ("https://ghes.example", 4)] {
        let toolkit = Toolkit::new(&service, server);
        toolkit.write(&content);
        let before = service.counters();
        toolkit.run("save", &format!("large-{uploads}")).await;
        let asked = service.counters().since(&before);
        assert!(asked.uploads >= uploads, "{asked:?}");
        assert_eq!(asked.commits, 1);
        let restored = toolkit.restored(&format!("large-{uploads}")).await.unwrap();
        assert!(restored == content);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_toolkit_speaks_version_1_where_the_server_is_not_githubs() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let toolkit = Toolkit::new(&service, "https://ghes.example");
    toolkit.write(b"content");
    toolkit.run("save", "linux-1").await;
    assert_eq!(
        toolkit.restored("linux-1").await.as_deref(),
        Some(&b"content"[..])
    );
    assert_eq!(
        toolkit.restored("x,linux-").await.as_deref(),
        Some(&b"content"[..])
    );
    assert_eq!(toolkit.restored("windows-1").await, None);
    toolkit.write(b"other");
    toolkit.run("save", "linux-1").await;
    assert_eq!(
        toolkit.restored("linux-1").await.as_deref(),
        Some(&b"content"[..])
    );
    assert!(service.counters().version_1 > 5);
}

#[tokio::test]
async fn nobody_gets_in_without_the_token() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let name = json!({ "key": "k", "version": "v" });
    for method in [
        "CreateCacheEntry",
        "FinalizeCacheEntryUpload",
        "GetCacheEntryDownloadURL",
    ] {
        for token in ["wrong", "", &service.token[1..]] {
            let (status, error) = service.call_as(token, method, name.clone()).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED);
            assert_eq!(error["code"], "unauthenticated");
        }
    }
    let v1 = format!("{}_apis/artifactcache/", service.url);
    for (method, path) in [
        (Method::GET, "cache?keys=k&version=v"),
        (Method::POST, "caches"),
        (Method::PATCH, "caches/1"),
        (Method::POST, "caches/1"),
    ] {
        let request = service
            .client
            .request(method.clone(), format!("{v1}{path}"));
        let request = request
            .bearer_auth("wrong")
            .header("content-type", "application/json")
            .body(json!({ "key": "k", "version": "v", "size": 1 }).to_string());
        let status = request.send().await.unwrap().status();
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{method} {path}");
    }
    assert!(service.counters().refused >= 13);
}

#[tokio::test]
async fn a_signed_url_opens_its_own_content_in_its_own_way_only() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    service.save("a", b"one").await;
    service.save("b", b"two").await;
    let (a, b) = (
        service.find("a").await.unwrap(),
        service.find("b").await.unwrap(),
    );
    let query = |url: &str| url.split_once('?').unwrap().1.to_owned();
    let path = |url: &str| url.split_once('?').unwrap().0.to_owned();
    let name = json!({ "key": "c", "version": "v" });
    let (_, created) = service.call("CreateCacheEntry", name).await;
    let upload = created["signed_upload_url"].as_str().unwrap().to_owned();
    let longer = query(&a).replacen("se=", "se=9", 1);
    for url in [
        format!("{}?{}", path(&a), query(&b)),
        format!("{}?{longer}", path(&a)),
        format!("{}?se=1&sig=00", path(&a)),
        path(&a),
        upload.replace("/uploads/", "/entries/"),
    ] {
        let (status, _, body) = service.get(&url, None).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{url}");
        assert!(!String::from_utf8_lossy(&body).contains("one"));
    }
    for url in [a.clone(), a.replace("/entries/", "/uploads/")] {
        assert!(service.put(&url, "x").await.is_client_error(), "{url}");
    }
    assert_eq!(
        service.get(&upload, None).await.0,
        StatusCode::METHOD_NOT_ALLOWED
    );
    assert_eq!(service.get(&a, None).await.2, b"one");
}

#[tokio::test]
async fn what_cannot_be_understood_is_refused_in_twirps_words() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let call = async |path: &str, content_type: &str, body: &'static [u8]| {
        let answer = service
            .client
            .post(format!("{}{path}", service.url))
            .bearer_auth(&service.token)
            .header("content-type", content_type)
            .body(body)
            .send()
            .await
            .unwrap();
        let status = answer.status();
        let body = answer.bytes().await.unwrap();
        let error: Value = serde_json::from_slice(&body).unwrap_or_default();
        (
            status.as_u16(),
            error["code"].as_str().unwrap_or_default().to_owned(),
        )
    };
    let get = format!("{V2}/GetCacheEntryDownloadURL");
    let malformed = (400, "malformed".to_owned());
    assert_eq!(
        call(&get, "application/json", b"{\"key\":").await,
        malformed
    );
    assert_eq!(call(&get, "application/json", b"[1]").await, malformed);
    assert_eq!(
        call(&get, "application/protobuf", b"\x12\xff").await,
        malformed
    );
    let bad_route = (404, "bad_route".to_owned());
    assert_eq!(call(&get, "text/plain", b"{}").await, bad_route);
    assert_eq!(
        call(&format!("{V2}/Delete"), "application/json", b"{}").await,
        bad_route
    );
    assert_eq!(
        call("twirp/other/Get", "application/json", b"{}").await,
        bad_route
    );
    let (status, error) = service.call("GetCacheEntryDownloadURL", json!({})).await;
    assert_eq!(
        (status.as_u16(), error["code"].as_str()),
        (400, Some("invalid_argument"))
    );
}

#[tokio::test]
async fn keys_have_githubs_limits() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    for (key, accepted) in [
        ("k".repeat(512), true),
        ("k".repeat(513), false),
        ("a,b".to_owned(), false),
        ("../../etc/passwd".to_owned(), true),
    ] {
        let body = json!({ "key": key, "version": "v" });
        let (status, _) = service.call("CreateCacheEntry", body).await;
        assert_eq!(status.is_success(), accepted, "{key}");
    }
    for (restore_keys, accepted) in [(9, true), (10, false)] {
        let body = json!({ "key": "k", "restoreKeys": vec!["r"; restore_keys], "version": "v" });
        let (status, _) = service.call("GetCacheEntryDownloadURL", body).await;
        assert_eq!(status.is_success(), accepted, "{restore_keys}");
    }
}

#[tokio::test]
async fn any_part_of_an_entry_can_be_read() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let content = noise(1 << 20);
    service.save("large", &content).await;
    service.save("empty", b"").await;
    let url = service.find("large").await.unwrap();
    let end = content.len() - 1;
    for (range, first, last) in [
        ("bytes=0-0".to_owned(), 0, 0),
        ("bytes=5-1000".to_owned(), 5, 1000),
        (format!("bytes={end}-"), end, end),
        ("bytes=-7".to_owned(), end - 6, end),
        (format!("bytes=300000-{}", end + 10), 300_000, end),
    ] {
        let (status, shown, body) = service.get(&url, Some(&range)).await;
        assert_eq!(status, StatusCode::PARTIAL_CONTENT, "{range}");
        assert_eq!(shown, format!("bytes {first}-{last}/{}", content.len()));
        assert!(body == content[first..=last], "{range}");
    }
    let (status, shown, _) = service.get(&url, Some("bytes=1048576-")).await;
    assert_eq!(status, StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(shown, "bytes */1048576");
    let (status, _, body) = service.get(&url, Some("bytes=0-1,5-6")).await;
    assert!(status == StatusCode::OK && body == content);
    let head = service.client.head(&url).send().await.unwrap();
    assert_eq!(head.headers()["content-length"], "1048576");

    let url = service.find("empty").await.unwrap();
    assert_eq!(service.get(&url, None).await.2, b"");
    let (status, ..) = service.get(&url, Some("bytes=0-0")).await;
    assert_eq!(status, StatusCode::RANGE_NOT_SATISFIABLE);
}

#[tokio::test]
async fn an_entry_never_changes_and_its_name_is_given_once() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let name = json!({ "key": "k", "version": "v" });
    let calls = (0..50).map(|_| service.call("CreateCacheEntry", name.clone()));
    let answers = futures_util::future::join_all(calls).await;
    let granted: Vec<&Value> = answers
        .iter()
        .filter(|(status, _)| status.is_success())
        .map(|(_, body)| body)
        .collect();
    assert_eq!(granted.len(), 1);
    for (status, error) in answers.iter().filter(|(status, _)| !status.is_success()) {
        assert_eq!(*status, StatusCode::CONFLICT);
        assert_eq!(error["code"], "already_exists");
    }
    let url = granted[0]["signed_upload_url"].as_str().unwrap().to_owned();
    service.put(&url, "one").await;
    assert_eq!(service.finalize("k", 3).await.0, StatusCode::OK);
    // Neither the old URL nor a second reservation writes to it.
    assert_eq!(service.put(&url, "two").await, StatusCode::NOT_FOUND);
    assert_eq!(
        service.call("CreateCacheEntry", name).await.0,
        StatusCode::CONFLICT
    );
    let url = service.find("k").await.unwrap();
    assert_eq!(service.get(&url, None).await.2, b"one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_ends_early_never_becomes_an_entry() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let name = json!({ "key": "k", "version": "v" });
    let (_, created) = service.call("CreateCacheEntry", name).await;
    let url: url::Url = created["signed_upload_url"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let address = url.socket_addrs(|| None).unwrap()[0];
    let target = format!("{}?{}", url.path(), url.query().unwrap());
    tokio::task::block_in_place(|| {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(
            stream,
            "PUT {target} HTTP/1.1\r\nhost: {address}\r\nx-ms-blob-type: BlockBlob\r\n\
             content-length: 1000\r\n\r\nhalf"
        )
        .unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
    });
    assert_eq!(service.finalize("k", 1000).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(service.find("k").await, None);
    // The client may begin again.
    assert_eq!(
        service.put(url.as_str(), "whole").await,
        StatusCode::CREATED
    );
    assert_eq!(service.finalize("k", 4).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(service.finalize("k", 5).await.0, StatusCode::OK);
    assert!(service.find("k").await.is_some());
}

#[tokio::test]
async fn an_entry_whose_content_vanished_is_a_miss() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    service.save("k", b"content").await;
    let url = service.find("k").await.unwrap();
    fs::remove_dir_all(store.path().join("blobs")).unwrap();
    assert_eq!(service.get(&url, None).await.0, StatusCode::NOT_FOUND);
    assert_eq!(service.find("k").await, None);
    service.save("k", b"again").await;
}

#[tokio::test]
async fn blocks_with_names_that_look_like_paths_stay_where_they_belong() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let name = json!({ "key": "k", "version": "v" });
    let (_, created) = service.call("CreateCacheEntry", name).await;
    let url = created["signed_upload_url"].as_str().unwrap().to_owned();
    let blocks = ["..%2F..%2Fjournal", "%2Fetc%2Fx", "plain"];
    for block in blocks {
        let url = format!("{url}&comp=block&blockid={block}");
        assert_eq!(service.put(&url, "part ").await, StatusCode::CREATED);
    }
    let list = "<BlockList><Latest>../../journal</Latest><Latest>/etc/x</Latest>\
                <Latest>plain</Latest></BlockList>";
    let joined = format!("{url}&comp=blocklist");
    assert_eq!(service.put(&joined, list).await, StatusCode::CREATED);
    assert_eq!(service.finalize("k", 15).await.0, StatusCode::OK);
    let found = service.find("k").await.unwrap();
    assert_eq!(service.get(&found, None).await.2, b"part part part ");
    let names: Vec<String> = fs::read_dir(store.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 5, "{names:?}");
}

#[tokio::test]
async fn a_pull_request_reads_the_default_branch_and_not_the_other_way_round() {
    let store = tempfile::tempdir().unwrap();
    let (main, pull, reader) = (
        BearerToken::random().unwrap(),
        BearerToken::random().unwrap(),
        BearerToken::random().unwrap(),
    );
    let both = vec!["refs/pull/1/merge".into(), "refs/heads/main".into()];
    let tokens = Tokens::default()
        .with(&main, Access::to("refs/heads/main".into()))
        .with(
            &pull,
            Access {
                write: Some("refs/pull/1/merge".into()),
                read: both.clone(),
            },
        )
        .with(
            &reader,
            Access {
                write: None,
                read: both,
            },
        );
    let mut service = Service::with_tokens(store.path(), main.reveal(), tokens).await;
    service.save("of-main", b"main").await;
    service.token = pull.reveal().to_owned();
    service.save("of-pull", b"pull").await;
    for (token, key, seen) in [
        (&main, "of-main", true),
        (&main, "of-pull", false),
        (&pull, "of-main", true),
        (&pull, "of-pull", true),
        (&reader, "of-pull", true),
    ] {
        let found = service.find_as(token.reveal(), key).await.is_some();
        assert_eq!(found, seen, "{key}");
    }
    let body = json!({ "key": "k", "version": "v" });
    let (status, error) = service
        .call_as(reader.reveal(), "CreateCacheEntry", body)
        .await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(
        error["msg"]
            .as_str()
            .unwrap()
            .starts_with("cache write denied:")
    );
}

#[tokio::test]
async fn version_1_takes_pieces_in_any_order_and_commits_only_what_is_whole() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let base = format!("{}_apis/artifactcache/", service.url);
    let post = async |path: &str, body: Value| {
        let request = service.client.post(format!("{base}{path}"));
        let request = request.bearer_auth(&service.token);
        let request = request.header("content-type", "application/json");
        let answer = request.body(body.to_string()).send().await.unwrap();
        let status = answer.status().as_u16();
        let body: Value =
            serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap_or_default();
        (status, body)
    };
    let patch = async |id: u64, range: &str, body: &'static str| {
        let request = service.client.patch(format!("{base}caches/{id}"));
        let request = request
            .bearer_auth(&service.token)
            .header("content-range", range);
        request.body(body).send().await.unwrap().status().as_u16()
    };
    let name = json!({ "key": "k", "version": "v" });
    let (status, reserved) = post("caches", name.clone()).await;
    assert_eq!(status, 201);
    let id = reserved["cacheId"].as_u64().unwrap();
    assert_eq!(post("caches", name).await.0, 409);
    assert_eq!(patch(id, "bytes 3-5/*", "two").await, 204);
    assert_eq!(patch(id, "bytes 0-1/*", "one").await, 400);
    assert_eq!(patch(id, "bytes 0-9/*", "one").await, 400);
    assert_eq!(patch(id, "nonsense", "one").await, 400);
    assert_eq!(patch(id + 1, "bytes 0-2/*", "one").await, 404);
    assert_eq!(
        post(&format!("caches/{id}"), json!({ "size": 7 })).await.0,
        400
    );
    assert_eq!(patch(id, "bytes 0-2/*", "one").await, 204);
    assert_eq!(
        post(&format!("caches/{id}"), json!({ "size": 6 })).await.0,
        204
    );
    let url = service.find("k").await.unwrap();
    assert_eq!(service.get(&url, None).await.2, b"onetwo");
    let huge = json!({ "key": "h", "version": "v", "cacheSize": service::ENTRY_LIMIT + 1 });
    assert_eq!(post("caches", huge).await.0, 413);
}

#[tokio::test]
async fn a_shutdown_lets_a_download_finish() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let content = noise(8 << 20);
    service.save("k", &content).await;
    let url = service.find("k").await.unwrap();
    let mut answer = service.client.get(&url).send().await.unwrap();
    let mut received = answer.chunk().await.unwrap().unwrap().to_vec();
    let Service {
        running, client, ..
    } = service;
    let shutdown = tokio::spawn(running.shutdown());
    while let Some(piece) = answer.chunk().await.unwrap() {
        received.extend_from_slice(&piece);
    }
    assert!(received == content);
    // A connection that is kept open for later must not keep the service.
    drop((answer, client));
    shutdown.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_folder_that_is_in_use_is_named() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path()).await;
    let (_, tokens) = service::single_token("s").unwrap();
    let config = Config::on_loopback(store.path().to_owned(), tokens);
    let error = service::start(config).await.unwrap_err().to_string();
    assert!(
        error.contains(&store.path().display().to_string()),
        "{error}"
    );
    service.stop().await;
}
