//! The PCI function behind a connection: its regions, its registers, and its reset.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nvme_spec::registers::{Capabilities, ControllerConfiguration, ControllerStatus, offset};
use vfio_user::{RegionAccess, RegionInfo, RegionWrite, Reply, Request, region};

use super::connection::Connection;
use super::open;
use crate::device::bar::Region;
use crate::device::config::{self, INTX_DISABLE, MEMORY_SPACE, ReadConfig, WriteConfig};

/// Between two looks at CSTS; grows from the first to the last.
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LAST_LOOK: Duration = Duration::from_millis(50);

/// A function whose registers are messages.
pub(super) struct Function {
    pub(super) connection: Arc<Connection>,
    pub(super) bar_size: u64,
    pub(super) config_size: u64,
    pub(super) can_reset: bool,
    pub(super) vectors: Vec<Arc<OwnedFd>>,
    pub(super) maskable: bool,
    pub(super) max_msg_fds: u32,
    /// Held while the function is set up, or bits of the PCI command register are changed.
    pub(super) setting_up: Mutex<()>,
}

impl Function {
    /// Reads a 32-bit register of BAR 0.
    pub(super) fn read32(&self, offset: u32) -> io::Result<u32> {
        check_register(self.bar_size, offset)?;
        let bytes = self.read_region(region::BAR0, offset.into())?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes a 32-bit register of BAR 0.
    pub(super) fn write32(&self, offset: u32, value: u32) -> io::Result<()> {
        check_register(self.bar_size, offset)?;
        self.write_region(region::BAR0, offset.into(), &value.to_le_bytes())
    }

    pub(super) fn capabilities(&self) -> io::Result<Capabilities> {
        let low = self.read32(offset::CAP)?;
        let high = self.read32(offset::CAP + 4)?;
        Ok(Capabilities::from_bits(
            u64::from(high) << 32 | u64::from(low),
        ))
    }

    /// Sets and clears bits of the PCI command register.
    pub(super) fn change_command(&self, set: u16, clear: u16) -> io::Result<()> {
        let _setting_up = self
            .setting_up
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        config::change_command(self, set, clear)
    }

    /// Has interrupts signalled by eventfds, and in no other way.
    ///
    /// What a former client left may be anything. With INTx not disabled, or with MSI-X enabled and
    /// without eventfds, a server may fail the controller for good when it completes the first command:
    /// so INTx goes first, and MSI-X is enabled last.
    pub(super) fn set_up_interrupts(&self, clear: u16) -> io::Result<()> {
        self.change_command(MEMORY_SPACE | INTX_DISABLE, clear)?;
        config::enable_msix(self, false)?;
        let (vectors, max_fds) = (&self.vectors, self.max_msg_fds);
        open::set_vectors(&self.connection, vectors, max_fds, self.maskable)?;
        config::enable_msix(self, true)
    }

    /// Resets the function and disables the controller, which a server need not do with it.
    pub(super) fn reset(&self) -> io::Result<()> {
        if !self.can_reset {
            let reason = "the server can't reset it";
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        let request = Request::DeviceReset;
        self.connection.call(&request, Vec::new(), |reply, _| {
            matches!(reply, Reply::DeviceReset).then_some(())
        })?;
        self.disable()?;
        self.set_up_interrupts(0)
    }

    /// Clears CC.EN, and waits until CSTS.RDY is clear.
    fn disable(&self) -> io::Result<()> {
        let configuration = ControllerConfiguration::from_bits(self.read32(offset::CC)?);
        if configuration.en() {
            let disabled = configuration.with_en(false);
            self.write32(offset::CC, disabled.into_bits())?;
        }
        let timeout = self.capabilities()?.timeout_ms().max(500);
        let until = Instant::now() + Duration::from_millis(timeout.into());
        let mut pause = FIRST_LOOK;
        loop {
            let status = ControllerStatus::from_bits(self.read32(offset::CSTS)?);
            if !status.is_gone() && !status.rdy() {
                return Ok(());
            }
            if Instant::now() >= until {
                let reason = "the controller is enabled after the reset";
                return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LAST_LOOK);
        }
    }

    fn read_region<const N: usize>(&self, region: u32, offset: u64) -> io::Result<[u8; N]> {
        let request = Request::RegionRead(RegionAccess {
            region,
            offset,
            count: N as u32,
        });
        self.connection
            .call(&request, Vec::new(), |reply, _| match reply {
                Reply::RegionRead { data, .. } => data.try_into().ok(),
                _ => None,
            })
    }

    fn write_region(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let request = Request::RegionWrite(RegionWrite {
            region,
            offset,
            data,
        });
        self.connection.call(&request, Vec::new(), |reply, _| {
            matches!(reply, Reply::RegionWrite(_)).then_some(())
        })
    }
}

impl ReadConfig for Function {
    fn read<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
        if offset + N as u64 > self.config_size {
            let reason = "its configuration space is too short";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        self.read_region(region::CONFIG, offset)
    }
}

impl WriteConfig for Function {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_region(region::CONFIG, offset, bytes)
    }
}

fn check_register(size: u64, offset: u32) -> io::Result<()> {
    if !offset.is_multiple_of(4) || u64::from(offset) + 4 > size {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("no 32-bit register there in a BAR of {size:#x} bytes"),
        ));
    }
    Ok(())
}

/// What of a region can be mapped from a file: what the file has, if it is one.
///
/// The file is the server's. If that cuts it short later, a store to what was mapped is a SIGBUS.
pub(super) fn mappable(info: &RegionInfo, file: &File) -> io::Result<Region> {
    let metadata = file.metadata()?;
    let len = if metadata.is_file() {
        metadata.len()
    } else {
        0
    };
    let areas = match &info.sparse {
        Some(areas) => areas.iter().map(|area| (area.offset, area.size)).collect(),
        None => vec![(0, info.size)],
    };
    let is_in_file = |&(offset, size): &(u64, u64)| {
        let end = offset
            .checked_add(size)
            .and_then(|end| end.checked_add(info.offset));
        size > 0 && end.is_some_and(|end| end <= len)
    };
    Ok(Region {
        offset: info.offset,
        size: info.size,
        mappable: areas.into_iter().filter(is_in_file).collect(),
    })
}
