//! The machine by itself: each transition and each limit, counted out by hand.

mod reset;
mod victims;

use std::time::{Duration, Instant};

use nvme_spec::feature::NumberOfQueues;
use nvme_spec::{Cqe, Status};

use crate::recovery::action::{Action, AdminStep, Place, Settings, StepId};
use crate::recovery::machine::Recovery;
use crate::recovery::{ControllerState, ResetCause};

const ABORT: u64 = 100;
const GRACE: u64 = 50;
const STEP: u64 = 300;
const READY: u64 = 200;

/// CSTS of a controller that is disabled, ready, has failed, or is gone.
const DISABLED: Option<u32> = Some(0);
const READ_READY: Option<u32> = Some(0b01);
const FATAL: Option<u32> = Some(0b11);
const GONE: Option<u32> = None;

const RECOVERING: Action = Action::Announce(ControllerState::Recovering {
    cause: ResetCause::Overdue,
});
const LIVE: Action = Action::Announce(ControllerState::Live);

/// A machine, and the time in milliseconds.
struct Rig {
    machine: Recovery,
    begin: Instant,
    now: u64,
}

impl Rig {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Settings)) -> Self {
        let millis = Duration::from_millis;
        let mut settings = Settings {
            queues: 2,
            abort_limit: 2,
            abort_timeout: millis(ABORT),
            grace: millis(GRACE),
            step_timeout: millis(STEP),
            ready_timeout: millis(READY),
            max_resets: 2,
            reset_window: millis(10_000),
            host_behavior: false,
            coalescing: false,
            doorbell_buffers: false,
        };
        change(&mut settings);
        Self {
            machine: Recovery::new(settings),
            begin: Instant::now(),
            now: 0,
        }
    }

    fn time(&self) -> Instant {
        self.begin + Duration::from_millis(self.now)
    }

    /// What is to be done since the last call.
    fn actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.machine.next_action()).collect()
    }

    /// Passes on something, and returns what is to be done then.
    fn tell(&mut self, f: impl FnOnce(&mut Recovery, Instant)) -> Vec<Action> {
        let now = self.time();
        f(&mut self.machine, now);
        self.actions()
    }

    fn tick_at(&mut self, now: u64) -> Vec<Action> {
        self.now = now;
        self.tell(|machine, now| machine.tick(now))
    }

    fn overdue(&mut self, queue: u16, cid: u16) -> Vec<Action> {
        self.tell(|machine, _| machine.overdue(queue, cid))
    }

    fn status(&mut self, csts: Option<u32>) -> Vec<Action> {
        self.tell(|machine, now| machine.status(now, csts))
    }

    fn answer(&mut self, id: StepId, cqe: Option<Cqe>) -> Vec<Action> {
        self.tell(|machine, now| machine.step_done(now, id, cqe))
    }

    fn success(&mut self, id: StepId) -> Vec<Action> {
        self.answer(id, Some(Cqe::new(0, Status::SUCCESS)))
    }

    fn failure(&mut self, id: StepId) -> Vec<Action> {
        self.answer(id, Some(Cqe::new(0, Status::INTERNAL_ERROR)))
    }

    fn place(&self) -> Place {
        self.machine.place()
    }

    /// When it wants to be called again, in milliseconds.
    fn next_tick(&self) -> Option<f64> {
        let at = self.machine.next_tick()?;
        Some((at - self.begin).as_secs_f64() * 1000.0)
    }

    /// A command of queue 1 is overdue, was aborted in vain, and the queue pair is to be deleted.
    fn deleting() -> (Self, StepId) {
        let mut rig = Self::new();
        rig.overdue(1, 0x11);
        let id = only_step(&rig.status(READ_READY));
        rig.success(id);
        let id = only_step(&rig.tick_at(GRACE));
        assert_eq!(rig.place(), Place::Deleting);
        (rig, id)
    }

    /// A reset was begun at time 0.
    fn disabling() -> Self {
        let mut rig = Self::new();
        rig.machine.stalled();
        rig.status(FATAL);
        assert_eq!(rig.place(), Place::Disabling);
        rig
    }

    fn enabling() -> Self {
        let mut rig = Self::disabling();
        rig.status(DISABLED);
        assert_eq!(rig.place(), Place::Enabling);
        rig
    }

    /// The controller is ready, and is asked who it is.
    fn setting_up() -> (Self, StepId) {
        let mut rig = Self::enabling();
        let id = only_step(&rig.status(READ_READY));
        assert_eq!(rig.place(), Place::SettingUp);
        (rig, id)
    }

    /// The controller is set up, from the answer to its identity on.
    fn set_up(&mut self, identify: StepId) -> Vec<Action> {
        let count = only_step(&self.success(identify));
        let granted = NumberOfQueues::pairs(2).into_bits();
        let granted = Cqe::new(0, Status::SUCCESS).with_result(granted);
        let mut id = only_step(&self.answer(count, Some(granted)));
        // Two queue pairs, and the events.
        for _ in 0..4 {
            id = only_step(&self.success(id));
        }
        self.success(id)
    }
}

/// The admin commands among actions.
fn steps(actions: &[Action]) -> Vec<(StepId, AdminStep)> {
    let steps = actions.iter().filter_map(|action| match *action {
        Action::Admin { id, step } => Some((id, step)),
        _ => None,
    });
    steps.collect()
}

fn only_step(actions: &[Action]) -> StepId {
    match *steps(actions) {
        [(id, _)] => id,
        ref steps => panic!("{steps:?}"),
    }
}
