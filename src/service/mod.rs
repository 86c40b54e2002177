//! A cache service that speaks GitHub's protocols, version 2 (Twirp) and version 1 (REST).
//!
//! `v1` and `v2` are the two fronts, `blob` is where both send clients for content, `store` says
//! what is behind them: here `entries`, a `catalog` in a database and `blobs` in a folder or a
//! bucket, and in a job the packed relay. `docs/cache-service.md` has the numbered behaviours.

pub mod auth;
mod blob;
pub mod blobs;
pub mod catalog;
mod counters;
pub mod entries;
pub mod forgejo;
pub mod parts;
pub mod runtime_token;
pub mod store;
mod v1;
mod v2;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, patch, post};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::debug;

pub use crate::service::counters::{Counters, Snapshot};

use crate::service::auth::{Access, BearerToken, Purpose, Tokens, URL_LIFETIME, UrlSigner};
use crate::service::counters::{Asked, Metrics};
use crate::service::entries::{EntryStore, Limits, OpenError, Storage, system_clock};
use crate::service::forgejo::Proxy;
use crate::service::runtime_token::RuntimeTokens;
use crate::service::store::Store;

/// The largest entry, in bytes: what GitHub allows a whole repository.
pub const ENTRY_LIMIT: u64 = 10 << 30;

/// How long a shutdown waits for requests in flight.
pub const DRAIN: Duration = Duration::from_secs(30);

/// How often what is too much, too old or abandoned is looked for.
pub const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// How a service is set up.
#[derive(Debug)]
pub struct Config {
    /// Where entries are kept.
    pub storage: Storage,
    /// Where it listens. Port 0 is any free one.
    pub address: SocketAddr,
    /// Who it lets in.
    pub gate: Gate,
    /// The URL under which clients reach it, without a slash at the end, where that is not the
    /// host that they ask: behind a proxy that speaks TLS.
    pub public_url: Option<String>,
}

impl Config {
    /// A service on a free port of 127.0.0.1 with its store in `folder`.
    pub fn on_loopback(folder: impl AsRef<Path>, tokens: Tokens) -> Self {
        Self {
            storage: Storage::in_folder(folder.as_ref(), Limits::of_entries(ENTRY_LIMIT)),
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            gate: Gate::from(tokens),
            public_url: None,
        }
    }
}

/// Who a service lets in: those with a token of its own, jobs with a token of their runner's, jobs
/// behind a runner of Forgejo's. Each is tried in this order.
#[derive(Debug, Default)]
pub struct Gate {
    /// The service's own tokens.
    pub tokens: RwLock<Tokens>,
    /// How tokens of runners are checked; the first that takes one counts.
    pub runtime: Vec<RuntimeTokens>,
    /// The secret of Forgejo's runners.
    pub forgejo: Option<Proxy>,
}

impl From<Tokens> for Gate {
    fn from(tokens: Tokens) -> Self {
        Self {
            tokens: RwLock::new(tokens),
            ..Self::default()
        }
    }
}

impl Gate {
    /// What the sender of a request may do, or `None`.
    async fn access(&self, headers: &HeaderMap) -> Option<Arc<Access>> {
        let header = headers.get(AUTHORIZATION).map(|value| value.as_bytes());
        let known = {
            let tokens = self.tokens.read().unwrap_or_else(PoisonError::into_inner);
            tokens.access(header)
        };
        if known.is_some() {
            return known;
        }
        if let Some(token) = header.and_then(auth::bearer) {
            for runtime in &self.runtime {
                if let Some(access) = runtime.access(token).await {
                    return Some(access);
                }
            }
        }
        let proxied = self.forgejo.as_ref()?.access(headers, auth::now());
        proxied.map(Arc::new)
    }
}

/// Why a service did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Its store could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It could not listen where it should.
    #[error("the cache service cannot listen on {address}: {error}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
    /// The system has no random numbers for its token.
    #[error("no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

/// What all requests share.
#[derive(Debug)]
pub struct Shared<S> {
    store: S,
    gate: Gate,
    signer: UrlSigner,
    counters: Counters,
    address: SocketAddr,
    public_url: Option<String>,
}

