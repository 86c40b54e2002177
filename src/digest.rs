//! Digests of content.

use std::fmt;
use std::io::{self, BufReader, Read};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// The first 128 bits of a BLAKE3 digest of content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Digest([u8; 16]);

impl Digest {
    /// The digest of `content`.
    pub fn of(content: &[u8]) -> Self {
        Self::from_hash(blake3::hash(content))
    }

    /// The digest that a hasher which was fed piece by piece came to.
    pub fn from_hash(hash: blake3::Hash) -> Self {
        let (first, _) = hash.as_bytes().split_at(16);
        let mut digest = [0; 16];
        digest.copy_from_slice(first);
        Self(digest)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl From<[u8; 16]> for Digest {
    fn from(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&hex::encode(self.0))
    }
}

/// The sha256 digest of what `content` reads.
///
/// # Errors
/// Where it cannot be read.
pub fn sha256(content: impl Read) -> io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    io::copy(
        &mut BufReader::with_capacity(256 * 1024, content),
        &mut hasher,
    )?;
    Ok(hasher.finalize().into())
}
