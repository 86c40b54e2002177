//! The packed relay: a cache service on loopback between a job's sccache and GitHub's.
//!
//! To sccache it is GitHub's cache, an entry for each object. To GitHub it is a client that writes
//! a pack now and then. It runs in a process of its own from the main step to the post step.
//!
//! The main step starts it (`process` there, [`run`] here). It reads the indexes and fetches the packs that
//! its lane used last (`prefetch`), fills sccache's disk (`prefill`, in the format of `disk_tier`) and
//! cargo's folders (`cargo`), and keeps sccache's server running (`sccache_server`). Then it answers
//! sccache (`store`) until the post step tells it to finish: it writes the pending objects, and ends.
//!
//! Three parts own its state: `object_table` has the objects and packs, as values; `downloads` the packs on
//! their way; `pack_writer` the chains of entries and the policy when to write. `activity` counts, and
//! `windows_handles` keeps the relay from inheriting the handles of the step that starts it, on Windows.

pub mod activity;
pub mod cargo;
pub mod disk_tier;
mod downloads;
mod object_table;
mod pack_writer;
mod prefetch;
mod prefill;
pub mod process;
pub mod sccache_server;
#[cfg(test)]
mod simulation;
mod store;
mod tasks;
#[cfg(windows)]
mod windows_handles;

use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{Request, State as Shared};
use axum::http::StatusCode;
use axum::http::header::AUTHORIZATION;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cache_client::{CacheClient, CacheError, Endpoint};
use crate::cache_protocol;
use crate::cache_protocol::auth::{Access, Tokens, UrlSigner};
use crate::clock::Timestamp;
use crate::http::BearerToken;
use crate::http::Timeouts;
use crate::packs::index::RunStats;
use crate::packs::local_file::LocalFile;
use crate::relay::activity::{Activity, ActivityLog};
use crate::relay::cargo::{CargoActivity, CargoJob, CargoRequest};
use crate::relay::disk_tier::PrefillReport;
use crate::relay::downloads::Downloads;
use crate::relay::object_table::{ObjectTable, SharedTable};
use crate::relay::pack_writer::PackWriter;
use crate::relay::sccache_server::{ServerAnswer, ServerRequest};
use crate::relay::store::Uploads;
use crate::relay::tasks::RelayTasks;

/// The version of our cache entries. It changes with the packs' layout, so that no reader finds an entry
/// that it cannot read.
const ENTRY_VERSION: &str = "sccache-action packs 3";

/// How long the relay lives without a request. A job that ends without its post step (a runner that was
/// killed) must not leave a process for good; GitHub's token expires after about six hours.
const IDLE_LIMIT: Duration = Duration::from_secs(6 * 60 * 60);

/// How long a relay that gets a signal to end may write its pending objects.
const SIGNAL_DEADLINE: Duration = Duration::from_secs(5);

/// How long a relay at its end waits for requests that are under way.
const LAST_REQUESTS_LIMIT: Duration = Duration::from_secs(10);

/// The task of a relay's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RelayTask {
    /// It is the cache between sccache and the cache service, and keeps sccache's server running.
    Store,
    /// It only keeps sccache's server running, which uses the cache service itself: no step has the
    /// environment that the server starts with.
    KeepServer,
}

/// The configuration of a relay. It reaches the process through standard input: neither arguments nor
/// environment of a process are secret on the machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RelayConfig {
    /// Its task.
    pub task: RelayTask,
    /// The cache service behind it.
    pub endpoint: Endpoint,
    /// The token that sccache sends.
    pub client_token: BearerToken,
    /// The token that the action's steps send.
    pub control_token: BearerToken,
    /// A new folder of its own, removed at its end.
    pub folder: PathBuf,
    /// The user's namespace.
    pub namespace: String,
    /// The platform as part of keys, such as `linux-x64`.
    pub platform: String,
    /// The scopes that it reads, best first; none if the job may only write.
    pub read: Vec<String>,
    /// The scope that it writes, or `None` if the job may only read.
    pub write: Option<String>,
    /// The job's lane: what runs of the same job have in common.
    pub lane: u64,
    /// How many bytes the packs of a scope may have.
    pub max_size: u64,
    /// How long an object waits at most before it is written.
    pub flush_age: Duration,
    /// How many bytes the disk of `folder` must have free for the relay to keep what is new.
    pub free_floor: u64,
}

