//! The tokens that runners give to jobs: JSON Web Tokens whose claims name the parts of the cache
//! that they give access to.
//!
//! GitHub's have the scopes in the claim `ac`, a JSON list inside a string, and the repository's
//! number in `repository_id`; they are signed with RS256 by a key that the issuer publishes. Gitea's
//! have `ac` with one scope without a name and are signed with HS256 (`CreateAuthorizationToken`
//! in its `services/actions/auth.go`).

use serde::Deserialize;

use crate::cache_protocol::auth::Access;
use crate::cache_protocol::store::Scope;
use crate::runner::token::{MAY_WRITE, cache_scopes};

/// The claims of a token that decide about its rights.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct RuntimeClaims {
    ac: Option<String>,
    repository_id: Option<serde_json::Value>,
    repository: Option<String>,
    oidc_extra: Option<String>,
}

/// A repository, as far as a token names it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenRepository {
    /// `OWNER/NAME`.
    pub name: Option<String>,
    /// Its number at its host.
    pub id: Option<String>,
}

impl RuntimeClaims {
    /// The repository of the job that has the token. GitHub's have its name in `oidc_extra`, a JSON
    /// object inside a string: the claims of an identity token that the job may ask for.
    pub fn repository(&self) -> TokenRepository {
        #[derive(Deserialize)]
        struct OidcExtra {
            repository: Option<String>,
        }
        let extra = || {
            let extra: OidcExtra = serde_json::from_str(self.oidc_extra.as_deref()?).ok()?;
            extra.repository
        };
        TokenRepository {
            name: self.repository.clone().or_else(extra),
            id: self.repository_id(),
        }
    }

    fn repository_id(&self) -> Option<String> {
        match &self.repository_id {
            Some(serde_json::Value::String(id)) => Some(id.clone()),
            Some(serde_json::Value::Number(id)) => Some(id.to_string()),
            _ => None,
        }
    }
}

/// The repositories whose jobs are accepted; an empty list accepts all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedRepositories(pub Vec<AllowedRepository>);

/// Repositories that are allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedRepository {
    /// All of this owner.
    Owner(String),
    /// The one called `OWNER/NAME`.
    Name(String),
    /// The one of this number at its host, which stays when it is renamed.
    Id(String),
}

impl std::str::FromStr for AllowedRepository {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_name = |name: &str| {
            let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            !name.is_empty() && name.bytes().all(fits)
        };
        if let Some(id) = text.strip_prefix("id:")
            && !id.is_empty()
            && id.bytes().all(|byte| byte.is_ascii_digit())
        {
            return Ok(Self::Id(id.to_owned()));
        }
        match text.split_once('/') {
            None if is_name(text) => Ok(Self::Owner(text.to_owned())),
            Some((owner, name)) if is_name(owner) && is_name(name) => {
                Ok(Self::Name(text.to_owned()))
            }
            _ => Err("it must be OWNER, OWNER/NAME or id:NUMBER"),
        }
    }
}

impl AllowedRepositories {
    /// Whether jobs of `repository` are allowed. Names are compared as GitHub does: case does not
    /// count.
    pub fn allows(&self, repository: &TokenRepository) -> bool {
        let name = repository.name.as_deref();
        let owner = name
            .and_then(|name| name.split_once('/'))
            .map(|(owner, _)| owner);
        let is = |own: Option<&str>, allowed: &str| {
            own.is_some_and(|own| own.eq_ignore_ascii_case(allowed))
        };
        self.0.is_empty()
            || self.0.iter().any(|allowed| match allowed {
                AllowedRepository::Owner(allowed) => is(owner, allowed),
                AllowedRepository::Name(allowed) => is(name, allowed),
                AllowedRepository::Id(allowed) => repository.id.as_ref() == Some(allowed),
            })
    }
}

/// The name under which entries of one repository's scope are kept, apart from other repositories'.
pub fn scope_of(repository: &str, scope: &str) -> Scope {
    Scope(format!("{repository}:{scope}").into())
}

/// The rights of a token with these claims, or `None` if it names no scope. The scope that may be
/// written is read first, then the others in the token's order.
pub fn access_of(claims: &RuntimeClaims) -> Option<Access> {
    let scopes = cache_scopes(claims.ac.as_deref()?)?;
    let repository = claims.repository_id().unwrap_or_default();
    let writable = scopes
        .iter()
        .find(|scope| scope.permission & MAY_WRITE != 0);
    let own = writable.map(|scope| scope.scope.as_str());
    let others = scopes
        .iter()
        .map(|scope| scope.scope.as_str())
        .filter(|scope| Some(*scope) != own);
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

    fn claims(ac: &str, repository: serde_json::Value) -> RuntimeClaims {
        RuntimeClaims {
            ac: Some(ac.to_owned()),
            repository_id: Some(repository),
            ..RuntimeClaims::default()
        }
    }

    #[test]
    fn only_jobs_of_repositories_that_are_named_are_let_in() {
        let allowed = |texts: &[&str]| {
            AllowedRepositories(texts.iter().map(|text| text.parse().unwrap()).collect())
        };
        let claims: RuntimeClaims = serde_json::from_str(
            r#"{"repository_id":"12","oidc_extra":"{\"repository\":\"Owner/name\"}"}"#,
        )
        .unwrap();
        let own = claims.repository();
        for good in ["owner", "OWNER", "owner/name", "id:12"] {
            assert!(allowed(&["other", good]).allows(&own), "{good}");
        }
        for other in ["own", "name", "owner/nam", "owner/name2", "12", "id:1"] {
            assert!(!allowed(&[other]).allows(&own), "{other}");
        }
        assert!(allowed(&[]).allows(&TokenRepository::default()));
        assert!(!allowed(&["owner"]).allows(&TokenRepository::default()));
        for wrong in ["", "a/b/c", "/b", "a/", "id:", "id:x", "a b", "a*"] {
            assert!(wrong.parse::<AllowedRepository>().is_err(), "{wrong}");
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
        assert!(access_of(&RuntimeClaims::default()).is_none());
        for wrong in ["", "[]", "{}", "[{\"Scope\":\"a\"}]"] {
            assert!(access_of(&claims(wrong, "1".into())).is_none(), "{wrong}");
        }
    }
}
