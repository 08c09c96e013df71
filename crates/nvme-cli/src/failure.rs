//! Why a command did not do what was asked.

use std::fmt;
use std::io;
use std::process::ExitCode;

use nvme_async::Error;

/// A command that failed, by whose fault.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The request makes no sense. Nothing was written.
    Request(anyhow::Error),
    /// The request was tried and failed.
    Operation(anyhow::Error),
}

impl Failure {
    /// A request that makes no sense.
    pub(crate) fn request(message: impl fmt::Display) -> Self {
        Self::Request(anyhow::anyhow!("{message}"))
    }

    /// An operation that failed.
    pub(crate) fn operation(message: impl fmt::Display) -> Self {
        Self::Operation(anyhow::anyhow!("{message}"))
    }

    /// The same, with a word on what was attempted.
    pub(crate) fn context(self, attempt: impl fmt::Display + Send + Sync + 'static) -> Self {
        match self {
            Self::Request(error) => Self::Request(error.context(attempt)),
            Self::Operation(error) => Self::Operation(error.context(attempt)),
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Request(_) => ExitCode::from(2),
            Self::Operation(_) => ExitCode::from(1),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Request(error) | Self::Operation(error)) = self;
        write!(f, "{error:#}")
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Url(_)
            | Error::NoNamespace { .. }
            | Error::Unaligned { .. }
            | Error::OutOfRange { .. } => Self::Request(error.into()),
            _ => Self::Operation(error.into()),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Operation(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_told_from_an_operation() {
        let past_the_end = Error::OutOfRange {
            offset: 0,
            len: 1,
            capacity: 0,
        };
        assert!(matches!(Failure::from(past_the_end), Failure::Request(_)));
        let closed = Error::Closed {
            address: "mem:".to_owned(),
            fate: nvme_async::Fate::NotExecuted,
        };
        assert!(matches!(Failure::from(closed), Failure::Operation(_)));
        assert!(matches!(
            Failure::from(io::Error::other("x")),
            Failure::Operation(_)
        ));
    }

    #[test]
    fn says_what_was_attempted() {
        let failure = Failure::from(io::Error::other("disk on fire")).context("reading a.img");
        assert_eq!(failure.to_string(), "reading a.img: disk on fire");
    }
}
