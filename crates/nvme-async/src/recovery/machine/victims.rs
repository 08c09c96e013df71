//! Commands whose deadline has passed, and their Abort commands.

use std::time::Instant;

use nvme_spec::{Cqe, Status};

use super::{Pending, Phase, Recovery};
use crate::recovery::action::{Action, AdminStep, Scope, StepId};
use crate::recovery::{ControllerState, ResetCause};

/// Answers "too many Abort commands" to one victim before that costs its queue pair.
const MAX_ABORT_REFUSALS: u8 = 3;

/// An overdue command.
#[derive(Debug)]
pub(super) struct Victim {
    pub(super) queue: u16,
    cid: u16,
    refusals: u8,
    pub(super) stage: VictimStage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum VictimStage {
    /// Its Abort command has not been submitted.
    Waiting,
    Aborting {
        id: StepId,
        until: Instant,
    },
    /// The Abort command is done; this one should be any moment.
    Grace {
        until: Instant,
    },
}

impl Victim {
    /// Whether its Abort command is outstanding.
    pub(super) fn is_aborting(&self) -> bool {
        matches!(self.stage, VictimStage::Aborting { .. })
    }
}

impl Recovery {
    /// A command's deadline has passed.
    pub(crate) fn overdue(&mut self, queue: u16, cid: u16) {
        if matches!(self.phase, Phase::Releasing(_) | Phase::Ended) {
            return;
        }
        self.victims.push(Victim {
            queue,
            cid,
            refusals: 0,
            stage: VictimStage::Waiting,
        });
        // Otherwise it is dealt with once the controller is up again.
        if matches!(self.phase, Phase::Live | Phase::Recreating { .. }) {
            self.check();
        }
    }

    /// Forgets overdue commands that are not outstanding any more.
    pub(crate) fn settle(&mut self, now: Instant, is_outstanding: impl Fn(u16, u16) -> bool) {
        let before = self.victims.len();
        self.victims.retain(|victim| {
            // Its Abort command has its place until that is done too.
            victim.is_aborting() || is_outstanding(victim.queue, victim.cid)
        });
        if self.victims.len() < before {
            self.submit_aborts(now);
        }
    }

    /// Aborts overdue commands, as many at a time as the controller allows.
    pub(super) fn submit_aborts(&mut self, now: Instant) {
        // A reset takes all commands back that are overdue by then.
        if !matches!(self.phase, Phase::Live | Phase::Recreating { .. }) {
            return;
        }
        let aborting = self.victims.iter().filter(|victim| victim.is_aborting());
        let mut room = self.settings.abort_limit.saturating_sub(aborting.count());
        for index in 0..self.victims.len() {
            let Victim {
                queue, cid, stage, ..
            } = self.victims[index];
            if room == 0 {
                break;
            }
            if stage != VictimStage::Waiting {
                continue;
            }
            let abort = AdminStep::Abort { queue, cid };
            let Pending { id, until, .. } = self.step(now, abort, self.settings.abort_timeout);
            self.victims[index].stage = VictimStage::Aborting { id, until };
            room -= 1;
        }
    }

    pub(super) fn abort_done(&mut self, now: Instant, id: StepId, cqe: Option<Cqe>) {
        let is_it = |victim: &&mut Victim| matches!(victim.stage, VictimStage::Aborting { id: of, .. } if of == id);
        let Some(victim) = self.victims.iter_mut().find(is_it) else {
            return;
        };
        let Some(cqe) = cqe else {
            return self.reset(now, ResetCause::Overdue);
        };
        let limited = cqe.status().is(Status::ABORT_LIMIT_EXCEEDED);
        // Whatever else the answer is: the command is done soon, or not at all.
        victim.stage = if limited && victim.refusals < MAX_ABORT_REFUSALS {
            victim.refusals += 1;
            VictimStage::Waiting
        } else {
            VictimStage::Grace {
                until: now + self.settings.grace,
            }
        };
        self.submit_aborts(now);
    }

    pub(super) fn check_victims(&mut self, now: Instant) {
        if !matches!(self.phase, Phase::Live) {
            return;
        }
        let expired = |victim: &&Victim| match victim.stage {
            VictimStage::Waiting => false,
            VictimStage::Aborting { until, .. } | VictimStage::Grace { until } => now >= until,
        };
        let Some(victim) = self.victims.iter().find(expired) else {
            return;
        };
        let queue = victim.queue;
        if queue == 0 || victim.is_aborting() {
            // The admin queue does not work.
            return self.reset(now, ResetCause::Overdue);
        }
        let cause = ResetCause::Overdue;
        let state = ControllerState::Recovering { cause };
        self.actions.push_back(Action::Fence(Scope::Queue(queue)));
        self.actions.push_back(Action::Announce(state));
        let delete = AdminStep::DeleteSubmissionQueue(queue);
        let step = self.step(now, delete, self.settings.step_timeout);
        self.phase = Phase::Recreating { queue, step };
    }
}
