//! The costs and gains of the cargo cache, beside an archive of cargo's folders in the way of
//! `rust-cache` and `actions/cache`, and beside sccache alone.
//!
//! Each contender runs the same ten jobs on an empty cache: a first one, one that changes nothing,
//! and then those that change the workspace's code or one dependency more. After them a job of
//! another branch, three jobs at the same time, and one with another toolchain. A job begins on an
//! empty runner at the same path; its time is that of all steps, restore and save included.
//!
//! The cache service is a simulation of GitHub's, with its latency and its limit on uploads, and the
//! registry is one on this machine. Both run on the same cores as the build, and transfers are not
//! slowed down: what moves many bytes, or downloads many crates, looks better here than there. The
//! action's steps run without their launcher; in its place node is started once for each.
//!
//! usage: cargo bench --bench cargo -- --help     (needs tests/tools.sh to have run)

#![allow(clippy::unwrap_used)]

#[path = "cargo/crates.rs"]
mod crates;
#[path = "shared/distance.rs"]
mod distance;
#[path = "cargo/job.rs"]
mod job;
#[path = "shared/json.rs"]
mod json;
#[path = "cargo/project.rs"]
mod project;
#[path = "../tests/it/support/registry.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod registry;
#[path = "../tests/it/support/runner.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod runner;
#[path = "../tests/it/support/tools.rs"]
mod tools;
#[path = "../tests/it/support/upstream.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod upstream;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use distance::Distance;
use job::{Occasion, Times};
use project::Project;
use registry::Registry;
use upstream::Counts;

/// Measures whole jobs of a Rust project, with the cargo cache and without.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo bench --bench cargo --")]
struct Options {
    /// Only these contenders
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    only: Vec<Contender>,
    #[command(flatten)]
    distance: Distance,
    /// The version of sccache, one of those that tests/tools.sh fetches
    #[arg(long, default_value = "0.16.0", value_name = "VERSION")]
    sccache: String,
    /// The other toolchain; without it the first that rustup lists besides the default one
    #[arg(long, value_name = "TOOLCHAIN")]
    toolchain: Option<String>,
    /// Cargo's layout of its build directory
    #[arg(long, default_value = "older", value_name = "LAYOUT")]
    layout: BuildLayout,
    /// How many jobs the sequence has
    #[arg(long, default_value_t = 10, value_name = "N")]
    jobs: usize,
    /// Writes the rows to this file too, for docs/pictures/charts
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Runs one job and prints what it took, for the benchmark's own use
    #[arg(long, hide = true, value_name = "JSON")]
    one: Option<String>,
    /// What cargo adds for benchmarks of its own kind
    #[arg(long, hide = true)]
    bench: bool,
}

/// Cargo's layout of its build directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
enum BuildLayout {
    /// That of cargo up to 1.99
    Older,
    /// That of cargo 1.100 and newer, which earlier ones have behind a switch
    Newer,
}

/// How what cargo needs is kept between jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
enum Contender {
    /// By this action, with its cargo cache
    Action,
    /// By an archive of the target folder and the registry, without sccache
    Archive,
    /// By sccache alone, an entry of the cache service for each object
    Sccache,
}

impl Contender {
    fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// A line of the table.
struct Row {
    contender: Contender,
    name: String,
    times: Times,
    wall: Duration,
    counts: Counts,
    stored: u64,
}

impl Row {
    /// The time of the job: of jobs at the same time until the last of them was done.
    fn total(&self) -> Duration {
        match self.name.as_str() {
            "three jobs at once" => self.wall,
            _ => self.times.total(),
        }
    }

