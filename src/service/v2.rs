//! Version 2 of GitHub's cache service: Twirp, in protobuf as sccache speaks it or in JSON as
//! `@actions/cache` does. An answer is in the form of its request.
//!
//! The messages are those of `results/api/v1/cache.proto` as the toolkit and the crate `ghac`
//! have them. Field 1 of each request, the metadata, is for GitHub's own use and ignored.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, to_bytes};
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use prost::Message;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::service::Shared;
use crate::service::auth::{Access, Purpose};
use crate::service::store::{
    EntryName, Query, Scope, Store, StoreError, check_keys, check_version,
};

/// The service's name in a request's path.
const SERVICE: &str = "github.actions.results.api.v1.CacheService";

/// The longest request, in bytes: ten keys and some metadata are far below.
const REQUEST_LIMIT: usize = 256 * 1024;

const PROTOBUF: &str = "application/protobuf";

const WRITE_DENIED: &str = "permission_denied";

#[derive(Clone, PartialEq, Message, Deserialize)]
struct CreateRequest {
    #[prost(string, tag = "2")]
    #[serde(default)]
    key: String,
    #[prost(string, tag = "3")]
    #[serde(default)]
    version: String,
}

#[derive(Clone, PartialEq, Message, Serialize)]
struct CreateResponse {
    #[prost(bool, tag = "1")]
    ok: bool,
    #[prost(string, tag = "2")]
    signed_upload_url: String,
    #[prost(string, tag = "3")]
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
}

#[derive(Clone, PartialEq, Message, Deserialize)]
struct FinalizeRequest {
    #[prost(string, tag = "2")]
    #[serde(default)]
    key: String,
    #[prost(int64, tag = "3")]
    #[serde(default, alias = "sizeBytes", deserialize_with = "number_or_text")]
    size_bytes: i64,
    #[prost(string, tag = "4")]
    #[serde(default)]
    version: String,
}

#[derive(Clone, PartialEq, Message, Serialize)]
struct FinalizeResponse {
    #[prost(bool, tag = "1")]
    ok: bool,
    #[prost(int64, tag = "2")]
    #[serde(serialize_with = "as_text")]
    entry_id: i64,
    #[prost(string, tag = "3")]
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
}

#[derive(Clone, PartialEq, Message, Deserialize)]
struct GetRequest {
    #[prost(string, tag = "2")]
    #[serde(default)]
    key: String,
    #[prost(string, repeated, tag = "3")]
    #[serde(default, alias = "restoreKeys")]
    restore_keys: Vec<String>,
    #[prost(string, tag = "4")]
    #[serde(default)]
    version: String,
}

#[derive(Clone, PartialEq, Message, Serialize)]
struct GetResponse {
    #[prost(bool, tag = "1")]
    ok: bool,
    #[prost(string, tag = "2")]
    signed_download_url: String,
    #[prost(string, tag = "3")]
    matched_key: String,
}

/// Protobuf's JSON writes 64-bit numbers as text, and reads both.
fn number_or_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(i64),
        Text(String),
    }
    match Either::deserialize(deserializer)? {
        Either::Number(number) => Ok(number),
        Either::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

// serde hands fields over by reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn as_text<S: Serializer>(number: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(number)
}

/// An error in Twirp's form (the Twirp wire protocol, version 7).
#[derive(Debug, Serialize)]
struct TwirpError {
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

    /// What the answer to a refused write says of it. `@actions/cache`, which speaks JSON, tells its
    /// user of a refusal only where the answer is one that is not `ok` (`saveCacheV2`); sccache,
    /// which speaks protobuf, where the status says so.
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
        (self.status, Json(self)).into_response()
    }
}

