//! PCI configuration space, with the capabilities Power Management, MSI-X and PCI Express (PCI Express base
//! specification, chapter "Software Initialization and Configuration").

use crate::bar;

/// Bytes of it. There are no extended capabilities.
pub(crate) const SIZE: usize = 4096;

/// Registers of the header.
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const CACHE_LINE: usize = 0x0c;
const BAR0: usize = 0x10;
const BAR1: usize = 0x14;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;

/// Where the capabilities are.
const POWER: usize = 0x40;
const MSIX: usize = 0x50;
const EXPRESS: usize = 0x60;

const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// What can be written of Command: memory space, bus master, parity errors, SERR#, interrupt disable.
const COMMAND_WRITABLE: u16 = 0x0546;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// NVM Express I/O controller: programming interface, subclass, base class.
const CLASS_NVME: [u8; 3] = [0x02, 0x08, 0x01];
/// A 64-bit memory BAR that is not prefetchable.
const BAR_64_BIT: u32 = 0x4;

const POWER_CONTROL: usize = POWER + 4;
const POWER_STATE: u16 = 0x3;
const NO_SOFT_RESET: u16 = 1 << 3;

const MSIX_CONTROL: usize = MSIX + 2;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;

const DEVICE_CAPABILITIES: usize = EXPRESS + 0x04;
const DEVICE_CONTROL: usize = EXPRESS + 0x08;
const LINK_CAPABILITIES: usize = EXPRESS + 0x0c;
const LINK_CONTROL: usize = EXPRESS + 0x10;
const LINK_STATUS: usize = EXPRESS + 0x12;
const DEVICE_CONTROL_2: usize = EXPRESS + 0x28;
const LINK_CAPABILITIES_2: usize = EXPRESS + 0x2c;
const LINK_CONTROL_2: usize = EXPRESS + 0x30;
/// Role-based error reporting, function level reset.
const DEVICE_CAPABILITY_BITS: u32 = 1 << 15 | 1 << 28;
const INITIATE_RESET: u16 = 1 << 15;
/// One lane at 2.5 GT/s.
const LINK: u16 = 0x11;

/// Which device it says it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
}

/// The space of one function.
#[derive(Debug)]
pub(crate) struct ConfigSpace {
    identity: Identity,
    vectors: u16,
    values: Box<[u8; SIZE]>,
    /// Bits that can be written.
    writable: Box<[u8; SIZE]>,
}

impl ConfigSpace {
    /// The space of a function with so many MSI-X vectors, at least one.
    pub(crate) fn new(identity: Identity, vectors: u16) -> Self {
        let mut space = Self {
            identity,
            vectors,
            values: Box::new([0; SIZE]),
            writable: Box::new([0; SIZE]),
        };
        space.reset();
        space
    }

    /// Sets everything to what it is at first.
    pub(crate) fn reset(&mut self) {
        self.values.fill(0);
        self.writable.fill(0);
        self.set16(0x00, self.identity.vendor, 0);
        self.set16(0x02, self.identity.device, 0);
        self.set16(COMMAND, 0, COMMAND_WRITABLE);
        self.set16(STATUS, STATUS_CAPABILITIES, 0);
        self.set(REVISION, &[0], 0);
        self.set(CLASS, &CLASS_NVME, 0);
        self.set(CACHE_LINE, &[0], 0xff);
        // Its size is what can't be written.
        self.set32(BAR0, BAR_64_BIT, !(bar::SIZE - 1));
        self.set32(BAR1, 0, u32::MAX);
        self.set16(SUBSYSTEM, self.identity.vendor, 0);
        self.set16(SUBSYSTEM + 2, self.identity.device, 0);
        self.set(CAPABILITIES, &[POWER as u8], 0);
        // No interrupt pin: there is only MSI-X.
        self.set(INTERRUPT_LINE, &[0], 0xff);

        // Power Management 1.2, D0 and D3hot only.
        self.set(POWER, &[0x01, MSIX as u8, 0x03, 0x00], 0);
        self.set16(POWER_CONTROL, NO_SOFT_RESET, POWER_STATE);

        self.set(MSIX, &[0x11, EXPRESS as u8], 0);
        let writable = MSIX_ENABLE | MSIX_FUNCTION_MASK;
        self.set16(MSIX_CONTROL, self.vectors - 1, writable);
        self.set32(MSIX + 4, bar::MSIX_TABLE, 0);
        self.set32(MSIX + 8, bar::MSIX_PENDING, 0);

        // Version 2, an endpoint.
        self.set(EXPRESS, &[0x10, 0, 0x02, 0x00], 0);
        self.set32(DEVICE_CAPABILITIES, DEVICE_CAPABILITY_BITS, 0);
        self.set16(DEVICE_CONTROL, 0, !INITIATE_RESET);
        self.set32(LINK_CAPABILITIES, LINK.into(), 0);
        self.set16(LINK_CONTROL, 0, 0x01c3);
        self.set16(LINK_STATUS, LINK, 0);
        self.set16(DEVICE_CONTROL_2, 0, u16::MAX);
        self.set32(LINK_CAPABILITIES_2, 1 << 1, 0);
        self.set16(LINK_CONTROL_2, 1, 0x000f);
    }

    fn set(&mut self, at: usize, values: &[u8], writable: u8) {
        self.values[at..at + values.len()].copy_from_slice(values);
        self.writable[at..at + values.len()].fill(writable);
    }

