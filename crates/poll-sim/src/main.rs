//! Compares policies that say when to poll for completions and when to sleep, in virtual time.

mod chart;
mod contest;
mod host;
mod models;
mod ours;
mod policy;
mod report;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use self::contest::{MACHINES, Round};

/// Our policy must not be worse than another one by more, in percent.
const TOLERANCE: f64 = 2.0;

/// Runs polling policies on traces of completions, prints what each costs, and fails if one is better
/// than ours.
#[derive(Debug, Parser)]
struct Arguments {
    /// Only traces whose names contain this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    trace: String,
    /// How often each trace is drawn.
    #[arg(long, value_name = "NUMBER", default_value_t = 4)]
    seeds: u64,
    /// How many commands there are in each.
    #[arg(long, value_name = "NUMBER", default_value_t = 10_000)]
    commands: u64,
    /// Draws from the seeds that the policy was tuned with, instead of those that were kept back.
    #[arg(long)]
    tuning: bool,
    /// Where a picture is drawn.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let offset = u64::from(!arguments.tuning);
    let seeds = (0..arguments.seeds).map(|seed| 2 * seed + offset);
    let traces = trace::all(arguments.commands);
    let wanted = traces
        .iter()
        .filter(|trace| trace.name.contains(&arguments.trace));
    let mut rounds = Vec::new();
    for trace in wanted {
        for machine in MACHINES {
            let round = Round::run(trace, machine, seeds.clone());
            report::print(&round);
            rounds.push(round);
        }
    }
    if let Some(path) = &arguments.svg {
        let drawn = MACHINES[0].name;
        let rounds = rounds.iter().filter(|round| round.machine.name == drawn);
        chart::draw(path, &rounds.collect::<Vec<_>>())?;
    }
    let worse = report::summary(&rounds, TOLERANCE);
    Ok(match worse {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}
