//! One history: the real queue pairs, engine and supervisor in virtual time, against the model.

mod begin;
mod check;
mod io;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use tokio::sync::watch;

use super::disk::History;
use super::faults::{Fault, FaultSet};
use super::host::{Drain, Operation, Reaper, Sleeper, Stage, Woken};
use super::memory::{Clock, Ledger, Memory};
use super::model::{Controller, Output, Sabotage};
use crate::device::Notice;
use crate::engine::SharedQueue;
use crate::engine::sync::lock_std;
use crate::engine::trouble::{Inbox, Trouble};
use crate::recovery::ControllerState;
use crate::recovery::action::Place;
use crate::recovery::supervisor::{Next, Supervisor};

/// What is to be done by the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Task {
    /// Some operations are started.
    Submit,
    /// Somebody who was woken is polled.
    Poll(Sleeper),
    Timer(u16),
    Supervise,
    /// The future of some operation is dropped.
    Drop,
    Drain,
    /// An event was dealt with: the next one is asked for.
    RequestEvent,
    RuntimeIsBack,
}

/// What a history leaves.
pub(super) struct Summary {
    pub(super) trail: Vec<Place>,
    pub(super) faults: FaultSet,
    pub(super) operations: u64,
}

/// How far a history is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Busy,
    /// No more faults; what there is comes to its end.
    Calm,
    /// Everything is read; so many attempts are left.
    Probing(u8),
    /// The controller is given up; until then it is watched.
    Ended {
        until: u64,
    },
}

pub(super) struct Simulation {
    rng: Rng,
    clock: Arc<Clock>,
    memory: Memory,
    ledger: Arc<Ledger>,
    controller: Arc<Controller>,
    sabotage: Option<Sabotage>,
    /// The admin queue first.
    queues: Vec<Arc<SharedQueue>>,
    reapers: Vec<Reaper>,
    supervisor: Supervisor,
    /// Whether the supervisor's work is done.
    over: bool,
    /// When the supervisor's thread runs next.
    supervise_at: Option<u64>,
    /// The longest that it takes to.
    thread_lag: u64,
    /// The longest that a task takes from being woken to being polled.
    task_lag: u64,
    inbox: Arc<Inbox>,
    state: Arc<watch::Sender<ControllerState>>,
    tasks: BinaryHeap<Reverse<(u64, u64, Task)>>,
    last_task: u64,
    woken: Woken,
    operations: Vec<Operation>,
    drains: Vec<Drain>,
    history: History,
    /// Operations that are still to be started.
    remaining: usize,
    phase: Phase,
    /// The operations that read everything at the end, and whether they have.
    probes: Vec<(u32, bool)>,
    /// Whether nobody polls the runtime's tasks.
    absent: bool,
    /// How long that goes on, in microseconds.
    absence: u64,
    /// Who was woken meanwhile.
    missed: Vec<Sleeper>,
    /// Of a command's Abort, and after it.
    abort_micros: u64,
    fails_fast: bool,
    /// How many operations of twenty are admin commands.
    admin_share: u8,
    /// Between two submissions.
    pace: u64,
}

impl Simulation {
    /// Plays the history of `seed`; an error if something happens in it that may not.
    pub(super) fn run(
        seed: u64,
        memory: &Memory,
        sabotage: Option<Sabotage>,
    ) -> Result<Summary, String> {
        let mut simulation = Self::begin(seed, memory, sabotage);
        let result = simulation.play();
        let trace = |error| {
            let at = simulation.clock.micros();
            let trail = &simulation.supervisor.trail;
            format!("at {at} µs: {error}; recovery went {trail:?}")
        };
        result.map_err(trace)?;
        Ok(Summary {
            faults: simulation.controller.lock().plan.struck(),
            operations: simulation.operations.len() as u64,
            trail: std::mem::take(&mut simulation.supervisor.trail),
        })
    }

