//! One front end's messages (the vhost-user specification), and what is done about them.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::runtime::Handle;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use super::config;
use super::device::{DeviceInner, QueueDevice};
use super::eventfd::{self, Kick, Receiver};
use super::inflight::Inflight;
use super::memory::{Memory, SharedRegions, guest_address};
use super::queue::{QueueParts, RunningQueue};
use super::ring::{Ring, RingConfig};
use super::vring::{Places, Vring};
use super::{MAX_QUEUE_SIZE, MAX_REGIONS};

/// One front end. Its thread may wait, which what it calls for in the runtime is not done in.
pub(super) struct Session {
    device: Arc<DeviceInner>,
    runtime: Handle,
    features: u64,
    protocol_features: u64,
    memory: Memory,
    regions: Arc<SharedRegions>,
    vrings: Vec<Vring>,
    inflight: Option<Inflight>,
    /// Where requests to the front end would go. There are none, but it stays open for as long as the connection.
    _requests: Option<Backend>,
}

impl Session {
    pub(super) fn new(device: Arc<DeviceInner>, runtime: Handle) -> Self {
        let regions = Arc::new(SharedRegions::default());
        let controller = device.export.namespace().controller().clone();
        Self {
            memory: Memory::new(controller, device.trust_client, regions.clone()),
            vrings: (0..device.queues).map(|_| Vring::default()).collect(),
            device,
            runtime,
            features: 0,
            protocol_features: 0,
            regions,
            inflight: None,
            _requests: None,
        }
    }

