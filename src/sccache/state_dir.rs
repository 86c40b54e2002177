//! The state folder of a set-up, on disk for the wrapper and for the report: one folder per set-up, under
//! the runner's temporary folder. Others may read it, since a build may run as another user and must still
//! find its wrapper; only the log, which sccache fills, is closed to them. Such a build leaves its notes in
//! a folder in which anyone may write their own files only.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use semver::Version;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::cargo_cache::lockfile::Lockfile;
use crate::cargo_cache::places::Places;
use crate::runner::environment::Environment;
use crate::sccache::times::CompileTimes;

/// The filter of compiles whose units the cargo cache keeps: those of these packages, into build
/// directories that other jobs can find.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CargoCacheFilter {
    /// The places of cargo's folders.
    pub places: Places,
    /// The packages, as `name-version` or by their commits.
    pub packages: BTreeSet<String>,
    /// Lockfiles that did not exist when this was written.
    pub awaited: Vec<PathBuf>,
}

impl CargoCacheFilter {
    /// The package in cargo's home that `source` is of, as `name-version` or by the first digits of its
    /// commit.
    pub fn package_of<'a>(&self, source: &'a Path) -> Option<&'a str> {
        let inner = source.strip_prefix(&self.places.home).ok()?;
        let names: Option<Vec<&str>> = inner.iter().map(|name| name.to_str()).collect();
        match names?.as_slice() {
            ["registry", "src", _, package, ..] => Some(package),
            // Cargo calls a checkout by the first digits of its commit.
            ["git", "checkouts", _, commit, ..] => Some(commit),
            _ => None,
        }
    }

    /// Whether the cargo cache covers this package.
    pub fn covers(&self, package: &str) -> bool {
        let is_commit = package.bytes().all(|byte| byte.is_ascii_hexdigit());
        let next = self.packages.range(package.to_owned()..).next();
        next.is_some_and(|next| next == package || (is_commit && next.starts_with(package)))
    }

    /// Adds the packages of awaited lockfiles that exist by now: cargo writes one before it compiles.
    /// Returns whether there were any.
    pub fn read_awaited(&mut self) -> bool {
        let before = self.awaited.len();
        let packages = &mut self.packages;
        self.awaited.retain(|path| {
            let lockfile = fs::read_to_string(path)
                .ok()
                .and_then(|text| Lockfile::parse(&text).ok());
            lockfile
                .map(|read| packages.extend(read.cacheable()))
                .is_none()
        });
        self.awaited.len() < before
    }
}

/// The data that a wrapper needs about its set-up's sccache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetUpSccache {
    /// The real sccache.
    pub path: PathBuf,
    /// Its version.
    pub version: Option<Version>,
    /// The port of its server on 127.0.0.1.
    pub port: Option<u16>,
    /// The port of the relay on 127.0.0.1.
    pub relay: Option<u16>,
    /// Whether its storage, or the first tier of it, is a disk.
    pub on_disk: bool,
}

impl SetUpSccache {
    /// An sccache of which only the path is known.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            version: None,
            port: None,
            relay: None,
            on_disk: false,
        }
    }
}

/// The word for [`SetUpSccache::on_disk`].
const ON_DISK: &str = "disk";

/// How long a file of notes may grow, in bytes. Later notes are dropped.
const NOTES_LIMIT: u64 = 4 * 1024 * 1024;

/// How long the name of what was compiled may be in its note, in characters; its end tells most.
const SUBJECT_LENGTH: usize = 120;

/// The prefix of the name of each set-up's folder.
const PREFIX: &str = "sccache-action-";

/// The sccache on `PATH`. If that is the wrapper of an earlier set-up, this is the sccache behind it; if it
/// is the passthrough of a failed set-up, this is the next one on `PATH`.
pub fn sccache_on_path(environment: &Environment) -> Option<PathBuf> {
    environment
        .find_programs("sccache")
        .find_map(|found| match StateDir::of_wrapper(&found) {
            Some(state) if state.is_named_as_ours() => state.sccache().map(|sccache| sccache.path),
            _ => Some(found),
        })
}

