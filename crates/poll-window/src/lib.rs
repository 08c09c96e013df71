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
//! Where several commands are outstanding, a sleep makes all those late that are completed meanwhile,
//! but saves the waits for them, and it counts whether the last completion was found by polling, after
//! which more may be about to come, or after a sleep, which has gathered them.
//!
//! How late a single command is matters by the time that it takes anyway, unless something is outstanding
//! for most of the time: whoever asks one thing after another is held up by each of them.
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
mod duty;
mod history;

use self::course::Course;
use self::duty::Duty;
use self::history::History;

/// What waiting costs, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// CPU time of going to sleep and of being woken, which passes too.
    pub wake_cpu: u64,
    /// How much later than by polling a completion is noticed that ends a sleep.
    pub wake_latency: u64,
    /// CPU time of setting a timer to end a sleep.
    pub timer_cpu: u64,
    /// The CPU time that may be spent to notice a completion sooner, in percent of the time gained. For
    /// a single command that takes [`LATENCY_SCALE`] it is half of that, and so on: what matters is how
    /// late it is measured by the time that it takes anyway. But where somebody waits for half of the time
    /// or more it is all of that, since each delay then holds up what comes after.
    pub latency_price: u64,
}

/// Waits that are much shorter than this, in nanoseconds, have the full [price](Costs::latency_price) of
/// latency.
pub const LATENCY_SCALE: u64 = 40_000;

impl Default for Costs {
    fn default() -> Self {
        Self {
            wake_cpu: 5_000,
            wake_latency: 15_000,
            timer_cpu: 0,
            latency_price: 100,
        }
    }
}

impl Costs {
    /// What a sleep costs that an interrupt ends, when so many completions are there.
    fn sleep(&self, crowd: f32, is_alone: bool, urgency: f32) -> Sleep {
        let latency = self.wake_latency as f32 * self.latency_price as f32 / 100.0;
        // All are as late as the first one: the later they came, the more are taken before them.
        Sleep {
            cpu: self.wake_cpu as f32,
            latency: latency * crowd,
            is_alone,
            urgency,
        }
    }
}

/// The price of a sleep that an interrupt ends.
#[derive(Clone, Copy, Debug)]
struct Sleep {
    cpu: f32,
    latency: f32,
    is_alone: bool,
    /// The least part of the price of its latency that counts.
    urgency: f32,
}

