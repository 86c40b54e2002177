//! The versions that users and lists of releases may contain.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sccache_action::install::VersionSpec;

fuzz_target!(|text: &str| {
    if let Ok(spec) = text.parse::<VersionSpec>() {
        let _ = format!("{spec:?}");
    }
});
