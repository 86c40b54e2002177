//! All integration tests in one program, so that the library is linked once. `cargo test --test it
//! MODULE::` runs one module's.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod act;
mod behaviours;
mod cache_client;
mod caches;
mod cargo_cache;
#[cfg(unix)]
mod compiles;
mod conformance;
mod documents;
mod install;
mod job;
mod launcher;
mod layers;
mod rehearse;
mod relay;
mod serve_folder;
mod serve_process;
mod serve_store;
#[allow(dead_code, reason = "benches use the rest")]
mod support;
mod upstream;
mod windows;
#[cfg(unix)]
mod wrapper;
#[cfg(unix)]
mod wrong_keys;
