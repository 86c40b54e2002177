//! Speaking to an installed sccache: its server and its statistics.

pub mod rights;
pub mod server;
pub mod state;
pub mod stats;
pub mod times;
