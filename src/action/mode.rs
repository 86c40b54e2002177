//! The storage of this job's objects, and the environment of sccache's server for it.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cache_client::Endpoint;
use crate::http::is_on_loopback;
use crate::runner::environment::Environment;
use crate::runner::scopes::Permission;
use crate::sccache::state_dir::StateDir;

/// The storage for sccache's objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// In GitHub's cache service (or one that speaks like it), many objects in a cache entry.
    Packed,
    /// In the same, one cache entry per object.
    Direct,
    /// On this machine's disk.
    Local,
    /// In the storage that sccache's own settings name: a bucket, Redis, WebDAV and so on.
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

/// The variable with the storages that sccache since 0.15 asks one after the other. It takes
/// precedence over all other variables that name one (`storage_from_config` in `src/cache/cache.rs`
/// of sccache).
pub const CHAIN: &str = "SCCACHE_MULTILEVEL_CHAIN";

/// The chain of storages for the steps after the action, if a disk cache is in front of the relay:
/// a server that sccache starts in such a step uses that disk cache, and needs no token.
pub const CHAIN_OF_LATER_STEPS: &str = "disk";

/// The variables that name the user's own storage (`src/config.rs` of sccache). Each is enough to
/// make sccache use it.
const EXTERNAL_STORAGE: [&str; 13] = [
    "SCCACHE_AZURE_CONNECTION_STRING",
    "SCCACHE_BUCKET",
    CONFIGURATION_FILE,
    "SCCACHE_COS_BUCKET",
    "SCCACHE_GCS_BUCKET",
    "SCCACHE_MEMCACHED",
    "SCCACHE_MEMCACHED_ENDPOINT",
    CHAIN,
    "SCCACHE_OSS_BUCKET",
    "SCCACHE_REDIS",
    "SCCACHE_REDIS_CLUSTER_ENDPOINTS",
    "SCCACHE_REDIS_ENDPOINT",
    "SCCACHE_WEBDAV_ENDPOINT",
];

/// The variables that make each storage except the disk read-only (`src/config.rs` of sccache,
/// since 0.16).
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

/// A mode, and the reason for a fallback that the user should see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModeSelection {
    /// The mode to try.
    pub mode: Mode,
    /// Why it is not the requested one.
    pub fallback: Option<FallbackReason>,
    /// The user's own chain of storages without GitHub's cache, if the job may not use that cache.
    pub chain: Option<String>,
}

/// The reason for keeping objects on the disk and not in the cache service, worded to follow
/// "because".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FallbackReason {
    /// The job may not use the service. Somebody decided this; it is no fault.
    Forbidden(String),
    /// The service is unavailable.
    Unavailable(String),
}

/// The message for a job that may not use GitHub's cache at all.
pub const FORBIDDEN: &str = "this job may neither read nor write GitHub's cache \
                             (ACTIONS_CACHE_MODE and the input `read-only`)";

/// The mode of this job: the requested one, else the environment decides, as far as the job may use
/// the cache service.
pub fn select(
    requested: Option<Mode>,
    environment: &Environment,
    permission: Permission,
) -> ModeSelection {
    let wanted = requested.unwrap_or_else(|| by_environment(environment));
    let is_forbidden = !permission.read && !permission.write;
    let chain = (is_forbidden && chain_has_githubs_cache(environment, wanted))
        .then(|| other_levels(environment.get(CHAIN).unwrap_or_default()));
    let is_nothing_left = chain.as_deref() == Some("");
    let fallback = match wanted.needs_cache_service() || is_nothing_left {
        true if is_forbidden => Some(FallbackReason::Forbidden(FORBIDDEN.to_owned())),
        true if !has_cache_service(environment) => Some(FallbackReason::Unavailable(
            "the runner gave this step no cache service (ACTIONS_RESULTS_URL with \
             ACTIONS_RUNTIME_TOKEN, or ACTIONS_CACHE_URL)"
                .to_owned(),
        )),
        _ => None,
    };
    let mode = match fallback {
        Some(_) => Mode::Local,
        None => wanted,
    };
    let chain = chain.filter(|_| !is_nothing_left);
    ModeSelection {
        mode,
        fallback,
        chain,
    }
}

/// The first variable that names the user's own storage.
pub fn external_storage(environment: &Environment) -> Option<&'static str> {
    let is_own = |name: &str| name == CHAIN && has_chain_of_this_action(environment);
    EXTERNAL_STORAGE
        .into_iter()
        .find(|name| environment.has(name) && !is_own(name))
}

