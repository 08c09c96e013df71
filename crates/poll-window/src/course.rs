//! The cheapest way to wait, from every moment on.

use crate::bins::{BINS, bin, start};
use crate::history::History;
use crate::{Costs, Plan, Sleep};

/// A pause must be cheaper by so much than what else there is: a timer is less certain than an
/// interrupt.
const PAUSE_GAIN: f32 = 0.9;

/// What to do at each age of a wait, in steps.
#[derive(Clone, Debug)]
pub(crate) struct Course {
    steps: [Step; BINS],
    /// Whether a wait that has come so far more likely ends with a poll than with a sleep.
    polled: [bool; BINS],
}

/// What a wait comes to that has just begun.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outlook {
    /// What it costs on average.
    pub(crate) cost: f32,
    /// How likely it is that an interrupt ends it.
    pub(crate) sleeps: f32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Sleep,
    /// Until the beginning of a step.
    Poll(u8),
    Pause(u8),
}

impl Course {
    /// The cheapest on average, if waits go as they went and `sleep` tells the price of one that an
    /// interrupt ends.
    ///
    /// From the last moment to the first: what is cheapest later is known then.
    pub(crate) fn through(
        history: &History,
        costs: &Costs,
        sleep: Sleep,
        is_alone: bool,
    ) -> (Self, Outlook) {
        let hazards = history.hazards();
        // How likely it is that a wait comes so far.
        let mut reached = [1.0; BINS];
        for step in 1..BINS {
            reached[step] = reached[step - 1] * (1.0 - hazards[step - 1]);
        }
        let (wake_cpu, timer_cpu) = (costs.wake_cpu as f32, costs.timer_cpu as f32);
        // What it costs to sleep from a step on, times how likely it is to come there.
        let mut asleep = [0.0; BINS];
        asleep[BINS - 1] = reached[BINS - 1] * sleep.price(start(BINS - 1));
        for step in (0..BINS - 1).rev() {
            let ends_here = reached[step] - reached[step + 1];
            asleep[step] = asleep[step + 1] + ends_here * sleep.price(start(step + 1));
        }
        // Going to sleep and waking up take that long already.
        let least_pause = costs.wake_cpu.saturating_add(costs.wake_latency);
        let mut steps = [Step::Sleep; BINS];
        // What it costs to wait from a step on, times how likely that is. Nothing is polled for in the
        // last step, which has no end.
        let mut cheapest = asleep;
        // How likely it is to come to a step and to sleep from there on.
        let mut sleeps = reached;
        // Where to wake up from a pause does not depend on where it begins: where most is gained
        // against the interrupt, of the steps that are far enough away.
        let mut targets = (0..BINS).rev().peekable();
        let mut best_target = None;
        for step in (0..BINS - 1).rev() {
            let width = (start(step + 1) - start(step)) as f32;
            let ends_here = reached[step] - reached[step + 1];
            let poll = ends_here * width / 2.0 + reached[step + 1] * width + cheapest[step + 1];
            if poll < cheapest[step] {
                cheapest[step] = poll;
                sleeps[step] = sleeps[step + 1];
                steps[step] = match steps[step + 1] {
                    Step::Poll(end) => Step::Poll(end),
                    _ => Step::Poll(step as u8 + 1),
                };
            }
            let awake = start(step).saturating_add(least_pause);
            let is_far = |&target: &usize| target > step && start(target) > awake;
            while let Some(target) = targets.next_if(is_far) {
                let gain = asleep[target] - reached[target] * wake_cpu - cheapest[target];
                let is_better = best_target.is_none_or(|(most, _)| gain > most);
                if is_better && matches!(steps[target], Step::Poll(_)) {
                    best_target = Some((gain, target));
                }
            }
            if let Some((gain, target)) = best_target {
                let pause = asleep[step] + reached[step] * timer_cpu - gain;
                if pause < PAUSE_GAIN * cheapest[step] {
                    // Where many are outstanding, some time is polled before a pause: the next one may
                    // belong to the one before, and come later after it than any did so far.
                    cheapest[step] = if is_alone { pause / PAUSE_GAIN } else { pause };
                    sleeps[step] = reached[step] - reached[target] + sleeps[target];
                    steps[step] = Step::Pause(target as u8);
                }
            }
        }
        let outlook = Outlook {
            cost: cheapest[0],
            sleeps: sleeps[0],
        };
        let polled = std::array::from_fn(|step| 2.0 * sleeps[step] < reached[step]);
        (Self { steps, polled }, outlook)
    }

    pub(crate) fn expects_poll(&self, age: u64) -> bool {
        self.polled[bin(age)]
    }

    pub(crate) fn at(&self, age: u64, wake_latency: u64) -> Plan {
        match self.steps[bin(age)] {
            Step::Sleep => Plan::Sleep,
            Step::Poll(end) => Plan::Poll {
                until: start(usize::from(end)),
            },
            Step::Pause(target) => {
                let timer = start(usize::from(target)).saturating_sub(wake_latency);
                if timer > age {
                    Plan::Pause { until: timer }
                } else {
                    // Not far enough away for a sleep.
                    self.at(start(usize::from(target)), wake_latency)
                }
            }
        }
    }
}
