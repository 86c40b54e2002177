//! The restore: puts the parts that a job wants on the disk, in threads of its own.

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use tokio::runtime::Handle;
use tokio::time::timeout_at;

use crate::cargo_cache::build_key::BuildKey;
use crate::cargo_cache::files::{self, Conditions, ExtractError};
use crate::cargo_cache::home;
use crate::cargo_cache::leftovers;
use crate::cargo_cache::lockfile::Lockfile;
use crate::cargo_cache::manifest::{
    BaseDir, CacheManifest, CachePart, FileEntry, Package, match_rank,
};
use crate::cargo_cache::units;
use crate::clock::Timestamp;
use crate::digest::sha256;
use crate::format::size;
use crate::packs::index::ObjectKey;
use crate::packs::local_file;
use crate::relay::cargo::{
    CargoActivity, CargoJob, CargoRequest, in_parallel, is_crate, milliseconds,
};
use crate::relay::downloads::ReadError;
use crate::relay::object_table::Location;
use crate::relay::{Relay, lock};

/// How many manifests are tried, the best match first.
const MANIFESTS_TRIED: usize = 3;

/// The relay fetches a pack as a whole if so many of its parts are wanted, or at least this fraction of its
/// bytes.
const MANY_PARTS: usize = 8;
const LARGE_SHARE: u64 = 4;

/// Why a part is not on the disk.
#[derive(Debug, thiserror::Error)]
enum PartError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("it is not the archive in the lockfile")]
    Foreign,
    #[error(transparent)]
    Extract(#[from] ExtractError),
}

impl From<io::Error> for PartError {
    fn from(error: io::Error) -> Self {
        Self::Extract(error.into())
    }
}

