//! Operations: commands that somebody may wait for, and what became of them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::Waker;
use std::time::{Duration, Instant};

use iova::Mapped;
use nvme_spec::{Cqe, Sqe};
use slab::Slab;
use smallvec::SmallVec;

use super::{Core, REAP_BATCH, State};
use crate::Fate;
use crate::io::Holdings;
use crate::queue::Lie;
use crate::recovery::ResetCause;

/// Why a command has no completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The deadline passed.
    TimedOut {
        /// Since it was first submitted.
        after: Duration,
    },
    /// The device broke the protocol, and nobody could do anything about it.
    Lie(Lie),
    /// Its queue pair was created anew, or the controller was reset.
    Reset(ResetCause),
    /// Recovery is under way, and the controller was opened so that commands don't wait for it.
    Recovering,
    /// The controller could not be made to work again.
    ControllerFailed { csts: u32 },
    /// The device is gone.
    Removed,
    /// The controller was shut down.
    Closed,
    /// Nothing drives the queue, and the future was polled outside of a Tokio runtime.
    RuntimeGone,
    /// The current runtime lacks its I/O or time driver.
    NoDriver,
    /// A thread-local queue is used outside of a `LocalSet` or `LocalRuntime`.
    NotLocal,
}

/// A command without a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    pub(crate) failure: Failure,
    pub(crate) fate: Fate,
}

impl From<Failure> for Failed {
    /// For a command that was not submitted.
    fn from(failure: Failure) -> Self {
        Self {
            failure,
            fate: Fate::NotExecuted,
        }
    }
}

impl Failure {
    /// For a command that the device was told of, or not.
    pub(crate) fn told(self, told: bool) -> Failed {
        Failed {
            failure: self,
            fate: if told {
                Fate::Unknown
            } else {
                Fate::NotExecuted
            },
        }
    }
}

/// A command that is to be submitted, and what it needs until it is done.
pub(crate) struct Command {
    pub(crate) sqe: Sqe,
    pub(crate) holdings: Holdings,
    /// How long it may take, repeats included.
    pub(crate) timeout: Option<Duration>,
    /// Whether it may be sent again although the device may have executed it.
    pub(crate) repeatable: bool,
}

/// A command that was accepted. It stays in its place, with what it takes to send it again and with
/// the memory that the device uses, until its outcome was taken and no slot refers to it.
pub(super) struct Operation {
    pub(super) command: Command,
    /// The order in which commands were accepted.
    pub(super) ticket: u64,
    /// When it was first submitted.
    pub(super) since: Option<Instant>,
    /// How often the device was told of it and did not do it.
    pub(super) attempts: u32,
    pub(super) stage: Stage,
    /// Does nothing where nobody is to be woken.
    pub(super) waker: Waker,
}

#[derive(Clone, Copy)]
pub(super) enum Stage {
    /// It waits for a slot, for the end of a recovery, or for its next attempt.
    Queued,
    /// A slot refers to it, and its future waits.
    Submitted,
    /// A slot refers to it, and its future is to be told that it failed. The device may still use its
    /// memory.
    GivenUp(Failed),
    /// A slot refers to it, and its future is gone.
    Orphaned,
    /// The device is done with it, or never had it.
    Done(Result<Cqe, Failed>),
}

/// What became of a command. The holdings are missing where the device may still be working on it.
pub(crate) type Outcome = (Result<Cqe, Failed>, Option<Holdings>);

impl Operation {
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let timeout = self.command.timeout?;
        self.since.unwrap_or(now).checked_add(timeout)
    }

    pub(super) fn age(&self, now: Instant) -> Duration {
        self.since
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// Whether it may be sent once more, after the device was told of it.
    pub(super) fn may_repeat(&self, retries: u32, now: Instant) -> bool {
        self.command.repeatable
            && self.attempts < retries
            && self.deadline(now).is_none_or(|deadline| now < deadline)
    }

    /// Whether its future waits for what becomes of it.
    pub(super) fn is_awaited(&self) -> bool {
        matches!(self.stage, Stage::Queued | Stage::Submitted)
    }

    /// Records what became of it, and that the device does not have it.
    pub(super) fn resolve(&mut self, result: Result<Cqe, Failed>, aftermath: &mut Aftermath) {
        let mapped = &mut self.command.holdings.mapped;
        if !mapped.is_empty() {
            aftermath.mapped.extend(mapped.drain(..));
        }
        self.stage = Stage::Done(result);
        self.wake(aftermath);
    }

    /// Tells its future, if that still waits, that it failed. The device may go on with it.
    pub(super) fn give_up(&mut self, failed: Failed, aftermath: &mut Aftermath) {
        if self.is_awaited() {
            self.stage = Stage::GivenUp(failed);
            self.wake(aftermath);
        }
    }

    pub(super) fn wake(&mut self, aftermath: &mut Aftermath) {
        aftermath.wakers.push(self.take_waker());
    }

    pub(super) fn take_waker(&mut self) -> Waker {
        std::mem::replace(&mut self.waker, Waker::noop().clone())
    }
}

