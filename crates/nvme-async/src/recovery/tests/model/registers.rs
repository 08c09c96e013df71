//! Registers, reset and bus master: what the driver's `Device` is.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use iova::DmaMapper;
use nvme_spec::registers::{ControllerConfiguration, ControllerStatus, Version, offset};

use super::{Controller, Event, HostView, Model, Presence};
use crate::device::{Device, DeviceError, Doorbell, DoorbellCall};
use crate::recovery::tests::faults::Fault;

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the model controller")
    }
}

fn failed(operation: &str) -> DeviceError {
    DeviceError {
        address: "model".to_owned(),
        operation: operation.to_owned(),
        source: io::ErrorKind::Other.into(),
    }
}

impl Device for Controller {
    fn address(&self) -> &str {
        "model"
    }

    fn read32(&self, register: u32) -> Result<u32, DeviceError> {
        self.lock().read(register)
    }

    fn write32(&self, register: u32, value: u32) -> Result<(), DeviceError> {
        self.lock().write(register, value);
        Ok(())
    }

    fn doorbell(&self, _: u32) -> Result<Doorbell, DeviceError> {
        // The doorbells of a model are made with its queues.
        Err(failed("doorbell"))
    }

    fn vectors(&self) -> &[Arc<OwnedFd>] {
        &[]
    }

    fn mapper(&self) -> Arc<dyn DmaMapper> {
        self.mapper.clone()
    }

    fn set_bus_master(&self, enabled: bool) -> Result<(), DeviceError> {
        let mut model = self.lock();
        if !enabled && model.strikes(Fault::BusMasterStays) {
            return Err(failed("bus master"));
        }
        model.bus_master = enabled;
        Ok(())
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.lock().reset_function()
    }

    fn close(&self) {
        self.lock().be_closed();
    }
}

impl DoorbellCall for Controller {
    fn ring(&self, offset: u32, value: u32) {
        self.lock().doorbell(offset, value);
    }
}

impl Model {
    fn read(&mut self, register: u32) -> Result<u32, DeviceError> {
        if self.closed {
            self.violate(format!("register {register:#x} is read of a closed device"));
        }
        match self.presence {
            Presence::Ones => return Ok(u32::MAX),
            Presence::Zeroes => return Ok(0),
            Presence::Unreadable => return Err(failed("read")),
            Presence::Here => {}
        }
        Ok(match register {
            offset::VS => Version::from_bits(0x2_0000).into_bits(),
            offset::CC => self.configuration,
            offset::CSTS => {
                let enabled = ControllerConfiguration::from_bits(self.configuration).en();
                self.host.ready |= self.ready && enabled;
                ControllerStatus::new()
                    .with_rdy(self.ready)
                    .with_cfs(self.fatal)
                    .into_bits()
            }
            _ => 0,
        })
    }

    fn write(&mut self, register: u32, value: u32) {
        if self.closed {
            self.violate(format!(
                "register {register:#x} is written of a closed device"
            ));
        }
        let [submission, completion] = &mut self.admin_rings;
        let half = |address: &mut u64, shift: u32| {
            *address = *address & !(0xffff_ffff << shift) | u64::from(value) << shift;
        };
        match register {
            offset::CC => self.configure(value),
            offset::AQA => self.attributes = value,
            offset::ASQ => half(submission, 0),
            offset::ACQ => half(completion, 0),
            _ if register == offset::ASQ + 4 => half(submission, 32),
            _ if register == offset::ACQ + 4 => half(completion, 32),
            _ => self.violate(format!("register {register:#x} is written")),
        }
    }

    fn configure(&mut self, value: u32) {
        let before = ControllerConfiguration::from_bits(self.configuration).en();
        let after = ControllerConfiguration::from_bits(value).en();
        if !after {
            self.forget_host_view();
        }
        // Nobody is there to take it.
        if self.presence != Presence::Here {
            return;
        }
        self.configuration = value;
        match (before, after) {
            (true, false) => self.disable(),
            (false, true) => self.enable(),
            _ => {}
        }
    }

    /// The host gives all queues up.
    fn forget_host_view(&mut self) {
        self.host = HostView::default();
        self.keep_rings();
    }

    fn disable(&mut self) {
        // Until it is disabled, and until it is ready again.
        self.allow(2 * self.traits.times.ready);
        if !self.ready {
            return self.stop();
        }
        let epoch = self.epoch;
        if !self.strikes(Fault::DisableHangs) {
            let after = self.transition(Fault::DisableIsSlow);
            self.schedule(after, Event::Disabled { epoch });
        }
    }

    fn enable(&mut self) {
        if self.ready {
            self.violate("enabled before it was disabled".to_owned());
        }
        if !self.bus_master {
            self.violate("enabled without access to memory".to_owned());
        }
        let epoch = self.epoch;
        if self.strikes(Fault::EnableFatal) {
            self.fatal = true;
        } else if !self.strikes(Fault::EnableHangs) {
            let after = self.transition(Fault::EnableIsSlow);
            self.schedule(after, Event::Ready { epoch });
        }
    }

    fn transition(&mut self, slow: Fault) -> u64 {
        let most = self.traits.times.ready;
        if self.strikes(slow) {
            self.rng.u64(most / 2..most * 9 / 10)
        } else {
            self.rng.u64(5..2000)
        }
    }

    /// The host has given it up. What was not stopped goes on.
    fn be_closed(&mut self) {
        self.closed = true;
        for id in 0..self.commands.len() {
            if self.commands[id].is_some() {
                let after = self.rng.u64(1..1000);
                self.schedule(after, Event::Execute(id));
            }
        }
    }

    fn reset_function(&mut self) -> Result<(), DeviceError> {
        self.forget_host_view();
        self.allow(self.traits.times.ready);
        if self.strikes(Fault::FunctionResetFails) {
            return Err(failed("reset"));
        }
        if !self.strikes(Fault::FunctionResetWithoutEffect) {
            self.stop();
            self.configuration = 0;
            self.bus_master = false;
        }
        Ok(())
    }
}
