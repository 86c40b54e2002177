//! The files through which a step talks to the runner: variables and folders for later steps,
//! outputs, state for the post step, the job summary.
//!
//! The formats are those of GitHub's "Workflow commands" page: `NAME<<DELIMITER`, the value, the
//! delimiter again; a folder a line for `GITHUB_PATH`.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::runner::environment::Environment;

/// The files of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunnerFiles {
    environment: Option<PathBuf>,
    path: Option<PathBuf>,
    output: Option<PathBuf>,
    state: Option<PathBuf>,
    summary: Option<PathBuf>,
}

/// A name and a value, as they go to later steps.
pub type Variable = (String, String);

impl RunnerFiles {
    /// The files that `environment` names. Outside a runner there are none, and their text is
    /// dropped.
    pub fn of(environment: &Environment) -> Self {
        Self {
            environment: environment.path("GITHUB_ENV"),
            path: environment.path("GITHUB_PATH"),
            output: environment.path("GITHUB_OUTPUT"),
            state: environment.path("GITHUB_STATE"),
            summary: environment.path("GITHUB_STEP_SUMMARY"),
        }
    }

    /// Sets variables for later steps, all of them or none.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn export(&self, variables: &[Variable]) -> io::Result<()> {
        append(self.environment.as_deref(), &entries(variables))
    }

    /// Puts `folder` in front of later steps' `PATH`.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn add_to_path(&self, folder: &Path) -> io::Result<()> {
        append(self.path.as_deref(), &format!("{}\n", folder.display()))
    }

    /// Sets outputs of this step.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn set_outputs(&self, outputs: &[Variable]) -> io::Result<()> {
        append(self.output.as_deref(), &entries(outputs))
    }

    /// Keeps values for the post step, which sees each as `STATE_<name>`.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn save_state(&self, state: &[Variable]) -> io::Result<()> {
        append(self.state.as_deref(), &entries(state))
    }

    /// Adds `markdown` to the job summary.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn add_to_summary(&self, markdown: &str) -> io::Result<()> {
        append(self.summary.as_deref(), &format!("{markdown}\n"))
    }
}

fn append(file: Option<&Path>, text: &str) -> io::Result<()> {
    let Some(file) = file else { return Ok(()) };
    // One write, so that a failure leaves no partial entry.
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(file)?
        .write_all(text.as_bytes())
}

fn entries(variables: &[Variable]) -> String {
    variables
        .iter()
        .map(|(name, value)| entry(name, value, &Uuid::new_v4().to_string()))
        .collect()
}

/// One entry. The delimiter is random, so that no value can end its entry early and begin another.
fn entry(name: &str, value: &str, delimiter: &str) -> String {
    format!("{name}<<ghadelimiter_{delimiter}\n{value}\nghadelimiter_{delimiter}\n")
}

/// The names and values in a file that steps wrote for the runner, in order.
pub fn read_entries(text: &str) -> Vec<Variable> {
    let mut entries = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some((name, delimiter)) = line.split_once("<<") {
            let value: Vec<&str> = lines
                .by_ref()
                .take_while(|line| *line != delimiter)
                .collect();
            entries.push((name.to_owned(), value.join("\n")));
        } else if let Some((name, value)) = line.split_once('=') {
            entries.push((name.to_owned(), value.to_owned()));
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_form_the_runner_reads() {
        assert_eq!(
            entry("A", "one\ntwo", "x"),
            "A<<ghadelimiter_x\none\ntwo\nghadelimiter_x\n"
        );
    }

    #[test]
    fn what_was_written_is_read_back() {
        let written = [
            ("A", "one"),
            ("B", ""),
            ("C", "two\nlines=<<x"),
            ("D", "a=b"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(read_entries(&entries(&written)), written);
        assert_eq!(read_entries("A=1=2\n"), [("A".into(), "1=2".into())]);
    }

    #[test]
    fn entries_are_appended_and_their_delimiters_differ() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("env");
        let environment = Environment::from_iter([("GITHUB_ENV", file.display().to_string())]);
        let files = RunnerFiles::of(&environment);
        let variable = |name: &str| (name.to_owned(), "1".to_owned());
        files.export(&[variable("A"), variable("B")]).unwrap();
        files.export(&[variable("C")]).unwrap();
        let text = std::fs::read_to_string(file).unwrap();
        let mut delimiters: Vec<&str> = text
            .lines()
            .filter_map(|line| line.split_once("<<").map(|(_, delimiter)| delimiter))
            .collect();
        assert_eq!(delimiters.len(), 3);
        delimiters.sort_unstable();
        delimiters.dedup();
        assert_eq!(delimiters.len(), 3);
    }

    #[test]
    fn outside_a_runner_nothing_is_written_and_nothing_fails() {
        let files = RunnerFiles::of(&Environment::default());
        files.export(&[("A".into(), "1".into())]).unwrap();
        files.add_to_summary("x").unwrap();
    }
}
