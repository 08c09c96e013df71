//! Memory ordering between host and device.
//!
//! A driver needs two orders. Submission entries must be in memory before the doorbell store
//! reaches the device, and the rest of a completion entry must be read after the dword with the
//! phase bit. The second is an Acquire load of that dword. The first needs a barrier that orders
//! ordinary memory against *device* memory.
//!
//! On x86-64 stores are not reordered with stores, to device memory neither, so a Release fence
//! (which keeps the compiler from moving them) is enough. On aarch64 Rust's fences order only
//! within the inner-shareable domain; ordering against device memory takes `dmb oshst` before the
//! doorbell and `dmb oshld` after the phase bit, which Rust's atomics do not give. Until those
//! are written and tested on such a machine the crate does not build there.

use std::sync::atomic::{Ordering, fence};

#[cfg(not(target_arch = "x86_64"))]
compile_error!("nvme-async has device-memory barriers for x86-64 only");

/// Orders all earlier stores to memory before a following doorbell store.
pub(crate) fn before_doorbell() {
    fence(Ordering::Release);
}
