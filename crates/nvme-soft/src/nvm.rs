//! The commands of the I/O queues (NVM command set specification 1.0, section 3).

mod compare;
mod copy;
mod footprint;

use std::io;

use nvme_spec::nvm::BlockRange;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{DataPointer, Sqe, Status, admin, dsm};
use zerocopy::FromBytes;

pub(crate) use self::footprint::Footprint;
use crate::data::Flow;
use crate::engine::{Engine, Place, Reply};
use crate::pool::Work;

/// Data to and from the host goes through a buffer of at most this size. What a command transfers up
/// to here is written all or not at all, even if host memory is refused halfway.
const BUFFER: usize = 1 << 20;
/// To zero less than this does not take long.
const LONG_ZEROES: u64 = 1 << 20;

/// What became of a command that did not fail.
enum Effect {
    Done,
    /// It is done once this is.
    HandedOver(Box<Work>),
    /// Nothing, because there is no room for its work now.
    PutOff,
}

type Served = Result<Effect, Status>;

impl Engine {
    /// Serves one command.
    pub(crate) fn io_command(&mut self, command: &Sqe) -> Reply {
        match self.serve_io(command) {
            Ok(Effect::Done) => Reply::Now(Ok(0)),
            Ok(Effect::HandedOver(work)) => Reply::HandOver(work),
            Ok(Effect::PutOff) => Reply::PutOff,
            Err(status) => Reply::Now(Err(status)),
        }
    }

    /// Goes on with a command whose work is done that was handed over, with data of so many bytes.
    pub(crate) fn work_done(&mut self, command: &Sqe, result: io::Result<()>, len: u64) -> Reply {
        if let Err(error) = result {
            return Reply::Now(Err(write_failed(error)));
        }
        let counters = &self.shared.counters;
        match NvmOpcode(command.opcode()) {
            NvmOpcode::WRITE => {
                counters.writes.add(1);
                counters.bytes_written.add(len);
                counters.syncs.add(1);
            }
            NvmOpcode::COPY => {
                counters.bytes_copied.add(len);
                counters.syncs.add(1);
            }
            // They were preceded by a flush.
            NvmOpcode::READ | NvmOpcode::COMPARE | NvmOpcode::VERIFY => {
                self.is_flushed = true;
                let reply = self.io_command(command);
                self.is_flushed = false;
                return reply;
            }
            _ => {}
        }
        Reply::Now(Ok(0))
    }

    fn serve_io(&mut self, command: &Sqe) -> Served {
        let serve = match NvmOpcode(command.opcode()) {
            NvmOpcode::READ => Self::read,
            NvmOpcode::WRITE => Self::write,
            NvmOpcode::FLUSH => Self::flush,
            NvmOpcode::WRITE_ZEROES => Self::write_zeroes,
            NvmOpcode::DATASET_MANAGEMENT => Self::dataset_management,
            NvmOpcode::COMPARE if self.config.compare => Self::compare,
            NvmOpcode::VERIFY if self.config.verify => Self::verify,
            NvmOpcode::COPY if self.config.copy => Self::copy,
            _ => return Err(Status::INVALID_OPCODE),
        };
        // No fused operations are supported.
        if command.fuse() != 0 {
            return Err(Status::INVALID_FIELD);
        }
        serve(self, command)
    }

    fn read(&mut self, command: &Sqe) -> Served {
        let range = BlockRange::from_command(command);
        let namespace = self.namespaces.find(command.nsid())?;
        let len = u64::from(range.blocks) << namespace.lba_shift;
        if len > self.limits.max_transfer {
            return Err(Status::INVALID_FIELD);
        }
        let bytes = namespace.bytes(range.slba, range.blocks.into())?;
        self.prepare(command, Flow::ToHost, len)?;
        if let Some(effect) = self.flush_before_reading(command.nsid(), range.fua)? {
            return Ok(effect);
        }
        let namespace = self.namespaces.find(command.nsid())?;
        if let Some(contents) = namespace.store.as_slice() {
            let data = contents
                .get(bytes.start as usize..bytes.end as usize)
                .ok_or(Status::INTERNAL_ERROR)?;
            self.transfer.send(&self.dma, data)?;
        } else {
            let mut offset = bytes.start;
            while offset < bytes.end {
                let part = (bytes.end - offset).min(BUFFER as u64) as usize;
                let buffer = part_of(&mut self.buffer, part);
                namespace.store.read(offset, buffer).map_err(read_failed)?;
                self.transfer.send(&self.dma, buffer)?;
                offset += part as u64;
            }
        }
        self.shared.counters.reads.add(1);
        self.shared.counters.bytes_read.add(len);
        Ok(Effect::Done)
    }

