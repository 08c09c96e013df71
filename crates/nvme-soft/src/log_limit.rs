use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Limits what is logged of a thing that a host can cause as often as it likes: the first, and then one in
/// [10 seconds](LogLimit::INTERVAL). Counters tell how many there were.
#[derive(Debug, Default)]
pub struct LogLimit(Mutex<Past>);

#[derive(Debug, Default)]
struct Past {
    last: Option<Instant>,
    left_out: u64,
}

impl LogLimit {
    /// How much time is between two messages at least.
    pub const INTERVAL: Duration = Duration::from_secs(10);

    /// A limit that was not made use of.
    pub const fn new() -> Self {
        Self(Mutex::new(Past {
            last: None,
            left_out: 0,
        }))
    }

    /// Returns, if it is to be logged, how many were left out since the last.
    pub fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        // Either of the two is valid whatever the other is.
        let mut past = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_early = past
            .last
            .is_some_and(|last| now.saturating_duration_since(last) < Self::INTERVAL);
        if is_early {
            past.left_out += 1;
            return None;
        }
        past.last = Some(now);
        Some(std::mem::take(&mut past.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_passes_and_then_one_in_a_while() {
        let limit = LogLimit::new();
        let start = Instant::now();
        let at = |seconds| limit.pass_at(start + Duration::from_secs(seconds));
        assert_eq!(at(1), Some(0));
        for _ in 0..1000 {
            assert_eq!(at(2), None);
        }
        assert_eq!(at(10), None);
        assert_eq!(at(11), Some(1001));
        assert_eq!(at(12), None);
        assert_eq!(at(40), Some(1));
        // A thread that took the time earlier.
        assert_eq!(at(39), None);
    }
}
