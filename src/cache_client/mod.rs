//! A client of GitHub's cache service: version 2 (Twirp, in JSON as `@actions/cache` speaks it), and
//! version 1 (REST), which GitHub Enterprise Server, Gitea, Forgejo and `act` have.
//!
//! It sends requests and reports results; its caller decides whether and when to retry. The token
//! goes only to the service's own address: the addresses of content are signed, and
//! need none.

mod connection;
mod endpoint;
mod error;
#[cfg(test)]
mod in_process;
mod transfer;
mod v1;
mod v2;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::Stream;
#[cfg(test)]
use futures_util::TryStreamExt;
use futures_util::stream::BoxStream;
use reqwest::redirect::Policy;
use url::Url;

pub use crate::cache_client::connection::RequestCounts;
pub use crate::cache_client::endpoint::{Endpoint, Protocol};
pub use crate::cache_client::error::CacheError;
#[cfg(test)]
pub(crate) use crate::cache_client::in_process::InProcess;

use crate::cache_client::connection::{CALL_LIMIT, ClientInner};
use crate::cache_client::transfer::UploadSource;
use crate::clock::Timestamp;
use crate::http::{self, Timeouts};

/// An entry that a look-up found.
#[derive(Clone)]
pub struct FoundEntry {
    /// Its key: the requested one, or a longer one that begins like it or like a restore key. `act`
    /// and Gitea have keys in lower case.
    pub key: String,
    url: Url,
}

impl fmt::Debug for FoundEntry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("FoundEntry")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

/// The result of a reservation.
#[derive(Debug)]
pub enum Reservation {
    /// The key is this client's to fill.
    Granted(UploadHandle),
    /// There is an entry with the key, or another client is filling it.
    AlreadyExists,
}

/// A key that is reserved and waits for its content.
#[derive(Clone)]
pub struct UploadHandle {
    key: String,
    target: Target,
}

/// The destination of an upload's content.
#[derive(Clone)]
enum Target {
    /// Version 1: to the upload of this number.
    Numbered(u64),
    /// Version 2: to a signed URL.
    Signed(Url),
}

impl fmt::Debug for UploadHandle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("UploadHandle")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

/// Content on its way.
pub struct Download {
    /// The size of the whole entry in bytes.
    pub total: u64,
    /// The position in the entry, in bytes, at which the content begins: the requested one, or 0 if
    /// the server knows no ranges and sends the whole entry.
    pub start: u64,
    /// The content: the existing part of the requested range, or the whole entry; an error comes as
    /// the last item.
    pub stream: BoxStream<'static, io::Result<Bytes>>,
}

impl fmt::Debug for Download {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Download")
            .field("total", &self.total)
            .field("start", &self.start)
            .finish_non_exhaustive()
    }
}

/// A client of one cache service, for entries of one version. Clones share connections and counts.
#[derive(Clone)]
pub struct CacheClient {
    shared: Arc<ClientInner>,
}

impl fmt::Debug for CacheClient {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("CacheClient")
            .field("endpoint", &self.shared.endpoint)
            .field("version", &self.shared.version)
            .finish_non_exhaustive()
    }
}

impl CacheClient {
    /// A client of `endpoint` that sees entries of `version` only (a SHA-256 in hex, by which
    /// clients tell entries of one key apart). A server may take as long for each byte as
    /// `timeouts` says, and half a minute for each call but uploads and downloads.
    ///
    /// # Errors
    /// Fails if the system's certificates or proxy settings cannot be read.
    pub fn new(
        endpoint: Endpoint,
        version: &str,
        timeouts: Timeouts,
    ) -> Result<Self, reqwest::Error> {
        // If the HTTP client followed a redirect, it would send the token to another path of the
        // host, and the last signed URL to the next host.
        let build = |builder: reqwest::ClientBuilder| builder.redirect(Policy::none()).build();
        Ok(Self {
            shared: Arc::new(ClientInner {
                endpoint,
                version: version.to_owned(),
                on_loopback: build(http::builder(timeouts.connect).no_proxy())?,
                elsewhere: build(http::builder(timeouts.connect))?,
                read: timeouts.read,
                slow: timeouts.slow,
                clock: Mutex::default(),
                call_limit: CALL_LIMIT,
                counts: Mutex::default(),
                #[cfg(test)]
                in_process: None,
            }),
        })
    }

    /// The time by the service's clock; `None` before the service has sent it.
    pub fn time(&self) -> Option<Timestamp> {
        let clock = self.shared.clock.lock();
        let (then, at) = (*clock.unwrap_or_else(PoisonError::into_inner))?;
        Some(then + at.elapsed())
    }

    /// The requests to the service so far.
    pub fn requests(&self) -> RequestCounts {
        *self.shared.counts()
    }

    /// Looks for the entry `key`; else, key by key, for the newest that begins with `key` or one of
    /// `restore_keys`. `None` if there is no such entry.
    ///
    /// # Errors
    /// Fails if the service does not answer the question.
    pub async fn find(
        &self,
        key: &str,
        restore_keys: &[&str],
    ) -> Result<Option<FoundEntry>, CacheError> {
        let shared = &self.shared;
        shared.counts().lookups += 1;
        #[cfg(test)]
        if let Some(service) = &shared.in_process {
            let keys = std::iter::once(&key)
                .chain(restore_keys)
                .map(|key| (*key).to_owned());
            let found = shared
                .noted(service.find(keys.collect()).await)?
                .map(|(key, id)| (key, ClientInner::content_of(id)));
            return Ok(found.map(|(key, url)| FoundEntry { key, url }));
        }
        let found = shared.noted(match shared.endpoint.protocol {
            Protocol::V1 => shared.find_v1(key, restore_keys).await,
            Protocol::V2 => shared.find_v2(key, restore_keys).await,
        })?;
        shared.counts().lookup_hits += u64::from(found.is_some());
        Ok(found)
    }

