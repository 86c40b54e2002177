//! The parts of the `sccache-action` binary.
//!
//! The pure core (version choice, archive checks, statistics, summaries, wire formats) is made of
//! functions of values. The edges (network, processes, files, the runner's environment) are handed
//! in, so that every part can be driven by a test.

pub mod action;
pub mod caches;
pub mod cargo;
pub mod cli;
pub mod doctor;
pub mod github;
pub mod http_client;
pub mod install;
pub mod rehearse;
pub mod relay;
pub mod sccache;
#[cfg(feature = "serve")]
pub mod serve;
pub mod service;
pub mod stop_signal;
pub mod store;
pub mod words;
pub mod wrapper;
