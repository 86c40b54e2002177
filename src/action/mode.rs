//! Where sccache keeps its objects in this job, and what its server is told about that.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::action::environment::Environment;
use crate::github::cache_client::Endpoint;
use crate::http_client::is_on_loopback;

/// Where sccache keeps its objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// In GitHub's cache service (or one that speaks like it), many objects in a cache entry.
    Packed,
    /// In the same, one cache entry per object.
    Direct,
    /// On this machine's disk.
    Local,
    /// Where sccache's own settings say: a bucket, Redis, WebDAV and so on.
    External,
}

impl Mode {
    /// The modes by the names that the `mode` input takes.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("packed", Self::Packed),
        ("direct", Self::Direct),
        ("local", Self::Local),
        ("external", Self::External),
    ];

    /// Whether objects go to GitHub's cache service or its like.
    pub fn needs_cache_service(self) -> bool {
        matches!(self, Self::Packed | Self::Direct)
    }

    /// The mode called `name`.
    pub fn named(name: &str) -> Option<Self> {
        Self::NAMES
            .into_iter()
            .find_map(|(known, mode)| (known == name).then_some(mode))
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES
            .into_iter()
            .find_map(|(name, mode)| (mode == *self).then_some(name));
        formatter.write_str(name.unwrap_or_default())
    }
}

/// The variable with the path of sccache's configuration file.
pub const CONFIGURATION_FILE: &str = "SCCACHE_CONF";

/// The variables that name a storage of the user's own (`src/config.rs` of sccache). Each is enough
/// to make sccache use it.
const EXTERNAL_STORAGE: [&str; 13] = [
    "SCCACHE_AZURE_CONNECTION_STRING",
    "SCCACHE_BUCKET",
    CONFIGURATION_FILE,
    "SCCACHE_COS_BUCKET",
    "SCCACHE_GCS_BUCKET",
    "SCCACHE_MEMCACHED",
    "SCCACHE_MEMCACHED_ENDPOINT",
    "SCCACHE_MULTILEVEL_CHAIN",
    "SCCACHE_OSS_BUCKET",
    "SCCACHE_REDIS",
    "SCCACHE_REDIS_CLUSTER_ENDPOINTS",
    "SCCACHE_REDIS_ENDPOINT",
    "SCCACHE_WEBDAV_ENDPOINT",
];

/// By which variable each storage but the disk is only read (`src/config.rs` of sccache, since 0.16).
const READ_WRITE_MODES: [&str; 9] = [
    "SCCACHE_AZURE_RW_MODE",
    "SCCACHE_COS_RW_MODE",
    "SCCACHE_GCS_RW_MODE",
    "SCCACHE_GHA_RW_MODE",
    "SCCACHE_MEMCACHED_RW_MODE",
    "SCCACHE_OSS_RW_MODE",
    "SCCACHE_REDIS_RW_MODE",
    "SCCACHE_S3_RW_MODE",
    "SCCACHE_WEBDAV_RW_MODE",
];

/// A mode, and what the user should hear about the choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The mode to try.
    pub mode: Mode,
    /// Why it is not the one that was asked for, in words that follow "because".
    pub warning: Option<String>,
}

/// The mode of this job: the one asked for, else what the environment says.
pub fn choose(requested: Option<Mode>, environment: &Environment) -> Choice {
    let wanted = requested.unwrap_or_else(|| by_environment(environment));
    if wanted.needs_cache_service() && !has_cache_service(environment) {
        return Choice {
            mode: Mode::Local,
            warning: Some(
                "the runner gave this step no cache service (ACTIONS_RESULTS_URL with \
                 ACTIONS_RUNTIME_TOKEN, or ACTIONS_CACHE_URL)"
                    .to_owned(),
            ),
        };
    }
    Choice {
        mode: wanted,
        warning: None,
    }
}

/// The first variable that names a storage of the user's own.
pub fn external_storage(environment: &Environment) -> Option<&'static str> {
    EXTERNAL_STORAGE
        .into_iter()
        .find(|name| environment.has(name))
}

