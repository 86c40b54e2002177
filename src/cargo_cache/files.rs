//! The files of parts: reads their content from the disk, and extracts parts to the disk.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Take, Write};
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use memchr::memmem::Finder;

use crate::cargo_cache::manifest::{CachePart, FileEntry, FileKind, length};
use crate::cargo_cache::open_below::OpenFolder;

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

/// The largest part, in bytes: a larger one costs more to move than to build again.
pub const PART_LIMIT: u64 = 1 << 30;

/// The longest text in which the root's path is replaced, in bytes.
const TEXT_LIMIT: u64 = 16 << 20;

/// The placeholder for the path of the root in a stored text. No text has a zero byte of its own.
const PLACEHOLDER: &[u8] = b"\0root\0";

/// The prefix of the name of an unfinished folder or file. Cargo ignores such names.
pub(crate) const STAGING: &str = ".sccache-action-";

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

/// The entry of the file, folder or symbolic link at `path` below `root`, without hard links. `None` for
/// anything else, and for names that are not Unicode.
fn entry(root: &Path, path: &Path, metadata: &fs::Metadata) -> io::Result<Option<FileEntry>> {
    let Some(name) = path.strip_prefix(root).ok().and_then(relative_name) else {
        return Ok(None);
    };
    let kind = if metadata.is_file() {
        FileKind::File {
            length: metadata.len(),
            mode: mode(metadata),
        }
    } else if metadata.is_dir() {
        FileKind::Folder
    } else if metadata.is_symlink() {
        match fs::read_link(path)?.to_str() {
            Some(target) => FileKind::Symlink(target.to_owned()),
            None => return Ok(None),
        }
    } else {
        return Ok(None);
    };
    Ok(Some(FileEntry {
        path: name,
        kind,
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

/// The entries of everything at these paths and below, folders before their content. `None` if a part
/// cannot have one of them.
///
/// # Errors
/// [`io::Error`] if the disk cannot be read.
pub fn entries(root: &Path, paths: &[PathBuf]) -> io::Result<Option<Vec<FileEntry>>> {
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
                entry.kind = FileKind::Link(first);
            }
        }
        found.push(entry);
    }
    Ok(Some(found))
}

/// The identity of a file that has several names; `None` for a file with a single name.
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

/// The text at `path` with a placeholder for each occurrence of `root`. `None` if it has none, is too long,
/// or is no text.
fn marked(root: &Path, path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    let read = File::open(path)?
        .take(TEXT_LIMIT + 1)
        .read_to_end(&mut text)?;
    if read as u64 > TEXT_LIMIT || text.contains(&0) {
        return Ok(None);
    }
    let marked = replaced(&text, root.as_os_str().as_encoded_bytes(), PLACEHOLDER);
    Ok((marked != text).then_some(marked))
}

fn replaced(text: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
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

/// Whether a part exists on the disk: its commit marker, or without one all of its files.
pub fn exists(root: &Path, part: &CachePart) -> bool {
    match &part.commit_marker {
        Some(commit_marker) => root.join(commit_marker).symlink_metadata().is_ok(),
        None => part
            .entries
            .iter()
            .all(|entry| root.join(&entry.path).symlink_metadata().is_ok()),
    }
}

/// Called with the length of each piece of content in bytes; an error ends the extraction.
pub type Checkpoint<'a> = &'a dyn Fn(u64) -> io::Result<()>;

/// A reader that calls the checkpoint at each piece.
pub(super) struct CheckedReader<'a, R> {
    pub(super) content: R,
    pub(super) checkpoint: Checkpoint<'a>,
}

impl<R: Read> Read for CheckedReader<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.content.read(bytes)?;
        (self.checkpoint)(read as u64)?;
        Ok(read)
    }
}

/// The conditions of extracting a part.
#[derive(Clone, Copy)]
pub struct Conditions<'a> {
    /// Decides whether a file may have its name, given its entry and the file at its beginning.
    pub accepts: &'a dyn Fn(&FileEntry, &mut File) -> io::Result<bool>,
    /// Called at each piece of content.
    pub checkpoint: Checkpoint<'a>,
}

