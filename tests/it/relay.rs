//! Whole jobs in mode `packed`, with the real sccache and real compilers against an upstream that
//! is far away, refuses, lies, or is gone; and with the relay and sccache killed in turn.

use crate::support::tools;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::c_build::{
    BUILD, FILES, object, objects, remove_objects, write_source, write_sources,
};
use crate::support::runner::{Job, Step, all_files, binary, kill};
use crate::support::upstream::{Fault, Options, Upstream};
use axum::body::Bytes;
use axum::http::StatusCode;
use sccache_action::cache_client::{CacheClient, Endpoint, Reservation};
use sccache_action::clock::Timestamp;
use sccache_action::http::{self, Timeouts};
use sccache_action::install::Platform;
use sccache_action::packs::chain::{ChainState, EntryKeys};
use sccache_action::packs::index::Index;
use sccache_action::packs::pack;
use sccache_action::runner::environment::Environment;
use sha2::{Digest, Sha256};

fn job(sccache: &str, upstream: &Upstream) -> Job {
    let mut job = Job::with_sccache(&tools::sccache(sccache));
    join(&mut job, upstream);
    job
}

/// A folder whose jobs run all in the same place, as a runner's do: the keys of the preprocessor
/// cache have the working directory in them.
struct Place<'a>(&'a Path);

impl Place<'_> {
    fn job(&self, sccache: &str, upstream: &Upstream) -> Job {
        let place = self.0.join("job");
        if place.exists() {
            fs::remove_dir_all(&place).unwrap();
        }
        let mut job = Job::in_folder(place);
        job.use_sccache(&tools::sccache(sccache));
        join(&mut job, upstream);
        job
    }
}

fn join(job: &mut Job, upstream: &Upstream) {
    job.use_service(&upstream.url, &upstream.token);
    job.set("GITHUB_WORKFLOW", "CI");
    job.set("GITHUB_JOB", "build");
    job.set("INPUT_WRAP", "c");
    write_sources(job);
}

/// Sets up, builds and reports; all of it must be green.
#[track_caller]
fn run(job: &Job) -> Step {
    let setup = job.setup().green();
    setup.warns_never();
    assert_eq!(job.entries("GITHUB_OUTPUT").get("mode"), Some("packed"));
    job.shell(BUILD).green();
    assert_eq!(objects(job), FILES);
    let report = job.report().green();
    job.server_ends();
    report
}

#[track_caller]
fn assert_says(report: &Step, expected: &str) {
    report.prints(expected);
}

const COLD: &str = "0 hits, 6 misses, 0 errors";
const WARM: &str = "6 hits, 0 misses, 0 errors";

#[test]
fn what_one_job_compiled_the_next_has_from_a_pack_with_every_sccache_that_has_githubs_cache() {
    // With a disk cache in front; without; the first and the last that speak version 1 only.
    for version in [
        "0.19.0", "0.16.0", "0.15.0", "0.14.0", "0.10.0", "0.9.1", "0.5.3", "0.4.0",
    ] {
        let upstream = Upstream::start(Options::default());
        let folder = tempfile::tempdir().unwrap();
        for expected in [COLD, WARM] {
            let before = upstream.counts();
            let job = Place(folder.path()).job(version, &upstream);
            let report = run(&job);
            assert_says(&report, expected);
            assert!(report.warnings().is_empty(), "{version} {}", report.stdout);
            let requests = upstream.counts().since(&before).requests();
            assert!(requests <= 6, "{version} {expected}: {requests} requests");
        }
        // The warm job had nothing to write.
        assert_eq!(upstream.counts().commits, 1, "{version}");
    }
}

#[test]
fn an_upgrade_of_sccache_keeps_the_cache() {
    let upstream = Upstream::start(Options::default());
    assert_says(&run(&job("0.15.0", &upstream)), COLD);
    assert_says(&run(&job("0.16.0", &upstream)), WARM);
}

#[test]
fn the_preprocessor_cache_comes_along() {
    let upstream = Upstream::start(Options::default());
    let folder = tempfile::tempdir().unwrap();
    for expected in [COLD, WARM] {
        let job = Place(folder.path()).job("0.16.0", &upstream);
        let header = job.path("workspace").join("header.h");
        fs::write(&header, "int used(void);\n").unwrap();
        for i in 1..=FILES {
            let source = format!("#include \"header.h\"\nint f{i}(void) {{ return used(); }}\n");
            fs::write(job.path("workspace").join(format!("{i}.c")), source).unwrap();
        }
        // sccache does not cache what it knows of a header that may still be changing.
        let age = std::time::SystemTime::now() - Duration::from_secs(60);
        fs::File::options()
            .write(true)
            .open(&header)
            .unwrap()
            .set_modified(age)
            .unwrap();
        job.setup().green();
        if expected == WARM {
            let entries = all_files(&disk_tier(&job).join("preprocessor"));
            assert!(entries.len() >= FILES, "{entries:?}");
            // A preprocessor that is not asked cannot fail.
            let compiler = "echo 'int f1(void) { return 1; }' > unused.c";
            job.shell(compiler).green();
        }
        job.shell(BUILD).green();
        assert_says(&job.report().green(), expected);
    }
}

fn disk_tier(job: &Job) -> std::path::PathBuf {
    job.entries("GITHUB_ENV").path("SCCACHE_DIR").unwrap()
}

