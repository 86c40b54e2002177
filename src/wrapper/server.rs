//! The client of sccache's server: it asks the server to compile, as sccache's own client does, and notices
//! in time if the server is dead.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::protocol::{
    ANSWER_LIMIT, CompileAnswer, CompileRequest, Dialect, Finished, answer, statistics_message,
};
use crate::runner::environment::is_executable;

/// How long the server may be silent before the wrapper checks whether it, and the relay behind it, still
/// answer. A compile may take any time as long as these answer.
const SILENCE_LIMIT: Duration = Duration::from_secs(8);

/// How long each check may take. With [`SILENCE_LIMIT`] and both it makes less than 30 s.
const ALIVE_TIMEOUT: Duration = Duration::from_secs(8);

/// How long the rest of an answer is waited for that nobody needs.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// How long the relay may take to start a server again.
const RESTART_WAIT: Duration = Duration::from_secs(5);

/// The port and dialect of the server, and the relay that it depends on.
#[derive(Clone, Copy, Debug)]
pub struct ServerEndpoint {
    /// Its port on 127.0.0.1.
    pub port: u16,
    /// Its dialect of the protocol.
    pub dialect: Dialect,
    /// The port of the relay on 127.0.0.1, if there is one.
    pub relay: Option<u16>,
}

/// Whether there is a relay, which starts the server again.
pub fn has_relay(relay: Option<u16>) -> bool {
    relay.is_some_and(|port| connect(port).is_ok())
}

/// Whether a server takes connections on this port of 127.0.0.1 within [`RESTART_WAIT`].
pub fn wait_for_restart(port: u16) -> bool {
    let start = Instant::now();
    while start.elapsed() < RESTART_WAIT {
        // There is no event to wait for: nothing tells when a port begins to listen.
        std::thread::sleep(Duration::from_millis(20));
        if connect(port).is_ok() {
            return true;
        }
    }
    false
}

/// The outcome of a request to the server.
#[derive(Debug)]
pub enum ServerOutcome<T> {
    /// The compile succeeded, or its output was in the cache.
    Compiled(T),
    /// The compiler or the preprocessor failed. The bare compiler is to report the error.
    CompileFailed,
    /// The server did not do it, since it cannot be cached.
    Unhandled,
    /// The server works and refused to start.
    Refused(String),
    /// The server started and failed. Its statistics count that as a failure too.
    Broken(String),
    /// There is no server.
    Gone(String),
    /// The server was lost during the compile.
    Lost(String),
    /// The server, or the relay that it waits for, runs and does not answer.
    Hung(String),
}

