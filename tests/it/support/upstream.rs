//! A small copy of GitHub's cache service, on 127.0.0.1: the service on a temporary store, behind
//! the properties of GitHub's: distance, a limit on uploads, and now and then a fault.

use std::collections::VecDeque;
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, DATE, RETRY_AFTER};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::{StreamExt, TryStreamExt, stream};
use sccache_action::cache_protocol::auth::{Access, Tokens, UrlSigner};
use sccache_action::cache_protocol::store::Scope;
use sccache_action::cache_protocol::temporary::TemporaryStore;
use sccache_action::cache_protocol::{self, AppState};
use sccache_action::http::BearerToken;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// The span that the limit on uploads holds for.
const WINDOW: Duration = Duration::from_secs(60);

/// The scope that [`Upstream::token`] reads and writes.
pub const DEFAULT_BRANCH: &str = "refs/heads/main";

/// How far away the upstream is, and what it allows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The additional time of each call of the API.
    pub api_latency: Duration,
    /// The additional time of each request for content, up or down.
    pub blob_latency: Duration,
    /// How many reservations are granted in any 60 seconds; without it all are.
    pub uploads_per_minute: Option<u32>,
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The answer to every request is this status, with a `Retry-After` of this many seconds.
    Status(StatusCode, Option<u64>),
    /// Every reservation is; other requests are answered as ever.
    RefuseWrites(StatusCode, Option<u64>),
    /// Reservations and commits are answered as those of a token that may only read.
    DenyWrites,
    /// Requests get no answer.
    Hang,
    /// Downloads promise their full length, give half of it, and break off.
    TruncateDownloads,
    /// The byte at this offset of each download that has one has a bit flipped. A download of a
    /// range counts from the range's begin.
    FlipBytes {
        /// The offset.
        offset: u64,
    },
    /// Downloads promise their full length and give a byte every so often.
    Trickle {
        /// How often.
        every: Duration,
    },
    /// Look-ups find entries whose content is gone: downloads are answered with 404.
    LoseBlobs,
}

/// The requests to the upstream. A request counts when it comes, whatever its answer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Look-ups.
    pub lookups: u64,
    /// Reservations: the creation of an entry.
    pub reservations: u64,
    /// Requests with content.
    pub uploads: u64,
    /// Commits: an upload is made an entry.
    pub commits: u64,
    /// Requests for content.
    pub downloads: u64,
    /// Requests of no kind that is known.
    pub others: u64,
    /// Requests refused with 429, which are counted as what they are besides.
    pub refused: u64,
    /// Bytes of content received.
    pub bytes_up: u64,
    /// Bytes of content sent.
    pub bytes_down: u64,
}

impl Counts {
    /// The counts since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            lookups: self.lookups - earlier.lookups,
            reservations: self.reservations - earlier.reservations,
            uploads: self.uploads - earlier.uploads,
            commits: self.commits - earlier.commits,
            downloads: self.downloads - earlier.downloads,
            others: self.others - earlier.others,
            refused: self.refused - earlier.refused,
            bytes_up: self.bytes_up - earlier.bytes_up,
            bytes_down: self.bytes_down - earlier.bytes_down,
        }
    }

    /// Requests of all kinds.
    pub fn requests(&self) -> u64 {
        self.lookups
            + self.reservations
            + self.uploads
            + self.commits
            + self.downloads
            + self.others
    }
}

/// A running upstream with an empty store. It ends when it is dropped, as if killed.
pub struct Upstream {
    /// Its address as `ACTIONS_RESULTS_URL` and `ACTIONS_CACHE_URL` have it.
    pub url: String,
    /// A runtime token for [`DEFAULT_BRANCH`].
    pub token: String,
    front: Arc<Front>,
    shared: Arc<AppState<TemporaryStore>>,
    store: TemporaryStore,
    runtime: Option<Runtime>,
    _folder: TempDir,
}

/// The layers before the service.
struct Front {
    options: Options,
    counts: Mutex<Counts>,
    fault: Mutex<Option<Fault>>,
    /// How many seconds the service's clock is before this machine's.
    behind: Mutex<u64>,
    /// When the reservations of the last [`WINDOW`] were granted, the oldest first.
    granted: Mutex<VecDeque<Instant>>,
}

