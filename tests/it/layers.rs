//! The rooms of `src/` use only those that ARCHITECTURE.md's table has above them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms, from the ground up, as the table names them.
fn rooms(architecture: &str) -> Vec<String> {
    let table = architecture
        .split("## What is where")
        .nth(1)
        .and_then(|rest| rest.split("\nElsewhere:").next())
        .unwrap();
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| row.split('`').next().unwrap().to_owned())
        .collect()
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.append(&mut sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// The rooms that `source` names in `crate::` paths outside of comments. A path that begins with a brace
/// would hide them, so there is none.
fn used(source: &str) -> BTreeSet<String> {
    let mut rooms = BTreeSet::new();
    for line in source.lines() {
        let code = line.split("//").next().unwrap();
        for path in code.split("crate::").skip(1) {
            assert!(!path.starts_with('{'), "one path for each room: {line}");
            let end = path.find(|letter: char| !(letter.is_ascii_lowercase() || letter == '_'));
            rooms.insert(path[..end.unwrap_or(path.len())].to_owned());
        }
    }
    rooms
}

#[test]
fn a_room_uses_only_those_below_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rooms = rooms(&fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap());
    let height = |room: &str| rooms.iter().position(|known| known == room);
    let mut upwards = Vec::new();
    let mut seen = BTreeSet::new();
    for path in sources(&root.join("src")) {
        let inner = path.strip_prefix(root.join("src")).unwrap();
        let first = inner.components().next().unwrap().as_os_str();
        let room = Path::new(first).file_stem().unwrap().to_str().unwrap();
        if room == "lib" {
            continue;
        }
        let own = height(room).unwrap_or_else(|| panic!("ARCHITECTURE.md has no room {room}"));
        seen.insert(room.to_owned());
        for other in used(&fs::read_to_string(&path).unwrap()) {
            // Other crates' paths, in texts, name no room.
            if other != room && height(&other).is_some_and(|height| height >= own) {
                upwards.push(format!("{} uses {other}", inner.display()));
            }
        }
    }
    assert!(upwards.is_empty(), "{}", upwards.join("\n"));
    let listed: BTreeSet<String> = rooms.into_iter().collect();
    assert_eq!(
        seen, listed,
        "the rooms of src/ and those of ARCHITECTURE.md"
    );
}
