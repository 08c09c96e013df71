//! What one queue pair holds: its protocol core, and the operations that wait for it.

mod drain;
mod operation;
mod pair;
mod recovery;
mod seat;
mod waiting;

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use nvme_spec::event::AsyncEvent;
use nvme_spec::{Cqe, Status};
use slab::Slab;
use smallvec::SmallVec;

use self::drain::Draining;
pub(crate) use self::operation::{
    Aftermath, Command, Failed, Failure, Outcome, Outcomes, Remains, Token,
};
use self::operation::{Operations, Stage};
use self::pair::Partner;
pub(crate) use self::seat::{Here, Place, Seat, Term};
use super::trouble::{Inbox, Trouble};
use super::window::{Window, WindowCounters};
use super::{PollMode, QueueSettings};
use crate::device::VectorMask;
use crate::io::HoldingsMut;
use crate::memory::DmaWords;
use crate::queue::{Class, Finished, QueueCore, QueueDoorbell};
use crate::recovery::ResetCause;

/// So many completions are taken before those who wait for them are woken.
const REAP_BATCH: usize = 32;
/// After so long without a completion, while some are due, somebody should look at the controller.
const STALL: Duration = Duration::from_secs(1);

/// The protocol core of a queue pair on a device.
pub(crate) type Core = QueueCore<Token, DmaWords, QueueDoorbell>;

/// How far [`State::start`] got with a command.
pub(crate) enum Progress {
    Done(Outcome),
    Waiting { key: usize },
}

/// Why a command is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Failed(Failure),
    /// Nobody drives the queue.
    NoReaper,
}

/// The state of one queue pair.
pub(crate) struct State {
    core: Core,
    /// All commands that were accepted; their keys are everywhere else.
    operations: Operations,
    /// Those that wait for a slot, in the order in which they get one.
    backlog: VecDeque<usize>,
    /// Those that are to be sent again, and when.
    delayed: Vec<(Instant, usize)>,
    next_ticket: u64,
    /// Why nothing is accepted any more.
    failure: Option<Failure>,
    gate: Gate,
    /// Whether the controller is being shut down.
    refusing: bool,
    /// Who deals with what goes wrong.
    supervisor: Option<Arc<Inbox>>,
    /// Who drives the queue. Where nobody does, the next operation that is polled spawns a reaper.
    pub(crate) seats: Vec<Seat>,
    last_term: Term,
    pub(crate) window: Window,
    /// When a command was last completed, or submitted to an idle queue.
    last_progress: Instant,
    /// When it was last reported that none is.
    last_stall: Option<Instant>,
    settings: QueueSettings,
    /// Holds the interrupt back while the queue is polled.
    mask: Option<Mask>,
    /// How often the hook of a runtime had been called at the last submission.
    hook_calls: u64,
    partner: Option<Partner>,
    drains: Slab<Draining>,
    events: Vec<Notification>,
    pub(crate) counters: QueueCounters,
}

/// The mask of an interrupt vector that only this queue uses.
struct Mask {
    vector: VectorMask,
    closed: bool,
}

/// What those are told of who watch for a controller's events.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Notification {
    Event(AsyncEvent),
    /// The controller was reset: events may have gone unreported, and anything may have changed.
    Reset,
}

/// What recovery leaves of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gate {
    /// All.
    Open,
    /// No doorbell is rung; completions are taken.
    Fenced,
    /// The same, and completions are not believed: the device broke the protocol.
    Distrusted,
    /// The device does not know the queue pair.
    Stopped,
}

