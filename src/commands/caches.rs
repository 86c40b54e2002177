//! The commands `caches list` and `caches prune`: they list the entries of this action in a
//! repository's cache, and delete those that are not needed.
//!
//! Functions of values select the entries to delete. They select an entry of another tool only by
//! its exact key.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use clap::{ArgGroup, Args};
use serde_json::{Value, json};

use crate::clock::Timestamp;
use crate::format::{pluralize, relative_time, size};
use crate::github::caches::{ApiError, CacheEntry, Caches, Filter, Repository, RepositoryError};
use crate::github::{self, API_URL, ClientError};
use crate::http::{self, Timeouts};
use crate::packs::chain::{PREFIX, PackName};
use crate::packs::index::ObjectKey;
use crate::packs::local_file::read_limited;
use crate::runner::environment::Environment;

/// The largest file with a token, in bytes.
const TOKEN_FILE_LIMIT: u64 = 64 << 10;

/// Which repository, and with what token.
#[derive(Clone, Debug, Default, Args)]
pub struct ApiAccess {
    /// The repository, as owner/name; without it GITHUB_REPOSITORY
    #[arg(long, value_name = "OWNER/NAME")]
    pub repo: Option<String>,
    /// A file with a token for GitHub's API. The default is GITHUB_TOKEN, then GH_TOKEN. Listing
    /// needs `actions: read`, deleting `actions: write`
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// The options of `caches list`.
#[derive(Clone, Debug, Default, Args)]
pub struct ListOptions {
    /// Which repository, and with what token.
    #[command(flatten)]
    pub access: ApiAccess,
    /// Only entries whose key begins with PREFIX
    #[arg(long, value_name = "PREFIX")]
    pub key: Option<String>,
    /// Only entries of this ref, such as refs/heads/main
    #[arg(long = "ref", value_name = "REF")]
    pub reference: Option<String>,
    /// Also entries that are not this action's packs
    #[arg(long)]
    pub all: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// The options of `caches prune`. At least one of the first options says it.
#[derive(Clone, Debug, Default, Args)]
#[command(group(
    ArgGroup::new("what")
        .required(true)
        .multiple(true)
        .args(["unused", "merged", "namespace", "objects", "key"])
))]
pub struct PruneOptions {
    /// Which repository, and with what token.
    #[command(flatten)]
    pub access: ApiAccess,
    /// Packs that no job has read for this time, such as 7d
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub unused: Option<Duration>,
    /// Packs of closed pull requests, and of deleted branches and tags. Asks GitHub about each ref,
    /// which also needs `pull-requests: read` and `contents: read`
    #[arg(long)]
    pub merged: bool,
    /// Only packs of this namespace (`default` is the one without a name): all of them, or those
    /// that --unused and --merged select
    #[arg(long)]
    pub namespace: Option<String>,
    /// Instead of packs, the entries that sccache itself made, one for each object (mode direct):
    /// all of them, or those that --unused and --merged select
    #[arg(long, conflicts_with = "namespace")]
    pub objects: bool,
    /// The entries with exactly this key, also those of other tools. Repeatable
    #[arg(long, value_name = "KEY", conflicts_with_all = ["unused", "merged", "namespace", "objects"])]
    pub key: Vec<String>,
    /// Delete the entries (default: dry run)
    #[arg(long)]
    pub yes: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Why a command did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CachesError {
    /// No repository was given.
    #[error("no repository: pass --repo OWNER/NAME or set GITHUB_REPOSITORY")]
    NoRepository,
    /// The given name is no repository.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// There is no token.
    #[error("no token for GitHub's API: set GITHUB_TOKEN or GH_TOKEN, or pass --token-file FILE")]
    NoToken,
    /// The file with the token cannot be read.
    #[error("{}: {error}", path.display())]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        error: io::Error,
    },
    /// The token cannot be sent.
    #[error(
        "the token in GITHUB_TOKEN, GH_TOKEN or the file of --token-file has a line break, a blank or a \
         letter beyond ASCII"
    )]
    Token,
    /// The API's address is none.
    #[error("GITHUB_API_URL is `{0}`, but it must be a URL such as {API_URL}")]
    Url(String),
    /// There is no client for the API.
    #[error("cannot create a client for GitHub's API: {0}")]
    Client(String),
    /// The API refused or failed.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// The kind of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A pack of this action's.
    Pack(PackName),
    /// An entry that sccache made for one object, or to test the cache.
    Object,
    /// An entry of another tool.
    Other,
}

