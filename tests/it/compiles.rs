//! Compiles through the wrapper beside the bare compiler's, in whole jobs: in the situations of which
//! builds have reported that a cache changed them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use crate::support::c_build::{BUILD, FILES, objects, remove_objects, write_source, write_sources};
use crate::support::outcome::{Outcome, outcome, shown};
use crate::support::runner::{Job, Step, all_files, binary, kill};
use crate::support::tools;
use crate::support::upstream::{Options, Upstream};

/// A job in mode `packed` with the sources of the small C build.
fn job(upstream: &Upstream) -> Job {
    let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
    job.use_service(&upstream.url, &upstream.token);
    job.set("GITHUB_WORKFLOW", "CI");
    job.set("GITHUB_JOB", "build");
    job.set("INPUT_WRAP", "c");
    write_sources(&job);
    job
}

/// Waits until sccache's server runs in another process than `killed`.
#[track_caller]
fn another_server(job: &Job, killed: u32) -> u32 {
    let begin = Instant::now();
    loop {
        match job.server_pid() {
            Some(pid) if pid != killed => return pid,
            _ => assert!(begin.elapsed() < Duration::from_secs(20), "it stays away"),
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_server_that_is_killed_is_started_again_with_the_same_storage_and_no_token_in_any_step() {
    let upstream = Upstream::start(Options::default());
    let first = job(&upstream);
    first.setup().green();
    first.shell(BUILD).green();
    first.report().green();
    let mut second = job(&upstream);
    // Objects that are on the disk already would prove nothing of the storage behind it.
    second.set("INPUT_NAMESPACE", "default");
    second.setup().green();
    let killed = second.server_pid().unwrap();
    kill(killed);
    let started = another_server(&second, killed);
    let environment = fs::read(format!("/proc/{started}/environ")).unwrap();
    let environment = String::from_utf8_lossy(&environment).into_owned();
    assert!(environment.contains("SCCACHE_MULTILEVEL_CHAIN=disk,gha"));
    assert!(!environment.contains(&upstream.token));
    for (name, value) in second.later_environment().iter() {
        assert!(
            !name.starts_with("ACTIONS_") && !value.contains(&upstream.token),
            "{name}"
        );
    }
    second.shell(BUILD).green();
    assert_eq!(objects(&second), FILES);
    let report = second.report().green();
    report.prints("6 hits, 0 misses");
    assert!(
        !report.stdout.contains("without sccache"),
        "{}",
        report.stdout
    );
    let warnings = report.warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].contains("sccache's server died 1 time in the job"),
        "{warnings:?}"
    );
    second.server_ends();
}

#[test]
fn a_server_that_dies_again_and_again_is_left_and_the_build_goes_on() {
    let upstream = Upstream::start(Options::default());
    let job = job(&upstream);
    job.setup().green();
    let mut pid = job.server_pid().unwrap();
    for _ in 0..5 {
        kill(pid);
        pid = another_server(&job, pid);
    }
    kill(pid);
    job.shell(BUILD).green();
    assert_eq!(objects(&job), FILES);
    let report = job.report().green();
    report.prints("died 6 times");
    job.server_ends();
}

/// Stops a process without ending it, as one that hangs.
fn hang(pid: u32) {
    let status = Command::new("kill")
        .args(["-STOP", &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// A post step that takes less than `limit` and has one warning, with `words` in it.
#[track_caller]
fn report_within(job: &Job, limit: Duration, words: &str) {
    let begin = Instant::now();
    let report = job.report().green();
    let took = begin.elapsed();
    assert!(took < limit, "{took:?}");
    assert_eq!(report.warnings().len(), 1, "{}", report.stdout);
    assert!(report.warnings()[0].contains(words), "{}", report.stdout);
}

#[test]
fn a_server_that_hangs_costs_the_post_step_seconds_and_is_ended_with_the_relay() {
    let upstream = Upstream::start(Options::default());
    let job = job(&upstream);
    job.setup().green();
    job.shell(BUILD).green();
    hang(job.server_pid().unwrap());
    report_within(&job, Duration::from_secs(30), "did not answer");
    job.server_ends();
    assert_eq!(job.relay_pid(), None);
}

#[test]
fn a_relay_that_hangs_costs_one_compile_less_than_half_a_minute_and_the_others_nothing() {
    let upstream = Upstream::start(Options::default());
    // If no pack has an object, no compile waits for the relay.
    let first = job(&upstream);
    first.setup().green();
    first.shell(BUILD).green();
    first.report().green();
    let job = job(&upstream);
    for i in 1..=FILES {
        write_source(&job, i, &format!("{i} + 100"));
    }
    job.setup().green();
    let relay = job.relay_pid().unwrap();
    hang(relay);
    let begin = Instant::now();
    job.shell("sccache gcc -c 1.c -o 1.o").green();
    let first = begin.elapsed();
    job.shell(BUILD).green();
    let others = begin.elapsed() - first;
    assert_eq!(objects(&job), FILES);
    assert!(first < Duration::from_secs(30), "{first:?}");
    assert!(others < Duration::from_secs(5), "{others:?}");
    let given_up = job.later_environment().path("SCCACHE_PATH").unwrap();
    let given_up = given_up.parent().unwrap().with_file_name("given-up");
    let why = fs::read_to_string(given_up).unwrap();
    assert_eq!(why, "the relay to GitHub's cache does not answer");
    // Nor do the server's later requests keep the post step.
    report_within(&job, Duration::from_secs(90), "does not answer");
    kill(relay);
}

#[test]
fn a_server_without_a_relay_that_is_killed_comes_back_where_steps_have_what_it_takes() {
    for (mode, variable) in [("local", "SCCACHE_DIR"), ("external", "SCCACHE_CONF")] {
        let mut job = Job::with_sccache(&tools::sccache("0.16.0"));
        job.set("INPUT_MODE", mode);
        let disk = job.path("disk");
        let value = match mode {
            "local" => disk.display().to_string(),
            _ => {
                let file = job.path("sccache.toml");
                let text = format!("[cache.disk]\ndir = \"{}\"\n", disk.display());
                fs::write(&file, text).unwrap();
                file.display().to_string()
            }
        };
        job.set(variable, value);
        write_sources(&job);
        job.setup().green();
        job.shell(BUILD).green();
        kill(job.server_pid().unwrap());
        remove_objects(&job);
        let build = job.shell(&format!("umask 022\n{BUILD}")).green();
        assert_eq!(build.stderr, "", "{mode}");
        assert_eq!(objects(&job), FILES, "{mode}");
        assert_eq!(modes(&job, &["1.o"]), ["1.o 644"], "{mode}");
        let report = job.report().green();
        assert!(
            report.stdout.contains("6 hits, 0 misses"),
            "{mode}: {}",
            report.stdout
        );
        assert!(report.warnings().is_empty(), "{mode}: {}", report.stdout);
        job.server_ends();
    }
}

/// A job whose server itself asks the cache service, with a token that no later step has.
fn job_without_a_relay(upstream: &Upstream, mode: &str) -> Job {
    let mut job = job(upstream);
    job.set("INPUT_MODE", mode);
    if mode == "external" {
        job.set("SCCACHE_MULTILEVEL_CHAIN", "disk,gha");
    }
    job
}

#[test]
fn a_server_whose_token_no_step_has_is_started_again_by_what_keeps_it() {
    for mode in ["direct", "external"] {
        let upstream = Upstream::start(Options::default());
        let first = job_without_a_relay(&upstream, mode);
        first.setup().green();
        first.shell(BUILD).green();
        first.report().green();
        let second = job_without_a_relay(&upstream, mode);
        let setup = second.setup().green();
        assert!(setup.warnings().is_empty(), "{mode}: {}", setup.stdout);
        let killed = second.server_pid().unwrap();
        kill(killed);
        let started = another_server(&second, killed);
        let environment = fs::read(format!("/proc/{started}/environ")).unwrap();
        assert!(String::from_utf8_lossy(&environment).contains(&upstream.token));
        for (name, value) in second.later_environment().iter() {
            assert!(!value.contains(&upstream.token), "{mode}: {name}");
        }
        second.shell(BUILD).green();
        assert_eq!(objects(&second), FILES, "{mode}");
        let report = second.report().green();
        let text = &report.stdout;
        assert!(text.contains("6 hits, 0 misses"), "{mode}: {text}");
        assert!(!text.contains("without sccache"), "{mode}: {text}");
        let warnings = report.warnings();
        assert_eq!(warnings.len(), 1, "{mode}: {warnings:?}");
        assert!(warnings[0].contains("died 1 time in the job"), "{mode}");
        second.server_ends();
        let begin = Instant::now();
        while !second.relays().is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(20), "{mode}");
            std::thread::yield_now();
        }
    }
}

#[test]
fn what_keeps_a_server_has_the_token_in_no_environment_command_line_or_file_and_may_die() {
    let upstream = Upstream::start(Options::default());
    let job = job_without_a_relay(&upstream, "direct");
    job.setup().green();
    let keeper = job.relay_pid().unwrap();
    for what in ["environ", "cmdline"] {
        let text = fs::read(format!("/proc/{keeper}/{what}")).unwrap();
        assert!(!String::from_utf8_lossy(&text).contains(&upstream.token));
    }
    for file in all_files(&job.path("")) {
        let text = fs::read(&file).unwrap();
        let text = String::from_utf8_lossy(&text);
        assert!(!text.contains(&upstream.token), "{}", file.display());
    }
    // The server does not need it.
    kill(keeper);
    job.shell(BUILD).green();
    let report = job.report().green();
    report.prints("6 misses");
    report.warns_never();
    job.server_ends();
}

#[test]
fn a_relay_that_hangs_costs_the_post_step_seconds() {
    let upstream = Upstream::start(Options::default());
    let job = job(&upstream);
    job.setup().green();
    job.shell(BUILD).green();
    let relay = job.relay_pid().unwrap();
    hang(relay);
    report_within(&job, Duration::from_secs(60), "it does not answer");
    kill(relay);
}

#[test]
fn a_folder_for_temporary_files_that_is_missing_or_has_a_long_path_is_in_nobodys_way() {
    let long = tempfile::tempdir().unwrap();
    let long = long.path().join("t".repeat(170));
    fs::create_dir_all(&long).unwrap();
    for folder in [&long, Path::new("/not/there")] {
        let upstream = Upstream::start(Options::default());
        let mut job = job(&upstream);
        job.set("TMPDIR", folder.display().to_string());
        let setup = job.setup().green();
        setup.warns_never();
        let build = job.shell(BUILD).green();
        assert_eq!(build.stderr, "");
        remove_objects(&job);
        job.shell(BUILD).green();
        assert_eq!(objects(&job), FILES);
        let report = job.report().green();
        let said = "6 hits, 6 misses, 0 errors";
        report.prints(said);
        report.warns_never();
    }
}

/// Processes that have this job's `RUNNER_TEMP` in their environment, with their command lines.
fn processes_of(job: &Job) -> Vec<(u32, String)> {
    let own = format!("RUNNER_TEMP={}", job.get("RUNNER_TEMP"));
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let processes = processes.filter_map(|process| {
        let pid: u32 = process.file_name().to_str()?.parse().ok()?;
        let environment = fs::read(process.path().join("environ")).ok()?;
        let mut variables = environment.split(|byte| *byte == 0);
        variables
            .any(|variable| variable == own.as_bytes())
            .then_some(())?;
        let line = fs::read(process.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        // A process that has ended and whose parent has not waited for it has no command line.
        (!line.is_empty()).then_some((pid, line))
    });
    processes.collect()
}

/// Cancels the main step `after` this time by a signal, runs the post step and waits until no process
/// of the job is left.
#[track_caller]
fn cancel(upstream: &Upstream, mode: &str, after: Duration, signal: &str) {
    let mut job = job(upstream);
    job.set("INPUT_MODE", mode);
    let launcher = launcher_of_this_build(&job);
    let mut step = Command::new("node")
        .arg(launcher.join("main.js"))
        .env_clear()
        .envs(job.main_environment().iter())
        .current_dir(job.path("workspace"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // The test is about this moment, and there is no event for it.
    std::thread::sleep(after);
    let sent = Command::new("kill")
        .args([signal, &step.id().to_string()])
        .status();
    assert!(sent.is_ok());
    let _ = step.wait().unwrap();
    let post = job.action_step(true, &["node".into(), launcher.join("post.js")]);
    post.green();
    let begin = Instant::now();
    loop {
        let left = processes_of(&job);
        if left.is_empty() {
            return;
        }
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "{mode}, {signal} after {after:?}: {left:?}"
        );
        std::thread::yield_now();
    }
}

/// The launcher with the binary under test in place of the released one.
fn launcher_of_this_build(job: &Job) -> std::path::PathBuf {
    let folder = job.path("launcher");
    fs::create_dir_all(&folder).unwrap();
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist");
    for file in ["main.js", "post.js", "launcher.js"] {
        fs::copy(dist.join(file), folder.join(file)).unwrap();
    }
    fs::copy(binary(), folder.join("binary")).unwrap();
    let digest = Command::new("sha256sum").arg(binary()).output().unwrap();
    let digest = String::from_utf8_lossy(&digest.stdout).into_owned();
    let digest = digest.split_whitespace().next().unwrap();
    let manifest = format!(
        "{{\"binaries\":{{\"linux-x64\":{{\"file\":\"binary\",\"sha256\":\"{digest}\"}}}}}}"
    );
    fs::write(folder.join("manifest.json"), manifest).unwrap();
    folder
}

#[test]
fn a_job_that_is_cancelled_at_any_moment_of_the_main_step_leaves_no_process() {
    let upstream = Upstream::start(Options::default());
    for mode in ["packed", "direct", "local"] {
        for step in 0..16 {
            let after = Duration::from_millis(40 * step);
            let signal = ["-INT", "-TERM"][step as usize % 2];
            cancel(&upstream, mode, after, signal);
        }
    }
}

#[test]
fn a_main_step_that_is_killed_leaves_no_relay_and_no_server_of_the_relays() {
    let upstream = Upstream::start(Options::default());
    let job = job(&upstream);
    let mut step = Command::new(binary())
        .arg("setup")
        .env_clear()
        .envs(job.main_environment().iter())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while processes_of(&job).len() < 2 && step.try_wait().unwrap().is_none() {
        assert!(begin.elapsed() < Duration::from_secs(10), "no relay");
        std::thread::yield_now();
    }
    kill(step.id());
    let _ = step.wait().unwrap();
    while !processes_of(&job).is_empty() {
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "{:?}",
            processes_of(&job)
        );
        std::thread::yield_now();
    }
}

/// The modes of these files in the workspace.
fn modes(job: &Job, files: &[&str]) -> Vec<String> {
    let mode = |file: &&str| {
        let path = job.path("workspace").join(file);
        format!(
            "{file} {:o}",
            fs::metadata(path).unwrap().permissions().mode() & 0o7777
        )
    };
    files.iter().map(mode).collect()
}

#[test]
fn an_object_has_the_mode_that_the_steps_umask_gives_it() {
    let upstream = Upstream::start(Options::default());
    let job = job(&upstream);
    job.setup().green();
    fs::write(job.path("workspace/k.rs"), "pub fn k() -> u32 { 1 }\n").unwrap();
    let build = |compiler: &str| {
        format!(
            "rm -f 1.o 1.d libk-1.rlib k-1.d
             {compiler} gcc -MD -MF 1.d -c 1.c -o 1.o
             {compiler} rustc --crate-name k --crate-type lib --emit=dep-info,metadata,link \
                 -C extra-filename=-1 --out-dir . k.rs"
        )
    };
    let files = ["1.o", "1.d", "libk-1.rlib", "libk-1.rmeta", "k-1.d"];
    for umask in ["022", "002", "077", "027"] {
        job.shell(&format!("umask {umask}\n{}", build(""))).green();
        let bare = modes(&job, &files);
        for state in ["first", "again"] {
            job.shell(&format!("umask {umask}\n{}", build("sccache")))
                .green();
            assert_eq!(modes(&job, &files), bare, "{umask} {state}");
        }
    }
}

#[test]
fn each_version_of_sccache_starts_and_its_objects_have_the_steps_mode() {
    for version in [
        "0.19.0", "0.16.0", "0.15.0", "0.14.0", "0.10.0", "0.9.1", "0.8.2", "0.7.7", "0.5.3",
        "0.4.0", "debian",
    ] {
        let mut job = Job::with_sccache(&tools::sccache(version));
        job.set("INPUT_MODE", "local");
        write_sources(&job);
        let setup = job.setup().green();
        assert!(
            setup.warnings().is_empty(),
            "{version}: {:?}",
            setup.warnings()
        );
        for state in ["cold", "hit"] {
            job.shell("umask 022; rm -f 1.o; sccache gcc -c 1.c -o 1.o")
                .green();
            assert_eq!(modes(&job, &["1.o"]), ["1.o 644"], "{version} {state}");
        }
        let report = job.report().green();
        assert!(
            report.stdout.contains("1 hit, 1 miss"),
            "{version}: {}",
            report.stdout
        );
        job.server_ends();
    }
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output().unwrap();
    id.stdout.trim_ascii() == b"0"
}

/// This command as a user without rights.
fn as_another<'a>(command: &[&'a str]) -> Vec<&'a str> {
    let user = [
        "setpriv",
        "--reuid=12345",
        "--regid=12345",
        "--clear-groups",
    ];
    [&user[..], command].concat()
}

