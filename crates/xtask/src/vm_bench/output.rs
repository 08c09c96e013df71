//! What the programs print, as figures.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::plan::Peer;

/// What one run measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Figures {
    pub(super) iops: f64,
    /// `qemu-img` measures none.
    pub(super) latency: Option<Latency>,
    /// What only our driver counts.
    pub(super) counters: Option<Counters>,
}

/// From submission to completion, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Latency {
    pub(super) mean: f64,
    pub(super) median: f64,
    pub(super) longest: f64,
}

/// Counts of our driver while it was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Counters {
    pub(super) ios: u64,
    pub(super) interrupts: u64,
    pub(super) lost_interrupts: u64,
    /// Of submission and completion queues together.
    pub(super) doorbell_writes: u64,
    pub(super) polled_completions: u64,
    /// Of one processor.
    pub(super) cpu_percent: f64,
}

/// Reads the output of a run that succeeded.
pub(super) fn parse(peer: Peer, output: &str) -> Result<Figures> {
    match peer {
        Peer::Libaio | Peer::IoUring => fio(output),
        Peer::QemuImg => qemu_img(output),
        Peer::Ours => ours(output),
    }
}

/// With all latencies in one sum (`unified_rw_reporting=mixed`, `lat_percentiles`).
fn fio(output: &str) -> Result<Figures> {
    let job = fio_job(output, 0)?;
    Ok(Figures {
        iops: number(&job, "/mixed/iops")?,
        latency: Some(Latency {
            mean: number(&job, "/mixed/lat_ns/mean")?,
            median: number(&job, "/mixed/lat_ns/percentile/50.000000")?,
            longest: number(&job, "/mixed/lat_ns/max")?,
        }),
        counters: None,
    })
}

/// What fio reports in JSON of one of its jobs, if that has not failed.
pub(crate) fn fio_job(output: &str, index: usize) -> Result<Value> {
    // Warnings may come first.
    let json = output.find('{').map(|start| &output[start..]);
    let mut report: Value = serde_json::from_str(json.unwrap_or_default()).context("fio's JSON")?;
    let job = report.pointer_mut(&format!("/jobs/{index}"));
    let job = job.map(Value::take).context("fio reports no such job")?;
    let error = number(&job, "/error")?;
    ensure!(error == 0.0, "fio reports error {error}");
    Ok(job)
}

/// `Sending COUNT read requests, ...`, then `Run completed in SECONDS seconds.`
fn qemu_img(output: &str) -> Result<Figures> {
    let word_after = |prefix: &str| {
        let rest = output.lines().find_map(|line| line.strip_prefix(prefix));
        rest.and_then(|rest| rest.split(' ').next())
    };
    let count: f64 = word_after("Sending ").context("no count")?.parse()?;
    let seconds: f64 = word_after("Run completed in ")
        .context("no time")?
        .parse()?;
    let duration = Duration::try_from_secs_f64(seconds)?;
    ensure!(!duration.is_zero(), "{count} requests in no time");
    Ok(Figures {
        iops: count / seconds,
        latency: None,
        counters: None,
    })
}

fn ours(output: &str) -> Result<Figures> {
    let report: Value = serde_json::from_str(output).context("the JSON of nvme-async")?;
    let errors = number(&report, "/errors")?;
    ensure!(errors == 0.0, "{errors} errors");
    let count = |pointer: &str| {
        let value = report.pointer(pointer).and_then(Value::as_u64);
        value.with_context(|| format!("no {pointer} in the JSON"))
    };
    let ios = count("/ios")?;
    ensure!(ios > 0, "no request was completed");
    Ok(Figures {
        iops: number(&report, "/iops")?,
        latency: Some(Latency {
            mean: number(&report, "/latency_ns/mean")?,
            median: number(&report, "/latency_ns/p50")?,
            longest: number(&report, "/latency_ns/max")?,
        }),
        counters: Some(Counters {
            ios,
            interrupts: count("/interrupts")?,
            lost_interrupts: count("/lost_interrupts")?,
            doorbell_writes: count("/submission_doorbells")? + count("/completion_doorbells")?,
            polled_completions: count("/polled_completions")?,
            cpu_percent: number(&report, "/cpu_percent")?,
        }),
    })
}

