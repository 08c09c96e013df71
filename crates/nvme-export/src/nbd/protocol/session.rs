//! The transmission phase: what a request asks for, whether it may, and what it is answered.

use super::negotiation::ALLOCATION_ID;
use super::reply::{self, Errno};
use super::request::{
    BLOCK_STATUS, CACHE, DISCONNECT, FLAG_DONT_FRAGMENT, FLAG_FUA, FLAG_NO_HOLE, FLAG_ONE_EXTENT,
    FLUSH, READ, TRIM, WRITE, WRITE_ZEROES,
};
use super::{Description, Request, Violation};

const HAS_FLAGS: u16 = 1 << 0;
const READ_ONLY: u16 = 1 << 1;
const SEND_FLUSH: u16 = 1 << 2;
const SEND_FUA: u16 = 1 << 3;
const SEND_TRIM: u16 = 1 << 5;
const SEND_WRITE_ZEROES: u16 = 1 << 6;
const SEND_DF: u16 = 1 << 7;
const CAN_MULTI_CONN: u16 = 1 << 8;
const SEND_CACHE: u16 = 1 << 10;

/// What a handshake agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    size: u64,
    block_size: u32,
    max_request: u32,
    is_read_only: bool,
    can_trim: bool,
    structured: bool,
    has_allocation: bool,
}

/// What is to be done for a request. Ranges are inside of the export, of whole blocks, and not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read `len` bytes at `offset`.
    Read {
        /// In bytes.
        offset: u64,
        /// In bytes, at most what a request may have.
        len: u32,
    },
    /// Write the data that follows.
    Write {
        /// In bytes.
        offset: u64,
        /// In bytes, at most what a request may have.
        len: u32,
        /// Whether it is answered only when it is durable.
        fua: bool,
    },
    /// Make durable what was answered.
    Flush,
    /// Discard.
    Trim {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u32,
        /// Whether it is answered only when it is durable.
        fua: bool,
    },
    /// Make bytes read as zeroes.
    WriteZeroes {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u32,
        /// Whether they may be deallocated.
        may_deallocate: bool,
        /// Whether it is answered only when it is durable.
        fua: bool,
    },
    /// Nothing: the client will read this soon, and there is no cache to put it in.
    Cache,
    /// Say what is allocated.
    BlockStatus {
        /// In bytes.
        len: u32,
    },
    /// End the connection when all is answered.
    Disconnect,
}

/// Why a request is not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For the client.
    pub errno: Errno,
    /// For people.
    pub message: &'static str,
}

impl Refusal {
    fn invalid(message: &'static str) -> Self {
        Self {
            errno: Errno::Invalid,
            message,
        }
    }
}

impl Session {
    pub(super) fn new(export: &Description, structured: bool, has_allocation: bool) -> Self {
        Self {
            size: export.size,
            block_size: export.block_size,
            max_request: export.max_request,
            is_read_only: export.is_read_only,
            can_trim: export.can_trim,
            structured,
            has_allocation,
        }
    }

    /// What the client is told that it may do.
    pub fn transmission_flags(&self) -> u16 {
        let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN | SEND_CACHE;
        if self.is_read_only {
            flags |= READ_ONLY;
        } else {
            flags |= SEND_WRITE_ZEROES;
            if self.can_trim {
                flags |= SEND_TRIM;
            }
        }
        if self.structured {
            flags |= SEND_DF;
        }
        flags
    }

    /// What to do for `request`, or why not. The data of a write that is refused is still there to be
    /// skipped.
    ///
    /// # Errors
    ///
    /// [`Violation::WriteLength`] where a write has more data than is worth skipping.
    pub fn check(&self, request: &Request) -> Result<Result<Action, Refusal>, Violation> {
        if request.payload() > self.max_request {
            return Err(Violation::WriteLength(request.payload()));
        }
        Ok(self.action(request))
    }