    fn play(&mut self) -> Result<(), String> {
        const LONGEST: u64 = 200_000_000;
        const MOST_EVENTS: u32 = 500_000;
        for _ in 0..MOST_EVENTS {
            self.wake();
            let of_device = self.controller.lock().next_event();
            let of_host = self.tasks.peek().map(|Reverse((at, ..))| *at);
            let Some(at) = of_device.into_iter().chain(of_host).min() else {
                if self.phase != Phase::Busy && self.place() == Place::Ended {
                    return self.check_end();
                }
                return Err(self.stuck("nothing is going to happen"));
            };
            if at > LONGEST {
                return Err(self.stuck("it takes for ever"));
            }
            self.clock.set(at.max(self.clock.micros()));
            if of_device == Some(at) {
                let output = self.controller.lock().turn();
                if let Some(output) = output {
                    self.notice(output);
                }
            } else if let Some(Reverse((at, _, task))) = self.tasks.pop() {
                self.perform(at, task)?;
            }
            if let Some(violation) = self.controller.lock().violation() {
                return Err(violation);
            }
            if self.move_on()? {
                return self.check_end();
            }
        }
        Err(self.stuck("it goes round in circles"))
    }

    fn schedule(&mut self, after: u64, task: Task) {
        self.last_task += 1;
        let at = self.clock.micros() + after;
        self.tasks.push(Reverse((at, self.last_task, task)));
    }

    /// The host notices something of the device, or has a fault of its own.
    fn notice(&mut self, output: Output) {
        match output {
            Output::Interrupt(queue) => self.look_soon(queue),
            Output::Host(fault) => {
                let notice = match fault {
                    Fault::NoticeRelease => Some(Notice::ReleaseRequested),
                    Fault::NoticeFailed => Some(Notice::Failed),
                    _ => None,
                };
                match notice {
                    Some(notice) => self.inbox.report(Trouble::Notice(notice)),
                    None if self.absent => return,
                    None => self.lose_runtime(fault == Fault::RuntimeEnds),
                }
                self.clock.tell(|| format!("{fault:?}"));
                self.controller.lock().plan.note(fault);
            }
        }
    }

    /// Passes on who was woken, and lets the supervisor's thread run if something was reported.
    fn wake(&mut self) {
        let woken = std::mem::take(&mut *lock_std(&self.woken));
        for who in woken {
            if self.absent {
                self.missed.push(who);
            } else if let Sleeper::Reaper(queue) = who {
                self.look_soon(queue);
            } else {
                let after = self.rng.u64(0..self.task_lag);
                self.schedule(after, Task::Poll(who));
            }
        }
        if self.sabotage == Some(Sabotage::ForgetsVictims) {
            self.forget_victims();
        }
        if !self.inbox.is_empty() && !self.over {
            let lag = self.rng.u64(0..=self.thread_lag);
            let at = self.clock.micros() + lag;
            if self.supervise_at.is_none_or(|before| before > at) {
                self.supervise_at = Some(at);
                self.schedule(lag, Task::Supervise);
                self.controller.lock().allowance += lag;
            }
        }
    }

    fn perform(&mut self, at: u64, task: Task) -> Result<(), String> {
        match task {
            Task::Submit => self.submit(),
            Task::Poll(Sleeper::Operation(number)) => self.poll(number),
            Task::Poll(Sleeper::Reaper(queue)) => self.reap(queue),
            Task::Poll(Sleeper::Drain(index)) => self.poll_drain(index),
            Task::Timer(queue) => {
                let reaper = &mut self.reapers[usize::from(queue)];
                if reaper.timer == Some(at) {
                    reaper.timer = None;
                    reaper.idle_checks += 1;
                    self.look_soon(queue);
                }
                Ok(())
            }
            Task::Supervise => {
                if self.supervise_at == Some(at) {
                    self.supervise_at = None;
                    self.supervise()?;
                }
                Ok(())
            }
            Task::Drop => self.drop_one(),
            Task::Drain => self.begin_drain(),
            Task::RequestEvent => {
                self.queues[0].with(|state| state.request_event());
                Ok(())
            }
            Task::RuntimeIsBack => {
                self.clock.tell(|| "the runtime is back".to_owned());
                self.absent = false;
                self.controller.lock().allowance += self.absence;
                let missed = std::mem::take(&mut self.missed);
                lock_std(&self.woken).extend(missed);
                for queue in 0..self.queues.len() as u16 {
                    self.look_soon(queue);
                }
                Ok(())
            }
        }
    }

