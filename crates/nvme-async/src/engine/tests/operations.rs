//! What becomes of operations.

use std::time::{Duration, Instant};

use nvme_spec::Status;

use super::rig::{Rig, Started, TIMEOUT, Wakes, command, returned};
use crate::Fate;
use crate::engine::state::{Aftermath, Failure, Here, Progress, Refusal};
use crate::engine::{Notification, PollMode};
use crate::io::Holdings;
use crate::queue::Lie;

const MOMENT: Duration = Duration::from_millis(1);

fn rig(entries: u16) -> Rig {
    Rig::new(entries, PollMode::Interrupt)
}

#[test]
fn a_command_completes() {
    let mut rig = rig(4);
    let started = rig.start();
    assert!(rig.outcome(&started).is_none());
    assert_eq!(rig.reap(), 0);
    assert_eq!(started.wakes.count(), 0);
    assert_eq!(rig.work(), 1);
    assert_eq!(started.wakes.count(), 1);
    rig.success(&started);
    assert_eq!(rig.state.in_flight(), 0);
    assert_eq!(rig.state.counters.completions, 1);
    let (counters, _) = rig.state.counters();
    assert_eq!(counters.submission_doorbells, 1);
    assert_eq!(counters.completion_doorbells, 1);
    assert_eq!(rig.state.counters.reaps, 1);
}

#[test]
fn a_status_is_an_outcome_like_success() {
    let mut rig = rig(4);
    let started = rig.start();
    rig.device.fetch(1);
    let cid = rig.device.fetched[0].cid();
    rig.device
        .post(rig.device.honest(cid, Status::INVALID_FIELD));
    rig.reap();
    let (result, holdings) = rig.outcome(&started).unwrap();
    assert_eq!(result.unwrap().status(), Status::INVALID_FIELD);
    assert!(holdings.is_some());
}

#[test]
fn a_start_takes_what_others_wait_for() {
    let mut rig = rig(8);
    let first = rig.start();
    rig.device.work();
    rig.sleep(Some(Instant::now()));
    let second = rig.start();
    assert_eq!((first.wakes.count(), second.wakes.count()), (1, 0));
    rig.success(&first);
    assert!(rig.outcome(&second).is_none());
}

#[test]
fn a_start_leaves_it_to_a_reaper_that_is_awake() {
    let mut rig = rig(8);
    let first = rig.start();
    rig.device.work();
    let second = rig.start();
    assert_eq!((first.wakes.count(), second.wakes.count()), (0, 0));
    assert_eq!(rig.work(), 2);
    rig.success(&first);
    rig.success(&second);
}

#[test]
fn the_backlog_is_served_in_order() {
    let mut rig = rig(3);
    let started: Vec<_> = (0..7).map(|_| rig.start()).collect();
    assert_eq!(rig.fetched(), [0, 1]);
    // One slot is free for a moment; what came first gets it, not what comes now.
    rig.device.complete(1).unwrap();
    rig.start();
    assert_eq!(started[1].wakes.count(), 1);
    assert_eq!(rig.fetched(), [0, 2]);
    let mut order = Vec::new();
    while let [next, ..] = rig.fetched()[..] {
        order.push(next);
        rig.device.complete(0).unwrap();
        rig.reap();
    }
    assert_eq!(order, [0, 2, 3, 4, 5, 6, 7]);
    for started in &started {
        rig.success(started);
    }
}

#[test]
fn the_backlog_is_rung_for() {
    let mut rig = rig(3);
    for _ in 0..4 {
        rig.start();
    }
    rig.fetched();
    rig.device.complete(0).unwrap();
    rig.sleep(Some(Instant::now() + TIMEOUT));
    // It takes the completion, and another command has the slot.
    rig.start();
    assert_eq!(rig.device.fetch(usize::MAX), 0);
    assert_eq!(rig.reaper.count(), 1, "woken to ring");
    rig.state.ring_deferred();
    assert_eq!(rig.device.fetch(usize::MAX), 1);
}

#[test]
fn abandoned_while_it_waits_for_a_slot() {
    let mut rig = rig(2);
    let first = rig.start();
    let second = rig.start();
    let third = rig.start();
    rig.abandon(&second);
    assert!(!second.memory.is_alive(), "the device never heard of it");
    assert_eq!(rig.work(), 1);
    rig.success(&first);
    assert_eq!(rig.fetched(), [2]);
    rig.work();
    rig.success(&third);
    assert_eq!(second.wakes.count(), 0);
}

