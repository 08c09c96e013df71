//! Behaviour of the queue core, one thing at a time.

use std::time::Duration;

use super::pair::Pair;
use crate::queue::Class;
use poll_window::Kind;

const SIZES: [u16; 7] = [2, 3, 4, 5, 8, 255, 4096];

/// A permutation of `0..len`, another one for each `seed`.
fn shuffled(len: usize, seed: u64) -> Vec<usize> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut indices: Vec<usize> = (0..len).collect();
    for i in (1..len).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        indices.swap(i, (state % (i as u64 + 1)) as usize);
    }
    indices
}

/// Fills the queue, completes everything in another order and takes it, so often that the rings
/// wrap and the phase flips several times.
fn fill_and_empty(entries: u16, rounds: usize) {
    let mut pair = Pair::new(entries);
    let capacity = usize::from(entries) - 1;
    assert_eq!(pair.host.capacity(), capacity);
    for round in 0..rounds {
        let mut first = None;
        for _ in 0..capacity {
            let (number, _) = pair.start();
            first.get_or_insert(number);
        }
        assert_eq!(
            pair.submit(Class::Foreground(Kind::Read), None),
            None,
            "all slots are taken"
        );
        pair.host.ring_deferred();
        assert_eq!(pair.device.fetch(usize::MAX), capacity);
        let first = first.unwrap();
        let mut cids: Vec<u16> = Vec::new();
        for (sqe, number) in pair.device.fetched.iter().zip(first..) {
            assert_eq!(
                *sqe,
                Pair::command(number).with_cid(sqe.cid()),
                "in order, unharmed"
            );
            cids.push(sqe.cid());
        }
        cids.sort_unstable();
        cids.dedup();
        assert_eq!(cids.len(), capacity, "identifiers are unique");
        assert!(!cids.contains(&0xffff));

        // Completes in another order: the fetched commands are shuffled, then done one by one.
        let order = shuffled(capacity, round as u64 + 1);
        pair.device.fetched = order.iter().map(|&i| pair.device.fetched[i]).collect();
        pair.device.work();
        for &index in &order {
            assert!(pair.host.completion_ready());
            assert_eq!(pair.next_number(), first + index as u32);
        }
        assert!(!pair.host.completion_ready());
        assert!(pair.next().is_none());
        assert!(pair.host.acknowledge());
        assert!(!pair.host.acknowledge(), "there is nothing more to tell");
        assert_eq!((pair.host.in_flight(), pair.alive()), (0, 0));
    }
}

#[test]
fn rings_of_all_sizes_wrap() {
    for entries in SIZES {
        fill_and_empty(entries, if entries > 1000 { 3 } else { 9 });
    }
}

#[test]
fn the_largest_ring_wraps() {
    fill_and_empty(65535, 3);
}

/// One command at a time, so that head, tail and phase pass every position.
#[test]
fn single_commands_go_round() {
    for entries in SIZES {
        let mut pair = Pair::new(entries);
        let laps = 3 * usize::from(entries) + 1;
        for turn in 1..=laps {
            let (number, _) = pair.start();
            pair.device.work();
            assert_eq!(pair.next_number(), number);
            assert!(pair.next().is_none(), "an entry of the last lap is not new");
            assert!(pair.host.acknowledge());
            let position = (turn % usize::from(entries)) as u32;
            assert_eq!(pair.device.submission_tail.writes().last(), Some(&position));
            assert_eq!(pair.device.completion_head.writes().last(), Some(&position));
        }
    }
}

#[test]
fn the_doorbell_is_rung_at_once_for_a_lone_command() {
    let mut pair = Pair::new(64);
    pair.start();
    assert_eq!(pair.device.submission_tail.writes(), [1]);
    assert!(!pair.host.has_deferred());
    assert!(!pair.host.ring_deferred(), "there is nothing to tell");

    pair.start();
    pair.start();
    assert_eq!(
        pair.device.submission_tail.writes(),
        [1],
        "left to the reaper"
    );
    assert!(pair.host.has_deferred());
    assert!(pair.host.ring_deferred());
    assert_eq!(pair.device.submission_tail.writes(), [1, 3]);
    assert!(!pair.host.ring_deferred());
    assert_eq!(pair.device.submission_tail.writes(), [1, 3]);
}

#[test]
fn at_most_sixteen_commands_share_a_doorbell() {
    let mut pair = Pair::new(64);
    for _ in 0..1 + 15 {
        pair.start();
    }
    assert_eq!(pair.device.submission_tail.writes(), [1]);
    pair.start();
    assert_eq!(pair.device.submission_tail.writes(), [1, 17]);
    assert!(!pair.host.has_deferred());
}

