//! The exchange between the packs and sccache's disk: before the first compile the relay writes there what
//! this lane is likely to look up, and later reads from there the objects that sccache did not send.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::cargo_cache::manifest::is_cargo_key;
use crate::digest::Digest;
use crate::packs::index::{Bundle, BundleMember, ObjectKey};
use crate::packs::local_file::LocalFile;
use crate::relay::Relay;
use crate::relay::disk_tier::{self, CacheFileKind, PrefillReport, SMALL_OBJECT};
use crate::relay::object_table::{Location, MemberRecord, PackState};

/// The relay waits for the whole of a pack up to this size, in bytes: an object on sccache's disk costs
/// less than one from the relay.
const WAITED_FOR_WHOLE: u64 = 32 << 20;

/// The greatest length of a bundle, uncompressed, and of an entry in it that the relay accepts, in bytes. A
/// real entry has some kilobytes for each header.
const BUNDLE_LIMIT: u64 = 4 << 30;
const MEMBER_LIMIT: u64 = 16 << 20;

impl Relay {
    /// Fills sccache's disk from the packs on their way, and waits up to `wait` for those with a part of
    /// the preprocessor cache: sccache reads its folder once, before the first compile.
    pub(super) async fn prefill(
        self: Arc<Self>,
        folder: Option<PathBuf>,
        wait: Duration,
    ) -> PrefillReport {
        let deadline = Instant::now() + wait;
        let mut subscription = self.loaded.subscribe();
        let loaded = subscription.wait_for(|loaded| *loaded);
        let loaded = tokio::time::timeout_at(deadline, loaded).await.is_ok();
        let has_disk_tier = folder.is_some();
        let mut report = match folder {
            Some(folder) => self.fill(folder, deadline).await,
            None => PrefillReport::default(),
        };
        report.error = self.activity.snapshot().first_error;
        let is_known = |(key, _): (&ObjectKey, _)| !is_cargo_key(*key);
        report.nothing_known = loaded
            && has_disk_tier
            && report.error.is_none()
            && !self.table.lock().objects().any(is_known);
        if report.nothing_known {
            let relay = self.clone();
            self.tasks.spawn(relay.take_from_disk_now_and_then());
        }
        if !loaded {
            let silent = format!(
                "the cache service did not answer within {} s",
                wait.as_secs()
            );
            report.error.get_or_insert(silent);
        }
        report
    }

    async fn fill(self: &Arc<Self>, folder: PathBuf, deadline: Instant) -> PrefillReport {
        self.table.lock().disk_tier = Some(folder.clone());
        let bundles: HashMap<String, Bundle> = {
            let Ok(chains) = self.writer.chains().try_lock() else {
                // The indexes are still being read.
                return PrefillReport::default();
            };
            let packs = chains.iter().flat_map(|chain| &chain.index.packs);
            packs
                .filter_map(|(name, pack)| Some((name.clone(), pack.bundle.clone()?)))
                .collect()
        };
        let mut report = PrefillReport {
            complete: true,
            ..PrefillReport::default()
        };
        for (state, end) in self.packs_to_wait_for(&bundles) {
            let rest = deadline.saturating_duration_since(Instant::now());
            report.complete &= self.downloads.wait_for(&state, end, rest).await == Some(true);
        }
        let relay = self.clone();
        let work = move || relay.prefill_from_local(&folder, &bundles);
        if let Ok((objects, entries)) = tokio::task::spawn_blocking(work).await {
            report.objects = objects;
            report.entries = entries;
        }
        report
    }

    /// The packs on their way whose part of the preprocessor cache is worth waiting for, each with
    /// how much of it is: the bundle, which comes first, and of a small pack the rest as well.
    fn packs_to_wait_for(&self, bundles: &HashMap<String, Bundle>) -> Vec<(PackState, u64)> {
        let objects = self.table.lock();
        let coming = objects
            .packs
            .iter()
            .filter(|pack| matches!(pack.state, PackState::Fetching(..)));
        coming
            .filter_map(|pack| {
                let bundle = bundles.get(&pack.name)?;
                let end = if pack.data_length <= WAITED_FOR_WHOLE {
                    pack.data_length
                } else {
                    bundle.offset.saturating_add(bundle.length)
                };
                Some((pack.state.clone(), end))
            })
            .collect()
    }

