//! Rings and doorbells.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use nvme_spec::registers::offset;
use nvme_spec::{Cqe, Sqe};

use super::{Event, Model};
use crate::recovery::tests::faults::Fault;
use crate::recovery::tests::memory::Owner;

/// A queue pair that the host has told of, or the completion queue of one.
pub(super) struct Pair {
    pub(super) entries: u32,
    pub(super) submission: Option<u64>,
    pub(super) completion: u64,
    pub(super) head: u32,
    pub(super) told_tail: u32,
    /// What the host wrote last, whether or not it arrived.
    pub(super) written_tail: u32,
    pub(super) written_head: u32,
    pub(super) told_head: u32,
    pub(super) tail: u32,
    pub(super) phase: bool,
    /// Entries for which there is no room.
    pub(super) waiting: VecDeque<Cqe>,
    pub(super) last_posted: Option<Cqe>,
    pub(super) completed: Vec<u16>,
    pub(super) vector: bool,
    /// Counts creations of this queue pair.
    pub(super) epoch: u32,
}

impl Pair {
    pub(super) fn distance(&self, from: u32, to: u32) -> u32 {
        (to + self.entries - from) % self.entries
    }

    pub(super) fn is_full(&self) -> bool {
        self.distance(self.told_head, self.tail) == self.entries - 1
    }
}

impl Model {
    /// A word of a ring.
    pub(super) fn ring_word(&mut self, iova: u64) -> Option<u32> {
        let word = self
            .memory
            .word(iova)
            .map(|word| word.load(Ordering::Relaxed));
        if word.is_none() || self.ledger.owner(iova) != Owner::Rings {
            self.violate(format!("a ring's entry at {iova:#x} is no ring memory"));
        }
        word
    }

    /// Puts an entry into a completion queue, or keeps it until there is room.
    pub(super) fn post(&mut self, queue: u16, cqe: Cqe) {
        let lost = queue != 0 && self.strikes(Fault::LostInterrupt);
        let Some(pair) = &mut self.pairs[usize::from(queue)] else {
            return;
        };
        if pair.is_full() {
            pair.waiting.push_back(cqe);
            return;
        }
        let cqe = cqe.with_phase(pair.phase);
        let at = pair.completion + u64::from(pair.tail) * 16;
        pair.last_posted = Some(cqe);
        pair.tail += 1;
        if pair.tail == pair.entries {
            pair.tail = 0;
            pair.phase = !pair.phase;
        }
        let interrupts = pair.vector && !lost;
        self.store_entry(at, cqe);
        if interrupts {
            let after = self.rng.u64(1..30);
            self.schedule(after, Event::Interrupt(queue));
        }
    }

    pub(super) fn store_entry(&mut self, at: u64, cqe: Cqe) {
        if self.ring_word(at).is_none() {
            return;
        }
        for (index, dword) in cqe.dwords().into_iter().enumerate() {
            if let Some(word) = self.memory.word(at + index as u64 * 4) {
                word.store(dword.to_le(), Ordering::Release);
            }
        }
    }

    /// The host has written a doorbell.
    pub(super) fn doorbell(&mut self, offset: u32, value: u32) {
        let index = offset.wrapping_sub(offset::DOORBELLS) / 4;
        let queue = (index / 2) as u16;
        let is_head = index % 2 == 1;
        let what = if is_head { "head" } else { "tail" };
        if self.closed || !self.host.ready {
            return self.violate(format!(
                "{what} {value} of queue {queue} was rung while the controller is disabled"
            ));
        }
        if self.host.tails[usize::from(queue)].is_none() {
            return self.violate(format!(
                "{what} {value} was rung of queue {queue}, which does not exist"
            ));
        }
        if !is_head {
            self.note_told(queue, value);
        }
        self.check_shadow(queue, index, value);
        let lost = queue != 0
            && self.strikes(if is_head {
                Fault::LostHead
            } else {
                Fault::LostTail
            });
        // It may have lost its state without the host knowing.
        let Some(pair) = &mut self.pairs[usize::from(queue)] else {
            return;
        };
        let (written, limit, reach) = if is_head {
            let reach = pair.distance(pair.written_head, pair.tail);
            (&mut pair.written_head, pair.entries, reach)
        } else {
            let used = pair.distance(pair.head, pair.written_tail);
            (
                &mut pair.written_tail,
                pair.entries,
                pair.entries - 1 - used,
            )
        };
        let before = std::mem::replace(written, value);
        let moved = (value + limit - before) % limit;
        if value >= limit || moved == 0 || moved > reach {
            return self.violate(format!(
                "{what} {value} of queue {queue} after {before}, where at most {reach} are allowed"
            ));
        }
        if lost {
            return;
        }
        if is_head {
            pair.told_head = value;
            self.post_waiting(queue);
        } else {
            pair.told_tail = value;
            self.fetch(queue);
        }
    }

