//! Errors of a cache service, read from all the forms in which services report them.

use std::time::{Duration, SystemTime};

use reqwest::StatusCode;
use reqwest::header::HeaderMap;
use serde::Deserialize;

use crate::http;
use crate::runner::log::SHORTEST_SECRET;

/// The longest text from elsewhere in an error, in characters.
const TEXT_LIMIT: usize = 200;

/// The longest wait that is passed on. Jobs end before; a caller may add it to any time.
const WAIT_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// The reason why a request to a cache service failed. No text in it has a token, the query of a
/// signed URL, or more than 200 characters.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CacheError {
    /// It has had too many requests: status 429, or 503 with `Retry-After`.
    #[error("the cache service's rate limit is reached")]
    Throttled {
        /// How long it asks its clients to wait, at most a day.
        retry_after: Option<Duration>,
    },
    /// The token does not allow it, or the repository's storage is used up. This does not change
    /// during the job.
    #[error("the cache service denied the request: {0}")]
    Denied(String),
    /// The entry or the upload no longer exists, is shorter than the requested range, or its signed
    /// URL has expired.
    #[error("cache entry not found")]
    Gone,
    /// Anything else: it cannot be reached, is too slow, is broken, or its answer cannot be read.
    #[error("the cache service failed: {0}")]
    Unavailable(String),
}

impl CacheError {
    /// Whether the same may succeed later.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Throttled { .. } | Self::Unavailable(_))
    }
}

/// A service's answer to a call.
pub(super) struct ApiAnswer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

/// The purpose of a request, which decides what a refusal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestKind {
    /// The service, with the token.
    Service,
    /// The service, with the token, about an upload that was reserved.
    Upload,
    /// Content under a signed URL.
    Content,
}

/// The error for an answer that is no success. `printable` makes a text of the service's fit to
/// show.
pub(super) fn refusal(
    asked: RequestKind,
    answer: &ApiAnswer,
    now: SystemTime,
    printable: impl Fn(&str) -> String,
) -> CacheError {
    let problem = Problem::of(&answer.body);
    let text = || printable(&format!("{}: {}", answer.status, problem.message));
    if asked != RequestKind::Content && problem.is_denial() {
        return CacheError::Denied(text());
    }
    let retry_after = http::retry_after(&answer.headers, now, WAIT_LIMIT);
    match answer.status {
        StatusCode::TOO_MANY_REQUESTS => CacheError::Throttled { retry_after },
        StatusCode::SERVICE_UNAVAILABLE if retry_after.is_some() => {
            CacheError::Throttled { retry_after }
        }
        // Twirp has had other statuses for this than 429.
        _ if problem.code == "resource_exhausted" => CacheError::Throttled { retry_after },
        StatusCode::NOT_FOUND | StatusCode::GONE if asked != RequestKind::Service => {
            CacheError::Gone
        }
        // No token was sent, so these are about the URL.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::RANGE_NOT_SATISFIABLE
            if asked == RequestKind::Content =>
        {
            CacheError::Gone
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => CacheError::Denied(text()),
        _ => CacheError::Unavailable(text()),
    }
}

/// A service's description of an error: Twirp has `code` and `msg`, GitHub's REST `message`, that
/// of `act` and Gitea `error`, Azure the XML elements `Code` and `Message`.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Problem {
    pub(super) code: String,
    #[serde(alias = "msg", alias = "error")]
    pub(super) message: String,
}

impl Problem {
    pub(super) fn of(body: &[u8]) -> Self {
        if let Ok(problem) = serde_json::from_slice(body) {
            return problem;
        }
        let text = String::from_utf8_lossy(body);
        match (element(&text, "Code"), element(&text, "Message")) {
            (Some(code), message) => Self {
                code: code.to_owned(),
                message: format!("{code}: {}", message.unwrap_or_default()),
            },
            _ => Self::saying(text.into_owned()),
        }
    }

    pub(super) fn saying(message: String) -> Self {
        Self {
            code: String::new(),
            message,
        }
    }

    /// Whether it is about the token's rights, or about the repository's quota. `@actions/cache`
    /// recognises the same texts (`cache.ts`, `errors.ts`).
    pub(super) fn is_denial(&self) -> bool {
        matches!(self.code.as_str(), "permission_denied" | "unauthenticated")
            || self.message.starts_with("cache write denied")
            || self.message.starts_with("cache read denied")
            || self.message.contains("insufficient usage")
    }

    /// Whether it says that a key is taken. Not all services have their own status for it.
    pub(super) fn is_conflict(&self) -> bool {
        self.code == "already_exists" || self.message.to_ascii_lowercase().contains("already exist")
    }
}

/// The text of the first XML element `name`.
fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    Some(text)
}

