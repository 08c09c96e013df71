//! How fast events may come.

use std::time::{Duration, Instant};

/// An event that comes so soon after it was asked for is one of a storm, or of a few that belong
/// together.
const SOON: Duration = Duration::from_millis(100);
/// So many may belong together.
const FREE: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The first pause is doubled at most so many times.
const DOUBLINGS: u32 = 4;

/// Tells how long to wait before the next event is asked for: not at all, unless one event after
/// the other comes as soon as it is asked for.
#[derive(Debug, Default)]
pub(super) struct Pace {
    asked: Option<Instant>,
    soon: u32,
}

impl Pace {
    /// An event was asked for.
    pub(super) fn asked(&mut self, now: Instant) {
        self.asked = Some(now);
    }

    /// An event has come.
    pub(super) fn came(&mut self, now: Instant) {
        let is_soon = self
            .asked
            .is_some_and(|asked| now.saturating_duration_since(asked) < SOON);
        self.soon = match is_soon {
            true => self.soon.saturating_add(1),
            false => 0,
        };
    }

    /// How long to wait, from when the last event was dealt with.
    pub(super) fn pause(&self) -> Duration {
        match self.soon.checked_sub(FREE + 1) {
            None => Duration::ZERO,
            Some(many) => FIRST_PAUSE * (1 << many.min(DOUBLINGS)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events that a device gets to report in a minute if it reports one whenever it can.
    fn storm(mut pace: Pace, mut now: Instant) -> usize {
        let end = now + Duration::from_secs(60);
        let mut count = 0;
        while now < end {
            pace.asked(now);
            pace.came(now);
            count += 1;
            now += pace.pause() + Duration::from_micros(50);
        }
        count
    }

    #[test]
    fn a_storm_is_slowed_down() {
        let count = storm(Pace::default(), Instant::now());
        assert!((8..60).contains(&count), "{count}");
    }

    #[test]
    fn events_now_and_then_are_not() {
        let mut pace = Pace::default();
        let mut now = Instant::now();
        for _ in 0..100 {
            pace.asked(now);
            now += SOON;
            pace.came(now);
            assert_eq!(pace.pause(), Duration::ZERO);
        }
        // Nor are a few at a time.
        pace.asked(now);
        for _ in 0..FREE {
            pace.came(now);
        }
        assert_eq!(pace.pause(), Duration::ZERO);
    }

    #[test]
    fn a_storm_that_ends_is_forgotten() {
        let mut pace = Pace::default();
        let now = Instant::now();
        pace.asked(now);
        for _ in 0..1000 {
            pace.came(now);
        }
        assert_eq!(pace.pause(), Duration::from_millis(1600));
        pace.came(now + SOON);
        assert_eq!(pace.pause(), Duration::ZERO);
    }
}
