//! Serves a registry for a benchmark: with the crates that cargo has fetched from this machine's
//! own registry.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::registry::Registry;

/// Runs cargo, which must not fail.
pub fn cargo(folder: &Path, arguments: &[&str]) {
    let status = Command::new("cargo")
        .args(arguments)
        .current_dir(folder)
        .status();
    assert!(status.unwrap().success(), "cargo {arguments:?}");
}

/// Has the registry serve all packages of these lockfiles from what cargo has fetched. Says how many
/// they are.
pub fn publish(lockfiles: &str, registry: &Registry) -> usize {
    let home = std::env::var_os("CARGO_HOME").map_or_else(
        || Path::new(&std::env::var_os("HOME").unwrap()).join(".cargo"),
        PathBuf::from,
    );
    let mut packages: Vec<(String, String)> = Vec::new();
    let mut name = "";
    let mut version = "";
    for line in lockfiles.lines() {
        let value = |key: &str| line.strip_prefix(key)?.strip_prefix(" = ");
        if let Some(value) = value("name") {
            name = value.trim_matches('"');
        } else if let Some(value) = value("version") {
            version = value.trim_matches('"');
        } else if line.starts_with("source = ") {
            packages.push((name.to_owned(), version.to_owned()));
        }
    }
    packages.sort();
    packages.dedup();
    for (name, version) in &packages {
        let archive = found(
            &home.join("registry/cache"),
            &format!("{name}-{version}.crate"),
        );
        let known = found(&home.join("registry/index"), &index_path(name));
        let line = line_of(&fs::read(known).unwrap(), version);
        let line = line.unwrap_or_else(|| panic!("the index has no {name} {version}"));
        registry.add(name, version, line, fs::read(archive).unwrap().into());
    }
    packages.len()
}

/// The file at this path in any of the registries' folders.
fn found(folder: &Path, path: &str) -> PathBuf {
    let registries = fs::read_dir(folder).unwrap();
    let mut paths = registries.map(|registry| registry.unwrap().path().join(path));
    let found = paths.find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{path} was not fetched"))
}

/// The path of a name in a sparse index of cargo.
fn index_path(name: &str) -> String {
    let name = name.to_lowercase();
    let folder = match name.len() {
        1 => "1".to_owned(),
        2 => "2".to_owned(),
        3 => format!("3/{}", &name[..1]),
        _ => format!("{}/{}", &name[..2], &name[2..4]),
    };
    format!(".cache/{folder}/{name}")
}

/// The index's line for a version: cargo keeps them behind a head of five bytes and a revision, as
/// pairs of version and line that end in zeros (`IndexSummaries` of its `sources/registry/index`).
fn line_of(cached: &[u8], version: &str) -> Option<String> {
    let mut parts = cached.get(5..)?.split(|byte| *byte == 0).skip(1);
    while let (Some(its), Some(line)) = (parts.next(), parts.next()) {
        if its == version.as_bytes() {
            return String::from_utf8(line.to_vec()).ok();
        }
    }
    None
}
