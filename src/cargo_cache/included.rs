//! The check for sources without code that a unit includes from the folder of its build script.
//!
//! The path of such a source is in the metadata of the library, so a library that includes one differs
//! between build directories. Many of the most used crates (serde and thiserror among them) include one
//! that only gives a module another name. It has no code, so no program that is compiled from the library
//! holds the path: neither a panic nor debug information can name it. These libraries are right in any
//! build directory.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use memchr::memmem;
use object::read::archive::ArchiveFile;

use crate::cargo_cache::files::is_plain;
use crate::cargo_cache::manifest::{CachePart, FileKind};
use crate::packs::local_file::read_limited;

/// The largest library that this reads, in bytes.
const LIBRARY_LIMIT: u64 = 256 << 20;

/// The largest source that this reads, in bytes.
const SOURCE_LIMIT: u64 = 64 << 10;

/// The member of a library with its metadata (`METADATA_FILENAME` of rustc).
const METADATA: &[u8] = b"lib.rmeta";

/// Whether a unit that holds the path of its build directory or of the checkout holds it only as the path of
/// sources without code, in metadata.
///
/// # Errors
/// [`io::Error`] if the disk cannot be read.
pub fn holds_paths_of_no_code_only(
    build: &Path,
    checkout: &Path,
    unit: &CachePart,
) -> io::Result<bool> {
    let mut sources = Vec::new();
    for list in with_extension(unit, "d") {
        let text = read_limited(&build.join(list), SOURCE_LIMIT * 256)?;
        sources.extend(included(&String::from_utf8_lossy(&text), build));
    }
    sources.sort_unstable();
    sources.dedup();
    for source in &sources {
        if !fs::read_to_string(source).is_ok_and(|text| has_no_code(&text)) {
            return Ok(false);
        }
    }
    let paths = [build, checkout];
    if sources.is_empty() || !paths.iter().all(|path| is_plain(path)) {
        return Ok(false);
    }
    let paths = paths.map(|path| path.as_os_str().as_encoded_bytes());
    let is_of_sources = |bytes: &[u8]| {
        paths.iter().all(|path| {
            let mut found = memmem::find_iter(bytes, path);
            found.all(|at| {
                let rest = bytes.get(at..).unwrap_or_default();
                sources
                    .iter()
                    .any(|source| rest.starts_with(source.as_bytes()))
            })
        })
    };
    let holds_none = |bytes: &[u8]| paths.iter().all(|path| memmem::find(bytes, path).is_none());
    for entry in &unit.entries {
        let FileKind::File { length, .. } = entry.kind else {
            continue;
        };
        let path = build.join(&entry.path);
        let extension = Path::new(&entry.path)
            .extension()
            .and_then(|its| its.to_str());
        let is_right = match extension {
            _ if length > LIBRARY_LIMIT => false,
            Some("rmeta") => is_of_sources(&read_limited(&path, LIBRARY_LIMIT)?),
            Some("rlib") => {
                let library = read_limited(&path, LIBRARY_LIMIT)?;
                members(&library).is_some_and(|members| {
                    members.iter().all(|(name, content)| {
                        if *name == METADATA {
                            is_of_sources(content)
                        } else {
                            holds_none(content)
                        }
                    })
                })
            }
            // A shared library or a program may hold the path compressed.
            _ if is_program(&path)? => false,
            _ => holds_none(&read_limited(&path, LIBRARY_LIMIT)?),
        };
        if !is_right {
            return Ok(false);
        }
    }
    Ok(true)
}

fn with_extension<'a>(unit: &'a CachePart, extension: &'a str) -> impl Iterator<Item = &'a str> {
    let paths = unit.entries.iter().map(|entry| entry.path.as_str());
    paths.filter(move |path| {
        Path::new(path)
            .extension()
            .is_some_and(|its| its == extension)
    })
}

/// The sources in a list of the compiler's that are in the build directory.
fn included(list: &str, build: &Path) -> Vec<String> {
    let sources = list
        .lines()
        .filter_map(|line| line.strip_suffix(':'))
        .filter(|source| Path::new(source).starts_with(build));
    sources.map(str::to_owned).collect()
}

/// Whether a source has only modules, and names for items that are elsewhere.
fn has_no_code(text: &str) -> bool {
    const CODE: [&str; 18] = [
        "async",
        "auto",
        "const",
        "derive",
        "enum",
        "extern",
        "fn",
        "impl",
        "let",
        "macro",
        "macro_rules",
        "static",
        "struct",
        "test",
        "trait",
        "type",
        "union",
        "unsafe",
    ];
    if text.len() as u64 > SOURCE_LIMIT || text.contains("/*") {
        return false;
    }
    let lines = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let is_allowed = |c: char| is_name(c) || c.is_ascii_whitespace() || "{}()[]#;:,*".contains(c);
    lines.into_iter().all(|line| {
        let mut words = line.split(|c| !is_name(c));
        line.chars().all(is_allowed) && !words.any(|word| CODE.contains(&word))
    })
}

/// The members of a library with their names. `None` if it is no library.
fn members(library: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let archive = ArchiveFile::parse(library).ok()?;
    let members = archive.members().map(|member| {
        let member = member.ok()?;
        Some((member.name(), member.data(library).ok()?))
    });
    members.collect()
}

/// Whether a file begins as programs and shared libraries do.
fn is_program(path: &Path) -> io::Result<bool> {
    let mut begin = Vec::new();
    File::open(path)?.take(4).read_to_end(&mut begin)?;
    let is_elf = begin.starts_with(b"\x7fELF");
    let is_mach = [0xfeed_face, 0xfeed_facf, 0xcafe_babe]
        .iter()
        .any(|magic: &u32| begin == magic.to_be_bytes() || begin == magic.to_le_bytes());
    Ok(is_elf || is_mach || begin.starts_with(b"MZ"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_only_names_what_is_elsewhere_has_no_code() {
        // As serde_core and thiserror have it.
        for text in [
            "",
            "#[doc(hidden)]\npub mod __private229 {\n    #[doc(hidden)]\n    pub use crate::private::*;\n}\n",
            "pub mod __private { // why\n pub(crate) use self::a::{b, c as d};\n}\nuse serde_core::__private229 as p;",
        ] {
            assert!(has_no_code(text), "{text}");
        }
        for text in [
            "pub const TEXT: &str = \"x\";",
            "pub fn text() {}",
            "macro_rules! m { () => {} }",
            "struct A;",
            "\"alpha\"",
            "/* */",
            "include!(x)",
            "#[path = \"x\"] mod a;",
        ] {
            assert!(!has_no_code(text), "{text}");
        }
    }

    #[test]
    fn what_is_included_is_what_the_list_of_sources_has_in_the_build_directory() {
        let list = "/b/debug/deps/a.d: /h/src/lib.rs /b/debug/build/a-1/out/x.rs\n\n/h/src/lib.rs:\n\
                    /b/debug/build/a-1/out/x.rs:\n\n# env-dep:OUT_DIR=/b/debug/build/a-1/out\n";
        assert_eq!(
            included(list, Path::new("/b")),
            ["/b/debug/build/a-1/out/x.rs"]
        );
        assert_eq!(included(list, Path::new("/c")), [] as [&str; 0]);
    }
}
