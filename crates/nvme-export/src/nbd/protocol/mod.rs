//! The protocol without I/O: what bytes mean, and which bytes answer them.
//!
//! [`Negotiation`] is the handshake, from the client's flags to the [`Session`] that it agrees on.
//! `Session` says of each [`Request`] what is to be done, or why it is refused, and makes the replies.
//! Everything a client sends is untrusted: lengths are bounded before they are used, and whatever can't be
//! answered is a [`Violation`], which ends the connection.

mod negotiation;
mod option;
mod reply;
mod request;
mod session;

#[cfg(test)]
mod tests;

pub use self::negotiation::{Answer, ClientFlags, Description, Negotiation, Next, greeting};
pub use self::option::{MAX_OPTION_DATA, OptionHeader};
pub use self::reply::Errno;
pub use self::request::Request;
pub use self::session::{Action, Refusal, Session};

/// The longest name of an export in bytes, as for any string of the protocol.
pub const MAX_STRING: usize = 4096;

/// What ends a connection, because nothing can be said that the client would understand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The client's flags have bits that this server does not know.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// What should be an option does not start as one.
    #[error("the magic number of an option is {0:#x}")]
    OptionMagic(u64),
    /// An option has more data than any has.
    #[error("an option of {0} bytes")]
    OptionLength(u32),
    /// The only answer to `NBD_OPT_EXPORT_NAME` for an export that is not there.
    #[error("there is no such export")]
    UnknownExport,
    /// The only answer to `NBD_OPT_EXPORT_NAME` without TLS where that is required.
    #[error("TLS is required, and the client does not use it")]
    TlsRequired,
    /// What should be a request does not start as one.
    #[error("the magic number of a request is {0:#x}")]
    RequestMagic(u32),
    /// A write with more data than was said to be possible.
    #[error("a write of {0} bytes")]
    WriteLength(u32),
}

/// The first `N` bytes, and what follows.
fn take<const N: usize>(bytes: &[u8]) -> Option<([u8; N], &[u8])> {
    let (first, rest) = bytes.split_first_chunk()?;
    Some((*first, rest))
}
