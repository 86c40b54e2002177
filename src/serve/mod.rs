//! The standalone cache service: `sccache-action serve`.
//!
//! `command` reads the options and runs the process, `server` accepts connections (`listener`) and
//! answers them with `cache_protocol`. Behind it is `entry_store`: a `catalog` of entries in SQLite
//! or PostgreSQL, which also holds small contents (`small_contents`), and a `blob_store` in a
//! folder or a bucket. `uploads_in_memory` holds uploads that the database does not have, and
//! `batch` commits many of them in one transaction.

mod batch;
pub mod blob_store;
pub mod catalog;
pub mod command;
pub mod entry_store;
mod listener;
mod metrics;
mod private_files;
mod reserved_space;
pub mod server;
mod shared_fetch;
mod small_contents;
pub mod token_check;
mod uploads_in_memory;
