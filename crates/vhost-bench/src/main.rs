//! Measures a vhost-user-blk server from outside of any emulator: a front end with memory of its own, which does to
//! the server what the driver of a guest does to its disk.
//!
//! It has one virtqueue, in memory that it shares, and keeps a number of requests of 4 KiB in flight. It kicks when
//! the server wants that (event index), and sleeps until the server's interrupt when there is nothing to take: it
//! does not poll, as guests do not. Writes are plain ones, with the write cache on.

#![forbid(unsafe_code)]

mod layout;
mod load;
mod ring;
mod session;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::json;

use crate::load::{Length, Load, Workload};
use crate::session::Session;

/// Measures a server of a virtio disk, over vhost-user.
///
/// It reads and writes 4 KiB at a time, at random, and destroys what is on the disk where it writes. Prints JSON.
#[derive(Debug, Parser)]
struct Arguments {
    /// The server's socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// What is done, in fio's words.
    #[arg(long, value_enum)]
    rw: Workload,
    /// Requests in flight.
    #[arg(long, value_name = "NUMBER", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(layout::MAX_SLOTS)))]
    iodepth: u16,
    /// Seconds to measure.
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = seconds)]
    runtime: Duration,
    /// Seconds before that.
    #[arg(long, value_name = "SECONDS", default_value = "0.5", value_parser = seconds)]
    ramp: Duration,
    /// Decides where requests go.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
}

fn seconds(text: &str) -> Result<Duration> {
    Ok(Duration::try_from_secs_f64(text.parse()?)?)
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut session = Session::connect(&arguments.socket)
        .with_context(|| arguments.socket.display().to_string())?;
    let load = Load {
        workload: arguments.rw,
        iodepth: arguments.iodepth,
        seed: arguments.seed,
        ramp: Length {
            time: arguments.ramp,
            requests: 1,
        },
        measured: Length {
            time: arguments.runtime,
            requests: 1,
        },
    };
    let found = load.run(&mut session)?;
    session.stop()?;
    let latency = |percent| found.latencies.value_at_percentile(percent);
    println!(
        "{:#}",
        json!({
            "iops": found.iops(),
            "ios": found.latencies.len(),
            "latency_ns": {
                "mean": found.latencies.mean(),
                "p50": latency(50.0),
                "p99": latency(99.0),
                "max": found.latencies.max(),
            },
            "kicks": found.kicks,
            "interrupts": found.interrupts,
        })
    );
    Ok(())
}
