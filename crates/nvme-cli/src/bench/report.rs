//! What a run found, for programs and for people.

use std::fmt;
use std::time::Duration;

use nvme_async::Counters;
use serde::Serialize;

use super::cpu::CpuUsage;
use super::plan::Plan;
use super::worker::Measured;
use super::{Arguments, Flavor, Poll, Workload};
use crate::format;

/// The result of a run. As JSON it is the one object that `bench --json` prints.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    iops: f64,
    bandwidth_bytes: f64,
    latency_ns: Latency,
    /// Requests measured, of which `reads` and `writes`.
    ios: u64,
    reads: u64,
    writes: u64,
    pub(super) errors: u64,
    pub(super) first_error: Option<String>,
    /// Blocks whose contents were checked, during the run and after it; null without `--verify`.
    verified: Option<u64>,
    /// Percent of one CPU, of all threads but the software controller's.
    cpu_percent: f64,
    /// Percent of one CPU, of the software controller's thread; null if there is none.
    controller_cpu_percent: Option<f64>,
    interrupts: u64,
    submission_doorbells: u64,
    completion_doorbells: u64,
    unwritten_doorbells: u64,
    /// Completions by times that they were taken.
    mean_batch: f64,
    polled_completions: u64,
    window_hits: u64,
    window_misses: u64,
    polling_ns: u64,
    sleeps: u64,
    lost_interrupts: u64,
    bounced_bytes: u64,
    elapsed_seconds: f64,
    config: Config,
}

#[derive(Debug, Serialize)]
struct Latency {
    mean: f64,
    p50: u64,
    p99: u64,
    p999: u64,
    max: u64,
}

#[derive(Debug, Serialize)]
struct Config {
    url: String,
    rw: Workload,
    rwmixread: u8,
    bs: u64,
    offset: u64,
    size: u64,
    iodepth: u32,
    jobs: u32,
    poll: Poll,
    flavor: Flavor,
    fua: bool,
    seed: u64,
    verify: bool,
}

/// What goes into a report.
pub(super) struct Findings {
    pub(super) measured: Measured,
    pub(super) elapsed: Duration,
    pub(super) counters: Counters,
    pub(super) cpu: CpuUsage,
    pub(super) errors: u64,
    pub(super) first_error: Option<String>,
    /// Blocks read back after the run.
    pub(super) read_back: u64,
}

