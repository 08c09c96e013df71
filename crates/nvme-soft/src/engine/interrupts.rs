//! Interrupts, and which of them wait for more completions: interrupt coalescing (base specification
//! 2.0, sections 5.27.1.6 and 5.27.1.7).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use nvme_spec::feature::InterruptCoalescing;

use super::Engine;
use super::queues::Posted;

/// The unit of the Aggregation Time.
const TIME_UNIT: Duration = Duration::from_micros(100);

/// The interrupts that are put off.
pub(super) struct Coalescing {
    /// Entries that are worth an interrupt.
    threshold: u32,
    time: Duration,
    /// At most one for each vector, in the order in which they are due.
    waiting: VecDeque<Waiting>,
}

/// A vector on which completions wait for an interrupt.
struct Waiting {
    vector: u16,
    entries: u32,
    due: Instant,
}

impl Coalescing {
    /// Nothing if no interrupt is to be put off, as with a threshold of one entry or no time.
    fn new(feature: InterruptCoalescing) -> Option<Self> {
        (feature.thr() != 0 && feature.time() != 0).then(|| Self {
            threshold: u32::from(feature.thr()) + 1,
            time: TIME_UNIT * feature.time().into(),
            waiting: VecDeque::new(),
        })
    }

    /// Adds entries to those that wait on a vector; returns whether it is now to be raised.
    fn add(&mut self, vector: u16, entries: u32, now: Instant) -> bool {
        let index = self
            .waiting
            .iter()
            .position(|waiting| waiting.vector == vector)
            .unwrap_or_else(|| {
                self.waiting.push_back(Waiting {
                    vector,
                    entries: 0,
                    due: now + self.time,
                });
                self.waiting.len() - 1
            });
        let waiting = &mut self.waiting[index];
        waiting.entries += entries;
        let is_enough = waiting.entries >= self.threshold;
        if is_enough {
            self.waiting.remove(index);
        }
        is_enough
    }

    /// A vector is raised anyway, or has no completion queue any more.
    fn forget(&mut self, vector: u16) {
        self.waiting.retain(|waiting| waiting.vector != vector);
    }

    fn first_due(&self) -> Option<Instant> {
        self.waiting.front().map(|waiting| waiting.due)
    }

    /// Takes the next vector that is to be raised by now.
    fn take_due(&mut self, now: Instant) -> Option<u16> {
        let waiting = self.waiting.pop_front_if(|waiting| waiting.due <= now)?;
        Some(waiting.vector)
    }
}

impl Engine {
    /// Raises the interrupts of what was posted since the last call, except those that are put off.
    pub(super) fn signal(&mut self) {
        while let Some(posted) = self.queues.next_posted() {
            if self.coalescing.is_none() || !self.put_off(&posted) {
                self.raise(posted.vector);
            }
        }
    }

    fn put_off(&mut self, posted: &Posted) -> bool {
        let Some(coalescing) = &mut self.coalescing else {
            return false;
        };
        // The admin queue's are never put off, and others on its vector are raised with them.
        let is_coalesced =
            posted.completion_queue != 0 && self.admin.features.is_coalesced(posted.vector);
        if !is_coalesced {
            coalescing.forget(posted.vector);
        }
        is_coalesced && !coalescing.add(posted.vector, posted.entries, Instant::now())
    }

    pub(super) fn raise(&mut self, vector: u16) {
        self.shared.counters.interrupts.add(1);
        self.interrupts.raise(vector);
    }

    /// When the first interrupt is due that was put off.
    pub(super) fn first_interrupt_due(&self) -> Option<Instant> {
        self.coalescing.as_ref()?.first_due()
    }

    /// Raises the interrupts that have been put off for long enough; returns whether there were any.
    pub(super) fn raise_due(&mut self) -> bool {
        let mut busy = false;
        while let Some(coalescing) = &mut self.coalescing
            && let Some(vector) = coalescing.take_due(Instant::now())
        {
            self.raise(vector);
            busy = true;
        }
        busy
    }

    /// Puts interrupts off as the features say now. Those that were before are raised.
    pub(crate) fn configure_coalescing(&mut self) {
        self.end_coalescing();
        self.coalescing = Coalescing::new(self.admin.features.interrupt_coalescing());
    }

    /// Raises all that is put off, and puts nothing off from now on.
    pub(super) fn end_coalescing(&mut self) {
        let coalescing = self.coalescing.take();
        for waiting in coalescing.into_iter().flat_map(|old| old.waiting) {
            self.raise(waiting.vector);
        }
    }

    /// A completion queue with this vector is gone, and its host may have no use for the interrupt.
    pub(crate) fn end_vector(&mut self, vector: u16) {
        if let Some(coalescing) = &mut self.coalescing
            && !self.queues.uses_vector(vector)
        {
            coalescing.forget(vector);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coalescing(thr: u8, time: u8) -> Option<Coalescing> {
        Coalescing::new(InterruptCoalescing::new().with_thr(thr).with_time(time))
    }

    #[test]
    fn without_a_threshold_or_a_time_nothing_is_put_off() {
        for (thr, time) in [(0, 0), (7, 0), (0, 7)] {
            assert!(coalescing(thr, time).is_none());
        }
    }

    #[test]
    fn the_threshold_is_zeroes_based_and_counts_by_vector() {
        let mut coalescing = coalescing(3, 1).expect("both are set");
        let now = Instant::now();
        for _ in 0..2 {
            assert!(!coalescing.add(5, 3, now));
            assert!(!coalescing.add(6, 1, now));
            assert!(coalescing.add(5, 1, now));
            assert!(!coalescing.add(6, 1, now));
            assert!(coalescing.add(6, 9, now));
        }
        assert_eq!(coalescing.first_due(), None);
    }

    #[test]
    fn the_time_runs_from_the_first_completion_on() {
        let mut coalescing = coalescing(9, 2).expect("both are set");
        let start = Instant::now();
        let at = |micros| start + Duration::from_micros(micros);
        assert!(!coalescing.add(5, 1, at(0)));
        assert!(!coalescing.add(6, 1, at(50)));
        assert!(!coalescing.add(5, 1, at(150)));
        assert_eq!(coalescing.first_due(), Some(at(200)));
        assert_eq!(coalescing.take_due(at(199)), None);
        assert_eq!(coalescing.take_due(at(200)), Some(5));
        assert_eq!(coalescing.take_due(at(200)), None);
        assert_eq!(coalescing.first_due(), Some(at(250)));
        assert!(!coalescing.add(5, 1, at(210)));
        coalescing.forget(6);
        assert_eq!(coalescing.first_due(), Some(at(410)));
        assert_eq!(coalescing.take_due(at(1000)), Some(5));
        assert_eq!(coalescing.first_due(), None);
    }
}
