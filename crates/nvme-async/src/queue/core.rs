//! Slots: which commands are outstanding.

use std::time::Instant;

use nvme_spec::{Cqe, Sqe};
use poll_window::{Kind, Situation};

use super::Lie;
use super::ring::{CompletionRing, RingDoorbell, RingMemory, SubmissionRing};

/// After this many entries that the device was not told of, the doorbell is rung at once.
const MAX_DEFERRED: u32 = 16;

/// Whether a command counts as work that somebody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Work: it has a deadline, and while it is outstanding the queue is looked at.
    Foreground(Kind),
    /// An asynchronous event request: outstanding for as long as the controller lives.
    Background,
}

/// One queue pair's slots and rings.
///
/// `T` says whose a command is, and is small: it moves. From [`submit`](Self::submit) until it comes
/// back, once, by [`next_completion`](Self::next_completion) or [`reclaim`](Self::reclaim), the slot
/// has it, and what it refers to may be in use by the device.
pub(crate) struct QueueCore<T, M, D> {
    id: u16,
    submission: SubmissionRing<M, D>,
    completion: CompletionRing<M, D>,
    slots: Vec<Slot<T>>,
    index_bits: u32,
    free: Vec<u16>,
    /// Whether no doorbell may be rung: the device is about to be stopped, or is.
    fenced: bool,
    /// How many foreground commands are outstanding, by kind, those that were given up excepted.
    foreground: [usize; 3],
    lost: usize,
    next_sequence: u64,
    /// The sequence number of the first command that the device was not told of.
    untold: u64,
    /// No foreground command's deadline is earlier than this.
    earliest_deadline: Option<Instant>,
}

/// A place for a command.
struct Slot<T> {
    /// The command identifier of the last command here. The part above the slot's index counts them, so
    /// that a stale or repeated completion of an earlier command is told from a new one.
    cid: u16,
    /// Nothing if the slot is free.
    entry: Option<Entry<T>>,
}

/// A command in its slot.
struct Entry<T> {
    token: T,
    class: Class,
    state: EntryState,
    sequence: u64,
    deadline: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EntryState {
    Submitted,
    /// Its deadline has passed, and the device is being made to let go of it.
    Aborting,
    /// Its deadline has passed and its owner was told so. The device may still use its memory.
    Lost,
}

impl EntryState {
    /// Whether its deadline has passed.
    fn is_overdue(self) -> bool {
        matches!(self, Self::Aborting | Self::Lost)
    }
}

/// A command that the device is done with.
pub(crate) struct Finished<T> {
    pub(crate) token: T,
    pub(crate) cqe: Cqe,
    /// Whether its deadline had passed.
    pub(crate) overdue: bool,
}

/// A command that was taken back from a device that is known to have stopped.
pub(crate) struct Reclaimed<T> {
    pub(crate) token: T,
    /// Whether its deadline had passed.
    pub(crate) overdue: bool,
    /// Whether the device was told of it, so that it may have executed it.
    pub(crate) told: bool,
}

impl<T, M: RingMemory, D: RingDoorbell> QueueCore<T, M, D> {
    /// A queue pair with identifier `id` over two rings of `entries` entries each.
    pub(crate) fn new(
        id: u16,
        entries: u16,
        submission: SubmissionRing<M, D>,
        completion: CompletionRing<M, D>,
    ) -> Self {
        // One entry stays empty, so that a full ring differs from an empty one.
        let capacity = entries - 1;
        Self {
            id,
            submission,
            completion,
            slots: (0..capacity).map(|cid| Slot { cid, entry: None }).collect(),
            index_bits: u16::BITS - entries.saturating_sub(1).leading_zeros(),
            free: (0..capacity).rev().collect(),
            fenced: false,
            foreground: [0; 3],
            lost: 0,
            next_sequence: 0,
            untold: 0,
            earliest_deadline: None,
        }
    }

    /// How many commands can be outstanding.
    pub(crate) fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// How many foreground commands are outstanding, those that were given up excepted.
    #[inline]
    pub(crate) fn in_flight(&self) -> usize {
        self.foreground.iter().sum()
    }

    /// What those who wait for completions wait for, when `others` are outstanding elsewhere.
    pub(crate) fn situation(&self, others: usize) -> Situation {
        let in_flight = self.in_flight() + others;
        // It counts only where a single command is outstanding.
        let kind = [Kind::Read, Kind::Write, Kind::Other]
            .into_iter()
            .find(|&kind| self.foreground[kind as usize] > 0);
        Situation::new(in_flight, kind.unwrap_or(Kind::Other))
    }

