//! Access rights: bearer tokens for the API, signed URLs for content.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::cache_protocol::ids::{EntryId, UploadId};
use crate::cache_protocol::store::Scope;
use crate::clock::Timestamp;
use crate::http::BearerToken;

/// How long a signed URL may be used. A client asks for one right before it uses it; an upload of
/// many gigabytes may take a while.
pub const URL_LIFETIME: Duration = Duration::from_secs(60 * 60);

/// How much later than [`URL_LIFETIME`] a URL may end: clocks of services that share a storage
/// differ. A later end means that a wrong clock signed it.
const CLOCKS_DIFFER: Duration = Duration::from_secs(10 * 60);

/// The rights of a token's bearer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// The scope that it writes to, or `None` if it may only read.
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

    /// The repository whose token it is, if its scopes name one.
    pub fn owner(&self) -> Option<Owner> {
        let scope = self.read.first().or(self.write.as_ref())?;
        let (repository, _) = scope.0.split_once(':')?;
        let digest = blake3::hash(repository.as_bytes());
        let begin = digest.as_bytes().first_chunk()?;
        (!repository.is_empty()).then(|| Owner(u64::from_be_bytes(*begin)))
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
    /// Gives `token` the rights `access`.
    #[must_use]
    pub fn with(mut self, token: &BearerToken, access: Access) -> Self {
        self.known
            .push((Sha256::digest(token.reveal()).into(), Arc::new(access)));
        self
    }

    /// The rights that an `Authorization` header gives; `None` if it gives none.
    pub fn access(&self, header: Option<&[u8]>) -> Option<Arc<Access>> {
        let (scheme, token) = header?.split_at_checked(7)?;
        if !scheme.eq_ignore_ascii_case(b"bearer ") {
            return None;
        }
        let digest: [u8; 32] = Sha256::digest(token).into();
        // The loop compares all of them, so that the time does not reveal which one was close.
        let mut found = 0;
        for (position, (known, _)) in (1u32..).zip(&self.known) {
            let same: Choice = known.ct_eq(&digest);
            found.conditional_assign(&position, same);
        }
        let position = usize::try_from(found).ok()?.checked_sub(1)?;
        self.known.get(position).map(|(_, access)| access.clone())
    }
}

/// The validity of a token is unknown now, since its issuer's keys are unavailable. The same
/// request may do better in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot check the token now: the issuer's keys are unavailable")]
pub struct KeysUnavailable;

/// Checks tokens that others make.
pub trait TokenVerifier: fmt::Debug + Send + Sync {
    /// The rights that `token` gives; `None` if it gives none here.
    ///
    /// # Errors
    /// [`KeysUnavailable`] if the issuer's keys are unavailable now.
    fn access<'a>(
        &'a self,
        token: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<Access>>, KeysUnavailable>>;

    /// Fetches the keys that a first check would wait for.
    fn prepare(&self) -> BoxFuture<'_, ()>;
}

/// The token of an `Authorization` header.
pub(super) fn bearer(header: &[u8]) -> Option<&str> {
    let (scheme, token) = header.split_at_checked(7)?;
    let token = std::str::from_utf8(token).ok()?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
}

/// A repository, in turns and signed URLs: a part of the digest of its name in scopes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner(pub u64);

impl Owner {
    /// Parses the text in a URL.
    pub fn parse(text: &str) -> Option<Self> {
        u64::from_str_radix(text, 16).ok().map(Self)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:016x}", self.0)
    }
}

/// The purpose of a signed URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Writing the content of this upload.
    Upload(UploadId),
    /// Reading this entry's.
    Download(EntryId),
}

