use proptest::prelude::*;

use super::*;

/// The dwords 0, 1 and 10 to 15 of a command; the test fails if another one is set.
fn dwords(command: Sqe) -> [u32; 8] {
    let all = command.dwords();
    assert_eq!(all[2..10], [0; 8], "no data, metadata or dwords 2 and 3");
    [
        all[0], all[1], all[10], all[11], all[12], all[13], all[14], all[15],
    ]
}

#[test]
fn reads_and_writes() {
    let command = read(1, 0x0102_0304_0506_0708, 8, false);
    assert_eq!(
        dwords(command),
        [0x02, 1, 0x0506_0708, 0x0102_0304, 7, 0, 0, 0]
    );
    let command = write(2, 16, 65_536, true);
    assert_eq!(dwords(command), [0x01, 2, 16, 0, 0x4000_ffff, 0, 0, 0]);
    assert_eq!(read(1, 0, 1, true).cdw12(), 0x4000_0000);
    assert_eq!(write(1, 0, 1, false).cdw12(), 0);
}

#[test]
fn commands_without_a_transfer() {
    assert_eq!(
        dwords(flush(0xffff_ffff)),
        [0x00, 0xffff_ffff, 0, 0, 0, 0, 0, 0]
    );
    let command = write_zeroes(1, 5, 3, true, false);
    assert_eq!(dwords(command), [0x08, 1, 5, 0, 0x0200_0002, 0, 0, 0]);
    assert_eq!(write_zeroes(1, 5, 3, false, true).cdw12(), 0x4000_0002);
    assert_eq!(dwords(verify(1, 5, 3, false)), [0x0c, 1, 5, 0, 2, 0, 0, 0]);
    assert_eq!(verify(1, 5, 3, true).cdw12(), 0x4000_0002);
}

#[test]
fn commands_with_other_data() {
    assert_eq!(
        dwords(dataset_management(1, 1, true)),
        [0x09, 1, 0, 4, 0, 0, 0, 0]
    );
    assert_eq!(
        dwords(dataset_management(1, 256, false)),
        [0x09, 1, 0xff, 0, 0, 0, 0, 0]
    );
    assert_eq!(
        dwords(compare(1, 5, 3, true)),
        [0x05, 1, 5, 0, 0x4000_0002, 0, 0, 0]
    );
    let command = copy(1, 1 << 32, 2, false);
    assert_eq!(dwords(command), [0x19, 1, 0, 1, 1, 0, 0, 0]);
    assert_eq!(copy(1, 0, 256, true).cdw12(), 0x4000_00ff);
}

#[test]
fn other_bits_of_a_range_are_seen() {
    let command = read(1, 5, 3, false);
    let command = command.with_cdw12(command.cdw12() | 1 << 31 | 0b1010 << 26);
    let range = BlockRange::from_command(&command);
    assert!(range.limited_retry && !range.fua && !range.deallocate);
    assert_eq!(range.prinfo, 0b1010);
}

#[test]
fn the_fields_of_a_copy_are_seen() {
    let command = copy(1, 0x0102_0304_0506_0708, 256, true);
    let plain = CopyRequest {
        destination_lba: 0x0102_0304_0506_0708,
        ranges: 256,
        format: 0,
        read_prinfo: 0,
        directive: 0,
        write_prinfo: 0,
        fua: true,
        limited_retry: false,
    };
    assert_eq!(CopyRequest::from_command(&command), plain);
    let command = command.with_cdw12(0xa8d5_9307);
    let expected = CopyRequest {
        ranges: 8,
        format: 3,
        read_prinfo: 9,
        directive: 0xd,
        write_prinfo: 0xa,
        fua: false,
        limited_retry: true,
        ..plain
    };
    assert_eq!(CopyRequest::from_command(&command), expected);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_range_comes_back(nsid: u32, slba: u64, blocks in 1u32..=65_536, fua: bool, deallocate: bool) {
        let plain = BlockRange { slba, blocks, fua, limited_retry: false, deallocate: false, prinfo: 0 };
        for command in [
            read(nsid, slba, blocks, fua),
            write(nsid, slba, blocks, fua),
            compare(nsid, slba, blocks, fua),
            verify(nsid, slba, blocks, fua),
        ] {
            prop_assert_eq!(command.nsid(), nsid);
            prop_assert_eq!(BlockRange::from_command(&command), plain);
        }
        let command = write_zeroes(nsid, slba, blocks, deallocate, fua);
        prop_assert_eq!(BlockRange::from_command(&command), BlockRange { deallocate, ..plain });
    }
}
