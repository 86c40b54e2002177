//! Lists and deletes the caches of a repository through GitHub's REST API.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use octocrab::Octocrab;
use octocrab::models::actions::ActionsCacheItem;
use reqwest::StatusCode;
use serde::Deserialize;
use url::Url;

use crate::clock::Timestamp;
use crate::github::explain;
use crate::http;

/// How many entries a page has at most (GitHub's documentation of the API).
const PER_PAGE: u8 = 100;

/// How many pages are read at most. A cache of 10 GB in entries of 10 kB has as many.
const PAGES: u32 = 10_000;

/// How often a request is made before it is given up, the first time among them.
const ATTEMPTS: u32 = 4;

/// The longest wait that GitHub may ask for before the command ends with an error. A person is
/// waiting; the command reports GitHub's own hourly limit and does not wait for it.
const LONGEST_WAIT: Duration = Duration::from_secs(90);

/// The wait after a rate limit if GitHub does not say how long (its documentation: at least a
/// minute).
const DEFAULT_RATE_LIMIT_WAIT: Duration = Duration::from_secs(60);

/// A repository, as `owner/name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    /// Its owner.
    pub owner: String,
    /// Its name.
    pub name: String,
}

/// Text that names no repository.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a repository has the form `OWNER/NAME`")]
pub struct RepositoryError;

impl FromStr for Repository {
    type Err = RepositoryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = |part: &&str| {
            let letters = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            // They become part of a path.
            !part.is_empty() && part.chars().all(letters) && part.chars().any(|c| c != '.')
        };
        let (owner, name) = text.split_once('/').ok_or(RepositoryError)?;
        let owner = Some(owner).filter(fits).ok_or(RepositoryError)?;
        let name = Some(name).filter(fits).ok_or(RepositoryError)?;
        Ok(Self {
            owner: owner.to_owned(),
            name: name.to_owned(),
        })
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.owner, self.name)
    }
}

/// An entry of a repository's cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheEntry {
    /// GitHub's number of it.
    pub id: i64,
    /// The key that it was stored under.
    pub key: String,
    /// The ref whose jobs stored it, if GitHub gives it.
    pub reference: Option<String>,
    /// Its length in bytes.
    pub size: u64,
    /// When it was stored.
    pub created: Timestamp,
    /// When it was last read.
    pub used: Timestamp,
}

impl From<ActionsCacheItem> for CacheEntry {
    fn from(item: ActionsCacheItem) -> Self {
        let positive = |number: i64| u64::try_from(number).unwrap_or(0);
        let time = |seconds: i64| Timestamp::from_seconds(positive(seconds));
        Self {
            id: item.id,
            key: item.key,
            reference: item.r#ref,
            size: positive(item.size_in_bytes),
            created: time(item.created_at.timestamp()),
            used: time(item.last_accessed_at.timestamp()),
        }
    }
}

/// The reason why a request to GitHub's API failed. No text in it has a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// It takes no more requests now, and asks for a longer wait than a command accepts.
    #[error(
        "GitHub's API rate limit is reached{}",
        .wait.map_or_else(String::new, |wait| format!("; retry in {} s", wait.as_secs()))
    )]
    Throttled {
        /// How long it asks to wait.
        wait: Option<Duration>,
    },
    /// The token may not do it: 401 or 403.
    #[error(
        "GitHub's API denied the request: {0}. Listing needs a token with `actions: read`, \
         deleting one with `actions: write`"
    )]
    Denied(String),
    /// It does not exist, or the token may not see it: 404.
    #[error("GitHub's API does not know {0}, or the token may not see it")]
    NotFound(String),
    /// Anything else: it cannot be reached, fails, or its answer cannot be read.
    #[error("GitHub's API failed: {0}")]
    Unavailable(String),
}

