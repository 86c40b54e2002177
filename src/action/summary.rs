//! The texts for a job's users at its end: the job summary in Markdown, a line for an annotation,
//! and the log. Functions of values only.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::time::Duration;

use crate::action::mode::Mode;
use crate::clock::Timestamp;
use crate::format::{group_digits, percent, pluralize, relative_time, size, time};
use crate::packs::index::{RUNS_KEPT, RunStats};
use crate::relay::activity::Activity;
use crate::relay::cargo::{CargoActivity, CompileReason};
use crate::sccache::stats::{ErrorKind, LanguageRow, Stats};
use crate::sccache::times::CompileTimes;

/// The runner's limit for a step's summary (1 MiB), less some room for other summaries of the step.
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
    /// The storage for objects.
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
    /// The reason of the first of these.
    pub uncached_reason: Option<&'a str>,
    /// The reason why later compiles no longer asked sccache, if they did not.
    pub gave_up: Option<&'a str>,
    /// How many compiles sccache's server could not do, and why it could not do the first.
    pub refusals: (u64, Option<&'a str>),
    /// How long compiles through sccache took.
    pub times: Option<&'a CompileTimes>,
    /// Compiles that ran without sccache because their steps run as another user than the action.
    pub of_other_users: u64,
    /// Compiles of dependencies that did not ask sccache, since the cargo cache keeps them.
    pub dependencies: u64,
    /// The log of sccache's server.
    pub server_log: &'a str,
    /// The relay's activity, or why it is unknown; `None` if there was no relay.
    pub relay: Option<Result<&'a Activity, &'a str>>,
    /// The keeper's activity, if a process other than a relay kept the server.
    pub keeper: Option<&'a Activity>,
    /// The hit rate, in percent, that the user wants at least.
    pub min_hit_rate: Option<f64>,
    /// The time.
    pub now: Timestamp,
}

impl Report<'_> {
    /// How many compiles could have come from a cache: those that sccache looked up, and those of
    /// dependencies that the cargo cache did not have.
    fn compiles(&self) -> u64 {
        self.stats.map_or(0, Stats::lookups) + self.dependencies
    }

    /// The hits among these, from 0 to 1. `None` if there was no such compile.
    fn hit_rate(&self) -> Option<f64> {
        let hits = self.stats.ok()?.hits();
        let compiles = self.compiles();
        (compiles > 0).then(|| hits as f64 / compiles as f64)
    }

    /// The last runs of the job and then this one. It is empty if this run has no hit rate.
    fn runs(&self) -> Vec<RunStats> {
        let this = self
            .stats
            .ok()
            .and_then(|stats| ran(stats, self.dependencies, self.now));
        let (Some(this), Some(Ok(activity))) = (this, self.relay) else {
            return Vec::new();
        };
        let earlier: Vec<RunStats> = activity.earlier_runs.iter().copied().collect();
        let room = earlier.len().saturating_sub(RUNS_KEPT - 1);
        let earlier = earlier.into_iter().skip(room);
        earlier
            .chain([this])
            .filter(|ran| ran.lookups > 0)
            .collect()
    }
}

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

