//! What one client asks, and what it is answered.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use vfio_user::{
    Capabilities, Command, DeviceInfo, IrqInfo, Limits, MAJOR, MINOR, Message, RegionAccess,
    RegionInfo, RegionWrite, Reply, Request, SetIrqs, SparseArea, TwinSocket, Version, error_reply,
    irq, region,
};

use crate::device::Device;
use crate::link::Link;
use crate::memory::{MAX_MAPS, PAGE};
use crate::{bar, config_space};

/// What this server accepts. Some clients refuse a server that takes more descriptors at a time, and no region
/// has more bytes.
pub(crate) const LIMITS: Limits = Limits {
    max_fds: 16,
    max_transfer: 64 << 10,
};

/// The connection can't go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error("the first message is not VERSION")]
    NoVersion,
    #[error("major version {0}")]
    Version(u16),
    #[error("the connection was lost")]
    Lost,
}

/// An answer, and descriptors beside it.
struct Answer<'a> {
    reply: Reply<'a>,
    fds: Vec<OwnedFd>,
}

impl<'a> From<Reply<'a>> for Answer<'a> {
    fn from(reply: Reply<'a>) -> Self {
        Self {
            reply,
            fds: Vec::new(),
        }
    }
}

/// The state of a connection.
pub(crate) struct Session<'a> {
    device: &'a Device,
    link: Arc<Link>,
    is_agreed: bool,
    /// The client may map the MSI-X table.
    maps_table: bool,
    /// For what is read.
    buffer: Vec<u8>,
}

impl<'a> Session<'a> {
    pub(crate) fn new(device: &'a Device, link: Arc<Link>) -> Self {
        Self {
            device,
            link,
            is_agreed: false,
            maps_table: false,
            buffer: Vec::new(),
        }
    }

    /// Whether this waits for the controller's thread, which may itself wait for an answer of the client's, or
    /// signals eventfds, which may wait for the client.
    pub(crate) fn may_wait(message: &Message) -> bool {
        match message.header.command() {
            Command::DMA_MAP | Command::DMA_UNMAP | Command::DEVICE_RESET => true,
            Command::REGION_WRITE_MULTI | Command::DEVICE_SET_IRQS => true,
            Command::REGION_WRITE => match message.request(&LIMITS) {
                Ok(Request::RegionWrite(write)) => {
                    write.region == region::CONFIG
                        || bar::may_interrupt(write.offset, write.data.len())
                }
                _ => false,
            },
            _ => false,
        }
    }

    /// Does what a message asks for, and answers it.
    ///
    /// # Errors
    ///
    /// [`Violation`] if there is no going on with this client.
    pub(crate) fn handle(&mut self, mut message: Message) -> Result<(), Violation> {
        let header = message.header;
        let fds = std::mem::take(&mut message.fds);
        let request =
            Request::decode(&header, &message.payload, fds.len(), &LIMITS).map_err(|error| {
                tracing::debug!(%error, "a malformed command");
                Errno::from_raw_os_error(i32::try_from(error.errno()).unwrap_or(0))
            });
        if !self.is_agreed {
            return match request {
                Ok(Request::Version(version)) if header.wants_reply() => {
                    self.agree(&message, &version)
                }
                _ => {
                    self.refuse(&message, Errno::INVAL)?;
                    Err(Violation::NoVersion)
                }
            };
        }
        let link = self.link.clone();
        let answer = request.and_then(|request| self.answer(request, fds));
        if !header.wants_reply() {
            if let Err(error) = answer {
                tracing::debug!(%error, command = %header.command(), "refused, without a reply");
            }
            return Ok(());
        }
        let sent = match answer {
            Ok(answer) => {
                let fds: Vec<_> = answer.fds.iter().map(AsFd::as_fd).collect();
                link.send(&answer.reply.encode(&header), &fds)
            }
            Err(error) => {
                tracing::debug!(%error, command = %header.command(), "refused");
                link.send(&error_reply(&header, number(error)), &[])
            }
        };
        sent.map_err(|_| Violation::Lost)
    }

