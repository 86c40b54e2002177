//! The cache service of a job, and its protocol.

use std::fmt;

use serde::{Deserialize, Serialize};
use url::Url;

use crate::http::{self, BearerToken};
use crate::runner::environment::Environment;

/// Which protocol a service speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// REST under `_apis/artifactcache/`.
    V1,
    /// Twirp under `twirp/github.actions.results.api.v1.CacheService/`.
    V2,
}

/// A cache service: where it is, what it speaks, and the token that opens it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The protocol that it speaks.
    pub protocol: Protocol,
    /// Its URL, which ends in a slash.
    pub url: Url,
    /// The job's token; empty if the runner gave none.
    pub token: BearerToken,
}

impl fmt::Debug for Endpoint {
    /// Without the path: to Forgejo's runner, a random part of it says which job it is.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Endpoint")
            .field("protocol", &self.protocol)
            .field("origin", &self.url.origin().ascii_serialization())
            .field("token", &self.token)
            .finish()
    }
}

impl Endpoint {
    /// The service that `environment`, which a runner gave, names; `None` if it names none.
    ///
    /// The choice is that of `@actions/cache` (`config.ts`) and of opendal's service `ghac`, except
    /// that the variable `ACTIONS_CACHE_SERVICE_V2` counts under `act` alone: it imitates
    /// github.com and sets `ACTIONS_RESULTS_URL` for artifacts. github.com itself no longer has
    /// version 1.
    ///
    /// Version 1 is used without a token too: `act` gives none, since the address of its service
    /// has a secret in it, and `@actions/cache` sends an empty one there. Every service of version
    /// 2 needs one.
    pub fn of(environment: &Environment) -> Option<Self> {
        let token = environment.get("ACTIONS_RUNTIME_TOKEN").unwrap_or_default();
        let results = environment.get("ACTIONS_RESULTS_URL");
        let cache = environment.get("ACTIONS_CACHE_URL");
        let may_speak_v2 = is_githubs(environment)
            && (!environment.has("ACT") || environment.has("ACTIONS_CACHE_SERVICE_V2"));
        let (protocol, url) = match results {
            Some(results) if may_speak_v2 => (Protocol::V2, results),
            _ => (Protocol::V1, cache.or(results)?),
        };
        if protocol == Protocol::V2 && token.is_empty() {
            return None;
        }
        Some(Self {
            protocol,
            url: base(url)?,
            token: BearerToken::new(token),
        })
    }
}

/// Whether the job's server is GitHub's own: github.com, or GitHub Enterprise Cloud under ghe.com.
fn is_githubs(environment: &Environment) -> bool {
    let Some(server) = environment.get("GITHUB_SERVER_URL") else {
        return true;
    };
    let host = Url::parse(server.trim())
        .ok()
        .and_then(|url| url.host_str().map(str::to_ascii_lowercase));
    host.is_some_and(|host| {
        host == "github.com" || host.ends_with(".ghe.com") || host.ends_with(".localhost")
    })
}

