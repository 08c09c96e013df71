//! Ways to wait for completions, compared on the embedded software controller.
//!
//! There are places in which the time is spent (the reaper in ordinary runtimes; the park hook, with a
//! shared and with a local handle) and modes, in which one is told of completions. `busy` is pure
//! polling by the same engine, without interrupts and without an end of the window; `interrupt` is pure
//! interrupt. Ratios are to one of those in the same place: the median of the ratios in each round.
//! Criterion measures one function after the other, so this has a harness of its own, in which all take
//! turns in each round.
//!
//! CPU time is that of all threads but the software controller's. At a service time of 0 µs its thread
//! needs a core of its own, so there have to be two, or three for `multi_thread`.
//!
//! `in-poll spin` has a read wait inside of its own poll, at depth 1: `benches/support/spin.rs` says how,
//! and why not with more. The crate itself has no such mode.

#[path = "support/arguments.rs"]
mod arguments;
#[path = "ways/figures.rs"]
mod figures;
#[path = "support/load.rs"]
mod load;
#[path = "support/rounds.rs"]
mod rounds;
#[path = "support/spin.rs"]
mod spin;
#[path = "support/table.rs"]
mod table;
#[path = "ways/targets.rs"]
mod targets;
#[path = "support/way.rs"]
mod way;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tokio::time::sleep;

use crate::figures::{Figures, Sample};
use crate::load::{Bed, suited};
use crate::rounds::{alternate, median, ratio};
use crate::table::Table;
use crate::targets::{Medians, Targets};
use crate::way::{Mode, Way};

/// The time between two paced reads.
const PACE: Duration = Duration::from_millis(1);
/// A service time for which it is better to sleep.
const PACED_LATENCY: Duration = Duration::from_micros(80);
/// So many times longer a run of paced reads is, in which there are few of them.
const PACED_RUN: u32 = 5;
/// The part of a run that is made before it and not measured.
const WARM_UP: u32 = 4;

/// Compares the ways to wait for completions.
#[derive(Parser)]
#[command(name = "ways", bin_name = "cargo bench --bench ways --")]
struct Arguments {
    /// How often each way is measured.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The time for which a way is measured in a round; five times as long with --paced.
    #[arg(long, default_value = "0.2", value_parser = arguments::seconds)]
    seconds: Duration,
    /// Reads that are outstanding together.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,4,32,128",
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
    /// Instead, measure 1,000 reads in a second on a controller that takes 80 µs for each.
    #[arg(long)]
    paced: bool,
    /// Fail if a target is not met.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let smoke = [
        "ways --rounds 2 --seconds 0.004 --depths 1,32 --latencies 0,80",
        "ways --rounds 2 --seconds 0.004 --paced",
    ];
    let mut failed = false;
    for arguments in arguments::parse::<Arguments>(&smoke) {
        let mut targets = Targets::default();
        match arguments.paced {
            true => paced(&arguments, &mut targets),
            false => closed(&arguments, &mut targets),
        }
        println!("### Targets\n\n{targets}");
        failed |= arguments.check && !targets.are_met();
    }
    ExitCode::from(u8::from(failed))
}

/// Reads one after the other, at each service time and depth.
fn closed(arguments: &Arguments, targets: &mut Targets) {
    let most = arguments
        .depths
        .iter()
        .max()
        .map_or(0, |&depth| depth.into());
    for &latency in &arguments.latencies {
        let mut beds = open(latency, most);
        for &depth in &arguments.depths {
            let depth = usize::from(depth);
            let mut beds = suited(&mut beds, depth);
            let found = alternate(arguments.rounds, &mut beds, |bed| {
                measure(bed, depth, None, arguments.seconds)
            });
            println!(
                "### {} µs, QD {depth}: medians of {} rounds of {} s\n",
                latency.as_micros(),
                arguments.rounds,
                arguments.seconds.as_secs_f64()
            );
            let heads = [HEADS.as_slice(), &["latency by busy's", "IOPS by busy's"]].concat();
            let mut table = Table::new(2, &heads);
            for (way, figures, medians) in summary(&beds, &found) {
                targets.look(latency, depth, &medians);
                let ratios = [medians.latency_ratio, medians.iops_ratio];
                table.row(
                    row(way, figures)
                        .into_iter()
                        .chain(ratios.map(two_decimals)),
                );
            }
            println!("{table}");
        }
        beds.into_iter().for_each(Bed::close);
    }
}

