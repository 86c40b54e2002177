//! The two servers as child processes, and what the system says of them.

use std::fs;
use std::io::{BufRead, BufReader, Lines, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// How many parts of a second `/proc` counts CPU time in: `USER_HZ` of Linux, on all common CPUs.
const TICKS: f64 = 100.0;

/// The resources that a server used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// CPU time in seconds.
    pub cpu: f64,
    /// The most memory that was resident at once, in bytes. Several processes count together, and
    /// shared memory counts for each.
    pub peak: u64,
}

/// A server that ends when this is dropped.
pub struct Server {
    /// Its address.
    pub address: SocketAddr,
    /// The token that opens it, which nginx has none of.
    pub token: Option<String>,
    child: Child,
    workers: Vec<u32>,
    /// A command that ends it, if ending its process is not enough.
    stop: Option<Command>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Workers outlive an nginx that is killed.
        let stopped = self.stop.as_mut().is_some_and(|stop| {
            let status = stop.stderr(Stdio::null()).status();
            status.is_ok_and(|status| status.success())
        });
        if !stopped {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts the cache service with its store in `folder`.
    pub fn service(folder: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_sccache-action"))
            .args(["serve", "--listen", "127.0.0.1:0", "--folder"])
            .arg(folder)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut server = Self {
            address: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            token: None,
            workers: vec![child.id()],
            child,
            stop: None,
        };
        let mut value_of = |name: &str| {
            let mut lines = lines.by_ref().map_while(Result::ok);
            let value = lines.find_map(|line| line.strip_prefix(name).map(str::to_owned));
            value.unwrap_or_else(|| panic!("the service ended without saying {name}"))
        };
        let url = value_of("ACTIONS_RESULTS_URL=http://");
        server.address = url.trim_end_matches('/').parse().unwrap();
        server.token = Some(value_of("ACTIONS_RUNTIME_TOKEN="));
        drain(lines);
        server
    }

    /// Starts `program`, an nginx that stores uploads in `folder`, as the user of this process. Each
    /// of its workers takes as many `connections`.
    pub fn nginx(program: &Path, folder: &Path, connections: usize) -> Self {
        fs::create_dir_all(folder.join("files")).unwrap();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|free| free.local_addr());
        let address = port.unwrap();
        let workers = std::thread::available_parallelism().unwrap().get();
        // Messages of the process go to standard error, so that its start shows; a line for each
        // request would cost it time.
        let root = folder.display();
        let user = if is_root() { "user root;" } else { "" };
        let config = format!(
            "{user}
            daemon off;
            worker_processes {workers};
            error_log stderr notice;
            pid {root}/pid;
            events {{ worker_connections {connections}; }}
            http {{
                access_log off;
                error_log {root}/errors error;
                sendfile on;
                tcp_nopush on;
                keepalive_requests 100000000;
                keepalive_timeout 1h;
                client_max_body_size 0;
                client_body_buffer_size 128k;
                client_body_temp_path {root}/uploads;
                fastcgi_temp_path {root}/fastcgi;
                proxy_temp_path {root}/proxy;
                scgi_temp_path {root}/scgi;
                uwsgi_temp_path {root}/uwsgi;
                server {{
                    listen {address} backlog=4096;
                    root {root}/files;
                    location / {{ dav_methods PUT; create_full_put_path on; }}
                }}
            }}",
        );
        let config_path = folder.join("nginx.conf");
        fs::write(&config_path, config).unwrap();
        let run = || {
            let mut command = Command::new(program);
            command.arg("-p").arg(folder).arg("-c").arg(&config_path);
            // Before the configuration is read, errors would go to the system's log.
            command.arg("-e").arg("stderr").stdin(Stdio::null());
            command
        };
        let mut child = run().stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut stop = run();
        stop.args(["-s", "stop"]);
        let mut server = Self {
            address,
            token: None,
            workers: vec![child.id()],
            child,
            stop: Some(stop),
        };
        while server.workers.len() <= workers {
            let line = lines.next().and_then(Result::ok);
            let line = line.expect("nginx ended");
            match line.split_once("start worker process ") {
                Some((_, id)) => server.workers.push(id.trim().parse().unwrap()),
                None if line.contains("[emerg]") => panic!("{line}"),
                None => {}
            }
        }
        drain(lines);
        server
    }

    /// Begins a new count of the memory's peak.
    pub fn reset_peak(&self) {
        for id in &self.workers {
            fs::write(format!("/proc/{id}/clear_refs"), "5").unwrap();
        }
    }

    /// The resources that it has used so far.
    pub fn usage(&self) -> Usage {
        let each = self.workers.iter().map(|id| usage(&id.to_string()));
        each.fold(Usage::default(), |sum, one| Usage {
            cpu: sum.cpu + one.cpu,
            peak: sum.peak + one.peak,
        })
    }
}

fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    status.contains("\nUid:\t0\t")
}

/// Reads what else a child says, so that it never waits for room.
fn drain(lines: Lines<BufReader<impl Read + Send + 'static>>) {
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
}

/// The resources that the process `id` has used so far; `self` is this one.
pub fn usage(id: &str) -> Usage {
    // Empty for a process that ended, as which requests that failed show it.
    let read = |name| fs::read_to_string(format!("/proc/{id}/{name}")).unwrap_or_default();
    let stat = read("stat");
    // utime and stime, the 14th and 15th field, counted behind the name, which may have spaces.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks = fields.split_whitespace().skip(11).take(2);
    let status = read("status");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = peak.and_then(|peak| peak.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Usage {
        cpu: ticks.filter_map(|t| t.parse::<f64>().ok()).sum::<f64>() / TICKS,
        peak: kib.unwrap_or(0) * 1024,
    }
}