    /// How many commands were given up whose slots the device has not returned yet.
    pub(crate) fn lost(&self) -> usize {
        self.lost
    }

    /// Puts a command into the ring and returns its slot, or nothing if all are taken or the queue
    /// pair is fenced.
    ///
    /// The doorbell is rung at once when nothing else is outstanding; otherwise it may be left to
    /// [`ring_deferred`](Self::ring_deferred). Background commands have no deadline.
    #[inline(always)]
    pub(crate) fn submit(
        &mut self,
        sqe: &Sqe,
        token: T,
        class: Class,
        deadline: Option<Instant>,
    ) -> Option<u16> {
        if self.fenced {
            return None;
        }
        let index = self.free.pop()?;
        let alone = self.in_flight() == 0;
        let mut entry = Entry {
            token,
            class,
            state: EntryState::Submitted,
            sequence: self.next_sequence,
            deadline: None,
        };
        if let Class::Foreground(kind) = class {
            self.foreground[kind as usize] += 1;
            if let Some(deadline) = deadline {
                entry.deadline = Some(deadline);
                if self
                    .earliest_deadline
                    .is_none_or(|earliest| deadline < earliest)
                {
                    self.earliest_deadline = Some(deadline);
                }
            }
        }
        self.next_sequence += 1;
        let slot = &mut self.slots[usize::from(index)];
        // Never FFFFh, which stands for "no particular command" in the error log (NVMe base
        // specification 2.0, figure "Command Dword 0"): no slot's index has all bits set.
        slot.cid = slot.cid.wrapping_add((1_u32 << self.index_bits) as u16);
        slot.entry = Some(entry);
        self.submission.push(sqe, slot.cid);
        if alone || self.submission.deferred() >= MAX_DEFERRED {
            self.ring_deferred();
        }
        Some(index)
    }

    /// Tells the device of commands that [`submit`](Self::submit) did not tell it of.
    pub(crate) fn ring_deferred(&mut self) -> bool {
        if self.fenced {
            return false;
        }
        self.untold = self.next_sequence;
        self.submission.ring()
    }

    /// Whether there are commands that the device has not been told of, and may be.
    #[inline]
    pub(crate) fn has_deferred(&self) -> bool {
        !self.fenced && self.submission.deferred() > 0
    }

    /// Whether the device has completed something that was not taken yet.
    pub(crate) fn completion_ready(&self) -> bool {
        self.completion.ready()
    }

    /// Takes the next completion, if there is one.
    #[inline]
    pub(crate) fn next_completion(&mut self) -> Option<Result<Finished<T>, Lie>> {
        let cqe = self.completion.pop()?;
        Some(self.finish(cqe))
    }

    /// Tells the device which completions were taken.
    pub(crate) fn acknowledge(&mut self) -> bool {
        !self.fenced && self.completion.acknowledge()
    }

    /// The moment before which no deadline passes.
    pub(crate) fn earliest_deadline(&self) -> Option<Instant> {
        self.earliest_deadline.filter(|_| self.in_flight() > 0)
    }

    /// Finds commands whose deadline has passed, once each, and calls `overdue` with slot and command
    /// identifier. They are still outstanding.
    pub(crate) fn expire(&mut self, now: Instant, mut overdue: impl FnMut(u16, u16)) {
        if self.earliest_deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        let mut earliest: Option<Instant> = None;
        for (index, slot) in (0..).zip(&mut self.slots) {
            let entry = slot.entry.as_mut();
            let Some(entry) = entry.filter(|entry| !entry.state.is_overdue()) else {
                continue;
            };
            let Some(deadline) = entry.deadline else {
                continue;
            };
            if now < deadline {
                earliest = Some(earliest.map_or(deadline, |earliest| earliest.min(deadline)));
                continue;
            }
            entry.state = EntryState::Aborting;
            overdue(index, slot.cid);
        }
        self.earliest_deadline = earliest;
    }

    /// Gives up an overdue command, for lack of anybody who could make the device let go of it. Its
    /// slot stays taken.
    pub(crate) fn give_up(&mut self, slot: u16) -> Option<&T> {
        let entry = self.slots[usize::from(slot)].entry.as_mut()?;
        if entry.state != EntryState::Aborting {
            return None;
        }
        if let Class::Foreground(kind) = entry.class {
            self.foreground[kind as usize] -= 1;
        }
        self.lost += 1;
        entry.state = EntryState::Lost;
        Some(&entry.token)
    }

    /// Whether the command with this identifier is overdue and outstanding.
    pub(crate) fn is_overdue(&self, cid: u16) -> bool {
        self.outstanding(cid)
            .and_then(|index| self.slots[usize::from(index)].entry.as_ref())
            .is_some_and(|entry| entry.state == EntryState::Aborting)
    }

