//! For how long polling pays: a pure function of what was observed.

use std::time::Duration;

/// After so many windows in a row without a completion the queue stops polling for a while.
const MISSES_BEFORE_PAUSE: u32 = 3;
/// So many sleeps after it stopped, a queue tries one window again.
const SLEEPS_BEFORE_PROBE: u32 = 64;

/// Learns one queue pair's completion time and says how long to poll.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    max: Duration,
    mean: Option<Duration>,
    misses: u32,
    paused_sleeps: u32,
}

impl Window {
    /// A policy that never polls for longer than `max` without a completion.
    pub(crate) fn new(max: Duration) -> Self {
        Self {
            max,
            mean: None,
            misses: 0,
            paused_sleeps: 0,
        }
    }

    /// Records that a command completed `latency` after its submission.
    pub(crate) fn observe(&mut self, latency: Duration) {
        self.mean = Some(match self.mean {
            None => latency,
            Some(mean) => mean - mean / 8 + latency / 8,
        });
    }

    /// How long to poll since the last completion or submission; zero to wait for the interrupt.
    pub(crate) fn length(&self) -> Duration {
        if self.misses >= MISSES_BEFORE_PAUSE && self.paused_sleeps < SLEEPS_BEFORE_PROBE {
            return Duration::ZERO;
        }
        match self.mean {
            None => self.max,
            // A device slower than the window would make every window a loss.
            Some(mean) if mean > self.max => Duration::ZERO,
            Some(mean) => (mean * 2).min(self.max),
        }
    }

    /// Records that a window ended with a completion.
    pub(crate) fn hit(&mut self) {
        self.misses = 0;
        self.paused_sleeps = 0;
    }

    /// Records that a window ended without one.
    pub(crate) fn miss(&mut self) {
        self.misses = (self.misses + 1).min(MISSES_BEFORE_PAUSE);
        self.paused_sleeps = 0;
    }

    /// Records that the queue went to sleep on the interrupt without polling.
    pub(crate) fn slept(&mut self) {
        self.paused_sleeps = self.paused_sleeps.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(50);

    #[test]
    fn polls_twice_the_mean_of_a_fast_device() {
        let mut window = Window::new(MAX);
        for _ in 0..100 {
            window.observe(Duration::from_micros(10));
        }
        let length = window.length();
        assert!(length > Duration::from_micros(18) && length <= Duration::from_micros(20));
    }

    #[test]
    fn waits_for_the_interrupt_of_a_slow_device_and_recovers() {
        let mut window = Window::new(MAX);
        for _ in 0..100 {
            window.observe(Duration::from_micros(200));
        }
        assert_eq!(window.length(), Duration::ZERO);
        for _ in 0..100 {
            window.observe(Duration::from_micros(5));
        }
        assert!(window.length() > Duration::ZERO);
    }

    #[test]
    fn misses_pause_it_until_a_probe_hits() {
        let mut window = Window::new(MAX);
        window.observe(Duration::from_micros(10));
        for _ in 0..MISSES_BEFORE_PAUSE {
            assert!(window.length() > Duration::ZERO);
            window.miss();
        }
        for _ in 0..SLEEPS_BEFORE_PROBE {
            assert_eq!(window.length(), Duration::ZERO);
            window.slept();
        }
        assert!(window.length() > Duration::ZERO);
        window.miss();
        assert_eq!(
            window.length(),
            Duration::ZERO,
            "one missed probe pauses it again"
        );
        for _ in 0..SLEEPS_BEFORE_PROBE {
            window.slept();
        }
        window.hit();
        assert!(window.length() > Duration::ZERO);
    }
}
