//! The handshake: fixed newstyle negotiation, from the client's flags to a session.

use super::option::{
    ABORT, ContextData, EXPORT_NAME, GO, INFO, InfoData, LIST, LIST_META_CONTEXT, OPTION_MAGIC,
    OptionError, OptionHeader, Replies, SET_META_CONTEXT, STARTTLS, STRUCTURED_REPLY,
};
use super::{Session, Violation};

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;

/// Handshake flags, and the client's, which have the same values.
const FIXED_NEWSTYLE: u16 = 1 << 0;
const NO_ZEROES: u16 = 1 << 1;

/// The one metadata context that there is, and the wildcard of its namespace in a list.
const ALLOCATION: &str = "base:allocation";
const BASE: &[u8] = b"base:";
/// The number by which its extents are told from those of others, of which there are none.
pub(super) const ALLOCATION_ID: u32 = 1;

/// What a server says first.
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    bytes
}

/// What a client answers to the [`greeting`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientFlags {
    is_fixed: bool,
    no_zeroes: bool,
}

impl ClientFlags {
    /// Bytes of them on the wire.
    pub const LEN: usize = 4;

    /// Reads them.
    ///
    /// # Errors
    ///
    /// [`Violation::ClientFlags`] for flags that this server did not offer.
    pub fn decode(bytes: [u8; Self::LEN]) -> Result<Self, Violation> {
        let flags = u32::from_be_bytes(bytes);
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(Violation::ClientFlags(flags));
        }
        Ok(Self {
            is_fixed: flags & u32::from(FIXED_NEWSTYLE) != 0,
            no_zeroes: flags & u32::from(NO_ZEROES) != 0,
        })
    }
}

/// What clients are told of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Its name, at most [`MAX_STRING`](super::MAX_STRING) bytes.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// The size of its blocks in bytes, a power of two: what offsets and lengths are multiples of.
    pub block_size: u32,
    /// The longest read or write in bytes, a multiple of the block size.
    pub max_request: u32,
    /// Whether writes are refused.
    pub is_read_only: bool,
    /// Whether blocks can be discarded.
    pub can_trim: bool,
}

/// A handshake.
#[derive(Clone, Debug)]
pub struct Negotiation<'a> {
    exports: &'a [Description],
    flags: ClientFlags,
    tls: Tls,
    structured: bool,
    /// The export for which the metadata context is selected.
    allocation_of: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tls {
    None,
    Required,
    Started,
}

/// What a server does about an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What it says.
    pub reply: Vec<u8>,
    /// What it does after having said that.
    pub next: Next,
}

/// What comes after an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another option.
    Option,
    /// The handshake of TLS, and then [`Negotiation::tls_started`].
    StartTls,
    /// Requests.
    Transmission {
        /// The number of the export.
        export: usize,
        /// What was agreed on.
        session: Session,
    },
    /// Nothing: the client has had enough.
    End,
}

impl<'a> Negotiation<'a> {
    /// A handshake for `exports`, the first of which is the default one, with a client that has answered
    /// with `flags`. Where `requires_tls`, nothing is told before TLS was started.
    pub fn new(exports: &'a [Description], flags: ClientFlags, requires_tls: bool) -> Self {
        Self {
            exports,
            flags,
            tls: if requires_tls {
                Tls::Required
            } else {
                Tls::None
            },
            structured: false,
            allocation_of: None,
        }
    }

    /// From now on the connection is encrypted. What was said before does not count.
    pub fn tls_started(&mut self) {
        self.tls = Tls::Started;
        self.structured = false;
        self.allocation_of = None;
    }

    /// Answers an option. `data` is what follows the header.
    ///
    /// # Errors
    ///
    /// [`Violation`] where the protocol has no answer.
    pub fn option(&mut self, header: OptionHeader, data: &[u8]) -> Result<Answer, Violation> {
        let option = header.option;
        let replies = Replies::new(option);
        if self.tls == Tls::Required && !matches!(option, STARTTLS | ABORT) {
            if option == EXPORT_NAME || !self.flags.is_fixed {
                return Err(Violation::TlsRequired);
            }
            return Ok(refused(replies, OptionError::TlsRequired));
        }
        Ok(match option {
            EXPORT_NAME => return self.export_name(data),
            ABORT => Answer {
                reply: replies.acknowledge(),
                next: Next::End,
            },
            LIST | STARTTLS | STRUCTURED_REPLY if !data.is_empty() => {
                refused(replies, OptionError::Invalid)
            }
            LIST => self.list(replies),
            STARTTLS => self.start_tls(replies),
            INFO | GO => self.info(replies, data, option == GO),
            STRUCTURED_REPLY => {
                self.structured = true;
                acknowledged(replies)
            }
            LIST_META_CONTEXT | SET_META_CONTEXT => {
                self.contexts(replies, data, option == SET_META_CONTEXT)
            }
            _ => refused(replies, OptionError::Unsupported),
        })
    }

