//! The resources of this machine: open files and free space.

use std::fs;
use std::path::Path;
use std::process::Command;

/// How many files this process and its children may have open.
pub fn open_files() -> usize {
    let limits = fs::read_to_string("/proc/self/limits").unwrap();
    limit(&limits, 3)
}

fn limit(limits: &str, column: usize) -> usize {
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let value = line.and_then(|line| line.split_whitespace().nth(column));
    value
        .and_then(|value| value.parse().ok())
        .unwrap_or(usize::MAX)
}

/// Has the system allow as many open files as an administrator lets this process ask for.
pub fn raise_open_files() {
    let limits = fs::read_to_string("/proc/self/limits").unwrap();
    let hard = limit(&limits, 4);
    if limit(&limits, 3) < hard {
        let pid = std::process::id();
        // If it fails, the limit that is read later shows it.
        let _ = Command::new("prlimit")
            .args([format!("--pid={pid}"), format!("--nofile={hard}:{hard}")])
            .status();
    }
}

/// How many bytes are free in the file system of `folder`.
pub fn free_space(folder: &Path) -> u64 {
    let df = Command::new("df")
        .args(["--output=avail", "-B1"])
        .arg(folder)
        .output();
    let text = String::from_utf8(df.unwrap().stdout).unwrap();
    text.lines()
        .last()
        .and_then(|line| line.trim().parse().ok())
        .unwrap()
}

/// Waits until the file system of `folder` has written everything to the disk: the next phase
/// should not pay for the last.
pub fn settle(folder: &Path) {
    let status = Command::new("sync").arg("-f").arg(folder).status();
    assert!(status.unwrap().success(), "sync failed");
}

/// Has the system hold memory for a file of `bytes` in `folder`. A virtual machine may have given
/// free memory back to its host, and the first writer pays for getting it again, many times the
/// cost of the write.
pub fn touch_memory(folder: &Path, bytes: u64) {
    let path = folder.join("touched");
    let mut file = fs::File::create(&path).unwrap();
    let zeros = std::io::Read::take(std::io::repeat(0), bytes);
    std::io::copy(
        &mut std::io::BufReader::with_capacity(1 << 20, zeros),
        &mut file,
    )
    .unwrap();
    fs::remove_file(path).unwrap();
}
