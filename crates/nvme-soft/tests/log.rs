//! What a host can have a controller log. A process of its own, whose log is counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nvme_soft::{AccessFault, Config, HostMemory, Interrupts, SoftController};
use nvme_spec::registers::offset;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// A host that grants no access to its memory.
struct Nothing;

impl HostMemory for Nothing {
    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), AccessFault> {
        Err(AccessFault::read(address, out.len()))
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), AccessFault> {
        Err(AccessFault::write(address, data.len()))
    }

    fn store_release(&self, address: u64, _value: u32) -> Result<(), AccessFault> {
        Err(AccessFault::write(address, 4))
    }

    fn load_acquire(&self, address: u64) -> Result<u32, AccessFault> {
        Err(AccessFault::read(address, 4))
    }
}

impl Interrupts for Nothing {
    fn count(&self) -> u16 {
        1
    }

    fn raise(&self, _vector: u16) {}
}

static LOGGED: AtomicU64 = AtomicU64::new(0);

/// Counts warnings and errors.
struct Count;

impl Subscriber for Count {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        LOGGED.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn a_host_cannot_fill_the_log() {
    tracing::subscriber::set_global_default(Count).unwrap();
    let controller =
        SoftController::start(Config::default(), Arc::new(Nothing), Arc::new(Nothing)).unwrap();
    const ROUNDS: u64 = 1000;
    for round in 0..ROUNDS {
        // Once without admin queues, which is refused, and once with some that are not there.
        controller.write32(offset::CC, 6 << 16 | 4 << 20 | 1);
        while controller.read32(offset::CSTS) & 2 == 0 {
            std::thread::yield_now();
        }
        controller.reset().unwrap();
        controller.write32(offset::AQA, 15 << 16 | 15);
        controller.write32(offset::CC, 6 << 16 | 4 << 20 | 1);
        while controller.read32(offset::CSTS) & 1 == 0 {
            std::thread::yield_now();
        }
        controller.write32(offset::DOORBELLS, 1);
        while controller.read32(offset::CSTS) & 2 == 0 {
            std::thread::yield_now();
        }
        controller.reset().unwrap();
        assert_eq!(controller.counters().refused_accesses, round + 1);
    }
    // Some of each kind, and not of each round.
    let logged = LOGGED.load(Ordering::Relaxed);
    assert!((3..ROUNDS / 10).contains(&logged), "{logged}");
}
