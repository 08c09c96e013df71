//! Memory that notes when it is given back.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use nvme_async::Registered;
use nvme_async::memory::SharedMemory;

/// How many owners there were, and how many were dropped.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    made: AtomicUsize,
    dropped: AtomicUsize,
}

impl Ledger {
    /// Memory of `len` bytes, all `fill`, with an owner of its own.
    pub(crate) fn bytes(&self, len: usize, fill: u8) -> Bytes {
        Bytes::from_owner(Owned {
            bytes: vec![fill; len],
            _entry: self.entry(),
        })
    }

    /// Memory of `len` bytes to be registered.
    pub(crate) fn registered(&self, len: usize) -> Arc<dyn Registered> {
        Arc::new(Foreign {
            memory: SharedMemory::new(len).expect("a little memory"),
            _entry: self.entry(),
        })
    }

    /// Owners that exist.
    ///
    /// # Panics
    ///
    /// If one was dropped twice.
    pub(crate) fn alive(&self) -> usize {
        let dropped = self.0.dropped.load(Ordering::SeqCst);
        let made = self.0.made.load(Ordering::SeqCst);
        made.checked_sub(dropped).expect("each is dropped once")
    }

    fn entry(&self) -> Entry {
        self.0.made.fetch_add(1, Ordering::SeqCst);
        Entry(self.clone())
    }
}

struct Entry(Ledger);

impl Drop for Entry {
    fn drop(&mut self) {
        self.0.0.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

struct Owned {
    bytes: Vec<u8>,
    _entry: Entry,
}

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

struct Foreign {
    memory: SharedMemory,
    _entry: Entry,
}

// SAFETY: the mapping stays where it is while the value lives, is the whole file, and this process
// never accesses it.
unsafe impl Registered for Foreign {
    fn addr(&self) -> NonNull<u8> {
        self.memory.addr()
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn file(&self) -> Option<(std::os::fd::BorrowedFd<'_>, u64)> {
        Some((self.memory.fd(), 0))
    }
}
