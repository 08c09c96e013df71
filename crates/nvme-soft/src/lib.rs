//! A software NVMe controller over a regular file or memory.
//!
//! [`SoftController`] is an NVMe 2.0 I/O controller with the NVM command set. It sees what a
//! controller on PCIe sees (registers, doorbells, host memory through an IOMMU, interrupt vectors)
//! and knows nothing of the driver on the other side. The embedder provides host memory and
//! interrupts as two small traits, [`HostMemory`] and [`Interrupts`], and passes on the host's
//! register and doorbell accesses.
//!
//! A host that finds register writes expensive may have shadow doorbells
//! ([`Config::doorbell_buffers`]) and then writes a register hardly but to wake the controller.
//! Interrupts of I/O queues are put off where the host has set Interrupt Coalescing.
//!
//! The controller works on one thread of its own, which sleeps, without a timer, when there is
//! nothing to do. Durable writes, flushes and large deallocations of a store that waits for a medium
//! ([`ConcurrentStore`](store::ConcurrentStore)) are done by further threads, at most 16 at a time, so
//! that they do not wait for each other and nobody waits for them but what overlaps them. Where the host writes doorbells to memory ([`Config::polled_doorbells`]) it looks at them
//! from time to time. Each kind of bad command is answered with the status that the specification
//! names, and access to host memory that is refused ends the command and is counted. What a host can cause as
//! often as it likes is logged once in [a while](LogLimit).
//!
//! To test what a host does about a controller that is not so well behaved, its [`fault`]s are data:
//! which commands and events they strike, and what then happens.
//!
//! ```
//! use std::sync::Arc;
//!
//! use nvme_soft::store::MemoryStore;
//! use nvme_soft::{AccessFault, Config, HostMemory, Interrupts, NamespaceConfig, SoftController};
//!
//! /// A host that grants no access to its memory.
//! struct Nothing;
//!
//! impl HostMemory for Nothing {
//!     fn read(&self, address: u64, out: &mut [u8]) -> Result<(), AccessFault> {
//!         Err(AccessFault::read(address, out.len()))
//!     }
//!     fn write(&self, address: u64, data: &[u8]) -> Result<(), AccessFault> {
//!         Err(AccessFault::write(address, data.len()))
//!     }
//!     fn store_release(&self, address: u64, _value: u32) -> Result<(), AccessFault> {
//!         Err(AccessFault::write(address, 4))
//!     }
//!     fn load_acquire(&self, address: u64) -> Result<u32, AccessFault> {
//!         Err(AccessFault::read(address, 4))
//!     }
//! }
//!
//! impl Interrupts for Nothing {
//!     fn count(&self) -> u16 {
//!         1
//!     }
//!     fn raise(&self, _vector: u16) {}
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = Config::default();
//! config.namespaces.push(NamespaceConfig::new(MemoryStore::new(1 << 20)?, 512));
//! let controller = SoftController::start(config, Arc::new(Nothing), Arc::new(Nothing))?;
//! assert_eq!(controller.read32(0x08), 0x0002_0000); // VS: version 2.0
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod fault;
pub mod store;

mod admin;
mod change;
mod config;
mod control;
mod controller;
mod counters;
mod data;
mod dma;
mod doorbells;
mod engine;
mod log_limit;
mod namespace;
mod nvm;
mod pool;
mod registers;
mod wake;

use std::fmt;

pub use change::{ChangeError, NamespaceChange};
pub use config::{Config, NamespaceConfig, PolledDoorbells, StartError};
pub use controller::{ResetError, SoftController};
pub use counters::Counters;
pub use doorbells::Doorbells;
pub use log_limit::LogLimit;

/// The host's memory as the controller reaches it: through the IOMMU, by I/O virtual address.
///
/// All calls come from the controller's thread. Ranges may span several mappings that touch.
pub trait HostMemory: Send + Sync {
    /// Copies from host memory.
    ///
    /// # Errors
    ///
    /// [`AccessFault`] if any byte may not be read; `out` then holds anything.
    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), AccessFault>;

    /// Copies to host memory.
    ///
    /// # Errors
    ///
    /// [`AccessFault`] if any byte may not be written; bytes that may be written may have been.
    fn write(&self, address: u64, data: &[u8]) -> Result<(), AccessFault>;

    /// Stores one little-endian 32-bit word atomically, after all writes before it, as a host thread
    /// that loads the word with Acquire observes it. `address` is a multiple of 4.
    ///
    /// # Errors
    ///
    /// [`AccessFault`] if the word may not be written.
    fn store_release(&self, address: u64, value: u32) -> Result<(), AccessFault>;

    /// Loads one little-endian 32-bit word atomically, before all reads after it: what a host thread
    /// wrote before it stored the word with Release is then visible. `address` is a multiple of 4.
    ///
    /// # Errors
    ///
    /// [`AccessFault`] if the word may not be read.
    fn load_acquire(&self, address: u64) -> Result<u32, AccessFault>;
}

/// The IOMMU refused an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessFault {
    /// The first address of the access.
    pub address: u64,
    /// Its length in bytes.
    pub len: usize,
    /// Whether it was to write host memory.
    pub is_write: bool,
}

impl AccessFault {
    /// A refused read of host memory.
    pub fn read(address: u64, len: usize) -> Self {
        Self {
            address,
            len,
            is_write: false,
        }
    }

    /// A refused write to host memory.
    pub fn write(address: u64, len: usize) -> Self {
        Self {
            address,
            len,
            is_write: true,
        }
    }
}

impl fmt::Display for AccessFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = if self.is_write { "write" } else { "read" };
        write!(
            f,
            "{access} of {:#x} bytes at I/O address {:#x} refused",
            self.len, self.address
        )
    }
}

impl std::error::Error for AccessFault {}

/// Doorbells that a host writes as memory, such as a page that another process has mapped.
///
/// The controller sets a doorbell to 0 when its queue is created. Any value may be found there.
pub trait DoorbellMemory: fmt::Debug + Send + Sync {
    /// The word at this offset of BAR 0, before all that is read after it. What is outside of the memory
    /// is 0.
    fn load(&self, offset: u32) -> u32;

    /// Sets the word at this offset of BAR 0, if that is inside of the memory.
    fn store(&self, offset: u32, value: u32);
}

/// Where the controller's interrupts go.
pub trait Interrupts: Send + Sync {
    /// How many vectors there are; at least one. It does not change.
    fn count(&self) -> u16;

    /// Raises a vector below [`Interrupts::count`]. Called on the controller's thread, so it must
    /// neither block nor wait for the controller.
    fn raise(&self, vector: u16);

    /// Raises the vectors that were raised while they were masked and are unmasked now, where the host does
    /// that in memory, and nothing else tells of it. Returns whether there are others, for which this is
    /// called again within 0.1 s. Called on the controller's thread when it has nothing to do.
    fn raise_unmasked(&self) -> bool {
        false
    }
}