/// Extracts a part to the disk, given its compressed content. Existing files stay as they are; if the
/// commit marker exists, nothing is extracted. A file that `accepts` refuses does not get its name.
///
/// # Errors
/// [`ExtractError::UnsafePath`] if a path leads outside, [`ExtractError::AlreadyExists`] if the commit
/// marker exists, [`ExtractError::Io`] if the content is too large or damaged, the disk refuses it, or
/// `checkpoint` ends it. The commit marker is absent after an error, unless it existed before.
pub fn extract(
    root: &Path,
    part: &CachePart,
    compressed: impl Read,
    conditions: Conditions<'_>,
) -> Result<(), ExtractError> {
    check(part)?;
    fs::create_dir_all(root)?;
    let below = OpenFolder::open(root)?;
    let commit_marker = match &part.commit_marker {
        Some(commit_marker) => Some(CommitMarker::of(&below, commit_marker)?),
        None => None,
    };
    let extractor = Extractor {
        part,
        root,
        below,
        commit_marker,
        conditions,
    };
    let result = extractor.extract(compressed);
    if result.is_err()
        && let Some(commit_marker) = &extractor.commit_marker
    {
        let _ = fs::remove_dir_all(root.join(&commit_marker.staged));
    }
    result
}

/// Refuses a part that is too large, or has a path outside of its root.
fn check(part: &CachePart) -> Result<(), ExtractError> {
    if part.length() > PART_LIMIT {
        return Err(ExtractError::Io(io::ErrorKind::FileTooLarge.into()));
    }
    let paths = part.entries.iter().map(|entry| &entry.path);
    match paths
        .chain(&part.commit_marker)
        .find(|path| !is_inside(path))
    {
        Some(path) => Err(ExtractError::UnsafePath(path.clone())),
        None => Ok(()),
    }
}

/// The commit marker: the folder that is renamed last, as a path below the root, and its staged path.
/// Nobody else knows the staged name, so no other job can write in it or rename it.
struct CommitMarker {
    path: String,
    staged: String,
}

impl CommitMarker {
    fn of(below: &OpenFolder, path: &str) -> Result<Self, ExtractError> {
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

/// The parent folder of `path`, created if missing, and the name in it.
fn parent_of<'p>(below: &OpenFolder, path: &'p str) -> Result<(OpenFolder, &'p str), ExtractError> {
    let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
    let folder = below
        .make_all(parent)
        .map_err(|error| not_through_a_link(error, path))?;
    Ok((folder, name))
}

/// The file at `path` below `root`, through no link.
///
/// # Errors
/// [`ExtractError::Io`] if there is none, or if a link leads there.
pub(crate) fn open_below(root: &Path, path: &str) -> Result<File, ExtractError> {
    let below = OpenFolder::open(root)?;
    let (parent, name) = parent_of(&below, path)?;
    Ok(parent.read(name)?)
}

/// Creates the folder `folder` below `root`, through no link.
///
/// # Errors
/// [`ExtractError::UnsafePath`] if a link leads there, [`ExtractError::Io`] if the disk refuses it.
pub(crate) fn make_below(root: &Path, folder: &Path) -> Result<(), ExtractError> {
    let outside = || ExtractError::UnsafePath(folder.display().to_string());
    let below = folder.strip_prefix(root).ok().and_then(relative_name);
    let path = below.ok_or_else(outside)?;
    let made = OpenFolder::open(root)?.make_all(&path);
    made.map(drop)
        .map_err(|error| not_through_a_link(error, &path))
}

/// Translates the system's error for a name that should be a folder and is a link or a file.
fn not_through_a_link(error: io::Error, path: &str) -> ExtractError {
    match error.kind() {
        io::ErrorKind::NotADirectory => ExtractError::UnsafePath(path.to_owned()),
        _ => ExtractError::Io(error),
    }
}

/// Extracts one part to the disk.
struct Extractor<'a> {
    part: &'a CachePart,
    root: &'a Path,
    below: OpenFolder,
    commit_marker: Option<CommitMarker>,
    conditions: Conditions<'a>,
}

