//! Text that may be no lockfile of cargo's.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sccache_action::cargo_cache::lockfile::Lockfile;

fuzz_target!(|text: &str| {
    if let Ok(lockfile) = Lockfile::parse(text) {
        let _ = lockfile.cacheable();
    }
});