#[track_caller]
fn open_to_all(folder: &Path) {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
}

#[track_caller]
fn give_to_another(folder: &Path) {
    let status = Command::new("chown")
        .args(["-R", "12345"])
        .arg(folder)
        .status();
    assert!(status.unwrap().success());
}

#[test]
fn a_step_that_drops_root_compiles_as_the_user_that_it_is() {
    if !is_root() {
        eprintln!("only root can be another user; nothing was tested");
        return;
    }
    let upstream = Upstream::start(Options::default());
    let job = job(&upstream);
    open_to_all(&job.path(""));
    job.setup().green();
    let folder = job.path("workspace");
    give_to_another(&folder);
    let lines = format!("{BUILD}; cc -shared -o all.so 1.o 2.o");
    job.step(&as_another(&["sh", "-e", "-c", &lines])).green();
    for i in 1..=FILES {
        use std::os::unix::fs::MetadataExt;
        let metadata = fs::metadata(folder.join(format!("{i}.o"))).unwrap();
        assert_eq!((metadata.uid(), metadata.mode() & 0o777), (12345, 0o644));
    }
    assert_report_of_another_user(&job);
}

#[test]
fn a_step_that_becomes_root_compiles_as_root() {
    if !is_root() {
        eprintln!("only root can be another user; nothing was tested");
        return;
    }
    let upstream = Upstream::start(Options::default());
    let job = job(&upstream);
    open_to_all(&job.path(""));
    give_to_another(&job.path(""));
    job.action_step(false, &as_another(&[binary(), "setup"]))
        .green();
    let workspace = job.path("workspace");
    let status = Command::new("chown")
        .args(["-R", "0"])
        .arg(&workspace)
        .status();
    assert!(status.unwrap().success());
    job.shell(BUILD).green();
    assert_eq!(objects(&job), FILES);
    let report = job
        .action_step(true, &as_another(&[binary(), "report"]))
        .green();
    assert_says_another_user(&job, &report.stdout);
}

