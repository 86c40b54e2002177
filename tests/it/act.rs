//! Whole workflows under the real `act`, a runner that is not ours: those of the documents, taken out of
//! the Markdown, and those of `tests/act/jobs.yml`. Each runs twice, so that the second run has what the
//! first left.
//!
//! The jobs' logs stay in `act/` of cargo's folder for tests, so that the gate can show them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::support::runner::{all_files, binary};
use crate::support::served::Served;
use crate::support::tools;
use sccache_action::runner::environment::Environment;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// The name of this action in the documents.
const ACTION: &str = "OWNER/sccache-action@v1";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All documents.
fn documents() -> Vec<PathBuf> {
    let beside = fs::read_dir(root()).unwrap();
    let beside = beside.map(|entry| entry.unwrap().path());
    let all = beside.chain(all_files(&root().join("docs")));
    all.filter(|path| path.extension().is_some_and(|ending| ending == "md"))
        .collect()
}

/// The workflows in the documents: a name, and a job without what every job has.
fn documented() -> BTreeMap<String, Map<String, Value>> {
    let workflows = documents().into_iter().flat_map(|document| {
        let name = document.strip_prefix(root()).unwrap().with_extension("");
        let name = name.display().to_string().replace('/', "-");
        let name = name.strip_prefix("docs-").unwrap_or(&name).to_owned();
        workflows_in(&name, &fs::read_to_string(document).unwrap())
    });
    workflows.collect()
}

/// The workflows in a Markdown text, which is called `name`.
fn workflows_in(name: &str, markdown: &str) -> BTreeMap<String, Map<String, Value>> {
    let mut found = BTreeMap::new();
    for (line, language, text) in fences(markdown) {
        if !text.contains("uses:") {
            continue;
        }
        let states = match language.as_str() {
            "yaml" | "yml" => vec![("", text)],
            // Both what a workflow was and what it becomes.
            "diff" => vec![("-before", side(&text, '-')), ("-after", side(&text, '+'))],
            _ => panic!("{name}, line {line}: a workflow that is not marked as yaml or diff"),
        };
        for (state, text) in states {
            if text.contains("uses:") {
                found.insert(format!("{name}-{line}{state}"), job_of(&text));
            }
        }
    }
    found
}

#[test]
fn each_workflow_of_a_document_is_taken_out_of_it() {
    let text = "# T\n\n```yaml\n- uses: OWNER/sccache-action@v1\n```\n\n\
                ```diff\n-- uses: a/b@v1\n+- uses: OWNER/sccache-action@v1\n```\n\n\
                ```yaml\non: push\n```\n";
    let found = workflows_in("t", text);
    let names: Vec<&str> = found.keys().map(String::as_str).collect();
    assert_eq!(names, ["t-3", "t-7-after", "t-7-before"]);
    let first = uses(&found["t-3"]).collect::<Vec<_>>();
    assert_eq!(first, ["actions/checkout@v5", ACTION]);
    let unmarked = || workflows_in("t", "```\n- uses: OWNER/sccache-action@v1\n```\n");
    assert!(std::panic::catch_unwind(unmarked).is_err());
}

/// The fenced blocks of a Markdown text: the line that each begins at, its language, and its
/// content.
fn fences(markdown: &str) -> Vec<(usize, String, String)> {
    let mut found = Vec::new();
    let mut open: Option<(usize, String, String)> = None;
    for (number, line) in (1..).zip(markdown.lines()) {
        match (line.trim_start().strip_prefix("```"), &mut open) {
            (Some(language), None) => {
                open = Some((number, language.to_owned(), String::new()));
            }
            (Some(_), block) => found.extend(block.take()),
            (None, Some((_, _, text))) => {
                text.push_str(line);
                text.push('\n');
            }
            (None, None) => {}
        }
    }
    found
}

/// One side of a diff.
fn side(diff: &str, sign: char) -> String {
    let lines = diff.lines().filter_map(|line| {
        let mut rest = line.chars();
        let first = rest.next()?;
        (first == ' ' || first == sign).then_some(rest.as_str())
    });
    lines.fold(String::new(), |text, line| text + line + "\n")
}

