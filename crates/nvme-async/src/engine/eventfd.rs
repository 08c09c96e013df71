//! Interrupt eventfds inside of a Tokio runtime.
#![expect(unsafe_code, reason = "registering a descriptor with Tokio is unsafe")]

use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Sleep;

use super::state::Failure;

/// One runtime's view of an interrupt vector, and timers.
pub(crate) struct Wakeups {
    interrupt: AsyncFd<OwnedFd>,
    timer: Pin<Box<Sleep>>,
    armed: bool,
    /// For times that are too short for Tokio's timers, which count in milliseconds.
    pause: Option<AsyncFd<OwnedFd>>,
}

impl Wakeups {
    /// Registers the vector with the current runtime.
    ///
    /// Several queue pairs, and with them several registrations, can share a vector.
    pub(crate) fn register(vector: &OwnedFd) -> Result<Self, Failure> {
        let own = vector.try_clone().map_err(|_| Failure::NoDriver)?;
        // Tokio has no way to ask whether a runtime has its drivers; without them it panics.
        let registered = catch_unwind(AssertUnwindSafe(|| {
            let timer = Box::pin(tokio::time::sleep_until(Instant::now().into()));
            // SAFETY: the AsyncFd owns the descriptor, which therefore stays open, and is never
            // given away mutably.
            let interrupt = unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) };
            interrupt.map(|interrupt| (interrupt, timer))
        }));
        match registered {
            Ok(Ok((interrupt, timer))) => Ok(Self {
                interrupt,
                timer,
                armed: false,
                pause: None,
            }),
            Ok(Err(_)) | Err(_) => Err(Failure::NoDriver),
        }
    }

    /// Whether the interrupt has fired since the last call. The task is woken when it fires
    /// again.
    ///
    /// The eventfd's counter is left alone: Tokio watches for edges, every signal is one even if
    /// the counter was not read, and another queue pair may share the vector.
    pub(crate) fn poll_interrupt(&mut self, cx: &mut Context<'_>) -> bool {
        take_edge(&self.interrupt, cx)
    }

    /// Wakes the task at about `until`, however soon that is. It may be woken for it more than once,
    /// and much later where there can be no further timer.
    pub(crate) fn pause(&mut self, until: Instant, cx: &mut Context<'_>) {
        if self.pause.is_none() {
            self.pause = precise_timer();
            self.poll_pause(cx);
        }
        let Some(timer) = &self.pause else {
            return;
        };
        let left = until.saturating_duration_since(Instant::now());
        let time = Itimerspec {
            it_interval: timespec(Duration::ZERO),
            // Zero would turn it off.
            it_value: timespec(left.max(Duration::from_nanos(1))),
        };
        // It fails for times that there can't be.
        let _ = timerfd_settime(timer.get_ref(), TimerfdTimerFlags::empty(), &time);
    }

    /// Sees to it that the task is woken by [`pause`](Self::pause).
    pub(crate) fn poll_pause(&mut self, cx: &mut Context<'_>) {
        if let Some(timer) = &self.pause {
            take_edge(timer, cx);
        }
    }

    /// Sets the timer, or leaves it if it is set already.
    pub(crate) fn arm(&mut self, at: Instant, cx: &mut Context<'_>) {
        if !self.armed || Instant::from(self.timer.deadline()) > at {
            self.timer.as_mut().reset(at.into());
            self.armed = true;
        }
        // Registers the task; if the time has come already, the task runs again.
        if self.timer.as_mut().poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
    }

    /// Whether the timer has gone off since it was set.
    pub(crate) fn poll_timer(&mut self, cx: &mut Context<'_>) -> bool {
        let fired = self.armed && self.timer.as_mut().poll(cx).is_ready();
        self.armed &= !fired;
        fired
    }

    /// When the timer will go off, if it is set.
    pub(crate) fn armed_for(&self) -> Option<Instant> {
        self.armed.then(|| self.timer.deadline().into())
    }
}

/// Whether a descriptor has become readable since the last call. The task is woken when it does so
/// again.
fn take_edge(descriptor: &AsyncFd<OwnedFd>, cx: &mut Context<'_>) -> bool {
    let mut fired = false;
    while let Poll::Ready(Ok(mut guard)) = descriptor.poll_read_ready(cx) {
        guard.clear_ready();
        fired = true;
    }
    fired
}

fn precise_timer() -> Option<AsyncFd<OwnedFd>> {
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    let timer = timerfd_create(TimerfdClockId::Monotonic, flags).ok()?;
    // SAFETY: the AsyncFd owns the descriptor, which therefore stays open, and is never given away
    // mutably.
    unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) }.ok()
}

/// A time that is shorter than a few hundred years.
pub(super) fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: time.as_secs().min(i64::MAX as u64) as i64,
        tv_nsec: time.subsec_nanos().into(),
    }
}

/// How often an eventfd was signalled, given that it is never read.
///
/// The count is in the descriptor's line `eventfd-count` under `/proc` (proc(5)); reading it there
/// does not reset it.
pub(crate) fn signal_count(eventfd: &OwnedFd) -> u64 {
    let path = format!("/proc/self/fdinfo/{}", eventfd.as_raw_fd());
    std::fs::read_to_string(path)
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("eventfd-count:"))?;
            u64::from_str_radix(line.trim(), 16).ok()
        })
        .unwrap_or(0)
}
