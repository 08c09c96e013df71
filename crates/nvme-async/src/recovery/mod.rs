//! Recovery: what is done when a controller is slow, silent, lying, dying or gone.
//!
//! [`machine`] decides and knows neither devices nor clocks; [`supervisor`] does what it says. One
//! plain thread for each controller ([`runner`]) runs the supervisor, so that recovery does not depend
//! on any runtime, and may block. It sleeps for as long as nothing is amiss.

mod action;
mod machine;
mod runner;
mod supervision;
pub(crate) mod supervisor;

#[cfg(test)]
mod tests;

use crate::queue::Lie;

pub(crate) use self::action::Settings;
pub(crate) use self::runner::Retired;
pub(crate) use self::supervision::Supervision;
pub(crate) use self::supervisor::{Plant, QueueLayout};

/// How a controller is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ControllerState {
    /// It works; a single command may be late, and be aborted.
    Live,
    /// A queue pair is created anew, or the controller is reset.
    Recovering {
        /// Why.
        cause: ResetCause,
    },
    /// It could not be made to work again. It accesses no memory, and all operations fail with
    /// [`Error::ControllerFailed`](crate::Error::ControllerFailed).
    Failed {
        /// The last value of the controller status register.
        csts: u32,
    },
    /// It is gone, or the host has asked for it and got it back. All operations fail with
    /// [`Error::Removed`](crate::Error::Removed).
    Removed,
    /// It was shut down.
    Closed,
}

/// Why a queue pair was created anew or a controller was reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResetCause {
    /// A command did not complete in time, and could not be aborted.
    #[error("a command did not complete in time and could not be aborted")]
    Overdue,
    /// The device broke the protocol.
    #[error("the device broke the protocol: {0}")]
    Protocol(Lie),
    /// The controller reported a fatal error (CSTS.CFS).
    #[error("the controller reported a fatal error (CSTS {csts:#x})")]
    Fatal {
        /// The controller status register.
        csts: u32,
    },
    /// The controller was found disabled: it has lost its state, for example with its power.
    #[error("the controller has lost its state")]
    StateLost,
    /// The transport reported an uncorrectable error of the device.
    #[error("the transport reported an error of the device")]
    Reported,
}
