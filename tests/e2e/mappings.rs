//! Memory that nobody registered: mapped for a write, kept for the next one, and waited for where
//! the device allows few mappings.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use futures::poll;
use nvme_async::{Controller, Error, Namespace, Registered};

use crate::support::bounded::{comes_true, on_both_flavours, on_current_thread};
use crate::support::owners::Ledger;
use crate::support::rig::{Rig, Setup};

const SIZE: u64 = 32 << 20;
/// Large enough to be mapped rather than copied.
const LEN: usize = 128 << 10;

/// A controller that allows `spare` mappings beside those of the driver itself.
async fn with_spare_mappings(spare: u64, retained: u64) -> Rig {
    let fixed = {
        let rig = Setup::memory(SIZE).open().await;
        let fixed = rig.controller().mappings().fixed_mappings;
        rig.close().await;
        fixed
    };
    // The pool can't grow, or it would take the spare ones.
    let pool = fixed as usize * (2 << 20);
    Setup::memory(SIZE)
        .device(|device| device.max_mappings = Some(fixed + spare))
        .options(|options| options.retained_bytes(retained).pool_limit(pool))
        .open()
        .await
}

fn pattern(seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut data = vec![0; LEN];
    random.fill(&mut data);
    data
}

fn bounced(controller: &Controller) -> u64 {
    controller.counters().bounced_bytes
}

#[test]
fn written_bytes_stay_mapped_for_the_next_write_if_wished() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE)
            .options(|options| options.retained_bytes(64 << 20))
            .open()
            .await;
        let namespace = rig.namespace().await;
        let ledger = Ledger::default();
        let bytes = ledger.bytes(LEN, 1);
        let bytes = namespace.write(0, bytes).await.expect("writes");
        let kept = rig.controller().mappings();
        assert_eq!((kept.temporary_mappings, kept.kept_mappings), (1, 1));
        let misses = kept.look_up_misses;
        let slice = bytes.slice(LEN / 4..LEN / 2);
        namespace.write(1 << 20, slice).await.expect("writes");
        let bytes = namespace.write(2 << 20, bytes).await.expect("writes");
        let now = rig.controller().mappings();
        assert_eq!(now.look_up_misses, misses, "found both times");
        assert_eq!((now.temporary_mappings, bounced(rig.controller())), (1, 0));

        // The driver's own clone goes when the controller is shut down, and none comes after that.
        drop(bytes);
        assert_eq!(ledger.alive(), 1);
        let controller = rig.controller().clone();
        controller.shutdown().await.expect("shuts down");
        assert_eq!(ledger.alive(), 0);
        let refused = namespace.write(0, ledger.bytes(LEN, 1)).await;
        drop(refused.expect_err("closed"));
        assert_eq!(ledger.alive(), 0);
        drop((namespace, controller));
        rig.close().await;
    });
}

#[test]
fn nothing_is_retained_by_default() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let namespace = rig.namespace().await;
        let ledger = Ledger::default();
        drop(
            namespace
                .write(0, ledger.bytes(LEN, 1))
                .await
                .expect("writes"),
        );
        namespace.quiesce().await.expect("quiesces");
        comes_true("the memory is free", || ledger.alive() == 0).await;
        assert_eq!(rig.controller().mappings().temporary_mappings, 0);
        assert_eq!(bounced(rig.controller()), 0);
        drop(namespace);
        rig.close().await;
    });
}

/// The same address with other contents, written by a device that looks at what was mapped.
#[test]
fn memory_that_is_freed_and_allocated_again_is_written_as_it_is() {
    on_both_flavours(async || {
        // Little enough is kept that memory is freed all the time.
        let rig = Setup::memory(SIZE)
            .options(|options| options.retained_bytes(3 * LEN as u64))
            .open()
            .await;
        let namespace = rig.namespace().await;
        for round in 0..40_u64 {
            let offset = (round % 8) * LEN as u64;
            if round.is_multiple_of(2) {
                namespace
                    .write(offset, pattern(round))
                    .await
                    .expect("writes");
            } else {
                let bytes = Bytes::from(pattern(round));
                namespace.write(offset, bytes).await.expect("writes");
            }
            let read = namespace.read(offset, LEN).await.expect("reads");
            assert!(read == pattern(round), "round {round}");
        }
        drop(namespace);
        rig.close().await;
    });
}

async fn write_and_read_back(namespace: Namespace, task: u64, rounds: u64) {
    for round in 0..rounds {
        let offset = task * LEN as u64;
        let seed = task * 1000 + round;
        // With an owner and without.
        if (task + round).is_multiple_of(2) {
            namespace
                .write(offset, pattern(seed))
                .await
                .expect("writes");
        } else {
            let bytes = Bytes::from(pattern(seed));
            namespace.write(offset, bytes).await.expect("writes");
        }
        let read = namespace.read(offset, LEN).await.expect("reads");
        assert!(read == pattern(seed), "task {task}, round {round}");
    }
}

#[test]
fn many_writers_share_few_mappings() {
    on_both_flavours(async || {
        for (spare, retained) in [(1, 0), (2, 64 << 20), (5, 64 << 20)] {
            let rig = with_spare_mappings(spare, retained).await;
            let namespace = rig.namespace().await;
            let tasks =
                (0..24).map(|task| tokio::spawn(write_and_read_back(namespace.clone(), task, 8)));
            for task in join_all(tasks).await {
                task.expect("no error and no wrong data");
            }
            let usage = rig.controller().mappings();
            assert_eq!(usage.waiting, 0);
            assert!(usage.temporary_mappings <= spare);
            // Unless the machine was too busy to have their turn come in time.
            let written = 24 * 8 * LEN as u64;
            assert!(
                bounced(rig.controller()) < written / 4,
                "they waited instead of copying"
            );
            drop(namespace);
            rig.close().await;
        }
    });
}

