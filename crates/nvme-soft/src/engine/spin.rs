//! For how long the controller looks for work before it sleeps.

use std::time::Duration;

/// What is tried first, where it did not look at all.
const LEAST: Duration = Duration::from_micros(2);

/// Longer where work comes soon, shorter where it does not: a controller that is asleep takes so long to
/// wake up that its host goes to sleep too, whereupon work comes late for ever.
#[derive(Debug)]
pub(super) struct Spin {
    limit: Duration,
    current: Duration,
}

impl Spin {
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            current: limit,
        }
    }

    /// How long it looks.
    pub(super) fn time(&self) -> Duration {
        self.current
    }

    /// Records that work came after so much time, the end of which was slept.
    pub(super) fn has_slept(&mut self, time: Duration) {
        // A part of it was spent waking up, and the host may have waited for its interrupt.
        self.current = match time <= self.limit.saturating_mul(2) {
            true => self.current.saturating_mul(2).max(LEAST).min(self.limit),
            false => self.current / 2,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MICRO: Duration = Duration::from_micros(1);

    #[test]
    fn it_is_long_where_work_comes_soon() {
        let mut spin = Spin::new(50 * MICRO);
        assert_eq!(spin.time(), 50 * MICRO);
        for _ in 0..40 {
            spin.has_slept(1000 * MICRO);
        }
        assert_eq!(spin.time(), Duration::ZERO);
        for time in [2, 4, 8, 16, 32, 50, 50] {
            spin.has_slept(60 * MICRO);
            assert_eq!(spin.time(), time * MICRO);
        }
        spin.has_slept(101 * MICRO);
        assert_eq!(spin.time(), 25 * MICRO);
    }

    #[test]
    fn it_is_never_longer_than_it_may_be() {
        let mut never = Spin::new(Duration::ZERO);
        never.has_slept(Duration::ZERO);
        assert_eq!(never.time(), Duration::ZERO);
        let mut always = Spin::new(Duration::MAX);
        always.has_slept(MICRO);
        assert_eq!(always.time(), Duration::MAX);
    }
}
