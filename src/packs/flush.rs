//! The policy that decides when a pack is written: often enough that a killed job loses little, and seldom
//! enough that GitHub's limits are never near. It is a function of times and sizes; nothing here waits.

use std::time::Duration;

/// The limits on writing packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlushLimits {
    /// A pack is written once so many bytes are pending.
    pub bytes: u64,
    /// A pack is written once an object has been pending so long.
    pub age: Duration,
    /// How many entries are created in a minute at most.
    pub per_minute: u32,
}

impl Default for FlushLimits {
    /// 64 MiB: no object is held in memory, so a larger pack costs nothing and saves requests. 45 s: with
    /// the time of an upload, a killed job loses at most the last minute. Four a minute: GitHub takes 200
    /// from all jobs of a repository together.
    fn default() -> Self {
        Self {
            bytes: 64 << 20,
            age: Duration::from_secs(45),
            per_minute: 4,
        }
    }
}

/// The bytes that are pending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// How many bytes.
    pub bytes: u64,
    /// Since when the first of them is pending; `None` if there are none.
    pub since: Option<Duration>,
}

/// The policy's decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Write a pack now.
    Flush,
    /// Nothing before this time.
    Wait(Duration),
    /// Nothing until something is pending.
    Idle,
}

/// The delay after a first failure, and the longest one.
const FIRST_DELAY: Duration = Duration::from_secs(5);
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// The delay after a refusal that does not say how long to wait: the longest that GitHub's answers name.
const THROTTLED_DELAY: Duration = Duration::from_secs(20);

/// Decides when packs are written. Times are since any one moment and never go back.
#[derive(Clone, Debug)]
pub struct FlushPolicy {
    limits: FlushLimits,
    /// Entries that may be created right now, in thousandths.
    tokens: u64,
    refilled: Duration,
    blocked_until: Duration,
    failures: u32,
}

const TOKEN: u64 = 1000;

impl FlushPolicy {
    /// A policy with nothing written yet.
    pub fn new(limits: FlushLimits) -> Self {
        Self {
            limits,
            tokens: u64::from(limits.per_minute) * TOKEN,
            refilled: Duration::ZERO,
            blocked_until: Duration::ZERO,
            failures: 0,
        }
    }

    /// Decides what to do at `now`.
    pub fn decide(&mut self, now: Duration, pending: Pending) -> Decision {
        let Some(since) = pending.since else {
            return Decision::Idle;
        };
        self.refill(now);
        let due = if pending.bytes >= self.limits.bytes {
            since
        } else {
            since.saturating_add(self.limits.age)
        };
        let at = due.max(self.blocked_until).max(self.next_token(now));
        if at <= now {
            Decision::Flush
        } else {
            Decision::Wait(at)
        }
    }

    /// When an entry may be created at the end of the job, however little is pending: as soon as the
    /// service accepts requests. The job has no later minute to save the allowance for.
    pub fn earliest(&self, now: Duration) -> Duration {
        self.blocked_until.max(now)
    }

    /// The same, or `None` if the service refuses requests until after `deadline`.
    pub fn earliest_before(&self, now: Duration, deadline: Duration) -> Option<Duration> {
        Some(self.earliest(now)).filter(|at| *at <= deadline)
    }

    /// Notes that an entry is about to be created.
    pub fn started(&mut self, now: Duration) {
        self.refill(now);
        self.tokens = self.tokens.saturating_sub(TOKEN);
    }

    /// Notes that the entry was created.
    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// Notes that the service refuses requests, and for how long if it says so.
    pub fn throttled(&mut self, now: Duration, retry_after: Option<Duration>) {
        let delay = retry_after.unwrap_or(THROTTLED_DELAY);
        self.blocked_until = self.blocked_until.max(now.saturating_add(delay));
    }

    /// Notes that creating the entry failed.
    pub fn failed(&mut self, now: Duration) {
        let delay = FIRST_DELAY
            .saturating_mul(1 << self.failures.min(8))
            .min(LONGEST_DELAY);
        self.failures += 1;
        self.blocked_until = self.blocked_until.max(now.saturating_add(delay));
    }

    fn capacity(&self) -> u64 {
        u64::from(self.limits.per_minute) * TOKEN
    }

