//! An IOMMU that pins what is at a host address when it maps it, as the kernel does: when the memory
//! is freed and the address is another memory's, the device goes on with the old one.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::*;
use crate::{DmaMapper, MapError};

/// A test mapper that remembers what was where.
pub(super) struct Pinning {
    pub(super) mapper: Arc<TestMapper>,
    /// What is at a page of host addresses; 0 where nothing is said.
    contents: Mutex<BTreeMap<usize, u64>>,
    /// What a device finds at a page of I/O addresses.
    pinned: Mutex<BTreeMap<u64, u64>>,
}

/// The pages of some memory.
pub(super) fn pages(addr: usize, len: usize) -> impl Iterator<Item = usize> {
    (addr / PAGE..(addr + len).div_ceil(PAGE)).map(|page| page * PAGE)
}

impl Pinning {
    pub(super) fn new(mapper: TestMapper) -> Self {
        Self {
            mapper: Arc::new(mapper),
            contents: Mutex::default(),
            pinned: Mutex::default(),
        }
    }

    /// The page gets other memory than it had.
    pub(super) fn renew(&self, page: usize) {
        *self
            .contents
            .lock()
            .expect("contents")
            .entry(page)
            .or_default() += 1;
    }

    pub(super) fn contents(&self, page: usize) -> u64 {
        let contents = self.contents.lock().expect("contents");
        contents.get(&page).copied().unwrap_or_default()
    }

    pub(super) fn pinned(&self, iova: u64) -> u64 {
        self.pinned.lock().expect("pinned")[&iova]
    }
}

// SAFETY: there is no device, so none can reach anything.
unsafe impl DmaMapper for Pinning {
    fn geometry(&self) -> Geometry {
        self.mapper.geometry()
    }

    unsafe fn map(
        &self,
        iova: u64,
        memory: &HostMemory<'_>,
        direction: Direction,
    ) -> Result<(), MapError> {
        // SAFETY: the contract is the same.
        unsafe { self.mapper.map(iova, memory, direction) }?;
        let mut pinned = self.pinned.lock().expect("pinned");
        for (index, page) in pages(memory.addr().addr().get(), memory.len()).enumerate() {
            pinned.insert(iova + (index * PAGE) as u64, self.contents(page));
        }
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError> {
        self.mapper.unmap(iova, len)
    }
}
