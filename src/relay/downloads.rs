//! The downloads of packs, and of objects out of them, from the cache service.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::TryStreamExt;
use tokio::sync::{Semaphore, watch};

use crate::cache_client::{CacheClient, CacheError, Download};
use crate::digest::Digest;
use crate::packs::index::ObjectKey;
use crate::packs::local_file::LocalFile;
use crate::relay::activity::ActivityLog;
use crate::relay::object_table::{
    FetchAction, Location, ObjectTable, PackState, Progress, SharedTable,
};
use crate::relay::tasks::RelayTasks;
use crate::relay::{RelayConfig, delay_after};

/// How many packs are downloaded at once.
const PARALLEL_DOWNLOADS: usize = 3;

/// The longest delay before a download is resumed. One that must wait longer is given up.
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// How long a download may stall before a read of one of its objects gives up.
pub(super) const STALL: Duration = Duration::from_secs(20);

/// How often a download is attempted; each attempt resumes where the last one broke off.
const DOWNLOAD_ATTEMPTS: u32 = 3;

/// How long a request waits for a pack that is on its way before it fetches the object alone.
const FETCH_WAIT: Duration = Duration::from_millis(500);

/// How long a request waits for a pack if the object cannot be fetched alone.
const LONG_FETCH_WAIT: Duration = Duration::from_secs(20);

/// How many such waits in a row may time out before requests no longer wait.
const MAX_TIMEOUTS_IN_A_ROW: u32 = 3;

/// The downloads of a relay. Each pack is fetched by a task of its own; `tasks` has them all.
#[derive(Debug)]
pub(super) struct Downloads {
    config: Arc<RelayConfig>,
    client: CacheClient,
    table: Arc<SharedTable>,
    activity: Arc<ActivityLog>,
    tasks: RelayTasks,
    slots: Arc<Semaphore>,
    /// How many waits for a pack in a row have timed out.
    timeouts_in_a_row: AtomicU32,
}

/// The place of an object's bytes at the moment.
enum ByteSource {
    /// In a file.
    Local(Arc<LocalFile>),
    /// In a file to which its pack is being written.
    Downloading(watch::Receiver<Progress>, Arc<LocalFile>),
    /// At the cache service: in the pack with this number, whose data begins at this offset.
    Remote(usize, u64),
}

/// Why an object cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("content unavailable")]
    Lost,
    #[error("content damaged")]
    Damaged,
    #[error(transparent)]
    Disk(#[from] io::Error),
}

impl Downloads {
    pub(super) fn new(
        config: Arc<RelayConfig>,
        client: CacheClient,
        table: Arc<SharedTable>,
        activity: Arc<ActivityLog>,
        tasks: RelayTasks,
    ) -> Self {
        Self {
            config,
            client,
            table,
            activity,
            tasks,
            slots: Arc::new(Semaphore::new(PARALLEL_DOWNLOADS)),
            timeouts_in_a_row: AtomicU32::new(0),
        }
    }

    /// Starts to download a pack, unless that is under way or done.
    pub(super) fn start(self: &Arc<Self>, objects: &mut ObjectTable, pack: usize) {
        let Some(record) = objects.packs.get_mut(pack) else {
            return;
        };
        if !matches!(record.state, PackState::Remote { .. }) {
            return;
        }
        let path = self.config.folder.join(format!("pack-{pack}"));
        let file = match LocalFile::create(&path) {
            Ok(file) => file,
            Err(error) => {
                record.state = PackState::Lost { gone: false };
                self.activity.error("cannot store a pack", &error);
                return;
            }
        };
        // The first bytes came along with the index and need no second download.
        let first = std::mem::take(&mut record.first);
        let length = usize::try_from(record.data_length).unwrap_or(usize::MAX);
        let _ = file.append(first.get(..length.min(first.len())).unwrap_or_default());
        let (progress, seen) = watch::channel(Progress {
            bytes: file.length(),
            failed: false,
        });
        record.state = PackState::Fetching(seen, file.clone());
        self.tasks.spawn(self.clone().fetch(pack, file, progress));
    }

