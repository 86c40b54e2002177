//! Finding in cargo's home what a lockfile asks for, and unpacking crates there.
//!
//! Cargo's layout:
//!
//! ```text
//! registry/cache/REGISTRY/NAME-VERSION.crate   an archive as it was downloaded
//! registry/src/REGISTRY/NAME-VERSION/          what it was unpacked to, with a file .cargo-ok
//! registry/index/REGISTRY/.cache/…/NAME        what a sparse registry says of a name
//! git/db/REPOSITORY/                           a repository
//! git/checkouts/REPOSITORY/COMMIT/             a commit of it, with a file .cargo-ok
//! ```
//!
//! Only these are looked at: there are credentials in cargo's home as well.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flate2::read::GzDecoder;
use sha2::{Digest, Sha256};

use crate::cargo::files::{self, PutError};
use crate::cargo::lockfile::Lockfile;
use crate::cargo::manifest::{Entry, Package, Part, Root, What};

/// How many parts the index files of a registry make up: a file that changes takes with it those
/// that share its part, and a part for each name would be hundreds.
const INDEX_PARTS: u8 = 16;

/// The largest crate, in bytes, unpacked: ten times what the largest known one has.
const CRATE_LIMIT: u64 = 4 << 30;

/// What cargo writes in a crate's folder when all of it is there (`unpack_package` of its
/// `sources/registry/mod.rs`).
const CARGO_OK: &str = "{\"v\":1}";

/// Something of cargo's home, on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where its paths begin.
    pub root: Root,
    /// What tells it from the others of its root.
    pub name: String,
    /// The folder that appears last, if it has one.
    pub guard: Option<String>,
    /// What it is of.
    pub package: Package,
    /// All its files.
    pub entries: Vec<Entry>,
}

/// What is in cargo's home of what a lockfile asks for.
///
/// # Errors
/// Where the disk cannot be read.
pub fn find(home: &Path, lockfile: &Lockfile) -> io::Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let registry = home.join("registry");
    for folder in folders(&registry.join("cache"))? {
        find_archives(&registry, &folder, lockfile, &mut pieces)?;
    }
    for folder in folders(&registry.join("index"))? {
        find_index(&registry, &folder, lockfile, &mut pieces)?;
    }
    let git = home.join("git");
    for repository in folders(&git.join("checkouts"))? {
        find_checkouts(&git, &repository, lockfile, &mut pieces)?;
    }
    Ok(pieces)
}

fn find_archives(
    registry: &Path,
    folder: &Path,
    lockfile: &Lockfile,
    pieces: &mut Vec<Piece>,
) -> io::Result<()> {
    for path in sorted(folder)? {
        let package = name(&path).strip_suffix(".crate");
        let Some(package) = package.filter(|package| lockfile.has_crate(package)) else {
            continue;
        };
        let package = Package::Crate(package.to_owned());
        add(Root::Registry, registry, &[path], None, package, pieces)?;
    }
    Ok(())
}

fn find_index(
    registry: &Path,
    folder: &Path,
    lockfile: &Lockfile,
    pieces: &mut Vec<Piece>,
) -> io::Result<()> {
    // A registry that is a git repository has it elsewhere, and its files are of use only with that.
    let config = folder.join("config.json");
    if !config.is_file() {
        return Ok(());
    }
    let mut groups: BTreeMap<u8, Vec<PathBuf>> = BTreeMap::new();
    let mut left = vec![folder.join(".cache")];
    while let Some(folder) = left.pop() {
        for path in sorted(&folder)? {
            if path.is_dir() {
                left.push(path);
            } else if lockfile.has_name(name(&path)) {
                let digest = blake3::hash(name(&path).as_bytes());
                let [first, ..] = digest.as_bytes();
                groups.entry(first % INDEX_PARTS).or_default().push(path);
            }
        }
    }
    if groups.is_empty() {
        return Ok(());
    }
    for (_, mut paths) in groups {
        paths.sort_unstable();
        add(
            Root::Registry,
            registry,
            &paths,
            None,
            Package::Several,
            pieces,
        )?;
    }
    add(
        Root::Registry,
        registry,
        &[config],
        None,
        Package::Several,
        pieces,
    )
}

