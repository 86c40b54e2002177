//! Cargo's home: finds there what a lockfile asks for, and unpacks crates there.
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
//! This module reads only these: cargo's home has credentials as well.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flate2::read::GzDecoder;

use crate::cargo_cache::files::{self, CheckedReader, Checkpoint, ExtractError};
use crate::cargo_cache::lockfile::Lockfile;
use crate::cargo_cache::manifest::{BaseDir, CachePart, FileEntry, FileKind, Package};
use crate::digest::sha256;

/// How many parts the index files of a registry form: a changed file changes the whole part that it is in,
/// and a part for each name would be hundreds.
const INDEX_PARTS: u8 = 16;

/// The largest crate, in bytes, unpacked: ten times what the largest known one has.
const CRATE_LIMIT: u64 = 4 << 30;

/// The text that cargo writes in a crate's folder when the folder is complete (`unpack_package` of its
/// `sources/registry/mod.rs`).
const CARGO_OK: &str = "{\"v\":1}";

/// An item of cargo's home, on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HomeItem {
    /// The folder that its paths begin in.
    pub base: BaseDir,
    /// Its name, unique in its base directory.
    pub name: String,
    /// The commit marker, if it has one.
    pub commit_marker: Option<String>,
    /// The package that it belongs to.
    pub package: Package,
    /// All its files.
    pub entries: Vec<FileEntry>,
}

/// The items in cargo's home that a lockfile asks for.
///
/// # Errors
/// [`io::Error`] if the disk cannot be read.
pub fn find(home: &Path, lockfile: &Lockfile) -> io::Result<Vec<HomeItem>> {
    let mut items = Vec::new();
    let registry = home.join("registry");
    for folder in folders(&registry.join("cache"))? {
        find_archives(&registry, &folder, lockfile, &mut items)?;
    }
    for folder in folders(&registry.join("index"))? {
        find_index(&registry, &folder, lockfile, &mut items)?;
    }
    let git = home.join("git");
    for repository in folders(&git.join("checkouts"))? {
        find_checkouts(&git, &repository, lockfile, &mut items)?;
    }
    Ok(items)
}

fn find_archives(
    registry: &Path,
    folder: &Path,
    lockfile: &Lockfile,
    items: &mut Vec<HomeItem>,
) -> io::Result<()> {
    for path in sorted(folder)? {
        let package = name(&path).strip_suffix(".crate");
        let Some(package) = package.filter(|package| lockfile.has_crate(package)) else {
            continue;
        };
        let package = Package::Crate(package.to_owned());
        add(BaseDir::Registry, registry, &[path], None, package, items)?;
    }
    Ok(())
}

fn find_index(
    registry: &Path,
    folder: &Path,
    lockfile: &Lockfile,
    items: &mut Vec<HomeItem>,
) -> io::Result<()> {
    // A registry that is a git repository has its configuration elsewhere, and its files are of no use
    // without that.
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
            BaseDir::Registry,
            registry,
            &paths,
            None,
            Package::Several,
            items,
        )?;
    }
    add(
        BaseDir::Registry,
        registry,
        &[config],
        None,
        Package::Several,
        items,
    )
}

fn find_checkouts(
    git: &Path,
    repository: &Path,
    lockfile: &Lockfile,
    items: &mut Vec<HomeItem>,
) -> io::Result<()> {
    let mut commits = folders(repository)?;
    commits
        .retain(|commit| lockfile.has_commit(name(commit)) && commit.join(".cargo-ok").is_file());
    for commit in &commits {
        let package = Package::Commit(name(commit).to_owned());
        let paths = [commit.clone()];
        add(
            BaseDir::Git,
            git,
            &paths,
            Some(commit),
            package.clone(),
            items,
        )?;
    }
    let database = git.join("db").join(name(repository));
    if !commits.is_empty() && database.is_dir() {
        let paths = [database.clone()];
        add(
            BaseDir::Git,
            git,
            &paths,
            Some(&database),
            Package::Several,
            items,
        )?;
    }
    Ok(())
}