/// The parent folder of the last file: the next one is mostly in it too.
#[derive(Default)]
struct LastParent(Option<(String, OpenFolder)>);

impl LastParent {
    fn of<'p>(
        &mut self,
        below: &OpenFolder,
        path: &'p str,
    ) -> Result<(&OpenFolder, &'p str), ExtractError> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        if self.0.as_ref().is_none_or(|(last, _)| last != parent) {
            let (folder, _) = parent_of(below, path)?;
            self.0 = Some((parent.to_owned(), folder));
        }
        match &self.0 {
            Some((_, folder)) => Ok((folder, name)),
            None => Err(ExtractError::UnsafePath(path.to_owned())),
        }
    }
}

impl Extractor<'_> {
    /// The path below the root at which an entry is created.
    fn place(&self, path: &str) -> String {
        let staged = self.commit_marker.as_ref().and_then(|commit_marker| {
            let rest = path.strip_prefix(&commit_marker.path)?;
            let is_below = rest.is_empty() || rest.starts_with('/');
            is_below.then(|| format!("{}{rest}", commit_marker.staged))
        });
        staged.unwrap_or_else(|| path.to_owned())
    }

    fn extract(&self, compressed: impl Read) -> Result<(), ExtractError> {
        let mut content = CheckedReader {
            content: zstd::Decoder::new(compressed)?,
            checkpoint: self.conditions.checkpoint,
        };
        let mut last = LastParent::default();
        for entry in &self.part.entries {
            let place = self.place(&entry.path);
            match &entry.kind {
                FileKind::Folder => drop(self.folder(&place)?),
                FileKind::File { length, mode } => {
                    let mut content = (&mut content).take(*length);
                    let (parent, name) = last.of(&self.below, &place)?;
                    self.extract_file(entry, (parent, name), *mode, &mut content)?;
                }
                FileKind::Text { length, mode } => {
                    let text = self.text((&mut content).take(*length), *length)?;
                    let mut text = text.as_slice().take(text.len() as u64);
                    let (parent, name) = last.of(&self.below, &place)?;
                    self.extract_file(entry, (parent, name), *mode, &mut text)?;
                }
                FileKind::Link(_) | FileKind::Symlink(_) => {}
            }
        }
        for entry in &self.part.entries {
            if let FileKind::Link(first) = &entry.kind {
                self.link(*first, &self.place(&entry.path))?;
            }
        }
        // Symbolic links come last, so that no other entry of this part meets one.
        for entry in &self.part.entries {
            if let FileKind::Symlink(target) = &entry.kind {
                stays_inside(&entry.path, target)?;
                let place = self.place(&entry.path);
                let (parent, name) = parent_of(&self.below, &place)?;
                self.unless_there(parent.symlink(target, name), &place)?;
            }
        }
        // Folders' times come after their content, which would change them.
        for entry in self.part.entries.iter().rev() {
            if entry.kind == FileKind::Folder {
                let folder = self.folder(&self.place(&entry.path))?;
                folder.set_time(entry.modified.into());
            }
        }
        self.reveal()
    }

    fn folder(&self, place: &str) -> Result<OpenFolder, ExtractError> {
        self.below
            .make_all(place)
            .map_err(|error| not_through_a_link(error, place))
    }

    /// Renames the staged folder to the commit marker.
    fn reveal(&self) -> Result<(), ExtractError> {
        let Some(commit_marker) = &self.commit_marker else {
            return Ok(());
        };
        let (parent, name) = parent_of(&self.below, &commit_marker.path)?;
        let staged = commit_marker.staged.rsplit('/').next().unwrap_or_default();
        if !parent.has(staged) {
            return Ok(());
        }
        if parent.has(name) {
            return Err(ExtractError::AlreadyExists(PathBuf::from(
                &commit_marker.path,
            )));
        }
        Ok(parent.rename(staged, name)?)
    }

    /// An existing file stays. For a part with a commit marker it is an error.
    fn unless_there(&self, made: io::Result<()>, place: &str) -> Result<(), ExtractError> {
        match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                match self.commit_marker {
                    Some(_) => Err(ExtractError::AlreadyExists(PathBuf::from(place))),
                    None => Ok(()),
                }
            }
            made => Ok(made?),
        }
    }

    /// The text with this root in place of its placeholders.
    fn text(&self, mut content: impl Read, length: u64) -> Result<Vec<u8>, ExtractError> {
        if length > TEXT_LIMIT {
            return Err(ExtractError::Io(io::ErrorKind::FileTooLarge.into()));
        }
        let mut text = Vec::new();
        if content.read_to_end(&mut text)? as u64 != length {
            return Err(ExtractError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        let root = self.root.as_os_str().as_encoded_bytes();
        let marks = Finder::new(PLACEHOLDER).find_iter(&text).count() as u64;
        if marks.saturating_mul(root.len() as u64) > TEXT_LIMIT {
            return Err(ExtractError::Io(io::ErrorKind::FileTooLarge.into()));
        }
        Ok(replaced(&text, PLACEHOLDER, root))
    }

    fn extract_file(
        &self,
        entry: &FileEntry,
        (parent, name): (&OpenFolder, &str),
        mode: u32,
        content: &mut Take<impl Read>,
    ) -> Result<(), ExtractError> {
        let time = SystemTime::from(entry.modified);
        if self.commit_marker.is_some() {
            let accepts = |file: &mut File| (self.conditions.accepts)(entry, file);
            let written = write((parent, name), mode, time, content, accepts);
            if let Err(error) = &written
                && error.kind() != io::ErrorKind::AlreadyExists
            {
                let _ = parent.remove_file(name);
            }
            return self.unless_there(written, &entry.path);
        }
        if parent.has(name) {
            io::copy(content, &mut io::sink())?;
            return Ok(());
        }
        // It has no commit marker, so it appears as a whole or not at all, and has a name that nobody else
        // knows until then.
        let staged = staged(name)?;
        let accepts = |file: &mut File| (self.conditions.accepts)(entry, file);
        let written = write((parent, &staged), mode, time, content, accepts);
        let named = written.and_then(|()| parent.rename_file(&staged, name));
        if named.is_err() {
            let _ = parent.remove_file(&staged);
        }
        self.unless_there(named, &entry.path)
    }

    fn link(&self, first: u32, place: &str) -> Result<(), ExtractError> {
        let is_file = |entry: &&FileEntry| {
            matches!(entry.kind, FileKind::File { .. } | FileKind::Text { .. })
        };
        let first = self
            .part
            .entries
            .get(first as usize)
            .filter(is_file)
            .ok_or_else(|| ExtractError::UnsafePath(place.to_owned()))?;
        let from = self.place(&first.path);
        let (from, from_name) = parent_of(&self.below, &from)?;
        let (parent, name) = parent_of(&self.below, place)?;
        let linked = match from.link(from_name, &parent, name) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                let mode = match first.kind {
                    FileKind::File { mode, .. } | FileKind::Text { mode, .. } => mode,
                    _ => 0,
                };
                let file = from.read(from_name)?;
                let length = file.metadata()?.len();
                let time = first.modified.into();
                write((&parent, name), mode, time, &mut file.take(length), |_| {
                    Ok(true)
                })
            }
            linked => linked,
        };
        self.unless_there(linked, place)
    }
}

