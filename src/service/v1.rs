//! Version 1 of the cache service, REST under `_apis/artifactcache/`: what GitHub Enterprise
//! Server, Gitea, Forgejo and `act` have, and what sccache up to 0.9 speaks.
//!
//! The requests and answers are those of `@actions/cache` 4 (`contracts.d.ts`) and of opendal's
//! service `ghac`.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, to_bytes};
use axum::extract::{Path, Query as UrlQuery, State};
use axum::http::header::CONTENT_RANGE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::TryStreamExt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::service::Shared;
use crate::service::auth::{Access, Purpose};
use crate::service::store::{
    EntryName, Query, Scope, Store, StoreError, check_keys, check_version,
};

/// The longest request without content, in bytes.
const REQUEST_LIMIT: usize = 64 * 1024;

/// An error in the form that the toolkit shows to its user.
#[derive(Debug, Serialize)]
struct Refusal {
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
        (self.status, Json(self)).into_response()
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        error.log();
        let status = match error {
            StoreError::AlreadyExists | StoreError::Busy => StatusCode::CONFLICT,
            StoreError::NoSuchUpload => StatusCode::NOT_FOUND,
            // 400 is the only status of which `@actions/cache` shows the message (`reserveCache`).
            StoreError::TooLarge { .. }
            | StoreError::SizeMismatch { .. }
            | StoreError::NoSuchBlock
            | StoreError::Interrupted(_) => StatusCode::BAD_REQUEST,
            StoreError::Io(_) | StoreError::Behind(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error)
    }
}

async fn access<S: Store>(shared: &Shared<S>, headers: &HeaderMap) -> Result<Arc<Access>, Refusal> {
    shared.counters.version_1.one();
    shared.access(headers).await.ok_or_else(|| {
        Refusal::new(
            StatusCode::UNAUTHORIZED,
            "the token is not one of this service's",
        )
    })
}

async fn writable<S: Store>(shared: &Shared<S>, headers: &HeaderMap) -> Result<Scope, Refusal> {
    let denied = || {
        Refusal::new(
            StatusCode::FORBIDDEN,
            "cache write denied: the token may only read",
        )
    };
    let access = access(shared, headers).await?;
    access.write.clone().ok_or_else(denied)
}

/// What a request asks for, in JSON whatever it calls itself.
async fn json<T: DeserializeOwned>(body: Body) -> Result<T, Refusal> {
    let malformed = |error: &dyn std::fmt::Display| {
        let message = format!("the request cannot be read: {error}");
        Refusal::new(StatusCode::BAD_REQUEST, message)
    };
    let body = to_bytes(body, REQUEST_LIMIT)
        .await
        .map_err(|error| malformed(&error))?;
    serde_json::from_slice(&body).map_err(|error| malformed(&error))
}

