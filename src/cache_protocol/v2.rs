//! Version 2 of GitHub's cache service: Twirp, in protobuf for sccache or in JSON for
//! `@actions/cache`. An answer is in the form of its request.
//!
//! The messages are in `messages`.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, to_bytes};
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cache_protocol::auth::{Access, Purpose};
use crate::cache_protocol::messages::v2::{
    self, CreateRequest, CreateResponse, FinalizeRequest, FinalizeResponse, GetRequest, GetResponse,
};
use crate::cache_protocol::store::{
    EntryName, Query, Scope, Store, StoreError, check_keys, check_version,
};
use crate::cache_protocol::{AppState, AuthError, Peer, with_retry_after};

/// The longest request, in bytes: ten keys and some metadata are far below.
const REQUEST_LIMIT: usize = 256 * 1024;

const PROTOBUF: &str = "application/protobuf";

const WRITE_DENIED: &str = "permission_denied";

/// An error in Twirp's form (the Twirp wire protocol, version 7).
#[derive(Debug, Serialize)]
pub(super) struct TwirpError {
    #[serde(skip)]
    status: StatusCode,
    code: &'static str,
    msg: String,
}

impl TwirpError {
    fn new(status: StatusCode, code: &'static str, message: impl ToString) -> Self {
        Self {
            status,
            code,
            msg: message.to_string(),
        }
    }

    /// The message of a refused write. `@actions/cache`, which speaks JSON, shows a refusal to its
    /// user only if the answer is not `ok` (`saveCacheV2`); sccache, which speaks protobuf, only if
    /// the status is an error.
    fn into_message(self, encoding: Encoding) -> Result<String, Self> {
        match (encoding, self.code) {
            (Encoding::Json, WRITE_DENIED) => Ok(self.msg),
            _ => Err(self),
        }
    }

    fn invalid(message: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_argument", message)
    }
}

impl IntoResponse for TwirpError {
    fn into_response(self) -> Response {
        // Twirp's errors are JSON whatever the request was.
        with_retry_after((self.status, Json(self)))
    }
}

impl From<AuthError> for TwirpError {
    fn from(error: AuthError) -> Self {
        let (status, code) = match error {
            AuthError::UnknownToken => (StatusCode::UNAUTHORIZED, "unauthenticated"),
            AuthError::KeysUnavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
        };
        Self::new(status, code, error)
    }
}

impl From<StoreError> for TwirpError {
    fn from(error: StoreError) -> Self {
        error.log();
        let (status, code) = error.answers().v2;
        Self::new(status, code, error)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Protobuf,
    Json,
}

impl Encoding {
    fn of(headers: &HeaderMap) -> Option<Self> {
        let value = headers.get(CONTENT_TYPE)?.to_str().ok()?;
        match value.split(';').next()?.trim() {
            PROTOBUF => Some(Self::Protobuf),
            "application/json" => Some(Self::Json),
            _ => None,
        }
    }

    fn decode<T: Message + Default + DeserializeOwned>(
        self,
        body: &Bytes,
    ) -> Result<T, TwirpError> {
        let malformed = |error: String| {
            TwirpError::new(
                StatusCode::BAD_REQUEST,
                "malformed",
                format!("cannot decode the request: {error}"),
            )
        };
        match self {
            Self::Protobuf => {
                T::decode(body.as_ref()).map_err(|error| malformed(error.to_string()))
            }
            Self::Json => {
                serde_json::from_slice(body).map_err(|error| malformed(error.to_string()))
            }
        }
    }

