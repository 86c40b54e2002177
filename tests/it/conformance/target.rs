//! The service that the suite is run against, and raw requests to it.

use std::collections::HashMap;
use std::env;
use std::sync::atomic::{AtomicUsize, Ordering};

use reqwest::header::HeaderMap;
use reqwest::{Body, Client, Method, RequestBuilder};
use sccache_action::cache_protocol::auth::{Access, Tokens};
use sccache_action::cache_protocol::store::Scope;
use sccache_action::cache_protocol::temporary::TemporaryService;
use sccache_action::http::BearerToken;
use sccache_action::http::{self, Timeouts};
use sccache_action::serve::server::{self, RunningServer, ServerConfig};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The address of the service, if it is not one in this process: one URL, or those of several
/// replicas with spaces between.
const URL: &str = "SCCACHE_ACTION_CONFORMANCE_URL";

/// The path of version 2 below a service's URL.
pub const V2: &str = "twirp/github.actions.results.api.v1.CacheService";
/// The path of version 1 below a service's URL.
pub const V1: &str = "_apis/artifactcache";

/// The token of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    /// The default branch's.
    Default,
    /// The token of a branch, which also reads the default branch.
    Base,
    /// The token of a pull request, which also reads that branch and the default branch.
    PullRequest,
    /// A token that reads the default branch and writes nothing.
    ReadOnly,
}

impl Who {
    const ALL: [Self; 4] = [Self::Default, Self::Base, Self::PullRequest, Self::ReadOnly];

    /// The variable that holds the token for a service that is not in this process.
    pub fn variable(self) -> &'static str {
        match self {
            Self::Default => "SCCACHE_ACTION_CONFORMANCE_TOKEN",
            Self::Base => "SCCACHE_ACTION_CONFORMANCE_BASE_TOKEN",
            Self::PullRequest => "SCCACHE_ACTION_CONFORMANCE_PR_TOKEN",
            Self::ReadOnly => "SCCACHE_ACTION_CONFORMANCE_READ_ONLY_TOKEN",
        }
    }
}

/// A token for everybody whom the suite needs, and what a service must know of them.
fn everybody() -> (HashMap<Who, String>, Tokens) {
    let (main, base, pull): (Scope, Scope, Scope) = (
        "refs/heads/main".into(),
        "refs/heads/release".into(),
        "refs/pull/1/merge".into(),
    );
    let mut tokens = (HashMap::new(), Tokens::default());
    for (who, write, read) in [
        (Who::Default, Some(&main), vec![main.clone()]),
        (Who::Base, Some(&base), vec![base.clone(), main.clone()]),
        (
            Who::PullRequest,
            Some(&pull),
            vec![pull.clone(), base.clone(), main.clone()],
        ),
        (Who::ReadOnly, None, vec![main.clone()]),
    ] {
        let token = BearerToken::random().unwrap();
        tokens.0.insert(who, token.reveal().to_owned());
        let write = write.cloned();
        tokens.1 = tokens.1.with(&token, Access { write, read });
    }
    tokens
}

/// A service, which may have other entries and other users, and the tokens for it.
pub struct Target {
    urls: Vec<String>,
    tokens: HashMap<Who, String>,
    client: Client,
    /// A text in keys and versions that no other run has.
    run: String,
    count: AtomicUsize,
    /// The service, if it is in this process.
    _own: Option<(Own, tempfile::TempDir)>,
}

/// A service in this process, which ends when it is dropped.
#[allow(dead_code, reason = "only its end matters")]
enum Own {
    Alone(RunningServer),
    Temporary(TemporaryService),
}

impl Target {
    /// The service at these URLs, which end in a slash and stand for one another.
    pub fn new(urls: Vec<String>, tokens: HashMap<Who, String>) -> Self {
        Self {
            urls,
            tokens,
            client: http::build(Timeouts::default()).unwrap(),
            run: BearerToken::random().unwrap().reveal()[..12].to_owned(),
            count: AtomicUsize::new(0),
            _own: None,
        }
    }

    /// The service that the environment names, or one in this process.
    pub async fn from_environment() -> Self {
        let Ok(urls) = env::var(URL) else {
            return Self::in_process().await;
        };
        let urls = urls.split_whitespace();
        let urls = urls.map(|url| format!("{}/", url.trim_end_matches('/')));
        let token = |who: Who| Some((who, env::var(who.variable()).ok()?));
        let tokens: HashMap<_, _> = Who::ALL.into_iter().filter_map(token).collect();
        assert!(tokens.contains_key(&Who::Default), "{URL} needs a token");
        Self::new(urls.collect(), tokens)
    }

