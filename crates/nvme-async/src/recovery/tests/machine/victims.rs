//! Overdue commands: Abort, and the queue pair's end.

use nvme_spec::{Cqe, Status};

use super::{ABORT, FATAL, GONE, GRACE, LIVE, READ_READY, RECOVERING, Rig, STEP, only_step, steps};
use crate::recovery::ResetCause;
use crate::recovery::action::{Action, AdminStep, End, Place, Scope};

fn abort(queue: u16, cid: u16) -> AdminStep {
    AdminStep::Abort { queue, cid }
}

#[test]
fn the_status_is_read_before_anything_is_aborted() {
    let mut rig = Rig::new();
    assert_eq!((rig.place(), rig.next_tick()), (Place::Live, None));
    assert_eq!(rig.overdue(1, 0x11), [Action::ReadStatus]);
    // Once for all of them.
    assert_eq!(rig.overdue(2, 0x22), []);
    assert_eq!((rig.place(), rig.next_tick()), (Place::Aborting, None));
    let aborts = rig.status(READ_READY);
    let aborts = steps(&aborts);
    assert_eq!(aborts, [(1, abort(1, 0x11)), (2, abort(2, 0x22))]);
    assert_eq!(rig.next_tick(), Some(ABORT as f64));
}

#[test]
fn no_more_are_aborted_at_a_time_than_the_controller_allows() {
    let mut rig = Rig::new();
    for cid in 1..=4 {
        rig.overdue(1, cid);
    }
    assert_eq!(steps(&rig.status(READ_READY)).len(), 2);
    let third = rig.success(1);
    assert_eq!(steps(&third), [(3, abort(1, 3))]);
    // Whether the command is gone says nothing of its Abort command.
    rig.tell(|machine, now| machine.settle(now, |_, cid| cid == 1));
    assert_eq!(rig.place(), Place::Aborting);
    assert_eq!(rig.actions(), []);
}

#[test]
fn commands_that_end_are_forgotten() {
    let mut rig = Rig::new();
    rig.overdue(1, 0x11);
    let id = only_step(&rig.status(READ_READY));
    rig.tell(|machine, now| machine.settle(now, |_, _| false));
    assert_eq!(rig.place(), Place::Aborting, "its Abort command is out");
    rig.success(id);
    rig.tell(|machine, now| machine.settle(now, |_, _| true));
    assert_eq!(rig.place(), Place::Aborting, "it is outstanding");
    rig.tell(|machine, now| machine.settle(now, |_, _| false));
    assert_eq!((rig.place(), rig.next_tick()), (Place::Live, None));
    assert_eq!(rig.tick_at(10_000), []);
}

#[test]
fn a_command_that_survives_its_abort_costs_the_queue_pair() {
    let mut rig = Rig::new();
    rig.overdue(1, 0x11);
    let id = only_step(&rig.status(READ_READY));
    rig.now = 7;
    // Whatever the answer is.
    rig.failure(id);
    assert_eq!(rig.next_tick(), Some((7 + GRACE) as f64));
    assert_eq!(rig.tick_at(7 + GRACE - 1), []);
    let step = AdminStep::DeleteSubmissionQueue(1);
    let expected = [
        Action::Fence(Scope::Queue(1)),
        RECOVERING,
        Action::Admin { id: 2, step },
    ];
    assert_eq!(rig.tick_at(7 + GRACE), expected);
    assert_eq!(rig.place(), Place::Deleting);
    // The command's own time has passed, and is no reason to look again at once.
    assert_eq!(rig.next_tick(), Some((7 + GRACE + STEP) as f64));
}

#[test]
fn an_abort_that_is_not_answered_costs_a_reset() {
    let mut rig = Rig::new();
    rig.overdue(1, 0x11);
    rig.status(READ_READY);
    assert_eq!(rig.tick_at(ABORT - 1), []);
    let reset = rig.tick_at(ABORT);
    assert_eq!(reset[..2], [Action::Fence(Scope::All), RECOVERING]);
    assert_eq!(rig.place(), Place::Disabling);
}

#[test]
fn an_abort_that_finds_no_place_costs_a_reset() {
    let mut rig = Rig::new();
    rig.overdue(1, 0x11);
    let id = only_step(&rig.status(READ_READY));
    assert_eq!(rig.answer(id, None)[1], RECOVERING);
    assert_eq!(rig.place(), Place::Disabling);
}

#[test]
fn too_many_aborts_are_tried_again_three_times() {
    let mut rig = Rig::new();
    rig.overdue(1, 0x11);
    let mut id = only_step(&rig.status(READ_READY));
    let limited = Some(Cqe::new(0, Status::ABORT_LIMIT_EXCEEDED));
    for _ in 0..3 {
        let again = rig.answer(id, limited);
        let expected = Action::Admin {
            id: id + 1,
            step: abort(1, 0x11),
        };
        assert_eq!(again, [expected]);
        id += 1;
    }
    assert_eq!(rig.answer(id, limited), []);
    assert_eq!(rig.next_tick(), Some(GRACE as f64));
}

