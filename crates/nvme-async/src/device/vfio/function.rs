//! One function as the kernel gives it: a file of regions.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use iova::vfio::InfoReply;
use vfio_bindings::bindings::vfio as abi;

use super::config::{self, ReadConfig};
use super::error::OpenError;
use super::group::Group;
use super::info::{self, Region};
use super::pci::PciAddress;
use super::registry::{Entry, Opened, Registry};
use super::sys;
use crate::device::DoorbellCall;

/// The functions that this process has open.
static OPEN_FUNCTIONS: Registry<PciAddress, Function> = Registry::new();

/// An open function. Dropping the last reference closes it, which makes the kernel clear bus
/// mastering, disable its interrupts and reset it.
#[derive(Debug)]
pub(super) struct Function {
    address: String,
    file: File,
    bar: Region,
    config: Region,
    can_reset: bool,
    /// Guards read-modify-write cycles of the PCI command register.
    command: Mutex<()>,
    doorbell_failed: AtomicBool,
    // These two last: the group outlives the file, and the next opener is let in at the very end.
    group: Arc<Group>,
    _entry: Entry<PciAddress, Self>,
}

impl Function {
    /// Opens a function of this group, once at a time; the kernel resets it on the way if it can.
    pub(super) fn open(group: Arc<Group>, address: PciAddress) -> Result<Arc<Self>, OpenError> {
        let operation = "opening the function";
        let open = |entry| {
            Self::new(group, address, entry).map_err(|source| OpenError::System {
                address,
                operation,
                source,
            })
        };
        match OPEN_FUNCTIONS.open(address, open)? {
            Opened::Now(function) => Ok(function),
            Opened::Before(_) => Err(OpenError::AlreadyOpen { address }),
        }
    }

    fn new(
        group: Arc<Group>,
        address: PciAddress,
        entry: Entry<PciAddress, Self>,
    ) -> io::Result<Self> {
        let file = group.device(address)?;
        let info = sys::device_info(file.as_fd())?;
        if info.flags & abi::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "not a PCI device",
            ));
        }
        let region = |index| {
            let reply = sys::region_info(file.as_fd(), index)?;
            info::region(InfoReply::new(&reply))
        };
        let bar = region(abi::VFIO_PCI_BAR0_REGION_INDEX)?;
        let config = region(abi::VFIO_PCI_CONFIG_REGION_INDEX)?;
        let can_reset = info.flags & abi::VFIO_DEVICE_FLAGS_RESET != 0;
        Ok(Self {
            address: address.to_string(),
            file,
            bar,
            config,
            can_reset,
            command: Mutex::new(()),
            doorbell_failed: AtomicBool::new(false),
            group,
            _entry: entry,
        })
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn bar(&self) -> &Region {
        &self.bar
    }

    pub(super) fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Reads a 32-bit register of BAR 0.
    pub(super) fn read32(&self, offset: u32) -> io::Result<u32> {
        check_register(&self.bar, offset)?;
        let mut bytes = [0; 4];
        whole(
            self.file
                .read_at(&mut bytes, self.bar.offset + u64::from(offset))?,
            4,
        )?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes a 32-bit register of BAR 0.
    pub(super) fn write32(&self, offset: u32, value: u32) -> io::Result<()> {
        check_register(&self.bar, offset)?;
        let at = self.bar.offset + u64::from(offset);
        whole(self.file.write_at(&value.to_le_bytes(), at)?, 4)
    }

    /// Sets and clears bits of the PCI command register, and checks that it took them.
    pub(super) fn change_command(&self, set: u16, clear: u16) -> io::Result<()> {
        let _guard = self.command.lock().unwrap_or_else(PoisonError::into_inner);
        let at = self.config.offset + config::COMMAND;
        let wanted = u16::from_le_bytes(self.read(config::COMMAND)?) & !clear | set;
        whole(self.file.write_at(&wanted.to_le_bytes(), at)?, 2)?;
        let command = u16::from_le_bytes(self.read(config::COMMAND)?);
        // A function that is gone reads as all ones; one without INTx need not have its bit.
        let set = set & !config::INTX_DISABLE;
        if command == 0xffff || command & set != set || command & clear != 0 {
            return Err(io::Error::other(format!(
                "PCI command register is {command:#06x}"
            )));
        }
        Ok(())
    }

    /// Resets the function.
    pub(super) fn reset(&self) -> io::Result<()> {
        if !self.can_reset {
            let reason = "neither the function nor its slot can be reset on its own";
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        sys::reset(self.file.as_fd())
    }
}

impl ReadConfig for Function {
    fn read<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        whole(
            self.file.read_at(&mut bytes, self.config.offset + offset)?,
            N,
        )?;
        Ok(bytes)
    }
}

impl DoorbellCall for Function {
    fn ring(&self, offset: u32, value: u32) {
        // There is nobody to tell: a command whose doorbell is not heard runs into its deadline.
        if let Err(error) = self.write32(offset, value)
            && !self.doorbell_failed.swap(true, Ordering::Relaxed)
        {
            let device = self.address.as_str();
            tracing::error!(device, offset, %error, "doorbell could not be written");
        }
    }
}

fn check_register(bar: &Region, offset: u32) -> io::Result<()> {
    if !offset.is_multiple_of(4) || u64::from(offset) + 4 > bar.size {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("no 32-bit register there in a BAR of {:#x} bytes", bar.size),
        ));
    }
    Ok(())
}

/// Registers are accessed whole or not at all; half of one would be another access.
fn whole(done: usize, wanted: usize) -> io::Result<()> {
    if done == wanted {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_aligned_and_inside_of_the_bar() {
        let bar = Region {
            size: 0x2000,
            ..Region::default()
        };
        for offset in [0, 4, 0x1000, 0x1ffc] {
            assert!(check_register(&bar, offset).is_ok(), "{offset:#x}");
        }
        for offset in [2, 0x1ffe, 0x2000, u32::MAX - 3, u32::MAX] {
            assert!(check_register(&bar, offset).is_err(), "{offset:#x}");
        }
    }
}
