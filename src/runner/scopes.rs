//! The parts of the cache that a job reads and writes, and its lane.

use std::path::Path;

use serde::Deserialize;

use crate::digest::Digest;
use crate::runner::environment::Environment;
use crate::runner::token::CacheScope;
use crate::runner::token::MAY_WRITE;
use crate::runner::token::cache_scopes;

/// The scopes of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scopes {
    /// The scopes that it reads, best first; none if it may only write.
    pub read: Vec<String>,
    /// The one that it writes, or `None` if it may only read.
    pub write: Option<String>,
}

/// The cache scopes that a runtime token names in its claim `ac`, a JSON list inside a string.
/// `None` if the token is of another form; its signature is GitHub's to check.
fn access_of_token(token: &str) -> Option<Vec<CacheScope>> {
    #[derive(Deserialize)]
    struct ScopeClaims {
        ac: String,
    }
    let claims = token.split('.').nth(1)?;
    let claims: ScopeClaims = serde_json::from_slice(&base64url(claims)?).ok()?;
    cache_scopes(&claims.ac)
}

fn base64url(text: &str) -> Option<Vec<u8>> {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok()
}

fn scopes_of_token(environment: &Environment) -> Vec<CacheScope> {
    let token = environment.get("ACTIONS_RUNTIME_TOKEN");
    token.and_then(access_of_token).unwrap_or_default()
}

/// Whether the job's token may only read the cache. GitHub gives such tokens to triggers that it
/// does not trust; the service would refuse every write, and each would count as an error.
fn token_is_read_only(environment: &Environment) -> bool {
    let scopes = scopes_of_token(environment);
    !scopes.is_empty() && scopes.iter().all(|scope| scope.permission & MAY_WRITE == 0)
}

/// The rights of a job in the cache service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permission {
    /// Whether it may take anything from there.
    pub read: bool,
    /// Whether it may store anything there.
    pub write: bool,
}

impl Permission {
    /// The rights of the job: `ACTIONS_CACHE_MODE` decides (`read`, `write`, `write-only` or
    /// `none`, spelled as `getCacheMode` of @actions/cache 6.2 takes them, in
    /// `internal/config.js`), else the token. The input `read-only` removes the right to write, and
    /// restores it if only the token denies it.
    pub fn of(environment: &Environment, read_only: Option<bool>) -> Self {
        let mode = environment.get("ACTIONS_CACHE_MODE").unwrap_or_default();
        let wished = read_only != Some(true);
        let (read, write) = match mode.trim().to_lowercase().as_str() {
            "none" => (false, false),
            "read" => (true, false),
            "write" => (true, wished),
            "write-only" => (false, wished),
            _ => {
                let by_token = || token_is_read_only(environment);
                (true, !read_only.unwrap_or_else(by_token))
            }
        };
        Self { read, write }
    }
}

impl Scopes {
    /// The scopes that the job's token names. If the token is of another form, the runner's
    /// variables decide: the job's ref, its base, the default branch. The result has only those
    /// that the job may read and write.
    pub fn of(environment: &Environment, permission: Permission) -> Self {
        let named: Vec<CacheScope> = scopes_of_token(environment)
            .into_iter()
            .filter(|scope| !scope.scope.is_empty())
            .collect();
        let writable = named.iter().find(|scope| scope.permission & MAY_WRITE != 0);
        let own = writable.map(|scope| scope.scope.clone());
        let (mut read, write) = if named.is_empty() {
            let own = environment.get("GITHUB_REF").map(str::to_owned);
            let base = environment
                .get("GITHUB_BASE_REF")
                .map(|base| format!("refs/heads/{base}"));
            let default = environment
                .path("GITHUB_EVENT_PATH")
                .and_then(|event| default_branch(&event));
            let read: Vec<String> = own.iter().cloned().chain(base).chain(default).collect();
            // A service without refs has one scope for all.
            let own = own.unwrap_or_else(|| "refs/heads/main".to_owned());
            (read, Some(own))
        } else {
            (named.into_iter().map(|scope| scope.scope).collect(), own)
        };
        let write = write.filter(|_| permission.write);
        if !permission.read {
            return Self {
                read: Vec::new(),
                write,
            };
        }
        if let Some(write) = &write {
            read.insert(0, write.clone());
        }
        let mut seen = std::collections::BTreeSet::new();
        read.retain(|scope| seen.insert(scope.clone()));
        Self { read, write }
    }
}

/// The ref of the repository's default branch, from the event that started the workflow.
fn default_branch(event: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Event {
        repository: EventRepository,
    }
    #[derive(Deserialize)]
    struct EventRepository {
        default_branch: String,
    }
    let event: Event = serde_json::from_slice(&std::fs::read(event).ok()?).ok()?;
    Some(format!("refs/heads/{}", event.repository.default_branch))
}

