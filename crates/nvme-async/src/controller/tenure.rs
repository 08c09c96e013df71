//! Having a device, and giving it up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::registers::Registers;
use super::registry::Release;
use crate::engine::sync::lock_std;

/// A controller's device, until it is given up: when it was shut down, has failed, or is gone.
pub(crate) struct Tenure {
    address: Arc<str>,
    /// Whether the device's registers are another process's.
    waits_for_peer: bool,
    held: Mutex<Option<Held>>,
    /// Whether it was given up without having been stopped.
    runs_on: AtomicBool,
}

/// The device, and what lets those know who wait for it.
pub(crate) struct Held {
    pub(crate) registers: Registers,
    /// Dropped last.
    pub(crate) release: Release,
}

impl Tenure {
    pub(crate) fn new(registers: Registers, release: Release) -> Arc<Self> {
        Arc::new(Self {
            address: registers.device.address().into(),
            waits_for_peer: registers.device.waits_for_peer(),
            held: Mutex::new(Some(Held { registers, release })),
            runs_on: AtomicBool::new(false),
        })
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// See [`Device::waits_for_peer`](crate::device::Device::waits_for_peer).
    pub(crate) fn waits_for_peer(&self) -> bool {
        self.waits_for_peer
    }

    /// Does something with the registers during which the device is not taken away, if there is one.
    pub(crate) fn while_held<R>(&self, usage: impl FnOnce(&Registers) -> R) -> Option<R> {
        let held = lock_std(&self.held);
        held.as_ref().map(|held| usage(&held.registers))
    }

    /// The registers, while there is a device.
    pub(crate) fn registers(&self) -> Option<Registers> {
        let held = lock_std(&self.held);
        held.as_ref().map(|held| held.registers.clone())
    }

    /// Whether it was given up, and may use memory all the same.
    pub(crate) fn runs_on(&self) -> bool {
        self.runs_on.load(Ordering::Acquire)
    }

    /// Takes the device away.
    pub(crate) fn take(&self) -> Option<Held> {
        lock_std(&self.held).take()
    }

    /// Gives the device back to the host, which may take long. If it has not `stopped`, memory that
    /// it may use is never freed.
    pub(crate) fn give_up(&self, stopped: bool) {
        self.runs_on.store(!stopped, Ordering::Release);
        if let Some(Held { registers, release }) = self.take() {
            registers.device.close();
            drop(registers);
            drop(release);
        }
    }
}
