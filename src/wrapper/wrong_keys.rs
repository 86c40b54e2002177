//! The table of calls for which sccache's key is wrong, with the remedy for each.
//!
//! sccache looks an object up by a digest of the compiler, its options and the preprocessed source, or by
//! one of the source and the headers it had (its preprocessor cache). That digest misses anything that an
//! object or a file beside it has from elsewhere, and the cache misses files that a compiler writes under a
//! name that sccache does not know.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use semver::Version;

use super::c_call::{CCall, assembler_options};
use super::call::is_c_compiler;
use super::protocol::VersionNumbers;

/// Ranges of versions, with the first of a pair and without the second. A version that was not tried counts
/// as wrong if its neighbours on both sides are.
type Versions = &'static [(VersionNumbers, VersionNumbers)];

/// The oldest supported version.
const OLDEST: VersionNumbers = (0, 4, 0);

/// Newer than any that was tried.
const ANY: VersionNumbers = (u64::MAX, 0, 0);

const ALL: Versions = &[(OLDEST, ANY)];

/// The versions with a preprocessor cache, and before 0.7.7 those that may have one.
const WITH_PREPROCESSOR_CACHE: Versions = &[((0, 5, 4), ANY)];

fn is_among(version: Option<&Version>, versions: Versions) -> bool {
    let Some(version) = version else {
        return true;
    };
    let numbers = (version.major, version.minor, version.patch);
    let is_in =
        |(since, until): &(VersionNumbers, VersionNumbers)| (*since..*until).contains(&numbers);
    versions.iter().any(is_in)
}

/// The remedy for a call with a wrong key.
#[derive(Clone, Copy, Debug)]
enum Remedy {
    /// The compiler runs without sccache.
    Bare,
    /// These parts are added to sccache's digest.
    Digest(&'static [KeyPart]),
    /// sccache gets the compiler's default name for the dependency file.
    NameDependencyFile,
}

/// A part of a call that can be added to sccache's digest.
#[derive(Clone, Copy, Debug)]
enum KeyPart {
    /// The output's path as it is given.
    Output,
    /// The output's absolute path.
    AbsoluteOutput,
    /// The options about the content of a dependency file.
    DependencyOptions,
    /// The working folder, absolute.
    Folder,
    /// The working folder as it is in debug information.
    MappedFolder,
    /// The source's path as it is given, or the name alone of an absolute one.
    Source,
    /// The digest of the source's text.
    SourceText,
    /// All arguments.
    Arguments,
    /// The values of environment variables.
    Variables(&'static [&'static str]),
}

/// A kind of call for which some versions of sccache return another call's output.
struct WrongKey {
    applies: fn(&CCall<'_>, &CallContext<'_>) -> bool,
    /// The versions that are wrong.
    versions: Versions,
    remedy: Remedy,
}

/// Variables with the paths of gcc's programs, and the language of its messages.
const GCC_VARIABLES: &[&str] = &[
    "COMPILER_PATH",
    "GCC_EXEC_PREFIX",
    "LC_ALL",
    "LC_MESSAGES",
    "LANG",
];

/// The variable that replaces the clock in `__DATE__`.
const DATE_VARIABLES: &[&str] = &["SOURCE_DATE_EPOCH"];

