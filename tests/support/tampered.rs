//! A device that does to the driver's commands and mappings what a bug in the driver would do.
//!
//! The bugs are planted between the driver, which is as it should be, and a software controller,
//! which reports what it meets.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use iova::{Direction, DmaMapper, Geometry, HostMemory, MapError};
use nvme_async::device::soft::SoftDevice;
use nvme_async::device::{Device, DeviceError, Doorbell, DoorbellCall};
use nvme_spec::registers::offset;
use nvme_spec::{DataPointer, Sqe, opcode::AdminOpcode};

const PAGE: u64 = 4096;

/// Changes a command on its way to the controller.
pub(crate) type Tamper = Box<dyn FnMut(Sqe, &Mapper) -> Sqe + Send>;

#[derive(Debug)]
pub(crate) struct Tampered {
    inner: Arc<SoftDevice>,
    mapper: Arc<Mapper>,
    doorbells: Arc<Doorbells>,
    vectors: Vec<Arc<OwnedFd>>,
    panics: Mutex<Panics>,
}

/// Whether reading a register panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Panics {
    No,
    Once,
    Always,
}

impl Tampered {
    /// In front of `inner`, whose doorbells have the smallest distance.
    pub(crate) fn new(inner: Arc<SoftDevice>) -> Arc<Self> {
        let mapper = Arc::new(Mapper {
            inner: inner.mapper(),
            mappings: Mutex::default(),
            rotates: AtomicBool::new(false),
        });
        let doorbells = Arc::new(Doorbells {
            inner: inner.clone(),
            mapper: mapper.clone(),
            state: Mutex::default(),
        });
        Arc::new(Self {
            vectors: inner.vectors().to_vec(),
            inner,
            mapper,
            doorbells,
            panics: Mutex::new(Panics::No),
        })
    }

    /// As `new`, with interrupts that go nowhere.
    pub(crate) fn deaf(inner: Arc<SoftDevice>) -> Arc<Self> {
        let silent = || {
            let (ours, theirs) = std::io::pipe().expect("a pipe");
            // Open for as long as the process, so that it has no end either.
            std::mem::forget(theirs);
            Arc::new(OwnedFd::from(ours))
        };
        let vectors = inner.vectors().iter().map(|_| silent()).collect();
        let this = Arc::into_inner(Self::new(inner)).expect("nobody has it yet");
        Arc::new(Self { vectors, ..this })
    }

    pub(crate) fn mapper(&self) -> &Mapper {
        &self.mapper
    }

    /// Changes all I/O commands from now on.
    pub(crate) fn tamper(&self, tamper: impl FnMut(Sqe, &Mapper) -> Sqe + Send + 'static) {
        self.doorbells.state.lock().expect("no panics").tamper = Some(Box::new(tamper));
    }

    /// Changes all admin commands from now on.
    pub(crate) fn tamper_admin(&self, tamper: impl FnMut(Sqe, &Mapper) -> Sqe + Send + 'static) {
        self.doorbells.state.lock().expect("no panics").tamper_admin = Some(Box::new(tamper));
    }

    /// Leaves commands as they are.
    pub(crate) fn behave(&self) {
        let mut state = self.doorbells.state.lock().expect("no panics");
        state.tamper = None;
        state.tamper_admin = None;
    }

    /// Panics when a register is read, once or from now on.
    pub(crate) fn panic_when_read(&self, for_ever: bool) {
        let panics = match for_ever {
            false => Panics::Once,
            true => Panics::Always,
        };
        *self.panics.lock().expect("no panics") = panics;
    }

    /// Swallows the next rings of I/O submission doorbells.
    pub(crate) fn lose_rings(&self, count: usize) {
        self.doorbells.state.lock().expect("no panics").lose = count;
    }
}

impl Device for Tampered {
    fn address(&self) -> &str {
        "tampered"
    }

    fn read32(&self, offset: u32) -> Result<u32, DeviceError> {
        let panics = {
            let mut panics = self.panics.lock().expect("no panics");
            let now = *panics;
            if now == Panics::Once {
                *panics = Panics::No;
            }
            now
        };
        assert_eq!(panics, Panics::No, "on purpose: a device");
        self.inner.read32(offset)
    }

    fn write32(&self, offset: u32, value: u32) -> Result<(), DeviceError> {
        self.inner.write32(offset, value)
    }

