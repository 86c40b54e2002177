//! The runner's tool cache: tools that outlive a job, in the layout of `@actions/tool-cache`.
//!
//! ```text
//! sccache/0.16.0/x64/sccache               the binary
//! sccache/0.16.0/x64/sccache-action.json   where it came from, and its sha256
//! sccache/0.16.0/x64.complete              says that the folder is whole
//! sccache/0.16.0/x64.lock                  held while one is installed
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use semver::Version;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::digest::sha256;
use crate::install::Source;
use crate::install::platform::Platform;
use crate::install::version::VersionSpec;
use crate::runner::environment::Environment;

const TOOL: &str = "sccache";
const RECORD: &str = "sccache-action.json";

/// A folder with tools.
#[derive(Clone, Debug)]
pub struct ToolCache {
    root: PathBuf,
    platform: Platform,
}

/// The record beside a binary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The source that it came from.
    pub source: Source,
    /// The sha256 of the release archive that it came in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archive_sha256: Option<String>,
    /// Its own sha256.
    pub binary_sha256: String,
}

/// A tool that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tool {
    /// The binary.
    pub path: PathBuf,
    /// Its version.
    pub version: Version,
    /// Its record.
    pub record: Record,
}

/// Creates a folder that no other user may write to.
///
/// # Errors
/// Fails if there is one that others may write to, or of another user, or a link.
#[cfg(unix)]
fn make_own(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let there = fs::symlink_metadata(folder)?;
    let own = rustix::process::geteuid().as_raw();
    if there.is_dir() && there.uid() == own && there.mode() & 0o022 == 0 {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("other users can write to {}", folder.display()),
        ))
    }
}

/// The same on a system whose folder for temporary files is each user's own.
#[cfg(not(unix))]
fn make_own(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)
}

impl ToolCache {
    /// The first writable folder of `RUNNER_TOOL_CACHE`, `RUNNER_TEMP` and the system's own folder
    /// for temporary files.
    ///
    /// # Errors
    /// Fails if none can be written, with the last one's reason.
    pub fn of(environment: &Environment, platform: Platform) -> io::Result<Self> {
        let named = ["RUNNER_TOOL_CACHE", "RUNNER_TEMP"];
        let folders = named.iter().filter_map(|name| environment.path(name));
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for root in folders {
            let cache = Self { root, platform };
            match cache.staging() {
                Ok(_) => return Ok(cache),
                Err(error) => last = error,
            }
        }
        Self::in_shared(&tempfile::env::temp_dir(), platform).map_err(|error| match last.kind() {
            io::ErrorKind::NotFound => error,
            _ => last,
        })
    }

    /// A tool cache in a folder that others write to as well, under a name that everybody knows: it
    /// must belong to this user alone.
    fn in_shared(temporary: &Path, platform: Platform) -> io::Result<Self> {
        let root = temporary.join("sccache-action-tools");
        make_own(&root)?;
        let cache = Self { root, platform };
        cache.staging()?;
        Ok(cache)
    }

    /// The folder that it is in.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A folder beside the tools, on the same file system, that is deleted when it is dropped.
    ///
    /// # Errors
    /// Fails if the tool cache cannot be written.
    pub fn staging(&self) -> io::Result<TempDir> {
        let folder = self.root.join(TOOL);
        fs::create_dir_all(&folder)?;
        tempfile::Builder::new()
            .prefix(".staging-")
            .tempdir_in(folder)
    }

    fn folder(&self, version: &Version) -> PathBuf {
        self.root
            .join(TOOL)
            .join(version.to_string())
            .join(self.platform.tool_cache_arch())
    }

    fn marker(&self, version: &Version) -> PathBuf {
        self.beside_folder(version, "complete")
    }

    fn lock(&self, version: &Version) -> PathBuf {
        self.beside_folder(version, "lock")
    }

    fn beside_folder(&self, version: &Version, extension: &str) -> PathBuf {
        // Not `with_extension`, which would cut a version at its last dot.
        let arch = self.platform.tool_cache_arch();
        self.folder(version)
            .with_file_name(format!("{arch}.{extension}"))
    }

    /// The tool of this version, if it is there, complete and unchanged. A tool that another action
    /// put there has no record of ours, so it is not used.
    pub fn find(&self, version: &Version) -> Option<Tool> {
        if !self.marker(version).is_file() {
            return None;
        }
        let folder = self.folder(version);
        let record = fs::read(folder.join(RECORD)).ok()?;
        let record: Record = serde_json::from_slice(&record).ok()?;
        let path = folder.join(self.platform.binary());
        if sha256_of(&path).ok()? != record.binary_sha256 {
            return None;
        }
        Some(Tool {
            path,
            version: version.clone(),
            record,
        })
    }

    /// The versions that have a folder, whole or not.
    pub fn versions(&self, spec: &VersionSpec) -> Vec<Version> {
        let Ok(folders) = fs::read_dir(self.root.join(TOOL)) else {
            return Vec::new();
        };
        let mut versions: Vec<Version> = folders
            .filter_map(|folder| folder.ok()?.file_name().to_str()?.parse().ok())
            .filter(|version| spec.matches(version))
            .collect();
        versions.sort();
        versions.reverse();
        versions
    }

