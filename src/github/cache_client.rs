//! A client of GitHub's cache service: version 2 (Twirp, in JSON as `@actions/cache` speaks it), and
//! version 1 (REST), which GitHub Enterprise Server, Gitea, Forgejo and `act` have.
//!
//! It asks and reports, and leaves to its caller whether and when to ask again. The token goes to
//! the service's own address and nowhere else: the addresses of content are signed, and get none.

use std::fmt;
use std::future;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt, TryStreamExt};
use reqwest::header::{
    ACCEPT, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, LOCATION, RANGE,
};
use reqwest::redirect::Policy;
use reqwest::{Body, Method, RequestBuilder, Response, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::timeout;
use url::Url;

use crate::action::environment::Environment;
use crate::github::with_causes;
use crate::http_client::{self, Timeouts};
use crate::service::auth::BearerToken;

/// How long a call of the API may take as a whole. It moves some kilobytes.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// The longest answer that is read into memory, in bytes. The longest that GitHub gives has a
/// signed URL of some hundred.
const ANSWER_LIMIT: usize = 64 * 1024;

/// How many bytes one request of version 1 carries at most: `uploadChunkSize` of `@actions/cache`
/// (`options.ts`). Proxies in front of such services are set up for it.
const PIECE_SIZE: u64 = 32 << 20;

/// How many bytes are handed to a connection at once. Small enough that a slow connection still
/// shows that it moves.
const WRITE_SIZE: usize = 128 * 1024;

/// How often a download may be sent elsewhere.
const REDIRECT_LIMIT: usize = 5;

/// The longest text from elsewhere in an error, in characters.
const TEXT_LIMIT: usize = 200;

/// The longest wait that is passed on. Jobs end before; a caller may add it to any time.
const WAIT_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

const TWIRP: &str = "twirp/github.actions.results.api.v1.CacheService";
const REST: &str = "_apis/artifactcache";

/// Which protocol a service speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// REST under `_apis/artifactcache/`.
    V1,
    /// Twirp under `twirp/github.actions.results.api.v1.CacheService/`.
    V2,
}

/// A cache service: where it is, what it speaks, and the token that opens it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// What it speaks.
    pub protocol: Protocol,
    /// Its URL, which ends in a slash.
    pub url: Url,
    /// The job's token; empty where the runner gave none.
    pub token: BearerToken,
}

impl fmt::Debug for Endpoint {
    /// Without the path: to Forgejo's runner, a random part of it says which job it is.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Endpoint")
            .field("protocol", &self.protocol)
            .field("origin", &self.url.origin().ascii_serialization())
            .field("token", &self.token)
            .finish()
    }
}

impl Endpoint {
    /// The service that `environment`, which a runner gave, names; `None` where it names none.
    ///
    /// The choice is that of `@actions/cache` (`config.ts`) and of opendal's service `ghac`, but
    /// that the variable `ACTIONS_CACHE_SERVICE_V2` is asked under `act` alone: it imitates
    /// github.com and sets `ACTIONS_RESULTS_URL` for artifacts. On github.com itself version 1 is no
    /// more.
    ///
    /// Version 1 is used without a token too: `act` gives none, since the address of its service has
    /// a secret in it, and `@actions/cache` sends an empty one there. No service of version 2 does
    /// without.
    pub fn of(environment: &Environment) -> Option<Self> {
        let token = environment.get("ACTIONS_RUNTIME_TOKEN").unwrap_or_default();
        let results = environment.get("ACTIONS_RESULTS_URL");
        let cache = environment.get("ACTIONS_CACHE_URL");
        let may_speak_v2 = is_githubs(environment)
            && (!environment.has("ACT") || environment.has("ACTIONS_CACHE_SERVICE_V2"));
        let (protocol, url) = match results {
            Some(results) if may_speak_v2 => (Protocol::V2, results),
            _ => (Protocol::V1, cache.or(results)?),
        };
        if protocol == Protocol::V2 && token.is_empty() {
            return None;
        }
        Some(Self {
            protocol,
            url: base(url)?,
            token: BearerToken::new(token),
        })
    }
}

/// Whether the job's server is GitHub's own: github.com, or GitHub Enterprise Cloud under ghe.com.
fn is_githubs(environment: &Environment) -> bool {
    let Some(server) = environment.get("GITHUB_SERVER_URL") else {
        return true;
    };
    let host = Url::parse(server.trim())
        .ok()
        .and_then(|url| url.host_str().map(str::to_ascii_lowercase));
    host.is_some_and(|host| {
        host == "github.com" || host.ends_with(".ghe.com") || host.ends_with(".localhost")
    })
}

/// `url` in the form that paths can be appended to.
fn base(url: &str) -> Option<Url> {
    let mut url = Url::parse(url)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https"))?;
    url.set_query(None);
    url.set_fragment(None);
    if !url.path().ends_with('/') {
        let path = format!("{}/", url.path());
        url.set_path(&path);
    }
    Some(url)
}

/// Why a cache service did not do as asked. No text in it has a token, the query of a signed URL, or
/// more than 200 characters.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CacheError {
    /// It has had too many requests: 429, or 503 with a time to wait.
    #[error("the cache service takes no more requests for now")]
    Throttled {
        /// How long it asks its clients to wait, at most a day.
        retry_after: Option<Duration>,
    },
    /// The token does not allow it, or the repository's storage is used up. It stays so for the job.
    #[error("the cache service refuses: {0}")]
    Denied(String),
    /// The entry or the upload is no longer there, is shorter than what was asked of it, or the URL
    /// that was signed for it has expired.
    #[error("the cache service no longer has it")]
    Gone,
    /// Anything else: it cannot be reached, is too slow, is broken, or answers what cannot be read.
    #[error("the cache service cannot be used: {0}")]
    Unavailable(String),
}

impl CacheError {
    /// Whether the same may succeed later.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Throttled { .. } | Self::Unavailable(_))
    }
}

/// What a client has asked so far. A request that is repeated because its connection was closed
/// counts once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestCounts {
    /// Look-ups.
    pub lookups: u64,
    /// Look-ups that found an entry.
    pub lookup_hits: u64,
    /// Reservations asked for.
    pub reservations: u64,
    /// Reservations refused because there is such an entry already.
    pub conflicts: u64,
    /// Requests that carried content; in version 1 one entry may take several.
    pub uploads: u64,
    /// Uploads made entries.
    pub commits: u64,
    /// Requests for content.
    pub downloads: u64,
    /// Requests that ended in [`CacheError::Throttled`].
    pub throttled: u64,
    /// Requests that ended in any other error, also after they had begun to give content.
    pub failed: u64,
    /// Bytes of content handed to connections.
    pub bytes_up: u64,
    /// Bytes of content received.
    pub bytes_down: u64,
}

