use std::sync::atomic::{AtomicU64, Ordering};

use crate::fault::FaultKind;

/// What a controller has done since it was started. Taken while it runs, the numbers need not
/// belong to one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// I/O commands fetched.
    pub commands: u64,
    /// Admin commands fetched.
    pub admin_commands: u64,
    /// Commands of both kinds that completed with an error.
    pub failed_commands: u64,
    /// Bytes that completed reads returned.
    pub bytes_read: u64,
    /// Bytes that completed writes stored.
    pub bytes_written: u64,
    /// Bytes that Compare and Verify read from the store.
    pub bytes_checked: u64,
    /// Bytes that completed Copies stored.
    pub bytes_copied: u64,
    /// Calls to make data durable: flushes and durable writes.
    pub syncs: u64,
    /// Interrupts raised.
    pub interrupts: u64,
    /// Accesses to host memory that its IOMMU refused.
    pub refused_accesses: u64,
    /// Doorbell writes that were invalid, those of the next line included.
    pub invalid_doorbells: u64,
    /// Writes of a completion queue's head doorbell that repeated the previous value.
    pub redundant_completion_heads: u64,
    /// How often the controller's thread went to sleep.
    pub sleeps: u64,
}

/// The counters that the controller's thread keeps. Only that thread writes.
#[derive(Debug, Default)]
pub(crate) struct Cells {
    pub(crate) commands: Cell,
    pub(crate) admin_commands: Cell,
    pub(crate) failed_commands: Cell,
    pub(crate) reads: Cell,
    pub(crate) bytes_read: Cell,
    pub(crate) writes: Cell,
    pub(crate) bytes_written: Cell,
    pub(crate) bytes_checked: Cell,
    pub(crate) bytes_copied: Cell,
    pub(crate) syncs: Cell,
    pub(crate) interrupts: Cell,
    pub(crate) refused_accesses: Cell,
    pub(crate) sleeps: Cell,
    /// By [`FaultKind`].
    pub(crate) faults: [Cell; FaultKind::ALL.len()],
}

/// A counter with one writer.
#[derive(Debug, Default)]
pub(crate) struct Cell(AtomicU64);

impl Cell {
    pub(crate) fn add(&self, count: u64) {
        // One writer, so no read-modify-write is needed.
        self.0.store(self.get() + count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
