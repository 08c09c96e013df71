//! Identify Namespace of the NVM command set.

use core::mem::offset_of;

use bitfield_struct::bitfield;
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Identify Namespace, CNS 00h, 4096 bytes (NVM, section 4.1.5.1, figure 97 "Identify - Identify
/// Namespace Data Structure, NVM Command Set").
///
/// The fields have the specification's names and encoding; all zero is an inactive namespace. What the
/// controller says is not checked here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Namespace Size, in logical blocks.
    pub nsze: U64,
    /// Namespace Capacity: how many logical blocks may be allocated.
    pub ncap: U64,
    /// Namespace Utilization: how many are.
    pub nuse: U64,
    /// Namespace Features: see [`features`](Self::features).
    pub nsfeat: u8,
    /// Number of LBA Formats, 0's based.
    pub nlbaf: u8,
    /// Formatted LBA Size: see [`format_index`](Self::format_index).
    pub flbas: u8,
    /// Metadata Capabilities.
    pub mc: u8,
    /// End-to-end Data Protection Capabilities.
    pub dpc: u8,
    /// End-to-end Data Protection Type Settings: the type in bits 2:0, 0 for none.
    pub dps: u8,
    /// Namespace Multi-path I/O and Namespace Sharing Capabilities.
    pub nmic: u8,
    /// Reservation Capabilities.
    pub rescap: u8,
    /// Format Progress Indicator.
    pub fpi: u8,
    /// Deallocate Logical Block Features: see [`deallocated_read`](Self::deallocated_read).
    pub dlfeat: u8,
    /// Namespace Atomic Write Unit Normal, in logical blocks, 0's based; 0 means AWUN.
    pub nawun: U16,
    /// Namespace Atomic Write Unit Power Fail, in logical blocks, 0's based; 0 means AWUPF.
    pub nawupf: U16,
    /// Namespace Atomic Compare & Write Unit, in logical blocks, 0's based; 0 means ACWU.
    pub nacwu: U16,
    /// Namespace Atomic Boundary Size Normal, in logical blocks, 0's based; 0 is no boundary.
    pub nabsn: U16,
    /// Namespace Atomic Boundary Offset: the logical block of the first boundary.
    pub nabo: U16,
    /// Namespace Atomic Boundary Size Power Fail, in logical blocks, 0's based; 0 is no boundary.
    pub nabspf: U16,
    /// Namespace Optimal I/O Boundary, in logical blocks; 0 is none reported.
    pub noiob: U16,
    /// NVM Capacity, in bytes.
    pub nvmcap: U128,
    /// Namespace Preferred Write Granularity, in logical blocks, 0's based.
    pub npwg: U16,
    /// Namespace Preferred Write Alignment, in logical blocks, 0's based.
    pub npwa: U16,
    /// Namespace Preferred Deallocate Granularity, in logical blocks, 0's based.
    pub npdg: U16,
    /// Namespace Preferred Deallocate Alignment, in logical blocks, 0's based.
    pub npda: U16,
    /// Namespace Optimal Write Size, in logical blocks, 0's based.
    pub nows: U16,
    /// Maximum Single Source Range Length of Copy, in logical blocks.
    pub mssrl: U16,
    /// Maximum Copy Length, in logical blocks.
    pub mcl: U32,
    /// Maximum Source Range Count of Copy, 0's based.
    pub msrc: u8,
    #[doc(hidden)]
    pub reserved_81: [u8; 11],
    /// ANA Group Identifier.
    pub anagrpid: U32,
    #[doc(hidden)]
    pub reserved_96: [u8; 3],
    /// Namespace Attributes: write protected in bit 0.
    pub nsattr: u8,
    /// NVM Set Identifier.
    pub nvmsetid: U16,
    /// Endurance Group Identifier.
    pub endgid: U16,
    /// Namespace Globally Unique Identifier, big endian; all zero if there is none.
    pub nguid: [u8; 16],
    /// IEEE Extended Unique Identifier, big endian; all zero if there is none.
    pub eui64: [u8; 8],
    /// LBA Formats 0 to 63, of which the first NLBAF + 1 are valid.
    pub lbaf: [LbaFormat; 64],
    /// Vendor specific.
    pub vendor: [u8; 3712],
}

const _: () = {
    assert!(size_of::<IdentifyNamespace>() == 4096);
    assert!(offset_of!(IdentifyNamespace, nsfeat) == 24);
    assert!(offset_of!(IdentifyNamespace, flbas) == 26);
    assert!(offset_of!(IdentifyNamespace, dlfeat) == 33);
    assert!(offset_of!(IdentifyNamespace, nawun) == 34);
    assert!(offset_of!(IdentifyNamespace, nabsn) == 40);
    assert!(offset_of!(IdentifyNamespace, noiob) == 46);
    assert!(offset_of!(IdentifyNamespace, nvmcap) == 48);
    assert!(offset_of!(IdentifyNamespace, npwg) == 64);
    assert!(offset_of!(IdentifyNamespace, nows) == 72);
    assert!(offset_of!(IdentifyNamespace, mssrl) == 74);
    assert!(offset_of!(IdentifyNamespace, mcl) == 76);
    assert!(offset_of!(IdentifyNamespace, msrc) == 80);
    assert!(offset_of!(IdentifyNamespace, anagrpid) == 92);
    assert!(offset_of!(IdentifyNamespace, nsattr) == 99);
    assert!(offset_of!(IdentifyNamespace, endgid) == 102);
    assert!(offset_of!(IdentifyNamespace, nguid) == 104);
    assert!(offset_of!(IdentifyNamespace, eui64) == 120);
    assert!(offset_of!(IdentifyNamespace, lbaf) == 128);
    assert!(offset_of!(IdentifyNamespace, vendor) == 384);
};