    fn export_name(&self, name: &[u8]) -> Result<Answer, Violation> {
        let export = self.find(name).ok_or(Violation::UnknownExport)?;
        let session = self.session(export);
        let mut reply = self.exports[export].size.to_be_bytes().to_vec();
        reply.extend_from_slice(&session.transmission_flags().to_be_bytes());
        if !self.flags.no_zeroes {
            reply.extend_from_slice(&[0; 124]);
        }
        let next = Next::Transmission { export, session };
        Ok(Answer { reply, next })
    }

    fn list(&self, mut replies: Replies) -> Answer {
        for export in self.exports {
            replies.server(&export.name);
        }
        acknowledged(replies)
    }

    fn start_tls(&self, replies: Replies) -> Answer {
        match self.tls {
            Tls::None => refused(replies, OptionError::Policy),
            Tls::Started => refused(replies, OptionError::Invalid),
            Tls::Required => Answer {
                reply: replies.acknowledge(),
                next: Next::StartTls,
            },
        }
    }

    fn info(&self, mut replies: Replies, data: &[u8], go: bool) -> Answer {
        let data = match InfoData::decode(data) {
            Ok(data) => data,
            Err(error) => return refused(replies, error),
        };
        let Some(export) = self.find(data.name) else {
            return refused(replies, OptionError::Unknown);
        };
        let session = self.session(export);
        let description = &self.exports[export];
        replies.export(description.size, session.transmission_flags());
        if data.wants_name {
            replies.name(&description.name);
        }
        // Also to those that did not ask: what they don't know they ignore.
        let block_size = description.block_size;
        let preferred = block_size.max(4096);
        replies.block_size(block_size, preferred, description.max_request);
        let next = match go {
            true => Next::Transmission { export, session },
            false => Next::Option,
        };
        Answer {
            reply: replies.acknowledge(),
            next,
        }
    }

    fn contexts(&mut self, mut replies: Replies, data: &[u8], set: bool) -> Answer {
        if set {
            // Also if it fails.
            self.allocation_of = None;
        }
        let data = match ContextData::decode(data) {
            _ if !self.structured => return refused(replies, OptionError::Invalid),
            Ok(data) => data,
            Err(error) => return refused(replies, error),
        };
        let Some(export) = self.find(data.name) else {
            return refused(replies, OptionError::Unknown);
        };
        let named = |query: &&[u8]| *query == ALLOCATION.as_bytes() || (!set && *query == BASE);
        if (!set && data.queries.is_empty()) || data.queries.iter().any(named) {
            replies.context(if set { ALLOCATION_ID } else { 0 }, ALLOCATION);
            if set {
                self.allocation_of = Some(export);
            }
        }
        acknowledged(replies)
    }

    /// The number of the export that a client calls so.
    fn find(&self, name: &[u8]) -> Option<usize> {
        match name {
            [] if !self.exports.is_empty() => Some(0),
            _ => self
                .exports
                .iter()
                .position(|export| export.name.as_bytes() == name),
        }
    }

    fn session(&self, export: usize) -> Session {
        let has_allocation = self.structured && self.allocation_of == Some(export);
        Session::new(&self.exports[export], self.structured, has_allocation)
    }
}

fn acknowledged(replies: Replies) -> Answer {
    Answer {
        reply: replies.acknowledge(),
        next: Next::Option,
    }
}

fn refused(replies: Replies, error: OptionError) -> Answer {
    let message = match error {
        OptionError::Unsupported => "this option is not supported",
        OptionError::Policy => "this server has no TLS",
        OptionError::Invalid => "this option is not valid so, or not at this time",
        OptionError::TlsRequired => "TLS is required",
        OptionError::Unknown => "there is no such export",
        OptionError::TooBig => "these are too many queries",
    };
    Answer {
        reply: replies.refuse(error, message),
        next: Next::Option,
    }
}
