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

#[cfg(nvme_async_loom)]
use loom::sync::atomic::fence;
use std::sync::atomic::Ordering;
#[cfg(not(nvme_async_loom))]
use std::sync::atomic::fence;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("nvme-async has device-memory barriers for x86-64 only");

/// Orders all earlier stores to memory before a following doorbell store.
pub(crate) fn before_doorbell() {
    fence(Ordering::Release);
}

/// Orders the store of a shadow doorbell before the load of its event index.
pub(crate) fn between_value_and_event_index() {
    fence(Ordering::SeqCst);
}

/// The rare side of a pair of barriers. With [`asymmetric_light`] in one thread and this in another
/// it holds that of two stores, each before its barrier, and two loads after them, at least one load
/// sees the other side's store.
pub(crate) fn asymmetric_heavy() {
    fence(Ordering::SeqCst);
    #[cfg(not(nvme_async_loom))]
    if membarrier::is_available() {
        membarrier::run();
    }
}

/// The frequent side; it costs nothing where the kernel has `membarrier`.
#[inline]
pub(crate) fn asymmetric_light() {
    #[cfg(not(nvme_async_loom))]
    if membarrier::is_available() {
        return std::sync::atomic::compiler_fence(Ordering::SeqCst);
    }
    fence(Ordering::SeqCst);
}

/// membarrier(2): makes every running thread of the process execute a full barrier.
#[cfg(not(nvme_async_loom))]
mod membarrier {
    use std::sync::LazyLock;

    use rustix::thread::{MembarrierCommand, membarrier};

    /// Registered once; both sides agree, since the answer never changes.
    static AVAILABLE: LazyLock<bool> =
        LazyLock::new(|| membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok());

    #[inline]
    pub(super) fn is_available() -> bool {
        *AVAILABLE
    }

    pub(super) fn run() {
        // Can't fail once registered.
        let result = membarrier(MembarrierCommand::PrivateExpedited);
        debug_assert!(result.is_ok());
    }
}
