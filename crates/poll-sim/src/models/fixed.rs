//! Policies that learn nothing: a fixed window, interrupts only, polling only, and one that knows the
//! future. None of them polls while the device has nothing to do.

use crate::policy::{FOR_EVER, Nanos, Plan, Policy, Situation};

/// Polls for so long in every wait, then sleeps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fixed {
    window: Nanos,
}

impl Fixed {
    pub(crate) const fn new(window: Nanos) -> Self {
        Self { window }
    }
}

impl Policy for Fixed {
    fn plan(&mut self, situation: &Situation) -> Plan {
        match situation.outstanding {
            0 => Plan::INTERRUPT,
            _ => Plan::poll(self.window),
        }
    }
}

/// Never polls.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupt;

impl Policy for Interrupt {
    fn plan(&mut self, _: &Situation) -> Plan {
        Plan::INTERRUPT
    }
}

/// Never sleeps while the device has a command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Polling;

impl Policy for Polling {
    fn plan(&mut self, situation: &Situation) -> Plan {
        match situation.outstanding {
            0 => Plan::INTERRUPT,
            _ => Plan::poll(FOR_EVER),
        }
    }
}

/// Knows when the next completion comes, and spends as little CPU time as is possible without being
/// late for it, if every wake-up takes the same time.
///
/// It knows neither when another source has an event, nor how long a wake-up takes this time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Oracle {
    wake_latency: Nanos,
    wake_cpu: Nanos,
}

impl Oracle {
    /// What a wake-up costs: how long after its event the loop goes on, and CPU time.
    pub(crate) const fn new(wake_latency: Nanos, wake_cpu: Nanos) -> Self {
        Self {
            wake_latency,
            wake_cpu,
        }
    }
}

impl Policy for Oracle {
    fn plan(&mut self, situation: &Situation) -> Plan {
        let next = match situation.next_completion {
            Some(next) if situation.outstanding > 0 => next,
            _ => return Plan::INTERRUPT,
        };
        let distance = next.saturating_sub(situation.now);
        let pause = if distance <= self.wake_cpu {
            0
        } else {
            // Zero, too, when there is not enough time to wake up in.
            distance.saturating_sub(self.wake_latency)
        };
        Plan {
            pause,
            // The one more is for finding what comes at the very end.
            ..Plan::poll(distance - pause + 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::events::situation;

    #[test]
    fn nobody_polls_for_an_idle_device() {
        // Not even the oracle, whom somebody may tell of a completion nevertheless.
        let idle = Situation {
            next_completion: Some(7_000_100),
            ..situation(0)
        };
        let mut policies: [Box<dyn Policy>; 4] = [
            Box::new(Fixed::new(10_000)),
            Box::new(Interrupt),
            Box::new(Polling),
            Box::new(Oracle::new(15_000, 5_000)),
        ];
        for policy in &mut policies {
            assert_eq!(policy.plan(&idle), Plan::INTERRUPT);
        }
    }

    #[test]
    fn what_never_changes() {
        for outstanding in [1, 32] {
            let busy = situation(outstanding);
            let window = Plan::poll(10_000);
            assert_eq!(Fixed::new(10_000).plan(&busy), window);
            assert_eq!(Interrupt.plan(&busy), Plan::INTERRUPT);
            assert_eq!(Polling.plan(&busy), Plan::poll(u64::MAX));
        }
    }

    /// What the oracle does so long before a completion.
    fn foresight(wake_latency: Nanos, wake_cpu: Nanos, distance: Nanos) -> (Nanos, Nanos) {
        let busy = situation(1);
        let plan = Oracle::new(wake_latency, wake_cpu).plan(&Situation {
            next_completion: Some(busy.now + distance),
            ..busy
        });
        (plan.pause, plan.poll)
    }

    #[test]
    fn the_oracle_is_awake_in_time() {
        // Waking up takes 15 µs, and 5 µs of CPU time.
        assert_eq!(foresight(15_000, 5_000, 0), (0, 1));
        // Polling is cheaper than waking up, or as cheap.
        assert_eq!(foresight(15_000, 5_000, 4_000), (0, 4_001));
        assert_eq!(foresight(15_000, 5_000, 5_000), (0, 5_001));
        // It is not, but who went to sleep would be late.
        assert_eq!(foresight(15_000, 5_000, 5_001), (0, 5_002));
        assert_eq!(foresight(15_000, 5_000, 15_000), (0, 15_001));
        // 15001 - 15000 = 1, and 80000 - 15000 = 65000.
        assert_eq!(foresight(15_000, 5_000, 15_001), (1, 15_001));
        assert_eq!(foresight(15_000, 5_000, 80_000), (65_000, 15_001));
    }

    #[test]
    fn the_oracle_polls_when_waking_up_takes_more_cpu_time_than_time() {
        // 2 µs, and 5 µs of CPU time: 5001 - 2000 = 3001.
        assert_eq!(foresight(2_000, 5_000, 5_000), (0, 5_001));
        assert_eq!(foresight(2_000, 5_000, 5_001), (3_001, 2_001));
    }

    #[test]
    fn the_oracle_sleeps_when_it_is_told_nothing_or_too_late() {
        let mut oracle = Oracle::new(15_000, 5_000);
        assert_eq!(oracle.plan(&situation(1)), Plan::INTERRUPT);
        let late = Situation {
            next_completion: Some(6_999_000),
            ..situation(1)
        };
        assert_eq!(oracle.plan(&late), Plan::poll(1));
    }
}
