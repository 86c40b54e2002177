//! The writer of packs: it writes now and then while the build runs, and the rest at the end of the job.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::stream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::cache_client::{CacheClient, CacheError};
use crate::clock::Timestamp;
use crate::digest::Digest;
use crate::packs::chain::{ChainState, EntryKeys, IndexBudget};
use crate::packs::flush::{Decision, FlushLimits, FlushPolicy};
use crate::packs::index::{Bundle, BundleMember, Index, Object, ObjectKey, Pack, RunStats, hours};
use crate::packs::local_file::LocalFile;
use crate::packs::pack::{self, OWN, PackError};
use crate::relay::activity::ActivityLog;
use crate::relay::disk_tier::{self, CacheFileKind};
use crate::relay::object_table::{Location, MemberRecord, PackRecord, SharedTable};
use crate::relay::prefill::unpack;
use crate::relay::{RelayClock, RelayConfig, lock};

/// How much of a pack is in memory at once during its upload, in bytes.
const SENT_AT_ONCE: u64 = 256 * 1024;

/// The zstd level for bundles, the fastest but two. Their entries repeat each other, so more effort gains
/// little.
const BUNDLE_LEVEL: i32 = 3;

/// How often in a row the cache service may fail at the end of a job before the relay gives up the rest: a
/// service that is down is not back in a minute.
const LAST_ATTEMPTS: u32 = 3;

/// The outcome of an attempt to write a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    /// It was written, or there is no reason to try again.
    Done,
    /// The service refuses requests for a while.
    Throttled,
    /// It failed.
    Failed,
}

