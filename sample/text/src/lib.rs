//! Counts words.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Value, json};

static WORD: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"[\p{Alphabetic}\d]+").expect("a valid pattern"));

/// How often each word of `text` is in it, in lower case.
pub fn word_counts(text: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for word in WORD.find_iter(text) {
        *counts.entry(word.as_str().to_lowercase()).or_default() += 1;
    }
    counts
}

/// The counts and the digests as one JSON object.
pub fn report(counts: &BTreeMap<String, usize>, digests: &[(&'static str, u64)]) -> Value {
    let digests: BTreeMap<_, _> = digests
        .iter()
        .map(|(name, digest)| (*name, format!("{digest:x}")))
        .collect();
    json!({ "words": counts, "digests": digests })
}
