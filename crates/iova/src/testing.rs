//! A mapper without a device, for tests: settable limits, failures at any call, and a record of
//! what is mapped that notices what an address space must never do.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Direction, DmaMapper, Geometry, HostMemory, MapError};

/// An IOMMU that keeps books and never touches memory, so that any address may be mapped in it.
///
/// ```
/// use std::sync::Arc;
///
/// use iova::testing::{Failure, TestMapper};
/// use iova::{AddressSpace, Direction, Error, HostMemory};
///
/// let mapper = Arc::new(TestMapper::default());
/// let space = AddressSpace::new(mapper.clone())?;
/// let page = Arc::new([0_u8; 4096]);
/// let memory = HostMemory::new(std::ptr::NonNull::from(&*page).cast(), page.len());
///
/// mapper.fail_map(Failure::MemoryLimit);
/// // SAFETY: the test mapper never touches the memory.
/// let refused = unsafe { space.try_register(memory, Direction::Bidirectional, page) };
/// assert!(matches!(refused, Err(Error::MemoryLimit { .. })));
/// assert!(mapper.live().is_empty());
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct TestMapper {
    geometry: Geometry,
    books: Mutex<Books>,
}

/// What a [`TestMapper`] has mapped at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LiveMapping {
    /// The I/O address of the first byte.
    pub iova: u64,
    /// The host address of the first byte.
    pub addr: usize,
    /// Length in bytes.
    pub len: usize,
    /// Whether the device may read it.
    pub readable: bool,
    /// Whether the device may write it.
    pub writable: bool,
    /// Where it begins in its file, if it was given one.
    pub file_offset: Option<u64>,
}

/// How a call is to fail. Nothing changes in what is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// [`MapError::OutOfEntries`]
    OutOfEntries,
    /// [`MapError::MemoryLimit`]
    MemoryLimit,
    /// [`MapError::AlreadyMapped`]
    AlreadyMapped,
    /// [`MapError::Invalid`]
    Invalid,
    /// [`MapError::ShortUnmap`] with nothing unmapped
    ShortUnmap,
    /// [`MapError::Io`]
    Io,
}

impl Failure {
    fn error(self, len: u64) -> MapError {
        match self {
            Self::OutOfEntries => MapError::OutOfEntries,
            Self::MemoryLimit => MapError::MemoryLimit,
            Self::AlreadyMapped => MapError::AlreadyMapped,
            Self::Invalid => MapError::Invalid {
                reason: "as the test wished".into(),
            },
            Self::ShortUnmap => MapError::ShortUnmap {
                expected: len,
                unmapped: 0,
            },
            Self::Io => MapError::Io(io::ErrorKind::Other.into()),
        }
    }
}

impl TestMapper {
    /// A mapper with this geometry, and no limits but those in it.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            books: Mutex::default(),
        }
    }

    /// Limits the number of mappings without having announced it, as when others use the same
    /// IOMMU.
    pub fn limit_mappings(&self, max: Option<usize>) {
        self.books().max_mappings = max;
    }

    /// Limits the number of bytes mapped, like RLIMIT_MEMLOCK.
    pub fn limit_bytes(&self, max: Option<usize>) {
        self.books().max_bytes = max;
    }

    /// Accepts memory with a file only, as a transport to another process would.
    pub fn require_files(&self, required: bool) {
        self.books().files_only = required;
    }

    /// Makes the next map call fail. When several failures are asked for, they come in that order.
    pub fn fail_map(&self, failure: Failure) {
        self.books().map.plan.push_back(Some(failure));
    }

    /// Makes the next unmap call fail. When several failures are asked for, they come in that
    /// order.
    pub fn fail_unmap(&self, failure: Failure) {
        self.books().unmap.plan.push_back(Some(failure));
    }

    /// Lets the next `calls` map calls pass, before what [`fail_map`](Self::fail_map) adds from
    /// here on.
    pub fn pass_maps(&self, calls: usize) {
        self.books()
            .map
            .plan
            .extend(std::iter::repeat_n(None, calls));
    }

    /// Lets the next `calls` unmap calls pass, before what [`fail_unmap`](Self::fail_unmap) adds
    /// from here on.
    pub fn pass_unmaps(&self, calls: usize) {
        self.books()
            .unmap
            .plan
            .extend(std::iter::repeat_n(None, calls));
    }

    /// Forgets the failures that have not come yet.
    pub fn clear_failures(&self) {
        let mut books = self.books();
        books.map.plan.clear();
        books.unmap.plan.clear();
    }

    /// What is mapped, by I/O address.
    #[must_use]
    pub fn live(&self) -> Vec<LiveMapping> {
        self.books().live.values().copied().collect()
    }

    /// The host address that a device's access of `len` bytes at `iova` would reach; `None` when it
    /// would fault: not wholly within one mapping, or against its direction.
    #[must_use]
    pub fn translate(&self, iova: u64, len: usize, direction: Direction) -> Option<usize> {
        let books = self.books();
        let (_, live) = books.live.range(..=iova).next_back()?;
        let offset = usize::try_from(iova - live.iova).ok()?;
        let (reads, writes) = accesses(direction);
        let inside = offset.checked_add(len).is_some_and(|end| end <= live.len);
        let allowed = (live.readable || !reads) && (live.writable || !writes);
        (inside && allowed).then(|| live.addr + offset)
    }

    /// How many map calls there were, failed ones included.
    #[must_use]
    pub fn map_calls(&self) -> u64 {
        self.books().map.calls
    }

    /// How many unmap calls there were, failed ones included.
    #[must_use]
    pub fn unmap_calls(&self) -> u64 {
        self.books().unmap.calls
    }

    /// What was asked of the mapper that an address space must never ask: misaligned, outside of
    /// the usable ranges, over a live mapping, or unmapping what isn't mapped so.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.books().violations.clone()
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is wrong with a range of I/O addresses by itself.
    fn fault(&self, iova: u64, len: u64) -> Option<&'static str> {
        let page_size = self.geometry.page_sizes & self.geometry.page_sizes.wrapping_neg();
        let Some(last) = len.checked_sub(1).and_then(|rest| iova.checked_add(rest)) else {
            return Some("empty, or over the end of the addresses");
        };
        if (iova | len) & page_size.wrapping_sub(1) != 0 {
            return Some("misaligned");
        }
        let usable = &self.geometry.usable;
        let holds = |range: &crate::IovaRange| range.first <= iova && last <= range.last;
        if iova == 0 || !(usable.is_empty() || usable.iter().any(holds)) {
            return Some("outside of the usable ranges");
        }
        None
    }
}

