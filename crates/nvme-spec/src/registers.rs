//! Controller properties: the registers at the start of BAR0 and the doorbells behind them.
//!
//! Base, section 3.1.3 "Controller Properties"; doorbells: NVMe over PCIe Transport Specification,
//! section 3.1.2.
//!
//! The `with_` and `set_` methods of bit fields, here and elsewhere in the crate, panic if a value is
//! wider than its field; for values that are not known to fit there are `with_.._checked` and
//! `set_.._checked`.

use bitfield_struct::bitfield;

/// Byte offsets of the controller properties (Base, section 3.1.3, figure "Property Definition").
pub mod offset {
    /// Controller Capabilities, 64 bits, read only.
    pub const CAP: u32 = 0x00;
    /// Version, 32 bits, read only.
    pub const VS: u32 = 0x08;
    /// Interrupt Mask Set, 32 bits; not to be touched when MSI-X is in use.
    pub const INTMS: u32 = 0x0c;
    /// Interrupt Mask Clear, 32 bits; not to be touched when MSI-X is in use.
    pub const INTMC: u32 = 0x10;
    /// Controller Configuration, 32 bits.
    pub const CC: u32 = 0x14;
    /// Controller Status, 32 bits.
    pub const CSTS: u32 = 0x1c;
    /// NVM Subsystem Reset, 32 bits: writing [`NSSR_RESET`](super::NSSR_RESET) resets.
    pub const NSSR: u32 = 0x20;
    /// Admin Queue Attributes, 32 bits.
    pub const AQA: u32 = 0x24;
    /// Admin Submission Queue Base Address, 64 bits.
    pub const ASQ: u32 = 0x28;
    /// Admin Completion Queue Base Address, 64 bits.
    pub const ACQ: u32 = 0x30;
    /// Controller Memory Buffer Location, 32 bits, read only.
    pub const CMBLOC: u32 = 0x38;
    /// Controller Memory Buffer Size, 32 bits, read only.
    pub const CMBSZ: u32 = 0x3c;
    /// Controller Ready Timeouts, 32 bits, read only.
    pub const CRTO: u32 = 0x68;
    /// The first doorbell: the admin submission queue's tail. See [`doorbell_offset`](super::doorbell_offset).
    pub const DOORBELLS: u32 = 0x1000;
}

/// What to write to [`offset::NSSR`] for an NVM subsystem reset: "NVMe" in ASCII
/// (Base, section 3.1.3.7).
pub const NSSR_RESET: u32 = 0x4e56_4d65;

/// CAP: what the controller can do and what it needs (Base, section 3.1.3.1).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Capabilities {
    /// Maximum Queue Entries Supported, 0's based: the most entries of one I/O queue.
    #[bits(16)]
    pub mqes: u16,
    /// Contiguous Queues Required.
    pub cqr: bool,
    /// Arbitration Mechanism Supported: bit 0 weighted round robin with urgent class, bit 1 vendor specific.
    #[bits(2)]
    pub ams: u8,
    #[bits(5)]
    __: u8,
    /// Timeout, in units of 500 ms: the longest wait for CSTS.RDY to follow CC.EN.
    #[bits(8)]
    pub to: u8,
    /// Doorbell Stride: doorbells are 2^(2 + DSTRD) bytes apart.
    #[bits(4)]
    pub dstrd: u8,
    /// NVM Subsystem Reset Supported.
    pub nssrs: bool,
    /// Command Sets Supported: see [`Capabilities::supports_nvm_command_set`].
    #[bits(8)]
    pub css: u8,
    /// Boot Partition Support.
    pub bps: bool,
    /// Controller Power Scope: 0 not reported, 1 controller, 2 domain, 3 NVM subsystem.
    #[bits(2)]
    pub cps: u8,
    /// Memory Page Size Minimum: 2^(12 + MPSMIN) bytes.
    #[bits(4)]
    pub mpsmin: u8,
    /// Memory Page Size Maximum: 2^(12 + MPSMAX) bytes.
    #[bits(4)]
    pub mpsmax: u8,
    /// Persistent Memory Region Supported.
    pub pmrs: bool,
    /// Controller Memory Buffer Supported: CMBLOC and CMBSZ are there (after CMBMSC.CRE is set).
    pub cmbs: bool,
    /// NVM Subsystem Shutdown Supported.
    pub nsss: bool,
    /// Controller Ready Modes Supported: bit 0 ready with media, bit 1 ready independent of media.
    #[bits(2)]
    pub crms: u8,
    #[bits(3)]
    __: u8,
}

