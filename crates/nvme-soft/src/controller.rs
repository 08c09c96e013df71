//! The controller as its embedder holds it.

mod faults;

use std::fmt;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use nvme_spec::event::AsyncEvent;
use nvme_spec::log::CriticalWarning;
use nvme_spec::registers::offset;

use crate::change::{ChangeError, NamespaceChange};
use crate::config::{Config, NamespaceConfig, StartError};
use crate::control::{Control, Hold, Shared};
use crate::counters::Counters;
use crate::doorbells::{ATTENTION_CONTROL, Doorbells};
use crate::engine::Engine;
use crate::registers::Registers;
use crate::{HostMemory, Interrupts};

/// A running controller. Dropping it stops its threads, like a loss of power: nothing is flushed,
/// and what the host has in flight never completes. What is being written to a store is written
/// before.
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
            config
                .polled_doorbells
                .as_ref()
                .map(|polled| polled.memory.clone()),
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
        let control = self.shared.lock();
        if control.vanished {
            return u32::MAX;
        }
        control.registers.read32(offset)
    }

    /// Writes a 32-bit register of BAR 0, or a doorbell.
    pub fn write32(&self, offset: u32, value: u32) {
        if offset >= offset::DOORBELLS {
            return self.shared.doorbells.ring(offset, value);
        }
        let mut control = self.shared.lock();
        if control.vanished {
            return;
        }
        let is_control = control.registers.write32(offset, value);
        drop(control);
        if is_control {
            self.shared.doorbells.raise_attention(ATTENTION_CONTROL);
        }
    }

    /// Reads a 64-bit register of BAR 0.
    pub fn read64(&self, offset: u32) -> u64 {
        let control = self.shared.lock();
        if control.vanished {
            return u64::MAX;
        }
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
        self.change(|control| control.bus_master = enabled);
    }

    /// Resets the function: the controller is disabled, and all registers have their initial
    /// values. The state of bus mastering stays.
    ///
    /// Returns when it is in effect: host memory is not accessed any more, and what was being
    /// written to a store is written, as it is when the host has disabled the controller (CSTS.RDY).
    ///
    /// # Errors
    ///
    /// [`ResetError`] if a fault prevents it, or the function has vanished.
    pub fn reset(&self) -> Result<(), ResetError> {
        let control = self
            .shared
            .change_and_wait(|control| control.reset_pending = true);
        if control.reset_failed {
            return Err(ResetError);
        }
        Ok(())
    }

    /// Leaves all further commands in their submission queues until [`SoftController::release`],
    /// to test what a host does meanwhile. Those fetched before complete.
    ///
    /// Returns when it is in effect.
    pub fn hold(&self) {
        self.change(|control| control.hold = Hold::Everything);
    }

    /// As [`SoftController::hold`], but the admin queue is served.
    pub fn hold_io(&self) {
        self.change(|control| control.hold = Hold::Io);
    }

    /// Ends [`SoftController::hold`] and [`SoftController::hold_io`].
    pub fn release(&self) {
        self.change(|control| control.hold = Hold::Nothing);
    }

    fn change(&self, change: impl FnOnce(&mut Control)) {
        drop(self.shared.change_and_wait(change));
    }

    /// Changes a namespace while the host may use it, between two commands. The change is noted in
    /// the Changed Namespace List, and a host that asked for it (feature 0Bh) is told by an event
    /// (base specification 2.0, section 5.2). What changes nothing is neither noted nor told.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; nothing has happened then.
    pub fn change_namespace(&self, change: NamespaceChange) -> Result<(), ChangeError> {
        self.shared
            .call(move |engine| engine.change_namespace(change))
            .unwrap_or(Err(ChangeError::Ended))
    }

    /// [Changes](Self::change_namespace) a namespace's size in bytes.
    ///
    /// # Errors
    ///
    /// As [`SoftController::change_namespace`].
    pub fn resize_namespace(&self, nsid: u32, bytes: u64) -> Result<(), ChangeError> {
        self.change_namespace(NamespaceChange::Resize { nsid, bytes })
    }

    /// Makes a namespace [inactive](Self::change_namespace).
    ///
    /// # Errors
    ///
    /// As [`SoftController::change_namespace`].
    pub fn detach_namespace(&self, nsid: u32) -> Result<(), ChangeError> {
        self.change_namespace(NamespaceChange::Detach { nsid })
    }

    /// Makes a namespace [active](Self::change_namespace) again.
    ///
    /// # Errors
    ///
    /// As [`SoftController::change_namespace`].
    pub fn attach_namespace(&self, nsid: u32) -> Result<(), ChangeError> {
        self.change_namespace(NamespaceChange::Attach { nsid })
    }

    /// Adds a namespace, active, and returns its identifier. The host is told as of a
    /// [change](Self::change_namespace).
    ///
    /// # Errors
    ///
    /// [`ChangeError::Full`] if there may be no more ([`Config::max_namespaces`]), and
    /// [`ChangeError::Invalid`] if `config` is.
    pub fn add_namespace(&self, config: NamespaceConfig) -> Result<u32, ChangeError> {
        self.shared
            .call(move |engine| engine.add_namespace(config))
            .unwrap_or(Err(ChangeError::Ended))
    }

    /// Sets the composite temperature in kelvins; 310 at the start. Beyond the host's thresholds
    /// it is a critical warning, and a host that asked for it is told by an event.
    pub fn set_temperature(&self, kelvins: u16) {
        self.shared
            .call(move |engine| engine.set_temperature(kelvins));
    }

    /// Sets the critical warnings of the SMART / Health Information log, besides the one that
    /// follows from the temperature. A host that asked for those that are new is told by an event.
    pub fn set_critical_warning(&self, warning: CriticalWarning) {
        self.shared
            .call(move |engine| engine.set_critical_warning(warning));
    }

    /// Reports an event to the host, whether or not it asked for it and whether or not it is true.
    /// Events of a type wait until the host has read the log page of the last one, if there is
    /// such a log page; of those that wait, equal ones are one.
    pub fn raise_event(&self, event: AsyncEvent) {
        self.shared.call(move |engine| engine.raise_event(event));
    }

    /// The kernel's identifier of the controller's thread, to tell its processor time from the
    /// host's. Threads that wait for a medium in its place are not meant.
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

/// A function reset had no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the function was not reset")]
#[non_exhaustive]
pub struct ResetError;

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
