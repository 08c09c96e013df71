//! Adaptive polling of QEMU 10.0.

use super::qemu_2016::Rule;
use crate::policy::{Nanos, Plan, Policy, Situation, Waited};

/// Adaptive polling of QEMU 10.0, as of March 2025; replaced in QEMU 11.1.
///
/// Each handler has a window, and the event loop polls for the longest of them before every sleep,
/// whatever it waits for. There are two handlers: the device's, and one for everything else.
///
/// How these rules are read:
///
/// - After a wait, the window of a handler that has an event changes as that of the loop did from 2016
///   on: its own window is compared with the time of the whole wait.
/// - The window of a handler that has none does not change, for as long as it has none: what replaced
///   this policy was to repair that idle handlers rule over the others.
/// - A handler has a window of zero until its first event, from which it learns at once.
///
/// In QEMU's words the window of a handler is its `poll.ns`, the wait is `block_ns`, and the
/// parameters are `poll-max-ns` (`max`), `poll-grow` (2) and `poll-shrink` (`shrink`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Qemu2025 {
    rule: Rule,
    device: Nanos,
    other: Nanos,
}

/// That of an `IOThread`.
impl Default for Qemu2025 {
    fn default() -> Self {
        Self::new(32_768, 0)
    }
}

impl Qemu2025 {
    /// No window is longer than `max`. A `shrink` of zero shrinks to zero.
    pub(crate) const fn new(max: Nanos, shrink: u64) -> Self {
        Self {
            rule: Rule { max, shrink },
            device: 0,
            other: 0,
        }
    }
}

impl Policy for Qemu2025 {
    fn plan(&mut self, _: &Situation) -> Plan {
        Plan::poll(self.device.max(self.other))
    }

    fn waited(&mut self, wait: &Waited) {
        let block = wait.ended - wait.began;
        if wait.device {
            self.device = self.rule.after(self.device, block);
        }
        if wait.other {
            self.other = self.rule.after(self.other, block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::events::{both, device, other, situation};

    /// After each wait: the windows of the device, of everything else, and of the loop.
    fn replay(policy: &mut Qemu2025, table: &[(Waited, [Nanos; 3])]) {
        for (row, (wait, [device, other, poll])) in table.iter().enumerate() {
            policy.waited(wait);
            assert_eq!(
                (policy.device, policy.other),
                (*device, *other),
                "row {row}"
            );
            assert_eq!(policy.plan(&situation(1)), Plan::poll(*poll), "row {row}");
        }
    }

    #[test]
    fn handlers_learn_from_their_own_events() {
        let mut policy = Qemu2025::default();
        assert_eq!(policy.plan(&situation(1)), Plan::INTERRUPT);
        replay(
            &mut policy,
            &[
                (device(10_000), [4_000, 0, 4_000]),
                (device(10_000), [8_000, 0, 8_000]),
                // Grows from zero although the loop's window is longer than the wait.
                (other(5_000), [8_000, 4_000, 8_000]),
                // Not longer than the window of the one, longer than that of the other.
                (both(7_000), [8_000, 8_000, 8_000]),
                (other(20_000), [8_000, 16_000, 16_000]),
                (device(8_000), [8_000, 16_000, 16_000]),
                (device(8_001), [16_000, 16_000, 16_000]),
                (device(30_000), [32_000, 16_000, 32_000]),
                // 64000 is too long.
                (both(32_100), [32_768, 32_000, 32_768]),
                (device(32_768), [32_768, 32_000, 32_768]),
                // To zero, but not what has no event.
                (device(32_769), [0, 32_000, 32_000]),
                (other(100_000), [0, 0, 0]),
                (both(32_768), [4_000, 4_000, 4_000]),
                (both(32_769), [0, 0, 0]),
            ],
        );
    }

    #[test]
    fn shrinks_by_a_factor() {
        replay(
            &mut Qemu2025::new(32_768, 2),
            &[
                (both(10_000), [4_000, 4_000, 4_000]),
                (device(40_000), [2_000, 4_000, 4_000]),
                (both(40_000), [1_000, 2_000, 2_000]),
                (device(5_000), [2_000, 2_000, 2_000]),
            ],
        );
    }

    #[test]
    fn a_wait_without_an_event_teaches_nothing() {
        let mut policy = Qemu2025::default();
        let nothing = Waited {
            device: false,
            ..device(50_000)
        };
        replay(
            &mut policy,
            &[
                (both(10_000), [4_000, 4_000, 4_000]),
                (nothing, [4_000, 4_000, 4_000]),
            ],
        );
    }

    #[test]
    fn polls_for_an_idle_device() {
        let mut policy = Qemu2025::default();
        policy.waited(&device(10_000));
        assert_eq!(policy.plan(&situation(0)), Plan::poll(4_000));
    }

    #[test]
    fn a_handler_that_is_idle_rules_over_the_others() {
        let mut policy = Qemu2025::default();
        replay(
            &mut policy,
            &[
                (device(30_000), [4_000, 0, 4_000]),
                (device(30_000), [8_000, 0, 8_000]),
                (device(30_000), [16_000, 0, 16_000]),
                (device(30_000), [32_000, 0, 32_000]),
            ],
        );
        // The device is done, for ever. A timer finds 32 µs of polling each time, in vain.
        let table = [(other(1_000_000), [32_000, 0, 32_000])];
        replay(&mut policy, &table.repeat(100));
    }

    #[test]
    fn a_fast_guest_is_polled_for_and_a_slow_disk_too() {
        // The guest takes 3 µs and the disk 90 µs, in turns. The guest has its window now, and the
        // disk's is the same, in vain.
        let table = [
            (other(3_000), [0, 4_000, 4_000]),
            (device(90_000), [0, 4_000, 4_000]),
        ];
        replay(&mut Qemu2025::default(), &table.repeat(3));
    }

    #[test]
    fn never_polls_for_flash_memory() {
        let table = [(device(80_000), [0, 0, 0])];
        replay(&mut Qemu2025::default(), &table.repeat(10));
    }

    #[test]
    fn one_long_wait_takes_everything_away() {
        replay(
            &mut Qemu2025::default(),
            &[
                (device(12_000), [4_000, 0, 4_000]),
                (device(12_000), [8_000, 0, 8_000]),
                (device(12_000), [16_000, 0, 16_000]),
                (device(2_000_000), [0, 0, 0]),
                (device(12_000), [4_000, 0, 4_000]),
            ],
        );
    }
}
