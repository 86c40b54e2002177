//! What the facts mean: functions of values, each a line for the person who asked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use semver::Version;
use serde::{Deserialize, Serialize};

use crate::action::environment::Environment;
use crate::action::mode::{Mode, external_storage, is_on};
use crate::action::scopes;
use crate::action::state::About;
use crate::github::cache_client::{Endpoint, Protocol};
use crate::http_client::is_on_loopback;
use crate::install::NEWEST_TESTED;
use crate::words::{size, time};

/// How grave a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It may be meant so, or costs little.
    Note,
    /// The cache does not work, or not as it could.
    Wrong,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, in a word or two.
    pub check: &'static str,
    /// How grave it is.
    pub level: Level,
    /// What was found. Never a token.
    pub text: String,
    /// What can be done, where it is not as it should be.
    pub mend: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, text: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            text: text.into(),
            mend: None,
        }
    }

    fn note(check: &'static str, text: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            level: Level::Note,
            mend: Some(mend.into()),
            ..Self::ok(check, text)
        }
    }

    fn wrong(check: &'static str, text: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            level: Level::Wrong,
            ..Self::note(check, text, mend)
        }
    }
}

/// Whether this is a job, and whether the action has run in it.
pub fn job(environment: &Environment, about: Option<&About>) -> Finding {
    let is_job = environment.get("GITHUB_ACTIONS") == Some("true");
    match (is_job, about) {
        (_, Some(about)) => Finding::ok(
            "job",
            format!("the action has set up sccache in mode {}", about.mode),
        ),
        (true, None) => Finding::wrong(
            "job",
            "this is a job, and the action has not set up sccache in it",
            "put the action before this step; if it is there, its own log says why it gave up",
        ),
        (false, None) => Finding::note(
            "job",
            "this is no job (GITHUB_ACTIONS is not `true`)",
            "run it in a step after the action to have all of it checked",
        ),
    }
}

