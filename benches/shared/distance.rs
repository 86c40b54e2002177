//! How far the simulated cache service is, as options of a benchmark.

use std::fmt;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::upstream::{Options, Upstream};

/// The options.
#[derive(Clone, Copy, Debug, Args, Serialize)]
pub struct Distance {
    /// What a call of the cache service's API takes
    #[arg(long, default_value_t = 40, value_name = "MS")]
    api_latency_ms: u64,
    /// What an upload or a download takes before its first byte
    #[arg(long, default_value_t = 25, value_name = "MS")]
    blob_latency_ms: u64,
    /// How many entries may be made in any 60 seconds
    #[arg(long, default_value_t = 200, value_name = "N")]
    uploads_per_minute: u32,
}

impl Distance {
    /// Starts a cache service that is so far.
    pub fn start(self) -> Upstream {
        Upstream::start(Options {
            api_latency: Duration::from_millis(self.api_latency_ms),
            blob_latency: Duration::from_millis(self.blob_latency_ms),
            uploads_per_minute: Some(self.uploads_per_minute),
        })
    }
}

impl fmt::Display for Distance {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} ms to the API, {} ms to content, {} uploads a minute",
            self.api_latency_ms, self.blob_latency_ms, self.uploads_per_minute
        )
    }
}
