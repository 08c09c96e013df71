//! What a controller says that it may not say.

use std::sync::atomic::Ordering;

use nvme_spec::{Cqe, Status};

use super::{Event, Model, Sabotage};
use crate::recovery::tests::faults::Fault;

pub(super) const PHASE: u32 = 1 << 16;

impl Model {
    /// Tells a lie on some queue, if that is possible at the moment.
    pub(super) fn lie(&mut self, kind: Fault) -> bool {
        if !self.works() {
            return false;
        }
        let queue = self.rng.u16(0..=self.traits.queues);
        let outstanding = self.commands.iter().flatten();
        let mut outstanding = outstanding.filter(|command| command.queue == queue);
        let outstanding = outstanding.next().map(|command| command.sqe.cid());
        let Some(pair) = &self.pairs[usize::from(queue)] else {
            return false;
        };
        if pair.is_full() || !pair.waiting.is_empty() {
            return false;
        }
        let honest = |cid| Cqe::new(cid, Status::SUCCESS).with_sq(queue, pair.head as u16);
        let cqe = match kind {
            // No command has this one, which stands for none (base specification 2.0, figure
            // "Command Dword 0").
            Fault::LieUnknownCommand => Some(honest(0xffff)),
            Fault::LieDuplicate => pair.last_posted,
            Fault::LieStale => {
                let old = pair.completed.len().checked_sub(pair.entries as usize + 1);
                old.map(|index| honest(pair.completed[index]))
            }
            Fault::LieWrongQueue => outstanding.map(|cid| honest(cid).with_sq(queue + 1, 0)),
            Fault::LieSubmissionHead => {
                outstanding.map(|cid| honest(cid).with_sq(queue, pair.entries as u16 + 1))
            }
            _ => return self.flip_phase(queue),
        };
        if let Some(cqe) = cqe {
            self.post(queue, cqe);
        }
        cqe.is_some()
    }

    /// Lets the entry after the last one pass for a new one, for a moment.
    fn flip_phase(&mut self, queue: u16) -> bool {
        let Some(pair) = &self.pairs[usize::from(queue)] else {
            return false;
        };
        let (index, phase, epoch) = (pair.tail, pair.phase, pair.epoch);
        self.set_phase(queue, index, phase);
        let after = self.rng.u64(1..200);
        let event = Event::PhaseBack {
            queue,
            index,
            phase,
            epoch,
        };
        self.schedule(after, event);
        self.schedule(0, Event::Interrupt(queue));
        true
    }

    pub(super) fn phase_back(&mut self, queue: u16, index: u32, phase: bool, epoch: u32) {
        let pair = self.pairs[usize::from(queue)].as_ref();
        // Otherwise it was overwritten meanwhile, or the ring is another one.
        let is_there =
            |pair: &super::Pair| pair.epoch == epoch && (pair.tail, pair.phase) == (index, phase);
        if pair.is_some_and(is_there) {
            self.set_phase(queue, index, !phase);
        }
    }

    fn set_phase(&mut self, queue: u16, index: u32, phase: bool) {
        let Some(pair) = &self.pairs[usize::from(queue)] else {
            return;
        };
        let at = pair.completion + u64::from(index) * 16 + 12;
        if let Some(word) = self.memory.word(at) {
            let bits = u32::from_le(word.load(Ordering::Relaxed));
            let bits = if phase { bits | PHASE } else { bits & !PHASE };
            word.store(bits.to_le(), Ordering::Relaxed);
        }
    }

    /// Remembers what is in the rings that the host gives up, for [`restore_ring`](Self::restore_ring).
    pub(super) fn keep_rings(&mut self) {
        if self.sabotage != Some(Sabotage::StaleRings) {
            return;
        }
        for pair in self.pairs.iter().flatten() {
            let words = (0..u64::from(pair.entries) * 4).map(|index| {
                let word = self.memory.word(pair.completion + index * 4);
                word.map_or(0, |word| word.load(Ordering::Relaxed))
            });
            let words = words.collect();
            self.old_rings.retain(|(at, _)| *at != pair.completion);
            self.old_rings.push((pair.completion, words));
        }
    }

    /// Undoes that the host has emptied a ring.
    pub(super) fn restore_ring(&mut self, completion: u64) {
        let old = self.old_rings.iter().find(|(at, _)| *at == completion);
        let old = old.map(|(_, words)| words.as_slice()).unwrap_or_default();
        for (index, value) in old.iter().enumerate() {
            if let Some(word) = self.memory.word(completion + index as u64 * 4) {
                word.store(*value, Ordering::Relaxed);
            }
        }
    }
}