    fn write64(&self, register: u32, value: u64) -> Result<(), DeviceError> {
        if register == offset::ASQ {
            let size = self.inner.read32(offset::AQA)? & 0xfff;
            self.doorbells.note_queue(0, value, size + 1);
        }
        self.inner.write64(register, value)
    }

    fn doorbell(&self, offset: u32) -> Result<Doorbell, DeviceError> {
        Ok(Doorbell::Call {
            target: self.doorbells.clone(),
            offset,
        })
    }

    fn vectors(&self) -> &[Arc<OwnedFd>] {
        &self.vectors
    }

    fn mapper(&self) -> Arc<dyn DmaMapper> {
        self.mapper.clone()
    }

    fn set_bus_master(&self, enabled: bool) -> Result<(), DeviceError> {
        self.inner.set_bus_master(enabled)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.inner.reset()
    }

    fn close(&self) {
        self.inner.close();
    }
}

/// Sees the commands of each queue when its doorbell is rung.
struct Doorbells {
    inner: Arc<SoftDevice>,
    mapper: Arc<Mapper>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    queues: HashMap<u32, Queue>,
    tamper: Option<Tamper>,
    tamper_admin: Option<Tamper>,
    lose: usize,
}

struct Queue {
    iova: u64,
    entries: u32,
    tail: u32,
}

impl Doorbells {
    fn note_queue(&self, id: u32, iova: u64, entries: u32) {
        let queue = Queue {
            iova,
            entries,
            tail: 0,
        };
        let mut state = self.state.lock().expect("no panics");
        state.queues.insert(id, queue);
    }

    /// The slots of the commands that a new tail adds.
    fn advance(&self, id: u32, tail: u32) -> Vec<u64> {
        let mut state = self.state.lock().expect("no panics");
        let queue = state.queues.get_mut(&id).expect("it was created");
        let mut slots = Vec::new();
        while queue.tail != tail {
            slots.push(queue.iova + u64::from(queue.tail) * 64);
            queue.tail = (queue.tail + 1) % queue.entries;
        }
        slots
    }

    fn tamper(&self, id: u32, slot: u64) {
        let mut state = self.state.lock().expect("no panics");
        let tamper = match id {
            0 => &mut state.tamper_admin,
            _ => &mut state.tamper,
        };
        if let Some(tamper) = tamper {
            let command = tamper(self.mapper.command(slot), &self.mapper);
            self.mapper.store_command(slot, &command);
        }
    }

    fn loses(&self) -> bool {
        let mut state = self.state.lock().expect("no panics");
        let loses = state.lose > 0;
        state.lose -= usize::from(loses);
        loses
    }
}

impl DoorbellCall for Doorbells {
    fn ring(&self, offset: u32, value: u32) {
        let index = (offset - offset::DOORBELLS) / 4;
        let id = index / 2;
        if index.is_multiple_of(2) {
            for slot in self.advance(id, value) {
                let command = self.mapper.command(slot);
                self.tamper(id, slot);
                if id == 0
                    && AdminOpcode(command.opcode()) == AdminOpcode::CREATE_IO_SUBMISSION_QUEUE
                    && let Ok(DataPointer::Prp { prp1, .. }) = command.data_pointer()
                {
                    let size = command.cdw10() >> 16;
                    self.note_queue(command.cdw10() & 0xffff, prp1, size + 1);
                }
            }
            if id > 0 && self.loses() {
                return;
            }
        }
        self.inner.controller().doorbells().ring(offset, value);
    }
}

impl std::fmt::Debug for Doorbells {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Doorbells").finish_non_exhaustive()
    }
}

/// The mappings that the driver believes in.
pub(crate) struct Mapper {
    inner: Arc<dyn DmaMapper>,
    mappings: Mutex<BTreeMap<u64, Mapping>>,
    rotates: AtomicBool,
}

#[derive(Clone, Copy)]
struct Mapping {
    addr: usize,
    len: u64,
    /// Page by page.
    rotated: bool,
    /// Taken away before its time.
    gone: bool,
}

impl Mapper {
    /// From now on maps each page of some memory where the next one belongs.
    pub(crate) fn rotate(&self) {
        self.rotates.store(true, Ordering::SeqCst);
    }

    /// Where `len` bytes of one mapping are, from the last one down.
    pub(crate) fn find(&self, len: u64) -> Option<Range<u64>> {
        let mappings = self.mappings.lock().expect("no panics");
        let is_it = |(_, mapping): &(&u64, &Mapping)| mapping.len == len;
        let (iova, mapping) = mappings.iter().rev().find(is_it)?;
        Some(*iova..*iova + mapping.len)
    }

