//! An index that is genuine by its digest and may say anything, and all that is done with one.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sccache_action::clock::Timestamp;
use sccache_action::digest::Digest;
use sccache_action::packs::pack::{self, MAGIC};

fuzz_target!(|bytes: &[u8]| {
    let mut entry = MAGIC.to_vec();
    entry.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    entry.extend_from_slice(Digest::of(bytes).as_bytes());
    entry.extend_from_slice(bytes);
    let Ok(stored) = pack::read(&entry, "key#00000001") else {
        return;
    };
    let (whole, _) = stored.clone().resolve(Some(&stored.index));
    assert!(whole.packs.values().all(|pack| pack.is_sound()));
    let (index, _) = stored.resolve(None);
    assert!(index.packs.values().all(|pack| pack.is_sound()));
    let mut merged = index.clone();
    merged.merge(index.clone());
    assert_eq!(merged, index);
    let repack_candidates = merged.repack_candidates(2, |_| true);
    assert!(
        repack_candidates
            .iter()
            .all(|name| index.packs.contains_key(name))
    );
    merged.retain(Timestamp::from_seconds(1_800_000_000), 1 << 30);
    assert!(merged.size() <= 1 << 30);
    if let Ok(written) = pack::encode_head(&index, None) {
        let read = pack::read(&written.bytes, "key#00000002").expect("what was written is read");
        assert_eq!(read.resolve(None).0, index);
    }
});
