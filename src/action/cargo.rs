//! What of a job's cargo the relay keeps, and when.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::action::environment::Environment;
use crate::action::inputs::{CargoWorkspace, Inputs};
use crate::action::workflow_command::Log;
use crate::cargo::layout::{Facts, Layout};
use crate::relay::cargo::{CargoActivity, CargoRequest};
use crate::relay::process::RunningRelay;
use crate::sccache::state::{KeptByCargo, StateDir};

/// How long the restore may take. What is not there by then is downloaded and compiled by cargo.
const RESTORE_WAIT: Duration = Duration::from_secs(180);

/// How long `rustc` may take to say its version: rustup may first have to install a toolchain that
/// the workspace names.
const RUSTC_WAIT: Duration = Duration::from_secs(120);

/// Whether cargo's folders are to be kept: as the input says, or where rustc goes through sccache and
/// there is a lockfile.
pub fn is_wanted(environment: &Environment, inputs: &Inputs, rust: bool, log: &Log) -> bool {
    if !inputs.cache_cargo.unwrap_or(rust) {
        return false;
    }
    let has_lockfile = workspaces(environment, inputs)
        .iter()
        .any(|workspace| lockfile(workspace).is_file());
    if !has_lockfile && inputs.cache_cargo == Some(true) {
        log.info(
            "The cargo cache is not used: no Cargo.lock was found. The action must come after the \
             checkout, and `cargo-workspaces` say where the workspace is.",
        );
    }
    has_lockfile
}

/// Has the relay put on the disk what earlier jobs left of this job's dependencies, and keep at the
/// end what this one leaves. Says what was done, or `None` where it was nothing.
pub async fn restore(
    environment: &Environment,
    inputs: &Inputs,
    state_dir: &StateDir,
    relay: &RunningRelay,
    log: &Log,
) -> Option<CargoActivity> {
    match try_restore(environment, inputs, state_dir, relay).await {
        Ok(activity) => {
            log.info(in_words(&activity));
            Some(activity)
        }
        Err(why) => {
            log.info(format!("The cargo cache is not used: {why}"));
            None
        }
    }
}

async fn try_restore(
    environment: &Environment,
    inputs: &Inputs,
    state_dir: &StateDir,
    relay: &RunningRelay,
) -> Result<CargoActivity, String> {
    let workspaces = workspaces(environment, inputs);
    let first = workspaces.first().ok_or("there is no workspace")?;
    let home = home(environment).ok_or("cargo's home is not known")?;
    let targets: Vec<PathBuf> = workspaces
        .iter()
        .map(|workspace| workspace.target.clone())
        .collect();
    let rustc = rustc_version(environment, &first.folder).await?;
    let facts = Facts {
        rustc: &rustc,
        system: &system(environment),
        home: &home,
        targets: &targets,
    };
    let request = CargoRequest {
        layout: Layout::of(&facts, environment.iter()),
        lockfiles: workspaces.iter().map(lockfile).collect(),
        wait: RESTORE_WAIT,
        home,
        targets,
    };
    let restored = relay.restore_cargo(&request).await;
    let restored = restored.map_err(|error| error.to_string())?;
    // From here on the post step keeps what is compiled. A lockfile that cannot be read was told of.
    let packages = request.lockfile().unwrap_or_default().keepable();
    let kept = KeptByCargo {
        home: request.home,
        targets: request.targets,
        packages,
    };
    let noted = state_dir.set_kept_by_cargo(&kept);
    noted.map_err(|error| error.to_string())?;
    Ok(restored)
}

fn in_words(activity: &CargoActivity) -> String {
    let CargoActivity {
        restored_units,
        restored_crates,
        restored_bytes,
        restore_milliseconds,
        ..
    } = activity;
    let mut text = format!(
        "Cargo cache: {restored_units} compiled units and {restored_crates} crates, {} MB, in {:.1} s",
        restored_bytes / 1_000_000,
        *restore_milliseconds as f64 / 1000.0
    );
    if activity.other_layout {
        text.push_str("; what earlier jobs compiled was for another compiler, system or settings");
    }
    text
}

/// A workspace with absolute paths.
struct Workspace {
    folder: PathBuf,
    target: PathBuf,
}

/// Those of the input, or the one that was checked out.
fn workspaces(environment: &Environment, inputs: &Inputs) -> Vec<Workspace> {
    let checkout = environment
        .path("GITHUB_WORKSPACE")
        .or_else(|| std::env::current_dir().ok())
        .unwrap_or_default();
    let elsewhere = environment
        .path("CARGO_TARGET_DIR")
        .or_else(|| environment.path("CARGO_BUILD_TARGET_DIR"));
    let of_checkout = [CargoWorkspace::default()];
    let asked = match inputs.cargo_workspaces.as_slice() {
        [] => of_checkout.as_slice(),
        asked => asked,
    };
    asked
        .iter()
        .map(|workspace| {
            let folder = plain(&checkout.join(&workspace.folder));
            let target = workspace.target.clone().or_else(|| elsewhere.clone());
            let target = target.unwrap_or_else(|| "target".into());
            Workspace {
                target: plain(&folder.join(target)),
                folder,
            }
        })
        .collect()
}

/// A path without `.` and `..`: the compiler is told of folders in this form.
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

fn lockfile(workspace: &Workspace) -> PathBuf {
    workspace.folder.join("Cargo.lock")
}

/// Cargo's home.
pub(crate) fn home(environment: &Environment) -> Option<PathBuf> {
    let user = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
    environment
        .path("CARGO_HOME")
        .or_else(|| Some(environment.path(user)?.join(".cargo")))
}

/// What the compiler of the workspace says of itself.
async fn rustc_version(environment: &Environment, workspace: &Path) -> Result<String, String> {
    let rustc = environment
        .path("RUSTC")
        .or_else(|| environment.find_program("rustc"));
    let rustc = rustc.ok_or("rustc is not on PATH")?;
    let ran = Command::new(&rustc)
        .arg("-vV")
        .current_dir(workspace)
        .env_clear()
        .envs(environment.for_programs().iter())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(RUSTC_WAIT, ran).await;
    let output = output.map_err(|_| "rustc does not say its version")?;
    let output = output.map_err(|error| format!("{}: {error}", rustc.display()))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

/// The name and version of the system, by which its libraries change.
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

    fn of(variables: &[(&str, &str)]) -> Vec<(PathBuf, PathBuf)> {
        let environment: Environment = variables.iter().copied().collect();
        let inputs = Inputs::parse(&environment).unwrap();
        workspaces(&environment, &inputs)
            .into_iter()
            .map(|workspace| (workspace.folder, workspace.target))
            .collect()
    }

    #[test]
    fn the_checkout_is_the_workspace_unless_others_are_named() {
        let pair = |one: &str, two: &str| (PathBuf::from(one), PathBuf::from(two));
        let checkout = ("GITHUB_WORKSPACE", "/w");
        assert_eq!(of(&[checkout]), [pair("/w", "/w/target")]);
        let elsewhere = ("CARGO_TARGET_DIR", "/t");
        assert_eq!(of(&[checkout, elsewhere]), [pair("/w", "/t")]);
        let inside = ("CARGO_TARGET_DIR", "out");
        assert_eq!(of(&[checkout, inside]), [pair("/w", "/w/out")]);
        let named = ("INPUT_CARGO-WORKSPACES", "one\n./two -> ../build\n");
        assert_eq!(
            of(&[checkout, named]),
            [pair("/w/one", "/w/one/target"), pair("/w/two", "/w/build")]
        );
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
