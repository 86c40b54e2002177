//! Requests to a cache service, their limits, and their counts.

use std::fmt;
#[cfg(test)]
use std::sync::Arc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use reqwest::header::{DATE, HeaderMap};
use reqwest::{RequestBuilder, Response};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use url::Url;

use crate::cache_client::endpoint::Endpoint;
use crate::cache_client::error::{ApiAnswer, CacheError, Problem, RequestKind, printable, refusal};
#[cfg(test)]
use crate::cache_client::in_process::InProcess;
use crate::clock::Timestamp;
use crate::format::with_causes;
use crate::http;

/// How long a call of the API may take as a whole. It moves some kilobytes.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(30);

/// The longest answer that is read into memory, in bytes. GitHub's longest answer has a signed URL
/// of some hundred bytes.
const ANSWER_LIMIT: usize = 64 * 1024;

/// The requests of a client so far. A request that is repeated because its connection was closed
/// counts once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestCounts {
    /// Look-ups.
    pub lookups: u64,
    /// Look-ups that found an entry.
    pub lookup_hits: u64,
    /// Reservations requested.
    pub reservations: u64,
    /// Reservations refused because there is such an entry already.
    pub conflicts: u64,
    /// Requests that carried content; in version 1 one entry may take several.
    pub uploads: u64,
    /// Uploads made entries.
    pub commits: u64,
    /// Requests for content.
    pub downloads: u64,
    /// Requests that ended in [`CacheError::Throttled`].
    pub throttled: u64,
    /// Requests that ended in any other error, even after they had begun to give content.
    pub failed: u64,
    /// Bytes of content handed to connections.
    pub bytes_up: u64,
    /// Bytes of content received.
    pub bytes_down: u64,
}

/// The state that clones of a client share.
pub(super) struct ClientInner {
    pub(super) endpoint: Endpoint,
    pub(super) version: String,
    /// For hosts on this machine: a proxy would look for them on its own machine.
    pub(super) on_loopback: reqwest::Client,
    pub(super) elsewhere: reqwest::Client,
    /// How long to wait for the next byte.
    pub(super) read: Duration,
    /// How long content may trickle.
    pub(super) slow: Duration,
    /// The service's last reported time, and when it came.
    pub(super) clock: Mutex<Option<(Timestamp, Instant)>>,
    /// [`CALL_LIMIT`]; tests shorten it.
    pub(super) call_limit: Duration,
    pub(super) counts: Mutex<RequestCounts>,
    /// A service that replaces the one at the endpoint.
    #[cfg(test)]
    pub(super) in_process: Option<Arc<dyn InProcess>>,
}

impl ClientInner {
    pub(super) fn counts(&self) -> MutexGuard<'_, RequestCounts> {
        // The numbers stay valid if a thread panics while it holds the lock.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts `result` if it is an error.
    pub(super) fn noted<T>(&self, result: Result<T, CacheError>) -> Result<T, CacheError> {
        match &result {
            Ok(_) => {}
            Err(CacheError::Throttled { .. }) => self.counts().throttled += 1,
            Err(_) => self.counts().failed += 1,
        }
        result
    }

    /// The HTTP client for `url`.
    pub(super) fn http(&self, url: &Url) -> &reqwest::Client {
        if http::is_on_loopback(url) {
            &self.on_loopback
        } else {
            &self.elsewhere
        }
    }

    /// The service's URL for `path`.
    pub(super) fn api(&self, path: &str) -> Result<Url, CacheError> {
        let url = self.endpoint.url.join(path);
        url.map_err(|error| self.unavailable(error))
    }

    /// The answer to a call of the API, of any status.
    pub(super) async fn call(
        &self,
        request: RequestBuilder,
        again: bool,
    ) -> Result<ApiAnswer, CacheError> {
        let call = async {
            let response = self.send(request, again).await?;
            if !response.status().is_success() {
                return Ok(self.read_refusal(response).await);
            }
            let (status, headers) = (response.status(), response.headers().clone());
            self.note_time(&headers);
            Ok(ApiAnswer {
                status,
                headers,
                body: self.read(response).await?,
            })
        };
        timeout(self.call_limit, call)
            .await
            .unwrap_or_else(|_| Err(self.too_slow(self.call_limit)))
    }