#[track_caller]
fn assert_report_of_another_user(job: &Job) {
    let report = job.report().green();
    report.warns_never();
    assert_says_another_user(job, &report.stdout);
}

#[track_caller]
fn assert_says_another_user(job: &Job, log: &str) {
    let said =
        "6 compiles ran without sccache, since the step runs as another user than the action.";
    let summary = job.file("GITHUB_STEP_SUMMARY");
    assert!(
        log.contains(said) && summary.contains(said),
        "{log}\n{summary}"
    );
}

/// A job whose `RUNNER_TEMP` is its own file system, mounted with these options: set-up, build
/// twice, report. Returns the log and the files left in `RUNNER_TEMP`.
fn on_a_file_system(options: &str) -> Option<(Job, String)> {
    let may_mount = Command::new("unshare").args(["--mount", "true"]).status();
    if !may_mount.is_ok_and(|status| status.success()) {
        eprintln!("this user may not mount anything; nothing was tested");
        return None;
    }
    let upstream = Upstream::start(Options::default());
    let job = job(&upstream);
    let temporary = job.get("RUNNER_TEMP").to_owned();
    let script = format!(
        "mount -t tmpfs -o {options} tmpfs {temporary}\n\
         {binary} setup\n\
         (export SCCACHE_SERVER_PORT=$(sed -n '/^SCCACHE_SERVER_PORT<</{{n;p}}' $GITHUB_ENV)\n\
         export PATH=$(cat $GITHUB_PATH):$PATH\n\
         {BUILD}; rm *.o; {BUILD})\n\
         du -sk {temporary}",
        binary = binary(),
    );
    let command = ["unshare", "--mount", "sh", "-e", "-c", &script];
    let step = job.action_step(false, &command).green();
    assert_eq!(objects(&job), FILES, "{}{}", step.stdout, step.stderr);
    let relay = job.relay_pid().unwrap().to_string();
    let report = ["nsenter", "--mount", "--target", &relay, binary(), "report"];
    let report = job.action_step(true, &report).green();
    assert!(
        step.warnings().is_empty() && report.warnings().is_empty(),
        "{}",
        report.stdout
    );
    report.prints("6 hits, 6 misses");
    Some((job, step.stdout))
}

