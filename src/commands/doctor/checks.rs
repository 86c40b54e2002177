//! Interprets the facts: functions of values, each of which gives a line for the user.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use semver::Version;
use serde::{Deserialize, Serialize};

use crate::action::mode::{Mode, external_storage, is_on};
use crate::action::state::SetupInfo;
use crate::cache_client::{Endpoint, Protocol};
use crate::format::{size, time};
use crate::http::is_on_loopback;
use crate::install::NEWEST_TESTED;
use crate::runner::environment::Environment;
use crate::runner::scopes::{Permission, Scopes};

/// How grave a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It may be intended, or costs little.
    Note,
    /// The cache does not work, or not as it could.
    Error,
}

/// The result of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The subject of the check, in a word or two.
    pub check: &'static str,
    /// How grave it is.
    pub level: Level,
    /// The observation, without any token. Never a token.
    pub text: String,
    /// A fix, if there is something to fix.
    pub fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, text: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            text: text.into(),
            fix: None,
        }
    }

    fn note(check: &'static str, text: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            level: Level::Note,
            fix: Some(fix.into()),
            ..Self::ok(check, text)
        }
    }

    fn error(check: &'static str, text: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            level: Level::Error,
            ..Self::note(check, text, fix)
        }
    }
}

/// Whether this is a job, and whether the action has run in it.
pub fn job(environment: &Environment, about: Option<&SetupInfo>) -> Finding {
    let is_job = environment.get("GITHUB_ACTIONS") == Some("true");
    match (is_job, about) {
        (_, Some(about)) => Finding::ok(
            "job",
            format!("the action has set up sccache in mode {}", about.mode),
        ),
        (true, None) => Finding::error(
            "job",
            "the action has not set up sccache in this job",
            "put the action before this step; if it is there, read its log",
        ),
        (false, None) => Finding::note(
            "job",
            "not in a job (GITHUB_ACTIONS is not `true`)",
            "run it in a step after the action to check everything",
        ),
    }
}

/// Whether the runner has given a cache service's address and token. It shows neither.
pub fn service(environment: &Environment, about: Option<&SetupInfo>) -> Finding {
    const CHECK: &str = "cache service";
    let token = environment.has("ACTIONS_RUNTIME_TOKEN");
    let address = environment.has("ACTIONS_RESULTS_URL") || environment.has("ACTIONS_CACHE_URL");
    match (address, token) {
        (true, true) if Endpoint::of(environment).is_none() => Finding::error(
            CHECK,
            "the address in ACTIONS_RESULTS_URL or ACTIONS_CACHE_URL is not an http URL",
            "fix it in the runner's configuration",
        ),
        (true, true) => Finding::ok(CHECK, "its address and a token are set"),
        (true, false) if Endpoint::of(environment).is_some() => Finding::ok(
            CHECK,
            "its address is set without a token, which version 1 does not need",
        ),
        (false, false) if about.is_some_and(|about| about.mode.needs_cache_service()) => {
            Finding::ok(
                CHECK,
                "only the action has its address and token, not this step, as intended",
            )
        }
        (false, false) => Finding::note(
            CHECK,
            "neither its address nor a token is set",
            "runners give them only to actions; for a service of your own set ACTIONS_RESULTS_URL \
             and ACTIONS_RUNTIME_TOKEN in the runner's environment",
        ),
        (true, false) => Finding::error(
            CHECK,
            "its address is set without a token (ACTIONS_RUNTIME_TOKEN)",
            "set both, or neither",
        ),
        (false, true) => Finding::error(
            CHECK,
            "a token is set without an address (ACTIONS_RESULTS_URL or ACTIONS_CACHE_URL)",
            "set both, or neither",
        ),
    }
}

/// Which protocol is spoken with the service, and why.
pub fn protocol(endpoint: &Endpoint) -> Finding {
    let text = match endpoint.protocol {
        Protocol::V2 => "version 2 (Twirp), as github.com speaks it",
        Protocol::V1 => {
            "version 1 (REST), since GITHUB_SERVER_URL is not github.com's, this is `act`, or there \
             is only ACTIONS_CACHE_URL"
        }
    };
    Finding::ok("protocol", text)
}

/// A look-up that takes longer gets a note: a job waits for several.
const SLOW: Duration = Duration::from_secs(2);

