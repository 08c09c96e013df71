//! Who drives the queue, and when it is woken.

use std::sync::Arc;
use std::time::{Duration, Instant};

use poll_window::{Costs, Kind, Situation};

use super::rig::{MAX_WINDOW, Rig, TIMEOUT, Wakes};
use crate::device::{Doorbell, VectorMask};
use crate::engine::PollMode;
use crate::engine::state::{Here, Look, Place, Refusal};
use crate::engine::window::{Wait, Window};
use crate::queue::tests::device::Register;
use crate::recovery::ResetCause;

const HOUR: Duration = Duration::from_secs(3600);

/// How often the reaper is woken by one more command, when it sleeps until `next_look` with
/// `in_flight` commands outstanding that the device knows of.
fn wakes(mode: PollMode, in_flight: usize, next_look: Option<Duration>, slow: bool) -> usize {
    let mut rig = Rig::new(64, mode);
    if slow {
        rig.state.window = slow_window();
    }
    for _ in 0..in_flight {
        rig.start();
    }
    rig.state.ring_deferred();
    rig.sleep(next_look.map(|after| Instant::now() + after));
    rig.start();
    rig.reaper.count()
}

/// Of a device that is far slower than the window, so that polling for it does not pay.
fn slow_window() -> Window {
    let mut window = Window::new(Costs::default(), Duration::from_micros(50));
    let now = Instant::now();
    for outstanding in 1..64 {
        let situation = Situation::new(outstanding, Kind::Read);
        for _ in 0..200 {
            let mut awake = now;
            while window.wait(situation, now, awake) == Wait::Poll {
                awake += Duration::from_micros(10);
            }
            let later = now + Duration::from_secs(1);
            window.completed(Look::Interrupted, 1, now, later);
        }
    }
    window
}

#[test]
fn it_is_woken_to_poll() {
    assert_eq!(wakes(PollMode::Adaptive, 0, None, false), 1);
    assert_eq!(wakes(PollMode::Adaptive, 0, Some(Duration::ZERO), false), 1);
    assert_eq!(wakes(PollMode::Busy, 0, None, false), 1);
    assert_eq!(wakes(PollMode::Busy, 0, Some(Duration::ZERO), true), 1);
}

#[test]
fn it_is_woken_to_look_in_time() {
    for mode in [PollMode::Interrupt, PollMode::Adaptive] {
        assert_eq!(
            wakes(mode, 0, None, true),
            1,
            "or a lost interrupt is never noticed"
        );
        assert_eq!(
            wakes(mode, 0, Some(HOUR), true),
            1,
            "or the deadline passes unnoticed"
        );
        assert_eq!(wakes(mode, 0, Some(Duration::from_millis(10)), true), 0);
    }
}

#[test]
fn it_is_woken_to_ring_the_doorbell() {
    let soon = Some(Duration::from_millis(10));
    for mode in [PollMode::Interrupt, PollMode::Adaptive, PollMode::Busy] {
        assert_eq!(wakes(mode, 1, soon, true), 1);
        assert_eq!(wakes(mode, 3, soon, true), 1);
    }
}

/// At any moment either the doorbell was rung for every command, or somebody awake will.
#[test]
fn no_command_is_left_without_a_doorbell() {
    for mode in [PollMode::Interrupt, PollMode::Adaptive, PollMode::Busy] {
        let mut rig = Rig::new(64, mode);
        rig.sleep(Some(Instant::now()));
        for started in 1..40 {
            rig.start();
            let awake = matches!(rig.state.seats[0].place, Place::Awake);
            let known = rig.device.submission_tail.writes().last().copied() == Some(started);
            assert!(known || awake);
            if started % 5 == 0 {
                rig.state.ring_deferred();
                rig.sleep(Some(Instant::now()));
            }
        }
    }
}

#[test]
fn it_is_woken_once() {
    let mut rig = Rig::new(64, PollMode::Busy);
    rig.sleep(None);
    for _ in 0..5 {
        rig.start();
    }
    assert_eq!(rig.reaper.count(), 1);
    assert!(matches!(rig.state.seats[0].place, Place::Awake));
}

#[test]
fn nothing_starts_without_a_reaper() {
    let mut rig = Rig::new(8, PollMode::Adaptive);
    rig.after(|state, aftermath| state.dismiss_reapers(aftermath));
    assert_eq!(rig.try_start().err(), Some(Refusal::NoReaper));
    assert_eq!(rig.state.in_flight(), 0);
    assert!(rig.state.claim_reaper(Here::now()).is_some());
    rig.start();
}

