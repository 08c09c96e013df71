//! What recovery does to a queue pair.

use std::sync::Arc;
use std::time::Instant;

use nvme_spec::Sqe;
use poll_window::Kind;

use super::{Aftermath, Failure, Gate, Look, Outcomes, Remains, Stage, State, Token, Trouble};
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
    pub(crate) fn submit_step(&mut self, id: u32, sqe: Sqe) -> bool {
        let class = Class::Foreground(Kind::Other);
        let submitted = self
            .core
            .submit(&sqe, Token::Step(id), class, None)
            .is_some();
        if submitted {
            self.ring_deferred();
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
        for key in again.into_iter().rev() {
            self.operations[key].stage = Stage::Queued;
            self.backlog.push_front(key);
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
        self.set_mask(false);
        self.last_progress = now;
        self.refill(now, aftermath);
        self.ring_deferred();
        self.wake_reapers(aftermath);
    }

    /// Fails everything that is waited for, and everything that comes.
    ///
    /// With the device known to have `stopped`, memory comes back with the outcomes; otherwise that
    /// which it may still use stays where it is.
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
        for Reclaimed { token, told, .. } in reclaimed {
            if let Token::Operation(key) = token {
                let told = told || self.operations[key].attempts > 0;
                self.settle(key, Err(failure.told(told)), aftermath);
            }
        }
        for operation in self.operations.iter_mut() {
            match operation.stage {
                Stage::Queued => {
                    let told = operation.attempts > 0;
                    operation.resolve(Err(failure.told(told)), aftermath);
                }
                // There are some only if the device has not stopped.
                Stage::Submitted => operation.give_up(failure.told(true), aftermath),
                Stage::GivenUp(_) | Stage::Orphaned | Stage::Done(_) | Stage::Over => {}
            }
        }
        self.backlog.clear();
        self.delayed.clear();
        self.wake_drains(aftermath);
        self.wake_reapers(aftermath);
    }

    /// Ends the queue pair: fails what is still waited for, and separates the outcomes from what the
    /// device may still use.
    pub(crate) fn end(mut self, stopped: bool, aftermath: &mut Aftermath) -> (Outcomes, Remains) {
        self.fail(Failure::Closed, stopped, aftermath);
        self.dismiss_reapers(aftermath);
        let operations = self.operations.iter_mut();
        let in_use = operations
            .filter(|operation| matches!(operation.stage, Stage::GivenUp(_) | Stage::Orphaned))
            .map(|operation| std::mem::take(&mut operation.holdings));
        let remains = Remains {
            _holdings: in_use.collect(),
            _rings: self.core,
        };
        (Outcomes(self.operations), remains)
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

    /// What becomes of a command that was taken back: the key of its operation, if it is to be sent
    /// again.
    fn take_back(
        &mut self,
        reclaimed: Reclaimed<Token>,
        cause: ResetCause,
        now: Instant,
        aftermath: &mut Aftermath,
    ) -> Option<usize> {
        let Reclaimed {
            token,
            overdue,
            told,
        } = reclaimed;
        let Token::Operation(key) = token else {
            return None;
        };
        let operation = &mut self.operations[key];
        if operation.is_awaited() && !overdue {
            if !told {
                return Some(key);
            }
            if operation.may_repeat(self.settings.retries, now) {
                operation.attempts += 1;
                self.counters.retries += 1;
                return Some(key);
            }
        }
        let failure = match overdue {
            true => Failure::TimedOut {
                after: operation.age(now),
            },
            false => Failure::Reset(cause),
        };
        let told = told || operation.attempts > 0;
        self.settle(key, Err(failure.told(told)), aftermath);
        None
    }
}