#[test]
fn writes_that_wait_for_a_mapping_may_be_dropped() {
    on_both_flavours(async || {
        let rig = with_spare_mappings(2, 0).await;
        let namespace = rig.namespace().await;
        let ledger = Ledger::default();
        rig.device.controller().hold_io();
        let mut writes: Vec<_> = (0..6)
            .map(|index| Box::pin(namespace.write(index * LEN as u64, ledger.bytes(LEN, 1))))
            .collect();
        for write in &mut writes {
            assert!(poll!(write).is_pending());
        }
        assert_eq!(rig.controller().mappings().waiting, 4);
        // The first of those who wait, and one in the middle.
        drop((writes.remove(4), writes.remove(2)));
        assert_eq!(rig.controller().mappings().waiting, 2);
        assert_eq!(ledger.alive(), 4);
        rig.device.controller().release();
        for write in writes {
            drop(write.await.expect("its turn comes"));
        }
        comes_true("all memory is back", || ledger.alive() == 0).await;
        assert_eq!(rig.controller().mappings().waiting, 0);
        drop(namespace);
        rig.close().await;
    });
}

/// Reads and writes of registered memory go on while others wait for mappings, however large.
#[test]
fn registered_memory_waits_for_nobody() {
    on_current_thread(async || {
        let rig = with_spare_mappings(2, 0).await;
        let namespace = rig.namespace().await;
        let ledger = Ledger::default();
        let foreign: Arc<dyn Registered> = ledger.registered(2 * LEN);
        let registration = rig.controller().register(foreign).await;
        let registration = registration.expect("room for one");
        rig.device.controller().hold_io();
        let mut waits: Vec<_> = (0..3)
            .map(|index| Box::pin(namespace.write(index * LEN as u64, pattern(index))))
            .collect();
        for write in &mut waits {
            assert!(poll!(write).is_pending());
        }
        assert_eq!(rig.controller().mappings().waiting, 2);
        let slice = || registration.slice(0, LEN).expect("fits");
        let mut reads: Vec<_> = (0..8)
            .map(|_| Box::pin(namespace.read_into(8 << 20, slice())))
            .collect();
        for read in &mut reads {
            assert!(poll!(read).is_pending());
        }
        assert_eq!(rig.controller().mappings().waiting, 2, "not the reads");
        assert_eq!(bounced(rig.controller()), 0, "in place");
        rig.device.controller().release();
        for read in reads {
            read.await.expect("reads");
        }
        for write in waits {
            write.await.expect("writes");
        }
        drop((registration, namespace));
        rig.close().await;
    });
}

/// A write that is done but not awaited, or has its turn and is not polled, holds up nobody for long.
#[test]
fn writes_that_nobody_polls_hold_up_nobody() {
    on_both_flavours(async || {
        let rig = with_spare_mappings(1, 0).await;
        let namespace = rig.namespace().await;
        // Done, once the device has done it.
        let mut done = Box::pin(namespace.write(0, pattern(0)));
        rig.device.controller().hold_io();
        assert!(poll!(&mut done).is_pending());
        rig.device.controller().release();
        namespace.write(1 << 20, pattern(1)).await.expect("writes");
        assert_eq!(bounced(rig.controller()), 0);

        // First in the queue, and woken.
        rig.device.controller().hold_io();
        let mut runs = Box::pin(namespace.write(0, pattern(2)));
        let mut first = Box::pin(namespace.write(2 << 20, pattern(3)));
        assert!(poll!(&mut runs).is_pending());
        assert!(poll!(&mut first).is_pending());
        rig.device.controller().release();
        namespace.write(3 << 20, pattern(4)).await.expect("writes");
        assert_eq!(
            bounced(rig.controller()),
            LEN as u64,
            "it was copied in the end"
        );
        for write in [done, runs, first] {
            write.await.expect("writes");
        }
        let read = namespace.read(3 << 20, LEN).await.expect("reads");
        assert!(read == pattern(4));
        drop((read, namespace));
        rig.close().await;
    });
}

/// Commands that never complete keep their mappings; others go on without.
#[test]
fn a_device_that_hangs_holds_up_no_deadline() {
    on_both_flavours(async || {
        let rig = with_spare_mappings(1, 0).await;
        let namespace = rig.namespace().await;
        rig.device.controller().hold_io();
        let limit = Duration::from_millis(300);
        for _ in 0..2 {
            let write = namespace.write(0, pattern(0)).timeout(limit).await;
            let error = write.expect_err("the device does nothing").error;
            assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        }
        rig.device.controller().release();
        namespace.quiesce().await.expect("quiesces");
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn what_can_never_be_mapped_is_copied() {
    on_both_flavours(async || {
        let rig = with_spare_mappings(0, 64 << 20).await;
        let namespace = rig.namespace().await;
        let writes = (0..8).map(|task| write_and_read_back(namespace.clone(), task, 2));
        join_all(writes).await;
        // The pool can't grow either, so some reads are copied too.
        assert!(bounced(rig.controller()) >= 16 * LEN as u64);
        drop(namespace);
        rig.close().await;
    });
}
