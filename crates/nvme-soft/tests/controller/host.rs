//! A host in a few lines: plain memory, queues, and waiting by looking.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nvme_soft::store::MemoryStore;
use nvme_soft::{
    AccessFault, Config, Doorbells, HostMemory, Interrupts, NamespaceConfig, SoftController,
};
use nvme_spec::registers::{
    AdminQueueAttributes, ControllerConfiguration, ControllerStatus, DoorbellKind, doorbell_offset,
    offset,
};
use nvme_spec::{Cqe, DataPointer, Sqe, Status, admin};
use zerocopy::IntoBytes;

pub(crate) const PAGE: u64 = 4096;
/// Where the host's memory begins on the bus.
const BASE: u64 = 0x4000_0000;
/// Long enough for any machine; only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(60);
const ADMIN_ENTRIES: u32 = 32;

/// The host's memory: one range of addresses, with holes where a test puts them.
pub(crate) struct Memory {
    bytes: Mutex<Vec<u8>>,
    forbidden: Mutex<Vec<(u64, u64)>>,
    accesses: AtomicU64,
}

impl Memory {
    fn index(&self, address: u64, len: usize) -> Option<usize> {
        let end = address.checked_add(len as u64)?;
        let forbidden = self.forbidden.lock().unwrap();
        if forbidden
            .iter()
            .any(|&(from, to)| address < to && from < end)
        {
            return None;
        }
        self.accesses.fetch_add(1, Ordering::Relaxed);
        usize::try_from(address.checked_sub(BASE)?).ok()
    }

    /// Refuses the controller's accesses to this range from now on.
    pub(crate) fn forbid(&self, address: u64, len: u64) {
        self.forbidden
            .lock()
            .unwrap()
            .push((address, address + len));
    }

    pub(crate) fn accesses(&self) -> u64 {
        self.accesses.load(Ordering::Relaxed)
    }

    pub(crate) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let start = (address - BASE) as usize;
        self.bytes.lock().unwrap()[start..start + len].to_vec()
    }

    pub(crate) fn set(&self, address: u64, data: &[u8]) {
        let start = (address - BASE) as usize;
        self.bytes.lock().unwrap()[start..start + data.len()].copy_from_slice(data);
    }
}

impl HostMemory for Memory {
    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), AccessFault> {
        let fault = AccessFault::read(address, out.len());
        let start = self.index(address, out.len()).ok_or(fault)?;
        let bytes = self.bytes.lock().unwrap();
        out.copy_from_slice(bytes.get(start..start + out.len()).ok_or(fault)?);
        Ok(())
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), AccessFault> {
        let fault = AccessFault::write(address, data.len());
        let start = self.index(address, data.len()).ok_or(fault)?;
        let mut bytes = self.bytes.lock().unwrap();
        bytes
            .get_mut(start..start + data.len())
            .ok_or(fault)?
            .copy_from_slice(data);
        Ok(())
    }

    fn store_release(&self, address: u64, value: u32) -> Result<(), AccessFault> {
        assert_eq!(address % 4, 0);
        self.write(address, &value.to_le_bytes())
    }

    fn load_acquire(&self, address: u64) -> Result<u32, AccessFault> {
        assert_eq!(address % 4, 0);
        let mut bytes = [0; 4];
        self.read(address, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }
}

/// Counts interrupts.
pub(crate) struct Vectors(Vec<AtomicU64>);

impl Vectors {
    pub(crate) fn raised(&self, vector: u16) -> u64 {
        self.0[usize::from(vector)].load(Ordering::SeqCst)
    }
}

impl Interrupts for Vectors {
    fn count(&self) -> u16 {
        self.0.len() as u16
    }

    fn raise(&self, vector: u16) {
        self.0[usize::from(vector)].fetch_add(1, Ordering::SeqCst);
    }
}

/// The host's side of a queue pair.
struct QueuePair {
    submission: u64,
    completion: u64,
    entries: u32,
    completion_entries: u32,
    tail: u32,
    head: u32,
    phase: bool,
    next_cid: u16,
    reaped: VecDeque<Cqe>,
}

