//! Stores the bytes of blobs: in a folder, or in a bucket that speaks S3, through opendal.
//!
//! A blob is written once, in one go, and never changed. Its path is its number under the name of
//! the store, so that two stores may share a bucket.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, Stream, StreamExt, TryStreamExt, stream};
use opendal::layers::{RetryLayer, TimeoutLayer};
use opendal::{Buffer, ErrorKind, HttpTransporter, OperationContext, Operator, services};
use opendal_http_transport_reqwest::ReqwestTransport;
use tokio::sync::Semaphore;

use crate::cache_protocol::blob_digests::{CHUNK, Digester, Digests};
use crate::cache_protocol::ids::BlobId;
use crate::cache_protocol::parts::{self, Part, Segment};
use crate::cache_protocol::store::{Bytestream, Chunk, RangeRead, StoreError};
use crate::http;
use crate::serve::private_files;
use crate::serve::small_contents::SmallContents;

/// How much of a larger blob is read at once from a folder, in bytes. Writes to a folder are not
/// buffered.
const FOLDER_CHUNK: usize = 512 * 1024;

/// How much of a larger blob is in memory at once for a bucket. It is a part of a multipart upload:
/// S3 takes up to ten thousand of them, of at least 5 MiB each.
const BUCKET_CHUNK: usize = 8 * 1024 * 1024;

/// How many larger blobs are written to a bucket at once; with [`BUCKET_CHUNK`] that bounds the memory of
/// uploads to 192 MiB. Others wait, and their clients with them.
const WRITERS: usize = 24;

/// The bytes that a client must send in each [`RATE_OVER`] while it holds one of [`WRITERS`] and
/// others wait for it: 10 kB a second.
const LEAST_RATE: u64 = 300_000;

/// The period for [`LEAST_RATE`].
const RATE_OVER: Duration = Duration::from_secs(30);

/// How long a client may take for the next piece.
const PIECE_WAIT: Duration = Duration::from_secs(60);

/// How long a connection to the bucket may take.
const CONNECT_WAIT: Duration = Duration::from_secs(10);

/// How long a call of the storage may take without a byte.
const STORAGE_WAIT: Duration = Duration::from_secs(30);

/// The storage for blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// In a folder.
    Folder(PathBuf),
    /// In a bucket that speaks S3.
    Bucket(Bucket),
}

/// A bucket. Credentials that are not given here come from the `AWS_*` variables, files and services that
/// opendal's S3 service looks at, and the region from `AWS_REGION` or `AWS_DEFAULT_REGION`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Its name.
    pub name: String,
    /// The prefix of the paths in it; may be empty.
    pub prefix: String,
    /// The URL of the service, if it is not Amazon's.
    pub endpoint: Option<String>,
    /// The region.
    pub region: Option<String>,
    /// The credentials.
    pub credentials: Option<Credentials>,
}

/// An access key and its secret. `Debug` shows neither.
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
pub struct BlobStore {
    operator: Operator,
    /// The name of the store, which paths begin with.
    store: Arc<str>,
    chunk: usize,
    /// In a bucket, each chunk would be a request.
    chunked_reads: bool,
    /// The folder, if the storage is one.
    folder: Option<Arc<Folder>>,
    /// For a bucket. In a folder a slow client holds nothing that others need.
    writers: Option<Arc<Semaphore>>,
}

/// A folder of blobs, and which of the folders in it have a name on the disk, too.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    named: [AtomicBool; SHARDS],
}

/// The number of folders that blobs are spread over: each of them stays small on file systems that
/// search them.
const SHARDS: usize = 256;

impl Folder {
    /// Syncs the name of an existing file to the disk, in the folder of this number.
    fn sync(&self, store: &str, shard: usize) -> io::Result<()> {
        let own = self.path.join(store);
        private_files::sync(&own.join(format!("{shard:02x}")))?;
        let named = &self.named[shard % SHARDS];
        if !named.load(Ordering::Acquire) {
            private_files::sync(&own)?;
            private_files::sync(&self.path)?;
            named.store(true, Ordering::Release);
        }
        Ok(())
    }
}

