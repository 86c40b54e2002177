//! Tells the post step and later steps of a set-up, once it works.

use std::io;
use std::path::Path;

use crate::action::inputs::{Inputs, Wrap};
use crate::action::mode::{CHAIN, CHAIN_OF_LATER_STEPS, CHAIN_SINCE, Mode};
use crate::action::setup::SetupResult;
use crate::action::setup::storage::recache_variable;
use crate::action::state::{Setup, SetupState};
use crate::runner::environment::Environment;
use crate::runner::files::{RunnerFiles, Variable};
use crate::sccache::state_dir::SetUpSccache;
use crate::wrapper;

/// Tells the post step and later steps.
pub(super) fn publish(
    environment: &Environment,
    inputs: &Inputs,
    ready: &SetupResult,
    program: &Path,
    files: &RunnerFiles,
) -> io::Result<()> {
    let state = SetupState {
        state_dir: ready.state_dir.clone(),
        port: ready.server.port(),
        mode: ready.mode,
        version: ready.installed.version.to_string(),
        cache_location: ready.cache_location.clone(),
        read_only: ready.read_only,
        relay: ready.relay.as_ref().map(|relay| relay.running.clone()),
    };
    let has_disk_tier = ready.mode == Mode::Packed && ready.installed.version >= CHAIN_SINCE;
    let sccache = SetUpSccache {
        path: ready.installed.path.clone(),
        version: Some(ready.installed.version.clone()),
        port: Some(ready.server.port()),
        relay: ready.relay.as_ref().map(|relay| relay.running.port),
        on_disk: ready.mode == Mode::Local || has_disk_tier,
    };
    // Without it the wrapper relies on the environment alone, and cannot ask the relay whether it
    // is alive.
    let _ = ready.state_dir.set_sccache(&sccache);
    // Without it `stats` and `doctor` only have less to report.
    let _ = ready.state_dir.set_about(&state.about(program));
    let setup = Setup::Done(state);
    let disk_tier = has_disk_tier.then(|| ready.state_dir.disk_tier());
    files.save_state(&setup.to_variables())?;
    files.set_outputs(&outputs(ready))?;
    if let Some(folder) = ready.state_dir.wrapper().parent() {
        files.add_to_path(folder)?;
    }
    let mut exported = exports(
        environment,
        inputs.wrap,
        ready.mode,
        ready.server.port(),
        &ready.state_dir.wrapper(),
        disk_tier.as_deref(),
    );
    exported.extend(recache_variable(environment, inputs, ready.mode));
    files.export(&exported)
}

