//! `sccache-action rehearse`: a whole job, cold and warm, on a machine with as little as can be.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::tools;

/// A rehearsal that finds nothing but these programs on PATH, and the sccache that the tests have.
fn rehearse(programs: &[&str], arguments: &[&str]) -> Output {
    let home = tempfile::tempdir().unwrap();
    rehearsal(home.path(), programs, arguments)
        .output()
        .unwrap()
}

fn rehearsal(home: &Path, programs: &[&str], arguments: &[&str]) -> Command {
    let path = home.join("bin");
    fs::create_dir(&path).unwrap();
    symlink(tools::sccache("0.16.0"), path.join("sccache")).unwrap();
    for program in programs {
        symlink(found(program), path.join(program)).unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_sccache-action"));
    command
        .args(["rehearse", "--sccache", "0.16.0", "--install-from", "path"])
        .args(arguments)
        .env_clear()
        .env("HOME", home)
        .env("PATH", &path);
    command
}

fn found(program: &str) -> std::path::PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let mut files = std::env::split_paths(&path).map(|folder| folder.join(program));
    files.find(|file| file.exists()).unwrap()
}

fn lines(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{output:?}");
    text
}

#[test]
fn a_rehearsal_without_cargo_compiles_the_sample_s_c_files_and_finds_them_again() {
    let text = lines(&rehearse(&["cc", "as"], &[]));
    let told = "cargo is not on PATH, so only the sample's C files are compiled.";
    assert!(text.contains(told), "{text}");
    let cold = "cold: 0 % of 8 compiles came from the cache (0 hits, 8 misses, 0 errors)";
    let warm = "warm: 100 % of 8 compiles came from the cache (8 hits, 0 misses, 0 errors)";
    assert!(text.contains(cold) && text.contains(warm), "{text}");
}

#[test]
fn a_sample_that_cannot_be_built_is_told_with_what_it_takes() {
    let output = rehearse(&[], &[]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{output:?}");
    let needed = "neither cargo with its crates nor a C compiler called cc";
    assert!(error.contains(needed), "{error}");
}

#[test]
fn a_build_of_the_user_s_own_is_run_where_it_stands() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("own.c");
    fs::write(&source, "int own(void) { return 7; }\n").unwrap();
    let compile = own_build(&source);
    let compile: Vec<&str> = compile.iter().map(String::as_str).collect();
    let text = lines(&rehearse(&["cc", "as"], &compile));
    let warm = "warm: 100 % of 1 compile came from the cache";
    assert!(text.contains(warm), "{text}");
    assert!(source.with_extension("o").exists());
}

fn own_build(source: &Path) -> Vec<String> {
    let object = source.with_extension("o");
    let words = ["--", "sccache", "cc", "-c"].map(str::to_owned);
    let files = [source, Path::new("-o"), &object].map(|path| path.display().to_string());
    words.into_iter().chain(files).collect()
}

#[test]
fn an_interrupted_rehearsal_leaves_no_server_and_no_folder() {
    let home = tempfile::tempdir().unwrap();
    let folders = home.path().join("folders");
    fs::create_dir(&folders).unwrap();
    // The shell waits for another process, which must end too.
    let build = "echo port=$SCCACHE_SERVER_PORT; sleep 600; true";
    let programs = ["sh", "sleep", "cc", "as"];
    let mut child = rehearsal(home.path(), &programs, &["--", "sh", "-c", build])
        .env("TMPDIR", &folders)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut printed = BufReader::new(child.stdout.take().unwrap()).lines();
    let port: u16 = printed
        .find_map(|line| line.unwrap().strip_prefix("port=")?.parse().ok())
        .unwrap();
    TcpStream::connect(("127.0.0.1", port)).unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let printed: Vec<String> = printed.map(Result::unwrap).collect();
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    let is_told = error.contains("interrupted; the servers of the job are stopped");
    assert!(!output.status.success() && is_told, "{printed:?} {error}");
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    let left: Vec<_> = fs::read_dir(&folders).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}
