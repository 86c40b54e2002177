//! The packed relay: a cache service on loopback between a job's sccache and GitHub's.
//!
//! To sccache it is GitHub's cache, an entry for each object. To GitHub it is a client that writes
//! a pack now and then. It runs in a process of its own from the main step to the post step.
//!
//! `objects` is what sccache asks, `fetch` gets packs, `save` writes them, `disk_level` is the
//! folder that sccache keeps in front of the relay, `server` sccache's server, `cargo` what it does for cargo's folders,
//! `activity` what was done, `process` how the action's steps start it and talk to it,
//! `inheritance` what it must not have of the step that starts it, on Windows.

pub mod activity;
pub mod cargo;
pub mod disk_level;
mod fetch;
#[cfg(windows)]
mod inheritance;
mod objects;
pub mod process;
mod save;
pub mod server;

use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio::task::AbortHandle;

use crate::github::cache_client::{CacheClient, CacheError, Endpoint};
use crate::http_client::Timeouts;
use crate::relay::activity::Activity;
use crate::relay::cargo::{CargoActivity, CargoJob, CargoRequest};
use crate::relay::disk_level::Hydrated;
use crate::relay::objects::Objects;
use crate::relay::server::{ServerAnswer, ServerRequest};
use crate::service;
use crate::service::auth::{Access, BearerToken, Tokens, UrlSigner};
use crate::store::chain::{Chain, Known};
use crate::store::flush::{FlushPolicy, Limits};
use crate::store::index::Ran;
use crate::store::local::LocalFile;

/// The version of our cache entries: a change of the packs' layout changes it, so that no reader
/// meets what it cannot read.
const ENTRY_VERSION: &str = "sccache-action packs 2";

/// How long the relay lives without a request. A job that ends without its post step (a runner that
/// was killed) must not leave a process for good; GitHub's token is void after about six hours.
const IDLE_LIMIT: Duration = Duration::from_secs(6 * 60 * 60);

/// How long a relay that is told to end by a signal may write what it has.
const SIGNAL_DEADLINE: Duration = Duration::from_secs(5);

/// How many packs are downloaded at once.
const DOWNLOADS: usize = 3;

/// What a relay is started with. It reaches the process through its standard input: neither
/// arguments nor environment of a process are secret on the machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Config {
    /// The cache service behind it.
    pub endpoint: Endpoint,
    /// What sccache shows it.
    pub client_token: BearerToken,
    /// What the action's steps show it.
    pub control_token: BearerToken,
    /// A new folder of its own, removed at its end.
    pub folder: PathBuf,
    /// The user's namespace.
    pub namespace: String,
    /// The platform as part of keys, such as `linux-x64`.
    pub platform: String,
    /// The scopes that are read, best first.
    pub read: Vec<String>,
    /// The scope that is written, or `None` where the job may only read.
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

/// The floor where nothing else is said: a build that runs out of disk fails, and a cache must not be
/// what took the last of it.
pub const FREE_FLOOR: u64 = 1 << 30;

