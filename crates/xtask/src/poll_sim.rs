//! `cargo xtask poll-sim`: polling policies, compared in virtual time.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::run::HARNESS_FAILURE;
use crate::workspace::Workspace;

/// Compares polling policies on traces of completions, in virtual time, and fails if one is better than
/// ours.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What the simulator is told; `-- --help` says what there is.
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let mut cargo = workspace.cargo();
    cargo.args(["run", "--quiet", "--release", "--package", "poll-sim", "--"]);
    let status = cargo.args(&arguments.arguments).status();
    let code = status.context("cargo run")?.code();
    Ok(code.map_or(HARNESS_FAILURE, |code| code as u8).into())
}
