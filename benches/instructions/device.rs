//! A model of an NVMe controller, without a thread: all it does, it does inside of the doorbell call.
//!
//! It takes commands as the specification has it, through the rings that the driver made and the
//! mappings that it has, and refuses what is none of these. It has no data: a read is checked and
//! completed, and the buffer is left as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iova::DmaMapper;
use nvme_async::device::{Device, DeviceError, Doorbell, DoorbellCall};
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::registers::{
    AdminQueueAttributes, Capabilities, ControllerConfiguration, ControllerStatus,
    ShutdownNotification, ShutdownStatus, offset,
};
use nvme_spec::{Cqe, DataPointer, Sqe, Status};

use super::admin;
use super::memory::Iommu;

/// The size of a logical block, as a power of two in bytes.
pub(crate) const BLOCK_SHIFT: u8 = 9;
/// The logical blocks of the one namespace: 1 GiB.
pub(crate) const BLOCKS: u64 = 1 << (30 - BLOCK_SHIFT);
/// Version 2.0.
pub(crate) const VERSION: u32 = 0x0002_0000;
/// The most that a command transfers, in bytes.
const PAGE: u64 = 4096;
/// The high halves of registers of 64 bits.
const HIGH_CAP: u32 = offset::CAP + 4;
const HIGH_ASQ: u32 = offset::ASQ + 4;
const HIGH_ACQ: u32 = offset::ACQ + 4;

/// A controller with one namespace.
pub(crate) struct ModelDevice {
    model: Arc<Model>,
    vectors: Vec<Arc<OwnedFd>>,
}

struct Model {
    iommu: Arc<Iommu>,
    vectors: Vec<Arc<OwnedFd>>,
    state: Mutex<State>,
}

/// What is behind the registers.
pub(crate) struct State {
    configuration: ControllerConfiguration,
    attributes: AdminQueueAttributes,
    /// I/O addresses of the admin submission and completion queue.
    admin_rings: [u64; 2],
    pub(crate) submissions: BTreeMap<u16, Submission>,
    pub(crate) completions: BTreeMap<u16, Completion>,
    /// I/O commands complete when so many are outstanding.
    depth: usize,
    /// I/O commands that are to complete.
    outstanding: Vec<Answer>,
}

/// A submission queue.
pub(crate) struct Submission {
    /// Its I/O address.
    pub(crate) address: u64,
    pub(crate) entries: u32,
    /// The next entry that is taken.
    pub(crate) head: u32,
    /// The completion queue of its commands.
    pub(crate) completion: u16,
}

/// A completion queue.
pub(crate) struct Completion {
    /// Its I/O address.
    pub(crate) address: u64,
    pub(crate) entries: u32,
    /// The next entry that is written.
    pub(crate) tail: u32,
    /// The next entry that the host takes.
    pub(crate) head: u32,
    pub(crate) phase: bool,
    /// The interrupt vector, if interrupts are on.
    pub(crate) vector: Option<u16>,
}

/// What a command of a submission queue is completed with.
struct Answer {
    queue: u16,
    cid: u16,
    status: Status,
    result: u32,
}

impl ModelDevice {
    /// A device with so many interrupt vectors. It completes I/O commands together, inside of the
    /// doorbell call by which there are `depth` of them.
    pub(crate) fn new(depth: usize, vectors: u16) -> io::Result<Arc<Self>> {
        let vectors = (0..vectors)
            .map(|_| eventfd().map(Arc::new))
            .collect::<io::Result<Vec<_>>>()?;
        let state = State {
            configuration: ControllerConfiguration::new(),
            attributes: AdminQueueAttributes::new(),
            admin_rings: [0; 2],
            submissions: BTreeMap::new(),
            completions: BTreeMap::new(),
            depth,
            outstanding: Vec::new(),
        };
        let model = Arc::new(Model {
            iommu: Arc::default(),
            vectors: vectors.clone(),
            state: Mutex::new(state),
        });
        Ok(Arc::new(Self { model, vectors }))
    }
}

