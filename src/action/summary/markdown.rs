//! Writes the job summary in Markdown.

use std::borrow::Cow;
use std::fmt::Write as _;

use crate::action::summary::Report;
use crate::action::summary::escape::escape;
use crate::action::summary::headline::{compiles_of_other_users, headline, why_nothing_was_hit};
use crate::action::summary::problems::{is_of_no_use, problems, refusals_in_words};
use crate::action::summary::relay_activity::relay_rows;
use crate::action::summary::runs::{runs_markdown, trend};
use crate::action::summary::statistics::{stats_markdown, times_markdown};
use crate::format::pluralize;

/// The runner's limit for a step's summary (1 MiB), less some room for other summaries of the step.
const SUMMARY_LIMIT: usize = 256 * 1024;

/// The job summary.
pub fn markdown(report: &Report<'_>) -> String {
    let mut text = format!("### sccache\n\n**{}.**\n\n", escape(&headline(report)));
    if let Some(trend) = trend(report) {
        let _ = writeln!(text, "{trend}.\n");
    }
    if let Some(hint) = why_nothing_was_hit(report) {
        let _ = writeln!(text, "{hint}\n");
    }
    if let Some(others) = compiles_of_other_users(report) {
        let _ = writeln!(text, "{others}\n");
    }
    for problem in problems(report) {
        let _ = writeln!(text, "> [!WARNING]\n> {}\n", escape(&problem));
    }
    if let Ok(stats) = report.stats {
        stats_markdown(&mut text, stats, report.dependencies);
    }
    runs_markdown(&mut text, report);
    if let Some(refused) = refusals_in_words(report).filter(|_| !is_of_no_use(report)) {
        let _ = writeln!(text, "{}\n", escape(&refused));
    }
    if let Some(times) = report.times {
        times_markdown(&mut text, times);
    }
    if let Some(Ok(activity)) = report.relay {
        text.push_str("| GitHub's cache, in packs | |\n|---|--:|\n");
        for (what, how_much) in relay_rows(activity, report.stats.ok()) {
            let _ = writeln!(text, "| {what} | {how_much} |");
        }
        text.push('\n');
    }
    let _ = writeln!(
        text,
        "<sub>sccache {} · mode {}{} · {}</sub>",
        escape(report.version),
        report.mode,
        if report.read_only { ", read only" } else { "" },
        escape(report.cache_location)
    );
    for (title, raw) in [
        ("The server's log", report.server_log),
        ("Raw statistics", report.raw_stats),
    ] {
        details(&mut text, title, raw);
    }
    text
}

/// The job summary of a job whose set-up failed for this reason.
pub fn without_sccache(reason: &str) -> String {
    format!(
        "### sccache\n\n**sccache was not used, and everything was compiled.**\n\n\
         > [!WARNING]\n> {}\n",
        escape(reason)
    )
}

/// A folded block with foreign text in it, unchanged except for its length.
fn details(text: &mut String, title: &str, raw: &str) {
    let raw = raw.trim();
    let room = (SUMMARY_LIMIT / 2)
        .min(SUMMARY_LIMIT.saturating_sub(text.len()))
        .saturating_sub(1024);
    if raw.is_empty() || room == 0 {
        return;
    }
    let (shown, rest) = raw.split_at(floor_char_boundary(raw, room));
    // A fence is closed by one at least as long. sccache never writes a run of backticks that is
    // longer than this limit.
    let longest = longest_run_of_backticks(shown);
    let (shown, longest) = match longest {
        0..=64 => (Cow::Borrowed(shown), longest),
        _ => (Cow::Owned(shown.replace('`', "'")), 0),
    };
    let fence = "`".repeat(longest.max(2) + 1);
    let _ = writeln!(
        text,
        "\n<details><summary>{title}</summary>\n\n{fence}text\n{shown}\n{fence}"
    );
    if !rest.is_empty() {
        let _ = writeln!(
            text,
            "\nCut off: {}.",
            pluralize(rest.len() as u64, "more byte")
        );
    }
    text.push_str("\n</details>\n");
}

fn floor_char_boundary(text: &str, limit: usize) -> usize {
    let mut end = limit.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    end
}