/// How a look-up went: how long it took, or why there was no answer.
pub fn look_up(result: Result<Duration, impl fmt::Display>) -> Finding {
    match result {
        Ok(took) if took < SLOW => Finding::ok("lookup", format!("answered in {}", time(took))),
        Ok(took) => Finding::note(
            "lookup",
            format!("answered in {}, which is slow", time(took)),
            "look for a slow proxy, or run a cache service nearer to the runner",
        ),
        Err(why) => Finding::error(
            "lookup",
            why.to_string(),
            "check that the runner reaches the service, check its proxy, and check that the job's \
             token has not expired (it lasts about six hours)",
        ),
    }
}

/// Whether the job may write.
pub fn writing(environment: &Environment) -> Finding {
    let permission = Permission::of(environment, None);
    match (permission.read, permission.write) {
        (true, false) => Finding::note(
            "writing",
            "the token is read-only",
            "GitHub gives such tokens to jobs on the default branch that outsiders can start, \
             such as those of pull_request_target; let jobs of a push fill the cache",
        ),
        (false, false) => Finding::note(
            "writing",
            "the job may neither read nor write the cache (ACTIONS_CACHE_MODE is `none`)",
            "give the job another cache mode, or use another storage: `mode: external`",
        ),
        (false, true) => Finding::note(
            "writing",
            "the job may only write to the cache (ACTIONS_CACHE_MODE is `write-only`)",
            "none needed, if the job is to compile everything and fill the cache for others",
        ),
        (true, true) => match Scopes::of(environment, permission).write {
            Some(scope) => Finding::ok(
                "writing",
                format!("neither the token nor the cache mode forbids writing, to {scope}"),
            ),
            None => Finding::ok(
                "writing",
                "neither the token nor the cache mode forbids writing",
            ),
        },
    }
}

/// A clock that is off by the first deserves a note; by the second it breaks signatures that
/// expire.
const SKEW_NOTED: Duration = Duration::from_secs(30);
const SKEW_ERROR: Duration = Duration::from_secs(300);

/// How far this machine's clock is from the service's, which says its time in whole seconds.
pub fn clock(service: Option<SystemTime>, here: SystemTime) -> Finding {
    let Some(service) = service else {
        return Finding::note(
            "clock",
            "the service does not send its time",
            "none needed, if NTP sets this machine's clock",
        );
    };
    let skew = here
        .duration_since(service)
        .unwrap_or_else(|error| error.duration());
    let text = format!("{} off the service's clock", time(skew));
    let fix = "set the clock by NTP: tokens and signed URLs expire";
    match skew {
        skew if skew < SKEW_NOTED => Finding::ok("clock", "the same as the service's"),
        skew if skew < SKEW_ERROR => Finding::note("clock", text, fix),
        _ => Finding::error("clock", text, fix),
    }
}

/// The oldest sccache that is tested: Debian's.
const OLDEST: &str = "0.4.0-pre.6";

/// Which sccache there is: its path with its version, or with why that is not known.
pub fn sccache(
    found: Option<(&Path, Result<Version, impl fmt::Display>)>,
    is_set_up: bool,
) -> Finding {
    const CHECK: &str = "sccache";
    let (path, version) = match found {
        Some((path, Ok(version))) => (path, version),
        Some((path, Err(why))) => {
            return Finding::error(
                CHECK,
                format!("{} does not run: {why}", path.display()),
                "remove it, so that the action installs sccache again",
            );
        }
        None if is_set_up => {
            return Finding::error(
                CHECK,
                "the sccache that the action installed no longer exists",
                "find the step that removes it from the tool cache",
            );
        }
        None => {
            return Finding::note(CHECK, "not on PATH", "none needed: the action installs it");
        }
    };
    let text = format!("{version}, {}", path.display());
    let known = |text: &str| Version::parse(text).ok();
    if known(OLDEST).is_some_and(|oldest| version < oldest) {
        let fix = format!("use a newer one: {OLDEST} is the oldest tested version");
        return Finding::note(CHECK, text, fix);
    }
    let minor = |version: &Version| (version.major, version.minor);
    if minor(&version) > minor(&NEWEST_TESTED) {
        let fix = format!("none needed, if it works: {NEWEST_TESTED} is the newest tested version");
        return Finding::note(CHECK, text, fix);
    }
    Finding::ok(CHECK, text)
}

/// How a server was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerState {
    /// No server listens.
    Absent,
    /// It listens and does not answer; with the reason.
    Silent(String),
    /// It answers; with its cache location.
    Answers(String),
}

