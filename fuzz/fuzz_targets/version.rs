//! What a user, or a list of releases, may take for a version.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sccache_action::install::VersionSpec;

fuzz_target!(|text: &str| {
    if let Ok(spec) = text.parse::<VersionSpec>() {
        let _ = format!("{spec:?}");
    }
});
