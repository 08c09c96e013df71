//! Tests of the workspace, those in a virtual machine included.
//!
//! `cargo xtask test` runs everything; `cargo xtask vm -- COMMAND...` runs one command beside
//! QEMU's NVMe controllers; `cargo xtask vm-bench` compares the driver with others there; `cargo
//! xtask vm-disk` serves a guest its disks; `cargo xtask fuzz` runs the fuzz targets; `cargo xtask sanitize` runs what does I/O under a sanitizer;
//! `cargo xtask poll-sim` compares polling policies; `cargo xtask instructions` counts those of a read;
//! `cargo xtask kv-bench` compares the example `kv` with others; `cargo xtask remote-bench` a controller in
//! another process with one in this; `cargo xtask guest-bench` a guest's disk on our server with others. All say
//! `--help`.

#![forbid(unsafe_code)]

mod boots;
mod forward;
mod fuzz;
mod guest;
mod guest_bench;
mod initramfs;
mod instructions;
mod kernel;
mod kv_bench;
mod machine;
mod packages;
mod poll_sim;
mod relay;
mod remote_bench;
mod run;
mod sanitize;
mod sources;
mod table;
mod tally;
mod test;
mod vm;
mod vm_bench;
mod vm_disk;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

/// Runs the tests of nvme-async.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Fuzz(fuzz::Arguments),
    GuestBench(guest_bench::Arguments),
    Instructions(instructions::Arguments),
    KvBench(kv_bench::Arguments),
    PollSim(poll_sim::Arguments),
    RemoteBench(remote_bench::Arguments),
    Test(test::Arguments),
    Sanitize(sanitize::Arguments),
    Vm(vm::Arguments),
    VmBench(vm_bench::Arguments),
    VmDisk(vm_disk::Arguments),
}

fn main() -> ExitCode {
    let task = Arguments::parse().task;
    let outcome = Workspace::find().and_then(|workspace| match task {
        Task::Fuzz(arguments) => fuzz::run(&workspace, &arguments),
        Task::GuestBench(arguments) => guest_bench::run(&workspace, &arguments),
        Task::Instructions(arguments) => instructions::run(&workspace, &arguments),
        Task::KvBench(arguments) => kv_bench::run(&workspace, &arguments),
        Task::PollSim(arguments) => poll_sim::run(&workspace, &arguments),
        Task::RemoteBench(arguments) => remote_bench::run(&workspace, &arguments),
        Task::Test(arguments) => test::run(&workspace, &arguments),
        Task::Sanitize(arguments) => sanitize::run(&workspace, &arguments),
        Task::Vm(arguments) => vm::run(&workspace, &arguments),
        Task::VmBench(arguments) => vm_bench::run(&workspace, &arguments),
        Task::VmDisk(arguments) => vm_disk::run(&workspace, &arguments),
    });
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(run::HARNESS_FAILURE)
    })
}
