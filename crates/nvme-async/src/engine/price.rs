//! What it costs here to sleep until an interrupt.

use std::ops::RangeInclusive;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use poll_window::Costs;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, clock_gettime,
    timerfd_create, timerfd_settime,
};

use super::eventfd::timespec;

const SLEEPS: usize = 31;
/// Long enough for the processor to go to sleep too.
const SLEEP: Duration = Duration::from_micros(50);
/// What is found outside of these, in nanoseconds, says something of other programs.
const CPU: RangeInclusive<u64> = 1_000..=20_000;
const LATENCY: RangeInclusive<u64> = 1_000..=50_000;
const TIMER: RangeInclusive<u64> = 100..=10_000;

/// Measured once in a process, which takes some milliseconds: from a timer's interrupt to the thread
/// that slept until then, as a device's interrupt would wake it. It blocks.
pub(crate) fn of_a_sleep() -> Costs {
    static COSTS: OnceLock<Costs> = OnceLock::new();
    *COSTS.get_or_init(|| {
        let costs = measure().unwrap_or_else(|error| {
            tracing::debug!(%error, "the price of a sleep can't be measured, and is guessed");
            Costs::default()
        });
        tracing::debug!(?costs, "the price of a sleep");
        costs
    })
}

fn measure() -> rustix::io::Result<Costs> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    let time = Itimerspec {
        it_interval: timespec(Duration::ZERO),
        it_value: timespec(SLEEP),
    };
    let [mut set, mut cpu, mut latency, mut clock] = [[0; SLEEPS]; 4];
    for round in 0..SLEEPS {
        let began = Instant::now();
        let times = cpu_time();
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &time)?;
        let is_set = cpu_time();
        poll(&mut [PollFd::new(&timer, PollFlags::IN)], None)?;
        latency[round] = nanoseconds(began.elapsed().saturating_sub(SLEEP));
        let awake = cpu_time();
        set[round] = nanoseconds(is_set - times);
        cpu[round] = nanoseconds(awake - is_set);
        clock[round] = nanoseconds(cpu_time() - awake);
    }
    // What it takes to look at the clock is in all of them.
    let clock = median(&mut clock);
    let cost = |times: &mut [u64], limits: RangeInclusive<u64>| {
        let time = median(times).saturating_sub(clock);
        time.clamp(*limits.start(), *limits.end())
    };
    Ok(Costs {
        wake_cpu: cost(&mut cpu, CPU),
        wake_latency: median(&mut latency).clamp(*LATENCY.start(), *LATENCY.end()),
        timer_cpu: cost(&mut set, TIMER),
        ..Costs::default()
    })
}

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

fn nanoseconds(time: Duration) -> u64 {
    time.as_nanos() as u64
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_a_price() {
        let costs = measure().expect("there are timers");
        assert!(CPU.contains(&costs.wake_cpu), "{costs:?}");
        assert!(LATENCY.contains(&costs.wake_latency), "{costs:?}");
        assert!(TIMER.contains(&costs.timer_cpu), "{costs:?}");
        assert_eq!(of_a_sleep(), of_a_sleep(), "measured once");
    }
}