    /// What the host writes to a register it has left in memory before. It is asked for the next one too.
    fn check_shadow(&mut self, queue: u16, index: u32, value: u32) {
        let Some((values, event_indices)) = self.doorbell_buffers.filter(|_| queue > 0) else {
            return;
        };
        let word = self.memory.word(values + u64::from(index) * 4);
        let shadow = word.map(|word| u32::from_le(word.load(Ordering::Acquire)));
        if shadow != Some(value) {
            self.violate(format!(
                "doorbell {value} of queue {queue} is {shadow:?} in memory"
            ));
        }
        if let Some(word) = self.memory.word(event_indices + u64::from(index) * 4) {
            word.store(value.to_le(), Ordering::SeqCst);
        }
    }

    /// Notes what the host has told of in memory alone. It is not asked for the register by a controller
    /// that has lost its state.
    pub(in crate::recovery::tests) fn note_shadows(&mut self) {
        let Some(values) = self.shadows else {
            return;
        };
        for queue in 1..self.layouts.len() as u16 {
            let word = self.memory.word(values + u64::from(queue) * 8);
            let shadow = word.map(|word| u32::from_le(word.load(Ordering::Acquire)));
            if let (Some(told), Some(shadow)) = (self.host.tails[usize::from(queue)], shadow)
                && told != shadow
            {
                self.note_told(queue, shadow);
            }
        }
    }

    /// Notes the operations that a tail tells of, whether or not it arrives.
    pub(super) fn note_told(&mut self, queue: u16, tail: u32) {
        let layout = self.layouts[usize::from(queue)];
        let Some(mut index) = self.host.tails[usize::from(queue)].replace(tail) else {
            return;
        };
        let now = (self.micros(), self.allowance_so_far());
        while index != tail && tail < layout.entries.into() {
            let word = self
                .memory
                .word(layout.submission + u64::from(index) * 64 + 8);
            let number = word.map_or(0, |word| u32::from_le(word.load(Ordering::Relaxed)));
            let number = number as usize;
            if number >= self.told.len() {
                self.told.resize(number + 1, None);
            }
            self.told[number].get_or_insert(now);
            index = (index + 1) % u32::from(layout.entries);
        }
    }

    pub(super) fn post_waiting(&mut self, queue: u16) {
        while let Some(pair) = &mut self.pairs[usize::from(queue)]
            && !pair.is_full()
            && let Some(cqe) = pair.waiting.pop_front()
        {
            self.post(queue, cqe);
        }
    }

    pub(super) fn fetch(&mut self, queue: u16) {
        while self.works()
            && let Some(pair) = &mut self.pairs[usize::from(queue)]
            && let Some(submission) = pair.submission
            && pair.head != pair.told_tail
        {
            let at = submission + u64::from(pair.head) * 64;
            pair.head = (pair.head + 1) % pair.entries;
            let mut dwords = [0; 16];
            for (index, dword) in dwords.iter_mut().enumerate() {
                let word = if index == 0 {
                    self.ring_word(at)
                } else {
                    let word = self.memory.word(at + index as u64 * 4);
                    word.map(|word| word.load(Ordering::Relaxed))
                };
                *dword = u32::from_le(word.unwrap_or_default());
            }
            self.take(queue, Sqe::from_dwords(dwords));
        }
    }
}
