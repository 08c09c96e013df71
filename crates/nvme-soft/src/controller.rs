//! The controller as its embedder holds it.

use std::fmt;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use nvme_spec::registers::offset;

use crate::config::{Config, StartError};
use crate::control::{Hold, Shared};
use crate::counters::Counters;
use crate::doorbells::{ATTENTION_CONTROL, Doorbells};
use crate::engine::Engine;
use crate::registers::Registers;
use crate::{HostMemory, Interrupts};

/// A running controller. Dropping it stops its thread, like a loss of power: nothing is flushed,
/// and what the host has in flight never completes.
///
/// Register accesses may come from any thread. Like those of a PCIe function they take effect on
/// their own time: the host sees it in CSTS.
pub struct SoftController {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    thread_id: u32,
}

impl SoftController {
    /// Starts a controller, disabled and with bus mastering on.
    ///
    /// # Errors
    ///
    /// [`StartError`] if a field of `config` is out of its range or the thread cannot be started.
    pub fn start(
        config: Config,
        memory: Arc<dyn HostMemory>,
        interrupts: Arc<dyn Interrupts>,
    ) -> Result<Self, StartError> {
        config.check()?;
        if interrupts.count() == 0 {
            return Err(StartError::NoVectors);
        }
        let doorbells = Arc::new(Doorbells::new(
            config.io_queue_pairs,
            config.doorbell_stride,
        ));
        let shared = Arc::new(Shared::new(Registers::new(&config), doorbells));
        let engine = Engine::new(config, shared.clone(), memory, interrupts);
        let (sender, receiver) = mpsc::sync_channel(1);
        let end = EndGuard(shared.clone());
        let thread = thread::Builder::new()
            .name("nvme-soft".into())
            .spawn(move || {
                let end = end;
                end.0.doorbells.wake().attach();
                // The receiver is there: start waits for this.
                let _ = sender.send(
                    rustix::thread::gettid()
                        .as_raw_nonzero()
                        .get()
                        .unsigned_abs(),
                );
                engine.run();
            })?;
        // The thread can only be gone already if it panicked, which the registers then show.
        let thread_id = receiver.recv().unwrap_or(0);
        Ok(Self {
            shared,
            thread: Some(thread),
            thread_id,
        })
    }

    /// Reads a 32-bit register of BAR 0. What is no register reads as zero, doorbells included.
    pub fn read32(&self, offset: u32) -> u32 {
        self.shared.lock().registers.read32(offset)
    }

    /// Writes a 32-bit register of BAR 0, or a doorbell.
    pub fn write32(&self, offset: u32, value: u32) {
        if offset >= offset::DOORBELLS {
            return self.shared.doorbells.ring(offset, value);
        }
        if self.shared.lock().registers.write32(offset, value) {
            self.shared.doorbells.raise_attention(ATTENTION_CONTROL);
        }
    }

    /// Reads a 64-bit register of BAR 0.
    pub fn read64(&self, offset: u32) -> u64 {
        let control = self.shared.lock();
        let low = control.registers.read32(offset);
        let high = control.registers.read32(offset.wrapping_add(4));
        u64::from(high) << 32 | u64::from(low)
    }

    /// Writes a 64-bit register of BAR 0.
    pub fn write64(&self, offset: u32, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset.wrapping_add(4), (value >> 32) as u32);
    }

    /// The doorbells, to be rung without a detour through [`SoftController::write32`].
    pub fn doorbells(&self) -> Arc<Doorbells> {
        self.shared.doorbells.clone()
    }

    /// Allows or forbids access to host memory (PCI command register, bus master enable). While it
    /// is forbidden no commands are fetched and none complete; afterwards they go on.
    ///
    /// Returns when it is in effect: after forbidding, no access is in progress.
    pub fn set_bus_master(&self, enabled: bool) {
        self.shared
            .change_and_wait(|control| control.bus_master = enabled);
    }

    /// Resets the function: the controller is disabled, and all registers have their initial
    /// values. The state of bus mastering stays.
    ///
    /// Returns when it is in effect: host memory is not accessed any more.
    pub fn reset(&self) {
        self.shared
            .change_and_wait(|control| control.reset_pending = true);
    }

    /// Leaves all further commands in their submission queues until [`SoftController::release`],
    /// to test what a host does meanwhile. Those fetched before complete.
    ///
    /// Returns when it is in effect.
    pub fn hold(&self) {
        self.shared
            .change_and_wait(|control| control.hold = Hold::Everything);
    }

    /// As [`SoftController::hold`], but the admin queue is served.
    pub fn hold_io(&self) {
        self.shared
            .change_and_wait(|control| control.hold = Hold::Io);
    }

    /// Ends [`SoftController::hold`] and [`SoftController::hold_io`].
    pub fn release(&self) {
        self.shared
            .change_and_wait(|control| control.hold = Hold::Nothing);
    }

    /// The kernel's identifier of the controller's thread, to tell its processor time from the
    /// host's.
    pub fn thread_id(&self) -> u32 {
        self.thread_id
    }

    /// What the controller has done so far.
    pub fn counters(&self) -> Counters {
        let cells = &self.shared.counters;
        let doorbells = &self.shared.doorbells;
        Counters {
            commands: cells.commands.get(),
            admin_commands: cells.admin_commands.get(),
            failed_commands: cells.failed_commands.get(),
            bytes_read: cells.bytes_read.get(),
            bytes_written: cells.bytes_written.get(),
            bytes_checked: cells.bytes_checked.get(),
            bytes_copied: cells.bytes_copied.get(),
            syncs: cells.syncs.get(),
            interrupts: cells.interrupts.get(),
            refused_accesses: cells.refused_accesses.get(),
            invalid_doorbells: doorbells.invalid(),
            redundant_completion_heads: doorbells.redundant_heads(),
            sleeps: cells.sleeps.get(),
        }
    }
}

impl Drop for SoftController {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.doorbells.raise_attention(ATTENTION_CONTROL);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for SoftController {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftController")
            .field("thread_id", &self.thread_id)
            .field("registers", &self.shared.lock().registers)
            .finish_non_exhaustive()
    }
}

/// Tells those who wait that the thread is gone, even when it panicked.
struct EndGuard(Arc<Shared>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.end();
    }
}
