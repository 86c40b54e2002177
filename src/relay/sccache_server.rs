//! sccache's server as a child of the relay. The relay lives as long as the job and has the environment
//! that the server starts with. So it can start a server that dies again, with the same storage and without
//! a token in any step.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::relay::{Relay, lock};
use crate::runner::environment::Environment;
use crate::sccache::server::{Server, ServerProcess};

/// How often a server is started again in a job. One that dies more often has a reason to.
const RESTARTS: u64 = 5;

/// The main step's request once sccache is installed.
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

/// The outcome of the start.
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

    /// Ends the server, if it still runs: usually the post step has stopped it before.
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
        // A server that ends with success was told to end.
        while let Some(why) = process.end().await {
            self.activity.note(|activity| {
                activity.server_deaths += 1;
                activity.first_server_death.get_or_insert(why);
            });
            if self.activity().server_deaths > RESTARTS {
                return;
            }
            process = match server.start(&environment).await {
                Ok(started) => started,
                Err(error) => {
                    self.activity.note(|activity| {
                        activity.server_not_restarted = Some(error.to_string());
                    });
                    return;
                }
            };
        }
    }
}