pub(crate) struct Host {
    pub(crate) controller: SoftController,
    pub(crate) memory: Arc<Memory>,
    pub(crate) vectors: Arc<Vectors>,
    doorbells: Arc<Doorbells>,
    stride: u8,
    pairs: Vec<Option<QueuePair>>,
    next_address: u64,
    /// Allocations are aligned to this.
    pub(crate) alignment: u64,
}

/// A configuration with one namespace of 1 MiB in memory.
pub(crate) fn config(lba_size: u32) -> Config {
    let mut config = Config::default();
    let store = MemoryStore::new(1 << 20).unwrap();
    config
        .namespaces
        .push(NamespaceConfig::new(store, lba_size));
    config
}

impl Host {
    /// A host whose controller is not enabled.
    pub(crate) fn new(config: Config) -> Self {
        let stride = config.doorbell_stride;
        let memory = Arc::new(Memory {
            bytes: Mutex::new(vec![0; 16 << 20]),
            forbidden: Mutex::default(),
            accesses: AtomicU64::new(0),
        });
        let vectors = Arc::new(Vectors((0..8).map(|_| AtomicU64::new(0)).collect()));
        let controller = SoftController::start(config, memory.clone(), vectors.clone()).unwrap();
        Self {
            doorbells: controller.doorbells(),
            controller,
            memory,
            vectors,
            stride,
            pairs: Vec::new(),
            next_address: BASE,
            alignment: PAGE,
        }
    }

    /// A host whose controller is enabled, without I/O queues.
    pub(crate) fn enabled(config: Config) -> Self {
        let mut host = Self::new(config);
        host.enable();
        host
    }

    /// A host with one I/O queue pair of 64 entries on vector 1.
    pub(crate) fn ready(config: Config) -> Self {
        let mut host = Self::enabled(config);
        host.create_pair(1, 64, Some(1));
        host
    }

    /// Memory of whole pages, zeroed.
    pub(crate) fn allocate(&mut self, len: u64) -> u64 {
        let address = self.next_address;
        self.next_address += len.next_multiple_of(self.alignment);
        self.memory.set(address, &vec![0; len as usize]);
        address
    }

    /// Allocations from here on reuse the memory that was allocated since.
    pub(crate) fn mark(&self) -> u64 {
        self.next_address
    }

    pub(crate) fn free_to(&mut self, mark: u64) {
        self.next_address = mark;
    }

    pub(crate) fn status(&self) -> ControllerStatus {
        ControllerStatus::from_bits(self.controller.read32(offset::CSTS))
    }

    pub(crate) fn write_configuration(&self, configuration: ControllerConfiguration) {
        self.controller
            .write32(offset::CC, configuration.into_bits());
    }

    /// Sets up the admin queues and enables with the usual configuration.
    pub(crate) fn enable(&mut self) {
        self.enable_with(usual_configuration());
        let status = wait_for(|| Some(self.status()).filter(|status| status.rdy() || status.cfs()));
        assert!(status.rdy() && !status.cfs(), "{status:?}");
    }

    pub(crate) fn enable_with(&mut self, configuration: ControllerConfiguration) {
        let attributes = AdminQueueAttributes::new()
            .with_asqs(ADMIN_ENTRIES as u16 - 1)
            .with_acqs(ADMIN_ENTRIES as u16 - 1);
        let pair = self.new_pair(ADMIN_ENTRIES, ADMIN_ENTRIES);
        self.controller.write32(offset::AQA, attributes.into_bits());
        self.controller.write64(offset::ASQ, pair.submission);
        self.controller.write64(offset::ACQ, pair.completion);
        self.pairs = vec![Some(pair)];
        self.write_configuration(configuration);
    }

    pub(crate) fn disable(&self) {
        self.write_configuration(usual_configuration().with_en(false));
        wait_for(|| (!self.status().rdy()).then_some(()));
    }

    fn new_pair(&mut self, entries: u32, completion_entries: u32) -> QueuePair {
        QueuePair {
            submission: self.allocate(u64::from(entries) * 64),
            completion: self.allocate(u64::from(completion_entries) * 16),
            entries,
            completion_entries,
            tail: 0,
            head: 0,
            phase: true,
            next_cid: 0,
            reaped: VecDeque::new(),
        }
    }

    pub(crate) fn create_pair(&mut self, id: u16, entries: u32, vector: Option<u16>) {
        self.create_unequal_pair(id, entries, entries, vector);
    }