impl Default for TestMapper {
    /// Pages of 4 KiB, 2 MiB and 1 GiB; nothing said about ranges and limits.
    fn default() -> Self {
        Self::new(Geometry {
            usable: Vec::new(),
            page_sizes: 0x4020_1000,
            max_mappings: None,
            unmaps_runs: true,
        })
    }
}

// SAFETY: there is no device, so none can reach anything.
unsafe impl DmaMapper for TestMapper {
    fn geometry(&self) -> Geometry {
        self.geometry.clone()
    }

    unsafe fn map(
        &self,
        iova: u64,
        memory: &HostMemory<'_>,
        direction: Direction,
    ) -> Result<(), MapError> {
        let (addr, len) = (memory.addr().addr().get(), memory.len());
        let file_offset = memory.file().map(|(_, offset)| offset);
        let (readable, writable) = accesses(direction);
        let live = LiveMapping {
            iova,
            addr,
            len,
            readable,
            writable,
            file_offset,
        };

        let mut books = self.books();
        if let Some(failure) = books.map.next() {
            return Err(failure.error(len as u64));
        }
        let page_size = self.geometry.page_sizes & self.geometry.page_sizes.wrapping_neg();
        let host = addr as u64 | file_offset.unwrap_or(0);
        let misaligned = (host & page_size.wrapping_sub(1) != 0).then_some("misaligned memory");
        if let Some(fault) = self.fault(iova, len as u64).or(misaligned) {
            return Err(books.violation(format!("map {live:x?}: {fault}")));
        }
        if let Some(other) = books.overlapping(&live) {
            books.violation(format!("map {live:x?}: overlaps {other:x?}"));
            return Err(MapError::AlreadyMapped);
        }
        if books.files_only && file_offset.is_none() {
            return Err(MapError::NeedsFile);
        }
        if books
            .max_mappings
            .is_some_and(|max| books.live.len() >= max)
        {
            return Err(MapError::OutOfEntries);
        }
        if books.max_bytes.is_some_and(|max| books.bytes + len > max) {
            return Err(MapError::MemoryLimit);
        }
        books.bytes += len;
        books.live.insert(iova, live);
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError> {
        let mut books = self.books();
        if let Some(failure) = books.unmap.next() {
            return Err(failure.error(len));
        }
        let Some(run) = books.run(iova, len, self.geometry.unmaps_runs) else {
            return Err(books.violation(format!("unmap {len:#x} at {iova:#x}: not mapped so")));
        };
        for iova in run {
            books.live.remove(&iova);
        }
        books.bytes -= len as usize;
        Ok(())
    }
}

/// Whether the device reads, and whether it writes.
fn accesses(direction: Direction) -> (bool, bool) {
    (
        direction != Direction::FromDevice,
        direction != Direction::ToDevice,
    )
}

#[derive(Debug, Default)]
struct Books {
    live: BTreeMap<u64, LiveMapping>,
    /// The size of all together.
    bytes: usize,
    map: Calls,
    unmap: Calls,
    max_mappings: Option<usize>,
    max_bytes: Option<usize>,
    files_only: bool,
    violations: Vec<String>,
}

impl Books {
    fn overlapping(&self, new: &LiveMapping) -> Option<LiveMapping> {
        let (_, below) = self.live.range(..new.iova + new.len as u64).next_back()?;
        (below.iova + below.len as u64 > new.iova).then_some(*below)
    }

