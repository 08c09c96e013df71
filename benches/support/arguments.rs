//! The arguments of benchmarks that go by turns.

use std::env;
use std::time::Duration;

use clap::Parser;

/// The arguments of each run that is to be made.
///
/// `cargo bench` says `--bench`, and there is one run. Otherwise it is `cargo test` that runs the
/// program, with what is meant for tests, and it is only to be shown that all of it works: by the runs
/// `smoke`.
pub(crate) fn parse<A: Parser>(smoke: &[&str]) -> Vec<A> {
    let mut given: Vec<_> = env::args_os().collect();
    let said = |given: &[_], what: &str| given.iter().any(|it| it == what);
    if said(&given, "--bench") && !said(&given, "--test") {
        given.retain(|it| it != "--bench");
        return vec![A::parse_from(given)];
    }
    println!("No measurement, only a test that it works: `cargo bench` measures.");
    let runs = smoke.iter();
    runs.map(|run| A::parse_from(run.split_whitespace()))
        .collect()
}

/// Parses a time in seconds.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok();
    let time = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    time.filter(|time| !time.is_zero())
        .ok_or_else(|| format!("{text:?} is not a time in seconds, such as 0.2"))
}

/// Parses a time in microseconds.
pub(crate) fn microseconds(text: &str) -> Result<Duration, String> {
    let time = text.parse().map(Duration::from_micros);
    time.map_err(|_| format!("{text:?} is not a whole number of microseconds"))
}