/// `text` in a form that may be shown: one line, not long, without `token` and without the queries
/// of URLs, which may be signatures. A token of a few letters is not replaced.
pub(super) fn printable(text: &str, token: &str) -> String {
    let text = if token.len() < SHORTEST_SECRET {
        text.to_owned()
    } else {
        text.replace(token, "***")
    };
    let words: Vec<String> = text
        .split(|character: char| character.is_whitespace() || character.is_control())
        .filter(|word| !word.is_empty())
        .map(|word| match word.split_once('?') {
            Some((before, query)) if query.contains('=') => format!("{before}?***"),
            _ => word.to_owned(),
        })
        .collect();
    let line = words.join(" ");
    match line.char_indices().nth(TEXT_LIMIT) {
        Some((cut, _)) => line[..cut].to_owned(),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use reqwest::header::{HeaderName, HeaderValue, RETRY_AFTER};

    use super::*;

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        let pair = |(name, value): &(HeaderName, &str)| {
            (name.clone(), HeaderValue::from_str(value).unwrap())
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn a_refusal_is_understood_by_what_was_asked() {
        use RequestKind::{Content, Service, Upload};
        let throttled = |seconds: Option<u64>| CacheError::Throttled {
            retry_after: seconds.map(Duration::from_secs),
        };
        let denied = |text: &str| CacheError::Denied(text.to_owned());
        let unavailable = |text: &str| CacheError::Unavailable(text.to_owned());
        let twirp_denied = r#"{"code":"permission_denied","msg":"no"}"#;
        let write_denied = r#"{"message":"cache write denied: no"}"#;
        let quota = r#"{"code":"resource_exhausted","msg":"insufficient usage to create"}"#;
        let azure = "<?xml?><Error><Code>AuthenticationFailed</Code><Message>x</Message></Error>";
        for (asked, status, wait, body, expected) in [
            (Service, 429, Some("3"), "", throttled(Some(3))),
            (Content, 429, None, "", throttled(None)),
            (Service, 503, Some("3"), "", throttled(Some(3))),
            (
                Service,
                503,
                None,
                "down",
                unavailable("503 Service Unavailable: down"),
            ),
            (
                Service,
                403,
                None,
                r#"{"code":"resource_exhausted"}"#,
                throttled(None),
            ),
            (
                Service,
                429,
                None,
                quota,
                denied("429 Too Many Requests: insufficient usage to create"),
            ),
            (
                Service,
                403,
                None,
                twirp_denied,
                denied("403 Forbidden: no"),
            ),
            (
                Service,
                400,
                None,
                twirp_denied,
                denied("400 Bad Request: no"),
            ),
            (
                Upload,
                409,
                None,
                write_denied,
                denied("409 Conflict: cache write denied: no"),
            ),
            (
                Service,
                401,
                None,
                r#"{"error":"who?"}"#,
                denied("401 Unauthorized: who?"),
            ),
            (Content, 403, None, azure, CacheError::Gone),
            (Content, 401, None, "", CacheError::Gone),
            (Content, 404, None, "", CacheError::Gone),
            (Content, 410, None, "", CacheError::Gone),
            (Content, 416, None, "", CacheError::Gone),
            (Upload, 404, None, "", CacheError::Gone),
            (Service, 404, None, "", unavailable("404 Not Found:")),
            (Service, 302, None, "", unavailable("302 Found:")),
            (
                Content,
                500,
                None,
                "",
                unavailable("500 Internal Server Error:"),
            ),
        ] {
            let answer = ApiAnswer {
                status: StatusCode::from_u16(status).unwrap(),
                headers: wait.map_or_else(HeaderMap::new, |wait| headers(&[(RETRY_AFTER, wait)])),
                body: body.as_bytes().to_vec(),
            };
            let printable = |text: &str| printable(text, "hunter2");
            let error = refusal(asked, &answer, SystemTime::UNIX_EPOCH, printable);
            assert_eq!(error, expected, "{asked:?} {status} {body}");
        }
    }

    #[test]
    fn a_key_that_is_taken_is_known_by_any_services_words() {
        for body in [
            r#"{"code":"already_exists","msg":"no"}"#,
            r#"{"message":"Cache already exists. Scope: refs/heads/main"}"#,
            r#"{"error":"already exist"}"#,
        ] {
            assert!(Problem::of(body.as_bytes()).is_conflict(), "{body}");
        }
        assert!(!Problem::of(b"{}").is_conflict());
    }

    #[test]
    fn what_is_shown_is_one_short_line_without_secrets() {
        let shown = |text: &str| printable(text, "hunter2");
        assert_eq!(shown(" a\n\u{1b}b\tc "), "a b c");
        assert_eq!(
            shown("Bearer hunter2, Bearer hunter22"),
            "Bearer ***, Bearer ***2"
        );
        assert_eq!(
            shown("at https://h/c/b?se=1&sig=x now?"),
            "at https://h/c/b?*** now?"
        );
        assert_eq!(shown(r#"{"url":"/b?sig=x","a":1}"#), r#"{"url":"/b?***"#);
        assert_eq!(shown(&"ö".repeat(300)), "ö".repeat(200));
        for short in ["", "a", "abc"] {
            assert_eq!(printable("abc", short), "abc");
        }
        assert_eq!(printable("abcd", "abcd"), "***");
    }

    proptest! {
        #[test]
        fn no_text_of_a_services_can_show_a_token_or_be_long(
            before in ".{0,40}", between in "[ ?&=\\n]{0,3}", after in ".{0,300}",
        ) {
            let text = format!("{before}s3cret{between}s3cret{after}");
            let shown = printable(&text, "s3cret");
            prop_assert!(!shown.contains("s3cret"));
            prop_assert!(shown.chars().count() <= 200);
        }
    }
}
