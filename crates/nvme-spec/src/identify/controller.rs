//! Identify Controller, and the part of it that belongs to the NVM command set.

use core::mem::offset_of;

use bitfield_struct::bitfield;
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::registers::Version;

/// Identify Controller, CNS 01h, 4096 bytes (Base, section 5.17.2.1, figure "Identify - Identify
/// Controller Data Structure, I/O Command Set Independent").
///
/// The fields have the specification's names and encoding. What the controller says is not checked
/// here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyController {
    /// PCI Vendor ID.
    pub vid: U16,
    /// PCI Subsystem Vendor ID.
    pub ssvid: U16,
    /// Serial Number, ASCII, padded with spaces.
    pub sn: [u8; 20],
    /// Model Number, ASCII, padded with spaces.
    pub mn: [u8; 40],
    /// Firmware Revision, ASCII, padded with spaces.
    pub fr: [u8; 8],
    /// Recommended Arbitration Burst, a power of two.
    pub rab: u8,
    /// IEEE OUI Identifier.
    pub ieee: [u8; 3],
    /// Controller Multi-Path I/O and Namespace Sharing Capabilities.
    pub cmic: u8,
    /// Maximum Data Transfer Size, a power of two in units of CAP.MPSMIN pages; 0 is no limit.
    pub mdts: u8,
    /// Controller ID.
    pub cntlid: U16,
    /// Version, as in the VS register.
    pub ver: U32,
    /// RTD3 Resume Latency, in microseconds.
    pub rtd3r: U32,
    /// RTD3 Entry Latency, in microseconds: how long a shutdown may take; 0 is not reported.
    pub rtd3e: U32,
    /// Optional Asynchronous Events Supported; bits as in
    /// [`AsyncEventConfiguration`](crate::feature::AsyncEventConfiguration).
    pub oaes: U32,
    /// Controller Attributes.
    pub ctratt: U32,
    /// Read Recovery Levels Supported.
    pub rrls: U16,
    #[doc(hidden)]
    pub reserved_102: [u8; 9],
    /// Controller Type: 1 I/O, 2 discovery, 3 administrative, 0 not reported.
    pub cntrltype: u8,
    /// FRU Globally Unique Identifier.
    pub fguid: [u8; 16],
    /// Command Retry Delay Time 1, in units of 100 ms.
    pub crdt1: U16,
    /// Command Retry Delay Time 2, in units of 100 ms.
    pub crdt2: U16,
    /// Command Retry Delay Time 3, in units of 100 ms.
    pub crdt3: U16,
    #[doc(hidden)]
    pub reserved_134: [u8; 119],
    /// NVM Subsystem Report.
    pub nvmsr: u8,
    /// VPD Write Cycle Information.
    pub vwci: u8,
    /// Management Endpoint Capabilities.
    pub mec: u8,
    /// Optional Admin Command Support: see [`optional_admin_commands`](Self::optional_admin_commands).
    pub oacs: U16,
    /// Abort Command Limit, 0's based.
    pub acl: u8,
    /// Asynchronous Event Request Limit, 0's based.
    pub aerl: u8,
    /// Firmware Updates.
    pub frmw: u8,
    /// Log Page Attributes.
    pub lpa: u8,
    /// Error Log Page Entries, 0's based.
    pub elpe: u8,
    /// Number of Power States Support, 0's based.
    pub npss: u8,
    /// Admin Vendor Specific Command Configuration.
    pub avscc: u8,
    /// Autonomous Power State Transition Attributes.
    pub apsta: u8,
    /// Warning Composite Temperature Threshold, in kelvins.
    pub wctemp: U16,
    /// Critical Composite Temperature Threshold, in kelvins.
    pub cctemp: U16,
    /// Maximum Time for Firmware Activation, in units of 100 ms.
    pub mtfa: U16,
    /// Host Memory Buffer Preferred Size, in units of 4 KiB.
    pub hmpre: U32,
    /// Host Memory Buffer Minimum Size, in units of 4 KiB.
    pub hmmin: U32,
    /// Total NVM Capacity, in bytes.
    pub tnvmcap: U128,
    /// Unallocated NVM Capacity, in bytes.
    pub unvmcap: U128,
    /// Replay Protected Memory Block Support.
    pub rpmbs: U32,
    /// Extended Device Self-test Time, in minutes.
    pub edstt: U16,
    /// Device Self-test Options.
    pub dsto: u8,
    /// Firmware Update Granularity, in units of 4 KiB.
    pub fwug: u8,
    /// Keep Alive Support, in units of 100 ms.
    pub kas: U16,
    /// Host Controlled Thermal Management Attributes.
    pub hctma: U16,
    /// Minimum Thermal Management Temperature, in kelvins.
    pub mntmt: U16,
    /// Maximum Thermal Management Temperature, in kelvins.
    pub mxtmt: U16,
    /// Sanitize Capabilities.
    pub sanicap: U32,
    /// Host Memory Buffer Minimum Descriptor Entry Size, in units of 4 KiB.
    pub hmminds: U32,
    /// Host Memory Maximum Descriptors Entries.
    pub hmmaxd: U16,
    /// NVM Set Identifier Maximum.
    pub nsetidmax: U16,
    /// Endurance Group Identifier Maximum.
    pub endgidmax: U16,
    /// ANA Transition Time, in seconds.
    pub anatt: u8,
    /// Asymmetric Namespace Access Capabilities.
    pub anacap: u8,
    /// ANA Group Identifier Maximum.
    pub anagrpmax: U32,
    /// Number of ANA Group Identifiers.
    pub nanagrpid: U32,
    /// Persistent Event Log Size, in units of 64 KiB.
    pub pels: U32,
    /// Domain Identifier.
    pub domain_id: U16,
    #[doc(hidden)]
    pub reserved_358: [u8; 10],
    /// Max Endurance Group Capacity, in bytes.
    pub megcap: U128,
    #[doc(hidden)]
    pub reserved_384: [u8; 128],
    /// Submission Queue Entry Size: required in bits 3:0, maximum in bits 7:4, powers of two.
    pub sqes: u8,
    /// Completion Queue Entry Size: required in bits 3:0, maximum in bits 7:4, powers of two.
    pub cqes: u8,
    /// Maximum Outstanding Commands, over fabrics.
    pub maxcmd: U16,
    /// Number of Namespaces: the largest namespace identifier that is valid.
    pub nn: U32,
    /// Optional NVM Command Support: see [`optional_nvm_commands`](Self::optional_nvm_commands).
    pub oncs: U16,
    /// Fused Operation Support.
    pub fuses: U16,
    /// Format NVM Attributes.
    pub fna: u8,
    /// Volatile Write Cache: see [`has_volatile_write_cache`](Self::has_volatile_write_cache).
    pub vwc: u8,
    /// Atomic Write Unit Normal, in logical blocks, 0's based.
    pub awun: U16,
    /// Atomic Write Unit Power Fail, in logical blocks, 0's based.
    pub awupf: U16,
    /// I/O Command Set Vendor Specific Command Configuration.
    pub icsvscc: u8,
    /// Namespace Write Protection Capabilities.
    pub nwpc: u8,
    /// Atomic Compare & Write Unit, in logical blocks, 0's based.
    pub acwu: U16,
    /// Optional Copy Formats Supported: source range formats of Copy, a bit each.
    pub ocfs: U16,
    /// SGL Support: see [`sgl_support`](Self::sgl_support).
    pub sgls: U32,
    /// Maximum Number of Allowed Namespaces.
    pub mnan: U32,
    /// Maximum Domain Namespace Attachments.
    pub maxdna: U128,
    /// Maximum I/O Controller Namespace Attachments.
    pub maxcna: U32,
    #[doc(hidden)]
    pub reserved_564: [u8; 204],
    /// NVM Subsystem NVMe Qualified Name, UTF-8, ended by a zero byte.
    pub subnqn: [u8; 256],
    #[doc(hidden)]
    pub reserved_1024: [u8; 768],
    /// What NVMe over Fabrics adds.
    pub fabrics: [u8; 256],
    /// Power State Descriptors 0 to 31.
    pub psd: [[u8; 32]; 32],
    /// Vendor specific.
    pub vendor: [u8; 1024],
}