#[test]
fn one_reaper_at_a_time() {
    let mut rig = Rig::new(8, PollMode::Adaptive);
    assert_eq!(rig.state.claim_reaper(Here::now()), None);
    rig.sleep(None);
    assert_eq!(rig.state.claim_reaper(Here::now()), None);

    rig.after(|state, aftermath| state.dismiss_reapers(aftermath));
    assert_eq!(rig.reaper.count(), 1, "woken, so that it notices");
    let first = rig.state.claim_reaper(Here::now()).unwrap();
    assert!(rig.state.is_seated(first));
    rig.after(|state, aftermath| state.dismiss_reapers(aftermath));
    assert!(!rig.state.is_seated(first));
    let second = rig.state.claim_reaper(Here::now()).unwrap();
    assert!(!rig.state.is_seated(first) && rig.state.is_seated(second));

    let started = rig.start();
    rig.after(|state, aftermath| state.vacate(first, aftermath));
    assert!(
        rig.state.is_seated(second),
        "one that was dismissed takes nobody's seat"
    );
    assert_eq!(started.wakes.count(), 0);
    rig.after(|state, aftermath| state.vacate(second, aftermath));
    assert!(!rig.state.has_reaper(Here::now()));
}

#[test]
fn all_who_wait_are_woken_when_it_leaves() {
    let mut rig = Rig::new(3, PollMode::Adaptive);
    let started: Vec<_> = (0..3).map(|_| rig.start()).collect();
    let drain = rig.state.begin_drain();
    let (drain_wakes, waker) = Wakes::new();
    assert_eq!(rig.state.poll_drain(drain, &mut Some(waker)), None);
    rig.fetched();
    rig.device.complete(0).unwrap();
    rig.reap();
    assert_eq!(started[0].wakes.count(), 1);

    rig.after(|state, aftermath| state.dismiss_reapers(aftermath));
    let term = rig.state.claim_reaper(Here::now()).unwrap();
    rig.sleep(None);
    rig.after(|state, aftermath| state.vacate(term, aftermath));
    let counts: Vec<_> = started
        .iter()
        .map(|started| started.wakes.count())
        .collect();
    assert_eq!(counts, [1, 1, 1]);
    assert_eq!(drain_wakes.count(), 1);

    // The next reaper's completions wake whoever was polled since.
    rig.state.claim_reaper(Here::now()).unwrap();
    let (wakes, waker) = Wakes::new();
    assert!(!rig.state.will_wake(started[1].key, &waker, &mut None));
    assert!(
        rig.state
            .will_wake(started[1].key, &waker, &mut Some(waker.clone()))
    );
    assert!(rig.state.will_wake(started[1].key, &waker, &mut None));
    rig.work();
    assert_eq!((wakes.count(), started[1].wakes.count()), (1, 1));
}

#[test]
fn the_next_check() {
    let mut rig = Rig::new(8, PollMode::Interrupt);
    let now = Instant::now();
    assert_eq!(rig.state.next_check(now, 0), None, "nothing is in flight");
    rig.start();
    let after = |rig: &Rig, checks| rig.state.next_check(now, checks).unwrap() - now;
    let milliseconds: Vec<_> = (0..8)
        .map(|checks| after(&rig, checks).as_millis())
        .collect();
    assert_eq!(milliseconds, [10, 20, 40, 80, 160, 320, 500, 500]);
    assert_eq!(after(&rig, u32::MAX).as_millis(), 500);

    // Not later than the deadline.
    let late = now + TIMEOUT - Duration::from_millis(1);
    let check = rig.state.next_check(late, 8).unwrap();
    assert!(check >= now + TIMEOUT && check < late + Duration::from_millis(500));

    rig.expire(TIMEOUT * 2);
    assert_eq!(rig.state.in_flight(), 0);
    assert!(
        rig.state.next_check(now, 0).is_some(),
        "its memory is to be freed some time"
    );
    rig.work();
    assert_eq!(rig.state.next_check(now, 0), None);

    rig.start();
    rig.fail();
    assert_eq!(rig.state.next_check(now, 0), None);
}

#[test]
fn the_window_opens_with_work_and_closes_with_time() {
    let mut rig = Rig::new(8, PollMode::Adaptive);
    let now = Instant::now();
    rig.start();
    assert_eq!(rig.state.wait(now), Wait::Poll);
    assert_eq!(rig.state.wait(now + Duration::from_secs(1)), Wait::Sleep);
    rig.work();
    assert_eq!(rig.state.wait(now), Wait::Sleep, "nothing is outstanding");
}

