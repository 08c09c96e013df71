//! Submission and completion queues as the controller keeps them
//! (base specification 2.0, section 3.3.1).

mod listen;
mod posted;

use std::collections::VecDeque;

use nvme_spec::{Cqe, Sqe, Status};
use zerocopy::IntoBytes;

pub(super) use self::posted::Posted;
use crate::dma::Dma;
use crate::doorbells::HostDoorbells;
use crate::fault::{Change, CompletionField};

const SQE_SIZE: u64 = 64;
const CQE_SIZE: u64 = 16;
/// Where the dword with status and phase is in an entry.
const STATUS_OFFSET: u64 = 4 * Cqe::STATUS_DWORD as u64;

/// Host memory that a queue could not reach, or a doorbell value that it could not have.
pub(crate) enum QueueError {
    /// The controller cannot go on.
    HostMemory,
    /// The write had no effect.
    InvalidDoorbell,
}

/// Commands that the controller has fetched and not completed.
///
/// One bit for each identifier, because the specification lets a host use them all.
struct Outstanding(Box<[u64; 1024]>);

impl Outstanding {
    fn new() -> Self {
        Self(Box::new([0; 1024]))
    }

    /// Returns whether the identifier was free.
    fn insert(&mut self, cid: u16) -> bool {
        let word = &mut self.0[usize::from(cid / 64)];
        let bit = 1 << (cid % 64);
        let free = *word & bit == 0;
        *word |= bit;
        free
    }

    fn remove(&mut self, cid: u16) {
        self.0[usize::from(cid / 64)] &= !(1 << (cid % 64));
    }
}

/// One submission queue.
pub(crate) struct SubmissionQueue {
    address: u64,
    entries: u32,
    head: u32,
    /// Where the host's entries end, as far as its doorbell was believed.
    tail: u32,
    /// The doorbell's value when it was last looked at.
    doorbell: u32,
    pub(crate) completion_queue: u16,
    outstanding: Outstanding,
}

impl SubmissionQueue {
    /// Whether the host has rung for entries that were not fetched yet.
    pub(crate) fn has_work(&self, id: u16, doorbells: &HostDoorbells) -> bool {
        self.has_entries() || doorbells.submission_tail(id) != Ok(self.doorbell)
    }

    /// Whether there are entries to be fetched, as far as the controller knows.
    pub(crate) fn has_entries(&self) -> bool {
        self.head != self.tail
    }

    /// Takes note of the doorbell.
    pub(crate) fn look(&mut self, id: u16, doorbells: &HostDoorbells) -> Result<(), QueueError> {
        let value = doorbells
            .submission_tail(id)
            .map_err(|_| QueueError::HostMemory)?;
        if value == self.doorbell {
            return Ok(());
        }
        self.doorbell = value;
        if value >= self.entries {
            return Err(QueueError::InvalidDoorbell);
        }
        let added = distance(self.tail, value, self.entries);
        let used = distance(self.head, self.tail, self.entries);
        if used + added >= self.entries {
            return Err(QueueError::InvalidDoorbell);
        }
        self.tail = value;
        Ok(())
    }

    /// Fetches as many entries as there are and as `into` holds; returns how many.
    pub(crate) fn fetch(&mut self, dma: &Dma, into: &mut [Sqe]) -> Result<usize, QueueError> {
        // Up to the end of the ring; the rest comes with the next call.
        let available = if self.tail >= self.head {
            self.tail
        } else {
            self.entries
        } - self.head;
        let count = (available as usize).min(into.len());
        if count > 0 {
            let address = self.address + u64::from(self.head) * SQE_SIZE;
            dma.read(address, into[..count].as_mut_bytes())
                .map_err(|_| QueueError::HostMemory)?;
            self.head = (self.head + count as u32) % self.entries;
        }
        Ok(count)
    }

    /// Notes a fetched command; returns false if its identifier is in use.
    pub(crate) fn begin(&mut self, cid: u16) -> bool {
        self.outstanding.insert(cid)
    }
}

