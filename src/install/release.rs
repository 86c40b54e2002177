//! Installs sccache from its releases: finds the version, then downloads and verifies its archive.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime};

use backon::{ExponentialBuilder, Retryable};
use reqwest::{Response, StatusCode};
use semver::Version;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use url::Url;

use crate::github;
use crate::http::{self, LEAST_RATE, Pace};
use crate::install::version::VersionSpec;
use crate::runner::log::Log;

const OWNER: &str = "mozilla";
const REPOSITORY: &str = "sccache";

/// The base URL of releases: an asset is under `v<version>/`, by its name.
pub const RELEASES_URL: &str = "https://github.com/mozilla/sccache/releases/download";

/// The largest archive, in bytes. sccache's have some 10 MB.
const ARCHIVE_LIMIT: u64 = 200 << 20;

/// The largest checksum file, in bytes.
const CHECKSUM_LIMIT: u64 = 4 << 10;

/// How often a request is made before it is given up, the first time among them.
const ATTEMPTS: usize = 4;

/// The attempts if the server is unreachable or silent, which costs the whole time-out and rarely
/// passes.
const SILENT_ATTEMPTS: usize = 2;

/// The longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// How often a slow download says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// A sha256 digest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Checksum([u8; 32]);

/// Text that is no sha256.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it accepts a sha256: 64 hexadecimal digits")]
pub struct ChecksumError;

impl FromStr for Checksum {
    type Err = ChecksumError;

    /// Reads 64 hexadecimal digits, with or without `sha256:` before them.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| ChecksumError)?;
        Ok(Self(bytes))
    }
}

impl Checksum {
    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Parses a checksum file: the digits, with or without a file's name behind them.
    fn of_file(text: &str) -> Result<Self, ChecksumError> {
        text.split_whitespace().next().ok_or(ChecksumError)?.parse()
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// The sha256 of archives that sccache has released: a line for each, with version, target and digest.
#[derive(Clone, Copy, Debug)]
pub struct ReleaseDigests<'a>(&'a str);

/// The digests that this action was built with: all releases from 0.2.15 to 0.17.0.
pub const RELEASE_DIGESTS: ReleaseDigests<'static> =
    ReleaseDigests(include_str!("release_digests.txt"));

impl<'a> ReleaseDigests<'a> {
    /// The digests that `text` lists.
    pub const fn new(text: &'a str) -> Self {
        Self(text)
    }

    /// The digest of the archive called `asset` (without `.tar.gz`); `None` if there is none.
    pub fn of(self, asset: &str) -> Option<Checksum> {
        self.lines().find_map(|(version, target, digest)| {
            let this = format!("sccache-v{version}-{target}") == asset;
            this.then(|| digest.parse().ok())?
        })
    }

