//! Checks the signatures of the tokens that runners give to jobs.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use moka::sync::Cache;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tracing::{debug, error};

use crate::cache_protocol::auth::{Access, KeysUnavailable, TokenVerifier};
use crate::cache_protocol::runtime_token::{AllowedRepositories, RuntimeClaims, access_of};

/// The issuer of the tokens of jobs at github.com.
pub const GITHUB_ISSUER: &str = "https://token.actions.githubusercontent.com";

/// How long a token that was checked is not checked again. So a token may be used for that much
/// longer than its lifetime.
const CHECKED_FOR: Duration = Duration::from_secs(60);

/// How many checked tokens are remembered.
const CHECKED: u64 = 4096;

/// How often an issuer that answers is asked for its keys, whichever keys tokens name.
const KEYS_EVERY: Duration = Duration::from_secs(10);

/// How long an issuer that gave no keys is not asked again.
const FAILED_EVERY: Duration = Duration::from_secs(1);

/// How long asking for the keys may take: those with tokens wait for it.
const KEYS_WAIT: Duration = Duration::from_secs(10);

/// The longest answer of an issuer, in bytes. GitHub's has some 10 KiB.
const ANSWER_LIMIT: usize = 1 << 20;

/// How the signatures of tokens are checked.
#[derive(Debug)]
pub enum Keys {
    /// With a secret that the issuer of the tokens has too (HS256).
    Secret(HmacSecret),
    /// With the keys that their issuer publishes (RS256).
    Issuer(Issuer),
    /// Not at all: anyone who reaches the service may claim any identity.
    Unchecked,
}

/// A secret, which `Debug` does not show.
pub struct HmacSecret(pub Vec<u8>);

impl std::fmt::Debug for HmacSecret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("HmacSecret(***)")
    }
}

/// An issuer of tokens, by its URL, and its last known keys.
#[derive(Debug)]
pub struct Issuer {
    url: String,
    client: reqwest::Client,
    /// The last keys that it gave. An answer without keys does not replace them.
    keys: Mutex<JwkSet>,
    /// Held while one request asks for them, so that all others wait for that answer.
    asked: tokio::sync::Mutex<Option<KeyRequest>>,
}

/// The last request for an issuer's keys, and its success.
#[derive(Clone, Copy, Debug)]
struct KeyRequest {
    ended: Instant,
    answered: bool,
}

