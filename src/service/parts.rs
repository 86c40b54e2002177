//! How the parts in which an upload arrives become one content. Functions of values.
//!
//! A part is what one request brought: a whole blob, a block of one, or a piece at an offset. Each
//! is kept as it came, as a blob of its own that never changes, and an entry is a list of them.
//! So committing moves no bytes, whatever the entry's size and wherever its blobs are.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::service::store::StoreError;

/// A part of an entry: the number of its blob, and its size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct Part {
    /// The number of its blob.
    pub blob: u64,
    /// Its size in bytes.
    pub size: u64,
}

impl From<(u64, u64)> for Part {
    fn from((blob, size): (u64, u64)) -> Self {
        Self { blob, size }
    }
}

impl From<Part> for (u64, u64) {
    fn from(part: Part) -> Self {
        (part.blob, part.size)
    }
}

/// What was received for an upload in one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// The number of its blob. Later ones are greater.
    pub blob: u64,
    /// The name of the block, or `None` for what has an offset.
    pub block: Option<String>,
    /// Where it begins in the content, in bytes. Of no meaning for a block.
    pub start: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// What the blocks of a list are: the newest of each name, as Azure has it.
///
/// # Errors
/// [`StoreError::NoSuchBlock`] where one of them was not received.
pub fn listed(received: &[Received], blocks: &[String]) -> Result<Vec<Part>, StoreError> {
    let mut newest: HashMap<&str, Part> = HashMap::new();
    for part in received {
        let Some(block) = &part.block else { continue };
        let (blob, size) = (part.blob, part.size);
        let known = newest.entry(block).or_insert(Part { blob, size });
        if known.blob < blob {
            *known = Part { blob, size };
        }
    }
    blocks
        .iter()
        .map(|block| newest.get(block.as_str()).copied())
        .collect::<Option<_>>()
        .ok_or(StoreError::NoSuchBlock)
}

/// The content that `received` makes up: the blocks of the list where there is one, otherwise the
/// pieces one behind the other. Of pieces that begin at the same byte the newest counts, since a
/// client sends a piece anew when it had no answer.
///
/// # Errors
/// [`StoreError::SizeMismatch`] where that has not `size` bytes, and as [`listed`].
pub fn content(
    received: &[Received],
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
fn pieces(received: &[Received]) -> Vec<Part> {
    let mut newest: HashMap<u64, Part> = HashMap::new();
    for part in received {
        if part.block.is_some() || part.size == 0 {
            continue;
        }
        let (blob, size) = (part.blob, part.size);
        let known = newest.entry(part.start).or_insert(Part { blob, size });
        if known.blob < blob {
            *known = Part { blob, size };
        }
    }
    let mut parts = Vec::new();
    let mut end = 0u64;
    while let Some(part) = newest.get(&end) {
        parts.push(*part);
        end = end.saturating_add(part.size);
    }
    parts
}

/// The size of `parts` in bytes.
pub fn total(parts: &[Part]) -> u64 {
    parts
        .iter()
        .fold(0, |total, part| total.saturating_add(part.size))
}

/// A range of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The number of its blob.
    pub blob: u64,
    /// Where it begins in the blob, in bytes.
    pub start: u64,
    /// Its length in bytes, never 0.
    pub length: u64,
}

/// Where the `length` bytes from `first` on of `parts` are. What is behind their end is left out.
pub fn segments(parts: &[Part], first: u64, length: u64) -> Vec<Segment> {
    let end = first.saturating_add(length);
    let mut begins = 0u64;
    let mut segments = Vec::new();
    for part in parts {
        let ends = begins.saturating_add(part.size);
        let (from, to) = (first.max(begins), end.min(ends));
        if from < to {
            segments.push(Segment {
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

    fn piece(blob: u64, start: u64, size: u64) -> Received {
        Received {
            blob,
            block: None,
            start,
            size,
        }
    }

    fn block(blob: u64, name: &str, size: u64) -> Received {
        Received {
            blob,
            block: Some(name.to_owned()),
            start: 0,
            size,
        }
    }

    fn blobs(parts: &[Part]) -> Vec<u64> {
        parts.iter().map(|part| part.blob).collect()
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
        assert!(matches!(
            listed(&received, &list(&["a", "c"])),
            Err(StoreError::NoSuchBlock)
        ));
    }

    proptest! {
        /// Against the content itself, cut as a slice is.
        #[test]
        fn segments_are_the_bytes_that_were_asked_for(
            sizes in prop::collection::vec(0u64..6, 0..6),
            first in 0u64..40,
            length in 0u64..40,
        ) {
            let parts: Vec<Part> = (0u64..).zip(&sizes).map(|(blob, size)| Part { blob, size: *size }).collect();
            let all: Vec<(u64, u64)> = parts
                .iter()
                .flat_map(|part| (0..part.size).map(|byte| (part.blob, byte)))
                .collect();
            let expected: Vec<(u64, u64)> =
                all.into_iter().skip(first as usize).take(length as usize).collect();
            let found: Vec<(u64, u64)> = segments(&parts, first, length)
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