#[test]
fn a_folder_for_temporary_files_on_which_nothing_can_be_run_costs_nothing() {
    if let Some((job, _)) = on_a_file_system("noexec") {
        let tools = fs::read_dir(job.path("tools")).unwrap().flatten();
        let left = tools.filter(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .starts_with("sccache-action")
        });
        assert_eq!(left.count(), 0, "the state folder is still there");
    }
}

#[test]
fn a_folder_for_temporary_files_that_is_nearly_full_is_not_filled_with_half_a_wrapper() {
    if let Some((_, log)) = on_a_file_system("size=2M") {
        let used = log
            .lines()
            .last()
            .unwrap()
            .split_whitespace()
            .next()
            .unwrap();
        assert!(used.parse::<u64>().unwrap() < 64, "{used} kB are used");
    }
}

/// A compile of the table: the shell runs it in its own folder, with `$W` being nothing or
/// `sccache`.
struct Row {
    name: String,
    lines: String,
}

/// The calls of C compilers, `CC` being the compiler.
const OF_C: &[(&str, &str)] = &[
    ("plain", "$W CC -c a.c -o a.o"),
    ("without -o", "$W CC -c a.c"),
    ("into a folder", "mkdir o; $W CC -c a.c -o o/a.o"),
    ("into a folder that is missing", "$W CC -c a.c -o o/a.o"),
    (
        "optimised with debug information",
        "$W CC -O2 -g -c a.c -o a.o",
    ),
    ("a warning", "$W CC -Wall -c warn.c -o w.o"),
    (
        "a warning again",
        "$W CC -Wall -c warn.c -o w.o; $W CC -Wall -c warn.c -o w.o",
    ),
    ("-Werror", "$W CC -Wall -Werror -c warn.c -o w.o"),
    ("an error", "$W CC -c err.c -o e.o"),
    ("a header that is missing", "$W CC -c missing.c -o m.o"),
    ("a source that is missing", "$W CC -c none.c -o n.o"),
    ("an option that is unknown", "$W CC -fno-such -c a.c -o a.o"),
    (
        "colours",
        "$W CC -fdiagnostics-color=always -Wall -c warn.c -o w.o",
    ),
    (
        "no colours",
        "$W CC -fdiagnostics-color=never -Wall -c warn.c -o w.o",
    ),
    ("-w", "$W CC -w -Wall -c warn.c -o w.o"),
    ("a depfile", "$W CC -MD -MF x.d -c a.c -o a.o"),
    (
        "a depfile with its own target",
        "$W CC -MMD -MP -MT t -MF x.d -c a.c -o a.o",
    ),
    (
        "a depfile with a quoted target",
        "$W CC -MD -MQ 't$' -MF x.d -c a.c -o a.o",
    ),
    (
        "a depfile of the preprocessor's",
        "$W CC -Wp,-MMD,x.d -c a.c -o a.o",
    ),
    (
        "a depfile in another folder",
        "mkdir d; $W CC -MMD -MF d/x.d -c a.c -o a.o",
    ),
    ("a depfile without a name", "$W CC -MD -c a.c -o a.o"),
    (
        "a depfile without a name, user headers",
        "$W CC -MMD -MP -c a.c -o a.o",
    ),
    ("dependencies only", "$W CC -MM a.c"),
    ("preprocessed to standard output", "$W CC -E a.c"),
    ("preprocessed to a file", "$W CC -E a.c -o a.i"),
    ("assembler source", "$W CC -S a.c -o a.s"),
    ("coverage", "$W CC --coverage -frandom-seed=1 -c a.c -o a.o"),
    (
        "split debug information",
        "$W CC -g -gsplit-dwarf -c a.c -o a.o",
    ),
    (
        "link-time optimisation",
        "$W CC -flto -frandom-seed=1 -c a.c -o a.o",
    ),
    (
        "sections",
        "$W CC -ffunction-sections -fdata-sections -fPIC -c a.c -o a.o",
    ),
    ("-save-temps", "$W CC -save-temps -c a.c -o a.o"),
    ("standard input", "$W CC -x c -c - -o a.o < a.c"),
    (
        "standard input with an error",
        "$W CC -x c -c - -o a.o < err.c",
    ),
    (
        "a response file",
        "echo '-DZ=2 -c a.c -o a.o' > args; $W CC @args",
    ),
    (
        "a response file beside other arguments",
        "echo '-DZ=2' > args; $W CC @args -c a.c -o a.o",
    ),
    ("a space in the path", "$W CC -c 'sp ace.c' -o 'sp ace.o'"),
    ("Unicode in the path", "$W CC -c 'é λ.c' -o 'é λ.o'"),
    ("a define with quotes", "$W CC '-DS=\"a b\"' -c a.c -o a.o"),
    (
        "a folder of headers",
        "mkdir i; mv h.h i; $W CC -Ii -c a.c -o a.o",
    ),
    (
        "a header that is forced",
        "$W CC -include h.h -c warn.c -o w.o",
    ),
    (
        "a language that is named",
        "mv a.c a.odd; $W CC -x c -c a.odd -o a.o",
    ),
    ("two sources", "$W CC -c a.c warn.c"),
    ("a program", "$W CC main.c -o program"),
    (
        "a program that cannot be linked",
        "$W CC a.c -o program 2>/dev/null",
    ),
    ("a shared library", "$W CC -shared -fPIC a.c -o a.so"),
    ("--version", "$W CC --version"),
    ("-dumpmachine", "$W CC -dumpmachine"),
    ("-print-search-dirs", "$W CC -print-search-dirs"),
    ("assembler with the preprocessor", "$W CC -c b.S -o b.o"),
    ("assembler", "$W CC -c c.s -o c.o"),
    ("assembler with coverage", "$W CC --coverage -c b.S -o b.o"),
    (
        "a name with a newline in a message",
        "$W CC -c warn2.c -Wall -o w.o",
    ),
    (
        "an output that may only be read",
        "touch a.o; chmod 444 a.o; $W CC -c a.c -o a.o",
    ),
    (
        "a device as output",
        "mknod null c 1 3; $W CC -c a.c -o null",
    ),
    (
        "a big environment",
        "V=$(head -c 100000 /dev/zero | tr '\\0' v); export V; $W CC -c a.c -o a.o",
    ),
    (
        "no environment",
        "env -i PATH=\"$PATH\" $W CC -c a.c -o a.o",
    ),
    (
        "umask 002",
        "umask 002; $W CC -g -gsplit-dwarf -MD -MF a.d -c a.c -o a.o",
    ),
    ("umask 077", "umask 077; $W CC -MD -MF a.d -c a.c -o a.o"),
    ("no standard error", "$W CC -Wall -c warn.c -o w.o 2>&-"),
    ("no standard input", "$W CC -c a.c -o a.o <&-"),
];

