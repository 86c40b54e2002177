//! The JavaScript launcher in `dist/`, under node, with a fake runner's environment: with the
//! binary that is released, and with binaries that misbehave.

use crate::support::tools;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::runner::{Job, Step};
use serde_json::json;
use sha2::{Digest, Sha256};

fn dist() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("dist")
}

/// The launcher in its own folder, with this script in the binary's place.
struct Launcher {
    folder: tempfile::TempDir,
}

impl Launcher {
    fn with_script(script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for file in ["main.js", "post.js", "launcher.js"] {
            fs::copy(dist().join(file), folder.path().join(file)).unwrap();
        }
        let launcher = Self { folder };
        let text = format!("#!/bin/sh\n{script}\n");
        fs::write(launcher.binary(), &text).unwrap();
        fs::set_permissions(launcher.binary(), fs::Permissions::from_mode(0o755)).unwrap();
        launcher.write_manifest(&hex::encode(Sha256::digest(&text)), "linux-x64");
        launcher
    }

    fn binary(&self) -> PathBuf {
        self.folder.path().join("binary")
    }

    fn write_manifest(&self, sha256: &str, runner: &str) {
        let manifest = json!({
            "binaries": { runner: { "file": "binary", "sha256": sha256 } }
        });
        let file = self.folder.path().join("manifest.json");
        fs::write(file, manifest.to_string()).unwrap();
    }

    fn main(&self, job: &Job) -> Step {
        job.action_step(false, &["node".into(), self.folder.path().join("main.js")])
    }

    fn post(&self, job: &Job) -> Step {
        job.action_step(true, &["node".into(), self.folder.path().join("post.js")])
    }
}

#[test]
fn what_is_in_dist_was_built_from_this_source() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/build-dist");
    let check = Command::new(script).arg("--check").output().unwrap();
    assert!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stderr)
    );
}

#[test]
fn the_released_binary_runs_a_whole_job_through_the_launcher() {
    let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
    job.set("INPUT_MODE", "local");
    fs::write(job.path("workspace/a.c"), "int f(void) { return 1; }\n").unwrap();
    let main = job.action_step(false, &["node".into(), dist().join("main.js")]);
    let main = main.green();
    assert!(
        main.stdout.contains("sccache 0.16.0 (path) is ready"),
        "{}",
        main.stdout
    );
    assert!(main.warnings().is_empty());
    job.shell("sccache gcc -c a.c -o a.o; rm a.o; sccache gcc -c a.c -o a.o")
        .green();
    let post = job.action_step(true, &["node".into(), dist().join("post.js")]);
    let post = post.green();
    assert!(
        post.stdout.contains("1 hit, 1 miss, 0 errors"),
        "{}",
        post.stdout
    );
    assert!(
        job.file("GITHUB_STEP_SUMMARY")
            .contains("50.0 % of 2 compiles")
    );
}

#[test]
fn the_main_step_and_the_post_step_run_their_commands() {
    let launcher = Launcher::with_script("echo \"ran $*\"; echo \"token $ACTIONS_RUNTIME_TOKEN\"");
    let mut job = Job::new();
    job.set("ACTIONS_RUNTIME_TOKEN", "t0ken");
    assert_eq!(
        launcher.main(&job).green().stdout,
        "ran setup\ntoken t0ken\n"
    );
    assert_eq!(
        launcher.post(&job).green().stdout,
        "ran report\ntoken t0ken\n"
    );
}

#[test]
fn a_binary_that_was_changed_is_not_run() {
    let launcher = Launcher::with_script("echo ran");
    fs::write(launcher.binary(), "#!/bin/sh\necho changed\n").unwrap();
    let mut job = Job::new();
    let main = launcher.main(&job).green();
    assert_eq!(main.warnings().len(), 1, "{}", main.stdout);
    assert!(
        main.warnings()[0].contains("does not match the manifest"),
        "{}",
        main.stdout
    );
    assert!(!main.stdout.contains("\nchanged"), "{}", main.stdout);
    launcher.post(&job).green();
    job.set("INPUT_ON-FAILURE", "fail");
    let main = launcher.main(&job);
    assert_eq!(
        (main.status, main.errors().len()),
        (Some(1), 1),
        "{}",
        main.stdout
    );
}

#[test]
fn a_runner_without_a_binary_is_named_with_those_that_have_one() {
    let launcher = Launcher::with_script("echo ran");
    launcher.write_manifest("", "freebsd-x64");
    let main = launcher.main(&Job::new()).green();
    assert_eq!(main.warnings().len(), 1, "{}", main.stdout);
    let warning = main.warnings()[0];
    assert!(
        warning.contains("for linux-x64; there is one for freebsd-x64"),
        "{warning}"
    );
    assert!(warning.contains("without a cache"));
}

/// A job whose node says that it runs on this platform.
fn job_on(platform: &str, processor: &str) -> Job {
    let mut job = Job::new();
    let file = job.path("platform.js");
    let define = |name: &str, value: &str| {
        format!("Object.defineProperty(process, '{name}', {{ value: '{value}' }});\n")
    };
    let script = define("platform", platform) + &define("arch", processor);
    fs::write(&file, script).unwrap();
    job.set("NODE_OPTIONS", format!("--require={}", file.display()));
    job
}

