//! Whole jobs: the main step, a build, the post step, with the real sccache and real compilers,
//! and with each part killed in turn.

use crate::support::c_build;
use crate::support::runner;
use crate::support::s3;
use crate::support::tools;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::support::c_build::{BUILD, FILES, object, objects, remove_objects, write_sources};
use crate::support::runner::{Job, Step, all_files, kill};
use axum::Router;
use axum::extract::Request;
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::IntoResponse;
use sccache_action::cache_protocol::auth::UrlSigner;
use sccache_action::cache_protocol::temporary::TemporaryStore;
use sccache_action::cache_protocol::{self, AppState};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// A cache service in this process, and the runtime that it runs in.
struct Service {
    runtime: Option<Runtime>,
    shared: Arc<AppState<TemporaryStore>>,
    url: String,
    token: String,
}

impl Service {
    fn start(folder: &Path) -> Self {
        Self::behind(folder, |router| router)
    }

    /// A service behind what `layer` puts before it.
    fn behind(folder: &Path, layer: impl FnOnce(Router) -> Router) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (token, tokens) = cache_protocol::single_token("refs/heads/main").unwrap();
        let store = TemporaryStore::open(folder).unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(AppState::new(
            store,
            tokens,
            address,
            UrlSigner::random().unwrap(),
        ));
        let router = layer(cache_protocol::router(shared.clone()));
        runtime.spawn(axum::serve(listener, router).into_future());
        Self {
            runtime: Some(runtime),
            shared,
            url: format!("http://{address}/"),
            token: token.reveal().to_owned(),
        }
    }

    fn counters(&self) -> cache_protocol::Snapshot {
        self.shared.counters()
    }

    /// Ends it as a kill would: requests in flight are cut off.
    fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Builds all that there is to build.
#[track_caller]
fn build(job: &Job) -> Step {
    let step = job.shell(BUILD).green();
    assert_eq!(objects(job), FILES);
    step
}

fn job_with_service(sccache: &str, service: &Service) -> Job {
    let mut job = Job::with_sccache(&tools::sccache(sccache));
    job.use_service(&service.url, &service.token);
    // The relay has its own tests.
    job.set("INPUT_MODE", "direct");
    write_sources(&job);
    job
}

#[test]
fn what_one_job_compiled_the_next_has_from_the_cache() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path());
    for version in ["0.19.0", "0.16.0", "0.10.0"] {
        for expected in ["0 hits, 6 misses, 0 errors", "6 hits, 0 misses, 0 errors"] {
            let job = job_with_service(version, &service);
            let setup = job.setup().green();
            setup.warns_never();
            let outputs = job.entries("GITHUB_OUTPUT");
            assert_eq!(outputs.get("version"), Some(version));
            assert_eq!(outputs.get("mode"), Some("direct"));
            build(&job);
            let report = job.report().green();
            report.prints(expected);
            assert!(job.file("GITHUB_STEP_SUMMARY").contains(expected));
            let notice = "::notice title=sccache::";
            assert_eq!(report.stdout.matches(notice).count(), 1);
            job.server_ends();
        }
    }
    assert!(service.counters().hits > FILES as u64);
}

#[test]
fn a_later_step_can_ask_for_the_statistics_in_each_form() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path());
    let job = job_with_service("0.16.0", &service);
    job.setup().green();
    job.shell(BUILD).green();
    let expected = "0 % of 6 compiles came from the cache (0 hits, 6 misses, 0 errors)";
    let table = job.shell("sccache-action stats").green().stdout;
    assert!(table.starts_with(expected), "{table}");
    assert!(table.contains("sccache 0.16.0, mode direct"), "{table}");
    let markdown = job.shell("sccache-action stats --markdown").green().stdout;
    assert!(markdown.starts_with("### sccache") && markdown.contains(expected));
    let json = job.shell("sccache-action stats --json").green().stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["format"], 1);
    assert_eq!(json["sccache"]["mode"], "direct");
    assert_eq!(json["compiles"]["lookups"], 6);
    assert_eq!(json["languages"][0]["misses"], 6);
    job.report().green();
    job.server_ends();
    let none = job.shell("sccache-action stats");
    assert_ne!(none.status, Some(0));
    assert!(
        none.stderr.contains("no sccache server listens"),
        "{}",
        none.stderr
    );
}

