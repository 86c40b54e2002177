//! Wherever cargo builds, and wherever the checkout lies, the next job has what this one compiled.

use std::fs;
use std::path::PathBuf;

use crate::support::build_places::{BUILD_PLACES, BuildPlace};

use super::{ALL, BUILD, CARGOS, Cargo, Checkout, OWN, Repository, SAID, with_each_cargo};

#[test]
fn wherever_cargo_is_told_to_build_the_next_job_finds_every_dependency_fresh() {
    for cargo in CARGOS {
        for place in BUILD_PLACES {
            let repository = Repository::new(cargo);
            let run = || {
                let mut job = repository.job();
                let config = repository.registry.config();
                job.write(".cargo/config.toml", &format!("{config}{}", place.config));
                if let Some((name, value)) = place.variable {
                    job.job.set(name, value);
                }
                let cargo = |command: &str| {
                    let BuildPlace { before, behind, .. } = place;
                    format!("{before} cargo {command} --locked {behind}")
                };
                let fresh = job.run_by(&cargo("build --verbose")).0;
                let said = job.job.shell(&cargo("run --quiet")).green();
                assert_eq!(said.stdout.trim(), SAID, "{}", place.name);
                fresh
            };
            assert_eq!(run(), [] as [&str; 0], "{}", place.name);
            assert_eq!(run(), ALL, "{cargo:?}: {}", place.name);
        }
    }
}

#[test]
fn workspaces_in_subfolders_are_found_without_an_input() {
    with_each_cargo(|repository| {
        let run = || {
            let job = repository.job();
            for folder in ["one", "deep/two"] {
                fs::create_dir_all(job.path(folder)).unwrap();
                for name in ["Cargo.toml", "Cargo.lock", "src", "member"] {
                    let copied = std::process::Command::new("cp")
                        .arg("-r")
                        .args([job.path(name), job.path(folder)])
                        .status();
                    assert!(copied.unwrap().success());
                }
            }
            for name in ["Cargo.toml", "Cargo.lock"] {
                fs::remove_file(job.path(name)).unwrap();
            }
            job.set_up();
            let built = ["one", "deep/two"].map(|folder| {
                let built = job.build_by(&format!("cd {folder} && {BUILD}"));
                let said = job.job.shell(&format!("{folder}/target/debug/app")).green();
                assert_eq!(said.stdout.trim(), SAID);
                built.0
            });
            let report = job.report();
            report.warns_never();
            built
        };
        assert_eq!(run(), [[] as [&str; 0]; 2]);
        assert_eq!(run(), [ALL; 2]);
    });
}

#[test]
fn without_a_lockfile_the_next_job_has_what_the_last_one_used() {
    with_each_cargo(|repository| {
        let run = || {
            let job = repository.job();
            fs::remove_file(job.path("Cargo.lock")).unwrap();
            let fresh = job.run_by("cargo build --verbose").0;
            assert_eq!(job.said(), SAID);
            fresh
        };
        assert_eq!(run(), [] as [&str; 0]);
        repository.registry.asked();
        assert_eq!(run(), ALL);
        let asked = repository.registry.asked();
        assert!(!asked.iter().any(|asked| asked.contains('-')), "{asked:?}");
        // And cargo takes the version that was published since then.
        super::publish_beta(&repository.registry, "1.0.1");
        let job = repository.job();
        fs::remove_file(job.path("Cargo.lock")).unwrap();
        let (fresh, compiled) = job.run_by("cargo build --verbose");
        assert_eq!(fresh, ["alpha", "gamma"]);
        assert_eq!(compiled, ["app", "beta", "member"]);
        assert_eq!(job.said(), "member beta 1.0.1 alpha 1.0.0 gamma");
    });
}

/// The program of a plain build of the job's sources at the same place, and the job's own.
fn programs(job: &Checkout<'_>) -> [Vec<u8>; 2] {
    let cached = fs::read(job.path("target/debug/app")).unwrap();
    let aside = |name: &str| job.path(name);
    fs::rename(aside("target"), aside("cached")).unwrap();
    let plain = "unset RUSTC_WRAPPER CARGO_BUILD_RUSTC_WRAPPER; cargo build --locked --quiet";
    job.job.shell(plain).green();
    let plain = fs::read(job.path("target/debug/app")).unwrap();
    fs::remove_dir_all(aside("target")).unwrap();
    fs::rename(aside("cached"), aside("target")).unwrap();
    [cached, plain]
}

