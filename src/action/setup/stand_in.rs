//! Installs a passthrough `sccache`, which only runs the compiler, for the later steps of a job
//! whose set-up failed.

use std::io;
use std::path::Path;

use crate::action::setup::folders;
use crate::runner::environment::Environment;
use crate::runner::files::RunnerFiles;
use crate::sccache::state_dir::sccache_on_path;

/// Whether one of the workflow's own variables calls `sccache`, wherever that is on `PATH`.
fn workflow_uses_sccache(environment: &Environment) -> bool {
    [
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_RUSTC_WRAPPER",
        "CMAKE_C_COMPILER_LAUNCHER",
        "CMAKE_CXX_COMPILER_LAUNCHER",
        "CMAKE_CUDA_COMPILER_LAUNCHER",
        "CC",
        "CXX",
        "NVCC",
    ]
    .into_iter()
    .any(|name| {
        environment.get(name).is_some_and(|value| {
            value
                .split_whitespace()
                .next()
                .is_some_and(|program| program == "sccache" || program == "sccache.exe")
        })
    })
}

/// Makes a `sccache` that only runs the compiler, for later steps: they may call it whether
/// anything is exported or not, by a variable of this job's, or by a command or a setting that
/// cannot be seen from here. If the runner has an sccache of its own, the latter call that one, as
/// they would without this action.
pub(super) fn install_passthrough(
    environment: &Environment,
    program: &Path,
    files: &RunnerFiles,
) -> io::Result<()> {
    let wrapper = folders::with_wrapper(environment, program)?.wrapper();
    if let Some(folder) = wrapper.parent()
        && (workflow_uses_sccache(environment) || sccache_on_path(environment).is_none())
    {
        files.add_to_path(folder)?;
    }
    if environment.has("SCCACHE_PATH") {
        return Ok(());
    }
    files.export(&[("SCCACHE_PATH".to_owned(), wrapper.display().to_string())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workflow_that_calls_sccache_by_itself_is_recognised() {
        let calls = |name: &str, value: &str| {
            workflow_uses_sccache(&Environment::from_iter([(name, value)]))
        };
        assert!(calls("RUSTC_WRAPPER", "sccache"));
        assert!(calls("CC", "sccache gcc"));
        assert!(!calls("RUSTC_WRAPPER", "/opt/sccache"));
        assert!(!calls("CC", "gcc"));
    }
}
