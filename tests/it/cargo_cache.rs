//! Whole jobs with cargo: what the dependencies of one job were compiled to, the next one finds
//! fresh; with the real cargo and the real sccache, against a registry on this machine.

use crate::support::tools;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use crate::support::registry::Registry;
use crate::support::runner::{Job, Step, all_files, binary, kill};
use crate::support::upstream::{Fault, Options, Upstream};
use tempfile::TempDir;

/// A repository with its registry and its cache, whose jobs run all in the same place.
struct Repository {
    registry: Registry,
    upstream: Upstream,
    folder: TempDir,
}

/// A job of it, which has been checked out.
struct Checkout<'a> {
    job: Job,
    repository: &'a Repository,
}

const MANIFEST: &str = r#"
[workspace]
members = ["member"]

[package]
name = "app"
version = "0.1.0"
edition = "2021"

[dependencies]
member = { path = "member" }
"#;

const MEMBER: &str = r#"
[package]
name = "member"
version = "0.1.0"
edition = "2021"

[dependencies]
beta = "1"
gamma = "1"
"#;

const MAIN: &str = r#"fn main() { println!("{}", member::text()); }"#;
const LIBRARY: &str =
    r#"pub fn text() -> String { format!("member {} {}", beta::text(), gamma::macro_!()) }"#;

