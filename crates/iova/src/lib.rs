//! One device's I/O virtual address space: what is mapped where, and for how long.
//!
//! A device behind an IOMMU doesn't see host addresses but *I/O virtual addresses* (IOVAs), and of
//! memory only what was mapped for it. An [`AddressSpace`] decides where memory is mapped, finds
//! again what is mapped, and keeps every mapping, and the memory under it, for as long as a request
//! uses it. What carries the mappings out (the kernel's VFIO, a vfio-user socket, a software
//! controller) is a [`DmaMapper`]. Nothing in here knows what kind of device it is.
//!
//! ```text
//!  host memory        ┌── queues ──┐   ┌──────── guest RAM ────────┐     ┌ a buffer ┐ ┌ another ┐
//!                     └─────┬──────┘   └─────────────┬─────────────┘     └────┬─────┘ └───┬─────┘
//!                           │ register               │ register               │ map       │ map
//!                           ▼                        ▼                        ▼           ▼
//!  I/O addresses  ║┌─────────────────┬────────────────────────┐ ░░░░ ╔══╗ ░░░┌───────────┬───────┐║
//!                 ║│ fixed, from the │ bottom  ─▶             │ free ║  ║    │ temporary │◀─ from│║
//!                 ║│                 │                        │      ║  ║    │ (kept)    │  top  │║
//!                 ║└─────────────────┴────────────────────────┘ ░░░░ ╚══╝ ░░░└───────────┴───────┘║
//!                 ▲                                                reserved                      ▲
//!                 usable ranges, from the mapper                   (MSI window)
//! ```
//!
//! * **Fixed** mappings ([`register`](AddressSpace::register)) live until the returned
//!   [`FixedMapping`] is dropped. Memory within them shares their mapping when it is registered
//!   again.
//! * **Temporary** mappings ([`map`](AddressSpace::map)) are for the memory of one request that
//!   nobody registered. If it comes with an [`Owner`], the mapping may be *kept* after the request
//!   and used again, within the bounds of [`Retention`]; without one it never is, since another
//!   memory may have the same address by then.
//! * Requests find fixed and kept mappings by host address with
//!   [`look_up`](AddressSpace::look_up): no lock, no system call, no allocation.
//! * All of them give a **guard**, [`Mapped`]. A request holds it until the device is done with the
//!   memory. Unregistering doesn't pull memory from under a request: the mapping goes away with the
//!   last guard.
//! * An **[`Owner`]** (any `Arc`) keeps the memory alive and unmoved. It is dropped only after the
//!   mapper has confirmed that the device can no longer reach the memory. If the mapper can't, the
//!   owner and the addresses are leaked, on purpose: losing memory is better than letting a device
//!   write what belongs to someone else by now.
//!
//! Addresses come from the ranges that the mapper calls usable, are given back and merged, and
//! follow the host address modulo 2 MiB or 1 GiB for memory of that size, so that the IOMMU can use
//! large pages. IOVA 0 is never used.
//!
//! # When a limit is reached
//!
//! I/O addresses, the number of mappings (`dma_entry_limit` of VFIO, the regions of a vfio-user
//! server) and locked memory (RLIMIT_MEMLOCK) may run out. Then
//!
//! 1. kept mappings that no request uses are removed, an eighth of them at a time (at most 64), those
//!    first that were not used for longest. Neighbours go in one call where the mapper can do that;
//! 2. if there are none, [`map`](AddressSpace::map) and [`register`](AddressSpace::register) wait
//!    for requests to finish, in order of arrival, and hold nothing meanwhile that others could be
//!    waiting for. One is woken at a time. As many of the kept mappings in use as the first in the
//!    queue needs serve no further request, so steady load on them starves nobody;
//! 3. look-ups, and requests that find all of their memory mapped, go on as if nothing was;
//! 4. only what can't fit even when all others are done is an error. It says which limit it was and
//!    how to raise it ([`Error::is_limit`]).
//!
//! A request gets all of its mappings or none.
//!
//! # Example
//!
//! ```
//! use std::ptr::NonNull;
//! use std::sync::Arc;
//!
//! use iova::{AddressSpace, Direction, DmaMapper, Error, HostMemory, Segment};
//!
//! async fn example(mapper: Arc<dyn DmaMapper>) -> Result<(), Error> {
//!     let space = AddressSpace::new(mapper)?;
//!
//!     let memory = Arc::new([0_u8; 8192]);
//!     let host = |bytes: &[u8]| HostMemory::new(NonNull::from(bytes).cast(), bytes.len());
//!     // SAFETY: the `Arc` keeps the memory in place, and nobody writes it while the device, which
//!     // only reads, may use it.
//!     let fixed = unsafe { space.register(host(&*memory), Direction::ToDevice, memory.clone()) };
//!     let fixed = fixed.await?;
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
//!
//!     // A request for memory that nobody registered, shared and immutable:
//!     let data: Arc<[u8]> = Arc::from(vec![7; 4096]);
//!     let segment = Segment::new(host(&data)).owned_by(Arc::new(data.clone()));
//!     // SAFETY: the owner, a clone of the `Arc`, keeps the memory in place; nobody writes it.
//!     let guards = unsafe { space.map([segment], Direction::ToDevice) }.await?;
//!     assert_eq!(guards[0].len(), 4096);
//!     drop(guards);
//!     // Kept: the next request finds it.
//!     assert!(space.look_up(data.as_ptr(), data.len(), Direction::ToDevice).is_some());
//!     Ok(())
//! }
//! # #[cfg(feature = "testing")]
//! # {
//! #     let mapper = iova::testing::TestMapper::default();
//! #     let mut done = std::pin::pin!(example(Arc::new(mapper)));
//! #     let mut context = std::task::Context::from_waker(std::task::Waker::noop());
//! #     assert!(matches!(done.as_mut().poll(&mut context), std::task::Poll::Ready(Ok(()))));
//! # }
//! ```
//!
//! # Features
//!
//! | feature | adds |
//! | --- | --- |
//! | `vfio` | `iova::vfio`: the mapper for the kernel's VFIO (type 1 containers) |
//! | `vm-memory` | `iova::guest`: a guest's memory, as the crate `vm-memory` has it, as fixed mappings |
//! | `testing` | `iova::testing`: a mapper without a device, with settable limits and failures, for the tests of whoever builds on this crate |

#[cfg(not(target_pointer_width = "64"))]
compile_error!("the table of host addresses is made for 64-bit processors");

mod cache;
mod error;
mod fixed;
mod guard;
#[cfg(feature = "vm-memory")]
pub mod guest;
mod inner;
mod lease;
mod mapper;
#[cfg(all(test, loom))]
mod models;
mod ranges;
mod request;
mod space;
mod state;
mod sync;
mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(all(test, not(loom)))]
mod tests;
#[cfg(feature = "vfio")]
pub mod vfio;
mod waiters;

pub use error::Error;
pub use fixed::{FixedMapping, Register};
pub use guard::Mapped;
pub use lease::Unregister;
pub use mapper::{Direction, DmaMapper, Geometry, HostMemory, IovaRange, MapError};
pub use request::{MapRequest, Segment};
pub use space::{AddressSpace, Owner, Retention, Usage};
