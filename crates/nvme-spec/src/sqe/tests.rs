use std::format;

use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use super::*;

#[test]
fn every_field_is_at_its_place() {
    let entry = Sqe::new(0x02)
        .with_fuse(2)
        .with_cid(0xabcd)
        .with_nsid(0x0000_0001)
        .with_cdw2(0x22)
        .with_cdw3(0x33)
        .with_metadata_pointer(0x1122_3344_5566_7788)
        .with_data(DataPointer::Prp {
            prp1: 0x0102_0304_0506_0708,
            prp2: 0x1112_1314_1516_1718,
        })
        .with_cdw10(0x10)
        .with_cdw11(0x11)
        .with_cdw12(0x12)
        .with_cdw13(0x13)
        .with_cdw14(0x14)
        .with_cdw15(0x15);
    let expected = [
        0xabcd_0202,
        1,
        0x22,
        0x33,
        0x5566_7788,
        0x1122_3344,
        0x0506_0708,
        0x0102_0304,
        0x1516_1718,
        0x1112_1314,
        0x10,
        0x11,
        0x12,
        0x13,
        0x14,
        0x15,
    ];
    assert_eq!(entry.dwords(), expected);
    assert_eq!(entry.opcode(), 0x02);
    assert_eq!(entry.fuse(), 2);
    assert_eq!(entry.cid(), 0xabcd);
    assert_eq!(entry.nsid(), 1);
    assert_eq!((entry.cdw2(), entry.cdw3()), (0x22, 0x33));
    assert_eq!(entry.metadata_pointer(), 0x1122_3344_5566_7788);
    assert_eq!(entry.cdw10_11(), 0x11_0000_0010);
    assert_eq!(
        (entry.cdw12(), entry.cdw13(), entry.cdw14(), entry.cdw15()),
        (0x12, 0x13, 0x14, 0x15)
    );
}

#[test]
fn bytes_are_little_endian() {
    let entry = Sqe::new(0x06).with_cid(0x1234).with_nsid(0xa1b2_c3d4);
    assert_eq!(
        entry.as_bytes()[..8],
        [0x06, 0x00, 0x34, 0x12, 0xd4, 0xc3, 0xb2, 0xa1]
    );
}

#[test]
fn the_kind_of_data_pointer_sets_psdt() {
    let descriptor = SglDescriptor::data_block(0x1000, 0x200);
    let entry = Sqe::new(1)
        .with_cid(9)
        .with_data(DataPointer::Sgl(descriptor));
    assert_eq!(entry.psdt(), 1);
    assert_eq!(entry.dwords()[0], 0x0009_4001);
    assert_eq!(entry.dwords()[6..10], [0x1000, 0, 0x200, 0]);
    assert_eq!(entry.data_pointer(), Ok(DataPointer::Sgl(descriptor)));

    let prp = DataPointer::Prp {
        prp1: 1 << 40,
        prp2: 0,
    };
    let entry = entry.with_data(prp);
    assert_eq!(entry.psdt(), 0);
    assert_eq!(entry.cid(), 9);
    assert_eq!(entry.data_pointer(), Ok(prp));
}

#[test]
fn reserved_psdt_is_an_error() {
    let entry = Sqe::from_dwords([0xc000, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(entry.data_pointer(), Err(ReservedPsdt));
    assert_eq!(ReservedPsdt.status(), Status::INVALID_FIELD);
    assert!(format!("{entry:?}").contains("psdt: 3"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn dwords_and_bytes_round_trip(dwords: [u32; 16]) {
        let entry = Sqe::from_dwords(dwords);
        prop_assert_eq!(entry.dwords(), dwords);
        let again = Sqe::read_from_bytes(entry.as_bytes()).unwrap();
        prop_assert_eq!(again, entry);
        let bytes: std::vec::Vec<u8> = dwords.iter().flat_map(|dword| dword.to_le_bytes()).collect();
        prop_assert_eq!(entry.as_bytes(), bytes);
    }

    #[test]
    fn setting_one_field_leaves_the_others(dwords: [u32; 16], cid: u16, prp1: u64, prp2: u64) {
        let before = Sqe::from_dwords(dwords);
        let data = DataPointer::Prp { prp1, prp2 };
        let after = before.with_cid(cid).with_data(data);
        prop_assert_eq!(after.cid(), cid);
        prop_assert_eq!(after.data_pointer(), Ok(data));
        prop_assert_eq!(after.opcode(), before.opcode());
        prop_assert_eq!(after.fuse(), before.fuse());
        prop_assert_eq!(&after.dwords()[1..6], &dwords[1..6]);
        prop_assert_eq!(&after.dwords()[10..], &dwords[10..]);
    }
}