/// A completion that is not posted yet.
#[derive(Clone, Copy)]
pub(crate) struct Completion {
    pub(crate) submission_queue: u16,
    pub(crate) cid: u16,
    pub(crate) status: Status,
    pub(crate) result: u32,
    /// Whether the identifier is free once this is posted. It is not when the command was refused
    /// because another one uses it.
    pub(crate) ends_command: bool,
    pub(crate) tamper: Tamper,
}

/// What a fault does to a completion queue entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tamper {
    Nothing,
    Change(CompletionField, Change),
    FlipPhase,
    NoInterrupt,
}

impl Tamper {
    #[cold]
    fn write(self, dma: &Dma, address: u64, entry: Cqe) -> Result<(), Status> {
        let entry = self.apply(entry);
        write_entry(dma, address, &entry)?;
        if self == Self::FlipPhase {
            for phase in [!entry.phase(), entry.phase()] {
                let dword = entry.with_phase(phase).dwords()[Cqe::STATUS_DWORD];
                dma.store_release(address + STATUS_OFFSET, dword)?;
            }
        }
        Ok(())
    }

    fn apply(self, entry: Cqe) -> Cqe {
        let Self::Change(field, change) = self else {
            return entry;
        };
        let (dword, shift, mask) = match field {
            CompletionField::Result => (0, 0, u32::MAX),
            CompletionField::SqHead => (2, 0, 0xffff),
            CompletionField::SqId => (2, 16, 0xffff),
            CompletionField::Cid => (Cqe::STATUS_DWORD, 0, 0xffff),
            CompletionField::Phase => (Cqe::STATUS_DWORD, 16, 1),
        };
        let mut dwords = entry.dwords();
        let value = change.apply(dwords[dword] >> shift & mask) & mask;
        dwords[dword] = dwords[dword] & !(mask << shift) | value << shift;
        Cqe::from_dwords(dwords)
    }
}

/// One completion queue.
pub(crate) struct CompletionQueue {
    address: u64,
    entries: u32,
    head: u32,
    tail: u32,
    /// The last head that made no sense, so that it is reported once.
    refused_head: Option<u32>,
    phase: bool,
    pub(crate) vector: Option<u16>,
    /// Submission queues that complete here.
    pub(crate) users: u32,
    /// What waits for room.
    waiting: VecDeque<Completion>,
    /// Entries that were posted since the controller last saw to interrupts, and call for one.
    unsignalled: u32,
}

impl CompletionQueue {
    fn is_full(&self) -> bool {
        (self.tail + 1) % self.entries == self.head
    }

    /// Whether something waits for room and the host has moved the head.
    fn can_go_on(&self, id: u16, doorbells: &HostDoorbells) -> bool {
        if self.waiting.is_empty() {
            return false;
        }
        // A head that is out of reach is found to be by the next look at it.
        doorbells.completion_head(id) != Ok(self.seen_head())
    }

    /// The doorbell's value when it was last looked at.
    fn seen_head(&self) -> u32 {
        self.refused_head.unwrap_or(self.head)
    }

    /// Takes note of the doorbell. The host may only have moved the head over posted entries.
    fn look(&mut self, id: u16, doorbells: &HostDoorbells) -> Result<(), QueueError> {
        let head = doorbells
            .completion_head(id)
            .map_err(|_| QueueError::HostMemory)?;
        if head >= self.entries
            || distance(self.head, head, self.entries)
                > distance(self.head, self.tail, self.entries)
        {
            if self.refused_head.replace(head) == Some(head) {
                return Ok(());
            }
            return Err(QueueError::InvalidDoorbell);
        }
        self.refused_head = None;
        self.head = head;
        Ok(())
    }
}

fn write_entry(dma: &Dma, address: u64, entry: &Cqe) -> Result<(), Status> {
    // The dword with the phase goes last: the host looks at nothing else until it flips.
    dma.write(address, &entry.as_bytes()[..STATUS_OFFSET as usize])?;
    dma.store_release(address + STATUS_OFFSET, entry.dwords()[Cqe::STATUS_DWORD])
}

fn distance(from: u32, to: u32, entries: u32) -> u32 {
    if to >= from {
        to - from
    } else {
        to + entries - from
    }
}

