//! A PostgreSQL server of the tests' own, as Debian packages it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use sqlx::{Connection, Executor, PgConnection};
use tempfile::TempDir;

/// A running server, which ends with the last of those that share it.
pub struct Postgres {
    child: Child,
    port: u16,
    databases: AtomicU64,
    _folder: TempDir,
}

static SHARED: Mutex<Weak<Postgres>> = Mutex::new(Weak::new());

fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql");
    let versions = versions.expect("PostgreSQL is missing; run tests/tools.sh");
    versions
        .map(|version| version.unwrap().path().join("bin"))
        .find(|folder| folder.join("initdb").exists())
        .expect("PostgreSQL is missing; run tests/tools.sh")
}

/// A command that is not run as root, which PostgreSQL refuses.
fn unprivileged(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
    command.arg("--").arg(program);
    command
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output().unwrap();
    id.stdout.trim_ascii() == b"0"
}

impl Postgres {
    /// The server that tests of this process share; the first one starts it.
    pub fn shared() -> Arc<Self> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let started = Arc::new(Self::start());
            *shared = Arc::downgrade(&started);
            started
        })
    }

    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        if is_root() {
            let mut chown = Command::new("chown");
            assert!(
                chown
                    .arg("postgres")
                    .arg(folder.path())
                    .status()
                    .unwrap()
                    .success()
            );
        }
        let data = folder.path().join("data");
        let made = unprivileged(&programs().join("initdb"))
            .current_dir(folder.path())
            .args([
                "--username=test",
                "--auth=trust",
                "--no-sync",
                "--encoding=UTF8",
            ])
            // It has another byte order than C, in which a service that forgets to ask for C would
            // fail.
            .args([
                "--locale-provider=icu",
                "--icu-locale=en",
                "--locale=C.UTF-8",
                "-D",
            ])
            .arg(&data)
            .output()
            .unwrap();
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let port = sccache_action::sccache::server::free_port().unwrap();
        let mut child = unprivileged(&programs().join("postgres"))
            .current_dir(folder.path())
            .arg("-D")
            .arg(&data)
            .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-k", ""])
            .args(["-c", "fsync=off"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let ready = log.any(|line| line.unwrap().contains("ready to accept connections"));
        assert!(ready, "PostgreSQL did not start");
        // Read to its end, so that the server never waits for the pipe.
        std::thread::spawn(move || log.count());
        Self {
            child,
            port,
            databases: AtomicU64::new(0),
            _folder: folder,
        }
    }

    /// The URL of a new, empty database.
    pub async fn new_database(&self) -> String {
        let number = self.databases.fetch_add(1, Ordering::Relaxed);
        let name = format!("cache_{number}");
        let url = |name: &str| format!("postgres://test@127.0.0.1:{}/{name}", self.port);
        let mut connection = PgConnection::connect(&url("postgres")).await.unwrap();
        let statement = sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"));
        connection.execute(statement).await.unwrap();
        url(&name)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // A server that is killed outright leaves its children and shared memory behind.
        let _ = Command::new("kill")
            .args(["-QUIT", &self.child.id().to_string()])
            .status();
        let _ = self.child.wait();
    }
}