/// Whether the runner has given a cache service's address and token. Neither is said.
pub fn service(environment: &Environment, about: Option<&About>) -> Finding {
    const CHECK: &str = "cache service";
    let token = environment.has("ACTIONS_RUNTIME_TOKEN");
    let address = environment.has("ACTIONS_RESULTS_URL") || environment.has("ACTIONS_CACHE_URL");
    match (address, token) {
        (true, true) if Endpoint::of(environment).is_none() => Finding::wrong(
            CHECK,
            "the address in ACTIONS_RESULTS_URL or ACTIONS_CACHE_URL is no URL of http",
            "mend it where the runner is configured",
        ),
        (true, true) => Finding::ok(CHECK, "its address and a token are here"),
        (true, false) if Endpoint::of(environment).is_some() => Finding::ok(
            CHECK,
            "its address is here, and no token, which version 1 may do without",
        ),
        (false, false) if about.is_some_and(|about| about.mode.needs_cache_service()) => {
            Finding::ok(
                CHECK,
                "its address and token went to the action and are not in this step, as it should be",
            )
        }
        (false, false) => Finding::note(
            CHECK,
            "neither its address nor a token is here",
            "runners give them to actions only; a service of your own is named by \
             ACTIONS_RESULTS_URL and ACTIONS_RUNTIME_TOKEN in the runner's environment",
        ),
        (true, false) => Finding::wrong(
            CHECK,
            "its address is here, and no token (ACTIONS_RUNTIME_TOKEN)",
            "give both, or neither",
        ),
        (false, true) => Finding::wrong(
            CHECK,
            "a token is here, and no address (ACTIONS_RESULTS_URL or ACTIONS_CACHE_URL)",
            "give both, or neither",
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

/// A look-up that takes longer is noted: a job waits for several.
const SLOW: Duration = Duration::from_secs(2);

/// How a look-up went: how long it took, or why there was no answer.
pub fn look_up(result: Result<Duration, String>) -> Finding {
    match result {
        Ok(took) if took < SLOW => Finding::ok("look-up", format!("answered in {}", time(took))),
        Ok(took) => Finding::note(
            "look-up",
            format!("answered in {}, which is slow", time(took)),
            "look for a proxy on the way, or run a cache service nearer to the runner",
        ),
        Err(why) => Finding::wrong(
            "look-up",
            why,
            "see whether the runner reaches the service, through which proxy, and whether the \
             job's token is still good (it is for about six hours)",
        ),
    }
}

/// Whether the job's token lets it write.
pub fn writing(environment: &Environment) -> Finding {
    if scopes::token_is_read_only(environment) {
        return Finding::note(
            "writing",
            "the token may only read the cache",
            "GitHub gives such tokens to jobs on the default branch that outsiders can start, such \
             as those of pull_request_target; jobs of a push fill the cache",
        );
    }
    match scopes::Scopes::of(environment, false).write {
        Some(scope) => Finding::ok("writing", format!("the token may write, to {scope}")),
        None => Finding::ok("writing", "the token may write"),
    }
}

/// A clock that is off by the first is worth a word; by the second it spoils what is signed for a
/// time.
const SKEW_NOTED: Duration = Duration::from_secs(30);
const SKEW_WRONG: Duration = Duration::from_secs(300);

/// How far this machine's clock is from the service's, which says its time in whole seconds.
pub fn clock(service: Option<SystemTime>, here: SystemTime) -> Finding {
    let Some(service) = service else {
        return Finding::note(
            "clock",
            "the service does not tell its time",
            "nothing, if this machine's clock is set by NTP",
        );
    };
    let skew = here.duration_since(service);
    let skew = skew.unwrap_or_else(|error| error.duration());
    let text = format!("{} off the service's", time(skew));
    let mend = "have the clock set by NTP: tokens and signed URLs are good for a time only";
    match skew {
        skew if skew < SKEW_NOTED => Finding::ok("clock", "as the service's"),
        skew if skew < SKEW_WRONG => Finding::note("clock", text, mend),
        _ => Finding::wrong("clock", text, mend),
    }
}

/// The oldest sccache that is tested: Debian's.
const OLDEST: &str = "0.4.0-pre.6";

/// Which sccache there is: its path with its version, or with why that is not known.
pub fn sccache(found: Option<(&Path, Result<Version, String>)>, is_set_up: bool) -> Finding {
    const CHECK: &str = "sccache";
    let (path, version) = match found {
        Some((path, Ok(version))) => (path, version),
        Some((path, Err(why))) => {
            return Finding::wrong(
                CHECK,
                format!("{} does not run: {why}", path.display()),
                "remove it, so that the action installs another",
            );
        }
        None if is_set_up => {
            return Finding::wrong(
                CHECK,
                "the one that the action installed is no longer there",
                "see which step removes it from the tool cache",
            );
        }
        None => {
            return Finding::note(
                CHECK,
                "there is none on PATH",
                "nothing: the action installs it",
            );
        }
    };
    let text = format!("{version}, {}", path.display());
    let known = |text: &str| Version::parse(text).ok();
    if known(OLDEST).is_some_and(|oldest| version < oldest) {
        let mend = format!("take a newer one: {OLDEST} is the oldest that is tested");
        return Finding::note(CHECK, text, mend);
    }
    let minor = |version: &Version| (version.major, version.minor);
    if minor(&version) > minor(&NEWEST_TESTED) {
        let mend = format!("nothing, if it works: {NEWEST_TESTED} is the newest that is tested");
        return Finding::note(CHECK, text, mend);
    }
    Finding::ok(CHECK, text)
}

/// How a server was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerState {
    /// Nothing listens.
    Absent,
    /// It listens and does not answer, for this reason.
    Silent(String),
    /// It answers, and keeps objects there.
    Answers(String),
}

/// Whether sccache's server answers. `log` is where it writes what goes wrong, where the action has
/// started it.
pub fn server(state: &ServerState, port: u16, log: Option<&Path>) -> Finding {
    const CHECK: &str = "server";
    let by_log = log.map(|log| format!("{} says what happened to it", log.display()));
    match (state, by_log) {
        (ServerState::Answers(location), _) => {
            Finding::ok(CHECK, format!("answers on port {port}; {location}"))
        }
        (ServerState::Silent(why), by_log) => Finding::wrong(
            CHECK,
            format!("what listens on port {port} does not answer as sccache does: {why}"),
            by_log.unwrap_or_else(|| {
                "see which process has the port, or set SCCACHE_SERVER_PORT to another".to_owned()
            }),
        ),
        (ServerState::Absent, Some(by_log)) => Finding::wrong(
            CHECK,
            format!("nothing listens on port {port}, where it should be"),
            by_log,
        ),
        (ServerState::Absent, None) => Finding::note(
            CHECK,
            format!("none listens on port {port}"),
            "nothing: the action starts it",
        ),
    }
}

/// Whether the relay is there.
pub fn relay(port: u16, is_listening: bool, log: &Path) -> Finding {
    match is_listening {
        true => Finding::ok("relay", format!("listens on port {port}")),
        false => Finding::wrong(
            "relay",
            format!("nothing listens on port {port}, where it should be"),
            format!(
                "{} says what happened to it; what sccache has on its disk is saved by the post \
                 step all the same",
                log.display()
            ),
        ),
    }
}

/// The set-up, as far as variables can be in its way.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// What the set-up left.
    pub about: &'a About,
    /// The folder of sccache's disk cache in front of the relay.
    pub disk_level: &'a Path,
}

fn is_sccache(program: &str) -> bool {
    // Also Windows' paths, on any system.
    let name = program.rsplit(['/', '\\']).next().unwrap_or(program);
    name.strip_suffix(".exe").unwrap_or(name) == "sccache"
}

/// Variables that keep sccache from what it is there for: a line each, or one that says that there
/// is none.
pub fn variables(environment: &Environment, wanted: Option<Wanted<'_>>) -> Vec<Finding> {
    let mut found = of_cargo(environment);
    if let Some(wanted) = wanted {
        found.extend(of_set_up(environment, wanted));
    }
    found.extend(of_sccache(environment));
    if found.is_empty() {
        found.push(Finding::ok(VARIABLES, "none is in the way"));
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
        return vec![Finding::wrong(
            VARIABLES,
            format!("RUSTC_WRAPPER is {wrapper}, so cargo does not call sccache"),
            "unset it before the action runs, or have it call what SCCACHE_PATH names",
        )];
    }
    let incremental = get("CARGO_INCREMENTAL").filter(|value| is_on(value));
    let incremental = incremental.map(|value| {
        Finding::wrong(
            VARIABLES,
            format!("CARGO_INCREMENTAL is {value}, and sccache refuses incremental compiles"),
            "set it to 0",
        )
    });
    incremental.into_iter().collect()
}

fn of_set_up(environment: &Environment, wanted: Wanted<'_>) -> Vec<Finding> {
    let Wanted { about, disk_level } = wanted;
    let get = |name| environment.get(name);
    let mut found = Vec::new();
    let port = about.port.to_string();
    if get("SCCACHE_SERVER_PORT") != Some(port.as_str()) {
        found.push(Finding::wrong(
            VARIABLES,
            format!(
                "SCCACHE_SERVER_PORT is {}, and the action's server has {port}",
                get("SCCACHE_SERVER_PORT").unwrap_or("not set")
            ),
            "leave it to the action",
        ));
    }
    let folder = environment.path("SCCACHE_DIR");
    // Older versions have no disk cache in front, and then the user's is in nobody's way.
    let in_front = about.mode == Mode::Packed && disk_level_is_used(about);
    if let Some(folder) = folder.filter(|folder| in_front && folder != disk_level) {
        found.push(Finding::wrong(
            VARIABLES,
            format!(
                "SCCACHE_DIR is {}, and the relay saves what is in {}",
                folder.display(),
                disk_level.display()
            ),
            "leave it to the action",
        ));
    }
    if let Some(name) = external_storage(environment).filter(|_| about.mode != Mode::External) {
        found.push(Finding::note(
            VARIABLES,
            format!("{name} is set, and not used in mode {}", about.mode),
            "unset it, or set the input mode to external",
        ));
    }
    found
}

fn disk_level_is_used(about: &About) -> bool {
    let version = Version::parse(&about.version);
    version.is_ok_and(|version| version >= crate::action::mode::CHAIN_SINCE)
}

fn of_sccache(environment: &Environment) -> Vec<Finding> {
    let get = |name| environment.get(name);
    let mut found = Vec::new();
    let mut note = |text: String, mend: &str| found.push(Finding::note(VARIABLES, text, mend));
    if environment.has("SCCACHE_RECACHE") {
        note(
            "SCCACHE_RECACHE is set: nothing is answered from the cache".to_owned(),
            "unset it once the cache is filled anew",
        );
    }
    if let Some(seconds) = get("SCCACHE_IDLE_TIMEOUT").filter(|seconds| *seconds != "0") {
        note(
            format!("SCCACHE_IDLE_TIMEOUT is {seconds}: so many idle seconds end the server"),
            "leave it to the action, which sets it to 0",
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
            format!("SCCACHE_LOG is {level}, which costs each compile time"),
            "unset it once you know what you wanted to",
        );
    }
    found
}

/// A folder, and how much room there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// What is kept there.
    pub what: &'static str,
    /// The folder.
    pub path: PathBuf,
    /// The bytes that may still be written; `None` where the system does not tell.
    pub free: Option<u64>,
}

