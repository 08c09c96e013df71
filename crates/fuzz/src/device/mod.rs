//! A controller that follows the protocol until its script says otherwise.
//!
//! It works in the calls of the driver: by the time that a doorbell has been rung, it has done with
//! the commands what it wants. What it may do is what a device behind an IOMMU can do: answer
//! anything from registers, signal interrupts or not, and read and write the memory that is mapped
//! for it.

mod commands;
mod memory;
mod registers;

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::thread;

use iova::DmaMapper;
use nvme_async::device::{Device, DeviceError, Doorbell, DoorbellCall};
use nvme_spec::Sqe;
use nvme_spec::registers::{ControllerConfiguration, offset};

use self::memory::Mapper;
use crate::eventfd;
use crate::script::{Claims, Move, RegisterMove, Script};

/// The device.
pub struct FuzzDevice {
    this: Weak<Self>,
    vectors: Vec<Arc<OwnedFd>>,
    mapper: Arc<Mapper>,
    state: Mutex<State>,
    /// Closed when the device is dropped.
    _alive: mpsc::Sender<Infallible>,
}

/// What remains of a device that was given to the driver.
pub struct Remains {
    alive: mpsc::Receiver<Infallible>,
    mappings: Arc<AtomicUsize>,
}

impl Remains {
    /// Waits until the driver has let go of the device and its IOMMU; returns how many mappings there
    /// were then.
    pub fn wait(self) -> usize {
        let _closed = self.alive.recv();
        self.mappings.load(Ordering::Acquire)
    }
}

struct State {
    claims: Claims,
    moves: VecDeque<(u8, Move)>,
    register_moves: VecDeque<(u8, RegisterMove)>,
    registers: Registers,
    submissions: BTreeMap<u16, Submission>,
    completions: BTreeMap<u16, Completion>,
    /// Commands that are not completed yet.
    withheld: Vec<Fetched>,
    /// Asynchronous Event Requests.
    events: VecDeque<Fetched>,
    /// Whether the device wrote where commands and lists may be. Then what it finds there is its own
    /// fault.
    has_scribbled: bool,
    /// Whether the device may have completed what it did not do. Then the driver may have taken back
    /// what the device takes for its own.
    has_forged: bool,
    /// Whether a register was read as what it is not. The driver may then take one doorbell for
    /// another.
    has_misled: bool,
    has_vanished: bool,
}

#[derive(Default)]
struct Registers {
    configuration: ControllerConfiguration,
    /// What CSTS reads as, if it is not what it should be.
    status: Option<u32>,
    admin_attributes: u32,
    admin_submission: u64,
    admin_completion: u64,
    bus_master: bool,
}

struct Submission {
    address: u64,
    entries: u32,
    /// The next command.
    head: u32,
    completion: u16,
}

struct Completion {
    address: u64,
    entries: u32,
    tail: u32,
    phase: bool,
    vector: Option<u16>,
}

/// A command, and where it came from.
#[derive(Clone, Copy)]
struct Fetched {
    command: Sqe,
    queue: u16,
    /// Of its queue, after it was fetched.
    head: u32,
}

impl FuzzDevice {
    /// A device that does what `script` says to the accesses of this thread.
    pub fn new(script: &Script) -> (Arc<Self>, Remains) {
        let vectors = usize::from(script.claims.vectors % 3) + 1;
        let state = State {
            claims: script.claims.clone(),
            moves: script.moves.iter().cloned().collect(),
            register_moves: script.registers.iter().copied().collect(),
            registers: Registers::default(),
            submissions: BTreeMap::new(),
            completions: BTreeMap::new(),
            withheld: Vec::new(),
            events: VecDeque::new(),
            has_scribbled: false,
            has_forged: false,
            has_misled: false,
            has_vanished: false,
        };
        // As few as there can be, and the driver still has room for its queues.
        let mappings = script.claims.mappings.map(|count| u64::from(count) + 1);
        let (sender, alive) = mpsc::channel();
        let left = Arc::<AtomicUsize>::default();
        let mapper = Arc::new(Mapper::new(mappings, left.clone(), sender.clone()));
        let remains = Remains {
            alive,
            mappings: left,
        };
        let device = Arc::new_cyclic(|this| Self {
            this: this.clone(),
            vectors: (0..vectors).map(|_| Arc::new(eventfd())).collect(),
            mapper,
            state: Mutex::new(state),
            _alive: sender,
        });
        (device, remains)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self, vector: u16) {
        let Some(vector) = self.vectors.get(usize::from(vector)) else {
            return;
        };
        let one = 1u64.to_ne_bytes();
        // SAFETY: the descriptor is open and the bytes are there. That it fails, because the
        // counter is full, loses no signal.
        let _ = unsafe { libc::write(vector.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

impl fmt::Debug for FuzzDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FuzzDevice").finish_non_exhaustive()
    }
}

impl Device for FuzzDevice {
    fn address(&self) -> &str {
        "fuzz"
    }

    fn read32(&self, offset: u32) -> Result<u32, DeviceError> {
        let scripted = is_scripted();
        self.state().read(offset, scripted)
    }

    fn write32(&self, offset: u32, value: u32) -> Result<(), DeviceError> {
        let scripted = is_scripted();
        self.state().write(offset, value, scripted)
    }

    fn doorbell(&self, offset: u32) -> Result<Doorbell, DeviceError> {
        match self.this.upgrade() {
            Some(target) if offset >= offset::DOORBELLS => Ok(Doorbell::Call {
                target: Arc::new(Bell(Arc::downgrade(&target))),
                offset,
            }),
            _ => Err(registers::failure("doorbell", offset)),
        }
    }

    fn vectors(&self) -> &[Arc<OwnedFd>] {
        &self.vectors
    }

    fn mapper(&self) -> Arc<dyn DmaMapper> {
        self.mapper.clone()
    }

    fn set_bus_master(&self, enabled: bool) -> Result<(), DeviceError> {
        self.state().registers.bus_master = enabled;
        Ok(())
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.state().stop();
        Ok(())
    }
}

/// The driver's way to ring, which keeps no device open.
struct Bell(Weak<FuzzDevice>);

impl DoorbellCall for Bell {
    fn ring(&self, offset: u32, value: u32) {
        if let Some(device) = self.0.upgrade() {
            device.rung(offset, value);
        }
    }
}

/// Whether this thread's accesses follow the script. The one that stops an abandoned controller runs
/// beside the program: what it gets must not depend on how the two are scheduled.
fn is_scripted() -> bool {
    thread::current().name() != Some("nvme-async-stop")
}