const _: () = {
    assert!(size_of::<IdentifyController>() == 4096);
    assert!(offset_of!(IdentifyController, sn) == 4);
    assert!(offset_of!(IdentifyController, fr) == 64);
    assert!(offset_of!(IdentifyController, mdts) == 77);
    assert!(offset_of!(IdentifyController, ver) == 80);
    assert!(offset_of!(IdentifyController, rtd3e) == 88);
    assert!(offset_of!(IdentifyController, oaes) == 92);
    assert!(offset_of!(IdentifyController, cntrltype) == 111);
    assert!(offset_of!(IdentifyController, crdt1) == 128);
    assert!(offset_of!(IdentifyController, nvmsr) == 253);
    assert!(offset_of!(IdentifyController, oacs) == 256);
    assert!(offset_of!(IdentifyController, aerl) == 259);
    assert!(offset_of!(IdentifyController, wctemp) == 266);
    assert!(offset_of!(IdentifyController, tnvmcap) == 280);
    assert!(offset_of!(IdentifyController, rpmbs) == 312);
    assert!(offset_of!(IdentifyController, kas) == 320);
    assert!(offset_of!(IdentifyController, sanicap) == 328);
    assert!(offset_of!(IdentifyController, anatt) == 342);
    assert!(offset_of!(IdentifyController, pels) == 352);
    assert!(offset_of!(IdentifyController, megcap) == 368);
    assert!(offset_of!(IdentifyController, sqes) == 512);
    assert!(offset_of!(IdentifyController, nn) == 516);
    assert!(offset_of!(IdentifyController, oncs) == 520);
    assert!(offset_of!(IdentifyController, vwc) == 525);
    assert!(offset_of!(IdentifyController, awun) == 526);
    assert!(offset_of!(IdentifyController, acwu) == 532);
    assert!(offset_of!(IdentifyController, ocfs) == 534);
    assert!(offset_of!(IdentifyController, sgls) == 536);
    assert!(offset_of!(IdentifyController, maxcna) == 560);
    assert!(offset_of!(IdentifyController, subnqn) == 768);
    assert!(offset_of!(IdentifyController, fabrics) == 1792);
    assert!(offset_of!(IdentifyController, psd) == 2048);
    assert!(offset_of!(IdentifyController, vendor) == 3072);
};

