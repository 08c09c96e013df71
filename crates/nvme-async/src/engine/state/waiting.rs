//! Commands that wait: for a slot, for the end of a recovery, or for their next attempt.

use std::time::Instant;

use super::{Aftermath, Class, Core, Failure, Flight, InFlight, QueueCounters, Stage, State};

impl State {
    /// Puts commands whose next attempt is due first in line, and submits what there are slots for.
    pub(super) fn send_delayed(&mut self, now: Instant, aftermath: &mut Aftermath) {
        if !self.delayed.is_empty() {
            let due = self.delayed.extract_if(.., |(due, _)| *due <= now);
            let due: Vec<Flight> = due.map(|(_, flight)| flight).collect();
            for flight in due.into_iter().rev() {
                self.backlog.push_front(flight);
            }
        }
        self.refill(now, aftermath);
    }

    pub(super) fn refill(&mut self, now: Instant, aftermath: &mut Aftermath) {
        self.expire_waiting(now, aftermath);
        while let Some(flight) = self.backlog.pop_front() {
            let key = flight.key;
            match submit(&mut self.core, flight, now, &mut self.counters) {
                Ok(slot) => self.operations[key].stage = Stage::Submitted { slot },
                Err(flight) => {
                    self.backlog.push_front(flight);
                    break;
                }
            }
        }
        self.counters.doorbell_writes += u64::from(self.core.ring_deferred());
    }

    /// Commands that have been submitted before and wait for a slot again: the first in line.
    pub(super) fn waiting_again(&self) -> impl Iterator<Item = &Flight> {
        let mut backlog = self.backlog.iter();
        std::iter::from_fn(move || backlog.next().filter(|flight| flight.since.is_some()))
    }

    /// Resolves commands that wait for a slot again, and whose time is over. The device does not
    /// have them.
    fn expire_waiting(&mut self, now: Instant, aftermath: &mut Aftermath) {
        let is_late =
            |flight: &Flight| flight.deadline(now).is_some_and(|deadline| deadline <= now);
        if !self.waiting_again().any(is_late) {
            return;
        }
        let count = self.waiting_again().count();
        let others = self.backlog.split_off(count);
        for flight in std::mem::replace(&mut self.backlog, others)
            .into_iter()
            .rev()
        {
            if !is_late(&flight) {
                self.backlog.push_front(flight);
                continue;
            }
            let after = flight.age(now);
            let failed = Failure::TimedOut { after }.told(flight.attempts > 0);
            let outcome = (Err(failed), Some(flight.command.holdings));
            self.operations[flight.key].resolve(outcome, aftermath);
        }
        self.wake_drains(aftermath);
    }
}

/// Submits a command, or gives it back if all slots are taken or the queue pair is fenced.
pub(super) fn submit(
    core: &mut Core,
    mut flight: Flight,
    now: Instant,
    counters: &mut QueueCounters,
) -> Result<u16, Flight> {
    let before = flight.since;
    flight.since = Some(before.unwrap_or(now));
    let deadline = flight.deadline(now);
    let sqe = flight.command.sqe;
    let token = InFlight::Operation(flight);
    match core.submit(sqe, token, Class::Foreground, now, deadline) {
        Ok(slot) => {
            // It has rung the doorbell if it left nothing to the reaper.
            counters.doorbell_writes += u64::from(!core.has_deferred());
            Ok(slot)
        }
        Err(InFlight::Operation(mut flight)) => {
            flight.since = before;
            Err(flight)
        }
        Err(InFlight::AsyncEvent | InFlight::Step(_)) => {
            unreachable!("the queue core gives back what it was given")
        }
    }
}
