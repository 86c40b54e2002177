//! Where the bytes are: a folder, or a bucket that speaks S3, through opendal.
//!
//! A blob is written once, in one go, and never changed. Its path is its number under the name of
//! the store, so that two stores may share a bucket.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, Stream, StreamExt, TryFutureExt, TryStreamExt, stream};
use opendal::layers::{RetryLayer, TimeoutLayer};
use opendal::{Buffer, ErrorKind, HttpTransporter, OperationContext, Operator, services};
use opendal_http_transport_reqwest::ReqwestTransport;
use tokio::sync::Semaphore;

use crate::http_client;
use crate::service::parts::{self, Part, Segment};
use crate::service::store::{Bytestream, Piece, Readable, StoreError};

/// What of a blob is gathered before it is written, in bytes. Most objects of a compiler cache are
/// smaller, and cost one call.
const SMALL: usize = 64 * 1024;

/// What of a larger blob is in memory at once in a folder, in bytes.
const FOLDER_CHUNK: usize = 512 * 1024;

/// The same for a bucket, where it is a part of a multipart upload: ten thousand of them are what
/// S3 takes, and at least 5 MiB each.
const BUCKET_CHUNK: usize = 8 * 1024 * 1024;

/// How many larger blobs are written at once; with [`BUCKET_CHUNK`] that bounds the memory of
/// uploads to 192 MiB. Others wait, and their clients with them.
const WRITERS: usize = 24;

/// How long a client may take for the next piece of what it sends: it holds one of [`WRITERS`].
const PIECE_WAIT: Duration = Duration::from_secs(60);

/// How long a connection to the bucket may take.
const CONNECT_WAIT: Duration = Duration::from_secs(10);

/// How long a call of the storage may take without a byte.
const STORAGE_WAIT: Duration = Duration::from_secs(30);

/// Where blobs are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// In a folder.
    Folder(PathBuf),
    /// In a bucket that speaks S3.
    Bucket(Bucket),
}

/// A bucket. Region and credentials that are not given here come from the `AWS_*` variables, files
/// and services that opendal's S3 service looks at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Its name.
    pub name: String,
    /// What the paths in it begin with; may be empty.
    pub prefix: String,
    /// The URL of the service, where it is not Amazon's.
    pub endpoint: Option<String>,
    /// The region.
    pub region: Option<String>,
    /// The credentials.
    pub credentials: Option<Credentials>,
}

/// An access key and its secret, shown to nobody who prints them by accident.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The access key.
    pub access_key: String,
    /// Its secret.
    pub secret_key: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Credentials(***)")
    }
}

/// Opens and reads blobs.
#[derive(Clone)]
pub struct Blobs {
    operator: Operator,
    /// The name of the store, which paths begin with.
    store: Arc<str>,
    chunk: usize,
    /// Reading a bucket in chunks would be a request each.
    chunked_reads: bool,
    writers: Arc<Semaphore>,
}

impl fmt::Debug for Blobs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An operator's own form has its credentials.
        let info = self.operator.info();
        write!(formatter, "Blobs({}:{})", info.scheme(), info.root())
    }
}

impl Blobs {
    /// The blobs at `location` of the store called `store`.
    ///
    /// # Errors
    /// Where opendal takes it for no such place.
    pub fn open(location: &Location, store: &str) -> Result<Self, opendal::Error> {
        let (operator, chunk) = match location {
            Location::Folder(folder) => {
                let builder = services::Fs::default().root(&folder.to_string_lossy());
                (Operator::new(builder)?, FOLDER_CHUNK)
            }
            Location::Bucket(bucket) => {
                let mut builder = services::S3::default()
                    .bucket(&bucket.name)
                    .root(&bucket.prefix);
                if let Some(endpoint) = &bucket.endpoint {
                    builder = builder.endpoint(endpoint);
                }
                if let Some(region) = &bucket.region {
                    builder = builder.region(region);
                }
                if let Some(credentials) = &bucket.credentials {
                    builder = builder
                        .access_key_id(&credentials.access_key)
                        .secret_access_key(&credentials.secret_key);
                }
                let operator = Operator::new(builder)?.with_context(transport()?);
                (operator, BUCKET_CHUNK)
            }
        };
        Ok(Self {
            operator: operator
                .layer(
                    TimeoutLayer::new()
                        .with_timeout(STORAGE_WAIT)
                        .with_io_timeout(STORAGE_WAIT),
                )
                .layer(RetryLayer::new().with_max_times(3).with_jitter()),
            store: store.into(),
            chunk,
            chunked_reads: matches!(location, Location::Folder(_)),
            writers: Arc::new(Semaphore::new(WRITERS)),
        })
    }

