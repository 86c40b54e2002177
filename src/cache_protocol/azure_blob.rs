//! Serves content like Azure's blob storage: for the signed URLs of version 2, and for the
//! downloads of version 1.
//!
//! The requests are those that opendal and `@azure/storage-blob` make: Put Blob, Put Block, Put
//! Block List, Get Blob with and without a range, Get Blob Properties.

use std::io::SeekFrom;
use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::extract::{Path, Query, State};
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, LAST_MODIFIED, RANGE,
};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, TryStreamExt};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use crate::cache_protocol::auth::{Owner, Purpose};
use crate::cache_protocol::ids::{EntryId, UploadId};
use crate::cache_protocol::store::{Chunk, Content, PARTS_LIMIT, Store, StoreError};
use crate::cache_protocol::{AppState, Peer, with_retry_after};
use crate::clock::Timestamp;

/// The longest block list, in bytes: Azure's 50,000 blocks with names of 64 bytes.
const BLOCK_LIST_LIMIT: usize = 8 << 20;

/// The longest name of a block, in bytes; Azure allows 64 before they are put in base64.
const BLOCK_NAME_LIMIT: usize = 96;

/// How much of an entry is in memory at once, in bytes.
const READ_SIZE: usize = 128 * 1024;

const VERSION: HeaderName = HeaderName::from_static("x-ms-version");
const BLOB_TYPE: HeaderName = HeaderName::from_static("x-ms-blob-type");

#[derive(Deserialize)]
pub(super) struct SignedQuery {
    #[serde(default)]
    se: u64,
    #[serde(default)]
    sig: String,
    by: Option<String>,
    comp: Option<String>,
    blockid: Option<String>,
}

impl SignedQuery {
    fn owner(&self) -> Option<Owner> {
        self.by.as_deref().and_then(Owner::parse)
    }
}

fn is_signed<S: Store>(shared: &AppState<S>, purpose: Purpose, signature: &SignedQuery) -> bool {
    let SignedQuery { se, sig, .. } = signature;
    let said = (Timestamp::from_seconds(*se), signature.owner());
    let valid = shared.signer.is_valid(purpose, said, sig, Timestamp::now());
    if !valid {
        shared.counters.refused.inc();
    }
    valid
}

/// An error in Azure's form.
fn refusal(status: StatusCode, code: &str, message: &str) -> Response {
    let escaped = message.replace('&', "&amp;").replace('<', "&lt;");
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"utf-8\"?>\
         <Error><Code>{code}</Code><Message>{escaped}</Message></Error>"
    );
    (status, [(CONTENT_TYPE, "application/xml")], body).into_response()
}

fn unsigned() -> Response {
    refusal(
        StatusCode::FORBIDDEN,
        "AuthenticationFailed",
        "the URL's signature is wrong or has expired",
    )
}

fn bad_method() -> Response {
    refusal(
        StatusCode::METHOD_NOT_ALLOWED,
        "UnsupportedHttpVerb",
        "this URL does not accept this method",
    )
}

/// Put Blob, Put Block and Put Block List.
pub(super) async fn upload<S: Store>(
    State(shared): State<Arc<AppState<S>>>,
    Path(id): Path<UploadId>,
    Query(query): Query<SignedQuery>,
    peer: Peer,
    method: Method,
    headers: HeaderMap,
    body: Body,
) -> Response {
    if !is_signed(&shared, Purpose::Upload(id), &query) {
        return unsigned();
    }
    if method != Method::PUT {
        return bad_method();
    }
    shared.counters.uploads.inc();
    let (owner, uploaded) = (query.owner(), put(&shared, id, query, &headers, body));
    shared.in_turn(owner, peer, uploaded).await
}

async fn put<S: Store>(
    shared: &AppState<S>,
    id: UploadId,
    query: SignedQuery,
    headers: &HeaderMap,
    body: Body,
) -> Response {
    let done = match (query.comp.as_deref(), query.blockid) {
        (Some("block"), Some(block)) if is_block_name(&block) => {
            let pieces = pieces(shared, body);
            shared.store.write_block(id, &block, pieces).await
        }
        (Some("blocklist"), _) => {
            let Ok(list) = to_bytes(body, BLOCK_LIST_LIMIT).await else {
                return bad_request("the block list is too long or ended early");
            };
            match block_list(&String::from_utf8_lossy(&list)) {
                Some(blocks) if blocks.len() as u64 > PARTS_LIMIT => Err(StoreError::TooManyParts),
                Some(blocks) => shared.store.join_blocks(id, blocks).await,
                None => return bad_request("cannot read the block list"),
            }
        }
        (None, _) if headers.contains_key(&BLOB_TYPE) => {
            let pieces = pieces(shared, body);
            shared.store.write(id, 0, true, pieces).await
        }
        _ => return bad_request("neither Put Blob, Put Block nor Put Block List"),
    };
    match done {
        Ok(()) => {
            let modified = httpdate::fmt_http_date(std::time::SystemTime::now());
            let headers = [
                (ETAG, format!("\"{id}\"")),
                (LAST_MODIFIED, modified),
                (VERSION, "2024-11-04".to_owned()),
            ];
            (StatusCode::CREATED, headers).into_response()
        }
        Err(error) => upload_refused(&error),
    }
}

