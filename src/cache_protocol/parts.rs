//! Assembles the parts of an upload into one content. Functions of values.
//!
//! A part is the content of one request: a whole blob, a block of one, or a piece at an offset.
//! Each part stays as it came, as a blob of its own that never changes, and an entry is a list of
//! them. So a commit moves no bytes, whatever the entry's size and wherever its blobs are.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::cache_protocol::blob_digests::Digests;
use crate::cache_protocol::ids::BlobId;
use crate::cache_protocol::store::StoreError;

/// A part of an entry: the number of its blob, and its size in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "EncodedPart", into = "EncodedPart")]
pub struct Part {
    /// The number of its blob.
    pub blob: BlobId,
    /// Its size in bytes.
    pub size: u64,
    /// The digests of its blob.
    pub digests: Digests,
    /// Whether its bytes are in the catalog itself, and not in a file or a bucket.
    pub inside: bool,
}

/// A part in the form of a catalog.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum EncodedPart {
    Placed(BlobId, u64, String, bool),
    Checked(BlobId, u64, String),
    Unchecked(BlobId, u64),
}

impl TryFrom<EncodedPart> for Part {
    type Error = &'static str;

    fn try_from(written: EncodedPart) -> Result<Self, Self::Error> {
        let (blob, size, text, inside) = match written {
            EncodedPart::Placed(blob, size, text, inside) => (blob, size, text, inside),
            EncodedPart::Checked(blob, size, text) => (blob, size, text, false),
            EncodedPart::Unchecked(blob, size) => (blob, size, String::new(), false),
        };
        Ok(Self {
            blob,
            size,
            digests: Digests::decode(&text).ok_or("unreadable digests")?,
            inside,
        })
    }
}

impl From<Part> for EncodedPart {
    fn from(part: Part) -> Self {
        match (part.inside, part.digests.is_empty()) {
            (true, _) => Self::Placed(part.blob, part.size, part.digests.encode(), true),
            (false, true) => Self::Unchecked(part.blob, part.size),
            (false, false) => Self::Checked(part.blob, part.size, part.digests.encode()),
        }
    }
}

/// The content that one request brought to an upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivedPart {
    /// The number of its blob.
    pub blob: BlobId,
    /// The name of the block, or `None` for a piece at an offset.
    pub block: Option<String>,
    /// Its position in the content, in bytes. A block has no position.
    pub start: u64,
    /// Its size in bytes.
    pub size: u64,
    /// The digests of its blob.
    pub digests: Digests,
    /// Whether its bytes are in the catalog itself.
    pub inside: bool,
}

impl From<&ReceivedPart> for Part {
    fn from(received: &ReceivedPart) -> Self {
        Self {
            blob: received.blob,
            size: received.size,
            digests: received.digests.clone(),
            inside: received.inside,
        }
    }
}

/// The parts for the blocks of a list: the newest of each name, as in Azure.
///
/// # Errors
/// [`StoreError::NoSuchBlock`] if one of them was not received.
pub fn listed(received: &[ReceivedPart], blocks: &[String]) -> Result<Vec<Part>, StoreError> {
    let mut newest: HashMap<&str, &ReceivedPart> = HashMap::new();
    for part in received {
        let Some(block) = &part.block else { continue };
        let known = newest.entry(block).or_insert(part);
        if known.blob < part.blob {
            *known = part;
        }
    }
    blocks
        .iter()
        .map(|block| newest.get(block.as_str()).map(|part| Part::from(*part)))
        .collect::<Option<_>>()
        .ok_or(StoreError::NoSuchBlock)
}

/// The content that `received` makes up: the blocks of the list if there is one, otherwise the
/// pieces one behind the other. If several pieces begin at the same byte, the newest counts, since
/// a client sends a piece again if it got no answer.
///
/// # Errors
/// [`StoreError::SizeMismatch`] if the content has not `size` bytes; those of [`listed`].
pub fn content(
    received: &[ReceivedPart],
    blocks: Option<&[String]>,
    size: u64,
) -> Result<Vec<Part>, StoreError> {
    let parts = match blocks {
        Some(blocks) => listed(received, blocks)?,
        None => pieces(received),
    };
    let actual = total(&parts);
    if actual != size {
        let claimed = size;
        return Err(StoreError::SizeMismatch { actual, claimed });
    }
    Ok(parts)
}

