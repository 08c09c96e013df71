//! The submission queue entry: 64 bytes that name a command, its namespace and its data.
//!
//! Base, section 3.3.3.1 "Submission Queue Entry", figures "Command Dword 0" and "Common Command Format".

use core::fmt;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::sgl::SglDescriptor;
use crate::status::Status;

/// A submission queue entry, as it lies in the queue.
///
/// Made by the functions in [`admin`](crate::admin) and [`nvm`](crate::nvm), which leave the command
/// identifier 0 and the data pointer empty; [`with_cid`](Self::with_cid) and
/// [`with_data`](Self::with_data) fill them in. A command that has no builder starts from
/// [`Sqe::new`].
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
// In queues entries lie at multiples of their size; a copy that does too moves in whole words.
#[repr(C, align(8))]
pub struct Sqe {
    dwords: [U32; 16],
}

const _: () = assert!(size_of::<Sqe>() == 64);

/// The dwords of the common command format.
const CDW0: usize = 0;
const NSID: usize = 1;
const CDW2: usize = 2;
const CDW3: usize = 3;
const MPTR: usize = 4;
const DPTR: usize = 6;
const CDW10: usize = 10;

/// PSDT in command dword 0, bits 15:14.
const PSDT_SHIFT: u32 = 14;
const PSDT_MASK: u32 = 0b11 << PSDT_SHIFT;

impl Sqe {
    /// An entry that has only an opcode.
    #[inline]
    pub const fn new(opcode: u8) -> Self {
        let mut dwords = [U32::new(0); 16];
        dwords[CDW0] = U32::new(opcode as u32);
        Self { dwords }
    }

    /// The entry of these 16 dwords (in the host's byte order).
    #[inline]
    pub const fn from_dwords(dwords: [u32; 16]) -> Self {
        let mut wire = [U32::new(0); 16];
        let mut i = 0;
        while i < 16 {
            wire[i] = U32::new(dwords[i]);
            i += 1;
        }
        Self { dwords: wire }
    }

    /// The 16 dwords (in the host's byte order).
    #[inline]
    pub const fn dwords(&self) -> [u32; 16] {
        let mut host = [0; 16];
        let mut i = 0;
        while i < 16 {
            host[i] = self.dwords[i].get();
            i += 1;
        }
        host
    }

    /// The opcode: an [`AdminOpcode`](crate::opcode::AdminOpcode) or an
    /// [`NvmOpcode`](crate::opcode::NvmOpcode), depending on the queue.
    #[inline]
    pub const fn opcode(&self) -> u8 {
        self.dwords[CDW0].get() as u8
    }

    /// FUSE, 2 bits: 0 normal, 1 first and 2 second command of a fused operation.
    #[inline]
    pub const fn fuse(&self) -> u8 {
        (self.dwords[CDW0].get() >> 8) as u8 & 0b11
    }

    /// PSDT, 2 bits: 0 PRPs, 1 SGL with a contiguous metadata buffer, 2 SGL with metadata by SGL.
    #[inline]
    pub const fn psdt(&self) -> u8 {
        ((self.dwords[CDW0].get() & PSDT_MASK) >> PSDT_SHIFT) as u8
    }

    /// The command identifier, unique among the commands outstanding on its queue.
    #[inline]
    pub const fn cid(&self) -> u16 {
        (self.dwords[CDW0].get() >> 16) as u16
    }

    /// The namespace identifier: 0 where none is meant, `0xffff_ffff` for all.
    #[inline]
    pub const fn nsid(&self) -> u32 {
        self.dwords[NSID].get()
    }

    /// Command dword 2.
    #[inline]
    pub const fn cdw2(&self) -> u32 {
        self.dwords[CDW2].get()
    }

    /// Command dword 3.
    #[inline]
    pub const fn cdw3(&self) -> u32 {
        self.dwords[CDW3].get()
    }

    /// MPTR: where the metadata is.
    #[inline]
    pub const fn metadata_pointer(&self) -> u64 {
        self.qword(MPTR)
    }