impl fmt::Debug for BlobStore {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The operator's own `Debug` shows its credentials.
        let info = self.operator.info();
        write!(formatter, "BlobStore({}:{})", info.scheme(), info.root())
    }
}

impl BlobStore {
    /// The blobs at `location` of the store called `store`.
    ///
    /// # Errors
    /// Fails if opendal does not accept the location.
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
        let operator = operator.layer(
            TimeoutLayer::new()
                .with_timeout(STORAGE_WAIT)
                .with_io_timeout(STORAGE_WAIT),
        );
        Ok(Self {
            operator: match location {
                // A disk that refuses now refuses a second later as well, and the client waits.
                Location::Folder(_) => operator,
                Location::Bucket(_) => {
                    operator.layer(RetryLayer::new().with_max_times(3).with_jitter())
                }
            },
            store: store.into(),
            chunk,
            chunked_reads: matches!(location, Location::Folder(_)),
            folder: match location {
                Location::Bucket(_) => None,
                Location::Folder(folder) => Some(Arc::new(Folder {
                    path: folder.clone(),
                    named: [const { AtomicBool::new(false) }; SHARDS],
                })),
            },
            writers: match location {
                Location::Folder(_) => None,
                Location::Bucket(_) => Some(Arc::new(Semaphore::new(WRITERS))),
            },
        })
    }

    fn path(&self, blob: BlobId) -> String {
        format!("{}/{:02x}/{blob}", self.store, shard(blob))
    }

    /// Writes `begin` and then `pieces` as a blob. When this returns, all of it is on the disk.
    ///
    /// # Errors
    /// The stream's error; an error if no bytes come for too long, or if the storage fails. A blob
    /// that was begun may be there then.
    pub async fn write(
        &self,
        blob: BlobId,
        begin: Vec<Bytes>,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<WrittenBlob, StoreError> {
        let written = self.write_file(blob, begin, pieces).await?;
        if let Some(folder) = &self.folder {
            let (folder, store) = (folder.clone(), self.store.clone());
            let synced = tokio::task::spawn_blocking(move || folder.sync(&store, shard(blob)));
            synced.await.map_err(io::Error::other)??;
        }
        Ok(written)
    }

    async fn write_file(
        &self,
        blob: BlobId,
        begin: Vec<Bytes>,
        pieces: impl Stream<Item = Chunk> + Send,
    ) -> Result<WrittenBlob, StoreError> {
        let mut pieces = std::pin::pin!(pieces);
        let path = self.path(blob);
        let mut blob = BlobDigester::default();
        for piece in &begin {
            blob.add(piece);
        }
        let writer = self.operator.writer_with(&path);
        let (_permit, mut writer) = match &self.writers {
            None => (None, writer.await?),
            Some(writers) => {
                // The semaphore is never closed.
                let permit = writers.acquire().await.map_err(io::Error::other)?;
                (Some(permit), writer.chunk(self.chunk).await?)
            }
        };
        let mut rate = Rate::begun(Instant::now());
        let written = async {
            // Its end is synced to the disk by opendal.
            writer.write(Buffer::from(begin)).await?;
            while let Some(piece) = next(&mut pieces).await? {
                blob.add(&piece);
                let slow = rate.is_too_low(piece.len(), Instant::now());
                if slow && self.is_waited_for() {
                    let slow = "it was slower than 10 kB a second while others waited";
                    return Err(StoreError::Interrupted(slow.to_owned()));
                }
                writer.write(piece).await?;
            }
            writer.close().await?;
            Ok(blob.end())
        };
        let written = written.await;
        if written.is_err() && self.writers.is_some() {
            // The remains in a folder are deleted with the blob.
            let _ = writer.abort().await;
        }
        written
    }

    fn is_waited_for(&self) -> bool {
        let writers = self.writers.as_ref();
        writers.is_some_and(|writers| writers.available_permits() == 0)
    }

    /// The bytes of `segment`, which is in `part`, verified by their digests.
    async fn read(&self, segment: Segment, part: Part) -> io::Result<Bytestream> {
        if part.digests.is_empty() {
            return Ok(self.read_unchecked(segment).await?.boxed());
        }
        let wide = digests_of(&segment, part.size);
        let checking = CheckedReader {
            bytes: self.read_unchecked(wide).await?.boxed(),
            rest: Bytes::new(),
            at: wide.start,
            end: wide.start + wide.length,
            part,
            wanted: segment,
        };
        let checked = stream::try_unfold(checking, CheckedReader::next).map_ok(stream::iter);
        Ok(checked
            .map_ok(|pieces| pieces.map(Ok))
            .try_flatten()
            .boxed())
    }

    async fn read_unchecked(
        &self,
        segment: Segment,
    ) -> io::Result<impl Stream<Item = io::Result<Bytes>> + Send + use<>> {
        let path = self.path(segment.blob);
        let range = segment.start..segment.start + segment.length;
        let reader = self.operator.reader_with(&path);
        let reader = if self.chunked_reads {
            reader.chunk(self.chunk).await?
        } else {
            reader.await?
        };
        let stream = reader.into_bytes_stream(range).await.map_err(told_short)?;
        Ok(stream.map_err(told_short))
    }

    /// Deletes blobs; missing ones count as deleted.
    ///
    /// # Errors
    /// Fails if the storage fails. Some of them may be deleted then.
    pub async fn delete(
        &self,
        blobs: impl IntoIterator<Item = BlobId>,
    ) -> Result<(), opendal::Error> {
        let paths: Vec<String> = blobs.into_iter().map(|blob| self.path(blob)).collect();
        self.operator.delete_iter(paths).await
    }

    /// Writes, reads and deletes a test blob, so that a wrong bucket or missing rights are known at
    /// the start.
    ///
    /// # Errors
    /// An error of the storage.
    pub async fn check(&self, name: &str) -> Result<(), opendal::Error> {
        let path = format!("{}/check-{name}", self.store);
        self.operator.write(&path, "checked").await?;
        let read = self.operator.read(&path).await?;
        self.operator.delete(&path).await?;
        if read.to_vec() != b"checked" {
            let message = "the bytes do not match their digests";
            return Err(opendal::Error::new(ErrorKind::Unexpected, message));
        }
        Ok(())
    }
}