/// What `doctor` finds in a step that sees all that the action sees: the level and the text of each
/// check, and the exit status. No token may be shown.
fn doctor(job: &Job, token: &str) -> (Vec<(String, String, String)>, Option<i32>) {
    let step = job.action_step(true, &[runner::binary(), "doctor", "--json"]);
    assert!(!step.stdout.contains(token), "{}", step.stdout);
    let json: serde_json::Value = serde_json::from_str(&step.stdout).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let checks = json["checks"].as_array().unwrap().iter();
    let checks = checks.map(|found| {
        let is_ok = found["level"] == "ok";
        assert_eq!(found["fix"].is_null(), is_ok, "{found}");
        (
            text(&found["check"]),
            text(&found["level"]),
            text(&found["text"]),
        )
    });
    (checks.collect(), step.status)
}

fn errors(findings: &[(String, String, String)]) -> Vec<&str> {
    let errors = findings.iter().filter(|(_, level, _)| level == "error");
    errors.map(|(check, ..)| check.as_str()).collect()
}

#[test]
fn the_doctor_finds_a_job_well_and_each_part_that_is_gone() {
    let store = tempfile::tempdir().unwrap();
    let mut service = Service::start(store.path());
    let token = service.token.clone();
    let mut job = job_with_service("0.16.0", &service);
    job.set("INPUT_MODE", "packed");
    job.setup().green();
    let later = job.shell("sccache-action doctor").green();
    later.prints("mode packed");
    later.prints("as intended");
    let (findings, status) = doctor(&job, &token);
    assert_eq!(
        (errors(&findings), status),
        (vec![], Some(0)),
        "{findings:?}"
    );
    let found = |check: &str| findings.iter().find(|(name, ..)| name == check).unwrap();
    for check in [
        "protocol", "lookup", "writing", "clock", "sccache", "server", "relay",
    ] {
        assert_eq!(found(check).1, "ok", "{findings:?}");
    }
    assert!(found("protocol").2.contains("version 2"));
    assert!(found("writing").2.contains("refs/heads/main"));
    assert!(found("lookup").2.contains("answered in"));
    for pid in [job.server_pid(), job.relay_pid()] {
        kill(pid.unwrap());
    }
    let (findings, status) = doctor(&job, &token);
    assert_eq!(errors(&findings), ["server", "relay"], "{findings:?}");
    assert_eq!(status, Some(1));
    service.kill();
    let exported = job.file("GITHUB_ENV");
    fs::write(job.path("GITHUB_ENV"), exported + "CARGO_INCREMENTAL=1\n").unwrap();
    let (findings, _) = doctor(&job, &token);
    let expected = ["lookup", "server", "relay", "variables"];
    assert_eq!(errors(&findings), expected, "{findings:?}");
}

#[test]
fn the_doctor_has_something_to_say_where_there_is_neither_job_nor_sccache() {
    let folder = tempfile::tempdir().unwrap();
    let output = std::process::Command::new(runner::binary())
        .arg("doctor")
        .env_clear()
        .env("TMPDIR", "")
        .current_dir(folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(
        text.contains("note   job") && text.contains("fix: "),
        "{text}"
    );
}

#[test]
fn sccaches_before_version_2_of_the_service_work_through_version_1() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path());
    for expected in ["0 hits, 6 misses", "6 hits, 0 misses"] {
        let mut job = job_with_service("0.7.7", &service);
        job.set("ACTIONS_CACHE_URL", service.url.clone());
        job.setup().green();
        job.shell(BUILD).green();
        let report = job.report().green();
        report.prints(expected);
    }
}

/// A service like act's: version 1, with a secret in its address and none in a token.
fn service_without_tokens(folder: &Path) -> Service {
    let token = Arc::new(OnceLock::<HeaderValue>::new());
    let known = token.clone();
    let service = Service::behind(folder, |router| {
        router.layer(middleware::from_fn(
            move |mut request: Request, next: Next| {
                let token = known.clone();
                async move {
                    let headers = request.headers_mut();
                    let sent = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes);
                    // An sccache without a token sends an empty one, as GitHub's own client does.
                    let sent = sent.unwrap_or_default().trim_ascii();
                    if !matches!(sent, b"" | b"Bearer") {
                        return StatusCode::BAD_REQUEST.into_response();
                    }
                    if let Some(token) = token.get() {
                        headers.insert(AUTHORIZATION, token.clone());
                    }
                    next.run(request).await
                }
            },
        ))
    });
    let header = format!("Bearer {}", service.token).parse().unwrap();
    token.set(header).unwrap();
    service
}