/// An entry that a look-up found.
#[derive(Clone)]
pub struct Found {
    /// Its key: the one asked for, or a longer one that begins like it or like a restore key.
    /// `act` and Gitea have keys in lower case.
    pub key: String,
    url: Url,
}

impl fmt::Debug for Found {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Found")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

/// What became of a reservation.
#[derive(Debug)]
pub enum Reserved {
    /// The key is this client's to fill.
    Upload(Upload),
    /// There is an entry with the key, or another client is filling it.
    AlreadyExists,
}

/// A key that is reserved and waits for its content.
#[derive(Clone)]
pub struct Upload {
    key: String,
    target: Target,
}

/// Where an upload's content goes.
#[derive(Clone)]
enum Target {
    /// Version 1: to the upload of this number.
    Numbered(u64),
    /// Version 2: to a signed URL.
    Signed(Url),
}

impl fmt::Debug for Upload {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Upload")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

/// Content on its way.
pub struct Download {
    /// The size of the whole entry in bytes.
    pub total: u64,
    /// Where in the entry the content begins, in bytes: where it was asked to, or 0 where the server
    /// knows no ranges and sends the whole entry.
    pub start: u64,
    /// The content: all of what was asked for that there is, or of the whole entry, or an error as
    /// the last item.
    pub stream: BoxStream<'static, io::Result<Bytes>>,
}

impl fmt::Debug for Download {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Download")
            .field("total", &self.total)
            .field("start", &self.start)
            .finish_non_exhaustive()
    }
}

/// A client of one cache service, for entries of one version. Clones share connections and counts.
#[derive(Clone)]
pub struct CacheClient {
    shared: Arc<Shared>,
}

struct Shared {
    endpoint: Endpoint,
    version: String,
    /// For hosts on this machine, which a proxy would look for on its own.
    on_loopback: reqwest::Client,
    elsewhere: reqwest::Client,
    /// How long to wait for the next byte.
    read: Duration,
    /// [`CALL_LIMIT`], but for tests.
    call_limit: Duration,
    counts: Mutex<RequestCounts>,
}

impl fmt::Debug for CacheClient {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("CacheClient")
            .field("endpoint", &self.shared.endpoint)
            .field("version", &self.shared.version)
            .finish_non_exhaustive()
    }
}

impl CacheClient {
    /// A client of `endpoint` that sees entries of `version` only (a SHA-256 in hex, by which
    /// clients tell entries of one key apart). A server may take as long for each byte as
    /// `timeouts` says, and half a minute for each call but uploads and downloads.
    ///
    /// # Errors
    /// Where the system's certificates or proxy settings cannot be read.
    pub fn new(
        endpoint: Endpoint,
        version: &str,
        timeouts: Timeouts,
    ) -> Result<Self, reqwest::Error> {
        // A redirect by the HTTP client would take the token along to another path of the host, and
        // tell the next host the signed URL of the last.
        let build = |builder: reqwest::ClientBuilder| builder.redirect(Policy::none()).build();
        Ok(Self {
            shared: Arc::new(Shared {
                endpoint,
                version: version.to_owned(),
                on_loopback: build(http_client::builder(timeouts.connect).no_proxy())?,
                elsewhere: build(http_client::builder(timeouts.connect))?,
                read: timeouts.read,
                call_limit: CALL_LIMIT,
                counts: Mutex::default(),
            }),
        })
    }

    /// What was asked of the service so far.
    pub fn requests(&self) -> RequestCounts {
        *self.shared.counts()
    }

    /// Looks for the entry `key`; else, key by key, for the newest that begins with `key` or one of
    /// `restore_keys`. `None` where there is no such entry.
    ///
    /// # Errors
    /// Where the service does not answer the question.
    pub async fn find(
        &self,
        key: &str,
        restore_keys: &[&str],
    ) -> Result<Option<Found>, CacheError> {
        let shared = &self.shared;
        shared.counts().lookups += 1;
        let found = shared.noted(match shared.endpoint.protocol {
            Protocol::V1 => shared.find_v1(key, restore_keys).await,
            Protocol::V2 => shared.find_v2(key, restore_keys).await,
        })?;
        shared.counts().lookup_hits += u64::from(found.is_some());
        Ok(found)
    }

    /// Reserves `key` for an upload of this client's. Version 1 services may refuse a `size`, in
    /// bytes, that is too large for them.
    ///
    /// # Errors
    /// Where the service does neither reserve the key nor say that it is taken.
    pub async fn reserve(&self, key: &str, size: Option<u64>) -> Result<Reserved, CacheError> {
        let shared = &self.shared;
        shared.counts().reservations += 1;
        let reserved = shared.noted(match shared.endpoint.protocol {
            Protocol::V1 => shared.reserve_v1(key, size).await,
            Protocol::V2 => shared.reserve_v2(key).await,
        })?;
        Ok(match reserved {
            Some(target) => Reserved::Upload(Upload {
                key: key.to_owned(),
                target,
            }),
            None => {
                shared.counts().conflicts += 1;
                Reserved::AlreadyExists
            }
        })
    }

