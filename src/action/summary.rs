//! What a job's users read at its end: the job summary in Markdown, a line for an annotation, and
//! the log. Functions of values only.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::time::Duration;

use crate::action::mode::Mode;
use crate::relay::activity::Activity;
use crate::relay::cargo::CargoActivity;
use crate::sccache::stats::{ErrorKind, LanguageRow, Stats};
use crate::sccache::times::CompileTimes;
use crate::words::{age, counted, percent, size, thousands, time};

/// What the runner shows of a step's summary (1 MiB), with room left for other summaries of it.
const SUMMARY_LIMIT: usize = 256 * 1024;

/// How many of a list's items are shown.
const SHOWN: usize = 25;

/// How many compiles a job must have looked up for its hit rate to be judged: in fewer, one more or
/// less is a difference of ten percent and more.
const COMPILES_TO_JUDGE: u64 = 10;

/// All that is known at the end of a job.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    /// sccache's version.
    pub version: &'a str,
    /// Where objects were kept.
    pub mode: Mode,
    /// The cache location in sccache's words.
    pub cache_location: &'a str,
    /// Whether objects were only read.
    pub read_only: bool,
    /// The statistics, or why there are none.
    pub stats: Result<&'a Stats, &'a str>,
    /// The statistics as sccache printed them.
    pub raw_stats: &'a str,
    /// Compiles that ran without sccache because it had failed.
    pub uncached: usize,
    /// Why the first of these did.
    pub uncached_reason: Option<&'a str>,
    /// Why later compiles did not ask sccache any more, where that is so.
    pub gave_up: Option<&'a str>,
    /// How many compiles sccache's server could not do, and why it could not do the first.
    pub refusals: (u64, Option<&'a str>),
    /// How long compiles through sccache took.
    pub times: Option<&'a CompileTimes>,
    /// Compiles that ran without sccache because their steps run as another user than the action.
    pub of_other_users: u64,
    /// What sccache's server had to say for itself.
    pub server_log: &'a str,
    /// What the relay did, or why that is not known; `None` where there was none.
    pub relay: Option<Result<&'a Activity, &'a str>>,
    /// The hit rate, in percent, that the user wants at least.
    pub min_hit_rate: Option<f64>,
    /// The time, in seconds since 1970.
    pub now: u64,
}

/// The one line that says it all.
pub fn verdict(report: &Report<'_>) -> String {
    let stats = match report.stats {
        Ok(stats) => stats,
        Err(why) => return format!("There are no statistics: {why}"),
    };
    let Some(rate) = stats.hit_rate() else {
        return match stats.requests() {
            0 => "No compiler was called through sccache".to_owned(),
            calls => format!(
                "{} through sccache, none of which could be cached",
                counted(calls, "compiler call")
            ),
        };
    };
    let mut text = format!(
        "{} of {} came from the cache ({}, {}, {})",
        percent(rate),
        counted(stats.lookups(), "compile"),
        counted(stats.hits(), "hit"),
        counted(stats.misses(), "miss"),
        counted(stats.errors(), "error"),
    );
    if let Some(saved) = stats
        .saved()
        .filter(|saved| *saved >= Duration::from_secs(1))
    {
        let _ = write!(text, ", saving about {} of compiler time", time(saved));
    }
    text
}

/// What is wrong with the hit rate, in a sentence, where it is lower than the user wants and can be
/// judged.
///
/// A first run cannot, as nothing is in the cache for it. In mode `packed` it is known by that the
/// packs tell of no earlier run of the same job. In other modes nobody tells, and a run without any
/// hit might be one.
pub fn shortfall(report: &Report<'_>) -> Option<String> {
    let wanted = report.min_hit_rate?;
    let stats = report.stats.ok()?;
    let rate = stats.hit_rate()?;
    let is_first = match report.relay {
        Some(Ok(activity)) => activity.previous.is_none(),
        Some(Err(_)) | None => stats.hits() == 0,
    };
    if is_first || stats.lookups() < COMPILES_TO_JUDGE || rate * 100.0 >= wanted {
        return None;
    }
    Some(format!(
        "Only {} of {} came from the cache; `min-hit-rate` asks for {wanted} %.",
        percent(rate),
        counted(stats.lookups(), "compile"),
    ))
}

