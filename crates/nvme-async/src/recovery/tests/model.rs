//! A controller in virtual time, written after the specification and not after the driver.
//!
//! It notes every access of the host that a controller may take amiss, and every one of its own to
//! memory that it may not access any more.

mod admin;
mod commands;
mod lies;
mod registers;
mod rings;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Mutex, MutexGuard};

use fastrand::Rng;
use nvme_spec::feature::InterruptCoalescing;
use nvme_spec::{Sqe, Status};

use super::faults::{Fault, Plan};
use super::memory::{Clock, Ledger, Mapper, Memory};
use crate::engine::sync::lock_std;
use crate::recovery::QueueLayout;
use crate::recovery::action::Place;

pub(super) use self::commands::tagged;
use self::rings::Pair;

/// Logical blocks of the one namespace. A block is one word: the operation that wrote it.
pub(super) const BLOCKS: usize = 12;
/// What the controller is known by: the first bytes of its identify data.
pub(super) const IDENTITY: [u32; 6] = [0x1b36_1af4, 0x30_3053, 0x31, 0x32, 0x33, 0x34];
/// What the host wants of interrupts, if anything.
pub(super) const COALESCING: InterruptCoalescing =
    InterruptCoalescing::new().with_thr(3).with_time(2);
/// What command dword 3 of an operation is if its user allows that it is sent again.
const MAY_REPEAT: u32 = 1;

/// How long things take, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// What the host gives commands.
    pub(super) timeout: u64,
    /// After an Abort.
    pub(super) grace: u64,
    /// What the controller says that enabling and disabling take.
    pub(super) ready: u64,
}

/// What a controller says of itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Traits {
    pub(super) queues: u16,
    /// Abort commands that may be outstanding.
    pub(super) abort_limit: usize,
    /// Asynchronous event requests that may be outstanding.
    pub(super) event_limit: usize,
    pub(super) times: Times,
}

/// What a test of the simulation itself breaks, between driver and device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sabotage {
    /// I/O commands go on after a reset, as if memory were released before the device has stopped.
    EarlyRelease,
    /// The driver takes all commands for repeatable.
    RepeatsWrites,
    /// The supervisor is not told of commands that become overdue during a recovery.
    ForgetsVictims,
    /// Completion queues have their old contents when they are created anew.
    StaleRings,
}

/// What the host notices of it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Output {
    Interrupt(u16),
    /// A fault that is not the controller's.
    Host(Fault),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Execute(usize),
    Complete(usize),
    Interrupt(u16),
    Ready {
        epoch: u32,
    },
    Disabled {
        epoch: u32,
    },
    Strike(Fault, u8),
    /// The registers can be read again.
    Back,
    /// The phase of an entry is as it was.
    PhaseBack {
        queue: u16,
        index: u32,
        phase: bool,
        epoch: u32,
    },
}

/// What is behind the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presence {
    Here,
    Ones,
    Zeroes,
    Unreadable,
}

/// A command that was fetched and is not completed.
struct Command {
    queue: u16,
    sqe: Sqe,
    effect: Effect,
    status: Status,
    result: u32,
    on_abort: OnAbort,
}

/// What executing a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    All,
    /// The first block only.
    Part,
    Nothing,
    Admin,
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnAbort {
    Aborted,
    /// It is said to be aborted, and succeeds nevertheless.
    Succeeds,
    NotFound,
}

/// What the host may rely on.
#[derive(Default)]
struct HostView {
    /// It has seen the controller ready since it enabled it.
    ready: bool,
    /// Queues that exist as far as it knows, with the tail that it has told; the admin queue is
    /// number 0.
    tails: [Option<u32>; 8],
}

pub(super) struct Model {
    clock: Arc<Clock>,
    memory: Memory,
    ledger: Arc<Ledger>,
    rng: Rng,
    pub(super) plan: Plan,
    pub(super) traits: Traits,
    sabotage: Option<Sabotage>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    last_event: u64,
    presence: Presence,
    configuration: u32,
    ready: bool,
    fatal: bool,
    /// Whether it does nothing more until it is reset.
    dead: bool,
    attributes: u32,
    admin_rings: [u64; 2],
    bus_master: bool,
    /// Whether it did not say, since its last reset, that it is the one that was there before.
    is_unidentified: bool,
    closed: bool,
    /// Counts resets.
    epoch: u32,
    layouts: Vec<QueueLayout>,
    pairs: [Option<Pair>; 8],
    created: [u32; 8],
    commands: Vec<Option<Command>>,
    host: HostView,
    /// Where the values of doorbells are in memory, and the event indices.
    doorbell_buffers: Option<(u64, u64)>,
    /// Where the host leaves the values, though the controller may have forgotten that.
    shadows: Option<u64>,
    /// What completion queues had in them when the host gave them up.
    old_rings: Vec<(u64, Vec<u32>)>,
    pub(super) blocks: [u32; BLOCKS],
    /// How often each operation was fetched and executed.
    fetched: Vec<u8>,
    executed: Vec<u8>,
    /// When the device was first told of each operation, and what was allowed until then.
    told: Vec<Option<(u64, u64)>>,
    pub(super) lies: u32,
    /// How long the host may have waited so far for answers to the commands of recoveries, for
    /// registers, and for threads.
    pub(super) allowance: u64,
    allowed_until: u64,
    violations: Vec<String>,
}