impl Kind {
    /// Classifies an entry by its key and its ref. In doubt another tool's.
    pub fn of(entry: &CacheEntry) -> Self {
        if let Some(name) = PackName::parse(&entry.key, entry.reference.as_deref()) {
            return Self::Pack(name);
        }
        if is_sccache_key(&entry.key) {
            Self::Object
        } else {
            Self::Other
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Pack(_) => "pack",
            Self::Object => "object",
            Self::Other => "other",
        }
    }
}

/// Whether sccache made an entry of this key: `sccache/a/b/c/abc…` with the 64 digits of an
/// object's key (`src/cache/gha.rs` and `normalize_key` of sccache), or its test entry.
fn is_sccache_key(key: &str) -> bool {
    let Some(rest) = key.strip_prefix("sccache/") else {
        return false;
    };
    if rest == ".sccache_check" {
        return true;
    }
    let parts: Vec<&str> = rest.split('/').collect();
    let [a, b, c, object] = parts.as_slice() else {
        return false;
    };
    object.parse::<ObjectKey>().is_ok()
        && [a, b, c].iter().all(|part| part.len() == 1)
        && object.starts_with(&[*a, *b, *c].concat())
}

/// An entry to delete, and the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selected {
    /// The entry.
    pub entry: CacheEntry,
    /// The reason.
    pub reason: &'static str,
}

/// The entries that `options` ask to delete, in the order of `entries`. `gone` are the refs that no
/// longer exist.
pub fn select(
    entries: &[CacheEntry],
    options: &PruneOptions,
    gone: &BTreeSet<String>,
    now: Timestamp,
) -> Vec<Selected> {
    let reason = |entry: &CacheEntry| {
        if !options.key.is_empty() {
            return options.key.contains(&entry.key).then_some("named by --key");
        }
        match (Kind::of(entry), options.objects) {
            (Kind::Pack(name), false) => {
                let namespace = options.namespace.as_ref();
                namespace
                    .is_none_or(|namespace| name.is_of(namespace))
                    .then_some(())?;
            }
            (Kind::Object, true) => {}
            _ => return None,
        }
        let reference = entry.reference.as_ref();
        if options.merged && reference.is_some_and(|reference| gone.contains(reference)) {
            return Some("its ref no longer exists");
        }
        let unused = now.since(entry.used);
        match options.unused {
            Some(limit) => (unused >= limit).then_some("unused for too long"),
            None if options.merged => None,
            None if options.objects => Some("written by sccache itself"),
            None => Some("in that namespace"),
        }
    };
    entries
        .iter()
        .filter_map(|entry| {
            Some(Selected {
                reason: reason(entry)?,
                entry: entry.clone(),
            })
        })
        .collect()
}

/// The refs of the entries that `options` could select. GitHub must be asked about these.
fn refs_to_ask_for(entries: &[CacheEntry], options: &PruneOptions) -> BTreeSet<String> {
    let any = PruneOptions {
        unused: None,
        merged: false,
        ..options.clone()
    };
    select(entries, &any, &BTreeSet::new(), Timestamp::UNIX_EPOCH)
        .into_iter()
        .filter_map(|chosen| chosen.entry.reference)
        .collect()
}

fn total(entries: &[CacheEntry]) -> u64 {
    let sizes = entries.iter().map(|entry| entry.size);
    sizes.fold(0, u64::saturating_add)
}

