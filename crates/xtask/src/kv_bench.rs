//! `cargo xtask kv-bench`: the example `kv` and other durable key-value stores, compared.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use crate::packages;
use crate::run::HARNESS_FAILURE;
use crate::workspace::Workspace;

/// Compares the example `kv` on a file with Redis, fjall and redb, all durable and by turns.
///
/// It installs Debian's redis-tools where that is missing. With `-- --keys 1000000` it measures what a
/// key takes of the example's memory, and how long its recovery takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What the benchmark is told; `-- --help` says what there is.
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    packages::install_redis(&workspace.vm_directory())?;
    let build = [
        "build",
        "--release",
        "--package",
        "nvme-async-workspace",
        "--example",
        "kv",
    ];
    let status = workspace
        .cargo()
        .args(build)
        .status()
        .context("cargo build")?;
    ensure!(status.success(), "the example can't be built");
    let mut cargo = workspace.cargo();
    cargo.args([
        "bench",
        "--package",
        "nvme-async-workspace",
        "--bench",
        "kv",
        "--",
    ]);
    let program = workspace.target.join("release/examples/kv");
    cargo
        .arg("--kv")
        .arg(program)
        .arg("--directory")
        .arg(&workspace.target);
    let status = cargo.args(&arguments.arguments).status();
    let code = status.context("cargo bench")?.code();
    Ok(code.map_or(HARNESS_FAILURE, |code| code as u8).into())
}
