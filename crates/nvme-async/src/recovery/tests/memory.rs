//! Memory as the device sees it, and whose it is at the moment.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use iova::{AddressSpace, Direction, DmaMapper, Geometry, HostMemory, IovaRange, MapError};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::memory::{DEVICE_PAGE, DmaBuf, Pool};

/// Enough for one chunk of the pool.
const POOL_BYTES: usize = 2 << 20;
const PAGES: usize = POOL_BYTES / DEVICE_PAGE;

/// The time, in microseconds since the simulation began.
#[derive(Debug)]
pub(super) struct Clock {
    begin: Instant,
    micros: AtomicU64,
    /// Whether what happens is told.
    tells: bool,
}

impl Clock {
    pub(super) fn new(tells: bool) -> Self {
        Self {
            tells,
            // The states of queue pairs are made by the real clock, which must be long past.
            begin: Instant::now() + Duration::from_secs(3600),
            micros: AtomicU64::new(0),
        }
    }

    pub(super) fn micros(&self) -> u64 {
        self.micros.load(Ordering::Relaxed)
    }

    /// Tells what happens, where one history is played again.
    pub(super) fn tell(&self, what: impl FnOnce() -> String) {
        if self.tells {
            println!("{:>9} µs  {}", self.micros(), what());
        }
    }

    pub(super) fn set(&self, micros: u64) {
        self.micros.store(micros, Ordering::Relaxed);
    }

    pub(super) fn now(&self) -> Instant {
        self.begin + Duration::from_micros(self.micros())
    }

    /// `at` in microseconds, rounded up.
    pub(super) fn since_begin(&self, at: Instant) -> u64 {
        let nanos = at.saturating_duration_since(self.begin).as_nanos();
        nanos.div_ceil(1000) as u64
    }
}

/// The device's own mapping of the pool's memory.
struct Window {
    iova: u64,
    len: usize,
    words: NonNull<AtomicU32>,
}

#[expect(unsafe_code, reason = "a second mapping of shared memory")]
// SAFETY: the mapping belongs to the process, and is seen as atomic words only.
unsafe impl Send for Window {}
#[expect(unsafe_code, reason = "a second mapping of shared memory")]
// SAFETY: as for Send.
unsafe impl Sync for Window {}

impl Drop for Window {
    #[expect(unsafe_code, reason = "a second mapping of shared memory")]
    fn drop(&mut self) {
        // SAFETY: `Mapper::map` made exactly this mapping, and nothing refers to it any more.
        let _ = unsafe { munmap(self.words.as_ptr().cast(), self.len) };
    }
}

/// What stands in for an IOMMU.
#[derive(Default)]
pub(super) struct Mapper(Mutex<Option<Arc<Window>>>);

#[expect(unsafe_code, reason = "what stands in for an IOMMU")]
// SAFETY: no hardware is behind it; the model maps the file itself and keeps that mapping.
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

    unsafe fn map(&self, iova: u64, memory: &HostMemory<'_>, _: Direction) -> Result<(), MapError> {
        let (fd, offset) = memory.file().ok_or(MapError::NeedsFile)?;
        let len = memory.len();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let mapped = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                protection,
                MapFlags::SHARED,
                fd,
                offset,
            )
        };
        let words = NonNull::new(mapped.expect("the pool's file can be mapped").cast());
        let words = words.expect("not at address 0");
        let window = Window { iova, len, words };
        let before = self.0.lock().unwrap().replace(Arc::new(window));
        assert!(before.is_none(), "the pool has one chunk");
        Ok(())
    }

    fn unmap(&self, _: u64, _: u64) -> Result<(), MapError> {
        *self.0.lock().unwrap() = None;
        Ok(())
    }
}

/// A pool that is made once, and the device's view of it.
#[derive(Clone)]
pub(super) struct Memory {
    pub(super) pool: Pool,
    pub(super) mapper: Arc<Mapper>,
    window: Arc<Window>,
}

impl Memory {
    pub(super) fn new() -> Self {
        let mapper = Arc::new(Mapper::default());
        let pool = Pool::new(AddressSpace::new(mapper.clone()).unwrap(), POOL_BYTES);
        // Maps the chunk.
        drop(pool.alloc(DEVICE_PAGE).unwrap());
        let window = mapper.0.lock().unwrap().clone().unwrap();
        Self {
            pool,
            mapper,
            window,
        }
    }

    /// The word at `iova`, if the device reaches it.
    #[expect(unsafe_code, reason = "a second mapping of shared memory")]
    pub(super) fn word(&self, iova: u64) -> Option<&AtomicU32> {
        let offset = usize::try_from(iova.checked_sub(self.window.iova)?).ok()?;
        if !offset.is_multiple_of(4) || offset + 4 > self.window.len {
            return None;
        }
        // SAFETY: inside of the mapping, as was just checked.
        let word = unsafe { self.window.words.byte_add(offset) };
        // SAFETY: an aligned, initialized word of a mapping that `window` keeps. The process also
        // has this memory at another address, and nobody relies on what is in it while the device
        // may change it.
        Some(unsafe { word.as_ref() })
    }

    fn page(&self, iova: u64) -> Option<usize> {
        let page = usize::try_from(iova.checked_sub(self.window.iova)?).ok()? / DEVICE_PAGE;
        (page < PAGES).then_some(page)
    }
}

/// Whose a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Nobody,
    /// A command that was started, until its memory is given back.
    Operation(u32),
    Rings,
    /// Data of the admin commands of a recovery.
    Recovery,
}

/// Whose all pages are.
pub(super) struct Ledger {
    memory: Memory,
    pages: Mutex<Box<[Owner; PAGES]>>,
}

impl Ledger {
    pub(super) fn new(memory: Memory) -> Self {
        Self {
            memory,
            pages: Mutex::new(Box::new([Owner::Nobody; PAGES])),
        }
    }

    pub(super) fn set(&self, iova: u64, owner: Owner) {
        let page = self.memory.page(iova).expect("a page of the pool");
        self.pages.lock().unwrap()[page] = owner;
    }

    pub(super) fn owner(&self, iova: u64) -> Owner {
        let page = self.memory.page(iova);
        page.map_or(Owner::Nobody, |page| self.pages.lock().unwrap()[page])
    }

    /// The operations that have memory.
    pub(super) fn operations(&self) -> Vec<u32> {
        let pages = self.pages.lock().unwrap();
        let of = |owner: &Owner| match owner {
            Owner::Operation(number) => Some(*number),
            _ => None,
        };
        pages.iter().filter_map(of).collect()
    }
}

/// The memory of one operation, which tells the ledger when it is given back.
pub(super) struct Loan {
    buffer: DmaBuf,
    ledger: Arc<Ledger>,
}

impl Loan {
    pub(super) fn new(memory: &Memory, ledger: &Arc<Ledger>, operation: u32) -> Self {
        let buffer = memory.pool.alloc(DEVICE_PAGE).expect("few operations");
        let loan = Self {
            buffer,
            ledger: ledger.clone(),
        };
        ledger.set(loan.iova(), Owner::Operation(operation));
        loan
    }

    pub(super) fn iova(&self) -> u64 {
        self.buffer.iova().expect("memory of the pool")
    }

    pub(super) fn store(&mut self, index: usize, word: u32) {
        self.buffer[index * 4..][..4].copy_from_slice(&word.to_le_bytes());
    }
}

impl AsRef<[u8]> for Loan {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.ledger.set(self.iova(), Owner::Nobody);
    }
}