/// Adds the files at these paths as an item, unless they cannot be one.
fn add(
    base: BaseDir,
    folder: &Path,
    paths: &[PathBuf],
    commit_marker: Option<&Path>,
    package: Package,
    items: &mut Vec<HomeItem>,
) -> io::Result<()> {
    let commit_marker =
        commit_marker.and_then(|commit_marker| commit_marker.strip_prefix(folder).ok()?.to_str());
    if let Some(entries) = files::entries(folder, paths)?
        && let Some(first) = entries.first()
    {
        items.push(HomeItem {
            base,
            name: first.path.clone(),
            commit_marker: commit_marker.map(|commit_marker| commit_marker.replace('\\', "/")),
            package,
            entries,
        });
    }
    Ok(())
}

/// The paths in a folder, sorted; none if there is no such folder.
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

/// Whether this cache stores all paths of a part below `registry`: archives, which are checked against the
/// lockfile, and index files. Sources are unpacked from archives only.
pub fn is_of_registry(part: &CachePart) -> bool {
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
    let is_file = |entry: &FileEntry| matches!(entry.kind, FileKind::File { .. });
    part.commit_marker.is_none()
        && part
            .entries
            .iter()
            .all(|entry| is_file(entry) && allowed(&entry.path))
}

/// Whether this cache stores all paths of a part below `git`: one checkout, or one repository, whole or not
/// at all.
pub fn is_of_git(part: &CachePart) -> bool {
    let Some(commit_marker) = &part.commit_marker else {
        return false;
    };
    let mut names = commit_marker.split('/');
    let folders = (names.next(), names.next(), names.next(), names.next());
    let is_one = match (&part.package, folders) {
        (Package::Commit(commit), (Some("checkouts"), Some(_), Some(name), None)) => name == commit,
        (Package::Several, (Some("db"), Some(_), None, None)) => true,
        _ => false,
    };
    let is_below = |path: &str| {
        let rest = path.strip_prefix(commit_marker.as_str());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let is_allowed = |entry: &FileEntry| {
        is_below(&entry.path)
            && gits_own(&entry.path).is_none_or(|own| match &entry.kind {
                FileKind::Folder | FileKind::File { .. } | FileKind::Link(_) => !is_run_by_git(own),
                // Git creates none there, and one could make git read settings from elsewhere.
                FileKind::Text { .. } | FileKind::Symlink(_) => false,
            })
    };
    is_one && part.entries.iter().all(is_allowed)
}

/// The path within git's own folder, for a path below `git` in a repository or in a checkout's `.git`.
fn gits_own(path: &str) -> Option<&str> {
    if let Some(rest) = path.strip_prefix("db/") {
        return Some(rest.split_once('/').map_or("", |(_, own)| own));
    }
    // Some systems ignore case.
    let at = path.to_ascii_lowercase().find("/.git")?;
    let own = path.get(at + "/.git".len()..)?;
    match own.strip_prefix('/') {
        Some(own) => Some(own),
        // A file of that name says where git finds its settings.
        None if own.is_empty() => Some(""),
        None => gits_own_after(path, at + 1),
    }
}

/// The same from this byte on: `.gitignore` is no folder of git's.
fn gits_own_after(path: &str, at: usize) -> Option<&str> {
    let rest = path.get(at..)?;
    let slash = rest.find('/')?;
    gits_own(rest.get(slash..)?)
}

/// Whether git keeps only commits and their names here, whatever a file is called.
fn is_content(own: &str) -> bool {
    let folders = ["objects/", "refs/", "logs/"];
    folders.iter().any(|folder| own.starts_with(folder))
}

/// Whether git would run this file of a repository, or read from it what to run. Git does not run samples.
fn is_run_by_git(own: &str) -> bool {
    if is_content(own) {
        return false;
    }
    let own = own.to_ascii_lowercase();
    let mut names = own.split('/');
    let last = own.rsplit('/').next().unwrap_or_default();
    let is_hook =
        names.any(|name| name == "hooks") && last != "hooks" && !last.ends_with(".sample");
    is_hook || matches!(last, "config.worktree" | "commondir" | "gitdir")
}

/// Whether a file for a path below `git` sets nothing that git would run. It accepts only those of git's
/// settings that new repositories of cargo's and git's have.
///
/// # Errors
/// [`io::Error`] if it cannot be read.
pub fn sets_nothing_to_run(path: &str, file: &mut File) -> io::Result<bool> {
    /// More than git's own settings take, in bytes.
    const SETTINGS_LIMIT: u64 = 64 << 10;
    let is_settings = |own: &str| {
        own.rsplit('/')
            .next()
            .is_some_and(|name| name.eq_ignore_ascii_case("config"))
    };
    let Some(own) = gits_own(path) else {
        return Ok(true);
    };
    if own.is_empty() {
        // A file in place of git's folder.
        return Ok(false);
    }
    if is_content(own) || !is_settings(own) {
        return Ok(true);
    }
    let mut text = String::new();
    let read = file.take(SETTINGS_LIMIT).read_to_string(&mut text)?;
    Ok((read as u64) < SETTINGS_LIMIT && are_plain_settings(&text))
}

fn are_plain_settings(text: &str) -> bool {
    const CORE: [&str; 9] = [
        "autocrlf",
        "bare",
        "filemode",
        "ignorecase",
        "logallrefupdates",
        "precomposeunicode",
        "repositoryformatversion",
        "symlinks",
        "longpaths",
    ];
    let mut section = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|line| line.strip_suffix(']'))
        {
            section = name
                .split([' ', '.'])
                .next()
                .unwrap_or_default()
                .to_ascii_lowercase();
            continue;
        }
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        let key = key.trim().to_ascii_lowercase();
        let plain = match section.as_str() {
            "core" => CORE.contains(&key.as_str()),
            "extensions" => key == "objectformat",
            "remote" => matches!(key.as_str(), "url" | "fetch" | "tagopt"),
            "branch" => matches!(key.as_str(), "remote" | "merge"),
            "submodule" => matches!(key.as_str(), "url" | "active"),
            _ => false,
        };
        // A transport of that name runs the text behind it, and a continued line hides the next.
        let value = value.trim().trim_matches('"');
        if !plain || value.starts_with("ext::") || line.ends_with('\\') {
            return false;
        }
    }
    true
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