    /// Forbids all doorbells from now on.
    pub(crate) fn fence(&mut self) {
        self.fenced = true;
    }

    /// Whether doorbells are forbidden.
    pub(crate) fn is_fenced(&self) -> bool {
        self.fenced
    }

    /// Takes back all commands from a device that has stopped, oldest first.
    pub(crate) fn reclaim(&mut self) -> Vec<Reclaimed<T>> {
        self.earliest_deadline = None;
        self.take_back(|_| true)
    }

    /// Takes back the commands that the device was not told of and won't be, oldest first.
    pub(crate) fn reclaim_untold(&mut self) -> Vec<Reclaimed<T>> {
        let untold = self.untold;
        self.take_back(|entry| entry.sequence >= untold)
    }

    fn take_back(&mut self, wanted: impl Fn(&Entry<T>) -> bool) -> Vec<Reclaimed<T>> {
        let mut reclaimed = Vec::new();
        for (index, slot) in (0..).zip(&mut self.slots) {
            let Some(entry) = slot.entry.take_if(|entry| wanted(entry)) else {
                continue;
            };
            if entry.state == EntryState::Lost {
                self.lost -= 1;
            } else if let Class::Foreground(kind) = entry.class {
                self.foreground[kind as usize] -= 1;
            }
            self.free.push(index);
            let told = entry.sequence < self.untold;
            let sequence = entry.sequence;
            reclaimed.push((
                sequence,
                Reclaimed {
                    token: entry.token,
                    overdue: entry.state.is_overdue(),
                    told,
                },
            ));
        }
        reclaimed.sort_unstable_by_key(|(sequence, _)| *sequence);
        reclaimed
            .into_iter()
            .map(|(_, reclaimed)| reclaimed)
            .collect()
    }

    /// Begins anew with empty rings, for a queue pair that the device is about to be given again.
    /// All commands were taken back before, and doorbells stay forbidden.
    pub(crate) fn restart(&mut self) {
        debug_assert!(self.fenced && self.free.len() == self.slots.len());
        self.submission.restart();
        self.completion.restart();
        self.untold = self.next_sequence;
    }

    /// Allows doorbells again, for rings that the device knows.
    pub(crate) fn unfence(&mut self) {
        self.fenced = false;
    }

    /// The tokens of what is outstanding, of commands that were given up too.
    #[cfg(test)]
    pub(crate) fn tokens(&self) -> impl Iterator<Item = &T> {
        let entries = self.slots.iter().flat_map(|slot| &slot.entry);
        entries.map(|entry| &entry.token)
    }

    /// How often the submission queue's doorbell was rung.
    pub(crate) fn submission_doorbells(&self) -> u64 {
        self.submission.doorbells()
    }

    /// How often the completion queue's doorbell was rung.
    pub(crate) fn completion_doorbells(&self) -> u64 {
        self.completion.doorbells()
    }

    /// How many doorbell values the device did not want to have in a register.
    pub(crate) fn unwritten_doorbells(&self) -> u64 {
        self.submission.doorbell().unwritten() + self.completion.doorbell().unwritten()
    }

    /// The identifier of the queue pair.
    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    #[inline]
    fn finish(&mut self, cqe: Cqe) -> Result<Finished<T>, Lie> {
        if cqe.sq_id() != self.id {
            return Err(Lie::WrongQueue {
                submission_queue: cqe.sq_id(),
            });
        }
        let cid = cqe.cid();
        let unknown = Lie::UnknownCommand { cid };
        let index = self.outstanding(cid).ok_or(unknown)?;
        if !self.submission.advance_head(cqe.sq_head()) {
            return Err(Lie::SubmissionHead {
                head: cqe.sq_head(),
            });
        }
        let slot = &mut self.slots[usize::from(index)];
        let entry = slot.entry.take().ok_or(unknown)?;
        if entry.state == EntryState::Lost {
            self.lost -= 1;
        } else if let Class::Foreground(kind) = entry.class {
            self.foreground[kind as usize] -= 1;
        }
        self.free.push(index);
        Ok(Finished {
            token: entry.token,
            cqe,
            overdue: entry.state.is_overdue(),
        })
    }

    /// The slot of the command that has this identifier and that the device was told of.
    #[inline]
    fn outstanding(&self, cid: u16) -> Option<u16> {
        let index = (u32::from(cid) & ((1 << self.index_bits) - 1)) as u16;
        let slot = self.slots.get(usize::from(index))?;
        let entry = slot.entry.as_ref()?;
        (slot.cid == cid && entry.sequence < self.untold).then_some(index)
    }
}
