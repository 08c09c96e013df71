//! Controllers in another process, reached by the vfio-user protocol over a Unix socket: SPDK's target,
//! QEMU's, or `nvme-async serve vfio-user`.
//!
//! Neither an IOMMU nor privileges are needed, only that the socket may be opened. The server maps this
//! process's DMA memory by file descriptor, and this process the server's doorbells, so that I/O takes no
//! message at all where the server lets its doorbells be mapped. Where it does not, a doorbell is a
//! message; with shadow doorbells (Doorbell Buffer Config) there are few of them.
//!
//! # Who waits for the server
//!
//! A server answers when it gets round to it: some look at their socket once in a millisecond, a server
//! that hangs never answers. So nothing that a Tokio worker calls waits for one:
//!
//! * One plain thread for each connection reads from the socket (`service`). It hands out replies, serves
//!   the server's own requests, and sends what the socket had no room for.
//! * Registers, mappings and resets are *calls* (`Connection::call`): they wait for their reply, but no
//!   longer than [`VfioUserOptions::reply_timeout`], after which the connection is ended. They are made
//!   by recovery's thread, by the thread that stops an abandoned controller, and for tasks in
//!   `spawn_blocking`: [`Device::waits_for_peer`] is what the driver goes by.
//! * A doorbell that is a message is sent without waiting, and wants no reply. Where the socket has no
//!   room it is left to the thread, one message for each doorbell at most, with its last value.
//!
//! # What is believed
//!
//! Every reply is checked: that it answers what was asked, its size, its error flag. A reply that is none
//! ends the connection. DMA_READ and DMA_WRITE reach what is mapped, in its direction, and nothing else.
//! What an earlier client left in the function (bits of the PCI command register, MSI-X, CC.EN) is undone
//! in an order in which no server is led to fail the controller, and a reset is only believed when
//! CSTS.RDY is clear.
//!
//! A server has the memory that is mapped for it in its hands until it lets go of the file descriptors,
//! whatever it says: that is for [`OpenOptions::isolate`](crate::OpenOptions::isolate). And it can cut
//! short the file of its doorbells, whereupon the next store there raises SIGBUS; one that might do that
//! had better not be used.
//!
//! # The end
//!
//! When the server closes the connection or dies, it accesses memory no more: everything in flight
//! resolves with [`Error::Removed`](crate::Error::Removed), and buffers come back. A server that has
//! broken the protocol, or does not answer, is given a second to close its side too. If it does not, what
//! was in flight fails just so, but its memory is kept.

mod connection;
mod error;
mod function;
#[expect(unsafe_code, reason = "a mapper promises what others rely on")]
mod mapper;
#[expect(unsafe_code, reason = "it copies from and to memory as a device would")]
mod memory;
mod open;
mod service;

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iova::DmaMapper;
use vfio_user::region;

pub use self::error::OpenError;

use self::connection::{Connection, End, Over};
use self::function::{Function, mappable};
use self::mapper::Mapper;
use self::open::step;
use crate::device::bar::{self, DOORBELLS, MappedDoorbells, Reserved};
use crate::device::config::{self, BUS_MASTER, ReadConfig};
use crate::device::{Device, DeviceError, Doorbell, Notice, VectorMask, host};

/// Revision, programming interface, subclass and class code of an NVMe I/O controller (NVMe over PCIe
/// transport specification 1.0, section 3.8.1), without the revision.
const NVME_CLASS: u32 = 0x01_0802;
const CLASS: u64 = 0x08;

/// How a [`VfioUserDevice`] is opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VfioUserOptions {
    /// Interrupt vectors, each of which is a file descriptor; at least 1. The device may have fewer.
    pub vectors: u16,
    /// How long a server may take to accept the connection and to answer the first message. It serves
    /// one client at a time.
    pub connect_timeout: Duration,
    /// How long a server may take to answer any other message. One that takes longer is not used any
    /// more.
    pub reply_timeout: Duration,
}

impl Default for VfioUserOptions {
    fn default() -> Self {
        Self {
            vectors: 17,
            connect_timeout: Duration::from_secs(10),
            reply_timeout: Duration::from_secs(10),
        }
    }
}

/// A controller behind a vfio-user socket.
pub struct VfioUserDevice {
    function: Function,
    mapper: Mapper,
    doorbells: Vec<MappedDoorbells>,
    reserved: Reserved,
    /// The server looks at masks that are stored in the MSI-X table.
    masks_vectors: bool,
}

