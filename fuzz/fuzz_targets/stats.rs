//! Text that may be no statistics of sccache's.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sccache_action::sccache::stats::Stats;

fuzz_target!(|text: &str| {
    let Ok(stats) = Stats::parse(text) else {
        return;
    };
    let _ = (stats.hit_rate(), stats.saved(), stats.mean_times());
    let _ = (stats.languages(), stats.reasons(), stats.error_counts());
});
