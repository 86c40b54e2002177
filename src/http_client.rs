//! The one HTTP client of the binary: same TLS roots, same proxies, same limits everywhere.

use std::sync::Once;
use std::time::{Duration, SystemTime};

use reqwest::header::{DATE, HeaderMap, RETRY_AFTER};
use url::{Host, Url};

/// How long a server may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Time to establish a connection.
    pub connect: Duration,
    /// Time without a single byte before a transfer counts as dead.
    pub read: Duration,
}

impl Default for Timeouts {
    /// A runner without a route to the host must not wait minutes for a cache.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            read: Duration::from_secs(20),
        }
    }
}

/// What servers see. GitHub's API refuses requests without one.
const USER_AGENT: &str = concat!("sccache-action/", env!("CARGO_PKG_VERSION"));

/// A client that trusts the system's certificates, honours `HTTPS_PROXY`, `HTTP_PROXY` and
/// `NO_PROXY`, and gives up on servers that take longer than `timeouts`.
///
/// # Errors
/// Where the system's certificates or proxy settings cannot be read.
pub fn build(timeouts: Timeouts) -> Result<reqwest::Client, reqwest::Error> {
    builder(timeouts.connect)
        .read_timeout(timeouts.read)
        .build()
}

/// What every client starts from, for one that has needs of its own. It waits for `connect` to
/// establish a connection, and without limit for an answer.
pub fn builder(connect: Duration) -> reqwest::ClientBuilder {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // An error means that one is installed already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    reqwest::Client::builder()
        .user_agent(USER_AGENT)
        .connect_timeout(connect)
}

/// Whether the host of `url` is this machine, which no proxy can reach.
pub fn is_on_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// How long the sender of `headers` asks to wait (RFC 9110, 10.2.3): seconds, or a time by its own
/// clock, which it tells in `Date`; without that, by this machine's, which says `now`. No more than
/// `longest`. `None` where it does not ask, or not in words that can be read.
pub fn retry_after(headers: &HeaderMap, now: SystemTime, longest: Duration) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok().map(str::trim);
    let value = text(RETRY_AFTER)?;
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // So many digits that they are no number mean very long, too.
        let seconds = value.parse().unwrap_or(u64::MAX);
        return Some(Duration::from_secs(seconds).min(longest));
    }
    let until = httpdate::parse_http_date(value).ok()?;
    let now = text(DATE)
        .and_then(|date| httpdate::parse_http_date(date).ok())
        .unwrap_or(now);
    let wait = until.duration_since(now).unwrap_or_default();
    Some(wait.min(longest))
}

#[cfg(test)]
mod tests {
    use reqwest::header::{HeaderName, HeaderValue};

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter().cloned();
        pairs
            .map(|(name, value)| (name, HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn a_wait_is_read_in_seconds_and_as_a_time() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (value, expected) in [
            ("0", Some(0)),
            (" 120 ", Some(120)),
            ("86401", Some(86400)),
            ("99999999999999999999999999", Some(86400)),
            ("Sun, 06 Nov 1994 08:50:07 GMT", Some(30)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("Sat, 06 Nov 2094 08:00:00 GMT", Some(86400)),
            ("", None),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
        ] {
            let headers = headers(&[(RETRY_AFTER, value)]);
            let expected = expected.map(Duration::from_secs);
            assert_eq!(retry_after(&headers, now, DAY), expected, "{value}");
        }
        assert_eq!(retry_after(&HeaderMap::new(), now, DAY), None);
        // What counts is the clock of the one who names the time.
        let headers = headers(&[
            (RETRY_AFTER, "Sun, 06 Nov 1994 09:50:07 GMT"),
            (DATE, "Sun, 06 Nov 1994 09:50:00 GMT"),
        ]);
        let wait = |longest| retry_after(&headers, now, Duration::from_secs(longest));
        assert_eq!(wait(60), Some(Duration::from_secs(7)));
        assert_eq!(wait(5), Some(Duration::from_secs(5)));
    }
}