/// `url` in the form that paths can be appended to.
fn base(url: &str) -> Option<Url> {
    let mut url = http::parse_url(url)?;
    url.set_query(None);
    url.set_fragment(None);
    if !url.path().ends_with('/') {
        let path = format!("{}/", url.path());
        url.set_path(&path);
    }
    Some(url)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache_client::CacheClient;
    use crate::http::Timeouts;

    const GITHUB: &[(&str, &str)] = &[
        ("ACTIONS_RUNTIME_TOKEN", "hunter2"),
        ("ACTIONS_RESULTS_URL", "https://results.example/"),
        ("ACTIONS_CACHE_URL", "https://cache.example/run"),
    ];

    fn endpoint(changes: &[(&str, &str)]) -> Option<Endpoint> {
        Endpoint::of(&GITHUB.iter().chain(changes).copied().collect())
    }

    #[test]
    fn the_protocol_is_chosen_by_the_jobs_server() {
        let v2 = (Protocol::V2, "https://results.example/");
        let v1 = (Protocol::V1, "https://cache.example/run/");
        for (server, expected) in [
            ("", v2),
            ("https://github.com", v2),
            ("https://GitHub.com ", v2),
            ("https://tenant.GHE.com/", v2),
            ("http://github.localhost:3000", v2),
            ("https://ghes.example", v1),
            ("https://notgithub.com", v1),
            ("https://github.com.example", v1),
            ("https://ghe.com", v1),
            ("no URL", v1),
        ] {
            let endpoint = endpoint(&[("GITHUB_SERVER_URL", server)]).unwrap();
            assert_eq!(
                (endpoint.protocol, endpoint.url.as_str()),
                expected,
                "{server}"
            );
        }
    }

    #[test]
    fn a_missing_url_is_made_up_for_by_the_other() {
        let forge = ("GITHUB_SERVER_URL", "https://forge.example");
        let without = |name, changes: &[(&str, &str)]| {
            let changes: Vec<_> = changes.iter().copied().chain([(name, "")]).collect();
            let endpoint = endpoint(&changes)?;
            Some((endpoint.protocol, endpoint.url.to_string()))
        };
        let v1 = |url: &str| Some((Protocol::V1, url.to_owned()));
        assert_eq!(
            without("ACTIONS_RESULTS_URL", &[]),
            v1("https://cache.example/run/")
        );
        assert_eq!(
            without("ACTIONS_CACHE_URL", &[forge]),
            v1("https://results.example/")
        );
        assert_eq!(without("ACTIONS_RUNTIME_TOKEN", &[]), None);
        let no_results = ("ACTIONS_RESULTS_URL", "");
        assert_eq!(without("ACTIONS_CACHE_URL", &[no_results]), None);
    }

    #[test]
    fn version_1_is_used_without_a_token_and_version_2_is_not() {
        let no_token = ("ACTIONS_RUNTIME_TOKEN", "");
        for (name, value, expected) in [
            ("ACT", "true", Some(Protocol::V1)),
            (
                "GITHUB_SERVER_URL",
                "https://forge.example",
                Some(Protocol::V1),
            ),
            ("ACTIONS_RESULTS_URL", "", Some(Protocol::V1)),
            ("GITHUB_SERVER_URL", "https://github.com", None),
        ] {
            let endpoint = endpoint(&[no_token, (name, value)]);
            let protocol = endpoint.as_ref().map(|endpoint| endpoint.protocol);
            assert_eq!(protocol, expected, "{name}={value}");
            assert!(endpoint.is_none_or(|endpoint| endpoint.token.reveal().is_empty()));
        }
    }

    #[test]
    fn act_has_version_1_unless_it_says_otherwise() {
        let protocol = |changes| endpoint(changes).unwrap().protocol;
        assert_eq!(protocol(&[("ACT", "true")]), Protocol::V1);
        let v2 = [("ACT", "true"), ("ACTIONS_CACHE_SERVICE_V2", "on")];
        assert_eq!(protocol(&v2), Protocol::V2);
    }

    #[test]
    fn a_url_ends_in_a_slash_and_is_one_of_http() {
        let url = |url| {
            let endpoint = endpoint(&[("ACTIONS_RESULTS_URL", url)])?;
            Some(endpoint.url.to_string())
        };
        let joined = Some("http://host:1/a/b/".to_owned());
        assert_eq!(url("http://host:1/a/b"), joined);
        assert_eq!(url("http://host:1/a/b/?x=1#y"), joined);
        assert_eq!(url("file:///a/"), None);
        assert_eq!(url("host"), None);
    }

    #[test]
    fn an_endpoint_is_handed_on_whole_and_shown_without_its_secrets() {
        let endpoint = endpoint(&[("ACTIONS_RESULTS_URL", "https://host/secret")]).unwrap();
        let text = serde_json::to_string(&endpoint).unwrap();
        assert_eq!(serde_json::from_str::<Endpoint>(&text).unwrap(), endpoint);
        let client = CacheClient::new(endpoint.clone(), "v", Timeouts::default()).unwrap();
        for shown in [format!("{endpoint:?}"), format!("{client:?}")] {
            assert!(shown.contains("https://host"), "{shown}");
            assert!(
                !shown.contains("hunter2") && !shown.contains("secret"),
                "{shown}"
            );
        }
    }
}
