//! Holds the cache service to the behaviours that `docs/cache-service.md` numbers.
//!
//! Drives the service that `SCCACHE_ACTION_CONFORMANCE_URL` and `SCCACHE_ACTION_CONFORMANCE_TOKEN`
//! name, or else one in this process.

#![allow(clippy::unwrap_used)]

#[path = "conformance/mod.rs"]
mod conformance;

use conformance::{BEHAVIOURS, Target};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_has_all_its_behaviours() {
    conformance::run_all(&Target::from_environment().await).await;
}

#[test]
fn each_behaviour_is_documented_and_each_that_is_documented_is_tested() {
    let text = include_str!("../docs/cache-service.md");
    // A row: number, promise, source, test.
    let documented: Vec<(&str, &str)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| B"))
        .map(|row| {
            let cells: Vec<&str> = row.trim_end_matches(" |").split(" | ").collect();
            assert_eq!(cells.len(), 4, "{row}");
            (cells[0], cells[3].trim_matches('`'))
        })
        .collect();
    let tested: Vec<(&str, &str)> = BEHAVIOURS
        .iter()
        .map(|behaviour| (&behaviour.number[1..], behaviour.test))
        .collect();
    assert_eq!(documented, tested);
    for (position, (number, _)) in (1..).zip(tested) {
        assert_eq!(number.parse(), Ok(position));
    }
}
