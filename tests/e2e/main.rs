//! The whole path, from a Tokio task to a software controller and back, without a VM.

#[path = "../support/mod.rs"]
mod support;

mod cancellation;
mod commands;
mod errors;
mod histories;
mod io;
mod lifetimes;
mod local;
mod mappings;
mod ordering;
mod planted;
mod queues;
mod runtimes;
