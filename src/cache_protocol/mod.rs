//! The server side of GitHub's cache protocols, version 2 (Twirp) and version 1 (REST).
//!
//! `v1` and `v2` are the two APIs; `azure_blob` serves the content for both. Behind them is the
//! trait of `store`: in a job the packed relay, in the standalone service entries in a database, in
//! rehearsals and tests the light store of `temporary`. `docs/cache-service.md` has the numbered
//! behaviours.

pub mod auth;
pub mod azure_blob;
pub mod blob_digests;
pub mod content_range;
mod counters;
pub mod forgejo;
pub mod ids;
pub mod messages;
pub mod parts;
pub mod runtime_token;
pub mod store;
mod store_error;
pub mod temporary;
pub mod turns;
mod v1;
mod v2;

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};

use axum::Router;
use axum::extract::{ConnectInfo, FromRequestParts};
use axum::http::header::{AUTHORIZATION, HOST, RETRY_AFTER};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, patch, post};

pub use crate::cache_protocol::counters::{Counters, Snapshot};

use crate::cache_protocol::auth::{
    Access, KeysUnavailable, Owner, Purpose, TokenVerifier, Tokens, URL_LIFETIME, UrlSigner,
};
use crate::cache_protocol::forgejo::ForgejoRunner;
use crate::cache_protocol::ids::{EntryId, UploadId};
use crate::cache_protocol::store::Store;
use crate::cache_protocol::turns::{Client, Turns, origin};
use crate::clock::Timestamp;
use crate::http::BearerToken;

/// The largest entry, in bytes: GitHub's limit for a whole repository.
pub const ENTRY_LIMIT: u64 = 10 << 30;

/// Authenticates requests: by the service's own tokens, by the tokens that runners give to jobs,
/// and by the secret of Forgejo's runners. Each is tried in this order.
#[derive(Debug, Default)]
pub struct Authenticator {
    /// The service's own tokens.
    pub tokens: RwLock<Tokens>,
    /// How tokens of runners are checked; the first that takes one counts.
    pub runtime: Vec<Box<dyn TokenVerifier>>,
    /// The secret of Forgejo's runners.
    pub forgejo: Option<ForgejoRunner>,
}

impl From<Tokens> for Authenticator {
    fn from(tokens: Tokens) -> Self {
        Self {
            tokens: RwLock::new(tokens),
            ..Self::default()
        }
    }
}

impl Authenticator {
    /// Fetches the keys that a first check of a token would wait for.
    pub async fn prepare(&self) {
        let checks = self.runtime.iter().map(|check| check.prepare());
        futures_util::future::join_all(checks).await;
    }

    /// The rights of a request's sender, or `None`.
    ///
    /// # Errors
    /// [`KeysUnavailable`] if an issuer's keys are unavailable now.
    async fn access(&self, headers: &HeaderMap) -> Result<Option<Arc<Access>>, KeysUnavailable> {
        let header = headers.get(AUTHORIZATION).map(|value| value.as_bytes());
        let known = {
            let tokens = self.tokens.read().unwrap_or_else(PoisonError::into_inner);
            tokens.access(header)
        };
        if known.is_some() {
            return Ok(known);
        }
        let mut unknown = Ok(None);
        if let Some(token) = header.and_then(auth::bearer) {
            for runtime in &self.runtime {
                match runtime.access(token).await {
                    Ok(None) => {}
                    Ok(Some(access)) => return Ok(Some(access)),
                    Err(error) => unknown = Err(error),
                }
            }
        }
        let proxied = self.forgejo.as_ref();
        match proxied.and_then(|runner| runner.access(headers, Timestamp::now())) {
            Some(access) => Ok(Some(Arc::new(access))),
            None => unknown,
        }
    }
}

/// The reason why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum AuthError {
    #[error("this service does not know the token")]
    UnknownToken,
    #[error(transparent)]
    KeysUnavailable(#[from] KeysUnavailable),
}

/// How long a client should wait, in seconds, if the service cannot answer now but may soon: the
/// value of the header `Retry-After`.
const RETRY_AFTER_SECONDS: &str = "1";

