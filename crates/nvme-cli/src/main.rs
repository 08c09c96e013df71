//! `nvme-async`: NVMe devices from user space, at the command line.
//!
//! The exit status is 0 for success, 1 for an operation that failed, and 2 for a request that
//! makes no sense (bad arguments, a bad URL, a range past the end); then nothing was written.

mod bench;
mod bind;
mod copy;
mod failure;
mod format;
mod functions;
mod identify;
mod list;
mod pci;
mod progress;
mod serve;
mod smart;
mod target;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::failure::Failure;

/// NVMe devices from user space.
///
/// A URL names a device: nvme://0000:44:00.0/1 (a PCI function bound to vfio-pci, namespace 1),
/// vfio-user:/run/nvme.sock?ns=1 (a controller that another process serves),
/// file:disk.img?size=1G&lba=4096 (a software controller over a file, created sparse when a size is
/// given) or mem:?size=256M (the same over memory). A software controller takes faults=plan.toml, a
/// file that says what it does wrong and when.
///
/// Exit status: 0 success, 1 failure, 2 bad arguments, a bad URL or a range past the end (nothing
/// was written then). RUST_LOG=debug shows what the driver does, on stderr.
#[derive(Parser)]
#[command(name = "nvme-async", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    List(functions::ListArguments),
    Bind(functions::BindArguments),
    Unbind(functions::UnbindArguments),
    Identify(identify::Arguments),
    Smart(smart::Arguments),
    Bench(bench::Arguments),
    Copy(copy::Arguments),
    Serve(serve::Arguments),
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    // What is amiss but does not fail an operation, such as lost interrupts, is shown anyway.
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::WARN.into())
        .from_env_lossy();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let outcome = match command {
        Command::List(arguments) => functions::list(&arguments),
        Command::Bind(arguments) => functions::bind(&arguments),
        Command::Unbind(arguments) => functions::unbind(&arguments),
        Command::Identify(arguments) => identify::run(&arguments),
        Command::Smart(arguments) => smart::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Copy(arguments) => copy::run(&arguments),
        Command::Serve(arguments) => serve::run(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            failure.exit_code()
        }
    }
}

/// Runs a command that needs no parallelism.
fn block_on(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(command)
}
