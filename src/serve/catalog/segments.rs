//! The files that small contents are appended to, beside SQLite's database. A row of `contents` says where
//! in them a content lies.
//!
//! A content is written once, where a row of SQLite's with the content itself is written to the log, from
//! there to the database, and over several pages. Bytes that no row names are dead. A segment that is
//! mostly dead is emptied and deleted: see `compaction`.
//!
//! Each process appends to segments of its own and never to those that it finds. So a write that broke off
//! needs no repair.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use moka::sync::Cache;
use tokio::sync::{OwnedRwLockReadGuard, RwLock, RwLockWriteGuard};

use crate::packs::local_file;
use crate::serve::private_files;

/// The size in bytes at which a segment is full. It is small, so that many of them are dead as a whole
/// when old entries are evicted, and so that one can be emptied on a full disk with the room of the reserve.
pub(super) const SEGMENT_SIZE: u64 = 4 << 20;

/// How many segments are open at once for reading.
const OPEN_FILES: u64 = 256;

/// The name of a segment ends with this.
const SUFFIX: &str = ".segment";

/// Where a content lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ContentLocation {
    /// The number of its segment.
    pub(super) segment: u64,
    /// Where it begins there, in bytes.
    pub(super) start: u64,
    /// Its length in bytes.
    pub(super) length: u64,
}

/// A folder of segments.
#[derive(Debug)]
pub(super) struct Segments {
    folder: PathBuf,
    appended: Mutex<Appended>,
    open: Cache<u64, Arc<File>>,
    /// Read-locked by each holder of contents that no row names yet.
    unnamed: Arc<RwLock<()>>,
}

/// What this process appends to.
#[derive(Debug, Default)]
struct Appended {
    /// The number of the last segment that this process knows of.
    last: u64,
    /// The segment of that number, as long as it is not full.
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    file: Arc<File>,
    length: u64,
}

