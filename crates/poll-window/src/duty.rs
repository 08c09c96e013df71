//! How much of the time somebody waits.

/// After so many rests most of what was before is forgotten.
const MEMORY: f32 = 64.0;
/// A rest of more than so many nanoseconds counts as one of so many.
const LONGEST: u64 = 16_000_000;
/// More waits than this between two rests count as so many nanoseconds.
const MOST: f32 = MEMORY * LONGEST as f32;

/// The times for which something was outstanding, and those for which nothing was. What is older counts
/// less.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Duty {
    waited: f32,
    rested: f32,
}

impl Duty {
    pub(crate) fn add_wait(&mut self, time: u64) {
        self.waited = (self.waited + time as f32).min(MOST);
    }

    pub(crate) fn add_rest(&mut self, time: u64) {
        const KEPT: f32 = 1.0 - 1.0 / MEMORY;
        self.waited *= KEPT;
        self.rested = (self.rested + time.min(LONGEST) as f32) * KEPT;
    }

    /// By how much of it somebody is held up if a wait becomes longer, from 0 to 1: twice the share of
    /// the waits in the time, so by all of it where they are half of the time.
    pub(crate) fn urgency(&self) -> f32 {
        let time = self.waited + self.rested;
        match time > 0.0 {
            true => (2.0 * self.waited / time).min(1.0),
            false => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(wait: u64, rest: u64, times: usize) -> Duty {
        let mut duty = Duty::default();
        go_on(&mut duty, wait, rest, times);
        duty
    }

    fn go_on(duty: &mut Duty, wait: u64, rest: u64, times: usize) {
        for _ in 0..times {
            duty.add_wait(wait);
            duty.add_rest(rest);
        }
    }

    #[test]
    fn it_is_the_share_of_waits() {
        assert_eq!(Duty::default().urgency(), 0.0);
        assert_eq!(after(80_000, 2_000, 1).urgency(), 1.0);
        assert_eq!(after(80_000, 80_000, 1000).urgency(), 1.0);
        let paced = after(100_000, 900_000, 1000).urgency();
        assert!((0.19..0.21).contains(&paced), "{paced}");
    }

    #[test]
    fn the_old_is_forgotten() {
        let mut duty = after(80_000, u64::MAX, 1000);
        assert!(duty.urgency() < 0.02, "{duty:?}");
        go_on(&mut duty, 80_000, 2_000, 400);
        assert_eq!(duty.urgency(), 1.0, "{duty:?}");
        go_on(&mut duty, 80_000, 1_000_000, 200);
        assert!(duty.urgency() < 0.25, "{duty:?}");
        // It was never idle for years.
        duty.add_wait(u64::MAX);
        go_on(&mut duty, 80_000, 1_000_000, 600);
        assert!(duty.urgency() < 0.25, "{duty:?}");
    }
}
