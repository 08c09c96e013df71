//! The task that takes completions when nobody else looks.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::PollMode;
use super::access::Access;
use super::eventfd::Wakeups;
use super::state::{Aftermath, Failure, Look, Place, State, Term};
use super::window::Wait;

/// Looks at the completion queue between two chances for other tasks to run.
const BURST: u32 = 32;
/// A completion that a check finds is left to its interrupt for so long, since that may be on its
/// way; then the interrupt is lost.
const GRACE: Duration = Duration::from_millis(5);

/// Drives one queue pair for as long as its runtime and the queue live.
///
/// It polls in bursts while commands are outstanding and the window is open, and between bursts
/// lets every task run that can. Otherwise it sleeps on the interrupt, or until it will pay to poll;
/// with commands outstanding a timer wakes it too, since an interrupt may be lost and a deadline may
/// pass.
pub(crate) struct Reaper<Q: Access> {
    queue: Q,
    term: Term,
    wakeups: Wakeups,
    /// Timer wake-ups in a row that found nothing.
    idle_checks: u32,
    /// Whether the last one found a completion and left it to its interrupt.
    doubtful: bool,
    /// Whether a lost interrupt was reported.
    warned: bool,
    /// How long it polled since the last turn.
    spun: Duration,
}

/// What one turn decided.
enum Turn {
    /// More may be there at once.
    Again,
    /// A completion is expected soon.
    Burst,
    /// The waker is in the seat; the timers, if any, are to be set.
    Sleep {
        check: Option<Instant>,
        pause: Option<Instant>,
    },
    /// The same, with a completion waiting whose interrupt may be on its way.
    Doubt { check: Instant },
}

impl Turn {
    /// Until when the reaper sleeps, if it does and if there is such a time.
    fn sleeps_until(&self) -> Option<Option<Instant>> {
        match *self {
            Self::Again | Self::Burst => None,
            Self::Sleep { check, .. } => Some(check),
            Self::Doubt { check } => Some(Some(check)),
        }
    }
}

impl<Q: Access> Reaper<Q> {
    /// Makes a reaper for the current runtime. The seat is its own until it is dropped.
    pub(crate) fn new(queue: Q, term: Term, vector: &OwnedFd) -> Result<Self, Failure> {
        let wakeups = Wakeups::register(vector)?;
        Ok(Self {
            queue,
            term,
            wakeups,
            idle_checks: 0,
            doubtful: false,
            warned: false,
            spun: Duration::ZERO,
        })
    }

    fn burst(&mut self, began: Instant) {
        for _ in 0..BURST {
            let ready = self.queue.with(|state| state.completion_ready());
            if ready != Some(false) {
                break;
            }
            std::hint::spin_loop();
        }
        self.spun += began.elapsed();
    }

    /// What a completion found now says about the interrupt.
    fn look(&mut self, cx: &mut Context<'_>) -> Look {
        let interrupted = self.wakeups.poll_interrupt(cx);
        let timer = self.wakeups.poll_timer(cx);
        self.wakeups.poll_pause(cx);
        if interrupted {
            Look::Interrupted
        } else if timer {
            Look::Check
        } else {
            Look::Polled
        }
    }
}

impl<Q: Access> Future for Reaper<Q> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let now = Instant::now();
        // Registers for the interrupt before the look that decides whether to sleep, so that none
        // between the two goes unnoticed.
        let look = this.look(cx);
        let idle_checks = this.idle_checks;
        let doubtful = std::mem::take(&mut this.doubtful);
        let timer = this.wakeups.armed_for();
        let spun = std::mem::take(&mut this.spun);

        let mut aftermath = Aftermath::default();
        let term = this.term;
        let turn = this.queue.with(|state| {
            let seat = state.seat(term)?;
            let slept = seat.awake(&mut aftermath);
            state.window.counters.spun += spun;
            // The timer may also go off while the queue is polled, which says nothing.
            // Nor does it where there are no interrupts.
            let interrupts = state.mode() != PollMode::Busy;
            let look = if look != Look::Check || (slept && interrupts) {
                look
            } else {
                Look::Polled
            };
            let mut taken = 0;
            let turn = if look == Look::Check && !doubtful && state.completion_ready() {
                Turn::Doubt { check: now + GRACE }
            } else {
                taken = state.reap(look, now, &mut aftermath);
                state.expire(now, &mut aftermath);
                decide(state, now, idle_checks, timer)
            };
            state.ring_deferred();
            if let Some(check) = turn.sleeps_until() {
                state.counters.sleeps += u64::from(state.in_flight() > 0);
                let waker = cx.waker().clone();
                let next_look = check;
                state.seat(term)?.place = Place::Asleep { waker, next_look };
            }
            Some((turn, look, taken, state.take_events()))
        });
        aftermath.run();
        let Some((turn, look, taken, events)) = turn.flatten() else {
            return Poll::Ready(());
        };
        for event in events {
            this.queue.report(event);
        }
        match look {
            _ if taken > 0 => this.idle_checks = 0,
            Look::Check => this.idle_checks = idle_checks.saturating_add(1),
            Look::Interrupted | Look::Polled => {}
        }
        if look == Look::Check && taken > 0 && !std::mem::replace(&mut this.warned, true) {
            tracing::warn!(
                completions = taken,
                "an interrupt was lost: its completion was found by a check; the queue goes on, but \
                 such completions are late (this is reported once for each queue)"
            );
        }
        match turn {
            Turn::Again => cx.waker().wake_by_ref(),
            Turn::Burst => {
                this.burst(now);
                cx.waker().wake_by_ref();
            }
            Turn::Sleep { check, pause } => {
                if let Some(check) = check {
                    this.wakeups.arm(check, cx);
                }
                if let Some(pause) = pause {
                    this.wakeups.pause(pause, cx);
                }
            }
            Turn::Doubt { check } => {
                this.doubtful = true;
                this.wakeups.arm(check, cx);
            }
        }
        Poll::Pending
    }
}

impl<Q: Access> Drop for Reaper<Q> {
    fn drop(&mut self) {
        vacate(&self.queue, self.term);
    }
}

/// Ends the term of a reaper that is gone or could not be spawned.
pub(crate) fn vacate<Q: Access>(queue: &Q, term: Term) {
    let mut aftermath = Aftermath::default();
    queue.with(|state| state.vacate(term, &mut aftermath));
    aftermath.run();
}

/// Whether a reaper that was just spawned is on duty: a runtime that is shutting down drops it at
/// once.
pub(crate) fn check_spawned<Q: Access>(queue: &Q, term: Term) -> Result<(), Failure> {
    match queue.with(|state| state.is_seated(term)) {
        Some(false) => Err(Failure::RuntimeGone),
        Some(true) | None => Ok(()),
    }
}

fn decide(state: &mut State, now: Instant, idle_checks: u32, timer: Option<Instant>) -> Turn {
    if state.completion_ready() {
        return Turn::Again;
    }
    let pause = match state.wait(now) {
        Wait::Poll => return Turn::Burst,
        Wait::Pause { until } => Some(until),
        Wait::Sleep => None,
    };
    let check = state.next_check(now, idle_checks);
    Turn::Sleep {
        check: match (check, timer) {
            (Some(check), Some(timer)) => Some(check.min(timer)),
            (check, _) => check,
        },
        pause,
    }
}