#[test]
fn jobs_that_run_at_the_same_time_and_a_pull_request_end_with_the_union() {
    let upstream = Upstream::start(Options {
        api_latency: Duration::from_millis(20),
        ..Options::default()
    });
    let on_main = |name: &str, value: &str| {
        let mut job = job("0.16.0", &upstream);
        job.set("GITHUB_JOB", name);
        write_source(&job, 1, value);
        job
    };
    let (one, two) = (on_main("one", "101"), on_main("two", "102"));
    std::thread::scope(|scope| {
        for job in [&one, &two] {
            scope.spawn(|| {
                job.setup().green();
                job.shell(BUILD).green();
            });
        }
    });
    // Both write at the same moment.
    std::thread::scope(|scope| {
        for job in [&one, &two] {
            scope.spawn(|| assert_says(&job.report().green(), COLD));
        }
    });
    let pull_request = |value: &str| {
        let mut job = job("0.16.0", &upstream);
        let token = upstream.token_for(Some("refs/pull/1/merge"), &["refs/heads/main"]);
        job.set("ACTIONS_RUNTIME_TOKEN", token);
        write_source(&job, 1, value);
        job
    };
    assert_says(&run(&pull_request("103")), "5 hits, 1 miss, 0 errors");
    // The third run there has what each of the three compiled alone.
    for value in ["101", "102", "103"] {
        assert_says(&run(&pull_request(value)), WARM);
    }
    // The results of a pull request are invisible outside of it.
    assert_says(&run(&on_main("one", "103")), "5 hits, 1 miss, 0 errors");
    assert_says(&run(&on_main("three", "102")), WARM);
}

#[test]
fn a_github_enterprise_server_is_asked_in_version_1() {
    let upstream = Upstream::start(Options::default());
    for expected in [COLD, WARM] {
        let mut job = job("0.16.0", &upstream);
        job.set("GITHUB_SERVER_URL", "https://github.example");
        job.set("GITHUB_API_URL", "https://github.example/api/v3");
        job.set("ACTIONS_CACHE_URL", &upstream.url);
        let before = upstream.version_1();
        assert_says(&run(&job), expected);
        assert!(upstream.version_1() > before);
    }
}

#[test]
fn a_proxy_that_leads_nowhere_does_not_stand_before_this_machine() {
    let upstream = Upstream::start(Options::default());
    let nobody = sccache_action::sccache::server::free_port().unwrap();
    for expected in [COLD, WARM] {
        let mut job = job("0.16.0", &upstream);
        for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"] {
            job.set(name, format!("http://127.0.0.1:{nobody}"));
        }
        assert_says(&run(&job), expected);
    }
}

#[test]
fn a_container_without_a_home_and_with_folders_of_another_name_has_the_cache_of_others() {
    let upstream = Upstream::start(Options::default());
    for (expected, name) in [(COLD, "runner"), (WARM, "__w")] {
        let folder = tempfile::tempdir().unwrap();
        let mut job = Job::in_folder(folder.path().join(name));
        job.use_sccache(&tools::sccache("0.16.0"));
        join(&mut job, &upstream);
        if name == "__w" {
            // The situation of a container whose user has no entry in its files, and no home.
            job.set("HOME", "/nonexistent");
            job.set("RUNNER_TOOL_CACHE", "/nonexistent/tools");
        }
        assert_says(&run(&job), expected);
    }
}

#[test]
fn jobs_of_a_matrix_share_objects_and_each_knows_its_own_last_run() {
    let upstream = Upstream::start(Options::default());
    let of_matrix = |entry: &str| {
        let mut job = job("0.16.0", &upstream);
        job.set("INPUT_MATRIX", format!("{{\"toolchain\":\"{entry}\"}}"));
        job
    };
    assert_says(&run(&of_matrix("one")), COLD);
    // The other entry uses the first one's objects; it has no last run of its own to show.
    let first = of_matrix("two");
    write_source(&first, 1, "201");
    let report = run(&first);
    assert_says(&report, "5 hits, 1 miss, 0 errors");
    assert!(
        !report.stdout.contains("in the last run"),
        "{}",
        report.stdout
    );
    assert_says(&run(&of_matrix("two")), WARM);
    assert_says(&run(&of_matrix("one")), WARM);
}

#[test]
fn two_uses_in_one_job_share_the_cache_and_report_each_for_itself() {
    let upstream = Upstream::start(Options::default());
    let job = job("0.16.0", &upstream);
    assert_says(&run(&job), COLD);
    // The second use begins from what the first has left in the environment.
    for file in ["GITHUB_STATE", "GITHUB_OUTPUT"] {
        std::fs::write(job.path(file), "").unwrap();
    }
    let setup = job.setup().green();
    setup.warns_never();
    remove_objects(&job);
    job.shell(BUILD).green();
    assert_says(&job.report().green(), WARM);
}

/// A job of twelve files, of which this many were never compiled before.
fn job_of_twelve(upstream: &Upstream, run: usize, new: usize) -> Job {
    let mut job = job("0.16.0", upstream);
    job.set("INPUT_MIN-HIT-RATE", "90");
    for i in 1..=12 {
        let value = if i <= new { run * 100 + i } else { i };
        write_source(&job, i, &value.to_string());
    }
    job
}

fn build_and_report(job: &Job) -> Step {
    job.setup().green();
    let build = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sccache gcc -c $i.c -o $i.o; done";
    job.shell(build).green();
    let report = job.report();
    job.server_ends();
    report
}

