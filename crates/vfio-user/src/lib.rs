//! The vfio-user protocol, version 0.1: a PCI function in another process, over a Unix socket.
//!
//! The messages of both sides, typed: a [`Request`] is what one side asks, a [`Reply`] what the other
//! one answers. What is decoded is checked: every size, count, flag and offset that the message itself
//! can be held to. That a range is inside of a region, or that memory was mapped, is for the
//! receiver to check. [`socket`] sends and receives messages with their file descriptors, in
//! threads that block as well as in those that may not.
//!
//! What is here follows *vfio-user Protocol Specification* of libvfio-user (`docs/vfio-user.rst`), in
//! whose words sections are quoted. Integers are in the byte order of the host.
//!
//! The crate `vfio_user` 0.1.7 is not used because its client ignores the error flag of replies, neither
//! side has DMA_READ and DMA_WRITE, and its server leaves bounds to the embedder.
//!
//! ```
//! use vfio_user::{Limits, Reply, Request, RegionAccess, message};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let limits = Limits::default();
//! let access = RegionAccess { region: 0, offset: 0x14, count: 4 };
//! let asked = message(&Request::RegionRead(access).encode(7, false), &limits)?;
//! assert_eq!(asked.request(&limits)?, Request::RegionRead(access));
//!
//! let data = &[1, 0, 0x46, 0];
//! let answer = Reply::RegionRead { region: 0, offset: 0x14, data };
//! let answered = message(&answer.encode(&asked.header), &limits)?;
//! assert_eq!(answered.reply(&limits)?, answer);
//! assert!(answer.answers(&Request::RegionRead(access)));
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod dma;
mod error;
mod header;
pub mod irq;
mod message;
pub mod region;
mod reply;
mod request;
pub mod socket;
mod version;
mod wire;

pub use dma::{DmaAccess, DmaMap, DmaUnmap};
pub use error::{DecodeError, ReplyError};
pub use header::{Command, HEADER_SIZE, Header};
pub use irq::{IrqAction, IrqData, IrqInfo, SetIrqs};
pub use message::{Limits, Message, message};
pub use region::{DeviceInfo, RegionAccess, RegionInfo, RegionWrite, SparseArea, WriteMulti};
pub use reply::{Reply, error_reply};
pub use request::Request;
pub use version::{Capabilities, MAJOR, MINOR, TwinSocket, Version};
