//! `caches list` and `caches prune` as processes, against GitHub's API in small.

use std::collections::{BTreeMap, VecDeque};
use std::process::Command;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::support::runner::assert_no_foreign_command;

const TOKEN: &str = "hunter2";

/// A fault that replaces the answer to a request.
#[derive(Clone)]
struct Fault {
    status: u16,
    headers: &'static [(&'static str, &'static str)],
    body: &'static str,
}

impl Fault {
    fn status(status: u16) -> Self {
        Self {
            status,
            headers: &[],
            body: r#"{"message":"because"}"#,
        }
    }
}

#[derive(Default)]
struct Inner {
    entries: Vec<Value>,
    /// The state of each pull request, and the refs that there are.
    pulls: BTreeMap<u64, &'static str>,
    refs: Vec<&'static str>,
    /// The answers to requests of a method, in order; `None` is the right answer.
    faults: BTreeMap<&'static str, VecDeque<Option<Fault>>>,
    ignores_filters: bool,
    asked: Vec<String>,
}

/// GitHub's API of one repository, under a path as Enterprise Server has it.
struct Api {
    inner: Arc<Mutex<Inner>>,
    url: String,
    _runtime: Runtime,
}

impl Api {
    fn start(entries: Vec<Value>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let inner = Arc::new(Mutex::new(Inner {
            entries,
            ..Inner::default()
        }));
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}/api/v3", listener.local_addr().unwrap());
        let router = Router::new().fallback(answer).with_state(inner.clone());
        runtime.spawn(axum::serve(listener, router).into_future());
        Self {
            inner,
            url,
            _runtime: runtime,
        }
    }

    fn fault(&self, method: &'static str, faults: impl IntoIterator<Item = Option<Fault>>) {
        let mut inner = self.inner.lock().unwrap();
        inner.faults.entry(method).or_default().extend(faults);
    }

    fn set(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner.lock().unwrap());
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sccache-action"));
        command
            .args(arguments)
            .env_clear()
            .env("GITHUB_API_URL", &self.url)
            .env("GITHUB_REPOSITORY", "some/where")
            .env("GITHUB_TOKEN", TOKEN);
        command
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        Ran::of(&mut self.command(arguments))
    }

    fn asked(&self, method: &str) -> Vec<String> {
        let inner = self.inner.lock().unwrap();
        let asked = inner.asked.iter();
        let asked = asked.filter_map(|asked| asked.strip_prefix(method)?.strip_prefix(' '));
        asked.map(str::to_owned).collect()
    }

    fn ids(&self) -> Vec<u64> {
        let inner = self.inner.lock().unwrap();
        let ids = inner.entries.iter().map(|entry| entry["id"].as_u64());
        ids.map(Option::unwrap).collect()
    }
}

