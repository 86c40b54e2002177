//! GitHub's REST API, through octocrab on this binary's own HTTP client.

pub mod caches;

use octocrab::Octocrab;
use octocrab::models::repos::Release;
use semver::Version;

use crate::format::with_causes;

/// GitHub's public API.
pub const API_URL: &str = "https://api.github.com";

/// How many pages of releases are read, of a hundred each: sccache has had some sixty releases in
/// ten years.
const PAGES: u32 = 3;

/// A client of the API at `api_url`. A `token` goes to that host only.
///
/// # Errors
/// Fails if `api_url` is no URL.
pub fn client(
    http: reqwest::Client,
    api_url: &str,
    token: Option<&str>,
) -> Result<Octocrab, octocrab::Error> {
    let mut builder = Octocrab::builder().base_uri(api_url)?;
    if let Some(token) = token {
        builder = builder.personal_token(token.to_owned());
    }
    builder.build_with_reqwest(http)
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
