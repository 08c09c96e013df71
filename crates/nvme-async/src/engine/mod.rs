//! The async layer around a queue pair: submission futures, the reaper, and where they meet.
//!
//! A [`Submission`] puts its command into a queue pair on its first poll and is woken when the
//! command is done. Completions are taken by whoever looks first: a submission (which looks on
//! its way), or the queue's reaper, one task that polls the completion queue for as long as that
//! pays and then sleeps on the interrupt's eventfd.

pub(crate) mod biased;
pub(crate) mod eventfd;
pub(crate) mod local;
pub(crate) mod park;
pub(crate) mod price;
pub(crate) mod reaper;
pub(crate) mod shared;
pub(crate) mod state;
pub(crate) mod submission;
pub(crate) mod sync;
pub(crate) mod trouble;
pub(crate) mod window;

#[cfg(all(test, nvme_async_loom))]
mod models;
#[cfg(test)]
mod tests;

use std::time::Duration;

use poll_window::Costs;

pub use self::local::LocalQueue;
pub use self::shared::SharedQueue;
pub(crate) use self::state::{Failed, Failure, Notification, QueueCounters, State};
pub(crate) use self::submission::{InFlight, Submission};

/// When a queue polls for completions and when it waits for the interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum PollMode {
    /// Poll while a completion is expected soon, then wait for the interrupt.
    #[default]
    Adaptive,
    /// Never poll; wait for the interrupt.
    Interrupt,
    /// Poll for as long as commands are outstanding. The queue's interrupt is off.
    Busy,
    /// Two queue pairs in the place of each: one without an interrupt, for commands whose completion
    /// is expected while the queue is polled, and one that is never polled, for the others. Interrupts
    /// come only where somebody sleeps. What is late on the first one is looked for by a timer, ever
    /// less often.
    ///
    /// A controller that grants a single queue pair has it as with [`Interrupt`](Self::Interrupt).
    Paired,
}

impl PollMode {
    /// Whether a completion is told of by an interrupt.
    pub(crate) fn has_interrupt(self) -> bool {
        match self {
            Self::Adaptive | Self::Interrupt => true,
            Self::Busy | Self::Paired => false,
        }
    }
}

/// What a queue needs to know besides its rings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueSettings {
    pub(crate) mode: PollMode,
    /// What it costs to sleep until an interrupt.
    pub(crate) costs: Costs,
    /// The longest time without a completion for which an adaptive queue polls.
    pub(crate) max_window: Duration,
    /// For how long the controller may put off an interrupt.
    pub(crate) coalescing_time: Duration,
    /// How often a command may be sent again.
    pub(crate) retries: u32,
    /// Whether commands fail while recovery is under way, instead of waiting for its end.
    pub(crate) fails_fast: bool,
    /// What the controller's three Command Retry Delay Times stand for (CRDT1 to CRDT3).
    pub(crate) retry_delays: [Duration; 3],
}

impl QueueSettings {
    /// How long to wait before a command is sent again whose status has this Command Retry Delay.
    pub(crate) fn retry_delay(&self, crd: u8) -> Duration {
        match crd {
            0 => Duration::ZERO,
            index => self.retry_delays[usize::from(index - 1).min(2)],
        }
    }
}

/// How futures reach a queue pair: through a lock, or on one thread without.
///
/// [`SharedQueue`] and [`LocalQueue`] are the two ways, and there are no others.
#[expect(private_bounds, reason = "how it works is nobody else's business")]
pub trait QueueAccess: access::Access {}

impl QueueAccess for std::sync::Arc<SharedQueue> {}
impl QueueAccess for std::rc::Rc<LocalQueue> {}

pub(crate) mod access {
    use super::park::Hook;
    use super::state::{Outcome, Term};
    use super::{Failure, Notification, State};
    use crate::io::HoldingsMut;

    /// Access to the state of a queue pair, and a reaper for it.
    pub(crate) trait Access: Clone + Unpin + 'static {
        /// Runs `f` on the state, or returns nothing if the queue pair was taken away.
        fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> Option<R>;

        /// The queue pair beside this one that has no interrupt, if there is one.
        fn polled(&self) -> Option<&Self>;

        /// Leaves the polling to the hook of the current runtime, for the reaper of this term.
        fn park(&self, hook: &Hook, term: Term);

        /// Spawns a reaper on the current runtime, if the queue has none.
        fn spawn_reaper(&self) -> Result<(), Failure>;

        /// The outcome of an operation of a queue pair that has ended, and in `holdings` what it
        /// held, unless the device may still use it.
        fn late_outcome(&self, key: usize, holdings: HoldingsMut<'_>) -> Option<Outcome>;

        /// Passes on what the controller reported by itself.
        fn report(&self, event: Notification);
    }
}