/// The calls of C++ compilers, `CC` being the compiler.
const OF_CPP: &[(&str, &str)] = &[
    ("plain", "$W CC -c a.cpp -o a.o"),
    (
        "C++20 with warnings",
        "$W CC -std=c++20 -Wall -Wextra -c a.cpp -o a.o",
    ),
    ("an error in a template", "$W CC -c err.cpp -o e.o"),
    (
        "no exceptions",
        "$W CC -fno-exceptions -fno-rtti -O1 -c a.cpp -o a.o",
    ),
    ("a depfile", "$W CC -MD -MF x.d -c a.cpp -o a.o"),
    (
        "a precompiled header",
        "$W CC -x c++-header p.hpp -o p.hpp.pch",
    ),
    ("C source", "$W CC -x c -c a.c -o a.o"),
];

/// The calls of rustc.
const OF_RUST: &[(&str, &str)] = &[
    (
        "a library as cargo has it",
        "$W rustc --crate-name k --edition=2021 k.rs --error-format=json \
         --json=diagnostic-rendered-ansi,artifacts,future-incompat --crate-type lib \
         --emit=dep-info,metadata,link -C metadata=1 -C extra-filename=-1 --out-dir . 2>&1 | \
         sed 's/\\x1b\\[[0-9;]*m//g'",
    ),
    (
        "metadata only",
        "$W rustc --crate-name k k.rs --crate-type lib --emit=dep-info,metadata -C extra-filename=-1 \
         --out-dir .",
    ),
    (
        "a warning",
        "$W rustc --crate-name w w.rs --crate-type lib --emit=dep-info,metadata,link --out-dir .",
    ),
    (
        "a warning that is an error",
        "$W rustc -D warnings --crate-name w w.rs --crate-type lib --emit=dep-info,metadata,link \
         --out-dir .",
    ),
    (
        "an error",
        "$W rustc --crate-name e e.rs --crate-type lib --emit=dep-info,metadata,link --out-dir .",
    ),
    (
        "a static library",
        "$W rustc --crate-name k k.rs --crate-type staticlib --emit=dep-info,link --out-dir .",
    ),
    ("a program", "$W rustc m.rs -o m"),
    ("-vV", "$W rustc -vV"),
    (
        "umask 077",
        "umask 077; $W rustc --crate-name k k.rs --crate-type lib --emit=dep-info,metadata,link \
         -C extra-filename=-2 --out-dir .",
    ),
    (
        "an environment variable",
        "V=1 $W rustc --crate-name v v.rs --crate-type lib --emit=dep-info,metadata,link --out-dir .",
    ),
];

