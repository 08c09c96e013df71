//! What the recovery machine goes by, and what it says is to be done.

use std::time::Duration;

use super::{ControllerState, ResetCause};

/// What the machine goes by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// I/O queue pairs, with the identifiers from 1 on.
    pub(crate) queues: u16,
    /// Abort commands that may be outstanding (ACL), at least 1.
    pub(crate) abort_limit: usize,
    /// How long an Abort command may take.
    pub(crate) abort_timeout: Duration,
    /// How long a command may take after it was aborted.
    pub(crate) grace: Duration,
    /// How long any other admin command of a recovery may take.
    pub(crate) step_timeout: Duration,
    /// How long the controller may take to become ready or disabled (CAP.TO, CRTO).
    pub(crate) ready_timeout: Duration,
    /// So many resets within the window are enough to give up.
    pub(crate) max_resets: usize,
    pub(crate) reset_window: Duration,
    /// Whether the controller is to be told that delays before retries are understood (ACRE).
    pub(crate) host_behavior: bool,
    /// Whether interrupts are to be coalesced.
    pub(crate) coalescing: bool,
    /// Whether doorbells are left in memory.
    pub(crate) doorbell_buffers: bool,
}

/// Tells one admin command of a recovery from another.
pub(crate) type StepId = u32;

/// Which queue pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// One of them; 0 is the admin queue.
    Queue(u16),
    /// All but the admin queue.
    Io,
    All,
}

/// An admin command of a recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AdminStep {
    Abort {
        queue: u16,
        cid: u16,
    },
    DeleteSubmissionQueue(u16),
    DeleteCompletionQueue(u16),
    /// Identify Controller: it must be the same one.
    Identify,
    HostBehavior,
    /// Interrupt Coalescing.
    Coalescing,
    /// Doorbell Buffer Config.
    DoorbellBuffers,
    QueueCount,
    CreateCompletionQueue(u16),
    CreateSubmissionQueue(u16),
    /// Asynchronous Event Configuration.
    Events,
}

/// What is to be done, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Read CSTS and say what it is: [`Recovery::status`].
    ReadStatus,
    /// Submit a command to the admin queue, and say how it ended: [`Recovery::step_done`].
    Admin {
        id: StepId,
        step: AdminStep,
    },
    /// Forbid all doorbells of these queues.
    Fence(Scope),
    /// The device has stopped working for these queues: take all commands back, and empty the rings.
    Release(Scope, ResetCause),
    /// The device knows these queues: let them work.
    Resume(Scope),
    /// Clear CC.EN.
    Disable,
    /// Tell the controller of the admin queue, and set CC.EN.
    Enable,
    /// Reset the function, and say whether that worked: [`Recovery::function_reset`].
    ResetFunction,
    /// The controller is set up: ask for its events, look for what changed meanwhile.
    Rearm,
    Announce(ControllerState),
    /// Cut the device off from memory, fail everything, and give it up.
    End(End),
}

/// Why a controller is not used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Removed,
    Failed { csts: u32 },
}

/// Where the machine is, for traces and tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Place {
    Live,
    Aborting,
    Deleting,
    Creating,
    Disabling,
    ResettingFunction,
    Enabling,
    SettingUp,
    Releasing,
    Ended,
}