#[test]
fn a_hit_rate_is_shown_beside_the_last_ones_and_judged_from_the_second_run_on() {
    let upstream = Upstream::start(Options::default());
    // A first run finds an empty cache.
    let job = job_of_twelve(&upstream, 1, 0);
    let report = build_and_report(&job).green();
    report.warns_never();
    assert!(!job.file("GITHUB_STEP_SUMMARY").contains("last run"));
    let before = upstream.counts();
    let job = job_of_twelve(&upstream, 2, 6);
    let report = build_and_report(&job).green();
    assert_eq!(report.warnings().len(), 1, "{}", report.stdout);
    let low = "Only 50.0 %25 of 12 compiles came from the cache; `min-hit-rate` asks for 90 %25.";
    assert_says(&report, low);
    let after = |job: &Job, rate: &str| {
        let summary = job.file("GITHUB_STEP_SUMMARY");
        let expected = format!("after {rate} of 12 compiles in the last run of this job");
        assert!(summary.contains(&expected), "{summary}");
    };
    after(&job, "0 %");
    // The numbers of a run are saved with its packs.
    let requests = upstream.counts().since(&before).requests();
    assert!(requests <= 6, "{requests} requests");
    let mut job = job_of_twelve(&upstream, 3, 3);
    job.set("INPUT_ON-FAILURE", "fail");
    let report = build_and_report(&job);
    assert_eq!(report.status, Some(1), "{}", report.stdout);
    assert_eq!((report.errors().len(), report.warnings().len()), (1, 0));
    after(&job, "50.0 %");
    let mut job = job_of_twelve(&upstream, 4, 1);
    let token = upstream.token_for(Some("refs/pull/1/merge"), &["refs/heads/main"]);
    job.set("ACTIONS_RUNTIME_TOKEN", token);
    let report = build_and_report(&job).green();
    report.warns_never();
    after(&job, "75.0 %");
    // The runs of the base come before those of the pull request.
    let summary = job.file("GITHUB_STEP_SUMMARY");
    let line = "    line [0.0, 50.0, 75.0, 91.7]\n";
    assert!(summary.contains(line), "{summary}");
    // Another job has no earlier run, whatever is in the packs.
    let mut job = job_of_twelve(&upstream, 5, 12);
    job.set("GITHUB_JOB", "another");
    let report = build_and_report(&job).green();
    report.warns_never();
    assert!(!job.file("GITHUB_STEP_SUMMARY").contains("last run"));
}

#[test]
fn namespaces_do_not_see_each_other() {
    let upstream = Upstream::start(Options::default());
    for (namespace, expected) in [("a", COLD), ("b", COLD), ("a", WARM)] {
        let mut job = job("0.16.0", &upstream);
        job.set("INPUT_NAMESPACE", namespace);
        assert_says(&run(&job), expected);
    }
}

/// Waits until `done` holds.
#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_relay_that_is_killed_costs_at_most_what_it_had_not_saved_and_one_warning() {
    for (version, expected) in [
        // The objects on its disk are saved all the same.
        ("0.16.0", WARM),
        ("0.14.0", "3 hits, 3 misses, 0 errors"),
    ] {
        let upstream = Upstream::start(Options::default());
        let mut killed = job(version, &upstream);
        killed.set("SCCACHE_ACTION_FLUSH_SECONDS", "0");
        killed.setup().green();
        killed
            .shell("for i in 1 2 3; do sccache gcc -c $i.c -o $i.o; done")
            .green();
        wait_until("three objects are saved", || {
            upstream.counts().commits > 0 && saved_objects(&upstream) >= 3
        });
        kill(killed.relay_pid().unwrap());
        killed.shell(BUILD).green();
        assert_eq!(objects(&killed), FILES);
        let report = killed.report().green();
        report.warns_once("relay");
        assert_says(&run(&job(version, &upstream)), expected);
    }
}

/// How many objects a job that begins now would find.
fn saved_objects(upstream: &Upstream) -> usize {
    let job = job("0.16.0", upstream);
    job.setup().green();
    let objects = all_files(&disk_tier(&job)).len();
    job.report().green();
    // The probe's object is not one of the build's.
    objects.saturating_sub(1)
}

#[test]
fn a_server_of_sccaches_that_is_killed_costs_nothing() {
    let upstream = Upstream::start(Options::default());
    let job = job("0.16.0", &upstream);
    job.setup().green();
    job.shell("sccache gcc -c 1.c -o 1.o").green();
    kill(job.server_pid().unwrap());
    job.shell(BUILD).green();
    job.report().green();
    job.server_ends();
    assert_says(&run(&self::job("0.16.0", &upstream)), WARM);
}

#[test]
fn githubs_cache_switched_on_for_all_steps_is_in_nobodys_way() {
    for by_the_workflow in [false, true] {
        let upstream = Upstream::start(Options::default());
        let mut job = job("0.16.0", &upstream);
        if by_the_workflow {
            job.set("SCCACHE_GHA_ENABLED", "true");
        }
        job.setup().green();
        let later = job.later_environment();
        assert_eq!(later.get("SCCACHE_GHA_ENABLED"), Some("true"));
        // A step that calls the real sccache by its path has the action's server answer.
        let sccache = job.entries("GITHUB_OUTPUT").path("path").unwrap();
        let sccache = sccache.display();
        job.shell(&format!(
            "{sccache} gcc -c 1.c -o 1.o; {sccache} --show-stats"
        ))
        .green();
        // A server that sccache starts in place of one that was killed.
        kill(job.server_pid().unwrap());
        let build = job.shell(BUILD).green();
        assert_eq!((objects(&job), &*build.stderr), (FILES, ""));
        // And one that a step starts.
        kill(job.server_pid().unwrap());
        job.shell("sccache --start-server").green();
        job.shell(BUILD).green();
        let report = job.report().green();
        assert!(!report.stdout.contains("ran without"), "{}", report.stdout);
        job.server_ends();
        assert_says(&run(&self::job("0.16.0", &upstream)), WARM);
    }
}

