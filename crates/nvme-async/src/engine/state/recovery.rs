//! What recovery does to a queue pair.

use std::sync::Arc;
use std::time::Instant;

use nvme_spec::Sqe;

use super::{
    Aftermath, Core, Failure, Flight, Gate, InFlight, Look, Outcomes, Stage, State, Trouble,
};
use crate::engine::trouble::Inbox;
use crate::queue::{Class, Lie, Reclaimed};
use crate::recovery::ResetCause;

impl State {
    /// Sets who deals with what goes wrong; without anybody, commands are given up when their
    /// deadline has passed, and the queue pair when the device breaks the protocol.
    pub(crate) fn supervise(&mut self, supervisor: Arc<Inbox>) {
        self.supervisor = Some(supervisor);
    }

    /// There is nobody any more who deals with what goes wrong. A queue pair that waits for that, fails.
    pub(crate) fn forsake(&mut self, aftermath: &mut Aftermath) {
        self.supervisor = None;
        if self.gate != Gate::Open {
            self.fail(Failure::Closed, false, aftermath);
        }
    }

    /// Whether the command with this identifier is overdue and outstanding.
    pub(crate) fn is_overdue(&self, cid: u16) -> bool {
        self.core.is_overdue(cid)
    }

    /// Submits an admin command of a recovery; returns whether there was a slot.
    pub(crate) fn submit_step(&mut self, id: u32, sqe: Sqe, now: Instant) -> bool {
        let class = Class::Foreground;
        let submitted = self
            .core
            .submit(sqe, InFlight::Step(id), class, now, None)
            .is_ok();
        if submitted {
            self.counters.doorbell_writes += u64::from(self.core.ring_deferred());
        }
        submitted
    }

    /// Forbids all doorbells. Completions are still taken, and new commands wait.
    pub(crate) fn fence(&mut self) {
        self.core.fence();
        if self.gate == Gate::Open {
            self.gate = Gate::Fenced;
        }
    }

    /// The device works for this queue pair no more: takes all commands back, and empties the rings.
    ///
    /// What was completed before is. Of the others those wait for the next attempt that may be sent
    /// again, or that the device was never told of; the rest fails.
    pub(crate) fn release(&mut self, cause: ResetCause, now: Instant, aftermath: &mut Aftermath) {
        debug_assert!(self.core.is_fenced());
        // If the device was caught lying, it may be about any completion after the one.
        while self.gate == Gate::Fenced && self.reap(Look::Polled, now, aftermath) > 0 {}
        self.gate = Gate::Stopped;
        let mut again = Vec::new();
        for reclaimed in self.core.reclaim() {
            again.extend(self.take_back(reclaimed, cause, now, aftermath));
        }
        for flight in again.into_iter().rev() {
            self.operations[flight.key].stage = Stage::Queued;
            self.backlog.push_front(flight);
        }
        self.core.restart();
        self.wake_drains(aftermath);
    }

    /// The device knows the empty rings: lets the queue pair work again.
    pub(crate) fn resume(&mut self, now: Instant, aftermath: &mut Aftermath) {
        if self.failure.is_some() {
            return;
        }
        self.core.unfence();
        self.gate = Gate::Open;
        self.last_progress = now;
        self.refill(now, aftermath);
        self.wake_reapers(aftermath);
    }

    /// Fails everything that is waited for, and everything that comes.
    ///
    /// With the device known to have `stopped`, memory comes back with the outcomes; otherwise that
    /// which it may still use stays in its slots.
    pub(crate) fn fail(&mut self, failure: Failure, stopped: bool, aftermath: &mut Aftermath) {
        if self.failure.is_some() {
            return;
        }
        self.failure = Some(failure);
        let reclaimed = if stopped {
            self.core.fence();
            self.core.reclaim()
        } else {
            self.core.reclaim_untold()
        };
        for Reclaimed {
            token,
            awaited,
            told,
            ..
        } in reclaimed
        {
            let InFlight::Operation(flight) = token else {
                continue;
            };
            let (key, told) = (flight.key, told || flight.attempts > 0);
            let holdings = flight.command.holdings;
            if awaited {
                let outcome = (Err(failure.told(told)), Some(holdings));
                self.operations[key].resolve(outcome, aftermath);
            } else {
                aftermath.garbage.push(holdings);
            }
        }
        // There are some only if the device has not stopped.
        for (_, operation) in &mut self.operations {
            if let Stage::Submitted { slot } = operation.stage {
                self.core.orphan(slot);
                operation.resolve((Err(failure.told(true)), None), aftermath);
            }
        }
        let delayed = std::mem::take(&mut self.delayed);
        let waiting = std::mem::take(&mut self.backlog);
        for flight in waiting
            .into_iter()
            .chain(delayed.into_iter().map(|(_, flight)| flight))
        {
            let outcome = Err(failure.told(flight.attempts > 0));
            let holdings = Some(flight.command.holdings);
            self.operations[flight.key].resolve((outcome, holdings), aftermath);
        }
        self.wake_drains(aftermath);
        self.wake_reapers(aftermath);
    }

    /// Ends the queue pair: fails what is still waited for, and separates the outcomes from what the
    /// device may still use.
    pub(crate) fn end(mut self, stopped: bool, aftermath: &mut Aftermath) -> (Outcomes, Core) {
        self.fail(Failure::Closed, stopped, aftermath);
        self.dismiss_reapers(aftermath);
        let outcomes = Outcomes {
            operations: self.operations,
        };
        (outcomes, self.core)
    }

    /// The device broke the protocol: believes nothing any more.
    pub(super) fn distrust(&mut self, lie: Lie, aftermath: &mut Aftermath) {
        match &self.supervisor {
            Some(supervisor) => {
                self.core.fence();
                self.gate = Gate::Distrusted;
                let queue = self.core.id();
                supervisor.report(Trouble::Lie { queue, lie });
            }
            None => self.fail(Failure::Lie(lie), false, aftermath),
        }
    }

    /// What becomes of a command that was taken back: it, if it is to be sent again.
    fn take_back(
        &mut self,
        reclaimed: Reclaimed<InFlight>,
        cause: ResetCause,
        now: Instant,
        aftermath: &mut Aftermath,
    ) -> Option<Flight> {
        let Reclaimed {
            token,
            awaited,
            overdue,
            told,
            ..
        } = reclaimed;
        let InFlight::Operation(mut flight) = token else {
            return None;
        };
        if !awaited {
            aftermath.garbage.push(flight.command.holdings);
            return None;
        }
        let failure = if overdue {
            let after = flight.age(now);
            Failure::TimedOut { after }
        } else if !told {
            return Some(flight);
        } else if flight.may_repeat(self.settings.retries, now) {
            flight.attempts += 1;
            self.counters.retries += 1;
            return Some(flight);
        } else {
            Failure::Reset(cause)
        };
        let outcome = Err(failure.told(told || flight.attempts > 0));
        let holdings = Some(flight.command.holdings);
        self.operations[flight.key].resolve((outcome, holdings), aftermath);
        None
    }
}
