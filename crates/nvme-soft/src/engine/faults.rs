//! What faults do to commands, and to the controller.

use std::sync::Arc;
use std::time::Duration;

use nvme_spec::opcode::AdminOpcode;
use nvme_spec::registers::ShutdownStatus;
use nvme_spec::{Sqe, Status};

use super::deferred::Task;
use super::queues::{Completion, Tamper};
use super::{Engine, Outcome, Reply, State};
use crate::change::ChangeError;
use crate::config::NamespaceConfig;
use crate::control::Control;
use crate::data::DataTamper;
use crate::fault::strike::Armory;
use crate::fault::{Behaviour, Fault, FaultEvent, FaultStatus, Loss, TornBlocks, TornEnd};
use crate::store::MemoryStore;

/// Faults that may strike, and the commands that were struck and have not completed.
#[derive(Default)]
pub(crate) struct Faults {
    armory: Armory,
    waiting: Vec<Waiting>,
    marks: Vec<Mark>,
}

/// A fetched command for which nothing is to be done at a known time.
struct Waiting {
    submission_queue: u16,
    command: Sqe,
    what_for: WhatFor,
}

#[derive(Clone, Copy)]
enum WhatFor {
    /// Its release. If its work is done, that led to this.
    Release(Option<Outcome>),
    /// Its abort, or its release.
    Abort,
    /// That many later completions of its queue.
    Completions(u32),
}

/// A command that is served as usual, except that something happens to it on the way.
struct Mark {
    submission_queue: u16,
    cid: u16,
    behaviour: Arc<Behaviour>,
}

impl Engine {
    /// Forgets all faults; what they struck stays as it is.
    pub(crate) fn clear_faults(&mut self) {
        if let Some(faults) = &mut self.faults {
            faults.armory.clear();
        }
    }

    /// Adds a fault, after those that there are.
    pub(crate) fn inject(&mut self, fault: Fault) {
        // From now on commands are served one after the other, so that a seed decides what happens.
        self.settle();
        if fault.then.loses_unflushed() {
            self.namespaces.track_unflushed();
        }
        self.faults.get_or_insert_default().armory.add(fault);
    }

    /// Lets a fault strike a command that was fetched; returns false if it is to be served.
    pub(super) fn strike_command(&mut self, id: u16, command: &Sqe) -> bool {
        let strikes = self
            .faults
            .as_mut()
            .and_then(|faults| faults.armory.strike_command(id, command));
        let Some(behaviour) = strikes else {
            return false;
        };
        let (kind, cid) = (behaviour.kind(), command.cid());
        let opcode = format_args!("{:#04x}", command.opcode());
        tracing::debug!(%kind, queue = id, cid, %opcode, "a fault strikes");
        self.shared.counters.faults[kind as usize].add(1);
        match *behaviour {
            Behaviour::Delay(time) => self.serve_after(time, id, command),
            Behaviour::Swallow { execute } => {
                let outcome = if execute {
                    self.work(id, command)
                } else {
                    None
                };
                self.wait_for(WhatFor::Release(outcome), id, command);
            }
            Behaviour::Hold => self.wait_for(WhatFor::Abort, id, command),
            Behaviour::OutOfOrder(count) => {
                self.wait_for(WhatFor::Completions(count), id, command);
            }
            Behaviour::CompleteEarly(time) => {
                self.complete(id, command, Ok(0));
                self.defer(time, id, *command, Task::Work);
            }
            Behaviour::Status(status) if !status.execute => self.complete_as(id, command, status),
            Behaviour::SpuriousInterrupt => {
                self.interrupt_for_nothing(id);
                return false;
            }
            Behaviour::Tear { blocks, then } => self.tear(id, command, blocks, then),
            Behaviour::PowerLoss(loss) => self.lose_power(loss),
            Behaviour::Fail { serve: false } => self.fail("a fault strikes"),
            Behaviour::Fail { serve: true } => {
                self.shared.lock().registers.status.set_cfs(true);
                return false;
            }
            Behaviour::Vanish(loss) => self.vanish(loss),
            Behaviour::ChangeNamespace(change) => {
                if let Err(error) = self.change_namespace(change) {
                    tracing::warn!(%error, "a namespace could not be changed");
                }
                return false;
            }
            Behaviour::AddNamespace { bytes, lba_size } => {
                if let Err(error) = self.add_namespace_in_memory(bytes, lba_size) {
                    tracing::warn!(%error, "a namespace could not be added");
                }
                return false;
            }
            Behaviour::Status(_)
            | Behaviour::CompleteTwice(_)
            | Behaviour::CorruptCompletion { .. }
            | Behaviour::FlipPhase
            | Behaviour::CorruptData { .. }
            | Behaviour::TruncateData(_)
            | Behaviour::LoseInterrupt => {
                if let Some(faults) = &mut self.faults {
                    faults.marks.push(Mark {
                        submission_queue: id,
                        cid,
                        behaviour,
                    });
                }
                return false;
            }
            // Those strike events.
            Behaviour::RefuseEnable(_)
            | Behaviour::SlowReady(_)
            | Behaviour::HangDisable
            | Behaviour::FailReset
            | Behaviour::HangShutdown => return false,
        }
        true
    }