/// The hit rate beside that of an earlier run of the same job, where there was one.
fn trend(report: &Report<'_>) -> Option<String> {
    let rate = report.stats.ok()?.hit_rate()?;
    let before = report.relay?.ok()?.previous?;
    let rate_before = before.hit_rate()?;
    let since = Duration::from_secs(report.now.saturating_sub(before.ended));
    let when = match since.as_secs() {
        0..60 => "just before".to_owned(),
        _ => format!("{} before", age(since)),
    };
    Some(format!(
        "Hit rate: {}, after {} of {} in the last run of this job that saved anything ({when})",
        percent(rate),
        percent(rate_before),
        counted(before.lookups, "compile"),
    ))
}

/// The text of the annotation.
pub fn annotation(report: &Report<'_>) -> String {
    let mut text = format!("sccache {}: {}.", report.version, verdict(report));
    for trouble in troubles(report) {
        let _ = write!(text, " {trouble}");
    }
    text
}

/// Whether there is something in the report that the user should mend.
pub fn is_troubled(report: &Report<'_>) -> bool {
    !troubles(report).is_empty()
}

/// What ran without sccache as it should.
fn compiles_of_other_users(report: &Report<'_>) -> Option<String> {
    (report.of_other_users > 0).then(|| {
        format!(
            "{} ran without sccache, since the step runs as another user than the action.",
            counted(report.of_other_users, "compile")
        )
    })
}

/// What went wrong, each in a sentence.
fn troubles(report: &Report<'_>) -> Vec<String> {
    let mut troubles: Vec<String> = shortfall(report).into_iter().collect();
    if report.uncached > 0 {
        let why = report.uncached_reason.unwrap_or("its server was gone");
        let mut trouble = format!(
            "{} ran without sccache because it failed ({why}).",
            counted(report.uncached as u64, "compile")
        );
        if let Some(why) = report.gave_up {
            let _ = write!(trouble, " It was not asked again after that ({why}).");
        }
        troubles.push(trouble);
    }
    if is_of_no_use(report) {
        troubles.extend(refusals_in_words(report));
    }
    troubles.extend(relay_troubles(report));
    let Ok(stats) = report.stats else {
        return troubles;
    };
    let errors: Vec<String> = stats
        .error_counts()
        .iter()
        // sccache counts each write that it was told not to make as failed.
        .filter(|error| !(report.read_only && error.kind == ErrorKind::Write))
        .map(|error| format!("{} {}", thousands(error.count), error.kind.in_words()))
        .collect();
    if !errors.is_empty() {
        troubles.push(format!("There were {}.", errors.join(", ")));
    }
    troubles
}

fn relay_troubles(report: &Report<'_>) -> Vec<String> {
    let activity = match report.relay {
        None => return Vec::new(),
        Some(Err(why)) => {
            return vec![format!(
                "The relay between sccache and GitHub's cache was gone at the end of the job \
                 ({why}); what it had not saved by then is compiled again next time."
            )];
        }
        Some(Ok(activity)) => activity,
    };
    let mut troubles = Vec::new();
    if let Some(how) = &activity.first_server_death {
        let again = match &activity.server_not_restarted {
            None => "was started again each time; what it had counted by then is lost".to_owned(),
            Some(why) => format!("could not be started again ({why})"),
        };
        let times = counted(activity.server_deaths, "time");
        troubles.push(format!(
            "sccache's server died {times} in the job ({how}), and {again}."
        ));
    }
    if activity.corrupt > 0 {
        troubles.push(format!(
            "{} in the cache had been damaged and was compiled anew.",
            counted(activity.corrupt, "object")
        ));
    }
    if let Some(first) = &activity.first_trouble {
        let more = match activity.troubles {
            0 | 1 => String::new(),
            troubles => format!(" ({} times something went wrong)", thousands(troubles)),
        };
        let lost = match activity.unsaved {
            0 => String::new(),
            unsaved => format!(
                " {} will be compiled again next time.",
                counted(unsaved, "object")
            ),
        };
        troubles.push(format!("GitHub's cache: {first}{more}.{lost}"));
    }
    troubles
}