/// The number at a place in JSON.
pub(crate) fn number(json: &Value, pointer: &str) -> Result<f64> {
    let value = json.pointer(pointer).and_then(Value::as_f64);
    value.with_context(|| format!("no {pointer} in the JSON"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What fio 3.33 prints, shortened.
    const FIO: &str = r#"fio: a warning
{
  "fio version" : "fio-3.33",
  "jobs" : [
    {
      "jobname" : "vm-bench",
      "error" : 0,
      "job options" : {
        "iodepth" : "4",
        "unified_rw_reporting" : "mixed"
      },
      "mixed" : {
        "iops" : 44703.296703,
        "total_ios" : 44748,
        "slat_ns" : { "max" : 4518876, "mean" : 8872.175740 },
        "clat_ns" : { "max" : 4912380, "mean" : 80146.363277 },
        "lat_ns" : {
          "min" : 18397,
          "max" : 4926470,
          "mean" : 89018.225559,
          "percentile" : {
            "40.000000" : 68096,
            "50.000000" : 71168,
            "60.000000" : 74240
          }
        },
        "iops_mean" : 44771.000000
      }
    }
  ]
}
"#;

    const QEMU_IMG: &str = "Sending 13000 write requests, 4096 bytes each, 4 in parallel (starting \
                            at offset 0, step size 4096)\nRun completed in 3.250 seconds.\n";

    const OURS: &str = r#"{
  "iops": 59297.73665603122,
  "bandwidth_bytes": 242883529.3431039,
  "latency_ns": {
    "mean": 16792.735633539425,
    "p50": 9143,
    "p99": 43391,
    "p999": 2060287,
    "max": 5464063
  },
  "ios": 59357,
  "reads": 29721,
  "writes": 29636,
  "errors": 0,
  "first_error": null,
  "cpu_percent": 35.948592497430454,
  "controller_cpu_percent": null,
  "interrupts": 59358,
  "submission_doorbells": 59357,
  "completion_doorbells": 59357,
  "polled_completions": 6621,
  "lost_interrupts": 2
}
"#;

    #[test]
    fn fio_has_both_directions_in_one_sum() {
        let expected = Figures {
            iops: 44703.296703,
            latency: Some(Latency {
                mean: 89018.225559,
                median: 71168.0,
                longest: 4926470.0,
            }),
            counters: None,
        };
        assert_eq!(parse(Peer::Libaio, FIO).unwrap(), expected);
        assert_eq!(parse(Peer::IoUring, FIO).unwrap(), expected);
    }

    #[test]
    fn qemu_img_says_how_long_a_number_of_requests_took() {
        let figures = parse(Peer::QemuImg, QEMU_IMG).unwrap();
        assert_eq!(figures.iops, 4000.0);
        assert_eq!((figures.latency, figures.counters), (None, None));
    }

    #[test]
    fn ours_has_counters() {
        let figures = parse(Peer::Ours, OURS).unwrap();
        assert_eq!(figures.iops, 59297.73665603122);
        let latency = Latency {
            mean: 16792.735633539425,
            median: 9143.0,
            longest: 5464063.0,
        };
        assert_eq!(figures.latency, Some(latency));
        let counters = Counters {
            ios: 59357,
            interrupts: 59358,
            lost_interrupts: 2,
            doorbell_writes: 118714,
            polled_completions: 6621,
            cpu_percent: 35.948592497430454,
        };
        assert_eq!(figures.counters, Some(counters));
    }

    #[test]
    fn errors_and_what_is_cut_off_are_no_figures() {
        let refused = |peer, output: &str| {
            let error = parse(peer, output).unwrap_err();
            format!("{error:#}")
        };
        let error = FIO.replace("\"error\" : 0", "\"error\" : 5");
        assert_eq!(refused(Peer::Libaio, &error), "fio reports error 5");
        let separate = FIO.replace("\"mixed\" : {", "\"read\" : {");
        assert_eq!(
            refused(Peer::Libaio, &separate),
            "no /mixed/iops in the JSON"
        );
        let error = OURS.replace("\"errors\": 0", "\"errors\": 3");
        assert_eq!(refused(Peer::Ours, &error), "3 errors");
        refused(Peer::Ours, &OURS.replace("59357", "0"));
        refused(Peer::QemuImg, &QEMU_IMG.replace("3.250", "0.000"));
        refused(Peer::QemuImg, &QEMU_IMG.replace("3.250", "-1"));
        for (peer, output) in [
            (Peer::Libaio, FIO),
            (Peer::QemuImg, QEMU_IMG),
            (Peer::Ours, OURS),
        ] {
            refused(peer, &output[..output.len() / 2]);
            refused(peer, "");
        }
    }
}
