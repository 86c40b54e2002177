//! The wrapper: the `sccache` that a job's builds call, with a fallback to the bare compiler.
//!
//! When its server is gone, sccache's client starts another from the environment of the build. If that
//! server cannot reach its storage, the client exits with status 2 and the compile is lost: a cache that
//! turned a green build red. So `RUSTC_WRAPPER` and the compiler launchers name this program instead. It is
//! the action's own binary under the name `sccache` (build scripts that use the `cc` crate accept a wrapper
//! for C only under that name). It asks sccache's server as sccache's client would. If a compile fails, or
//! sccache itself fails, the compiler runs as if there were no cache, and the build sees its output and
//! status. The wrapper notes uncached compiles in a file for the summary.
//!
//! `protocol` and `server` are that client, for the versions of sccache whose protocol is known; for others
//! the wrapper runs sccache's own client. `call` and `c_call` read the arguments, `wrong_keys` has the
//! calls that sccache gets wrong.
//!
//! It writes nothing to standard error on its own: configure scripts read compilers' diagnostics.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::Instant;

use self::protocol::{Colour, CompileRequest, Dialect, Finished};
use self::server::{ServerEndpoint, ServerOutcome};
use self::wrong_keys::{CallChange, CallContext};
use crate::cargo_cache::units;
use crate::runner::log::without_commands;
use crate::sccache::outputs::OutputSnapshot;
use crate::sccache::state_dir::{SetUpSccache, StateDir};

mod c_call;
mod call;
mod escape_codes;
mod protocol;
mod server;
mod wrong_keys;

/// The prefix of sccache's own errors on standard error: `sccache: error: …`, `sccache: encountered fatal
/// error`. Their exit statuses differ (2 and 254), and compilers use these too.
const SCCACHE_ERROR_PREFIX: &str = "sccache: ";

/// How many failures of sccache's own client are tolerated before compiles stop using it. A failed server
/// start can take seconds, and a build has thousands of compiles.
const CLIENT_FAILURES_BEFORE_GIVING_UP: usize = 3;

/// How many compiles may be lost to a server that dies in the middle of them. A parallel build loses many
/// at once, and the server comes back.
const LOST_BEFORE_GIVING_UP: usize = 50;

/// How many compiles may wait for a server that does not come back.
const GONE_BEFORE_GIVING_UP: usize = 3;

/// sccache's messages when its server works and could not do this one compile. Later compiles do not suffer
/// from that, and it takes no time.
const REFUSALS: [&str; 3] = [
    "encountered fatal error",
    "Compiler not supported",
    "cannot find binary path",
];

/// If one of these is 1, sccache since 0.5 refuses every compile, of C as well, and says so on standard
/// output (`src/commands.rs` of sccache). It recognizes incremental compiles by the compiler's arguments
/// anyway, and does not cache them.
const INCREMENTAL: [&str; 2] = ["CARGO_BUILD_INCREMENTAL", "CARGO_INCREMENTAL"];

/// The variable that makes sccache use GitHub's cache. A server that its client starts, in place of one
/// that was killed, reads it too, looks for a token that steps do not have, and does not start. If there is
/// a disk cache in front of the relay, that server needs nothing else, and the relay saves the objects on
/// that disk.
const GHA_ENABLED: &str = "SCCACHE_GHA_ENABLED";

/// The variable with the port of sccache's server.
const SERVER_PORT: &str = "SCCACHE_SERVER_PORT";

/// Whether a server that sccache's client starts needs only the disk.
fn has_disk_tier(folder: Option<&OsStr>) -> bool {
    folder.is_some_and(|folder| StateDir::is_disk_tier(Path::new(folder)))
}

/// A call of the real sccache.
fn call_of(setup: &SetUpSccache, arguments: &[OsString]) -> Command {
    let mut command = Command::new(&setup.path);
    command.args(arguments);
    if let Some(port) = setup
        .port
        .filter(|_| std::env::var_os(SERVER_PORT).is_none())
    {
        // If it starts a server, that is to be this job's.
        command.env(SERVER_PORT, port.to_string());
    }
    if has_disk_tier(std::env::var_os("SCCACHE_DIR").as_deref()) {
        command.env_remove(GHA_ENABLED);
    }
    command
}

/// The argument with which a wrapper only shows that it can run.
const TRIAL: &str = "--sccache-action-trial";

