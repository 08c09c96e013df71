//! Medians, and how they compare with libaio's.

use std::fmt;

use serde_json::{Value, json};

use super::output::{Counters, Figures};
use super::plan::{Peer, Plan, WORKLOADS, Workload};
use super::watch::{Finished, Told, Verdict};
use crate::table::{median, write_table};

/// What all runs found.
#[derive(Debug)]
pub(super) struct Summary<'a> {
    plan: &'a Plan,
    told: &'a Told,
}

/// A figure of a run, if it has that.
type Metric = fn(&Figures) -> Option<f64>;

/// What is compared.
struct Table {
    title: &'static str,
    /// Its key in JSON.
    key: &'static str,
    metric: Metric,
    /// Those that measure it.
    peers: &'static [Peer],
}

const TABLES: [Table; 3] = [
    Table {
        title: "IOPS",
        key: "iops",
        metric: |figures| Some(figures.iops),
        peers: &Peer::ALL,
    },
    Table {
        title: "Mean latency, µs",
        key: "latency_mean_us",
        metric: |figures| Some(figures.latency?.mean / 1e3),
        peers: &[Peer::Libaio, Peer::IoUring, Peer::Ours],
    },
    Table {
        title: "Median latency, µs",
        key: "latency_median_us",
        metric: |figures| Some(figures.latency?.median / 1e3),
        peers: &[Peer::Libaio, Peer::IoUring, Peer::Ours],
    },
];

impl<'a> Summary<'a> {
    pub(super) fn new(plan: &'a Plan, told: &'a Told) -> Self {
        Self { plan, told }
    }

    /// How many runs of ours did not end well, or did not end.
    pub(super) fn failures(&self) -> usize {
        let ours = self.plan.runs.iter().filter(|run| run.peer == Peer::Ours);
        let measured = self.told.finished.iter().filter(|finished| {
            finished.run.peer == Peer::Ours && matches!(finished.verdict, Verdict::Measured(_))
        });
        ours.count() - measured.count()
    }

    /// All of it, and every single run.
    pub(super) fn json(&self) -> Value {
        let runs: Vec<Value> = self.told.finished.iter().map(run_json).collect();
        let workloads: Vec<Value> = WORKLOADS
            .iter()
            .map(|workload| self.workload_json(workload))
            .collect();
        json!({
            "versions": self.told.notes,
            "seconds": self.plan.seconds,
            "rounds": self.plan.rounds,
            "failures_of_ours": self.failures(),
            "medians": workloads,
            "runs": runs,
        })
    }

    fn workload_json(&self, workload: &Workload) -> Value {
        let mut object = json!({ "rw": workload.rw, "iodepth": workload.iodepth });
        for Table {
            key, metric, peers, ..
        } in TABLES
        {
            for &peer in peers {
                let peer_object = &mut object[peer.name()];
                peer_object[key] = self.median(workload, peer, metric).into();
                peer_object[format!("{key}_to_libaio")] = self.ratio(workload, peer, metric).into();
            }
        }
        object
    }

