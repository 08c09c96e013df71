//! Many histories, and the tests of the simulation itself.

use std::thread;

use super::coverage::Coverage;
use super::memory::Memory;
use super::model::Sabotage;
use super::sim::Simulation;

/// How many histories are played. The full counts are for optimized code.
fn seeds() -> u64 {
    let full = std::env::var_os("NVME_ASYNC_FULL").is_some_and(|value| value == "1");
    match (full, cfg!(debug_assertions)) {
        (false, _) => 1000,
        (true, true) => 10_000,
        (true, false) => 100_000,
    }
}

/// The one history that is wanted.
pub(super) fn replayed() -> Option<u64> {
    let seed = std::env::var_os("NVME_ASYNC_SEED")?;
    let seed = seed.to_str().and_then(|seed| seed.parse().ok());
    Some(seed.expect("NVME_ASYNC_SEED is a number"))
}

/// Says which history it is when something in it panics.
struct Replay(u64);

impl Replay {
    fn advice(&self) -> String {
        let Self(seed) = self;
        format!(
            "history {seed} fails; again: NVME_ASYNC_SEED={seed} cargo test -p nvme-async --lib recovery::tests::runs::every -- --nocapture"
        )
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.advice());
        }
    }
}

fn play(
    seed: u64,
    memory: &Memory,
    sabotage: Option<Sabotage>,
    coverage: &mut Coverage,
) -> Result<(), String> {
    let summary = Simulation::run(seed, memory, sabotage)?;
    coverage.add(&summary.trail, summary.faults);
    coverage.operations += summary.operations;
    Ok(())
}

#[test]
fn every_operation_resolves_and_no_byte_is_lost() {
    let memory = Memory::new();
    let mut coverage = Coverage::default();
    if let Some(seed) = replayed() {
        let _replay = Replay(seed);
        return play(seed, &memory, None, &mut coverage).unwrap();
    }
    for seed in 0..seeds() {
        let replay = Replay(seed);
        if let Err(error) = play(seed, &memory, None, &mut coverage) {
            panic!("{error}");
        }
        drop(replay);
    }
    println!(
        "{} histories, {} operations, {} resets; {} ended with a controller that works",
        coverage.histories, coverage.operations, coverage.resets, coverage.live
    );
    let gaps = coverage.gaps();
    assert!(gaps.is_empty(), "the histories have gaps: {gaps:#?}");
}

/// What is broken on purpose is noticed in one of the first histories, and as what it is.
fn finds(sabotage: Sabotage, as_what: &str) {
    const WITHIN: u64 = 300;
    let memory = Memory::new();
    let noticed = |seed| {
        let error = Simulation::run(seed, &memory, Some(sabotage)).err()?;
        Some((seed, error)).filter(|(_, error)| error.contains(as_what))
    };
    let (seed, error) = (0..WITHIN).find_map(noticed).expect("it is noticed");
    println!("{sabotage:?} is noticed in history {seed}: {error}");
    Simulation::run(seed, &memory, None).expect("it is nothing else that was noticed");
}

#[test]
fn memory_that_is_released_before_the_device_has_stopped_is_noticed() {
    finds(
        Sabotage::EarlyRelease,
        "is executed, and its memory belongs to",
    );
}

#[test]
fn a_write_that_is_repeated_and_may_not_is_noticed() {
    finds(Sabotage::RepeatsWrites, "came again, and may not");
}

#[test]
fn a_victim_that_is_forgotten_is_noticed() {
    finds(Sabotage::ForgetsVictims, "are the most");
}

#[test]
fn a_ring_that_is_not_emptied_is_noticed() {
    finds(Sabotage::StaleRings, "is not empty");
}
