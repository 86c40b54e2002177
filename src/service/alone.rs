//! The service standing alone: its own store, metrics, and what happens when it starts and ends.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::debug;

use crate::service::auth::Tokens;
use crate::service::entries::{EntryStore, Limits, OpenError, Storage, system_clock};
use crate::service::metrics::{Asked, Metrics};
use crate::service::{ENTRY_LIMIT, Gate, Shared, Snapshot, router};

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
    let metrics = Arc::new(Metrics::of(shared.clone()));
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
        // It is aborted where it waits, which is soon.
        let _ = (&mut self.swept).await;
        self.shared.store.close().await;
        ended.unwrap_or_else(|_| {
            let waited = format!("requests were cut off after {} s", DRAIN.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, waited))
        })
    }
}
