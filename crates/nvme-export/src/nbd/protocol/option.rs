//! Options: what a client asks for during the handshake, and replies to them.

use super::{MAX_STRING, Violation, take};

/// The most data that an option may have: more than any that this server knows needs.
pub const MAX_OPTION_DATA: u32 = 64 << 10;

pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// More queries than this for metadata contexts are refused.
const MAX_QUERIES: u32 = 64;

pub(super) const EXPORT_NAME: u32 = 1;
pub(super) const ABORT: u32 = 2;
pub(super) const LIST: u32 = 3;
pub(super) const STARTTLS: u32 = 5;
pub(super) const INFO: u32 = 6;
pub(super) const GO: u32 = 7;
pub(super) const STRUCTURED_REPLY: u32 = 8;
pub(super) const LIST_META_CONTEXT: u32 = 9;
pub(super) const SET_META_CONTEXT: u32 = 10;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;

const INFO_EXPORT: u16 = 0;
pub(super) const INFO_NAME: u16 = 1;
const INFO_BLOCK_SIZE: u16 = 3;

/// Why an option is refused: `NBD_REP_ERR_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum OptionError {
    Unsupported = 1 << 31 | 1,
    Policy = 1 << 31 | 2,
    Invalid = 1 << 31 | 3,
    TlsRequired = 1 << 31 | 5,
    Unknown = 1 << 31 | 6,
    TooBig = 1 << 31 | 9,
}

/// What an option starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub option: u32,
    /// How many bytes of data follow, at most [`MAX_OPTION_DATA`].
    pub len: u32,
}

impl OptionHeader {
    /// Bytes of it on the wire.
    pub const LEN: usize = 16;

    /// Reads it.
    ///
    /// # Errors
    ///
    /// [`Violation`] if it is none, or too long.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, Violation> {
        let [a, b, c, d, e, f, g, h, rest @ ..] = *bytes;
        let magic = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        if magic != OPTION_MAGIC {
            return Err(Violation::OptionMagic(magic));
        }
        let [a, b, c, d, e, f, g, h] = rest;
        let option = u32::from_be_bytes([a, b, c, d]);
        let len = u32::from_be_bytes([e, f, g, h]);
        if len > MAX_OPTION_DATA {
            return Err(Violation::OptionLength(len));
        }
        Ok(Self { option, len })
    }
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InfoData<'a> {
    pub(super) name: &'a [u8],
    pub(super) wants_name: bool,
}

impl<'a> InfoData<'a> {
    pub(super) fn decode(data: &'a [u8]) -> Result<Self, OptionError> {
        let (name, rest) = string(data).ok_or(OptionError::Invalid)?;
        let (count, rest) = take(rest).ok_or(OptionError::Invalid)?;
        let (kinds, odd) = rest.as_chunks::<2>();
        if !odd.is_empty() || kinds.len() != usize::from(u16::from_be_bytes(count)) {
            return Err(OptionError::Invalid);
        }
        Ok(Self {
            name,
            wants_name: kinds.contains(&INFO_NAME.to_be_bytes()),
        })
    }
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ContextData<'a> {
    pub(super) name: &'a [u8],
    pub(super) queries: Vec<&'a [u8]>,
}

impl<'a> ContextData<'a> {
    pub(super) fn decode(data: &'a [u8]) -> Result<Self, OptionError> {
        let (name, rest) = string(data).ok_or(OptionError::Invalid)?;
        let (count, mut rest) = take(rest).ok_or(OptionError::Invalid)?;
        let count = u32::from_be_bytes(count);
        if count > MAX_QUERIES {
            return Err(OptionError::TooBig);
        }
        let mut queries = Vec::new();
        for _ in 0..count {
            let query;
            (query, rest) = string(rest).ok_or(OptionError::Invalid)?;
            queries.push(query);
        }
        match rest {
            [] => Ok(Self { name, queries }),
            _ => Err(OptionError::Invalid),
        }
    }
}

/// A string after its length in 32 bits, and what follows.
fn string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = take(data)?;
    let len = usize::try_from(u32::from_be_bytes(len)).ok()?;
    if len > MAX_STRING {
        return None;
    }
    rest.split_at_checked(len)
}

/// Replies to one option, as bytes.
#[derive(Debug)]
pub(super) struct Replies {
    option: u32,
    bytes: Vec<u8>,
}

impl Replies {
    pub(super) fn new(option: u32) -> Self {
        Self {
            option,
            bytes: Vec::new(),
        }
    }

    /// The last one: it is done.
    pub(super) fn acknowledge(mut self) -> Vec<u8> {
        self.push(REP_ACK, &[]);
        self.bytes
    }

    /// The last one: it is refused. `message` is for people.
    pub(super) fn refuse(mut self, error: OptionError, message: &str) -> Vec<u8> {
        self.push(error as u32, &[message.as_bytes()]);
        self.bytes
    }

    /// An export of the list.
    pub(super) fn server(&mut self, name: &str) {
        // At most MAX_STRING.
        let len = (name.len() as u32).to_be_bytes();
        self.push(REP_SERVER, &[&len, name.as_bytes()]);
    }

    pub(super) fn export(&mut self, size: u64, flags: u16) {
        let (size, flags) = (size.to_be_bytes(), flags.to_be_bytes());
        self.push(REP_INFO, &[&INFO_EXPORT.to_be_bytes(), &size, &flags]);
    }

    pub(super) fn name(&mut self, name: &str) {
        self.push(REP_INFO, &[&INFO_NAME.to_be_bytes(), name.as_bytes()]);
    }

