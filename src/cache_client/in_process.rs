//! A cache service in this process, for tests that control the time: with a real connection they
//! could not.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use url::Url;

use crate::cache_client::connection::{CALL_LIMIT, ClientInner};
use crate::cache_client::{CacheClient, CacheError, Download, Endpoint, Protocol};
use crate::http::{self, BearerToken, Timeouts};

/// The methods of such a service.
pub(crate) trait InProcess: Send + Sync {
    /// The key that is found, and the number of its content.
    fn find(&self, keys: Vec<String>) -> BoxFuture<'_, Result<Option<(String, u64)>, CacheError>>;
    /// Whether the key is granted, and the number of the upload.
    fn reserve(&self, key: String) -> BoxFuture<'_, Result<Option<u64>, CacheError>>;
    fn upload(&self, upload: u64, content: Vec<u8>) -> BoxFuture<'_, Result<(), CacheError>>;
    fn commit(&self, upload: u64) -> BoxFuture<'_, Result<(), CacheError>>;
    fn content(&self, id: u64) -> BoxFuture<'_, Result<Bytes, CacheError>>;
}

impl CacheClient {
    /// A client of a service in this process.
    pub(crate) fn in_process(service: Arc<dyn InProcess>) -> Self {
        let endpoint = Endpoint {
            protocol: Protocol::V1,
            url: Url::parse("http://localhost/").unwrap(),
            token: BearerToken::new("none"),
        };
        // All clients share it, since each new one reads the system's certificates.
        static HTTP: std::sync::OnceLock<reqwest::Client> = std::sync::OnceLock::new();
        let timeouts = Timeouts::default();
        let http = HTTP.get_or_init(|| http::builder(timeouts.connect).build().unwrap());
        Self {
            shared: Arc::new(ClientInner {
                endpoint,
                version: String::new(),
                on_loopback: http.clone(),
                elsewhere: http.clone(),
                read: timeouts.read,
                slow: timeouts.read,
                clock: Mutex::default(),
                call_limit: CALL_LIMIT,
                counts: Mutex::default(),
                in_process: Some(service),
            }),
        }
    }
}

impl ClientInner {
    pub(super) fn content_of(id: u64) -> Url {
        Url::parse(&format!("http://localhost/{id}")).unwrap()
    }

    pub(super) async fn download_in_process(
        service: &dyn InProcess,
        url: &Url,
        range: Range<u64>,
    ) -> Result<Download, CacheError> {
        let id = url.path().trim_start_matches('/').parse().unwrap();
        let content = service.content(id).await?;
        let total = content.len() as u64;
        let (start, end) = (range.start, range.end.min(total));
        if start >= total {
            return Err(CacheError::Gone);
        }
        let bytes = content.slice(start as usize..end as usize);
        Ok(Download {
            total,
            start,
            stream: futures_util::stream::iter([Ok(bytes)]).boxed(),
        })
    }
}