/// `answer` as a response, which says when to ask again if the service cannot answer now.
fn with_retry_after(answer: impl IntoResponse) -> Response {
    let mut answer = answer.into_response();
    if answer.status() == StatusCode::SERVICE_UNAVAILABLE {
        let seconds = HeaderValue::from_static(RETRY_AFTER_SECONDS);
        answer.headers_mut().insert(RETRY_AFTER, seconds);
    }
    answer
}

/// The address of the client, if the service was told to record it.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub(crate) Option<SocketAddr>);

impl<S: Sync> FromRequestParts<S> for Peer {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let noted = parts.extensions.get::<ConnectInfo<Self>>();
        Ok(noted.map_or(Self(None), |ConnectInfo(peer)| *peer))
    }
}

/// The state that all requests share.
#[derive(Debug)]
pub struct AppState<S> {
    pub(crate) store: S,
    pub(crate) authenticator: Authenticator,
    pub(crate) signer: UrlSigner,
    pub(crate) counters: Counters,
    pub(crate) address: SocketAddr,
    pub(crate) public_url: Option<String>,
    /// The queue of requests; a service of one client needs none.
    pub(crate) turns: Option<Turns>,
}

impl<S: Store> AppState<S> {
    /// A service on `store` that is reached at `address` and signs its URLs with `signer`.
    pub fn new(
        store: S,
        authenticator: impl Into<Authenticator>,
        address: SocketAddr,
        signer: UrlSigner,
    ) -> Self {
        Self {
            store,
            authenticator: authenticator.into(),
            signer,
            counters: Counters::default(),
            address,
            public_url: None,
            turns: None,
        }
    }

    /// The requests so far.
    pub fn counters(&self) -> Snapshot {
        self.counters.snapshot()
    }

    /// Gives `token` the rights `access` from now on.
    pub fn add_token(&self, token: &BearerToken, access: Access) {
        let mut tokens = self
            .authenticator
            .tokens
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *tokens = std::mem::take(&mut *tokens).with(token, access);
    }

    /// The rights of a request's sender.
    async fn access(&self, headers: &HeaderMap) -> Result<Arc<Access>, AuthError> {
        self.authenticator.access(headers).await?.ok_or_else(|| {
            self.counters.refused.inc();
            AuthError::UnknownToken
        })
    }

    /// Works on a request when it is its sender's turn.
    async fn in_turn<T>(
        &self,
        owner: Option<Owner>,
        Peer(peer): Peer,
        request: impl Future<Output = T>,
    ) -> T {
        let Some(turns) = &self.turns else {
            return request.await;
        };
        let address = || Client::Address(peer.map(|peer| origin(peer.ip())));
        let client = owner.map_or_else(address, Client::Repository);
        turns.work(client, request).await
    }

    /// A signed URL for `purpose`, under the host that the client itself used: it may know this
    /// machine by another name.
    fn content_url(&self, purpose: Purpose, access: &Access, headers: &HeaderMap) -> String {
        let expiry = Timestamp::now() + URL_LIFETIME;
        let query = self.signer.query(purpose, expiry, access.owner());
        let proxied = self
            .authenticator
            .forgejo
            .as_ref()
            .and(ForgejoRunner::base_url(headers));
        let (kind, id) = match purpose {
            Purpose::Upload(UploadId(id)) => ("uploads", id),
            Purpose::Download(EntryId(id)) => ("entries", id),
        };
        if let Some(base) = proxied {
            // The runner forwards only requests under this path.
            return format!("{base}/_apis/artifactcache/artifacts/{id}?{query}");
        }
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

/// The service as a router, which layers may wrap.
pub fn router<S: Store>(shared: Arc<AppState<S>>) -> Router {
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
            any(azure_blob::download::<S>),
        )
        .route("/uploads/{id}", any(azure_blob::upload::<S>))
        .route("/entries/{id}", any(azure_blob::download::<S>))
        .with_state(shared)
}

/// A token for one client that reads and writes the scope called `scope`, and the tokens of a
/// service which it opens.
///
/// # Errors
/// Fails if the system has no random numbers.
pub fn single_token(scope: &str) -> Result<(BearerToken, Tokens), getrandom::Error> {
    let token = BearerToken::random()?;
    let tokens = Tokens::default().with(&token, Access::to(scope.into()));
    Ok((token, tokens))
}
