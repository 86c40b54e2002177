//! The project to build: `benches/rust`, with a few crates of its own beside the program, and in
//! the state before some of its dependencies were bumped.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use crate::crates::{cargo, publish};
use crate::registry::Registry;

/// The dependencies that are bumped one after the other: their names, the versions before, and those
/// of `benches/rust`. The first has many that depend on it, the last has few.
const BUMPED: [(&str, &str, &str); 4] = [
    ("serde_json", "1.0.150", "1.0.154"),
    ("anyhow", "1.0.103", "1.0.104"),
    ("uuid", "1.23.4", "1.29.3"),
    ("semver", "1.0.27", "1.0.28"),
];

/// How many crates the workspace has besides the program.
const MEMBERS: usize = 6;

/// How many types each of them has.
const TYPES: usize = 60;

/// The project in all its states.
pub struct Project {
    folder: PathBuf,
    packages: usize,
}

impl Project {
    /// Makes the states in `folder`, and has `registry` serve what they need: each crate is fetched
    /// by cargo, from wherever this machine fetches crates.
    pub fn prepare(folder: &Path, registry: &Registry) -> Self {
        let project = Self {
            folder: folder.to_owned(),
            packages: 0,
        };
        let mut lockfiles = String::new();
        for bumps in 0..=BUMPED.len() {
            let sources = project.sources(bumps);
            write_sources(&sources, bumps);
            let config = sources.join(".cargo");
            cargo(&sources, &["fetch", "--quiet"]);
            // The lockfile of benches/rust has the bumped dependencies in their later versions.
            for (name, before, _) in &BUMPED[bumps..] {
                cargo(
                    &sources,
                    &["update", "--quiet", "-p", name, "--precise", before],
                );
            }
            cargo(&sources, &["fetch", "--quiet", "--locked"]);
            fs::create_dir_all(&config).unwrap();
            fs::write(config.join("config.toml"), registry.config()).unwrap();
            lockfiles += &fs::read_to_string(sources.join("Cargo.lock")).unwrap();
        }
        let packages = publish(&lockfiles, registry);
        Self {
            packages: packages - BUMPED.len(),
            ..project
        }
    }

    /// The sources after this many bumps.
    pub fn sources(&self, bumps: usize) -> PathBuf {
        self.folder.join(format!("sources-{bumps}"))
    }

    /// How many bumps there are.
    pub fn bumps(&self) -> usize {
        BUMPED.len()
    }

    /// A description of it.
    pub fn description(&self) -> String {
        format!(
            "a program and {MEMBERS} crates of its own on {} crates of a registry, cargo build",
            self.packages
        )
    }
}

/// The text of a crate of the workspace, after this many changes of its code.
pub fn member(number: usize, code: usize) -> String {
    let mut text = String::from("use serde::{Deserialize, Serialize};\n");
    for kind in 0..TYPES {
        writeln!(
            text,
            "#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]\n\
             pub struct T{kind} {{ pub a: u64, pub b: String, pub c: Option<Vec<u32>>, pub d: f64 }}\n\
             impl T{kind} {{\n\
             pub fn text(&self) -> String {{ serde_json::to_string(self).unwrap_or_default() }}\n\
             pub fn read(text: &str) -> Option<Self> {{ serde_json::from_str(text).ok() }}\n}}"
        )
        .unwrap();
    }
    writeln!(
        text,
        "pub fn version() -> &'static str {{ \"{number}.{code}\" }}"
    )
    .unwrap();
    text
}

fn write_sources(folder: &Path, bumps: usize) {
    let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/rust"));
    let mut manifest = fs::read_to_string(source.join("Cargo.toml")).unwrap();
    for (name, before, after) in &BUMPED[bumps..] {
        let line = manifest.lines().find(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(" = "))
        });
        let line = line
            .unwrap_or_else(|| panic!("{name} is no dependency"))
            .to_owned();
        let changed = line.replace(after, before);
        assert_ne!(line, changed, "{name} is not at {after}");
        manifest = manifest.replace(&line, &changed);
    }
    let members: Vec<String> = (0..MEMBERS)
        .map(|number| format!("\"member{number}\""))
        .collect();
    let workspace = format!("[workspace]\nmembers = [{}]\n", members.join(", "));
    manifest = manifest.replace("[workspace]\n", &workspace);
    for number in 0..MEMBERS {
        writeln!(manifest, "member{number} = {{ path = \"member{number}\" }}").unwrap();
        let member_folder = folder.join(format!("member{number}"));
        fs::create_dir_all(member_folder.join("src")).unwrap();
        let text = format!(
            "[package]\nname = \"member{number}\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\
             [dependencies]\nserde = {{ version = \"1\", features = [\"derive\"] }}\nserde_json = \"1\"\n"
        );
        fs::write(member_folder.join("Cargo.toml"), text).unwrap();
        fs::write(member_folder.join("src/lib.rs"), member(number, 0)).unwrap();
    }
    fs::create_dir_all(folder.join("src")).unwrap();
    fs::write(folder.join("Cargo.toml"), manifest).unwrap();
    fs::copy(source.join("Cargo.lock"), folder.join("Cargo.lock")).unwrap();
    let main = fs::read_to_string(source.join("src/main.rs")).unwrap();
    let uses: String = (0..MEMBERS)
        .map(|number| format!("#[allow(unused_imports)]\nuse member{number} as _;\n"))
        .collect();
    fs::write(folder.join("src/main.rs"), insert_after_head(&main, &uses)).unwrap();
}

/// Inner attributes and comments of a file stand before anything else.
fn insert_after_head(text: &str, inserted: &str) -> String {
    let is_head = |line: &&str| line.starts_with("//!") || line.starts_with("#![");
    let head: Vec<&str> = text.lines().take_while(is_head).collect();
    let rest: Vec<&str> = text.lines().skip(head.len()).collect();
    format!("{}\n{inserted}{}\n", head.join("\n"), rest.join("\n"))
}