/// Whether a program called `argv0` is to act as the wrapper.
pub fn is_wrapper(argv0: &OsStr) -> bool {
    Path::new(argv0).file_stem() == Some(OsStr::new("sccache"))
}

/// Runs the wrapper with the arguments that follow its name. `program` is the path of this very file: the
/// state folder of its set-up is its folder's parent.
///
/// Returns only if the platform cannot replace the process.
pub fn run(program: &Path, arguments: &[OsString]) -> ExitCode {
    if arguments == [TRIAL] {
        return ExitCode::SUCCESS;
    }
    let Some(state) = StateDir::of_wrapper(program) else {
        return own_failure("it is no longer where the set-up put it");
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
    let bare = || exec(compiler, compiler_arguments);
    let Some(setup) = setup else {
        return bare();
    };
    if state.is_of_another_user() {
        state.note_compile_of_another_user();
        return bare();
    }
    if call::is_tool(compiler) || is_covered_by_cargo_cache(&state, compiler_arguments) {
        return bare();
    }
    // Each takes milliseconds and many are meant to fail: sccache takes longer if the cache is cold.
    if call::is_c_compiler(compiler) && call::is_probe(compiler_arguments) {
        return bare();
    }
    if state.has_given_up() {
        state.note_uncached("sccache had failed before");
        return bare();
    }
    let before = OutputSnapshot::of(compiler_arguments);
    if before.is_for_the_compiler() {
        return bare();
    }
    let context = CallContext {
        version: setup.version.as_ref(),
        folder: &|| std::env::current_dir().ok(),
        variable: &|name| std::env::var_os(name),
        is_on_disk: setup.on_disk,
    };
    let Some(change) = wrong_keys::change(&context, compiler, compiler_arguments) else {
        return bare();
    };
    let start = Instant::now();
    let outcome = match server_to_ask(&setup) {
        Some(server) => match ask_server(server, compiler, compiler_arguments, &change) {
            // The relay starts another server; without a relay, sccache's client does.
            CompileOutcome::ServerGone(_) if !server::has_relay(server.relay) => {
                run_sccache(&setup, arguments, change)
            }
            CompileOutcome::ServerGone(_) if server::wait_for_restart(server.port) => {
                ask_server(server, compiler, compiler_arguments, &change)
            }
            outcome => outcome,
        },
        None => run_sccache(&setup, arguments, change),
    };
    match outcome {
        CompileOutcome::Done { code, succeeded } => {
            if !succeeded {
                state.note_failed();
            }
            before.give_modes();
            state.note_time(
                start.elapsed(),
                &call::subject(compiler, compiler_arguments),
            );
            return code;
        }
        CompileOutcome::Bare => {}
        CompileOutcome::Failed(why) => {
            state.note_failed();
            if let Some(why) = why {
                state.note_refused(&why);
            }
        }
        CompileOutcome::Refused(why) => state.note_refused(&why),
        CompileOutcome::ServerGone(why) => fail(&state, &why, GONE_BEFORE_GIVING_UP),
        CompileOutcome::SccacheFailed { why, tolerated } => fail(&state, &why, tolerated),
    }
    bare()
}

/// Notes that sccache failed, and stops using it after `tolerated` failures.
fn fail(state: &StateDir, why: &str, tolerated: usize) {
    state.note_uncached(why);
    if state.uncached_compiles() >= tolerated {
        state.give_up(why);
    }
}

/// The server, if the wrapper can ask it without sccache's own client.
fn server_to_ask(setup: &SetUpSccache) -> Option<ServerEndpoint> {
    // With these the client does not use a port.
    let others = ["SCCACHE_SERVER_UDS", "SCCACHE_CLIENT_SIDE"];
    if others.iter().any(|name| std::env::var_os(name).is_some()) {
        return None;
    }
    Some(ServerEndpoint {
        // A step that clears its environment still belongs to this job.
        port: port_of_step().or(setup.port)?,
        dialect: Dialect::of(setup.version.as_ref()?)?,
        relay: setup.relay,
    })
}

/// The port of sccache's server that this step sets, if it does.
fn port_of_step() -> Option<u16> {
    std::env::var(SERVER_PORT).ok()?.parse().ok()
}

/// Has the server compile, and prints the compiler's output.
fn ask_server(
    server: ServerEndpoint,
    compiler: &Path,
    arguments: &[OsString],
    change: &CallChange,
) -> CompileOutcome {
    let Ok(folder) = std::env::current_dir() else {
        return CompileOutcome::Bare;
    };
    let path = std::env::var_os("PATH");
    let Some(compiler) = server::full_path(compiler, path, &folder) else {
        return CompileOutcome::Bare;
    };
    let changed: Vec<OsString>;
    let arguments = if change.arguments.is_empty() {
        arguments
    } else {
        changed = [arguments, &change.arguments].concat();
        &changed
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
    let compile = CompileRequest {
        compiler: &compiler,
        folder: folder.as_os_str(),
        arguments,
        environment: &environment,
    };
    match server::ask(server, &compile, |finished| print(&finished)) {
        ServerOutcome::Compiled(()) => CompileOutcome::Done {
            code: ExitCode::SUCCESS,
            succeeded: true,
        },
        ServerOutcome::CompileFailed => CompileOutcome::Failed(None),
        ServerOutcome::Unhandled => CompileOutcome::Bare,
        ServerOutcome::Refused(why) => CompileOutcome::Refused(why),
        ServerOutcome::Broken(why) => CompileOutcome::Failed(Some(why)),
        ServerOutcome::Gone(why) => CompileOutcome::ServerGone(why),
        ServerOutcome::Lost(why) => CompileOutcome::SccacheFailed {
            why,
            tolerated: LOST_BEFORE_GIVING_UP,
        },
        ServerOutcome::Hung(why) => CompileOutcome::SccacheFailed { why, tolerated: 1 },
    }
}

/// Prints the compiler's output, with colours if the compiler itself would print them
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
        // If the stream is closed, nobody can read an error.
        let _ = if is_coloured {
            stream.write_all(text)
        } else {
            stream.write_all(&escape_codes::without(text))
        };
        let _ = stream.flush();
    }
    put(io::stdout(), finished.stdout, finished.colour);
    put(io::stderr(), finished.stderr, finished.colour);
}

