//! What is served: an export as a virtio block device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nvme_soft::LogLimit;
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use super::MAX_QUEUES;
use super::config;
use super::request::ID;
use crate::Export;

/// How a device is served.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// How many queues a front end may use, 1 to [`MAX_QUEUES`]; what is beyond is taken as the nearest of these.
    /// QEMU wants as many as the guest has processors.
    pub queues: u16,
    /// Maps memory that the front end can take away, by making its file shorter, which ends this process (SIGBUS).
    /// Without it only memory is taken that is sealed against that.
    pub trust_client: bool,
    /// How the guest tells the disk from others (`/dev/disk/by-id`): its first 20 bytes. If there is none, it is made
    /// of the namespace's number and the range.
    pub id: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 16,
            trust_client: false,
            id: None,
        }
    }
}

/// An export as a virtio block device. It is a handle: clones are the same device.
#[derive(Clone, Debug)]
pub struct Device {
    pub(super) inner: Arc<DeviceInner>,
}

#[derive(Debug)]
pub(super) struct DeviceInner {
    pub(super) export: Export,
    pub(super) queues: u16,
    pub(super) trust_client: bool,
    pub(super) id: [u8; ID],
    /// What the driver has set in configuration space: whether flushes make writes durable, or writes themselves are.
    pub(super) is_writeback: AtomicBool,
    /// Of what guests can cause.
    pub(super) log_limit: LogLimit,
}

impl Device {
    /// A device over `export`.
    pub fn new(export: Export, options: &Options) -> Self {
        let name = options.id.clone().unwrap_or_else(|| {
            let start = export.locate(0, 0).unwrap_or_default();
            format!("{}-{start:x}", export.namespace().nsid())
        });
        let mut id = [0; ID];
        let len = name.len().min(ID);
        id[..len].copy_from_slice(&name.as_bytes()[..len]);
        Self {
            inner: Arc::new(DeviceInner {
                export,
                queues: options.queues.clamp(1, MAX_QUEUES),
                trust_client: options.trust_client,
                id,
                is_writeback: AtomicBool::new(true),
                log_limit: LogLimit::new(),
            }),
        }
    }
}

/// A device as one of its queues sees it.
#[derive(Debug)]
pub(super) struct QueueDevice {
    pub(super) device: Arc<DeviceInner>,
    /// The device's export, by the queue pair of this queue.
    pub(super) export: Export,
}

impl QueueDevice {
    pub(super) fn new(device: Arc<DeviceInner>) -> Self {
        let export = device.export.pinned();
        Self { device, export }
    }
}

impl DeviceInner {
    /// Whether writes are to be durable when they are done, with what was agreed on with the driver (virtio 1.2,
    /// section 5.2.6.2).
    pub(super) fn is_durable(&self, features: u64) -> bool {
        if config::has(features, VIRTIO_BLK_F_CONFIG_WCE) {
            !self.is_writeback.load(Ordering::Relaxed)
        } else {
            !config::has(features, VIRTIO_BLK_F_FLUSH)
        }
    }
}