    fn of(&self, workload: &Workload, peer: Peer) -> impl Iterator<Item = &'a Verdict> {
        let told = self.told.finished.iter();
        told.filter(move |Finished { run, .. }| run.workload == *workload && run.peer == peer)
            .map(|finished| &finished.verdict)
    }

    fn figures(&self, workload: &Workload, peer: Peer) -> impl Iterator<Item = &'a Figures> {
        self.of(workload, peer).filter_map(|verdict| match verdict {
            Verdict::Measured(figures) => Some(figures),
            _ => None,
        })
    }

    fn median(&self, workload: &Workload, peer: Peer, metric: Metric) -> Option<f64> {
        median(self.figures(workload, peer).filter_map(metric).collect())
    }

    fn ratio(&self, workload: &Workload, peer: Peer, metric: Metric) -> Option<f64> {
        let median = |peer| self.median(workload, peer, metric);
        Some(median(peer)? / median(Peer::Libaio)?)
    }

    /// A table's entry: the median, its ratio to libaio's, and how many runs are not in it.
    fn cell(&self, workload: &Workload, peer: Peer, metric: Metric) -> String {
        if !peer.does(workload) {
            return "none".to_owned();
        }
        let median = self.median(workload, peer, metric);
        let mut cell = median.map_or_else(|| "-".to_owned(), |median| format!("{median:.0}"));
        if peer != Peer::Libaio
            && let Some(ratio) = self.ratio(workload, peer, metric)
        {
            cell += &format!(" ({ratio:.2})");
        }
        let verdicts: Vec<&Verdict> = self.of(workload, peer).collect();
        let count = |wanted: fn(&Verdict) -> bool| {
            let verdicts = verdicts.iter();
            verdicts.filter(|verdict| wanted(verdict)).count()
        };
        for (count, what) in [
            (count(|verdict| *verdict == Verdict::Hung), "hung"),
            (
                count(|verdict| matches!(verdict, Verdict::Failed(_))),
                "failed",
            ),
            (self.plan.rounds as usize - verdicts.len(), "not run"),
        ] {
            if count > 0 {
                cell += &format!(", {count} {what}");
            }
        }
        cell
    }

    /// What our driver counted in all rounds, for each workload.
    fn counters_table(&self) -> Vec<Vec<String>> {
        let mut table = vec![
            [
                "",
                "interrupts/IO",
                "doorbell writes/IO",
                "polled",
                "lost interrupts",
                "CPU",
                "longest latency",
            ]
            .map(str::to_owned)
            .to_vec(),
        ];
        for workload in WORKLOADS {
            let all: Vec<&Figures> = self.figures(&workload, Peer::Ours).collect();
            let counters: Vec<Counters> = all.iter().filter_map(|run| run.counters).collect();
            let sum = |count: fn(&Counters) -> u64| counters.iter().map(count).sum::<u64>();
            let per_io = |count| sum(count) as f64 / sum(|counters| counters.ios) as f64;
            let latencies = all.iter().filter_map(|run| run.latency);
            let longest = latencies.map(|latency| latency.longest).reduce(f64::max);
            let cpu = median(counters.iter().map(|run| run.cpu_percent).collect());
            table.push(match (longest, cpu) {
                (Some(longest), Some(cpu)) => vec![
                    workload.to_string(),
                    format!("{:.2}", per_io(|counters| counters.interrupts)),
                    format!("{:.2}", per_io(|counters| counters.doorbell_writes)),
                    format!(
                        "{:.0} %",
                        100.0 * per_io(|counters| counters.polled_completions)
                    ),
                    sum(|counters| counters.lost_interrupts).to_string(),
                    format!("{cpu:.0} %"),
                    format!("{:.1} ms", longest / 1e6),
                ],
                _ => vec![workload.to_string()],
            });
        }
        table
    }
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan {
            rounds, seconds, ..
        } = self.plan;
        writeln!(
            f,
            "\nMedians; rounds: {rounds}, of {seconds} s each. In parentheses: the ratio to libaio's."
        )?;
        for Table {
            title,
            metric,
            peers,
            ..
        } in TABLES
        {
            writeln!(f, "\n{title}")?;
            let mut table = vec![vec![String::new()]];
            table[0].extend(peers.iter().map(|peer| peer.name().to_owned()));
            for workload in WORKLOADS {
                let mut row = vec![workload.to_string()];
                row.extend(peers.iter().map(|&peer| self.cell(&workload, peer, metric)));
                table.push(row);
            }
            write_table(f, &table)?;
        }
        writeln!(
            f,
            "\nqemu-img bench goes through the blocks in order, does not mix reads and writes, and \
             measures no latencies."
        )?;
        writeln!(f, "\nWhat nvme-async counted, all rounds together")?;
        write_table(f, &self.counters_table())
    }
}

fn run_json(Finished { run, verdict }: &Finished) -> Value {
    let mut object = json!({
        "round": run.round,
        "rw": run.workload.rw,
        "iodepth": run.workload.iodepth,
        "peer": run.peer.name(),
    });
    match verdict {
        Verdict::Measured(figures) => {
            object["outcome"] = "measured".into();
            object["iops"] = figures.iops.into();
            if let Some(latency) = figures.latency {
                object["latency_ns"] = json!({
                    "mean": latency.mean,
                    "median": latency.median,
                    "longest": latency.longest,
                });
            }
            if let Some(counters) = figures.counters {
                object["counters"] = json!({
                    "ios": counters.ios,
                    "interrupts": counters.interrupts,
                    "lost_interrupts": counters.lost_interrupts,
                    "doorbell_writes": counters.doorbell_writes,
                    "polled_completions": counters.polled_completions,
                    "cpu_percent": counters.cpu_percent,
                });
            }
        }
        Verdict::Hung => object["outcome"] = "hung".into(),
        Verdict::Failed(reason) => {
            object["outcome"] = "failed".into();
            object["reason"] = reason.as_str().into();
        }
    }
    object
}

#[cfg(test)]
mod tests {
    use super::super::output::Latency;
    use super::super::plan::Run;
    use super::*;

