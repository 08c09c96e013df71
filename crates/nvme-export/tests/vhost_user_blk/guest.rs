//! A front end and a driver for its guest's virtqueues, which do what they are told, and need not mean well.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{
    Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// No test waits nearly as long for anything.
const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of the guest's memory, from its address 0 on.
pub(crate) const RAM: u64 = 32 << 20;
/// Where data is, above all queues.
pub(crate) const DATA: u64 = 8 << 20;
/// Where the front end says that it has that memory.
pub(crate) const USER: u64 = 0x7f00_0000_0000;
/// Guest memory of a queue: table, available ring, used ring, headers and status bytes.
const QUEUE: u64 = 0x4_0000;
const AVAILABLE: u64 = 0x1_0000;
const USED: u64 = 0x1_4000;
const SLOTS: u64 = 0x2_0000;
const SLOT: u64 = 64;
/// Before the device has written one.
pub(crate) const NO_STATUS: u8 = 0xaa;

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) const F_RO: u32 = 5;
pub(crate) const F_FLUSH: u32 = 9;
pub(crate) const F_CONFIG_WCE: u32 = 11;
pub(crate) const F_DISCARD: u32 = 13;
pub(crate) const F_INDIRECT: u32 = 28;
pub(crate) const F_EVENT_IDX: u32 = 29;
pub(crate) const F_VERSION_1: u32 = 32;

/// A memfd.
pub(crate) fn memfd(size: u64, is_sealed: bool) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("guest", flags).expect("a memfd"));
    file.set_len(size).expect("sized");
    if is_sealed {
        fcntl_add_seals(&file, SealFlags::SHRINK).expect("sealed");
    }
    file
}

/// A region of guest memory, as a front end describes it.
pub(crate) fn region(
    start: u64,
    size: u64,
    user: u64,
    offset: u64,
    file: &File,
) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: start,
        memory_size: size,
        userspace_addr: user,
        mmap_offset: offset,
        mmap_handle: file.as_raw_fd(),
    }
}

/// A guest's memory, which is there before and after a front end.
#[derive(Clone)]
pub(crate) struct Ram {
    pub(crate) memory: GuestMemoryMmap,
}

impl Ram {
    pub(crate) fn new() -> Self {
        let offset = FileOffset::new(memfd(RAM, true), 0);
        let range = (GuestAddress(0), RAM as usize, Some(offset));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).expect("mapped");
        Self { memory }
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .expect("inside");
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .expect("inside");
        data
    }

    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        let whole = self.memory.find_region(GuestAddress(0)).expect("there");
        let file = whole.file_offset().expect("of a file").file();
        region(0, RAM, USER, 0, file)
    }
}

/// What a front end asks for.
#[derive(Clone, Debug)]
pub(crate) struct Wishes {
    pub(crate) queues: usize,
    pub(crate) size: u16,
    /// Features that are not wanted though they are offered.
    pub(crate) without: Vec<u32>,
    /// Memory by ADD_MEM_REG instead of SET_MEM_TABLE.
    pub(crate) has_slots: bool,
}

impl Default for Wishes {
    fn default() -> Self {
        Self {
            queues: 1,
            size: 128,
            without: Vec::new(),
            has_slots: false,
        }
    }
}

/// What survives a connection, as QEMU keeps it.
pub(crate) struct Kept {
    pub(crate) described: VhostUserInflight,
    pub(crate) file: File,
}

impl Kept {
    /// How many requests are in flight, of all queues if there is one.
    pub(crate) fn count(&self) -> usize {
        let size = usize::from(self.described.queue_size);
        let mut states = vec![0; size * 16];
        self.file.read_exact_at(&mut states, 16).expect("there");
        states.iter().step_by(16).filter(|byte| **byte == 1).count()
    }
}

pub(crate) struct FrontEnd {
    pub(crate) messages: Frontend,
    pub(crate) features: u64,
    pub(crate) ram: Ram,
    wishes: Wishes,
}

impl FrontEnd {
    /// Connects, and shares the guest's memory.
    pub(crate) fn connect(path: &Path, ram: &Ram, wishes: &Wishes) -> Self {
        let mut front_end = Self::negotiate(path, ram, wishes);
        if wishes.has_slots {
            let slots = front_end.messages.get_max_mem_slots().expect("answered");
            assert!(slots >= 8, "{slots}");
            front_end
                .messages
                .add_mem_region(&ram.region())
                .expect("taken");
        } else {
            front_end
                .messages
                .set_mem_table(&[ram.region()])
                .expect("taken");
        }
        front_end
    }

