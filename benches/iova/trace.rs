//! The talk's allocator and ours on the same requests: how often the mapper is called, and how
//! often a request has to wait for others.
//!
//! A program has a number of requests in flight, which end in the order in which they began. Most
//! use a buffer of a pool, some use memory that was never used before. None of it is registered.
//!
//! What goes to the mapper is checked, too: a request counts as wrong when, as it is sent to the
//! device, an address of it does not lead to its memory.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use fastrand::Rng;
use iova::{AddressSpace, Direction, FixedMapping, HostMemory, Mapped, Owner, Segment};

use crate::mapper::{Calls, Counting};
use crate::talk::Talk;
use crate::{BUFFER, KIB, MAX_MAPPINGS, POOL, RETENTION, buffer_outside, memory};

const REQUESTS: u64 = 400_000;
const WINDOW: usize = 32;
/// Of a hundred requests, how many use memory that was never used before.
const FRESH: u32 = 10;
/// The driver's own memory: admin and I/O queues.
const QUEUES: usize = 4;
const SEED: u64 = 1;
/// What we are after, for requests of several segments.
const TARGET: f64 = 20.0;

/// One request for all of one buffer.
pub(crate) struct Request {
    whole: HostMemory<'static>,
    owner: Owner,
    pub(crate) segments: Vec<HostMemory<'static>>,
}

/// What maps the requests' memory.
pub(crate) trait Allocator {
    /// What a request in flight holds; dropped when it ends.
    type Held;

    /// An allocator with the driver's own memory mapped.
    fn new(mapper: Arc<Counting>, fixed: &[HostMemory<'static>]) -> Self;

    /// Maps what `request` needs. To wait is to end requests of `in_flight`, the first one first.
    fn submit(
        &mut self,
        request: &Request,
        in_flight: &mut VecDeque<Self::Held>,
    ) -> Submitted<Self::Held>;
}

/// A request that is in flight now.
pub(crate) struct Submitted<Held> {
    /// Of its segments.
    pub(crate) iovas: Vec<u64>,
    pub(crate) stall: Stall,
    pub(crate) held: Held,
}

/// What a request had to wait for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stall {
    None,
    /// Some of those in flight.
    Partial,
    /// All of them.
    Full,
}

/// Runs everything and prints what came out.
pub(crate) fn print() {
    println!(
        "\nCalls to the mapper, per request: {REQUESTS} requests, {WINDOW} in flight, at most \
         {MAX_MAPPINGS} mappings at a time.\n\
         Each is for all of a buffer of {} KiB, which is one of a pool of {POOL} or, {FRESH} times \
         in 100, never used before.\n\
         The segments are in an order in which none begins where the one before it ends.\n",
        BUFFER / KIB
    );
    println!(
        "{:<20} {:<20} {:>8} {:>8} {:>8} {:>9} {:>9} {:>7} {:>10}",
        "request", "allocator", "map", "unmap", "calls", "stalled", "by all", "wrong", "talk's/it"
    );
    let vectored = Kind {
        name: "8 segments of 4 KiB",
        order: &[0, 2, 4, 6, 1, 3, 5, 7],
    };
    let single = Kind {
        name: "1 segment of 32 KiB",
        order: &[0],
    };
    let ratio = compare(&vectored);
    compare(&single);
    println!(
        "\nstalled: requests that had to wait for others to end; by all: for all that were in \
         flight (a full stall);\n\
         wrong: sent to the device with an address that doesn't lead to its memory.\n\
         Memory that was never used takes a map call, so nobody can do with fewer than {:.1} calls \
         per request:\n\
         for 1 segment that is at most {:.0} times fewer than the talk's.",
        f64::from(FRESH) / 100.0,
        100.0 / f64::from(FRESH),
    );
    println!(
        "At least {TARGET} times fewer calls than the talk's, for 8 segments: {} ({ratio:.1})\n",
        if ratio >= TARGET { "yes" } else { "NO" },
    );
}

struct Kind {
    name: &'static str,
    /// The parts of the buffer that are its segments, in their order.
    order: &'static [usize],
}

/// All allocators on requests of one kind. How many times fewer calls ours makes than the talk's.
fn compare(kind: &Kind) -> f64 {
    let talk = run::<Talk>(kind);
    talk.print(kind.name, "talk's", &talk);
    let ours = run::<Ours<true>>(kind);
    ours.print("", "ours", &talk);
    let unowned = run::<Ours<false>>(kind);
    unowned.print("", "ours, without owners", &talk);
    for counts in [&ours, &unowned] {
        assert_eq!(counts.full_stalls, 0, "ours never waits for all");
        assert_eq!(counts.wrong, 0, "what a request holds stays mapped");
    }
    talk.calls_per_request() / ours.calls_per_request()
}

/// The same requests for everyone: the same seed.
fn run<A: Allocator>(kind: &Kind) -> Counts {
    let mapper = Arc::new(Counting::new(MAX_MAPPINGS as usize));
    let queues: Vec<_> = (1..=QUEUES)
        .map(|index| memory(index << 20, 16 * KIB))
        .collect();
    let mut allocator = A::new(Arc::clone(&mapper), &queues);
    let before = mapper.calls();
    let mut counts = Counts::default();
    let mut in_flight = VecDeque::with_capacity(WINDOW);
    for request in requests(kind) {
        if in_flight.len() == WINDOW {
            in_flight.pop_front();
        }
        let submitted = allocator.submit(&request, &mut in_flight);
        in_flight.push_back(submitted.held);

        counts.stalls += u64::from(submitted.stall != Stall::None);
        counts.full_stalls += u64::from(submitted.stall == Stall::Full);
        let mut segments = submitted.iovas.iter().zip(&request.segments);
        let is_right = segments.all(|(iova, memory)| mapper.reaches(*iova, memory));
        counts.wrong += u64::from(!is_right);
    }
    let after = mapper.calls();
    counts.calls = Calls {
        map: after.map - before.map,
        unmap: after.unmap - before.unmap,
    };
    counts
}

fn requests(kind: &Kind) -> impl Iterator<Item = Request> {
    let owner = |index| -> Owner { Arc::new(index) };
    let pool: Vec<_> = (0..POOL).map(owner).collect();
    let mut rng = Rng::with_seed(SEED);
    let mut next = POOL;
    let len = BUFFER / kind.order.len();
    (0..REQUESTS).map(move |_| {
        let (index, owner) = if rng.u32(..100) < FRESH {
            next += 1;
            (next - 1, owner(next - 1))
        } else {
            let index = rng.usize(..POOL);
            (index, Arc::clone(&pool[index]))
        };
        let first = buffer_outside(index);
        let segments = kind.order.iter();
        Request {
            whole: memory(first, BUFFER),
            owner,
            segments: segments
                .map(|part| memory(first + part * len, len))
                .collect(),
        }
    })
}

#[derive(Clone, Default)]
struct Counts {
    calls: Calls,
    stalls: u64,
    full_stalls: u64,
    wrong: u64,
}

impl Counts {
    fn calls_per_request(&self) -> f64 {
        (self.calls.map + self.calls.unmap) as f64 / REQUESTS as f64
    }

