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
fn identify_commands() {
    assert_eq!(dwords(identify_controller()), [0x06, 0, 1, 0, 0, 0, 0, 0]);
    assert_eq!(
        dwords(identify_nvm_controller()),
        [0x06, 0, 6, 0, 0, 0, 0, 0]
    );
    assert_eq!(dwords(identify_namespace(9)), [0x06, 9, 0, 0, 0, 0, 0, 0]);
    assert_eq!(dwords(active_namespaces(0)), [0x06, 0, 2, 0, 0, 0, 0, 0]);
    assert_eq!(
        dwords(namespace_descriptors(9)),
        [0x06, 9, 3, 0, 0, 0, 0, 0]
    );
    let command = identify(Cns(0x13), 5, 0x1234);
    assert_eq!(dwords(command), [0x06, 5, 0x1234_0013, 0, 0, 0, 0, 0]);
}

#[test]
fn queue_creation() {
    let command = create_completion_queue(3, 256, 0x0012_3456_7000, Some(5));
    let mut expected = [0; 16];
    expected[0] = 0x05;
    expected[6..8].copy_from_slice(&[0x3456_7000, 0x12]);
    expected[10] = 0x00ff_0003;
    expected[11] = 0x0005_0003;
    assert_eq!(command.dwords(), expected);

    let silent = create_completion_queue(3, 65_536, 0, None);
    assert_eq!(silent.cdw10(), 0xffff_0003);
    assert_eq!(silent.cdw11(), 0x0000_0001);

    let command = create_submission_queue(4, 2, 0x8000_0000_0000, 3, QueuePriority::Low);
    let mut expected = [0; 16];
    expected[0] = 0x01;
    expected[6..8].copy_from_slice(&[0, 0x8000]);
    expected[10] = 0x0001_0004;
    expected[11] = 0x0003_0007;
    assert_eq!(command.dwords(), expected);
    let urgent = create_submission_queue(4, 2, 0, 3, QueuePriority::default());
    assert_eq!(urgent.cdw11(), 0x0003_0001);
}

#[test]
fn queue_deletion() {
    assert_eq!(
        dwords(delete_submission_queue(7)),
        [0x00, 0, 7, 0, 0, 0, 0, 0]
    );
    assert_eq!(
        dwords(delete_completion_queue(7)),
        [0x04, 0, 7, 0, 0, 0, 0, 0]
    );
}

#[test]
fn features() {
    let command = set_features(crate::feature::id::NUMBER_OF_QUEUES, 0x0003_0003, false);
    assert_eq!(dwords(command), [0x09, 0, 7, 0x0003_0003, 0, 0, 0, 0]);
    let saved = set_features(crate::feature::id::VOLATILE_WRITE_CACHE, 1, true);
    assert_eq!(dwords(saved), [0x09, 0, 0x8000_0006, 1, 0, 0, 0, 0]);
    let command = get_features(0x0b, FeatureSelect::Supported);
    assert_eq!(dwords(command), [0x0a, 0, 0x030b, 0, 0, 0, 0, 0]);
    assert_eq!(get_features(0x0b, FeatureSelect::Current).cdw10(), 0x0b);
}

#[test]
fn log_pages() {
    let command = get_log_page(crate::log::id::SMART_HEALTH, ALL_NAMESPACES, 512, 0, false);
    assert_eq!(
        dwords(command),
        [0x02, 0xffff_ffff, 0x007f_0002, 0, 0, 0, 0, 0]
    );
    let command = get_log_page(4, 0, 4096, 0, true);
    assert_eq!(dwords(command), [0x02, 0, 0x03ff_8004, 0, 0, 0, 0, 0]);
    let command = get_log_page(7, 0, 0x10_0004, 0x1_2345_6780, false);
    assert_eq!(
        dwords(command),
        [0x02, 0, 0x0000_0007, 0x0000_0004, 0x2345_6780, 0x1, 0, 0]
    );
}

#[test]
fn abort_and_events() {
    assert_eq!(
        dwords(abort(3, 0x0102)),
        [0x08, 0, 0x0102_0003, 0, 0, 0, 0, 0]
    );
    assert_eq!(dwords(async_event_request()), [0x0c, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn doorbell_buffers() {
    let command = doorbell_buffer_config(0x0012_3456_7000, 0x89ab_cdef_0000);
    let mut expected = [0; 16];
    expected[0] = 0x7c;
    expected[6..10].copy_from_slice(&[0x3456_7000, 0x12, 0xcdef_0000, 0x89ab]);
    assert_eq!(command.dwords(), expected);
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "count >= least")]
fn a_count_out_of_range_is_caught_in_debug_builds() {
    create_completion_queue(1, 1, 0, None);
}

#[test]
#[cfg(not(debug_assertions))]
fn a_count_out_of_range_is_clamped() {
    assert_eq!(create_completion_queue(1, 0, 0, None).cdw10(), 0x0001_0001);
    assert_eq!(
        create_completion_queue(1, u32::MAX, 0, None).cdw10(),
        0xffff_0001
    );
    assert_eq!(get_log_page(1, 0, 0, 3, false).dwords()[10..13], [1, 0, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn log_lengths_and_offsets_round_trip(dwords in 1u32..=0x4000_0000 - 1, offset in 0u64..1 << 62) {
        let command = get_log_page(1, 0, dwords * 4, offset * 4, false);
        let numd = (command.cdw10() >> 16) | ((command.cdw11() & 0xffff) << 16);
        prop_assert_eq!(numd, dwords - 1);
        let read_back = u64::from(command.cdw12()) | (u64::from(command.cdw13()) << 32);
        prop_assert_eq!(read_back, offset * 4);
    }

    #[test]
    fn queue_sizes_are_one_less(entries in 2u32..=65_536, queue_id: u16, vector: u16) {
        let command = create_completion_queue(queue_id, entries, 0, Some(vector));
        prop_assert_eq!(command.cdw10() >> 16, entries - 1);
        prop_assert_eq!(command.cdw10() as u16, queue_id);
        prop_assert_eq!((command.cdw11() >> 16) as u16, vector);
    }
}
