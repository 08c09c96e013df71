//! `nvme-async bench`: a workload, and how fast it is.

mod cpu;
mod ledger;
mod passes;
mod pattern;
mod plan;
mod report;
mod run;
#[cfg(test)]
mod testing;
mod worker;

use std::io::Write;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use tokio::runtime::{Builder, Runtime};

use crate::failure::Failure;
use crate::format::parse_seconds;

/// Runs a workload on a namespace and reports its speed; the words are fio's.
///
/// Workloads that write destroy what is in the region.
#[derive(Args, Clone, Debug)]
pub(crate) struct Arguments {
    /// The namespace, such as nvme://0000:44:00.0/1, vfio-user:/run/nvme.sock or mem:?size=256M.
    url: String,

    /// The workload.
    #[arg(long, value_enum)]
    rw: Workload,

    /// Bytes of a request, a multiple of the logical block size.
    #[arg(long, default_value = "4k", value_parser = nvme_async::parse_size)]
    bs: u64,

    /// Requests that each job has in flight, each from a task of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    iodepth: u32,

    /// Groups of tasks. Each job has a sequence of its own; sequential jobs begin at places that
    /// are spread over the region.
    #[arg(
        long,
        alias = "numjobs",
        default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=1024)
    )]
    jobs: u32,

    /// Seconds to measure.
    #[arg(long, default_value = "5", value_parser = parse_seconds)]
    runtime: Duration,

    /// Seconds to run before measuring.
    #[arg(long, default_value = "1", value_parser = parse_seconds)]
    ramp: Duration,

    /// Where the region begins, in bytes.
    #[arg(long, default_value = "0", value_parser = nvme_async::parse_size)]
    offset: u64,

    /// Bytes of the region, a multiple of --bs [default: the rest of the namespace].
    #[arg(long, value_parser = nvme_async::parse_size)]
    size: Option<u64>,

    /// Percent of reads in randrw.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    rwmixread: u8,

    /// Make each write durable before it counts (Force Unit Access).
    #[arg(long)]
    fua: bool,

    /// Seed of the random offsets.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// How completions are waited for.
    #[arg(long, value_enum, default_value_t = Poll::Adaptive)]
    poll: Poll,

    /// The Tokio runtime that all jobs share.
    #[arg(long, value_enum, default_value_t = Flavor::Multi)]
    flavor: Flavor,

    /// Check contents: stale, misplaced, torn and corrupt data are errors.
    ///
    /// Blocks are written with a header and a pattern. Reads of blocks that this run wrote are
    /// checked, and all that it wrote is read back at the end. With read and randread, what an
    /// earlier run with --verify and the same --bs and --offset wrote is checked; use --fill when
    /// there was none.
    #[arg(long)]
    verify: bool,

    /// With --verify: first write the whole region, which DESTROYS what is in it. Not needed for
    /// mem: URLs.
    #[arg(long)]
    fill: bool,

    /// Print one JSON object on stdout.
    #[arg(long)]
    json: bool,
}

/// fio's names of workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Workload {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random reads.
    Randread,
    /// Random writes.
    Randwrite,
    /// Random reads and writes.
    Randrw,
}

/// How completions are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Poll {
    /// Polling while one is expected soon, then the interrupt. Whether interrupts are masked while queues
    /// are polled is the device's default.
    Adaptive,
    /// The interrupt only.
    Interrupt,
    /// Polling only, with interrupts off.
    Busy,
    /// As adaptive, with commands that are polled for on a queue pair without interrupts.
    Paired,
    /// As adaptive, with interrupts masked while queues are polled.
    Masked,
    /// As adaptive, with interrupts that are never masked.
    Unmasked,
}

/// Which runtime runs the tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Flavor {
    /// One thread for all jobs (`current_thread`).
    Current,
    /// The same, which polls in its park hook.
    Park,
    /// A thread for each core (`multi_thread`).
    Multi,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    plan::Plan::check_arguments(arguments)?;
    let report = runtime(arguments.flavor)?.block_on(run::run(arguments))?;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        serde_json::to_writer_pretty(&mut out, &report).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        write!(out, "{report}")?;
    }
    match report.errors {
        0 => Ok(()),
        errors => {
            let first = report.first_error.as_deref().unwrap_or("unknown");
            Err(Failure::operation(format_args!(
                "{errors} errors, the first one: {first}"
            )))
        }
    }
}

fn runtime(flavor: Flavor) -> Result<Runtime, Failure> {
    Ok(match flavor {
        Flavor::Current => Builder::new_current_thread().enable_all().build()?,
        Flavor::Park => nvme_async::runtime::Builder::new().build()?,
        Flavor::Multi => Builder::new_multi_thread().enable_all().build()?,
    })
}
