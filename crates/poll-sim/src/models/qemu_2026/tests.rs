use super::*;
use crate::models::events::{both, device, other, polled, situation};

/// After each wait: the averages of the device and of everything else, and the window of the loop.
fn replay(policy: &mut Qemu2026, table: &[(Waited, [Nanos; 3])]) {
    for (row, (wait, [device, other, poll])) in table.iter().enumerate() {
        policy.waited(wait);
        assert_eq!(
            (policy.device, policy.other),
            (*device, *other),
            "row {row}"
        );
        assert_eq!(policy.plan(&situation(1)), Plan::poll(*poll), "row {row}");
    }
}

fn with(device: Nanos, other: Nanos, window: Nanos) -> Qemu2026 {
    Qemu2026 {
        window,
        device,
        other,
        ..Qemu2026::default()
    }
}

#[test]
fn every_rule_in_turn() {
    let mut policy = Qemu2026::default();
    assert_eq!(policy.plan(&situation(1)), Plan::INTERRUPT);
    replay(
        &mut policy,
        &[
            // The first wait is the average, and longer than twice no window.
            (device(8_000), [8_000, 0, 8_000]),
            // 8000 - 1000 + 2000 = 9000, and twice 8000 is longer.
            (device(16_000), [9_000, 0, 16_000]),
            // 9000 - 1125 + 125 = 8000, which is not shorter than half of 16000.
            (device(1_000), [8_000, 0, 16_000]),
            // 8000 - 1000 + 125 = 7125, which is.
            (polled(device(1_000)), [7_125, 0, 8_000]),
            // 7125 + 3001 = 10126 is idle and does not count; 3001 is shorter than 4000.
            (other(3_001), [10_126, 3_001, 4_000]),
            // 3001 / 8 = 375.1, 2007 / 8 = 250.9: 3001 - 375 + 250 = 2876, not shorter than 2000.
            // 10126 + 2007 = 12133.
            (other(2_007), [12_133, 2_876, 4_000]),
            // 12133 / 8 = 1516.6: 12133 - 1516 + 2500 = 13117, longer than twice 4000.
            // 2876 / 8 = 359.5: 2876 - 359 + 2500 = 5017.
            (both(20_000), [13_117, 5_017, 13_117]),
            // 13117 + 20000 = 33117 is too long. 5017 / 8 = 627.1: 5017 - 627 + 2500 = 6890, not
            // shorter than 13117 / 2 = 6558.
            (other(20_000), [0, 6_890, 13_117]),
            // 6890 / 8 = 861.3: 6890 - 861 + 125 = 6154, which is. Zero does not accumulate.
            (other(1_000), [0, 6_154, 6_558]),
            // Too long, also 6154 + 40000. 0 is shorter than 3279.
            (device(40_000), [0, 0, 3_279]),
            // Not longer than the longest window, and longer than twice 3279.
            (device(32_768), [32_768, 0, 32_768]),
            // 32768 - 4096 + 4100 = 32772 is too long.
            (device(32_800), [0, 0, 16_384]),
        ],
    );
}

#[test]
fn no_window_is_longer_than_the_longest() {
    // 17000 - 2125 + 3125 = 18000, longer than 17000, and 34000 is too long.
    let table = [(device(25_000), [18_000, 0, 32_768])];
    replay(&mut with(17_000, 0, 17_000), &table);
    // 18000 again, and 20000 is too long here.
    let mut small = Qemu2026 {
        max: 19_000,
        ..with(17_000, 0, 10_000)
    };
    replay(&mut small, &[(device(25_000), [18_000, 0, 19_000])]);
    let table = [(device(0), [0, 0, 0]), (both(1), [0, 0, 0])];
    replay(&mut Qemu2026::new(0, 3), &table);
}

#[test]
fn an_average_as_long_as_the_window_changes_nothing() {
    // 8000 - 1000 + 1000.
    let table = [(device(8_000), [8_000, 0, 8_000])];
    replay(&mut with(8_000, 0, 8_000), &table);
}

#[test]
fn idle_time_accumulates_until_it_is_too_long() {
    replay(
        &mut with(30_000, 2_000, 2_000),
        &[
            // 2000 - 250 + 250 each time.
            (other(2_000), [32_000, 2_000, 2_000]),
            // 2000 - 250 + 96 = 1846. 32000 + 768 is as long as the longest window.
            (other(768), [32_768, 1_846, 2_000]),
            // 1846 / 8 = 230.75, 1 / 8 = 0.1: 1846 - 230 + 0 = 1616.
            (other(1), [0, 1_616, 2_000]),
            (other(1_616), [0, 1_616, 2_000]),
            // The first wait after that is the average. 1616 + 5000 = 6616.
            (device(5_000), [5_000, 6_616, 5_000]),
        ],
    );
}

#[test]
fn the_longest_average_of_those_with_an_event_counts() {
    // 16000 - 2000 + 1000 = 15000 and 4000 - 500 + 1000 = 4500; longer than 10000, and twice that is
    // longer.
    let table = [(both(8_000), [15_000, 4_500, 20_000])];
    replay(&mut with(16_000, 4_000, 10_000), &table);
    let table = [(both(8_000), [4_500, 15_000, 20_000])];
    replay(&mut with(4_000, 16_000, 10_000), &table);
}