#[test]
fn the_real_sccache_called_by_its_path_starts_a_server_where_nothing_is_left_to_do_so() {
    for version in ["0.19.0", "0.15.0"] {
        for by_the_workflow in [false, true] {
            let upstream = Upstream::start(Options::default());
            let mut job = job(version, &upstream);
            if by_the_workflow {
                job.set("SCCACHE_GHA_ENABLED", "true");
            }
            job.setup().green();
            // The relay first, which would start the server again.
            kill(job.relay_pid().unwrap());
            if let Some(server) = job.server_pid() {
                kill(server);
            }
            let sccache = job.entries("GITHUB_OUTPUT").path("path").unwrap();
            let sccache = sccache.display();
            let calls = format!("{sccache} gcc -c 1.c -o 1.o; {sccache} --show-stats");
            let step = job.shell(&calls).green();
            step.prints("Local disk");
            let build = job.shell(BUILD).green();
            assert_eq!((objects(&job), &*build.stderr), (FILES, ""));
            job.report().green();
            job.server_ends();
            // The objects that this server stored are in the packs all the same.
            assert_says(&run(&self::job(version, &upstream)), WARM);
        }
    }
}

#[test]
fn whatever_the_upstream_does_the_build_is_green_and_the_objects_are_right() {
    let retry = Some(1);
    for (name, fault) in [
        ("429", Fault::Status(StatusCode::TOO_MANY_REQUESTS, retry)),
        (
            "500",
            Fault::Status(StatusCode::INTERNAL_SERVER_ERROR, None),
        ),
        ("truncated", Fault::TruncateDownloads),
        ("flipped in the header", Fault::FlipBytes { offset: 20 }),
        ("flipped in the index", Fault::FlipBytes { offset: 200 }),
        ("lost", Fault::LoseBlobs),
    ] {
        let upstream = Upstream::start(Options::default());
        let first = job("0.16.0", &upstream);
        assert_says(&run(&first), COLD);
        let right: Vec<Vec<u8>> = (1..=FILES).map(|i| object(&first, i)).collect();
        upstream.set_fault(Some(fault));
        let second = job("0.16.0", &upstream);
        let setup = second.setup().green();
        second.shell(BUILD).green();
        for (i, right) in (1..=FILES).zip(&right) {
            assert!(object(&second, i) == *right, "{name}: {i}.o");
        }
        // The post step must not be waited out for a fault that does not pass.
        upstream.set_fault(None);
        let report = second.report().green();
        let warnings = setup.warnings().len() + report.warnings().len();
        assert!(warnings <= 1, "{name}: {}{}", setup.stdout, report.stdout);
        assert_says(&report, "0 errors");
        // And nothing of the fault stays.
        assert_says(&run(&job("0.16.0", &upstream)), WARM);
    }
}

#[test]
fn a_flipped_bit_in_an_object_is_noticed_and_the_object_compiled_anew() {
    let upstream = Upstream::start(Options::default());
    // Objects that are not put on sccache's disk: they come from the relay when asked for.
    for (fault, expected) in [
        (None, COLD),
        (Some(Fault::FlipBytes { offset: 2_000 }), "5 hits, 1 miss"),
    ] {
        let job = job("0.10.0", &upstream);
        upstream.set_fault(fault);
        job.setup().green();
        job.shell(BUILD).green();
        let report = job.report().green();
        assert_says(&report, expected);
        assert_eq!(report.warnings().len(), usize::from(fault.is_some()));
    }
}

