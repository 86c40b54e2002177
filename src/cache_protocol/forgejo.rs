//! Authenticates requests of Forgejo's runner, which is a proxy between its jobs and the cache
//! service and names in headers the repository and the run (`act/cacheproxy` and
//! `act/artifactcache/mac.go` of the runner).
//!
//! The runner and the service share a secret. Each request has a MAC of the repository, the number
//! and time of the run, and the key that keeps a pull request's entries from others.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use axum::http::HeaderMap;

use crate::cache_protocol::auth::Access;
use crate::cache_protocol::runtime_token::{AllowedRepositories, TokenRepository, scope_of};
use crate::clock::Timestamp;

/// The secret that the runner has as `cache.secret`.
#[derive(Clone)]
pub struct ForgejoRunner {
    secret: Vec<u8>,
    allowed: AllowedRepositories,
}

impl std::fmt::Debug for ForgejoRunner {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("ForgejoRunner(***)")
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

impl ForgejoRunner {
    /// A runner that knows `secret`. Only jobs of the repositories in `allowed` are accepted.
    pub fn new(secret: Vec<u8>, allowed: AllowedRepositories) -> Self {
        Self { secret, allowed }
    }

    /// The rights of a request with these headers at `now`, or `None` if it is not from the runner.
    /// A run with an isolation key writes to its own scope. It reads that scope first, then the one
    /// that all runs share.
    pub fn access(&self, headers: &HeaderMap, now: Timestamp) -> Option<Access> {
        let repository = header(headers, "Forgejo-Cache-Repo")?;
        let run = header(headers, "Forgejo-Cache-RunNumber")?;
        let timestamp = header(headers, "Forgejo-Cache-Timestamp")?;
        let isolation = header(headers, "Forgejo-Cache-WriteIsolationKey").unwrap_or("");
        let mac = hex::decode(header(headers, "Forgejo-Cache-MAC")?).ok()?;
        let mut expected = Hmac::<Sha256>::new_from_slice(&self.secret).ok()?;
        expected.update(format!("{repository}>{run}>{timestamp}>{isolation}").as_bytes());
        expected.verify_slice(&mac).ok()?;
        if Timestamp::from_seconds(timestamp.parse().ok()?) > now {
            return None;
        }
        let named = TokenRepository {
            name: Some(repository.to_owned()),
            id: None,
        };
        if !self.allowed.allows(&named) {
            return None;
        }
        let own = scope_of(repository, isolation);
        let mut access = Access::to(own);
        if !isolation.is_empty() {
            access.read.push(scope_of(repository, ""));
        }
        Some(access)
    }

    /// The URL under which a job reaches the service through its runner, without a slash at the
    /// end.
    pub fn base_url(headers: &HeaderMap) -> Option<String> {
        let host = header(headers, "Forgejo-Cache-Host")?.trim_end_matches('/');
        let run = header(headers, "Forgejo-Cache-RunId")?;
        Some(format!("{host}/{run}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(seconds: u64) -> Timestamp {
        Timestamp::from_seconds(seconds)
    }

    /// The headers of the runner's own tests, with the secret `secret`.
    fn headers(isolation: Option<&'static str>, mac: &'static str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("Forgejo-Cache-Repo", "testuser/repo".parse().unwrap());
        headers.insert("Forgejo-Cache-RunNumber", "1".parse().unwrap());
        headers.insert("Forgejo-Cache-Timestamp", "0".parse().unwrap());
        headers.insert("Forgejo-Cache-MAC", mac.parse().unwrap());
        if let Some(isolation) = isolation {
            headers.insert(
                "Forgejo-Cache-WriteIsolationKey",
                isolation.parse().unwrap(),
            );
        }
        headers
    }

    const MAC: &str = "bc2e9167f9e310baebcead390937264e4c0b21d2fdd49f5b9470d54406099360";

    #[test]
    fn the_runners_mac_opens_its_repository() {
        let runner = ForgejoRunner::new(b"secret".to_vec(), AllowedRepositories::default());
        let access = runner.access(&headers(None, MAC), at(1)).unwrap();
        assert_eq!(access, Access::to("testuser/repo:".into()));
        assert_eq!(
            ForgejoRunner::new(b"other".to_vec(), AllowedRepositories::default())
                .access(&headers(None, MAC), at(1)),
            None
        );
        assert_eq!(runner.access(&headers(Some("pr"), MAC), at(1)), None);
        assert_eq!(runner.access(&headers(None, "00"), at(1)), None);
        assert_eq!(runner.access(&HeaderMap::new(), at(1)), None);
    }

    #[test]
    fn a_pull_request_writes_where_others_do_not_read() {
        let mut mac = Hmac::<Sha256>::new_from_slice(b"secret").unwrap();
        mac.update(b"testuser/repo>1>0>pr");
        let mac: &'static str = hex::encode(mac.finalize().into_bytes()).leak();
        let runner = ForgejoRunner::new(b"secret".to_vec(), AllowedRepositories::default());
        let access = runner.access(&headers(Some("pr"), mac), at(1)).unwrap();
        assert_eq!(access.write, Some("testuser/repo:pr".into()));
        assert_eq!(
            access.read,
            ["testuser/repo:pr".into(), "testuser/repo:".into()]
        );
    }

    #[test]
    fn a_time_to_come_is_refused() {
        let mut mac = Hmac::<Sha256>::new_from_slice(b"secret").unwrap();
        mac.update(b"testuser/repo>1>100>");
        let mac: &'static str = hex::encode(mac.finalize().into_bytes()).leak();
        let runner = ForgejoRunner::new(b"secret".to_vec(), AllowedRepositories::default());
        let mut headers = headers(None, mac);
        headers.insert("Forgejo-Cache-Timestamp", "100".parse().unwrap());
        assert_eq!(runner.access(&headers, at(99)), None);
        assert!(runner.access(&headers, at(100)).is_some());
    }
}
