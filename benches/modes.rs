//! The costs and gains of each way of keeping a build's objects between jobs: without a cache, on a
//! disk that stays, through the action, and in an archive in the way of `actions/cache`.
//!
//! Each is measured in two jobs, the first with an empty cache and the second with what the first
//! left. A job begins on an empty runner at the same paths, as GitHub's do.
//!
//! The cache service is a simulation of GitHub's, with its latency and its limit on uploads. It
//! runs on the same cores as the build, and transfers are not slowed down, so modes that move many
//! bytes look better here than at GitHub. The action's steps run without their launcher, which adds
//! the start of node to each; `@actions/cache` has that in its times.
//!
//! usage: cargo bench --bench modes -- --help     (needs tests/tools.sh to have run)

#![allow(clippy::unwrap_used)]

#[path = "shared/distance.rs"]
mod distance;
#[path = "modes/job.rs"]
mod job;
#[path = "shared/json.rs"]
mod json;
#[path = "modes/project.rs"]
mod project;
#[path = "modes/relay.rs"]
mod relay;
#[path = "../tests/it/support/runner.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod runner;
#[path = "modes/table.rs"]
mod table;
#[path = "../tests/it/support/tools.rs"]
mod tools;
#[path = "../tests/it/support/upstream.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod upstream;

use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use tempfile::TempDir;

use distance::Distance;
use job::{JobResult, Occasion};
use project::Project;

/// Measures whole jobs, cold and warm, in each mode.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo bench --bench modes --")]
struct Options {
    /// How many C files the C build compiles; 0 leaves it out
    #[arg(long, default_value_t = 5000, value_name = "N")]
    c_files: usize,
    /// Whether the Rust project is built too
    #[arg(long, default_value = "on", value_name = "SWITCH")]
    crates: Switch,
    /// Only these modes
    #[arg(long, value_delimiter = ',', value_name = "MODE,...")]
    only: Vec<Mode>,
    #[command(flatten)]
    distance: Distance,
    /// The version of sccache, one of those that tests/tools.sh fetches
    #[arg(long, default_value = "0.16.0", value_name = "VERSION")]
    sccache: String,
    /// Writes the rows to this file too, for docs/pictures/charts
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What cargo adds for benchmarks of its own kind
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

/// How objects are kept between jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Not at all: a plain build
    None,
    /// By sccache alone on a disk that stays: what the others are compared with
    Disk,
    /// By the action, an entry of the cache service for each object
    Direct,
    /// By the action, many objects in an entry
    Packed,
    /// By sccache alone on a disk, which is saved and restored as `actions/cache` does
    Archive,
    /// By no sccache: cargo's target folder is saved and restored; Rust only
    ArchiveTarget,
}

impl Mode {
    fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether objects pass through the cache service.
    fn needs_upstream(self) -> bool {
        !matches!(self, Self::None | Self::Disk)
    }
}

fn main() {
    let options = Options::parse();
    use_the_shipped_binary();
    // This fails before a measurement would be wasted.
    let sccache = tools::sccache(&options.sccache);
    tools::actions_cache(tools::ACTIONS_CACHE);
    let mut rows = Vec::new();
    if options.c_files > 0 {
        let files = options.c_files;
        rows.extend(measure(&options, &sccache, Project::C { files }));
    }
    if options.crates == Switch::On {
        project::fetch_crates();
        rows.extend(measure(&options, &sccache, Project::Rust));
    }
    if let Some(file) = &options.json {
        let settings = serde_json::json!({
            "sccache": options.sccache,
            "c_files": options.c_files,
            "distance": options.distance,
        });
        json::write(file, "modes", &settings, &rows);
    }
}

/// Measures the binary in dist/, which users run, if it was built from this source. It is static,
/// and a static program starts faster: this counts for the wrapper around each compile.
fn use_the_shipped_binary() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let runner = sccache_action::install::Platform::current().runner();
    let shipped = root.join(format!("dist/sccache-action-{runner}"));
    let check = std::process::Command::new(root.join("scripts/build-dist"))
        .arg("--check")
        .status();
    if shipped.is_file() && check.is_ok_and(|status| status.success()) {
        let shipped = shipped.display().to_string();
        eprintln!("measuring {shipped}");
        let _ = runner::OTHER_BINARY.set(shipped);
    }
}

/// Builds `project` in each mode and prints the table. Gives its rows.
fn measure(options: &Options, sccache: &Path, project: Project) -> Vec<serde_json::Value> {
    let mut results = Vec::new();
    for mode in Mode::value_variants() {
        let wanted = options.only.is_empty() || options.only.contains(mode);
        if wanted && project.is_built_in(*mode) {
            results.extend(both_jobs(options, sccache, project, *mode));
        }
    }
    let Some(first) = results.first() else {
        return Vec::new();
    };
    println!(
        "\n{}\nsccache {}, {}\n\n{}",
        project.description(first.compiles),
        options.sccache,
        options.distance,
        table::of(&results)
    );
    let row = |result| table::json(project.name(), result);
    results.iter().map(row).collect()
}

/// The cold job and the warm one, with an upstream of their own.
fn both_jobs(options: &Options, sccache: &Path, project: Project, mode: Mode) -> [JobResult; 2] {
    let root = TempDir::new().unwrap();
    let upstream = mode.needs_upstream().then(|| options.distance.start());
    ["cold", "warm"].map(|name| {
        eprintln!("{} {} {name} ...", project.name(), mode.name());
        if let Some(upstream) = &upstream {
            // The jobs of a repository are further apart than these two.
            upstream.forget_uploads();
        }
        let result = job::run(&Occasion {
            root: root.path(),
            sccache,
            project,
            mode,
            name,
            upstream: upstream.as_ref(),
        });
        eprintln!("    {:.2} s", result.total().as_secs_f64());
        result
    })
}
