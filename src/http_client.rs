//! The one HTTP client of the binary: same TLS roots, same proxies, same limits everywhere.

use std::sync::Once;
use std::time::Duration;

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
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // An error means that one is installed already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    reqwest::Client::builder()
        .user_agent(USER_AGENT)
        .connect_timeout(timeouts.connect)
        .read_timeout(timeouts.read)
        .build()
}
