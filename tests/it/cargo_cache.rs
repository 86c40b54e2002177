//! Whole jobs with cargo: what the dependencies of one job were compiled to, the next one finds
//! fresh; with the real cargo and the real sccache, against a registry on this machine.

mod places;
mod stale;

use crate::support::tools;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use crate::support::registry::Registry;
use crate::support::runner::{Job, Step, all_files, binary, kill};
use crate::support::upstream::{Fault, Options, Upstream};
use sccache_action::cargo_cache::leftovers;
use tempfile::TempDir;

/// A cargo, and its layout of the build directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cargo {
    /// This machine's, in the layout up to cargo 1.99.
    OlderLayout,
    /// This machine's, in the layout since 1.100, which 1.95 has behind a switch.
    NewerLayout,
    /// Cargo 1.100, with its rustc.
    Newer,
}

/// All of them.
const CARGOS: [Cargo; 3] = [Cargo::OlderLayout, Cargo::NewerLayout, Cargo::Newer];

/// A repository with its registry and its cache, whose jobs run all in the same place unless they are
/// moved.
struct Repository {
    registry: Registry,
    upstream: Upstream,
    folder: TempDir,
    cargo: Cargo,
}

/// Runs a test with each cargo.
fn with_each_cargo(test: impl Fn(&Repository)) {
    for cargo in CARGOS {
        println!("{cargo:?}");
        test(&Repository::new(cargo));
    }
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
    fn new(cargo: Cargo) -> Self {
        let registry = Registry::start();
        // A build script that depends on a folder, and one that generates sources.
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
            cargo,
        }
    }

    /// A job on an empty runner, with the sources that it was given.
    fn job(&self) -> Checkout<'_> {
        self.job_in("job")
    }

    /// One whose folders, but for cargo's home, are elsewhere.
    fn job_in(&self, place: &str) -> Checkout<'_> {
        let place = self.folder.path().join(place);
        for folder in [&place, &self.home()] {
            if folder.exists() {
                fs::remove_dir_all(folder).unwrap();
            }
        }
        let mut job = Job::in_folder(place);
        job.use_sccache(&tools::sccache("0.16.0"));
        job.use_service(&self.upstream.url, &self.upstream.token);
        job.set("GITHUB_WORKFLOW", "CI");
        job.set("GITHUB_JOB", "build");
        job.set("CARGO_HOME", self.home().display().to_string());
        match self.cargo {
            Cargo::OlderLayout => {}
            Cargo::NewerLayout => {
                job.set("RUSTC_BOOTSTRAP", "1");
                job.set("CARGO_UNSTABLE_BUILD_DIR_NEW_LAYOUT", "true");
            }
            Cargo::Newer => job.set("RUSTUP_TOOLCHAIN", tools::NEWER_RUST),
        }
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

    /// Cargo's home.
    fn home(&self) -> std::path::PathBuf {
        self.folder.path().join("cargo-home")
    }

    /// The path of the lockfile between jobs.
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

    /// Makes the lockfile for the current registry, in its own home.
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
        setup.warns_never();
        setup
    }

    /// Builds, and gives the packages that were fresh and those that were compiled.
    #[track_caller]
    fn build(&self) -> (Vec<String>, Vec<String>) {
        self.build_by(BUILD)
    }

    /// The same by another command.
    #[track_caller]
    fn build_by(&self, command: &str) -> (Vec<String>, Vec<String>) {
        let step = self.job.shell(command).green();
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

    /// The output of the built program.
    #[track_caller]
    fn said(&self) -> String {
        let step = self.job.shell("target/debug/app").green();
        step.stdout.trim().to_owned()
    }

    /// The names of the packages of all units of the debug profile.
    fn units(&self) -> Vec<String> {
        let names = |folder: std::path::PathBuf| {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            names
                .filter(|name| !name.starts_with('.'))
                .collect::<Vec<_>>()
        };
        let older = names(self.path("target/debug/.fingerprint")).into_iter();
        let older = older.filter_map(|name| Some(name.rsplit_once('-')?.0.to_owned()));
        let build = self.path("target/debug/build");
        let newer = names(build.clone()).into_iter().flat_map(|package| {
            let units = names(build.join(&package)).into_iter();
            let units =
                units.filter(|hash| build.join(&package).join(hash).join("fingerprint").is_dir());
            vec![package.clone(); units.count()]
        });
        older.chain(newer).collect()
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
        self.run_by(BUILD)
    }

    /// The same with another command to build.
    #[track_caller]
    fn run_by(&self, command: &str) -> (Vec<String>, Vec<String>) {
        self.set_up();
        let built = self.build_by(command);
        let report = self.report();
        report.warns_never();
        built
    }
}