impl<S: Store> Shared<S> {
    /// A service on `store` that is reached at `address` and signs its URLs with `signer`.
    pub fn new(store: S, gate: impl Into<Gate>, address: SocketAddr, signer: UrlSigner) -> Self {
        Self {
            store,
            gate: gate.into(),
            signer,
            counters: Counters::default(),
            address,
            public_url: None,
        }
    }

    /// What was asked of the service so far.
    pub fn counters(&self) -> Snapshot {
        self.counters.snapshot()
    }

    /// Lets `token` do what `access` says, from now on.
    pub fn admit(&self, token: &BearerToken, access: Access) {
        let mut tokens = self
            .gate
            .tokens
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *tokens = std::mem::take(&mut *tokens).with(token, access);
    }

    /// What the sender of a request may do, or `None`.
    async fn access(&self, headers: &HeaderMap) -> Option<Arc<Access>> {
        let access = self.gate.access(headers).await;
        if access.is_none() {
            self.counters.refused.one();
        }
        access
    }

    /// A signed URL for the content numbered `id`, under the host that the client itself used: it
    /// may know this machine by another name.
    fn content_url(&self, purpose: Purpose, id: u64, headers: &HeaderMap) -> String {
        let query = self
            .signer
            .query(purpose, id, auth::now() + URL_LIFETIME.as_secs());
        let proxied = self.gate.forgejo.as_ref().and(Proxy::base_url(headers));
        if let Some(base) = proxied {
            // The runner passes on what is under this path and nothing else.
            return format!("{base}/_apis/artifactcache/artifacts/{id}?{query}");
        }
        let kind = match purpose {
            Purpose::Upload => "uploads",
            Purpose::Download => "entries",
        };
        if let Some(base) = &self.public_url {
            return format!("{base}/{kind}/{id}?{query}");
        }
        let asked = headers
            .get(HOST)
            .and_then(|host| host.to_str().ok())
            .filter(|host| host.parse::<axum::http::uri::Authority>().is_ok());
        let host = asked.map_or_else(|| self.address.to_string(), str::to_owned);
        format!("http://{host}/{kind}/{id}?{query}")
    }
}

/// The service as a router, to be served as it is or behind layers.
pub fn router<S: Store>(shared: Arc<Shared<S>>) -> Router {
    Router::new()
        .route("/twirp/{service}/{method}", post(v2::call::<S>))
        .route("/_apis/artifactcache/cache", get(v1::find::<S>))
        .route("/_apis/artifactcache/caches", post(v1::reserve::<S>))
        .route(
            "/_apis/artifactcache/caches/{id}",
            patch(v1::upload::<S>).post(v1::commit::<S>),
        )
        .route(
            "/_apis/artifactcache/artifacts/{id}",
            any(blob::download::<S>),
        )
        .route("/uploads/{id}", any(blob::upload::<S>))
        .route("/entries/{id}", any(blob::download::<S>))
        .with_state(shared)
}

/// What a request is called in metrics and log.
fn name_of(path: &str, request: &Request) -> &'static str {
    let method = request.method().as_str();
    match (path, method) {
        ("/twirp/{service}/{method}", _) => {
            match request.uri().path().rsplit('/').next().unwrap_or("") {
                "CreateCacheEntry" => "create",
                "FinalizeCacheEntryUpload" => "finalize",
                "GetCacheEntryDownloadURL" => "find",
                _ => "other",
            }
        }
        ("/_apis/artifactcache/cache", _) => "v1_find",
        ("/_apis/artifactcache/caches", _) => "v1_reserve",
        ("/_apis/artifactcache/caches/{id}", "PATCH") => "v1_upload",
        ("/_apis/artifactcache/caches/{id}", _) => "v1_commit",
        ("/uploads/{id}", _) => "upload",
        ("/entries/{id}" | "/_apis/artifactcache/artifacts/{id}", _) => "download",
        _ => "other",
    }
}

/// Notes how long each request took. Neither its query nor its headers are written anywhere: they
/// have signatures and tokens.
async fn observe(
    State(metrics): State<Arc<Metrics>>,
    path: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let name = name_of(path.as_ref().map_or("", MatchedPath::as_str), &request);
    let begun = Instant::now();
    let answer = next.run(request).await;
    let seconds = begun.elapsed().as_secs_f64();
    let status = answer.status().as_u16();
    metrics.answered(
        Asked {
            request: name,
            status,
        },
        seconds,
    );
    debug!(request = name, status, seconds, "answered");
    answer
}