    fn set16(&mut self, at: usize, value: u16, writable: u16) {
        self.values[at..at + 2].copy_from_slice(&value.to_le_bytes());
        self.writable[at..at + 2].copy_from_slice(&writable.to_le_bytes());
    }

    fn set32(&mut self, at: usize, value: u32, writable: u32) {
        self.values[at..at + 4].copy_from_slice(&value.to_le_bytes());
        self.writable[at..at + 4].copy_from_slice(&writable.to_le_bytes());
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.values[at], self.values[at + 1]])
    }

    /// Reads from `offset` on. What is past the end is 0.
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) {
        for (place, byte) in (offset..).zip(out) {
            *byte = self.values.get(place).copied().unwrap_or(0);
        }
    }

    /// Writes at `offset`, what can be written. Returns whether the function is to be reset, which is for the
    /// caller to do.
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        let mut resets = false;
        for (place, new) in (offset..).zip(data) {
            let Some(value) = self.values.get_mut(place) else {
                break;
            };
            let writable = self.writable[place];
            *value = *value & !writable | new & writable;
            let [_, initiate] = INITIATE_RESET.to_le_bytes();
            resets |= place == DEVICE_CONTROL + 1 && new & initiate != 0;
        }
        resets
    }

    /// Whether the function may access memory.
    pub(crate) fn is_bus_master(&self) -> bool {
        self.word(COMMAND) & COMMAND_BUS_MASTER != 0 && self.word(POWER_CONTROL) & POWER_STATE == 0
    }

    /// Whether MSI-X is enabled, and whether all vectors are masked.
    pub(crate) fn msix(&self) -> (bool, bool) {
        let control = self.word(MSIX_CONTROL);
        (
            control & MSIX_ENABLE != 0,
            control & MSIX_FUNCTION_MASK != 0,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1234,
            device: 0x5678,
        };
        ConfigSpace::new(identity, 65)
    }

    fn read16(space: &ConfigSpace, at: usize) -> u16 {
        let mut bytes = [0; 2];
        space.read(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn read32(space: &ConfigSpace, at: usize) -> u32 {
        let mut bytes = [0; 4];
        space.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn it_is_an_nvme_controller() {
        let space = space();
        assert_eq!(read32(&space, 0), 0x5678_1234);
        // Base class, subclass, programming interface, revision.
        assert_eq!(read32(&space, 8), 0x0108_0200);
        assert_eq!(read16(&space, 0x3c), 0, "no interrupt pin");
        assert_eq!(read32(&space, 0x100), 0, "no extended capabilities");
        let mut past = [1; 8];
        space.read(SIZE - 4, &mut past);
        assert_eq!(past, [0; 8]);
    }

    #[test]
    fn the_list_of_capabilities_is_complete() {
        let space = space();
        assert_eq!(read16(&space, 0x06) & 1 << 4, 1 << 4);
        let mut next = read16(&space, 0x34) as u8;
        let mut found = Vec::new();
        while next != 0 {
            let header = read16(&space, next.into());
            found.push(header as u8);
            next = (header >> 8) as u8;
        }
        assert_eq!(found, [0x01, 0x11, 0x10]);
        // 65 vectors, in BAR 0.
        assert_eq!(read16(&space, 0x52), 64);
        assert_eq!(
            (read32(&space, 0x54), read32(&space, 0x58)),
            (0x2000, 0x3000)
        );
    }

    #[test]
    fn a_bar_tells_its_size() {
        let mut space = space();
        assert_eq!(read32(&space, 0x10), 4);
        space.write(0x10, &[0xff; 8]);
        assert_eq!(read32(&space, 0x10), 0xffff_c004);
        assert_eq!(read32(&space, 0x14), 0xffff_ffff);
        space.write(0x10, &[0, 0, 0xe0, 0xfe, 1, 0, 0, 0]);
        assert_eq!(read32(&space, 0x10), 0xfee0_0004);
        assert_eq!(read32(&space, 0x14), 1);
        // Others are not there.
        space.write(0x18, &[0xff; 4]);
        assert_eq!(read32(&space, 0x18), 0);
    }

    #[test]
    fn what_can_be_written_is() {
        let mut space = space();
        assert!(!space.is_bus_master());
        assert!(!space.write(0, &[0xff; 0x40]));
        assert_eq!(read32(&space, 0), 0x5678_1234);
        assert_eq!(read32(&space, 4), 0x0010_0546);
        assert!(space.is_bus_master());
        // D3hot.
        space.write(0x44, &[3]);
        assert_eq!(read16(&space, 0x44), 0x000b);
        assert!(!space.is_bus_master());
        space.write(0x44, &[0]);
        assert!(space.is_bus_master());
        space.write(0x52, &[0xff, 0xff]);
        assert_eq!(read16(&space, 0x52), 0xc040);
        assert_eq!(space.msix(), (true, true));
        space.write(0x53, &[0x80]);
        assert_eq!(space.msix(), (true, false));
        // Past the end.
        assert!(!space.write(SIZE - 1, &[0xff; 4]));
    }

    #[test]
    fn a_function_level_reset_is_asked_for() {
        let mut space = space();
        assert_eq!(read32(&space, 0x64) >> 28 & 1, 1);
        assert!(!space.write(0x68, &[0xff]));
        assert!(space.write(0x68, &[0, 0x80]));
        assert_eq!(read16(&space, 0x68), 0, "reads as zero");
        space.write(4, &[6, 0]);
        space.reset();
        assert!(!space.is_bus_master());
    }
}
