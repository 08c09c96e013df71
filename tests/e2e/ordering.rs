//! What is durable when, and what comes after what, on controllers that take their time.

use std::time::Duration;

use futures::{FutureExt, poll};
use nvme_async::{Namespace, Zeroes};

use crate::support::bounded::on_both_flavours;
use crate::support::faulty::{Call, FaultyStore, Script};
use crate::support::rig::{Rig, Setup};

const SIZE: u64 = 1 << 20;

/// A slow controller that notes what it does.
async fn slow(change: impl FnOnce(Setup) -> Setup) -> (Rig, Namespace, Script) {
    let script = Script::default();
    let setup = Setup::empty()
        .store(FaultyStore::new(SIZE, &script), 512)
        .config(|config| config.latency = Duration::from_millis(2));
    let rig = change(setup).open().await;
    let namespace = rig.namespace().await;
    (rig, namespace, script)
}

fn position(log: &[Call], is_it: impl Fn(&Call) -> bool) -> usize {
    log.iter().position(is_it).expect("it happened")
}

#[test]
fn a_flush_covers_the_writes_that_had_resolved() {
    on_both_flavours(async || {
        let (rig, namespace, script) = slow(|setup| setup).await;
        for _ in 0..5 {
            let writes = (0..8).map(|index| namespace.write(index * 4096, vec![1; 4096]));
            for written in futures::future::join_all(writes).await {
                written.expect("writes");
            }
            let resolved = script.take_log();
            assert_eq!(resolved.len(), 8, "all were written before they resolved");
            assert!(
                resolved
                    .iter()
                    .all(|call| matches!(call, Call::Write { durable: false, .. }))
            );
            // These have not resolved: nothing is said of them.
            let later = futures::future::join_all(
                (8..16).map(|index| namespace.write(index * 4096, vec![1; 4096])),
            );
            let (flushed, later) = futures::join!(namespace.flush(), later);
            flushed.expect("flushes");
            assert!(later.into_iter().all(|written| written.is_ok()));
            let log = script.take_log();
            position(&log, |call| *call == Call::Flush);
            assert_eq!(log.len(), 9);
        }
        drop(namespace);
        rig.close().await;
    });
}

