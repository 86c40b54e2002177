//! Lists the problems of a job, each in a sentence, and writes the annotation from them.

use std::fmt::Write as _;

use crate::action::summary::{Report, headline};
use crate::format::{percent, pluralize};
use crate::relay::activity::Activity;
use crate::sccache::stats::{ErrorKind, Stats};

/// How many compiles a job must have looked up for its hit rate to be judged: in fewer, one more or
/// less is a difference of ten percent and more.
const COMPILES_TO_JUDGE: u64 = 10;

/// The sentence on a hit rate that is lower than the user wants; `None` if it is not, or cannot be
/// judged.
///
/// A first run cannot, as nothing is in the cache for it. In mode `packed` a first run is known by
/// packs without an earlier run of the same job. In other modes this is unknown, and a run without
/// any hit might be a first run.
pub fn hit_rate_failure(report: &Report<'_>) -> Option<String> {
    let wanted = report.min_hit_rate?;
    let stats = report.stats.ok()?;
    let rate = report.hit_rate()?;
    let is_first = match report.relay {
        Some(Ok(activity)) => activity.earlier_runs.last().is_none(),
        Some(Err(_)) | None => stats.hits() == 0,
    };
    if is_first || report.compiles() < COMPILES_TO_JUDGE || rate * 100.0 >= wanted {
        return None;
    }
    Some(format!(
        "Only {} of {} came from the cache; `min-hit-rate` asks for {wanted} %.",
        percent(rate),
        pluralize(report.compiles(), "compile"),
    ))
}

/// The text of the annotation.
pub fn annotation(report: &Report<'_>) -> String {
    let mut text = format!("sccache {}: {}.", report.version, headline(report));
    for problem in problems(report) {
        let _ = write!(text, " {problem}");
    }
    text
}

/// Whether there is something in the report that the user should fix.
pub fn has_problems(report: &Report<'_>) -> bool {
    !problems(report).is_empty()
}

/// The problems, each in a sentence.
pub(super) fn problems(report: &Report<'_>) -> Vec<String> {
    let mut problems: Vec<String> = hit_rate_failure(report).into_iter().collect();
    if report.uncached > 0 {
        let why = report.uncached_reason.unwrap_or("its server was gone");
        let mut problem = format!(
            "{} ran without sccache because it failed ({why}).",
            pluralize(report.uncached as u64, "compile")
        );
        if let Some(why) = report.gave_up {
            let _ = write!(problem, " It was not asked again after that ({why}).");
        }
        problems.push(problem);
    }
    if is_of_no_use(report) {
        problems.extend(refusals_in_words(report));
    }
    problems.extend(report.keeper.and_then(server_deaths));
    problems.extend(relay_problems(report));
    let Ok(stats) = report.stats else {
        return problems;
    };
    let errors: Vec<String> = stats
        .error_counts()
        .iter()
        // sccache counts each write that it was told not to make as failed.
        .filter(|error| !(report.read_only && error.kind == ErrorKind::Write))
        .map(|error| error.kind.counted(error.count))
        .collect();
    if !errors.is_empty() {
        problems.push(format!("{}.", errors.join(", ")));
    }
    problems
}

/// How often sccache's server crashed, and the consequences.
fn server_deaths(activity: &Activity) -> Option<String> {
    let how = activity.first_server_death.as_ref()?;
    let again = match &activity.server_not_restarted {
        None if activity.server_deaths == 1 => {
            "was started again; what it had counted by then is lost".to_owned()
        }
        None => "was started again each time; what it had counted by then is lost".to_owned(),
        Some(why) => format!("could not be started again ({why})"),
    };
    let times = pluralize(activity.server_deaths, "time");
    Some(format!(
        "sccache's server died {times} in the job ({how}), and {again}."
    ))
}

fn relay_problems(report: &Report<'_>) -> Vec<String> {
    let activity = match report.relay {
        None => return Vec::new(),
        Some(Err(why)) => {
            return vec![format!(
                "The relay between sccache and GitHub's cache was gone at the end of the job \
                 ({why}); the next job compiles again what was not saved."
            )];
        }
        Some(Ok(activity)) => activity,
    };
    let mut problems: Vec<String> = server_deaths(activity).into_iter().collect();
    if activity.corrupt > 0 {
        let was = if activity.corrupt == 1 { "was" } else { "were" };
        problems.push(format!(
            "{} in the cache {was} damaged and compiled again.",
            pluralize(activity.corrupt, "object")
        ));
    }
    if let Some(first) = &activity.first_error {
        let more = match activity.errors {
            0 | 1 => String::new(),
            problems => format!(" (the first of {})", pluralize(problems, "error")),
        };
        let lost = match activity.unsaved {
            0 => String::new(),
            unsaved => format!(
                " The next job compiles {} again.",
                pluralize(unsaved, "object")
            ),
        };
        problems.push(format!("GitHub's cache: {first}{more}.{lost}"));
    }
    problems
}

/// Whether sccache's server failed at more compiles than it did: then something is wrong with it
/// and not with single calls.
pub(super) fn is_of_no_use(report: &Report<'_>) -> bool {
    let lookups = report.stats.map_or(0, Stats::lookups);
    report.refusals.0 > lookups
}

