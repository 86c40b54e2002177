//! The `sccache` that a job's builds call: the real one, with a way out.
//!
//! When its server is gone, sccache's client starts another from the environment of the build, and
//! where that one cannot reach its storage the client exits with status 2 and the compile is lost:
//! a cache that turned a green build red. So `RUSTC_WRAPPER` and the compiler launchers name this
//! program instead. It is the action's own binary under the name `sccache` (build scripts that use
//! the `cc` crate take a wrapper for C only under that name), asks sccache's server as sccache's client
//! would, and the compiler has the last word: where a compile ends in failure, or sccache itself fails,
//! the compiler runs as if there were no cache, and its output and status are what the build sees. What
//! ran uncached is noted in a file, so that the summary can say it.
//!
//! `protocol` and `server` are that client, for the versions of sccache whose protocol is known; for others
//! sccache's own is started. `call` knows what a call is, and which of them sccache gets wrong.
//!
//! It writes nothing to standard error on its own: configure scripts read compilers' diagnostics.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::Instant;

use self::call::Change;
use self::protocol::{Colour, Compile, Dialect, Finished};
use self::server::{Asked, Server};
use crate::cargo::target;
use crate::sccache::rights::Before;
use crate::sccache::state::{SetUpSccache, StateDir};

mod call;
mod escape_codes;
mod protocol;
mod server;

/// How every failure of sccache's own begins on standard error: `sccache: error: …`, `sccache:
/// encountered fatal error`. Their exit statuses differ (2 and 254), and compilers use these too.
const SCCACHE_SPEAKS: &str = "sccache: ";

/// How many failures of sccache's own client are tolerated before the compiles stop asking it. A failed
/// server start can take seconds, and a build has thousands of compiles.
const CLIENT_FAILURES_BEFORE_GIVING_UP: usize = 3;

/// How many compiles may be lost to a server that ends in the middle of them. A build with many jobs
/// loses as many at once, and the server comes back.
const LOST_BEFORE_GIVING_UP: usize = 50;

/// How many compiles may have waited for a server that did not come back.
const GONE_BEFORE_GIVING_UP: usize = 3;

/// What is in sccache's own words where its server lives and could not do this one compile: nothing
/// that later compiles would suffer from, nor anything that takes time.
const REFUSALS: [&str; 3] = [
    "encountered fatal error",
    "Compiler not supported",
    "cannot find binary path",
];

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
    let setup = state.sccache();
    let Some((compiler, compiler_arguments)) = compile_of(arguments) else {
        return match setup {
            Some(setup) => call_to_sccache(&setup, arguments),
            None => {
                // A step that asks for statistics must not fail a job whose set-up has warned.
                let _ = writeln!(io::stderr(), "sccache was not set up in this job");
                ExitCode::SUCCESS
            }
        };
    };
    let bare = || replace(compiler, compiler_arguments);
    let Some(setup) = setup else {
        return bare();
    };
    if state.is_of_another_user() {
        state.note_compile_of_another_user();
        return bare();
    }
    if call::is_tool(compiler) || is_kept_by_cargo(&state, compiler_arguments) {
        return bare();
    }
    if state.has_given_up() {
        state.note_uncached("sccache had failed before");
        return bare();
    }
    let before = Before::of(compiler_arguments);
    if before.is_for_the_compiler() {
        return bare();
    }
    let folder = || std::env::current_dir().ok();
    let version = setup.version.as_ref();
    let Some(change) = call::change(version, compiler, compiler_arguments, folder) else {
        return bare();
    };
    let begun = Instant::now();
    let outcome = match server_to_ask(&setup) {
        Some(server) => match ask_server(server, compiler, compiler_arguments, &change) {
            // The relay starts another; where there is none, sccache's client does.
            Outcome::ServerGone(_) if !server::has_relay(server.relay) => {
                sccache(&setup.path, arguments, change)
            }
            Outcome::ServerGone(_) if server::comes_back(server.port) => {
                ask_server(server, compiler, compiler_arguments, &change)
            }
            outcome => outcome,
        },
        None => sccache(&setup.path, arguments, change),
    };
    match outcome {
        Outcome::Done(code) => {
            before.give_modes();
            state.note_time(
                begun.elapsed(),
                &call::subject(compiler, compiler_arguments),
            );
            return code;
        }
        Outcome::Bare => {}
        Outcome::Refused(why) => state.note_refused(&why),
        Outcome::ServerGone(why) => fail(&state, &why, GONE_BEFORE_GIVING_UP),
        Outcome::SccacheFailed { why, tolerated } => fail(&state, &why, tolerated),
    }
    bare()
}

/// Notes that sccache failed, and does not ask it again where that has been `tolerated` times.
fn fail(state: &StateDir, why: &str, tolerated: usize) {
    state.note_uncached(why);
    if state.uncached_compiles() >= tolerated {
        state.give_up(why);
    }
}