/// Whether sccache's server answers. `log` is its error log, if the action has started it.
pub fn server(state: &ServerState, port: u16, log: Option<&Path>) -> Finding {
    const CHECK: &str = "server";
    let by_log = log.map(|log| format!("read {}", log.display()));
    match (state, by_log) {
        (ServerState::Answers(location), _) => {
            Finding::ok(CHECK, format!("answers on port {port}; {location}"))
        }
        (ServerState::Silent(why), by_log) => Finding::error(
            CHECK,
            format!("the program on port {port} does not answer like sccache: {why}"),
            by_log.unwrap_or_else(|| {
                "find the process that has the port, or set SCCACHE_SERVER_PORT to another"
                    .to_owned()
            }),
        ),
        (ServerState::Absent, Some(by_log)) => {
            Finding::error(CHECK, format!("does not listen on port {port}"), by_log)
        }
        (ServerState::Absent, None) => Finding::note(
            CHECK,
            format!("no server on port {port}"),
            "none needed: the action starts it",
        ),
    }
}

/// Whether the relay is there.
pub fn relay(port: u16, is_listening: bool, log: &Path) -> Finding {
    if is_listening {
        Finding::ok("relay", format!("listens on port {port}"))
    } else {
        Finding::error(
            "relay",
            format!("does not listen on port {port}"),
            format!(
                "read {}; the post step still saves the objects on sccache's disk",
                log.display()
            ),
        )
    }
}

/// The set-up, for the check of variables that interfere with it.
#[derive(Clone, Copy, Debug)]
pub struct ExpectedSetup<'a> {
    /// The information that the set-up left.
    pub about: &'a SetupInfo,
    /// The folder of sccache's disk cache in front of the relay.
    pub disk_tier: &'a Path,
}

fn is_sccache(program: &str) -> bool {
    // Also Windows' paths, on any system.
    let name = program.rsplit(['/', '\\']).next().unwrap_or(program);
    name.strip_suffix(".exe").unwrap_or(name) == "sccache"
}

/// Variables that keep sccache from its work: a finding each, or one that says that there is none.
pub fn variables(environment: &Environment, expected: Option<ExpectedSetup<'_>>) -> Vec<Finding> {
    let mut found = of_cargo(environment);
    if let Some(expected) = expected {
        found.extend(of_set_up(environment, expected));
    }
    found.extend(of_sccache(environment));
    if found.is_empty() {
        found.push(Finding::ok(VARIABLES, "no conflicts"));
    }
    found
}

const VARIABLES: &str = "variables";

fn of_cargo(environment: &Environment) -> Vec<Finding> {
    let get = |name| environment.get(name);
    let wrapper = get("RUSTC_WRAPPER").or(get("CARGO_BUILD_RUSTC_WRAPPER"));
    let Some(wrapper) = wrapper else {
        return Vec::new();
    };
    if !is_sccache(wrapper) {
        return vec![Finding::error(
            VARIABLES,
            format!("RUSTC_WRAPPER is {wrapper}, so cargo does not call sccache"),
            "unset it before the action runs, or make it call the program in SCCACHE_PATH",
        )];
    }
    let incremental = get("CARGO_INCREMENTAL").filter(|value| is_on(value));
    let incremental = incremental.map(|value| {
        Finding::error(
            VARIABLES,
            format!("CARGO_INCREMENTAL is {value}, but sccache refuses incremental compiles"),
            "set it to 0",
        )
    });
    incremental.into_iter().collect()
}

fn of_set_up(environment: &Environment, expected: ExpectedSetup<'_>) -> Vec<Finding> {
    let ExpectedSetup { about, disk_tier } = expected;
    let get = |name| environment.get(name);
    let mut found = Vec::new();
    let port = about.port.to_string();
    if get("SCCACHE_SERVER_PORT") != Some(port.as_str()) {
        found.push(Finding::error(
            VARIABLES,
            format!(
                "SCCACHE_SERVER_PORT is {}, but the action's server has {port}",
                get("SCCACHE_SERVER_PORT").unwrap_or("not set")
            ),
            "do not change it: the action sets it",
        ));
    }
    let folder = environment.path("SCCACHE_DIR");
    // Older versions have no disk cache in front, so the user's does not interfere.
    let in_front = about.mode == Mode::Packed && disk_tier_is_used(about);
    if let Some(folder) = folder.filter(|folder| in_front && folder != disk_tier) {
        found.push(Finding::error(
            VARIABLES,
            format!(
                "SCCACHE_DIR is {}, but the relay saves the objects in {}",
                folder.display(),
                disk_tier.display()
            ),
            "do not change it: the action sets it",
        ));
    }
    if let Some(name) = external_storage(environment).filter(|_| about.mode != Mode::External) {
        found.push(Finding::note(
            VARIABLES,
            format!("{name} is set, but mode {} does not use it", about.mode),
            "unset it, or set the input mode to external",
        ));
    }
    found
}