impl Capabilities {
    /// The most entries that one I/O queue may have: MQES as a count, 1 to 65,536 (2 is the least
    /// that the specification allows, but this is what the controller said).
    pub const fn max_queue_entries(self) -> u32 {
        self.mqes() as u32 + 1
    }

    /// The longest wait for CSTS.RDY to follow CC.EN, in milliseconds.
    ///
    /// A controller with [`crms`](Self::crms) set says more in [`ReadyTimeouts`].
    pub const fn timeout_ms(self) -> u32 {
        self.to() as u32 * 500
    }

    /// The smallest memory page size, in bytes.
    pub const fn min_page_size(self) -> u32 {
        1 << (12 + self.mpsmin() as u32)
    }

    /// The largest memory page size, in bytes.
    pub const fn max_page_size(self) -> u32 {
        1 << (12 + self.mpsmax() as u32)
    }

    /// Whether the NVM command set can be selected (CSS bit 0).
    pub const fn supports_nvm_command_set(self) -> bool {
        self.css() & 0x01 != 0
    }

    /// Whether more than one I/O command set can be selected, by CC.CSS = 110b (CSS bit 6).
    pub const fn supports_all_command_sets(self) -> bool {
        self.css() & 0x40 != 0
    }
}

/// VS: the version of the Base specification that the controller follows (Base, section 3.1.3.2).
/// The VER field of Identify Controller has the same form.
#[bitfield(u32)]
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Tertiary version number.
    #[bits(8)]
    pub tertiary: u8,
    /// Minor version number.
    #[bits(8)]
    pub minor: u8,
    /// Major version number.
    #[bits(16)]
    pub major: u16,
}

impl core::fmt::Display for Version {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}.{}", self.major(), self.minor())?;
        match self.tertiary() {
            0 => Ok(()),
            tertiary => write!(f, ".{tertiary}"),
        }
    }
}

/// CC: what the host asks of the controller (Base, section 3.1.3.5).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ControllerConfiguration {
    /// Enable.
    pub en: bool,
    #[bits(3)]
    __: u8,
    /// I/O Command Set Selected: 0 NVM, 6 all supported, 7 admin only.
    #[bits(3)]
    pub css: u8,
    /// Memory Page Size: 2^(12 + MPS) bytes.
    #[bits(4)]
    pub mps: u8,
    /// Arbitration Mechanism Selected: 0 round robin, 1 weighted round robin with urgent class.
    #[bits(3)]
    pub ams: u8,
    /// Shutdown Notification.
    #[bits(2)]
    pub shn: ShutdownNotification,
    /// I/O Submission Queue Entry Size: 2^IOSQES bytes; 6 for the NVM command set.
    #[bits(4)]
    pub iosqes: u8,
    /// I/O Completion Queue Entry Size: 2^IOCQES bytes; 4 for the NVM command set.
    #[bits(4)]
    pub iocqes: u8,
    /// Controller Ready Independent of Media Enable.
    pub crime: bool,
    #[bits(7)]
    __: u8,
}

/// CC.SHN: what kind of shutdown the host announces (Base, section 3.1.3.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ShutdownNotification {
    /// No shutdown.
    None = 0,
    /// A normal shutdown: all queues are deleted, caches are to be written.
    Normal = 1,
    /// An abrupt one: power goes soon.
    Abrupt = 2,
    /// The reserved value.
    Reserved = 3,
}

impl ShutdownNotification {
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::None,
            1 => Self::Normal,
            2 => Self::Abrupt,
            _ => Self::Reserved,
        }
    }

    const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// CSTS: the state that the controller is in (Base, section 3.1.3.6).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ControllerStatus {
    /// Ready.
    pub rdy: bool,
    /// Controller Fatal Status.
    pub cfs: bool,
    /// Shutdown Status.
    #[bits(2)]
    pub shst: ShutdownStatus,
    /// NVM Subsystem Reset Occurred.
    pub nssro: bool,
    /// Processing Paused.
    pub pp: bool,
    /// Shutdown Type: set if the shutdown in SHST is one of the whole NVM subsystem.
    pub st: bool,
    #[bits(25)]
    __: u32,
}

impl ControllerStatus {
    /// What a register read returns when the function no longer answers: all ones.
    pub const GONE: Self = Self::from_bits(u32::MAX);

    /// Whether this is what a removed or unreachable PCI function reads as.
    pub const fn is_gone(self) -> bool {
        self.into_bits() == u32::MAX
    }
}

/// CSTS.SHST: how far a shutdown has come (Base, section 3.1.3.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ShutdownStatus {
    /// No shutdown was asked for.
    Normal = 0,
    /// It goes on.
    Occurring = 1,
    /// It is complete: power may go.
    Complete = 2,
    /// The reserved value.
    Reserved = 3,
}