/// The server, where it can be asked without sccache's own client.
fn server_to_ask(setup: &SetUpSccache) -> Option<Server> {
    // With these the client does other things than to ask a port.
    let others = ["SCCACHE_SERVER_UDS", "SCCACHE_CLIENT_SIDE"];
    if others.iter().any(|name| std::env::var_os(name).is_some()) {
        return None;
    }
    Some(Server {
        // A step that clears its environment still belongs to this job.
        port: port_of_step().or(setup.port)?,
        dialect: Dialect::of(setup.version.as_ref()?)?,
        relay: setup.relay,
    })
}

/// The port at which this step's sccache asks its server, where the step says so.
fn port_of_step() -> Option<u16> {
    std::env::var("SCCACHE_SERVER_PORT").ok()?.parse().ok()
}

/// Has the server compile, and prints what the compiler did.
fn ask_server(server: Server, compiler: &Path, arguments: &[OsString], change: &Change) -> Outcome {
    let Ok(folder) = std::env::current_dir() else {
        return Outcome::Bare;
    };
    let path = std::env::var_os("PATH");
    let Some(compiler) = server::full_path(compiler, path, &folder) else {
        return Outcome::Bare;
    };
    let changed: Vec<OsString>;
    let arguments = match change.arguments.is_empty() {
        true => arguments,
        false => {
            changed = [arguments, &change.arguments].concat();
            &changed
        }
    };
    let mut environment: Vec<(OsString, OsString)> = std::env::vars_os().collect();
    for (name, value) in &mut environment {
        if INCREMENTAL.iter().any(|each| name == each) && value == "1" {
            *value = "0".into();
        }
    }
    if let Some((name, value)) = &change.variable {
        environment.retain(|(each, _)| each != name);
        environment.push((name.into(), value.clone()));
    }
    let compile = Compile {
        compiler: &compiler,
        folder: folder.as_os_str(),
        arguments,
        environment: &environment,
    };
    match server::ask(server, &compile, |finished| print(&finished)) {
        Asked::Compiled(()) => Outcome::Done(ExitCode::SUCCESS),
        Asked::CompileFailed | Asked::Unhandled => Outcome::Bare,
        Asked::Refused(why) => Outcome::Refused(why),
        Asked::Gone(why) => Outcome::ServerGone(why),
        Asked::Lost(why) => Outcome::SccacheFailed {
            why,
            tolerated: LOST_BEFORE_GIVING_UP,
        },
        Asked::Hung(why) => Outcome::SccacheFailed { why, tolerated: 1 },
    }
}

/// Prints what the compiler did, with colours where the compiler itself would have had them
/// (`handle_compile_finished` in `src/commands.rs` of sccache).
fn print(finished: &Finished<'_>) {
    fn put(stream: impl Write + IsTerminal, text: &[u8], colour: Colour) {
        if text.is_empty() {
            return;
        }
        let mut stream = stream;
        let is_dumb = || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let is_coloured = match colour {
            Colour::On => true,
            Colour::Off => false,
            Colour::Auto => stream.is_terminal() && !is_dumb(),
        };
        // Where the stream is closed there is nobody to tell.
        let _ = match is_coloured {
            true => stream.write_all(text),
            false => stream.write_all(&escape_codes::without(text)),
        };
        let _ = stream.flush();
    }
    put(io::stdout(), finished.stdout, finished.colour);
    put(io::stderr(), finished.stderr, finished.colour);
}

/// The compiler and its arguments, or `None` where the call is one to sccache itself.
fn compile_of(arguments: &[OsString]) -> Option<(&Path, &[OsString])> {
    let (first, rest) = arguments.split_first()?;
    let is_option = first.as_encoded_bytes().starts_with(b"-");
    (!is_option && !first.is_empty()).then(|| (Path::new(first), rest))
}

/// Whether a compile is one of a dependency whose outcome the cargo cache keeps: sccache would keep
/// the same bytes a second time, and know of no build that these could serve and those could not. Where the
/// cargo cache does not know the layout of the build directory it keeps nothing of it, so sccache does.
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
    if !sources.any(|source| kept.keeps(source, output)) {
        return false;
    }
    let is_known = target::is_known_output(output);
    if !is_known {
        state.note_unknown_layout(output);
    }
    is_known
}

/// `sccache --show-stats` and its kin: there is nothing to fall back to.
fn call_to_sccache(setup: &SetUpSccache, arguments: &[OsString]) -> ExitCode {
    // Workflows that start the server by themselves would fail because it runs already.
    if arguments == ["--start-server"] && server_listens(setup) {
        let _ = writeln!(io::stderr(), "sccache: the server has been started already");
        return ExitCode::SUCCESS;
    }
    run_in_place(call_of(&setup.path, arguments))
}

fn server_listens(setup: &SetUpSccache) -> bool {
    let Some(port) = port_of_step() else {
        return false;
    };
    let listens = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok();
    // Two servers would be in each other's way.
    listens || (server::has_relay(setup.relay) && server::comes_back(port))
}