/// PostgreSQL keeps no NUL in a text.
fn is_block_name(name: &str) -> bool {
    (1..=BLOCK_NAME_LIMIT).contains(&name.len()) && !name.contains('\0')
}

fn bad_request(message: &str) -> Response {
    refusal(StatusCode::BAD_REQUEST, "InvalidInput", message)
}

fn upload_refused(error: &StoreError) -> Response {
    error.log();
    let (status, code) = error.answers().azure_blob;
    with_retry_after(refusal(status, code, &error.to_string()))
}

fn pieces<S: Store>(
    shared: &AppState<S>,
    body: Body,
) -> impl Stream<Item = Chunk> + Send + use<'_, S> {
    body.into_data_stream()
        .map_err(|error| StoreError::Interrupted(error.to_string()))
        .inspect_ok(|piece| shared.counters.bytes_in.add(piece.len() as u64))
}

/// The names in a block list, in order. Azure distinguishes blocks by state; here `Latest`,
/// `Uncommitted` and `Committed` mean the same, since nothing is committed twice. The names are in
/// base64, so they contain nothing that XML escapes. Names with other characters are not ours.
fn block_list(xml: &str) -> Option<Vec<String>> {
    let (_, list) = xml.split_once("<BlockList")?;
    let (_, mut rest) = list.split_once('>')?;
    let mut blocks = Vec::new();
    loop {
        rest = rest.trim_start();
        if rest.starts_with("</BlockList>") || rest.is_empty() {
            return Some(blocks);
        }
        let (tag, after) = rest.strip_prefix('<')?.split_once('>')?;
        if !matches!(tag, "Latest" | "Uncommitted" | "Committed") {
            return None;
        }
        let (name, after) = after.split_once(&format!("</{tag}>"))?;
        blocks.push(name.trim().to_owned());
        rest = after;
    }
}

/// Get Blob and Get Blob Properties.
pub(super) async fn download<S: Store>(
    State(shared): State<Arc<AppState<S>>>,
    Path(id): Path<EntryId>,
    Query(query): Query<SignedQuery>,
    peer: Peer,
    method: Method,
    headers: HeaderMap,
) -> Response {
    if !is_signed(&shared, Purpose::Download(id), &query) {
        return unsigned();
    }
    if method != Method::GET && method != Method::HEAD {
        return bad_method();
    }
    shared.counters.downloads.inc();
    let got = get(&shared, id, &method, &headers);
    shared.in_turn(query.owner(), peer, got).await
}

async fn get<S: Store>(
    shared: &AppState<S>,
    id: EntryId,
    method: &Method,
    headers: &HeaderMap,
) -> Response {
    let Some(content) = shared.store.open(id).await else {
        return gone();
    };
    let size = content.size();
    let asked = headers
        .get("x-ms-range")
        .or(headers.get(RANGE))
        .and_then(|value| value.to_str().ok());
    let range = match asked.map_or(RequestedRange::All, |value| range_of(value, size)) {
        RequestedRange::All => None,
        RequestedRange::Part(first, last) => Some((first, last)),
        RequestedRange::Unsatisfiable => {
            let headers = [(CONTENT_RANGE, format!("bytes */{size}"))];
            return (StatusCode::RANGE_NOT_SATISFIABLE, headers).into_response();
        }
    };
    let (first, length) = range.map_or((0, size), |(first, last)| (first, last - first + 1));
    let body = if *method == Method::HEAD {
        Body::empty()
    } else {
        shared.counters.bytes_out.add(length);
        match body_of(content, first, length).await {
            Ok(body) => body,
            Err(error) => return unreadable(shared, id, error).await,
        }
    };
    let mut answer = Response::builder()
        .header(CONTENT_TYPE, "application/octet-stream")
        .header(CONTENT_LENGTH, length)
        .header(ACCEPT_RANGES, "bytes")
        .header(ETAG, format!("\"{id}\""))
        .header(BLOB_TYPE, "BlockBlob");
    if let Some((first, last)) = range {
        answer = answer
            .status(StatusCode::PARTIAL_CONTENT)
            .header(CONTENT_RANGE, format!("bytes {first}-{last}/{size}"));
    }
    answer
        .body(body)
        .unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
}

fn gone() -> Response {
    refusal(
        StatusCode::NOT_FOUND,
        "BlobNotFound",
        "the entry no longer exists",
    )
}

/// Whether `error` of reading content says that it is gone, cut off or changed, and not that it cannot be
/// read now.
pub(crate) fn is_missing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
    matches!(error.kind(), InvalidData | NotFound | UnexpectedEof)
}