impl Sleep {
    /// For a completion that comes at this age.
    fn price(self, age: u64) -> f32 {
        // Of many, the time since the last completion is not what one of them takes.
        let age = if self.is_alone { age as f32 } else { 0.0 };
        let scale = LATENCY_SCALE as f32;
        self.cpu + self.latency * (scale / (scale + age)).max(self.urgency)
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
    /// With fewer, one command is outstanding.
    const FIRST_OF_MANY: usize = Kind::Other as usize + 1;
    /// How many there are.
    pub const COUNT: usize = Self::FIRST_OF_MANY + 4;
    /// Where many are outstanding, it also matters what ended the wait before.
    const PLACES: usize = 2 * Self::COUNT - Self::FIRST_OF_MANY;

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

    /// Whether it is that of a single command.
    pub fn is_alone(self) -> bool {
        self.index() < Self::FIRST_OF_MANY
    }

    /// Where the waits in this situation are learned that follow a completion found by polling.
    fn after_poll(self) -> usize {
        self.index()
    }

    /// Where those are learned that follow an interrupt.
    fn after_interrupt(self) -> usize {
        match self.after_poll() {
            alone @ ..Self::FIRST_OF_MANY => alone,
            many => many + Self::COUNT - Self::FIRST_OF_MANY,
        }
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
    /// Too much for many a stack.
    learned: Box<[Learned]>,
    /// Whether the last wait was a sleep: commands that are completed together were gathered then,
    /// while after one that was found by polling the others are still to come.
    has_slept: bool,
    duty: Duty,
}

#[derive(Clone, Debug)]
struct Learned {
    history: History,
    course: Course,
    /// How many completions there are when an interrupt ends a sleep: all of them are late.
    crowd: f32,
    /// What a completion costs on average, on this course.
    each: f32,
    /// So many more observations, and the course is set anew.
    due: u16,
}

/// After so many observations a course is set anew, if there was nothing new among them.
const INTERVAL: u16 = 64;

/// So much counts of what a sleep saves, which is less certain than what it costs: who polls more meets
/// completions that are spread more evenly.
const SAVED: f32 = 0.8;

impl Policy {
    /// A policy that knows nothing yet, but believes that what has lasted long goes on for long: it
    /// polls for about three times as long as a sleep would cost. Half of those outstanding are believed
    /// to be completed when a sleep ends.
    pub fn new(costs: Costs) -> Self {
        let learned = (0..Situation::PLACES).map(|place| {
            let many = place.checked_sub(Situation::FIRST_OF_MANY);
            let class = many.map_or(0, |many| {
                many % (Situation::COUNT - Situation::FIRST_OF_MANY)
            });
            Learned::untaught((1 << class) as f32, &costs, many.is_none())
        });
        Self {
            costs,
            learned: learned.collect(),
            has_slept: false,
            duty: Duty::default(),
        }
    }

    /// Records a wait in this situation, from one age to another. As in [`plan`](Self::plan), ages are
    /// counted from the last completion, or from the first submission since then. Waits are told in
    /// their order, but not all of them need to be.
    pub fn observe(&mut self, situation: Situation, from: u64, to: u64, end: End) {
        self.duty.add_wait(to.saturating_sub(from));
        let learned = &mut self.learned[self.place(situation)];
        let mut most = f32::INFINITY;
        let is_new = match end {
            End::Polled => learned.history.add_completed(from, to),
            End::Interrupted { completions } => {
                let completions = completions.max(1) as f32;
                learned.crowd += (completions - learned.crowd) / 8.0;
                // To poll all the time would have cost no more. Where every wait is a sleep, nothing else
                // tells that it has become less.
                most = to.saturating_sub(from) as f32 / completions;
                // When it came, as far as one can tell.
                let to = to.saturating_sub(self.costs.wake_latency).max(from);
                learned.history.add_completed(from, to)
            }
            End::BrokenOff => return learned.history.add_broken_off(from, to),
        };
        learned.due -= 1;
        let is_due = is_new || learned.due == 0;
        let polled = &mut self.learned[situation.after_poll()];
        polled.each = polled.each.min(most);
        // What was never seen tells most: how the device is used may have changed because of what was
        // said about it.
        if is_due {
            // What a sleep gathers would have followed a completion found by polling.
            let (each, urgency) = (polled.each, self.duty.urgency());
            let learned = &mut self.learned[self.place(situation)];
            learned.renew(&self.costs, each, situation.is_alone(), urgency);
        }
        self.has_slept = end != End::Polled;
    }

    /// Records that nothing was outstanding for so long, and that something is now.
    pub fn rested(&mut self, time: u64) {
        self.duty.add_rest(time);
    }

    /// How to wait, `age` after the last completion, or after the first submission since then.
    pub fn plan(&self, situation: Situation, age: u64) -> Plan {
        let course = &self.learned[self.place(situation)].course;
        course.at(age, self.costs.wake_latency)
    }

    /// Whether the wait that [`plan`](Self::plan) is asked about will more likely end with a poll than with
    /// a sleep.
    pub fn expects_poll(&self, situation: Situation, age: u64) -> bool {
        let course = &self.learned[self.place(situation)].course;
        course.expects_poll(age)
    }

    fn place(&self, situation: Situation) -> usize {
        match self.has_slept {
            false => situation.after_poll(),
            true => situation.after_interrupt(),
        }
    }
}

impl Learned {
    fn untaught(crowd: f32, costs: &Costs, is_alone: bool) -> Self {
        let history = History::default();
        let (course, outlook) =
            Course::through(&history, costs, costs.sleep(crowd, is_alone, 0.0), is_alone);
        Self {
            history,
            course,
            crowd,
            each: outlook.cost,
            due: INTERVAL,
        }
    }

    /// Sets the course anew, if every other completion that a sleep gathers would have cost so much.
    fn renew(&mut self, costs: &Costs, each: f32, is_alone: bool, urgency: f32) {
        let others = SAVED * (self.crowd - 1.0);
        let mut sleep = costs.sleep(self.crowd, is_alone, urgency);
        let saved = (others * each).min(sleep.price(0));
        sleep.cpu -= saved;
        let (course, outlook) = Course::through(&self.history, costs, sleep, is_alone);
        self.course = course;
        self.each = (outlook.cost + outlook.sleeps * saved) / (1.0 + outlook.sleeps * others);
        self.due = INTERVAL;
    }
}

#[cfg(test)]
mod tests;
