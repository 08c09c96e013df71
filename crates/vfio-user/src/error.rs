//! What can be wrong with a message.

use rustix::io::Errno;

use crate::header::Command;

/// A message that is not what the specification says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The payload has another size than the command calls for.
    #[error("{command}: the payload has {actual} bytes, not {expected}")]
    Size {
        /// The command.
        command: Command,
        /// What there was to be, in bytes; at least, where more may follow.
        expected: u64,
        /// What there is, in bytes.
        actual: u64,
    },
    /// A field has a value that it may not have.
    #[error("{command}: {field} is {value:#x}")]
    Field {
        /// The command.
        command: Command,
        /// The field, by the specification's name.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// Another number of file descriptors than the command calls for.
    #[error("{command}: {count} file descriptors")]
    Descriptors {
        /// The command.
        command: Command,
        /// How many there are.
        count: usize,
    },
    /// Something optional that is not supported.
    #[error("{command}: {what} is not supported")]
    Unsupported {
        /// The command.
        command: Command,
        /// What is asked for.
        what: &'static str,
    },
    /// The version data is not what it is to be.
    #[error("VERSION: {0}")]
    Capabilities(String),
    /// A reply where a command is expected, or the other way round.
    #[error("{0}: a reply where a command is expected, or the other way round")]
    Direction(Command),
}

impl DecodeError {
    /// The error number that tells the peer.
    pub fn errno(&self) -> u32 {
        let errno = match self {
            Self::Unsupported { .. } => Errno::OPNOTSUPP,
            _ => Errno::INVAL,
        };
        errno.raw_os_error().unsigned_abs()
    }
}

/// Why a reply does not say what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReplyError {
    /// The peer reports an error. Its number is 0 where the peer gives no reason.
    #[error("{command}: refused by the peer: {}", describe(*errno))]
    Peer {
        /// The command.
        command: Command,
        /// The error number (errno), or 0.
        errno: u32,
    },
    /// The reply is not what the specification says.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

fn describe(errno: u32) -> String {
    match i32::try_from(errno) {
        Ok(0) | Err(_) => format!("error {errno}"),
        Ok(errno) => std::io::Error::from_raw_os_error(errno).to_string(),
    }
}
