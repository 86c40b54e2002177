//! Finds compiled units of dependencies in cargo's build directory.
//!
//! Cargo has had two layouts of `BUILD-DIRECTORY/PROFILE` and `BUILD-DIRECTORY/TRIPLE/PROFILE`
//! (`src/compiler/layout.rs` of cargo). Up to 1.99:
//!
//! ```text
//! .fingerprint/NAME-HASH/   what the unit was made of: a JSON file, and its digest beside it,
//!                           which is written when the unit is complete
//! deps/…-HASH.…             libraries, proc macros, and the list of sources (.d)
//! build/NAME-HASH/          a build script, or what one gave
//! ```
//!
//! And since 1.100, where one folder has all of a unit:
//!
//! ```text
//! build/PACKAGE/HASH/fingerprint/   as above
//! build/PACKAGE/HASH/out/           what the compiler wrote, or what the build script put into OUT_DIR
//! build/PACKAGE/HASH/run/           what a build script said
//! ```
//!
//! The files on the disk tell which it is, not cargo's version; both may be in one directory.
//!
//! The digest of a unit is in the JSON files of those that were compiled from it, so the units of a
//! directory are a graph. A unit belongs to a dependency if its first source is in cargo's home. The cache
//! keeps it only if it keeps all units that it was compiled from.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::cargo_cache::files;
use crate::cargo_cache::manifest::{CachePart, FileEntry, Package};

/// How deep below the build directory this looks for profiles: below a target's folder, and below that of a
/// tool that keeps its own inside (`target/llvm-cov-target/TRIPLE/PROFILE`).
const PROFILE_DEPTH: usize = 3;

/// The largest list of sources that this reads, in bytes.
const SOURCE_LIST_LIMIT: u64 = 16 << 20;

/// A compiled unit of a dependency, on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompiledUnit {
    /// The commit marker, as a path from the build directory: the folder of its fingerprint, or all of the
    /// unit in the newer layout. Without it cargo considers the unit not built.
    pub commit_marker: String,
    /// The package that it belongs to.
    pub package: Package,
    /// All its files.
    pub entries: Vec<FileEntry>,
    /// The units that it was compiled from, by their numbers in [`UnitScan::units`].
    pub needs: Vec<u32>,
    /// Whether a unit of the workspace was compiled from it, directly or indirectly.
    pub used: bool,
}

/// The units of a build directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnitScan {
    /// The units of dependencies.
    pub units: Vec<CompiledUnit>,
    /// Whether there are complete units of the workspace, so that [`CompiledUnit::used`] is meaningful.
    pub has_workspace_units: bool,
}

/// The part of cargo's fingerprint of a unit that this reads.
#[derive(Deserialize)]
struct Fingerprint {
    /// The units it was compiled from: a digest of their package's name, their crate's name,
    /// whether they are public, and their own digest.
    deps: Vec<(u64, String, bool, u64)>,
}

/// A unit of any package.
struct RawUnit {
    commit_marker: PathBuf,
    paths: Vec<PathBuf>,
    /// The name of its package.
    name: String,
    /// Its own digest; several if the folder belongs to several targets.
    digests: Vec<u64>,
    /// The digests of the units it was compiled from.
    from: Vec<u64>,
    /// Whether it is the output of a build script.
    is_build_script_output: bool,
    package: Option<Package>,
}

