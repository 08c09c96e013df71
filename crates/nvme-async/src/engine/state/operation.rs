//! Operations: commands that somebody may wait for, and what became of them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::Waker;
use std::time::{Duration, Instant};

use iova::Mapped;
use nvme_spec::{Cqe, Sqe};
use slab::Slab;
use smallvec::SmallVec;

use super::REAP_BATCH;
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

/// A command that was accepted, with what it takes to send it, or to send it again.
pub(crate) struct Flight {
    pub(super) key: usize,
    /// The order in which commands were accepted.
    pub(super) ticket: u64,
    pub(super) command: Command,
    /// When it was first submitted.
    pub(super) since: Option<Instant>,
    /// How often the device was told of it and did not do it.
    pub(super) attempts: u32,
}

impl Flight {
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
}

/// What a slot holds.
pub(crate) enum InFlight {
    Operation(Flight),
    AsyncEvent,
    /// An admin command of a recovery.
    Step(u32),
}

/// What became of a command. The holdings are gone with a command that the device may still be
/// working on.
pub(crate) type Outcome = (Result<Cqe, Failed>, Option<Holdings>);

pub(super) struct Operation {
    pub(super) waker: Waker,
    pub(super) stage: Stage,
}

pub(super) enum Stage {
    /// It waits for a slot, for the end of a recovery, or for its next attempt.
    Queued,
    Submitted {
        slot: u16,
    },
    Done(Outcome),
}

impl Operation {
    pub(super) fn resolve(&mut self, mut outcome: Outcome, aftermath: &mut Aftermath) {
        if let Some(holdings) = &mut outcome.1
            && !holdings.mapped.is_empty()
        {
            aftermath.mapped.extend(holdings.mapped.drain(..));
        }
        self.stage = Stage::Done(outcome);
        aftermath.wakers.push(self.take_waker());
    }

    pub(super) fn take_waker(&mut self) -> Waker {
        std::mem::replace(&mut self.waker, Waker::noop().clone())
    }
}

/// What is left of a queue pair after its end: outcomes that their futures have not taken yet.
#[derive(Default)]
pub(crate) struct Outcomes {
    pub(super) operations: Slab<Operation>,
}

impl Outcomes {
    /// The outcome of an operation that has not taken it yet.
    pub(crate) fn take(&mut self, key: usize) -> Option<Outcome> {
        match self.operations.try_remove(key)?.stage {
            Stage::Done(outcome) => Some(outcome),
            Stage::Queued | Stage::Submitted { .. } => None,
        }
    }
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
    pub(crate) fn run(self) {
        let mut wakers = Wakers(self.wakers.into_iter());
        for waker in &mut wakers.0 {
            waker.wake();
        }
    }
}

struct Wakers(smallvec::IntoIter<[Waker; REAP_BATCH]>);

impl Drop for Wakers {
    fn drop(&mut self) {
        // Some are left only if one has panicked; a second panic would end the process.
        for waker in &mut self.0 {
            let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
        }
    }
}
