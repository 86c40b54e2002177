//! The `sccache` that a job's builds call: the real one, with a way out.
//!
//! When its server is gone, sccache's client starts another from the environment of the build, and
//! where that one cannot reach its storage the client exits with status 2 and the compile is lost:
//! a cache that turned a green build red. So `RUSTC_WRAPPER` and the compiler launchers name this
//! program instead. It is the action's own binary under the name `sccache` (build scripts that use
//! the `cc` crate take a wrapper for C only under that name), runs the real sccache, and where
//! sccache itself fails runs the compiler as if there were no cache. What ran uncached is noted in
//! a file, so that the summary can say it.
//!
//! It writes nothing to standard error on its own: configure scripts read compilers' diagnostics.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

use crate::sccache::rights::Before;
use crate::sccache::state::StateDir;

/// How every failure of sccache's own begins on standard error: `sccache: error: …`, `sccache:
/// encountered fatal error`. Their exit statuses differ (2 and 254), and compilers use these too.
const SCCACHE_SPEAKS: &str = "sccache: ";

/// How many failures of sccache are tolerated before the compiles stop asking it. A failed server
/// start can take seconds, and a build has thousands of compiles.
const FAILURES_BEFORE_GIVING_UP: usize = 3;

/// Where one of these is 1, sccache since 0.5 refuses every compile, of C as well, and says so on
/// standard output (`src/commands.rs` of sccache). What is compiled incrementally it knows by the
/// compiler's arguments, and does not cache that.
const INCREMENTAL: [&str; 2] = ["CARGO_BUILD_INCREMENTAL", "CARGO_INCREMENTAL"];

/// By which variable sccache uses GitHub's cache. A server that its client starts, in place of one that
/// was killed, goes by it too, looks for a token that steps do not have, and does not start. Where
/// there is a disk cache in front of the relay that server needs nothing else, and the relay saves what
/// it puts there.
const GITHUBS_CACHE: &str = "SCCACHE_GHA_ENABLED";

/// Whether a server that sccache's client starts does with the disk alone.
fn has_disk_level(folder: Option<&OsStr>) -> bool {
    folder.is_some_and(|folder| StateDir::is_disk_level(Path::new(folder)))
}

/// A call of the real sccache.
fn call_of(real: &Path, arguments: &[OsString]) -> Command {
    let mut command = Command::new(real);
    command.args(arguments);
    if has_disk_level(std::env::var_os("SCCACHE_DIR").as_deref()) {
        command.env_remove(GITHUBS_CACHE);
    }
    command
}

/// The argument with which a wrapper only shows that it runs.
const TRIAL: &str = "--sccache-action-trial";

/// Whether a program called `argv0` is to act as the wrapper.
pub fn is_wrapper(argv0: &OsStr) -> bool {
    Path::new(argv0).file_stem() == Some(OsStr::new("sccache"))
}

/// Runs the wrapper with the arguments that follow its name. `program` is the path of this very
/// file: the state of its set-up lies beside its folder.
///
/// Returns only where the platform cannot replace the process.
pub fn run(program: &Path, arguments: &[OsString]) -> ExitCode {
    if arguments == [TRIAL] {
        return ExitCode::SUCCESS;
    }
    let Some(state) = StateDir::of_wrapper(program) else {
        return own_failure("it is not where its set-up put it");
    };
    let real = state.sccache();
    let Some((compiler, compiler_arguments)) = compile_of(arguments) else {
        return match real {
            Some(real) => call_to_sccache(&real, arguments),
            None => {
                // A step that asks for statistics must not fail a job whose set-up has warned.
                let _ = writeln!(io::stderr(), "sccache was not set up in this job");
                ExitCode::SUCCESS
            }
        };
    };
    let Some(real) = real else {
        return replace(compiler, compiler_arguments);
    };
    if state.is_of_another_user() {
        state.note_compile_of_another_user();
        return replace(compiler, compiler_arguments);
    }
    if is_kept_by_cargo(&state, compiler_arguments) {
        return replace(compiler, compiler_arguments);
    }
    if state.uncached_compiles() >= FAILURES_BEFORE_GIVING_UP {
        state.note_uncached("sccache had failed before");
        return replace(compiler, compiler_arguments);
    }
    let before = Before::of(compiler_arguments);
    if before.is_for_the_compiler() {
        return replace(compiler, compiler_arguments);
    }
    match sccache(&real, arguments) {
        Outcome::Done(code) => {
            before.give_modes();
            code
        }
        Outcome::SccacheFailed(why) => {
            state.note_uncached(&why);
            replace(compiler, compiler_arguments)
        }
    }
}