/// A job of what a document shows: its keys, or its steps alone, which may be those after the checkout.
fn job_of(text: &str) -> Map<String, Value> {
    let mut job = match serde_yaml::from_str(text).unwrap() {
        Value::Object(job) => job,
        steps => Map::from_iter([("steps".to_owned(), steps)]),
    };
    let checkout = "actions/checkout@";
    if !uses(&job).any(|uses| uses.starts_with(checkout))
        && let Some(Value::Array(steps)) = job.get_mut("steps")
    {
        steps.insert(0, json!({ "uses": format!("{checkout}v5") }));
    }
    job
}

fn steps(job: &Map<String, Value>) -> &[Value] {
    job["steps"].as_array().unwrap()
}

fn runs(job: &Map<String, Value>, what: &str) -> bool {
    let commands = steps(job).iter().filter_map(|step| step["run"].as_str());
    commands.into_iter().any(|command| command.contains(what))
}

fn uses(job: &Map<String, Value>) -> impl Iterator<Item = &str> {
    steps(job).iter().filter_map(|step| step["uses"].as_str())
}

fn names_workspaces(job: &Map<String, Value>) -> bool {
    let mut steps = steps(job).iter();
    steps.any(|step| step["with"].get("cargo-workspaces").is_some())
}

/// The part of a job's compiles that is the same each time: in Rust only dependencies, since the
/// workspace's own code is in the cache for its folder, which differs each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compiles {
    C,
    Rust,
    Nothing,
}

/// The work of a job, and its expected result.
struct Job {
    keys: Map<String, Value>,
    compiles: Compiles,
    succeeds: bool,
}

fn jobs() -> BTreeMap<String, Job> {
    let mut jobs = BTreeMap::new();
    for (name, keys) in documented() {
        // The states that other actions left, of which this action takes over one as it stands.
        let is_ours = uses(&keys).any(is_this_action);
        let compiles = match () {
            () if runs(&keys, "cmake") => Compiles::C,
            // The build is not always in the workspaces of a document's example.
            () if runs(&keys, "cargo") && !names_workspaces(&keys) => Compiles::Rust,
            () => Compiles::Nothing,
        };
        if is_ours {
            jobs.insert(
                name,
                Job {
                    keys,
                    compiles,
                    succeeds: true,
                },
            );
        }
    }
    assert!(jobs.len() >= 6, "{:?}", jobs.keys());
    let text = fs::read_to_string(root().join("tests/act/jobs.yml")).unwrap();
    let own: BTreeMap<String, Map<String, Value>> = serde_yaml::from_str(&text).unwrap();
    for (name, keys) in own {
        let compiles = match name.as_str() {
            "strict" | "lenient" => Compiles::Nothing,
            _ => Compiles::C,
        };
        let succeeds = !["strict", "failing-step"].contains(&name.as_str());
        jobs.insert(
            name,
            Job {
                keys,
                compiles,
                succeeds,
            },
        );
    }
    jobs
}

/// Whether a step uses this action: by its own name, or by that of the action that it replaces.
fn is_this_action(uses: &str) -> bool {
    uses == ACTION || uses.starts_with("mozilla-actions/sccache-action@")
}

/// A job's log, by step.
#[derive(Default)]
struct Said {
    lines: Vec<(String, String)>,
    results: Vec<String>,
}

impl Said {
    /// The log of the action's post steps.
    fn reports(&self) -> String {
        let of_post = |(step, _): &&(String, String)| step.starts_with("Post ");
        let lines = self.lines.iter().filter(of_post);
        lines.fold(String::new(), |text, (_, line)| text + line + "\n")
    }

    fn all(&self) -> String {
        let lines = self.lines.iter();
        lines.fold(String::new(), |text, (step, line)| {
            format!("{text}{step} | {line}\n")
        })
    }
}

/// A machine with act on it: this action, a project, and what jobs leave behind.
struct Machine {
    name: &'static str,
    folder: TempDir,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    /// Whether each job has another folder.
    folders_change: bool,
}

