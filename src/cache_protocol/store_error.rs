//! Why a storage refuses or fails, and the table of what each API answers then.

use std::io;

use axum::http::StatusCode;

use crate::cache_protocol::store::PARTS_LIMIT;

/// The reason why a storage refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is an entry of this name, or one is being uploaded.
    #[error("cache entry with the same key, version, and scope already exists")]
    AlreadyExists,
    /// No entry of this name or number is being uploaded.
    #[error("there is no such upload")]
    NoSuchUpload,
    /// The upload is being written or committed right now.
    #[error("the upload is still being written")]
    Busy,
    /// The upload is not as long as its client claims.
    #[error("the upload has {actual} bytes, not {claimed}")]
    SizeMismatch {
        /// The number of bytes that were received.
        actual: u64,
        /// The number of bytes that the client claims.
        claimed: u64,
    },
    /// The upload names a block that was not uploaded.
    #[error("the block list names a block that was not uploaded")]
    NoSuchBlock,
    /// The entry is larger than the service takes.
    #[error("a cache entry may have at most {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// There is no room on the disk. Some is being made, so a later try may do better.
    #[error("the storage is full; try again")]
    Full,
    /// Received but uncommitted content takes up as much as it may.
    #[error("uncommitted uploads take more than {limit} bytes; commit some or wait")]
    Crowded {
        /// The limit in bytes.
        limit: u64,
    },
    /// The upload has reached the limit of parts.
    #[error("an upload may have at most {PARTS_LIMIT} blocks or pieces")]
    TooManyParts,
    /// The client broke off.
    #[error("the request ended early: {0}")]
    Interrupted(String),
    /// The storage itself failed. Clients get no details; the log has them.
    #[error("the storage failed")]
    Io(#[from] io::Error),
    /// A database or another service that the storage is on failed.
    #[error("the storage failed")]
    Backend(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl StoreError {
    /// The text for the log; for errors of the storage it has more details than clients get.
    pub fn cause(&self) -> String {
        match self {
            Self::Io(error) => error.to_string(),
            Self::Backend(error) => error.to_string(),
            error => error.to_string(),
        }
    }

    /// Logs it if the storage is to blame and not the client.
    pub fn log(&self) {
        if matches!(self, Self::Io(_) | Self::Backend(_)) {
            tracing::error!(cause = self.cause(), "a request failed");
        }
    }
}

/// What the APIs answer for an error: the status, and the API's own code if it has codes. They
/// differ where their clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ErrorAnswers {
    /// Version 1.
    pub(super) v1: StatusCode,
    /// Version 2, with Twirp's code.
    pub(super) v2: (StatusCode, &'static str),
    /// The content's URLs, with Azure's code.
    pub(super) azure_blob: (StatusCode, &'static str),
}

const fn answers(
    v1: StatusCode,
    v2: (StatusCode, &'static str),
    azure_blob: (StatusCode, &'static str),
) -> ErrorAnswers {
    ErrorAnswers { v1, v2, azure_blob }
}

impl StoreError {
    /// What each API answers.
    pub(super) fn answers(&self) -> ErrorAnswers {
        use StatusCode as Code;
        // `@actions/cache` shows the message of status 400 only (`reserveCache`), so version 1 has
        // no narrower status for what a client can fix.
        let (v1_invalid, v2_invalid) = (Code::BAD_REQUEST, (Code::BAD_REQUEST, "invalid_argument"));
        let azure_invalid = (Code::BAD_REQUEST, "InvalidInput");
        match self {
            Self::AlreadyExists => answers(
                Code::CONFLICT,
                (Code::CONFLICT, "already_exists"),
                azure_invalid,
            ),
            Self::NoSuchUpload => answers(
                Code::NOT_FOUND,
                (Code::NOT_FOUND, "not_found"),
                (Code::NOT_FOUND, "BlobNotFound"),
            ),
            Self::Busy => answers(
                Code::CONFLICT,
                (Code::PRECONDITION_FAILED, "failed_precondition"),
                azure_invalid,
            ),
            Self::SizeMismatch { .. } | Self::Interrupted(_) => {
                answers(v1_invalid, v2_invalid, azure_invalid)
            }
            Self::NoSuchBlock => answers(
                v1_invalid,
                v2_invalid,
                (Code::BAD_REQUEST, "InvalidBlockList"),
            ),
            Self::TooLarge { .. } => answers(
                v1_invalid,
                v2_invalid,
                (Code::PAYLOAD_TOO_LARGE, "RequestBodyTooLarge"),
            ),
            Self::TooManyParts => answers(
                v1_invalid,
                v2_invalid,
                (Code::CONFLICT, "BlockCountExceedsLimit"),
            ),
            Self::Full => answers(
                Code::SERVICE_UNAVAILABLE,
                (Code::SERVICE_UNAVAILABLE, "unavailable"),
                (Code::SERVICE_UNAVAILABLE, "ServerBusy"),
            ),
            Self::Crowded { .. } => answers(
                Code::INSUFFICIENT_STORAGE,
                (Code::INSUFFICIENT_STORAGE, "resource_exhausted"),
                (Code::INSUFFICIENT_STORAGE, "InsufficientStorage"),
            ),
            Self::Io(_) | Self::Backend(_) => answers(
                Code::INTERNAL_SERVER_ERROR,
                (Code::INTERNAL_SERVER_ERROR, "internal"),
                (Code::INTERNAL_SERVER_ERROR, "InternalError"),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_has_its_answer_in_each_api() {
        let (actual, claimed, limit) = (1, 2, 3);
        let io = || io::Error::other("broken");
        let gone = StoreError::Interrupted("gone".to_owned());
        for (error, expected) in [
            (
                StoreError::AlreadyExists,
                "409|409 already_exists|400 InvalidInput",
            ),
            (
                StoreError::NoSuchUpload,
                "404|404 not_found|404 BlobNotFound",
            ),
            (
                StoreError::Busy,
                "409|412 failed_precondition|400 InvalidInput",
            ),
            (
                StoreError::SizeMismatch { actual, claimed },
                "400|400 invalid_argument|400 InvalidInput",
            ),
            (
                StoreError::NoSuchBlock,
                "400|400 invalid_argument|400 InvalidBlockList",
            ),
            (
                StoreError::TooLarge { limit },
                "400|400 invalid_argument|413 RequestBodyTooLarge",
            ),
            (StoreError::Full, "503|503 unavailable|503 ServerBusy"),
            (
                StoreError::Crowded { limit },
                "507|507 resource_exhausted|507 InsufficientStorage",
            ),
            (
                StoreError::TooManyParts,
                "400|400 invalid_argument|409 BlockCountExceedsLimit",
            ),
            (gone, "400|400 invalid_argument|400 InvalidInput"),
            (StoreError::Io(io()), "500|500 internal|500 InternalError"),
            (
                StoreError::Backend(io().into()),
                "500|500 internal|500 InternalError",
            ),
        ] {
            let ErrorAnswers {
                v1,
                v2: (v2, twirp),
                azure_blob: (blob, azure),
            } = error.answers();
            let [v1, v2, blob] = [v1, v2, blob].map(|status| status.as_u16());
            let found = format!("{v1}|{v2} {twirp}|{blob} {azure}");
            assert_eq!(found, expected, "{error:?}");
        }
    }
}
