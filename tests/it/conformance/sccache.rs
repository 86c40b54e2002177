//! The real sccache, which stores what it compiled.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::target::{Target, Who};
use crate::support::tools;

/// How many files of C and how many crates of Rust a build compiles.
const C_FILES: u64 = 4;
const CRATES: u64 = 2;

/// An sccache server that is stopped when this is dropped.
struct Server {
    binary: PathBuf,
    folder: PathBuf,
    environment: Vec<(String, String)>,
}

impl Server {
    async fn call(&self, arguments: &[&str]) -> Output {
        let mut command = tokio::process::Command::from(self.command(arguments));
        command.output().await.unwrap()
    }

    fn command(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = std::process::Command::new(&self.binary);
        let environment = self.environment.iter().map(|(name, value)| (name, value));
        command.args(arguments).env_clear().envs(environment);
        command.current_dir(&self.folder);
        command
    }

    async fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.call(arguments).await;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    async fn stats(&self) -> Value {
        let json = self
            .succeed(&["--show-stats", "--stats-format", "json"])
            .await;
        serde_json::from_str::<Value>(&json).unwrap()["stats"].take()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.command(&["--stop-server"]).output();
    }
}

/// The compiler itself: the one on `PATH` may be rustup's proxy, which needs a home.
fn rustc() -> String {
    let output = std::process::Command::new("rustc")
        .args(["--print", "sysroot"])
        .output();
    let sysroot = String::from_utf8(output.unwrap().stdout).unwrap();
    format!("{}/bin/rustc", sysroot.trim())
}

/// Jobs that build the same project with this version of sccache.
struct Project<'a> {
    target: &'a Target,
    version: &'a str,
    environment: &'a [(&'a str, &'a str)],
    /// The part that keeps its entries apart from other projects'.
    name: String,
    folder: TempDir,
}

impl<'a> Project<'a> {
    fn new(target: &'a Target, version: &'a str, environment: &'a [(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for i in 0..C_FILES {
            let source = format!("int f{i}(void) {{ return {i}; }}\n");
            fs::write(folder.path().join(format!("{i}.c")), source).unwrap();
        }
        for i in 0..CRATES {
            let source = format!("pub fn f() -> u64 {{ {i} }}\n");
            fs::write(folder.path().join(format!("c{i}.rs")), source).unwrap();
        }
        let name = target.unique();
        Self {
            target,
            version,
            environment,
            name,
            folder,
        }
    }

    /// Starts a server of the job's own. Another process may take its port first, so there are several
    /// attempts.
    async fn start_server(&self, who: Who) -> Server {
        for _ in 0..3 {
            let server = self.server(who);
            let output = server.call(&["--start-server"]).await;
            let stderr = String::from_utf8_lossy(&output.stderr);
            if !stderr.contains("Address in use") && !stderr.contains("Address already in use") {
                assert!(output.status.success(), "{stderr}");
                return server;
            }
            // Its end would stop the other one's.
            std::mem::forget(server);
        }
        panic!("no port is free");
    }

    /// A server that does not run yet, with a port of its own.
    fn server(&self, who: Who) -> Server {
        let folder = self.folder.path();
        let port = sccache_action::sccache::server::free_port().unwrap();
        let is_v2 = self.environment.contains(&V2);
        let url = if is_v2 {
            "ACTIONS_RESULTS_URL"
        } else {
            "ACTIONS_CACHE_URL"
        };
        let own = [
            ("PATH", env::var("PATH").unwrap()),
            ("HOME", folder.display().to_string()),
            ("SCCACHE_SERVER_PORT", port.to_string()),
            ("SCCACHE_IDLE_TIMEOUT", "0".to_owned()),
            ("SCCACHE_GHA_ENABLED", "on".to_owned()),
            ("SCCACHE_GHA_VERSION", self.name.clone()),
            ("NO_PROXY", "127.0.0.1".to_owned()),
            ("ACTIONS_RUNTIME_TOKEN", self.target.token(who).to_owned()),
            (url, self.target.url().to_owned()),
        ];
        let given = self
            .environment
            .iter()
            .map(|(name, value)| (*name, (*value).to_owned()));
        let environment = own.into_iter().chain(given);
        Server {
            binary: tools::sccache(self.version),
            folder: folder.to_owned(),
            environment: environment
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
        }
    }

    /// Builds with a server of the job's own, which must find all or nothing and store what it did
    /// not find.
    async fn build(&self, who: Who, is_warm: bool) {
        let server = self.start_server(who).await;
        for i in 0..C_FILES {
            let file = i.to_string();
            server
                .succeed(&["gcc", "-c", &(file.clone() + ".c"), "-o", &(file + ".o")])
                .await;
        }
        let rustc = rustc();
        for i in 0..CRATES {
            let (name, file) = (format!("c{i}"), format!("c{i}.rs"));
            let crate_of = [
                rustc.as_str(),
                "--crate-name",
                &name,
                "--crate-type",
                "lib",
                &file,
            ];
            let emit = ["--emit=dep-info,metadata,link", "--out-dir", "."];
            server.succeed(&[&crate_of[..], &emit].concat()).await;
        }
        let all = C_FILES + CRATES;
        let hits = if is_warm { all } else { 0 };
        let begin = Instant::now();
        loop {
            let stats = server.stats().await;
            let say = format!("{} warm: {is_warm} {stats}", self.version);
            let count = |name: &str| {
                let counts = stats[name]["counts"].as_object().unwrap();
                counts.values().filter_map(Value::as_u64).sum::<u64>()
            };
            assert_eq!(count("cache_hits"), hits, "{say}");
            assert_eq!(count("cache_errors"), 0, "{say}");
            assert_eq!(stats["cache_write_errors"], 0, "{say}");
            // sccache has no event for a write that is done.
            if stats["cache_writes"] == all - hits {
                return;
            }
            assert!(begin.elapsed() < Duration::from_secs(20), "{say}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Asserts that sccache named its entries as it does in the expected protocol.
    async fn spoke(&self) {
        let mut cache = self.target.cache();
        cache.version = format!("sccache-v{}-{}", self.version, self.name);
        if self.environment.contains(&V2) {
            cache.version = hex::encode(Sha256::digest(&cache.version));
        }
        assert!(cache.matched(&["sccache/.sccache_check"]).await.is_some());
    }
}

const V2: (&str, &str) = ("ACTIONS_CACHE_SERVICE_V2", "on");

async fn cold_and_warm(target: &Target, version: &str, environment: &[(&str, &str)]) {
    let project = Project::new(target, version, environment);
    for is_warm in [false, true] {
        project.build(Who::Default, is_warm).await;
    }
    project.spoke().await;
}

pub async fn speaks_version_2(target: &Target) {
    for version in ["0.16.0", "0.15.0", "0.14.0", "0.10.0"] {
        cold_and_warm(target, version, &[V2]).await;
    }
}

pub async fn speaks_version_1(target: &Target) {
    for version in ["0.9.1", "0.8.2", "0.7.7", "0.5.3", "0.4.0"] {
        cold_and_warm(target, version, &[]).await;
    }
}

pub async fn speaks_version_1_where_the_server_is_not_githubs(target: &Target) {
    let ghes = ("GITHUB_SERVER_URL", "https://ghes.example");
    cold_and_warm(target, "0.16.0", &[ghes]).await;
}

pub async fn only_reads_where_it_may_not_write(target: &Target) {
    for (version, environment) in [("0.16.0", &[V2][..]), ("0.9.1", &[])] {
        let project = Project::new(target, version, environment);
        project.build(Who::Default, false).await;
        project.build(Who::ReadOnly, true).await;
    }
}
