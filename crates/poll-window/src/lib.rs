//! For how long polling pays.
//!
//! Whoever waits for a device can look at its completion queue again and again, which takes CPU time,
//! or sleep until its interrupt, which takes CPU time too and makes the completion late. Which is
//! cheaper depends on when the next completion comes. [`Policy`] learns that from how long the last
//! ones took, and answers for every moment of a wait: poll on, sleep, or sleep for a while and then
//! poll. It has no clock and does no I/O.
//!
//! It keeps a distribution for each [`Situation`], not a mean: of a device that answers in 10 µs, but
//! one time in a hundred in 2 ms, it says to poll for 12 µs and then to sleep. The distribution is
//! that of the last thousand waits or so, where of a wait that began late or that something else ended
//! only that counts which was seen of it. For each distribution the policy computes, from the end to
//! the beginning, which course costs least on average: the answer to the ski-rental problem for a
//! distribution that is known.
//!
//! To ask is a look-up. To tell it of a wait is an addition, but after every 64th, and after one that was
//! like none of late, the course is computed anew, in a pass over 240 steps.
//!
//! ```
//! use poll_window::{Costs, End, Kind, Plan, Policy, Situation};
//!
//! let mut policy = Policy::new(Costs::default());
//! let situation = Situation::new(1, Kind::Read);
//! for wait in 0..200 {
//!     let to = if wait % 50 == 0 { 2_000_000 } else { 10_000 };
//!     policy.observe(situation, 0, to, End::Polled);
//! }
//! // After 2 µs without a completion it is worth polling until about 10 µs have passed ...
//! let Plan::Poll { until } = policy.plan(situation, 2_000) else { panic!() };
//! assert!((10_000..14_000).contains(&until));
//! // ... and if none has come by then, it will take long.
//! assert_eq!(policy.plan(situation, 20_000), Plan::Sleep);
//! ```
//!
//! All times are in nanoseconds.

#![forbid(unsafe_code)]

mod bins;
mod course;
mod history;

use self::course::Course;
use self::history::History;

/// What waiting costs, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// CPU time of going to sleep and of being woken, which passes too.
    pub wake_cpu: u64,
    /// How much later than by polling a completion is noticed that ends a sleep.
    pub wake_latency: u64,
    /// The CPU time that may be spent to notice a completion sooner, in percent of the time gained.
    pub latency_price: u64,
}

impl Default for Costs {
    fn default() -> Self {
        Self {
            wake_cpu: 5_000,
            wake_latency: 15_000,
            latency_price: 100,
        }
    }
}

impl Costs {
    /// The price of a sleep that an interrupt ends, when so many completions are there.
    fn sleep(&self, crowd: f32) -> f32 {
        let latency = self.wake_latency as f32 * self.latency_price as f32 / 100.0;
        let crowd = crowd.max(1.0);
        // They share the CPU time. The first one is as late as can be, the others, which came after it,
        // half as late on average.
        self.wake_cpu as f32 / crowd + latency * (1.0 + crowd) / 2.0
    }
}

/// What a command does. Devices take different times for these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// Anything else, such as a flush.
    Other,
}

/// What is outstanding while somebody waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Situation(u8);

impl Situation {
    /// How many there are.
    pub const COUNT: usize = 7;

    /// So many commands are outstanding, of which the oldest is of this kind.
    ///
    /// Of many, what counts is how many they are.
    pub fn new(outstanding: usize, kind: Kind) -> Self {
        Self(match outstanding {
            0 | 1 => kind as u8,
            2..4 => 3,
            4..8 => 4,
            8..16 => 5,
            _ => 6,
        })
    }

    /// Its number, less than [`COUNT`](Self::COUNT).
    pub fn index(self) -> usize {
        self.0.into()
    }
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A completion, found by polling.
    Polled,
    /// An interrupt ended a sleep, and so many completions were there.
    Interrupted {
        /// At least one.
        completions: usize,
    },
    /// Something else: a command was submitted, or another task is to run. What the device then does
    /// is not known.
    BrokenOff,
}

/// How to go on waiting. Times are counted from the last completion, or from when the first command
/// was submitted since nothing was outstanding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Poll until then, and ask again.
    Poll {
        /// When that is.
        until: u64,
    },
    /// Sleep until then if no interrupt comes before, and ask again.
    Pause {
        /// When the timer is to go off; being woken takes the rest of the pause.
        until: u64,
    },
    /// Sleep until the interrupt.
    Sleep,
}

/// Learns how long completions take, and says how to wait for the next one.
#[derive(Clone, Debug)]
pub struct Policy {
    costs: Costs,
    learned: [Learned; Situation::COUNT],
}

#[derive(Clone, Debug)]
struct Learned {
    history: History,
    course: Course,
    /// How many completions there are when an interrupt ends a sleep: all of them are late.
    crowd: f32,
    /// So many more observations, and the course is set anew.
    due: u16,
}

/// After so many observations a course is set anew, if there was nothing new among them.
const INTERVAL: u16 = 64;

impl Policy {
    /// A policy that knows nothing yet, but believes that what has lasted long goes on for long: it
    /// polls for about three times as long as a sleep would cost.
    pub fn new(costs: Costs) -> Self {
        let history = History::default();
        let learned = Learned {
            course: Course::through(&history, &costs, 1.0),
            history,
            crowd: 1.0,
            due: INTERVAL,
        };
        Self {
            costs,
            learned: std::array::from_fn(|_| learned.clone()),
        }
    }

    /// Records a wait in this situation, from one age to another. As in [`plan`](Self::plan), ages are
    /// counted from the last completion, or from the first submission since then.
    pub fn observe(&mut self, situation: Situation, from: u64, to: u64, end: End) {
        let learned = &mut self.learned[situation.index()];
        let is_new = match end {
            End::Polled => learned.history.add_completed(from, to),
            End::Interrupted { completions } => {
                learned.crowd += (completions as f32 - learned.crowd) / 8.0;
                // When it came, as far as one can tell.
                let to = to.saturating_sub(self.costs.wake_latency).max(from);
                learned.history.add_completed(from, to)
            }
            End::BrokenOff => return learned.history.add_broken_off(from, to),
        };
        learned.due -= 1;
        // What was never seen tells most: how the device is used may have changed because of what was
        // said about it.
        if is_new || learned.due == 0 {
            learned.course = Course::through(&learned.history, &self.costs, learned.crowd);
            learned.due = INTERVAL;
        }
    }

    /// How to wait, `age` after the last completion, or after the first submission since then.
    pub fn plan(&self, situation: Situation, age: u64) -> Plan {
        let course = &self.learned[situation.index()].course;
        course.at(age, self.costs.wake_latency)
    }
}

#[cfg(test)]
mod tests;
