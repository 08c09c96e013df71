//! Interrupt vectors and notices as eventfds, and a table as that of MSI-X to mask them.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use nvme_soft::Interrupts;

use crate::device::DoorbellCall;
use crate::device::host::{eventfd, signal};

/// Bytes of an entry of the table, and where its Vector Control word is.
const ENTRY: u32 = 16;
const CONTROL: u32 = 12;

/// Where the Vector Control word of a vector is in the table.
pub(super) fn control(vector: u16) -> u32 {
    u32::from(vector) * ENTRY + CONTROL
}

/// One nonblocking eventfd for each vector.
pub(super) struct Vectors {
    descriptors: Vec<Arc<OwnedFd>>,
    masks: Vec<Mask>,
}

impl Vectors {
    pub(super) fn new(count: u16) -> io::Result<Self> {
        let descriptors = (0..count).map(|_| eventfd().map(Arc::new));
        Ok(Self {
            descriptors: descriptors.collect::<io::Result<_>>()?,
            masks: (0..count).map(|_| Mask::default()).collect(),
        })
    }

    pub(super) fn descriptors(&self) -> &[Arc<OwnedFd>] {
        &self.descriptors
    }
}

impl DoorbellCall for Vectors {
    /// Writes to the table. Only the Vector Control words can be written.
    fn ring(&self, offset: u32, value: u32) {
        let Some(index) = offset.checked_sub(CONTROL).map(|offset| offset / ENTRY) else {
            return;
        };
        let (Some(mask), Some(descriptor)) = (
            self.masks.get(index as usize),
            self.descriptors.get(index as usize),
        ) else {
            return;
        };
        if value & 1 != 0 {
            mask.close();
        } else if mask.open() {
            signal(descriptor);
        }
    }
}

/// Whether a vector is masked, and whether it has something to signal since.
#[derive(Default)]
struct Mask(AtomicU8);

impl Mask {
    const MASKED: u8 = 1;
    const PENDING: u8 = 2;

    fn close(&self) {
        self.0.fetch_or(Self::MASKED, Ordering::AcqRel);
    }

    /// Returns whether there is something to signal.
    fn open(&self) -> bool {
        self.0.swap(0, Ordering::AcqRel) & Self::PENDING != 0
    }

    /// Returns whether the vector is to be signalled now.
    fn passes(&self) -> bool {
        if self.0.load(Ordering::Relaxed) & Self::MASKED == 0 {
            return true;
        }
        // Whoever unmasks it meanwhile either finds this, or is found here.
        let before = self.0.fetch_or(Self::PENDING, Ordering::AcqRel);
        before & Self::MASKED == 0
            && self.0.fetch_and(!Self::PENDING, Ordering::AcqRel) & Self::PENDING != 0
    }
}

impl Interrupts for Vectors {
    fn count(&self) -> u16 {
        // At most as many as `new` was asked for.
        self.descriptors.len() as u16
    }

    fn raise(&self, vector: u16) {
        let vector = usize::from(vector);
        let (Some(descriptor), Some(mask)) = (self.descriptors.get(vector), self.masks.get(vector))
        else {
            return;
        };
        if mask.passes() {
            signal(descriptor);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn is_signalled(descriptor: &OwnedFd) -> bool {
        rustix::io::read(descriptor, &mut [0; 8]).is_ok()
    }

    #[test]
    fn a_masked_vector_keeps_one_interrupt() {
        let vectors = Vectors::new(2).expect("eventfds");
        let [first, second] = vectors.descriptors() else {
            panic!("two");
        };
        vectors.ring(control(1), 1);
        vectors.raise(0);
        vectors.raise(1);
        vectors.raise(1);
        assert!(is_signalled(first) && !is_signalled(second));
        vectors.ring(control(1), 0);
        assert!(is_signalled(second), "it was held back");
        vectors.ring(control(1), 0);
        assert!(!is_signalled(second));
        vectors.raise(1);
        assert!(is_signalled(second));
        // What there is no word for.
        for offset in [0, 4, control(2), u32::MAX] {
            vectors.ring(offset, 1);
        }
        vectors.raise(0);
        assert!(is_signalled(first));
    }

    #[test]
    fn none_is_lost_between_two_threads() {
        let mask = Mask::default();
        for _ in 0..2_000 {
            mask.close();
            let (raised, opened) = thread::scope(|scope| {
                let raise = scope.spawn(|| mask.passes());
                let opened = mask.open();
                (raise.join().expect("no panic"), opened)
            });
            // It may have been raised before or after, but it was.
            assert!(raised || opened || mask.open(), "lost");
            mask.open();
        }
    }
}
