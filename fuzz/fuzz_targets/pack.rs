//! Bytes from the cache service that may be no pack.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sccache_action::packs::pack;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(stored) = pack::read(bytes, "key#00000001") {
        assert!(stored.index.packs.values().all(|pack| pack.is_sound()));
    }
});
