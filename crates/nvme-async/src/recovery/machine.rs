//! What to do about a controller that does not do what it should: a state machine without I/O and
//! without a clock.
//!
//! It is told what happened and what time it is, and says what is to be done:
//!
//! ```text
//!          deadline passed                  still outstanding              fails
//!  Live ───────────────────▶ abort (Live) ───────────────────▶ Recreating ───────┐
//!   ▲  ◀────────────────────  command ends      queue pair      │                │
//!   │  ◀────────────────────────────────────────────────────────┘                ▼
//!   │        broke the protocol · CSTS.CFS · lost its state · error notice · Resetting
//!   └─────────────────────────────────────────────────────────────────────────── │ ──▶ Ended
//!                                                      removed · no way to reset ┘
//! ```
//!
//! While it is `Live`, overdue commands are aborted, as many at a time as the controller allows. What
//! is outstanding after that costs the queue pair: it is deleted and created again. What even that
//! does not help against costs a reset of the controller: CC.EN first, then the function.

mod victims;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use nvme_spec::Cqe;
use nvme_spec::feature::NumberOfQueues;
use nvme_spec::registers::ControllerStatus;

use self::victims::{Victim, VictimStage};
use super::action::{Action, AdminStep, End, Place, Scope, Settings, StepId};
use super::{ControllerState, ResetCause};
use crate::device::Notice;
use crate::queue::Lie;

/// Attempts to bring the controller up again within one recovery.
const MAX_ATTEMPTS: u8 = 3;
/// Between two looks at CSTS; grows from the first to the last.
const FIRST_LOOK: Duration = Duration::from_micros(100);
const LAST_LOOK: Duration = Duration::from_millis(10);
/// How long a controller that is asked for may take to become disabled.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Recovery {
    settings: Settings,
    phase: Phase,
    victims: Vec<Victim>,
    /// Whether the status is about to be read because somebody waits in vain.
    checking: bool,
    last_csts: u32,
    last_id: StepId,
    /// When the controller was reset.
    resets: VecDeque<Instant>,
    actions: VecDeque<Action>,
}

#[derive(Debug)]
enum Phase {
    Live,
    Recreating {
        queue: u16,
        step: Pending,
    },
    Resetting(Reset),
    /// The device is asked for.
    Releasing(Wait),
    Ended,
}

#[derive(Debug)]
struct Reset {
    cause: ResetCause,
    stage: Stage,
    attempts: u8,
}

#[derive(Debug)]
enum Stage {
    Disabling(Wait),
    /// What the function's reset comes to will be told at once.
    ResettingFunction,
    Enabling(Wait),
    SettingUp(Pending),
}

/// Waiting for a register.
#[derive(Debug)]
struct Wait {
    until: Instant,
    look: Instant,
    pause: Duration,
}

/// Waiting for an admin command.
#[derive(Clone, Copy, Debug)]
struct Pending {
    id: StepId,
    step: AdminStep,
    until: Instant,
}

impl Wait {
    fn new(now: Instant, timeout: Duration) -> Self {
        Self {
            until: now + timeout,
            look: now,
            pause: FIRST_LOOK,
        }
    }

    /// Whether it is time to look.
    fn is_due(&mut self, now: Instant) -> bool {
        if now < self.look {
            return false;
        }
        self.look = now + self.pause;
        self.pause = (self.pause * 2).min(LAST_LOOK);
        true
    }
}

impl Recovery {
    pub(crate) fn new(settings: Settings) -> Self {
        Self {
            settings,
            phase: Phase::Live,
            victims: Vec::new(),
            checking: false,
            last_csts: 0,
            last_id: 0,
            resets: VecDeque::new(),
            actions: VecDeque::new(),
        }
    }

    pub(crate) fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub(crate) fn place(&self) -> Place {
        match &self.phase {
            Phase::Live if self.victims.is_empty() => Place::Live,
            Phase::Live => Place::Aborting,
            Phase::Recreating { step, .. } => match step.step {
                AdminStep::DeleteSubmissionQueue(_) | AdminStep::DeleteCompletionQueue(_) => {
                    Place::Deleting
                }
                _ => Place::Creating,
            },
            Phase::Resetting(reset) => match reset.stage {
                Stage::Disabling(_) => Place::Disabling,
                Stage::ResettingFunction => Place::ResettingFunction,
                Stage::Enabling(_) => Place::Enabling,
                Stage::SettingUp(_) => Place::SettingUp,
            },
            Phase::Releasing(_) => Place::Releasing,
            Phase::Ended => Place::Ended,
        }
    }

