//! Admin commands: those of a recovery, and one that users send.

use std::sync::atomic::Ordering;

use nvme_spec::feature::{self, NumberOfQueues};
use nvme_spec::opcode::AdminOpcode;
use nvme_spec::{Sqe, Status};

use super::commands::prp1;
use super::{COALESCING, Command, Effect, Event, IDENTITY, Model, OnAbort, Pair, Sabotage};
use crate::recovery::tests::faults::Fault;
use crate::recovery::tests::memory::Owner;

/// How a command ends: its status and dword 0 of its completion.
type Answer = (Status, u32);

impl Model {
    /// How long an admin command takes, if it ever ends. The host may wait so long for it.
    pub(super) fn judge_admin(&mut self, command: &mut Command) -> Option<u64> {
        let latency = self.judge_answer(command);
        let is_users = command.opcode() == AdminOpcode::GET_FEATURES;
        // An Abort has a time of its own.
        if !is_users && !command.is_event_request() {
            let unanswered = if command.is_abort() {
                0
            } else {
                self.traits.times.timeout
            };
            self.allow(latency.unwrap_or(unanswered));
        }
        latency
    }

    fn judge_answer(&mut self, command: &mut Command) -> Option<u64> {
        let opcode = command.opcode();
        let queue = command.sqe.cdw10() as usize & 7;
        match opcode {
            AdminOpcode::DELETE_IO_SUBMISSION_QUEUE => self.host.tails[queue] = None,
            AdminOpcode::GET_FEATURES => {
                if let Some(latency) = self.judge_silence(command) {
                    return latency;
                }
            }
            AdminOpcode::ASYNC_EVENT_REQUEST => {
                command.effect = Effect::Nothing;
                // An event that was reported before a reset is dealt with after it, and one request
                // too many made.
                if self.count(Command::is_event_request) == self.traits.event_limit {
                    command.status = Status::ASYNC_EVENT_LIMIT_EXCEEDED;
                } else if self.strikes(Fault::EventRequestFails) {
                    command.status = Status::INVALID_FIELD;
                } else {
                    return None;
                }
                return Some(100);
            }
            AdminOpcode::ABORT => {
                let count = self.count(Command::is_abort) + 1;
                if count > self.traits.abort_limit {
                    self.violate(format!("{count} Abort commands are outstanding"));
                }
            }
            _ => {}
        }
        if let Some([fails, unanswered]) = Fault::of_admin(opcode, command.sqe.cdw10() as u8) {
            if self.strikes(unanswered) {
                return None;
            }
            if self.strikes(fails) {
                command.status = Status::INTERNAL_ERROR;
                command.effect = Effect::Nothing;
            }
        }
        if command.is_abort() {
            if self.strikes(Fault::AbortLimit) {
                command.status = Status::ABORT_LIMIT_EXCEEDED;
                command.effect = Effect::Nothing;
            } else if self.strikes(Fault::AbortRefused) {
                command.result = 1;
                command.effect = Effect::Nothing;
            }
        } else if self.strikes(Fault::SlowAnswer) {
            let most = self.traits.times.timeout;
            return Some(self.rng.u64(most / 3..most * 9 / 10));
        }
        Some(self.latency())
    }

    fn count(&self, is_one: fn(&Command) -> bool) -> usize {
        let outstanding = self.commands.iter().flatten();
        outstanding.filter(|command| is_one(command)).count()
    }

    pub(super) fn execute_admin(&mut self, id: usize, sqe: Sqe) {
        let data = prp1(&sqe);
        let queue = sqe.cdw10() as u16;
        let entries = (sqe.cdw10() >> 16) + 1;
        let known = (1..=self.traits.queues).contains(&queue);
        let pair = usize::from(queue & 7);
        let done = (Status::SUCCESS, 0);
        let answer = match AdminOpcode(sqe.opcode()) {
            AdminOpcode::IDENTIFY => {
                self.identify(data);
                done
            }
            AdminOpcode::SET_FEATURES => self.set_feature(&sqe, data),
            AdminOpcode::DOORBELL_BUFFER_CONFIG => {
                let second = u64::from(sqe.dwords()[9]) << 32 | u64::from(sqe.dwords()[8]);
                if self.pairs.iter().skip(1).any(Option::is_some) {
                    self.violate("doorbell buffers are set up beside queues".to_owned());
                }
                self.doorbell_buffers = Some((data, second));
                done
            }
            AdminOpcode::CREATE_IO_COMPLETION_QUEUE if known => {
                if self.pairs[pair].is_some() {
                    self.violate(format!("completion queue {queue} is created again"));
                }
                if self.is_unidentified {
                    self.violate(
                        "queues are created of a controller that may be another".to_owned(),
                    );
                }
                self.create_completion_queue(queue, entries, data, sqe.cdw11() & 0b10 != 0);
                done
            }
            AdminOpcode::CREATE_IO_SUBMISSION_QUEUE if known => match &mut self.pairs[pair] {
                Some(pair) if pair.submission.is_none() => {
                    pair.submission = Some(data);
                    done
                }
                _ => (Status::INVALID_QUEUE_ID, 0),
            },
            AdminOpcode::DELETE_IO_SUBMISSION_QUEUE if known => self.delete_submission_queue(queue),
            AdminOpcode::DELETE_IO_COMPLETION_QUEUE if known => match &self.pairs[pair] {
                Some(exists) if exists.submission.is_none() => {
                    self.keep_rings();
                    self.pairs[pair] = None;
                    done
                }
                _ => (Status::INVALID_QUEUE_DELETION, 0),
            },
            AdminOpcode::ABORT => (Status::SUCCESS, self.abort(&sqe)),
            AdminOpcode::GET_FEATURES => {
                self.executed[sqe.cdw2() as usize] += 1;
                done
            }
            other => {
                self.violate(format!("{other} of queue {queue}"));
                (Status::INVALID_OPCODE, 0)
            }
        };
        if let Some(command) = &mut self.commands[id] {
            (command.status, command.result) = answer;
        }
    }

