//! From a path to a function whose interrupts arrive.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use vfio_user::{
    Capabilities, Command, IrqAction, IrqData, MAJOR, MINOR, RegionInfo, Reply, Request, SetIrqs,
    Version, irq, region,
};

use super::OpenError;
use super::connection::{Connection, End, limits};
use crate::device::host;

/// Between two attempts to connect, where as many clients wait as the server lets wait.
const PAUSE: Duration = Duration::from_millis(10);
/// Bytes of a description of a region that are asked for at first: enough for two areas.
const REGION_ROOM: u32 = 80;
/// Bytes that a description of a region may have.
const MAX_REGION_ROOM: u32 = 0x1_0000;

/// Connects to a server, which it may keep waiting for `timeout`.
pub(super) fn connect_to(
    path: &Path,
    address: &str,
    timeout: Duration,
) -> Result<OwnedFd, OpenError> {
    let failed = |error: Errno| OpenError::NoServer {
        address: address.to_owned(),
        source: error.into(),
    };
    let name = SocketAddrUnix::new(path).map_err(failed)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
    let until = Instant::now() + timeout;
    loop {
        match connect(&socket, &name) {
            Ok(()) => return Ok(socket),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if Instant::now() < until => thread::sleep(PAUSE),
            Err(Errno::AGAIN) => {
                return Err(OpenError::Busy {
                    address: address.to_owned(),
                    waited: timeout,
                });
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Tells the server what is spoken here; returns what it can do.
pub(super) fn negotiate(
    connection: &Connection,
    timeout: Duration,
) -> Result<Capabilities, OpenError> {
    let limits = limits();
    let capabilities = Capabilities {
        max_msg_fds: limits.max_fds as u32,
        max_data_xfer_size: limits.max_transfer,
        msix_table_mappable: true,
        ..Capabilities::default()
    };
    let version = Version {
        major: MAJOR,
        minor: MINOR,
        capabilities,
    };
    let request = Request::Version(version);
    let negotiated =
        connection.call_within(timeout, &request, Vec::new(), |reply, _| match reply {
            Reply::Version(version) => Some(version.capabilities),
            _ => None,
        });
    let address = connection.address();
    let capabilities = negotiated.map_err(|source| match connection.why_ended() {
        // The kernel connects for a server that has not accepted yet.
        Some(End::NoAnswer(Command::VERSION)) => OpenError::Busy {
            address: address.to_owned(),
            waited: timeout,
        },
        _ => step(address, "agreeing on a version")(source),
    })?;
    let lacks = |what: &str| {
        Err(OpenError::Unusable {
            address: address.to_owned(),
            reason: format!("the server says that it takes no {what}"),
        })
    };
    if capabilities.max_msg_fds == 0 {
        return lacks("file descriptors (max_msg_fds)");
    }
    if capabilities.max_dma_maps == 0 {
        return lacks("memory (max_dma_maps)");
    }
    if capabilities.max_data_xfer_size < 8 {
        return lacks("registers (max_data_xfer_size)");
    }
    if capabilities.pgsizes == 0 {
        return lacks("pages of any size (pgsizes)");
    }
    Ok(capabilities)
}

/// Whether the device has DEVICE_RESET; refuses what is no PCI function with the regions and interrupts
/// that one has.
pub(super) fn can_reset(connection: &Connection) -> Result<bool, OpenError> {
    let request = Request::DeviceInfo { argsz: 16 };
    let info = connection.call(&request, Vec::new(), |reply, _| match reply {
        Reply::DeviceInfo(info) => Some(info),
        _ => None,
    });
    let info = info.map_err(step(connection.address(), "asking for the device"))?;
    if !info.is_pci || info.regions <= region::CONFIG || info.irqs <= irq::MSIX {
        return Err(OpenError::Unusable {
            address: connection.address().to_owned(),
            reason: "the server has no PCI function".to_owned(),
        });
    }
    Ok(info.resets)
}

/// A region, and the file that it can be mapped from.
pub(super) fn region_info(
    connection: &Connection,
    index: u32,
) -> io::Result<(RegionInfo, Option<OwnedFd>)> {
    let mut argsz = REGION_ROOM;
    loop {
        let request = Request::RegionInfo { argsz, index };
        let answer = connection.call(&request, Vec::new(), |reply, fds| match reply {
            Reply::RegionInfo(info) => Some(Ok((info, fds.into_iter().next()))),
            Reply::RegionInfoCut { argsz, .. } => Some(Err(argsz)),
            _ => None,
        })?;
        match answer {
            Ok(found) => return Ok(found),
            // Each time more than before, so this ends.
            Err(more) if more <= MAX_REGION_ROOM => argsz = more,
            Err(more) => {
                return Err(io::Error::other(format!(
                    "a description of {more} bytes is too long"
                )));
            }
        }
    }
}

/// Makes an eventfd for each MSI-X vector: as many as the device has, but at most `most`.
pub(super) fn vectors(
    connection: &Connection,
    most: u16,
) -> Result<(Vec<Arc<OwnedFd>>, bool), OpenError> {
    let address = connection.address();
    let request = Request::IrqInfo {
        argsz: 16,
        index: irq::MSIX,
    };
    let info = connection.call(&request, Vec::new(), |reply, _| match reply {
        Reply::IrqInfo(info) => Some(info),
        _ => None,
    });
    let info = info.map_err(step(address, "asking for its interrupts"))?;
    if info.count == 0 || !info.eventfd {
        return Err(OpenError::Unusable {
            address: address.to_owned(),
            reason: "it has no MSI-X interrupts".to_owned(),
        });
    }
    let count = u16::try_from(info.count)
        .unwrap_or(u16::MAX)
        .min(most.max(1));
    let eventfds = (0..count)
        .map(|_| host::eventfd().map(Arc::new))
        .collect::<io::Result<Vec<_>>>()
        .map_err(|source| OpenError::OpenFiles {
            address: address.to_owned(),
            vectors: count,
            source,
        })?;
    Ok((eventfds, info.maskable))
}

/// Has all these vectors signalled, as many in one message as the server takes descriptors.
pub(super) fn set_vectors(
    connection: &Connection,
    vectors: &[Arc<OwnedFd>],
    max_fds: u32,
    maskable: bool,
) -> io::Result<()> {
    let at_a_time = usize::try_from(max_fds).unwrap_or(usize::MAX);
    let mut start = 0;
    for some in vectors.chunks(at_a_time.clamp(1, MAX_FDS)) {
        let fds = some
            .iter()
            .map(|vector| vector.as_fd().try_clone_to_owned());
        let fds = fds.collect::<io::Result<Vec<_>>>()?;
        let count = some.len() as u32;
        set_irqs(connection, start, count, IrqAction::Trigger, fds)?;
        if maskable {
            // Nothing else would, where masks in the MSI-X table count.
            set_irqs(connection, start, count, IrqAction::Unmask, Vec::new())?;
        }
        start += count;
    }
    Ok(())
}

/// The kernel passes so many descriptors with one message (SCM_MAX_FD).
const MAX_FDS: usize = 253;

fn set_irqs(
    connection: &Connection,
    start: u32,
    count: u32,
    action: IrqAction,
    fds: Vec<OwnedFd>,
) -> io::Result<()> {
    let request = Request::SetIrqs(SetIrqs {
        index: irq::MSIX,
        start,
        count,
        action,
        data: if fds.is_empty() {
            IrqData::None
        } else {
            IrqData::Eventfd
        },
    });
    connection.call(&request, fds, |reply, _| {
        matches!(reply, Reply::SetIrqs).then_some(())
    })
}

/// The error of a step.
pub(super) fn step(address: &str, operation: &'static str) -> impl FnOnce(io::Error) -> OpenError {
    let address = address.to_owned();
    move |source| OpenError::Step {
        address,
        operation,
        source,
    }
}
