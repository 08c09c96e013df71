//! What arrives, how long the device takes for it, and what else runs on the core.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use fastrand::Rng;

use crate::policy::{Kind, Nanos};

const MICROSECOND: Nanos = 1_000;
const MILLISECOND: Nanos = 1_000_000;
const SECOND: Nanos = 1_000_000_000;

/// How long commands take.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Service {
    /// All about the same.
    Constant(Nanos),
    /// One in a hundred takes 2 ms.
    Bimodal(Nanos),
    /// Reads and writes, as many of each.
    Mixed { read: Nanos, write: Nanos },
}

/// When commands arrive.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Load {
    /// So many at a time: the next one when one is done.
    Closed(usize),
    /// So many in a second, at random times.
    Open(u64),
    /// So many at once, and then none for 100 µs to 1 s.
    Bursts(u64),
}

/// Something else that runs on the core.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neighbour {
    /// How long it runs each time.
    pub(crate) length: Nanos,
    /// The share of the core that it wants, in percent.
    pub(crate) percent: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Trace {
    pub(crate) name: String,
    service: Service,
    load: Load,
    neighbour: Option<Neighbour>,
    /// How many commands the device executes at a time.
    width: usize,
    commands: u64,
}

/// All of them. `commands` is how many each has.
pub(crate) fn all(commands: u64) -> Vec<Trace> {
    use Load::{Bursts, Closed, Open};
    use Service::{Bimodal, Constant, Mixed};

    let microseconds = |time: Nanos| time * MICROSECOND;
    let constant = |time| (format!("{time} µs"), Constant(microseconds(time)));
    let bimodal = || ("10 µs, 1 % 2 ms".to_owned(), Bimodal(microseconds(10)));
    let mixed = || {
        let (read, write) = (microseconds(80), microseconds(10));
        (
            "reads 80 µs, writes 10 µs".to_owned(),
            Mixed { read, write },
        )
    };
    let neighbour = Some(Neighbour {
        length: microseconds(20),
        percent: 40,
    });
    let closed = |depth| (format!("QD {depth}"), Closed(depth));
    let open = |rate: u64| (format!("{} k IOPS", rate / 1000), Open(rate));
    let bursts = |size: u64| (format!("bursts of {size}"), Bursts(size));
    let mut traces = Vec::new();
    let mut add = |(device, service): (String, _), (load_name, load): (String, _), neighbour| {
        let beside = if Option::is_some(&neighbour) {
            ", beside a neighbour"
        } else {
            ""
        };
        traces.push(Trace {
            name: format!("{device}, {load_name}{beside}"),
            ..Trace::new(service, load, neighbour, commands)
        });
    };
    for time in [5, 10, 20, 80] {
        for depth in [1, 4, 32, 128] {
            add(constant(time), closed(depth), None);
        }
    }
    for device in [bimodal(), mixed()] {
        for depth in [1, 4, 32, 128] {
            add(device.clone(), closed(depth), None);
        }
    }
    for rate in [1_000, 10_000, 100_000, 1_000_000] {
        for device in [constant(10), constant(80), bimodal(), mixed()] {
            add(device, open(rate), None);
        }
    }
    for device in [constant(10), constant(80)] {
        for size in [1, 32] {
            add(device.clone(), bursts(size), None);
        }
        for depth in [1, 32] {
            add(device.clone(), closed(depth), neighbour);
        }
        add(device.clone(), open(10_000), neighbour);
    }
    traces
}

impl Trace {
    /// One without a name.
    pub(crate) fn new(
        service: Service,
        load: Load,
        neighbour: Option<Neighbour>,
        commands: u64,
    ) -> Self {
        Self {
            name: String::new(),
            service,
            load,
            neighbour,
            width: 64,
            commands,
        }
    }

