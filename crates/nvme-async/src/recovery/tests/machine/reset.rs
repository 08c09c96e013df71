//! Resets, and the end.

use nvme_spec::feature::NumberOfQueues;
use nvme_spec::{Cqe, Status};

use super::{
    DISABLED, FATAL, GONE, LIVE, READ_READY, READY, RECOVERING, Rig, STEP, only_step, steps,
};
use crate::device::Notice;
use crate::queue::Lie;
use crate::recovery::action::{Action, AdminStep, End, Place, Scope};
use crate::recovery::{ControllerState, ResetCause};

const LIE: Lie = Lie::UnknownCommand { cid: 7 };

fn begin_of_reset(cause: ResetCause) -> [Action; 4] {
    [
        Action::Fence(Scope::All),
        Action::Announce(ControllerState::Recovering { cause }),
        Action::Disable,
        Action::ReadStatus,
    ]
}

#[test]
fn lies_and_notices_cost_a_reset() {
    let mut rig = Rig::new();
    let actions = rig.tell(|machine, now| machine.lie(now, 1, LIE));
    assert_eq!(actions, begin_of_reset(ResetCause::Protocol(LIE)));
    // One is enough.
    assert_eq!(rig.tell(|machine, now| machine.lie(now, 2, LIE)), []);
    let failed = |machine: &mut crate::recovery::machine::Recovery, now| {
        machine.notice(now, Notice::Failed);
    };
    assert_eq!(rig.tell(failed), []);
    let mut rig = Rig::new();
    assert_eq!(rig.tell(failed), begin_of_reset(ResetCause::Reported));
    let (mut rig, _) = Rig::deleting();
    assert_eq!(rig.tell(failed), begin_of_reset(ResetCause::Reported));
    let (mut rig, _) = Rig::deleting();
    let actions = rig.tell(|machine, now| machine.lie(now, 2, LIE));
    assert_eq!(actions, begin_of_reset(ResetCause::Protocol(LIE)));
}

#[test]
fn a_whole_reset() {
    let mut rig = Rig::disabling();
    let cause = ResetCause::Fatal { csts: 0b11 };
    let expected = [
        Action::Release(Scope::All, cause),
        Action::Enable,
        Action::ReadStatus,
    ];
    assert_eq!(rig.status(DISABLED), expected);
    assert_eq!(rig.place(), Place::Enabling);
    let step = AdminStep::Identify;
    let expected = [
        Action::Resume(Scope::Queue(0)),
        Action::Admin { id: 1, step },
    ];
    assert_eq!(rig.status(READ_READY), expected);
    assert_eq!(rig.place(), Place::SettingUp);
    let done = [Action::Resume(Scope::Io), Action::Rearm, LIVE];
    assert_eq!(rig.set_up(1), done);
    assert_eq!((rig.place(), rig.next_tick()), (Place::Live, None));
}

#[test]
fn what_is_set_up() {
    let mut rig = Rig::with(|settings| {
        settings.host_behavior = true;
        settings.coalescing = true;
        settings.doorbell_buffers = true;
    });
    rig.machine.stalled();
    rig.status(FATAL);
    rig.status(DISABLED);
    let mut actions = rig.status(READ_READY);
    let mut seen = Vec::new();
    while let [(id, step)] = *steps(&actions) {
        seen.push(step);
        let granted = NumberOfQueues::pairs(2).into_bits();
        let granted = Cqe::new(0, Status::SUCCESS).with_result(granted);
        actions = rig.answer(id, Some(granted));
    }
    let expected = [
        AdminStep::Identify,
        AdminStep::HostBehavior,
        AdminStep::Coalescing,
        AdminStep::QueueCount,
        AdminStep::DoorbellBuffers,
        AdminStep::CreateCompletionQueue(1),
        AdminStep::CreateSubmissionQueue(1),
        AdminStep::CreateCompletionQueue(2),
        AdminStep::CreateSubmissionQueue(2),
        AdminStep::Events,
    ];
    assert_eq!(seen, expected);
    assert_eq!(rig.place(), Place::Live);
}

#[test]
fn the_status_is_read_less_and_less_often() {
    let mut rig = Rig::disabling();
    // 0.1 ms after the first look, then twice as long, up to 10 ms.
    let mut expected = 0.1;
    for pause in [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0] {
        let next = rig.next_tick().unwrap();
        assert!((next - expected).abs() < 1e-6, "{next} {expected}");
        let at = rig.machine.next_tick().unwrap();
        rig.machine.tick(at);
        assert_eq!(rig.actions(), [Action::ReadStatus]);
        // Too early for another one.
        rig.machine.tick(at);
        assert_eq!(rig.actions(), []);
        expected += pause;
    }
}

