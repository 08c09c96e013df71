//! A queue pair's state, a model device at its rings, and memory and wakers that are watched.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use iova::{AddressSpace, Direction, DmaMapper, Geometry, HostMemory, IovaRange, MapError};
use nvme_spec::{Cqe, nvm};
use poll_window::Costs;

use crate::device::Doorbell;
use crate::engine::access::Access;
use crate::engine::state::{
    Aftermath, Command, Failure, Here, Look, Outcome, Place, Progress, Refusal,
};
use crate::engine::{PollMode, QueueSettings, State, Submission};
use crate::io::{Holdings, Payload};
use crate::memory::{DmaWords, Pool};
use crate::queue::tests::device::{ModelDevice, Words};
use crate::queue::{CompletionRing, QueueCore, QueueDoorbell, SubmissionRing};

pub(super) const ID: u16 = 1;
pub(super) const MAX_WINDOW: Duration = Duration::from_micros(50);
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);
pub(super) const RETRIES: u32 = 2;

/// Remembers where mapped memory is, so that the model device reaches it by its file.
#[derive(Default)]
struct Files(Mutex<BTreeMap<u64, (File, u64)>>);

#[expect(unsafe_code, reason = "what stands in for an IOMMU")]
// SAFETY: no hardware is behind it; the model device uses the file, which it keeps open.
unsafe impl DmaMapper for Files {
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
        let file = fd.try_clone_to_owned()?.into();
        self.0.lock().unwrap().insert(iova, (file, offset));
        Ok(())
    }

    fn unmap(&self, iova: u64, _: u64) -> Result<(), MapError> {
        self.0.lock().unwrap().remove(&iova);
        Ok(())
    }
}

impl Files {
    fn words(&self, words: &DmaWords) -> FileWords {
        let files = self.0.lock().unwrap();
        let (start, (file, offset)) = files.range(..=words.iova()).next_back().unwrap();
        FileWords {
            file: file.try_clone().unwrap(),
            offset: offset + words.iova() - start,
        }
    }
}

/// Ring memory by way of its file.
pub(in crate::engine) struct FileWords {
    file: File,
    offset: u64,
}

impl Words for FileWords {
    fn load(&self, index: usize) -> u32 {
        let mut bytes = [0; 4];
        self.file
            .read_exact_at(&mut bytes, self.offset + index as u64 * 4)
            .unwrap();
        u32::from_ne_bytes(bytes)
    }

    fn store(&self, index: usize, value: u32) {
        self.file
            .write_all_at(&value.to_ne_bytes(), self.offset + index as u64 * 4)
            .unwrap();
    }
}

pub(in crate::engine) type Device = ModelDevice<FileWords>;

/// A state and its device, with a reaper's seat that is taken.
pub(in crate::engine) fn state(entries: u16, mode: PollMode) -> (State, Device) {
    let files = Arc::new(Files::default());
    let pool = Pool::new(AddressSpace::new(files.clone()).unwrap(), 4 << 20);
    let submission = DmaWords::new(&pool, usize::from(entries) * 16).unwrap();
    let completion = DmaWords::new(&pool, usize::from(entries) * 4).unwrap();
    let device = ModelDevice::new(
        ID,
        entries,
        files.words(&submission),
        files.words(&completion),
    );
    let doorbell = |register: &crate::queue::tests::device::Register| {
        QueueDoorbell::new(Doorbell::Call {
            target: Arc::new(register.clone()),
            offset: 0,
        })
    };
    let core = QueueCore::new(
        ID,
        entries,
        SubmissionRing::new(submission, doorbell(&device.submission_tail), entries),
        CompletionRing::new(completion, doorbell(&device.completion_head), entries),
    );
    let settings = QueueSettings {
        mode,
        costs: Costs::default(),
        max_window: MAX_WINDOW,
        coalescing_time: Duration::ZERO,
        retries: RETRIES,
        fails_fast: false,
        retry_delays: [1, 2, 3].map(Duration::from_secs),
    };
    let mut state = State::new(core, settings);
    state.claim_reaper(Here::now()).unwrap();
    (state, device)
}

/// An interrupt vector that never fires.
pub(in crate::engine) fn vector() -> (Arc<OwnedFd>, std::io::PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    (Arc::new(reader.into()), writer)
}

/// Counts how often it is woken.
#[derive(Default)]
pub(in crate::engine) struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Wakes {
    pub(super) fn new() -> (Arc<Self>, Waker) {
        let wakes = Arc::new(Self::default());
        (wakes.clone(), wakes.into())
    }

    pub(in crate::engine) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

struct Owner(Arc<[u8; 16]>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &*self.0
    }
}

/// Tells whether a command's memory still exists.
pub(in crate::engine) struct Memory(Weak<[u8; 16]>);

impl Memory {
    pub(in crate::engine) fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }
}

