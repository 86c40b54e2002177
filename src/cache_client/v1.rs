//! Version 1 of the API, REST.

use reqwest::header::ACCEPT;
use reqwest::{Method, RequestBuilder, StatusCode};
use url::Url;

use crate::cache_client::connection::ClientInner;
use crate::cache_client::error::{ApiAnswer, CacheError, Problem, RequestKind};
use crate::cache_client::{FoundEntry, Target};
use crate::cache_protocol::messages::v1::{self, CommitRequest, ReserveRequest, ReserveResponse};

impl ClientInner {
    pub(super) async fn find_v1(
        &self,
        key: &str,
        restore_keys: &[&str],
    ) -> Result<Option<FoundEntry>, CacheError> {
        let mut url = self.api(&format!("{}/cache", v1::PATH))?;
        let keys: Vec<&str> = [key].iter().chain(restore_keys).copied().collect();
        url.query_pairs_mut()
            .append_pair("keys", &keys.join(","))
            .append_pair("version", &self.version);
        let request = self.rest(Method::GET, url);
        let answer = self.call(request, true).await?;
        if answer.status == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        if !answer.status.is_success() {
            return Err(self.refusal(RequestKind::Service, &answer));
        }
        let found: v1::FindResponse = self.read_as(&answer)?;
        Ok(Some(FoundEntry {
            key: found.cache_key,
            url: self.content_url(&found.archive_location)?,
        }))
    }

    /// `None` if the key is taken.
    pub(super) async fn reserve_v1(
        &self,
        key: &str,
        size: Option<u64>,
    ) -> Result<Option<Target>, CacheError> {
        let request = ReserveRequest {
            key: key.to_owned(),
            version: self.version.clone(),
            cache_size: size,
        };
        let url = self.api(&format!("{}/caches", v1::PATH))?;
        let request = self.rest(Method::POST, url).json(&request);
        let answer = self.call(request, false).await?;
        if !answer.status.is_success() {
            return self.taken(&answer);
        }
        let reserved: ReserveResponse = self.read_as(&answer)?;
        Ok(Some(Target::Numbered(reserved.cache_id)))
    }

    pub(super) async fn commit_v1(&self, id: u64, size: u64) -> Result<(), CacheError> {
        let url = self.api(&format!("{}/caches/{id}", v1::PATH))?;
        let request = self.rest(Method::POST, url).json(&CommitRequest { size });
        let answer = self.call(request, false).await?;
        if answer.status.is_success() {
            return Ok(());
        }
        Err(self.refusal(RequestKind::Upload, &answer))
    }

    /// The meaning of a refused reservation: `None` if it only says that the key is taken.
    pub(super) fn taken(&self, answer: &ApiAnswer) -> Result<Option<Target>, CacheError> {
        let problem = Problem::of(&answer.body);
        let is_conflict = answer.status == StatusCode::CONFLICT || problem.is_conflict();
        if is_conflict && !problem.is_denial() {
            return Ok(None);
        }
        Err(self.refusal(RequestKind::Service, answer))
    }

    /// A request of version 1 to `url`, which must be the service's own.
    pub(super) fn rest(&self, method: Method, url: Url) -> RequestBuilder {
        let request = self.http(&url).request(method, url);
        let request = match self.endpoint.token.reveal() {
            "" => request,
            token => request.bearer_auth(token),
        };
        // `createAcceptHeader` of `@actions/cache`; GitHub Enterprise Server chooses by it.
        request.header(ACCEPT, "application/json;api-version=6.0-preview.1")
    }
}