    fn identify(&mut self, data: u64) {
        if self.ledger.owner(data) != Owner::Recovery {
            self.violate("identify data goes to memory of others".to_owned());
        }
        self.is_unidentified = self.strikes(Fault::IdentifyWithoutData);
        if self.is_unidentified {
            return;
        }
        let other = self.strikes(Fault::AnotherIdentity);
        self.is_unidentified = other;
        for (index, value) in IDENTITY.into_iter().enumerate() {
            let value = if other && index == 1 { !value } else { value };
            if let Some(word) = self.memory.word(data + index as u64 * 4) {
                word.store(value.to_le(), Ordering::Relaxed);
            }
        }
    }

    fn set_feature(&mut self, sqe: &Sqe, data: u64) -> Answer {
        let done = (Status::SUCCESS, 0);
        match sqe.cdw10() as u8 {
            feature::id::NUMBER_OF_QUEUES => {
                let asked = NumberOfQueues::pairs(self.traits.queues).into_bits();
                if sqe.cdw11() != asked {
                    self.violate(format!("{:#x} queues are asked for", sqe.cdw11()));
                }
                let fewer = u16::from(self.strikes(Fault::FewerQueues));
                let granted = NumberOfQueues::pairs(self.traits.queues - fewer);
                (Status::SUCCESS, granted.into_bits())
            }
            feature::id::HOST_BEHAVIOR_SUPPORT => {
                let word = self.memory.word(data);
                let first = word.map(|word| u32::from_le(word.load(Ordering::Relaxed)));
                if self.ledger.owner(data) != Owner::Recovery || first != Some(1) {
                    self.violate("Host Behavior Support without ACRE".to_owned());
                }
                done
            }
            feature::id::ASYNC_EVENT_CONFIGURATION => done,
            feature::id::INTERRUPT_COALESCING => {
                if sqe.cdw11() != COALESCING.into_bits() {
                    self.violate(format!("coalescing {:#x}", sqe.cdw11()));
                }
                done
            }
            other => {
                self.violate(format!("feature {other:#x} is set"));
                (Status::INVALID_FIELD, 0)
            }
        }
    }

    pub(super) fn create_completion_queue(
        &mut self,
        queue: u16,
        entries: u32,
        completion: u64,
        vector: bool,
    ) {
        if self.sabotage == Some(Sabotage::StaleRings) {
            self.restore_ring(completion);
        }
        // An old entry would be taken for a new one.
        for index in 0..u64::from(entries) {
            let last = completion + index * 16 + 12;
            let last = self
                .memory
                .word(last)
                .map(|word| word.load(Ordering::Relaxed));
            if last.is_none_or(|word| u32::from_le(word) & super::lies::PHASE != 0) {
                self.violate(format!(
                    "completion queue {queue} is not empty, entry {index}"
                ));
                break;
            }
        }
        let epoch = &mut self.created[usize::from(queue)];
        *epoch += 1;
        self.pairs[usize::from(queue)] = Some(Pair {
            entries,
            submission: None,
            completion,
            head: 0,
            told_tail: 0,
            written_tail: 0,
            written_head: 0,
            told_head: 0,
            tail: 0,
            phase: true,
            waiting: Default::default(),
            last_posted: None,
            completed: Vec::new(),
            vector,
            epoch: *epoch,
        });
    }

    /// Takes back the commands of a queue, and completes some of them.
    fn delete_submission_queue(&mut self, queue: u16) -> Answer {
        let pair = self.pairs[usize::from(queue)].as_mut();
        let Some(pair) = pair.filter(|pair| pair.submission.is_some()) else {
            return (Status::INVALID_QUEUE_ID, 0);
        };
        pair.submission = None;
        for id in 0..self.commands.len() {
            let Some(command) = &mut self.commands[id] else {
                continue;
            };
            if command.queue != queue {
                continue;
            }
            command.status = Status::ABORTED_SQ_DELETION;
            command.effect = Effect::Nothing;
            if self.rng.bool() {
                self.complete(id);
            } else {
                self.commands[id] = None;
            }
        }
        (Status::SUCCESS, 0)
    }

    /// Executes an Abort command; returns its result, bit 0 of which is clear if it has worked.
    fn abort(&mut self, sqe: &Sqe) -> u32 {
        let (queue, cid) = (sqe.cdw10() as u16, (sqe.cdw10() >> 16) as u16);
        let after = self.rng.u64(0..self.traits.times.grace / 2);
        let mut commands = self.commands.iter_mut().enumerate();
        let found = commands.find_map(|(id, command)| {
            let command = command.as_mut()?;
            (command.queue == queue && command.sqe.cid() == cid).then_some((id, command))
        });
        let Some((id, command)) = found else {
            return 1;
        };
        match command.on_abort {
            OnAbort::NotFound => return 1,
            OnAbort::Succeeds => {}
            OnAbort::Aborted => {
                command.status = Status::ABORT_REQUESTED;
                if command.effect != Effect::Done {
                    command.effect = Effect::Nothing;
                }
            }
        }
        self.schedule(after, Event::Complete(id));
        0
    }
}
