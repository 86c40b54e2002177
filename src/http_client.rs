//! The one HTTP client of the binary: same TLS roots, same proxies, same limits everywhere.

use std::sync::Once;
use std::time::Duration;

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
