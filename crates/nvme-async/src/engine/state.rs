//! What one queue pair holds: its protocol core, and the operations that wait for it.

mod seat;

use std::collections::VecDeque;
use std::task::Waker;
use std::time::{Duration, Instant};

use iova::Mapped;
use nvme_spec::event::AsyncEvent;
use nvme_spec::{Cqe, Sqe};
use slab::Slab;
use smallvec::SmallVec;

pub(crate) use self::seat::{Place, Seat, Term};
use super::window::Window;
use super::{PollMode, QueueSettings};
use crate::device::Doorbell;
use crate::io::Holdings;
use crate::memory::DmaWords;
use crate::queue::{Class, Finished, Lie, QueueCore};

/// So many completions are taken before those who wait for them are woken.
const REAP_BATCH: usize = 32;

/// The protocol core of a queue pair on a device.
pub(crate) type Core = QueueCore<InFlight, DmaWords, Doorbell>;

/// Why a command has no completion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The deadline passed.
    TimedOut {
        /// Since the submission.
        after: Duration,
    },
    /// The device broke the protocol.
    Lie(Lie),
    /// The controller was shut down.
    Closed,
    /// Nothing drives the queue, and the future was polled outside of a Tokio runtime.
    RuntimeGone,
    /// The current runtime lacks its I/O or time driver.
    NoDriver,
    /// A thread-local queue is used outside of a `LocalSet` or `LocalRuntime`.
    NotLocal,
}

/// A command that is to be submitted, and what it needs until it is done.
pub(crate) struct Command {
    pub(crate) sqe: Sqe,
    pub(crate) holdings: Holdings,
    pub(crate) timeout: Option<Duration>,
}

/// How far [`State::start`] got with a command.
pub(crate) enum Progress {
    Done(Outcome),
    Waiting { key: usize },
}

/// Why [`State::start`] did not take a command.
pub(crate) enum Refusal {
    Failed(Failure, Command),
    /// Nobody drives the queue.
    NoReaper(Command),
}

/// What became of a command. The holdings are gone with a command that the device may still be
/// working on.
pub(crate) type Outcome = (Result<Cqe, Failure>, Option<Holdings>);

/// The state of one queue pair.
pub(crate) struct State {
    core: Core,
    operations: Slab<Operation>,
    /// Commands that wait for a slot, oldest first.
    backlog: VecDeque<Waiting>,
    /// Why nothing is accepted any more.
    failure: Option<Failure>,
    /// Whether the controller is being shut down.
    refusing: bool,
    /// Who drives the queue. Where nobody does, the next operation that is polled spawns a reaper.
    pub(crate) seats: SmallVec<[Seat; 1]>,
    last_term: Term,
    pub(crate) window: Window,
    /// When a command was last completed, or submitted to an idle queue.
    last_progress: Instant,
    settings: QueueSettings,
    drains: Slab<Draining>,
    events: Vec<AsyncEvent>,
    pub(crate) counters: QueueCounters,
}

pub(crate) enum InFlight {
    Operation { key: usize, holdings: Holdings },
    AsyncEvent,
}

/// A command that waits for a slot, and the operation that it belongs to.
struct Waiting {
    key: usize,
    command: Command,
    since: Instant,
}

/// Somebody who waits until all commands with lower sequence numbers are done.
struct Draining {
    mark: u64,
    waker: Option<Waker>,
}

struct Operation {
    waker: Waker,
    stage: Stage,
}

enum Stage {
    Queued,
    Submitted { slot: u16 },
    Done(Outcome),
}

/// What is left of a queue pair after its end: outcomes that their futures have not taken yet.
#[derive(Default)]
pub(crate) struct Outcomes {
    operations: Slab<Operation>,
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

/// Events counted by one queue pair since it was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct QueueCounters {
    /// Commands completed.
    pub(crate) completions: u64,
    /// Completions found by looking, without having been told by an interrupt.
    pub(crate) polled_completions: u64,
    /// Doorbell writes, submission and completion queue together.
    pub(crate) doorbell_writes: u64,
    /// Completions that were found waiting although no interrupt had come.
    pub(crate) lost_interrupts: u64,
}

/// What is to be done once the state is not borrowed any more: wakers run arbitrary code, and so
/// does dropping them, or memory that others gave us.
#[derive(Default)]
pub(crate) struct Aftermath {
    wakers: SmallVec<[Waker; REAP_BATCH]>,
    /// Mappings of commands that are done, which others may be waiting for: they do not wait until
    /// somebody takes the outcome.
    mapped: SmallVec<[Mapped; 4]>,
    garbage: Vec<Holdings>,
    unused: SmallVec<[Waker; 1]>,
}