fn by_environment(environment: &Environment) -> Mode {
    if external_storage(environment).is_some() {
        return Mode::External;
    }
    match environment.get("SCCACHE_GHA_ENABLED") {
        // What the user has switched off stays off.
        Some(value) if !is_on(value) => Mode::Local,
        _ => Mode::Packed,
    }
}

/// How sccache reads a switch (`bool_from_env_var` in its `src/config.rs`).
pub fn is_on(value: &str) -> bool {
    matches!(value.to_lowercase().as_str(), "true" | "on" | "1")
}

/// Whether there is one, or an address that cannot be understood, of which the relay has its own say.
fn has_cache_service(environment: &Environment) -> bool {
    let address = environment.has("ACTIONS_RESULTS_URL") || environment.has("ACTIONS_CACHE_URL");
    (address && environment.has("ACTIONS_RUNTIME_TOKEN")) || Endpoint::of(environment).is_some()
}

/// The first sccache that can have a disk cache in front of another storage.
pub const CHAIN_SINCE: semver::Version = semver::Version::new(0, 15, 0);

/// The first sccache that can be told not to write to GitHub's cache.
pub const READ_ONLY_SINCE: semver::Version = semver::Version::new(0, 16, 0);

/// What the sccache server is started with besides what every server gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage<'a> {
    /// Where objects are kept.
    pub mode: Mode,
    /// The user's namespace: objects of another are not seen.
    pub namespace: Option<&'a str>,
    /// Whether objects are only read.
    pub read_only: bool,
    /// The relay, in mode `packed`.
    pub relay: Option<RelayAccess<'a>>,
}

/// How sccache's server reaches the relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayAccess<'a> {
    /// Its URL, with a slash at the end.
    pub url: String,
    /// What it lets in.
    pub token: &'a str,
    /// The folder of a disk cache in front of it, where sccache can have one.
    pub disk_level: Option<PathBuf>,
}

/// The environment of the sccache server: the step's own, without what only the runner and this
/// action should see, and with what `storage` needs.
///
/// The server compiles with the environment that each client sends along, so nothing is missed by
/// what is taken out here.
pub fn server_environment(environment: &Environment, storage: &Storage<'_>) -> Environment {
    let mut server = environment.for_programs();
    server.remove("SCCACHE_GHA_ENABLED");
    if storage.mode != Mode::External {
        for name in EXTERNAL_STORAGE {
            server.remove(name);
        }
    }
    if storage.mode == Mode::Packed {
        use_relay(&mut server, storage);
    } else if storage.mode == Mode::Direct || chain_has_githubs_cache(environment, storage.mode) {
        use_githubs_cache(&mut server, environment, storage);
    }
    // The relay knows by itself what may be written.
    if storage.read_only && storage.mode != Mode::Packed {
        only_read(&mut server, storage.mode);
    }
    if !server.has("SCCACHE_IDLE_TIMEOUT") {
        server.set("SCCACHE_IDLE_TIMEOUT", "0");
    }
    server
}

/// Has the server write to no storage. What sccache's configuration file names, no variable reaches.
fn only_read(server: &mut Environment, mode: Mode) {
    for name in READ_WRITE_MODES {
        server.set(name, "READ_ONLY");
    }
    // By this variable alone sccache would take its own disk in place of one that the file names.
    if mode == Mode::Local || !server.has(CONFIGURATION_FILE) {
        server.set("SCCACHE_LOCAL_RW_MODE", "READ_ONLY");
    }
}

/// Whether the user's own chain of storages (sccache 0.15 and newer) has GitHub's cache in it.
fn chain_has_githubs_cache(environment: &Environment, mode: Mode) -> bool {
    mode == Mode::External
        && environment
            .get("SCCACHE_MULTILEVEL_CHAIN")
            .is_some_and(|chain| chain.split(',').any(|level| level.trim() == "gha"))
}