    pub(crate) fn begin(&self, seed: u64) -> Work {
        let mut work = Work {
            service: self.service,
            load: self.load,
            neighbour: self.neighbour,
            left: self.commands,
            arrivals: BinaryHeap::new(),
            free: (0..self.width).map(|_| Reverse(0)).collect(),
            next_job: self.neighbour.map(|_| 0),
            next: 0,
            burst: 0,
            // One for each purpose: what a policy does must not change what the others draw.
            arrival_times: Rng::with_seed(seed ^ 0x_a221_4a11),
            service_times: Rng::with_seed(seed ^ 0x_5e24_1ce5),
            job_times: Rng::with_seed(seed ^ 0x_10b5),
        };
        match self.load {
            Load::Closed(depth) => {
                for _ in 0..depth {
                    work.schedule(0);
                }
            }
            Load::Open(_) | Load::Bursts(_) => work.schedule(0),
        }
        work
    }
}

/// A trace under way.
pub(crate) struct Work {
    service: Service,
    load: Load,
    neighbour: Option<Neighbour>,
    left: u64,
    arrivals: BinaryHeap<Reverse<Nanos>>,
    /// When each of those that execute commands is free.
    free: BinaryHeap<Reverse<Nanos>>,
    next_job: Option<Nanos>,
    next: u64,
    burst: u64,
    arrival_times: Rng,
    service_times: Rng,
    job_times: Rng,
}

impl Work {
    /// When the next command arrives.
    pub(crate) fn arrival(&self) -> Option<Nanos> {
        self.arrivals.peek().map(|&Reverse(at)| at)
    }

    /// When the neighbour next wants to run.
    pub(crate) fn job(&self) -> Option<Nanos> {
        self.next_job
    }

    /// The next command is submitted.
    pub(crate) fn arrive(&mut self) -> Kind {
        let Reverse(at) = self.arrivals.pop().expect("one has arrived");
        match self.load {
            Load::Closed(_) => {}
            Load::Open(rate) => {
                let gap = exponential(&mut self.arrival_times, SECOND / rate);
                self.schedule(at + gap);
            }
            Load::Bursts(size) => {
                self.burst += 1;
                let gap = if self.burst.is_multiple_of(size) {
                    // Each length of a gap is as likely as ten times that.
                    let exponent = 4.0 * self.arrival_times.f64();
                    (100.0 * MICROSECOND as f64 * 10f64.powf(exponent)) as Nanos
                } else {
                    0
                };
                self.schedule(at + gap);
            }
        }
        self.next += 1;
        match self.service {
            Service::Mixed { .. } if self.service_times.bool() => Kind::Write,
            _ => Kind::Read,
        }
    }

    /// A command was taken: in a closed loop the next one follows.
    pub(crate) fn completed(&mut self, now: Nanos) {
        if let Load::Closed(_) = self.load {
            self.schedule(now);
        }
    }

    /// When the device has executed a command that it is given now.
    pub(crate) fn serve(&mut self, now: Nanos, kind: Kind) -> Nanos {
        let typical = match (self.service, kind) {
            (Service::Constant(time), _) => time,
            (Service::Bimodal(_), _) if self.service_times.u32(..100) == 0 => 2 * MILLISECOND,
            (Service::Bimodal(time), _) => time,
            (Service::Mixed { read, .. }, Kind::Read) => read,
            (Service::Mixed { write, .. }, Kind::Write) => write,
        };
        // Within 5 %, most of them near to the middle.
        let jitter = (0..3).map(|_| self.service_times.f64() - 0.5).sum::<f64>() / 1.5 * 0.05;
        let time = (typical as f64 * (1.0 + jitter)) as Nanos;
        let Reverse(free) = self.free.pop().expect("it is as wide as it was");
        let end = free.max(now) + time;
        self.free.push(Reverse(end));
        end
    }

    /// Lets the neighbour run if it wants to: how long it does.
    pub(crate) fn run_job(&mut self, now: Nanos) -> Option<Nanos> {
        let neighbour = self.neighbour?;
        let due = self.next_job.filter(|&at| at <= now)?;
        let pause = neighbour.length * 100 / neighbour.percent;
        // It does not catch up.
        self.next_job = Some(due.max(now) + exponential(&mut self.job_times, pause));
        Some(neighbour.length)
    }

    fn schedule(&mut self, at: Nanos) {
        if self.left > 0 {
            self.left -= 1;
            self.arrivals.push(Reverse(at));
        }
    }
}

/// A random time with this mean.
fn exponential(rng: &mut Rng, mean: Nanos) -> Nanos {
    (-(1.0 - rng.f64()).ln() * mean as f64) as Nanos
}
