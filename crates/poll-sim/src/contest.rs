//! All policies on all traces, and who is better than whom.

use poll_window::Costs;

use crate::host::{Machine, Outcome, run};
use crate::models::{Fixed, Hybrid, Interrupt, Kvm, Oracle, Polling, Qemu2016, Qemu2025, Qemu2026};
use crate::ours::Ours;
use crate::policy::Policy;
use crate::trace::Trace;

/// A server without virtualization, and a virtual machine, where waking up takes an exit to the host.
pub(crate) const MACHINES: [Machine; 2] = [
    Machine {
        name: "bare metal",
        wake_cpu: 3_000,
        wake_latency: 5_000,
    },
    Machine {
        name: "virtual machine",
        wake_cpu: 8_000,
        wake_latency: 20_000,
    },
];

/// Differences of latency below this are none, in nanoseconds: a look takes as long.
const INDISTINGUISHABLE: f64 = 50.0;

/// One who takes part.
#[derive(Clone, Copy)]
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    /// Whether it knows the future.
    pub(crate) is_oracle: bool,
    make: fn(Machine) -> Box<dyn Policy>,
}

pub(crate) const OURS: &str = "poll-window";

/// All, ours first.
pub(crate) const CONTENDERS: [Contender; 12] = {
    const fn contender(name: &'static str, make: fn(Machine) -> Box<dyn Policy>) -> Contender {
        Contender {
            name,
            is_oracle: false,
            make,
        }
    }
    [
        contender(OURS, |machine| {
            Box::new(Ours::new(Costs {
                wake_cpu: machine.wake_cpu,
                wake_latency: machine.wake_latency,
                ..Costs::default()
            }))
        }),
        contender("QEMU 2016", |_| Box::new(Qemu2016::default())),
        contender("QEMU 2025", |_| Box::new(Qemu2025::default())),
        contender("QEMU 2026", |_| Box::new(Qemu2026::default())),
        contender("KVM halt polling", |_| Box::new(Kvm::default())),
        contender("block layer hybrid", |_| Box::new(Hybrid::default())),
        contender("10 µs window", |_| Box::new(Fixed::new(10_000))),
        contender("50 µs window", |_| Box::new(Fixed::new(50_000))),
        contender("100 µs window", |_| Box::new(Fixed::new(100_000))),
        contender("interrupt", |_| Box::new(Interrupt)),
        contender("polling", |_| Box::new(Polling)),
        Contender {
            name: "oracle",
            is_oracle: true,
            make: |machine| Box::new(Oracle::new(machine.wake_latency, machine.wake_cpu)),
        },
    ]
};

/// How all contenders did on one trace on one machine.
pub(crate) struct Round<'a> {
    pub(crate) trace: &'a Trace,
    pub(crate) machine: Machine,
    /// In the order of [`CONTENDERS`].
    pub(crate) outcomes: Vec<Outcome>,
}

impl<'a> Round<'a> {
    pub(crate) fn run(
        trace: &'a Trace,
        machine: Machine,
        seeds: impl Iterator<Item = u64> + Clone,
    ) -> Self {
        let outcome = |contender: &Contender| {
            let mut outcome = Outcome::new();
            for seed in seeds.clone() {
                let mut policy = (contender.make)(machine);
                outcome.merge(&run(trace, seed, machine, &mut *policy));
            }
            outcome
        };
        Self {
            trace,
            machine,
            outcomes: CONTENDERS.iter().map(outcome).collect(),
        }
    }

    /// Those who are better than ours in something by more than `tolerance` percent, and in nothing
    /// worse.
    pub(crate) fn dominating(&self, tolerance: f64) -> Vec<&'static str> {
        let ours = &self.outcomes[0];
        let rivals = CONTENDERS.iter().zip(&self.outcomes).skip(1);
        let rivals = rivals.filter(|(contender, _)| !contender.is_oracle);
        let better = rivals.filter(|(_, rival)| dominates(rival, ours, tolerance));
        better.map(|(contender, _)| contender.name).collect()
    }
}

/// Whether `rival` is nowhere worse than `ours`, and somewhere better by more than that.
fn dominates(rival: &Outcome, ours: &Outcome, tolerance: f64) -> bool {
    let latencies = [
        (rival.percentile(50.0) as f64, ours.percentile(50.0) as f64),
        (rival.percentile(99.0) as f64, ours.percentile(99.0) as f64),
        (rival.added.mean(), ours.added.mean()),
    ];
    let cpu = (rival.cpu_per_io(), ours.cpu_per_io());
    let is_less = |(rival, ours): (f64, f64)| rival < ours * (1.0 - tolerance / 100.0);
    let is_seen = |(rival, ours): (f64, f64)| ours - rival > INDISTINGUISHABLE;
    cpu.0 <= cpu.1
        && latencies.iter().all(|(rival, ours)| rival <= ours)
        && (is_less(cpu)
            || latencies
                .into_iter()
                .any(|pair| is_less(pair) && is_seen(pair)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace;

    fn outcome(added: &[u64], cpu: u64) -> Outcome {
        let mut outcome = Outcome::new();
        for &time in added {
            outcome.added.record(time).expect("it grows");
        }
        outcome.cpu = cpu * added.len() as u64;
        outcome
    }

    #[test]
    fn to_dominate_is_to_be_worse_in_nothing() {
        let ours = outcome(&[1_000, 1_000, 1_000], 5_000);
        assert!(!dominates(&ours, &ours, 2.0));
        assert!(dominates(
            &outcome(&[1_000, 1_000, 1_000], 4_800),
            &ours,
            2.0
        ));
        assert!(!dominates(
            &outcome(&[1_000, 1_000, 1_000], 4_950),
            &ours,
            2.0
        ));
        assert!(dominates(&outcome(&[800, 800, 800], 5_000), &ours, 2.0));
        assert!(!dominates(&outcome(&[100, 100, 5_000], 1_000), &ours, 2.0));
        assert!(!dominates(&outcome(&[800, 800, 800], 5_001), &ours, 2.0));
        // Too little to be seen.
        let fast = outcome(&[50, 50, 50], 5_000);
        assert!(!dominates(&outcome(&[10, 10, 10], 5_000), &fast, 2.0));
    }

    #[test]
    fn nobody_is_better_where_one_command_is_outstanding() {
        let traces = trace::all(3_000);
        let wanted = traces.iter().filter(|trace| trace.name.ends_with("QD 1"));
        for trace in wanted {
            for machine in MACHINES {
                let round = Round::run(trace, machine, [1, 3].into_iter());
                let dominating = round.dominating(2.0);
                assert!(dominating.is_empty(), "{}: {dominating:?}", trace.name);
            }
        }
    }
}