    async fn fetch(
        self: Arc<Self>,
        pack: usize,
        file: Arc<LocalFile>,
        progress: watch::Sender<Progress>,
    ) {
        let _turn = self.slots.clone().acquire_owned().await;
        let mut result = Ok(());
        for attempt in 0..DOWNLOAD_ATTEMPTS {
            result = self.download(pack, &file, &progress).await;
            let delay = match &result {
                Ok(()) => break,
                Err(DownloadError::Cache(error)) => delay_after(error, attempt),
                Err(DownloadError::Disk(_)) => None,
            };
            match delay {
                Some(delay) if delay < LONGEST_DELAY && attempt + 1 < DOWNLOAD_ATTEMPTS => {
                    tokio::time::sleep(delay).await;
                }
                _ => break,
            }
        }
        let state = match &result {
            Ok(()) => PackState::Local(file),
            Err(error) => PackState::Lost {
                gone: matches!(error, DownloadError::Cache(CacheError::Gone)),
            },
        };
        if let Some(record) = self.table.lock().packs.get_mut(pack) {
            record.state = state;
        }
        match result {
            Ok(()) => self.activity.note(|activity| activity.fetched_packs += 1),
            Err(error) => self.activity.error("cannot fetch a pack", &error),
        }
        progress.send_modify(|progress| progress.failed = true);
    }

    /// Downloads the rest of a pack's data.
    async fn download(
        &self,
        pack: usize,
        file: &LocalFile,
        progress: &watch::Sender<Progress>,
    ) -> Result<(), DownloadError> {
        let (data_start, data_length) = {
            let objects = self.table.lock();
            let record = objects.packs.get(pack).ok_or(CacheError::Gone)?;
            (record.data_start, record.data_length)
        };
        while file.length() < data_length {
            let from = data_start + file.length();
            let Download {
                mut start, stream, ..
            } = self.open(pack, from..data_start + data_length).await?;
            let mut stream = std::pin::pin!(stream);
            let before = file.length();
            while let Some(piece) = stream.try_next().await.map_err(interrupted)? {
                // A server without ranges starts at the beginning.
                let skip = (data_start + file.length()).saturating_sub(start);
                let skip = usize::try_from(skip).unwrap_or(usize::MAX);
                start += piece.len() as u64;
                let missing = usize::try_from(data_length - file.length()).unwrap_or(usize::MAX);
                let wanted = piece.get(skip.min(piece.len())..).unwrap_or_default();
                let wanted = wanted.get(..missing.min(wanted.len())).unwrap_or_default();
                file.append(wanted).map_err(DownloadError::Disk)?;
                progress.send_modify(|progress| progress.bytes = file.length());
            }
            if file.length() == before {
                return Err(CacheError::Unavailable("it is shorter than before".to_owned()).into());
            }
        }
        Ok(())
    }

    /// Opens a range of a pack. Uses the URL of an earlier look-up as long as it works.
    async fn open(&self, pack: usize, range: std::ops::Range<u64>) -> Result<Download, CacheError> {
        let (name, found) = {
            let objects = self.table.lock();
            let record = objects.packs.get(pack).ok_or(CacheError::Gone)?;
            (record.name.clone(), record.found.clone())
        };
        if let Some(found) = found {
            match self.client.download(&found, range.clone()).await {
                Err(CacheError::Gone) => {}
                opened => return opened,
            }
        }
        let found = self
            .client
            .find(&name, &[])
            .await?
            .filter(|found| found.key == name)
            .ok_or(CacheError::Gone)?;
        let opened = self.client.download(&found, range).await?;
        if let Some(record) = self.table.lock().packs.get_mut(pack) {
            record.found = Some(found);
        }
        Ok(opened)
    }

    /// Ensures that an object's bytes are on this machine. Returns whether they are.
    pub(super) async fn ensure_local(self: &Arc<Self>, key: ObjectKey) -> bool {
        loop {
            let action = self.table.lock().next_action(key);
            match action {
                FetchAction::Done(here) => return here,
                FetchAction::Wait(state, end) => {
                    if let Some(here) = self.wait_for(&state, end, FETCH_WAIT).await {
                        return here;
                    }
                    // A service that hangs must not delay each compile so long.
                    if self.timeouts_in_a_row.load(Ordering::Relaxed) >= MAX_TIMEOUTS_IN_A_ROW {
                        return false;
                    }
                    if self.fetch_single(key).await {
                        return true;
                    }
                    let here = self.wait_for(&state, end, LONG_FETCH_WAIT).await == Some(true);
                    if here {
                        self.timeouts_in_a_row.store(0, Ordering::Relaxed);
                    } else {
                        self.timeouts_in_a_row.fetch_add(1, Ordering::Relaxed);
                    }
                    return here;
                }
                FetchAction::FetchSingle(pack) => {
                    if self.fetch_single(key).await {
                        return true;
                    }
                    self.start(&mut self.table.lock(), pack);
                }
                FetchAction::FetchPack(pack) => self.start(&mut self.table.lock(), pack),
            }
        }
    }