/// What the relay did, as pairs of what and how much.
fn relay_rows(activity: &Activity, stats: Option<&Stats>) -> Vec<(&'static str, String)> {
    let mut requests = thousands(activity.requests());
    if let Some(stats) = stats {
        let alone = requests_of_single_entries(stats);
        if alone > activity.requests() {
            let _ = write!(requests, " instead of {}", thousands(alone));
        }
    }
    let upstream = &activity.upstream;
    let mut rows = vec![
        ("Requests to the cache service", requests),
        (
            "Packs read and written",
            format!(
                "{} and {}",
                thousands(activity.fetched_packs),
                thousands(activity.saved_packs)
            ),
        ),
        (
            "Received and sent",
            format!(
                "{} and {}",
                size(upstream.bytes_down),
                size(upstream.bytes_up)
            ),
        ),
        (
            "In the cache at the start",
            format!(
                "{} in {}, {}",
                counted(activity.known_objects, "object"),
                counted(activity.known_packs, "pack"),
                size(activity.known_bytes)
            ),
        ),
    ];
    for (what, count) in [
        (
            "Uploads beyond GitHub's 200 a minute that this avoided",
            activity.spared,
        ),
        ("Refused with 429 and made up for later", upstream.throttled),
        ("Asked for and not to be had in time", activity.late),
        ("Objects not saved", activity.unsaved),
    ] {
        if count > 0 {
            rows.push((what, thousands(count)));
        }
    }
    if let Some(cargo) = &activity.cargo {
        rows.push(("Cargo cache", cargo_in_words(cargo)));
    }
    if activity.read_only {
        rows.push((
            "Saved",
            "nothing, since the cache may only be read".to_owned(),
        ));
    }
    rows
}

/// What was done for cargo.
fn cargo_in_words(cargo: &CargoActivity) -> String {
    let milliseconds = |milliseconds| time(Duration::from_millis(milliseconds));
    let mut text = format!(
        "{} and {} restored, {} in {}",
        counted(cargo.restored_units, "compiled unit"),
        counted(cargo.restored_crates, "crate"),
        size(cargo.restored_bytes),
        milliseconds(cargo.restore_milliseconds),
    );
    if cargo.other_layout {
        text.push_str(" (what was compiled is for another compiler, system or settings)");
    }
    let _ = match cargo.new_parts {
        0 => write!(text, "; nothing new to save"),
        new => write!(
            text,
            "; {} to save, {}",
            counted(new, "new part"),
            size(cargo.new_bytes)
        ),
    };
    text
}

/// How many requests an entry for each object takes: two for a hit (where it is, then the object
/// itself), one for a miss, three for an object that is written.
fn requests_of_single_entries(stats: &Stats) -> u64 {
    2 * stats.hits() + stats.misses() + 3 * stats.writes()
}