    /// What the supervisor's thread does when it runs.
    fn supervise(&mut self) -> Result<(), String> {
        if self.over {
            return Ok(());
        }
        let clock = self.clock.clone();
        let known = self.supervisor.trail.len();
        let next = self.supervisor.step(&|| clock.now());
        let gone = &self.supervisor.trail[known..];
        if !gone.is_empty() {
            self.clock.tell(|| format!("recovery goes {gone:?}"));
            self.controller.lock().meddle(self.supervisor.place());
        }
        self.check_state()?;
        match next {
            Next::Never => {}
            Next::At(at) => {
                let at = self.clock.since_begin(at).max(self.clock.micros());
                let after = at - self.clock.micros();
                self.supervise_at = Some(at);
                self.schedule(after, Task::Supervise);
            }
            Next::Over => self.over = true,
        }
        Ok(())
    }

    fn forget_victims(&mut self) {
        if self.inbox.is_empty() {
            return;
        }
        let is_live = self.place() == Place::Live;
        for trouble in self.inbox.take() {
            if is_live || !matches!(trouble, Trouble::Overdue { .. }) {
                self.inbox.report(trouble);
            }
        }
    }

    fn lose_runtime(&mut self, ends: bool) {
        self.absent = true;
        let after = self.rng.u64(1000..150_000);
        self.absence = after;
        self.schedule(after, Task::RuntimeIsBack);
        if !ends {
            return;
        }
        for (queue, reaper) in self.queues.iter().zip(&mut self.reapers) {
            reaper.timer = None;
            if let Some(term) = reaper.term.take() {
                queue.attend(|state, aftermath| state.vacate(term, aftermath));
            }
        }
    }

    /// Goes to the next phase if this one is over; whether the history is.
    fn move_on(&mut self) -> Result<bool, String> {
        let waiting = self.remaining > 0 || self.is_anybody_waiting();
        let ended = self.place() == Place::Ended;
        let now = self.clock.micros();
        match self.phase {
            _ if waiting => {}
            Phase::Busy => {
                self.controller.lock().plan.calm();
                self.phase = Phase::Calm;
                // Where the runtime has ended and nobody waits, the next one to use a queue takes
                // care of what is outstanding.
                for queue in 0..self.queues.len() as u16 {
                    self.claim(queue);
                }
                return self.move_on();
            }
            Phase::Ended { until } => return Ok(now >= until),
            Phase::Calm | Phase::Probing(_) if ended => {
                let until = now + 50_000;
                self.phase = Phase::Ended { until };
            }
            Phase::Calm if self.is_idle() => self.probe(3)?,
            Phase::Calm => {}
            Phase::Probing(attempts) => {
                if self.all_was_read() {
                    return Ok(self.is_idle());
                }
                if attempts == 0 {
                    return Err("a controller that is live can't be read".to_owned());
                }
                if self.is_idle() {
                    self.probe(attempts - 1)?;
                }
            }
        }
        Ok(false)
    }

    fn place(&self) -> Place {
        self.supervisor.place()
    }

    fn stuck(&self, why: &str) -> String {
        let waits = |operation: &&Operation| matches!(operation.stage, Stage::Waiting { .. });
        let open = self.operations.iter().filter(waits);
        let watched = self.queues.iter().map(|queue| {
            queue.with(|state| {
                (
                    state.is_watched(),
                    state.in_flight(),
                    state.completion_ready(),
                )
            })
        });
        let watched = watched.collect::<Vec<_>>();
        let timers = self
            .reapers
            .iter()
            .map(|reaper| (reaper.timer, reaper.is_due));
        let timers = timers.collect::<Vec<_>>();
        format!(
            "{why}: {:?}, {:?}, queues (watched, in flight, ready) {watched:?}, reapers {timers:?}, \
             memory of {:?}, {} to come; open: {:?}",
            self.phase,
            self.place(),
            self.ledger.operations(),
            self.remaining,
            open.collect::<Vec<_>>()
        )
    }
}

/// A duration of so many microseconds.
fn micros(micros: u64) -> Duration {
    Duration::from_micros(micros)
}