/// Reads at times that are given.
fn paced(arguments: &Arguments, targets: &mut Targets) {
    let time = arguments.seconds * PACED_RUN;
    let mut opened = open(PACED_LATENCY, 1);
    let mut beds = suited(&mut opened, 1);
    let found = alternate(arguments.rounds, &mut beds, |bed| {
        measure(bed, 1, Some(PACE), time)
    });
    println!(
        "### {} µs, a read in each {PACE:?}: medians of {} rounds of {} s\n",
        PACED_LATENCY.as_micros(),
        arguments.rounds,
        time.as_secs_f64()
    );
    let heads = [HEADS.as_slice(), &["CPU by interrupt's"]].concat();
    let mut table = Table::new(2, &heads);
    for (way, figures, medians) in summary(&beds, &found) {
        targets.look_at_paced(PACED_LATENCY, &medians);
        let ratio = two_decimals(medians.cpu_ratio);
        table.row(row(way, figures).into_iter().chain([ratio]));
    }
    println!("{table}");
    opened.into_iter().for_each(Bed::close);
}

fn open(latency: Duration, depth: usize) -> Vec<Bed> {
    let ways = Way::all();
    ways.map(|way| Bed::open(way, latency, depth)).collect()
}

fn measure(bed: &mut Bed, depth: usize, every: Option<Duration>, time: Duration) -> Figures {
    let controller = bed.controller();
    bed.run(depth, every, async || sleep(time / WARM_UP).await);
    let before = Sample::take(&controller);
    let (done, ()) = bed.run(depth, every, async || sleep(time).await);
    let after = Sample::take(&controller);
    Figures::new(&done, &before, &after)
}

/// What was found of each way, with its medians.
fn summary<'a>(
    beds: &'a [&mut Bed],
    found: &'a [Vec<Figures>],
) -> impl Iterator<Item = (Way, &'a [Figures], Medians)> {
    let of = |way: Way, mode: Mode| {
        let reference = Way { mode, ..way };
        let index = beds.iter().position(|bed| bed.way == reference);
        &found[index.expect("all ways are there")]
    };
    beds.iter().zip(found).map(move |(bed, found)| {
        let busy = of(bed.way, Mode::Busy);
        let interrupt = of(bed.way, Mode::Interrupt);
        let medians = Medians {
            way: bed.way,
            latency_ratio: ratio(found, busy, |it| it.p50),
            iops_ratio: ratio(found, busy, |it| it.iops),
            cpu_ratio: ratio(found, interrupt, |it| it.cpu),
            interrupts: median(found.iter().map(|it| it.interrupts)),
            doorbells: median(found.iter().map(|it| it.doorbells)),
        };
        (bed.way, found.as_slice(), medians)
    })
}

const HEADS: [&str; 9] = [
    "where",
    "mode",
    "IOPS",
    "p50 µs",
    "p99 µs",
    "CPU µs per read",
    "interrupts per read",
    "SQ doorbells per read",
    "mean batch",
];

fn row(way: Way, figures: &[Figures]) -> Vec<String> {
    let of = |value: fn(&Figures) -> f64| median(figures.iter().map(value));
    vec![
        way.place.to_string(),
        way.mode.to_string(),
        format!("{:.0}", of(|it| it.iops)),
        two_decimals(of(|it| it.p50)),
        two_decimals(of(|it| it.p99)),
        two_decimals(of(|it| it.cpu)),
        format!("{:.3}", of(|it| it.interrupts)),
        format!("{:.3}", of(|it| it.doorbells)),
        two_decimals(of(|it| it.batch)),
    ]
}

fn two_decimals(value: f64) -> String {
    format!("{value:.2}")
}