    /// The mappings that are side by side from `iova` on and `len` bytes long together.
    fn run(&self, iova: u64, len: u64, several: bool) -> Option<Vec<u64>> {
        let mut run = Vec::new();
        let mut rest = len;
        while rest > 0 {
            let live = self.live.get(&(iova + (len - rest)))?;
            run.push(live.iova);
            rest = rest.checked_sub(live.len as u64)?;
        }
        (several || run.len() == 1).then_some(run)
    }

    fn violation(&mut self, what: String) -> MapError {
        self.violations.push(what.clone());
        MapError::Invalid { reason: what }
    }
}

/// The calls of one kind: how many there were, and how the next ones are to end.
#[derive(Debug, Default)]
struct Calls {
    calls: u64,
    plan: VecDeque<Option<Failure>>,
}

impl Calls {
    fn next(&mut self) -> Option<Failure> {
        self.calls += 1;
        self.plan.pop_front().flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use super::*;

    fn map(mapper: &TestMapper, iova: u64, addr: usize, len: usize) -> Result<(), MapError> {
        let addr = NonNull::without_provenance(addr.try_into().expect("not null"));
        // SAFETY: the test mapper touches no memory, and this test checks what it refuses.
        unsafe { mapper.map(iova, &HostMemory::new(addr, len), Direction::ToDevice) }
    }

    #[test]
    fn notices_what_must_never_be_asked() {
        let mapper = TestMapper::default();
        map(&mapper, 0x10_0000, 0x1000, 0x2000).expect("fine");
        assert!(mapper.violations().is_empty());

        map(&mapper, 0x10_1000, 0x8000, 0x1000).expect_err("over the second page");
        map(&mapper, 0xf_f000, 0x8000, 0x2000).expect_err("over the first page");
        map(&mapper, 0x20_0800, 0x8000, 0x1000).expect_err("misaligned address");
        map(&mapper, 0x20_0000, 0x8800, 0x1000).expect_err("misaligned memory");
        map(&mapper, 0x20_0000, 0x8000, 0x0800).expect_err("misaligned length");
        map(&mapper, 0x20_0000, 0x8000, 0).expect_err("empty");
        map(&mapper, 0, 0x8000, 0x1000).expect_err("IOVA 0");
        map(&mapper, u64::MAX - 0xfff, 0x8000, 0x2000).expect_err("over the end");
        mapper.unmap(0x10_0000, 0x1000).expect_err("half of it");
        mapper.unmap(0x10_1000, 0x1000).expect_err("the other half");
        assert_eq!(mapper.violations().len(), 10);
        assert_eq!(mapper.live().len(), 1);

        mapper.unmap(0x10_0000, 0x2000).expect("fine");
        mapper.unmap(0x10_0000, 0x2000).expect_err("twice");
        assert_eq!(mapper.violations().len(), 11);
    }

    #[test]
    fn addresses_outside_of_the_usable_ranges_are_noticed() {
        let usable = vec![
            crate::IovaRange {
                first: 0x1000,
                last: 0x3fff,
            },
            crate::IovaRange {
                first: 0x5000,
                last: 0x7fff,
            },
        ];
        let mapper = TestMapper::new(Geometry {
            usable,
            page_sizes: 0x1000,
            max_mappings: None,
            unmaps_runs: false,
        });
        map(&mapper, 0x3000, 0x8000, 0x3000).expect_err("over the hole");
        map(&mapper, 0x5000, 0x8000, 0x3000).expect("fine");
        assert_eq!(mapper.violations().len(), 1);
    }

    #[test]
    fn translates_like_an_iommu() {
        let mapper = TestMapper::default();
        map(&mapper, 0x10_0000, 0x8000, 0x2000).expect("fine");
        let read = |iova, len| mapper.translate(iova, len, Direction::ToDevice);
        assert_eq!(read(0x10_0004, 0x1ffc), Some(0x8004));
        assert_eq!(read(0x10_0004, 0x1ffd), None);
        assert_eq!(read(0xf_ffff, 2), None);
        assert_eq!(mapper.translate(0x10_0000, 1, Direction::FromDevice), None);
    }

    #[test]
    fn failures_come_in_order() {
        let mapper = TestMapper::default();
        mapper.pass_maps(1);
        mapper.fail_map(Failure::Io);
        mapper.fail_map(Failure::OutOfEntries);
        map(&mapper, 0x10_0000, 0x8000, 0x1000).expect("passes");
        assert!(matches!(
            map(&mapper, 0x20_0000, 0x8000, 0x1000),
            Err(MapError::Io(_))
        ));
        assert!(matches!(
            map(&mapper, 0x20_0000, 0x8000, 0x1000),
            Err(MapError::OutOfEntries)
        ));
        map(&mapper, 0x20_0000, 0x8000, 0x1000).expect("passes");
        assert_eq!((mapper.map_calls(), mapper.live().len()), (4, 2));
    }
}
