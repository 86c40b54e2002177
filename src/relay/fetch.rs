//! Getting what packs hold: their indexes at the start, the packs that this lane used last in the
//! background, and whatever else sccache asks for when it does.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use futures_util::future::join_all;
use tokio::sync::watch;

use crate::cargo::manifest::is_cargos;
use crate::github::cache_client::{CacheError, Download};
use crate::relay::disk_level::{self, Hydrated, Kind, SMALL_OBJECT};
use crate::relay::objects::{MemberSlot, Objects, PackState, Place, Progress};
use crate::relay::{Relay, delay_after, lock};
use crate::store::chain::Known;
use crate::store::index::{Bundle, Digest, Member, ObjectKey, Pack, Ran};
use crate::store::local::LocalFile;

/// How often, and for how long, an index that cannot be read is tried again.
const LOAD_ATTEMPTS: u32 = 3;
const LOAD_LIMIT: Duration = Duration::from_secs(60);

/// How often a download is taken up again where it broke off.
const DOWNLOAD_ATTEMPTS: u32 = 3;

/// What a lane that has no history prefetches at most, in bytes: the newest packs there are.
const PREFETCH_LIMIT: u64 = 256 << 20;

/// What any lane prefetches at most, in bytes: a runner's disk is the build's. The rest is fetched
/// when it is asked for.
const LANE_PREFETCH_LIMIT: u64 = 2 << 30;

/// How long a request waits for a pack that is on its way, before the one object is fetched alone.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long a request waits for a pack when no more objects are fetched alone.
const LONG_PATIENCE: Duration = Duration::from_secs(20);

/// How many such waits in a row may be in vain before there are no more.
const VAIN_WAITS: u32 = 3;

/// How many objects of a pack are fetched alone before the whole pack is.
const ALONE_FIRST: u32 = 2;

/// A pack up to this size, in bytes, is waited for as a whole: what is on sccache's disk costs less
/// than what it asks the relay for.
const WAITED_FOR_WHOLE: u64 = 32 << 20;

/// The greatest length of a bundle, uncompressed, and of an entry in it that is believed, in bytes.
/// A real entry has some kilobytes for each header.
const BUNDLE_LIMIT: u64 = 4 << 30;
const MEMBER_LIMIT: u64 = 16 << 20;

impl Relay {
    /// Reads the indexes of all scopes, and starts to get the packs that this lane used last.
    pub(super) async fn load(self: Arc<Self>) {
        {
            let mut known = self.known.lock().await;
            let reads = known.iter_mut().map(|known| self.load_scope(known));
            join_all(reads).await;
            let mut objects = lock(&self.objects);
            // The job's own scope comes first and has the last word.
            for known in known.iter_mut().rev() {
                objects.learn(known);
            }
            let (packs, count) = (objects.packs.len(), objects.len());
            let bytes = objects.packs.iter().map(|pack| pack.data_length).sum();
            self.note(|activity| {
                activity.known_packs = packs as u64;
                activity.known_objects = count as u64;
                activity.known_bytes = bytes;
                activity.previous = previous_run(&known, self.config.lane);
            });
            let wanted = wanted_packs(&known, self.config.lane);
            for name in &wanted {
                if let Some(pack) = objects.pack_number(name) {
                    self.begin_fetch(&mut objects, pack);
                }
            }
        }
        self.loaded.send_replace(true);
    }

    async fn load_scope(&self, known: &mut Known) {
        let begin = Instant::now();
        let mut attempt = 0;
        while let Err(error) = known.catch_up(&self.client).await {
            attempt += 1;
            let delay = delay_after(&error, attempt)
                .filter(|delay| attempt < LOAD_ATTEMPTS && begin.elapsed() + *delay < LOAD_LIMIT);
            match delay {
                Some(delay) => {
                    self.setback("the index could not be read", &error);
                    tokio::time::sleep(delay).await;
                }
                None => {
                    self.trouble("the index could not be read", &error);
                    break;
                }
            }
        }
        if let Some(unreadable) = known.unreadable.take() {
            self.trouble("an index is damaged", &unreadable);
        }
    }

