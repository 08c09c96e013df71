//! Status: how a command ended, with the specification's names.
//!
//! Base, section 3.3.3.2, "Status Field Definition" and the figures "Generic Command Status Values",
//! "Command Specific Status Values", "Media and Data Integrity Error Values" and "Path Related Status
//! Values"; those of the NVM command set from NVM, "Status Values".

use core::fmt;

mod codes;

/// The status field of a completion queue entry, without the phase tag: bits 31:17 of dword 3 as
/// bits 14:0.
///
/// Only SCT 0 with SC 0 is success ([`is_success`](Self::is_success)). The named constants have
/// CRD, More and DNR clear; compare with them after [`without_modifiers`](Self::without_modifiers), or
/// by [`is`](Self::is).
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Status(u16);

/// SCT: which table a status code is from (Base, figure "Status Code Type Values").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StatusCodeType {
    /// 0h: holds for many commands.
    Generic,
    /// 1h: its meaning depends on the opcode.
    CommandSpecific,
    /// 2h: the media, or the check of data.
    MediaAndDataIntegrity,
    /// 3h: the way to the media.
    PathRelated,
    /// 4h to 6h.
    Reserved(u8),
    /// 7h.
    VendorSpecific,
}

impl Status {
    const MORE: u16 = 1 << 13;
    const DNR: u16 = 1 << 14;

    /// The status of this code type (3 bits) and code, with CRD, More and DNR clear.
    #[inline]
    pub const fn new(code_type: u8, code: u8) -> Self {
        Self(((code_type as u16 & 0b111) << 8) | code as u16)
    }

    /// The status of bits 14:0; bit 15 is dropped.
    #[inline]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits & 0x7fff)
    }

    /// Bits 14:0, as [`from_bits`](Self::from_bits) takes them.
    #[inline]
    pub const fn to_bits(self) -> u16 {
        self.0
    }

    /// SCT: the table that [`code`](Self::code) is from.
    #[inline]
    pub const fn code_type(self) -> StatusCodeType {
        match self.code_type_bits() {
            0 => StatusCodeType::Generic,
            1 => StatusCodeType::CommandSpecific,
            2 => StatusCodeType::MediaAndDataIntegrity,
            3 => StatusCodeType::PathRelated,
            7 => StatusCodeType::VendorSpecific,
            other => StatusCodeType::Reserved(other),
        }
    }

    /// SCT as a number, 0 to 7.
    #[inline]
    pub const fn code_type_bits(self) -> u8 {
        (self.0 >> 8) as u8 & 0b111
    }

    /// SC: the status code.
    #[inline]
    pub const fn code(self) -> u8 {
        self.0 as u8
    }

    /// Do Not Retry: the same command would fail again.
    #[inline]
    pub const fn dnr(self) -> bool {
        self.0 & Self::DNR != 0
    }

    /// Command Retry Delay, 0 to 3: 0 none, else CRDT1 to CRDT3 of Identify Controller.
    ///
    /// It means something only if the host enabled Advanced Command Retry (Host Behavior Support,
    /// ACRE), and is reserved if [`dnr`](Self::dnr) is set.
    #[inline]
    pub const fn crd(self) -> u8 {
        (self.0 >> 11) as u8 & 0b11
    }

    /// More: the error information log has more about this.
    #[inline]
    pub const fn more(self) -> bool {
        self.0 & Self::MORE != 0
    }

    /// Whether the command succeeded: SCT 0 and SC 0, whatever the other bits say.
    #[inline]
    pub const fn is_success(self) -> bool {
        self.0 & 0x7ff == 0
    }

    /// Whether this has the type and code of `other`, whatever CRD, More and DNR are.
    #[inline]
    pub const fn is(self, other: Self) -> bool {
        (self.0 ^ other.0) & 0x7ff == 0
    }

    /// This status with CRD, More and DNR clear.
    #[inline]
    pub const fn without_modifiers(self) -> Self {
        Self(self.0 & 0x7ff)
    }

    /// This status with DNR.
    #[inline]
    pub const fn with_dnr(self, dnr: bool) -> Self {
        Self(if dnr {
            self.0 | Self::DNR
        } else {
            self.0 & !Self::DNR
        })
    }

    /// This status with More.
    #[inline]
    pub const fn with_more(self, more: bool) -> Self {
        Self(if more {
            self.0 | Self::MORE
        } else {
            self.0 & !Self::MORE
        })
    }

    /// This status with a command retry delay; only the lowest two bits of `crd` count.
    #[inline]
    pub const fn with_crd(self, crd: u8) -> Self {
        Self((self.0 & !(0b11 << 11)) | ((crd as u16 & 0b11) << 11))
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} (SCT {:#x}, SC {:#04x}",
            self.name(),
            self.code_type_bits(),
            self.code()
        )?;
        match self.crd() {
            0 => {}
            crd => write!(f, ", CRD {crd}")?,
        }
        if self.more() {
            f.write_str(", More")?;
        }
        if self.dnr() {
            f.write_str(", DNR")?;
        }
        f.write_str(")")
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Status({:#06x}: {self})", self.0)
    }
}

#[cfg(test)]
mod tests;