const ALL: [&str; 3] = ["alpha", "beta", "gamma"];
const OWN: [&str; 2] = ["app", "member"];
const SAID: &str = "member beta 1.0.0 alpha 1.0.0 gamma";

#[test]
fn the_next_job_finds_every_dependency_fresh_downloads_nothing_and_writes_nothing() {
    with_each_cargo(|repository| {
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
    });
}

#[test]
fn dependencies_whose_metadata_lies_beside_the_library_only_are_fresh_too() {
    with_each_cargo(|repository| {
        let job = || {
            let mut job = repository.job();
            job.job.set("RUSTC_BOOTSTRAP", "1");
            // The switch of cargo 1.95, and that of later ones.
            job.job.set("CARGO_UNSTABLE_NO_EMBED_METADATA", "true");
            job.job.set("CARGO_UNSTABLE_EMBED_METADATA", "false");
            job
        };
        let first = job();
        first.set_up();
        let build = first.job.shell(BUILD).green();
        assert!(
            build.stderr.contains("embed-metadata=no"),
            "{}",
            build.stderr
        );
        first.report();
        let second = job();
        assert_eq!(second.run().0, ALL);
        assert_eq!(second.said(), SAID);
    });
}

#[test]
fn another_job_of_the_repository_and_another_branch_have_what_the_first_compiled() {
    with_each_cargo(|repository| {
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
    });
}

#[test]
fn the_workspaces_own_code_is_compiled_whatever_the_times_of_its_sources_say() {
    with_each_cargo(|repository| {
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
    });
}

#[test]
fn a_bumped_dependency_is_all_that_is_compiled_and_sent() {
    with_each_cargo(|repository| {
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
        // The old version goes: the next restore has the version of the lockfile.
        let next = repository.job();
        next.set_up();
        let archives = all_files(&repository.home().join("registry/cache"));
        assert_eq!(archives.len(), 3, "{archives:?}");
        let units = next.units();
        let beta = units.iter().filter(|name| *name == "beta");
        assert_eq!(beta.count(), 1, "{units:?}");
        assert_eq!(next.build().0, ALL);
    });
}