/// Each row was tried with sccache alone in all versions that `tests/tools.sh` fetches.
const WRONG_KEYS: &[WrongKey] = &[
    // mozilla/sccache#2562, phusion/passenger#2678: gcc's precompiled header is digested without the
    // headers in it, so after a change of a macro or comment sccache returns the old one. clang's is never
    // in the cache.
    WrongKey {
        applies: |call, _| call.makes_header(),
        versions: ALL,
        remedy: Remedy::Bare,
    },
    // ccache/ccache#1120 and others of the kind: see the two tables of options.
    WrongKey {
        applies: |call, context| uses_other_files(call, context.version),
        versions: ALL,
        remedy: Remedy::Bare,
    },
    // sccache asks the preprocessor for the last target only, and puts the output in front of one that is
    // joined to its option.
    WrongKey {
        applies: |call, _| call.dependency_targets > 1 || call.joins_target,
        versions: ALL,
        remedy: Remedy::Bare,
    },
    // With these two gcc writes a dependency file whose name sccache does not know.
    WrongKey {
        applies: |_, context| context.has_any(&["DEPENDENCIES_OUTPUT", "SUNPRO_DEPENDENCIES"]),
        versions: WITH_PREPROCESSOR_CACHE,
        remedy: Remedy::Bare,
    },
    // mozilla/sccache#2795: files that the assembler reads by .incbin and .include are in no preprocessed
    // source.
    WrongKey {
        applies: |call, _| call.embeds_files(),
        versions: ALL,
        remedy: Remedy::Bare,
    },
    // mozilla/sccache#2194: a hit of the preprocessor cache writes no dependency file, whatever its name.
    WrongKey {
        applies: |call, _| call.writes_dependencies,
        versions: &[((0, 5, 4), (0, 8, 2))],
        remedy: Remedy::Bare,
    },
    // Later versions keep the file if it has a name.
    WrongKey {
        applies: |call, _| {
            call.writes_dependencies && !call.names_dependency_file && call.is_preprocessed()
        },
        versions: &[((0, 10, 1), ANY)],
        remedy: Remedy::NameDependencyFile,
    },
    // ccache/ccache#845: with --coverage an object has the path of its .gcda file in it, which is beside it.
    WrongKey {
        applies: |call, _| call.is_instrumented,
        versions: ALL,
        remedy: Remedy::Digest(&[KeyPart::AbsoluteOutput]),
    },
    // mozilla/sccache#2321: a dependency file names its object, and if one source is compiled to two
    // objects, the second gets the file of the first.
    WrongKey {
        applies: |call, _| call.writes_dependencies || !call.dependency_options.is_empty(),
        versions: ALL,
        remedy: Remedy::Digest(&[KeyPart::Output, KeyPart::DependencyOptions]),
    },
    // The working folder is in debug information, but not in clang's preprocessed source.
    WrongKey {
        applies: |call, _| call.has_debug_information,
        versions: ALL,
        remedy: Remedy::Digest(&[KeyPart::MappedFolder]),
    },
    // Before 0.9.0 the file with debug information could be another compile's of the same source.
    WrongKey {
        applies: |call, _| call.splits_debug_information,
        versions: &[(OLDEST, (0, 9, 0))],
        remedy: Remedy::Digest(&[KeyPart::Output]),
    },
    // Without the preprocessor cache the digest has no line numbers, but warnings and debug information
    // have them. Nobody digests the line numbers of headers.
    WrongKey {
        applies: |call, context| call.source.is_some() && !context.has_preprocessor_cache(),
        versions: &[(OLDEST, (0, 7, 0)), ((0, 8, 3), ANY)],
        remedy: Remedy::Digest(&[KeyPart::SourceText]),
    },
    // The digest had no names of headers either.
    WrongKey {
        applies: |call, _| call.writes_dependencies,
        versions: &[((0, 8, 3), (0, 10, 0))],
        remedy: Remedy::Digest(&[KeyPart::SourceText]),
    },
    // The preprocessor cache knows a source by its absolute path, whichever folder -I. means.
    WrongKey {
        applies: |call, _| call.includes_relative && call.source_is_absolute(),
        versions: WITH_PREPROCESSOR_CACHE,
        remedy: Remedy::Digest(&[KeyPart::Folder]),
    },
    // It does not know the path as given, which is in __FILE__; without that cache no path is in the
    // digest.
    WrongKey {
        applies: |call, _| call.source.is_some(),
        versions: ALL,
        remedy: Remedy::Digest(&[KeyPart::Source]),
    },
    WrongKey {
        applies: |call, _| call.records_command,
        versions: ALL,
        remedy: Remedy::Digest(&[KeyPart::Arguments]),
    },
    // Another folder's assembler makes another object, and warnings are in the language of the step.
    WrongKey {
        applies: |_, context| context.has_any(GCC_VARIABLES),
        versions: ALL,
        remedy: Remedy::Digest(&[KeyPart::Variables(GCC_VARIABLES)]),
    },
    // sccache uses the clock's day for the date.
    WrongKey {
        applies: |call, context| context.has_any(DATE_VARIABLES) && call.has_date(),
        versions: ALL,
        remedy: Remedy::Digest(&[KeyPart::Variables(DATE_VARIABLES)]),
    },
];

