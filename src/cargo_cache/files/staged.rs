//! Names unfinished files and folders, so that no other job uses them.

use std::io;
use std::path::PathBuf;

use crate::cargo_cache::files::ExtractError;
use crate::cargo_cache::files::folders::parent_of;
use crate::cargo_cache::open_below::OpenFolder;

/// The prefix of the name of an unfinished folder or file. Cargo ignores such names.
pub(crate) const STAGING: &str = ".sccache-action-";

/// A staged name for `name`. No other job has the same.
pub(crate) fn staged(name: &str) -> io::Result<String> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    Ok(format!("{STAGING}{}-{name}", hex::encode(random)))
}

/// The commit marker: the folder that is renamed last, as a path below the root, and its staged path.
/// Nobody else knows the staged name, so no other job can write in it or rename it.
pub(super) struct CommitMarker {
    pub(super) path: String,
    pub(super) staged: String,
}

impl CommitMarker {
    pub(super) fn of(below: &OpenFolder, path: &str) -> Result<Self, ExtractError> {
        let (parent, name) = parent_of(below, path)?;
        if parent.has(name) {
            return Err(ExtractError::AlreadyExists(PathBuf::from(path)));
        }
        let staged = match path.rsplit_once('/') {
            Some((parent, name)) => format!("{parent}/{}", staged(name)?),
            None => staged(path)?,
        };
        Ok(Self {
            path: path.to_owned(),
            staged,
        })
    }
}