    fn refuse(&self, message: &Message, error: Errno) -> Result<(), Violation> {
        if !message.header.wants_reply() {
            return Ok(());
        }
        let bytes = error_reply(&message.header, number(error));
        self.link.send(&bytes, &[]).map_err(|_| Violation::Lost)
    }

    /// Agrees on a version, and on what both sides can do.
    fn agree(&mut self, message: &Message, theirs: &Version) -> Result<(), Violation> {
        let max_transfer = theirs.capabilities.max_data_xfer_size;
        if theirs.major != MAJOR {
            self.refuse(message, Errno::INVAL)?;
            return Err(Violation::Version(theirs.major));
        }
        let twin = &theirs.capabilities.twin_socket;
        let wants_twin = twin.as_ref().is_some_and(|twin| twin.supported);
        let twin = self
            .link
            .agree(max_transfer.min(LIMITS.max_transfer), wants_twin)
            .map_err(|_| Violation::Lost)?;
        self.maps_table = theirs.capabilities.msix_table_mappable;
        let reply = Reply::Version(Version {
            major: MAJOR,
            minor: theirs.minor.min(MINOR),
            capabilities: Capabilities {
                max_msg_fds: LIMITS.max_fds as u32,
                max_data_xfer_size: LIMITS.max_transfer,
                pgsizes: PAGE,
                max_dma_maps: MAX_MAPS as u64,
                write_multiple: theirs.capabilities.write_multiple,
                twin_socket: twin.as_ref().map(|_| TwinSocket {
                    supported: true,
                    fd_index: Some(0),
                }),
                migration: false,
                msix_table_mappable: self.maps_table,
            },
        });
        let fds: Vec<_> = twin.iter().map(AsFd::as_fd).collect();
        let bytes = reply.encode(&message.header);
        self.link.send(&bytes, &fds).map_err(|_| Violation::Lost)?;
        self.is_agreed = true;
        Ok(())
    }

    fn answer(&mut self, request: Request<'_>, fds: Vec<OwnedFd>) -> Result<Answer<'_>, Errno> {
        let device = self.device;
        Ok(match request {
            Request::DmaMap(map) => {
                let fd = fds.into_iter().next();
                device
                    .memory
                    .map(&map, fd, &self.link, device.trust_client)?;
                Reply::DmaMap.into()
            }
            Request::DmaUnmap(unmap) => {
                device.memory.unmap(&unmap)?;
                Reply::DmaUnmap(unmap).into()
            }
            Request::DeviceInfo { .. } => Reply::DeviceInfo(DeviceInfo {
                resets: true,
                is_pci: true,
                regions: region::COUNT,
                irqs: irq::COUNT,
            })
            .into(),
            Request::RegionInfo { argsz, index } => self.region_info(argsz, index)?,
            Request::IrqInfo { index, .. } => {
                let is_msix = match index {
                    irq::MSIX => true,
                    index if index < irq::COUNT => false,
                    _ => return Err(Errno::INVAL),
                };
                Reply::IrqInfo(IrqInfo {
                    index,
                    count: if is_msix { self.vectors() } else { 0 },
                    eventfd: is_msix,
                    maskable: is_msix,
                    automasked: false,
                    noresize: false,
                })
                .into()
            }
            Request::SetIrqs(set) => {
                self.set_irqs(&set, fds)?;
                Reply::SetIrqs.into()
            }
            Request::RegionRead(access) => self.read(access)?,
            Request::RegionWrite(write) => {
                self.write(&write)?;
                Reply::RegionWrite(write.access()).into()
            }
            Request::RegionWriteMulti(writes) => {
                for write in writes.iter() {
                    self.write(&write)?;
                }
                let count = writes.len() as u64;
                Reply::RegionWriteMulti { count }.into()
            }
            Request::DeviceReset => {
                device.reset()?;
                Reply::DeviceReset.into()
            }
            // What the kernel's VFIO says of a feature that a device has not.
            Request::Other(Command::DEVICE_FEATURE) => return Err(Errno::NOTTY),
            Request::Version(_) | Request::DmaRead(_) | Request::DmaWrite { .. } => {
                return Err(Errno::INVAL);
            }
            _ => return Err(Errno::OPNOTSUPP),
        })
    }

    fn vectors(&self) -> u32 {
        nvme_soft::Interrupts::count(&*self.device.vectors).into()
    }

    fn region_info(&self, argsz: u32, index: u32) -> Result<Answer<'static>, Errno> {
        let size = region_size(index)?;
        let areas = match index {
            region::BAR0 => self.mappable_areas(),
            _ => Vec::new(),
        };
        let is_mappable = !areas.is_empty();
        let mut info = RegionInfo {
            index,
            readable: size > 0,
            writable: size > 0,
            mappable: is_mappable,
            size,
            offset: 0,
            sparse: is_mappable.then_some(areas),
        };
        let needed = info.full_size();
        if argsz < needed {
            info.sparse = None;
            return Ok(Reply::RegionInfoCut {
                info,
                argsz: needed,
            }
            .into());
        }
        let fds = match is_mappable {
            false => Vec::new(),
            true => vec![self.device.pages.file().map_err(|_| Errno::MFILE)?],
        };
        Ok(Answer {
            reply: Reply::RegionInfo(info),
            fds,
        })
    }