impl Machine {
    fn new(name: &'static str) -> Self {
        let machine = Self {
            name,
            folder: tempfile::tempdir().unwrap(),
            arguments: Vec::new(),
            environment: Vec::new(),
            folders_change: true,
        };
        machine.make_action();
        copy_folder(&root().join("tests/act/project"), &machine.path("project"));
        machine.git(&["init", "--quiet", "--initial-branch=main"]);
        machine.git(&["add", "--all"]);
        machine.git(&["commit", "--quiet", "--message=A project"]);
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// act takes the repository's name, ref and commit from the checkout.
    fn git(&self, arguments: &[&str]) {
        let git = Command::new("git")
            .args(["-c", "user.name=A", "-c", "user.email=a@example.invalid"])
            .args(arguments)
            .current_dir(self.path("project"))
            .status();
        assert!(git.unwrap().success());
    }

    /// This action as a release has it, with the binary under test.
    fn make_action(&self) {
        let dist = self.path("action/dist");
        fs::create_dir_all(&dist).unwrap();
        fs::copy(root().join("action.yml"), self.path("action/action.yml")).unwrap();
        for file in ["main.js", "post.js", "launcher.js"] {
            fs::copy(root().join("dist").join(file), dist.join(file)).unwrap();
        }
        let program = dist.join("binary");
        fs::copy(binary(), &program).unwrap();
        // act copies the action for each step. With debug information it is three times as large.
        let _ = Command::new("strip").arg(&program).status();
        let sha256 = hex::encode(Sha256::digest(fs::read(&program).unwrap()));
        let binaries = json!({ "linux-x64": { "file": "binary", "sha256": sha256 } });
        let manifest = json!({ "binaries": binaries }).to_string();
        fs::write(dist.join("manifest.json"), manifest).unwrap();
    }

    /// Replaces another author's action, and says so in the log.
    fn make_stub(&self, uses: &str) -> PathBuf {
        let folder = self.path("stubs").join(uses.replace(['/', '@'], "-"));
        fs::create_dir_all(&folder).unwrap();
        let say = format!("echo 'a stub stands in for {uses}, which is not fetched'");
        let step = json!({ "run": say, "shell": "sh" });
        let action = json!({
            "name": uses,
            "description": "a stub",
            "runs": { "using": "composite", "steps": [step] },
        });
        fs::write(folder.join("action.yml"), action.to_string()).unwrap();
        folder
    }

    /// The paths of the actions of these jobs, for act.
    fn local_repositories(&self, jobs: &BTreeMap<String, Job>) -> Vec<String> {
        let used: BTreeSet<&str> = jobs.values().flat_map(|job| uses(&job.keys)).collect();
        // act does the checkout itself.
        let used = used
            .into_iter()
            .filter(|uses| !uses.starts_with("actions/checkout@"));
        used.map(|uses| {
            let folder = if is_this_action(uses) {
                self.path("action")
            } else {
                self.make_stub(uses)
            };
            format!("--local-repository={uses}={}", folder.display())
        })
        .collect()
    }

    /// Runs these jobs one after the other, as one workflow.
    fn run(&self, run: &str, jobs: &BTreeMap<String, Job>) -> BTreeMap<String, Said> {
        // A runner's disk is not the last job's.
        for folder in ["target", "cargo-home"] {
            let _ = fs::remove_dir_all(self.path(folder));
        }
        let workflow = self.path("workflow.yml");
        fs::write(&workflow, self.workflow(jobs).to_string()).unwrap();
        let mut act = Command::new(tools::act());
        for (name, _) in std::env::vars() {
            let of_a_job = [
                "ACT",
                "CARGO",
                "GITHUB",
                "INPUT",
                "RUNNER",
                "RUSTC",
                "RUSTFLAGS",
                "SCCACHE",
            ];
            if of_a_job.iter().any(|prefix| name.starts_with(prefix)) {
                act.env_remove(name);
            }
        }
        let output = act
            .args(["push", "--json", "--concurrent-jobs=1", "--pull=false"])
            .arg("--workflows")
            .arg(&workflow)
            .arg("--action-cache-path")
            .arg(self.path("act"))
            .arg("--cache-server-path")
            .arg(self.path("act-cache"))
            .args(self.local_repositories(jobs))
            .args(&self.arguments)
            .envs(self.environment.iter().cloned())
            .env("PATH", path())
            .env("RUSTUP_HOME", rustup_home())
            .env("HOME", self.path("home"))
            .current_dir(self.path("project"))
            .output()
            .unwrap();
        let said = said(&String::from_utf8_lossy(&output.stdout));
        let mut text = String::new();
        for (job, said) in &said {
            for (step, line) in &said.lines {
                let _ = writeln!(text, "[{job}] {step} | {line}");
            }
            let _ = writeln!(text, "[{job}] {}", said.results.join(", "));
        }
        self.log(run, &text);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said.len(), jobs.len(), "{text}{errors}");
        said
    }

