//! Writes the charts that GitHub draws: compiler calls by result, and the hit rates of the last runs.

use std::fmt::Write as _;

use crate::packs::index::RunStats;
use crate::sccache::stats::Stats;

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

pub(super) fn chart(text: &mut String, stats: &Stats, dependencies: u64) {
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

/// The hit rates of `runs`, this one at the end.
pub(super) fn line_chart(text: &mut String, runs: &[RunStats]) {
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

/// Begins a block that GitHub draws, with its settings.
fn mermaid_begin(text: &mut String, settings: &serde_json::Value) {
    let _ = writeln!(text, "```mermaid\n%%{{init: {settings}}}%%");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::summary::fixtures::{report, stats};
    use crate::action::summary::markdown;

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
}