impl VfioUserDevice {
    /// Connects to the server that listens at `path`, and prepares its function: interrupts are enabled,
    /// bus mastering is not yet.
    ///
    /// This blocks, for some messages or for the times that the options say.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]; nothing stays open then.
    pub fn open(path: &Path, options: &VfioUserOptions) -> Result<Self, OpenError> {
        let address = address_of(path);
        let socket = open::connect_to(path, &address, options.connect_timeout)?;
        Self::over_socket(socket, address, options)
    }

    /// As [`open`](Self::open), over a socket that is connected already. `address` is for errors and
    /// traces.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn over(
        socket: UnixStream,
        address: impl Into<String>,
        options: &VfioUserOptions,
    ) -> Result<Self, OpenError> {
        let address = address.into();
        socket
            .set_nonblocking(true)
            .map_err(step(&address, "preparing the socket"))?;
        Self::over_socket(socket.into(), address, options)
    }

    fn over_socket(
        socket: OwnedFd,
        address: String,
        options: &VfioUserOptions,
    ) -> Result<Self, OpenError> {
        let connection = Connection::new(address.as_str().into(), socket, options.reply_timeout)
            .map_err(step(&address, "making an eventfd"))?;
        service::start(connection.clone()).map_err(step(&address, "starting a thread"))?;
        let opened = Self::set_up(&connection, options);
        if opened.is_err() {
            connection.end(End::Closed);
        }
        opened
    }

    fn set_up(connection: &Arc<Connection>, options: &VfioUserOptions) -> Result<Self, OpenError> {
        let address = connection.address();
        let unusable = |reason: String| OpenError::Unusable {
            address: address.to_owned(),
            reason,
        };
        let capabilities = open::negotiate(connection, options.connect_timeout)?;
        let can_reset = open::can_reset(connection)?;
        let (bar, file) = open::region_info(connection, region::BAR0)
            .map_err(step(address, "asking for its BAR 0"))?;
        if bar.size <= DOORBELLS || !bar.readable || !bar.writable {
            return Err(unusable(
                "its BAR 0 has no room for doorbells, or can't be accessed".to_owned(),
            ));
        }
        let (config_space, _) = open::region_info(connection, region::CONFIG)
            .map_err(step(address, "asking for its configuration space"))?;
        let (vectors, maskable) = open::vectors(connection, options.vectors)?;
        let function = Function {
            connection: connection.clone(),
            bar_size: bar.size,
            config_size: config_space.size,
            can_reset,
            vectors,
            maskable,
            max_msg_fds: capabilities.max_msg_fds,
            setting_up: Mutex::default(),
        };
        let class = u32::from_le_bytes(
            function
                .read(CLASS)
                .map_err(step(address, "reading its class"))?,
        );
        if class >> 8 != NVME_CLASS {
            return Err(unusable(format!(
                "it is no NVMe controller (class {:#08x})",
                class >> 8
            )));
        }
        function
            .set_up_interrupts(BUS_MASTER)
            .map_err(step(address, "enabling its registers and MSI-X"))?;
        let msix = config::msix_in_bar0(&function).map_err(step(address, "looking for MSI-X"))?;
        let stride = function
            .capabilities()
            .map_err(step(address, "reading register CAP"))?
            .dstrd();
        let doorbells = match file.filter(|_| bar.mappable) {
            Some(file) => map_doorbells(&bar, file, stride).unwrap_or_else(|error| {
                tracing::warn!(address, %error, "doorbells can't be mapped; each will be a message");
                Vec::new()
            }),
            None => Vec::new(),
        };
        tracing::debug!(
            address,
            vectors = function.vectors.len(),
            ?doorbells,
            ?capabilities,
            "opened through vfio-user"
        );
        Ok(Self {
            mapper: Mapper::new(connection.clone(), &capabilities),
            function,
            doorbells,
            reserved: Reserved(msix),
            masks_vectors: capabilities.msix_table_mappable,
        })
    }

    fn connection(&self) -> &Arc<Connection> {
        &self.function.connection
    }

    /// A mapped word of BAR 0.
    fn mapped(&self, offset: u32) -> Option<Doorbell> {
        let mut mapped = self.doorbells.iter();
        mapped.find_map(|doorbells| doorbells.doorbell(offset))
    }

    fn error(&self, operation: String) -> impl FnOnce(io::Error) -> DeviceError {
        move |source| DeviceError {
            address: self.address().to_owned(),
            operation,
            source,
        }
    }
}

impl Device for VfioUserDevice {
    fn address(&self) -> &str {
        self.connection().address()
    }

