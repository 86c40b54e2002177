//! What a call of a compiler is, as far as the wrapper has to know, and the table of calls for which
//! sccache's key is wrong.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use semver::Version;

/// How much of a response file is looked through, in bytes.
const RESPONSE_FILE_LIMIT: u64 = 1024 * 1024;

/// Tools that a prefix in front of all of a toolchain (`CROSS_COMPILE="sccache arm-"`) reaches, and
/// that compile nothing.
const TOOLS: [&str; 20] = [
    "addr2line",
    "ar",
    "as",
    "c++filt",
    "dlltool",
    "dwp",
    "gdb",
    "ld",
    "ld64",
    "lib",
    "link",
    "lld",
    "nm",
    "objcopy",
    "objdump",
    "ranlib",
    "readelf",
    "size",
    "strings",
    "strip",
];

/// The name of a program without folder, `.exe` and what a toolchain puts before and behind it:
/// `ar` of `/b/x86_64-linux-gnu-gcc-ar-12`.
fn bare_name(program: &Path) -> String {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(".exe").unwrap_or(&name);
    let is_version = |part: &&str| {
        part.bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'.')
    };
    let last = name
        .rsplit('-')
        .find(|part| !is_version(part))
        .unwrap_or(name);
    let last = last.split_once('.').map_or(last, |(stem, _)| stem);
    last.to_owned()
}

/// Whether `program` is one of a toolchain's tools that compile nothing.
pub fn is_tool(program: &Path) -> bool {
    TOOLS.contains(&bare_name(program).as_str())
}

fn is_c_compiler(program: &Path) -> bool {
    matches!(
        bare_name(program).as_str(),
        "cc" | "c++" | "gcc" | "g++" | "clang" | "clang++"
    )
}

/// What is done with a call that sccache's key is wrong for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Remedy {
    /// The compiler runs without sccache.
    Bare,
    /// The output's path, as it is or made absolute, is put among what sccache digests.
    KeyWithOutput {
        /// Whether it is made absolute.
        absolute: bool,
    },
    /// sccache is told the name that the compiler takes for its dependency file.
    NameDependencyFile,
}

/// A kind of call for which some versions of sccache give what belongs to another call.
struct WrongKey {
    applies: fn(&CCall<'_>) -> bool,
    /// The first version that is taken to be wrong: the oldest that is spoken to where no older one was tried.
    since: (u64, u64, u64),
    remedy: Remedy,
}

/// Each was seen with sccache alone, in 0.16.0 or 0.19.0; a version between the first and these was not tried
/// by itself.
const WRONG_KEYS: [WrongKey; 4] = [
    // mozilla/sccache#2562, phusion/passenger#2678: gcc's precompiled header is digested without the headers
    // in it, so a changed macro or comment gives the old one. clang's is never in the cache.
    WrongKey {
        applies: |call| call.makes_header,
        since: (0, 4, 0),
        remedy: Remedy::Bare,
    },
    // mozilla/sccache#2194: without -MF the preprocessor cache does not keep the dependency file, so that a
    // hit writes none.
    WrongKey {
        applies: |call| {
            call.writes_dependencies && !call.names_dependency_file && call.output_is_plain
        },
        since: (0, 14, 0),
        remedy: Remedy::NameDependencyFile,
    },
    // ccache/ccache#845: with --coverage an object has the path of its .gcda file in it, which is beside it.
    // Comes before the next row, whose key is part of this one's.
    WrongKey {
        applies: |call| call.measures_coverage,
        since: (0, 4, 0),
        remedy: Remedy::KeyWithOutput { absolute: true },
    },
    // mozilla/sccache#2321: a dependency file names its object, and is the other's where one source is compiled to two.
    WrongKey {
        applies: |call| call.writes_dependencies && !call.measures_coverage,
        since: (0, 4, 0),
        remedy: Remedy::KeyWithOutput { absolute: false },
    },
];

/// The variable by which sccache has something more digested. Without a preprocessor cache too, from 0.4.0 on.
const CACHE_BUSTER: &str = "SCCACHE_C_CUSTOM_CACHE_BUSTER";

/// What sccache is to be asked.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Arguments to be added.
    pub arguments: Vec<OsString>,
    /// A variable to be set.
    pub variable: Option<(&'static str, OsString)>,
}

/// What has to be changed in a call so that this version of sccache does it right, or `None` where it
/// is better not asked.
pub fn change(
    version: Option<&Version>,
    program: &Path,
    arguments: &[OsString],
    folder: impl FnOnce() -> Option<PathBuf>,
) -> Option<Change> {
    let mut change = Change::default();
    if !is_c_compiler(program) {
        return Some(change);
    }
    let call = CCall::of(arguments);
    let rows = WRONG_KEYS.iter().filter(|row| {
        version.is_none_or(|version| (version.major, version.minor, version.patch) >= row.since)
    });
    let mut folder = Some(folder);
    for row in rows.filter(|row| (row.applies)(&call)) {
        match row.remedy {
            Remedy::Bare => return None,
            Remedy::NameDependencyFile => {
                change.arguments = vec!["-MF".into(), call.dependency_file()?.into()];
            }
            Remedy::KeyWithOutput { absolute } => {
                let mut path = call.output_path()?;
                if absolute && let Some(folder) = folder.take() {
                    path = folder()?.join(path);
                }
                let mut key = std::env::var_os(CACHE_BUSTER).unwrap_or_default();
                key.push("|");
                key.push(path);
                for target in &call.targets {
                    key.push("|");
                    key.push(target);
                }
                change.variable = Some((CACHE_BUSTER, key));
            }
        }
    }
    Some(change)
}

/// What the arguments of a compiler of C say, as far as [`WRONG_KEYS`] ask.
#[derive(Debug, Default)]
struct CCall<'a> {
    output: Option<Cow<'a, OsStr>>,
    source: Option<Cow<'a, OsStr>>,
    targets: Vec<Cow<'a, OsStr>>,
    makes_header: bool,
    writes_dependencies: bool,
    names_dependency_file: bool,
    measures_coverage: bool,
    /// That nothing but -o names outputs.
    output_is_plain: bool,
    /// That what it compiles to is assembly.
    makes_assembly: bool,
}

