//! Who drives a queue pair, and when it is to look.

use std::task::Waker;
use std::time::{Duration, Instant};

use tokio::runtime::{self, Handle};

use super::{Aftermath, State};
use crate::engine::PollMode;
use crate::engine::park;
use crate::engine::window::Wait;

/// How often a sleeping queue with commands outstanding is looked at without an interrupt.
const FIRST_CHECK: Duration = Duration::from_millis(10);
const LAST_CHECK: Duration = Duration::from_millis(500);
/// The first one where no interrupt is to come: the runtime's hook looks, but not while other tasks run.
const SILENT_CHECK: Duration = Duration::from_millis(1);
/// Of a queue without an interrupt that is not polled any more.
const LEAST_PAUSE: Duration = Duration::from_micros(10);

/// The longest pause during which an interrupt that can be masked is: its timer ends it soon enough.
const MASKED_PAUSE: Duration = Duration::from_micros(100);

/// Tells one reaper from another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Term(u64);

/// A reaper of the queue.
///
/// Each runtime in which operations are polled has one of its own: a runtime that exists and is not
/// driven at the moment must not keep those of another waiting.
pub(crate) struct Seat {
    term: Term,
    runtime: Here,
    pub(crate) place: Place,
}

/// What a reaper does at the moment.
pub(crate) enum Place {
    /// It will look at the queue by itself.
    Awake,
    /// It sleeps until its interrupt, its timer or this waker.
    Asleep {
        waker: Waker,
        /// When it looks again without being woken.
        next_look: Option<Instant>,
        /// When it is awake again to poll.
        pause: Option<Instant>,
    },
}

impl Seat {
    /// Whether operations that are polled `here` can rely on it; those outside of any runtime rely on
    /// all there are.
    #[inline]
    fn serves(&self, here: Here) -> bool {
        here.0.is_none() || self.runtime == here
    }

    /// Whether it is awake and will look at the queue and ring the doorbell, after the tasks that can
    /// run here now.
    #[inline]
    pub(super) fn attends(&self, here: Here) -> bool {
        self.runtime == here && matches!(self.place, Place::Awake)
    }

    /// Records that the reaper runs; returns whether it slept until now.
    pub(crate) fn awake(&mut self, aftermath: &mut Aftermath) -> bool {
        match std::mem::replace(&mut self.place, Place::Awake) {
            Place::Awake => false,
            Place::Asleep { waker, .. } => {
                aftermath.forget(waker);
                true
            }
        }
    }

    /// Wakes the reaper, if it sleeps.
    pub(crate) fn wake(&mut self, aftermath: &mut Aftermath) {
        if let Place::Asleep { waker, .. } = std::mem::replace(&mut self.place, Place::Awake) {
            aftermath.wake(waker);
        }
    }
}

/// The runtime that the caller runs in, if any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Here(Option<runtime::Id>);

impl Here {
    /// To be asked without the queue's lock: it takes some time.
    #[inline]
    pub(crate) fn now() -> Self {
        Self(Handle::try_current().ok().map(|runtime| runtime.id()))
    }
}

impl State {
    /// When a reaper that sleeps from `now` on has to look again, if ever.
    pub(crate) fn next_check(&self, now: Instant, checks: u32) -> Option<Instant> {
        if !self.is_watched() {
            return None;
        }
        let first = match self.has_interrupt() {
            true => FIRST_CHECK,
            false => SILENT_CHECK,
        };
        let check = now + first.saturating_mul(1 << checks.min(8)).min(LAST_CHECK);
        let delayed = self.delayed.iter().map(|(due, _)| *due);
        let waiting = self.waiting_again();
        let waiting = waiting.filter_map(|operation| operation.deadline(now));
        self.core
            .earliest_deadline()
            .into_iter()
            .chain(delayed)
            .chain(waiting)
            .chain([check])
            .min()
    }

    /// Who drives the queue for operations that are polled here.
    #[inline]
    pub(super) fn reaper(&self, here: Here) -> Option<&Seat> {
        self.seats.iter().find(|seat| seat.serves(here))
    }

    /// Whether the queue is driven for operations that are polled here.
    pub(crate) fn has_reaper(&self, here: Here) -> bool {
        self.reaper(here).is_some()
    }

    /// Takes a seat for this runtime, if it has none.
    pub(crate) fn claim_reaper(&mut self, here: Here) -> Option<Term> {
        if self.has_reaper(here) {
            return None;
        }
        self.last_term.0 += 1;
        self.seats.push(Seat {
            term: self.last_term,
            runtime: here,
            place: Place::Awake,
        });
        Some(self.last_term)
    }

    /// Ends the terms of all reapers, and wakes them so that they notice.
    pub(crate) fn dismiss_reapers(&mut self, aftermath: &mut Aftermath) {
        self.wake_reapers(aftermath);
        self.seats.clear();
    }

    /// Whether the reaper of `term` has a seat.
    pub(crate) fn is_seated(&self, term: Term) -> bool {
        self.seats.iter().any(|seat| seat.term == term)
    }