/// Sets a flag when it is dropped: the task that waits for a restore may end, and its other threads must
/// stop then.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Relay {
    /// Restores the parts of earlier runs that a run with the request's lockfiles and build key wants.
    pub(in crate::relay) async fn restore_cargo(
        self: Arc<Self>,
        request: CargoRequest,
    ) -> CargoActivity {
        let begin = Instant::now();
        let deadline = begin + request.wait;
        let mut subscription = self.loaded.subscribe();
        let loaded = subscription.wait_for(|loaded| *loaded);
        let _ = tokio::time::timeout(request.wait, loaded).await;
        let lockfile = request.lockfile_before().unwrap_or_else(|error| {
            self.activity.error("cannot read a lockfile", &error);
            Lockfile::default()
        });
        let chosen = timeout_at(deadline.into(), self.choose_manifest(request.build_key)).await;
        let is_late = chosen.is_err();
        if is_late {
            self.activity.error(NOT_ALL, &out_of_time(request.wait));
        }
        let chosen = chosen.unwrap_or_default();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = StopOnDrop(stop.clone());
        let relay = self.clone();
        let handle = Handle::current();
        let job = CargoJob::new(request, &lockfile, chosen, self.config.lane);
        let restored = tokio::task::spawn_blocking(move || {
            let restore = Restore {
                relay: &relay,
                job: &job,
                lockfile: &lockfile,
                handle: &handle,
                stop: &stop,
                deadline,
                now: SystemTime::now(),
                room: AtomicU64::new(RESTORE_LIMIT),
                ended: OnceLock::new(),
            };
            let activity = restore.run();
            (activity, job)
        })
        .await;
        drop(stopping);
        let Ok((mut activity, job)) = restored else {
            return CargoActivity::default();
        };
        activity.missed += u64::from(is_late);
        activity.other_build_key = job.key.is_some() && !job.same_build_key;
        activity.restore_milliseconds = milliseconds(begin);
        *lock(&self.cargo) = Some(job);
        self.activity.note(|all| all.cargo = Some(activity.clone()));
        activity
    }

    /// The manifest that matches the job best, with its key.
    async fn choose_manifest(
        self: &Arc<Self>,
        build_key: BuildKey,
    ) -> Option<(ObjectKey, CacheManifest)> {
        let lane = self.config.lane;
        let mut candidates: Vec<((bool, bool), Timestamp, ObjectKey)> = Vec::new();
        {
            let chains = self.writer.chains().lock().await;
            for pack in chains.iter().flat_map(|chain| chain.index.packs.values()) {
                let suiting = pack.objects.keys().filter_map(|key| {
                    let how_well = match_rank(*key, build_key, lane)?;
                    Some((how_well, pack.created, *key))
                });
                candidates.extend(suiting);
            }
        }
        // The newest of those that match as well.
        candidates.sort_unstable_by(|one, other| other.cmp(one));
        let mut tried = HashSet::new();
        for (_, _, key) in candidates {
            if tried.len() >= MANIFESTS_TRIED || !tried.insert(key) {
                continue;
            }
            let read = match self.downloads.read(key).await {
                Ok(bytes) => CacheManifest::from_bytes(&bytes).map_err(PartError::from),
                Err(error) => Err(error.into()),
            };
            match read {
                Ok(manifest) => {
                    self.table.lock().mark_used(key);
                    return Some((key, manifest));
                }
                Err(error) => self.activity.error("cannot read cargo's files", &error),
            }
        }
        None
    }

    /// Starts to fetch the packs whose parts are wanted most, and returns the parts in the order in which
    /// they arrive.
    fn order(self: &Arc<Self>, parts: &[&CachePart]) -> Vec<usize> {
        let mut objects = self.table.lock();
        let mut wanted: HashMap<usize, (usize, u64)> = HashMap::new();
        let mut order = Vec::new();
        for (number, part) in parts.iter().enumerate() {
            let Some(record) = objects.object(part.chunk) else {
                // It is missed soon enough.
                order.push((0, number));
                continue;
            };
            match record.location {
                Location::File(..) => order.push((0, number)),
                Location::Pack(pack, offset) => {
                    order.push((offset, number));
                    let (count, bytes) = wanted.entry(pack).or_default();
                    *count += 1;
                    *bytes = bytes.saturating_add(record.length);
                }
            }
        }
        for (pack, (count, bytes)) in wanted {
            let length = objects.packs.get(pack).map_or(0, |pack| pack.data_length);
            if count >= MANY_PARTS || bytes.saturating_mul(LARGE_SHARE) >= length {
                self.downloads.start(&mut objects, pack);
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
    /// The time, to tell whether leftovers of killed restores are old.
    now: SystemTime,
    /// How many bytes may still be put on the disk.
    room: AtomicU64,
    /// Why the restore ended early, once it has.
    ended: OnceLock<String>,
}

/// The message about a restore that ends early.
const NOT_ALL: &str = "the cargo cache was restored only in part; cargo does the rest";

fn out_of_time(wait: Duration) -> String {
    format!("the time limit of {} s was reached", wait.as_secs())
}

/// After how many unpacked bytes the restore checks the free space again.
const FREE_CHECKED_EVERY: u64 = 1 << 20;

/// How many bytes one restore writes to the disk at most: far more than the dependencies of any known
/// project, and less than a runner has.
const RESTORE_LIMIT: u64 = 20 << 30;

impl Restore<'_> {
    fn run(&self) -> CargoActivity {
        let parts = &self.job.before.parts;
        // Crates that are built are unpacked here, by several threads; those that were only downloaded may
        // never be needed.
        let units = parts.iter().filter(|part| part.is_unit());
        let built: HashSet<&Package> = units.map(|part| &part.package).collect();
        let wanted: Vec<&CachePart> = self
            .job
            .wanted
            .iter()
            .filter_map(|part| parts.get(*part))
            .collect();
        {
            let mut objects = self.relay.table.lock();
            wanted.iter().for_each(|part| objects.mark_used(part.chunk));
        }
        let missing = |part: &&CachePart| {
            let folder = self.job.folder_of(part);
            folder.is_some_and(|folder| !files::exists(&folder, part))
        };
        let (missing, there): (Vec<&CachePart>, Vec<&CachePart>) =
            wanted.into_iter().partition(missing);
        let there = there.into_iter().filter(|part| part.is_unit());
        let restored = Mutex::new(there.map(|part| &part.package).collect::<HashSet<_>>());
        let order = self.relay.order(&missing);
        let activity = Mutex::new(CargoActivity::default());
        let first_error = Mutex::new(None);
        let extract_one = |number: &usize| {
            let Some(part) = missing.get(*number) else {
                return;
            };
            let put = self.extract(part, built.contains(&part.package));
            let mut activity = lock(&activity);
            match put {
                Ok(()) => {
                    if part.is_unit() {
                        lock(&restored).insert(&part.package);
                    }
                    activity.restored_units += u64::from(part.is_unit());
                    activity.restored_crates += u64::from(is_crate(part));
                    activity.restored_bytes += part.length();
                }
                // The job's own file is as good.
                Err(PartError::Extract(ExtractError::AlreadyExists(_))) => {}
                Err(error) => {
                    activity.missed += 1;
                    let text = format!("{}: {error}", part.name);
                    lock(&first_error).get_or_insert(text);
                }
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| self.remove_leftovers());
            in_parallel(&order, extract_one);
        });
        let first_error = first_error.into_inner().ok().flatten();
        match (self.ended.get(), first_error) {
            (Some(why), _) => self.relay.activity.error(NOT_ALL, why),
            (None, Some(error)) => self
                .relay
                .activity
                .error("a part of the cargo cache could not be restored", &error),
            (None, None) => {}
        }
        CargoActivity {
            restored_dependencies: lock(&restored).len() as u64,
            ..activity.into_inner().unwrap_or_default()
        }
    }

    /// Removes the leftovers of killed restores from the folders of this one.
    fn remove_leftovers(&self) {
        let places = &self.job.request.places;
        let known = places.workspaces.iter().map(|its| its.build.clone());
        let of_manifest = self.job.builds.iter().flatten();
        let builds: BTreeSet<PathBuf> = known
            .chain(of_manifest.map(|build| build.path.clone()))
            .collect();
        let builds: Vec<PathBuf> = builds.into_iter().collect();
        leftovers::remove(&places.home, &builds, self.now);
    }

    fn extract(&self, part: &CachePart, unpacked: bool) -> Result<(), PartError> {
        self.checkpoint()?;
        let is_allowed = match part.base {
            BaseDir::Build(_) => units::is_unit(part),
            BaseDir::Registry => home::is_of_registry(part),
            BaseDir::Git => home::is_of_git(part),
        };
        if !is_allowed {
            return Err(PartError::Foreign);
        }
        let folder = self
            .job
            .folder_of(part)
            .ok_or(PartError::Read(ReadError::Lost))?;
        self.take_room(part.length())?;
        self.leaves_enough_free(&folder, part.length())?;
        let put = self.extract_and_unpack(part, &folder, unpacked);
        if let Err(PartError::Extract(ExtractError::Io(error))) = &put
            && error.kind() == io::ErrorKind::StorageFull
        {
            // It would not take the next one either.
            self.end(error.to_string());
        }
        put
    }

    fn extract_and_unpack(
        &self,
        part: &CachePart,
        folder: &Path,
        unpacked: bool,
    ) -> Result<(), PartError> {
        let chunk =
            async { timeout_at(self.deadline.into(), self.relay.downloads.read(part.chunk)).await };
        let Ok(bytes) = self.handle.block_on(chunk) else {
            self.checkpoint()?;
            return Err(PartError::Read(ReadError::Lost));
        };
        let accepts = |entry: &FileEntry, file: &mut File| match part.base {
            BaseDir::Registry => match home::archive(&entry.path) {
                Some((package, _)) => Ok(self.lockfile.accepts(package, &sha256(file)?)),
                None => Ok(true),
            },
            BaseDir::Git => home::sets_nothing_to_run(&entry.path, file),
            BaseDir::Build(_) => Ok(true),
        };
        let conditions = Conditions {
            accepts: &accepts,
            checkpoint: &|_| self.checkpoint(),
        };
        files::extract(folder, part, &*bytes?, conditions)?;
        if part.base != BaseDir::Registry || !unpacked {
            return Ok(());
        }
        let unlooked = Cell::new(FREE_CHECKED_EVERY);
        let checkpoint = |length: u64| {
            self.checkpoint()?;
            // An archive does not say its unpacked size.
            self.take_room(length)?;
            unlooked.set(unlooked.get() + length);
            if unlooked.get() >= FREE_CHECKED_EVERY {
                self.leaves_enough_free(folder, unlooked.take())?;
            }
            Ok(())
        };
        for entry in &part.entries {
            if home::archive(&entry.path).is_some() {
                let accepts = |package: &str, digest: &_| self.lockfile.accepts(package, digest);
                home::unpack(folder, &entry.path, accepts, &checkpoint)?;
            }
        }
        Ok(())
    }

    /// Ends the restore, for this reason if there was none before.
    fn end(&self, why: String) -> io::Error {
        let why = self.ended.get_or_init(|| why);
        io::Error::other(why.clone())
    }

    /// An error once the restore has to end.
    fn checkpoint(&self) -> io::Result<()> {
        if let Some(why) = self.ended.get() {
            return Err(io::Error::other(why.clone()));
        }
        if self.stop.load(Ordering::Relaxed) {
            return Err(self.end("the restore was cancelled".to_owned()));
        }
        if Instant::now() < self.deadline {
            Ok(())
        } else {
            Err(self.end(out_of_time(self.job.request.wait)))
        }
    }

    /// Takes `length` bytes of the space that the whole restore may use.
    fn take_room(&self, length: u64) -> io::Result<()> {
        let less = |left: u64| left.checked_sub(length);
        let order = Ordering::Relaxed;
        match self.room.fetch_update(order, order, less) {
            Ok(_) => Ok(()),
            Err(_) => Err(self.end(format!("it is more than {}", size(RESTORE_LIMIT)))),
        }
    }

    /// An error if `length` more bytes below `folder` leave less space than a build may need.
    fn leaves_enough_free(&self, folder: &Path, length: u64) -> io::Result<()> {
        // A missing folder is on the disk of its nearest existing parent.
        let there = folder.ancestors().find(|folder| folder.exists());
        let floor = self.relay.config.free_floor;
        match there.and_then(local_file::free) {
            Some(free) if free.saturating_sub(length) < floor => Err(self.end(format!(
                "{} are free on the disk of {}, and {} of them are reserved for the build",
                size(free),
                folder.display(),
                size(floor)
            ))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cargo_cache::build_key::BuildKey;
    use crate::cargo_cache::files::staged;
    use crate::cargo_cache::lockfile::tests::asking_for;
    use crate::cargo_cache::manifest::chunk_key;
    use crate::cargo_cache::places::Places;
    use crate::packs::local_file::LocalFile;
    use crate::relay::RelayConfig;
    use crate::relay::downloads::STALL;
    use crate::relay::object_table::{PackState, Progress};

    /// A job that finds `parts`, which an earlier one left.
    struct RestoreTest {
        relay: Arc<Relay>,
        job: CargoJob,
        lockfile: Lockfile,
        folder: tempfile::TempDir,
    }

    impl RestoreTest {
        fn new(free_floor: u64) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mut config = RelayConfig::for_test(folder.path().join("relay"));
            config.free_floor = free_floor;
            let request = CargoRequest {
                places: Places {
                    checkout: folder.path().join("checkout"),
                    home: folder.path().join("home"),
                    temporary: None,
                    workspaces: Vec::new(),
                },
                build_key: BuildKey([0; 8]),
                wait: Duration::from_secs(180),
                state: folder.path().join("state"),
            };
            Self {
                relay: Relay::new(config).unwrap(),
                job: CargoJob::new(request, &Lockfile::default(), None, 0),
                lockfile: asking_for(&[("a", "1.0.0")]),
                folder,
            }
        }

        /// Adds a part with a file of this content, and returns its compressed object.
        fn add(&mut self, package: Package, path: &str, content: &[u8]) -> Vec<u8> {
            let source = tempfile::tempdir().unwrap();
            let file = source.path().join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, content).unwrap();
            let entries = files::entries(source.path(), &[file]).unwrap().unwrap();
            let mut object = Vec::new();
            let content = files::compress(source.path(), &entries, &[], &mut object).unwrap();
            self.job.wanted.push(self.job.before.parts.len());
            self.job.before.parts.push(CachePart {
                base: BaseDir::Registry,
                name: path.to_owned(),
                commit_marker: None,
                package,
                entries,
                chunk: chunk_key(content.digest),
                needs: Vec::new(),
                used: 0,
                path_dependent: false,
            });
            object
        }

        /// The same, of an index file, which the relay has.
        fn add_index(&mut self, name: &str, length: usize) {
            let content = vec![name.as_bytes()[0]; length];
            let path = format!("index/r/.cache/1/{name}");
            let object = self.add(Package::Several, &path, &content);
            self.store_object(&object);
        }

        /// Stores the object of the part that was added last.
        fn store_object(&self, object: &[u8]) {
            let chunk = self.job.before.parts.last().unwrap().chunk;
            self.relay
                .store_object(chunk, &mut io::Cursor::new(object))
                .unwrap();
        }

        /// Restores, with room for so many bytes.
        fn restore(&self, room: u64, deadline: Instant, now: SystemTime) -> CargoActivity {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            Restore {
                relay: &self.relay,
                job: &self.job,
                lockfile: &self.lockfile,
                handle: runtime.handle(),
                stop: &AtomicBool::new(false),
                deadline,
                now,
                room: AtomicU64::new(room),
                ended: OnceLock::new(),
            }
            .run()
        }

        /// The same with all the time that there is.
        fn restore_in_time(&self, room: u64) -> CargoActivity {
            let deadline = Instant::now() + self.job.request.wait;
            self.restore(room, deadline, SystemTime::now())
        }

        /// The only error of the relay.
        #[track_caller]
        fn error_text(&self) -> String {
            let activity = self.relay.activity();
            assert_eq!(activity.errors, 1);
            activity.first_error.unwrap()
        }
    }

    #[test]
    fn a_restore_puts_no_more_than_its_limit_on_the_disk_and_says_so_once() {
        let mut found = RestoreTest::new(0);
        for name in ["a", "b", "c", "d"] {
            found.add_index(name, 100);
        }
        let restored = found.restore_in_time(250);
        let index = found.folder.path().join("home/registry/index/r/.cache/1");
        let put = fs::read_dir(index).unwrap().count() as u64;
        // A part that another thread is writing when the limit is met is given up.
        assert!((1..=2).contains(&put), "{put}");
        assert_eq!(
            (restored.restored_bytes, restored.missed),
            (100 * put, 4 - put)
        );
        let error_text = found.error_text();
        assert!(error_text.contains("cargo does the rest"), "{error_text}");
        let limit = format!("more than {}", size(20 << 30));
        assert!(error_text.contains(&limit), "{error_text}");
    }

    #[test]
    fn what_crates_are_unpacked_to_counts_in_the_limit_of_a_restore() {
        let mut found = RestoreTest::new(0);
        let package = || Package::Crate("a-1.0.0".to_owned());
        let zeros = vec![0; 1 << 20];
        let encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut builder = tar::Builder::new(encoder);
        let mut header = tar::Header::new_gnu();
        header.set_size(zeros.len() as u64);
        let path = "a-1.0.0/zeros";
        builder.append_data(&mut header, path, &*zeros).unwrap();
        let archive = builder.into_inner().unwrap().finish().unwrap();
        let object = found.add(package(), "cache/r/a-1.0.0.crate", &archive);
        found.store_object(&object);
        // A unit was compiled from it, so it is unpacked.
        found.job.before.parts.push(CachePart {
            base: BaseDir::Build(0),
            ..found.job.before.parts[0].clone()
        });
        let restored = found.restore_in_time(500_000);
        assert_eq!(restored.missed, 1);
        let registry = found.folder.path().join("home/registry");
        assert!(registry.join("cache/r/a-1.0.0.crate").exists());
        assert_eq!(fs::read_dir(registry.join("src/r")).unwrap().count(), 0);
        assert!(found.error_text().contains("more than"));
        // With more room it is.
        fs::remove_dir_all(&registry).unwrap();
        let restored = found.restore_in_time(2_000_000);
        assert_eq!((restored.missed, restored.restored_crates), (0, 1));
        assert!(registry.join("src/r/a-1.0.0/zeros").exists());
    }

    #[test]
    fn a_restore_that_leaves_too_little_free_ends_before_it_fetches_anything_and_says_so_once() {
        let mut found = RestoreTest::new(u64::MAX);
        for name in ["a", "b"] {
            let path = format!("index/r/.cache/1/{name}");
            found.add(Package::Several, &path, name.as_bytes());
        }
        let restored = found.restore_in_time(RESTORE_LIMIT);
        assert_eq!((restored.restored_bytes, restored.missed), (0, 2));
        let error_text = found.error_text();
        assert!(
            error_text.contains("are free on the disk of"),
            "{error_text}"
        );
        assert!(!found.folder.path().join("home").exists());
    }

    #[test]
    fn a_part_that_trickles_is_not_waited_for_longer_than_the_restore_may_take() {
        let mut found = RestoreTest::new(0);
        let object = found.add(Package::Several, "index/r/.cache/1/a", b"text");
        let chunk = found.job.before.parts[0].chunk;
        let file = LocalFile::create(&found.folder.path().join("pack")).unwrap();
        let (progress, seen) = tokio::sync::watch::channel(Progress::default());
        found
            .relay
            .table
            .lock()
            .add_test_object(chunk, &object, PackState::Fetching(seen, file));
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                // There is always more of it, and never all.
                let most = object.len() as u64 - 1;
                while !ended.load(Ordering::Relaxed) {
                    progress.send_modify(|progress| progress.bytes = most.min(progress.bytes + 1));
                    thread::yield_now();
                }
            });
            let begin = Instant::now();
            let deadline = begin + Duration::from_millis(200);
            let restored = found.restore(RESTORE_LIMIT, deadline, SystemTime::now());
            ended.store(true, Ordering::Relaxed);
            assert_eq!(restored.missed, 1);
            let took = begin.elapsed();
            assert!(took < STALL / 2, "{took:?}");
        });
        let error_text = found.error_text();
        assert!(error_text.contains("the time limit"), "{error_text}");
    }

    #[test]
    fn what_a_killed_restore_left_is_removed_by_a_later_one() {
        let mut found = RestoreTest::new(0);
        found.add_index("a", 1);
        let registry = found.folder.path().join("home/registry");
        fs::create_dir_all(registry.join("cache/r")).unwrap();
        let left = registry
            .join("cache/r")
            .join(staged("a-1.0.0.crate").unwrap());
        fs::write(&left, "half").unwrap();
        let later = SystemTime::now() + Duration::from_secs(2 * 60 * 60);
        let deadline = || Instant::now() + found.job.request.wait;
        found.restore(RESTORE_LIMIT, deadline(), SystemTime::now());
        assert!(left.exists());
        found.restore(RESTORE_LIMIT, deadline(), later);
        assert!(!left.exists());
        assert_eq!(found.relay.activity().errors, 0);
    }
}
