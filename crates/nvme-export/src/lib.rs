//! Serves NVMe namespaces to guests and other programs.
//!
//! An [`Export`] is what a server may touch: a namespace, or a range of one. No request for it leaves
//! that range.

#![deny(unsafe_code)]

mod export;
pub mod nbd;
pub mod vhost_user_blk;

pub use crate::export::{Export, ExportError, OutOfExport};
