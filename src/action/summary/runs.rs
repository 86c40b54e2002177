//! Compares the hit rates of the job's last runs: in words, as a table and in a line of text.

use std::fmt::Write as _;
use std::time::Duration;

use crate::action::summary::Report;
use crate::action::summary::charts::line_chart;
use crate::clock::Timestamp;
use crate::format::{group_digits, percent, pluralize, relative_time, time};
use crate::packs::index::RunStats;
use crate::sccache::stats::Stats;

/// The numbers of a run that ended at `ended`, for later runs to show.
/// `None` if nothing could have come from a cache.
pub fn ran(stats: &Stats, dependencies: u64, ended: Timestamp) -> Option<RunStats> {
    let lookups = stats.lookups().saturating_add(dependencies);
    (lookups > 0).then(|| RunStats {
        ended: ended.whole_seconds(),
        hits: stats.hits(),
        lookups,
        saved: stats.saved().map(|saved| saved.as_secs()),
    })
}

/// The hit rate beside that of an earlier run of the same job, if there was one.
pub(super) fn trend(report: &Report<'_>) -> Option<String> {
    let rate = report.hit_rate()?;
    let before = report.relay?.ok()?.earlier_runs.last()?;
    let rate_before = before.hit_rate()?;
    let when = how_long_before(report, &before);
    Some(format!(
        "Hit rate: {}, after {} of {} in the last run of this job that saved anything ({when})",
        percent(rate),
        percent(rate_before),
        pluralize(before.lookups, "compile"),
    ))
}

/// How long before this run another one ended.
fn how_long_before(report: &Report<'_>, ran: &RunStats) -> String {
    let since = report.now.since(ran.ended);
    match since.as_secs() {
        0..60 => "just before".to_owned(),
        _ => format!("{} before", relative_time(since)),
    }
}

/// How many runs there must be, this one among them, for more to be shown than [`trend`] says.
const RUNS_TO_LIST: usize = 3;

/// How many there must be for a line to be drawn: fewer points are read faster in a table.
const RUNS_TO_DRAW: usize = 4;

/// How many runs there are, and their savings as far as known.
fn runs_in_words(runs: &[RunStats]) -> String {
    let saved = runs.iter().filter_map(|ran| ran.saved);
    let saved = Duration::from_secs(saved.fold(0, u64::saturating_add));
    let unknown = runs.iter().filter(|ran| ran.saved.is_none()).count();
    let mut text = format!("The last {}", pluralize(runs.len() as u64, "run"));
    if saved >= Duration::from_secs(1) {
        let _ = write!(text, " saved about {} of compiler time", time(saved));
        if unknown > 0 {
            let _ = write!(text, ", not counting {unknown} without a measure");
        }
    }
    text
}

/// The hit rates of the last runs as a line, and all that is known of them in a folded table.
pub(super) fn runs_markdown(text: &mut String, report: &Report<'_>) {
    let runs = report.runs();
    if runs.len() >= RUNS_TO_DRAW {
        line_chart(text, &runs);
    }
    if runs.len() < RUNS_TO_LIST {
        return;
    }
    let _ = writeln!(
        text,
        "<details><summary>{}</summary>\n\n| Run | Hit rate | Compiles | Saved |\n|---|--:|--:|--:|",
        runs_in_words(&runs)
    );
    for (number, ran) in runs.iter().rev().enumerate() {
        let when = match number {
            0 => "this run".to_owned(),
            _ => how_long_before(report, ran),
        };
        let saved = ran.saved.map(|saved| match saved {
            0 => "under 1 s".to_owned(),
            saved => time(Duration::from_secs(saved)),
        });
        let _ = writeln!(
            text,
            "| {when} | {} | {} | {} |",
            ran.hit_rate().map(percent).unwrap_or_default(),
            group_digits(ran.lookups),
            saved.as_deref().unwrap_or("–"),
        );
    }
    text.push_str("\n</details>\n\n");
}

