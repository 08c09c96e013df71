//! Submission and completion rings in memory that the device may change at any time.

use std::sync::atomic::{AtomicU32, Ordering};

use nvme_spec::{Cqe, Sqe};
use zerocopy::IntoBytes;

use crate::memory::DmaWords;

/// Ring memory as 32-bit little-endian words.
///
/// The device reads and writes it concurrently, so it is only ever seen one atomic word at a
/// time.
pub(crate) trait RingMemory {
    /// The words, at least as many as the ring has entries times words per entry.
    fn words(&self) -> &[AtomicU32];
}

impl RingMemory for DmaWords {
    fn words(&self) -> &[AtomicU32] {
        self.as_ref()
    }
}

/// A doorbell register.
pub(crate) trait RingDoorbell {
    /// Writes the register, after everything that was written to memory before.
    fn ring(&self, value: u32);

    /// The device forgot the queue, whose next value counts from 0 again.
    fn restart(&self) {}

    /// How many values the device did not want to have in the register.
    fn unwritten(&self) -> u64 {
        0
    }
}

const SQE_WORDS: usize = 16;
const CQE_WORDS: usize = 4;

/// The host's side of a submission queue.
pub(crate) struct SubmissionRing<M, D> {
    memory: M,
    doorbell: D,
    entries: u32,
    tail: u32,
    /// The tail that the device was last told.
    rung: u32,
    /// How often it was told.
    doorbells: u64,
    /// The head that the device last reported.
    head: u32,
}

impl<M: RingMemory, D: RingDoorbell> SubmissionRing<M, D> {
    /// A ring of `entries` entries in zeroed memory.
    pub(crate) fn new(memory: M, doorbell: D, entries: u16) -> Self {
        assert!(
            memory.words().len() >= usize::from(entries) * SQE_WORDS,
            "ring memory too small"
        );
        Self {
            memory,
            doorbell,
            entries: entries.into(),
            tail: 0,
            rung: 0,
            doorbells: 0,
            head: 0,
        }
    }

    /// Writes `sqe`, with this command identifier, at the tail, without telling the device.
    ///
    /// The caller keeps no more than `entries - 1` commands outstanding, so the entry is free.
    #[inline]
    pub(crate) fn push(&mut self, sqe: &Sqe, cid: u16) {
        let first = self.tail as usize * SQE_WORDS;
        let words = &self.memory.words()[first..first + SQE_WORDS];
        let [cdw0, ..] = sqe.with_cid(cid).dwords();
        words[0].store(cdw0.to_le(), Ordering::Relaxed);
        // As they lie in memory, which is how the device reads them.
        let (dwords, _) = sqe.as_bytes().as_chunks();
        for (word, bytes) in words.iter().zip(dwords).skip(1) {
            word.store(u32::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
        self.tail = self.next(self.tail);
    }

    /// How many entries the device has not been told of.
    pub(crate) fn deferred(&self) -> u32 {
        self.distance(self.rung, self.tail)
    }

    /// Tells the device of all entries; returns whether there was anything to tell.
    pub(crate) fn ring(&mut self) -> bool {
        if self.rung == self.tail {
            return false;
        }
        self.doorbell.ring(self.tail);
        self.rung = self.tail;
        self.doorbells += 1;
        true
    }

    /// Begins anew, for a device that forgot the ring.
    pub(crate) fn restart(&mut self) {
        self.doorbell.restart();
        (self.tail, self.rung, self.head) = (0, 0, 0);
    }

    /// The doorbell.
    pub(crate) fn doorbell(&self) -> &D {
        &self.doorbell
    }

    /// How often the doorbell was rung.
    pub(crate) fn doorbells(&self) -> u64 {
        self.doorbells
    }

    /// Takes the head from a completion; `false` if the device can't have got there.
    #[inline]
    pub(crate) fn advance_head(&mut self, head: u16) -> bool {
        let head = u32::from(head);
        if head >= self.entries
            || self.distance(self.head, head) > self.distance(self.head, self.rung)
        {
            return false;
        }
        self.head = head;
        true
    }

    fn next(&self, index: u32) -> u32 {
        if index + 1 == self.entries {
            0
        } else {
            index + 1
        }
    }

    #[inline]
    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from {
            to - from
        } else {
            to + self.entries - from
        }
    }
}

/// The host's side of a completion queue.
pub(crate) struct CompletionRing<M, D> {
    memory: M,
    doorbell: D,
    entries: u32,
    head: u32,
    phase: bool,
    /// The head that the device was last told.
    acknowledged: u32,
    /// How often it was told.
    doorbells: u64,
}

impl<M: RingMemory, D: RingDoorbell> CompletionRing<M, D> {
    /// A ring of `entries` entries in zeroed memory.
    pub(crate) fn new(memory: M, doorbell: D, entries: u16) -> Self {
        assert!(
            memory.words().len() >= usize::from(entries) * CQE_WORDS,
            "ring memory too small"
        );
        Self {
            memory,
            doorbell,
            entries: entries.into(),
            head: 0,
            phase: true,
            acknowledged: 0,
            doorbells: 0,
        }
    }

    /// The doorbell.
    pub(crate) fn doorbell(&self) -> &D {
        &self.doorbell
    }

    /// Whether the entry at the head is new.
    pub(crate) fn ready(&self) -> bool {
        let last = self.memory.words()[self.head as usize * CQE_WORDS + 3].load(Ordering::Relaxed);
        self.is_new(last)
    }

    /// Takes the entry at the head, if it is new.
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<Cqe> {
        let first = self.head as usize * CQE_WORDS;
        let words = &self.memory.words()[first..first + CQE_WORDS];
        // The dword with the phase bit first, with Acquire: only after it are the others known to
        // be those of this entry. Each word is read once, into a private copy.
        let last = words[3].load(Ordering::Acquire);
        if !self.is_new(last) {
            return None;
        }
        let cqe = Cqe::from_dwords([
            u32::from_le(words[0].load(Ordering::Relaxed)),
            u32::from_le(words[1].load(Ordering::Relaxed)),
            u32::from_le(words[2].load(Ordering::Relaxed)),
            u32::from_le(last),
        ]);
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase = !self.phase;
        }
        Some(cqe)
    }

    /// Tells the device which entries were taken; returns whether there was anything to tell.
    ///
    /// The register is written only with a new value: writing the same head again is an Invalid
    /// Doorbell Write, from which a queue recovers only by being created anew.
    pub(crate) fn acknowledge(&mut self) -> bool {
        if self.head == self.acknowledged {
            return false;
        }
        self.doorbell.ring(self.head);
        self.acknowledged = self.head;
        self.doorbells += 1;
        true
    }

    /// How often the doorbell was rung.
    pub(crate) fn doorbells(&self) -> u64 {
        self.doorbells
    }

    /// Begins anew, for a device that forgot the ring: no old entry may pass for a new one.
    pub(crate) fn restart(&mut self) {
        for word in self.memory.words() {
            word.store(0, Ordering::Relaxed);
        }
        self.doorbell.restart();
        (self.head, self.acknowledged, self.phase) = (0, 0, true);
    }

    #[inline]
    fn is_new(&self, last_word: u32) -> bool {
        (u32::from_le(last_word) & 1 << 16 != 0) == self.phase
    }
}
