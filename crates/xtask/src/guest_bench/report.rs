//! Medians, and how they compare with POSIX.

use std::fmt;

use super::figures::Figures;
use crate::table::{median, write_table};
use crate::vm_bench::WORKLOADS;

/// What was measured, for each workload and each way. The first way is POSIX.
#[derive(Debug)]
pub(super) struct Comparison {
    pub(super) title: &'static str,
    pub(super) ways: Vec<&'static str>,
    /// By workload, way and round.
    found: Vec<Vec<Vec<Figures>>>,
}

type Metric = fn(&Figures) -> Option<f64>;

impl Comparison {
    pub(super) fn new(title: &'static str, ways: Vec<&'static str>) -> Self {
        let found = vec![vec![Vec::new(); ways.len()]; WORKLOADS.len()];
        Self { title, ways, found }
    }

    /// Adds what a round has found, of the workload and the way with these indices.
    pub(super) fn add(&mut self, workload: usize, way: usize, figures: Figures) {
        self.found[workload][way].push(figures);
    }

    /// The median of all rounds.
    fn median(&self, workload: usize, way: usize, metric: Metric) -> Option<f64> {
        let runs = self.found[workload][way].iter();
        median(runs.filter_map(metric).collect())
    }

    /// IOPS by those of POSIX: the median of the ratios within rounds.
    pub(super) fn ratio(&self, workload: usize, way: usize) -> Option<f64> {
        let [posix, ..] = self.found[workload].as_slice() else {
            return None;
        };
        let runs = self.found[workload][way].iter().zip(posix);
        median(runs.map(|(run, posix)| run.iops / posix.iops).collect())
    }

    fn cell(&self, workload: usize, way: usize, metric: Metric) -> String {
        let median = self.median(workload, way, metric);
        median.map_or_else(|| "-".to_owned(), |median| format!("{median:.0}"))
    }

    fn iops_cell(&self, workload: usize, way: usize) -> String {
        let mut cell = self.cell(workload, way, |run| Some(run.iops));
        if way > 0
            && let Some(ratio) = self.ratio(workload, way)
        {
            cell += &format!(" ({ratio:.2})");
        }
        cell
    }

    fn rows(&self, cell: impl Fn(usize, usize) -> String) -> Vec<Vec<String>> {
        let head = self.ways.iter().map(|way| (*way).to_owned());
        let mut rows = vec![[String::new()].into_iter().chain(head).collect()];
        for (index, workload) in WORKLOADS.iter().enumerate() {
            let mut row = vec![workload.to_string()];
            row.extend((0..self.ways.len()).map(|way| cell(index, way)));
            rows.push(row);
        }
        rows
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rounds = self.found[0][0].len();
        writeln!(
            f,
            "Medians of {rounds} rounds. In parentheses: the ratio to {}.",
            self.ways[0]
        )?;
        writeln!(f, "\nIOPS")?;
        write_table(f, &self.rows(|workload, way| self.iops_cell(workload, way)))?;
        let metrics: [(&str, Metric); 3] = [
            ("Median latency, µs", |run| Some(run.p50 / 1e3)),
            ("99th percentile of latency, µs", |run| Some(run.p99 / 1e3)),
            ("CPU of the server, % of one processor", |run| {
                Some(run.server_cpu? * 100.0)
            }),
        ];
        for (title, metric) in metrics {
            let is_there =
                |way| (0..WORKLOADS.len()).any(|row| self.median(row, way, metric).is_some());
            if (0..self.ways.len()).any(is_there) {
                writeln!(f, "\n{title}")?;
                write_table(
                    f,
                    &self.rows(|workload, way| self.cell(workload, way, metric)),
                )?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(iops: f64, server_cpu: Option<f64>) -> Figures {
        Figures {
            iops,
            p50: 1e9 / iops,
            p99: 2e9 / iops,
            server_cpu,
        }
    }

    #[test]
    fn ratios_are_of_rounds_and_medians_of_figures() {
        let mut comparison = Comparison::new("test", vec!["POSIX", "ours"]);
        // The machine is slower in the second round.
        for (posix, ours) in [(1000.0, 2000.0), (100.0, 300.0), (1010.0, 2525.0)] {
            comparison.add(0, 0, figures(posix, None));
            comparison.add(0, 1, figures(ours, Some(0.25)));
        }
        assert_eq!(comparison.ratio(0, 1), Some(2.5));
        assert_eq!(comparison.ratio(1, 1), None);
        let text = comparison.to_string();
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let rows = text.lines().filter(|line| line.starts_with("randread QD1"));
        assert_eq!(
            rows.map(words).collect::<Vec<_>>(),
            [
                "randread QD1 1000 2000 (2.50)",
                "randread QD1 1000 500",
                "randread QD1 2000 1000",
                "randread QD1 - 25",
            ]
        );
        let other = text.lines().find(|line| line.starts_with("randrw QD4"));
        assert_eq!(words(other.unwrap()), "randrw QD4 - -");
    }

    #[test]
    fn without_a_server_there_is_no_table_of_its_cpu() {
        let mut comparison = Comparison::new("test", vec!["POSIX", "ours"]);
        comparison.add(0, 0, figures(1000.0, None));
        assert!(!comparison.to_string().contains("CPU"));
    }
}