/// Whether a path stays in the folder that it is relative to.
pub(crate) fn is_inside(path: &str) -> bool {
    let names = path.split('/');
    !path.is_empty()
        && names.clone().all(|name| !name.is_empty() && name != "." && name != "..")
        // It has no drive or other separators either, on systems that have them.
        && relative_name(Path::new(path)).is_some_and(|name| name == path)
}

/// A staged name for `name`. No other job has the same.
pub(crate) fn staged(name: &str) -> io::Result<String> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    Ok(format!("{STAGING}{}-{name}", hex::encode(random)))
}

/// Writes all of `content` to a new file, which `accepts` must accept.
fn write(
    (parent, name): (&OpenFolder, &str),
    mode: u32,
    time: SystemTime,
    content: &mut Take<impl Read>,
    accepts: impl FnOnce(&mut File) -> io::Result<bool>,
) -> io::Result<()> {
    // The user's own umask decides what group and others may do.
    let mode = match mode {
        0 => 0o644,
        mode => mode & 0o777,
    };
    let mut file = parent.create(name, mode)?;
    io::copy(content, &mut file)?;
    if content.limit() > 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    file.rewind()?;
    if !accepts(&mut file)? {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{name} is not what it should be"),
        ));
    }
    file.set_modified(time)
}

/// Sets a folder's modification time, if the system allows it: cargo checks the times of folders that a
/// build script names.
pub fn set_folder_time(folder: &Path, time: SystemTime) {
    // Windows does not open a folder like a file.
    let _ = filetime::set_file_mtime(folder, time.into());
}

