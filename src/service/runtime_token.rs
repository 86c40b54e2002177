//! The tokens that runners give to jobs: JSON Web Tokens whose claims say which parts of the cache
//! they open.
//!
//! GitHub's have the scopes in the claim `ac`, a JSON list inside a string, and the repository's
//! number in `repository_id`; they are signed with RS256 by a key that the issuer publishes. Gitea's
//! have `ac` with one scope without a name and are signed with HS256 (`CreateAuthorizationToken`
//! in its `services/actions/auth.go`).

use serde::Deserialize;

use crate::service::auth::Access;
use crate::service::store::Scope;

/// The bit of a scope's permission that allows writing.
pub const MAY_WRITE: u64 = 2;

/// A scope of the claim `ac`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct CacheScope {
    /// The ref.
    #[serde(rename = "Scope", alias = "scope", default)]
    pub scope: String,
    /// What is allowed: 1 to read, [`MAY_WRITE`] to write.
    #[serde(rename = "Permission", alias = "permission")]
    pub permission: u64,
}

/// The scopes that the claim `ac` names, or `None` where it cannot be read.
pub fn cache_scopes(ac: &str) -> Option<Vec<CacheScope>> {
    serde_json::from_str(ac).ok()
}

/// What of a token's claims says what it opens.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Claims {
    ac: Option<String>,
    repository_id: Option<serde_json::Value>,
}

/// The name under which entries of one repository's scope are kept, apart from other repositories'.
pub fn scope_of(repository: &str, scope: &str) -> Scope {
    Scope(format!("{repository}:{scope}").into())
}

/// What a token with these claims opens, or `None` where it names no scope. The scope that may be
/// written is read first, then the others in the token's order.
pub fn access_of(claims: &Claims) -> Option<Access> {
    let scopes = cache_scopes(claims.ac.as_deref()?)?;
    let repository = match &claims.repository_id {
        Some(serde_json::Value::String(id)) => id.clone(),
        Some(serde_json::Value::Number(id)) => id.to_string(),
        _ => String::new(),
    };
    let writable = scopes
        .iter()
        .find(|scope| scope.permission & MAY_WRITE != 0);
    let own = writable.map(|scope| scope.scope.as_str());
    let others = scopes.iter().map(|scope| scope.scope.as_str());
    let others = others.filter(|scope| Some(*scope) != own);
    let read: Vec<Scope> = own
        .into_iter()
        .chain(others)
        .map(|scope| scope_of(&repository, scope))
        .collect();
    if read.is_empty() {
        return None;
    }
    Some(Access {
        write: own.map(|scope| scope_of(&repository, scope)),
        read,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(ac: &str, repository: serde_json::Value) -> Claims {
        Claims {
            ac: Some(ac.to_owned()),
            repository_id: Some(repository),
        }
    }

    #[test]
    fn a_pull_request_writes_its_own_scope_and_reads_that_first() {
        let ac = r#"[{"Scope":"refs/heads/main","Permission":1},
                     {"Scope":"refs/pull/7/merge","Permission":3}]"#;
        let access = access_of(&claims(ac, "12".into())).unwrap();
        assert_eq!(access.write, Some("12:refs/pull/7/merge".into()));
        let read: Vec<&str> = access.read.iter().map(|scope| &*scope.0).collect();
        assert_eq!(read, ["12:refs/pull/7/merge", "12:refs/heads/main"]);
        let number = access_of(&claims(ac, 12.into())).unwrap();
        assert_eq!(number, access);
    }

    #[test]
    fn a_token_without_a_scope_to_write_only_reads() {
        let ac = r#"[{"Scope":"refs/heads/main","Permission":1}]"#;
        let access = access_of(&claims(ac, "1".into())).unwrap();
        assert_eq!(access.write, None);
        assert_eq!(access.read, [Scope::from("1:refs/heads/main")]);
    }

    #[test]
    fn giteas_tokens_have_one_scope_without_a_name() {
        let claims = claims(r#"[{"Scope":"","Permission":2}]"#, serde_json::Value::Null);
        let access = access_of(&claims).unwrap();
        assert_eq!(access, Access::to(":".into()));
    }

    #[test]
    fn a_token_that_names_no_scope_opens_nothing() {
        assert!(access_of(&Claims::default()).is_none());
        for wrong in ["", "[]", "{}", "[{\"Scope\":\"a\"}]"] {
            assert!(access_of(&claims(wrong, "1".into())).is_none(), "{wrong}");
        }
    }
}