    /// Keeps the logs for the gate to show.
    fn log(&self, run: &str, text: &str) {
        let logs = Path::new(env!("CARGO_TARGET_TMPDIR")).join("act");
        fs::create_dir_all(&logs).unwrap();
        fs::write(logs.join(format!("{}-{run}.log", self.name)), text).unwrap();
    }

    /// The workflow of these jobs. Compilers see which job it is, so that no job has what another
    /// compiled. On the machine itself each job of act's has another folder; a user of act would
    /// set the folder of compiled code and the path that counts for the cache like this.
    fn workflow(&self, jobs: &BTreeMap<String, Job>) -> Value {
        let jobs = jobs.iter().map(|(name, job)| {
            let mut keys = job.keys.clone();
            let mut variables = Map::new();
            let mut set = |name: &str, value: Value| variables.insert(name.to_owned(), value);
            set("CARGO_HOME", json!(self.path("cargo-home").join(name)));
            set("CARGO_TERM_COLOR", json!("never"));
            set("CFLAGS", json!(format!("-DJOB_{}", name.replace('-', "_"))));
            if self.folders_change {
                set("CARGO_TARGET_DIR", json!(self.path("target").join(name)));
                set("SCCACHE_BASEDIRS", json!("${{ github.workspace }}"));
            }
            if let Some(Value::Object(own)) = keys.get("env") {
                variables.extend(own.clone());
            }
            keys.insert("env".to_owned(), Value::Object(variables));
            keys.insert("runs-on".to_owned(), json!("ubuntu-latest"));
            (name.clone(), Value::Object(keys))
        });
        json!({ "on": "push", "name": "CI", "jobs": Map::from_iter(jobs) })
    }
}

/// The folders of a job's programs, with CMake among them.
fn path() -> OsString {
    let others = std::env::var_os("PATH").unwrap();
    let others = std::env::split_paths(&others).collect::<Vec<_>>();
    std::env::join_paths(std::iter::once(tools::cmake()).chain(others)).unwrap()
}