/// The entries as a table, with their sum.
pub fn table(entries: &[CacheEntry], now: Timestamp) -> String {
    let since = |then: Timestamp| relative_time(now.since(then));
    let mut rows = vec![["KEY", "REF", "SIZE", "AGE", "LAST USED"].map(str::to_owned)];
    rows.extend(entries.iter().map(|entry| {
        [
            printable(&entry.key),
            printable(entry.reference.as_deref().unwrap_or("-")),
            size(entry.size),
            since(entry.created),
            since(entry.used),
        ]
    }));
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            let _ = match column {
                0 | 1 => write!(line, "{cell:<width$}  "),
                _ => write!(line, "{cell:>width$}  "),
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    let count = entries.len() as u64;
    let _ = writeln!(
        text,
        "\n{}, {}",
        pluralize(count, "entry"),
        size(total(entries))
    );
    text
}

/// A key as text that does nothing to a terminal.
fn printable(text: &str) -> String {
    let plain = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(plain).collect()
}

/// The last time that RFC 3339 can write, in the year 9999.
const LAST_WRITABLE: Timestamp = Timestamp::from_seconds(253_402_300_799);

fn rfc3339(time: Timestamp) -> String {
    let since_1970 = time.min(LAST_WRITABLE).since(Timestamp::UNIX_EPOCH);
    humantime::format_rfc3339_seconds(UNIX_EPOCH + since_1970).to_string()
}

/// An entry in JSON: `id`, `key`, `ref`, `kind` (`pack`, `object`, `other`), `size` in bytes,
/// `created` and `last_used` as RFC 3339 has times, and of a pack `namespace`, `platform`, `number`.
fn entry_json(entry: &CacheEntry) -> Value {
    let kind = Kind::of(entry);
    let mut value = json!({
        "id": entry.id,
        "key": entry.key,
        "ref": entry.reference,
        "kind": kind.name(),
        "size": entry.size,
        "created": rfc3339(entry.created),
        "last_used": rfc3339(entry.used),
    });
    if let Kind::Pack(name) = kind {
        value["namespace"] = name.namespace.into();
        value["platform"] = name.platform.into();
        value["number"] = name.number.into();
    }
    value
}

/// The entries in JSON, with their sum in bytes.
pub fn list_json(repository: &Repository, entries: &[CacheEntry]) -> Value {
    json!({
        "repository": repository.to_string(),
        "total_bytes": total(entries),
        "entries": entries.iter().map(entry_json).collect::<Vec<_>>(),
    })
}

impl ApiAccess {
    fn repository(&self, environment: &Environment) -> Result<Repository, CachesError> {
        let named = self
            .repo
            .as_deref()
            .or_else(|| environment.get("GITHUB_REPOSITORY"));
        Ok(named.ok_or(CachesError::NoRepository)?.parse()?)
    }

    fn token(&self, environment: &Environment) -> Result<String, CachesError> {
        let Some(path) = &self.token_file else {
            let token = environment
                .get("GITHUB_TOKEN")
                .or_else(|| environment.get("GH_TOKEN"));
            return token.map(str::to_owned).ok_or(CachesError::NoToken);
        };
        let text = read(path)?;
        match text.trim() {
            "" => Err(CachesError::NoToken),
            token => Ok(token.to_owned()),
        }
    }

    fn caches(&self, environment: &Environment) -> Result<(Repository, Caches), CachesError> {
        let repository = self.repository(environment)?;
        let token = self.token(environment)?;
        let client = |error: &dyn std::fmt::Display| CachesError::Client(error.to_string());
        let http = http::build(Timeouts::default()).map_err(|error| client(&error))?;
        let api_url = environment.get("GITHUB_API_URL").unwrap_or(API_URL);
        let octocrab =
            github::client(http, api_url, Some(&token)).map_err(|error| match error {
                ClientError::Url(url) => CachesError::Url(url),
                ClientError::Token => CachesError::Token,
                error @ ClientError::Octocrab(_) => client(&error),
            })?;
        Ok((repository.clone(), Caches::new(octocrab, repository)))
    }
}

fn read(path: &Path) -> Result<String, CachesError> {
    let failed = |error| CachesError::TokenFile {
        path: path.to_owned(),
        error,
    };
    let bytes = read_limited(path, TOKEN_FILE_LIMIT).map_err(|error| match error.kind() {
        io::ErrorKind::FileTooLarge => failed(io::Error::other("the file is larger than 64 KiB")),
        _ => failed(error),
    })?;
    String::from_utf8(bytes).map_err(|error| failed(io::Error::other(error)))
}

/// Runs `caches list`. Returns the text to print.
///
/// # Errors
/// Fails if the list is unavailable.
pub async fn list(environment: &Environment, options: &ListOptions) -> Result<String, CachesError> {
    let (repository, caches) = options.access.caches(environment)?;
    let packs = (!options.all).then(|| PREFIX.to_owned());
    let filter = Filter {
        key: options.key.clone().or(packs),
        reference: options.reference.clone(),
    };
    let mut entries = caches.list(&filter).await?;
    if !options.all {
        entries.retain(|entry| matches!(Kind::of(entry), Kind::Pack(_)));
    }
    Ok(if options.json {
        format!("{:#}\n", list_json(&repository, &entries))
    } else {
        table(&entries, Timestamp::now())
    })
}

/// The result of `caches prune`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pruned {
    /// The text to print.
    pub text: String,
    /// Whether all that was to go is gone.
    pub complete: bool,
}