#[test]
fn a_wait_without_an_event_halves_the_window() {
    let nothing = Waited {
        device: false,
        ..device(1_000)
    };
    // 8000 + 1000 and 4000 + 1000.
    let table = [(nothing, [9_000, 5_000, 4_000])];
    replay(&mut with(8_000, 4_000, 8_000), &table);
}

#[test]
fn the_window_never_shrinks_to_zero() {
    // Half of 1 is 0, and nothing is shorter.
    let long = device(40_000);
    let table = [
        (long, [0, 0, 2]),
        (long, [0, 0, 1]),
        (long, [0, 0, 1]),
        (long, [0, 0, 1]),
    ];
    replay(&mut with(0, 0, 5), &table);
}

#[test]
fn other_weights() {
    replay(
        &mut Qemu2026::new(32_768, 1),
        &[
            (device(1_001), [1_001, 0, 1_001]),
            // 1001 - 500 + 1500 = 2001, and twice 1001 is longer.
            (device(3_000), [2_001, 0, 2_002]),
        ],
    );
    replay(
        &mut Qemu2026::new(32_768, 2),
        &[
            (device(1_000), [1_000, 0, 1_000]),
            // 1000 - 250 + 750.
            (device(3_000), [1_500, 0, 2_000]),
        ],
    );
    replay(
        &mut Qemu2026::new(32_768, 63),
        &[
            (device(1_000), [1_000, 0, 1_000]),
            (device(30_000), [1_000, 0, 1_000]),
        ],
    );
}

#[test]
fn polls_for_an_idle_device() {
    let mut policy = Qemu2026::default();
    policy.waited(&device(10_000));
    assert_eq!(policy.plan(&situation(0)), Plan::poll(10_000));
}

#[test]
fn never_polls_for_flash_memory() {
    let table = [(device(80_000), [0, 0, 0])];
    replay(&mut Qemu2026::default(), &table.repeat(10));
}

#[test]
fn polls_only_where_it_is_in_vain_for_a_fast_guest_and_a_slow_disk() {
    // The guest takes 3 µs and the disk 90 µs, in turns. The guest meets a window of 1.5 µs, which is
    // too short, and the disk one of 3 µs: that for which 2025 was the cure.
    let mut policy = Qemu2026::default();
    let table = [
        (other(3_000), [0, 3_000, 3_000]),
        // 3000 + 90000 is too long, too.
        (device(90_000), [0, 0, 1_500]),
    ];
    replay(&mut policy, &table.repeat(3));
}

#[test]
fn two_latencies_make_the_window_swing() {
    // 30 µs and 60 µs in turns: each window is too short for the wait that comes next.
    let table = [
        (device(30_000), [30_000, 0, 30_000]),
        // 30000 - 3750 + 7500 = 33750 is too long.
        (device(60_000), [0, 0, 15_000]),
    ];
    replay(&mut Qemu2026::default(), &table.repeat(3));
}

#[test]
fn one_long_wait_makes_the_next_window_too_short() {
    let usual = device(10_000);
    replay(
        &mut Qemu2026::default(),
        &[
            (usual, [10_000, 0, 10_000]),
            // 10000 - 1250 + 1250.
            (usual, [10_000, 0, 10_000]),
            // 10000 - 1250 + 250000 is too long.
            (device(2_000_000), [0, 0, 5_000]),
            (usual, [10_000, 0, 10_000]),
        ],
    );
}

#[test]
fn it_does_not_tell_reads_from_writes() {
    // Writes take 10 µs and reads 80 µs, in turns. For the writes it polls for up to three times as
    // long as it has to, and never for as long as a read takes.
    let (write, read) = (device(10_000), device(80_000));
    replay(
        &mut Qemu2026::default(),
        &[
            (write, [10_000, 0, 10_000]),
            // 10000 - 1250 + 10000 = 18750, and twice 10000 is longer.
            (read, [18_750, 0, 20_000]),
            // 18750 / 8 = 2343.75: 18750 - 2343 + 1250.
            (write, [17_657, 0, 20_000]),
            // 17657 / 8 = 2207.1: 17657 - 2207 + 10000, and twice 20000 is too long.
            (read, [25_450, 0, 32_768]),
            // 25450 / 8 = 3181.25: 25450 - 3181 + 1250.
            (write, [23_519, 0, 32_768]),
            // 23519 / 8 = 2939.9: 23519 - 2939 + 10000.
            (read, [30_580, 0, 32_768]),
            // 30580 / 8 = 3822.5: 30580 - 3822 + 1250.
            (write, [28_008, 0, 32_768]),
            // 28008 - 3501 + 10000 = 34507 is too long.
            (read, [0, 0, 16_384]),
            (write, [10_000, 0, 16_384]),
            // 18750, and twice 16384 is longer.
            (read, [18_750, 0, 32_768]),
        ],
    );
}