/// Converts an error of a request about `what`. `now` is the time.
fn refusal(error: &octocrab::Error, what: &str, now: SystemTime) -> ApiError {
    let octocrab::Error::GitHub { source, .. } = error else {
        return ApiError::Unavailable(explain(error));
    };
    let headers = source.headers.clone().unwrap_or_default();
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    // Two limits: a short one with `Retry-After`, and the hourly one with the time of its end.
    let short = http::retry_after(&headers, now, Duration::MAX);
    let hourly = (header("x-ratelimit-remaining") == Some("0")).then(|| {
        let end = header("x-ratelimit-reset")
            .and_then(|seconds| seconds.parse().ok())
            .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
        end.map(|end| end.duration_since(now).unwrap_or_default())
    });
    match (source.status_code, short, hourly) {
        (StatusCode::TOO_MANY_REQUESTS | StatusCode::FORBIDDEN, Some(wait), _) => {
            ApiError::Throttled { wait: Some(wait) }
        }
        (StatusCode::TOO_MANY_REQUESTS | StatusCode::FORBIDDEN, None, Some(wait)) => {
            ApiError::Throttled { wait }
        }
        (StatusCode::TOO_MANY_REQUESTS, None, None) => ApiError::Throttled { wait: None },
        (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, ..) => ApiError::Denied(explain(error)),
        (StatusCode::NOT_FOUND, ..) => ApiError::NotFound(what.to_owned()),
        _ => ApiError::Unavailable(explain(error)),
    }
}

/// The filter of the list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// A prefix of keys.
    pub key: Option<String>,
    /// The ref, in full.
    pub reference: Option<String>,
}

/// A repository's caches through GitHub's API.
#[derive(Clone, Debug)]
pub struct Caches {
    client: Octocrab,
    repository: Repository,
}

impl Caches {
    /// The caches of `repository` through `client`.
    pub fn new(client: Octocrab, repository: Repository) -> Self {
        Self { client, repository }
    }

    /// Repeats a request while GitHub's rate limit asks to wait, for no longer than a person would.
    async fn with_rate_limit_retry<T, F>(
        &self,
        what: &str,
        request: impl Fn() -> F,
    ) -> Result<T, ApiError>
    where
        F: Future<Output = Result<T, octocrab::Error>>,
    {
        let mut attempt = 1;
        loop {
            let error = match request().await {
                Ok(answer) => return Ok(answer),
                Err(error) => refusal(&error, what, SystemTime::now()),
            };
            let ApiError::Throttled { wait } = &error else {
                return Err(error);
            };
            let wait = wait.unwrap_or(DEFAULT_RATE_LIMIT_WAIT);
            if wait > LONGEST_WAIT || attempt == ATTEMPTS {
                return Err(error);
            }
            attempt += 1;
            tokio::time::sleep(wait).await;
        }
    }

    /// The entries that `filter` lets through, the oldest first.
    ///
    /// # Errors
    /// Fails if a page of them is unavailable: an incomplete list could pass for the whole.
    pub async fn list(&self, filter: &Filter) -> Result<Vec<CacheEntry>, ApiError> {
        let Repository { owner, name } = &self.repository;
        let what = format!("the repository {}", self.repository);
        let actions = self.client.actions();
        // By number, since a new entry moves others to the next page.
        let mut entries: BTreeMap<i64, CacheEntry> = BTreeMap::new();
        let mut seen = 0;
        for page in 1..=PAGES {
            let list = self
                .with_rate_limit_retry(&what, || {
                    let mut list = actions
                        .list_repo_caches(owner, name)
                        // New entries are then on the last page.
                        .sort("created_at")
                        .direction("asc")
                        .per_page(PER_PAGE)
                        .page(page);
                    if let Some(key) = &filter.key {
                        list = list.key(key);
                    }
                    if let Some(reference) = &filter.reference {
                        list = list.r#ref(reference);
                    }
                    list.send()
                })
                .await?;
            let count = i64::try_from(list.actions_caches.len()).unwrap_or(i64::MAX);
            seen += count;
            let items = list.actions_caches.into_iter().map(CacheEntry::from);
            // A service that ignores the filter must not make us select other entries.
            let meant = items.filter(|entry| {
                let key = filter.key.as_ref();
                let reference = filter.reference.as_ref();
                key.is_none_or(|key| entry.key.starts_with(key))
                    && reference.is_none_or(|wanted| entry.reference.as_ref() == Some(wanted))
            });
            entries.extend(meant.map(|entry| (entry.id, entry)));
            if count == 0 || seen >= list.total_count {
                break;
            }
        }
        let mut entries: Vec<CacheEntry> = entries.into_values().collect();
        entries.sort_by_key(|entry| (entry.created, entry.id));
        Ok(entries)
    }