    pub(crate) fn create_unequal_pair(
        &mut self,
        id: u16,
        entries: u32,
        completion_entries: u32,
        vector: Option<u16>,
    ) {
        let pair = self.new_pair(entries, completion_entries);
        let (submission, completion) = (pair.submission, pair.completion);
        let slots = usize::from(id) + 1;
        if self.pairs.len() < slots {
            self.pairs.resize_with(slots, || None);
        }
        self.pairs[usize::from(id)] = Some(pair);
        self.admin_ok(admin::create_completion_queue(
            id,
            completion_entries,
            completion,
            vector,
        ));
        self.admin_ok(admin::create_submission_queue(
            id,
            entries,
            submission,
            id,
            admin::QueuePriority::Medium,
        ));
    }

    fn pair(&mut self, id: u16) -> &mut QueuePair {
        self.pairs[usize::from(id)].as_mut().unwrap()
    }

    /// Places a command in the queue without ringing; returns its identifier.
    pub(crate) fn place(&mut self, id: u16, command: Sqe) -> u16 {
        let pair = self.pair(id);
        let cid = pair.next_cid;
        pair.next_cid = pair.next_cid.wrapping_add(1);
        self.place_as(id, command.with_cid(cid));
        cid
    }

    /// Places a command with the identifier that it has.
    pub(crate) fn place_as(&mut self, id: u16, command: Sqe) {
        let pair = self.pair(id);
        let address = pair.submission + u64::from(pair.tail) * 64;
        pair.tail = (pair.tail + 1) % pair.entries;
        self.memory.set(address, command.as_bytes());
    }

    /// Where the next command goes.
    pub(crate) fn tail(&mut self, id: u16) -> u32 {
        self.pair(id).tail
    }

    /// Where the next completion is looked for.
    pub(crate) fn head(&mut self, id: u16) -> u32 {
        self.pair(id).head
    }

    /// Rings for everything that was placed.
    pub(crate) fn ring(&mut self, id: u16) {
        let tail = self.pair(id).tail;
        self.ring_raw(id, DoorbellKind::SubmissionTail, tail);
    }

    pub(crate) fn ring_raw(&self, id: u16, kind: DoorbellKind, value: u32) {
        self.doorbells
            .ring(doorbell_offset(id, kind, self.stride), value);
    }

    pub(crate) fn submit(&mut self, id: u16, command: Sqe) -> u16 {
        let cid = self.place(id, command);
        self.ring(id);
        cid
    }

    /// The next completion, if it has been posted, without telling the controller.
    pub(crate) fn look(&mut self, id: u16) -> Option<Cqe> {
        self.look_from(id, id)
    }

    /// As [`Host::look`], for a completion of another submission queue than the queue's own.
    pub(crate) fn look_from(&mut self, id: u16, submission: u16) -> Option<Cqe> {
        let entry = self.look_unchecked(id)?;
        assert_eq!(entry.sq_id(), submission);
        assert!(u32::from(entry.sq_head()) < self.pair(id).entries);
        Some(entry)
    }

    /// As [`Host::look`], for an entry of which nothing is believed but its phase.
    pub(crate) fn look_unchecked(&mut self, id: u16) -> Option<Cqe> {
        let pair = self.pairs[usize::from(id)].as_mut().unwrap();
        let bytes = self
            .memory
            .get(pair.completion + u64::from(pair.head) * 16, 16);
        let mut dwords = [0; 4];
        for (dword, bytes) in dwords.iter_mut().zip(bytes.chunks_exact(4)) {
            *dword = u32::from_le_bytes(bytes.try_into().unwrap());
        }
        let entry = Cqe::from_dwords(dwords);
        if entry.phase() != pair.phase {
            return None;
        }
        pair.head += 1;
        if pair.head == pair.completion_entries {
            pair.head = 0;
            pair.phase = !pair.phase;
        }
        Some(entry)
    }

    /// Passes over an entry without looking at it.
    pub(crate) fn skip(&mut self, id: u16) {
        self.pair(id).head += 1;
    }

    /// Tells the controller which completions were taken.
    pub(crate) fn ring_head(&mut self, id: u16) {
        let head = self.pair(id).head;
        self.ring_raw(id, DoorbellKind::CompletionHead, head);
    }