#[test]
fn an_upstream_that_hangs_costs_seconds_and_one_warning() {
    let upstream = Upstream::start(Options::default());
    assert_says(&run(&job("0.16.0", &upstream)), COLD);
    upstream.set_fault(Some(Fault::Hang));
    let job = job("0.16.0", &upstream);
    let begin = Instant::now();
    let setup = job.setup().green();
    job.shell(BUILD).green();
    assert!(
        begin.elapsed() < Duration::from_secs(60),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(objects(&job), FILES);
    upstream.set_fault(None);
    let report = job.report().green();
    assert!(
        setup.warnings().len() + report.warnings().len() <= 1,
        "{}",
        report.stdout
    );
}

#[test]
fn an_upstream_that_is_gone_costs_one_warning() {
    let mut upstream = Upstream::start(Options::default());
    upstream.kill();
    let job = job("0.16.0", &upstream);
    let setup = job.setup().green();
    job.shell(BUILD).green();
    assert_eq!(objects(&job), FILES);
    let begin = Instant::now();
    let report = job.report().green();
    assert_eq!(setup.warnings().len() + report.warnings().len(), 1);
    assert!(
        begin.elapsed() < Duration::from_secs(30),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn a_refusal_that_passes_loses_nothing() {
    let upstream = Upstream::start(Options::default());
    let job = job("0.16.0", &upstream);
    job.setup().green();
    job.shell(BUILD).green();
    let refusal = Fault::RefuseWrites(StatusCode::TOO_MANY_REQUESTS, Some(2));
    upstream.set_fault(Some(refusal));
    let report = std::thread::scope(|scope| {
        let report = scope.spawn(|| job.report().green());
        wait_until("a write is refused", || upstream.counts().reservations > 0);
        upstream.set_fault(None);
        report.join().unwrap()
    });
    report.warns_never();
    assert_says(&report, "Rate-limited, then retried: 1");
    assert_says(&run(&self::job("0.16.0", &upstream)), WARM);
}

#[test]
fn a_token_that_may_only_read_is_respected_and_no_trouble() {
    let upstream = Upstream::start(Options::default());
    assert_says(&run(&job("0.16.0", &upstream)), COLD);
    let before = upstream.counts();
    let mut known = job("0.16.0", &upstream);
    let token = upstream.token_for(None, &["refs/heads/main"]);
    known.set("ACTIONS_RUNTIME_TOKEN", token);
    write_source(&known, 1, "7");
    let setup = known.setup().green();
    setup.prints("is read-only");
    known.shell(BUILD).green();
    let report = known.report().green();
    assert_says(&report, "5 hits, 1 miss, 0 errors");
    report.warns_never();
    // Or it becomes known at a write.
    upstream.set_fault(Some(Fault::DenyWrites));
    let unknown = job("0.16.0", &upstream);
    write_source(&unknown, 1, "8");
    let report = run(&unknown);
    report.warns_never();
    assert_says(&report, "nothing: the cache is read-only");
    assert_eq!(upstream.counts().since(&before).commits, 0);
}

#[test]
fn a_job_that_may_not_use_the_cache_asks_it_nothing_and_keeps_its_objects_on_the_disk() {
    let upstream = Upstream::start(Options::default());
    for mode in ["packed", "direct"] {
        let mut job = job("0.19.0", &upstream);
        job.set("ACTIONS_CACHE_MODE", "none");
        job.set("INPUT_MODE", mode);
        let setup = job.setup().green();
        setup.warns_never();
        let notices = setup.stdout.matches("::notice").count();
        assert_eq!(notices, 1, "{}", setup.stdout);
        assert_eq!(job.entries("GITHUB_OUTPUT").get("mode"), Some("local"));
        job.shell(BUILD).green();
        let report = job.report().green();
        report.warns_never();
        assert_says(&report, COLD);
    }
    assert_eq!(upstream.counts().requests(), 0);
    let mut strict = job("0.19.0", &upstream);
    strict.set("ACTIONS_CACHE_MODE", "none");
    strict.set("INPUT_ON-FAILURE", "fail");
    let setup = strict.setup();
    assert_eq!(setup.status, Some(1), "{}", setup.stdout);
}

#[test]
fn a_job_that_may_not_use_the_cache_leaves_it_out_of_its_own_chain_with_one_notice() {
    let upstream = Upstream::start(Options::default());
    for (mode, chain, words) in [
        ("", "disk,gha", "`gha` is removed"),
        ("external", "disk,gha", "`gha` is removed"),
        ("", "gha", "kept on this machine's disk only"),
    ] {
        let mut job = job("0.19.0", &upstream);
        job.set("ACTIONS_CACHE_MODE", "none");
        job.set("INPUT_MODE", mode);
        job.set("SCCACHE_MULTILEVEL_CHAIN", chain);
        let setup = job.setup().green();
        setup.warns_never();
        let notices = setup.stdout.matches("::notice").count();
        assert_eq!(notices, 1, "{}", setup.stdout);
        setup.prints(words);
        job.shell(BUILD).green();
        remove_objects(&job);
        job.shell(BUILD).green();
        let report = job.report().green();
        report.warns_never();
        assert_says(&report, "6 hits, 6 misses, 0 errors");
        job.server_ends();
    }
    assert_eq!(upstream.counts().requests(), 0);
}

#[test]
fn a_job_that_may_only_write_takes_nothing_and_hides_nothing_of_what_others_stored() {
    let upstream = Upstream::start(Options::default());
    assert_says(&run(&job("0.19.0", &upstream)), COLD);
    let before = upstream.counts();
    let mut write_only = job("0.19.0", &upstream);
    write_only.set("ACTIONS_CACHE_MODE", "write-only");
    write_source(&write_only, 1, "7");
    let report = run(&write_only);
    assert_says(&report, COLD);
    report.warns_never();
    let asked = upstream.counts().since(&before);
    assert_eq!((asked.lookups, asked.downloads), (0, 0));
    assert_eq!(asked.commits, 1);
    // The next job has its objects, and those that were there before it.
    for number in ["7", "1"] {
        let next = job("0.19.0", &upstream);
        write_source(&next, 1, number);
        assert_says(&run(&next), WARM);
    }
    // An entry stored after it is in the row again, and has its content.
    let later = job("0.19.0", &upstream);
    write_source(&later, 1, "8");
    assert_says(&run(&later), "5 hits, 1 miss, 0 errors");
    let last = job("0.19.0", &upstream);
    write_source(&last, 1, "7");
    assert_says(&run(&last), WARM);
}

#[test]
fn a_job_that_may_only_write_takes_no_object_out_of_the_cache_in_mode_direct() {
    let upstream = Upstream::start(Options::default());
    for mode in ["write", "write-only"] {
        let mut job = job("0.19.0", &upstream);
        job.set("INPUT_MODE", "direct");
        job.set("ACTIONS_CACHE_MODE", mode);
        job.setup().green();
        job.shell(BUILD).green();
        let report = job.report().green();
        report.prints("0 hits");
        job.server_ends();
    }
}

/// A client of the upstream that sees the relays' entries. Content may trickle for `slow`.
fn client(upstream: &Upstream, slow: Duration) -> CacheClient {
    let version = hex::encode(Sha256::digest("sccache-action packs 3"));
    let environment = Environment::from_iter([
        ("ACTIONS_RESULTS_URL", &*upstream.url),
        ("ACTIONS_RUNTIME_TOKEN", &*upstream.token),
        ("GITHUB_SERVER_URL", "https://github.com"),
    ]);
    let endpoint = Endpoint::of(&environment).unwrap();
    let timeouts = Timeouts {
        slow,
        ..Timeouts::default()
    };
    CacheClient::new(endpoint, &version, timeouts).unwrap()
}

/// The chain of the default branch.
fn chain() -> EntryKeys {
    let runner = Platform::current().runner();
    EntryKeys::new("default", &runner, "refs/heads/main")
}

/// Stores an entry of the default branch's chain under this number, as an attacker may who can
/// write to the cache.
fn store_entry(upstream: &Upstream, number: &str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let key = chain().key(0).replace("00000000", number);
    let client = client(upstream, Timeouts::default().slow);
    let content = Bytes::from(pack::encode_head(&Index::default(), None).unwrap().bytes);
    let size = content.len() as u64;
    runtime.block_on(async {
        let Reservation::Granted(upload) = client.reserve(&key, None).await.unwrap() else {
            panic!("{key} is taken");
        };
        let body = futures_util::stream::iter([Ok(content)]);
        client.upload(&upload, size, body).await.unwrap();
        client.commit(upload, size).await.unwrap();
    });
}

#[test]
fn an_index_that_trickles_is_given_up_and_the_next_entry_names_it() {
    let upstream = Upstream::start(Options::default());
    store_entry(&upstream, "00000001");
    let every = Duration::from_millis(50);
    upstream.set_fault(Some(Fault::Trickle { every }));
    let client = client(&upstream, Duration::from_millis(300));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut known = ChainState::new(chain());
        let error = known
            .refresh(&client, Timestamp::now())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("too slow"), "{error}");
        let (key, _) = known.reserve(&client, Timestamp::now()).await.unwrap();
        assert_eq!(key, chain().key(2));
        let named: Vec<String> = known.unmerged().into_keys().collect();
        assert_eq!(named, [chain().key(1)]);
    });
}