/// The calls that are no compiles, and pass through.
const OF_OTHERS: &[(&str, &str)] = &[
    ("as", "$W as c.s -o c.o"),
    ("as --version", "$W as --version"),
    ("ld -v", "$W ld -v"),
    ("nm", "gcc -c a.c -o a.o; $W nm a.o"),
    ("ar", "gcc -c a.c -o a.o; $W ar rcsD a.a a.o"),
    ("objcopy", "gcc -c a.c -o a.o; $W objcopy a.o b.o"),
    (
        "a compiler that is missing",
        "$W no-such-cc -c a.c -o a.o 2>/dev/null",
    ),
];

/// The differences that are unavoidable, with their reasons: the row's name, a file or `stdout`,
/// `stderr`, `status`. A row whose parts have come to be the same is no longer to stand here.
const UNLIKE: &[(&str, &str, &str)] = &[
    ("gcc: no standard error", "status", NO_STDERR),
    ("gcc: no standard error", "w.o", NO_STDERR),
    ("g++: a precompiled header", "p.hpp.pch", GCH),
];

const NO_STDERR: &str = "gcc fails where it cannot write a warning; in sccache's server it can";
const GCH: &str = "gcc writes other bytes each time, with and without sccache";

fn rows() -> Vec<Row> {
    let row = |compiler: &str, (name, lines): &(&str, &str)| Row {
        name: format!("{compiler}: {name}"),
        lines: lines.replace("CC", compiler),
    };
    let mut rows = Vec::new();
    for (compilers, table) in [
        (&["gcc", "clang"][..], OF_C),
        (&["g++", "clang++"], OF_CPP),
        (&["rustc"], OF_RUST),
        (&["others"], OF_OTHERS),
    ] {
        for compiler in compilers {
            rows.extend(table.iter().map(|entry| row(compiler, entry)));
        }
    }
    let may_make_devices = is_root();
    rows.retain(|row| may_make_devices || !row.lines.contains("mknod"));
    rows
}

fn write_table_sources(folder: &Path) {
    for (file, text) in [
        ("h.h", "#define H 7\n"),
        (
            "a.c",
            "#include \"h.h\"\n#include <stddef.h>\nsize_t a(int x) { return x > 1 ? sizeof(int) : H; }\n",
        ),
        ("warn.c", "int w(void) { int unused; return 1; }\n"),
        (
            "warn2.c",
            "#warning \"a \\n b é\"\nint w(void) { return 1; }\n",
        ),
        ("err.c", "int e(void) { return nothing; }\n"),
        ("missing.c", "#include <nothere.h>\n"),
        ("main.c", "int main(void) { return 0; }\n"),
        ("sp ace.c", "int s(void) { return 1; }\n"),
        ("é λ.c", "int u(void) { return 1; }\n"),
        ("b.S", "#define N 1\n.text\n.globl b\nb: nop\n"),
        ("c.s", ".text\n.globl c\nc: nop\n"),
        (
            "a.cpp",
            "template <class T> T twice(T x) { return x + x; }\nint a(int y) { return twice(y); }\n",
        ),
        (
            "err.cpp",
            "template <class T> T f(T x) { return x.y; }\nint a() { return f(1); }\n",
        ),
        ("p.hpp", "#pragma once\ninline int p() { return 1; }\n"),
        ("k.rs", "pub fn k() -> u32 { 1 }\n"),
        ("w.rs", "pub fn w() { let unused = 1; }\n"),
        ("e.rs", "pub fn e() -> u32 { nothing }\n"),
        ("m.rs", "fn main() {}\n"),
        ("v.rs", "pub const V: &str = env!(\"V\");\n"),
    ] {
        let path = folder.join(file);
        fs::write(&path, text).unwrap();
        // clang writes it into precompiled headers.
        let source = fs::File::options().write(true).open(path).unwrap();
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        source.set_modified(time).unwrap();
    }
}

/// Runs a row in a new folder, which has the same path each time.
fn give(job: &Job, index: usize, row: &Row, wrapper: &str) -> Outcome {
    let folder = job.path("workspace").join(format!("row-{index}"));
    let lines = format!("W={wrapper}\n{}", row.lines);
    outcome(job, &folder, write_table_sources, &lines)
}

/// The differences between the wrapped compile and the bare one that should not be, or that are
/// missing.
#[track_caller]
fn differences(name: &str, state: &str, bare: &Outcome, wrapped: &Outcome) -> Vec<String> {
    let parts = bare.keys().chain(wrapped.keys());
    let parts: std::collections::BTreeSet<&String> = parts.collect();
    let mut wrong = Vec::new();
    for (_, part, why) in UNLIKE.iter().filter(|(row, _, _)| *row == name) {
        if !parts.iter().any(|each| *each == part) {
            wrong.push(format!("{name} ({state}) has no {part}, but: {why}"));
        }
    }
    for part in parts {
        let mut excuses = UNLIKE.iter();
        let excuse = excuses.find(|(row, of, _)| *row == name && *of == part);
        let (bare, wrapped) = (bare.get(part), wrapped.get(part));
        match (bare == wrapped, excuse) {
            (true, None) | (false, Some(_)) => {}
            (true, Some((_, _, why))) => {
                wrong.push(format!("{name} ({state}), {part} is the same, but: {why}"));
            }
            (false, None) => {
                let (bare, wrapped) = (shown(bare), shown(wrapped));
                wrong.push(format!(
                    "{name} ({state}), {part}:\n  bare    {bare}\n  wrapped {wrapped}"
                ));
            }
        }
    }
    wrong
}