/// One set-up's folder.
///
/// ```text
/// bin/sccache     the wrapper; beside it the action's binary under its own name
/// sccache-path    the path of the real sccache, its version, the ports of server and relay, `disk` if its
///                 storage is one, a line each; absent if the set-up failed
/// about           the facts of the set-up that any step may read, for the commands `stats` and `doctor`
/// cargo-filter    the compiles whose units the cargo cache keeps; absent if it keeps none
/// profiles        a line per compile of a dependency in a build directory that the set-up did not know: the
///                 folder of the profile
/// dependencies    a line per compile of a dependency without sccache: the package
/// unknown-layout  the first folder of a layout that the cargo cache does not know; absent if all are known
/// uncached        a line per compile that ran without sccache, with the reason
/// other-users/    for each other user whose steps compiled, a byte per compile
/// given-up        why compiles no longer use sccache; absent while they do
/// refused         a line per compile that sccache could not do, with the reason
/// failed          an empty line per compile through sccache that failed
/// times           a line per compile through sccache: microseconds, tab, crate or source file
/// log/sccache.log the sccache server's log
/// log/relay.log   the relay's errors
/// relay/          the relay's files; for nobody else to read
/// disk-tier/      sccache's disk cache in front of the relay; for nobody else to read
/// probe/          the probe compile's source and output
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir {
    root: PathBuf,
}

impl StateDir {
    /// Makes a new folder under `parent`, for the `sccache` of this path or for none.
    ///
    /// # Errors
    /// [`io::Error`] if the folder or the file in it cannot be written.
    pub fn create(parent: &Path, sccache: Option<&Path>) -> io::Result<Self> {
        fs::create_dir_all(parent)?;
        let root = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(parent)?
            .keep();
        let state = Self { root };
        for folder in [&state.root.join("log"), &state.relay(), &state.disk_tier()] {
            fs::create_dir(folder)?;
            set_mode(folder, 0o700)?;
        }
        fs::create_dir(state.other_users())?;
        set_mode(&state.other_users(), 0o1777)?;
        set_mode(&state.root, 0o755)?;
        if let Some(sccache) = sccache {
            state.set_sccache(&SetUpSccache::at(sccache))?;
        }
        Ok(state)
    }

    /// Says which `sccache` the set-up is for.
    ///
    /// # Errors
    /// [`io::Error`] if the file cannot be written.
    pub fn set_sccache(&self, sccache: &SetUpSccache) -> io::Result<()> {
        let mut text = sccache.path.as_os_str().as_encoded_bytes().to_vec();
        let version = sccache.version.as_ref().map(Version::to_string);
        let ports = [sccache.port, sccache.relay].map(|port| port.map(|port| port.to_string()));
        let disk = [sccache.on_disk.then(|| ON_DISK.to_owned())];
        for line in [version].into_iter().chain(ports).chain(disk) {
            text.push(b'\n');
            text.extend_from_slice(line.unwrap_or_default().as_bytes());
        }
        // A compile could not parse half of it.
        let new = self.sccache_path().with_extension("new");
        fs::write(&new, text)?;
        fs::rename(new, self.sccache_path())
    }

    /// The folder that an earlier [`StateDir::create`] made.
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The folder that holds `wrapper`, the path of a file `bin/sccache`.
    pub fn of_wrapper(wrapper: &Path) -> Option<Self> {
        let root = wrapper.parent()?.parent()?.to_owned();
        Some(Self { root })
    }

    /// Whether `folder` is the disk cache in front of the relay, of this set-up or of another one of
    /// the same job.
    pub fn is_disk_tier(folder: &Path) -> bool {
        let of = |parent: &Path| Self::at(parent.to_owned());
        folder.parent().map(of).is_some_and(|state| {
            state.is_named_as_ours() && state.disk_tier().file_name() == folder.file_name()
        })
    }

    fn is_named_as_ours(&self) -> bool {
        let name = self.root.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(PREFIX))
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The path of the wrapper.
    pub fn wrapper(&self) -> PathBuf {
        self.root
            .join("bin")
            .join(format!("sccache{}", std::env::consts::EXE_SUFFIX))
    }

    fn sccache_path(&self) -> PathBuf {
        self.root.join("sccache-path")
    }

