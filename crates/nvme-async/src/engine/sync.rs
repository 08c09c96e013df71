//! What the engine's locks are made of: of the standard library, or, to be checked in all
//! interleavings, of loom.

#[cfg(not(nvme_async_loom))]
mod real {
    pub(crate) use std::sync::atomic::{AtomicBool, Ordering};
    pub(crate) use std::sync::{Mutex, MutexGuard};
    pub(crate) use std::thread::yield_now;
}

#[cfg(nvme_async_loom)]
mod real {
    pub(crate) use loom::sync::atomic::{AtomicBool, Ordering};
    pub(crate) use loom::sync::{Mutex, MutexGuard};
    pub(crate) use loom::thread::yield_now;
}

pub(crate) use self::real::*;

/// Locks; a panic of somebody who had the lock is no reason not to.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under the lock in a state that must not be seen.
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(not(nvme_async_loom))]
pub(crate) use self::lock as lock_std;

/// As [`lock`], for what is no matter of interleavings.
#[cfg(nvme_async_loom)]
pub(crate) fn lock_std<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