/// The compiler and its arguments, or `None` where the call is one to sccache itself.
fn compile_of(arguments: &[OsString]) -> Option<(&Path, &[OsString])> {
    let (first, rest) = arguments.split_first()?;
    let is_option = first.as_encoded_bytes().starts_with(b"-");
    (!is_option && !first.is_empty()).then(|| (Path::new(first), rest))
}

/// Whether a compile is one of a dependency whose outcome the cargo cache keeps: sccache would keep
/// the same bytes a second time, and know of no build that these could serve and those could not.
fn is_kept_by_cargo(state: &StateDir, arguments: &[OsString]) -> bool {
    let is_out_dir = |argument: &OsString| argument == "--out-dir";
    let Some(at) = arguments.iter().position(is_out_dir) else {
        return false;
    };
    let Some(output) = arguments.get(at + 1).map(Path::new) else {
        return false;
    };
    let Some(kept) = state.kept_by_cargo() else {
        return false;
    };
    let sources = arguments.iter().map(Path::new);
    let mut sources = sources.filter(|path| path.extension() == Some(OsStr::new("rs")));
    sources.any(|source| kept.keeps(source, output))
}

/// `sccache --show-stats` and its kin: there is nothing to fall back to.
fn call_to_sccache(real: &Path, arguments: &[OsString]) -> ExitCode {
    // Workflows that start the server by themselves would fail because it runs already.
    if arguments == ["--start-server"] && server_listens() {
        let _ = writeln!(io::stderr(), "sccache: the server has been started already");
        return ExitCode::SUCCESS;
    }
    run_in_place(call_of(real, arguments))
}

fn server_listens() -> bool {
    let port = std::env::var("SCCACHE_SERVER_PORT")
        .ok()
        .and_then(|port| port.parse::<u16>().ok());
    port.is_some_and(|port| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok())
}

enum Outcome {
    /// The compile ran; this is the compiler's verdict.
    Done(ExitCode),
    /// sccache failed, not the compile.
    SccacheFailed(String),
}

/// Runs sccache to its end. Its standard error is held back until the outcome is known; nothing is
/// delayed by that, since sccache prints a compiler's output only when the compiler has finished.
fn sccache(real: &Path, arguments: &[OsString]) -> Outcome {
    let mut command = call_of(real, arguments);
    command.stderr(Stdio::piped());
    for name in INCREMENTAL {
        if std::env::var_os(name).is_some_and(|value| value == "1") {
            command.env(name, "0");
        }
    }
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            return Outcome::SccacheFailed(format!("{} did not start: {error}", real.display()));
        }
    };
    let (stderr, status) = match outcome_of(&mut child) {
        Ok(outcome) => outcome,
        Err(error) => return Outcome::SccacheFailed(format!("it was lost: {error}")),
    };
    if let Some(why) = failure_of_sccache(status, &stderr) {
        return Outcome::SccacheFailed(why);
    }
    // Where standard error is closed there is nobody to tell.
    let _ = io::stderr().write_all(&stderr);
    Outcome::Done(exit_code(status))
}

fn outcome_of(child: &mut Child) -> io::Result<(Vec<u8>, ExitStatus)> {
    let mut stderr = Vec::new();
    if let Some(pipe) = child.stderr.as_mut() {
        pipe.read_to_end(&mut stderr)?;
    }
    Ok((stderr, child.wait()?))
}

