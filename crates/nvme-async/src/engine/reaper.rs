//! The task that takes completions when nobody else looks.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::PollMode;
use super::access::Access;
use super::eventfd::Wakeups;
use super::state::{Aftermath, Failure, Look, ReaperSeat, State, Term};

/// Looks at the completion queue between two chances for other tasks to run.
const BURST: u32 = 32;
/// A timer that goes off sooner after the queue fell asleep is not taken as proof that an
/// interrupt was lost: it may be on its way.
const PROOF: Duration = Duration::from_millis(5);

/// Drives one queue pair for as long as its runtime and the queue live.
///
/// It polls in bursts while commands are outstanding and the window is open, and between bursts
/// lets every task run that can. Otherwise it sleeps on the interrupt; with commands outstanding
/// a timer wakes it too, since an interrupt may be lost and a deadline may pass.
pub(crate) struct Reaper<Q: Access> {
    queue: Q,
    term: Term,
    wakeups: Wakeups,
    /// Since when it sleeps.
    asleep: Option<Instant>,
    /// Timer wake-ups in a row that found nothing.
    idle_checks: u32,
}

/// What one turn decided.
enum Turn {
    /// More may be there at once.
    Again,
    /// A completion is expected soon.
    Burst,
    /// The waker is in the seat; the timer, if any, is to be set.
    Sleep { check: Option<Instant> },
}

impl<Q: Access> Reaper<Q> {
    /// Makes a reaper for the current runtime. The seat is its own until it is dropped.
    pub(crate) fn new(queue: Q, term: Term, vector: &OwnedFd) -> Result<Self, Failure> {
        let wakeups = Wakeups::register(vector)?;
        Ok(Self {
            queue,
            term,
            wakeups,
            asleep: None,
            idle_checks: 0,
        })
    }

    fn burst(&mut self) {
        for _ in 0..BURST {
            let ready = self.queue.with(|state| {
                let ready = state.completion_ready();
                if ready {
                    state.window.hit();
                }
                ready
            });
            if ready != Some(false) {
                return;
            }
            std::hint::spin_loop();
        }
    }

    /// What a completion found now says about the interrupt.
    fn look(&mut self, cx: &mut Context<'_>, now: Instant) -> Look {
        let interrupted = self.wakeups.poll_interrupt(cx);
        let timer = self.wakeups.poll_timer(cx);
        let slept = self
            .asleep
            .take()
            .map(|since| now.saturating_duration_since(since));
        if interrupted {
            self.idle_checks = 0;
            Look::Interrupted
        } else if timer && slept.is_some_and(|slept| slept >= PROOF) {
            self.idle_checks += 1;
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
        let look = this.look(cx, now);
        let idle_checks = this.idle_checks;
        let timer = this.wakeups.armed_for();

        let mut aftermath = Aftermath::default();
        let term = this.term;
        let turn = this.queue.with(|state| {
            if !state.is_seated(term) {
                return None;
            }
            state.reaper = ReaperSeat::Awake;
            state.reap(look, now, &mut aftermath);
            state.ring_deferred();
            state.expire(now, &mut aftermath);
            let turn = decide(state, now, idle_checks, timer);
            if let Turn::Sleep { check } = turn {
                state.reaper = ReaperSeat::Asleep {
                    waker: cx.waker().clone(),
                    next_look: check,
                };
            }
            Some((turn, state.take_events()))
        });
        aftermath.run();
        let Some((turn, events)) = turn.flatten() else {
            return Poll::Ready(());
        };
        for event in events {
            this.queue.report(event);
        }
        match turn {
            Turn::Again => cx.waker().wake_by_ref(),
            Turn::Burst => {
                this.burst();
                cx.waker().wake_by_ref();
            }
            Turn::Sleep { check } => {
                this.asleep = Some(now);
                if let Some(check) = check {
                    this.wakeups.arm(check, cx);
                }
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
    let polls = match state.mode() {
        _ if state.in_flight() == 0 => false,
        PollMode::Interrupt => false,
        PollMode::Busy => true,
        PollMode::Adaptive => state.window_open(now),
    };
    if polls {
        return Turn::Burst;
    }
    let check = state.next_check(now, idle_checks);
    Turn::Sleep {
        check: match (check, timer) {
            (Some(check), Some(timer)) => Some(check.min(timer)),
            (check, _) => check,
        },
    }
}
