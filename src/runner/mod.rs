//! The interface between a runner and its jobs: environment variables, log commands, the files that
//! the runner reads after a step, and the parts of the cache that a job may use.

pub mod environment;
pub mod files;
pub mod log;
pub mod scopes;
pub mod token;