/// Unpacks the archive at `path` below `registry` as cargo would, unless that was done or `accepts` refuses
/// its package with its sha256 digest. Cargo itself unpacks one crate after the other. This unpacks the
/// file that it digested, and calls `checkpoint` at each piece.
///
/// A folder gets the time of the newest file in it. An archive has no times of folders, and cargo would run
/// a build script that names a folder again if the folder is newer than the script's output.
///
/// # Errors
/// [`ExtractError::UnsafePath`] if the archive has paths outside of its folder, [`ExtractError::Foreign`]
/// if `accepts` refuses it, [`ExtractError::Io`] if the disk refuses it or `checkpoint` ends it. The folder
/// is absent then.
pub fn unpack(
    registry: &Path,
    path: &str,
    accepts: impl FnOnce(&str, &[u8; 32]) -> bool,
    checkpoint: Checkpoint<'_>,
) -> Result<(), ExtractError> {
    let outside = || ExtractError::UnsafePath(path.to_owned());
    let (package, folder) = archive(path).ok_or_else(outside)?;
    let folder = registry.join(folder);
    if folder.symlink_metadata().is_ok() {
        return Ok(());
    }
    let mut archive = files::open_below(registry, path)?;
    if !accepts(package, &sha256(&archive)?) {
        return Err(ExtractError::Foreign(path.to_owned()));
    }
    archive.rewind()?;
    let parent = folder.parent().ok_or_else(outside)?;
    files::make_below(registry, parent)?;
    let staging = tempfile::Builder::new()
        .prefix(files::STAGING)
        .tempdir_in(parent)?;
    let archive = CheckedReader {
        content: GzDecoder::new(io::BufReader::new(archive)),
        checkpoint,
    };
    unpack_in(archive, package, staging.path())?;
    fs::rename(staging.path().join(package), &folder)?;
    Ok(())
}

