//! Holds the cache service to the behaviours that `docs/cache-service.md` numbers.
//!
//! Drives the service that `SCCACHE_ACTION_CONFORMANCE_URL` and `SCCACHE_ACTION_CONFORMANCE_TOKEN`
//! name, or else one in this process.

use crate::conformance;
use crate::support::{s3, tools};
use std::collections::HashMap;
use std::path::Path;

use crate::conformance::{BEHAVIOURS, Target, Who};
use crate::support::postgres::Postgres;
use crate::support::s3::S3;
use crate::support::served::Served;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_has_all_its_behaviours() {
    conformance::run_all(&Target::from_environment().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_temporary_service_of_rehearsals_has_them_too() {
    conformance::run_raw(&Target::temporary().await).await;
}

/// A file of tokens for everybody whom the suite needs.
fn write_tokens(file: &Path) -> HashMap<Who, String> {
    let scopes = [
        (Who::Default, "write: refs/heads/main"),
        (
            Who::Base,
            "write: refs/heads/release\n  read: [refs/heads/main]",
        ),
        (
            Who::PullRequest,
            "write: refs/pull/1/merge\n  read: [refs/heads/release, refs/heads/main]",
        ),
        (Who::ReadOnly, "read: [refs/heads/main]"),
    ];
    let lines = scopes.map(|(who, scopes)| format!("- token: {who:?}-token\n  {scopes}\n"));
    std::fs::write(file, lines.concat()).unwrap();
    let tokens = scopes.map(|(who, _)| (who, format!("{who:?}-token")));
    tokens.into_iter().collect()
}

/// Services on `database` and a bucket, each a process. They have all behaviours, or without
/// `real_clients` those that need none.
async fn replicas_have_behaviours(count: usize, database: Option<&str>, real_clients: bool) {
    let bucket = S3::start(&tools::s3());
    let folders: Vec<tempfile::TempDir> =
        (0..count).map(|_| tempfile::tempdir().unwrap()).collect();
    let file = folders[0].path().join("tokens.yaml");
    let tokens = write_tokens(&file);
    let mut arguments = vec![
        "--token-file",
        file.to_str().unwrap(),
        "--blobs",
        "s3://bucket/cache",
        "--s3-endpoint",
        &bucket.url,
        "--s3-region",
        "us-east-1",
    ];
    arguments.extend(database.iter().flat_map(|url| ["--database", url]));
    let environment = [
        ("AWS_ACCESS_KEY_ID", s3::ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", s3::SECRET_KEY),
    ];
    let services: Vec<Served> = folders
        .iter()
        .map(|folder| Served::with_environment(folder.path(), &arguments, &environment))
        .collect();
    let urls = services.iter().map(|service| service.url.clone());
    let target = Target::new(urls.collect(), tokens);
    if real_clients {
        conformance::run_all(&target).await;
    } else {
        conformance::run_raw(&target).await;
    }
    for service in services {
        let log = service.log();
        assert!(!log.contains("ERROR"), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_with_its_blobs_in_a_bucket_has_all_its_behaviours() {
    // Real clients try a bucket below, and SQLite above.
    replicas_have_behaviours(1, None, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_services_on_one_database_and_one_bucket_have_all_behaviours_of_one() {
    let postgres = Postgres::shared();
    let database = postgres.new_database().await;
    replicas_have_behaviours(2, Some(&database), true).await;
}

#[test]
fn each_behaviour_is_documented_and_each_that_is_documented_is_tested() {
    let text = include_str!("../../docs/cache-service.md");
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