    /// The real sccache, or `None` if there is none.
    pub fn sccache(&self) -> Option<SetUpSccache> {
        let text = fs::read_to_string(self.sccache_path()).ok()?;
        let mut lines = text.split('\n');
        let path = PathBuf::from(lines.next()?);
        let version = lines.next().and_then(|version| version.parse().ok());
        let mut port = || lines.next().and_then(|port| port.parse().ok());
        let (port, relay) = (port(), port());
        Some(SetUpSccache {
            path,
            version,
            port,
            relay,
            on_disk: lines.next() == Some(ON_DISK),
        })
    }

    /// The relay's folder.
    pub fn relay(&self) -> PathBuf {
        self.root.join("relay")
    }

    /// The file for the relay's errors.
    pub fn relay_log(&self) -> PathBuf {
        self.root.join("log").join("relay.log")
    }

    /// The folder of sccache's disk cache in front of the relay.
    pub fn disk_tier(&self) -> PathBuf {
        self.root.join("disk-tier")
    }

    /// The log of the sccache server.
    pub fn server_log(&self) -> PathBuf {
        self.root.join("log").join("sccache.log")
    }

    /// The folder of the probe compile.
    pub fn probe(&self) -> PathBuf {
        self.root.join("probe")
    }

    fn about_path(&self) -> PathBuf {
        self.root.join("about")
    }

    /// Writes the facts of the set-up that any step may read.
    ///
    /// # Errors
    /// [`io::Error`] if the file cannot be written.
    pub fn set_about(&self, about: &impl Serialize) -> io::Result<()> {
        fs::write(self.about_path(), serde_json::to_vec(about)?)
    }