    /// Lets a fault strike what is about to happen.
    pub(super) fn strike_event(&mut self, event: FaultEvent) -> Option<Arc<Behaviour>> {
        let behaviour = self.faults.as_mut()?.armory.strike_event(event)?;
        let kind = behaviour.kind();
        tracing::debug!(%kind, "a fault strikes");
        self.shared.counters.faults[kind as usize].add(1);
        Some(behaviour)
    }

    fn wait_for(&mut self, what_for: WhatFor, submission_queue: u16, command: &Sqe) {
        if let Some(faults) = &mut self.faults {
            faults.waiting.push(Waiting {
                submission_queue,
                command: *command,
                what_for,
            });
        }
    }

    /// Does a command's work and does not complete it; returns what it would complete with.
    pub(super) fn work(&mut self, id: u16, command: &Sqe) -> Option<Outcome> {
        // This one has no work; it only waits.
        if id == 0 && AdminOpcode(command.opcode()) == AdminOpcode::ASYNC_EVENT_REQUEST {
            return None;
        }
        let reply = if id == 0 {
            self.admin_command(command)
        } else {
            self.io_command(command)
        };
        match reply {
            Reply::Now(outcome) => Some(outcome),
            // Where there are faults, nothing is handed over (`Engine::place`).
            Reply::Later | Reply::HandOver(_) | Reply::PutOff => None,
        }
    }

    fn complete_as(&mut self, submission_queue: u16, command: &Sqe, status: FaultStatus) {
        let completion = Completion {
            submission_queue,
            cid: command.cid(),
            status: status.status(),
            result: 0,
            ends_command: true,
            tamper: Tamper::Nothing,
        };
        self.complete_struck(command, completion);
    }

    /// Completes a command as its mark wants it, and counts that for those that wait for it.
    #[cold]
    pub(super) fn complete_struck(&mut self, command: &Sqe, mut completion: Completion) {
        let id = completion.submission_queue;
        self.count_completion(id);
        let Some(mark) = self.take_mark(id, completion.cid, |_| true) else {
            return self.finish(command, completion);
        };
        match *mark {
            Behaviour::Status(status) => {
                completion.status = status.status();
                completion.result = 0;
            }
            Behaviour::CorruptCompletion { field, change } => {
                completion.tamper = Tamper::Change(field, change);
            }
            Behaviour::FlipPhase => completion.tamper = Tamper::FlipPhase,
            Behaviour::LoseInterrupt => completion.tamper = Tamper::NoInterrupt,
            Behaviour::CompleteTwice(after) => {
                let again = Completion {
                    ends_command: false,
                    ..completion
                };
                self.defer(after, id, *command, Task::CompleteAgain(again));
            }
            _ => {}
        }
        self.finish(command, completion);
    }

    fn count_completion(&mut self, submission_queue: u16) {
        let Some(faults) = &mut self.faults else {
            return;
        };
        for waiting in &mut faults.waiting {
            if waiting.submission_queue == submission_queue
                && let WhatFor::Completions(left) = &mut waiting.what_for
            {
                *left -= 1;
            }
        }
        let ready = faults
            .waiting
            .extract_if(.., |waiting| {
                matches!(waiting.what_for, WhatFor::Completions(0))
            })
            .collect::<Vec<_>>();
        for waiting in ready {
            let (id, command) = (waiting.submission_queue, waiting.command);
            self.defer(Duration::ZERO, id, command, Task::Serve);
        }
    }

    /// Prepares what is to happen to the data of a command that is about to be served.
    #[cold]
    pub(super) fn prepare_tamper(&mut self, id: u16, cid: u16) {
        let of_data = |behaviour: &Behaviour| {
            matches!(
                behaviour,
                Behaviour::CorruptData { .. } | Behaviour::TruncateData(_)
            )
        };
        self.transfer.tamper = self.take_mark(id, cid, of_data).map(DataTamper::new);
    }

    fn take_mark(
        &mut self,
        submission_queue: u16,
        cid: u16,
        is_wanted: impl Fn(&Behaviour) -> bool,
    ) -> Option<Arc<Behaviour>> {
        let marks = &mut self.faults.as_mut()?.marks;
        let index = marks.iter().position(|mark| {
            mark.submission_queue == submission_queue
                && mark.cid == cid
                && is_wanted(&mark.behaviour)
        })?;
        Some(marks.swap_remove(index).behaviour)
    }

    /// An aborted command completes as such.
    pub(super) fn forget_mark(&mut self, submission_queue: u16, cid: u16) {
        drop(self.take_mark(submission_queue, cid, |_| true));
    }