#[test]
fn the_interrupt_is_masked_while_the_queue_is_polled() {
    let control = Register::default();
    let mut rig = Rig::new(8, PollMode::Adaptive);
    rig.state.mask_by(VectorMask::new(Doorbell::Call {
        target: Arc::new(control.clone()),
        offset: 0,
    }));
    let now = Instant::now();
    rig.start();
    assert_eq!(rig.state.wait(now), Wait::Poll);
    assert_eq!(rig.state.wait(now), Wait::Poll);
    assert_eq!(control.writes(), [1], "once");
    assert!(!rig.state.has_interrupt());
    rig.work();
    assert_eq!(rig.state.wait(now), Wait::Sleep);
    assert_eq!(control.writes(), [1], "there is nothing to be told of");

    // So whoever sleeps is woken by a submission, even if polling does not pay.
    rig.state.window = slow_window();
    rig.sleep(Some(now + HOUR));
    rig.start();
    assert_eq!(rig.reaper.count(), 1);
    assert_eq!(rig.state.wait(Instant::now()), Wait::Sleep);
    assert_eq!(control.writes(), [1, 0]);
    assert!(rig.state.has_interrupt());

    // Nor does it stay masked when the queue pair was created anew.
    rig.work();
    rig.state.window = Window::new(Costs::default(), HOUR);
    rig.start();
    assert_eq!(rig.state.wait(Instant::now()), Wait::Poll);
    rig.state.fence();
    rig.state.window = slow_window();
    assert_eq!(rig.state.wait(Instant::now()), Wait::Sleep);
    assert_eq!(control.writes(), [1, 0, 1], "registers may be gone");
    rig.after(|state, aftermath| {
        state.release(ResetCause::Overdue, Instant::now(), aftermath);
        state.resume(Instant::now(), aftermath);
    });
    assert_eq!(control.writes(), [1, 0, 1, 0]);
}

/// Nobody waits for ever for a queue without an interrupt.
#[test]
fn a_queue_without_an_interrupt_is_looked_at() {
    let mut rig = Rig::new(8, PollMode::Paired);
    rig.state.window = slow_window();
    let start = Instant::now();
    rig.start();
    // What is here was to be polled for.
    assert_eq!(rig.state.wait(start + MAX_WINDOW / 2), Wait::Poll);
    let mut now = start + 2 * MAX_WINDOW;
    let mut looks = 0;
    while now < start + Duration::from_millis(100) {
        let Wait::Pause { until } = rig.state.wait(now) else {
            panic!("{:?}", rig.state.wait(now));
        };
        let pause = until - now;
        assert!(pause >= Duration::from_micros(10));
        assert!(pause <= Duration::from_micros(10).max((now - start) / 4));
        (now, looks) = (until, looks + 1);
    }
    assert!(looks < 60, "{looks}: ever less often");
}

/// How to wait for commands of 200 µs that are submitted so long after the one before was done, each after
/// a command to the interrupting queue of the pair if there is one.
fn learned(rest: Duration, mut interrupting: Option<&mut Rig>) -> Wait {
    let mut rig = Rig::new(8, PollMode::Adaptive);
    if let Some(other) = &mut interrupting {
        other.state.pair(&mut rig.state);
    }
    let (mut now, latency) = (Instant::now(), Duration::from_micros(200));
    for _ in 0..300 {
        if let Some(other) = &mut interrupting {
            now += rest;
            let started = other
                .try_start_at(now)
                .unwrap_or_else(|_| panic!("refused"));
            now += 20 * latency;
            assert_eq!(other.work_at(Look::Interrupted, now), 1);
            other.success(&started);
        }
        now += rest;
        let started = rig.try_start_at(now).unwrap_or_else(|_| panic!("refused"));
        let (mut awake, end) = (now, now + latency);
        let look = loop {
            awake = match rig.state.wait(awake) {
                _ if awake >= end => break Look::Polled,
                Wait::Poll => awake + Duration::from_micros(1),
                Wait::Pause { until } if until < end => until,
                Wait::Pause { .. } | Wait::Sleep => break Look::Interrupted,
            };
        };
        now = end;
        assert_eq!(rig.work_at(look, now), 1);
        rig.success(&started);
    }
    let started = rig.try_start_at(now + rest);
    assert!(started.is_ok());
    rig.state.wait(now + rest)
}

#[test]
fn it_is_awake_for_the_end_of_slow_commands_that_follow_each_other() {
    let soon = Duration::from_micros(5);
    assert!(matches!(learned(soon, None), Wait::Pause { .. }));
    assert_eq!(learned(Duration::from_millis(2), None), Wait::Sleep);
    // What the other queue of a pair does meanwhile is no rest.
    let mut other = Rig::new(8, PollMode::Interrupt);
    let wait = learned(soon, Some(&mut other));
    assert!(matches!(wait, Wait::Pause { .. }), "{wait:?}");
}

#[test]
fn commands_of_a_pair_go_where_they_are_polled_for() {
    let mut interrupting = Rig::new(256, PollMode::Interrupt);
    let mut polled = Rig::new(256, PollMode::Paired);
    interrupting.state.pair(&mut polled.state);
    assert!(polled.state.expects(Kind::Read), "nothing is known yet");
    polled.state.window = slow_window();
    let accepted = (0..200).filter(|_| polled.state.expects(Kind::Read));
    assert_eq!(accepted.count(), 3, "now and then it is found out");
    // That is polled for as long as may be.
    polled.start();
    assert_eq!(polled.state.wait(Instant::now()), Wait::Poll);
    let late = Instant::now() + Duration::from_millis(1);
    assert!(matches!(polled.state.wait(late), Wait::Pause { .. }));
    polled.work();
    assert!(matches!(polled.state.wait(late), Wait::Sleep));
}