impl ShutdownStatus {
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Normal,
            1 => Self::Occurring,
            2 => Self::Complete,
            _ => Self::Reserved,
        }
    }

    const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// AQA: the sizes of the admin queues (Base, section 3.1.3.8). Both are 0's based, at most 4095.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AdminQueueAttributes {
    /// Admin Submission Queue Size, 0's based.
    #[bits(12)]
    pub asqs: u16,
    #[bits(4)]
    __: u8,
    /// Admin Completion Queue Size, 0's based.
    #[bits(12)]
    pub acqs: u16,
    #[bits(4)]
    __: u8,
}

/// CMBLOC: where the controller memory buffer is and what it may be used for (Base, section 3.1.3.11).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CmbLocation {
    /// Base Indicator Register: the BAR that holds the buffer.
    #[bits(3)]
    pub bir: u8,
    /// CMB Queue Mixed Memory Support.
    pub cqmms: bool,
    /// CMB Queue Physically Discontiguous Support.
    pub cqpds: bool,
    /// CMB Data Pointer Mixed Locations Support.
    pub cdpmls: bool,
    /// CMB Data Pointer and Command Independent Locations Support.
    pub cdpcils: bool,
    /// CMB Data Metadata Mixed Memory Support.
    pub cdmmms: bool,
    /// CMB Queue Dword Alignment.
    pub cqda: bool,
    #[bits(3)]
    __: u8,
    /// Offset inside the BAR, in units of CMBSZ.SZU.
    #[bits(20)]
    pub ofst: u32,
}

/// CMBSZ: how large the controller memory buffer is and what it may hold (Base, section 3.1.3.12).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CmbSize {
    /// Submission Queue Support.
    pub sqs: bool,
    /// Completion Queue Support.
    pub cqs: bool,
    /// PRP SGL List Support.
    pub lists: bool,
    /// Read Data Support: data that the controller sends.
    pub rds: bool,
    /// Write Data Support: data that the host sends.
    pub wds: bool,
    #[bits(3)]
    __: u8,
    /// Size Units: 2^(12 + 4 × SZU) bytes; values above 6 are reserved.
    #[bits(4)]
    pub szu: u8,
    /// Size, in those units.
    #[bits(20)]
    pub sz: u32,
}

impl CmbSize {
    /// The size in bytes, or `None` if SZU has a reserved value.
    pub const fn bytes(self) -> Option<u64> {
        match self.szu() {
            szu @ 0..=6 => Some((self.sz() as u64) << (12 + 4 * szu as u32)),
            _ => None,
        }
    }
}

/// CRTO: how long the controller may take to become ready (Base, section 3.1.3.21). There if
/// [`Capabilities::crms`] is not 0.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ReadyTimeouts {
    /// Controller Ready With Media Timeout, in units of 500 ms.
    #[bits(16)]
    pub crwmt: u16,
    /// Controller Ready Independent of Media Timeout, in units of 500 ms.
    #[bits(16)]
    pub crimt: u16,
}

/// Which of a queue pair's two doorbells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DoorbellKind {
    /// SQyTDBL: the host has written submission entries up to this tail.
    SubmissionTail = 0,
    /// CQyHDBL: the host has consumed completion entries up to this head.
    CompletionHead = 1,
}

/// The byte offset of a doorbell (NVMe over PCIe Transport Specification, section 3.1.2, "SQyTDBL" and
/// "CQyHDBL": `0x1000 + (2y [+ 1]) × (4 << CAP.DSTRD)`).
///
/// An offset past 32 bits, which only a nonsensical `dstrd` can lead to, is returned as `u32::MAX`:
/// never a doorbell, as it is no multiple of 4, and outside of every BAR.
pub const fn doorbell_offset(queue_id: u16, kind: DoorbellKind, dstrd: u8) -> u32 {
    let offset = offset::DOORBELLS as u64 + doorbell_buffer_offset(queue_id, kind, dstrd);
    if offset > u32::MAX as u64 {
        u32::MAX
    } else {
        offset as u32
    }
}

/// The byte offset of a doorbell's 32-bit entry in a shadow doorbell buffer and in an EventIdx buffer
/// (Base, section 5.8): as in the registers, from the first of them on.
pub const fn doorbell_buffer_offset(queue_id: u16, kind: DoorbellKind, dstrd: u8) -> u64 {
    // DSTRD has 4 bits; a larger shift could leave 64 bits.
    let stride = 4u64 << (dstrd & 0xf);
    (2 * queue_id as u64 + kind as u64) * stride
}

#[cfg(test)]
mod tests;