/// Whether an earlier use of this action gave this chain of storages to later steps.
fn has_chain_of_this_action(environment: &Environment) -> bool {
    let folder = environment.path("SCCACHE_DIR");
    environment.get(CHAIN) == Some(CHAIN_OF_LATER_STEPS)
        && folder.is_some_and(|folder| StateDir::is_disk_tier(&folder))
}

fn by_environment(environment: &Environment) -> Mode {
    if external_storage(environment).is_some() {
        return Mode::External;
    }
    match environment.get("SCCACHE_GHA_ENABLED") {
        // A user's decision to switch it off stands.
        Some(value) if !is_on(value) => Mode::Local,
        _ => Mode::Packed,
    }
}

/// How sccache reads a switch (`bool_from_env_var` in its `src/config.rs`).
pub fn is_on(value: &str) -> bool {
    matches!(value.to_lowercase().as_str(), "true" | "on" | "1")
}

/// Whether there is one. An invalid address counts: the relay reports it.
fn has_cache_service(environment: &Environment) -> bool {
    let address = environment.has("ACTIONS_RESULTS_URL") || environment.has("ACTIONS_CACHE_URL");
    (address && environment.has("ACTIONS_RUNTIME_TOKEN")) || Endpoint::of(environment).is_some()
}

/// The first sccache that can have a disk cache in front of another storage.
pub const CHAIN_SINCE: semver::Version = semver::Version::new(0, 15, 0);

/// The first sccache that can be told not to write to GitHub's cache.
pub const READ_ONLY_SINCE: semver::Version = semver::Version::new(0, 16, 0);

/// The settings of sccache's server besides those that every server gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSettings<'a> {
    /// The storage for objects.
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
    /// The token that it accepts.
    pub token: &'a str,
    /// The folder of a disk cache in front of it, if sccache can have one.
    pub disk_tier: Option<PathBuf>,
    /// Whether sccache asks it at all. If it has no objects and reads new ones from the disk cache,
    /// asking it would cost seven requests for each miss.
    pub is_asked: bool,
}

/// The environment of the sccache server: the step's own, without the variables that are only for
/// the runner and this action, and with those that `settings` needs.
///
/// The server compiles with the environment that each client sends along, so no compile misses the
/// variables that this removes.
pub fn server_environment(environment: &Environment, settings: &ServerSettings<'_>) -> Environment {
    let mut server = environment.for_programs();
    server.remove("SCCACHE_GHA_ENABLED");
    if has_chain_of_this_action(environment) {
        server.remove(CHAIN);
    }
    if settings.mode != Mode::External {
        for name in EXTERNAL_STORAGE {
            server.remove(name);
        }
    }
    if settings.mode == Mode::Packed {
        use_relay(&mut server, settings);
    } else if has_a_token_of_its_own(environment, settings.mode) {
        use_githubs_cache(&mut server, environment, settings);
    }
    // The relay itself knows whether it may write.
    if settings.read_only && settings.mode != Mode::Packed {
        disable_writes(&mut server, settings.mode);
    }
    if !server.has("SCCACHE_IDLE_TIMEOUT") {
        server.set("SCCACHE_IDLE_TIMEOUT", "0");
    }
    server
}

/// Has the server write to no storage. No variable changes a storage that sccache's configuration
/// file names.
fn disable_writes(server: &mut Environment, mode: Mode) {
    for name in READ_WRITE_MODES {
        server.set(name, "READ_ONLY");
    }
    // This variable alone would make sccache use its own disk in place of a storage that the file
    // names.
    if mode == Mode::Local || !server.has(CONFIGURATION_FILE) {
        server.set("SCCACHE_LOCAL_RW_MODE", "READ_ONLY");
    }
}

/// Whether the user's own chain of storages (sccache 0.15 and newer) has GitHub's cache in it.
fn chain_has_githubs_cache(environment: &Environment, mode: Mode) -> bool {
    mode == Mode::External
        && environment
            .get(CHAIN)
            .is_some_and(|chain| chain.split(',').any(is_githubs_cache))
}

/// Whether a level of a chain is GitHub's cache, as sccache names it.
fn is_githubs_cache(level: &str) -> bool {
    level.trim() == "gha"
}

