//! A device that says what it may not.

use std::collections::BTreeSet;

use nvme_spec::{Cqe, Status};
use poll_window::Kind;
use proptest::prelude::*;

use super::pair::{ID, Pair};
use crate::queue::Lie;

/// A pair with three commands that the device has fetched, and one that it was not told of.
fn pair_with_commands() -> (Pair, Vec<u16>) {
    let mut pair = Pair::new(8);
    for _ in 0..3 {
        pair.start();
    }
    pair.host.ring_deferred();
    pair.device.fetch(3);
    pair.start();
    assert!(pair.host.has_deferred());
    let cids = pair.device.fetched.iter().map(|sqe| sqe.cid()).collect();
    (pair, cids)
}

fn lie(cqe: impl FnOnce(&Pair, &[u16]) -> Cqe) -> Lie {
    let (mut pair, cids) = pair_with_commands();
    let cqe = cqe(&pair, &cids);
    pair.device.post(cqe);
    let lie = pair.next_lie();
    assert_eq!(pair.alive(), 4, "no memory is given up for a lie");
    assert_eq!(pair.host.in_flight(), 4);
    // What it says truly is still understood.
    pair.device
        .post(pair.device.honest(cids[1], Status::SUCCESS));
    assert_eq!(pair.next_number(), 1);
    lie
}

#[test]
fn identifiers_that_were_never_given() {
    for cid in [0xffff, 0, 7, 0x1234] {
        let found = lie(|pair, cids| {
            assert!(!cids.contains(&cid));
            pair.device.honest(cid, Status::SUCCESS)
        });
        assert_eq!(found, Lie::UnknownCommand { cid });
    }
}

#[test]
fn an_identifier_of_another_generation() {
    let wrong = std::cell::Cell::new(0);
    let found = lie(|pair, cids| {
        wrong.set(cids[0].wrapping_add(8));
        pair.device.honest(wrong.get(), Status::SUCCESS)
    });
    assert_eq!(found, Lie::UnknownCommand { cid: wrong.get() });
}

#[test]
fn a_command_that_it_was_not_told_of() {
    let (mut pair, _) = pair_with_commands();
    // Identifiers can be foreseen: learn the fourth one from a pair with the same history.
    let (mut twin, _) = pair_with_commands();
    twin.host.ring_deferred();
    twin.device.fetch(1);
    let cid = twin.device.fetched[3].cid();

    pair.device.post(pair.device.honest(cid, Status::SUCCESS));
    assert_eq!(pair.next_lie(), Lie::UnknownCommand { cid });
    assert_eq!(pair.alive(), 4);

    pair.host.ring_deferred();
    pair.device.fetch(1);
    pair.device.post(pair.device.honest(cid, Status::SUCCESS));
    assert_eq!(pair.next_number(), 3);
}

#[test]
fn the_same_completion_twice() {
    let (mut pair, cids) = pair_with_commands();
    for _ in 0..2 {
        pair.device
            .post(pair.device.honest(cids[0], Status::SUCCESS));
    }
    assert_eq!(pair.next_number(), 0);
    assert_eq!(pair.next_lie(), Lie::UnknownCommand { cid: cids[0] });
    assert_eq!(pair.alive(), 3);
}

#[test]
fn the_completion_of_an_earlier_command_in_the_same_slot() {
    let (mut pair, cids) = pair_with_commands();
    pair.device.complete(0);
    pair.next_number();
    let (number, _) = pair.start();
    pair.host.ring_deferred();
    pair.device.fetch(usize::MAX);
    let new = pair.device.fetched.back().unwrap().cid();
    assert_eq!(
        (new & 7, new == cids[0]),
        (cids[0] & 7, false),
        "the same slot"
    );
    pair.device
        .post(pair.device.honest(cids[0], Status::SUCCESS));
    assert_eq!(pair.next_lie(), Lie::UnknownCommand { cid: cids[0] });
    pair.device.post(pair.device.honest(new, Status::SUCCESS));
    assert_eq!(pair.next_number(), number);
}

#[test]
fn another_submission_queue() {
    for submission_queue in [0, ID - 1, ID + 1, 0xffff] {
        let found = lie(|pair, cids| {
            let cqe = pair.device.honest(cids[0], Status::SUCCESS);
            cqe.with_sq(submission_queue, pair.device.head())
        });
        assert_eq!(found, Lie::WrongQueue { submission_queue });
    }
}

#[test]
fn a_submission_queue_head_where_it_cannot_be() {
    // Past what it was told, and outside of the queue.
    for head in [4, 5, 7, 8, 9, 0xffff] {
        let found = lie(|pair, cids| {
            pair.device
                .honest(cids[0], Status::SUCCESS)
                .with_sq(ID, head)
        });
        assert_eq!(found, Lie::SubmissionHead { head });
    }
}

#[test]
fn a_submission_queue_head_that_goes_back() {
    let (mut pair, cids) = pair_with_commands();
    pair.device
        .post(pair.device.honest(cids[0], Status::SUCCESS).with_sq(ID, 2));
    assert_eq!(pair.next_number(), 0);
    pair.device
        .post(pair.device.honest(cids[1], Status::SUCCESS).with_sq(ID, 1));
    assert_eq!(pair.next_lie(), Lie::SubmissionHead { head: 1 });
}

#[test]
fn heads_are_checked_across_the_end_of_the_ring() {
    let mut pair = Pair::new(4);
    for _ in 0..3 {
        pair.start();
        pair.device.work();
        pair.next_number();
        pair.host.acknowledge();
    }
    // Head 3; entries 3 and 0 are in use.
    pair.start();
    pair.start();
    pair.host.ring_deferred();
    pair.device.fetch(2);
    let cid = pair.device.fetched[0].cid();
    for head in [2, 4, 5] {
        pair.device
            .post(pair.device.honest(cid, Status::SUCCESS).with_sq(ID, head));
        assert_eq!(pair.next_lie(), Lie::SubmissionHead { head });
    }
    pair.device
        .post(pair.device.honest(cid, Status::SUCCESS).with_sq(ID, 0));
    assert_eq!(pair.next_number(), 3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever the entries say, only outstanding commands end, each once, and nothing panics.
    #[test]
    fn any_entries(
        entries in prop::sample::select(vec![2u16, 3, 5, 8, 255]),
        posts in prop::collection::vec((any::<[u32; 4]>(), 0u8..8, 0u8..4), 1..60),
    ) {
        let mut pair = Pair::new(entries);
        let mut open = BTreeSet::new();
        for (mut dwords, closeness, submissions) in posts {
            for _ in 0..submissions {
                if let Some((number, _)) = pair.submit(crate::queue::Class::Foreground(Kind::Read), None) {
                    open.insert(number);
                }
            }
            // Some entries are almost right.
            if closeness > 2 {
                dwords[2] = dwords[2] & 0x3 | u32::from(ID) << 16;
            }
            if closeness > 4 {
                dwords[3] &= 0xffff_001f;
            }
            pair.device.post(Cqe::from_dwords(dwords));
            match pair.next() {
                Some(Ok(finished)) => {
                    prop_assert_eq!(finished.cqe.sq_id(), ID);
                    prop_assert!(finished.cqe.sq_head() < entries);
                    prop_assert!(open.remove(&finished.token.number));
                }
                Some(Err(_)) => {}
                None => prop_assert!(false, "an entry was posted"),
            }
            prop_assert_eq!(pair.alive(), open.len());
            prop_assert_eq!(pair.host.in_flight(), open.len());
        }
    }
}