#[test]
fn abandoned_while_the_device_works() {
    let mut rig = rig(2);
    let started = rig.start();
    rig.abandon(&started);
    assert!(started.memory.is_alive(), "the device may use it");
    assert_eq!(rig.state.in_flight(), 1);
    let next = rig.start();
    assert_eq!(rig.fetched(), [0], "its slot is taken");
    rig.device.work();
    rig.after(|state, aftermath| {
        state.reap(
            crate::engine::state::Look::Polled,
            Instant::now(),
            aftermath,
        );
        assert!(
            started.memory.is_alive(),
            "others' memory is not dropped under the lock"
        );
    });
    assert!(
        !started.memory.is_alive(),
        "freed when it completes, not when somebody polls"
    );
    assert_eq!(started.wakes.count(), 0);
    rig.work();
    rig.success(&next);
}

#[test]
fn abandoned_when_it_is_done() {
    let mut rig = rig(2);
    let started = rig.start();
    rig.work();
    assert!(started.memory.is_alive());
    rig.abandon(&started);
    assert!(!started.memory.is_alive());
}

#[test]
fn keys_are_used_again() {
    let mut rig = rig(4);
    for _ in 0..10 {
        let started = rig.start();
        assert_eq!(started.key, 0);
        rig.work();
        rig.success(&started);
    }
}

#[test]
fn a_key_is_not_used_again_while_a_slot_refers_to_it() {
    let mut rig = rig(8);
    let (orphan, late) = (rig.start(), rig.start());
    rig.abandon(&orphan);
    rig.expire(TIMEOUT + MOMENT);
    assert!(rig.outcome(&late).unwrap().1.is_none());
    rig.timeout = TIMEOUT * 10;
    let others = [rig.start(), rig.start(), rig.start()];
    let keys = [orphan.key, late.key];
    assert!(others.iter().all(|other| !keys.contains(&other.key)));
    assert_eq!(rig.work(), 5);
    for other in &others {
        rig.success(other);
    }
    assert!(!orphan.memory.is_alive() && !late.memory.is_alive());
    let mut again: Vec<usize> = (0..5).map(|_| rig.start().key).collect();
    again.sort_unstable();
    assert_eq!(again, [0, 1, 2, 3, 4], "all of them are, afterwards");
}

#[test]
fn a_failure_ends_everything_and_frees_nothing_in_use() {
    let mut rig = rig(3);
    let submitted = [rig.start(), rig.start()];
    let orphan = &submitted[1];
    rig.abandon(orphan);
    let queued = rig.start();
    rig.state.ring_deferred();
    rig.fail();

    assert_eq!(submitted[0].wakes.count(), 1);
    let (result, holdings) = rig.outcome(&submitted[0]).unwrap();
    assert_eq!(result.unwrap_err(), Failure::Closed.told(true));
    assert!(holdings.is_none(), "the device may still use it");
    assert_eq!(queued.wakes.count(), 1);
    let (result, holdings) = rig.outcome(&queued).unwrap();
    assert_eq!(result.unwrap_err(), Failure::Closed.told(false));
    assert!(holdings.is_some(), "the device never heard of it");

    let refusal = Some(Refusal::Failed(Failure::Closed));
    assert_eq!(rig.try_start().err(), refusal);
    // Nothing is believed, rung or waited for any more.
    let rung = rig.device.submission_tail.writes();
    rig.device.work();
    assert_eq!(rig.reap(), 0);
    rig.state.ring_deferred();
    assert_eq!(rig.device.submission_tail.writes(), rung);
    assert!(!rig.state.completion_ready() && !rig.state.is_watched());
    assert_eq!(
        rig.state.in_flight(),
        0,
        "or a busy reaper would poll for ever"
    );
    assert!(submitted.iter().all(|started| started.memory.is_alive()));
    let Rig { state, .. } = rig;
    drop(state);
    assert!(submitted.iter().all(|started| !started.memory.is_alive()));
}

