//! Writes the files, links and folders of one part to the disk.

use std::fs::File;
use std::io::{self, Read, Seek, Take};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memchr::memmem::Finder;

use crate::cargo_cache::files::folders::{not_through_a_link, parent_of};
use crate::cargo_cache::files::paths::stays_inside;
use crate::cargo_cache::files::staged::{CommitMarker, staged};
use crate::cargo_cache::files::texts::{PLACEHOLDER, TEXT_LIMIT, replaced};
use crate::cargo_cache::files::{CheckedReader, Conditions, ExtractError};
use crate::cargo_cache::manifest::{CachePart, FileEntry, FileKind};
use crate::cargo_cache::open_below::OpenFolder;

/// Extracts one part to the disk.
pub(super) struct Extractor<'a> {
    pub(super) part: &'a CachePart,
    pub(super) root: &'a Path,
    pub(super) below: OpenFolder,
    pub(super) commit_marker: Option<CommitMarker>,
    pub(super) conditions: Conditions<'a>,
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

    pub(super) fn extract(&self, compressed: impl Read) -> Result<(), ExtractError> {
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cargo_cache::files::fixtures::{extract, extract_accepted, part, source};

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
}
