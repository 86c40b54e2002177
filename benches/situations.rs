//! The time of a warm job in different places of cargo's build: each situation beside the plain
//! one, in both of cargo's layouts of its build directory, and beside sccache alone.
//!
//! Each runs the project of `sample/` twice on an empty cache, in whole jobs on an empty runner. A
//! job's time is that of all steps, restore and save included. The second job's time is compared
//! with that of the second plain job of the same layout.
//!
//! The cache service is a simulation of GitHub's with its latency, and the registry is one on this machine.
//!
//! usage: cargo bench --bench situations -- --help     (needs tests/tools.sh to have run)

#![allow(clippy::unwrap_used)]

#[path = "../tests/it/support/build_places.rs"]
mod build_places;
#[path = "cargo/crates.rs"]
mod crates;
#[path = "shared/distance.rs"]
mod distance;
#[path = "shared/json.rs"]
mod json;
#[path = "../tests/it/support/registry.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod registry;
#[path = "../tests/it/support/runner.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod runner;
#[path = "../tests/it/support/tools.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod tools;
#[path = "../tests/it/support/upstream.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod upstream;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use tempfile::TempDir;

use build_places::{BUILD_PLACES, BuildPlace, PLAIN};
use distance::Distance;
use registry::Registry;
use runner::Job;
use upstream::Upstream;

/// Measures warm jobs of a small project, wherever cargo builds.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo bench --bench situations --")]
struct Options {
    /// Only the plain situation and those whose names have this text
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only this layout: older or newer
    #[arg(long, value_name = "LAYOUT")]
    layout: Option<String>,
    #[command(flatten)]
    distance: Distance,
    /// The version of sccache, one of those that tests/tools.sh fetches
    #[arg(long, default_value = "0.16.0", value_name = "VERSION")]
    sccache: String,
    /// The program `cargo`; without it the one on PATH
    #[arg(long, value_name = "PATH")]
    cargo: Option<PathBuf>,
    /// Writes the rows to this file too, for docs/pictures/charts
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What cargo adds for benchmarks of its own kind
    #[arg(long, hide = true)]
    bench: bool,
}

/// A project, and how it is built.
#[derive(Clone, Copy, Debug)]
struct Situation {
    name: &'static str,
    place: BuildPlace,
    /// The folder of the checkout that the workspace is in.
    folder: &'static str,
    has_lockfile: bool,
    /// The checkouts of the first job and the second.
    checkouts: [&'static str; 2],
}

impl Situation {
    /// The project alone in a checkout that stays, built in this place.
    const fn of(place: BuildPlace) -> Self {
        Self {
            name: place.name,
            place,
            folder: ".",
            has_lockfile: true,
            checkouts: ["job", "job"],
        }
    }
}

const OTHERS: [Situation; 3] = [
    Situation {
        name: "a workspace in a subfolder",
        folder: "backend",
        ..Situation::of(PLAIN)
    },
    Situation {
        name: "no Cargo.lock",
        has_lockfile: false,
        ..Situation::of(PLAIN)
    },
    Situation {
        name: "a checkout that moved",
        checkouts: ["one", "two"],
        ..Situation::of(PLAIN)
    },
];

/// The plain one, and then the others.
fn situations() -> impl Iterator<Item = Situation> {
    let places = std::iter::once(PLAIN).chain(BUILD_PLACES);
    places.map(Situation::of).chain(OTHERS)
}

/// The build, and its folder.
struct Bench {
    options: Options,
    folder: TempDir,
    registry: Registry,
}

impl Bench {
    fn prepare(options: Options) -> Self {
        let folder = TempDir::new().unwrap();
        let registry = Registry::start();
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("sample");
        crates::cargo(&sample, &["fetch", "--quiet", "--locked"]);
        let lockfile = fs::read_to_string(sample.join("Cargo.lock")).unwrap();
        crates::publish(&lockfile, &registry);
        Self {
            options,
            folder,
            registry,
        }
    }

    fn home(&self) -> PathBuf {
        self.folder.path().join("cargo-home")
    }