    /// Uploads `body`, which has `size` bytes; in version 2 Azure takes up to 5,000 MiB. Memory does
    /// not depend on the size. The upload is not an entry until [`CacheClient::commit`]. It may be
    /// tried again, with all of the content.
    ///
    /// # Errors
    /// Where the service does not take it, takes nothing of it for as long as a byte may take, or
    /// where `body` fails or is of another size.
    pub async fn upload<S>(&self, upload: &Upload, size: u64, body: S) -> Result<(), CacheError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        let source = Arc::new(Mutex::new(Source::of(body)));
        let shared = &self.shared;
        shared.noted(shared.upload(&upload.target, size, source).await)
    }

    /// Makes `upload`, of which `size` bytes were uploaded, an entry.
    ///
    /// # Errors
    /// Where the service does not say that it has. [`CacheError::Gone`] where it knows no such
    /// upload, which is also what it may say of one that it has committed already.
    pub async fn commit(&self, upload: Upload, size: u64) -> Result<(), CacheError> {
        let shared = &self.shared;
        shared.noted(match upload.target {
            Target::Numbered(id) => shared.commit_v1(id, size).await,
            Target::Signed(_) => shared.commit_v2(&upload.key, size).await,
        })?;
        shared.counts().commits += 1;
        Ok(())
    }

    /// Downloads `range`, in bytes, of `found`: to its end where the range ends at [`u64::MAX`], as
    /// far as there is something where it ends behind it.
    ///
    /// # Errors
    /// Where the service gives no content, or another part of it than was asked for.
    /// [`CacheError::Gone`] also where the entry ends before the range begins.
    pub async fn download(&self, found: &Found, range: Range<u64>) -> Result<Download, CacheError> {
        self.shared.counts().downloads += 1;
        let download = self.shared.clone().download(&found.url, range).await;
        self.shared.noted(download)
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct FoundV2 {
    ok: bool,
    #[serde(alias = "signedDownloadUrl")]
    signed_download_url: String,
    #[serde(alias = "matchedKey")]
    matched_key: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct CreatedV2 {
    ok: bool,
    #[serde(alias = "signedUploadUrl")]
    signed_upload_url: String,
    message: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct FinalizedV2 {
    ok: bool,
    message: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FoundV1 {
    cache_key: String,
    archive_location: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReservedV1 {
    cache_id: u64,
}

/// What a service answered to a call.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Shared {
    fn counts(&self) -> MutexGuard<'_, RequestCounts> {
        // Numbers are whole whatever happened to who held the lock.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `result`, counted where it is an error.
    fn noted<T>(&self, result: Result<T, CacheError>) -> Result<T, CacheError> {
        match &result {
            Ok(_) => {}
            Err(CacheError::Throttled { .. }) => self.counts().throttled += 1,
            Err(_) => self.counts().failed += 1,
        }
        result
    }

    async fn find_v2(&self, key: &str, restore_keys: &[&str]) -> Result<Option<Found>, CacheError> {
        let mut request = json!({ "key": key, "version": self.version });
        // Twirp's JSON has no field for an empty list.
        if !restore_keys.is_empty() {
            request["restore_keys"] = json!(restore_keys);
        }
        let answer = self
            .twirp("GetCacheEntryDownloadURL", &request, true)
            .await?;
        if !answer.status.is_success() {
            return match Problem::of(&answer.body).code.as_str() {
                "not_found" => Ok(None),
                _ => Err(self.refusal(Asked::Service, &answer)),
            };
        }
        let found: FoundV2 = self.read_as(&answer)?;
        if !found.ok {
            return Ok(None);
        }
        if found.matched_key.is_empty() {
            return Err(self.unavailable("an entry without a key"));
        }
        Ok(Some(Found {
            key: found.matched_key,
            url: self.content_url(&found.signed_download_url)?,
        }))
    }

    async fn find_v1(&self, key: &str, restore_keys: &[&str]) -> Result<Option<Found>, CacheError> {
        let mut url = self.api(&format!("{REST}/cache"))?;
        let keys: Vec<&str> = [key].iter().chain(restore_keys).copied().collect();
        url.query_pairs_mut()
            .append_pair("keys", &keys.join(","))
            .append_pair("version", &self.version);
        let request = self.rest(Method::GET, url);
        let answer = self.call(request, true).await?;
        if answer.status == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        if !answer.status.is_success() {
            return Err(self.refusal(Asked::Service, &answer));
        }
        let found: FoundV1 = self.read_as(&answer)?;
        Ok(Some(Found {
            key: found.cache_key,
            url: self.content_url(&found.archive_location)?,
        }))
    }

    /// `None` where the key is taken.
    async fn reserve_v2(&self, key: &str) -> Result<Option<Target>, CacheError> {
        let request = json!({ "key": key, "version": self.version });
        let answer = self.twirp("CreateCacheEntry", &request, false).await?;
        if !answer.status.is_success() {
            return self.taken(&answer);
        }
        let created: CreatedV2 = self.read_as(&answer)?;
        if created.ok {
            let url = self.content_url(&created.signed_upload_url)?;
            return Ok(Some(Target::Signed(url)));
        }
        let problem = Problem::saying(created.message);
        if problem.is_conflict() {
            return Ok(None);
        }
        Err(self.not_ok(&problem))
    }

    /// `None` where the key is taken.
    async fn reserve_v1(&self, key: &str, size: Option<u64>) -> Result<Option<Target>, CacheError> {
        let mut request = json!({ "key": key, "version": self.version });
        if let Some(size) = size {
            request["cacheSize"] = size.into();
        }
        let url = self.api(&format!("{REST}/caches"))?;
        let request = with_json(self.rest(Method::POST, url), &request);
        let answer = self.call(request, false).await?;
        if !answer.status.is_success() {
            return self.taken(&answer);
        }
        let reserved: ReservedV1 = self.read_as(&answer)?;
        Ok(Some(Target::Numbered(reserved.cache_id)))
    }

    /// What the refusal of a reservation is: `None` where it only says that the key is taken.
    fn taken(&self, answer: &Answer) -> Result<Option<Target>, CacheError> {
        let problem = Problem::of(&answer.body);
        let is_conflict = answer.status == StatusCode::CONFLICT || problem.is_conflict();
        if is_conflict && !problem.is_denial() {
            return Ok(None);
        }
        Err(self.refusal(Asked::Service, answer))
    }

    async fn commit_v2(&self, key: &str, size: u64) -> Result<(), CacheError> {
        // Protobuf's JSON has 64-bit numbers as text.
        let request = json!({
            "key": key,
            "version": self.version,
            "size_bytes": size.to_string(),
        });
        let answer = self
            .twirp("FinalizeCacheEntryUpload", &request, false)
            .await?;
        if !answer.status.is_success() {
            return Err(self.refusal(Asked::Upload, &answer));
        }
        let finalized: FinalizedV2 = self.read_as(&answer)?;
        if finalized.ok {
            return Ok(());
        }
        Err(self.not_ok(&Problem::saying(finalized.message)))
    }

    async fn commit_v1(&self, id: u64, size: u64) -> Result<(), CacheError> {
        let url = self.api(&format!("{REST}/caches/{id}"))?;
        let request = with_json(self.rest(Method::POST, url), &json!({ "size": size }));
        let answer = self.call(request, false).await?;
        if answer.status.is_success() {
            return Ok(());
        }
        Err(self.refusal(Asked::Upload, &answer))
    }

    async fn upload<S>(
        self: &Arc<Self>,
        target: &Target,
        size: u64,
        source: Arc<Mutex<Source<S>>>,
    ) -> Result<(), CacheError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        match target {
            Target::Signed(url) => {
                let request = self
                    .http(url)
                    .put(url.clone())
                    .header("x-ms-blob-type", "BlockBlob");
                self.send_piece(request, Asked::Content, size, &source)
                    .await?;
            }
            Target::Numbered(id) => {
                let url = self.api(&format!("{REST}/caches/{id}"))?;
                let mut start = 0;
                while start < size {
                    let length = PIECE_SIZE.min(size - start);
                    let range = format!("bytes {start}-{}/*", start + length - 1);
                    let request = self
                        .rest(Method::PATCH, url.clone())
                        .header(CONTENT_RANGE, range);
                    self.send_piece(request, Asked::Upload, length, &source)
                        .await?;
                    start += length;
                }
            }
        }
        // What is uploaded would be a part of the content that looks like all of it.
        let more = future::poll_fn(|context| locked(&source).poll_bytes(context, 1));
        match timeout(self.read, more).await {
            Ok(None) => Ok(()),
            Ok(Some(Ok(_))) => Err(self.unavailable("the content is longer than its size")),
            Ok(Some(Err(error))) => Err(self.unavailable(error)),
            Err(_) => Err(self.unavailable("the content does not end")),
        }
    }

    /// Sends `request` with the next `length` bytes of `source`.
    async fn send_piece<S>(
        self: &Arc<Self>,
        request: RequestBuilder,
        asked: Asked,
        length: u64,
        source: &Arc<Mutex<Source<S>>>,
    ) -> Result<(), CacheError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        self.counts().uploads += 1;
        let end = locked(source).taken + length;
        let piece = piece(source.clone(), end).inspect_ok({
            let shared = self.clone();
            move |bytes| shared.counts().bytes_up += bytes.len() as u64
        });
        let request = request
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(CONTENT_LENGTH, length)
            .body(Body::wrap_stream(piece));
        let mut sending = pin!(request.send());
        let mut taken_before = locked(source).taken;
        // The read limit of the HTTP client would end an upload that takes longer than one byte may.
        let response = loop {
            if let Ok(response) = timeout(self.read, sending.as_mut()).await {
                break response;
            }
            let taken = locked(source).taken;
            if taken == taken_before {
                return Err(self.unavailable("an upload does not move"));
            }
            taken_before = taken;
        };
        // The connection's error would only say that there was one.
        if let Some(failure) = locked(source).failure.take() {
            return Err(self.unavailable(failure));
        }
        let response = response.map_err(|error| self.unreachable(error))?;
        if !response.status().is_success() {
            let answer = self.read_refusal(response).await;
            return Err(self.refusal(asked, &answer));
        }
        if locked(source).taken != end {
            return Err(self.unavailable("an upload was answered before it was received"));
        }
        Ok(())
    }

    async fn download(
        self: Arc<Self>,
        url: &Url,
        range: Range<u64>,
    ) -> Result<Download, CacheError> {
        if range.is_empty() {
            return Err(self.unavailable("an empty range was asked for"));
        }
        let header = match range.end {
            u64::MAX => format!("bytes={}-", range.start),
            end => format!("bytes={}-{}", range.start, end - 1),
        };
        let response = self.get(url, &header).await?;
        let content_range = response
            .headers()
            .get(CONTENT_RANGE)
            .and_then(|value| value.to_str().ok());
        let (total, start, length) = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let part = content_range
                    .and_then(ContentRange::parse)
                    .filter(|part| part.is_all_of(&range))
                    .ok_or_else(|| self.unavailable("another range than was asked for"))?;
                (part.total, part.first, part.last - part.first + 1)
            }
            StatusCode::OK => {
                let total = response
                    .content_length()
                    .ok_or_else(|| self.unavailable("content of unknown size"))?;
                (total, 0, total)
            }
            // No range begins in an entry that is empty.
            StatusCode::RANGE_NOT_SATISFIABLE
                if range.start == 0 && content_range == Some("bytes */0") =>
            {
                return Ok(Download {
                    total: 0,
                    start: 0,
                    stream: stream::empty().boxed(),
                });
            }
            _ => {
                let answer = self.read_refusal(response).await;
                return Err(self.refusal(Asked::Content, &answer));
            }
        };
        Ok(Download {
            total,
            start,
            stream: self.content(response, length).boxed(),
        })
    }

    /// The body of `response`, which must have `length` bytes.
    fn content(
        self: Arc<Self>,
        response: Response,
        length: u64,
    ) -> impl Stream<Item = io::Result<Bytes>> {
        let shared = self.clone();
        stream::try_unfold((response, length), move |(mut response, left)| {
            let shared = shared.clone();
            async move {
                let early = |kind, cause: &str| {
                    let text = format!("{left} bytes of the content are missing: {cause}");
                    Err(io::Error::new(kind, shared.printable(&text)))
                };
                let bytes = match timeout(shared.read, response.chunk()).await {
                    Ok(Ok(Some(bytes))) => bytes,
                    Ok(Ok(None)) if left == 0 => return Ok(None),
                    Ok(Ok(None)) => return early(ErrorKind::UnexpectedEof, "it ended"),
                    Ok(Err(error)) => {
                        let cause = with_causes(&error.without_url());
                        return early(ErrorKind::UnexpectedEof, &cause);
                    }
                    Err(_) => return early(ErrorKind::TimedOut, "no more came"),
                };
                let length = bytes.len() as u64;
                shared.counts().bytes_down += length;
                match left.checked_sub(length) {
                    Some(left) => Ok(Some((bytes, (response, left)))),
                    None => Err(io::Error::new(
                        ErrorKind::InvalidData,
                        "the content is longer than it should be",
                    )),
                }
            }
        })
        .inspect_err(move |_| self.counts().failed += 1)
    }

    /// The answer for the bytes `range` of `url`, from wherever it leads. No token goes along.
    async fn get(&self, url: &Url, range: &str) -> Result<Response, CacheError> {
        let mut url = url.clone();
        for _ in 0..=REDIRECT_LIMIT {
            let request = self.http(&url).get(url.clone()).header(RANGE, range);
            let response = self.send(request, true).await?;
            match redirect(&url, &response) {
                Some(next) => url = next,
                None => return Ok(response),
            }
        }
        Err(self.unavailable("the content is always elsewhere"))
    }

    /// The HTTP client for `url`.
    fn http(&self, url: &Url) -> &reqwest::Client {
        if http_client::is_on_loopback(url) {
            &self.on_loopback
        } else {
            &self.elsewhere
        }
    }

    /// The service's URL for `path`.
    fn api(&self, path: &str) -> Result<Url, CacheError> {
        let url = self.endpoint.url.join(path);
        url.map_err(|error| self.unavailable(error))
    }

    /// A request of version 1 to `url`, which must be the service's own.
    fn rest(&self, method: Method, url: Url) -> RequestBuilder {
        let request = self.http(&url).request(method, url);
        let request = match self.endpoint.token.reveal() {
            "" => request,
            token => request.bearer_auth(token),
        };
        // `createAcceptHeader` of `@actions/cache`; GitHub Enterprise Server chooses by it.
        request.header(ACCEPT, "application/json;api-version=6.0-preview.1")
    }

    async fn twirp(
        &self,
        method: &str,
        request: &Value,
        again: bool,
    ) -> Result<Answer, CacheError> {
        let url = self.api(&format!("{TWIRP}/{method}"))?;
        let call = self
            .http(&url)
            .post(url)
            .bearer_auth(self.endpoint.token.reveal())
            .header(ACCEPT, "application/json");
        self.call(with_json(call, request), again).await
    }

    /// The answer to a call of the API, whatever it says.
    async fn call(&self, request: RequestBuilder, again: bool) -> Result<Answer, CacheError> {
        let call = async {
            let response = self.send(request, again).await?;
            if !response.status().is_success() {
                return Ok(self.read_refusal(response).await);
            }
            let (status, headers) = (response.status(), response.headers().clone());
            Ok(Answer {
                status,
                headers,
                body: self.read(response).await?,
            })
        };
        timeout(self.call_limit, call)
            .await
            .unwrap_or_else(|_| Err(self.too_slow(self.call_limit)))
    }

    /// Sends `request`, and with `again` once more where its connection was closed before there was
    /// an answer: a server closes idle connections, also the one that is just being used.
    async fn send(&self, request: RequestBuilder, again: bool) -> Result<Response, CacheError> {
        let second = request.try_clone().filter(|_| again);
        let first = timeout(self.read, request.send()).await;
        let sent = match (first, second) {
            (Ok(Err(error)), Some(second)) if was_closed(&error) => {
                timeout(self.read, second.send()).await
            }
            (first, _) => first,
        };
        match sent {
            Ok(response) => response.map_err(|error| self.unreachable(error)),
            Err(_) => Err(self.too_slow(self.read)),
        }
    }

    /// The body of `response`, which is a short one.
    async fn read(&self, mut response: Response) -> Result<Vec<u8>, CacheError> {
        let read = async {
            let mut body = Vec::new();
            while let Some(bytes) = response.chunk().await? {
                if body.len() + bytes.len() > ANSWER_LIMIT {
                    return Ok(None);
                }
                body.extend_from_slice(&bytes);
            }
            Ok(Some(body))
        };
        match timeout(self.read, read).await {
            Ok(Ok(Some(body))) => Ok(body),
            Ok(Ok(None)) => Err(self.unavailable("an answer that does not end")),
            Ok(Err(error)) => Err(self.unreachable(error)),
            Err(_) => Err(self.too_slow(self.read)),
        }
    }

    /// A response that is no success, with as much of an explanation as can be had.
    async fn read_refusal(&self, response: Response) -> Answer {
        Answer {
            status: response.status(),
            headers: response.headers().clone(),
            body: self.read(response).await.unwrap_or_default(),
        }
    }

    fn read_as<T: DeserializeOwned>(&self, answer: &Answer) -> Result<T, CacheError> {
        serde_json::from_slice(&answer.body).map_err(|error| {
            self.unavailable(format_args!("an answer that makes no sense: {error}"))
        })
    }

    /// The URL of content, as the service gave it.
    fn content_url(&self, url: &str) -> Result<Url, CacheError> {
        // The text is a secret, and not in the error.
        Url::parse(url).map_err(|error| self.unavailable(format_args!("an address: {error}")))
    }

    fn printable(&self, text: &str) -> String {
        printable(text, self.endpoint.token.reveal())
    }

    fn refusal(&self, asked: Asked, answer: &Answer) -> CacheError {
        refusal(asked, answer, SystemTime::now(), |text| {
            self.printable(text)
        })
    }

    /// The error for an answer that is a success by its status and not by its text.
    fn not_ok(&self, problem: &Problem) -> CacheError {
        if problem.is_denial() {
            return CacheError::Denied(self.printable(&problem.message));
        }
        self.unavailable(format_args!("not done: {}", problem.message))
    }

    fn unavailable(&self, reason: impl fmt::Display) -> CacheError {
        CacheError::Unavailable(self.printable(&reason.to_string()))
    }

    fn unreachable(&self, error: reqwest::Error) -> CacheError {
        let host = error.url().and_then(Url::host_str).map(str::to_owned);
        let cause = with_causes(&error.without_url());
        match host {
            Some(host) => self.unavailable(format_args!("{host}: {cause}")),
            None => self.unavailable(cause),
        }
    }

    fn too_slow(&self, limit: Duration) -> CacheError {
        self.unavailable(format_args!("no answer within {limit:?}"))
    }
}