impl Aftermath {
    pub(crate) fn run(self) {
        for waker in self.wakers {
            waker.wake();
        }
    }
}

/// What a look at the completion queue is worth.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// Somebody looked without having been told.
    Polled,
    /// The interrupt told.
    Interrupted,
    /// The check that should find nothing, because an interrupt would have told.
    Check,
}

impl State {
    pub(crate) fn new(core: Core, settings: QueueSettings) -> Self {
        let capacity = core.capacity();
        Self {
            core,
            operations: Slab::with_capacity(capacity),
            backlog: VecDeque::new(),
            failure: None,
            refusing: false,
            seats: SmallVec::new(),
            last_term: Term::default(),
            window: Window::new(settings.max_window),
            last_progress: Instant::now(),
            settings,
            drains: Slab::new(),
            events: Vec::new(),
            counters: QueueCounters::default(),
        }
    }

    /// Submits a command for an operation, or queues it behind those that wait for a slot.
    pub(crate) fn start(
        &mut self,
        command: Command,
        waker: Waker,
        aftermath: &mut Aftermath,
    ) -> Result<Progress, Refusal> {
        let closed = self.refusing.then_some(Failure::Closed);
        if let Some(failure) = self.failure.clone().or(closed) {
            aftermath.unused.push(waker);
            return Err(Refusal::Failed(failure, command));
        }
        if !self.has_reaper() {
            aftermath.unused.push(waker);
            return Err(Refusal::NoReaper(command));
        }
        let now = Instant::now();
        let was_idle = self.core.in_flight() == 0;
        let entry = self.operations.vacant_entry();
        let key = entry.key();
        let submitted = if self.backlog.is_empty() {
            submit(&mut self.core, key, command, now, &mut self.counters)
        } else {
            Err(command)
        };
        let stage = match submitted {
            Ok(slot) => Stage::Submitted { slot },
            Err(command) => {
                let since = now;
                self.backlog.push_back(Waiting {
                    key,
                    command,
                    since,
                });
                Stage::Queued
            }
        };
        entry.insert(Operation { waker, stage });
        if was_idle {
            self.last_progress = now;
        }
        self.reap(Look::Polled, now, aftermath);
        self.rouse_reaper(was_idle, aftermath);
        Ok(match self.take_outcome(key) {
            Some(outcome) => Progress::Done(outcome),
            None => Progress::Waiting { key },
        })
    }

