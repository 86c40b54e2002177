//! The files of parts: reads their content from the disk, and extracts parts to the disk.

mod content;
mod entries;
mod error;
mod extract;
mod extractor;
#[cfg(test)]
mod fixtures;
mod folders;
mod paths;
mod staged;
mod texts;

pub use content::{ContentDigest, compress, digest};
pub use entries::entries;
pub use error::ExtractError;
pub use extract::{Checkpoint, Conditions, PART_LIMIT, exists, extract};
pub use folders::set_folder_time;
pub use texts::mark_texts;

pub(crate) use folders::{make_below, open_below};
pub(crate) use paths::is_inside;
pub(crate) use staged::STAGING;
#[cfg(test)]
pub(crate) use staged::staged;
pub(crate) use texts::is_plain;

pub(super) use extract::CheckedReader;
pub(super) use paths::relative_name;
