//! Reads the arguments of a C compiler, as far as the table of wrong keys needs them.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use memchr::memmem;

/// How much of a response file is read, in bytes.
const RESPONSE_FILE_LIMIT: u64 = 1024 * 1024;

/// How much of a source file is read, in bytes.
const SOURCE_LIMIT: u64 = 16 * 1024 * 1024;

/// A word of a call; words of a response file are owned.
type Word<'a> = Cow<'a, OsStr>;

/// A call of a C compiler.
#[derive(Debug, Default)]
pub struct CCall<'a> {
    /// The value of `-o`.
    output: Option<Word<'a>>,
    /// The source file.
    pub source: Option<Word<'a>>,
    /// The value of `-x`.
    language: Option<Word<'a>>,
    /// All options about the content of the dependency file.
    pub dependency_options: Vec<Word<'a>>,
    /// How many of these name a target in the next word, by `-MT` or `-MQ`.
    pub dependency_targets: usize,
    /// Whether one of these has the target in the same word.
    pub joins_target: bool,
    /// `-MD` or `-MMD`.
    pub writes_dependencies: bool,
    /// `-MF`.
    pub names_dependency_file: bool,
    /// Whether the object names files beside it, which are written when it runs.
    pub is_instrumented: bool,
    /// Whether the object has debug information, or anything else with the working folder in it.
    pub has_debug_information: bool,
    /// `-gsplit-dwarf`.
    pub splits_debug_information: bool,
    /// The maps that remove the working folder from debug information: the replaced start of a path, or
    /// `None` if all of the path is replaced.
    pub prefix_maps: Vec<Option<Word<'a>>>,
    /// Whether a folder or file to be included is relative to the working folder.
    pub includes_relative: bool,
    /// Whether the object has the command line in it.
    pub records_command: bool,
    /// Whether an option other than `-o` names outputs.
    names_outputs: bool,
    /// `-S`.
    makes_assembly: bool,
    /// All other words that are options.
    pub others: Vec<Word<'a>>,
    text: OnceCell<Vec<u8>>,
}

/// Options whose value is the next word, unless it is joined to them, and whose value does not matter here
/// (`ARGS` in `src/compiler/gcc.rs` and `clang.rs` of sccache).
const WITH_VALUE: &[&str] = &[
    "--param",
    "-A",
    "-D",
    "-G",
    "-L",
    "-U",
    "-V",
    "-Xassembler",
    "-Xclang",
    "-Xlinker",
    "-Xpreprocessor",
    "-add-plugin",
    "-arch",
    "-aux-info",
    "-b",
    "-framework",
    "-gcc-toolchain",
    "-install_name",
    "-l",
    "-mllvm",
    "-target",
    "--target",
    "-u",
    "-z",
];

/// Options that name a file or folder to be included or searched, joined or as the next word.
const INCLUDES: &[&str] = &[
    "--sysroot",
    "-include-pch",
    "-include",
    "-imacros",
    "-isystem",
    "-iquote",
    "-idirafter",
    "-iframework",
    "-iprefix",
    "-isysroot",
    "-ivfsoverlay",
    "-iwithprefixbefore",
    "-iwithprefix",
    "-B",
    "-F",
    "-I",
];

/// Options that replace the start of a path in debug information, and those that replace all of it
/// (`true`).
const PREFIX_MAPS: &[(&str, bool)] = &[
    ("-fdebug-prefix-map=", false),
    ("-ffile-prefix-map=", false),
    ("-fdebug-compilation-dir", true),
    ("-ffile-compilation-dir", true),
];

