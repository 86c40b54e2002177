//! GitHub's REST API, through octocrab on this binary's own HTTP client.

pub mod caches;

use octocrab::Octocrab;
use octocrab::models::repos::Release;
use semver::Version;

use crate::format::with_causes;
use crate::http;

/// GitHub's public API.
pub const API_URL: &str = "https://api.github.com";

/// How many pages of releases are read, of a hundred each: sccache has had some sixty releases in
/// ten years.
const PAGES: u32 = 3;

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The API's address is none.
    #[error("`{0}` is not the URL of an API, such as {API_URL}")]
    Url(String),
    /// The token cannot be sent.
    #[error("the token has a line break, a blank or a letter beyond ASCII")]
    Token,
    /// Octocrab's own reason.
    #[error("{}", explain(.0))]
    Octocrab(#[from] octocrab::Error),
}

/// Whether an HTTP header can carry `text` as a token.
pub fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// A client of the API at `api_url`. A `token` goes to that host only. Octocrab itself panics on a URL or
/// a token that HTTP does not allow.
///
/// # Errors
/// [`ClientError`] if `api_url` is no URL or `token` no token.
pub fn client(
    client: reqwest::Client,
    api_url: &str,
    token: Option<&str>,
) -> Result<Octocrab, ClientError> {
    if http::parse_url(api_url).is_none() {
        return Err(ClientError::Url(api_url.to_owned()));
    }
    let mut builder = Octocrab::builder().base_uri(api_url)?;
    if let Some(token) = token {
        if !is_token(token) {
            return Err(ClientError::Token);
        }
        builder = builder.personal_token(token.to_owned());
    }
    Ok(builder.build_with_reqwest(client)?)
}

/// The version of the latest release of `owner/repository`.
///
/// # Errors
/// Fails if the API does not answer, or not with a version.
pub async fn latest_release(
    client: &Octocrab,
    owner: &str,
    repository: &str,
) -> Result<Option<Version>, octocrab::Error> {
    let release = client
        .repos(owner, repository)
        .releases()
        .get_latest()
        .await?;
    Ok(version(&release))
}

/// The versions of all releases of `owner/repository`, without drafts and prereleases.
///
/// # Errors
/// Fails if the API does not answer.
pub async fn releases(
    client: &Octocrab,
    owner: &str,
    repository: &str,
) -> Result<Vec<Version>, octocrab::Error> {
    let repository = client.repos(owner, repository);
    let mut versions = Vec::new();
    for page in 1..=PAGES {
        let list = repository.releases();
        let page = list.list().per_page(100).page(page).send().await?;
        let published = page
            .items
            .iter()
            .filter(|release| !release.draft && !release.prerelease);
        versions.extend(published.filter_map(version));
        if page.next.is_none() {
            break;
        }
    }
    Ok(versions)
}

fn version(release: &Release) -> Option<Version> {
    let tag = release.tag_name.as_str();
    Version::parse(tag.strip_prefix('v').unwrap_or(tag)).ok()
}

/// The message of an octocrab error for a user.
pub fn explain(error: &octocrab::Error) -> String {
    match error {
        octocrab::Error::GitHub { source, .. } => {
            format!("{} ({})", source.message, source.status_code)
        }
        other => with_causes(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Timeouts;

    fn refused(api_url: &str, token: Option<&str>) -> Option<ClientError> {
        let http = http::build(Timeouts::default()).unwrap();
        client(http, api_url, token).err()
    }

    #[tokio::test]
    async fn an_address_that_is_none_and_a_token_that_no_header_carries_are_errors() {
        for url in ["gopher", "", "ftp://host/", "https://", "/api"] {
            let error = refused(url, None);
            assert!(matches!(error, Some(ClientError::Url(_))), "{url}");
        }
        for token in ["", "x\ny", "x y", "t\u{f6}ken", "x\0"] {
            let error = refused(API_URL, Some(token));
            assert!(matches!(error, Some(ClientError::Token)), "{token:?}");
        }
        assert!(refused(API_URL, Some("ghs_0aZ")).is_none());
        assert!(refused("http://127.0.0.1:1/api/v3", None).is_none());
    }
}