#[test]
fn a_service_of_version_1_is_used_without_a_token() {
    for (mode, version) in [
        ("packed", "0.16.0"),
        ("packed", "0.4.0"),
        ("direct", "0.19.0"),
        ("direct", "0.16.0"),
        ("direct", "0.5.3"),
    ] {
        let store = tempfile::tempdir().unwrap();
        let service = service_without_tokens(store.path());
        for expected in ["0 hits, 6 misses, 0 errors", "6 hits, 0 misses, 0 errors"] {
            let mut job = job_with_service(version, &service);
            for (name, value) in [
                ("ACTIONS_RUNTIME_TOKEN", ""),
                ("ACTIONS_RESULTS_URL", ""),
                ("ACTIONS_CACHE_URL", &*service.url),
                ("ACT", "true"),
                ("INPUT_MODE", mode),
                ("INPUT_WRAP", "c"),
            ] {
                job.set(name, value);
            }
            let setup = job.setup().green();
            assert!(setup.warnings().is_empty(), "{mode} {:?}", setup.warnings());
            assert_eq!(job.entries("GITHUB_OUTPUT").get("mode"), Some(mode));
            job.shell(BUILD).green();
            let report = job.report().green();
            report.prints(expected);
            report.warns_never();
        }
    }
}

#[test]
fn an_sccache_without_githubs_cache_built_in_goes_to_the_disk_with_one_warning() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path());
    let job = job_with_service("debian", &service);
    let setup = job.setup().green();
    let warnings = setup.warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].contains("does not support the storage"),
        "{warnings:?}"
    );
    assert_eq!(job.entries("GITHUB_OUTPUT").get("mode"), Some("local"));
    assert_eq!(
        job.entries("GITHUB_OUTPUT").get("version"),
        Some("0.4.0-pre.6")
    );
    assert!(!job.entries("GITHUB_ENV").has("SCCACHE_GHA_ENABLED"));
    for _ in 0..2 {
        job.shell(BUILD).green();
    }
    let report = job.report().green();
    report.prints("6 hits, 6 misses, 0 errors");
}

#[test]
fn the_token_is_in_no_later_step_in_no_file_and_in_no_log() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path());
    let mut job = job_with_service("0.16.0", &service);
    job.set("INPUT_TOKEN", "ghs_0123456789abcdef");
    let mut printed = String::new();
    for step in [
        job.setup().green(),
        job.shell(&format!("env; {BUILD}")).green(),
        job.report().green(),
    ] {
        printed.push_str(&step.stdout);
        printed.push_str(&step.stderr);
    }
    let printed = printed
        .lines()
        .filter(|line| !line.starts_with("::add-mask::"))
        .collect::<Vec<_>>()
        .join("\n");
    let files = all_files(&job.path(""));
    assert!(files.len() > 10);
    for secret in [service.token.as_str(), "ghs_0123456789abcdef"] {
        assert!(!printed.contains(secret));
        for file in &files {
            // The relay removes its own files when it ends, and what is gone holds no secret.
            let bytes = match fs::read(file) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                read => read.unwrap(),
            };
            let found = bytes
                .windows(secret.len())
                .any(|part| part == secret.as_bytes());
            assert!(!found, "{}", file.display());
        }
    }
}

#[test]
fn a_build_goes_on_when_the_server_is_killed_and_the_summary_says_so() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path());
    let job = job_with_service("0.16.0", &service);
    job.setup().green();
    job.shell(BUILD).green();
    remove_objects(&job);
    // Nothing is left that would start it again.
    kill(job.relay_pid().unwrap());
    kill(job.server_pid().unwrap());
    let build = build(&job);
    assert_eq!(
        build.stderr, "",
        "a compiler's diagnostics are read by configure scripts"
    );
    let report = job.report().green();
    report.warns_once("6 compiles ran without sccache");
    assert!(
        job.file("GITHUB_STEP_SUMMARY")
            .contains("6 compiles ran without sccache")
    );
}

#[test]
fn a_compile_error_is_the_compilers_own_with_and_without_the_server() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path());
    let job = job_with_service("0.16.0", &service);
    job.setup().green();
    fs::write(job.path("workspace/bad.c"), "int broken( {\n").unwrap();
    let bad = ["gcc", "-c", "bad.c", "-o", "bad.o"];
    let alone = job.step(&bad);
    let through: Vec<&str> = std::iter::once("sccache").chain(bad).collect();
    for killed in [false, true] {
        if killed {
            kill(job.server_pid().unwrap());
        }
        let step = job.step(&through);
        assert_eq!(step.status, alone.status);
        assert_eq!(step.stderr, alone.stderr);
    }
}

#[test]
fn a_build_goes_on_when_the_cache_service_is_gone() {
    let store = tempfile::tempdir().unwrap();
    let mut service = Service::start(store.path());
    let job = job_with_service("0.16.0", &service);
    job.setup().green();
    service.kill();
    build(&job);
    let report = job.report().green();
    report.prints("0 hits");
}