    /// The outcome of an operation, which is over then, if it has one.
    pub(crate) fn take_outcome(&mut self, key: usize) -> Option<Outcome> {
        if !matches!(self.operations[key].stage, Stage::Done(_)) {
            return None;
        }
        match self.operations.remove(key).stage {
            Stage::Done(outcome) => Some(outcome),
            Stage::Queued | Stage::Submitted { .. } => None,
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

    /// Forgets an operation whose future was dropped. What the device may still use stays with
    /// its slot.
    pub(crate) fn abandon(&mut self, key: usize, aftermath: &mut Aftermath) {
        let Operation { waker, stage } = self.operations.remove(key);
        aftermath.unused.push(waker);
        match stage {
            Stage::Queued => {
                if let Some(index) = self.backlog.iter().position(|waiting| waiting.key == key)
                    && let Some(waiting) = self.backlog.remove(index)
                {
                    aftermath.garbage.push(waiting.command.holdings);
                }
            }
            Stage::Submitted { slot } => self.core.orphan(slot),
            Stage::Done((_, holdings)) => aftermath.garbage.extend(holdings),
        }
    }

    /// Takes completions, at most a batch, and puts waiting commands into the slots they leave.
    /// Returns how many it took.
    pub(crate) fn reap(&mut self, look: Look, now: Instant, aftermath: &mut Aftermath) -> usize {
        let mut taken = 0;
        while taken < REAP_BATCH && self.failure.is_none() {
            match self.core.next_completion() {
                None => break,
                Some(Ok(finished)) => {
                    taken += 1;
                    self.finish(finished, now, aftermath);
                }
                Some(Err(lie)) => self.fail(Failure::Lie(lie), aftermath),
            }
        }
        if taken > 0 {
            self.last_progress = now;
            self.count(look, taken);
            // Before the lock is released: whoever reaps next starts from the head we tell.
            self.counters.doorbell_writes += u64::from(self.core.acknowledge());
            self.refill(now);
            self.wake_drains(aftermath);
        }
        taken
    }

    /// Rings the doorbell for commands that were left to the reaper.
    pub(crate) fn ring_deferred(&mut self) {
        if self.failure.is_none() {
            self.counters.doorbell_writes += u64::from(self.core.ring_deferred());
        }
    }

    /// Resolves operations whose deadline has passed. Their slots stay taken.
    ///
    /// Commands that wait for a slot have as much time again, but only once all slots are lost:
    /// as long as others complete, their turn comes.
    pub(crate) fn expire(&mut self, now: Instant, aftermath: &mut Aftermath) {
        let operations = &mut self.operations;
        self.core.expire(now, |in_flight, submitted| {
            let InFlight::Operation { key, .. } = in_flight else {
                return;
            };
            let after = now.saturating_duration_since(submitted);
            operations[*key].resolve((Err(Failure::TimedOut { after }), None), aftermath);
        });
        if self.core.in_flight() > 0 || self.core.lost() == 0 {
            return;
        }
        for waiting in std::mem::take(&mut self.backlog) {
            let after = now.saturating_duration_since(waiting.since);
            if waiting.command.timeout.is_some_and(|limit| after >= limit) {
                let holdings = Some(waiting.command.holdings);
                let outcome = (Err(Failure::TimedOut { after }), holdings);
                self.operations[waiting.key].resolve(outcome, aftermath);
            } else {
                self.backlog.push_back(waiting);
            }
        }
    }

    /// Fails everything that is waited for, and everything that comes. Memory that the device may
    /// still use stays in its slots.
    pub(crate) fn fail(&mut self, failure: Failure, aftermath: &mut Aftermath) {
        if self.failure.is_some() {
            return;
        }
        for (_, operation) in &mut self.operations {
            if let Stage::Submitted { slot } = operation.stage {
                self.core.orphan(slot);
                operation.resolve((Err(failure.clone()), None), aftermath);
            }
        }
        for waiting in std::mem::take(&mut self.backlog) {
            let outcome = (Err(failure.clone()), Some(waiting.command.holdings));
            self.operations[waiting.key].resolve(outcome, aftermath);
        }
        self.failure = Some(failure);
        self.wake_drains(aftermath);
        self.wake_reapers(aftermath);
    }

    /// Ends the queue pair: fails what is still waited for, and separates the outcomes from what the
    /// device may still use.
    pub(crate) fn end(mut self, aftermath: &mut Aftermath) -> (Outcomes, Core) {
        self.fail(Failure::Closed, aftermath);
        self.dismiss_reapers(aftermath);
        let outcomes = Outcomes {
            operations: self.operations,
        };
        (outcomes, self.core)
    }

    /// Whether no further commands are accepted. Those that are outstanding or wait for a slot go
    /// on.
    pub(crate) fn set_refusing(&mut self, refusing: bool) {
        self.refusing = refusing;
    }

    pub(crate) fn is_refusing(&self) -> bool {
        self.refusing
    }

    /// How many commands can be outstanding.
    pub(crate) fn depth(&self) -> usize {
        self.core.capacity()
    }

    /// Asks for one event of the controller.
    pub(crate) fn request_event(&mut self) {
        if self.failure.is_some() || self.refusing {
            return;
        }
        let now = Instant::now();
        let sqe = nvme_spec::admin::async_event_request();
        // With all slots taken there is one event request less until the next one completes.
        let submitted = self
            .core
            .submit(sqe, InFlight::AsyncEvent, Class::Background, now, None)
            .is_ok();
        if submitted {
            self.counters.doorbell_writes += u64::from(self.core.ring_deferred());
        }
    }

    /// What the controller reported by itself since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<AsyncEvent> {
        std::mem::take(&mut self.events)
    }

    /// Begins to wait for everything that was started so far; returns the key of that wait.
    pub(crate) fn begin_drain(&mut self) -> usize {
        // What waits for a slot gets the next sequence numbers, and until it does, all slots are
        // taken by what came before it.
        let mark = self.core.next_sequence() + self.backlog.len() as u64;
        self.drains.insert(Draining { mark, waker: None })
    }

    /// How a drain ended; if it has not, the waker is woken when it may have. Another one is left
    /// in its place.
    pub(crate) fn poll_drain(
        &mut self,
        key: usize,
        waker: &mut Option<Waker>,
    ) -> Option<Result<(), Failure>> {
        let draining = &mut self.drains[key];
        if !self.core.is_outstanding_before(draining.mark) {
            return Some(Ok(()));
        }
        if let Some(failure) = &self.failure {
            return Some(Err(failure.clone()));
        }
        std::mem::swap(&mut draining.waker, waker);
        None
    }

    /// Ends a drain.
    pub(crate) fn end_drain(&mut self, key: usize) -> Option<Waker> {
        self.drains.remove(key).waker
    }

    /// Commands that somebody submitted and whose completion is worth waiting for: those that were
    /// given up are not counted.
    pub(crate) fn in_flight(&self) -> usize {
        match self.failure {
            Some(_) => 0,
            None => self.core.in_flight(),
        }
    }

    /// Whether the queue is looked at every so often even without an interrupt.
    pub(crate) fn is_watched(&self) -> bool {
        self.failure.is_none() && self.core.in_flight() + self.core.lost() > 0
    }

    /// Whether a completion waits to be taken.
    pub(crate) fn completion_ready(&self) -> bool {
        self.failure.is_none() && self.core.completion_ready()
    }

    pub(crate) fn mode(&self) -> PollMode {
        self.settings.mode
    }

    fn finish(&mut self, finished: Finished<InFlight>, now: Instant, aftermath: &mut Aftermath) {
        self.counters.completions += 1;
        match finished.token {
            InFlight::AsyncEvent => {
                if finished.cqe.status().is_success() {
                    self.events
                        .push(AsyncEvent::from_bits(finished.cqe.result()));
                } else {
                    tracing::debug!(status = %finished.cqe.status(), "event request refused");
                }
            }
            InFlight::Operation { key, holdings } => {
                debug_assert_eq!(finished.class, Class::Foreground);
                self.window
                    .observe(now.saturating_duration_since(finished.submitted));
                if finished.awaited {
                    let outcome = (Ok(finished.cqe), Some(holdings));
                    self.operations[key].resolve(outcome, aftermath);
                } else {
                    aftermath.garbage.push(holdings);
                }
            }
        }
    }

    fn refill(&mut self, now: Instant) {
        while let Some(Waiting {
            key,
            command,
            since,
        }) = self.backlog.pop_front()
        {
            match submit(&mut self.core, key, command, now, &mut self.counters) {
                Ok(slot) => self.operations[key].stage = Stage::Submitted { slot },
                Err(command) => {
                    self.backlog.push_front(Waiting {
                        key,
                        command,
                        since,
                    });
                    break;
                }
            }
        }
        self.counters.doorbell_writes += u64::from(self.core.ring_deferred());
    }

    fn count(&mut self, look: Look, taken: usize) {
        let taken = taken as u64;
        match look {
            Look::Polled => self.counters.polled_completions += taken,
            Look::Interrupted => {}
            Look::Check => {
                self.counters.polled_completions += taken;
                self.counters.lost_interrupts += taken;
            }
        }
    }

    fn wake_drains(&mut self, aftermath: &mut Aftermath) {
        for (_, draining) in &mut self.drains {
            if self.failure.is_some() || !self.core.is_outstanding_before(draining.mark) {
                aftermath.wakers.extend(draining.waker.take());
            }
        }
    }
}

impl Operation {
    fn resolve(&mut self, mut outcome: Outcome, aftermath: &mut Aftermath) {
        if let Some(holdings) = &mut outcome.1
            && !holdings.mapped.is_empty()
        {
            aftermath.mapped.extend(holdings.mapped.drain(..));
        }
        self.stage = Stage::Done(outcome);
        aftermath.wakers.push(self.take_waker());
    }

    fn take_waker(&mut self) -> Waker {
        std::mem::replace(&mut self.waker, Waker::noop().clone())
    }
}

/// Submits `command`, or gives it back if all slots are taken.
fn submit(
    core: &mut Core,
    key: usize,
    command: Command,
    now: Instant,
    counters: &mut QueueCounters,
) -> Result<u16, Command> {
    let Command {
        sqe,
        holdings,
        timeout,
    } = command;
    let deadline = timeout.and_then(|timeout| now.checked_add(timeout));
    let token = InFlight::Operation { key, holdings };
    match core.submit(sqe, token, Class::Foreground, now, deadline) {
        Ok(slot) => {
            // It has rung the doorbell if it left nothing to the reaper.
            counters.doorbell_writes += u64::from(!core.has_deferred());
            Ok(slot)
        }
        Err(InFlight::Operation { holdings, .. }) => Err(Command {
            sqe,
            holdings,
            timeout,
        }),
        Err(InFlight::AsyncEvent) => Err(Command {
            sqe,
            holdings: Holdings::default(),
            timeout,
        }),
    }
}
