//! A connection to a server: memory that is shared, and a queue that runs.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::layout::{self, QUEUE_SIZE};

/// Where this front end says that it has the memory.
const USER: u64 = 0x7f00_0000_0000;
/// No request takes nearly as long, in milliseconds.
const LIMIT: i32 = 20_000;
/// The most queues of a server.
const MAX_QUEUES: u64 = 1024;

/// A server's disk with one queue that runs.
pub(crate) struct Session {
    messages: Frontend,
    memory: GuestMemoryMmap,
    kick: EventFd,
    call: EventFd,
    wait: Epoll,
    /// Of the disk, in bytes.
    size: u64,
    /// Keeps what the server notes of requests in flight, where it does.
    _inflight: Option<File>,
}

impl Session {
    /// Connects, shares memory and starts the queue.
    ///
    /// # Errors
    ///
    /// What the server refuses, or does not offer: an event index, a write cache.
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let mut messages = Frontend::connect(path, MAX_QUEUES)?;
        messages.set_owner()?;
        let protocol_features = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let needed = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            // Without it each write would have to be durable.
            VIRTIO_BLK_F_FLUSH,
        ];
        let needed = needed
            .iter()
            .fold(protocol_features, |all, bit| all | 1 << bit);
        let offered = messages.get_features()?;
        ensure!(
            offered & needed == needed,
            "it offers features {offered:#x}, and needed are {needed:#x}"
        );
        let features = offered & (needed | 1 << VIRTIO_BLK_F_CONFIG_WCE);
        let protocol = messages.get_protocol_features()?;
        // What QEMU uses of those that matter here.
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        let protocol = protocol & wanted;
        messages.set_protocol_features(protocol)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // So that what is refused is known.
            messages.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        messages.set_features(features)?;
        let inflight = match protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            true => Some(share_inflight(&mut messages)?),
            false => None,
        };
        // Capacity, the first field, is in sectors.
        let (_, capacity) = messages.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8])?;
        let capacity = capacity.try_into().ok().context("a short configuration")?;
        let memory = shared_memory(&mut messages).context("sharing memory")?;
        let mut session = Self {
            messages,
            memory,
            kick: EventFd::new(EFD_NONBLOCK)?,
            call: EventFd::new(EFD_NONBLOCK)?,
            wait: Epoll::new()?,
            size: u64::from_le_bytes(capacity) * 512,
            _inflight: inflight,
        };
        session.start().context("starting the queue")?;
        Ok(session)
    }

    fn start(&mut self) -> Result<()> {
        let readable = EpollEvent::new(EventSet::IN, 0);
        self.wait
            .ctl(ControlOperation::Add, self.call.as_raw_fd(), readable)?;
        let places = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: USER + layout::descriptor(0),
            used_ring_addr: USER + layout::used(),
            avail_ring_addr: USER + layout::available(),
            log_addr: None,
        };
        let messages = &mut self.messages;
        messages.set_vring_num(0, QUEUE_SIZE)?;
        messages.set_vring_base(0, 0)?;
        messages.set_vring_addr(0, &places)?;
        messages.set_vring_call(0, &self.call)?;
        messages.set_vring_kick(0, &self.kick)?;
        messages.set_vring_enable(0, true)?;
        Ok(())
    }

    /// Of the disk, in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The memory that is shared.
    pub(crate) fn memory(&self) -> Result<VolatileSlice<'_>> {
        Ok(self
            .memory
            .get_slice(GuestAddress(0), layout::MEMORY as usize)?)
    }

    /// Tells the server of requests.
    pub(crate) fn kick(&self) -> Result<()> {
        Ok(self.kick.write(1)?)
    }

    /// Sleeps until the server's interrupt.
    ///
    /// # Errors
    ///
    /// None comes for long.
    pub(crate) fn wait(&self) -> Result<()> {
        let mut events = [EpollEvent::default()];
        let count = self.wait.wait(LIMIT, &mut events)?;
        ensure!(count > 0, "no interrupt for {} s", LIMIT / 1000);
        self.call.read()?;
        Ok(())
    }

    /// Stops the queue.
    pub(crate) fn stop(&mut self) -> Result<()> {
        self.messages.get_vring_base(0)?;
        Ok(())
    }
}

/// Makes the memory, sealed as servers want it, and shares it.
fn shared_memory(messages: &mut Frontend) -> Result<GuestMemoryMmap> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("vhost-bench", flags)?);
    file.set_len(layout::MEMORY)?;
    fcntl_add_seals(&file, SealFlags::SHRINK)?;
    let (start, size) = (GuestAddress(0), layout::MEMORY as usize);
    let range = (start, size, Some(FileOffset::new(file, 0)));
    let memory = GuestMemoryMmap::from_ranges_with_files([range])?;
    let region = memory.find_region(start).context("no region")?;
    let file = region.file_offset().context("no file")?.file();
    messages.set_mem_table(&[VhostUserMemoryRegionInfo {
        guest_phys_addr: start.0,
        memory_size: layout::MEMORY,
        userspace_addr: USER,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }])?;
    Ok(memory)
}

/// Has the server note what is in flight, as QEMU does.
fn share_inflight(messages: &mut Frontend) -> Result<File> {
    let wanted = VhostUserInflight::new(0, 0, 1, QUEUE_SIZE);
    let (described, file) = messages.get_inflight_fd(&wanted)?;
    messages.set_inflight_fd(&described, file.as_raw_fd())?;
    Ok(file)
}