/// All queues that exist.
#[derive(Default)]
pub(crate) struct Queues {
    submission: Vec<Option<SubmissionQueue>>,
    completion: Vec<Option<CompletionQueue>>,
    /// Identifiers of the submission queues that exist, in order of creation, admin first.
    active: Vec<u16>,
    /// Completion queues with entries that no interrupt was raised for.
    unsignalled: Vec<u16>,
    /// Completion queues in which something waits for room.
    congested: Vec<u16>,
}

impl Queues {
    pub(crate) fn new(io_queue_pairs: u16) -> Self {
        let slots = usize::from(io_queue_pairs) + 1;
        Self {
            submission: (0..slots).map(|_| None).collect(),
            completion: (0..slots).map(|_| None).collect(),
            ..Self::default()
        }
    }

    pub(crate) fn active(&self) -> &[u16] {
        &self.active
    }

    pub(crate) fn submission(&mut self, id: u16) -> Option<&mut SubmissionQueue> {
        self.submission.get_mut(usize::from(id))?.as_mut()
    }

    pub(crate) fn completion(&mut self, id: u16) -> Option<&mut CompletionQueue> {
        self.completion.get_mut(usize::from(id))?.as_mut()
    }

    /// Whether I/O queues exist.
    pub(crate) fn has_io(&self) -> bool {
        self.submission.iter().skip(1).any(Option::is_some)
            || self.completion.iter().skip(1).any(Option::is_some)
    }

    pub(crate) fn create_completion(
        &mut self,
        doorbells: &mut HostDoorbells,
        id: u16,
        address: u64,
        entries: u32,
        vector: Option<u16>,
    ) {
        self.completion[usize::from(id)] = Some(CompletionQueue {
            address,
            entries,
            head: 0,
            tail: 0,
            refused_head: None,
            phase: true,
            vector,
            users: 0,
            waiting: VecDeque::new(),
            unsignalled: 0,
        });
        doorbells.open_completion(id, entries);
    }

    pub(crate) fn create_submission(
        &mut self,
        doorbells: &mut HostDoorbells,
        id: u16,
        address: u64,
        entries: u32,
        completion_queue: u16,
    ) {
        if let Some(completion) = self.completion(completion_queue) {
            completion.users += 1;
        }
        self.submission[usize::from(id)] = Some(SubmissionQueue {
            address,
            entries,
            head: 0,
            tail: 0,
            doorbell: 0,
            completion_queue,
            outstanding: Outstanding::new(),
        });
        self.active.push(id);
        doorbells.open_submission(id, entries);
    }

    pub(crate) fn delete_submission(&mut self, doorbells: &HostDoorbells, id: u16) {
        doorbells.registers.close_submission(id);
        if let Some(queue) = self.submission[usize::from(id)].take()
            && let Some(completion) = self.completion(queue.completion_queue)
        {
            completion.users -= 1;
            // What is not posted now never is: the queue that it belongs to is no more.
            completion
                .waiting
                .retain(|completion| completion.submission_queue != id);
        }
        self.active.retain(|active| *active != id);
    }

    pub(crate) fn delete_completion(&mut self, doorbells: &HostDoorbells, id: u16) {
        doorbells.registers.close_completion(id);
        self.completion[usize::from(id)] = None;
        self.congested.retain(|congested| *congested != id);
        self.unsignalled.retain(|unsignalled| *unsignalled != id);
    }

    pub(crate) fn delete_all(&mut self, doorbells: &HostDoorbells) {
        for (id, slot) in (0..).zip(&mut self.submission) {
            if slot.take().is_some() {
                doorbells.registers.close_submission(id);
            }
        }
        for (id, slot) in (0..).zip(&mut self.completion) {
            if slot.take().is_some() {
                doorbells.registers.close_completion(id);
            }
        }
        self.active.clear();
        self.congested.clear();
        self.unsignalled.clear();
    }

    /// Takes note of how far the host has consumed a completion queue. Done with each fetch, when
    /// the doorbells of the pair are at hand: a head that passes the tail is only found as long as
    /// the queue is not full.
    pub(crate) fn look_at_head(
        &mut self,
        id: u16,
        doorbells: &HostDoorbells,
    ) -> Result<(), QueueError> {
        self.completion(id)
            .map_or(Ok(()), |queue| queue.look(id, doorbells))
    }

