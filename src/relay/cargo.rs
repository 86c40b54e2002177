//! The cargo cache between the pack store and the disk: what the main step has put there, and what
//! the post step has taken from there.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::cargo::files::{self, PART_LIMIT, PutError};
use crate::cargo::home;
use crate::cargo::layout::Layout;
use crate::cargo::lockfile::Lockfile;
use crate::cargo::manifest::{
    Manifest, Package, Part, Root, chunk_key, is_cargos, manifest_key, suits,
};
use crate::cargo::target;
use crate::relay::objects::{PackState, Place};
use crate::relay::{Relay, lock, now};
use crate::store::index::{Digest, ObjectKey, hours};

/// How long a part is waited for while nothing of its pack comes.
const STALL: Duration = Duration::from_secs(20);

/// How many manifests are tried, the one that suits best first.
const MANIFESTS_TRIED: usize = 3;

/// A pack of which so many parts are wanted is fetched as a whole, and so is one of which at least
/// this fraction of the bytes is.
const MANY_PARTS: usize = 8;
const LARGE_SHARE: u64 = 4;

/// A compressed part is in memory up to this size, in bytes, and in a file beyond it.
const PART_IN_MEMORY: usize = 8 << 20;

/// How many threads read and write files at most: beyond that the disk is what is waited for.
const THREADS: usize = 4;

/// What the main step asks of a relay for cargo.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CargoRequest {
    /// Cargo's home.
    pub home: PathBuf,
    /// The target folders.
    pub targets: Vec<PathBuf>,
    /// The lockfiles.
    pub lockfiles: Vec<PathBuf>,
    /// The layout of the run.
    pub layout: Layout,
    /// How long the restore may take.
    pub wait: Duration,
}

impl CargoRequest {
    /// The folder that parts of this root lie in.
    fn folder(&self, root: Root) -> Option<PathBuf> {
        match root {
            Root::Target(number) => self.targets.get(number as usize).cloned(),
            Root::Registry => Some(self.home.join("registry")),
            Root::Git => Some(self.home.join("git")),
        }
    }

    /// What the lockfiles ask for together. One that is not there asks for nothing.
    ///
    /// # Errors
    /// The first that cannot be read, and why.
    pub fn lockfile(&self) -> Result<Lockfile, String> {
        let mut all = Lockfile::default();
        for path in &self.lockfiles {
            let text = match fs::read_to_string(path) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(format!("{}: {error}", path.display())),
            };
            let lockfile = Lockfile::parse(&text);
            all.add(lockfile.map_err(|error| format!("{}: {error}", path.display()))?);
        }
        Ok(all)
    }
}

/// What was done for cargo in a job.
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
    /// Parts that were wanted and could not be had.
    pub missed: u64,
    /// Whether what was found had been compiled by another compiler, on another system, or with
    /// other variables, so that only crates were of use.
    pub other_layout: bool,
    /// Compiled units that the next job can have.
    pub kept_units: u64,
    /// Crates that the next job can have.
    pub kept_crates: u64,
    /// Parts that no earlier job had.
    pub new_parts: u64,
    /// Their bytes, compressed.
    pub new_bytes: u64,
    /// How long the post step took to find them, in milliseconds.
    pub save_milliseconds: u64,
}

/// What the main step asked for, and what there was for it.
#[derive(Debug)]
pub(super) struct CargoJob {
    request: CargoRequest,
    /// The manifest that the job began with, and its key.
    before: Manifest,
    key: Option<ObjectKey>,
}

