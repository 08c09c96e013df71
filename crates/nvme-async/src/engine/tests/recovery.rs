//! What recovery does to a queue pair, and what retries do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::{Cqe, Status};

use super::rig::{RETRIES, Rig, Started, TIMEOUT};
use crate::Fate;
use crate::engine::PollMode;
use crate::engine::state::{Failed, Failure};
use crate::engine::trouble::{Inbox, Trouble};
use crate::queue::Lie;
use crate::recovery::ResetCause;

const CAUSE: ResetCause = ResetCause::StateLost;

fn supervised(entries: u16) -> (Rig, Arc<Inbox>) {
    let mut rig = Rig::new(entries, PollMode::Interrupt);
    let inbox = Arc::new(Inbox::new().unwrap());
    rig.state.supervise(inbox.clone());
    (rig, inbox)
}

fn failed(rig: &mut Rig, started: &Started) -> (Failed, bool) {
    let (result, holdings) = rig.outcome(started).expect("it is done");
    assert_eq!(started.wakes.count(), 1);
    (result.expect_err("it failed"), holdings.is_some())
}

/// The device stops, forgets everything, and starts again.
fn restart(rig: &mut Rig) {
    rig.state.fence();
    rig.device.forget();
    rig.after(|state, aftermath| state.release(CAUSE, Instant::now(), aftermath));
    rig.after(|state, aftermath| state.resume(Instant::now(), aftermath));
}

fn answer(rig: &mut Rig, status: Status) {
    let cid = rig.device.fetched.pop_front().unwrap().cid();
    let cqe: Cqe = rig.device.honest(cid, status);
    rig.device.post(cqe);
    rig.reap();
}

#[test]
fn an_overdue_command_is_reported_once_and_ends_with_its_completion() {
    let (mut rig, inbox) = supervised(4);
    let late = rig.start();
    rig.fetched();
    rig.expire(TIMEOUT * 2);
    rig.expire(TIMEOUT * 2);
    let troubles = inbox.take();
    // Nothing was completed for long, either.
    let [Trouble::Overdue { queue: 1, cid }, Trouble::Stalled] = troubles[..] else {
        panic!("{troubles:?}");
    };
    assert!(rig.state.is_overdue(cid) && rig.outcome(&late).is_none());
    assert_eq!(rig.state.in_flight(), 1, "it is waited for");

    answer(&mut rig, Status::ABORT_REQUESTED);
    assert!(!rig.state.is_overdue(cid));
    let (failed, memory) = failed(&mut rig, &late);
    assert!(matches!(failed.failure, Failure::TimedOut { .. }) && memory);
    assert_eq!(failed.fate, Fate::Unknown);
}

#[test]
fn an_overdue_command_that_succeeds_after_all_has_succeeded() {
    let (mut rig, _inbox) = supervised(4);
    let late = rig.start();
    rig.expire(TIMEOUT * 2);
    rig.work();
    rig.success(&late);
}

#[test]
fn a_lie_is_reported_and_nothing_is_believed_until_the_end_of_recovery() {
    let (mut rig, inbox) = supervised(8);
    rig.repeatable = true;
    let (first, second) = (rig.start(), rig.start());
    rig.fetched();
    rig.device.post(rig.device.honest(0x7777, Status::SUCCESS));
    rig.device.complete(0).unwrap();
    assert_eq!(rig.reap(), 0);
    let lie = Lie::UnknownCommand { cid: 0x7777 };
    let troubles = inbox.take();
    assert!(matches!(troubles[..], [Trouble::Lie { queue: 1, lie: told }] if told == lie));
    assert!(!rig.state.completion_ready());
    let later = rig.start();
    let rung = rig.device.submission_tail.writes().len();
    rig.state.ring_deferred();
    assert_eq!(rig.device.submission_tail.writes().len(), rung);

    restart(&mut rig);
    assert!(rig.outcome(&first).is_none(), "it is sent again");
    rig.work();
    for started in [&first, &second, &later] {
        rig.success(started);
    }
    assert_eq!(rig.state.counters.retries, 2);
}