#[test]
fn in_mode_direct_a_cache_service_that_is_not_there_costs_one_warning_and_the_disk_is_used() {
    let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
    let port = sccache_action::sccache::server::free_port().unwrap();
    job.use_service(&format!("http://127.0.0.1:{port}/"), "token-of-nobody");
    job.set("INPUT_MODE", "direct");
    write_sources(&job);
    let setup = job.setup().green();
    assert_eq!(setup.warnings().len(), 1, "{}", setup.stdout);
    assert_eq!(job.entries("GITHUB_OUTPUT").get("mode"), Some("local"));
    job.shell(BUILD).green();
    job.report().green();
}

#[test]
fn without_a_cache_service_the_disk_is_used_and_the_user_hears_why() {
    let job = Job::with_sccache(&tools::sccache("0.16.0"));
    write_sources(&job);
    let setup = job.setup().green();
    assert_eq!(setup.warnings().len(), 1, "{}", setup.stdout);
    assert!(setup.warnings()[0].contains("ACTIONS_RESULTS_URL"));
    for _ in 0..2 {
        job.shell(BUILD).green();
    }
    let report = job.report().green();
    report.prints("6 hits, 6 misses");
}

/// A job whose objects go to this bucket.
fn job_with_bucket(sccache: &str, bucket: &s3::S3) -> Job {
    let mut job = Job::with_sccache(&tools::sccache(sccache));
    for (name, value) in [
        ("SCCACHE_BUCKET", "bucket"),
        ("SCCACHE_ENDPOINT", bucket.url.as_str()),
        ("SCCACHE_REGION", "us-east-1"),
        ("SCCACHE_S3_USE_SSL", "false"),
        ("AWS_ACCESS_KEY_ID", s3::ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", s3::SECRET_KEY),
    ] {
        job.set(name, value);
    }
    write_sources(&job);
    job
}

#[test]
fn a_bucket_of_the_users_own_is_used_and_with_read_only_nothing_is_written_to_it() {
    let bucket = s3::S3::start(&tools::s3());
    let job = job_with_bucket("0.16.0", &bucket);
    let setup = job.setup().green();
    setup.warns_never();
    let outputs = job.entries("GITHUB_OUTPUT");
    assert_eq!(outputs.get("mode"), Some("external"));
    job.shell(BUILD).green();
    job.report().green();
    let stored = all_files(&bucket.folder()).len();
    assert!(stored >= FILES, "{stored}");

    let mut reader = job_with_bucket("0.16.0", &bucket);
    reader.set("INPUT_READ-ONLY", "true");
    c_build::write_source(&reader, 1, "100");
    let setup = reader.setup().green();
    setup.warns_never();
    reader.shell(BUILD).green();
    assert_eq!(objects(&reader), FILES);
    let report = reader.report().green();
    let expected = "5 hits, 1 miss, 0 errors";
    report.prints(expected);
    report.warns_never();
    assert_eq!(all_files(&bucket.folder()).len(), stored);

    // An sccache that cannot be told so is not said to have been.
    let mut older = job_with_bucket("0.15.0", &bucket);
    older.set("INPUT_READ-ONLY", "true");
    let setup = older.setup().green();
    assert_eq!(setup.warnings().len(), 1, "{}", setup.stdout);
    assert!(setup.warnings()[0].contains("cannot be read-only"));
    older.report().green();
}

#[test]
fn a_failed_setup_sets_no_variable_and_warns_once() {
    let mut job = Job::new();
    job.set("INPUT_INSTALL-FROM", "path");
    let setup = job.setup().green();
    assert_eq!(setup.warnings().len(), 1, "{}", setup.stdout);
    assert!(setup.warnings()[0].contains("continues without a cache"));
    assert_eq!(job.file("GITHUB_OUTPUT"), "");
    let exported = job.entries("GITHUB_ENV");
    let names: Vec<&str> = exported.iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["SCCACHE_PATH"]);
    job.shell("${SCCACHE_PATH} --show-stats").green();
    // The doctor is on PATH then, and knows the stand-in for none.
    let doctor = job.shell("sccache-action doctor");
    assert_eq!(doctor.status, Some(1), "{}", doctor.stdout);
    let finding = "sccache        not on PATH";
    doctor.prints(finding);
    let report = job.report().green();
    report.warns_never();
    assert!(
        job.file("GITHUB_STEP_SUMMARY")
            .contains("sccache was not used")
    );
}

