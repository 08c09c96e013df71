//! Many commands at a time, and many of them in a row.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use nvme_async::device::Device;
use nvme_async::device::vfio::VfioDevice;
use nvme_async::runtime::Builder;
use nvme_async::{Counters, Namespace, OpenOptions, PollMode};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::harness::{self, full, run, url, within};

/// Bytes of a read.
const LEN: usize = 4096;
/// Bytes that the reads are spread over.
const AREA: u64 = 64 << 20;

/// `count` random reads by `depth` tasks, each of which has one outstanding.
async fn read(namespace: &Namespace, depth: u64, count: u64) {
    let left = Arc::new(AtomicU64::new(count));
    let mut tasks = JoinSet::new();
    for task in 0..depth {
        let (namespace, left) = (namespace.clone(), left.clone());
        tasks.spawn(async move {
            let mut random = Rng::with_seed(task);
            let take = || {
                left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    left.checked_sub(1)
                })
            };
            while take().is_ok() {
                let offset = random.u64(0..AREA / LEN as u64) * LEN as u64;
                let read = namespace.read(offset, LEN).await.expect("reads");
                assert_eq!(read.len(), LEN);
            }
        });
    }
    tasks.join_all().await;
}

/// QEMU's own driver hangs in most of these on this very machine: it waits for an interrupt that
/// does not come.
#[test]
fn twelve_times_five_thousand_reads_at_depth_four() {
    run(500, async || {
        for number in 1..=12 {
            let namespace = harness::open("plain").await;
            let start = Instant::now();
            let reads = timeout(Duration::from_secs(60), read(&namespace, 4, 5000)).await;
            let counters = namespace.controller().counters();
            assert!(reads.is_ok(), "run {number} hangs: {counters:?}");
            assert_eq!(counters.completions, 5000, "run {number}");
            println!("run {number}: {:.1?}, {counters:?}", start.elapsed());
            harness::close(namespace).await;
        }
    });
}

#[test]
fn depths_from_1_to_256() {
    run(500, async || {
        let namespace = harness::open("plain").await;
        let depths: Vec<u64> = if full() {
            (1..=256).collect()
        } else {
            vec![1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 127, 128, 255, 256]
        };
        for depth in depths {
            let reads = read(&namespace, depth, 200.max(2 * depth));
            let reads = timeout(Duration::from_secs(60), reads).await;
            let counters = namespace.controller().counters();
            assert!(reads.is_ok(), "hangs at depth {depth}: {counters:?}");
        }
        harness::close(namespace).await;
    });
}

/// More commands than a queue has entries, from one task.
#[test]
fn many_futures_of_one_task() {
    run(120, async || {
        let namespace = harness::open("plain").await;
        let writes = (0..600u64).map(|index| namespace.write(index * 512, vec![index as u8; 512]));
        for written in futures::future::join_all(writes).await {
            written.expect("writes");
        }
        let reads = (0..600u64).map(|index| namespace.read(index * 512, 512));
        let reads = futures::future::join_all(reads).await;
        for (index, read) in reads.into_iter().enumerate() {
            assert_eq!(
                read.expect("reads"),
                vec![index as u8; 512],
                "block {index}"
            );
        }
        harness::close(namespace).await;
    });
}

async fn in_mode(mode: PollMode) -> Counters {
    with(OpenOptions::new().poll_mode(mode)).await
}

async fn with(options: OpenOptions) -> Counters {
    let mode = format!("{options:?}");
    let options = options.url(&url("plain", 1));
    let namespace = options.open().await.expect("opens");
    let count = if full() { 5000 } else { 500 };
    for depth in [1, 4, 32] {
        let reads = timeout(Duration::from_secs(60), read(&namespace, depth, count)).await;
        let counters = namespace.controller().counters();
        assert!(
            reads.is_ok(),
            "hangs at depth {depth}: {counters:?}, {mode}"
        );
    }
    let counters = namespace.controller().counters();
    assert_eq!(counters.completions, 3 * count);
    println!("{counters:?}");
    harness::close(namespace).await;
    counters
}

#[test]
fn by_interrupts() {
    run(200, async || {
        let counters = in_mode(PollMode::Interrupt).await;
        assert!(counters.interrupts > 0, "{counters:?}");
    });
}

#[test]
fn by_busy_polling() {
    run(200, async || {
        let counters = in_mode(PollMode::Busy).await;
        assert_eq!(counters.interrupts, 0, "{counters:?}");
        assert_eq!(counters.polled_completions, counters.completions);
    });
}

#[test]
fn by_adaptive_polling() {
    run(200, async || {
        in_mode(PollMode::Adaptive).await;
    });
}

#[test]
fn by_pairs_of_queues() {
    run(200, async || {
        in_mode(PollMode::Paired).await;
    });
}

/// In the MSI-X table, which the kernel maps here.
#[test]
fn with_interrupts_masked() {
    run(200, async || {
        let address = harness::address("plain").parse().expect("an address");
        let device = VfioDevice::open(address, 2).expect("opens");
        assert!(device.vector_mask(0).is_some() && device.vector_mask(1).is_some());
        assert!(device.vector_mask(2).is_none(), "it is not enabled");
        drop(device);
        with(OpenOptions::new().mask_interrupts(true)).await;
    });
}

#[test]
fn with_interrupts_coalesced() {
    run(200, async || {
        let options = OpenOptions::new()
            .poll_mode(PollMode::Interrupt)
            .coalesce_interrupts(8, Duration::from_micros(200));
        with(options).await;
    });
}

/// QEMU's controller offers shadow doorbells.
#[test]
fn with_and_without_shadow_doorbells() {
    run(200, async || {
        let counters = in_mode(PollMode::Adaptive).await;
        assert!(counters.unwritten_doorbells > 0, "{counters:?}");
        let counters = with(OpenOptions::new().shadow_doorbells(false)).await;
        assert_eq!(counters.unwritten_doorbells, 0);
    });
}

/// In a runtime that polls in its park hook.
#[test]
fn in_the_park_hook() {
    for mode in [PollMode::Adaptive, PollMode::Busy, PollMode::Paired] {
        within(200, move || {
            let runtime = Builder::new().build().expect("a runtime");
            runtime.block_on(in_mode(mode));
        });
    }
}
