//! Operations: commands that somebody may wait for, and what became of them.

use std::ops::{Index, IndexMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::Waker;
use std::time::{Duration, Instant};

use iova::Mapped;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Cqe, Sqe};
use poll_window::Kind;
use smallvec::SmallVec;

use super::{Class, Core, REAP_BATCH, State};
use crate::Fate;
use crate::io::{Holdings, HoldingsMut};
use crate::queue::Lie;
use crate::rare::Rare;
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

/// A command that is to be submitted.
#[derive(Clone, Copy, Default)]
pub(crate) struct Command {
    pub(crate) sqe: Sqe,
    /// How long it may take, repeats included.
    pub(crate) timeout: Option<Duration>,
    /// Whether it may be sent again although the device may have executed it.
    pub(crate) repeatable: bool,
}

impl Command {
    /// What the time that an I/O command takes depends on.
    pub(crate) fn kind(&self) -> Kind {
        match NvmOpcode(self.sqe.opcode()) {
            NvmOpcode::READ | NvmOpcode::COMPARE | NvmOpcode::VERIFY => Kind::Read,
            NvmOpcode::WRITE => Kind::Write,
            _ => Kind::Other,
        }
    }
}

/// A command that was accepted, with what it takes to send it again and with the memory that the
/// device uses, until its outcome was taken and no slot refers to it.
pub(super) struct Operation {
    pub(super) command: Command,
    pub(super) holdings: Holdings,
    /// The order in which commands were accepted.
    pub(super) ticket: u64,
    /// When it was first submitted.
    pub(super) since: Option<Instant>,
    /// How often the device was told of it and did not do it.
    pub(super) attempts: u32,
    pub(super) stage: Stage,
    /// Nothing where nobody is to be woken.
    pub(super) waker: Option<Waker>,
}

#[derive(Clone, Copy)]
pub(super) enum Stage {
    /// There is none: its place is free. It holds nothing.
    Over,
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
    Done(Outcome),
}

/// What became of a command.
pub(crate) type Outcome = Result<Cqe, Failed>;

impl Operation {
    fn new() -> Self {
        Self {
            command: Command::default(),
            holdings: Holdings::default(),
            ticket: 0,
            since: None,
            attempts: 0,
            stage: Stage::Over,
            waker: None,
        }
    }

    /// Takes the place of one that is over, with what the command needs. Nothing is left there.
    pub(super) fn accept(&mut self, command: &Command, holdings: HoldingsMut<'_>, ticket: u64) {
        self.command = *command;
        holdings.swap(&mut self.holdings);
        self.ticket = ticket;
        self.since = None;
        self.attempts = 0;
        self.stage = Stage::Queued;
    }

    /// Submits it, if there is a slot and the queue pair not fenced; returns whether that was so.
    #[inline(always)]
    pub(super) fn submit(&mut self, key: usize, core: &mut Core, now: Instant) -> bool {
        let class = Class::Foreground(self.command.kind());
        let (sqe, deadline) = (&self.command.sqe, self.deadline(now));
        let submitted = core.submit(sqe, Token::Operation(key), class, deadline);
        if submitted.is_some() {
            self.since.get_or_insert(now);
            self.stage = Stage::Submitted;
        }
        submitted.is_some()
    }

    #[inline]
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
    #[inline(always)]
    pub(super) fn resolve(&mut self, outcome: Outcome, aftermath: &mut Aftermath) {
        if let Some(reach) = &mut self.holdings.reach {
            aftermath.unmap(&mut reach.mapped);
        }
        self.stage = Stage::Done(outcome);
        self.wake(aftermath);
    }

    /// Tells its future, if that still waits, that it failed. The device may go on with it.
    pub(super) fn give_up(&mut self, failed: Failed, aftermath: &mut Aftermath) {
        if self.is_awaited() {
            self.stage = Stage::GivenUp(failed);
            self.wake(aftermath);
        }
    }

    #[inline]
    pub(super) fn wake(&mut self, aftermath: &mut Aftermath) {
        if let Some(waker) = self.waker.take() {
            aftermath.wake(waker);
        }
    }
}

/// Operations by key. Each stays in its place, and what goes in or out is swapped with what is there:
/// a command is large, and its moves would cost more than all else that is done for it here.
#[derive(Default)]
pub(super) struct Operations {
    places: Vec<Operation>,
    /// Keys of those that are over.
    free: Vec<usize>,
}

impl Operations {
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self {
            places: Vec::with_capacity(capacity),
            free: Vec::with_capacity(capacity),
        }
    }

    /// The key of a free place.
    pub(super) fn claim(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.places.push(Operation::new());
            self.places.len() - 1
        })
    }

    /// Ends an operation, whose key may be used again then; returns what it still holds.
    pub(super) fn end(&mut self, key: usize) -> Holdings {
        let operation = &mut self.places[key];
        operation.stage = Stage::Over;
        self.free.push(key);
        std::mem::take(&mut operation.holdings)
    }

    /// The outcome of an operation, if it has one. What it held is swapped with `holdings`, which are
    /// empty, unless the device may still use it.
    #[inline]
    pub(super) fn take_outcome<T: From<Outcome>>(
        &mut self,
        key: usize,
        holdings: HoldingsMut<'_>,
    ) -> Option<T> {
        let operation = &mut self.places[key];
        if let Stage::Done(outcome) = operation.stage {
            let outcome = outcome.into();
            holdings.swap(&mut operation.holdings);
            operation.stage = Stage::Over;
            self.free.push(key);
            return Some(outcome);
        }
        let Stage::GivenUp(failed) = operation.stage else {
            return None;
        };
        operation.stage = Stage::Orphaned;
        Some(Outcome::Err(failed).into())
    }

    /// All places, those that are free too.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Operation> {
        self.places.iter()
    }

    /// All places, those that are free too.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Operation> {
        self.places.iter_mut()
    }
}

