//! The fault matrix: every behaviour of a bad controller, against every kind of command, alone and
//! 32 at a time, on both flavours of runtime and on a thread-local queue.
//!
//! After each: every future has resolved within its bound, every buffer has come back, the
//! controller has accessed nothing that it may not, and the contents are those of an oracle: what was
//! acknowledged is there, and of what was not each block is old or new. And where the controller
//! works again, it works as ever.

mod behaviours;
mod operations;
mod oracle;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use futures::future::join_all;
use nvme_async::{Controller, ControllerState, Error};
use nvme_soft::fault::{Fault, FaultKind};
use nvme_soft::{NamespaceChange, SoftController};
use tokio::task::LocalSet;

use self::behaviours::{End, Variant, variants};
use self::operations::{Disk, Done, Kind};
use self::oracle::{Oracle, Trust};
use crate::support::bounded::{bounded, comes_true, current_thread, multi_thread};
use crate::support::full;
use crate::support::owners::Ledger;
use crate::support::rig::{Rig, Setup};

/// Of the namespace.
const SIZE: u64 = 256 << 10;
/// Where the sources of copies are.
const SOURCES: u64 = 128 << 10;
/// Up to here there are blocks that are used.
const USED: u64 = 192 << 10;

/// Of each command. Short, since most cases wait for it, and several times.
const TIMEOUT: Duration = Duration::from_millis(120);
/// Of an operation: the deadline, what recovery may take (three attempts, each with twice what the
/// controller claims that it may take, CAP.TO), and what a loaded machine takes.
const BOUND: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flavour {
    CurrentThread,
    MultiThread,
    Local,
}

#[derive(Clone, Debug)]
struct Case {
    variant: Variant,
    kind: Kind,
    depth: u64,
    flavour: Flavour,
}

impl Case {
    /// Whether the controller may end up so.
    fn may_end(&self, end: End) -> bool {
        // Recovery identifies the controller too, and is struck if that is.
        let strikes_recovery = self.kind == Kind::Identify && self.variant.times != 1;
        end == self.variant.end || strikes_recovery && end == End::Failed
    }
}

/// The cases of one kind of fault. In a plain run each flavour takes every third.
fn cases(fault: FaultKind) -> Vec<Case> {
    let mut cases = Vec::new();
    for variant in variants(fault) {
        for kind in Kind::ALL {
            for depth in [1, 32] {
                for flavour in [Flavour::CurrentThread, Flavour::MultiThread, Flavour::Local] {
                    cases.push(Case {
                        variant: variant.clone(),
                        kind,
                        depth,
                        flavour,
                    });
                }
            }
        }
    }
    cases.retain(|case| case.variant.suits(case.kind));
    // Admin commands go to the admin queue from wherever they are.
    cases.retain(|case| !case.kind.is_admin() || case.flavour != Flavour::Local);
    if !full() {
        let mut number = 0;
        cases.retain(|_| {
            number += 1;
            // Not the same flavour all the time.
            number % 3 == number / 9 % 3
        });
    }
    cases
}

/// Runs all cases of a kind, several at a time: most of their time they wait.
fn run_all(fault: FaultKind) {
    const THREADS: usize = 4;
    let cases = cases(fault);
    assert!(!cases.is_empty());
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    thread::scope(|scope| {
        let work = || {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)).cloned() {
                    let what = case.clone();
                    let run = || bounded(move || run(fault, &case));
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
                        eprintln!("failed: {what:#?}");
                        *failure.lock().expect("no panics") = Some(panic);
                        next.store(cases.len(), Ordering::Relaxed);
                    }
                }
            })
        };
        // That a scope waits too, ThreadSanitizer does not see.
        for thread in [(); THREADS].map(|()| work()) {
            thread.join().expect("it catches panics");
        }
    });
    if let Some(panic) = failure.into_inner().expect("no panics") {
        resume_unwind(panic);
    }
}