fn shard(blob: BlobId) -> usize {
    // The rest is less than that number.
    usize::try_from(blob.0 % SHARDS as u64).unwrap_or(0)
}

/// The next piece from a client, within a time limit.
async fn next(
    pieces: &mut (impl Stream<Item = Chunk> + Unpin + Send),
) -> Result<Option<Bytes>, StoreError> {
    // Bytes that are available need no time limit.
    if let Some(piece) = pieces.next().now_or_never() {
        return piece.transpose();
    }
    match tokio::time::timeout(PIECE_WAIT, pieces.next()).await {
        Ok(piece) => piece.transpose(),
        Err(_) => {
            let waited = format!("no bytes arrived for {} s", PIECE_WAIT.as_secs());
            Err(StoreError::Interrupted(waited))
        }
    }
}

/// The first bytes from a client.
#[derive(Debug)]
pub(crate) enum Gathered {
    /// They are all.
    All(Bytes),
    /// There may be more.
    Part(Vec<Bytes>),
}

/// Gathers `pieces` until they are more than `limit` bytes.
pub(crate) async fn gather(
    pieces: &mut (impl Stream<Item = Chunk> + Unpin + Send),
    limit: usize,
) -> Result<Gathered, StoreError> {
    let mut gathered = Vec::new();
    let mut size = 0;
    while size <= limit {
        let Some(piece) = next(pieces).await? else {
            return Ok(Gathered::All(match gathered.len() {
                1 => gathered.remove(0),
                _ => gathered.concat().into(),
            }));
        };
        size += piece.len();
        gathered.push(piece);
    }
    Ok(Gathered::Part(gathered))
}