impl IdentifyController {
    /// The serial number without its padding; empty if it is no ASCII.
    pub fn serial_number(&self) -> &str {
        text(&self.sn)
    }

    /// The model number without its padding; empty if it is no ASCII.
    pub fn model_number(&self) -> &str {
        text(&self.mn)
    }

    /// The firmware revision without its padding; empty if it is no ASCII.
    pub fn firmware_revision(&self) -> &str {
        text(&self.fr)
    }

    /// The NVM subsystem's qualified name; empty if it is no UTF-8.
    pub fn subsystem_name(&self) -> &str {
        let end = self.subnqn.iter().position(|&byte| byte == 0);
        let name = &self.subnqn[..end.unwrap_or(self.subnqn.len())];
        core::str::from_utf8(name).unwrap_or("")
    }

    /// VER, decoded.
    pub const fn version(&self) -> Version {
        Version::from_bits(self.ver.get())
    }

    /// MDTS in bytes, for a controller whose smallest memory page is `min_page_size` bytes
    /// ([`Capabilities::min_page_size`](crate::registers::Capabilities::min_page_size)); `None` if
    /// there is no limit, or one past 64 bits.
    pub const fn max_transfer_bytes(&self, min_page_size: u32) -> Option<u64> {
        match self.mdts {
            0 => None,
            mdts @ 1..=31 => Some((min_page_size as u64) << mdts),
            _ => None,
        }
    }

    /// Whether writes may stay in a volatile cache until a Flush (VWC bit 0).
    pub const fn has_volatile_write_cache(&self) -> bool {
        self.vwc & 0b001 != 0
    }

    /// Whether Flush may name all namespaces at once (VWC bits 2:1 are 11b).
    pub const fn flushes_all_namespaces(&self) -> bool {
        self.vwc & 0b110 == 0b110
    }

    /// OACS, decoded.
    pub const fn optional_admin_commands(&self) -> OptionalAdminCommands {
        OptionalAdminCommands::from_bits(self.oacs.get())
    }

    /// ONCS, decoded.
    pub const fn optional_nvm_commands(&self) -> OptionalNvmCommands {
        OptionalNvmCommands::from_bits(self.oncs.get())
    }

    /// SGLS, decoded.
    pub const fn sgl_support(&self) -> SglSupport {
        SglSupport::from_bits(self.sgls.get())
    }

    /// Whether submission entries of 64 and completion entries of 16 bytes, which the NVM command
    /// set needs, are within what SQES and CQES allow.
    pub const fn supports_nvm_entry_sizes(&self) -> bool {
        within(self.sqes, 6) && within(self.cqes, 4)
    }
}

impl Default for IdentifyController {
    /// All zero.
    fn default() -> Self {
        Self::new_zeroed()
    }
}

/// OACS: the admin commands that are optional (Base, figure "Identify - Identify Controller Data
/// Structure").
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct OptionalAdminCommands {
    /// Security Send and Security Receive.
    pub security: bool,
    /// Format NVM.
    pub format_nvm: bool,
    /// Firmware Commit and Firmware Image Download.
    pub firmware: bool,
    /// Namespace Management and Namespace Attachment.
    pub namespace_management: bool,
    /// Device Self-test.
    pub self_test: bool,
    /// Directives.
    pub directives: bool,
    /// NVMe-MI Send and NVMe-MI Receive.
    pub nvme_mi: bool,
    /// Virtualization Management.
    pub virtualization: bool,
    /// Doorbell Buffer Config.
    pub doorbell_buffer_config: bool,
    /// Get LBA Status.
    pub get_lba_status: bool,
    /// Lockdown.
    pub lockdown: bool,
    #[bits(5)]
    __: u8,
}

