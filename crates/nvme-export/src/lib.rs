//! Serves NVMe namespaces to guests and other programs.
//!
//! An [`Export`] is what a server may touch: a namespace, or a range of one. No request for it leaves
//! that range.
//!
//! # Several at one controller
//!
//! Exports of one controller are served at the same time, in one process. Each queue of a guest and each connection of
//! an NBD client keeps to one queue pair of the controller ([`Namespace::pinned`](nvme_async::Namespace::pinned)), which
//! takes turns between them: nobody is behind what others have outstanding. Where there are more of them than queue
//! pairs, some share one, and each has no more requests under way than its share of the queue pair's depth.
//! [`OpenOptions::queues`](nvme_async::OpenOptions::queues) says how many queue pairs there are.

#![deny(unsafe_code)]

mod export;
pub mod nbd;
pub mod vhost_user_blk;

pub use crate::export::{Export, ExportError, OutOfExport};
