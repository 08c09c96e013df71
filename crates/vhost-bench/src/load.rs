//! Requests at random places, as many in flight as wanted, and how long they take.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::ValueEnum;
use hdrhistogram::Histogram;

use crate::layout::{self, BLOCK};
use crate::ring::Ring;
use crate::session::Session;

/// What is done; by name, in fio's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    #[value(name = "randread")]
    Reads,
    #[value(name = "randwrite")]
    Writes,
    /// As often the one as the other.
    #[value(name = "randrw")]
    Mixed,
}

/// How long something goes on: until both are reached.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Length {
    pub(crate) time: Duration,
    /// Requests that are done.
    pub(crate) requests: u64,
}

impl Length {
    fn is_over(self, time: Duration, requests: u64) -> bool {
        time >= self.time && requests >= self.requests
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) workload: Workload,
    /// Requests in flight, up to [`layout::MAX_SLOTS`].
    pub(crate) iodepth: u16,
    pub(crate) seed: u64,
    /// Before it is measured.
    pub(crate) ramp: Length,
    pub(crate) measured: Length,
}

/// What was measured.
#[derive(Debug)]
pub(crate) struct Found {
    /// Of all requests that were done, in nanoseconds.
    pub(crate) latencies: Histogram<u64>,
    pub(crate) time: Duration,
    pub(crate) kicks: u64,
    pub(crate) interrupts: u64,
}

impl Found {
    fn new() -> Self {
        Self {
            // Three digits, and as long as it takes.
            latencies: Histogram::new(3).expect("three digits are possible"),
            time: Duration::ZERO,
            kicks: 0,
            interrupts: 0,
        }
    }

    pub(crate) fn iops(&self) -> f64 {
        self.latencies.len() as f64 / self.time.as_secs_f64()
    }
}

impl Load {
    /// Runs it, until nothing is in flight any more.
    ///
    /// # Errors
    ///
    /// A request fails or does not end, or the disk has no room for one.
    pub(crate) fn run(&self, session: &mut Session) -> Result<Found> {
        let blocks = session.size() / BLOCK;
        ensure!(blocks > 0, "the disk is smaller than a request");
        let mut running = Running {
            session,
            ring: Ring::new(session.memory()?)?,
            workload: self.workload,
            blocks,
            random: fastrand::Rng::with_seed(self.seed),
            began: vec![None; layout::MAX_SLOTS.into()],
            found: Found::new(),
        };
        for slot in 0..self.iodepth {
            running.submit(slot)?;
        }
        running.keep_on(self.ramp)?;
        running.found = Found::new();
        running.keep_on(self.measured)?;
        let found = std::mem::replace(&mut running.found, Found::new());
        running.drain()?;
        Ok(found)
    }
}

struct Running<'a> {
    session: &'a Session,
    ring: Ring<'a>,
    workload: Workload,
    /// Of the disk, each as large as a request.
    blocks: u64,
    random: fastrand::Rng,
    /// When the request of each slot began that is in flight.
    began: Vec<Option<Instant>>,
    found: Found,
}

