//! Runtimes that end with operations in flight or in recovery, in every way that a runtime can end,
//! while another one uses the same controller.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;
use std::time::Duration;

use nvme_async::Namespace;
use nvme_soft::fault::{Behaviour, Fault, FaultKind, FaultQueue};
use tokio::runtime::{Builder, LocalOptions, Runtime};
use tokio::task::LocalSet;

use crate::support::bounded::{bounded, comes_true, current_thread, eventually, multi_thread};
use crate::support::owners::Ledger;
use crate::support::rig::{Rig, Setup};
use crate::support::slowness;

const WRITES: usize = 6;

/// How a runtime is ended.
const ENDS: [fn(Runtime); 3] = [drop, Runtime::shutdown_background, |runtime| {
    runtime.shutdown_timeout(Duration::ZERO)
}];

/// What the controller does with the commands that are in flight then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// They take their time.
    Held,
    /// They never complete, and their queue pair is created anew.
    Swallowed,
}

impl Trouble {
    const ALL: [Self; 2] = [Self::Held, Self::Swallowed];

    fn fault(self) -> Fault {
        let behaviour = match self {
            Self::Held => Behaviour::Hold,
            Self::Swallowed => Behaviour::Swallow { execute: false },
        };
        Fault::new(behaviour)
            .queue(FaultQueue::Io)
            .times(WRITES as u64)
    }

    fn kind(self) -> FaultKind {
        self.fault().then.kind()
    }
}

/// A controller with a queue for those who are no workers, one for workers, and a local one.
fn setup(trouble: Trouble) -> Setup {
    Setup::memory(1 << 20).options(|options| {
        let options = options.queues(2).local_queues(1);
        match trouble {
            Trouble::Held => options,
            Trouble::Swallowed => options.timeout(Some(Duration::from_millis(100) * slowness())),
        }
    })
}

/// Somebody in another runtime, who writes and reads back for as long as this lives.
struct Bystander {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU8>,
    thread: thread::JoinHandle<()>,
}

impl Bystander {
    fn start(namespace: Namespace) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicU8::new(0));
        let (stopped, round) = (stop.clone(), rounds.clone());
        let work = async move {
            while !stopped.load(Ordering::Relaxed) {
                let fill = round.load(Ordering::Relaxed);
                // A recovery in between may interrupt a write, which is not repeated unasked.
                let write = namespace.write(64 << 10, vec![fill; 4096]).repeatable();
                drop(
                    write
                        .timeout(Duration::from_secs(60))
                        .await
                        .expect("writes"),
                );
                let read = namespace.read(64 << 10, 4096);
                let read = read.timeout(Duration::from_secs(60)).await;
                assert_eq!(read.expect("reads"), vec![fill; 4096]);
                round.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_micros(500)).await;
            }
        };
        let thread = thread::spawn(move || current_thread().block_on(work));
        Self {
            stop,
            rounds,
            thread,
        }
    }

    fn end(self) {
        let rounds = || self.rounds.load(Ordering::Relaxed);
        let before = rounds();
        eventually("the other runtime goes on", || rounds() != before);
        self.stop.store(true, Ordering::Relaxed);
        eventually("its last round ends", || self.thread.is_finished());
        self.thread.join().expect("no error");
    }
}

/// What holds once the runtime has ended.
fn check(rig: Rig, namespace: Namespace, ledger: Ledger, trouble: Trouble, bystander: Bystander) {
    let soft = rig.device.controller();
    let alive = ledger.alive();
    assert!(
        trouble == Trouble::Swallowed || alive == WRITES,
        "the device has them"
    );
    soft.clear_faults();
    if trouble == Trouble::Held {
        soft.release_stuck();
    }
    let next = current_thread();
    let set = LocalSet::new();
    set.block_on(&next, async {
        namespace.quiesce().await.expect("quiesces");
        // Whoever has the queue pair next drives it.
        let local = namespace.local().expect("it was given back");
        local.quiesce().await.expect("quiesces");
        comes_true("all memory is back", || ledger.alive() == 0).await;
        local.write(0, vec![2; 512]).await.expect("writes");
        assert_eq!(namespace.read(0, 512).await.expect("reads"), vec![2; 512]);
    });
    bystander.end();
    drop((set, namespace));
    next.block_on(rig.close());
}