    fn json(&self) -> serde_json::Value {
        let seconds = |time: Duration| json::rounded(time.as_secs_f64());
        serde_json::json!({
            "contender": self.contender.name(),
            "job": self.name,
            "setup_seconds": seconds(self.times.setup),
            "build_seconds": seconds(self.times.build),
            "post_seconds": seconds(self.times.post),
            "seconds": seconds(self.total()),
            "compiled": self.times.compiled,
            "bytes_up": self.counts.bytes_up,
            "bytes_down": self.counts.bytes_down,
            "bytes_stored": self.stored,
        })
    }
}

fn main() {
    let options = Options::parse();
    if let Some(occasion) = &options.one {
        let occasion: Occasion = serde_json::from_str(occasion).unwrap();
        let times = job::run(&occasion);
        println!("{}", serde_json::to_string(&times).unwrap());
        return;
    }
    tools::actions_cache(tools::ACTIONS_CACHE);
    let folder = TempDir::new().unwrap();
    let registry = Registry::start();
    let project = Project::prepare(folder.path(), &registry);
    let toolchain = options.toolchain.clone().or_else(other_toolchain);
    if toolchain.is_none() {
        eprintln!("There is one toolchain only, so its change is not measured.");
    }
    let mut rows = Vec::new();
    for contender in Contender::value_variants() {
        if options.only.is_empty() || options.only.contains(contender) {
            let place = folder.path().join(contender.name());
            rows.extend(measure(
                &options,
                *contender,
                &project,
                &place,
                toolchain.as_deref(),
            ));
        }
    }
    println!(
        "\n{}, in the {} layout\nsccache {}, {}\n\n{}",
        project.description(),
        options.layout.to_possible_value().unwrap().get_name(),
        options.sccache,
        options.distance,
        table(&rows)
    );
    if let Some(file) = &options.json {
        let settings = serde_json::json!({
            "sccache": options.sccache,
            "layout": options.layout.to_possible_value().unwrap().get_name(),
            "jobs": options.jobs,
            "distance": options.distance,
        });
        let rows: Vec<_> = rows.iter().map(Row::json).collect();
        json::write(file, "cargo", &settings, &rows);
    }
}

/// A toolchain that is not the default one.
fn other_toolchain() -> Option<String> {
    let version = |toolchain: Option<&str>| {
        let mut command = Command::new("rustc");
        command.arg("-vV");
        if let Some(toolchain) = toolchain {
            command.env("RUSTUP_TOOLCHAIN", toolchain);
        }
        let output = command.output().ok()?;
        output.status.success().then_some(output.stdout)
    };
    let default = version(None)?;
    let listed = Command::new("rustup")
        .args(["toolchain", "list"])
        .output()
        .ok()?;
    let listed = String::from_utf8(listed.stdout).ok()?;
    let names = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    let mut others = names.filter(|name| version(Some(name)).is_some_and(|v| v != default));
    others.next().map(str::to_owned)
}

/// All jobs of one contender.
fn measure(
    options: &Options,
    contender: Contender,
    project: &Project,
    place: &Path,
    toolchain: Option<&str>,
) -> Vec<Row> {
    let upstream = options.distance.start();
    let occasion = |code: usize, bumps: usize| Occasion {
        contender,
        place: place.to_owned(),
        sources: project.sources(bumps),
        code,
        sccache: tools::sccache(&options.sccache),
        service: (upstream.url.clone(), upstream.token.clone()),
        job: "build".to_owned(),
        toolchain: None,
        layout: options.layout,
    };
    let mut rows = Vec::new();
    let mut run = |name: &str, occasions: &[Occasion]| {
        eprintln!("{} {name} ...", contender.name());
        // The jobs of a repository are further apart than these.
        upstream.forget_uploads();
        let before = upstream.counts();
        let begin = Instant::now();
        let times = match occasions {
            [one] => vec![job::run(one)],
            several => match at_once(several) {
                Some(times) => times,
                None => return,
            },
        };
        let slowest = times.into_iter().max_by_key(Times::total);
        let row = Row {
            contender,
            name: name.to_owned(),
            times: slowest.unwrap(),
            wall: begin.elapsed(),
            counts: upstream.counts().since(&before),
            stored: upstream.stored(),
        };
        eprintln!("    {:.2} s", row.times.total().as_secs_f64());
        rows.push(row);
    };
    let (mut code, mut bumps) = (0, 0);
    for number in 0..options.jobs.max(1) {
        let name = match number {
            0 => "cold",
            1 => "exact warm",
            number if number % 2 == 0 => {
                code += 1;
                "code changed"
            }
            _ => {
                bumps = (bumps + 1).min(project.bumps());
                "dependency bumped"
            }
        };
        run(name, &[occasion(code, bumps)]);
    }
    let token = upstream.token_for(Some("refs/heads/topic"), &[upstream::DEFAULT_BRANCH]);
    let mut branch = occasion(code, bumps);
    branch.service.1 = token;
    run("fresh branch", &[branch]);
    let jobs = ["build", "test", "lint"].map(|name| Occasion {
        job: name.to_owned(),
        ..occasion(code, bumps)
    });
    run("three jobs at once", &jobs);
    if let Some(toolchain) = toolchain {
        let other = Occasion {
            toolchain: Some(toolchain.to_owned()),
            ..occasion(code, bumps)
        };
        run("toolchain changed", &[other]);
    }
    rows
}

/// Runs jobs at the same time, each on a runner of its own that is at the same path for all: in a
/// namespace of mounts. `None` where the system does not let that be done.
fn at_once(occasions: &[Occasion]) -> Option<Vec<Times>> {
    let children: Vec<Child> = occasions
        .iter()
        .map(|occasion| {
            let own = occasion.place.with_extension(&occasion.job);
            std::fs::create_dir_all(&own).unwrap();
            std::fs::create_dir_all(&occasion.place).unwrap();
            Command::new("unshare")
                .args(["--mount", "sh", "-ec"])
                .arg("mount --bind \"$1\" \"$2\"; shift 2; exec \"$@\"")
                .arg("sh")
                .arg(own)
                .arg(&occasion.place)
                .arg(std::env::current_exe().unwrap())
                .arg("--one")
                .arg(serde_json::to_string(occasion).unwrap())
                .stdout(Stdio::piped())
                .spawn()
        })
        .collect::<Result<_, _>>()
        .ok()?;
    let mut times = Vec::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let last = text
            .lines()
            .last()
            .and_then(|line| serde_json::from_str(line).ok());
        times.push(last);
    }
    let times: Option<Vec<Times>> = times.into_iter().collect();
    if times.is_none() {
        eprintln!("    not measured: there are no namespaces of mounts for this user");
    }
    times
}

