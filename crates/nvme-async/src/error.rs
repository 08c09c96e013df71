//! What can go wrong, with what is needed to act on it.

use std::fmt;
use std::io;
use std::ops::Range;
use std::time::Duration;

use nvme_spec::Status;

use crate::device::DeviceError;
use crate::engine::{Failed, Failure};
use crate::memory::AllocError;
use crate::queue::Lie;
use crate::recovery::ResetCause;

/// An operation on a controller or namespace that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address can't be understood.
    #[error(transparent)]
    Url(#[from] crate::url::UrlError),
    /// The transport could not open the device.
    #[error("{reason}")]
    Open {
        /// The device.
        address: String,
        /// Why, and what to do about it; it names the device.
        reason: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A register access or reset failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The controller can't be used by this driver.
    #[error("{address}: {reason}")]
    Unusable {
        /// The device.
        address: String,
        /// What it lacks.
        reason: String,
    },
    /// The controller did not become ready, or did not shut down, in the time that it states.
    #[error("{address}: the controller did not {action} within {waited:?} (CSTS {csts:#x})")]
    NotReady {
        /// The device.
        address: String,
        /// What was waited for.
        action: &'static str,
        /// For how long.
        waited: Duration,
        /// The last value of the controller status register.
        csts: u32,
    },
    /// The controller has failed, and could not be made to work again.
    #[error(
        "{address}: the controller has failed (CSTS {csts:#x}) and could not be recovered; open it again"
    )]
    ControllerFailed {
        /// The device.
        address: String,
        /// The controller status register.
        csts: u32,
        /// Whether the device may have executed the command.
        fate: Fate,
    },
    /// The device is gone, or the host has asked for it.
    #[error("{address}: the device was removed or does not answer")]
    Removed {
        /// The device.
        address: String,
        /// Whether the device may have executed the command.
        fate: Fate,
    },
    /// The device broke the protocol while it was brought up or shut down. At any other time that is
    /// a cause for [`Error::Reset`].
    #[error("{address}: the device broke the protocol: {lie}")]
    Protocol {
        /// The device.
        address: String,
        /// What it did.
        lie: Lie,
        /// Whether the device may have executed the command.
        fate: Fate,
    },
    /// A command was outstanding when its queue pair had to be created anew or the controller reset,
    /// and may not be sent again.
    #[error("{command} was interrupted by a reset ({fate}): {cause}")]
    Reset {
        /// The command.
        command: CommandName,
        /// Why there was a reset.
        cause: ResetCause,
        /// Whether the device may have executed it.
        fate: Fate,
    },
    /// Recovery is under way, and the controller was opened so that commands fail meanwhile
    /// ([`OnRecovery::Fail`](crate::OnRecovery::Fail)). It was not submitted.
    #[error("{address}: the controller is being recovered; try again later")]
    Recovering {
        /// The device.
        address: String,
    },
    /// A command completed with an error status.
    #[error(transparent)]
    Command(#[from] Box<CommandError>),
    /// A command did not complete before its deadline. It was aborted, or the controller reset, so
    /// that the device does not execute it any more.
    #[error("{command} did not complete in time and was given up after {after:?} ({fate})")]
    TimedOut {
        /// The command.
        command: CommandName,
        /// The time since it was first submitted.
        after: Duration,
        /// Whether the device may have executed it.
        fate: Fate,
    },
    /// Parts of a request that was split failed.
    #[error(transparent)]
    Split(#[from] Box<SplitError>),
    /// There is no such namespace, or it is not active.
    #[error("{address}: namespace {nsid} is not active; active: {active:?}")]
    NoNamespace {
        /// The device.
        address: String,
        /// The namespace asked for.
        nsid: u32,
        /// Those that there are.
        active: Vec<u32>,
    },
    /// The namespace is not active any more. Its handles work again when it comes back as it was.
    #[error("{address}: namespace {nsid} is not active any more")]
    NamespaceGone {
        /// The device.
        address: String,
        /// The namespace.
        nsid: u32,
    },
    /// The namespace is not what was opened: it must be opened again.
    #[error("{address}: namespace {nsid} {how} since it was opened; open it again")]
    NamespaceChanged {
        /// The device.
        address: String,
        /// The namespace.
        nsid: u32,
        /// What is different.
        how: &'static str,
    },
    /// An offset or length is not a multiple of the logical block size.
    #[error(
        "offset {offset} and length {len} must be multiples of the logical block size, {block_size}, \
         and the length not 0"
    )]
    Unaligned {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
        /// In bytes.
        block_size: u32,
    },
    /// A range reaches past the end of the namespace.
    #[error("{len} bytes at offset {offset} reach past the end of the namespace, {capacity} bytes")]
    OutOfRange {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
        /// In bytes.
        capacity: u64,
    },
    /// A source of a copy and its destination have blocks in common.
    #[error("bytes {range:?} can't be copied to bytes {destination:?}, which overlap them")]
    Overlap {
        /// The source, in bytes.
        range: Range<u64>,
        /// Where all sources together would go, in bytes.
        destination: Range<u64>,
    },
    /// A write that must be atomic would be split or torn.
    #[error("an atomic write of {len} bytes at offset {offset} is not possible: {reason}")]
    NotAtomic {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
        /// Which limit it exceeds.
        reason: String,
    },
    /// The controller does not have this command or feature.
    #[error("{address}: the controller does not support {what}")]
    Unsupported {
        /// The device.
        address: String,
        /// The command or feature.
        what: &'static str,
    },
    /// Memory for the operation could not be obtained.
    #[error(transparent)]
    Memory(#[from] AllocError),
    /// Memory could not be mapped for the device.
    #[error(transparent)]
    Mapping(#[from] iova::Error),
    /// All queue pairs are taken.
    #[error("{address}: {reason}")]
    NoFreeQueue {
        /// The device.
        address: String,
        /// What is taken, and how to get more.
        reason: String,
    },
    /// The controller can't be shut down yet.
    #[error("{address}: {reason}")]
    InUse {
        /// The device.
        address: String,
        /// Who uses it.
        reason: &'static str,
    },
    /// The controller was shut down.
    #[error("{address}: the controller was shut down")]
    Closed {
        /// The device.
        address: String,
        /// Whether the device may have executed the command.
        fate: Fate,
    },
    /// No runtime drives the queue: the one that did has ended, and the future was polled
    /// outside of a Tokio runtime.
    #[error("{address}: no Tokio runtime drives the queue; poll the future inside of one")]
    RuntimeGone {
        /// The device.
        address: String,
        /// Whether the device may have executed the command.
        fate: Fate,
    },
    /// The runtime lacks what completions need.
    #[error("{address}: {reason}")]
    NoRuntime {
        /// The device.
        address: String,
        /// What is missing.
        reason: &'static str,
    },
}

/// Whether a command that failed may have had an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fate {
    /// The device did not get it: nothing has changed.
    NotExecuted,
    /// The device may have executed it, wholly or in part: a write may have reached the media, each
    /// logical block of it or not.
    Unknown,
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotExecuted => "it was not executed",
            Self::Unknown => "it may have been executed",
        })
    }
}