#[test]
fn how_old_objects_are_is_told_by_the_services_clock() {
    const WEEK_AND_A_DAY: Duration = Duration::from_secs(8 * 24 * 60 * 60);
    for (later, expected) in [(WEEK_AND_A_DAY, WARM), (Duration::ZERO, COLD)] {
        let upstream = Upstream::start(Options::default());
        upstream.set_clock_behind(WEEK_AND_A_DAY);
        assert_says(&run(&job("0.19.0", &upstream)), COLD);
        // By this machine's clock no time passes.
        upstream.set_clock_behind(later);
        let other = job("0.19.0", &upstream);
        (1..=FILES).for_each(|i| write_source(&other, i, &format!("9{i}")));
        assert_says(&run(&other), COLD);
        assert_says(&run(&job("0.19.0", &upstream)), expected);
    }
}

#[test]
fn a_relay_at_its_end_does_not_wait_for_a_client_that_holds_half_a_request() {
    let upstream = Upstream::start(Options::default());
    let job = job("0.19.0", &upstream);
    job.setup().green();
    let port = job
        .entries("GITHUB_STATE")
        .get("relay-port")
        .unwrap()
        .to_owned();
    let mut half = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    half.write_all(b"GET /_apis/artifactcache/cache HTTP/1.1\r\nhost")
        .unwrap();
    let relays = job.relays();
    assert_eq!(relays.len(), 1);
    job.report().green();
    let begin = Instant::now();
    while !job.relays().is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{relays:?}");
        std::thread::yield_now();
    }
    drop(half);
}

#[test]
fn entries_with_numbers_at_their_end_cost_no_look_ups_and_keep_nobody_from_saving() {
    let upstream = Upstream::start(Options::default());
    assert_says(&run(&job("0.19.0", &upstream)), COLD);
    // All that a number can be; one behind the row's; the row's last; none.
    let numbers = ["18446744073709551615", "99999999", "09999999", "x"];
    for (number, value) in numbers.into_iter().zip(["71", "72", "73", "74"]) {
        store_entry(&upstream, number);
        let before = upstream.counts();
        let next = job("0.19.0", &upstream);
        write_source(&next, 1, value);
        run(&next);
        let asked = upstream.counts().since(&before);
        assert!(asked.lookups < 20, "{number}: {asked:?}");
        assert_eq!(asked.commits, 1, "{number}: {asked:?}");
        let again = job("0.19.0", &upstream);
        write_source(&again, 1, value);
        assert_says(&run(&again), WARM);
    }
}

#[test]
fn a_pack_that_vanished_is_a_plain_miss_and_is_written_anew() {
    let upstream = Upstream::start(Options::default());
    assert_says(&run(&job("0.16.0", &upstream)), COLD);
    let second = job("0.16.0", &upstream);
    write_source(&second, 1, "7");
    assert_says(&run(&second), "5 hits, 1 miss, 0 errors");
    upstream.lose_first_entry();
    let third = job("0.16.0", &upstream);
    write_source(&third, 1, "7");
    third.setup().green();
    third.shell(BUILD).green();
    let report = third.report().green();
    assert_says(&report, "1 hit, 5 misses, 0 errors");
    assert_eq!(report.warnings().len(), 1, "{}", report.stdout);
    let fourth = job("0.16.0", &upstream);
    write_source(&fourth, 1, "7");
    assert_says(&fourth_run(&fourth), WARM);
}

fn fourth_run(job: &Job) -> Step {
    job.setup().green();
    job.shell(BUILD).green();
    job.report().green()
}

#[test]
fn a_full_disk_leaves_the_build_green() {
    build_on_a_small_disk("0", 1 << 20, "head -c 10M /dev/zero", "No space left");
}

#[test]
fn below_a_floor_of_free_space_nothing_more_is_kept_and_the_build_is_green() {
    build_on_a_small_disk("", 50 << 20, "true", "the relay keeps nothing below 1.0 GB");
}

