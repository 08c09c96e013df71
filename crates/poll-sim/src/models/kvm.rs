//! Halt polling of KVM.

use crate::policy::{Nanos, Plan, Policy, Situation, Waited};

/// Halt polling of KVM, as of Linux 6.11, or before with another `shrink`.
///
/// What KVM does for each virtual CPU that halts, this does for the event loop: it polls for a while
/// before every sleep, whatever it waits for. After the wait:
///
/// - An event while it polled keeps the window.
/// - Otherwise, if the whole wait was shorter than the longest window, and the window is not yet the
///   longest: it doubles, from zero to 10 µs, up to the longest.
/// - Otherwise, if the wait was longer than the longest window: it is divided by `shrink`, and what is
///   below 10 µs becomes zero.
///
/// In KVM's words the window is `halt_poll_ns` of the virtual CPU, and the parameters are
/// `halt_poll_ns` (`max`), `halt_poll_ns_grow` (2), `halt_poll_ns_grow_start` (10 µs) and
/// `halt_poll_ns_shrink` (`shrink`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kvm {
    max: Nanos,
    shrink: u64,
    window: Nanos,
}

/// That of x86, and of Linux 6.11 and later.
impl Default for Kvm {
    fn default() -> Self {
        Self::new(200_000, 2)
    }
}

impl Kvm {
    const GROW: u64 = 2;
    const GROW_START: Nanos = 10_000;

    /// No window is longer than `max`. A `shrink` of zero, the default before Linux 6.11, shrinks to
    /// zero.
    pub(crate) const fn new(max: Nanos, shrink: u64) -> Self {
        Self {
            max,
            shrink,
            window: 0,
        }
    }

    fn grow(&mut self) {
        let grown = self.window.saturating_mul(Self::GROW);
        self.window = grown.max(Self::GROW_START).min(self.max);
    }

    fn shrink(&mut self) {
        let shrunk = self.window.checked_div(self.shrink).unwrap_or(0);
        self.window = if shrunk < Self::GROW_START { 0 } else { shrunk };
    }
}

impl Policy for Kvm {
    fn plan(&mut self, _: &Situation) -> Plan {
        Plan::poll(self.window)
    }

    fn waited(&mut self, wait: &Waited) {
        if wait.polled {
            return;
        }
        let block = wait.ended - wait.began;
        if block < self.max && self.window < self.max {
            self.grow();
        } else if block > self.max {
            self.shrink();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::events::{device, other, polled, situation};

    fn replay(policy: &mut Kvm, table: &[(Waited, Nanos)]) {
        for (row, (wait, expected)) in table.iter().enumerate() {
            policy.waited(wait);
            let plan = policy.plan(&situation(1));
            assert_eq!(plan, Plan::poll(*expected), "row {row}");
        }
    }

    #[test]
    fn grows_keeps_and_shrinks() {
        let mut policy = Kvm::default();
        assert_eq!(policy.plan(&situation(1)), Plan::INTERRUPT);
        replay(
            &mut policy,
            &[
                // From zero, whatever ends the wait.
                (device(50_000), 10_000),
                (other(50_000), 20_000),
                // Found by polling.
                (polled(device(15_000)), 20_000),
                // Shorter than the window, but not found by polling.
                (device(19_000), 40_000),
                (device(150_000), 80_000),
                (device(150_000), 160_000),
                // As long as the longest window is neither shorter nor longer.
                (device(200_000), 160_000),
                // 320000 is too long.
                (device(199_999), 200_000),
                (device(199_999), 200_000),
                // Shrinks: 100000, 50000, 25000, 12500, and 6250 is too short.
                (device(200_001), 100_000),
                (other(1_000_000), 50_000),
                (device(1_000_000), 25_000),
                (device(1_000_000), 12_500),
                (device(1_000_000), 0),
                (device(1_000_000), 0),
                (device(199_999), 10_000),
                // 5000 is too short.
                (device(1_000_000), 0),
            ],
        );
    }

    #[test]
    fn one_long_wait_took_everything_away_before_linux_6_11() {
        replay(
            &mut Kvm::new(200_000, 0),
            &[
                (device(50_000), 10_000),
                (device(50_000), 20_000),
                (device(50_000), 40_000),
                (device(2_000_000), 0),
                (device(2_000_000), 0),
                (device(50_000), 10_000),
            ],
        );
    }

    #[test]
    fn no_window_is_longer_than_the_longest() {
        // Not the first one either.
        replay(&mut Kvm::new(8_000, 2), &[(device(7_999), 8_000)]);
        replay(
            &mut Kvm::new(0, 2),
            &[(device(0), 0), (device(1), 0), (polled(device(0)), 0)],
        );
    }

    #[test]
    fn an_idle_loop_polls_all_the_time_for_a_frequent_timer() {
        let mut policy = Kvm::default();
        let timer = other(150_000);
        replay(
            &mut policy,
            &[
                (timer, 10_000),
                (timer, 20_000),
                (timer, 40_000),
                (timer, 80_000),
                (timer, 160_000),
                // From now on it never sleeps.
                (polled(timer), 160_000),
                (polled(timer), 160_000),
            ],
        );
        assert_eq!(policy.plan(&situation(0)), Plan::poll(160_000));
    }

    #[test]
    fn alternating_latencies_are_polled_for_in_vain() {
        // 12 µs and 250 µs in turns: the short ones meet no window, and the long ones one of 10 µs.
        let table = [(device(12_000), 10_000), (device(250_000), 0)];
        replay(&mut Kvm::default(), &table.repeat(3));
    }
}