/// The digests of bytes that are all there.
pub(crate) fn digests_of_all(bytes: &[u8]) -> Digests {
    let mut digester = Digester::default();
    digester.add(bytes);
    digester.end()
}

/// The HTTP client of this binary, for opendal.
fn transport() -> Result<OperationContext, opendal::Error> {
    let client = http::builder(CONNECT_WAIT).build().map_err(|error| {
        opendal::Error::new(ErrorKind::Unexpected, "cannot create an HTTP client").set_source(error)
    })?;
    let transport = HttpTransporter::new(ReqwestTransport::new(client));
    Ok(OperationContext::new().with_http_transport(transport))
}

/// How fast a client sends.
#[derive(Clone, Copy, Debug)]
struct Rate {
    since: Instant,
    bytes: u64,
}

impl Rate {
    fn begun(now: Instant) -> Self {
        Self {
            since: now,
            bytes: 0,
        }
    }

    /// Counts received bytes. At the end of each [`RATE_OVER`] it says whether they were fewer than
    /// [`LEAST_RATE`].
    fn is_too_low(&mut self, bytes: usize, now: Instant) -> bool {
        self.bytes += bytes as u64;
        if now.duration_since(self.since) < RATE_OVER {
            return false;
        }
        let too_low = self.bytes < LEAST_RATE;
        *self = Self::begun(now);
        too_low
    }
}

/// A blob that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenBlob {
    /// Its size in bytes.
    pub size: u64,
    /// The digests of its bytes.
    pub digests: Digests,
}

/// The size and digests so far of a blob that is being written.
#[derive(Default)]
struct BlobDigester {
    size: u64,
    digester: Digester,
}

impl BlobDigester {
    fn add(&mut self, piece: &[u8]) {
        self.size += piece.len() as u64;
        self.digester.add(piece);
    }

    fn end(&mut self) -> WrittenBlob {
        WrittenBlob {
            size: self.size,
            digests: std::mem::take(&mut self.digester).end(),
        }
    }
}

/// The whole chunks that contain `segment`, of a blob of `size` bytes.
fn digests_of(segment: &Segment, size: u64) -> Segment {
    let start = segment.start / CHUNK * CHUNK;
    let end = (segment.start + segment.length).div_ceil(CHUNK) * CHUNK;
    Segment {
        start,
        length: end.min(size) - start,
        ..*segment
    }
}

/// Reads a blob chunk by chunk, verifies each chunk, and returns the requested bytes of it.
struct CheckedReader {
    bytes: Bytestream,
    /// Bytes of the next chunk that came with this one.
    rest: Bytes,
    /// The position in the blob at which the next chunk begins.
    at: u64,
    /// The position at which the last chunk ends.
    end: u64,
    part: Part,
    wanted: Segment,
}

impl CheckedReader {
    async fn next(mut self) -> io::Result<Option<(Vec<Bytes>, Self)>> {
        if self.at >= self.end {
            return Ok(None);
        }
        let (begin, length) = (self.at, CHUNK.min(self.end - self.at));
        let mut pieces = Vec::new();
        let mut left = usize::try_from(length).map_err(io::Error::other)?;
        while left > 0 {
            let mut piece = if self.rest.is_empty() {
                self.bytes.try_next().await?.ok_or_else(short)?
            } else {
                std::mem::take(&mut self.rest)
            };
            self.rest = piece.split_off(left.min(piece.len()));
            left -= piece.len();
            pieces.push(piece);
        }
        if !self.part.digests.are_of(begin / CHUNK, &pieces) {
            let message = "a blob does not match its digests";
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        self.at += length;
        let wanted = self.wanted.start..self.wanted.start + self.wanted.length;
        Ok(Some((within(pieces, begin, &wanted), self)))
    }
}

/// The bytes of `pieces`, the first of which begins at `begin`, that are in `wanted`.
fn within(pieces: Vec<Bytes>, mut begin: u64, wanted: &Range<u64>) -> Vec<Bytes> {
    let mut found = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let end = begin + piece.len() as u64;
        let (from, to) = (wanted.start.max(begin), wanted.end.min(end));
        if from < to {
            // Both are within the piece, which is in memory.
            let from = usize::try_from(from - begin).unwrap_or(usize::MAX);
            let to = usize::try_from(to - begin).unwrap_or(usize::MAX);
            found.push(piece.slice(from..to));
        }
        begin = end;
    }
    found
}