    /// The facts of the set-up that any step may read; `None` if the file is missing or unreadable.
    pub fn about<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_slice(&fs::read(self.about_path()).ok()?).ok()
    }

    fn cargo_cache_filter_path(&self) -> PathBuf {
        self.root.join("cargo-filter")
    }

    /// Writes the filter of compiles whose units the cargo cache keeps.
    ///
    /// # Errors
    /// [`io::Error`] if the file cannot be written.
    pub fn set_cargo_cache_filter(&self, kept: &CargoCacheFilter) -> io::Result<()> {
        // A compile could not parse half of it, and several compiles may write it.
        let path = self.cargo_cache_filter_path();
        let mut new = tempfile::NamedTempFile::new_in(&self.root)?;
        new.write_all(&serde_json::to_vec(kept)?)?;
        set_mode(new.path(), 0o644)?;
        new.persist(path)?;
        Ok(())
    }

    /// The filter of compiles whose units the cargo cache keeps. `None` if it keeps none.
    pub fn cargo_cache_filter(&self) -> Option<CargoCacheFilter> {
        serde_json::from_slice(&fs::read(self.cargo_cache_filter_path()).ok()?).ok()
    }

    fn uncached(&self) -> PathBuf {
        self.root.join("uncached")
    }

    /// Notes that a compile ran without sccache, and why. A note that cannot be written is dropped: the
    /// compile matters more.
    pub fn note_uncached(&self, why: &str) {
        append(&self.uncached(), why);
    }

    fn failed(&self) -> PathBuf {
        self.root.join("failed")
    }

    /// Notes that a compile through sccache failed, whether by the compiler's or by sccache's fault.
    pub fn note_failed(&self) {
        append(&self.failed(), "");
    }

    /// How many compiles through sccache ended in failure.
    pub fn failed_compiles(&self) -> u64 {
        // Each is a line without a word.
        fs::metadata(self.failed()).map_or(0, |metadata| metadata.len())
    }

    fn refused(&self) -> PathBuf {
        self.root.join("refused")
    }

    /// Notes that sccache's server could not do a compile, and why.
    pub fn note_refused(&self, why: &str) {
        append(&self.refused(), why);
    }

    /// How many compiles sccache's server could not do, and why it could not do the first.
    pub fn refusals(&self) -> (u64, Option<String>) {
        let text = fs::read(self.refused()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        (
            text.lines().count() as u64,
            text.lines().next().map(str::to_owned),
        )
    }

    fn profiles(&self) -> PathBuf {
        self.root.join("profiles")
    }

    /// Notes that a dependency was compiled into this profile's folder, of a build directory that the set-up
    /// did not know.
    pub fn note_profile(&self, profile: &Path) {
        if let Some(profile) = profile.to_str() {
            append(&self.profiles(), profile);
        }
    }

    /// These folders, in the order of their paths.
    pub fn noted_profiles(&self) -> BTreeSet<PathBuf> {
        lines(&self.profiles()).iter().map(PathBuf::from).collect()
    }

    fn dependencies(&self) -> PathBuf {
        self.root.join("dependencies")
    }

    /// Notes that a dependency was compiled without sccache, since the cargo cache keeps it.
    pub fn note_compiled_dependency(&self, package: &str) {
        append(&self.dependencies(), package);
    }

    /// These packages, once for each compile.
    pub fn compiled_dependencies(&self) -> Vec<String> {
        lines(&self.dependencies())
    }

    fn unknown_layout(&self) -> PathBuf {
        self.root.join("unknown-layout")
    }

    /// Notes that cargo compiled a dependency into `output`, a folder of a layout that the cargo cache
    /// does not know. The first stays.
    pub fn note_unknown_layout(&self, output: &Path) {
        write_first(
            &self.unknown_layout(),
            output.as_os_str().as_encoded_bytes(),
        );
    }

    /// The first such folder, if there was one.
    pub fn first_of_unknown_layout(&self) -> Option<String> {
        let text = fs::read(self.unknown_layout()).ok()?;
        Some(String::from_utf8_lossy(&text).into_owned())
    }

    fn given_up(&self) -> PathBuf {
        self.root.join("given-up")
    }

    /// Makes later compiles run without sccache, for this reason. The first reason stays.
    pub fn give_up(&self, why: &str) {
        write_first(&self.given_up(), why.as_bytes());
    }

    /// Whether compiles run without sccache from now on.
    pub fn has_given_up(&self) -> bool {
        self.given_up().exists()
    }

    /// Why compiles run without sccache from now on, if they do.
    pub fn why_given_up(&self) -> Option<String> {
        let text = fs::read(self.given_up()).ok()?;
        Some(String::from_utf8_lossy(&text).into_owned())
    }

    fn times(&self) -> PathBuf {
        self.root.join("times")
    }

    /// Notes how long a compile took.
    pub fn note_time(&self, time: Duration, subject: &str) {
        let skipped = subject.chars().count().saturating_sub(SUBJECT_LENGTH);
        let subject: String = subject.chars().skip(skipped).collect();
        append(&self.times(), &format!("{}\t{subject}", time.as_micros()));
    }

    /// How long compiles took.
    pub fn compile_times(&self) -> CompileTimes {
        let text = fs::read(self.times()).unwrap_or_default();
        CompileTimes::read(&String::from_utf8_lossy(&text))
    }

    fn other_users(&self) -> PathBuf {
        self.root.join("other-users")
    }

    /// Whether this process runs as another user than the set-up did. That user's files are not the
    /// server's to read and write, nor the server's that user's.
    #[cfg(unix)]
    pub fn is_of_another_user(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let own = rustix::process::geteuid().as_raw();
        fs::metadata(&self.root).is_ok_and(|metadata| metadata.uid() != own)
    }

    /// On other systems there is no such user.
    #[cfg(not(unix))]
    pub fn is_of_another_user(&self) -> bool {
        false
    }

    /// Notes that a compile ran without sccache because its step is another user's.
    #[cfg(unix)]
    pub fn note_compile_of_another_user(&self) {
        let name = rustix::process::geteuid().as_raw().to_string();
        let _ = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.other_users().join(name))
            .and_then(|mut file| file.write_all(b"\n"));
    }

    /// On other systems there is no such user.
    #[cfg(not(unix))]
    pub fn note_compile_of_another_user(&self) {}

    /// How many compiles ran without sccache because their steps are another user's.
    pub fn compiles_of_other_users(&self) -> u64 {
        let Ok(entries) = fs::read_dir(self.other_users()) else {
            return 0;
        };
        let lengths = entries.flatten().filter_map(|entry| entry.metadata().ok());
        // Only the length of other users' files is used, not their content.
        let files = lengths.filter(|metadata| metadata.is_file());
        files.fold(0, |sum, metadata| sum.saturating_add(metadata.len()))
    }

    /// How many compiles ran without sccache.
    pub fn uncached_compiles(&self) -> usize {
        fs::read(self.uncached())
            .map_or(0, |text| text.iter().filter(|byte| **byte == b'\n').count())
    }

    /// The reason of the first compile that ran without sccache, or `None` if there was none.
    pub fn first_uncached_reason(&self) -> Option<String> {
        let text = fs::read(self.uncached()).ok()?;
        let text = String::from_utf8_lossy(&text);
        text.lines().next().map(str::to_owned)
    }
}