    fn refill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.refilled).as_millis();
        let elapsed = u64::try_from(elapsed).unwrap_or(u64::MAX);
        let gained = elapsed.saturating_mul(u64::from(self.limits.per_minute)) / 60;
        if gained > 0 {
            self.tokens = self.tokens.saturating_add(gained).min(self.capacity());
            self.refilled = now;
        }
    }

    fn next_token(&self, now: Duration) -> Duration {
        let missing = TOKEN.saturating_sub(self.tokens);
        let wait = missing * 60 / u64::from(self.limits.per_minute.max(1));
        match missing {
            0 => now,
            _ => now.saturating_add(Duration::from_millis(wait + 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: FlushLimits = FlushLimits {
        bytes: 100,
        age: Duration::from_secs(45),
        per_minute: 4,
    };

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn pending(bytes: u64, since: u64) -> Pending {
        Pending {
            bytes,
            since: Some(seconds(since)),
        }
    }

    #[test]
    fn a_full_pack_is_written_at_once_and_a_small_one_when_it_is_old() {
        let mut policy = FlushPolicy::new(LIMITS);
        let nothing = Pending::default();
        assert_eq!(policy.decide(seconds(9), nothing), Decision::Idle);
        assert_eq!(policy.decide(seconds(9), pending(100, 9)), Decision::Flush);
        let small = pending(99, 9);
        assert_eq!(
            policy.decide(seconds(9), small),
            Decision::Wait(seconds(54))
        );
        assert_eq!(policy.decide(seconds(54), small), Decision::Flush);
    }

    #[test]
    fn a_job_at_its_end_waits_for_no_service_that_will_not_listen_in_time() {
        let mut policy = FlushPolicy::new(LIMITS);
        let at = |policy: &FlushPolicy| policy.earliest_before(seconds(10), seconds(130));
        assert_eq!(at(&policy), Some(seconds(10)));
        policy.throttled(seconds(10), Some(seconds(120)));
        assert_eq!(at(&policy), Some(seconds(130)));
        policy.throttled(seconds(10), Some(seconds(3600)));
        assert_eq!(at(&policy), None);
    }

    #[test]
    fn a_service_that_wants_to_be_left_alone_is() {
        let mut policy = FlushPolicy::new(LIMITS);
        policy.throttled(seconds(10), Some(seconds(18)));
        let full = pending(100, 9);
        assert_eq!(
            policy.decide(seconds(11), full),
            Decision::Wait(seconds(28))
        );
        assert_eq!(policy.decide(seconds(28), full), Decision::Flush);
        policy.throttled(seconds(30), None);
        assert_eq!(
            policy.decide(seconds(31), full),
            Decision::Wait(seconds(50))
        );
    }

    #[test]
    fn failures_lengthen_the_delay_to_a_minute_and_a_success_ends_that() {
        let mut policy = FlushPolicy::new(LIMITS);
        let mut now = seconds(100);
        let mut delays = Vec::new();
        for _ in 0..6 {
            policy.failed(now);
            let Decision::Wait(until) = policy.decide(now, pending(100, 9)) else {
                panic!("no delay");
            };
            delays.push((until - now).as_secs());
            now = until;
        }
        assert_eq!(delays, [5, 10, 20, 40, 60, 60]);
        policy.succeeded();
        policy.failed(now);
        assert_eq!(policy.earliest(now), now + seconds(5));
    }

    proptest! {
        /// However much is written, no more entries than the limit are created in any minute but the first,
        /// which may also use the saved allowance.
        #[test]
        fn no_minute_has_more_entries_than_the_limit(
            steps in proptest::collection::vec((0..20_000u64, 0..300u64), 1..200),
        ) {
            let mut policy = FlushPolicy::new(LIMITS);
            let mut now = Duration::ZERO;
            let mut created: Vec<Duration> = Vec::new();
            for (milliseconds, bytes) in steps {
                now += Duration::from_millis(milliseconds);
                let pending = Pending { bytes, since: Some(now.saturating_sub(seconds(50))) };
                match policy.decide(now, pending) {
                    Decision::Flush => {
                        policy.started(now);
                        created.push(now);
                    }
                    Decision::Wait(at) => prop_assert!(at > now),
                    Decision::Idle => prop_assert!(false, "something waits"),
                }
            }
            for (position, first) in created.iter().enumerate() {
                let within = created[position..].iter().filter(|time| **time < *first + seconds(60));
                prop_assert!(within.count() <= 2 * LIMITS.per_minute as usize);
            }
            let minutes = now.as_secs() / 60 + 1;
            prop_assert!(created.len() as u64 <= u64::from(LIMITS.per_minute) * (minutes + 1));
        }

        /// Pending bytes are written within an age and the longest delay once the service is back, whatever
        /// happened before.
        #[test]
        fn nothing_waits_for_ever(
            failures in 0..20u32, throttled in proptest::option::of(0..120u64), used in 0..9u32,
        ) {
            let mut policy = FlushPolicy::new(LIMITS);
            let now = seconds(1_000);
            (0..used).for_each(|_| policy.started(now));
            (0..failures).for_each(|_| policy.failed(now));
            if let Some(after) = throttled {
                policy.throttled(now, Some(seconds(after)));
            }
            let pending = Pending { bytes: 1, since: Some(now) };
            let latest = now + seconds(120 + 60);
            match policy.decide(now, pending) {
                Decision::Wait(at) => {
                    prop_assert!(at <= latest);
                    prop_assert_eq!(policy.decide(at, pending), Decision::Flush);
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