/// The hit rate beside that of an earlier run of the same job, if there was one.
fn trend(report: &Report<'_>) -> Option<String> {
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
fn runs_markdown(text: &mut String, report: &Report<'_>) {
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

/// The hit rates of `runs`, this one at the end.
fn line_chart(text: &mut String, runs: &[RunStats]) {
    let settings = serde_json::json!({
        "xyChart": { "width": 640, "height": 240, "titleFontSize": 16 },
        "themeVariables": { "xyChart": {
            "backgroundColor": "#00000000",
            "plotColorPalette": LINE,
        } },
    });
    let names: Vec<String> = (1..runs.len())
        .rev()
        .map(|before| format!("\"-{before}\""))
        .chain(["\"this\"".to_owned()])
        .collect();
    let rates: Vec<String> = runs
        .iter()
        .filter_map(RunStats::hit_rate)
        .map(|rate| format!("{:.1}", rate * 100.0))
        .collect();
    mermaid_begin(text, &settings);
    let _ = writeln!(
        text,
        "xychart-beta\n    title \"Hit rate in % over the last {} runs of this job\"\n    \
         x-axis [{}]\n    y-axis 0 --> 100\n    line [{}]\n```\n",
        runs.len(),
        names.join(", "),
        rates.join(", "),
    );
}

/// The hit rates of the last runs in a line of text.
fn sparkline(report: &Report<'_>) -> Option<String> {
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

/// The compiles that ran without sccache, as intended.
fn compiles_of_other_users(report: &Report<'_>) -> Option<String> {
    (report.of_other_users > 0).then(|| {
        format!(
            "{} ran without sccache, since the step runs as another user than the action.",
            pluralize(report.of_other_users, "compile")
        )
    })
}

/// The problems, each in a sentence.
fn problems(report: &Report<'_>) -> Vec<String> {
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

/// The relay's activity, as pairs of a label and an amount.
fn relay_rows(activity: &Activity, stats: Option<&Stats>) -> Vec<(&'static str, String)> {
    let mut requests = group_digits(activity.requests());
    if let Some(stats) = stats {
        let alone = requests_of_single_entries(stats);
        if alone > activity.requests() {
            let _ = write!(requests, " instead of {}", group_digits(alone));
        }
    }
    let upstream = &activity.upstream;
    let mut rows = vec![
        ("Requests to the cache service", requests),
        (
            "Packs read and written",
            format!(
                "{} and {}",
                group_digits(activity.fetched_packs),
                group_digits(activity.saved_packs)
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
                pluralize(activity.known_objects, "object"),
                pluralize(activity.known_packs, "pack"),
                size(activity.known_bytes)
            ),
        ),
    ];
    for (what, count) in [
        (
            "Uploads avoided beyond GitHub's 200 a minute",
            activity.uploads_avoided,
        ),
        ("Rate-limited, then retried", upstream.throttled),
        ("Timed out", activity.late),
        ("Objects not saved", activity.unsaved),
    ] {
        if count > 0 {
            rows.push((what, group_digits(count)));
        }
    }
    if let Some(cargo) = &activity.cargo {
        rows.push(("Cargo cache", cargo_in_words(cargo)));
    }
    if activity.read_only {
        rows.push(("Saved", "nothing: the cache is read-only".to_owned()));
    }
    rows
}

/// The cargo cache's activity.
fn cargo_in_words(cargo: &CargoActivity) -> String {
    let milliseconds = |milliseconds| time(Duration::from_millis(milliseconds));
    let mut text = format!(
        "{} restored ({}, {}, {} in {})",
        pluralize(cargo.restored_dependencies, "dependency"),
        pluralize(cargo.restored_units, "compiled unit"),
        pluralize(cargo.restored_crates, "crate"),
        size(cargo.restored_bytes),
        milliseconds(cargo.restore_milliseconds),
    );
    let compiled: u64 = cargo.compiled.iter().map(|(_, count)| count).sum();
    if compiled > 0 {
        let why = |(why, count): &(CompileReason, u64)| {
            let why = why_compiled_in_words(*why);
            match cargo.compiled.len() {
                1 => why.to_owned(),
                _ => format!("{} {why}", group_digits(*count)),
            }
        };
        let whys: Vec<String> = cargo.compiled.iter().map(why).collect();
        let _ = write!(
            text,
            "; {} compiled: {}",
            group_digits(compiled),
            whys.join(", ")
        );
    }
    let _ = match cargo.new_parts {
        0 => write!(text, "; nothing new to save"),
        new => write!(
            text,
            "; {} to save, {}",
            pluralize(new, "new part"),
            size(cargo.new_bytes)
        ),
    };
    text
}

/// Why dependencies were compiled.
fn why_compiled_in_words(why: CompileReason) -> &'static str {
    match why {
        CompileReason::FirstRun => "no earlier run has left any",
        CompileReason::OtherBuildKey => {
            "what earlier runs left is for another compiler, system or settings"
        }
        CompileReason::New => "new in the lockfile, or compiled from what is",
        CompileReason::Path => "tied to the path of another checkout",
        CompileReason::Missed => "could not be restored",
        CompileReason::Changed => "restored, and wanted with other features, flags or profile",
    }
}

/// How many requests an entry for each object takes: two for a hit (its address, then the object
/// itself), one for a miss, three for an object that is written.
fn requests_of_single_entries(stats: &Stats) -> u64 {
    2 * stats.hits() + stats.misses() + 3 * stats.writes()
}

/// The reason why nothing came from the cache, if nothing did.
fn why_nothing_was_hit(report: &Report<'_>) -> Option<&'static str> {
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

/// Whether sccache's server failed at more compiles than it did: then something is wrong with it
/// and not with single calls.
fn is_of_no_use(report: &Report<'_>) -> bool {
    let lookups = report.stats.map_or(0, Stats::lookups);
    report.refusals.0 > lookups
}

/// The compiles that failed in sccache's server and succeeded without it.
fn refusals_in_words(report: &Report<'_>) -> Option<String> {
    let (count, why) = report.refusals;
    (count > 0).then(|| {
        format!(
            "sccache failed {}, so the compiler ran instead ({}).",
            pluralize(count, "compile"),
            why.unwrap_or("for no known reason")
        )
    })
}

/// The slowest compiles. sccache does not tell which of them were hits.
fn slowest_in_words(times: &CompileTimes) -> Option<String> {
    (times.compiles > 0).then(|| {
        format!(
            "{} through sccache took {} together, hits and misses",
            pluralize(times.compiles, "compile"),
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

fn stats_markdown(text: &mut String, stats: &Stats, dependencies: u64) {
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

fn language_cells(row: &LanguageRow<'_>, name: impl Fn(&str) -> String) -> [String; 5] {
    [
        name(row.language),
        group_digits(row.hits),
        group_digits(row.misses),
        group_digits(row.failed),
        row.hit_rate().map_or_else(|| "–".to_owned(), percent),
    ]
}

/// The colours of the chart's slices. Each is translucent, so that it suits a light page and a dark one:
/// GitHub draws the chart in the reader's own theme, and its text on a slice in that theme's colour.
const HITS: &str = "#2da44ecc";
const MISSES: &str = "#5b84b8a6";
const DEPENDENCIES: &str = "#5b84b859";
const FAILED: &str = "#c4554da6";
const NOT_CACHEABLE: &str = "#8b949e38";

/// The line of the hit rates: one colour that is seen on a light page and on a dark one.
const LINE: &str = "#2da44e";

/// The border of the slices.
const OUTLINE: &str = "#8b949e80";

fn chart(text: &mut String, stats: &Stats, dependencies: u64) {
    let mut slices: Vec<(&str, u64, &str)> = [
        ("hits", stats.hits(), HITS),
        ("misses", stats.misses(), MISSES),
        ("dependencies compiled", dependencies, DEPENDENCIES),
        ("failed", stats.compile_failures(), FAILED),
        ("not cacheable", stats.not_cacheable(), NOT_CACHEABLE),
    ]
    .into_iter()
    .filter(|(_, count, _)| *count > 0)
    .collect();
    if slices.is_empty() {
        return;
    }
    // Versions of mermaid give the first colour to the first slice or to the largest one: here these
    // are the same.
    slices.sort_by_key(|(_, count, _)| std::cmp::Reverse(*count));
    let mut theme = serde_json::json!({
        "pieOpacity": "1",
        "pieStrokeColor": OUTLINE,
        "pieStrokeWidth": "1px",
        "pieOuterStrokeColor": OUTLINE,
        "pieOuterStrokeWidth": "1px",
    });
    for (number, (_, _, colour)) in slices.iter().enumerate() {
        theme[format!("pie{}", number + 1)] = (*colour).into();
    }
    mermaid_begin(text, &serde_json::json!({ "themeVariables": theme }));
    text.push_str("pie showData title Compiler calls\n");
    for (name, count, _) in slices {
        let _ = writeln!(text, "    \"{name}\" : {count}");
    }
    text.push_str("```\n\n");
}

/// Begins a block that GitHub draws, with its settings.
fn mermaid_begin(text: &mut String, settings: &serde_json::Value) {
    let _ = writeln!(text, "```mermaid\n%%{{init: {settings}}}%%");
}

fn times_in_words(stats: &Stats) -> Vec<String> {
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

fn others_in_words(stats: &Stats) -> Vec<String> {
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

/// Foreign text as Markdown that shows it and does nothing else.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        let (before, after) = text.split_at(at);
        match c {
            // GitHub turns text that looks like an address into a link.
            ':' if after.starts_with("://") => escaped.push_str("&#58;"),
            '.' if ends_with_www(before) => escaped.push_str("&#46;"),
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

fn ends_with_www(text: &str) -> bool {
    let start = text.len().checked_sub(3);
    let end = start.and_then(|start| text.get(start..));
    end.is_some_and(|end| end.eq_ignore_ascii_case("www"))
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
    use crate::cache_client::RequestCounts;
    use crate::packs::index::Runs;

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
            dependencies: 0,
            server_log: "",
            relay: None,
            keeper: None,
            min_hit_rate: None,
            now: NOW,
        }
    }

    const NOW: Timestamp = Timestamp::from_seconds(1_800_000_000);

    fn folder() -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
    }

    /// Compares with the file of this name, or writes it if `UPDATE_FIXTURES` is set.
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
        let activity = Activity {
            earlier_runs: runs(11),
            ..activity()
        };
        let report = Report {
            mode: Mode::Packed,
            cache_location: "GitHub's cache, in packs",
            relay: Some(Ok(&activity)),
            ..report(Ok(&stats), &raw)
        };
        assert!(!has_problems(&report));
        assert_is_fixture("packed.md", &markdown(&report));
        assert_is_fixture("packed.txt", &log_text(&report));
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

    fn one_run(hits: u64, lookups: u64, ago: u64) -> Runs {
        let ran = RunStats {
            ended: NOW - Duration::from_secs(ago),
            hits,
            lookups,
            saved: None,
        };
        [ran].into_iter().collect()
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

    /// The hits of `count` runs a day apart, of 40 look-ups each, and their saved times.
    fn runs(count: u64) -> Runs {
        let run = |i: u64| RunStats {
            ended: NOW - Duration::from_secs(i * 86_400),
            hits: 40 - (i * 7) % 40,
            lookups: 40,
            saved: (i % 4 != 3).then_some(60 * i),
        };
        (1..=count).map(run).collect()
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

    #[test]
    fn foreign_text_becomes_neither_a_link_nor_a_mention() {
        let why =
            "see https://evil.example/?a=b, FTP://x, WWW.evil.example, @user, #1, [a](b) and <a>";
        let shown = markdown(&Report {
            uncached: 1,
            uncached_reason: Some(why),
            cache_location: why,
            ..report(Err(why), "")
        });
        for link in ["://", "www.", "WWW.", "@user", "#1", "[a]", "<a>"] {
            assert!(!shown.contains(link), "{link}: {shown}");
        }
        assert!(shown.contains("https&#58;//evil.example/?a=b"), "{shown}");
        // Text that is no address stays as it is.
        assert_eq!(
            escape("a: b/c, ww.x, 7.5 s, C:/x"),
            "a: b/c, ww.x, 7.5 s, C:/x"
        );
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
    fn the_colours_of_the_chart_follow_the_size_of_its_slices() {
        for (stats, expected) in [
            (stats(9, 3, 0, 5), [HITS, NOT_CACHEABLE, MISSES]),
            (stats(1, 3, 0, 5), [NOT_CACHEABLE, MISSES, HITS]),
        ] {
            let text = markdown(&report(Ok(&stats), ""));
            let (_, rest) = text.split_once("```mermaid\n%%{init: ").unwrap();
            let (settings, rest) = rest.split_once("}%%\npie showData").unwrap();
            let settings: serde_json::Value = serde_json::from_str(settings).unwrap();
            for (number, colour) in expected.iter().enumerate() {
                let name = format!("pie{}", number + 1);
                assert_eq!(settings["themeVariables"][name], *colour);
            }
            let counts = rest
                .lines()
                .skip(1)
                .take(3)
                .map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap());
            assert!(counts.collect::<Vec<u64>>().is_sorted_by(|a, b| a >= b));
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
