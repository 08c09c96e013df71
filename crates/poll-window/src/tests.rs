//! What it says of devices of several kinds.

use crate::*;

const COSTS: Costs = Costs {
    wake_cpu: 5_000,
    wake_latency: 5_000,
    timer_cpu: 0,
    latency_price: 100,
};

fn taught(gaps: impl IntoIterator<Item = u64>) -> Policy {
    let mut policy = Policy::new(COSTS);
    for gap in gaps {
        policy.observe(READ, 0, gap, End::Polled);
    }
    policy
}

const READ: Situation = Situation(Kind::Read as u8);
const MANY: Situation = Situation(4);

#[test]
fn untaught_it_polls_until_nobody_would() {
    let policy = Policy::new(COSTS);
    let Plan::Poll { until } = policy.plan(READ, 0) else {
        panic!("it does not poll");
    };
    // A sleep costs 10 µs. What has taken 30 µs is believed to take a third of that more.
    assert!((25_000..35_000).contains(&until), "{until}");
    assert_eq!(policy.plan(READ, until + 1_000), Plan::Sleep);
}

#[test]
fn a_fast_device_is_polled_until_it_answers() {
    let policy = taught((0..200).map(|index| 5_000 + index % 7 * 100));
    for age in [0, 2_000, 5_500] {
        let plan = policy.plan(READ, age);
        assert!(
            matches!(plan, Plan::Poll { until } if until > 5_600),
            "{plan:?}"
        );
    }
    assert_eq!(policy.plan(READ, 40_000), Plan::Sleep);
}

#[test]
fn what_was_broken_off_says_nothing_of_what_would_have_come() {
    let mut policy = taught([3_000_000; 100]);
    for _ in 0..400 {
        // Something else comes, not a completion.
        policy.observe(READ, 0, 2_000, End::BrokenOff);
    }
    for _ in 0..64 {
        policy.observe(READ, 0, 3_000_000, End::Polled);
    }
    assert_eq!(policy.plan(READ, 0), Plan::Sleep);
}

#[test]
fn what_was_never_seen_counts_at_once() {
    let mut policy = taught([5_000; 64]);
    assert!(matches!(policy.plan(READ, 20_000), Plan::Poll { .. }));
    policy.observe(READ, 0, 2_000_000, End::Polled);
    assert_eq!(policy.plan(READ, 20_000), Plan::Sleep);
}

#[test]
fn waits_that_begin_late_say_nothing_of_before() {
    let mut policy = Policy::new(COSTS);
    for _ in 0..300 {
        // While one command after another is completed, the next is soon there ...
        policy.observe(READ, 200, 700, End::Polled);
        // ... and after the last one it takes long, which is seen from 60 µs on only.
        policy.observe(READ, 60_000, 80_000, End::Interrupted { completions: 1 });
    }
    // One that has lasted for 700 ns and a bit is not one of those that take long.
    let plan = policy.plan(READ, 700);
    assert!(matches!(plan, Plan::Poll { .. }), "{plan:?}");
    let plan = policy.plan(READ, 61_000);
    assert!(!matches!(plan, Plan::Poll { .. }), "{plan:?}");
}

#[test]
fn a_sleep_that_makes_many_late_is_dear() {
    let teach = |completions| {
        let mut policy = Policy::new(COSTS);
        for index in 0..300 {
            let to = 37_000 + index % 9 * 4_000;
            policy.observe(MANY, 0, to, End::Interrupted { completions });
        }
        policy.plan(MANY, 9_000)
    };
    assert_eq!(teach(1), Plan::Sleep);
    assert!(matches!(teach(30), Plan::Poll { .. }));
}

#[test]
fn a_sleep_that_gathers_many_is_cheap_where_each_would_be_waited_for() {
    let teach = |completions| {
        let mut policy = Policy::new(COSTS);
        for _ in 0..300 {
            // Whatever a completion follows, it takes 8 µs.
            policy.observe(MANY, 0, 8_000, End::Polled);
            let to = 8_000 * completions as u64;
            let to = to.max(8_000 + COSTS.wake_latency);
            for _ in 0..2 {
                policy.observe(MANY, 0, to, End::Interrupted { completions });
            }
        }
        policy.plan(MANY, 0)
    };
    // A sleep costs 10 µs for one, which is more than polling, and 25 µs for four, which is less.
    let polls = |plan| matches!(plan, Plan::Poll { .. });
    assert!(polls(teach(1)) && !polls(teach(4)));
}