/// Asks `server` for `compile` and passes the compiler's output to `done`.
pub fn ask<T>(
    server: ServerEndpoint,
    compile: &CompileRequest<'_>,
    done: impl FnOnce(Finished<'_>) -> T,
) -> ServerOutcome<T> {
    let Some(message) = compile.message() else {
        return ServerOutcome::Refused("its arguments are too long".to_owned());
    };
    let mut connection = match connect(server.port) {
        Ok(connection) => connection,
        Err(error) if is_timeout(&error) => {
            return ServerOutcome::Hung("sccache's server accepts no connection".to_owned());
        }
        Err(error) => return ServerOutcome::Gone(format!("its server is gone: {error}")),
    };
    let mut conversation = Conversation {
        server,
        connection: &mut connection,
    };
    let answered = conversation
        .send(&message)
        .and_then(|()| conversation.answer());
    let first = match answered {
        Ok(bytes) => bytes,
        Err(failure) => return failure.into_outcome(),
    };
    match answer(server.dialect, &first) {
        Some(CompileAnswer::Started) => {}
        Some(CompileAnswer::Unhandled) => return ServerOutcome::Unhandled,
        Some(CompileAnswer::Unsupported(why)) => {
            return ServerOutcome::Refused(format!("Compiler not supported: {why}"));
        }
        Some(CompileAnswer::Finished(_)) | None => return not_understood(),
    }
    let second = match conversation.answer() {
        Ok(bytes) => bytes,
        Err(failure) => return failure.into_outcome(),
    };
    match answer(server.dialect, &second) {
        Some(CompileAnswer::Finished(finished)) if finished.status == Some(0) => {
            ServerOutcome::Compiled(done(finished))
        }
        Some(CompileAnswer::Finished(finished)) => match super::failure_told(finished.stderr) {
            Some(why) => ServerOutcome::Broken(why),
            None => ServerOutcome::CompileFailed,
        },
        _ => not_understood(),
    }
}

fn not_understood<T>() -> ServerOutcome<T> {
    ServerOutcome::Lost("its server's answer is invalid".to_owned())
}

enum ConnectionFailure {
    Lost(io::Error),
    Hung(&'static str),
}

impl ConnectionFailure {
    fn into_outcome<T>(self) -> ServerOutcome<T> {
        match self {
            Self::Lost(error) => ServerOutcome::Lost(format!("its server was lost: {error}")),
            Self::Hung(what) => ServerOutcome::Hung(format!("{what} does not answer")),
        }
    }
}

struct Conversation<'a> {
    server: ServerEndpoint,
    connection: &'a mut TcpStream,
}

impl Conversation<'_> {
    fn send(&mut self, message: &[u8]) -> Result<(), ConnectionFailure> {
        self.connection.write_all(message).map_err(|error| {
            if is_timeout(&error) {
                ConnectionFailure::Hung("sccache's server")
            } else {
                ConnectionFailure::Lost(error)
            }
        })
    }

    /// The next answer, without its length.
    fn answer(&mut self) -> Result<Vec<u8>, ConnectionFailure> {
        let mut length = [0; 4];
        self.fill(&mut length)?;
        let length = u32::from_be_bytes(length);
        if length > ANSWER_LIMIT {
            let error = io::Error::other(format!("an answer of {length} bytes"));
            return Err(ConnectionFailure::Lost(error));
        }
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, mut bytes: &mut [u8]) -> Result<(), ConnectionFailure> {
        while !bytes.is_empty() {
            match self.connection.read(bytes) {
                Ok(0) => return Err(ConnectionFailure::Lost(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => bytes = &mut bytes[read..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => self.check_alive()?,
                Err(error) => return Err(ConnectionFailure::Lost(error)),
            }
        }
        Ok(())
    }

    fn check_alive(&self) -> Result<(), ConnectionFailure> {
        if !answers(self.server.port, &statistics_message()) {
            return Err(ConnectionFailure::Hung("sccache's server"));
        }
        // Without its token the relay only shows that it works.
        let request = b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n";
        match self.server.relay {
            // A relay that is gone refuses the server's requests, so the server does not hang.
            Some(port) if is_silent(port, request) => {
                Err(ConnectionFailure::Hung("the relay to GitHub's cache"))
            }
            _ => Ok(()),
        }
    }
}

fn connect(port: u16) -> io::Result<TcpStream> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let connection = TcpStream::connect_timeout(&address, ALIVE_TIMEOUT)?;
    connection.set_read_timeout(Some(SILENCE_LIMIT))?;
    connection.set_write_timeout(Some(SILENCE_LIMIT))?;
    Ok(connection)
}

fn first_byte(port: u16, request: &[u8]) -> io::Result<()> {
    let mut connection = connect(port)?;
    connection.write_all(request)?;
    connection.read_exact(&mut [0])?;
    // A connection that is closed before its answer is read ends with a reset, and sccache's server logs that
    // as an error. It closes the connection itself once this side has ended.
    let rest = connection
        .shutdown(Shutdown::Write)
        .and_then(|()| connection.set_read_timeout(Some(CLOSE_WAIT)));
    if rest.is_ok() {
        let _ = io::copy(&mut connection.take(ANSWER_LIMIT.into()), &mut io::sink());
    }
    Ok(())
}

fn answers(port: u16, request: &[u8]) -> bool {
    first_byte(port, request).is_ok()
}

fn is_silent(port: u16, request: &[u8]) -> bool {
    first_byte(port, request).is_err_and(|error| is_timeout(&error))
}

/// Unix and Windows have different kinds for it.
fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// The full path of `compiler`, as the shell would find it on `path` from `folder`. `None` if there is
/// none.
pub fn full_path(compiler: &Path, path: Option<OsString>, folder: &Path) -> Option<OsString> {
    if compiler.components().count() > 1 || compiler.is_absolute() {
        return executable(folder.join(compiler));
    }
    let path = path?;
    std::env::split_paths(&path).find_map(|each| executable(folder.join(each).join(compiler)))
}

/// `program`, or with the suffix that Windows adds, if it is executable.
fn executable(program: PathBuf) -> Option<OsString> {
    if is_executable(&program) {
        return Some(program.into_os_string());
    }
    if std::env::consts::EXE_SUFFIX.is_empty() {
        return None;
    }
    let mut program = program.into_os_string();
    program.push(std::env::consts::EXE_SUFFIX);
    is_executable(Path::new(&program)).then_some(program)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::net::TcpListener;

    use super::*;

    fn ask_one_that_answers(bytes: Vec<u8>) -> ServerOutcome<Vec<u8>> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let answering = std::thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            let mut length = [0; 4];
            connection.read_exact(&mut length).unwrap();
            let mut request = vec![0; u32::from_be_bytes(length) as usize];
            connection.read_exact(&mut request).unwrap();
            connection.write_all(&bytes).unwrap();
        });
        let dialect = Dialect::of(&semver::Version::new(0, 16, 0)).unwrap();
        let server = ServerEndpoint {
            port,
            dialect,
            relay: None,
        };
        let compile = CompileRequest {
            compiler: OsStr::new("/b/cc"),
            folder: OsStr::new("/w"),
            arguments: &[],
            environment: &[],
        };
        let outcome = ask(server, &compile, |finished| finished.stderr.to_vec());
        answering.join().unwrap();
        outcome
    }

    fn framed(bytes: &[u8]) -> Vec<u8> {
        let mut message = u32::try_from(bytes.len()).unwrap().to_be_bytes().to_vec();
        message.extend_from_slice(bytes);
        message
    }

    fn finished(status: i32, stderr: &[u8]) -> Vec<u8> {
        let mut bytes = vec![5, 0, 0, 0, 1];
        bytes.extend_from_slice(&status.to_le_bytes());
        bytes.extend_from_slice(&[0; 9]);
        bytes.extend_from_slice(&(stderr.len() as u64).to_le_bytes());
        bytes.extend_from_slice(stderr);
        bytes.extend_from_slice(&[2, 0, 0, 0]);
        [framed(&[0; 8]), framed(&bytes)].concat()
    }

    #[test]
    fn each_end_of_a_compile_is_told_from_the_others() {
        let outcome = ask_one_that_answers(finished(0, b"a warning"));
        assert!(
            matches!(&outcome, ServerOutcome::Compiled(said) if said == b"a warning"),
            "{outcome:?}"
        );
        let outcome = ask_one_that_answers(finished(1, b"a.c:1: error"));
        assert!(
            matches!(outcome, ServerOutcome::CompileFailed),
            "{outcome:?}"
        );
        let fatal =
            b"sccache: encountered fatal error\nsccache: error: e\nsccache: caused by: no a.gcno\n";
        let outcome = ask_one_that_answers(finished(-2, fatal));
        assert!(
            matches!(&outcome, ServerOutcome::Broken(why) if why == "no a.gcno"),
            "{outcome:?}"
        );
        let outcome = ask_one_that_answers(framed(&[0, 0, 0, 0, 1, 0, 0, 0]));
        assert!(matches!(outcome, ServerOutcome::Unhandled), "{outcome:?}");
    }

    #[test]
    fn an_answer_that_is_cut_off_or_too_long_or_something_else_is_a_server_lost() {
        let whole = finished(0, b"said");
        for bytes in [
            Vec::new(),
            whole[..6].to_vec(),
            whole[..whole.len() - 1].to_vec(),
            vec![0xff; 12],
            framed(b"nothing known"),
        ] {
            let outcome = ask_one_that_answers(bytes);
            assert!(matches!(outcome, ServerOutcome::Lost(_)), "{outcome:?}");
        }
    }

    #[test]
    fn a_check_takes_the_whole_answer_so_that_the_server_sees_no_reset() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            connection.read_exact(&mut [0; 4]).unwrap();
            connection.write_all(&[7; 50_000]).unwrap();
            // Another read of a connection that was reset fails.
            connection.read(&mut [0])
        });
        assert!(answers(port, b"ping"));
        assert_eq!(server.join().unwrap().unwrap(), 0);
    }

    #[test]
    fn a_server_that_is_gone_is_known_at_once() {
        let port = crate::sccache::server::free_port().unwrap();
        assert!(!answers(port, b""));
        assert!(!is_silent(port, b""));
    }

    #[test]
    fn a_compiler_is_found_as_a_shell_finds_it() {
        let folder = tempfile::tempdir().unwrap();
        let bin = folder.path().join("bin");
        std::fs::create_dir_all(bin.join("cc-folder")).unwrap();
        let name = format!("cc{}", std::env::consts::EXE_SUFFIX);
        std::fs::write(bin.join(&name), "").unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(bin.join(&name), std::fs::Permissions::from_mode(0o755))
                .unwrap();
        }
        let expected = bin.join(&name);
        let find = |compiler: &Path| {
            let found = full_path(compiler, Some(bin.clone().into()), folder.path());
            found.map(PathBuf::from)
        };
        assert_eq!(find(Path::new("cc")), Some(expected.clone()));
        assert_eq!(find(&bin.join("cc")), Some(expected.clone()));
        assert_eq!(find(Path::new("bin/cc")), Some(expected));
        assert_eq!(find(Path::new("cc-folder")), None);
        assert_eq!(find(Path::new("nothing")), None);
    }
}