impl Repository {
    fn new() -> Self {
        let registry = Registry::start();
        // A build script that goes by a folder, and one that makes what is compiled.
        registry.publish(
            "alpha",
            "1.0.0",
            &[],
            &[
                (
                    "Cargo.toml",
                    &manifest("alpha", "1.0.0", "build = \"build.rs\"\n", ""),
                ),
                (
                    "build.rs",
                    r#"
                    fn main() {
                        println!("cargo:rerun-if-changed=data");
                        println!("cargo:rerun-if-env-changed=ALPHA");
                        let out = std::env::var("OUT_DIR").unwrap();
                        let text = std::fs::read_to_string("data/deep/text").unwrap();
                        std::fs::write(format!("{out}/text.rs"), format!("{text:?}")).unwrap();
                    }"#,
                ),
                ("data/deep/text", "alpha 1.0.0"),
                (
                    "src/lib.rs",
                    r#"pub const TEXT: &str = include!(concat!(env!("OUT_DIR"), "/text.rs"));"#,
                ),
            ],
        );
        publish_beta(&registry, "1.0.0");
        registry.publish(
            "gamma",
            "1.0.0",
            &[],
            &[
                (
                    "Cargo.toml",
                    &manifest("gamma", "1.0.0", "", "[lib]\nproc-macro = true\n"),
                ),
                (
                    "src/lib.rs",
                    r#"
                    use proc_macro::TokenStream;
                    #[proc_macro]
                    pub fn macro_(_: TokenStream) -> TokenStream { "\"gamma\"".parse().unwrap() }
                    "#,
                ),
            ],
        );
        Self {
            registry,
            upstream: Upstream::start(Options::default()),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// A job on an empty runner, with the sources that it was given.
    fn job(&self) -> Checkout<'_> {
        let place = self.folder.path().join("job");
        if place.exists() {
            fs::remove_dir_all(&place).unwrap();
        }
        let mut job = Job::in_folder(place);
        job.use_sccache(&tools::sccache("0.16.0"));
        job.use_service(&self.upstream.url, &self.upstream.token);
        job.set("GITHUB_WORKFLOW", "CI");
        job.set("GITHUB_JOB", "build");
        job.set("CARGO_HOME", job.path("cargo-home").display().to_string());
        let checkout = Checkout {
            job,
            repository: self,
        };
        for (path, text) in [
            (".cargo/config.toml", self.registry.config().as_str()),
            ("Cargo.toml", MANIFEST),
            ("src/main.rs", MAIN),
            ("member/Cargo.toml", MEMBER),
            ("member/src/lib.rs", LIBRARY),
        ] {
            checkout.write(path, text);
        }
        match fs::read(self.lockfile()) {
            Ok(lockfile) => fs::write(checkout.path("Cargo.lock"), lockfile).unwrap(),
            Err(_) => checkout.lock(),
        }
        checkout
    }

    /// Where the lockfile is between jobs.
    fn lockfile(&self) -> std::path::PathBuf {
        self.folder.path().join("Cargo.lock")
    }
}

fn manifest(name: &str, version: &str, package: &str, rest: &str) -> String {
    format!(
        "[package]\nname = \"{name}\"\nversion = \"{version}\"\nedition = \"2021\"\n{package}\n{rest}"
    )
}

fn publish_beta(registry: &Registry, version: &str) {
    let source =
        format!("pub fn text() -> String {{ format!(\"beta {version} {{}}\", alpha::TEXT) }}");
    registry.publish(
        "beta",
        version,
        &["alpha"],
        &[
            (
                "Cargo.toml",
                &manifest("beta", version, "", "[dependencies]\nalpha = \"1\"\n"),
            ),
            ("src/lib.rs", &source),
        ],
    );
}

const BUILD: &str = "cargo build --locked --verbose";

impl Checkout<'_> {
    fn path(&self, path: &str) -> std::path::PathBuf {
        self.job.path("workspace").join(path)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Makes the lockfile of what the registry has now, in a home of its own.
    fn lock(&self) {
        let home = tempfile::tempdir().unwrap();
        let status = Command::new("cargo")
            .arg("generate-lockfile")
            .arg("--quiet")
            .current_dir(self.path(""))
            .env("CARGO_HOME", home.path())
            .status();
        assert!(status.unwrap().success());
        fs::copy(self.path("Cargo.lock"), self.repository.lockfile()).unwrap();
        self.repository.registry.asked();
    }

    #[track_caller]
    fn set_up(&self) -> Step {
        let setup = self.job.setup().green();
        assert!(setup.warnings().is_empty(), "{:?}", setup.warnings());
        setup
    }

    /// Builds, and gives the packages that were fresh and those that were compiled.
    #[track_caller]
    fn build(&self) -> (Vec<String>, Vec<String>) {
        let step = self.job.shell(BUILD).green();
        let named = |state: &str| {
            let mut names: Vec<String> = step
                .stderr
                .lines()
                .filter_map(|line| line.trim_start().strip_prefix(state))
                .filter_map(|rest| rest.split_whitespace().next())
                .map(str::to_owned)
                .collect();
            names.sort();
            names
        };
        (named("Fresh "), named("Compiling "))
    }

    /// What the program that was built says.
    #[track_caller]
    fn said(&self) -> String {
        let step = self.job.shell("target/debug/app").green();
        step.stdout.trim().to_owned()
    }

    #[track_caller]
    fn report(&self) -> Step {
        let report = self.job.report().green();
        self.job.server_ends();
        report
    }

    /// Sets up, builds and reports; all of it must be green, without a warning.
    #[track_caller]
    fn run(&self) -> (Vec<String>, Vec<String>) {
        self.set_up();
        let built = self.build();
        let report = self.report();
        assert!(report.warnings().is_empty(), "{}", report.stdout);
        built
    }
}

const ALL: [&str; 3] = ["alpha", "beta", "gamma"];
const OWN: [&str; 2] = ["app", "member"];
const SAID: &str = "member beta 1.0.0 alpha 1.0.0 gamma";

#[test]
fn the_next_job_finds_every_dependency_fresh_downloads_nothing_and_writes_nothing() {
    let repository = Repository::new();
    let first = repository.job();
    let (fresh, _) = first.run();
    assert_eq!(fresh, [] as [&str; 0]);
    let summary = first.job.file("GITHUB_STEP_SUMMARY");
    assert!(summary.contains("Cargo cache"), "{summary}");
    let mut asked = repository.registry.asked();
    asked.sort();
    let archives = [
        "alpha",
        "alpha-1.0.0",
        "beta",
        "beta-1.0.0",
        "gamma",
        "gamma-1.0.0",
    ];
    assert_eq!(asked, archives);
    let before = repository.upstream.counts();
    let second = repository.job();
    let (fresh, compiled) = second.run();
    assert_eq!(
        (fresh, compiled),
        (ALL.map(String::from).into(), OWN.map(String::from).into())
    );
    assert_eq!(second.said(), SAID);
    assert_eq!(repository.registry.asked(), [] as [&str; 0]);
    let asked = repository.upstream.counts().since(&before);
    assert_eq!((asked.reservations, asked.bytes_up), (0, 0));
    let summary = second.job.file("GITHUB_STEP_SUMMARY");
    assert!(summary.contains("nothing new to save"), "{summary}");
}

#[test]
fn another_job_of_the_repository_and_another_branch_have_what_the_first_compiled() {
    let repository = Repository::new();
    repository.job().run();
    let mut other = repository.job();
    other.job.set("GITHUB_JOB", "test");
    let before = repository.upstream.counts();
    assert_eq!(other.run().0, ALL);
    // Its own list of the same parts, and no part.
    let up = repository.upstream.counts().since(&before).bytes_up;
    assert!((1..10_000).contains(&up), "{up}");
    let mut branch = repository.job();
    let token = repository
        .upstream
        .token_for(Some("refs/pull/1/merge"), &["refs/heads/main"]);
    branch.job.set("ACTIONS_RUNTIME_TOKEN", token);
    assert_eq!(branch.run().0, ALL);
}

#[test]
fn the_workspaces_own_code_is_compiled_whatever_the_times_of_its_sources_say() {
    let repository = Repository::new();
    let long_ago = SystemTime::now() - Duration::from_secs(1_000_000);
    let age = |job: &Checkout<'_>| {
        for file in all_files(&job.path("")) {
            File::options()
                .write(true)
                .open(file)
                .unwrap()
                .set_modified(long_ago)
                .unwrap();
        }
    };
    let first = repository.job();
    age(&first);
    first.run();
    let second = repository.job();
    second.write("member/src/lib.rs", &LIBRARY.replace("member ", "changed "));
    age(&second);
    let (fresh, compiled) = second.run();
    assert_eq!(
        (fresh, compiled),
        (ALL.map(String::from).into(), OWN.map(String::from).into())
    );
    assert_eq!(second.said(), SAID.replace("member", "changed"));
}

