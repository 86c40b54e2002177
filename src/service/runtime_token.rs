//! The tokens that runners give to jobs: JSON Web Tokens whose claims say which parts of the cache
//! they open.
//!
//! GitHub's have the scopes in the claim `ac`, a JSON list inside a string, and the repository's
//! number in `repository_id`; they are signed with RS256 by a key that the issuer publishes. Gitea's
//! have `ac` with one scope without a name and are signed with HS256 (`CreateAuthorizationToken`
//! in its `services/actions/auth.go`).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use moka::sync::Cache;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tracing::{debug, error, warn};

use crate::service::auth::Access;
use crate::service::store::Scope;

/// Who signs the tokens of jobs at github.com.
pub const GITHUB_ISSUER: &str = "https://token.actions.githubusercontent.com";

/// The bit of a scope's permission that allows writing.
pub const MAY_WRITE: u64 = 2;

/// How long a token that was checked is not checked again. It may be used that much longer than it
/// says.
const CHECKED_FOR: Duration = Duration::from_secs(60);

/// How many checked tokens are remembered.
const CHECKED: u64 = 4096;

/// How often the issuer is asked for its keys at most.
const KEYS_EVERY: Duration = Duration::from_secs(60);

/// A scope of the claim `ac`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct CacheScope {
    /// The ref.
    #[serde(rename = "Scope", alias = "scope", default)]
    pub scope: String,
    /// What is allowed: 1 to read, [`MAY_WRITE`] to write.
    #[serde(rename = "Permission", alias = "permission")]
    pub permission: u64,
}

/// The scopes that the claim `ac` names, or `None` where it cannot be read.
pub fn cache_scopes(ac: &str) -> Option<Vec<CacheScope>> {
    serde_json::from_str(ac).ok()
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Claims {
    ac: Option<String>,
    repository_id: Option<serde_json::Value>,
}

/// The name under which entries of one repository's scope are kept, apart from other repositories'.
pub fn scope_of(repository: &str, scope: &str) -> Scope {
    Scope(format!("{repository}:{scope}").into())
}

/// What a token with these claims opens, or `None` where it names no scope. The scope that may be
/// written is read first, then the others in the token's order.
fn access_of(claims: &Claims) -> Option<Access> {
    let scopes = cache_scopes(claims.ac.as_deref()?)?;
    let repository = match &claims.repository_id {
        Some(serde_json::Value::String(id)) => id.clone(),
        Some(serde_json::Value::Number(id)) => id.to_string(),
        _ => String::new(),
    };
    let writable = scopes
        .iter()
        .find(|scope| scope.permission & MAY_WRITE != 0);
    let own = writable.map(|scope| scope.scope.as_str());
    let others = scopes.iter().map(|scope| scope.scope.as_str());
    let others = others.filter(|scope| Some(*scope) != own);
    let read: Vec<Scope> = own
        .into_iter()
        .chain(others)
        .map(|scope| scope_of(&repository, scope))
        .collect();
    if read.is_empty() {
        return None;
    }
    Some(Access {
        write: own.map(|scope| scope_of(&repository, scope)),
        read,
    })
}

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
    pub async fn access(&self, token: &str) -> Option<Arc<Access>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(ac: &str, repository: serde_json::Value) -> Claims {
        Claims {
            ac: Some(ac.to_owned()),
            repository_id: Some(repository),
        }
    }

    #[test]
    fn a_pull_request_writes_its_own_scope_and_reads_that_first() {
        let ac = r#"[{"Scope":"refs/heads/main","Permission":1},
                     {"Scope":"refs/pull/7/merge","Permission":3}]"#;
        let access = access_of(&claims(ac, "12".into())).unwrap();
        assert_eq!(access.write, Some("12:refs/pull/7/merge".into()));
        let read: Vec<&str> = access.read.iter().map(|scope| &*scope.0).collect();
        assert_eq!(read, ["12:refs/pull/7/merge", "12:refs/heads/main"]);
        let number = access_of(&claims(ac, 12.into())).unwrap();
        assert_eq!(number, access);
    }

    #[test]
    fn a_token_without_a_scope_to_write_only_reads() {
        let ac = r#"[{"Scope":"refs/heads/main","Permission":1}]"#;
        let access = access_of(&claims(ac, "1".into())).unwrap();
        assert_eq!(access.write, None);
        assert_eq!(access.read, [Scope::from("1:refs/heads/main")]);
    }

    #[test]
    fn giteas_tokens_have_one_scope_without_a_name() {
        let claims = claims(r#"[{"Scope":"","Permission":2}]"#, serde_json::Value::Null);
        let access = access_of(&claims).unwrap();
        assert_eq!(access, Access::to(":".into()));
    }

    #[test]
    fn a_token_that_names_no_scope_opens_nothing() {
        assert!(access_of(&Claims::default()).is_none());
        for wrong in ["", "[]", "{}", "[{\"Scope\":\"a\"}]"] {
            assert!(access_of(&claims(wrong, "1".into())).is_none(), "{wrong}");
        }
    }
}