    /// DPTR, by what PSDT says it is.
    ///
    /// # Errors
    /// [`ReservedPsdt`] if PSDT is 11b. An SGL descriptor is not looked into; see
    /// [`SglDescriptor::decode`].
    #[inline]
    pub const fn data_pointer(&self) -> Result<DataPointer, ReservedPsdt> {
        let (low, high) = (self.qword(DPTR), self.qword(DPTR + 2));
        match self.psdt() {
            0 => Ok(DataPointer::Prp {
                prp1: low,
                prp2: high,
            }),
            1 | 2 => Ok(DataPointer::Sgl(SglDescriptor::from_qwords([low, high]))),
            _ => Err(ReservedPsdt),
        }
    }

    /// Command dword 10.
    #[inline]
    pub const fn cdw10(&self) -> u32 {
        self.dwords[CDW10].get()
    }

    /// Command dword 11.
    #[inline]
    pub const fn cdw11(&self) -> u32 {
        self.dwords[CDW10 + 1].get()
    }

    /// Command dword 12.
    #[inline]
    pub const fn cdw12(&self) -> u32 {
        self.dwords[CDW10 + 2].get()
    }

    /// Command dword 13.
    #[inline]
    pub const fn cdw13(&self) -> u32 {
        self.dwords[CDW10 + 3].get()
    }

    /// Command dword 14.
    #[inline]
    pub const fn cdw14(&self) -> u32 {
        self.dwords[CDW10 + 4].get()
    }

    /// Command dword 15.
    #[inline]
    pub const fn cdw15(&self) -> u32 {
        self.dwords[CDW10 + 5].get()
    }

    /// Command dwords 10 (low half) and 11 (high half) as one value: SLBA of the NVM commands.
    #[inline]
    pub const fn cdw10_11(&self) -> u64 {
        self.qword(CDW10)
    }

    /// This entry with FUSE set; only the lowest two bits of `fuse` count.
    #[inline]
    pub const fn with_fuse(self, fuse: u8) -> Self {
        let cdw0 = self.dwords[CDW0].get() & !(0b11 << 8);
        self.with_dword(CDW0, cdw0 | ((fuse as u32 & 0b11) << 8))
    }

    /// This entry with that command identifier.
    #[inline]
    pub const fn with_cid(self, cid: u16) -> Self {
        let cdw0 = self.dwords[CDW0].get() & 0xffff;
        self.with_dword(CDW0, cdw0 | ((cid as u32) << 16))
    }

    /// This entry for that namespace.
    #[inline]
    pub const fn with_nsid(self, nsid: u32) -> Self {
        self.with_dword(NSID, nsid)
    }

    /// This entry with command dword 2.
    #[inline]
    pub const fn with_cdw2(self, value: u32) -> Self {
        self.with_dword(CDW2, value)
    }

    /// This entry with command dword 3.
    #[inline]
    pub const fn with_cdw3(self, value: u32) -> Self {
        self.with_dword(CDW3, value)
    }

    /// This entry with its metadata at `address`.
    #[inline]
    pub const fn with_metadata_pointer(self, address: u64) -> Self {
        self.with_qword(MPTR, address)
    }

    /// This entry with that data pointer; PSDT follows from its kind (SGL: 01b, so metadata, if
    /// any, is one contiguous buffer).
    #[inline]
    pub const fn with_data(self, data: DataPointer) -> Self {
        let (psdt, [low, high]) = match data {
            DataPointer::Prp { prp1, prp2 } => (0, [prp1, prp2]),
            DataPointer::Sgl(descriptor) => (1, descriptor.qwords()),
        };
        let cdw0 = self.dwords[CDW0].get() & !PSDT_MASK;
        self.with_dword(CDW0, cdw0 | (psdt << PSDT_SHIFT))
            .with_qword(DPTR, low)
            .with_qword(DPTR + 2, high)
    }