    /// Whether something waits for room in this completion queue, so that fetching more commands
    /// for it is pointless.
    pub(crate) fn is_congested(&self, completion_queue: u16) -> bool {
        self.congested.contains(&completion_queue)
    }

    /// Whether a fetch from the queues that `fetch` selects, or a post, would get something done.
    pub(crate) fn has_work(&self, doorbells: &HostDoorbells, fetch: impl Fn(u16) -> bool) -> bool {
        self.active.iter().any(|&id| {
            fetch(id)
                && self.submission[usize::from(id)]
                    .as_ref()
                    .is_some_and(|queue| {
                        !self.is_congested(queue.completion_queue) && queue.has_work(id, doorbells)
                    })
        }) || self.congested.iter().any(|&id| {
            self.completion[usize::from(id)]
                .as_ref()
                .is_some_and(|queue| queue.can_go_on(id, doorbells))
        })
    }

    /// Whether something waits for the host to make room.
    pub(crate) fn waits_for_room(&self) -> bool {
        !self.congested.is_empty()
    }

    /// Posts a completion, or keeps it until there is room.
    pub(crate) fn complete(
        &mut self,
        dma: &Dma,
        doorbells: &HostDoorbells,
        completion: Completion,
    ) -> Result<(), QueueError> {
        let Some(submission) = &self.submission[usize::from(completion.submission_queue)] else {
            return Ok(());
        };
        let id = submission.completion_queue;
        let Some(queue) = self.completion[usize::from(id)].as_mut() else {
            return Ok(());
        };
        let mut doorbell = Ok(());
        if queue.waiting.is_empty() {
            if queue.is_full() {
                doorbell = queue.look(id, doorbells);
            }
            if !queue.is_full() {
                self.post(dma, id, &completion)?;
                return doorbell;
            }
            self.congested.push(id);
        }
        if let Some(queue) = self.completion(id) {
            queue.waiting.push_back(completion);
        }
        doorbell
    }

    /// Posts what waited for room, as far as there is some now; returns whether anything was.
    pub(crate) fn post_waiting(
        &mut self,
        dma: &Dma,
        doorbells: &HostDoorbells,
    ) -> Result<bool, QueueError> {
        let mut posted = false;
        let mut result = Ok(());
        let mut index = 0;
        while let Some(&id) = self.congested.get(index) {
            let Some(queue) = self.completion(id) else {
                self.congested.swap_remove(index);
                continue;
            };
            if let Err(error) = queue.look(id, doorbells) {
                result = Err(error);
            }
            while let Some(queue) = self.completion(id)
                && !queue.is_full()
                && let Some(completion) = queue.waiting.pop_front()
            {
                self.post(dma, id, &completion)?;
                posted = true;
            }
            if self
                .completion(id)
                .is_some_and(|queue| queue.waiting.is_empty())
            {
                self.congested.swap_remove(index);
            } else {
                index += 1;
            }
        }
        result.map(|()| posted)
    }

    /// Writes one entry; the caller has made sure that there is room.
    fn post(&mut self, dma: &Dma, id: u16, completion: &Completion) -> Result<(), QueueError> {
        let Some(submission) = self.submission[usize::from(completion.submission_queue)].as_mut()
        else {
            return Ok(());
        };
        let Some(queue) = self.completion[usize::from(id)].as_mut() else {
            return Ok(());
        };
        if completion.ends_command {
            submission.outstanding.remove(completion.cid);
        }
        let entry = Cqe::new(completion.cid, completion.status)
            .with_result(completion.result)
            .with_sq(completion.submission_queue, submission.head as u16)
            .with_phase(queue.phase);
        let address = queue.address + u64::from(queue.tail) * CQE_SIZE;
        let written = if completion.tamper == Tamper::Nothing {
            write_entry(dma, address, &entry)
        } else {
            completion.tamper.write(dma, address, entry)
        };
        written.map_err(|_| QueueError::HostMemory)?;
        queue.tail += 1;
        if queue.tail == queue.entries {
            queue.tail = 0;
            queue.phase = !queue.phase;
        }
        if completion.tamper != Tamper::NoInterrupt {
            if queue.unsignalled == 0 {
                self.unsignalled.push(id);
            }
            queue.unsignalled += 1;
        }
        Ok(())
    }
}
