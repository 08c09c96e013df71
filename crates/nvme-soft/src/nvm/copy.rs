//! Copy (NVM command set specification 1.0, section 3.2.2).

use std::ops::Range;

use nvme_spec::copy::SourceRange;
use nvme_spec::nvm::CopyRequest;
use nvme_spec::{Sqe, Status};
use zerocopy::FromBytes;

use super::{BUFFER, Effect, Served, part_of, read_failed, write_failed};
use crate::data::Flow;
use crate::engine::{Engine, Place};
use crate::namespace::Namespace;
use crate::pool::Work;

impl Engine {
    /// All sources are read before anything is written, so that a source may overlap the
    /// destination, and a source that can't be read leaves the destination as it was.
    pub(super) fn copy(&mut self, command: &Sqe) -> Served {
        const ENTRY: usize = size_of::<SourceRange>();
        let request = CopyRequest::from_command(command);
        let namespace = self.namespaces.find(command.nsid())?;
        // No directives, and one format of source ranges (OCFS).
        if request.format != 0 || request.directive != 0 {
            return Err(Status::INVALID_FIELD);
        }
        if request.ranges > namespace.copy_ranges.into() {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
        }
        let len = request.ranges as usize * ENTRY;
        self.prepare(command, Flow::FromHost, len as u64)?;
        let list = part_of(&mut self.buffer, len);
        self.transfer.receive(&self.dma, list)?;
        let namespace = self.namespaces.find(command.nsid())?;
        let (sources, destination) = check(namespace, request.destination_lba, list)?;
        let total = destination.end - destination.start;
        let durable = request.fua || !self.admin.features.volatile_write_cache();
        let place = match durable && total <= BUFFER as u64 {
            true => self.place(self.namespaces.concurrent(command.nsid())),
            false => Place::Here { is_alone: false },
        };
        let namespace = self.namespaces.find(command.nsid())?;
        let data = part_of(&mut self.buffer, total as usize);
        let mut rest = &mut *data;
        for source in sources {
            let (now, later) = rest.split_at_mut((source.end - source.start) as usize);
            namespace
                .store
                .read(source.start, now)
                .map_err(read_failed)?;
            rest = later;
        }
        match place {
            Place::Pool(store) => {
                let mut written = self.background.buffer(data.len());
                written.copy_from_slice(data);
                return Ok(Effect::HandedOver(Box::new(Work::Write {
                    store,
                    offset: destination.start,
                    data: written,
                })));
            }
            Place::Nowhere => return Ok(Effect::PutOff),
            Place::Here { .. } => {}
        }
        namespace
            .store
            .write(destination.start, data, durable)
            .map_err(write_failed)?;
        if durable {
            self.shared.counters.syncs.add(1);
        }
        self.shared.counters.bytes_copied.add(total);
        Ok(Effect::Done)
    }
}

/// The bytes of all sources and of the destination, all within the limits.
fn check(
    namespace: &Namespace,
    destination_lba: u64,
    list: &[u8],
) -> Result<(Vec<Range<u64>>, Range<u64>), Status> {
    let mut sources = Vec::with_capacity(list.len() / size_of::<SourceRange>());
    let mut total = 0;
    for entry in list.chunks_exact(size_of::<SourceRange>()) {
        let Ok(range) = SourceRange::read_from_bytes(entry) else {
            return Err(Status::INTERNAL_ERROR);
        };
        if range.blocks() > namespace.copy_range_blocks.into() {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
        }
        total += range.blocks();
        sources.push(namespace.bytes(range.slba.get(), range.blocks().into())?);
    }
    if total > namespace.copy_blocks {
        return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
    }
    Ok((sources, namespace.bytes(destination_lba, total.into())?))
}