    /// When [`tick`](Self::tick) has something to do without anything having happened.
    pub(crate) fn next_tick(&self) -> Option<Instant> {
        let of_victims = self.victims.iter().filter_map(|victim| match victim.stage {
            VictimStage::Waiting => None,
            VictimStage::Aborting { until, .. } | VictimStage::Grace { until } => Some(until),
        });
        match &self.phase {
            // In any other phase their times have no consequence.
            Phase::Live => of_victims.min(),
            Phase::Ended => None,
            Phase::Recreating { step, .. } => Some(step.until),
            Phase::Releasing(wait) => Some(wait.look),
            Phase::Resetting(reset) => match &reset.stage {
                Stage::Disabling(wait) | Stage::Enabling(wait) => Some(wait.look),
                Stage::ResettingFunction => None,
                Stage::SettingUp(step) => Some(step.until),
            },
        }
    }

    /// Nothing was completed on a queue for long.
    pub(crate) fn stalled(&mut self) {
        if matches!(self.phase, Phase::Live) {
            self.check();
        }
    }

    /// The device broke the protocol.
    pub(crate) fn lie(&mut self, now: Instant, queue: u16, lie: Lie) {
        match &self.phase {
            Phase::Live | Phase::Recreating { .. } => self.reset(now, ResetCause::Protocol(lie)),
            Phase::Resetting(Reset {
                stage: Stage::SettingUp(_),
                ..
            }) if queue == 0 => self.attempt_failed(now),
            _ => {}
        }
    }

    /// The transport has something to say.
    pub(crate) fn notice(&mut self, now: Instant, notice: Notice) {
        match notice {
            Notice::ReleaseRequested => {
                if matches!(self.phase, Phase::Ended | Phase::Releasing(_)) {
                    return;
                }
                self.victims.clear();
                self.actions.push_back(Action::Fence(Scope::All));
                self.actions.push_back(Action::Disable);
                let timeout = self.settings.ready_timeout.min(RELEASE_TIMEOUT);
                self.phase = Phase::Releasing(Wait::new(now, timeout));
                self.tick(now);
            }
            Notice::Gone => self.end(End::Removed),
            Notice::Failed => {
                if matches!(self.phase, Phase::Live | Phase::Recreating { .. }) {
                    self.reset(now, ResetCause::Reported);
                }
            }
        }
    }

    /// The controller status register as it was just read; nothing if it can't be read.
    pub(crate) fn status(&mut self, now: Instant, csts: Option<u32>) {
        self.checking = false;
        let bits = csts.unwrap_or(u32::MAX);
        self.last_csts = bits;
        let status = ControllerStatus::from_bits(bits);
        if status.is_gone() {
            return self.end(End::Removed);
        }
        match &mut self.phase {
            Phase::Live | Phase::Recreating { .. } => {
                if status.cfs() {
                    self.reset(now, ResetCause::Fatal { csts: bits });
                } else if !status.rdy() {
                    self.reset(now, ResetCause::StateLost);
                } else {
                    self.submit_aborts(now);
                }
            }
            Phase::Releasing(wait) => {
                if !status.rdy() || now >= wait.until {
                    self.end(End::Removed);
                }
            }
            Phase::Resetting(reset) => match &mut reset.stage {
                Stage::Disabling(wait) => {
                    if !status.rdy() {
                        self.stopped(now);
                    } else if now >= wait.until {
                        self.reset_function();
                    }
                }
                Stage::Enabling(wait) => {
                    if status.cfs() {
                        self.attempt_failed(now);
                    } else if status.rdy() {
                        self.actions.push_back(Action::Resume(Scope::Queue(0)));
                        self.set_up(now, AdminStep::Identify);
                    } else if now >= wait.until {
                        self.attempt_failed(now);
                    }
                }
                Stage::ResettingFunction | Stage::SettingUp(_) => {}
            },
            Phase::Ended => {}
        }
    }

