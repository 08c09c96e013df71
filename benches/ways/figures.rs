//! What is measured of one run.

use std::fs;
use std::thread;
use std::time::Duration;

use nvme_async::{Controller, Counters};
use rustix::time::{ClockId, clock_gettime};

use crate::load::Done;

/// What is counted, up to a time at which nothing is outstanding.
pub(crate) struct Sample {
    counters: Counters,
    /// The CPU time of all threads but the software controller's.
    host: Duration,
}

impl Sample {
    pub(crate) fn take(controller: &Controller) -> Self {
        // The time of a thread that runs is behind; the controller's goes to sleep soon.
        thread::sleep(Duration::from_millis(1));
        let thread = controller.software_thread();
        let device = thread_time(thread.expect("the controller is in this process"));
        let process = clock_gettime(ClockId::ProcessCPUTime);
        let process = Duration::new(process.tv_sec as u64, process.tv_nsec as u32);
        Self {
            counters: controller.counters(),
            host: process.saturating_sub(device),
        }
    }
}

/// The CPU time of a thread of this process: the first number of `schedstat`, in nanoseconds.
fn thread_time(thread: u32) -> Duration {
    let text = fs::read_to_string(format!("/proc/self/task/{thread}/schedstat"));
    let text = text.expect("the kernel tells the CPU time of threads");
    let nanoseconds = text.split_ascii_whitespace().next();
    let nanoseconds = nanoseconds.and_then(|number| number.parse().ok());
    Duration::from_nanos(nanoseconds.expect("the first word of schedstat is a number"))
}

/// What a run was like. Times are in microseconds.
pub(crate) struct Figures {
    pub(crate) iops: f64,
    /// The latency, from when a read is made to when its task goes on.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// The rest is for each read.
    pub(crate) cpu: f64,
    pub(crate) interrupts: f64,
    /// Writes of tail doorbells of submission queues.
    pub(crate) doorbells: f64,
    /// Completions that are taken at a time.
    pub(crate) batch: f64,
}

impl Figures {
    pub(crate) fn new(done: &Done, before: &Sample, after: &Sample) -> Self {
        let reads = done.latencies.len() as f64;
        let latency = |quantile| done.latencies.value_at_quantile(quantile) as f64 / 1e3;
        let (later, earlier) = (after.counters, before.counters);
        let cpu = after.host.saturating_sub(before.host);
        let completions = later.completions - earlier.completions;
        let reaps = later.reaps - earlier.reaps;
        Self {
            iops: reads / done.elapsed.as_secs_f64(),
            p50: latency(0.5),
            p99: latency(0.99),
            cpu: cpu.as_secs_f64() * 1e6 / reads,
            interrupts: (later.interrupts - earlier.interrupts) as f64 / reads,
            doorbells: (later.submission_doorbells - earlier.submission_doorbells) as f64 / reads,
            batch: completions as f64 / reaps.max(1) as f64,
        }
    }
}
