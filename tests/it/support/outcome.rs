//! The results of a step, in parts that can be compared with those of another.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::runner::{Job, all_files};

/// The parts by name: `status`, `stdout`, `stderr`, and each new file with its mode in front.
pub type Outcome = BTreeMap<String, Vec<u8>>;

/// Runs `lines` in `folder`, which is made again with the files of `write_sources`.
pub fn outcome(job: &Job, folder: &Path, write_sources: fn(&Path), lines: &str) -> Outcome {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).unwrap();
    write_sources(folder);
    let sources = all_files(folder);
    let lines = format!("cd '{}'\n{lines}", folder.display());
    let step = job.step(&["sh", "-c", &lines]);
    let mut parts = Outcome::from([
        (
            "status".to_owned(),
            format!("{:?}", step.status).into_bytes(),
        ),
        ("stdout".to_owned(), step.stdout.into_bytes()),
        ("stderr".to_owned(), step.stderr.into_bytes()),
    ]);
    for file in all_files(folder) {
        if sources.contains(&file) {
            continue;
        }
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        let mut content = format!("{mode:o} ").into_bytes();
        content.extend(fs::read(&file).unwrap());
        let name = file.strip_prefix(folder).unwrap().display().to_string();
        parts.insert(name, content);
    }
    parts
}

/// A part as text, for a failed test.
pub fn shown(part: Option<&Vec<u8>>) -> String {
    match part {
        None => "nothing".to_owned(),
        Some(text) => format!(
            "{} bytes: {:.300}",
            text.len(),
            String::from_utf8_lossy(text)
        ),
    }
}
