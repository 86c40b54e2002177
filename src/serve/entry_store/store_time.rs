//! The time of a store, which no setting of a machine's clock changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::clock::Timestamp;

/// How long it is since some moment, which is the same for as long as the clock is used. It never
/// goes back. Tests have their own clock.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// The system's clock that no setting of the time changes.
pub fn system_clock() -> Clock {
    let begun = Instant::now();
    Arc::new(move || begun.elapsed())
}

/// The time of a store: its time when it was opened, and the time that has passed since.
pub(super) struct StoreTime {
    clock: Clock,
    opened: Duration,
    /// In milliseconds since 1970.
    begun: AtomicU64,
}

impl StoreTime {
    pub(super) fn new(clock: Clock, begun: Timestamp) -> Self {
        Self {
            opened: clock(),
            begun: begun.milliseconds().into(),
            clock,
        }
    }

    pub(super) fn now(&self) -> Timestamp {
        let passed = (self.clock)().saturating_sub(self.opened);
        Timestamp::from_milliseconds(self.begun.load(Ordering::Relaxed)) + passed
    }

    /// Advances this clock to at least `time`, the time of another service.
    pub(super) fn catch_up(&self, time: Timestamp) {
        let ahead = time
            .milliseconds()
            .saturating_sub(self.now().milliseconds());
        self.begun.fetch_add(ahead, Ordering::Relaxed);
    }
}
