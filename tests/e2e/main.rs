//! The whole path, from a Tokio task to a software controller and back, without a VM.

#[path = "../support/mod.rs"]
mod support;

mod cancellation;
mod commands;
mod doorbells;
mod drops;
mod errors;
mod events;
mod histories;
mod io;
mod lifetimes;
mod live_namespaces;
mod local;
mod mappings;
mod matrix;
mod ordering;
mod panics;
mod pinned;
mod planted;
mod polling;
mod queues;
mod recovery;
mod remote;
mod runtime_ends;
mod runtimes;
mod waiters;
