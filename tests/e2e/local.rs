//! `LocalNamespace`: a queue pair for one thread.

use futures::{FutureExt, poll};
use nvme_async::{Error, LocalNamespace};
use tokio::runtime::{Builder, LocalOptions};
use tokio::task::LocalSet;

use crate::support::bounded::{bounded, comes_true, current_thread, multi_thread};
use crate::support::full;
use crate::support::owners::Ledger;
use crate::support::rig::{Rig, Setup};
use crate::support::suite::{self, AREA};

const SIZE: u64 = AREA + (64 << 10);

fn in_local_runtime(test: impl AsyncFnOnce() + Send + 'static) {
    bounded(move || {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build_local(LocalOptions::default());
        runtime.expect("a runtime").block_on(test());
    });
}

fn in_local_set(test: impl AsyncFn() + Send + 'static) {
    bounded(move || {
        for runtime in [current_thread(), multi_thread()] {
            LocalSet::new().block_on(&runtime, test());
        }
    });
}

async fn suite_on_a_local_queue() {
    let rig = Setup::memory(SIZE).open().await;
    let namespace = rig.namespace().await;
    let local = namespace.local().expect("queue pairs are set apart");
    suite::all(&local, full()).await;
    drop((local, namespace));
    rig.close().await;
}

#[test]
fn the_suite_in_a_local_runtime() {
    in_local_runtime(suite_on_a_local_queue);
}

#[test]
fn the_suite_in_a_local_set() {
    in_local_set(suite_on_a_local_queue);
}

/// One thread each, all on one controller.
#[test]
fn a_queue_for_each_thread() {
    in_local_runtime(async || {
        let rig = Setup::memory(64 << 20)
            .options(|options| options.local_queues(3))
            .open()
            .await;
        let namespace = rig.namespace().await;
        let threads: Vec<_> = (0..3)
            .map(|index| {
                let namespace = namespace.clone();
                std::thread::spawn(move || {
                    let runtime = Builder::new_current_thread()
                        .enable_all()
                        .build_local(LocalOptions::default());
                    runtime.expect("a runtime").block_on(async {
                        let local = namespace.local().expect("one for each");
                        write_and_read_back(&local, index << 20, index as u8 + 1).await;
                    });
                })
            })
            .collect();
        comes_true("the threads end", || {
            threads.iter().all(|thread| thread.is_finished())
        })
        .await;
        for thread in threads {
            thread.join().expect("does not panic");
        }
        for index in 0..3 {
            let read = namespace.read(index << 20, 64 << 10).await.expect("reads");
            assert!(read.iter().all(|&byte| byte == index as u8 + 1));
        }
        drop(namespace);
        rig.close().await;
    });
}

async fn write_and_read_back(local: &LocalNamespace, offset: u64, fill: u8) {
    let writes = (0..64).map(|index| local.write(offset + index * 1024, vec![fill; 1024]));
    for written in futures::future::join_all(writes).await {
        written.expect("writes");
    }
    let read = local.read(offset, 64 << 10).await.expect("reads");
    assert!(read.iter().all(|&byte| byte == fill));
}