#[test]
fn a_controller_that_stays_enabled_is_reset_by_its_function() {
    let mut rig = Rig::disabling();
    rig.now = READY - 1;
    assert_eq!(rig.status(READ_READY), []);
    rig.now = READY;
    assert_eq!(rig.status(READ_READY), [Action::ResetFunction]);
    assert_eq!(
        (rig.place(), rig.next_tick()),
        (Place::ResettingFunction, None)
    );
    let actions = rig.tell(|machine, now| machine.function_reset(now, true));
    let cause = ResetCause::Fatal { csts: 0b11 };
    assert_eq!(actions[0], Action::Release(Scope::All, cause));
    assert_eq!(rig.place(), Place::Enabling);
}

#[test]
fn without_a_way_to_reset_it_ends() {
    let mut rig = Rig::disabling();
    rig.now = READY;
    rig.status(READ_READY);
    let actions = rig.tell(|machine, now| machine.function_reset(now, false));
    // With the status that was read last.
    assert_eq!(actions, [Action::End(End::Failed { csts: 0b01 })]);
    assert_eq!(rig.place(), Place::Ended);
    let late = rig.tell(|machine, now| machine.function_reset(now, true));
    assert_eq!(late, []);
}

#[test]
fn three_attempts_are_enough() {
    // Each way in which an attempt can fail.
    for fatal in [false, true] {
        let mut rig = Rig::enabling();
        let fail = |rig: &mut Rig| {
            if fatal {
                rig.status(FATAL)
            } else {
                rig.now += READY;
                rig.status(DISABLED)
            }
        };
        let again = [
            Action::Fence(Scope::All),
            Action::Disable,
            Action::ReadStatus,
        ];
        assert_eq!(fail(&mut rig), again);
        assert_eq!(rig.place(), Place::Disabling);
        rig.status(DISABLED);
        let by_function = [Action::Fence(Scope::All), Action::ResetFunction];
        assert_eq!(fail(&mut rig), by_function);
        rig.tell(|machine, now| machine.function_reset(now, true));
        assert_eq!(rig.place(), Place::Enabling);
        let csts = if fatal { 0b11 } else { 0 };
        assert_eq!(fail(&mut rig), [Action::End(End::Failed { csts })]);
    }
}

#[test]
fn every_step_of_setting_up_may_fail_or_stay_unanswered() {
    // Identify, the count of queues, two queue pairs; the events may fail.
    for failing in 0..6 {
        for unanswered in [false, true] {
            let (mut rig, mut id) = Rig::setting_up();
            for done in 0..failing {
                let granted = NumberOfQueues::pairs(2).into_bits();
                let result = if done == 1 { granted } else { 0 };
                let cqe = Cqe::new(0, Status::SUCCESS).with_result(result);
                rig.now += 10;
                id = only_step(&rig.answer(id, Some(cqe)));
            }
            let actions = if unanswered {
                let until = rig.now + STEP;
                assert_eq!(rig.next_tick(), Some(until as f64));
                assert_eq!(rig.tick_at(until - 1), []);
                rig.tick_at(until)
            } else {
                rig.failure(id)
            };
            assert_eq!(actions[..2], [Action::Fence(Scope::All), Action::Disable]);
            assert_eq!(rig.place(), Place::Disabling);
            // An answer that comes after all is nobody's.
            assert_eq!(rig.success(id), []);
        }
    }
}

#[test]
fn fewer_queues_than_before_are_not_enough() {
    let (mut rig, identify) = Rig::setting_up();
    let count = only_step(&rig.success(identify));
    let granted = Cqe::new(0, Status::SUCCESS).with_result(NumberOfQueues::pairs(1).into_bits());
    rig.answer(count, Some(granted));
    assert_eq!(rig.place(), Place::Disabling);
}

#[test]
fn events_and_retry_delays_are_not_missed() {
    let mut rig = Rig::with(|settings| settings.host_behavior = true);
    rig.machine.stalled();
    rig.status(FATAL);
    rig.status(DISABLED);
    let identify = only_step(&rig.status(READ_READY));
    let behavior = only_step(&rig.success(identify));
    let count = only_step(&rig.failure(behavior));
    let granted = NumberOfQueues::pairs(2).into_bits();
    let granted = Cqe::new(0, Status::SUCCESS).with_result(granted);
    let mut id = only_step(&rig.answer(count, Some(granted)));
    for _ in 0..4 {
        id = only_step(&rig.success(id));
    }
    rig.failure(id);
    assert_eq!(rig.place(), Place::Live);
}

#[test]
fn a_lie_on_the_admin_queue_ends_an_attempt() {
    let (mut rig, _) = Rig::setting_up();
    assert_eq!(rig.tell(|machine, now| machine.lie(now, 1, LIE)), []);
    let actions = rig.tell(|machine, now| machine.lie(now, 0, LIE));
    assert_eq!(actions[..2], [Action::Fence(Scope::All), Action::Disable]);
}

