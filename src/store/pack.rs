//! How a pack is laid out in its cache entry.
//!
//! ```text
//! bytes   content
//! 8       "sccpack2"
//! 4       the length of the index in bytes, little endian
//! 16      the digest of the index
//! …       the index: postcard's encoding of what all packs of the scope have
//! …       data: the bundle of preprocessor entries, then objects, one behind the other
//! ```
//!
//! The index comes first because Azure's storage has no ranges that count from the end: one request
//! for the first bytes gets the index, wherever the data ends. An entry's index names its own pack
//! by the empty string, since the key under which it is stored is not known before.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::store::index::{Digest, Index};

/// What every pack begins with: the layout's name and number.
pub const MAGIC: &[u8; 8] = b"sccpack2";

/// The length in bytes of what stands before the index.
pub const HEADER_LENGTH: u64 = 28;

/// The longest index, in bytes: some hundred thousand objects.
pub const INDEX_LIMIT: u32 = 64 << 20;

/// The name by which an entry's index knows its own pack.
pub const OWN: &str = "";

/// Why bytes are not a pack.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// They begin otherwise.
    #[error("it is no pack of this layout")]
    Foreign,
    /// The index is longer than [`INDEX_LIMIT`].
    #[error("its index has {0} bytes, which is more than can be")]
    TooLong(u32),
    /// The index is not the one that was written.
    #[error("its index is damaged")]
    Damaged,
    /// The index says what cannot be.
    #[error("its index cannot be read: {0}")]
    Malformed(String),
}

/// What stands before the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    length: u32,
    digest: Digest,
}

impl Header {
    /// Reads the first [`HEADER_LENGTH`] bytes of an entry.
    ///
    /// # Errors
    /// Where they are not a pack's.
    pub fn parse(bytes: &[u8]) -> Result<Self, PackError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(PackError::Foreign)?;
        let (length, rest) = rest.split_first_chunk().ok_or(PackError::Foreign)?;
        let (digest, _) = rest.split_first_chunk::<16>().ok_or(PackError::Foreign)?;
        let length = u32::from_le_bytes(*length);
        if length > INDEX_LIMIT {
            return Err(PackError::TooLong(length));
        }
        Ok(Self {
            length,
            digest: Digest::from(*digest),
        })
    }

    /// Where the index stands in the entry, in bytes. The data begins where it ends.
    pub fn index(&self) -> Range<u64> {
        HEADER_LENGTH..HEADER_LENGTH + u64::from(self.length)
    }

    /// Reads the index of the entry that is stored under `name`.
    ///
    /// # Errors
    /// Where it is not the one that was written, or says what cannot be.
    pub fn read_index(&self, bytes: &[u8], name: &str) -> Result<Index, PackError> {
        if Digest::of(bytes) != self.digest {
            return Err(PackError::Damaged);
        }
        let malformed = |error: &dyn ToString| PackError::Malformed(error.to_string());
        let Wire(mut index) = postcard::from_bytes(bytes).map_err(|error| malformed(&error))?;
        if let Some(mut own) = index.packs.remove(OWN) {
            own.data_start = self.index().end;
            index.packs.insert(name.to_owned(), own);
        }
        match index.packs.values().all(|pack| pack.is_sound()) {
            true => Ok(index),
            false => Err(malformed(&"an object lies outside of its pack")),
        }
    }
}

/// The index as it is written.
#[derive(Serialize, Deserialize)]
struct Wire(Index);

/// All of an entry that stands before its data.
///
/// # Errors
/// Where the index is longer than [`INDEX_LIMIT`].
pub fn begin(index: Index) -> Result<Vec<u8>, PackError> {
    let index = postcard::to_stdvec(&Wire(index))
        .map_err(|error| PackError::Malformed(error.to_string()))?;
    let length = u32::try_from(index.len()).unwrap_or(u32::MAX);
    if length > INDEX_LIMIT {
        return Err(PackError::TooLong(length));
    }
    let mut bytes = Vec::with_capacity(index.len() + MAGIC.len() + 20);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(Digest::of(&index).as_bytes());
    bytes.extend_from_slice(&index);
    Ok(bytes)
}

