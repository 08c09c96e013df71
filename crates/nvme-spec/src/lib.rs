//! The NVMe wire: registers, queue entries, commands, data structures and status codes.
//!
//! Plain data for a driver and for a controller alike: no I/O, no allocation, no `unsafe`. What is
//! here follows the *NVM Express Base Specification, revision 2.0* ("Base") and the *NVM Command Set
//! Specification, revision 1.0* ("NVM"); each item names the section or figure it comes from.
//!
//! Three conventions hold throughout:
//!
//! * Structures that lie in memory shared with the other side are made of little-endian, unaligned
//!   integers ([`zerocopy::little_endian`]), so that they mean the same on every host and can be
//!   read from any byte position. Their sizes and offsets are checked when the crate is compiled.
//! * Fields keep the specification's names, in snake case (`mdts`, `flbas`), and the specification's
//!   encoding: a "0's based" field holds one less than the count. Methods with a spelled-out name
//!   (`max_transfer_pages`, `lba_size`) decode.
//! * Codes that a later specification may extend (opcodes, status codes, feature identifiers) are
//!   open: a number with named constants, never a Rust `enum` that an unknown value could not be in.
//!
//! ```
//! use nvme_spec::{Cqe, DataPointer, Status, nvm};
//!
//! let command = nvm::read(1, 0x1000, 8, false)
//!     .with_cid(7)
//!     .with_data(DataPointer::Prp { prp1: 0x10_0000, prp2: 0 });
//! assert_eq!(command.dwords()[0], 0x0007_0002);
//!
//! let completion = Cqe::new(7, Status::LBA_OUT_OF_RANGE.with_dnr(true)).with_phase(true);
//! assert_eq!(
//!     completion.status().to_string(),
//!     "LBA Out of Range (SCT 0x0, SC 0x80, DNR)"
//! );
//! ```

#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod admin;
pub mod copy;
pub mod cqe;
pub mod dsm;
pub mod event;
pub mod feature;
pub mod identify;
pub mod log;
pub mod nvm;
pub mod opcode;
pub mod prp;
pub mod registers;
pub mod sgl;
pub mod sqe;
pub mod status;

pub use cqe::Cqe;
pub use sqe::{DataPointer, Sqe};
pub use status::Status;