/// Events counted by one queue pair since it was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct QueueCounters {
    /// Commands completed.
    pub(crate) completions: u64,
    /// Completions found by looking, without having been told by an interrupt.
    pub(crate) polled_completions: u64,
    /// Times that completions were taken, each time all that were there.
    pub(crate) reaps: u64,
    pub(crate) submission_doorbells: u64,
    pub(crate) completion_doorbells: u64,
    /// Those of both kinds that the device found in memory and did not want to have in a register.
    pub(crate) unwritten_doorbells: u64,
    /// Times that a reaper went to sleep while commands were outstanding.
    pub(crate) sleeps: u64,
    /// Completions that were found waiting although no interrupt had come.
    pub(crate) lost_interrupts: u64,
    /// Commands that were sent again.
    pub(crate) retries: u64,
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
            operations: Operations::with_capacity(capacity),
            backlog: VecDeque::new(),
            delayed: Vec::new(),
            next_ticket: 0,
            failure: None,
            gate: Gate::Open,
            refusing: false,
            supervisor: None,
            seats: Vec::new(),
            last_term: Term::default(),
            window: Window::new(settings.costs, settings.max_window),
            last_progress: Instant::now(),
            last_stall: None,
            settings,
            mask: None,
            hook_calls: 0,
            partner: None,
            drains: Slab::new(),
            events: Vec::new(),
            counters: QueueCounters::default(),
        }
    }

    /// Has the interrupt masked while the queue is polled. The vector is nobody else's.
    pub(crate) fn mask_by(&mut self, vector: VectorMask) {
        self.mask = Some(Mask {
            vector,
            closed: false,
        });
    }

    /// Who drives the queue for commands from here, if they are accepted.
    #[inline]
    pub(crate) fn admit(&self, here: Here) -> Result<&Seat, Refusal> {
        let recovering = self.gate != Gate::Open && self.settings.fails_fast;
        if let Some(failure) = self.failure {
            Err(Refusal::Failed(failure))
        } else if self.refusing {
            Err(Refusal::Failed(Failure::Closed))
        } else if recovering {
            Err(Refusal::Failed(Failure::Recovering))
        } else {
            self.reaper(here).ok_or(Refusal::NoReaper)
        }
    }

    /// Accepts a command: submits it, or queues it behind those that wait for a slot. What it needs
    /// comes back in `holdings` if it is done at once, and is left there if it is refused; otherwise
    /// they are left empty, and no `waker`.
    #[inline(always)]
    pub(crate) fn start(
        &mut self,
        command: &Command,
        mut holdings: HoldingsMut<'_>,
        waker: &mut Option<Waker>,
        here: Here,
        now: Instant,
        aftermath: &mut Aftermath,
    ) -> Result<Progress, Refusal> {
        let attended = self.admit(here)?.attends(here);
        let was_idle = self.core.in_flight() == 0;
        let key = self.operations.claim();
        let operation = &mut self.operations[key];
        operation.accept(command, holdings.reborrow(), self.next_ticket);
        self.next_ticket += 1;
        let waits = !self.backlog.is_empty() || !operation.submit(key, &mut self.core, now);
        if waits {
            self.backlog.push_back(key);
        }
        if was_idle {
            if self.others() == 0 {
                let rest = now.saturating_duration_since(self.progress());
                self.window.rested(rest);
            }
            self.last_progress = now;
        }
        self.tell_of_submission(was_idle, now);
        // Where a reaper is about to look, it does so once for many.
        let looks = was_idle || waits || !attended;
        if looks {
            self.reap(Look::Polled, now, aftermath);
        }
        if !attended {
            self.rouse_reaper(here, now, aftermath);
        }
        if looks && let Some(outcome) = self.take_outcome(key, holdings) {
            return Ok(Progress::Done(outcome));
        }
        std::mem::swap(&mut self.operations[key].waker, waker);
        Ok(Progress::Waiting { key })
    }

    /// Takes completions, at most a batch, and puts waiting commands into the slots they leave.
    /// Returns how many it took.
    pub(crate) fn reap(&mut self, look: Look, now: Instant, aftermath: &mut Aftermath) -> usize {
        let mut taken = 0;
        while taken < REAP_BATCH && self.believes() {
            match self.core.next_completion() {
                None => break,
                Some(Ok(finished)) => {
                    taken += 1;
                    self.finish(finished, now, aftermath);
                }
                Some(Err(lie)) => self.distrust(lie, aftermath),
            }
        }
        if taken > 0 {
            self.window.completed(look, taken, self.progress(), now);
            self.last_progress = now;
            self.tell_of_completions(now);
            self.count(look, taken);
            // Before the lock is released: whoever reaps next starts from the head we tell.
            self.core.acknowledge();
            self.send_delayed(now, aftermath);
            self.wake_drains(aftermath);
        }
        taken
    }

    /// Rings the doorbell for commands that were left to the reaper.
    pub(crate) fn ring_deferred(&mut self) {
        if self.failure.is_none() {
            self.core.ring_deferred();
        }
    }

    /// Deals with what is due: commands whose deadline has passed, those that are to be sent again,
    /// and a device that completes nothing.
    pub(crate) fn expire(&mut self, now: Instant, aftermath: &mut Aftermath) {
        let mut overdue: SmallVec<[(u16, u16); 8]> = SmallVec::new();
        self.core.expire(now, |slot, cid| overdue.push((slot, cid)));
        for (slot, cid) in overdue {
            let Some(supervisor) = &self.supervisor else {
                self.give_up(slot, now, aftermath);
                continue;
            };
            let queue = self.core.id();
            supervisor.report(Trouble::Overdue { queue, cid });
        }
        self.send_delayed(now, aftermath);
        let since = self.last_stall.unwrap_or(self.last_progress);
        let since = since.max(self.last_progress);
        let is_stalled = self.in_flight() > 0
            && self.gate == Gate::Open
            && now.saturating_duration_since(since) >= STALL;
        if let Some(supervisor) = self.supervisor.as_ref().filter(|_| is_stalled) {
            self.last_stall = Some(now);
            supervisor.report(Trouble::Stalled);
        }
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
        let sqe = nvme_spec::admin::async_event_request();
        // With all slots taken there is one event request less until the next one completes.
        let (token, class) = (Token::AsyncEvent, Class::Background);
        if self.core.submit(&sqe, token, class, None).is_some() {
            self.ring_deferred();
        }
    }

    /// Notes that the controller was reset, for those who are told of its events.
    pub(crate) fn note_reset(&mut self) {
        self.events.push(Notification::Reset);
    }

    /// What the controller reported by itself since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<Notification> {
        std::mem::take(&mut self.events)
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
        self.failure.is_none()
            && (self.core.in_flight() + self.core.lost() > 0
                || !self.delayed.is_empty()
                || self.waiting_again().next().is_some())
    }

    /// Whether a completion waits to be taken.
    pub(crate) fn completion_ready(&self) -> bool {
        self.believes() && self.core.completion_ready()
    }

    /// Operations whose outcome was not taken.
    #[cfg(test)]
    pub(crate) fn operations(&self) -> usize {
        let operations = self.operations.iter();
        let over = |stage| matches!(stage, Stage::Orphaned | Stage::Over);
        operations
            .filter(|operation| !over(operation.stage))
            .count()
    }

    /// What has happened so far.
    pub(crate) fn counters(&self) -> (QueueCounters, WindowCounters) {
        let counters = QueueCounters {
            submission_doorbells: self.core.submission_doorbells(),
            completion_doorbells: self.core.completion_doorbells(),
            unwritten_doorbells: self.core.unwritten_doorbells(),
            ..self.counters
        };
        (counters, self.window.counters)
    }

    /// For how long an interrupt may be put off on purpose.
    pub(crate) fn coalescing_time(&self) -> Duration {
        self.settings.coalescing_time
    }

    pub(crate) fn mode(&self) -> PollMode {
        self.settings.mode
    }

    /// Whether completions are taken.
    fn believes(&self) -> bool {
        self.failure.is_none() && matches!(self.gate, Gate::Open | Gate::Fenced)
    }

    fn finish(&mut self, finished: Finished<Token>, now: Instant, aftermath: &mut Aftermath) {
        self.counters.completions += 1;
        let Finished {
            token,
            cqe,
            overdue,
        } = finished;
        match token {
            Token::AsyncEvent => {
                if cqe.status().is_success() {
                    let event = AsyncEvent::from_bits(cqe.result());
                    self.events.push(Notification::Event(event));
                } else {
                    tracing::debug!(status = %cqe.status(), "event request refused");
                }
            }
            Token::Step(id) => {
                if let Some(supervisor) = &self.supervisor {
                    supervisor.report(Trouble::Step { id, cqe });
                }
            }
            Token::Operation(key) => self.finish_operation(key, cqe, overdue, now, aftermath),
        }
    }

    fn finish_operation(
        &mut self,
        key: usize,
        cqe: Cqe,
        overdue: bool,
        now: Instant,
        aftermath: &mut Aftermath,
    ) {
        let status = cqe.status();
        let operation = &mut self.operations[key];
        if !status.is_success() && !overdue && operation.is_awaited() && is_worth_repeating(status)
        {
            let due = now + self.settings.retry_delay(status.crd());
            if operation.may_repeat(self.settings.retries, due) {
                operation.attempts += 1;
                self.counters.retries += 1;
                operation.stage = Stage::Queued;
                return self.delayed.push((due, key));
            }
        }
        // What recovery or a shutdown does to the queue is no answer to the command.
        let deleted =
            status.is(Status::ABORTED_SQ_DELETION) && (self.refusing || self.gate != Gate::Open);
        let result = if overdue && (deleted || status.is(Status::ABORT_REQUESTED)) {
            let after = operation.age(now);
            Err(Failure::TimedOut { after }.told(true))
        } else if deleted && self.refusing {
            Err(Failure::Closed.told(true))
        } else if deleted {
            Err(Failure::Reset(ResetCause::Overdue).told(true))
        } else {
            Ok(cqe)
        };
        self.settle(key, result, aftermath);
    }

    fn count(&mut self, look: Look, taken: usize) {
        self.counters.reaps += 1;
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
}

/// Whether a status lets hope for another one the next time (NVMe base specification 2.0, figure
/// "Status Field", DNR). Data that differs will differ again, whatever the controller says.
fn is_worth_repeating(status: Status) -> bool {
    !status.dnr() && !status.is(Status::COMPARE_FAILURE)
}