    pub(crate) fn negotiate(path: &Path, ram: &Ram, wishes: &Wishes) -> Self {
        let mut messages = Frontend::connect(path, 256).expect("connects");
        messages.set_owner().expect("said");
        let offered = messages.get_features().expect("answered");
        let without = wishes.without.iter().fold(0, |all, bit| all | 1_u64 << bit);
        let features = offered & !without;
        assert_ne!(
            features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            0
        );
        messages.set_features(features).expect("said");
        let protocol = messages.get_protocol_features().expect("answered");
        assert!(protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
        messages.set_protocol_features(protocol).expect("said");
        // So that what is refused is known.
        messages.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        messages.set_features(features).expect("agreed");
        let queues = messages.get_queue_num().expect("answered");
        assert!(queues >= wishes.queues as u64);
        Self {
            messages,
            features,
            ram: ram.clone(),
            wishes: wishes.clone(),
        }
    }

    pub(crate) fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let flags = VhostUserConfigFlags::empty();
        let zeroes = vec![0; len as usize];
        let answer = self.messages.get_config(offset, len, flags, &zeroes);
        answer.expect("answered").1
    }

    /// New memory for what is in flight.
    pub(crate) fn new_inflight(&mut self) -> Kept {
        let queues = self.wishes.queues as u16;
        let wanted = VhostUserInflight::new(0, 0, queues, self.wishes.size);
        let (described, file) = self.messages.get_inflight_fd(&wanted).expect("made");
        Kept { described, file }
    }

    pub(crate) fn set_inflight(&mut self, kept: &Kept) {
        self.messages
            .set_inflight_fd(&kept.described, kept.file.as_raw_fd())
            .expect("taken");
    }

    /// Starts all queues, of new drivers.
    pub(crate) fn start(&mut self) -> Vec<Driver> {
        let drivers: Vec<_> = (0..self.wishes.queues)
            .map(|index| Driver::new(&self.ram, index, self.wishes.size, self.features))
            .collect();
        for driver in &drivers {
            self.start_queue(driver, 0);
        }
        drivers
    }

    pub(crate) fn start_queue(&mut self, driver: &Driver, base: u16) {
        self.place_queue(driver, base);
        let index = driver.index;
        self.messages
            .set_vring_kick(index, &driver.kick)
            .expect("taken");
        self.messages
            .set_vring_enable(index, true)
            .expect("started");
    }

    pub(crate) fn place_queue(&mut self, driver: &Driver, base: u16) {
        let index = driver.index;
        let messages = &mut self.messages;
        messages.set_vring_num(index, driver.size).expect("taken");
        messages.set_vring_base(index, base).expect("taken");
        messages
            .set_vring_addr(index, &driver.places())
            .expect("taken");
        messages.set_vring_call(index, &driver.call).expect("taken");
        messages
            .set_vring_err(index, &driver.broken)
            .expect("taken");
    }
}

/// A descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// The guest's driver of one queue.
pub(crate) struct Driver {
    ram: Ram,
    pub(crate) index: usize,
    pub(crate) size: u16,
    base: u64,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) broken: EventFd,
    has_event_index: bool,
    pub(crate) available: u16,
    used: u16,
    free: Vec<u16>,
    /// The descriptors of each chain, by its head.
    chains: HashMap<u16, Vec<u16>>,
    pub(crate) kicks: u64,
    /// Puts requests in tables in memory.
    pub(crate) is_indirect: bool,
}

impl Driver {
    pub(crate) fn new(ram: &Ram, index: usize, size: u16, features: u64) -> Self {
        let base = index as u64 * QUEUE;
        assert!(base + QUEUE <= DATA && size <= 1024);
        ram.write(base, &vec![0; SLOTS as usize]);
        let eventfd = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        Self {
            ram: ram.clone(),
            index,
            size,
            base,
            kick: eventfd(),
            call: eventfd(),
            broken: eventfd(),
            has_event_index: features >> F_EVENT_IDX & 1 != 0,
            available: 0,
            used: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            kicks: 0,
            is_indirect: false,
        }
    }

