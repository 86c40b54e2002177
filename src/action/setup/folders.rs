//! Chooses the folders for a set-up's files.

use std::io;
use std::path::{Path, PathBuf};

use crate::runner::environment::Environment;
use crate::sccache::state_dir::StateDir;
use crate::wrapper;

/// The runner's folder for temporary files, which it empties between jobs.
fn temporary_folder(environment: &Environment) -> PathBuf {
    environment
        .path("RUNNER_TEMP")
        .unwrap_or_else(tempfile::env::temp_dir)
}

/// Creates a state folder with the wrapper in it: in the runner's folder for temporary files. If
/// that is full, or its file system does not allow running programs, the first other folder that
/// works.
///
/// # Errors
/// Fails if none will, with the reason of the first.
pub(super) fn with_wrapper(environment: &Environment, program: &Path) -> io::Result<StateDir> {
    let mut first_error = None;
    let named = [
        Some(temporary_folder(environment)),
        environment.path("RUNNER_TOOL_CACHE"),
        Some(tempfile::env::temp_dir()),
    ];
    for folder in named.into_iter().flatten() {
        let tried = StateDir::create(&folder, None).and_then(|state_dir| {
            let installed = wrapper::install(program, &state_dir);
            // On a full disk half a copy would take up the rest of it.
            installed.inspect_err(|_| drop(std::fs::remove_dir_all(state_dir.root())))?;
            Ok(state_dir)
        });
        match tried {
            Ok(state_dir) => return Ok(state_dir),
            Err(error) => {
                first_error.get_or_insert_with(|| {
                    io::Error::new(error.kind(), format!("{}: {error}", folder.display()))
                });
            }
        }
    }
    Err(first_error.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
}

/// The folder in which the probe compiles happen: the same in each job of a runner. If the runner
/// has no such folder, it is one whose name no other user of the machine knows in advance.
pub(super) fn of_probes(environment: &Environment, state_dir: &StateDir) -> PathBuf {
    if environment.has("RUNNER_TEMP") {
        temporary_folder(environment)
    } else {
        state_dir.root().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_folder_of_the_runners_probes_are_in_one_that_nobody_knows_beforehand() {
        let parent = tempfile::tempdir().unwrap();
        let state_dir = StateDir::create(parent.path(), None).unwrap();
        let own = of_probes(&Environment::default(), &state_dir);
        assert_eq!(own, state_dir.root());
        let runner = Environment::from_iter([("RUNNER_TEMP", "/r")]);
        assert_eq!(of_probes(&runner, &state_dir), Path::new("/r"));
    }
}
