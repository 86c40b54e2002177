//! The output files of a compile, and their modes. sccache's server has its own user and umask, but the
//! files should look as if the step had compiled them.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// The files that a compile with these arguments may write: its output and the files beside it. The first
/// is the output itself.
pub fn outputs(arguments: &[OsString]) -> Vec<PathBuf> {
    let after = |option: &str| {
        let at = arguments.iter().position(|argument| argument == option)?;
        arguments.get(at + 1).map(PathBuf::from)
    };
    if let (Some(folder), Some(name)) = (after("--out-dir"), after("--crate-name")) {
        return outputs_of_rustc(arguments, &folder, &name);
    }
    let joined = |option: &str| {
        let mut values = arguments.iter().filter_map(|argument| {
            let value = argument.to_str()?.strip_prefix(option)?;
            (!value.is_empty()).then(|| PathBuf::from(value))
        });
        values.next()
    };
    let Some(output) = after("-o")
        .or_else(|| joined("-o"))
        .or_else(|| unnamed(arguments))
    else {
        return Vec::new();
    };
    let beside = ["d", "dwo", "gcno", "su"].map(|extension| output.with_extension(extension));
    let depfile = after("-MF").or_else(|| joined("-MF"));
    let mut outputs = vec![output];
    outputs.extend(beside);
    outputs.extend(depfile);
    outputs
}

/// The output of `-c` if no name is given.
fn unnamed(arguments: &[OsString]) -> Option<PathBuf> {
    const SOURCES: [&str; 9] = ["c", "cc", "cpp", "cxx", "C", "s", "S", "m", "i"];
    if !arguments.iter().any(|argument| argument == "-c") {
        return None;
    }
    let is_source = |path: &&Path| {
        let extension = path.extension().and_then(OsStr::to_str);
        extension.is_some_and(|extension| SOURCES.contains(&extension))
    };
    let source = arguments.iter().map(Path::new).find(is_source)?;
    Some(PathBuf::from(source.file_stem()?).with_extension("o"))
}

fn outputs_of_rustc(arguments: &[OsString], folder: &Path, name: &Path) -> Vec<PathBuf> {
    let mut extra = arguments.iter().rev().filter_map(|argument| {
        let argument = argument.to_str()?;
        argument
            .strip_prefix("-C")
            .unwrap_or(argument)
            .strip_prefix("extra-filename=")
    });
    let stem = format!("{}{}", name.display(), extra.next().unwrap_or_default());
    [
        format!("lib{stem}.rlib"),
        format!("lib{stem}.rmeta"),
        format!("lib{stem}.a"),
        format!("{stem}.d"),
        format!("{stem}.o"),
    ]
    .into_iter()
    .map(|file| folder.join(file))
    .collect()
}

/// The state of the files that a compile will write, before it does.
#[derive(Debug)]
pub struct OutputSnapshot {
    #[cfg(unix)]
    outputs: Vec<(PathBuf, Option<std::fs::Metadata>)>,
}

#[cfg(unix)]
impl OutputSnapshot {
    /// Their state now.
    pub fn of(arguments: &[OsString]) -> Self {
        let outputs = outputs(arguments).into_iter().map(|path| {
            let metadata = std::fs::symlink_metadata(&path).ok();
            (path, metadata)
        });
        Self {
            outputs: outputs.collect(),
        }
    }

    /// Whether the compiler must run without sccache: sccache replaces an existing file with a new one, but
    /// the compiler writes into a device, writes through a link, or fails for lack of permission.
    pub fn is_for_the_compiler(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let first = self.outputs.first().and_then(|(_, found)| found.as_ref());
        first.is_some_and(|found| !found.is_file() || found.mode() & 0o200 == 0)
    }

    /// Sets the modes of the compile's files as the compiler would: those of the files that it replaced,
    /// and for new files as this process's umask says. If that fails, they keep the server's modes.
    pub fn give_modes(self) {
        use rustix::fs::Mode;
        use rustix::process::umask;

        // There is no other way to read the umask.
        let mask = umask(Mode::from_raw_mode(0o022));
        umask(mask);
        // macOS has it in 16 bits.
        #[allow(clippy::useless_conversion)]
        let mask: u32 = mask.as_raw_mode().into();
        let mut newest = None;
        for (path, before) in self.outputs {
            give_mode(&path, before.as_ref(), mask, &mut newest);
        }
    }
}

/// On other systems a file has no such mode.
#[cfg(not(unix))]
impl OutputSnapshot {
    /// Their state now.
    pub fn of(_arguments: &[OsString]) -> Self {
        Self {}
    }

    /// Whether the compiler must run without sccache.
    pub fn is_for_the_compiler(&self) -> bool {
        false
    }

    /// Sets the modes of the compile's files as the compiler would.
    pub fn give_modes(self) {}
}

/// `newest` is the time of the first existing output: a file that is older by more than a moment belongs to
/// another compile.
#[cfg(unix)]
fn give_mode(path: &Path, before: Option<&std::fs::Metadata>, mask: u32, newest: &mut Option<i64>) {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    const MOMENT: i64 = 5;
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return;
    };
    let first = *newest.get_or_insert(metadata.mtime());
    if !metadata.is_file() || metadata.mtime() < first - MOMENT {
        return;
    }
    let mode = match before {
        Some(before) if before.is_file() => before.mode() & 0o7777,
        _ => mode_of_new_file(metadata.mode(), mask),
    };
    if metadata.mode() & 0o7777 != mode {
        let _ = std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
    }
}

/// The mode of a file that a process with this umask makes, executable if `mode` is so.
#[cfg(unix)]
fn mode_of_new_file(mode: u32, mask: u32) -> u32 {
    let all = match mode & 0o111 {
        0 => 0o666,
        _ => 0o777,
    };
    all & !mask
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(words: &[&str]) -> Option<PathBuf> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        outputs(&words).into_iter().next()
    }

    #[test]
    fn the_output_of_a_compile_is_known_by_its_arguments() {
        for (words, output) in [
            (&["-c", "a.c", "-o", "b/x.o"][..], Some("b/x.o")),
            (&["-c", "a.c", "-ob/x.o"], Some("b/x.o")),
            (&["-c", "d/a.cpp"], Some("a.o")),
            (&["-E", "a.c"], None),
            (
                &[
                    "--crate-name",
                    "k",
                    "-C",
                    "extra-filename=-1",
                    "--out-dir",
                    "t",
                ],
                Some("t/libk-1.rlib"),
            ),
            (&["-o"], None),
        ] {
            assert_eq!(first(words).as_deref(), output.map(Path::new), "{words:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_new_file_has_what_the_umask_leaves() {
        for (mode, mask, expected) in [
            (0o640, 0o022, 0o644),
            (0o640, 0o002, 0o664),
            (0o644, 0o077, 0o600),
            (0o750, 0o022, 0o755),
        ] {
            assert_eq!(mode_of_new_file(mode, mask), expected);
        }
    }
}