#[test]
fn a_repeat_that_finds_no_slot_in_time_is_given_up() {
    let mut rig = rig(2);
    let (mut command, mut holdings, memory) = command(0);
    command.repeatable = true;
    let (wakes, waker) = Wakes::new();
    let key = rig.after(|state, aftermath| {
        let (here, now) = (Here::now(), Instant::now());
        match state.start(
            &command,
            holdings.as_mut(),
            &mut Some(waker),
            here,
            now,
            aftermath,
        ) {
            Ok(Progress::Waiting { key }) => key,
            Ok(Progress::Done(_)) => panic!("done at once"),
            Err(_) => panic!("refused"),
        }
    });
    rig.device.fetch(1);
    let cid = rig.device.fetched.remove(0).expect("it was told of").cid();
    let later = Status::INTERNAL_ERROR.with_crd(1);
    rig.device.post(rig.device.honest(cid, later));
    assert_eq!(rig.reap(), 1);
    // Another one takes the only slot, and keeps it.
    rig.timeout = TIMEOUT * 10;
    let other = rig.start();
    rig.expire(TIMEOUT / 2);
    assert_eq!((wakes.count(), rig.state.in_flight()), (0, 1));
    rig.expire(TIMEOUT + Duration::from_secs(1));
    assert_eq!(wakes.count(), 1);
    let started = Started { key, wakes, memory };
    let (result, holdings) = rig.outcome(&started).expect("it is done");
    let failed = result.expect_err("it is over");
    assert!(matches!(failed.failure, Failure::TimedOut { after } if after >= TIMEOUT));
    assert_eq!(failed.fate, Fate::Unknown);
    assert!(holdings.is_some() && started.memory.is_alive() && other.memory.is_alive());
}

#[test]
fn what_the_device_was_not_told_of_comes_back_whatever_it_does() {
    let mut rig = rig(4);
    let [told, untold, orphan] = [rig.start(), rig.start(), rig.start()];
    rig.abandon(&orphan);
    rig.fail();
    assert!(rig.outcome(&told).unwrap().1.is_none() && told.memory.is_alive());
    let (result, holdings) = rig.outcome(&untold).unwrap();
    assert_eq!(result.unwrap_err(), Failure::Closed.told(false));
    assert!(holdings.is_some() && !orphan.memory.is_alive());
}

#[test]
fn only_the_first_failure_counts() {
    let mut rig = rig(4);
    let started = rig.start();
    rig.device.post(rig.device.honest(0x7777, Status::SUCCESS));
    assert_eq!(rig.reap(), 0);
    rig.fail();
    let lie = Failure::Lie(Lie::UnknownCommand { cid: 0x7777 });
    assert_eq!(
        rig.outcome(&started).unwrap().0.unwrap_err(),
        lie.told(true)
    );
    assert_eq!(rig.try_start().err(), Some(Refusal::Failed(lie)));
}

#[test]
fn what_came_before_a_lie_is_believed() {
    let mut rig = rig(8);
    let (true_one, other) = (rig.start(), rig.start());
    rig.state.ring_deferred();
    rig.device.fetch(2);
    rig.device.complete(0).unwrap();
    rig.device.post(rig.device.honest(0x7777, Status::SUCCESS));
    rig.device.complete(0).unwrap();
    assert_eq!(rig.reap(), 1);
    rig.success(&true_one);
    assert!(rig.outcome(&other).unwrap().0.is_err());
    assert!(other.memory.is_alive());
}

#[test]
fn refusing_lets_go_on_what_was_accepted() {
    let mut rig = rig(2);
    let (submitted, queued) = (rig.start(), rig.start());
    rig.state.set_refusing(true);
    let refusal = Some(Refusal::Failed(Failure::Closed));
    assert_eq!(rig.try_start().err(), refusal);
    rig.work();
    rig.success(&submitted);
    rig.work();
    rig.success(&queued);
    rig.state.set_refusing(false);
    rig.start();
}

#[test]
fn a_deadline_passes() {
    let mut rig = rig(3);
    let (late, orphan) = (rig.start(), rig.start());
    rig.abandon(&orphan);
    rig.expire(TIMEOUT - Duration::from_secs(1));
    assert!(rig.outcome(&late).is_none());
    rig.expire(TIMEOUT + MOMENT);
    assert_eq!(late.wakes.count(), 1);
    let (result, holdings) = rig.outcome(&late).unwrap();
    match result.unwrap_err().failure {
        Failure::TimedOut { after } => assert!(after >= TIMEOUT),
        other => panic!("{other:?}"),
    }
    assert!(holdings.is_none() && late.memory.is_alive() && orphan.memory.is_alive());
    assert_eq!(rig.state.in_flight(), 0);

    // The late completion frees the slot for what waits for it.
    let next = rig.start();
    assert!(rig.state.is_watched());
    assert_eq!(rig.work(), 2);
    assert!(!late.memory.is_alive() && !orphan.memory.is_alive());
    rig.work();
    rig.success(&next);
    assert!(!rig.state.is_watched());
}