fn short() -> io::Error {
    let message = "a blob is shorter than its entry says";
    io::Error::new(io::ErrorKind::UnexpectedEof, message)
}

/// An entry's content: parts that are blobs.
#[derive(Clone, Debug)]
pub struct StoredContent {
    blobs: BlobStore,
    inside: SmallContents,
    parts: Arc<[Part]>,
    size: u64,
}

/// Contents up to this size, in bytes, are read as a whole before an answer begins, so that a blob
/// that is gone or too short is a miss and not an answer that breaks off.
const READ_AT_ONCE: u64 = 128 * 1024;

impl StoredContent {
    /// The content that `parts` make up, which are in `blobs` or `inside` the database.
    pub(crate) fn new(blobs: BlobStore, inside: SmallContents, parts: Arc<[Part]>) -> Self {
        let size = parts::total(&parts);
        Self {
            blobs,
            inside,
            parts,
            size,
        }
    }

    async fn begin(&self, first: u64, length: u64) -> io::Result<Bytestream> {
        let segments = parts::segments(&self.parts, first, length);
        let (blobs, inside) = (self.blobs.clone(), self.inside.clone());
        let parts = self.parts.clone();
        let mut stream = stream::iter(segments)
            .then(move |segment| {
                let part = parts[segment.part].clone();
                let (blobs, inside) = (blobs.clone(), inside.clone());
                async move {
                    if !part.inside {
                        return blobs.read(segment, part).await;
                    }
                    let all = inside.read(&part).await?;
                    let wanted = segment.start..segment.start + segment.length;
                    let pieces = within(vec![all], 0, &wanted);
                    Ok(stream::iter(pieces.into_iter().map(Ok)).boxed())
                }
            })
            .try_flatten()
            .boxed();
        if length > READ_AT_ONCE {
            let begun = stream.try_next().await?.ok_or_else(short)?;
            return Ok(stream::iter([Ok(begun)]).chain(stream).boxed());
        }
        let mut pieces: Vec<Bytes> = stream.try_collect().await?;
        let all = match pieces.len() {
            1 => pieces.remove(0),
            _ => pieces.concat().into(),
        };
        if all.len() as u64 != length {
            return Err(short());
        }
        Ok(stream::iter([Ok(all)]).boxed())
    }
}

impl RangeRead for StoredContent {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, first: u64, length: u64) -> BoxFuture<'_, io::Result<Bytestream>> {
        self.begin(first, length).boxed()
    }
}

/// opendal calls a blob that ends before the range `RangeNotSatisfied`, which std has no kind for; here it
/// is the end of a file, so that the entry is dropped and can be saved again.
fn told_short(error: impl Into<io::Error>) -> io::Error {
    let error = error.into();
    let short = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<opendal::Error>())
        .is_some_and(|inner| matches!(inner.kind(), ErrorKind::RangeNotSatisfied));
    if short {
        io::Error::new(io::ErrorKind::UnexpectedEof, error)
    } else {
        error
    }
}

impl From<opendal::Error> for StoreError {
    fn from(error: opendal::Error) -> Self {
        Self::Backend(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_sends_a_byte_now_and_then_is_too_slow_and_one_that_pauses_is_not() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut rate = Rate::begun(begun);
        assert!(!rate.is_too_low(1, at(20)));
        assert!(rate.is_too_low(1, at(40)));
        let mut rate = Rate::begun(begun);
        assert!(!rate.is_too_low(300_000, at(1)));
        assert!(!rate.is_too_low(1, at(50)));
        assert!(rate.is_too_low(1, at(81)));
    }
}