fn disk_tier_is_used(about: &SetupInfo) -> bool {
    let version = Version::parse(&about.version);
    version.is_ok_and(|version| version >= crate::action::mode::CHAIN_SINCE)
}

fn of_sccache(environment: &Environment) -> Vec<Finding> {
    let get = |name| environment.get(name);
    let mut found = Vec::new();
    let mut note = |text: String, fix: &str| found.push(Finding::note(VARIABLES, text, fix));
    if environment.has("SCCACHE_RECACHE") {
        note(
            "SCCACHE_RECACHE is set: no compile uses the cache".to_owned(),
            "unset it once the cache is full again",
        );
    }
    if let Some(seconds) = get("SCCACHE_IDLE_TIMEOUT").filter(|seconds| *seconds != "0") {
        note(
            format!(
                "SCCACHE_IDLE_TIMEOUT is {seconds}: the server ends after so many idle seconds"
            ),
            "do not change it: the action sets it to 0",
        );
    }
    if environment.has("SCCACHE_SERVER_UDS") {
        note(
            "SCCACHE_SERVER_UDS is set: newer clients look for the server there, not at its port"
                .to_owned(),
            "unset it",
        );
    }
    let level = get("SCCACHE_LOG").unwrap_or_default();
    if level.contains("debug") || level.contains("trace") {
        note(
            format!("SCCACHE_LOG is {level}, which slows each compile"),
            "unset it when you are done debugging",
        );
    }
    found
}

/// A folder, and how much room there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeSpace {
    /// The use of the folder.
    pub what: &'static str,
    /// The folder.
    pub path: PathBuf,
    /// The bytes that may still be written; `None` if the system does not say.
    pub free: Option<u64>,
}

/// Below the first a build of any size fails; below the second a large one may.
const ROOM_ERROR: u64 = 512 << 20;
const ROOM_NOTED: u64 = 5 << 30;

/// Whether the disks have room for the files of a job.
pub fn room(spaces: &[FreeSpace]) -> Finding {
    let told = |space: &FreeSpace| {
        let free = space.free.map_or_else(|| "?".to_owned(), size);
        format!("{free} for {} ({})", space.what, space.path.display())
    };
    let known = spaces.iter().filter(|space| space.free.is_some());
    let Some(least) = known.min_by_key(|space| space.free) else {
        return Finding::note(
            "disk",
            "the system does not report the free space",
            "none needed, if the disk is not full",
        );
    };
    let fix = "free disk space, or lower `max-size` and SCCACHE_CACHE_SIZE";
    match least.free.unwrap_or_default() {
        free if free < ROOM_ERROR => Finding::error("disk", told(least), fix),
        free if free < ROOM_NOTED => Finding::note("disk", told(least), fix),
        _ => {
            let all: Vec<String> = spaces.iter().map(told).collect();
            Finding::ok("disk", all.join(", "))
        }
    }
}

/// Whether sccache's disk cache is on the disk of the runner's temporary folder, by the numbers
/// that the system gives the two disks. `None` if it is.
pub fn same_disk(cache: &Path, devices: Option<(u64, u64)>) -> Option<Finding> {
    let (cache_device, temporary) = devices?;
    (cache_device != temporary).then(|| {
        Finding::note(
            "disk",
            format!(
                "SCCACHE_DIR ({}) is on another disk than the runner's temporary folder",
                cache.display()
            ),
            "none needed, if that disk is as fast; a network disk is not",
        )
    })
}

