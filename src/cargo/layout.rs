//! Which runs may share compiled units.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// The version of what is stored: a change of the manifests' form changes it, so that no run meets
/// one that it cannot read.
const FORMAT: &str = "cargo cache 1";

/// A digest of all that compiled units depend on and that cargo does not see to, or sees to too late
/// for their download to be spared: the compiler, the system, where the folders are, and the
/// variables that build scripts go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Layout(pub [u8; 8]);

/// What a layout is made of.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// What `rustc -vV` says.
    pub rustc: &'a str,
    /// The system's name and version: build scripts find its libraries.
    pub system: &'a str,
    /// Cargo's home. Its path is in what was compiled.
    pub home: &'a Path,
    /// The target folders. So are theirs.
    pub targets: &'a [std::path::PathBuf],
}

impl Layout {
    /// The layout of a run with these facts and variables.
    pub fn of<'a>(facts: &Facts<'_>, variables: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut add = |text: &[u8]| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text);
        };
        for text in [FORMAT, facts.rustc, facts.system] {
            add(text.as_bytes());
        }
        add(facts.home.as_os_str().as_encoded_bytes());
        for target in facts.targets {
            add(target.as_os_str().as_encoded_bytes());
        }
        let mut variables: Vec<(&str, &str)> =
            variables.filter(|(name, _)| matters(name)).collect();
        variables.sort_unstable();
        for (name, value) in variables {
            add(name.as_bytes());
            add(value.as_bytes());
        }
        let digest = hasher.finalize();
        let mut layout = [0; 8];
        let bytes = digest.as_bytes().iter();
        layout
            .iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
        Self(layout)
    }
}

/// Whether compilers and build scripts go by this variable, as far as names tell: those that
/// rust-cache keys its archives by and those that the `cc` crate reads, without what only says how
/// cargo talks or where it downloads.
fn matters(name: &str) -> bool {
    /// Tools, each also with a target behind an underscore.
    const TOOLS: [&str; 12] = [
        "AR",
        "CC",
        "CFLAGS",
        "CMAKE",
        "CPPFLAGS",
        "CXX",
        "CXXFLAGS",
        "LDFLAGS",
        "MACOSX_DEPLOYMENT_TARGET",
        "NM",
        "PKG_CONFIG",
        "RANLIB",
    ];
    const OTHERS: [&str; 12] = [
        // Of no influence on what is compiled.
        "CARGO_HTTP_",
        "CARGO_INCREMENTAL",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "CARGO_TERM_",
        "RUST_BACKTRACE",
        "RUST_LOG",
        // The compiler is known by what it says, and the folders are facts of their own.
        "CARGO_BUILD_TARGET_DIR",
        "CARGO_HOME",
        "CARGO_TARGET_DIR",
        "RUSTC_WRAPPER",
        "RUSTUP_",
    ];
    let tool = ["HOST_", "TARGET_"]
        .iter()
        .find_map(|side| name.strip_prefix(side))
        .unwrap_or(name);
    let is_tool = TOOLS.iter().any(|known| {
        let rest = tool.strip_prefix(known);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
    });
    let is_launcher = name.starts_with("CMAKE_") && name.ends_with("_COMPILER_LAUNCHER");
    let is_rusts = name.starts_with("CARGO_") || name.starts_with("RUST");
    (is_tool || is_rusts) && !OTHERS.iter().any(|other| name.starts_with(other)) && !is_launcher
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn layout(rustc: &str, target: &str, variables: &[(&str, &str)]) -> Layout {
        let facts = Facts {
            rustc,
            system: "ubuntu 24.04",
            home: Path::new("/home/cargo"),
            targets: &[PathBuf::from(target)],
        };
        Layout::of(&facts, variables.iter().copied())
    }

    #[test]
    fn what_changes_what_is_compiled_changes_the_layout_and_nothing_else_does() {
        let plain = layout("rustc 1", "/w/target", &[]);
        assert_eq!(plain, layout("rustc 1", "/w/target", &[]));
        assert_ne!(plain, layout("rustc 2", "/w/target", &[]));
        assert_ne!(plain, layout("rustc 1", "/v/target", &[]));
        for name in [
            "RUSTFLAGS",
            "CC",
            "CFLAGS_x86_64_unknown_linux_gnu",
            "HOST_CXX",
            "CARGO_PROFILE_DEV_DEBUG",
        ] {
            let with = layout("rustc 1", "/w/target", &[(name, "x")]);
            assert_ne!(plain, with, "{name}");
        }
        for name in [
            "CARGO_TERM_COLOR",
            "CARGO_REGISTRY_TOKEN",
            "RUSTUP_TOOLCHAIN",
            "RUST_LOG",
            "CMAKE_C_COMPILER_LAUNCHER",
            "GITHUB_RUN_ID",
            "ARTIFACT_FOLDER",
        ] {
            let with = layout("rustc 1", "/w/target", &[(name, "x")]);
            assert_eq!(plain, with, "{name}");
        }
        // The order of variables is no difference.
        let pair = [("CC", "gcc"), ("CXX", "g++")];
        let turned = [pair[1], pair[0]];
        assert_eq!(
            layout("rustc 1", "/w/target", &pair),
            layout("rustc 1", "/w/target", &turned)
        );
    }
}