/// The pieces from the first byte on, up to the first gap.
fn pieces(received: &[ReceivedPart]) -> Vec<Part> {
    let mut newest: HashMap<u64, &ReceivedPart> = HashMap::new();
    for part in received {
        if part.block.is_some() || part.size == 0 {
            continue;
        }
        let known = newest.entry(part.start).or_insert(part);
        if known.blob < part.blob {
            *known = part;
        }
    }
    let mut parts = Vec::new();
    let mut end = 0u64;
    while let Some(part) = newest.get(&end) {
        parts.push(Part::from(*part));
        end = end.saturating_add(part.size);
    }
    parts
}

/// The parts of `received` that are not in `parts`: what was replaced, left out or is behind a gap.
pub fn unused<'a>(
    received: &'a [ReceivedPart],
    parts: &[Part],
) -> impl Iterator<Item = &'a ReceivedPart> + use<'a> {
    let named: HashSet<BlobId> = parts.iter().map(|part| part.blob).collect();
    received
        .iter()
        .filter(move |part| !named.contains(&part.blob))
}

/// The size of `parts` in bytes.
pub fn total(parts: &[Part]) -> u64 {
    parts
        .iter()
        .fold(0, |total, part| total.saturating_add(part.size))
}

/// The storage that `parts` take, in bytes: each blob counts once, however often it is named.
pub fn stored(parts: &[Part]) -> u64 {
    let blobs: HashMap<BlobId, u64> = parts.iter().map(|part| (part.blob, part.size)).collect();
    blobs
        .values()
        .fold(0, |total, size| total.saturating_add(*size))
}

/// A range of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Which of the parts it is of.
    pub part: usize,
    /// The number of its blob.
    pub blob: BlobId,
    /// Its position in the blob, in bytes.
    pub start: u64,
    /// Its length in bytes, never 0.
    pub length: u64,
}

