//! Requests, as bytes.

use super::Violation;

const MAGIC: u32 = 0x2560_9513;

pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
pub(super) const DISCONNECT: u16 = 2;
pub(super) const FLUSH: u16 = 3;
pub(super) const TRIM: u16 = 4;
pub(super) const CACHE: u16 = 5;
pub(super) const WRITE_ZEROES: u16 = 6;
pub(super) const BLOCK_STATUS: u16 = 7;

pub(super) const FLAG_FUA: u16 = 1 << 0;
pub(super) const FLAG_NO_HOLE: u16 = 1 << 1;
pub(super) const FLAG_DONT_FRAGMENT: u16 = 1 << 2;
pub(super) const FLAG_ONE_EXTENT: u16 = 1 << 3;

/// A request, but for the data of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// Which command.
    pub command: u16,
    /// What the client knows it by.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub len: u32,
}

impl Request {
    /// Bytes of it on the wire.
    pub const LEN: usize = 28;

    /// Reads it.
    ///
    /// # Errors
    ///
    /// [`Violation::RequestMagic`] if it is none.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, Violation> {
        let at = |start: usize, len: usize| -> u64 {
            let field = &bytes[start..start + len];
            field
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        let magic = at(0, 4) as u32;
        if magic != MAGIC {
            return Err(Violation::RequestMagic(magic));
        }
        Ok(Self {
            flags: at(4, 2) as u16,
            command: at(6, 2) as u16,
            cookie: at(8, 8),
            offset: at(16, 8),
            len: at(24, 4) as u32,
        })
    }

    /// How many bytes of data follow.
    pub fn payload(&self) -> u32 {
        match self.command {
            WRITE => self.len,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [u8; Request::LEN] = *b"\x25\x60\x95\x13\x00\x05\x00\x01\x01\x02\x03\x04\x05\x06\
        \x07\x08\x10\x00\x00\x00\x00\x00\x02\x00\x80\x00\x00\x01";

    #[test]
    fn every_field() {
        let request = Request::decode(&BYTES).expect("a request");
        assert_eq!(
            request,
            Request {
                flags: 5,
                command: WRITE,
                cookie: 0x0102_0304_0506_0708,
                offset: 0x1000_0000_0000_0200,
                len: 0x8000_0001,
            }
        );
        assert_eq!(request.payload(), 0x8000_0001);
        let read = Request {
            command: READ,
            ..request
        };
        assert_eq!(read.payload(), 0);
    }

    #[test]
    fn the_magic_number() {
        let mut bytes = BYTES;
        bytes[3] = 0x14;
        assert_eq!(
            Request::decode(&bytes),
            Err(Violation::RequestMagic(0x2560_9514))
        );
    }
}
