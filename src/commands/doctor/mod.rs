//! The command `doctor`: looks at a machine or a job, and diagnoses problems and suggests fixes.
//!
//! This module does the input and output: it asks the network, processes and the disk. [`checks`]
//! interprets the answers.

pub mod checks;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use reqwest::header::DATE;
use reqwest::redirect::Policy;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::action::restore_cargo;
use crate::action::state::ExistingSetup;
use crate::cache_client::{CacheClient, CacheError, Endpoint};
use crate::commands::doctor::checks::{
    ExpectedSetup, Finding, FreeSpace, Level, Manifest, ServerState,
};
use crate::commands::stats::server_of;
use crate::digest::sha256;
use crate::http::{self, Timeouts, is_on_loopback};
use crate::install::{self, Platform};
use crate::packs::local_file;
use crate::runner::environment::Environment;
use crate::runner::scopes::Permission;
use crate::sccache::server::Server;
use crate::sccache::state_dir::sccache_on_path;
use crate::sccache::stats::Stats;

/// How long a server may take. A person waits.
const TIMEOUTS: Timeouts = Timeouts {
    connect: Duration::from_secs(5),
    read: Duration::from_secs(10),
    slow: Duration::from_secs(10),
};

/// Time for a connection on loopback.
const LOOPBACK_TIMEOUT: Duration = Duration::from_secs(2);

/// The key that is looked for. No job writes it.
const PROBE_KEY: &str = "sccache-packs/doctor";

/// Looks at everything. `program` is this process's binary. It changes nothing, except that it may
/// create a folder for sccache in the tool cache.
pub async fn run_checks(environment: &Environment, program: &Path) -> Vec<Finding> {
    let found = ExistingSetup::of(environment);
    let about = found.as_ref().and_then(|found| found.about.as_ref());
    let mut findings = vec![
        checks::job(environment, about),
        checks::service(environment, about),
    ];
    if let Some(endpoint) = Endpoint::of(environment) {
        findings.push(checks::protocol(&endpoint));
        if Permission::of(environment, None).read {
            findings.push(checks::look_up(look_up(endpoint.clone()).await));
        }
        findings.push(checks::writing(environment));
        let date = date_of(&endpoint).await;
        findings.push(checks::clock(date, SystemTime::now()));
    }
    findings.push(sccache(environment, found.as_ref()).await);
    if let Some(server) = server_of(environment, found.as_ref()) {
        let started = about.and(found.as_ref());
        let log = started.map(|found| found.state_dir.server_log());
        let state = state_of(&server).await;
        findings.push(checks::server(&state, server.port(), log.as_deref()));
    }
    if let Some(found) = &found
        && let Some(port) = about.and_then(|about| about.relay_port)
    {
        let connected = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
        let is_listening = matches!(timeout(LOOPBACK_TIMEOUT, connected).await, Ok(Ok(_)));
        let log = found.state_dir.relay_log();
        findings.push(checks::relay(port, is_listening, &log));
    }
    let disk_tier = found.as_ref().map(|found| found.state_dir.disk_tier());
    let expected = about
        .zip(disk_tier.as_deref())
        .map(|(about, disk_tier)| ExpectedSetup { about, disk_tier });
    findings.extend(checks::variables(environment, expected));
    findings.extend(disks(environment, found.as_ref()));
    findings.push(checks::proxies(environment));
    let named = environment.path("RUNNER_TOOL_CACHE");
    let used = install::tool_cache_folder(environment, Platform::of(environment));
    findings.push(checks::tool_cache(named.as_deref(), used));
    let program = about.map_or(program, |about| &about.program);
    findings.push(binary(program));
    findings
}

