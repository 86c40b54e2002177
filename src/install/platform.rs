//! Finds the release asset of sccache that runs on this platform.

use std::fmt;

use semver::Version;

use crate::runner::environment::Environment;

/// An operating system and a processor, by Rust's names for them (`std::env::consts`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Platform {
    /// The operating system: `linux`, `macos`, `windows`.
    pub os: &'static str,
    /// The processor: `x86_64`, `aarch64` and so on.
    pub arch: &'static str,
}

/// The targets that sccache releases archives for (`.github/workflows/ci.yml` of sccache; not every
/// version has them all). Those of musl are static, so they run with any C library.
const TARGETS: [(&str, &str, &str); 10] = [
    ("linux", "x86_64", "x86_64-unknown-linux-musl"),
    ("linux", "aarch64", "aarch64-unknown-linux-musl"),
    ("linux", "arm", "armv7-unknown-linux-musleabi"),
    ("linux", "x86", "i686-unknown-linux-musl"),
    ("linux", "riscv64", "riscv64gc-unknown-linux-musl"),
    ("linux", "s390x", "s390x-unknown-linux-musl"),
    ("macos", "x86_64", "x86_64-apple-darwin"),
    ("macos", "aarch64", "aarch64-apple-darwin"),
    ("windows", "x86_64", "x86_64-pc-windows-msvc"),
    ("windows", "aarch64", "aarch64-pc-windows-msvc"),
];

/// A platform that sccache has no release for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "sccache has no release for {platform}; it has one for {}",
    supported()
)]
pub struct UnsupportedPlatform {
    platform: Platform,
}

fn supported() -> String {
    let names: Vec<String> = TARGETS
        .iter()
        .map(|(os, arch, _)| format!("{os} {arch}"))
        .collect();
    names.join(", ")
}

impl fmt::Display for Platform {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.os, self.arch)
    }
}

impl Platform {
    /// The one this binary was built for.
    pub const fn current() -> Self {
        Self {
            os: std::env::consts::OS,
            arch: std::env::consts::ARCH,
        }
    }

    /// The platform of this job. If the runner is one for Windows on Arm (`RUNNER_ARCH` is
    /// `ARM64`), this binary may be the one for x64, which Windows runs there too, but sccache is
    /// the one for Arm.
    pub fn of(environment: &Environment) -> Self {
        Self::current().on(environment.get("RUNNER_ARCH"))
    }

    fn on(self, runner_arch: Option<&str>) -> Self {
        match (self.os, runner_arch) {
            ("windows", Some("ARM64")) => Self {
                arch: "aarch64",
                ..self
            },
            _ => self,
        }
    }

    /// The name, without `.tar.gz`, of the release asset of `version`. The folder in it has the
    /// same name.
    ///
    /// # Errors
    /// Fails if there is no release for this platform.
    pub fn asset(&self, version: &Version) -> Result<String, UnsupportedPlatform> {
        TARGETS
            .iter()
            .find(|(os, arch, _)| (*os, *arch) == (self.os, self.arch))
            .map(|(_, _, target)| format!("sccache-v{version}-{target}"))
            .ok_or(UnsupportedPlatform { platform: *self })
    }

    /// The name of sccache's file.
    pub fn binary(&self) -> &'static str {
        if self.os == "windows" {
            "sccache.exe"
        } else {
            "sccache"
        }
    }

    /// Its name in `dist/manifest.json`, in node's form: `linux-x64`.
    pub fn runner(&self) -> String {
        let os = match self.os {
            "macos" => "darwin",
            "windows" => "win32",
            other => other,
        };
        format!("{os}-{}", self.tool_cache_arch())
    }

    /// The processor's name in the tool cache: node's (`process.arch`).
    pub fn tool_cache_arch(&self) -> &'static str {
        match self.arch {
            "x86_64" => "x64",
            "aarch64" => "arm64",
            "x86" => "ia32",
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::RELEASE_DIGESTS;

    #[test]
    fn an_asset_is_named_as_sccache_names_it() {
        let linux = Platform {
            os: "linux",
            arch: "x86_64",
        };
        assert_eq!(
            linux.asset(&Version::new(0, 16, 0)).unwrap(),
            "sccache-v0.16.0-x86_64-unknown-linux-musl"
        );
        assert_eq!(linux.tool_cache_arch(), "x64");
    }

    #[test]
    fn on_windows_on_arm_sccache_is_the_one_for_arm_and_elsewhere_the_binarys_own() {
        let on = |os, arch, runner| Platform { os, arch }.on(runner).runner();
        assert_eq!(on("windows", "x86_64", Some("ARM64")), "win32-arm64");
        assert_eq!(on("windows", "x86_64", Some("X64")), "win32-x64");
        assert_eq!(on("windows", "x86_64", None), "win32-x64");
        assert_eq!(on("linux", "x86_64", Some("ARM64")), "linux-x64");
    }

    #[test]
    fn each_target_is_one_that_sccache_has_released_an_archive_for() {
        for (os, arch, target) in TARGETS {
            // These two are built for some versions only, and none of them is among the digests.
            if arch == "arm" || arch == "x86" {
                continue;
            }
            let platform = Platform { os, arch };
            let asset = platform.asset(&Version::new(0, 16, 0)).unwrap();
            assert!(RELEASE_DIGESTS.of(&asset).is_some(), "{target}");
        }
    }

    #[test]
    fn an_unsupported_platform_is_named_with_those_that_are_not() {
        let platform = Platform {
            os: "freebsd",
            arch: "x86_64",
        };
        let error = platform.asset(&Version::new(0, 16, 0)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("freebsd x86_64"), "{text}");
        assert!(text.contains("windows aarch64"), "{text}");
    }
}