#[test]
fn queue_pairs_run_out_and_come_back() {
    in_local_runtime(async || {
        let rig = Setup::memory(1 << 20)
            .options(|options| options.local_queues(2))
            .open()
            .await;
        let namespace = rig.namespace().await;
        for _ in 0..3 {
            let first = namespace.local().expect("the first");
            let second = namespace.local().expect("the second");
            let clone = second.clone();
            drop(second);
            let error = namespace.local().expect_err("there are two");
            assert!(matches!(error, Error::NoFreeQueue { .. }), "{error:?}");
            write_and_read_back(&clone, 0, 1).await;
            write_and_read_back(&first, 0, 2).await;
            drop(clone);
            write_and_read_back(&namespace.local().expect("is back"), 0, 3).await;
        }
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn a_controller_that_grants_few_queues_has_none_for_threads() {
    in_local_runtime(async || {
        let rig = Setup::memory(1 << 20)
            .config(|config| config.io_queue_pairs = 1)
            .open()
            .await;
        let namespace = rig.namespace().await;
        assert!(matches!(namespace.local(), Err(Error::NoFreeQueue { .. })));
        namespace.write(0, vec![1; 512]).await.expect("writes");
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn shutdown_waits_for_nobody_who_has_a_local_handle() {
    in_local_runtime(async || {
        let rig = Setup::memory(1 << 20).open().await;
        let namespace = rig.namespace().await;
        let local = namespace.local().expect("queue pairs are set apart");
        let error = rig.controller().shutdown().await.expect_err("in use");
        assert!(matches!(error, Error::InUse { .. }), "{error:?}");
        write_and_read_back(&local, 0, 1).await;
        drop(local);
        rig.controller().shutdown().await.expect("shuts down");
        assert!(matches!(namespace.local(), Err(Error::Closed { .. })));
        drop(namespace);
        rig.abandon().await;
    });
}

#[test]
fn outside_of_a_local_set_it_says_so() {
    bounded(|| {
        current_thread().block_on(async {
            let rig = Setup::memory(1 << 20).open().await;
            let namespace = rig.namespace().await;
            let local = namespace.local().expect("queue pairs are set apart");
            let refused = local.write(0, vec![3; 512]).await.expect_err("no LocalSet");
            assert!(
                matches!(refused.error, Error::NoRuntime { .. }),
                "{refused}"
            );
            assert_eq!(refused.buffer, Some(vec![3; 512]));
            assert!(matches!(
                local.read(0, 512).await,
                Err(Error::NoRuntime { .. })
            ));
            // It works in the right place later.
            let set = LocalSet::new();
            set.run_until(write_and_read_back(&local, 0, 1)).await;
            drop((local, namespace));
            rig.close().await;
        });
    });
}

/// What is in flight when a handle is dropped is reaped nevertheless.
#[test]
fn a_handle_dropped_with_commands_in_flight() {
    in_local_runtime(async || {
        let rig: Rig = Setup::memory(1 << 20)
            .options(|options| options.local_queues(1))
            .open()
            .await;
        let namespace = rig.namespace().await;
        let ledger = Ledger::default();
        for round in 1..=3 {
            let local = namespace.local().expect("is back");
            rig.device.controller().hold_io();
            for index in 0..4 {
                let write = local.write(index * 512, ledger.bytes(512, round));
                assert!(write.now_or_never().is_none());
            }
            drop(local);
            assert_eq!(ledger.alive(), 4, "the device may still read them");
            rig.device.controller().release();
            comes_true("the memory comes back", || ledger.alive() == 0).await;
            let read = namespace.read(0, 2048).await.expect("reads");
            assert_eq!(read, vec![round; 2048]);
        }
        drop(namespace);
        rig.close().await;
    });
}

/// A handle in a `LocalSet` that is not driven does not keep others waiting.
#[test]
fn a_local_queue_moves_from_one_local_set_to_the_next() {
    bounded(|| {
        let runtime = current_thread();
        let rig = runtime.block_on(Setup::memory(1 << 20).open());
        let namespace = runtime.block_on(rig.namespace());
        let local = namespace.local().expect("queue pairs are set apart");
        let set = LocalSet::new();
        set.block_on(&runtime, write_and_read_back(&local, 0, 1));
        rig.device.controller().hold_io();
        let mut read = Box::pin(local.read(0, 512));
        set.block_on(&runtime, async { assert!(poll!(&mut read).is_pending()) });
        drop(set);
        rig.device.controller().release();
        let read = LocalSet::new().block_on(&runtime, read);
        assert_eq!(read.expect("reads"), vec![1; 512]);
        drop((local, namespace));
        runtime.block_on(rig.close());
    });
}