    /// Waits until a pack is here up to `end`. Returns whether it is, or `None` if it is still on its way
    /// after `limit`.
    pub(super) async fn wait_for(
        &self,
        state: &PackState,
        end: u64,
        limit: Duration,
    ) -> Option<bool> {
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
    async fn fetch_single(self: &Arc<Self>, key: ObjectKey) -> bool {
        let (pack, range, digest) = {
            let mut objects = self.table.lock();
            if objects.single_reads == 0 {
                return false;
            }
            let Some(record) = objects.object(key) else {
                return false;
            };
            let (digest, length) = (record.digest, record.length);
            let Location::Pack(pack, offset) = record.location else {
                return true;
            };
            objects.single_reads -= 1;
            let Some(record) = objects.packs.get(pack) else {
                return false;
            };
            let start = record.data_start + offset;
            (pack, start..start + length, digest)
        };
        match self.read_range(pack, range).await {
            Ok(bytes) if Digest::of(&bytes) == digest => {
                let fetched = self.table.lock().fetched.clone();
                match fetched.append(&bytes) {
                    Ok(offset) => {
                        self.table
                            .lock()
                            .relocate(key, Location::File(fetched, offset));
                        true
                    }
                    Err(error) => {
                        self.activity.error("cannot store an object", &error);
                        false
                    }
                }
            }
            Ok(_) => {
                self.activity.note(|activity| activity.corrupt += 1);
                self.table.lock().remove(key);
                false
            }
            Err(error) => {
                if matches!(error, CacheError::Gone)
                    && let Some(record) = self.table.lock().packs.get_mut(pack)
                    && matches!(record.state, PackState::Remote { .. })
                {
                    record.state = PackState::Lost { gone: true };
                }
                self.activity.error("cannot fetch an object", &error);
                false
            }
        }
    }

    /// The bytes of a range of a pack's cache entry.
    pub(super) async fn read_range(
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

    /// Reads an object's bytes, whatever their source. Waits for a download as long as it makes progress.
    pub(super) async fn read(&self, key: ObjectKey) -> Result<Vec<u8>, ReadError> {
        loop {
            let (record, offset, source) = {
                let objects = self.table.lock();
                let record = objects.object(key).ok_or(ReadError::Lost)?.clone();
                let (offset, source) = match &record.location {
                    Location::File(file, offset) => (*offset, ByteSource::Local(file.clone())),
                    Location::Pack(pack, offset) => {
                        let found = objects.packs.get(*pack).ok_or(ReadError::Lost)?;
                        let source = match &found.state {
                            PackState::Local(file) => ByteSource::Local(file.clone()),
                            PackState::Fetching(progress, file) => {
                                ByteSource::Downloading(progress.clone(), file.clone())
                            }
                            PackState::Remote { .. } => ByteSource::Remote(*pack, found.data_start),
                            PackState::Lost { .. } => return Err(ReadError::Lost),
                        };
                        (*offset, source)
                    }
                };
                (record, offset, source)
            };
            let bytes = match source {
                ByteSource::Local(file) => file.read(offset, record.length)?,
                ByteSource::Downloading(mut progress, file) => {
                    let end = offset.saturating_add(record.length);
                    let before = progress.borrow_and_update().bytes;
                    let here =
                        progress.wait_for(|progress| progress.bytes >= end || progress.failed);
                    let waited = tokio::time::timeout(STALL, here)
                        .await
                        .map(|progress| progress.map(|progress| *progress));
                    let is_slow = waited.is_err() && progress.borrow().bytes > before;
                    match waited {
                        Ok(Ok(progress)) if progress.bytes >= end => {
                            file.read(offset, record.length)?
                        }
                        // It may have arrived by another way meanwhile, or not at all.
                        Ok(Ok(_)) => continue,
                        Err(_) if is_slow => continue,
                        Ok(Err(_)) | Err(_) => return Err(ReadError::Lost),
                    }
                }
                ByteSource::Remote(pack, data_start) => {
                    let start = data_start.saturating_add(offset);
                    let range = start..start.saturating_add(record.length);
                    let read = self.read_range(pack, range).await;
                    read.map_err(|_| ReadError::Lost)?
                }
            };
            if Digest::of(&bytes) != record.digest {
                self.activity.note(|activity| activity.corrupt += 1);
                self.table.lock().remove(key);
                return Err(ReadError::Damaged);
            }
            return Ok(bytes);
        }
    }
}

fn interrupted(error: io::Error) -> CacheError {
    CacheError::Unavailable(error.to_string())
}

/// Why a download ended.
#[derive(Debug, thiserror::Error)]
enum DownloadError {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("this machine's disk: {0}")]
    Disk(#[source] io::Error),
}
