//! A device's side of a queue pair, written after the specification (NVMe base specification 2.0,
//! sections 3.3.1 and 4.6.1, "Completion Queue Entry" and "Phase Tag") and not after the driver.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use nvme_spec::{Cqe, Sqe, Status};

use crate::device::DoorbellCall;
use crate::queue::ring::RingDoorbell;

/// Ring memory as the device sees it.
pub(crate) trait Words {
    fn load(&self, index: usize) -> u32;
    fn store(&self, index: usize, value: u32);
}

/// A doorbell register that remembers what was written.
#[derive(Clone, Default)]
pub(crate) struct Register {
    writes: Arc<Mutex<Vec<u32>>>,
}

impl Register {
    pub(crate) fn writes(&self) -> Vec<u32> {
        self.writes.lock().unwrap().clone()
    }
}

impl RingDoorbell for Register {
    fn ring(&self, value: u32) {
        self.writes.lock().unwrap().push(value);
    }
}

impl DoorbellCall for Register {
    fn ring(&self, _: u32, value: u32) {
        self.writes.lock().unwrap().push(value);
    }
}

/// A controller that fetches commands when told and completes them in any order.
pub(crate) struct ModelDevice<W> {
    id: u16,
    entries: u32,
    submission: W,
    completion: W,
    pub(crate) submission_tail: Register,
    pub(crate) completion_head: Register,
    /// How many writes of each register were looked at.
    seen: (usize, usize),
    told_tail: u32,
    head: u32,
    told_head: u32,
    tail: u32,
    phase: bool,
    /// Fetched and not completed.
    pub(crate) fetched: VecDeque<Sqe>,
}

impl<W: Words> ModelDevice<W> {
    pub(crate) fn new(id: u16, entries: u16, submission: W, completion: W) -> Self {
        Self {
            id,
            entries: entries.into(),
            submission,
            completion,
            submission_tail: Register::default(),
            completion_head: Register::default(),
            seen: (0, 0),
            told_tail: 0,
            head: 0,
            told_head: 0,
            tail: 0,
            phase: true,
            fetched: VecDeque::new(),
        }
    }

    /// Looks at the doorbells, and panics where a controller would report an Invalid Doorbell
    /// Write: a value outside of the queue, one that was written before, or one that passes the
    /// other end.
    fn look_at_doorbells(&mut self) {
        let tails = self.submission_tail.writes.lock().unwrap();
        for &tail in &tails[self.seen.0..] {
            assert!(tail < self.entries, "tail {tail} is outside of the queue");
            assert_ne!(tail, self.told_tail, "the same tail was written again");
            let free = self.entries - 1 - self.distance(self.head, self.told_tail);
            assert!(
                self.distance(self.told_tail, tail) <= free,
                "tail {tail} passes the head, {}",
                self.head
            );
            self.told_tail = tail;
        }
        self.seen.0 = tails.len();
        drop(tails);
        let heads = self.completion_head.writes.lock().unwrap();
        for &head in &heads[self.seen.1..] {
            assert!(head < self.entries, "head {head} is outside of the queue");
            assert_ne!(head, self.told_head, "the same head was written again");
            assert!(
                self.distance(self.told_head, head) <= self.distance(self.told_head, self.tail),
                "head {head} passes the tail, {}",
                self.tail
            );
            self.told_head = head;
        }
        self.seen.1 = heads.len();
    }

    /// Fetches at most `limit` commands that the doorbell told of; returns how many.
    pub(crate) fn fetch(&mut self, limit: usize) -> usize {
        self.look_at_doorbells();
        let mut count = 0;
        while count < limit && self.head != self.told_tail {
            let first = self.head as usize * 16;
            let dwords = std::array::from_fn(|i| u32::from_le(self.submission.load(first + i)));
            self.fetched.push_back(Sqe::from_dwords(dwords));
            self.head = (self.head + 1) % self.entries;
            count += 1;
        }
        count
    }

    /// Completes a fetched command with success and returns it, unless the completion queue is
    /// full.
    pub(crate) fn complete(&mut self, index: usize) -> Option<Sqe> {
        self.look_at_doorbells();
        if self.distance(self.told_head, self.tail) == self.entries - 1 {
            return None;
        }
        let sqe = self.fetched.remove(index)?;
        self.post(self.honest(sqe.cid(), Status::SUCCESS));
        Some(sqe)
    }

    /// Fetches and completes all that there is, in order.
    pub(crate) fn work(&mut self) {
        self.fetch(usize::MAX);
        while !self.fetched.is_empty() && self.complete(0).is_some() {}
    }

    /// The entry that completes command `cid`, but for its phase.
    pub(crate) fn honest(&self, cid: u16, status: Status) -> Cqe {
        Cqe::new(cid, status).with_sq(self.id, self.head as u16)
    }

    /// Puts an entry into the completion queue, whatever it says.
    pub(crate) fn post(&mut self, cqe: Cqe) {
        let first = self.tail as usize * 4;
        let dwords = cqe.with_phase(self.phase).dwords();
        for (i, dword) in dwords.into_iter().enumerate() {
            self.completion.store(first + i, dword.to_le());
        }
        self.tail += 1;
        if self.tail == self.entries {
            self.tail = 0;
            self.phase = !self.phase;
        }
    }

    /// Is reset: forgets queue and commands, and is given the queue again.
    pub(crate) fn forget(&mut self) {
        self.look_at_doorbells();
        (self.told_tail, self.head) = (0, 0);
        (self.told_head, self.tail, self.phase) = (0, 0, true);
        self.fetched.clear();
    }

    pub(crate) fn head(&self) -> u16 {
        self.head as u16
    }

    fn distance(&self, from: u32, to: u32) -> u32 {
        (to + self.entries - from) % self.entries
    }
}