impl From<StoreError> for TwirpError {
    fn from(error: StoreError) -> Self {
        error.log();
        let (status, code) = match &error {
            StoreError::AlreadyExists => (StatusCode::CONFLICT, "already_exists"),
            StoreError::NoSuchUpload => (StatusCode::NOT_FOUND, "not_found"),
            StoreError::Busy => (StatusCode::PRECONDITION_FAILED, "failed_precondition"),
            StoreError::SizeMismatch { .. }
            | StoreError::NoSuchBlock
            | StoreError::TooLarge { .. }
            | StoreError::Interrupted(_) => (StatusCode::BAD_REQUEST, "invalid_argument"),
            StoreError::Io(_) | StoreError::Behind(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "internal")
            }
        };
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
                format!("the request cannot be decoded: {error}"),
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
    State(shared): State<Arc<Shared<S>>>,
    Path((service, method)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    answer(&shared, &service, &method, &headers, body)
        .await
        .unwrap_or_else(IntoResponse::into_response)
}

async fn answer<S: Store>(
    shared: &Shared<S>,
    service: &str,
    method: &str,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, TwirpError> {
    if service != SERVICE {
        return Err(TwirpError::new(
            StatusCode::NOT_FOUND,
            "bad_route",
            "there is no such service",
        ));
    }
    let Some(access) = shared.access(headers).await else {
        return Err(TwirpError::new(
            StatusCode::UNAUTHORIZED,
            "unauthenticated",
            "the token is not one of this service's",
        ));
    };
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
    match method {
        "CreateCacheEntry" => {
            let request = encoding.decode(&body)?;
            let answer = create(shared, &access, request, headers).await;
            let answer = answer.or_else(|error| {
                let message = error.into_message(encoding)?;
                Ok::<_, TwirpError>(CreateResponse {
                    message,
                    ..CreateResponse::default()
                })
            })?;
            Ok(encoding.encode(&answer))
        }
        "FinalizeCacheEntryUpload" => {
            let request = encoding.decode(&body)?;
            let answer = finalize(shared, &access, request).await;
            let answer = answer.or_else(|error| {
                let message = error.into_message(encoding)?;
                Ok::<_, TwirpError>(FinalizeResponse {
                    message,
                    ..FinalizeResponse::default()
                })
            })?;
            Ok(encoding.encode(&answer))
        }
        "GetCacheEntryDownloadURL" => {
            let request = encoding.decode(&body)?;
            let answer = find(shared, &access, &request, headers).await?;
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
    shared: &Shared<S>,
    access: &Access,
    request: CreateRequest,
    headers: &HeaderMap,
) -> Result<CreateResponse, TwirpError> {
    shared.counters.reservations.one();
    let name = checked_name(writable(access)?, request.version, request.key)?;
    let upload = shared.store.reserve(name).await.inspect_err(|error| {
        if matches!(error, StoreError::AlreadyExists) {
            shared.counters.conflicts.one();
        }
    })?;
    Ok(CreateResponse {
        ok: true,
        signed_upload_url: shared.content_url(Purpose::Upload, upload, headers),
        message: String::new(),
    })
}

async fn finalize<S: Store>(
    shared: &Shared<S>,
    access: &Access,
    request: FinalizeRequest,
) -> Result<FinalizeResponse, TwirpError> {
    let name = checked_name(writable(access)?, request.version, request.key)?;
    let size = u64::try_from(request.size_bytes)
        .map_err(|_| TwirpError::invalid("the size must not be negative"))?;
    let upload = shared.store.upload_of(&name).await?;
    let entry = shared.store.commit(upload, size).await?;
    shared.counters.commits.one();
    Ok(FinalizeResponse {
        ok: true,
        entry_id: i64::try_from(entry.id).unwrap_or(i64::MAX),
        message: String::new(),
    })
}

async fn find<S: Store>(
    shared: &Shared<S>,
    access: &Access,
    request: &GetRequest,
    headers: &HeaderMap,
) -> Result<GetResponse, TwirpError> {
    shared.counters.lookups.one();
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
    shared.counters.hits.one();
    Ok(GetResponse {
        ok: true,
        signed_download_url: shared.content_url(Purpose::Download, entry.id, headers),
        matched_key: entry.name.key,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_read_as_number_and_as_text_under_both_names() {
        for json in [
            r#"{"key":"k","size_bytes":"7","version":"v"}"#,
            r#"{"key":"k","sizeBytes":7,"version":"v","metadata":{"x":1}}"#,
        ] {
            let request: FinalizeRequest = serde_json::from_str(json).unwrap();
            assert_eq!((request.size_bytes, request.key.as_str()), (7, "k"));
        }
    }

    #[test]
    fn protobuf_messages_have_the_fields_of_the_protocol() {
        // key = 2, size_bytes = 3, version = 4, behind an unknown metadata = 1.
        let bytes = b"\x0a\x02\x08\x01\x12\x01k\x18\x07\x22\x01v";
        let request = FinalizeRequest::decode(&bytes[..]).unwrap();
        assert_eq!(
            request,
            FinalizeRequest {
                key: "k".to_owned(),
                size_bytes: 7,
                version: "v".to_owned()
            }
        );
        let answer = GetResponse {
            ok: true,
            signed_download_url: "u".to_owned(),
            matched_key: "k".to_owned(),
        };
        assert_eq!(answer.encode_to_vec(), b"\x08\x01\x12\x01u\x1a\x01k");
    }
}
