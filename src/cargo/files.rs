//! Reading the content of parts from the disk, and putting parts there.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Take, Write};
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use crate::cargo::manifest::{Entry, Part, What, length};

/// How hard content is compressed: zstd's fastest level. What gains more is the long window.
const LEVEL: i32 = 1;

/// The longest window, as a power of two: a library has its metadata twice, once in a file of its
/// own, and the second copy costs nothing where the window reaches the first. zstd's own limit for
/// who decompresses without being told otherwise.
const LONGEST_WINDOW: u32 = 27;

/// Content from this length on, in bytes, is searched for repetitions far apart.
const LONG: u64 = 256 * 1024;

/// How much of a file is in memory at once, in bytes.
const PIECE: usize = 256 * 1024;

/// The largest part, in bytes: what is larger costs more to move than to make anew.
pub const PART_LIMIT: u64 = 1 << 30;

/// What a half-made folder or file is called in front of its name. Cargo looks at no such name.
const STAGING: &str = ".sccache-action-";

/// Why a part is not on the disk.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// Something is there already, which is never replaced.
    #[error("{0} is there already")]
    IsThere(PathBuf),
    /// It names what lies outside of its folder, or is no part at all.
    #[error("{0:?} is not a path of its folder")]
    Outside(String),
    /// The disk does not take it, or the content ended too early.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What is at `path` below `root`, as an entry without links. `None` for what is neither file,
/// folder nor symbolic link, and for names that are not Unicode.
fn entry(root: &Path, path: &Path, metadata: &fs::Metadata) -> io::Result<Option<Entry>> {
    let Some(name) = path.strip_prefix(root).ok().and_then(relative_name) else {
        return Ok(None);
    };
    let what = if metadata.is_file() {
        What::File {
            length: metadata.len(),
            mode: mode(metadata),
        }
    } else if metadata.is_dir() {
        What::Folder
    } else if metadata.is_symlink() {
        match fs::read_link(path)?.to_str() {
            Some(target) => What::Symlink(target.to_owned()),
            None => return Ok(None),
        }
    } else {
        return Ok(None);
    };
    Ok(Some(Entry {
        path: name,
        what,
        modified: metadata.modified()?.into(),
    }))
}

