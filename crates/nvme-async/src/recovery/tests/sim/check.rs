//! What must be true, whatever the device does.

use nvme_spec::{Cqe, Status};

use super::{Phase, Simulation};
use crate::Fate;
use crate::engine::state::{Here, Outcome, Refusal};
use crate::engine::{Failed, Failure};
use crate::io::Payload;
use crate::recovery::action::Place;
use crate::recovery::tests::disk::Known;
use crate::recovery::tests::faults::Fault;
use crate::recovery::tests::host::{Kind, Operation, Stage};
use crate::recovery::tests::model::BLOCKS;
use crate::recovery::{ControllerState, ResetCause};

/// For what the simulation does not account for, in microseconds: wake-ups, and looks at registers.
const SLACK: u64 = 30_000;

impl Simulation {
    /// An operation has resolved.
    pub(super) fn resolve(
        &mut self,
        number: u32,
        outcome: (Outcome, Payload),
    ) -> Result<(), String> {
        let now = self.clock.micros();
        let operation = &mut self.operations[number as usize - 1];
        operation.stage = Stage::Resolved;
        let (kind, blocks, began) = (operation.kind, operation.blocks.clone(), operation.began);
        let may_repeat = operation.may_repeat;
        self.check_time(number)?;
        let (result, payload) = outcome;
        self.clock
            .tell(|| format!("operation {number} has resolved: {result:?}"));
        let executions = self.controller.lock().executions(number);
        let wrong = |why: &str| {
            Err(format!(
                "operation {number} ({kind:?}, executed {executions} times): {result:?}, {why}"
            ))
        };
        // Only these have any.
        let has_memory = matches!(kind, Kind::Read | Kind::Write);
        let kept = has_memory && matches!(payload, Payload::None);
        if kept && !self.may_keep_memory() {
            return wrong("and its memory is not given back");
        }
        if executions > 1 && !may_repeat {
            return wrong("and it may be executed once");
        }
        let known = match result {
            Ok(cqe) if cqe.status().is_success() => {
                if executions == 0 {
                    return wrong("and it was not executed");
                }
                Known::Done
            }
            Ok(cqe) => {
                if let Some(why) = self.unexplained_status(cqe) {
                    return wrong(why);
                }
                Known::Unknown
            }
            Err(failed) => {
                if let Some(why) = self.unexplained(number, failed) {
                    return wrong(why);
                }
                match failed.fate {
                    Fate::NotExecuted if executions > 0 => {
                        return wrong("and it was executed");
                    }
                    Fate::NotExecuted => Known::NotExecuted,
                    Fate::Unknown => Known::Unknown,
                }
            }
        };
        match (kind, known) {
            (Kind::Write, _) => self.history.write_ends(number, blocks, now, known),
            (Kind::Read, Known::Done) => {
                let Payload::Bytes(bytes) = payload else {
                    return wrong("and its memory is another");
                };
                for (block, word) in blocks.zip(bytes.chunks(4)) {
                    let found = u32::from_le_bytes(word.try_into().expect("four bytes"));
                    let checked = self.history.check(block, found, began, now);
                    checked.map_err(|why| format!("operation {number}: {why}"))?;
                }
                if let Some(probe) = self.probes.iter_mut().find(|(probe, _)| *probe == number) {
                    probe.1 = true;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Within its time, and what a recovery may take.
    fn check_time(&self, number: u32) -> Result<(), String> {
        let now = self.clock.micros();
        let operation = &self.operations[number as usize - 1];
        let model = self.controller.lock();
        let after_deadline = self.abort_micros + model.traits.times.grace + SLACK;
        let (from, limit) = match model.told(number) {
            Some((at, allowance)) => (
                at,
                operation.timeout + after_deadline + model.allowance - allowance,
            ),
            // It waited for a slot, so for others.
            None => (
                operation.began,
                20 * (model.traits.times.timeout + after_deadline) + model.allowance
                    - operation.allowance,
            ),
        };
        if now > from + limit {
            return Err(format!(
                "operation {number} took {} µs since {from}, and {limit} are the most",
                now - from
            ));
        }
        Ok(())
    }

    /// Whether the controller was given up and could not be cut off from memory.
    fn may_keep_memory(&self) -> bool {
        self.place() == Place::Ended && self.has_struck(&[Fault::BusMasterStays])
    }

    fn has_struck(&self, faults: &[Fault]) -> bool {
        let model = self.controller.lock();
        faults.iter().any(|fault| model.plan.has_struck(*fault))
    }

    /// Why a command can't have ended with this error status.
    fn unexplained_status(&self, cqe: Cqe) -> Option<&'static str> {
        let status = cqe.status();
        let explained = if status.is(Status::INTERNAL_ERROR) {
            self.has_struck(&[
                Fault::ErrorRetry,
                Fault::ErrorDelayed,
                Fault::ErrorFinal,
                Fault::ErrorPartial,
            ])
        } else {
            status.is(Status::ABORTED_SQ_DELETION)
                && self.supervisor.trail.contains(&Place::Deleting)
        };
        (!explained).then_some("without a reason")
    }

    /// Why a command can't have failed so.
    fn unexplained(&self, number: u32, failed: Failed) -> Option<&'static str> {
        let operation = &self.operations[number as usize - 1];
        match failed.failure {
            Failure::TimedOut { after } => {
                (after < super::micros(operation.timeout)).then_some("too early")
            }
            Failure::Reset(cause) => self.unjustified(cause),
            Failure::Recovering => (!self.fails_fast || failed.fate != Fate::NotExecuted)
                .then_some("and it was to wait"),
            Failure::Removed | Failure::ControllerFailed { .. } => {
                (self.place() != Place::Ended).then_some("and the controller is used")
            }
            _ => Some("which is no way to fail"),
        }
    }

    /// Why there can't have been a recovery for this cause.
    fn unjustified(&self, cause: ResetCause) -> Option<&'static str> {
        let justified = match cause {
            ResetCause::Overdue => self.has_struck(&[
                Fault::NeverDone,
                Fault::NeverDoneNorAborted,
                Fault::DoneAfterAbort,
                Fault::Late,
                Fault::LostTail,
                Fault::LostHead,
                Fault::SlowAnswer,
                // They are sent again with little time left.
                Fault::ErrorRetry,
                Fault::ErrorDelayed,
                Fault::ErrorPartial,
                Fault::NoticeFailed,
                // The host is late.
                Fault::RuntimeStands,
                Fault::RuntimeEnds,
                // Nothing works after these.
                Fault::Fatal,
                Fault::FatalAndAlive,
                Fault::StateLost,
                Fault::AllOnesForAWhile,
            ]),
            ResetCause::Protocol(_) => self.controller.lock().lies > 0,
            ResetCause::Fatal { .. } => self.has_struck(&[Fault::Fatal, Fault::FatalAndAlive]),
            ResetCause::StateLost => self.has_struck(&[Fault::StateLost]),
            ResetCause::Reported => self.has_struck(&[Fault::NoticeFailed]),
        };
        (!justified).then_some("and there was no reason for a recovery")
    }

    /// What is announced is what is.
    pub(super) fn check_state(&self) -> Result<(), String> {
        let state = *self.state.borrow();
        let place = self.place();
        let fits = match state {
            ControllerState::Live => matches!(place, Place::Live | Place::Aborting),
            ControllerState::Recovering { cause } => {
                if let Some(why) = self.unjustified(cause) {
                    return Err(format!("{cause}: {why}"));
                }
                !matches!(place, Place::Live | Place::Aborting | Place::Ended)
            }
            ControllerState::Removed => {
                let removed = [
                    Fault::AllOnes,
                    Fault::AllOnesForAWhile,
                    Fault::AllZeroes,
                    Fault::RegistersUnreadable,
                    Fault::NoticeRelease,
                ];
                place == Place::Ended && self.has_struck(&removed)
            }
            ControllerState::Failed { .. } => place == Place::Ended,
            ControllerState::Closed => false,
        };
        // A release that was asked for is announced when it is done.
        if fits || place == Place::Releasing {
            Ok(())
        } else {
            Err(format!("{state:?} is announced, and it is {place:?}"))
        }
    }

    /// A drain has ended.
    pub(super) fn check_drained(
        &mut self,
        queue: u16,
        mark: u32,
        result: Result<(), Failed>,
    ) -> Result<(), String> {
        if let Err(failed) = result {
            let ended = self.place() == Place::Ended;
            return ended
                .then_some(())
                .ok_or_else(|| format!("a drain failed: {failed:?}"));
        }
        // Their outcomes may not have been taken.
        for number in 1..=mark {
            if self.operations[number as usize - 1].queue == queue {
                self.poll(number)?;
            }
        }
        let is_before =
            |number: &u32| *number <= mark && self.operations[*number as usize - 1].queue == queue;
        let mut waiting = (1..=mark).filter(|number| {
            let operation = &self.operations[*number as usize - 1];
            operation.queue == queue && matches!(operation.stage, Stage::Waiting { .. })
        });
        match self.ledger.operations().into_iter().find(is_before) {
            None if waiting.next().is_none() => Ok(()),
            rest => Err(format!(
                "a drain of queue {queue} has ended, and not {rest:?}"
            )),
        }
    }

    pub(super) fn is_anybody_waiting(&self) -> bool {
        let waits = |operation: &Operation| matches!(operation.stage, Stage::Waiting { .. });
        self.operations.iter().any(waits) || self.drains.iter().any(|drain| !drain.done)
    }

    /// Whether the controller works and nothing is left to be done.
    pub(super) fn is_idle(&self) -> bool {
        self.place() == Place::Live
            && self.ledger.operations().is_empty()
            && self
                .queues
                .iter()
                .all(|queue| queue.with(|state| state.is_watched()) == Some(false))
    }

    /// Reads everything, by all queues.
    pub(super) fn probe(&mut self, attempts: u8) -> Result<(), String> {
        self.phase = Phase::Probing(attempts);
        self.probes.clear();
        let (timeout, allowance) = {
            let model = self.controller.lock();
            (model.traits.times.timeout, model.allowance)
        };
        for (index, first) in (0..BLOCKS).step_by(4).enumerate() {
            let operation = Operation {
                kind: Kind::Read,
                queue: 1 + (index % (self.queues.len() - 1)) as u16,
                blocks: first..first + 4,
                may_repeat: true,
                timeout,
                began: self.clock.micros(),
                allowance,
                stage: Stage::Resolved,
            };
            let number = self.operations.len() as u32 + 1;
            self.probes.push((number, false));
            self.start(operation)?;
        }
        Ok(())
    }

    pub(super) fn all_was_read(&self) -> bool {
        self.probes.iter().all(|(_, read)| *read)
    }

    /// At the end nothing is left.
    pub(super) fn check_end(&mut self) -> Result<(), String> {
        if self.is_anybody_waiting() {
            return Err(self.stuck("it is over"));
        }
        for (id, queue) in self.queues.iter().enumerate() {
            let left = queue.with(|state| state.operations());
            if left != Some(0) {
                return Err(format!("{left:?} operations are left in queue {id}"));
            }
        }
        let held = self.ledger.operations();
        if self.place() != Place::Ended {
            return held
                .is_empty()
                .then_some(())
                .ok_or_else(|| format!("{held:?} have their memory at the end"));
        }
        let mut model = self.controller.lock();
        model.note_shadows();
        if !held.is_empty() && !model.plan.has_struck(Fault::BusMasterStays) {
            return Err(format!(
                "{held:?} have their memory, and the device is stopped"
            ));
        }
        if let Some(number) = held.iter().find(|number| model.told(**number).is_none()) {
            return Err(format!(
                "{number} has its memory, and the device was not told"
            ));
        }
        drop(model);
        self.check_refusal()
    }

    /// A controller that has ended takes nothing.
    fn check_refusal(&self) -> Result<(), String> {
        match self.queues[1]
            .with(|state| state.admit(Here::now()).err())
            .flatten()
        {
            Some(Refusal::Failed(Failure::Removed | Failure::ControllerFailed { .. })) => Ok(()),
            _ => Err("a controller that has ended takes commands".to_owned()),
        }
    }
}