#[test]
fn windows_on_arm_runs_the_binary_for_x64_and_others_run_none_but_their_own() {
    let script = "echo ran";
    let launcher = Launcher::with_script(script);
    let sha256 = hex::encode(Sha256::digest(format!("#!/bin/sh\n{script}\n")));
    launcher.write_manifest(&sha256, "win32-x64");
    let main = launcher.main(&job_on("win32", "arm64")).green();
    assert_eq!(main.stdout, "ran\n");
    for (platform, processor) in [
        ("linux", "riscv64"),
        ("linux", "s390x"),
        ("darwin", "arm64"),
    ] {
        let main = launcher.main(&job_on(platform, processor)).green();
        let warning = main.warnings().join("");
        let named = format!("for {platform}-{processor}; there is one for win32-x64");
        assert!(warning.contains(&named), "{}", main.stdout);
    }
}

#[test]
fn a_message_of_the_launcher_gives_the_runner_no_command_but_itself() {
    let launcher = Launcher::with_script("exit 3");
    let file = launcher.folder.path().join("manifest.json");
    let foreign = "##[set-output name=path]/tmp/evil\n::set-output name=path::/tmp/evil";
    let manifest = json!({
        "binaries": { "linux-x64": { "file": foreign, "sha256": foreign } }
    });
    fs::write(file, manifest.to_string()).unwrap();
    let main = launcher.main(&Job::new()).green();
    assert_eq!(main.warnings().len(), 1, "{}", main.stdout);
    assert!(main.stdout.contains("set-output"), "{}", main.stdout);
}

#[test]
fn a_folder_that_is_not_whole_leaves_the_job_green() {
    for file in ["manifest.json", "binary"] {
        let launcher = Launcher::with_script("echo ran");
        fs::remove_file(launcher.folder.path().join(file)).unwrap();
        let job = Job::new();
        assert_eq!(launcher.main(&job).green().warnings().len(), 1, "{file}");
        assert_eq!(launcher.post(&job).green().warnings().len(), 1, "{file}");
    }
}

#[test]
fn a_crash_leaves_the_job_green_unless_the_user_wants_it_red() {
    for script in ["exit 3", "exit 101", "kill -SEGV $$", "kill -KILL $$"] {
        let launcher = Launcher::with_script(script);
        let mut job = Job::new();
        assert_eq!(launcher.main(&job).green().warnings().len(), 1, "{script}");
        assert_eq!(launcher.post(&job).green().warnings().len(), 1, "{script}");
        job.set("INPUT_ON-FAILURE", "fail");
        assert_eq!(launcher.main(&job).status, Some(1), "{script}");
        assert_eq!(launcher.post(&job).status, Some(0), "{script}");
    }
}

#[test]
fn a_failure_that_must_be_shown_fails_the_main_step_and_where_the_user_wants_it_the_post_step() {
    let launcher = Launcher::with_script("echo '::error::bad input'; exit 1");
    let mut job = Job::new();
    let main = launcher.main(&job);
    assert_eq!((main.status, main.errors().len()), (Some(1), 1));
    assert!(main.warnings().is_empty());
    launcher.post(&job).green();
    job.set("INPUT_ON-FAILURE", "fail");
    let post = launcher.post(&job);
    assert_eq!((post.status, post.errors().len()), (Some(1), 1));
    assert!(post.warnings().is_empty());
}

#[test]
fn a_lost_executable_bit_is_put_back() {
    let launcher = Launcher::with_script("echo ran");
    fs::set_permissions(launcher.binary(), fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(launcher.main(&Job::new()).green().stdout, "ran\n");
}

#[test]
fn an_sccache_that_the_workflow_names_and_nobody_has_is_unset() {
    let launcher = Launcher::with_script("exit 3");
    let node = Command::new("sh")
        .args(["-c", "command -v node"])
        .output()
        .unwrap();
    let node = PathBuf::from(String::from_utf8_lossy(&node.stdout).trim());
    for (name, value, expected) in [
        ("RUSTC_WRAPPER", "sccache", "RUSTC_WRAPPER=\n"),
        ("RUSTC_WRAPPER", "/nowhere/sccache", "RUSTC_WRAPPER=\n"),
        ("RUSTC_WRAPPER", "other", ""),
        ("CC", "sccache gcc -m32", "CC=gcc -m32\n"),
        ("CC", "gcc", ""),
        ("CC", "sccache gcc\nPATH=/x", ""),
        (
            "CMAKE_C_COMPILER_LAUNCHER",
            "sccache",
            "CMAKE_C_COMPILER_LAUNCHER=\n",
        ),
    ] {
        let mut job = Job::new();
        job.set(name, value);
        job.set("PATH", "/usr/bin:/bin");
        job.action_step(
            false,
            &[node.clone(), launcher.folder.path().join("main.js")],
        )
        .green();
        assert_eq!(job.file("GITHUB_ENV"), expected, "{name}={value}");
    }
}

#[test]
fn a_cancelled_job_ends_the_binary_in_good_order() {
    // The script says when it is ready by opening the pipe, and what it was told by writing to it.
    let job = Job::new();
    let pipe = job.path("pipe");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let launcher = Launcher::with_script(&format!(
        "exec 3> {}; trap 'echo terminated >&3; exit 0' TERM; echo ready >&3; \
         while :; do sleep 0.05; done",
        pipe.display()
    ));
    let mut child = Command::new("node")
        .arg(launcher.folder.path().join("main.js"))
        .env_remove("GITHUB_ENV")
        .spawn()
        .unwrap();
    let mut said = std::io::BufReader::new(fs::File::open(&pipe).unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut said, &mut line).unwrap();
    assert_eq!(line, "ready\n");
    let kill = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status();
    assert!(kill.unwrap().success());
    line.clear();
    std::io::BufRead::read_line(&mut said, &mut line).unwrap();
    assert_eq!(line, "terminated\n");
    assert!(child.wait().unwrap().success());
}
