//! Asks the relay to restore cargo's folders, and decides which of them a job caches.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;
use tokio::time::timeout;

use crate::action::inputs::{CargoWorkspace, Inputs};
use crate::cargo_cache::build_key::{BuildEnvironment, BuildKey};
use crate::cargo_cache::places::{Places, Workspace};
use crate::format::{pluralize, size};
use crate::relay::cargo::{CargoActivity, CargoRequest};
use crate::relay::process::ProcessError;
use crate::relay::process::RunningRelay;
use crate::runner::environment::Environment;
use crate::runner::log::Log;
use crate::sccache::state_dir::{CargoCacheFilter, StateDir};

/// How long the restore may take. Cargo downloads and compiles anything that is not there by then.
const RESTORE_WAIT: Duration = Duration::from_secs(180);

/// How long `rustc` or `cargo` may take to answer: rustup may first have to install a toolchain that the
/// workspace names.
const TOOL_WAIT: Duration = Duration::from_secs(120);

/// The depth below the checkout to which workspaces are searched, and how many are asked about.
const WORKSPACE_DEPTH: usize = 4;
const WORKSPACES_ASKED: usize = 8;

/// How many folders are looked into for that.
const FOLDERS_SEEN: usize = 4000;

/// Whether to cache cargo's folders: the input decides; without it, they are cached if rustc goes
/// through sccache and there is a workspace.
pub fn is_wanted(environment: &Environment, inputs: &Inputs, rust: bool, log: &Log) -> bool {
    if !inputs.cache_cargo.unwrap_or(rust) {
        return false;
    }
    let has_workspace = !candidates(environment, inputs).is_empty();
    if !has_workspace && inputs.cache_cargo == Some(true) {
        log.info(
            "The cargo cache is not used: there is no Cargo.lock and no Cargo.toml. Put the \
             action after the checkout, or name the workspace in `cargo-workspaces`.",
        );
    }
    has_workspace
}

/// Makes the relay restore this job's dependencies from earlier jobs, and save those of this job at
/// the end. Reports the result; `None` if nothing was restored.
pub async fn restore(
    environment: &Environment,
    inputs: &Inputs,
    state_dir: &StateDir,
    relay: &RunningRelay,
    log: &Log,
) -> Option<CargoActivity> {
    match try_restore(environment, inputs, state_dir, relay).await {
        Ok(activity) => {
            log.info(describe(&activity));
            Some(activity)
        }
        Err(why) => {
            log.info(format!("The cargo cache is not used: {why}"));
            None
        }
    }
}

