//! The files that small contents are appended to, beside SQLite's database. A row of `contents` says where
//! in them a content lies.
//!
//! A content is written once, where a row of SQLite's with the content itself is written to the log, from
//! there to the database, and over several pages. Bytes that no row names are dead. Where the file system can
//! punch holes into files, the room of a discarded content is free at once. A segment that is mostly dead
//! even so is emptied and deleted: see `compaction`.
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

/// A segment that nobody appends to any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FullSegment {
    /// Its number.
    pub(super) number: u64,
    /// What it takes of the disk, in bytes.
    pub(super) taken: u64,
}

/// A folder of segments.
#[derive(Debug)]
pub(super) struct Segments {
    folder: PathBuf,
    /// Whether holes in its files give their room back.
    can_free: bool,
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

#[derive(Clone, Debug)]
struct Current {
    file: Arc<File>,
    length: u64,
}

/// Why contents were not appended.
enum AppendError {
    /// They were not written.
    Write(io::Error),
    /// They were not synced. Nobody knows which bytes of the segment are on the disk, so nothing more is
    /// appended to it.
    Sync(io::Error),
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
            can_free: can_free(folder),
            appended: Mutex::default(),
            open: Cache::new(OPEN_FILES),
            unnamed: Arc::default(),
        };
        let last = segments.list()?.iter().map(|segment| segment.number).max();
        segments.lock().last = last.unwrap_or(0);
        Ok(segments)
    }

    /// Take this before contents are appended, and keep it until their rows are written: a compaction waits
    /// for that before it looks for dead segments.
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
    /// An error of the disk. None of them is there then, and the disk has their room again.
    pub(super) fn append(&self, contents: &[Bytes]) -> io::Result<Vec<ContentLocation>> {
        let mut appended = self.lock();
        let (before, last) = (appended.current.clone(), appended.last);
        let mut begun = Vec::new();
        let located = self.append_all(&mut appended, contents, &mut begun);
        located.map_err(|error| {
            for number in begun {
                // If this fails, a compaction does it.
                let _ = self.delete(number);
            }
            if let Some(before) = &before {
                // If this fails, the next content is written over the remains.
                let _ = before.file.set_len(before.length);
            }
            appended.current = None;
            match error {
                AppendError::Write(error) => {
                    if appended.last == last {
                        appended.current = before;
                    }
                    error
                }
                AppendError::Sync(error) => error,
            }
        })
    }

    fn append_all(
        &self,
        appended: &mut Appended,
        contents: &[Bytes],
        begun: &mut Vec<u64>,
    ) -> Result<Vec<ContentLocation>, AppendError> {
        let mut locations = Vec::with_capacity(contents.len());
        for content in contents {
            if appended.is_full() {
                appended.sync().map_err(AppendError::Sync)?;
                appended.current = None;
            }
            if appended.current.is_none() {
                begun.push(self.begin(appended).map_err(AppendError::Write)?);
            }
            let location = append_one(appended, content);
            locations.push(location.map_err(AppendError::Write)?);
        }
        appended.sync().map_err(AppendError::Sync)?;
        Ok(locations)
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

    /// All segments that this process no longer appends to.
    ///
    /// # Errors
    /// Fails if the folder cannot be read.
    pub(super) fn full(&self) -> io::Result<Vec<FullSegment>> {
        let mut appended = self.lock();
        // They are listed under the lock, so that no segment is begun meanwhile.
        let mut full = self.list()?;
        let last = appended.last;
        if appended.current.is_some() {
            let before = full.len();
            full.retain(|segment| segment.number != last);
            if full.len() == before {
                // Somebody deleted it, so what is appended to it would be lost.
                appended.current = None;
            }
        }
        Ok(full)
    }

    /// Whether [`free`](Self::free) does something.
    pub(super) fn can_free(&self) -> bool {
        self.can_free
    }

    /// Gives the room of dead contents back to the disk, where the file system can do that.
    pub(super) fn free(&self, mut contents: Vec<ContentLocation>) {
        if !self.can_free {
            return;
        }
        // The row may be damaged.
        contents.retain(|content| content.length <= SEGMENT_SIZE);
        contents.sort_by_key(|content| (content.segment, content.start));
        let neighbours = contents.chunk_by(|one, next| {
            one.segment == next.segment && one.start.saturating_add(one.length) == next.start
        });
        for dead in neighbours {
            let length = dead.iter().map(|content| content.length).sum();
            if let Some(first) = dead.first() {
                // If it fails, a compaction does it.
                let _ = self.punch(first.segment, first.start, length);
            }
        }
    }

    #[cfg(target_os = "linux")]
    fn punch(&self, segment: u64, start: u64, length: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        let file = File::options().write(true).open(self.path(segment))?;
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&file, hole, start, length)?)
    }

    #[cfg(not(target_os = "linux"))]
    fn punch(&self, _segment: u64, _start: u64, _length: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Deletes a segment, if it is there.
    ///
    /// # Errors
    /// An error of the disk.
    pub(super) fn delete(&self, number: u64) -> io::Result<()> {
        let path = self.path(number);
        let deleted = || {
            // The cache closes a file later, and a file that is open keeps its room on the disk.
            File::options().write(true).open(&path)?.set_len(0)?;
            self.open.invalidate(&number);
            self.open.run_pending_tasks();
            fs::remove_file(&path)
        };
        match deleted() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            deleted => deleted,
        }
    }

    /// Closes all files.
    pub(super) fn close(&self) {
        self.open.invalidate_all();
        self.lock().current = None;
    }

    fn list(&self) -> io::Result<Vec<FullSegment>> {
        let files = match fs::read_dir(&self.folder) {
            // Somebody deleted it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            files => files?,
        };
        let mut segments = Vec::new();
        for file in files {
            let file = file?;
            let name = file.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
            let number = number.and_then(|number| number.parse().ok());
            // A file of another name is not a segment.
            if let Some(number) = number
                && number <= LAST
                && name == segment_name(number).as_str()
            {
                let taken = self.taken(&file.metadata()?);
                segments.push(FullSegment { number, taken });
            }
        }
        Ok(segments)
    }

    /// What a file takes of the disk, in bytes: less than its length if it has holes. Some file systems keep
    /// more ready for it for a while, which does not count.
    #[cfg(target_os = "linux")]
    fn taken(&self, metadata: &fs::Metadata) -> u64 {
        let blocks = std::os::unix::fs::MetadataExt::blocks(metadata);
        match self.can_free {
            true => metadata.len().min(blocks.saturating_mul(512)),
            false => metadata.len(),
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn taken(&self, metadata: &fs::Metadata) -> u64 {
        metadata.len()
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(segment_name(number))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Appended> {
        self.appended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn append_one(appended: &mut Appended, content: &[u8]) -> io::Result<ContentLocation> {
    let segment = appended.last;
    let current = appended.current.as_mut().ok_or(io::ErrorKind::NotFound)?;
    let (start, length) = (current.length, content.len() as u64);
    local_file::write_at(&current.file, content, start)?;
    current.length += length;
    Ok(ContentLocation {
        segment,
        start,
        length,
    })
}

/// The highest number of a file that counts as a segment. No service gets there.
const LAST: u64 = 1 << 48;

fn segment_name(number: u64) -> String {
    format!("{number:010}{SUFFIX}")
}

/// Whether a hole in a file of `folder` gives its room back. Btrfs and ZFS keep the room until all that was
/// written with it is gone, and tell that it is free.
#[cfg(target_os = "linux")]
fn can_free(folder: &Path) -> bool {
    /// The numbers of ext4, XFS and tmpfs (`linux/magic.h`).
    const KINDS: [u64; 3] = [0xef53, 0x5846_5342, 0x0102_1994];
    rustix::fs::statfs(folder).is_ok_and(|found| KINDS.contains(&(found.f_type as u64)))
}

#[cfg(not(target_os = "linux"))]
fn can_free(_folder: &Path) -> bool {
    false
}

impl Appended {
    fn is_full(&self) -> bool {
        let current = self.current.as_ref();
        current.is_some_and(|current| current.length >= SEGMENT_SIZE)
    }

    fn sync(&self) -> io::Result<()> {
        match &self.current {
            Some(current) => current.file.sync_data(),
            None => Ok(()),
        }
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
        let full = segments.full().unwrap();
        assert_eq!(full.len(), 1);
        assert_eq!((full[0].number, full[0].taken), (1, 20_003));
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
        let first = FullSegment {
            number: 1,
            taken: SEGMENT_SIZE,
        };
        assert_eq!(segments.full().unwrap(), [first]);
        segments.delete(1).unwrap();
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

    #[test]
    fn contents_that_could_not_all_be_appended_leave_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let segments = Segments::open(folder.path()).unwrap();
        segments.append(&[content(10, 1)]).unwrap();
        // The third is in a segment that cannot be made.
        fs::create_dir(folder.path().join(segment_name(2))).unwrap();
        let large = content(SEGMENT_SIZE as usize, 2);
        let error = segments
            .append(&[content(20, 2), large.clone(), content(30, 2)])
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        let first = fs::metadata(folder.path().join(segment_name(1))).unwrap();
        assert_eq!(first.len(), 10);
        let after = segments.append(&[content(30, 3)]).unwrap();
        assert_eq!((after[0].segment, after[0].start), (3, 0));
        assert_eq!(segments.read(after[0]).unwrap(), content(30, 3));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_room_of_dead_contents_is_free_at_once_and_their_neighbours_stay_whole() {
        let folder = tempfile::tempdir().unwrap();
        let segments = Segments::open(folder.path()).unwrap();
        let contents: Vec<Bytes> = (0..200).map(|of| content(20_000, of)).collect();
        let located = segments.append(&contents).unwrap();
        // The first fills the segment, the second begins the next one.
        let others = [content(SEGMENT_SIZE as usize, 0), content(1, 0)];
        segments.append(&others).unwrap();
        let before = segments.full().unwrap()[0].taken;
        let is_dead = |number: &usize| number % 10 < 5;
        let numbers = || 0..located.len();
        let dead: Vec<_> = numbers()
            .filter(is_dead)
            .map(|number| located[number])
            .collect();
        if !segments.can_free() {
            eprintln!("skipped: this file system frees no part of a file");
            return;
        }
        segments.free(dead.into_iter().rev().collect());
        let freed = before - segments.full().unwrap()[0].taken;
        // A file system frees whole blocks.
        assert!(freed > 90 * 20_000 && freed <= 101 * 20_000, "{freed}");
        for number in numbers().filter(|number| !is_dead(number)) {
            assert_eq!(segments.read(located[number]).unwrap(), contents[number]);
        }
    }

    #[test]
    fn files_of_other_names_are_no_segments_and_a_folder_that_is_gone_is_made_again() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("contents");
        let segments = Segments::open(&folder).unwrap();
        segments.append(&[content(10, 1)]).unwrap();
        for name in ["7.segment", "18446744073709551615.segment", "x.segment"] {
            fs::write(folder.join(name), "x").unwrap();
        }
        assert_eq!(segments.full().unwrap(), []);
        let again = Segments::open(&folder).unwrap();
        assert_eq!(again.append(&[content(10, 2)]).unwrap()[0].segment, 2);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(segments.full().unwrap(), []);
        let after = segments.append(&[content(10, 3)]).unwrap();
        assert_eq!((after[0].segment, after[0].start), (2, 0));
        assert!(folder.join(segment_name(2)).exists());
    }
}
