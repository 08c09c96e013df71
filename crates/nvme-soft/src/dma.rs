//! The controller's way to host memory.

use std::sync::Arc;

use nvme_spec::Status;

use crate::control::Shared;
use crate::{AccessFault, HostMemory};

/// Host memory, with refusals counted.
#[derive(Clone)]
pub(crate) struct Dma {
    memory: Arc<dyn HostMemory>,
    shared: Arc<Shared>,
}

impl Dma {
    pub(crate) fn new(memory: Arc<dyn HostMemory>, shared: Arc<Shared>) -> Self {
        Self { memory, shared }
    }

    /// Reads data or a list of a command.
    pub(crate) fn read(&self, address: u64, out: &mut [u8]) -> Result<(), Status> {
        self.memory
            .read(address, out)
            .map_err(|fault| self.refused(&fault))
    }

    /// Writes data of a command.
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> Result<(), Status> {
        self.memory
            .write(address, data)
            .map_err(|fault| self.refused(&fault))
    }

    /// Writes an aligned word after everything written before.
    pub(crate) fn store_release(&self, address: u64, value: u32) -> Result<(), Status> {
        self.memory
            .store_release(address, value)
            .map_err(|fault| self.refused(&fault))
    }

    /// Reads an aligned word before everything that is read after it.
    pub(crate) fn load_acquire(&self, address: u64) -> Result<u32, Status> {
        self.memory
            .load_acquire(address)
            .map_err(|fault| self.refused(&fault))
    }

    #[cold]
    fn refused(&self, fault: &AccessFault) -> Status {
        self.shared.counters.refused_accesses.add(1);
        if let Some(left_out) = self.shared.log.refused_accesses.pass() {
            tracing::warn!(%fault, left_out, "refused access to host memory");
        }
        Status::DATA_TRANSFER_ERROR
    }
}
