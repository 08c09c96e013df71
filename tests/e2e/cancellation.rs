//! Futures that are dropped or forgotten, at every point: the memory belongs to the device for as
//! long as it may use it, and comes back once.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use fastrand::Rng;
use futures::{FutureExt, poll};
use nvme_async::{DmaBuf, Namespace, Zeroes};

use crate::support::bounded::{comes_true, on_both_flavours, on_current_thread, on_multi_thread};
use crate::support::owners::Ledger;
use crate::support::rig::{Rig, Setup};

const SIZE: u64 = 1 << 20;

type Operation<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// Each operation that uses memory, with an owner of it in the ledger.
async fn operations<'a>(
    rig: &Rig,
    namespace: &'a Namespace,
    ledger: &Ledger,
) -> Vec<Operation<'a>> {
    let registration = rig.controller().register(ledger.registered(8192));
    let registration = registration.await.expect("registers");
    let slice = |offset| registration.slice(offset, 1024).expect("fits");
    let (read, write) = (slice(0), slice(4097));
    let large = ledger.bytes(128 << 10, 3);
    vec![
        Box::pin(
            namespace
                .write(0, ledger.bytes(512, 1))
                .map(|done| drop(done.expect("writes"))),
        ),
        Box::pin(
            namespace
                .write(0, large)
                .map(|done| drop(done.expect("writes"))),
        ),
        Box::pin(
            namespace
                .write(0, vec![ledger.bytes(512, 1), ledger.bytes(512, 2)])
                .map(|done| drop(done.expect("writes"))),
        ),
        Box::pin(
            namespace
                .write(4096, write)
                .map(|done| drop(done.expect("writes"))),
        ),
        Box::pin(
            // What is there depends on the writes.
            namespace.compare(0, ledger.bytes(512, 1)).map(|done| {
                assert!(
                    done.err()
                        .is_none_or(|lost| lost.error.is_compare_failure())
                )
            }),
        ),
        Box::pin(
            namespace
                .read_into(8192, read)
                .map(|done| drop(done.expect("reads"))),
        ),
    ]
}

/// Owners behind [`operations`].
const OWNERS: usize = 6;

async fn setup(setup: Setup) -> (Rig, Namespace, Ledger) {
    let rig = setup.open().await;
    let namespace = rig.namespace().await;
    (rig, namespace, Ledger::default())
}

/// Waits until all memory is back. Another thread may still be dropping it when `quiesce` resolves.
async fn settle(namespace: &Namespace, ledger: &Ledger) {
    namespace.quiesce().await.expect("quiesces");
    comes_true("all memory is back", || ledger.alive() == 0).await;
}

