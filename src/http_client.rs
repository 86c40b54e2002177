//! The one HTTP client of the binary: same TLS roots, same proxies, same limits everywhere.

use std::sync::Once;
use std::time::Duration;

/// Time to establish a connection. A runner without a route to the host must not wait a minute for
/// a cache.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Time without a single byte before a transfer counts as dead.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// What servers see. GitHub's API refuses requests without one.
const USER_AGENT: &str = concat!("sccache-action/", env!("CARGO_PKG_VERSION"));

/// A client that trusts the system's certificates, honours `HTTPS_PROXY`, `HTTP_PROXY` and
/// `NO_PROXY`, and gives up on a connection after 10 s and on a silent transfer after 30 s.
///
/// # Errors
/// Where the system's certificates or proxy settings cannot be read.
pub fn build() -> Result<reqwest::Client, reqwest::Error> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // An error means that one is installed already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    reqwest::Client::builder()
        .user_agent(USER_AGENT)
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .build()
}