    fn encode<T: Message + Serialize>(self, message: &T) -> Response {
        match self {
            Self::Protobuf => ([(CONTENT_TYPE, PROTOBUF)], message.encode_to_vec()).into_response(),
            Self::Json => Json(message).into_response(),
        }
    }
}

/// A call of any of the service's methods.
pub(super) async fn call<S: Store>(
    State(shared): State<Arc<AppState<S>>>,
    Path((service, method)): Path<(String, String)>,
    peer: Peer,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, TwirpError> {
    answer(&shared, &service, &method, peer, &headers, body).await
}

async fn answer<S: Store>(
    shared: &AppState<S>,
    service: &str,
    method: &str,
    peer: Peer,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, TwirpError> {
    if service != v2::SERVICE {
        return Err(TwirpError::new(
            StatusCode::NOT_FOUND,
            "bad_route",
            "there is no such service",
        ));
    }
    let access = shared.access(headers).await?;
    let encoding = Encoding::of(headers).ok_or_else(|| {
        TwirpError::new(
            StatusCode::NOT_FOUND,
            "bad_route",
            "the Content-Type must be application/protobuf or application/json",
        )
    })?;
    let body = to_bytes(body, REQUEST_LIMIT)
        .await
        .map_err(|error| TwirpError::new(StatusCode::BAD_REQUEST, "malformed", error))?;
    let done = call_method(shared, &access, method, encoding, headers, &body);
    shared.in_turn(access.owner(), peer, done).await
}

async fn call_method<S: Store>(
    shared: &AppState<S>,
    access: &Access,
    method: &str,
    encoding: Encoding,
    headers: &HeaderMap,
    body: &Bytes,
) -> Result<Response, TwirpError> {
    match method {
        v2::CREATE => {
            let request = encoding.decode(body)?;
            let answer = create(shared, access, request, headers)
                .await
                .or_else(|error| {
                    let message = error.into_message(encoding)?;
                    Ok::<_, TwirpError>(CreateResponse {
                        message,
                        ..CreateResponse::default()
                    })
                })?;
            Ok(encoding.encode(&answer))
        }
        v2::FINALIZE => {
            let request = encoding.decode(body)?;
            let answer = finalize(shared, access, request).await.or_else(|error| {
                let message = error.into_message(encoding)?;
                Ok::<_, TwirpError>(FinalizeResponse {
                    message,
                    ..FinalizeResponse::default()
                })
            })?;
            Ok(encoding.encode(&answer))
        }
        v2::GET => {
            let request = encoding.decode(body)?;
            let answer = find(shared, access, &request, headers).await?;
            Ok(encoding.encode(&answer))
        }
        _ => Err(TwirpError::new(
            StatusCode::NOT_FOUND,
            "bad_route",
            "there is no such method",
        )),
    }
}

fn writable(access: &Access) -> Result<Scope, TwirpError> {
    access.write.clone().ok_or_else(|| {
        // `@actions/cache` recognises a refused write by how the message begins.
        TwirpError::new(
            StatusCode::FORBIDDEN,
            WRITE_DENIED,
            "cache write denied: the token may only read",
        )
    })
}

fn checked_name(scope: Scope, version: String, key: String) -> Result<EntryName, TwirpError> {
    check_keys([key.as_str()])
        .and_then(|()| check_version(&version))
        .map_err(TwirpError::invalid)?;
    if version.is_empty() {
        return Err(TwirpError::invalid("the version must not be empty"));
    }
    Ok(EntryName {
        scope,
        version,
        key,
    })
}

async fn create<S: Store>(
    shared: &AppState<S>,
    access: &Access,
    request: CreateRequest,
    headers: &HeaderMap,
) -> Result<CreateResponse, TwirpError> {
    shared.counters.reservations.inc();
    let name = checked_name(writable(access)?, request.version, request.key)?;
    let upload = shared.store.reserve(name).await.inspect_err(|error| {
        if matches!(error, StoreError::AlreadyExists) {
            shared.counters.conflicts.inc();
        }
    })?;
    Ok(CreateResponse {
        ok: true,
        signed_upload_url: shared.content_url(Purpose::Upload(upload), access, headers),
        message: String::new(),
    })
}

async fn finalize<S: Store>(
    shared: &AppState<S>,
    access: &Access,
    request: FinalizeRequest,
) -> Result<FinalizeResponse, TwirpError> {
    let name = checked_name(writable(access)?, request.version, request.key)?;
    let size = u64::try_from(request.size_bytes)
        .map_err(|_| TwirpError::invalid("the size must not be negative"))?;
    let upload = shared.store.upload_of(&name).await?;
    let entry = shared.store.commit(upload, size).await?;
    shared.counters.commits.inc();
    Ok(FinalizeResponse {
        ok: true,
        entry_id: i64::try_from(entry.id.0).unwrap_or(i64::MAX),
        message: String::new(),
    })
}

async fn find<S: Store>(
    shared: &AppState<S>,
    access: &Access,
    request: &GetRequest,
    headers: &HeaderMap,
) -> Result<GetResponse, TwirpError> {
    shared.counters.lookups.inc();
    let keys: Vec<&str> = std::iter::once(&request.key)
        .chain(&request.restore_keys)
        .map(String::as_str)
        .collect();
    check_keys(keys.iter().copied()).map_err(TwirpError::invalid)?;
    let query = Query {
        scopes: &access.read,
        version: &request.version,
        keys: &keys,
    };
    let found = shared.store.find(&query).await;
    // A miss is an answer like any other, not an error.
    let Some(entry) = found else {
        return Ok(GetResponse::default());
    };
    shared.counters.hits.inc();
    Ok(GetResponse {
        ok: true,
        signed_download_url: shared.content_url(Purpose::Download(entry.id), access, headers),
        matched_key: entry.name.key,
    })
}