#[test]
fn a_late_completion_gives_memory_back_but_no_success() {
    let mut rig = rig(4);
    let (late, abandoned) = (rig.start(), rig.start());
    rig.expire(TIMEOUT + MOMENT);
    rig.abandon(&abandoned);
    assert!(abandoned.memory.is_alive(), "the device may use it");
    assert_eq!(rig.work(), 2);
    assert!(!abandoned.memory.is_alive());
    let (result, holdings) = rig.outcome(&late).unwrap();
    assert!(matches!(
        result.unwrap_err().failure,
        Failure::TimedOut { .. }
    ));
    assert!(holdings.is_some() && late.memory.is_alive());
    assert_eq!(late.wakes.count(), 1);
}

#[test]
fn an_end_leaves_outcomes_to_futures_and_memory_to_the_device() {
    let mut rig = rig(8);
    let [done, told, taken, orphan] = [rig.start(), rig.start(), rig.start(), rig.start()];
    rig.fetched();
    rig.device.complete(0).unwrap();
    rig.reap();
    let untold = rig.start();
    rig.abandon(&orphan);
    rig.fail();
    assert!(rig.outcome(&taken).unwrap().1.is_none());
    let Rig { state, .. } = rig;
    let mut aftermath = Aftermath::default();
    let (mut outcomes, remains) = state.end(false, &mut aftermath);
    aftermath.run();
    let mut take = |started: &Started| {
        let mut holdings = Holdings::default();
        let result = outcomes.take(started.key, holdings.as_mut())?;
        assert!(started.memory.is_alive());
        Some((result.is_ok(), returned(holdings).is_some()))
    };
    assert_eq!(take(&done), Some((true, true)));
    assert_eq!(take(&untold), Some((false, true)));
    assert_eq!(take(&told), Some((false, false)));
    assert_eq!((take(&taken), take(&orphan)), (None, None));
    assert!(!done.memory.is_alive() && !untold.memory.is_alive());
    let in_use = [told, taken, orphan];
    assert!(in_use.iter().all(|started| started.memory.is_alive()));
    drop(remains);
    assert!(in_use.iter().all(|started| !started.memory.is_alive()));
}

#[test]
fn nothing_is_asked_of_a_queue_that_is_about_to_end() {
    let mut rig = rig(8);
    rig.state.set_refusing(true);
    rig.state.request_event();
    rig.state.set_refusing(false);
    rig.fail();
    rig.state.request_event();
    assert_eq!(rig.device.fetch(usize::MAX), 0);
}

#[test]
fn events_are_reported_once() {
    let mut rig = rig(8);
    for _ in 0..2 {
        rig.state.request_event();
    }
    assert_eq!((rig.state.in_flight(), rig.state.is_watched()), (0, false));
    assert_eq!(rig.device.fetch(usize::MAX), 2, "rung for at once");
    rig.expire(TIMEOUT * 1000);
    let cid = rig.device.fetched[0].cid();
    rig.device.post(
        rig.device
            .honest(cid, Status::SUCCESS)
            .with_result(0x0001_0203),
    );
    assert_eq!(rig.reap(), 1);
    let events = rig.state.take_events();
    assert_eq!(events.len(), 1);
    let Notification::Event(event) = events[0] else {
        panic!("{events:?}");
    };
    assert_eq!(event.log_page(), 1);
    assert!(rig.state.take_events().is_empty());
    assert_eq!(
        rig.device.fetch(usize::MAX),
        0,
        "not before it was dealt with"
    );
    rig.state.request_event();
    assert_eq!(rig.device.fetch(usize::MAX), 1);

    let cid = rig.device.fetched[1].cid();
    rig.device
        .post(rig.device.honest(cid, Status::INVALID_FIELD));
    assert_eq!(rig.reap(), 1);
    assert!(rig.state.take_events().is_empty());
    assert_eq!(
        rig.device.fetch(usize::MAX),
        0,
        "a refusal is not asked for again"
    );
}
