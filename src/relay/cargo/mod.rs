//! The cargo cache between the pack store and the disk: the main step restores parts to the disk, and the
//! post step saves them from there.

mod compile_reason;
mod restore;
mod save;

pub use crate::relay::cargo::compile_reason::CompileReason;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::cargo_cache::build_key::BuildKey;
use crate::cargo_cache::lockfile::{Lockfile, LockfileError};
use crate::cargo_cache::manifest::{
    BaseDir, BuildDirectory, CacheManifest, CachePart, Package, match_rank,
};
use crate::cargo_cache::places::Places;
use crate::packs::index::ObjectKey;

/// The main step's request for the cargo cache.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CargoRequest {
    /// The places of cargo's folders.
    pub places: Places,
    /// The build key of the run.
    pub build_key: BuildKey,
    /// How long the restore may take.
    pub wait: Duration,
    /// The folder of the set-up, in which the wrapper notes what cargo compiles.
    pub state: PathBuf,
}

/// A lockfile that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct CannotUseLockfile {
    path: PathBuf,
    #[source]
    why: CannotReadLockfile,
}

/// Why it cannot be used.
#[derive(Debug, thiserror::Error)]
enum CannotReadLockfile {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Parse(#[from] LockfileError),
}

impl CargoRequest {
    /// The packages of all lockfiles together. A missing lockfile counts as `missing`.
    ///
    /// # Errors
    /// The path of the first lockfile that cannot be read, and the reason.
    fn lockfile(&self, missing: &Lockfile) -> Result<Lockfile, CannotUseLockfile> {
        let mut all = Lockfile::default();
        for path in self.places.workspaces.iter().map(|its| its.lockfile()) {
            let read = || Ok(Lockfile::parse(&fs::read_to_string(&path)?)?);
            match read() {
                Ok(lockfile) => all.add(lockfile),
                Err(CannotReadLockfile::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                    all.add(missing.clone());
                }
                Err(why) => return Err(CannotUseLockfile { path, why }),
            }
        }
        Ok(all)
    }

    /// The packages of the lockfiles before the build. A missing lockfile asks for everything that an
    /// earlier run used.
    ///
    /// # Errors
    /// The path of the first lockfile that cannot be read, and the reason.
    pub fn lockfile_before(&self) -> Result<Lockfile, CannotUseLockfile> {
        self.lockfile(&Lockfile::open())
    }

    /// The packages of the lockfiles after the build, when cargo has written the missing ones.
    fn lockfile_after(&self) -> Result<Lockfile, CannotUseLockfile> {
        self.lockfile(&Lockfile::default())
    }
}

/// The counts of the cargo cache in a job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CargoActivity {
    /// Compiled units put on the disk.
    pub restored_units: u64,
    /// Crates put on the disk.
    pub restored_crates: u64,
    /// The bytes of all parts put on the disk.
    pub restored_bytes: u64,
    /// How long that took, in milliseconds.
    pub restore_milliseconds: u64,
    /// Dependencies with any compiled unit among these, or on the disk before.
    pub restored_dependencies: u64,
    /// Parts that were wanted and unavailable.
    pub missed: u64,
    /// Whether the units that were found had been compiled by another compiler, on another system, or with
    /// other variables, so that only crates were of use.
    pub other_build_key: bool,
    /// Dependencies that cargo compiled all the same, without sccache, and why.
    pub compiled: Vec<(CompileReason, u64)>,
    /// Compiled units that the next job can restore.
    pub kept_units: u64,
    /// Crates that the next job can restore.
    pub kept_crates: u64,
    /// Parts that no earlier job had.
    pub new_parts: u64,
    /// Their bytes, compressed.
    pub new_bytes: u64,
    /// How long the post step took to find them, in milliseconds.
    pub save_milliseconds: u64,
}

/// The main step's request, and the manifest that was found for it.
#[derive(Debug)]
pub(super) struct CargoJob {
    request: CargoRequest,
    /// The manifest that the job began with, and its key.
    before: CacheManifest,
    key: Option<ObjectKey>,
    /// Whether that manifest's units are for such a job.
    same_build_key: bool,
    /// The manifest's build directories in this job.
    builds: Vec<Option<LocalBuild>>,
    /// The numbers of the parts that the lockfiles ask for, and of those that were right in this job.
    asked: HashSet<usize>,
    wanted: Vec<usize>,
}

/// A build directory of a manifest in this job.
#[derive(Clone, Debug)]
struct LocalBuild {
    path: PathBuf,
    /// Whether it and the checkout have the same paths as before.
    is_unmoved: bool,
}

impl CargoJob {
    fn new(
        request: CargoRequest,
        lockfile: &Lockfile,
        chosen: Option<(ObjectKey, CacheManifest)>,
        lane: u64,
    ) -> Self {
        let (key, before) = chosen.unzip();
        let before = before.unwrap_or_default();
        let local = |build: &BuildDirectory| {
            let path = request.places.path_of(&build.place)?;
            let is_unmoved = request.places.digest(&path) == build.paths;
            Some(LocalBuild { path, is_unmoved })
        };
        let builds = before.builds.iter().map(local).collect();
        let match_rank = key.and_then(|key| match_rank(key, request.build_key, lane));
        let mut job = Self {
            same_build_key: match_rank.is_some_and(|(same_build_key, _)| same_build_key),
            asked: before.wanted(lockfile, |_| true).into_iter().collect(),
            wanted: Vec::new(),
            builds,
            request,
            before,
            key,
        };
        job.wanted = job.before.wanted(lockfile, |unit| job.is_usable(unit));
        job
    }

    fn build_of(&self, part: &CachePart) -> Option<&LocalBuild> {
        match part.base {
            BaseDir::Build(number) => self.builds.get(number as usize)?.as_ref(),
            BaseDir::Registry | BaseDir::Git => None,
        }
    }

    /// Whether a unit of the manifest is right in this job.
    fn is_usable(&self, unit: &CachePart) -> bool {
        let build = self.build_of(unit);
        self.same_build_key && build.is_some_and(|build| build.is_unmoved || !unit.path_dependent)
    }

    /// The folder that the paths of a part of the manifest begin in.
    fn folder_of(&self, part: &CachePart) -> Option<PathBuf> {
        match part.base {
            BaseDir::Build(_) => self.build_of(part).map(|build| build.path.clone()),
            BaseDir::Registry => Some(self.request.places.home.join("registry")),
            BaseDir::Git => Some(self.request.places.home.join("git")),
        }
    }
}

/// Whether a part is a crate's archive.
fn is_crate(part: &CachePart) -> bool {
    part.base == BaseDir::Registry && part.package != Package::Several
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// How many threads read and write files at most: more would only wait for the disk.
const THREADS: usize = 4;

/// Hands each of `items` to `work`, in several threads.
fn in_parallel<T: Sync>(items: &[T], work: impl Fn(&T) + Sync) {
    let threads = thread::available_parallelism().map_or(2, NonZero::get);
    let next = std::sync::atomic::AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..threads.min(THREADS).min(items.len()) {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(item);
                }
            });
        }
    });
}
