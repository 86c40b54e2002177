//! Version 2 of the API, Twirp, in JSON as `@actions/cache` speaks it.

use reqwest::header::ACCEPT;
use serde::Serialize;

use crate::cache_client::connection::ClientInner;
use crate::cache_client::error::{ApiAnswer, CacheError, Problem, RequestKind};
use crate::cache_client::{FoundEntry, Target};
use crate::cache_protocol::messages::v2::{
    self, CreateRequest, CreateResponse, FinalizeRequest, FinalizeResponse, GetRequest, GetResponse,
};

impl ClientInner {
    pub(super) async fn find_v2(
        &self,
        key: &str,
        restore_keys: &[&str],
    ) -> Result<Option<FoundEntry>, CacheError> {
        let request = GetRequest {
            key: key.to_owned(),
            restore_keys: restore_keys.iter().map(|key| (*key).to_owned()).collect(),
            version: self.version.clone(),
        };
        let answer = self.twirp(v2::GET, &request, true).await?;
        if !answer.status.is_success() {
            return match Problem::of(&answer.body).code.as_str() {
                "not_found" => Ok(None),
                _ => Err(self.refusal(RequestKind::Service, &answer)),
            };
        }
        let found: GetResponse = self.read_as(&answer)?;
        if !found.ok {
            return Ok(None);
        }
        if found.matched_key.is_empty() {
            return Err(self.unavailable("an entry without a key"));
        }
        Ok(Some(FoundEntry {
            key: found.matched_key,
            url: self.content_url(&found.signed_download_url)?,
        }))
    }

    /// `None` if the key is taken.
    pub(super) async fn reserve_v2(&self, key: &str) -> Result<Option<Target>, CacheError> {
        let request = CreateRequest {
            key: key.to_owned(),
            version: self.version.clone(),
        };
        let answer = self.twirp(v2::CREATE, &request, false).await?;
        if !answer.status.is_success() {
            return self.taken(&answer);
        }
        let created: CreateResponse = self.read_as(&answer)?;
        if created.ok {
            let url = self.content_url(&created.signed_upload_url)?;
            return Ok(Some(Target::Signed(url)));
        }
        let problem = Problem::saying(created.message);
        if problem.is_conflict() {
            return Ok(None);
        }
        Err(self.not_ok(&problem))
    }

    pub(super) async fn commit_v2(&self, key: &str, size: u64) -> Result<(), CacheError> {
        let request = FinalizeRequest {
            key: key.to_owned(),
            size_bytes: i64::try_from(size).map_err(|error| self.unavailable(error))?,
            version: self.version.clone(),
        };
        let answer = self.twirp(v2::FINALIZE, &request, false).await?;
        if !answer.status.is_success() {
            return Err(self.refusal(RequestKind::Upload, &answer));
        }
        let finalized: FinalizeResponse = self.read_as(&answer)?;
        if finalized.ok {
            return Ok(());
        }
        Err(self.not_ok(&Problem::saying(finalized.message)))
    }

    async fn twirp(
        &self,
        method: &str,
        request: &impl Serialize,
        again: bool,
    ) -> Result<ApiAnswer, CacheError> {
        let url = self.api(&format!("twirp/{}/{method}", v2::SERVICE))?;
        let call = self
            .http(&url)
            .post(url)
            .bearer_auth(self.endpoint.token.reveal())
            .header(ACCEPT, "application/json");
        self.call(call.json(request), again).await
    }
}