#[test]
fn what_polling_would_cost_is_noticed_while_all_waits_are_sleeps() {
    let costs = Costs {
        wake_latency: 15_000,
        timer_cpu: 20_000,
        ..COSTS
    };
    let mut policy = Policy::new(costs);
    let many = Situation::new(32, Kind::Read);
    for _ in 0..100 {
        policy.observe(many, 0, 20_000, End::Polled);
    }
    // It was slower then.
    for _ in 0..300 {
        policy.observe(many, 0, 115_000, End::Interrupted { completions: 32 });
    }
    // A sleep makes them 480 µs late in all, and saves the 80 µs that polling for all of them takes.
    assert_ne!(policy.plan(many, 20_000), Plan::Sleep);
}

#[test]
fn those_completed_together_are_polled_for_unless_a_sleep_gathered_them() {
    let mut policy = Policy::new(COSTS);
    for index in 0..300 {
        // Four are completed together every 80 µs. They are found by polling, one after the other, or
        // all at once after a sleep.
        if index % 2 == 0 {
            policy.observe(MANY, 60_000, 80_000, End::Polled);
            for _ in 0..3 {
                policy.observe(MANY, 0, 900, End::Polled);
            }
        }
        policy.observe(MANY, 0, 85_000, End::Interrupted { completions: 4 });
    }
    let waits_for_another = |plan| matches!(plan, Plan::Poll { until } if until >= 900);
    let plan = policy.plan(MANY, 0);
    assert!(!waits_for_another(plan), "{plan:?}");
    // What breaks a wait off changes nothing about that.
    policy.observe(MANY, 0, 1_000, End::BrokenOff);
    assert_eq!(policy.plan(MANY, 0), plan);
    policy.observe(MANY, 60_000, 80_000, End::Polled);
    let plan = policy.plan(MANY, 0);
    assert!(waits_for_another(plan), "{plan:?}");
}

#[test]
fn untaught_it_polls_for_longer_where_a_sleep_would_make_many_late() {
    let policy = Policy::new(COSTS);
    let gives_up = |outstanding| {
        let situation = Situation::new(outstanding, Kind::Read);
        let plan = |&age: &u64| policy.plan(situation, age);
        (0..10_000_000)
            .step_by(1_000)
            .find(|age| plan(age) == Plan::Sleep)
    };
    assert!(gives_up(8) > gives_up(1));
    assert!(gives_up(16) > gives_up(8));
    assert!(gives_up(16).is_some());
}

#[test]
fn a_device_that_is_slow_now_and_then_does_not_change_the_window() {
    let policy = taught((0..1000).map(|index| if index % 100 == 50 { 2_000_000 } else { 7_000 }));
    let Plan::Poll { until } = policy.plan(READ, 0) else {
        panic!("it does not poll");
    };
    assert!((7_000..9_000).contains(&until), "{until}");
    assert_eq!(policy.plan(READ, 10_000), Plan::Sleep);
}

#[test]
fn before_a_slow_device_it_sleeps_at_once_and_then_polls() {
    let policy = taught((0..200).map(|index| 30_000 + index % 5 * 200));
    for age in (0..15_000).step_by(500) {
        let plan = policy.plan(READ, age);
        assert!(
            matches!(plan, Plan::Pause { until } if (24_000..26_000).contains(&until)),
            "{age}: {plan:?}"
        );
    }
    let Plan::Poll { until } = policy.plan(READ, 29_500) else {
        panic!("{:?}", policy.plan(READ, 29_500));
    };
    assert!((30_800..33_000).contains(&until), "{until}");
}

/// Being late matters less where it takes long anyway.
#[test]
fn before_a_very_slow_device_it_sleeps() {
    let policy = taught((0..200).map(|index| 200_000 + index % 5 * 500));
    assert_eq!(policy.plan(READ, 0), Plan::Sleep);
}

#[test]
fn a_slow_device_is_polled_in_the_end_if_somebody_does_nothing_but_wait() {
    let teach = |rest| {
        let mut policy = Policy::new(COSTS);
        for index in 0..200 {
            policy.rested(rest);
            policy.observe(READ, 0, 80_000 + index % 5 * 200, End::Polled);
        }
        policy
    };
    let pauses =
        |policy: &Policy| matches!(policy.plan(READ, 0), Plan::Pause { until } if until > 70_000);
    let mut policy = teach(5_000);
    assert!(pauses(&policy));
    assert!(matches!(policy.plan(READ, 79_500), Plan::Poll { .. }));
    assert_eq!(teach(2_000_000).plan(READ, 0), Plan::Sleep);
    // From now on it waits now and then only.
    for index in 0..400 {
        policy.rested(2_000_000);
        policy.observe(READ, 0, 80_000 + index % 5 * 200, End::Polled);
    }
    assert_eq!(policy.plan(READ, 0), Plan::Sleep);
}