/// Why the cargo cache is not used.
#[derive(Debug, thiserror::Error)]
enum NotRestored {
    #[error("cargo's home is unknown")]
    NoHome,
    #[error("there is no workspace")]
    NoWorkspace,
    #[error("rustc is not on PATH")]
    NoRustc,
    #[error(transparent)]
    Tool(#[from] ToolError),
    #[error(transparent)]
    Relay(#[from] ProcessError),
    #[error(transparent)]
    Disk(#[from] io::Error),
}

/// Why a tool of the workspace says nothing.
#[derive(Debug, thiserror::Error)]
enum ToolError {
    #[error("{} does not answer", .0.display())]
    Silent(PathBuf),
    #[error("{}: {error}", tool.display())]
    NotRun {
        tool: PathBuf,
        #[source]
        error: io::Error,
    },
    /// What it wrote to its standard error.
    #[error("{0}")]
    Failed(String),
}

async fn try_restore(
    environment: &Environment,
    inputs: &Inputs,
    state_dir: &StateDir,
    relay: &RunningRelay,
) -> Result<CargoActivity, NotRestored> {
    let home = home(environment).ok_or(NotRestored::NoHome)?;
    let checkout = checkout(environment);
    let candidates = candidates(environment, inputs);
    let first = candidates.first().ok_or(NotRestored::NoWorkspace)?;
    let (rustc, workspaces) = tokio::join!(
        rustc_version(environment, &first.folder),
        workspaces(environment, &checkout, &candidates),
    );
    let build_environment = BuildEnvironment {
        rustc: &rustc?,
        system: &system(environment),
        home: &home,
    };
    let request = CargoRequest {
        build_key: BuildKey::of(&build_environment, environment.iter()),
        places: Places {
            checkout,
            home,
            temporary: environment.path("RUNNER_TEMP").map(|path| real(&path)),
            workspaces,
        },
        wait: RESTORE_WAIT,
        state: state_dir.root().to_owned(),
    };
    let awaited = request.places.workspaces.iter();
    let awaited = awaited
        .map(|its| its.lockfile())
        .filter(|path| !path.exists());
    let kept = CargoCacheFilter {
        places: request.places.clone(),
        // The relay reports a lockfile that cannot be read.
        packages: request.lockfile_before().unwrap_or_default().cacheable(),
        awaited: awaited.collect(),
    };
    let restored = relay.restore_cargo(&request).await?;
    // From here on the post step keeps what is compiled.
    state_dir.set_cargo_cache_filter(&kept)?;
    Ok(restored)
}

fn describe(activity: &CargoActivity) -> String {
    let mut text = format!(
        "Cargo cache: {} restored ({}, {}, {} in {:.1} s)",
        pluralize(activity.restored_dependencies, "dependency"),
        pluralize(activity.restored_units, "compiled unit"),
        pluralize(activity.restored_crates, "crate"),
        size(activity.restored_bytes),
        activity.restore_milliseconds as f64 / 1000.0
    );
    if activity.other_build_key {
        text.push_str("; earlier jobs compiled for another compiler, system or settings");
    }
    text
}

fn checkout(environment: &Environment) -> PathBuf {
    let checkout = environment
        .path("GITHUB_WORKSPACE")
        .or_else(|| std::env::current_dir().ok())
        .unwrap_or_default();
    real(&checkout)
}

/// A folder by the path under which programs that run in it see it.
fn real(path: &Path) -> PathBuf {
    // Windows has another form for it, which these do not use.
    let real = if cfg!(unix) {
        fs::canonicalize(path).ok()
    } else {
        None
    };
    real.unwrap_or_else(|| path.to_owned())
}

/// A folder that a workspace is or may be in.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    folder: PathBuf,
    /// The build directory, if the user names it.
    build: Option<PathBuf>,
}

/// The folders of the input. Without them: the checkout, if it has a manifest or a lockfile, and
/// all folders in it with their own lockfile; else the first ones with a manifest.
fn candidates(environment: &Environment, inputs: &Inputs) -> Vec<Candidate> {
    let checkout = checkout(environment);
    if !inputs.cargo_workspaces.is_empty() {
        let named = |workspace: &CargoWorkspace| {
            let folder = plain(&checkout.join(&workspace.folder));
            let build = workspace.target.as_ref();
            Candidate {
                build: build.map(|build| plain(&folder.join(build))),
                folder,
            }
        };
        return inputs.cargo_workspaces.iter().map(named).collect();
    }
    let folders = if checkout.join("Cargo.toml").is_file() {
        std::iter::once(checkout.clone())
            .chain(folders_with("Cargo.lock", &checkout))
            .collect()
    } else {
        match folders_with("Cargo.lock", &checkout) {
            none if none.is_empty() => folders_with("Cargo.toml", &checkout),
            found => found,
        }
    };
    let mut candidates: Vec<Candidate> = Vec::new();
    for folder in folders {
        if candidates.iter().all(|its| its.folder != folder) {
            candidates.push(Candidate {
                folder,
                build: None,
            });
        }
    }
    candidates.truncate(WORKSPACES_ASKED);
    candidates
}

/// The folders below `top` that contain a file of this name, the least deep first. It skips hidden
/// folders and those that other tools fill.
fn folders_with(name: &str, top: &Path) -> Vec<PathBuf> {
    const FILLED: [&str; 3] = ["node_modules", "target", "vendor"];
    let mut found = Vec::new();
    let mut level = vec![top.to_owned()];
    let mut seen = 0;
    for _ in 0..=WORKSPACE_DEPTH {
        let mut next = Vec::new();
        for folder in level {
            seen += 1;
            if seen > FOLDERS_SEEN {
                return found;
            }
            if folder.join(name).is_file() {
                found.push(folder.clone());
            }
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let its_name = entry.file_name();
                let its_name = its_name.to_string_lossy();
                let is_folder = entry.file_type().is_ok_and(|its| its.is_dir());
                if is_folder && !its_name.starts_with('.') && !FILLED.contains(&&*its_name) {
                    next.push(entry.path());
                }
            }
        }
        next.sort_unstable();
        level = next;
    }
    found
}

/// The workspaces that these folders are of, with the build directories that cargo has for them.
async fn workspaces(
    environment: &Environment,
    checkout: &Path,
    candidates: &[Candidate],
) -> Vec<Workspace> {
    let mut workspaces: Vec<Workspace> = Vec::new();
    for candidate in candidates {
        let workspace = match &candidate.build {
            Some(build) => Workspace {
                folder: candidate.folder.clone(),
                build: build.clone(),
            },
            None => match ask_cargo(environment, &candidate.folder).await {
                Some(said) => said,
                // This is cargo's default. It may not be installed yet.
                None => guessed(environment, &candidate.folder),
            },
        };
        let is_inside = workspace.folder.starts_with(checkout);
        if is_inside && workspaces.iter().all(|its| its.folder != workspace.folder) {
            workspaces.push(workspace);
        }
    }
    workspaces
}

fn guessed(environment: &Environment, folder: &Path) -> Workspace {
    let build = environment
        .path("CARGO_BUILD_BUILD_DIR")
        .or_else(|| environment.path("CARGO_TARGET_DIR"))
        .or_else(|| environment.path("CARGO_BUILD_TARGET_DIR"))
        .unwrap_or_else(|| "target".into());
    Workspace {
        folder: folder.to_owned(),
        build: plain(&folder.join(build)),
    }
}

/// Cargo's description of the workspace that a folder is in (`cargo metadata`). `build_directory`
/// is there since cargo 1.91; before that both are one.
#[derive(Deserialize)]
struct CargoMetadata {
    workspace_root: PathBuf,
    target_directory: PathBuf,
    build_directory: Option<PathBuf>,
}

/// `None` if cargo does not answer: it is not installed, or the manifest is invalid.
async fn ask_cargo(environment: &Environment, folder: &Path) -> Option<Workspace> {
    let cargo = environment.find_program("cargo")?;
    let arguments = ["metadata", "--no-deps", "--offline", "--format-version=1"];
    let said = output_of(environment, &cargo, &arguments, folder)
        .await
        .ok()?;
    let said: CargoMetadata = serde_json::from_slice(&said).ok()?;
    Some(Workspace {
        folder: said.workspace_root,
        build: said.build_directory.unwrap_or(said.target_directory),
    })
}

/// The output of a tool of the workspace.
async fn output_of(
    environment: &Environment,
    tool: &Path,
    arguments: &[&str],
    folder: &Path,
) -> Result<Vec<u8>, ToolError> {
    let ran = Command::new(tool)
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .envs(environment.for_programs().iter())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(TOOL_WAIT, ran).await;
    let output = output.map_err(|_| ToolError::Silent(tool.to_owned()))?;
    let output = output.map_err(|error| ToolError::NotRun {
        tool: tool.to_owned(),
        error,
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(ToolError::Failed(said.trim().to_owned()))
}

/// A path without `.` and `..`: the compiler sees folders in this form.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for step in path.components() {
        match step {
            Component::CurDir => {}
            Component::ParentDir => drop(plain.pop()),
            step => plain.push(step),
        }
    }
    plain
}

/// Cargo's home.
pub(crate) fn home(environment: &Environment) -> Option<PathBuf> {
    let user = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
    environment
        .path("CARGO_HOME")
        .or_else(|| Some(environment.path(user)?.join(".cargo")))
}

/// The version text of the workspace's compiler.
async fn rustc_version(environment: &Environment, workspace: &Path) -> Result<String, NotRestored> {
    let rustc = environment
        .path("RUSTC")
        .or_else(|| environment.find_program("rustc"));
    let rustc = rustc.ok_or(NotRestored::NoRustc)?;
    let said = output_of(environment, &rustc, &["-vV"], workspace).await?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// The name and version of the system, which decide about its libraries.
fn system(environment: &Environment) -> String {
    // GitHub's images, which other systems than Linux have as well.
    let image = environment.get("ImageOS").unwrap_or_default();
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let lines = release
        .lines()
        .filter(|line| line.starts_with("ID=") || line.starts_with("VERSION_ID="));
    let lines: Vec<&str> = std::iter::once(image).chain(lines).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(checkout: &Path, variables: &[(&str, &str)]) -> Vec<(String, Option<String>)> {
        let checkout = real(checkout);
        let workspace = checkout.display().to_string();
        let all = [&[("GITHUB_WORKSPACE", workspace.as_str())], variables].concat();
        let environment: Environment = all.into_iter().collect();
        let inputs = Inputs::parse(&environment).unwrap();
        let below = |path: &Path| {
            let path = path.strip_prefix(&checkout).unwrap().to_str().unwrap();
            path.replace('\\', "/")
        };
        candidates(&environment, &inputs)
            .into_iter()
            .map(|its| (below(&its.folder), its.build.as_deref().map(below)))
            .collect()
    }

    fn checkout_with(files: &[&str]) -> tempfile::TempDir {
        let checkout = tempfile::tempdir().unwrap();
        for file in files {
            let path = checkout.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        checkout
    }

    #[test]
    fn workspaces_are_where_manifests_and_lockfiles_are_unless_the_input_names_them() {
        let found = |files: &[&str]| {
            let checkout = checkout_with(files);
            let found = of(checkout.path(), &[]).into_iter();
            found.map(|(folder, _)| folder).collect::<Vec<_>>()
        };
        assert_eq!(found(&["README"]), [] as [&str; 0]);
        assert_eq!(found(&["Cargo.toml", "Cargo.lock"]), [""]);
        // A library without a lockfile, and one in a subfolder.
        assert_eq!(found(&["Cargo.toml", "member/Cargo.toml"]), [""]);
        assert_eq!(found(&["rust/Cargo.toml", "docs/x"]), ["rust"]);
        let several = [
            "Cargo.toml",
            "Cargo.lock",
            "fuzz/Cargo.lock",
            "a/b/Cargo.lock",
            "target/package/x/Cargo.lock",
            ".hidden/Cargo.lock",
            "web/node_modules/x/Cargo.lock",
        ];
        assert_eq!(found(&several), ["", "fuzz", "a/b"]);
        assert_eq!(found(&["rust/Cargo.toml", "rust/Cargo.lock"]), ["rust"]);
    }

    #[test]
    fn the_input_names_workspaces_and_their_build_directories() {
        let checkout = checkout_with(&["Cargo.toml"]);
        let named = ("INPUT_CARGO-WORKSPACES", "one\n./two -> ../build\n");
        let pair =
            |folder: &str, build: Option<&str>| (folder.to_owned(), build.map(str::to_owned));
        assert_eq!(
            of(checkout.path(), &[named]),
            [pair("one", None), pair("two", Some("build"))]
        );
    }

    #[tokio::test]
    async fn without_cargo_its_own_rules_are_followed() {
        let build = async |variables: &[(&str, &str)]| {
            let environment: Environment = variables.iter().copied().collect();
            let candidate = Candidate {
                folder: "/w/one".into(),
                build: None,
            };
            let found = workspaces(&environment, Path::new("/w"), &[candidate]).await;
            found.first().map(|its| its.build.clone())
        };
        assert_eq!(build(&[]).await, Some("/w/one/target".into()));
        let target = ("CARGO_TARGET_DIR", "out");
        assert_eq!(build(&[target]).await, Some("/w/one/out".into()));
        let elsewhere = ("CARGO_BUILD_BUILD_DIR", "/b");
        assert_eq!(build(&[target, elsewhere]).await, Some("/b".into()));
    }

    #[test]
    fn cargos_home_is_where_cargo_looks_for_it() {
        let home = |variables: &[(&str, &str)]| super::home(&variables.iter().copied().collect());
        let user = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
        assert_eq!(home(&[(user, "/u")]), Some("/u/.cargo".into()));
        let both = [(user, "/u"), ("CARGO_HOME", "/c")];
        assert_eq!(home(&both), Some("/c".into()));
        assert_eq!(home(&[]), None);
    }
}
