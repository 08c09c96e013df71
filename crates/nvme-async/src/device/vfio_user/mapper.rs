//! Memory for the server, as file descriptors.

use std::io;
use std::sync::Arc;

use iova::{Direction, DmaMapper, Geometry, HostMemory, MapError};
use vfio_user::{Capabilities, DmaMap, DmaUnmap, Reply, Request};

use super::connection::{Connection, End, Over};

/// Maps memory by DMA_MAP. While the connection lives, each call waits for the server.
#[derive(Clone)]
pub(super) struct Mapper {
    connection: Arc<Connection>,
    geometry: Geometry,
}

impl Mapper {
    /// With what the server can do.
    pub(super) fn new(connection: Arc<Connection>, capabilities: &Capabilities) -> Self {
        let geometry = Geometry {
            // The protocol has no way to say.
            usable: Vec::new(),
            page_sizes: capabilities.pgsizes,
            max_mappings: Some(capabilities.max_dma_maps),
            unmaps_runs: false,
        };
        Self {
            connection,
            geometry,
        }
    }
}

// SAFETY: the server reaches memory by the file and offset that it is given, which are those of the
// memory, or by messages, which are served from `Connection::memory`: that has exactly what is mapped,
// and `remove` waits for accesses in progress. `Ok` from `unmap` means that the server has said that it
// is done with the range, or that its connection has ended, with which by protocol everything that it had
// mapped ends: it was closed here after the controller was stopped, or the server closed it. No mapping
// ends otherwise. The geometry is constant.
unsafe impl DmaMapper for Mapper {
    fn geometry(&self) -> Geometry {
        self.geometry.clone()
    }

    unsafe fn map(
        &self,
        iova: u64,
        memory: &HostMemory<'_>,
        direction: Direction,
    ) -> Result<(), MapError> {
        // Some servers accept memory without a file, and then fail every command on it.
        let (file, offset) = memory.file().ok_or(MapError::NeedsFile)?;
        let file = file.try_clone_to_owned()?;
        let connection = &self.connection;
        if connection.why_ended().is_some() {
            return Err(MapError::DeviceGone);
        }
        // Before the server knows of it, which may then ask for it at once.
        //
        // SAFETY: the caller keeps the memory valid for the device until `unmap` has returned `Ok`, which
        // removes it; as does this function before it returns an error.
        unsafe { connection.memory.insert(iova, memory, direction) };
        let request = Request::DmaMap(DmaMap {
            readable: direction.allows(Direction::ToDevice),
            writable: direction.allows(Direction::FromDevice),
            offset,
            address: iova,
            size: memory.len() as u64,
        });
        let mapped = connection.call(&request, vec![file], |reply, _| {
            matches!(reply, Reply::DmaMap).then_some(())
        });
        mapped.map_err(|error| {
            connection.memory.remove(iova);
            self.error(error)
        })
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError> {
        let connection = &self.connection;
        if connection.why_ended().is_none() {
            let request = Request::DmaUnmap(DmaUnmap {
                all: false,
                address: iova,
                size: len,
            });
            let unmapped = connection.call(&request, Vec::new(), |reply, _| {
                matches!(reply, Reply::DmaUnmap(_)).then_some(())
            });
            match unmapped {
                Ok(()) => {}
                // It was meanwhile that it ended.
                Err(_) if connection.why_ended().is_some() => {}
                Err(error) => return Err(self.error(error)),
            }
        }
        let is_over = connection.how_over() == Some(Over::PeerClosed);
        match connection.why_ended() {
            None | Some(End::Closed | End::ByPeer) => {}
            Some(_) if is_over => {}
            Some(_) => return Err(MapError::DeviceGone),
        }
        connection.memory.remove(iova);
        Ok(())
    }
}

impl Mapper {
    fn error(&self, error: io::Error) -> MapError {
        match self.connection.why_ended() {
            Some(_) => MapError::DeviceGone,
            None => error.into(),
        }
    }
}
