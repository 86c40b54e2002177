//! The measurements, and their table.

use std::time::Duration;

use serde_json::Value;

use crate::json::rounded;

/// A phase of one server.
#[derive(Clone, Debug)]
pub struct Row {
    /// The work.
    pub phase: &'static str,
    /// The server.
    pub server: &'static str,
    /// The phase of nginx's that it is compared with.
    pub against: &'static str,
    /// How long it took.
    pub elapsed: Duration,
    /// How often it was done.
    pub count: usize,
    /// In how many requests.
    pub requests: u64,
    /// With how many bytes of content.
    pub bytes: u64,
    /// How long each took, without those that failed.
    pub latencies: Vec<Duration>,
    /// The server's CPU time in seconds.
    pub cpu: f64,
    /// The CPU time of the clients, in seconds.
    pub clients_cpu: f64,
    /// The server's memory at its peak, in bytes.
    pub peak: u64,
    /// The failures.
    pub failures: Vec<String>,
}

impl Row {
    /// This and then `other`, as one phase. The times of single requests are those of this.
    pub fn and(&self, other: &Row) -> Row {
        Row {
            elapsed: self.elapsed + other.elapsed,
            requests: self.requests + other.requests,
            cpu: self.cpu + other.cpu,
            clients_cpu: self.clients_cpu + other.clients_cpu,
            peak: self.peak.max(other.peak),
            failures: [self.failures.clone(), other.failures.clone()].concat(),
            ..self.clone()
        }
    }

    fn quantile(&self, part: f64) -> Duration {
        let mut sorted = self.latencies.clone();
        sorted.sort();
        let position = (sorted.len() as f64 * part) as usize;
        let last = sorted.len().saturating_sub(1);
        sorted.get(position.min(last)).copied().unwrap_or_default()
    }
}

/// The rounds of all phases of a section.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Vec<Row>>,
}

impl Table {
    /// Adds a round of a phase.
    pub fn add(&mut self, row: Row) {
        let same =
            |rounds: &&mut Vec<Row>| rounds[0].phase == row.phase && rounds[0].server == row.server;
        match self.rows.iter_mut().find(same) {
            Some(rounds) => rounds.push(row),
            None => self.rows.push(vec![row]),
        }
    }

    /// All that failed.
    pub fn failures(&self) -> impl Iterator<Item = String> {
        let rows = self.rows.iter().flatten();
        rows.flat_map(|row| {
            let of = format!("{}, {}", row.server, row.phase);
            row.failures
                .iter()
                .map(move |failure| format!("{of}: {failure}"))
        })
    }

    /// The round that took the median time, with the highest peak and all failures of all rounds.
    fn median(rounds: &[Row]) -> Row {
        let mut sorted = rounds.to_vec();
        sorted.sort_by_key(|row| row.elapsed);
        let median = sorted[sorted.len() / 2].clone();
        Row {
            peak: rounds.iter().map(|row| row.peak).max().unwrap_or(0),
            failures: rounds.iter().flat_map(|row| row.failures.clone()).collect(),
            ..median
        }
    }

    /// The columns of each phase.
    fn medians(&self) -> Vec<Row> {
        self.rows
            .iter()
            .map(|rounds| Self::median(rounds))
            .collect()
    }

    /// The rows of this section as JSON.
    pub fn json(&self, section: &str) -> Vec<Value> {
        let row = |row: &Row| {
            serde_json::json!({
                "section": section,
                "phase": row.phase,
                "server": row.server,
                "against": row.against,
                "seconds": rounded(row.elapsed.as_secs_f64()),
                "count": row.count,
                "requests": row.requests,
                "bytes": row.bytes,
                "median_ms": rounded(row.quantile(0.5).as_secs_f64() * 1e3),
                "p99_ms": rounded(row.quantile(0.99).as_secs_f64() * 1e3),
                "cpu_seconds": rounded(row.cpu),
                "clients_cpu_seconds": rounded(row.clients_cpu),
                "memory_bytes": row.peak,
                "failed": row.failures.len(),
            })
        };
        self.medians().iter().map(row).collect()
    }

    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        let rows = self.medians();
        let mut lines = vec![
            "| | server | s | ops/s | requests/s | MB/s | p50 ms | p99 ms | server CPU s | clients CPU s | peak MB | failed | of nginx's rate |".to_owned(),
            format!("|---|---|{}", "--:|".repeat(11)),
        ];
        for row in &rows {
            let seconds = row.elapsed.as_secs_f64();
            let base = rows
                .iter()
                .find(|base| base.server == "nginx" && base.phase == row.against);
            let ratio = base.filter(|base| base.server != row.server);
            let ratio = ratio.map(|base| format!("{:.2}", base.elapsed.as_secs_f64() / seconds));
            let milliseconds = |part| row.quantile(part).as_secs_f64() * 1e3;
            lines.push(format!(
                "| {} | {} | {seconds:.2} | {} | {} | {:.0} | {:.1} | {:.1} | {:.2} | {:.2} | {:.1} | {} | {} |",
                row.phase,
                row.server,
                rate(row.count as f64 / seconds),
                rate(row.requests as f64 / seconds),
                row.bytes as f64 / seconds / 1e6,
                milliseconds(0.5),
                milliseconds(0.99),
                row.cpu,
                row.clients_cpu,
                row.peak as f64 / 1e6,
                row.failures.len(),
                ratio.unwrap_or_default(),
            ));
        }
        lines.join("\n")
    }
}

/// A number with as many digits as say something.
fn rate(value: f64) -> String {
    match value {
        10.0.. => format!("{value:.0}"),
        _ => format!("{value:.1}"),
    }
}
