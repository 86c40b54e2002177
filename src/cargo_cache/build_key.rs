//! The build key: runs with the same key may share compiled units.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// The version of the stored format. It changes with the format of manifests, so that no run finds one that
/// it cannot read.
const FORMAT: &str = "cargo cache 2";

/// A digest of everything that compiled units depend on and cargo does not check, or checks too late to
/// avoid their download: the compiler, the system, the path of cargo's home, and the variables that build
/// scripts read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BuildKey(pub [u8; 8]);

/// The parts of a build key besides variables.
#[derive(Clone, Copy, Debug)]
pub struct BuildEnvironment<'a> {
    /// The output of `rustc -vV`.
    pub rustc: &'a str,
    /// The system's name and version: build scripts find its libraries.
    pub system: &'a str,
    /// Cargo's home. Compiled units have its path in them.
    pub home: &'a Path,
}

impl BuildKey {
    /// The build key of a run in this environment with these variables.
    pub fn of<'a>(
        environment: &BuildEnvironment<'_>,
        variables: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut add = |text: &[u8]| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text);
        };
        for text in [FORMAT, environment.rustc, environment.system] {
            add(text.as_bytes());
        }
        add(environment.home.as_os_str().as_encoded_bytes());
        let mut variables: Vec<(&str, &str)> =
            variables.filter(|(name, _)| matters(name)).collect();
        variables.sort_unstable();
        for (name, value) in variables {
            add(name.as_bytes());
            add(value.as_bytes());
        }
        let digest = hasher.finalize();
        let mut build_key = [0; 8];
        let bytes = digest.as_bytes().iter();
        build_key
            .iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
        Self(build_key)
    }
}

/// Whether compilers and build scripts read this variable, as far as its name tells: the variables in
/// rust-cache's keys and those that the `cc` crate reads, without those that only set cargo's output or
/// downloads.
fn matters(name: &str) -> bool {
    /// Tools, each also followed by an underscore and a target.
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
    const OTHERS: [&str; 13] = [
        // These do not influence compiled code.
        "CARGO_HTTP_",
        "CARGO_INCREMENTAL",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "CARGO_TERM_",
        "RUST_BACKTRACE",
        "RUST_LOG",
        // The key has the compiler's own version text and cargo's home already, and each unit notes whether
        // it depends on its build directory.
        "CARGO_BUILD_BUILD_DIR",
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
    use super::*;

    fn build_key(rustc: &str, home: &str, variables: &[(&str, &str)]) -> BuildKey {
        let environment = BuildEnvironment {
            rustc,
            system: "ubuntu 24.04",
            home: Path::new(home),
        };
        BuildKey::of(&environment, variables.iter().copied())
    }

    #[test]
    fn what_changes_what_is_compiled_changes_the_layout_and_nothing_else_does() {
        let plain = build_key("rustc 1", "/home/cargo", &[]);
        assert_eq!(plain, build_key("rustc 1", "/home/cargo", &[]));
        assert_ne!(plain, build_key("rustc 2", "/home/cargo", &[]));
        assert_ne!(plain, build_key("rustc 1", "/other", &[]));
        for name in [
            "RUSTFLAGS",
            "CC",
            "CFLAGS_x86_64_unknown_linux_gnu",
            "HOST_CXX",
            "CARGO_PROFILE_DEV_DEBUG",
        ] {
            let with = build_key("rustc 1", "/home/cargo", &[(name, "x")]);
            assert_ne!(plain, with, "{name}");
        }
        for name in [
            "CARGO_BUILD_BUILD_DIR",
            "CARGO_TARGET_DIR",
            "CARGO_TERM_COLOR",
            "CARGO_REGISTRY_TOKEN",
            "RUSTUP_TOOLCHAIN",
            "RUST_LOG",
            "CMAKE_C_COMPILER_LAUNCHER",
            "GITHUB_RUN_ID",
            "ARTIFACT_FOLDER",
        ] {
            let with = build_key("rustc 1", "/home/cargo", &[(name, "x")]);
            assert_eq!(plain, with, "{name}");
        }
        // The order of variables does not matter.
        let pair = [("CC", "gcc"), ("CXX", "g++")];
        let turned = [pair[1], pair[0]];
        assert_eq!(
            build_key("rustc 1", "/home/cargo", &pair),
            build_key("rustc 1", "/home/cargo", &turned)
        );
    }
}
