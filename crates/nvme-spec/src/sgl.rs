//! Scatter gather list descriptors (Base, section 4.1.2 "Scatter Gather List (SGL)").

use core::fmt;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::status::Status;

/// An SGL descriptor as it lies in memory, 16 bytes: not yet looked at ([`decode`](Self::decode)), or
/// made by one of the constructors.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SglDescriptor {
    address: U64,
    length: U32,
    reserved: [u8; 3],
    /// Subtype in bits 3:0, type in bits 7:4.
    identifier: u8,
}

const _: () = assert!(size_of::<SglDescriptor>() == SglDescriptor::SIZE as usize);
const _: () = assert!(core::mem::offset_of!(SglDescriptor, length) == 8);
const _: () = assert!(core::mem::offset_of!(SglDescriptor, identifier) == 15);

/// The types (Base, figure "SGL Descriptor Type").
const DATA_BLOCK: u8 = 0x0;
const BIT_BUCKET: u8 = 0x1;
const SEGMENT: u8 = 0x2;
const LAST_SEGMENT: u8 = 0x3;

/// Subtype 0: the address field is an address.
const SUBTYPE_ADDRESS: u8 = 0x0;

impl SglDescriptor {
    /// The size of a descriptor in bytes.
    pub const SIZE: u32 = 16;

    /// `length` bytes of data at `address`. A length of 0 is allowed.
    pub const fn data_block(address: u64, length: u32) -> Self {
        Self::new(DATA_BLOCK, address, length)
    }

    /// A segment of descriptors at `address`, itself ending in a segment or last segment descriptor.
    ///
    /// # Errors
    /// The length, in bytes, is 0 or no multiple of 16.
    pub const fn segment(address: u64, length: u32) -> Result<Self, SglError> {
        match check_segment(length) {
            Ok(()) => Ok(Self::new(SEGMENT, address, length)),
            Err(error) => Err(error),
        }
    }

    /// The last segment of descriptors, at `address`.
    ///
    /// # Errors
    /// The length, in bytes, is 0 or no multiple of 16.
    pub const fn last_segment(address: u64, length: u32) -> Result<Self, SglError> {
        match check_segment(length) {
            Ok(()) => Ok(Self::new(LAST_SEGMENT, address, length)),
            Err(error) => Err(error),
        }
    }

    /// `length` bytes of a read that the controller is to throw away.
    pub const fn bit_bucket(length: u32) -> Self {
        Self::new(BIT_BUCKET, 0, length)
    }

    /// What the descriptor says.
    ///
    /// # Errors
    /// A type that is reserved or of another transport, a subtype other than "address", reserved bits
    /// that are set, or a segment's length that is 0 or no multiple of 16.
    pub const fn decode(&self) -> Result<Sgl, SglError> {
        let (address, length) = (self.address.get(), self.length.get());
        let decoded = match self.identifier >> 4 {
            DATA_BLOCK => Sgl::DataBlock { address, length },
            BIT_BUCKET if address != 0 => return Err(SglError::Reserved),
            BIT_BUCKET => Sgl::BitBucket { length },
            SEGMENT => Sgl::Segment { address, length },
            LAST_SEGMENT => Sgl::LastSegment { address, length },
            kind => return Err(SglError::Type(kind)),
        };
        let subtype = self.identifier & 0xf;
        if subtype != SUBTYPE_ADDRESS {
            return Err(SglError::Subtype(subtype));
        }
        if self.reserved[0] | self.reserved[1] | self.reserved[2] != 0 {
            return Err(SglError::Reserved);
        }
        if matches!(decoded, Sgl::Segment { .. } | Sgl::LastSegment { .. })
            && let Err(error) = check_segment(length)
        {
            return Err(error);
        }
        Ok(decoded)
    }

    /// The descriptor of these two 64-bit words (in the host's byte order).
    pub const fn from_qwords(qwords: [u64; 2]) -> Self {
        let [b8, b9, b10, b11, b12, b13, b14, b15] = qwords[1].to_le_bytes();
        Self {
            address: U64::new(qwords[0]),
            length: U32::from_bytes([b8, b9, b10, b11]),
            reserved: [b12, b13, b14],
            identifier: b15,
        }
    }

    /// The two 64-bit words (in the host's byte order), as DPTR of a command takes them.
    pub const fn qwords(&self) -> [u64; 2] {
        let [b8, b9, b10, b11] = self.length.to_bytes();
        let [b12, b13, b14] = self.reserved;
        let high = u64::from_le_bytes([b8, b9, b10, b11, b12, b13, b14, self.identifier]);
        [self.address.get(), high]
    }

    const fn new(kind: u8, address: u64, length: u32) -> Self {
        Self {
            address: U64::new(address),
            length: U32::new(length),
            reserved: [0; 3],
            identifier: (kind << 4) | SUBTYPE_ADDRESS,
        }
    }
}

impl fmt::Debug for SglDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SglDescriptor")
            .field("address", &format_args!("{:#x}", self.address.get()))
            .field("length", &format_args!("{:#x}", self.length.get()))
            .field("identifier", &format_args!("{:#04x}", self.identifier))
            .finish()
    }
}

/// A decoded descriptor. Lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sgl {
    /// Data.
    DataBlock {
        /// Where the data is.
        address: u64,
        /// How much, possibly 0.
        length: u32,
    },
    /// Bytes of a read that go nowhere.
    BitBucket {
        /// How many.
        length: u32,
    },
    /// More descriptors, more segments behind them.
    Segment {
        /// Where they are.
        address: u64,
        /// How long they are: a positive multiple of 16.
        length: u32,
    },
    /// More descriptors, and none behind them.
    LastSegment {
        /// Where they are.
        address: u64,
        /// How long they are: a positive multiple of 16.
        length: u32,
    },
}

/// Why a descriptor is not valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SglError {
    /// A type that is reserved, vendor specific or not one of PCIe's.
    Type(u8),
    /// A subtype other than 0h, "address".
    Subtype(u8),
    /// Reserved bits are set.
    Reserved,
    /// The length of a segment is 0 or no multiple of 16.
    SegmentLength(u32),
}

impl SglError {
    /// What a controller answers.
    pub const fn status(self) -> Status {
        match self {
            Self::Type(_) | Self::Subtype(_) => Status::SGL_TYPE_INVALID,
            Self::Reserved => Status::INVALID_FIELD,
            Self::SegmentLength(_) => Status::INVALID_SGL_SEGMENT,
        }
    }
}

impl fmt::Display for SglError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Type(kind) => write!(f, "SGL descriptor type {kind:#x} is not supported"),
            Self::Subtype(subtype) => {
                write!(f, "SGL descriptor subtype {subtype:#x} is not supported")
            }
            Self::Reserved => f.write_str("reserved bits of an SGL descriptor are set"),
            Self::SegmentLength(length) => {
                write!(
                    f,
                    "SGL segment length {length:#x} is 0 or no multiple of 16"
                )
            }
        }
    }
}

impl core::error::Error for SglError {}

const fn check_segment(length: u32) -> Result<(), SglError> {
    if length == 0 || !length.is_multiple_of(SglDescriptor::SIZE) {
        Err(SglError::SegmentLength(length))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
