//! Reads the content of files: computes its digest, compresses it, and searches it for paths.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use memchr::memmem::Finder;

use crate::cargo_cache::files::texts::{is_plain, marked};
use crate::cargo_cache::manifest::{FileEntry, FileKind, length};

/// The compression level: zstd's fastest. A long window gains more.
const COMPRESSION_LEVEL: i32 = 1;

/// The longest window, as a power of two: a library has its metadata twice, once in a file of its own, and
/// the second copy costs nothing if the window reaches the first. This is the limit of zstd's decoder by
/// default.
const LONGEST_WINDOW: u32 = 27;

/// zstd searches content from this length on, in bytes, for repetitions far apart.
const LONG_CONTENT: u64 = 256 * 1024;

/// How much of a file is in memory at once, in bytes.
const CHUNK_SIZE: usize = 256 * 1024;

/// Searches the bytes that are read for paths.
struct Search<'a> {
    paths: Vec<Finder<'a>>,
    /// The end of the last piece: a path may begin there.
    tail: Vec<u8>,
    has_found: bool,
}

impl<'a> Search<'a> {
    /// A path that may be written in several ways cannot be searched for, and counts as found.
    fn of(paths: &[&'a Path]) -> Self {
        let finder = |path: &&'a Path| Finder::new(path.as_os_str().as_encoded_bytes());
        Self {
            paths: paths.iter().map(finder).collect(),
            tail: Vec::new(),
            has_found: !paths.iter().all(|path| is_plain(path)),
        }
    }

    fn read(&mut self, piece: &[u8]) {
        if self.has_found || self.paths.is_empty() {
            return;
        }
        let longest = self.paths.iter().map(|path| path.needle().len()).max();
        let overlap = longest.unwrap_or_default().saturating_sub(1);
        let mut seam = std::mem::take(&mut self.tail);
        seam.extend_from_slice(piece.get(..overlap).unwrap_or(piece));
        let finds = |path: &Finder<'_>| path.find(&seam).is_some() || path.find(piece).is_some();
        self.has_found = self.paths.iter().any(finds);
        let end = if piece.len() < overlap { &seam } else { piece };
        self.tail = end
            .get(end.len().saturating_sub(overlap)..)
            .unwrap_or_default()
            .to_vec();
    }
}

/// Hands the content of all files among `entries` to `take`, one behind the other.
fn read_content(
    root: &Path,
    entries: &[FileEntry],
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    // The file was changed meanwhile.
    let changed = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let mut piece = vec![0; CHUNK_SIZE];
    for entry in entries {
        let path = root.join(&entry.path);
        let length = match entry.kind {
            FileKind::File { length, .. } => length,
            FileKind::Text { length, .. } => {
                let text = marked(root, &path)?.ok_or_else(changed)?;
                if text.len() as u64 != length {
                    return Err(changed());
                }
                take(&text)?;
                continue;
            }
            FileKind::Folder | FileKind::Link(_) | FileKind::Symlink(_) => continue,
        };
        let mut file = File::open(path)?.take(length);
        let mut read = 0;
        loop {
            let count = file.read(&mut piece)?;
            if count == 0 {
                break;
            }
            read += count as u64;
            take(piece.get(..count).unwrap_or_default())?;
        }
        if read != length {
            return Err(changed());
        }
    }
    Ok(())
}

/// The digest of the content of entries, and whether it has paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentDigest {
    /// Its digest.
    pub digest: blake3::Hash,
    /// Whether it has any of the paths that were searched for.
    pub holds_paths: bool,
}

/// Reads the content of `entries`, and searches it for `paths`.
///
/// # Errors
/// [`io::Error`] if the disk cannot be read, or a file is no longer as long as its entry says.
pub fn digest(root: &Path, entries: &[FileEntry], paths: &[&Path]) -> io::Result<ContentDigest> {
    let mut hasher = blake3::Hasher::new();
    let mut search = Search::of(paths);
    read_content(root, entries, |piece| {
        hasher.update(piece);
        search.read(piece);
        Ok(())
    })?;
    Ok(ContentDigest {
        digest: hasher.finalize(),
        holds_paths: search.has_found,
    })
}

/// Writes the content of `entries`, compressed, to `to`, and searches it for `paths`.
///
/// # Errors
/// As [`digest`], and any error of `to`.
pub fn compress(
    root: &Path,
    entries: &[FileEntry],
    paths: &[&Path],
    to: impl Write,
) -> io::Result<ContentDigest> {
    let length = length(entries);
    let mut encoder = zstd::Encoder::new(to, COMPRESSION_LEVEL)?;
    encoder.set_pledged_src_size(Some(length))?;
    if length >= LONG_CONTENT {
        let window = u64::BITS - length.leading_zeros();
        encoder.long_distance_matching(true)?;
        encoder.window_log(window.min(LONGEST_WINDOW))?;
    }
    let mut hasher = blake3::Hasher::new();
    let mut search = Search::of(paths);
    read_content(root, entries, |piece| {
        hasher.update(piece);
        search.read(piece);
        encoder.write_all(piece)
    })?;
    encoder.finish()?;
    Ok(ContentDigest {
        digest: hasher.finalize(),
        holds_paths: search.has_found,
    })
}