fn outputs(ready: &SetupResult) -> Vec<Variable> {
    [
        ("version", ready.installed.version.to_string()),
        ("path", ready.installed.path.display().to_string()),
        ("mode", ready.mode.to_string()),
        ("cache-location", ready.cache_location.clone()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// The variables that later steps get: each one that the user has not set.
fn exports(
    environment: &Environment,
    wrap: Wrap,
    mode: Mode,
    port: u16,
    wrapper: &Path,
    disk_tier: Option<&Path>,
) -> Vec<Variable> {
    let wrapper = wrapper.display().to_string();
    // The user cannot set this server's address: compiles would then ask another server.
    let mut exports = vec![
        ("SCCACHE_SERVER_PORT", port.to_string()),
        ("SCCACHE_PATH", wrapper.clone()),
    ];
    if let Some(folder) = disk_tier {
        // The same holds for the folder of this server's disk cache. A server that sccache starts
        // in place of this one continues with that folder, and its new objects are saved all the
        // same.
        exports.push(("SCCACHE_DIR", folder.display().to_string()));
        // And if a step calls the real sccache, the wrapper does not keep GitHub's cache from it.
        exports.push((CHAIN, CHAIN_OF_LATER_STEPS.to_owned()));
    }
    let mut unless_set = |name: &'static str, value: &str| {
        if !environment.has(name) {
            exports.push((name, value.to_owned()));
        }
    };
    match mode {
        // The wrapper withholds it from a server that sccache would start itself.
        Mode::Packed | Mode::Direct => unless_set("SCCACHE_GHA_ENABLED", "true"),
        Mode::Local | Mode::External => {}
    }
    unless_set("SCCACHE_IDLE_TIMEOUT", "0");
    unless_set("SCCACHE_IGNORE_SERVER_IO_ERROR", "1");
    if wrap.rust {
        unless_set("RUSTC_WRAPPER", &wrapper);
    }
    let launcher = to_cmake_path(&wrapper);
    if wrap.c {
        unless_set("CMAKE_C_COMPILER_LAUNCHER", &launcher);
        unless_set("CMAKE_CXX_COMPILER_LAUNCHER", &launcher);
    }
    if wrap.cuda {
        unless_set("CMAKE_CUDA_COMPILER_LAUNCHER", &launcher);
    }
    // sccache does not cache incremental compiles of rustc: since 0.5 it even refuses to run them,
    // so this replaces the value that the user has set for builds without sccache.
    if rust_goes_through_sccache(environment, wrap) {
        exports.push(("CARGO_INCREMENTAL", "0".to_owned()));
    }
    exports
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// A path as CMake writes paths. Projects pass launchers on to others that they build, as text of
/// CMake's language, in which a backslash begins an escape.
fn to_cmake_path(path: &str) -> String {
    if cfg!(windows) {
        path.replace('\\', "/")
    } else {
        path.to_owned()
    }
}

/// Whether cargo will call sccache: through our variable, or the workflow's own.
pub(super) fn rust_goes_through_sccache(environment: &Environment, wrap: Wrap) -> bool {
    match environment.get("RUSTC_WRAPPER") {
        None => wrap.rust,
        Some(wrapper) => wrapper::is_wrapper(wrapper.as_ref()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exported(environment: &Environment, wrap: Wrap, mode: Mode) -> Environment {
        let wrapper = Path::new("/s/bin/sccache");
        let disk_tier = (mode == Mode::Packed).then_some(Path::new("/s/disk"));
        exports(environment, wrap, mode, 7, wrapper, disk_tier)
            .into_iter()
            .collect()
    }

    #[test]
    fn each_language_that_is_wrapped_gets_its_launcher_and_no_other_does() {
        let all = Wrap {
            rust: true,
            c: true,
            cuda: true,
        };
        let launchers = [
            "RUSTC_WRAPPER",
            "CMAKE_C_COMPILER_LAUNCHER",
            "CMAKE_CXX_COMPILER_LAUNCHER",
            "CMAKE_CUDA_COMPILER_LAUNCHER",
        ];
        let none = exported(&Environment::default(), Wrap::default(), Mode::Direct);
        let every = exported(&Environment::default(), all, Mode::Direct);
        for launcher in launchers {
            assert!(!none.has(launcher), "{launcher}");
            assert_eq!(every.get(launcher), Some("/s/bin/sccache"));
        }
        assert_eq!(every.get("CARGO_INCREMENTAL"), Some("0"));
        assert!(!none.has("CARGO_INCREMENTAL"));
    }

    #[test]
    fn a_path_is_given_to_cmake_as_cmake_writes_it() {
        let written = to_cmake_path(r"C:\a\_temp\sccache.exe");
        if cfg!(windows) {
            assert_eq!(written, "C:/a/_temp/sccache.exe");
        } else {
            assert_eq!(written, r"C:\a\_temp\sccache.exe");
        }
    }

    #[test]
    fn what_the_user_set_is_left_alone() {
        let user = Environment::from_iter([
            ("RUSTC_WRAPPER", "other"),
            ("CARGO_INCREMENTAL", "1"),
            ("SCCACHE_IDLE_TIMEOUT", "60"),
            ("SCCACHE_SERVER_PORT", "4226"),
        ]);
        let rust = Wrap {
            rust: true,
            ..Wrap::default()
        };
        let exported = exported(&user, rust, Mode::Direct);
        for name in ["RUSTC_WRAPPER", "CARGO_INCREMENTAL", "SCCACHE_IDLE_TIMEOUT"] {
            assert!(!exported.has(name), "{name}");
        }
        assert_eq!(exported.get("SCCACHE_SERVER_PORT"), Some("7"));
    }

    #[test]
    fn incremental_builds_are_switched_off_where_sccache_would_refuse_them() {
        for (wrapper, expected) in [("sccache", Some("0")), ("", None), ("other", None)] {
            let user =
                Environment::from_iter([("RUSTC_WRAPPER", wrapper), ("CARGO_INCREMENTAL", "1")]);
            let exported = exported(&user, Wrap::default(), Mode::Direct);
            assert_eq!(exported.get("CARGO_INCREMENTAL"), expected, "{wrapper}");
        }
    }

    #[test]
    fn githubs_cache_is_switched_on_for_later_steps_only_where_it_is_used() {
        for (mode, expected) in [
            (Mode::Direct, Some("true")),
            (Mode::Packed, Some("true")),
            (Mode::Local, None),
            (Mode::External, None),
        ] {
            let exported = exported(&Environment::default(), Wrap::default(), mode);
            assert_eq!(exported.get("SCCACHE_GHA_ENABLED"), expected, "{mode}");
            let with_disk = mode == Mode::Packed;
            assert_eq!(exported.has("SCCACHE_DIR"), with_disk, "{mode}");
            let chain = with_disk.then_some(CHAIN_OF_LATER_STEPS);
            assert_eq!(exported.get(CHAIN), chain, "{mode}");
        }
    }

    #[test]
    fn no_token_and_no_service_url_is_exported() {
        let environment = Environment::from_iter([
            ("ACTIONS_RUNTIME_TOKEN", "secret"),
            ("ACTIONS_RESULTS_URL", "https://results.example/"),
        ]);
        let all = exported(&environment, Wrap::default(), Mode::Direct);
        assert!(
            all.iter()
                .all(|(name, value)| !name.starts_with("ACTIONS_") && !value.contains("secret"))
        );
    }
}
