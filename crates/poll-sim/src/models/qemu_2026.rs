//! Adaptive polling of QEMU 11.1.

use crate::policy::{Nanos, Plan, Policy, Situation, Waited};

/// Adaptive polling of QEMU 11.1, as of April 2026.
///
/// The event loop polls for its window before every sleep, whatever it waits for. Each handler has an
/// average, here that of the device and one for everything else. After a wait:
///
/// - The average `a` of a handler that has an event becomes `a - a / 2^weight + wait / 2^weight`, or
///   the wait if it was zero.
/// - To that of a handler that has none, and is not zero, the wait is added: it has been idle for
///   longer.
/// - What is then longer than the longest window becomes zero.
/// - If the longest average of the handlers with an event is longer than the window, the window
///   becomes that or twice as long as it was, whichever is longer, up to the longest. If it is shorter
///   than half of the window, the window is halved.
///
/// How these rules are read:
///
/// - Both quotients are rounded down, each for itself.
/// - The longest average is that after the change, so it is zero after a wait that was too long.
/// - A handler has an average of zero until its first event, from which it learns at once.
/// - That after a wait in which no handler has an event is zero.
///
/// QEMU also forgets handlers that are idle for 7 s, and does not poll for none. That changes nothing
/// here, because the handler of the event that ended the last wait is never forgotten.
///
/// An iteration that finds an event at once counts in QEMU as a wait of zero, which shortens the
/// average. Here only waits count, so under load the windows are a bit longer than QEMU's.
///
/// In QEMU's words the window is `poll_ns` of the context, the average is `poll.ns` of the handler,
/// the wait is `block_ns`, and the parameters are `poll-max-ns` (`max`), `poll-grow` (2),
/// `poll-shrink` (2) and `poll-weight` (`weight`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Qemu2026 {
    max: Nanos,
    weight: u32,
    window: Nanos,
    device: Nanos,
    other: Nanos,
}

/// That of an `IOThread`.
impl Default for Qemu2026 {
    fn default() -> Self {
        Self::new(32_768, 0)
    }
}

impl Qemu2026 {
    const GROW: u64 = 2;
    const SHRINK: u64 = 2;
    const WEIGHT: u32 = 3;

    /// No window is longer than `max`. The `weight` is less than 64; zero stands for the default.
    pub(crate) const fn new(max: Nanos, weight: u32) -> Self {
        assert!(weight < Nanos::BITS);
        Self {
            max,
            weight: if weight == 0 { Self::WEIGHT } else { weight },
            window: 0,
            device: 0,
            other: 0,
        }
    }

    /// What the average of a handler becomes after a wait.
    fn average(&self, average: Nanos, block: Nanos, has_event: bool) -> Nanos {
        let average = match (average, has_event) {
            (0, true) => block,
            (0, false) => 0,
            (_, true) => average - (average >> self.weight) + (block >> self.weight),
            (_, false) => average.saturating_add(block),
        };
        if average > self.max { 0 } else { average }
    }
}

impl Policy for Qemu2026 {
    fn plan(&mut self, _: &Situation) -> Plan {
        Plan::poll(self.window)
    }

    fn waited(&mut self, wait: &Waited) {
        let block = wait.ended - wait.began;
        self.device = self.average(self.device, block, wait.device);
        self.other = self.average(self.other, block, wait.other);
        let device = if wait.device { self.device } else { 0 };
        let other = if wait.other { self.other } else { 0 };
        let longest = device.max(other);
        if longest > self.window {
            let grown = self.window.saturating_mul(Self::GROW);
            self.window = longest.max(grown).min(self.max);
        } else if longest < self.window / Self::SHRINK {
            self.window /= Self::SHRINK;
        }
    }

    fn went_on(&mut self, device: bool, other: bool) {
        self.waited(&Waited {
            began: 0,
            ended: 0,
            polled: false,
            device,
            other,
        });
    }
}

#[cfg(test)]
mod tests;
