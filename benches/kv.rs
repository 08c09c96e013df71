//! Durable key-value stores, compared by turns on one file system: the example `kv` on a file, Redis with
//! `appendfsync always`, and in this process the crates fjall and redb with a sync for each write.
//!
//! `cargo xtask kv-bench` installs what this needs, builds the example and runs it. The servers are loaded
//! by `redis-benchmark`, the crates by as many threads as there would be clients: they have no network to
//! wait for. In each round the contenders take turns, in an order that differs from round to round.
//!
//! With `--keys` it measures instead what a key takes of memory, and how long the example's recovery takes.

#[path = "support/arguments.rs"]
#[expect(dead_code, reason = "there are no times here")]
mod arguments;
#[path = "kv/embedded.rs"]
mod embedded;
#[path = "kv/recovery.rs"]
mod recovery;
#[path = "support/rounds.rs"]
mod rounds;
#[path = "kv/served.rs"]
mod served;
#[path = "support/table.rs"]
mod table;

use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};

use crate::embedded::{Fjall, Redb};
use crate::rounds::{alternate, median, ratio};
use crate::served::Served;
use crate::table::Table;

/// Keys that there are.
const KEYS: u64 = 10_000;

/// Compares durable key-value stores.
#[derive(Parser)]
#[command(name = "kv", bin_name = "cargo xtask kv-bench --")]
struct Arguments {
    /// The program of the example.
    #[arg(long, default_value = "target/release/examples/kv")]
    kv: PathBuf,
    /// Where the data is; a directory in it, which is removed at the end.
    #[arg(long, default_value = "target")]
    directory: PathBuf,
    /// How often each is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How many requests, in percent of what is usual.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    percent: u64,
    /// Those that are compared.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "kv,redis,fjall,redb"
    )]
    only: Vec<Name>,
    /// Instead, store so many keys in the example, and measure its memory and its recovery.
    #[arg(long)]
    keys: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    Kv,
    Redis,
    Fjall,
    Redb,
}

/// What is asked of a store.
#[derive(Clone, Copy, Debug)]
struct Case {
    is_write: bool,
    /// Of values.
    bytes: usize,
    clients: u64,
    /// Requests of a client that are outstanding.
    pipeline: u64,
    requests: u64,
}

/// Something that is asked.
trait Contender {
    /// Requests in a second; nothing where it has no such thing.
    fn measure(&mut self, case: &Case) -> Option<f64>;
}

fn cases(percent: u64) -> Vec<Case> {
    let mut cases = Vec::new();
    for is_write in [true, false] {
        for bytes in [100, 4096] {
            for (clients, pipeline, requests) in [(1, 1, 4000), (50, 1, 30_000), (50, 16, 100_000)]
            {
                cases.push(Case {
                    is_write,
                    bytes,
                    clients,
                    pipeline,
                    requests: (requests * percent / 100).max(clients * pipeline),
                });
            }
        }
    }
    cases
}

fn open(name: Name, arguments: &Arguments, directory: &Path) -> (Name, Box<dyn Contender>) {
    let directory = directory.join(format!("{name:?}"));
    std::fs::create_dir(&directory).expect("there is room for a directory");
    let contender: Box<dyn Contender> = match name {
        Name::Kv => Box::new(Served::kv(&arguments.kv, &directory, "1G")),
        Name::Redis => Box::new(Served::redis(&directory)),
        Name::Fjall => Box::new(Fjall::open(&directory)),
        Name::Redb => Box::new(Redb::open(&directory)),
    };
    (name, contender)
}

fn main() {
    for arguments in arguments::parse::<Arguments>(&["kv --only fjall,redb --rounds 1 --percent 1"])
    {
        let directory = tempfile::tempdir_in(&arguments.directory).expect("there is room");
        match arguments.keys {
            Some(keys) => recovery::measure(&arguments.kv, directory.path(), keys),
            None => compare(&arguments, directory.path()),
        }
    }
}

fn compare(arguments: &Arguments, directory: &Path) {
    let names = arguments.only.iter();
    let mut contenders: Vec<_> = names
        .map(|name| open(*name, arguments, directory))
        .collect();
    let mut heads = vec!["operation", "value", "clients", "pipeline"];
    let titles: Vec<_> = arguments
        .only
        .iter()
        .map(|name| format!("{name:?}"))
        .collect();
    heads.extend(titles.iter().map(String::as_str));
    let ratios =
        contenders[0].0 == Name::Kv && contenders.iter().any(|(name, _)| *name == Name::Redis);
    if ratios {
        heads.push("Kv / Redis");
    }
    let mut table = Table::new(1, &heads);
    for case in cases(arguments.percent) {
        let mut all: Vec<_> = contenders.iter_mut().collect();
        let found = alternate(arguments.rounds, &mut all, |(_, contender)| {
            contender.measure(&case)
        });
        let mut row = vec![
            if case.is_write { "SET" } else { "GET" }.to_owned(),
            format!("{} B", case.bytes),
            case.clients.to_string(),
            case.pipeline.to_string(),
        ];
        row.extend(found.iter().map(|rates| {
            let rate = median(rates.iter().flatten().copied());
            match rate.is_nan() {
                true => "".to_owned(),
                false => format!("{:.1} k/s", rate / 1000.0),
            }
        }));
        if ratios {
            let redis = arguments.only.iter().position(|name| *name == Name::Redis);
            let rate = |rate: &Option<f64>| rate.unwrap_or(f64::NAN);
            let ratio = ratio(&found[0], &found[redis.unwrap_or(0)], rate);
            row.push(format!("{ratio:.2}"));
        }
        table.row(row);
        eprintln!("{case:?} done");
    }
    println!(
        "Requests in a second, medians of {} rounds:\n\n{table}",
        arguments.rounds
    );
}
