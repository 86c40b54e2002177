//! Formats counts, sizes, rates and times for people.

use std::time::Duration;

/// A count with its noun.
pub fn pluralize(count: u64, noun: &str) -> String {
    let count_in_words = group_digits(count);
    match noun.strip_suffix('y') {
        _ if count == 1 => format!("{count_in_words} {noun}"),
        Some(stem) => format!("{count_in_words} {stem}ies"),
        None if noun.ends_with('s') => format!("{count_in_words} {noun}es"),
        None => format!("{count_in_words} {noun}s"),
    }
}

/// A number with its thousands apart.
pub fn group_digits(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of bytes in the unit that suits it.
pub fn size(bytes: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)];
    let unit = UNITS.into_iter().find(|(_, unit)| bytes >= *unit);
    unit.map_or_else(
        || pluralize(bytes, "byte"),
        |(name, unit)| format!("{}.{} {name}", bytes / unit, bytes % unit * 10 / unit),
    )
}

/// A rate from 0 to 1 in percent. It shows 100 % and 0 % only if they are exact.
pub fn percent(rate: f64) -> String {
    let percent = rate * 100.0;
    let shown = if rate >= 1.0 || rate <= 0.0 {
        format!("{percent:.0}")
    } else {
        format!("{:.1}", percent.clamp(0.1, 99.9))
    };
    format!("{shown} %")
}

/// A time in the unit that suits it.
pub fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 0.000_5 {
        format!("{} µs", time.as_micros())
    } else if seconds < 0.01 {
        format!("{:.1} ms", seconds * 1e3)
    } else if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1e3)
    } else if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else if seconds < 3600.0 {
        format!("{} min {} s", time.as_secs() / 60, time.as_secs() % 60)
    } else {
        format!(
            "{} h {} min",
            time.as_secs() / 3600,
            time.as_secs() % 3600 / 60
        )
    }
}

/// The age of something, in the largest unit that fits; a table needs no more precision.
pub fn relative_time(age: Duration) -> String {
    const UNITS: [(&str, u64); 3] = [("d", 86_400), ("h", 3_600), ("min", 60)];
    let seconds = age.as_secs();
    let unit = UNITS.into_iter().find(|(_, unit)| seconds >= *unit);
    unit.map_or_else(
        || "now".to_owned(),
        |(name, unit)| format!("{} {name}", seconds / unit),
    )
}

/// The messages of `error` and of each of its causes, in one line. Many errors repeat their cause in their
/// own message; it is then not told again.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !says(&text, &message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text
}

/// Whether `message` stands in `text`, and not as a part of other words.
fn says(text: &str, message: &str) -> bool {
    text.match_indices(message).any(|(begin, _)| {
        let before = text[..begin].chars().next_back();
        let after = text[begin + message.len()..].chars().next();
        !before.into_iter().chain(after).any(char::is_alphanumeric)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_in_the_unit_that_suits_them() {
        let shown = [20, 1_500, 40_000, 1_500_000, 61_000_000, 3_660_000_000]
            .map(|microseconds| time(Duration::from_micros(microseconds)));
        assert_eq!(
            shown,
            [
                "20 µs",
                "1.5 ms",
                "40 ms",
                "1.5 s",
                "1 min 1 s",
                "1 h 1 min"
            ]
        );
    }

    #[test]
    fn a_noun_is_in_the_plural_where_there_is_not_one() {
        let shown = [(1, "entry"), (2, "entry"), (0, "miss"), (1_000, "hit")]
            .map(|(count, noun)| pluralize(count, noun));
        assert_eq!(shown, ["1 entry", "2 entries", "0 misses", "1,000 hits"]);
    }

    #[test]
    fn causes_are_told_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("{message}")]
        struct Failure {
            message: &'static str,
            source: Option<Box<Self>>,
        }
        let chain = [
            "cannot ask: code 70",
            "code 70",
            "cannot ask: code 70",
            "code 7",
        ];
        let failure = chain.into_iter().rev().fold(None, |source, message| {
            Some(Box::new(Failure { message, source }))
        });
        assert_eq!(
            with_causes(&*failure.unwrap()),
            "cannot ask: code 70: code 7"
        );
    }

    #[test]
    fn an_age_is_told_in_whole_days_hours_or_minutes() {
        let shown =
            [59, 60, 7_199, 86_399, 86_400 * 9 + 5].map(|s| relative_time(Duration::from_secs(s)));
        assert_eq!(shown, ["now", "1 min", "1 h", "23 h", "9 d"]);
    }
}
