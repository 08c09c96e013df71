//! What becomes of commands, and I/O commands.

use std::sync::atomic::Ordering;

use nvme_spec::nvm::BlockRange;
use nvme_spec::opcode::{AdminOpcode, NvmOpcode};
use nvme_spec::{Cqe, DataPointer, Sqe, Status};

use super::{BLOCKS, Command, Effect, Event, MAY_REPEAT, Model, OnAbort};
use crate::recovery::tests::faults::Fault;
use crate::recovery::tests::memory::Owner;

impl Command {
    pub(super) fn is_event_request(&self) -> bool {
        self.queue == 0 && self.opcode() == AdminOpcode::ASYNC_EVENT_REQUEST
    }

    pub(super) fn is_abort(&self) -> bool {
        self.queue == 0 && self.opcode() == AdminOpcode::ABORT
    }

    pub(super) fn opcode(&self) -> AdminOpcode {
        AdminOpcode(self.sqe.opcode())
    }
}

/// The entry of operation `number` of the host, as the model knows it again.
pub(in crate::recovery::tests) fn tagged(sqe: Sqe, number: u32, may_repeat: bool) -> Sqe {
    sqe.with_cdw2(number)
        .with_cdw3(if may_repeat { MAY_REPEAT } else { 0 })
}

pub(super) fn prp1(sqe: &Sqe) -> u64 {
    match sqe.data_pointer() {
        Ok(DataPointer::Prp { prp1, .. }) => prp1,
        _ => 0,
    }
}

impl Model {
    pub(super) fn latency(&mut self) -> u64 {
        if self.rng.u8(0..20) == 0 {
            self.rng.u64(1000..8000)
        } else {
            self.rng.u64(5..300)
        }
    }

    /// A command was fetched.
    pub(super) fn take(&mut self, queue: u16, sqe: Sqe) {
        let mut command = Command {
            queue,
            sqe,
            effect: if queue == 0 {
                Effect::Admin
            } else {
                Effect::All
            },
            status: Status::SUCCESS,
            result: 0,
            on_abort: OnAbort::Aborted,
        };
        self.count_fetch(&sqe);
        let latency = if queue == 0 {
            self.judge_admin(&mut command)
        } else {
            self.judge(&mut command)
        };
        let id = self.commands.len();
        self.clock.tell(|| {
            let (opcode, cid, number) = (sqe.opcode(), sqe.cid(), sqe.cdw2());
            format!(
                "queue {queue} has opcode {opcode:#x}, CID {cid:#x}, operation {number}, cdw10 {:#x}, \
                 which takes {latency:?} µs",
                sqe.cdw10()
            )
        });
        self.commands.push(Some(command));
        match latency {
            Some(latency) => {
                let execute = self.rng.u64(0..=latency);
                self.schedule(execute, Event::Execute(id));
                self.schedule(latency, Event::Complete(id));
            }
            None if self.rng.bool() => self.schedule(1, Event::Execute(id)),
            None => {}
        }
    }

    /// An operation comes once, unless the host may send it again.
    fn count_fetch(&mut self, sqe: &Sqe) {
        let number = sqe.cdw2() as usize;
        if number == 0 {
            return;
        }
        if number >= self.fetched.len() {
            self.fetched.resize(number + 1, 0);
            self.executed.resize(number + 1, 0);
        }
        self.fetched[number] += 1;
        if self.fetched[number] > 1 && sqe.cdw3() != MAY_REPEAT {
            self.violate(format!("operation {number} came again, and may not"));
        }
    }

    /// How long a command takes that nothing else can make end, if it ever ends.
    pub(super) fn judge_silence(&mut self, command: &mut Command) -> Option<Option<u64>> {
        let times = self.traits.times;
        if self.strikes(Fault::NeverDone) {
            return Some(None);
        }
        if self.strikes(Fault::NeverDoneNorAborted) {
            command.on_abort = OnAbort::NotFound;
            return Some(None);
        }
        if self.strikes(Fault::DoneAfterAbort) {
            command.on_abort = OnAbort::Succeeds;
            return Some(None);
        }
        if self.strikes(Fault::Late) {
            if self.rng.bool() {
                command.on_abort = OnAbort::NotFound;
            }
            let most = times.timeout * 3 / 2 + times.grace;
            return Some(Some(self.rng.u64(times.timeout..most)));
        }
        None
    }

