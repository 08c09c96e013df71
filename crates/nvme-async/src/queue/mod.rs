//! The protocol core of one queue pair: slots, rings, flow control and data pointers.
//!
//! Nothing here performs I/O, reads a clock or knows of Tokio. It works on ring memory and
//! doorbells that it is given, so that the same code runs under the async engine, under a test
//! that plays the device, and under a fuzzer.

pub(crate) mod core;
pub(crate) mod data_pointer;
pub(crate) mod ring;
pub(crate) mod shadow;

#[cfg(test)]
pub(crate) mod tests;

pub(crate) use self::core::{Class, Finished, QueueCore, Reclaimed};
pub(crate) use self::ring::{CompletionRing, SubmissionRing};
pub(crate) use self::shadow::{DoorbellBuffers, QueueDoorbell};

/// Something that the device said which it may not say.
///
/// After one of these nothing more that the queue pair reports can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Lie {
    /// A completion names a command that is not outstanding.
    #[error("a completion for command identifier {cid:#x}, which is not outstanding")]
    UnknownCommand {
        /// The command identifier in the completion.
        cid: u16,
    },
    /// A completion reports a submission queue head outside of the entries in use.
    #[error("submission queue head {head} in a completion, outside of the entries in use")]
    SubmissionHead {
        /// The head in the completion.
        head: u16,
    },
    /// A completion names a submission queue that does not feed this completion queue.
    #[error("a completion for submission queue {submission_queue}, which does not complete here")]
    WrongQueue {
        /// The submission queue identifier in the completion.
        submission_queue: u16,
    },
}