/// ONCS: the I/O commands and features that are optional (Base, figure "Identify - Identify
/// Controller Data Structure").
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct OptionalNvmCommands {
    /// Compare.
    pub compare: bool,
    /// Write Uncorrectable.
    pub write_uncorrectable: bool,
    /// Dataset Management.
    pub dataset_management: bool,
    /// Write Zeroes.
    pub write_zeroes: bool,
    /// Save of Set Features and Select of Get Features.
    pub save_and_select: bool,
    /// Reservations.
    pub reservations: bool,
    /// The Timestamp feature.
    pub timestamp: bool,
    /// Verify.
    pub verify: bool,
    /// Copy.
    pub copy: bool,
    #[bits(7)]
    __: u8,
}

/// SGLS: what kinds of SGL I/O commands may use (Base, figure "Identify - Identify Controller Data
/// Structure").
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct SglSupport {
    /// Whether SGLs may be used, and how their data blocks are to be aligned.
    #[bits(2)]
    pub alignment: SglAlignment,
    /// Keyed SGL Data Block descriptor.
    pub keyed: bool,
    #[bits(5)]
    __: u8,
    /// SGL Descriptor Threshold: how many descriptors are recommended at most; 0 is not reported.
    #[bits(8)]
    pub descriptor_threshold: u8,
    /// SGL Bit Bucket descriptor.
    pub bit_bucket: bool,
    /// A byte aligned contiguous buffer for metadata.
    pub metadata_buffer: bool,
    /// An SGL longer than the data is allowed.
    pub longer_than_data: bool,
    /// MPTR may point to an SGL segment of one descriptor.
    pub metadata_sgl: bool,
    /// The address field may be an offset.
    pub offset_address: bool,
    /// Transport SGL Data Block descriptor.
    pub transport: bool,
    #[bits(10)]
    __: u16,
}

/// SGLS bits 1:0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SglAlignment {
    /// SGLs are not supported.
    NotSupported = 0,
    /// Any alignment and length.
    Byte = 1,
    /// Addresses and lengths of data blocks are multiples of 4.
    Dword = 2,
    /// The reserved value.
    Reserved = 3,
}

impl SglAlignment {
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::NotSupported,
            1 => Self::Byte,
            2 => Self::Dword,
            _ => Self::Reserved,
        }
    }

    const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// What the NVM command set adds to Identify Controller, CNS 06h with CSI 0, 4096 bytes (NVM, section
/// 4.1.5, figure "I/O Command Set Specific Identify Controller Data Structure for the NVM Command
/// Set"). A limit of 0 is none reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyNvmController {
    /// Verify Size Limit, a power of two in units of CAP.MPSMIN pages.
    pub vsl: u8,
    /// Write Zeroes Size Limit, a power of two in units of CAP.MPSMIN pages.
    pub wzsl: u8,
    /// Write Uncorrectable Size Limit, a power of two in units of CAP.MPSMIN pages.
    pub wusl: u8,
    /// Dataset Management Ranges Limit: ranges of one command.
    pub dmrl: u8,
    /// Dataset Management Range Size Limit: logical blocks of one range.
    pub dmrsl: U32,
    /// Dataset Management Size Limit: logical blocks of one command.
    pub dmsl: U64,
    #[doc(hidden)]
    pub reserved_16: [u8; 4080],
}

const _: () = {
    assert!(size_of::<IdentifyNvmController>() == 4096);
    assert!(offset_of!(IdentifyNvmController, dmrl) == 3);
    assert!(offset_of!(IdentifyNvmController, dmrsl) == 4);
    assert!(offset_of!(IdentifyNvmController, dmsl) == 8);
};

impl Default for IdentifyNvmController {
    /// All zero: no limit reported.
    fn default() -> Self {
        Self::new_zeroed()
    }
}

/// An ASCII field without the spaces (and, from controllers that pad with them, zeroes) around it.
fn text(field: &[u8]) -> &str {
    match core::str::from_utf8(field) {
        Ok(text) if text.is_ascii() => text.trim_matches([' ', '\0']),
        _ => "",
    }
}

/// Whether `exponent` lies between the required and the maximum size of an SQES or CQES field.
const fn within(sizes: u8, exponent: u8) -> bool {
    sizes & 0xf <= exponent && exponent <= sizes >> 4
}
