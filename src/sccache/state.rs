//! What a set-up leaves on disk for the wrapper and for the report: one folder per set-up, under
//! the runner's temporary folder. Others may read it, since a build may run as another user and
//! must still find its wrapper; only the log, which sccache fills, is closed to them. Such a build
//! leaves its notes in a folder in which anybody may write, and nobody what is another's.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use semver::Version;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::action::environment::Environment;
use crate::sccache::times::CompileTimes;

/// Which compiles the cargo cache keeps the outcome of: those of these packages into these folders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptByCargo {
    /// Cargo's home, where the packages' sources are.
    pub home: PathBuf,
    /// The target folders.
    pub targets: Vec<PathBuf>,
    /// The packages, as `name-version` or by their commits.
    pub packages: BTreeSet<String>,
}

impl KeptByCargo {
    /// Whether it keeps what a compile of `source` writes to `output`.
    pub fn keeps(&self, source: &Path, output: &Path) -> bool {
        let Ok(inner) = source.strip_prefix(&self.home) else {
            return false;
        };
        let names: Option<Vec<&str>> = inner.iter().map(|name| name.to_str()).collect();
        let package_is_kept = match names.as_deref() {
            Some(["registry", "src", _, package, ..]) => self.packages.contains(*package),
            // Cargo calls a checkout by the first digits of its commit.
            Some(["git", "checkouts", _, commit, ..]) => {
                let next = self.packages.range((*commit).to_owned()..).next();
                next.is_some_and(|package| package.starts_with(commit))
            }
            _ => false,
        };
        package_is_kept && self.targets.iter().any(|target| output.starts_with(target))
    }
}

/// What a wrapper has to know of the sccache that its set-up is for.
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
}

impl SetUpSccache {
    /// One of which only the path is known.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            version: None,
            port: None,
            relay: None,
        }
    }
}

/// How long a file of notes may grow, in bytes. What comes later is not noted.
const NOTES_LIMIT: u64 = 4 * 1024 * 1024;

/// How long the name of what was compiled may be in its note, in characters; its end tells most.
const SUBJECT_LENGTH: usize = 120;

/// How the name of each set-up's folder begins.
const PREFIX: &str = "sccache-action-";