    /// Whether the front end may ask for acknowledgements.
    pub(super) fn acknowledges(&self) -> bool {
        self.protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// Waits for what is under way, and gives the guest's memory back.
    pub(super) fn close(&mut self) {
        let runtime = self.runtime.clone();
        // First, and without the runtime, all of whose workers may be held up.
        for vring in &self.vrings {
            vring.call.close();
            vring.broken.close();
        }
        runtime.block_on(async {
            for vring in &mut self.vrings {
                if let Some(running) = vring.running.take()
                    && let Err(error) = running.stop().await
                {
                    tracing::warn!(%error, "a queue has not ended in order");
                }
            }
            if let Err(error) = self.memory.clear().await {
                tracing::warn!(%error, "memory of a front end's");
            }
        });
        self.inflight = None;
    }

    fn vring(&mut self, index: impl TryInto<usize>) -> Result<&mut Vring> {
        let index = index.try_into().map_err(|_| Error::InvalidParam)?;
        self.vrings.get_mut(index).ok_or(Error::InvalidParam)
    }

    /// Starts or stops a queue, whatever follows from its state.
    fn update(&mut self, index: usize) -> Result<()> {
        let has_enable = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        let vring = self.vrings.get(index).ok_or(Error::InvalidParam)?;
        let runs = vring.is_started && (vring.is_enabled || !has_enable);
        match (runs, &vring.running) {
            (true, None) => self.start(index),
            (false, Some(_)) => self.stop(index),
            _ => Ok(()),
        }
    }

    fn start(&mut self, index: usize) -> Result<()> {
        let vring = &self.vrings[index];
        let number = u16::try_from(index).map_err(failed)?;
        let regions = self.regions.get();
        let place = |address| guest_address(&regions, address);
        let places = vring.places.as_ref().and_then(|places| {
            Some((
                place(places.table)?,
                place(places.available)?,
                place(places.used)?,
            ))
        });
        let Some((table, available, used)) = places else {
            return Err(failed("a queue outside of memory, or without a place"));
        };
        let ring_config = RingConfig {
            size: vring.size,
            table,
            available,
            used,
            base: vring.base,
            has_event_index: config::has(self.features, VIRTIO_RING_F_EVENT_IDX),
            has_indirect: config::has(self.features, VIRTIO_RING_F_INDIRECT_DESC),
        };
        let inflight = match &self.inflight {
            Some(inflight) => Some(inflight.queue(number, vring.size).map_err(failed)?),
            None => None,
        };
        let ring = Ring::new(&ring_config, inflight, &regions).map_err(failed)?;
        drop(regions);
        let _in_runtime = self.runtime.enter();
        let kick = vring.kick.clone().map(Kick::new).transpose();
        let parts = QueueParts {
            device: Arc::new(QueueDevice::new(self.device.clone())),
            index: number,
            regions: self.regions.clone(),
            ring,
            features: self.features,
            kick: kick.map_err(Error::ReqHandlerError)?,
            call: vring.call.clone(),
            broken: vring.broken.clone(),
        };
        self.vrings[index].running = Some(RunningQueue::start(parts));
        Ok(())
    }

    fn stop(&mut self, index: usize) -> Result<()> {
        let vring = &mut self.vrings[index];
        if let Some(running) = vring.running.take() {
            vring.base = self
                .runtime
                .block_on(running.stop())
                .map_err(Error::ReqHandlerError)?;
        }
        Ok(())
    }

    /// Stops all queues and forgets what the driver has set up, but not the memory.
    fn reset(&mut self) -> Result<()> {
        for index in 0..self.vrings.len() {
            self.stop(index)?;
            self.vrings[index] = Vring::default();
        }
        self.features = 0;
        self.device.is_writeback.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// A failure for the connection to end with, which says why.
fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

/// What was not offered.
fn not_offered<T>() -> Result<T> {
    Err(Error::InvalidOperation("it was not offered"))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::features(&self.device.export))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !config::features(&self.device.export) != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.features = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let replaced = self.memory.replace(table, files);
        self.runtime.block_on(replaced).map_err(failed)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok();
        let size = size.filter(|size| size.is_power_of_two() && *size <= MAX_QUEUE_SIZE);
        self.vring(index)?.size = size.ok_or_else(|| {
            failed(format!(
                "a queue of {num} descriptors; up to {MAX_QUEUE_SIZE} are possible"
            ))
        })?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        table: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        if !flags.is_empty() {
            return not_offered();
        }
        self.vring(index)?.places = Some(Places {
            table,
            available,
            used,
        });
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.vring(index)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        (vring.is_started, vring.kick) = (false, None);
        self.update(index as usize)?;
        let base = self.vring(index)?.base;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = fd.map(eventfd::check).transpose();
        let kick = kick.map_err(Error::ReqHandlerError)?;
        // A queue that runs goes on with the new one.
        let vring = self.vring(index)?;
        (vring.is_started, vring.kick) = (true, kick);
        if vring.running.is_some() {
            self.stop(index.into())?;
        }
        self.update(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let receiver = fd.map(Receiver::check).transpose();
        let receiver = receiver.map_err(Error::ReqHandlerError)?;
        self.vring(index)?.call.set(receiver);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let receiver = fd.map(Receiver::check).transpose();
        let receiver = receiver.map_err(Error::ReqHandlerError)?;
        self.vring(index)?.broken.set(receiver);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(config::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = config::protocol_features() | VhostUserProtocolFeatures::REPLY_ACK;
        if features & !offered.bits() != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.device.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.is_enabled = enable;
        self.update(index as usize)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let DeviceInner { export, queues, .. } = &*self.device;
        let is_writeback = self.device.is_writeback.load(Ordering::Relaxed);
        config::read(export, *queues, is_writeback, offset, size).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let is_writeback = config::written_writeback(offset, buf).ok_or(Error::InvalidParam)?;
        self.device
            .is_writeback
            .store(is_writeback, Ordering::Relaxed);
        Ok(())
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Inflight::allocate(wanted.num_queues, wanted.queue_size).map_err(failed)
    }

    fn set_inflight_fd(&mut self, kept: &VhostUserInflight, file: File) -> Result<()> {
        let inflight = Inflight::open(kept, file, self.device.trust_client);
        self.inflight = Some(inflight.map_err(failed)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        if self.memory.len() >= MAX_REGIONS {
            return Err(failed(format!("more than {MAX_REGIONS} regions of memory")));
        }
        let added = self.memory.add(region, fd);
        self.runtime.block_on(added).map_err(failed)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let removed = self.memory.remove(region);
        self.runtime.block_on(removed).map_err(failed)
    }

    fn set_backend_req_fd(&mut self, requests: Backend) {
        self._requests = Some(requests);
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        not_offered()
    }
}