/// Why a part is not on the disk.
#[derive(Debug, thiserror::Error)]
enum PartError {
    #[error("its content is not to be had")]
    Lost,
    #[error("its content is damaged")]
    Damaged,
    #[error("it is not the archive that the lockfile asks for")]
    Foreign,
    #[error(transparent)]
    Put(#[from] PutError),
}

impl From<io::Error> for PartError {
    fn from(error: io::Error) -> Self {
        Self::Put(error.into())
    }
}

/// Sets a flag when it is dropped: whoever waits for a restore may go, and what goes on in other
/// threads must not.
struct Stopping(Arc<AtomicBool>);

impl Drop for Stopping {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Relay {
    /// Puts on the disk what a run with the request's lockfiles and layout wants of what earlier
    /// ones left.
    pub(super) async fn restore_cargo(self: Arc<Self>, request: CargoRequest) -> CargoActivity {
        let begin = Instant::now();
        let deadline = begin + request.wait;
        let mut loaded = self.loaded.subscribe();
        let loaded = loaded.wait_for(|loaded| *loaded);
        let _ = tokio::time::timeout(request.wait, loaded).await;
        let lockfile = request.lockfile().unwrap_or_else(|error| {
            self.trouble("a lockfile cannot be read", &error);
            Lockfile::default()
        });
        let chosen = self.choose_manifest(request.layout).await;
        let (key, before) = chosen.unzip();
        let before = before.unwrap_or_default();
        let same_layout = key
            .and_then(|key| suits(key, request.layout, self.config.lane))
            .is_some_and(|(same_layout, _)| same_layout);
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Stopping(stop.clone());
        let relay = self.clone();
        let handle = Handle::current();
        let job = CargoJob {
            request,
            before,
            key,
        };
        let restored = tokio::task::spawn_blocking(move || {
            let restore = Restore {
                relay: &relay,
                job: &job,
                lockfile: &lockfile,
                handle: &handle,
                stop: &stop,
                deadline,
            };
            let activity = restore.run(same_layout);
            (activity, job)
        })
        .await;
        drop(stopping);
        let Ok((mut activity, job)) = restored else {
            return CargoActivity::default();
        };
        activity.other_layout = job.key.is_some() && !same_layout;
        activity.restore_milliseconds = milliseconds(begin);
        *lock(&self.cargo) = Some(job);
        self.note(|all| all.cargo = Some(activity.clone()));
        activity
    }

    /// The manifest that suits the job best, with its key.
    async fn choose_manifest(self: &Arc<Self>, layout: Layout) -> Option<(ObjectKey, Manifest)> {
        let lane = self.config.lane;
        let mut candidates: Vec<((bool, bool), u64, ObjectKey)> = Vec::new();
        {
            let known = self.known.lock().await;
            for pack in known.iter().flat_map(|known| known.index.packs.values()) {
                let suiting = pack.objects.keys().filter_map(|key| {
                    let how_well = suits(*key, layout, lane)?;
                    Some((how_well, pack.created, *key))
                });
                candidates.extend(suiting);
            }
        }
        // The newest of those that suit as well.
        candidates.sort_unstable_by(|one, other| other.cmp(one));
        let mut tried = HashSet::new();
        for (_, _, key) in candidates {
            if tried.len() >= MANIFESTS_TRIED || !tried.insert(key) {
                continue;
            }
            let read = match self.chunk(key).await {
                Ok(bytes) => Manifest::from_bytes(&bytes).map_err(PartError::from),
                Err(error) => Err(error),
            };
            match read {
                Ok(manifest) => {
                    lock(&self.objects).used(key);
                    return Some((key, manifest));
                }
                Err(error) => self.trouble("what cargo left cannot be read", &error),
            }
        }
        None
    }

    /// The bytes of an object of the cargo cache.
    async fn chunk(&self, key: ObjectKey) -> Result<Vec<u8>, PartError> {
        loop {
            let (slot, state) = {
                let objects = lock(&self.objects);
                let slot = objects.object(key).ok_or(PartError::Lost)?.clone();
                let state = match &slot.place {
                    Place::File(file, offset) => Ok((file.clone(), *offset)),
                    Place::Pack(pack, offset) => {
                        let found = objects.packs.get(*pack).ok_or(PartError::Lost)?;
                        Err((*pack, *offset, found.data_start, found.state.clone()))
                    }
                };
                (slot, state)
            };
            let bytes = match state {
                Ok((file, offset)) => file.read(offset, slot.length)?,
                Err((_, offset, _, PackState::Local(file))) => file.read(offset, slot.length)?,
                Err((_, offset, _, PackState::Fetching(mut progress, file))) => {
                    let end = offset.saturating_add(slot.length);
                    let before = progress.borrow_and_update().bytes;
                    let here =
                        progress.wait_for(|progress| progress.bytes >= end || progress.failed);
                    let waited = tokio::time::timeout(STALL, here).await;
                    let waited = waited.map(|progress| progress.map(|progress| *progress));
                    let is_slow = waited.is_err() && progress.borrow().bytes > before;
                    match waited {
                        Ok(Ok(progress)) if progress.bytes >= end => {
                            file.read(offset, slot.length)?
                        }
                        // It may have come by another way meanwhile, or not at all.
                        Ok(Ok(_)) => continue,
                        Err(_) if is_slow => continue,
                        Ok(Err(_)) | Err(_) => return Err(PartError::Lost),
                    }
                }
                Err((pack, offset, data_start, PackState::Remote { .. })) => {
                    let start = data_start.saturating_add(offset);
                    let range = start..start.saturating_add(slot.length);
                    let read = self.read_alone(pack, range).await;
                    read.map_err(|_| PartError::Lost)?
                }
                Err((_, _, _, PackState::Lost { .. })) => return Err(PartError::Lost),
            };
            if Digest::of(&bytes) != slot.digest {
                self.note(|activity| activity.corrupt += 1);
                lock(&self.objects).forget(key);
                return Err(PartError::Damaged);
            }
            return Ok(bytes);
        }
    }