/// Below the first a build of any size fails; below the second a large one may.
const ROOM_WRONG: u64 = 512 << 20;
const ROOM_NOTED: u64 = 5 << 30;

/// Whether there is room where files are written.
pub fn room(spaces: &[Space]) -> Finding {
    let told = |space: &Space| {
        let free = space.free.map_or_else(|| "?".to_owned(), size);
        format!("{free} for {} ({})", space.what, space.path.display())
    };
    let known = spaces.iter().filter(|space| space.free.is_some());
    let Some(least) = known.min_by_key(|space| space.free) else {
        return Finding::note(
            "disk",
            "the system does not say how much room there is",
            "nothing, if the disk is not full",
        );
    };
    let mend = "remove what the job does not need, or lower `max-size` and SCCACHE_CACHE_SIZE";
    match least.free.unwrap_or_default() {
        free if free < ROOM_WRONG => Finding::wrong("disk", told(least), mend),
        free if free < ROOM_NOTED => Finding::note("disk", told(least), mend),
        _ => {
            let all: Vec<String> = spaces.iter().map(told).collect();
            Finding::ok("disk", all.join(", "))
        }
    }
}

/// Whether sccache's disk cache is on the disk of the runner's temporary folder, by the numbers that
/// the system gives the two disks. Nothing where it is.
pub fn same_disk(cache: &Path, devices: Option<(u64, u64)>) -> Option<Finding> {
    let (cache_device, temporary) = devices?;
    (cache_device != temporary).then(|| {
        Finding::note(
            "disk",
            format!(
                "SCCACHE_DIR ({}) is on another disk than the runner's temporary folder",
                cache.display()
            ),
            "nothing, if that disk is as fast: a network's is not",
        )
    })
}