/// The compiler and its arguments, or `None` if the call is for sccache itself.
fn compile_of(arguments: &[OsString]) -> Option<(&Path, &[OsString])> {
    let (first, rest) = arguments.split_first()?;
    let is_option = first.as_encoded_bytes().starts_with(b"-");
    (!is_option && !first.is_empty()).then(|| (Path::new(first), rest))
}

/// Whether a compile is one of a dependency that the cargo cache covers: sccache would store the same bytes
/// a second time, and no build could use these but not the cargo cache's. If the cargo cache does not know
/// the layout of the build directory, it keeps nothing of it, so sccache does.
fn is_covered_by_cargo_cache(state: &StateDir, arguments: &[OsString]) -> bool {
    let is_out_dir = |argument: &OsString| argument == "--out-dir";
    let Some(at) = arguments.iter().position(is_out_dir) else {
        return false;
    };
    let Some(output) = arguments.get(at + 1).map(Path::new) else {
        return false;
    };
    let Some(mut kept) = state.cargo_cache_filter() else {
        return false;
    };
    let mut sources = arguments
        .iter()
        .map(Path::new)
        .filter(|path| path.extension() == Some(OsStr::new("rs")));
    let Some(package) = sources.find_map(|source| kept.package_of(source)) else {
        return false;
    };
    // Cargo has written a lockfile that was missing at the set-up.
    if !kept.covers(package) && kept.read_awaited() {
        let _ = state.set_cargo_cache_filter(&kept);
    }
    let is_known = kept.places.is_known(output);
    if !kept.covers(package) || !(is_known || kept.places.place_of(output).is_some()) {
        return false;
    }
    let Some(profile) = units::profile_of_output(output) else {
        state.note_unknown_layout(output);
        return false;
    };
    if !is_known {
        state.note_profile(profile);
    }
    state.note_compiled_dependency(package);
    true
}

/// Runs `sccache --show-stats` and the like, which have no fallback.
fn call_to_sccache(setup: &SetUpSccache, arguments: &[OsString]) -> ExitCode {
    // Workflows that start the server themselves would fail because it runs already.
    if arguments == ["--start-server"] && server_listens(setup) {
        let _ = writeln!(io::stderr(), "sccache: the server has been started already");
        return ExitCode::SUCCESS;
    }
    run_in_place(call_of(setup, arguments))
}

