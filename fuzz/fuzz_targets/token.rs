//! Claims of a runtime token, which an attacker may have made.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sccache_action::cache_protocol::runtime_token::{RuntimeClaims, access_of};
use sccache_action::runner::token::cache_scopes;

fuzz_target!(|text: &str| {
    let _ = cache_scopes(text);
    let claims = serde_json::json!({ "ac": text, "repository_id": "1" });
    for claims in [claims.to_string(), text.to_owned()] {
        let Ok(claims) = serde_json::from_str::<RuntimeClaims>(&claims) else {
            continue;
        };
        if let Some(access) = access_of(&claims) {
            let first = access.read.first();
            assert!(access.write.is_none() || access.write.as_ref() == first);
        }
    }
});