impl Running<'_> {
    fn submit(&mut self, slot: u16) -> Result<()> {
        let is_write = match self.workload {
            Workload::Reads => false,
            Workload::Writes => true,
            Workload::Mixed => self.random.bool(),
        };
        let offset = self.random.u64(..self.blocks) * BLOCK;
        self.began[usize::from(slot)] = Some(Instant::now());
        if self.ring.submit(slot, is_write, offset)? {
            self.session.kick()?;
            self.found.kicks += 1;
        }
        Ok(())
    }

    /// Takes a request that is done, if there is one.
    fn take(&mut self) -> Result<Option<u16>> {
        let Some(slot) = self.ring.take()? else {
            return Ok(None);
        };
        let began = self.began[usize::from(slot)].take();
        ensure!(began.is_some(), "a request is given back twice");
        let latency = began.map_or(Duration::ZERO, |began| began.elapsed());
        self.found.latencies += latency.as_nanos() as u64;
        Ok(Some(slot))
    }

    /// Sleeps until something is done.
    fn wait(&mut self) -> Result<()> {
        if !self.ring.ask()? {
            self.session.wait()?;
            self.found.interrupts += 1;
        }
        Ok(())
    }

    /// Replaces each request that is done by a new one.
    fn keep_on(&mut self, length: Length) -> Result<()> {
        let start = Instant::now();
        loop {
            while let Some(slot) = self.take()? {
                self.submit(slot)?;
                self.found.time = start.elapsed();
                if length.is_over(self.found.time, self.found.latencies.len()) {
                    return Ok(());
                }
            }
            self.wait()?;
        }
    }

    /// Takes what is in flight.
    fn drain(&mut self) -> Result<()> {
        while self.began.iter().any(Option::is_some) {
            if self.take()?.is_none() {
                self.wait()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nvme_async::OpenOptions;
    use nvme_async::device::soft::{SoftDevice, SoftOptions};
    use nvme_export::Export;
    use nvme_export::vhost_user_blk::{Device, Options};
    use nvme_soft::store::MemoryStore;
    use nvme_soft::{Config, NamespaceConfig};
    use tokio::net::UnixListener;
    use tokio::runtime::Builder;
    use tokio::sync::oneshot;

    use super::*;

    const SIZE: u64 = 1 << 20;
    const RAMP: u64 = 10;
    const REQUESTS: u64 = 3000;

    fn requests(requests: u64) -> Length {
        let time = Duration::ZERO;
        Length { time, requests }
    }

    /// One load after another on our server, as benchmarks have it; the controller says what reached it.
    #[test]
    fn a_server_does_what_is_asked() {
        let runtime = Builder::new_multi_thread().enable_all().build().unwrap();
        let mut config = Config::default();
        let namespace = NamespaceConfig::new(MemoryStore::new(SIZE).unwrap(), 512);
        config.namespaces.push(namespace);
        let soft = Arc::new(SoftDevice::new("soft", config, &SoftOptions::default()).unwrap());
        let attached = OpenOptions::new().attach(soft.clone());
        let controller = runtime.block_on(attached).unwrap();
        let namespace = runtime.block_on(controller.namespace(1)).unwrap();
        let device = Device::new(Export::new(namespace).unwrap(), &Options::default());
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let (stop, stopped) = oneshot::channel::<()>();
        let served = {
            let _inside = runtime.enter();
            let listener = UnixListener::bind(&socket).unwrap();
            let stopped = async move {
                // The end is that the sender is dropped.
                let _ = stopped.await;
            };
            runtime.spawn(async move { device.run(listener, stopped).await })
        };
        for (workload, iodepth) in [
            (Workload::Reads, 1),
            (Workload::Writes, 4),
            (Workload::Mixed, layout::MAX_SLOTS),
        ] {
            let before = soft.counters();
            let mut session = Session::connect(&socket).unwrap();
            assert_eq!(session.size(), SIZE);
            let load = Load {
                workload,
                iodepth,
                seed: 7,
                ramp: requests(RAMP),
                measured: requests(REQUESTS),
            };
            let found = load.run(&mut session).unwrap();
            assert_eq!(found.latencies.len(), REQUESTS);
            assert!(found.latencies.min() > 0 && found.iops() > 0.0);
            session.stop().unwrap();
            let counters = soft.counters();
            let reads = counters.bytes_read - before.bytes_read;
            let writes = counters.bytes_written - before.bytes_written;
            // Each that is done is replaced, up to the last one that counts.
            let all = RAMP + REQUESTS + u64::from(iodepth);
            assert_eq!((reads + writes) / BLOCK, all, "{workload:?}");
            let (reads, writes) = (reads / BLOCK, writes / BLOCK);
            match workload {
                Workload::Reads => assert_eq!(writes, 0),
                Workload::Writes => assert_eq!(reads, 0),
                Workload::Mixed => assert!(reads > all / 3 && writes > all / 3),
            }
            assert_eq!(counters.syncs, 0, "the write cache is on");
        }
        drop(stop);
        runtime.block_on(served).unwrap();
        runtime.block_on(controller.shutdown()).unwrap();
        assert_eq!(soft.stray_accesses(), 0);
    }
}