#[cfg(test)]
impl RelayConfig {
    /// The configuration of a relay that sends no request to its upstream.
    fn for_test(folder: PathBuf) -> Self {
        let token = || BearerToken::new("none");
        Self {
            task: RelayTask::Store,
            endpoint: Endpoint {
                protocol: crate::cache_client::Protocol::V2,
                url: "http://127.0.0.1:9/".parse().unwrap(),
                token: token(),
            },
            client_token: token(),
            control_token: token(),
            folder,
            namespace: "default".to_owned(),
            platform: "linux-x64".to_owned(),
            read: Vec::new(),
            write: Some("refs/heads/main".to_owned()),
            lane: 0,
            max_size: 1 << 30,
            flush_age: Duration::from_secs(45),
            free_floor: 0,
        }
    }
}

/// The default of [`RelayConfig::free_floor`]: a build that runs out of disk fails, and a cache must not
/// take the last of it.
pub const FREE_FLOOR: u64 = 1 << 30;

/// Why there is no relay.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// Its configuration is unreadable.
    #[error("cannot read its configuration: {0}")]
    Config(#[from] serde_json::Error),
    /// Its folder or its port is unavailable.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The client for the cache service cannot be created.
    #[error("cannot create an HTTP client: {0}")]
    Client(#[from] reqwest::Error),
    /// The system has no random numbers.
    #[error("cannot read random numbers from the system: {0}")]
    Random(#[from] getrandom::Error),
}

/// A relay at work: the table of objects and packs, the downloads, and the writer of packs.
///
/// The table has no task of its own. `downloads` fetches packs, each in a task; `writer` has one task that
/// writes them. `tasks` has all of these, and `stop` tells the writer that the job ends.
#[derive(Debug)]
pub struct Relay {
    config: Arc<RelayConfig>,
    client: CacheClient,
    clock: RelayClock,
    table: Arc<SharedTable>,
    activity: Arc<ActivityLog>,
    downloads: Arc<Downloads>,
    writer: Arc<PackWriter>,
    uploads: Mutex<Uploads>,
    /// The job's request for the cargo cache and its manifest, once the main step has asked.
    cargo: Mutex<Option<CargoJob>>,
    /// Whether the indexes have been read.
    loaded: watch::Sender<bool>,
    /// Notified when an object becomes pending.
    pending: Arc<Notify>,
    tasks: RelayTasks,
    stop: CancellationToken,
    last_request: Mutex<Instant>,
    /// The task that keeps sccache's server running.
    server: Mutex<Option<AbortHandle>>,
}

/// The relay's time: how long it has run, and the time of day.
#[derive(Clone, Copy, Debug)]
struct RelayClock {
    started: Instant,
    /// The start by this machine's clock.
    started_at: Timestamp,
}

impl RelayClock {
    /// How long the relay has run.
    fn elapsed(self) -> Duration {
        self.started.elapsed()
    }

    /// The moment `since_start` after the relay's start.
    fn instant(self, since_start: Duration) -> Instant {
        self.started + since_start
    }

    /// How long after the relay's start `instant` is.
    fn since_start(self, instant: Instant) -> Duration {
        instant.saturating_duration_since(self.started)
    }

    /// The time in whole seconds by the cache service's clock, which all jobs share. A machine's own
    /// clock may be days off, and would make the relay drop or keep the wrong packs. If the service does
    /// not tell the time, this is the machine's time at the relay's start plus the time since.
    fn time(self, client: &CacheClient) -> Timestamp {
        let own = || self.started_at + self.elapsed();
        client.time().unwrap_or_else(own).whole_seconds()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Relay {
    /// A relay that has sent no request yet.
    ///
    /// # Errors
    /// [`RelayError::Io`] if its folder cannot be created, [`RelayError::Client`] if there is no client.
    pub fn new(config: RelayConfig) -> Result<Arc<Self>, RelayError> {
        let version = hex::encode(Sha256::digest(ENTRY_VERSION));
        let client = CacheClient::new(config.endpoint.clone(), &version, Timeouts::default())?;
        Self::with(config, client, Timestamp::now())
    }

    /// A relay that speaks through `client` and is started at `started_at`.
    fn with(
        config: RelayConfig,
        client: CacheClient,
        started_at: Timestamp,
    ) -> Result<Arc<Self>, RelayError> {
        create_private(&config.folder)?;
        let spool = LocalFile::create(&config.folder.join("new"))?;
        let fetched = LocalFile::create(&config.folder.join("fetched"))?;
        let folder = config.folder.clone();
        let table = ObjectTable::new(folder.clone(), spool, fetched, config.write.is_some());
        let table = Arc::new(SharedTable::new(table));
        let clock = RelayClock {
            started: Instant::now(),
            started_at,
        };
        let config = Arc::new(config);
        let activity = Arc::new(ActivityLog::default());
        let pending = Arc::new(Notify::new());
        let tasks = RelayTasks::default();
        let downloads = Downloads::new(
            config.clone(),
            client.clone(),
            table.clone(),
            activity.clone(),
            tasks.clone(),
        );
        let writer = PackWriter::new(
            config.clone(),
            client.clone(),
            clock,
            (table.clone(), activity.clone()),
            pending.clone(),
        );
        Ok(Arc::new(Self {
            config,
            client,
            clock,
            table,
            activity,
            downloads: Arc::new(downloads),
            writer: Arc::new(writer),
            uploads: Mutex::new(Uploads::new(folder)),
            cargo: Mutex::new(None),
            loaded: watch::Sender::new(false),
            pending,
            tasks,
            stop: CancellationToken::new(),
            last_request: Mutex::new(Instant::now()),
            server: Mutex::new(None),
        }))
    }

    /// Starts the relay's own work: reading the indexes, fetching the packs that this lane used last,
    /// writing packs.
    pub fn start(self: &Arc<Self>) {
        self.tasks.spawn(self.clone().load());
        let writer = self.writer.clone();
        self.tasks.spawn(writer.run(self.stop.clone()));
    }

    /// The counts so far.
    pub fn activity(&self) -> Activity {
        let mut activity = self.activity.snapshot();
        activity.upstream = self.client.requests();
        activity.unsaved = self.table.lock().pending().0;
        activity.peak_memory = activity::peak_memory();
        activity
    }

    /// Writes all pending objects, for up to `deadline`.
    async fn finish(self: &Arc<Self>, deadline: Duration) {
        self.stop.cancel();
        if self.config.task == RelayTask::KeepServer {
            return;
        }
        let deadline = Instant::now() + deadline;
        let _ = tokio::time::timeout_at(deadline, self.is_loaded()).await;
        let relay = self.clone();
        let work = move || {
            relay.save_cargo(deadline.into_std());
            relay.take_from_disk();
        };
        if let Err(error) = tokio::task::spawn_blocking(work).await {
            self.activity.error("the cargo cache was not saved", &error);
        }
        self.writer.finish(deadline).await;
    }
}

/// Creates a folder that nobody else may read, unless it exists.
fn create_private(folder: &Path) -> io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// The main step's request before it starts sccache.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PrefillRequest {
    /// The folder of sccache's disk cache, if it has one in front of the relay.
    pub folder: Option<PathBuf>,
    /// How long to wait for packs that are still on their way.
    pub wait: Duration,
}

/// The post step's request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FinishRequest {
    /// How long the relay may take to write the pending objects.
    pub deadline: Duration,
    /// The results of the run, for the next run's summary.
    pub run_stats: Option<RunStats>,
}

/// The relay, and the signal that ends it.
struct Lifetime {
    relay: Arc<Relay>,
    ended: Mutex<Option<oneshot::Sender<()>>>,
}

fn control(lifetime: Arc<Lifetime>) -> Router {
    Router::new()
        .route("/relay/activity", get(get_activity).post(get_activity))
        .route("/relay/server", post(start_server))
        .route("/relay/prefill", post(prefill))
        .route("/relay/cargo", post(restore_cargo))
        .route("/relay/finish", post(finish))
        .route_layer(middleware::from_fn_with_state(
            lifetime.clone(),
            require_control_token,
        ))
        .with_state(lifetime)
}

/// Refuses requests without the control token.
async fn require_control_token(
    Shared(lifetime): Shared<Arc<Lifetime>>,
    request: Request,
    next: Next,
) -> Response {
    let anybody = Access {
        write: None,
        read: Vec::new(),
    };
    let tokens = Tokens::default().with(&lifetime.relay.config.control_token, anybody);
    let header = request.headers().get(AUTHORIZATION);
    match tokens.access(header.map(|value| value.as_bytes())) {
        Some(_) => next.run(request).await,
        None => StatusCode::UNAUTHORIZED.into_response(),
    }
}

async fn get_activity(Shared(lifetime): Shared<Arc<Lifetime>>) -> Json<Activity> {
    Json(lifetime.relay.activity())
}

async fn prefill(
    Shared(lifetime): Shared<Arc<Lifetime>>,
    Json(request): Json<PrefillRequest>,
) -> Json<PrefillReport> {
    let relay = lifetime.relay.clone();
    Json(relay.prefill(request.folder, request.wait).await)
}

async fn start_server(
    Shared(lifetime): Shared<Arc<Lifetime>>,
    Json(request): Json<ServerRequest>,
) -> Json<ServerAnswer> {
    Json(lifetime.relay.clone().start_server(request).await)
}

async fn restore_cargo(
    Shared(lifetime): Shared<Arc<Lifetime>>,
    Json(request): Json<CargoRequest>,
) -> Json<CargoActivity> {
    Json(lifetime.relay.clone().restore_cargo(request).await)
}

async fn finish(
    Shared(lifetime): Shared<Arc<Lifetime>>,
    Json(request): Json<FinishRequest>,
) -> Json<Activity> {
    lifetime.relay.writer.set_run_stats(request.run_stats);
    lifetime.relay.finish(request.deadline).await;
    if let Some(ended) = lock(&lifetime.ended).take() {
        let _ = ended.send(());
    }
    Json(lifetime.relay.activity())
}

/// Notes the time of sccache's last request.
async fn track_activity(
    Shared(relay): Shared<Arc<Relay>>,
    request: Request,
    next: Next,
) -> Response {
    *lock(&relay.last_request) = Instant::now();
    next.run(request).await
}

/// The message of a relay that has started, one line of JSON on its standard output.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct RelayReady {
    /// Its port on 127.0.0.1.
    pub port: u16,
}

/// Runs a relay to its end: until it is told to finish, gets a signal, gets no request for hours, or
/// `abandoned` ends because the step that started it was killed.
///
/// # Errors
/// [`RelayError`] if the relay cannot start.
pub async fn run(
    config: &[u8],
    mut ready: impl Write,
    abandoned: impl Future<Output = ()>,
) -> Result<(), RelayError> {
    let config: RelayConfig = serde_json::from_slice(config)?;
    let folder = config.folder.clone();
    let relay = Relay::new(config)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address: SocketAddr = listener.local_addr()?;
    let scope = "job".into();
    let tokens = Tokens::default().with(&relay.config.client_token, Access::to(scope));
    let shared = Arc::new(cache_protocol::AppState::new(
        relay.clone(),
        tokens,
        address,
        UrlSigner::random()?,
    ));
    let (end, ended) = oneshot::channel();
    let lifetime = Arc::new(Lifetime {
        relay: relay.clone(),
        ended: Mutex::new(Some(end)),
    });
    let mut router = control(lifetime);
    if relay.config.task == RelayTask::Store {
        let stored = cache_protocol::router(shared);
        let noticed = middleware::from_fn_with_state(relay.clone(), track_activity);
        router = stored.layer(noticed).merge(router);
        relay.start();
    }
    serde_json::to_writer(
        &mut ready,
        &RelayReady {
            port: address.port(),
        },
    )?;
    ready.write_all(b"\n")?;
    ready.flush()?;
    drop(ready);
    let (stopping, stopped) = oneshot::channel();
    let stop = {
        let relay = relay.clone();
        async move {
            tokio::select! {
                _ = ended => {}
                () = terminated() => relay.finish(SIGNAL_DEADLINE).await,
                () = relay.is_idle() => relay.finish(SIGNAL_DEADLINE).await,
            }
            let _ = stopping.send(());
        }
    };
    let too_long = async {
        if stopped.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(LAST_REQUESTS_LIMIT).await;
    };
    let served = axum::serve(listener, router).with_graceful_shutdown(stop);
    tokio::select! {
        served = served.into_future() => served?,
        () = too_long => {}
        () = abandoned => {}
    }
    relay.end_server();
    // None of them may write to the folder that is removed here.
    relay.tasks.end().await;
    // If this fails, it goes with the runner's temporary folder.
    let _ = std::fs::remove_dir_all(folder);
    Ok(())
}

#[cfg(unix)]
async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return std::future::pending().await;
    };
    terminate.recv().await;
}

#[cfg(not(unix))]
async fn terminated() {
    // Other systems have no signal that leaves a process time.
    std::future::pending().await
}

impl Relay {
    async fn is_idle(&self) {
        loop {
            let idle = lock(&self.last_request).elapsed();
            match IDLE_LIMIT.checked_sub(idle) {
                Some(rest) if !rest.is_zero() => tokio::time::sleep(rest).await,
                _ => return,
            }
        }
    }
}

/// The delay before another attempt, or `None` if another attempt is of no use.
fn delay_after(error: &CacheError, attempt: u32) -> Option<Duration> {
    const FIRST: Duration = Duration::from_millis(500);
    match error {
        CacheError::Throttled { retry_after } => Some(retry_after.unwrap_or(FIRST * 10)),
        error if error.is_passing() => Some(FIRST * 2u32.pow(attempt.min(6))),
        _ => None,
    }
}

/// The modification time, or 1970 if it is unknown.
fn modified(metadata: &std::fs::Metadata) -> SystemTime {
    metadata.modified().unwrap_or(UNIX_EPOCH)
}