/// Why sccache failed, or `None` where the outcome is the compiler's. A client that was killed gave
/// no verdict at all.
fn failure_of_sccache(status: ExitStatus, stderr: &[u8]) -> Option<String> {
    match status.code() {
        Some(0) => None,
        Some(_) => {
            let text = String::from_utf8_lossy(stderr);
            let said = text
                .lines()
                .filter_map(|line| line.strip_prefix(SCCACHE_SPEAKS));
            // The first line may only announce the second.
            said.clone()
                .find(|line| !line.starts_with("encountered fatal error"))
                .or_else(|| said.clone().next())
                .map(str::to_owned)
        }
        None => Some(format!("its client was killed ({status})")),
    }
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status
        .code()
        .map_or(1, |code| u8::try_from(code & 0xff).unwrap_or(1));
    match status.code() {
        // A status that is a multiple of 256 (Windows has 32 bits) must not look like success.
        Some(full) if full != 0 && code == 0 => ExitCode::FAILURE,
        _ => ExitCode::from(code),
    }
}

/// Becomes `program`, or where the platform has no such call runs it and hands on its status.
fn replace(program: &Path, arguments: &[OsString]) -> ExitCode {
    let mut command = Command::new(program);
    command.args(arguments);
    run_in_place(command)
}

fn run_in_place(mut command: Command) -> ExitCode {
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        let error = command.exec();
        cannot_run(command.get_program(), &error)
    }
    #[cfg(not(unix))]
    match command.status() {
        Ok(status) => exit_code(status),
        Err(error) => cannot_run(command.get_program(), &error),
    }
}

fn cannot_run(program: &OsStr, error: &io::Error) -> ExitCode {
    // The words and status a shell has for it.
    let _ = writeln!(io::stderr(), "{}: {error}", program.display());
    ExitCode::from(127)
}

fn own_failure(why: &str) -> ExitCode {
    let _ = writeln!(
        io::stderr(),
        "sccache (the wrapper of sccache-action): {why}"
    );
    ExitCode::from(127)
}