#[test]
fn what_is_overdue_at_the_end_of_a_reset_is_looked_after() {
    let (mut rig, identify) = Rig::setting_up();
    assert_eq!(rig.overdue(0, 0x11), []);
    let done = rig.set_up(identify);
    assert_eq!(done.last(), Some(&Action::ReadStatus));
    assert_eq!(rig.place(), Place::Aborting);
    assert_eq!(steps(&rig.status(READ_READY)).len(), 1);
}

#[test]
fn nothing_is_aborted_during_a_reset() {
    let mut rig = Rig::disabling();
    rig.overdue(1, 0x11);
    rig.overdue(2, 0x22);
    // One of them is completed after all.
    let actions = rig.tell(|machine, now| machine.settle(now, |queue, _| queue == 1));
    assert_eq!((actions, rig.place()), (vec![], Place::Disabling));
}

#[test]
fn too_many_resets_within_the_window_are_the_end() {
    let reset = |rig: &mut Rig| {
        let begun = rig.tell(|machine, now| machine.lie(now, 1, LIE));
        if rig.place() == Place::Disabling {
            rig.status(DISABLED);
            let identify = only_step(&rig.status(READ_READY));
            rig.set_up(identify);
            assert_eq!(rig.place(), Place::Live);
        }
        begun
    };
    let mut rig = Rig::new();
    reset(&mut rig);
    rig.now = 4000;
    reset(&mut rig);
    // The first one is just not in the window any more.
    rig.now = 10_001;
    reset(&mut rig);
    assert_eq!(rig.place(), Place::Live);
    // The second one still is.
    rig.now = 14_000;
    let csts = 0b01;
    assert_eq!(reset(&mut rig), [Action::End(End::Failed { csts })]);
    assert_eq!(rig.place(), Place::Ended);
}

#[test]
fn a_controller_that_is_gone_ends_whatever_goes_on() {
    let (deleting, _) = Rig::deleting();
    let others = [Rig::new(), Rig::disabling(), Rig::enabling(), deleting];
    for mut rig in others {
        assert_eq!(rig.status(GONE), [Action::End(End::Removed)]);
        assert_eq!(rig.place(), Place::Ended);
        // And nothing follows.
        assert_eq!(rig.status(GONE), []);
        assert_eq!(rig.overdue(1, 1), []);
        assert_eq!(rig.tell(|machine, now| machine.lie(now, 1, LIE)), []);
        let release = Notice::ReleaseRequested;
        let noticed = rig.tell(|machine, now| machine.notice(now, release));
        assert_eq!(noticed, []);
        assert_eq!((rig.tick_at(100_000), rig.next_tick()), (vec![], None));
    }
}

#[test]
fn a_device_that_is_asked_for_is_given_back() {
    let ask = |rig: &mut Rig| {
        let release = Notice::ReleaseRequested;
        rig.tell(|machine, now| machine.notice(now, release))
    };
    let expected = [
        Action::Fence(Scope::All),
        Action::Disable,
        Action::ReadStatus,
    ];
    let (deleting, _) = Rig::deleting();
    let (setting_up, _) = Rig::setting_up();
    let all = [
        Rig::new(),
        deleting,
        Rig::disabling(),
        Rig::enabling(),
        setting_up,
    ];
    for mut rig in all {
        assert_eq!(ask(&mut rig), expected);
        assert_eq!(rig.place(), Place::Releasing);
        // Asking twice changes nothing, and nothing else matters any more.
        assert_eq!(ask(&mut rig), []);
        assert_eq!(rig.overdue(1, 1), []);
        assert_eq!(rig.tell(|machine, now| machine.lie(now, 1, LIE)), []);
        assert_eq!(rig.status(READ_READY), []);
        assert_eq!(rig.status(DISABLED), [Action::End(End::Removed)]);
    }
    // It has so long to become disabled.
    let mut rig = Rig::new();
    ask(&mut rig);
    rig.now = READY - 1;
    assert_eq!(rig.status(READ_READY), []);
    rig.now = READY;
    assert_eq!(rig.status(READ_READY), [Action::End(End::Removed)]);
    // And no longer than a second.
    let mut rig = Rig::with(|settings| settings.ready_timeout *= 100);
    ask(&mut rig);
    rig.now = 999;
    assert_eq!(rig.status(READ_READY), []);
    rig.now = 1000;
    assert_eq!(rig.status(READ_READY), [Action::End(End::Removed)]);
}

#[test]
fn a_reset_forgets_victims() {
    let mut rig = Rig::new();
    rig.overdue(1, 0x11);
    let abort = only_step(&rig.status(READ_READY));
    let lie = ResetCause::Protocol(LIE);
    assert_eq!(
        rig.tell(|machine, now| machine.lie(now, 1, LIE)),
        begin_of_reset(lie)
    );
    assert_ne!(begin_of_reset(lie)[1], RECOVERING);
    rig.status(DISABLED);
    // The answer to an Abort command from before says nothing.
    assert_eq!(rig.success(abort), []);
    let identify = only_step(&rig.status(READ_READY));
    rig.set_up(identify);
    assert_eq!(rig.place(), Place::Live);
}