    /// What of BAR 0 this client may map.
    fn mappable_areas(&self) -> Vec<SparseArea> {
        let page = |offset: u32| SparseArea {
            offset: offset.into(),
            size: bar::PAGE.into(),
        };
        let doorbells = self.device.maps_doorbells.then(|| page(bar::DOORBELLS));
        let table = self.maps_table.then(|| page(bar::MSIX_TABLE));
        doorbells.into_iter().chain(table).collect()
    }

    fn set_irqs(&self, set: &SetIrqs<'_>, fds: Vec<OwnedFd>) -> Result<(), Errno> {
        match set.index {
            irq::MSIX => self.device.vectors.set(set, fds),
            // There are none of these.
            index if index < irq::COUNT && set.start == 0 && set.count == 0 => Ok(()),
            _ => Err(Errno::INVAL),
        }
    }

    fn read(&mut self, access: RegionAccess) -> Result<Answer<'_>, Errno> {
        let offset = check(access)?;
        self.buffer.clear();
        self.buffer.resize(access.count as usize, 0);
        let device = self.device;
        if access.region == region::CONFIG {
            device.read_config(offset as usize, &mut self.buffer);
        } else {
            bar::read(
                device.controller(),
                &device.vectors,
                offset,
                &mut self.buffer,
            );
        }
        Ok(Reply::RegionRead {
            region: access.region,
            offset: access.offset,
            data: &self.buffer,
        }
        .into())
    }

    fn write(&self, write: &RegionWrite<'_>) -> Result<(), Errno> {
        let offset = check(write.access())?;
        let device = self.device;
        if write.region == region::CONFIG {
            return device.write_config(offset as usize, write.data);
        }
        bar::write(device.controller(), &device.vectors, offset, write.data)
    }
}

/// The size of a region; 0 if there is none, EINVAL if there can't be one.
fn region_size(index: u32) -> Result<u64, Errno> {
    match index {
        region::BAR0 => Ok(bar::SIZE.into()),
        region::CONFIG => Ok(config_space::SIZE as u64),
        index if index < region::COUNT => Ok(0),
        _ => Err(Errno::INVAL),
    }
}

/// Refuses what is not inside of its region; returns the offset in it.
fn check(access: RegionAccess) -> Result<u32, Errno> {
    let size = region_size(access.region)?;
    let end = access.offset.checked_add(access.count.into());
    if end.is_none_or(|end| end > size) {
        return Err(Errno::INVAL);
    }
    u32::try_from(access.offset).map_err(|_| Errno::INVAL)
}

fn number(error: Errno) -> u32 {
    error.raw_os_error().unsigned_abs()
}
