//! Uploads and downloads of content.

use std::future;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use futures_util::stream;
use futures_util::{Stream, StreamExt, TryStreamExt};
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use reqwest::{Body, Method, RequestBuilder, Response, StatusCode};
use tokio::time::timeout;
use url::Url;

use crate::cache_client::connection::ClientInner;
use crate::cache_client::error::{CacheError, RequestKind};
use crate::cache_client::{Download, Target};
use crate::cache_protocol::content_range::ContentRange;
use crate::cache_protocol::messages::v1;
use crate::format::with_causes;
use crate::http::Pace;

/// How many bytes one request of version 1 carries at most: `uploadChunkSize` of `@actions/cache`
/// (`options.ts`). Proxies in front of such services are configured for it.
const PIECE_SIZE: u64 = 32 << 20;

/// How many bytes are handed to a connection at once. Small enough that a slow connection still
/// shows that it moves.
const WRITE_SIZE: usize = 128 * 1024;

/// How often a download may be sent elsewhere.
const REDIRECT_LIMIT: usize = 5;

impl ClientInner {
    pub(super) async fn upload<S>(
        self: &Arc<Self>,
        target: &Target,
        size: u64,
        source: Arc<Mutex<UploadSource<S>>>,
    ) -> Result<(), CacheError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        match target {
            Target::Signed(url) => {
                let request = self
                    .http(url)
                    .put(url.clone())
                    .header("x-ms-blob-type", "BlockBlob");
                self.send_piece(request, RequestKind::Content, size, &source)
                    .await?;
            }
            Target::Numbered(id) => {
                let url = self.api(&format!("{}/caches/{id}", v1::PATH))?;
                let mut start = 0;
                while start < size {
                    let length = PIECE_SIZE.min(size - start);
                    let range = ContentRange::piece(start, length);
                    let request = self
                        .rest(Method::PATCH, url.clone())
                        .header(CONTENT_RANGE, range.to_string());
                    self.send_piece(request, RequestKind::Upload, length, &source)
                        .await?;
                    start += length;
                }
            }
        }
        // Without this check a part of the content would be uploaded and look like all of it.
        let more = future::poll_fn(|context| locked(&source).poll_bytes(context, 1));
        match timeout(self.read, more).await {
            Ok(None) => Ok(()),
            Ok(Some(Ok(_))) => Err(self.unavailable("the content is longer than its size")),
            Ok(Some(Err(error))) => Err(self.unavailable(error)),
            Err(_) => Err(self.unavailable("the end of the content did not arrive")),
        }
    }

    /// Sends `request` with the next `length` bytes of `source`.
    async fn send_piece<S>(
        self: &Arc<Self>,
        request: RequestBuilder,
        asked: RequestKind,
        length: u64,
        source: &Arc<Mutex<UploadSource<S>>>,
    ) -> Result<(), CacheError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        self.counts().uploads += 1;
        let end = locked(source).taken + length;
        let piece = piece(source.clone(), end).inspect_ok({
            let shared = self.clone();
            move |bytes| shared.counts().bytes_up += bytes.len() as u64
        });
        let request = request
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(CONTENT_LENGTH, length)
            .body(Body::wrap_stream(piece));
        let mut sending = pin!(request.send());
        let mut taken_before = locked(source).taken;
        // The read limit of the HTTP client would end an upload that takes longer than one byte may.
        let response = loop {
            if let Ok(response) = timeout(self.read, sending.as_mut()).await {
                break response;
            }
            let taken = locked(source).taken;
            if taken == taken_before {
                return Err(self.unavailable("an upload stalled"));
            }
            taken_before = taken;
        };
        // The connection's error would only say that there was one.
        if let Some(failure) = locked(source).failure.take() {
            return Err(self.unavailable(failure));
        }
        let response = response.map_err(|error| self.unreachable(error))?;
        if !response.status().is_success() {
            let answer = self.read_refusal(response).await;
            return Err(self.refusal(asked, &answer));
        }
        if locked(source).taken != end {
            return Err(self.unavailable("the server answered before it received the upload"));
        }
        Ok(())
    }

    pub(super) async fn download(
        self: Arc<Self>,
        url: &Url,
        range: Range<u64>,
    ) -> Result<Download, CacheError> {
        if range.is_empty() {
            return Err(self.unavailable("the requested range is empty"));
        }
        let header = match range.end {
            u64::MAX => format!("bytes={}-", range.start),
            end => format!("bytes={}-{}", range.start, end - 1),
        };
        let response = self.get(url, &header).await?;
        let content_range = response
            .headers()
            .get(CONTENT_RANGE)
            .and_then(|value| value.to_str().ok());
        let (total, start, length) = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let part = content_range
                    .and_then(ContentRange::parse)
                    .filter(|part| part.is_all_of(&range))
                    .ok_or_else(|| self.unavailable("the server returned a different range"))?;
                let total = part
                    .total
                    .ok_or_else(|| self.unavailable("a part of content of unknown size"))?;
                (total, part.first, part.length())
            }
            StatusCode::OK => {
                let total = response
                    .content_length()
                    .ok_or_else(|| self.unavailable("content of unknown size"))?;
                (total, 0, total)
            }
            // An empty entry satisfies no range.
            StatusCode::RANGE_NOT_SATISFIABLE
                if range.start == 0 && content_range == Some("bytes */0") =>
            {
                return Ok(Download {
                    total: 0,
                    start: 0,
                    stream: stream::empty().boxed(),
                });
            }
            _ => {
                let answer = self.read_refusal(response).await;
                return Err(self.refusal(RequestKind::Content, &answer));
            }
        };
        Ok(Download {
            total,
            start,
            stream: self.content(response, length).boxed(),
        })
    }

    /// The body of `response`, which must have `length` bytes.
    fn content(
        self: Arc<Self>,
        response: Response,
        length: u64,
    ) -> impl Stream<Item = io::Result<Bytes>> {
        let shared = self.clone();
        let pace = Pace::new(self.slow, Instant::now());
        let begin = (response, length, pace);
        stream::try_unfold(begin, move |(mut response, left, mut pace)| {
            let shared = shared.clone();
            async move {
                let early = |kind, cause: &str| {
                    let text = format!("{left} bytes of the content are missing: {cause}");
                    Err(io::Error::new(kind, shared.printable(&text)))
                };
                let bytes = match timeout(shared.read, response.chunk()).await {
                    Ok(Ok(Some(bytes))) => bytes,
                    Ok(Ok(None)) if left == 0 => return Ok(None),
                    Ok(Ok(None)) => return early(ErrorKind::UnexpectedEof, "it ended"),
                    Ok(Err(error)) => {
                        let cause = with_causes(&error.without_url());
                        return early(ErrorKind::UnexpectedEof, &cause);
                    }
                    Err(_) => return early(ErrorKind::TimedOut, "the download stalled"),
                };
                let length = bytes.len() as u64;
                shared.counts().bytes_down += length;
                if length < left && !pace.keeps_up(bytes.len(), Instant::now()) {
                    return early(ErrorKind::TimedOut, "the download is too slow");
                }
                match left.checked_sub(length) {
                    Some(left) => Ok(Some((bytes, (response, left, pace)))),
                    None => Err(io::Error::new(
                        ErrorKind::InvalidData,
                        "the content is longer than its size",
                    )),
                }
            }
        })
        .inspect_err(move |_| self.counts().failed += 1)
    }

    /// The answer for the bytes `range` of `url`, from wherever it leads. It sends no token.
    async fn get(&self, url: &Url, range: &str) -> Result<Response, CacheError> {
        let mut url = url.clone();
        for _ in 0..=REDIRECT_LIMIT {
            let request = self.http(&url).get(url.clone()).header(RANGE, range);
            let response = self.send(request, true).await?;
            match redirect(&url, &response) {
                Some(next) => url = next,
                None => return Ok(response),
            }
        }
        Err(self.unavailable("too many redirects"))
    }
}