#[test]
fn an_admin_command_that_survives_costs_a_reset() {
    let mut rig = Rig::new();
    rig.overdue(0, 0x11);
    let id = only_step(&rig.status(READ_READY));
    rig.success(id);
    assert_eq!(rig.tick_at(GRACE)[1], RECOVERING);
    assert_eq!(rig.place(), Place::Disabling);
}

#[test]
fn what_the_status_says_comes_first() {
    let mut rig = Rig::new();
    rig.overdue(1, 0x11);
    let fatal = ResetCause::Fatal { csts: 0b11 };
    assert!(announces(&rig.status(FATAL), fatal));
    let mut rig = Rig::new();
    rig.overdue(1, 0x11);
    assert!(announces(&rig.status(Some(0)), ResetCause::StateLost));
    let mut rig = Rig::new();
    rig.overdue(1, 0x11);
    assert_eq!(rig.status(GONE), [Action::End(End::Removed)]);
    assert_eq!((rig.place(), rig.next_tick()), (Place::Ended, None));
}

fn announces(actions: &[Action], cause: ResetCause) -> bool {
    let state = crate::recovery::ControllerState::Recovering { cause };
    actions.get(1) == Some(&Action::Announce(state))
}

#[test]
fn a_queue_that_stalls_is_a_reason_to_look() {
    let mut rig = Rig::new();
    assert_eq!(
        rig.tell(|machine, _| machine.stalled()),
        [Action::ReadStatus]
    );
    assert_eq!(rig.status(READ_READY), []);
    assert_eq!(rig.place(), Place::Live);
}

#[test]
fn a_queue_pair_is_deleted_and_created() {
    let (mut rig, id) = Rig::deleting();
    let next = |id, step| Action::Admin { id, step };
    let cause = ResetCause::Overdue;
    assert_eq!(
        rig.success(id),
        [next(3, AdminStep::DeleteCompletionQueue(1))]
    );
    assert_eq!(rig.place(), Place::Deleting);
    let expected = [
        Action::Release(Scope::Queue(1), cause),
        next(4, AdminStep::CreateCompletionQueue(1)),
    ];
    assert_eq!(rig.success(3), expected);
    assert_eq!(rig.place(), Place::Creating);
    assert_eq!(
        rig.success(4),
        [next(5, AdminStep::CreateSubmissionQueue(1))]
    );
    assert_eq!(rig.success(5), [Action::Resume(Scope::Queue(1)), LIVE]);
    assert_eq!((rig.place(), rig.next_tick()), (Place::Live, None));
}

#[test]
fn every_step_of_that_may_fail_or_stay_unanswered() {
    for failing in 0..4 {
        for unanswered in [false, true] {
            let (mut rig, mut id) = Rig::deleting();
            for _ in 0..failing {
                rig.now += 10;
                id = only_step(&rig.success(id));
            }
            let actions = if unanswered {
                let until = rig.now + STEP;
                assert_eq!(rig.tick_at(until - 1), []);
                rig.tick_at(until)
            } else {
                rig.failure(id)
            };
            assert_eq!(actions[1], RECOVERING);
            assert_eq!(rig.place(), Place::Disabling);
        }
    }
}

#[test]
fn victims_of_other_queues_come_next() {
    let (mut rig, id) = Rig::deleting();
    assert_eq!(rig.overdue(2, 0x22), [Action::ReadStatus]);
    // They are aborted meanwhile.
    let abort_of_other = only_step(&rig.status(READ_READY));
    let mut id = only_step(&rig.success(id));
    for _ in 0..2 {
        id = only_step(&rig.success(id));
    }
    rig.success(abort_of_other);
    rig.success(id);
    assert_eq!(rig.place(), Place::Aborting);
    let deletes = rig.tick_at(rig.now + GRACE);
    let step = AdminStep::DeleteSubmissionQueue(2);
    assert_eq!(steps(&deletes)[0].1, step);
}

#[test]
fn an_abort_that_is_out_survives_its_queue_pair() {
    let mut rig = Rig::new();
    rig.overdue(1, 0x11);
    rig.overdue(1, 0x12);
    let [(first, _), (second, _)] = *steps(&rig.status(READ_READY)) else {
        panic!("both are aborted");
    };
    rig.success(first);
    let mut id = only_step(&rig.tick_at(GRACE));
    for _ in 0..3 {
        id = only_step(&rig.success(id));
    }
    rig.success(id);
    // Both commands went with the queue pair, one Abort command did not.
    assert_eq!(rig.place(), Place::Aborting);
    rig.tell(|machine, now| machine.settle(now, |_, _| false));
    assert_eq!(rig.next_tick(), Some(ABORT as f64));
    rig.success(second);
    rig.tell(|machine, now| machine.settle(now, |_, _| false));
    assert_eq!(rig.place(), Place::Live);
}