    /// Unmaps what the driver does not want unmapped.
    pub(crate) fn unmap_early(&self, range: &Range<u64>) {
        let mut mappings = self.mappings.lock().expect("no panics");
        let mapping = mappings.get_mut(&range.start).expect("is mapped");
        mapping.gone = true;
        let unmapped = self.inner.unmap(range.start, range.end - range.start);
        unmapped.expect("unmaps");
    }

    pub(crate) fn load_u64(&self, iova: u64) -> u64 {
        let low = self.word(iova, |word| word.load(Ordering::SeqCst));
        let high = self.word(iova + 4, |word| word.load(Ordering::SeqCst));
        u64::from(u32::from_le(high)) << 32 | u64::from(u32::from_le(low))
    }

    pub(crate) fn store_u64(&self, iova: u64, value: u64) {
        let [low, high] = [value as u32, (value >> 32) as u32].map(u32::to_le);
        self.word(iova, |word| word.store(low, Ordering::SeqCst));
        self.word(iova + 4, |word| word.store(high, Ordering::SeqCst));
    }

    fn command(&self, slot: u64) -> Sqe {
        let load = |index| self.word(slot + index * 4, |word| word.load(Ordering::SeqCst));
        Sqe::from_dwords(std::array::from_fn(|index| {
            u32::from_le(load(index as u64))
        }))
    }

    fn store_command(&self, slot: u64, command: &Sqe) {
        for (iova, dword) in (slot..).step_by(4).zip(command.dwords()) {
            self.word(iova, |word| word.store(dword.to_le(), Ordering::SeqCst));
        }
    }

    /// A word of a queue or PRP list of the driver.
    fn word<T>(&self, iova: u64, f: impl FnOnce(&AtomicU32) -> T) -> T {
        let mappings = self.mappings.lock().expect("no panics");
        let (start, mapping) = mappings.range(..=iova).next_back().expect("is mapped");
        let offset = iova - start;
        assert!(offset + 4 <= mapping.len && iova.is_multiple_of(4));
        let addr = (mapping.addr + offset as usize) as *mut u32;
        // SAFETY: an aligned word of memory that is mapped at the moment and therefore alive; the
        // lock keeps it from being unmapped. The driver accesses it as an atomic too.
        f(unsafe { AtomicU32::from_ptr(addr) })
    }
}

// SAFETY: all mappings are those of the mapper inside. Pages of one memory may be mapped in
// another order, which stays inside of that memory, and mappings may end early. An unmap passes
// when all of it is unmapped.
unsafe impl DmaMapper for Mapper {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    unsafe fn map(
        &self,
        iova: u64,
        memory: &HostMemory<'_>,
        direction: Direction,
    ) -> Result<(), MapError> {
        let addr = memory.addr();
        let len = memory.len() as u64;
        let rotated = self.rotates.load(Ordering::SeqCst);
        if rotated {
            for page in (0..len).step_by(PAGE as usize) {
                let next = ((page + PAGE) % len) as usize;
                let next = NonNull::new((addr.as_ptr().wrapping_add(next)).cast()).expect("is one");
                let memory = HostMemory::new(next, PAGE as usize);
                // SAFETY: a page of the memory that the caller vouches for.
                unsafe { self.inner.map(iova + page, &memory, direction)? };
            }
        } else {
            // SAFETY: what the caller vouches for.
            unsafe { self.inner.map(iova, memory, direction)? };
        }
        let mapping = Mapping {
            addr: addr.as_ptr().expose_provenance(),
            len,
            rotated,
            gone: false,
        };
        self.mappings
            .lock()
            .expect("no panics")
            .insert(iova, mapping);
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), MapError> {
        let mapping = self.mappings.lock().expect("no panics").remove(&iova);
        let mapping = mapping.expect("is mapped");
        match mapping {
            Mapping { gone: true, .. } => Ok(()),
            Mapping { rotated: true, .. } => (iova..iova + len)
                .step_by(PAGE as usize)
                .try_for_each(|page| self.inner.unmap(page, PAGE)),
            _ => self.inner.unmap(iova, len),
        }
    }
}

impl std::fmt::Debug for Mapper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mapper").finish_non_exhaustive()
    }
}