/// An option with which the compiler writes a file that sccache does not know, or reads one that it does
/// not digest.
struct FileOption {
    /// The prefix of the option.
    option: &'static str,
    /// The versions that are wrong.
    versions: Versions,
}

const fn wrong(option: &'static str) -> FileOption {
    let versions = ALL;
    FileOption { option, versions }
}

const fn wrong_in(option: &'static str, versions: Versions) -> FileOption {
    FileOption { option, versions }
}

const BEFORE_0_19: Versions = &[(OLDEST, (0, 19, 0))];
const BEFORE_0_14: Versions = &[(OLDEST, (0, 14, 0))];

/// Options with which a compiler writes another file, which a hit would not, or writes data into the object
/// that is not the call's own.
const WRITES: &[FileOption] = &[
    wrong("--serialize-diagnostics"),
    wrong("--write-dependencies"),
    wrong("--write-user-dependencies"),
    wrong_in("-Wp,-M", &[((0, 5, 4), (0, 8, 2))]),
    wrong("-aux-info"),
    wrong("-da"),
    wrong("-fdump-"),
    wrong("-fproc-stat-report"),
    // The compiler would record what sccache adds to the call.
    wrong("-frecord-"),
    wrong("-grecord-"),
    wrong_in("-MJ", BEFORE_0_14),
    wrong_in("-fcallgraph-info", BEFORE_0_19),
    wrong_in("-foptimization-record-file", BEFORE_0_19),
    wrong("-fsave-optimization-record"),
    wrong_in("-fstack-usage", BEFORE_0_19),
    wrong_in("-fthin-link-bitcode", BEFORE_0_19),
    wrong_in("-ftime-trace", BEFORE_0_19),
    wrong_in("-save-temps", BEFORE_0_14),
    wrong_in("--save-temps", BEFORE_0_14),
];

/// Options that name a file which changes the object. A hit may be an object of another content of that
/// file.
const READS: &[FileOption] = &[
    wrong("-fauto-profile"),
    wrong("-fbranch-probabilities"),
    wrong("-fpch-preprocess"),
    wrong("-fprofile-list"),
    wrong("-fprofile-sample-use"),
    wrong("-fsanitize-coverage-allowlist"),
    wrong("-fsanitize-coverage-ignorelist"),
    wrong_in("--config", BEFORE_0_19),
    wrong_in("-fsanitize-ignorelist", BEFORE_0_19),
    wrong_in("-fsanitize-system-ignorelist", BEFORE_0_19),
    wrong_in("-fxray-always-instrument", BEFORE_0_19),
    wrong_in("-fxray-attr-list", BEFORE_0_19),
    wrong_in("-fxray-never-instrument", BEFORE_0_19),
];

/// Whether the call has an option of [`WRITES`] or [`READS`] that this version does not know.
fn uses_other_files(call: &CCall<'_>, version: Option<&Version>) -> bool {
    call.others.iter().any(|word| {
        let word = word.to_string_lossy();
        let mut known = WRITES.iter().chain(READS);
        let found = known.find(|row| word.starts_with(row.option));
        found.is_some_and(|row| is_among(version, row.versions))
            || assembler_options(&word).any(assembler_writes)
            || word.starts_with("-fopt-info") && word.contains('=')
            || word.starts_with("-fdiagnostics-format=") && word.ends_with("-file")
            || is_specs_file(&word)
    })
}

/// Whether the assembler writes a listing or a dependency file.
fn assembler_writes(option: &str) -> bool {
    option.starts_with("-a") && option.contains('=') || option == "--MD"
}

/// Whether a specs file is the project's own. Those without a folder come with the toolchain.
fn is_specs_file(option: &str) -> bool {
    let name = option.trim_start_matches('-').strip_prefix("specs=");
    name.is_some_and(|name| name.contains(['/', '\\']) || Path::new(name).is_file())
}