#[test]
fn a_timer_that_costs_more_than_it_saves_is_not_set() {
    let costs = Costs {
        timer_cpu: 4_000,
        ..COSTS
    };
    let mut policy = Policy::new(costs);
    for index in 0..200 {
        policy.observe(READ, 0, 30_000 + index % 5 * 200, End::Polled);
    }
    assert_eq!(policy.plan(READ, 0), Plan::Sleep);
}

#[test]
fn it_knows_how_a_wait_will_end() {
    let new = Policy::new(COSTS);
    assert!(new.expects_poll(READ, 0));
    let fast = taught((0..200).map(|index| 5_000 + index % 7 * 100));
    assert!(fast.expects_poll(READ, 0) && !fast.expects_poll(READ, 40_000));
    // After a pause.
    let slow = taught((0..200).map(|index| 30_000 + index % 5 * 200));
    assert!(slow.expects_poll(READ, 0));
    assert!(!taught([3_000_000; 100]).expects_poll(READ, 0));
    // It looks for a moment at what it has never seen, and knows that it will be in vain.
    let mut late = Policy::new(COSTS);
    for _ in 0..200 {
        late.observe(READ, 3_500, 3_000_000, End::Polled);
    }
    assert!(matches!(late.plan(READ, 3_300), Plan::Poll { until } if until < 4_000));
    assert!(!late.expects_poll(READ, 3_300));
}

#[test]
fn for_a_device_that_nobody_can_predict_it_sleeps() {
    let policy = taught((0..500).map(|index| 20_000 + index * 7919 % 1_000_000));
    assert_eq!(policy.plan(READ, 0), Plan::Sleep);
}

#[test]
fn what_is_seen_by_interrupts_alone_is_enough_to_begin_polling() {
    let mut policy = taught([3_000_000; 100]);
    assert_eq!(policy.plan(READ, 0), Plan::Sleep);
    for _ in 0..2_000 {
        policy.observe(
            READ,
            0,
            8_000 + COSTS.wake_latency,
            End::Interrupted { completions: 1 },
        );
    }
    assert!(matches!(policy.plan(READ, 0), Plan::Poll { .. }));
}

#[test]
fn situations_do_not_disturb_each_other() {
    let mut policy = Policy::new(COSTS);
    for _ in 0..100 {
        policy.observe(READ, 0, 3_000_000, End::Polled);
        policy.observe(Situation::new(1, Kind::Write), 0, 4_000, End::Polled);
        policy.observe(Situation::new(32, Kind::Read), 0, 500, End::Polled);
    }
    assert_eq!(policy.plan(READ, 0), Plan::Sleep);
    assert_eq!(Situation::new(0, Kind::Read), READ);
    for (outstanding, kind) in [(1, Kind::Write), (16, Kind::Read), (128, Kind::Other)] {
        let plan = policy.plan(Situation::new(outstanding, kind), 0);
        assert!(matches!(plan, Plan::Poll { .. }), "{outstanding} {kind:?}");
    }
}

#[test]
fn times_of_any_size_are_fine() {
    let costs = Costs {
        wake_cpu: u64::MAX,
        wake_latency: u64::MAX,
        timer_cpu: u64::MAX,
        latency_price: u64::MAX,
    };
    for costs in [
        costs,
        COSTS,
        Costs {
            wake_cpu: 0,
            wake_latency: 0,
            timer_cpu: 0,
            latency_price: 0,
        },
    ] {
        let mut policy = Policy::new(costs);
        for gap in [0, 1, 255, 256, u64::MAX / 2, u64::MAX] {
            policy.rested(gap);
            for end in [
                End::Polled,
                End::Interrupted { completions: 1 },
                End::BrokenOff,
            ] {
                policy.observe(READ, gap / 2, gap, end);
                for age in [0, 1, 1 << 20, u64::MAX] {
                    // Who polls until then makes progress.
                    if let Plan::Poll { until } | Plan::Pause { until } = policy.plan(READ, age) {
                        assert!(until > age);
                    }
                }
            }
        }
    }
}