/// Whether a proxy is kept away from what is on this machine. The action's own parts see to that by
/// themselves; other tools go by the variables.
pub fn proxies(environment: &Environment) -> Finding {
    let get = |name: &str| {
        let upper = environment.get(name);
        upper.or_else(|| environment.get(&name.to_lowercase()))
    };
    let mut proxies = ["HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"].into_iter();
    let Some(proxy) = proxies.find(|name| get(name).is_some()) else {
        return Finding::ok("proxy", "none");
    };
    let excepted = get("NO_PROXY").unwrap_or_default();
    let mut excepted = excepted.split(',').map(str::trim);
    if excepted.any(|host| matches!(host, "*" | "127.0.0.1" | "127.0.0.0/8")) {
        return Finding::ok("proxy", format!("{proxy} is set, and not for this machine"));
    }
    let names = ["ACTIONS_RESULTS_URL", "ACTIONS_CACHE_URL"];
    let mut services = names.iter().filter_map(|name| environment.get(name));
    let is_near = services.any(|url| url::Url::parse(url).is_ok_and(|url| is_on_loopback(&url)));
    let text = format!("{proxy} is set, and NO_PROXY does not except 127.0.0.1");
    let mend = "add 127.0.0.1,localhost to NO_PROXY";
    match is_near {
        true => Finding::wrong("proxy", format!("{text}, where the cache service is"), mend),
        false => Finding::note("proxy", text, mend),
    }
}