    fn write(&mut self, command: &Sqe) -> Served {
        /// DTYPE in command dword 12; no directive is supported.
        const DIRECTIVE_TYPE: u32 = 0xf << 20;
        let range = BlockRange::from_command(command);
        let namespace = self.namespaces.find(command.nsid())?;
        let len = u64::from(range.blocks) << namespace.lba_shift;
        if len > self.limits.max_transfer || command.cdw12() & DIRECTIVE_TYPE != 0 {
            return Err(Status::INVALID_FIELD);
        }
        let bytes = namespace.bytes(range.slba, range.blocks.into())?;
        self.prepare(command, Flow::FromHost, len)?;
        let durable = range.fua || !self.admin.features.volatile_write_cache();
        // What exceeds the buffer is written in parts.
        let mut alone = false;
        if durable && len <= BUFFER as u64 {
            match self.place(self.namespaces.concurrent(command.nsid())) {
                Place::Pool(store) => {
                    let mut data = self.background.buffer(len as usize);
                    self.transfer.receive(&self.dma, &mut data)?;
                    let offset = bytes.start;
                    return Ok(Effect::HandedOver(Box::new(Work::Write {
                        store,
                        offset,
                        data,
                    })));
                }
                Place::Nowhere => return Ok(Effect::PutOff),
                Place::Here { is_alone } => alone = is_alone,
            }
        }
        let namespace = self.namespaces.find(command.nsid())?;
        let mut offset = bytes.start;
        while offset < bytes.end {
            let part = (bytes.end - offset).min(BUFFER as u64) as usize;
            let buffer = part_of(&mut self.buffer, part);
            self.transfer.receive(&self.dma, buffer)?;
            namespace
                .store
                .write(offset, buffer, durable)
                .map_err(write_failed)?;
            offset += part as u64;
        }
        self.shared.counters.writes.add(1);
        self.shared.counters.bytes_written.add(len);
        if durable {
            self.shared.counters.syncs.add(1);
        }
        if alone {
            self.has_blocked();
        }
        Ok(Effect::Done)
    }

    fn flush(&mut self, command: &Sqe) -> Served {
        let nsid = command.nsid();
        if nsid != admin::ALL_NAMESPACES {
            self.namespaces.find(nsid)?;
        }
        if !self.admin.features.volatile_write_cache() {
            return Ok(Effect::Done);
        }
        Ok(self.flush_or_hand_over(nsid)?.unwrap_or(Effect::Done))
    }

    /// Flushes a namespace, or all; returns the effect if that is not what has happened.
    fn flush_or_hand_over(&mut self, nsid: u32) -> Result<Option<Effect>, Status> {
        let stores = match nsid {
            admin::ALL_NAMESPACES => self.namespaces.all_concurrent(),
            _ => self.namespaces.concurrent(nsid).map(|store| vec![store]),
        };
        match self.place(stores) {
            Place::Pool(stores) => {
                self.shared.counters.syncs.add(stores.len() as u64);
                Ok(Some(Effect::HandedOver(Box::new(Work::Flush(stores)))))
            }
            Place::Nowhere => Ok(Some(Effect::PutOff)),
            Place::Here { is_alone } => {
                let counters = &self.shared.counters;
                match nsid {
                    admin::ALL_NAMESPACES => self.namespaces.flush_all(counters),
                    _ => self.namespaces.find(nsid)?.flush(counters),
                }
                .map_err(write_failed)?;
                if is_alone {
                    self.has_blocked();
                }
                Ok(None)
            }
        }
    }

    /// Makes everything durable that was written, and what is being written.
    pub(crate) fn flush_all(&mut self) -> Result<(), Status> {
        self.settle();
        self.namespaces
            .flush_all(&self.shared.counters)
            .map_err(write_failed)
    }