fn rustup_home() -> PathBuf {
    std::env::var_os("RUSTUP_HOME").map_or_else(
        || Path::new(&std::env::var_os("HOME").unwrap()).join(".rustup"),
        PathBuf::from,
    )
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Each job's log, from act's log in JSON.
fn said(log: &str) -> BTreeMap<String, Said> {
    let mut said: BTreeMap<String, Said> = BTreeMap::new();
    for line in log.lines() {
        let Ok(line) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        let (Some(job), Some(message)) = (line["jobID"].as_str(), line["msg"].as_str()) else {
            continue;
        };
        let said = said.entry(job.to_owned()).or_default();
        if let Some(result) = line["jobResult"].as_str() {
            said.results.push(result.to_owned());
        }
        let (stage, step) = (line["stage"].as_str(), line["step"].as_str());
        let step = format!("{} {}", stage.unwrap_or_default(), step.unwrap_or_default());
        // The summary is in the log a second time, as Markdown.
        if line["command"] != "summary" {
            said.lines
                .push((step.trim().to_owned(), message.trim_end().to_owned()));
        }
    }
    said
}

/// Whether all compiles of a job came from the cache (`warm`) or none.
fn assert_cache(name: &str, said: &Said, warm: bool) {
    let reports = said.reports();
    let mut counts = reports.lines().filter_map(|line| {
        let (_, counts) = line.split_once(" came from the cache (")?;
        (!line.contains("::notice")).then_some(counts)
    });
    let number = |text: &str| text.split(' ').next().unwrap().parse::<u32>().unwrap();
    let first = counts
        .next()
        .unwrap_or_else(|| panic!("{name}: {}", said.all()));
    for counts in std::iter::once(first).chain(counts) {
        let parts: Vec<u32> = counts.split(", ").map(number).collect();
        let (hits, misses) = (parts[0], parts[1]);
        let right = if warm {
            hits > 0 && misses == 0
        } else {
            hits == 0 && misses > 0
        };
        assert!(right, "{name} {counts}: {}", said.all());
    }
}

fn assert_each(jobs: &BTreeMap<String, Job>, all: &BTreeMap<String, Said>, warm: bool) {
    for (name, job) in jobs {
        let said = &all[name];
        let text = said.all();
        let expected = if job.succeeds { "success" } else { "failure" };
        assert!(
            said.results.iter().all(|result| result == expected),
            "{name}: {text}"
        );
        assert!(!said.results.is_empty(), "{name}: {text}");
        if job.compiles == Compiles::C {
            assert_cache(name, said, warm);
        }
        if job.compiles == Compiles::Rust {
            let restored = text.contains("1 dependency restored (1 compiled unit, 1 crate");
            assert_eq!(restored, warm, "{name}: {text}");
            assert_eq!(text.contains("Compiling itoa"), !warm, "{name}: {text}");
        }
        let is_ready = text.contains("is ready; mode packed; GitHub's cache, in packs");
        let bad = ["strict", "lenient"].contains(&name.as_str());
        assert_eq!(is_ready, !bad, "{name}: {text}");
    }
}

/// The jobs in `tests/act/jobs.yml`, and the purpose of each.
fn assert_own(all: &BTreeMap<String, Said>) {
    for (name, expected) in [
        ("strict", "sccache cannot be set up"),
        ("strict", "| reached"),
        (
            "lenient",
            "sccache is disabled; the build continues without a cache",
        ),
        ("failing-step", "Compile requests"),
    ] {
        let text = all[name].all();
        assert!(text.contains(expected), "{name} {expected}: {text}");
    }
    assert!(!all["strict"].all().contains("| not reached"));
    let reports = all["two-uses"].reports();
    assert_eq!(
        reports.matches(" came from the cache (").count(),
        4,
        "{reports}"
    );
}

fn twice(machine: &Machine, jobs: &BTreeMap<String, Job>) {
    for (run, warm) in [("first", false), ("second", true)] {
        let all = machine.run(run, jobs);
        assert_each(jobs, &all, warm);
        assert_own(&all);
    }
}

const ON_THIS_MACHINE: &str = "--platform=ubuntu-latest=-self-hosted";

#[test]
fn workflows_find_what_they_left_in_acts_own_cache() {
    let mut machine = Machine::new("own-cache");
    machine.arguments.push(ON_THIS_MACHINE.to_owned());
    twice(&machine, &jobs());
}

#[test]
fn workflows_find_what_they_left_in_a_cache_service_that_act_is_pointed_at() {
    let mut machine = Machine::new("serve");
    let served = Served::start(&machine.path("served"), &[]);
    machine.arguments.extend([
        ON_THIS_MACHINE.to_owned(),
        format!("--env=ACTIONS_CACHE_URL={}", served.url),
        format!("--env=ACTIONS_RUNTIME_TOKEN={}", served.token),
    ]);
    twice(&machine, &jobs());
}

/// Podman, with an image that has nothing but folders for this machine's own programs.
struct Containers {
    service: Child,
    folder: PathBuf,
    socket: PathBuf,
    mounts: Vec<PathBuf>,
}

const IMAGE: &str = "localhost/sccache-action-test:host";

impl Containers {
    /// Starts it with all it keeps in `folder`, or says why there can be none here.
    fn start(folder: &Path) -> Result<Self, String> {
        fs::create_dir_all(folder).unwrap();
        let configuration = folder.join("containers.conf");
        // In a container inside a container, limits cannot be raised.
        let text = "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
                    [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nexit_command_delay = 10\nruntime = \"runc\"\n";
        fs::write(&configuration, text).unwrap();
        let podman = || {
            let mut podman = Command::new("podman");
            podman
                .env("CONTAINERS_CONF", &configuration)
                .arg("--root")
                .arg(folder.join("storage"))
                .arg("--runroot")
                .arg(folder.join("run"));
            podman
        };
        let done = |command: &mut Command| -> Result<(), String> {
            let output = command.output().map_err(|error| error.to_string())?;
            let said = String::from_utf8_lossy(&output.stderr);
            output
                .status
                .success()
                .then_some(())
                .ok_or(said.into_owned())
        };
        let image = folder.join("image.tar");
        fs::write(&image, folders_of_an_image()).unwrap();
        done(podman().arg("import").arg(&image).arg(IMAGE))?;
        let mounts = mounts();
        let mut run = podman();
        run.args(["run", "--rm", "--network=host"]);
        run.args(mounts.iter().map(|path| volume(path)));
        done(run.args([IMAGE, "node", "--version"]))?;
        let socket = folder.join("podman.sock");
        let service = podman()
            .args(["system", "service", "--time=0"])
            .arg(format!("unix://{}", socket.display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut containers = Self {
            service,
            folder: folder.to_owned(),
            socket,
            mounts,
        };
        while std::os::unix::net::UnixStream::connect(&containers.socket).is_err() {
            let ended = containers.service.try_wait().unwrap();
            assert!(ended.is_none(), "podman's service ended");
            std::thread::yield_now();
        }
        Ok(containers)
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        let _ = self.service.kill();
        let _ = self.service.wait();
        // Podman leaves its storage mounted, and then the folder cannot be removed.
        let _ = Command::new("umount")
            .arg(self.folder.join("storage/overlay"))
            .status();
    }
}

/// An image without a file: programs are this machine's own.
fn folders_of_an_image() -> Vec<u8> {
    let mut image = tar::Builder::new(Vec::new());
    let mut add = |path: &str, target: Option<&str>, mode| {
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_mode(mode);
        match target {
            Some(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                image.append_link(&mut header, path, target).unwrap();
            }
            None => {
                header.set_entry_type(tar::EntryType::Directory);
                image
                    .append_data(&mut header, path, std::io::empty())
                    .unwrap();
            }
        }
    };
    for folder in [
        "dev", "etc", "opt", "proc", "root", "run", "sys", "usr", "var",
    ] {
        add(folder, None, 0o755);
    }
    add("tmp", None, 0o1777);
    for folder in ["bin", "lib", "lib64", "sbin"] {
        add(folder, Some(&format!("usr/{folder}")), 0o777);
    }
    image.into_inner().unwrap()
}

/// The folders of this machine that a job's programs are in.
fn mounts() -> Vec<PathBuf> {
    let cargo = Environment::of_this_process()
        .find_program("cargo")
        .unwrap();
    let mut mounts = vec![
        PathBuf::from("/usr"),
        PathBuf::from("/etc"),
        rustup_home(),
        cargo.parent().unwrap().to_owned(),
        tools::cmake().parent().unwrap().to_owned(),
        python(),
    ];
    mounts.dedup();
    let is_elsewhere = |path: &PathBuf| path == Path::new("/usr") || !path.starts_with("/usr");
    mounts.retain(is_elsewhere);
    mounts
}

/// The folder of Python's installation, even if `PATH` has a placeholder for it.
fn python() -> PathBuf {
    let prefix = Command::new("python3")
        .args(["-c", "import sys; print(sys.prefix)"])
        .output()
        .unwrap();
    PathBuf::from(String::from_utf8(prefix.stdout).unwrap().trim())
}

fn volume(path: &Path) -> String {
    format!("--volume={0}:{0}:ro", path.display())
}

#[test]
fn workflows_in_containers_find_what_they_left() {
    let mut machine = Machine::new("containers");
    let containers = match Containers::start(&machine.path("podman")) {
        Ok(containers) => containers,
        Err(why) => {
            machine.log(
                "first",
                &format!("not run: there can be no container here: {why}"),
            );
            return;
        }
    };
    let volumes: Vec<String> = containers.mounts.iter().map(|path| volume(path)).collect();
    let folders = [tools::cmake(), python().join("bin")];
    let cargo = containers
        .mounts
        .iter()
        .filter(|path| path.ends_with("bin"));
    let folders = folders
        .iter()
        .chain(cargo)
        .map(|path| path.display().to_string());
    let path: Vec<String> = folders
        .chain(["/usr/bin".to_owned(), "/bin".to_owned()])
        .collect();
    machine.arguments.extend([
        format!("--platform=ubuntu-latest={IMAGE}"),
        "--rm".to_owned(),
        format!("--container-options={}", volumes.join(" ")),
        format!("--env=PATH={}", path.join(":")),
        "--env=HOME=/root".to_owned(),
        format!("--env=RUSTUP_HOME={}", rustup_home().display()),
    ]);
    let host = format!("unix://{}", containers.socket.display());
    machine.environment.push(("DOCKER_HOST".to_owned(), host));
    machine.folders_change = false;
    let mut jobs = jobs();
    jobs.retain(|name, _| name.starts_with("README-"));
    for (run, warm) in [("first", false), ("second", true)] {
        let all = machine.run(run, &jobs);
        assert_each(&jobs, &all, warm);
        // The folder is the same each time, so the workspace's own code is found as well.
        for (name, said) in &all {
            assert_cache(name, said, warm);
        }
    }
}
