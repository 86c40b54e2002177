//! A build of a few C files through the `sccache` on `PATH`.

use std::fs;

use crate::support::runner::Job;

/// How many files.
pub const FILES: usize = 6;

/// A loop that compiles them with the wrapper of Rust's C code: `sccache` on `PATH`.
pub const BUILD: &str = "for i in 1 2 3 4 5 6; do sccache gcc -c $i.c -o $i.o; done";

/// Writes the files into the job's workspace.
pub fn write_sources(job: &Job) {
    for i in 1..=FILES {
        write_source(job, i, &i.to_string());
    }
}

/// Writes the file with this number, which returns `value`.
pub fn write_source(job: &Job, i: usize, value: &str) {
    let source = format!("int f{i}(void) {{ return {value}; }}\n");
    fs::write(job.path("workspace").join(format!("{i}.c")), source).unwrap();
}

/// How many of them are compiled.
pub fn objects(job: &Job) -> usize {
    (1..=FILES)
        .filter(|i| job.path("workspace").join(format!("{i}.o")).is_file())
        .count()
}

/// The object of the file with this number.
pub fn object(job: &Job, i: usize) -> Vec<u8> {
    fs::read(job.path("workspace").join(format!("{i}.o"))).unwrap()
}

/// Removes what they were compiled to.
pub fn remove_objects(job: &Job) {
    for i in 1..=FILES {
        fs::remove_file(job.path("workspace").join(format!("{i}.o"))).unwrap();
    }
}