#[test]
fn a_reset_repeats_what_may_be_repeated() {
    let (mut rig, _inbox) = supervised(8);
    let write = rig.start();
    rig.repeatable = true;
    let read = rig.start();
    let orphan = rig.start();
    rig.abandon(&orphan);
    assert_eq!(rig.fetched(), [0, 1, 2]);
    restart(&mut rig);
    let (failed, memory) = failed(&mut rig, &write);
    assert_eq!(failed, Failure::Reset(CAUSE).told(true));
    assert!(memory && !orphan.memory.is_alive());
    assert_eq!(rig.fetched(), [1]);
    rig.work();
    rig.success(&read);
}

#[test]
fn what_the_device_was_never_told_of_is_sent_whatever_it_is() {
    let (mut rig, _inbox) = supervised(8);
    let _company = rig.start();
    // Left to the reaper, which has not rung.
    let write = rig.start();
    rig.state.fence();
    let waits = rig.start();
    rig.device.fetch(usize::MAX);
    rig.device.forget();
    rig.after(|state, aftermath| state.release(CAUSE, Instant::now(), aftermath));
    assert!(rig.outcome(&write).is_none());
    rig.after(|state, aftermath| state.resume(Instant::now(), aftermath));
    assert_eq!(rig.fetched(), [1, 2], "in order");
    rig.work();
    rig.success(&write);
    rig.success(&waits);
    assert_eq!(rig.state.counters.retries, 0);
}

#[test]
fn what_was_completed_before_the_device_stopped_counts() {
    let (mut rig, _inbox) = supervised(8);
    let (done, other) = (rig.start(), rig.start());
    rig.fetched();
    rig.device.complete(0).unwrap();
    restart(&mut rig);
    rig.success(&done);
    assert!(failed(&mut rig, &other).1);
}

#[test]
fn an_overdue_command_is_not_repeated() {
    let (mut rig, _inbox) = supervised(8);
    rig.repeatable = true;
    let late = rig.start();
    rig.fetched();
    rig.expire(TIMEOUT * 2);
    restart(&mut rig);
    let (failed, memory) = failed(&mut rig, &late);
    assert!(matches!(failed.failure, Failure::TimedOut { .. }) && memory);
}

#[test]
fn resets_repeat_a_command_so_often() {
    let (mut rig, _inbox) = supervised(8);
    rig.repeatable = true;
    let read = rig.start();
    for _ in 0..RETRIES {
        assert_eq!(rig.fetched(), [0]);
        restart(&mut rig);
        assert!(rig.outcome(&read).is_none());
    }
    restart(&mut rig);
    let (failed, _) = failed(&mut rig, &read);
    assert_eq!(failed, Failure::Reset(CAUSE).told(true));
}

#[test]
fn a_status_that_lets_hope_is_tried_again_and_one_that_does_not_is_not() {
    let (mut rig, _inbox) = supervised(8);
    rig.repeatable = true;
    let read = rig.start();
    for _ in 0..RETRIES {
        assert_eq!(rig.fetched(), [0]);
        answer(&mut rig, Status::INTERNAL_ERROR);
        assert!(rig.outcome(&read).is_none());
    }
    assert_eq!(rig.fetched(), [0]);
    answer(&mut rig, Status::INTERNAL_ERROR);
    let cqe = rig.outcome(&read).unwrap().0.unwrap();
    assert!(cqe.status().is(Status::INTERNAL_ERROR));

    for (repeatable, status) in [
        (true, Status::INTERNAL_ERROR.with_dnr(true)),
        (false, Status::INTERNAL_ERROR),
        (true, Status::COMPARE_FAILURE),
    ] {
        rig.repeatable = repeatable;
        let once = rig.start();
        rig.fetched();
        answer(&mut rig, status);
        assert!(rig.outcome(&once).unwrap().0.unwrap().status().is(status));
    }
}