/// The segments with the `length` bytes from `first` on of `parts`. Bytes behind the end are left
/// out.
pub fn segments(parts: &[Part], first: u64, length: u64) -> Vec<Segment> {
    let end = first.saturating_add(length);
    let mut begins = 0u64;
    let mut segments = Vec::new();
    for (number, part) in parts.iter().enumerate() {
        let ends = begins.saturating_add(part.size);
        let (from, to) = (first.max(begins), end.min(ends));
        if from < to {
            segments.push(Segment {
                part: number,
                blob: part.blob,
                start: from - begins,
                length: to - from,
            });
        }
        begins = ends;
    }
    segments
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn piece(blob: u64, start: u64, size: u64) -> ReceivedPart {
        ReceivedPart {
            blob: BlobId(blob),
            block: None,
            start,
            size,
            digests: Digests::default(),
            inside: false,
        }
    }

    fn block(blob: u64, name: &str, size: u64) -> ReceivedPart {
        ReceivedPart {
            blob: BlobId(blob),
            block: Some(name.to_owned()),
            start: 0,
            size,
            digests: Digests::default(),
            inside: false,
        }
    }

    fn blobs(parts: &[Part]) -> Vec<u64> {
        parts.iter().map(|part| part.blob.0).collect()
    }

    #[test]
    fn pieces_are_put_in_order_and_the_newest_of_a_place_counts() {
        let received = [
            piece(4, 3, 2),
            piece(1, 0, 3),
            piece(2, 0, 3),
            piece(3, 5, 1),
        ];
        let parts = content(&received, None, 6).unwrap();
        assert_eq!(blobs(&parts), [2, 4, 3]);
    }

    #[test]
    fn a_part_is_written_with_its_digests_and_read_without() {
        let mut digester = crate::cache_protocol::blob_digests::Digester::default();
        digester.add(b"content");
        let part = Part {
            blob: BlobId(3),
            size: 7,
            digests: digester.end(),
            inside: false,
        };
        let inside = Part {
            inside: true,
            ..part.clone()
        };
        for part in [&part, &inside] {
            let text = serde_json::to_string(part).unwrap();
            assert_eq!(serde_json::from_str::<Part>(&text).unwrap(), *part);
        }
        let old: Part = serde_json::from_str("[3,7]").unwrap();
        assert!(old.digests.is_empty());
        assert_eq!(serde_json::to_string(&old).unwrap(), "[3,7]");
        assert!(serde_json::from_str::<Part>("[3,7,\"!\"]").is_err());
    }

    #[test]
    fn a_gap_is_a_wrong_size() {
        let received = [piece(1, 0, 3), piece(2, 4, 2)];
        assert!(matches!(
            content(&received, None, 6),
            Err(StoreError::SizeMismatch {
                actual: 3,
                claimed: 6
            })
        ));
        assert_eq!(content(&[], None, 0).unwrap(), []);
        assert_eq!(content(&[piece(1, 0, 0)], None, 0).unwrap(), []);
    }

    #[test]
    fn blocks_are_put_in_the_order_of_the_list() {
        let received = [
            block(1, "b", 2),
            block(2, "a", 1),
            block(3, "b", 5),
            block(4, "unused", 9),
        ];
        let list = |names: &[&str]| -> Vec<String> {
            names.iter().map(|name| (*name).to_owned()).collect()
        };
        let parts = content(&received, Some(&list(&["a", "b", "a"])), 7).unwrap();
        assert_eq!(blobs(&parts), [2, 3, 2]);
        assert_eq!((total(&parts), stored(&parts)), (7, 6));
        assert!(matches!(
            listed(&received, &list(&["a", "c"])),
            Err(StoreError::NoSuchBlock)
        ));
    }

    #[test]
    fn what_is_replaced_or_left_out_is_unused() {
        let received = [
            piece(1, 0, 3),
            piece(2, 0, 3),
            block(3, "a", 1),
            piece(4, 3, 0),
        ];
        let parts = content(&received, None, 3).unwrap();
        let left: Vec<u64> = unused(&received, &parts).map(|part| part.blob.0).collect();
        assert_eq!(left, [1, 3, 4]);
        assert_eq!(unused(&received, &[]).count(), received.len());
    }

    proptest! {
        /// Against the content itself, cut as a slice is.
        #[test]
        fn segments_are_the_bytes_that_were_asked_for(
            sizes in prop::collection::vec(0u64..6, 0..6),
            first in 0u64..40,
            length in 0u64..40,
        ) {
            let parts: Vec<Part> = (0u64..).zip(&sizes).map(|(blob, size)| Part { blob: BlobId(blob), size: *size, digests: Digests::default(), inside: false }).collect();
            let all: Vec<(BlobId, u64)> = parts
                .iter()
                .flat_map(|part| (0..part.size).map(|byte| (part.blob, byte)))
                .collect();
            let expected: Vec<(BlobId, u64)> =
                all.into_iter().skip(first as usize).take(length as usize).collect();
            let found: Vec<(BlobId, u64)> = segments(&parts, first, length)
                .iter()
                .flat_map(|part| (part.start..part.start + part.length).map(|byte| (part.blob, byte)))
                .collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn pieces_in_any_order_give_the_whole(
            sizes in prop::collection::vec(1u64..9, 1..9).prop_shuffle(),
            seed: u64,
        ) {
            let mut start = 0;
            let mut received = Vec::new();
            for (blob, size) in (0u64..).zip(&sizes) {
                received.push(piece(blob, start, *size));
                start += size;
            }
            let turn = usize::try_from(seed % sizes.len() as u64).unwrap();
            received.rotate_left(turn);
            let parts = content(&received, None, start).unwrap();
            prop_assert_eq!(blobs(&parts), (0..sizes.len() as u64).collect::<Vec<_>>());
        }
    }
}