/// Why no pack was written.
#[derive(Debug, thiserror::Error)]
enum SaveError {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Pack(#[from] PackError),
    #[error("this machine's disk: {0}")]
    Disk(#[from] io::Error),
}

/// A range of a file.
#[derive(Clone, Debug)]
struct FileRange {
    file: Arc<LocalFile>,
    offset: u64,
    length: u64,
}

/// Builds a pack: its index, and the ranges of files that its data consists of.
#[derive(Debug, Default)]
struct PackBuilder {
    pack: Pack,
    ranges: Vec<FileRange>,
}

impl PackBuilder {
    fn is_empty(&self) -> bool {
        self.pack.bundle.is_none() && self.pack.objects.is_empty()
    }

    fn add(&mut self, range: FileRange) -> u64 {
        let offset = self.pack.data_length;
        self.pack.data_length += range.length;
        match self.ranges.last_mut() {
            // Ranges one behind the other are sent in one go.
            Some(last)
                if Arc::ptr_eq(&last.file, &range.file)
                    && last.offset + last.length == range.offset =>
            {
                last.length += range.length;
            }
            _ => self.ranges.push(range),
        }
        offset
    }
}

/// The only writer of packs: it has the chains of the scopes, and the policy when to write.
#[derive(Debug)]
pub(super) struct PackWriter {
    config: Arc<RelayConfig>,
    client: CacheClient,
    clock: RelayClock,
    table: Arc<SharedTable>,
    activity: Arc<ActivityLog>,
    /// Notified when an object becomes pending.
    pending: Arc<Notify>,
    /// The scopes' chains, the written one first. The lock is held while an entry is read or written.
    chains: tokio::sync::Mutex<Vec<ChainState>>,
    policy: Mutex<FlushPolicy>,
    /// The results of this run, once the post step has sent them.
    run_stats: Mutex<Option<RunStats>>,
}

impl PackWriter {
    pub(super) fn new(
        config: Arc<RelayConfig>,
        client: CacheClient,
        clock: RelayClock,
        (table, activity): (Arc<SharedTable>, Arc<ActivityLog>),
        pending: Arc<Notify>,
    ) -> Self {
        let limits = FlushLimits {
            age: config.flush_age,
            ..FlushLimits::default()
        };
        Self {
            chains: tokio::sync::Mutex::new(chains(&config)),
            client,
            clock,
            table,
            activity,
            pending,
            policy: Mutex::new(FlushPolicy::new(limits)),
            run_stats: Mutex::new(None),
            config,
        }
    }

    /// The scopes' chains, the written one first.
    pub(super) fn chains(&self) -> &tokio::sync::Mutex<Vec<ChainState>> {
        &self.chains
    }

    /// Notes the results of this run, for the next run's summary.
    pub(super) fn set_run_stats(&self, run_stats: Option<RunStats>) {
        *lock(&self.run_stats) = run_stats;
    }

    /// Writes all pending objects, until `deadline`.
    pub(super) async fn finish(&self, deadline: Instant) {
        let work = async {
            let mut failures = 0;
            while failures < LAST_ATTEMPTS {
                let limit = self.clock.since_start(deadline);
                let at = lock(&self.policy).earliest_before(self.clock.elapsed(), limit);
                let Some(at) = at else {
                    return;
                };
                sleep_until(self.clock.instant(at)).await;
                let pending = self.table.lock().pending().1;
                let last = pending.bytes <= FlushLimits::default().bytes;
                match self.save(last).await {
                    Attempt::Done if last => return,
                    Attempt::Done => failures = 0,
                    Attempt::Throttled => {}
                    Attempt::Failed => failures += 1,
                }
            }
        };
        if self.table.lock().is_writable() {
            let _ = tokio::time::timeout_at(deadline, work).await;
        }
        if self.table.lock().pending().0 > 0 {
            let why = self
                .activity
                .snapshot()
                .first_retried_error
                .unwrap_or_else(|| "no time was left".to_owned());
            self.activity.error("objects are not saved", &why);
        }
    }

    /// Writes packs as the flush policy says, until `stop` says that the job is at its end: then
    /// [`PackWriter::finish`] writes the rest.
    pub(super) async fn run(self: Arc<Self>, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let pending = self.table.lock().pending().1;
            let decision = lock(&self.policy).decide(self.clock.elapsed(), pending);
            match decision {
                Decision::Flush => {
                    self.save(false).await;
                }
                Decision::Idle => tokio::select! {
                    () = self.pending.notified() => {}
                    () = stop.cancelled() => {}
                },
                Decision::Wait(at) => {
                    let at = self.clock.instant(at);
                    tokio::select! {
                        () = sleep_until(at) => {}
                        () = self.pending.notified() => {}
                        () = stop.cancelled() => {}
                    }
                }
            }
        }
    }

    /// Writes one pack.
    async fn save(&self, last: bool) -> Attempt {
        if !self.table.lock().is_writable() {
            return Attempt::Done;
        }
        lock(&self.policy).started(self.clock.elapsed());
        let Err(error) = self.write_pack(last).await else {
            lock(&self.policy).succeeded();
            return Attempt::Done;
        };
        self.activity.retry("a pack was not written", &error);
        let mut policy = lock(&self.policy);
        match &error {
            SaveError::Cache(CacheError::Denied(_)) => {
                if self.activity.snapshot().saved_packs > 0 {
                    // The token was valid before: it expires after about six hours.
                    self.activity.error("objects are no longer saved", &error);
                }
                self.table.lock().disable_writes();
                self.activity.note(|activity| activity.read_only = true);
                Attempt::Done
            }
            SaveError::Cache(CacheError::Throttled { retry_after }) => {
                policy.throttled(self.clock.elapsed(), *retry_after);
                Attempt::Throttled
            }
            _ => {
                policy.failed(self.clock.elapsed());
                Attempt::Failed
            }
        }
    }

    async fn write_pack(&self, last: bool) -> Result<(), SaveError> {
        let mut scopes = self.chains.lock().await;
        let Some((own, others)) = scopes.split_first_mut() else {
            return Ok(());
        };
        let (batch, releases) = {
            let mut objects = self.table.lock();
            let bytes = objects.pending().1.bytes;
            let batch = objects.batch(FlushLimits::default().bytes);
            (batch, objects.start_pack(bytes))
        };
        let time = self.clock.time(&self.client);
        let (mut builder, mut members) = self.build_pack(&batch, &[], time)?;
        let mut repacked = BTreeSet::new();
        if last {
            let objects = self.table.lock();
            own.index.packs.retain(|name, _| !objects.is_gone(name));
            drop(objects);
            // This comes first, so that `retain` drops nothing that this job has just used.
            let others: Vec<&Index> = others.iter().map(|chain| &chain.index).collect();
            let run_stats = *lock(&self.run_stats);
            let lane = self.config.lane;
            let table = self.table.lock();
            let note_is_due = table.note_use(&mut own.index, &others, lane, (time, run_stats));
            drop(table);
            own.retain(time, self.config.max_size);
            repacked = self.table.lock().packs_to_repack(&own.index, &builder.pack);
            if !note_is_due && builder.is_empty() && repacked.is_empty() {
                return Ok(());
            }
        } else if builder.is_empty() {
            return Ok(());
        }
        let (key, upload) = own.reserve(&self.client, time).await?;
        if !repacked.is_empty() {
            // Built again: the bundle stands before the objects, and now has more entries.
            let bundles = self.repacked_bundles(own, &repacked);
            (builder, members) = self.build_pack(&batch, &bundles, time)?;
            let stay = self.add_repacked(&mut builder, own, &repacked);
            repacked.retain(|name| !stay.contains(name));
        }
        let data_length = builder.pack.data_length;
        let mut index = own.index.clone();
        index.unmerged = own.unmerged();
        index.packs.retain(|name, _| !repacked.contains(name));
        if !builder.is_empty() {
            index.packs.insert(OWN.to_owned(), builder.pack.clone());
            for (number, lane) in &mut index.lanes {
                let before = lane.packs.len();
                lane.packs.retain(|name| !repacked.contains(name));
                // Other lanes find the repacked objects there.
                if *number == self.config.lane || lane.packs.len() < before {
                    lane.packs.insert(key.clone());
                }
            }
        }
        let head = pack::encode_head(&index, own.base())?;
        builder.pack.data_start = head.bytes.len() as u64;
        let size = builder.pack.data_start + data_length;
        let body = body(head.bytes.clone(), std::mem::take(&mut builder.ranges));
        self.client.upload(&upload, size, body).await?;
        self.client.commit(upload, size).await?;
        index.packs.remove(OWN);
        let pack = builder.pack.clone();
        if !builder.is_empty() {
            index.packs.insert(key.clone(), builder.pack);
        }
        index.unmerged.clear();
        own.committed(&key, &head, index);
        self.activity.note(|activity| {
            activity.saved_packs += u64::from(data_length > 0);
            activity.saved_index_bytes += head.bytes.len() as u64;
            activity.saved_bytes += size;
        });
        let mut objects = self.table.lock();
        objects.mark_saved(&batch, self.clock.elapsed());
        objects.members.extend(members);
        if releases {
            objects.release(&batch, &key, &pack);
        }
        Ok(())
    }

    /// The bundles of the packs to repack, each with its file, if that is here.
    fn repacked_bundles(
        &self,
        own: &ChainState,
        repacked: &BTreeSet<String>,
    ) -> Vec<RepackedBundle> {
        let objects = self.table.lock();
        let packs = own
            .index
            .packs
            .iter()
            .filter(|(name, _)| repacked.contains(*name));
        packs
            .filter_map(|(name, pack)| {
                let number = objects.pack_number(name);
                let record = number.and_then(|number| objects.packs.get(number));
                let file = record.and_then(PackRecord::file).cloned();
                Some((pack.bundle.clone()?, file))
            })
            .collect()
    }

    /// Builds a pack of these objects, and of the entries of the preprocessor cache that no pack has or
    /// that are in bundles to repack. Returns the new records of these entries too.
    fn build_pack(
        &self,
        keys: &[ObjectKey],
        repacked: &[RepackedBundle],
        time: Timestamp,
    ) -> Result<(PackBuilder, HashMap<ObjectKey, MemberRecord>), SaveError> {
        let mut builder = PackBuilder::default();
        builder.pack.created = time;
        let members = self.add_members(&mut builder, repacked, time)?;
        self.add_objects(&mut builder, keys, time);
        Ok((builder, members))
    }

    fn add_members(
        &self,
        builder: &mut PackBuilder,
        repacked: &[RepackedBundle],
        time: Timestamp,
    ) -> Result<HashMap<ObjectKey, MemberRecord>, SaveError> {
        let (folder, known) = {
            let objects = self.table.lock();
            (objects.disk_tier.clone(), objects.members.clone())
        };
        let Some(folder) = folder else {
            return Ok(HashMap::new());
        };
        let members = repacked
            .iter()
            .flat_map(|(bundle, _)| bundle.members.iter());
        let repacked_members: HashMap<ObjectKey, u32> =
            members.map(|member| (member.key, member.used)).collect();
        let path = self.config.folder.join(format!("bundle-{}", unique()));
        let mut bundle = BundleWriter::new(&path)?;
        for found in disk_tier::scan(&folder) {
            let before = known.get(&found.key);
            let repacked_use = repacked_members.get(&found.key).copied();
            let looked_at = before.is_some_and(|record| record.seen == Some(found.modified));
            let may_be_new = before.is_none() || (found.touched && !looked_at);
            if found.kind != CacheFileKind::Preprocessor || (!may_be_new && repacked_use.is_none())
            {
                continue;
            }
            // sccache may replace it meanwhile; the bytes that were read count.
            let Ok(bytes) = fs::read(&found.path) else {
                continue;
            };
            let same = before.is_some_and(|record| record.digest == Digest::of(&bytes));
            if same && repacked_use.is_none() {
                continue;
            }
            let used = repacked_use
                .filter(|_| !found.touched)
                .unwrap_or_else(|| hours(time));
            bundle.add(found.key, &bytes, used, Some(found.modified))?;
        }
        // Entries that were not on the disk before the build move from pack to pack.
        for (repacked, file) in repacked {
            let Some(file) = file else {
                continue;
            };
            let unpacked = unpack(file, repacked, |key, bytes| {
                let counts = known
                    .get(&key)
                    .is_some_and(|record| record.digest == Digest::of(bytes));
                match (counts, repacked_members.get(&key)) {
                    (true, Some(used)) if !bundle.has(key) => bundle.add(key, bytes, *used, None),
                    _ => Ok(()),
                }
            });
            if let Err(error) = unpacked {
                self.activity
                    .error("a part of the preprocessor cache is unusable", &error);
            }
        }
        let (members, records) = (bundle.members.clone(), bundle.records.clone());
        let file = bundle.finish()?;
        if !members.is_empty() {
            let length = file.length();
            let offset = builder.add(FileRange {
                file,
                offset: 0,
                length,
            });
            builder.pack.bundle = Some(Bundle {
                offset,
                length,
                members: Arc::new(members),
            });
        }
        Ok(records)
    }

    fn add_objects(&self, builder: &mut PackBuilder, keys: &[ObjectKey], time: Timestamp) {
        let objects = self.table.lock();
        let mut added = Vec::with_capacity(keys.len());
        for key in keys {
            let Some(record) = objects.object(*key) else {
                continue;
            };
            let Location::File(file, offset) = &record.location else {
                continue;
            };
            let range = FileRange {
                file: file.clone(),
                offset: *offset,
                length: record.length,
            };
            let object = Object {
                offset: builder.add(range),
                length: record.length,
                digest: record.digest,
                used: hours(time),
            };
            added.push((*key, object));
        }
        builder.pack.objects = added.into();
    }

    /// Adds the live objects of the packs to repack. Returns the packs that have to stay: those with an
    /// object whose bytes are not here as they were written.
    fn add_repacked(
        &self,
        builder: &mut PackBuilder,
        own: &ChainState,
        repacked: &BTreeSet<String>,
    ) -> BTreeSet<String> {
        let mut stay = BTreeSet::new();
        let mut added = Vec::new();
        for (key, name, object) in own.index.objects() {
            if !repacked.contains(name) || builder.pack.objects.contains_key(key) {
                continue;
            }
            let here = self.table.lock().bytes_of(*key, name, object);
            // It may have been downloaded and never checked.
            let good = here.filter(|(file, at)| file.holds(*at, object.length, object.digest));
            let Some((file, offset)) = good else {
                stay.insert(name.to_owned());
                continue;
            };
            let range = FileRange {
                file,
                offset,
                length: object.length,
            };
            let offset = builder.add(range);
            added.push((*key, Object { offset, ..*object }));
        }
        let new = std::mem::take(&mut builder.pack.objects);
        builder.pack.objects = Vec::from(new).into_iter().chain(added).collect();
        stay
    }
}

/// A number that no other call in this process got.
fn unique() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A bundle to repack, with the file of its pack, if that is here.
type RepackedBundle = (Bundle, Option<Arc<LocalFile>>);

/// Writes a bundle.
struct BundleWriter {
    file: Arc<LocalFile>,
    encoder: zstd::Encoder<'static, FileAppender>,
    members: Vec<BundleMember>,
    records: HashMap<ObjectKey, MemberRecord>,
}

impl BundleWriter {
    fn new(path: &Path) -> io::Result<Self> {
        let file = LocalFile::create(path)?;
        let encoder = zstd::Encoder::new(FileAppender(file.clone()), BUNDLE_LEVEL)?;
        Ok(Self {
            file,
            encoder,
            members: Vec::new(),
            records: HashMap::new(),
        })
    }