    /// Reserves `key` for an upload of this client's. Version 1 services may refuse a `size`, in
    /// bytes, that is too large for them.
    ///
    /// # Errors
    /// Fails if the service neither reserves the key nor reports that it is taken.
    pub async fn reserve(&self, key: &str, size: Option<u64>) -> Result<Reservation, CacheError> {
        let shared = &self.shared;
        shared.counts().reservations += 1;
        #[cfg(test)]
        if let Some(service) = &shared.in_process {
            let granted = shared.noted(service.reserve(key.to_owned()).await)?;
            return Ok(granted.map_or(Reservation::AlreadyExists, |id| {
                let (key, target) = (key.to_owned(), Target::Numbered(id));
                Reservation::Granted(UploadHandle { key, target })
            }));
        }
        let reserved = shared.noted(match shared.endpoint.protocol {
            Protocol::V1 => shared.reserve_v1(key, size).await,
            Protocol::V2 => shared.reserve_v2(key).await,
        })?;
        Ok(match reserved {
            Some(target) => Reservation::Granted(UploadHandle {
                key: key.to_owned(),
                target,
            }),
            None => {
                shared.counts().conflicts += 1;
                Reservation::AlreadyExists
            }
        })
    }

    /// Uploads `body`, which has `size` bytes; in version 2 Azure takes up to 5,000 MiB. Memory
    /// does not depend on the size. The upload is not an entry until [`CacheClient::commit`]. It
    /// may be retried, with all of the content.
    ///
    /// # Errors
    /// Fails if the service does not take it, takes nothing of it for as long as a byte may take,
    /// or if `body` fails or is of another size.
    pub async fn upload<S>(
        &self,
        upload: &UploadHandle,
        size: u64,
        body: S,
    ) -> Result<(), CacheError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        let shared = &self.shared;
        #[cfg(test)]
        if let (Some(service), Target::Numbered(id)) = (&shared.in_process, &upload.target) {
            let pieces: Vec<Bytes> = body.try_collect().await.unwrap();
            let content = pieces.concat();
            assert_eq!(content.len() as u64, size);
            return shared.noted(service.upload(*id, content).await);
        }
        let source = Arc::new(Mutex::new(UploadSource::of(body)));
        shared.noted(shared.upload(&upload.target, size, source).await)
    }

    /// Makes `upload`, of which `size` bytes were uploaded, an entry.
    ///
    /// # Errors
    /// Fails if the service does not confirm it. [`CacheError::Gone`] if it knows no such upload. A
    /// service may also answer this for an upload that it has committed already.
    pub async fn commit(&self, upload: UploadHandle, size: u64) -> Result<(), CacheError> {
        let shared = &self.shared;
        #[cfg(test)]
        if let (Some(service), Target::Numbered(id)) = (&shared.in_process, &upload.target) {
            return shared.noted(service.commit(*id).await);
        }
        shared.noted(match upload.target {
            Target::Numbered(id) => shared.commit_v1(id, size).await,
            Target::Signed(_) => shared.commit_v2(&upload.key, size).await,
        })?;
        shared.counts().commits += 1;
        Ok(())
    }

    /// Downloads `range`, in bytes, of `found`: to the end of the entry if the range ends at
    /// [`u64::MAX`], and no more than the entry has if the range ends behind it.
    ///
    /// # Errors
    /// Fails if the service sends no content, or another range than the requested one.
    /// [`CacheError::Gone`] also if the entry ends before the range begins.
    pub async fn download(
        &self,
        found: &FoundEntry,
        range: Range<u64>,
    ) -> Result<Download, CacheError> {
        self.shared.counts().downloads += 1;
        #[cfg(test)]
        if let Some(service) = &self.shared.in_process {
            let download = ClientInner::download_in_process(&**service, &found.url, range).await;
            return self.shared.noted(download);
        }
        let download = self.shared.clone().download(&found.url, range).await;
        self.shared.noted(download)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::runner::environment::Environment;

    use super::*;

    #[tokio::test]
    async fn a_call_ends_by_its_limit_whatever_a_byte_may_take() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        for server in ["https://github.com", "https://ghes.example"] {
            let environment = Environment::from_iter([
                ("ACTIONS_RUNTIME_TOKEN", "hunter2"),
                ("GITHUB_SERVER_URL", server),
                ("ACTIONS_RESULTS_URL", &url),
                ("ACTIONS_CACHE_URL", &url),
            ]);
            let endpoint = Endpoint::of(&environment);
            let mut client = CacheClient::new(endpoint.unwrap(), "v", Timeouts::default()).unwrap();
            let shared = Arc::get_mut(&mut client.shared).unwrap();
            assert_eq!(shared.call_limit, Duration::from_secs(30));
            shared.call_limit = Duration::from_millis(100);
            let target = match shared.endpoint.protocol {
                Protocol::V1 => Target::Numbered(1),
                Protocol::V2 => Target::Signed(url.parse().unwrap()),
            };
            let key = "key".to_owned();
            let begin = std::time::Instant::now();
            let errors = [
                client.find("key", &[]).await.unwrap_err(),
                client.reserve("key", None).await.unwrap_err(),
                client
                    .commit(UploadHandle { key, target }, 1)
                    .await
                    .unwrap_err(),
            ];
            // This is before the limit of a single byte.
            assert!(
                begin.elapsed() < Duration::from_secs(15),
                "{:?}",
                begin.elapsed()
            );
            let slow = CacheError::Unavailable("no answer within 100ms".to_owned());
            assert!(errors.iter().all(|error| *error == slow), "{errors:?}");
        }
    }
}