    fn print(&self, request: &str, allocator: &str, talk: &Self) {
        println!(
            "{request:<20} {allocator:<20} {:>8.4} {:>8.4} {:>8.4} {:>9} {:>9} {:>7} {:>10.2}",
            self.calls.map as f64 / REQUESTS as f64,
            self.calls.unmap as f64 / REQUESTS as f64,
            self.calls_per_request(),
            self.stalls,
            self.full_stalls,
            self.wrong,
            talk.calls_per_request() / self.calls_per_request(),
        );
    }
}

/// `iova`, with or without the memory's owners.
struct Ours<const OWNED: bool> {
    space: AddressSpace,
    _fixed: Vec<FixedMapping>,
}

impl<const OWNED: bool> Allocator for Ours<OWNED> {
    type Held = Vec<Mapped>;

    fn new(mapper: Arc<Counting>, fixed: &[HostMemory<'static>]) -> Self {
        let space = AddressSpace::with_retention(mapper, RETENTION).expect("a usable geometry");
        let fixed = fixed.iter().map(|memory| {
            // SAFETY: the mapper keeps books and never touches memory.
            let fixed =
                unsafe { space.try_register(*memory, Direction::Bidirectional, Arc::new(())) };
            fixed.expect("there is room at first")
        });
        Self {
            _fixed: fixed.collect(),
            space,
        }
    }

    fn submit(
        &mut self,
        request: &Request,
        in_flight: &mut VecDeque<Vec<Mapped>>,
    ) -> Submitted<Vec<Mapped>> {
        let segments = request.segments.iter().map(|memory| {
            let segment = Segment::new(*memory);
            if OWNED {
                segment.within(request.whole, Arc::clone(&request.owner))
            } else {
                segment
            }
        });
        // SAFETY: the mapper keeps books and never touches memory.
        let mut mapping = pin!(unsafe { self.space.map(segments, Direction::Bidirectional) });
        let mut context = Context::from_waker(Waker::noop());
        let mut stall = Stall::None;
        let held = loop {
            match mapping.as_mut().poll(&mut context) {
                Poll::Ready(mapped) => break mapped.expect("a request is less than the limit"),
                Poll::Pending => {
                    let ended = in_flight.pop_front();
                    ended.expect("a request that waits for nobody is served");
                    stall = if in_flight.is_empty() {
                        Stall::Full
                    } else {
                        Stall::Partial
                    };
                }
            }
        };
        Submitted {
            iovas: held.iter().map(Mapped::iova).collect(),
            stall,
            held,
        }
    }
}