/// Writes a file unless it exists. A note that cannot be written is dropped.
fn write_first(path: &Path, text: &[u8]) {
    let _ = OpenOptions::new()
        .create_new(true)
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(text));
}

/// Puts `line` at the end of the file. A note that cannot be written is dropped: the compile matters more.
fn append(path: &Path, line: &str) {
    let line = format!("{}\n", line.replace(['\n', '\r'], " "));
    let mut options = OpenOptions::new();
    let Ok(mut file) = options.create(true).append(true).open(path) else {
        return;
    };
    if file
        .metadata()
        .is_ok_and(|metadata| metadata.len() < NOTES_LIMIT)
    {
        // One write to a file opened for appending: concurrent compiles do not mix their lines.
        let _ = file.write_all(line.as_bytes());
    }
}

fn lines(path: &Path) -> Vec<String> {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().map(str::to_owned).collect()
}

#[cfg(unix)]
fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

#[cfg(not(unix))]
fn set_mode(_path: &Path, _mode: u32) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_folder_remembers_sccache_and_what_ran_uncached() {
        let parent = tempfile::tempdir().unwrap();
        let state = StateDir::create(parent.path(), Some(Path::new("/x/sccache"))).unwrap();
        let mut sccache = SetUpSccache::at(Path::new("/x/sccache"));
        assert_eq!(state.sccache(), Some(sccache.clone()));
        sccache.version = Some(Version::new(0, 16, 0));
        sccache.relay = Some(7);
        sccache.on_disk = true;
        state.set_sccache(&sccache).unwrap();
        assert_eq!(state.sccache(), Some(sccache));
        assert_eq!(state.uncached_compiles(), 0);
        assert_eq!(state.first_uncached_reason(), None);
        assert_eq!(state.cargo_cache_filter(), None);
        let kept = CargoCacheFilter {
            places: Places::default(),
            packages: ["a-1.0.0".to_owned()].into(),
            awaited: Vec::new(),
        };
        state.set_cargo_cache_filter(&kept).unwrap();
        assert_eq!(state.cargo_cache_filter(), Some(kept));
        state.note_uncached("one\ntwo");
        state.note_uncached("three");
        assert_eq!(state.uncached_compiles(), 2);
        assert_eq!(state.first_uncached_reason().as_deref(), Some("one two"));
        assert_eq!(state.refusals(), (0, None));
        state.note_refused("no");
        assert_eq!(state.refusals(), (1, Some("no".to_owned())));
        assert_eq!(state.failed_compiles(), 0);
        state.note_failed();
        state.note_failed();
        assert_eq!(state.failed_compiles(), 2);
        assert!(!state.has_given_up());
        state.give_up("first");
        state.give_up("second");
        assert!(state.has_given_up());
        assert_eq!(state.why_given_up().as_deref(), Some("first"));
        let found = StateDir::of_wrapper(&state.wrapper()).unwrap();
        assert_eq!(found, state);
    }

    #[test]
    fn a_file_of_notes_does_not_grow_without_end() {
        let parent = tempfile::tempdir().unwrap();
        let state = StateDir::create(parent.path(), None).unwrap();
        state.note_time(Duration::from_millis(3), &"é".repeat(500));
        let line = fs::read_to_string(state.times()).unwrap();
        assert_eq!(line, format!("3000\t{}\n", "é".repeat(SUBJECT_LENGTH)));
        let full = usize::try_from(NOTES_LIMIT).unwrap();
        fs::write(state.times(), vec![b'\n'; full]).unwrap();
        state.note_time(Duration::from_millis(3), "a.c");
        assert_eq!(fs::metadata(state.times()).unwrap().len(), NOTES_LIMIT);
    }

    #[cfg(unix)]
    #[test]
    fn other_users_reach_the_wrapper_and_not_the_log() {
        use std::os::unix::fs::PermissionsExt;
        let parent = tempfile::tempdir().unwrap();
        let state = StateDir::create(parent.path(), Some(Path::new("/x/sccache"))).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(state.root()), 0o755);
        assert_eq!(mode(state.server_log().parent().unwrap()), 0o700);
    }
}
