//! The state of a queue pair against a model device, and the futures that share it.

mod futures;
mod neighbours;
mod operations;
mod reaper;
mod recovery;
pub(super) mod rig;
mod waiting;
