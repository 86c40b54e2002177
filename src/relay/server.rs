//! sccache's server as a child of the relay, which has all that a server is started with and lives
//! as long as the job: where the server dies it is started again, with the same storage and without
//! a token in any step.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::action::environment::Environment;
use crate::relay::{Relay, lock};
use crate::sccache::server::{Server, ServerProcess};

/// How often a server is started again in a job. One that dies more often has a reason to.
const RESTARTS: u64 = 5;

/// What the main step asks of a relay once sccache is there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerRequest {
    sccache: PathBuf,
    port: u16,
    environment: Vec<(String, String)>,
}

impl ServerRequest {
    /// A server with this environment and nothing else in it.
    pub fn new(server: &Server, environment: &Environment) -> Self {
        let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        Self {
            sccache: server.sccache().to_owned(),
            port: server.port(),
            environment: environment.iter().map(owned).collect(),
        }
    }
}

/// What became of the start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerAnswer {
    /// Why the server did not start.
    pub failure: Option<String>,
}

impl Relay {
    /// Starts sccache's server and keeps it running.
    pub(super) async fn start_server(self: Arc<Self>, request: ServerRequest) -> ServerAnswer {
        let server = Server::new(request.sccache, request.port);
        let environment: Environment = request.environment.into_iter().collect();
        let process = match server.start(&environment).await {
            Ok(process) => process,
            Err(error) => {
                let failure = Some(error.to_string());
                return ServerAnswer { failure };
            }
        };
        let kept = tokio::spawn(self.clone().keep_running(server, environment, process));
        if let Some(earlier) = lock(&self.server).replace(kept.abort_handle()) {
            earlier.abort();
        }
        ServerAnswer { failure: None }
    }

    /// Ends the server, if it is still there: what stops a job's server has done so before.
    pub(super) fn end_server(&self) {
        if let Some(kept) = lock(&self.server).take() {
            kept.abort();
        }
    }

    async fn keep_running(
        self: Arc<Self>,
        server: Server,
        environment: Environment,
        mut process: ServerProcess,
    ) {
        // One that ends well was told to.
        while let Some(why) = process.end().await {
            self.note(|activity| {
                activity.server_deaths += 1;
                activity.first_server_death.get_or_insert(why);
            });
            if self.activity().server_deaths > RESTARTS {
                return;
            }
            process = match server.start(&environment).await {
                Ok(started) => started,
                Err(error) => {
                    self.note(|activity| {
                        activity.server_not_restarted = Some(error.to_string());
                    });
                    return;
                }
            };
        }
    }
}