impl Device for ModelDevice {
    fn address(&self) -> &str {
        "model"
    }

    fn read32(&self, register: u32) -> Result<u32, DeviceError> {
        Ok(self.model.state().read(register))
    }

    fn write32(&self, register: u32, value: u32) -> Result<(), DeviceError> {
        self.model.state().write(register, value);
        Ok(())
    }

    fn doorbell(&self, offset: u32) -> Result<Doorbell, DeviceError> {
        Ok(Doorbell::Call {
            target: self.model.clone(),
            offset,
        })
    }

    fn vectors(&self) -> &[Arc<OwnedFd>] {
        &self.vectors
    }

    fn mapper(&self) -> Arc<dyn DmaMapper> {
        self.model.iommu.clone()
    }

    fn set_bus_master(&self, _: bool) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.model.state().stop();
        Ok(())
    }
}

impl DoorbellCall for Model {
    fn ring(&self, register: u32, value: u32) {
        let state = &mut *self.state();
        let index = (register - offset::DOORBELLS) / 4;
        let queue = (index / 2) as u16;
        if index.is_multiple_of(2) {
            self.take(state, queue, value);
        } else if let Some(completion) = state.completions.get_mut(&queue) {
            assert!(value < completion.entries, "an invalid doorbell write");
            completion.head = value;
        }
    }
}

impl Model {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the commands up to the new tail of a submission queue, and completes what is to be.
    fn take(&self, state: &mut State, queue: u16, tail: u32) {
        let mut answers = Vec::new();
        while let Some(command) = self.fetch(state, queue, tail) {
            let cid = command.cid();
            let answer = |(status, result)| Answer {
                queue,
                cid,
                status,
                result,
            };
            if queue == 0 {
                answers.extend(admin::execute(state, &self.iommu, &command).map(answer));
            } else {
                state.outstanding.push(answer((self.execute(&command), 0)));
            }
        }
        if state.outstanding.len() >= state.depth {
            answers.append(&mut state.outstanding);
        }
        self.complete(state, &answers);
    }

    fn fetch(&self, state: &mut State, queue: u16, tail: u32) -> Option<Sqe> {
        let submission = state.submissions.get_mut(&queue)?;
        assert!(tail < submission.entries, "an invalid doorbell write");
        if submission.head == tail {
            return None;
        }
        let address = submission.address + u64::from(submission.head) * size_of::<Sqe>() as u64;
        submission.head = (submission.head + 1) % submission.entries;
        let dwords = self.iommu.load(address);
        Some(Sqe::from_dwords(dwords.expect("queues stay mapped")))
    }

    /// An I/O command: nothing but reads of at most a page.
    fn execute(&self, command: &Sqe) -> Status {
        if NvmOpcode(command.opcode()) != NvmOpcode::READ {
            return Status::INVALID_OPCODE;
        }
        let block = u64::from(command.cdw11()) << 32 | u64::from(command.cdw10());
        let blocks = u64::from(command.cdw12() & 0xffff) + 1;
        if block.checked_add(blocks).is_none_or(|end| end > BLOCKS) {
            return Status::LBA_OUT_OF_RANGE;
        }
        let len = blocks << BLOCK_SHIFT;
        match command.data_pointer() {
            Ok(DataPointer::Prp { prp1, .. }) if prp1 % PAGE + len <= PAGE => {
                match self.iommu.is_writable(prp1, len) {
                    true => Status::SUCCESS,
                    false => Status::DATA_TRANSFER_ERROR,
                }
            }
            _ => Status::INVALID_FIELD,
        }
    }

