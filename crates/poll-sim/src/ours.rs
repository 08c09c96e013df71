//! The policy of `poll-window`.

use poll_window::{Costs, End, Plan as Answer, Policy as Learner, Situation as State};

use crate::policy::{Kind, Nanos, Plan, Policy, Situation, Then, Waited};

pub(crate) struct Ours(Learner);

impl Ours {
    pub(crate) fn new(costs: Costs) -> Self {
        Self(Learner::new(costs))
    }
}

impl Policy for Ours {
    fn plan(&mut self, situation: &Situation) -> Plan {
        if situation.outstanding == 0 {
            return Plan::INTERRUPT;
        }
        let state = state(situation.outstanding, situation.kind);
        let age = situation.now - situation.last_progress;
        match self.0.plan(state, age) {
            Answer::Sleep => Plan::INTERRUPT,
            Answer::Poll { until } => Plan {
                pause: 0,
                poll: until.saturating_sub(age),
                then: Then::Ask,
            },
            Answer::Pause { until } => Plan {
                pause: until.saturating_sub(age),
                poll: 0,
                then: Then::Ask,
            },
        }
    }

    fn rested(&mut self, time: Nanos) {
        self.0.rested(time);
    }

    fn watched(&mut self, situation: &Situation, waited: &Waited, completions: usize) {
        let state = state(situation.outstanding, situation.kind);
        let end = match (waited.device, waited.polled) {
            (true, true) => End::Polled,
            (true, false) => End::Interrupted { completions },
            (false, _) => End::BrokenOff,
        };
        let age = |time| time - situation.last_progress;
        self.0
            .observe(state, age(waited.began), age(waited.ended), end);
    }
}

fn state(outstanding: usize, kind: Kind) -> State {
    let kind = match kind {
        Kind::Read => poll_window::Kind::Read,
        Kind::Write => poll_window::Kind::Write,
    };
    State::new(outstanding, kind)
}
