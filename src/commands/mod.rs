//! The commands that people run: `doctor`, `caches`, `stats`, `rehearse`.

pub mod caches;
pub mod doctor;
pub mod rehearse;
pub mod stats;
