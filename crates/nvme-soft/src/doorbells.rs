//! The doorbell registers (NVMe over PCIe transport specification 1.0, sections 3.1.2.1 and
//! 3.1.2.2): the only thing a host touches per command besides its own memory.

mod shadow;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use nvme_spec::registers::{DoorbellKind, doorbell_offset};

pub(crate) use self::shadow::HostDoorbells;
use crate::DoorbellMemory;
use crate::wake::{Urgency, Wake};

/// Where the doorbells begin in BAR 0.
pub(crate) const FIRST: u32 = 0x1000;

/// A doorbell of a queue that does not exist was written.
pub(crate) const ATTENTION_INVALID_REGISTER: u32 = 1 << 0;
/// A value outside of its queue, or the same value twice, was written.
pub(crate) const ATTENTION_INVALID_VALUE: u32 = 1 << 1;
/// A register was written, or the embedder asks for something.
pub(crate) const ATTENTION_CONTROL: u32 = 1 << 2;

/// The doorbells of one controller. Writing one is an atomic store, plus a wake-up when the
/// controller's thread sleeps.
pub struct Doorbells {
    queues: Box<[QueueDoorbells]>,
    stride_shift: u32,
    attention: AtomicU32,
    redundant_heads: AtomicU64,
    invalid: AtomicU64,
    /// The host has set up shadow doorbells.
    has_shadow: AtomicBool,
    /// The function is not there, and all its queues are closed.
    vanished: AtomicBool,
    /// Where the host writes them, if that is memory; what they have then counts.
    memory: Option<Arc<dyn DoorbellMemory>>,
    wake: Wake,
}

/// Both doorbells of one queue identifier, on a cache line of their own.
#[derive(Default)]
#[repr(align(64))]
struct QueueDoorbells {
    submission_tail: Doorbell,
    completion_head: Doorbell,
}

#[derive(Default)]
struct Doorbell {
    value: AtomicU32,
    /// Entries of the queue; 0 while there is no such queue.
    entries: AtomicU32,
}

impl Doorbells {
    /// Doorbells for the admin queue and `io_queue_pairs` more, `4 << stride` bytes apart.
    pub(crate) fn new(
        io_queue_pairs: u16,
        stride: u8,
        memory: Option<Arc<dyn DoorbellMemory>>,
    ) -> Self {
        Self {
            queues: (0..=io_queue_pairs)
                .map(|_| QueueDoorbells::default())
                .collect(),
            stride_shift: 2 + u32::from(stride),
            attention: AtomicU32::new(0),
            redundant_heads: AtomicU64::new(0),
            invalid: AtomicU64::new(0),
            has_shadow: AtomicBool::new(false),
            vanished: AtomicBool::new(false),
            memory,
            wake: Wake::new(),
        }
    }

    /// Takes the host's write of `value` to the register at `offset` of BAR 0.
    ///
    /// What the calling thread wrote to memory before is visible to the controller when it sees
    /// the new value. A write that is invalid (no such queue, a value outside of the queue) has no
    /// effect but an asynchronous event (base specification 2.0, section 5.2).
    pub fn ring(&self, offset: u32, value: u32) {
        let Some((queue, is_head)) = self.decode(offset) else {
            return self.complain(ATTENTION_INVALID_REGISTER);
        };
        let doorbell = if is_head {
            &queue.completion_head
        } else {
            &queue.submission_tail
        };
        let entries = doorbell.entries.load(Ordering::Acquire);
        if value >= entries {
            return self.complain(if entries == 0 {
                ATTENTION_INVALID_REGISTER
            } else {
                ATTENTION_INVALID_VALUE
            });
        }
        if let Some(memory) = &self.memory {
            memory.store(offset, value);
        }
        if is_head {
            // With shadow doorbells the head may have gone round the queue in between, and so it may where
            // the doorbells are memory.
            if doorbell.value.load(Ordering::Relaxed) == value
                && !self.has_shadow.load(Ordering::Relaxed)
                && self.memory.is_none()
            {
                self.redundant_heads.fetch_add(1, Ordering::Relaxed);
                return self.complain(ATTENTION_INVALID_VALUE);
            }
            doorbell.value.store(value, Ordering::Release);
            self.wake.notify(Urgency::Low);
        } else {
            doorbell.value.store(value, Ordering::Release);
            self.wake.notify(Urgency::High);
        }
    }

    fn decode(&self, offset: u32) -> Option<(&QueueDoorbells, bool)> {
        let relative = offset.checked_sub(FIRST)?;
        let index = relative >> self.stride_shift;
        if index << self.stride_shift != relative {
            return None;
        }
        let queue = self.queues.get(usize::try_from(index / 2).ok()?)?;
        Some((queue, index % 2 == 1))
    }

    #[cold]
    fn complain(&self, what: u32) {
        if self.vanished.load(Ordering::Relaxed) {
            return;
        }
        self.invalid.fetch_add(1, Ordering::Relaxed);
        self.raise_attention(what);
    }

    /// Whether writes go nowhere. The queues are to be closed too.
    pub(crate) fn set_vanished(&self, vanished: bool) {
        self.vanished.store(vanished, Ordering::Relaxed);
    }

    /// Whether the host writes most values elsewhere than to the registers.
    fn set_has_shadow(&self, has_shadow: bool) {
        self.has_shadow.store(has_shadow, Ordering::Relaxed);
    }

    /// CAP.DSTRD.
    fn stride(&self) -> u8 {
        (self.stride_shift - 2) as u8
    }

