//! Waiting for everything that was started.

use std::task::Waker;

use super::rig::{Rig, Started, TIMEOUT, Wakes};
use crate::engine::PollMode;
use crate::engine::state::{Failed, Failure};

fn rig(entries: u16) -> Rig {
    Rig::new(entries, PollMode::Interrupt)
}

struct Drain {
    key: usize,
    wakes: std::sync::Arc<Wakes>,
    waker: Waker,
}

impl Drain {
    fn begin(rig: &mut Rig) -> Self {
        let (wakes, waker) = Wakes::new();
        let key = rig.state.begin_drain();
        Self { key, wakes, waker }
    }

    fn poll(&self, rig: &mut Rig) -> Option<Result<(), Failed>> {
        rig.state
            .poll_drain(self.key, &mut Some(self.waker.clone()))
    }
}

/// The device completes one command.
fn complete(rig: &mut Rig, number: u32) {
    let index = rig
        .fetched()
        .iter()
        .position(|&fetched| fetched == number)
        .unwrap();
    rig.device.complete(index).unwrap();
    rig.reap();
}

#[test]
fn nothing_is_waited_for_if_there_is_nothing() {
    let mut rig = rig(4);
    let drain = Drain::begin(&mut rig);
    assert_eq!(drain.poll(&mut rig), Some(Ok(())));
    rig.state.end_drain(drain.key);
}

#[test]
fn all_that_came_before_and_nothing_later() {
    let mut rig = rig(8);
    let started: Vec<Started> = (0..2).map(|_| rig.start()).collect();
    rig.abandon(&started[0]);
    let drain = Drain::begin(&mut rig);
    let _later = rig.start();
    assert_eq!(drain.poll(&mut rig), None);
    complete(&mut rig, 1);
    assert_eq!(
        (drain.poll(&mut rig), drain.wakes.count()),
        (None, 0),
        "an orphan is left"
    );
    complete(&mut rig, 0);
    assert_eq!(drain.wakes.count(), 1);
    assert_eq!(drain.poll(&mut rig), Some(Ok(())));
}

#[test]
fn what_waits_for_a_slot_came_before_too() {
    let mut rig = rig(3);
    let started: Vec<Started> = (0..5).map(|_| rig.start()).collect();
    let drain = Drain::begin(&mut rig);
    rig.abandon(&started[3]);
    assert_eq!(drain.poll(&mut rig), None);
    complete(&mut rig, 0);
    complete(&mut rig, 1);
    complete(&mut rig, 2);
    assert_eq!(
        (drain.poll(&mut rig), drain.wakes.count()),
        (None, 0),
        "one is under way"
    );
    complete(&mut rig, 4);
    assert_eq!(drain.wakes.count(), 1);
    assert_eq!(drain.poll(&mut rig), Some(Ok(())));
}

#[test]
fn late_commands_are_waited_for() {
    let mut rig = rig(4);
    rig.start();
    let drain = Drain::begin(&mut rig);
    rig.expire(TIMEOUT * 2);
    assert_eq!(drain.poll(&mut rig), None, "it may still reach the media");
    rig.work();
    assert_eq!(drain.wakes.count(), 1);
    assert_eq!(drain.poll(&mut rig), Some(Ok(())));
}

#[test]
fn a_failed_queue_is_not_quiet() {
    let mut rig = rig(4);
    rig.start();
    let drain = Drain::begin(&mut rig);
    assert_eq!(drain.poll(&mut rig), None);
    rig.fail();
    assert_eq!(drain.wakes.count(), 1);
    assert_eq!(drain.poll(&mut rig), Some(Err(Failure::Closed.told(true))));
}

#[test]
fn polling_again_and_again_leaves_one_waker() {
    let mut rig = rig(4);
    rig.start();
    let drain = Drain::begin(&mut rig);
    let (old_wakes, old) = Wakes::new();
    let mut waker = Some(old);
    assert_eq!(rig.state.poll_drain(drain.key, &mut waker), None);
    assert!(waker.is_none());
    for _ in 0..3 {
        assert_eq!(drain.poll(&mut rig), None);
    }
    rig.work();
    assert_eq!((old_wakes.count(), drain.wakes.count()), (0, 1));
    assert!(rig.state.end_drain(drain.key).is_none());
    // Nobody is left to be woken.
    rig.start();
    rig.work();
    assert_eq!(drain.wakes.count(), 1);
}