/// A relative path with `/` between its components.
fn relative_name(path: &Path) -> Option<String> {
    let names: Option<Vec<&str>> = path
        .components()
        .map(|component| match component {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect();
    Some(names?.join("/"))
}

/// The entries of all that is at these paths and below, folders before what is in them. `None`
/// where something cannot be part of a part.
///
/// # Errors
/// Where the disk cannot be read.
pub fn entries(root: &Path, paths: &[PathBuf]) -> io::Result<Option<Vec<Entry>>> {
    let mut found = Vec::new();
    let mut first_names: HashMap<(u64, u64), u32> = HashMap::new();
    let mut left: Vec<PathBuf> = paths.iter().rev().cloned().collect();
    while let Some(path) = left.pop() {
        let metadata = fs::symlink_metadata(&path)?;
        let Some(mut entry) = entry(root, &path, &metadata)? else {
            return Ok(None);
        };
        if metadata.is_dir() {
            let mut inner: Vec<PathBuf> = fs::read_dir(&path)?
                .map(|entry| Ok(entry?.path()))
                .collect::<io::Result<_>>()?;
            inner.sort_unstable_by(|one, other| other.cmp(one));
            left.append(&mut inner);
        } else if metadata.is_file()
            && let Some(identity) = shared_identity(&metadata)
        {
            let number = u32::try_from(found.len()).map_err(io::Error::other)?;
            let first = *first_names.entry(identity).or_insert(number);
            if first != number {
                entry.what = What::Link(first);
            }
        }
        found.push(entry);
    }
    Ok(Some(found))
}

/// What tells a file that has several names from all others; `None` for one with a single name.
#[cfg(unix)]
fn shared_identity(metadata: &fs::Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    (metadata.nlink() > 1).then(|| (metadata.dev(), metadata.ino()))
}

#[cfg(not(unix))]
fn shared_identity(_metadata: &fs::Metadata) -> Option<(u64, u64)> {
    None
}

#[cfg(unix)]
fn mode(metadata: &fs::Metadata) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    metadata.permissions().mode() & 0o777
}

#[cfg(not(unix))]
fn mode(_metadata: &fs::Metadata) -> u32 {
    0
}

/// Hands the content of all files among `entries` to `take`, one behind the other.
fn read_content(
    root: &Path,
    entries: &[Entry],
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    for entry in entries {
        let What::File { length, .. } = entry.what else {
            continue;
        };
        let mut file = File::open(root.join(&entry.path))?.take(length);
        let mut read = 0;
        loop {
            let count = file.read(&mut piece)?;
            if count == 0 {
                break;
            }
            read += count as u64;
            take(piece.get(..count).unwrap_or_default())?;
        }
        // It was changed while this looked.
        if read != length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// The digest of the content of `entries`.
///
/// # Errors
/// Where the disk cannot be read, or a file is no longer as long as its entry says.
pub fn digest(root: &Path, entries: &[Entry]) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    read_content(root, entries, |piece| {
        hasher.update(piece);
        Ok(())
    })?;
    Ok(hasher.finalize())
}

/// Writes the content of `entries`, compressed, to `to`, and gives its digest.
///
/// # Errors
/// As [`digest`], and where `to` does not take it.
pub fn compress(root: &Path, entries: &[Entry], to: impl Write) -> io::Result<blake3::Hash> {
    let length = length(entries);
    let mut encoder = zstd::Encoder::new(to, LEVEL)?;
    encoder.set_pledged_src_size(Some(length))?;
    if length >= LONG {
        let window = u64::BITS - length.leading_zeros();
        encoder.long_distance_matching(true)?;
        encoder.window_log(window.min(LONGEST_WINDOW))?;
    }
    let mut hasher = blake3::Hasher::new();
    read_content(root, entries, |piece| {
        hasher.update(piece);
        encoder.write_all(piece)
    })?;
    encoder.finish()?;
    Ok(hasher.finalize())
}

/// Whether a part's place is taken: by the folder that guards it, or by any of its files.
pub fn is_there(root: &Path, part: &Part) -> bool {
    match &part.guard {
        Some(guard) => root.join(guard).symlink_metadata().is_ok(),
        None => part
            .entries
            .iter()
            .all(|entry| root.join(&entry.path).symlink_metadata().is_ok()),
    }
}

/// Puts a part on the disk, given its compressed content. What is there already stays as it is; a
/// part with a guard is then not put there at all.
///
/// # Errors
/// Where the part is not as a part is, or the disk does not take it. The guard is not there then.
pub fn put(root: &Path, part: &Part, compressed: impl Read) -> Result<(), PutError> {
    let placing = Placing::of(root, part)?;
    let result = placing.put(compressed);
    if result.is_err()
        && let Some((_, staged)) = &placing.guard
    {
        let _ = fs::remove_dir_all(staged);
    }
    result
}

/// A part that is being put on the disk.
struct Placing<'a> {
    part: &'a Part,
    root: &'a Path,
    /// The guard's folder, and the one that it is made in.
    guard: Option<(PathBuf, PathBuf)>,
}

impl<'a> Placing<'a> {
    fn of(root: &'a Path, part: &'a Part) -> Result<Self, PutError> {
        if part.length() > PART_LIMIT {
            return Err(PutError::Io(io::ErrorKind::FileTooLarge.into()));
        }
        for entry in &part.entries {
            if !is_inside(&entry.path) {
                return Err(PutError::Outside(entry.path.clone()));
            }
        }
        let guard = match &part.guard {
            None => None,
            Some(guard) => {
                let path = root.join(guard);
                let staged = staged(&path).filter(|_| is_inside(guard));
                let staged = staged.ok_or_else(|| PutError::Outside(guard.clone()))?;
                if path.symlink_metadata().is_ok() {
                    return Err(PutError::IsThere(path));
                }
                Some((path, staged))
            }
        };
        Ok(Self { part, root, guard })
    }

    /// Where an entry is made.
    fn place(&self, entry: &Entry) -> PathBuf {
        let path = self.root.join(&entry.path);
        match &self.guard {
            Some((guard, staged)) => match path.strip_prefix(guard) {
                Ok(rest) if rest.as_os_str().is_empty() => staged.clone(),
                Ok(rest) => staged.join(rest),
                Err(_) => path,
            },
            None => path,
        }
    }

    fn put(&self, compressed: impl Read) -> Result<(), PutError> {
        if let Some((_, staged)) = &self.guard {
            // A restore that was killed left it.
            match fs::remove_dir_all(staged) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        let mut content = zstd::Decoder::new(compressed)?;
        let mut folders = Folders::default();
        if let Some((guard, _)) = &self.guard {
            self.leads_through_no_link(guard)?;
        }
        for entry in &self.part.entries {
            let place = self.place(entry);
            self.leads_through_no_link(&place)?;
            match &entry.what {
                What::Folder => folders.make(&place)?,
                What::File { length, mode } => {
                    if let Some(parent) = place.parent() {
                        folders.make(parent)?;
                    }
                    let mut content = (&mut content).take(*length);
                    self.put_file(entry, &place, *mode, &mut content)?;
                }
                What::Link(_) | What::Symlink(_) => {}
            }
        }
        for entry in &self.part.entries {
            if let What::Link(first) = &entry.what {
                self.link(*first, &self.place(entry))?;
            }
        }
        // Last, so that nothing of this part is written through one.
        for entry in &self.part.entries {
            if let What::Symlink(target) = &entry.what {
                let place = self.place(entry);
                self.leads_through_no_link(&place)?;
                symlink(&entry.path, target, &place)?;
            }
        }
        // After what is in them, which would change their times.
        for entry in self.part.entries.iter().rev() {
            if entry.what == What::Folder {
                set_folder_time(&self.place(entry), entry.modified.into());
            }
        }
        if let Some((guard, staged)) = &self.guard
            && staged.exists()
        {
            fs::rename(staged, guard)?;
        }
        Ok(())
    }

    /// Refuses a path one of whose folders below the root is a symbolic link, no matter who made it.
    fn leads_through_no_link(&self, place: &Path) -> Result<(), PutError> {
        let refused = || PutError::Outside(place.display().to_string());
        let below = place.strip_prefix(self.root).map_err(|_| refused())?;
        let mut folder = self.root.to_owned();
        for name in below.parent().into_iter().flat_map(Path::components) {
            folder.push(name);
            match folder.symlink_metadata() {
                Ok(metadata) if metadata.is_symlink() => return Err(refused()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn put_file(
        &self,
        entry: &Entry,
        place: &Path,
        mode: u32,
        content: &mut Take<impl Read>,
    ) -> Result<(), PutError> {
        let time = SystemTime::from(entry.modified);
        if self.guard.is_some() {
            return match write(place, mode, time, content) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    Err(PutError::IsThere(place.to_owned()))
                }
                written => Ok(written?),
            };
        }
        if place.symlink_metadata().is_ok() {
            io::copy(content, &mut io::sink())?;
            return Ok(());
        }
        // Nothing guards it, so it appears as a whole or not at all.
        let staged = staged(place).ok_or_else(|| PutError::Outside(entry.path.clone()))?;
        let _ = fs::remove_file(&staged);
        let moved = write(&staged, mode, time, content).and_then(|()| fs::rename(&staged, place));
        Ok(moved.inspect_err(|_| drop(fs::remove_file(&staged)))?)
    }

    fn link(&self, first: u32, place: &Path) -> Result<(), PutError> {
        let first = self.part.entries.get(first as usize);
        let first = first.filter(|entry| matches!(entry.what, What::File { .. }));
        let first = first.ok_or_else(|| PutError::Outside(place.display().to_string()))?;
        let file = self.place(first);
        if fs::hard_link(&file, place).is_err() {
            fs::copy(&file, place)?;
            let copy = File::options().write(true).open(place)?;
            copy.set_modified(first.modified.into())?;
        }
        Ok(())
    }
}

/// The folders that are known to be there, so that each is made once.
#[derive(Default)]
struct Folders(std::collections::HashSet<PathBuf>);

impl Folders {
    fn make(&mut self, folder: &Path) -> io::Result<()> {
        if !self.0.contains(folder) {
            fs::create_dir_all(folder)?;
            self.0.insert(folder.to_owned());
        }
        Ok(())
    }
}

/// Whether a path stays in the folder that it is relative to.
fn is_inside(path: &str) -> bool {
    let names = path.split('/');
    !path.is_empty()
        && names.clone().all(|name| !name.is_empty() && name != "." && name != "..")
        // Nor is it one with a drive or other separators, where the system has them.
        && relative_name(Path::new(path)).is_some_and(|name| name == path)
}

/// Where what is to be at `path` is made.
fn staged(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    Some(path.with_file_name(format!("{STAGING}{name}")))
}

/// Makes a new file of all that `content` is to have.
fn write(
    path: &Path,
    mode: u32,
    time: SystemTime,
    content: &mut Take<impl Read>,
) -> io::Result<()> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // What only a few may do is taken from the user's own mask.
        options.mode(match mode {
            0 => 0o644,
            mode => mode & 0o777,
        });
    }
    #[cfg(not(unix))]
    let _ = mode;
    let mut file = options.open(path)?;
    io::copy(content, &mut file)?;
    if content.limit() > 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    file.set_modified(time)
}

/// Sets a folder's time, where the system lets that be done: cargo takes the times of folders that a
/// build script names.
pub fn set_folder_time(folder: &Path, time: SystemTime) {
    // Windows does not let a folder be opened as a file is.
    let _ = filetime::set_file_mtime(folder, time.into());
}

/// Makes a symbolic link that leads nowhere outside of the part's root.
fn symlink(path: &str, target: &str, place: &Path) -> Result<(), PutError> {
    let mut depth = path.split('/').count().saturating_sub(1);
    let mut goes_down = false;
    for name in target.split('/') {
        let stays = match name {
            "" | "." => !target.starts_with('/'),
            // Up through a name would be up from wherever that name, if it is a link, leads.
            ".." if goes_down => false,
            ".." => depth.checked_sub(1).map(|less| depth = less).is_some(),
            _ => {
                goes_down = true;
                true
            }
        };
        if !stays {
            return Err(PutError::Outside(target.to_owned()));
        }
    }
    #[cfg(unix)]
    {
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(std::os::unix::fs::symlink(target, place)?)
    }
    #[cfg(not(unix))]
    Err(PutError::Outside(place.display().to_string()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cargo::manifest::{Package, Root, chunk_key};

    /// A part of all that is in these folders of `root`.
    fn part(root: &Path, folders: &[&str], guard: Option<&str>) -> (Part, Vec<u8>) {
        let paths: Vec<PathBuf> = folders.iter().map(|folder| root.join(folder)).collect();
        let entries = entries(root, &paths).unwrap().unwrap();
        let mut content = Vec::new();
        compress(root, &entries, &mut content).unwrap();
        let part = Part {
            root: Root::Git,
            name: "part".to_owned(),
            guard: guard.map(str::to_owned),
            package: Package::Several,
            chunk: chunk_key(digest(root, &entries).unwrap()),
            entries,
            needs: Vec::new(),
            used: 0,
        };
        (part, content)
    }

    /// A folder with files of every kind, changed long ago.
    fn source() -> tempfile::TempDir {
        let source = tempfile::tempdir().unwrap();
        let root = source.path();
        fs::create_dir_all(root.join("guard/empty")).unwrap();
        fs::create_dir_all(root.join("deps")).unwrap();
        fs::write(root.join("guard/large"), vec![7; 700_000]).unwrap();
        fs::write(root.join("deps/file"), b"content").unwrap();
        fs::hard_link(root.join("deps/file"), root.join("deps/other")).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(root.join("deps/file"), mode).unwrap();
            std::os::unix::fs::symlink("../deps/file", root.join("guard/link")).unwrap();
        }
        let long_ago = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
        let files = ["guard/large", "deps/file", "guard/empty", "guard"];
        for file in files.map(|file| root.join(file)) {
            filetime::set_file_mtime(file, long_ago.into()).unwrap();
        }
        source
    }

    #[cfg(unix)]
    #[test]
    fn a_part_is_put_back_with_its_modes_times_and_links() {
        use std::os::unix::fs::MetadataExt;
        let source = source();
        let (part, content) = part(source.path(), &["guard", "deps"], Some("guard"));
        assert_eq!(part.length(), 700_007);
        // The content of a file with two names is there once.
        assert!(content.len() < 1000);
        let target = tempfile::tempdir().unwrap();
        let root = target.path();
        assert!(!is_there(root, &part));
        put(root, &part, &*content).unwrap();
        assert!(is_there(root, &part));
        let paths = ["guard", "deps"].map(|folder| root.join(folder));
        let mut again = entries(root, &paths).unwrap().unwrap();
        // When a link was made, and a folder that nothing was said of, is of no interest.
        for (entry, before) in again.iter_mut().zip(&part.entries) {
            if matches!(entry.what, What::Symlink(_)) || entry.path == "deps" {
                entry.modified = before.modified;
            }
        }
        assert_eq!(again, part.entries);
        let inode = |name: &str| fs::metadata(root.join(name)).unwrap().ino();
        assert_eq!(inode("deps/file"), inode("deps/other"));
        assert_eq!(fs::read(root.join("guard/link")).unwrap(), b"content");
    }

    #[test]
    fn content_that_ends_early_leaves_no_guard() {
        let source = source();
        let (part, content) = part(source.path(), &["guard", "deps"], Some("guard"));
        for bytes in [&content[..content.len() / 2], b""] {
            let target = tempfile::tempdir().unwrap();
            assert!(put(target.path(), &part, bytes).is_err());
            assert!(!target.path().join("guard").exists());
            let staged = target.path().join(".sccache-action-guard");
            assert!(!staged.exists());
        }
    }

    #[test]
    fn what_is_there_is_not_replaced() {
        let source = source();
        let (guarded, content) = part(source.path(), &["guard", "deps"], Some("guard"));
        let target = tempfile::tempdir().unwrap();
        fs::create_dir(target.path().join("guard")).unwrap();
        let refused = put(target.path(), &guarded, &*content);
        assert!(matches!(refused, Err(PutError::IsThere(_))), "{refused:?}");
        // Of a part without a guard the rest is put there.
        let (free, content) = part(source.path(), &["deps/file", "guard/large"], None);
        fs::create_dir(target.path().join("deps")).unwrap();
        fs::write(target.path().join("deps/file"), b"own").unwrap();
        put(target.path(), &free, &*content).unwrap();
        assert_eq!(fs::read(target.path().join("deps/file")).unwrap(), b"own");
        let large = fs::read(target.path().join("guard/large")).unwrap();
        assert_eq!(large.len(), 700_000);
    }

    #[test]
    fn nothing_is_written_outside_of_the_folder() {
        let source = source();
        let (good, content) = part(source.path(), &["deps/file"], None);
        let target = tempfile::tempdir().unwrap();
        let root = target.path().join("root");
        fs::create_dir(&root).unwrap();
        for path in ["../file", "/file", "a/../../file", "", ".", "a//b", "./a"] {
            let mut part = good.clone();
            part.entries[0].path = path.to_owned();
            let refused = put(&root, &part, &*content);
            assert!(matches!(refused, Err(PutError::Outside(_))), "{path}");
            let mut part = good.clone();
            part.guard = Some(path.to_owned());
            let refused = put(&root, &part, &*content);
            assert!(matches!(refused, Err(PutError::Outside(_))), "{path}");
        }
        for link in ["/etc/passwd", "../x", "a/../../x"] {
            let mut part = good.clone();
            part.entries[0].what = What::Symlink(link.to_owned());
            part.entries[0].path = "link".to_owned();
            let refused = put(&root, &part, &*content);
            assert!(matches!(refused, Err(PutError::Outside(_))), "{link}");
        }
        let outside: Vec<_> = fs::read_dir(target.path()).unwrap().collect();
        assert_eq!(outside.len(), 1);
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }

    #[cfg(unix)]
    #[test]
    fn no_chain_of_links_leads_out_of_the_folder() {
        let source = source();
        let (good, content) = part(source.path(), &["deps/file"], None);
        let file = good.entries[0].clone();
        let entry = |path: &str, what: What| Entry {
            path: path.to_owned(),
            what,
            modified: file.modified,
        };
        let link = |path: &str, target: &str| entry(path, What::Symlink(target.to_owned()));
        let chain = vec![
            entry("a/b/c", What::Folder),
            entry("f", file.what.clone()),
            link("a/b/c/l1", "../../.."),
            link("a/b/c/l2", "l1/.."),
            entry("a/b/c/l2/ESCAPED", What::Link(1)),
        ];
        let through = vec![
            entry("f", file.what.clone()),
            link("l", "a"),
            entry("l/ESCAPED", What::Link(0)),
        ];
        for entries in [chain, through] {
            let target = tempfile::tempdir().unwrap();
            let root = target.path().join("root");
            fs::create_dir(&root).unwrap();
            let part = Part {
                entries,
                ..good.clone()
            };
            assert!(put(&root, &part, &*content).is_err());
            let outside: Vec<_> = fs::read_dir(target.path()).unwrap().collect();
            assert_eq!(outside.len(), 1);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_that_is_there_already_is_not_followed() {
        let source = source();
        let (good, content) = part(source.path(), &["deps/file"], None);
        let target = tempfile::tempdir().unwrap();
        let [root, elsewhere] = ["root", "elsewhere"].map(|name| target.path().join(name));
        fs::create_dir(&root).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, root.join("deps")).unwrap();
        let refused = put(&root, &good, &*content);
        assert!(matches!(refused, Err(PutError::Outside(_))));
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    }

    #[test]
    fn a_part_that_unpacks_to_too_much_is_not_put_there() {
        let source = source();
        let (mut part, content) = part(source.path(), &["deps/file"], None);
        part.entries[0].what = What::File {
            length: PART_LIMIT + 1,
            mode: 0,
        };
        let target = tempfile::tempdir().unwrap();
        assert!(put(target.path(), &part, &*content).is_err());
        assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
    }
}