/// The units of dependencies in a build directory. `home` is cargo's.
///
/// # Errors
/// [`io::Error`] if the disk cannot be read.
pub fn find(build: &Path, home: &Path) -> io::Result<UnitScan> {
    let mut all = Vec::new();
    for profile in profiles(build)? {
        read_older_layout(&profile, home, &mut all)?;
        read_newer_layout(&profile, home, &mut all)?;
    }
    assign_build_script_packages(&mut all);
    let numbers: HashMap<u64, usize> = all
        .iter()
        .enumerate()
        .flat_map(|(number, unit)| unit.digests.iter().map(move |digest| (*digest, number)))
        .collect();
    let needs: Vec<Option<Vec<usize>>> = all
        .iter()
        .map(|unit| {
            let needs = unit.from.iter().map(|digest| numbers.get(digest).copied());
            needs.collect()
        })
        .collect();
    let kept = kept(&all, &needs);
    let used = used(&all, &needs);
    let has_workspace_units = all
        .iter()
        .any(|unit| unit.package.is_none() && !unit.is_build_script_output);
    let mut found = UnitScan {
        units: Vec::new(),
        has_workspace_units,
    };
    let mut new_numbers: HashMap<usize, u32> = HashMap::new();
    let mut old_needs = Vec::new();
    for (number, (unit, needs)) in all.into_iter().zip(needs).enumerate() {
        let (true, Some(package), Some(needs)) = (kept.contains(&number), unit.package, needs)
        else {
            continue;
        };
        let Some(mut entries) = files::entries(build, &unit.paths)? else {
            continue;
        };
        files::mark_texts(build, &mut entries, is_cargo_text)?;
        let commit_marker = unit
            .commit_marker
            .strip_prefix(build)
            .map_err(io::Error::other)?;
        let Some(commit_marker) = commit_marker.to_str() else {
            continue;
        };
        new_numbers.insert(number, found.units.len() as u32);
        old_needs.push(needs);
        found.units.push(CompiledUnit {
            commit_marker: commit_marker.replace('\\', "/"),
            package,
            entries,
            needs: Vec::new(),
            used: used.contains(&number),
        });
    }
    for (unit, needs) in found.units.iter_mut().zip(old_needs) {
        // A unit that could not be added gets a number that no part has, so that it counts as missing.
        let number = |need: usize| new_numbers.get(&need).copied().unwrap_or(u32::MAX);
        unit.needs = needs.into_iter().map(number).collect();
        unit.needs.sort_unstable();
        unit.needs.dedup();
    }
    Ok(found)
}

/// The unit that a path below the build directory belongs to: the path of its profile's folder, its hash,
/// and whether it is in the newer layout.
fn unit_of(path: &str) -> Option<(&str, &str, bool)> {
    let ends = path.match_indices('/').map(|(at, _)| at);
    let profiles = ends
        .take(PROFILE_DEPTH)
        .filter_map(|at| path.split_at_checked(at));
    let mut units = profiles.filter_map(|(profile, rest)| {
        let mut names = rest.split('/').skip(1);
        let (kind, second, third) = (names.next()?, names.next()?, names.next());
        match (kind, hash(second), third) {
            (".fingerprint" | "deps" | "build", Some(hash), _) => Some((profile, hash, false)),
            ("build", None, Some(third)) if is_hash(third) => Some((profile, third, true)),
            _ => None,
        }
    });
    units.next()
}

/// Whether a path of a unit is a text in which cargo, and nothing else, writes the path of the build
/// directory: a list of sources, or a build script's messages and its output folder. Cargo itself corrects
/// the latter after the directory was moved.
fn is_cargo_text(path: &str) -> bool {
    let mut names = path.rsplit('/');
    let (name, folder, above) = (names.next(), names.next(), names.next());
    match (name.unwrap_or_default(), folder, above) {
        ("root-output" | "stderr" | "stdout", Some("run"), _) => true,
        ("root-output" | "stderr" | "output", _, Some("build")) => true,
        (name, Some("deps" | "out"), _) | (name, _, Some("build")) => name.ends_with(".d"),
        _ => false,
    }
}

/// Whether all paths of a part belong to a single compiled unit, and its commit marker is the folder
/// without which cargo considers the unit not built.
pub fn is_unit(part: &CachePart) -> bool {
    let Some(commit_marker) = part.commit_marker.as_deref() else {
        return false;
    };
    let Some((profile, hash, is_newer)) = unit_of(commit_marker) else {
        return false;
    };
    let mut below = commit_marker
        .get(profile.len()..)
        .unwrap_or_default()
        .split('/')
        .skip(1);
    let is_guard = if is_newer {
        below.count() == 3
    } else {
        below.next() == Some(".fingerprint") && below.count() == 1
    };
    let is_its = |path: &str| {
        if is_newer {
            path.strip_prefix(commit_marker)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        } else {
            unit_of(path) == Some((profile, hash, false))
        }
    };
    is_guard && part.entries.iter().all(|entry| is_its(&entry.path))
}

/// The profile's folder of a compile into `output`, cargo's `--out-dir`, if [`find`] reads units of that
/// layout. Cargo makes the folder of the fingerprints before it compiles.
pub fn profile_of_output(output: &Path) -> Option<&Path> {
    let parent = output.parent()?;
    let profile = match (name(output), name(parent)) {
        ("deps", _) => parent,
        ("out", unit) if is_hash(unit) && parent.join("fingerprint").is_dir() => {
            let build = parent.parent()?.parent()?;
            return (name(build) == "build").then(|| build.parent())?;
        }
        (_, "build") => parent.parent()?,
        _ => return None,
    };
    profile.join(".fingerprint").is_dir().then_some(profile)
}

