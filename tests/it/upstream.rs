//! The upstream that other tests and the benchmark put in GitHub's place does what it says.

use std::time::{Duration, Instant};

use crate::support::upstream::{Counts, DEFAULT_BRANCH, Fault, Options, Upstream};
use reqwest::{Client, Response, StatusCode};
use sccache_action::http::{self, Timeouts};
use sccache_action::runner::environment::Environment;
use sccache_action::runner::scopes::Permission;
use serde_json::{Value, json};

const V2: &str = "twirp/github.actions.results.api.v1.CacheService";

/// A client with a token.
struct Job {
    client: Client,
    url: String,
    token: String,
}

impl Job {
    fn of(upstream: &Upstream) -> Self {
        Self::with_token(upstream, upstream.token.clone())
    }

    fn with_token(upstream: &Upstream, token: String) -> Self {
        Self {
            client: http::build(Timeouts::default()).unwrap(),
            url: upstream.url.clone(),
            token,
        }
    }

    async fn call(&self, method: &str, body: Value) -> Response {
        self.client
            .post(format!("{}{V2}/{method}", self.url))
            .bearer_auth(&self.token)
            .header("content-type", "application/json")
            .body(body.to_string())
            .send()
            .await
            .unwrap()
    }

    async fn reserve(&self, key: &str) -> Response {
        self.call("CreateCacheEntry", json!({ "key": key, "version": "v" }))
            .await
    }

    async fn save(&self, key: &str, content: &[u8]) {
        let created = read(self.reserve(key).await).await;
        let request = self
            .client
            .put(created["signed_upload_url"].as_str().unwrap())
            .header("x-ms-blob-type", "BlockBlob")
            .body(content.to_vec());
        assert_eq!(request.send().await.unwrap().status(), StatusCode::CREATED);
        let size = content.len().to_string();
        let body = json!({ "key": key, "version": "v", "size_bytes": size });
        let done = read(self.call("FinalizeCacheEntryUpload", body).await).await;
        assert_eq!(done["ok"], true, "{done}");
    }

    async fn find(&self, key: &str) -> Option<String> {
        let body = json!({ "key": key, "restore_keys": [], "version": "v" });
        let found = read(self.call("GetCacheEntryDownloadURL", body).await).await;
        let url = found["signed_download_url"].as_str().unwrap();
        (!url.is_empty()).then(|| url.to_owned())
    }

    async fn download(&self, url: &str) -> Response {
        self.client.get(url).send().await.unwrap()
    }
}

async fn read(response: Response) -> Value {
    serde_json::from_slice(&response.bytes().await.unwrap()).unwrap()
}

#[tokio::test]
async fn requests_are_counted_by_kind_and_content_by_the_byte() {
    let upstream = Upstream::start(Options::default());
    let job = Job::of(&upstream);
    job.save("a", &[7; 1000]).await;
    let saved = upstream.counts();
    let url = job.find("a").await.unwrap();
    assert_eq!(job.find("b").await, None);
    let content = job.download(&url).await.bytes().await.unwrap();
    assert_eq!(content, [7; 1000].as_slice());
    assert_eq!(
        saved,
        Counts {
            reservations: 1,
            uploads: 1,
            commits: 1,
            bytes_up: 1000,
            ..Counts::default()
        }
    );
    assert_eq!(
        upstream.counts().since(&saved),
        Counts {
            lookups: 2,
            downloads: 1,
            bytes_down: 1000,
            ..Counts::default()
        }
    );
    assert_eq!(upstream.counts().requests(), 6);
}

#[tokio::test]
async fn version_1_is_counted_by_the_same_kinds() {
    let upstream = Upstream::start(Options::default());
    let job = Job::of(&upstream);
    let caches = format!("{}_apis/artifactcache/caches", job.url);
    let json = |request: reqwest::RequestBuilder, body: Value| {
        request
            .bearer_auth(&job.token)
            .header("content-type", "application/json")
            .body(body.to_string())
            .send()
    };
    let name = json!({ "key": "a", "version": "v" });
    let reserved = read(json(job.client.post(&caches), name).await.unwrap()).await;
    let own = format!("{caches}/{}", reserved["cacheId"]);
    let piece = job.client.patch(&own).bearer_auth(&job.token);
    let piece = piece.header("content-range", "bytes 0-2/*").body("abc");
    assert!(piece.send().await.unwrap().status().is_success());
    let commit = json(job.client.post(&own), json!({ "size": 3 })).await;
    assert!(commit.unwrap().status().is_success());
    let find = format!("{}_apis/artifactcache/cache?keys=a&version=v", job.url);
    let found = job.client.get(find).bearer_auth(&job.token).send().await;
    let found = read(found.unwrap()).await;
    let location = found["archiveLocation"].as_str().unwrap();
    assert_eq!(job.download(location).await.bytes().await.unwrap(), "abc");
    assert_eq!(
        upstream.counts(),
        Counts {
            lookups: 1,
            reservations: 1,
            uploads: 1,
            commits: 1,
            downloads: 1,
            bytes_up: 3,
            bytes_down: 3,
            ..Counts::default()
        }
    );
}

#[tokio::test]
async fn latency_is_paid_by_each_request_and_by_all_at_once() {
    let upstream = Upstream::start(Options {
        api_latency: Duration::from_millis(200),
        ..Options::default()
    });
    let job = Job::of(&upstream);
    let begin = Instant::now();
    let lookups = (0..8).map(|_| job.find("a"));
    futures_util::future::join_all(lookups).await;
    let elapsed = begin.elapsed();
    assert!(elapsed >= Duration::from_millis(200), "{elapsed:?}");
    assert!(elapsed < Duration::from_millis(1600), "{elapsed:?}");
}

