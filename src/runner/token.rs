//! The cache scopes that a job's runtime token names, in its claim `ac`.

use serde::Deserialize;

/// The bit of a scope's permission that allows writing.
pub const MAY_WRITE: u64 = 2;

/// A scope of the claim `ac`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct CacheScope {
    /// The ref.
    #[serde(rename = "Scope", alias = "scope", default)]
    pub scope: String,
    /// The rights: 1 to read, [`MAY_WRITE`] to write.
    #[serde(rename = "Permission", alias = "permission")]
    pub permission: u64,
}

/// The scopes that the claim `ac` names, or `None` if it cannot be read.
pub fn cache_scopes(ac: &str) -> Option<Vec<CacheScope>> {
    serde_json::from_str(ac).ok()
}
