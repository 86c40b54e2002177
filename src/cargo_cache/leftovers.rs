//! Removes the leftovers of killed restores: unfinished files and folders under names that only their
//! restore knew, so no later restore replaces them.

use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::cargo_cache::files::STAGING;
use crate::cargo_cache::units::{folders, profiles};

/// How old an unfinished file or folder must be to count as abandoned: many times as long as a restore may
/// take, so another job that runs now keeps its own.
const ABANDONED: Duration = Duration::from_secs(60 * 60);

/// How deep below a registry's folder its index has files: `.cache/ab/cd/NAME`.
const INDEX_DEPTH: usize = 4;

/// Removes unfinished files and folders in cargo's home and in these build directories that are abandoned
/// at the time `now`. Returns how many it removed. If it cannot remove one, that stays for the next
/// restore.
pub fn remove(home: &Path, builds: &[PathBuf], now: SystemTime) -> u64 {
    let mut removed = 0;
    for folder in places(home, builds) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let is_half_made = name.as_encoded_bytes().starts_with(STAGING.as_bytes());
            // This does not follow links.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if !is_half_made || !is_abandoned(&metadata, now) {
                continue;
            }
            let gone = if metadata.is_dir() {
                fs::remove_dir_all(entry.path())
            } else {
                fs::remove_file(entry.path())
            };
            removed += u64::from(gone.is_ok());
        }
    }
    removed
}

/// The folders in which restores rename files and folders of parts.
fn places(home: &Path, builds: &[PathBuf]) -> Vec<PathBuf> {
    let [registry, git] = ["registry", "git"].map(|name| home.join(name));
    let mut places = vec![git.join("db")];
    for (folder, depth) in [
        (registry.join("cache"), 1),
        (registry.join("src"), 1),
        (registry.join("index"), INDEX_DEPTH),
        (git.join("checkouts"), 1),
    ] {
        add_below(&folder, depth, &mut places);
    }
    for profile in builds.iter().flat_map(|build| profiles(build)).flatten() {
        places.push(profile.join(".fingerprint"));
        add_below(&profile.join("build"), 1, &mut places);
    }
    places
}

/// Adds the folders below `folder`, so many levels deep, but not those that a link leads to.
fn add_below(folder: &Path, depth: usize, places: &mut Vec<PathBuf>) {
    for inner in folders(folder).unwrap_or_default() {
        let name = inner.file_name().unwrap_or_default();
        if name.as_encoded_bytes().starts_with(STAGING.as_bytes()) {
            continue;
        }
        if depth > 1 {
            add_below(&inner, depth - 1, places);
        }
        places.push(inner);
    }
}

fn is_abandoned(metadata: &Metadata, now: SystemTime) -> bool {
    let age = changed(metadata).and_then(|changed| now.duration_since(changed).ok());
    age.is_some_and(|age| age > ABANDONED)
}

/// When any call last changed it (`ctime`). Its modification time does not tell: a restore sets that to the
/// stored file's before it renames the file.
#[cfg(unix)]
fn changed(metadata: &Metadata) -> Option<SystemTime> {
    use std::os::unix::fs::MetadataExt;
    let seconds = u64::try_from(metadata.ctime()).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// When it was created: a restore may set every other time of the system.
#[cfg(not(unix))]
fn changed(metadata: &Metadata) -> Option<SystemTime> {
    metadata.created().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cargo_cache::files::staged;

    #[test]
    fn what_a_killed_restore_left_is_removed_once_it_is_old_and_nothing_else() {
        let job = tempfile::tempdir().unwrap();
        let build = job.path().join("target");
        let home = job.path().join("home");
        let half_made = |name: &str| staged(name).unwrap();
        let places = [
            ("home/registry/cache/r", "a-1.0.0.crate"),
            ("home/registry/index/r", "config.json"),
            ("home/registry/index/r/.cache/1", "a"),
            ("home/registry/index/r/.cache/ab/cd", "abcd"),
            ("home/registry/src/r", "a-1.0.0"),
            ("home/git/db", "r-1"),
            ("home/git/checkouts/r-1", "0123456"),
            ("target/debug/.fingerprint", "a-0123456789abcdef"),
            ("target/x/release/.fingerprint", "a-0123456789abcdef"),
            ("target/debug/build/a", "0123456789abcdef"),
        ];
        let mut left = Vec::new();
        let mut kept = Vec::new();
        for (folder, name) in places {
            let folder = job.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            let file = folder.join(half_made(name));
            fs::write(&file, "half").unwrap();
            // A restore sets this time just before it renames the file. Wine knows no time of creation but this.
            #[cfg(unix)]
            filetime::set_file_mtime(&file, SystemTime::UNIX_EPOCH.into()).unwrap();
            let inner = folder.join(half_made(name)).join("deep");
            fs::create_dir_all(&inner).unwrap();
            fs::write(inner.join(half_made("x")), "half").unwrap();
            left.extend([file, inner.parent().unwrap().to_owned()]);
            // Cargo's own files, and similar names.
            for own in [name, ".cargo-lock", "sccache-action-x"] {
                fs::write(folder.join(own), "own").unwrap();
                kept.push(folder.join(own));
            }
        }
        #[cfg(unix)]
        {
            let elsewhere = job.path().join("elsewhere");
            fs::create_dir(&elsewhere).unwrap();
            kept.push(elsewhere.join(half_made("x")));
            fs::write(kept.last().unwrap(), "another's").unwrap();
            let link = home.join("registry/src/linked");
            std::os::unix::fs::symlink(&elsewhere, link).unwrap();
            let link = home.join("registry/src/r").join(half_made("link"));
            std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
            left.push(link);
        }
        let there = |path: &PathBuf| path.symlink_metadata().is_ok();
        let now = SystemTime::now();
        let builds = [build];
        // Another job may be writing it.
        for soon in [now, now + ABANDONED / 2] {
            assert_eq!(remove(&home, &builds, soon), 0);
        }
        assert!(left.iter().all(there));
        let later = now + ABANDONED * 2;
        assert_eq!(remove(&home, &builds, later), left.len() as u64);
        assert!(!left.iter().any(there));
        assert!(kept.iter().all(there));
        assert_eq!(remove(&home, &builds, later), 0);
        assert_eq!(remove(&job.path().join("none"), &[], later), 0);
    }
}
