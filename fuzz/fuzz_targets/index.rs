//! An index that is genuine by its digest and may say anything, and all that is done with one.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sccache_action::store::index::Digest;
use sccache_action::store::pack::{self, MAGIC};

fuzz_target!(|bytes: &[u8]| {
    let mut entry = MAGIC.to_vec();
    entry.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    entry.extend_from_slice(Digest::of(bytes).as_bytes());
    entry.extend_from_slice(bytes);
    let Ok(index) = pack::read(&entry, "key#00000001") else {
        return;
    };
    assert!(index.packs.values().all(|pack| pack.is_sound()));
    let mut merged = index.clone();
    merged.merge(index.clone());
    assert_eq!(merged, index);
    let wasteful = merged.wasteful(2, |_| true);
    assert!(wasteful.iter().all(|name| index.packs.contains_key(name)));
    merged.retain(1_800_000_000, 1 << 30);
    assert!(merged.size() <= 1 << 30);
    if let Ok(written) = pack::begin(index.clone()) {
        let read = pack::read(&written, "key#00000002").expect("what was written is read");
        assert_eq!(read, index);
    }
});
