//! Who may do what: bearer tokens for the API, signed URLs for content.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::service::store::Scope;

/// How long a signed URL may be used. A client asks for one right before it uses it; an upload of
/// many gigabytes may take a while.
pub const URL_LIFETIME: Duration = Duration::from_secs(60 * 60);

/// What the bearer of a token may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// The scope that it writes to, or `None` where it may only read.
    pub write: Option<Scope>,
    /// The scopes that it reads from, best first: a pull request's own, its base's, the default
    /// branch's.
    pub read: Vec<Scope>,
}

impl Access {
    /// Reading and writing one scope.
    pub fn to(scope: Scope) -> Self {
        Self {
            write: Some(scope.clone()),
            read: vec![scope],
        }
    }
}

/// A token that opens the service. It is shown to nobody who prints it by accident; serialized it is
/// its text, for a process that is handed the token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BearerToken(String);

impl BearerToken {
    /// A new token of 256 random bits.
    ///
    /// # Errors
    /// Where the system has no random numbers.
    pub fn random() -> Result<Self, getrandom::Error> {
        Ok(Self(hex::encode(random()?)))
    }

    /// The token of this text.
    pub fn new(token: impl Into<String>) -> Self {
        Self(token.into())
    }

    /// The token itself, for the client that is to use it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for BearerToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("BearerToken(***)")
    }
}

fn random() -> Result<[u8; 32], getrandom::Error> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// The tokens that open the service. Their digests are kept, not they themselves, and compared in
/// constant time.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    known: Vec<([u8; 32], Arc<Access>)>,
}

impl Tokens {
    /// Lets `token` do what `access` says.
    #[must_use]
    pub fn with(mut self, token: &BearerToken, access: Access) -> Self {
        self.known
            .push((Sha256::digest(token.reveal()).into(), Arc::new(access)));
        self
    }

    /// What an `Authorization` header allows; `None` where it allows nothing.
    pub fn access(&self, header: Option<&[u8]>) -> Option<Arc<Access>> {
        let (scheme, token) = header?.split_at_checked(7)?;
        if !scheme.eq_ignore_ascii_case(b"bearer ") {
            return None;
        }
        let digest: [u8; 32] = Sha256::digest(token).into();
        // All are compared, so that time does not tell which one was close.
        let mut found = 0;
        for (position, (known, _)) in (1u32..).zip(&self.known) {
            let same: Choice = known.ct_eq(&digest);
            found.conditional_assign(&position, same);
        }
        let position = usize::try_from(found).ok()?.checked_sub(1)?;
        self.known.get(position).map(|(_, access)| access.clone())
    }
}

/// Checks tokens that others make.
pub trait TokenCheck: fmt::Debug + Send + Sync {
    /// What `token` opens; `None` where it opens nothing here.
    fn access<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Option<Arc<Access>>>;
}

/// The token of an `Authorization` header.
pub(super) fn bearer(header: &[u8]) -> Option<&str> {
    let (scheme, token) = header.split_at_checked(7)?;
    let token = std::str::from_utf8(token).ok()?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
}

/// What a signed URL is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Writing an upload's content.
    Upload,
    /// Reading an entry's.
    Download,
}

/// Signs the URLs under which content is written and read. They need no token besides.
#[derive(Clone)]
pub struct UrlSigner {
    key: [u8; 32],
}

impl fmt::Debug for UrlSigner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("UrlSigner(***)")
    }
}

impl UrlSigner {
    /// A signer with a new key: URLs of an earlier one are void.
    ///
    /// # Errors
    /// Where the system has no random numbers.
    pub fn random() -> Result<Self, getrandom::Error> {
        random().map(Self::with_key)
    }

    /// The signer with this key, which others may have too.
    pub fn with_key(key: [u8; 32]) -> Self {
        Self { key }
    }

    /// A new key as text.
    ///
    /// # Errors
    /// Where the system has no random numbers.
    pub fn new_key() -> Result<String, getrandom::Error> {
        random().map(hex::encode)
    }

    /// The key that `text` is, or `None` where it is none.
    pub fn parse_key(text: &str) -> Option<[u8; 32]> {
        hex::decode(text).ok()?.try_into().ok()
    }

    /// The query of a URL for the content numbered `id`, good until `expiry` (seconds since 1970).
    pub fn query(&self, purpose: Purpose, id: u64, expiry: u64) -> String {
        let signature = hex::encode(self.signature(purpose, id, expiry).finalize().into_bytes());
        format!("se={expiry}&sig={signature}")
    }

    fn signature(&self, purpose: Purpose, id: u64, expiry: u64) -> Hmac<Sha256> {
        // A key of any length will do, so there is nothing to fail.
        let mut mac = match Hmac::<Sha256>::new_from_slice(&self.key) {
            Ok(mac) => mac,
            Err(error) => unreachable!("{error}"),
        };
        mac.update(match purpose {
            Purpose::Upload => b"upload",
            Purpose::Download => b"download",
        });
        mac.update(&id.to_be_bytes());
        mac.update(&expiry.to_be_bytes());
        mac
    }

    /// Whether `expiry` and `signature` of a URL are this signer's and the URL is still good at
    /// `now` (seconds since 1970).
    pub fn is_valid(
        &self,
        purpose: Purpose,
        id: u64,
        expiry: u64,
        signature: &str,
        now: u64,
    ) -> bool {
        let Ok(signature) = hex::decode(signature) else {
            return false;
        };
        let genuine = self.signature(purpose, id, expiry).verify_slice(&signature);
        genuine.is_ok() && now <= expiry
    }
}

/// The time in seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_opens_what_it_was_given_for_and_nothing_else() {
        let (one, two) = (BearerToken::new("one"), BearerToken::new("two"));
        let tokens = Tokens::default()
            .with(&one, Access::to("a".into()))
            .with(&two, Access::to("b".into()));
        let scope = |header: &str| {
            let access = tokens.access(Some(header.as_bytes()))?;
            access.write.clone()
        };
        assert_eq!(scope("Bearer one"), Some("a".into()));
        assert_eq!(scope("bearer two"), Some("b".into()));
        for wrong in [
            "Bearer three",
            "Bearer ",
            "Basic one",
            "one",
            "",
            "Bearer one ",
        ] {
            assert_eq!(scope(wrong), None, "{wrong}");
        }
        assert_eq!(tokens.access(None), None);
    }

    #[test]
    fn a_signed_url_is_good_for_one_thing_for_a_while() {
        let signer = UrlSigner::random().unwrap();
        let query = signer.query(Purpose::Upload, 7, 100);
        let (_, signature) = query.split_once("sig=").unwrap();
        let valid = |purpose, id, expiry, now| signer.is_valid(purpose, id, expiry, signature, now);
        assert!(valid(Purpose::Upload, 7, 100, 100));
        assert!(!valid(Purpose::Upload, 7, 100, 101));
        assert!(!valid(Purpose::Upload, 7, 101, 100));
        assert!(!valid(Purpose::Upload, 8, 100, 100));
        assert!(!valid(Purpose::Download, 7, 100, 100));
        let other = UrlSigner::random().unwrap();
        assert!(!other.is_valid(Purpose::Upload, 7, 100, signature, 100));
        assert!(!signer.is_valid(Purpose::Upload, 7, 100, "zz", 100));
    }

    #[test]
    fn secrets_are_not_printed_by_accident() {
        let token = BearerToken::new("hunter2");
        let signer = UrlSigner { key: [65; 32] };
        assert!(!format!("{token:?} {signer:?}").contains("hunter2"));
        assert!(!format!("{signer:?}").contains("65"));
    }
}