impl Error {
    /// Whether what failed so may have had an effect on the media.
    pub fn fate(&self) -> Fate {
        match self {
            Self::TimedOut { fate, .. }
            | Self::Reset { fate, .. }
            | Self::ControllerFailed { fate, .. }
            | Self::Removed { fate, .. }
            | Self::Protocol { fate, .. }
            | Self::Closed { fate, .. }
            | Self::RuntimeGone { fate, .. } => *fate,
            // The device says that it failed, and not how much of it was done before.
            Self::Command(_) => Fate::Unknown,
            Self::Split(split) => {
                let any = split.parts.iter().any(|(_, result)| match result {
                    Ok(()) => true,
                    Err(error) => error.fate() == Fate::Unknown,
                });
                if any {
                    Fate::Unknown
                } else {
                    Fate::NotExecuted
                }
            }
            _ => Fate::NotExecuted,
        }
    }

    /// Whether the failure is that a [compare](crate::Namespace::compare) found other data in the
    /// namespace. Of a compare that was split it is enough that one part did, whatever became of
    /// the others.
    pub fn is_compare_failure(&self) -> bool {
        match self {
            Self::Command(error) => error.status.is(Status::COMPARE_FAILURE),
            Self::Split(split) => split
                .failures()
                .any(|(_, error)| error.is_compare_failure()),
            _ => false,
        }
    }
}