    fn read32(&self, offset: u32) -> Result<u32, DeviceError> {
        let result = self.function.read32(offset);
        result.map_err(self.error(format!("read of register {offset:#x}")))
    }

    fn write32(&self, offset: u32, value: u32) -> Result<(), DeviceError> {
        let result = self.function.write32(offset, value);
        result.map_err(self.error(format!("write of register {offset:#x}")))
    }

    fn doorbell(&self, offset: u32) -> Result<Doorbell, DeviceError> {
        let refused = |reason: &str| {
            let source = io::Error::new(io::ErrorKind::InvalidInput, reason);
            self.error(format!("use of doorbell {offset:#x}"))(source)
        };
        let end = u64::from(offset) + 4;
        if !offset.is_multiple_of(4)
            || u64::from(offset) < DOORBELLS
            || end > self.function.bar_size
        {
            return Err(refused("BAR 0 has no doorbell there"));
        }
        if self.reserved.holds(offset) {
            return Err(refused("the MSI-X table or its pending bits are there"));
        }
        Ok(self.mapped(offset).unwrap_or_else(|| Doorbell::Call {
            target: self.connection().clone(),
            offset,
        }))
    }

    fn vectors(&self) -> &[Arc<OwnedFd>] {
        &self.function.vectors
    }

    /// Where the server says that it looks at an MSI-X table that can be mapped, as those of this project do.
    fn vector_mask(&self, vector: u16) -> Option<VectorMask> {
        let enabled = self.masks_vectors && usize::from(vector) < self.function.vectors.len();
        let word = self.reserved.vector_control(vector).filter(|_| enabled)?;
        self.mapped(word).map(VectorMask::exclusive)
    }

    fn mapper(&self) -> Arc<dyn DmaMapper> {
        Arc::new(self.mapper.clone())
    }

    /// Where the server is gone, it is certain that it accesses no memory, and forbidding that succeeds.
    fn set_bus_master(&self, enabled: bool) -> Result<(), DeviceError> {
        let (set, clear) = if enabled {
            (BUS_MASTER, 0)
        } else {
            (0, BUS_MASTER)
        };
        let mut result = self.function.change_command(set, clear);
        if result.is_err()
            && !enabled
            && self.connection().why_ended().is_some()
            && self.connection().wait_over() == Over::PeerClosed
        {
            result = Ok(());
        }
        let verb = if enabled { "enabling" } else { "disabling" };
        result.map_err(self.error(format!("{verb} bus mastering")))
    }

    /// By DEVICE_RESET, and then by CC.EN, which some servers leave set.
    fn reset(&self) -> Result<(), DeviceError> {
        let result = self.function.reset();
        result.map_err(self.error("reset".to_owned()))
    }

    fn waits_for_peer(&self) -> bool {
        true
    }

    /// Closes the connection, and with that lets another client have the controller.
    fn close(&self) {
        for doorbells in &self.doorbells {
            if let Err(error) = doorbells.detach() {
                tracing::error!(address = self.address(), %error, "doorbells stay mapped");
            }
        }
        if self.connection().why_ended().is_none()
            // A client that sets no eventfds would find them enabled.
            && let Err(error) = config::enable_msix(&self.function, false)
        {
            tracing::debug!(address = self.address(), %error, "MSI-X stays enabled");
        }
        self.connection().end(End::Closed);
        self.connection().wait_over();
    }

    fn notices(&self) -> Vec<(Notice, Arc<OwnedFd>)> {
        vec![(Notice::Gone, self.connection().gone().clone())]
    }
}

impl Drop for VfioUserDevice {
    fn drop(&mut self) {
        self.connection().end(End::Closed);
    }
}

impl fmt::Debug for VfioUserDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioUserDevice")
            .field("address", &self.address())
            .field("vectors", &self.function.vectors.len())
            .field("doorbells", &self.doorbells)
            .finish_non_exhaustive()
    }
}

/// How a server is named in errors, and told from others.
pub(crate) fn address_of(path: &Path) -> String {
    format!("vfio-user:{}", path.display())
}

fn map_doorbells(
    bar: &vfio_user::RegionInfo,
    file: OwnedFd,
    stride: u8,
) -> io::Result<Vec<MappedDoorbells>> {
    let file = File::from(file);
    let region = mappable(bar, &file)?;
    let keep: Arc<dyn Any + Send + Sync> = Arc::new(());
    bar::map_doorbells(file.as_fd(), &region, stride, host::page_size(), &keep)
}