pub(in crate::engine) fn command(number: u32) -> (Command, Holdings, Memory) {
    let memory = Arc::new([number as u8; 16]);
    let watch = Memory(Arc::downgrade(&memory));
    let payload = Payload::Bytes(Bytes::from_owner(Owner(memory)));
    let command = Command {
        sqe: nvm::read(1, number.into(), 1, false),
        timeout: Some(TIMEOUT),
        repeatable: false,
    };
    (command, Holdings::new(payload), watch)
}

/// A future of such a command, and its memory.
pub(in crate::engine) fn submission<Q: Access>(
    queue: &Q,
    number: u32,
) -> (Submission<'_, Q>, Memory) {
    let (command, holdings, memory) = command(number);
    (Submission::new(queue, command, holdings), memory)
}

/// What a command held, if it came back.
pub(in crate::engine) fn returned(holdings: Holdings) -> Option<Holdings> {
    (!matches!(holdings.payload, Payload::None)).then_some(holdings)
}

/// An operation that was started: what a future would know of it.
pub(super) struct Started {
    pub(super) key: usize,
    pub(super) wakes: Arc<Wakes>,
    pub(super) memory: Memory,
}

pub(super) struct Rig {
    pub(super) state: State,
    pub(super) device: Device,
    /// Woken when the reaper is.
    pub(super) reaper: Arc<Wakes>,
    /// Of the commands that are started.
    pub(super) timeout: Duration,
    pub(super) repeatable: bool,
    next_number: u32,
}

impl Rig {
    pub(super) fn new(entries: u16, mode: PollMode) -> Self {
        let (state, device) = state(entries, mode);
        Self {
            state,
            device,
            reaper: Arc::default(),
            timeout: TIMEOUT,
            repeatable: false,
            next_number: 0,
        }
    }

    pub(super) fn try_start(&mut self) -> Result<Started, Refusal> {
        self.try_start_at(Instant::now())
    }

    pub(super) fn try_start_at(&mut self, now: Instant) -> Result<Started, Refusal> {
        let (mut command, mut holdings, memory) = command(self.next_number);
        command.timeout = Some(self.timeout);
        command.repeatable = self.repeatable;
        let (wakes, waker) = Wakes::new();
        let mut aftermath = Aftermath::default();
        let started = self.state.start(
            &command,
            holdings.as_mut(),
            &mut Some(waker),
            Here::now(),
            now,
            &mut aftermath,
        );
        aftermath.run();
        let Progress::Waiting { key } = started? else {
            panic!("done at once");
        };
        self.next_number += 1;
        Ok(Started { key, wakes, memory })
    }

    pub(super) fn start(&mut self) -> Started {
        self.try_start().unwrap_or_else(|_| panic!("refused"))
    }

    pub(super) fn after<R>(&mut self, f: impl FnOnce(&mut State, &mut Aftermath) -> R) -> R {
        let mut aftermath = Aftermath::default();
        let result = f(&mut self.state, &mut aftermath);
        aftermath.run();
        result
    }

    pub(super) fn reap(&mut self) -> usize {
        self.after(|state, aftermath| state.reap(Look::Polled, Instant::now(), aftermath))
    }

    /// The device does all that it knows of, and the completions are taken.
    pub(super) fn work(&mut self) -> usize {
        self.state.ring_deferred();
        self.device.work();
        self.reap()
    }

    /// The device does all that it knows of, which is found then.
    pub(super) fn work_at(&mut self, look: Look, now: Instant) -> usize {
        self.device.work();
        self.after(|state, aftermath| state.reap(look, now, aftermath))
    }

    pub(super) fn expire(&mut self, after: Duration) {
        let now = Instant::now() + after;
        self.after(|state, aftermath| state.expire(now, aftermath));
    }

    pub(super) fn fail(&mut self) {
        self.after(|state, aftermath| state.fail(Failure::Closed, false, aftermath));
    }

    pub(super) fn abandon(&mut self, started: &Started) {
        self.after(|state, aftermath| state.abandon(started.key, aftermath));
    }

    pub(super) fn outcome(&mut self, started: &Started) -> Option<(Outcome, Option<Holdings>)> {
        let mut holdings = Holdings::default();
        let outcome = self.state.take_outcome(started.key, holdings.as_mut())?;
        Some((outcome, returned(holdings)))
    }

    /// The completion of an operation that succeeded, with its memory.
    pub(super) fn success(&mut self, started: &Started) -> Cqe {
        let (result, holdings) = self.outcome(started).expect("it is done");
        let cqe = result.expect("it succeeded");
        assert!(cqe.status().is_success() && holdings.is_some() && started.memory.is_alive());
        drop(holdings);
        assert!(!started.memory.is_alive());
        cqe
    }

    /// Puts the reaper to sleep.
    pub(super) fn sleep(&mut self, next_look: Option<Instant>) {
        self.state.seats[0].place = Place::Asleep {
            waker: self.reaper.clone().into(),
            next_look,
            pause: None,
        };
    }

    /// The numbers of the commands that the device has fetched and not completed.
    pub(super) fn fetched(&mut self) -> Vec<u32> {
        self.state.ring_deferred();
        self.device.fetch(usize::MAX);
        self.device.fetched.iter().map(|sqe| sqe.cdw10()).collect()
    }
}
