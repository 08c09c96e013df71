//! What is printed.

use crate::contest::{CONTENDERS, Round};

/// A table of one round.
pub(crate) fn print(round: &Round<'_>) {
    println!("\n{} on {}", round.trace.name, round.machine.name);
    println!(
        "{:>20} {:>12} {:>12} {:>12} {:>12}",
        "", "CPU / I/O", "mean added", "p50", "p99"
    );
    for (contender, outcome) in CONTENDERS.iter().zip(&round.outcomes) {
        println!(
            "{:>20} {:>9.2} µs {:>9.2} µs {:>9.2} µs {:>9.2} µs",
            contender.name,
            outcome.cpu_per_io() / 1000.0,
            outcome.added.mean() / 1000.0,
            outcome.percentile(50.0) as f64 / 1000.0,
            outcome.percentile(99.0) as f64 / 1000.0,
        );
    }
}

/// Who is better than ours, and where; returns in how many rounds somebody is.
pub(crate) fn summary(rounds: &[Round<'_>], tolerance: f64) -> usize {
    println!();
    let mut worse = 0;
    for round in rounds {
        let dominating = round.dominating(tolerance);
        if !dominating.is_empty() {
            worse += 1;
            println!(
                "{} on {}: better by more than {tolerance} %: {}",
                round.trace.name,
                round.machine.name,
                dominating.join(", ")
            );
        }
    }
    println!("ours is dominated in {worse} of {} rounds", rounds.len());
    worse
}