    /// Starts to fetch the packs that most of is wanted of, and gives the parts in the order in
    /// which they come.
    fn order(self: &Arc<Self>, parts: &[&Part]) -> Vec<usize> {
        let mut objects = lock(&self.objects);
        let mut wanted: HashMap<usize, (usize, u64)> = HashMap::new();
        let mut order = Vec::new();
        for (number, part) in parts.iter().enumerate() {
            let Some(slot) = objects.object(part.chunk) else {
                // It is missed soon enough.
                order.push((0, number));
                continue;
            };
            match slot.place {
                Place::File(..) => order.push((0, number)),
                Place::Pack(pack, offset) => {
                    order.push((offset, number));
                    let (count, bytes) = wanted.entry(pack).or_default();
                    *count += 1;
                    *bytes = bytes.saturating_add(slot.length);
                }
            }
        }
        for (pack, (count, bytes)) in wanted {
            let length = objects.packs.get(pack).map_or(0, |pack| pack.data_length);
            if count >= MANY_PARTS || bytes.saturating_mul(LARGE_SHARE) >= length {
                self.begin_fetch(&mut objects, pack);
            }
        }
        order.sort_unstable();
        order.into_iter().map(|(_, number)| number).collect()
    }
}

/// A restore that is under way, in threads of its own.
struct Restore<'a> {
    relay: &'a Arc<Relay>,
    job: &'a CargoJob,
    lockfile: &'a Lockfile,
    handle: &'a Handle,
    stop: &'a AtomicBool,
    deadline: Instant,
}

impl Restore<'_> {
    fn run(&self, same_layout: bool) -> CargoActivity {
        let parts = &self.job.before.parts;
        // What is built is unpacked here, by several threads; what was only downloaded may never
        // be.
        let built: HashSet<&Package> = parts
            .iter()
            .filter(|part| matches!(part.root, Root::Target(_)))
            .map(|part| &part.package)
            .collect();
        let wanted = self.job.before.wanted(self.lockfile, same_layout);
        let wanted: Vec<&Part> = wanted.iter().filter_map(|part| parts.get(*part)).collect();
        {
            let mut objects = lock(&self.relay.objects);
            wanted.iter().for_each(|part| objects.used(part.chunk));
        }
        let missing = |part: &&Part| {
            let folder = self.job.request.folder(part.root);
            folder.is_some_and(|folder| !files::is_there(&folder, part))
        };
        let missing: Vec<&Part> = wanted.into_iter().filter(missing).collect();
        let order = self.relay.order(&missing);
        let activity = Mutex::new(CargoActivity::default());
        let first_error = Mutex::new(None);
        in_parallel(&order, |number| {
            let Some(part) = missing.get(*number) else {
                return;
            };
            let put = self.put(part, built.contains(&part.package));
            let mut activity = lock(&activity);
            match put {
                Ok(()) => {
                    let units = matches!(part.root, Root::Target(_));
                    activity.restored_units += u64::from(units);
                    activity.restored_crates += u64::from(is_crate(part));
                    activity.restored_bytes += part.length();
                }
                // The job's own is as good.
                Err(PartError::Put(PutError::IsThere(_))) => {}
                Err(error) => {
                    activity.missed += 1;
                    let text = format!("{}: {error}", part.name);
                    lock(&first_error).get_or_insert(text);
                }
            }
        });
        let first_error = first_error.into_inner().ok().flatten();
        if let Some(error) = first_error {
            self.relay
                .trouble("a part of what cargo left could not be restored", &error);
        }
        activity.into_inner().unwrap_or_default()
    }