    fn lines(self) -> impl Iterator<Item = (&'a str, &'a str, &'a str)> {
        self.0.lines().filter_map(|line| {
            let (version, rest) = line.split_once(' ')?;
            let (target, digest) = rest.split_once(' ')?;
            Some((version, target, digest))
        })
    }
}

/// The reason why a release is unavailable.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// GitHub's API did not list the versions.
    #[error("cannot list versions by GitHub's API: {0}")]
    Api(String),
    /// No release matches.
    #[error("no release of sccache matches {0}")]
    NoVersion(String),
    /// The server cannot be reached, or broke off.
    #[error("{url}: {error}")]
    Transfer {
        /// The requested URL.
        url: String,
        /// The reason, with its causes.
        error: String,
        /// Whether the server was unreachable or silent.
        silent: bool,
    },
    /// The server refused.
    #[error("{url}: {status}")]
    Status {
        /// The requested URL.
        url: String,
        /// The refusal.
        status: StatusCode,
        /// How long the server asked to wait.
        wait: Option<Duration>,
    },
    /// The answer is larger than it may be.
    #[error("{url} has more than {limit} bytes")]
    TooLarge {
        /// The requested URL.
        url: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// The file beside the archive is no checksum.
    #[error("{0} is not a sha256")]
    NoChecksum(String),
    /// The archive does not match its checksum.
    #[error("{url} has the sha256 {actual}, not the one {whose}, {expected}; it was not unpacked")]
    Mismatch {
        /// The archive.
        url: String,
        /// Its checksum.
        actual: Checksum,
        /// The expected checksum.
        expected: Checksum,
        /// The origin of the expected checksum.
        whose: &'static str,
    },
    /// The mirror's URL is no valid base.
    #[error("{0} is not a valid base URL")]
    Base(String),
    /// The archive could not be written to the disk.
    #[error("cannot write the archive: {0}")]
    Io(#[from] std::io::Error),
}

impl ReleaseError {
    fn transfer(url: &Url, error: reqwest::Error) -> Self {
        let error = error.without_url();
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        Self::Transfer {
            url: url.to_string(),
            error: text,
            silent: error.is_connect() || error.is_timeout(),
        }
    }

    /// Whether the same request may succeed the next time.
    fn is_passing(&self) -> bool {
        match self {
            Self::Transfer { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error()
                    || matches!(
                        *status,
                        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
                    )
            }
            _ => false,
        }
    }

    fn asked_wait(&self) -> Option<Duration> {
        match self {
            Self::Status { wait, .. } => *wait,
            _ => None,
        }
    }

    fn is_silent(&self) -> bool {
        matches!(self, Self::Transfer { silent: true, .. })
    }
}

/// Finds the version that `spec` means, through GitHub's API if necessary.
///
/// # Errors
/// [`ReleaseError::Api`] if the API does not answer, [`ReleaseError::NoVersion`] if no release
/// matches.
pub async fn resolve(
    spec: &VersionSpec,
    http: &reqwest::Client,
    api_url: &str,
    token: Option<&str>,
) -> Result<Version, ReleaseError> {
    if let VersionSpec::Exact(version) = spec {
        return Ok(version.clone());
    }
    let no_version = || ReleaseError::NoVersion(spec.to_string());
    let client = github::client(http.clone(), api_url, token)
        .map_err(|error| ReleaseError::Api(error.to_string()))?;
    let ask = || async {
        match spec {
            VersionSpec::Latest => github::latest_release(&client, OWNER, REPOSITORY).await,
            _ => {
                let releases = github::releases(&client, OWNER, REPOSITORY).await?;
                Ok(spec.newest(releases))
            }
        }
    };
    ask()
        .await
        .map_err(|error| ReleaseError::Api(github::explain(&error)))?
        .ok_or_else(no_version)
}

/// Downloads the archive `<asset>.tar.gz` of `version` below `base` to the file `target` and
/// verifies it: against `pinned`, else against its digest in `own`, else against the one published
/// beside it. The log says against which. A transfer that trickles for `slow` is given up. Gives
/// its checksum.
///
/// # Errors
/// [`ReleaseError::Mismatch`] if the archive does not match the checksum; other errors if it is
/// unavailable.
pub async fn download(
    (http, slow): (&reqwest::Client, Duration),
    base: &Url,
    version: &Version,
    asset: &str,
    (pinned, own): (Option<Checksum>, ReleaseDigests<'_>),
    target: &Path,
    log: &Log,
) -> Result<Checksum, ReleaseError> {
    let url = asset_url(base, version, &format!("{asset}.tar.gz"))?;
    let (known, whose) = match (pinned, own.of(asset)) {
        (Some(pinned), _) => (Some(pinned), "of the input `checksum`"),
        (None, Some(own)) => (Some(own), "built into this action"),
        (None, None) => (None, "published beside it"),
    };
    let expected = async {
        match known {
            Some(known) => Ok(known),
            None => published_checksum((http, slow), base, version, asset, log).await,
        }
    };
    let archive = retried(log, || fetch_to((http, slow), &url, target, log));
    // Both run to their end: a dropped download may still write to a file that is about to be
    // deleted.
    let (expected, actual) = tokio::join!(expected, archive);
    let (expected, actual) = (expected?, actual?);
    if !bool::from(actual.0.ct_eq(&expected.0)) {
        return Err(ReleaseError::Mismatch {
            url: url.into(),
            actual,
            expected,
            whose,
        });
    }
    log.info(format!("The archive has the sha256 {whose}."));
    Ok(actual)
}

async fn published_checksum(
    (http, slow): (&reqwest::Client, Duration),
    base: &Url,
    version: &Version,
    asset: &str,
    log: &Log,
) -> Result<Checksum, ReleaseError> {
    let url = asset_url(base, version, &format!("{asset}.tar.gz.sha256"))?;
    let text = retried(log, || async {
        let mut response = answer(http, &url).await?;
        let mut pace = Pace::new(slow, Instant::now());
        let mut text = Vec::new();
        while let Some(piece) = next_piece(&mut response, &mut pace, &url).await? {
            text.extend_from_slice(&piece);
            check_size(&url, text.len() as u64, CHECKSUM_LIMIT)?;
        }
        Ok(text)
    })
    .await?;
    Checksum::of_file(&String::from_utf8_lossy(&text))
        .map_err(|_| ReleaseError::NoChecksum(url.into()))
}

fn asset_url(base: &Url, version: &Version, file: &str) -> Result<Url, ReleaseError> {
    let mut url = base.clone();
    url.path_segments_mut()
        .map_err(|()| ReleaseError::Base(base.to_string()))?
        .pop_if_empty()
        .push(&format!("v{version}"))
        .push(file);
    Ok(url)
}

async fn answer(http: &reqwest::Client, url: &Url) -> Result<Response, ReleaseError> {
    let response = http
        .get(url.clone())
        .send()
        .await
        .map_err(|error| ReleaseError::transfer(url, error))?;
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let wait = http::retry_after(response.headers(), SystemTime::now(), LONGEST_WAIT);
    Err(ReleaseError::Status {
        url: url.to_string(),
        status,
        wait,
    })
}

async fn next_piece(
    response: &mut Response,
    pace: &mut Pace,
    url: &Url,
) -> Result<Option<bytes::Bytes>, ReleaseError> {
    let piece = response
        .chunk()
        .await
        .map_err(|error| ReleaseError::transfer(url, error))?;
    let length = piece.as_ref().map_or(0, |piece| piece.len());
    if piece.is_none() || pace.keeps_up(length, Instant::now()) {
        Ok(piece)
    } else {
        Err(ReleaseError::Transfer {
            url: url.to_string(),
            error: format!("it is slower than {LEAST_RATE} bytes a second"),
            silent: true,
        })
    }
}

fn check_size(url: &Url, size: u64, limit: u64) -> Result<(), ReleaseError> {
    if size <= limit {
        return Ok(());
    }
    Err(ReleaseError::TooLarge {
        url: url.to_string(),
        limit,
    })
}

/// Retries the request if that may help, after the wait that the server asks for or one that
/// doubles each time.
async fn retried<T, F: Future<Output = Result<T, ReleaseError>>>(
    log: &Log,
    request: impl FnMut() -> F,
) -> Result<T, ReleaseError> {
    let mut silent = 0;
    request
        .retry(
            ExponentialBuilder::default()
                .with_min_delay(Duration::from_millis(250))
                .with_max_times(ATTEMPTS - 1)
                .with_jitter(),
        )
        .when(move |error: &ReleaseError| {
            silent += usize::from(error.is_silent());
            error.is_passing() && silent < SILENT_ATTEMPTS
        })
        .adjust(|error: &ReleaseError, wait| wait.map(|wait| error.asked_wait().unwrap_or(wait)))
        .notify(|error: &ReleaseError, wait| {
            log.info(format!("{error}; retrying in {} ms", wait.as_millis()));
        })
        .await
}

/// Downloads `url` to the file `target`. The client reports an answer that ends early if the server
/// gives its length; the checksum detects anything else that is missing.
async fn fetch_to(
    (http, slow): (&reqwest::Client, Duration),
    url: &Url,
    target: &Path,
    log: &Log,
) -> Result<Checksum, ReleaseError> {
    let begin = Instant::now();
    let mut response = answer(http, url).await?;
    let total = response.content_length();
    check_size(url, total.unwrap_or(0), ARCHIVE_LIMIT)?;
    let mut file = File::create(target).await?;
    let mut digest = Sha256::new();
    let mut size = 0;
    let mut told = begin;
    let mut pace = Pace::new(slow, begin);
    while let Some(piece) = next_piece(&mut response, &mut pace, url).await? {
        size += piece.len() as u64;
        check_size(url, size, ARCHIVE_LIMIT)?;
        digest.update(&piece);
        file.write_all(&piece).await?;
        if told.elapsed() >= PROGRESS_INTERVAL {
            told = Instant::now();
            log.info(progress(size, total));
        }
    }
    file.flush().await?;
    log.debug(format!(
        "{url}: {size} bytes in {} ms",
        begin.elapsed().as_millis()
    ));
    Ok(Checksum(digest.finalize().into()))
}

fn progress(size: u64, total: Option<u64>) -> String {
    match total.filter(|total| *total > 0) {
        Some(total) => format!(
            "Downloading sccache: {} of {} KiB ({} %)",
            size >> 10,
            total >> 10,
            size.saturating_mul(100) / total
        ),
        None => format!("Downloading sccache: {} KiB", size >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGITS: &str = "E3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_checksum_file_is_read_with_and_without_a_name() {
        for text in [
            DIGITS.to_owned(),
            format!("{DIGITS}\n"),
            format!("{DIGITS}  sccache-v0.16.0.tar.gz\n"),
            format!("sha256:{DIGITS}"),
        ] {
            assert_eq!(Checksum::of_file(&text), Ok(Checksum::of(b"")), "{text}");
        }
        for text in ["", "abc", "<html>", &DIGITS[1..], &format!("{DIGITS}0")] {
            assert_eq!(Checksum::of_file(text), Err(ChecksumError), "{text}");
        }
    }

    #[test]
    fn each_line_of_the_digests_is_a_version_a_target_and_a_sha256_and_none_is_there_twice() {
        let text = RELEASE_DIGESTS.0;
        let lines: Vec<_> = RELEASE_DIGESTS.lines().collect();
        assert_eq!(lines.len(), text.lines().count());
        let mut seen = std::collections::BTreeSet::new();
        let mut digests = std::collections::BTreeSet::new();
        for (version, target, digest) in lines {
            assert!(version.parse::<Version>().is_ok(), "{version}");
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c);
            assert!(target.chars().all(plain), "{target}");
            assert_eq!(digest.len(), 64, "{digest}");
            assert!(digest.parse::<Checksum>().is_ok(), "{digest}");
            assert!(seen.insert((version, target)), "{version} {target}");
            assert!(digests.insert(digest), "{digest}");
        }
    }

    #[test]
    fn the_digest_of_an_archive_is_that_of_its_version_and_target() {
        let expected = "f73a5c39f96bb6ebb89cc7915cf182260d4cbf30765322c5e793d0fe8bd80784";
        let asset = |version, target| RELEASE_DIGESTS.of(&format!("sccache-v{version}-{target}"));
        let found = asset("0.16.0", "aarch64-unknown-linux-musl").unwrap();
        assert_eq!(found.to_string(), expected);
        assert_eq!(asset("0.16.0", "aarch64-unknown-linux"), None);
        assert_eq!(asset("9.9.9", "aarch64-unknown-linux-musl"), None);
    }

    #[test]
    fn an_asset_lies_below_the_mirrors_path_with_and_without_a_slash() {
        for base in ["https://m.example/a/b", "https://m.example/a/b/"] {
            let url = asset_url(&base.parse().unwrap(), &Version::new(0, 16, 0), "x.tar.gz");
            assert_eq!(
                url.unwrap().as_str(),
                "https://m.example/a/b/v0.16.0/x.tar.gz"
            );
        }
    }

    #[test]
    fn progress_is_said_with_and_without_a_length() {
        assert_eq!(
            progress(1 << 20, Some(4 << 20)),
            "Downloading sccache: 1024 of 4096 KiB (25 %)"
        );
        assert_eq!(progress(1 << 20, None), "Downloading sccache: 1024 KiB");
    }
}