/// A job whose disk has `room` bytes beside the action's binary, with a floor of free bytes
/// (without one, the default), after `fill` has written.
fn build_on_a_small_disk(floor: &str, room: u64, fill: &str, told: &str) {
    let may_mount = Command::new("unshare").args(["--mount", "true"]).status();
    if !may_mount.is_ok_and(|status| status.success()) {
        eprintln!("this user may not mount anything; nothing was tested");
        return;
    }
    let upstream = Upstream::start(Options::default());
    let mut job = job("0.10.0", &upstream);
    job.set("SCCACHE_ACTION_FREE_FLOOR", floor);
    for i in 1..=FILES {
        // Larger than the rest of a page.
        let numbers: Vec<String> = (0..20_000u64)
            .map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (8 + i)).to_string())
            .collect();
        let source = format!("const unsigned long f{i}[] = {{ {} }};", numbers.join(","));
        fs::write(job.path("workspace").join(format!("{i}.c")), source).unwrap();
    }
    // A file system of the job's own. The wrapper, a copy of the action's binary, is there as well.
    let temporary = job.get("RUNNER_TEMP").to_owned();
    let size = fs::metadata(binary()).unwrap().len() + room;
    let script = format!(
        "mount -t tmpfs -o size={size} tmpfs {temporary}\n\
         env INPUT_INSTALL-FROM=path {binary} setup\n\
         {fill} > {temporary}/fill || true\n\
         export SCCACHE_SERVER_PORT=$(sed -n '/^SCCACHE_SERVER_PORT<</{{n;p}}' $GITHUB_ENV)\n\
         export PATH=$(cat $GITHUB_PATH):$PATH\n\
         {BUILD}",
        binary = binary(),
    );
    let command = ["unshare", "--mount", "sh", "-e", "-c", &script];
    let step = job.action_step(false, &command).green();
    assert_eq!(objects(&job), FILES, "{}{}", step.stdout, step.stderr);
    step.prints("mode packed");
    let relay = job.relay_pid().unwrap().to_string();
    let report = ["nsenter", "--mount", "--target", &relay, binary(), "report"];
    let report = job.action_step(true, &report).green();
    report.warns_once(told);
}

/// How many bytes wait in the relay's files to be saved.
fn unsaved_bytes(job: &Job) -> u64 {
    let files = all_files(Path::new(job.get("RUNNER_TEMP")));
    let is_new = |file: &&std::path::PathBuf| {
        let name = file.file_name().unwrap().to_string_lossy();
        name.starts_with("new")
    };
    let files = files.iter().filter(is_new);
    files
        .map(|file| fs::metadata(file).map_or(0, |file| file.len()))
        .sum()
}

#[test]
fn what_is_saved_lies_once_on_the_disk_and_is_fetched_where_sccaches_disk_has_lost_it() {
    let upstream = Upstream::start(Options::default());
    // If no pack has an object yet, sccache is not sent to the relay.
    run(&job("0.16.0", &upstream));
    let commits = upstream.counts().commits;
    let mut job = job("0.16.0", &upstream);
    job.set("SCCACHE_ACTION_FLUSH_SECONDS", "0");
    // 16 MiB that cannot be compressed to less than 8.
    let mut number = 1u64;
    let mut source = "const char text[] =\n".to_owned();
    for _ in 0..(16 << 20) / 64 {
        source.push('"');
        for _ in 0..64 {
            number = number
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            source.push(char::from(b'0' + u8::try_from(number >> 58).unwrap() % 43));
        }
        source.push_str("\"\n");
    }
    source.push_str(";\n");
    source.retain(|character| character != '?');
    fs::write(job.path("workspace/big.c"), source).unwrap();
    job.setup().green();
    job.shell("sccache gcc -c big.c -o 1.o").green();
    wait_until("its bytes are let go", || {
        upstream.counts().commits > commits && unsaved_bytes(&job) < 1 << 20
    });
    let disk_tier = all_files(&disk_tier(&job));
    let large = disk_tier
        .iter()
        .filter(|file| fs::metadata(file).unwrap().len() > 8 << 20);
    let large: Vec<_> = large.collect();
    assert_eq!(large.len(), 1, "{disk_tier:?}");
    fs::remove_file(large[0]).unwrap();
    job.shell("sccache gcc -c big.c -o 2.o").green();
    let [first, second] =
        ["1.o", "2.o"].map(|name| fs::read(job.path("workspace").join(name)).unwrap());
    assert!(first == second);
    let report = job.report().green();
    assert_says(&report, "50.0 % of 2 compiles");
    report.warns_never();
}

#[test]
fn the_upstreams_token_is_nowhere_but_in_the_relay() {
    let upstream = Upstream::start(Options::default());
    let job = job("0.16.0", &upstream);
    let mut printed = String::new();
    let mut add = |step: Step| {
        printed.push_str(&step.stdout);
        printed.push_str(&step.stderr);
    };
    add(job.setup().green());
    add(job.shell(&format!("env; {BUILD}")).green());
    for pid in [job.server_pid().unwrap(), job.relay_pid().unwrap()] {
        for file in ["environ", "cmdline"] {
            let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap();
            assert!(!holds(&bytes, &upstream.token), "{pid} {file}");
        }
    }
    assert_no_file_holds(&job.path(""), &upstream.token);
    let state = job.entries("GITHUB_STATE");
    let relay_token = state.get("relay-token").unwrap().to_owned();
    let server = job.server_pid().unwrap();
    let server = fs::read(format!("/proc/{server}/environ")).unwrap();
    assert!(
        !holds(&server, &relay_token),
        "sccache cannot end the relay"
    );
    add(job.report().green());
    // It removes its folder at its end.
    wait_until("the relay is gone", || !relay_runs_in(&job));
    assert_no_file_holds(&job.path(""), &upstream.token);
    for secret in [upstream.token.as_str(), &relay_token] {
        let mut lines = printed.lines();
        assert!(lines.all(|line| line.starts_with("::add-mask::") || !line.contains(secret)));
    }
    // Nor do packs in the cache have it.
    assert!(!job.file("GITHUB_STEP_SUMMARY").contains(&upstream.token));
}