fn with_json(request: RequestBuilder, body: &Value) -> RequestBuilder {
    request
        .header(CONTENT_TYPE, "application/json")
        .body(body.to_string())
}

/// Whether a request may be repeated because the server cannot have answered it.
fn was_closed(error: &reqwest::Error) -> bool {
    (error.is_connect() || error.is_request()) && !error.is_timeout()
}

/// Where `response`, which came from `url`, leads to.
fn redirect(url: &Url, response: &Response) -> Option<Url> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return None;
    }
    let location = response.headers().get(LOCATION)?.to_str().ok()?;
    url.join(location).ok()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The content of an upload, of which several requests take their pieces.
struct Source<S> {
    stream: Pin<Box<S>>,
    /// What the stream gave and no request took yet.
    rest: Bytes,
    /// How many bytes were taken.
    taken: u64,
    /// Why a piece could not be had.
    failure: Option<String>,
}

impl<S: Stream<Item = io::Result<Bytes>>> Source<S> {
    fn of(stream: S) -> Self {
        Self {
            stream: Box::pin(stream),
            rest: Bytes::new(),
            taken: 0,
            failure: None,
        }
    }

    /// The next bytes, of which there are at most `limit`.
    fn poll_bytes(
        &mut self,
        context: &mut Context<'_>,
        limit: usize,
    ) -> Poll<Option<io::Result<Bytes>>> {
        while self.rest.is_empty() {
            match ready!(self.stream.as_mut().poll_next(context)) {
                Some(Ok(bytes)) => self.rest = bytes,
                end => return Poll::Ready(end),
            }
        }
        let bytes = self.rest.split_to(limit.min(self.rest.len()));
        self.taken += bytes.len() as u64;
        Poll::Ready(Some(Ok(bytes)))
    }

