//! What a policy is asked and told, by the event loop that it serves.

/// A time, or a length of time, in nanoseconds.
pub(crate) type Nanos = u64;

/// What kind of command the device executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
}

/// What a loop knows that has nothing else to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Situation {
    pub(crate) now: Nanos,
    /// Commands that the device has.
    pub(crate) outstanding: usize,
    /// The kind of the oldest one.
    pub(crate) kind: Kind,
    /// When a completion was last taken, or a command was submitted with no other outstanding.
    pub(crate) last_progress: Nanos,
    /// When the next completion will be there, which only an oracle may know.
    pub(crate) next_completion: Option<Nanos>,
}

/// How the loop waits. Whatever is said here, an event of another source than the device ends it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Sleeps for so long first, unless an interrupt comes; zero does not sleep.
    pub(crate) pause: Nanos,
    /// Then polls for so long; [`FOR_EVER`] without end.
    pub(crate) poll: Nanos,
    /// What it does after that.
    pub(crate) then: Then,
}

/// What a loop does when nothing came while it polled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Then {
    /// It waits for an interrupt.
    #[default]
    Sleep,
    /// It asks its policy again.
    Ask,
}

/// Longer than any trace.
pub(crate) const FOR_EVER: Nanos = Nanos::MAX;

impl Plan {
    /// Only an interrupt ends it.
    pub(crate) const INTERRUPT: Self = Self::poll(0);

    pub(crate) const fn poll(poll: Nanos) -> Self {
        Self {
            pause: 0,
            poll,
            then: Then::Sleep,
        }
    }
}

/// How a wait went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waited {
    pub(crate) began: Nanos,
    /// When the loop went on.
    pub(crate) ended: Nanos,
    /// Whether that was while it polled.
    pub(crate) polled: bool,
    /// Whether the device had completed something.
    pub(crate) device: bool,
    /// Whether another source had an event: a socket, a timer, another task.
    pub(crate) other: bool,
}

/// When an event loop polls and when it sleeps.
pub(crate) trait Policy {
    fn plan(&mut self, situation: &Situation) -> Plan;

    /// A wait is over.
    fn waited(&mut self, wait: &Waited) {
        let _ = wait;
    }

    /// The loop had something to do and did not wait; it was told so by these.
    fn went_on(&mut self, device: bool, other: bool) {
        let _ = (device, other);
    }

    /// A command is submitted, after no other was outstanding for so long.
    fn rested(&mut self, time: Nanos) {
        let _ = time;
    }

    /// A wait is over that began in this situation, with commands outstanding, and so many
    /// completions are there.
    fn watched(&mut self, situation: &Situation, waited: &Waited, completions: usize) {
        let _ = (situation, waited, completions);
    }

    /// A completion was taken, the first after `gap` without one (or since the device had nothing to
    /// do), when so many commands were outstanding with it, the oldest of this kind.
    fn progressed(&mut self, gap: Nanos, outstanding: usize, kind: Kind) {
        let _ = (gap, outstanding, kind);
    }
}