fn holds(bytes: &[u8], secret: &str) -> bool {
    let secret = secret.as_bytes();
    bytes.windows(secret.len()).any(|part| part == secret)
}

#[track_caller]
fn assert_no_file_holds(folder: &Path, secret: &str) {
    let files = all_files(folder);
    assert!(files.len() > 10);
    for file in files {
        let bytes = fs::read(&file).unwrap();
        assert!(!holds(&bytes, secret), "{}", file.display());
    }
}

#[test]
fn nobody_without_its_tokens_gets_anything_from_the_relay() {
    let upstream = Upstream::start(Options::default());
    let job = job("0.16.0", &upstream);
    job.setup().green();
    let state = job.entries("GITHUB_STATE");
    let url = format!("http://127.0.0.1:{}", state.get("relay-port").unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = http::builder(Duration::from_secs(5));
        let client = client.no_proxy().build().unwrap();
        let paths = [
            "relay/finish",
            "relay/prefill",
            "relay/server",
            "relay/activity",
        ];
        for path in paths {
            for token in ["", "wrong", &upstream.token] {
                let request = match path {
                    "relay/activity" => client.get(format!("{url}/{path}")),
                    _ => client.post(format!("{url}/{path}")).body("{}"),
                };
                let answer = request.bearer_auth(token).send().await.unwrap();
                assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
            }
        }
        let method = "twirp/github.actions.results.api.v1.CacheService/GetCacheEntryDownloadURL";
        let control = state.get("relay-token").unwrap();
        for token in ["wrong", &upstream.token, control] {
            let answer = client
                .post(format!("{url}/{method}"))
                .header("content-type", "application/json")
                .bearer_auth(token)
                .body("{}")
                .send()
                .await
                .unwrap();
            assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
        }
    });
    job.report().green();
}

#[test]
fn a_failed_setup_leaves_no_relay_behind() {
    let upstream = Upstream::start(Options::default());
    let mut job = Job::new();
    join(&mut job, &upstream);
    job.set("PATH", "/nowhere");
    job.set("INPUT_INSTALL-FROM", "path");
    let setup = job.setup().green();
    assert_eq!(setup.warnings().len(), 1, "{}", setup.stdout);
    // The stand-in's is there, and nothing of a relay's.
    let left = all_files(Path::new(job.get("RUNNER_TEMP")));
    let names = left.iter().filter_map(|file| file.file_name()?.to_str());
    let names: BTreeSet<&str> = names.collect();
    assert_eq!(names, BTreeSet::from(["sccache", "sccache-action"]));
    wait_until("the relay is gone", || !relay_runs_in(&job));
}

fn relay_runs_in(job: &Job) -> bool {
    let temporary = job.get("RUNNER_TEMP").as_bytes();
    fs::read_dir("/proc").unwrap().any(|process| {
        let process = process.unwrap().path();
        let command = fs::read(process.join("cmdline")).unwrap_or_default();
        let environment = fs::read(process.join("environ")).unwrap_or_default();
        command.ends_with(b"relay\0")
            && environment
                .split(|byte| *byte == 0)
                .any(|variable| variable.strip_prefix(b"RUNNER_TEMP=") == Some(temporary))
    })
}

#[test]
fn an_sccache_without_githubs_cache_goes_to_the_disk_and_leaves_no_relay() {
    let upstream = Upstream::start(Options::default());
    let job = job("debian", &upstream);
    let setup = job.setup().green();
    assert_eq!(setup.warnings().len(), 1, "{}", setup.stdout);
    assert_eq!(job.entries("GITHUB_OUTPUT").get("mode"), Some("local"));
    wait_until("the relay is gone", || !relay_runs_in(&job));
    job.shell(BUILD).green();
    remove_objects(&job);
    job.shell(BUILD).green();
    assert_says(&job.report().green(), "6 hits, 6 misses");
}

#[test]
fn small_packs_become_one_and_nothing_is_lost_on_the_way() {
    let upstream = Upstream::start(Options::default());
    let folder = tempfile::tempdir().unwrap();
    let values = ["11", "12", "13", "14", "15", "16"];
    for (number, value) in values.iter().enumerate() {
        let job = Place(folder.path()).job("0.16.0", &upstream);
        write_source(&job, 1, value);
        let expected = if number == 0 {
            COLD
        } else {
            "5 hits, 1 miss, 0 errors"
        };
        assert_says(&run(&job), expected);
    }
    // The first job that has them all here merges them, and one without a history finds that.
    for (lane, at_most) in [("build", 6), ("other", 1)] {
        let mut job = Place(folder.path()).job("0.16.0", &upstream);
        job.set("GITHUB_JOB", lane);
        job.setup().green();
        for value in values {
            write_source(&job, 1, value);
            job.shell("sccache gcc -c 1.c -o 1.o").green();
        }
        let report = job.report().green();
        assert_says(&report, WARM);
        let packs = report
            .stdout
            .lines()
            .find(|line| line.contains("at the start"));
        let packs = packs.unwrap().split(" in ").nth(1).unwrap();
        let packs: usize = packs.split(' ').next().unwrap().parse().unwrap();
        assert!(packs <= at_most, "{}", report.stdout);
        job.server_ends();
    }
}
