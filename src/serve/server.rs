//! The standalone service: its store, its metrics, its start and its shutdown.

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
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use crate::cache_protocol::auth::Tokens;
use crate::cache_protocol::turns::Turns;
use crate::cache_protocol::{AppState, Authenticator, ENTRY_LIMIT, Peer, Snapshot, router};
use crate::serve::entry_store::{EntryStore, OpenError, StorageConfig, StoreLimits, system_clock};
use crate::serve::listener::TimedListener;
use crate::serve::metrics::{Metrics, RequestLabels};

/// How long clients are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientTimeouts {
    /// How long nothing may move on a connection. The storage's own limits are shorter.
    pub silence: Duration,
    /// How long a shutdown waits for requests in flight.
    pub drain: Duration,
}

impl Default for ClientTimeouts {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(120),
            drain: Duration::from_secs(30),
        }
    }
}

/// How many connections wait until they are accepted, if the system allows so many. A client beyond them
/// tries again only after a second, and then after two more.
const BACKLOG: u32 = 4096;

/// How often the store is swept.
pub const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// How a service is set up.
#[derive(Debug)]
pub struct ServerConfig {
    /// The storage of entries.
    pub storage: StorageConfig,
    /// The address that it listens at. Port 0 is any free one.
    pub address: SocketAddr,
    /// The credentials that it accepts.
    pub authenticator: Authenticator,
    /// The URL under which clients reach it, without a slash at the end, if that is not the
    /// requested host: behind a proxy that speaks TLS.
    pub public_url: Option<String>,
    /// How long it waits for clients.
    pub patience: ClientTimeouts,
    /// How many connections an address may have at once.
    pub connections: Option<usize>,
}

impl ServerConfig {
    /// A service on a free port of 127.0.0.1 with its store in `folder`.
    pub fn on_loopback(folder: impl AsRef<Path>, tokens: Tokens) -> Self {
        Self {
            storage: StorageConfig::in_folder(
                folder.as_ref(),
                StoreLimits::of_entries(ENTRY_LIMIT),
            ),
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            authenticator: Authenticator::from(tokens),
            public_url: None,
            patience: ClientTimeouts::default(),
            connections: None,
        }
    }
}

/// Why a service did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Its store could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It could not listen at its address.
    #[error("the cache service cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
    /// The system has no random numbers for its token.
    #[error("cannot read random numbers from the system: {0}")]
    Random(#[from] getrandom::Error),
}

/// The name of a request in metrics and log.
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

/// Notes how long each request took. Neither its query nor its headers are recorded: they have
/// signatures and tokens.
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
        RequestLabels {
            request: name,
            status,
        },
        seconds,
    );
    debug!(request = name, status, seconds, "answered");
    answer
}

/// `GET /metrics` and `GET /health` of the standalone service; the latter asks the database.
fn status_routes(store: EntryStore, metrics: Arc<Metrics>) -> Router {
    let totals = store.clone();
    let health = get(async move || match store.ping().await {
        Ok(()) => (StatusCode::OK, "ok\n"),
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

/// A service that runs in this process. It ends when this is dropped; [`RunningServer::shutdown`] lets
/// requests in flight finish.
#[derive(Debug)]
pub struct RunningServer {
    shared: Arc<AppState<EntryStore>>,
    drain: Duration,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<io::Result<()>>,
    swept: JoinHandle<()>,
}

impl Drop for RunningServer {
    fn drop(&mut self) {
        self.served.abort();
        self.swept.abort();
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // On Windows this would let another process take the address.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Starts a service as `config` says.
///
/// # Errors
/// [`ServiceError::Open`] if its storage is unavailable, [`ServiceError::Listen`] if its address
/// is.
pub async fn start(config: ServerConfig) -> Result<RunningServer, ServiceError> {
    let ServerConfig {
        storage,
        address,
        authenticator,
        public_url,
        patience,
        connections,
    } = config;
    let store = EntryStore::open(&storage, system_clock()).await?;
    let listen_error = |error| ServiceError::Listen { address, error };
    let listener = listen(address).map_err(listen_error)?;
    let address = listener.local_addr().map_err(listen_error)?;
    let signer = store.signer();
    let shared = AppState {
        public_url,
        turns: Some(Turns::default()),
        ..AppState::new(store.clone(), authenticator, address, signer)
    };
    let shared = Arc::new(shared);
    let metrics = Arc::new(Metrics::of(shared.clone()));
    let router = router(shared.clone())
        .layer(middleware::from_fn_with_state(metrics.clone(), observe))
        .merge(status_routes(store.clone(), metrics));
    // This runs before the first token comes, and the start does not wait for it: requests that
    // come meanwhile wait themselves.
    tokio::spawn({
        let shared = shared.clone();
        async move { shared.authenticator.prepare().await }
    });
    let (stop, stopped) = oneshot::channel();
    let listener = TimedListener::new(listener, patience.silence, connections);
    let service = router.into_make_service_with_connect_info::<Peer>();
    let served = tokio::spawn(
        axum::serve(listener, service)
            .with_graceful_shutdown(async move {
                // A sender that was dropped means the same.
                let _ = stopped.await;
            })
            .into_future(),
    );
    let swept = tokio::spawn(async move { store.run_sweeps(SWEEP_EVERY).await });
    Ok(RunningServer {
        shared,
        drain: patience.drain,
        stop: Some(stop),
        served,
        swept,
    })
}

impl RunningServer {
    /// Its URL, with a slash at the end as clients expect of `ACTIONS_RESULTS_URL`.
    pub fn url(&self) -> String {
        match &self.shared.public_url {
            Some(url) => format!("{url}/"),
            None => format!("http://{}/", self.shared.address),
        }
    }

    /// The address that it listens at.
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// The requests so far.
    pub fn counters(&self) -> Snapshot {
        self.shared.counters()
    }

    /// Waits until the service ends with an error.
    ///
    /// # Errors
    /// The error.
    pub async fn ended(&mut self) -> io::Result<()> {
        (&mut self.served).await.map_err(io::Error::other)?
    }

    /// Takes no more requests, and ends when those in flight are answered or
    /// [`ClientTimeouts::drain`] is over: a slow client is no failure of the service.
    ///
    /// # Errors
    /// Fails if it had failed before.
    pub async fn shutdown(mut self) -> io::Result<()> {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        let ended = tokio::time::timeout(self.drain, self.ended()).await;
        self.swept.abort();
        // The task ends at its next await, which comes soon.
        let _ = (&mut self.swept).await;
        self.shared.store.close().await;
        ended.unwrap_or_else(|_| {
            let seconds = self.drain.as_secs();
            warn!(seconds, "ended requests of clients that were too slow");
            Ok(())
        })
    }
}
