//! Ways to wait for completions: poll modes, the park hook of a runtime, and what runs beside it.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use nvme_async::runtime::Builder;
use nvme_async::{Namespace, OpenOptions, PollMode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::bounded::{bounded, comes_true, current_thread, eventually, on_both_flavours};
use crate::support::full;
use crate::support::rig::Setup;
use crate::support::suite::{self, AREA};

const SIZE: u64 = AREA + (64 << 10);

/// All ways for a queue to wait.
const WAYS: [(PollMode, bool); 5] = [
    (PollMode::Adaptive, false),
    (PollMode::Adaptive, true),
    (PollMode::Interrupt, false),
    (PollMode::Busy, false),
    (PollMode::Paired, false),
];

fn options(options: OpenOptions, (mode, masked): (PollMode, bool)) -> OpenOptions {
    options.poll_mode(mode).mask_interrupts(masked)
}

fn setup(way: (PollMode, bool)) -> Setup {
    Setup::memory(SIZE).options(|all| options(all, way))
}

/// Runs `test` in a runtime that polls in its park hook.
#[track_caller]
fn in_parking_runtime(test: impl AsyncFnOnce() + Send + 'static) {
    bounded(move || {
        let runtime = Builder::new().build();
        runtime.expect("a runtime").block_on(test());
    });
}

/// The same, for tasks that stay on their thread.
#[track_caller]
fn in_parking_local_runtime(test: impl AsyncFnOnce() + Send + 'static) {
    bounded(move || {
        let runtime = Builder::new().build_local();
        runtime.expect("a runtime").block_on(test());
    });
}

/// Reads again and again from `tasks` tasks.
async fn reads(namespace: &Namespace, tasks: u64, rounds: u64) {
    let tasks = (0..tasks).map(|task| {
        let namespace = namespace.clone();
        tokio::spawn(async move {
            for round in 0..rounds {
                let offset = (task + round) % 64 * 4096;
                let bytes = namespace.read(offset, 4096).await.expect("reads");
                assert!(bytes.iter().all(|&byte| byte == 0));
            }
        })
    });
    for task in futures::future::join_all(tasks).await {
        task.expect("does not panic");
    }
}

#[test]
fn the_suite_without_a_hook() {
    for way in [(PollMode::Paired, false), (PollMode::Adaptive, true)] {
        on_both_flavours(async move || {
            let rig = setup(way).open().await;
            suite::all(&rig.namespace().await, false).await;
            rig.close().await;
        });
    }
}

#[test]
fn the_suite_in_the_park_hook() {
    for way in WAYS {
        in_parking_runtime(async move || {
            let rig = setup(way).open().await;
            suite::all(&rig.namespace().await, full()).await;
            rig.close().await;
        });
    }
}

#[test]
fn the_suite_on_a_local_queue_in_the_park_hook() {
    for way in WAYS {
        in_parking_local_runtime(async move || {
            let rig = setup(way).open().await;
            let namespace = rig.namespace().await;
            let local = namespace.local().expect("queue pairs are set apart");
            suite::all(&local, full()).await;
            drop((local, namespace));
            rig.close().await;
        });
    }
}

#[test]
fn a_pair_on_one_queue_is_none() {
    on_both_flavours(async || {
        let rig = setup((PollMode::Paired, false))
            .config(|config| config.io_queue_pairs = 1)
            .open()
            .await;
        let namespace = rig.namespace().await;
        assert_eq!(rig.controller().io_queues().len(), 1);
        reads(&namespace, 8, 20).await;
        assert!(rig.device.counters().interrupts > 0);
        drop(namespace);
        rig.close().await;
    });
}

/// Nothing is predicted of commands that were never seen: some go to each.
#[test]
fn both_of_a_pair_are_used_and_drained() {
    in_parking_runtime(async || {
        let rig = setup((PollMode::Paired, false))
            .config(|config| config.latency = Duration::from_millis(2))
            .open()
            .await;
        let namespace = rig.namespace().await;
        reads(&namespace, 1, 300).await;
        let interrupts = rig.controller().counters().interrupts;
        assert!(interrupts > 0, "it would take long to poll for them");
        assert!(interrupts < 300, "now and then it is found out");
        // Those of both are waited for.
        rig.device.controller().hold_io();
        let mut held: Vec<_> = (0..70).map(|_| Box::pin(namespace.read(0, 4096))).collect();
        for read in &mut held {
            assert!(futures::poll!(read).is_pending());
        }
        drop(held);
        let mut quiesce = Box::pin(namespace.quiesce());
        assert!(futures::poll!(&mut quiesce).is_pending());
        rig.device.controller().release();
        quiesce.await.expect("all are done");
        drop(namespace);
        rig.close().await;
    });
}

/// What else a runtime has to do gets its turn although a command is polled for all the time.
#[test]
fn timers_sockets_and_other_threads_beside_a_poll_without_end() {
    for local in [false, true] {
        in_parking_local_runtime(async move || {
            let rig = setup((PollMode::Busy, false)).open().await;
            let namespace = rig.namespace().await;
            rig.device.controller().hold_io();
            let own = local.then(|| namespace.local().expect("one is left"));
            let mut read = Box::pin(async {
                match &own {
                    Some(own) => own.read(0, 4096).await,
                    None => namespace.read(0, 4096).await,
                }
            });
            assert!(futures::poll!(&mut read).is_pending());

            tokio::time::sleep(Duration::from_millis(2)).await;
            echo(20).await;
            let handle = tokio::runtime::Handle::current();
            let done = Arc::new(AtomicBool::new(false));
            let other = std::thread::spawn({
                let done = done.clone();
                move || {
                    handle.spawn(async move { done.store(true, Ordering::Relaxed) });
                }
            });
            comes_true("a task of another thread runs", || {
                done.load(Ordering::Relaxed)
            })
            .await;
            other.join().expect("does not panic");

            rig.device.controller().release();
            read.as_mut().await.expect("reads");
            drop(read);
            drop((own, namespace));
            rig.close().await;
        });
    }
}

async fn echo(rounds: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("has an address");
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("accepts");
        let mut byte = [0];
        while stream.read_exact(&mut byte).await.is_ok() {
            stream.write_all(&byte).await.expect("writes");
        }
    });
    let mut stream = TcpStream::connect(address).await.expect("connects");
    for _ in 0..rounds {
        stream.write_all(&[7]).await.expect("writes");
        let mut byte = [0];
        stream.read_exact(&mut byte).await.expect("reads");
    }
    drop(stream);
    server.await.expect("does not panic");
}

