//! Recognizes the programs that the wrapper is called with, and names compiles.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// Tools of a toolchain that compile nothing. A prefix for the whole toolchain (`CROSS_COMPILE="sccache
/// arm-"`) has the wrapper run them.
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

/// The name of a program without folder, `.exe` and a toolchain's prefix and suffix: `ar` of
/// `/b/x86_64-linux-gnu-gcc-ar-12`.
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

/// Whether `program` is a C or C++ compiler with options like gcc's.
pub fn is_c_compiler(program: &Path) -> bool {
    matches!(
        bare_name(program).as_str(),
        "cc" | "c++" | "gcc" | "g++" | "clang" | "clang++"
    )
}

/// Whether a script that configures a build probes a C compiler: autoconf's (`conftest.c`), CMake's (below
/// `CMakeScratch`, before 3.25 `CMakeTmp`) or Meson's (below `meson-private`).
pub fn is_probe(arguments: &[OsString]) -> bool {
    const FOLDERS: [&str; 3] = ["CMakeScratch", "CMakeTmp", "meson-private"];
    let mut sources = arguments
        .iter()
        .map(Path::new)
        .filter(|path| is_source(path));
    sources.any(|source| {
        let mut parts = source.components().map(|part| part.as_os_str());
        source.file_stem() == Some(OsStr::new("conftest"))
            || parts.any(|part| FOLDERS.iter().any(|folder| part == *folder))
    })
}

/// The name of a compile in a list of the slowest: the crate, or the source file.
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
    fn probes_of_scripts_that_configure_a_build_are_told_from_compiles() {
        let is_probe = |call: &str| {
            let words: Vec<OsString> = call.split(' ').map(OsString::from).collect();
            is_probe(&words)
        };
        for probe in [
            "-c -g -O2 conftest.c",
            "-o conftest -g conftest.cpp -lm",
            "-o CMakeFiles/cmTC_1.dir/t.c.o -c /w/b/CMakeFiles/CMakeScratch/TryCompile-a1/t.c",
            "/w/b/meson-private/tmp1/testfile.c -o /w/b/meson-private/tmp1/output.obj -c",
        ] {
            assert!(is_probe(probe), "{probe}");
        }
        for compile in ["-c a.c -o conftest.o", "-I/w/b/meson-private -c a.c"] {
            assert!(!is_probe(compile), "{compile}");
        }
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
