//! The cargo cache: what a job's dependencies were downloaded and compiled to, for the next job.
//!
//! Each crate, each git checkout and each compiled unit of a dependency is a part of its own, with
//! its content in one chunk of the pack store. A chunk's key is the digest of that content, so that
//! a part which several jobs, lockfiles or branches have in common is stored once. A manifest names
//! the parts of one run, with the paths, modes and times of their files: by these cargo finds them
//! fresh.
//!
//! What belongs to the workspace is never among them: cargo tells whether it is stale by the times
//! of its sources, which a checkout makes anew. sccache answers for it, by content.
//!
//! `lockfile` is what a lockfile asks for, `manifest` what a run left and which of it another run
//! wants, both functions of values; `target` and `home` find parts on the disk, `files` puts parts
//! there and reads their content, `layout` tells which runs may share compiled units.

pub mod files;
pub mod home;
pub mod layout;
pub mod lockfile;
pub mod manifest;
pub mod target;
