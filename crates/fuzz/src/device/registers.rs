//! The device's registers.

use std::io;

use nvme_async::device::DeviceError;
use nvme_spec::registers::{
    Capabilities, ControllerConfiguration, ControllerStatus, ShutdownNotification, ShutdownStatus,
    offset,
};

use super::{Completion, State, Submission};
use crate::script::RegisterMove;

/// An access that the transport could not make.
pub(super) fn failure(operation: &str, register: u32) -> DeviceError {
    DeviceError {
        address: "fuzz".to_owned(),
        operation: format!("{operation} {register:#x}"),
        source: io::Error::from(io::ErrorKind::TimedOut),
    }
}

impl State {
    /// What the script has for this access.
    fn register_move(&mut self) -> Option<RegisterMove> {
        let (left, _) = self.register_moves.front_mut()?;
        match left.checked_sub(1) {
            Some(fewer) => {
                *left = fewer;
                None
            }
            None => self
                .register_moves
                .pop_front()
                .map(|(_, scripted)| scripted),
        }
    }

    pub(super) fn read(&mut self, register: u32, scripted: bool) -> Result<u32, DeviceError> {
        if !scripted {
            return Ok(self.value(register));
        }
        if self.has_vanished {
            return Ok(u32::MAX);
        }
        let changed = self.register_move();
        self.has_misled |= changed.is_some();
        let value = match self.registers.status {
            Some(status) if register == offset::CSTS => status,
            _ => self.value(register),
        };
        match changed {
            None => Ok(value),
            Some(RegisterMove::Value(value)) => Ok(value),
            Some(RegisterMove::Flip(bit)) => Ok(value ^ 1 << (bit % 32)),
            Some(RegisterMove::Fail) => Err(failure("read", register)),
        }
    }

    pub(super) fn write(
        &mut self,
        register: u32,
        value: u32,
        scripted: bool,
    ) -> Result<(), DeviceError> {
        if scripted {
            if self.has_vanished {
                return Ok(());
            }
            if let Some(RegisterMove::Fail) = self.register_move() {
                return Err(failure("write", register));
            }
        }
        let low = |whole: u64| whole & !0xffff_ffff | u64::from(value);
        let high = |whole: u64| whole & 0xffff_ffff | u64::from(value) << 32;
        let registers = &mut self.registers;
        match register {
            offset::CC => self.configure(ControllerConfiguration::from_bits(value)),
            offset::AQA => registers.admin_attributes = value,
            offset::ASQ => registers.admin_submission = low(registers.admin_submission),
            offset::ACQ => registers.admin_completion = low(registers.admin_completion),
            0x2c => registers.admin_submission = high(registers.admin_submission),
            0x34 => registers.admin_completion = high(registers.admin_completion),
            _ => {}
        }
        Ok(())
    }

    fn configure(&mut self, configuration: ControllerConfiguration) {
        let was_enabled = self.registers.configuration.en();
        self.registers.configuration = configuration;
        if was_enabled && !configuration.en() {
            self.stop();
        }
        if !was_enabled && configuration.en() {
            let attributes = self.registers.admin_attributes;
            self.submissions.insert(
                0,
                Submission {
                    address: self.registers.admin_submission,
                    entries: (attributes & 0xfff) + 1,
                    head: 0,
                    completion: 0,
                },
            );
            self.completions.insert(
                0,
                Completion {
                    address: self.registers.admin_completion,
                    entries: (attributes >> 16 & 0xfff) + 1,
                    tail: 0,
                    phase: true,
                    vector: Some(0),
                },
            );
        }
    }

    /// Forgets all queues and commands.
    pub(super) fn stop(&mut self) {
        self.registers.configuration = ControllerConfiguration::new();
        self.registers.status = None;
        self.submissions.clear();
        self.completions.clear();
        self.withheld.clear();
        self.events.clear();
    }

    fn value(&self, register: u32) -> u32 {
        let configuration = self.registers.configuration;
        match register {
            offset::CAP => self.capabilities() as u32,
            0x04 => (self.capabilities() >> 32) as u32,
            offset::VS => self.claims.version.unwrap_or(0x0002_0000),
            offset::CC => configuration.into_bits(),
            offset::CSTS => {
                let done = configuration.shn() != ShutdownNotification::None;
                let shutdown = if done {
                    ShutdownStatus::Complete
                } else {
                    ShutdownStatus::Normal
                };
                ControllerStatus::new()
                    .with_rdy(configuration.en())
                    .with_shst(shutdown)
                    .into_bits()
            }
            offset::AQA => self.registers.admin_attributes,
            offset::CRTO => self.claims.ready_timeouts,
            _ => 0,
        }
    }

    fn capabilities(&self) -> u64 {
        let sound = Capabilities::new()
            .with_mqes(63)
            .with_cqr(true)
            .with_to(1)
            .with_css(0x01)
            .with_mpsmax(4);
        sound.into_bits() ^ self.claims.capabilities.unwrap_or(0)
    }

    /// The distance of doorbells in bytes.
    pub(super) fn stride(&self) -> u32 {
        4 << Capabilities::from_bits(self.capabilities()).dstrd()
    }
}