/// The compiles that failed in sccache's server and succeeded without it.
pub(super) fn refusals_in_words(report: &Report<'_>) -> Option<String> {
    let (count, why) = report.refusals;
    (count > 0).then(|| {
        format!(
            "sccache failed {}, so the compiler ran instead ({}).",
            pluralize(count, "compile"),
            why.unwrap_or("for no known reason")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::summary::fixtures::{activity, one_run, report, stats};
    use crate::action::summary::{log_text, markdown};

    #[test]
    fn what_went_wrong_between_the_relay_and_githubs_cache_is_one_warning() {
        let stats = stats(4, 2, 0, 0);
        let problem = Activity {
            errors: 3,
            first_error: Some("the index could not be read: no route to host".to_owned()),
            unsaved: 2,
            corrupt: 1,
            ..activity()
        };
        let with = |relay| Report {
            relay: Some(relay),
            ..report(Ok(&stats), "")
        };
        let text = annotation(&with(Ok(&problem)));
        for said in [
            "no route to host",
            "the first of 3 errors",
            "2 objects",
            "1 object in the cache was damaged",
        ] {
            assert!(text.contains(said), "{text}");
        }
        let gone = with(Err("connection refused"));
        assert!(annotation(&gone).contains("was gone"));
        // An error that passed and was made up for is no problem.
        let passed = Activity {
            first_retried_error: Some("429".to_owned()),
            read_only: true,
            ..activity()
        };
        assert!(!has_problems(&with(Ok(&passed))));
    }

    #[test]
    fn a_hit_rate_is_judged_where_it_can_be_and_reaches_what_was_asked_for_exactly() {
        let wanted = |percent| Report {
            min_hit_rate: percent,
            ..report(Err(""), "")
        };
        let first = activity();
        let later = Activity {
            earlier_runs: one_run(0, 20, 60),
            ..activity()
        };
        for (hits, misses, percent, relay, falls_short) in [
            (7, 13, None, Some(&later), false),
            (7, 13, Some(35.0), Some(&later), false),
            (7, 13, Some(35.1), Some(&later), true),
            (0, 20, Some(1.0), Some(&later), true),
            (0, 20, Some(0.0), Some(&later), false),
            // A first run, and too few.
            (0, 20, Some(90.0), Some(&first), false),
            (19, 1, Some(99.0), Some(&first), false),
            (0, 9, Some(90.0), Some(&later), false),
            (0, 10, Some(90.0), Some(&later), true),
            // Without packs, a run that may be the first is not judged.
            (0, 20, Some(90.0), None, false),
            (1, 19, Some(90.0), None, true),
        ] {
            let stats = stats(hits, misses, 0, 0);
            let report = Report {
                stats: Ok(&stats),
                relay: relay.map(Ok),
                ..wanted(percent)
            };
            let text = hit_rate_failure(&report);
            assert_eq!(text.is_some(), falls_short, "{hits} {misses} {percent:?}");
            assert_eq!(has_problems(&report), falls_short);
        }
        let stats = stats(1_000, 3_000, 0, 0);
        let report = Report {
            stats: Ok(&stats),
            ..wanted(Some(99.5))
        };
        let expected =
            "Only 25.0 % of 4,000 compiles came from the cache; `min-hit-rate` asks for 99.5 %.";
        assert_eq!(hit_rate_failure(&report).as_deref(), Some(expected));
        let gone = Report {
            relay: Some(Err("gone")),
            ..report.clone()
        };
        assert!(annotation(&gone).contains(expected));
    }

    #[test]
    fn errors_are_named_in_the_annotation_in_the_singular_and_the_plural() {
        for (errors, expected) in [
            (1, " 1 cache write failed."),
            (1500, " 1,500 cache writes failed."),
        ] {
            let stats = stats(4, 4, errors, 0);
            let report = report(Ok(&stats), "");
            assert!(has_problems(&report));
            let text = annotation(&report);
            assert!(text.ends_with(expected), "{text}");
        }
        assert!(!has_problems(&self::report(
            Ok(&self::stats(1, 1, 0, 9)),
            ""
        )));
    }

    #[test]
    fn one_of_something_is_said_in_the_singular() {
        let stats = stats(4, 4, 0, 0);
        let report = report(Ok(&stats), "");
        for (count, expected) in [
            (
                1,
                "sccache failed 1 compile, so the compiler ran instead (it was damp).",
            ),
            (
                2,
                "sccache failed 2 compiles, so the compiler ran instead (it was damp).",
            ),
        ] {
            let text = log_text(&Report {
                refusals: (count, Some("it was damp")),
                ..report.clone()
            });
            assert!(text.contains(expected), "{text}");
        }
        for (count, expected) in [
            (1, "1 object in the cache was damaged and compiled again."),
            (2, "2 objects in the cache were damaged and compiled again."),
        ] {
            let activity = Activity {
                corrupt: count,
                ..activity()
            };
            let text = annotation(&Report {
                relay: Some(Ok(&activity)),
                ..report.clone()
            });
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn writes_that_were_not_to_be_made_are_no_trouble() {
        let stats = stats(0, 4, 4, 0);
        let report = Report {
            read_only: true,
            ..report(Ok(&stats), "")
        };
        assert!(!has_problems(&report));
        assert!(markdown(&report).contains("read only"));
    }
}
