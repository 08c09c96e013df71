//! Compare and Verify: what reads the media and returns no data.

use nvme_spec::nvm::BlockRange;
use nvme_spec::{Sqe, Status};

use super::{BUFFER, Effect, Served, part_of, read_failed};
use crate::data::Flow;
use crate::engine::Engine;

impl Engine {
    /// Compare (NVM command set specification 1.0, section 3.2.1).
    pub(super) fn compare(&mut self, command: &Sqe) -> Served {
        let range = BlockRange::from_command(command);
        let namespace = self.namespaces.find(command.nsid())?;
        let len = u64::from(range.blocks) << namespace.lba_shift;
        if len > self.limits.max_transfer {
            return Err(Status::INVALID_FIELD);
        }
        let bytes = namespace.bytes(range.slba, range.blocks.into())?;
        self.prepare(command, Flow::FromHost, len)?;
        if let Some(effect) = self.flush_before_reading(command.nsid(), range.fua)? {
            return Ok(effect);
        }
        let namespace = self.namespaces.find(command.nsid())?;
        let mut differs = false;
        let mut offset = bytes.start;
        while offset < bytes.end {
            let part = (bytes.end - offset).min(BUFFER as u64) as usize;
            let (wanted, found) = part_of(&mut self.buffer, 2 * part).split_at_mut(part);
            self.transfer.receive(&self.dma, wanted)?;
            namespace.store.read(offset, found).map_err(read_failed)?;
            // The rest is read in any case: what can't be read is worse news than what differs.
            differs |= wanted != found;
            offset += part as u64;
        }
        self.shared.counters.reads.add(1);
        self.shared.counters.bytes_checked.add(len);
        if differs {
            return Err(Status::COMPARE_FAILURE);
        }
        Ok(Effect::Done)
    }

    /// Verify (NVM command set specification 1.0, section 3.2.5). There is no protection
    /// information, so that what can be read is sound.
    pub(super) fn verify(&mut self, command: &Sqe) -> Served {
        let range = BlockRange::from_command(command);
        let namespace = self.namespaces.find(command.nsid())?;
        let len = u64::from(range.blocks) << namespace.lba_shift;
        if len > self.limits.max_verify {
            return Err(Status::INVALID_FIELD);
        }
        let bytes = namespace.bytes(range.slba, range.blocks.into())?;
        if let Some(effect) = self.flush_before_reading(command.nsid(), range.fua)? {
            return Ok(effect);
        }
        let namespace = self.namespaces.find(command.nsid())?;
        let mut offset = bytes.start;
        while offset < bytes.end {
            let part = (bytes.end - offset).min(BUFFER as u64) as usize;
            let buffer = part_of(&mut self.buffer, part);
            namespace.store.read(offset, buffer).map_err(read_failed)?;
            offset += part as u64;
        }
        self.shared.counters.reads.add(1);
        self.shared.counters.bytes_checked.add(len);
        Ok(Effect::Done)
    }

    /// FUA of what reads: the data are to come from the media, so they must have got there. Returns the
    /// effect if they have not yet.
    pub(super) fn flush_before_reading(
        &mut self,
        nsid: u32,
        fua: bool,
    ) -> Result<Option<Effect>, Status> {
        if fua && self.admin.features.volatile_write_cache() && !self.is_flushed {
            return self.flush_or_hand_over(nsid);
        }
        Ok(None)
    }
}
