//! The environment variables of a step, as a value.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The variables a process sees. A test builds one from pairs; the binary takes its own.
///
/// An empty variable counts as unset throughout, because a workflow writes `${{ inputs.something
/// }}` and gets the empty string if the input was not given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    variables: BTreeMap<Key, NamedValue>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct NamedValue {
    name: String,
    value: String,
}

/// The form of a variable's name that all its spellings share: on Windows `Path` is `PATH`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key(String);

impl Key {
    fn of(name: &str) -> Self {
        Self(if cfg!(windows) {
            name.to_uppercase()
        } else {
            name.to_owned()
        })
    }
}

impl Environment {
    /// The variables of this process. A variable that is not Unicode is left out: all those that
    /// the action reads are Unicode.
    pub fn of_this_process() -> Self {
        let unicode = |(name, value): (OsString, OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        std::env::vars_os().filter_map(unicode).collect()
    }

    /// The value of `name`, or `None` if it is unset or empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        let variable = self.variables.get(&Key::of(name))?;
        Some(variable.value.as_str()).filter(|value| !value.is_empty())
    }

    /// Whether `name` is set to something.
    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// The value of `name` as a path, or `None` if it is unset or empty.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.get(name).map(PathBuf::from)
    }

    /// Sets `name` to `value`, replacing its old value.
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<String>) {
        let (name, value) = (name.into(), value.into());
        self.variables
            .insert(Key::of(&name), NamedValue { name, value });
    }

    /// Unsets `name`.
    pub fn remove(&mut self, name: &str) {
        self.variables.remove(&Key::of(name));
    }

    /// The variables that a program run by this action may see: all except those between the runner
    /// and the step, such as inputs, files and tokens.
    #[must_use]
    pub fn for_programs(&self) -> Self {
        self.iter()
            .filter(|(name, _)| !is_between_runner_and_step(name))
            .collect()
    }

    /// The file that `program` means on `PATH`.
    pub fn find_program(&self, program: &str) -> Option<PathBuf> {
        self.find_programs(program).next()
    }

    /// All files that `program` could mean on `PATH`, in its order.
    pub fn find_programs(&self, program: &str) -> impl Iterator<Item = PathBuf> {
        let file = format!("{program}{}", std::env::consts::EXE_SUFFIX);
        let folders = std::env::split_paths(self.get("PATH").unwrap_or_default());
        folders
            .map(move |folder| folder.join(&file))
            .filter(|path| is_executable(path))
    }

    /// All variables, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables
            .values()
            .map(|variable| (variable.name.as_str(), variable.value.as_str()))
    }
}

fn is_between_runner_and_step(name: &str) -> bool {
    const FILES_AND_TOKENS: [&str; 12] = [
        "ACTIONS_CACHE_URL",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
        "ACTIONS_ID_TOKEN_REQUEST_URL",
        "ACTIONS_RESULTS_URL",
        "ACTIONS_RUNTIME_TOKEN",
        "GH_TOKEN",
        "GITHUB_ENV",
        "GITHUB_OUTPUT",
        "GITHUB_PATH",
        "GITHUB_STATE",
        "GITHUB_STEP_SUMMARY",
        "GITHUB_TOKEN",
    ];
    let name = Key::of(name).0;
    name.starts_with("INPUT_")
        || name.starts_with("STATE_")
        || FILES_AND_TOKENS.contains(&name.as_str())
}

/// Whether `path` is a file that this user may run.
#[cfg(unix)]
pub(crate) fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// Whether `path` is a file.
#[cfg(not(unix))]
pub(crate) fn is_executable(path: &Path) -> bool {
    path.is_file()
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        let mut environment = Self::default();
        for (name, value) in pairs {
            environment.set(name, value);
        }
        environment
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_variable_counts_as_unset() {
        let environment = Environment::from_iter([("A", ""), ("B", "1")]);
        assert_eq!(environment.get("A"), None);
        assert!(!environment.has("A"));
        assert_eq!(environment.get("B"), Some("1"));
    }

    #[test]
    fn names_are_told_apart_as_the_system_does() {
        let mut environment =
            Environment::from_iter([("Path", "1"), ("Actions_Runtime_Token", "2")]);
        let path = environment.get("PATH");
        assert_eq!(path, cfg!(windows).then_some("1"));
        // A program is given the names as they were.
        assert!(environment.iter().any(|pair| pair == ("Path", "1")));
        let token = environment.for_programs().has("Actions_Runtime_Token");
        assert_eq!(token, !cfg!(windows));
        environment.set("PATH", "3");
        let names = environment.iter().count();
        assert_eq!(names, if cfg!(windows) { 2 } else { 3 });
        environment.remove("path");
        assert_eq!(environment.has("PATH"), !cfg!(windows));
    }
}
