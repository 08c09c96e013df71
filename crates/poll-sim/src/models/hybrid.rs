//! Hybrid polling of Linux's block layer, 4.10 to 6.3.

use crate::policy::{FOR_EVER, Kind, Nanos, Plan, Policy, Situation};

/// Hybrid polling of Linux's block layer as of 2016 (Linux 4.10, `io_poll_delay` 0; removed in 6.4).
///
/// Who waits for a command sleeps for half of the mean time that commands like it take, once per
/// command, and then polls without end. Reads and writes have a mean each. The block layer tells sizes
/// apart, too; here all commands have the same.
///
/// How these rules are read:
///
/// - The time that a command takes is known when it was alone: its gap is that since it was submitted.
///   One of several others that is left alone has a shorter gap, which counts, too.
/// - With several commands outstanding it does not sleep. The block layer's callers with several were
///   those of `io_uring`, which always asked for polling without sleep.
/// - The half is counted from the beginning of the command, not of the wait, so that an event of
///   another source in between does not make it sleep twice.
/// - The mean is one of the last 1024 commands or so; the block layer's is one of the last moments.
///   Before the first command of a kind has completed, it does not sleep.
/// - A completion that is found late has taken as long as until it was found: nobody looked at a
///   polled queue before.
///
/// It is treated more kindly than by Linux in one respect: its sleep ends when the completion comes,
/// while polled queues have no interrupt.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hybrid {
    read: Mean,
    write: Mean,
}

impl Hybrid {
    fn of(&mut self, kind: Kind) -> &mut Mean {
        match kind {
            Kind::Read => &mut self.read,
            Kind::Write => &mut self.write,
        }
    }
}

impl Policy for Hybrid {
    fn plan(&mut self, situation: &Situation) -> Plan {
        let half = match situation.outstanding {
            0 => return Plan::INTERRUPT,
            1 => self.of(situation.kind).value() / 2,
            _ => 0,
        };
        let age = situation.now.saturating_sub(situation.last_progress);
        Plan {
            pause: half.saturating_sub(age),
            ..Plan::poll(FOR_EVER)
        }
    }

    fn progressed(&mut self, gap: Nanos, outstanding: usize, kind: Kind) {
        if outstanding == 1 {
            self.of(kind).add(gap);
        }
    }
}

/// A mean that forgets.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: Nanos,
    count: u64,
}

impl Mean {
    /// From so many on, each new one replaces the mean of those before.
    const RECENT: u64 = 1024;

    fn add(&mut self, value: Nanos) {
        if self.count < Self::RECENT {
            self.count += 1;
        } else {
            self.sum -= self.sum / self.count;
        }
        self.sum = self.sum.saturating_add(value);
    }

    fn value(self) -> Nanos {
        self.sum.checked_div(self.count).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::events::situation;

    fn completed(policy: &mut Hybrid, kind: Kind, gap: Nanos) {
        policy.progressed(gap, 1, kind);
    }

    /// For how long it sleeps in the beginning of a command that is alone.
    fn pause(policy: &mut Hybrid, kind: Kind) -> Nanos {
        let plan = policy.plan(&Situation {
            kind,
            ..situation(1)
        });
        assert_eq!(plan.poll, u64::MAX, "it always polls without end");
        plan.pause
    }

    #[test]
    fn sleeps_for_half_of_the_mean() {
        let mut policy = Hybrid::default();
        assert_eq!(pause(&mut policy, Kind::Read), 0, "it knows nothing yet");
        let table = [
            // 80000 / 1, and half of that.
            (80_000, 40_000),
            // (80000 + 90000) / 2 = 85000.
            (90_000, 42_500),
            // (170000 + 40001) / 3 = 70000, rest 1.
            (40_001, 35_000),
            // (210001 + 10000) / 4 = 55000, rest 1.
            (10_000, 27_500),
        ];
        for (row, (gap, expected)) in table.into_iter().enumerate() {
            completed(&mut policy, Kind::Read, gap);
            assert_eq!(pause(&mut policy, Kind::Read), expected, "row {row}");
        }
    }

    #[test]
    fn reads_and_writes_have_a_mean_each() {
        let mut policy = Hybrid::default();
        completed(&mut policy, Kind::Read, 80_000);
        assert_eq!(pause(&mut policy, Kind::Write), 0);
        completed(&mut policy, Kind::Write, 10_000);
        assert_eq!(pause(&mut policy, Kind::Read), 40_000);
        assert_eq!(pause(&mut policy, Kind::Write), 5_000);
    }

    #[test]
    fn sleeps_once_per_command() {
        let mut policy = Hybrid::default();
        completed(&mut policy, Kind::Read, 80_000);
        let mut at = |age| {
            let begun = situation(1);
            policy.plan(&Situation {
                now: begun.last_progress + age,
                ..begun
            })
        };
        // The rest of 40000, and when that is over, nothing.
        assert_eq!(at(15_000).pause, 25_000);
        assert_eq!(at(40_000).pause, 0);
        assert_eq!(at(40_001).pause, 0);
        assert_eq!(at(500_000).poll, u64::MAX);
    }

    #[test]
    fn neither_sleeps_nor_learns_with_several_outstanding() {
        let mut policy = Hybrid::default();
        policy.progressed(80_000, 2, Kind::Read);
        assert_eq!(pause(&mut policy, Kind::Read), 0);
        completed(&mut policy, Kind::Read, 80_000);
        assert_eq!(policy.plan(&situation(2)), Plan::poll(u64::MAX));
    }

    #[test]
    fn waits_for_an_interrupt_when_the_device_is_idle() {
        let mut policy = Hybrid::default();
        completed(&mut policy, Kind::Read, 80_000);
        assert_eq!(policy.plan(&situation(0)), Plan::INTERRUPT);
    }

    #[test]
    fn the_mean_forgets() {
        let mut policy = Hybrid::default();
        for _ in 0..1024 {
            completed(&mut policy, Kind::Read, 10_000);
        }
        assert_eq!(pause(&mut policy, Kind::Read), 5_000);
        // 10240000 - 10000 + 1034000 = 11264000, and that / 1024 = 11000.
        completed(&mut policy, Kind::Read, 1_034_000);
        assert_eq!(pause(&mut policy, Kind::Read), 5_500);
    }

    #[test]
    fn a_rare_long_command_makes_it_oversleep_the_others() {
        let mut policy = Hybrid::default();
        for _ in 0..99 {
            completed(&mut policy, Kind::Read, 10_000);
        }
        completed(&mut policy, Kind::Read, 2_000_000);
        // (990000 + 2000000) / 100 = 29900: it sleeps for 15 µs where 99 % take 10.
        assert_eq!(pause(&mut policy, Kind::Read), 14_950);
    }

    #[test]
    fn what_it_oversleeps_it_takes_for_the_devices_time() {
        let mut policy = Hybrid::default();
        completed(&mut policy, Kind::Read, 10_000);
        // It sleeps for 5 µs and wakes up in 15 µs more; (10000 + 20000) / 2 = 15000.
        policy.progressed(20_000, 1, Kind::Read);
        assert_eq!(pause(&mut policy, Kind::Read), 7_500);
        // (30000 + 30000) / 3 = 20000.
        policy.progressed(30_000, 1, Kind::Read);
        assert_eq!(pause(&mut policy, Kind::Read), 10_000);
    }
}