#[test]
fn a_job_whose_checkout_lies_elsewhere_has_all_that_holds_no_path_and_builds_the_same_program() {
    with_each_cargo(|repository| {
        // It re-exports code that it includes from its build script, and none of that code contains
        // a path.
        repository.registry.publish(
            "zeta",
            "1.0.0",
            &[],
            &[
                ("Cargo.toml", &super::manifest("zeta", "1.0.0", "", "")),
                (
                    "build.rs",
                    r##"fn main() {
                        println!("cargo:rerun-if-changed=build.rs");
                        let out = std::env::var("OUT_DIR").unwrap();
                        println!("cargo:rustc-link-search=native={out}");
                        let text = "#[doc(hidden)]\npub mod private {\n    // as serde has it\n    pub use crate::inner::*;\n}\n";
                        std::fs::write(format!("{out}/private.rs"), text).unwrap();
                    }"##,
                ),
                (
                    "src/lib.rs",
                    r#"
                    mod inner { pub fn text() -> &'static str { "zeta" } }
                    include!(concat!(env!("OUT_DIR"), "/private.rs"));
                    "#,
                ),
            ],
        );
        // And this one includes code that contains its path.
        repository.registry.publish(
            "eta",
            "1.0.0",
            &[],
            &[
                ("Cargo.toml", &super::manifest("eta", "1.0.0", "", "")),
                (
                    "build.rs",
                    r#"fn main() {
                        println!("cargo:rerun-if-changed=build.rs");
                        let out = std::env::var("OUT_DIR").unwrap();
                        let text = "pub fn place() -> &'static str { file!() }";
                        std::fs::write(format!("{out}/place.rs"), text).unwrap();
                    }"#,
                ),
                (
                    "src/lib.rs",
                    r#"include!(concat!(env!("OUT_DIR"), "/place.rs"));"#,
                ),
            ],
        );
        let job_in = |place: &str| {
            let job = repository.job_in(place);
            let more = "zeta = \"1\"\neta = \"1\"\n";
            job.write("member/Cargo.toml", &format!("{}{more}", super::MEMBER));
            let library = super::LIBRARY.replace(
                "gamma::macro_!()",
                "format!(\"{} {}\", zeta::private::text(), eta::place())",
            );
            job.write("member/src/lib.rs", &library);
            let lockfile = fs::read_to_string(repository.lockfile()).unwrap();
            if !lockfile.contains("zeta") {
                job.lock();
            }
            job
        };
        let first = job_in("one");
        assert_eq!(first.run().0, [] as [&str; 0]);
        let moved = job_in("two");
        let (fresh, compiled) = moved.run();
        assert_eq!(fresh, ["alpha", "beta", "gamma", "zeta"]);
        assert_eq!(compiled, ["app", "eta", "member"]);
        let said = moved.said();
        assert!(
            said.starts_with("member beta 1.0.0 alpha 1.0.0 zeta /"),
            "{said}"
        );
        assert!(said.contains("/two/workspace/target/"), "{said}");
        let [cached, plain] = programs(&moved);
        assert!(
            cached == plain,
            "the program is another one than a plain build's"
        );
        let summary = moved.job.file("GITHUB_STEP_SUMMARY");
        let why = "1 compiled: tied to the path of another checkout";
        assert!(summary.contains(why), "{summary}");
        // A job in the same place as the last one has everything from the second one on.
        assert_eq!(job_in("two").run().0, ["alpha", "beta", "gamma", "zeta"]);
        let stayed = job_in("two");
        assert_eq!(stayed.run().0, ["alpha", "beta", "eta", "gamma", "zeta"]);
        assert_eq!(stayed.said(), said);
    });
}

#[test]
fn nothing_of_a_build_directory_that_no_other_job_has_is_kept_and_sccache_is_asked() {
    let repository = Repository::new(Cargo::OlderLayout);
    let elsewhere = tempfile::tempdir().unwrap();
    for hits in ["0 hits, 3 misses", "3 hits, 0 misses"] {
        let target: PathBuf = elsewhere.path().join("target");
        if target.exists() {
            fs::remove_dir_all(&target).unwrap();
        }
        let job = repository.job();
        let command = format!("CARGO_TARGET_DIR={} {BUILD}", target.display());
        job.set_up();
        assert_eq!(job.build_by(&command).0.len(), 0);
        let report = job.report();
        report.prints(hits);
    }
    // If the job sets it from the beginning, the next one sets the same.
    let run = || {
        let target: PathBuf = elsewhere.path().join("target");
        fs::remove_dir_all(&target).unwrap();
        let mut job = repository.job();
        job.job
            .set("CARGO_TARGET_DIR", target.display().to_string());
        job.run()
    };
    run();
    assert_eq!(
        run(),
        (ALL.map(String::from).into(), OWN.map(String::from).into())
    );
}