    async fn in_process() -> Self {
        let (tokens, known) = everybody();
        let folder = tempfile::tempdir().unwrap();
        let config = ServerConfig::on_loopback(folder.path(), known);
        let running = server::start(config).await.unwrap();
        let mut target = Self::new(vec![running.url()], tokens);
        target._own = Some((Own::Alone(running), folder));
        target
    }

    /// The service that rehearsals have, in this process.
    pub async fn temporary() -> Self {
        let (tokens, known) = everybody();
        let folder = tempfile::tempdir().unwrap();
        let service = TemporaryService::start(folder.path(), known).await.unwrap();
        let mut target = Self::new(vec![service.url()], tokens);
        target._own = Some((Own::Temporary(service), folder));
        target
    }

    pub fn has(&self, who: Who) -> bool {
        self.tokens.contains_key(&who)
    }

    pub fn token(&self, who: Who) -> &str {
        &self.tokens[&who]
    }

    /// The URL of the replica whose turn it is.
    pub fn url(&self) -> &str {
        &self.urls[self.count.fetch_add(1, Ordering::Relaxed) % self.urls.len()]
    }

    /// A text that was not given before, by this run or another.
    pub fn unique(&self) -> String {
        format!(
            "{}-{}",
            self.run,
            self.count.fetch_add(1, Ordering::Relaxed)
        )
    }

    /// An empty cache, for the default branch.
    pub fn cache(&self) -> Cache<'_> {
        Cache {
            target: self,
            token: self.token(Who::Default),
            version: hex::encode(Sha256::digest(self.unique())),
        }
    }

    /// A request without a token to the replica whose turn it is.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let url = format!("{}{path}", self.url());
        self.client.request(method, url)
    }

    /// A request for content. A signed URL is good at each replica, so this asks the next one.
    pub fn content(&self, method: Method, url: &str) -> RequestBuilder {
        let path = |base: &String| url.strip_prefix(base.as_str());
        match self.urls.iter().find_map(path) {
            Some(path) => self.request(method, path),
            None => self.client.request(method, url),
        }
    }

    pub async fn get(&self, url: &str) -> Answer {
        send(self.content(Method::GET, url)).await
    }

    /// Put Blob.
    pub async fn put(&self, url: &str, content: impl Into<Body>) -> Answer {
        let request = self.content(Method::PUT, url).body(content);
        send(request.header("x-ms-blob-type", "BlockBlob")).await
    }

    /// Put Block.
    pub async fn put_block(&self, url: &str, name: &str, content: impl Into<Body>) -> Answer {
        let name: String = url::form_urlencoded::byte_serialize(name.as_bytes()).collect();
        let url = format!("{url}&comp=block&blockid={name}");
        send(self.content(Method::PUT, &url).body(content)).await
    }

    /// Put Block List.
    pub async fn put_list(&self, url: &str, list: impl Into<Body>) -> Answer {
        let url = format!("{url}&comp=blocklist");
        send(self.content(Method::PUT, &url).body(list)).await
    }
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

/// Sends a request, which must be answered.
pub async fn send(request: RequestBuilder) -> Answer {
    let answer = request.send().await.unwrap();
    Answer {
        status: answer.status().as_u16(),
        headers: answer.headers().clone(),
        body: answer.bytes().await.unwrap().to_vec(),
    }
}

impl Answer {
    /// This answer, which must have this status.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.text());
        self
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The header's value, empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name);
        value.map_or("", |value| value.to_str().unwrap())
    }

    /// The body, or null if it is no JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The status, and the code that Twirp or Azure has for the error.
    pub fn error(&self) -> (u16, String) {
        let text = self.text();
        let xml = || {
            Some(
                text.split_once("<Code>")?
                    .1
                    .split_once("</Code>")?
                    .0
                    .to_owned(),
            )
        };
        let code = self.json()["code"].as_str().map(str::to_owned);
        (self.status, code.or_else(xml).unwrap_or_default())
    }
}

/// The entries of one version, as one token sees them.
#[derive(Clone)]
pub struct Cache<'a> {
    target: &'a Target,
    token: &'a str,
    pub version: String,
}

impl<'a> Cache<'a> {
    /// The same entries as somebody else sees them.
    pub fn by(&self, who: Who) -> Self {
        self.with_token(self.target.token(who))
    }

    pub fn with_token(&self, token: &'a str) -> Self {
        Self {
            token,
            ..self.clone()
        }
    }