/// Runs `caches prune`.
///
/// # Errors
/// Fails if it cannot be known what to delete. The result names an entry that could not be deleted,
/// and the entries that were left because of it.
pub async fn prune(
    environment: &Environment,
    options: &PruneOptions,
) -> Result<Pruned, CachesError> {
    let (repository, caches) = options.access.caches(environment)?;
    let mut entries = Vec::new();
    if options.key.is_empty() {
        let prefix = if options.objects { "sccache/" } else { PREFIX };
        let filter = Filter {
            key: Some(prefix.to_owned()),
            reference: None,
        };
        entries = caches.list(&filter).await?;
    }
    for key in &options.key {
        let filter = Filter {
            key: Some(key.clone()),
            reference: None,
        };
        entries.append(&mut caches.list(&filter).await?);
    }
    let gone = if options.merged {
        caches.gone(&refs_to_ask_for(&entries, options)).await?
    } else {
        BTreeSet::new()
    };
    let now = Timestamp::now();
    let mut seen = BTreeSet::new();
    let mut chosen = select(&entries, options, &gone, now);
    chosen.retain(|chosen| seen.insert(chosen.entry.id));
    let (mut done, mut failed) = (Vec::new(), None);
    if options.yes {
        for Selected { entry, .. } in &chosen {
            match caches.delete(entry).await {
                Ok(was_there) => done.push((entry.clone(), was_there)),
                Err(error) => {
                    // The same error would hit the other entries.
                    failed = Some(format!("{}: {error}", printable(&entry.key)));
                    break;
                }
            }
        }
    }
    let complete = failed.is_none();
    let outcome = PruneOutcome {
        chosen: &chosen,
        done: options.yes.then_some(done.as_slice()),
        failed,
    };
    let text = if options.json {
        format!("{:#}\n", outcome.json(&repository))
    } else {
        outcome.text(now)
    };
    Ok(Pruned { text, complete })
}

/// The outcome of a prune.
struct PruneOutcome<'a> {
    chosen: &'a [Selected],
    /// The deleted entries, each with whether it still existed before; `None` in a dry run.
    done: Option<&'a [(CacheEntry, bool)]>,
    failed: Option<String>,
}