#[derive(Deserialize)]
pub(super) struct FindQuery {
    #[serde(default)]
    keys: String,
    #[serde(default)]
    version: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Found {
    cache_key: String,
    scope: Scope,
    archive_location: String,
}

/// `GET cache?keys=…&version=…`: 200 with where the entry is, or 204.
pub(super) async fn find<S: Store>(
    State(shared): State<Arc<Shared<S>>>,
    UrlQuery(query): UrlQuery<FindQuery>,
    headers: HeaderMap,
) -> Response {
    find_entry(&shared, &query, &headers)
        .await
        .unwrap_or_else(IntoResponse::into_response)
}

async fn find_entry<S: Store>(
    shared: &Shared<S>,
    query: &FindQuery,
    headers: &HeaderMap,
) -> Result<Response, Refusal> {
    let access = access(shared, headers).await?;
    shared.counters.lookups.one();
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
    shared.counters.hits.one();
    let archive_location = shared.content_url(Purpose::Download, entry.id, headers);
    let found = Found {
        cache_key: entry.name.key,
        scope: entry.name.scope,
        archive_location,
    };
    Ok(Json(found).into_response())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ReserveRequest {
    key: String,
    version: String,
    #[serde(default)]
    cache_size: Option<u64>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Reserved {
    cache_id: u64,
}

/// `POST caches`: 201 with the number of the upload, or 409 where the key is taken.
pub(super) async fn reserve<S: Store>(
    State(shared): State<Arc<Shared<S>>>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    reserve_upload(&shared, &headers, body)
        .await
        .unwrap_or_else(IntoResponse::into_response)
}

async fn reserve_upload<S: Store>(
    shared: &Shared<S>,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let scope = writable(shared, headers).await?;
    let request: ReserveRequest = json(body).await?;
    shared.counters.reservations.one();
    check_keys([request.key.as_str()])
        .and_then(|()| check_version(&request.version))
        .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, error))?;
    shared.store.check_size(request.cache_size.unwrap_or(0))?;
    let name = EntryName {
        scope,
        version: request.version,
        key: request.key,
    };
    let cache_id = shared.store.reserve(name).await.inspect_err(|error| {
        if matches!(error, StoreError::AlreadyExists) {
            shared.counters.conflicts.one();
        }
    })?;
    Ok((StatusCode::CREATED, Json(Reserved { cache_id })).into_response())
}

/// An upload that the sender of the request may write to.
async fn own_upload<S: Store>(
    shared: &Shared<S>,
    upload: u64,
    headers: &HeaderMap,
) -> Result<(), Refusal> {
    let scope = writable(shared, headers).await?;
    match shared.store.name_of(upload).await? {
        name if name.scope == scope => Ok(()),
        _ => Err(StoreError::NoSuchUpload.into()),
    }
}

/// `PATCH caches/{id}` with `Content-Range: bytes 0-4/*`: a piece of the content. Pieces may come
/// in any order and at once.
pub(super) async fn upload<S: Store>(
    State(shared): State<Arc<Shared<S>>>,
    Path(id): Path<u64>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    upload_piece(&shared, id, &headers, body)
        .await
        .unwrap_or_else(IntoResponse::into_response)
}

async fn upload_piece<S: Store>(
    shared: &Shared<S>,
    id: u64,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    own_upload(shared, id, headers).await?;
    shared.counters.uploads.one();
    let (first, length) = headers
        .get(CONTENT_RANGE)
        .and_then(|value| content_range(value.to_str().ok()?))
        .ok_or_else(|| {
            Refusal::new(
                StatusCode::BAD_REQUEST,
                "a Content-Range of the form `bytes 0-4/*` is needed",
            )
        })?;
    let mut received = 0u64;
    let pieces = body
        .into_data_stream()
        .map_err(|error| StoreError::Interrupted(error.to_string()))
        .and_then(|piece| {
            received += piece.len() as u64;
            let fits = received <= length;
            shared.counters.bytes_in.add(piece.len() as u64);
            std::future::ready(fits.then_some(piece).ok_or(StoreError::SizeMismatch {
                actual: received,
                claimed: length,
            }))
        });
    shared.store.write(id, first, false, pieces).await?;
    if received != length {
        return Err(StoreError::SizeMismatch {
            actual: received,
            claimed: length,
        }
        .into());
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The first byte and the number of bytes of `bytes FIRST-LAST/TOTAL`.
fn content_range(value: &str) -> Option<(u64, u64)> {
    let (range, _total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    Some((first, last.checked_sub(first)?.checked_add(1)?))
}

#[derive(Deserialize)]
pub(super) struct CommitRequest {
    size: u64,
}

/// `POST caches/{id}` with the content's size: makes the upload an entry.
pub(super) async fn commit<S: Store>(
    State(shared): State<Arc<Shared<S>>>,
    Path(id): Path<u64>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    commit_upload(&shared, id, &headers, body)
        .await
        .unwrap_or_else(IntoResponse::into_response)
}

async fn commit_upload<S: Store>(
    shared: &Shared<S>,
    id: u64,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    own_upload(shared, id, headers).await?;
    let CommitRequest { size } = json(body).await?;
    shared.store.commit(id, size).await?;
    shared.counters.commits.one();
    Ok(StatusCode::NO_CONTENT.into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_range_is_read_strictly() {
        assert_eq!(content_range("bytes 0-4/*"), Some((0, 5)));
        assert_eq!(content_range("bytes 10-10/11"), Some((10, 1)));
        for wrong in [
            "",
            "bytes",
            "bytes 4-0/*",
            "bytes -4/*",
            "bytes 0-/*",
            "bytes 0-4",
            "bytes 0-18446744073709551615/*",
            "items 0-4/*",
        ] {
            assert_eq!(content_range(wrong), None, "{wrong}");
        }
    }
}