impl Upstream {
    /// Starts one, in its own threads: the caller may be in a runtime or outside of one.
    pub fn start(options: Options) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("upstream")
            .enable_all()
            .build()
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let store = TemporaryStore::open(folder.path()).unwrap();
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(AppState::new(
            store.clone(),
            Tokens::default(),
            address,
            UrlSigner::random().unwrap(),
        ));
        let front = Arc::new(Front {
            options,
            counts: Mutex::default(),
            fault: Mutex::default(),
            behind: Mutex::default(),
            granted: Mutex::default(),
        });
        let router = cache_protocol::router(shared.clone())
            .layer(middleware::from_fn_with_state(front.clone(), answer));
        {
            let _entered = runtime.enter();
            let listener = TcpListener::from_std(listener).unwrap();
            runtime.spawn(axum::serve(listener, router).into_future());
        }
        let mut upstream = Self {
            url: format!("http://{address}/"),
            token: String::new(),
            front,
            shared,
            store,
            runtime: Some(runtime),
            _folder: folder,
        };
        upstream.token = upstream.token_for(Some(DEFAULT_BRANCH), &[]);
        upstream
    }

    /// A new runtime token that reads and writes the scope `write` and only reads those of `read`,
    /// which are looked in after it, in this order.
    pub fn token_for(&self, write: Option<&str>, read: &[&str]) -> String {
        let read = read.iter().filter(|scope| Some(**scope) != write);
        let permissions: Vec<(&str, u8)> = write
            .map(|scope| (scope, READ | WRITE))
            .into_iter()
            .chain(read.map(|scope| (*scope, READ)))
            .collect();
        let token = runtime_token(&permissions);
        let scopes = permissions.iter().map(|(scope, _)| Scope::from(*scope));
        let access = Access {
            write: write.map(Scope::from),
            read: scopes.collect(),
        };
        self.shared.add_token(&BearerToken::new(&token), access);
        token
    }

    /// The requests so far.
    pub fn counts(&self) -> Counts {
        *lock(&self.front.counts)
    }

    /// How many requests were of version 1 of the protocol.
    pub fn version_1(&self) -> u64 {
        self.shared.counters().version_1
    }

    /// From here on this fault occurs, or none. Requests that wait for an answer are as they were.
    pub fn set_fault(&self, fault: Option<Fault>) {
        *lock(&self.front.fault) = fault;
    }

    /// From here on the service's clock is this far before this machine's.
    pub fn set_clock_behind(&self, by: Duration) {
        *lock(&self.front.behind) = by.as_secs();
    }

    /// Holds no upload so far against the limit, as if a minute had passed.
    pub fn forget_uploads(&self) {
        lock(&self.front.granted).clear();
    }

    /// The bytes of all entries.
    pub fn stored(&self) -> u64 {
        self.store.stored()
    }

    /// Loses the content of the entry that was committed first.
    pub fn lose_first_entry(&self) {
        let files = self.store.first_entry();
        assert!(!files.is_empty());
        for file in files {
            std::fs::remove_file(file).unwrap();
        }
    }

    /// Ends it at once: it cuts requests in flight off, and new ones find no server.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.kill();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bits of a scope's permission.
const READ: u8 = 1;
const WRITE: u8 = 2;

/// A token in the form of those that GitHub gives a job: a JWT with the cache's scopes in its claim
/// `ac`, as JSON in a string. Its signature is random.
fn runtime_token(permissions: &[(&str, u8)]) -> String {
    let scopes: Vec<Value> = permissions
        .iter()
        .map(|(scope, permission)| json!({ "Scope": scope, "Permission": permission }))
        .collect();
    let header = json!({ "typ": "JWT", "alg": "RS256" });
    let claims = json!({
        "iss": "https://token.actions.githubusercontent.com",
        "ac": Value::from(scopes).to_string(),
    });
    let [header, claims] = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
    let mut signature = [0; 32];
    getrandom::fill(&mut signature).unwrap();
    let signature = URL_SAFE_NO_PAD.encode(signature);
    format!("{header}.{claims}.{signature}")
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Lookup,
    Reservation,
    Upload,
    Commit,
    Download,
    Other,
}