/// Puts the wrapper into `state`: `program`, the action's binary, under the name `sccache`. Beside it
/// the same under its own name, so that later steps can call `sccache-action stats`.
///
/// # Errors
/// Where the file can neither be linked nor copied there, or not be run there.
pub fn install(program: &Path, state: &StateDir) -> io::Result<PathBuf> {
    let wrapper = state.wrapper();
    if let Some(folder) = wrapper.parent() {
        fs::create_dir_all(folder)?;
    }
    // A link costs nothing; across file systems it takes a copy. A symbolic link would not do: the
    // wrapper finds its state by where its file is. On Windows no name of a program that runs can be
    // removed, and the relay runs by this one.
    if cfg!(windows) || fs::hard_link(program, &wrapper).is_err() {
        fs::copy(program, &wrapper)?;
    }
    let command = format!("sccache-action{}", std::env::consts::EXE_SUFFIX);
    // Builds do without it.
    let _ = fs::hard_link(&wrapper, wrapper.with_file_name(command));
    // A file system may be mounted such that nothing on it is run. This call does nothing.
    let tried = Command::new(&wrapper)
        .arg(TRIAL)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    match tried.success() {
        true => Ok(wrapper),
        false => Err(io::Error::other(format!("it does not run there ({tried})"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sccache::state::KeptByCargo;

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn only_a_program_called_sccache_is_the_wrapper() {
        for name in ["sccache", "/a/b/sccache", "sccache.exe"] {
            assert!(is_wrapper(OsStr::new(name)), "{name}");
        }
        for name in ["sccache-action", "/a/sccache/x", "sccache-dist"] {
            assert!(!is_wrapper(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn a_server_that_sccache_starts_needs_github_only_where_no_relay_saves_its_disk() {
        let parent = tempfile::tempdir().unwrap();
        let state = StateDir::create(parent.path(), None).unwrap();
        let has = |folder: &Path| has_disk_level(Some(folder.as_os_str()));
        assert!(has(&state.disk_level()));
        assert!(!has(&state.relay()));
        assert!(!has(parent.path()));
        assert!(!has(Path::new("/home/runner/disk-level")));
        assert!(!has_disk_level(None));
    }

    #[test]
    fn a_compile_is_told_from_a_call_to_sccache_itself() {
        let compile = words(&["gcc", "-c", "a.c"]);
        let (compiler, rest) = compile_of(&compile).expect("a compile");
        assert_eq!(compiler, Path::new("gcc"));
        assert_eq!(rest, &compile[1..]);
        assert!(compile_of(&words(&["--show-stats"])).is_none());
        assert!(compile_of(&words(&["-s"])).is_none());
        assert!(compile_of(&[]).is_none());
    }

    #[test]
    fn a_dependency_that_the_cargo_cache_keeps_is_not_kept_twice() {
        let parent = tempfile::tempdir().unwrap();
        let state = StateDir::create(parent.path(), None).unwrap();
        let compile = |source: &str, output: &str| {
            let arguments = ["--crate-name", "a", source, "--out-dir", output];
            is_kept_by_cargo(&state, &words(&arguments))
        };
        let dependency = "/c/registry/src/r/a-1.0.0/src/lib.rs";
        assert!(!compile(dependency, "/w/target/debug/deps"));
        let commit = "1234567890abcdef1234567890abcdef12345678";
        let kept = KeptByCargo {
            home: "/c".into(),
            targets: vec!["/w/target".into()],
            packages: ["a-1.0.0".to_owned(), commit.to_owned()].into(),
        };
        state.set_kept_by_cargo(&kept).unwrap();
        assert!(compile(dependency, "/w/target/debug/deps"));
        let of_git = "/c/git/checkouts/a/1234567/src/lib.rs";
        assert!(compile(of_git, "/w/target/debug/deps"));
        assert!(!compile(dependency, "/other/target/debug/deps"));
        let other = "/c/registry/src/r/a-1.0.1/src/lib.rs";
        assert!(!compile(other, "/w/target/debug/deps"));
        let other = "/c/git/checkouts/a/1234568/src/lib.rs";
        assert!(!compile(other, "/w/target/debug/deps"));
        assert!(!compile("src/lib.rs", "/w/target/debug/deps"));
        assert!(!compile("/w/vendor/a/src/lib.rs", "/w/target/debug/deps"));
        assert!(!is_kept_by_cargo(&state, &words(&["-vV"])));
        assert!(!is_kept_by_cargo(
            &state,
            &words(&[dependency, "--out-dir"])
        ));
    }

    #[cfg(unix)]
    #[test]
    fn a_failure_of_sccache_is_told_from_one_of_the_compiler() {
        use std::os::unix::process::ExitStatusExt;
        let exited = |code: i32| ExitStatus::from_raw(code << 8);
        assert_eq!(failure_of_sccache(exited(2), b"a.cu(3): error"), None);
        assert_eq!(failure_of_sccache(exited(1), b"a.c:1: sccache: odd"), None);
        assert_eq!(failure_of_sccache(exited(0), b"sccache: warning: x"), None);
        for (code, said, why) in [
            (
                2,
                "noise\nsccache: error: no server\nmore",
                "error: no server",
            ),
            (
                254,
                "sccache: encountered fatal error\nsccache: error: full",
                "error: full",
            ),
            (
                254,
                "sccache: encountered fatal error\n",
                "encountered fatal error",
            ),
        ] {
            let found = failure_of_sccache(exited(code), said.as_bytes());
            assert_eq!(found.as_deref(), Some(why));
        }
        assert!(failure_of_sccache(ExitStatus::from_raw(9), b"").is_some());
    }
}