/// The sccache on `PATH`. Where that is the wrapper of an earlier set-up it is the sccache behind it,
/// and where it is the stand-in of one that failed it is the next on `PATH`.
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
/// sccache-path    the path of the real sccache, its version, the ports of server and relay, a line each;
///                 absent where the set-up failed
/// about           what any step may know of the set-up, for the commands `stats` and `doctor`
/// kept-by-cargo   which compiles the cargo cache keeps the outcome of; absent where it keeps none
/// unknown-layout  the first folder of a layout that the cargo cache does not know; absent where all is known
/// uncached        a line per compile that ran without sccache, with the reason
/// other-users/    for each other user whose steps compiled, a byte per compile
/// given-up        why sccache is not asked any more; absent where it is
/// refused         a line per compile that sccache could not do, with the reason
/// times           a line per compile through sccache: microseconds, tab, crate or source file
/// log/sccache.log what the sccache server writes to its log
/// log/relay.log   what the relay says where it fails
/// relay/          the relay's files; for nobody else to read
/// disk-level/     sccache's disk cache in front of the relay; for nobody else to read
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
    /// Where the folder or the file in it cannot be written.
    pub fn create(parent: &Path, sccache: Option<&Path>) -> io::Result<Self> {
        fs::create_dir_all(parent)?;
        let root = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(parent)?
            .keep();
        let state = Self { root };
        for folder in [&state.root.join("log"), &state.relay(), &state.disk_level()] {
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
    /// Where the file cannot be written.
    pub fn set_sccache(&self, sccache: &SetUpSccache) -> io::Result<()> {
        let mut text = sccache.path.as_os_str().as_encoded_bytes().to_vec();
        let version = sccache.version.as_ref().map(Version::to_string);
        let ports = [sccache.port, sccache.relay].map(|port| port.map(|port| port.to_string()));
        for line in [version].into_iter().chain(ports) {
            text.push(b'\n');
            text.extend_from_slice(line.unwrap_or_default().as_bytes());
        }
        // A compile that sees half of it would not understand it.
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
    pub fn is_disk_level(folder: &Path) -> bool {
        let of = |parent: &Path| Self::at(parent.to_owned());
        folder.parent().map(of).is_some_and(|state| {
            state.is_named_as_ours() && state.disk_level().file_name() == folder.file_name()
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

    /// The real sccache, or `None` where there is none.
    pub fn sccache(&self) -> Option<SetUpSccache> {
        let text = fs::read_to_string(self.sccache_path()).ok()?;
        let mut lines = text.split('\n');
        let path = PathBuf::from(lines.next()?);
        let version = lines.next().and_then(|version| version.parse().ok());
        let mut port = || lines.next().and_then(|port| port.parse().ok());
        Some(SetUpSccache {
            path,
            version,
            port: port(),
            relay: port(),
        })
    }

    /// The relay's folder.
    pub fn relay(&self) -> PathBuf {
        self.root.join("relay")
    }

    /// Where the relay says why it failed.
    pub fn relay_log(&self) -> PathBuf {
        self.root.join("log").join("relay.log")
    }

    /// The folder of sccache's disk cache in front of the relay.
    pub fn disk_level(&self) -> PathBuf {
        self.root.join("disk-level")
    }

    /// Where the sccache server writes its log.
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

    /// Says what any step may know of the set-up.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn set_about(&self, about: &impl Serialize) -> io::Result<()> {
        fs::write(self.about_path(), serde_json::to_vec(about)?)
    }

    /// What any step may know of the set-up; `None` where it says nothing that can be read.
    pub fn about<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_slice(&fs::read(self.about_path()).ok()?).ok()
    }

    fn kept_by_cargo_path(&self) -> PathBuf {
        self.root.join("kept-by-cargo")
    }

    /// Says which compiles the cargo cache keeps the outcome of.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn set_kept_by_cargo(&self, kept: &KeptByCargo) -> io::Result<()> {
        // A compile that sees half of it would not understand it.
        let path = self.kept_by_cargo_path();
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(kept)?)?;
        fs::rename(new, path)
    }

    /// Which compiles the cargo cache keeps the outcome of. `None` where it keeps none.
    pub fn kept_by_cargo(&self) -> Option<KeptByCargo> {
        serde_json::from_slice(&fs::read(self.kept_by_cargo_path()).ok()?).ok()
    }

    fn uncached(&self) -> PathBuf {
        self.root.join("uncached")
    }

    /// Notes that a compile ran without sccache, and why. A note that cannot be written is let go:
    /// the compile matters more.
    pub fn note_uncached(&self, why: &str) {
        append(&self.uncached(), why);
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

    /// The first such folder, where there was one.
    pub fn first_of_unknown_layout(&self) -> Option<String> {
        let text = fs::read(self.unknown_layout()).ok()?;
        Some(String::from_utf8_lossy(&text).into_owned())
    }

    fn given_up(&self) -> PathBuf {
        self.root.join("given-up")
    }

    /// Has later compiles not ask sccache, for this reason. The first reason stays.
    pub fn give_up(&self, why: &str) {
        write_first(&self.given_up(), why.as_bytes());
    }

    /// Whether compiles are not to ask sccache any more.
    pub fn has_given_up(&self) -> bool {
        self.given_up().exists()
    }

    /// Why compiles do not ask sccache any more, where that is so.
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
        // Nothing is read of what others wrote.
        let files = lengths.filter(|metadata| metadata.is_file());
        files.fold(0, |sum, metadata| sum.saturating_add(metadata.len()))
    }

    /// How many compiles ran without sccache.
    pub fn uncached_compiles(&self) -> usize {
        fs::read(self.uncached())
            .map_or(0, |text| text.iter().filter(|byte| **byte == b'\n').count())
    }

    /// Why the first compile that ran without sccache did, or `None` where none did.
    pub fn first_uncached_reason(&self) -> Option<String> {
        let text = fs::read(self.uncached()).ok()?;
        let text = String::from_utf8_lossy(&text);
        text.lines().next().map(str::to_owned)
    }
}

/// Writes a file that is not there yet. A note that cannot be written is let go.
fn write_first(path: &Path, text: &[u8]) {
    let _ = OpenOptions::new()
        .create_new(true)
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(text));
}

/// Puts `line` at the end of the file. A note that cannot be written is let go: the compile matters more.
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
        state.set_sccache(&sccache).unwrap();
        assert_eq!(state.sccache(), Some(sccache));
        assert_eq!(state.uncached_compiles(), 0);
        assert_eq!(state.first_uncached_reason(), None);
        assert_eq!(state.kept_by_cargo(), None);
        let kept = KeptByCargo {
            home: "/home/cargo".into(),
            targets: vec!["/w/target".into()],
            packages: ["a-1.0.0".to_owned()].into(),
        };
        state.set_kept_by_cargo(&kept).unwrap();
        assert_eq!(state.kept_by_cargo(), Some(kept));
        state.note_uncached("one\ntwo");
        state.note_uncached("three");
        assert_eq!(state.uncached_compiles(), 2);
        assert_eq!(state.first_uncached_reason().as_deref(), Some("one two"));
        assert_eq!(state.refusals(), (0, None));
        state.note_refused("no");
        assert_eq!(state.refusals(), (1, Some("no".to_owned())));
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
