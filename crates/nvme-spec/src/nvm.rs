//! Builders for the I/O commands of the NVM command set (NVM, section 3).
//!
//! Each returns an entry with command identifier 0 and, where the command has data, an empty data
//! pointer for [`Sqe::with_data`]. A `blocks` argument counts logical blocks from 1 to 65,536, which
//! is the caller's to ensure: debug builds assert it, others clamp.

use crate::admin::zeroes_based;
use crate::opcode::NvmOpcode;
use crate::sqe::Sqe;

/// The most logical blocks of one command: NLB is a 16-bit 0's based field.
pub const MAX_BLOCKS: u32 = 0x1_0000;

/// Deallocate, in command dword 12 of Write Zeroes.
const DEALLOCATE: u32 = 1 << 25;
/// Force Unit Access, in command dword 12.
const FUA: u32 = 1 << 30;

/// Read `blocks` logical blocks from `slba` on (NVM, section 3.2.4). With `fua` the data come from
/// non-volatile media, where they are put first if need be.
#[inline]
pub const fn read(nsid: u32, slba: u64, blocks: u32, fua: bool) -> Sqe {
    range(NvmOpcode::READ, nsid, slba, blocks, flag(fua, FUA))
}

/// Write `blocks` logical blocks from `slba` on (NVM, section 3.2.6). With `fua` the command completes
/// once the data are on non-volatile media.
#[inline]
pub const fn write(nsid: u32, slba: u64, blocks: u32, fua: bool) -> Sqe {
    range(NvmOpcode::WRITE, nsid, slba, blocks, flag(fua, FUA))
}

/// Flush: what completed before is put on non-volatile media (Base, section 7.1).
#[inline]
pub const fn flush(nsid: u32) -> Sqe {
    Sqe::new(NvmOpcode::FLUSH.0).with_nsid(nsid)
}

/// Write Zeroes: `blocks` logical blocks from `slba` on read as zeroes afterwards
/// (NVM, section 3.2.8). With `deallocate` the controller is asked to give the blocks up; they still
/// read as zeroes.
#[inline]
pub const fn write_zeroes(nsid: u32, slba: u64, blocks: u32, deallocate: bool, fua: bool) -> Sqe {
    let flags = flag(deallocate, DEALLOCATE) | flag(fua, FUA);
    range(NvmOpcode::WRITE_ZEROES, nsid, slba, blocks, flags)
}

/// Dataset Management for `ranges` [`dsm::Range`](crate::dsm::Range)s, 1 to 256, that are the
/// command's data (NVM, section 3.2.3). With `deallocate` the blocks are given up (AD).
///
/// Debug builds assert the number of ranges, others clamp.
#[inline]
pub const fn dataset_management(nsid: u32, ranges: u32, deallocate: bool) -> Sqe {
    const ATTRIBUTE_DEALLOCATE: u32 = 1 << 2;
    debug_assert!(ranges >= 1 && ranges <= 256);
    Sqe::new(NvmOpcode::DATASET_MANAGEMENT.0)
        .with_nsid(nsid)
        .with_cdw10(zeroes_based_byte(ranges))
        .with_cdw11(flag(deallocate, ATTRIBUTE_DEALLOCATE))
}

/// Compare `blocks` logical blocks from `slba` on with the command's data (NVM, section 3.2.1). The
/// status is [`COMPARE_FAILURE`](crate::Status::COMPARE_FAILURE) if they differ.
#[inline]
pub const fn compare(nsid: u32, slba: u64, blocks: u32, fua: bool) -> Sqe {
    range(NvmOpcode::COMPARE, nsid, slba, blocks, flag(fua, FUA))
}

/// Verify that `blocks` logical blocks from `slba` on can be read, without a transfer
/// (NVM, section 3.2.5).
#[inline]
pub const fn verify(nsid: u32, slba: u64, blocks: u32, fua: bool) -> Sqe {
    range(NvmOpcode::VERIFY, nsid, slba, blocks, flag(fua, FUA))
}

