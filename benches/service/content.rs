//! Content that costs nothing to make and little to check: one random mebibyte over and over, the
//! first bytes of each counted up, so that no two mebibytes of a run are the same.

use std::ops::Range;
use std::sync::LazyLock;

/// How often the random bytes begin again.
const PERIOD: usize = 1 << 20;

/// How many bytes of a period are its number.
const STAMP: usize = size_of::<u64>();

static RANDOM: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = vec![0; PERIOD];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
});

/// The content of one entry.
#[derive(Clone, Copy, Debug)]
pub struct Content {
    /// The number of its first period.
    first: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// The bytes of a part of one period.
pub struct Part {
    stamp: [u8; STAMP],
    stamped: Range<usize>,
    /// The bytes behind the stamp.
    pub rest: &'static [u8],
}

impl Part {
    /// The bytes of the stamp that are in this part.
    pub fn stamp(&self) -> &[u8] {
        &self.stamp[self.stamped.clone()]
    }

    /// How many bytes it has.
    pub fn len(&self) -> usize {
        self.stamped.len() + self.rest.len()
    }
}

impl Content {
    /// The content of the small entry `i`: sizes as sccache's objects have, half of them below
    /// 20 KiB, one in a hundred above 300 KiB, none above 1 MiB.
    pub fn small(i: usize) -> Self {
        let digest = blake3::hash(&i.to_le_bytes());
        // The sum of twelve even distributions is nearly the normal one, of deviation 1.
        let sum: f64 = digest.as_bytes()[..12].iter().map(|b| f64::from(*b)).sum();
        let size = 20.0 * 1024.0 * f64::exp2(1.7 * (sum / 255.5 - 6.0));
        Self {
            first: (i as u64) << 16,
            size: (size as u64).clamp(200, PERIOD as u64),
        }
    }

    /// Content of `size` bytes, the same each time.
    pub fn large(size: u64) -> Self {
        let first = 1 << 60;
        Self { first, size }
    }

    /// The bytes from `offset` to the end of the period, and not beyond `end`.
    pub fn part(&self, offset: u64, end: u64) -> Part {
        let period = PERIOD as u64;
        let begin = (offset % period) as usize;
        let end = PERIOD.min(begin + (end - offset) as usize);
        Part {
            stamp: (self.first + offset / period).to_le_bytes(),
            stamped: begin.min(STAMP)..end.min(STAMP),
            rest: &RANDOM[begin.max(STAMP)..end.max(STAMP)],
        }
    }

    /// Whether `bytes` are what it has at `offset`.
    pub fn has_at(&self, mut offset: u64, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let part = self.part(offset, offset + bytes.len() as u64);
            let (mine, others) = bytes.split_at(part.len());
            let (stamp, rest) = mine.split_at(part.stamp().len());
            if stamp != part.stamp() || rest != part.rest {
                return false;
            }
            offset += mine.len() as u64;
            bytes = others;
        }
        true
    }
}