/// Refuses the target of a symbolic link at `path` that leads outside of the part's root.
fn stays_inside(path: &str, target: &str) -> Result<(), ExtractError> {
    let mut depth = path.split('/').count().saturating_sub(1);
    let mut goes_down = false;
    for name in target.split('/') {
        let stays = match name {
            "" | "." => !target.starts_with('/'),
            // `..` behind a name would lead up from the target of that name if it is a link.
            ".." if goes_down => false,
            ".." => depth.checked_sub(1).map(|less| depth = less).is_some(),
            _ => {
                goes_down = true;
                true
            }
        };
        if !stays {
            return Err(ExtractError::UnsafePath(target.to_owned()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{extract as extract_if, *};
    use crate::cargo_cache::manifest::{BaseDir, Package, chunk_key};

    fn extract(root: &Path, part: &CachePart, content: &[u8]) -> Result<(), ExtractError> {
        extract_accepted(root, part, content, &|_, _| Ok(true))
    }

    fn extract_accepted(
        root: &Path,
        part: &CachePart,
        content: &[u8],
        accepts: &dyn Fn(&FileEntry, &mut File) -> io::Result<bool>,
    ) -> Result<(), ExtractError> {
        let checkpoint: Checkpoint<'_> = &|_| Ok(());
        extract_if(
            root,
            part,
            content,
            Conditions {
                accepts,
                checkpoint,
            },
        )
    }

    /// A part of everything in these folders of `root`.
    fn part(root: &Path, folders: &[&str], commit_marker: Option<&str>) -> (CachePart, Vec<u8>) {
        let paths: Vec<PathBuf> = folders.iter().map(|folder| root.join(folder)).collect();
        let entries = entries(root, &paths).unwrap().unwrap();
        let mut content = Vec::new();
        compress(root, &entries, &[], &mut content).unwrap();
        let part = CachePart {
            base: BaseDir::Git,
            name: "part".to_owned(),
            commit_marker: commit_marker.map(str::to_owned),
            package: Package::Several,
            chunk: chunk_key(digest(root, &entries, &[]).unwrap().digest),
            entries,
            needs: Vec::new(),
            used: 0,
            path_dependent: false,
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
        assert!(!exists(root, &part));
        extract(root, &part, &content).unwrap();
        assert!(exists(root, &part));
        let paths = ["guard", "deps"].map(|folder| root.join(folder));
        let mut again = entries(root, &paths).unwrap().unwrap();
        // The times of links, and of a folder that the part does not list, do not matter.
        for (entry, before) in again.iter_mut().zip(&part.entries) {
            if matches!(entry.kind, FileKind::Symlink(_)) || entry.path == "deps" {
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
            assert!(extract(target.path(), &part, bytes).is_err());
            assert!(!target.path().join("guard").exists());
            let left: Vec<_> = fs::read_dir(target.path())
                .unwrap()
                .flatten()
                .map(|entry| entry.file_name())
                .collect();
            assert!(left.iter().all(|name| name == "deps"), "{left:?}");
        }
    }

    #[test]
    fn a_part_that_is_ended_in_the_middle_leaves_neither_guard_nor_half_a_file() {
        let source = source();
        let parts = [
            part(source.path(), &["guard", "deps"], Some("guard")),
            part(source.path(), &["guard/large"], None),
        ];
        for (part, content) in parts {
            let target = tempfile::tempdir().unwrap();
            let read = std::cell::Cell::new(0);
            let ended = extract_if(
                target.path(),
                &part,
                &*content,
                Conditions {
                    accepts: &|_, _| Ok(true),
                    checkpoint: &|length| {
                        read.set(read.get() + length);
                        if read.get() > 100_000 {
                            Err(io::ErrorKind::TimedOut.into())
                        } else {
                            Ok(())
                        }
                    },
                },
            );
            let is_late = |error: &io::Error| error.kind() == io::ErrorKind::TimedOut;
            assert!(
                matches!(&ended, Err(ExtractError::Io(error)) if is_late(error)),
                "{ended:?}"
            );
            // Long before the 700,000 bytes of its file.
            assert!(read.get() < 400_000, "{}", read.get());
            let mut left = fs::read_dir(target.path()).unwrap().flatten();
            assert!(left.all(|entry| {
                entry.file_name() == "guard" && fs::read_dir(entry.path()).unwrap().count() == 0
            }));
            assert_eq!(
                target.path().join("guard").exists(),
                part.commit_marker.is_none()
            );
        }
    }

    #[test]
    fn what_is_there_is_not_replaced() {
        let source = source();
        let (with_marker, content) = part(source.path(), &["guard", "deps"], Some("guard"));
        let target = tempfile::tempdir().unwrap();
        fs::create_dir(target.path().join("guard")).unwrap();
        let refused = extract(target.path(), &with_marker, &content);
        assert!(
            matches!(refused, Err(ExtractError::AlreadyExists(_))),
            "{refused:?}"
        );
        // The rest of a part without a commit marker is extracted.
        let (free, content) = part(source.path(), &["deps/file", "guard/large"], None);
        fs::create_dir(target.path().join("deps")).unwrap();
        fs::write(target.path().join("deps/file"), b"own").unwrap();
        extract(target.path(), &free, &content).unwrap();
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
            let refused = extract(&root, &part, &content);
            assert!(
                matches!(refused, Err(ExtractError::UnsafePath(_))),
                "{path}"
            );
            let mut part = good.clone();
            part.commit_marker = Some(path.to_owned());
            let refused = extract(&root, &part, &content);
            assert!(
                matches!(refused, Err(ExtractError::UnsafePath(_))),
                "{path}"
            );
        }
        for link in ["/etc/passwd", "../x", "a/../../x"] {
            let mut part = good.clone();
            part.entries[0].kind = FileKind::Symlink(link.to_owned());
            part.entries[0].path = "link".to_owned();
            let refused = extract(&root, &part, &content);
            assert!(
                matches!(refused, Err(ExtractError::UnsafePath(_))),
                "{link}"
            );
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
        let entry = |path: &str, kind: FileKind| FileEntry {
            path: path.to_owned(),
            kind,
            modified: file.modified,
        };
        let link = |path: &str, target: &str| entry(path, FileKind::Symlink(target.to_owned()));
        let chain = vec![
            entry("a/b/c", FileKind::Folder),
            entry("f", file.kind.clone()),
            link("a/b/c/l1", "../../.."),
            link("a/b/c/l2", "l1/.."),
            entry("a/b/c/l2/ESCAPED", FileKind::Link(1)),
        ];
        let through = vec![
            entry("f", file.kind.clone()),
            link("l", "a"),
            entry("l/ESCAPED", FileKind::Link(0)),
        ];
        for entries in [chain, through] {
            let target = tempfile::tempdir().unwrap();
            let root = target.path().join("root");
            fs::create_dir(&root).unwrap();
            let part = CachePart {
                entries,
                ..good.clone()
            };
            let _ = extract(&root, &part, &content);
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
        let refused = extract(&root, &good, &content);
        assert!(matches!(refused, Err(ExtractError::UnsafePath(_))));
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    }

    #[test]
    fn a_file_has_its_name_only_after_it_was_accepted() {
        let source = source();
        let (free, content) = part(source.path(), &["deps/file"], None);
        let (with_marker, guarded_content) = part(source.path(), &["guard", "deps"], Some("guard"));
        for (part, content) in [(free, content), (with_marker, guarded_content)] {
            let target = tempfile::tempdir().unwrap();
            let root = target.path();
            let refused = extract_accepted(root, &part, &content, &|entry, file| {
                assert!(!root.join("deps/file").exists() || part.commit_marker.is_some());
                let mut text = Vec::new();
                file.read_to_end(&mut text)?;
                Ok(entry.path != "deps/file" || text != b"content")
            });
            assert!(refused.is_err());
            assert!(!root.join("guard").exists());
            let left = fs::read_dir(root.join("deps")).unwrap().count();
            assert_eq!(left, 0);
        }
    }

    #[test]
    fn two_jobs_that_put_the_same_part_at_once_both_find_it_whole() {
        let source = source();
        let parts = [
            part(source.path(), &["guard", "deps"], Some("guard")),
            part(source.path(), &["guard/large", "deps/file"], None),
        ];
        for (part, content) in parts {
            for _ in 0..20 {
                let target = tempfile::tempdir().unwrap();
                let root = target.path();
                let results = std::thread::scope(|scope| {
                    let one = scope.spawn(|| extract(root, &part, &content));
                    let two = scope.spawn(|| extract(root, &part, &content));
                    [one.join().unwrap(), two.join().unwrap()]
                });
                let is_extracted = |result: &Result<(), ExtractError>| match result {
                    Ok(()) | Err(ExtractError::AlreadyExists(_)) => true,
                    Err(_) => false,
                };
                assert!(results.iter().all(is_extracted), "{results:?}");
                if results.iter().any(Result::is_ok) {
                    let large = fs::read(root.join("guard/large")).unwrap();
                    assert_eq!(large.len(), 700_000);
                }
                let names: Vec<_> = fs::read_dir(root)
                    .unwrap()
                    .flatten()
                    .map(|entry| entry.file_name())
                    .collect();
                let plain = |name: &std::ffi::OsString| name == "guard" || name == "deps";
                assert!(names.iter().all(plain), "{names:?}");
            }
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_part_that_makes_links_cannot_lead_one_that_is_put_at_the_same_time_out_of_the_folder() {
        let source = source();
        let (good, content) = part(source.path(), &["deps/file"], None);
        let file = good.entries[0].clone();
        let linking = CachePart {
            entries: vec![FileEntry {
                path: "deps/inner".to_owned(),
                kind: FileKind::Symlink("../other".to_owned()),
                modified: file.modified,
            }],
            ..good.clone()
        };
        let through = CachePart {
            entries: vec![FileEntry {
                path: "deps/inner/ESCAPED".to_owned(),
                ..file
            }],
            ..good.clone()
        };
        for _ in 0..50 {
            let target = tempfile::tempdir().unwrap();
            let root = target.path();
            fs::create_dir(root.join("other")).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| extract(root, &linking, &[]));
                scope.spawn(|| extract(root, &through, &content));
            });
            // Either the link was first, or the folder.
            assert_eq!(fs::read_dir(root.join("other")).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_part_that_unpacks_to_too_much_is_not_put_there() {
        let source = source();
        let (mut part, content) = part(source.path(), &["deps/file"], None);
        part.entries[0].kind = FileKind::File {
            length: PART_LIMIT + 1,
            mode: 0,
        };
        let target = tempfile::tempdir().unwrap();
        assert!(extract(target.path(), &part, &content).is_err());
        assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
    }
}
