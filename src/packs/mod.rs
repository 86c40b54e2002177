//! The pack store: thousands of sccache's objects in a handful of cache entries.
//!
//! `index` has the place of each object and merges two indexes, `pack` lays out an entry, `flush` decides
//! when to write one, `walk` decides which entries to look up: all are functions of values. `chain` reads
//! and reserves entries through the client of the cache service, `local_file` keeps bytes in files.

pub mod chain;
pub mod flush;
pub mod index;
pub mod local_file;
pub mod pack;
pub mod walk;