fn unpack_in(content: impl Read, package: &str, folder: &Path) -> Result<(), ExtractError> {
    let mut archive = tar::Archive::new(content.take(CRATE_LIMIT));
    let mut folders: BTreeMap<PathBuf, SystemTime> = BTreeMap::new();
    let unpacked = folder.join(package);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let inner = path
            .strip_prefix(package)
            .map_err(|_| ExtractError::UnsafePath(path.display().to_string()))?;
        // Cargo's own mark.
        if inner == Path::new(".cargo-ok") {
            continue;
        }
        if !entry.unpack_in(folder)? {
            return Err(ExtractError::UnsafePath(path.display().to_string()));
        }
        let time = entry.header().mtime().unwrap_or_default();
        let time = UNIX_EPOCH
            .checked_add(Duration::from_secs(time))
            .unwrap_or(UNIX_EPOCH);
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
    use crate::cargo_cache::lockfile::tests::asking_for;

    fn unpack(registry: &Path, path: &str) -> Result<(), ExtractError> {
        super::unpack(registry, path, |_, _| true, &|_| Ok(()))
    }

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
    fn an_archive_with_another_digest_is_not_unpacked() {
        let registry = with_archive(&[("a-1.0.0/Cargo.toml", 1)]);
        let archive = fs::read(registry.path().join("cache/r/a-1.0.0.crate")).unwrap();
        let digest = sha256(&*archive).unwrap();
        let path = "cache/r/a-1.0.0.crate";
        let accepts = |name: &str, found: &[u8; 32]| {
            assert_eq!((name, found), ("a-1.0.0", &digest));
            false
        };
        let refused = super::unpack(registry.path(), path, accepts, &|_| Ok(()));
        assert!(
            matches!(refused, Err(ExtractError::Foreign(_))),
            "{refused:?}"
        );
        assert!(!registry.path().join("src").exists());
        // It may belong to another job, so it stays.
        assert!(registry.path().join(path).exists());
    }

    #[test]
    fn a_crate_whose_unpacking_is_ended_leaves_nothing() {
        let registry = with_archive(&[("a-1.0.0/Cargo.toml", 1), ("a-1.0.0/src/lib.rs", 1)]);
        let late = || Err(io::ErrorKind::TimedOut.into());
        let path = "cache/r/a-1.0.0.crate";
        assert!(super::unpack(registry.path(), path, |_, _| true, &|_| late()).is_err());
        let left = fs::read_dir(registry.path().join("src/r")).unwrap().count();
        assert_eq!(left, 0);
    }

    /// A part below `git` with these files, or with links.
    fn git_part(
        package: Package,
        commit_marker: &str,
        files: &[&str],
        link: Option<&str>,
    ) -> CachePart {
        let kind = |path: &str| {
            if link == Some(path) {
                FileKind::Symlink("x".to_owned())
            } else {
                FileKind::File { length: 1, mode: 0 }
            }
        };
        let entries = files.iter().map(|path| FileEntry {
            path: (*path).to_owned(),
            kind: kind(path),
            modified: UNIX_EPOCH.into(),
        });
        CachePart {
            base: BaseDir::Git,
            name: "part".to_owned(),
            commit_marker: Some(commit_marker.to_owned()),
            package,
            chunk: crate::cargo_cache::manifest::chunk_key(blake3::hash(b"x")),
            entries: entries.collect(),
            needs: Vec::new(),
            used: 0,
            path_dependent: false,
        }
    }

    #[test]
    fn below_git_only_whole_checkouts_and_repositories_are_taken_and_nothing_that_git_runs() {
        let commit = || Package::Commit("0123456".to_owned());
        let checkout = "checkouts/r-1/0123456";
        let good = [
            git_part(
                commit(),
                checkout,
                &[
                    "checkouts/r-1/0123456/src/lib.rs",
                    "checkouts/r-1/0123456/.gitignore",
                    "checkouts/r-1/0123456/hooks/own.rs",
                    "checkouts/r-1/0123456/.git/config",
                    "checkouts/r-1/0123456/.git/hooks/update.sample",
                ],
                None,
            ),
            git_part(
                commit(),
                checkout,
                &["checkouts/r-1/0123456/link"],
                Some("checkouts/r-1/0123456/link"),
            ),
            git_part(
                Package::Several,
                "db/r-1",
                &["db/r-1/config", "db/r-1/objects/ab/cd"],
                None,
            ),
        ];
        assert!(good.iter().all(is_of_git));
        for (package, commit_marker, file) in [
            (commit(), checkout, "checkouts/r-1/7654321/src/lib.rs"),
            (commit(), checkout, "checkouts/r-1/01234567/src/lib.rs"),
            (
                commit(),
                checkout,
                "checkouts/r-1/0123456/.git/hooks/post-checkout",
            ),
            (
                commit(),
                checkout,
                "checkouts/r-1/0123456/sub/.git/hooks/post-checkout",
            ),
            (
                commit(),
                checkout,
                "checkouts/r-1/0123456/.gitx/.GIT/Hooks/post-checkout",
            ),
            (
                commit(),
                checkout,
                "checkouts/r-1/0123456/.git/config.worktree",
            ),
            (
                commit(),
                "checkouts/r-1/7654321",
                "checkouts/r-1/7654321/src/lib.rs",
            ),
            (
                commit(),
                "checkouts/r-1",
                "checkouts/r-1/0123456/src/lib.rs",
            ),
            (commit(), "db/r-1", "db/r-1/config"),
            (Package::Several, "db/r-1", "db/r-1/hooks/pre-receive"),
            (Package::Several, "db/r-1", "db/r-2/config"),
            (
                Package::Several,
                checkout,
                "checkouts/r-1/0123456/src/lib.rs",
            ),
            (Package::Several, "elsewhere/r-1", "elsewhere/r-1/file"),
        ] {
            let part = git_part(package, commit_marker, &[file], None);
            assert!(!is_of_git(&part), "{commit_marker} {file}");
        }
        let link = "db/r-1/config";
        assert!(!is_of_git(&git_part(
            Package::Several,
            "db/r-1",
            &[link],
            Some(link)
        )));
        let without_marker = CachePart {
            commit_marker: None,
            ..git_part(
                commit(),
                checkout,
                &["checkouts/r-1/0123456/src/lib.rs"],
                None,
            )
        };
        assert!(!is_of_git(&without_marker));
    }

    #[test]
    fn settings_of_git_that_would_have_it_run_something_are_refused() {
        let accepted = |path: &str, text: &str| {
            let mut file = tempfile::tempfile().unwrap();
            io::Write::write_all(&mut file, text.as_bytes()).unwrap();
            file.rewind().unwrap();
            sets_nothing_to_run(path, &mut file).unwrap()
        };
        let plain = "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = true\n";
        let cloned =
            "[remote \"origin\"]\n\turl = file:///h/git/db/r-1\n\tfetch = +refs/*:refs/*\n";
        for path in ["db/r-1/config", "checkouts/r-1/0123456/.git/config"] {
            assert!(accepted(path, plain), "{path}");
            assert!(accepted(path, &format!("{plain}{cloned}")), "{path}");
            for bad in [
                "[core]\n\tfsmonitor = /tmp/evil\n",
                "[core]\n\tsshCommand = /tmp/evil\n",
                "[core]\n\thooksPath = /tmp/evil\n",
                "[core] fsmonitor = /tmp/evil\n",
                "[include]\n\tpath = /tmp/evil\n",
                "[filter \"x\"]\n\tsmudge = /tmp/evil\n",
                "[alias]\n\tfetch = !/tmp/evil\n",
                "[remote \"origin\"]\n\turl = ext::/tmp/evil\n",
                "[remote \"origin\"]\n\tuploadpack = /tmp/evil\n",
                "[core]\n\tbare = true\\\n",
            ] {
                assert!(!accepted(path, &format!("{plain}{bad}")), "{path} {bad}");
            }
        }
        // A source file of that name belongs to the sources.
        assert!(accepted("checkouts/r-1/0123456/config", "[alias]"));
        assert!(!accepted("checkouts/r-1/0123456/.git", "gitdir: /tmp/evil"));
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
            .flat_map(|item| item.entries)
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
        let file = FileKind::File { length: 0, mode: 0 };
        let part = |package: &Package, path: &str, kind: &FileKind| CachePart {
            base: BaseDir::Registry,
            name: "part".to_owned(),
            commit_marker: None,
            package: package.clone(),
            entries: vec![FileEntry {
                path: path.to_owned(),
                kind: kind.clone(),
                modified: std::time::UNIX_EPOCH.into(),
            }],
            chunk: crate::cargo_cache::manifest::chunk_key(blake3::hash(b"")),
            needs: Vec::new(),
            used: 0,
            path_dependent: false,
        };
        let (a, several) = (Package::Crate("a-1.0.0".to_owned()), Package::Several);
        for (package, path) in [
            (&a, "cache/r/a-1.0.0.crate"),
            (&several, "index/r/config.json"),
            (&several, "index/r/.cache/3/a/abc"),
        ] {
            assert!(is_of_registry(&part(package, path, &file)), "{path}");
            let link = FileKind::Symlink("x".to_owned());
            assert!(!is_of_registry(&part(package, path, &link)), "{path}");
            let mut with_marker = part(package, path, &file);
            with_marker.commit_marker = Some("src".to_owned());
            assert!(!is_of_registry(&with_marker), "{path}");
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