    fn action(&self, request: &Request) -> Result<Action, Refusal> {
        let Request { offset, len, .. } = *request;
        let fua = request.flags & FLAG_FUA != 0;
        // The client is leaving and reads nothing any more, whatever else it says.
        if request.command == DISCONNECT {
            return Ok(Action::Disconnect);
        }
        let allowed = match request.command {
            READ if self.structured => FLAG_DONT_FRAGMENT,
            WRITE_ZEROES => FLAG_NO_HOLE,
            BLOCK_STATUS => FLAG_ONE_EXTENT,
            _ => 0,
        };
        if request.flags & !(allowed | FLAG_FUA) != 0 {
            return Err(Refusal::invalid("the command does not have these flags"));
        }
        match request.command {
            READ => {
                self.check_range(request)?;
                self.check_len(request)?;
                Ok(Action::Read { offset, len })
            }
            WRITE => {
                self.check_change(request)?;
                Ok(Action::Write { offset, len, fua })
            }
            FLUSH if (offset, len) == (0, 0) => Ok(Action::Flush),
            FLUSH => Err(Refusal::invalid("a flush has no offset and no length")),
            TRIM => {
                self.check_change(request)?;
                if !self.can_trim {
                    return Err(Refusal::invalid("blocks can't be discarded here"));
                }
                Ok(Action::Trim { offset, len, fua })
            }
            CACHE => {
                self.check_range(request)?;
                Ok(Action::Cache)
            }
            WRITE_ZEROES => {
                self.check_change(request)?;
                Ok(Action::WriteZeroes {
                    offset,
                    len,
                    may_deallocate: request.flags & FLAG_NO_HOLE == 0,
                    fua,
                })
            }
            BLOCK_STATUS if self.has_allocation => {
                self.check_range(request)?;
                Ok(Action::BlockStatus { len })
            }
            BLOCK_STATUS => Err(Refusal::invalid("no metadata context was selected")),
            _ => Err(Refusal::invalid("there is no such command")),
        }
    }

    fn check_change(&self, request: &Request) -> Result<(), Refusal> {
        if self.is_read_only {
            return Err(Refusal {
                errno: Errno::Permission,
                message: "this export is read-only",
            });
        }
        self.check_range(request)
    }

    fn check_range(&self, request: &Request) -> Result<(), Refusal> {
        let Request { offset, len, .. } = *request;
        let len = u64::from(len);
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            let errno = match request.command {
                WRITE | WRITE_ZEROES => Errno::NoSpace,
                _ => Errno::Invalid,
            };
            let message = "this is past the end of the export";
            return Err(Refusal { errno, message });
        }
        if len == 0 {
            return Err(Refusal::invalid("the length is 0"));
        }
        if (offset | len) & (u64::from(self.block_size) - 1) != 0 {
            return Err(Refusal::invalid(
                "offset and length must be multiples of the minimum block size",
            ));
        }
        Ok(())
    }

    fn check_len(&self, request: &Request) -> Result<(), Refusal> {
        if request.len <= self.max_request {
            return Ok(());
        }
        let errno = match request.flags & FLAG_DONT_FRAGMENT {
            0 => Errno::Invalid,
            _ => Errno::Overflow,
        };
        let message = "this is more than the maximum block size";
        Err(Refusal { errno, message })
    }

    /// Appends the reply to a request that was done, and has no data.
    pub fn success(&self, bytes: &mut Vec<u8>, request: &Request) {
        reply::simple(bytes, request.cookie, None);
    }

    /// Appends the reply to a read, all of which is zero, or what comes before `data`. Returns whether the
    /// data is to follow.
    #[must_use]
    pub fn data(&self, bytes: &mut Vec<u8>, request: &Request, data: &[u8]) -> bool {
        let Request {
            cookie,
            offset,
            len,
            ..
        } = *request;
        debug_assert_eq!(data.len(), len as usize);
        if !self.structured {
            reply::simple(bytes, cookie, None);
            return true;
        }
        if is_zero(data) {
            reply::hole(bytes, cookie, offset, len);
            return false;
        }
        reply::data(bytes, cookie, offset, len);
        true
    }

    /// Appends the reply to a block status request: all of it is allocated, as far as is known.
    pub fn block_status(&self, bytes: &mut Vec<u8>, request: &Request) {
        reply::extent(bytes, request.cookie, ALLOCATION_ID, request.len, 0);
    }

    /// Appends the reply to a request that was not done, or not wholly. `message` is for people; `offset` is
    /// where in the export it failed, if that is known.
    pub fn failure(
        &self,
        bytes: &mut Vec<u8>,
        request: &Request,
        errno: Errno,
        message: &str,
        offset: Option<u64>,
    ) {
        if !self.structured {
            return reply::simple(bytes, request.cookie, Some(errno));
        }
        // A flush has no range that it could be in.
        let start = request.offset;
        let offset = offset.filter(|offset| {
            request.command != FLUSH
                && (start..start.saturating_add(request.len.into())).contains(offset)
        });
        reply::error(bytes, request.cookie, errno, message, offset);
    }
}

/// Whether there is nothing else in `data`. Other data mostly shows it at once.
fn is_zero(data: &[u8]) -> bool {
    let (chunks, rest) = data.as_chunks::<64>();
    let any = |bytes: &[u8]| bytes.iter().fold(0, |any, byte| any | byte) != 0;
    !chunks.iter().any(|chunk| any(chunk)) && !any(rest)
}