    /// The next bytes of the content before `end`.
    fn poll_until(
        &mut self,
        context: &mut Context<'_>,
        end: u64,
    ) -> Poll<Option<io::Result<Bytes>>> {
        let left = usize::try_from(end - self.taken).unwrap_or(usize::MAX);
        if left == 0 {
            return Poll::Ready(None);
        }
        let error = match ready!(self.poll_bytes(context, left.min(WRITE_SIZE))) {
            Some(Ok(bytes)) => return Poll::Ready(Some(Ok(bytes))),
            Some(Err(error)) => error,
            None => io::Error::new(
                ErrorKind::UnexpectedEof,
                "the content is shorter than its size",
            ),
        };
        self.failure = Some(error.to_string());
        Poll::Ready(Some(Err(error)))
    }
}

/// The content of `source` up to `end`, as the body of one request.
fn piece<S>(
    source: Arc<Mutex<Source<S>>>,
    end: u64,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static
where
    S: Stream<Item = io::Result<Bytes>> + Send + 'static,
{
    stream::poll_fn(move |context| locked(&source).poll_until(context, end))
}

/// What a request was for, by which its refusal is understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// The service, with the token.
    Service,
    /// The service, with the token, about an upload that was reserved.
    Upload,
    /// Content under a signed URL.
    Content,
}