    fn put(&self, part: &Part, unpacked: bool) -> Result<(), PartError> {
        if self.stop.load(Ordering::Relaxed) || Instant::now() > self.deadline {
            return Err(PartError::Lost);
        }
        if part.root == Root::Registry && !home::is_of_registry(part) {
            return Err(PartError::Foreign);
        }
        let folder = self.job.request.folder(part.root).ok_or(PartError::Lost)?;
        let bytes = self.handle.block_on(self.relay.chunk(part.chunk))?;
        files::put(&folder, part, &*bytes)?;
        if part.root != Root::Registry {
            return Ok(());
        }
        for entry in &part.entries {
            let Some((package, _)) = home::archive(&entry.path) else {
                continue;
            };
            let path = folder.join(&entry.path);
            let digest = home::sha256(File::open(&path)?)?;
            if !self.lockfile.accepts(package, &digest) {
                fs::remove_file(&path)?;
                return Err(PartError::Foreign);
            }
            if unpacked {
                home::unpack(&folder, &entry.path)?;
            }
        }
        Ok(())
    }
}

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

impl Relay {
    /// Keeps what the job's dependencies were downloaded and compiled to, for the next job.
    pub(super) fn save_cargo(&self, deadline: Instant) {
        let Some(job) = lock(&self.cargo).take() else {
            return;
        };
        if !lock(&self.objects).is_writable() {
            return;
        }
        let begin = Instant::now();
        if let Err(error) = self.keep_cargo(&job, deadline) {
            self.trouble("what cargo left is not kept", &error);
        }
        self.note(|activity| {
            activity.cargo.get_or_insert_default().save_milliseconds = milliseconds(begin);
        });
    }

    fn keep_cargo(&self, job: &CargoJob, deadline: Instant) -> Result<(), String> {
        let lockfile = job.request.lockfile()?;
        let drafts = drafts(&job.request, &lockfile).map_err(|error| error.to_string())?;
        let (parts, used): (Vec<Part>, Vec<bool>) = drafts.into_iter().unzip();
        let mut manifest = Manifest { parts };
        let wanted = manifest.wanted(&lockfile, true);
        let is_unit = |part: &Part| matches!(part.root, Root::Target(_));
        let has_units = wanted
            .iter()
            .any(|number| manifest.parts.get(*number).is_some_and(is_unit));
        // A job that compiled nothing has nothing to say of what compiling takes.
        if job.before.parts.iter().any(is_unit) && !has_units {
            return Ok(());
        }
        let chunks = self.keep_parts(job, &manifest, &wanted, deadline)?;
        let used: HashSet<(Root, String)> = manifest
            .parts
            .iter()
            .zip(used)
            .filter(|(_, used)| *used)
            .map(|(part, _)| (part.root, part.name.clone()))
            .collect();
        manifest.fill_in(&chunks);
        let is_used = |part: &Part| used.contains(&(part.root, part.name.clone()));
        let changed = manifest.follow(&job.before, hours(now()), is_used);
        let units = manifest.parts.iter().filter(|part| is_unit(part)).count();
        let crates = manifest.parts.iter().filter(|part| is_crate(part)).count();
        self.note(|activity| {
            let cargo = activity.cargo.get_or_insert_default();
            cargo.kept_units = units as u64;
            cargo.kept_crates = crates as u64;
        });
        let key = manifest_key(job.request.layout, self.config.lane);
        if manifest.parts.is_empty() || (!changed && job.key == Some(key)) {
            return Ok(());
        }
        let bytes = manifest.to_bytes().map_err(|error| error.to_string())?;
        let kept = self.keep(key, &mut io::Cursor::new(bytes));
        kept.map_err(|error| error.to_string())?;
        Ok(())
    }