    fn has(&self, key: ObjectKey) -> bool {
        self.records.contains_key(&key)
    }

    fn add(
        &mut self,
        key: ObjectKey,
        bytes: &[u8],
        used: u32,
        seen: Option<SystemTime>,
    ) -> io::Result<()> {
        let record = MemberRecord {
            digest: Digest::of(bytes),
            seen,
        };
        self.encoder.write_all(bytes)?;
        self.members.push(BundleMember {
            key,
            length: bytes.len() as u64,
            digest: record.digest,
            used,
        });
        self.records.insert(key, record);
        Ok(())
    }

    /// The file with the bundle.
    fn finish(self) -> io::Result<Arc<LocalFile>> {
        self.encoder.finish()?;
        Ok(self.file)
    }
}

/// Writes at the end of a file.
struct FileAppender(Arc<LocalFile>);

impl Write for FileAppender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.append(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The bytes of an entry, read as they are sent.
fn body(
    head: Vec<u8>,
    ranges: Vec<FileRange>,
) -> impl stream::Stream<Item = io::Result<Bytes>> + Send + 'static {
    let state = (
        Some(Bytes::from(head)),
        ranges.into_iter(),
        None::<FileRange>,
    );
    stream::unfold(state, |(head, mut ranges, current)| async move {
        if let Some(head) = head {
            return Some((Ok(head), (None, ranges, None)));
        }
        let mut range = match current {
            Some(range) => range,
            None => ranges.next()?,
        };
        let length = range.length.min(SENT_AT_ONCE);
        let read = range.file.read(range.offset, length).map(Bytes::from);
        range.offset += length;
        range.length -= length;
        let rest = (range.length > 0).then_some(range);
        Some((read, (None, ranges, rest)))
    })
}

/// The chains of the scopes that a relay reads and writes, the written one first.
fn chains(config: &RelayConfig) -> Vec<ChainState> {
    let mut scopes: Vec<&String> = config.write.iter().chain(&config.read).collect();
    let mut seen = std::collections::HashSet::new();
    scopes.retain(|scope| seen.insert(*scope));
    let budget = IndexBudget::default();
    let states = scopes.into_iter().map(|scope| {
        let keys = EntryKeys::new(&config.namespace, &config.platform, scope);
        let state = if config.read.is_empty() {
            ChainState::write_only(keys)
        } else {
            ChainState::new(keys)
        };
        state.with_budget(&budget)
    });
    states.collect()
}