fn server_listens(setup: &SetUpSccache) -> bool {
    let Some(port) = port_of_step() else {
        return false;
    };
    let listens = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok();
    // Two servers would conflict.
    listens || (server::has_relay(setup.relay) && server::wait_for_restart(port))
}

enum CompileOutcome {
    /// The compile ran.
    Done {
        /// The compiler's exit status.
        code: ExitCode,
        /// Whether that is success.
        succeeded: bool,
    },
    /// The bare compiler is to run: sccache cannot do this.
    Bare,
    /// It failed, by the compiler's fault or for this reason of sccache's. The bare compiler is to report
    /// the error.
    Failed(Option<String>),
    /// The server works and could not do this compile.
    Refused(String),
    /// There is no server.
    ServerGone(String),
    /// sccache failed, not the compile.
    SccacheFailed {
        /// Why.
        why: String,
        /// How many compiles may have run without sccache before compiles stop using it.
        tolerated: usize,
    },
}

/// Runs sccache to its end. Holds back its standard error until the outcome is known. That delays nothing,
/// since sccache prints a compiler's output only when the compiler has finished.
fn run_sccache(setup: &SetUpSccache, arguments: &[OsString], change: CallChange) -> CompileOutcome {
    // Standard input cannot be read a second time.
    if arguments.iter().any(|argument| argument == "-") {
        return CompileOutcome::Bare;
    }
    let failed = |why| CompileOutcome::SccacheFailed {
        why,
        tolerated: CLIENT_FAILURES_BEFORE_GIVING_UP,
    };
    let mut command = call_of(setup, arguments);
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
            return failed(format!("{} did not start: {error}", setup.path.display()));
        }
    };
    let (stderr, status) = match outcome_of(&mut child) {
        Ok(outcome) => outcome,
        Err(error) => return failed(format!("it was lost: {error}")),
    };
    if let Some(why) = failure_of_sccache(status, &stderr) {
        let said = String::from_utf8_lossy(&stderr);
        return if REFUSALS.iter().any(|words| said.contains(words)) {
            CompileOutcome::Refused(why)
        } else {
            failed(why)
        };
    }
    // If standard error is closed, nobody can read an error.
    let _ = io::stderr().write_all(&stderr);
    CompileOutcome::Done {
        code: exit_code(status),
        succeeded: status.success(),
    }
}

fn outcome_of(child: &mut Child) -> io::Result<(Vec<u8>, ExitStatus)> {
    let mut stderr = Vec::new();
    if let Some(pipe) = child.stderr.as_mut() {
        pipe.read_to_end(&mut stderr)?;
    }
    Ok((stderr, child.wait()?))
}

/// Why sccache failed, or `None` if the outcome is the compiler's. A client that was killed has no outcome
/// of the compiler's.
fn failure_of_sccache(status: ExitStatus, stderr: &[u8]) -> Option<String> {
    match status.code() {
        Some(0) => None,
        Some(_) => failure_told(stderr),
        None => Some(format!("its client was killed ({status})")),
    }
}