impl<'a> CCall<'a> {
    /// Reads arguments, and those in response files.
    pub fn of(arguments: &'a [OsString]) -> Self {
        let mut call = Self::default();
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

    /// Reads a response file's words and ignores most quoting: flags have none, and a name with a space in
    /// it is still the same each time.
    fn read_response_file(&mut self, argument: &OsStr) {
        let Some(name) = argument
            .to_str()
            .and_then(|argument| argument.strip_prefix('@'))
        else {
            return;
        };
        let text = start_of(Path::new(name), RESPONSE_FILE_LIMIT);
        let text = String::from_utf8_lossy(&text);
        let mut words = text
            .split_whitespace()
            .map(|word| word.trim_matches(['"', '\'']));
        while let Some(word) = words.next() {
            let owned = |word: &str| Cow::Owned(OsString::from(word));
            self.read(owned(word), &mut || words.next().map(owned));
        }
    }

    fn read(&mut self, word: Word<'a>, next: &mut dyn FnMut() -> Option<Word<'a>>) {
        match word.as_encoded_bytes() {
            b"-o" => self.output = next(),
            b"-x" => self.language = next(),
            b"-MD" | b"-MMD" => {
                self.writes_dependencies = true;
                self.dependency_options.push(word);
            }
            b"-MF" => {
                self.names_dependency_file = true;
                next();
            }
            b"-MT" | b"-MQ" => {
                self.dependency_targets += 1;
                self.dependency_options.push(word);
                self.dependency_options.extend(next());
            }
            b"--coverage" | b"-coverage" | b"-fprofile-arcs" | b"-ftest-coverage" => {
                self.is_instrumented = true;
            }
            // An option of clang's, for another file than the dependency file.
            b"-MJ" => {
                self.others.push(word);
                next();
            }
            b"-S" => self.makes_assembly = true,
            b"-dumpbase" | b"-dumpdir" | b"-dumpbase-ext" => {
                self.names_outputs = true;
                next();
            }
            [b'-', _, ..] => self.read_option(word, next),
            // Standard input.
            b"-" => {}
            _ => self.source = Some(word),
        }
    }

    /// Options that begin with something.
    fn read_option(&mut self, word: Word<'a>, next: &mut dyn FnMut() -> Option<Word<'a>>) {
        let text = word.to_string_lossy();
        if WITH_VALUE.iter().any(|option| *option == text) {
            // The value could look like another option.
            let value = next();
            match (&*text, value) {
                ("-Xassembler", Some(value)) => {
                    let mut joined = OsString::from("-Wa,");
                    joined.push(value);
                    self.others.push(Cow::Owned(joined));
                }
                _ => self.others.push(word),
            }
            return;
        }
        if let Some(option) = INCLUDES.iter().find(|option| text.starts_with(**option)) {
            let joined = after(&word, option.len());
            let value = if joined.is_empty() {
                next().unwrap_or_default()
            } else {
                Cow::Owned(joined)
            };
            let value = value.to_string_lossy();
            let value = match *option {
                "--sysroot" => value.strip_prefix('=').unwrap_or(&value),
                _ => &value,
            };
            // gcc's `-I=there` is below the sysroot.
            self.includes_relative |= !value.starts_with('=') && !Path::new(value).is_absolute();
            return;
        }
        if let Some((option, is_whole)) = PREFIX_MAPS
            .iter()
            .find(|(option, _)| text.starts_with(*option))
        {
            let map = after(&word, option.len());
            let map = map.to_string_lossy();
            let old = map.split_once('=').map_or(&*map, |(old, _)| old);
            let replaced = (!is_whole).then(|| Cow::Owned(OsString::from(old)));
            self.prefix_maps.push(replaced);
            // clang's own option has the folder in the next word.
            if *text == **option && *is_whole {
                next();
            }
            return;
        }
        self.read_flag(&text);
        match &*text {
            _ if text.starts_with("-o") => self.output = Some(Cow::Owned(after(&word, 2))),
            _ if text.starts_with("-MF") => self.names_dependency_file = true,
            _ if text.starts_with("-M") => {
                self.joins_target |= text.starts_with("-MT") || text.starts_with("-MQ");
                self.dependency_options.push(word);
            }
            _ if text.starts_with("-x") => self.language = Some(Cow::Owned(after(&word, 2))),
            _ => self.others.push(word),
        }
    }

    fn read_flag(&mut self, text: &str) {
        self.names_outputs |= text.starts_with("-save-temps") || text.starts_with("-dump");
        self.is_instrumented |= text.starts_with("-fprofile-generate");
        self.records_command |= text == "-gcodeview" || text == "-fembed-bitcode";
        match text {
            "-g0" | "-ggdb0" => self.has_debug_information = false,
            "-gsplit-dwarf" => {
                self.has_debug_information = true;
                self.splits_debug_information = true;
            }
            // The compilation folder is the first name of a coverage mapping.
            "-fcoverage-mapping" => self.has_debug_information = true,
            _ if text.starts_with("-gcc") || text.starts_with("-gno-") => {}
            _ => {
                self.has_debug_information |=
                    text.starts_with("-g") || assembler_options(text).any(is_assemblers_debug);
            }
        }
    }

    /// The path of the output.
    pub fn output_path(&self) -> Option<PathBuf> {
        if let Some(output) = &self.output {
            return Some(PathBuf::from(output));
        }
        let source = Path::new(self.source.as_ref()?).file_name()?;
        let extension = if self.makes_assembly { "s" } else { "o" };
        Some(Path::new(source).with_extension(extension))
    }

    /// The compiler's default name for its dependency file: the output's with another suffix. `None` if
    /// other options change it.
    pub fn dependency_file(&self) -> Option<PathBuf> {
        if self.names_outputs {
            return None;
        }
        Some(self.output_path()?.with_extension("d"))
    }

    /// Whether the call makes a precompiled header.
    pub fn makes_header(&self) -> bool {
        match &self.language {
            Some(language) => language.as_encoded_bytes().ends_with(b"-header"),
            None => self.source.as_deref().is_some_and(is_header),
        }
    }

    /// Whether the source has an absolute path.
    pub fn source_is_absolute(&self) -> bool {
        let source = self.source.as_deref();
        source.is_some_and(|source| Path::new(source).is_absolute())
    }

    /// Whether the source is assembly.
    fn is_assembly(&self) -> bool {
        match &self.language {
            Some(language) => language.as_encoded_bytes().starts_with(b"assembler"),
            None => self.source.as_ref().is_some_and(|source| {
                let extension = Path::new(source).extension().and_then(OsStr::to_str);
                matches!(extension, Some("s" | "S" | "sx" | "asm"))
            }),
        }
    }

    /// Whether the compiler preprocesses the source: only the preprocessor writes dependency files.
    pub fn is_preprocessed(&self) -> bool {
        match &self.language {
            Some(language) => *language != *OsStr::new("assembler"),
            None => self.source.as_ref().is_some_and(|source| {
                let extension = Path::new(source).extension().and_then(OsStr::to_str);
                !matches!(extension, Some("s" | "i" | "ii"))
            }),
        }
    }

    /// Whether the source uses the date of the compile.
    pub fn has_date(&self) -> bool {
        memmem::find(self.source_text(), b"__DATE__").is_some()
    }

    /// The source's text; empty if it cannot be read.
    pub fn source_text(&self) -> &[u8] {
        self.text.get_or_init(|| {
            let source = self.source.as_deref().map(Path::new);
            source.map_or_else(Vec::new, |source| start_of(source, SOURCE_LIMIT))
        })
    }

    /// Whether the assembler puts other files into the object, which no preprocessor sees: by
    /// `.incbin` or `.include`, in C within `asm` or by the macros of the header `incbin.h`.
    pub fn embeds_files(&self) -> bool {
        let words: &[&str] = if self.is_assembly() {
            &[".incbin", ".include", ".INCBIN", ".INCLUDE"]
        } else {
            &["incbin", "INCBIN", "INCTXT", ".include \\\""]
        };
        let text = self.source_text();
        words
            .iter()
            .any(|word| memmem::find(text, word.as_bytes()).is_some())
    }
}

/// The options that `-Wa,` passes to the assembler.
pub fn assembler_options(option: &str) -> impl Iterator<Item = &str> {
    let options = option.strip_prefix("-Wa,").unwrap_or_default();
    options.split(',').filter(|option| !option.is_empty())
}

fn is_assemblers_debug(option: &str) -> bool {
    option.starts_with("-g") || option.starts_with("--g")
}

fn after(word: &OsStr, prefix: usize) -> OsString {
    let text = word.to_string_lossy();
    OsString::from(text.get(prefix..).unwrap_or_default())
}

fn is_header(source: &OsStr) -> bool {
    let extension = Path::new(source).extension().and_then(OsStr::to_str);
    matches!(
        extension,
        Some("h" | "H" | "hh" | "hp" | "hpp" | "HPP" | "hxx" | "h++" | "tcc")
    )
}

/// A file's text up to `limit`; empty if it cannot be read. The compiler reports that error.
fn start_of(path: &Path, limit: u64) -> Vec<u8> {
    let mut text = Vec::new();
    let Ok(file) = File::open(path) else {
        return text;
    };
    // If this read a pipe, it would be empty for the compiler.
    if !file.metadata().is_ok_and(|metadata| metadata.is_file())
        || file.take(limit).read_to_end(&mut text).is_err()
    {
        text.clear();
    }
    text
}
