//! What is known of a namespace, which changes while handles are open.
//!
//! The I/O path reads it without a lock, as single words. A request that was checked against what
//! has just changed is refused by the controller, with a status of its own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use nvme_spec::identify::IdentifyNamespace;

use super::seen::Seen;

/// Whether and how a namespace can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// It has so many blocks.
    Usable { blocks: u64 },
    /// It is not active at present.
    Gone,
    /// It is not what was opened, and never will be again.
    Changed { how: &'static str },
}

/// No namespace has as many blocks, since blocks have 512 bytes at least.
const GONE: u64 = u64::MAX;
const CHANGED: u64 = u64::MAX - 1;

/// What the handles of a namespace share, as it is now.
pub(crate) struct Live {
    /// How many blocks there are, or one of the values above.
    blocks: AtomicU64,
    boundaries: AtomicU64,
    zeroes_deallocate: AtomicBool,
    change: OnceLock<&'static str>,
    seen: Mutex<Seen>,
}

impl Live {
    pub(crate) fn new(seen: Seen) -> Self {
        let identify = seen.identify();
        Self {
            blocks: AtomicU64::new(seen.geometry().blocks),
            boundaries: AtomicU64::new(Boundaries::new(identify).pack()),
            zeroes_deallocate: AtomicBool::new(identify.write_zeroes_deallocates()),
            change: OnceLock::new(),
            seen: Mutex::new(seen),
        }
    }

    #[inline]
    pub(crate) fn condition(&self) -> Condition {
        match self.blocks.load(Ordering::Acquire) {
            GONE => Condition::Gone,
            CHANGED => Condition::Changed {
                how: self.change.get().copied().unwrap_or("has changed"),
            },
            blocks => Condition::Usable { blocks },
        }
    }

    #[inline]
    pub(crate) fn boundaries(&self) -> Boundaries {
        Boundaries::unpack(self.boundaries.load(Ordering::Relaxed))
    }

    pub(crate) fn zeroes_deallocate(&self) -> bool {
        self.zeroes_deallocate.load(Ordering::Relaxed)
    }

    /// What the controller said last while it was active, as it was opened.
    pub(crate) fn seen(&self) -> Seen {
        self.lock().clone()
    }

    /// It is active, in the format that it had when it was opened.
    pub(crate) fn update(&self, seen: Seen) {
        let identify = seen.identify();
        let boundaries = Boundaries::new(identify).pack();
        self.boundaries.store(boundaries, Ordering::Relaxed);
        let deallocates = identify.write_zeroes_deallocates();
        self.zeroes_deallocate.store(deallocates, Ordering::Relaxed);
        let blocks = seen.geometry().blocks;
        *self.lock() = seen;
        self.set(blocks);
    }

    /// It is not active.
    pub(crate) fn set_gone(&self) {
        self.set(GONE);
    }

    /// It is not what was opened. This is for ever.
    pub(crate) fn set_changed(&self, how: &'static str) {
        self.change.get_or_init(|| how);
        self.set(CHANGED);
    }

    /// Called by one thread at a time, the one that has the lock of the registry.
    fn set(&self, blocks: u64) {
        if self.change.get().is_none() || blocks == CHANGED {
            self.blocks.store(blocks, Ordering::Release);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        // One assignment runs under the lock.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fields of the identify data that requests are held against, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Boundaries {
    /// NOIOB: blocks; 0 for none.
    pub(crate) optimal_io: u16,
    /// NAWUPF: blocks less 1; 0 if the controller's AWUPF holds.
    pub(crate) atomic_write: u16,
    /// NABSPF: blocks less 1; 0 for none.
    pub(crate) atomic_boundary: u16,
    /// NABO: blocks.
    pub(crate) atomic_offset: u16,
}

impl Boundaries {
    fn new(identify: &IdentifyNamespace) -> Self {
        let mut this = Self {
            optimal_io: identify.noiob.get(),
            atomic_write: 0,
            atomic_boundary: 0,
            atomic_offset: 0,
        };
        // NSABP: without it these fields mean nothing.
        if identify.features().atomic_fields() {
            this.atomic_write = identify.nawupf.get();
            this.atomic_boundary = identify.nabspf.get();
            this.atomic_offset = identify.nabo.get();
        }
        this
    }

    fn pack(self) -> u64 {
        u64::from(self.optimal_io)
            | u64::from(self.atomic_write) << 16
            | u64::from(self.atomic_boundary) << 32
            | u64::from(self.atomic_offset) << 48
    }

    #[inline]
    fn unpack(word: u64) -> Self {
        Self {
            optimal_io: word as u16,
            atomic_write: (word >> 16) as u16,
            atomic_boundary: (word >> 32) as u16,
            atomic_offset: (word >> 48) as u16,
        }
    }
}

#[cfg(test)]
mod tests {
    use nvme_spec::identify::NamespaceFeatures;

    use super::super::seen::tests::{identify, seen};
    use super::*;

    #[test]
    fn what_has_changed_stays_so_and_what_is_gone_comes_back() {
        let live = Live::new(seen(identify(10, 9)));
        live.set_gone();
        assert_eq!(live.condition(), Condition::Gone);
        live.update(seen(identify(20, 9)));
        assert_eq!(live.condition(), Condition::Usable { blocks: 20 });
        let changed = Condition::Changed { how: "is another" };
        live.set_changed("is another");
        live.update(seen(identify(20, 9)));
        live.set_gone();
        live.set_changed("again");
        assert_eq!(live.condition(), changed);
    }

    #[test]
    fn boundaries_fit_one_word_and_need_their_bit() {
        let mut data = identify(10, 9);
        data.noiob = 1.into();
        data.nawupf = 0xfffe.into();
        data.nabspf = 0x1234.into();
        data.nabo = 0x8001.into();
        let without = Boundaries::new(&data);
        assert_eq!((without.optimal_io, without.atomic_write), (1, 0));
        data.nsfeat = NamespaceFeatures::new()
            .with_atomic_fields(true)
            .into_bits();
        let with = Boundaries::new(&data);
        assert_eq!(Boundaries::unpack(with.pack()), with);
        let expected = (0xfffe, 0x1234, 0x8001);
        assert_eq!(
            (with.atomic_write, with.atomic_boundary, with.atomic_offset),
            expected
        );
    }
}
