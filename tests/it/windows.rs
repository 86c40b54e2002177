//! Whole jobs of a Windows runner, under wine: the action as it is built for Windows, with the real
//! sccache, cargo and rustc of Windows. `tests/platforms` builds and fetches what they need.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::registry::Registry;
use crate::support::upstream::{Options, Upstream};
use sccache_action::runner::environment::Environment;
use sccache_action::runner::files::read_entries;
use tempfile::TempDir;

/// The content of `tests/platforms`.
fn given(name: &str) -> String {
    std::env::var(format!("SCCACHE_ACTION_WINDOWS_{name}"))
        .unwrap_or_else(|_| panic!("tests/platforms runs this test"))
}

/// A path as Windows programs see it: wine shows the whole file system as a drive.
fn windows(path: &Path) -> String {
    format!("Z:{}", path.display().to_string().replace('/', "\\"))
}

/// A runner with an empty disk, and a cache and a registry that are there for all its jobs.
struct Runner {
    folder: TempDir,
    upstream: Upstream,
    registry: Registry,
}

/// One job, whose workspace has been checked out.
struct Job {
    folder: PathBuf,
    environment: Environment,
}

const FILES: [&str; 5] = [
    "GITHUB_ENV",
    "GITHUB_PATH",
    "GITHUB_OUTPUT",
    "GITHUB_STATE",
    "GITHUB_STEP_SUMMARY",
];

fn manifest(name: &str, rest: &str) -> String {
    format!("[package]\nname = \"{name}\"\nversion = \"1.0.0\"\nedition = \"2021\"\n{rest}")
}

impl Runner {
    fn new() -> Self {
        let registry = Registry::start();
        // A build script that depends on a folder, and generates sources.
        let script = r#"
            fn main() {
                println!("cargo:rerun-if-changed=data");
                let out = std::env::var("OUT_DIR").unwrap();
                let text = std::fs::read_to_string("data/deep/text").unwrap();
                std::fs::write(format!("{out}/text.rs"), format!("{text:?}")).unwrap();
            }"#;
        let alpha = r#"pub const TEXT: &str = include!(concat!(env!("OUT_DIR"), "/text.rs"));"#;
        registry.publish(
            "alpha",
            "1.0.0",
            &[],
            &[
                ("Cargo.toml", &manifest("alpha", "build = \"build.rs\"\n")),
                ("build.rs", script),
                ("data/deep/text", "alpha"),
                ("src/lib.rs", alpha),
            ],
        );
        let beta = r#"pub fn text() -> String { format!("beta {}", alpha::TEXT) }"#;
        registry.publish(
            "beta",
            "1.0.0",
            &["alpha"],
            &[
                (
                    "Cargo.toml",
                    &manifest("beta", "[dependencies]\nalpha = \"1\"\n"),
                ),
                ("src/lib.rs", beta),
            ],
        );
        Self {
            folder: tempfile::tempdir().unwrap(),
            upstream: Upstream::start(Options::default()),
            registry,
        }
    }

    /// A job in the place of the one before, of which nothing is left.
    fn job(&self, inputs: &[(&str, &str)]) -> Job {
        let folder = self.folder.path().join("job");
        if folder.exists() {
            fs::remove_dir_all(&folder).unwrap();
        }
        let mut job = Job {
            folder,
            environment: Environment::default(),
        };
        for (path, text) in [
            (".cargo/config.toml", self.registry.config().as_str()),
            (
                "Cargo.toml",
                &manifest("app", "[dependencies]\nbeta = \"1\"\n"),
            ),
            (
                "src/main.rs",
                r#"fn main() { println!("app {}", beta::text()); }"#,
            ),
        ] {
            let path = job.folder.join("workspace").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        // Cargo's home is not touched by it.
        let home = tempfile::tempdir().unwrap();
        let locked = Command::new("cargo")
            .args(["generate-lockfile", "--quiet"])
            .current_dir(job.folder.join("workspace"))
            .env("CARGO_HOME", home.path())
            .status();
        assert!(locked.unwrap().success());
        self.registry.asked();
        for name in FILES {
            let file = job.folder.join(name);
            fs::write(&file, "").unwrap();
            job.environment.set(name, windows(&file));
        }
        for (name, folder) in [
            ("CARGO_HOME", "cargo-home"),
            ("GITHUB_WORKSPACE", "workspace"),
            ("RUNNER_TEMP", "temporary"),
            ("RUNNER_TOOL_CACHE", "tools"),
        ] {
            let folder = job.folder.join(folder);
            fs::create_dir_all(&folder).unwrap();
            job.environment.set(name, windows(&folder));
        }
        for (name, value) in [
            ("ACTIONS_RESULTS_URL", self.upstream.url.as_str()),
            ("ACTIONS_RUNTIME_TOKEN", &self.upstream.token),
            ("GITHUB_ACTIONS", "true"),
            ("GITHUB_JOB", "build"),
            ("GITHUB_SERVER_URL", "https://github.com"),
            ("GITHUB_WORKFLOW", "CI"),
            ("INPUT_INSTALL-FROM", "path"),
            ("INPUT_VERSION", "latest"),
            ("RUNNER_ARCH", "X64"),
            ("RUNNER_OS", "Windows"),
        ] {
            job.environment.set(name, value);
        }
        for (name, value) in inputs {
            job.environment.set(*name, *value);
        }
        job
    }
}

impl Job {
    fn entries(&self, file: &str) -> Vec<(String, String)> {
        read_entries(&fs::read_to_string(self.folder.join(file)).unwrap())
    }

