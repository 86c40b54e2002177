//! No restored file replaces a different one: changed code is compiled again.

use std::fs;

use super::{ALL, BUILD, Checkout, LIBRARY, MEMBER, Repository, manifest, with_each_cargo};

/// A crate that says what it was compiled with.
fn publish_epsilon(repository: &Repository) {
    let features = "[features]\nloud = []\n";
    repository.registry.publish(
        "epsilon",
        "1.0.0",
        &[],
        &[
            ("Cargo.toml", &manifest("epsilon", "1.0.0", "", features)),
            (
                "build.rs",
                r#"fn main() {
                    println!("cargo:rerun-if-env-changed=EPSILON");
                    let seen = std::env::var("EPSILON").unwrap_or_default();
                    println!("cargo:rustc-env=SEEN={seen}");
                }"#,
            ),
            (
                "src/lib.rs",
                r#"pub fn text() -> String {
                    let loud = if cfg!(feature = "loud") { "loud" } else { "low" };
                    let other = if cfg!(alternative) { "other" } else { "plain" };
                    let option = option_env!("OPTION").unwrap_or("none");
                    format!("{loud} {other} seen={} option={option}", env!("SEEN"))
                }"#,
            ),
        ],
    );
}

/// A job that depends on it by this line, with this besides in its configuration, and builds so.
fn run(
    repository: &Repository,
    dependency: &str,
    config: &str,
    before: &str,
) -> (Vec<String>, String) {
    let job = with_epsilon(repository, dependency);
    let registry = repository.registry.config();
    job.write(".cargo/config.toml", &format!("{registry}{config}"));
    let fresh = job.run_by(&format!("{before} {BUILD}")).0;
    (fresh, job.said())
}

fn with_epsilon<'a>(repository: &'a Repository, dependency: &str) -> Checkout<'a> {
    let job = repository.job();
    job.write("member/Cargo.toml", &format!("{MEMBER}{dependency}\n"));
    job.write(
        "member/src/lib.rs",
        &LIBRARY.replace("gamma::macro_!()", "epsilon::text()"),
    );
    if !fs::read_to_string(repository.lockfile())
        .unwrap()
        .contains("epsilon")
    {
        job.lock();
    }
    job
}

const PLAIN: &str = "epsilon = \"1\"";
const LOUD: &str = "epsilon = { version = \"1\", features = [\"loud\"] }";

#[test]
fn what_a_dependency_is_compiled_with_decides_whether_it_is_fresh() {
    with_each_cargo(|repository| {
        publish_epsilon(repository);
        let rustflags = "[build]\nrustflags = [\"--cfg=alternative\"]\n";
        let said = |what: &str| format!("member beta 1.0.0 alpha 1.0.0 {what}");
        for (dependency, config, before, expected) in [
            (PLAIN, "", "", "low plain seen= option=none"),
            (LOUD, "", "", "loud plain seen= option=none"),
            (PLAIN, "", "EPSILON=e", "low plain seen=e option=none"),
            (PLAIN, "", "OPTION=o", "low plain seen= option=o"),
            (PLAIN, rustflags, "", "low other seen= option=none"),
            (
                PLAIN,
                "",
                "RUSTFLAGS=--cfg=alternative",
                "low other seen= option=none",
            ),
            (PLAIN, "", "", "low plain seen= option=none"),
        ] {
            let (_, first) = run(repository, dependency, config, before);
            assert_eq!(first, said(expected), "{dependency} {config} {before}");
            let (fresh, second) = run(repository, dependency, config, before);
            assert_eq!(second, said(expected), "{dependency} {config} {before}");
            let all = ["alpha", "beta", "epsilon", "gamma"];
            assert_eq!(fresh, all, "{dependency} {config} {before}");
        }
    });
}

#[test]
fn a_path_dependency_outside_of_the_workspace_is_compiled_with_what_depends_on_it() {
    with_each_cargo(|repository| {
        for text in ["one", "two"] {
            let job = repository.job();
            let outside = job.path("../outside");
            fs::create_dir_all(outside.join("src")).unwrap();
            fs::write(
                outside.join("Cargo.toml"),
                manifest("outside", "0.1.0", "", ""),
            )
            .unwrap();
            let source = format!("pub const TEXT: &str = {text:?};");
            fs::write(outside.join("src/lib.rs"), source).unwrap();
            job.write(
                "member/Cargo.toml",
                &format!("{MEMBER}outside = {{ path = \"../../outside\" }}\n"),
            );
            job.write(
                "member/src/lib.rs",
                &LIBRARY.replace("gamma::macro_!()", "outside::TEXT"),
            );
            job.lock();
            let fresh = job.run().0;
            assert_eq!(job.said(), format!("member beta 1.0.0 alpha 1.0.0 {text}"));
            let expected: &[&str] = if text == "two" { &ALL } else { &[] };
            assert_eq!(fresh, expected);
        }
    });
}

#[test]
fn vendored_sources_go_through_sccache_and_stay_right() {
    with_each_cargo(|repository| {
        for hits in ["(0 hits, 3 misses", "(3 hits, 0 misses"] {
            let job = repository.job();
            let vendor = "cargo vendor --quiet --locked --respect-source-config > /dev/null";
            job.set_up();
            job.job.shell(vendor).green();
            job.write(
                ".cargo/config.toml",
                "[source.crates-io]\nreplace-with = \"vendored\"\n\
                 [source.vendored]\ndirectory = \"vendor\"\n",
            );
            job.build_by("cargo build --locked --offline --verbose");
            assert_eq!(job.said(), super::SAID);
            let report = job.report();
            report.warns_never();
            report.prints(hits);
        }
    });
}

#[test]
fn a_lint_job_and_a_test_job_share_what_both_need() {
    with_each_cargo(|repository| {
        let run = |name: &str, command: &str| {
            let mut job = repository.job();
            job.job.set("GITHUB_JOB", name);
            job.run_by(&format!("cargo {command} --locked --verbose")).0
        };
        run("lint", "check");
        // The proc macro and the build script with what it gave are the same in both.
        let fresh = run("test", "test --no-run");
        assert!(fresh.contains(&"gamma".to_owned()), "{fresh:?}");
        assert_eq!(run("test", "test --no-run"), ALL);
        assert_eq!(run("lint", "check"), ALL);
    });
}

#[test]
fn a_build_that_failed_leaves_its_dependencies_to_the_next_one() {
    with_each_cargo(|repository| {
        let failed = repository.job();
        failed.write("src/main.rs", "fn main() { not rust }");
        failed.set_up();
        let step = failed.job.shell(BUILD);
        assert_ne!(step.status, Some(0));
        let report = failed.report();
        report.warns_never();
        let good = repository.job();
        assert_eq!(good.run().0, ALL);
        assert_eq!(good.said(), super::SAID);
    });
}