/// The build directory of this profile's folder: the nearest folder above it with a file that cargo writes
/// only into the build directory, or else its parent.
pub fn build_directory_of(profile: &Path) -> Option<&Path> {
    let mut above = profile.ancestors().skip(1).take(PROFILE_DEPTH);
    let is_build_directory = |folder: &&Path| folder.join(".rustc_info.json").is_file();
    above.find(is_build_directory).or_else(|| profile.parent())
}

/// The folders of profiles, known by the folders in them.
pub(super) fn profiles(build: &Path) -> io::Result<Vec<PathBuf>> {
    let is_profile =
        |folder: &Path| folder.join(".fingerprint").is_dir() || folder.join("build").is_dir();
    let mut profiles = Vec::new();
    let mut left: Vec<(PathBuf, usize)> = vec![(build.to_owned(), 0)];
    while let Some((folder, depth)) = left.pop() {
        for folder in folders(&folder)? {
            if is_profile(&folder) {
                profiles.push(folder);
            } else if depth + 1 < PROFILE_DEPTH {
                left.push((folder, depth + 1));
            }
        }
    }
    profiles.sort_unstable();
    Ok(profiles)
}

/// The folders in a folder, without those that a symbolic link leads to.
pub(super) fn folders(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let is_folder = |path: &PathBuf| path.symlink_metadata().is_ok_and(|its| its.is_dir());
    Ok(paths(folder)?.into_iter().filter(is_folder).collect())
}

/// The paths in a folder; none if there is no such folder.
fn paths(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn name(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
}

fn is_hash(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The hash in the name of a unit's file: the text behind the last dash, up to a dot.
fn hash(name: &str) -> Option<&str> {
    let (_, behind) = name.split_once('-')?;
    let parts = behind.rsplit('-');
    parts
        .filter_map(|part| part.split('.').next())
        .find(|text| is_hash(text))
}

fn read_older_layout(profile: &Path, home: &Path, all: &mut Vec<RawUnit>) -> io::Result<()> {
    let mut outputs: HashMap<String, Vec<PathBuf>> = HashMap::new();
    for path in paths(&profile.join("deps"))? {
        if let Some(hash) = hash(name(&path)) {
            outputs.entry(hash.to_owned()).or_default().push(path);
        }
    }
    for commit_marker in folders(&profile.join(".fingerprint"))? {
        let name = name(&commit_marker);
        let Some(hash) = hash(name) else {
            continue;
        };
        let package = name.rsplit_once('-').map_or(name, |(package, _)| package);
        let Some(mut unit) = read_fingerprint(&commit_marker, package)? else {
            continue;
        };
        let build = profile.join("build").join(name);
        let mut files = outputs.get(hash).cloned().unwrap_or_default();
        files.sort_unstable();
        if build.is_dir() {
            unit.package = package_of_any(&paths(&build)?, home)?;
            files.push(build);
        }
        unit.package = unit.package.or(package_of_any(&files, home)?);
        unit.paths = [vec![commit_marker.clone()], files].concat();
        unit.commit_marker = commit_marker;
        all.push(unit);
    }
    Ok(())
}

fn read_newer_layout(profile: &Path, home: &Path, all: &mut Vec<RawUnit>) -> io::Result<()> {
    for package in folders(&profile.join("build"))? {
        for commit_marker in folders(&package)? {
            let fingerprint = commit_marker.join("fingerprint");
            if !is_hash(name(&commit_marker)) || !fingerprint.is_dir() {
                continue;
            }
            let Some(mut unit) = read_fingerprint(&fingerprint, name(&package))? else {
                continue;
            };
            // A build script may have put any files there.
            if !unit.is_build_script_output {
                unit.package = package_of_any(&paths(&commit_marker.join("out"))?, home)?;
            }
            unit.paths = vec![commit_marker.clone()];
            unit.commit_marker = commit_marker;
            all.push(unit);
        }
    }
    Ok(())
}

/// The package of the first of the compiler's lists among `files` that has one.
fn package_of_any(files: &[PathBuf], home: &Path) -> io::Result<Option<Package>> {
    for source_list in files.iter().filter(|file| has_extension(file, "d")) {
        if let Some(package) = package_of(source_list, home)? {
            return Ok(Some(package));
        }
    }
    Ok(None)
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|its| its == extension)
}

/// Reads the fingerprint in `folder` of a unit of the package of this name, without the unit's files.
/// `None` if the unit is incomplete.
fn read_fingerprint(folder: &Path, package: &str) -> io::Result<Option<RawUnit>> {
    let mut unit = RawUnit {
        commit_marker: PathBuf::new(),
        paths: Vec::new(),
        name: package.to_owned(),
        digests: Vec::new(),
        from: Vec::new(),
        is_build_script_output: false,
        package: None,
    };
    for file in paths(folder)? {
        if !has_extension(&file, "json") {
            continue;
        }
        let Ok(digest) = fs::read_to_string(file.with_extension("")) else {
            return Ok(None);
        };
        // Cargo empties it before it compiles again.
        let mut bytes = [0; 8];
        if hex::decode_to_slice(digest.trim(), &mut bytes).is_err() {
            return Ok(None);
        }
        let Ok(fingerprint) = serde_json::from_slice::<Fingerprint>(&fs::read(&file)?) else {
            return Ok(None);
        };
        unit.digests.push(u64::from_le_bytes(bytes));
        unit.from.extend(fingerprint.deps.iter().map(|dep| dep.3));
        unit.is_build_script_output |= name(&file).starts_with("run-build-script-");
    }
    Ok((!unit.digests.is_empty()).then_some(unit))
}

/// The package of the sources in a list of the compiler's; `None` if they are not in cargo's home.
fn package_of(source_list: &Path, home: &Path) -> io::Result<Option<Package>> {
    let mut text = String::new();
    let read = File::open(source_list)?
        .take(SOURCE_LIST_LIMIT)
        .read_to_string(&mut text);
    match read {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
        read => read?,
    };
    Ok(first_source(&text).and_then(|source| package_of_source(Path::new(&source), home)))
}

/// The first source in a list in make's form: the root of the crate.
fn first_source(text: &str) -> Option<String> {
    let line = text.lines().next()?;
    // A Windows path has a colon of its own, and no blank behind it.
    let (_, sources) = line.split_once(": ")?;
    let mut source = String::new();
    let mut characters = sources.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\\' if characters.peek() == Some(&' ') => source.extend(characters.next()),
            ' ' => break,
            other => source.push(other),
        }
    }
    (!source.is_empty()).then_some(source)
}

