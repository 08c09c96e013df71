//! Several runtimes, runtimes that end, and none.

use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use futures::{FutureExt, poll};
use nvme_async::{Error, Namespace};
use nvme_soft::store::MemoryStore;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::OnceCell;

use crate::support::bounded::{
    bounded, comes_true, current_thread, eventually, multi_thread, on_both_flavours,
};
use crate::support::owners::Ledger;
use crate::support::rig::{self, Rig, Setup, assert_harmless};
use crate::support::suite::{self, AREA};

/// Polls once, outside of any runtime.
fn poll_outside<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    assert!(Handle::try_current().is_err());
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// A controller with one queue pair, which all runtimes meet at.
fn one_queue() -> Setup {
    Setup::memory(1 << 20).options(|options| options.queues(1))
}

async fn write_and_read_back(namespace: &Namespace, offset: u64, fill: u8) {
    let written = namespace.write(offset, vec![fill; 1024]).await;
    written.expect("writes");
    let read = namespace.read(offset, 1024).await.expect("reads");
    assert_eq!(read, vec![fill; 1024]);
}

#[test]
fn two_runtimes_at_the_same_time() {
    let current: fn() -> Runtime = current_thread;
    let multi: fn() -> Runtime = multi_thread;
    for (flavours, queues) in [
        ([current; 2], 1),
        ([current; 2], 3),
        ([multi; 2], 1),
        ([current, multi], 1),
        ([multi, current], 4),
    ] {
        bounded(move || {
            let [first, second] = flavours.map(|new| new());
            let setup = (0..2).fold(Setup::empty(), |setup, _| {
                let store = MemoryStore::new(AREA + 4096).expect("a little memory");
                setup.store(store, 512)
            });
            let setup = setup.options(|options| options.queues(queues));
            let rig = first.block_on(setup.open());
            let other = first
                .block_on(rig.controller().namespace(2))
                .expect("is there");
            let thread = thread::spawn(move || {
                second.block_on(suite::all(&other, false));
                drop(other);
                // Here it ends, while the first one is at work.
            });
            first.block_on(async {
                let namespace = rig.namespace().await;
                suite::all(&namespace, false).await;
                comes_true("the other one ends", || thread.is_finished()).await;
                thread.join().expect("does not panic");
                write_and_read_back(&namespace, 0, 1).await;
                drop(namespace);
                rig.close().await;
            });
        });
    }
}

#[test]
fn blocking_threads_block_on_the_same_runtime() {
    on_both_flavours(async || {
        let rig = one_queue().open().await;
        let namespace = rig.namespace().await;
        let threads = (0..4).map(|index| {
            let (namespace, runtime) = (namespace.clone(), Handle::current());
            tokio::task::spawn_blocking(move || {
                for round in 0..50 {
                    runtime.block_on(write_and_read_back(&namespace, index * 4096, round));
                }
            })
        });
        for thread in futures::future::join_all(threads).await {
            thread.expect("does not panic");
        }
        drop(namespace);
        rig.close().await;
    });
}

/// A controller whose only commands so far are held back, and the runtime that opened it.
fn with_writes_in_flight(ledger: &Ledger, runtime: &Runtime) -> (Rig, Namespace) {
    let (rig, namespace) = runtime.block_on(async {
        let rig = one_queue().open().await;
        let namespace = rig.namespace().await;
        write_and_read_back(&namespace, 0, 1).await;
        (rig, namespace)
    });
    rig.device.controller().hold_io();
    for index in 0..4 {
        let (namespace, bytes) = (namespace.clone(), ledger.bytes(512, 7));
        runtime.spawn(async move { namespace.write(index * 512, bytes).await.map(drop) });
    }
    let busy = rig.device.clone();
    runtime.block_on(async {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(busy.counters().bytes_written, 1024);
    });
    (rig, namespace)
}

#[test]
fn the_next_runtime_takes_over_what_is_in_flight() {
    for new in [current_thread, multi_thread] {
        bounded(move || {
            let ledger = Ledger::default();
            let runtime = new();
            let (rig, namespace) = with_writes_in_flight(&ledger, &runtime);
            drop(runtime);
            rig.device.controller().release();
            let next = new();
            next.block_on(async {
                namespace.quiesce().await.expect("quiesces");
                comes_true("all memory is back", || ledger.alive() == 0).await;
                write_and_read_back(&namespace, 4096, 3).await;
                drop(namespace);
                rig.close().await;
            });
        });
    }
}