/// The variable whose value sccache adds to its digest. From 0.4.0 on, also without a preprocessor cache.
const CACHE_BUSTER: &str = "SCCACHE_C_CUSTOM_CACHE_BUSTER";

/// The context of a call: everything that it depends on apart from its arguments.
pub struct CallContext<'a> {
    /// The version of sccache; `None` if it is unknown.
    pub version: Option<&'a Version>,
    /// The working folder.
    pub folder: &'a dyn Fn() -> Option<PathBuf>,
    /// The value of an environment variable.
    pub variable: &'a dyn Fn(&str) -> Option<OsString>,
    /// Whether sccache's storage has a preprocessor cache, which only one on a disk has.
    pub is_on_disk: bool,
}

impl CallContext<'_> {
    fn variable(&self, name: &str) -> Option<OsString> {
        (self.variable)(name)
    }

    fn has_any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.variable(name).is_some())
    }

    fn has_preprocessor_cache(&self) -> bool {
        let is_off = |value: OsString| {
            let value = value.to_string_lossy().to_lowercase();
            matches!(&*value, "false" | "off" | "0")
        };
        self.is_on_disk
            && is_among(self.version, WITH_PREPROCESSOR_CACHE)
            && !self.variable("SCCACHE_DIRECT").is_some_and(is_off)
    }
}

/// The change to a call for sccache.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct CallChange {
    /// Arguments to add.
    pub arguments: Vec<OsString>,
    /// A variable to set.
    pub variable: Option<(&'static str, OsString)>,
}

/// The change that makes this version of sccache do a call right, or `None` if the compiler should run
/// without sccache.
pub fn change(
    context: &CallContext<'_>,
    program: &Path,
    arguments: &[OsString],
) -> Option<CallChange> {
    if !is_c_compiler(program) {
        return Some(CallChange::default());
    }
    let call = CCall::of(arguments);
    let mut added = Vec::new();
    let mut key = OsString::new();
    for row in WRONG_KEYS {
        if !is_among(context.version, row.versions) || !(row.applies)(&call, context) {
            continue;
        }
        match row.remedy {
            Remedy::Bare => return None,
            Remedy::NameDependencyFile => {
                added = vec!["-MF".into(), call.dependency_file()?.into()];
            }
            Remedy::Digest(parts) => {
                for part in parts {
                    key.push("|");
                    put(&mut key, *part, &call, arguments, context)?;
                }
            }
        }
    }
    let variable = (!key.is_empty()).then(|| {
        let mut value = context.variable(CACHE_BUSTER).unwrap_or_default();
        value.push(key);
        (CACHE_BUSTER, value)
    });
    Some(CallChange {
        arguments: added,
        variable,
    })
}

/// Appends `part` of a call to `key`. `None` if it is unknown.
fn put(
    key: &mut OsString,
    part: KeyPart,
    call: &CCall<'_>,
    arguments: &[OsString],
    context: &CallContext<'_>,
) -> Option<()> {
    match part {
        KeyPart::Output => key.push(call.output_path()?),
        KeyPart::AbsoluteOutput => key.push((context.folder)()?.join(call.output_path()?)),
        KeyPart::DependencyOptions => put_all(key, &call.dependency_options),
        KeyPart::Folder => key.push((context.folder)()?),
        KeyPart::MappedFolder => {
            let folder = (context.folder)()?;
            let base = context.variable("SCCACHE_BASEDIRS");
            key.push(mapped(&folder, call, base.as_deref()));
        }
        KeyPart::Source => {
            let source = Path::new(call.source.as_deref()?);
            let name = source.is_absolute().then(|| source.file_name()).flatten();
            key.push(name.unwrap_or(source.as_os_str()));
        }
        KeyPart::SourceText => key.push(blake3::hash(call.source_text()).to_hex().as_str()),
        KeyPart::Arguments => put_all(key, arguments),
        KeyPart::Variables(names) => {
            for name in names {
                key.push(context.variable(name).unwrap_or_default());
                key.push("|");
            }
        }
    }
    Some(())
}

