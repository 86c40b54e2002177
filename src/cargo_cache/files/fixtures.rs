//! Makes folders and parts of them for the tests, and extracts parts.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::cargo_cache::files::{
    Checkpoint, Conditions, ExtractError, compress, digest, entries, extract as extract_if,
};
use crate::cargo_cache::manifest::{BaseDir, CachePart, FileEntry, Package, chunk_key};

pub(super) fn extract(root: &Path, part: &CachePart, content: &[u8]) -> Result<(), ExtractError> {
    extract_accepted(root, part, content, &|_, _| Ok(true))
}

pub(super) fn extract_accepted(
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
pub(super) fn part(
    root: &Path,
    folders: &[&str],
    commit_marker: Option<&str>,
) -> (CachePart, Vec<u8>) {
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
pub(super) fn source() -> tempfile::TempDir {
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
