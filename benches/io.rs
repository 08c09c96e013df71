//! Reads of 4 KiB on the embedded software controller: what the driver and a controller thread
//! cost together.
//!
//! One iteration is one round of `depth` reads that are outstanding together.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use futures::future::join_all;
use nvme_async::{DmaBuf, Namespace, OpenOptions, PollMode};
use tokio::runtime::{Builder, Runtime};

const BLOCK: usize = 4096;

fn open(runtime: &Runtime, mode: PollMode) -> Namespace {
    let open = OpenOptions::new()
        .url("mem:?size=64M")
        .poll_mode(mode)
        .open();
    runtime
        .block_on(open)
        .expect("the software controller opens")
}

async fn round(namespace: &Namespace, buffers: &mut Vec<DmaBuf>) {
    let reads = buffers
        .drain(..)
        .enumerate()
        .map(|(index, buffer)| namespace.read_into((index * BLOCK) as u64, buffer));
    let done = join_all(reads.collect::<Vec<_>>()).await;
    buffers.extend(
        done.into_iter()
            .map(|read| read.expect("the read succeeds")),
    );
}

fn reads(criterion: &mut Criterion) {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let modes = [
        ("adaptive", PollMode::Adaptive),
        ("interrupt", PollMode::Interrupt),
        ("busy", PollMode::Busy),
    ];
    let mut group = criterion.benchmark_group("read_4k");
    for depth in [1, 32] {
        group.throughput(Throughput::Elements(depth as u64));
        for (name, mode) in modes {
            let namespace = open(&runtime, mode);
            let mut buffers: Vec<_> = (0..depth)
                .map(|_| namespace.allocate(BLOCK).expect("a buffer"))
                .collect();
            group.bench_with_input(BenchmarkId::new(name, depth), &depth, |bencher, _| {
                bencher.iter(|| runtime.block_on(round(&namespace, &mut buffers)));
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500));
    targets = reads
}
criterion_main!(benches);