/// Whether proxies are bypassed for this machine. The action's own parts ensure this themselves;
/// other tools use the variables.
pub fn proxies(environment: &Environment) -> Finding {
    let get = |name: &str| {
        let upper = environment.get(name);
        upper.or_else(|| environment.get(&name.to_lowercase()))
    };
    let mut proxies = ["HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"].into_iter();
    let Some(proxy) = proxies.find(|name| get(name).is_some()) else {
        return Finding::ok("proxy", "none");
    };
    let mut excepted = get("NO_PROXY")
        .unwrap_or_default()
        .split(',')
        .map(str::trim);
    if excepted.any(|host| matches!(host, "*" | "127.0.0.1" | "127.0.0.0/8")) {
        return Finding::ok("proxy", format!("{proxy} is set, but not for this machine"));
    }
    let names = ["ACTIONS_RESULTS_URL", "ACTIONS_CACHE_URL"];
    let mut services = names.iter().filter_map(|name| environment.get(name));
    let is_near = services.any(|url| url::Url::parse(url).is_ok_and(|url| is_on_loopback(&url)));
    let text = format!("{proxy} is set, but NO_PROXY does not contain 127.0.0.1");
    let fix = "add 127.0.0.1,localhost to NO_PROXY";
    if is_near {
        Finding::error(
            "proxy",
            format!("{text}, the address of the cache service"),
            fix,
        )
    } else {
        Finding::note("proxy", text, fix)
    }
}

/// Whether the tool cache can be written. `used` is the folder that stands in for it where not.
pub fn tool_cache(named: Option<&Path>, used: Result<PathBuf, io::Error>) -> Finding {
    let fix = "let the runner's user write it, or use the sccache on PATH with `install-from: \
                path`";
    match (named, used) {
        (_, Err(error)) => Finding::error(
            "tool cache",
            format!("no folder for tools is writable: {error}"),
            fix,
        ),
        (Some(named), Ok(used)) if named != used => Finding::note(
            "tool cache",
            format!(
                "{} is not writable; the action uses {}, and each job installs sccache again",
                named.display(),
                used.display()
            ),
            fix,
        ),
        (_, Ok(used)) => Finding::ok("tool cache", format!("{} is writable", used.display())),
    }
}

/// The fields of `dist/manifest.json` that this check needs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Manifest {
    /// The binaries by their platforms' names.
    pub binaries: BTreeMap<String, ManifestBinary>,
}

/// A binary of the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ManifestBinary {
    /// Its sha256, in hex.
    pub sha256: String,
}