    /// Moves `binary`, a file in `staging`, to its place with a record of its origin.
    ///
    /// If another process installs the same at the same time, the second one waits, finds a tool in
    /// place and uses that one, if it is as good.
    ///
    /// # Errors
    /// Fails if the files cannot be written.
    pub fn install(
        &self,
        staging: &TempDir,
        binary: &Path,
        version: &Version,
        source: Source,
        archive_sha256: Option<String>,
    ) -> io::Result<Tool> {
        let record = Record {
            source,
            archive_sha256,
            binary_sha256: sha256_of(binary)?,
        };
        let whole = staging.path().join("whole");
        fs::create_dir(&whole)?;
        fs::rename(binary, whole.join(self.platform.binary()))?;
        fs::write(whole.join(RECORD), serde_json::to_vec_pretty(&record)?)?;
        let folder = self.folder(version);
        if let Some(parent) = folder.parent() {
            fs::create_dir_all(parent)?;
        }
        // The lock ends with the file, even if this process is killed.
        let lock = File::create(self.lock(version))?;
        lock.lock()?;
        if let Some(found) = self.find(version)
            && found.record == record
        {
            return Ok(found);
        }
        // The existing tool is half written, changed, or another action's.
        for remains in [self.marker(version), folder.clone()] {
            match fs::rename(&remains, staging.path().join("replaced")) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            // The new one replaces it; remains go with the staging folder.
            let _ = fs::remove_file(staging.path().join("replaced"));
        }
        fs::rename(&whole, &folder)?;
        File::create(self.marker(version))?;
        Ok(Tool {
            path: folder.join(self.platform.binary()),
            version: version.clone(),
            record,
        })
    }
}

fn sha256_of(path: &Path) -> io::Result<String> {
    Ok(hex::encode(sha256(File::open(path)?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: Version = Version::new(0, 16, 0);

    fn cache(root: &Path) -> ToolCache {
        let environment =
            Environment::from_iter([("RUNNER_TOOL_CACHE", root.display().to_string())]);
        ToolCache::of(&environment, Platform::current()).unwrap()
    }

    fn install(cache: &ToolCache, content: &str) -> Tool {
        let staging = cache.staging().unwrap();
        let binary = staging.path().join("downloaded");
        fs::write(&binary, content).unwrap();
        cache
            .install(&staging, &binary, &VERSION, Source::Release, None)
            .unwrap()
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_that_others_may_write_to_is_no_tool_cache() {
        use std::os::unix::fs::PermissionsExt;
        let shared = tempfile::tempdir().unwrap();
        let platform = Platform::current();
        let tools = shared.path().join("sccache-action-tools");
        // The first call creates the folder so that no other user may write to it; the second call
        // uses it again.
        for _ in 0..2 {
            ToolCache::in_shared(shared.path(), platform).unwrap();
            let mode = fs::metadata(&tools).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0);
        }
        fs::set_permissions(&tools, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(ToolCache::in_shared(shared.path(), platform).is_err());
        let other = tempfile::tempdir().unwrap();
        fs::rename(&tools, other.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(other.path(), &tools).unwrap();
        assert!(ToolCache::in_shared(shared.path(), platform).is_err());
    }

    #[test]
    fn a_tool_is_found_where_the_toolkit_would_look_for_it() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path());
        assert_eq!(cache.find(&VERSION), None);
        let tool = install(&cache, "binary");
        assert_eq!(cache.find(&VERSION), Some(tool.clone()));
        let arch = Platform::current().tool_cache_arch();
        let folder = root.path().join("sccache/0.16.0").join(arch);
        assert_eq!(tool.path.parent(), Some(folder.as_path()));
        let marker = root.path().join(format!("sccache/0.16.0/{arch}.complete"));
        assert!(marker.is_file());
        assert_eq!(cache.versions(&VersionSpec::Latest), [VERSION]);
        let left: Vec<_> = fs::read_dir(root.path().join("sccache")).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn a_tool_that_is_half_there_changed_or_foreign_is_not_taken_and_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path());
        let spoil: [&dyn Fn(&Tool); 4] = [
            &|_| fs::remove_file(cache.marker(&VERSION)).unwrap(),
            &|tool| fs::write(&tool.path, "changed").unwrap(),
            &|tool| fs::remove_file(&tool.path).unwrap(),
            &|tool| fs::remove_file(tool.path.with_file_name(RECORD)).unwrap(),
        ];
        for spoil in spoil {
            spoil(&install(&cache, "binary"));
            assert_eq!(cache.find(&VERSION), None);
            let tool = install(&cache, "binary");
            assert_eq!(fs::read_to_string(&tool.path).unwrap(), "binary");
            assert_eq!(cache.find(&VERSION), Some(tool));
        }
    }

    #[test]
    fn two_that_install_at_once_end_with_one_whole_tool() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path());
        for _ in 0..20 {
            let barrier = std::sync::Barrier::new(4);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        barrier.wait();
                        let tool = install(&cache, "binary");
                        assert_eq!(fs::read_to_string(tool.path).unwrap(), "binary");
                    });
                }
            });
            assert!(cache.find(&VERSION).is_some());
            fs::remove_dir_all(root.path().join("sccache/0.16.0")).unwrap();
        }
    }

    #[test]
    fn where_the_tool_cache_cannot_be_had_the_temporary_folder_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let temporary = folder.path().join("temporary");
        let environment = Environment::from_iter([
            ("RUNNER_TOOL_CACHE", file.display().to_string()),
            ("RUNNER_TEMP", temporary.display().to_string()),
        ]);
        let cache = ToolCache::of(&environment, Platform::current()).unwrap();
        assert_eq!(cache.root, temporary);
    }
}