#[test]
fn each_compile_of_the_table_is_the_bare_compile_cold_and_as_a_hit() {
    let upstream = Upstream::start(Options::default());
    let job = job(&upstream);
    job.setup().green();
    let rows = rows();
    assert!(rows.len() >= 60);
    let wrapper = job.later_environment().path("SCCACHE_PATH").unwrap();
    let state = wrapper.parent().unwrap().parent().unwrap();
    let all: Vec<(usize, &Row)> = rows.iter().enumerate().collect();
    let check = |part: &[(usize, &Row)]| {
        let mut wrong = Vec::new();
        for (index, row) in part {
            let bare = give(&job, *index, row, "");
            for state_of_cache in ["cold", "hit"] {
                let wrapped = give(&job, *index, row, "sccache");
                wrong.extend(differences(&row.name, state_of_cache, &bare, &wrapped));
                // A row that made the wrapper give sccache up must not keep the next from asking
                // it.
                for notes in ["uncached", "given-up"] {
                    let _ = fs::remove_file(state.join(notes));
                }
            }
        }
        wrong
    };
    let (first, second) = all.split_at(all.len() / 2);
    let wrong = std::thread::scope(|scope| {
        let other = scope.spawn(|| check(second));
        let mut wrong = check(first);
        wrong.extend(other.join().unwrap());
        wrong
    });
    let report = job.report().green();
    let hits = report
        .stdout
        .split(" hits")
        .next()
        .unwrap()
        .rsplit('(')
        .next();
    let hits: u64 = hits.unwrap().parse().unwrap();
    assert!(hits >= 100, "hardly anything was a hit: {}", report.stdout);
    assert!(
        wrong.is_empty(),
        "{} differ\n{}\n{}",
        wrong.len(),
        wrong.join("\n"),
        report.stdout
    );
}

/// Two jobs in the same folder, as on a runner: `sources` writes what the first and the second compile,
/// then they run these lines. Returns what the lines printed and the logs of the post steps.
fn in_two_jobs(lines: &str, sources: impl Fn(&Path, usize)) -> [(Step, Step); 2] {
    in_two_jobs_with(&[], lines, sources)
}

/// The same with these variables besides.
fn in_two_jobs_with(
    variables: &[(&str, &str)],
    lines: &str,
    sources: impl Fn(&Path, usize),
) -> [(Step, Step); 2] {
    let upstream = Upstream::start(Options::default());
    let place = tempfile::tempdir().unwrap();
    [1, 2].map(|number| {
        let folder = place.path().join("job");
        if folder.exists() {
            fs::remove_dir_all(&folder).unwrap();
        }
        let mut job = Job::in_folder(folder);
        job.use_sccache(&tools::sccache("0.16.0"));
        job.use_service(&upstream.url, &upstream.token);
        job.set("GITHUB_WORKFLOW", "CI");
        job.set("GITHUB_JOB", "build");
        job.set("INPUT_WRAP", "c");
        for (name, value) in variables {
            job.set(name, *value);
        }
        job.setup().green();
        sources(&job.path("workspace"), number);
        let build = job.shell(lines).green();
        let report = job.report().green();
        job.server_ends();
        (build, report)
    })
}

/// Writes `count` small sources, `n1.c` and so on.
fn write_numbered(folder: &Path, count: usize) {
    for i in 1..=count {
        let source = format!("int n{i}(void) {{ return {i}; }}\n");
        fs::write(folder.join(format!("n{i}.c")), source).unwrap();
    }
}

#[test]
fn what_sccache_cannot_do_does_not_keep_the_rest_of_the_job_from_its_cache() {
    for refused in [
        "sccache gcc --coverage -c s.S -o s$i.o",
        "sccache ld -v",
        "sccache as --version",
        "sccache nm --version",
    ] {
        let lines = format!(
            "for i in 1 2 3 4; do {refused}; done\n\
             for i in 1 2 3 4 5 6; do sccache gcc -c n$i.c -o n$i.o; done"
        );
        let [_, (_, report)] = in_two_jobs(&lines, |folder, _| {
            write_numbered(folder, 6);
            fs::write(folder.join("s.S"), ".text\n.globl s\ns: ret\n").unwrap();
        });
        assert!(
            report.stdout.contains("(6 hits"),
            "{refused}: {}",
            report.stdout
        );
        assert!(
            report.warnings().is_empty(),
            "{refused}: {:?}",
            report.warnings()
        );
    }
}

/// The text that CMake's `target_precompile_headers` writes for `pre.hpp`.
fn write_pch(folder: &Path) {
    let header = folder.join("pre.hpp");
    let text = format!(
        "#pragma GCC system_header\n#include \"{}\"\n",
        header.display()
    );
    fs::write(folder.join("pch.hxx"), text).unwrap();
    fs::write(folder.join("pch.cxx"), "").unwrap();
}

#[test]
fn a_precompiled_header_is_never_the_one_of_another_job() {
    let lines =
        "sccache g++ -Winvalid-pch -x c++-header -include $PWD/pch.hxx -o pch.hxx.gch -c pch.cxx
                 sccache g++ -Winvalid-pch -include $PWD/pch.hxx -c main.cpp -o main.o
                 g++ main.o -o main; ./main";
    let [(first, _), (second, _)] = in_two_jobs(lines, |folder, number| {
        let header = format!("#pragma once\n#include <cstdio>\n#define TEST {number}\n");
        fs::write(folder.join("pre.hpp"), header).unwrap();
        write_pch(folder);
        let main = "int main() { std::printf(\"%d\\n\", TEST); }\n";
        fs::write(folder.join("main.cpp"), main).unwrap();
    });
    assert_eq!((&*first.stdout, &*second.stdout), ("1\n", "2\n"));
}

