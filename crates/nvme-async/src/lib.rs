//! NVMe from user space: a submission queue is a handle whose futures you `.await`.
//!
//! A controller is reached through the kernel's VFIO, with the IOMMU between the device and your
//! memory, or it is a software controller inside of the process. Either way a program opens it by
//! its URL and awaits reads and writes in an ordinary Tokio runtime:
//!
//! ```
//! # #[cfg(feature = "soft")]
//! # #[tokio::main]
//! # async fn main() -> Result<(), nvme_async::Error> {
//! let namespace = nvme_async::open("mem:?size=1M").await?;
//! let mut buffer = namespace.allocate(4096)?;
//! buffer.fill(7);
//! namespace.write(8192, buffer).await?;
//! namespace.flush().await?;
//! assert_eq!(namespace.read(8192, 4096).await?, vec![7; 4096]);
//! namespace.controller().shutdown().await?;
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "soft"))]
//! # fn main() {}
//! ```
//!
//! # Memory
//!
//! The device accesses memory until a command is complete, whatever became of its future. So
//! operations take buffers by value and give them back: [`memory`] says which kinds there are.
//! Dropping a future gives up the result, never the memory under a transfer.
//!
//! # Completions
//!
//! Each queue pair has a reaper, a task that polls for completions while some are expected soon
//! and lets other tasks run in between, and otherwise sleeps on the queue's interrupt. See
//! [`PollMode`].
//!
//! # Events
//!
//! What a controller reports by itself is always asked for. Handles of namespaces follow changes of
//! size and say when a namespace is gone (see [`Namespace`]); [`Controller::events`] is a stream of
//! everything, for programs that want to know.

#![deny(unsafe_code)]

mod barrier;
mod controller;
pub mod device;
mod engine;
mod error;
mod io;
#[expect(unsafe_code, reason = "it maps memory and lends it to devices")]
pub mod memory;
mod namespace;
mod options;
mod queue;
mod queue_pair;
mod rare;
mod recovery;
pub mod runtime;
mod url;

pub use iova;
#[cfg(feature = "soft")]
pub use nvme_soft;
pub use nvme_spec;

pub use crate::controller::{Controller, ControllerEvent, Counters, EventStream, NamespaceChange};
pub use crate::engine::{LocalQueue, PollMode, QueueAccess, SharedQueue};
pub use crate::error::{CommandError, CommandName, Error, Fate, IoError, SplitError};
pub use crate::io::{
    Compare, IoBuffer, Read, ReadBuffer, ReadInto, RegisteredSlice, Registration, Write,
    WriteBuffer,
};
pub use crate::memory::{DmaBuf, Registered};
pub use crate::namespace::{LocalNamespace, Namespace, Zeroes};
pub use crate::options::{OnRecovery, OpenOptions};
pub use crate::queue::Lie;
pub use crate::queue_pair::{CommandData, Completion, QueuePair};
pub use crate::recovery::{ControllerState, ResetCause};
pub use crate::url::{UrlError, parse_size};

/// Opens a namespace by URL.
///
/// | URL | reaches |
/// | --- | --- |
/// | `nvme://0000:44:00.0/1` | a PCI function bound to `vfio-pci`, namespace 1 (`/1` may be left out) |
/// | `vfio-user:/run/nvme.sock?ns=1` | a controller in another process that serves the vfio-user protocol, namespace 1 (`?ns=1` may be left out) |
/// | `file:disk.img?size=1G&lba=4096` | a software controller over a file, which is created sparse when `size` is given |
/// | `mem:?size=256M` | a software controller over memory |
///
/// The software controller also takes `namespaces=N` and `ns=N` (which one to open),
/// `latency=80us` (the least time that an I/O command takes), `fd-only` (it accesses memory
/// only through file descriptors, as a controller in another process would) and
/// `faults=plan.toml` (a file that says what it does wrong and when; the documentation of the module
/// `fault` of `nvme-soft` has the keys and an example).
///
/// Opening two namespaces of one PCI function, socket or file in one process shares the controller.
///
/// # Errors
///
/// [`Error::Url`], [`Error::Open`] when the device can't be opened (it says what to do),
/// [`Error::Unusable`], [`Error::NotReady`] and [`Error::ControllerFailed`] when it does not come
/// up, [`Error::NoNamespace`], and [`Error::NoRuntime`] in a runtime without I/O or time driver.
///
/// # Cancel safety
///
/// Dropping it leaves the controller as a dropped [`Controller`] would.
pub async fn open(url: &str) -> Result<Namespace, Error> {
    OpenOptions::new().url(url).open().await
}
