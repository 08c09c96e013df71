//! What callgrind writes: how often each instruction ran, and in which chain of calls.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};

/// An instruction in a chain of calls, and how often it ran there.
pub(super) type Costs = HashMap<Site, i64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Site {
    /// The file that it is in.
    pub(super) object: String,
    /// Where it is in there.
    pub(super) address: u64,
    /// The function that it belongs to, the one that called that, and so on, as callgrind writes it.
    pub(super) chain: String,
}

/// One run of a program, or the difference of two.
#[derive(Debug, Default)]
pub(super) struct Profile {
    pub(super) costs: Costs,
    /// How often each chain of calls came about.
    pub(super) calls: HashMap<String, i64>,
}

impl Profile {
    /// Reads what `--dump-instr=yes --dump-line=no --compress-strings=no --compress-pos=no` leads to.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut profile = Self::default();
        let mut object = "";
        let mut chain = "";
        let mut callee = "";
        let mut total = None;
        // After the line of a call there is one with what the callee cost, which is not the caller's.
        let mut is_of_callee = false;
        for line in text.lines() {
            if line.starts_with("0x") {
                if std::mem::take(&mut is_of_callee) {
                    continue;
                }
                let (address, cost) = cost(line).with_context(|| format!("callgrind: {line}"))?;
                let site = Site {
                    object: object.to_owned(),
                    address,
                    chain: chain.to_owned(),
                };
                *profile.costs.entry(site).or_default() += cost;
            } else if let Some((key, value)) = line.split_once('=') {
                match key {
                    "ob" => object = value,
                    "fn" => chain = value,
                    "cfn" => callee = value,
                    "calls" => {
                        let count = value.split(' ').next().and_then(|count| count.parse().ok());
                        let count: i64 = count.with_context(|| format!("callgrind: {line}"))?;
                        *profile.calls.entry(callee.to_owned()).or_default() += count;
                        is_of_callee = true;
                    }
                    _ => {}
                }
            } else if let Some(summary) = line.strip_prefix("summary: ") {
                total = Some(
                    summary
                        .trim()
                        .parse::<i64>()
                        .context("callgrind's summary")?,
                );
            }
        }
        let sum: i64 = profile.costs.values().sum();
        ensure!(
            total == Some(sum),
            "callgrind counted {total:?} instructions, and its records have {sum}"
        );
        Ok(profile)
    }

    /// What this has more than `less`.
    pub(super) fn minus(mut self, less: Self) -> Self {
        for (site, cost) in less.costs {
            *self.costs.entry(site).or_default() -= cost;
        }
        for (chain, count) in less.calls {
            *self.calls.entry(chain).or_default() -= count;
        }
        self.costs.retain(|_, cost| *cost != 0);
        self.calls.retain(|_, count| *count != 0);
        self
    }
}

fn cost(line: &str) -> Option<(u64, i64)> {
    let (address, cost) = line.strip_prefix("0x")?.split_once(' ')?;
    Some((
        u64::from_str_radix(address, 16).ok()?,
        cost.trim().parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = "\
positions: instr
events: Ir
summary: 17

ob=program
fl=???
fn=main'(below main)
0x10 3
cob=libc
cfi=???
cfn=malloc'main'(below main)
calls=2 0x98930
0x14 10
0x18 4

ob=libc
fn=malloc'main'(below main)
0x98930 10
";

    fn site(object: &str, address: u64, chain: &str) -> Site {
        Site {
            object: object.to_owned(),
            address,
            chain: chain.to_owned(),
        }
    }

    #[test]
    fn each_instruction_counts_once() {
        let profile = Profile::parse(RUN).expect("valid");
        let main = "main'(below main)";
        let malloc = "malloc'main'(below main)";
        assert_eq!(profile.costs.len(), 3);
        assert_eq!(profile.costs[&site("program", 0x10, main)], 3);
        assert_eq!(profile.costs[&site("program", 0x18, main)], 4);
        assert_eq!(profile.costs[&site("libc", 0x98930, malloc)], 10);
        assert_eq!(profile.calls[malloc], 2);
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        let lost = RUN.replace("0x18 4", "+4 4");
        let error = Profile::parse(&lost).expect_err("an instruction is lost");
        assert!(error.to_string().contains("13"), "{error}");
        Profile::parse(&RUN.replace("0x10 3", "0x10")).expect_err("no cost");
        Profile::parse(&RUN.replace("calls=2", "calls=")).expect_err("no count");
    }

    #[test]
    fn the_difference_is_what_was_done_more() {
        let more = RUN.replace("0x10 3", "0x10 8").replace("17", "22");
        let profile = Profile::parse(&more).expect("valid");
        let profile = profile.minus(Profile::parse(RUN).expect("valid"));
        let more = site("program", 0x10, "main'(below main)");
        assert_eq!(profile.costs, HashMap::from([(more, 5)]));
        assert!(profile.calls.is_empty());
    }
}