/// Points the server at the relay, whatever service is behind that.
fn use_relay(server: &mut Environment, storage: &Storage<'_>) {
    let Some(relay) = &storage.relay else {
        return;
    };
    server.set("SCCACHE_GHA_ENABLED", "true");
    // The relay speaks both versions. opendal asks for the second with these two.
    server.set("ACTIONS_CACHE_SERVICE_V2", "on");
    server.set("GITHUB_SERVER_URL", "https://github.com");
    server.set("ACTIONS_RESULTS_URL", &*relay.url);
    server.set("ACTIONS_CACHE_URL", &*relay.url);
    server.set("ACTIONS_RUNTIME_TOKEN", relay.token);
    // The relay knows what may be written and keeps namespaces apart; a read-only sccache would
    // count each object that it does not write as an error.
    for name in ["SCCACHE_GHA_VERSION", "SCCACHE_GHA_RW_MODE"] {
        server.remove(name);
    }
    if let Some(folder) = &relay.disk_level {
        server.set("SCCACHE_MULTILEVEL_CHAIN", "disk,gha");
        server.set("SCCACHE_DIR", folder.display().to_string());
        server.remove("SCCACHE_LOCAL_RW_MODE");
        // The relay has everything as well. sccache's own limit of 10 GB is most of a runner's disk.
        if !server.has("SCCACHE_CACHE_SIZE") {
            server.set("SCCACHE_CACHE_SIZE", "2G");
        }
    }
    never_through_a_proxy(server);
}

fn use_githubs_cache(server: &mut Environment, environment: &Environment, storage: &Storage<'_>) {
    for name in [
        "ACTIONS_CACHE_URL",
        "ACTIONS_RESULTS_URL",
        "ACTIONS_RUNTIME_TOKEN",
    ] {
        if let Some(value) = environment.get(name) {
            // The clients append paths to it as they are.
            let slash = if name.ends_with("_URL") && !value.ends_with('/') {
                "/"
            } else {
                ""
            };
            server.set(name, format!("{value}{slash}"));
        }
    }
    if !environment.has("ACTIONS_RUNTIME_TOKEN") {
        // A service of version 1 may need none, and sccache looks whether the variable is there.
        server.set("ACTIONS_RUNTIME_TOKEN", "");
    }
    server.set("SCCACHE_GHA_ENABLED", "on");
    // The runner sets it for the toolkit's client only where the service is there. `act` imitates
    // github.com with a service of the first version, which it tells by naming no other URL.
    if environment.has("ACTIONS_RESULTS_URL") && !environment.has("ACT") {
        server.set("ACTIONS_CACHE_SERVICE_V2", "on");
    }
    if let Some(namespace) = storage.namespace {
        server.set("SCCACHE_GHA_VERSION", namespace);
    }
    if service_is_on_loopback(environment) {
        never_through_a_proxy(server);
    }
}

/// Keeps what goes to this machine itself from a proxy, which would look for it on its own.
fn never_through_a_proxy(server: &mut Environment) {
    let others = server.get("NO_PROXY").or(server.get("no_proxy"));
    let loopback = "127.0.0.1,localhost";
    let list = others.map_or_else(
        || loopback.to_owned(),
        |others| format!("{others},{loopback}"),
    );
    server.set("NO_PROXY", list.clone());
    server.set("no_proxy", list);
}

