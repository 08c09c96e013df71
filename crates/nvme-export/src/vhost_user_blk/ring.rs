//! A virtqueue, and what of it is in flight.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::MAX_QUEUE_SIZE;
use super::chain::{Chain, ChainError};
use super::inflight::{InflightError, QueueInflight};
use super::memory::Regions;

/// Why a queue can't go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum RingError {
    #[error("a queue of {0} descriptors; it is a power of two up to {MAX_QUEUE_SIZE}")]
    Size(u16),
    #[error("its rings are not aligned, or not in the guest's memory")]
    Place,
    #[error("descriptor {head} is available, of {size}")]
    Head { head: u16, size: u16 },
    #[error("descriptor {0} is available once more before it was used")]
    Repeated(u16),
    #[error(transparent)]
    Ring(#[from] virtio_queue::Error),
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error(transparent)]
    Inflight(#[from] InflightError),
}

/// Where a queue is in the guest's memory, and how it is used.
#[derive(Clone, Copy, Debug)]
pub(super) struct RingConfig {
    pub(super) size: u16,
    pub(super) table: GuestAddress,
    pub(super) available: GuestAddress,
    pub(super) used: GuestAddress,
    /// Where in the available ring to begin, if nothing in flight says better.
    pub(super) base: u16,
    pub(super) has_event_index: bool,
    pub(super) has_indirect: bool,
}

/// A virtqueue.
#[derive(Debug)]
pub(super) struct Ring {
    queue: Queue,
    available: GuestAddress,
    has_indirect: bool,
    inflight: Option<QueueInflight>,
    /// Whether the chain at each head is in flight: no more chains than the queue has descriptors are.
    taken: Vec<bool>,
    /// What an earlier process has taken and not given back.
    left: VecDeque<u16>,
    /// Whether the driver is asked to tell what becomes available.
    asks: bool,
}

impl Ring {
    pub(super) fn new(
        config: &RingConfig,
        inflight: Option<QueueInflight>,
        regions: &Regions,
    ) -> Result<Self, RingError> {
        let mut queue = Queue::new(MAX_QUEUE_SIZE)?;
        queue
            .try_set_size(config.size)
            .map_err(|_| RingError::Size(config.size))?;
        queue.try_set_desc_table_address(config.table)?;
        queue.try_set_avail_ring_address(config.available)?;
        queue.try_set_used_ring_address(config.used)?;
        queue.set_event_idx(config.has_event_index);
        queue.set_ready(true);
        if !queue.is_valid(regions) {
            return Err(RingError::Place);
        }
        let used = queue.used_idx(regions, Ordering::Acquire)?.0;
        queue.set_next_used(used);
        queue.set_next_avail(config.base);
        let mut ring = Self {
            queue,
            available: config.available,
            has_indirect: config.has_indirect,
            inflight,
            taken: vec![false; config.size.into()],
            left: VecDeque::new(),
            asks: true,
        };
        let left = match &mut ring.inflight {
            Some(inflight) => inflight.recover(used)?,
            None => None,
        };
        if let Some(left) = left {
            // What was taken is what was given back and this.
            let taken = u16::try_from(left.len()).unwrap_or(config.size);
            ring.queue.set_next_avail(used.wrapping_add(taken));
            ring.left = left.into();
        }
        Ok(ring)
    }

    /// Where in the available ring to go on, for the front end to keep.
    pub(super) fn base(&self) -> u16 {
        self.queue.next_avail()
    }

    /// How many chains are available, or, if `only_left`, are left by an earlier process.
    pub(super) fn available(&self, regions: &Regions, only_left: bool) -> Result<usize, RingError> {
        if only_left {
            return Ok(self.left.len());
        }
        let index = self.queue.avail_idx(regions, Ordering::Acquire)?;
        let new = index.0.wrapping_sub(self.queue.next_avail());
        Ok(self.left.len() + usize::from(new))
    }

    /// Takes the next chain that is available; returns it and its head.
    pub(super) fn take(&mut self, regions: &Regions) -> Result<(u16, Chain), RingError> {
        let head = match self.left.pop_front() {
            Some(head) => head,
            None => self.next_head(regions)?,
        };
        let size = self.queue.size();
        match self.taken.get_mut(usize::from(head)) {
            None => return Err(RingError::Head { head, size }),
            Some(true) => return Err(RingError::Repeated(head)),
            Some(taken) => *taken = true,
        }
        let table = GuestAddress(self.queue.desc_table());
        let chain = Chain::read(regions, table, size, head, self.has_indirect)?;
        Ok((head, chain))
    }

    fn next_head(&mut self, regions: &Regions) -> Result<u16, RingError> {
        // There is one, so if there is none it could not be read, or the index was taken back.
        let chain = self.queue.iter(regions)?.next();
        let head = chain.ok_or(RingError::Place)?.head_index();
        if head < self.queue.size()
            && let Some(inflight) = &mut self.inflight
        {
            inflight.take(head)?;
        }
        Ok(head)
    }

    /// Gives a chain back, `written` bytes of which were written.
    pub(super) fn give_back(
        &mut self,
        regions: &Regions,
        head: u16,
        written: u32,
    ) -> Result<(), RingError> {
        if let Some(inflight) = &self.inflight {
            inflight.before_used(head)?;
        }
        self.queue.add_used(regions, head, written)?;
        if let Some(inflight) = &self.inflight {
            inflight.after_used(head, self.queue.next_used())?;
        }
        if let Some(taken) = self.taken.get_mut(usize::from(head)) {
            *taken = false;
        }
        Ok(())
    }

    /// Whether the driver wants to be interrupted, after chains were given back.
    pub(super) fn wants_interrupt(&mut self, regions: &Regions) -> Result<bool, RingError> {
        if !self.queue.needs_notification(regions)? {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            return Ok(true);
        }
        let flags: u16 = regions
            .load(self.available, Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver to tell what becomes available. Returns whether something is already.
    pub(super) fn ask(&mut self, regions: &Regions) -> Result<bool, RingError> {
        self.asks = true;
        Ok(self.queue.enable_notification(regions)?)
    }

    /// Lets the driver know that the ring is looked at anyway.
    pub(super) fn do_not_ask(&mut self, regions: &Regions) -> Result<(), RingError> {
        if self.asks {
            self.asks = false;
            self.queue.disable_notification(regions)?;
        }
        Ok(())
    }
}
