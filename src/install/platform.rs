//! Which of sccache's release assets runs here.

use std::fmt;

use semver::Version;

/// An operating system and a processor, by Rust's names for them (`std::env::consts`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Platform {
    /// The operating system: `linux`, `macos`, `windows`.
    pub os: &'static str,
    /// The processor: `x86_64`, `aarch64` and so on.
    pub arch: &'static str,
}

/// The targets that sccache releases archives for (`.github/workflows/ci.yml` of sccache; not every
/// version has them all). Those of musl are static, so they run whatever the C library.
const TARGETS: [(&str, &str, &str); 10] = [
    ("linux", "x86_64", "x86_64-unknown-linux-musl"),
    ("linux", "aarch64", "aarch64-unknown-linux-musl"),
    ("linux", "arm", "armv7-unknown-linux-musleabi"),
    ("linux", "x86", "i686-unknown-linux-musl"),
    ("linux", "riscv64", "riscv64gc-unknown-linux-musl"),
    ("linux", "s390x", "s390x-unknown-linux-gnu"),
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

    /// The name, without `.tar.gz`, of the release asset of `version`. It is also the name of the
    /// folder in it.
    ///
    /// # Errors
    /// Where there is no release for this platform.
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

    /// Its name as `dist/manifest.json` has it, in node's words: `linux-x64`.
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
