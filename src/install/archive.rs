//! Unpacks sccache's binary from a release archive, and nothing else.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::{Component, Path};

use flate2::read::GzDecoder;
use tar::EntryType;

/// The largest binary that is unpacked, in bytes. sccache's has some 20 MB.
const BINARY_LIMIT: u64 = 400 << 20;

/// The most that is read of an archive when unpacked, in bytes: a few kilobytes can unpack to
/// terabytes.
const UNPACKED_LIMIT: u64 = 2 * BINARY_LIMIT;

/// Why an archive was refused.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// A member has a path that could lead out of the archive's folder.
    #[error("it has a member with the unsafe path `{0}`")]
    UnsafePath(String),
    /// A member is a link, a device or another special file.
    #[error("its member `{0}` is neither a file nor a folder")]
    NotAFile(String),
    /// The binary is in it twice.
    #[error("`{0}` is in it twice")]
    Twice(String),
    /// The binary is not in it.
    #[error("`{0}` is not in it")]
    Missing(String),
    /// It unpacks to more than the limit.
    #[error("it unpacks to more than {} MiB", UNPACKED_LIMIT >> 20)]
    TooLarge,
    /// It is cut off or corrupt, or a file could not be written.
    #[error("cannot unpack it: {0}")]
    Io(#[from] io::Error),
}

/// Unpacks the member `folder/binary` of the gzipped tar archive `archive` to the file `target`,
/// which must not exist, and makes it executable. Nothing else is written.
///
/// It reads the whole archive, which verifies its checksum, and checks every member's path: an
/// archive with one unsafe member is none of sccache's.
///
/// # Errors
/// Fails if the archive is not as it should be, or `target` cannot be written.
pub fn unpack(
    archive: impl Read,
    folder: &str,
    binary: &str,
    target: &Path,
) -> Result<(), ArchiveError> {
    let wanted = format!("{folder}/{binary}");
    let mut unpacked = GzDecoder::new(archive).take(UNPACKED_LIMIT);
    let mut found = false;
    let mut members = tar::Archive::new(&mut unpacked);
    for member in members.entries()? {
        let mut member = member?;
        let path = String::from_utf8_lossy(&member.path_bytes()).into_owned();
        let relative = checked_path(&path)?;
        match member.header().entry_type() {
            EntryType::Regular | EntryType::Continuous if relative == wanted => {
                if found {
                    return Err(ArchiveError::Twice(wanted));
                }
                if member.size() > BINARY_LIMIT {
                    return Err(ArchiveError::TooLarge);
                }
                let mut file = create_executable(target)?;
                let size = member.size();
                if io::copy(&mut member, &mut file)? != size {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
                file.sync_all()?;
                found = true;
            }
            EntryType::Regular
            | EntryType::Continuous
            | EntryType::Directory
            | EntryType::XGlobalHeader => {}
            _ => return Err(ArchiveError::NotAFile(path)),
        }
    }
    // The checksum of the whole is behind the bytes that follow the last member.
    io::copy(&mut unpacked, &mut io::sink())?;
    if unpacked.limit() == 0 {
        return Err(ArchiveError::TooLarge);
    }
    if !found {
        return Err(ArchiveError::Missing(wanted));
    }
    Ok(())
}

/// The path without `./`; an error if it leads out of the folder.
fn checked_path(path: &str) -> Result<String, ArchiveError> {
    let mut parts = Vec::new();
    // A backslash is a separator on one system and part of a name on another.
    let unsafe_path = || ArchiveError::UnsafePath(path.to_owned());
    if path.contains(['\\', '\0']) || path.contains(':') {
        return Err(unsafe_path());
    }
    for component in Path::new(path).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_string_lossy()),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(unsafe_path());
            }
        }
    }
    Ok(parts.join("/"))
}

