//! The cache service under load, next to nginx: both are sent and asked for the same bytes in the
//! same run, by the same client, on the same file system.
//!
//! nginx stores an upload as it is, and sends a file without looking at it (its `dav_methods PUT`
//! and `sendfile`), so it is the measure of what this machine can do. The protocol of GitHub's cache
//! needs three requests where nginx needs one PUT, and two where it needs one GET.
//!
//! The clients run in this process, on the same cores as the servers, and compare all bytes that
//! they receive with those that were sent. So no rate here is the limit of a server alone; ratios
//! are fairer, and the CPU times give the cost of a request. The figures of a phase are those of
//! the round with the median time; the peak of memory is that of all rounds.
//!
//! A run within some minutes of another is slower at writing small entries on ext4, for both servers:
//! it passes over the inodes of files that were just deleted.
//!
//! usage: cargo bench --bench service -- --help     (benches/nginx.sh fetches nginx where none is)

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "service/content.rs"]
mod content;
#[path = "service/http.rs"]
mod http;
#[path = "shared/json.rs"]
mod json;
#[path = "service/limits.rs"]
mod limits;
#[path = "service/server.rs"]
mod server;
#[path = "service/table.rs"]
mod table;
#[path = "service/work.rs"]
mod work;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use content::Content;
use http::{Connection, Failure};
use server::Server;
use table::{Row, Table};
use work::{Site, Task, Work, pieces};

/// Measures the cache service under load, next to nginx.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo bench --bench service --")]
struct Options {
    /// Only these sections
    #[arg(long, value_delimiter = ',', value_name = "SECTION,...")]
    only: Vec<Section>,
    /// How many small entries are written and read
    #[arg(long, default_value_t = 5000, value_name = "N")]
    entries: usize,
    /// By how many clients at once
    #[arg(long, default_value_t = 64, value_name = "N")]
    concurrency: usize,
    /// How many connections there are in the section of many
    #[arg(long, default_value_t = 2000, value_name = "N")]
    connections: usize,
    /// The size of the large entry
    #[arg(long, default_value_t = 4.0, value_name = "GIB")]
    large: f64,
    /// How often small entries and connections are measured
    #[arg(long, default_value_t = 7, value_name = "N")]
    rounds: usize,
    /// How often the large entry is measured
    #[arg(long, default_value_t = 1, value_name = "N")]
    large_rounds: usize,
    /// More arguments of `sccache-action serve`, separated by blanks
    #[arg(
        long,
        default_value = "",
        value_name = "ARGUMENTS",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    serve_args: String,
    /// Writes the rows to this file too, for docs/pictures/charts
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What `cargo bench` adds
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Section {
    /// Many small entries
    Small,
    /// Many connections at once
    Connections,
    /// An entry of gigabytes
    Large,
}

/// How many blocks or ranges of a large entry are under way at once, as `@actions/cache` has it.
const PARALLEL: usize = 4;

/// How much disk the large entry needs, in entries: one of nginx's, one of ours, one more of ours
/// while blocks are put together or in one piece, and before that one to touch memory.
const COPIES: f64 = 3.2;

/// How many bytes of memory are touched for what the system keeps of connections.
const SOCKETS: u64 = 256 << 20;

/// How many bytes a client receives at once: of small entries, and of large ones.
const BUFFERS: [usize; 2] = [16 << 10, 256 << 10];

fn main() -> ExitCode {
    let options = Options::parse();
    let bench = Bench::new(options);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut terminated = signal(SignalKind::terminate()).unwrap();
        // Whichever comes first, what has been started ends, since it is dropped.
        tokio::select! {
            code = bench.run() => code,
            _ = tokio::signal::ctrl_c() => ExitCode::from(130),
            _ = terminated.recv() => ExitCode::from(143),
        }
    })
}

struct Bench {
    options: Options,
    nginx: PathBuf,
    folder: TempDir,
    /// The prefix of keys: entries that a database may have kept of other runs do not interfere.
    run: String,
}