/// The other levels of a chain.
fn other_levels(chain: &str) -> String {
    let others: Vec<&str> = chain
        .split(',')
        .filter(|level| !is_githubs_cache(level))
        .map(str::trim)
        .collect();
    others.join(",")
}

/// Whether a server in this mode is started with a token that no later step has.
pub fn has_a_token_of_its_own(environment: &Environment, mode: Mode) -> bool {
    mode == Mode::Direct || chain_has_githubs_cache(environment, mode)
}

/// Points the server at the relay, whichever service the relay uses.
fn use_relay(server: &mut Environment, settings: &ServerSettings<'_>) {
    let Some(relay) = &settings.relay else {
        return;
    };
    if relay.is_asked {
        server.set("SCCACHE_GHA_ENABLED", "true");
        // The relay speaks both versions. opendal asks for the second with these two.
        server.set("ACTIONS_CACHE_SERVICE_V2", "on");
        server.set("GITHUB_SERVER_URL", "https://github.com");
        server.set("ACTIONS_RESULTS_URL", &*relay.url);
        server.set("ACTIONS_CACHE_URL", &*relay.url);
        server.set("ACTIONS_RUNTIME_TOKEN", relay.token);
    }
    // The relay knows what may be written and keeps namespaces apart; a read-only sccache would
    // count each object that it does not write as an error.
    for name in ["SCCACHE_GHA_VERSION", "SCCACHE_GHA_RW_MODE"] {
        server.remove(name);
    }
    if let Some(folder) = &relay.disk_tier {
        let chain = if relay.is_asked {
            "disk,gha"
        } else {
            CHAIN_OF_LATER_STEPS
        };
        server.set(CHAIN, chain);
        server.set("SCCACHE_DIR", folder.display().to_string());
        server.remove("SCCACHE_LOCAL_RW_MODE");
        // The relay has everything as well. sccache's own limit of 10 GB is most of a runner's disk.
        if !server.has("SCCACHE_CACHE_SIZE") {
            server.set("SCCACHE_CACHE_SIZE", "2G");
        }
    }
    bypass_proxy_on_loopback(server);
}

fn use_githubs_cache(
    server: &mut Environment,
    environment: &Environment,
    settings: &ServerSettings<'_>,
) {
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
    // The runner sets it for the toolkit's client only if the service is there. `act` imitates
    // github.com with a service of the first version; it sets no other URL.
    if environment.has("ACTIONS_RESULTS_URL") && !environment.has("ACT") {
        server.set("ACTIONS_CACHE_SERVICE_V2", "on");
    }
    if let Some(namespace) = settings.namespace {
        server.set("SCCACHE_GHA_VERSION", namespace);
    }
    if service_is_on_loopback(environment) {
        bypass_proxy_on_loopback(server);
    }
}

