//! The header that begins each message ("Header").

use std::fmt;

use zerocopy::{FromBytes, IntoBytes};

use crate::error::DecodeError;
use crate::message::Limits;
use crate::wire;

/// Bytes of the header of each message.
pub const HEADER_SIZE: usize = 16;

/// What a message is about ("Commands"). Later versions have more than have names here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Command(pub u16);

impl Command {
    /// Version and capabilities, the first message.
    pub const VERSION: Self = Self(1);
    /// Memory of the client's that the server may access.
    pub const DMA_MAP: Self = Self(2);
    /// Memory that the server may not access any more.
    pub const DMA_UNMAP: Self = Self(3);
    /// What the device is.
    pub const DEVICE_GET_INFO: Self = Self(4);
    /// What a region of the device is.
    pub const DEVICE_GET_REGION_INFO: Self = Self(5);
    /// Descriptors that stand for writes to a region.
    pub const DEVICE_GET_REGION_IO_FDS: Self = Self(6);
    /// How many interrupts of a type there are.
    pub const DEVICE_GET_IRQ_INFO: Self = Self(7);
    /// Sets, masks and triggers interrupts.
    pub const DEVICE_SET_IRQS: Self = Self(8);
    /// Reads from a region.
    pub const REGION_READ: Self = Self(9);
    /// Writes to a region.
    pub const REGION_WRITE: Self = Self(10);
    /// The server reads memory of the client's.
    pub const DMA_READ: Self = Self(11);
    /// The server writes memory of the client's.
    pub const DMA_WRITE: Self = Self(12);
    /// Resets the device.
    pub const DEVICE_RESET: Self = Self(13);
    /// Which pages the device wrote, of older versions of the protocol.
    pub const DIRTY_PAGES: Self = Self(14);
    /// Several small writes to regions.
    pub const REGION_WRITE_MULTI: Self = Self(15);
    /// Asks for or sets a feature, such as migration.
    pub const DEVICE_FEATURE: Self = Self(16);
    /// Reads the device's state.
    pub const MIG_DATA_READ: Self = Self(17);
    /// Writes the device's state.
    pub const MIG_DATA_WRITE: Self = Self(18);
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::VERSION => "VERSION",
            Self::DMA_MAP => "DMA_MAP",
            Self::DMA_UNMAP => "DMA_UNMAP",
            Self::DEVICE_GET_INFO => "DEVICE_GET_INFO",
            Self::DEVICE_GET_REGION_INFO => "DEVICE_GET_REGION_INFO",
            Self::DEVICE_GET_REGION_IO_FDS => "DEVICE_GET_REGION_IO_FDS",
            Self::DEVICE_GET_IRQ_INFO => "DEVICE_GET_IRQ_INFO",
            Self::DEVICE_SET_IRQS => "DEVICE_SET_IRQS",
            Self::REGION_READ => "REGION_READ",
            Self::REGION_WRITE => "REGION_WRITE",
            Self::DMA_READ => "DMA_READ",
            Self::DMA_WRITE => "DMA_WRITE",
            Self::DEVICE_RESET => "DEVICE_RESET",
            Self::DIRTY_PAGES => "DIRTY_PAGES",
            Self::REGION_WRITE_MULTI => "REGION_WRITE_MULTI",
            Self::DEVICE_FEATURE => "DEVICE_FEATURE",
            Self::MIG_DATA_READ => "MIG_DATA_READ",
            Self::MIG_DATA_WRITE => "MIG_DATA_WRITE",
            Self(number) => return write!(f, "command {number}"),
        };
        f.write_str(name)
    }
}

const TYPE_MASK: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    id: u16,
    command: Command,
    size: u32,
    flags: u32,
    errno: u32,
}

impl Header {
    /// Of a command with so many bytes of payload.
    pub(crate) fn command_of(id: u16, command: Command, payload: usize, no_reply: bool) -> Self {
        Self {
            id,
            command,
            size: size(payload),
            flags: TYPE_COMMAND | if no_reply { NO_REPLY } else { 0 },
            errno: 0,
        }
    }

    /// Of the reply with so many bytes of payload to the command with this header.
    pub(crate) fn reply_to(&self, payload: usize) -> Self {
        Self {
            size: size(payload),
            flags: TYPE_REPLY,
            errno: 0,
            ..*self
        }
    }

    /// Of the reply that reports an error of the command with this header.
    pub(crate) fn error_to(&self, errno: u32) -> Self {
        Self {
            size: size(0),
            flags: TYPE_REPLY | ERROR,
            errno,
            ..*self
        }
    }

    /// Decodes the header of a message of at most the size that `limits` allow.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] if the size or the type is out of range. There is no telling then where the next
    /// message begins.
    pub fn decode(bytes: &[u8; HEADER_SIZE], limits: &Limits) -> Result<Self, DecodeError> {
        let wire = wire::Header::read_from_bytes(bytes).unwrap_or_default();
        let header = Self {
            id: wire.id.get(),
            command: Command(wire.command.get()),
            size: wire.size.get(),
            flags: wire.flags.get(),
            errno: wire.errno.get(),
        };
        let field = |field, value: u32| {
            Err(DecodeError::Field {
                command: header.command,
                field,
                value: value.into(),
            })
        };
        if header.size < HEADER_SIZE as u32 || header.size > limits.max_message_size() {
            return field("message size", header.size);
        }
        if !matches!(header.flags & TYPE_MASK, TYPE_COMMAND | TYPE_REPLY) {
            return field("flags", header.flags);
        }
        Ok(header)
    }

    pub(crate) fn encode(&self) -> [u8; HEADER_SIZE] {
        let wire = wire::Header {
            id: self.id.into(),
            command: self.command.0.into(),
            size: self.size.into(),
            flags: self.flags.into(),
            errno: self.errno.into(),
        };
        let mut bytes = [0; HEADER_SIZE];
        bytes.copy_from_slice(wire.as_bytes());
        bytes
    }

    /// What the sender of a command named it by, to know the reply. Not unique.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// What the message is about.
    pub fn command(&self) -> Command {
        self.command
    }

    /// Bytes of the whole message, header included.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Bytes of the message that follow the header.
    pub fn payload_size(&self) -> usize {
        // At least a header, or it was not decoded.
        self.size as usize - HEADER_SIZE
    }

    /// Whether this is a reply.
    pub fn is_reply(&self) -> bool {
        self.flags & TYPE_MASK == TYPE_REPLY
    }

    /// Whether this is a command that is to be replied to.
    pub fn wants_reply(&self) -> bool {
        !self.is_reply() && self.flags & NO_REPLY == 0
    }

    /// Whether this is a reply that reports an error.
    pub fn is_error(&self) -> bool {
        self.is_reply() && self.flags & ERROR != 0
    }

    /// The error number (errno) of a reply that [reports an error](Self::is_error); 0 where the peer gives
    /// no reason.
    pub fn errno(&self) -> u32 {
        self.errno
    }
}

/// Bytes of a message with so many bytes of payload. Nobody accepts messages of 4 GiB.
fn size(payload: usize) -> u32 {
    u32::try_from(HEADER_SIZE + payload).unwrap_or(u32::MAX)
}
