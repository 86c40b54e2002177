//! The time of a store, which no setting of a machine's clock changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A clock in milliseconds that never goes back. Tests have their own clock.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The system's clock that no setting of the time changes.
pub fn system_clock() -> Clock {
    let begun = Instant::now();
    Arc::new(move || milliseconds(begun.elapsed()))
}

/// The milliseconds since 1970.
pub(super) fn since_1970() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    time.map_or(0, milliseconds)
}

/// The time of a store: its time when it was opened, and the time that has passed since.
pub(super) struct StoreTime {
    clock: Clock,
    opened: u64,
    begun: AtomicU64,
}

impl StoreTime {
    pub(super) fn new(clock: Clock, begun: u64) -> Self {
        Self {
            opened: clock(),
            begun: begun.into(),
            clock,
        }
    }

    pub(super) fn now(&self) -> u64 {
        let passed = (self.clock)().saturating_sub(self.opened);
        self.begun.load(Ordering::Relaxed).saturating_add(passed)
    }

    /// Advances this clock to at least `time`, the time of another service.
    pub(super) fn catch_up(&self, time: u64) {
        let backend = time.saturating_sub(self.now());
        self.begun.fetch_add(backend, Ordering::Relaxed);
    }
}

pub(super) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