/// What an answer means that is no success. `printable` makes a text of the service's fit to show.
fn refusal(
    asked: Asked,
    answer: &Answer,
    now: SystemTime,
    printable: impl Fn(&str) -> String,
) -> CacheError {
    let problem = Problem::of(&answer.body);
    let text = || printable(&format!("{}: {}", answer.status, problem.message));
    if asked != Asked::Content && problem.is_denial() {
        return CacheError::Denied(text());
    }
    let retry_after = http_client::retry_after(&answer.headers, now, WAIT_LIMIT);
    match answer.status {
        StatusCode::TOO_MANY_REQUESTS => CacheError::Throttled { retry_after },
        StatusCode::SERVICE_UNAVAILABLE if retry_after.is_some() => {
            CacheError::Throttled { retry_after }
        }
        // Twirp has had other statuses for it than 429.
        _ if problem.code == "resource_exhausted" => CacheError::Throttled { retry_after },
        StatusCode::NOT_FOUND | StatusCode::GONE if asked != Asked::Service => CacheError::Gone,
        // No token was sent, so these are about the URL.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::RANGE_NOT_SATISFIABLE
            if asked == Asked::Content =>
        {
            CacheError::Gone
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => CacheError::Denied(text()),
        _ => CacheError::Unavailable(text()),
    }
}

/// What a service says of an error: Twirp has `code` and `msg`, GitHub's REST `message`, that of
/// `act` and Gitea `error`, Azure the XML elements `Code` and `Message`.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Problem {
    code: String,
    #[serde(alias = "msg", alias = "error")]
    message: String,
}

impl Problem {
    fn of(body: &[u8]) -> Self {
        if let Ok(problem) = serde_json::from_slice(body) {
            return problem;
        }
        let text = String::from_utf8_lossy(body);
        match (element(&text, "Code"), element(&text, "Message")) {
            (Some(code), message) => Self {
                code: code.to_owned(),
                message: format!("{code}: {}", message.unwrap_or_default()),
            },
            _ => Self::saying(text.into_owned()),
        }
    }

    fn saying(message: String) -> Self {
        Self {
            code: String::new(),
            message,
        }
    }

    /// Whether it is about what the token allows, or about the repository's quota. The texts are
    /// those that `@actions/cache` knows them by (`cache.ts`, `errors.ts`).
    fn is_denial(&self) -> bool {
        matches!(self.code.as_str(), "permission_denied" | "unauthenticated")
            || self.message.starts_with("cache write denied")
            || self.message.starts_with("cache read denied")
            || self.message.contains("insufficient usage")
    }

    /// Whether it says that a key is taken. Not all services have a status of their own for it.
    fn is_conflict(&self) -> bool {
        self.code == "already_exists" || self.message.to_ascii_lowercase().contains("already exist")
    }
}

/// The text of the first XML element `name`.
fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    Some(text)
}

/// What a `Content-Range` says of an answer's content. All in bytes, and `last` is part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ContentRange {
    first: u64,
    last: u64,
    total: u64,
}

impl ContentRange {
    /// Reads `bytes FIRST-LAST/TOTAL` (RFC 9110, 14.4).
    fn parse(value: &str) -> Option<Self> {
        let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let range = Self {
            first: number(first)?,
            last: number(last)?,
            total: number(total)?,
        };
        (range.first <= range.last && range.last < range.total).then_some(range)
    }

    /// Whether this is what there is of `asked`, no more and no less.
    fn is_all_of(self, asked: &Range<u64>) -> bool {
        self.first == asked.start && self.last == asked.end.min(self.total) - 1
    }
}