    /// The next completion in order.
    pub(crate) fn reap(&mut self, id: u16) -> Cqe {
        let entry = wait_for(|| self.look(id));
        self.ring_head(id);
        entry
    }

    /// Whether no completion is there, neither new nor kept.
    pub(crate) fn has_none(&mut self, id: u16) -> bool {
        self.pair(id).reaped.is_empty() && self.look(id).is_none()
    }

    /// The completion of one command; others are kept.
    pub(crate) fn wait(&mut self, id: u16, cid: u16) -> Cqe {
        loop {
            let reaped = &mut self.pair(id).reaped;
            if let Some(index) = reaped.iter().position(|entry| entry.cid() == cid) {
                return reaped.remove(index).unwrap();
            }
            let entry = self.reap(id);
            self.pair(id).reaped.push_back(entry);
        }
    }

    pub(crate) fn admin(&mut self, command: Sqe) -> Cqe {
        let cid = self.submit(0, command);
        self.wait(0, cid)
    }

    /// As [`Host::admin`] for a command that must succeed; returns dword 0.
    pub(crate) fn admin_ok(&mut self, command: Sqe) -> u32 {
        let entry = self.admin(command);
        assert!(
            entry.status().is_success(),
            "{command:?}: {}",
            entry.status()
        );
        entry.result()
    }

    pub(crate) fn admin_refused(&mut self, command: Sqe, status: Status) {
        let entry = self.admin(command);
        assert!(entry.status().is(status), "{command:?}: {}", entry.status());
    }

    /// The data of an admin command that returns some.
    pub(crate) fn admin_data(&mut self, command: Sqe, len: u64) -> Vec<u8> {
        let mark = self.mark();
        let address = self.allocate(len);
        self.memory.set(address, &vec![0xa5; len as usize]);
        self.admin_ok(command.with_data(prp(address)));
        let data = self.memory.get(address, len as usize);
        self.free_to(mark);
        data
    }

    pub(crate) fn io(&mut self, command: Sqe) -> Cqe {
        let cid = self.submit(1, command);
        self.wait(1, cid)
    }

    pub(crate) fn io_ok(&mut self, command: Sqe) {
        let entry = self.io(command);
        assert!(
            entry.status().is_success(),
            "{command:?}: {}",
            entry.status()
        );
    }

    pub(crate) fn io_refused(&mut self, command: Sqe, status: Status) {
        let entry = self.io(command);
        assert!(entry.status().is(status), "{command:?}: {}", entry.status());
    }

    /// Describes `len` bytes of contiguous memory by PRPs, with a list where one is needed.
    pub(crate) fn prps(&mut self, address: u64, len: u64) -> DataPointer {
        let first = PAGE - address % PAGE;
        let rest: Vec<u64> = (0..len.saturating_sub(first).div_ceil(PAGE))
            .map(|page| address + first + page * PAGE)
            .collect();
        match rest.as_slice() {
            [] => prp(address),
            [second] => DataPointer::Prp {
                prp1: address,
                prp2: *second,
            },
            pages => {
                let pages = pages.to_vec();
                let list = self.prp_list(&pages);
                DataPointer::Prp {
                    prp1: address,
                    prp2: list,
                }
            }
        }
    }

    /// Writes a PRP list, chained where it exceeds a page; returns its address.
    pub(crate) fn prp_list(&mut self, pages: &[u64]) -> u64 {
        const PER_PAGE: usize = (PAGE / 8) as usize;
        let list = self.allocate(PAGE);
        let mut entries = pages.to_vec();
        if pages.len() > PER_PAGE {
            entries.truncate(PER_PAGE - 1);
            let next = self.prp_list(&pages[PER_PAGE - 1..]);
            entries.push(next);
        }
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.to_le_bytes())
            .collect();
        self.memory.set(list, &bytes);
        list
    }
}

pub(crate) fn usual_configuration() -> ControllerConfiguration {
    ControllerConfiguration::new()
        .with_en(true)
        .with_iosqes(6)
        .with_iocqes(4)
}

/// A single page, or the part of one from here to its end.
pub(crate) fn prp(address: u64) -> DataPointer {
    DataPointer::Prp {
        prp1: address,
        prp2: 0,
    }
}

/// Looks until there is something.
pub(crate) fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain");
        std::thread::yield_now();
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 56) as u8
        })
        .collect()
}
