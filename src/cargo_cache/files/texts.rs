//! Replaces the root's path in texts with a placeholder, and the placeholder with a path.

use std::io;
use std::path::Path;

use memchr::memmem::Finder;

use crate::cargo_cache::manifest::{FileEntry, FileKind};
use crate::packs::local_file::read_limited;

/// The longest text in which the root's path is replaced, in bytes.
pub(super) const TEXT_LIMIT: u64 = 16 << 20;

/// The placeholder for the path of the root in a stored text. No text has a zero byte of its own.
pub(super) const PLACEHOLDER: &[u8] = b"\0root\0";

/// The text at `path` with a placeholder for each occurrence of `root`. `None` if it has none, is too long,
/// or is no text.
pub(super) fn marked(root: &Path, path: &Path) -> io::Result<Option<Vec<u8>>> {
    let text = match read_limited(path, TEXT_LIMIT) {
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => return Ok(None),
        text => text?,
    };
    if text.contains(&0) {
        return Ok(None);
    }
    let marked = replaced(&text, root.as_os_str().as_encoded_bytes(), PLACEHOLDER);
    Ok((marked != text).then_some(marked))
}

pub(super) fn replaced(text: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut replaced = Vec::with_capacity(text.len());
    let mut begin = 0;
    for at in Finder::new(old).find_iter(text) {
        replaced.extend_from_slice(text.get(begin..at).unwrap_or_default());
        replaced.extend_from_slice(new);
        begin = at + old.len();
    }
    replaced.extend_from_slice(text.get(begin..).unwrap_or_default());
    replaced
}

/// Makes a text of each file among `entries` for which `may_be` is true and that has the path of `root` in
/// it.
///
/// # Errors
/// [`io::Error`] if the disk cannot be read.
pub fn mark_texts(
    root: &Path,
    entries: &mut [FileEntry],
    may_be: impl Fn(&str) -> bool,
) -> io::Result<()> {
    if !is_plain(root) {
        return Ok(());
    }
    for entry in entries {
        if let FileKind::File { mode, .. } = entry.kind
            && may_be(&entry.path)
            && let Some(text) = marked(root, &root.join(&entry.path))?
        {
            let length = text.len() as u64;
            entry.kind = FileKind::Text { length, mode };
        }
    }
    Ok(())
}

/// Whether a path is always written in the same way: no language or makefile would escape any character of
/// it.
pub(crate) fn is_plain(path: &Path) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+@~".contains(&byte);
    let mut bytes = path.as_os_str().as_encoded_bytes().iter().copied();
    cfg!(unix) && bytes.all(is_plain)
}
