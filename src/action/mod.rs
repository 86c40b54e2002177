//! What the action does as seen from the runner: its inputs, its environment, its log commands,
//! its set-up and its report.

pub mod cargo;
pub mod environment;
pub mod inputs;
pub mod mode;
mod probe;
pub mod relay;
pub mod report;
pub mod runner_files;
pub mod scopes;
pub mod setup;
pub mod state;
pub mod stats;
pub mod summary;
pub mod workflow_command;