fn find_checkouts(
    git: &Path,
    repository: &Path,
    lockfile: &Lockfile,
    pieces: &mut Vec<Piece>,
) -> io::Result<()> {
    let mut commits = folders(repository)?;
    commits
        .retain(|commit| lockfile.has_commit(name(commit)) && commit.join(".cargo-ok").is_file());
    for commit in &commits {
        let package = Package::Commit(name(commit).to_owned());
        let paths = [commit.clone()];
        add(
            Root::Git,
            git,
            &paths,
            Some(commit),
            package.clone(),
            pieces,
        )?;
    }
    let database = git.join("db").join(name(repository));
    if !commits.is_empty() && database.is_dir() {
        let paths = [database.clone()];
        add(
            Root::Git,
            git,
            &paths,
            Some(&database),
            Package::Several,
            pieces,
        )?;
    }
    Ok(())
}

/// Adds what is at these paths as a piece. What cannot be one is left out.
fn add(
    root: Root,
    folder: &Path,
    paths: &[PathBuf],
    guard: Option<&Path>,
    package: Package,
    pieces: &mut Vec<Piece>,
) -> io::Result<()> {
    let guard = guard.and_then(|guard| guard.strip_prefix(folder).ok()?.to_str());
    if let Some(entries) = files::entries(folder, paths)?
        && let Some(first) = entries.first()
    {
        pieces.push(Piece {
            root,
            name: first.path.clone(),
            guard: guard.map(|guard| guard.replace('\\', "/")),
            package,
            entries,
        });
    }
    Ok(())
}

/// What is in a folder, sorted; nothing where there is no such folder.
fn sorted(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = match fs::read_dir(folder) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.path()))
            .collect::<io::Result<_>>()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    paths.sort_unstable();
    Ok(paths)
}

fn folders(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut folders = sorted(folder)?;
    folders.retain(|path| path.is_dir());
    Ok(folders)
}

fn name(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
}

/// Whether all paths of a part are such as this cache stores below `registry`: archives, which are
/// checked against the lockfile, and index files. Sources are unpacked from archives only.
pub fn is_of_registry(part: &Part) -> bool {
    let allowed = |path: &str| match &part.package {
        Package::Crate(package) => archive(path).is_some_and(|(name, _)| name == package),
        Package::Several => {
            let mut names = path.splitn(3, '/');
            let index = names.next() == Some("index") && names.next().is_some();
            let rest = names.next().unwrap_or_default();
            index && (rest == "config.json" || rest.starts_with(".cache/"))
        }
        Package::Commit(_) => false,
    };
    let is_file = |entry: &Entry| matches!(entry.what, What::File { .. });
    part.guard.is_none()
        && part
            .entries
            .iter()
            .all(|entry| is_file(entry) && allowed(&entry.path))
}

/// The package of the archive at this path below `registry`, as `name-version`, and the folder that
/// cargo unpacks it to.
pub fn archive(path: &str) -> Option<(&str, PathBuf)> {
    let mut names = path.split('/');
    let (cache, registry, archive) = (names.next()?, names.next()?, names.next()?);
    let package = archive.strip_suffix(".crate")?;
    (cache == "cache" && names.next().is_none())
        .then(|| (package, Path::new("src").join(registry).join(package)))
}

