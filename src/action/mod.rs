//! The action's two steps: inputs, mode, set-up, probe, report, job summary.

pub mod inputs;
pub mod mode;
pub mod report;
pub mod restore_cargo;
pub mod setup;
pub mod start_relay;
pub mod state;
pub mod summary;