#[test]
fn a_comment_that_changed_in_a_precompiled_header_does_not_define_anything_twice() {
    let lines =
        "sccache g++ -Winvalid-pch -x c++-header -include $PWD/pch.hxx -o pch.hxx.gch -c pch.cxx
                 sccache g++ -Winvalid-pch -include $PWD/pch.hxx -c main.cpp -o main.o
                 sccache g++ -Winvalid-pch -include $PWD/pch.hxx -c f.cpp -o f.o
                 g++ main.o f.o -o main; ./main";
    let jobs = in_two_jobs(lines, |folder, number| {
        let header = format!("// {number}\n#pragma once\nconstexpr int K = 7;\n");
        fs::write(folder.join("pre.hpp"), header).unwrap();
        write_pch(folder);
        let main = "#include \"pre.hpp\"\n#include <cstdio>\nint f();\n\
                    int main() { std::printf(\"%d\\n\", K + f()); }\n";
        fs::write(folder.join("main.cpp"), main).unwrap();
        let source =
            format!("#include \"pre.hpp\"\nint f() {{ return K + {number} - {number}; }}\n");
        fs::write(folder.join("f.cpp"), source).unwrap();
    });
    for (build, _) in jobs {
        assert_eq!(build.stdout, "14\n");
    }
}

#[test]
fn each_output_has_the_depfile_that_the_compiler_writes_for_it() {
    let lines = "mkdir -p a b
                 sccache gcc -MMD -MP -c f.c -o a/f.o; sccache gcc -MMD -MP -c f.c -o b/f.o
                 sccache gcc -MD -MT a/x.o -MF a/x.d -c f.c -o a/x.o
                 sccache gcc -MD -MT b/x.o -MF b/x.d -c f.c -o b/x.o
                 for file in a/f.d b/f.d a/x.d b/x.d; do head -n 1 $file | cut -d: -f1; done";
    let jobs = in_two_jobs(lines, |folder, _| {
        fs::write(folder.join("h.h"), "#define H 1\n").unwrap();
        fs::write(
            folder.join("f.c"),
            "#include \"h.h\"\nint f(void) { return H; }\n",
        )
        .unwrap();
    });
    for (build, _) in jobs {
        assert_eq!(build.stdout, "a/f.o\nb/f.o\na/x.o\nb/x.o\n");
    }
}

#[test]
fn a_source_in_two_programs_is_covered_in_each() {
    let lines = "mkdir -p one two
                 for t in one two; do
                   sccache gcc --coverage -c f.c -o $t/f.o
                   sccache gcc --coverage -c $t.c -o $t/main.o
                   gcc --coverage $t/f.o $t/main.o -o $t/program
                   $t/program
                 done
                 find . -name 'f.gcda' | sort";
    let jobs = in_two_jobs(lines, |folder, _| {
        fs::write(
            folder.join("f.c"),
            "int f(int x) { if (x > 1) return 2; return 3; }\n",
        )
        .unwrap();
        for (name, value) in [("one", 1), ("two", 2)] {
            let source = format!("int f(int);\nint main(void) {{ return f({value}) == 0; }}\n");
            fs::write(folder.join(format!("{name}.c")), source).unwrap();
        }
    });
    for (build, _) in jobs {
        assert_eq!(build.stdout, "./one/f.gcda\n./two/f.gcda\n");
    }
}

#[test]
fn probes_of_a_configure_script_are_not_asked_for_and_not_counted() {
    let lines = "for i in 1 2 3; do
                     cp n$i.c conftest.c
                     sccache gcc -c conftest.c -o conftest.o
                     sccache gcc -c n$i.c -o n$i.o
                 done
                 echo '#include <nothere.h>' > conftest.c
                 sccache gcc -c conftest.c 2> /dev/null || true";
    let [_, (_, report)] = in_two_jobs_with(&[], lines, |folder, _| write_numbered(folder, 3));
    report.prints("100 % of 3 compiles");
    assert!(!report.stdout.contains("that failed"), "{}", report.stdout);
    report.warns_never();
}

#[test]
fn compiles_that_must_fail_are_no_errors_of_sccache_and_not_in_the_hit_rate() {
    let lines = "for i in $(seq 1 12); do sccache gcc -c n$i.c -o n$i.o; done
                 sccache gcc -c h.c -o h.o || true
                 sccache gcc -fno-such -c n1.c -o x.o || true";
    // A red step would end the test.
    let strict = [("INPUT_MIN-HIT-RATE", "90"), ("INPUT_ON-FAILURE", "fail")];
    let [_, (_, report)] = in_two_jobs_with(&strict, lines, |folder, _| {
        write_numbered(folder, 12);
        fs::write(folder.join("h.c"), "#include <nothere.h>\n").unwrap();
    });
    assert!(
        report.stdout.contains("100 % of 12 compiles")
            && report.stdout.contains("2 compiles that failed"),
        "{}",
        report.stdout
    );
    report.warns_never();
}

/// The files of objects in a disk cache of sccache's. The errors of its preprocessor cache are in
/// another place.
fn objects_on_disk(folder: &Path) -> Vec<std::path::PathBuf> {
    let files = crate::support::runner::all_files(folder).into_iter();
    let is_object = |file: &std::path::PathBuf| !file.starts_with(folder.join("preprocessor"));
    files.filter(is_object).collect()
}

#[test]
fn reads_from_the_cache_that_fail_are_told_from_compiles_that_fail() {
    for version in ["0.4.0", "0.10.0", "0.16.0", "0.19.0"] {
        let mut job = Job::with_sccache(&tools::sccache(version));
        job.set("INPUT_MODE", "local");
        let disk = job.path("disk");
        job.set("SCCACHE_DIR", disk.display().to_string());
        job.set("INPUT_MIN-HIT-RATE", "0");
        write_sources(&job);
        job.setup().green();
        job.shell(BUILD).green();
        job.report().green();
        job.server_ends();
        job.setup().green();
        // The probe's is among them and has been read.
        for object in objects_on_disk(&disk) {
            fs::write(object, "no archive").unwrap();
        }
        job.shell(BUILD).green();
        assert_eq!(objects(&job), FILES, "{version}");
        job.shell("sccache gcc -c none.c -o none.o || sccache gcc -fno-such -c 1.c -o x.o || true")
            .green();
        let report = job.report().green();
        let log = &report.stdout;
        assert!(
            log.contains("0 hits, 6 misses, 6 errors"),
            "{version}: {log}"
        );
        let warnings = report.warnings();
        assert_eq!(warnings.len(), 1, "{version}: {log}");
        let said = "6 cache reads failed";
        assert!(warnings[0].contains(said), "{version}: {warnings:?}");
        job.server_ends();
    }
}