    fn figures(iops: f64, peer: Peer) -> Verdict {
        let latency = Latency {
            mean: 4e9 / iops,
            median: 3e9 / iops,
            longest: 1_250_000.0,
        };
        let counters = Counters {
            ios: 1000,
            interrupts: 250,
            lost_interrupts: 1,
            doorbell_writes: 1500,
            polled_completions: 750,
            cpu_percent: 80.0,
        };
        Verdict::Measured(Figures {
            iops,
            latency: (peer != Peer::QemuImg).then_some(latency),
            counters: (peer == Peer::Ours).then_some(counters),
        })
    }

    /// The first workload, thrice by each.
    fn told() -> Told {
        let mut told = Told::default();
        let mut tell = |peer, verdicts: [Verdict; 3]| {
            for (round, verdict) in (1..).zip(verdicts) {
                let run = Run {
                    round,
                    workload: WORKLOADS[0],
                    peer,
                };
                told.finished.push(Finished { run, verdict });
            }
        };
        let measured = |peer, iops: [f64; 3]| iops.map(|iops| figures(iops, peer));
        tell(
            Peer::Libaio,
            measured(Peer::Libaio, [1000.0, 9000.0, 2000.0]),
        );
        tell(
            Peer::IoUring,
            measured(Peer::IoUring, [3000.0, 1000.0, 5000.0]),
        );
        tell(
            Peer::QemuImg,
            [
                Verdict::Hung,
                figures(1000.0, Peer::QemuImg),
                Verdict::Failed("no reason".to_owned()),
            ],
        );
        tell(Peer::Ours, measured(Peer::Ours, [5000.0, 1000.0, 4000.0]));
        told
    }

    #[test]
    fn medians_are_of_what_was_measured() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0]), Some(3.0));
        assert_eq!(median(vec![3.0, 1.0]), Some(2.0));
        assert_eq!(median(vec![9.0, 1.0, 2.0]), Some(2.0));
    }

    #[test]
    fn tables_have_medians_and_ratios() {
        let (plan, told) = (Plan::new(2, 3), told());
        let text = Summary::new(&plan, &told).to_string();
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let rows: Vec<String> = text
            .lines()
            .filter(|line| line.starts_with("randread QD1"))
            .map(words)
            .collect();
        assert_eq!(
            rows,
            [
                "randread QD1 2000 3000 (1.50) 1000 (0.50), 1 hung, 1 failed 4000 (2.00)",
                "randread QD1 2000 1333 (0.67) 1000 (0.50)",
                "randread QD1 1500 1000 (0.67) 750 (0.50)",
                "randread QD1 0.25 1.50 75 % 3 80 % 1.2 ms",
            ]
        );
        let mixed = text.lines().find(|line| line.starts_with("randrw QD4"));
        assert_eq!(
            words(mixed.unwrap()),
            "randrw QD4 -, 3 not run -, 3 not run none -, 3 not run"
        );
    }

    #[test]
    fn failures_are_runs_of_ours_without_figures() {
        let plan = Plan::new(2, 3);
        let mut told = told();
        // The other five workloads did not run.
        assert_eq!(Summary::new(&plan, &told).failures(), 3 * 5);
        told.finished = plan
            .runs
            .iter()
            .map(|&run| {
                let verdict = match run.peer {
                    Peer::Ours => figures(1.0, Peer::Ours),
                    _ => Verdict::Hung,
                };
                Finished { run, verdict }
            })
            .collect();
        assert_eq!(Summary::new(&plan, &told).failures(), 0);
        for verdict in [Verdict::Hung, Verdict::Failed(String::new())] {
            told.finished.last_mut().unwrap().verdict = verdict;
            assert_eq!(Summary::new(&plan, &told).failures(), 1);
        }
    }

    #[test]
    fn json_has_every_run_and_the_medians() {
        let (plan, told) = (Plan::new(2, 3), told());
        let json = Summary::new(&plan, &told).json();
        let medians = &json["medians"][0];
        assert_eq!(
            (&medians["rw"], &medians["iodepth"]),
            (&json!("randread"), &json!(1))
        );
        assert_eq!(medians["nvme-async"]["iops"], 4000.0);
        assert_eq!(medians["nvme-async"]["iops_to_libaio"], 2.0);
        assert_eq!(medians["libaio"]["latency_median_us"], 1500.0);
        assert_eq!(json["medians"][1]["libaio"]["iops"], Value::Null);
        assert_eq!(json["runs"].as_array().map(Vec::len), Some(12));
        assert_eq!(json["runs"][6]["outcome"], "hung");
        assert_eq!(json["runs"][8]["reason"], "no reason");
        assert_eq!(json["runs"][9]["counters"]["interrupts"], 250);
    }
}
