//! Writes the report as plain text, for the log.

use std::fmt::Write as _;

use crate::action::summary::headline::{compiles_of_other_users, headline, why_nothing_was_hit};
use crate::action::summary::problems::{is_of_no_use, problems, refusals_in_words};
use crate::action::summary::relay_activity::relay_rows;
use crate::action::summary::runs::{sparkline, trend};
use crate::action::summary::statistics::{
    language_cells, others_in_words, slowest_in_words, times_in_words,
};
use crate::action::summary::{Report, SHOWN};
use crate::format::{group_digits, time};

/// The report as plain text.
pub fn log_text(report: &Report<'_>) -> String {
    let mut text = format!("{}.\n", headline(report));
    for line in trend(report).into_iter().chain(sparkline(report)) {
        let _ = writeln!(text, "{line}.");
    }
    if let Some(hint) = why_nothing_was_hit(report) {
        let _ = writeln!(text, "{hint}");
    }
    if let Some(others) = compiles_of_other_users(report) {
        let _ = writeln!(text, "{others}");
    }
    for problem in problems(report) {
        let _ = writeln!(text, "{problem}");
    }
    if let Ok(stats) = report.stats {
        let rows = stats.languages();
        if !rows.is_empty() {
            let header = ["", "hits", "misses", "failed", "hit rate"].map(str::to_owned);
            let cells = rows.iter().map(|row| language_cells(row, str::to_owned));
            text.push('\n');
            text.push_str(&aligned(std::iter::once(header).chain(cells)));
        }
        for (title, line) in [
            ("Average", times_in_words(stats)),
            ("Also", others_in_words(stats)),
        ] {
            if !line.is_empty() {
                let _ = writeln!(text, "\n{title}: {}", line.join(", "));
            }
        }
        if let Some(refused) = refusals_in_words(report).filter(|_| !is_of_no_use(report)) {
            let _ = writeln!(text, "\n{refused}");
        }
        if let Some(times) = report.times
            && let Some(title) = slowest_in_words(times)
        {
            let _ = writeln!(text, "\n{title}; the slowest:");
            for (each, subject) in &times.slowest {
                let _ = writeln!(text, "  {:>9}  {subject}", time(*each));
            }
        }
        let reasons = stats.reasons();
        if !reasons.is_empty() {
            let _ = writeln!(
                text,
                "\nNot cacheable: {}",
                group_digits(stats.not_cacheable())
            );
            for reason in reasons.iter().take(SHOWN) {
                let explanation = reason
                    .explanation
                    .map_or_else(String::new, |words| format!(": {words}"));
                let _ = writeln!(
                    text,
                    "  {:>6}  {}{explanation}",
                    group_digits(reason.count),
                    reason.reason
                );
            }
        }
    }
    if let Some(Ok(activity)) = report.relay {
        text.push_str("\nGitHub's cache, in packs:\n");
        for (what, how_much) in relay_rows(activity, report.stats.ok()) {
            let _ = writeln!(text, "  {what}: {how_much}");
        }
    }
    let _ = write!(
        text,
        "\nsccache {}, mode {}{}, {}",
        report.version,
        report.mode,
        if report.read_only { ", read only" } else { "" },
        report.cache_location
    );
    text
}

/// Rows with the first column to the left and the others to the right.
fn aligned(rows: impl Iterator<Item = [String; 5]>) -> String {
    let rows: Vec<[String; 5]> = rows.collect();
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            let _ = match column {
                0 => write!(line, "  {cell:<width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}
