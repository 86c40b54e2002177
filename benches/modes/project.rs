//! The project to build.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::Mode;
use crate::runner::{Job, Step};

/// How many compilers run at once. Fixed, so that figures of different machines compare.
const PARALLEL: usize = 2;

/// A project that is built in one command.
#[derive(Clone, Copy, Debug)]
pub enum Project {
    /// Small C files, compiled one by one.
    C {
        /// How many.
        files: usize,
    },
    /// A Rust program with many dependencies: `benches/rust`.
    Rust,
}

impl Project {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::C { .. } => "c",
            Self::Rust => "rust",
        }
    }

    /// The size of the build, once it is known.
    pub fn description(self, compiles: usize) -> String {
        match self {
            Self::C { .. } => format!("{compiles} C files, gcc -O1, {PARALLEL} at a time"),
            Self::Rust => format!("{compiles} Rust crates, cargo build, {PARALLEL} at a time"),
        }
    }

    /// Whether there is something to measure in this mode.
    pub fn is_built_in(self, mode: Mode) -> bool {
        mode != Mode::ArchiveTarget || matches!(self, Self::Rust)
    }

    /// The action's input `wrap`.
    pub fn wrap(self) -> &'static str {
        match self {
            Self::C { .. } => "c",
            Self::Rust => "rust",
        }
    }

    /// Puts its source into the empty workspace of `job`, as a checkout does.
    pub fn check_out(self, job: &mut Job) {
        let workspace = job.path("workspace");
        match self {
            Self::C { files } => write_c_files(&workspace, files),
            Self::Rust => {
                fs::create_dir(workspace.join("src")).unwrap();
                for file in ["Cargo.toml", "Cargo.lock", "src/main.rs"] {
                    fs::copy(rust_source().join(file), workspace.join(file)).unwrap();
                }
                let target = workspace.join(TARGET);
                job.set("CARGO_TARGET_DIR", target.display().to_string());
            }
        }
        job.set("CARGO_INCREMENTAL", "0");
    }

    /// Builds it, as a step of `job`, and returns the number of compiles if that is known.
    ///
    /// If `SCCACHE_PATH` is set, make calls it in front of each C compiler; cargo has
    /// `RUSTC_WRAPPER`.
    pub fn build(self, job: &Job) -> Step {
        match self {
            Self::C { .. } => job.shell(&format!(
                "xargs -P {PARALLEL} -n 3 $SCCACHE_PATH gcc -O1 -Iinclude -c < compiles"
            )),
            Self::Rust => {
                let jobs = PARALLEL.to_string();
                job.step(&["cargo", "build", "--offline", "--locked", "--jobs", &jobs])
            }
        }
    }

    /// How many compiles the build `step` of `job` was, which must have left what it should.
    pub fn compiles(self, job: &Job, step: &Step) -> usize {
        let workspace = job.path("workspace");
        match self {
            Self::C { files } => {
                let objects = fs::read_dir(workspace.join("objects")).unwrap().count();
                assert_eq!(objects, files, "not all files were compiled");
                objects
            }
            Self::Rust => {
                let program = workspace.join(TARGET).join("debug/server");
                assert!(program.is_file(), "{}", step.stderr);
                let compiling = |line: &&str| line.trim_start().starts_with("Compiling ");
                step.stderr.lines().filter(compiling).count()
            }
        }
    }
}

/// Cargo's target folder, in the workspace.
pub const TARGET: &str = "target";

fn rust_source() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/rust"))
}

/// Has the Rust project's dependencies on this machine, so that no build waits for the network.
pub fn fetch_crates() {
    let manifest = rust_source().join("Cargo.toml");
    let fetched = Command::new("cargo")
        .args(["fetch", "--quiet", "--locked", "--manifest-path"])
        .arg(manifest)
        .status();
    assert!(fetched.unwrap().success(), "the crates cannot be fetched");
}

/// The C project: a header, the files, and the arguments of each compile in `compiles`.
fn write_c_files(workspace: &Path, files: usize) {
    for folder in ["include", "objects", "src"] {
        fs::create_dir(workspace.join(folder)).unwrap();
    }
    fs::write(workspace.join("include/record.h"), HEADER).unwrap();
    let mut compiles = String::new();
    for number in 0..files {
        let source = format!("src/file{number}.c");
        fs::write(workspace.join(&source), c_file(number)).unwrap();
        writeln!(compiles, "{source} -o objects/file{number}.o").unwrap();
    }
    fs::write(workspace.join("compiles"), compiles).unwrap();
}

const HEADER: &str = "\
#ifndef RECORD_H
#define RECORD_H
#include <stddef.h>
#include <stdint.h>
struct record {
    uint64_t id;
    char name[32];
    struct record *next;
};
static inline uint32_t mix(uint32_t hash, uint32_t value) {
    hash ^= value + 0x9e3779b9u + (hash << 6) + (hash >> 2);
    return hash;
}
#endif
";

/// The text of one C file, like no other's.
fn c_file(number: usize) -> String {
    let mut state = number as u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state
    };
    let table: Vec<String> = (0..32).map(|_| format!("{:#x}u", next())).collect();
    let table = table.join(", ");
    format!(
        "\
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <time.h>
#include \"record.h\"

static const uint32_t table{number}[] = {{ {table} }};

uint32_t hash{number}(const char *text, size_t length) {{
    uint32_t hash = {seed}u;
    for (size_t i = 0; i < length; i++)
        hash = mix(hash, table{number}[(unsigned char)text[i] % 32]);
    return hash;
}}

struct record *push{number}(struct record *list, const char *name) {{
    struct record *record = calloc(1, sizeof *record);
    if (!record) {{
        fprintf(stderr, \"file{number}: %s\\n\", strerror(errno));
        return list;
    }}
    strncpy(record->name, name, sizeof record->name - 1);
    record->id = ((uint64_t)time(NULL) << 32) | hash{number}(name, strlen(name));
    record->next = list;
    return record;
}}

int print{number}(FILE *out, const struct record *list) {{
    int count = 0;
    for (; list; list = list->next, count++)
        fprintf(out, \"%llu %s\\n\", (unsigned long long)list->id, list->name);
    return count;
}}
",
        seed = next(),
    )
}
