//! How waits have gone of late.

use crate::bins::{BINS, bin};

/// The weight of one wait, before it ages.
const WEIGHT: u16 = 32;
/// With this weight in all steps, everything counts half from then on: about the last thousand waits
/// tell.
const FULL: u32 = 512 * WEIGHT as u32 * BINS as u32;

/// For each step, how many waits were under way in it, and how many of them ended there with a
/// completion. What is older counts less.
#[derive(Clone, Debug)]
pub(crate) struct History {
    completed: [u16; BINS],
    /// Those that began in a step, less those that were broken off in it.
    joined: [i32; BINS],
    total: u32,
}

impl Default for History {
    fn default() -> Self {
        Self {
            completed: [0; BINS],
            joined: [0; BINS],
            total: 0,
        }
    }
}

impl History {
    /// Adds a wait that ended with a completion; returns whether there was none like it of late.
    pub(crate) fn add_completed(&mut self, from: u64, to: u64) -> bool {
        let completed = &mut self.completed[bin(to)];
        let is_new = *completed < WEIGHT;
        *completed += WEIGHT;
        self.joined[bin(from)] += i32::from(WEIGHT);
        self.age(BINS);
        is_new
    }

    /// Adds a wait that something else ended, perhaps for a moment only.
    pub(crate) fn add_broken_off(&mut self, from: u64, to: u64) {
        let (from, to) = (bin(from), bin(to));
        if from < to {
            self.joined[from] += i32::from(WEIGHT);
            self.joined[to] -= i32::from(WEIGHT);
            // Many of these may be pieces of one.
            self.age(to - from);
        }
    }

    /// How likely it is, for each step, that a wait ends in it which has come that far.
    ///
    /// Such a probability is known from those waits alone that were under way in the step (Kaplan and
    /// Meier's estimate, with late entry), so that neither a wait that something else ended nor one
    /// that began late says anything of what it did not see. Where none was under way, one that has
    /// lasted long is believed to go on for long.
    pub(crate) fn hazards(&self) -> [f32; BINS] {
        let mut under_way = 0i32;
        std::array::from_fn(|step| {
            under_way += self.joined[step];
            let completed = i32::from(self.completed[step]);
            // Halves are rounded.
            let watched = under_way.max(completed);
            under_way -= completed;
            let belief = f32::from(WEIGHT);
            (completed as f32 + BELIEF * belief) / (watched as f32 + belief)
        })
    }

    /// Lets the old fade, after a wait that has told of so many steps.
    fn age(&mut self, steps: usize) {
        self.total += u32::from(WEIGHT) * steps as u32;
        if self.total >= FULL {
            self.completed.iter_mut().for_each(|weight| *weight /= 2);
            self.joined.iter_mut().for_each(|weight| *weight /= 2);
            self.total /= 2;
        }
    }
}

/// How likely a wait is believed to end in a step of which nothing is known: one that has lasted for
/// some time goes on for half of it, on average.
const BELIEF: f32 = 1.0 / 8.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_counts_only_where_it_was_watched() {
        let mut history = History::default();
        for _ in 0..100 {
            history.add_completed(0, 700);
            history.add_completed(60_000, 80_000);
            history.add_broken_off(0, 600);
        }
        let hazards = history.hazards();
        // All that were watched so far ended there; those that began later or ended before say nothing.
        assert!(hazards[bin(700)] > 0.95, "{}", hazards[bin(700)]);
        assert!(hazards[bin(80_000)] > 0.95, "{}", hazards[bin(80_000)]);
        assert!(hazards[bin(600)] < 0.01, "{}", hazards[bin(600)]);
        assert!(hazards[bin(62_000)] < 0.01, "{}", hazards[bin(62_000)]);
        // Of this nothing is known.
        assert_eq!(hazards[bin(10_000)], BELIEF);
    }

    #[test]
    fn a_wait_in_pieces_does_not_count_for_many() {
        let mut history = History::default();
        for _ in 0..100 {
            history.add_completed(0, 20_000);
        }
        for _ in 0..50 {
            for piece in 0..114 {
                history.add_broken_off(piece * 700, (piece + 1) * 700);
            }
            history.add_completed(79_800, 80_000);
        }
        let hazard = history.hazards()[bin(20_000)];
        assert!((0.6..0.7).contains(&hazard), "{hazard}");
    }

    #[test]
    fn the_old_fades() {
        let mut history = History::default();
        for _ in 0..1000 {
            history.add_completed(0, 10_000);
        }
        for _ in 0..5000 {
            history.add_completed(0, 80_000);
        }
        let hazards = history.hazards();
        assert!(hazards[bin(10_000)] < 0.01, "{}", hazards[bin(10_000)]);
    }
}