fn longest_run_of_backticks(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::action::mode::Mode;
    use crate::action::summary::fixtures::{NOW, activity, assert_is_fixture, fixture, report};
    use crate::action::summary::{annotation, has_problems, log_text};
    use crate::cache_client::RequestCounts;
    use crate::packs::index::RunStats;
    use crate::relay::activity::Activity;
    use crate::sccache::stats::Stats;

    #[test]
    fn summaries_are_as_in_their_fixtures() {
        for version in ["0.4.0-pre.6", "0.16.0"] {
            let raw = fixture(&format!("{version}.json"));
            let stats = Stats::parse(&raw).unwrap();
            let report = Report {
                version,
                mode: Mode::Local,
                cache_location: "Local disk: \"/home/runner/.cache/sccache\"",
                ..report(Ok(&stats), &raw)
            };
            assert_is_fixture(&format!("{version}.md"), &markdown(&report));
            assert_is_fixture(&format!("{version}.txt"), &log_text(&report));
        }
    }

    #[test]
    fn the_example_of_the_documents_is_as_in_its_fixture() {
        let raw = serde_json::json!({ "stats": {
            "compile_requests": 1_471, "requests_executed": 1_398,
            "requests_not_cacheable": 73,
            "cache_hits": { "counts": { "Rust": 231, "C/C++": 1_130 } },
            "cache_misses": { "counts": { "Rust": 14, "C/C++": 23 } },
            "cache_writes": 37, "compilations": 37,
            "cache_write_duration": { "secs": 0, "nanos": 31_000_000 },
            "cache_read_hit_duration": { "secs": 1, "nanos": 905_000_000 },
            "compiler_write_duration": { "secs": 41, "nanos": 810_000_000 },
            "not_cached": { "crate-type": 52, "missing input": 21 },
        }});
        let raw = format!("{raw:#}");
        let stats = Stats::parse(&raw).unwrap();
        let runs = (1..=11_u64).map(|i| RunStats {
            ended: NOW - Duration::from_secs(i * 11 * 3_600),
            hits: [
                1_355, 1_391, 1_298, 1_398, 1_344, 702, 1_398, 1_372, 1_340, 1_210, 0,
            ][usize::try_from(i - 1).unwrap()],
            lookups: 1_398,
            // A run of hits only has no compile to measure by.
            saved: (i != 4 && i != 7).then_some(if i == 11 { 0 } else { 1_400 - i * 31 }),
        });
        let activity = Activity {
            earlier_runs: runs.collect(),
            upstream: RequestCounts {
                throttled: 0,
                bytes_up: 1_934_250,
                ..activity().upstream
            },
            ..activity()
        };
        let report = Report {
            mode: Mode::Packed,
            cache_location: "GitHub's cache, in packs",
            relay: Some(Ok(&activity)),
            ..report(Ok(&stats), &raw)
        };
        assert_is_fixture("example.md", &markdown(&report));
    }

    #[test]
    fn a_server_that_was_gone_is_said_with_what_it_cost() {
        let report = Report {
            uncached: 12,
            uncached_reason: Some("error: Server startup failed"),
            of_other_users: 0,
            dependencies: 0,
            server_log: "[ERROR] out of memory",
            ..report(Err("sccache's server was gone"), "")
        };
        assert!(has_problems(&report));
        assert_is_fixture("server-gone.md", &markdown(&report));
        assert_is_fixture("server-gone.txt", &annotation(&report));
    }

    proptest! {
        #[test]
        fn foreign_text_neither_ends_a_block_nor_outgrows_the_summary(
            foreign in r"(</?details>|`{1,5}|[|<>&\n@#]|\PC){0,40}",
            repeat in 1usize..20_000,
        ) {
            let long = foreign.repeat(repeat.min(2_000_000 / (foreign.len() + 1)));
            let stats = Stats::parse(&serde_json::json!({ "stats": {
                "compile_requests": 2, "requests_executed": 1,
                "cache_hits": { "counts": { foreign.clone(): 1 } },
                "requests_not_cacheable": 1, "not_cached": { foreign.clone(): 1 },
            }}).to_string()).unwrap();
            let report = Report {
                cache_location: &foreign,
                uncached: 1,
                uncached_reason: Some(&foreign),
                of_other_users: 0,
            dependencies: 0,
                server_log: &long,
                ..report(Ok(&stats), &long)
            };
            let text = markdown(&report);
            prop_assert!(text.len() <= SUMMARY_LIMIT);
            let outside: String = outside_of_fences(&text);
            let opened = outside.matches("<details>").count();
            prop_assert_eq!(opened, outside.matches("</details>").count());
            prop_assert!(opened <= 3);
        }
    }

    /// The text without what stands between fences.
    fn outside_of_fences(text: &str) -> String {
        let mut fence: Option<&str> = None;
        let mut outside = String::new();
        for line in text.split('\n') {
            let run = &line[..line.len() - line.trim_start_matches('`').len()];
            match fence {
                None if run.len() >= 3 => fence = Some(run),
                Some(open) if run.len() >= open.len() && line == run => fence = None,
                None => {
                    outside.push_str(line);
                    outside.push('\n');
                }
                Some(_) => {}
            }
        }
        outside
    }
}
