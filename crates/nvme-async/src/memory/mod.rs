//! Memory that a device may read and write.
//!
//! A device accesses memory at times of its own, past everything that Rust knows about references.
//! What makes that sound is ownership: whatever a command names belongs to the driver from the
//! first poll of its future until the device is done with it, whether or not the future still
//! exists. So memory comes in three owned kinds, and none of them is a borrowed slice.
//!
//! * [`DmaBuf`]: unique, mutable memory from a [`Pool`] that the device reaches without a copy.
//!   A read takes it by value and gives it back; while the device has it, nobody else does.
//! * [`Bytes`](bytes::Bytes): shared, immutable memory. Writes take it. A read makes it from a
//!   `DmaBuf`, after the command has succeeded and not before, because from then on the memory is
//!   seen through `&[u8]` and must not change. The block returns to its pool when the last clone
//!   is dropped.
//! * [`Registered`]: foreign memory at a stable address, such as the memory of a guest, which
//!   others may change at any time. It is touched by the device and by volatile copies only, never
//!   through a reference.
//!
//! Beneath them:
//!
//! * [`SharedMemory`] is a mapping of a memfd that cannot shrink. All memory of the driver is made
//!   of it, so that a controller in another process can be given a file descriptor and an offset.
//!   Because the mapping is shared, `fork` does not separate it from what the device sees.
//! * [`Pool`] maps such memory for one device in chunks, and hands out blocks of device pages.
//! * [`DmaWords`] are blocks of the pool that the driver and the device change at the same time,
//!   namely queues and PRP lists. They are seen as atomic words only.
//!
//! # Trust
//!
//! After the completion of a command, the device is trusted not to touch the memory of that
//! command again: a `DmaBuf` is then an ordinary slice. For a peer that does not deserve this, an
//! IOMMU does not help, since the pool stays mapped. Such a peer is opened in isolation, where
//! data is copied between DMA memory and [`DmaBuf::heap`].

mod buddy;
mod buf;
mod free;
mod pool;
pub(crate) mod registered;
mod shared;
pub(crate) mod volatile;
mod words;

#[cfg(test)]
mod tests;

pub use buf::DmaBuf;
pub use pool::{AllocError, Pool, PoolStats};
pub use registered::Registered;
pub use shared::SharedMemory;
pub use words::DmaWords;

/// The unit of the pool, in bytes: the page of the device's PRP entries (CC.MPS = 0, NVMe base
/// specification 2.0, section 3.1.3.5), which is also the smallest page of a host.
pub const DEVICE_PAGE: usize = 4096;
