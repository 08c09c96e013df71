//! What stands in for an IOMMU.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use iova::{Direction, DmaMapper, Geometry, HostMemory, IovaRange, MapError};

/// An IOMMU without a device: a list of what is mapped.
#[derive(Default)]
pub(super) struct Mapper {
    mappings: Mutex<BTreeMap<u64, Mapping>>,
    /// How many of the next maps fail.
    pub(super) refusals: Mutex<usize>,
}

struct Mapping {
    addr: usize,
    len: usize,
    file: File,
    file_offset: u64,
}

// SAFETY: no device is behind it, so nothing is accessed.
unsafe impl DmaMapper for Mapper {
    fn geometry(&self) -> Geometry {
        let usable = vec![IovaRange {
            first: 0x10_0000,
            last: 0xff_ffff_ffff,
        }];
        Geometry {
            usable,
            page_sizes: 4096,
            max_mappings: None,
            unmaps_runs: false,
        }
    }

    unsafe fn map(
        &self,
        iova: u64,
        memory: &HostMemory<'_>,
        direction: Direction,
    ) -> Result<(), MapError> {
        let mut refusals = self.refusals.lock().unwrap();
        if *refusals > 0 {
            *refusals -= 1;
            return Err(MapError::OutOfEntries);
        }
        assert_eq!(direction, Direction::Bidirectional);
        let (fd, file_offset) = memory.file().ok_or(MapError::NeedsFile)?;
        let mapping = Mapping {
            addr: memory.addr().addr().get(),
            len: memory.len(),
            file: fd.try_clone_to_owned()?.into(),
            file_offset,
        };
        assert!(
            self.mappings
                .lock()
                .unwrap()
                .insert(iova, mapping)
                .is_none()
        );
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError> {
        let mapping = self
            .mappings
            .lock()
            .unwrap()
            .remove(&iova)
            .expect("it was mapped");
        assert_eq!(mapping.len as u64, len);
        Ok(())
    }
}

impl Mapper {
    pub(super) fn count(&self) -> usize {
        self.mappings.lock().unwrap().len()
    }

    /// What the device reads at `iova`, by way of the file.
    pub(super) fn read(&self, iova: u64, len: usize) -> Vec<u8> {
        let mappings = self.mappings.lock().unwrap();
        let (start, mapping) = mappings.range(..=iova).next_back().expect("it is mapped");
        let offset = iova - start;
        assert!(
            offset + len as u64 <= mapping.len as u64,
            "{iova:#x} is not mapped"
        );
        let mut bytes = vec![0; len];
        mapping
            .file
            .read_exact_at(&mut bytes, mapping.file_offset + offset)
            .unwrap();
        bytes
    }

    /// The host address that is mapped at `iova`.
    pub(super) fn host_address(&self, iova: u64) -> usize {
        let mappings = self.mappings.lock().unwrap();
        let (start, mapping) = mappings.range(..=iova).next_back().expect("it is mapped");
        mapping.addr + (iova - start) as usize
    }
}
