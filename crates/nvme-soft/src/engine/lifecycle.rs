//! Enable, disable, reset and shutdown (base specification 2.0, sections 3.5 to 3.7).

use std::sync::Arc;
use std::time::Instant;

use nvme_spec::registers::{
    ControllerConfiguration, ControllerStatus, ShutdownNotification, ShutdownStatus,
};

use super::{Engine, State};
use crate::control::Control;
use crate::doorbells::{ATTENTION_CONTROL, ATTENTION_INVALID_REGISTER, ATTENTION_INVALID_VALUE};
use crate::fault::{Behaviour, EnableRefusal, FaultEvent};

impl Engine {
    /// Looks at what the embedder's threads have set; returns false when the thread is to end.
    pub(super) fn attend(&mut self) -> bool {
        let what = self.doorbells.registers.take_attention();
        if what & ATTENTION_CONTROL != 0 && !self.control() {
            return false;
        }
        if self.is_serving() {
            if what & ATTENTION_INVALID_REGISTER != 0 {
                self.invalid_doorbell_register();
            }
            if what & ATTENTION_INVALID_VALUE != 0 {
                self.invalid_doorbell_value();
            }
            // Those that came while bus mastering was off.
            self.deliver_events();
            self.signal();
        }
        true
    }

    fn control(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut control = shared.lock();
        if control.stops_service() {
            // That takes its time, during which the host reads CSTS. Nothing is submitted meanwhile.
            drop(control);
            self.background.wait();
            control = shared.lock();
        }
        if control.stop {
            return false;
        }
        self.bus_master = control.bus_master;
        self.hold = control.hold;
        if std::mem::take(&mut control.reset_pending) {
            control.reset_failed =
                self.state == State::Gone || self.strike_event(FaultEvent::Reset).is_some();
            if !control.reset_failed {
                self.disable();
                control.registers.reset();
            }
        }
        if std::mem::take(&mut control.registers.disable_pending)
            && self.strike_event(FaultEvent::Disable).is_none()
        {
            self.disable();
            control.registers.status = ControllerStatus::new();
        }
        let configuration = control.registers.configuration;
        if configuration.en() && self.state == State::Disabled {
            self.enable(&mut control);
        }
        let calls = std::mem::take(&mut control.calls);
        shared.acknowledge(&mut control);
        let shutdown = matches!(
            configuration.shn(),
            ShutdownNotification::Normal | ShutdownNotification::Abrupt
        ) && control.registers.status.shst() == ShutdownStatus::Normal;
        if shutdown {
            control.registers.status.set_shst(ShutdownStatus::Occurring);
        }
        // What follows takes its time, during which the host reads CSTS.
        drop(control);
        if shutdown {
            if self.strike_event(FaultEvent::Shutdown).is_some() {
                self.stop_serving();
            } else {
                self.shut_down();
            }
        }
        for call in calls {
            call.run(self);
        }
        true
    }

    fn enable(&mut self, control: &mut Control) {
        let registers = &mut control.registers;
        let configuration = registers.configuration;
        if let Err(reason) = self.check_configuration(configuration, registers) {
            if let Some(left_out) = self.shared.log.refused_enables.pass() {
                tracing::warn!(reason, left_out, "enable refused");
            }
            self.state = State::Failed;
            registers.status.set_cfs(true);
            return;
        }
        let struck = self.strike_event(FaultEvent::Enable);
        match struck.as_deref() {
            Some(Behaviour::RefuseEnable(EnableRefusal::NeverReady)) => {
                self.state = State::NotReady;
                return;
            }
            Some(Behaviour::RefuseEnable(EnableRefusal::Fail)) => {
                self.state = State::Failed;
                registers.status.set_cfs(true);
                return;
            }
            _ => {}
        }
        self.limits.page_size = 4096 << configuration.mps();
        let attributes = registers.admin_queues;
        self.queues.create_completion(
            &mut self.doorbells,
            0,
            registers.completion_base,
            u32::from(attributes.acqs()) + 1,
            Some(0),
        );
        self.queues.create_submission(
            &mut self.doorbells,
            0,
            registers.submission_base,
            u32::from(attributes.asqs()) + 1,
            0,
        );
        if let Some(&Behaviour::SlowReady(time)) = struck.as_deref() {
            self.state = State::NotReady;
            self.ready_at = Instant::now().checked_add(time);
            return;
        }
        self.state = State::Ready;
        registers.status = ControllerStatus::new().with_rdy(true);
    }

