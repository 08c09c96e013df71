//! What was counted.

use std::sync::Arc;
use std::time::Duration;

use super::Controller;
use crate::engine::QueueCounters;
use crate::engine::eventfd::signal_count;

/// Events counted since the controller was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// I/O commands completed.
    pub completions: u64,
    /// Those found by looking, without having been told by an interrupt.
    pub polled_completions: u64,
    /// Times that completions were taken, each time all that were there or 32: completions by this are
    /// the mean batch.
    pub reaps: u64,
    /// Writes of the tail doorbells of I/O submission queues.
    pub submission_doorbells: u64,
    /// Writes of the head doorbells of I/O completion queues.
    pub completion_doorbells: u64,
    /// Those of both kinds that the controller found in memory and did not want to have in a register
    /// ([`OpenOptions::shadow_doorbells`](crate::OpenOptions::shadow_doorbells)).
    pub unwritten_doorbells: u64,
    /// Interrupts of the vectors of I/O queues.
    pub interrupts: u64,
    /// Times that an adaptive queue was polled until there was a completion.
    pub window_hits: u64,
    /// Times that an adaptive queue was polled in vain, and went to sleep.
    pub window_misses: u64,
    /// Time in which queues were polled and nothing else was done.
    pub polling: Duration,
    /// Times that somebody went to sleep with I/O commands outstanding.
    pub sleeps: u64,
    /// Completions that were found waiting although no interrupt had come.
    pub lost_interrupts: u64,
    /// I/O commands that were sent again.
    pub retries: u64,
    /// Bytes copied because the device could not reach them in place.
    pub bounced_bytes: u64,
}

impl Counters {
    /// All of them, by names as metrics have.
    #[cfg(feature = "metrics")]
    fn named(&self) -> [(&'static str, u64); 14] {
        let polling = self.polling.as_nanos().min(u64::MAX.into()) as u64;
        [
            ("nvme_async_completions_total", self.completions),
            (
                "nvme_async_polled_completions_total",
                self.polled_completions,
            ),
            ("nvme_async_reaps_total", self.reaps),
            (
                "nvme_async_submission_doorbells_total",
                self.submission_doorbells,
            ),
            (
                "nvme_async_completion_doorbells_total",
                self.completion_doorbells,
            ),
            (
                "nvme_async_unwritten_doorbells_total",
                self.unwritten_doorbells,
            ),
            ("nvme_async_interrupts_total", self.interrupts),
            ("nvme_async_lost_interrupts_total", self.lost_interrupts),
            ("nvme_async_window_hits_total", self.window_hits),
            ("nvme_async_window_misses_total", self.window_misses),
            ("nvme_async_polling_nanoseconds_total", polling),
            ("nvme_async_sleeps_total", self.sleeps),
            ("nvme_async_retries_total", self.retries),
            ("nvme_async_bounced_bytes_total", self.bounced_bytes),
        ]
    }
}

impl Controller {
    /// What happened since it was opened.
    pub fn counters(&self) -> Counters {
        let mut sum = Counters {
            bounced_bytes: self.inner.dma.bounced_bytes(),
            ..Counters::default()
        };
        let mut vectors: Vec<_> = Vec::new();
        for queue in self.inner.all_queues() {
            let (counters, window) = queue.counters();
            let QueueCounters {
                completions,
                polled_completions,
                reaps,
                submission_doorbells,
                completion_doorbells,
                unwritten_doorbells,
                sleeps,
                lost_interrupts,
                retries,
            } = counters;
            sum.completions += completions;
            sum.polled_completions += polled_completions;
            sum.reaps += reaps;
            sum.submission_doorbells += submission_doorbells;
            sum.completion_doorbells += completion_doorbells;
            sum.unwritten_doorbells += unwritten_doorbells;
            sum.window_hits += window.hits;
            sum.window_misses += window.misses;
            sum.polling += window.spun;
            sum.sleeps += sleeps;
            sum.lost_interrupts += lost_interrupts;
            sum.retries += retries;
            // Queues may share a vector.
            if !vectors
                .iter()
                .any(|known| Arc::ptr_eq(known, queue.vector()))
            {
                vectors.push(queue.vector().clone());
            }
        }
        sum.interrupts = vectors.iter().map(|vector| signal_count(vector)).sum();
        sum
    }

    /// Hands the counters to the recorder of the crate `metrics`, each with the label `device`: to be
    /// called when they are collected.
    ///
    /// | counter | is |
    /// | --- | --- |
    /// | `nvme_async_completions_total` | I/O commands completed |
    /// | `nvme_async_polled_completions_total` | those found without having been told |
    /// | `nvme_async_reaps_total` | times that completions were taken |
    /// | `nvme_async_submission_doorbells_total` | writes of tail doorbells |
    /// | `nvme_async_completion_doorbells_total` | writes of head doorbells |
    /// | `nvme_async_unwritten_doorbells_total` | those of both that were left in memory |
    /// | `nvme_async_interrupts_total` | interrupts of I/O queues |
    /// | `nvme_async_lost_interrupts_total` | completions that no interrupt told of |
    /// | `nvme_async_window_hits_total` | polls that ended with a completion |
    /// | `nvme_async_window_misses_total` | polls in vain |
    /// | `nvme_async_polling_nanoseconds_total` | time spent polling |
    /// | `nvme_async_sleeps_total` | sleeps with commands outstanding |
    /// | `nvme_async_retries_total` | commands sent again |
    /// | `nvme_async_bounced_bytes_total` | bytes copied |
    #[cfg(feature = "metrics")]
    pub fn record_metrics(&self) {
        let device = self.address().to_owned();
        for (name, value) in self.counters().named() {
            metrics::counter!(name, "device" => device.clone()).absolute(value);
        }
    }
}

#[cfg(all(test, feature = "metrics"))]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use metrics::{
        Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit,
    };

    /// Keeps counters, by name and the value of their label.
    #[derive(Default)]
    struct Kept(Mutex<BTreeMap<(String, String), Arc<AtomicU64>>>);

    impl Recorder for Kept {
        fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
            let label = key.labels().next().expect("it has a label");
            assert_eq!(label.key(), "device");
            let key = (key.name().to_owned(), label.value().to_owned());
            let mut kept = self.0.lock().expect("nobody panics");
            Counter::from_arc(kept.entry(key).or_default().clone())
        }

        fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
            unreachable!("there are none")
        }

        fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
            unreachable!("there are none")
        }
    }

    #[tokio::test]
    async fn counters_are_recorded() {
        let namespace = crate::open("mem:?size=1M").await.expect("opens");
        namespace.read(0, 4096).await.expect("reads");
        let kept = Kept::default();
        metrics::with_local_recorder(&kept, || namespace.controller().record_metrics());
        let kept = kept.0.into_inner().expect("nobody panics");
        assert_eq!(kept.len(), 14);
        let completions = &kept[&("nvme_async_completions_total".to_owned(), "mem:".to_owned())];
        assert_eq!(completions.load(Ordering::Relaxed), 1);
        namespace.controller().shutdown().await.expect("closes");
    }
}
