//! Features: what Set Features sets and Get Features tells (Base, section 5.27.1; NVM, "Set Features").
//!
//! The bit fields here are the value of dword 11 of Set Features, and of dword 0 of the completion of Get
//! Features.

use core::mem::offset_of;

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Feature identifiers (Base, section 5.27.1, figure "Set Features - Feature Identifiers"; NVM, "Set
/// Features").
pub mod id {
    /// Arbitration.
    pub const ARBITRATION: u8 = 0x01;
    /// Power Management.
    pub const POWER_MANAGEMENT: u8 = 0x02;
    /// LBA Range Type (NVM command set).
    pub const LBA_RANGE_TYPE: u8 = 0x03;
    /// Temperature Threshold.
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    /// Error Recovery (NVM command set).
    pub const ERROR_RECOVERY: u8 = 0x05;
    /// Volatile Write Cache.
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    /// Number of Queues.
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    /// Interrupt Coalescing.
    pub const INTERRUPT_COALESCING: u8 = 0x08;
    /// Interrupt Vector Configuration.
    pub const INTERRUPT_VECTOR_CONFIGURATION: u8 = 0x09;
    /// Write Atomicity Normal (NVM command set).
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    /// Asynchronous Event Configuration.
    pub const ASYNC_EVENT_CONFIGURATION: u8 = 0x0b;
    /// Autonomous Power State Transition.
    pub const AUTONOMOUS_POWER_STATE_TRANSITION: u8 = 0x0c;
    /// Host Memory Buffer.
    pub const HOST_MEMORY_BUFFER: u8 = 0x0d;
    /// Timestamp.
    pub const TIMESTAMP: u8 = 0x0e;
    /// Keep Alive Timer.
    pub const KEEP_ALIVE_TIMER: u8 = 0x0f;
    /// Host Controlled Thermal Management.
    pub const THERMAL_MANAGEMENT: u8 = 0x10;
    /// Non-Operational Power State Config.
    pub const NON_OPERATIONAL_POWER_STATE: u8 = 0x11;
    /// Host Behavior Support.
    pub const HOST_BEHAVIOR_SUPPORT: u8 = 0x16;
    /// I/O Command Set Profile.
    pub const COMMAND_SET_PROFILE: u8 = 0x19;
    /// Namespace Write Protection Config.
    pub const NAMESPACE_WRITE_PROTECTION: u8 = 0x84;
}

/// Number of Queues, 07h: how many I/O queues the host asks for, and, in dword 0 of the completion of
/// Set Features and of Get Features, how many the controller allocated (Base, section 5.27.1.5).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct NumberOfQueues {
    /// Submission queues, 0's based (NSQR, NSQA).
    #[bits(16)]
    pub nsq: u16,
    /// Completion queues, 0's based (NCQR, NCQA).
    #[bits(16)]
    pub ncq: u16,
}

impl NumberOfQueues {
    /// `pairs` submission and as many completion queues, 1 to 65,535: debug builds assert it, others
    /// clamp.
    pub const fn pairs(pairs: u16) -> Self {
        debug_assert!(pairs >= 1);
        let based = pairs.saturating_sub(1);
        Self::new().with_nsq(based).with_ncq(based)
    }

    /// How many submission queues, 1 to 65,536.
    pub const fn submission_queues(self) -> u32 {
        self.nsq() as u32 + 1
    }

    /// How many completion queues, 1 to 65,536.
    pub const fn completion_queues(self) -> u32 {
        self.ncq() as u32 + 1
    }
}

/// Volatile Write Cache, 06h (Base, section 5.27.1.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct VolatileWriteCache {
    /// Volatile Write Cache Enable.
    pub wce: bool,
    #[bits(31)]
    __: u32,
}

/// Interrupt Coalescing, 08h; of I/O completion queues only (Base, section 5.27.1.6).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct InterruptCoalescing {
    /// Aggregation Threshold: completions for one interrupt, 0's based; 0 is no coalescing.
    #[bits(8)]
    pub thr: u8,
    /// Aggregation Time, in units of 100 µs; 0 is no delay.
    #[bits(8)]
    pub time: u8,
    #[bits(16)]
    __: u16,
}

/// Interrupt Vector Configuration, 09h (Base, section 5.27.1.7).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct InterruptVectorConfiguration {
    /// Interrupt Vector.
    #[bits(16)]
    pub iv: u16,
    /// Coalescing Disable: the vector is not subject to [`InterruptCoalescing`].
    pub cd: bool,
    #[bits(15)]
    __: u16,
}

/// Asynchronous Event Configuration, 0Bh: the events that are to be reported (Base, section 5.27.1.8).
/// OAES of Identify Controller has the same bits, from bit 8 on.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AsyncEventConfiguration {
    /// SMART / Health Critical Warnings; bits as in [`CriticalWarning`](crate::log::CriticalWarning).
    #[bits(8)]
    pub smart_critical_warnings: u8,
    /// Namespace Attribute Notices.
    pub namespace_attributes: bool,
    /// Firmware Activation Notices.
    pub firmware_activation: bool,
    /// Telemetry Log Notices.
    pub telemetry_log: bool,
    /// Asymmetric Namespace Access Change Notices.
    pub asymmetric_access: bool,
    /// Predictable Latency Event Aggregate Log Change Notices.
    pub predictable_latency_log: bool,
    /// LBA Status Information Notices.
    pub lba_status: bool,
    /// Endurance Group Event Aggregate Log Change Notices.
    pub endurance_group_log: bool,
    /// Normal NVM Subsystem Shutdown.
    pub normal_subsystem_shutdown: bool,
    #[bits(11)]
    __: u16,
    /// Zone Descriptor Changed Notices (of the zoned namespace command set).
    pub zone_descriptors: bool,
    #[bits(3)]
    __: u8,
    /// Discovery Log Page Change Notification (over fabrics).
    pub discovery_log: bool,
}

