//! Small traces, computed by hand.

use super::*;
use crate::models::{Fixed, Interrupt, Polling};
use crate::trace::{Load, Neighbour, Service};

/// Wakes up after exactly as long as it says, as no real one does.
const MACHINE: Machine = Machine {
    name: "exact",
    wake_cpu: 3_000,
    wake_latency: 0,
};

fn trace(service: Service, load: Load, neighbour: Option<Neighbour>, commands: u64) -> Trace {
    Trace::new(service, load, neighbour, commands)
}

fn one_at_a_time(policy: &mut dyn Policy) -> Outcome {
    let trace = trace(Service::Constant(10_000), Load::Closed(1), None, 1_000);
    run(&trace, 1, MACHINE, policy)
}

#[test]
fn polling_takes_all_the_time_that_the_device_takes() {
    let outcome = one_at_a_time(&mut Polling);
    assert_eq!(outcome.added.len(), 1_000);
    assert_eq!(outcome.percentile(50.0), LOOK);
    assert_eq!(outcome.percentile(100.0), LOOK);
    // 250 + 10000 ± 250 + 50 + 250.
    let cpu = outcome.cpu_per_io();
    assert!((10_500.0..10_600.0).contains(&cpu), "{cpu}");
}

#[test]
fn an_interrupt_costs_its_price() {
    let outcome = one_at_a_time(&mut Interrupt);
    assert_eq!(outcome.added.len(), 1_000);
    assert_eq!(outcome.percentile(100.0), 0);
    // 250 + 3000 + 250.
    assert_eq!(outcome.cpu_per_io(), 3_500.0);
}

#[test]
fn a_window_that_is_too_short_costs_both() {
    let outcome = one_at_a_time(&mut Fixed::new(5_000));
    // 250 + 5000 + 3000 + 250.
    assert_eq!(outcome.cpu_per_io(), 8_500.0);
}

#[test]
fn a_wake_up_is_late() {
    let machine = Machine {
        wake_latency: 10_000,
        ..MACHINE
    };
    let trace = trace(Service::Constant(10_000), Load::Closed(1), None, 2_000);
    let outcome = run(&trace, 1, machine, &mut Interrupt);
    let mean = outcome.added.mean();
    assert!((9_500.0..10_500.0).contains(&mean), "{mean}");
    // Never sooner than three quarters of what is typical.
    assert!(outcome.added.min() >= 7_490);
}

#[test]
fn what_completes_while_a_neighbour_runs_is_late() {
    let neighbour = Neighbour {
        length: 200_000,
        percent: 50,
    };
    let trace = trace(
        Service::Constant(10_000),
        Load::Closed(1),
        Some(neighbour),
        5_000,
    );
    let outcome = run(&trace, 1, MACHINE, &mut Polling);
    assert_eq!(outcome.percentile(50.0), LOOK);
    assert!(outcome.added.max() > 150_000);
    // Its time is not ours: there is less than that of the device.
    let cpu = outcome.cpu_per_io();
    assert!((10_000.0..10_600.0).contains(&cpu), "{cpu}");
}

#[test]
fn every_command_of_every_trace_is_done() {
    for trace in crate::trace::all(300) {
        for seed in 0..2 {
            let outcome = run(&trace, seed, MACHINE, &mut Fixed::new(10_000));
            assert_eq!(outcome.added.len(), 300, "{}", trace.name);
        }
    }
}

#[test]
fn a_seed_decides_everything() {
    let traces = crate::trace::all(500);
    let trace = traces.last().expect("there are some");
    let cpu = |seed| run(trace, seed, MACHINE, &mut Fixed::new(10_000)).cpu;
    assert_eq!(cpu(3), cpu(3));
    assert_ne!(cpu(3), cpu(5));
}