/// The answer if content cannot be read. Content that was deleted or cut off behind our back makes
/// its entry invalid; any other error may pass.
async fn unreadable<S: Store>(
    shared: &AppState<S>,
    entry: EntryId,
    error: std::io::Error,
) -> Response {
    if is_missing(&error) {
        shared.store.mark_missing(entry).await;
        return gone();
    }
    upload_refused(&StoreError::Io(error))
}

/// The part of `content` that begins at `first` and has `length` bytes, which are within it.
async fn body_of(content: Content, first: u64, length: u64) -> std::io::Result<Body> {
    let (mut file, start) = match content {
        Content::File { file, start, .. } => (file, start),
        Content::Remote(content) => {
            return Ok(Body::from_stream(content.read(first, length).await?));
        }
        Content::Bytes(bytes) => {
            let range = usize::try_from(first)
                .ok()
                .zip(usize::try_from(length).ok());
            let part = range.map(|(first, length)| bytes.slice(first..first + length));
            return Ok(Body::from(part.unwrap_or_default()));
        }
    };
    if start + first > 0 {
        file.seek(SeekFrom::Start(start + first)).await?;
    }
    // Most objects are smaller than one read: they need no stream.
    if let Ok(length) = usize::try_from(length)
        && length <= READ_SIZE
    {
        let mut bytes = vec![0; length];
        file.read_exact(&mut bytes).await?;
        return Ok(Body::from(bytes));
    }
    let stream = ReaderStream::with_capacity(file.take(length), READ_SIZE);
    Ok(Body::from_stream(stream))
}

/// The request of a `Range` header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RequestedRange {
    /// Everything, as a header that is not understood must be taken (RFC 9110, 14.2).
    All,
    /// The bytes from the first number to the last, both included.
    Part(u64, u64),
    /// A range outside of the content.
    Unsatisfiable,
}

/// The range that `value` requests of content of `size` bytes.
fn range_of(value: &str, size: u64) -> RequestedRange {
    let Some((first, last)) = value
        .trim()
        .strip_prefix("bytes=")
        .filter(|ranges| !ranges.contains(','))
        .and_then(|range| range.split_once('-'))
    else {
        return RequestedRange::All;
    };
    let (first, last) = (first.trim(), last.trim());
    let (first, last) = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => (first, last),
        (Ok(first), Err(_)) if last.is_empty() => (first, u64::MAX),
        // The last `length` bytes.
        (Err(_), Ok(length)) if first.is_empty() => match length {
            0 => return RequestedRange::Unsatisfiable,
            length => (size.saturating_sub(length), u64::MAX),
        },
        _ => return RequestedRange::All,
    };
    match size.checked_sub(1) {
        Some(end) if first <= end => RequestedRange::Part(first, last.min(end)),
        _ => RequestedRange::Unsatisfiable,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_are_read_as_http_has_them() {
        for (value, size, expected) in [
            ("bytes=0-0", 1, RequestedRange::Part(0, 0)),
            ("bytes=0-0", 0, RequestedRange::Unsatisfiable),
            ("bytes=2-5", 10, RequestedRange::Part(2, 5)),
            ("bytes=2-50", 10, RequestedRange::Part(2, 9)),
            ("bytes=2-", 10, RequestedRange::Part(2, 9)),
            ("bytes=10-", 10, RequestedRange::Unsatisfiable),
            ("bytes=-3", 10, RequestedRange::Part(7, 9)),
            ("bytes=-30", 10, RequestedRange::Part(0, 9)),
            ("bytes=-0", 10, RequestedRange::Unsatisfiable),
            ("bytes=5-2", 10, RequestedRange::All),
            ("bytes=0-1,3-4", 10, RequestedRange::All),
            ("bytes=-", 10, RequestedRange::All),
            ("bytes=a-b", 10, RequestedRange::All),
            ("items=0-1", 10, RequestedRange::All),
            ("bytes=0-99999999999999999999", 10, RequestedRange::All),
        ] {
            assert_eq!(range_of(value, size), expected, "{value} of {size}");
        }
    }

    #[test]
    fn a_block_list_is_read_in_order() {
        let xml = "<?xml version=\"1.0\"?><BlockList>\n<Latest>YQ==</Latest><Uncommitted>Yg==\
                   </Uncommitted></BlockList>";
        let blocks = vec!["YQ==".to_owned(), "Yg==".to_owned()];
        assert_eq!(block_list(xml), Some(blocks));
        assert_eq!(block_list("<BlockList></BlockList>"), Some(Vec::new()));
        for wrong in [
            "",
            "<List/>",
            "<BlockList><X>a</X></BlockList>",
            "<BlockList><Latest>a",
        ] {
            assert_eq!(block_list(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn a_range_never_leaves_the_content(value in "bytes=[0-9]{0,20}-[0-9]{0,20}", size: u64) {
            if let RequestedRange::Part(first, last) = range_of(&value, size) {
                prop_assert!(first <= last && last < size);
            }
        }

        #[test]
        fn no_block_list_makes_the_reader_panic(xml in "(</?BlockList>|</?Latest>|.){0,20}") {
            let _ = block_list(&xml);
        }
    }
}
