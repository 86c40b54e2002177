//! Shared parts of the tests: a runner, the simulation of GitHub's cache, servers and projects.

pub mod build_places;
pub mod c_build;
#[cfg(unix)]
pub mod outcome;
pub mod postgres;
pub mod registry;
pub mod release_server;
pub mod runner;
pub mod s3;
pub mod served;
pub mod tools;
pub mod upstream;