fn create_executable(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o755);
    }
    options.open(path)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    enum Member<'a> {
        File(&'a str, &'a [u8]),
        Link(EntryType, &'a str, &'a str),
    }

    /// An archive of these members, with their paths as they are.
    fn archive(members: &[Member<'_>]) -> Vec<u8> {
        let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for member in members {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o600);
            let (path, content): (&str, &[u8]) = match member {
                Member::File(path, content) => (path, content),
                Member::Link(kind, path, target) => {
                    header.set_entry_type(*kind);
                    header.set_link_name(target).unwrap();
                    (path, &[])
                }
            };
            // `set_path` refuses the paths that this test needs.
            header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder.append(&header, content).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    }

    fn unpacked(archive: &[u8]) -> Result<Vec<u8>, ArchiveError> {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        unpack(archive, "f", "sccache", &target)?;
        let written = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(written, 1);
        Ok(std::fs::read(target).unwrap())
    }

    const GOOD: Member<'static> = Member::File("f/sccache", b"binary");

    #[test]
    fn only_the_binary_is_taken_and_it_is_executable() {
        let bytes = archive(&[Member::File("f/LICENSE", b"text"), GOOD]);
        assert_eq!(unpacked(&bytes).unwrap(), b"binary");
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        unpack(&bytes[..], "f", "sccache", &target).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = target.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o755);
        }
        let dotted = archive(&[Member::File("./f/sccache", b"binary")]);
        assert_eq!(unpacked(&dotted).unwrap(), b"binary");
    }

    #[test]
    fn an_archive_with_one_unsafe_path_is_refused_whole() {
        for path in ["../f/x", "/etc/passwd", "f/../../x", "f\\..\\x", "C:/x"] {
            let bytes = archive(&[GOOD, Member::File(path, b"x")]);
            let error = unpacked(&bytes).unwrap_err();
            assert!(
                matches!(error, ArchiveError::UnsafePath(_)),
                "{path}: {error}"
            );
        }
    }

    #[test]
    fn an_archive_with_a_link_or_a_device_is_refused() {
        for kind in [
            EntryType::Symlink,
            EntryType::Link,
            EntryType::Char,
            EntryType::Block,
            EntryType::Fifo,
        ] {
            let bytes = archive(&[Member::Link(kind, "f/sccache", "/bin/sh")]);
            let error = unpacked(&bytes).unwrap_err();
            assert!(
                matches!(error, ArchiveError::NotAFile(_)),
                "{kind:?}: {error}"
            );
        }
    }

    #[test]
    fn an_archive_without_the_binary_or_with_two_is_refused() {
        let error = unpacked(&archive(&[Member::File("g/sccache", b"x")])).unwrap_err();
        assert!(matches!(error, ArchiveError::Missing(_)));
        let error = unpacked(&archive(&[GOOD, GOOD])).unwrap_err();
        assert!(matches!(error, ArchiveError::Twice(_)));
    }

    #[test]
    fn an_archive_that_is_cut_off_anywhere_or_corrupt_is_refused() {
        let noise: Vec<u8> = (0..20_000u32)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let bytes = archive(&[Member::File("f/sccache", &noise)]);
        assert_eq!(unpacked(&bytes).unwrap(), noise);
        for end in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]) {
            assert!(unpacked(&bytes[..end]).is_err(), "{end}");
        }
        for position in (10..bytes.len()).step_by(997) {
            let mut corrupt = bytes.clone();
            corrupt[position] ^= 1;
            assert!(unpacked(&corrupt).is_err(), "{position}");
        }
        assert!(unpacked(b"<html>not found</html>").is_err());
    }

    #[test]
    fn a_bomb_is_not_unpacked_to_its_end() {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        let mut header = tar::Header::new_gnu();
        header.set_path("f/sccache").unwrap();
        header.set_size(1 << 40);
        header.set_cksum();
        encoder.write_all(header.as_bytes()).unwrap();
        encoder.write_all(&vec![0; 1 << 20]).unwrap();
        let bytes = encoder.finish().unwrap();
        assert!(matches!(unpacked(&bytes), Err(ArchiveError::TooLarge)));
    }
}