impl Kind {
    fn of(method: &Method, path: &str) -> Self {
        const V1: &str = "/_apis/artifactcache/cache";
        let method = method.as_str();
        match path.rsplit('/').next() {
            _ if path.starts_with("/uploads/") => Self::Upload,
            _ if path.starts_with("/entries/") => Self::Download,
            Some("GetCacheEntryDownloadURL") => Self::Lookup,
            Some("CreateCacheEntry") => Self::Reservation,
            Some("FinalizeCacheEntryUpload") => Self::Commit,
            _ => match (method, path.strip_prefix(V1)) {
                ("GET", Some("")) => Self::Lookup,
                ("POST", Some("s")) => Self::Reservation,
                ("PATCH", Some(_)) => Self::Upload,
                ("POST", Some(_)) => Self::Commit,
                _ => Self::Other,
            },
        }
    }
}

/// The protocol by which a request's path is answered, errors included.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Twirp,
    Rest,
    Blob,
}

impl Protocol {
    fn of(path: &str) -> Self {
        match path {
            _ if path.starts_with("/twirp/") => Self::Twirp,
            _ if path.starts_with("/_apis/") => Self::Rest,
            _ => Self::Blob,
        }
    }

    fn refusal(self, status: StatusCode, message: &str) -> Response {
        match self {
            Self::Twirp => {
                let error = json!({ "code": twirp_code(status), "msg": message });
                (status, Json(error)).into_response()
            }
            Self::Rest => (status, Json(json!({ "message": message }))).into_response(),
            Self::Blob => {
                let code = match status {
                    StatusCode::NOT_FOUND => "BlobNotFound",
                    _ => "ServerBusy",
                };
                let error = format!(
                    "<?xml version=\"1.0\" encoding=\"utf-8\"?>\
                     <Error><Code>{code}</Code><Message>{message}</Message></Error>"
                );
                (status, [(CONTENT_TYPE, "application/xml")], error).into_response()
            }
        }
    }
}

/// Twirp's name for a status.
fn twirp_code(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "unauthenticated",
        StatusCode::FORBIDDEN => "permission_denied",
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::TOO_MANY_REQUESTS => "resource_exhausted",
        StatusCode::SERVICE_UNAVAILABLE => "unavailable",
        _ => "internal",
    }
}

/// Answers a request after the delay, with the service's answer unless a fault or a limit applies.
async fn answer(State(front): State<Arc<Front>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let (kind, protocol) = (Kind::of(request.method(), path), Protocol::of(path));
    front.count(kind);
    let latency = match protocol {
        Protocol::Blob => front.options.blob_latency,
        Protocol::Twirp | Protocol::Rest => front.options.api_latency,
    };
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    let fault = *lock(&front.fault);
    if fault == Some(Fault::Hang) {
        return std::future::pending().await;
    }
    let refused = fault
        .and_then(|fault| refused_by(fault, kind, protocol))
        .or_else(|| front.refused_by_limit(kind, protocol));
    let response = match refused {
        Some(response) => response,
        None => {
            let counted = front.clone();
            let request = request.map(|body| match kind {
                Kind::Upload => {
                    counting(body, move |bytes| lock(&counted.counts).bytes_up += bytes)
                }
                _ => body,
            });
            next.run(request).await
        }
    };
    let mut response = response;
    let behind = Duration::from_secs(*lock(&front.behind));
    if !behind.is_zero() {
        let date = httpdate::fmt_http_date(SystemTime::now() - behind);
        let date = HeaderValue::try_from(date).unwrap();
        response.headers_mut().insert(DATE, date);
    }
    if response.status() == StatusCode::TOO_MANY_REQUESTS {
        lock(&front.counts).refused += 1;
    }
    if kind != Kind::Download || !response.status().is_success() {
        return response;
    }
    let length = content_length(&response);
    response.map(|body| {
        let body = match fault {
            Some(Fault::TruncateDownloads) => cut_off(body, length / 2),
            Some(Fault::FlipBytes { offset }) => flip(body, offset),
            Some(Fault::Trickle { every }) => trickle(body, every),
            _ => body,
        };
        counting(body, move |bytes| lock(&front.counts).bytes_down += bytes)
    })
}

impl Front {
    fn count(&self, kind: Kind) {
        let mut counts = lock(&self.counts);
        let count = match kind {
            Kind::Lookup => &mut counts.lookups,
            Kind::Reservation => &mut counts.reservations,
            Kind::Upload => &mut counts.uploads,
            Kind::Commit => &mut counts.commits,
            Kind::Download => &mut counts.downloads,
            Kind::Other => &mut counts.others,
        };
        *count += 1;
    }