#[test]
fn without_another_operation_shutdown_takes_over() {
    bounded(|| {
        let ledger = Ledger::default();
        let runtime = current_thread();
        let (rig, namespace) = with_writes_in_flight(&ledger, &runtime);
        drop((runtime, namespace));
        assert_eq!(ledger.alive(), 4, "the device may still read them");
        rig.device.controller().release();
        current_thread().block_on(rig.close());
        assert_eq!(ledger.alive(), 0);
    });
}

#[test]
fn a_future_goes_on_in_another_runtime() {
    for new in [current_thread, multi_thread] {
        bounded(move || {
            let runtime = new();
            let rig = runtime.block_on(one_queue().open());
            let namespace = runtime.block_on(rig.namespace());
            runtime.block_on(write_and_read_back(&namespace, 0, 9));
            rig.device.controller().hold_io();
            let mut read = Box::pin(namespace.read(0, 1024));
            runtime.block_on(async { assert!(poll!(&mut read).is_pending()) });
            drop(runtime);
            rig.device.controller().release();
            let runtime = new();
            assert_eq!(runtime.block_on(read).expect("reads"), vec![9; 1024]);
            drop(namespace);
            runtime.block_on(rig.close());
        });
    }
}

/// A task that waits when the runtime of its queue ends is woken and provides for itself.
#[test]
fn a_waiting_task_outlives_the_runtime_that_drove_its_queue() {
    bounded(|| {
        let (first, second) = (current_thread(), current_thread());
        let rig = first.block_on(one_queue().open());
        let namespace = first.block_on(rig.namespace());
        first.block_on(write_and_read_back(&namespace, 0, 5));
        rig.device.controller().hold_io();
        let waiting = namespace.clone();
        let thread = thread::spawn(move || second.block_on(waiting.read(0, 1024)));
        first.block_on(async { tokio::time::sleep(Duration::from_millis(20)).await });
        drop(first);
        rig.device.controller().release();
        let read = thread.join().expect("does not panic");
        assert_eq!(read.expect("reads"), vec![5; 1024]);
        drop(namespace);
        current_thread().block_on(rig.close());
    });
}

