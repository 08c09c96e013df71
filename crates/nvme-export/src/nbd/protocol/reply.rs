//! Replies, as bytes.

use super::MAX_STRING;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;

const DONE: u16 = 1;

const OFFSET_DATA: u16 = 1;
const OFFSET_HOLE: u16 = 2;
const BLOCK_STATUS: u16 = 5;
const ERROR: u16 = 1 << 15 | 1;
const ERROR_OFFSET: u16 = 1 << 15 | 2;

/// Why a request has failed, as the protocol says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// It may not be done.
    Permission = 1,
    /// The device has failed.
    Io = 5,
    /// There is no memory for it.
    NoMemory = 12,
    /// It makes no sense.
    Invalid = 22,
    /// There is no room for it.
    NoSpace = 28,
    /// A read that is too long to be answered in one piece, as the client wants it.
    Overflow = 75,
    /// The server is about to end.
    Shutdown = 108,
}

/// A reply without data; `None` for success.
pub(super) fn simple(bytes: &mut Vec<u8>, cookie: u64, error: Option<Errno>) {
    bytes.extend_from_slice(&SIMPLE_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&error.map_or(0, |error| error as u32).to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
}

/// What comes before `len` bytes of data that were read at `offset`.
pub(super) fn data(bytes: &mut Vec<u8>, cookie: u64, offset: u64, len: u32) {
    chunk(bytes, OFFSET_DATA, cookie, 8 + len);
    bytes.extend_from_slice(&offset.to_be_bytes());
}

/// All of a read, of which each byte is zero.
pub(super) fn hole(bytes: &mut Vec<u8>, cookie: u64, offset: u64, len: u32) {
    chunk(bytes, OFFSET_HOLE, cookie, 12);
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
}

/// One extent of a metadata context.
pub(super) fn extent(bytes: &mut Vec<u8>, cookie: u64, context: u32, len: u32, flags: u32) {
    chunk(bytes, BLOCK_STATUS, cookie, 12);
    for word in [context, len, flags] {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
}

/// A failure, with what to tell people, and where it happened if that is known.
pub(super) fn error(
    bytes: &mut Vec<u8>,
    cookie: u64,
    error: Errno,
    message: &str,
    offset: Option<u64>,
) {
    let message = &message[..message.floor_char_boundary(MAX_STRING)];
    let len = message.len() as u32;
    match offset {
        None => chunk(bytes, ERROR, cookie, 6 + len),
        Some(_) => chunk(bytes, ERROR_OFFSET, cookie, 14 + len),
    }
    bytes.extend_from_slice(&(error as u32).to_be_bytes());
    bytes.extend_from_slice(&(len as u16).to_be_bytes());
    bytes.extend_from_slice(message.as_bytes());
    if let Some(offset) = offset {
        bytes.extend_from_slice(&offset.to_be_bytes());
    }
}

/// The header of the only chunk of a reply.
fn chunk(bytes: &mut Vec<u8>, kind: u16, cookie: u64, len: u32) {
    bytes.extend_from_slice(&STRUCTURED_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&DONE.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOKIE: u64 = 0x0102_0304_0506_0708;

    fn made(make: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = Vec::new();
        make(&mut bytes);
        bytes
    }

    #[test]
    fn simple_replies() {
        assert_eq!(
            made(|bytes| simple(bytes, COOKIE, None)),
            b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08"
        );
        assert_eq!(
            made(|bytes| simple(bytes, COOKIE, Some(Errno::Shutdown))),
            b"\x67\x44\x66\x98\0\0\0\x6c\x01\x02\x03\x04\x05\x06\x07\x08"
        );
    }

    #[test]
    fn chunks() {
        let start = |kind: &[u8; 2]| {
            let mut bytes = b"\x66\x8e\x33\xef\0\x01".to_vec();
            bytes.extend_from_slice(kind);
            bytes.extend_from_slice(&COOKIE.to_be_bytes());
            bytes
        };
        let expected = |kind, rest: &[u8]| [&start(kind)[..], rest].concat();
        assert_eq!(
            made(|bytes| data(bytes, COOKIE, 0x1000, 512)),
            expected(b"\0\x01", b"\0\0\x02\x08\0\0\0\0\0\0\x10\0")
        );
        assert_eq!(
            made(|bytes| hole(bytes, COOKIE, 0x1000, 512)),
            expected(b"\0\x02", b"\0\0\0\x0c\0\0\0\0\0\0\x10\0\0\0\x02\0")
        );
        assert_eq!(
            made(|bytes| extent(bytes, COOKIE, 1, 4096, 3)),
            expected(b"\0\x05", b"\0\0\0\x0c\0\0\0\x01\0\0\x10\0\0\0\0\x03")
        );
        assert_eq!(
            made(|bytes| error(bytes, COOKIE, Errno::Invalid, "why", None)),
            expected(b"\x80\x01", b"\0\0\0\x09\0\0\0\x16\0\x03why")
        );
        assert_eq!(
            made(|bytes| error(bytes, COOKIE, Errno::Io, "", Some(512))),
            expected(b"\x80\x02", b"\0\0\0\x0e\0\0\0\x05\0\0\0\0\0\0\0\0\x02\0")
        );
    }

    #[test]
    fn messages_have_a_limit() {
        let long = "ä".repeat(MAX_STRING);
        let bytes = made(|bytes| error(bytes, COOKIE, Errno::Io, &long, None));
        assert_eq!(bytes.len(), 20 + 6 + MAX_STRING);
        let odd = format!("a{long}");
        let bytes = made(|bytes| error(bytes, COOKIE, Errno::Io, &odd, None));
        assert_eq!(bytes.len(), 20 + 6 + MAX_STRING - 1);
    }
}
