//! What the ways are to reach.

use std::fmt;
use std::time::Duration;

use crate::table::Table;
use crate::way::{Mode, Way};

/// The medians of a way. Ratios are to pure polling in the same place with one read after the other, and
/// to pure interrupt in the same place with paced reads.
pub(crate) struct Medians {
    pub(crate) way: Way,
    pub(crate) latency_ratio: f64,
    pub(crate) iops_ratio: f64,
    pub(crate) cpu_ratio: f64,
    pub(crate) interrupts: f64,
    pub(crate) doorbells: f64,
}

/// A value that is to be at most or at least something.
struct Target {
    what: &'static str,
    way: Way,
    load: String,
    value: f64,
    bound: Bound,
}

#[derive(Clone, Copy)]
enum Bound {
    Most(f64),
    Least(f64),
}

impl Bound {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::Most(most) => value <= most,
            Self::Least(least) => value >= least,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Most(most) => write!(f, "≤ {most}"),
            Self::Least(least) => write!(f, "≥ {least}"),
        }
    }
}

/// All targets that were looked at.
#[derive(Default)]
pub(crate) struct Targets(Vec<Target>);

impl Targets {
    /// Those of reads one after the other.
    pub(crate) fn look(&mut self, latency: Duration, depth: usize, found: &Medians) {
        let load = format!("{} µs, QD {depth}", latency.as_micros());
        let mut add = |what, value, bound| {
            self.0.push(Target {
                what,
                way: found.way,
                load: load.clone(),
                value,
                bound,
            });
        };
        match (depth, found.way.mode) {
            (1, Mode::Adaptive | Mode::Unmasked) => {
                add("latency by busy's", found.latency_ratio, Bound::Most(1.25));
            }
            (32, Mode::Adaptive | Mode::Unmasked) => {
                add("IOPS by busy's", found.iops_ratio, Bound::Least(0.85));
            }
            _ => {}
        }
        if depth == 32
            && let Mode::Adaptive | Mode::Paired | Mode::Busy = found.way.mode
        {
            add("interrupts per read", found.interrupts, Bound::Most(0.01));
        }
        if depth == 32 && latency.is_zero() && found.way.mode != Mode::Interrupt {
            add(
                "SQ doorbell writes per read",
                found.doorbells,
                Bound::Most(0.15),
            );
        }
    }

    /// That of paced reads.
    pub(crate) fn look_at_paced(&mut self, latency: Duration, found: &Medians) {
        if let Mode::Adaptive | Mode::Unmasked | Mode::Paired = found.way.mode {
            self.0.push(Target {
                what: "CPU by interrupt's",
                way: found.way,
                load: format!("{} µs, paced", latency.as_micros()),
                value: found.cpu_ratio,
                bound: Bound::Most(1.2),
            });
        }
    }

    pub(crate) fn are_met(&self) -> bool {
        self.0
            .iter()
            .all(|target| target.bound.is_met(target.value))
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(
            4,
            &["target", "load", "where", "mode", "is to be", "is", ""],
        );
        for target in &self.0 {
            let met = target.bound.is_met(target.value);
            table.row([
                target.what.to_owned(),
                target.load.clone(),
                target.way.place.to_string(),
                target.way.mode.to_string(),
                target.bound.to_string(),
                format!("{:.3}", target.value),
                if met { "met" } else { "NOT MET" }.to_owned(),
            ]);
        }
        table.fmt(f)
    }
}
