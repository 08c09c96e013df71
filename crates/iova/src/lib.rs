//! One device's I/O virtual address space: what is mapped where, and for how long.
//!
//! A device behind an IOMMU doesn't see host addresses but *I/O virtual addresses* (IOVAs), and of
//! memory only what was mapped for it. An [`AddressSpace`] decides where memory is mapped, finds
//! again what is mapped, and keeps every mapping, and the memory under it, for as long as a request
//! uses it. What carries the mappings out (the kernel's VFIO, a vfio-user socket, a software
//! controller) is a [`DmaMapper`]. Nothing in here knows what kind of device it is.
//!
//! ```text
//!  host memory        ┌── queues ──┐   ┌──────── guest RAM ────────┐      ┌─ a buffer ─┐
//!                     └─────┬──────┘   └─────────────┬─────────────┘      └─────┬──────┘
//!                           │ register               │ register                 │ map_temporary
//!                           ▼                        ▼                          ▼
//!  I/O addresses  ║┌─────────────────┬────────────────────────┐ ░░░░░ ╔══╗ ░░░░░┌────────────┐║
//!                 ║│ fixed, from the │ bottom  ─▶             │ free  ║  ║ free │ temporary, │║
//!                 ║│                 │                        │       ║  ║      │◀─ from top │║
//!                 ║└─────────────────┴────────────────────────┘ ░░░░░ ╚══╝ ░░░░░└────────────┘║
//!                 ▲                                                  reserved                 ▲
//!                 usable ranges, from the mapper                     (MSI window)
//! ```
//!
//! * **Fixed** mappings ([`register`](AddressSpace::register)) live until the returned
//!   [`FixedMapping`] is dropped. Requests find them by host address with
//!   [`look_up`](AddressSpace::look_up): no lock, no system call, no allocation.
//! * **Temporary** mappings ([`map_temporary`](AddressSpace::map_temporary)) are for memory that
//!   nobody registered; they live as long as their guard.
//! * Both give a **guard**, [`Mapped`]. A request holds it until the device is done with the
//!   memory. Unregistering doesn't pull memory from under a request: the mapping goes away with the
//!   last guard.
//! * An **[`Owner`]** (any `Arc`) keeps the memory alive and unmoved. It is dropped only after the
//!   mapper has confirmed that the device can no longer reach the memory. If the mapper can't, the
//!   owner and the addresses are leaked, on purpose: losing memory is better than letting a device
//!   write what belongs to someone else by now.
//!
//! Addresses come from the ranges that the mapper calls usable, are given back and merged, and
//! follow the host address modulo 2 MiB or 1 GiB for memory of that size, so that the IOMMU can use
//! large pages. IOVA 0 is never used. A limit that is reached is an error that says which one it is
//! and how to raise it ([`Error::is_limit`]).
//!
//! ```
//! use std::ptr::NonNull;
//! use std::sync::Arc;
//!
//! use iova::{AddressSpace, Direction, DmaMapper, Error, HostMemory};
//!
//! fn example(mapper: Arc<dyn DmaMapper>) -> Result<(), Error> {
//!     let space = AddressSpace::new(mapper)?;
//!
//!     let memory = Arc::new([0_u8; 8192]);
//!     let addr = NonNull::from(&*memory).cast::<u8>();
//!     let host = HostMemory::new(addr, memory.len());
//!     // SAFETY: the `Arc` keeps the memory in place, and nobody writes it while the device, which
//!     // only reads, may use it.
//!     let fixed = unsafe { space.register(host, Direction::ToDevice, memory.clone()) }?;
//!
//!     // A request for 512 bytes in the middle of it:
//!     let buffer = &memory[4096..4608];
//!     let guard = space.look_up(buffer.as_ptr(), buffer.len(), Direction::ToDevice);
//!     let guard = guard.expect("it is registered");
//!     assert_eq!(guard.iova(), fixed.iova() + 4096);
//!
//!     drop(fixed); // No longer found, but still mapped ...
//!     assert_eq!(space.usage().fixed_mappings, 1);
//!     drop(guard); // ... until the request is done with it.
//!     assert_eq!(space.usage().fixed_mappings, 0);
//!     Ok(())
//! }
//! ```
//!
//! Feature `testing` adds `iova::testing`: a mapper without a device, with settable limits and
//! failures, for the tests of whoever builds on this crate.

mod error;
mod guard;
mod mapper;
mod ranges;
mod space;
mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use error::Error;
pub use guard::{FixedMapping, Mapped};
pub use mapper::{Direction, DmaMapper, Geometry, HostMemory, IovaRange, MapError};
pub use space::{AddressSpace, Owner, Usage};
