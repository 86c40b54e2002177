//! Bytes that may be no archive of a release, or one that means harm.

#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use sccache_action::install::archive::unpack;

fuzz_target!(|bytes: &[u8]| {
    let Ok(folder) = tempfile::tempdir() else {
        return;
    };
    let target = folder.path().join("sccache");
    let _ = unpack(bytes, "folder", "sccache", &target);
    // It is compressed, so that the fuzzer reaches the content.
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
    if gz.write_all(bytes).is_err() {
        return;
    }
    let Ok(compressed) = gz.finish() else {
        return;
    };
    let unpacked = unpack(&*compressed, "folder", "sccache", &target);
    let Ok(entries) = std::fs::read_dir(folder.path()) else {
        return;
    };
    let names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    assert!(names.iter().all(|name| name == "sccache"), "{names:?}");
    assert!(unpacked.is_err() || target.is_file());
});