    /// 256 folders keep each of them small on file systems that search them.
    fn path(&self, blob: u64) -> String {
        format!("{}/{:02x}/{blob}", self.store, blob % 256)
    }

    /// Writes `pieces` as a blob and gives its size in bytes.
    ///
    /// # Errors
    /// The stream's, or where nothing comes of it for too long, or the storage fails. A blob that
    /// was begun may be there then.
    pub async fn write(
        &self,
        blob: u64,
        pieces: impl Stream<Item = Piece> + Send,
    ) -> Result<u64, StoreError> {
        let mut pieces = std::pin::pin!(pieces);
        let mut next = async || match tokio::time::timeout(PIECE_WAIT, pieces.next()).await {
            Ok(piece) => piece.transpose(),
            Err(_) => {
                let waited = format!("nothing came for {} s", PIECE_WAIT.as_secs());
                Err(StoreError::Interrupted(waited))
            }
        };
        let path = self.path(blob);
        let mut size = 0u64;
        let mut gathered = Gathered::default();
        while gathered.size <= SMALL {
            let Some(piece) = next().await? else {
                self.operator.write(&path, gathered.take()).await?;
                return Ok(size);
            };
            size += piece.len() as u64;
            gathered.add(piece);
        }
        // The semaphore is never closed.
        let _permit = self
            .writers
            .acquire()
            .await
            .map_err(std::io::Error::other)?;
        let mut writer = self.operator.writer_with(&path).chunk(self.chunk).await?;
        let written = async {
            writer.write(gathered.take()).await?;
            while let Some(piece) = next().await? {
                size += piece.len() as u64;
                writer.write(piece).await?;
            }
            writer.close().await?;
            Ok(size)
        };
        let written = written.await;
        if written.is_err() {
            // What a folder keeps of it is deleted with the blob.
            let _ = writer.abort().await;
        }
        written
    }

    /// A stream of the bytes of `segments`, one behind the other.
    fn read(&self, segments: Vec<Segment>) -> impl Stream<Item = std::io::Result<Bytes>> + use<> {
        let blobs = self.clone();
        stream::iter(segments)
            .then(move |segment| {
                let blobs = blobs.clone();
                async move { blobs.read_segment(segment).await }
            })
            .try_flatten()
    }

    async fn read_segment(
        &self,
        segment: Segment,
    ) -> std::io::Result<impl Stream<Item = std::io::Result<Bytes>> + use<>> {
        let path = self.path(segment.blob);
        let range = segment.start..segment.start + segment.length;
        let reader = self.operator.reader_with(&path);
        let reader = match self.chunked_reads {
            true => reader.chunk(self.chunk).await?,
            false => reader.await?,
        };
        Ok(reader.into_bytes_stream(range).await?)
    }

    /// Deletes blobs; those that are not there count as deleted.
    ///
    /// # Errors
    /// Where the storage fails. Some of them may be deleted then.
    pub async fn delete(&self, blobs: impl IntoIterator<Item = u64>) -> Result<(), opendal::Error> {
        let paths: Vec<String> = blobs.into_iter().map(|blob| self.path(blob)).collect();
        self.operator.delete_iter(paths).await
    }

