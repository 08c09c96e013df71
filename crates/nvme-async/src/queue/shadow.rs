//! Doorbells that the device finds in memory (NVMe base specification 2.0, section 5.8 and annex B.5).
//!
//! A controller for which a register access is expensive, because it is emulated, can be told of two
//! pages of memory. The host writes doorbell values to the one, and to the register only if the value
//! passes the one that the controller has put in the other: its event index, the last value for which
//! it does not look by itself.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::ring::RingDoorbell;
use crate::barrier;
use crate::device::Doorbell;
use crate::memory::{AllocError, DEVICE_PAGE, DmaWords, Pool};

const WORDS: usize = DEVICE_PAGE / size_of::<u32>();

/// The two pages, for all queues of a controller.
pub(crate) struct DoorbellBuffers {
    values: DmaWords,
    event_index: DmaWords,
}

impl DoorbellBuffers {
    /// # Errors
    ///
    /// Those of [`Pool::alloc`].
    pub(crate) fn new(pool: &Pool) -> Result<Arc<Self>, AllocError> {
        Ok(Arc::new(Self {
            values: DmaWords::new(pool, WORDS)?,
            event_index: DmaWords::new(pool, WORDS)?,
        }))
    }

    /// Where the device finds them.
    pub(crate) fn iovas(&self) -> (u64, u64) {
        (self.values.iova(), self.event_index.iova())
    }

    /// Whether they have room for the entry at this offset.
    pub(crate) fn holds(offset: u64) -> bool {
        offset + 4 <= DEVICE_PAGE as u64
    }
}

/// A doorbell register, and its entry in the buffers if there are some.
pub(crate) struct QueueDoorbell {
    register: Doorbell,
    shadow: Option<Shadow>,
}

struct Shadow {
    buffers: Arc<DoorbellBuffers>,
    index: usize,
    /// Values that the device did not want to have in the register.
    unwritten: Cell<u64>,
}

impl QueueDoorbell {
    /// A register alone.
    pub(crate) fn new(register: Doorbell) -> Self {
        Self {
            register,
            shadow: None,
        }
    }

    /// A register with an entry at this offset of the buffers, which hold it.
    pub(crate) fn with_shadow(
        register: Doorbell,
        buffers: Arc<DoorbellBuffers>,
        offset: u64,
    ) -> Self {
        debug_assert!(DoorbellBuffers::holds(offset));
        Self {
            register,
            shadow: Some(Shadow {
                buffers,
                index: offset as usize / size_of::<u32>(),
                unwritten: Cell::new(0),
            }),
        }
    }
}

impl RingDoorbell for QueueDoorbell {
    fn ring(&self, value: u32) {
        if let Some(shadow) = &self.shadow
            && !shadow.write(value)
        {
            return shadow.unwritten.update(|count| count + 1);
        }
        self.register.ring(value);
    }

    fn restart(&self) {
        if let Some(shadow) = &self.shadow {
            shadow.value().store(0, Ordering::Relaxed);
            shadow.event_index().store(0, Ordering::Relaxed);
        }
    }

    fn unwritten(&self) -> u64 {
        let shadow = self.shadow.as_ref();
        shadow.map_or(0, |shadow| shadow.unwritten.get())
    }
}

impl Shadow {
    fn value(&self) -> &AtomicU32 {
        &self.buffers.values.as_ref()[self.index]
    }

    fn event_index(&self) -> &AtomicU32 {
        &self.buffers.event_index.as_ref()[self.index]
    }

    /// Writes the entry; returns whether the register is to be written too.
    fn write(&self, value: u32) -> bool {
        // Only we write it.
        let old = u32::from_le(self.value().load(Ordering::Relaxed));
        barrier::before_doorbell();
        self.value().store(value.to_le(), Ordering::Relaxed);
        // The device, which writes its index and then looks at the value once more, sees this value, or
        // else its index is seen here.
        barrier::between_value_and_event_index();
        let event_index = u32::from_le(self.event_index().load(Ordering::Relaxed));
        passes(old, value, event_index)
    }
}

/// Whether the value passes the event index on its way from the old one.
fn passes(old: u32, value: u32, event_index: u32) -> bool {
    let way = (value as u16).wrapping_sub(old as u16);
    (value as u16)
        .wrapping_sub(event_index as u16)
        .wrapping_sub(1)
        < way
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_room_for_1024() {
        assert!(DoorbellBuffers::holds(4092));
        assert!(!DoorbellBuffers::holds(4096));
    }

    #[test]
    fn what_passes_the_event_index() {
        // From 3 to 6: over the index 3, 4 or 5, after which 4, 5 and 6 come.
        let passed: Vec<_> = (0..10).filter(|&event| passes(3, 6, event)).collect();
        assert_eq!(passed, [3, 4, 5]);
        assert!(
            passes(0, 1, 0),
            "the first one, before the device has said anything"
        );
        assert!(!passes(1, 2, 0));
        assert!(passes(0xffff, 1, 0xffff) && passes(0xffff, 1, 0));
        assert!(!passes(0xffff, 1, 1));
        // A queue's end is no power of two: it is rung rather once too often.
        assert!(passes(99, 0, 99));
        // Nothing new passes nothing.
        assert!(!(0..10).any(|event| passes(5, 5, event)));
    }
}