#[test]
fn a_step_that_calls_sccache_of_its_own_accord_still_builds_after_a_failed_setup() {
    // Nothing that the main step can see says that the build will.
    let mut job = Job::new();
    job.set("INPUT_INSTALL-FROM", "path");
    write_sources(&job);
    job.setup().green();
    build(&job);
    // A second use does not take the stand-in for an sccache.
    let again = job.setup().green();
    let warning = &again.warnings()[0];
    assert!(warning.contains("sccache is not on PATH"), "{warning}");
}

#[test]
fn a_failed_setup_leaves_an_sccache_of_the_runners_own_on_path() {
    let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
    job.set("INPUT_VERSION", "0.0.1");
    job.setup().green();
    assert_eq!(job.file("GITHUB_PATH"), "");
    job.shell("${SCCACHE_PATH} --show-stats").green();
}

#[test]
fn a_step_that_wants_incremental_builds_is_not_refused() {
    for version in ["0.19.0", "0.16.0", "0.5.3"] {
        let mut job = Job::with_sccache(&tools::sccache(version));
        write_sources(&job);
        job.set("INPUT_MODE", "local");
        job.setup().green();
        for name in ["CARGO_INCREMENTAL", "CARGO_BUILD_INCREMENTAL"] {
            let rustc = "sccache rustc -vV";
            job.shell(&format!("export {name}=1; {BUILD}; {rustc}"))
                .green();
        }
        assert_eq!(objects(&job), FILES);
        let report = job.report().green();
        report.warns_never();
        let expected = "6 hits, 6 misses, 0 errors";
        assert!(
            report.stdout.contains(expected),
            "{version} {}",
            report.stdout
        );
    }
}

#[test]
fn an_sccache_that_goes_to_the_disk_after_all_is_not_said_to_be_read_only() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path());
    // Debian's knows no GitHub's cache, and writes to its disk whatever it is told.
    let mut job = job_with_service("debian", &service);
    job.set("INPUT_MODE", "packed");
    job.set("INPUT_READ-ONLY", "true");
    let setup = job.setup().green();
    let mut warnings = setup.warnings().into_iter();
    let found = warnings.any(|warning| warning.contains("cannot be read-only"));
    assert!(found, "{}", setup.stdout);
    job.report().green();
}

#[test]
fn a_failed_setup_fails_the_step_where_the_user_wants_it() {
    let mut job = Job::new();
    job.set("PATH", "/nowhere");
    job.set("INPUT_INSTALL-FROM", "path");
    job.set("INPUT_ON-FAILURE", "fail");
    let setup = job.setup();
    assert_eq!(setup.status, Some(1));
    assert_eq!(setup.errors().len(), 1, "{}", setup.stdout);
}

#[test]
fn a_workflow_that_names_sccache_itself_still_builds_after_a_failed_setup() {
    let mut job = Job::new();
    job.set("INPUT_INSTALL-FROM", "path");
    job.set("INPUT_VERSION", "0.0.1");
    job.set("RUSTC_WRAPPER", "sccache");
    write_sources(&job);
    let setup = job.setup().green();
    assert_eq!(setup.warnings().len(), 1, "{}", setup.stdout);
    build(&job);
    job.shell("sccache --show-stats").green();
}

#[test]
fn a_binary_that_is_no_sccache_is_not_used() {
    let job = Job::with_sccache(Path::new("/bin/true"));
    let setup = job.setup().green();
    assert_eq!(setup.warnings().len(), 1, "{}", setup.stdout);
    assert!(!job.entries("GITHUB_ENV").has("RUSTC_WRAPPER"));
}

#[test]
fn an_sccache_that_is_removed_in_the_middle_of_a_job_leaves_the_build_green() {
    let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
    write_sources(&job);
    job.set("INPUT_MODE", "local");
    job.setup().green();
    fs::remove_file(job.path("tools-on-path/sccache")).unwrap();
    build(&job);
    // The server answers on; only its statistics are not to be had.
    let report = job.report().green();
    report.warns_never();
    report.prints("There are no statistics");
}

#[test]
fn a_disk_that_cannot_be_written_leaves_the_build_green_and_is_named() {
    let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
    write_sources(&job);
    job.set("INPUT_MODE", "local");
    job.set("SCCACHE_DIR", "/dev/full/cache");
    job.setup().green();
    build(&job);
    let report = job.report().green();
    report.warns_once("failed to create directory");
}

