//! Bytes from the cache service that may be no manifest of the cargo cache, or one that means harm: with
//! links to anywhere, numbers and sizes at their ends, and names of all kinds.

#![no_main]

use std::time::SystemTime;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use sccache_action::cargo_cache::files;
use sccache_action::cargo_cache::home;
use sccache_action::cargo_cache::lockfile::Lockfile;
use sccache_action::cargo_cache::manifest::{
    BaseDir, CacheManifest, CachePart, FileEntry, FileKind, Package,
};
use sccache_action::packs::index::ObjectKey;

const LOCKFILE: &str = r#"
[[package]]
name = "a"
version = "1.0.0"
source = "registry+https://registry.example/index"
"#;

/// Names that lead somewhere, and a few that do not.
const NAMES: [&str; 16] = [
    "a", "b", "c", "..", ".", "", "/", "a/b", "a/b/c", "../..", "a/..", "l/..", ".git", "config",
    "hooks", "deps",
];

/// Lengths and numbers at their ends.
const NUMBERS: [u64; 8] = [
    0,
    1,
    4,
    files::PART_LIMIT,
    files::PART_LIMIT + 1,
    u32::MAX as u64,
    u64::MAX / 2,
    u64::MAX,
];

#[derive(Arbitrary, Debug)]
enum Kind {
    Folder,
    File(u8, u32),
    Text(u8, u32),
    Link(u8),
    LinkFar(u32),
    Symlink(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Forged {
    path: Vec<u8>,
    kind: Kind,
}

#[derive(Arbitrary, Debug)]
enum Given<'a> {
    Bytes(&'a [u8]),
    Parts(Vec<(Option<Vec<u8>>, Vec<Forged>)>),
}

fn path(names: &[u8]) -> String {
    let names = names.iter().take(5);
    let names: Vec<&str> = names
        .map(|n| NAMES[usize::from(*n) % NAMES.len()])
        .collect();
    names.join("/")
}

fn number(choice: u8) -> u64 {
    NUMBERS[usize::from(choice) % NUMBERS.len()]
}

fn forged(commit_marker: Option<Vec<u8>>, entries: Vec<Forged>) -> CachePart {
    let entries = entries.into_iter().take(12).map(|forged| FileEntry {
        path: path(&forged.path),
        kind: match forged.kind {
            Kind::Folder => FileKind::Folder,
            Kind::File(length, mode) => FileKind::File {
                length: number(length),
                mode,
            },
            Kind::Text(length, mode) => FileKind::Text {
                length: number(length),
                mode,
            },
            Kind::Link(number) => FileKind::Link(u32::from(number) % 12),
            Kind::LinkFar(number) => FileKind::Link(number),
            Kind::Symlink(target) => FileKind::Symlink(path(&target)),
        },
        modified: SystemTime::UNIX_EPOCH.into(),
    });
    CachePart {
        base: BaseDir::Git,
        name: "part".to_owned(),
        commit_marker: commit_marker.map(|commit_marker| path(&commit_marker)),
        package: Package::Several,
        chunk: ObjectKey([7; 32]),
        entries: entries.collect(),
        needs: Vec::new(),
        used: u32::MAX,
        path_dependent: false,
    }
}

fn parts_of(plain: &[u8], stored: &[u8]) -> Vec<CachePart> {
    let _ = CacheManifest::from_bytes(plain);
    // It is in its stored form, so that the fuzzer reaches the content.
    let Ok(manifest) = CacheManifest::from_bytes(stored) else {
        return Vec::new();
    };
    if let Ok(lockfile) = Lockfile::parse(LOCKFILE) {
        let wanted = manifest.wanted(&lockfile, |_| true);
        assert!(wanted.iter().all(|number| *number < manifest.parts.len()));
    }
    manifest.parts
}

fuzz_target!(|given: Given| {
    let content = match &given {
        Given::Bytes(plain) => plain,
        Given::Parts(_) => &b"some text that files are made of"[..],
    };
    let Ok(stored) = zstd::bulk::compress(content, 1) else {
        return;
    };
    let parts = match given {
        Given::Bytes(plain) => parts_of(plain, &stored),
        Given::Parts(parts) => {
            let parts = parts.into_iter();
            parts
                .map(|(commit_marker, entries)| forged(commit_marker, entries))
                .collect()
        }
    };
    let Ok(folder) = tempfile::tempdir() else {
        return;
    };
    let root = folder.path().join("root");
    for part in parts.iter().take(4) {
        let _ = (home::is_of_git(part), home::is_of_registry(part));
        // Its content is arbitrary.
        let conditions = files::Conditions {
            accepts: &|_, _| Ok(true),
            checkpoint: &|_| Ok(()),
        };
        let _ = files::extract(&root, part, &*stored, conditions);
    }
    let names = std::fs::read_dir(folder.path()).into_iter().flatten();
    let names: Vec<_> = names.flatten().map(|entry| entry.file_name()).collect();
    assert!(names.iter().all(|name| name == "root"), "{names:?}");
});
