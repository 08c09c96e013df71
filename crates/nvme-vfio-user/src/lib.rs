//! A software NVMe controller (`nvme-soft`) as a PCI function that other processes use over vfio-user:
//! SPDK's driver, cloud-hypervisor, QEMU from 10.1 on, or this project's own.
//!
//! [`Device`] is the controller with all that a PCI function has besides: configuration space, MSI-X, and
//! the memory of whoever uses it. [`Server`] has a socket for clients to find it at.
//!
//! * **One client at a time.** A second one waits until the first is gone, and finds a function that was
//!   reset: configuration space, memory, interrupts and queues of the client before are no more. What it
//!   wrote to namespaces is there. Who connects and does not say VERSION, or stops in the middle of a message,
//!   is sent away after [`Options::patience`]; a client that is merely idle may stay.
//! * **BAR 0** has 16 KiB: registers, doorbells at 1000h, the MSI-X table at 2000h and its pending bits at
//!   3000h. All of it is served by messages; with [`Doorbells::Mapped`] the doorbells can be mapped too.
//! * **Interrupts** are MSI-X. A vector fires through its eventfd (DEVICE_SET_IRQS) while MSI-X is enabled in
//!   configuration space and neither the function nor the vector is masked. As in the kernel's VFIO, setting
//!   an eventfd unmasks its vector. An eventfd is made nonblocking, so that nobody waits for its reader.
//!   A client that says in VERSION that it knows an MSI-X table when it sees one (the capability
//!   `msix_table_mappable`, an extension of this project's) can map the table, too, and mask by a store. What was
//!   held back fires at once where the controller is awake, and else within 0.1 s of the store that lets it
//!   through. To others the table is not offered: a VMM might let its guest write there unseen.
//! * **DEVICE_RESET** resets the controller and leaves configuration space and eventfds as they are, as the
//!   kernel's VFIO does. A function level reset by configuration space clears that, too.
//! * **Migration** is not supported: DEVICE_FEATURE and what belongs to it are refused.
//!
//! # Hostile clients
//!
//! A client can do to its own session what it likes and nothing to the server or to other memory. Memory
//! comes as a file. Whoever has that file can make it shorter, after which a mapping of it raises SIGBUS. So
//! only what cannot become shorter is mapped: a memfd with the seal `F_SEAL_SHRINK`, if it is not of huge
//! pages. Other files are read and written by system calls, where what is not there is no signal, and only
//! memory and those on local file systems that this process sees mounted, so that it never waits for another
//! process; [`Options::trust_client`] maps them, too. All files together may have 16 TiB. Memory without a file
//! is asked for by messages, which have [10 seconds](DMA_TIMEOUT) to be answered.
//!
//! What a client can do nonetheless, which only who may open the socket can: have pages of a sparse file come into
//! being, which count as this process's where cgroups limit memory, and keep a descriptor open here for each
//! message that waits and each file that is not mapped, up to the limit of this process (RLIMIT_NOFILE). The
//! descriptor of a file on a FUSE file system of its own it can have closed here, which that may take its time
//! for.
//!
//! # Doorbells
//!
//! With [`Doorbells::Trapped`] each write of a doorbell register is a message, and the controller has Doorbell
//! Buffer Config: a driver that uses it writes the register only when the controller sleeps. An idle server
//! takes next to no CPU time, and the first command after a pause completes within about 0.1 ms. With
//! [`Doorbells::Mapped`] a write is a store, but an idle server has to look: after
//! [`Options::idle_interval`] at the latest, which also is by how much the first command after a pause may be
//! late. At 1 ms that takes about 2 % of a processor, and only while a client has the controller enabled.
//!
//! ```no_run
//! use nvme_soft::{Config, NamespaceConfig, store::MemoryStore};
//! use nvme_vfio_user::{Device, Options, Server};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = Config::default();
//! config.namespaces.push(NamespaceConfig::new(MemoryStore::new(1 << 30)?, 4096));
//! let device = Device::new(config, &Options::default())?;
//! let server = Server::bind("/run/nvme.sock")?;
//! // Another thread ends it: server.stopper().stop().
//! server.run(&device)?;
//! # Ok(())
//! # }
//! ```

#![deny(unsafe_code)]

mod bar;
mod config_space;
mod connection;
mod device;
mod link;
mod memory;
mod pages;
mod server;
mod session;
mod socket;
mod vectors;

pub use connection::ServeError;
pub use device::{Device, Doorbells, Options, StartError};
pub use link::DMA_TIMEOUT;
pub use server::{Server, Stopper};
pub use socket::{BindError, Socket};
