//! Bytes from the cache service that may be no manifest of the cargo cache, or one that means harm.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sccache_action::cargo::files;
use sccache_action::cargo::lockfile::Lockfile;
use sccache_action::cargo::manifest::Manifest;

const LOCKFILE: &str = r#"
[[package]]
name = "a"
version = "1.0.0"
source = "registry+https://registry.example/index"
"#;

fuzz_target!(|plain: &[u8]| {
    let _ = Manifest::from_bytes(plain);
    // As it is stored, so that what is inside is reached.
    let Ok(stored) = zstd::bulk::compress(plain, 1) else {
        return;
    };
    let Ok(manifest) = Manifest::from_bytes(&stored) else {
        return;
    };
    let Ok(lockfile) = Lockfile::parse(LOCKFILE) else {
        return;
    };
    let wanted = manifest.wanted(&lockfile, true);
    assert!(wanted.iter().all(|number| *number < manifest.parts.len()));
    let Ok(folder) = tempfile::tempdir() else {
        return;
    };
    let root = folder.path().join("root");
    for part in manifest.parts.iter().take(4) {
        // Its content is whatever it is.
        let _ = files::put(&root, part, &*stored);
    }
    let names = std::fs::read_dir(folder.path()).into_iter().flatten();
    let names: Vec<_> = names.flatten().map(|entry| entry.file_name()).collect();
    assert!(names.iter().all(|name| name == "root"), "{names:?}");
});
