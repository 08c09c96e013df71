//! One event loop on one core, with one device, in virtual time.
//!
//! It submits what arrives, takes what is completed, runs the jobs of a neighbour, and when there is
//! nothing left to do, waits as its policy says.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use fastrand::Rng;
use hdrhistogram::Histogram;

use crate::policy::{Kind, Nanos, Plan, Policy, Situation, Then, Waited};
use crate::trace::{Trace, Work};

/// CPU time of one submission and of one completion.
const SUBMIT: Nanos = 250;
const COMPLETE: Nanos = 250;
/// How long after it has come an event is noticed by polling.
const LOOK: Nanos = 50;

/// What sleeping costs on a machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    pub(crate) name: &'static str,
    /// CPU time of going to sleep and waking up.
    pub(crate) wake_cpu: Nanos,
    /// From an event to the loop's first instruction.
    pub(crate) wake_latency: Nanos,
}

/// What came of a policy on a trace.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// How much later than the device completed it each command was taken, in nanoseconds.
    pub(crate) added: Histogram<u64>,
    /// CPU time that submitting, waiting and completing took; not that of the neighbour, nor that of
    /// waking up for others than the device.
    pub(crate) cpu: Nanos,
}

impl Outcome {
    pub(crate) fn new() -> Self {
        Self {
            added: Histogram::new(3).expect("three digits are possible"),
            cpu: 0,
        }
    }

    pub(crate) fn cpu_per_io(&self) -> f64 {
        self.cpu as f64 / self.added.len().max(1) as f64
    }

    pub(crate) fn percentile(&self, percent: f64) -> u64 {
        self.added.value_at_quantile(percent / 100.0)
    }

    /// Takes another run of the same in.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.added.add(&other.added).expect("the same bounds");
        self.cpu += other.cpu;
    }
}

#[derive(Clone, Copy, Debug)]
struct Command {
    submitted: Nanos,
    kind: Kind,
}

struct Host<'a> {
    now: Nanos,
    machine: Machine,
    policy: &'a mut dyn Policy,
    work: Work,
    /// What the device has, in the order of submission.
    outstanding: VecDeque<(u64, Command)>,
    /// When the device completes what it has.
    completions: BinaryHeap<Reverse<(Nanos, u64)>>,
    next_id: u64,
    last_progress: Nanos,
    wake_times: Rng,
    outcome: Outcome,
}

/// Runs a policy on a trace, and returns what came of it. With the same seed all policies meet the same
/// arrivals, and commands that take the same times.
pub(crate) fn run(trace: &Trace, seed: u64, machine: Machine, policy: &mut dyn Policy) -> Outcome {
    let mut host = Host {
        now: 0,
        machine,
        policy,
        work: trace.begin(seed),
        outstanding: VecDeque::new(),
        completions: BinaryHeap::new(),
        next_id: 0,
        last_progress: 0,
        wake_times: Rng::with_seed(seed ^ 0x_3a4e),
        outcome: Outcome::new(),
    };
    while host.turn() {}
    host.outcome
}