fn run(fault: FaultKind, case: &Case) {
    match case.flavour {
        Flavour::CurrentThread => current_thread().block_on(run_shared(fault, case)),
        Flavour::MultiThread => multi_thread().block_on(run_shared(fault, case)),
        Flavour::Local => {
            let set = LocalSet::new();
            current_thread().block_on(set.run_until(run_local(fault, case)));
        }
    }
}

async fn open() -> Rig {
    Setup::memory(SIZE)
        .config(|config| {
            config.track_unflushed = true;
            config.ready_timeout = Duration::from_millis(500);
            config.max_namespaces = 4;
        })
        .options(|options| options.queues(1).local_queues(1).queue_entries(64))
        .options(|options| options.timeout(Some(TIMEOUT)).retries(2))
        .open()
        .await
}

async fn run_shared(fault: FaultKind, case: &Case) {
    let rig = open().await;
    let namespace = rig.namespace().await;
    run_on(&rig, namespace, fault, case).await;
    finish(rig, case).await;
}

async fn run_local(fault: FaultKind, case: &Case) {
    let rig = open().await;
    let namespace = rig.namespace().await.local().expect("there is one");
    run_on(&rig, namespace, fault, case).await;
    finish(rig, case).await;
}

async fn run_on<D: Disk>(rig: &Rig, disk: D, fault: FaultKind, case: &Case) {
    let soft = rig.device.controller();
    let ledger = Ledger::default();
    let mut contents = Oracle::first_contents();
    for index in 0..case.depth {
        Oracle::even(&mut contents, index);
    }
    let mut oracle = Oracle::new(&contents);
    disk.write_all(contents).await.expect("nothing is amiss");

    inject(soft, case);
    let struck = round(&disk, case, &mut oracle, &ledger, 0).await;
    settle(&disk.controller()).await;
    // A shutdown is yet to come.
    if fault != FaultKind::HangShutdown {
        assert!(soft.faults_hit(fault) > 0, "it does not strike");
        soft.clear_faults();
    }
    soft.release_stuck();
    let end = settle(&disk.controller()).await;
    assert!(case.may_end(end), "{end:?}: {struck:?}");
    assert_eq!(ledger.alive(), 0, "a buffer was kept");
    if end != End::Live {
        let late = round(&disk, case, &mut oracle, &ledger, 1).await;
        assert!(late.iter().all(|done| done.result.is_err()), "{late:?}");
        return;
    }

    restore(soft);
    let active = Instant::now();
    while let Err(error) = disk.read_all(oracle::BLOCK).await {
        let gone = matches!(error, Error::NamespaceGone { .. } | Error::Command(_));
        assert!(gone && active.elapsed() < BOUND, "{error}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let contents = disk.read_all(USED as usize).await.expect("reads");
    oracle.check(&contents);

    let again = round(&disk, case, &mut oracle, &ledger, 1).await;
    for done in &again {
        assert!(done.result.is_ok(), "{done:?}");
    }
    let contents = disk.read_all(USED as usize).await.expect("reads");
    oracle.check(&contents);
    assert_eq!(ledger.alive(), 0, "a buffer was kept");
}

/// Sees to it that one in the middle of the commands to come is struck.
fn inject(soft: &SoftController, case: &Case) {
    let Variant {
        then,
        times,
        besides,
        ..
    } = &case.variant;
    let struck = Fault::new(then.clone())
        .opcode(case.kind.opcode())
        .nth(1 + case.depth / 2)
        .times(*times);
    for fault in besides.iter().cloned().chain([struck]) {
        soft.inject(fault).expect("makes sense");
    }
}

/// Runs the operations, all at a time.
async fn round<D: Disk>(
    disk: &D,
    case: &Case,
    oracle: &mut Oracle,
    ledger: &Ledger,
    number: u8,
) -> Vec<Done> {
    let Case {
        kind,
        depth,
        variant,
        ..
    } = case;
    let layouts: Vec<_> = (0..*depth)
        .map(|index| oracle.layout(*kind, index, number))
        .collect();
    let running = layouts.iter().map(|layout| {
        let done = disk.run(*kind, *layout, TIMEOUT, ledger);
        tokio::time::timeout(BOUND, done)
    });
    let done: Vec<Done> = join_all(running)
        .await
        .into_iter()
        .map(|done| done.expect("it resolves within its bound"))
        .collect();
    for (layout, done) in layouts.iter().zip(&done) {
        // Later rounds are honest.
        let trust = match variant {
            _ if number > 0 => Trust::Everything,
            Variant { loses: true, .. } => Trust::Durable,
            Variant {
                lies_about_data: true,
                ..
            } => Trust::Nothing,
            _ => Trust::Everything,
        };
        oracle.note(*kind, layout, done, trust);
        if let Some(data) = &done.data
            && !(variant.lies_about_data && number == 0)
        {
            assert!(
                *data == vec![layout.old; layout.len()],
                "read something else"
            );
        }
    }
    done
}

/// How the controller is, when what is late has arrived and recovery, if any, is over.
async fn settle(controller: &Controller) -> End {
    tokio::time::sleep(Duration::from_millis(20)).await;
    comes_true("recovery ends", || {
        !matches!(controller.state(), ControllerState::Recovering { .. })
    })
    .await;
    match controller.state() {
        ControllerState::Live => End::Live,
        ControllerState::Failed { .. } => End::Failed,
        ControllerState::Removed => End::Removed,
        other => panic!("{other:?}"),
    }
}

fn restore(soft: &SoftController) {
    // Refused where it is attached.
    let _ = soft.change_namespace(NamespaceChange::Attach { nsid: 1 });
}

async fn finish(rig: Rig, case: &Case) {
    let live = rig.controller().state() == ControllerState::Live;
    let Variant {
        spoils_shutdown,
        forgets_queues,
        ..
    } = case.variant;
    let shutdown = tokio::time::timeout(BOUND * 2, rig.controller().shutdown());
    let shut_down = shutdown.await.expect("ends within its bound");
    match shut_down {
        Ok(()) => assert!(live && !spoils_shutdown),
        // With deadlines as short as these, a loaded machine is enough for that.
        Err(Error::TimedOut { .. }) => {}
        Err(error) => assert!(!live || spoils_shutdown, "{error}"),
    }
    rig.end(|device| {
        assert_eq!(
            device.stray_accesses(),
            0,
            "{:x?}",
            device.iommu().last_stray()
        );
        let counters = device.counters();
        assert_eq!(counters.refused_accesses, 0);
        assert_eq!(counters.redundant_completion_heads, 0);
        if !forgets_queues {
            assert_eq!(counters.invalid_doorbells, 0);
        }
    })
    .await;
}

macro_rules! matrix {
    ($($name:ident $kind:ident)+) => {
        $(#[test]
        fn $name() {
            run_all(FaultKind::$kind);
        })+

        #[test]
        fn it_has_every_kind_of_fault() {
            let mut known = [$(FaultKind::$kind),+];
            known.sort_unstable();
            let mut all = FaultKind::ALL;
            all.sort_unstable();
            assert_eq!(known, all);
        }
    };
}

matrix! {
    delay Delay
    swallow Swallow
    hold Hold
    complete_twice CompleteTwice
    out_of_order OutOfOrder
    complete_early CompleteEarly
    status Status
    corrupt_completion CorruptCompletion
    flip_phase FlipPhase
    corrupt_data CorruptData
    truncate_data TruncateData
    lose_interrupt LoseInterrupt
    spurious_interrupt SpuriousInterrupt
    tear Tear
    power_loss PowerLoss
    fail Fail
    vanish Vanish
    change_namespace ChangeNamespace
    add_namespace AddNamespace
    refuse_enable RefuseEnable
    slow_ready SlowReady
    hang_disable HangDisable
    fail_reset FailReset
    hang_shutdown HangShutdown
}
