//! Finding compiled units of dependencies in a target folder.
//!
//! Cargo's layout of `target/PROFILE` and `target/TRIPLE/PROFILE`, up to cargo 1.95:
//!
//! ```text
//! .fingerprint/NAME-HASH/   what the unit was made of: a JSON file, and its digest beside it,
//!                           which is written when the unit is complete
//! deps/…-HASH.…             libraries, proc macros, and the list of sources (.d)
//! build/NAME-HASH/          a build script, or what one gave
//! ```
//!
//! The digest of a unit is in the JSON files of those that were compiled from it, so the units of a
//! folder are a graph. A unit is a dependency's where its first source lies in cargo's home; it is
//! kept only where all that it was compiled from is kept as well.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::cargo::files;
use crate::cargo::manifest::{Entry, Package};

/// A compiled unit of a dependency, on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// The folder of its fingerprint, from the target folder.
    pub guard: String,
    /// What it is of.
    pub package: Package,
    /// All its files.
    pub entries: Vec<Entry>,
    /// The units that it was compiled from, by their numbers among those that were found.
    pub needs: Vec<u32>,
    /// Whether something of the workspace was compiled from it, by whatever way.
    pub used: bool,
}

/// What was found in a target folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The units of dependencies.
    pub units: Vec<Unit>,
    /// Whether there are complete units of the workspace's own, so that [`Unit::used`] says
    /// something.
    pub has_own: bool,
}

/// What cargo writes of a unit, as far as it is of interest here.
#[derive(Deserialize)]
struct Fingerprint {
    /// The units it was compiled from: a digest of their package's name, their crate's name,
    /// whether they are public, and their own digest.
    deps: Vec<(u64, String, bool, u64)>,
}

/// A unit of whatever package.
struct Any {
    guard: PathBuf,
    paths: Vec<PathBuf>,
    /// Its own digest; several where a folder is of several targets.
    digests: Vec<u64>,
    /// Those of the units it was compiled from.
    from: Vec<u64>,
    /// Whether it is what a build script gave.
    ran: bool,
    package: Option<Package>,
}

/// The units of dependencies in a target folder. `home` is cargo's.
///
/// # Errors
/// Where the disk cannot be read.
pub fn find(target: &Path, home: &Path) -> io::Result<Found> {
    let mut all = Vec::new();
    for profile in profiles(target)? {
        read_profile(&profile, home, &mut all)?;
    }
    name_what_ran(&mut all);
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
    let has_own = all.iter().any(|unit| unit.package.is_none() && !unit.ran);
    let mut found = Found {
        units: Vec::new(),
        has_own,
    };
    let mut new_numbers: HashMap<usize, u32> = HashMap::new();
    let mut old_needs = Vec::new();
    for (number, (unit, needs)) in all.into_iter().zip(needs).enumerate() {
        let (true, Some(package), Some(needs)) = (kept.contains(&number), unit.package, needs)
        else {
            continue;
        };
        let Some(entries) = files::entries(target, &unit.paths)? else {
            continue;
        };
        let guard = unit.guard.strip_prefix(target).map_err(io::Error::other)?;
        let Some(guard) = guard.to_str() else {
            continue;
        };
        new_numbers.insert(number, found.units.len() as u32);
        old_needs.push(needs);
        found.units.push(Unit {
            guard: guard.replace('\\', "/"),
            package,
            entries,
            needs: Vec::new(),
            used: used.contains(&number),
        });
    }
    for (unit, needs) in found.units.iter_mut().zip(old_needs) {
        // One that could not be taken leaves a number that no part has, so that it is missed.
        let number = |need: usize| new_numbers.get(&need).copied().unwrap_or(u32::MAX);
        unit.needs = needs.into_iter().map(number).collect();
        unit.needs.sort_unstable();
        unit.needs.dedup();
    }
    Ok(found)
}

/// Whether what a compile writes to `output`, cargo's `--out-dir`, is in a layout of which [`find`] reads
/// units: `PROFILE/deps` or `PROFILE/build/NAME-HASH`, with cargo's fingerprints in the same profile. Cargo
/// makes their folder before it compiles (`prepare` in its `src/compiler/layout.rs`); in the layout that is
/// cargo's own since 1.100 it makes none, and writes to `PROFILE/build/PACKAGE/HASH/out`.
pub fn is_known_output(output: &Path) -> bool {
    let Some(parent) = output.parent() else {
        return false;
    };
    let profile = match (name(output), name(parent)) {
        ("deps", _) => Some(parent),
        (_, "build") => parent.parent(),
        _ => None,
    };
    profile.is_some_and(|profile| profile.join(".fingerprint").is_dir())
}

/// The folders of profiles: those with fingerprints.
fn profiles(target: &Path) -> io::Result<Vec<PathBuf>> {
    let is_profile = |folder: &Path| folder.join(".fingerprint").is_dir();
    let mut profiles = Vec::new();
    for folder in folders(target)? {
        if is_profile(&folder) {
            profiles.push(folder);
        } else {
            profiles.extend(folders(&folder)?.into_iter().filter(|f| is_profile(f)));
        }
    }
    profiles.sort_unstable();
    Ok(profiles)
}