    /// Notes the service's time, which it says in each answer.
    pub(super) fn note_time(&self, headers: &HeaderMap) {
        let since = headers
            .get(DATE)
            .and_then(|date| date.to_str().ok())
            .and_then(|date| httpdate::parse_http_date(date).ok())
            .and_then(|date| date.duration_since(UNIX_EPOCH).ok());
        if let Some(since) = since {
            let mut clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
            *clock = Some((Timestamp::UNIX_EPOCH + since, Instant::now()));
        }
    }

    /// Sends `request`. With `again` it sends it once more if the connection was closed before
    /// there was an answer: a server closes idle connections, even one that is just being used.
    pub(super) async fn send(
        &self,
        request: RequestBuilder,
        again: bool,
    ) -> Result<Response, CacheError> {
        let second = request.try_clone().filter(|_| again);
        let first = timeout(self.read, request.send()).await;
        let sent = match (first, second) {
            (Ok(Err(error)), Some(second)) if was_closed(&error) => {
                timeout(self.read, second.send()).await
            }
            (first, _) => first,
        };
        match sent {
            Ok(response) => response.map_err(|error| self.unreachable(error)),
            Err(_) => Err(self.too_slow(self.read)),
        }
    }

    /// The body of `response`, which is a short one.
    pub(super) async fn read(&self, mut response: Response) -> Result<Vec<u8>, CacheError> {
        let read = async {
            let mut body = Vec::new();
            while let Some(bytes) = response.chunk().await? {
                if body.len() + bytes.len() > ANSWER_LIMIT {
                    return Ok(None);
                }
                body.extend_from_slice(&bytes);
            }
            Ok(Some(body))
        };
        match timeout(self.read, read).await {
            Ok(Ok(Some(body))) => Ok(body),
            Ok(Ok(None)) => Err(self.unavailable("the answer is too long")),
            Ok(Err(error)) => Err(self.unreachable(error)),
            Err(_) => Err(self.too_slow(self.read)),
        }
    }

    /// A response that is no success, with as much of its body as can be read.
    pub(super) async fn read_refusal(&self, response: Response) -> ApiAnswer {
        ApiAnswer {
            status: response.status(),
            headers: response.headers().clone(),
            body: self.read(response).await.unwrap_or_default(),
        }
    }

    pub(super) fn read_as<T: DeserializeOwned>(&self, answer: &ApiAnswer) -> Result<T, CacheError> {
        serde_json::from_slice(&answer.body)
            .map_err(|error| self.unavailable(format_args!("invalid response: {error}")))
    }

    /// The URL of content, as the service gave it.
    pub(super) fn content_url(&self, url: &str) -> Result<Url, CacheError> {
        // The text is a secret, and not in the error.
        Url::parse(url).map_err(|error| self.unavailable(format_args!("invalid address: {error}")))
    }

    pub(super) fn printable(&self, text: &str) -> String {
        printable(text, self.endpoint.token.reveal())
    }

    pub(super) fn refusal(&self, asked: RequestKind, answer: &ApiAnswer) -> CacheError {
        refusal(asked, answer, SystemTime::now(), |text| {
            self.printable(text)
        })
    }

    /// The error for an answer that is a success by its status and not by its text.
    pub(super) fn not_ok(&self, problem: &Problem) -> CacheError {
        if problem.is_denial() {
            return CacheError::Denied(self.printable(&problem.message));
        }
        self.unavailable(format_args!(
            "the server returned an error: {}",
            problem.message
        ))
    }

    pub(super) fn unavailable(&self, reason: impl fmt::Display) -> CacheError {
        CacheError::Unavailable(self.printable(&reason.to_string()))
    }

    pub(super) fn unreachable(&self, error: reqwest::Error) -> CacheError {
        let host = error.url().and_then(Url::host_str).map(str::to_owned);
        let cause = with_causes(&error.without_url());
        match host {
            Some(host) => self.unavailable(format_args!("{host}: {cause}")),
            None => self.unavailable(cause),
        }
    }

    pub(super) fn too_slow(&self, limit: Duration) -> CacheError {
        self.unavailable(format_args!("no answer within {limit:?}"))
    }
}

/// Whether a request may be repeated because the server cannot have answered it.
fn was_closed(error: &reqwest::Error) -> bool {
    (error.is_connect() || error.is_request()) && !error.is_timeout()
}