    /// This entry with command dword 10.
    #[inline]
    pub const fn with_cdw10(self, value: u32) -> Self {
        self.with_dword(CDW10, value)
    }

    /// This entry with command dword 11.
    #[inline]
    pub const fn with_cdw11(self, value: u32) -> Self {
        self.with_dword(CDW10 + 1, value)
    }

    /// This entry with command dword 12.
    #[inline]
    pub const fn with_cdw12(self, value: u32) -> Self {
        self.with_dword(CDW10 + 2, value)
    }

    /// This entry with command dword 13.
    #[inline]
    pub const fn with_cdw13(self, value: u32) -> Self {
        self.with_dword(CDW10 + 3, value)
    }

    /// This entry with command dword 14.
    #[inline]
    pub const fn with_cdw14(self, value: u32) -> Self {
        self.with_dword(CDW10 + 4, value)
    }

    /// This entry with command dword 15.
    #[inline]
    pub const fn with_cdw15(self, value: u32) -> Self {
        self.with_dword(CDW10 + 5, value)
    }

    /// This entry with command dwords 10 (low half) and 11 (high half).
    #[inline]
    pub const fn with_cdw10_11(self, value: u64) -> Self {
        self.with_qword(CDW10, value)
    }

    #[inline]
    const fn qword(&self, index: usize) -> u64 {
        self.dwords[index].get() as u64 | ((self.dwords[index + 1].get() as u64) << 32)
    }

    #[inline]
    const fn with_dword(mut self, index: usize, value: u32) -> Self {
        self.dwords[index] = U32::new(value);
        self
    }

    #[inline]
    const fn with_qword(self, index: usize, value: u64) -> Self {
        self.with_dword(index, value as u32)
            .with_dword(index + 1, (value >> 32) as u32)
    }
}

impl fmt::Debug for Sqe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sqe")
            .field("opcode", &format_args!("{:#04x}", self.opcode()))
            .field("fuse", &self.fuse())
            .field("psdt", &self.psdt())
            .field("cid", &self.cid())
            .field("nsid", &format_args!("{:#x}", self.nsid()))
            .field("cdw2", &format_args!("{:#x}", self.cdw2()))
            .field("cdw3", &format_args!("{:#x}", self.cdw3()))
            .field("mptr", &format_args!("{:#x}", self.metadata_pointer()))
            .field("dptr.0", &format_args!("{:#x}", self.qword(DPTR)))
            .field("dptr.1", &format_args!("{:#x}", self.qword(DPTR + 2)))
            .field("cdw10", &format_args!("{:#x}", self.cdw10()))
            .field("cdw11", &format_args!("{:#x}", self.cdw11()))
            .field("cdw12", &format_args!("{:#x}", self.cdw12()))
            .field("cdw13", &format_args!("{:#x}", self.cdw13()))
            .field("cdw14", &format_args!("{:#x}", self.cdw14()))
            .field("cdw15", &format_args!("{:#x}", self.cdw15()))
            .finish()
    }
}

/// Where a command's data is (Base, figure "Common Command Format", DPTR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPointer {
    /// Physical region pages (Base, section 4.1.1).
    Prp {
        /// The first page, with an offset into it.
        prp1: u64,
        /// The second page, or the list of the pages from the second on, or reserved: by how
        /// many pages the transfer touches.
        prp2: u64,
    },
    /// A scatter gather list's first descriptor (Base, section 4.1.2).
    Sgl(SglDescriptor),
}

/// PSDT of a submission queue entry has its reserved value, 11b.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedPsdt;

impl ReservedPsdt {
    /// What a controller answers.
    #[inline]
    pub const fn status(self) -> Status {
        Status::INVALID_FIELD
    }
}

impl fmt::Display for ReservedPsdt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PSDT of the command has the reserved value 11b")
    }
}

// Written by hand, like the crate's other error: thiserror would bring in `std`.
impl core::error::Error for ReservedPsdt {}

#[cfg(test)]
mod tests;