#[tokio::test]
async fn one_reservation_too_many_is_refused_until_a_minute_has_passed() {
    let upstream = Upstream::start(Options {
        uploads_per_minute: Some(2),
        ..Options::default()
    });
    let job = Job::of(&upstream);
    for key in ["a", "b"] {
        assert_eq!(job.reserve(key).await.status(), StatusCode::OK);
    }
    let refused = job.reserve("c").await;
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let wait = refused.headers()["retry-after"].to_str().unwrap();
    let wait: u64 = wait.parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
    let error = read(refused).await;
    assert_eq!(error["code"], "resource_exhausted");
    assert_eq!(error["msg"], "rate limit exceeded");
    assert_eq!(job.find("a").await, None);
    let counts = upstream.counts();
    assert_eq!((counts.reservations, counts.refused), (3, 1));
    upstream.forget_uploads();
    assert_eq!(job.reserve("c").await.status(), StatusCode::OK);
}

#[tokio::test]
async fn faults_come_to_order_and_go() {
    let upstream = Upstream::start(Options::default());
    let job = Job::of(&upstream);
    let content: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
    job.save("a", &content).await;
    let url = job.find("a").await.unwrap();

    upstream.set_fault(Some(Fault::Status(
        StatusCode::SERVICE_UNAVAILABLE,
        Some(7),
    )));
    for response in [job.reserve("b").await, job.download(&url).await] {
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()["retry-after"], "7");
    }

    let refuse = Fault::RefuseWrites(StatusCode::TOO_MANY_REQUESTS, None);
    upstream.set_fault(Some(refuse));
    let refused = job.reserve("b").await;
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(!refused.headers().contains_key("retry-after"));
    assert!(job.find("a").await.is_some());

    upstream.set_fault(Some(Fault::DenyWrites));
    let denied = job.reserve("b").await;
    assert_eq!(denied.status(), StatusCode::FORBIDDEN);
    let message = read(denied).await["msg"].to_string();
    assert!(message.contains("cache write denied: "), "{message}");

    upstream.set_fault(Some(Fault::LoseBlobs));
    let url = job.find("a").await.unwrap();
    assert_eq!(job.download(&url).await.status(), StatusCode::NOT_FOUND);

    upstream.set_fault(Some(Fault::TruncateDownloads));
    let before = upstream.counts();
    let mut response = job.download(&url).await;
    assert_eq!(response.content_length(), Some(100_000));
    let mut received = 0;
    while let Ok(piece) = response.chunk().await {
        received += piece.expect("it ended as if it were whole").len();
    }
    assert_eq!(received, 50_000);
    assert_eq!(upstream.counts().since(&before).bytes_down, 50_000);

    upstream.set_fault(Some(Fault::FlipBytes { offset: 70_000 }));
    let flipped = job.download(&url).await.bytes().await.unwrap();
    let differ = |(one, other): (&u8, &u8)| one != other;
    assert_eq!(flipped.iter().zip(&content).position(differ), Some(70_000));
    assert_eq!(flipped[70_001..], content[70_001..]);

    upstream.set_fault(Some(Fault::Hang));
    let asked = tokio::time::timeout(Duration::from_millis(200), job.find("a"));
    assert!(asked.await.is_err());

    upstream.set_fault(None);
    let whole = job.download(&url).await.bytes().await.unwrap();
    assert_eq!(whole, content);
}

#[tokio::test]
async fn a_pull_request_reads_the_default_branch_and_writes_its_own() {
    let upstream = Upstream::start(Options::default());
    let main = Job::of(&upstream);
    let pull = upstream.token_for(Some("refs/pull/1/merge"), &[DEFAULT_BRANCH]);
    let pull = Job::with_token(&upstream, pull);
    let fork = Job::with_token(&upstream, upstream.token_for(None, &[DEFAULT_BRANCH]));
    main.save("a", b"main").await;
    pull.save("b", b"pull").await;
    for (job, a, b) in [
        (&main, true, false),
        (&pull, true, true),
        (&fork, true, false),
    ] {
        assert_eq!(job.find("a").await.is_some(), a);
        assert_eq!(job.find("b").await.is_some(), b);
    }
    pull.save("a", b"pull").await;
    let own = pull.find("a").await.unwrap();
    assert_eq!(pull.download(&own).await.bytes().await.unwrap(), "pull");
    let refused = read(fork.reserve("c").await).await;
    assert_eq!(refused["ok"], false);
    let message = refused["message"].as_str().unwrap();
    assert!(message.starts_with("cache write denied:"), "{message}");
    for (job, expected) in [(&main, false), (&pull, false), (&fork, true)] {
        let environment = Environment::from_iter([("ACTIONS_RUNTIME_TOKEN", &*job.token)]);
        assert_eq!(Permission::of(&environment, None).write, !expected);
    }
}

#[tokio::test]
async fn an_upstream_that_was_killed_is_gone() {
    let mut upstream = Upstream::start(Options::default());
    let job = Job::of(&upstream);
    job.save("a", b"content").await;
    upstream.kill();
    let address = job.url.replace("http://", "").replace('/', "");
    let begin = Instant::now();
    while tokio::net::TcpStream::connect(&address).await.is_ok() {
        assert!(begin.elapsed() < Duration::from_secs(10));
        tokio::task::yield_now().await;
    }
}