enum Outcome {
    /// The compile ran; this is the compiler's verdict.
    Done(ExitCode),
    /// The bare compiler is to run: it failed, or is nothing for sccache.
    Bare,
    /// The server lives and could not do this one.
    Refused(String),
    /// There is no server.
    ServerGone(String),
    /// sccache failed, not the compile.
    SccacheFailed {
        /// Why.
        why: String,
        /// How many compiles may have run without sccache by now for it to be asked again.
        tolerated: usize,
    },
}

/// Runs sccache to its end. Its standard error is held back until the outcome is known; nothing is
/// delayed by that, since sccache prints a compiler's output only when the compiler has finished.
fn sccache(real: &Path, arguments: &[OsString], change: Change) -> Outcome {
    // What it reads from standard input cannot be read again.
    if arguments.iter().any(|argument| argument == "-") {
        return Outcome::Bare;
    }
    let failed = |why| Outcome::SccacheFailed {
        why,
        tolerated: CLIENT_FAILURES_BEFORE_GIVING_UP,
    };
    let mut command = call_of(real, arguments);
    command.args(change.arguments);
    command.envs(change.variable).stderr(Stdio::piped());
    for name in INCREMENTAL {
        if std::env::var_os(name).is_some_and(|value| value == "1") {
            command.env(name, "0");
        }
    }
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            return failed(format!("{} did not start: {error}", real.display()));
        }
    };
    let (stderr, status) = match outcome_of(&mut child) {
        Ok(outcome) => outcome,
        Err(error) => return failed(format!("it was lost: {error}")),
    };
    if let Some(why) = failure_of_sccache(status, &stderr) {
        let said = String::from_utf8_lossy(&stderr);
        return match REFUSALS.iter().any(|words| said.contains(words)) {
            true => Outcome::Refused(why),
            false => failed(why),
        };
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
        Some(_) => failure_told(stderr),
        None => Some(format!("its client was killed ({status})")),
    }
}

/// What sccache says of a failure of its own, or `None` where that is a compiler's. The line that
/// helps is the last of those that name a cause.
fn failure_told(stderr: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(stderr);
    let said = text
        .lines()
        .filter_map(|line| line.strip_prefix(SCCACHE_SPEAKS));
    let mut causes = said
        .clone()
        .filter_map(|line| line.strip_prefix("caused by: "));
    // The first line may only announce the second.
    let announced = |line: &&str| line.starts_with("encountered fatal error");
    let line = causes
        .next_back()
        .or_else(|| said.clone().find(|line| !announced(line)))
        .or_else(|| said.clone().next());
    line.map(str::to_owned)
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
        let target = |inner: &str| parent.path().join(inner);
        for folder in [
            "w/debug/.fingerprint",
            "w/debug/deps",
            "w/release/deps",
            "other/debug/.fingerprint",
        ] {
            fs::create_dir_all(target(folder)).unwrap();
        }
        let compile = |source: &str, output: &str| {
            let output = target(output).display().to_string();
            let arguments = ["--crate-name", "a", source, "--out-dir", &output];
            is_kept_by_cargo(&state, &words(&arguments))
        };
        let dependency = "/c/registry/src/r/a-1.0.0/src/lib.rs";
        assert!(!compile(dependency, "w/debug/deps"));
        let commit = "1234567890abcdef1234567890abcdef12345678";
        let kept = KeptByCargo {
            home: "/c".into(),
            targets: vec![target("w")],
            packages: ["a-1.0.0".to_owned(), commit.to_owned()].into(),
        };
        state.set_kept_by_cargo(&kept).unwrap();
        assert!(compile(dependency, "w/debug/deps"));
        let of_git = "/c/git/checkouts/a/1234567/src/lib.rs";
        assert!(compile(of_git, "w/debug/deps"));
        assert!(!compile(dependency, "other/debug/deps"));
        let other = "/c/registry/src/r/a-1.0.1/src/lib.rs";
        assert!(!compile(other, "w/debug/deps"));
        let other = "/c/git/checkouts/a/1234568/src/lib.rs";
        assert!(!compile(other, "w/debug/deps"));
        assert!(!compile("src/lib.rs", "w/debug/deps"));
        assert!(!compile("/w/vendor/a/src/lib.rs", "w/debug/deps"));
        assert!(compile(dependency, "w/debug/build/a-0123456789abcdef"));
        // Layouts that the cargo cache does not know: it will not save what is written there.
        assert_eq!(state.first_of_unknown_layout(), None);
        assert!(!compile(dependency, "w/debug/build/a/0123456789abcdef/out"));
        assert!(!compile(dependency, "w/release/deps"));
        let first = target("w/debug/build/a/0123456789abcdef/out");
        let first = first.display().to_string();
        assert_eq!(state.first_of_unknown_layout(), Some(first));
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
            (
                2,
                "sccache: error: failed to execute compile\nsccache: caused by: Compiler not supported: \"x\"\n",
                "Compiler not supported: \"x\"",
            ),
        ] {
            let found = failure_of_sccache(exited(code), said.as_bytes());
            assert_eq!(found.as_deref(), Some(why));
        }
        assert!(failure_of_sccache(ExitStatus::from_raw(9), b"").is_some());
    }
}
