use std::string::ToString;

use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use super::*;

#[test]
fn descriptors_by_hand() {
    let block = SglDescriptor::data_block(0x1122_3344_5566_7788, 0x0102_0304);
    assert_eq!(
        block.as_bytes(),
        [
            0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x04, 0x03, 0x02, 0x01, 0, 0, 0, 0x00
        ]
    );
    assert_eq!(SglDescriptor::bit_bucket(1).as_bytes()[15], 0x10);
    assert_eq!(SglDescriptor::segment(0, 16).unwrap().as_bytes()[15], 0x20);
    assert_eq!(
        SglDescriptor::last_segment(0, 16).unwrap().as_bytes()[15],
        0x30
    );
}

#[test]
fn segments_hold_whole_descriptors() {
    for length in [0, 1, 15, 17] {
        assert_eq!(
            SglDescriptor::segment(0, length),
            Err(SglError::SegmentLength(length))
        );
        assert_eq!(
            SglDescriptor::last_segment(0, length),
            Err(SglError::SegmentLength(length))
        );
        let forged = SglDescriptor::from_qwords([0, 0x3000_0000_0000_0000 | u64::from(length)]);
        assert_eq!(forged.decode(), Err(SglError::SegmentLength(length)));
    }
    assert_eq!(
        SglDescriptor::segment(0, 0).unwrap_err().status(),
        Status::INVALID_SGL_SEGMENT
    );
}

#[test]
fn what_is_not_understood_is_an_error() {
    for (high, error, status) in [
        (
            0x4000_0000_0000_0000,
            SglError::Type(4),
            Status::SGL_TYPE_INVALID,
        ),
        (
            0xf000_0000_0000_0000,
            SglError::Type(15),
            Status::SGL_TYPE_INVALID,
        ),
        (
            0x0100_0000_0000_0000,
            SglError::Subtype(1),
            Status::SGL_TYPE_INVALID,
        ),
        (
            0x0000_0001_0000_0000,
            SglError::Reserved,
            Status::INVALID_FIELD,
        ),
    ] {
        let descriptor = SglDescriptor::from_qwords([0, high]);
        assert_eq!(descriptor.decode(), Err(error));
        assert_eq!(error.status(), status);
        assert!(!error.to_string().is_empty());
    }
    let bucket = SglDescriptor::from_qwords([1, 0x1000_0000_0000_0200]);
    assert_eq!(
        bucket.decode(),
        Err(SglError::Reserved),
        "a bit bucket has no address"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_is_made_is_decoded(address: u64, length: u32, descriptors in 1u32..0x1000_0000) {
        let segment = descriptors * SglDescriptor::SIZE;
        let cases = [
            (SglDescriptor::data_block(address, length), Sgl::DataBlock { address, length }),
            (SglDescriptor::bit_bucket(length), Sgl::BitBucket { length }),
            (
                SglDescriptor::segment(address, segment).unwrap(),
                Sgl::Segment { address, length: segment },
            ),
            (
                SglDescriptor::last_segment(address, segment).unwrap(),
                Sgl::LastSegment { address, length: segment },
            ),
        ];
        for (descriptor, expected) in cases {
            prop_assert_eq!(descriptor.decode(), Ok(expected));
        }
    }

    #[test]
    fn words_and_bytes_round_trip(qwords: [u64; 2]) {
        let descriptor = SglDescriptor::from_qwords(qwords);
        prop_assert_eq!(descriptor.qwords(), qwords);
        let bytes = [qwords[0].to_le_bytes(), qwords[1].to_le_bytes()].concat();
        prop_assert_eq!(descriptor.as_bytes(), &bytes[..]);
        prop_assert_eq!(SglDescriptor::read_from_bytes(&bytes).unwrap(), descriptor);
        // Whatever it is, decoding it ends.
        let _ = descriptor.decode();
    }
}
