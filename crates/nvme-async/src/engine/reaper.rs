//! The task that takes completions when nobody else looks.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::PollMode;
use super::access::Access;
use super::eventfd::Wakeups;
use super::park::Hook;
use super::state::{Aftermath, Failure, Look, Place, State, Term};
use super::window::Wait;

/// Looks at the completion queue between two chances for other tasks to run.
pub(super) const BURST: u32 = 32;
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
    parking: Option<Parking>,
}

/// How a reaper gets on with its runtime's hook, which polls in its place.
struct Parking {
    hook: Arc<Hook>,
    /// How often the hook had been called at the last turn.
    calls: u64,
    /// Turns in a row without a call.
    turns: u32,
}

/// So many turns without a call of the hook, and the reaper sees whether there will be one if it rests.
const TURNS: u32 = 64;

impl Parking {
    /// Whether the polling can be left to the hook. It is not called while other tasks run all the time:
    /// then the reaper looks once after each of them has.
    fn is_called(&mut self) -> bool {
        let calls = self.hook.calls();
        let called = std::mem::replace(&mut self.calls, calls) != calls;
        self.turns = if called { 0 } else { (self.turns + 1) % TURNS };
        self.turns == 0
    }
}

/// What one turn decided.
enum Turn {
    /// More may be there at once.
    Again,
    /// A completion is expected soon.
    Burst,
    /// The waker is in the seat; the timers, if any, are to be set.
    Sleep { pause: Option<Instant> },
    /// The same, with a completion waiting whose interrupt may be on its way.
    Doubt,
}

impl Turn {
    /// When it is to be awake again to poll, if it sleeps.
    fn pause(&self) -> Option<Instant> {
        match *self {
            Self::Sleep { pause } => pause,
            Self::Again | Self::Burst | Self::Doubt => None,
        }
    }
}

impl<Q: Access> Reaper<Q> {
    /// Makes a reaper for the current runtime. The seat is its own until it is dropped.
    pub(crate) fn new(queue: Q, term: Term, vector: &OwnedFd) -> Result<Self, Failure> {
        let wakeups = Wakeups::register(vector)?;
        let polls = queue.with(|state| state.mode() != PollMode::Interrupt);
        let hook = Hook::current().filter(|_| polls == Some(true));
        if let Some(hook) = &hook {
            queue.park(hook, term);
        }
        Ok(Self {
            queue,
            term,
            wakeups,
            idle_checks: 0,
            doubtful: false,
            warned: false,
            spun: Duration::ZERO,
            parking: hook.map(|hook| Parking {
                hook,
                calls: 0,
                turns: 0,
            }),
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
        let parks = this.parking.as_mut().map(Parking::is_called);

        let mut aftermath = Aftermath::default();
        let term = this.term;
        let turn = this.queue.with(|state| {
            let seat = state.seat(term)?;
            let slept = seat.awake(&mut aftermath);
            state.window.counters.spun += spun;
            // The timer may also go off while the queue is polled, which says nothing.
            // Nor does it where there are no interrupts.
            let interrupts = state.has_interrupt();
            let look = if look != Look::Check || (slept && interrupts) {
                look
            } else {
                Look::Polled
            };
            let mut taken = 0;
            let turn = if look == Look::Check && !doubtful && state.completion_ready() {
                Turn::Doubt
            } else {
                taken = state.reap(look, now, &mut aftermath);
                state.expire(now, &mut aftermath);
                let turn = decide(state, now);
                match (turn, parks) {
                    (Turn::Burst, Some(true)) => Turn::Sleep { pause: None },
                    (Turn::Burst, Some(false)) => Turn::Again,
                    (turn, _) => turn,
                }
            };
            state.ring_deferred();
            let check = match turn {
                Turn::Again | Turn::Burst => None,
                Turn::Sleep { .. } => earliest(state.next_check(now, idle_checks), timer),
                Turn::Doubt => Some(now + GRACE + state.coalescing_time()),
            };
            if let Turn::Sleep { .. } | Turn::Doubt = turn {
                state.counters.sleeps += u64::from(state.in_flight() > 0);
                state.seat(term)?.place = Place::Asleep {
                    waker: cx.waker().clone(),
                    next_look: check,
                    pause: turn.pause(),
                };
            }
            Some((turn, check, look, taken, state.take_events()))
        });
        aftermath.run();
        let Some((turn, check, look, taken, events)) = turn.flatten() else {
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
            Turn::Sleep { .. } => {}
            Turn::Doubt => this.doubtful = true,
        }
        if let Some(check) = check {
            this.wakeups.arm(check, cx);
        }
        if let Some(pause) = turn.pause() {
            this.wakeups.pause(pause, cx);
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

fn decide(state: &mut State, now: Instant) -> Turn {
    if state.completion_ready() {
        return Turn::Again;
    }
    let wait = state.wait(now);
    if state.completion_ready() {
        return Turn::Again;
    }
    match wait {
        Wait::Poll => Turn::Burst,
        Wait::Pause { until } => Turn::Sleep { pause: Some(until) },
        Wait::Sleep => Turn::Sleep { pause: None },
    }
}

/// A timer that is set goes off also if it is not needed any more.
fn earliest(check: Option<Instant>, timer: Option<Instant>) -> Option<Instant> {
    check.into_iter().chain(timer).min()
}
