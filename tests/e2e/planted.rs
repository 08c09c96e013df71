//! Tests of the tests: bugs that a driver could have, each of which must be noticed.
//!
//! They are planted between the driver and the controller. What notices them is what the other
//! tests rely on: comparison with a model, stray accesses, errors, and counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{FutureExt, poll};
use nvme_async::device::soft::SoftDevice;
use nvme_async::nvme_spec::{DataPointer, Sqe};
use nvme_async::{Controller, Error, Namespace, PollMode};
use nvme_spec::opcode::NvmOpcode;

use crate::support::bounded::{comes_true, on_both_flavours, on_current_thread};
use crate::support::owners::Ledger;
use crate::support::rig::{Setup, assert_harmless};
use crate::support::suite::disk::Disk;
use crate::support::tampered::{Mapper, Tampered};

const SIZE: u64 = 1 << 20;
const PAGE: usize = 4096;

struct Bench {
    soft: Arc<SoftDevice>,
    device: Arc<Tampered>,
    controller: Controller,
    namespace: Namespace,
}

impl Bench {
    async fn new(wrap: impl FnOnce(Arc<SoftDevice>) -> Arc<Tampered>, mode: PollMode) -> Self {
        // PRPs are what drivers get wrong.
        let setup = Setup::memory(SIZE)
            .config(|config| config.sgl = false)
            .options(|options| options.poll_mode(mode));
        let (soft, options) = setup.start();
        let device = wrap(soft.clone());
        let controller = options.attach(device.clone()).await.expect("comes up");
        let namespace = controller.namespace(1).await.expect("is there");
        Self {
            soft,
            device,
            controller,
            namespace,
        }
    }

    async fn with_bugs() -> Self {
        Self::new(Tampered::new, PollMode::default()).await
    }

    /// Whether the I/O suite notices.
    async fn suite_fails(&self) -> bool {
        let namespace = self.namespace.clone();
        let suite = tokio::spawn(async move {
            let mut disk = Disk::new(&namespace, 1, SIZE).await;
            disk.lengths(false).await;
        });
        suite.await.is_err_and(|error| error.is_panic())
    }

    async fn end(self) {
        self.device.behave();
        self.controller.shutdown().await.expect("shuts down");
    }
}

/// Changes the PRPs of one kind of command.
fn with_prps(
    of: NvmOpcode,
    change: impl Fn(&mut u64, &mut u64, &Mapper),
) -> impl FnMut(Sqe, &Mapper) -> Sqe {
    move |command, memory| match command.data_pointer() {
        Ok(DataPointer::Prp { mut prp1, mut prp2 }) if NvmOpcode(command.opcode()) == of => {
            change(&mut prp1, &mut prp2, memory);
            command.with_data(DataPointer::Prp { prp1, prp2 })
        }
        _ => command,
    }
}

/// How many pages a read or write touches.
fn pages(command: Sqe, prp1: u64) -> usize {
    let len = ((command.cdw12() & 0xffff) as usize + 1) * 512;
    (prp1 as usize % PAGE + len).div_ceil(PAGE)
}

#[test]
fn nothing_is_noticed_where_nothing_is_planted() {
    on_both_flavours(async || {
        let bench = Bench::with_bugs().await;
        bench
            .device
            .tamper(with_prps(NvmOpcode::WRITE, |_, _, _| {}));
        assert!(!bench.suite_fails().await);
        let soft = bench.soft.clone();
        bench.end().await;
        assert_harmless(&soft);
    });
}

#[test]
fn the_first_prp_off_by_one_page() {
    on_both_flavours(async || {
        let bench = Bench::with_bugs().await;
        let bug = with_prps(NvmOpcode::WRITE, |prp1, _, _| *prp1 += PAGE as u64);
        bench.device.tamper(bug);
        assert!(bench.suite_fails().await);
        bench.end().await;
    });
}

#[test]
fn the_second_prp_off_by_one_page() {
    on_both_flavours(async || {
        for off in [PAGE as u64, 0_u64.wrapping_sub(PAGE as u64)] {
            let bench = Bench::with_bugs().await;
            bench.device.tamper(move |command, memory| {
                let bug = move |prp1: &mut u64, prp2: &mut u64, _: &Mapper| {
                    if pages(command, *prp1) == 2 {
                        *prp2 = prp2.wrapping_add(off);
                    }
                };
                with_prps(NvmOpcode::WRITE, bug)(command, memory)
            });
            assert!(bench.suite_fails().await);
            bench.end().await;
        }
    });
}