impl<'a> CCall<'a> {
    fn of(arguments: &'a [OsString]) -> Self {
        let mut call = Self {
            output_is_plain: true,
            ..Self::default()
        };
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            match word.as_encoded_bytes() {
                [b'@', ..] => call.read_response_file(word),
                _ => call.read(Cow::Borrowed(word), &mut || {
                    words.next().map(|word| Cow::Borrowed(word.as_os_str()))
                }),
            }
        }
        call
    }

    /// A response file's words, without what quoting there may be: flags have none, and a name with a
    /// space in it is still the same name each time.
    fn read_response_file(&mut self, argument: &OsStr) {
        use std::io::Read;
        let Some(name) = argument
            .to_str()
            .and_then(|argument| argument.strip_prefix('@'))
        else {
            return;
        };
        let mut text = Vec::new();
        let file = std::fs::File::open(name);
        if file
            .and_then(|file| file.take(RESPONSE_FILE_LIMIT).read_to_end(&mut text))
            .is_err()
        {
            return;
        }
        let text = String::from_utf8_lossy(&text);
        let mut words = text
            .split_whitespace()
            .map(|word| word.trim_matches(['"', '\'']));
        while let Some(word) = words.next() {
            let owned = |word: &str| Cow::Owned(OsString::from(word));
            self.read(owned(word), &mut || words.next().map(owned));
        }
    }

    fn read(&mut self, word: Cow<'a, OsStr>, next: &mut dyn FnMut() -> Option<Cow<'a, OsStr>>) {
        match word.as_encoded_bytes() {
            b"-o" => self.output = next(),
            b"-x" => {
                let language = next();
                self.makes_header |= language.is_some_and(|language| is_header_language(&language));
            }
            b"-MD" | b"-MMD" => self.writes_dependencies = true,
            b"-MF" => {
                self.names_dependency_file = true;
                next();
            }
            b"-MT" | b"-MQ" => self.targets.extend(next()),
            b"--coverage" | b"-coverage" | b"-fprofile-arcs" | b"-ftest-coverage" => {
                self.measures_coverage = true
            }
            b"-S" => self.makes_assembly = true,
            b"-dumpbase" | b"-dumpdir" | b"-dumpbase-ext" => {
                self.output_is_plain = false;
                next();
            }
            // Their words could look like others'.
            b"-include" | b"-imacros" | b"-isystem" | b"-iquote" | b"-idirafter" | b"-I"
            | b"-D" | b"-U" | b"-Xclang" | b"-target" | b"-arch" => {
                next();
            }
            bytes if bytes.starts_with(b"-o") => self.output = Some(Cow::Owned(after(&word, 2))),
            bytes if bytes.starts_with(b"-MF") => self.names_dependency_file = true,
            bytes if bytes.starts_with(b"-MT") || bytes.starts_with(b"-MQ") => {
                self.targets.push(Cow::Owned(after(&word, 3)));
            }
            bytes if bytes.starts_with(b"-save-temps") || bytes.starts_with(b"-dump") => {
                self.output_is_plain = false
            }
            bytes if bytes.starts_with(b"-x") => {
                self.makes_header |= is_header_language(&after(&word, 2))
            }
            [b'-', ..] => {}
            _ => {
                self.makes_header |= is_header(&word);
                self.source = Some(word);
            }
        }
    }

    /// The path of what is compiled to.
    fn output_path(&self) -> Option<PathBuf> {
        if let Some(output) = &self.output {
            return Some(PathBuf::from(output));
        }
        let source = Path::new(self.source.as_ref()?).file_name()?;
        let extension = if self.makes_assembly { "s" } else { "o" };
        Some(Path::new(source).with_extension(extension))
    }

    /// The name that the compiler takes for its dependency file where none is given: the output's
    /// with another suffix.
    fn dependency_file(&self) -> Option<PathBuf> {
        Some(self.output_path()?.with_extension("d"))
    }
}