    /// How the reset of the function ended. With success, the controller is disabled.
    pub(crate) fn function_reset(&mut self, now: Instant, done: bool) {
        let Phase::Resetting(Reset {
            stage: Stage::ResettingFunction,
            ..
        }) = &self.phase
        else {
            return;
        };
        if done {
            self.stopped(now);
        } else {
            let csts = self.last_csts;
            self.end(End::Failed { csts });
        }
    }

    /// How an admin command ended; nothing if it could not be submitted.
    pub(crate) fn step_done(&mut self, now: Instant, id: StepId, cqe: Option<Cqe>) {
        let succeeded = cqe.is_some_and(|cqe| cqe.status().is_success());
        let grants_enough = cqe.is_some_and(|cqe| {
            let granted = NumberOfQueues::from_bits(cqe.result());
            granted.submission_queues().min(granted.completion_queues())
                >= self.settings.queues.into()
        });
        match &mut self.phase {
            Phase::Recreating { queue, step } if step.id == id => {
                let (queue, step) = (*queue, step.step);
                if succeeded {
                    self.recreated(now, queue, step);
                } else {
                    self.reset(now, ResetCause::Overdue);
                }
            }
            Phase::Resetting(Reset {
                stage: Stage::SettingUp(step),
                ..
            }) if step.id == id => {
                let step = step.step;
                let done = match step {
                    // Without these it is a controller all the same.
                    AdminStep::HostBehavior | AdminStep::Coalescing | AdminStep::Events => {
                        cqe.is_some()
                    }
                    AdminStep::QueueCount => succeeded && grants_enough,
                    _ => succeeded,
                };
                if done {
                    self.did_set_up(now, step);
                } else {
                    self.attempt_failed(now);
                }
            }
            _ => self.abort_done(now, id, cqe),
        }
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, now: Instant) {
        let looks = match &mut self.phase {
            Phase::Releasing(wait) => wait.is_due(now),
            Phase::Resetting(Reset {
                stage: Stage::Disabling(wait) | Stage::Enabling(wait),
                ..
            }) => wait.is_due(now),
            _ => false,
        };
        if looks {
            self.actions.push_back(Action::ReadStatus);
        }
        let late = |step: &Pending| now >= step.until;
        match &self.phase {
            Phase::Recreating { step, .. } if late(step) => {
                self.reset(now, ResetCause::Overdue);
            }
            Phase::Resetting(Reset {
                stage: Stage::SettingUp(step),
                ..
            }) if late(step) => self.attempt_failed(now),
            _ => {}
        }
        self.check_victims(now);
    }

    fn check(&mut self) {
        if !std::mem::replace(&mut self.checking, true) {
            self.actions.push_back(Action::ReadStatus);
        }
    }

    fn step(&mut self, now: Instant, step: AdminStep, timeout: Duration) -> Pending {
        self.last_id = self.last_id.wrapping_add(1);
        let id = self.last_id;
        self.actions.push_back(Action::Admin { id, step });
        Pending {
            id,
            step,
            until: now + timeout,
        }
    }

    /// Goes on with the re-creation of a queue pair after a step of it.
    fn recreated(&mut self, now: Instant, queue: u16, done: AdminStep) {
        let next = match done {
            AdminStep::DeleteSubmissionQueue(_) => AdminStep::DeleteCompletionQueue(queue),
            AdminStep::DeleteCompletionQueue(_) => {
                let scope = Scope::Queue(queue);
                // An Abort command that was not answered is outstanding all the same.
                self.victims
                    .retain(|victim| victim.queue != queue || victim.is_aborting());
                self.actions
                    .push_back(Action::Release(scope, ResetCause::Overdue));
                AdminStep::CreateCompletionQueue(queue)
            }
            AdminStep::CreateCompletionQueue(_) => AdminStep::CreateSubmissionQueue(queue),
            _ => {
                self.phase = Phase::Live;
                self.actions.push_back(Action::Resume(Scope::Queue(queue)));
                let live = ControllerState::Live;
                self.actions.push_back(Action::Announce(live));
                return self.submit_aborts(now);
            }
        };
        let step = self.step(now, next, self.settings.step_timeout);
        self.phase = Phase::Recreating { queue, step };
    }

