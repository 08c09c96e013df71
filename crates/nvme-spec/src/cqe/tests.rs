use std::format;

use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use super::*;

#[test]
fn every_field_is_at_its_place() {
    let entry = Cqe::new(0x1234, Status::LBA_OUT_OF_RANGE.with_dnr(true))
        .with_result(0xdead_beef)
        .with_sq(7, 0x55)
        .with_phase(true);
    assert_eq!(entry.dwords(), [0xdead_beef, 0, 0x0007_0055, 0x8101_1234]);
    assert_eq!(entry.result(), 0xdead_beef);
    assert_eq!(entry.sq_head(), 0x55);
    assert_eq!(entry.sq_id(), 7);
    assert_eq!(entry.cid(), 0x1234);
    assert!(entry.phase());
    assert_eq!(entry.status(), Status::LBA_OUT_OF_RANGE.with_dnr(true));
    assert_eq!(entry.as_bytes()[12..], [0x34, 0x12, 0x01, 0x81]);
    assert!(!entry.with_phase(false).phase());
    assert_eq!(entry.with_phase(false).status(), entry.status());
}

#[test]
fn sixty_four_bits_of_result() {
    let entry = Cqe::new(0, Status::SUCCESS).with_result64(0x0102_0304_0506_0708);
    assert_eq!(entry.dwords(), [0x0506_0708, 0x0102_0304, 0, 0]);
    assert_eq!(entry.result64(), 0x0102_0304_0506_0708);
    assert!(format!("{entry:?}").contains("Successful Completion"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn dwords_and_bytes_round_trip(dwords: [u32; 4]) {
        let entry = Cqe::from_dwords(dwords);
        prop_assert_eq!(entry.dwords(), dwords);
        prop_assert_eq!(Cqe::read_from_bytes(entry.as_bytes()).unwrap(), entry);
    }

    #[test]
    fn an_entry_is_its_fields(result: u64, sq_id: u16, sq_head: u16, cid: u16, status: u16, phase: bool) {
        let status = Status::from_bits(status);
        let entry = Cqe::new(cid, status)
            .with_result64(result)
            .with_sq(sq_id, sq_head)
            .with_phase(phase);
        prop_assert_eq!(entry.result64(), result);
        prop_assert_eq!(entry.result(), result as u32);
        prop_assert_eq!((entry.sq_id(), entry.sq_head()), (sq_id, sq_head));
        prop_assert_eq!((entry.cid(), entry.phase()), (cid, phase));
        prop_assert_eq!(entry.status(), status);
    }
}
