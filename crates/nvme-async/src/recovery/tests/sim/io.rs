//! Operations of users, and reapers, as the futures of the engine have them.

use bytes::Bytes;
use nvme_spec::admin::{FeatureSelect, get_features};
use nvme_spec::{DataPointer, nvm};

use super::{Simulation, Task};
use crate::engine::state::{Command, Here, Look, Outcome, Place, Progress, Refusal};
use crate::engine::{Notification, State};
use crate::io::{Holdings, Payload};
use crate::recovery::tests::host::{Drain, Kind, Operation, Sleeper, Stage, waker};
use crate::recovery::tests::memory::Loan;
use crate::recovery::tests::model::{BLOCKS, Sabotage, tagged};

/// What is in memory before a read; no operation has this number.
const UNREAD: u32 = u32::MAX;

/// What a look at an operation found.
enum Polled {
    Done((Outcome, Payload)),
    Waiting { driven: bool },
    WakesAnother,
}

impl Simulation {
    /// Starts some operations, and sees to it that others follow.
    pub(super) fn submit(&mut self) -> Result<(), String> {
        if self.absent {
            self.schedule(2000, Task::Submit);
            return Ok(());
        }
        let count = self.rng.usize(1..=8).min(self.remaining);
        self.remaining -= count;
        for _ in 0..count {
            self.start_any()?;
        }
        let pause = self.rng.u64(0..self.pace * 2);
        if self.rng.u8(0..3) == 0 {
            let after = self.rng.u64(0..self.pace * 2);
            self.schedule(after, Task::Drop);
        }
        if self.rng.u8(0..8) == 0 {
            self.schedule(pause / 2, Task::Drain);
        }
        if self.remaining > 0 {
            self.schedule(pause, Task::Submit);
        }
        Ok(())
    }

    fn start_any(&mut self) -> Result<(), String> {
        let kind = match self.rng.u8(0..20) {
            share if share < self.admin_share => Kind::Admin,
            19 => Kind::Flush,
            10.. => Kind::Read,
            _ => Kind::Write,
        };
        let queues = self.queues.len() as u16;
        let queue = if kind == Kind::Admin {
            0
        } else {
            self.rng.u16(1..queues)
        };
        let blocks = match kind {
            Kind::Read | Kind::Write => {
                let count = self.rng.usize(1..=4);
                let first = self.rng.usize(0..=BLOCKS - count);
                first..first + count
            }
            Kind::Flush | Kind::Admin => 0..0,
        };
        let may_repeat = match kind {
            Kind::Write => self.rng.u8(0..5) == 0,
            _ => self.rng.u8(0..5) != 0,
        };
        let most = self.controller.lock().traits.times.timeout;
        let timeout = if kind == Kind::Admin && self.admin_share > 1 {
            most / 4
        } else if self.rng.bool() {
            most
        } else {
            self.rng.u64(most / 4..most)
        };
        let allowance = self.controller.lock().allowance_so_far();
        let operation = Operation {
            kind,
            queue,
            blocks,
            may_repeat,
            timeout,
            began: self.clock.micros(),
            allowance,
            stage: Stage::Resolved,
        };
        self.start(operation).map(drop)
    }