/// The lane of a job: a number that runs of the same job of the same workflow share, for the same
/// entry of its matrix and on the same platform, on any ref. `matrix` is the matrix entry from the
/// action's hidden input, in JSON.
pub fn lane(environment: &Environment, matrix: &str, platform: &str) -> u64 {
    let get = |name| environment.get(name).unwrap_or_default();
    // Not `GITHUB_WORKFLOW_REF`, which has the branch in it.
    let parts = [
        get("GITHUB_WORKFLOW"),
        get("GITHUB_JOB"),
        get("GITHUB_ACTION"),
        matrix,
        platform,
    ];
    let digest = Digest::of(parts.join("\0").as_bytes());
    let (first, _) = digest.as_bytes().split_at(8);
    first
        .iter()
        .fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A token as the runner gets it, with the claim `ac` given.
    fn token(ac: &str) -> Environment {
        use base64::Engine;
        let claims = serde_json::json!({ "ac": ac }).to_string();
        let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(claims);
        Environment::from_iter([("ACTIONS_RUNTIME_TOKEN", format!("e30.{claims}.x"))])
    }

    const READ: &str = r#"[{"Scope":"refs/heads/main","Permission":1}]"#;
    const BOTH: &str = r#"[{"Scope":"refs/heads/main","Permission":1},{"Scope":"refs/pull/1/merge","Permission":3}]"#;

    const ALL: Permission = Permission {
        read: true,
        write: true,
    };
    const READ_ONLY: Permission = Permission {
        read: true,
        write: false,
    };
    const WRITE_ONLY: Permission = Permission {
        read: false,
        write: true,
    };
    const NONE: Permission = Permission {
        read: false,
        write: false,
    };

    #[test]
    fn a_token_without_a_writable_scope_is_read_only() {
        let permission = |environment: &Environment| Permission::of(environment, None);
        assert_eq!(permission(&token(READ)), READ_ONLY);
        assert_eq!(permission(&token(BOTH)), ALL);
        assert_eq!(permission(&token("[]")), ALL);
        assert_eq!(permission(&token("nonsense")), ALL);
        let opaque = Environment::from_iter([("ACTIONS_RUNTIME_TOKEN", "opaque")]);
        assert_eq!(permission(&opaque), ALL);
        assert_eq!(Permission::of(&token(READ), Some(false)), ALL);
        assert_eq!(Permission::of(&token(BOTH), Some(true)), READ_ONLY);
    }

    #[test]
    fn the_runners_word_on_the_mode_wins_over_the_token() {
        for (mode, expected, with_read_only) in [
            ("none", NONE, NONE),
            ("read", READ_ONLY, READ_ONLY),
            ("write", ALL, READ_ONLY),
            ("write-only", WRITE_ONLY, NONE),
            (" Write-Only\n", WRITE_ONLY, NONE),
            // @actions/cache does the same: an unknown mode forbids nothing.
            ("future", ALL, READ_ONLY),
        ] {
            let claims = if expected.write { BOTH } else { READ };
            let mut environment = token(claims);
            environment.set("ACTIONS_CACHE_MODE", mode);
            let permission = |read_only| Permission::of(&environment, read_only);
            assert_eq!(permission(None), expected, "{mode}");
            assert_eq!(permission(Some(false)), expected, "{mode}");
            assert_eq!(permission(Some(true)), with_read_only, "{mode}");
        }
        let mut environment = token(READ);
        environment.set("ACTIONS_CACHE_MODE", "write");
        assert_eq!(Permission::of(&environment, None), ALL);
    }

    #[test]
    fn the_tokens_scopes_are_the_jobs_with_the_written_one_first() {
        let scopes = Scopes::of(&token(BOTH), ALL);
        assert_eq!(scopes.write.as_deref(), Some("refs/pull/1/merge"));
        assert_eq!(scopes.read, ["refs/pull/1/merge", "refs/heads/main"]);
        let scopes = Scopes::of(&token(BOTH), READ_ONLY);
        assert_eq!(scopes.write, None);
        assert_eq!(scopes.read, ["refs/heads/main", "refs/pull/1/merge"]);
        assert_eq!(Scopes::of(&token(READ), ALL).write, None);
        let scopes = Scopes::of(&token(BOTH), WRITE_ONLY);
        assert_eq!(scopes.write.as_deref(), Some("refs/pull/1/merge"));
        assert!(scopes.read.is_empty());
    }

    #[test]
    fn without_such_a_token_the_runners_variables_tell_the_scopes() {
        let folder = tempfile::tempdir().unwrap();
        let event = folder.path().join("event.json");
        std::fs::write(&event, r#"{"repository":{"default_branch":"trunk"}}"#).unwrap();
        let mut environment = Environment::from_iter([
            ("ACTIONS_RUNTIME_TOKEN", "opaque"),
            ("GITHUB_REF", "refs/pull/7/merge"),
            ("GITHUB_BASE_REF", "release"),
        ]);
        environment.set("GITHUB_EVENT_PATH", event.display().to_string());
        let scopes = Scopes::of(&environment, ALL);
        assert_eq!(
            scopes.read,
            [
                "refs/pull/7/merge",
                "refs/heads/release",
                "refs/heads/trunk"
            ]
        );
        assert_eq!(scopes.write.as_deref(), Some("refs/pull/7/merge"));
        let none = Scopes::of(&Environment::default(), ALL);
        assert_eq!(none.read, ["refs/heads/main"]);
    }

    #[test]
    fn a_lane_is_the_same_on_every_ref_and_another_for_each_job() {
        let job = |name: &str, value: &str| {
            let mut environment = Environment::from_iter([
                ("GITHUB_WORKFLOW", "CI"),
                ("GITHUB_JOB", "build"),
                ("GITHUB_REF", "refs/heads/main"),
            ]);
            environment.set(name, value);
            environment
        };
        let main = lane(&job("GITHUB_REF", "refs/heads/main"), "{}", "linux-x64");
        assert_eq!(lane(&job("GITHUB_REF", "x"), "{}", "linux-x64"), main);
        assert_ne!(lane(&job("GITHUB_JOB", "test"), "{}", "linux-x64"), main);
        assert_ne!(
            lane(&job("GITHUB_REF", "x"), "{\"a\":1}", "linux-x64"),
            main
        );
        assert_ne!(lane(&job("GITHUB_REF", "x"), "{}", "linux-arm64"), main);
    }
}