fn service_is_on_loopback(environment: &Environment) -> bool {
    ["ACTIONS_RESULTS_URL", "ACTIONS_CACHE_URL"]
        .iter()
        .filter_map(|name| url::Url::parse(environment.get(name)?).ok())
        .any(|url| is_on_loopback(&url))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn github() -> Environment {
        Environment::from_iter([
            ("ACTIONS_RESULTS_URL", "https://results.example/x"),
            ("ACTIONS_RUNTIME_TOKEN", "token"),
            ("INPUT_TOKEN", "secret"),
            ("GITHUB_ENV", "/f"),
            ("GITHUB_TOKEN", "secret"),
            ("PATH", "/bin"),
        ])
    }

    fn with(mut environment: Environment, name: &str, value: &str) -> Environment {
        environment.set(name, value);
        environment
    }

    fn storage(mode: Mode) -> Storage<'static> {
        Storage {
            mode,
            namespace: None,
            read_only: false,
            relay: None,
        }
    }

    #[test]
    fn a_storage_of_the_users_own_chooses_itself() {
        for name in EXTERNAL_STORAGE {
            let choice = choose(None, &with(github(), name, "x"));
            assert_eq!(choice.mode, Mode::External, "{name}");
        }
        assert_eq!(choose(None, &github()).mode, Mode::Packed);
    }

    #[test]
    fn what_the_user_switched_off_stays_off() {
        for off in ["false", "off", "0", "no"] {
            let environment = with(github(), "SCCACHE_GHA_ENABLED", off);
            assert_eq!(choose(None, &environment).mode, Mode::Local, "{off}");
        }
        let environment = with(github(), "SCCACHE_GHA_ENABLED", "true");
        assert_eq!(choose(None, &environment).mode, Mode::Packed);
    }

    #[test]
    fn without_a_cache_service_objects_stay_on_this_machine_and_the_user_hears_it() {
        for requested in [None, Some(Mode::Direct), Some(Mode::Packed)] {
            let choice = choose(requested, &Environment::default());
            assert_eq!(choice.mode, Mode::Local);
            assert!(choice.warning.is_some());
        }
        let choice = choose(Some(Mode::Local), &Environment::default());
        assert_eq!(choice.warning, None);
    }

    #[test]
    fn a_cache_service_of_version_1_is_used_without_a_token() {
        let act = [
            ("ACTIONS_CACHE_URL", "http://10.0.0.1:5/s"),
            ("ACT", "true"),
        ];
        let act = Environment::from_iter(act);
        for mode in [Mode::Packed, Mode::Direct] {
            let choice = choose(Some(mode), &act);
            assert_eq!((choice.mode, choice.warning), (mode, None));
        }
        let server = server_environment(&act, &storage(Mode::Direct));
        let mut variables = server.iter();
        assert!(variables.any(|variable| variable == ("ACTIONS_RUNTIME_TOKEN", "")));
        assert!(!server.has("ACTIONS_CACHE_SERVICE_V2"));
        let mut github = github();
        github.remove("ACTIONS_RUNTIME_TOKEN");
        assert_eq!(choose(None, &github).mode, Mode::Local);
    }

    #[test]
    fn the_server_sees_no_input_no_file_and_no_token_but_the_one_it_needs() {
        for (mode, token) in [(Mode::Direct, Some("token")), (Mode::Local, None)] {
            let server = server_environment(&github(), &storage(mode));
            assert_eq!(server.get("ACTIONS_RUNTIME_TOKEN"), token, "{mode}");
            for name in ["INPUT_TOKEN", "GITHUB_ENV", "GITHUB_TOKEN"] {
                assert!(!server.has(name), "{mode} {name}");
            }
            assert_eq!(server.get("PATH"), Some("/bin"));
            assert_eq!(server.get("SCCACHE_IDLE_TIMEOUT"), Some("0"));
        }
    }

    #[test]
    fn a_service_url_ends_in_a_slash() {
        let server = server_environment(&github(), &storage(Mode::Direct));
        assert_eq!(
            server.get("ACTIONS_RESULTS_URL"),
            Some("https://results.example/x/")
        );
        assert_eq!(server.get("NO_PROXY"), None);
    }

    #[test]
    fn a_service_on_loopback_is_not_asked_through_a_proxy() {
        let environment = with(github(), "ACTIONS_RESULTS_URL", "http://127.0.0.1:9/");
        let environment = with(environment, "no_proxy", "corp.example");
        let server = server_environment(&environment, &storage(Mode::Direct));
        assert_eq!(
            server.get("NO_PROXY"),
            Some("corp.example,127.0.0.1,localhost")
        );
    }

    #[test]
    fn an_explicit_mode_wins_over_a_storage_in_the_environment() {
        let environment = with(github(), "SCCACHE_BUCKET", "b");
        let server = server_environment(&environment, &storage(Mode::Direct));
        assert!(!server.has("SCCACHE_BUCKET"));
        let server = server_environment(&environment, &storage(Mode::External));
        assert!(server.has("SCCACHE_BUCKET"));
        assert!(!server.has("SCCACHE_GHA_ENABLED"));
    }

    #[test]
    fn a_chain_with_githubs_cache_in_it_gets_what_that_needs() {
        let environment = with(github(), "SCCACHE_MULTILEVEL_CHAIN", "disk, gha");
        assert_eq!(choose(None, &environment).mode, Mode::External);
        let server = server_environment(&environment, &storage(Mode::External));
        assert_eq!(server.get("ACTIONS_RUNTIME_TOKEN"), Some("token"));
        assert!(server.has("SCCACHE_MULTILEVEL_CHAIN"));
        let environment = with(github(), "SCCACHE_MULTILEVEL_CHAIN", "disk,s3");
        let server = server_environment(&environment, &storage(Mode::External));
        assert!(!server.has("ACTIONS_RUNTIME_TOKEN"));
    }

    #[test]
    fn read_only_and_a_namespace_reach_the_server() {
        let storage = Storage {
            mode: Mode::Direct,
            namespace: Some("nightly"),
            read_only: true,
            relay: None,
        };
        let server = server_environment(&github(), &storage);
        assert_eq!(server.get("SCCACHE_GHA_VERSION"), Some("nightly"));
        assert_eq!(server.get("SCCACHE_GHA_RW_MODE"), Some("READ_ONLY"));
    }

    #[test]
    fn read_only_reaches_each_storage_that_the_user_may_have() {
        let storage = Storage {
            read_only: true,
            ..storage(Mode::External)
        };
        let user = with(github(), "SCCACHE_S3_RW_MODE", "READ_WRITE");
        let server = server_environment(&user, &storage);
        for name in READ_WRITE_MODES {
            assert_eq!(server.get(name), Some("READ_ONLY"), "{name}");
        }
        assert!(server.has("SCCACHE_LOCAL_RW_MODE"));
        let user = with(user, CONFIGURATION_FILE, "/f");
        assert!(!server_environment(&user, &storage).has("SCCACHE_LOCAL_RW_MODE"));
    }

    #[test]
    fn with_a_relay_the_server_has_neither_githubs_token_nor_its_address() {
        let mut environment = with(github(), "HTTPS_PROXY", "http://proxy.example");
        environment.set("ACTIONS_CACHE_URL", "https://cache.example/");
        environment.set("SCCACHE_GHA_RW_MODE", "READ_ONLY");
        environment.set("SCCACHE_BUCKET", "b");
        let storage = Storage {
            relay: Some(RelayAccess {
                url: "http://127.0.0.1:7/".to_owned(),
                token: "relay's",
                disk_level: Some(PathBuf::from("/s/disk-level")),
            }),
            ..storage(Mode::Packed)
        };
        let server = server_environment(&environment, &storage);
        for (name, value) in server.iter() {
            assert!(value != "token" && !value.contains(".example/"), "{name}");
        }
        assert_eq!(server.get("ACTIONS_RUNTIME_TOKEN"), Some("relay's"));
        assert_eq!(server.get("SCCACHE_MULTILEVEL_CHAIN"), Some("disk,gha"));
        assert_eq!(server.get("SCCACHE_DIR"), Some("/s/disk-level"));
        assert_eq!(server.get("NO_PROXY"), Some("127.0.0.1,localhost"));
        assert!(!server.has("SCCACHE_GHA_RW_MODE") && !server.has("SCCACHE_BUCKET"));
    }
}
