//! What a read costs, by what that is for and whose it is.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use anyhow::Result;

use super::phases::{Phase, TOKIO, classify};
use super::profile::Profile;
use super::source::{Function, functions};

/// The instructions of one read.
pub(super) struct Costs {
    by_source: HashMap<Source, f64>,
    /// Calls of functions of the C library.
    calls: BTreeMap<String, f64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Source {
    phase: Phase,
    owner: Option<Function>,
    /// What was called of the standard library or the C library, where the line of the call is not
    /// known.
    callee: Option<String>,
}

impl Costs {
    pub(super) fn new(program: &Path, profile: Profile, reads: u64) -> Result<Self> {
        let is_program = |object: &str| Path::new(object) == program;
        let addresses: BTreeSet<u64> = profile
            .costs
            .keys()
            .filter(|site| is_program(&site.object))
            .map(|site| site.address)
            .collect();
        let known = functions(program, &addresses)?;
        let mut by_source = HashMap::new();
        for (site, cost) in profile.costs {
            let mut chain = site.chain.split('\'').map(Function::compiled);
            let mut stack = Vec::new();
            if is_program(&site.object)
                && let Some(functions) = known.get(&site.address)
            {
                stack.extend_from_slice(functions);
                chain.next();
            }
            stack.extend(chain);
            let (phase, owner) = classify(&stack);
            let has_line = owner.is_some_and(|owner| owner.line.is_some());
            let source = Source {
                phase,
                owner: owner.cloned(),
                callee: stack
                    .first()
                    .filter(|first| !has_line && Some(*first) != owner)
                    .map(|callee| callee.name.clone()),
            };
            *by_source.entry(source).or_default() += cost as f64 / reads as f64;
        }
        let mut calls = BTreeMap::new();
        for (chain, count) in profile.calls {
            let stack: Vec<_> = chain.split('\'').map(Function::compiled).collect();
            let (phase, _) = classify(&stack);
            if let [callee, ..] = &*stack
                && callee.owner().is_none()
                && phase != Phase::Device
            {
                *calls.entry(callee.name.clone()).or_default() += count as f64 / reads as f64;
            }
        }
        Ok(Self { by_source, calls })
    }

    fn sum(&self, wanted: impl Fn(&Source) -> bool) -> f64 {
        let of = self.by_source.iter().filter(|(source, _)| wanted(source));
        of.map(|(_, cost)| cost).sum()
    }

    pub(super) fn of_phase(&self, phase: Phase) -> f64 {
        self.sum(|source| source.phase == phase)
    }

    /// All but the device.
    pub(super) fn total(&self) -> f64 {
        self.sum(|source| source.phase != Phase::Device)
    }

    /// What Tokio does, for whatever purpose.
    pub(super) fn of_tokio(&self) -> f64 {
        self.sum(|source| {
            let owner = source.owner.as_ref().and_then(Function::owner);
            source.phase != Phase::Device && owner == Some(TOKIO)
        })
    }

    /// How often the C library is called.
    pub(super) fn print_calls(&self) {
        for (name, count) in &self.calls {
            // Less is a reallocation now and then.
            if *count >= 0.01 {
                println!("  {count:6.2} {name}");
            }
        }
    }

    /// The functions and lines that cost most.
    pub(super) fn print_top(&self, count: usize) {
        let function = |owner: &Function| format!("{}::{}", owner.module, owner.name);
        println!("\nIts functions that cost most:");
        self.print_by(count, |owner, _| function(owner));
        println!("\nIts lines that cost most:");
        self.print_by(count, |owner, callee| match (&owner.line, callee) {
            (Some(line), _) => format!("{line} {}", owner.name),
            (None, Some(callee)) => format!("{}, in {callee}", function(owner)),
            (None, None) => function(owner),
        });
    }

    fn print_by(&self, count: usize, name: impl Fn(&Function, Option<&str>) -> String) {
        let mut sums: HashMap<(String, Phase), f64> = HashMap::new();
        for (source, cost) in &self.by_source {
            if source.phase != Phase::Device {
                let callee = source.callee.as_deref();
                let name = match &source.owner {
                    Some(owner) => name(owner, callee),
                    None => callee.unwrap_or("unknown").to_owned(),
                };
                *sums.entry((name, source.phase)).or_default() += cost;
            }
        }
        let mut sums: Vec<_> = sums.into_iter().collect();
        sums.sort_by(|(a, left), (b, right)| right.total_cmp(left).then_with(|| a.cmp(b)));
        for ((name, phase), cost) in sums.into_iter().take(count) {
            let phase = format!("{phase:?}").to_lowercase();
            println!("  {cost:6.1} {phase:6} {name}");
        }
    }
}
