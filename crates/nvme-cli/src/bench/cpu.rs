//! How much CPU time the process uses, the embedded software controller apart.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// CPU time used up to a point in time.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuSample {
    at: Instant,
    process: Duration,
    controller: Option<Duration>,
}

/// Percent of one CPU: 200 is two of them, fully used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct CpuUsage {
    /// All threads but the software controller's.
    pub(super) host: f64,
    /// The software controller's thread, if there is one.
    pub(super) controller: Option<f64>,
}

impl CpuSample {
    /// The time used by now; `controller` is the kernel's number of the software controller's
    /// thread.
    pub(super) fn now(controller: Option<u32>) -> Self {
        let process = clock_gettime(ClockId::ProcessCPUTime);
        Self {
            at: Instant::now(),
            process: Duration::new(process.tv_sec as u64, process.tv_nsec as u32),
            controller: controller.and_then(thread_time),
        }
    }

    /// The usage since `earlier`.
    pub(super) fn since(&self, earlier: &Self) -> CpuUsage {
        let elapsed = (self.at - earlier.at).as_secs_f64();
        let percent = |time: Duration| 100.0 * time.as_secs_f64() / elapsed.max(1e-9);
        let controller = self
            .controller
            .zip(earlier.controller)
            .map(|(now, then)| now.saturating_sub(then));
        let process = self.process.saturating_sub(earlier.process);
        CpuUsage {
            host: percent(process.saturating_sub(controller.unwrap_or_default())),
            controller: controller.map(percent),
        }
    }
}

/// The CPU time of a thread of this process: the first number of `schedstat`, in nanoseconds.
fn thread_time(thread: u32) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).ok()?;
    let nanoseconds = text.split_ascii_whitespace().next()?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: Instant, process: u64, controller: Option<u64>) -> CpuSample {
        let ms = Duration::from_millis;
        CpuSample {
            at,
            process: ms(process),
            controller: controller.map(ms),
        }
    }

    #[test]
    fn the_controller_is_apart() {
        let start = Instant::now();
        let end = start + Duration::from_secs(2);
        let usage = sample(end, 3100, Some(1500)).since(&sample(start, 100, Some(500)));
        assert_eq!(
            usage,
            CpuUsage {
                host: 100.0,
                controller: Some(50.0)
            }
        );
        let usage = sample(end, 3100, None).since(&sample(start, 100, None));
        assert_eq!(
            usage,
            CpuUsage {
                host: 150.0,
                controller: None
            }
        );
    }

    #[test]
    fn threads_have_a_time() {
        let thread = rustix::thread::gettid().as_raw_pid() as u32;
        assert!(CpuSample::now(Some(thread)).controller.is_some());
        // No kernel thread number is that large.
        assert!(CpuSample::now(Some(u32::MAX)).controller.is_none());
    }
}
