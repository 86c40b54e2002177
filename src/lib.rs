//! The parts of the `sccache-action` binary, from the ground up: a room uses those before it in
//! ARCHITECTURE.md's table and none after it, which a test holds (`tests/it/layers.rs`).
//!
//! The pure core (version choice, archive checks, statistics, summaries, wire formats) is made of
//! functions of values. The edges (network, processes, files, the runner's environment) are handed
//! in, so that every part can be driven by a test.

pub mod action;
pub mod cache_client;
pub mod cache_protocol;
pub mod cargo_cache;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod digest;
pub mod format;
pub mod github;
pub mod http;
pub mod install;
pub mod packs;
pub mod relay;
pub mod runner;
pub mod sccache;
#[cfg(feature = "serve")]
pub mod serve;
pub mod stop_signal;
pub mod wrapper;