/// A line for each job.
fn table(rows: &[Row]) -> String {
    let head = [
        "contender",
        "job",
        "setup s",
        "build s",
        "post s",
        "sum s",
        "vs archive",
        "compiled",
        "MB up",
        "MB down",
        "MB stored",
    ]
    .map(str::to_owned);
    let seconds = |time: Duration| format!("{:.2}", time.as_secs_f64());
    let megabytes = |bytes: u64| format!("{:.2}", bytes as f64 / 1e6);
    let lines = rows.iter().enumerate().map(|(number, row)| {
        let nth = rows[..number]
            .iter()
            .filter(|other| other.contender == row.contender && other.name == row.name)
            .count();
        let archive = rows
            .iter()
            .filter(|other| other.contender == Contender::Archive && other.name == row.name)
            .nth(nth);
        let ratio = archive.map(|archive| {
            let ratio = row.times.total().as_secs_f64() / archive.times.total().as_secs_f64();
            format!("{ratio:.2}")
        });
        [
            row.contender.name(),
            row.name.clone(),
            seconds(row.times.setup),
            seconds(row.times.build),
            seconds(row.times.post),
            seconds(row.total()),
            ratio.unwrap_or_else(|| "-".to_owned()),
            row.times.compiled.to_string(),
            megabytes(row.counts.bytes_up),
            megabytes(row.counts.bytes_down),
            megabytes(row.stored),
        ]
    });
    let lines: Vec<[String; 11]> = std::iter::once(head).chain(lines).collect();
    let widths: Vec<usize> = (0..11)
        .map(|column| {
            lines
                .iter()
                .map(|line| line[column].len())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths).enumerate();
        let cells = cells.map(|(column, (cell, width))| {
            if column < 2 {
                format!("{cell:<width$}")
            } else {
                format!("{cell:>width$}")
            }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}
