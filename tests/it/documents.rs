//! Checks that the documents match the code.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// The texts in backquotes in a line.
fn quoted(line: &str) -> Vec<&str> {
    line.split('`').skip(1).step_by(2).collect()
}

#[test]
fn each_claim_about_security_names_a_test_that_exists() {
    let text = read("SECURITY.md");
    let rows = text.lines().filter(|line| {
        line.starts_with("| ") && !line.starts_with("| claim |") && line.ends_with(" |")
    });
    let mut count = 0;
    for row in rows {
        let (_, test) = row.trim_end_matches(" |").rsplit_once(" | ").unwrap();
        let names = quoted(test);
        let [file, name] = names.as_slice() else {
            panic!("{row}");
        };
        let code = read(file);
        assert!(
            code.contains(&format!("fn {name}(")),
            "{file} has no {name}"
        );
        count += 1;
    }
    assert!(count > 30, "{count}");
}

#[test]
fn no_job_of_a_workflow_that_may_write_runs_programs_of_others() {
    let mut may_write = 0;
    for entry in fs::read_dir(root().join(".github/workflows")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let workflow: serde_yaml::Value = serde_yaml::from_str(&text).unwrap();
        // A permission that is not named here has the repository's default.
        assert!(workflow.get("permissions").is_some(), "{}", path.display());
        for (name, job) in workflow["jobs"].as_mapping().unwrap() {
            let own = job.get("permissions").unwrap_or(&workflow["permissions"]);
            if !serde_yaml::to_string(own).unwrap().contains("write") {
                continue;
            }
            may_write += 1;
            for step in job["steps"].as_sequence().unwrap() {
                let lines = step.get("run").and_then(|run| run.as_str());
                let lines = lines.unwrap_or_default();
                let fetches = ["cargo ", "npm ", "npx ", "pip ", "curl ", "wget "];
                for fetch in fetches {
                    assert!(!lines.contains(fetch), "{name:?}: {lines}");
                }
                // Actions are GitHub's own, each pinned to a commit.
                if let Some(action) = step.get("uses").and_then(|uses| uses.as_str()) {
                    let (action, commit) = action.split_once('@').unwrap();
                    assert!(action.starts_with("actions/"), "{action}");
                    assert_eq!(commit.len(), 40, "{action}");
                }
            }
        }
    }
    assert_eq!(may_write, 1);
}

const BEGIN: &str = "<!-- inputs: from action.yml -->\n";
const END: &str = "<!-- /inputs -->";

/// The table of inputs, as `action.yml` has them.
fn input_table() -> String {
    let action: serde_yaml::Value = serde_yaml::from_str(&read("action.yml")).unwrap();
    let mut table = "| Input | Default | |\n|---|---|---|\n".to_owned();
    for (name, input) in action["inputs"].as_mapping().unwrap() {
        let name = name.as_str().unwrap();
        let default = match &input["default"] {
            serde_yaml::Value::Null => String::new(),
            // An expression is the runner's.
            serde_yaml::Value::String(text) if text.starts_with("${{") => String::new(),
            serde_yaml::Value::String(text) => format!("`{text}`"),
            other => format!("`{}`", serde_yaml::to_string(other).unwrap().trim()),
        };
        let description = input["description"].as_str().unwrap();
        let description = description.split_whitespace().collect::<Vec<_>>().join(" ");
        writeln!(table, "| `{name}` | {default} | {description} |").unwrap();
    }
    table
}

#[test]
fn the_readmes_table_of_inputs_is_that_of_action_yml() {
    let text = read("README.md");
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (table, after) = rest.split_once(END).unwrap();
    let expected = input_table();
    if table == expected {
        return;
    }
    assert!(
        std::env::var_os("UPDATE_DOCUMENTS").is_some(),
        "run `UPDATE_DOCUMENTS=1 cargo test --test it documents::`; it must be\n{expected}"
    );
    let text = format!("{before}{BEGIN}{expected}{END}{after}");
    fs::write(root().join("README.md"), text).unwrap();
}

/// The documents for people.
fn documents() -> Vec<PathBuf> {
    let folders = [root().to_owned(), root().join("docs")];
    let entries = folders
        .iter()
        .flat_map(|folder| fs::read_dir(folder).unwrap());
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect()
}

/// A heading's anchor, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text
        .chars()
        .filter(|letter| letter.is_alphanumeric() || matches!(letter, ' ' | '-' | '_'));
    kept.map(|letter| if letter == ' ' { '-' } else { letter })
        .collect()
}

#[test]
fn each_picture_of_the_documents_is_there_for_a_light_page_and_a_dark_one() {
    let mut count = 0;
    for path in documents() {
        let text = fs::read_to_string(&path).unwrap();
        for picture in text.split("<picture>").skip(1) {
            let (picture, _) = picture.split_once("</picture>").unwrap();
            for (before, theme) in [("srcset=\"", "-dark."), ("src=\"", "-light.")] {
                let (_, file) = picture.split_once(before).unwrap();
                let (file, _) = file.split_once('"').unwrap();
                assert!(file.contains(theme), "{file}");
                assert!(path.with_file_name(file).is_file(), "{file}");
            }
            count += 1;
        }
    }
    assert!(count > 5, "{count}");
}

#[test]
fn links_between_documents_lead_somewhere() {
    let documents = documents();
    assert!(documents.len() >= 8, "{documents:?}");
    for document in documents {
        let text = fs::read_to_string(&document).unwrap();
        for link in text.split("](").skip(1) {
            let (link, _) = link.split_once(')').unwrap();
            if link.contains("://") {
                continue;
            }
            let (path, fragment) = link.split_once('#').unwrap_or((link, ""));
            let target = match path {
                "" => document.clone(),
                path => document.parent().unwrap().join(path),
            };
            assert!(target.exists(), "{}: {link}", document.display());
            if fragment.is_empty() {
                continue;
            }
            let text = fs::read_to_string(&target).unwrap();
            let mut headings = text.lines().filter(|line| line.starts_with('#'));
            let found = headings.any(|heading| anchor(heading) == fragment);
            assert!(found, "{}: {link}", document.display());
        }
    }
}