#[test]
fn outside_of_runtimes_there_is_a_typed_error() {
    bounded(|| {
        let runtime = current_thread();
        let rig = runtime.block_on(one_queue().open());
        let namespace = runtime.block_on(rig.namespace());
        runtime.block_on(write_and_read_back(&namespace, 0, 1));
        let ledger = Ledger::default();
        rig.device.controller().hold_io();
        let mut pending = Box::pin(namespace.write(0, ledger.bytes(512, 1)));
        runtime.block_on(async { assert!(poll!(&mut pending).is_pending()) });
        drop(runtime);

        match poll_outside(pending.as_mut()) {
            Poll::Ready(Err(failed)) => {
                assert!(
                    matches!(failed.error, Error::RuntimeGone { .. }),
                    "{failed}"
                );
                assert!(failed.buffer.is_none(), "the device may still read it");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(ledger.alive(), 1);
        let mut first_poll = Box::pin(namespace.write(0, ledger.bytes(512, 2)));
        match poll_outside(first_poll.as_mut()) {
            Poll::Ready(Err(failed)) => {
                assert!(
                    matches!(failed.error, Error::RuntimeGone { .. }),
                    "{failed}"
                );
                assert!(failed.buffer.is_some(), "it was never submitted");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(ledger.alive(), 1);
        match poll_outside(pin!(namespace.quiesce())) {
            Poll::Ready(Err(Error::RuntimeGone { .. })) => {}
            other => panic!("{other:?}"),
        }

        rig.device.controller().release();
        drop((first_poll, pending));
        drop(namespace);
        current_thread().block_on(rig.close());
        assert_eq!(ledger.alive(), 0);
    });
}

#[test]
fn without_drivers_opening_fails_with_a_typed_error() {
    bounded(|| {
        let open = || nvme_async::open("mem:?size=1M");
        for runtime in [
            Builder::new_current_thread().build(),
            Builder::new_current_thread().enable_io().build(),
            Builder::new_current_thread().enable_time().build(),
            Builder::new_multi_thread()
                .worker_threads(1)
                .enable_io()
                .build(),
        ] {
            let error = runtime.expect("a runtime").block_on(open()).err();
            assert!(matches!(error, Some(Error::NoRuntime { .. })), "{error:?}");
        }
        match poll_outside(pin!(open())) {
            Poll::Ready(Err(Error::RuntimeGone { .. })) => {}
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn without_drivers_operations_fail_with_a_typed_error() {
    bounded(|| {
        let runtime = current_thread();
        let rig = runtime.block_on(one_queue().open());
        let namespace = runtime.block_on(rig.namespace());
        drop(runtime);
        let bare = Builder::new_current_thread().build().expect("a runtime");
        let failed = bare.block_on(async { namespace.write(0, vec![1; 512]).await });
        let failed = failed.expect_err("nothing to be woken by");
        assert!(matches!(failed.error, Error::NoRuntime { .. }), "{failed}");
        assert!(failed.buffer.is_some());
        let runtime = current_thread();
        runtime.block_on(write_and_read_back(&namespace, 0, 1));
        drop(namespace);
        runtime.block_on(rig.close());
    });
}

/// Many short runtimes at the same time, as the tests of a program have.
#[test]
fn short_runtimes_share_a_controller() {
    bounded(|| {
        let runtime = multi_thread();
        let rig = runtime.block_on(one_queue().open());
        let namespace = runtime.block_on(rig.namespace());
        drop(runtime);
        let threads: Vec<_> = (0..4_u64)
            .map(|index| {
                let namespace = namespace.clone();
                thread::spawn(move || {
                    for round in 0..25 {
                        let new = if round % 4 == 0 {
                            multi_thread
                        } else {
                            current_thread
                        };
                        let runtime = new();
                        let write = namespace.write(index << 16, vec![0xff; 1024]);
                        // In flight when the runtime ends, or not.
                        if runtime.block_on(async { write.now_or_never() }).is_some() {
                            continue;
                        }
                        if round % 2 == 0 {
                            drop(runtime);
                            let runtime = current_thread();
                            runtime.block_on(namespace.quiesce()).expect("quiesces");
                            runtime.block_on(write_and_read_back(&namespace, index << 16, round));
                        }
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("does not panic");
        }
        drop(namespace);
        current_thread().block_on(rig.close());
    });
}

static SHARED: OnceCell<Namespace> = OnceCell::const_new();

/// The same namespace for several tests, each of which has a runtime of its own.
async fn shared() -> &'static Namespace {
    let open = || async { rig::open("mem:?size=1M").await };
    SHARED.get_or_init(open).await
}

macro_rules! tests_that_share {
    ($($name:ident: $offset:literal;)*) => {$(
        #[tokio::test]
        async fn $name() {
            let test = async {
                for fill in 0..100 {
                    write_and_read_back(shared().await, $offset << 16, fill).await;
                }
                let read = shared().await.read($offset << 16, 1024);
                // Dropped with the runtime.
                drop(tokio::spawn(read));
            };
            let end = tokio::time::timeout(Duration::from_secs(120), test).await;
            end.expect("does not hang");
            rig::assert_no_strays(shared().await);
        }
    )*};
}

tests_that_share! {
    a_static_controller_used_by_one_test: 0;
    a_static_controller_used_by_another_test: 1;
    a_static_controller_used_by_a_third_test: 2;
    a_static_controller_used_by_a_fourth_test: 3;
}

/// An open that is given up leaves nothing behind, at whatever point.
#[test]
fn an_open_that_is_given_up() {
    bounded(|| {
        let runtime = current_thread();
        for polls in 0..40 {
            let (device, options) = one_queue().start();
            let ended = runtime.block_on(async {
                let mut open = Box::pin(Rig::attach(device.clone(), options));
                for _ in 0..polls {
                    if let Poll::Ready(rig) = poll!(&mut open) {
                        rig.expect("opens").abandon().await;
                        return true;
                    }
                    tokio::time::sleep(Duration::from_micros(100)).await;
                }
                false
            });
            eventually("its memory is unmapped", || device.iommu().mappings() == 0);
            assert_harmless(&device);
            if ended {
                return;
            }
        }
    });
}

/// A runtime that exists but is not driven at the moment keeps nobody waiting.
#[test]
fn a_runtime_that_rests_does_not_hinder_another() {
    bounded(|| {
        let resting = current_thread();
        let rig = resting.block_on(one_queue().open());
        let namespace = resting.block_on(rig.namespace());
        resting.block_on(write_and_read_back(&namespace, 0, 1));
        let runtime = current_thread();
        runtime.block_on(write_and_read_back(&namespace, 0, 2));
        resting.block_on(write_and_read_back(&namespace, 0, 3));
        runtime.block_on(write_and_read_back(&namespace, 0, 4));
        drop(namespace);
        runtime.block_on(rig.close());
    });
}
