use std::collections::BTreeSet;
use std::format;
use std::string::ToString;

use proptest::prelude::*;

use super::*;

#[test]
fn only_type_0_code_0_is_success() {
    assert!(Status::SUCCESS.is_success());
    assert!(
        Status::from_bits(0x2000).is_success(),
        "More alone is no failure"
    );
    assert!(
        !Status::COMPLETION_QUEUE_INVALID.is_success(),
        "SC 0 of another type"
    );
    assert!(!Status::INTERNAL_PATH_ERROR.is_success());
    assert!(!Status::new(7, 0).is_success());
}

#[test]
fn fields_are_at_their_bits() {
    let status = Status::from_bits(0x7fff);
    assert_eq!(status.code(), 0xff);
    assert_eq!(status.code_type(), StatusCodeType::VendorSpecific);
    assert_eq!(status.crd(), 3);
    assert!(status.more() && status.dnr());
    assert_eq!(Status::from_bits(0x0800).crd(), 1);
    assert!(Status::from_bits(0x2000).more());
    assert!(Status::from_bits(0x4000).dnr());
    assert_eq!(Status::new(3, 0x71).to_bits(), 0x0371);
    assert_eq!(Status::new(5, 0).code_type(), StatusCodeType::Reserved(5));
    assert_eq!(Status::from_bits(0x8000).to_bits(), 0);
}

#[test]
fn display_says_everything() {
    let status = Status::LBA_OUT_OF_RANGE.with_dnr(true);
    assert_eq!(
        status.to_string(),
        "LBA Out of Range (SCT 0x0, SC 0x80, DNR)"
    );
    let status = Status::COMMAND_INTERRUPTED.with_crd(2).with_more(true);
    assert_eq!(
        status.to_string(),
        "Command Interrupted (SCT 0x0, SC 0x21, CRD 2, More)"
    );
    assert_eq!(
        Status::SUCCESS.to_string(),
        "Successful Completion (SCT 0x0, SC 0x00)"
    );
    let debug = format!("{:?}", Status::COMPARE_FAILURE);
    assert_eq!(debug, "Status(0x0285: Compare Failure (SCT 0x2, SC 0x85))");
}

#[test]
fn codes_without_a_name_say_what_they_are() {
    assert_eq!(Status::new(0, 0x17).name(), "Reserved Status");
    assert_eq!(Status::new(0, 0xc0).name(), "Vendor Specific Status");
    assert_eq!(Status::new(1, 0x70).name(), "Directive Specific Status");
    assert_eq!(Status::new(4, 0x00).name(), "Reserved Status");
    assert_eq!(Status::new(7, 0x01).name(), "Vendor Specific Status");
    assert_eq!(Status::new(7, 0x01).description(), "");
}

#[test]
fn names_and_texts_are_whole_and_unique() {
    let mut names = BTreeSet::new();
    for status in Status::NAMED {
        assert!(names.insert(status.name()), "{status} has another's name");
        assert!(status.description().ends_with('.'), "{status}");
        assert!(status.code() < 0xc0, "{status} is in the vendor's range");
    }
}

/// The numbers as the specification's figures have them, by their names: an independent look at the
/// table, which has constant and name side by side.
#[test]
fn codes_by_hand() {
    for (bits, name) in [
        (0x0001, "Invalid Command Opcode"),
        (0x0002, "Invalid Field in Command"),
        (0x0003, "Command ID Conflict"),
        (0x0007, "Command Abort Requested"),
        (0x0008, "Command Aborted due to SQ Deletion"),
        (0x000b, "Invalid Namespace or Format"),
        (0x000d, "Invalid SGL Segment Descriptor"),
        (0x000f, "Data SGL Length Invalid"),
        (0x0013, "PRP Offset Invalid"),
        (0x001d, "Sanitize In Progress"),
        (0x0020, "Namespace is Write Protected"),
        (0x0080, "LBA Out of Range"),
        (0x0081, "Capacity Exceeded"),
        (0x0082, "Namespace Not Ready"),
        (0x0100, "Completion Queue Invalid"),
        (0x0101, "Invalid Queue Identifier"),
        (0x0102, "Invalid Queue Size"),
        (0x0103, "Abort Command Limit Exceeded"),
        (0x0105, "Asynchronous Event Request Limit Exceeded"),
        (0x0108, "Invalid Interrupt Vector"),
        (0x0109, "Invalid Log Page"),
        (0x010a, "Invalid Format"),
        (0x010c, "Invalid Queue Deletion"),
        (0x010d, "Feature Identifier Not Saveable"),
        (0x010e, "Feature Not Changeable"),
        (0x010f, "Feature Not Namespace Specific"),
        (0x0114, "Overlapping Range"),
        (0x0180, "Conflicting Attributes"),
        (0x0181, "Invalid Protection Information"),
        (0x0182, "Attempted Write to Read Only Range"),
        (0x0183, "Command Size Limit Exceeded"),
        (0x0280, "Write Fault"),
        (0x0281, "Unrecovered Read Error"),
        (0x0285, "Compare Failure"),
        (0x0287, "Deallocated or Unwritten Logical Block"),
        (0x0303, "Asymmetric Access Transition"),
        (0x0370, "Host Pathing Error"),
    ] {
        assert_eq!(Status::from_bits(bits).name(), name);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_status_is_its_fields(bits in 0u16..0x8000) {
        let status = Status::from_bits(bits);
        let again = Status::new(status.code_type_bits(), status.code())
            .with_crd(status.crd())
            .with_more(status.more())
            .with_dnr(status.dnr());
        prop_assert_eq!(again, status);
        prop_assert!(status.is(status.without_modifiers()));
        prop_assert_eq!(status.is_success(), status.is(Status::SUCCESS));
        prop_assert!(!status.to_string().is_empty());
    }
}