    fn reset(&mut self, now: Instant, cause: ResetCause) {
        let window = self.settings.reset_window;
        while let Some(&first) = self.resets.front()
            && now.saturating_duration_since(first) > window
        {
            self.resets.pop_front();
        }
        self.victims.clear();
        if self.resets.len() >= self.settings.max_resets {
            let csts = self.last_csts;
            return self.end(End::Failed { csts });
        }
        self.resets.push_back(now);
        let state = ControllerState::Recovering { cause };
        self.actions.push_back(Action::Fence(Scope::All));
        self.actions.push_back(Action::Announce(state));
        self.actions.push_back(Action::Disable);
        self.phase = Phase::Resetting(Reset {
            cause,
            stage: Stage::Disabling(Wait::new(now, self.settings.ready_timeout)),
            attempts: 0,
        });
        self.tick(now);
    }

    fn reset_function(&mut self) {
        if let Phase::Resetting(reset) = &mut self.phase {
            reset.stage = Stage::ResettingFunction;
            self.actions.push_back(Action::ResetFunction);
        }
    }

    /// The controller is disabled, and accesses no memory.
    fn stopped(&mut self, now: Instant) {
        let timeout = self.settings.ready_timeout;
        if let Phase::Resetting(reset) = &mut self.phase {
            let release = Action::Release(Scope::All, reset.cause);
            reset.stage = Stage::Enabling(Wait::new(now, timeout));
            self.victims.clear();
            self.actions.push_back(release);
            self.actions.push_back(Action::Enable);
            self.tick(now);
        }
    }

    fn set_up(&mut self, now: Instant, step: AdminStep) {
        let step = self.step(now, step, self.settings.step_timeout);
        if let Phase::Resetting(reset) = &mut self.phase {
            reset.stage = Stage::SettingUp(step);
        }
    }

    /// Goes on with setting up the controller after a step of it.
    fn did_set_up(&mut self, now: Instant, done: AdminStep) {
        let Settings {
            host_behavior,
            coalescing,
            doorbell_buffers,
            ..
        } = self.settings;
        let next = match done {
            AdminStep::Identify if host_behavior => AdminStep::HostBehavior,
            AdminStep::Identify | AdminStep::HostBehavior if coalescing => AdminStep::Coalescing,
            AdminStep::Identify | AdminStep::HostBehavior | AdminStep::Coalescing => {
                AdminStep::QueueCount
            }
            // Before there are queues whose doorbells would be looked for elsewhere.
            AdminStep::QueueCount if doorbell_buffers => AdminStep::DoorbellBuffers,
            AdminStep::QueueCount | AdminStep::DoorbellBuffers => {
                AdminStep::CreateCompletionQueue(1)
            }
            AdminStep::CreateCompletionQueue(queue) => AdminStep::CreateSubmissionQueue(queue),
            AdminStep::CreateSubmissionQueue(queue) if queue < self.settings.queues => {
                AdminStep::CreateCompletionQueue(queue + 1)
            }
            AdminStep::CreateSubmissionQueue(_) => AdminStep::Events,
            _ => {
                self.phase = Phase::Live;
                self.actions.push_back(Action::Resume(Scope::Io));
                self.actions.push_back(Action::Rearm);
                let live = ControllerState::Live;
                self.actions.push_back(Action::Announce(live));
                if !self.victims.is_empty() {
                    self.check();
                }
                return;
            }
        };
        self.set_up(now, next);
    }

    /// The controller did not come up again: tries harder, if that is possible.
    fn attempt_failed(&mut self, now: Instant) {
        let Phase::Resetting(reset) = &mut self.phase else {
            return;
        };
        reset.attempts += 1;
        if reset.attempts >= MAX_ATTEMPTS {
            let csts = self.last_csts;
            return self.end(End::Failed { csts });
        }
        self.actions.push_back(Action::Fence(Scope::All));
        if reset.attempts == 1 {
            let timeout = self.settings.ready_timeout;
            reset.stage = Stage::Disabling(Wait::new(now, timeout));
            self.actions.push_back(Action::Disable);
            self.tick(now);
        } else {
            self.reset_function();
        }
    }

    fn end(&mut self, end: End) {
        if matches!(self.phase, Phase::Ended) {
            return;
        }
        self.victims.clear();
        self.phase = Phase::Ended;
        self.actions.push_back(Action::End(end));
    }
}