impl PruneOutcome<'_> {
    fn json(&self, repository: &Repository) -> Value {
        let chosen = self.chosen.iter().map(|chosen| {
            let mut value = entry_json(&chosen.entry);
            let done = self.done.unwrap_or_default();
            let deleted = done.iter().any(|(entry, _)| entry.id == chosen.entry.id);
            value["reason"] = chosen.reason.into();
            value["deleted"] = deleted.into();
            value
        });
        json!({
            "repository": repository.to_string(),
            "dry_run": self.done.is_none(),
            "total_bytes": total(&self.entries()),
            "entries": chosen.collect::<Vec<_>>(),
            "error": self.failed,
        })
    }

    fn entries(&self) -> Vec<CacheEntry> {
        let chosen = self.chosen.iter();
        chosen.map(|chosen| chosen.entry.clone()).collect()
    }

    fn text(&self, now: Timestamp) -> String {
        if self.chosen.is_empty() {
            return "There is nothing to delete.\n".to_owned();
        }
        let mut text = table(&self.entries(), now);
        let Some(done) = self.done else {
            text.push_str("Nothing was deleted. Pass --yes to delete these entries.\n");
            return text;
        };
        let deleted: Vec<CacheEntry> = done
            .iter()
            .filter(|(_, was_there)| *was_there)
            .map(|(entry, _)| entry.clone())
            .collect();
        let count = deleted.len() as u64;
        let _ = writeln!(
            text,
            "Deleted {}, {}.",
            pluralize(count, "entry"),
            size(total(&deleted))
        );
        let vanished = done.len() as u64 - count;
        if vanished > 0 {
            let _ = writeln!(text, "{} already deleted.", pluralize(vanished, "entry"));
        }
        if let Some(failed) = &self.failed {
            let left = (self.chosen.len() - done.len()) as u64;
            let _ = writeln!(text, "{} not deleted: {failed}", pluralize(left, "entry"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packs::chain::EntryKeys;

    const DAY: u64 = 86_400;
    const NOW: Timestamp = Timestamp::from_seconds(1_000 * DAY);

    fn entry(id: i64, key: &str, reference: &str, days_unused: u64) -> CacheEntry {
        CacheEntry {
            id,
            key: key.to_owned(),
            reference: Some(reference.to_owned()),
            size: 1_000,
            created: NOW - Duration::from_secs(20 * DAY),
            used: NOW - Duration::from_secs(days_unused * DAY),
        }
    }

    fn pack(id: i64, namespace: &str, reference: &str, days_unused: u64) -> CacheEntry {
        let key = EntryKeys::new(namespace, "linux-x64", reference).key(1);
        entry(id, &key, reference, days_unused)
    }

    fn object(id: i64, days_unused: u64) -> CacheEntry {
        let key = format!("sccache/0/a/0/{}", "0a".repeat(32));
        entry(id, &key, "refs/heads/main", days_unused)
    }

    fn entries() -> Vec<CacheEntry> {
        vec![
            pack(1, "default", "refs/heads/main", 1),
            pack(2, "default", "refs/pull/7/merge", 8),
            pack(3, "nightly", "refs/pull/7/merge", 2),
            object(4, 9),
            object(5, 0),
            entry(6, "cargo-registry-linux", "refs/heads/main", 99),
            entry(7, "sccache-packs/mine", "refs/heads/main", 99),
            entry(8, "sccache/of-mine", "refs/heads/main", 99),
        ]
    }

    fn ids(options: &PruneOptions, gone: &[&str]) -> Vec<i64> {
        let gone = gone.iter().map(|gone| (*gone).to_owned()).collect();
        let chosen = select(&entries(), options, &gone, NOW);
        chosen.into_iter().map(|chosen| chosen.entry.id).collect()
    }

    fn unused(days: u64) -> PruneOptions {
        PruneOptions {
            unused: Some(Duration::from_secs(days * DAY)),
            ..PruneOptions::default()
        }
    }

    #[test]
    fn each_option_chooses_what_it_says_and_no_others_entry() {
        let merged = PruneOptions {
            merged: true,
            ..PruneOptions::default()
        };
        let namespace = |namespace: &str, options: PruneOptions| PruneOptions {
            namespace: Some(namespace.to_owned()),
            ..options
        };
        let objects = |options: PruneOptions| PruneOptions {
            objects: true,
            ..options
        };
        let gone = ["refs/pull/7/merge"];
        assert_eq!(ids(&unused(7), &[]), [2]);
        assert_eq!(ids(&unused(0), &[]), [1, 2, 3]);
        assert_eq!(ids(&merged, &gone), [2, 3]);
        assert_eq!(ids(&merged, &[]), [] as [i64; 0]);
        assert_eq!(
            ids(&namespace("nightly", PruneOptions::default()), &[]),
            [3]
        );
        assert_eq!(ids(&namespace("nightly", unused(7)), &[]), [] as [i64; 0]);
        assert_eq!(ids(&namespace("default", merged.clone()), &gone), [2]);
        assert_eq!(ids(&objects(PruneOptions::default()), &[]), [4, 5]);
        assert_eq!(ids(&objects(unused(7)), &gone), [4]);
        assert_eq!(ids(&objects(merged), &gone), [] as [i64; 0]);
    }

    #[test]
    fn anothers_entry_is_chosen_by_its_whole_key_only() {
        let by_key = |key: &str| PruneOptions {
            key: vec![key.to_owned()],
            ..PruneOptions::default()
        };
        assert_eq!(ids(&by_key("cargo-registry-linux"), &[]), [6]);
        assert_eq!(ids(&by_key("cargo-registry"), &[]), [] as [i64; 0]);
    }

    #[test]
    fn refs_are_asked_for_only_where_something_could_be_chosen() {
        let options = PruneOptions {
            merged: true,
            namespace: Some("nightly".to_owned()),
            ..PruneOptions::default()
        };
        let refs = refs_to_ask_for(&entries(), &options);
        assert_eq!(refs.into_iter().collect::<Vec<_>>(), ["refs/pull/7/merge"]);
    }

    #[test]
    fn a_table_has_a_line_for_each_entry_and_the_sum() {
        let text = table(&entries()[..2], NOW);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].contains("#00000001") && lines[1].ends_with("1.0 kB  20 d        1 d"),
            "{text}"
        );
        assert_eq!(lines[4], "2 entries, 2.0 kB");
        assert!(!table(&[entry(1, "a\u{1b}[2Jb", "r", 0)], NOW).contains('\u{1b}'));
    }

    #[test]
    fn a_time_that_rfc_3339_cannot_write_is_the_last_that_it_can() {
        assert_eq!(rfc3339(NOW), "1972-09-27T00:00:00Z");
        assert_eq!(rfc3339(Timestamp::MAX), "9999-12-31T23:59:59Z");
    }

    proptest! {
        #[test]
        fn no_key_of_another_form_is_ever_chosen_without_being_named(
            key in "(sccache/|sccache-packs/)?\\PC{0,60}", days in 0..30u64,
        ) {
            let foreign = entry(1, &key, "refs/heads/main", 30);
            prop_assume!(Kind::of(&foreign) == Kind::Other);
            let gone = BTreeSet::from(["refs/heads/main".to_owned()]);
            for objects in [false, true] {
                for merged in [false, true] {
                    let options = PruneOptions { objects, merged, ..unused(days) };
                    prop_assert!(select(std::slice::from_ref(&foreign), &options, &gone, NOW).is_empty());
                }
            }
        }
    }
}
