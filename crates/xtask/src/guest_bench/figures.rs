//! What was measured, from what the programs print.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::vm_bench::{fio_job, number};

/// What one run found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Figures {
    pub(super) iops: f64,
    /// In nanoseconds, from submission to completion.
    pub(super) p50: f64,
    pub(super) p99: f64,
    /// Of one processor, of the server where there is one.
    pub(super) server_cpu: Option<f64>,
}

impl Figures {
    /// Of fio, with `unified_rw_reporting=mixed` and `lat_percentiles`, of the job with that number.
    pub(super) fn of_fio(output: &str, job: usize) -> Result<Self> {
        let job = fio_job(output, job)?;
        let figures = Self {
            iops: number(&job, "/mixed/iops")?,
            p50: number(&job, "/mixed/lat_ns/percentile/50.000000")?,
            p99: number(&job, "/mixed/lat_ns/percentile/99.000000")?,
            server_cpu: None,
        };
        ensure!(figures.iops > 0.0, "fio has done nothing");
        Ok(figures)
    }

    /// Of `vhost-bench`.
    pub(super) fn of_front_end(output: &str) -> Result<Self> {
        let report: Value = serde_json::from_str(output).context("the JSON of vhost-bench")?;
        Ok(Self {
            iops: number(&report, "/iops")?,
            p50: number(&report, "/latency_ns/p50")?,
            p99: number(&report, "/latency_ns/p99")?,
            server_cpu: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What fio 3.33 prints, shortened.
    const FIO: &str = r#"note: a warning
{ "jobs" : [
    { "error" : 0, "mixed" : { "iops" : 0.0, "lat_ns" : {
        "percentile" : { "50.000000" : 0, "99.000000" : 0 } } } },
    { "error" : 0, "mixed" : { "iops" : 1234.5, "lat_ns" : {
        "percentile" : { "50.000000" : 71168, "99.000000" : 90000, "99.900000" : 99999 } } } },
    { "error" : 5, "mixed" : { "iops" : 1.0, "lat_ns" : {
        "percentile" : { "50.000000" : 1, "99.000000" : 1 } } } } ] }
"#;

    #[test]
    fn fio_has_a_job_for_each_disk() {
        let expected = Figures {
            iops: 1234.5,
            p50: 71168.0,
            p99: 90000.0,
            server_cpu: None,
        };
        assert_eq!(Figures::of_fio(FIO, 1).unwrap(), expected);
        for (job, reason) in [(0, "nothing"), (2, "error 5"), (3, "no such job")] {
            let error = Figures::of_fio(FIO, job).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        Figures::of_fio("fio: no such file", 0).unwrap_err();
    }

    #[test]
    fn the_front_end_has_nanoseconds() {
        let output = r#"{ "iops": 9507.8, "ios": 19016,
            "latency_ns": { "max": 35848191, "mean": 104806.4, "p50": 87871, "p99": 233471 } }"#;
        let expected = Figures {
            iops: 9507.8,
            p50: 87871.0,
            p99: 233471.0,
            server_cpu: None,
        };
        assert_eq!(Figures::of_front_end(output).unwrap(), expected);
        Figures::of_front_end("").unwrap_err();
    }
}