    /// Writes, reads and deletes a blob of its own, so that a wrong bucket or missing rights are
    /// known at the start.
    ///
    /// # Errors
    /// The storage's.
    pub async fn check(&self, name: &str) -> Result<(), opendal::Error> {
        let path = format!("{}/check-{name}", self.store);
        self.operator.write(&path, "checked").await?;
        let read = self.operator.read(&path).await?;
        self.operator.delete(&path).await?;
        if read.to_vec() != b"checked" {
            let message = "what was read is not what was written";
            return Err(opendal::Error::new(ErrorKind::Unexpected, message));
        }
        Ok(())
    }
}

/// The HTTP client of this binary, for opendal.
fn transport() -> Result<OperationContext, opendal::Error> {
    let client = http_client::builder(CONNECT_WAIT)
        .build()
        .map_err(|error| {
            opendal::Error::new(ErrorKind::Unexpected, "no HTTP client").set_source(error)
        })?;
    let transport = HttpTransporter::new(ReqwestTransport::new(client));
    Ok(OperationContext::new().with_http_transport(transport))
}

/// Pieces that wait to be written together.
#[derive(Default)]
struct Gathered {
    pieces: Vec<Bytes>,
    size: usize,
}

impl Gathered {
    fn add(&mut self, piece: Bytes) {
        self.size += piece.len();
        self.pieces.push(piece);
    }

    fn take(&mut self) -> Buffer {
        self.size = 0;
        Buffer::from(std::mem::take(&mut self.pieces))
    }
}

/// An entry's content: parts that are blobs.
#[derive(Clone, Debug)]
pub struct Parts {
    blobs: Blobs,
    parts: Arc<[Part]>,
    size: u64,
}

/// What is read whole before an answer begins, in bytes, so that a blob that is gone or too short is
/// a miss and not an answer that breaks off.
const READ_AT_ONCE: u64 = 128 * 1024;

impl Parts {
    /// The content that `parts` of `blobs` make up.
    pub fn new(blobs: Blobs, parts: Arc<[Part]>) -> Self {
        let size = parts::total(&parts);
        Self { blobs, parts, size }
    }

    async fn begin(&self, first: u64, length: u64) -> std::io::Result<Bytestream> {
        let segments = parts::segments(&self.parts, first, length);
        let mut stream = Box::pin(self.blobs.read(segments));
        let ends = || {
            let kind = std::io::ErrorKind::UnexpectedEof;
            std::io::Error::new(kind, "a blob is shorter than its entry says")
        };
        if length > READ_AT_ONCE {
            let begun = stream.try_next().await?.ok_or_else(ends)?;
            return Ok(stream::iter([Ok(begun)]).chain(stream).boxed());
        }
        let mut pieces: Vec<Bytes> = stream.try_collect().await?;
        let all = match pieces.len() {
            1 => pieces.remove(0),
            _ => pieces.concat().into(),
        };
        if all.len() as u64 != length {
            return Err(ends());
        }
        Ok(stream::iter([Ok(all)]).boxed())
    }
}

impl Readable for Parts {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, first: u64, length: u64) -> BoxFuture<'_, std::io::Result<Bytestream>> {
        self.begin(first, length).map_err(told_short).boxed()
    }
}

/// opendal calls a blob that ends before the range `RangeNotSatisfied`, which
/// std has no kind for; here it is the end of a file, so that the entry is dropped and can be saved
/// again.
fn told_short(error: std::io::Error) -> std::io::Error {
    let short = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<opendal::Error>())
        .is_some_and(|inner| matches!(inner.kind(), opendal::ErrorKind::RangeNotSatisfied));
    match short {
        true => std::io::Error::new(std::io::ErrorKind::UnexpectedEof, error),
        false => error,
    }
}

impl From<opendal::Error> for StoreError {
    fn from(error: opendal::Error) -> Self {
        Self::Behind(error.into())
    }
}