#[test]
fn files_of_the_runner_that_cannot_be_written_leave_no_server_behind() {
    let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
    job.set("INPUT_MODE", "local");
    job.set("GITHUB_ENV", "/dev/full");
    let setup = job.setup().green();
    assert_eq!(setup.warnings().len(), 1, "{}", setup.stdout);
    let own = job.path("temporary").display().to_string();
    let servers = || {
        let processes = fs::read_dir("/proc").unwrap();
        let environments =
            processes.filter_map(|process| fs::read(process.ok()?.path().join("environ")).ok());
        environments
            .filter(|environment| String::from_utf8_lossy(environment).contains(&own))
            .count()
    };
    // A server that was stopped answers first and ends then.
    let begin = Instant::now();
    while servers() > 0 {
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
}

#[test]
fn each_bad_input_is_an_error_that_names_it_and_fails_the_step() {
    for (input, value) in [
        ("version", "newest"),
        ("checksum", "abc"),
        ("install-from", "apt"),
        ("mirror", "here"),
        ("mode", "fast"),
        ("namespace", "a b"),
        ("read-only", "yes"),
        ("wrap", "go"),
        ("summary", "1"),
        ("disable_annotations", "on"),
        ("on-failure", "stop"),
    ] {
        let mut job = Job::new();
        job.set(&format!("INPUT_{}", input.to_uppercase()), value);
        let setup = job.setup();
        assert_eq!(setup.status, Some(1), "{input}");
        let errors = setup.errors();
        assert_eq!(errors.len(), 1, "{input}: {}", setup.stdout);
        assert!(
            errors[0].contains(&format!("`{input}` is `{value}`")),
            "{errors:?}"
        );
        assert!(errors[0].contains("accepts"), "{errors:?}");
        // The post step has nothing to add and nothing to fail for.
        job.report().green();
    }
}

#[test]
fn cargo_and_its_c_code_go_through_the_exported_wrapper() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path());
    for expected in ["0 hits, 2 misses", "2 hits, 0 misses"] {
        let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
        job.use_service(&service.url, &service.token);
        // Rust's objects are found again only at the same path.
        let source = store.path().join("project");
        let _ = fs::remove_dir_all(&source);
        fs::create_dir_all(source.join("src")).unwrap();
        fs::write(
            source.join("Cargo.toml"),
            "[package]\nname = \"project\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[workspace]\n",
        )
        .unwrap();
        fs::write(source.join("src/lib.rs"), "pub fn f() -> u32 { 7 }\n").unwrap();
        fs::write(source.join("c.c"), "int c(void) { return 7; }\n").unwrap();
        job.setup().green();
        let exported = job.entries("GITHUB_ENV");
        assert_eq!(exported.get("CARGO_INCREMENTAL"), Some("0"));
        assert_eq!(exported.get("RUSTC_WRAPPER"), exported.get("SCCACHE_PATH"));
        job.shell(&format!(
            "cd {}; cargo build --quiet; $RUSTC_WRAPPER cc -c c.c -o c.o",
            source.display()
        ))
        .green();
        let report = job.report().green();
        report.prints(expected);
    }
}

#[test]
fn what_the_user_set_is_left_alone() {
    let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
    job.set("INPUT_MODE", "local");
    job.set("RUSTC_WRAPPER", "my-wrapper");
    job.set("CARGO_INCREMENTAL", "1");
    job.set("INPUT_WRAP", "rust,c");
    let setup = job.setup().green();
    setup.warns_never();
    let exported = job.entries("GITHUB_ENV");
    assert!(!exported.has("RUSTC_WRAPPER"));
    assert!(!exported.has("CARGO_INCREMENTAL"));
    assert!(exported.has("CMAKE_C_COMPILER_LAUNCHER"));
    assert!(exported.has("CMAKE_CXX_COMPILER_LAUNCHER"));
    assert!(!exported.has("CMAKE_CUDA_COMPILER_LAUNCHER"));
}

#[test]
fn jobs_on_one_machine_have_servers_of_their_own() {
    let mut jobs = Vec::new();
    for _ in 0..3 {
        let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
        job.set("INPUT_MODE", "local");
        job.set("SCCACHE_SERVER_PORT", {
            let first: Option<&Job> = jobs.first();
            first.map_or_else(
                || {
                    sccache_action::sccache::server::free_port()
                        .unwrap()
                        .to_string()
                },
                |first| first.get("SCCACHE_SERVER_PORT").to_owned(),
            )
        });
        job.setup().green();
        jobs.push(job);
    }
    let mut servers: Vec<u32> = jobs.iter().filter_map(Job::server_pid).collect();
    servers.sort_unstable();
    servers.dedup();
    assert_eq!(servers.len(), 3);
}

