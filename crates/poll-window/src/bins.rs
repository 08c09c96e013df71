//! Times in steps of a sixteenth of an octave.

/// The last one has no end: it begins at about 15 ms.
pub(crate) const BINS: usize = 240;

/// Steps in an octave.
const STEPS: u32 = 16;
/// All below is one step.
const FIRST: u32 = 9;

/// The step that a time belongs to.
pub(crate) fn bin(time: u64) -> usize {
    let Some(octave) = time.checked_ilog2().and_then(|log| log.checked_sub(FIRST)) else {
        return 0;
    };
    let step = (time >> (octave + FIRST - STEPS.ilog2())) as u32 % STEPS;
    ((1 + octave * STEPS + step) as usize).min(BINS - 1)
}

/// Where a step begins.
pub(crate) fn start(bin: usize) -> u64 {
    let Some(bin) = (bin as u32).checked_sub(1) else {
        return 0;
    };
    u64::from(STEPS + bin % STEPS) << (bin / STEPS + FIRST - STEPS.ilog2())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_places() {
        for (time, expected) in [(0, 0), (511, 0), (512, 1), (543, 1), (544, 2), (1024, 17)] {
            assert_eq!(bin(time), expected, "{time}");
        }
        assert_eq!(start(1), 512);
        assert_eq!(start(2), 544);
        assert_eq!(start(17), 1024);
        assert_eq!(bin(u64::MAX), BINS - 1);
    }

    #[test]
    fn every_step_begins_where_the_one_before_ends() {
        for step in 1..BINS {
            assert_eq!(bin(start(step)), step);
            assert_eq!(bin(start(step) - 1), step - 1);
        }
    }
}