/// Reads the index of a whole entry, or of as much of one as has it.
///
/// # Errors
/// Where the bytes are no pack's, too few, or damaged.
pub fn read(bytes: &[u8], name: &str) -> Result<Index, PackError> {
    let header = Header::parse(bytes)?;
    let range = header.index();
    let index = usize::try_from(range.start)
        .ok()
        .zip(usize::try_from(range.end).ok())
        .and_then(|(start, end)| bytes.get(start..end))
        .ok_or(PackError::Damaged)?;
    header.read_index(index, name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::index::Pack;
    use crate::store::index::tests::{arbitrary_index, key, object};

    fn example() -> Index {
        let mut index = Index::default();
        let pack = Pack {
            created: 5,
            data_length: 30,
            objects: [(key(1), object(10, 20, 3))].into(),
            ..Pack::default()
        };
        index.packs.insert(OWN.to_owned(), pack);
        index.unmerged.insert("other".to_owned(), 7);
        index
    }

    #[test]
    fn an_entrys_own_pack_is_found_under_its_key_with_its_data_behind_the_index() {
        let bytes = begin(example()).unwrap();
        let index = read(&bytes, "key#1").unwrap();
        let pack = &index.packs["key#1"];
        assert_eq!(pack.data_start, bytes.len() as u64);
        assert_eq!(pack.objects[&key(1)].offset, 10);
        assert_eq!(index.unmerged["other"], 7);
        assert_eq!(index.packs.len(), 1);
    }

    #[test]
    fn what_is_no_pack_is_told_from_a_damaged_one() {
        let bytes = begin(example()).unwrap();
        assert_eq!(read(b"", "k"), Err(PackError::Foreign));
        assert_eq!(
            read(b"<html>not found</html>", "k"),
            Err(PackError::Foreign)
        );
        assert_eq!(read(&bytes[..20], "k"), Err(PackError::Foreign));
        assert_eq!(
            read(&bytes[..bytes.len() - 1], "k"),
            Err(PackError::Damaged)
        );
        let mut long = bytes;
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(read(&long, "k"), Err(PackError::TooLong(u32::MAX)));
    }

    #[test]
    fn an_object_outside_of_its_pack_is_refused() {
        for outside in [
            object(11, 20, 0),
            object(u64::MAX, 2, 0),
            object(2, u64::MAX, 0),
        ] {
            let mut index = example();
            let pack = index.packs.get_mut(OWN).unwrap();
            pack.objects.insert(key(2), outside);
            let bytes = begin(index).unwrap();
            assert!(matches!(read(&bytes, "k"), Err(PackError::Malformed(_))));
        }
    }

    /// An index that is genuine by its digest and nonsense otherwise.
    fn disguised(index: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&u32::try_from(index.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(Digest::of(index).as_bytes());
        bytes.extend_from_slice(index);
        bytes
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(mut index in arbitrary_index()) {
            index.packs.retain(|_, pack| pack.is_sound());
            let bytes = begin(index.clone()).unwrap();
            prop_assert_eq!(read(&bytes, "k").unwrap(), index);
        }

        #[test]
        fn a_changed_byte_is_noticed(index in arbitrary_index(), at: usize, change in 1..=255u8) {
            let mut bytes = begin(index).unwrap();
            let at = at % bytes.len();
            bytes[at] ^= change;
            prop_assert!(read(&bytes, "k").is_err());
        }

        #[test]
        fn no_bytes_make_the_reader_panic_or_give_an_unsound_index(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            index in arbitrary_index(), at: usize, change: u8,
        ) {
            let _ = read(&bytes, "k");
            let genuine = begin(index).unwrap();
            let mut mutated = genuine[28..].to_vec();
            if !mutated.is_empty() {
                let at = at % mutated.len();
                mutated[at] ^= change;
            }
            for bytes in [disguised(&bytes), disguised(&mutated)] {
                if let Ok(index) = read(&bytes, "k") {
                    prop_assert!(index.packs.values().all(Pack::is_sound));
                }
            }
        }
    }
}
