//! The pack store: thousands of sccache's objects in a handful of cache entries.
//!
//! `index` says which object lies where and how two indexes become one, `pack` how an entry is laid
//! out, `flush` when one is written: functions of values. `chain` reads and reserves entries through
//! the client of the cache service, `local` keeps bytes in files.

pub mod chain;
pub mod flush;
pub mod index;
pub mod local;
pub mod pack;
