//! The real `@actions/cache`, as steps of a workflow use it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use reqwest::Url;
use tokio::process::Command;

use super::target::{Target, Who, noise};
use crate::support::tools;

/// The variables that tell the toolkit which protocol to speak.
type Protocol = &'static [(&'static str, &'static str)];

const VERSION_2: Protocol = &[("ACTIONS_CACHE_SERVICE_V2", "1")];
const VERSION_1: Protocol = &[];
/// Version 1, whatever the other variables are.
const GHES: Protocol = &[
    ("ACTIONS_CACHE_SERVICE_V2", "1"),
    ("GITHUB_SERVER_URL", "https://ghes.example"),
];

const NEW: &str = tools::ACTIONS_CACHE;
const OLD: &str = "4.0.3";

/// A step that uses the toolkit of this release.
struct Step<'a> {
    target: &'a Target,
    release: &'static str,
    protocol: Protocol,
    who: Who,
    folder: tempfile::TempDir,
}

impl<'a> Step<'a> {
    fn new(target: &'a Target, release: &'static str, protocol: Protocol) -> Self {
        Self {
            target,
            release,
            protocol,
            who: Who::Default,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("data/file")
    }

    fn write(&self, content: &[u8]) {
        fs::create_dir_all(self.folder.path().join("data")).unwrap();
        fs::write(self.file(), content).unwrap();
    }

    async fn run(&self, arguments: &[&str]) -> String {
        let script =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/actions_cache.mjs");
        let folder = self.folder.path();
        // Each protocol has its own variable, so neither can replace the other.
        let is_v2 = self.protocol == VERSION_2;
        let url = if is_v2 {
            "ACTIONS_RESULTS_URL"
        } else {
            "ACTIONS_CACHE_URL"
        };
        let output = Command::new("node")
            .arg(script)
            .arg(tools::actions_cache(self.release))
            .args(arguments)
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap())
            .envs([
                ("HOME", folder),
                ("RUNNER_TEMP", folder),
                ("GITHUB_WORKSPACE", folder),
            ])
            .env("NO_PROXY", "127.0.0.1")
            // It logs its steps, and lists entries after a miss of version 1.
            .env("RUNNER_DEBUG", "1")
            .env("AZURE_LOG_LEVEL", "info")
            // A piece of version 1 has one MiB.
            .env("CACHE_UPLOAD_CHUNK_SIZE", "1")
            .env(url, self.target.url())
            .env("ACTIONS_RUNTIME_TOKEN", self.target.token(self.who))
            .envs(self.protocol.iter().copied())
            .current_dir(folder)
            .output()
            .await
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(output.status.success(), "{text}");
        text
    }

    async fn save(&self, key: &str) -> String {
        let text = self.run(&["save", key, "data"]).await;
        let spoken = format!(
            "Cache service version: v{}",
            1 + u8::from(self.protocol == VERSION_2)
        );
        assert!(text.contains(&spoken), "{text}");
        text
    }

    /// Saves under a key that is free.
    async fn save_new(&self, key: &str) -> String {
        let text = self.save(key).await;
        assert!(result(&text, "saved") != "-1", "{text}");
        text
    }

    /// The restored content, and the key of its entry.
    async fn restore(&self, keys: &str) -> Option<(String, Vec<u8>)> {
        let _ = fs::remove_file(self.file());
        let text = self.run(&["restore", keys, "data"]).await;
        let key = result(&text, "restored").to_owned();
        (key != "none").then(|| (key, fs::read(self.file()).unwrap()))
    }
}

/// The result of a call, from the end of the script's output.
#[track_caller]
fn result<'a>(text: &'a str, done: &str) -> &'a str {
    let mut lines = text.lines().rev();
    let result = lines.find_map(|line| line.strip_prefix(done)?.strip_prefix(' '));
    result.unwrap_or_else(|| panic!("{text}"))
}

/// Saves and restores, as a service must make it work for any toolkit.
async fn saves_and_restores(target: &Target, release: &'static str, protocol: Protocol) {
    let step = Step::new(target, release, protocol);
    let name = target.unique();
    let first = format!("{name}-1");
    let saved = Some((first.clone(), b"content".to_vec()));
    step.write(b"content");
    step.save_new(&first).await;
    assert_eq!(step.restore(&first).await, saved);
    assert_eq!(step.restore(&format!("{name}-2,{name}-")).await, saved);
    assert_eq!(step.restore(&format!("{name}-2")).await, None);
    // The second job with the same key keeps the first one's entry and goes on.
    step.write(b"other");
    let text = step.save(&first).await;
    assert!(
        result(&text, "saved") == "-1" && text.contains("another job"),
        "{text}"
    );
    assert_eq!(step.restore(&first).await, saved);
}

pub async fn speaks_version_2(target: &Target) {
    for release in [NEW, OLD] {
        saves_and_restores(target, release, VERSION_2).await;
    }
}

pub async fn speaks_version_1(target: &Target) {
    for (release, protocol) in [(NEW, GHES), (OLD, VERSION_1)] {
        saves_and_restores(target, release, protocol).await;
    }
}

pub async fn uploads_in_blocks_and_pieces(target: &Target) {
    for (protocol, size, sign, count) in [
        // Up to 128 MiB the toolkit makes one Put Blob.
        (VERSION_2, 129 << 20, "comp=block&", 3),
        (GHES, 5 << 20, "Uploading chunk of size", 5),
    ] {
        let step = Step::new(target, NEW, protocol);
        let content = noise(size);
        step.write(&content);
        let key = target.unique();
        let text = step.save_new(&key).await;
        assert!(text.matches(sign).count() >= count, "{text}");
        let (_, restored) = step.restore(&key).await.unwrap();
        assert!(restored == content);
    }
}

pub async fn downloads_as_from_azure(target: &Target) {
    // Three segments of 4 MiB.
    let content = noise(9 << 20);
    let cache = target.cache();
    cache.save("k", content.clone()).await;
    let url: Url = cache.locate("k").await.parse().unwrap();
    let step = Step::new(target, NEW, VERSION_2);
    step.write(b"");
    let file = step.file().display().to_string();
    for function in [
        "downloadCacheStorageSDK",
        "downloadCacheHttpClientConcurrent",
    ] {
        step.run(&["download", function, url.as_str(), &file]).await;
        assert!(fs::read(step.file()).unwrap() == content, "{function}");
    }
}

pub async fn goes_on_where_it_may_not_write(target: &Target) {
    let said = "::warning::Failed to save: Unable to reserve cache";
    for protocol in [VERSION_2, GHES] {
        let mut step = Step::new(target, NEW, protocol);
        step.write(b"content");
        let key = target.unique();
        step.save_new(&key).await;
        step.who = Who::ReadOnly;
        let text = step.save(&target.unique()).await;
        assert_eq!(result(&text, "saved"), "-1");
        assert!(
            text.contains(said) && text.contains("cache write denied:"),
            "{text}"
        );
        assert!(step.restore(&key).await.is_some());
    }
}