#[test]
fn another_compiler_gets_the_crates_and_nothing_that_was_compiled() {
    let repository = Repository::new(Cargo::OlderLayout);
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
    setup.prints("0 compiled units, 3 crates");
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
fn what_was_damaged_or_lost_is_made_again_and_the_build_is_green() {
    for fault in [
        Fault::FlipBytes { offset: 30_000 },
        Fault::LoseBlobs,
        Fault::TruncateDownloads,
    ] {
        let repository = Repository::new(Cargo::OlderLayout);
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
    let repository = Repository::new(Cargo::OlderLayout);
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

/// Has what the killed restore of this job left removed, as by a restore of hours later.
#[track_caller]
fn remove_what_is_half_made(killed: &Checkout<'_>) {
    let later = SystemTime::now() + Duration::from_secs(2 * 60 * 60);
    let (home, target) = (killed.repository.home(), killed.path("target"));
    let half_made = || {
        let files = [&home, &target]
            .into_iter()
            .filter(|folder| folder.exists());
        let files = files.flat_map(|folder| all_files(folder));
        files.filter(|file| file.to_string_lossy().contains("/.sccache-action-"))
    };
    leftovers::remove(&home, std::slice::from_ref(&target), later);
    assert_eq!(half_made().next(), None);
}

#[test]
fn a_restore_that_would_leave_too_little_free_ends_with_one_warning_and_cargo_does_the_rest() {
    let repository = Repository::new(Cargo::OlderLayout);
    repository.job().run();
    let mut full = repository.job();
    full.job
        .set("SCCACHE_ACTION_FREE_FLOOR", u64::MAX.to_string());
    let setup = full.set_up();
    setup.prints("0 dependencies restored");
    assert_eq!(full.build().0, [] as [&str; 0]);
    assert_eq!(full.said(), SAID);
    let report = full.report();
    let warnings = report.warnings();
    assert_eq!(warnings.len(), 1, "{}", report.stdout);
    assert!(
        warnings[0].contains("cargo does the rest"),
        "{}",
        report.stdout
    );
    // The next one has it all again.
    assert_eq!(repository.job().run().0, ALL);
}

#[test]
fn a_restore_that_is_killed_leaves_nothing_that_looks_fresh_and_is_not() {
    with_each_cargo(|repository| {
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
            // The kill comes at any moment: after a number of units, or with the next one.
            let restored = || killed.units().len();
            while restored() < units && setup.try_wait().unwrap().is_none() {
                std::thread::yield_now();
            }
            for pid in killed.job.relays() {
                kill(pid);
            }
            setup.kill().unwrap();
            setup.wait().unwrap();
            remove_what_is_half_made(&killed);
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
    });
}

#[test]
fn what_is_on_a_runner_already_is_left_as_it_is() {
    with_each_cargo(|repository| {
        repository.job().run();
        let mut runner = repository.job();
        // This is the state after a job without the action.
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
        let folders = [runner.path("target"), repository.home().join("registry")];
        let before: Vec<_> = folders.iter().map(|folder| state(folder)).collect();
        runner.set_up();
        let after: Vec<_> = folders.iter().map(|folder| state(folder)).collect();
        assert_eq!(before, after);
        assert_eq!(runner.build().0.len(), 5);
        runner.report();
    });
}

#[test]
fn a_job_that_compiles_nothing_takes_nothing_from_the_next() {
    let repository = Repository::new(Cargo::OlderLayout);
    repository.job().run();
    let idle = repository.job();
    idle.set_up();
    fs::remove_dir_all(idle.path("target")).unwrap();
    idle.report();
    assert_eq!(repository.job().run().0, ALL);
}

#[test]
fn a_git_dependency_is_kept_with_its_checkout() {
    with_each_cargo(|repository| {
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
    });
}

#[test]
fn cargo_goes_through_sccache_alone_where_its_cache_is_switched_off() {
    let repository = Repository::new(Cargo::OlderLayout);
    for expected in ["0 hits, ", "0 misses, "] {
        let mut job = repository.job();
        job.job.set("INPUT_CACHE-CARGO", "false");
        job.set_up();
        let (fresh, _) = job.build();
        assert_eq!(fresh, [] as [&str; 0]);
        let report = job.report();
        report.prints(expected);
        assert!(!report.stdout.contains("Cargo cache"), "{}", report.stdout);
    }
}

#[test]
fn dependencies_in_a_layout_that_is_not_known_go_through_sccache_with_one_notice() {
    let repository = Repository::new(Cargo::OlderLayout);
    for hits in ["(0 hits, 1 miss,", "(1 hit, 0 misses,"] {
        let job = repository.job();
        job.set_up();
        job.job.shell("cargo fetch --locked --quiet").green();
        // This is the state of a cargo with yet another layout.
        let compile = "out=target/debug/units/alpha/0123456789abcdef/output; mkdir -p $out; \
                       for source in $CARGO_HOME/registry/src/*/alpha-1.0.0/build.rs; do \
                       \"$RUSTC_WRAPPER\" rustc --crate-name alpha --edition=2021 \"$source\" \
                       --crate-type lib --emit=dep-info,metadata,link -C metadata=1 -C extra-filename=-1 \
                       --out-dir \"$PWD/$out\"; done";
        job.job.shell(compile).green();
        assert!(
            job.path("target/debug/units/alpha/0123456789abcdef/output/libalpha-1.rlib")
                .is_file()
        );
        let report = job.report();
        report.warns_never();
        let notices = report.stdout.matches("does not know the layout").count();
        assert_eq!(notices, 1, "{}", report.stdout);
        report.prints(hits);
    }
}
