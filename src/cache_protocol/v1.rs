//! Version 1 of the cache service, REST under `_apis/artifactcache/`: GitHub Enterprise Server,
//! Gitea, Forgejo and `act` have it, and sccache up to 0.9 speaks it.
//!
//! The requests and answers are in `messages`.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, to_bytes};
use axum::extract::{FromRequestParts, Path, Query as UrlQuery, State};
use axum::http::header::CONTENT_RANGE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cache_protocol::auth::{Access, Purpose};
use crate::cache_protocol::content_range::ContentRange;
use crate::cache_protocol::ids::UploadId;
use crate::cache_protocol::messages::v1::{
    CommitRequest, FindQuery, FindResponse, ReserveRequest, ReserveResponse,
};
use crate::cache_protocol::store::{
    Chunk, EntryName, Query, Scope, Store, StoreError, check_keys, check_version,
};
use crate::cache_protocol::{AppState, AuthError, Peer, with_retry_after};

/// The longest request without content, in bytes.
const REQUEST_LIMIT: usize = 64 * 1024;

/// An error in the form that the toolkit shows to its user.
#[derive(Debug, Serialize)]
pub(super) struct Refusal {
    #[serde(skip)]
    status: StatusCode,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, message: impl ToString) -> Self {
        Self {
            status,
            message: message.to_string(),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        with_retry_after((self.status, Json(self)))
    }
}

impl From<AuthError> for Refusal {
    fn from(error: AuthError) -> Self {
        let status = match error {
            AuthError::UnknownToken => StatusCode::UNAUTHORIZED,
            AuthError::KeysUnavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error)
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        error.log();
        Self::new(error.answers().v1, error)
    }
}

/// The sender of a request: the rights of its token, and its address.
pub(super) struct Sender {
    access: Arc<Access>,
    peer: Peer,
}

impl<S: Store> FromRequestParts<Arc<AppState<S>>> for Sender {
    type Rejection = Refusal;

    async fn from_request_parts(
        parts: &mut Parts,
        shared: &Arc<AppState<S>>,
    ) -> Result<Self, Refusal> {
        shared.counters.version_1.inc();
        let access = shared.access(&parts.headers).await?;
        let Ok(peer) = Peer::from_request_parts(parts, shared).await;
        Ok(Self { access, peer })
    }
}

impl Sender {
    /// Works on the sender's request when it is its turn.
    async fn in_turn<S: Store, T>(
        &self,
        shared: &AppState<S>,
        request: impl Future<Output = T>,
    ) -> T {
        shared
            .in_turn(self.access.owner(), self.peer, request)
            .await
    }
}

/// The upload that a request names in its path, and the sender.
pub(super) struct NamedUpload {
    id: UploadId,
    sender: Sender,
}

impl<S: Store> FromRequestParts<Arc<AppState<S>>> for NamedUpload {
    type Rejection = Response;

    async fn from_request_parts(
        parts: &mut Parts,
        shared: &Arc<AppState<S>>,
    ) -> Result<Self, Response> {
        let sender = Sender::from_request_parts(parts, shared).await;
        let sender = sender.map_err(IntoResponse::into_response)?;
        // No upload has a name that is not a number, or a number of more than 64 bits.
        let id = Path::from_request_parts(parts, shared).await;
        let no_upload = |_| Refusal::from(StoreError::NoSuchUpload).into_response();
        let Path(id) = id.map_err(no_upload)?;
        Ok(Self { id, sender })
    }
}

impl NamedUpload {
    /// Does `work` on the upload when it is the sender's turn, if the sender may write to the
    /// upload.
    async fn in_turn<S: Store>(
        &self,
        shared: &AppState<S>,
        work: impl Future<Output = Result<(), Refusal>>,
    ) -> Result<StatusCode, Refusal> {
        let checked = async {
            let scope = writable(&self.sender.access)?;
            if shared.store.name_of(self.id).await?.scope != scope {
                return Err(StoreError::NoSuchUpload.into());
            }
            work.await?;
            Ok(StatusCode::NO_CONTENT)
        };
        self.sender.in_turn(shared, checked).await
    }
}

fn writable(access: &Access) -> Result<Scope, Refusal> {
    let denied = || {
        Refusal::new(
            StatusCode::FORBIDDEN,
            "cache write denied: the token may only read",
        )
    };
    access.write.clone().ok_or_else(denied)
}

/// The request's body as JSON, whatever its content type says.
async fn json<T: DeserializeOwned>(body: Body) -> Result<T, Refusal> {
    let malformed = |error: &dyn std::fmt::Display| {
        let message = format!("cannot read the request: {error}");
        Refusal::new(StatusCode::BAD_REQUEST, message)
    };
    let body = to_bytes(body, REQUEST_LIMIT)
        .await
        .map_err(|error| malformed(&error))?;
    serde_json::from_slice(&body).map_err(|error| malformed(&error))
}

/// `GET cache?keys=…&version=…`: 200 with the address of the entry, or 204.
pub(super) async fn find<S: Store>(
    State(shared): State<Arc<AppState<S>>>,
    UrlQuery(query): UrlQuery<FindQuery>,
    sender: Sender,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let answer = find_entry(&shared, &sender.access, &query, &headers);
    sender.in_turn(&shared, answer).await
}