#[test]
fn before_the_first_poll_nothing_has_happened() {
    on_both_flavours(async || {
        let (rig, namespace, ledger) = setup(Setup::memory(SIZE)).await;
        for operation in operations(&rig, &namespace, &ledger).await {
            drop(operation);
        }
        assert_eq!(ledger.alive(), 0);
        drop(namespace.read(0, 4096));
        drop(namespace.read_into(0, namespace.allocate(4096).expect("room")));
        assert_eq!(rig.device.counters().commands, 0);
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn in_flight_the_device_keeps_the_memory() {
    on_both_flavours(async || {
        let (rig, namespace, ledger) = setup(Setup::memory(SIZE)).await;
        for round in 0..3 {
            rig.device.controller().hold_io();
            let operations = operations(&rig, &namespace, &ledger).await;
            let count = operations.len();
            for mut operation in operations {
                assert!(poll!(&mut operation).is_pending());
            }
            // The small ones were copied, but nothing says so.
            assert_eq!(ledger.alive(), OWNERS, "round {round}");
            let commands = rig.device.counters().commands;
            rig.device.controller().release();
            settle(&namespace, &ledger).await;
            let done = rig.device.counters().commands - commands;
            assert_eq!(done, count as u64, "all were submitted");
        }
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn reads_in_flight_never_fill_memory_that_others_have() {
    on_both_flavours(async || {
        let (rig, namespace, _) = setup(Setup::memory(SIZE)).await;
        namespace
            .write(0, vec![0xbb; 64 << 10])
            .await
            .expect("writes");
        rig.device.controller().hold_io();
        for index in 0..16 {
            assert!(namespace.read(index * 4096, 4096).now_or_never().is_none());
            let buffer = namespace.allocate(4096).expect("room");
            assert!(
                namespace
                    .read_into(index * 4096, buffer)
                    .now_or_never()
                    .is_none()
            );
        }
        // Everything that the pool has left now.
        let mut buffers: Vec<DmaBuf> = (0..2048)
            .map(|_| namespace.allocate(4096).expect("room"))
            .collect();
        buffers.iter_mut().for_each(|buffer| buffer.fill(0xaa));
        rig.device.controller().release();
        namespace.quiesce().await.expect("quiesces");
        for buffer in &buffers {
            assert!(buffer.iter().all(|&byte| byte == 0xaa));
        }
        drop((buffers, namespace));
        rig.close().await;
    });
}

/// Three slots, and more commands than that.
fn three_slots() -> Setup {
    Setup::memory(SIZE)
        .config(|config| config.io_queue_pairs = 1)
        .options(|options| options.queue_entries(4))
}

#[test]
fn waiting_for_a_slot_the_memory_comes_back_at_once() {
    on_both_flavours(async || {
        let (rig, namespace, ledger) = setup(three_slots()).await;
        rig.device.controller().hold_io();
        let mut writes: Vec<_> = (0..8)
            .map(|index| Box::pin(namespace.write(index * 512, ledger.bytes(512, 1))))
            .collect();
        for write in &mut writes {
            assert!(poll!(write).is_pending());
        }
        // From the middle, the front and the back of those that wait.
        for (index, alive) in [(5, 7), (3, 6), (5, 5)] {
            drop(writes.remove(index));
            assert_eq!(ledger.alive(), alive);
        }
        // One that has a slot.
        drop(writes.remove(1));
        assert_eq!(ledger.alive(), 5);
        rig.device.controller().release();
        for write in writes {
            drop(write.await.expect("writes"));
        }
        settle(&namespace, &ledger).await;
        assert_eq!(rig.device.counters().commands, 5);
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn those_that_wait_take_the_slots_of_those_that_were_dropped() {
    on_both_flavours(async || {
        let (rig, namespace, ledger) = setup(three_slots()).await;
        rig.device.controller().hold_io();
        let mut writes: Vec<_> = (0..8)
            .map(|index| Box::pin(namespace.write(index * 512, ledger.bytes(512, 1))))
            .collect();
        for write in &mut writes {
            assert!(poll!(write).is_pending());
        }
        drop(writes.drain(..3));
        assert_eq!(ledger.alive(), 8, "the device has them");
        rig.device.controller().release();
        for write in writes {
            drop(write.await.expect("writes"));
        }
        assert_eq!(rig.device.counters().commands, 8);
        settle(&namespace, &ledger).await;
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn completed_and_not_polled_since() {
    on_both_flavours(async || {
        let (rig, namespace, ledger) = setup(Setup::memory(SIZE)).await;
        rig.device.controller().hold_io();
        let mut operations = operations(&rig, &namespace, &ledger).await;
        let count = operations.len() as u64;
        for operation in &mut operations {
            assert!(poll!(operation).is_pending());
        }
        let before = rig.controller().counters().completions;
        rig.device.controller().release();
        comes_true("the reaper has them", || {
            rig.controller().counters().completions == before + count
        })
        .await;
        assert_eq!(
            ledger.alive(),
            OWNERS,
            "the results are there to be fetched"
        );
        // Every other one.
        let mut keep = false;
        operations.retain(|_| {
            keep = !keep;
            keep
        });
        for mut operation in operations {
            assert!(poll!(&mut operation).is_ready());
        }
        settle(&namespace, &ledger).await;
        drop(namespace);
        rig.close().await;
    });
}

/// Sixteen commands each, of which three can be in flight.
#[test]
fn split_requests() {
    on_both_flavours(async || {
        let split = three_slots().config(|config| {
            config.mdts = 1;
            config.latency = Duration::from_micros(300);
        });
        let (rig, namespace, ledger) = setup(split).await;
        let len = 128 << 10;
        // In flight and waiting at the same time.
        rig.device.controller().hold_io();
        let mut write = Box::pin(namespace.write(0, ledger.bytes(len, 1)));
        assert!(poll!(&mut write).is_pending());
        drop(write);
        assert_eq!(ledger.alive(), 1, "some of it is in flight");
        rig.device.controller().release();
        settle(&namespace, &ledger).await;
        assert_eq!(
            rig.device.counters().commands,
            3,
            "no more of it was submitted"
        );

        // With some parts done, and more and more so.
        for parts in 1..16 {
            let before = rig.controller().counters().completions;
            let mut write = Box::pin(namespace.write(0, ledger.bytes(len, 2)));
            let registration = rig.controller().register(ledger.registered(len));
            let slice = registration
                .await
                .expect("registers")
                .slice(0, len)
                .expect("fits");
            let mut read = Box::pin(namespace.read_into(0, slice));
            while rig.controller().counters().completions < before + parts {
                // Only a thread that was kept from running finds one of them done.
                if poll!(&mut write).is_ready() || poll!(&mut read).is_ready() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            drop((read, write));
            settle(&namespace, &ledger).await;
        }
        drop(namespace);
        rig.close().await;
    });
}

/// The pool is used up, so that operations take turns with the reserve.
#[test]
fn waiting_for_memory() {
    on_both_flavours(async || {
        let small = Setup::memory(SIZE)
            .config(|config| config.mdts = 3)
            .options(|options| options.pool_limit(4 << 20).queues(1).local_queues(0));
        let (rig, namespace, ledger) = setup(small).await;
        let mut hoard = Vec::new();
        while let Ok(buffer) = namespace.allocate(4096) {
            hoard.push(buffer);
        }
        for round in 0..3 {
            rig.device.controller().hold_io();
            let mut operations: Vec<Operation<'_>> = Vec::new();
            for index in 0..6 {
                let bytes = ledger.bytes(4096, index);
                let write = namespace.write(index as u64 * 4096, bytes);
                operations.push(Box::pin(write.map(|done| drop(done.expect("writes")))));
            }
            for operation in &mut operations {
                assert!(poll!(operation).is_pending());
            }
            // Two blocks of the reserve are in use; the others wait for them.
            let alive = 6;
            assert_eq!(ledger.alive(), alive);
            drop(operations.remove(3));
            drop(operations.remove(4));
            assert_eq!(ledger.alive(), 4, "round {round}");
            drop(operations.remove(0));
            assert_eq!(ledger.alive(), 4, "this one is in flight");
            rig.device.controller().release();
            for operation in operations {
                operation.await;
            }
            settle(&namespace, &ledger).await;
        }
        for (index, fill) in [(1, 1), (2, 2), (4, 4)] {
            let read = namespace.read(index * 4096, 4096).await.expect("reads");
            assert_eq!(read, vec![fill; 4096]);
        }
        drop((hoard, namespace));
        rig.close().await;
    });
}

/// Forgotten futures cost what they hold, and nothing else: slots come back, and shutdown frees
/// what is with the driver.
#[test]
fn forgotten_futures() {
    on_both_flavours(async || {
        let (rig, namespace, ledger) = setup(three_slots()).await;
        for _ in 0..10 {
            rig.device.controller().hold_io();
            // More than there are slots.
            for index in 0..5 {
                let mut write = Box::pin(namespace.write(index * 512, ledger.bytes(512, 1)));
                assert!(poll!(&mut write).is_pending());
                std::mem::forget(write);
            }
            rig.device.controller().release();
            namespace.quiesce().await.expect("quiesces");
            namespace
                .write(0, ledger.bytes(512, 2))
                .await
                .expect("writes");
        }
        assert_eq!(ledger.alive(), 50);
        std::mem::forget(namespace.read(0, 512));
        drop(namespace);
        rig.close().await;
        assert_eq!(ledger.alive(), 0);
    });
}

#[test]
fn operations_without_memory_of_the_caller() {
    on_both_flavours(async || {
        let (rig, namespace, _) = setup(three_slots()).await;
        let many: Vec<_> = (0..600)
            .map(|index| index * 1024..index * 1024 + 512)
            .collect();
        for round in 0..20 {
            if round % 2 == 0 {
                rig.device.controller().hold_io();
            }
            drop(namespace.flush().now_or_never());
            drop(
                namespace
                    .write_zeroes(0, SIZE, Zeroes::Allocated)
                    .now_or_never(),
            );
            drop(namespace.discard(&many).now_or_never());
            drop(namespace.quiesce().now_or_never());
            drop(namespace.read(0, 512).now_or_never());
            drop(rig.controller().active_namespaces().now_or_never());
            drop(rig.controller().namespace(1).now_or_never());
            rig.device.controller().release();
            namespace.quiesce().await.expect("quiesces");
        }
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn a_shutdown_that_is_given_up_is_finished_by_the_next() {
    on_both_flavours(async || {
        for polls in 1..12 {
            let (rig, namespace, ledger) = setup(Setup::memory(SIZE)).await;
            rig.device.controller().hold_io();
            let write = namespace.write(0, ledger.bytes(512, 1));
            assert!(write.now_or_never().is_none());
            let mut shutdown = Box::pin(rig.controller().shutdown());
            for _ in 0..polls {
                if poll!(&mut shutdown).is_ready() {
                    break;
                }
                rig.device.controller().release();
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            drop(shutdown);
            assert!(namespace.write(0, vec![0; 512]).await.is_err());
            drop(namespace);
            // It says what it can't do any more, or succeeds.
            let _ = rig.controller().shutdown().await;
            rig.abandon().await;
            assert_eq!(ledger.alive(), 0);
        }
    });
}

/// Tasks that are aborted at random.
#[test]
fn a_storm_of_aborted_tasks() {
    on_multi_thread(async || {
        let storm = Setup::memory(SIZE)
            .config(|config| config.latency = Duration::from_micros(100))
            .options(|options| options.queue_entries(16));
        let (rig, namespace, ledger) = setup(storm).await;
        let mut random = Rng::with_seed(7);
        let mut tasks = Vec::new();
        for _ in 0..1500 {
            let (namespace, bytes) = (namespace.clone(), ledger.bytes(2048, 1));
            let offset = random.u64(0..256) * 4096;
            tasks.push(tokio::spawn(async move {
                namespace.write(offset, bytes).await.expect("writes");
                namespace.read(offset, 2048).await.expect("reads");
            }));
            if random.u8(0..3) == 0 {
                tasks[random.usize(0..tasks.len())].abort();
            }
            if random.u8(0..20) == 0 {
                tokio::time::sleep(Duration::from_micros(random.u64(0..400))).await;
            }
        }
        for task in tasks {
            if let Err(error) = task.await {
                assert!(error.is_cancelled(), "{error}");
            }
        }
        settle(&namespace, &ledger).await;
        drop(namespace);
        rig.close().await;
    });
}

/// What a `select!` gives up goes on, and does not get in the way of what comes after it.
#[test]
fn select() {
    on_current_thread(async || {
        let (rig, namespace, ledger) = setup(Setup::memory(SIZE)).await;
        for round in 0..200 {
            let write = namespace.write(0, ledger.bytes(4096, round as u8));
            tokio::select! {
                biased;
                done = write => drop(done.expect("writes")),
                () = tokio::task::yield_now() => {}
            }
        }
        settle(&namespace, &ledger).await;
        let read = namespace.read(0, 4096).await.expect("reads");
        assert!(read.iter().all(|&byte| byte == read[0]));
        drop((read, namespace));
        rig.close().await;
    });
}
