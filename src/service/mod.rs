//! A cache service that speaks GitHub's protocols, version 2 (Twirp) and version 1 (REST), on
//! 127.0.0.1.
//!
//! `v1` and `v2` are the two fronts, `blob` is where both send clients for content, `store` says
//! what is behind them.

pub mod auth;
mod blob;
mod counters;
pub mod disk;
pub mod store;
mod v1;
mod v2;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use axum::Router;
use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, HOST};
use axum::routing::{any, get, patch, post};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub use crate::service::counters::{Counters, Snapshot};

use crate::service::auth::{Access, BearerToken, Purpose, Tokens, URL_LIFETIME, UrlSigner};
use crate::service::disk::{DiskStore, OpenError};
use crate::service::store::Store;

/// The largest entry, in bytes: what GitHub allows a whole repository.
pub const ENTRY_LIMIT: u64 = 10 << 30;

/// How a service is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// The folder of its store.
    pub folder: PathBuf,
    /// Where it listens. Port 0 is any free one.
    pub address: SocketAddr,
    /// The largest entry, in bytes.
    pub entry_limit: u64,
    /// The tokens that open it.
    pub tokens: Tokens,
}

impl Config {
    /// A service on a free port of 127.0.0.1 with its store in `folder`.
    pub fn on_loopback(folder: PathBuf, tokens: Tokens) -> Self {
        Self {
            folder,
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            entry_limit: ENTRY_LIMIT,
            tokens,
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
    /// The system has no random numbers for the key of its URLs.
    #[error("no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

/// What all requests share.
#[derive(Debug)]
pub struct Shared<S> {
    store: S,
    tokens: RwLock<Tokens>,
    signer: UrlSigner,
    counters: Counters,
    address: SocketAddr,
}

impl<S: Store> Shared<S> {
    /// A service on `store` that is reached at `address`.
    ///
    /// # Errors
    /// Where the system has no random numbers.
    pub fn new(store: S, tokens: Tokens, address: SocketAddr) -> Result<Self, getrandom::Error> {
        Ok(Self {
            store,
            tokens: RwLock::new(tokens),
            signer: UrlSigner::random()?,
            counters: Counters::default(),
            address,
        })
    }

    /// What was asked of the service so far.
    pub fn counters(&self) -> Snapshot {
        self.counters.snapshot()
    }

    /// Lets `token` do what `access` says, from now on.
    pub fn admit(&self, token: &BearerToken, access: Access) {
        let mut tokens = self.tokens.write().unwrap_or_else(PoisonError::into_inner);
        *tokens = std::mem::take(&mut *tokens).with(token, access);
    }

    /// What the sender of a request may do, or `None`.
    fn access(&self, headers: &HeaderMap) -> Option<Arc<Access>> {
        let header = headers.get(AUTHORIZATION).map(|value| value.as_bytes());
        let tokens = self.tokens.read().unwrap_or_else(PoisonError::into_inner);
        tokens.access(header)
    }

    /// A signed URL for the content numbered `id`, under the host that the client itself used: it
    /// may know this machine by another name.
    fn content_url(&self, purpose: Purpose, id: u64, headers: &HeaderMap) -> String {
        let asked = headers
            .get(HOST)
            .and_then(|host| host.to_str().ok())
            .filter(|host| host.parse::<axum::http::uri::Authority>().is_ok());
        let host = asked.map_or_else(|| self.address.to_string(), str::to_owned);
        let kind = match purpose {
            Purpose::Upload => "uploads",
            Purpose::Download => "entries",
        };
        let query = self
            .signer
            .query(purpose, id, auth::now() + URL_LIFETIME.as_secs());
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
        .route("/uploads/{id}", any(blob::upload::<S>))
        .route("/entries/{id}", any(blob::download::<S>))
        .with_state(shared)
}

/// A service that runs in this process. It ends when this is dropped; [`Running::shutdown`] lets
/// requests in flight finish.
#[derive(Debug)]
pub struct Running {
    shared: Arc<Shared<DiskStore>>,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<io::Result<()>>,
}

/// Starts a service as `config` says.
///
/// # Errors
/// Where its folder or its address cannot be had.
pub async fn start(config: Config) -> Result<Running, ServiceError> {
    let Config {
        folder,
        address,
        entry_limit,
        tokens,
    } = config;
    let store = DiskStore::open(&folder, entry_limit)?;
    let listen_error = |error| ServiceError::Listen { address, error };
    let listener = TcpListener::bind(address).await.map_err(listen_error)?;
    let address = listener.local_addr().map_err(listen_error)?;
    let shared = Arc::new(Shared::new(store, tokens, address)?);
    let router = router(shared.clone());
    let (stop, stopped) = oneshot::channel();
    let served = tokio::spawn(
        axum::serve(listener, router)
            .with_graceful_shutdown(async move {
                // A sender that was dropped means the same.
                let _ = stopped.await;
            })
            .into_future(),
    );
    Ok(Running {
        shared,
        stop: Some(stop),
        served,
    })
}

impl Running {
    /// Its URL, with a slash at the end as clients expect of `ACTIONS_RESULTS_URL`.
    pub fn url(&self) -> String {
        format!("http://{}/", self.shared.address)
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

    /// Takes no more requests, and ends when those in flight are answered.
    ///
    /// # Errors
    /// Where it had failed before.
    pub async fn shutdown(mut self) -> io::Result<()> {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        self.ended().await
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