impl IdentifyNamespace {
    /// Whether the namespace is there: an inactive one is all zero.
    pub const fn is_active(&self) -> bool {
        self.nsze.get() != 0 || self.ncap.get() != 0
    }

    /// The index into [`lbaf`](Self::lbaf) of the format in use, 0 to 63. The upper two bits of the
    /// index count only if there are more than 16 formats.
    pub const fn format_index(&self) -> usize {
        let low = self.flbas & 0xf;
        let high = if self.nlbaf >= 16 {
            (self.flbas >> 5) & 0b11
        } else {
            0
        };
        (low | (high << 4)) as usize
    }

    /// The format in use, or `None` if FLBAS names one past NLBAF.
    pub const fn format(&self) -> Option<LbaFormat> {
        let index = self.format_index();
        // Six bits: always inside of the 64 entries.
        if index <= self.nlbaf as usize {
            Some(self.lbaf[index])
        } else {
            None
        }
    }

    /// Whether metadata follows each block's data in the same buffer (FLBAS bit 4), rather than lying
    /// in one of its own.
    pub const fn metadata_is_interleaved(&self) -> bool {
        self.flbas & 0x10 != 0
    }

    /// NSFEAT, decoded.
    pub const fn features(&self) -> NamespaceFeatures {
        NamespaceFeatures::from_bits(self.nsfeat)
    }

    /// What a deallocated block reads as (DLFEAT bits 2:0).
    pub const fn deallocated_read(&self) -> DeallocatedRead {
        match self.dlfeat & 0b111 {
            1 => DeallocatedRead::Zeroes,
            2 => DeallocatedRead::Ones,
            _ => DeallocatedRead::NotReported,
        }
    }

    /// Whether Write Zeroes may deallocate (DLFEAT bit 3).
    pub const fn write_zeroes_deallocates(&self) -> bool {
        self.dlfeat & 0b1000 != 0
    }

    /// How many source ranges one Copy may have (MSRC), 1 to 256.
    pub const fn max_copy_ranges(&self) -> u16 {
        self.msrc as u16 + 1
    }

    /// Whether the namespace is write protected at present (NSATTR bit 0).
    pub const fn is_write_protected(&self) -> bool {
        self.nsattr & 1 != 0
    }
}

impl Default for IdentifyNamespace {
    /// All zero: an inactive namespace.
    fn default() -> Self {
        Self::new_zeroed()
    }
}

/// An LBA format, 4 bytes (NVM, section 4.1.5.1, figure 98 "LBA Format Data Structure, NVM Command Set
/// Specific").
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct LbaFormat {
    /// Metadata Size, in bytes for each block.
    pub ms: U16,
    /// LBA Data Size, a power of two in bytes; 0 if the format is not available.
    pub lbads: u8,
    /// Relative Performance in bits 1:0: 0 best, 3 degraded.
    pub rp: u8,
}

const _: () = assert!(size_of::<LbaFormat>() == 4);

impl LbaFormat {
    /// The bytes of a logical block, or `None` if LBADS is less than 9 (512 bytes, the least that the
    /// specification allows) or would leave 32 bits.
    pub const fn lba_size(&self) -> Option<u32> {
        match self.lbads {
            lbads @ 9..=31 => Some(1 << lbads),
            _ => None,
        }
    }
}

/// NSFEAT (NVM, section 4.1.5.1, figure 97).
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct NamespaceFeatures {
    /// THINP: thin provisioning; NCAP may be less than NSZE.
    pub thin_provisioning: bool,
    /// NSABP: NAWUN, NAWUPF and NACWU hold, not the controller's AWUN, AWUPF and ACWU.
    pub atomic_fields: bool,
    /// DAE: reading a deallocated block can be made an error.
    pub deallocated_error: bool,
    /// UIDREUSE: NGUID and EUI64 are never used again.
    pub unique_identifiers: bool,
    /// OPTPERF: NPWG, NPWA, NPDG, NPDA and NOWS are valid.
    pub optimal_performance: bool,
    #[bits(3)]
    __: u8,
}

/// What a deallocated block reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeallocatedRead {
    /// The controller does not say, or in a way that is not defined.
    NotReported,
    /// Bytes of 00h.
    Zeroes,
    /// Bytes of FFh.
    Ones,
}
