//! An installed sccache: its server, its statistics, and the state folder of a set-up.

pub mod outputs;
pub mod server;
pub mod state_dir;
pub mod stats;
pub mod times;
