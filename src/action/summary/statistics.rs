//! Describes sccache's statistics and the slowest compiles, in Markdown and in words.

use std::fmt::Write as _;

use crate::action::summary::SHOWN;
use crate::action::summary::charts::chart;
use crate::action::summary::escape::{code, escape};
use crate::format::{group_digits, percent, pluralize, time};
use crate::sccache::stats::{LanguageRow, Stats};
use crate::sccache::times::CompileTimes;

pub(super) fn stats_markdown(text: &mut String, stats: &Stats, dependencies: u64) {
    let rows = stats.languages();
    if !rows.is_empty() {
        text.push_str("| Language | Hits | Misses | Failed | Hit rate |\n|---|--:|--:|--:|--:|\n");
        for row in rows.iter().take(SHOWN) {
            let _ = writeln!(text, "| {} |", language_cells(row, escape).join(" | "));
        }
        text.push('\n');
    }
    chart(text, stats, dependencies);
    let times = times_in_words(stats);
    if !times.is_empty() {
        let _ = writeln!(text, "Average: {}.\n", times.join(", "));
    }
    let others = others_in_words(stats);
    if !others.is_empty() {
        let _ = writeln!(text, "Also: {}.\n", others.join(", "));
    }
    let reasons = stats.reasons();
    if !reasons.is_empty() {
        let _ = writeln!(
            text,
            "<details><summary>{} could not be cached</summary>\n\n| Calls | Reason | What it means |\n|--:|---|---|",
            pluralize(stats.not_cacheable(), "call")
        );
        for reason in reasons.iter().take(SHOWN) {
            let _ = writeln!(
                text,
                "| {} | {} | {} |",
                group_digits(reason.count),
                code(reason.reason),
                reason.explanation.unwrap_or_default()
            );
        }
        if reasons.len() > SHOWN {
            let _ = writeln!(text, "| | and {} more | |", reasons.len() - SHOWN);
        }
        text.push_str("\n</details>\n\n");
    }
}

pub(super) fn language_cells(row: &LanguageRow<'_>, name: impl Fn(&str) -> String) -> [String; 5] {
    [
        name(row.language),
        group_digits(row.hits),
        group_digits(row.misses),
        group_digits(row.failed),
        row.hit_rate().map_or_else(|| "–".to_owned(), percent),
    ]
}

pub(super) fn times_in_words(stats: &Stats) -> Vec<String> {
    let times = stats.mean_times();
    [
        ("hit", times.read),
        ("compile", times.compile),
        ("write", times.write),
    ]
    .into_iter()
    .filter_map(|(what, mean)| Some(format!("{} per {what}", time(mean?))))
    .collect()
}

pub(super) fn others_in_words(stats: &Stats) -> Vec<String> {
    [
        (stats.writes(), "object", " written to the cache"),
        (stats.compile_failures(), "compile", " that failed"),
        (stats.forced_recaches(), "object", " rewritten on request"),
        (stats.not_compiles(), "call", " that compiled nothing"),
        (
            stats.unsupported_compiler(),
            "call",
            " of a compiler that sccache does not know",
        ),
    ]
    .into_iter()
    .filter(|(count, ..)| *count > 0)
    .map(|(count, noun, rest)| format!("{}{rest}", pluralize(count, noun)))
    .collect()
}

/// The slowest compiles. sccache does not tell which of them were hits.
pub(super) fn slowest_in_words(times: &CompileTimes) -> Option<String> {
    (times.compiles > 0).then(|| {
        format!(
            "{} through sccache took {} together, hits and misses",
            pluralize(times.compiles, "compile"),
            time(times.total)
        )
    })
}

pub(super) fn times_markdown(text: &mut String, times: &CompileTimes) {
    let Some(title) = slowest_in_words(times) else {
        return;
    };
    let _ = writeln!(
        text,
        "<details><summary>{title}; the slowest</summary>\n\n| Time | Crate or source file |\n|--:|---|"
    );
    for (each, subject) in &times.slowest {
        let _ = writeln!(text, "| {} | {} |", time(*each), code(subject));
    }
    text.push_str("\n</details>\n\n");
}
