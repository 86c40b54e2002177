//! A file that reserves some of the disk, to be given up when the disk is full: without room the
//! database cannot even record deletions.

use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// How much it keeps, in bytes: more than a segment of small contents and one transaction of a sweep.
pub const RESERVE: u64 = 8 << 20;

/// Makes the file at `path`, unless it is there.
///
/// # Errors
/// Fails if there is no room for it. In that case the partial file is removed.
pub fn keep(path: &Path) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|known| known.len() == RESERVE) {
        return Ok(());
    }
    let written = fs::File::create(path).and_then(|mut file| {
        // Zeros take no room on file systems that compress.
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut block = [0; 64 * 1024];
        for _ in 0..RESERVE / block.len() as u64 {
            for word in block.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            file.write_all(&block)?;
        }
        Ok(())
    });
    if written.is_err() {
        give_up(path);
    }
    written
}

/// Gives its room to others.
pub fn give_up(path: &Path) {
    // A missing file has been given up before.
    let _ = fs::remove_file(path);
}

/// Whether `error` says that a disk is full, or that its user has reached a quota.
pub fn is_full(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            if matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ) {
                return true;
            }
            // Its source is that of the error within, and not the error itself.
            let inner = error.get_ref().map(|inner| inner as &(dyn Error + 'static));
            if inner.is_some_and(is_full) {
                return true;
            }
        }
        // The shared error of a group of requests.
        if let Some(error) = error.downcast_ref::<std::sync::Arc<sqlx::Error>>() {
            return is_full(&**error);
        }
        if let Some(sqlx::Error::Database(error)) = error.downcast_ref::<sqlx::Error>()
            && let Some(code) = error.code()
        {
            // SQLite's SQLITE_FULL and SQLITE_IOERR_SHMSIZE, PostgreSQL's disk_full.
            return matches!(&*code, "13" | "4874" | "53100");
        }
        next = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_from_other_errors_however_it_is_wrapped() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        assert!(is_full(&full()));
        assert!(is_full(&io::Error::other(full())));
        let wrapped = opendal::Error::new(opendal::ErrorKind::Unexpected, "x").set_source(full());
        assert!(is_full(&wrapped));
        let wrapped: crate::cache_protocol::store::StoreError = wrapped.into();
        assert!(is_full(&wrapped));
        let shared = std::sync::Arc::new(sqlx::Error::Io(full()));
        assert!(is_full(&crate::cache_protocol::store::StoreError::Backend(
            Box::new(shared)
        )));
        assert!(!is_full(&io::Error::from(io::ErrorKind::NotFound)));
        assert!(!is_full(&sqlx::Error::PoolTimedOut));
    }

    #[test]
    fn a_reserve_takes_its_room_and_gives_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reserve");
        keep(&path).unwrap();
        keep(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), RESERVE);
        give_up(&path);
        give_up(&path);
        assert!(!path.exists());
        assert!(keep(&folder.path().join("missing/reserve")).is_err());
    }
}