#[test]
fn shared_queues() {
    for (trouble, end) in Trouble::ALL
        .into_iter()
        .flat_map(|t| ENDS.map(|end| (t, end)))
    {
        for new in [current_thread, multi_thread] {
            bounded(move || {
                let ledger = Ledger::default();
                let runtime = new();
                let rig = runtime.block_on(setup(trouble).open());
                let namespace = runtime.block_on(rig.namespace());
                let soft = rig.device.controller();
                soft.inject(trouble.fault()).expect("makes sense");
                for index in 0..WRITES {
                    let (namespace, bytes) = (namespace.clone(), ledger.bytes(512, 1));
                    runtime.spawn(async move {
                        namespace.write(index as u64 * 512, bytes).await.map(drop)
                    });
                }
                runtime.block_on(comes_true("all are struck", || {
                    soft.faults_hit(trouble.kind()) == WRITES as u64
                }));
                let bystander = Bystander::start(namespace.clone());
                end(runtime);
                check(rig, namespace, ledger, trouble, bystander);
            });
        }
    }
}

/// The tasks of a `LocalSet`, which goes before its runtime.
#[test]
fn local_queues_in_a_local_set() {
    for (trouble, end) in Trouble::ALL
        .into_iter()
        .flat_map(|t| ENDS.map(|end| (t, end)))
    {
        for new in [current_thread, multi_thread] {
            bounded(move || {
                let ledger = Ledger::default();
                let runtime = new();
                let rig = runtime.block_on(setup(trouble).open());
                let namespace = runtime.block_on(rig.namespace());
                let set = LocalSet::new();
                set.block_on(&runtime, write_locally(&rig, &namespace, &ledger, trouble));
                let bystander = Bystander::start(namespace.clone());
                drop(set);
                end(runtime);
                check(rig, namespace, ledger, trouble, bystander);
            });
        }
    }
}

#[test]
fn local_queues_in_a_local_runtime() {
    for trouble in Trouble::ALL {
        for end in [0, 1, 2] {
            bounded(move || {
                let ledger = Ledger::default();
                let runtime = Builder::new_current_thread()
                    .enable_all()
                    .build_local(LocalOptions::default());
                let runtime = runtime.expect("a runtime");
                let rig = runtime.block_on(setup(trouble).open());
                let namespace = runtime.block_on(rig.namespace());
                runtime.block_on(write_locally(&rig, &namespace, &ledger, trouble));
                let bystander = Bystander::start(namespace.clone());
                match end {
                    0 => drop(runtime),
                    1 => runtime.shutdown_background(),
                    _ => runtime.shutdown_timeout(Duration::ZERO),
                }
                check(rig, namespace, ledger, trouble, bystander);
            });
        }
    }
}

/// Tasks with writes in flight on a queue pair of this thread, which belongs to them alone.
async fn write_locally(rig: &Rig, namespace: &Namespace, ledger: &Ledger, trouble: Trouble) {
    let soft = rig.device.controller();
    soft.inject(trouble.fault()).expect("makes sense");
    let local = namespace.local().expect("one is set apart");
    for index in 0..WRITES {
        let (local, bytes) = (local.clone(), ledger.bytes(512, 1));
        tokio::task::spawn_local(
            async move { local.write(index as u64 * 512, bytes).await.map(drop) },
        );
    }
    drop(local);
    comes_true("all are struck", || {
        soft.faults_hit(trouble.kind()) == WRITES as u64
    })
    .await;
}
