//! A cache service that speaks GitHub's protocols, version 2 (Twirp) and version 1 (REST).
//!
//! `v1` and `v2` are the two fronts, `blob` is where both send clients for content, `store` says
//! what is behind them: here `entries`, a `catalog` in a database and `blobs` in a folder or a
//! bucket, and in a job the packed relay. `docs/cache-service.md` has the numbered behaviours.

#[cfg(feature = "serve")]
mod alone;
pub mod auth;
mod blob;
#[cfg(feature = "serve")]
pub mod blobs;
#[cfg(feature = "serve")]
pub mod catalog;
mod counters;
#[cfg(feature = "serve")]
pub mod entries;
pub mod forgejo;
#[cfg(feature = "serve")]
mod metrics;
pub mod parts;
pub mod runtime_token;
pub mod store;
pub mod temporary;
#[cfg(feature = "serve")]
pub mod token_check;
mod v1;
mod v2;

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};

use axum::Router;
use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, HOST};
use axum::routing::{any, get, patch, post};

#[cfg(feature = "serve")]
pub use crate::service::alone::{Config, DRAIN, Running, SWEEP_EVERY, ServiceError, start};
pub use crate::service::counters::{Counters, Snapshot};

use crate::service::auth::{
    Access, BearerToken, Purpose, TokenCheck, Tokens, URL_LIFETIME, UrlSigner,
};
use crate::service::forgejo::Proxy;
use crate::service::store::Store;

/// The largest entry, in bytes: what GitHub allows a whole repository.
pub const ENTRY_LIMIT: u64 = 10 << 30;

/// Who a service lets in: those with a token of its own, jobs with a token of their runner's, jobs
/// behind a runner of Forgejo's. Each is tried in this order.
#[derive(Debug, Default)]
pub struct Gate {
    /// The service's own tokens.
    pub tokens: RwLock<Tokens>,
    /// How tokens of runners are checked; the first that takes one counts.
    pub runtime: Vec<Box<dyn TokenCheck>>,
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