/// The sha256 digest of an archive.
///
/// # Errors
/// Where it cannot be read.
pub fn sha256(archive: impl Read) -> io::Result<[u8; 32]> {
    struct Hashing(Sha256);
    impl io::Write for Hashing {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut archive = archive;
    let mut hashing = Hashing(Sha256::new());
    io::copy(&mut archive, &mut hashing)?;
    Ok(hashing.0.finalize().into())
}

/// Unpacks the archive at `path` below `registry` as cargo would, unless that was done: cargo does
/// it one crate after the other.
///
/// The times of folders are those of the newest file in them. An archive has none of its own, and a
/// build script that names a folder would be run again where the folder is younger than what the
/// script gave.
///
/// # Errors
/// Where the archive has paths outside of its folder, or the disk does not take it. Nothing is there
/// then.
pub fn unpack(registry: &Path, path: &str) -> Result<(), PutError> {
    let outside = || PutError::Outside(path.to_owned());
    let (package, folder) = archive(path).ok_or_else(outside)?;
    let folder = registry.join(folder);
    if folder.symlink_metadata().is_ok() {
        return Ok(());
    }
    let parent = folder.parent().ok_or_else(outside)?;
    fs::create_dir_all(parent)?;
    let staging = tempfile::Builder::new()
        .prefix(".sccache-action-")
        .tempdir_in(parent)?;
    unpack_in(File::open(registry.join(path))?, package, staging.path())?;
    fs::rename(staging.path().join(package), &folder)?;
    Ok(())
}

fn unpack_in(archive: File, package: &str, folder: &Path) -> Result<(), PutError> {
    let content = GzDecoder::new(io::BufReader::new(archive)).take(CRATE_LIMIT);
    let mut archive = tar::Archive::new(content);
    let mut folders: BTreeMap<PathBuf, SystemTime> = BTreeMap::new();
    let unpacked = folder.join(package);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let inner = path.strip_prefix(package);
        let inner = inner.map_err(|_| PutError::Outside(path.display().to_string()))?;
        // Cargo's own mark.
        if inner == Path::new(".cargo-ok") {
            continue;
        }
        if !entry.unpack_in(folder)? {
            return Err(PutError::Outside(path.display().to_string()));
        }
        let time = entry.header().mtime().unwrap_or_default();
        let time = UNIX_EPOCH.checked_add(Duration::from_secs(time));
        let time = time.unwrap_or(UNIX_EPOCH);
        for folder in inner.ancestors().skip(1) {
            let newest = folders.entry(unpacked.join(folder)).or_insert(time);
            *newest = time.max(*newest);
        }
    }
    let mark = unpacked.join(".cargo-ok");
    fs::write(&mark, CARGO_OK)?;
    for (folder, time) in folders {
        files::set_folder_time(&folder, time);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cargo::lockfile::tests::asking_for;

    /// An archive with these members, changed at these seconds since 1970.
    fn archive_with(members: &[(&str, u64)]) -> Vec<u8> {
        let encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut builder = tar::Builder::new(encoder);
        for (path, time) in members {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(4);
            header.set_mtime(*time);
            let name = &mut header.as_gnu_mut().unwrap().name;
            name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, &b"text"[..]).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    }

    fn with_archive(members: &[(&str, u64)]) -> tempfile::TempDir {
        let registry = tempfile::tempdir().unwrap();
        fs::create_dir_all(registry.path().join("cache/r")).unwrap();
        let archive = archive_with(members);
        fs::write(registry.path().join("cache/r/a-1.0.0.crate"), archive).unwrap();
        registry
    }

    #[test]
    fn a_crate_is_unpacked_with_folders_as_old_as_their_files() {
        let registry = with_archive(&[
            ("a-1.0.0/Cargo.toml", 1_000),
            ("a-1.0.0/src/lib.rs", 2_000),
            ("a-1.0.0/.cargo-ok", 9_000),
        ]);
        unpack(registry.path(), "cache/r/a-1.0.0.crate").unwrap();
        let folder = registry.path().join("src/r/a-1.0.0");
        let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
        assert_eq!(text("src/lib.rs"), "text");
        assert_eq!(text(".cargo-ok"), CARGO_OK);
        for (name, seconds) in [("", 2_000), ("src", 2_000), ("Cargo.toml", 1_000)] {
            let modified = fs::metadata(folder.join(name)).unwrap().modified().unwrap();
            let expected = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(modified, expected, "{name}");
        }
        // Nothing is left beside it, and it is not unpacked over what is there.
        assert_eq!(
            fs::read_dir(registry.path().join("src/r")).unwrap().count(),
            1
        );
        fs::write(folder.join("src/lib.rs"), "own").unwrap();
        unpack(registry.path(), "cache/r/a-1.0.0.crate").unwrap();
        assert_eq!(text("src/lib.rs"), "own");
    }

    #[test]
    fn an_archive_with_foreign_paths_is_not_unpacked() {
        for path in ["b-1.0.0/file", "a-1.0.0/../../file", "/etc/file"] {
            let registry = with_archive(&[("a-1.0.0/Cargo.toml", 1), (path, 1)]);
            assert!(
                unpack(registry.path(), "cache/r/a-1.0.0.crate").is_err(),
                "{path}"
            );
            let left = fs::read_dir(registry.path().join("src/r")).unwrap().count();
            assert_eq!(left, 0, "{path}");
            assert_eq!(fs::read_dir(registry.path()).unwrap().count(), 2, "{path}");
        }
        let registry = with_archive(&[]);
        assert!(unpack(registry.path(), "../a-1.0.0.crate").is_err());
    }

    #[test]
    fn only_what_the_lockfile_asks_for_is_found_and_no_credentials() {
        let home = tempfile::tempdir().unwrap();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let lock = format!(
            "[[package]]\nname = \"g\"\nversion = \"1.0.0\"\nsource = \
             \"git+https://git.example/g#{commit}\"\n"
        );
        let mut lockfile = asking_for(&[("a", "1.0.0"), ("Big", "1.0.0")]);
        lockfile.add(Lockfile::parse(&lock).unwrap());
        for file in [
            "credentials.toml",
            "config.toml",
            "registry/cache/r/a-1.0.0.crate",
            "registry/cache/r/a-2.0.0.crate",
            "registry/index/r/config.json",
            "registry/index/r/.cache/1/a",
            "registry/index/r/.cache/3/b/big",
            "registry/index/r/.cache/1/z",
            "registry/index/git-registry/.cache/1/a",
            "git/db/g-1/HEAD",
            "git/db/other-1/HEAD",
            "git/checkouts/g-1/0123456/.cargo-ok",
            "git/checkouts/g-1/7777777/.cargo-ok",
            "git/checkouts/other-1/7777777/.cargo-ok",
        ] {
            let path = home.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let mut found: Vec<String> = find(home.path(), &lockfile)
            .unwrap()
            .into_iter()
            .flat_map(|piece| piece.entries)
            .map(|entry| entry.path)
            .collect();
        found.sort();
        assert_eq!(
            found,
            [
                "cache/r/a-1.0.0.crate",
                "checkouts/g-1/0123456",
                "checkouts/g-1/0123456/.cargo-ok",
                "db/g-1",
                "db/g-1/HEAD",
                "index/r/.cache/1/a",
                "index/r/.cache/3/b/big",
                "index/r/config.json",
            ]
        );
    }

    #[test]
    fn a_registry_takes_archives_and_index_files_and_nothing_else() {
        let file = What::File { length: 0, mode: 0 };
        let part = |package: &Package, path: &str, what: &What| Part {
            root: Root::Registry,
            name: "part".to_owned(),
            guard: None,
            package: package.clone(),
            entries: vec![Entry {
                path: path.to_owned(),
                what: what.clone(),
                modified: std::time::UNIX_EPOCH.into(),
            }],
            chunk: crate::cargo::manifest::chunk_key(blake3::hash(b"")),
            needs: Vec::new(),
            used: 0,
        };
        let (a, several) = (Package::Crate("a-1.0.0".to_owned()), Package::Several);
        for (package, path) in [
            (&a, "cache/r/a-1.0.0.crate"),
            (&several, "index/r/config.json"),
            (&several, "index/r/.cache/3/a/abc"),
        ] {
            assert!(is_of_registry(&part(package, path, &file)), "{path}");
            let link = What::Symlink("x".to_owned());
            assert!(!is_of_registry(&part(package, path, &link)), "{path}");
            let mut guarded = part(package, path, &file);
            guarded.guard = Some("src".to_owned());
            assert!(!is_of_registry(&guarded), "{path}");
        }
        for (package, path) in [
            (&several, "src/r/a-1.0.0/.cargo-ok"),
            (&a, "src/r/a-1.0.0/src/lib.rs"),
            (&several, "cache/r/a-1.0.0.crate"),
            (&a, "cache/r/b-1.0.0.crate"),
            (&a, "cache/r/x/a-1.0.0.crate"),
            (&several, "index/r/other"),
            (&several, "index/config.json"),
        ] {
            assert!(!is_of_registry(&part(package, path, &file)), "{path}");
        }
    }
}
