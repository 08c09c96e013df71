//! The controller's namespaces.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use nvme_spec::Status;

use crate::change::ChangeError;
use crate::config::{NamespaceConfig, check_size};
use crate::counters::Cells;
use crate::fault::Loss;
use crate::store::{CachedStore, ConcurrentStore};

/// One namespace.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) store: CachedStore,
    pub(crate) lba_shift: u8,
    pub(crate) blocks: u64,
    pub(crate) optimal_io_boundary: u16,
    pub(crate) deallocate_granularity: u32,
    is_attached: bool,
    pub(crate) copy_range_blocks: u16,
    pub(crate) copy_blocks: u32,
    pub(crate) copy_ranges: u16,
}

impl Namespace {
    fn new(config: NamespaceConfig) -> Self {
        let lba_shift = config.lba_size.trailing_zeros() as u8;
        Self {
            blocks: config.store.size() >> lba_shift,
            store: CachedStore::new(config.store, config.lba_size),
            lba_shift,
            optimal_io_boundary: config.optimal_io_boundary,
            deallocate_granularity: config.deallocate_granularity,
            is_attached: true,
            copy_range_blocks: config.copy_range_blocks,
            copy_blocks: config.copy_blocks,
            copy_ranges: config.copy_ranges,
        }
    }

    /// Changes the size to as many blocks as `bytes` hold; returns whether there was a change.
    pub(crate) fn resize(&mut self, nsid: u32, bytes: u64) -> Result<bool, ChangeError> {
        check_size(nsid, bytes, 1 << self.lba_shift)?;
        self.store
            .resize(bytes)
            .map_err(|source| ChangeError::Store { nsid, source })?;
        let blocks = self.store.size() >> self.lba_shift;
        let old = std::mem::replace(&mut self.blocks, blocks);
        Ok(old != blocks)
    }

    /// Changes the block size, which was checked; returns whether there was a change.
    pub(crate) fn format(&mut self, nsid: u32, lba_size: u32) -> Result<bool, ChangeError> {
        check_size(nsid, self.store.size(), lba_size)?;
        self.store.format(lba_size);
        let lba_shift = lba_size.trailing_zeros() as u8;
        self.blocks = self.store.size() >> lba_shift;
        let old = std::mem::replace(&mut self.lba_shift, lba_shift);
        Ok(old != lba_shift)
    }

    /// Returns whether there was a change.
    pub(crate) fn set_attached(&mut self, attached: bool) -> bool {
        std::mem::replace(&mut self.is_attached, attached) != attached
    }

    /// The bytes of the store that hold these blocks.
    pub(crate) fn bytes(&self, slba: u64, blocks: u64) -> Result<Range<u64>, Status> {
        match slba.checked_add(blocks) {
            Some(end) if end <= self.blocks => Ok(slba << self.lba_shift..end << self.lba_shift),
            _ => Err(Status::LBA_OUT_OF_RANGE),
        }
    }

    pub(crate) fn flush(&mut self, counters: &Cells) -> io::Result<()> {
        counters.syncs.add(1);
        self.store.flush()
    }
}

/// The namespaces 1 to N, of which some may not be attached.
#[derive(Debug)]
pub(crate) struct Namespaces {
    all: Vec<Namespace>,
    max: u32,
    tracks_unflushed: bool,
}

impl Namespaces {
    /// `max` is the largest identifier that there may be, at least the number of namespaces.
    pub(crate) fn new(configs: Vec<NamespaceConfig>, max: u32) -> Self {
        Self {
            all: configs.into_iter().map(Namespace::new).collect(),
            max,
            tracks_unflushed: false,
        }
    }

    /// The largest identifier that a namespace may have (NN).
    pub(crate) fn max(&self) -> u32 {
        self.max
    }

    /// An active namespace. An identifier that none can have is refused otherwise than one that
    /// none has at present (base specification 2.0, section 3.2.1).
    pub(crate) fn find(&mut self, nsid: u32) -> Result<&mut Namespace, Status> {
        self.valid(nsid)?.ok_or(Status::INVALID_FIELD)
    }

    /// As `find`, with nothing for a namespace that is not active.
    pub(crate) fn valid(&mut self, nsid: u32) -> Result<Option<&mut Namespace>, Status> {
        if nsid == 0 || nsid > self.max {
            return Err(Status::INVALID_NAMESPACE_OR_FORMAT);
        }
        let namespace = self.all.get_mut(nsid as usize - 1);
        Ok(namespace.filter(|namespace| namespace.is_attached))
    }

    /// For what other threads may do with an active namespace.
    pub(crate) fn concurrent(&self, nsid: u32) -> Option<Arc<dyn ConcurrentStore>> {
        let namespace = self.all.get((nsid as usize).checked_sub(1)?)?;
        namespace
            .store
            .concurrent()
            .filter(|_| namespace.is_attached)
            .cloned()
    }

    /// For what other threads may do with all namespaces, if that is so for each of them.
    pub(crate) fn all_concurrent(&self) -> Option<Vec<Arc<dyn ConcurrentStore>>> {
        let stores = self.all.iter();
        stores
            .map(|namespace| namespace.store.concurrent().cloned())
            .collect()
    }

    /// A namespace, attached or not.
    pub(crate) fn existing(&mut self, nsid: u32) -> Result<&mut Namespace, ChangeError> {
        nsid.checked_sub(1)
            .and_then(|index| self.all.get_mut(index as usize))
            .ok_or(ChangeError::NoNamespace { nsid })
    }

    pub(crate) fn add(&mut self, config: NamespaceConfig) -> Result<u32, ChangeError> {
        let nsid = self.all.len() as u32 + 1;
        if nsid > self.max {
            return Err(ChangeError::Full {
                max_namespaces: self.max,
            });
        }
        config.check(nsid)?;
        let mut namespace = Namespace::new(config);
        if self.tracks_unflushed {
            namespace.store.track_unflushed();
        }
        self.all.push(namespace);
        Ok(nsid)
    }

    /// All that exist.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Namespace> {
        self.all.iter()
    }

    /// The identifiers of those that are attached, in order.
    pub(crate) fn active(&self) -> impl Iterator<Item = u32> {
        (1..)
            .zip(&self.all)
            .filter_map(|(nsid, namespace)| namespace.is_attached.then_some(nsid))
    }

    /// From now on it is known what is not durable.
    pub(crate) fn track_unflushed(&mut self) {
        self.tracks_unflushed = true;
        for namespace in &mut self.all {
            namespace.store.track_unflushed();
        }
    }

    /// Takes back what is not durable, as far as that is known.
    pub(crate) fn lose_unflushed(&mut self, loss: Loss) {
        for namespace in &mut self.all {
            if let Err(error) = namespace.store.lose_unflushed(loss) {
                tracing::error!(%error, "store failed to lose what is not durable");
            }
        }
    }

    pub(crate) fn flush_all(&mut self, counters: &Cells) -> io::Result<()> {
        // All are flushed even if one fails.
        self.all
            .iter_mut()
            .map(|namespace| namespace.flush(counters))
            .fold(Ok(()), Result::and)
    }
}