/// A task that can always run keeps a runtime's hook from being called. Reads go on nevertheless.
#[test]
fn a_neighbour_that_never_waits() {
    for way in WAYS {
        for yields in [false, true] {
            in_parking_runtime(async move || {
                let rig = setup(way).open().await;
                let namespace = rig.namespace().await;
                let turns = Arc::new(AtomicU64::new(0));
                let neighbour = tokio::spawn({
                    let turns = turns.clone();
                    async move {
                        loop {
                            turns.fetch_add(1, Ordering::Relaxed);
                            if yields {
                                tokio::task::yield_now().await;
                            } else {
                                run_again().await;
                            }
                        }
                    }
                });
                reads(&namespace, 1, 100).await;
                reads(&namespace, 8, 20).await;
                assert!(turns.load(Ordering::Relaxed) > 0);
                neighbour.abort();
                drop(namespace);
                rig.close().await;
            });
        }
    }
}

/// Lets the others run that can.
async fn run_again() {
    let mut again = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut again, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// One runtime polls in its hook, another one by a task, and both use the same queues.
#[test]
fn a_hook_beside_other_runtimes() {
    bounded(|| {
        let parking = Builder::new().build().expect("a runtime");
        let plain = current_thread();
        let rig = parking.block_on(Setup::memory(SIZE).open());
        let namespace = parking.block_on(rig.namespace());
        for _ in 0..3 {
            parking.block_on(reads(&namespace, 4, 20));
            plain.block_on(reads(&namespace, 4, 20));
            // The same runtime on another thread.
            std::thread::scope(|scope| {
                scope.spawn(|| parking.block_on(reads(&namespace, 4, 20)));
            });
        }
        // It is rung for although the hook does not run on this thread.
        let entered = parking.handle().spawn({
            let namespace = namespace.clone();
            async move { reads(&namespace, 4, 20).await }
        });
        plain.block_on(reads(&namespace, 4, 20));
        parking.block_on(entered).expect("does not panic");
        drop(namespace);
        parking.block_on(rig.close());
    });
}

/// The user's own hook is called too, and a panic of a waker in ours is no end.
#[test]
fn hooks_of_others() {
    bounded(|| {
        let calls = Arc::new(AtomicU64::new(0));
        let own = calls.clone();
        let runtime = Builder::new()
            .configure(|builder| {
                builder.thread_name("renamed");
            })
            .on_thread_park(move || {
                own.fetch_add(1, Ordering::Relaxed);
            })
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let rig = Setup::memory(SIZE).open().await;
            reads(&rig.namespace().await, 2, 10).await;
            rig.close().await;
        });
        assert!(calls.load(Ordering::Relaxed) > 0);
    });
}

/// With nothing in flight nobody is woken, by no timer either.
#[test]
fn nothing_happens_where_nothing_is_in_flight() {
    for hooked in [false, true] {
        bounded(move || {
            let (sender, receiver) = std::sync::mpsc::channel();
            let (end, ended) = tokio::sync::oneshot::channel::<()>();
            let thread = std::thread::spawn(move || {
                let runtime = match hooked {
                    true => Builder::new().build().expect("a runtime"),
                    false => current_thread(),
                };
                runtime.block_on(async {
                    let rig = Setup::memory(SIZE).open().await;
                    let namespace = rig.namespace().await;
                    reads(&namespace, 8, 50).await;
                    let threads = [thread_id(), rig.device.thread_id()];
                    sender.send(threads).expect("somebody listens");
                    ended.await.expect("it is sent");
                    drop(namespace);
                    rig.close().await;
                });
            });
            let threads = receiver.recv().expect("it is sent");
            // What was set while there was work goes off once.
            std::thread::sleep(Duration::from_secs(1));
            let before = threads.map(sleeps);
            std::thread::sleep(Duration::from_secs(5));
            assert_eq!(threads.map(sleeps), before);
            end.send(()).expect("it waits");
            eventually("the thread ends", || thread.is_finished());
            thread.join().expect("does not panic");
        });
    }
}

fn thread_id() -> u32 {
    let link = std::fs::read_link("/proc/thread-self").expect("procfs");
    let name = link.file_name().and_then(|name| name.to_str());
    name.and_then(|name| name.parse().ok()).expect("a number")
}

/// How often a thread of this process went to sleep.
fn sleeps(thread: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status"));
    let status = status.expect("the thread lives");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.and_then(|line| line.trim().parse().ok())
        .expect("a number")
}
