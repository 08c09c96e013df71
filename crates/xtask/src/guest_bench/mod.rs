//! `cargo xtask guest-bench`: a guest's disk on our server, beside others and fio on the same file.

mod bars;
mod figures;
mod guest;
mod host;
mod image;
mod report;
mod server;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::value_parser;

use self::report::Comparison;
use crate::packages::Bed;
use crate::workspace::Workspace;

/// What it needs, and the packages that have it.
const PROGRAMS: [(&str, &str); 2] = [("fio", "fio"), ("qemu-storage-daemon", "qemu-utils")];

/// Compares the disk of a guest on `nvme-async serve vhost-user-blk` with qemu-storage-daemon's and with fio on the
/// same file.
///
/// 4 KiB at a time, random reads, writes and both mixed, one and four in flight; all by turns, in each round, with
/// medians and their ratios to POSIX, which is fio's libaio with direct=1.
///
/// The first table hides nothing behind an emulator: a front end on the host (`vhost-bench`), with one virtqueue, event
/// index and interrupts as the driver of a guest has them, on either server, and fio on the file itself. `file:` of ours
/// goes through the page cache, which O_DIRECT does not, so that there is fio and qemu-storage-daemon with the page
/// cache too. Each round does what is direct, then reads the file once, then does what is cached.
///
/// The second one is fio in a guest, in QEMU without KVM, on virtio-blk over files (cache=none, aio=native and
/// aio=io_uring), on qemu-storage-daemon's vhost-user-blk (direct, aio=native) and on ours: mostly of the emulation.
///
/// fio and QEMU's programs are installed where they are missing.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Seconds that each run measures.
    #[arg(long, value_name = "SECONDS", default_value_t = 1,
          value_parser = value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// How often everything runs on the host.
    #[arg(long, value_name = "NUMBER", default_value_t = 5,
          value_parser = value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// How often everything runs in the guest; with 0 there is none.
    #[arg(long, value_name = "NUMBER", default_value_t = 3,
          value_parser = value_parser!(u32).range(0..=1000))]
    guest_rounds: u32,
    /// Where the files are kept that are read and written. [default: a directory below cargo's target]
    #[arg(long, value_name = "DIRECTORY")]
    directory: Option<PathBuf>,
    /// MiB of each file.
    #[arg(long, value_name = "MIB", default_value_t = 512,
          value_parser = value_parser!(u64).range(64..=1 << 20))]
    size: u64,
    /// Draw the ratios into this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Run what was built before.
    #[arg(long)]
    no_build: bool,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    if !arguments.no_build {
        let mut cargo = workspace.cargo();
        cargo.args(["build", "--quiet", "--release"]);
        cargo.args(["--package", "nvme-cli", "--package", "vhost-bench"]);
        ensure!(
            cargo.status().context("cargo build")?.success(),
            "the programs do not build"
        );
    }
    let bed = Bed::prepare_with(&workspace.vm_directory(), &PROGRAMS)?;
    let directory = arguments.directory.clone();
    let directory = directory.unwrap_or_else(|| workspace.target.join("guest-bench"));
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    println!("{}", host::notes(&directory)?);

    let host = host::compare(workspace, arguments, &directory)?;
    println!("\nOn the host\n{host}");
    let mut comparisons: Vec<Comparison> = vec![host];
    if arguments.guest_rounds > 0 {
        let guest = guest::compare(workspace, arguments, &directory, &bed)?;
        println!("\nIn a guest, emulated\n{guest}");
        comparisons.push(guest);
    }
    if let Some(path) = &arguments.svg {
        bars::draw(path, &comparisons).with_context(|| path.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}