    pub(crate) fn places(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: 1024,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: USER + self.base,
            used_ring_addr: USER + self.base + USED,
            avail_ring_addr: USER + self.base + AVAILABLE,
            log_addr: None,
        }
    }

    /// Writes a descriptor into the table.
    pub(crate) fn describe(&self, index: u16, descriptor: Descriptor) {
        self.describe_at(self.base + u64::from(index) * 16, descriptor);
    }

    pub(crate) fn describe_at(&self, at: u64, descriptor: Descriptor) {
        let mut bytes = descriptor.address.to_le_bytes().to_vec();
        bytes.extend(descriptor.len.to_le_bytes());
        bytes.extend(descriptor.flags.to_le_bytes());
        bytes.extend(descriptor.next.to_le_bytes());
        self.ram.write(at, &bytes);
    }

    /// Writes a table in memory that is a request as it should be, to flush.
    pub(crate) fn write_table(&self, at: u64) {
        let slot = self.slot(0);
        self.ram.write(slot, &header(FLUSH, 0));
        let parts = [(slot, 16, NEXT, 1), (slot + 32, 1, WRITE, 0)];
        for (index, (address, len, flags, next)) in parts.into_iter().enumerate() {
            let descriptor = Descriptor {
                address,
                len,
                flags,
                next,
            };
            self.describe_at(at + index as u64 * 16, descriptor);
        }
    }

    /// Where the header of the request at `head` is; its status byte is 32 bytes further on.
    pub(crate) fn slot(&self, head: u16) -> u64 {
        self.base + SLOTS + u64::from(head) * SLOT
    }

    pub(crate) fn status(&self, head: u16) -> u8 {
        self.ram.read(self.slot(head) + 32, 1)[0]
    }

    /// Makes a chain of memory to read and to write, and makes it available. Does not kick.
    pub(crate) fn add(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let parts = (readable.iter().map(|part| (part, 0)))
            .chain(writable.iter().map(|part| (part, WRITE)));
        let parts: Vec<_> = parts.collect();
        let direct = match self.is_indirect {
            true => 1,
            false => parts.len(),
        };
        let chain = self.free.split_off(self.free.len() - direct);
        let head = chain[0];
        for (place, &(&(address, len), flags)) in parts.iter().enumerate() {
            let is_last = place + 1 == parts.len();
            let next = match (is_last, self.is_indirect) {
                (true, _) => 0,
                (false, true) => place as u16 + 1,
                (false, false) => chain[place + 1],
            };
            let descriptor = Descriptor {
                address,
                len,
                flags: flags | if is_last { 0 } else { NEXT },
                next,
            };
            match self.is_indirect {
                true => self.describe_at(self.table(head) + place as u64 * 16, descriptor),
                false => self.describe(chain[place], descriptor),
            }
        }
        if self.is_indirect {
            let table = Descriptor {
                address: self.table(head),
                len: parts.len() as u32 * 16,
                flags: INDIRECT,
                next: 0,
            };
            self.describe(head, table);
        }
        self.chains.insert(head, chain);
        self.publish(head);
        head
    }

    /// Where an indirect table is that belongs to a head: above all data that tests use.
    fn table(&self, head: u16) -> u64 {
        RAM - (4 << 20) + (self.index as u64 * 128 + u64::from(head % 128)) * 4096
    }

    /// Makes whatever is at `head` available.
    pub(crate) fn publish(&mut self, head: u16) {
        let ring = self.base + AVAILABLE;
        let place = ring + 4 + u64::from(self.available % self.size) * 2;
        self.ram.write(place, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.set_available_index(self.available);
    }

    pub(crate) fn set_available_index(&self, index: u16) {
        let at = GuestAddress(self.base + AVAILABLE + 2);
        self.ram
            .memory
            .store(index.to_le(), at, Ordering::Release)
            .expect("inside");
    }

    /// Tells the device, if it wants to be told of what became available since index `old`.
    pub(crate) fn kick(&mut self, old: u16) {
        fence(Ordering::SeqCst);
        let wanted = if self.has_event_index {
            let event = self.load(USED + 4 + u64::from(self.size) * 8);
            let new = self.available;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.load(USED) & 1 == 0
        };
        if wanted {
            self.kicks += 1;
            self.kick.write(1).expect("kicked");
        }
    }

    pub(crate) fn load(&self, offset: u64) -> u16 {
        let at = GuestAddress(self.base + offset);
        let value: u16 = self.ram.memory.load(at, Ordering::Acquire).expect("inside");
        u16::from_le(value)
    }

    /// The index of the used ring.
    pub(crate) fn used_index(&self) -> u16 {
        self.load(USED + 2)
    }

    /// Makes a request available, and kicks.
    pub(crate) fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> u16 {
        let old = self.available;
        let head = self.prepare(kind, sector, data);
        self.kick(old);
        head
    }

    /// Makes a request available without a kick.
    pub(crate) fn prepare(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> u16 {
        let head = *self.free.last().expect("a free descriptor");
        // The chain's head is the first of those that are split off.
        let direct = match self.is_indirect {
            true => 1,
            false => data.len() + 2,
        };
        let head = match self.free.len().checked_sub(direct) {
            Some(first) => self.free[first],
            None => head,
        };
        let slot = self.slot(head);
        self.ram.write(slot, &header(kind, sector));
        self.ram.write(slot + 32, &[NO_STATUS]);
        let (mut readable, mut writable) = (vec![(slot, 16)], Vec::new());
        match kind {
            IN | GET_ID => writable.extend(data),
            _ => readable.extend(data),
        }
        writable.push((slot + 32, 1));
        assert_eq!(self.add(&readable, &writable), head);
        head
    }

    /// What is in the used ring and was not seen.
    pub(crate) fn next_used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.used {
            return None;
        }
        let entry = USED + 4 + u64::from(self.used % self.size) * 8;
        let entry = self.ram.read(self.base + entry, 8);
        let (head, len) = entry.split_at(4);
        let head = u32::from_le_bytes(head.try_into().expect("four bytes"));
        let len = u32::from_le_bytes(len.try_into().expect("four bytes"));
        self.used = self.used.wrapping_add(1);
        let head = u16::try_from(head).expect("a head");
        if let Some(chain) = self.chains.remove(&head) {
            self.free.extend(chain.into_iter().rev());
        }
        Some((head, len))
    }

    /// Waits for an interrupt if there is nothing to see; returns what there is.
    pub(crate) fn wait(&mut self) -> (u16, u32) {
        let until = Instant::now() + LIMIT;
        loop {
            if let Some(used) = self.next_used() {
                return used;
            }
            if self.has_event_index {
                let event = GuestAddress(self.base + AVAILABLE + 4 + u64::from(self.size) * 2);
                self.ram
                    .memory
                    .store(self.used.to_le(), event, Ordering::Relaxed)
                    .expect("inside");
                fence(Ordering::SeqCst);
                if self.used_index() != self.used {
                    continue;
                }
            }
            assert!(is_signalled(&self.call, until), "an interrupt is missing");
        }
    }

    /// Waits for the request at `head`, which is the only one; returns its status and how much was written.
    pub(crate) fn finish(&mut self, head: u16) -> (u8, u32) {
        let (used, len) = self.wait();
        assert_eq!(used, head);
        (self.status(head), len)
    }

    /// A request from beginning to end.
    pub(crate) fn run(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> u8 {
        let head = self.request(kind, sector, data);
        self.finish(head).0
    }

    /// Says whether an interrupt is wanted for what is given back next.
    pub(crate) fn want_interrupts(&self, wants: bool) {
        let (offset, value) = if self.has_event_index {
            // The last one there will be, for a while, or the next.
            let event = self.used.wrapping_sub(u16::from(!wants));
            (4 + u64::from(self.size) * 2, event)
        } else {
            (0, u16::from(!wants))
        };
        let at = GuestAddress(self.base + AVAILABLE + offset);
        self.ram
            .memory
            .store(value.to_le(), at, Ordering::Release)
            .expect("inside");
        fence(Ordering::SeqCst);
    }

    /// Waits for an interrupt, whatever there is to see.
    pub(crate) fn wait_interrupt(&self) {
        let until = Instant::now() + LIMIT;
        assert!(is_signalled(&self.call, until), "an interrupt is missing");
    }

    /// Waits until the device says that the queue is broken.
    pub(crate) fn wait_broken(&self) {
        assert!(
            is_signalled(&self.broken, Instant::now() + LIMIT),
            "it works"
        );
    }
}

pub(crate) fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header
}

/// The data of a Discard or Write Zeroes.
pub(crate) fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(sectors.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

/// Empties an eventfd, waiting until it can be.
fn is_signalled(eventfd: &EventFd, until: Instant) -> bool {
    loop {
        if eventfd.read().is_ok() {
            return true;
        }
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}