    fn prefill_from_local(&self, folder: &Path, bundles: &HashMap<String, Bundle>) -> (u64, u64) {
        let (files, small, wanted) = {
            let objects = self.table.lock();
            let files: Vec<(String, Arc<LocalFile>)> = objects
                .packs
                .iter()
                .filter_map(|pack| Some((pack.name.clone(), pack.file()?.clone())))
                .collect();
            let small: Vec<_> = objects
                .objects()
                .filter(|(key, record)| record.length <= SMALL_OBJECT && !is_cargo_key(**key))
                .filter_map(|(key, record)| {
                    let Location::Pack(pack, offset) = record.location else {
                        return None;
                    };
                    let file = objects.packs.get(pack)?.file()?;
                    let is_here = offset.saturating_add(record.length) <= file.length();
                    is_here.then(|| (*key, file.clone(), offset, record.length, record.digest))
                })
                .collect();
            (files, small, objects.members.clone())
        };
        // There are thousands of small files, and creating them takes the time.
        std::thread::scope(|scope| {
            let entries = scope.spawn(|| self.prefill_entries(folder, &files, bundles, &wanted));
            let objects = self.prefill_objects(folder, small);
            (objects, entries.join().unwrap_or(0))
        })
    }

    fn prefill_entries(
        &self,
        folder: &Path,
        files: &[(String, Arc<LocalFile>)],
        bundles: &HashMap<String, Bundle>,
        wanted: &HashMap<ObjectKey, MemberRecord>,
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
                if counts.is_none_or(|record| record.digest != Digest::of(bytes)) {
                    return Ok(());
                }
                let new = disk_tier::put(folder, CacheFileKind::Preprocessor, key, bytes)?;
                entries += u64::from(new);
                Ok(())
            };
            if let Err(error) = unpack(file, bundle, put) {
                self.activity
                    .error("a part of the preprocessor cache is unusable", &error);
            }
        }
        entries
    }

    fn prefill_objects(&self, folder: &Path, small: Vec<SmallObject>) -> u64 {
        let mut objects = 0;
        for (key, file, offset, length, digest) in small {
            let bytes = match file.read(offset, length) {
                Ok(bytes) if Digest::of(&bytes) == digest => bytes,
                _ => {
                    self.activity.note(|activity| activity.corrupt += 1);
                    self.table.lock().remove(key);
                    continue;
                }
            };
            match disk_tier::put(folder, CacheFileKind::Object, key, &bytes) {
                Ok(new) => objects += u64::from(new),
                Err(error) => {
                    self.activity
                        .error("cannot fill sccache's disk tier", &error);
                    break;
                }
            }
        }
        objects
    }

    /// Reads new objects from sccache's disk from time to time, for a job whose sccache does not send them.
    pub(super) async fn take_from_disk_now_and_then(self: Arc<Self>) {
        let least = (self.config.flush_age / 10).max(Duration::from_millis(200));
        let mut pause = least;
        while self.table.lock().is_writable() {
            let stop = self.stop.cancelled();
            if tokio::time::timeout(pause, stop).await.is_ok() {
                return;
            }
            let begin = Instant::now();
            let relay = self.clone();
            if tokio::task::spawn_blocking(move || relay.take_from_disk())
                .await
                .is_err()
            {
                return;
            }
            // A large folder is scanned less often.
            pause = least.max(begin.elapsed() * 20);
        }
    }

    /// Stores the objects on sccache's disk that sccache did not send, and notes which of the prefilled
    /// ones it has used.
    pub(super) fn take_from_disk(&self) {
        let Some(folder) = self.table.lock().disk_tier.clone() else {
            return;
        };
        for found in disk_tier::scan(&folder) {
            if !found.touched {
                continue;
            }
            match found.kind {
                CacheFileKind::Preprocessor => {
                    self.table.lock().used_members.insert(found.key);
                }
                CacheFileKind::Object => {
                    let known = {
                        let mut objects = self.table.lock();
                        objects.mark_used(found.key);
                        objects.object(found.key).is_some()
                    };
                    if !known {
                        let kept = File::open(&found.path)
                            .and_then(|mut file| self.store_object(found.key, &mut file));
                        if let Err(error) = kept {
                            self.activity
                                .error("an object on sccache's disk was not stored", &error);
                            if error.kind() == io::ErrorKind::StorageFull {
                                return;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// An object for sccache's disk: its key, file, offset, length and digest.
type SmallObject = (ObjectKey, Arc<LocalFile>, u64, u64, Digest);

/// Hands each entry of a bundle to `take`, whatever its digest is.
pub(super) fn unpack(
    file: &LocalFile,
    bundle: &Bundle,
    mut take: impl FnMut(ObjectKey, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let too_long = |member: &BundleMember| member.length > MEMBER_LIMIT;
    if bundle.raw_length() > BUNDLE_LIMIT || bundle.members.iter().any(too_long) {
        return Err(io::Error::other("it is too large"));
    }
    let compressed = file.read(bundle.offset, bundle.length)?;
    let mut decoder = zstd::Decoder::new(&*compressed)?;
    for member in bundle.members.iter() {
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