/// The package of a source in cargo's home.
fn package_of_source(source: &Path, home: &Path) -> Option<Package> {
    let rest = source.strip_prefix(home).ok()?;
    let names: Option<Vec<&str>> = rest.iter().map(|name| name.to_str()).collect();
    match names?.as_slice() {
        ["registry", "src", _, package, _, ..] => Some(Package::Crate((*package).to_owned())),
        ["git", "checkouts", _, commit, _, ..] => Some(Package::Commit((*commit).to_owned())),
        _ => None,
    }
}

/// Assigns the output of each build script to the package of the script. The script is compiled, so its
/// package is known by its sources.
fn assign_build_script_packages(all: &mut [RawUnit]) {
    let packages: HashMap<u64, Package> = all
        .iter()
        .filter(|unit| !unit.is_build_script_output)
        .filter_map(|unit| Some((&unit.digests, unit.package.clone()?)))
        .flat_map(|(digests, package)| digests.iter().map(move |d| (*d, package.clone())))
        .collect();
    for unit in all.iter_mut().filter(|unit| unit.is_build_script_output) {
        // Its own script is among the outputs of other scripts that it depends on.
        let own = unit.name.as_str();
        let is_own = |package: &&Package| match package {
            Package::Crate(package) => package
                .strip_prefix(own)
                .and_then(|rest| rest.strip_prefix('-'))
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())),
            Package::Commit(_) | Package::Several => true,
        };
        let mut packages = unit.from.iter().filter_map(|digest| packages.get(digest));
        unit.package = packages.find(is_own).cloned();
    }
}

/// The units of dependencies that were compiled from nothing else.
fn kept(all: &[RawUnit], needs: &[Option<Vec<usize>>]) -> HashSet<usize> {
    let numbers = all.iter().enumerate();
    let mut kept: HashSet<usize> = numbers
        .filter(|(_, unit)| unit.package.is_some())
        .map(|(number, _)| number)
        .collect();
    loop {
        let has_all = |number: &usize| {
            let needs = needs.get(*number).and_then(Option::as_ref);
            needs.is_some_and(|needs| needs.iter().all(|need| kept.contains(need)))
        };
        let next: HashSet<usize> = kept.iter().copied().filter(has_all).collect();
        if next.len() == kept.len() {
            return kept;
        }
        kept = next;
    }
}