    /// How long an I/O command takes, if it ever ends.
    fn judge(&mut self, command: &mut Command) -> Option<u64> {
        if let Some(latency) = self.judge_silence(command) {
            return latency;
        }
        let error = Status::INTERNAL_ERROR;
        if self.strikes(Fault::ErrorRetry) {
            command.status = error;
            command.effect = Effect::Nothing;
        } else if self.strikes(Fault::ErrorDelayed) {
            command.status = error.with_crd(self.rng.u8(1..=3));
            command.effect = Effect::Nothing;
        } else if self.strikes(Fault::ErrorFinal) {
            command.status = error.with_dnr(true);
            command.effect = Effect::Nothing;
        } else if self.strikes(Fault::ErrorPartial) {
            command.status = error.with_dnr(self.rng.bool());
            command.effect = Effect::Part;
        }
        Some(self.latency())
    }

    pub(super) fn execute(&mut self, id: usize) {
        if !self.works() {
            return;
        }
        let Some(command) = &mut self.commands[id] else {
            return;
        };
        let effect = std::mem::replace(&mut command.effect, Effect::Done);
        let sqe = command.sqe;
        match effect {
            Effect::Done | Effect::Nothing => {}
            Effect::Admin => self.execute_admin(id, sqe),
            Effect::All | Effect::Part => self.transfer(&sqe, effect == Effect::Part),
        }
    }

    /// Reads or writes blocks.
    fn transfer(&mut self, sqe: &Sqe, part: bool) {
        let opcode = NvmOpcode(sqe.opcode());
        let number = sqe.cdw2();
        let memory = prp1(sqe);
        let owner = self.ledger.owner(memory);
        if opcode != NvmOpcode::FLUSH && owner != Owner::Operation(number) {
            return self.violate(format!(
                "operation {number} is executed, and its memory belongs to {owner:?}"
            ));
        }
        self.executed[number as usize] += 1;
        if opcode == NvmOpcode::FLUSH {
            return;
        }
        let range = BlockRange::from_command(sqe);
        let count = if part { 1 } else { range.blocks as usize };
        for index in 0..count {
            let block = &mut self.blocks[(range.slba as usize + index) % BLOCKS];
            let word = self.memory.word(memory + index as u64 * 4);
            let word = word.expect("memory of an operation");
            if opcode == NvmOpcode::READ {
                word.store(block.to_le(), Ordering::Relaxed);
            } else {
                *block = u32::from_le(word.load(Ordering::Relaxed));
            }
        }
    }

    pub(super) fn complete(&mut self, id: usize) {
        if !self.works() {
            return;
        }
        self.execute(id);
        let Some(command) = self.commands[id].take() else {
            return;
        };
        let (queue, sqe) = (command.queue, command.sqe);
        let creates = queue == 0 && command.opcode() == AdminOpcode::CREATE_IO_SUBMISSION_QUEUE;
        if creates && command.status.is_success() {
            self.host.tails[sqe.cdw10() as usize & 7] = Some(0);
        }
        self.clock.tell(|| {
            let (cid, number) = (sqe.cid(), sqe.cdw2());
            let status = command.status;
            format!("queue {queue} completes CID {cid:#x}, operation {number}: {status}")
        });
        let Some(pair) = &mut self.pairs[usize::from(queue)] else {
            return;
        };
        pair.completed.push(sqe.cid());
        let cqe = Cqe::new(sqe.cid(), command.status)
            .with_sq(queue, pair.head as u16)
            .with_result(command.result);
        self.post(queue, cqe);
    }
}
