//! The relay of a job, as the system sees it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::runner::{binary, kill};

/// How long a relay may live on after the post step.
const END_LIMIT: Duration = Duration::from_secs(10);

/// How often its memory is looked at. The system keeps the peak, so only what comes right before
/// its end can be missed.
const INTERVAL: Duration = Duration::from_millis(5);

/// The processes that are relays of the binary under test.
pub fn running() -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|process| is_relay(&process.path()))
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .collect()
}

/// A running relay. It is killed when this is dropped, if it has not ended.
pub struct Relay {
    pid: u32,
}

impl Relay {
    /// The relay that runs now and was not among those `earlier`, if there is one.
    pub fn started_since(earlier: &[u32]) -> Option<Self> {
        let mut pids = running().into_iter();
        let pid = pids.find(|pid| !earlier.contains(pid))?;
        Some(Self { pid })
    }

    fn process(&self) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string())
    }

    /// The most memory that it had so far, in KiB. A process that has ended has none.
    fn peak(&self) -> Option<u64> {
        let status = fs::read_to_string(self.process().join("status")).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    }

    /// Runs `step` and gives, besides what that gives, the most memory that the relay had up to
    /// its end, in KiB.
    pub fn watch<T>(&self, step: impl FnOnce() -> T) -> (T, u64) {
        let (done, is_done) = mpsc::channel::<()>();
        let mut peak = self.peak().unwrap_or_default();
        thread::scope(|scope| {
            let watching = scope.spawn(move || {
                loop {
                    peak = self.peak().unwrap_or_default().max(peak);
                    if is_done.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout) {
                        return peak;
                    }
                }
            });
            let given = step();
            drop(done);
            (given, watching.join().unwrap())
        })
    }

    /// Waits until it ends.
    pub fn ends(&self) {
        let begin = Instant::now();
        while is_relay(&self.process()) {
            assert!(begin.elapsed() < END_LIMIT, "the relay outlives its job");
            thread::sleep(INTERVAL);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if is_relay(&self.process()) {
            kill(self.pid);
        }
    }
}

/// Whether `process`, a folder of /proc, is a relay of the binary under test.
fn is_relay(process: &Path) -> bool {
    let Ok(command) = fs::read(process.join("cmdline")) else {
        return false;
    };
    let is_relay = command.split(|byte| *byte == 0).nth(1) == Some(b"relay");
    is_relay && file(&process.join("exe")) == file(Path::new(binary()))
}

/// The content that distinguishes files, whatever their names.
fn file(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}
