//! What the action does as seen from the runner: its inputs, its environment, its log commands,
//! its set-up and its report.

pub mod environment;
pub mod mode;
pub mod runner_files;
pub mod summary;
pub mod workflow_command;