/// The hit rates of the last runs in a line of text.
pub(super) fn sparkline(report: &Report<'_>) -> Option<String> {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let runs = report.runs();
    if runs.len() < RUNS_TO_LIST {
        return None;
    }
    let rates = || runs.iter().filter_map(RunStats::hit_rate);
    // From 0 to 7, whatever the rate is.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let bar = |rate: f64| BARS[((rate * 8.0) as usize).min(BARS.len() - 1)];
    let line: String = rates().map(bar).collect();
    Some(format!(
        "{} (hit rates {line} from {} to {})",
        runs_in_words(&runs),
        percent(rates().fold(1.0, f64::min)),
        percent(rates().fold(0.0, f64::max)),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::summary::fixtures::{NOW, activity, one_run, report, runs, stats};
    use crate::action::summary::{log_text, markdown};
    use crate::packs::index::Runs;
    use crate::relay::activity::Activity;

    #[test]
    fn an_earlier_run_is_shown_beside_this_one_and_nothing_where_there_was_none() {
        let stats = stats(3, 1, 0, 0);
        let with = |earlier_runs| Activity {
            earlier_runs,
            ..activity()
        };
        let shown = |activity: &Activity| {
            let report = Report {
                relay: Some(Ok(activity)),
                ..report(Ok(&stats), "")
            };
            (markdown(&report), log_text(&report))
        };
        let (markdown, log) = shown(&with(one_run(9, 10, 3 * 3600)));
        let expected = "Hit rate: 75.0 %, after 90.0 % of 10 compiles in the last run of this job \
                        that saved anything (3 h before).\n";
        assert!(markdown.contains(expected), "{markdown}");
        assert!(log.contains(expected), "{log}");
        for earlier in [Runs::default(), one_run(0, 0, 60)] {
            let (markdown, log) = shown(&with(earlier));
            assert!(!markdown.contains("last run") && !log.contains("last run"));
        }
    }

    fn shown_after(runs: Runs) -> (String, String) {
        let stats = stats(3, 1, 0, 0);
        let activity = Activity {
            earlier_runs: runs,
            ..activity()
        };
        let report = Report {
            relay: Some(Ok(&activity)),
            ..report(Ok(&stats), "")
        };
        (markdown(&report), log_text(&report))
    }

    #[test]
    fn three_runs_are_listed_four_are_drawn_and_at_most_twenty_are_shown() {
        for (earlier, listed, drawn) in [
            (0, None, None),
            (1, None, None),
            (2, Some(3), None),
            (3, Some(4), Some("47.5, 65.0, 82.5, 75.0")),
            (19, Some(20), None),
            (20, Some(20), None),
            (500, Some(20), None),
        ] {
            let (markdown, log) = shown_after(runs(earlier));
            let rows = markdown.split_once("| Run | Hit rate |");
            let rows = rows.map(|(_, rows)| rows.split_once("</details>").unwrap().0);
            let rows = rows.map(|rows| rows.lines().filter(|line| line.contains(" % |")).count());
            assert_eq!(rows, listed, "{markdown}");
            let line = markdown.split_once("    line [");
            let line = line.map(|(_, line)| line.split_once(']').unwrap().0);
            assert_eq!(
                line.is_some(),
                listed.is_some_and(|listed| listed > 3),
                "{markdown}"
            );
            if let Some(line) = line {
                assert!(drawn.is_none_or(|drawn| drawn == line), "{line}");
                let points: Vec<&str> = line.split(", ").collect();
                assert_eq!(Some(points.len()), listed);
                assert_eq!(points.last(), Some(&"75.0"));
            }
            assert_eq!(log.contains("hit rates "), listed.is_some(), "{log}");
            assert_eq!(markdown.contains("the last run of this job"), earlier > 0);
        }
    }

    #[test]
    fn the_log_has_the_hit_rates_as_bars_and_what_the_runs_saved_together() {
        let run = |ago: u64, hits, saved| RunStats {
            ended: NOW - Duration::from_secs(ago),
            hits,
            lookups: 40,
            saved,
        };
        let all = [
            run(7_200, 0, Some(0)),
            run(3_600, 20, Some(75)),
            run(60, 40, Some(50)),
        ];
        let stats = stats(3, 1, 0, 0);
        let mut activity = Activity {
            earlier_runs: all.into_iter().collect(),
            ..activity()
        };
        let text = |activity: &Activity| {
            log_text(&Report {
                relay: Some(Ok(activity)),
                ..report(Ok(&stats), "")
            })
        };
        // The saving of this run is unknown: nothing was timed.
        let expected = "The last 4 runs saved about 2 min 5 s of compiler time, not counting 1 without a \
                        measure (hit rates ▁▅█▇ from 0 % to 100 %).\n";
        assert!(text(&activity).contains(expected), "{}", text(&activity));
        let unknown = all.into_iter().map(|ran| RunStats { saved: None, ..ran });
        activity.earlier_runs = unknown.collect();
        let expected = "The last 4 runs (hit rates ▁▅█▇ from 0 % to 100 %).\n";
        assert!(text(&activity).contains(expected), "{}", text(&activity));
    }

    #[test]
    fn what_an_index_says_of_earlier_runs_is_shown_whatever_it_says() {
        let wild = |ended| RunStats {
            ended: Timestamp::from_seconds(ended),
            hits: u64::MAX,
            lookups: 1,
            saved: Some(u64::MAX),
        };
        let (markdown, log) = shown_after([0, 1, u64::MAX].map(wild).into_iter().collect());
        assert!(
            markdown.contains("line [100.0, 100.0, 100.0, 75.0]"),
            "{markdown}"
        );
        assert!(log.contains("███▇ from 75.0 % to 100 %"), "{log}");
    }
}