    /// Sets a doorbell as if the host had written the register.
    fn set(&self, id: u16, kind: DoorbellKind, value: u32) {
        let queue = &self.queues[usize::from(id)];
        let doorbell = match kind {
            DoorbellKind::SubmissionTail => &queue.submission_tail,
            DoorbellKind::CompletionHead => &queue.completion_head,
        };
        doorbell.value.store(value, Ordering::Relaxed);
        if let Some(memory) = &self.memory {
            memory.store(doorbell_offset(id, kind, self.stride()), value);
        }
    }

    pub(crate) fn raise_attention(&self, what: u32) {
        self.attention.fetch_or(what, Ordering::Release);
        self.wake.notify(Urgency::High);
    }

    pub(crate) fn wants_attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn take_attention(&self) -> u32 {
        self.attention.swap(0, Ordering::Acquire)
    }

    pub(crate) fn wake(&self) -> &Wake {
        &self.wake
    }

    /// Makes the tail doorbell of a new submission queue live, at 0.
    pub(crate) fn open_submission(&self, id: u16, entries: u32) {
        self.set(id, DoorbellKind::SubmissionTail, 0);
        self.queues[usize::from(id)].submission_tail.open(entries);
    }

    pub(crate) fn close_submission(&self, id: u16) {
        self.queues[usize::from(id)]
            .submission_tail
            .entries
            .store(0, Ordering::Release);
    }

    /// Makes the head doorbell of a new completion queue live, at 0.
    pub(crate) fn open_completion(&self, id: u16, entries: u32) {
        self.set(id, DoorbellKind::CompletionHead, 0);
        self.queues[usize::from(id)].completion_head.open(entries);
    }

    pub(crate) fn close_completion(&self, id: u16) {
        self.queues[usize::from(id)]
            .completion_head
            .entries
            .store(0, Ordering::Release);
    }

    /// The tail of a submission queue. Memory may hold any value, and so may this.
    pub(crate) fn submission_tail(&self, id: u16) -> u32 {
        if let Some(memory) = &self.memory {
            let kind = DoorbellKind::SubmissionTail;
            return memory.load(doorbell_offset(id, kind, self.stride()));
        }
        self.queues[usize::from(id)]
            .submission_tail
            .value
            .load(Ordering::Acquire)
    }

    /// The head of a completion queue, any value as [`Doorbells::submission_tail`].
    pub(crate) fn completion_head(&self, id: u16) -> u32 {
        if let Some(memory) = &self.memory {
            let kind = DoorbellKind::CompletionHead;
            return memory.load(doorbell_offset(id, kind, self.stride()));
        }
        self.queues[usize::from(id)]
            .completion_head
            .value
            .load(Ordering::Acquire)
    }

    /// Writes of a completion queue's head that repeated the previous value.
    pub(crate) fn redundant_heads(&self) -> u64 {
        self.redundant_heads.load(Ordering::Relaxed)
    }

    /// Writes that were invalid.
    pub(crate) fn invalid(&self) -> u64 {
        self.invalid.load(Ordering::Relaxed)
    }
}

impl Doorbell {
    fn open(&self, entries: u32) {
        self.entries.store(entries, Ordering::Release);
    }
}

impl fmt::Debug for Doorbells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbells")
            .field("queues", &self.queues.len())
            .field("stride_shift", &self.stride_shift)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stride_places_the_registers() {
        let doorbells = Doorbells::new(2, 1, None);
        doorbells.open_submission(1, 16);
        doorbells.open_completion(1, 16);
        doorbells.ring(FIRST + 2 * 8, 5);
        doorbells.ring(FIRST + 3 * 8, 7);
        assert_eq!(doorbells.submission_tail(1), 5);
        assert_eq!(doorbells.completion_head(1), 7);
        assert_eq!(doorbells.take_attention(), 0);
    }

    #[test]
    fn invalid_writes_change_nothing_and_raise_attention() {
        let doorbells = Doorbells::new(1, 0, None);
        doorbells.open_submission(0, 8);
        doorbells.open_completion(0, 8);
        for (offset, value, attention) in [
            (FIRST + 2, 1, ATTENTION_INVALID_REGISTER),
            (FIRST + 8, 1, ATTENTION_INVALID_REGISTER),
            (FIRST + 0x100, 1, ATTENTION_INVALID_REGISTER),
            (FIRST, 8, ATTENTION_INVALID_VALUE),
            (FIRST, 0x1_0001, ATTENTION_INVALID_VALUE),
            (FIRST + 4, 8, ATTENTION_INVALID_VALUE),
            (FIRST + 4, 0, ATTENTION_INVALID_VALUE),
        ] {
            doorbells.ring(offset, value);
            assert_eq!(
                doorbells.take_attention(),
                attention,
                "{offset:#x} <- {value:#x}"
            );
        }
        assert_eq!(doorbells.submission_tail(0), 0);
        assert_eq!(doorbells.completion_head(0), 0);
        assert_eq!(doorbells.invalid(), 7);
        assert_eq!(doorbells.redundant_heads(), 1);
    }

    #[test]
    fn a_closed_queue_has_no_doorbell() {
        let doorbells = Doorbells::new(1, 0, None);
        doorbells.open_submission(1, 8);
        doorbells.close_submission(1);
        doorbells.ring(FIRST + 8, 1);
        assert_eq!(doorbells.take_attention(), ATTENTION_INVALID_REGISTER);
    }
}