/// Arbitration, 01h (Base, section 5.27.1.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Arbitration {
    /// Arbitration Burst: commands from one queue at a time, a power of two; 7 is no limit.
    #[bits(3)]
    pub ab: u8,
    #[bits(5)]
    __: u8,
    /// Low Priority Weight, 0's based.
    #[bits(8)]
    pub lpw: u8,
    /// Medium Priority Weight, 0's based.
    #[bits(8)]
    pub mpw: u8,
    /// High Priority Weight, 0's based.
    #[bits(8)]
    pub hpw: u8,
}

/// Power Management, 02h (Base, section 5.27.1.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct PowerManagement {
    /// Power State.
    #[bits(5)]
    pub ps: u8,
    /// Workload Hint.
    #[bits(3)]
    pub wh: u8,
    #[bits(24)]
    __: u32,
}

/// Temperature Threshold, 04h (Base, section 5.27.1.3).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct TemperatureThreshold {
    /// Temperature Threshold, in kelvins.
    #[bits(16)]
    pub tmpth: u16,
    /// Threshold Temperature Select: 0 composite, 1 to 8 a sensor, 15 all (of Set Features).
    #[bits(4)]
    pub tmpsel: u8,
    /// Threshold Type Select: 0 over, 1 under.
    #[bits(2)]
    pub thsel: u8,
    #[bits(10)]
    __: u16,
}

/// Error Recovery, 05h (NVM, "Error Recovery").
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ErrorRecovery {
    /// Time Limited Error Recovery, in units of 100 ms; 0 is no limit.
    #[bits(16)]
    pub tler: u16,
    /// Deallocated or Unwritten Logical Block Error Enable.
    pub dulbe: bool,
    #[bits(15)]
    __: u16,
}

/// Write Atomicity Normal, 0Ah (NVM, "Write Atomicity Normal").
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WriteAtomicity {
    /// Disable Normal: the host does not need AWUN and NAWUN, only AWUPF and NAWUPF.
    pub dn: bool,
    #[bits(31)]
    __: u32,
}

/// What Get Features answers when it is asked for "supported capabilities" (Base, section 5.15, figure
/// 195).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct FeatureCapabilities {
    /// The feature's value can be saved.
    pub saveable: bool,
    /// The feature has a value for each namespace.
    pub namespace_specific: bool,
    /// The feature can be changed.
    pub changeable: bool,
    #[bits(29)]
    __: u32,
}

/// The data of Host Behavior Support, 16h, 512 bytes (Base, section 5.27.1.18).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HostBehaviorSupport {
    /// Advanced Command Retry Enable, 1 if the host honours command retry delays.
    pub acre: u8,
    /// Extended Telemetry Data Area 4 Supported.
    pub etdas: u8,
    /// LBA Format Extension Enable, 1 if the host knows more than 16 formats.
    pub lbafee: u8,
    #[doc(hidden)]
    pub reserved_3: [u8; 509],
}

const _: () = {
    assert!(size_of::<HostBehaviorSupport>() == 512);
    assert!(offset_of!(HostBehaviorSupport, lbafee) == 2);
};

impl Default for HostBehaviorSupport {
    /// All zero: nothing of it enabled.
    fn default() -> Self {
        Self::new_zeroed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_counted_from_zero() {
        let asked = NumberOfQueues::pairs(4);
        assert_eq!(asked.into_bits(), 0x0003_0003);
        let granted = NumberOfQueues::from_bits(0xffff_0000);
        assert_eq!(granted.submission_queues(), 1);
        assert_eq!(granted.completion_queues(), 0x1_0000);
    }

    #[test]
    fn values_by_hand() {
        assert_eq!(VolatileWriteCache::new().with_wce(true).into_bits(), 1);
        let coalescing = InterruptCoalescing::new().with_thr(7).with_time(2);
        assert_eq!(coalescing.into_bits(), 0x0000_0207);
        let vector = InterruptVectorConfiguration::new().with_iv(3).with_cd(true);
        assert_eq!(vector.into_bits(), 0x0001_0003);
        let events = AsyncEventConfiguration::new()
            .with_smart_critical_warnings(0x1f)
            .with_namespace_attributes(true)
            .with_normal_subsystem_shutdown(true)
            .with_zone_descriptors(true)
            .with_discovery_log(true);
        assert_eq!(events.into_bits(), 0x8800_811f);
        let arbitration = Arbitration::new()
            .with_ab(7)
            .with_lpw(1)
            .with_mpw(2)
            .with_hpw(3);
        assert_eq!(arbitration.into_bits(), 0x0302_0107);
        assert_eq!(
            PowerManagement::new().with_ps(4).with_wh(1).into_bits(),
            0x24
        );
        let threshold = TemperatureThreshold::new()
            .with_tmpth(343)
            .with_tmpsel(1)
            .with_thsel(1);
        assert_eq!(threshold.into_bits(), 0x0011_0157);
        assert_eq!(
            ErrorRecovery::new()
                .with_tler(5)
                .with_dulbe(true)
                .into_bits(),
            0x0001_0005
        );
        assert_eq!(WriteAtomicity::new().with_dn(true).into_bits(), 1);
        assert!(FeatureCapabilities::from_bits(0b100).changeable());
    }
}
