//! The one HTTP client of the binary: same TLS roots, same proxies, same limits everywhere.

use std::fmt;
use std::sync::Once;
use std::time::{Duration, Instant, SystemTime};

use reqwest::header::{DATE, HeaderMap, RETRY_AFTER};
use serde::{Deserialize, Serialize};
use url::{Host, Url};

/// A token that opens the service. `Debug` does not show it; serialized it is its text, for a
/// process that gets the token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BearerToken(String);

impl BearerToken {
    /// A new token of 256 random bits.
    ///
    /// # Errors
    /// Fails if the system has no random numbers.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(hex::encode(bytes)))
    }

    /// The token of this text.
    pub fn new(token: impl Into<String>) -> Self {
        Self(token.into())
    }

    /// The token's text. Only the client that sends it should call this.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for BearerToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("BearerToken(***)")
    }
}

/// How long a server may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Time to establish a connection.
    pub connect: Duration,
    /// Time without a single byte before a transfer counts as dead.
    pub read: Duration,
    /// How long a transfer may be slower than [`LEAST_RATE`] before it counts as dead.
    pub slow: Duration,
}

/// The slowest transfer that is worth waiting for, in bytes a second. cargo gives up below 10 bytes
/// a second for 30 s (`http.low-speed-limit`); an action downloads megabytes.
pub const LEAST_RATE: u64 = 10_000;

impl Default for Timeouts {
    /// A runner without a route to the host must not wait minutes for a cache.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            read: Duration::from_secs(20),
            slow: Duration::from_secs(30),
        }
    }
}

/// Detects a transfer that is too slow.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    span: Duration,
    since: Instant,
    bytes: u64,
}

impl Pace {
    /// The pace of a transfer that begins at `now` and may be too slow for `span`.
    pub fn new(span: Duration, now: Instant) -> Self {
        Self {
            span,
            since: now,
            bytes: 0,
        }
    }

    /// Notes that `bytes` came by `now`. Says whether the transfer is worth waiting for.
    pub fn keeps_up(&mut self, bytes: usize, now: Instant) -> bool {
        self.bytes = self.bytes.saturating_add(bytes as u64);
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed < self.span {
            return true;
        }
        let least = u128::from(LEAST_RATE) * elapsed.as_millis() / 1000;
        let enough = u128::from(self.bytes) >= least;
        (self.since, self.bytes) = (now, 0);
        enough
    }
}

/// The URL that `text` is, if it names something that this client can ask for: by `http` or `https`. The
/// URLs of these two always have a host.
pub fn parse_url(text: &str) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    matches!(url.scheme(), "http" | "https").then_some(url)
}

/// The name that servers see. GitHub's API refuses requests without one.
const USER_AGENT: &str = concat!("sccache-action/", env!("CARGO_PKG_VERSION"));

/// A client that trusts the system's certificates, honours `HTTPS_PROXY`, `HTTP_PROXY` and
/// `NO_PROXY`, and gives up on servers that take longer than `timeouts`.
///
/// # Errors
/// Fails if the system's certificates or proxy settings cannot be read.
pub fn build(timeouts: Timeouts) -> Result<reqwest::Client, reqwest::Error> {
    builder(timeouts.connect)
        .read_timeout(timeouts.read)
        .build()
}

/// The base of every client, for one that needs other settings. It waits for `connect` to establish
/// a connection, and for an answer without limit.
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
/// clock, which `Date` gives; without `Date`, by this machine's clock, which is at `now`. At most
/// `longest`. `None` if there is no such header, or it cannot be read.
pub fn retry_after(headers: &HeaderMap, now: SystemTime, longest: Duration) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok().map(str::trim);
    let value = text(RETRY_AFTER)?;
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // A number with too many digits also means a very long time.
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
    fn a_transfer_that_trickles_is_told_from_a_slow_one() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut pace = Pace::new(Duration::from_secs(30), begin);
        assert!((1..30).all(|second| pace.keeps_up(1, at(second))));
        assert!(!pace.keeps_up(1, at(30)));
        let mut pace = Pace::new(Duration::from_secs(30), begin);
        assert!((1..100).all(|second| pace.keeps_up(10_000, at(second))));
        // It was fast once, but long ago.
        assert!(!(100..140).all(|second| pace.keeps_up(100, at(second))));
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
        // The clock of the sender counts.
        let headers = headers(&[
            (RETRY_AFTER, "Sun, 06 Nov 1994 09:50:07 GMT"),
            (DATE, "Sun, 06 Nov 1994 09:50:00 GMT"),
        ]);
        let wait = |longest| retry_after(&headers, now, Duration::from_secs(longest));
        assert_eq!(wait(60), Some(Duration::from_secs(7)));
        assert_eq!(wait(5), Some(Duration::from_secs(5)));
    }
}