/// Why the cache service was not asked, or did not answer.
#[derive(Debug, thiserror::Error)]
enum LookupError {
    #[error(transparent)]
    Client(#[from] reqwest::Error),
    #[error(transparent)]
    Cache(#[from] CacheError),
}

async fn look_up(endpoint: Endpoint) -> Result<Duration, LookupError> {
    let version = hex::encode(Sha256::digest(PROBE_KEY));
    let client = CacheClient::new(endpoint, &version, TIMEOUTS)?;
    let begin = Instant::now();
    client.find(PROBE_KEY, &[]).await?;
    Ok(begin.elapsed())
}

/// The time by the service's clock. The request has no token and goes to the root, since some
/// services have a secret in their path.
async fn date_of(endpoint: &Endpoint) -> Option<SystemTime> {
    let builder = http::builder(TIMEOUTS.connect)
        .timeout(TIMEOUTS.read)
        .redirect(Policy::none());
    let builder = if is_on_loopback(&endpoint.url) {
        builder.no_proxy()
    } else {
        builder
    };
    let root = endpoint.url.join("/").ok()?;
    let answer = builder.build().ok()?.get(root).send().await.ok()?;
    let date = answer.headers().get(DATE)?.to_str().ok()?;
    httpdate::parse_http_date(date).ok()
}

async fn sccache(environment: &Environment, found: Option<&ExistingSetup>) -> Finding {
    let path = match found {
        Some(found) => {
            let sccache = found.state_dir.sccache().map(|sccache| sccache.path);
            sccache.filter(|path| path.exists())
        }
        None => sccache_on_path(environment),
    };
    let version = match &path {
        Some(path) => Some((&**path, install::version_of(path, environment).await)),
        None => None,
    };
    checks::sccache(version, found.is_some())
}

async fn state_of(server: &Server) -> ServerState {
    // sccache's client would start one to ask it.
    if !server.is_listening().await {
        return ServerState::Absent;
    }
    match server.statistics().await {
        Err(error) => ServerState::Silent(error.to_string()),
        Ok(json) => match Stats::parse(&json) {
            Err(error) => ServerState::Silent(error.to_string()),
            Ok(stats) => ServerState::Answers(stats.cache_location.unwrap_or_default()),
        },
    }
}

fn disks(environment: &Environment, found: Option<&ExistingSetup>) -> Vec<Finding> {
    let temporary = environment
        .path("RUNNER_TEMP")
        .unwrap_or_else(tempfile::env::temp_dir);
    let state = found.map(|found| found.state_dir.root().to_owned());
    let workspace = environment
        .path("GITHUB_WORKSPACE")
        .or_else(|| std::env::current_dir().ok());
    let target = environment.path("CARGO_TARGET_DIR");
    let folders = [
        (
            "the action's state",
            state.or_else(|| Some(temporary.clone())),
        ),
        ("cargo's home", restore_cargo::home(environment)),
        ("the build", target.or(workspace)),
    ];
    let spaces = folders.into_iter().filter_map(|(what, path)| {
        let path = path?;
        let free = free(&path);
        Some(FreeSpace { what, path, free })
    });
    let mut findings = vec![checks::room(&spaces.collect::<Vec<_>>())];
    if let Some(cache) = environment.path("SCCACHE_DIR") {
        let devices = device(&cache).zip(device(&temporary));
        findings.extend(checks::same_disk(&cache, devices));
    }
    findings
}

/// The nearest folder above `path`, itself included, that is there.
fn existing(path: &Path) -> Option<&Path> {
    path.ancestors().find(|path| path.exists())
}

/// The bytes that this user may still write at `path`, which need not exist yet.
fn free(path: &Path) -> Option<u64> {
    local_file::free(existing(path)?)
}

/// The number of the disk of `path`, which need not exist yet.
#[cfg(unix)]
fn device(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    Some(existing(path)?.metadata().ok()?.dev())
}

#[cfg(not(unix))]
fn device(path: &Path) -> Option<u64> {
    existing(path).and(None)
}

fn binary(program: &Path) -> Finding {
    let manifest = program
        .parent()
        .map(|dist| dist.join("manifest.json"))
        .and_then(|path| fs::read(path).ok());
    let manifest: Option<Manifest> =
        manifest.and_then(|manifest| serde_json::from_slice(&manifest).ok());
    let digest = sha256_of(program);
    let platform = Platform::current().runner();
    checks::binary(program, &platform, manifest.as_ref(), digest)
}

fn sha256_of(path: &Path) -> io::Result<String> {
    Ok(hex::encode(sha256(File::open(path)?)?))
}

/// Whether there is no error. Notes are none.
pub fn is_ok(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.level < Level::Error)
}

/// The findings for a person: a line each, and a second line with the fix.
pub fn text(findings: &[Finding]) -> String {
    let width = findings
        .iter()
        .map(|finding| finding.check.len())
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Error => "error",
        };
        let check = finding.check;
        let found = one_line(&finding.text);
        let _ = writeln!(text, "{level:<5}  {check:<width$}  {found}");
        if let Some(fix) = &finding.fix {
            let indent = width + 9;
            let _ = writeln!(text, "{:indent$}fix: {}", "", one_line(fix));
        }
    }
    text
}

/// Foreign text, such as a variable's value, in one line without control characters.
fn one_line(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(plain).collect()
}

/// The findings as JSON: `ok`, and in `checks` for each `check`, `level` (`ok`, `note`, `error`),
/// `text`, and `fix` or null.
pub fn json(findings: &[Finding]) -> Value {
    json!({ "ok": is_ok(findings), "checks": findings })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_and_one_more_with_the_fix_whatever_is_in_it() {
        let finding = |level, fix: Option<&str>| Finding {
            check: "disk",
            level,
            text: "a\n::error::b\u{1b}[2J".to_owned(),
            fix: fix.map(str::to_owned),
        };
        let findings = [
            finding(Level::Ok, None),
            finding(Level::Error, Some("c\nd")),
        ];
        let expected =
            "ok     disk  a ::error::b [2J\nerror  disk  a ::error::b [2J\n             fix: c d\n";
        assert_eq!(text(&findings), expected);
        assert!(!is_ok(&findings) && is_ok(&findings[..1]));
        assert_eq!(json(&findings)["checks"][1]["level"], "error");
    }
}