/// The address to which `response`, which came from `url`, redirects.
fn redirect(url: &Url, response: &Response) -> Option<Url> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return None;
    }
    let location = response.headers().get(LOCATION)?.to_str().ok()?;
    url.join(location).ok()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The content of an upload. Several requests take their pieces from it.
pub(super) struct UploadSource<S> {
    stream: Pin<Box<S>>,
    /// Bytes that the stream gave and no request took yet.
    rest: Bytes,
    /// How many bytes were taken.
    taken: u64,
    /// The reason why a piece is unavailable.
    failure: Option<String>,
}

impl<S: Stream<Item = io::Result<Bytes>>> UploadSource<S> {
    pub(super) fn of(stream: S) -> Self {
        Self {
            stream: Box::pin(stream),
            rest: Bytes::new(),
            taken: 0,
            failure: None,
        }
    }

    /// The next bytes, at most `limit`.
    fn poll_bytes(
        &mut self,
        context: &mut Context<'_>,
        limit: usize,
    ) -> Poll<Option<io::Result<Bytes>>> {
        while self.rest.is_empty() {
            match ready!(self.stream.as_mut().poll_next(context)) {
                Some(Ok(bytes)) => self.rest = bytes,
                end => return Poll::Ready(end),
            }
        }
        let bytes = self.rest.split_to(limit.min(self.rest.len()));
        self.taken += bytes.len() as u64;
        Poll::Ready(Some(Ok(bytes)))
    }

    /// The next bytes of the content before `end`.
    fn poll_until(
        &mut self,
        context: &mut Context<'_>,
        end: u64,
    ) -> Poll<Option<io::Result<Bytes>>> {
        let left = usize::try_from(end - self.taken).unwrap_or(usize::MAX);
        if left == 0 {
            return Poll::Ready(None);
        }
        let error = match ready!(self.poll_bytes(context, left.min(WRITE_SIZE))) {
            Some(Ok(bytes)) => return Poll::Ready(Some(Ok(bytes))),
            Some(Err(error)) => error,
            None => io::Error::new(
                ErrorKind::UnexpectedEof,
                "the content is shorter than its size",
            ),
        };
        self.failure = Some(error.to_string());
        Poll::Ready(Some(Err(error)))
    }
}

/// The content of `source` up to `end`, as the body of one request.
fn piece<S>(
    source: Arc<Mutex<UploadSource<S>>>,
    end: u64,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static
where
    S: Stream<Item = io::Result<Bytes>> + Send + 'static,
{
    stream::poll_fn(move |context| locked(&source).poll_until(context, end))
}
