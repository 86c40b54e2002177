//! The cargo cache: a job's downloaded and compiled dependencies, kept for the next job.
//!
//! Each crate, each git checkout and each compiled unit of a dependency is a part of its own, with its
//! content in one chunk of the pack store. A chunk's key is the digest of that content, so a part that
//! several jobs, lockfiles or branches share is stored once. A manifest names the parts of one run, with
//! the paths, modes and times of their files, so that cargo finds them fresh.
//!
//! Units of the workspace are never among them: cargo decides by the times of their sources whether they
//! are stale, and a checkout sets these times again. sccache caches them, by content.
//!
//! `lockfile` has the packages that a lockfile asks for, `manifest` the parts that a run left and the
//! choice of those that another run wants, both functions of values. `units` and `home` find parts on the
//! disk. `files` extracts parts and reads their content, below folders that `open_below` opens without
//! following links. `places` knows where build directories are, `included` finds sources without code,
//! `leftovers` removes what killed restores left, `build_key` decides which runs may share compiled units.

pub mod build_key;
pub mod files;
pub mod home;
pub mod included;
pub mod leftovers;
pub mod lockfile;
pub mod manifest;
mod open_below;
pub mod places;
pub mod units;
