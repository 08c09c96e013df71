//! What else runs in a runtime whose queues are under load: a TCP echo and a timer of 1 ms.
//!
//! For each way to wait for completions the load, an echo server and a task with a timer share a
//! runtime; the echo's client is a thread of its own, which sends a message, waits until it is back, and
//! pauses. It needs a core, and so does the controller's thread. The baseline is the same load in the same
//! place with interrupts only: ratios are the median of the ratios in each round. `benches/ways.rs` says
//! what the ways are, and is about the reads.
//!
//! A timer of Tokio's goes off at a whole millisecond of the runtime's own, which cannot be asked for. So
//! a tick's lateness is counted from the earliest one of its run.

#[path = "support/arguments.rs"]
mod arguments;
#[path = "neighbours/beside.rs"]
mod beside;
#[path = "support/load.rs"]
mod load;
#[path = "support/rounds.rs"]
mod rounds;
#[path = "support/spin.rs"]
mod spin;
#[path = "support/table.rs"]
mod table;
#[path = "support/way.rs"]
mod way;

use std::time::Duration;

use clap::Parser;
use hdrhistogram::Histogram;
use tokio::time::sleep;

use crate::beside::{Neighbours, beside};
use crate::load::{Bed, Done, suited};
use crate::rounds::{alternate, median, ratio};
use crate::table::Table;
use crate::way::{Mode, Way};

/// The part of a run that is made before it, with the load alone.
const WARM_UP: u32 = 8;

/// Measures a TCP echo and a timer of 1 ms beside reads.
#[derive(Parser)]
#[command(name = "neighbours", bin_name = "cargo bench --bench neighbours --")]
struct Arguments {
    /// How often each way is measured.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The time for which a way is measured in a round.
    #[arg(long, default_value = "0.5", value_parser = arguments::seconds)]
    seconds: Duration,
    /// Reads that are outstanding together.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,32",
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    depths: Vec<u16>,
    /// The times, in microseconds, that the controller takes for a command.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "0,10,80",
        value_parser = arguments::microseconds
    )]
    latencies: Vec<Duration>,
}

fn main() {
    let smoke = "neighbours --rounds 2 --seconds 0.01 --depths 1,32 --latencies 0,80";
    for arguments in arguments::parse(&[smoke]) {
        run(&arguments);
    }
}

fn run(arguments: &Arguments) {
    let most = arguments.depths.iter().max();
    let most = most.map_or(0, |&depth| depth.into());
    for &latency in &arguments.latencies {
        let ways = Way::all();
        let mut beds: Vec<_> = ways.map(|way| Bed::open(way, latency, most)).collect();
        for &depth in &arguments.depths {
            let depth = usize::from(depth);
            let mut beds = suited(&mut beds, depth);
            let found = alternate(arguments.rounds, &mut beds, |bed| {
                measure(bed, depth, arguments.seconds)
            });
            println!(
                "### {} µs, QD {depth}: medians of {} rounds of {} s\n",
                latency.as_micros(),
                arguments.rounds,
                arguments.seconds.as_secs_f64()
            );
            println!("{}", table(&beds, &found));
        }
        beds.into_iter().for_each(Bed::close);
    }
}

fn measure(bed: &mut Bed, depth: usize, time: Duration) -> Figures {
    bed.run(depth, None, async || sleep(time / WARM_UP).await);
    let (done, neighbours) = bed.run(depth, None, async || beside(time).await);
    Figures::new(&done, &neighbours)
}

/// What a run was like. Times are in microseconds.
struct Figures {
    iops: f64,
    read: Quantiles,
    echo: Quantiles,
    timer: Quantiles,
}

struct Quantiles {
    p50: f64,
    p99: f64,
}

impl Figures {
    fn new(done: &Done, neighbours: &Neighbours) -> Self {
        Self {
            iops: done.latencies.len() as f64 / done.elapsed.as_secs_f64(),
            read: Quantiles::of(&done.latencies),
            echo: Quantiles::of(&neighbours.echo),
            timer: Quantiles::of(&neighbours.timer),
        }
    }
}

impl Quantiles {
    fn of(times: &Histogram<u64>) -> Self {
        let at = |quantile| times.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            p50: at(0.5),
            p99: at(0.99),
        }
    }
}

fn table(beds: &[&mut Bed], found: &[Vec<Figures>]) -> Table {
    let heads = [
        "where",
        "mode",
        "IOPS",
        "read p99 µs",
        "echo p50 µs",
        "echo p99 µs",
        "timer p50 µs late",
        "timer p99 µs late",
        "echo p50 by interrupt's",
        "echo p99 by interrupt's",
        "timer p99 by interrupt's",
    ];
    let mut table = Table::new(2, &heads);
    for (bed, figures) in beds.iter().zip(found) {
        let way = bed.way;
        let baseline = Way {
            mode: Mode::Interrupt,
            ..way
        };
        let baseline = beds.iter().position(|bed| bed.way == baseline);
        let baseline = &found[baseline.expect("all ways are there")];
        let of = |value: fn(&Figures) -> f64| median(figures.iter().map(value));
        let by = |value: fn(&Figures) -> f64| ratio(figures, baseline, value);
        table.row([
            way.place.to_string(),
            way.mode.to_string(),
            format!("{:.0}", of(|it| it.iops)),
            format!("{:.2}", of(|it| it.read.p99)),
            format!("{:.1}", of(|it| it.echo.p50)),
            format!("{:.1}", of(|it| it.echo.p99)),
            format!("{:.1}", of(|it| it.timer.p50)),
            format!("{:.1}", of(|it| it.timer.p99)),
            format!("{:.2}", by(|it| it.echo.p50)),
            format!("{:.2}", by(|it| it.echo.p99)),
            format!("{:.2}", by(|it| it.timer.p99)),
        ]);
    }
    table
}