impl Host<'_> {
    /// Does what there is to do, or waits; returns whether there will be more.
    fn turn(&mut self) -> bool {
        let device = self.take();
        let mut other = false;
        while self.work.arrival().is_some_and(|at| at <= self.now) {
            self.submit();
            other = true;
        }
        if !device
            && !other
            && let Some(length) = self.work.run_job(self.now)
        {
            self.now += length;
            other = true;
        }
        if device || other {
            self.policy.went_on(device, other);
            return true;
        }
        self.wait()
    }

    fn submit(&mut self) {
        let kind = self.work.arrive();
        self.now += SUBMIT;
        self.outcome.cpu += SUBMIT;
        if self.outstanding.is_empty() {
            self.policy.rested(self.now - self.last_progress);
            self.last_progress = self.now;
        }
        let end = self.work.serve(self.now, kind);
        let command = Command {
            submitted: self.now,
            kind,
        };
        self.completions.push(Reverse((end, self.next_id)));
        self.outstanding.push_back((self.next_id, command));
        self.next_id += 1;
    }

    /// Takes what is completed; returns whether something was.
    fn take(&mut self) -> bool {
        let found = self.now;
        let before = self.outstanding.len();
        let kind = self.oldest();
        let mut taken = 0;
        while let Some(&Reverse((at, id))) = self.completions.peek()
            && at <= self.now
        {
            self.completions.pop();
            let place = self.outstanding.iter().position(|&(other, _)| other == id);
            let (_, command) = place
                .and_then(|place| self.outstanding.remove(place))
                .expect("what completes is outstanding");
            debug_assert!(command.submitted <= at);
            let added = self.outcome.added.record(self.now - at);
            added.expect("it grows as needed");
            self.work.completed(self.now);
            taken += 1;
            self.now += COMPLETE;
            self.outcome.cpu += COMPLETE;
        }
        if taken > 0 {
            let gap = found - self.last_progress;
            self.policy.progressed(gap, before, kind);
            self.last_progress = found;
        }
        taken > 0
    }

    fn oldest(&self) -> Kind {
        self.outstanding
            .front()
            .map_or(Kind::Read, |(_, command)| command.kind)
    }

    /// Waits for the next event, whatever it is; returns whether there will be one.
    fn wait(&mut self) -> bool {
        let device = self.completions.peek().map(|&Reverse((at, _))| at);
        let arrival = self.work.arrival();
        if device.or(arrival).is_none() {
            return false;
        }
        let other = [arrival, self.work.job()].into_iter().flatten().min();
        let event = match (device, other) {
            (None, None) => return false,
            (Some(device), Some(other)) => device.min(other),
            (Some(event), None) | (None, Some(event)) => event,
        };
        let situation = Situation {
            now: self.now,
            outstanding: self.outstanding.len(),
            kind: self.oldest(),
            last_progress: self.last_progress,
            next_completion: device,
        };
        let plan = self.policy.plan(&situation);
        let is_device = Some(event) == device;
        let polled = self.sit_out(plan, event, is_device);
        let is_ready = |event: Option<Nanos>| event.is_some_and(|at| at <= self.now);
        let (device_is_ready, other_is_ready) = (is_ready(device), is_ready(other));
        let waited = Waited {
            began: situation.now,
            ended: self.now,
            polled,
            device: device_is_ready,
            other: other_is_ready,
        };
        if device_is_ready || other_is_ready {
            self.policy.waited(&waited);
        }
        if situation.outstanding > 0 {
            let completions = self.completions.iter();
            let completions = completions.filter(|Reverse((at, _))| *at <= self.now);
            self.policy
                .watched(&situation, &waited, completions.count());
        }
        true
    }

    /// Lets time pass as planned, until the event or until the policy is to be asked again. Returns
    /// whether the loop was awake at the end.
    fn sit_out(&mut self, plan: Plan, event: Nanos, is_device: bool) -> bool {
        if plan.pause > 0 {
            let timer = self.now.saturating_add(plan.pause);
            if event <= timer {
                self.wake(event, is_device);
                return false;
            }
            self.wake(timer, true);
            if event <= self.now {
                // It came while the loop woke up.
                return true;
            }
        }
        let end = self.now.saturating_add(plan.poll);
        if event <= end {
            let found = event.max(self.now) + LOOK;
            self.outcome.cpu += found - self.now;
            self.now = found;
            return true;
        }
        self.outcome.cpu += plan.poll;
        self.now = end;
        if plan.then == Then::Ask {
            return true;
        }
        self.wake(event, is_device);
        false
    }

    /// Sleeps until an event at `at`. What others than the device are woken for is theirs.
    fn wake(&mut self, at: Nanos, is_device: bool) {
        // Mostly a bit less than typical, sometimes much more.
        let typical = self.machine.wake_latency as f64;
        let latency = typical * (0.75 - 0.25 * (1.0 - self.wake_times.f64()).ln());
        self.now = at.max(self.now) + latency as Nanos;
        if is_device {
            self.outcome.cpu += self.machine.wake_cpu;
        }
    }
}

#[cfg(test)]
mod tests;
