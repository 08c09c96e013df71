//! Queue pairs for handles that are kept apart from others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Controller;
use crate::engine::SharedQueue;

/// For each queue pair that all threads share, how many handles are pinned to it.
pub(crate) struct Pins(Box<[AtomicUsize]>);

impl Pins {
    pub(crate) fn new(queues: usize) -> Self {
        Self((0..queues).map(|_| AtomicUsize::new(0)).collect())
    }

    /// Counts one more for a queue pair that has the fewest.
    fn take(&self) -> usize {
        loop {
            let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
            let (count, index) = counts
                .zip(0..)
                .min()
                .expect("a controller has at least one queue");
            let others = &self.0[index];
            let taken =
                others.compare_exchange(count, count + 1, Ordering::Relaxed, Ordering::Relaxed);
            if taken.is_ok() {
                return index;
            }
        }
    }
}

/// The queue pair that a handle and its clones are pinned to.
pub(super) struct PinnedQueue {
    controller: Controller,
    index: usize,
    /// How many commands can be outstanding on it.
    depth: usize,
}

impl PinnedQueue {
    pub(super) fn new(controller: Controller) -> Arc<Self> {
        let index = controller.inner.pins.take();
        let depth = depth(&controller.inner.queues[index]);
        Arc::new(Self {
            controller,
            index,
            depth,
        })
    }

    /// All that its commands are sent to.
    pub(super) fn queues(&self) -> &[Arc<SharedQueue>] {
        &self.controller.inner.queues[self.index..=self.index]
    }

    /// The share of its depth that each has that is pinned to the queue pair.
    pub(super) fn fair_depth(&self) -> usize {
        let sharers = self.controller.inner.pins.0[self.index].load(Ordering::Relaxed);
        (self.depth / sharers).max(1)
    }
}

/// How many commands can be outstanding on a queue pair.
pub(super) fn depth(queue: &SharedQueue) -> usize {
    queue.with(|state| state.depth()).unwrap_or(0)
}

impl Drop for PinnedQueue {
    fn drop(&mut self) {
        self.controller.inner.pins.0[self.index].fetch_sub(1, Ordering::Relaxed);
    }
}