    /// Deletes an entry. Returns whether it was there: another client or GitHub itself may have
    /// deleted it before.
    ///
    /// # Errors
    /// Fails if it may still be there.
    pub async fn delete(&self, entry: &CacheEntry) -> Result<bool, ApiError> {
        let Repository { owner, name } = &self.repository;
        let actions = self.client.actions();
        let deleted = self
            .with_rate_limit_retry(&entry.key, || {
                actions.delete_repo_cache(owner, name, entry.id)
            })
            .await;
        match deleted {
            Ok(()) => Ok(true),
            Err(ApiError::NotFound(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The `references` that no longer exist: pull requests (`refs/pull/…`) that are closed,
    /// branches and tags that are not in the list of them. The list of caches does not contain
    /// this; so this sends one request for each ref, and accepts nothing but GitHub's explicit
    /// answer.
    ///
    /// # Errors
    /// Fails if GitHub does not answer for one of them.
    pub async fn gone(&self, references: &BTreeSet<String>) -> Result<BTreeSet<String>, ApiError> {
        let mut gone = BTreeSet::new();
        for reference in references {
            if self.is_gone(reference).await? {
                gone.insert(reference.clone());
            }
        }
        Ok(gone)
    }

    async fn is_gone(&self, reference: &str) -> Result<bool, ApiError> {
        #[derive(Deserialize)]
        struct PullRequest {
            state: String,
        }
        #[derive(Deserialize)]
        struct Reference {
            r#ref: String,
        }
        let get = |route: String| async move {
            let client = &self.client;
            client
                .get::<serde_json::Value, _, ()>(route, None::<&()>)
                .await
        };
        let unreadable = |error: serde_json::Error| ApiError::Unavailable(error.to_string());
        let base = format!("/repos/{}", self.repository);
        if let Some(number) = pull_request(reference) {
            let route = format!("{base}/pulls/{number}");
            let answer = self
                .with_rate_limit_retry(reference, || get(route.clone()))
                .await?;
            let answer: PullRequest = serde_json::from_value(answer).map_err(unreadable)?;
            return Ok(answer.state == "closed");
        }
        let Some(short) = reference.strip_prefix("refs/") else {
            return Ok(false);
        };
        // It does not ask for the ref itself: GitHub answers 404 both for a missing ref and for one
        // that the token may not see.
        let route = format!("{base}/git/matching-refs{}", path(short));
        let answer = self
            .with_rate_limit_retry(reference, || get(route.clone()))
            .await?;
        let answer: Vec<Reference> = serde_json::from_value(answer).map_err(unreadable)?;
        Ok(answer.iter().all(|found| found.r#ref != reference))
    }
}

/// The number of the pull request whose ref this is.
fn pull_request(reference: &str) -> Option<u64> {
    let (number, kind) = reference.strip_prefix("refs/pull/")?.split_once('/')?;
    matches!(kind, "merge" | "head").then(|| number.parse().ok())?
}

/// `reference` as a path, with each part percent-encoded.
fn path(reference: &str) -> String {
    let Ok(mut url) = Url::parse("http://host/") else {
        return String::new();
    };
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(reference.split('/'));
    }
    url.path().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_is_an_owner_and_a_name_and_nothing_that_leads_elsewhere() {
        let repository: Repository = "some-one/a.b_c".parse().unwrap();
        assert_eq!(repository.to_string(), "some-one/a.b_c");
        for wrong in [
            "", "a", "a/", "/b", "a/b/c", "a/..", "../b", "a/b?c", "a b/c",
        ] {
            assert_eq!(wrong.parse::<Repository>(), Err(RepositoryError), "{wrong}");
        }
    }

    #[test]
    fn a_ref_is_a_pull_requests_only_where_it_is_written_so() {
        assert_eq!(pull_request("refs/pull/7/merge"), Some(7));
        assert_eq!(pull_request("refs/pull/7/head"), Some(7));
        for other in [
            "refs/heads/pull/7/merge",
            "refs/pull/x/merge",
            "refs/pull/7",
        ] {
            assert_eq!(pull_request(other), None, "{other}");
        }
    }

    #[test]
    fn a_refs_name_cannot_leave_its_place_in_a_path() {
        assert_eq!(path("heads/a/b"), "/heads/a/b");
        assert_eq!(path("heads/a#b?c"), "/heads/a%23b%3Fc");
    }
}
