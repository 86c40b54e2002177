//! Local files for bytes that were downloaded and bytes that are to be uploaded. The relay reads and writes
//! them at offsets, so any number of readers share one file and nothing of it needs to be in memory.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::digest::Digest;

/// How much of a file is in memory at once, in bytes.
const PIECE_SIZE: u64 = 256 * 1024;

/// A file that grows. It is removed when its last holder drops it.
#[derive(Debug)]
pub struct LocalFile {
    file: File,
    path: PathBuf,
    length: Mutex<u64>,
}

/// The bytes that this user may still write on the disk of `path`, which exists; `None` if the system does
/// not say.
pub fn free(path: &Path) -> Option<u64> {
    fs4::available_space(path).ok()
}

/// The bytes of a file.
///
/// # Errors
/// [`io::ErrorKind::FileTooLarge`] if it has more than `limit` bytes, or any error of reading it.
pub(crate) fn read_limited(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = File::open(path)?
        .take(limit.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if read as u64 > limit {
        Err(io::ErrorKind::FileTooLarge.into())
    } else {
        Ok(bytes)
    }
}

impl LocalFile {
    /// A new, empty file at `path`.
    ///
    /// # Errors
    /// [`io::Error`] if the file cannot be created.
    pub fn create(path: &Path) -> io::Result<Arc<Self>> {
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(path)?;
        Ok(Arc::new(Self {
            file,
            path: path.to_owned(),
            length: Mutex::new(0),
        }))
    }

    /// Its length in bytes.
    pub fn length(&self) -> u64 {
        *self.length.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `bytes` at the end and returns the offset at which they begin.
    ///
    /// # Errors
    /// [`io::Error`] if the disk refuses them. The file is unchanged then.
    pub fn append(&self, bytes: &[u8]) -> io::Result<u64> {
        let mut length = self.length.lock().unwrap_or_else(PoisonError::into_inner);
        write_at(&self.file, bytes, *length)?;
        let offset = *length;
        *length += bytes.len() as u64;
        Ok(offset)
    }

    /// Writes `length` bytes of `content` at the end, piece by piece and contiguously, and returns the
    /// offset at which they begin.
    ///
    /// # Errors
    /// [`io::Error`] if `content` is shorter, or the disk refuses the bytes. The file is unchanged then.
    pub fn append_from(&self, content: &mut impl Read, length: u64) -> io::Result<u64> {
        let mut end = self.length.lock().unwrap_or_else(PoisonError::into_inner);
        let mut piece = vec![0; usize::try_from(length.min(PIECE_SIZE)).map_err(io::Error::other)?];
        let mut done = 0;
        while done < length {
            let wanted =
                usize::try_from((length - done).min(PIECE_SIZE)).map_err(io::Error::other)?;
            let piece = piece.get_mut(..wanted).unwrap_or_default();
            content.read_exact(piece)?;
            write_at(&self.file, piece, *end + done)?;
            done += piece.len() as u64;
        }
        let offset = *end;
        *end += length;
        Ok(offset)
    }

    /// Reads `length` bytes from `offset`.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the file is shorter.
    pub fn read(&self, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        let end = offset.checked_add(length);
        // This check comes before the allocation, since the length may be false.
        if end.is_none_or(|end| end > self.length()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        read_at(&self.file, &mut bytes, offset)?;
        Ok(bytes)
    }

    /// Hands `length` bytes from `offset` to `take`, piece by piece.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the file is shorter, and any error of `take`.
    pub fn read_pieces(
        &self,
        offset: u64,
        length: u64,
        mut take: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(PIECE_SIZE);
            take(&self.read(offset.saturating_add(done), piece)?)?;
            done += piece;
        }
        Ok(())
    }

    /// Whether `length` bytes from `offset` have this digest.
    pub fn holds(&self, offset: u64, length: u64, digest: Digest) -> bool {
        let mut hasher = blake3::Hasher::new();
        let read = self.read_pieces(offset, length, |piece| {
            hasher.update(piece);
            Ok(())
        });
        read.is_ok() && Digest::from_hash(hasher.finalize()) == digest
    }

    /// The file opened again, for a reader with a position of its own.
    ///
    /// # Errors
    /// [`io::Error`] if the file is gone.
    pub fn reopen(&self) -> io::Result<File> {
        File::open(&self.path)
    }
}

impl Drop for LocalFile {
    fn drop(&mut self) {
        // If this fails, the file goes with the folder.
        let _ = fs::remove_file(&self.path);
    }
}

/// Writes all of `bytes` at `offset`.
#[cfg(unix)]
pub(crate) fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    file.write_all_at(bytes, offset)
}

/// Fills `bytes` from `offset`.
#[cfg(unix)]
pub(crate) fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    file.read_exact_at(bytes, offset)
}

/// Writes all of `bytes` at `offset`.
#[cfg(windows)]
pub(crate) fn write_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        let written = file.seek_write(bytes, offset)?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = bytes.get(written..).unwrap_or_default();
        offset += written as u64;
    }
    Ok(())
}

/// Fills `bytes` from `offset`.
#[cfg(windows)]
pub(crate) fn read_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        let read = file.seek_read(bytes, offset)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes = bytes.get_mut(read..).unwrap_or_default();
        offset += read as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_appended_is_read_back_and_nothing_beyond_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let file = LocalFile::create(&path).unwrap();
        assert_eq!(file.append(b"one").unwrap(), 0);
        assert_eq!(file.append(b"three").unwrap(), 3);
        assert_eq!(file.read(3, 5).unwrap(), b"three");
        assert!(file.read(3, 6).is_err());
        assert!(file.read(u64::MAX, 2).is_err());
        assert_eq!(file.append_from(&mut &b"seven!"[..], 6).unwrap(), 8);
        assert!(file.append_from(&mut &b"short"[..], 6).is_err());
        assert_eq!(file.read(8, 6).unwrap(), b"seven!");
        assert_eq!(file.length(), 14);
        assert!(file.holds(0, 3, Digest::of(b"one")));
        assert!(!file.holds(0, 3, Digest::of(b"two")));
        assert!(!file.holds(0, 9, Digest::of(b"one")));
        drop(file);
        assert!(!path.exists());
    }
}
