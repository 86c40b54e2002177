//! Bytes from the cache service that may be no pack.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sccache_action::store::pack;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(index) = pack::read(bytes, "key#00000001") {
        assert!(index.packs.values().all(|pack| pack.is_sound()));
    }
});