/// Copy `ranges` [`copy::SourceRange`](crate::copy::SourceRange)s of format 0, 1 to 256, that are the
/// command's data, one after the other to `destination_lba` on (NVM, section 3.2.2).
///
/// Debug builds assert the number of ranges, others clamp.
#[inline]
pub const fn copy(nsid: u32, destination_lba: u64, ranges: u32, fua: bool) -> Sqe {
    debug_assert!(ranges >= 1 && ranges <= 256);
    Sqe::new(NvmOpcode::COPY.0)
        .with_nsid(nsid)
        .with_cdw10_11(destination_lba)
        .with_cdw12(zeroes_based_byte(ranges) | flag(fua, FUA))
}

/// The fields that a controller reads from a command over a range of logical blocks (Read, Write,
/// Compare, Verify, Write Zeroes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// The first logical block.
    pub slba: u64,
    /// How many, 1 to 65,536.
    pub blocks: u32,
    /// Force Unit Access.
    pub fua: bool,
    /// Limited Retry.
    pub limited_retry: bool,
    /// Deallocate; of Write Zeroes only.
    pub deallocate: bool,
    /// PRINFO, 4 bits: protection information action (bit 3) and checks (bits 2:0).
    pub prinfo: u8,
}

impl BlockRange {
    /// The fields of `command`. Every value of them means something; whether the range is inside of
    /// the namespace is the caller's to check.
    pub const fn from_command(command: &Sqe) -> Self {
        let cdw12 = command.cdw12();
        Self {
            slba: command.cdw10_11(),
            blocks: (cdw12 & 0xffff) + 1,
            fua: cdw12 & FUA != 0,
            limited_retry: cdw12 & (1 << 31) != 0,
            deallocate: cdw12 & DEALLOCATE != 0,
            prinfo: (cdw12 >> 26) as u8 & 0xf,
        }
    }
}

/// The fields that a controller reads from Copy (NVM, section 3.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyRequest {
    /// The first logical block to write.
    pub destination_lba: u64,
    /// How many source ranges there are, 1 to 256.
    pub ranges: u32,
    /// Descriptor Format of the source ranges, 4 bits; 0 is that of
    /// [`copy::SourceRange`](crate::copy::SourceRange).
    pub format: u8,
    /// PRINFOR, 4 bits: protection information action and checks of the reads.
    pub read_prinfo: u8,
    /// Directive Type of the write, 4 bits.
    pub directive: u8,
    /// PRINFOW, 4 bits: protection information action and checks of the write.
    pub write_prinfo: u8,
    /// Force Unit Access, of the write.
    pub fua: bool,
    /// Limited Retry.
    pub limited_retry: bool,
}

impl CopyRequest {
    /// The fields of `command`. Whether they are valid is the caller's to check.
    pub const fn from_command(command: &Sqe) -> Self {
        let cdw12 = command.cdw12();
        Self {
            destination_lba: command.cdw10_11(),
            ranges: (cdw12 & 0xff) + 1,
            format: (cdw12 >> 8) as u8 & 0xf,
            read_prinfo: (cdw12 >> 12) as u8 & 0xf,
            directive: (cdw12 >> 20) as u8 & 0xf,
            write_prinfo: (cdw12 >> 26) as u8 & 0xf,
            fua: cdw12 & FUA != 0,
            limited_retry: cdw12 & (1 << 31) != 0,
        }
    }
}

const fn range(opcode: NvmOpcode, nsid: u32, slba: u64, blocks: u32, flags: u32) -> Sqe {
    Sqe::new(opcode.0)
        .with_nsid(nsid)
        .with_cdw10_11(slba)
        .with_cdw12(zeroes_based(blocks, 1) | flags)
}

const fn flag(set: bool, bit: u32) -> u32 {
    if set { bit } else { 0 }
}

/// A count of 1 to 256 as an 8-bit 0's based field.
const fn zeroes_based_byte(count: u32) -> u32 {
    let based = zeroes_based(count, 1);
    if based > 0xff { 0xff } else { based }
}

#[cfg(test)]
mod tests;