    /// Has the store keep the content of these parts. Gives the chunk of each part of the manifest
    /// that has one then.
    fn keep_parts(
        &self,
        job: &CargoJob,
        manifest: &Manifest,
        numbers: &[usize],
        deadline: Instant,
    ) -> Result<Vec<Option<ObjectKey>>, String> {
        let before: HashMap<(Root, &str), &Part> = job
            .before
            .parts
            .iter()
            .map(|part| (part.id(), part))
            .collect();
        let others = lock(&self.objects)
            .objects()
            .any(|(key, _)| is_cargos(*key));
        let chunks = Mutex::new(vec![None; manifest.parts.len()]);
        let late = AtomicBool::new(false);
        in_parallel(numbers, |number| {
            if Instant::now() > deadline {
                late.store(true, Ordering::Relaxed);
                return;
            }
            let Some(part) = manifest.parts.get(*number) else {
                return;
            };
            let same = before
                .get(&part.id())
                .filter(|before| before.entries == part.entries)
                .map(|before| before.chunk)
                .filter(|chunk| self.has(*chunk));
            let kept = match (same, job.request.folder(part.root)) {
                (Some(chunk), _) => Ok(chunk),
                (None, Some(folder)) => self.keep_part(part, &folder, others),
                (None, None) => return,
            };
            match kept {
                Ok(key) => {
                    if let Some(chunk) = lock(&chunks).get_mut(*number) {
                        *chunk = Some(key);
                    }
                }
                // It may be in use by a process that a step left behind.
                Err(error) => self.setback("a part of what cargo left was not kept", &error),
            }
        });
        match late.into_inner() {
            true => Err("there was no time left".to_owned()),
            false => Ok(chunks.into_inner().unwrap_or_default()),
        }
    }

    /// Has the store keep the content of a part, and gives the chunk's key. Where there are chunks
    /// of `others`, it may be among them.
    fn keep_part(&self, part: &Part, folder: &Path, others: bool) -> io::Result<ObjectKey> {
        if part.length() > PART_LIMIT {
            return Err(io::Error::other("it is too large"));
        }
        if others {
            let key = chunk_key(files::digest(folder, &part.entries)?);
            if self.has(key) {
                return Ok(key);
            }
        }
        let mut content = tempfile::spooled_tempfile_in(PART_IN_MEMORY, &self.config.folder);
        let digest = files::compress(folder, &part.entries, &mut content)?;
        let key = chunk_key(digest);
        let (_, length) = self.keep(key, &mut content)?;
        self.note(|activity| {
            let cargo = activity.cargo.get_or_insert_default();
            cargo.new_parts += 1;
            cargo.new_bytes += length;
        });
        Ok(key)
    }

    /// Whether an object can be had, which it is then noted that this job wants.
    fn has(&self, key: ObjectKey) -> bool {
        let mut objects = lock(&self.objects);
        let has = objects.has(key);
        if has {
            objects.used(key);
        }
        has
    }
}

/// What is on the disk of what a lockfile asks for, each with whether the job used it as far as can
/// be told.
fn drafts(request: &CargoRequest, lockfile: &Lockfile) -> io::Result<Vec<(Part, bool)>> {
    const NO_CHUNK: ObjectKey = ObjectKey([0; 32]);
    let mut drafts = Vec::new();
    // Crates first, so that they are in packs together: another toolchain wants these only.
    let pieces = home::find(&request.home, lockfile)?.into_iter();
    drafts.extend(pieces.map(|piece| {
        let part = Part {
            root: piece.root,
            name: piece.name,
            guard: piece.guard,
            package: piece.package,
            entries: piece.entries,
            chunk: NO_CHUNK,
            needs: Vec::new(),
            used: 0,
        };
        (part, true)
    }));
    for (number, target) in (0..).zip(&request.targets) {
        let found = target::find(target, &request.home)?;
        let first = drafts.len() as u32;
        drafts.extend(found.units.into_iter().map(|unit| {
            let part = Part {
                root: Root::Target(number),
                name: unit.guard.clone(),
                guard: Some(unit.guard),
                package: unit.package,
                entries: unit.entries,
                chunk: NO_CHUNK,
                needs: unit
                    .needs
                    .iter()
                    .map(|need| need.saturating_add(first))
                    .collect(),
                used: 0,
            };
            (part, unit.used || !found.has_own)
        }));
    }
    Ok(drafts)
}

/// Whether a part is a crate's archive.
fn is_crate(part: &Part) -> bool {
    part.root == Root::Registry && part.package != Package::Several
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