#[test]
fn a_prp_list_off_by_one_page() {
    on_both_flavours(async || {
        for last in [false, true] {
            let bench = Bench::with_bugs().await;
            bench.device.tamper(move |command, memory| {
                let bug = move |prp1: &mut u64, list: &mut u64, memory: &Mapper| {
                    let pages = pages(command, *prp1) as u64;
                    if pages > 2 {
                        let entry = *list + if last { (pages - 2) * 8 } else { 0 };
                        memory.store_u64(entry, memory.load_u64(entry) - PAGE as u64);
                    }
                };
                with_prps(NvmOpcode::WRITE, bug)(command, memory)
            });
            assert!(bench.suite_fails().await);
            bench.end().await;
        }
    });
}

/// In the other direction within one buffer, since the device writes where it is told to.
#[test]
fn data_read_into_the_next_page() {
    on_both_flavours(async || {
        let bench = Bench::with_bugs().await;
        bench
            .namespace
            .write(0, vec![0xbb; PAGE])
            .await
            .expect("writes");
        let bug = with_prps(NvmOpcode::READ, |prp1, _, _| *prp1 += PAGE as u64);
        bench.device.tamper(bug);
        let mut buffer = bench.namespace.allocate(2 * PAGE).expect("room");
        buffer.fill(0xee);
        buffer.truncate(PAGE);
        let read = bench.namespace.read_into(0, buffer).await;
        assert_eq!(&*read.expect("nothing refuses it"), [0xee; PAGE]);
        bench.end().await;
    });
}

/// Memory that is mapped for one command has nothing mapped behind it.
#[test]
fn a_page_past_the_end_of_a_mapping() {
    on_both_flavours(async || {
        let bench = Bench::with_bugs().await;
        bench
            .device
            .tamper(with_prps(NvmOpcode::WRITE, |_, list, memory| {
                for entry in (*list..).step_by(8).take(17) {
                    memory.store_u64(entry, memory.load_u64(entry) + PAGE as u64);
                }
            }));
        // What the device reads by mistake is memory of this test nevertheless.
        let bytes = bytes::Bytes::from(vec![1; 19 * PAGE]).slice(..17 * PAGE);
        let written = bench.namespace.write(0, bytes).await;
        let error = written.map(drop).expect_err("refused").error;
        assert!(matches!(error, Error::Command(_)), "{error:?}");
        assert!(bench.soft.stray_accesses() > 0);
        bench.end().await;
    });
}

#[test]
fn pages_mapped_where_others_belong() {
    on_both_flavours(async || {
        let bench = Bench::with_bugs().await;
        bench.device.mapper().rotate();
        assert!(bench.suite_fails().await);
        bench.end().await;
    });
}

#[test]
fn unmapped_while_in_flight() {
    on_both_flavours(async || {
        let bench = Bench::with_bugs().await;
        let ledger = Ledger::default();
        let len = 128 << 10;
        let registration = bench.controller.register(ledger.registered(len));
        let registration = registration.await.expect("registers");
        let slice = registration.slice(0, len).expect("is all of it");
        bench.soft.controller().hold_io();
        let mut read = Box::pin(bench.namespace.read_into(0, slice));
        assert!(poll!(&mut read).is_pending());
        let mapper = bench.device.mapper();
        mapper.unmap_early(&mapper.find(len as u64).expect("is mapped"));
        bench.soft.controller().release();
        let error = read.await.expect_err("refused").error;
        assert!(matches!(error, Error::Command(_)), "{error:?}");
        let stray = bench.soft.iommu().last_stray().expect("it was seen");
        assert!(stray.is_write);
        drop(registration);
        bench.end().await;
    });
}

#[test]
fn a_temporary_mapping_unmapped_while_in_flight() {
    on_both_flavours(async || {
        let bench = Bench::with_bugs().await;
        let ledger = Ledger::default();
        let len = 128 << 10;
        bench.soft.controller().hold_io();
        let write = bench.namespace.write(0, ledger.bytes(len, 1));
        assert!(write.now_or_never().is_none());
        let mapper = bench.device.mapper();
        // It begins anywhere in a page.
        let mapped = [len, len + PAGE]
            .into_iter()
            .find_map(|len| mapper.find(len as u64));
        mapper.unmap_early(&mapped.expect("is mapped"));
        bench.soft.controller().release();
        bench.namespace.quiesce().await.expect("quiesces");
        let stray = bench.soft.iommu().last_stray().expect("it was seen");
        assert!(!stray.is_write);
        comes_true("the memory comes back", || ledger.alive() == 0).await;
        bench.end().await;
    });
}

