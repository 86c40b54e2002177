//! The wrapper in whole jobs: how it talks to sccache's server, when it bypasses the server, and
//! what it does for calls with wrong keys of sccache.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::c_build::{BUILD, FILES, objects, remove_objects, write_sources};
use crate::support::runner::Job;
use crate::support::tools;

/// A job on this machine's disk.
fn job(version: &str) -> Job {
    let mut job = Job::with_sccache(&tools::sccache(version));
    job.set("INPUT_MODE", "local");
    write_sources(&job);
    job
}

/// A command line's words.
fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

#[test]
fn the_server_of_each_version_is_spoken_to_without_its_client() {
    for version in tools::SCCACHE_VERSIONS {
        let job = job(version);
        job.setup().green();
        let sccache = job.path("tools-on-path/sccache");
        let away = job.path("tools-on-path/away");
        fs::rename(&sccache, &away).unwrap();
        for _ in 0..2 {
            let build = job.shell(BUILD).green();
            assert_eq!(build.stderr, "", "{version}");
            assert_eq!(objects(&job), FILES, "{version}");
            remove_objects(&job);
        }
        fs::write(job.path("workspace/bad.c"), "int broken( {\n").unwrap();
        let bare = job.step(&words("gcc -c bad.c -o bad.o"));
        let through = job.step(&words("sccache gcc -c bad.c -o bad.o"));
        assert_eq!(through.status, bare.status, "{version}");
        assert_eq!(through.stderr, bare.stderr, "{version}");
        fs::rename(&away, &sccache).unwrap();
        let report = job.report().green();
        assert!(
            report.stdout.contains("6 hits, 6 misses"),
            "{version}: {}",
            report.stdout
        );
        assert!(report.warnings().is_empty(), "{version}: {}", report.stdout);
    }
}

#[test]
fn calls_that_sccache_cannot_do_do_not_switch_the_cache_off() {
    let job = job("0.16.0");
    job.setup().green();
    fs::write(job.path("workspace/s.S"), ".text\n.globl s\ns: ret\n").unwrap();
    for call in [
        "gcc --coverage -c s.S -o s1.o",
        "gcc --coverage -c s.S -o s2.o",
        "gcc --coverage -c s.S -o s3.o",
        "ld -v",
        "as --version",
        "nm --version",
        "true",
        "true",
        "true",
    ] {
        let through = [vec!["sccache"], words(call)].concat();
        job.step(&through).green();
    }
    for _ in 0..2 {
        job.shell(BUILD).green();
    }
    let report = job.report().green();
    report.prints("6 hits, ");
    report.warns_never();
}

#[test]
fn a_server_that_hangs_is_left_and_the_job_does_not_wait_again() {
    let job = job("0.16.0");
    job.setup().green();
    let server = job.server_pid().unwrap().to_string();
    let stopped = Command::new("kill").args(["-STOP", &server]).status();
    assert!(stopped.unwrap().success());
    let begin = Instant::now();
    job.step(&words("sccache gcc -c 1.c -o 1.o")).green();
    assert!(
        begin.elapsed() < Duration::from_secs(30),
        "{:?}",
        begin.elapsed()
    );
    let begin = Instant::now();
    job.shell(BUILD).green();
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(objects(&job), FILES);
    let continued = Command::new("kill").args(["-CONT", &server]).status();
    assert!(continued.unwrap().success());
    let report = job.report().green();
    assert_eq!(report.warnings().len(), 1, "{}", report.stdout);
    let warning = report.warnings()[0].to_owned();
    assert!(
        warning.contains("sccache's server does not answer"),
        "{warning}"
    );
    assert!(warning.contains("not asked again"), "{warning}");
}

#[test]
fn dependency_files_and_coverage_of_one_source_in_two_outputs_are_each_outputs_own() {
    let calls = [
        "gcc -MMD -MP -c g.c -o a/g.o",
        "gcc -MMD -MP -c g.c -o b/g.o",
        "gcc -MD -MT a/h.o -MF a/h.d -c g.c -o a/h.o",
        "gcc -MD -MT b/h.o -MF b/h.d -c g.c -o b/h.o",
        "gcc --coverage -c g.c -o a/c.o",
        "gcc --coverage -c g.c -o b/c.o",
    ];
    for version in ["0.16.0", "0.19.0", "0.10.0"] {
        let job = job(version);
        job.setup().green();
        let workspace = job.path("workspace");
        fs::write(workspace.join("g.h"), "#define G 1\n").unwrap();
        fs::write(
            workspace.join("g.c"),
            "#include \"g.h\"\nint g(void) { return G; }\n",
        )
        .unwrap();
        let outcome = |through: bool| -> Vec<(String, Vec<u8>)> {
            for folder in ["a", "b"] {
                let _ = fs::remove_dir_all(workspace.join(folder));
                fs::create_dir(workspace.join(folder)).unwrap();
            }
            for call in calls {
                let wrapper = if through { vec!["sccache"] } else { Vec::new() };
                job.step(&[wrapper, words(call)].concat()).green();
            }
            let mut files = Vec::new();
            for folder in ["a", "b"] {
                for entry in fs::read_dir(workspace.join(folder)).unwrap() {
                    let path = entry.unwrap().path();
                    let is_object = path.extension().is_some_and(|extension| extension == "o");
                    let mut bytes = fs::read(&path).unwrap();
                    if path
                        .extension()
                        .is_some_and(|extension| extension == "gcno")
                        || is_object
                    {
                        // A stamp in them is of the time.
                        bytes.retain(|byte| byte.is_ascii_graphic());
                        bytes = strings_with(&bytes, b"gcda");
                    }
                    files.push((path.display().to_string(), bytes));
                }
            }
            files.sort();
            files
        };
        let bare = outcome(false);
        for _ in 0..2 {
            assert_eq!(outcome(true), bare, "{version}");
        }
        job.report().green();
    }
}

/// The text before `end` in these bytes, up to 40 of them.
fn strings_with(bytes: &[u8], end: &[u8]) -> Vec<u8> {
    let at = bytes.windows(end.len()).position(|window| window == end);
    at.map_or_else(Vec::new, |at| bytes[at.saturating_sub(5)..at].to_vec())
}

#[test]
fn a_precompiled_header_that_changed_is_the_new_one() {
    let header = |value: u32| format!("#pragma once\n#define TEST {value}\n");
    let job = job("0.16.0");
    job.setup().green();
    fs::write(
        job.path("workspace/m.c"),
        "int main(void) { return TEST; }\n",
    )
    .unwrap();
    for value in [3, 4] {
        fs::write(job.path("workspace/inner.h"), header(value)).unwrap();
        fs::write(job.path("workspace/pre.h"), "#include \"inner.h\"\n").unwrap();
        job.shell(
            "sccache gcc -x c-header -c pre.h -o pre.h.gch\n\
             sccache gcc -Winvalid-pch -include pre.h -c m.c -o m.o\n\
             gcc m.o -o m",
        )
        .green();
        assert_eq!(job.step(&["./m"]).status, Some(value as i32));
    }
    job.report().green();
}
