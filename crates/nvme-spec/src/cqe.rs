//! The completion queue entry: 16 bytes by which the controller says how a command ended.
//!
//! Base, section 3.3.3.2 "Common Completion Queue Entry".

use core::fmt;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::status::Status;

/// A completion queue entry, as it lies in the queue.
///
/// Queue memory is the controller's: whoever reads it takes dword 3 first (it holds the phase), then
/// the others, once each, and makes a `Cqe` of that private copy.
#[derive(Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
// In queues entries lie at multiples of their size; a copy that does too moves in whole words.
#[repr(C, align(8))]
pub struct Cqe {
    dwords: [U32; 4],
}

const _: () = assert!(size_of::<Cqe>() == 16);

/// The phase tag in dword 3.
const PHASE: u32 = 1 << 16;

impl Cqe {
    /// The dword that holds phase, status and command identifier, and is written last.
    pub const STATUS_DWORD: usize = 3;

    /// A controller's answer to command `cid`; all else is 0.
    #[inline]
    pub const fn new(cid: u16, status: Status) -> Self {
        Self::from_dwords([0, 0, 0, cid as u32 | ((status.to_bits() as u32) << 17)])
    }

    /// The entry of these 4 dwords (in the host's byte order).
    #[inline]
    pub const fn from_dwords(dwords: [u32; 4]) -> Self {
        Self {
            dwords: [
                U32::new(dwords[0]),
                U32::new(dwords[1]),
                U32::new(dwords[2]),
                U32::new(dwords[3]),
            ],
        }
    }

    /// The 4 dwords (in the host's byte order).
    #[inline]
    pub const fn dwords(&self) -> [u32; 4] {
        [
            self.dwords[0].get(),
            self.dwords[1].get(),
            self.dwords[2].get(),
            self.dwords[3].get(),
        ]
    }

    /// Dword 0: what the command returns, if it returns anything.
    #[inline]
    pub const fn result(&self) -> u32 {
        self.dwords[0].get()
    }

    /// Dwords 0 (low half) and 1 (high half).
    #[inline]
    pub const fn result64(&self) -> u64 {
        self.dwords[0].get() as u64 | ((self.dwords[1].get() as u64) << 32)
    }

    /// SQHD: how far the controller has consumed the submission queue.
    #[inline]
    pub const fn sq_head(&self) -> u16 {
        self.dwords[2].get() as u16
    }

    /// SQID: the submission queue that the command came from.
    #[inline]
    pub const fn sq_id(&self) -> u16 {
        (self.dwords[2].get() >> 16) as u16
    }

    /// CID: the command that this completes.
    #[inline]
    pub const fn cid(&self) -> u16 {
        self.dwords[3].get() as u16
    }

    /// The phase tag, which flips each time that the controller goes round the queue.
    #[inline]
    pub const fn phase(&self) -> bool {
        self.dwords[3].get() & PHASE != 0
    }

    /// How the command ended.
    #[inline]
    pub const fn status(&self) -> Status {
        Status::from_bits((self.dwords[3].get() >> 17) as u16)
    }

    /// This entry with dword 0.
    #[inline]
    pub const fn with_result(mut self, result: u32) -> Self {
        self.dwords[0] = U32::new(result);
        self
    }

    /// This entry with dwords 0 (low half) and 1 (high half).
    #[inline]
    pub const fn with_result64(mut self, result: u64) -> Self {
        self.dwords[0] = U32::new(result as u32);
        self.dwords[1] = U32::new((result >> 32) as u32);
        self
    }

    /// This entry with the submission queue's identifier and head.
    #[inline]
    pub const fn with_sq(mut self, sq_id: u16, sq_head: u16) -> Self {
        self.dwords[2] = U32::new(sq_head as u32 | ((sq_id as u32) << 16));
        self
    }

    /// This entry with that phase tag.
    #[inline]
    pub const fn with_phase(mut self, phase: bool) -> Self {
        let rest = self.dwords[3].get() & !PHASE;
        self.dwords[3] = U32::new(if phase { rest | PHASE } else { rest });
        self
    }
}

impl fmt::Debug for Cqe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cqe")
            .field("result", &format_args!("{:#x}", self.result64()))
            .field("sq_head", &self.sq_head())
            .field("sq_id", &self.sq_id())
            .field("cid", &self.cid())
            .field("phase", &self.phase())
            .field("status", &format_args!("{}", self.status()))
            .finish()
    }
}

#[cfg(test)]
mod tests;
