//! What a front end has said of a queue.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::eventfd::Signal;
use super::queue::RunningQueue;

/// What is known of a queue, and the queue while it runs.
#[derive(Debug, Default)]
pub(super) struct Vring {
    /// How many descriptors it has; 0 if it was not said.
    pub(super) size: u16,
    pub(super) places: Option<Places>,
    /// Where in the available ring to begin.
    pub(super) base: u16,
    /// Signalled by the guest; if it is missing, the ring is looked at in its place.
    pub(super) kick: Option<Arc<OwnedFd>>,
    /// From SET_VRING_KICK to GET_VRING_BASE.
    pub(super) is_started: bool,
    pub(super) is_enabled: bool,
    /// Interrupts the guest.
    pub(super) call: Arc<Signal>,
    /// Tells the front end that the queue is broken.
    pub(super) broken: Arc<Signal>,
    pub(super) running: Option<RunningQueue>,
}

/// Where a queue is, in addresses of the front end's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    pub(super) table: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}
