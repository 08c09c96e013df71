//! Log pages (Base, section 5.16.1).

use core::mem::offset_of;

use bitfield_struct::bitfield;
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::status::Status;

/// Log page identifiers (Base, section 5.16.1, figure "Get Log Page - Log Page Identifiers").
pub mod id {
    /// Supported Log Pages.
    pub const SUPPORTED_LOG_PAGES: u8 = 0x00;
    /// Error Information: [`ErrorEntry`](super::ErrorEntry)s, the newest first.
    pub const ERROR: u8 = 0x01;
    /// SMART / Health Information: [`SmartHealth`](super::SmartHealth).
    pub const SMART_HEALTH: u8 = 0x02;
    /// Firmware Slot Information: [`FirmwareSlot`](super::FirmwareSlot).
    pub const FIRMWARE_SLOT: u8 = 0x03;
    /// Changed Namespace List: [`ChangedNamespaces`](super::ChangedNamespaces).
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    /// Commands Supported and Effects.
    pub const COMMANDS_SUPPORTED: u8 = 0x05;
    /// Device Self-test.
    pub const SELF_TEST: u8 = 0x06;
    /// Telemetry Host-Initiated.
    pub const TELEMETRY_HOST: u8 = 0x07;
    /// Telemetry Controller-Initiated.
    pub const TELEMETRY_CONTROLLER: u8 = 0x08;
    /// Endurance Group Information.
    pub const ENDURANCE_GROUP: u8 = 0x09;
    /// Predictable Latency Event Aggregate.
    pub const PREDICTABLE_LATENCY_EVENTS: u8 = 0x0b;
    /// Asymmetric Namespace Access.
    pub const ASYMMETRIC_ACCESS: u8 = 0x0c;
    /// Persistent Event Log.
    pub const PERSISTENT_EVENT: u8 = 0x0d;
    /// LBA Status Information (NVM command set).
    pub const LBA_STATUS: u8 = 0x0e;
    /// Endurance Group Event Aggregate.
    pub const ENDURANCE_GROUP_EVENTS: u8 = 0x0f;
    /// Reservation Notification.
    pub const RESERVATION_NOTIFICATION: u8 = 0x80;
    /// Sanitize Status.
    pub const SANITIZE_STATUS: u8 = 0x81;
}

/// An entry of the Error Information log, 64 bytes (Base, section 5.16.1.2).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ErrorEntry {
    /// Error Count: a number for this error, from 1 on; 0 is no entry.
    pub error_count: U64,
    /// Submission Queue ID.
    pub sqid: U16,
    /// Command ID; FFFFh if the error belongs to no command.
    pub cid: U16,
    /// Status Field, with the phase tag in bit 0: see [`status`](Self::status).
    pub status_field: U16,
    /// Parameter Error Location: byte of the command in bits 7:0, bit in bits 10:8; FFFFh for none.
    pub parameter_error_location: U16,
    /// The first logical block with the error.
    pub lba: U64,
    /// Namespace.
    pub nsid: U32,
    /// Vendor Specific Information Available: a log page identifier, or 0.
    pub vendor_log_page: u8,
    /// Transport Type.
    pub trtype: u8,
    #[doc(hidden)]
    pub reserved_30: [u8; 2],
    /// Command Specific Information.
    pub command_specific: U64,
    /// Transport Type Specific Information.
    pub transport_specific: U16,
    #[doc(hidden)]
    pub reserved_42: [u8; 22],
}

const _: () = {
    assert!(size_of::<ErrorEntry>() == 64);
    assert!(offset_of!(ErrorEntry, status_field) == 12);
    assert!(offset_of!(ErrorEntry, parameter_error_location) == 14);
    assert!(offset_of!(ErrorEntry, lba) == 16);
    assert!(offset_of!(ErrorEntry, nsid) == 24);
    assert!(offset_of!(ErrorEntry, trtype) == 29);
    assert!(offset_of!(ErrorEntry, command_specific) == 32);
    assert!(offset_of!(ErrorEntry, transport_specific) == 40);
};

impl ErrorEntry {
    /// How the command ended.
    pub const fn status(&self) -> Status {
        Status::from_bits(self.status_field.get() >> 1)
    }

    /// This entry with that status and a phase tag of 0.
    pub const fn with_status(mut self, status: Status) -> Self {
        self.status_field = U16::new(status.to_bits() << 1);
        self
    }
}

/// SMART / Health Information, 512 bytes (Base, section 5.16.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SmartHealth {
    /// Critical Warning: see [`warnings`](Self::warnings).
    pub critical_warning: u8,
    /// Composite Temperature, in kelvins.
    pub composite_temperature: U16,
    /// Available Spare, in percent.
    pub available_spare: u8,
    /// Available Spare Threshold, in percent.
    pub available_spare_threshold: u8,
    /// Percentage Used of the rated life; may exceed 100.
    pub percentage_used: u8,
    /// Endurance Group Critical Warning Summary.
    pub endurance_group_warnings: u8,
    #[doc(hidden)]
    pub reserved_7: [u8; 25],
    /// Data Units Read, in thousands of 512 bytes, rounded up.
    pub data_units_read: U128,
    /// Data Units Written, in thousands of 512 bytes, rounded up.
    pub data_units_written: U128,
    /// Host Read Commands.
    pub host_read_commands: U128,
    /// Host Write Commands.
    pub host_write_commands: U128,
    /// Controller Busy Time, in minutes.
    pub controller_busy_time: U128,
    /// Power Cycles.
    pub power_cycles: U128,
    /// Power On Hours.
    pub power_on_hours: U128,
    /// Unsafe Shutdowns.
    pub unsafe_shutdowns: U128,
    /// Media and Data Integrity Errors.
    pub media_errors: U128,
    /// Number of Error Information Log Entries over the life of the controller.
    pub error_log_entries: U128,
    /// Warning Composite Temperature Time, in minutes.
    pub warning_temperature_time: U32,
    /// Critical Composite Temperature Time, in minutes.
    pub critical_temperature_time: U32,
    /// Temperature Sensors 1 to 8, in kelvins; 0 is no sensor.
    pub temperature_sensors: [U16; 8],
    /// Thermal Management Temperature 1 and 2 Transition Count.
    pub thermal_transitions: [U32; 2],
    /// Total Time For Thermal Management Temperature 1 and 2, in seconds.
    pub thermal_time: [U32; 2],
    #[doc(hidden)]
    pub reserved_232: [u8; 280],
}

