//! Whole messages.

use std::os::fd::OwnedFd;

use crate::error::{DecodeError, ReplyError};
use crate::header::{HEADER_SIZE, Header};
use crate::reply::Reply;
use crate::request::Request;

/// Bytes that a message may have besides its header and the data that it transfers: more than any
/// structure, and enough for capabilities.
const OVERHEAD: u32 = 8192;

/// What a receiver accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// File descriptors of one message (`max_msg_fds`); at most the kernel's 253.
    pub max_fds: usize,
    /// Bytes that one message transfers (`max_data_xfer_size`).
    pub max_transfer: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_fds: 16,
            max_transfer: 1 << 20,
        }
    }
}

impl Limits {
    /// Bytes that one message may have, header included.
    pub fn max_message_size(&self) -> u32 {
        self.max_transfer
            .saturating_add(HEADER_SIZE as u32 + OVERHEAD)
    }
}

/// A message as it was received: only its size and type were looked at.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// The file descriptors beside it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// What it asks for.
    ///
    /// # Errors
    ///
    /// As [`Request::decode`].
    pub fn request(&self, limits: &Limits) -> Result<Request<'_>, DecodeError> {
        Request::decode(&self.header, &self.payload, self.fds.len(), limits)
    }

    /// What it answers.
    ///
    /// # Errors
    ///
    /// As [`Reply::decode`].
    pub fn reply(&self, limits: &Limits) -> Result<Reply<'_>, ReplyError> {
        Reply::decode(&self.header, &self.payload, self.fds.len(), limits)
    }
}

/// The message that is these bytes, all of them.
///
/// # Errors
///
/// [`DecodeError`] if there are fewer or more than the header says, or the header is wrong.
pub fn message(bytes: &[u8], limits: &Limits) -> Result<Message, DecodeError> {
    let short = |expected| DecodeError::Field {
        command: crate::Command(0),
        field: "message size",
        value: expected,
    };
    let (header, payload) = bytes
        .split_first_chunk::<HEADER_SIZE>()
        .ok_or_else(|| short(bytes.len() as u64))?;
    let header = Header::decode(header, limits)?;
    if header.payload_size() != payload.len() {
        return Err(short(header.size().into()));
    }
    Ok(Message {
        header,
        payload: payload.to_vec(),
        fds: Vec::new(),
    })
}