/// The flush goes to the controller even if its future is dropped, and only when it is polled.
#[test]
fn a_flush_is_lazy_and_goes_on() {
    on_both_flavours(async || {
        let (rig, namespace, script) = slow(|setup| setup).await;
        drop(namespace.flush());
        namespace.quiesce().await.expect("quiesces");
        assert_eq!(script.take_log(), []);
        drop(namespace.flush().now_or_never());
        namespace.quiesce().await.expect("quiesces");
        assert_eq!(script.take_log(), [Call::Flush]);
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn fua_is_on_every_part() {
    on_both_flavours(async || {
        let (rig, namespace, script) = slow(|setup| setup.config(|config| config.mdts = 1)).await;
        let write = namespace.write(512, vec![1; 64 << 10]).fua();
        write.await.expect("writes");
        let log = script.take_log();
        assert_eq!(log.len(), 8);
        assert!(
            log.iter()
                .all(|call| matches!(call, Call::Write { durable: true, .. }))
        );
        namespace
            .write(512, vec![1; 8 << 10])
            .await
            .expect("writes");
        let log = script.take_log();
        assert!(matches!(
            log[..],
            [Call::Write {
                durable: false,
                len: 8192,
                ..
            }]
        ));
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn without_a_cache_there_is_nothing_to_flush() {
    on_both_flavours(async || {
        let (rig, namespace, script) =
            slow(|setup| setup.config(|config| config.volatile_write_cache = false)).await;
        namespace.write(0, vec![1; 512]).await.expect("writes");
        namespace
            .write(0, vec![2; 512])
            .fua()
            .await
            .expect("writes");
        let commands = rig.device.counters().commands;
        namespace.flush().await.expect("is nothing");
        assert_eq!(rig.device.counters().commands, commands);
        let log = script.take_log();
        assert_eq!(log.len(), 2);
        assert!(
            log.iter()
                .all(|call| matches!(call, Call::Write { durable: true, .. }))
        );
        drop(namespace);
        rig.close().await;
    });
}

/// Shutdown makes durable what was written.
#[test]
fn shutdown_flushes() {
    on_both_flavours(async || {
        let (rig, namespace, script) = slow(|setup| setup).await;
        namespace.write(0, vec![1; 512]).await.expect("writes");
        script.take_log();
        drop(namespace);
        rig.close().await;
        assert_eq!(script.take_log(), [Call::Flush]);
    });
}

#[test]
fn quiesce_waits_for_dropped_writes() {
    on_both_flavours(async || {
        let (rig, namespace, script) = slow(|setup| setup).await;
        for _ in 0..5 {
            for index in 0..8 {
                drop(namespace.write(index * 512, vec![1; 512]).now_or_never());
            }
            namespace.quiesce().await.expect("quiesces");
            assert_eq!(script.take_log().len(), 8, "none comes later");
        }
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn quiesce_is_pending_for_as_long_as_they_are() {
    on_both_flavours(async || {
        let (rig, namespace, script) = slow(|setup| setup).await;
        assert!(
            namespace.quiesce().now_or_never().is_some(),
            "nothing to wait for"
        );
        rig.device.controller().hold_io();
        assert!(namespace.write(0, vec![1; 512]).now_or_never().is_none());
        let mut first = Box::pin(namespace.quiesce());
        let mut second = Box::pin(namespace.quiesce());
        for _ in 0..10 {
            assert!(poll!(&mut first).is_pending());
            assert!(poll!(&mut second).is_pending());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        drop(first);
        rig.device.controller().release();
        second.await.expect("quiesces");
        assert_eq!(script.take_log().len(), 1);
        drop(namespace);
        rig.close().await;
    });
}

/// Those that wait for a slot when it is first polled have been started too.
#[test]
fn quiesce_with_more_commands_than_slots() {
    on_both_flavours(async || {
        let (rig, namespace, script) = slow(|setup| {
            setup
                .config(|config| config.io_queue_pairs = 1)
                .options(|options| options.queue_entries(3))
        })
        .await;
        rig.device.controller().hold_io();
        let mut writes: Vec<_> = (0..6)
            .map(|index| Box::pin(namespace.write(index * 512, vec![1; 512])))
            .collect();
        for write in &mut writes {
            assert!(poll!(write).is_pending());
        }
        let mut quiesce = Box::pin(namespace.quiesce());
        assert!(poll!(&mut quiesce).is_pending());
        rig.device.controller().release();
        quiesce.await.expect("quiesces");
        assert_eq!(script.take_log().len(), 6);
        for write in writes {
            write.await.expect("writes");
        }
        drop(namespace);
        rig.close().await;
    });
}

/// One operation after the other, each sees what those before it did.
#[test]
fn what_resolved_is_seen_by_what_comes_after() {
    on_both_flavours(async || {
        let (rig, namespace, _) =
            slow(|setup| setup.config(|config| config.latency = Duration::from_micros(50))).await;
        for round in 1..100_u8 {
            namespace.write(0, vec![round; 8192]).await.expect("writes");
            let (all, half) = futures::join!(namespace.read(0, 8192), namespace.read(4096, 512));
            assert_eq!(all.expect("reads"), vec![round; 8192]);
            assert_eq!(half.expect("reads"), vec![round; 512]);
            let zeroed = namespace.write_zeroes(512, 512, Zeroes::Allocated).await;
            zeroed.expect("writes zeroes");
            assert_eq!(namespace.read(512, 512).await.expect("reads"), vec![0; 512]);
        }
        drop(namespace);
        rig.close().await;
    });
}
