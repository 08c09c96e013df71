//! A queue core and a model device over the same rings, in virtual time.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nvme_spec::{Sqe, nvm};
use poll_window::Kind;

use super::device::{ModelDevice, Register, Words};
use crate::queue::ring::RingMemory;
use crate::queue::{Class, CompletionRing, Finished, Lie, QueueCore, SubmissionRing};

pub(super) const ID: u16 = 3;

#[derive(Clone)]
pub(super) struct Shared(Arc<Vec<AtomicU32>>);

impl Shared {
    fn new(words: usize) -> Self {
        Self(Arc::new((0..words).map(|_| AtomicU32::new(0)).collect()))
    }
}

impl RingMemory for Shared {
    fn words(&self) -> &[AtomicU32] {
        &self.0
    }
}

impl Words for Shared {
    fn load(&self, index: usize) -> u32 {
        self.0[index].load(Ordering::Relaxed)
    }

    fn store(&self, index: usize, value: u32) {
        self.0[index].store(value, Ordering::Relaxed);
    }
}

/// Stands for a command: `alive` holds the numbers of those whose token was not dropped.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) number: u32,
    alive: Rc<RefCell<BTreeSet<u32>>>,
}

impl Drop for Token {
    fn drop(&mut self) {
        assert!(self.alive.borrow_mut().remove(&self.number));
    }
}

pub(super) struct Pair {
    pub(super) host: QueueCore<Token, Shared, Register>,
    pub(super) device: ModelDevice<Shared>,
    pub(super) now: Instant,
    pub(super) alive: Rc<RefCell<BTreeSet<u32>>>,
    next_number: u32,
}

impl Pair {
    pub(super) fn new(entries: u16) -> Self {
        let submission = Shared::new(usize::from(entries) * 16);
        let completion = Shared::new(usize::from(entries) * 4);
        let device = ModelDevice::new(ID, entries, submission.clone(), completion.clone());
        let host = QueueCore::new(
            ID,
            entries,
            SubmissionRing::new(submission, device.submission_tail.clone(), entries),
            CompletionRing::new(completion, device.completion_head.clone(), entries),
        );
        Self {
            host,
            device,
            now: Instant::now(),
            alive: Rc::default(),
            next_number: 0,
        }
    }

    /// The command with this number, as it should arrive but for its identifier.
    pub(super) fn command(number: u32) -> Sqe {
        nvm::read(1, number.into(), number % 7 + 1, false)
    }

    /// Submits the next command; returns its number and slot if there was a free one.
    pub(super) fn submit(&mut self, class: Class, after: Option<Duration>) -> Option<(u32, u16)> {
        let number = self.next_number;
        self.alive.borrow_mut().insert(number);
        let token = Token {
            number,
            alive: self.alive.clone(),
        };
        let deadline = after.map(|after| self.now + after);
        let submitted = self
            .host
            .submit(&Self::command(number), token, class, deadline);
        let slot = submitted?;
        self.next_number += 1;
        Some((number, slot))
    }

    /// As [`submit`](Self::submit), for work without a deadline when there is a free slot.
    pub(super) fn start(&mut self) -> (u32, u16) {
        self.submit(Class::Foreground(Kind::Read), None)
            .expect("a slot is free")
    }

    pub(super) fn next(&mut self) -> Option<Result<Finished<Token>, Lie>> {
        self.host.next_completion()
    }

    /// The number of the command that the next completion is for.
    pub(super) fn next_number(&mut self) -> u32 {
        match self.next() {
            Some(Ok(finished)) => finished.token.number,
            Some(Err(lie)) => panic!("{lie}"),
            None => panic!("nothing was completed"),
        }
    }

    /// The lie that the next completion is.
    pub(super) fn next_lie(&mut self) -> Lie {
        match self.next() {
            Some(Err(lie)) => lie,
            Some(Ok(finished)) => panic!("believed: {:?}", finished.cqe),
            None => panic!("nothing was completed"),
        }
    }

    /// Gives up what is late at `now`; returns the numbers.
    pub(super) fn give_up_late(&mut self, now: Instant) -> Vec<u32> {
        let mut late = Vec::new();
        self.host.expire(now, |slot, _| late.push(slot));
        late.into_iter()
            .filter_map(|slot| self.host.give_up(slot).map(|token| token.number))
            .collect()
    }

    pub(super) fn alive(&self) -> usize {
        self.alive.borrow().len()
    }
}