/// A command that completed with an error status.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{command} failed: {status}")]
pub struct CommandError {
    /// The command.
    pub command: CommandName,
    /// Its status, whole: type, code, Do Not Retry, Command Retry Delay and More.
    pub status: Status,
}

/// Names a command in an error.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommandName {
    /// The device.
    pub address: String,
    /// The command's name in the specification.
    pub name: &'static str,
    /// The namespace, if it is for one.
    pub nsid: Option<u32>,
    /// The logical blocks, if it is for some.
    pub blocks: Option<Range<u64>>,
}

impl fmt::Display for CommandName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)?;
        if let Some(nsid) = self.nsid {
            write!(f, ", namespace {nsid}")?;
        }
        write!(f, ": {}", self.name)?;
        if let Some(blocks) = &self.blocks {
            write!(
                f,
                " of {} blocks at LBA {}",
                blocks.end - blocks.start,
                blocks.start
            )?;
        }
        Ok(())
    }
}

/// A request that was split into several commands, of which some failed.
#[derive(Debug, thiserror::Error)]
#[error("{} of {} parts of a request failed; first: {}", self.failures().count(), self.parts.len(), self.first())]
pub struct SplitError {
    /// All parts in order of their logical blocks, with their fate.
    pub parts: Vec<(Range<u64>, Result<(), Error>)>,
}

impl SplitError {
    /// The parts that failed, or whose fate is unknown (those that timed out).
    pub fn failures(&self) -> impl Iterator<Item = (&Range<u64>, &Error)> {
        self.parts
            .iter()
            .filter_map(|(blocks, result)| result.as_ref().err().map(|error| (blocks, error)))
    }

    fn first(&self) -> String {
        self.failures()
            .next()
            .map(|(_, error)| error.to_string())
            .unwrap_or_default()
    }
}

/// A failed read or write, with its buffer.
///
/// `?` turns it into the plain [`Error`] where that is what a function returns; the buffer is
/// dropped then.
#[derive(Debug)]
#[non_exhaustive]
pub struct IoError<B> {
    /// What went wrong.
    pub error: Error,
    /// The buffer. Missing if the device may still access it: when the runtime went away in the
    /// middle, or when a device could neither be stopped nor cut off from memory. What a failed read
    /// left in it is unspecified.
    pub buffer: Option<B>,
}

impl<B> fmt::Display for IoError<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<B: fmt::Debug> std::error::Error for IoError<B> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl<B> From<IoError<B>> for Error {
    fn from(error: IoError<B>) -> Self {
        error.error
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::TimedOut { .. } | Error::NotReady { .. } => io::ErrorKind::TimedOut,
            Error::Unaligned { .. }
            | Error::OutOfRange { .. }
            | Error::Overlap { .. }
            | Error::NotAtomic { .. } => io::ErrorKind::InvalidInput,
            Error::Unsupported { .. } => io::ErrorKind::Unsupported,
            Error::Memory(_) => io::ErrorKind::OutOfMemory,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

impl Failed {
    /// The error that a caller sees when `command` ended so.
    pub(crate) fn into_error(self, command: CommandName) -> Error {
        let Self { failure, fate } = self;
        let address = command.address.clone();
        match failure {
            Failure::TimedOut { after } => Error::TimedOut {
                command,
                after,
                fate,
            },
            Failure::Lie(lie) => Error::Protocol { address, lie, fate },
            Failure::Reset(cause) => Error::Reset {
                command,
                cause,
                fate,
            },
            Failure::Recovering => Error::Recovering { address },
            Failure::ControllerFailed { csts } => Error::ControllerFailed {
                address,
                csts,
                fate,
            },
            Failure::Removed => Error::Removed { address, fate },
            Failure::Closed => Error::Closed { address, fate },
            Failure::RuntimeGone => Error::RuntimeGone { address, fate },
            Failure::NoDriver => Error::NoRuntime {
                address,
                reason: "the Tokio runtime lacks its I/O or time driver; build it with enable_all()",
            },
            Failure::NotLocal => Error::NoRuntime {
                address,
                reason: "a LocalNamespace must be used inside of a LocalSet or LocalRuntime",
            },
        }
    }
}
