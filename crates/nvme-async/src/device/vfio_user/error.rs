//! Why a server could not be used.

use std::io;
use std::time::Duration;

/// Why a controller behind a vfio-user socket could not be opened. Nothing stays open then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Nobody listens there.
    #[error("{address}: no server can be reached{}: {source}", hint(source))]
    NoServer {
        /// The device.
        address: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// The server does not answer.
    #[error(
        "{address}: the server did not answer within {waited:?}: it serves one client at a time, and has \
         probably another one"
    )]
    Busy {
        /// The device.
        address: String,
        /// For how long.
        waited: Duration,
    },
    /// The server refused a step of the opening, broke the protocol or went away.
    #[error("{address}: {operation} failed: {source}")]
    Step {
        /// The device.
        address: String,
        /// What was attempted.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// What the server has is no controller that this driver can use.
    #[error("{address}: {reason}")]
    Unusable {
        /// The device.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// This process has too many files open.
    #[error(
        "{address}: {vectors} interrupt vectors take a file descriptor each, and there can be no more \
         ({source}): raise RLIMIT_NOFILE (`ulimit -n`), or ask for fewer queues"
    )]
    OpenFiles {
        /// The device.
        address: String,
        /// How many are needed.
        vectors: u16,
        /// What the kernel says.
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => " (is it started, and is this its socket?)",
        io::ErrorKind::ConnectionRefused => " (the socket is left of a server that has ended)",
        io::ErrorKind::PermissionDenied => " (the socket must be writable)",
        _ => "",
    }
}
