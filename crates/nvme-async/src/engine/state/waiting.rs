//! Commands that wait: for a slot, for the end of a recovery, or for their next attempt.

use std::time::Instant;

use super::operation::Operation;
use super::{Aftermath, Failure, State};

impl State {
    /// Puts commands whose next attempt is due first in line, and submits what there are slots for.
    pub(super) fn send_delayed(&mut self, now: Instant, aftermath: &mut Aftermath) {
        if !self.delayed.is_empty() {
            let due = self.delayed.extract_if(.., |(due, _)| *due <= now);
            let due: Vec<usize> = due.map(|(_, key)| key).collect();
            for key in due.into_iter().rev() {
                self.backlog.push_front(key);
            }
        }
        self.refill(now, aftermath);
    }

    /// Submits what waits and has a slot. The doorbell is left to the reaper.
    pub(super) fn refill(&mut self, now: Instant, aftermath: &mut Aftermath) {
        self.expire_waiting(now, aftermath);
        while let Some(&key) = self.backlog.front()
            && self.operations[key].submit(key, &mut self.core, now)
        {
            self.backlog.pop_front();
        }
    }

    /// Commands that have been submitted before and wait for a slot again: the first in line.
    pub(super) fn waiting_again(&self) -> impl Iterator<Item = &Operation> {
        let waiting = self.backlog.iter().map(|&key| &self.operations[key]);
        waiting.take_while(|operation| operation.since.is_some())
    }

    /// Resolves commands that wait for a slot again, and whose time is over. The device does not
    /// have them.
    fn expire_waiting(&mut self, now: Instant, aftermath: &mut Aftermath) {
        let is_late = |operation: &Operation| {
            operation.since.is_some()
                && operation
                    .deadline(now)
                    .is_some_and(|deadline| deadline <= now)
        };
        if !self.waiting_again().any(is_late) {
            return;
        }
        self.backlog.retain(|&key| {
            let operation = &mut self.operations[key];
            let late = is_late(operation);
            if late {
                let after = operation.age(now);
                let failed = Failure::TimedOut { after }.told(operation.attempts > 0);
                operation.resolve(Err(failed), aftermath);
            }
            !late
        });
        self.wake_drains(aftermath);
    }
}