#[test]
fn used_after_it_was_unmapped() {
    on_both_flavours(async || {
        let bench = Bench::with_bugs().await;
        let old = Arc::new(AtomicU64::new(0));
        let note = old.clone();
        let bug =
            move |prp1: &mut u64, _: &mut u64, _: &Mapper| note.store(*prp1, Ordering::SeqCst);
        bench.device.tamper(with_prps(NvmOpcode::WRITE, bug));
        bench
            .namespace
            .write(0, vec![1; 128 << 10])
            .await
            .expect("writes");
        assert_eq!(bench.soft.stray_accesses(), 0);
        bench
            .device
            .tamper(with_prps(NvmOpcode::WRITE, move |prp1, _, _| {
                *prp1 = old.load(Ordering::SeqCst) & !(PAGE as u64 - 1);
            }));
        let buffer = bench.namespace.allocate(512).expect("room");
        let error = bench
            .namespace
            .write(0, buffer)
            .await
            .expect_err("refused")
            .error;
        assert!(matches!(error, Error::Command(_)), "{error:?}");
        assert!(bench.soft.stray_accesses() > 0);
        bench.end().await;
    });
}

/// Memory that went back to the pool too early belongs to somebody else when the data comes.
#[test]
fn a_buffer_freed_while_in_flight() {
    on_both_flavours(async || {
        let bench = Bench::with_bugs().await;
        bench
            .namespace
            .write(0, vec![0xbb; PAGE])
            .await
            .expect("writes");
        let mut others = bench.namespace.allocate(PAGE).expect("room");
        others.fill(0xaa);
        let reused = others.iova().expect("of the pool");
        bench
            .device
            .tamper(with_prps(NvmOpcode::READ, move |prp1, _, _| *prp1 = reused));
        drop(
            bench
                .namespace
                .read(0, PAGE)
                .await
                .expect("nothing refuses it"),
        );
        let others = std::hint::black_box(others);
        assert!(others.iter().any(|&byte| byte != 0xaa));
        bench.end().await;
    });
}

/// Without a single interrupt all goes on, and each completion that was found late is counted.
#[test]
fn interrupts_that_are_lost() {
    for mode in [PollMode::Interrupt, PollMode::Adaptive] {
        on_both_flavours(async move || {
            let bench = Bench::new(Tampered::deaf, mode).await;
            for round in 0..4 {
                bench
                    .namespace
                    .write(0, vec![round; PAGE])
                    .await
                    .expect("writes");
                let read = bench.namespace.read(0, PAGE).await.expect("reads");
                assert!(read.iter().all(|&byte| byte == round));
            }
            let counters = bench.controller.counters();
            assert_eq!(counters.completions, counters.polled_completions);
            // So that no look in passing finds it.
            bench.soft.controller().hold_io();
            let mut read = Box::pin(bench.namespace.read(0, PAGE));
            assert!(poll!(&mut read).is_pending());
            tokio::time::sleep(Duration::from_millis(2)).await;
            bench.soft.controller().release();
            drop(read.await.expect("reads"));
            let lost = bench.controller.counters().lost_interrupts;
            assert!(lost > counters.lost_interrupts);
            bench.end().await;
        });
    }
}

/// A command that the controller is not told of ends with its deadline, and does not cost more
/// than itself.
#[test]
fn a_doorbell_that_is_lost() {
    on_current_thread(async || {
        let bench = Bench::with_bugs().await;
        bench.device.lose_rings(1);
        let timeout = Duration::from_millis(20);
        let lost = bench
            .namespace
            .write(0, vec![1; 512])
            .timeout(timeout)
            .await;
        let error = lost.expect_err("nobody knows of it").error;
        assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
        // Its queue pair was created anew, so that the next doorbell does not tell of it.
        bench
            .namespace
            .write(512, vec![2; 512])
            .await
            .expect("writes");
        bench.namespace.quiesce().await.expect("quiesces");
        let read = bench.namespace.read(0, 1024).await.expect("reads");
        assert!(read == [[0; 512], [2; 512]].concat());
        let soft = bench.soft.clone();
        bench.end().await;
        assert_harmless(&soft);
    });
}