    pub(super) fn block_size(&mut self, minimum: u32, preferred: u32, maximum: u32) {
        let sizes = [minimum, preferred, maximum].map(u32::to_be_bytes);
        self.push(
            REP_INFO,
            &[&INFO_BLOCK_SIZE.to_be_bytes(), sizes.as_flattened()],
        );
    }

    pub(super) fn context(&mut self, id: u32, name: &str) {
        self.push(REP_META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()]);
    }

    fn push(&mut self, kind: u32, data: &[&[u8]]) {
        // Names and messages are bounded, so this is far from 4 GiB.
        let len = data.iter().map(|part| part.len()).sum::<usize>() as u32;
        self.bytes.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
        for word in [self.option, kind, len] {
            self.bytes.extend_from_slice(&word.to_be_bytes());
        }
        for part in data {
            self.bytes.extend_from_slice(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(magic: u64, option: u32, len: u32) -> [u8; OptionHeader::LEN] {
        let mut bytes = [0; OptionHeader::LEN];
        bytes[..8].copy_from_slice(&magic.to_be_bytes());
        bytes[8..12].copy_from_slice(&option.to_be_bytes());
        bytes[12..].copy_from_slice(&len.to_be_bytes());
        bytes
    }

    #[test]
    fn headers() {
        assert_eq!(
            OptionHeader::decode(b"IHAVEOPT\0\0\0\x07\0\0\x01\x02"),
            Ok(OptionHeader {
                option: GO,
                len: 258
            })
        );
        assert!(OptionHeader::decode(&header(OPTION_MAGIC, 99, MAX_OPTION_DATA)).is_ok());
        assert_eq!(
            OptionHeader::decode(&header(OPTION_MAGIC, GO, MAX_OPTION_DATA + 1)),
            Err(Violation::OptionLength(MAX_OPTION_DATA + 1))
        );
        assert_eq!(
            OptionHeader::decode(&header(7, GO, 0)),
            Err(Violation::OptionMagic(7))
        );
    }

    #[test]
    fn data_of_info() {
        assert_eq!(
            InfoData::decode(b"\0\0\0\x02ab\0\x02\0\x03\0\x01"),
            Ok(InfoData {
                name: b"ab",
                wants_name: true
            })
        );
        assert_eq!(
            InfoData::decode(&[0; 6]),
            Ok(InfoData {
                name: b"",
                wants_name: false
            })
        );
        for wrong in [
            &b""[..],
            b"\0\0\0\0",
            b"\0\0\0\x02a\0\0",
            b"\0\0\0\0\0\x01",
            b"\0\0\0\0\0\x01\0",
            b"\0\0\0\0\0\0\0\x01",
            b"\xff\xff\xff\xff\0\0",
        ] {
            assert_eq!(InfoData::decode(wrong), Err(OptionError::Invalid));
        }
    }

    #[test]
    fn data_of_contexts() {
        assert_eq!(
            ContextData::decode(b"\0\0\0\x01e\0\0\0\x02\0\0\0\x05base:\0\0\0\0"),
            Ok(ContextData {
                name: b"e",
                queries: vec![b"base:", b""]
            })
        );
        for (wrong, error) in [
            (&b"\0\0\0\0"[..], OptionError::Invalid),
            (b"\0\0\0\0\0\0\0\x01", OptionError::Invalid),
            (b"\0\0\0\0\0\0\0\x01\0\0\0\x02a", OptionError::Invalid),
            (b"\0\0\0\0\0\0\0\0\0", OptionError::Invalid),
            (b"\0\0\0\0\xff\xff\xff\xff", OptionError::TooBig),
        ] {
            assert_eq!(ContextData::decode(wrong), Err(error));
        }
    }

    #[test]
    fn strings_have_a_limit() {
        let mut data = (MAX_STRING as u32).to_be_bytes().to_vec();
        data.extend_from_slice(&[b'a'; MAX_STRING + 2]);
        assert_eq!(
            string(&data).map(|(a, b)| (a.len(), b.len())),
            Some((MAX_STRING, 2))
        );
        data[..4].copy_from_slice(&(MAX_STRING as u32 + 1).to_be_bytes());
        assert_eq!(string(&data), None);
    }

    #[test]
    fn replies() {
        let magic = b"\0\x03\xe8\x89\x04\x55\x65\xa9";
        let expected = |rest: &[u8]| [&magic[..], rest].concat();
        let mut made = Replies::new(LIST);
        made.server("ab");
        assert_eq!(
            made.acknowledge(),
            [
                expected(b"\0\0\0\x03\0\0\0\x02\0\0\0\x06\0\0\0\x02ab"),
                expected(b"\0\0\0\x03\0\0\0\x01\0\0\0\0"),
            ]
            .concat()
        );
        let mut made = Replies::new(GO);
        made.export(1 << 20, 0x0103);
        made.name("x");
        made.block_size(512, 4096, 1 << 25);
        assert_eq!(
            made.refuse(OptionError::Unknown, "no"),
            [
                expected(b"\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0\0\0\0\0\0\x10\0\0\x01\x03"),
                expected(b"\0\0\0\x07\0\0\0\x03\0\0\0\x03\0\x01x"),
                expected(b"\0\0\0\x07\0\0\0\x03\0\0\0\x0e\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0"),
                expected(b"\0\0\0\x07\x80\0\0\x06\0\0\0\x02no"),
            ]
            .concat()
        );
        let mut made = Replies::new(SET_META_CONTEXT);
        made.context(1, "base:allocation");
        assert_eq!(
            made.acknowledge(),
            [
                expected(b"\0\0\0\x0a\0\0\0\x04\0\0\0\x13\0\0\0\x01base:allocation"),
                expected(b"\0\0\0\x0a\0\0\0\x01\0\0\0\0"),
            ]
            .concat()
        );
    }
}