/// Excludes this machine from the proxies: a proxy would look for the address on its own machine.
fn bypass_proxy_on_loopback(server: &mut Environment) {
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

    fn selected(requested: Option<Mode>, environment: &Environment) -> ModeSelection {
        select(requested, environment, Permission::of(environment, None))
    }

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

    fn settings(mode: Mode) -> ServerSettings<'static> {
        ServerSettings {
            mode,
            namespace: None,
            read_only: false,
            relay: None,
        }
    }

    #[test]
    fn a_storage_of_the_users_own_chooses_itself() {
        for name in EXTERNAL_STORAGE {
            let selection = selected(None, &with(github(), name, "x"));
            assert_eq!(selection.mode, Mode::External, "{name}");
        }
        assert_eq!(selected(None, &github()).mode, Mode::Packed);
    }

    #[test]
    fn what_the_user_switched_off_stays_off() {
        for off in ["false", "off", "0", "no"] {
            let environment = with(github(), "SCCACHE_GHA_ENABLED", off);
            assert_eq!(selected(None, &environment).mode, Mode::Local, "{off}");
        }
        let environment = with(github(), "SCCACHE_GHA_ENABLED", "true");
        assert_eq!(selected(None, &environment).mode, Mode::Packed);
    }

    #[test]
    fn without_a_cache_service_objects_stay_on_this_machine_and_the_user_hears_it() {
        for requested in [None, Some(Mode::Direct), Some(Mode::Packed)] {
            let selection = selected(requested, &Environment::default());
            assert_eq!(selection.mode, Mode::Local);
            assert!(matches!(
                selection.fallback,
                Some(FallbackReason::Unavailable(_))
            ));
        }
        let selection = selected(Some(Mode::Local), &Environment::default());
        assert_eq!(selection.fallback, None);
    }

    #[test]
    fn a_job_that_may_not_use_the_service_does_not() {
        let none = with(github(), "ACTIONS_CACHE_MODE", "none");
        for requested in [None, Some(Mode::Direct), Some(Mode::Packed)] {
            let selection = selected(requested, &none);
            assert_eq!(selection.mode, Mode::Local);
            assert!(matches!(
                selection.fallback,
                Some(FallbackReason::Forbidden(_))
            ));
        }
        let local = selected(Some(Mode::Local), &none);
        assert_eq!((local.mode, local.fallback), (Mode::Local, None));
        let write_only = with(github(), "ACTIONS_CACHE_MODE", "write-only");
        assert_eq!(selected(None, &write_only).mode, Mode::Packed);
        let nothing = Permission::of(&write_only, Some(true));
        assert_eq!(select(None, &write_only, nothing).mode, Mode::Local);
    }

    #[test]
    fn a_cache_service_of_version_1_is_used_without_a_token() {
        let act = [
            ("ACTIONS_CACHE_URL", "http://10.0.0.1:5/s"),
            ("ACT", "true"),
        ];
        let act = Environment::from_iter(act);
        for mode in [Mode::Packed, Mode::Direct] {
            let selection = selected(Some(mode), &act);
            assert_eq!((selection.mode, selection.fallback), (mode, None));
        }
        let server = server_environment(&act, &settings(Mode::Direct));
        let mut variables = server.iter();
        assert!(variables.any(|variable| variable == ("ACTIONS_RUNTIME_TOKEN", "")));
        assert!(!server.has("ACTIONS_CACHE_SERVICE_V2"));
        let mut github = github();
        github.remove("ACTIONS_RUNTIME_TOKEN");
        assert_eq!(selected(None, &github).mode, Mode::Local);
    }

    #[test]
    fn the_server_sees_no_input_no_file_and_no_token_but_the_one_it_needs() {
        for (mode, token) in [(Mode::Direct, Some("token")), (Mode::Local, None)] {
            let server = server_environment(&github(), &settings(mode));
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
        let server = server_environment(&github(), &settings(Mode::Direct));
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
        let server = server_environment(&environment, &settings(Mode::Direct));
        assert_eq!(
            server.get("NO_PROXY"),
            Some("corp.example,127.0.0.1,localhost")
        );
    }

    #[test]
    fn an_explicit_mode_wins_over_a_storage_in_the_environment() {
        let environment = with(github(), "SCCACHE_BUCKET", "b");
        let server = server_environment(&environment, &settings(Mode::Direct));
        assert!(!server.has("SCCACHE_BUCKET"));
        let server = server_environment(&environment, &settings(Mode::External));
        assert!(server.has("SCCACHE_BUCKET"));
        assert!(!server.has("SCCACHE_GHA_ENABLED"));
    }

    #[test]
    fn the_chain_of_an_earlier_use_is_no_storage_of_the_users_own() {
        let own = |folder: &str| {
            let environment = with(github(), CHAIN, CHAIN_OF_LATER_STEPS);
            with(environment, "SCCACHE_DIR", folder)
        };
        let earlier = own("/t/sccache-action-1/disk-tier");
        assert_eq!(selected(None, &earlier).mode, Mode::Packed);
        let server = server_environment(&earlier, &settings(Mode::External));
        assert!(!server.has(CHAIN));
        assert_eq!(selected(None, &own("/t/cache")).mode, Mode::External);
        let bucket = with(earlier, "SCCACHE_BUCKET", "b");
        assert_eq!(external_storage(&bucket), Some("SCCACHE_BUCKET"));
    }

    #[test]
    fn a_chain_with_githubs_cache_in_it_gets_what_that_needs() {
        let environment = with(github(), "SCCACHE_MULTILEVEL_CHAIN", "disk, gha");
        assert_eq!(selected(None, &environment).mode, Mode::External);
        let server = server_environment(&environment, &settings(Mode::External));
        assert_eq!(server.get("ACTIONS_RUNTIME_TOKEN"), Some("token"));
        assert!(server.has("SCCACHE_MULTILEVEL_CHAIN"));
        let environment = with(github(), "SCCACHE_MULTILEVEL_CHAIN", "disk,s3");
        let server = server_environment(&environment, &settings(Mode::External));
        assert!(!server.has("ACTIONS_RUNTIME_TOKEN"));
    }

    #[test]
    fn a_job_that_may_not_use_githubs_cache_has_the_rest_of_its_chain() {
        let none = with(github(), "ACTIONS_CACHE_MODE", "none");
        for (chain, rest) in [("disk, gha", "disk"), ("disk,gha,s3", "disk,s3")] {
            let environment = with(none.clone(), CHAIN, chain);
            for requested in [None, Some(Mode::External)] {
                let selection = selected(requested, &environment);
                assert_eq!((selection.mode, selection.fallback), (Mode::External, None));
                assert_eq!(selection.chain.as_deref(), Some(rest));
            }
        }
        // This chain has no other storage.
        let selection = selected(None, &with(none.clone(), CHAIN, "gha"));
        assert_eq!((selection.mode, selection.chain), (Mode::Local, None));
        assert!(matches!(
            selection.fallback,
            Some(FallbackReason::Forbidden(_))
        ));
        for (environment, chain) in [(none, "disk,s3"), (github(), "disk,gha")] {
            let selection = selected(None, &with(environment, CHAIN, chain));
            assert_eq!((selection.mode, selection.chain), (Mode::External, None));
        }
    }

    #[test]
    fn read_only_and_a_namespace_reach_the_server() {
        let settings = ServerSettings {
            mode: Mode::Direct,
            namespace: Some("nightly"),
            read_only: true,
            relay: None,
        };
        let server = server_environment(&github(), &settings);
        assert_eq!(server.get("SCCACHE_GHA_VERSION"), Some("nightly"));
        assert_eq!(server.get("SCCACHE_GHA_RW_MODE"), Some("READ_ONLY"));
    }

    #[test]
    fn read_only_reaches_each_storage_that_the_user_may_have() {
        let settings = ServerSettings {
            read_only: true,
            ..settings(Mode::External)
        };
        let user = with(github(), "SCCACHE_S3_RW_MODE", "READ_WRITE");
        let server = server_environment(&user, &settings);
        for name in READ_WRITE_MODES {
            assert_eq!(server.get(name), Some("READ_ONLY"), "{name}");
        }
        assert!(server.has("SCCACHE_LOCAL_RW_MODE"));
        let user = with(user, CONFIGURATION_FILE, "/f");
        assert!(!server_environment(&user, &settings).has("SCCACHE_LOCAL_RW_MODE"));
    }

    #[test]
    fn with_a_relay_the_server_has_neither_githubs_token_nor_its_address() {
        let mut environment = with(github(), "HTTPS_PROXY", "http://proxy.example");
        environment.set("ACTIONS_CACHE_URL", "https://cache.example/");
        environment.set("SCCACHE_GHA_RW_MODE", "READ_ONLY");
        environment.set("SCCACHE_BUCKET", "b");
        let access = |is_asked| ServerSettings {
            relay: Some(RelayAccess {
                url: "http://127.0.0.1:7/".to_owned(),
                token: "relay's",
                disk_tier: Some(PathBuf::from("/s/disk-tier")),
                is_asked,
            }),
            ..settings(Mode::Packed)
        };
        let left_alone = server_environment(&environment, &access(false));
        assert_eq!(left_alone.get("SCCACHE_MULTILEVEL_CHAIN"), Some("disk"));
        for name in [
            "ACTIONS_RUNTIME_TOKEN",
            "SCCACHE_GHA_ENABLED",
            "ACTIONS_CACHE_URL",
        ] {
            assert!(!left_alone.has(name), "{name}");
        }
        let server = server_environment(&environment, &access(true));
        for (name, value) in server.iter() {
            assert!(value != "token" && !value.contains(".example/"), "{name}");
        }
        assert_eq!(server.get("ACTIONS_RUNTIME_TOKEN"), Some("relay's"));
        assert_eq!(server.get("SCCACHE_MULTILEVEL_CHAIN"), Some("disk,gha"));
        assert_eq!(server.get("SCCACHE_DIR"), Some("/s/disk-tier"));
        assert_eq!(server.get("NO_PROXY"), Some("127.0.0.1,localhost"));
        assert!(!server.has("SCCACHE_GHA_RW_MODE") && !server.has("SCCACHE_BUCKET"));
    }
}