    /// Starts to download a pack, unless that is under way or done.
    pub(super) fn begin_fetch(self: &Arc<Self>, objects: &mut Objects, pack: usize) {
        let Some(slot) = objects.packs.get_mut(pack) else {
            return;
        };
        if !matches!(slot.state, PackState::Remote { .. }) {
            return;
        }
        let path = self.config.folder.join(format!("pack-{pack}"));
        let file = match LocalFile::create(&path) {
            Ok(file) => file,
            Err(error) => {
                slot.state = PackState::Lost { gone: false };
                self.trouble("a pack cannot be kept", &error);
                return;
            }
        };
        // What came along with the index need not be asked for again.
        let first = std::mem::take(&mut slot.first);
        let length = usize::try_from(slot.data_length).unwrap_or(usize::MAX);
        let _ = file.append(first.get(..length.min(first.len())).unwrap_or_default());
        let (progress, seen) = watch::channel(Progress {
            bytes: file.length(),
            failed: false,
        });
        slot.state = PackState::Fetching(seen, file.clone());
        tokio::spawn(self.clone().fetch(pack, file, progress));
    }

    async fn fetch(
        self: Arc<Self>,
        pack: usize,
        file: Arc<LocalFile>,
        progress: watch::Sender<Progress>,
    ) {
        let _turn = self.downloads.clone().acquire_owned().await;
        let mut result = Ok(());
        for attempt in 0..DOWNLOAD_ATTEMPTS {
            result = self.download(pack, &file, &progress).await;
            let delay = match &result {
                Ok(()) => break,
                Err(Broken::Cache(error)) => delay_after(error, attempt),
                Err(Broken::Disk(_)) => None,
            };
            match delay {
                Some(delay) if delay < LOAD_LIMIT && attempt + 1 < DOWNLOAD_ATTEMPTS => {
                    tokio::time::sleep(delay).await;
                }
                _ => break,
            }
        }
        let state = match &result {
            Ok(()) => PackState::Local(file),
            Err(error) => PackState::Lost {
                gone: matches!(error, Broken::Cache(CacheError::Gone)),
            },
        };
        if let Some(slot) = lock(&self.objects).packs.get_mut(pack) {
            slot.state = state;
        }
        match result {
            Ok(()) => self.note(|activity| activity.fetched_packs += 1),
            Err(error) => self.trouble("a pack could not be fetched", &error),
        }
        progress.send_modify(|progress| progress.failed = true);
    }

    /// Downloads what of a pack's data is not there yet.
    async fn download(
        &self,
        pack: usize,
        file: &LocalFile,
        progress: &watch::Sender<Progress>,
    ) -> Result<(), Broken> {
        let (data_start, data_length) = {
            let objects = lock(&self.objects);
            let slot = objects.packs.get(pack).ok_or(CacheError::Gone)?;
            (slot.data_start, slot.data_length)
        };
        while file.length() < data_length {
            let from = data_start + file.length();
            let Download {
                mut start, stream, ..
            } = self.open(pack, from..data_start + data_length).await?;
            let mut stream = std::pin::pin!(stream);
            let before = file.length();
            while let Some(piece) = stream.try_next().await.map_err(interrupted)? {
                // A server without ranges begins at the beginning.
                let skip = (data_start + file.length()).saturating_sub(start);
                let skip = usize::try_from(skip).unwrap_or(usize::MAX);
                start += piece.len() as u64;
                let missing = usize::try_from(data_length - file.length()).unwrap_or(usize::MAX);
                let wanted = piece.get(skip.min(piece.len())..).unwrap_or_default();
                let wanted = wanted.get(..missing.min(wanted.len())).unwrap_or_default();
                file.append(wanted).map_err(Broken::Disk)?;
                progress.send_modify(|progress| progress.bytes = file.length());
            }
            if file.length() == before {
                return Err(CacheError::Unavailable("it is shorter than it was".to_owned()).into());
            }
        }
        Ok(())
    }

