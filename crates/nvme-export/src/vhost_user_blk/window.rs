//! For how long a ring is looked at before its driver is asked to say when there is something.

use std::time::Duration;

/// The longest time.
const MAX: Duration = Duration::from_micros(100);
/// The first one after none.
const FIRST: Duration = Duration::from_micros(8);

/// A time that follows how long it takes until there is something: twice as long when a little more would have been
/// enough, half as long when it was in vain by far.
#[derive(Debug)]
pub(super) struct Window(Duration);

impl Default for Window {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl Window {
    /// Whether to look again, after nothing was found for so long.
    pub(super) fn is_open(&self, since: Duration) -> bool {
        since < self.0
    }

    /// There was something after a time without looking.
    pub(super) fn woken_after(&mut self, slept: Duration) {
        self.0 = if slept < MAX {
            (self.0 * 2).clamp(FIRST, MAX)
        } else if self.0 > FIRST {
            self.0 / 2
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_what_it_takes() {
        let mut window = Window::default();
        for _ in 0..10 {
            window.woken_after(Duration::from_micros(30));
        }
        assert!(window.is_open(Duration::from_micros(99)));
        assert!(!window.is_open(MAX), "it has a limit");
        for _ in 0..10 {
            window.woken_after(Duration::from_millis(5));
        }
        assert!(!window.is_open(Duration::ZERO), "a rare request gets none");
        window.woken_after(Duration::from_micros(30));
        assert!(window.is_open(Duration::from_micros(7)));
    }
}