impl Bench {
    fn new(options: Options) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/nginx.sh");
        let found = Command::new(script)
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        assert!(found.status.success(), "there is no nginx");
        let nginx = String::from_utf8(found.stdout).unwrap();
        limits::raise_open_files();
        Self {
            options,
            nginx: nginx.trim().into(),
            folder: TempDir::with_prefix_in("service-", env!("CARGO_TARGET_TMPDIR")).unwrap(),
            run: uuid::Uuid::new_v4().simple().to_string(),
        }
    }

    async fn run(&self) -> ExitCode {
        let cores = std::thread::available_parallelism().unwrap();
        println!(
            "The clients run on the same {cores} cores as the servers. MB are 10^6 bytes. Peak is \
             the resident memory\nof the service's process, of all of nginx's processes together.",
        );
        let mut failures = Vec::new();
        let mut rows = Vec::new();
        for section in Section::value_variants() {
            let only = &self.options.only;
            if !only.is_empty() && !only.contains(section) {
                continue;
            }
            let mut table = Table::default();
            let title = match section {
                Section::Small => self.small(&mut table).await,
                Section::Connections => self.connections(&mut table).await,
                Section::Large => self.large(&mut table).await,
            };
            println!("\n{title}\n\n{}", table.markdown());
            let section = section.to_possible_value().unwrap();
            rows.extend(table.json(section.get_name()));
            failures.extend(table.failures());
        }
        if let Some(file) = &self.options.json {
            let settings = serde_json::json!({
                "cores": cores,
                "entries": self.options.entries,
                "concurrency": self.options.concurrency,
                "connections": self.options.connections,
                "large_gib": self.options.large,
                "rounds": self.options.rounds,
                "large_rounds": self.options.large_rounds,
                "serve_args": self.options.serve_args,
            });
            json::write(file, "service", &settings, &rows);
        }
        for failure in failures.iter().take(20) {
            eprintln!("{failure}");
        }
        match failures.len() {
            0 => ExitCode::SUCCESS,
            count => {
                println!("\n{count} FAILED");
                ExitCode::FAILURE
            }
        }
    }

    /// A folder that goes when it is dropped.
    fn subfolder(&self) -> TempDir {
        TempDir::new_in(self.folder.path()).unwrap()
    }

    /// A folder for many files, which stay until the end: ext4 skips inodes that were freed in the
    /// last minutes when it looks for a free one, and the next section would pay for that.
    fn lasting_subfolder(&self) -> PathBuf {
        self.subfolder().keep()
    }

    fn start_nginx(&self, folder: &Path) -> Server {
        // One worker may get all connections.
        let connections = self.options.connections.max(self.options.concurrency) + 100;
        Server::nginx(&self.nginx, folder, connections)
    }

    fn start_service(&self, folder: &Path) -> Server {
        let arguments: Vec<&str> = self.options.serve_args.split_whitespace().collect();
        Server::service(folder, &arguments)
    }

    /// Both servers, and a line about them.
    fn both(&self, folder: &Path) -> (Server, Server, String) {
        let nginx = self.start_nginx(&folder.join("nginx"));
        let service = self.start_service(&folder.join("service"));
        let idle = |server: &Server| server.usage().peak as f64 / 1e6;
        let line = format!(
            "Idle: nginx {:.1} MB, the service {:.1} MB.",
            idle(&nginx),
            idle(&service)
        );
        (nginx, service, line)
    }

    fn work(&self, server: &Server, prefix: &str, task: Task, contents: &[Content]) -> Work {
        let token = server.token.clone();
        Work {
            site: Site {
                address: server.address,
                token,
            },
            task,
            prefix: format!("{}/{prefix}", self.run),
            contents: contents.to_vec(),
        }
    }

    async fn small(&self, table: &mut Table) -> String {
        let folder = self.lasting_subfolder();
        let (nginx, service, idle) = self.both(&folder);
        let &Options {
            entries,
            concurrency,
            ..
        } = &self.options;
        let contents: Vec<Content> = (0..entries).map(Content::small).collect();
        for round in 0..self.options.rounds {
            let prefix = format!("small-{round}");
            let phase = async |server, name, task| {
                let work = self.work(server, &prefix, task, &contents);
                self.measure(server, name, concurrency, entries, work).await
            };
            table.add(phase(&nginx, ["PUT", "PUT"], Task::Write).await);
            let name = ["Create, Put Blob, Finalize", "PUT"];
            table.add(phase(&service, name, Task::Write).await);
            table.add(phase(&nginx, ["GET", "GET"], Task::Read).await);
            table.add(phase(&service, ["look-up and GET", "GET"], Task::Read).await);
            let work = self.work(&service, &prefix, Task::Read, &contents);
            let name = ["GET of known URLs", "GET"];
            table.add(phase(&service, name, Task::Get(paths(&work).await)).await);
        }
        let mut sizes: Vec<u64> = contents.iter().map(|content| content.size).collect();
        sizes.sort_unstable();
        format!(
            "{entries} entries of {} bytes (median; the largest {}; {} MB together), {concurrency} \
             clients, {} rounds. {idle}",
            sizes[entries / 2],
            sizes[entries - 1],
            sizes.iter().sum::<u64>() / 1_000_000,
            self.options.rounds,
        )
    }

    async fn connections(&self, table: &mut Table) -> String {
        // A client has a connection open, a server that and a file.
        let allowed = limits::open_files().saturating_sub(200) / 2;
        let clients = self.options.connections.min(allowed);
        if clients < self.options.connections {
            println!("\nThe limit of open files allows for {clients} connections only.");
        }
        let folder = self.lasting_subfolder();
        let (nginx, service, idle) = self.both(&folder);
        let contents: Vec<Content> = (0..clients).map(Content::small).collect();
        let reads = 5;
        for round in 0..self.options.rounds {
            let prefix = format!("connections-{round}");
            let phase = async |server, name, count, task| {
                let work = self.work(server, &prefix, task, &contents);
                self.measure(server, name, clients, count, work).await
            };
            table.add(phase(&nginx, ["PUT", "PUT"], clients, Task::Write).await);
            let name = ["Create, Put Blob, Finalize", "PUT"];
            table.add(phase(&service, name, clients, Task::Write).await);
            let count = clients * reads;
            table.add(phase(&nginx, ["GET", "GET"], count, Task::Read).await);
            let name = ["look-up and GET", "GET"];
            table.add(phase(&service, name, count, Task::Read).await);
        }
        format!(
            "{clients} clients with a connection each, all open at once: {clients} writes, {} \
             reads, {} rounds. Times begin before the first connects. {idle}",
            clients * reads,
            self.options.rounds
        )
    }

    async fn large(&self, table: &mut Table) -> String {
        let gib = f64::from(1 << 30);
        let affordable = limits::free_space(self.folder.path()) as f64 / gib / COPIES;
        let size = self.options.large.min(affordable);
        if size < self.options.large {
            println!("\nThe disk has room for an entry of {size:.2} GiB only.");
        }
        let content = Content::large((size * gib) as u64);
        let one = [content];
        let count = pieces(content);
        let mut idle = String::new();
        for round in 0..self.options.large_rounds {
            let folder = self.subfolder();
            let (nginx, service, line) = self.both(folder.path());
            idle = line;
            let in_blocks = format!("blocks-{round}");
            let in_one = format!("one-{round}");

            let of = async |server: &Server, name, clients, count, prefix: &str, task| {
                let work = self.work(server, prefix, task, &one);
                self.measure(server, name, clients, count, work).await
            };
            let blocks = async |server: &Server, name| {
                let work = self.work(server, &in_blocks, Task::Write, &one);
                let mut connection = Connection::open(server.address, BUFFERS[0]).await.unwrap();
                let upload = work
                    .site
                    .create(&mut connection, &work.key(0))
                    .await
                    .unwrap();
                let task = Task::PutBlock(upload.clone());
                let row = of(server, name, PARALLEL, count, &in_blocks, task).await;
                (row, upload)
            };
            let base = "PUT of blocks, 4 at once";
            table.add(blocks(&nginx, [base, base]).await.0);
            fs::remove_dir_all(folder.path().join("nginx/files").join(&self.run)).unwrap();
            let (row, upload) = blocks(&service, ["Put Block, 4 at once, and List", base]).await;
            let task = Task::Join(upload);
            let name = ["of that Put Block List, Finalize", ""];
            let joined = of(&service, name, 1, 1, &in_blocks, task).await;
            table.add(row.and(&joined));
            table.add(joined);

            let base = "PUT in one";
            table.add(of(&nginx, [base, base], 1, 1, &in_one, Task::Write).await);
            {
                // Entries cannot be deleted, so each gets its own service.
                let folder = self.subfolder();
                let service = self.start_service(folder.path());
                let name = ["Put Blob in one", base];
                table.add(of(&service, name, 1, 1, &in_one, Task::Write).await);
            }

            let sides = [
                (
                    &nginx,
                    &in_one,
                    ["GET", "GET in ranges, 4 at once", "GET, twice at once"],
                ),
                (
                    &service,
                    &in_blocks,
                    [
                        "look-up and GET",
                        "the same in ranges, 4 at once",
                        "the same, twice at once",
                    ],
                ),
            ];
            let bases = sides[0].2;
            for (phase, base) in bases.into_iter().enumerate() {
                for (server, prefix, names) in &sides {
                    let work = self.work(server, prefix, Task::Read, &one);
                    let path = paths(&work).await.remove(0);
                    let (clients, count, task) = match phase {
                        0 => (1, 1, Task::Read),
                        1 => (PARALLEL, count, Task::GetRange(path)),
                        _ => (2, 2, Task::Read),
                    };
                    let name = [names[phase], base];
                    table.add(of(server, name, clients, count, prefix, task).await);
                }
            }
        }
        format!(
            "An entry of {size:.2} GiB, blocks and ranges of 32 MiB, {} rounds. {idle}",
            self.options.large_rounds
        )
    }

    /// Has `clients` do `work` `count` times in all. The name has that of the phase of nginx's with
    /// it, which this is compared with.
    async fn measure(
        &self,
        server: &Server,
        [phase, against]: [&'static str; 2],
        clients: usize,
        count: usize,
        work: Work,
    ) -> Row {
        let name = match server.token {
            Some(_) => "service",
            None => "nginx",
        };
        let buffer = BUFFERS[usize::from(work.contents.len() == 1)];
        // A server that is slower than 10 MB/s hangs.
        let largest = work.contents.iter().map(|content| content.size).max();
        let limit = Duration::from_secs(60 + largest.unwrap_or(0) / 10_000_000);
        limits::settle(self.folder.path());
        limits::touch_memory(self.folder.path(), work.written() + SOCKETS);
        server.reset_peak();

        let before = server.usage();
        let own_before = server::usage("self");
        let begin = Instant::now();
        let work = Arc::new(work);
        let next = Arc::new(AtomicUsize::new(0));
        let connected = Arc::new(Barrier::new(clients));
        let mut running = JoinSet::new();
        for _ in 0..clients {
            let (work, next, connected) = (work.clone(), next.clone(), connected.clone());
            running.spawn(async move {
                let open = || Connection::open(work.site.address, buffer);
                let mut done = Done::default();
                let mut connection = open().await;
                connected.wait().await;
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= count {
                        // It stays open as long as others are at work.
                        return (connection, done);
                    }
                    let begin = Instant::now();
                    let result = match &mut connection {
                        Ok(connection) => tokio::time::timeout(limit, work.run(connection, i))
                            .await
                            .unwrap_or(Err(Failure::Late)),
                        Err(failure) => Err(Failure::Connect(failure.to_string())),
                    };
                    match result {
                        Ok((requests, bytes)) => {
                            done.latencies.push(begin.elapsed());
                            done.requests += requests;
                            done.bytes += bytes;
                        }
                        Err(failure) => {
                            done.failures.push(failure.to_string());
                            connection = open().await;
                        }
                    }
                }
            });
        }
        let mut all = Done::default();
        let mut connections = Vec::new();
        while let Some(ended) = running.join_next().await {
            let (connection, done) = ended.unwrap();
            connections.push(connection);
            all.latencies.extend(done.latencies);
            all.failures.extend(done.failures);
            all.requests += done.requests;
            all.bytes += done.bytes;
        }
        let elapsed = begin.elapsed();
        let after = server.usage();
        eprintln!("{name}, {phase}: {:.2} s", elapsed.as_secs_f64());
        if let Some(failure) = all.failures.first() {
            eprintln!("{} FAILED, the first: {failure}", all.failures.len());
        }
        Row {
            phase,
            server: name,
            against,
            elapsed,
            count,
            requests: all.requests,
            bytes: all.bytes,
            latencies: all.latencies,
            cpu: after.cpu - before.cpu,
            clients_cpu: server::usage("self").cpu - own_before.cpu,
            peak: after.peak,
            failures: all.failures,
        }
    }
}

/// The work of one client.
#[derive(Default)]
struct Done {
    latencies: Vec<Duration>,
    requests: u64,
    bytes: u64,
    failures: Vec<String>,
}

/// The addresses from which the entries of `work` are downloaded.
async fn paths(work: &Work) -> Vec<String> {
    let mut connection = Connection::open(work.site.address, BUFFERS[0])
        .await
        .unwrap();
    let mut paths = Vec::new();
    for i in 0..work.contents.len() {
        paths.push(work.site.find(&mut connection, &work.key(i)).await.unwrap());
    }
    paths
}
