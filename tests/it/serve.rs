//! `sccache-action serve` as a process: what it does when it is killed or told to end, whom it lets
//! in, what it tells.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::conformance::target::{Answer, Cache, Target, V1, Who, noise, send};
use crate::support::served::Served;
use axum::Router;
use axum::routing::get;
use hmac::{Hmac, Mac};
use reqwest::Method;
use sccache_action::service::auth;
use sccache_action::service::entries::{EntryStore, Limits, Storage};
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::net::TcpListener;

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_loses_no_committed_entry_and_leaves_no_half_one() {
    let folder = tempfile::tempdir().unwrap();
    let version = "0".repeat(64);
    let mut saved: BTreeSet<String> = BTreeSet::new();
    let mut tried: u64 = 0;
    for round in 0..4 {
        let served = Served::start(folder.path(), &[]);
        let target = target(&served, &served.token);
        let mut cache = target.cache();
        cache.version.clone_from(&version);
        // What was answered as committed before the kill is there.
        for key in &saved {
            let url = cache.locate(key).await;
            let loaded = target.get(&url).await.expect(200);
            assert!(loaded.body == content(key), "{key}");
        }
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
        let killer = async {
            for _ in 0..60 {
                saved.insert(heard.recv().await.unwrap());
            }
            served.kill();
        };
        tokio::join!(futures_util::future::join_all(writers), killer);
        drop(told);
        while let Some(key) = heard.recv().await {
            saved.insert(key);
        }
        tried += WRITERS;
    }
    // What the kills left half done goes in time, and nothing else does.
    let storage = Storage::in_folder(folder.path(), Limits::of_entries(1 << 30));
    let time = Arc::new(AtomicU64::new(auth::now() * 1000));
    let clock = {
        let time = time.clone();
        Arc::new(move || time.load(Ordering::Relaxed))
    };
    let store = EntryStore::open(&storage, clock).await.unwrap();
    let mut abandoned = 0;
    for _ in 0..3 {
        time.fetch_add(11 * 60 * 1000, Ordering::Relaxed);
        abandoned += store.sweep().await.unwrap().abandoned;
    }
    let totals = store.totals().await.unwrap();
    assert!(abandoned <= tried);
    assert_eq!(totals.uploads, 0);
    assert_eq!(totals.entries as usize, files(&folder.path().join("blobs")));
    // One per writer and round may have been committed without an answer that came through.
    let extra = totals.entries as usize - saved.len();
    assert!(extra <= tried as usize, "{totals:?} {}", saved.len());
}

/// Some hundred or some hundred thousand bytes, the key's own.
fn content(key: &str) -> Vec<u8> {
    let length = if key.ends_with('7') { 300_000 } else { 200 };
    let mut bytes = noise(length);
    bytes.extend_from_slice(key.as_bytes());
    bytes
}

/// Saves an entry, unless the service goes away.
async fn save(target: &Target, cache: &Cache<'_>, key: &str) -> Option<()> {
    let request = |method: &str, mut body: Value| {
        body["version"] = json!(cache.version);
        target
            .request(
                Method::POST,
                &format!("{}/{method}", crate::conformance::target::V2),
            )
            .bearer_auth(target.token(Who::Default))
            .header("content-type", "application/json")
            .body(body.to_string())
            .send()
    };
    let created = request("CreateCacheEntry", json!({ "key": key }))
        .await
        .ok()?;
    let created: Value = serde_json::from_slice(&created.bytes().await.ok()?).unwrap();
    let url = created["signed_upload_url"].as_str()?.to_owned();
    let put = target.content(Method::PUT, &url);
    let put = put.header("x-ms-blob-type", "BlockBlob").body(content(key));
    assert_eq!(put.send().await.ok()?.status(), 201);
    let size = content(key).len().to_string();
    let done = request(
        "FinalizeCacheEntryUpload",
        json!({ "key": key, "size_bytes": size }),
    );
    assert_eq!(done.await.ok()?.status(), 200);
    Some(())
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
    let later = auth::now() + 600;
    let claims = json!({ "exp": later, "scp": "Actions.Results:1:2", "ac": scopes(&[("", 2)]) });
    let token = signed(b"the-secret", &claims);
    let target = target(&served, &token);
    let cache = target.cache();
    cache.save("k", "content").await;
    assert_eq!(cache.load("k").await, "content");
    let old = json!({ "exp": auth::now() - 3600, "ac": scopes(&[("", 2)]) });
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

/// A token that says itself that nobody signed it.
fn unsigned(claims: &Value) -> String {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = json!({ "alg": "none", "typ": "JWT" });
    format!("{}.{}.", encode(&header), encode(claims))
}

/// Tokens for these claims, and the URL of an issuer whose key has signed them. The claims have its
/// URL put in.
async fn issuer(claims: &[Value]) -> (String, Vec<String>) {
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
    let jwks = made["jwks"].to_string();
    let discovery = json!({ "jwks_uri": format!("{url}/keys") }).to_string();
    let router = Router::new()
        .route("/.well-known/openid-configuration", get(async || discovery))
        .route("/keys", get(async || jwks));
    tokio::spawn(axum::serve(listener, router).into_future());
    let tokens = made["tokens"].as_array().unwrap();
    let tokens = tokens
        .iter()
        .map(|token| token.as_str().unwrap().to_owned());
    (url, tokens.collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_of_githubs_jobs_open_their_repositorys_scopes() {
    let later = auth::now() + 600;
    let main = scopes(&[("refs/heads/main", 3)]);
    let pull = scopes(&[("refs/pull/1/merge", 3), ("refs/heads/main", 1)]);
    let (url, tokens) = issuer(&[
        json!({ "exp": later, "repository_id": "1", "ac": main }),
        json!({ "exp": later, "repository_id": "1", "ac": pull }),
        json!({ "exp": later, "repository_id": "2", "ac": main }),
        json!({ "exp": later, "repository_id": "1", "ac": scopes(&[("refs/heads/main", 1)]) }),
        json!({ "exp": auth::now() - 3600, "repository_id": "1", "ac": main }),
        json!({ "exp": later, "repository_id": "1", "ac": main, "iss": "https://elsewhere" }),
        json!({ "repository_id": "1", "ac": main }),
        json!({ "exp": later, "nbf": later, "repository_id": "1", "ac": main }),
    ])
    .await;
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path(), &["--github-tokens", &url]);
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
    let (_, forged) =
        issuer(&[json!({ "exp": later, "repository_id": "1", "ac": main, "iss": url })]).await;
    cache
        .with_token(&forged[0])
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
            "the database cannot be used",
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
    // A folder that cannot be made stands for a disk that takes no more.
    let blobs = folder.path().join("blobs");
    let kept = folder.path().join("kept");
    fs::rename(&blobs, &kept).unwrap();
    fs::write(&blobs, "").unwrap();
    let url = cache.reserve("k").await;
    let refused = target.put(&url, "content").await.expect(500);
    assert!(!refused.text().contains("blobs"), "{}", refused.text());
    assert!(
        served.log().contains("a request failed"),
        "{}",
        served.log()
    );
    fs::remove_file(&blobs).unwrap();
    fs::rename(&kept, &blobs).unwrap();
    target.put(&url, "content").await.expect(201);
    cache.finalize("k", 7).await.expect(200);
    assert_eq!(cache.load("k").await, "content");
    assert_eq!(cache.load("before").await, "content");
    tokio::time::timeout(Duration::from_secs(5), cache.load("k"))
        .await
        .unwrap();
}
