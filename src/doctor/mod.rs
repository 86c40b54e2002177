//! The command `doctor`: looks at a machine or a job, and says what is wrong and how to mend it.
//!
//! Here are the edges: what is asked of the network, of processes and of the disk. What the answers
//! mean is in [`checks`].

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

use crate::action::cargo;
use crate::action::environment::Environment;
use crate::action::state::Found;
use crate::action::stats::server_of;
use crate::doctor::checks::{Finding, Level, Manifest, ServerState, Space, Wanted};
use crate::github::cache_client::{CacheClient, Endpoint};
use crate::http_client::{self, Timeouts, is_on_loopback};
use crate::install::{self, Platform};
use crate::sccache::server::Server;
use crate::sccache::state::sccache_on_path;
use crate::sccache::stats::Stats;
use crate::store::local;

/// How long a server may take. A person waits.
const TIMEOUTS: Timeouts = Timeouts {
    connect: Duration::from_secs(5),
    read: Duration::from_secs(10),
};

/// Time for a connection on loopback.
const LOOPBACK_TIMEOUT: Duration = Duration::from_secs(2);

/// The key that is looked for. Nobody writes it.
const NO_KEY: &str = "sccache-packs/doctor";

/// Looks at everything. `program` is this process's binary. Nothing is changed, but that a folder for
/// sccache may come to be in the tool cache.
pub async fn examine(environment: &Environment, program: &Path) -> Vec<Finding> {
    let found = Found::of(environment);
    let about = found.as_ref().and_then(|found| found.about.as_ref());
    let mut findings = vec![
        checks::job(environment, about),
        checks::service(environment, about),
    ];
    if let Some(endpoint) = Endpoint::of(environment) {
        findings.push(checks::protocol(&endpoint));
        findings.push(checks::look_up(look_up(endpoint.clone()).await));
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
    let disk_level = found.as_ref().map(|found| found.state_dir.disk_level());
    let wanted = about.zip(disk_level.as_deref());
    let wanted = wanted.map(|(about, disk_level)| Wanted { about, disk_level });
    findings.extend(checks::variables(environment, wanted));
    findings.extend(disks(environment, found.as_ref()));
    findings.push(checks::proxies(environment));
    let named = environment.path("RUNNER_TOOL_CACHE");
    let used = install::tool_cache_folder(environment, Platform::current());
    let used = used.map_err(|error| format!("no folder for tools can be written: {error}"));
    findings.push(checks::tool_cache(named.as_deref(), used));
    let program = about.map_or(program, |about| &about.program);
    findings.push(binary(program));
    findings
}

async fn look_up(endpoint: Endpoint) -> Result<Duration, String> {
    let version = hex::encode(Sha256::digest(NO_KEY));
    let client = CacheClient::new(endpoint, &version, TIMEOUTS);
    let client = client.map_err(|error| error.to_string())?;
    let begin = Instant::now();
    let found = client.find(NO_KEY, &[]).await;
    found.map_err(|error| error.to_string())?;
    Ok(begin.elapsed())
}

/// The time by the service's clock. The request has no token and goes to the root, since some
/// services have a secret in their path.
async fn date_of(endpoint: &Endpoint) -> Option<SystemTime> {
    let builder = http_client::builder(TIMEOUTS.connect)
        .timeout(TIMEOUTS.read)
        .redirect(Policy::none());
    let builder = match is_on_loopback(&endpoint.url) {
        true => builder.no_proxy(),
        false => builder,
    };
    let root = endpoint.url.join("/").ok()?;
    let answer = builder.build().ok()?.get(root).send().await.ok()?;
    let date = answer.headers().get(DATE)?.to_str().ok()?;
    httpdate::parse_http_date(date).ok()
}

async fn sccache(environment: &Environment, found: Option<&Found>) -> Finding {
    let path = match found {
        Some(found) => {
            let sccache = found.state_dir.sccache().map(|sccache| sccache.path);
            sccache.filter(|path| path.exists())
        }
        None => sccache_on_path(environment),
    };
    let Some(path) = path else {
        return checks::sccache(None, found.is_some());
    };
    let version = install::version_of(&path, environment).await;
    let version = version.map_err(|error| error.to_string());
    checks::sccache(Some((&path, version)), found.is_some())
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

fn disks(environment: &Environment, found: Option<&Found>) -> Vec<Finding> {
    let temporary = environment.path("RUNNER_TEMP");
    let temporary = temporary.unwrap_or_else(std::env::temp_dir);
    let state = found.map(|found| found.state_dir.root().to_owned());
    let workspace = environment.path("GITHUB_WORKSPACE");
    let workspace = workspace.or_else(|| std::env::current_dir().ok());
    let target = environment.path("CARGO_TARGET_DIR");
    let folders = [
        (
            "the action's state",
            state.or_else(|| Some(temporary.clone())),
        ),
        ("cargo's home", cargo::home(environment)),
        ("the build", target.or(workspace)),
    ];
    let spaces = folders.into_iter().filter_map(|(what, path)| {
        let path = path?;
        let free = free(&path);
        Some(Space { what, path, free })
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

/// The bytes that this user may still write where `path` is or will be.
fn free(path: &Path) -> Option<u64> {
    local::free(existing(path)?)
}

/// The number of the disk where `path` is or will be.
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
    let manifest = program.parent().map(|dist| dist.join("manifest.json"));
    let manifest = manifest.and_then(|path| fs::read(path).ok());
    let manifest: Option<Manifest> =
        manifest.and_then(|manifest| serde_json::from_slice(&manifest).ok());
    let digest = sha256_of(program);
    let digest = digest.map_err(|error| format!("{}: {error}", program.display()));
    let platform = Platform::current().runner();
    checks::binary(program, &platform, manifest.as_ref(), digest)
}

fn sha256_of(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hex::encode(hasher.finalize()))
}

/// Whether nothing is wrong. Notes are not.
pub fn is_well(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.level < Level::Wrong)
}

/// The findings for a person: a line each, and a second with what to do about it.
pub fn text(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max();
    let width = width.unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Wrong => "wrong",
        };
        let check = finding.check;
        let found = one_line(&finding.text);
        let _ = writeln!(text, "{level:<5}  {check:<width$}  {found}");
        if let Some(mend) = &finding.mend {
            let indent = width + 9;
            let _ = writeln!(text, "{:indent$}mend: {}", "", one_line(mend));
        }
    }
    text
}

/// Foreign text, such as a variable's value, as a line that neither ends nor commands anything.
fn one_line(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(plain).collect()
}

/// The findings as JSON: `well`, and in `checks` for each `check`, `level` (`ok`, `note`, `wrong`),
/// `text`, and `mend` or null.
pub fn json(findings: &[Finding]) -> Value {
    json!({ "well": is_well(findings), "checks": findings })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_and_one_more_with_the_mend_whatever_is_in_it() {
        let finding = |level, mend: Option<&str>| Finding {
            check: "disk",
            level,
            text: "a\n::error::b\u{1b}[2J".to_owned(),
            mend: mend.map(str::to_owned),
        };
        let findings = [
            finding(Level::Ok, None),
            finding(Level::Wrong, Some("c\nd")),
        ];
        let expected = "ok     disk  a ::error::b [2J\nwrong  disk  a ::error::b [2J\n             mend: c d\n";
        assert_eq!(text(&findings), expected);
        assert!(!is_well(&findings) && is_well(&findings[..1]));
        assert_eq!(json(&findings)["checks"][1]["level"], "wrong");
    }
}
