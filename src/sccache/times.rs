//! The times of compiles through sccache, as the wrapper noted them. Nobody knows which of them were hits.

use std::collections::BTreeMap;
use std::time::Duration;

/// How many of the slowest are kept.
const SLOWEST: usize = 10;

/// How long compiles took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompileTimes {
    /// How many were timed.
    pub compiles: u64,
    /// Their total time.
    pub total: Duration,
    /// The slowest, the slowest first: the time, and the crate or source file.
    pub slowest: Vec<(Duration, String)>,
}

impl CompileTimes {
    /// Reads notes of the form microseconds, tab, name. Ignores other lines.
    pub fn read(notes: &str) -> Self {
        let mut times = Self::default();
        let mut by_time: BTreeMap<(u64, usize), &str> = BTreeMap::new();
        for (number, line) in notes.lines().enumerate() {
            let Some((time, subject)) = line.split_once('\t') else {
                continue;
            };
            let Ok(time) = time.parse::<u64>() else {
                continue;
            };
            times.compiles += 1;
            times.total = times.total.saturating_add(Duration::from_micros(time));
            by_time.insert((time, number), subject);
            if by_time.len() > SLOWEST {
                by_time.pop_first();
            }
        }
        let slowest = by_time.into_iter().rev();
        times.slowest = slowest
            .map(|((time, _), subject)| (Duration::from_micros(time), subject.to_owned()))
            .collect();
        times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_come_first_and_what_is_no_note_is_left_out() {
        let mut notes: String = (1..=20)
            .map(|n| format!("{}\tf{n}.c\n", n * 1_000))
            .collect();
        notes.push_str("no note\nx\ty\n-1\tz\n20000\ta b.c");
        let times = CompileTimes::read(&notes);
        assert_eq!(times.compiles, 21);
        assert_eq!(times.total, Duration::from_millis(210 + 20));
        assert_eq!(times.slowest.len(), SLOWEST);
        assert_eq!(
            times.slowest[0],
            (Duration::from_millis(20), "a b.c".to_owned())
        );
        assert_eq!(times.slowest[1].1, "f20.c");
        assert_eq!(times.slowest[9].1, "f12.c");
        assert_eq!(CompileTimes::read(""), CompileTimes::default());
    }
}