    /// Starts an operation; returns its number.
    pub(super) fn start(&mut self, operation: Operation) -> Result<u32, String> {
        let number = self.operations.len() as u32 + 1;
        let blocks = operation.blocks.clone();
        let (slba, count) = (blocks.start as u64, blocks.len() as u32);
        let mut holdings = Holdings::default();
        let sqe = match operation.kind {
            Kind::Flush => nvm::flush(1),
            Kind::Admin => get_features(1, FeatureSelect::Current),
            Kind::Read | Kind::Write => {
                let is_write = operation.kind == Kind::Write;
                let mut loan = Loan::new(&self.memory, &self.ledger, number);
                for index in 0..blocks.len() {
                    loan.store(index, if is_write { number } else { UNREAD });
                }
                let prp1 = loan.iova();
                holdings.payload = Payload::Bytes(Bytes::from_owner(loan));
                let sqe = if is_write {
                    self.history.write_begins(number, blocks, operation.began);
                    nvm::write(1, slba, count, false)
                } else {
                    nvm::read(1, slba, count, false)
                };
                sqe.with_data(DataPointer::Prp { prp1, prp2: 0 })
            }
        };
        let repeats = self.sabotage == Some(Sabotage::RepeatsWrites);
        let command = Command {
            sqe: tagged(sqe, number, operation.may_repeat),
            timeout: Some(super::micros(operation.timeout)),
            repeatable: operation.may_repeat || repeats,
        };
        let queue = operation.queue;
        self.clock
            .tell(|| format!("operation {number} is started: {operation:?}"));
        self.operations.push(operation);
        let now = self.clock.now();
        loop {
            let shared = &self.queues[usize::from(queue)];
            let waker = waker(Sleeper::Operation(number), &self.woken);
            let started = shared.attend(|state, aftermath| {
                let here = Here::now();
                state.start(
                    &command,
                    holdings.as_mut(),
                    &mut Some(waker),
                    here,
                    now,
                    aftermath,
                )
            });
            match started.ok_or("a queue was taken away")? {
                Ok(Progress::Done(outcome)) => {
                    self.resolve(number, (outcome, holdings.payload))?;
                }
                Ok(Progress::Waiting { key }) => {
                    self.operations[number as usize - 1].stage = Stage::Waiting { key };
                }
                Err(Refusal::Failed(failure)) => {
                    self.resolve(number, (Err(failure.into()), holdings.payload))?;
                }
                Err(Refusal::NoReaper) => {
                    self.claim(queue);
                    continue;
                }
            }
            return Ok(number);
        }
    }

    /// Polls an operation, as its future would.
    pub(super) fn poll(&mut self, number: u32) -> Result<(), String> {
        if self.absent {
            self.missed.push(Sleeper::Operation(number));
            return Ok(());
        }
        let operation = &self.operations[number as usize - 1];
        let Stage::Waiting { key } = operation.stage else {
            return Ok(());
        };
        let queue = operation.queue;
        let own = waker(Sleeper::Operation(number), &self.woken);
        let mut fresh = None;
        loop {
            let mut holdings = Holdings::default();
            let polled = self.queues[usize::from(queue)].with(|state| {
                match state.take_outcome(key, holdings.as_mut()) {
                    Some(outcome) => Polled::Done((outcome, std::mem::take(&mut holdings.payload))),
                    None if state.will_wake(key, &own, &mut fresh) => Polled::Waiting {
                        driven: state.has_reaper(Here::now()),
                    },
                    None => Polled::WakesAnother,
                }
            });
            match polled.ok_or("a queue was taken away")? {
                Polled::Done(outcome) => return self.resolve(number, outcome),
                Polled::Waiting { driven: true } => return Ok(()),
                Polled::Waiting { driven: false } => {
                    self.claim(queue);
                    return Ok(());
                }
                Polled::WakesAnother => fresh = Some(own.clone()),
            }
        }
    }

    /// Provides a reaper for a queue that has none.
    pub(super) fn claim(&mut self, queue: u16) {
        let term = self.queues[usize::from(queue)].with(|state| state.claim_reaper(Here::now()));
        if let Some(term) = term.flatten() {
            self.reapers[usize::from(queue)].term = Some(term);
            self.look_soon(queue);
        }
    }

    /// Lets a queue's reaper run.
    pub(super) fn look_soon(&mut self, queue: u16) {
        let is_due = &mut self.reapers[usize::from(queue)].is_due;
        if !std::mem::replace(is_due, true) {
            let after = self.rng.u64(0..self.task_lag);
            self.schedule(after, Task::Poll(Sleeper::Reaper(queue)));
        }
    }