/// `text` in a form that may be shown: one line, not long, without `token` and without the queries
/// of URLs, which may be signatures.
fn printable(text: &str, token: &str) -> String {
    let text = match token {
        "" => text.to_owned(),
        token => text.replace(token, "***"),
    };
    let words: Vec<String> = text
        .split(|character: char| character.is_whitespace() || character.is_control())
        .filter(|word| !word.is_empty())
        .map(|word| match word.split_once('?') {
            Some((before, query)) if query.contains('=') => format!("{before}?***"),
            _ => word.to_owned(),
        })
        .collect();
    let line = words.join(" ");
    match line.char_indices().nth(TEXT_LIMIT) {
        Some((cut, _)) => line[..cut].to_owned(),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use reqwest::header::{HeaderName, HeaderValue, RETRY_AFTER};

    use super::*;

    const GITHUB: &[(&str, &str)] = &[
        ("ACTIONS_RUNTIME_TOKEN", "hunter2"),
        ("ACTIONS_RESULTS_URL", "https://results.example/"),
        ("ACTIONS_CACHE_URL", "https://cache.example/run"),
    ];

    fn endpoint(changes: &[(&str, &str)]) -> Option<Endpoint> {
        Endpoint::of(&GITHUB.iter().chain(changes).copied().collect())
    }

    #[test]
    fn the_protocol_is_chosen_by_the_jobs_server() {
        let v2 = (Protocol::V2, "https://results.example/");
        let v1 = (Protocol::V1, "https://cache.example/run/");
        for (server, expected) in [
            ("", v2),
            ("https://github.com", v2),
            ("https://GitHub.com ", v2),
            ("https://tenant.GHE.com/", v2),
            ("http://github.localhost:3000", v2),
            ("https://ghes.example", v1),
            ("https://notgithub.com", v1),
            ("https://github.com.example", v1),
            ("https://ghe.com", v1),
            ("no URL", v1),
        ] {
            let endpoint = endpoint(&[("GITHUB_SERVER_URL", server)]).unwrap();
            assert_eq!(
                (endpoint.protocol, endpoint.url.as_str()),
                expected,
                "{server}"
            );
        }
    }

    #[test]
    fn a_missing_url_is_made_up_for_by_the_other() {
        let forge = ("GITHUB_SERVER_URL", "https://forge.example");
        let without = |name, changes: &[(&str, &str)]| {
            let changes: Vec<_> = changes.iter().copied().chain([(name, "")]).collect();
            let endpoint = endpoint(&changes)?;
            Some((endpoint.protocol, endpoint.url.to_string()))
        };
        let v1 = |url: &str| Some((Protocol::V1, url.to_owned()));
        assert_eq!(
            without("ACTIONS_RESULTS_URL", &[]),
            v1("https://cache.example/run/")
        );
        assert_eq!(
            without("ACTIONS_CACHE_URL", &[forge]),
            v1("https://results.example/")
        );
        assert_eq!(without("ACTIONS_RUNTIME_TOKEN", &[]), None);
        let no_results = ("ACTIONS_RESULTS_URL", "");
        assert_eq!(without("ACTIONS_CACHE_URL", &[no_results]), None);
    }

    #[test]
    fn version_1_is_used_without_a_token_and_version_2_is_not() {
        let no_token = ("ACTIONS_RUNTIME_TOKEN", "");
        for (name, value, expected) in [
            ("ACT", "true", Some(Protocol::V1)),
            (
                "GITHUB_SERVER_URL",
                "https://forge.example",
                Some(Protocol::V1),
            ),
            ("ACTIONS_RESULTS_URL", "", Some(Protocol::V1)),
            ("GITHUB_SERVER_URL", "https://github.com", None),
        ] {
            let endpoint = endpoint(&[no_token, (name, value)]);
            let protocol = endpoint.as_ref().map(|endpoint| endpoint.protocol);
            assert_eq!(protocol, expected, "{name}={value}");
            assert!(endpoint.is_none_or(|endpoint| endpoint.token.reveal().is_empty()));
        }
    }

    #[test]
    fn act_has_version_1_unless_it_says_otherwise() {
        let protocol = |changes| endpoint(changes).unwrap().protocol;
        assert_eq!(protocol(&[("ACT", "true")]), Protocol::V1);
        let v2 = [("ACT", "true"), ("ACTIONS_CACHE_SERVICE_V2", "on")];
        assert_eq!(protocol(&v2), Protocol::V2);
    }

    #[test]
    fn a_url_ends_in_a_slash_and_is_one_of_http() {
        let url = |url| {
            let endpoint = endpoint(&[("ACTIONS_RESULTS_URL", url)])?;
            Some(endpoint.url.to_string())
        };
        let joined = Some("http://host:1/a/b/".to_owned());
        assert_eq!(url("http://host:1/a/b"), joined);
        assert_eq!(url("http://host:1/a/b/?x=1#y"), joined);
        assert_eq!(url("file:///a/"), None);
        assert_eq!(url("host"), None);
    }

    #[test]
    fn an_endpoint_is_handed_on_whole_and_shown_without_its_secrets() {
        let endpoint = endpoint(&[("ACTIONS_RESULTS_URL", "https://host/secret")]).unwrap();
        let text = serde_json::to_string(&endpoint).unwrap();
        assert_eq!(serde_json::from_str::<Endpoint>(&text).unwrap(), endpoint);
        let client = CacheClient::new(endpoint.clone(), "v", Timeouts::default()).unwrap();
        for shown in [format!("{endpoint:?}"), format!("{client:?}")] {
            assert!(shown.contains("https://host"), "{shown}");
            assert!(
                !shown.contains("hunter2") && !shown.contains("secret"),
                "{shown}"
            );
        }
    }

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        let pair = |(name, value): &(HeaderName, &str)| {
            (name.clone(), HeaderValue::from_str(value).unwrap())
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn a_content_range_is_read_strictly() {
        let range = |first, last, total| Some(ContentRange { first, last, total });
        assert_eq!(ContentRange::parse("bytes 0-0/1"), range(0, 0, 1));
        assert_eq!(ContentRange::parse("bytes 5-9/10"), range(5, 9, 10));
        for wrong in [
            "",
            "bytes",
            "bytes */10",
            "bytes 0-9/*",
            "bytes 5-4/10",
            "bytes 5-10/10",
            "bytes -5/10",
            "items 0-9/10",
            "bytes 0-18446744073709551615/18446744073709551616",
        ] {
            assert_eq!(ContentRange::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_part_must_be_what_was_asked_for() {
        let part = |first, last, total| ContentRange { first, last, total };
        assert!(part(2, 4, 10).is_all_of(&(2..5)));
        assert!(part(2, 9, 10).is_all_of(&(2..u64::MAX)));
        assert!(part(2, 9, 10).is_all_of(&(2..11)));
        assert!(!part(1, 4, 10).is_all_of(&(2..5)));
        assert!(!part(2, 3, 10).is_all_of(&(2..5)));
        assert!(!part(2, 5, 10).is_all_of(&(2..5)));
        assert!(!part(2, 8, 10).is_all_of(&(2..u64::MAX)));
    }

    #[test]
    fn a_refusal_is_understood_by_what_was_asked() {
        use Asked::{Content, Service, Upload};
        let throttled = |seconds: Option<u64>| CacheError::Throttled {
            retry_after: seconds.map(Duration::from_secs),
        };
        let denied = |text: &str| CacheError::Denied(text.to_owned());
        let unavailable = |text: &str| CacheError::Unavailable(text.to_owned());
        let twirp_denied = r#"{"code":"permission_denied","msg":"no"}"#;
        let write_denied = r#"{"message":"cache write denied: no"}"#;
        let quota = r#"{"code":"resource_exhausted","msg":"insufficient usage to create"}"#;
        let azure = "<?xml?><Error><Code>AuthenticationFailed</Code><Message>x</Message></Error>";
        for (asked, status, wait, body, expected) in [
            (Service, 429, Some("3"), "", throttled(Some(3))),
            (Content, 429, None, "", throttled(None)),
            (Service, 503, Some("3"), "", throttled(Some(3))),
            (
                Service,
                503,
                None,
                "down",
                unavailable("503 Service Unavailable: down"),
            ),
            (
                Service,
                403,
                None,
                r#"{"code":"resource_exhausted"}"#,
                throttled(None),
            ),
            (
                Service,
                429,
                None,
                quota,
                denied("429 Too Many Requests: insufficient usage to create"),
            ),
            (
                Service,
                403,
                None,
                twirp_denied,
                denied("403 Forbidden: no"),
            ),
            (
                Service,
                400,
                None,
                twirp_denied,
                denied("400 Bad Request: no"),
            ),
            (
                Upload,
                409,
                None,
                write_denied,
                denied("409 Conflict: cache write denied: no"),
            ),
            (
                Service,
                401,
                None,
                r#"{"error":"who?"}"#,
                denied("401 Unauthorized: who?"),
            ),
            (Content, 403, None, azure, CacheError::Gone),
            (Content, 401, None, "", CacheError::Gone),
            (Content, 404, None, "", CacheError::Gone),
            (Content, 410, None, "", CacheError::Gone),
            (Content, 416, None, "", CacheError::Gone),
            (Upload, 404, None, "", CacheError::Gone),
            (Service, 404, None, "", unavailable("404 Not Found:")),
            (Service, 302, None, "", unavailable("302 Found:")),
            (
                Content,
                500,
                None,
                "",
                unavailable("500 Internal Server Error:"),
            ),
        ] {
            let answer = Answer {
                status: StatusCode::from_u16(status).unwrap(),
                headers: wait.map_or_else(HeaderMap::new, |wait| headers(&[(RETRY_AFTER, wait)])),
                body: body.as_bytes().to_vec(),
            };
            let printable = |text: &str| printable(text, "hunter2");
            let error = refusal(asked, &answer, SystemTime::UNIX_EPOCH, printable);
            assert_eq!(error, expected, "{asked:?} {status} {body}");
        }
    }

    #[test]
    fn a_key_that_is_taken_is_known_by_any_services_words() {
        for body in [
            r#"{"code":"already_exists","msg":"no"}"#,
            r#"{"message":"Cache already exists. Scope: refs/heads/main"}"#,
            r#"{"error":"already exist"}"#,
        ] {
            assert!(Problem::of(body.as_bytes()).is_conflict(), "{body}");
        }
        assert!(!Problem::of(b"{}").is_conflict());
    }

    #[test]
    fn what_is_shown_is_one_short_line_without_secrets() {
        let shown = |text: &str| printable(text, "hunter2");
        assert_eq!(shown(" a\n\u{1b}b\tc "), "a b c");
        assert_eq!(
            shown("Bearer hunter2, Bearer hunter22"),
            "Bearer ***, Bearer ***2"
        );
        assert_eq!(
            shown("at https://h/c/b?se=1&sig=x now?"),
            "at https://h/c/b?*** now?"
        );
        assert_eq!(shown(r#"{"url":"/b?sig=x","a":1}"#), r#"{"url":"/b?***"#);
        assert_eq!(shown(&"ö".repeat(300)), "ö".repeat(200));
        assert_eq!(printable("ab", ""), "ab");
    }

    #[tokio::test]
    async fn a_call_ends_by_its_limit_whatever_a_byte_may_take() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        for server in ["https://github.com", "https://ghes.example"] {
            let endpoint = endpoint(&[
                ("GITHUB_SERVER_URL", server),
                ("ACTIONS_RESULTS_URL", &url),
                ("ACTIONS_CACHE_URL", &url),
            ]);
            let mut client = CacheClient::new(endpoint.unwrap(), "v", Timeouts::default()).unwrap();
            let shared = Arc::get_mut(&mut client.shared).unwrap();
            assert_eq!(shared.call_limit, Duration::from_secs(30));
            shared.call_limit = Duration::from_millis(100);
            let target = match shared.endpoint.protocol {
                Protocol::V1 => Target::Numbered(1),
                Protocol::V2 => Target::Signed(url.parse().unwrap()),
            };
            let key = "key".to_owned();
            let begin = std::time::Instant::now();
            let errors = [
                client.find("key", &[]).await.unwrap_err(),
                client.reserve("key", None).await.unwrap_err(),
                client.commit(Upload { key, target }, 1).await.unwrap_err(),
            ];
            // Before the limit of a single byte.
            assert!(
                begin.elapsed() < Duration::from_secs(15),
                "{:?}",
                begin.elapsed()
            );
            let slow = CacheError::Unavailable("no answer within 100ms".to_owned());
            assert!(errors.iter().all(|error| *error == slow), "{errors:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_of_a_services_can_show_a_token_or_be_long(
            before in ".{0,40}", between in "[ ?&=\\n]{0,3}", after in ".{0,300}",
        ) {
            let text = format!("{before}s3cret{between}s3cret{after}");
            let shown = printable(&text, "s3cret");
            prop_assert!(!shown.contains("s3cret"));
            prop_assert!(shown.chars().count() <= 200);
        }

        #[test]
        fn no_content_range_leaves_its_content(value in "bytes [0-9]{1,20}-[0-9]{1,20}/[0-9]{1,20}") {
            if let Some(range) = ContentRange::parse(&value) {
                prop_assert!(range.first <= range.last && range.last < range.total);
            }
        }
    }
}