#[test]
fn a_setup_used_twice_in_a_job_reports_twice_and_leaves_nothing() {
    let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
    job.set("INPUT_MODE", "local");
    write_sources(&job);
    job.setup().green();
    let first = job.post_environment();
    let first_server = job.server_pid().unwrap();
    // The second one finds the first one's wrapper on PATH.
    let path = job.later_environment().get("PATH").unwrap().to_owned();
    job.set("PATH", path);
    job.setup().green();
    assert_ne!(job.server_pid(), Some(first_server));
    let installed = job.entries("GITHUB_OUTPUT").get("path").unwrap().to_owned();
    assert_eq!(
        installed,
        job.path("tools-on-path/sccache").display().to_string()
    );
    job.shell(BUILD).green();
    let second = job.report().green();
    second.prints("6 misses");
    let report = std::process::Command::new(runner::binary())
        .arg("report")
        .env_clear()
        .envs(first.iter())
        .output()
        .unwrap();
    assert!(report.status.success());
    runner::port_is_left(first.get("SCCACHE_SERVER_PORT").unwrap());
}

#[test]
fn a_token_that_may_only_read_makes_the_job_read_only() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path());
    let mut job = job_with_service("0.16.0", &service);
    job.set("ACTIONS_CACHE_MODE", "read");
    let setup = job.setup().green();
    setup.prints("is read-only");
    job.shell(BUILD).green();
    let report = job.report().green();
    report.warns_never();
    report.prints("read only");
    assert_eq!(service.counters().reservations, 0);
}

#[test]
fn a_namespace_keeps_objects_apart() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path());
    for (namespace, expected) in [
        ("one", "0 hits, 6 misses"),
        ("two", "0 hits, 6 misses"),
        ("one", "6 hits, 0 misses"),
    ] {
        let mut job = job_with_service("0.16.0", &service);
        job.set("INPUT_NAMESPACE", namespace);
        job.setup().green();
        job.shell(BUILD).green();
        let report = job.report().green();
        assert!(
            report.stdout.contains(expected),
            "{namespace}: {}",
            report.stdout
        );
    }
}

#[test]
fn the_summary_and_the_annotation_can_be_switched_off() {
    let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
    job.set("INPUT_MODE", "local");
    job.set("INPUT_SUMMARY", "false");
    job.set("INPUT_DISABLE_ANNOTATIONS", "true");
    write_sources(&job);
    job.setup().green();
    job.shell(BUILD).green();
    let report = job.report().green();
    assert_eq!(job.file("GITHUB_STEP_SUMMARY"), "");
    assert!(!report.stdout.contains("::notice"), "{}", report.stdout);
    report.prints("6 misses");
}

#[test]
fn objects_that_are_still_on_their_way_at_the_end_of_a_job_are_not_lost() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::behind(store.path(), |router| {
        router.layer(middleware::from_fn(async |request: Request, next: Next| {
            if request.method() == Method::PUT {
                tokio::time::sleep(Duration::from_millis(700)).await;
            }
            next.run(request).await
        }))
    });
    let mut job = job_with_service("0.16.0", &service);
    // Without the probe, each commit is one of the build's.
    job.set("INPUT_WRAP", "none");
    job.setup().green();
    let before = service.counters().commits;
    job.shell(BUILD).green();
    let report = job.report().green();
    assert_eq!(service.counters().commits - before, FILES as u64);
    report.prints("6 objects written");
}

#[test]
fn a_service_that_refuses_writes_leaves_the_build_green_and_is_named() {
    for status in [
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::INTERNAL_SERVER_ERROR,
    ] {
        let store = tempfile::tempdir().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let service = Service::behind(store.path(), |router| {
            router.layer(middleware::from_fn(move |request: Request, next: Next| {
                let calls = calls.clone();
                async move {
                    // The first write is sccache's own try; when that fails it stays read-only.
                    let creates = request.uri().path().ends_with("CreateCacheEntry");
                    if creates && calls.fetch_add(1, Ordering::Relaxed) > 0 {
                        return (status, [("retry-after", "20")], "").into_response();
                    }
                    next.run(request).await
                }
            }))
        });
        let job = job_with_service("0.16.0", &service);
        job.setup().green();
        build(&job);
        let report = job.report().green();
        report.warns_once("6 cache writes failed");
    }
}

