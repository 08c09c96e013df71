//! The controller's namespaces.

use std::io;
use std::ops::Range;

use nvme_spec::Status;

use crate::config::NamespaceConfig;
use crate::counters::Cells;
use crate::store::Store;

/// One namespace.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) store: Box<dyn Store>,
    pub(crate) lba_shift: u8,
    pub(crate) blocks: u64,
    pub(crate) optimal_io_boundary: u16,
    pub(crate) deallocate_granularity: u32,
    pub(crate) copy_range_blocks: u16,
    pub(crate) copy_blocks: u32,
    pub(crate) copy_ranges: u16,
    /// Bytes that were written since the last sync and need not be durable.
    unsynced: u64,
}

/// With more than this unsynced, a sync of the whole store takes much longer than one of a range.
const MAX_UNSYNCED: u64 = 1 << 20;

impl Namespace {
    fn new(config: NamespaceConfig) -> Self {
        let lba_shift = config.lba_size.trailing_zeros() as u8;
        Self {
            blocks: config.store.size() >> lba_shift,
            store: config.store,
            lba_shift,
            optimal_io_boundary: config.optimal_io_boundary,
            deallocate_granularity: config.deallocate_granularity,
            copy_range_blocks: config.copy_range_blocks,
            copy_blocks: config.copy_blocks,
            copy_ranges: config.copy_ranges,
            unsynced: 0,
        }
    }

    /// The bytes of the store that hold these blocks.
    pub(crate) fn bytes(&self, slba: u64, blocks: u64) -> Result<Range<u64>, Status> {
        match slba.checked_add(blocks) {
            Some(end) if end <= self.blocks => Ok(slba << self.lba_shift..end << self.lba_shift),
            _ => Err(Status::LBA_OUT_OF_RANGE),
        }
    }

    pub(crate) fn note_unsynced(&mut self, len: u64) {
        self.unsynced = self.unsynced.saturating_add(len);
    }

    /// Whether a sync of everything costs about as much as one of a single write.
    pub(crate) fn syncs_fast(&self) -> bool {
        self.unsynced <= MAX_UNSYNCED
    }

    pub(crate) fn flush(&mut self, counters: &Cells) -> io::Result<()> {
        counters.syncs.add(1);
        self.store.flush()?;
        self.unsynced = 0;
        Ok(())
    }
}

/// The namespaces 1 to N.
#[derive(Debug)]
pub(crate) struct Namespaces(Vec<Namespace>);

impl Namespaces {
    pub(crate) fn new(configs: Vec<NamespaceConfig>) -> Self {
        Self(configs.into_iter().map(Namespace::new).collect())
    }

    /// The largest identifier, which is the number of namespaces: all are active.
    pub(crate) fn count(&self) -> u32 {
        self.0.len() as u32
    }

    pub(crate) fn find(&mut self, nsid: u32) -> Result<&mut Namespace, Status> {
        nsid.checked_sub(1)
            .and_then(|index| self.0.get_mut(index as usize))
            .ok_or(Status::INVALID_NAMESPACE_OR_FORMAT)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Namespace> {
        self.0.iter()
    }

    pub(crate) fn flush_all(&mut self, counters: &Cells) -> io::Result<()> {
        // All are flushed even if one fails.
        self.0
            .iter_mut()
            .map(|namespace| namespace.flush(counters))
            .fold(Ok(()), Result::and)
    }
}
