//! The controller properties as memory-mapped registers (base specification 2.0, section 3.1.3).

use nvme_spec::registers::{
    AdminQueueAttributes, Capabilities, ControllerConfiguration, ControllerStatus, ReadyTimeouts,
    Version, offset,
};

use crate::config::Config;

/// The version that the controller follows: 2.0.
pub(crate) const VERSION: Version = Version::new().with_major(2);

/// CAP.CSS: the NVM command set, and the selection of all supported sets.
const COMMAND_SETS: u8 = 0x41;

/// The registers. Writable ones hold what the host wrote; the controller's thread acts on it.
#[derive(Debug)]
pub(crate) struct Registers {
    pub(crate) capabilities: Capabilities,
    ready_timeouts: ReadyTimeouts,
    pub(crate) configuration: ControllerConfiguration,
    pub(crate) status: ControllerStatus,
    pub(crate) admin_queues: AdminQueueAttributes,
    pub(crate) submission_base: u64,
    pub(crate) completion_base: u64,
    /// CC.EN was cleared and the thread has not acted on it, even if it was set again since.
    pub(crate) disable_pending: bool,
}

impl Registers {
    pub(crate) fn new(config: &Config) -> Self {
        let half_seconds = config
            .ready_timeout
            .as_millis()
            .div_ceil(500)
            .clamp(1, 0xffff) as u16;
        let capabilities = Capabilities::new()
            .with_mqes((config.max_queue_entries - 1) as u16)
            .with_cqr(true)
            .with_to(half_seconds.min(0xff) as u8)
            .with_dstrd(config.doorbell_stride)
            .with_css(COMMAND_SETS)
            .with_mpsmin(config.mpsmin)
            .with_mpsmax(config.mpsmax)
            .with_crms(0b01);
        Self {
            capabilities,
            ready_timeouts: ReadyTimeouts::new().with_crwmt(half_seconds),
            configuration: ControllerConfiguration::new(),
            status: ControllerStatus::new(),
            admin_queues: AdminQueueAttributes::new(),
            submission_base: 0,
            completion_base: 0,
            disable_pending: false,
        }
    }

    /// Sets what a function level reset sets.
    pub(crate) fn reset(&mut self) {
        self.configuration = ControllerConfiguration::new();
        self.status = ControllerStatus::new();
        self.admin_queues = AdminQueueAttributes::new();
        self.submission_base = 0;
        self.completion_base = 0;
        self.disable_pending = false;
    }

    pub(crate) fn read32(&self, offset: u32) -> u32 {
        let qword = match offset & !7 {
            offset::CAP => self.capabilities.into_bits(),
            offset::ASQ => self.submission_base,
            offset::ACQ => self.completion_base,
            _ => {
                return match offset {
                    offset::VS => VERSION.into_bits(),
                    offset::CC => self.configuration.into_bits(),
                    offset::CSTS => self.status.into_bits(),
                    offset::AQA => self.admin_queues.into_bits(),
                    offset::CRTO => self.ready_timeouts.into_bits(),
                    // Interrupt masks are for pin-based interrupts, of which there are none; there
                    // is no controller memory buffer and no subsystem reset.
                    _ => 0,
                };
            }
        };
        if offset & 4 == 0 {
            qword as u32
        } else {
            (qword >> 32) as u32
        }
    }

    /// Stores a write; returns whether the controller's thread must look at it.
    pub(crate) fn write32(&mut self, offset: u32, value: u32) -> bool {
        // Bits 11:0 of the base addresses are reserved.
        match offset {
            offset::CC => {
                let before = self.configuration;
                self.configuration = ControllerConfiguration::from_bits(value);
                self.disable_pending |= before.en() && !self.configuration.en();
                return true;
            }
            offset::AQA => self.admin_queues = AdminQueueAttributes::from_bits(value & 0x0fff_0fff),
            offset::ASQ => set_low(&mut self.submission_base, value & !0xfff),
            0x2c => set_high(&mut self.submission_base, value),
            offset::ACQ => set_low(&mut self.completion_base, value & !0xfff),
            0x34 => set_high(&mut self.completion_base, value),
            _ => {}
        }
        false
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register & !0xffff_ffff | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_read_back_what_they_hold() {
        let mut registers = Registers::new(&Config::default());
        assert_eq!(registers.read32(offset::VS), 0x0002_0000);
        let cap = u64::from(registers.read32(offset::CAP + 4)) << 32
            | u64::from(registers.read32(offset::CAP));
        // MQES 1023, CQR, TO 10, CSS 41h, MPSMAX 4, CRMS 01b.
        assert_eq!(cap, 0x0840_0820_0a01_03ff);
        registers.write32(offset::ASQ, 0x1234_5fff);
        registers.write32(offset::ASQ + 4, 0x9);
        assert_eq!(registers.read32(offset::ASQ), 0x1234_5000);
        assert_eq!(registers.read32(offset::ASQ + 4), 9);
        assert_eq!(registers.submission_base, 0x9_1234_5000);
        registers.write32(offset::CSTS, 0xffff_ffff);
        registers.write32(offset::VS, 0);
        assert_eq!(registers.read32(offset::CSTS), 0);
        assert_eq!(registers.read32(offset::VS), 0x0002_0000);
        assert_eq!(registers.read32(0x80), 0);
    }

    #[test]
    fn a_disable_is_remembered() {
        let mut registers = Registers::new(&Config::default());
        assert!(registers.write32(offset::CC, 1));
        assert!(!registers.disable_pending);
        registers.write32(offset::CC, 0);
        registers.write32(offset::CC, 1);
        assert!(registers.disable_pending);
    }
}