    /// Asks for a part of a pack. The URL of an earlier look-up is used as long as it opens.
    async fn open(&self, pack: usize, range: std::ops::Range<u64>) -> Result<Download, CacheError> {
        let (name, found) = {
            let objects = lock(&self.objects);
            let slot = objects.packs.get(pack).ok_or(CacheError::Gone)?;
            (slot.name.clone(), slot.found.clone())
        };
        if let Some(found) = found {
            match self.client.download(&found, range.clone()).await {
                Err(CacheError::Gone) => {}
                opened => return opened,
            }
        }
        let found = self.client.find(&name, &[]).await?;
        let found = found.filter(|found| found.key == name);
        let found = found.ok_or(CacheError::Gone)?;
        let opened = self.client.download(&found, range).await?;
        if let Some(slot) = lock(&self.objects).packs.get_mut(pack) {
            slot.found = Some(found);
        }
        Ok(opened)
    }

    /// Makes an object's bytes be on this machine. Says whether they are.
    pub(super) async fn bring(self: &Arc<Self>, key: ObjectKey) -> bool {
        loop {
            match self.next_step(key) {
                Step::Done(here) => return here,
                Step::Wait(state, end) => {
                    if let Some(here) = self.wait_for(&state, end, PATIENCE).await {
                        return here;
                    }
                    // A service that hangs must not cost each compile so much.
                    if self.vain_waits.load(Ordering::Relaxed) >= VAIN_WAITS {
                        return false;
                    }
                    if self.bring_alone(key).await {
                        return true;
                    }
                    let here = self.wait_for(&state, end, LONG_PATIENCE).await == Some(true);
                    match here {
                        true => self.vain_waits.store(0, Ordering::Relaxed),
                        false => {
                            self.vain_waits.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    return here;
                }
                Step::Alone(pack) => {
                    if self.bring_alone(key).await {
                        return true;
                    }
                    self.begin_fetch(&mut lock(&self.objects), pack);
                }
                Step::Fetch(pack) => self.begin_fetch(&mut lock(&self.objects), pack),
            }
        }
    }

    fn next_step(&self, key: ObjectKey) -> Step {
        let mut objects = lock(&self.objects);
        let Some(slot) = objects.object(key) else {
            return Step::Done(false);
        };
        let length = slot.length;
        let Place::Pack(pack, offset) = slot.place else {
            return Step::Done(true);
        };
        let end = offset.saturating_add(length);
        match objects.packs.get_mut(pack).map(|slot| &mut slot.state) {
            // A small pack costs no more than one object of it; and what a job reads three objects
            // of, it will read more of.
            Some(PackState::Remote { asked }) => {
                *asked += 1;
                match *asked > ALONE_FIRST || end < SMALL_OBJECT {
                    true => Step::Fetch(pack),
                    false => Step::Alone(pack),
                }
            }
            Some(state @ PackState::Fetching(..)) => Step::Wait(state.clone(), end),
            Some(PackState::Local(_)) => Step::Done(true),
            Some(PackState::Lost { .. }) | None => Step::Done(false),
        }
    }

    /// Waits until a pack is here up to `end`: whether it is, or `None` where it is still on its
    /// way.
    async fn wait_for(&self, state: &PackState, end: u64, limit: Duration) -> Option<bool> {
        let mut progress = match state {
            PackState::Fetching(progress, _) => progress.clone(),
            PackState::Local(_) => return Some(true),
            PackState::Remote { .. } | PackState::Lost { .. } => return Some(false),
        };
        let done = progress.wait_for(|progress| progress.bytes >= end || progress.failed);
        match tokio::time::timeout(limit, done).await {
            Ok(Ok(progress)) => Some(progress.bytes >= end),
            Ok(Err(_)) => Some(false),
            Err(_) => None,
        }
    }

    /// Fetches one object without its pack.
    async fn bring_alone(self: &Arc<Self>, key: ObjectKey) -> bool {
        let (pack, range, digest) = {
            let mut objects = lock(&self.objects);
            if objects.single_reads == 0 {
                return false;
            }
            let Some(slot) = objects.object(key) else {
                return false;
            };
            let (digest, length) = (slot.digest, slot.length);
            let Place::Pack(pack, offset) = slot.place else {
                return true;
            };
            objects.single_reads -= 1;
            let Some(slot) = objects.packs.get(pack) else {
                return false;
            };
            let start = slot.data_start + offset;
            (pack, start..start + length, digest)
        };
        match self.read_alone(pack, range).await {
            Ok(bytes) if Digest::of(&bytes) == digest => {
                let fetched = lock(&self.objects).fetched.clone();
                match fetched.append(&bytes) {
                    Ok(offset) => {
                        lock(&self.objects).moved(key, Place::File(fetched, offset));
                        true
                    }
                    Err(error) => {
                        self.trouble("an object cannot be kept", &error);
                        false
                    }
                }
            }
            Ok(_) => {
                self.note(|activity| activity.corrupt += 1);
                lock(&self.objects).forget(key);
                false
            }
            Err(error) => {
                if matches!(error, CacheError::Gone)
                    && let Some(slot) = lock(&self.objects).packs.get_mut(pack)
                    && matches!(slot.state, PackState::Remote { .. })
                {
                    slot.state = PackState::Lost { gone: true };
                }
                self.trouble("an object could not be fetched", &error);
                false
            }
        }
    }

    /// The bytes of a range of a pack's cache entry.
    pub(super) async fn read_alone(
        &self,
        pack: usize,
        range: std::ops::Range<u64>,
    ) -> Result<Vec<u8>, CacheError> {
        let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let download = self.open(pack, range.clone()).await?;
        if download.start != range.start {
            return Err(CacheError::Unavailable("it has no ranges".to_owned()));
        }
        let mut stream = std::pin::pin!(download.stream);
        let mut bytes = Vec::new();
        while let Some(piece) = stream.try_next().await.map_err(interrupted)? {
            bytes.extend_from_slice(&piece);
            if bytes.len() >= length {
                break;
            }
        }
        bytes.truncate(length);
        Ok(bytes)
    }

    /// Puts on sccache's disk what the packs on their way hold for it, and waits up to `wait` for
    /// those with a part of the preprocessor cache: sccache reads its folder once, before the first
    /// compile.
    pub(super) async fn hydrate(
        self: Arc<Self>,
        folder: Option<PathBuf>,
        wait: Duration,
    ) -> Hydrated {
        let deadline = tokio::time::Instant::now() + wait;
        let mut loaded = self.loaded.subscribe();
        let loaded = loaded.wait_for(|loaded| *loaded);
        let loaded = tokio::time::timeout_at(deadline, loaded).await.is_ok();
        let mut hydrated = match folder {
            Some(folder) => self.fill(folder, deadline).await,
            None => Hydrated::default(),
        };
        hydrated.trouble = lock(&self.activity).first_trouble.clone();
        if !loaded {
            let silent = format!("the cache service gave no answer in {} s", wait.as_secs());
            hydrated.trouble.get_or_insert(silent);
        }
        hydrated
    }

    async fn fill(self: &Arc<Self>, folder: PathBuf, deadline: tokio::time::Instant) -> Hydrated {
        lock(&self.objects).disk_level = Some(folder.clone());
        let bundles: HashMap<String, Bundle> = {
            let Ok(known) = self.known.try_lock() else {
                // The indexes are still being read.
                return Hydrated::default();
            };
            let packs = known.iter().flat_map(|known| &known.index.packs);
            packs
                .filter_map(|(name, pack)| Some((name.clone(), pack.bundle.clone()?)))
                .collect()
        };
        let mut hydrated = Hydrated {
            complete: true,
            ..Hydrated::default()
        };
        for (state, end) in self.packs_to_wait_for(&bundles) {
            let rest = deadline.saturating_duration_since(tokio::time::Instant::now());
            hydrated.complete &= self.wait_for(&state, end, rest).await == Some(true);
        }
        let relay = self.clone();
        let work = move || relay.hydrate_from_local(&folder, &bundles);
        if let Ok((objects, entries)) = tokio::task::spawn_blocking(work).await {
            hydrated.objects = objects;
            hydrated.entries = entries;
        }
        hydrated
    }

    /// The packs on their way whose part of the preprocessor cache is worth waiting for, each with
    /// how much of it is: the bundle, which comes first, and of a small pack the rest as well.
    fn packs_to_wait_for(&self, bundles: &HashMap<String, Bundle>) -> Vec<(PackState, u64)> {
        let objects = lock(&self.objects);
        let coming = objects
            .packs
            .iter()
            .filter(|pack| matches!(pack.state, PackState::Fetching(..)));
        coming
            .filter_map(|pack| {
                let bundle = bundles.get(&pack.name)?;
                let end = match pack.data_length <= WAITED_FOR_WHOLE {
                    true => pack.data_length,
                    false => bundle.offset.saturating_add(bundle.length),
                };
                Some((pack.state.clone(), end))
            })
            .collect()
    }

    fn hydrate_from_local(&self, folder: &Path, bundles: &HashMap<String, Bundle>) -> (u64, u64) {
        let (files, small, wanted) = {
            let objects = lock(&self.objects);
            let files: Vec<(String, Arc<LocalFile>)> = objects
                .packs
                .iter()
                .filter_map(|pack| Some((pack.name.clone(), pack.file()?.clone())))
                .collect();
            let small: Vec<_> = objects
                .objects()
                .filter(|(key, slot)| slot.length <= SMALL_OBJECT && !is_cargos(**key))
                .filter_map(|(key, slot)| {
                    let Place::Pack(pack, offset) = slot.place else {
                        return None;
                    };
                    let file = objects.packs.get(pack)?.file()?;
                    let is_here = offset.saturating_add(slot.length) <= file.length();
                    is_here.then(|| (*key, file.clone(), offset, slot.length, slot.digest))
                })
                .collect();
            (files, small, objects.members.clone())
        };
        // Thousands of small files: it is making them that takes time.
        std::thread::scope(|scope| {
            let entries = scope.spawn(|| self.hydrate_entries(folder, &files, bundles, &wanted));
            let objects = self.hydrate_objects(folder, small);
            (objects, entries.join().unwrap_or(0))
        })
    }

    fn hydrate_entries(
        &self,
        folder: &Path,
        files: &[(String, Arc<LocalFile>)],
        bundles: &HashMap<String, Bundle>,
        wanted: &HashMap<ObjectKey, MemberSlot>,
    ) -> u64 {
        let mut entries = 0;
        for (name, file) in files {
            let Some(bundle) = bundles.get(name) else {
                continue;
            };
            if bundle.offset.saturating_add(bundle.length) > file.length() {
                continue;
            }
            let put = |key: ObjectKey, bytes: &[u8]| {
                let counts = wanted.get(&key);
                if counts.is_none_or(|slot| slot.digest != Digest::of(bytes)) {
                    return Ok(());
                }
                let new = disk_level::put(folder, Kind::Preprocessor, key, bytes)?;
                entries += u64::from(new);
                Ok(())
            };
            if let Err(error) = unpack(file, bundle, put) {
                self.trouble("a part of the preprocessor cache cannot be used", &error);
            }
        }
        entries
    }

    fn hydrate_objects(&self, folder: &Path, small: Vec<SmallObject>) -> u64 {
        let mut objects = 0;
        for (key, file, offset, length, digest) in small {
            let bytes = match file.read(offset, length) {
                Ok(bytes) if Digest::of(&bytes) == digest => bytes,
                _ => {
                    self.note(|activity| activity.corrupt += 1);
                    lock(&self.objects).forget(key);
                    continue;
                }
            };
            match disk_level::put(folder, Kind::Object, key, &bytes) {
                Ok(new) => objects += u64::from(new),
                Err(error) => {
                    self.trouble("sccache's disk cache cannot be filled", &error);
                    break;
                }
            }
        }
        objects
    }
}

/// An object to be put on sccache's disk: its key, where it lies, its length and digest.
type SmallObject = (ObjectKey, Arc<LocalFile>, u64, u64, Digest);

/// Hands each entry of a bundle to `take`, whatever its digest is.
pub(super) fn unpack(
    file: &LocalFile,
    bundle: &Bundle,
    mut take: impl FnMut(ObjectKey, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let too_long = |member: &Member| member.length > MEMBER_LIMIT;
    if bundle.raw_length() > BUNDLE_LIMIT || bundle.members.iter().any(too_long) {
        return Err(io::Error::other("it is too large"));
    }
    let compressed = file.read(bundle.offset, bundle.length)?;
    let mut decoder = zstd::Decoder::new(&*compressed)?;
    for member in &bundle.members {
        let mut bytes = Vec::new();
        let mut part = io::Read::take(&mut decoder, member.length);
        io::Read::read_to_end(&mut part, &mut bytes)?;
        if bytes.len() as u64 != member.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        take(member.key, &bytes)?;
    }
    Ok(())
}

/// The packs to be had before anything asks for them: those that the lane used last, or where that
/// is not known the newest.
fn wanted_packs(known: &[Known], lane: u64) -> BTreeSet<String> {
    let lanes = known
        .iter()
        .filter_map(|known| known.index.lanes.get(&lane));
    let lane = lanes.max();
    let limit = match lane {
        Some(_) => LANE_PREFETCH_LIMIT,
        None => PREFETCH_LIMIT,
    };
    let mut packs: BTreeMap<(u64, &str), u64> = BTreeMap::new();
    for (name, pack) in known.iter().flat_map(|known| &known.index.packs) {
        if lane.is_none_or(|lane| lane.packs.contains(name)) && !is_mostly_cargos(pack) {
            packs.insert((pack.created, name), pack.data_length);
        }
    }
    let mut bytes = 0u64;
    let newest = packs.into_iter().rev();
    newest
        .take_while(|(_, length)| {
            bytes = bytes.saturating_add(*length);
            bytes <= limit
        })
        .map(|((_, name), _)| name.to_owned())
        .collect()
}

/// What came of the last run of this lane that any scope tells of: the job's own, else its base's,
/// else the default branch's.
fn previous_run(known: &[Known], lane: u64) -> Option<Ran> {
    let mut lanes = known.iter().map(|known| known.index.lanes.get(&lane));
    lanes.find_map(|lane| lane?.last)
}

/// Whether most of a pack is the cargo cache's, which fetches what it wants once it is known what
/// that is.
fn is_mostly_cargos(pack: &Pack) -> bool {
    let objects = pack.objects.iter();
    let cargos = objects.filter(|(key, _)| is_cargos(**key));
    let bytes = cargos.fold(0, |sum: u64, (_, object)| sum.saturating_add(object.length));
    pack.bundle.is_none() && bytes.saturating_mul(2) > pack.data_length
}

fn interrupted(error: io::Error) -> CacheError {
    CacheError::Unavailable(error.to_string())
}

/// What is to be done for an object to be here.
enum Step {
    /// Nothing: it is here, or cannot be had.
    Done(bool),
    /// Wait until its pack is here up to this offset.
    Wait(PackState, u64),
    /// Fetch it without its pack, which has this number.
    Alone(usize),
    /// Fetch the pack with this number.
    Fetch(usize),
}

/// Why a download ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("this machine's disk: {0}")]
    Disk(#[source] io::Error),
}