#[test]
fn a_bumped_dependency_is_all_that_is_compiled_and_sent() {
    let repository = Repository::new();
    repository.job().run();
    let cold = repository.upstream.counts().bytes_up;
    publish_beta(&repository.registry, "1.0.1");
    let bumped = repository.job();
    bumped.lock();
    let before = repository.upstream.counts();
    let (fresh, compiled) = bumped.run();
    assert_eq!(fresh, ["alpha", "gamma"]);
    assert_eq!(compiled, ["app", "beta", "member"]);
    assert_eq!(bumped.said(), "member beta 1.0.1 alpha 1.0.0 gamma");
    let asked = repository.registry.asked();
    assert!(!asked.contains(&"alpha-1.0.0".to_owned()), "{asked:?}");
    let up = repository.upstream.counts().since(&before).bytes_up;
    assert!(up < cold / 3, "{up} of {cold}");
    // The old version goes: what is restored next is what the lockfile asks for.
    let next = repository.job();
    next.set_up();
    let archives = all_files(&next.job.path("cargo-home/registry/cache"));
    assert_eq!(archives.len(), 3, "{archives:?}");
    let units = fs::read_dir(next.path("target/debug/.fingerprint")).unwrap();
    let beta = units.filter(|unit| {
        let name = unit.as_ref().unwrap().file_name();
        name.to_string_lossy().starts_with("beta-")
    });
    assert_eq!(beta.count(), 1);
    assert_eq!(next.build().0, ALL);
}

#[test]
fn another_compiler_gets_the_crates_and_nothing_that_was_compiled() {
    let repository = Repository::new();
    repository.job().run();
    repository.registry.asked();
    let mut other = repository.job();
    let rustc = other.job.path("rustc");
    fs::write(
        &rustc,
        "#!/bin/sh\nrustc \"$@\" || exit\n[ \"$1\" != -vV ] || echo 'another: compiler'\n",
    )
    .unwrap();
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&rustc, fs::Permissions::from_mode(0o755)).unwrap();
    other.job.set("RUSTC", rustc.display().to_string());
    let setup = other.set_up();
    assert!(
        setup.stdout.contains("0 compiled units and 3 crates"),
        "{}",
        setup.stdout
    );
    assert!(!other.path("target").exists());
    let (fresh, compiled) = other.build();
    assert_eq!((fresh.len(), compiled.len()), (0, 5));
    assert_eq!(other.said(), SAID);
    assert_eq!(repository.registry.asked(), [] as [&str; 0]);
    other.report();
    // And neither takes the other's place.
    assert_eq!(repository.job().run().0, ALL);
}