    /// Runs one program of Windows to its end, and gives what it printed. It must succeed.
    ///
    /// It prints into a file: processes that wine starts beside it may hold a pipe for ever.
    #[track_caller]
    fn step(&self, environment: &Environment, command: &[&str]) -> String {
        let path = self.folder.join("printed");
        let printed = File::create(&path).unwrap();
        let added = fs::read_to_string(self.folder.join("GITHUB_PATH")).unwrap();
        let path_of_windows: Vec<String> = added
            .lines()
            .map(str::to_owned)
            .chain([given("PATH")])
            .collect();
        let status = Command::new(given("WINE"))
            .args(command)
            .current_dir(self.folder.join("workspace"))
            .env_clear()
            .envs(environment.iter())
            .env("HOME", std::env::var_os("HOME").unwrap())
            .env("WINEDEBUG", "-all")
            .env("WINEPATH", path_of_windows.join(";"))
            .env("WINEPREFIX", given("PREFIX"))
            .stdin(Stdio::null())
            .stdout(printed.try_clone().unwrap())
            .stderr(printed)
            .status()
            .unwrap();
        let printed = String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
        assert!(status.success(), "{command:?}: {status}\n{printed}");
        assert!(!printed.contains("::warning"), "{command:?}: {printed}");
        printed
    }

    /// A whole job. Gives what the build printed, what the program said that it made, and the job
    /// summary.
    fn run(&self) -> (String, String, String) {
        let action = given("ACTION");
        self.step(&self.environment, &[&action, "setup"]);
        let mut later = self.environment.for_programs();
        for (name, value) in self.entries("GITHUB_ENV") {
            later.set(name, value);
        }
        let built = self.step(
            &later,
            &["cargo.exe", "build", "--locked", "--verbose", "--jobs", "1"],
        );
        let said = self.step(&later, &["target\\debug\\app.exe"]);
        let mut post = later;
        for (name, value) in self.environment.iter() {
            post.set(name, value);
        }
        for (name, value) in self.entries("GITHUB_STATE") {
            post.set(format!("STATE_{name}"), value);
        }
        self.step(&post, &[&action, "report"]);
        let summary = fs::read_to_string(self.folder.join("GITHUB_STEP_SUMMARY")).unwrap();
        (built, said.trim().to_owned(), summary)
    }
}

#[test]
#[ignore = "tests/platforms runs it"]
fn what_one_job_compiled_the_next_has_from_the_cache_out_of_packs() {
    let runner = Runner::new();
    let inputs = [("INPUT_CACHE-CARGO", "false")];
    let (_, said, summary) = runner.job(&inputs).run();
    assert_eq!(said, "app beta alpha");
    assert!(
        summary.contains("(0 hits, 2 misses, 0 errors)"),
        "{summary}"
    );
    let before = runner.upstream.counts();
    let (_, said, summary) = runner.job(&inputs).run();
    assert_eq!(said, "app beta alpha");
    assert!(
        summary.contains("(2 hits, 0 misses, 0 errors)"),
        "{summary}"
    );
    let asked = runner.upstream.counts().since(&before);
    assert_eq!((asked.reservations, asked.bytes_up), (0, 0));
}

#[test]
#[ignore = "tests/platforms runs it"]
fn what_one_job_compiled_of_its_dependencies_the_next_finds_fresh() {
    let runner = Runner::new();
    let (built, said, _) = runner.job(&[]).run();
    assert_eq!(said, "app beta alpha");
    assert!(built.contains("Compiling alpha"), "{built}");
    let (built, said, summary) = runner.job(&[]).run();
    assert_eq!(said, "app beta alpha");
    for dependency in ["Fresh alpha", "Fresh beta", "Compiling app"] {
        assert!(
            built.contains(dependency),
            "{dependency}: {built}\n{summary}"
        );
    }
    assert_eq!(runner.registry.asked(), [] as [&str; 0]);
}