#[test]
fn events_do_not_defer_work() {
    let mut pair = Pair::new(64);
    for _ in 0..4 {
        pair.submit(Class::Background, Some(Duration::ZERO))
            .unwrap();
    }
    assert_eq!(pair.device.submission_tail.writes(), [1, 2, 3, 4]);
    assert_eq!(pair.host.in_flight(), 0);
    assert_eq!(pair.host.earliest_deadline(), None);
    pair.start();
    assert_eq!(pair.device.submission_tail.writes(), [1, 2, 3, 4, 5]);

    pair.host.expire(pair.now + Duration::from_secs(1), |_, _| {
        panic!("no event is late")
    });
    pair.device.work();
    for number in 0..5 {
        assert_eq!(pair.next_number(), number);
    }
    assert_eq!((pair.host.in_flight(), pair.host.lost()), (0, 0));
}

#[test]
fn a_head_is_told_once_for_a_batch() {
    let mut pair = Pair::new(8);
    for _ in 0..5 {
        pair.start();
    }
    pair.host.ring_deferred();
    pair.device.work();
    for _ in 0..5 {
        pair.next_number();
    }
    assert!(pair.device.completion_head.writes().is_empty());
    assert!(pair.host.acknowledge());
    assert!(!pair.host.acknowledge());
    assert_eq!(pair.device.completion_head.writes(), [5]);
}

#[test]
fn a_slot_keeps_its_token_until_it_completes() {
    let mut pair = Pair::new(2);
    let (number, _) = pair.start();
    assert_eq!((pair.alive(), pair.host.in_flight()), (1, 1));
    assert_eq!(
        pair.submit(Class::Foreground(Kind::Read), None),
        None,
        "its slot is taken"
    );

    pair.device.work();
    let finished = pair.next().unwrap().unwrap();
    assert_eq!(finished.token.number, number);
    assert_eq!((pair.alive(), pair.host.in_flight()), (1, 0));
    drop(finished);
    assert_eq!(pair.alive(), 0);
    pair.start();
}

#[test]
fn a_late_command_keeps_its_slot_until_it_completes() {
    let mut pair = Pair::new(4);
    let second = Duration::from_secs(1);
    let start = pair.now;
    let (late, _) = pair
        .submit(Class::Foreground(Kind::Read), Some(second))
        .unwrap();
    let (later, _) = pair
        .submit(Class::Foreground(Kind::Read), Some(second))
        .unwrap();
    let (slow, _) = pair
        .submit(Class::Foreground(Kind::Read), Some(3 * second))
        .unwrap();
    pair.host.ring_deferred();
    assert_eq!(pair.host.earliest_deadline(), Some(start + second));

    pair.host
        .expire(start + second - Duration::from_nanos(1), |_, _| {
            panic!("too early")
        });
    assert_eq!((pair.host.in_flight(), pair.host.lost()), (3, 0));

    let expired = pair.give_up_late(start + second);
    assert_eq!(expired, [late, later]);
    assert_eq!((pair.host.in_flight(), pair.host.lost()), (1, 2));
    assert_eq!(pair.host.earliest_deadline(), Some(start + 3 * second));
    assert_eq!(pair.alive(), 3);
    assert_eq!(
        pair.submit(Class::Foreground(Kind::Read), None),
        None,
        "their slots are taken"
    );
    pair.host.expire(start + second, |_, _| panic!("only once"));

    pair.device.work();
    for (number, overdue) in [(late, true), (later, true), (slow, false)] {
        let finished = pair.next().unwrap().unwrap();
        assert_eq!((finished.token.number, finished.overdue), (number, overdue));
    }
    assert_eq!(
        (pair.host.in_flight(), pair.host.lost(), pair.alive()),
        (0, 0, 0)
    );
    assert_eq!(pair.host.earliest_deadline(), None);
}

#[test]
fn a_lost_command_does_not_count_as_company() {
    let mut pair = Pair::new(8);
    pair.submit(Class::Foreground(Kind::Read), Some(Duration::ZERO))
        .unwrap();
    pair.give_up_late(pair.now);
    pair.start();
    assert_eq!(
        pair.device.submission_tail.writes(),
        [1, 2],
        "it is rung for at once"
    );
}

#[test]
fn an_identifier_comes_back_late() {
    for entries in [2, 5, 256] {
        let mut pair = Pair::new(entries);
        let mut seen = std::collections::BTreeSet::new();
        // The generation takes what the slot number leaves of 16 bits.
        let generations = 0x1_0000 / usize::from(entries).next_power_of_two();
        for _ in 0..generations - 1 {
            pair.start();
            pair.device.fetch(1);
            assert!(
                seen.insert(pair.device.fetched[0].cid()),
                "an identifier was used again"
            );
            pair.device.work();
            pair.next_number();
            pair.host.acknowledge();
        }
    }
}