    /// One turn of a queue's reaper.
    pub(super) fn reap(&mut self, queue: u16) -> Result<(), String> {
        let index = usize::from(queue);
        self.reapers[index].is_due = false;
        if self.absent {
            self.missed.push(Sleeper::Reaper(queue));
            return Ok(());
        }
        let Some(term) = self.reapers[index].term else {
            return Ok(());
        };
        let now = self.clock.now();
        let idle_checks = self.reapers[index].idle_checks;
        let waker = waker(Sleeper::Reaper(queue), &self.woken);
        let turn = self.queues[index].attend(|state, aftermath| {
            state.seat(term)?.awake(aftermath);
            let taken = state.reap(Look::Interrupted, now, aftermath);
            state.expire(now, aftermath);
            let again = state.completion_ready();
            let next_look = state.next_check(now, idle_checks);
            state.ring_deferred();
            if !again {
                state.seat(term)?.place = Place::Asleep {
                    waker,
                    next_look,
                    pause: None,
                };
            }
            Some((taken, again, next_look, state.take_events()))
        });
        let Some((taken, again, next_look, events)) = turn.flatten() else {
            self.reapers[index].term = None;
            return Ok(());
        };
        if taken > 0 {
            self.reapers[index].idle_checks = 0;
        }
        if again {
            self.look_soon(queue);
        } else if let Some(next_look) = next_look {
            let at = self.clock.since_begin(next_look);
            let after = at.saturating_sub(self.clock.micros()).max(1);
            self.reapers[index].timer = Some(self.clock.micros() + after);
            self.schedule(after, Task::Timer(queue));
        }
        for event in events {
            if let Notification::Event(_) = event {
                let after = self.rng.u64(50..500);
                self.schedule(after, Task::RequestEvent);
            }
        }
        Ok(())
    }

    /// Drops the future of one operation that is not done.
    pub(super) fn drop_one(&mut self) -> Result<(), String> {
        let waiting = |operation: &Operation| match operation.stage {
            Stage::Waiting { key } => Some((operation.queue, key)),
            _ => None,
        };
        // One of those that were started last.
        let first = self.operations.len().saturating_sub(20);
        let recent = first..self.operations.len();
        let candidates: Vec<_> = recent
            .filter_map(|index| Some((index, waiting(&self.operations[index])?)))
            .collect();
        if let Some((index, (queue, key))) = self.rng.choice(candidates) {
            self.clock
                .tell(|| format!("operation {} is dropped", index + 1));
            self.operations[index].stage = Stage::Dropped;
            let queue = &self.queues[usize::from(queue)];
            queue.attend(|state, aftermath| state.abandon(key, aftermath));
        }
        Ok(())
    }

    pub(super) fn begin_drain(&mut self) -> Result<(), String> {
        let queue = self.rng.u16(1..self.queues.len() as u16);
        let key = self.queues[usize::from(queue)].with(State::begin_drain);
        self.drains.push(Drain {
            queue,
            key: key.ok_or("a queue was taken away")?,
            mark: self.operations.len() as u32,
            done: false,
        });
        self.poll_drain(self.drains.len() - 1)
    }

    pub(super) fn poll_drain(&mut self, index: usize) -> Result<(), String> {
        let who = Sleeper::Drain(index);
        if self.absent {
            self.missed.push(who);
            return Ok(());
        }
        let Drain {
            queue,
            key,
            mark,
            done,
        } = self.drains[index];
        if done {
            return Ok(());
        }
        let mut waker = Some(waker(who, &self.woken));
        let polled = self.queues[usize::from(queue)].with(|state| {
            (
                state.poll_drain(key, &mut waker),
                state.has_reaper(Here::now()),
            )
        });
        match polled.ok_or("a queue was taken away")? {
            (Some(result), _) => {
                self.drains[index].done = true;
                self.queues[usize::from(queue)].with(|state| state.end_drain(key));
                self.check_drained(queue, mark, result)
            }
            (None, driven) => {
                if !driven {
                    self.claim(queue);
                }
                Ok(())
            }
        }
    }
}