fn put_all(key: &mut OsString, words: &[impl AsRef<OsStr>]) {
    for word in words {
        key.push(word);
        key.push(" ");
    }
}

/// The part of `folder` that is in debug information: without a start that an option replaces, whose
/// replacement is among the options and thus digested, and without a base directory that the user told
/// sccache to ignore.
fn mapped(folder: &Path, call: &CCall<'_>, bases: Option<&OsStr>) -> PathBuf {
    let mut starts = call.prefix_maps.iter().map(|map| match map {
        Some(start) => Path::new(start),
        None => folder,
    });
    let left = starts
        .find_map(|start| folder.strip_prefix(start).ok())
        .map(Path::to_owned)
        .or_else(|| {
            let bases = std::env::split_paths(bases?);
            let lefts = bases.filter_map(|base| Some(folder.strip_prefix(base).ok()?.to_owned()));
            lefts.min_by_key(|left| left.as_os_str().len())
        });
    left.unwrap_or_else(|| folder.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed_with(
        version: VersionNumbers,
        variable: Option<(&str, &str)>,
        call: &str,
    ) -> Option<CallChange> {
        let words: Vec<OsString> = call.split(' ').map(OsString::from).collect();
        let version = Version::new(version.0, version.1, version.2);
        let context = CallContext {
            version: Some(&version),
            folder: &|| Some("/w".into()),
            variable: &|name| {
                let (set, value) = variable?;
                (set == name).then(|| value.into())
            },
            is_on_disk: true,
        };
        change(&context, Path::new(&words[0]), &words[1..])
    }

    fn changed(version: VersionNumbers, call: &str) -> Option<CallChange> {
        changed_with(version, None, call)
    }

    const NEW: VersionNumbers = (0, 19, 0);

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
        assert!(changed(NEW, "g++ -include pre.h -c a.cpp -o a.o").is_some());
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
            let old = changed((0, 5, 3), call).unwrap();
            assert_eq!(old.arguments, [""; 0], "{call}");
        }
        for call in [
            "gcc -MD -MF x.d -c f.c",
            "gcc -MD -MFx.d -c f.c",
            "gcc -c f.c",
        ] {
            assert_eq!(changed(NEW, call).unwrap().arguments, [""; 0], "{call}");
        }
        assert_eq!(changed(NEW, "gcc -MD -dumpbase x -c f.c"), None);
    }

    #[test]
    fn outputs_that_name_themselves_are_digested_with_their_path() {
        let key = |call: &str| {
            let variable = changed(NEW, call).unwrap().variable;
            variable.map(|(_, key)| key.into_string().unwrap())
        };
        let absolute = Path::new("/w").join("a/f.o").display().to_string();
        for (call, expected) in [
            (
                "gcc -MD -MT X -MF x.d -c f.c -o a/f.o",
                "|a/f.o|-MD -MT X |f.c".to_owned(),
            ),
            (
                "gcc -MMD -MP -MF x.d -c f.c",
                "|f.o|-MMD -MP |f.c".to_owned(),
            ),
            (
                "gcc --coverage -MD -MF x.d -c f.c -o a/f.o",
                format!("|{absolute}|a/f.o|-MD |f.c"),
            ),
            (
                "gcc -fprofile-generate=d -c f.c -o a/f.o",
                format!("|{absolute}|f.c"),
            ),
            ("gcc -c f.c -o f.o", "|f.c".to_owned()),
        ] {
            assert_eq!(key(call), Some(expected), "{call}");
        }
        assert_eq!(key("rustc --coverage -MD"), None);
    }

    #[test]
    fn a_response_file_is_part_of_the_call() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("flags");
        std::fs::write(&file, "--coverage\n-o \"a/f.o\"").unwrap();
        let change = changed(NEW, &format!("gcc -c f.c @{}", file.display())).unwrap();
        let expected = format!("|{}|f.c", Path::new("/w").join("a/f.o").display());
        assert_eq!(change.variable.unwrap().1, *expected);
        assert!(changed(NEW, "gcc -c f.c @/nothing").is_some());
    }

    #[cfg(unix)]
    #[test]
    fn the_working_folder_is_digested_where_it_is_in_the_object_and_nothing_takes_it_out() {
        let with = |variable, call: &str| {
            let change = changed_with(NEW, variable, call).unwrap();
            change.variable.unwrap().1.into_string().unwrap()
        };
        for (call, expected) in [
            ("clang -g -c f.c", "|/w|f.c"),
            ("clang -g -g0 -c f.c", "|f.c"),
            ("gcc -Wa,--gdwarf-5 -c f.c", "|/w|f.c"),
            ("clang -g -fdebug-prefix-map=/w=. -c f.c", "||f.c"),
            ("clang -g -ffile-prefix-map=/=x -c f.c", "|w|f.c"),
            ("clang -g -ffile-prefix-map=/other=. -c f.c", "|/w|f.c"),
            ("clang -g -fdebug-compilation-dir . -c f.c", "||f.c"),
            ("gcc -I. -c /s/f.c", "|/w|f.c"),
            ("gcc --sysroot=s -c /s/f.c", "|/w|f.c"),
            ("gcc -I/i -I=sys -include /h.h -c /s/f.c", "|f.c"),
            ("gcc -I. -c f.c", "|f.c"),
        ] {
            assert_eq!(with(None, call), expected, "{call}");
        }
        let base = Some(("SCCACHE_BASEDIRS", "/x:/w"));
        assert_eq!(with(base, "clang -g -c f.c"), "||f.c");
        let own = Some((CACHE_BUSTER, "mine"));
        assert_eq!(with(own, "clang -c f.c"), "mine|f.c");
        let path = Some(("COMPILER_PATH", "/b"));
        assert_eq!(with(path, "gcc -c f.c"), "|f.c|/b|||||");
    }

    #[test]
    fn what_is_written_or_read_behind_sccaches_back_is_left_to_the_compiler() {
        for call in [
            "gcc -fdump-tree-all -c f.c",
            "gcc -Wa,-adhln=f.lst -c f.c",
            "gcc -Wa,--MD,f.d -c f.S",
            "gcc -Xassembler --MD -c f.S",
            "gcc -fopt-info-vec=f.txt -c f.c",
            "gcc -specs=own/x.specs -c f.c",
            "gcc --param max-x=1 -aux-info f.X -c f.c",
            "clang -fsanitize-coverage-allowlist=list -c f.c",
            "clang -MJ f.json --serialize-diagnostics f.dia -c f.c",
        ] {
            assert_eq!(changed(NEW, call), None, "{call}");
        }
        for call in [
            "gcc -fopt-info-vec -c f.c",
            "gcc -Wa,-al -c f.c",
            "gcc --specs=nano.specs -c f.c",
            "gcc -D -fdump-tree-all -c f.c",
        ] {
            assert!(changed(NEW, call).is_some(), "{call}");
        }
        let traced = "clang -ftime-trace -c f.c";
        assert_eq!(changed((0, 16, 0), traced), None);
        assert!(changed(NEW, traced).is_some());
        let depends = Some(("DEPENDENCIES_OUTPUT", "f.d"));
        assert_eq!(changed_with(NEW, depends, "gcc -c f.c"), None);
    }

    #[test]
    fn a_source_that_has_the_assembler_read_other_files_is_left_to_the_compiler() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text, is_left) in [
            ("a.S", ".data\n.incbin \"d.bin\"\n", true),
            ("a.s", ".include \"d.inc\"\n", true),
            ("b.S", "#include \"h.h\"\n", false),
            ("a.c", "asm(\".incbin \\\"d\\\"\");", true),
            ("b.cpp", "#include \"incbin.h\"\nINCBIN(X, \"x\");", true),
            ("c.c", "#include <stdio.h>\n", false),
        ] {
            let file = folder.path().join(name);
            std::fs::write(&file, text).unwrap();
            let call = format!("gcc -c {}", file.display());
            assert_eq!(changed(NEW, &call).is_none(), is_left, "{name}");
        }
    }
}