impl Index<usize> for Operations {
    type Output = Operation;

    fn index(&self, key: usize) -> &Operation {
        &self.places[key]
    }
}

impl IndexMut<usize> for Operations {
    fn index_mut(&mut self, key: usize) -> &mut Operation {
        &mut self.places[key]
    }
}

impl State {
    /// The outcome of an operation, which is over then, if it has one. What it held comes back in
    /// `holdings`, which are empty, unless the device may still use it.
    #[inline]
    pub(crate) fn take_outcome<T: From<Outcome>>(
        &mut self,
        key: usize,
        holdings: HoldingsMut<'_>,
    ) -> Option<T> {
        self.operations.take_outcome(key, holdings)
    }

    /// Whether the task of `waker` is woken when the operation has an outcome. If it is not, it
    /// will be from the next call on with a clone of it in `fresh`, where the old one is left.
    pub(crate) fn will_wake(
        &mut self,
        key: usize,
        waker: &Waker,
        fresh: &mut Option<Waker>,
    ) -> bool {
        let current = &mut self.operations[key].waker;
        let same = current.as_ref().is_some_and(|it| it.will_wake(waker));
        if !same && fresh.is_some() {
            std::mem::swap(current, fresh);
            return true;
        }
        same
    }

    /// Forgets an operation whose future was dropped, once no slot refers to it any more.
    pub(crate) fn abandon(&mut self, key: usize, aftermath: &mut Aftermath) {
        let operation = &mut self.operations[key];
        if let Some(waker) = operation.waker.take() {
            aftermath.forget(waker);
        }
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
            Stage::Over => return,
        }
        aftermath.free(self.operations.end(key));
        self.wake_drains(aftermath);
    }

    /// Ends an operation that no slot refers to any more, with `outcome` if its future waits for one.
    #[inline(always)]
    pub(super) fn settle(&mut self, key: usize, outcome: Outcome, aftermath: &mut Aftermath) {
        let operation = &mut self.operations[key];
        match operation.is_awaited() {
            true => operation.resolve(outcome, aftermath),
            false => self.settle_unawaited(key, aftermath),
        }
    }

    #[cold]
    fn settle_unawaited(&mut self, key: usize, aftermath: &mut Aftermath) {
        let operation = &mut self.operations[key];
        match operation.stage {
            Stage::Orphaned => aftermath.free(self.operations.end(key)),
            // Its future is to be told what it was woken for, but gets its memory back after all.
            Stage::GivenUp(failed) => operation.resolve(Err(failed), aftermath),
            _ => debug_assert!(false, "no slot refers to it"),
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
pub(crate) struct Outcomes(pub(super) Operations);

impl Outcomes {
    /// The outcome of an operation, and in `holdings` what it held, unless the device may still use
    /// it.
    pub(crate) fn take(&mut self, key: usize, holdings: HoldingsMut<'_>) -> Option<Outcome> {
        // There are none if the queue pair was not ended, but taken away.
        let exists = key < self.0.places.len();
        exists.then(|| self.0.take_outcome(key, holdings)).flatten()
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
///
/// For most submissions that is nothing, which costs next to nothing.
#[derive(Default)]
pub(crate) struct Aftermath {
    contents: Rare<Contents>,
}

#[derive(Default)]
struct Contents {
    wakers: SmallVec<[Waker; REAP_BATCH]>,
    /// Mappings of commands that are done, which others may be waiting for: they do not wait until
    /// somebody takes the outcome.
    mapped: SmallVec<[Mapped; 4]>,
    garbage: Vec<Holdings>,
    unused: SmallVec<[Waker; 1]>,
}

impl Aftermath {
    /// Wakes that task.
    #[inline(always)]
    pub(super) fn wake(&mut self, waker: Waker) {
        self.contents().wakers.push(waker);
    }

    /// Drops a waker that is not needed any more.
    pub(super) fn forget(&mut self, waker: Waker) {
        self.contents().unused.push(waker);
    }

    /// Ends mappings, if there are some.
    #[inline(never)]
    pub(super) fn unmap(&mut self, mapped: &mut SmallVec<[Mapped; 1]>) {
        if !mapped.is_empty() {
            self.contents().mapped.extend(mapped.drain(..));
        }
    }

    /// Frees what a command held.
    pub(super) fn free(&mut self, holdings: Holdings) {
        self.contents().garbage.push(holdings);
    }

    /// Whoever is to be woken is, also if the waker of another panics. Nothing is left afterwards.
    #[inline]
    pub(crate) fn run(&mut self) {
        if let Some(contents) = &mut *self.contents {
            contents.run();
            self.contents.clear();
        }
    }

    #[inline]
    fn contents(&mut self) -> &mut Contents {
        self.contents.get_or_insert_with(Contents::default)
    }
}

impl Contents {
    #[inline(never)]
    fn run(&mut self) {
        // Where they are: with its room for many wakers it is too large to be moved.
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