/// sccache's message about a failure of its own, or `None` if the failure is a compiler's. The most useful
/// line is the last that names a cause.
fn failure_told(stderr: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(stderr);
    let said = text
        .lines()
        .filter_map(|line| line.strip_prefix(SCCACHE_ERROR_PREFIX));
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

/// Replaces this process by `program`. On a platform without such a call, runs it and returns its status.
fn exec(program: &Path, arguments: &[OsString]) -> ExitCode {
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
    // A shell's message and status for it.
    let text = format!("{}: {error}", program.display());
    let _ = writeln!(io::stderr(), "{}", without_commands(&text));
    ExitCode::from(127)
}

fn own_failure(why: &str) -> ExitCode {
    let text = format!("sccache (the wrapper of sccache-action): {why}");
    let _ = writeln!(io::stderr(), "{}", without_commands(&text));
    ExitCode::from(127)
}

/// Installs the wrapper in `state`: `program`, the action's binary, under the name `sccache`. Beside it
/// puts the same under its own name, so that later steps can call `sccache-action stats`.
///
/// # Errors
/// [`io::Error`] if the file can be neither linked nor copied there, or does not run there.
pub fn install(program: &Path, state: &StateDir) -> io::Result<PathBuf> {
    let wrapper = state.wrapper();
    if let Some(folder) = wrapper.parent() {
        fs::create_dir_all(folder)?;
    }
    // A link costs nothing; across file systems it takes a copy. A symbolic link would not work: the
    // wrapper finds its state by the folder of its file. On Windows no name of a running program can be
    // removed, and the relay runs under this one.
    if cfg!(windows) || fs::hard_link(program, &wrapper).is_err() {
        fs::copy(program, &wrapper)?;
    }
    let command = format!("sccache-action{}", std::env::consts::EXE_SUFFIX);
    // Builds do not need it.
    let _ = fs::hard_link(&wrapper, wrapper.with_file_name(command));
    // A file system may be mounted without permission to run programs. This call does nothing.
    let tried = Command::new(&wrapper)
        .arg(TRIAL)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    if tried.success() {
        Ok(wrapper)
    } else {
        Err(io::Error::other(format!("it does not run there ({tried})")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cargo_cache::places::{Places, Workspace};
    use crate::sccache::state_dir::CargoCacheFilter;

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
        let has = |folder: &Path| has_disk_tier(Some(folder.as_os_str()));
        assert!(has(&state.disk_tier()));
        assert!(!has(&state.relay()));
        assert!(!has(parent.path()));
        assert!(!has(Path::new("/home/runner/disk-tier")));
        assert!(!has_disk_tier(None));
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
            "w/debug/build/a/0123456789abcdef/fingerprint",
            "other/debug/.fingerprint",
            "checkout/fuzz/target/debug/.fingerprint",
        ] {
            fs::create_dir_all(target(folder)).unwrap();
        }
        let compile = |source: &str, output: &str| {
            let output = target(output).display().to_string();
            let arguments = ["--crate-name", "a", source, "--out-dir", &output];
            is_covered_by_cargo_cache(&state, &words(&arguments))
        };
        let dependency = "/c/registry/src/r/a-1.0.0/src/lib.rs";
        assert!(!compile(dependency, "w/debug/deps"));
        let commit = "1234567890abcdef1234567890abcdef12345678";
        let kept = CargoCacheFilter {
            places: Places {
                checkout: target("checkout"),
                home: "/c".into(),
                temporary: None,
                workspaces: vec![Workspace {
                    folder: target("checkout"),
                    build: target("w"),
                }],
            },
            packages: ["a-1.0.0".to_owned(), commit.to_owned()].into(),
            awaited: vec![target("checkout/Cargo.lock")],
        };
        state.set_cargo_cache_filter(&kept).unwrap();
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
        assert!(compile(dependency, "w/debug/build/a/0123456789abcdef/out"));
        let compiled = state.compiled_dependencies();
        assert_eq!(compiled, ["a-1.0.0", "1234567", "a-1.0.0", "a-1.0.0"]);
        // A build directory that the set-up did not know, and that the next job can be told of.
        assert!(state.noted_profiles().is_empty());
        assert!(compile(dependency, "checkout/fuzz/target/debug/deps"));
        let noted = [target("checkout/fuzz/target/debug")];
        assert_eq!(state.noted_profiles(), noted.into());
        // Layouts that the cargo cache does not know: it will not save what is written there.
        assert_eq!(state.first_of_unknown_layout(), None);
        assert!(!compile(dependency, "w/debug/units/a/0123456789abcdef/out"));
        assert!(!compile(dependency, "w/release/deps"));
        let first = target("w/debug/units/a/0123456789abcdef/out")
            .display()
            .to_string();
        assert_eq!(state.first_of_unknown_layout(), Some(first));
        // A lockfile that cargo wrote because there was none.
        let lockfile = "[[package]]\nname = \"a\"\nversion = \"1.0.1\"\nsource = \"registry+x\"\n";
        fs::write(target("checkout/Cargo.lock"), lockfile).unwrap();
        assert!(compile(
            "/c/registry/src/r/a-1.0.1/src/lib.rs",
            "w/debug/deps"
        ));
        assert!(state.cargo_cache_filter().unwrap().awaited.is_empty());
        assert!(!is_covered_by_cargo_cache(&state, &words(&["-vV"])));
        assert!(!is_covered_by_cargo_cache(
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