impl State {
    /// The outcome of an operation, which is over then, if it has one.
    pub(crate) fn take_outcome(&mut self, key: usize) -> Option<Outcome> {
        let operation = &mut self.operations[key];
        match operation.stage {
            Stage::Done(result) => {
                let holdings = self.operations.remove(key).command.holdings;
                Some((result, Some(holdings)))
            }
            Stage::GivenUp(failed) => {
                operation.stage = Stage::Orphaned;
                Some((Err(failed), None))
            }
            Stage::Queued | Stage::Submitted | Stage::Orphaned => None,
        }
    }

    /// Whether the task of `waker` is woken when the operation has an outcome. If it is not, it
    /// will be from the next call on with a clone of it in `fresh`, where the old one is left.
    pub(crate) fn will_wake(
        &mut self,
        key: usize,
        waker: &Waker,
        fresh: &mut Option<Waker>,
    ) -> bool {
        let operation = &mut self.operations[key];
        if operation.waker.will_wake(waker) {
            return true;
        }
        match fresh {
            Some(fresh) => {
                std::mem::swap(&mut operation.waker, fresh);
                true
            }
            None => false,
        }
    }

    /// Forgets an operation whose future was dropped, once no slot refers to it any more.
    pub(crate) fn abandon(&mut self, key: usize, aftermath: &mut Aftermath) {
        let operation = &mut self.operations[key];
        aftermath.unused.push(operation.take_waker());
        match operation.stage {
            Stage::Submitted | Stage::GivenUp(_) | Stage::Orphaned => {
                operation.stage = Stage::Orphaned;
                return;
            }
            Stage::Queued => {
                self.backlog.retain(|&queued| queued != key);
                self.delayed.retain(|&(_, delayed)| delayed != key);
            }
            Stage::Done(_) => {}
        }
        let operation = self.operations.remove(key);
        aftermath.garbage.push(operation.command.holdings);
        self.wake_drains(aftermath);
    }

    /// Ends an operation that no slot refers to any more, with `result` if its future waits for one.
    pub(super) fn settle(
        &mut self,
        key: usize,
        result: Result<Cqe, Failed>,
        aftermath: &mut Aftermath,
    ) {
        let operation = &mut self.operations[key];
        match operation.stage {
            Stage::Orphaned => {
                let operation = self.operations.remove(key);
                aftermath.garbage.push(operation.command.holdings);
            }
            // Its future is to be told what it was woken for, but gets its memory back after all.
            Stage::GivenUp(failed) => operation.resolve(Err(failed), aftermath),
            Stage::Queued | Stage::Submitted | Stage::Done(_) => {
                operation.resolve(result, aftermath);
            }
        }
    }

    /// Resolves an overdue operation that nobody can do anything about. Its slot stays taken.
    pub(super) fn give_up(&mut self, slot: u16, now: Instant, aftermath: &mut Aftermath) {
        if let Some(&Token::Operation(key)) = self.core.give_up(slot) {
            let operation = &mut self.operations[key];
            let after = operation.age(now);
            operation.give_up(Failure::TimedOut { after }.told(true), aftermath);
        }
    }
}

/// Whose a command in a slot is.
#[derive(Clone, Copy)]
pub(crate) enum Token {
    /// The operation with this key.
    Operation(usize),
    AsyncEvent,
    /// An admin command of a recovery.
    Step(u32),
}

/// What is left of a queue pair after its end, for futures: the outcomes that they have not taken yet.
#[derive(Default)]
pub(crate) struct Outcomes(pub(super) Slab<Outcome>);

impl Outcomes {
    /// The outcome of an operation that has not taken it yet.
    pub(crate) fn take(&mut self, key: usize) -> Option<Outcome> {
        self.0.try_remove(key)
    }
}

/// What is left of a queue pair after its end, for the device, if that has not stopped: what it may
/// still use.
pub(crate) struct Remains {
    pub(super) _rings: Core,
    pub(super) _holdings: Vec<Holdings>,
}

/// What is to be done once the state is not borrowed any more: wakers run arbitrary code, and so
/// does dropping them, or memory that others gave us.
#[derive(Default)]
pub(crate) struct Aftermath {
    pub(super) wakers: SmallVec<[Waker; REAP_BATCH]>,
    /// Mappings of commands that are done, which others may be waiting for: they do not wait until
    /// somebody takes the outcome.
    pub(super) mapped: SmallVec<[Mapped; 4]>,
    pub(super) garbage: Vec<Holdings>,
    pub(super) unused: SmallVec<[Waker; 1]>,
}

impl Aftermath {
    /// Whoever is to be woken is, also if the waker of another panics.
    pub(crate) fn run(mut self) {
        // Where they are: there is room for many.
        let mut wakers = Wakers(self.wakers.drain(..));
        for waker in &mut wakers.0 {
            waker.wake();
        }
    }
}

struct Wakers<'a>(smallvec::Drain<'a, [Waker; REAP_BATCH]>);

impl Drop for Wakers<'_> {
    fn drop(&mut self) {
        // Some are left only if one has panicked; a second panic would end the process.
        for waker in &mut self.0 {
            let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
        }
    }
}