impl Segments {
    /// The segments in `folder`, which is made if it is missing.
    ///
    /// # Errors
    /// Fails if the folder cannot be made or read.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        private_files::folder(folder)?;
        private_files::keep_name(folder)?;
        let segments = Self {
            folder: folder.to_owned(),
            appended: Mutex::default(),
            open: Cache::new(OPEN_FILES),
            unnamed: Arc::default(),
        };
        let last = segments.list()?.into_iter().map(|(number, _)| number).max();
        segments.lock().last = last.unwrap_or(0);
        Ok(segments)
    }

    /// Take this before contents are appended, and keep it until their rows are written: until then no
    /// segment is deleted.
    pub(super) async fn unnamed(&self) -> OwnedRwLockReadGuard<()> {
        self.unnamed.clone().read_owned().await
    }

    /// Waits until each content has its row, and keeps new ones back until it is dropped.
    pub(super) async fn all_named(&self) -> RwLockWriteGuard<'_, ()> {
        self.unnamed.write().await
    }

    /// Appends `contents` and returns where each lies. When this returns, all of them are on the disk. It
    /// waits for the disk.
    ///
    /// # Errors
    /// An error of the disk. Whatever was written of them is dead then.
    pub(super) fn append(&self, contents: &[Bytes]) -> io::Result<Vec<ContentLocation>> {
        let mut appended = self.lock();
        let mut locations = Vec::with_capacity(contents.len());
        for content in contents {
            if appended.is_full() {
                appended.sync()?;
                appended.current = None;
            }
            locations.push(self.append_one(&mut appended, content)?);
        }
        appended.sync()?;
        Ok(locations)
    }

    fn append_one(&self, appended: &mut Appended, content: &[u8]) -> io::Result<ContentLocation> {
        let number = match &appended.current {
            Some(_) => appended.last,
            None => self.begin(appended)?,
        };
        let current = appended.current.as_mut().ok_or(io::ErrorKind::NotFound)?;
        let (start, length) = (current.length, content.len() as u64);
        if let Err(error) = local_file::write_at(&current.file, content, start) {
            // If this fails too, the next content is written over the remains.
            let _ = current.file.set_len(start);
            return Err(error);
        }
        current.length += length;
        Ok(ContentLocation {
            segment: number,
            start,
            length,
        })
    }

    /// Makes a segment. Its name is on the disk when this returns.
    fn begin(&self, appended: &mut Appended) -> io::Result<u64> {
        let number = appended.last + 1;
        // A number whose file another program has made is passed over the next time.
        appended.last = number;
        // Somebody may have deleted it.
        private_files::folder(&self.folder)?;
        let file = Arc::new(private_files::new_file(&self.path(number))?);
        private_files::sync(&self.folder)?;
        self.open.insert(number, file.clone());
        appended.current = Some(Current { file, length: 0 });
        Ok(number)
    }

    /// The bytes at `location`. It may wait for the disk.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] or [`io::ErrorKind::UnexpectedEof`] if they are not there.
    pub(super) fn read(&self, location: ContentLocation) -> io::Result<Bytes> {
        // The row may be damaged.
        if location.length > SEGMENT_SIZE {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let number = location.segment;
        let file = match self.open.get(&number) {
            Some(file) => file,
            None => {
                let file = Arc::new(File::open(self.path(number))?);
                self.open.insert(number, file.clone());
                file
            }
        };
        let length = usize::try_from(location.length).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        local_file::read_at(&file, &mut bytes, location.start)?;
        Ok(bytes.into())
    }

    /// The numbers and lengths of all segments that this process no longer appends to.
    ///
    /// # Errors
    /// Fails if the folder cannot be read.
    pub(super) fn full(&self) -> io::Result<Vec<(u64, u64)>> {
        let appended = self.lock();
        let current = appended.current.as_ref().map(|_| appended.last);
        // It is listed under the lock, so that no segment is begun meanwhile.
        let mut full = self.list()?;
        full.retain(|(number, _)| Some(*number) != current);
        Ok(full)
    }

    /// Deletes a segment.
    ///
    /// # Errors
    /// An error of the disk.
    pub(super) fn delete(&self, number: u64) -> io::Result<()> {
        let path = self.path(number);
        // The cache closes a file later, and a file that is open keeps its room on the disk.
        File::options().write(true).open(&path)?.set_len(0)?;
        self.open.invalidate(&number);
        self.open.run_pending_tasks();
        fs::remove_file(path)
    }

    /// Closes all files.
    pub(super) fn close(&self) {
        self.open.invalidate_all();
        self.lock().current = None;
    }

    fn list(&self) -> io::Result<Vec<(u64, u64)>> {
        let mut segments = Vec::new();
        for file in fs::read_dir(&self.folder)? {
            let file = file?;
            let name = file.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
            if let Some(number) = number.and_then(|number| number.parse().ok()) {
                segments.push((number, file.metadata()?.len()));
            }
        }
        Ok(segments)
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number:010}{SUFFIX}"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Appended> {
        self.appended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Appended {
    fn is_full(&self) -> bool {
        let current = self.current.as_ref();
        current.is_some_and(|current| current.length >= SEGMENT_SIZE)
    }

    /// After an error nobody knows which bytes are on the disk, so nothing more is appended to the segment.
    fn sync(&mut self) -> io::Result<()> {
        let Some(current) = &self.current else {
            return Ok(());
        };
        let synced = current.file.sync_data();
        if synced.is_err() {
            self.current = None;
        }
        synced
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache_protocol::azure_blob::is_missing;

    fn content(size: usize, of: u8) -> Bytes {
        vec![of; size].into()
    }

    #[test]
    fn contents_are_read_back_and_a_later_process_appends_to_a_segment_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("contents");
        let segments = Segments::open(&folder).unwrap();
        let contents = [content(3, 1), content(0, 2), content(20_000, 3)];
        let first = segments.append(&contents).unwrap();
        drop(segments);
        let segments = Segments::open(&folder).unwrap();
        let second = segments.append(&contents[..1]).unwrap();
        assert_eq!((first[2].segment, first[2].start), (1, 3));
        assert_eq!((second[0].segment, second[0].start), (2, 0));
        for (location, content) in first.iter().chain(&second).zip(contents.iter().cycle()) {
            assert_eq!(segments.read(*location).unwrap(), content);
        }
        assert_eq!(segments.full().unwrap(), [(1, 20_003)]);
    }

    #[test]
    fn a_full_segment_is_followed_by_another_and_can_be_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let segments = Segments::open(folder.path()).unwrap();
        let half = content((SEGMENT_SIZE / 2) as usize, 7);
        let locations = segments
            .append(&[half.clone(), half.clone(), half])
            .unwrap();
        let numbers: Vec<u64> = locations.iter().map(|location| location.segment).collect();
        assert_eq!(numbers, [1, 1, 2]);
        assert_eq!(segments.full().unwrap(), [(1, SEGMENT_SIZE)]);
        segments.delete(1).unwrap();
        assert!(is_missing(&segments.read(locations[0]).unwrap_err()));
        assert!(segments.read(locations[2]).is_ok());
    }

    #[test]
    fn what_is_not_there_is_an_error_and_takes_no_memory() {
        let folder = tempfile::tempdir().unwrap();
        let segments = Segments::open(folder.path()).unwrap();
        let [location] = segments.append(&[content(9, 1)]).unwrap()[..] else {
            panic!("one content has one location");
        };
        for (start, length) in [(1, 9), (u64::MAX, 9), (0, u64::MAX), (0, SEGMENT_SIZE)] {
            let false_one = ContentLocation {
                start,
                length,
                ..location
            };
            assert!(segments.read(false_one).is_err(), "{start} {length}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn after_a_disk_that_was_full_the_next_content_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let segments = Segments::open(folder.path()).unwrap();
        let before = segments.append(&[content(10, 1)]).unwrap();
        // A file that only takes as much as this.
        let full = File::options().write(true).open("/dev/full").unwrap();
        let file = std::mem::replace(
            &mut segments.lock().current.as_mut().unwrap().file,
            Arc::new(full),
        );
        let error = segments.append(&[content(10, 2)]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        segments.lock().current.as_mut().unwrap().file = file;
        let after = segments.append(&[content(10, 3)]).unwrap();
        assert_eq!(after[0].start, 10);
        assert_eq!(segments.read(before[0]).unwrap(), content(10, 1));
        assert_eq!(segments.read(after[0]).unwrap(), content(10, 3));
    }
}
