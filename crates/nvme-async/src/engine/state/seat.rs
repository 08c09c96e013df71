//! Who drives a queue pair, and when it is to look.

use std::task::Waker;
use std::time::{Duration, Instant};

use super::{Aftermath, Stage, State};
use crate::engine::PollMode;

/// How often a sleeping queue with commands outstanding is looked at without an interrupt.
const FIRST_CHECK: Duration = Duration::from_millis(10);
const LAST_CHECK: Duration = Duration::from_millis(500);

/// Tells one reaper from another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Term(u64);

/// Who drives the queue.
pub(crate) enum ReaperSeat {
    /// Nobody: the next operation that is polled spawns a reaper.
    Empty,
    /// A reaper that will look at the queue by itself.
    Awake,
    /// A reaper that sleeps until its interrupt, its timer or this waker.
    Asleep {
        waker: Waker,
        /// When it looks again without being woken.
        next_look: Option<Instant>,
    },
}

impl State {
    /// When a reaper that sleeps from `now` on has to look again, if ever.
    pub(crate) fn next_check(&self, now: Instant, checks: u32) -> Option<Instant> {
        if !self.is_watched() {
            return None;
        }
        let check = now
            + FIRST_CHECK
                .saturating_mul(1 << checks.min(8))
                .min(LAST_CHECK);
        Some(
            self.core
                .earliest_deadline()
                .map_or(check, |deadline| deadline.min(check)),
        )
    }

    /// Whether somebody drives the queue.
    pub(crate) fn has_reaper(&self) -> bool {
        !matches!(self.reaper, ReaperSeat::Empty)
    }

    /// Takes the reaper's seat if it is empty.
    pub(crate) fn claim_reaper(&mut self) -> Option<Term> {
        if self.has_reaper() {
            return None;
        }
        self.reaper = ReaperSeat::Awake;
        self.term.0 += 1;
        Some(self.term)
    }

    /// Ends the term of the reaper, if there is one, and wakes it so that it notices.
    pub(crate) fn dismiss_reaper(&mut self, aftermath: &mut Aftermath) {
        self.wake_reaper(aftermath);
        self.reaper = ReaperSeat::Empty;
        self.term.0 += 1;
    }

    /// Whether the reaper of `term` has the seat.
    pub(crate) fn is_seated(&self, term: Term) -> bool {
        self.term == term && self.has_reaper()
    }

    /// Whether an adaptive queue should poll on.
    pub(crate) fn window_open(&mut self, now: Instant) -> bool {
        let length = self.window.length();
        if length.is_zero() {
            self.window.slept();
            return false;
        }
        let open = now.saturating_duration_since(self.last_progress) < length;
        if !open {
            self.window.miss();
        }
        open
    }

    /// Leaves the queue without a reaper and wakes all who wait, so that one of them provides the
    /// next one.
    pub(crate) fn vacate(&mut self, term: Term, aftermath: &mut Aftermath) {
        if !self.is_seated(term) {
            return;
        }
        self.wake_reaper(aftermath);
        self.reaper = ReaperSeat::Empty;
        for (_, operation) in &mut self.operations {
            if !matches!(operation.stage, Stage::Done(_)) {
                aftermath.wakers.push(operation.take_waker());
            }
        }
        for (_, draining) in &mut self.drains {
            aftermath.wakers.extend(draining.waker.take());
        }
    }

    /// Wakes the reaper if it sleeps.
    pub(crate) fn wake_reaper(&mut self, aftermath: &mut Aftermath) {
        if let ReaperSeat::Asleep { .. } = self.reaper
            && let ReaperSeat::Asleep { waker, .. } =
                std::mem::replace(&mut self.reaper, ReaperSeat::Awake)
        {
            aftermath.wakers.push(waker);
        }
    }

    /// Wakes the reaper if a submission needs it: to poll, to look in time, or to ring the doorbell.
    pub(super) fn rouse_reaper(&mut self, was_idle: bool, aftermath: &mut Aftermath) {
        let ReaperSeat::Asleep { next_look, .. } = self.reaper else {
            return;
        };
        let polls = match self.settings.mode {
            PollMode::Adaptive => was_idle && !self.window.length().is_zero(),
            PollMode::Interrupt => false,
            PollMode::Busy => true,
        };
        let looks_in_time = match (next_look, self.core.earliest_deadline()) {
            (None, _) => !self.is_watched(),
            (Some(next_look), Some(deadline)) => next_look <= deadline,
            (Some(_), None) => true,
        };
        if polls || !looks_in_time || self.core.has_deferred() {
            self.wake_reaper(aftermath);
        }
    }
}