async fn find_entry<S: Store>(
    shared: &AppState<S>,
    access: &Access,
    query: &FindQuery,
    headers: &HeaderMap,
) -> Result<Response, Refusal> {
    shared.counters.lookups.inc();
    let keys: Vec<&str> = query.keys.split(',').map(str::trim).collect();
    check_keys(keys.iter().copied())
        .and_then(|()| check_version(&query.version))
        .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, error))?;
    let query = Query {
        scopes: &access.read,
        version: &query.version,
        keys: &keys,
    };
    let found = shared.store.find(&query).await;
    let Some(entry) = found else {
        return Ok(StatusCode::NO_CONTENT.into_response());
    };
    shared.counters.hits.inc();
    let archive_location = shared.content_url(Purpose::Download(entry.id), access, headers);
    let found = FindResponse {
        cache_key: entry.name.key,
        scope: entry.name.scope.0.to_string(),
        archive_location,
    };
    Ok(Json(found).into_response())
}

/// `POST caches`: 201 with the number of the upload, or 409 if the key is taken.
pub(super) async fn reserve<S: Store>(
    State(shared): State<Arc<AppState<S>>>,
    sender: Sender,
    body: Body,
) -> Result<Response, Refusal> {
    let answer = reserve_upload(&shared, &sender.access, body);
    sender.in_turn(&shared, answer).await
}

async fn reserve_upload<S: Store>(
    shared: &AppState<S>,
    access: &Access,
    body: Body,
) -> Result<Response, Refusal> {
    let scope = writable(access)?;
    let request: ReserveRequest = json(body).await?;
    shared.counters.reservations.inc();
    check_keys([request.key.as_str()])
        .and_then(|()| check_version(&request.version))
        .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, error))?;
    shared.store.check_size(request.cache_size.unwrap_or(0))?;
    let name = EntryName {
        scope,
        version: request.version,
        key: request.key,
    };
    let upload = shared.store.reserve(name).await.inspect_err(|error| {
        if matches!(error, StoreError::AlreadyExists) {
            shared.counters.conflicts.inc();
        }
    })?;
    let reserved = ReserveResponse { cache_id: upload.0 };
    Ok((StatusCode::CREATED, Json(reserved)).into_response())
}

/// `PATCH caches/{id}` with `Content-Range: bytes 0-4/*`: a piece of the content. Pieces may come
/// in any order and at once.
pub(super) async fn upload<S: Store>(
    State(shared): State<Arc<AppState<S>>>,
    upload: NamedUpload,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let written = write_piece(&shared, upload.id, &headers, body);
    upload.in_turn(&shared, written).await
}

async fn write_piece<S: Store>(
    shared: &AppState<S>,
    id: UploadId,
    headers: &HeaderMap,
    body: Body,
) -> Result<(), Refusal> {
    shared.counters.uploads.inc();
    let range = headers
        .get(CONTENT_RANGE)
        .and_then(|value| ContentRange::parse(value.to_str().ok()?))
        .ok_or_else(|| {
            Refusal::new(
                StatusCode::BAD_REQUEST,
                "a Content-Range of the form `bytes 0-4/*` is needed",
            )
        })?;
    let pieces = body
        .into_data_stream()
        .map_err(|error| StoreError::Interrupted(error.to_string()))
        .inspect_ok(|piece| shared.counters.bytes_in.add(piece.len() as u64));
    shared
        .store
        .write(id, range.first, false, exactly(range.length(), pieces))
        .await?;
    Ok(())
}

/// `pieces`, which fail if they are more or less than `length` bytes: the service takes no piece
/// that is not as long as its range.
fn exactly(
    length: u64,
    pieces: impl Stream<Item = Chunk> + Send,
) -> impl Stream<Item = Chunk> + Send {
    let mismatch = move |actual| StoreError::SizeMismatch {
        actual,
        claimed: length,
    };
    let pieces = pieces.map(Some).chain(stream::once(async { None }));
    pieces.scan(0u64, move |received, piece| {
        let checked = match piece {
            Some(Ok(piece)) => {
                *received += piece.len() as u64;
                Some(
                    (*received <= length)
                        .then_some(piece)
                        .ok_or(mismatch(*received)),
                )
            }
            Some(Err(error)) => Some(Err(error)),
            None if *received == length => None,
            None => Some(Err(mismatch(*received))),
        };
        std::future::ready(checked)
    })
}

/// `POST caches/{id}` with the content's size: makes the upload an entry.
pub(super) async fn commit<S: Store>(
    State(shared): State<Arc<AppState<S>>>,
    upload: NamedUpload,
    body: Body,
) -> Result<StatusCode, Refusal> {
    let committed = commit_upload(&shared, upload.id, body);
    upload.in_turn(&shared, committed).await
}

async fn commit_upload<S: Store>(
    shared: &AppState<S>,
    id: UploadId,
    body: Body,
) -> Result<(), Refusal> {
    let CommitRequest { size } = json(body).await?;
    shared.store.commit(id, size).await?;
    shared.counters.commits.inc();
    Ok(())
}