    /// Writes completions, and signals the interrupt of each of their queues once.
    fn complete(&self, state: &mut State, answers: &[Answer]) {
        let mut interrupts = BTreeSet::new();
        for answer in answers {
            // Its queue was deleted.
            let Some(submission) = state.submissions.get(&answer.queue) else {
                continue;
            };
            let Some(completion) = state.completions.get_mut(&submission.completion) else {
                continue;
            };
            let entry = Cqe::new(answer.cid, answer.status)
                .with_sq(answer.queue, submission.head as u16)
                .with_result(answer.result)
                .with_phase(completion.phase);
            let address = completion.address + u64::from(completion.tail) * size_of::<Cqe>() as u64;
            let stored = self.iommu.store(address, &entry.dwords());
            stored.expect("queues stay mapped");
            completion.tail += 1;
            if completion.tail == completion.entries {
                completion.tail = 0;
                completion.phase = !completion.phase;
            }
            assert_ne!(completion.tail, completion.head, "a queue overflows");
            interrupts.extend(completion.vector);
        }
        for vector in interrupts {
            signal(&self.vectors[usize::from(vector)]);
        }
    }
}

impl State {
    fn read(&self, register: u32) -> u32 {
        match register {
            offset::CAP => capabilities() as u32,
            HIGH_CAP => (capabilities() >> 32) as u32,
            offset::VS => VERSION,
            offset::CC => self.configuration.into_bits(),
            offset::CSTS => {
                let shutdown = match self.configuration.shn() {
                    ShutdownNotification::None => ShutdownStatus::Normal,
                    _ => ShutdownStatus::Complete,
                };
                let status = ControllerStatus::new().with_rdy(self.configuration.en());
                status.with_shst(shutdown).into_bits()
            }
            offset::AQA => self.attributes.into_bits(),
            _ => 0,
        }
    }

    fn write(&mut self, register: u32, value: u32) {
        let [submission, completion] = &mut self.admin_rings;
        let low = |address: u64| address & !0xffff_ffff | u64::from(value);
        let high = |address: u64| address & 0xffff_ffff | u64::from(value) << 32;
        match register {
            offset::CC => self.configure(ControllerConfiguration::from_bits(value)),
            offset::AQA => self.attributes = AdminQueueAttributes::from_bits(value),
            offset::ASQ => *submission = low(*submission),
            HIGH_ASQ => *submission = high(*submission),
            offset::ACQ => *completion = low(*completion),
            HIGH_ACQ => *completion = high(*completion),
            _ => {}
        }
    }

    fn configure(&mut self, configuration: ControllerConfiguration) {
        let was_enabled = self.configuration.en();
        self.configuration = configuration;
        match (was_enabled, configuration.en()) {
            (true, false) => self.stop(),
            (false, true) => self.start(),
            _ => {}
        }
    }

    fn start(&mut self) {
        let [submission, completion] = self.admin_rings;
        let entries = |zeroes_based: u16| u32::from(zeroes_based) + 1;
        let acqs = entries(self.attributes.acqs());
        let asqs = entries(self.attributes.asqs());
        self.completions
            .insert(0, Completion::new(completion, acqs, Some(0)));
        self.submissions
            .insert(0, Submission::new(submission, asqs, 0));
    }

    /// Forgets all queues and commands.
    fn stop(&mut self) {
        self.configuration.set_en(false);
        self.submissions.clear();
        self.completions.clear();
        self.outstanding.clear();
    }
}

impl Submission {
    pub(crate) fn new(address: u64, entries: u32, completion: u16) -> Self {
        Self {
            address,
            entries,
            head: 0,
            completion,
        }
    }
}

impl Completion {
    pub(crate) fn new(address: u64, entries: u32, vector: Option<u16>) -> Self {
        Self {
            address,
            entries,
            tail: 0,
            head: 0,
            phase: true,
            vector,
        }
    }
}

impl fmt::Debug for ModelDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelDevice").finish_non_exhaustive()
    }
}

fn capabilities() -> u64 {
    Capabilities::new()
        .with_mqes(1023)
        .with_cqr(true)
        .with_to(1)
        .with_css(0x01)
        .into_bits()
}

/// A nonblocking eventfd.
fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let descriptor = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Makes an eventfd readable.
fn signal(eventfd: &OwnedFd) {
    let one = 1_u64.to_ne_bytes();
    // It fails only if the counter is at its maximum, when the eventfd is readable anyway.
    //
    // SAFETY: `one` is readable for its length during the call.
    unsafe { libc::write(eventfd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}