/// `GET /metrics` and `GET /health` of a service that stands alone; the latter asks the database.
fn status_routes(store: EntryStore, metrics: Arc<Metrics>) -> Router {
    let totals = store.clone();
    let health = get(async move || match store.totals().await {
        Ok(_) => (StatusCode::OK, "ok\n"),
        Err(_) => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the database cannot be reached\n",
        ),
    });
    let metrics = get(async move || {
        let totals = totals.totals().await.unwrap_or_default();
        match metrics.text(totals) {
            Ok(text) => {
                let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                ([(CONTENT_TYPE, kind)], text).into_response()
            }
            Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        }
    });
    Router::new()
        .route("/health", health)
        .route("/metrics", metrics)
}

/// A service that runs in this process. It ends when this is dropped; [`Running::shutdown`] lets
/// requests in flight finish.
#[derive(Debug)]
pub struct Running {
    shared: Arc<Shared<EntryStore>>,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<io::Result<()>>,
    swept: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.served.abort();
        self.swept.abort();
    }
}

/// Starts a service as `config` says.
///
/// # Errors
/// Where its storage or its address cannot be had.
pub async fn start(config: Config) -> Result<Running, ServiceError> {
    let Config {
        storage,
        address,
        gate,
        public_url,
    } = config;
    let store = EntryStore::open(&storage, system_clock()).await?;
    let listen_error = |error| ServiceError::Listen { address, error };
    let listener = TcpListener::bind(address).await.map_err(listen_error)?;
    let address = listener.local_addr().map_err(listen_error)?;
    let signer = store.signer();
    let shared = Shared {
        public_url,
        ..Shared::new(store.clone(), gate, address, signer)
    };
    let shared = Arc::new(shared);
    let metrics = Arc::new(Metrics::of(&shared.counters));
    let router = router(shared.clone())
        .layer(middleware::from_fn_with_state(metrics.clone(), observe))
        .merge(status_routes(store.clone(), metrics));
    let (stop, stopped) = oneshot::channel();
    let served = tokio::spawn(
        axum::serve(listener, router)
            .with_graceful_shutdown(async move {
                // A sender that was dropped means the same.
                let _ = stopped.await;
            })
            .into_future(),
    );
    let swept = tokio::spawn(async move { store.keep_swept(SWEEP_EVERY).await });
    Ok(Running {
        shared,
        stop: Some(stop),
        served,
        swept,
    })
}

impl Running {
    /// Its URL, with a slash at the end as clients expect of `ACTIONS_RESULTS_URL`.
    pub fn url(&self) -> String {
        match &self.shared.public_url {
            Some(url) => format!("{url}/"),
            None => format!("http://{}/", self.shared.address),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// What was asked of it so far.
    pub fn counters(&self) -> Snapshot {
        self.shared.counters()
    }

    /// Waits until it ends by itself, which it does only for an error.
    ///
    /// # Errors
    /// The error.
    pub async fn ended(&mut self) -> io::Result<()> {
        (&mut self.served).await.map_err(io::Error::other)?
    }

    /// Takes no more requests, and ends when those in flight are answered or [`DRAIN`] is over.
    ///
    /// # Errors
    /// Where it had failed before, or requests were cut off.
    pub async fn shutdown(mut self) -> io::Result<()> {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        let ended = tokio::time::timeout(DRAIN, self.ended()).await;
        self.swept.abort();
        self.shared.store.close().await;
        ended.unwrap_or_else(|_| {
            let waited = format!("requests were cut off after {} s", DRAIN.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, waited))
        })
    }
}

/// A token for one client that reads and writes the scope called `scope`, and the tokens of a
/// service which it opens.
///
/// # Errors
/// Where the system has no random numbers.
pub fn single_token(scope: &str) -> Result<(BearerToken, Tokens), getrandom::Error> {
    let token = BearerToken::random()?;
    let tokens = Tokens::default().with(&token, Access::to(scope.into()));
    Ok((token, tokens))
}
