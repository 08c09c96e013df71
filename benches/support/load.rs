//! Reads of 4 KiB at random places, one task for each that is outstanding.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use hdrhistogram::Histogram;
use nvme_async::{Controller, DmaBuf};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::way::{Handle, Host, Reads, Way};

/// The size of a read.
const SIZE: usize = 4096;
/// The reads that there are room for.
const PLACES: u64 = 4096;

/// What all tasks of a run are told.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    every: Option<Duration>,
    over: Arc<AtomicBool>,
}

/// What a task has from run to run, so that a run allocates little.
#[derive(Debug)]
pub(crate) struct Slot {
    buffer: DmaBuf,
    rng: Rng,
    latencies: Histogram<u64>,
}

impl Load {
    /// Reads until the run is over, at least once.
    pub(crate) async fn work<R: Reads>(self, reads: R, mut slot: Slot) -> Slot {
        let mut ticks = self.every.map(interval);
        if let Some(ticks) = &mut ticks {
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        }
        loop {
            if let Some(ticks) = &mut ticks {
                ticks.tick().await;
            }
            let offset = slot.rng.u64(..PLACES) * SIZE as u64;
            let began = Instant::now();
            slot.buffer = reads.read(offset, slot.buffer).await;
            let latency = began.elapsed().as_nanos() as u64;
            // A histogram that resizes itself has room for every number.
            let _ = slot.latencies.record(latency);
            if self.over.load(Ordering::Relaxed) {
                return slot;
            }
        }
    }
}

/// A way that is being measured: a software controller, and a runtime for its reads.
///
/// It stays open from run to run, as in a program, so that what is learned of the controller stays.
pub(crate) struct Bed {
    pub(crate) way: Way,
    host: Host,
    handle: Handle,
    slots: Vec<Slot>,
}

/// What a run found.
pub(crate) struct Done {
    pub(crate) elapsed: Duration,
    /// Of each read, in nanoseconds.
    pub(crate) latencies: Histogram<u64>,
}

impl Bed {
    /// Opens a controller whose I/O commands take at least `latency`, for loads of up to `depth`.
    pub(crate) fn open(way: Way, latency: Duration, depth: usize) -> Self {
        let url = match latency.as_micros() {
            0 => "mem:?size=16M".to_owned(),
            latency => format!("mem:?size=16M&latency={latency}us"),
        };
        let host = Host::new(way);
        let handle = host.block_on(async {
            let open = way.options(depth).url(&url).open().await;
            Handle::new(way, open.expect("the software controller opens"))
        });
        let namespace = handle.shared();
        assert_eq!(namespace.capacity(), PLACES * SIZE as u64);
        let slots = (0..depth as u64).map(|seed| Slot {
            buffer: namespace.allocate(SIZE).expect("a buffer"),
            rng: Rng::with_seed(seed),
            latencies: histogram(),
        });
        let slots = slots.collect();
        Self {
            way,
            host,
            handle,
            slots,
        }
    }

    pub(crate) fn controller(&self) -> Controller {
        self.handle.shared().controller().clone()
    }

    /// Has `depth` tasks read until `beside`, which runs in the same runtime, is done: one read after
    /// the other, or one in each of the times `every`.
    pub(crate) fn run<T>(
        &mut self,
        depth: usize,
        every: Option<Duration>,
        beside: impl AsyncFnOnce() -> T,
    ) -> (Done, T) {
        let Self {
            host,
            handle,
            slots,
            ..
        } = self;
        let load = Load {
            every,
            over: Arc::default(),
        };
        let (elapsed, beside) = host.block_on(async {
            let began = Instant::now();
            let attendant = handle.attend();
            let mut tasks = JoinSet::new();
            for slot in slots.drain(..depth) {
                handle.spawn(&mut tasks, slot, &load);
            }
            let beside = beside().await;
            load.over.store(true, Ordering::Relaxed);
            // To the front: a run at a lower depth finds its buffers in the caches.
            slots.splice(0..0, tasks.join_all().await);
            if let Some(attendant) = attendant {
                attendant.abort();
                // It ends by that, and then has no handle any more.
                let _ = attendant.await;
            }
            (began.elapsed(), beside)
        });
        let mut latencies = histogram();
        for slot in slots {
            // Both resize themselves.
            let _ = latencies.add(&slot.latencies);
            slot.latencies.reset();
        }
        (Done { elapsed, latencies }, beside)
    }

    /// Shuts the controller down.
    pub(crate) fn close(self) {
        let controller = self.controller();
        let Self {
            host,
            handle,
            slots,
            ..
        } = self;
        drop((handle, slots));
        let closed = host.block_on(controller.shutdown());
        closed.expect("the controller shuts down");
    }
}

/// Those that are measured with so many reads outstanding.
pub(crate) fn suited(beds: &mut [Bed], depth: usize) -> Vec<&mut Bed> {
    let beds = beds.iter_mut();
    beds.filter(|bed| bed.way.suits(depth)).collect()
}

/// For times in nanoseconds, to one part in a thousand.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("0 to 5 significant digits are possible")
}