/// Whether the action's binary is the released one. `digest` is the sha256 of `program`, `manifest`
/// the one beside it.
pub fn binary(
    program: &Path,
    platform: &str,
    manifest: Option<&Manifest>,
    digest: Result<String, io::Error>,
) -> Finding {
    let program = program.display();
    let Some(manifest) = manifest else {
        let text = format!("{program} has no manifest beside it, as after a build from source");
        return Finding::ok("binary", text);
    };
    let fix = "check out the action's release again; for your own binary run scripts/build-dist, \
                which writes the manifest";
    match (manifest.binaries.get(platform), digest) {
        (None, _) => {
            let text = format!("the manifest has no binary for {platform}");
            Finding::error("binary", text, fix)
        }
        (_, Err(error)) => Finding::error("binary", format!("{program}: {error}"), fix),
        (Some(known), Ok(digest)) if known.sha256 != digest => {
            let text = format!("{program} does not match the manifest");
            Finding::error("binary", text, fix)
        }
        (Some(_), Ok(_)) => Finding::ok("binary", "matches the manifest"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(mode: Mode) -> SetupInfo {
        SetupInfo {
            version: "0.16.0".to_owned(),
            mode,
            cache_location: String::new(),
            read_only: false,
            port: 4711,
            relay_port: None,
            program: "/dist/x".into(),
        }
    }

    fn environment(pairs: &[(&str, &str)]) -> Environment {
        pairs.iter().copied().collect()
    }

    const SERVICE: [(&str, &str); 2] = [
        ("ACTIONS_RESULTS_URL", "https://results.example/secret/"),
        ("ACTIONS_RUNTIME_TOKEN", "hunter2"),
    ];

    #[test]
    fn every_finding_that_is_not_as_it_should_be_says_what_to_do_and_no_secret() {
        let packed = about(Mode::Packed);
        for pairs in [
            &[][..],
            &SERVICE,
            &SERVICE[..1],
            &SERVICE[1..],
            &[("GITHUB_ACTIONS", "true")],
        ] {
            let environment = environment(pairs);
            for about in [None, Some(&packed)] {
                let findings = [
                    job(&environment, about),
                    service(&environment, about),
                    writing(&environment),
                    proxies(&environment),
                ];
                for finding in findings {
                    let is_ok = finding.level == Level::Ok;
                    assert_eq!(finding.fix.is_none(), is_ok, "{finding:?}");
                    let text = format!("{finding:?}");
                    assert!(
                        !text.contains("hunter2") && !text.contains("secret/"),
                        "{text}"
                    );
                }
            }
        }
    }

    #[test]
    fn half_a_cache_service_is_wrong_and_none_is_not() {
        let level = |pairs: &[(&str, &str)]| service(&environment(pairs), None).level;
        assert_eq!(level(&SERVICE), Level::Ok);
        assert_eq!(level(&SERVICE[..1]), Level::Error);
        assert_eq!(level(&SERVICE[1..]), Level::Error);
        assert_eq!(level(&[]), Level::Note);
        let unreadable = [("ACTIONS_RESULTS_URL", "file:///x"), SERVICE[1]];
        assert_eq!(level(&unreadable), Level::Error);
        let later = service(&Environment::default(), Some(&about(Mode::Packed)));
        assert_eq!(later.level, Level::Ok);
    }

    #[test]
    fn each_variable_that_is_in_the_way_is_named() {
        let packed = about(Mode::Packed);
        let local = about(Mode::Local);
        let old = SetupInfo {
            version: "0.10.0".to_owned(),
            ..about(Mode::Packed)
        };
        let right = [
            ("SCCACHE_SERVER_PORT", "4711"),
            ("RUSTC_WRAPPER", "/s/bin/sccache"),
            ("CARGO_INCREMENTAL", "0"),
            ("SCCACHE_DIR", "/s/disk-tier"),
            ("SCCACHE_IDLE_TIMEOUT", "0"),
        ];
        for (name, value, about, level) in [
            ("A", "b", &packed, Level::Ok),
            ("RUSTC_WRAPPER", "/usr/bin/ccache", &packed, Level::Error),
            ("CARGO_INCREMENTAL", "1", &packed, Level::Error),
            ("CARGO_INCREMENTAL", "true", &packed, Level::Error),
            ("SCCACHE_SERVER_PORT", "4226", &packed, Level::Error),
            ("SCCACHE_GHA_ENABLED", "true", &packed, Level::Ok),
            ("SCCACHE_DIR", "/elsewhere", &packed, Level::Error),
            ("SCCACHE_BUCKET", "b", &packed, Level::Note),
            ("SCCACHE_RECACHE", "1", &packed, Level::Note),
            ("SCCACHE_IDLE_TIMEOUT", "600", &packed, Level::Note),
            ("SCCACHE_SERVER_UDS", "/s", &packed, Level::Note),
            ("SCCACHE_LOG", "sccache=debug", &packed, Level::Note),
            ("SCCACHE_DIR", "/elsewhere", &local, Level::Ok),
            ("SCCACHE_DIR", "/elsewhere", &old, Level::Ok),
            ("SCCACHE_GHA_ENABLED", "false", &packed, Level::Ok),
            ("RUSTC_WRAPPER", "C:\\x\\sccache.exe", &packed, Level::Ok),
        ] {
            let mut environment = environment(&right);
            environment.set(name, value);
            let disk_tier = Path::new("/s/disk-tier");
            let found = variables(&environment, Some(ExpectedSetup { about, disk_tier }));
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].level, level, "{found:?}");
            let is_named = found[0].text.contains(name);
            assert!(level == Level::Ok || is_named, "{found:?}");
        }
        // The check does not judge how cargo runs without sccache.
        let alone = environment(&[("CARGO_INCREMENTAL", "1")]);
        assert_eq!(variables(&alone, None)[0].level, Level::Ok);
    }

    #[test]
    fn a_clock_is_judged_by_how_far_it_is_off_in_either_direction() {
        let now = SystemTime::now();
        for (seconds, level) in [(5, Level::Ok), (60, Level::Note), (900, Level::Error)] {
            let skew = Duration::from_secs(seconds);
            assert_eq!(clock(Some(now + skew), now).level, level);
            assert_eq!(clock(Some(now - skew), now).level, level);
        }
        assert_eq!(clock(None, now).level, Level::Note);
    }

    #[test]
    fn an_sccache_is_judged_by_whether_it_runs_and_was_tested() {
        let level = |version: &str| {
            let version = Version::parse(version).map_err(|error| error.to_string());
            sccache(Some((Path::new("/x"), version)), true).level
        };
        assert_eq!(level("0.16.3"), Level::Ok);
        assert_eq!(level("0.4.0-pre.6"), Level::Ok);
        assert_eq!(level("0.3.3"), Level::Note);
        assert_eq!(level("1.0.0"), Level::Note);
        assert_eq!(level("none"), Level::Error);
        assert_eq!(
            sccache(None::<(_, Result<_, io::Error>)>, true).level,
            Level::Error
        );
        assert_eq!(
            sccache(None::<(_, Result<_, io::Error>)>, false).level,
            Level::Note
        );
    }

    #[test]
    fn the_fullest_disk_is_the_one_that_counts() {
        let space = |free| FreeSpace {
            what: "cargo",
            path: "/c".into(),
            free,
        };
        let level = |least| room(&[space(Some(100 << 30)), space(least)]).level;
        assert_eq!(level(Some(50 << 30)), Level::Ok);
        assert_eq!(level(None), Level::Ok);
        assert_eq!(level(Some(1 << 30)), Level::Note);
        assert_eq!(level(Some(1 << 20)), Level::Error);
        assert_eq!(room(&[space(None)]).level, Level::Note);
        assert!(same_disk(Path::new("/c"), Some((1, 2))).is_some());
        assert!(same_disk(Path::new("/c"), Some((1, 1))).is_none());
    }

    #[test]
    fn a_proxy_is_kept_from_this_machine_or_it_is_said() {
        let level = |pairs: &[(&str, &str)]| proxies(&environment(pairs)).level;
        let proxy = ("https_proxy", "http://proxy.example");
        let near = ("ACTIONS_RESULTS_URL", "http://127.0.0.1:9/");
        assert_eq!(level(&[near]), Level::Ok);
        assert_eq!(level(&[proxy]), Level::Note);
        assert_eq!(level(&[proxy, near]), Level::Error);
        let excepted = ("NO_PROXY", "a.example, 127.0.0.1");
        assert_eq!(level(&[proxy, near, excepted]), Level::Ok);
    }

    #[test]
    fn a_binary_is_the_one_of_the_manifest_or_it_is_said() {
        let sha256 = "aa".to_owned();
        let binaries = [("linux-x64".to_owned(), ManifestBinary { sha256 })].into();
        let manifest = Manifest { binaries };
        let level = |platform, manifest, digest: &str| {
            binary(Path::new("/x"), platform, manifest, Ok(digest.to_owned())).level
        };
        assert_eq!(level("linux-x64", Some(&manifest), "aa"), Level::Ok);
        assert_eq!(level("linux-x64", Some(&manifest), "bb"), Level::Error);
        assert_eq!(level("linux-arm64", Some(&manifest), "aa"), Level::Error);
        assert_eq!(level("linux-x64", None, "bb"), Level::Ok);
    }

    #[test]
    fn a_server_that_is_gone_is_wrong_only_where_there_should_be_one() {
        let log = Path::new("/s/log");
        let level = |state: &ServerState, log| server(state, 1, log).level;
        assert_eq!(level(&ServerState::Absent, Some(log)), Level::Error);
        assert_eq!(level(&ServerState::Absent, None), Level::Note);
        let silent = ServerState::Silent("no".to_owned());
        assert_eq!(level(&silent, None), Level::Error);
        let answers = ServerState::Answers("disk".to_owned());
        assert_eq!(level(&answers, None), Level::Ok);
        assert_eq!(relay(1, false, log).level, Level::Error);
        assert_eq!(relay(1, true, log).level, Level::Ok);
    }

    #[test]
    fn a_look_up_that_is_slow_or_fails_is_said() {
        assert_eq!(
            look_up(Ok::<_, io::Error>(Duration::from_millis(40))).level,
            Level::Ok
        );
        assert_eq!(
            look_up(Ok::<_, io::Error>(Duration::from_secs(3))).level,
            Level::Note
        );
        assert_eq!(look_up(Err("no route")).level, Level::Error);
    }

    #[test]
    fn a_tool_cache_that_cannot_be_written_costs_each_job_an_installation() {
        let named = Path::new("/tools");
        let level = |used| tool_cache(Some(named), used).level;
        assert_eq!(level(Ok(named.to_owned())), Level::Ok);
        assert_eq!(level(Ok("/tmp/tools".into())), Level::Note);
        assert_eq!(
            level(Err(io::ErrorKind::ReadOnlyFilesystem.into())),
            Level::Error
        );
    }
}