#[test]
fn what_was_damaged_or_lost_is_made_anew_and_the_build_is_green() {
    for fault in [
        Fault::FlipBytes { offset: 30_000 },
        Fault::LoseBlobs,
        Fault::TruncateDownloads,
    ] {
        let repository = Repository::new();
        repository.job().run();
        let second = repository.job();
        repository.upstream.set_fault(Some(fault));
        let setup = second.job.setup().green();
        repository.upstream.set_fault(None);
        second.build();
        assert_eq!(second.said(), SAID, "{fault:?}");
        let report = second.report();
        let warnings = setup.warnings().len() + report.warnings().len();
        assert!(
            warnings <= 1,
            "{fault:?}: {}{}",
            setup.stdout,
            report.stdout
        );
        // Nothing of it stays.
        assert_eq!(repository.job().run().0, ALL, "{fault:?}");
    }
}

#[test]
fn a_token_that_may_only_read_gets_what_there_is_and_writes_nothing() {
    let repository = Repository::new();
    repository.job().run();
    publish_beta(&repository.registry, "1.0.1");
    let mut reader = repository.job();
    let token = repository.upstream.token_for(None, &["refs/heads/main"]);
    reader.job.set("ACTIONS_RUNTIME_TOKEN", token);
    reader.lock();
    let before = repository.upstream.counts();
    assert_eq!(reader.run().0, ["alpha", "gamma"]);
    assert_eq!(reader.said(), "member beta 1.0.1 alpha 1.0.0 gamma");
    let asked = repository.upstream.counts().since(&before);
    assert_eq!(asked.reservations, 0);
}

#[test]
fn a_restore_that_is_killed_leaves_nothing_that_looks_fresh_and_is_not() {
    let repository = Repository::new();
    repository.job().run();
    for units in 1..5 {
        let killed = repository.job();
        let mut setup = Command::new(binary())
            .arg("setup")
            .env_clear()
            .envs(killed.job.main_environment().iter())
            .current_dir(killed.path(""))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // At whatever moment: when so many units are there, or the next one is.
        let restored = || {
            let units = fs::read_dir(killed.path("target/debug/.fingerprint"));
            units.map_or(0, Iterator::count)
        };
        while restored() < units && setup.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        for pid in killed.job.relays() {
            kill(pid);
        }
        setup.kill().unwrap();
        setup.wait().unwrap();
        let mut plain = Command::new("cargo");
        let plain = plain
            .args(["build", "--locked"])
            .env_clear()
            .envs(killed.job.later_environment().iter())
            .current_dir(killed.path(""));
        let built = plain.output().unwrap();
        assert!(
            built.status.success(),
            "{}",
            String::from_utf8_lossy(&built.stderr)
        );
        assert_eq!(killed.said(), SAID);
    }
}

#[test]
fn what_is_on_a_runner_already_is_left_as_it_is() {
    let repository = Repository::new();
    repository.job().run();
    let mut runner = repository.job();
    // As a job without the action left it.
    runner.job.set("CARGO_INCREMENTAL", "0");
    runner.build();
    let state = |folder: &Path| {
        let mut files = all_files(folder);
        files.sort();
        let state = files.into_iter().map(|file| {
            let modified = fs::metadata(&file).unwrap().modified().unwrap();
            (file, modified)
        });
        state.collect::<Vec<_>>()
    };
    let folders = ["workspace/target", "cargo-home/registry"].map(|name| runner.job.path(name));
    let before: Vec<_> = folders.iter().map(|folder| state(folder)).collect();
    runner.set_up();
    let after: Vec<_> = folders.iter().map(|folder| state(folder)).collect();
    assert_eq!(before, after);
    assert_eq!(runner.build().0.len(), 5);
    runner.report();
}