/// Why nothing came from the cache, where that is so.
fn why_nothing_was_hit(report: &Report<'_>) -> Option<&'static str> {
    let stats = report.stats.ok()?;
    if stats.requests() == 0 {
        return Some(
            "Is the compiler called through sccache? For Rust that is `RUSTC_WRAPPER`, for CMake \
             the compiler launchers; a build whose output was restored from elsewhere has nothing \
             to compile.",
        );
    }
    // Where sccache failed, that is why.
    if stats.hits() > 0 || stats.lookups() == 0 || report.uncached > 0 {
        return None;
    }
    Some(match report.mode {
        Mode::Local => {
            "Objects were kept on this machine's disk only. On a runner that starts anew for each \
             job nothing is found there."
        }
        Mode::Packed | Mode::Direct | Mode::External => {
            "That is so in the first job with this cache, and after a change of sccache, of the \
             compiler or of its flags."
        }
    })
}

/// The job summary.
pub fn markdown(report: &Report<'_>) -> String {
    let mut text = format!("### sccache\n\n**{}.**\n\n", escape(&verdict(report)));
    if let Some(trend) = trend(report) {
        let _ = writeln!(text, "{trend}.\n");
    }
    if let Some(hint) = why_nothing_was_hit(report) {
        let _ = writeln!(text, "{hint}\n");
    }
    if let Some(others) = compiles_of_other_users(report) {
        let _ = writeln!(text, "{others}\n");
    }
    for trouble in troubles(report) {
        let _ = writeln!(text, "> [!WARNING]\n> {}\n", escape(&trouble));
    }
    if let Ok(stats) = report.stats {
        stats_markdown(&mut text, stats);
    }
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

/// Whether there is more that sccache's server could not do than what it could: then something is wrong
/// with it and not with single calls.
fn is_of_no_use(report: &Report<'_>) -> bool {
    let lookups = report.stats.map_or(0, Stats::lookups);
    report.refusals.0 > lookups
}

/// What sccache's server could not do and the compiler did.
fn refusals_in_words(report: &Report<'_>) -> Option<String> {
    let (count, why) = report.refusals;
    (count > 0).then(|| {
        format!(
            "sccache could not do {}, and the compiler ran ({}).",
            counted(count, "compile"),
            why.unwrap_or_default()
        )
    })
}

/// What the slowest compiles were. Which of them were hits sccache does not tell.
fn slowest_in_words(times: &CompileTimes) -> Option<String> {
    (times.compiles > 0).then(|| {
        format!(
            "{} through sccache took {} together, hits and misses",
            counted(times.compiles, "compile"),
            time(times.total)
        )
    })
}

fn times_markdown(text: &mut String, times: &CompileTimes) {
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

fn stats_markdown(text: &mut String, stats: &Stats) {
    let rows = stats.languages();
    if !rows.is_empty() {
        text.push_str("| Language | Hits | Misses | Failed | Hit rate |\n|---|--:|--:|--:|--:|\n");
        for row in rows.iter().take(SHOWN) {
            let _ = writeln!(text, "| {} |", language_cells(row, escape).join(" | "));
        }
        text.push('\n');
    }
    chart(text, stats);
    let times = times_in_words(stats);
    if !times.is_empty() {
        let _ = writeln!(text, "On average: {}.\n", times.join(", "));
    }
    let others = others_in_words(stats);
    if !others.is_empty() {
        let _ = writeln!(text, "Besides: {}.\n", others.join(", "));
    }
    let reasons = stats.reasons();
    if !reasons.is_empty() {
        let _ = writeln!(
            text,
            "<details><summary>{} could not be cached</summary>\n\n| Calls | Reason | What it means |\n|--:|---|---|",
            counted(stats.not_cacheable(), "call")
        );
        for reason in reasons.iter().take(SHOWN) {
            let _ = writeln!(
                text,
                "| {} | {} | {} |",
                thousands(reason.count),
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

fn language_cells(row: &LanguageRow<'_>, name: impl Fn(&str) -> String) -> [String; 5] {
    [
        name(row.language),
        thousands(row.hits),
        thousands(row.misses),
        thousands(row.failed),
        row.hit_rate().map_or_else(|| "–".to_owned(), percent),
    ]
}

fn chart(text: &mut String, stats: &Stats) {
    let slices: Vec<(&str, u64)> = [
        ("hits", stats.hits()),
        ("misses", stats.misses()),
        ("failed", stats.compile_failures()),
        ("not cacheable", stats.not_cacheable()),
    ]
    .into_iter()
    .filter(|(_, count)| *count > 0)
    .collect();
    if slices.is_empty() {
        return;
    }
    text.push_str("```mermaid\npie showData title Compiler calls\n");
    for (name, count) in slices {
        let _ = writeln!(text, "    \"{name}\" : {count}");
    }
    text.push_str("```\n\n");
}

fn times_in_words(stats: &Stats) -> Vec<String> {
    let times = stats.mean_times();
    [
        ("a hit read in", times.read),
        ("a miss compiled in", times.compile),
        ("an object written in", times.write),
    ]
    .into_iter()
    .filter_map(|(what, mean)| Some(format!("{what} {}", time(mean?))))
    .collect()
}

fn others_in_words(stats: &Stats) -> Vec<String> {
    [
        (stats.writes(), "object", " written to the cache"),
        (stats.compile_failures(), "compile", " that failed"),
        (
            stats.forced_recaches(),
            "object",
            " written anew on request",
        ),
        (stats.not_compiles(), "call", " that compiled nothing"),
        (
            stats.unsupported_compiler(),
            "call",
            " of a compiler that sccache does not know",
        ),
    ]
    .into_iter()
    .filter(|(count, ..)| *count > 0)
    .map(|(count, noun, rest)| format!("{}{rest}", counted(count, noun)))
    .collect()
}

/// A folded block with foreign text in it, as it is but for its length.
fn details(text: &mut String, title: &str, raw: &str) {
    let raw = raw.trim();
    let room = (SUMMARY_LIMIT / 2)
        .min(SUMMARY_LIMIT.saturating_sub(text.len()))
        .saturating_sub(1024);
    if raw.is_empty() || room == 0 {
        return;
    }
    let (shown, rest) = raw.split_at(floor_char_boundary(raw, room));
    // A fence is closed by one at least as long. A run too long to be outdone is none of sccache's.
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
            "\nCut off: {} more bytes.",
            thousands(rest.len() as u64)
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

/// The report as plain text.
pub fn log_text(report: &Report<'_>) -> String {
    let mut text = format!("{}.\n", verdict(report));
    if let Some(trend) = trend(report) {
        let _ = writeln!(text, "{trend}.");
    }
    if let Some(hint) = why_nothing_was_hit(report) {
        let _ = writeln!(text, "{hint}");
    }
    if let Some(others) = compiles_of_other_users(report) {
        let _ = writeln!(text, "{others}");
    }
    for trouble in troubles(report) {
        let _ = writeln!(text, "{trouble}");
    }
    if let Ok(stats) = report.stats {
        let rows = stats.languages();
        if !rows.is_empty() {
            let header = ["", "hits", "misses", "failed", "hit rate"].map(str::to_owned);
            let cells = rows.iter().map(|row| language_cells(row, str::to_owned));
            text.push('\n');
            text.push_str(&aligned(std::iter::once(header).chain(cells)));
        }
        for line in [times_in_words(stats), others_in_words(stats)] {
            if !line.is_empty() {
                let _ = writeln!(text, "\n{}", line.join(", "));
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
                thousands(stats.not_cacheable())
            );
            for reason in reasons.iter().take(SHOWN) {
                let explanation = reason
                    .explanation
                    .map_or_else(String::new, |words| format!(": {words}"));
                let _ = writeln!(
                    text,
                    "  {:>6}  {}{explanation}",
                    thousands(reason.count),
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

/// Foreign text as Markdown that shows it and does nothing else.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\n' | '\r' => escaped.push(' '),
            // Mentions and references would notify people and link elsewhere.
            '@' => escaped.push_str("&#64;"),
            '#' => escaped.push_str("&#35;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' | '$' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

/// Foreign text as code inside a table. An HTML element, since a pipe cannot be written in a code
/// span of a table.
fn code(text: &str) -> String {
    format!("<code>{}</code>", escape(text))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::github::cache_client::RequestCounts;
    use crate::store::index::Ran;

    fn report<'a>(stats: Result<&'a Stats, &'a str>, raw_stats: &'a str) -> Report<'a> {
        Report {
            version: "0.16.0",
            mode: Mode::Direct,
            cache_location: "GHA, name: sccache-v0.16.0, prefix: /sccache/",
            read_only: false,
            stats,
            raw_stats,
            uncached: 0,
            uncached_reason: None,
            gave_up: None,
            refusals: (0, None),
            times: None,
            of_other_users: 0,
            server_log: "",
            relay: None,
            min_hit_rate: None,
            now: NOW,
        }
    }

    const NOW: u64 = 1_800_000_000;

    fn folder() -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
    }

    /// Compares with the file of this name, or writes it where `UPDATE_FIXTURES` is set.
    fn assert_is_fixture(name: &str, text: &str) {
        let path = folder().join("summary").join(name);
        if std::env::var_os("UPDATE_FIXTURES").is_some() {
            std::fs::write(&path, text).unwrap();
        }
        let expected = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, expected, "{}", path.display());
    }

    fn fixture(name: &str) -> String {
        std::fs::read_to_string(folder().join("stats").join(name)).unwrap()
    }

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

    fn activity() -> Activity {
        Activity {
            written: 1,
            known_objects: 10_021,
            known_packs: 3,
            known_bytes: 81_500_000,
            fetched_packs: 2,
            saved_packs: 1,
            upstream: RequestCounts {
                lookups: 4,
                reservations: 1,
                uploads: 1,
                commits: 1,
                downloads: 3,
                throttled: 1,
                bytes_up: 4_250,
                bytes_down: 64_123_456,
                ..RequestCounts::default()
            },
            ..Activity::default()
        }
    }

    #[test]
    fn what_the_relay_did_is_said_beside_what_an_entry_for_each_object_would_take() {
        let raw = fixture("0.16.0.json");
        let stats = Stats::parse(&raw).unwrap();
        let activity = activity();
        let report = Report {
            mode: Mode::Packed,
            cache_location: "GitHub's cache, in packs",
            relay: Some(Ok(&activity)),
            ..report(Ok(&stats), &raw)
        };
        assert!(!is_troubled(&report));
        assert_is_fixture("packed.md", &markdown(&report));
        assert_is_fixture("packed.txt", &log_text(&report));
    }

    #[test]
    fn what_went_wrong_between_the_relay_and_githubs_cache_is_one_warning() {
        let stats = stats(4, 2, 0, 0);
        let trouble = Activity {
            troubles: 3,
            first_trouble: Some("the index could not be read: no route to host".to_owned()),
            unsaved: 2,
            corrupt: 1,
            ..activity()
        };
        let with = |relay| Report {
            relay: Some(relay),
            ..report(Ok(&stats), "")
        };
        let text = annotation(&with(Ok(&trouble)));
        for said in [
            "no route to host",
            "3 times",
            "2 objects",
            "1 object in the cache",
        ] {
            assert!(text.contains(said), "{text}");
        }
        let gone = with(Err("connection refused"));
        assert!(annotation(&gone).contains("was gone"));
        // What passed and was made up for is none.
        let passed = Activity {
            first_setback: Some("429".to_owned()),
            read_only: true,
            ..activity()
        };
        assert!(!is_troubled(&with(Ok(&passed))));
    }

    fn ran(hits: u64, lookups: u64, ago: u64) -> Option<Ran> {
        Some(Ran {
            ended: NOW - ago,
            hits,
            lookups,
        })
    }

    #[test]
    fn a_hit_rate_is_judged_where_it_can_be_and_reaches_what_was_asked_for_exactly() {
        let wanted = |percent| Report {
            min_hit_rate: percent,
            ..report(Err(""), "")
        };
        let first = activity();
        let later = Activity {
            previous: ran(0, 20, 60),
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
            // Without packs, what may be a first run is none.
            (0, 20, Some(90.0), None, false),
            (1, 19, Some(90.0), None, true),
        ] {
            let stats = stats(hits, misses, 0, 0);
            let report = Report {
                stats: Ok(&stats),
                relay: relay.map(Ok),
                ..wanted(percent)
            };
            let text = shortfall(&report);
            assert_eq!(text.is_some(), falls_short, "{hits} {misses} {percent:?}");
            assert_eq!(is_troubled(&report), falls_short);
        }
        let stats = stats(1_000, 3_000, 0, 0);
        let report = Report {
            stats: Ok(&stats),
            ..wanted(Some(99.5))
        };
        let expected =
            "Only 25.0 % of 4,000 compiles came from the cache; `min-hit-rate` asks for 99.5 %.";
        assert_eq!(shortfall(&report).as_deref(), Some(expected));
        let gone = Report {
            relay: Some(Err("gone")),
            ..report.clone()
        };
        assert!(annotation(&gone).contains(expected));
    }

    #[test]
    fn an_earlier_run_is_shown_beside_this_one_and_nothing_where_there_was_none() {
        let stats = stats(3, 1, 0, 0);
        let with = |previous| Activity {
            previous,
            ..activity()
        };
        let shown = |activity: &Activity| {
            let report = Report {
                relay: Some(Ok(activity)),
                ..report(Ok(&stats), "")
            };
            (markdown(&report), log_text(&report))
        };
        let (markdown, log) = shown(&with(ran(9, 10, 3 * 3600)));
        let expected = "Hit rate: 75.0 %, after 90.0 % of 10 compiles in the last run of this job \
                        that saved anything (3 h before).\n";
        assert!(markdown.contains(expected), "{markdown}");
        assert!(log.contains(expected), "{log}");
        for previous in [None, ran(0, 0, 60)] {
            let (markdown, log) = shown(&with(previous));
            assert!(!markdown.contains("last run") && !log.contains("last run"));
        }
    }

    #[test]
    fn a_server_that_was_gone_is_said_with_what_it_cost() {
        let report = Report {
            uncached: 12,
            uncached_reason: Some("error: Server startup failed"),
            of_other_users: 0,
            server_log: "[ERROR] out of memory",
            ..report(Err("sccache's server was gone"), "")
        };
        assert!(is_troubled(&report));
        assert_is_fixture("server-gone.md", &markdown(&report));
        assert_is_fixture("server-gone.txt", &annotation(&report));
    }

    fn stats(hits: u64, misses: u64, write_errors: u64, not_cacheable: u64) -> Stats {
        Stats::parse(
            &serde_json::json!({ "stats": {
                "compile_requests": hits + misses + not_cacheable,
                "requests_executed": hits + misses,
                "requests_not_cacheable": not_cacheable,
                "cache_hits": { "counts": { "Rust": hits } },
                "cache_misses": { "counts": { "Rust": misses } },
                "cache_write_errors": write_errors,
            }})
            .to_string(),
        )
        .unwrap()
    }

    #[test]
    fn the_verdict_fits_what_happened() {
        for (stats, expected) in [
            (stats(0, 0, 0, 0), "No compiler was called through sccache"),
            (
                stats(0, 0, 0, 3),
                "3 compiler calls through sccache, none of which could be cached",
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
            assert_eq!(verdict(&report(Ok(&stats), "")), expected);
        }
    }

    #[test]
    fn errors_are_named_in_the_annotation() {
        let stats = stats(4, 4, 1500, 0);
        let report = report(Ok(&stats), "");
        assert!(is_troubled(&report));
        let text = annotation(&report);
        assert!(text.contains("1,500 cache writes that failed"), "{text}");
        assert!(!is_troubled(&self::report(
            Ok(&self::stats(1, 1, 0, 9)),
            ""
        )));
    }

    #[test]
    fn writes_that_were_not_to_be_made_are_no_trouble() {
        let stats = stats(0, 4, 4, 0);
        let report = Report {
            read_only: true,
            ..report(Ok(&stats), "")
        };
        assert!(!is_troubled(&report));
        assert!(markdown(&report).contains("read only"));
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
