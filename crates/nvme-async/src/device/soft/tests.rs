//! The device as a driver meets it: through [`Device`] and an [`AddressSpace`] only.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;

use iova::{AddressSpace, Direction, DmaMapper, FixedMapping, HostMemory, MapError};
use nvme_soft::HostMemory as _;
use nvme_soft::fault::{Behaviour, Fault, Loss};
use nvme_soft::store::MemoryStore;
use nvme_soft::{Config, NamespaceConfig};
use nvme_spec::registers::{
    AdminQueueAttributes, Capabilities, ControllerConfiguration, ControllerStatus, DoorbellKind,
    doorbell_offset, offset,
};
use nvme_spec::{Cqe, DataPointer, Sqe, Status, admin};

use super::{SoftDevice, SoftIommu, SoftOptions};
use crate::device::{Device, Notice};

const PAGE: usize = 4096;
const USABLE: u64 = 0x0001_0000_0000_0000;

/// A shared mapping of a memfd.
struct Shared {
    file: OwnedFd,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: only accessed as atomic bytes and words.
unsafe impl Send for Shared {}
// SAFETY: as for Send.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(pages: usize) -> Arc<Self> {
        let len = pages * PAGE;
        // SAFETY: the name is a string that ends with a zero byte.
        let file = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(file >= 0);
        // SAFETY: a new descriptor.
        let file = unsafe { OwnedFd::from_raw_fd(file) };
        File::from(file.try_clone().unwrap())
            .set_len(len as u64)
            .unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        Arc::new(Self {
            file,
            base: NonNull::new(base.cast()).unwrap(),
            len,
        })
    }

    fn page(&self, index: usize) -> HostMemory<'_> {
        self.pages(index, 1)
    }

    fn pages(&self, index: usize, count: usize) -> HostMemory<'_> {
        let offset = index * PAGE;
        assert!(offset + count * PAGE <= self.len);
        // SAFETY: inside of the mapping.
        let addr = unsafe { self.base.add(offset) };
        HostMemory::new(addr, count * PAGE).with_file(self.file(), offset as u64)
    }

    fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < self.len);
        // SAFETY: inside of the mapping.
        let byte = unsafe { self.base.add(offset) };
        // SAFETY: a byte of the mapping, which lives as long as `self`.
        unsafe { AtomicU8::from_ptr(byte.as_ptr()) }
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.len);
        // SAFETY: inside of the mapping.
        let word = unsafe { self.base.add(offset) };
        // SAFETY: an aligned word of the mapping, which lives as long as `self`.
        unsafe { AtomicU32::from_ptr(word.as_ptr().cast()) }
    }

    fn fill(&self, offset: usize, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            self.byte(offset + index).store(*byte, Ordering::Relaxed);
        }
    }

    fn contents(&self, offset: usize, len: usize) -> Vec<u8> {
        (offset..offset + len)
            .map(|offset| self.byte(offset).load(Ordering::Relaxed))
            .collect()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

fn map(iommu: &SoftIommu, iova: u64, memory: HostMemory<'_>, direction: Direction) {
    try_map(iommu, iova, memory, direction).expect("maps");
}

fn try_map(
    iommu: &SoftIommu,
    iova: u64,
    memory: HostMemory<'_>,
    direction: Direction,
) -> Result<(), MapError> {
    // SAFETY: the tests keep the memory until they have unmapped it or dropped the IOMMU.
    unsafe { iommu.map(iova, &memory, direction) }
}

#[test]
fn accesses_follow_mappings_and_directions() {
    let shared = Shared::new(3);
    let iommu = SoftIommu::new(false, None);
    map(&iommu, USABLE, shared.page(0), Direction::ToDevice);
    map(
        &iommu,
        USABLE + 0x1000,
        shared.page(2),
        Direction::Bidirectional,
    );
    map(
        &iommu,
        USABLE + 0x3000,
        shared.page(1),
        Direction::FromDevice,
    );
    shared.fill(PAGE - 2, &[1, 2]);
    shared.fill(2 * PAGE, &[3, 4]);

    let mut out = [0; 4];
    iommu
        .read(USABLE + 0xffe, &mut out)
        .expect("spans two mappings");
    assert_eq!(out, [1, 2, 3, 4]);
    iommu.write(USABLE + 0x3000, &[9; 4]).expect("writable");
    iommu
        .store_release(USABLE + 0x3004, 0x0403_0201)
        .expect("writable");
    assert_eq!(shared.contents(PAGE, 8), [9, 9, 9, 9, 1, 2, 3, 4]);
    assert_eq!(iommu.stray_accesses(), 0);

    let mut strays = 0;
    let mut refused = |result: Result<(), nvme_soft::AccessFault>| {
        strays += 1;
        assert!(result.is_err());
        assert_eq!(iommu.stray_accesses(), strays);
    };
    refused(iommu.write(USABLE, &[0]));
    refused(iommu.read(USABLE + 0x3000, &mut out));
    refused(iommu.read(USABLE + 0x1fff, &mut out));
    refused(iommu.read(USABLE + 0x2000, &mut out));
    refused(iommu.read(u64::MAX - 1, &mut out));
    refused(iommu.store_release(USABLE + 0x3002, 0));
    refused(iommu.read(shared.base.addr().get() as u64, &mut out));
    assert_eq!(
        iommu.last_stray().expect("there were some").iova,
        shared.base.addr().get() as u64
    );

    iommu.unmap(USABLE + 0x1000, 0x1000).expect("mapped");
    refused(iommu.read(USABLE + 0xffe, &mut out));
    refused(iommu.read(USABLE + 0x1000, &mut out));
}

#[test]
fn bad_mappings_are_refused() {
    let shared = Shared::new(4);
    let iommu = SoftIommu::new(false, Some(2));
    let both = Direction::Bidirectional;
    let invalid = |iova, memory| {
        assert!(matches!(
            try_map(&iommu, iova, memory, both),
            Err(MapError::Invalid { .. })
        ));
    };
    invalid(0x1000, shared.page(0));
    invalid(USABLE - 0x1000, shared.pages(0, 2));
    invalid(USABLE + 0xfedf_f000, shared.pages(0, 2));
    invalid(USABLE + 1, shared.page(0));
    invalid(u64::MAX - 0xfff, shared.pages(0, 2));
    invalid(USABLE, HostMemory::new(shared.base, 100));

    map(&iommu, USABLE + 0x1000, shared.pages(0, 2), both);
    for iova in [USABLE, USABLE + 0x1000, USABLE + 0x2000] {
        let again = try_map(&iommu, iova, shared.pages(2, 2), both);
        assert!(matches!(again, Err(MapError::AlreadyMapped)));
    }
    map(&iommu, USABLE, shared.page(3), both);
    let third = try_map(&iommu, USABLE + 0x4000, shared.page(3), both);
    assert!(matches!(third, Err(MapError::OutOfEntries)));

    let short = iommu.unmap(USABLE + 0x1000, 0x1000);
    assert!(matches!(
        short,
        Err(MapError::ShortUnmap {
            expected: 0x1000,
            unmapped: 0
        })
    ));
    assert!(iommu.unmap(USABLE + 0x2000, 0x1000).is_err());
    iommu.unmap(USABLE + 0x1000, 0x2000).expect("whole");
    assert_eq!(iommu.mappings(), 1);
}

#[test]
fn a_wrong_file_offset_shows_when_only_the_file_is_seen() {
    let shared = Shared::new(2);
    shared.fill(0, &[1; PAGE]);
    shared.fill(PAGE, &[2; PAGE]);
    let iommu = SoftIommu::new(true, None);
    let first = HostMemory::new(shared.base, PAGE);
    let mut out = [0; 4];

    let without = try_map(&iommu, USABLE, first, Direction::ToDevice);
    assert!(matches!(without, Err(MapError::NeedsFile)));
    // The address is of the first page, the offset of the second one.
    let wrong = first.with_file(shared.file(), PAGE as u64);
    map(&iommu, USABLE, wrong, Direction::ToDevice);
    iommu.read(USABLE, &mut out).expect("mapped");
    assert_eq!(out, [2; 4]);
    let past = first.with_file(shared.file(), 2 * PAGE as u64);
    let past = try_map(&iommu, USABLE + 0x1000, past, Direction::ToDevice);
    assert!(matches!(past, Err(MapError::Invalid { .. })));

    map(
        &iommu,
        USABLE + 0x2000,
        shared.page(1),
        Direction::FromDevice,
    );
    iommu.write(USABLE + 0x2000, &[7; 3]).expect("mapped");
    iommu
        .store_release(USABLE + 0x2ffc, 0x0808_0808)
        .expect("mapped");
    assert_eq!(shared.contents(PAGE, 4), [7, 7, 7, 2]);
    assert_eq!(shared.contents(2 * PAGE - 5, 5), [2, 8, 8, 8, 8]);
    iommu.unmap(USABLE + 0x2000, 0x1000).expect("mapped");
    assert!(iommu.write(USABLE + 0x2000, &[0]).is_err());
}

#[test]
fn unmap_waits_for_the_access_in_progress() {
    let shared = Shared::new(1);
    let iommu = Arc::new(SoftIommu::new(false, None));
    map(&iommu, USABLE, shared.page(0), Direction::Bidirectional);
    let unmapped = Arc::new(AtomicBool::new(false));
    let (started, wait_for_start) = mpsc::channel();
    let mut unmapper = None;
    let accessed = iommu.access(USABLE, 4, false, |_, _, _| {
        let (unmapping, done, started) = (iommu.clone(), unmapped.clone(), started.clone());
        unmapper = Some(thread::spawn(move || {
            started.send(()).expect("the test waits");
            unmapping.unmap(USABLE, 0x1000).expect("mapped");
            done.store(true, Ordering::SeqCst);
        }));
        wait_for_start.recv().expect("the thread starts");
        for _ in 0..100 {
            thread::yield_now();
        }
        assert!(!unmapped.load(Ordering::SeqCst));
    });
    assert!(accessed.is_ok());
    unmapper.expect("spawned").join().expect("unmaps");
    assert!(iommu.read(USABLE, &mut [0]).is_err());
}

/// A driver of the admin queue.
struct Driver {
    device: SoftDevice,
    memory: Arc<Shared>,
    space: AddressSpace,
    _mapping: FixedMapping,
    base: u64,
    issued: u32,
}

const COMPLETIONS: usize = PAGE;
const DATA: usize = 2 * PAGE;

impl Driver {
    fn new(options: &SoftOptions) -> Self {
        let mut config = Config::default();
        let store = MemoryStore::new(1 << 20).expect("small");
        config.namespaces.push(NamespaceConfig::new(store, 512));
        let device = SoftDevice::new("mem:", config, options).expect("starts");
        let memory = Shared::new(4);
        let space = AddressSpace::new(device.mapper()).expect("a usable IOMMU");
        // SAFETY: the memory is the owner's and is only accessed as atomics.
        let mapping = unsafe {
            space.try_register(memory.pages(0, 4), Direction::Bidirectional, memory.clone())
        }
        .expect("maps");
        let base = mapping.iova();
        let driver = Self {
            device,
            memory,
            space,
            _mapping: mapping,
            base,
            issued: 0,
        };
        driver.enable();
        driver
    }

    fn enable(&self) {
        let device = &self.device;
        let attributes = AdminQueueAttributes::new().with_asqs(63).with_acqs(255);
        let configuration = ControllerConfiguration::new()
            .with_en(true)
            .with_iosqes(6)
            .with_iocqes(4);
        device
            .write32(offset::AQA, attributes.into_bits())
            .expect("registers");
        device.write64(offset::ASQ, self.base).expect("registers");
        device
            .write64(offset::ACQ, self.base + COMPLETIONS as u64)
            .expect("registers");
        device
            .write32(offset::CC, configuration.into_bits())
            .expect("registers");
        while !self.status().rdy() {
            assert!(!self.status().cfs());
            thread::yield_now();
        }
    }

    fn status(&self) -> ControllerStatus {
        ControllerStatus::from_bits(self.device.read32(offset::CSTS).expect("registers"))
    }

    /// One command; waits by the interrupt.
    fn command(&mut self, command: Sqe) -> Cqe {
        let slot = self.issued as usize;
        self.issued += 1;
        for (index, dword) in command.dwords().into_iter().enumerate() {
            self.memory
                .word(slot * 64 + index * 4)
                .store(dword, Ordering::Relaxed);
        }
        let capabilities = self.device.read64(offset::CAP).expect("registers");
        let dstrd = Capabilities::from_bits(capabilities).dstrd();
        let tail = doorbell_offset(0, DoorbellKind::SubmissionTail, dstrd);
        self.device
            .doorbell(tail)
            .expect("a doorbell")
            .ring(self.issued);
        let entry = COMPLETIONS + slot * 16;
        loop {
            let dword3 = self.memory.word(entry + 12).load(Ordering::Acquire);
            if dword3 & 1 << 16 != 0 {
                let word =
                    |index: usize| self.memory.word(entry + index * 4).load(Ordering::Relaxed);
                let entry = Cqe::from_dwords([word(0), word(1), word(2), dword3]);
                let head = doorbell_offset(0, DoorbellKind::CompletionHead, dstrd);
                self.device
                    .doorbell(head)
                    .expect("a doorbell")
                    .ring(self.issued);
                return entry;
            }
            self.wait_for_interrupt();
        }
    }

    fn wait_for_interrupt(&self) {
        let vector = &self.device.vectors()[0];
        let mut event = libc::pollfd {
            fd: vector.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry, writable during the call.
        let ready = unsafe { libc::poll(&raw mut event, 1, 60_000) };
        assert_eq!(ready, 1, "no interrupt");
        let mut count = [0; 8];
        let mut file = File::from(vector.try_clone().expect("a descriptor"));
        assert_eq!(file.read(&mut count).expect("readable"), 8);
    }
}

fn identify_into(address: u64) -> Sqe {
    admin::identify_controller().with_data(DataPointer::Prp {
        prp1: address,
        prp2: 0,
    })
}

#[test]
fn commands_run_through_the_trait() {
    for fd_only in [false, true] {
        let mut driver = Driver::new(&SoftOptions {
            fd_only,
            ..SoftOptions::default()
        });
        assert_eq!(driver.device.vectors().len(), 17);
        let entry = driver.command(identify_into(driver.base + DATA as u64));
        assert!(entry.status().is_success(), "{entry:?}");
        assert_eq!(driver.memory.contents(DATA + 4, 8), b"SOFT0001");

        let inside = driver.base + DATA as u64;
        let hit = driver.space.look_up(
            driver.memory.pages(2, 1).addr().as_ptr(),
            PAGE,
            Direction::FromDevice,
        );
        assert_eq!(hit.expect("registered").iova(), inside);
        assert_eq!(driver.device.stray_accesses(), 0);
        assert!(driver.device.thread_id() > 0);
    }
}

#[test]
fn a_stray_access_fails_the_command_and_is_counted() {
    let mut driver = Driver::new(&SoftOptions::default());
    let unmapped = driver.base + 4 * PAGE as u64;
    let host_address = driver.memory.base.addr().get() as u64;
    for (count, address) in [(1, unmapped), (2, host_address)] {
        let entry = driver.command(identify_into(address));
        assert!(entry.status().is(Status::DATA_TRANSFER_ERROR), "{entry:?}");
        assert_eq!(driver.device.stray_accesses(), count);
        assert_eq!(driver.device.counters().refused_accesses, count);
    }
}

#[test]
fn reset_and_bus_mastering_reach_the_controller() {
    let driver = Driver::new(&SoftOptions::default());
    driver.device.set_bus_master(false).expect("works");
    driver.device.reset().expect("works");
    assert!(!driver.status().rdy());
    driver.device.set_bus_master(true).expect("works");
    driver.memory.fill(0, &[0; 2 * PAGE]);
    driver.enable();
    assert!(format!("{:?}", driver.device).contains("mem:"));
}

#[test]
fn a_reset_that_has_no_effect_is_an_error() {
    let driver = Driver::new(&SoftOptions::default());
    let fault = Fault::new(Behaviour::FailReset);
    driver.device.controller().inject(fault).expect("valid");
    let error = driver.device.reset().expect_err("the first one fails");
    let message = error.to_string();
    assert!(
        message.contains("reset failed: the function was not reset"),
        "{message}"
    );
    assert!(driver.status().rdy());
    driver.device.reset().expect("the second one works");
}

#[test]
fn a_device_that_vanished_reads_as_all_ones() {
    let driver = Driver::new(&SoftOptions::default());
    driver.device.controller().vanish(Loss::Nothing);
    assert_eq!(driver.device.read32(offset::CSTS).expect("reads"), u32::MAX);
    assert_eq!(driver.device.read64(offset::CAP).expect("reads"), u64::MAX);
    driver.device.write32(offset::CC, 0).expect("goes nowhere");
    driver
        .device
        .reset()
        .expect_err("there is nothing to reset");
    driver.device.controller().reappear();
    assert_eq!(driver.device.read32(offset::CSTS).expect("reads"), 0);
}

#[test]
fn notices_are_told_apart() {
    let driver = Driver::new(&SoftOptions::default());
    let notices = driver.device.notices();
    let told = || {
        let told = |(notice, descriptor): &(Notice, Arc<OwnedFd>)| {
            let mut counter = [0; 8];
            let mut file = File::from(descriptor.try_clone().expect("a descriptor"));
            file.read(&mut counter).is_ok().then_some(*notice)
        };
        notices.iter().filter_map(told).collect::<Vec<_>>()
    };
    assert_eq!(told(), []);
    driver.device.notify(Notice::ReleaseRequested);
    assert_eq!(told(), [Notice::ReleaseRequested]);
    driver.device.notify(Notice::Failed);
    assert_eq!(told(), [Notice::Failed]);
    assert_eq!(told(), []);
}