    /// The answer to a reservation that exceeds the limit; `None` if it is granted.
    fn refused_by_limit(&self, kind: Kind, protocol: Protocol) -> Option<Response> {
        let limit = self.options.uploads_per_minute?;
        if kind != Kind::Reservation {
            return None;
        }
        let mut granted = lock(&self.granted);
        let now = Instant::now();
        while granted.front().is_some_and(|then| now - *then >= WINDOW) {
            granted.pop_front();
        }
        if granted.len() < limit as usize {
            granted.push_back(now);
            return None;
        }
        let frees = granted
            .front()
            .map_or(WINDOW, |then| WINDOW - (now - *then));
        // Whole seconds, and never too few of them.
        let wait = frees.as_secs() + u64::from(frees.subsec_nanos() > 0);
        let status = StatusCode::TOO_MANY_REQUESTS;
        let response = protocol.refusal(status, "rate limit exceeded");
        Some(with_retry_after(response, Some(wait)))
    }
}

fn with_retry_after(mut response: Response, wait: Option<u64>) -> Response {
    if let Some(wait) = wait {
        let headers = response.headers_mut();
        headers.insert(RETRY_AFTER, HeaderValue::from(wait));
    }
    response
}

/// The answer that replaces the service's, or `None` if `fault` needs none.
fn refused_by(fault: Fault, kind: Kind, protocol: Protocol) -> Option<Response> {
    let (status, wait, message) = match fault {
        Fault::Status(status, wait) => (status, wait, "refused to order"),
        Fault::RefuseWrites(status, wait) if kind == Kind::Reservation => {
            (status, wait, "refused to order")
        }
        Fault::DenyWrites if matches!(kind, Kind::Reservation | Kind::Commit) => {
            let message = "cache write denied: the token may only read";
            (StatusCode::FORBIDDEN, None, message)
        }
        Fault::LoseBlobs if kind == Kind::Download => {
            (StatusCode::NOT_FOUND, None, "the content is gone")
        }
        _ => return None,
    };
    Some(with_retry_after(protocol.refusal(status, message), wait))
}

fn content_length(response: &Response) -> u64 {
    let length = response.headers().get(CONTENT_LENGTH);
    length
        .and_then(|length| length.to_str().ok()?.parse().ok())
        .unwrap_or_default()
}

/// `body`, of which `count` hears how many bytes each piece has.
fn counting(body: Body, count: impl Fn(u64) + Send + 'static) -> Body {
    let pieces = body.into_data_stream();
    Body::from_stream(pieces.inspect_ok(move |piece| count(piece.len() as u64)))
}

/// The bytes of `body`, one every so often.
fn trickle(body: Body, every: Duration) -> Body {
    let pieces = body.into_data_stream().map_err(io::Error::other);
    let bytes = pieces.map_ok(|piece| {
        let bytes = (0..piece.len()).map(move |at| Ok::<_, io::Error>(piece.slice(at..=at)));
        stream::iter(bytes)
    });
    Body::from_stream(bytes.try_flatten().then(move |byte| async move {
        tokio::time::sleep(every).await;
        byte
    }))
}

/// The first `length` bytes of `body`, then an error, which breaks the connection off.
fn cut_off(body: Body, length: u64) -> Body {
    let mut left = length;
    let pieces = body.into_data_stream().map_err(io::Error::other);
    let begin = pieces.map_ok(move |piece| {
        let taken = left.min(piece.len() as u64);
        left -= taken;
        piece.slice(..taken as usize)
    });
    let begin = begin.try_take_while(|piece| std::future::ready(Ok(!piece.is_empty())));
    let end = stream::once(async {
        // The bytes so far are sent before the connection is closed.
        tokio::task::yield_now().await;
        Err(io::Error::other("cut off to order"))
    });
    Body::from_stream(begin.chain(end))
}

/// `body` with a bit of the byte at `offset` flipped.
fn flip(body: Body, offset: u64) -> Body {
    let mut position = 0;
    Body::from_stream(body.into_data_stream().map_ok(move |piece| {
        let begin = position;
        position += piece.len() as u64;
        if !(begin..position).contains(&offset) {
            return piece;
        }
        let mut bytes = piece.to_vec();
        bytes[(offset - begin) as usize] ^= 1;
        Bytes::from(bytes)
    }))
}
