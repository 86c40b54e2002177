//! The time of day, in the form in which it is stored and signed.

use std::ops::{Add, Sub};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// A time in milliseconds since 1970, which is also its form in JSON. Sums and differences stop at
/// the ends of its range.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The first time there is: the beginning of 1970.
    pub const UNIX_EPOCH: Self = Self(0);

    /// The last time there is.
    pub const MAX: Self = Self(u64::MAX);

    /// The time by this machine's clock; the beginning of 1970 if the clock says an earlier one.
    pub fn now() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self::UNIX_EPOCH + now.unwrap_or_default()
    }

    /// The time `milliseconds` after the beginning of 1970.
    pub const fn from_milliseconds(milliseconds: u64) -> Self {
        Self(milliseconds)
    }

    /// The time `seconds` after the beginning of 1970; the last whole second there is if that is later.
    pub const fn from_seconds(seconds: u64) -> Self {
        let last = Self::MAX.seconds();
        Self(if seconds < last { seconds } else { last } * 1000)
    }

    /// The milliseconds since 1970.
    pub const fn milliseconds(self) -> u64 {
        self.0
    }

    /// The whole seconds since 1970.
    pub const fn seconds(self) -> u64 {
        self.0 / 1000
    }

    /// The same without a part of a second, as the packs' indexes have times.
    pub const fn whole_seconds(self) -> Self {
        Self::from_seconds(self.seconds())
    }

    /// How long it is after `earlier`; nothing if it is before.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(milliseconds(duration)))
    }
}

impl Sub<Duration> for Timestamp {
    type Output = Self;

    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(milliseconds(duration)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_stop_at_the_ends_of_their_range() {
        let second = Duration::from_secs(1);
        assert_eq!(Timestamp::UNIX_EPOCH - second, Timestamp::UNIX_EPOCH);
        assert_eq!(Timestamp::MAX + second, Timestamp::MAX);
        assert_eq!(Timestamp::UNIX_EPOCH + Duration::MAX, Timestamp::MAX);
        assert_eq!(Timestamp::UNIX_EPOCH.since(Timestamp::MAX), Duration::ZERO);
    }

    #[test]
    fn a_time_of_whole_seconds_is_the_same_after_it_was_written_as_seconds() {
        for seconds in [0, 1, u64::MAX / 1000, u64::MAX / 1000 + 1, u64::MAX] {
            let time = Timestamp::from_seconds(seconds);
            assert_eq!(Timestamp::from_seconds(time.seconds()), time);
            assert_eq!(time.whole_seconds(), time);
            assert_eq!(time.seconds(), seconds.min(u64::MAX / 1000));
        }
    }

    #[test]
    fn a_time_has_seconds_and_milliseconds_and_is_written_in_these() {
        let time = Timestamp::from_seconds(2) + Duration::from_micros(345_678);
        assert_eq!((time.seconds(), time.milliseconds()), (2, 2345));
        assert_eq!(time.whole_seconds(), Timestamp::from_seconds(2));
        assert_eq!(time.since(Timestamp::from_seconds(2)).as_millis(), 345);
        assert_eq!(
            time - Duration::from_millis(345),
            Timestamp::from_seconds(2)
        );
        assert_eq!(serde_json::to_string(&time).unwrap(), "2345");
        assert_eq!(serde_json::from_str::<Timestamp>("2345").unwrap(), time);
    }
}
