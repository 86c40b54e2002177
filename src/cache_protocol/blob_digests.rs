//! The digests of a blob's bytes, so that a blob that changed on its disk is never served. Functions of
//! values.
//!
//! A blob has one for each [`CHUNK`] of it, so that a range is checked without the rest being read.
//! They protect against damage, and against anyone who can write the blobs but not the catalog.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use bytes::Bytes;

/// The bytes that one digest covers; the last digest of a blob may cover fewer.
pub const CHUNK: u64 = 1 << 20;

/// The bytes of a digest: the first of BLAKE3's.
const DIGEST: usize = 16;

/// The digests of a blob, one behind the other. They are empty for a blob that an older service
/// wrote without digests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Digests(Arc<[u8]>);

impl Digests {
    /// Whether there are none, so that nothing can be checked.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How much memory they take, in bytes.
    pub fn size(&self) -> usize {
        self.0.len()
    }

    /// Whether `pieces`, one behind the other, match the digest of the chunk of this number.
    pub fn are_of(&self, chunk: u64, pieces: &[Bytes]) -> bool {
        let begin = usize::try_from(chunk)
            .ok()
            .and_then(|chunk| chunk.checked_mul(DIGEST));
        let expected = begin.and_then(|begin| self.0.get(begin..begin + DIGEST));
        let mut hasher = blake3::Hasher::new();
        for piece in pieces {
            hasher.update(piece);
        }
        expected == Some(&hasher.finalize().as_bytes()[..DIGEST])
    }

    /// The digests as a text.
    pub fn encode(&self) -> String {
        STANDARD_NO_PAD.encode(&self.0)
    }

    /// Decodes digests; `None` if `text` has none.
    pub fn decode(text: &str) -> Option<Self> {
        let bytes = STANDARD_NO_PAD.decode(text).ok()?;
        bytes
            .len()
            .is_multiple_of(DIGEST)
            .then(|| Self(bytes.into()))
    }
}

/// Takes the digests of bytes as they come.
#[derive(Debug, Default)]
pub struct Digester {
    hasher: blake3::Hasher,
    /// The bytes of the current chunk that the hasher has seen.
    seen: u64,
    done: Vec<u8>,
}

impl Digester {
    /// The next bytes.
    pub fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let left = usize::try_from(CHUNK - self.seen).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(left.min(bytes.len()));
            self.hasher.update(now);
            self.seen += now.len() as u64;
            if self.seen == CHUNK {
                self.end_chunk();
            }
            bytes = later;
        }
    }

    fn end_chunk(&mut self) {
        self.done
            .extend_from_slice(&self.hasher.finalize().as_bytes()[..DIGEST]);
        self.hasher.reset();
        self.seen = 0;
    }

    /// The digests of all of them.
    pub fn end(mut self) -> Digests {
        if self.seen > 0 {
            self.end_chunk();
        }
        Digests(self.done.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_the_same_in_whatever_pieces_the_bytes_come_and_tell_a_changed_bit() {
        let size = usize::try_from(CHUNK).unwrap() * 2 + 7;
        let bytes: Bytes = (0..size).map(|at| ((at * 31) >> 5) as u8).collect();
        let digests = |piece: usize| {
            let mut digester = Digester::default();
            for piece in bytes.chunks(piece) {
                digester.add(piece);
            }
            digester.end()
        };
        let all = digests(size);
        assert_eq!(all, digests(50_001));
        assert_eq!(Digests::decode(&all.encode()), Some(all.clone()));
        let chunk = usize::try_from(CHUNK).unwrap();
        for number in 0..3u64 {
            let begin = usize::try_from(number).unwrap() * chunk;
            let own = bytes.slice(begin..(begin + chunk).min(size));
            let halves = [own.slice(..3), own.slice(3..)];
            assert!(all.are_of(number, &halves), "{number}");
            let mut changed = own.to_vec();
            changed[2] ^= 1;
            assert!(!all.are_of(number, &[changed.into()]));
            assert!(!all.are_of(number, &[own.slice(1..)]));
        }
        assert!(!all.are_of(3, &[]));
        assert!(!all.are_of(u64::MAX, &[]));
        assert!(Digester::default().end().is_empty());
        for wrong in ["!", "AAAA"] {
            assert_eq!(Digests::decode(wrong), None, "{wrong}");
        }
    }
}