#[test]
fn a_retry_waits_for_as_long_as_the_controller_asks() {
    let (mut rig, _inbox) = supervised(8);
    rig.repeatable = true;
    let read = rig.start();
    rig.fetched();
    answer(&mut rig, Status::INTERNAL_ERROR.with_crd(2));
    assert!(rig.fetched().is_empty() && rig.state.is_watched());
    let now = Instant::now();
    let check = rig.state.next_check(now, 20).unwrap();
    assert!(check <= now + Duration::from_secs(2));
    rig.expire(Duration::from_secs(1));
    assert!(rig.fetched().is_empty());
    let drain = rig.state.begin_drain();
    assert_eq!(rig.state.poll_drain(drain, &mut None), None);
    rig.expire(Duration::from_secs(2));
    assert_eq!(rig.fetched(), [0]);
    rig.work();
    rig.success(&read);
    assert_eq!(rig.state.poll_drain(drain, &mut None), Some(Ok(())));
    rig.state.end_drain(drain);

    // Dropped meanwhile, it is not sent.
    let read = rig.start();
    rig.fetched();
    answer(&mut rig, Status::INTERNAL_ERROR.with_crd(1));
    rig.abandon(&read);
    assert!(!read.memory.is_alive());
    rig.expire(Duration::from_secs(5));
    assert!(rig.fetched().is_empty() && !rig.state.is_watched());
}

#[test]
fn a_retry_that_would_come_too_late_is_none() {
    let (mut rig, _inbox) = supervised(8);
    rig.repeatable = true;
    rig.timeout = Duration::from_millis(500);
    let read = rig.start();
    rig.fetched();
    answer(&mut rig, Status::INTERNAL_ERROR.with_crd(1));
    let cqe = rig.outcome(&read).unwrap().0.unwrap();
    assert!(cqe.status().is(Status::INTERNAL_ERROR));
}

#[test]
fn an_end_with_the_device_stopped_gives_all_memory_back() {
    let (mut rig, _inbox) = supervised(3);
    let submitted = [rig.start(), rig.start()];
    rig.abandon(&submitted[1]);
    let queued = rig.start();
    rig.fetched();
    rig.after(|state, aftermath| state.fail(Failure::Removed, true, aftermath));
    let (error, memory) = failed(&mut rig, &submitted[0]);
    assert_eq!((error, memory), (Failure::Removed.told(true), true));
    assert!(!submitted[1].memory.is_alive());
    let (error, memory) = failed(&mut rig, &queued);
    assert_eq!((error, memory), (Failure::Removed.told(false), true));
    let rung = rig.device.submission_tail.writes().len();
    rig.state.ring_deferred();
    assert_eq!(rig.device.submission_tail.writes().len(), rung);
}

#[test]
fn a_stall_is_reported_once_a_second() {
    let (mut rig, inbox) = supervised(8);
    rig.expire(Duration::from_secs(9));
    rig.start();
    rig.expire(Duration::from_millis(900));
    assert!(inbox.take().is_empty());
    for seconds in [2, 2, 3] {
        rig.expire(Duration::from_secs(seconds));
    }
    let stalls = inbox.take();
    assert!(matches!(stalls[..], [Trouble::Stalled, Trouble::Stalled]));
}

#[test]
fn the_deletion_of_its_queue_is_no_answer_to_a_command() {
    let deleted = Status::ABORTED_SQ_DELETION;
    let (mut rig, _inbox) = supervised(8);
    let late = rig.start();
    rig.fetched();
    rig.expire(TIMEOUT * 2);
    let write = rig.start();
    rig.repeatable = true;
    let read = rig.start();
    assert_eq!(rig.fetched().len(), 3);
    rig.state.fence();
    for _ in 0..3 {
        answer(&mut rig, deleted);
    }
    let (late, memory) = failed(&mut rig, &late);
    assert!(matches!(late.failure, Failure::TimedOut { .. }) && memory);
    let (write, memory) = failed(&mut rig, &write);
    assert!(matches!(write.failure, Failure::Reset(ResetCause::Overdue)) && memory);
    assert_eq!(write.fate, Fate::Unknown);
    assert!(rig.outcome(&read).is_none(), "it is sent again");
    restart(&mut rig);
    rig.work();
    rig.success(&read);

    // Unasked, it is an error as any other.
    let read = rig.start();
    rig.fetched();
    answer(&mut rig, deleted.with_dnr(true));
    assert!(rig.outcome(&read).unwrap().0.unwrap().status().is(deleted));

    rig.repeatable = false;
    let write = rig.start();
    rig.fetched();
    rig.state.set_refusing(true);
    answer(&mut rig, deleted);
    let (write, memory) = failed(&mut rig, &write);
    assert!(matches!(write.failure, Failure::Closed) && memory);
    assert_eq!(write.fate, Fate::Unknown);
}