    /// A call of version 2 in JSON; `body` need not name the version.
    pub async fn call(&self, method: &str, mut body: Value) -> Answer {
        if body.get("version").is_none() {
            body["version"] = json!(self.version);
        }
        let request = self.target.request(Method::POST, &format!("{V2}/{method}"));
        let request = request.bearer_auth(self.token);
        let request = request.header("content-type", "application/json");
        send(request.body(body.to_string())).await
    }

    pub async fn create(&self, key: &str) -> Answer {
        self.call("CreateCacheEntry", json!({ "key": key })).await
    }

    /// The upload's URL under a key that is free.
    pub async fn reserve(&self, key: &str) -> String {
        let created = self.create(key).await.expect(200).json();
        assert_eq!(created["ok"], true);
        created["signed_upload_url"].as_str().unwrap().to_owned()
    }

    pub async fn finalize(&self, key: &str, size: usize) -> Answer {
        let body = json!({ "key": key, "size_bytes": size.to_string() });
        self.call("FinalizeCacheEntryUpload", body).await
    }

    pub async fn save(&self, key: &str, content: impl Into<Vec<u8>>) {
        let content = content.into();
        let size = content.len();
        let url = self.reserve(key).await;
        self.target.put(&url, content).await.expect(201);
        self.finalize(key, size).await.expect(200);
    }

    pub async fn look_up(&self, keys: &[&str]) -> Answer {
        let body = json!({ "key": keys[0], "restore_keys": keys[1..] });
        self.call("GetCacheEntryDownloadURL", body).await
    }

    /// The key that is found and the address of its content. Both protocols must say the same.
    pub async fn find(&self, keys: &[&str]) -> Option<(String, String)> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let two = self.look_up(keys).await.expect(200).json();
        let one = self.look_up_v1(keys).await;
        if two["ok"] == false {
            assert_eq!(one.status, 204, "{keys:?} {two} {}", one.text());
            return None;
        }
        let one = one.expect(200).json();
        assert_eq!(one["cacheKey"], two["matched_key"], "{keys:?}");
        assert!(text(&one["archiveLocation"]).is_some(), "{one}");
        text(&two["matched_key"]).zip(text(&two["signed_download_url"]))
    }

    /// The key that is found.
    pub async fn matched(&self, keys: &[&str]) -> Option<String> {
        self.find(keys).await.map(|(key, _)| key)
    }

    /// The address of the content of the entry with this key.
    pub async fn locate(&self, key: &str) -> String {
        let (found, url) = self.find(&[key]).await.unwrap();
        assert_eq!(found, key);
        url
    }

    /// The content of the entry with this key.
    pub async fn load(&self, key: &str) -> String {
        self.target
            .get(&self.locate(key).await)
            .await
            .expect(200)
            .text()
    }

    /// A request of version 1.
    pub fn v1(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.target.request(method, &format!("{V1}/{path}"));
        request.bearer_auth(self.token)
    }

    pub async fn post_v1(&self, path: &str, body: Value) -> Answer {
        let request = self.v1(Method::POST, path);
        let request = request.header("content-type", "application/json");
        send(request.body(body.to_string())).await
    }

    pub async fn look_up_v1(&self, keys: &[&str]) -> Answer {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.append_pair("keys", &keys.join(","));
        query.append_pair("version", &self.version);
        send(self.v1(Method::GET, &format!("cache?{}", query.finish()))).await
    }

    /// A reservation of version 1, of an entry whose size the client knows.
    pub async fn create_v1(&self, key: &str, size: Option<u64>) -> Answer {
        let mut body = json!({ "key": key, "version": self.version });
        if let Some(size) = size {
            body["cacheSize"] = json!(size);
        }
        self.post_v1("caches", body).await
    }

    /// The upload's number under a key that is free.
    pub async fn reserve_v1(&self, key: &str) -> u64 {
        let reserved = self.create_v1(key, None).await.expect(201).json();
        reserved["cacheId"].as_u64().unwrap()
    }

    pub async fn patch(&self, upload: u64, range: &str, content: &'static str) -> Answer {
        let request = self.v1(Method::PATCH, &format!("caches/{upload}"));
        send(request.header("content-range", range).body(content)).await
    }

    pub async fn commit(&self, upload: u64, size: usize) -> Answer {
        let path = format!("caches/{upload}");
        self.post_v1(&path, json!({ "size": size })).await
    }
}

/// Bytes that no compression makes smaller.
pub fn noise(length: usize) -> Vec<u8> {
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
