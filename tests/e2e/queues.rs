//! Queue depths, small queues, few vectors, and the three poll modes.

use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use nvme_async::{Namespace, PollMode};

use crate::support::bounded::{on_both_flavours, on_current_thread, on_multi_thread};
use crate::support::full;
use crate::support::rig::Setup;
use crate::support::suite::{self, AREA};

const SIZE: u64 = AREA + (64 << 10);

/// `tasks` tasks that each write, read back and write again their own block.
async fn many_tasks(namespace: &Namespace, tasks: u64, rounds: u8) {
    let tasks = (0..tasks).map(|task| {
        let namespace = namespace.clone();
        tokio::spawn(async move {
            let offset = task * 4096;
            for round in 0..rounds {
                let fill = round ^ task as u8;
                let written = namespace.write(offset, Bytes::from(vec![fill; 4096])).await;
                written.expect("writes");
                let read = namespace.read(offset, 4096).await.expect("reads");
                assert!(
                    read.iter().all(|&byte| byte == fill),
                    "task {task}, round {round}"
                );
            }
        })
    });
    for task in futures::future::join_all(tasks).await {
        task.expect("does not panic");
    }
}

#[test]
fn queue_depths_from_1_to_256() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let namespace = rig.namespace().await;
        for depth in [1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 128, 255, 256] {
            many_tasks(&namespace, depth, if full() { 100 } else { 8 }).await;
        }
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn small_queues() {
    on_both_flavours(async || {
        for entries in [2, 3, 4, 8] {
            let rig = Setup::memory(SIZE)
                .config(|config| {
                    config.max_queue_entries = entries;
                    config.io_queue_pairs = 1;
                })
                .open()
                .await;
            let namespace = rig.namespace().await;
            let queue = rig.controller().io_queues().next().expect("there is one");
            assert_eq!(queue.depth(), entries as usize - 1);
            many_tasks(&namespace, 40, 10).await;
            drop((queue, namespace));
            rig.close().await;
        }
    });
}

#[test]
fn the_suite_on_the_smallest_queue() {
    on_multi_thread(async || {
        let rig = Setup::memory(SIZE)
            .config(|config| {
                config.max_queue_entries = 2;
                config.io_queue_pairs = 1;
                config.mdts = 1;
            })
            .open()
            .await;
        suite::all(&rig.namespace().await, false).await;
        rig.close().await;
    });
}

#[test]
fn few_interrupt_vectors() {
    on_both_flavours(async || {
        for vectors in [1, 2, 3] {
            let rig = Setup::memory(SIZE)
                .device(|device| device.vectors = vectors)
                .options(|options| options.poll_mode(PollMode::Interrupt).queues(4))
                .open()
                .await;
            let namespace = rig.namespace().await;
            many_tasks(&namespace, 32, 20).await;
            drop(namespace);
            rig.close().await;
        }
    });
}

#[test]
fn every_doorbell_stride() {
    on_current_thread(async || {
        for stride in [0, 1, 2, 4, 10] {
            let rig = Setup::memory(SIZE)
                .config(|config| config.doorbell_stride = stride)
                .open()
                .await;
            let namespace = rig.namespace().await;
            assert_eq!(rig.controller().capabilities().dstrd(), stride);
            many_tasks(&namespace, 8, 4).await;
            let local = rig.controller().io_queues().len();
            assert!(local >= 1);
            drop(namespace);
            rig.close().await;
        }
    });
}

#[test]
fn the_suite_in_each_poll_mode() {
    for mode in [PollMode::Adaptive, PollMode::Interrupt, PollMode::Busy] {
        on_both_flavours(async move || {
            let rig = Setup::memory(SIZE)
                .options(|options| options.poll_mode(mode))
                .open()
                .await;
            suite::all(&rig.namespace().await, false).await;
            rig.close().await;
        });
    }
}

/// Counters that go together: nothing is said of how many there are.
#[test]
fn counters() {
    for mode in [PollMode::Adaptive, PollMode::Interrupt, PollMode::Busy] {
        on_both_flavours(async move || {
            let rig = Setup::memory(SIZE)
                .options(|options| options.poll_mode(mode))
                .open()
                .await;
            let namespace = rig.namespace().await;
            let before = (rig.controller().counters(), rig.device.counters());
            many_tasks(&namespace, 16, 50).await;
            namespace.quiesce().await.expect("quiesces");
            let after = (rig.controller().counters(), rig.device.counters());
            let completions = after.0.completions - before.0.completions;
            assert_eq!(completions, 16 * 50 * 2);
            assert_eq!(after.1.commands - before.1.commands, completions);
            let polled = after.0.polled_completions - before.0.polled_completions;
            assert!(polled <= completions);
            assert!(after.0.submission_doorbells > before.0.submission_doorbells);
            // Two for each command at most.
            assert!(after.0.submission_doorbells - before.0.submission_doorbells <= completions);
            assert!(after.0.completion_doorbells - before.0.completion_doorbells <= completions);
            let interrupts = after.0.interrupts - before.0.interrupts;
            let raised = after.1.interrupts - before.1.interrupts;
            assert!(interrupts <= raised);
            match mode {
                PollMode::Busy => assert_eq!(interrupts, 0, "they are off"),
                PollMode::Interrupt => assert!(interrupts > 0, "nothing else would tell"),
                _ => {}
            }
            drop(namespace);
            rig.close().await;
        });
    }
}

/// Commands that complete out of order of their submission, on all queues at once.
#[test]
fn a_mixture_of_sizes() {
    on_multi_thread(async || {
        let rig = Setup::memory(32 << 20)
            .config(|config| config.latency = Duration::from_micros(30))
            .options(|options| options.queue_entries(16))
            .open()
            .await;
        let namespace = rig.namespace().await;
        let tasks = (0..32_u64).map(|task| {
            let namespace = namespace.clone();
            tokio::spawn(async move {
                let mut random = Rng::with_seed(task);
                for round in 0..20_u8 {
                    let len = 512 << random.u32(0..11);
                    let fill = round.wrapping_mul(31) ^ task as u8;
                    let offset = task << 20;
                    namespace
                        .write(offset, vec![fill; len])
                        .await
                        .expect("writes");
                    let read = namespace.read(offset, len).await.expect("reads");
                    assert!(read.iter().all(|&byte| byte == fill));
                }
            })
        });
        for task in futures::future::join_all(tasks).await {
            task.expect("does not panic");
        }
        drop(namespace);
        rig.close().await;
    });
}

/// Neighbours that never wait for I/O run while others do.
#[test]
fn a_busy_neighbour_and_the_queue_get_their_turns() {
    on_current_thread(async || {
        let rig = Setup::memory(SIZE).open().await;
        let namespace = rig.namespace().await;
        let neighbour = tokio::spawn(async {
            let mut turns = 0_u64;
            loop {
                turns += 1;
                tokio::task::yield_now().await;
                if turns == u64::MAX {
                    return;
                }
            }
        });
        many_tasks(&namespace, 4, 100).await;
        neighbour.abort();
        drop(namespace);
        rig.close().await;
    });
}