/// A model controller as a device of the driver.
pub(super) struct Controller {
    model: Mutex<Model>,
    mapper: Arc<Mapper>,
}

impl Controller {
    pub(super) fn new(model: Model) -> Arc<Self> {
        let mapper = model.memory.mapper.clone();
        let model = Mutex::new(model);
        Arc::new(Self { model, mapper })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Model> {
        lock_std(&self.model)
    }
}

impl Model {
    pub(super) fn new(
        clock: Arc<Clock>,
        memory: Memory,
        ledger: Arc<Ledger>,
        mut rng: Rng,
        plan: Plan,
        traits: Traits,
        sabotage: Option<Sabotage>,
    ) -> Self {
        let mut model = Self {
            clock,
            memory,
            ledger,
            rng: rng.fork(),
            plan,
            traits,
            sabotage,
            events: BinaryHeap::new(),
            last_event: 0,
            presence: Presence::Here,
            configuration: 0,
            ready: false,
            fatal: false,
            dead: false,
            attributes: 0,
            admin_rings: [0; 2],
            bus_master: false,
            is_unidentified: false,
            closed: false,
            epoch: 0,
            layouts: Vec::new(),
            pairs: Default::default(),
            created: [0; 8],
            commands: Vec::new(),
            host: HostView::default(),
            doorbell_buffers: None,
            shadows: None,
            old_rings: Vec::new(),
            blocks: [0; BLOCKS],
            fetched: Vec::new(),
            executed: Vec::new(),
            told: Vec::new(),
            lies: 0,
            allowance: 0,
            allowed_until: 0,
            violations: Vec::new(),
        };
        for index in 0..model.plan.moments().len() {
            let (at, fault) = model.plan.moments()[index];
            model.schedule_at(at, Event::Strike(fault, 20));
        }
        model
    }

    /// What it or the host did that may not be.
    pub(super) fn violation(&mut self) -> Option<String> {
        self.violations.pop()
    }

    fn violate(&mut self, what: String) {
        self.violations.insert(0, what);
    }

    pub(super) fn next_event(&self) -> Option<u64> {
        self.events.peek().map(|Reverse((at, ..))| *at)
    }

    /// How often an operation was executed.
    pub(super) fn executions(&self, operation: u32) -> u8 {
        let index = operation as usize;
        self.executed.get(index).copied().unwrap_or_default()
    }

    /// When it was first told of an operation, and what was allowed until then.
    pub(super) fn told(&self, operation: u32) -> Option<(u64, u64)> {
        self.told.get(operation as usize).copied().flatten()
    }

    /// Brings it up, with the admin queue first.
    pub(super) fn begin(&mut self, layouts: &[QueueLayout], buffers: Option<(u64, u64)>) {
        self.doorbell_buffers = buffers;
        self.shadows = buffers.map(|(values, _)| values);
        self.bus_master = true;
        self.configuration = 1;
        self.host.ready = true;
        self.ready = true;
        for layout in layouts {
            let QueueLayout { id, entries, .. } = *layout;
            self.create_completion_queue(id, entries.into(), layout.completion, true);
            if let Some(pair) = &mut self.pairs[usize::from(id)] {
                pair.submission = Some(layout.submission);
            }
            self.host.tails[usize::from(id)] = Some(0);
        }
        self.layouts = layouts.to_vec();
    }

    /// The host may wait so long from now on.
    fn allow(&mut self, micros: u64) {
        self.allowance += micros;
        self.allowed_until = self.allowed_until.max(self.micros() + micros);
    }

    /// What was allowed for and is over.
    pub(super) fn allowance_so_far(&self) -> u64 {
        let to_come = self.allowed_until.saturating_sub(self.micros());
        self.allowance.saturating_sub(to_come)
    }

    fn micros(&self) -> u64 {
        self.clock.micros()
    }

    fn schedule_at(&mut self, at: u64, event: Event) {
        self.last_event += 1;
        self.events.push(Reverse((at, self.last_event, event)));
    }

    fn schedule(&mut self, after: u64, event: Event) {
        self.schedule_at(self.micros() + after, event);
    }