/// Why there is no relay.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// Its configuration did not reach it.
    #[error("its configuration cannot be read: {0}")]
    Config(#[from] serde_json::Error),
    /// Its folder or its port cannot be had.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// There is no client for the cache service.
    #[error("no HTTP client: {0}")]
    Client(#[from] reqwest::Error),
    /// The system has no random numbers.
    #[error("no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

/// A relay at work.
#[derive(Debug)]
pub struct Relay {
    config: Config,
    client: CacheClient,
    started: Instant,
    /// The scopes' chains, the written one first. Held while an entry is read or written.
    known: tokio::sync::Mutex<Vec<Known>>,
    objects: Mutex<Objects>,
    activity: Mutex<Activity>,
    policy: Mutex<FlushPolicy>,
    /// What came of this run, once the post step has said so.
    ran: Mutex<Option<Ran>>,
    /// What cargo's folders began with, once that was asked for.
    cargo: Mutex<Option<CargoJob>>,
    /// Whether what the packs hold is known.
    loaded: watch::Sender<bool>,
    /// Rings when an object waits to be saved.
    waiting: Notify,
    downloads: Arc<Semaphore>,
    /// How many waits for a pack in a row were in vain.
    vain_waits: AtomicU32,
    last_request: Mutex<Instant>,
    /// What keeps sccache's server running.
    server: Mutex<Option<AbortHandle>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The time in seconds since 1970.
fn now() -> u64 {
    service::auth::now()
}

impl Relay {
    /// A relay that has not asked anything yet.
    ///
    /// # Errors
    /// Where its folder or a client cannot be had.
    pub fn new(config: Config) -> Result<Arc<Self>, RelayError> {
        create_private(&config.folder)?;
        let version = hex::encode(Sha256::digest(ENTRY_VERSION));
        let client = CacheClient::new(config.endpoint.clone(), &version, Timeouts::default())?;
        let mut scopes: Vec<&String> = config.write.iter().chain(&config.read).collect();
        let mut seen = std::collections::HashSet::new();
        scopes.retain(|scope| seen.insert(*scope));
        let known = scopes
            .into_iter()
            .map(|scope| Known::nothing(Chain::new(&config.namespace, &config.platform, scope)))
            .collect();
        let limits = Limits {
            age: config.flush_age,
            ..Limits::default()
        };
        let spool = LocalFile::create(&config.folder.join("new"))?;
        let fetched = LocalFile::create(&config.folder.join("fetched"))?;
        let objects = Objects::new(
            config.folder.clone(),
            spool,
            fetched,
            config.write.is_some(),
        );
        Ok(Arc::new(Self {
            client,
            started: Instant::now(),
            known: tokio::sync::Mutex::new(known),
            objects: Mutex::new(objects),
            activity: Mutex::new(Activity::default()),
            policy: Mutex::new(FlushPolicy::new(limits)),
            ran: Mutex::new(None),
            cargo: Mutex::new(None),
            loaded: watch::Sender::new(false),
            waiting: Notify::new(),
            downloads: Arc::new(Semaphore::new(DOWNLOADS)),
            vain_waits: AtomicU32::new(0),
            last_request: Mutex::new(Instant::now()),
            server: Mutex::new(None),
            config,
        }))
    }

    /// Starts what a relay does without being asked: reading the indexes, getting the packs that
    /// this lane used last, writing packs.
    pub fn start(self: &Arc<Self>) {
        tokio::spawn(self.clone().load());
        tokio::spawn(self.clone().save_now_and_then());
    }

    /// What was done so far.
    pub fn activity(&self) -> Activity {
        let mut activity = lock(&self.activity).clone();
        activity.upstream = self.client.requests();
        activity.unsaved = lock(&self.objects).pending().0;
        activity.peak_memory = activity::peak_memory();
        activity
    }

    fn note(&self, change: impl FnOnce(&mut Activity)) {
        change(&mut lock(&self.activity));
    }

    /// Notes that something went wrong that costs hits, now or in the next job.
    fn trouble(&self, what: &str, error: &dyn std::fmt::Display) {
        self.note(|activity| {
            activity.troubles += 1;
            activity
                .first_trouble
                .get_or_insert_with(|| format!("{what}: {error}"));
        });
    }

    /// Notes that something went wrong that will be tried again.
    fn setback(&self, what: &str, error: &dyn std::fmt::Display) {
        self.note(|activity| {
            activity
                .first_setback
                .get_or_insert_with(|| format!("{what}: {error}"));
        });
    }

    fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

/// Makes a folder that nobody else may read, unless it is there.
fn create_private(folder: &Path) -> io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// What the main step asks of a relay before it starts sccache.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HydrateRequest {
    /// The folder of sccache's disk cache, where it has one in front of the relay.
    pub folder: Option<PathBuf>,
    /// How long to wait for what is still on its way.
    pub wait: Duration,
}

/// What the post step asks of a relay.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FinishRequest {
    /// How long it may take to write what waits.
    pub deadline: Duration,
    /// What came of the run, for the next one's summary to show.
    pub ran: Option<Ran>,
}

/// What ends a relay.
struct Lifetime {
    relay: Arc<Relay>,
    ended: Mutex<Option<oneshot::Sender<()>>>,
}

fn control(lifetime: Arc<Lifetime>) -> Router {
    Router::new()
        .route("/relay/activity", get(tell_activity).post(tell_activity))
        .route("/relay/server", post(start_server))
        .route("/relay/hydrate", post(hydrate))
        .route("/relay/cargo", post(restore_cargo))
        .route("/relay/finish", post(finish))
        .route_layer(middleware::from_fn_with_state(lifetime.clone(), admit))
        .with_state(lifetime)
}

/// Lets only those in who have the control token.
async fn admit(Shared(lifetime): Shared<Arc<Lifetime>>, request: Request, next: Next) -> Response {
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

async fn tell_activity(Shared(lifetime): Shared<Arc<Lifetime>>) -> Json<Activity> {
    Json(lifetime.relay.activity())
}

async fn hydrate(
    Shared(lifetime): Shared<Arc<Lifetime>>,
    Json(request): Json<HydrateRequest>,
) -> Json<Hydrated> {
    let relay = lifetime.relay.clone();
    Json(relay.hydrate(request.folder, request.wait).await)
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
    *lock(&lifetime.relay.ran) = request.ran;
    lifetime.relay.finish(request.deadline).await;
    if let Some(ended) = lock(&lifetime.ended).take() {
        let _ = ended.send(());
    }
    Json(lifetime.relay.activity())
}

/// Notes when sccache last asked something.
async fn notice(Shared(relay): Shared<Arc<Relay>>, request: Request, next: Next) -> Response {
    *lock(&relay.last_request) = Instant::now();
    next.run(request).await
}

/// What a relay tells whoever started it, in one line of JSON on its standard output.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Ready {
    /// Its port on 127.0.0.1.
    pub port: u16,
}

/// Runs a relay to its end: until it is told to finish, gets a signal, hears nothing for hours, or
/// `abandoned` ends, which says that the step that started it did not come to its own end.
///
/// # Errors
/// Where it does not come about.
pub async fn run(
    config: &[u8],
    mut ready: impl Write,
    abandoned: impl Future<Output = ()>,
) -> Result<(), RelayError> {
    let config: Config = serde_json::from_slice(config)?;
    let folder = config.folder.clone();
    let relay = Relay::new(config)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address: SocketAddr = listener.local_addr()?;
    let scope = "job".into();
    let tokens = Tokens::default().with(&relay.config.client_token, Access::to(scope));
    let shared = Arc::new(service::Shared::new(
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
    let router = service::router(shared)
        .layer(middleware::from_fn_with_state(relay.clone(), notice))
        .merge(control(lifetime));
    relay.start();
    serde_json::to_writer(
        &mut ready,
        &Ready {
            port: address.port(),
        },
    )?;
    ready.write_all(b"\n")?;
    ready.flush()?;
    drop(ready);
    let stop = {
        let relay = relay.clone();
        async move {
            tokio::select! {
                _ = ended => {}
                () = signalled() => relay.finish(SIGNAL_DEADLINE).await,
                () = relay.is_idle() => relay.finish(SIGNAL_DEADLINE).await,
            }
        }
    };
    let served = axum::serve(listener, router).with_graceful_shutdown(stop);
    tokio::select! {
        served = served.into_future() => served?,
        () = abandoned => {}
    }
    relay.end_server();
    // It goes with the runner's temporary folder otherwise.
    let _ = std::fs::remove_dir_all(folder);
    Ok(())
}

#[cfg(unix)]
async fn signalled() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return std::future::pending().await;
    };
    terminate.recv().await;
}

#[cfg(not(unix))]
async fn signalled() {
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

/// The delay before something that failed is tried again, or `None` where it is not worth it.
fn delay_after(error: &CacheError, attempt: u32) -> Option<Duration> {
    const FIRST: Duration = Duration::from_millis(500);
    match error {
        CacheError::Throttled { retry_after } => Some(retry_after.unwrap_or(FIRST * 10)),
        error if error.is_passing() => Some(FIRST * 2u32.pow(attempt.min(6))),
        _ => None,
    }
}

/// When something was last changed, or the beginning of time.
fn modified(metadata: &std::fs::Metadata) -> SystemTime {
    metadata.modified().unwrap_or(UNIX_EPOCH)
}