    fn write_zeroes(&mut self, command: &Sqe) -> Served {
        let range = BlockRange::from_command(command);
        let namespace = self.namespaces.find(command.nsid())?;
        let len = u64::from(range.blocks) << namespace.lba_shift;
        if len > self.limits.max_write_zeroes {
            return Err(Status::INVALID_FIELD);
        }
        let bytes = namespace.bytes(range.slba, range.blocks.into())?;
        let flush = range.fua || !self.admin.features.volatile_write_cache();
        self.zero(command, vec![(bytes.start, len)], range.deallocate, flush)
    }

    fn dataset_management(&mut self, command: &Sqe) -> Served {
        /// AD in command dword 11. The other attributes are hints, of which nothing is made.
        const DEALLOCATE: u32 = 1 << 2;
        const RANGE_SIZE: usize = size_of::<dsm::Range>();
        let count = (command.cdw10() & 0xff) as usize + 1;
        let deallocate = command.cdw11() & DEALLOCATE != 0;
        self.namespaces.find(command.nsid())?;
        if deallocate && self.config.dmrl != 0 && count > usize::from(self.config.dmrl) {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
        }
        let len = count * RANGE_SIZE;
        self.prepare(command, Flow::FromHost, len as u64)?;
        let list = part_of(&mut self.buffer, len);
        self.transfer.receive(&self.dma, list)?;
        if !deallocate {
            return Ok(Effect::Done);
        }
        let namespace = self.namespaces.find(command.nsid())?;
        let ranges = || {
            list.chunks_exact(RANGE_SIZE)
                .filter_map(|bytes| dsm::Range::read_from_bytes(bytes).ok())
        };
        // All or nothing: no range is touched while a later one may be refused.
        let mut total = 0;
        for range in ranges() {
            let blocks = range.blocks.get();
            namespace.bytes(range.slba.get(), blocks.into())?;
            total += u64::from(blocks);
            if self.config.dmrsl != 0 && blocks > self.config.dmrsl {
                return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
            }
        }
        if self.config.dmsl != 0 && total > self.config.dmsl {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
        }
        let mut parts = Vec::with_capacity(count);
        for range in ranges() {
            let bytes = namespace.bytes(range.slba.get(), range.blocks.get().into())?;
            if !bytes.is_empty() {
                parts.push((bytes.start, bytes.end - bytes.start));
            }
        }
        let flush = !self.admin.features.volatile_write_cache();
        self.zero(command, parts, true, flush)
    }

    /// Zeroes ranges, each an offset and a length in bytes, and then flushes if that is wanted.
    fn zero(
        &mut self,
        command: &Sqe,
        ranges: Vec<(u64, u64)>,
        deallocate: bool,
        flush: bool,
    ) -> Served {
        let mut alone = false;
        if flush || ranges.iter().map(|range| range.1).sum::<u64>() >= LONG_ZEROES {
            match self.place(self.namespaces.concurrent(command.nsid())) {
                Place::Pool(store) => {
                    if flush {
                        self.shared.counters.syncs.add(1);
                    }
                    return Ok(Effect::HandedOver(Box::new(Work::Zero {
                        store,
                        ranges,
                        deallocate,
                        flush,
                    })));
                }
                Place::Nowhere => return Ok(Effect::PutOff),
                Place::Here { is_alone } => alone = is_alone,
            }
        }
        let namespace = self.namespaces.find(command.nsid())?;
        for (offset, len) in ranges {
            namespace
                .store
                .zero(offset, len, deallocate)
                .map_err(write_failed)?;
        }
        if flush {
            namespace
                .flush(&self.shared.counters)
                .map_err(write_failed)?;
        }
        if alone {
            self.has_blocked();
        }
        Ok(Effect::Done)
    }

    /// Finds the command's data in host memory.
    fn prepare(&mut self, command: &Sqe, flow: Flow, len: u64) -> Result<(), Status> {
        let data = command.data_pointer().map_err(|error| error.status())?;
        if matches!(data, DataPointer::Sgl(_)) && !self.config.sgl {
            return Err(Status::INVALID_FIELD);
        }
        self.transfer
            .prepare(&self.dma, data, flow, len, self.limits.page_size)
    }
}

/// The first `len` bytes of a buffer that grows as needed and then stays.
fn part_of(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}

fn read_failed(error: io::Error) -> Status {
    tracing::error!(%error, "store failed to read");
    Status::UNRECOVERED_READ_ERROR
}

fn write_failed(error: io::Error) -> Status {
    tracing::error!(%error, "store failed to write");
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Status::CAPACITY_EXCEEDED,
        _ => Status::WRITE_FAULT,
    }
}