    /// The seat of the reaper of `term`, unless its term has ended.
    pub(crate) fn seat(&mut self, term: Term) -> Option<&mut Seat> {
        self.seats.iter_mut().find(|seat| seat.term == term)
    }

    /// How to wait from `now` on, for what has not completed yet. Where the interrupt was masked there
    /// may be completions afterwards, of which it did not tell.
    pub(crate) fn wait(&mut self, now: Instant) -> Wait {
        if self.in_flight() == 0 {
            return Wait::Sleep;
        }
        let wait = match self.settings.mode {
            PollMode::Adaptive => {
                let (situation, progress) = (self.situation(), self.progress());
                self.window.wait(situation, progress, now)
            }
            PollMode::Interrupt => Wait::Sleep,
            PollMode::Busy => Wait::Poll,
            PollMode::Paired => {
                let (situation, progress) = (self.situation(), self.progress());
                let wait = self.window.wait(situation, progress, now);
                let age = now.saturating_duration_since(progress);
                match wait {
                    // Nothing would end a sleep, and a timer is late. What is here was to be polled for;
                    // where that was wrong, the policy learns it best so.
                    Wait::Sleep if age < self.settings.max_window => Wait::Poll,
                    Wait::Sleep => {
                        let pause = (age / 4).max(LEAST_PAUSE);
                        Wait::Pause { until: now + pause }
                    }
                    Wait::Poll | Wait::Pause { .. } => wait,
                }
            }
        };
        self.set_mask(match wait {
            Wait::Poll => true,
            Wait::Pause { until } => until.saturating_duration_since(now) <= MASKED_PAUSE,
            Wait::Sleep => false,
        });
        wait
    }

    /// Whether the runtime's hook will look at the queue. It does if nothing else has run all the time
    /// since the last submission.
    fn is_left_to_hook(&mut self, here: Here) -> bool {
        park::calls(here.0)
            .is_some_and(|calls| std::mem::replace(&mut self.hook_calls, calls) != calls)
    }

    fn is_masked(&self) -> bool {
        self.mask.as_ref().is_some_and(|mask| mask.closed)
    }

    /// Whether a completion is told of by an interrupt at the moment.
    pub(crate) fn has_interrupt(&self) -> bool {
        self.settings.mode.has_interrupt() && !self.is_masked()
    }

    /// Masks the interrupt or lets it through. Not while doorbells are forbidden: the mask is a register
    /// like those, and may be gone.
    pub(super) fn set_mask(&mut self, closed: bool) {
        if let Some(mask) = &mut self.mask
            && mask.closed != closed
            && !self.core.is_fenced()
        {
            mask.closed = closed;
            match closed {
                true => mask.vector.mask(),
                false => mask.vector.unmask(),
            }
        }
    }

    /// Ends the term of one reaper and wakes all who wait, so that one of those who relied on it
    /// provides the next one.
    pub(crate) fn vacate(&mut self, term: Term, aftermath: &mut Aftermath) {
        let Some(index) = self.seats.iter().position(|seat| seat.term == term) else {
            return;
        };
        self.seats.remove(index).wake(aftermath);
        self.wake_all(aftermath);
    }

    /// Wakes all who wait for an operation or for a drain, so that they look at the queue again.
    pub(crate) fn wake_all(&mut self, aftermath: &mut Aftermath) {
        for operation in self.operations.iter_mut() {
            if operation.is_awaited() {
                operation.wake(aftermath);
            }
        }
        self.wake_all_drains(aftermath);
    }

    /// Wakes all reapers that sleep.
    pub(crate) fn wake_reapers(&mut self, aftermath: &mut Aftermath) {
        for seat in &mut self.seats {
            seat.wake(aftermath);
        }
    }

    /// Wakes the reaper if a submission needs it: to poll, to look in time, or to ring the doorbell.
    pub(super) fn rouse_reaper(&mut self, here: Here, now: Instant, aftermath: &mut Aftermath) {
        let is_asleep = |seat: &Seat| matches!(seat.place, Place::Asleep { .. });
        if !self.seats.iter().any(is_asleep) {
            return;
        }
        let polls = match self.settings.mode {
            _ if self.in_flight() == 0 => false,
            PollMode::Adaptive => {
                let (situation, progress) = (self.situation(), self.progress());
                self.window.wakes(situation, progress, now)
            }
            PollMode::Interrupt => false,
            PollMode::Busy | PollMode::Paired => true,
        };
        let watched = self.is_watched();
        let deadline = self.core.earliest_deadline();
        // What nothing is known of while nothing was outstanding may stay masked.
        let looks = polls || self.is_masked();
        let needed = self.core.has_deferred() || (looks && !self.is_left_to_hook(here));
        for seat in &mut self.seats {
            let Place::Asleep { next_look, .. } = seat.place else {
                continue;
            };
            let looks_in_time = match (next_look, deadline) {
                (None, _) => !watched,
                (Some(next_look), Some(deadline)) => next_look <= deadline,
                (Some(_), None) => true,
            };
            if (needed || !looks_in_time) && seat.serves(here) {
                seat.wake(aftermath);
            }
        }
    }
}