/// Signs the URLs under which content is written and read. They need no token.
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
    /// Fails if the system has no random numbers.
    pub fn random() -> Result<Self, getrandom::Error> {
        random().map(Self::with_key)
    }

    /// The signer with this key, which other services may share.
    pub fn with_key(key: [u8; 32]) -> Self {
        Self { key }
    }

    /// A new key as text.
    ///
    /// # Errors
    /// Fails if the system has no random numbers.
    pub fn new_key() -> Result<String, getrandom::Error> {
        random().map(hex::encode)
    }

    /// Parses a key; `None` if `text` is none.
    pub fn parse_key(text: &str) -> Option<[u8; 32]> {
        hex::decode(text).ok()?.try_into().ok()
    }

    /// The query of a URL for `purpose`, valid until the end of the second `expiry`, for a token of
    /// `owner`.
    pub fn query(&self, purpose: Purpose, expiry: Timestamp, owner: Option<Owner>) -> String {
        let signature = self.signature(purpose, expiry, owner).finalize();
        let signature = hex::encode(signature.into_bytes());
        let seconds = expiry.seconds();
        match owner {
            None => format!("se={seconds}&sig={signature}"),
            Some(owner) => format!("se={seconds}&by={owner}&sig={signature}"),
        }
    }

    fn signature(&self, purpose: Purpose, expiry: Timestamp, owner: Option<Owner>) -> Hmac<Sha256> {
        // HMAC accepts a key of any length, so this cannot fail.
        let mut mac = match Hmac::<Sha256>::new_from_slice(&self.key) {
            Ok(mac) => mac,
            Err(error) => unreachable!("{error}"),
        };
        let (kind, id): (&[u8], u64) = match purpose {
            Purpose::Upload(UploadId(id)) => (b"upload", id),
            Purpose::Download(EntryId(id)) => (b"download", id),
        };
        mac.update(kind);
        mac.update(&id.to_be_bytes());
        mac.update(&expiry.seconds().to_be_bytes());
        if let Some(Owner(owner)) = owner {
            mac.update(&owner.to_be_bytes());
        }
        mac
    }

    /// Whether `expiry`, `owner` and `signature` of a URL come from this signer and the URL is
    /// still valid at `now`.
    pub fn is_valid(
        &self,
        purpose: Purpose,
        (expiry, owner): (Timestamp, Option<Owner>),
        signature: &str,
        now: Timestamp,
    ) -> bool {
        let Ok(signature) = hex::decode(signature) else {
            return false;
        };
        let genuine = self
            .signature(purpose, expiry, owner)
            .verify_slice(&signature);
        let is_over = expiry.seconds() < now.seconds();
        let is_too_far = expiry > now + URL_LIFETIME + CLOCKS_DIFFER;
        genuine.is_ok() && !is_over && !is_too_far
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(seconds: u64) -> Timestamp {
        Timestamp::from_seconds(seconds)
    }

    const UPLOAD: Purpose = Purpose::Upload(UploadId(7));

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
        let query = signer.query(UPLOAD, at(100), None);
        let (_, signature) = query.split_once("sig=").unwrap();
        let valid =
            |purpose, expiry, now| signer.is_valid(purpose, (at(expiry), None), signature, at(now));
        assert!(valid(UPLOAD, 100, 100));
        let late = at(100) + Duration::from_millis(999);
        assert!(signer.is_valid(UPLOAD, (at(100), None), signature, late));
        assert!(!valid(UPLOAD, 100, 101));
        assert!(!valid(UPLOAD, 101, 100));
        assert!(!valid(Purpose::Upload(UploadId(8)), 100, 100));
        assert!(!valid(Purpose::Download(EntryId(7)), 100, 100));
        // A signer whose clock was years ahead makes no URL that is good for years.
        let far = signer.query(UPLOAD, at(100_000), None);
        let (_, far) = far.split_once("sig=").unwrap();
        assert!(!signer.is_valid(UPLOAD, (at(100_000), None), far, at(99)));
        let other = UrlSigner::random().unwrap();
        assert!(!other.is_valid(UPLOAD, (at(100), None), signature, at(100)));
        assert!(!signer.is_valid(UPLOAD, (at(100), None), "zz", at(100)));
    }

    #[test]
    fn nobody_makes_a_url_another_repositorys() {
        let access = |scope: &str| Access::to(scope.into()).owner();
        let owner = access("1:refs/heads/main");
        assert_eq!(owner, access("1:refs/pull/1/merge"));
        assert_ne!(owner, access("2:refs/heads/main"));
        // These scopes name no repository.
        assert_eq!(access("refs/heads/main"), None);
        assert_eq!(access(":refs/heads/main"), None);
        let signer = UrlSigner::random().unwrap();
        let query = signer.query(UPLOAD, at(100), owner);
        let (head, signature) = query.split_once("&sig=").unwrap();
        let (_, by) = head.split_once("by=").unwrap();
        assert_eq!(Owner::parse(by), owner);
        let valid = |owner| signer.is_valid(UPLOAD, (at(100), owner), signature, at(100));
        assert!(valid(owner));
        assert!(!valid(None) && !valid(access("2:refs/heads/main")));
    }

    #[test]
    fn secrets_are_not_printed_by_accident() {
        let token = BearerToken::new("hunter2");
        let signer = UrlSigner { key: [65; 32] };
        assert!(!format!("{token:?} {signer:?}").contains("hunter2"));
        assert!(!format!("{signer:?}").contains("65"));
    }
}