fn after(word: &OsStr, prefix: usize) -> OsString {
    let text = word.to_string_lossy();
    OsString::from(text.get(prefix..).unwrap_or_default())
}

fn is_header_language(language: &OsStr) -> bool {
    language.as_encoded_bytes().ends_with(b"-header")
}

fn is_header(source: &OsStr) -> bool {
    let extension = Path::new(source).extension().and_then(OsStr::to_str);
    matches!(
        extension,
        Some("h" | "H" | "hh" | "hp" | "hpp" | "HPP" | "hxx" | "h++" | "tcc")
    )
}

/// What a compile is called in a list of the slowest: the crate, or the source file.
pub fn subject(program: &Path, arguments: &[OsString]) -> String {
    let name = match arguments
        .iter()
        .position(|argument| argument == "--crate-name")
    {
        Some(at) => arguments
            .get(at + 1)
            .map(|name| name.to_string_lossy().into_owned()),
        None => {
            let sources = arguments.iter().rev();
            let source = sources.map(Path::new).find(|path| is_source(path));
            source.map(|source| source.display().to_string())
        }
    };
    name.unwrap_or_else(|| program.display().to_string())
}

fn is_source(path: &Path) -> bool {
    const EXTENSIONS: [&str; 14] = [
        "c", "cc", "cpp", "cxx", "c++", "C", "cu", "m", "mm", "s", "S", "asm", "rs", "i",
    ];
    let extension = path.extension().and_then(OsStr::to_str);
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension))
        && !path.as_os_str().as_encoded_bytes().starts_with(b"-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(version: (u64, u64, u64), call: &str) -> Option<Change> {
        let words: Vec<OsString> = call.split(' ').map(OsString::from).collect();
        let version = Version::new(version.0, version.1, version.2);
        change(Some(&version), Path::new(&words[0]), &words[1..], || {
            Some("/w".into())
        })
    }

    const NEW: (u64, u64, u64) = (0, 19, 0);

    #[test]
    fn tools_of_a_toolchain_are_told_from_its_compilers() {
        for tool in [
            "ld",
            "/b/x86_64-linux-gnu-ld.bfd",
            "as",
            "arm-none-eabi-ar",
            "gcc-ar-12",
            "llvm-nm-14",
            "strip.exe",
        ] {
            assert!(is_tool(Path::new(tool)), "{tool}");
        }
        for compiler in [
            "gcc",
            "x86_64-linux-gnu-gcc-12",
            "clang++-14",
            "rustc",
            "nvcc",
            "cl.exe",
            "clang-cl",
            "tar",
        ] {
            assert!(!is_tool(Path::new(compiler)), "{compiler}");
        }
        for compiler in [
            "cc",
            "c++",
            "gcc-12",
            "arm-none-eabi-g++",
            "clang-14",
            "/usr/bin/clang++.exe",
        ] {
            assert!(is_c_compiler(Path::new(compiler)), "{compiler}");
        }
        assert!(!is_c_compiler(Path::new("rustc")));
    }

    #[test]
    fn a_precompiled_header_is_compiled_without_sccache() {
        for call in [
            "g++ -x c++-header -c pre.h -o pre.gch",
            "gcc -xc-header pre",
            "gcc pre.h",
            "gcc -O2 pre.hpp -o pre.gch",
        ] {
            assert_eq!(changed(NEW, call), None, "{call}");
        }
        assert_eq!(
            changed(NEW, "g++ -include pre.h -c a.cpp -o a.o"),
            Some(Change::default())
        );
    }

    #[test]
    fn a_dependency_file_without_a_name_gets_the_compilers() {
        for (call, name) in [
            ("gcc -MMD -c f.c -o a/f.o", "a/f.d"),
            ("gcc -MD -MP -c src/f.c", "f.d"),
            ("gcc -MD -c f.c -oa/f.c.o", "a/f.c.d"),
            ("gcc -MD -c f.c -o f", "f.d"),
        ] {
            let change = changed(NEW, call).unwrap();
            assert_eq!(change.arguments, ["-MF", name], "{call}");
            assert_eq!(
                changed((0, 10, 0), call).unwrap().arguments,
                [""; 0],
                "{call}"
            );
        }
        for call in [
            "gcc -MD -MF x.d -c f.c",
            "gcc -MD -MFx.d -c f.c",
            "gcc -c f.c",
            "gcc -MD -save-temps -c f.c",
        ] {
            assert_eq!(changed(NEW, call).unwrap().arguments, [""; 0], "{call}");
        }
    }

    #[test]
    fn outputs_that_name_themselves_are_digested_with_their_path() {
        let key = |call: &str| {
            let variable = changed(NEW, call).unwrap().variable;
            variable.map(|(_, key)| key.into_string().unwrap())
        };
        assert_eq!(
            key("gcc -MD -MT X -MF x.d -c f.c -o a/f.o").as_deref(),
            Some("|a/f.o|X")
        );
        assert_eq!(key("gcc -MD -MF x.d -c f.c").as_deref(), Some("|f.o"));
        assert_eq!(
            key("gcc --coverage -MD -MF x.d -c f.c -o a/f.o"),
            Some(format!("|{}", Path::new("/w").join("a/f.o").display()))
        );
        assert_eq!(
            key("gcc -ftest-coverage -c f.c -o /x/f.o").as_deref(),
            Some("|/x/f.o")
        );
        assert_eq!(key("gcc -c f.c -o f.o"), None);
        assert_eq!(key("rustc --coverage -MD"), None);
    }

    #[test]
    fn a_response_file_is_part_of_the_call() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("flags");
        std::fs::write(&file, "--coverage\n-o \"a/f.o\"").unwrap();
        let change = changed(NEW, &format!("gcc -c f.c @{}", file.display())).unwrap();
        let expected = format!("|{}", Path::new("/w").join("a/f.o").display());
        assert_eq!(change.variable.unwrap().1, *expected);
        assert_eq!(
            changed(NEW, "gcc -c f.c @/nothing"),
            Some(Change::default())
        );
    }

    #[test]
    fn a_compile_is_called_by_its_crate_or_its_source() {
        let subject = |call: &str| {
            let words: Vec<OsString> = call.split(' ').map(OsString::from).collect();
            subject(Path::new(&words[0]), &words[1..])
        };
        assert_eq!(subject("rustc --crate-name serde src/lib.rs"), "serde");
        assert_eq!(subject("gcc -c -o a.o src/a.c -O2"), "src/a.c");
        assert_eq!(subject("gcc -v"), "gcc");
    }
}