const _: () = {
    assert!(size_of::<SmartHealth>() == 512);
    assert!(offset_of!(SmartHealth, composite_temperature) == 1);
    assert!(offset_of!(SmartHealth, percentage_used) == 5);
    assert!(offset_of!(SmartHealth, data_units_read) == 32);
    assert!(offset_of!(SmartHealth, host_read_commands) == 64);
    assert!(offset_of!(SmartHealth, power_cycles) == 112);
    assert!(offset_of!(SmartHealth, media_errors) == 160);
    assert!(offset_of!(SmartHealth, warning_temperature_time) == 192);
    assert!(offset_of!(SmartHealth, temperature_sensors) == 200);
    assert!(offset_of!(SmartHealth, thermal_transitions) == 216);
    assert!(offset_of!(SmartHealth, thermal_time) == 224);
};

impl SmartHealth {
    /// Critical Warning, decoded.
    pub const fn warnings(&self) -> CriticalWarning {
        CriticalWarning::from_bits(self.critical_warning)
    }
}

impl Default for SmartHealth {
    /// All zero.
    fn default() -> Self {
        Self::new_zeroed()
    }
}

/// Critical Warning of [`SmartHealth`] (Base, section 5.16.1.3).
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct CriticalWarning {
    /// Available spare capacity is below its threshold.
    pub spare: bool,
    /// A temperature is out of its thresholds.
    pub temperature: bool,
    /// The reliability of the NVM subsystem is degraded.
    pub reliability: bool,
    /// All media are read only.
    pub read_only: bool,
    /// The backup of volatile memory failed.
    pub volatile_backup: bool,
    /// The persistent memory region is read only or unreliable.
    pub persistent_memory: bool,
    #[bits(2)]
    __: u8,
}

/// Firmware Slot Information, 512 bytes (Base, section 5.16.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FirmwareSlot {
    /// Active Firmware Info: see [`active_slot`](Self::active_slot) and [`next_slot`](Self::next_slot).
    pub afi: u8,
    #[doc(hidden)]
    pub reserved_1: [u8; 7],
    /// Firmware Revision for Slot 1 to 7, ASCII; all zero is an empty slot.
    pub frs: [[u8; 8]; 7],
    #[doc(hidden)]
    pub reserved_64: [u8; 448],
}

const _: () = {
    assert!(size_of::<FirmwareSlot>() == 512);
    assert!(offset_of!(FirmwareSlot, frs) == 8);
    assert!(offset_of!(FirmwareSlot, reserved_64) == 64);
};

impl FirmwareSlot {
    /// The slot, 1 to 7, that the running firmware came from (AFI bits 2:0).
    pub const fn active_slot(&self) -> u8 {
        self.afi & 0b111
    }

    /// The slot that will be active after the next controller level reset (AFI bits 6:4); `None` if
    /// the controller does not say.
    pub const fn next_slot(&self) -> Option<u8> {
        match (self.afi >> 4) & 0b111 {
            0 => None,
            slot => Some(slot),
        }
    }
}

impl Default for FirmwareSlot {
    /// All zero.
    fn default() -> Self {
        Self::new_zeroed()
    }
}

/// Changed Namespace List, 4096 bytes (Base, section 5.16.1.5): up to 1,024 identifiers of namespaces
/// whose Identify data changed since the page was read last, in increasing order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct ChangedNamespaces {
    /// The entries, zeroes behind the last one.
    pub entries: [U32; 1024],
}

const _: () = assert!(size_of::<ChangedNamespaces>() == 4096);

impl ChangedNamespaces {
    /// The list that says that more namespaces changed than it has room for.
    pub fn overflowed() -> Self {
        let mut list = Self::default();
        list.entries[0] = U32::new(u32::MAX);
        list
    }

    /// Whether more than 1,024 namespaces changed, so that the list names none.
    pub fn has_overflowed(&self) -> bool {
        self.entries[0].get() == u32::MAX
    }

    /// The identifiers up to the first 0; none if the list [has overflowed](Self::has_overflowed).
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let entries = if self.has_overflowed() {
            &[]
        } else {
            self.entries.as_slice()
        };
        entries
            .iter()
            .map(|entry| entry.get())
            .take_while(|&nsid| nsid != 0)
    }
}

impl Default for ChangedNamespaces {
    /// The empty list.
    fn default() -> Self {
        Self::new_zeroed()
    }
}

#[cfg(test)]
mod tests;
