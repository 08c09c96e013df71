//! Adaptive polling of QEMU from 2016 to 2025.

use crate::policy::{Nanos, Plan, Policy, Situation, Waited};

/// Adaptive polling of QEMU as of December 2016; on by default since January 2017, and replaced in
/// QEMU 10.0.
///
/// The event loop has one window, and polls for it before every sleep, whatever it waits for. After
/// the wait:
///
/// - If it was not longer than the window, the window stays.
/// - If it was longer than the longest window, the window is divided by `shrink`, or zero.
/// - Otherwise, the window doubles, from zero to 4 µs, up to the longest.
///
/// A wait is over when there is an event. Until 2021 QEMU counted the time of what then handled it,
/// too; that is not modelled.
///
/// In QEMU's words the window is `poll_ns`, the wait is `block_ns`, and the parameters are
/// `poll-max-ns` (`max`), `poll-grow` (2) and `poll-shrink` (`shrink`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Qemu2016 {
    rule: Rule,
    window: Nanos,
}

/// That of an `IOThread`.
impl Default for Qemu2016 {
    fn default() -> Self {
        Self::new(32_768, 0)
    }
}

impl Qemu2016 {
    /// No window is longer than `max`. A `shrink` of zero shrinks to zero.
    pub(crate) const fn new(max: Nanos, shrink: u64) -> Self {
        Self {
            rule: Rule { max, shrink },
            window: 0,
        }
    }
}

impl Policy for Qemu2016 {
    fn plan(&mut self, _: &Situation) -> Plan {
        Plan::poll(self.window)
    }

    fn waited(&mut self, wait: &Waited) {
        self.window = self.rule.after(self.window, wait.ended - wait.began);
    }
}

/// How a window changes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    pub(crate) max: Nanos,
    pub(crate) shrink: u64,
}

impl Rule {
    const GROW: u64 = 2;
    const GROW_START: Nanos = 4_000;

    /// What the window becomes after a wait of that length.
    pub(crate) fn after(self, window: Nanos, block: Nanos) -> Nanos {
        if block <= window {
            window
        } else if block > self.max {
            window.checked_div(self.shrink).unwrap_or(0)
        } else if window == 0 {
            Self::GROW_START.min(self.max)
        } else {
            window.saturating_mul(Self::GROW).min(self.max)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::events::{both, device, other, polled, situation};

    fn replay(policy: &mut Qemu2016, table: &[(Waited, Nanos)]) {
        for (row, (wait, expected)) in table.iter().enumerate() {
            policy.waited(wait);
            let plan = policy.plan(&situation(1));
            assert_eq!(plan, Plan::poll(*expected), "row {row}");
        }
    }

    #[test]
    fn grows_keeps_and_shrinks_to_zero() {
        let mut policy = Qemu2016::default();
        assert_eq!(policy.plan(&situation(1)), Plan::INTERRUPT);
        replay(
            &mut policy,
            &[
                // Not longer than no window.
                (device(0), 0),
                (device(1), 4_000),
                (device(10_000), 8_000),
                (device(10_000), 16_000),
                // Not longer than the window, found by polling or not.
                (polled(device(10_000)), 16_000),
                (device(16_000), 16_000),
                // Whatever ends the wait.
                (other(16_001), 32_000),
                (both(32_000), 32_000),
                // 64000 is too long.
                (device(32_001), 32_768),
                (device(32_768), 32_768),
                (device(32_769), 0),
                (device(32_769), 0),
                // Not longer than the longest window.
                (device(32_768), 4_000),
            ],
        );
    }

    #[test]
    fn shrinks_by_a_factor() {
        replay(
            &mut Qemu2016::new(10_000, 3),
            &[
                (device(9_000), 4_000),
                (device(9_000), 8_000),
                // 16000 is too long.
                (device(9_000), 10_000),
                // 10000 / 3 = 3333, 3333 / 3 = 1111, 370, 123, 41, 13, 4, 1, 0.
                (device(10_001), 3_333),
                // Grows from there, not from 4000.
                (device(9_000), 6_666),
                (device(20_000), 2_222),
                (device(20_000), 740),
                (device(20_000), 246),
                (device(20_000), 82),
                (device(20_000), 27),
                (device(20_000), 9),
                (device(20_000), 3),
                (device(20_000), 1),
                (device(5_000), 2),
                (device(20_000), 0),
                (device(20_000), 0),
            ],
        );
    }

    #[test]
    fn no_window_is_longer_than_the_longest() {
        // Not the first one either.
        replay(&mut Qemu2016::new(3_000, 0), &[(device(2_000), 3_000)]);
        replay(&mut Qemu2016::new(0, 0), &[(device(0), 0), (device(1), 0)]);
    }

    #[test]
    fn polls_for_an_idle_device() {
        let mut policy = Qemu2016::default();
        policy.waited(&other(10_000));
        assert_eq!(policy.plan(&situation(0)), Plan::poll(4_000));
    }

    #[test]
    fn polls_only_where_it_is_in_vain_for_a_fast_guest_and_a_slow_disk() {
        // The guest takes 3 µs and the disk 90 µs, in turns. The window of 4 µs is there for the disk,
        // and none is for the guest.
        let table = [(other(3_000), 4_000), (device(90_000), 0)];
        replay(&mut Qemu2016::default(), &table.repeat(3));
    }

    #[test]
    fn never_polls_for_flash_memory() {
        let table = [(device(80_000), 0)];
        replay(&mut Qemu2016::default(), &table.repeat(10));
    }

    #[test]
    fn one_long_wait_takes_everything_away() {
        // It may have been the device, or another task that had the CPU in the meantime.
        replay(
            &mut Qemu2016::default(),
            &[
                (device(12_000), 4_000),
                (device(12_000), 8_000),
                (device(12_000), 16_000),
                (device(12_000), 16_000),
                (device(2_000_000), 0),
                // Three completions are late until it polls for long enough again.
                (device(12_000), 4_000),
                (device(12_000), 8_000),
                (device(12_000), 16_000),
            ],
        );
    }
}
