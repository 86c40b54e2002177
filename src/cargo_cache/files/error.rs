//! Says why a part is not on the disk.

use std::io;
use std::path::PathBuf;

/// Why a part is not on the disk.
#[derive(Debug, thiserror::Error)]
pub enum ExtractError {
    /// A file or folder exists already, and is never replaced.
    #[error("{0} already exists")]
    AlreadyExists(PathBuf),
    /// One of its paths leads outside of its folder.
    #[error("{0:?} leads outside of its folder")]
    UnsafePath(String),
    /// Its content is not the expected one.
    #[error("{0} has unexpected content")]
    Foreign(String),
    /// The disk refuses it, or the content ended too early.
    #[error(transparent)]
    Io(#[from] io::Error),
}
