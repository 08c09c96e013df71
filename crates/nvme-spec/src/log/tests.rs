use std::vec::Vec;

use zerocopy::{FromBytes, IntoBytes};

use super::*;

#[test]
fn an_error_entry_by_hand() {
    let mut bytes = [0; 64];
    bytes[0] = 5;
    bytes[8..16].copy_from_slice(&[3, 0, 0x34, 0x12, 0x01, 0x81, 0x28, 0x00]);
    bytes[16..24].copy_from_slice(&0x1000u64.to_le_bytes());
    bytes[24] = 1;
    bytes[28] = 0xc1;
    bytes[32] = 9;
    let entry = ErrorEntry::read_from_bytes(&bytes).unwrap();
    assert_eq!(entry.error_count.get(), 5);
    assert_eq!((entry.sqid.get(), entry.cid.get()), (3, 0x1234));
    assert_eq!(entry.status(), Status::LBA_OUT_OF_RANGE.with_dnr(true));
    assert_eq!(entry.parameter_error_location.get(), 0x28);
    assert_eq!((entry.lba.get(), entry.nsid.get()), (0x1000, 1));
    assert_eq!(
        (entry.vendor_log_page, entry.command_specific.get()),
        (0xc1, 9)
    );

    let made = ErrorEntry::default().with_status(Status::INVALID_FIELD);
    assert_eq!(made.as_bytes()[12..14], [0x04, 0x00]);
    assert_eq!(made.status(), Status::INVALID_FIELD);
}

#[test]
fn smart_data_by_hand() {
    let mut bytes = [0; 512];
    bytes[0] = 0b0_1001;
    bytes[1..3].copy_from_slice(&[0x43, 0x01]);
    bytes[3..6].copy_from_slice(&[100, 10, 3]);
    bytes[32] = 7;
    bytes[48] = 8;
    bytes[144] = 2;
    bytes[200..202].copy_from_slice(&[0x44, 0x01]);
    bytes[228] = 1;
    let smart = SmartHealth::read_from_bytes(&bytes).unwrap();
    assert!(smart.warnings().spare() && smart.warnings().read_only());
    assert!(!smart.warnings().temperature());
    assert_eq!(smart.composite_temperature.get(), 323);
    assert_eq!(
        (
            smart.available_spare,
            smart.available_spare_threshold,
            smart.percentage_used
        ),
        (100, 10, 3)
    );
    assert_eq!(
        (smart.data_units_read.get(), smart.data_units_written.get()),
        (7, 8)
    );
    assert_eq!(smart.unsafe_shutdowns.get(), 2);
    assert_eq!(smart.temperature_sensors[0].get(), 324);
    assert_eq!(smart.thermal_time[1].get(), 1);
    assert_eq!(SmartHealth::default().as_bytes(), [0; 512]);
}

#[test]
fn firmware_slots_by_hand() {
    let mut bytes = [0; 512];
    bytes[0] = 0x21;
    bytes[8..16].copy_from_slice(b"1.0     ");
    bytes[56..64].copy_from_slice(b"7.0     ");
    let slots = FirmwareSlot::read_from_bytes(&bytes).unwrap();
    assert_eq!((slots.active_slot(), slots.next_slot()), (1, Some(2)));
    assert_eq!((&slots.frs[0], &slots.frs[6]), (b"1.0     ", b"7.0     "));
    assert_eq!(FirmwareSlot::default().next_slot(), None);
}

#[test]
fn changed_namespaces_end_at_the_first_zero() {
    let mut list = ChangedNamespaces::default();
    assert_eq!(list.iter().count(), 0);
    list.entries[0] = U32::new(2);
    list.entries[1] = U32::new(7);
    assert_eq!(list.iter().collect::<Vec<_>>(), [2, 7]);
    assert!(!list.has_overflowed());
    let list = ChangedNamespaces::overflowed();
    assert!(list.has_overflowed());
    assert_eq!(list.iter().count(), 0);
    assert_eq!(list.as_bytes()[..8], [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
}
