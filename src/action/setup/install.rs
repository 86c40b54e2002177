//! Gets sccache: calls [`crate::install`] with the inputs.

use crate::action::inputs::{ApiToken, Inputs};
use crate::github;
use crate::http::{Timeouts, is_on_loopback};
use crate::install::{self, InstallError, Installed, Platform};
use crate::runner::environment::Environment;
use crate::runner::log::Log;

pub(super) async fn install(
    environment: &Environment,
    inputs: &Inputs,
    log: &Log,
) -> Result<Installed, InstallError> {
    let request = install::Request {
        version: &inputs.version,
        sources: &inputs.install_from,
        token: inputs.token.as_ref().map(ApiToken::reveal),
        checksum: inputs.checksum,
        digests: install::RELEASE_DIGESTS,
        // sccache's releases are on GitHub itself, also for a job of an Enterprise Server.
        api_url: api_of_a_test(environment).unwrap_or(github::API_URL),
        releases_url: &inputs.mirror,
        environment,
        platform: Platform::of(environment),
        timeouts: Timeouts::default(),
    };
    install::install(&request, log).await
}

/// A replacement for GitHub's API in tests. It gets the input `token`, so it must be on this
/// machine: an earlier step may have set the variable.
fn api_of_a_test(environment: &Environment) -> Option<&str> {
    let named = environment.get("SCCACHE_ACTION_API_URL")?;
    let url = url::Url::parse(named).ok()?;
    is_on_loopback(&url).then_some(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_goes_to_no_other_api_than_githubs_and_one_on_this_machine() {
        let api = |url: &str| {
            let environment = Environment::from_iter([("SCCACHE_ACTION_API_URL", url)]);
            api_of_a_test(&environment).map(str::to_owned)
        };
        let own = "http://127.0.0.1:8000";
        assert_eq!(api(own).as_deref(), Some(own));
        for other in [
            "https://api.evil.example",
            "http://127.0.0.1.evil.example/",
            "http://127.0.0.1@evil.example/",
            "nonsense",
            "",
        ] {
            assert_eq!(api(other), None, "{other}");
        }
    }
}
