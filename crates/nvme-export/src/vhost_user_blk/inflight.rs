//! What a queue has taken and not given back, in memory that the front end keeps when this process ends: the layout
//! for split virtqueues of the vhost-user specification, section "Inflight I/O tracking".

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_async::memory::SharedMemory;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{AtomicAccess, Bytes, VolatileMemoryError};

use super::MAX_QUEUE_SIZE;
use super::mapping::Mapping;
use super::memory::{self, MemoryError};

/// Bytes before the states of descriptors, and of each of those.
const HEADER: usize = 16;
const STATE: usize = 16;
/// Each queue's part starts on a cache line of its own.
const ALIGNMENT: usize = 64;
/// The layout that this is.
const VERSION: u16 = 1;

/// Where the fields of the header are: `version`, `desc_num`, `last_batch_head` and `used_idx`.
const VERSION_AT: usize = 8;
const SIZE_AT: usize = 10;
const LAST_BATCH_AT: usize = 12;
const USED_AT: usize = 14;
/// Where those of a state are: `inflight`, `next` and `counter`.
const INFLIGHT_AT: usize = 0;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// Why requests in flight can't be tracked.
#[derive(Debug, thiserror::Error)]
pub(super) enum InflightError {
    #[error("{queues} queues of {size} descriptors are none, or too large")]
    Size { queues: u16, size: u16 },
    #[error("{found} bytes are no room for {queues} queues of {size} descriptors")]
    TooSmall { found: u64, queues: u16, size: u16 },
    #[error("it is of version {version}, for {size} descriptors")]
    Unknown { version: u16, size: u16 },
    #[error("queue {index} of {size} descriptors has no place in it")]
    NoPlace { index: u16, size: u16 },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("allocating it: {0}")]
    Allocate(#[from] std::io::Error),
    /// The places are inside of the mapping and aligned, which is checked when it is made.
    #[error(transparent)]
    Access(#[from] VolatileMemoryError),
}

/// The memory of all queues.
#[derive(Debug)]
pub(super) struct Inflight {
    mapping: Arc<Mapping>,
    queues: u16,
    size: u16,
}

impl Inflight {
    /// New memory, for the front end to keep.
    pub(super) fn allocate(
        queues: u16,
        size: u16,
    ) -> Result<(VhostUserInflight, File), InflightError> {
        let len = check(queues, size)?;
        let memory = SharedMemory::new(len)?;
        let file = File::from(memory.fd().try_clone_to_owned()?);
        let described = VhostUserInflight::new(memory.len() as u64, 0, queues, size);
        Ok((described, file))
    }

    /// Memory that the front end has kept, from this process or an earlier one.
    pub(super) fn open(
        described: &VhostUserInflight,
        file: File,
        trust_client: bool,
    ) -> Result<Self, InflightError> {
        let (queues, size) = (described.num_queues, described.queue_size);
        let found = described.mmap_size;
        let needed = check(queues, size)?;
        if found < needed as u64 {
            return Err(InflightError::TooSmall {
                found,
                queues,
                size,
            });
        }
        let (mapping, _) = memory::map(file, described.mmap_offset, found, trust_client)?;
        Ok(Self {
            mapping: Arc::new(mapping),
            queues,
            size,
        })
    }

    /// The part of one queue, of `size` descriptors.
    pub(super) fn queue(&self, index: u16, size: u16) -> Result<QueueInflight, InflightError> {
        if index >= self.queues || size > self.size {
            return Err(InflightError::NoPlace { index, size });
        }
        Ok(QueueInflight {
            mapping: self.mapping.clone(),
            start: usize::from(index) * queue_len(self.size),
            size,
            counter: 0,
        })
    }
}

fn queue_len(size: u16) -> usize {
    (HEADER + STATE * usize::from(size)).next_multiple_of(ALIGNMENT)
}

/// How much memory it takes, of whole pages.
fn check(queues: u16, size: u16) -> Result<usize, InflightError> {
    if queues == 0 || queues > super::MAX_QUEUES || size == 0 || size > MAX_QUEUE_SIZE {
        return Err(InflightError::Size { queues, size });
    }
    Ok((queue_len(size) * usize::from(queues)).next_multiple_of(4096))
}

/// The memory of one queue. What is in it was written by an earlier process, or by a front end that lies: each
/// index from it is checked.
#[derive(Debug)]
pub(super) struct QueueInflight {
    mapping: Arc<Mapping>,
    start: usize,
    size: u16,
    /// What the next request that is taken is numbered with.
    counter: u64,
}

impl QueueInflight {
    /// What was taken and not given back, in the order in which it was taken, where the used ring's index is
    /// `used`; nothing if no one has used this memory yet. From now on it is in use.
    pub(super) fn recover(&mut self, used: u16) -> Result<Option<Vec<u16>>, InflightError> {
        let (version, size) = (self.load::<u16>(VERSION_AT)?, self.load::<u16>(SIZE_AT)?);
        if version == 0 {
            for head in 0..self.size {
                self.store_state(head, INFLIGHT_AT, 0_u8)?;
            }
            self.store(SIZE_AT, self.size)?;
            self.store(USED_AT, used)?;
            self.store(VERSION_AT, VERSION)?;
            return Ok(None);
        }
        if version != VERSION || size != self.size {
            return Err(InflightError::Unknown { version, size });
        }
        // Ended in between: those were given back, but are not marked so yet.
        let mut unmarked = used.wrapping_sub(self.load(USED_AT)?).min(self.size);
        let mut head = self.load(LAST_BATCH_AT)?;
        while unmarked > 0 && head < self.size {
            self.store_state(head, INFLIGHT_AT, 0_u8)?;
            head = self.load_state(head, NEXT_AT)?;
            unmarked -= 1;
        }
        self.store(USED_AT, used)?;
        let mut taken = Vec::new();
        for head in 0..self.size {
            if self.load_state::<u8>(head, INFLIGHT_AT)? != 0 {
                taken.push((self.load_state::<u64>(head, COUNTER_AT)?, head));
            }
        }
        taken.sort_unstable();
        self.counter = taken.last().map_or(0, |(last, _)| last.wrapping_add(1));
        Ok(Some(taken.into_iter().map(|(_, head)| head).collect()))
    }

    /// A request is taken.
    pub(super) fn take(&mut self, head: u16) -> Result<(), InflightError> {
        self.store_state(head, COUNTER_AT, self.counter)?;
        self.counter = self.counter.wrapping_add(1);
        self.store_state(head, INFLIGHT_AT, 1_u8)
    }

    /// A request is about to be put into the used ring.
    pub(super) fn before_used(&self, head: u16) -> Result<(), InflightError> {
        let last: u16 = self.load(LAST_BATCH_AT)?;
        self.store_state(head, NEXT_AT, last)?;
        self.store(LAST_BATCH_AT, head)
    }

    /// It is in the used ring, whose index is `used` now.
    pub(super) fn after_used(&self, head: u16, used: u16) -> Result<(), InflightError> {
        self.store_state(head, INFLIGHT_AT, 0_u8)?;
        self.store(USED_AT, used)
    }

    fn load<T: AtomicAccess>(&self, at: usize) -> Result<T, InflightError> {
        let slice = self.mapping.slice();
        Ok(slice.load(self.start + at, Ordering::Acquire)?)
    }

    /// Stores a field of the header. Stores are seen in their order, by whoever maps the memory after this process
    /// has ended at any point.
    fn store<T: AtomicAccess>(&self, at: usize, value: T) -> Result<(), InflightError> {
        let slice = self.mapping.slice();
        Ok(slice.store(value, self.start + at, Ordering::Release)?)
    }

    fn load_state<T: AtomicAccess>(&self, head: u16, at: usize) -> Result<T, InflightError> {
        self.load(self.state(head) + at)
    }

    fn store_state<T: AtomicAccess>(
        &self,
        head: u16,
        at: usize,
        value: T,
    ) -> Result<(), InflightError> {
        self.store(self.state(head) + at, value)
    }

    /// Where a descriptor's state is. A head that the queue does not have is refused before it comes here.
    fn state(&self, head: u16) -> usize {
        debug_assert!(head < self.size);
        HEADER + STATE * usize::from(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> (VhostUserInflight, File) {
        Inflight::allocate(2, 8).expect("it is small")
    }

    /// As a process that starts with what another one has left.
    fn start(memory: &(VhostUserInflight, File), size: u16) -> QueueInflight {
        let file = memory.1.try_clone().expect("cloned");
        let inflight = Inflight::open(&memory.0, file, false).expect("it is as it was made");
        inflight.queue(1, size).expect("there are two")
    }

    #[test]
    fn a_process_finds_what_another_one_has_left_in_its_order() {
        let memory = memory();
        let mut queue = start(&memory, 8);
        assert_eq!(queue.recover(65535).expect("new"), None);
        for head in [5, 0, 7, 3] {
            queue.take(head).expect("taken");
        }
        queue.before_used(0).expect("there");
        queue.after_used(0, 0).expect("there");
        let mut queue = start(&memory, 8);
        assert_eq!(queue.recover(0).expect("old"), Some(vec![5, 7, 3]));
        // Later ones come after those.
        queue.take(1).expect("taken");
        let found = start(&memory, 8).recover(0).expect("old");
        assert_eq!(found, Some(vec![5, 7, 3, 1]));
        // The other queue has a place of its own.
        let file = memory.1.try_clone().expect("cloned");
        let inflight = Inflight::open(&memory.0, file, false).expect("it is as it was made");
        let mut other = inflight.queue(0, 8).expect("there are two");
        assert_eq!(other.recover(0).expect("new"), None);
    }

    #[test]
    fn a_process_that_ended_in_between_gave_a_request_back_once() {
        // Before and after the index of the used ring was raised.
        for (used, left) in [(0, vec![2, 4]), (1, vec![2])] {
            let memory = memory();
            let mut queue = start(&memory, 8);
            queue.recover(0).expect("new");
            queue.take(2).expect("taken");
            queue.take(4).expect("taken");
            queue.before_used(4).expect("there");
            let found = start(&memory, 8).recover(used).expect("old");
            assert_eq!(found, Some(left));
        }
    }

    #[test]
    fn nonsense_is_refused_or_does_no_harm() {
        for (queues, size) in [
            (0, 8),
            (1, 0),
            (1, MAX_QUEUE_SIZE + 1),
            (super::super::MAX_QUEUES + 1, 1),
        ] {
            let refused = Inflight::allocate(queues, size);
            assert!(matches!(refused, Err(InflightError::Size { .. })));
        }
        let memory = memory();
        start(&memory, 8).recover(0).expect("new");
        let refused = start(&memory, 4).recover(0);
        assert!(matches!(refused, Err(InflightError::Unknown { .. })));

        let queue = start(&memory, 8);
        // A list that leads out, and one that never ends.
        for (last, next) in [(8_u16, 0_u16), (3, 3), (3, 65535)] {
            queue.store(LAST_BATCH_AT, last).expect("there");
            queue.store_state(3, NEXT_AT, next).expect("there");
            queue.store(USED_AT, 0_u16).expect("there");
            let found = start(&memory, 8).recover(40_000).expect("old");
            assert_eq!(found, Some(Vec::new()));
        }
        let mut described = memory.0;
        described.mmap_size = 100;
        let file = || memory.1.try_clone().expect("cloned");
        assert!(matches!(
            Inflight::open(&described, file(), false),
            Err(InflightError::TooSmall { .. })
        ));
        described.mmap_size = 1 << 40;
        assert!(matches!(
            Inflight::open(&described, file(), false),
            Err(InflightError::Memory(MemoryError::NotThere { .. }))
        ));
        let inflight = Inflight::open(&memory.0, file(), false).expect("it is as it was made");
        for (index, size) in [(2, 8), (0, 9)] {
            let refused = inflight.queue(index, size).expect_err("there is no such");
            assert!(matches!(refused, InflightError::NoPlace { .. }));
        }
    }
}