/// Whether the tool cache can be written. `used` is the folder that stands in for it where not.
pub fn tool_cache(named: Option<&Path>, used: Result<PathBuf, String>) -> Finding {
    let mend = "let the runner's user write it, or have the action find sccache on PATH with \
                `install-from: path`";
    match (named, used) {
        (_, Err(why)) => Finding::wrong("tool cache", why, mend),
        (Some(named), Ok(used)) if named != used => Finding::note(
            "tool cache",
            format!(
                "{} cannot be written; {} is used, and each job installs sccache anew",
                named.display(),
                used.display()
            ),
            mend,
        ),
        (_, Ok(used)) => Finding::ok("tool cache", format!("{} can be written", used.display())),
    }
}

/// `dist/manifest.json`, as far as it is of interest here.
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

/// Whether the action's binary is the one it was released with. `digest` is the sha256 of `program`,
/// `manifest` the one beside it.
pub fn binary(
    program: &Path,
    platform: &str,
    manifest: Option<&Manifest>,
    digest: Result<String, String>,
) -> Finding {
    let program = program.display();
    let Some(manifest) = manifest else {
        let text = format!("{program} has no manifest beside it, as what is built from source");
        return Finding::ok("binary", text);
    };
    let mend = "check out the action's release anew; a binary of your own comes with the manifest \
                that scripts/build-dist writes";
    match (manifest.binaries.get(platform), digest) {
        (None, _) => {
            let text = format!("the manifest knows none for {platform}");
            Finding::wrong("binary", text, mend)
        }
        (_, Err(why)) => Finding::wrong("binary", why, mend),
        (Some(known), Ok(digest)) if known.sha256 != digest => {
            let text = format!("{program} is not the one in the manifest");
            Finding::wrong("binary", text, mend)
        }
        (Some(_), Ok(_)) => Finding::ok("binary", "as the manifest has it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(mode: Mode) -> About {
        About {
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
                    assert_eq!(finding.mend.is_none(), is_ok, "{finding:?}");
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
        assert_eq!(level(&SERVICE[..1]), Level::Wrong);
        assert_eq!(level(&SERVICE[1..]), Level::Wrong);
        assert_eq!(level(&[]), Level::Note);
        let unreadable = [("ACTIONS_RESULTS_URL", "file:///x"), SERVICE[1]];
        assert_eq!(level(&unreadable), Level::Wrong);
        let later = service(&Environment::default(), Some(&about(Mode::Packed)));
        assert_eq!(later.level, Level::Ok);
    }

    #[test]
    fn each_variable_that_is_in_the_way_is_named() {
        let packed = about(Mode::Packed);
        let local = about(Mode::Local);
        let old = About {
            version: "0.10.0".to_owned(),
            ..about(Mode::Packed)
        };
        let right = [
            ("SCCACHE_SERVER_PORT", "4711"),
            ("RUSTC_WRAPPER", "/s/bin/sccache"),
            ("CARGO_INCREMENTAL", "0"),
            ("SCCACHE_DIR", "/s/disk-level"),
            ("SCCACHE_IDLE_TIMEOUT", "0"),
        ];
        for (name, value, about, level) in [
            ("A", "b", &packed, Level::Ok),
            ("RUSTC_WRAPPER", "/usr/bin/ccache", &packed, Level::Wrong),
            ("CARGO_INCREMENTAL", "1", &packed, Level::Wrong),
            ("CARGO_INCREMENTAL", "true", &packed, Level::Wrong),
            ("SCCACHE_SERVER_PORT", "4226", &packed, Level::Wrong),
            ("SCCACHE_GHA_ENABLED", "true", &packed, Level::Ok),
            ("SCCACHE_DIR", "/elsewhere", &packed, Level::Wrong),
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
            let disk_level = Path::new("/s/disk-level");
            let found = variables(&environment, Some(Wanted { about, disk_level }));
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].level, level, "{found:?}");
            let is_named = found[0].text.contains(name);
            assert!(level == Level::Ok || is_named, "{found:?}");
        }
        // What cargo does without sccache is its own business.
        let alone = environment(&[("CARGO_INCREMENTAL", "1")]);
        assert_eq!(variables(&alone, None)[0].level, Level::Ok);
    }

    #[test]
    fn a_clock_is_judged_by_how_far_it_is_off_in_either_direction() {
        let now = SystemTime::now();
        for (seconds, level) in [(5, Level::Ok), (60, Level::Note), (900, Level::Wrong)] {
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
        assert_eq!(level("none"), Level::Wrong);
        assert_eq!(sccache(None, true).level, Level::Wrong);
        assert_eq!(sccache(None, false).level, Level::Note);
    }

    #[test]
    fn the_fullest_disk_is_the_one_that_counts() {
        let space = |free| Space {
            what: "cargo",
            path: "/c".into(),
            free,
        };
        let level = |least| room(&[space(Some(100 << 30)), space(least)]).level;
        assert_eq!(level(Some(50 << 30)), Level::Ok);
        assert_eq!(level(None), Level::Ok);
        assert_eq!(level(Some(1 << 30)), Level::Note);
        assert_eq!(level(Some(1 << 20)), Level::Wrong);
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
        assert_eq!(level(&[proxy, near]), Level::Wrong);
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
        assert_eq!(level("linux-x64", Some(&manifest), "bb"), Level::Wrong);
        assert_eq!(level("linux-arm64", Some(&manifest), "aa"), Level::Wrong);
        assert_eq!(level("linux-x64", None, "bb"), Level::Ok);
    }

    #[test]
    fn a_server_that_is_gone_is_wrong_only_where_there_should_be_one() {
        let log = Path::new("/s/log");
        let level = |state: &ServerState, log| server(state, 1, log).level;
        assert_eq!(level(&ServerState::Absent, Some(log)), Level::Wrong);
        assert_eq!(level(&ServerState::Absent, None), Level::Note);
        let silent = ServerState::Silent("no".to_owned());
        assert_eq!(level(&silent, None), Level::Wrong);
        let answers = ServerState::Answers("disk".to_owned());
        assert_eq!(level(&answers, None), Level::Ok);
        assert_eq!(relay(1, false, log).level, Level::Wrong);
        assert_eq!(relay(1, true, log).level, Level::Ok);
    }

    #[test]
    fn a_look_up_that_is_slow_or_fails_is_said() {
        assert_eq!(look_up(Ok(Duration::from_millis(40))).level, Level::Ok);
        assert_eq!(look_up(Ok(Duration::from_secs(3))).level, Level::Note);
        assert_eq!(look_up(Err("no route".to_owned())).level, Level::Wrong);
    }

    #[test]
    fn a_tool_cache_that_cannot_be_written_costs_each_job_an_installation() {
        let named = Path::new("/tools");
        let level = |used| tool_cache(Some(named), used).level;
        assert_eq!(level(Ok(named.to_owned())), Level::Ok);
        assert_eq!(level(Ok("/tmp/tools".into())), Level::Note);
        assert_eq!(level(Err("read-only".to_owned())), Level::Wrong);
    }
}