#[test]
fn a_service_that_fails_reads_or_lies_leaves_the_build_green_and_the_objects_right() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::start(store.path());
    let job = job_with_service("0.16.0", &service);
    job.setup().green();
    job.shell(BUILD).green();
    let right: Vec<Vec<u8>> = (1..=FILES).map(|i| object(&job, i)).collect();
    job.report().green();
    drop(service);
    for body in [None, Some("not an object"), Some("")] {
        let service = Service::behind(store.path(), move |router| {
            router.layer(middleware::from_fn(
                move |request: Request, next: Next| async move {
                    let is_entry = request.uri().path().starts_with("/entries/");
                    let answer = next.run(request).await;
                    match body {
                        Some(body) if is_entry => body.into_response(),
                        None if is_entry => StatusCode::BAD_GATEWAY.into_response(),
                        _ => answer,
                    }
                },
            ))
        });
        let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
        job.use_service(&service.url, &service.token);
        write_sources(&job);
        job.setup().green();
        job.shell(BUILD).green();
        for (i, right) in (1..=FILES).zip(&right) {
            assert!(object(&job, i) == *right, "{body:?} {i}");
        }
        job.report().green();
    }
}

#[test]
fn a_report_that_finds_nothing_right_leaves_the_job_green() {
    let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
    job.set("INPUT_MODE", "local");
    job.setup().green();
    job.set("GITHUB_STEP_SUMMARY", "/dev/full");
    job.report().green();
    // The server is stopped by now, the state folder goes as well.
    let state = job
        .entries("GITHUB_STATE")
        .get("state-dir")
        .unwrap()
        .to_owned();
    fs::remove_dir_all(state).unwrap();
    let report = job.report().green();
    report.prints("no longer exists");
    for (name, value) in [("port", "x"), ("mode", ""), ("state-dir", "/nowhere")] {
        fs::write(job.path("GITHUB_STATE"), format!("{name}={value}\n")).unwrap();
        job.report().green();
    }
}

#[test]
fn starting_a_server_that_runs_already_is_no_failure() {
    let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
    job.set("INPUT_MODE", "local");
    write_sources(&job);
    job.setup().green();
    job.shell(&format!(
        "sccache --start-server; {BUILD}; sccache --show-stats"
    ))
    .green();
    let report = job.report().green();
    report.prints("6 misses");
}

#[test]
fn a_service_that_never_answers_costs_seconds_and_one_warning() {
    let store = tempfile::tempdir().unwrap();
    let service = Service::behind(store.path(), |router| {
        router.layer(middleware::from_fn(async |_: Request, _: Next| {
            std::future::pending::<StatusCode>().await
        }))
    });
    let job = job_with_service("0.16.0", &service);
    let setup = job.setup().green();
    assert_eq!(setup.warnings().len(), 1, "{}", setup.stdout);
    assert_eq!(job.entries("GITHUB_OUTPUT").get("mode"), Some("local"));
    job.shell(BUILD).green();
    let report = job.report().green();
    report.prints("6 misses");
}

#[test]
fn whoever_wants_no_less_than_asked_for_gets_no_disk_instead() {
    let nobody = Some("http://127.0.0.1:1/");
    for (mode, url, expected) in [
        ("packed", None, "no cache service"),
        ("packed", nobody, "Connection refused"),
        ("direct", nobody, "direct"),
    ] {
        let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
        job.set("INPUT_MODE", mode);
        job.set("INPUT_ON-FAILURE", "fail");
        if let Some(url) = url {
            job.use_service(url, "token-of-nobody");
        }
        let setup = job.setup();
        assert_eq!(setup.status, Some(1), "{}", setup.stdout);
        assert_eq!((setup.errors().len(), setup.warnings().len()), (1, 0));
        assert!(setup.errors()[0].contains(expected), "{}", setup.stdout);
        assert_eq!(job.file("GITHUB_ENV"), "");
    }
}

#[test]
fn no_call_of_sccache_sees_the_runners_token() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path());
    let [spy, notes] = ["spy", "notes"].map(|name| folder.path().join(name));
    let real = tools::sccache("0.16.0");
    let script = format!(
        "#!/bin/sh\n{{ echo \"call: $*\"; env; }} >> '{}'\nexec '{}' \"$@\"\n",
        notes.display(),
        real.display()
    );
    fs::write(&spy, script).unwrap();
    fs::set_permissions(&spy, fs::Permissions::from_mode(0o755)).unwrap();
    let mut job = Job::with_sccache(&spy);
    job.use_service(&service.url, &service.token);
    job.set("INPUT_TOKEN", "ghs_0123456789abcdef");
    job.setup().green();
    job.report().green();
    let notes = fs::read_to_string(notes).unwrap();
    for call in ["--show-stats", "--stop-server"] {
        assert!(notes.contains(&format!("call: {call}")), "{call}");
    }
    let url = format!("ACTIONS_RESULTS_URL={}", service.url);
    for secret in [
        service.token.as_str(),
        "ghs_0123456789abcdef",
        &url,
        "INPUT_TOKEN=",
    ] {
        assert!(!notes.contains(secret), "{secret}");
    }
}
