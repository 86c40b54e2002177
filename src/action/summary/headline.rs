//! Says in a sentence each: the result of the job, the reason if nothing came from the cache, and which
//! compiles ran without sccache as intended.

use std::fmt::Write as _;
use std::time::Duration;

use crate::action::mode::Mode;
use crate::action::summary::Report;
use crate::format::{group_digits, percent, pluralize, time};

/// The one line that says it all.
pub fn headline(report: &Report<'_>) -> String {
    let stats = match report.stats {
        Ok(stats) => stats,
        Err(why) => return format!("There are no statistics: {why}"),
    };
    let Some(rate) = report.hit_rate() else {
        return match stats.requests() {
            0 => "No compiler was called through sccache".to_owned(),
            1 => "1 compiler call through sccache, which could not be cached".to_owned(),
            calls => format!(
                "{} through sccache, none of which could be cached",
                pluralize(calls, "compiler call")
            ),
        };
    };
    let others = match report.dependencies {
        0 => String::new(),
        1 => "; 1 was of a dependency that the cargo cache did not have".to_owned(),
        others => format!(
            "; {} were of dependencies that the cargo cache did not have",
            group_digits(others)
        ),
    };
    let mut text = format!(
        "{} of {} came from the cache ({}, {}, {}{others})",
        percent(rate),
        pluralize(report.compiles(), "compile"),
        pluralize(stats.hits(), "hit"),
        pluralize(stats.misses(), "miss"),
        pluralize(stats.errors(), "error"),
    );
    if let Some(saved) = stats
        .saved()
        .filter(|saved| *saved >= Duration::from_secs(1))
    {
        let _ = write!(text, ", saving about {} of compiler time", time(saved));
    }
    text
}

/// The reason why nothing came from the cache, if nothing did.
pub(super) fn why_nothing_was_hit(report: &Report<'_>) -> Option<&'static str> {
    let stats = report.stats.ok()?;
    if stats.requests() == 0 {
        return Some(
            "Is the compiler called through sccache? For Rust that is `RUSTC_WRAPPER`, for CMake \
             the compiler launchers; a build whose output was restored from elsewhere has nothing \
             to compile.",
        );
    }
    // If sccache failed, that is the reason.
    if stats.hits() > 0 || stats.lookups() == 0 || report.uncached > 0 {
        return None;
    }
    Some(match report.mode {
        Mode::Local => {
            "Objects are on this machine's disk only. A runner that starts empty for each job finds \
             none there."
        }
        Mode::Packed | Mode::Direct | Mode::External => {
            "This is normal for the first job with this cache, and after a change of sccache, the \
             compiler or its flags."
        }
    })
}

/// The compiles that ran without sccache, as intended.
pub(super) fn compiles_of_other_users(report: &Report<'_>) -> Option<String> {
    (report.of_other_users > 0).then(|| {
        format!(
            "{} ran without sccache, since the step runs as another user than the action.",
            pluralize(report.of_other_users, "compile")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::summary::fixtures::{report, stats};
    use crate::action::summary::markdown;

    #[test]
    fn the_verdict_fits_what_happened() {
        for (stats, expected) in [
            (stats(0, 0, 0, 0), "No compiler was called through sccache"),
            (
                stats(0, 0, 0, 3),
                "3 compiler calls through sccache, none of which could be cached",
            ),
            (
                stats(0, 0, 0, 1),
                "1 compiler call through sccache, which could not be cached",
            ),
            (
                stats(0, 4, 0, 0),
                "0 % of 4 compiles came from the cache (0 hits, 4 misses, 0 errors)",
            ),
            (
                stats(2000, 1, 0, 0),
                "99.9 % of 2,001 compiles came from the cache (2,000 hits, 1 miss, 0 errors)",
            ),
        ] {
            assert_eq!(headline(&report(Ok(&stats), "")), expected);
        }
    }

    #[test]
    fn an_empty_local_cache_is_explained() {
        let stats = stats(0, 4, 0, 0);
        let local = Report {
            mode: Mode::Local,
            ..report(Ok(&stats), "")
        };
        assert!(markdown(&local).contains("this machine's disk only"));
        assert!(markdown(&report(Ok(&stats), "")).contains("first job with this cache"));
    }
}