impl Report {
    pub(super) fn new(arguments: &Arguments, plan: &Plan, findings: Findings) -> Self {
        let Findings {
            measured,
            elapsed,
            counters,
            cpu,
            errors,
            first_error,
            read_back,
        } = findings;
        let latencies = &measured.latencies;
        let ios = latencies.len();
        let iops = ios as f64 / elapsed.as_secs_f64().max(1e-9);
        Self {
            iops,
            bandwidth_bytes: iops * plan.bs as f64,
            latency_ns: Latency {
                mean: latencies.mean(),
                p50: latencies.value_at_quantile(0.5),
                p99: latencies.value_at_quantile(0.99),
                p999: latencies.value_at_quantile(0.999),
                max: latencies.max(),
            },
            ios,
            reads: measured.reads,
            writes: measured.writes,
            errors,
            first_error,
            verified: arguments.verify.then_some(measured.checked + read_back),
            cpu_percent: cpu.host,
            controller_cpu_percent: cpu.controller,
            interrupts: counters.interrupts,
            submission_doorbells: counters.submission_doorbells,
            completion_doorbells: counters.completion_doorbells,
            unwritten_doorbells: counters.unwritten_doorbells,
            mean_batch: counters.completions as f64 / counters.reaps.max(1) as f64,
            polled_completions: counters.polled_completions,
            window_hits: counters.window_hits,
            window_misses: counters.window_misses,
            polling_ns: counters.polling.as_nanos() as u64,
            sleeps: counters.sleeps,
            lost_interrupts: counters.lost_interrupts,
            bounced_bytes: counters.bounced_bytes,
            elapsed_seconds: elapsed.as_secs_f64(),
            config: Config {
                url: arguments.url.clone(),
                rw: arguments.rw,
                rwmixread: arguments.rwmixread,
                bs: arguments.bs,
                offset: plan.offset,
                size: plan.size(),
                iodepth: arguments.iodepth,
                jobs: arguments.jobs,
                poll: arguments.poll,
                flavor: arguments.flavor,
                fua: arguments.fua,
                seed: arguments.seed,
                verify: arguments.verify,
            },
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Config {
            rw,
            bs,
            iodepth,
            jobs,
            url,
            ..
        } = &self.config;
        let name = format!("{rw:?}").to_lowercase();
        writeln!(
            f,
            "{name} of {}, {jobs} x {iodepth} in flight, {url}",
            format::bytes(*bs)
        )?;
        let row = |f: &mut fmt::Formatter<'_>, name, value| writeln!(f, "  {name:<12} {value}");
        row(f, "IOPS", format!("{:.0}", self.iops))?;
        row(
            f,
            "bandwidth",
            format!("{}/s", format::bytes(self.bandwidth_bytes as u64)),
        )?;
        let latency = &self.latency_ns;
        let named = [
            ("mean", latency.mean as u64),
            ("p50", latency.p50),
            ("p99", latency.p99),
            ("p99.9", latency.p999),
            ("max", latency.max),
        ];
        let latencies = named.map(|(name, value)| format!("{name} {}", format::nanoseconds(value)));
        row(f, "latency", latencies.join(", "))?;
        let mixed = format!(" ({} reads, {} writes)", self.reads, self.writes);
        let mixed = if self.reads > 0 && self.writes > 0 {
            mixed
        } else {
            String::new()
        };
        row(
            f,
            "requests",
            format!("{}{mixed}, {} errors", self.ios, self.errors),
        )?;
        if let Some(verified) = self.verified {
            row(f, "verified", format!("{verified} blocks"))?;
        }
        let controller = self
            .controller_cpu_percent
            .map(|percent| format!(", software controller {percent:.0} %"));
        row(
            f,
            "CPU",
            format!(
                "{:.0} %{}",
                self.cpu_percent,
                controller.unwrap_or_default()
            ),
        )?;
        let counted = format!(
            "{} interrupts ({} lost), {} + {} doorbell writes ({} in memory only), {} completions \
             polled",
            self.interrupts,
            self.lost_interrupts,
            self.submission_doorbells,
            self.completion_doorbells,
            self.unwritten_doorbells,
            self.polled_completions
        );
        row(f, "queues", counted)?;
        let polled = format!(
            "{:.1} % of the time; {} windows with and {} without a completion, {} sleeps",
            self.polling_ns as f64 / self.elapsed_seconds.max(1e-9) / 1e7,
            self.window_hits,
            self.window_misses,
            self.sleeps
        );
        row(f, "polling", polled)?;
        row(f, "bounced", format::bytes(self.bounced_bytes))
    }
}

/// The events between two samples of a controller's counters.
pub(super) fn difference(later: Counters, earlier: Counters) -> Counters {
    // A copy, because fields may be added to it.
    let mut difference = later;
    difference.completions -= earlier.completions;
    difference.polled_completions -= earlier.polled_completions;
    difference.reaps -= earlier.reaps;
    difference.submission_doorbells -= earlier.submission_doorbells;
    difference.completion_doorbells -= earlier.completion_doorbells;
    difference.unwritten_doorbells -= earlier.unwritten_doorbells;
    difference.window_hits -= earlier.window_hits;
    difference.window_misses -= earlier.window_misses;
    difference.polling -= earlier.polling;
    difference.sleeps -= earlier.sleeps;
    difference.interrupts -= earlier.interrupts;
    difference.lost_interrupts -= earlier.lost_interrupts;
    difference.bounced_bytes -= earlier.bounced_bytes;
    difference
}