async fn answer(State(inner): State<Arc<Mutex<Inner>>>, request: Request) -> Response {
    let mut inner = inner.lock().unwrap();
    let (method, uri) = (request.method().clone(), request.uri().clone());
    inner.asked.push(format!("{method} {uri}"));
    if !is_admitted(request.headers()) {
        return (StatusCode::UNAUTHORIZED, r#"{"message":"Bad credentials"}"#).into_response();
    }
    let faults = inner.faults.get_mut(method.as_str());
    if let Some(fault) = faults.and_then(VecDeque::pop_front).flatten() {
        let mut headers = HeaderMap::new();
        for (name, value) in fault.headers {
            headers.insert(*name, value.parse().unwrap());
        }
        let status = StatusCode::from_u16(fault.status).unwrap();
        return (status, headers, fault.body).into_response();
    }
    let not_found = || (StatusCode::NOT_FOUND, r#"{"message":"Not Found"}"#).into_response();
    let Some(path) = uri.path().strip_prefix("/api/v3/repos/some/where/") else {
        return not_found();
    };
    let query: BTreeMap<String, String> =
        url::form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes())
            .into_owned()
            .collect();
    if let Some(id) = path.strip_prefix("actions/caches/") {
        let before = inner.entries.len();
        let id: u64 = id.parse().unwrap();
        inner.entries.retain(|entry| entry["id"] != id);
        return if method == Method::DELETE && inner.entries.len() < before {
            StatusCode::NO_CONTENT.into_response()
        } else {
            not_found()
        };
    }
    if let Some(number) = path.strip_prefix("pulls/") {
        let state = inner.pulls.get(&number.parse().unwrap());
        return state.map_or_else(not_found, |state| {
            json!({ "number": 7, "state": state, "title": "t" })
                .to_string()
                .into_response()
        });
    }
    if let Some(begin) = path.strip_prefix("git/matching-refs/") {
        let begin = format!("refs/{begin}");
        let refs = inner.refs.iter().filter(|name| name.starts_with(&begin));
        let refs: Vec<Value> = refs.map(|name| json!({ "ref": name })).collect();
        return Value::from(refs).to_string().into_response();
    }
    if path != "actions/caches" {
        return not_found();
    }
    page(&inner, &query).to_string().into_response()
}

fn is_admitted(headers: &HeaderMap) -> bool {
    let header = headers.get("authorization");
    header.is_some_and(|value| value == &format!("Bearer {TOKEN}"))
}

fn page(inner: &Inner, query: &BTreeMap<String, String>) -> Value {
    let get = |name: &str| query.get(name).map(String::as_str);
    let number = |name: &str| get(name).unwrap().parse::<usize>().unwrap();
    let entries = inner.entries.iter().filter(|entry| {
        let begins = |key: &str| entry["key"].as_str().unwrap().starts_with(key);
        inner.ignores_filters
            || (get("key").is_none_or(begins)
                && get("ref").is_none_or(|reference| entry["ref"] == reference))
    });
    let entries: Vec<Value> = entries.cloned().collect();
    let per_page = number("per_page");
    let page = entries.iter().skip((number("page") - 1) * per_page);
    json!({
        "total_count": entries.len(),
        "actions_caches": page.take(per_page).collect::<Vec<_>>(),
    })
}

struct Ran {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let ran = Self {
            status: output.status.code().unwrap(),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        };
        for said in [&ran.stdout, &ran.stderr] {
            assert!(!said.contains(TOKEN), "{said}");
            assert_no_foreign_command(said);
        }
        ran
    }

    #[track_caller]
    fn done(self) -> String {
        assert_eq!(self.status, 0, "{}{}", self.stdout, self.stderr);
        self.stdout
    }

    /// The command's error message.
    #[track_caller]
    fn failed(self) -> String {
        assert_eq!(self.status, 3, "{}{}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "");
        self.stderr
    }
}

fn entry(id: u64, key: &str, reference: &str) -> Value {
    json!({
        "id": id,
        "ref": reference,
        "key": key,
        "version": "0a".repeat(32),
        "created_at": "2020-01-02T03:04:05.678Z",
        "last_accessed_at": "2020-01-09T03:04:05Z",
        "size_in_bytes": 1_000_000,
    })
}

fn fresh(mut entry: Value) -> Value {
    // Later than any clock says.
    entry["last_accessed_at"] = "2999-01-01T00:00:00Z".into();
    entry
}

fn pack(id: u64, namespace: &str, reference: &str) -> Value {
    let key = format!("sccache-packs/{namespace}/linux-x64/{reference}#{id:08}");
    entry(id, &key, reference)
}

/// Two unused packs, of a branch and of a pull request; a used one; one of another namespace; an
/// object of sccache's; and entries of other tools.
fn some() -> Vec<Value> {
    let main = "refs/heads/main";
    let object = format!("sccache/0/a/0/{}", "0a".repeat(32));
    vec![
        pack(1, "default", main),
        pack(2, "default", "refs/pull/7/merge"),
        fresh(pack(3, "default", main)),
        pack(4, "nightly", "refs/heads/gone"),
        entry(5, &object, main),
        entry(6, "sccache/.sccache_check", main),
        entry(7, "cargo-registry", main),
        entry(8, "sccache-packs-of-mine", main),
        entry(9, "sccache/mine", main),
    ]
}

#[test]
fn neither_keys_nor_errors_give_the_runner_a_command() {
    let foreign = "##[set-output name=path]/tmp/evil";
    let key = format!("sccache-packs/{foreign}\n::set-output name=path::/tmp/evil");
    let api = Api::start(vec![entry(1, &key, &format!("refs/heads/{foreign}"))]);
    let table = api.run(&["caches", "list", "--all"]).done();
    assert!(table.contains("set-output"), "{table}");
    let json = api.run(&["caches", "list", "--all", "--json"]).done();
    let value: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(value["entries"][0]["key"], key.as_str());
    api.fault(
        "GET",
        [Some(Fault {
            body: r#"{"message":"because ##[set-output name=path]/tmp/evil"}"#,
            ..Fault::status(400)
        })],
    );
    let error = api.run(&["caches", "list"]).failed();
    assert!(error.contains("because"), "{error}");
}

#[test]
fn all_pages_are_listed_with_their_sum_and_others_entries_only_where_asked_for() {
    let mut entries = some();
    entries.extend((100..350).map(|id| pack(id, "default", "refs/heads/main")));
    let api = Api::start(entries);
    let text = api.run(&["caches", "list"]).done();
    assert!(text.contains("254 entries, 254.0 MB"), "{text}");
    assert!(text.contains("sccache-packs/default/linux-x64/refs/pull/7/merge#00000002"));
    assert!(!text.contains("cargo-registry") && !text.contains("of-mine"));
    assert_eq!(api.asked("GET").len(), 3);
    let text = api.run(&["caches", "list", "--all"]).done();
    assert!(text.contains("259 entries") && text.contains("cargo-registry"));
    let of_one = ["caches", "list", "--ref", "refs/pull/7/merge"];
    assert!(api.run(&of_one).done().contains("1 entry, 1.0 MB"));
    let by_key = ["caches", "list", "--key", "sccache-packs/nightly/"];
    assert!(api.run(&by_key).done().contains("1 entry, 1.0 MB"));
}

#[test]
fn the_list_as_json_says_what_each_entry_is() {
    let api = Api::start(some());
    let text = api.run(&["caches", "list", "--all", "--json"]).done();
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list["repository"], "some/where");
    assert_eq!(list["total_bytes"], 9_000_000);
    let kinds: Vec<&str> = list["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["kind"].as_str().unwrap())
        .collect();
    let packs = ["pack"; 4].into_iter();
    let rest = ["object", "object", "other", "other", "other"];
    assert_eq!(kinds, packs.chain(rest).collect::<Vec<_>>());
    let second = &list["entries"][1];
    assert_eq!(second["namespace"], "default");
    assert_eq!(
        (&second["number"], &second["size"]),
        (&json!(2), &json!(1_000_000))
    );
    assert_eq!(second["last_used"], "2020-01-09T03:04:05Z");
}

#[test]
fn nothing_is_deleted_before_yes_is_said_and_then_only_what_was_shown() {
    let api = Api::start(some());
    for (options, left) in [
        (&["--unused", "7d"][..], &[3, 5, 6, 7, 8, 9][..]),
        (&["--objects"], &[3, 7, 8, 9]),
        (&["--namespace", "default"], &[7, 8, 9]),
        (&["--key", "cargo-registry"], &[8, 9]),
        (&["--key", "sccache-packs"], &[8, 9]),
    ] {
        let before = api.ids();
        let dry: Vec<&str> = ["caches", "prune"].iter().chain(options).copied().collect();
        let text = api.run(&dry).done();
        let chosen = before.len() - left.len();
        let expected = match chosen {
            0 => "There is nothing to delete".to_owned(),
            1 => "1 entry, 1.0 MB".to_owned(),
            chosen => format!("{chosen} entries, {chosen}.0 MB"),
        };
        assert!(text.contains(&expected), "{options:?}: {text}");
        assert_eq!(api.ids(), before, "{options:?}");
        let wet: Vec<&str> = dry.iter().copied().chain(["--yes"]).collect();
        let text = api.run(&wet).done();
        assert!(text.contains(&expected), "{options:?}: {text}");
        assert_eq!(api.ids(), left, "{options:?}");
    }
}

#[test]
fn a_prune_as_json_says_what_was_deleted_and_why() {
    let api = Api::start(some());
    let options = ["caches", "prune", "--unused", "7d", "--json"];
    let dry: Value = serde_json::from_str(&api.run(&options).done()).unwrap();
    assert_eq!(
        (&dry["dry_run"], &dry["total_bytes"]),
        (&json!(true), &json!(3_000_000))
    );
    assert_eq!(dry["entries"][0]["deleted"], false);
    let wet = [&options[..], &["--yes"]].concat();
    let wet: Value = serde_json::from_str(&api.run(&wet).done()).unwrap();
    assert_eq!(
        (&wet["dry_run"], &wet["error"]),
        (&json!(false), &Value::Null)
    );
    assert_eq!(wet["entries"][0]["deleted"], true);
    assert_eq!(wet["entries"][0]["reason"], "unused for too long");
}

#[test]
fn refs_that_github_calls_gone_lose_their_packs_and_others_do_not() {
    let mut entries = some();
    // A branch whose name begins like that of one that is there.
    entries.push(fresh(pack(10, "default", "refs/heads/feature")));
    entries.push(fresh(pack(11, "default", "refs/pull/8/merge")));
    let api = Api::start(entries);
    api.set(|inner| {
        inner.pulls = BTreeMap::from([(7, "closed"), (8, "open")]);
        inner.refs = vec!["refs/heads/main", "refs/heads/feature-2"];
    });
    api.run(&["caches", "prune", "--merged", "--yes"]).done();
    assert_eq!(api.ids(), [1, 3, 5, 6, 7, 8, 9, 11]);
    // Other tools' refs were none of its business, and each of the others was asked for once.
    let asked = api.asked("GET");
    let refs = asked.iter().filter(|path| !path.contains("actions/caches"));
    assert_eq!(refs.count(), 5, "{asked:?}");
}

#[test]
fn a_ref_that_cannot_be_asked_for_is_not_taken_for_gone() {
    let api = Api::start(some());
    // The pull request is not to be seen with this token.
    let text = api.run(&["caches", "prune", "--merged", "--yes"]).failed();
    assert!(text.contains("refs/pull/7/merge"), "{text}");
    assert_eq!(api.ids().len(), 9);
}

#[test]
fn an_entry_that_was_gone_already_is_no_failure() {
    let api = Api::start(some());
    api.fault("DELETE", [None, Some(Fault::status(404))]);
    let text = api
        .run(&["caches", "prune", "--unused", "7d", "--yes"])
        .done();
    assert!(text.contains("Deleted 2 entries, 2.0 MB"), "{text}");
    assert!(text.contains("1 entry already deleted"), "{text}");
}

#[test]
fn a_refusal_to_delete_ends_it_and_says_what_is_left() {
    let api = Api::start(some());
    api.fault("DELETE", [None, Some(Fault::status(403))]);
    let ran = api.run(&["caches", "prune", "--unused", "7d", "--yes"]);
    assert_eq!(ran.status, 1, "{}", ran.stderr);
    assert!(
        ran.stdout.contains("Deleted 1 entry, 1.0 MB"),
        "{}",
        ran.stdout
    );
    assert!(
        ran.stdout.contains("2 entries not deleted"),
        "{}",
        ran.stdout
    );
    assert!(ran.stdout.contains("actions: write"), "{}", ran.stdout);
    assert_eq!(api.asked("DELETE").len(), 2);
}

#[test]
fn a_limit_that_passes_is_waited_for_and_one_that_does_not_is_told() {
    let limit = |status, headers| {
        Some(Fault {
            headers,
            ..Fault::status(status)
        })
    };
    let api = Api::start(some());
    api.fault(
        "GET",
        [
            limit(429, &[("retry-after", "0")]),
            limit(403, &[("retry-after", "1")]),
            limit(
                403,
                &[("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "1")],
            ),
        ],
    );
    api.fault("DELETE", [limit(403, &[("retry-after", "0")])]);
    api.run(&["caches", "prune", "--unused", "7d", "--yes"])
        .done();
    assert_eq!(api.ids(), [3, 5, 6, 7, 8, 9]);
    assert_eq!(api.asked("GET").len(), 4);
    for headers in [
        &[("retry-after", "3600")][..],
        &[
            ("x-ratelimit-remaining", "0"),
            ("x-ratelimit-reset", "9999999999"),
        ],
    ] {
        let api = Api::start(some());
        api.fault("GET", [limit(403, headers)]);
        let text = api.run(&["caches", "list"]).failed();
        assert!(text.contains("rate limit is reached; retry in"), "{text}");
        assert_eq!(api.asked("GET").len(), 1);
    }
}

#[test]
fn a_list_that_is_not_whole_deletes_nothing() {
    let entries = || {
        (0..150)
            .map(|id| pack(id, "default", "refs/heads/main"))
            .collect()
    };
    let garbage = |body| {
        Some(Fault {
            body,
            ..Fault::status(200)
        })
    };
    for fault in [
        Some(Fault::status(500)),
        garbage("<html>"),
        garbage(r#"{"total_count":150}"#),
        garbage(r#"{"total_count":150,"actions_caches":[{"id":"x"}]}"#),
        garbage(""),
    ] {
        let api = Api::start(entries());
        api.fault("GET", [None, fault]);
        let ran = api.run(&["caches", "prune", "--unused", "7d", "--yes"]);
        assert!(ran.failed().contains("GitHub's API failed"));
        assert_eq!(api.ids().len(), 150);
    }
}

#[test]
fn a_service_that_filters_nothing_loses_no_entry_of_another_tool() {
    for options in [&["--unused", "1s"][..], &["--objects"], &["--key", "cargo"]] {
        let api = Api::start(some());
        api.set(|inner| inner.ignores_filters = true);
        let command: Vec<&str> = ["caches", "prune", "--yes"]
            .iter()
            .chain(options)
            .copied()
            .collect();
        api.run(&command).done();
        let left = api.ids();
        assert!(
            [7, 8, 9].iter().all(|id| left.contains(id)),
            "{options:?} {left:?}"
        );
    }
}

#[test]
fn a_token_comes_from_a_file_or_the_environment_and_without_one_nothing_is_asked() {
    let api = Api::start(some());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let file = file.display().to_string();
    let with_file = ["caches", "list", "--token-file", &file];
    Ran::of(api.command(&with_file).env("GITHUB_TOKEN", "wrong")).done();
    std::fs::write(&file, "x".repeat(1 << 20)).unwrap();
    let large = api.run(&with_file).failed();
    assert!(large.contains("larger than 64 KiB"), "{large}");
    let list = ["caches", "list"];
    Ran::of(
        api.command(&list)
            .env_remove("GITHUB_TOKEN")
            .env("GH_TOKEN", TOKEN),
    )
    .done();
    let wrong = Ran::of(api.command(&list).env("GITHUB_TOKEN", "wrong")).failed();
    assert!(wrong.contains("Bad credentials"), "{wrong}");
    let asked = api.asked("GET").len();
    let none = Ran::of(api.command(&list).env_remove("GITHUB_TOKEN")).failed();
    assert!(none.contains("--token-file"), "{none}");
    let nowhere = Ran::of(api.command(&list).env_remove("GITHUB_REPOSITORY")).failed();
    assert!(nowhere.contains("--repo"), "{nowhere}");
    let elsewhere = api.run(&["caches", "list", "--repo", "a/b"]).failed();
    assert!(elsewhere.contains("the repository a/b"), "{elsewhere}");
    let strange = api.run(&["caches", "list", "--repo", "../b"]).failed();
    assert!(strange.contains("OWNER/NAME"), "{strange}");
    assert_eq!(api.asked("GET").len(), asked + 1);
}
