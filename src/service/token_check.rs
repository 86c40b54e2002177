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
use tracing::{debug, error, warn};

use crate::service::auth::{Access, TokenCheck};
use crate::service::runtime_token::{Claims, access_of};

/// Who signs the tokens of jobs at github.com.
pub const GITHUB_ISSUER: &str = "https://token.actions.githubusercontent.com";

/// How long a token that was checked is not checked again. It may be used that much longer than it
/// says.
const CHECKED_FOR: Duration = Duration::from_secs(60);

/// How many checked tokens are remembered.
const CHECKED: u64 = 4096;

/// How often the issuer is asked for its keys at most.
const KEYS_EVERY: Duration = Duration::from_secs(60);

/// How the signatures of tokens are checked.
#[derive(Debug)]
pub enum Keys {
    /// With a secret that the one who makes them has too (HS256).
    Secret(Secret),
    /// With the keys that their issuer publishes (RS256).
    Issuer(Issuer),
    /// Not at all: whoever reaches the service may say who they are.
    Unchecked,
}

/// A secret, shown to nobody who prints it by accident.
pub struct Secret(pub Vec<u8>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Secret(***)")
    }
}

/// An issuer of tokens, by its URL, and its keys as far as they were asked for.
#[derive(Debug)]
pub struct Issuer {
    url: String,
    client: reqwest::Client,
    keys: Mutex<(JwkSet, Option<Instant>)>,
}

impl Issuer {
    /// The issuer at `url`, which `client` asks for its keys when the first token comes.
    pub fn new(url: &str, client: reqwest::Client) -> Self {
        Self {
            url: url.trim_end_matches('/').to_owned(),
            client,
            keys: Mutex::new((JwkSet { keys: Vec::new() }, None)),
        }
    }

    /// The key called `id`. The issuer is asked where it is not known, but not for each unknown
    /// one.
    async fn key(&self, id: &str) -> Option<DecodingKey> {
        {
            let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
            let known = keys
                .0
                .find(id)
                .and_then(|key| DecodingKey::from_jwk(key).ok());
            if known.is_some() || keys.1.is_some_and(|asked| asked.elapsed() < KEYS_EVERY) {
                return known;
            }
            keys.1 = Some(Instant::now());
        }
        match self.published().await {
            Ok(published) => {
                let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
                keys.0 = published;
                keys.0
                    .find(id)
                    .and_then(|key| DecodingKey::from_jwk(key).ok())
            }
            Err(cause) => {
                error!(issuer = self.url, %cause, "the issuer's keys cannot be had");
                None
            }
        }
    }

    async fn published(&self) -> Result<JwkSet, reqwest::Error> {
        #[derive(Deserialize)]
        struct Discovery {
            jwks_uri: String,
        }
        let Self { url, client, .. } = self;
        // OpenID Connect Discovery 1.0, section 4; some serve the keys and not the document.
        let discovery = format!("{url}/.well-known/openid-configuration");
        let discovered = async {
            let answer = client.get(discovery).send().await?.error_for_status()?;
            let body = answer.bytes().await?;
            Ok::<_, reqwest::Error>(serde_json::from_slice::<Discovery>(&body).ok())
        };
        let keys = match discovered.await {
            Ok(Some(found)) => found.jwks_uri,
            _ => format!("{url}/.well-known/jwks"),
        };
        let answer = client.get(keys).send().await?.error_for_status()?;
        let body = answer.bytes().await?;
        Ok(serde_json::from_slice(&body).unwrap_or_else(|error| {
            warn!(issuer = url, %error, "the issuer's keys cannot be read");
            JwkSet { keys: Vec::new() }
        }))
    }
}

/// Checks the tokens of jobs.
#[derive(Debug)]
pub struct RuntimeTokens {
    keys: Keys,
    checked: Cache<[u8; 32], Arc<Access>>,
}

impl RuntimeTokens {
    /// A check with `keys`.
    pub fn new(keys: Keys) -> Self {
        let checked = Cache::builder()
            .max_capacity(CHECKED)
            .time_to_live(CHECKED_FOR)
            .build();
        Self { keys, checked }
    }

    /// What `token` opens; `None` where its signature is wrong, its time is over or it names no
    /// scope.
    async fn checked(&self, token: &str) -> Option<Arc<Access>> {
        let digest: [u8; 32] = Sha256::digest(token).into();
        if let Some(access) = self.checked.get(&digest) {
            return Some(access);
        }
        let claims = self.claims(token).await?;
        let access = Arc::new(access_of(&claims)?);
        self.checked.insert(digest, access.clone());
        Some(access)
    }

    async fn claims(&self, token: &str) -> Option<Claims> {
        let (key, algorithm) = match &self.keys {
            Keys::Secret(Secret(secret)) => (DecodingKey::from_secret(secret), Algorithm::HS256),
            Keys::Issuer(issuer) => {
                let id = jsonwebtoken::decode_header(token).ok()?.kid?;
                (issuer.key(&id).await?, Algorithm::RS256)
            }
            Keys::Unchecked => {
                let decoded = jsonwebtoken::dangerous::insecure_decode::<Claims>(token);
                return decoded.ok().map(|decoded| decoded.claims);
            }
        };
        let mut validation = Validation::new(algorithm);
        // What else a token is for says nothing of the cache.
        validation.validate_aud = false;
        validation.validate_nbf = true;
        if let Keys::Issuer(issuer) = &self.keys {
            validation.set_issuer(&[issuer.url.as_str()]);
            validation.set_required_spec_claims(&["exp", "iss"]);
        }
        match jsonwebtoken::decode::<Claims>(token, &key, &validation) {
            Ok(decoded) => Some(decoded.claims),
            Err(error) => {
                debug!(%error, "a token was refused");
                None
            }
        }
    }
}

impl TokenCheck for RuntimeTokens {
    fn access<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Option<Arc<Access>>> {
        self.checked(token).boxed()
    }
}