/// The units that units of the workspace were compiled from, directly or indirectly.
fn used(all: &[RawUnit], needs: &[Option<Vec<usize>>]) -> HashSet<usize> {
    let own = all
        .iter()
        .enumerate()
        .filter(|(_, unit)| unit.package.is_none());
    let mut left: Vec<usize> = own.map(|(number, _)| number).collect();
    let mut used: HashSet<usize> = left.iter().copied().collect();
    while let Some(number) = left.pop() {
        let needs = needs.get(number).and_then(Option::as_ref);
        for need in needs.into_iter().flatten() {
            if used.insert(*need) {
                left.push(*need);
            }
        }
    }
    used
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::cargo_cache::manifest::{BaseDir, FileKind, chunk_key};

    const HASH: &str = "0123456789abcdef";

    fn part(commit_marker: &str, paths: &[&str]) -> CachePart {
        let entry = |path: &&str| FileEntry {
            path: path.replace('H', HASH),
            kind: FileKind::Folder,
            modified: UNIX_EPOCH.into(),
        };
        CachePart {
            base: BaseDir::Build(0),
            name: commit_marker.to_owned(),
            commit_marker: Some(commit_marker.replace('H', HASH)),
            package: Package::Several,
            entries: paths.iter().map(entry).collect(),
            chunk: chunk_key(blake3::hash(b"")),
            needs: Vec::new(),
            used: 0,
            path_dependent: false,
        }
    }

    #[test]
    fn a_part_is_a_unit_where_all_its_paths_are_of_one_unit() {
        let older = "debug/.fingerprint/a-H";
        let newer = "debug/build/a/H";
        for (commit_marker, paths) in [
            (
                older,
                &["debug/deps/liba-H.rlib", "debug/.fingerprint/a-H/lib-a"][..],
            ),
            (older, &["debug/build/a-H", "debug/build/a-H/out/x/y"]),
            ("t/debug/.fingerprint/a-H", &["t/debug/deps/a-H.d"]),
            ("t/u/debug/.fingerprint/a-H", &["t/u/debug/deps/a-H.d"]),
            (
                newer,
                &["debug/build/a/H", "debug/build/a/H/out/liba-H.rlib"],
            ),
            ("t/debug/build/a/H", &["t/debug/build/a/H/run/stdout"]),
        ] {
            assert!(
                is_unit(&part(commit_marker, paths)),
                "{commit_marker} {paths:?}"
            );
        }
        for (commit_marker, paths) in [
            (older, &["debug/deps/liba-fedcba9876543210.rlib"][..]),
            (older, &["release/deps/liba-H.rlib"]),
            (older, &["debug/app"]),
            (older, &["debug/incremental/a-H/x"]),
            (older, &[".cargo/config.toml"]),
            (newer, &["debug/build/a/fedcba9876543210/out/x"]),
            (newer, &["debug/build/b/H/out/x"]),
            (newer, &["debug/build/a/H-x"]),
            (newer, &["debug/deps/liba-H.rlib"]),
            // The commit marker is exactly that folder.
            ("debug/build/a-H", &["debug/build/a-H"]),
            ("debug/.fingerprint/a-H/x", &["debug/.fingerprint/a-H/x"]),
            ("debug/build/a/H/out", &["debug/build/a/H/out/x"]),
            ("debug/build", &["debug/build/a/H"]),
            ("src", &["src/main.rs"]),
        ] {
            assert!(
                !is_unit(&part(commit_marker, paths)),
                "{commit_marker} {paths:?}"
            );
        }
        let mut without_marker = part(older, &["debug/deps/liba-H.rlib"]);
        without_marker.commit_marker = None;
        assert!(!is_unit(&without_marker));
    }

    #[test]
    fn cargos_own_texts_are_told_from_what_else_a_unit_has() {
        for path in [
            "debug/deps/a-H.d",
            "debug/build/a-H/output",
            "debug/build/a-H/root-output",
            "debug/build/a-H/build_script_build-H.d",
            "debug/build/a/H/out/a-H.d",
            "debug/build/a/H/run/stdout",
            "debug/build/a/H/run/root-output",
        ] {
            assert!(is_cargo_text(path), "{path}");
        }
        for path in [
            "debug/deps/liba-H.rlib",
            "debug/build/a-H/out/text.rs",
            "debug/build/a/H/out/root-output",
            "debug/.fingerprint/a-H/lib-a.json",
        ] {
            assert!(!is_cargo_text(path), "{path}");
        }
    }

    #[test]
    fn a_build_directory_is_the_nearest_folder_with_what_cargo_writes_there_only() {
        let folder = tempfile::tempdir().unwrap();
        let profile = folder.path().join("target/triple/debug");
        fs::create_dir_all(&profile).unwrap();
        let above = profile.parent().unwrap();
        assert_eq!(build_directory_of(&profile), Some(above));
        let build = folder.path().join("target");
        fs::write(build.join(".rustc_info.json"), "").unwrap();
        assert_eq!(build_directory_of(&profile), Some(build.as_path()));
    }
}
