//! A crate's archive from the cache, which may mean harm.

#![no_main]

use std::fs;
use std::io::Write;

use libfuzzer_sys::fuzz_target;
use sccache_action::cargo_cache::home;

fuzz_target!(|bytes: &[u8]| {
    let Ok(folder) = tempfile::tempdir() else {
        return;
    };
    let registry = folder.path().join("registry");
    let cache = registry.join("cache/index");
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
    if fs::create_dir_all(&cache).is_err() || gz.write_all(bytes).is_err() {
        return;
    }
    let Ok(archive) = gz.finish() else {
        return;
    };
    if fs::write(cache.join("a-1.0.0.crate"), archive).is_err() {
        return;
    }
    let unpacked = home::unpack(&registry, "cache/index/a-1.0.0.crate", |_, _| true, &|_| {
        Ok(())
    });
    let names = |folder| -> Vec<_> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name()).collect()
    };
    assert_eq!(names(folder.path()), ["registry"]);
    let beside = names(&registry.join("src/index"));
    assert!(beside.is_empty() || beside == ["a-1.0.0"], "{beside:?}");
    assert!(unpacked.is_ok() || beside.is_empty());
});
