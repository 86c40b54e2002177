//! Which parts of the cache a job reads and writes, and what it has in common with its other runs.

use std::path::Path;

use serde::Deserialize;

use crate::action::environment::Environment;
use crate::service::runtime_token::{CacheScope, MAY_WRITE, cache_scopes};
use crate::store::index::Digest;

/// The scopes of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scopes {
    /// Those that it reads, best first.
    pub read: Vec<String>,
    /// The one that it writes, or `None` where it may only read.
    pub write: Option<String>,
}

/// The cache scopes that a runtime token names in its claim `ac`, a JSON list inside a string.
/// `None` where the token is of another form; its signature is GitHub's to check.
fn access_of_token(token: &str) -> Option<Vec<CacheScope>> {
    #[derive(Deserialize)]
    struct Claims {
        ac: String,
    }
    let claims = token.split('.').nth(1)?;
    let claims: Claims = serde_json::from_slice(&base64url(claims)?).ok()?;
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
/// does not trust; every write would be refused, and be counted as an error.
pub fn token_is_read_only(environment: &Environment) -> bool {
    match environment.get("ACTIONS_CACHE_MODE") {
        Some("read") => return true,
        Some(_) => return false,
        None => {}
    }
    let scopes = scopes_of_token(environment);
    !scopes.is_empty() && scopes.iter().all(|scope| scope.permission & MAY_WRITE == 0)
}

impl Scopes {
    /// The scopes that the job's token names, or where it is of another form those that the
    /// runner's variables do: the job's ref, its base, the default branch.
    pub fn of(environment: &Environment, read_only: bool) -> Self {
        let named: Vec<CacheScope> = scopes_of_token(environment)
            .into_iter()
            .filter(|scope| !scope.scope.is_empty())
            .collect();
        let writable = named.iter().find(|scope| scope.permission & MAY_WRITE != 0);
        let own = writable.map(|scope| scope.scope.clone());
        let (mut read, write) = if named.is_empty() {
            let own = environment.get("GITHUB_REF").map(str::to_owned);
            let base = environment.get("GITHUB_BASE_REF");
            let base = base.map(|base| format!("refs/heads/{base}"));
            let default = environment.path("GITHUB_EVENT_PATH");
            let default = default.and_then(|event| default_branch(&event));
            let read: Vec<String> = own.iter().cloned().chain(base).chain(default).collect();
            // A service without refs has one scope for all.
            let own = own.unwrap_or_else(|| "refs/heads/main".to_owned());
            (read, Some(own))
        } else {
            (named.into_iter().map(|scope| scope.scope).collect(), own)
        };
        let write = write.filter(|_| !read_only);
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
        repository: Repository,
    }
    #[derive(Deserialize)]
    struct Repository {
        default_branch: String,
    }
    let event: Event = serde_json::from_slice(&std::fs::read(event).ok()?).ok()?;
    Some(format!("refs/heads/{}", event.repository.default_branch))
}

/// The lane of a job: a number that runs of the same job of the same workflow have in common, for
/// the same entry of its matrix and on the same platform, whatever the ref. `matrix` is the matrix
/// entry as the action's hidden input has it, in JSON.
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

    #[test]
    fn a_token_without_a_writable_scope_is_read_only() {
        assert!(token_is_read_only(&token(READ)));
        assert!(!token_is_read_only(&token(BOTH)));
        assert!(!token_is_read_only(&token("[]")));
        assert!(!token_is_read_only(&token("nonsense")));
        assert!(!token_is_read_only(&Environment::from_iter([(
            "ACTIONS_RUNTIME_TOKEN",
            "opaque"
        )])));
    }

    #[test]
    fn the_runners_word_on_the_mode_wins_over_the_token() {
        let mut environment = token(READ);
        environment.set("ACTIONS_CACHE_MODE", "write");
        assert!(!token_is_read_only(&environment));
        let environment = Environment::from_iter([("ACTIONS_CACHE_MODE", "read")]);
        assert!(token_is_read_only(&environment));
    }

    #[test]
    fn the_tokens_scopes_are_the_jobs_with_the_written_one_first() {
        let scopes = Scopes::of(&token(BOTH), false);
        assert_eq!(scopes.write.as_deref(), Some("refs/pull/1/merge"));
        assert_eq!(scopes.read, ["refs/pull/1/merge", "refs/heads/main"]);
        let scopes = Scopes::of(&token(BOTH), true);
        assert_eq!(scopes.write, None);
        assert_eq!(scopes.read, ["refs/heads/main", "refs/pull/1/merge"]);
        assert_eq!(Scopes::of(&token(READ), false).write, None);
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
        let scopes = Scopes::of(&environment, false);
        assert_eq!(
            scopes.read,
            [
                "refs/pull/7/merge",
                "refs/heads/release",
                "refs/heads/trunk"
            ]
        );
        assert_eq!(scopes.write.as_deref(), Some("refs/pull/7/merge"));
        let none = Scopes::of(&Environment::default(), false);
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