    /// Sets CSTS.RDY of a slow controller once it is time; returns whether it was.
    pub(super) fn become_ready(&mut self) -> bool {
        let is_due = self.ready_at.is_some_and(|at| at <= Instant::now());
        if is_due {
            self.ready_at = None;
            self.state = State::Ready;
            self.shared.lock().registers.status.set_rdy(true);
        }
        is_due
    }

    fn check_configuration(
        &self,
        configuration: ControllerConfiguration,
        registers: &crate::registers::Registers,
    ) -> Result<(), &'static str> {
        let capabilities = registers.capabilities;
        let page = 4096u64 << configuration.mps();
        let attributes = registers.admin_queues;
        if !matches!(configuration.css(), 0 | 6) {
            Err("CC.CSS selects a command set that is not supported")
        } else if !(capabilities.mpsmin()..=capabilities.mpsmax()).contains(&configuration.mps()) {
            Err("CC.MPS is outside of CAP.MPSMIN and CAP.MPSMAX")
        } else if configuration.ams() != 0 {
            Err("CC.AMS selects an arbitration mechanism that is not supported")
        } else if !matches!(configuration.iosqes(), 0 | 6) {
            Err("CC.IOSQES is not 64 bytes")
        } else if !matches!(configuration.iocqes(), 0 | 4) {
            Err("CC.IOCQES is not 16 bytes")
        } else if attributes.asqs() == 0 || attributes.acqs() == 0 {
            Err("AQA: an admin queue has at least two entries")
        } else if !registers.submission_base.is_multiple_of(page)
            || !registers.completion_base.is_multiple_of(page)
        {
            Err("ASQ or ACQ is not aligned to the memory page size")
        } else {
            Ok(())
        }
    }

    /// Whether I/O queue entries have sizes, which the host may set as late as with the first
    /// I/O queue.
    pub(crate) fn entry_sizes(&self) -> (u8, u8) {
        let configuration = self.shared.lock().registers.configuration;
        (configuration.iosqes(), configuration.iocqes())
    }

    /// Forgets all queues and commands. Host memory is not accessed any more, and what was written
    /// is written by now.
    pub(super) fn disable(&mut self) {
        self.state = State::Disabled;
        self.ready_at = None;
        self.queues.delete_all(&self.doorbells);
        self.doorbells.forget_buffers();
        self.background.forget();
        self.deferred.clear();
        self.coalescing = None;
        self.forget_struck();
        self.admin.reset(&self.config);
    }

    fn shut_down(&mut self) {
        // A failure was reported, and there is no completion to tell of it.
        let _ = self.flush_all();
        self.stop_serving();
        let mut control = self.shared.lock();
        // A reset since has cleared the state that this completes.
        if control.registers.status.shst() == ShutdownStatus::Occurring
            && !control.reset_pending
            && !control.registers.disable_pending
        {
            control.registers.status.set_shst(ShutdownStatus::Complete);
        }
    }

    fn stop_serving(&mut self) {
        // With the controller disabled there is nothing to stop, and it may be enabled later.
        if self.state == State::Ready {
            self.end_coalescing();
            self.state = State::ShutDown;
        }
    }

    /// Sets CSTS.CFS: an error that no completion can tell of.
    pub(crate) fn fail(&mut self, reason: &'static str) {
        if self.state == State::Gone {
            return;
        }
        if let Some(left_out) = self.shared.log.failures.pass() {
            tracing::error!(reason, left_out, "controller failed");
        }
        self.state = State::Failed;
        self.shared.lock().registers.status.set_cfs(true);
    }
}