fn folders(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let paths = paths(folder)?.into_iter();
    Ok(paths.filter(|path| path.is_dir()).collect())
}

/// What is in a folder; nothing where there is no such folder.
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

/// The digits by which the files of a unit are known: what stands behind the last dash of a name,
/// up to a dot.
fn hash(name: &str) -> Option<&str> {
    let is_hash = |text: &&str| text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let (_, behind) = name.split_once('-')?;
    let parts = behind.rsplit('-');
    parts
        .filter_map(|part| part.split('.').next())
        .find(is_hash)
}

fn read_profile(profile: &Path, home: &Path, all: &mut Vec<Any>) -> io::Result<()> {
    let mut outputs: HashMap<String, Vec<PathBuf>> = HashMap::new();
    for path in paths(&profile.join("deps"))? {
        if let Some(hash) = hash(name(&path)) {
            outputs.entry(hash.to_owned()).or_default().push(path);
        }
    }
    for guard in folders(&profile.join(".fingerprint"))? {
        let name = name(&guard);
        let Some(hash) = hash(name) else {
            continue;
        };
        let Some(mut unit) = read_fingerprint(&guard)? else {
            continue;
        };
        let build = profile.join("build").join(name);
        let mut files = outputs.get(hash).cloned().unwrap_or_default();
        files.sort_unstable();
        if build.is_dir() {
            for source_list in paths(&build)? {
                if source_list
                    .extension()
                    .is_some_and(|extension| extension == "d")
                {
                    unit.package = unit.package.or(package_of(&source_list, home)?);
                }
            }
            files.push(build);
        }
        for source_list in files.iter().filter(|file| has_extension(file, "d")) {
            unit.package = unit.package.or(package_of(source_list, home)?);
        }
        unit.paths.append(&mut files);
        all.push(unit);
    }
    Ok(())
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|its| its == extension)
}

/// Reads a unit's fingerprint. `None` for one that is not complete.
fn read_fingerprint(guard: &Path) -> io::Result<Option<Any>> {
    let mut unit = Any {
        guard: guard.to_owned(),
        paths: vec![guard.to_owned()],
        digests: Vec::new(),
        from: Vec::new(),
        ran: false,
        package: None,
    };
    for file in paths(guard)? {
        if !has_extension(&file, "json") {
            continue;
        }
        let Ok(digest) = fs::read_to_string(file.with_extension("")) else {
            return Ok(None);
        };
        // Cargo empties it before it compiles anew.
        let mut bytes = [0; 8];
        if hex::decode_to_slice(digest.trim(), &mut bytes).is_err() {
            return Ok(None);
        }
        let Ok(fingerprint) = serde_json::from_slice::<Fingerprint>(&fs::read(&file)?) else {
            return Ok(None);
        };
        unit.digests.push(u64::from_le_bytes(bytes));
        unit.from.extend(fingerprint.deps.iter().map(|dep| dep.3));
        unit.ran |= name(&file).starts_with("run-build-script-");
    }
    Ok((!unit.digests.is_empty()).then_some(unit))
}

/// The package whose sources a list of the compiler's is of; `None` where that is not one of those
/// in cargo's home.
fn package_of(source_list: &Path, home: &Path) -> io::Result<Option<Package>> {
    let text = match fs::read_to_string(source_list) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
        text => text?,
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

/// What a build script gave is of the package that the script is of, which is compiled and thus
/// known by its sources.
fn name_what_ran(all: &mut [Any]) {
    let packages: HashMap<u64, Package> = all
        .iter()
        .filter(|unit| !unit.ran)
        .filter_map(|unit| Some((&unit.digests, unit.package.clone()?)))
        .flat_map(|(digests, package)| digests.iter().map(move |d| (*d, package.clone())))
        .collect();
    for unit in all.iter_mut().filter(|unit| unit.ran) {
        // Its own script stands among what other scripts gave it.
        let own = name(&unit.guard);
        let own = own
            .rsplit_once('-')
            .map_or(own, |(name, _)| name)
            .to_owned();
        let is_own = |package: &&Package| match package {
            Package::Crate(package) => package
                .strip_prefix(own.as_str())
                .and_then(|rest| rest.strip_prefix('-'))
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())),
            Package::Commit(_) | Package::Several => true,
        };
        let mut packages = unit.from.iter().filter_map(|digest| packages.get(digest));
        unit.package = packages.find(is_own).cloned();
    }
}

/// The units that are of dependencies, and were compiled from nothing else.
fn kept(all: &[Any], needs: &[Option<Vec<usize>>]) -> HashSet<usize> {
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

/// The units that the workspace's own were compiled from, by whatever way.
fn used(all: &[Any], needs: &[Option<Vec<usize>>]) -> HashSet<usize> {
    let own = all.iter().enumerate();
    let own = own.filter(|(_, unit)| unit.package.is_none());
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