/// Why an issuer gave no keys.
#[derive(Debug, thiserror::Error)]
enum KeysError {
    #[error("{0}")]
    Request(#[from] reqwest::Error),
    #[error("its answer has more than {ANSWER_LIMIT} bytes")]
    TooLong,
    #[error("its answer is not a set of keys: {0}")]
    Unreadable(#[from] serde_json::Error),
    #[error("its set of keys has no usable key")]
    Empty,
    #[error("no answer within {} s", KEYS_WAIT.as_secs())]
    Silent,
}

impl Issuer {
    /// The issuer at `url`, which `client` asks for its keys.
    pub fn new(url: &str, client: reqwest::Client) -> Self {
        Self {
            url: url.trim_end_matches('/').to_owned(),
            client,
            keys: Mutex::new(JwkSet { keys: Vec::new() }),
            asked: tokio::sync::Mutex::new(None),
        }
    }

    fn known(&self, id: &str) -> Option<DecodingKey> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.find(id)
            .and_then(|key| DecodingKey::from_jwk(key).ok())
    }

    /// The key called `id`, or `None` if the issuer has none of that name. If the key is unknown,
    /// one request asks the issuer for all that wait, and not once for each unknown key.
    async fn key(&self, id: &str) -> Result<Option<DecodingKey>, KeysUnavailable> {
        if let Some(known) = self.known(id) {
            return Ok(Some(known));
        }
        let mut asked = self.asked.lock().await;
        // The last answer may contain it.
        if let Some(known) = self.known(id) {
            return Ok(Some(known));
        }
        match *asked {
            Some(last) if last.answered && last.ended.elapsed() < KEYS_EVERY => return Ok(None),
            Some(last) if !last.answered && last.ended.elapsed() < FAILED_EVERY => {
                return Err(KeysUnavailable);
            }
            _ => {}
        }
        let answered = self.ask().await;
        *asked = Some(KeyRequest {
            ended: Instant::now(),
            answered,
        });
        if answered {
            Ok(self.known(id))
        } else {
            Err(KeysUnavailable)
        }
    }

    /// Asks for the keys before a request needs one.
    async fn prepare(&self) {
        let mut asked = self.asked.lock().await;
        if asked.is_none() {
            let answered = self.ask().await;
            *asked = Some(KeyRequest {
                ended: Instant::now(),
                answered,
            });
        }
    }

    /// Asks for the keys; whether there are some.
    async fn ask(&self) -> bool {
        let published = tokio::time::timeout(KEYS_WAIT, self.published()).await;
        match published.unwrap_or(Err(KeysError::Silent)) {
            Ok(published) => {
                *self.keys.lock().unwrap_or_else(PoisonError::into_inner) = published;
                true
            }
            Err(cause) => {
                error!(issuer = self.url, %cause, "the issuer's keys are unavailable");
                false
            }
        }
    }

    async fn published(&self) -> Result<JwkSet, KeysError> {
        #[derive(Deserialize)]
        struct Discovery {
            jwks_uri: String,
        }
        let url = &self.url;
        // OpenID Connect Discovery 1.0, section 4; some serve the keys and not the document.
        let discovery = format!("{url}/.well-known/openid-configuration");
        let discovered = self.answer(&discovery).await;
        let discovered: Option<Discovery> = discovered
            .ok()
            .and_then(|body| serde_json::from_slice(&body).ok());
        let keys = match discovered {
            Some(found) => found.jwks_uri,
            None => format!("{url}/.well-known/jwks"),
        };
        let mut published: JwkSet = serde_json::from_slice(&self.answer(&keys).await?)?;
        published
            .keys
            .retain(|key| DecodingKey::from_jwk(key).is_ok());
        if published.keys.is_empty() {
            Err(KeysError::Empty)
        } else {
            Ok(published)
        }
    }

    async fn answer(&self, url: &str) -> Result<Vec<u8>, KeysError> {
        let mut answer = self.client.get(url).send().await?.error_for_status()?;
        let mut body = Vec::new();
        while let Some(piece) = answer.chunk().await? {
            if body.len() + piece.len() > ANSWER_LIMIT {
                return Err(KeysError::TooLong);
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }
}

/// Checks the tokens of jobs.
#[derive(Debug)]
pub struct RuntimeTokens {
    keys: Keys,
    allowed: AllowedRepositories,
    checked: Cache<[u8; 32], Arc<Access>>,
}

impl RuntimeTokens {
    /// A check with `keys`, which accepts jobs of the repositories in `allowed`.
    pub fn new(keys: Keys, allowed: AllowedRepositories) -> Self {
        let checked = Cache::builder()
            .max_capacity(CHECKED)
            .time_to_live(CHECKED_FOR)
            .build();
        Self {
            keys,
            allowed,
            checked,
        }
    }

    /// The rights that `token` gives; `None` if its signature is wrong, it has expired, it names no
    /// scope or its repository is not allowed.
    async fn checked(&self, token: &str) -> Result<Option<Arc<Access>>, KeysUnavailable> {
        let digest: [u8; 32] = Sha256::digest(token).into();
        if let Some(access) = self.checked.get(&digest) {
            return Ok(Some(access));
        }
        let Some(claims) = self.claims(token).await? else {
            return Ok(None);
        };
        if !self.allowed.allows(&claims.repository()) {
            debug!("refused a token of a repository that is not on the list");
            return Ok(None);
        }
        let access = access_of(&claims).map(Arc::new);
        if let Some(access) = &access {
            self.checked.insert(digest, access.clone());
        }
        Ok(access)
    }

    async fn claims(&self, token: &str) -> Result<Option<RuntimeClaims>, KeysUnavailable> {
        let (key, algorithm) = match &self.keys {
            Keys::Secret(HmacSecret(secret)) => {
                (DecodingKey::from_secret(secret), Algorithm::HS256)
            }
            Keys::Issuer(issuer) => {
                let header = jsonwebtoken::decode_header(token).ok();
                // The issuer is asked only for keys of tokens that it could have signed.
                let id = header
                    .filter(|header| header.alg == Algorithm::RS256)
                    .and_then(|header| header.kid);
                let Some(id) = id else { return Ok(None) };
                let Some(key) = issuer.key(&id).await? else {
                    return Ok(None);
                };
                (key, Algorithm::RS256)
            }
            Keys::Unchecked => {
                let decoded = jsonwebtoken::dangerous::insecure_decode::<RuntimeClaims>(token);
                return Ok(decoded.ok().map(|decoded| decoded.claims));
            }
        };
        let mut validation = Validation::new(algorithm);
        // The audience of a token is irrelevant for the cache.
        validation.validate_aud = false;
        validation.validate_nbf = true;
        if let Keys::Issuer(issuer) = &self.keys {
            validation.set_issuer(&[issuer.url.as_str()]);
            validation.set_required_spec_claims(&["exp", "iss"]);
        }
        match jsonwebtoken::decode::<RuntimeClaims>(token, &key, &validation) {
            Ok(decoded) => Ok(Some(decoded.claims)),
            Err(error) => {
                debug!(%error, "refused a token");
                Ok(None)
            }
        }
    }
}

impl TokenVerifier for RuntimeTokens {
    fn access<'a>(
        &'a self,
        token: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<Access>>, KeysUnavailable>> {
        self.checked(token).boxed()
    }

    fn prepare(&self) -> BoxFuture<'_, ()> {
        match &self.keys {
            Keys::Issuer(issuer) => issuer.prepare().boxed(),
            Keys::Secret(_) | Keys::Unchecked => std::future::ready(()).boxed(),
        }
    }
}
