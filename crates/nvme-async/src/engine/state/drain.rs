//! Waiting for everything that was started so far.

use std::task::Waker;

use super::{Aftermath, Failed, Stage, State};

/// Somebody who waits until all commands with lower tickets are done.
pub(super) struct Draining {
    mark: u64,
    waker: Option<Waker>,
}

impl State {
    /// Begins to wait for everything that was started so far; returns the key of that wait.
    pub(crate) fn begin_drain(&mut self) -> usize {
        let mark = self.next_ticket;
        self.drains.insert(Draining { mark, waker: None })
    }

    /// How a drain ended; if it has not, the waker is woken when it may have. Another one is left
    /// in its place.
    pub(crate) fn poll_drain(
        &mut self,
        key: usize,
        waker: &mut Option<Waker>,
    ) -> Option<Result<(), Failed>> {
        let mark = self.drains[key].mark;
        if !self.is_unfinished_before(mark) {
            return Some(Ok(()));
        }
        if let Some(failure) = self.failure {
            // The device may still be working on some of them.
            return Some(Err(failure.told(true)));
        }
        std::mem::swap(&mut self.drains[key].waker, waker);
        None
    }

    /// Ends a drain.
    pub(crate) fn end_drain(&mut self, key: usize) -> Option<Waker> {
        self.drains.remove(key).waker
    }

    pub(super) fn wake_drains(&mut self, aftermath: &mut Aftermath) {
        if self.drains.is_empty() {
            return;
        }
        let mut drains = std::mem::take(&mut self.drains);
        for (_, draining) in &mut drains {
            let is_over = self.failure.is_some() || !self.is_unfinished_before(draining.mark);
            if is_over && let Some(waker) = draining.waker.take() {
                aftermath.wake(waker);
            }
        }
        self.drains = drains;
    }

    pub(super) fn wake_all_drains(&mut self, aftermath: &mut Aftermath) {
        for (_, draining) in &mut self.drains {
            if let Some(waker) = draining.waker.take() {
                aftermath.wake(waker);
            }
        }
    }

    fn is_unfinished_before(&self, mark: u64) -> bool {
        self.operations.iter().any(|operation| {
            operation.ticket < mark && !matches!(operation.stage, Stage::Done(_) | Stage::Over)
        })
    }
}