    /// Takes a command that can be aborted.
    pub(super) fn take_held(&mut self, submission_queue: u16, cid: u16) -> Option<Sqe> {
        let waiting = &mut self.faults.as_mut()?.waiting;
        let index = waiting.iter().position(|waiting| {
            waiting.submission_queue == submission_queue
                && waiting.command.cid() == cid
                && !matches!(waiting.what_for, WhatFor::Release(_))
        })?;
        Some(waiting.remove(index).command)
    }

    /// Forgets the commands of a queue; returns those that are to complete before it is deleted.
    pub(super) fn end_queue(&mut self, submission_queue: u16) -> Vec<Sqe> {
        let Some(faults) = &mut self.faults else {
            return Vec::new();
        };
        faults
            .marks
            .retain(|mark| mark.submission_queue != submission_queue);
        faults
            .waiting
            .extract_if(.., |waiting| waiting.submission_queue == submission_queue)
            .filter(|waiting| !matches!(waiting.what_for, WhatFor::Release(_)))
            .map(|waiting| waiting.command)
            .collect()
    }

    /// The commands that wait, with their submission queues.
    pub(super) fn faulty_commands(&self) -> impl Iterator<Item = (u16, &Sqe)> {
        self.faults.iter().flat_map(|faults| {
            faults
                .waiting
                .iter()
                .map(|waiting| (waiting.submission_queue, &waiting.command))
        })
    }

    /// The controller is disabled: commands are forgotten, faults stay.
    pub(super) fn forget_struck(&mut self) {
        if let Some(faults) = &mut self.faults {
            faults.waiting.clear();
            faults.marks.clear();
        }
    }

    pub(crate) fn release_stuck(&mut self) {
        let Some(faults) = &mut self.faults else {
            return;
        };
        for Waiting {
            submission_queue,
            command,
            what_for,
        } in std::mem::take(&mut faults.waiting)
        {
            let task = match what_for {
                WhatFor::Release(Some(outcome)) => Task::Complete(outcome),
                _ => Task::Serve,
            };
            self.defer(Duration::ZERO, submission_queue, command, task);
        }
    }

    fn interrupt_for_nothing(&mut self, id: u16) {
        let completion_queue = self
            .queues
            .submission(id)
            .map(|queue| queue.completion_queue);
        if let Some(completion_queue) = completion_queue
            && let Some(queue) = self.queues.completion(completion_queue)
            && let Some(vector) = queue.vector
        {
            self.raise(vector);
        }
    }

    fn tear(&mut self, id: u16, command: &Sqe, blocks: TornBlocks, then: TornEnd) {
        // A command that is refused writes nothing.
        let Ok(namespace) = self.namespaces.find(command.nsid()) else {
            return self.complete(id, command, Err(Status::INVALID_NAMESPACE_OR_FORMAT));
        };
        namespace.store.tear(Some(blocks));
        let outcome = self.work(id, command);
        if let Ok(namespace) = self.namespaces.find(command.nsid()) {
            namespace.store.tear(None);
        }
        match (outcome, then) {
            (Some(Err(status)), _) => self.complete(id, command, Err(status)),
            (outcome, TornEnd::Swallow) => self.wait_for(WhatFor::Release(outcome), id, command),
            (_, TornEnd::PowerLoss(loss)) => self.lose_power(loss),
            (_, TornEnd::Status(status)) => self.complete_as(id, command, status),
        }
    }

    fn add_namespace_in_memory(&mut self, bytes: u64, lba_size: u32) -> Result<u32, ChangeError> {
        let store = MemoryStore::new(bytes).map_err(|source| ChangeError::Store {
            nsid: self.namespaces.active().last().unwrap_or(0) + 1,
            source,
        })?;
        self.add_namespace(NamespaceConfig::new(store, lba_size))
    }

    /// The power fails and is back at once. What threads are about to write is written before.
    pub(crate) fn lose_power(&mut self, loss: Loss) {
        self.background.wait();
        self.namespaces.lose_unflushed(loss);
        // A function that is not there has lost its power before.
        if self.state == State::Gone {
            return;
        }
        let shared = Arc::clone(&self.shared);
        self.power_off(&mut shared.lock());
    }

    pub(crate) fn vanish(&mut self, loss: Loss) {
        self.background.wait();
        self.namespaces.lose_unflushed(loss);
        if self.state == State::Gone {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let mut control = shared.lock();
        control.vanished = true;
        self.doorbells.registers.set_vanished(true);
        self.power_off(&mut control);
        self.state = State::Gone;
    }

    fn power_off(&mut self, control: &mut Control) {
        let is_shut_down = control.registers.status.shst() == ShutdownStatus::Complete;
        self.admin.health.lose_power(is_shut_down);
        self.disable();
        control.registers.reset();
    }

    pub(crate) fn reappear(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut control = shared.lock();
        if self.state == State::Gone {
            control.bus_master = true;
            control.vanished = false;
            self.bus_master = true;
            self.doorbells.registers.set_vanished(false);
            self.state = State::Disabled;
        }
    }
}
