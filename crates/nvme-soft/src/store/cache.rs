//! A store with a model of what a loss of power would do to it.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::{ConcurrentStore, Store};
use crate::fault::{Loss, TornBlocks};

/// What is written and not durable is written back when it exceeds this. A cache may do so at any
/// time.
const MAX_UNFLUSHED: usize = 64 << 20;

/// The store of a namespace. Usually it does nothing of its own.
#[derive(Debug)]
pub(crate) struct CachedStore {
    store: Box<dyn Store>,
    concurrent: Option<Arc<dyn ConcurrentStore>>,
    /// There is none unless faults are wanted.
    faulty: Option<Box<Faulty>>,
    lba_size: usize,
}

#[derive(Debug, Default)]
struct Faulty {
    /// The durable contents of the blocks that have others by now, by their numbers.
    durable: Option<BTreeMap<u64, Box<[u8]>>>,
    tear: Option<Tear>,
}

/// Chooses which of the blocks that follow are written.
#[derive(Debug)]
enum Tear {
    First(u32),
    Random(fastrand::Rng),
}

impl Tear {
    fn is_written(&mut self) -> bool {
        match self {
            Self::First(left) => {
                let is_written = *left > 0;
                *left = left.saturating_sub(1);
                is_written
            }
            Self::Random(random) => random.bool(),
        }
    }
}

impl CachedStore {
    pub(crate) fn new(store: Box<dyn Store>, lba_size: u32) -> Self {
        Self {
            concurrent: store.concurrent(),
            store,
            faulty: None,
            lba_size: lba_size as usize,
        }
    }

    /// From now on it is known what is not durable.
    pub(crate) fn track_unflushed(&mut self) {
        self.faulty
            .get_or_insert_default()
            .durable
            .get_or_insert_default();
    }

    /// Writes and zeroes only some blocks, until this is called with `None`.
    pub(crate) fn tear(&mut self, blocks: Option<TornBlocks>) {
        self.faulty.get_or_insert_default().tear = blocks.map(|blocks| match blocks {
            TornBlocks::First(count) => Tear::First(count),
            TornBlocks::Random(seed) => Tear::Random(fastrand::Rng::with_seed(seed)),
        });
    }

    /// Takes back writes that are not durable. What is there then is durable.
    pub(crate) fn lose_unflushed(&mut self, loss: Loss) -> io::Result<()> {
        let Some(durable) = self
            .faulty
            .as_mut()
            .and_then(|faulty| faulty.durable.as_mut())
        else {
            return Ok(());
        };
        let mut random = match loss {
            Loss::Random(seed) => fastrand::Rng::with_seed(seed),
            Loss::Nothing | Loss::All => fastrand::Rng::with_seed(0),
        };
        for (block, contents) in std::mem::take(durable) {
            let is_lost = match loss {
                Loss::Nothing => false,
                Loss::All => true,
                Loss::Random(_) => random.bool(),
            };
            if is_lost {
                let offset = block * self.lba_size as u64;
                self.store.write(offset, &contents, false)?;
            }
        }
        Ok(())
    }

    pub(crate) fn read(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.store.read(offset, out)
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        if self.faulty.is_none() {
            return self.store.write(offset, data, durable);
        }
        self.write_faulty(offset, data, durable)
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.store.flush()?;
        if let Some(durable) = self.durable() {
            durable.clear();
        }
        Ok(())
    }

    pub(crate) fn zero(&mut self, offset: u64, len: u64, deallocate: bool) -> io::Result<()> {
        if self.faulty.is_none() {
            return self.store.zero(offset, len, deallocate);
        }
        self.zero_faulty(offset, len, deallocate)
    }

    pub(crate) fn size(&self) -> u64 {
        self.store.size()
    }

    /// Changes the size; what is cut off is lost for good.
    pub(crate) fn resize(&mut self, size: u64) -> io::Result<()> {
        self.store.resize(size)?;
        let blocks = size.div_ceil(self.lba_size as u64);
        if let Some(durable) = self.durable() {
            durable.split_off(&blocks);
        }
        Ok(())
    }

    /// Changes the size of a block. What was written before is not lost any more.
    pub(crate) fn format(&mut self, lba_size: u32) {
        if let Some(durable) = self.durable() {
            durable.clear();
        }
        self.lba_size = lba_size as usize;
    }

    pub(crate) fn allocated(&self) -> u64 {
        self.store.allocated()
    }

    pub(crate) fn as_slice(&self) -> Option<&[u8]> {
        self.store.as_slice()
    }

    /// For what other threads may do. There is nothing of that while it is to be known what is not durable.
    pub(crate) fn concurrent(&self) -> Option<&Arc<dyn ConcurrentStore>> {
        self.concurrent.as_ref().filter(|_| self.faulty.is_none())
    }

    fn durable(&mut self) -> Option<&mut BTreeMap<u64, Box<[u8]>>> {
        self.faulty.as_mut()?.durable.as_mut()
    }

    fn is_torn(&mut self) -> Option<&mut Tear> {
        self.faulty.as_mut()?.tear.as_mut()
    }

    #[cold]
    fn write_faulty(&mut self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        if self.is_torn().is_none() {
            return self.write_tracked(offset, data, durable);
        }
        for (at, block) in (offset..)
            .step_by(self.lba_size)
            .zip(data.chunks(self.lba_size))
        {
            if self.is_torn().is_none_or(Tear::is_written) {
                self.write_tracked(at, block, durable)?;
            }
        }
        Ok(())
    }

    fn write_tracked(&mut self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        if durable {
            self.store.write(offset, data, true)?;
            let blocks = self.blocks(offset, data.len() as u64);
            if let Some(durable) = self.durable() {
                for block in blocks {
                    durable.remove(&block);
                }
            }
            return Ok(());
        }
        self.remember(offset, data.len() as u64)?;
        self.store.write(offset, data, false)
    }

    #[cold]
    fn zero_faulty(&mut self, offset: u64, len: u64, deallocate: bool) -> io::Result<()> {
        if self.is_torn().is_none() {
            return self.zero_tracked(offset, len, deallocate);
        }
        let block_len = self.lba_size as u64;
        for at in (offset..offset + len).step_by(self.lba_size) {
            if self.is_torn().is_none_or(Tear::is_written) {
                self.zero_tracked(at, block_len, deallocate)?;
            }
        }
        Ok(())
    }

    fn zero_tracked(&mut self, offset: u64, len: u64, deallocate: bool) -> io::Result<()> {
        if self.durable().is_some() && len > MAX_UNFLUSHED as u64 {
            self.store.zero(offset, len, deallocate)?;
            return self.flush();
        }
        self.remember(offset, len)?;
        self.store.zero(offset, len, deallocate)
    }

    /// Keeps the contents of blocks that are about to get others.
    fn remember(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let blocks = self.blocks(offset, len);
        let lba_size = self.lba_size;
        let is_full = self
            .durable()
            .is_some_and(|durable| durable.len() * lba_size + len as usize > MAX_UNFLUSHED);
        if is_full {
            self.flush()?;
        }
        let Some(durable) = self
            .faulty
            .as_mut()
            .and_then(|faulty| faulty.durable.as_mut())
        else {
            return Ok(());
        };
        for block in blocks {
            if durable.contains_key(&block) {
                continue;
            }
            let mut contents = vec![0; lba_size].into_boxed_slice();
            self.store.read(block * lba_size as u64, &mut contents)?;
            durable.insert(block, contents);
        }
        Ok(())
    }

    fn blocks(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let lba_size = self.lba_size as u64;
        offset / lba_size..(offset + len).div_ceil(lba_size)
    }
}