    fn strikes(&mut self, fault: Fault) -> bool {
        let strikes = self.plan.strikes(&mut self.rng, fault);
        if strikes {
            self.clock.tell(|| format!("{fault:?}"));
        }
        strikes
    }

    /// Whether it works on commands.
    fn works(&self) -> bool {
        self.ready && !self.dead && self.bus_master && self.presence != Presence::Zeroes
    }

    /// Recovery has gone a step: something may happen to it.
    pub(super) fn meddle(&mut self, place: Place) {
        if let Some(fault) = self.plan.meddles(&mut self.rng, place) {
            let after = if self.rng.bool() { 20 } else { 1000 };
            let after = self.rng.u64(0..after);
            self.schedule(after, Event::Strike(fault, 0));
        }
    }

    /// Does one thing that is due; what the host notices of it.
    pub(super) fn turn(&mut self) -> Option<Output> {
        self.note_shadows();
        let Reverse((at, _, event)) = self.events.pop()?;
        debug_assert!(at <= self.micros());
        match event {
            Event::Execute(id) => self.execute(id),
            Event::Complete(id) => self.complete(id),
            Event::Interrupt(queue) => return Some(Output::Interrupt(queue)),
            Event::Ready { epoch } if epoch == self.epoch => self.become_ready(),
            Event::Disabled { epoch } if epoch == self.epoch => self.stop(),
            Event::Ready { .. } | Event::Disabled { .. } => {}
            Event::Strike(fault, attempts) => return self.strike(fault, attempts),
            Event::Back => self.presence = Presence::Here,
            Event::PhaseBack {
                queue,
                index,
                phase,
                epoch,
            } => self.phase_back(queue, index, phase, epoch),
        }
        None
    }

    fn strike(&mut self, fault: Fault, attempts: u8) -> Option<Output> {
        if self.plan.is_calm() || self.closed {
            return None;
        }
        // A command of a recovery may stay unanswered that would have been answered.
        self.allow(self.traits.times.timeout);
        match fault {
            lie if lie.is_lie() => {
                if self.lie(lie) {
                    self.clock.tell(|| format!("{lie:?}"));
                    self.plan.note(lie);
                    self.lies += 1;
                } else if attempts > 0 {
                    let after = self.rng.u64(20..2000);
                    self.schedule(after, Event::Strike(fault, attempts - 1));
                }
                return None;
            }
            Fault::Fatal | Fault::FatalAndAlive => {
                if !self.ready {
                    return None;
                }
                self.fatal = true;
                self.dead = fault == Fault::Fatal;
            }
            Fault::AllOnes | Fault::AllOnesForAWhile => {
                self.presence = Presence::Ones;
                if fault == Fault::AllOnes {
                    self.dead = true;
                } else {
                    let after = self.rng.u64(10..30_000);
                    self.schedule(after, Event::Back);
                }
            }
            Fault::AllZeroes => {
                self.presence = Presence::Zeroes;
            }
            Fault::RegistersUnreadable => self.presence = Presence::Unreadable,
            Fault::StateLost => {
                self.stop();
                self.configuration = 0;
            }
            Fault::Event => {
                let is_request = |command: &Option<Command>| {
                    command.as_ref().is_some_and(Command::is_event_request)
                };
                let id = self.commands.iter().position(is_request)?;
                if let Some(command) = &mut self.commands[id] {
                    // A notice; log page 04h.
                    command.result = 0x04_0002;
                }
                self.complete(id);
            }
            host => return Some(Output::Host(host)),
        }
        self.clock.tell(|| format!("{fault:?}"));
        self.plan.note(fault);
        None
    }

    fn become_ready(&mut self) {
        self.ready = true;
        let [asqs, acqs] = [self.attributes & 0xfff, self.attributes >> 16 & 0xfff];
        if asqs != acqs {
            self.violate(format!("admin queues of {asqs} and {acqs} entries"));
        }
        let [submission, completion] = self.admin_rings;
        self.create_completion_queue(0, asqs + 1, completion, true);
        if let Some(pair) = &mut self.pairs[0] {
            pair.submission = Some(submission);
        }
        self.host.tails[0] = Some(0);
    }

    /// Forgets everything and does nothing more: a reset.
    fn stop(&mut self) {
        self.clock.tell(|| "the controller is reset".to_owned());
        self.ready = false;
        self.fatal = false;
        self.dead = false;
        self.is_unidentified = false;
        self.epoch += 1;
        self.pairs = Default::default();
        self.doorbell_buffers = None;
        let goes_on = self.sabotage == Some(Sabotage::EarlyRelease);
        for command in &mut self.commands {
            if !goes_on || command.as_ref().is_some_and(|command| command.queue == 0) {
                *command = None;
            }
        }
    }
}