#[test]
fn a_job_that_compiles_nothing_takes_nothing_from_the_next() {
    let repository = Repository::new();
    repository.job().run();
    let idle = repository.job();
    idle.set_up();
    fs::remove_dir_all(idle.path("target")).unwrap();
    idle.report();
    assert_eq!(repository.job().run().0, ALL);
}

#[test]
fn a_git_dependency_is_kept_with_its_checkout() {
    let repository = Repository::new();
    let source = repository.folder.path().join("delta");
    fs::create_dir_all(source.join("src")).unwrap();
    fs::write(
        source.join("Cargo.toml"),
        manifest("delta", "0.1.0", "", ""),
    )
    .unwrap();
    fs::write(
        source.join("build.rs"),
        "fn main() { println!(\"cargo:rerun-if-changed=src\"); }",
    )
    .unwrap();
    fs::write(
        source.join("src/lib.rs"),
        "pub const TEXT: &str = \"delta\";",
    )
    .unwrap();
    for arguments in [
        &["init", "--quiet", "--initial-branch=main"][..],
        &["add", "."],
        &[
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b.example",
            "commit",
            "--quiet",
            "-m",
            "a",
        ],
    ] {
        let status = Command::new("git")
            .args(arguments)
            .current_dir(&source)
            .status();
        assert!(status.unwrap().success());
    }
    let dependency = format!("delta = {{ git = \"file://{}\" }}\n", source.display());
    let run = || {
        let job = repository.job();
        job.write("member/Cargo.toml", &format!("{MEMBER}{dependency}"));
        job.write(
            "member/src/lib.rs",
            &LIBRARY.replace("gamma::macro_!()", "delta::TEXT"),
        );
        if !fs::read_to_string(repository.lockfile())
            .unwrap()
            .contains("delta")
        {
            job.lock();
        }
        let fresh = job.run().0;
        assert_eq!(job.said(), SAID.replace("gamma", "delta"));
        fresh
    };
    assert_eq!(run(), [] as [&str; 0]);
    // Were the repository asked, it would not be found.
    fs::rename(&source, source.with_extension("gone")).unwrap();
    assert_eq!(run(), ["alpha", "beta", "delta", "gamma"]);
}

#[test]
fn cargo_goes_through_sccache_alone_where_its_cache_is_switched_off() {
    let repository = Repository::new();
    for expected in ["0 hits, ", "0 misses, "] {
        let mut job = repository.job();
        job.job.set("INPUT_CACHE-CARGO", "false");
        job.set_up();
        let (fresh, _) = job.build();
        assert_eq!(fresh, [] as [&str; 0]);
        let report = job.report();
        assert!(report.stdout.contains(expected), "{}", report.stdout);
        assert!(!report.stdout.contains("Cargo cache"), "{}", report.stdout);
    }
}

#[test]
fn dependencies_in_a_layout_that_is_not_known_go_through_sccache_with_one_notice() {
    let repository = Repository::new();
    for is_warm in [false, true] {
        let mut job = repository.job();
        // Cargo's own layout since 1.100, which 1.95 has behind a switch.
        job.job.set("RUSTC_BOOTSTRAP", "1");
        job.job.set("CARGO_UNSTABLE_BUILD_DIR_NEW_LAYOUT", "true");
        job.set_up();
        let (_, compiled) = job.build();
        assert!(compiled.iter().any(|name| name == "beta"), "{compiled:?}");
        assert_eq!(job.said(), SAID);
        let report = job.report();
        assert!(report.warnings().is_empty(), "{}", report.stdout);
        let notices = report.stdout.matches("does not know the layout").count();
        assert_eq!(notices, 1, "{}", report.stdout);
        // The libraries alpha, beta and member: sccache has no key for what is linked.
        let counts = match is_warm {
            true => "(3 hits, 0 misses, ",
            false => "(0 hits, 3 misses, ",
        };
        assert!(report.stdout.contains(counts), "{}", report.stdout);
    }
}