    /// The seconds of the first job and of the second.
    fn measure(&self, situation: &Situation, is_newer: bool, mode: &str) -> [f64; 2] {
        let upstream = self.options.distance.start();
        situation.checkouts.map(|checkout| {
            let job = self.check_out(situation, checkout, is_newer, mode, &upstream);
            let cargo = self.options.cargo.as_deref().unwrap_or(Path::new("cargo"));
            let folder = situation.folder;
            let BuildPlace { before, behind, .. } = situation.place;
            let build = format!(
                "cd {folder} && {before} {} build --jobs 2 {behind}",
                cargo.display()
            );
            let begin = Instant::now();
            job.setup().green();
            job.shell(&build).green();
            job.report().green();
            let took = begin.elapsed();
            job.server_ends();
            took.as_secs_f64()
        })
    }

    /// An empty runner with the sources in its workspace.
    fn check_out(
        &self,
        situation: &Situation,
        checkout: &str,
        is_newer: bool,
        mode: &str,
        upstream: &Upstream,
    ) -> Job {
        let place = self.folder.path().join(checkout);
        for folder in [&place, &self.home()] {
            if folder.exists() {
                fs::remove_dir_all(folder).unwrap();
            }
        }
        let mut job = Job::in_folder(place);
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("sample");
        let workspace = job.path("workspace").join(situation.folder);
        copy(&sample, &workspace);
        fs::create_dir_all(workspace.join(".cargo")).unwrap();
        let config = format!("{}{}", self.registry.config(), situation.place.config);
        fs::write(workspace.join(".cargo/config.toml"), config).unwrap();
        if !situation.has_lockfile {
            fs::remove_file(workspace.join("Cargo.lock")).unwrap();
        }
        job.use_sccache(&tools::sccache(&self.options.sccache));
        job.use_service(&upstream.url, &upstream.token);
        job.set("ACTIONS_CACHE_SERVICE_V2", "on");
        job.set("INPUT_MODE", mode);
        job.set("CARGO_HOME", self.home().display().to_string());
        job.set("GITHUB_WORKFLOW", "CI");
        job.set("GITHUB_JOB", "build");
        if let Some((name, value)) = situation.place.variable {
            job.set(name, value);
        }
        if is_newer {
            job.set("RUSTC_BOOTSTRAP", "1");
            job.set("CARGO_UNSTABLE_BUILD_DIR_NEW_LAYOUT", "true");
        }
        job
    }
}

/// Copies sources, without build results.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        match path.is_dir() {
            true if name == "target" => {}
            true => copy(&path, &to.join(name)),
            false => drop(fs::copy(&path, to.join(name)).unwrap()),
        }
    }
}

fn main() {
    let options = Options::parse();
    let bench = Bench::prepare(options);
    let only = bench.options.only.as_deref().unwrap_or_default();
    let chosen = |situation: &Situation| situation.name == "plain" || situation.name.contains(only);
    println!(
        "the project of sample/, sccache {}, {}\n",
        bench.options.sccache, bench.options.distance
    );
    println!(
        "layout  situation                     cold s   warm s   sccache alone, warm s   to plain warm"
    );
    let mut rows = Vec::new();
    for (layout, is_newer) in [("older", false), ("newer", true)] {
        if bench
            .options
            .layout
            .as_deref()
            .is_some_and(|only| only != layout)
        {
            continue;
        }
        let mut plain_warm = None;
        for situation in situations().filter(chosen) {
            let [cold, warm] = bench.measure(&situation, is_newer, "packed");
            let [_, alone] = bench.measure(&situation, is_newer, "direct");
            let plain_warm = *plain_warm.get_or_insert(warm);
            println!(
                "{layout}   {:<28} {cold:>7.2}  {warm:>7.2}  {alone:>22.2}  {:>14.2}",
                situation.name,
                warm / plain_warm
            );
            rows.push(serde_json::json!({
                "layout": layout,
                "situation": situation.name,
                "cold_seconds": json::rounded(cold),
                "warm_seconds": json::rounded(warm),
                "sccache_alone_warm_seconds": json::rounded(alone),
            }));
        }
    }
    if let Some(file) = &bench.options.json {
        let settings = serde_json::json!({
            "sccache": bench.options.sccache,
            "distance": bench.options.distance,
        });
        json::write(file, "situations", &settings, &rows);
    }
}
