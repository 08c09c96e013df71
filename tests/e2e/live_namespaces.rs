//! Namespaces that change under open handles.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::{StreamExt, poll};
use nvme_async::nvme_spec::identify::Cns;
use nvme_async::nvme_spec::opcode::AdminOpcode;
use nvme_async::nvme_spec::{Sqe, Status};
use nvme_async::{
    Controller, ControllerEvent, Error, EventStream, Namespace, NamespaceChange as Change, Zeroes,
};
use nvme_soft::store::MemoryStore;
use nvme_soft::{NamespaceChange, NamespaceConfig};
use tokio::runtime::Builder;

use crate::support::bounded::{bounded, comes_true, multi_thread, on_both_flavours};
use crate::support::full;
use crate::support::liar::Liar;
use crate::support::owners::Ledger;
use crate::support::rig::Setup;

const SIZE: u64 = 1 << 20;

async fn next_change(events: &mut EventStream) -> (u32, Change) {
    match events.next().await {
        Some(ControllerEvent::NamespaceChanged { nsid, change }) => (nsid, change),
        other => panic!("{other:?}"),
    }
}

fn gone<T: std::fmt::Debug>(result: Result<T, impl Into<Error> + std::fmt::Debug>) -> bool {
    let error = result.expect_err("the namespace is gone").into();
    matches!(error, Error::NamespaceGone { nsid: 1, .. })
}

fn changed<T: std::fmt::Debug>(result: Result<T, impl Into<Error>>) -> &'static str {
    match result.expect_err("the namespace has changed").into() {
        Error::NamespaceChanged { nsid: 1, how, .. } => how,
        error => panic!("{error:?}"),
    }
}

#[test]
fn a_handle_follows_the_size() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let soft = rig.device.controller();
        let namespace = rig.namespace().await;
        let again = rig.namespace().await;
        let mut events = rig.controller().events();
        let before = namespace.identify();

        soft.resize_namespace(1, 2 * SIZE).expect("grows");
        let grown = Change::Resized {
            from: SIZE,
            to: 2 * SIZE,
        };
        assert_eq!(next_change(&mut events).await, (1, grown));
        // The event comes when the handles know.
        for handle in [&namespace, &again] {
            assert_eq!(handle.capacity(), 2 * SIZE);
            assert_eq!(handle.identify().nsze.get(), 2 * SIZE / 512);
        }
        assert_eq!(before.nsze.get(), SIZE / 512, "a snapshot stays");
        namespace
            .write(2 * SIZE - 512, vec![7; 512])
            .await
            .expect("writes");
        let read = again.read(2 * SIZE - 512, 512).await.expect("reads");
        assert_eq!(read, vec![7; 512]);
        drop(read);

        soft.resize_namespace(1, SIZE / 2).expect("shrinks");
        assert_eq!(
            next_change(&mut events).await,
            (
                1,
                Change::Resized {
                    from: 2 * SIZE,
                    to: SIZE / 2
                }
            )
        );
        let refused = again.read(SIZE / 2, 512).await.expect_err("past the end");
        assert!(
            matches!(refused, Error::OutOfRange { capacity, .. } if capacity == SIZE / 2),
            "{refused:?}"
        );
        again.read(SIZE / 2 - 512, 512).await.expect("reads");
        drop((namespace, again));
        rig.close().await;
    });
}

#[test]
fn a_local_handle_follows_too() {
    bounded(|| {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build_local(Default::default());
        runtime.expect("a runtime").block_on(async {
            let rig = Setup::memory(SIZE).open().await;
            let soft = rig.device.controller();
            let local = rig.namespace().await.local().expect("a queue pair");
            let mut events = rig.controller().events();
            soft.resize_namespace(1, 4096).expect("shrinks");
            next_change(&mut events).await;
            assert_eq!(local.capacity(), 4096);
            let refused = local.read(4096, 512).await.expect_err("past the end");
            assert!(matches!(refused, Error::OutOfRange { .. }), "{refused:?}");
            soft.detach_namespace(1).expect("goes");
            next_change(&mut events).await;
            assert!(gone(local.read(0, 512).await));
            assert!(gone(local.flush().await));
            soft.attach_namespace(1).expect("comes back");
            next_change(&mut events).await;
            local.read(0, 512).await.expect("reads");
            drop(local);
            rig.close().await;
        });
    });
}

#[test]
fn a_namespace_that_is_detached_fails_until_it_is_attached() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let soft = rig.device.controller();
        let namespace = rig.namespace().await;
        let mut events = rig.controller().events();
        namespace.write(0, vec![7; 512]).await.expect("writes");
        soft.detach_namespace(1).expect("goes");
        assert_eq!(next_change(&mut events).await, (1, Change::Detached));

        let commands = rig.device.counters().commands;
        assert_eq!(namespace.capacity(), 0);
        assert!(gone(namespace.read(0, 512).await));
        assert!(gone(namespace.flush().await));
        assert!(gone(
            namespace.write_zeroes(0, 512, Zeroes::Allocated).await
        ));
        assert!(gone(
            namespace.discard(std::slice::from_ref(&(0..512))).await
        ));
        let ledger = Ledger::default();
        let write = namespace.write(0, ledger.bytes(512, 1)).await;
        let error = write.expect_err("the namespace is gone");
        assert!(error.buffer.is_some());
        drop(error);
        assert_eq!(ledger.alive(), 0);
        assert_eq!(rig.device.counters().commands, commands, "nothing was sent");
        let missing = rig.controller().namespace(1).await.expect_err("not active");
        assert!(
            matches!(missing, Error::NoNamespace { nsid: 1, .. }),
            "{missing:?}"
        );

        // It may be of another size when it comes back.
        soft.resize_namespace(1, 2 * SIZE).expect("grows");
        soft.attach_namespace(1).expect("comes back");
        let attached = Change::Attached { capacity: 2 * SIZE };
        assert_eq!(next_change(&mut events).await, (1, attached));
        assert_eq!(namespace.capacity(), 2 * SIZE);
        let read = namespace.read(0, 512).await.expect("reads");
        assert_eq!(read, vec![7; 512]);
        drop((namespace, read));
        rig.close().await;
    });
}

#[test]
fn opening_it_again_revives_the_handles_that_there_are() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let soft = rig.device.controller();
        let namespace = rig.namespace().await;
        let mut events = rig.controller().events();
        soft.detach_namespace(1).expect("goes");
        next_change(&mut events).await;
        soft.attach_namespace(1).expect("comes back");
        // Whether or not the event has come by now.
        let again = rig.namespace().await;
        namespace.read(0, 512).await.expect("reads");
        assert_eq!((namespace.capacity(), again.capacity()), (SIZE, SIZE));
        drop((namespace, again));
        rig.close().await;
    });
}

#[test]
fn another_format_makes_a_handle_useless() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let soft = rig.device.controller();
        let old = rig.namespace().await;
        let mut events = rig.controller().events();
        let format = |lba_size| NamespaceChange::Format { nsid: 1, lba_size };
        soft.change_namespace(format(4096)).expect("is formatted");
        let reformatted = Change::Reformatted {
            block_size: 4096,
            metadata: 0,
        };
        assert_eq!(next_change(&mut events).await, (1, reformatted));
        let how = "has another logical block size";
        assert_eq!(changed(old.read(0, 512).await), how);
        assert_eq!(changed(old.write(0, vec![0; 4096]).await), how);
        assert_eq!(changed(old.flush().await), how);

        let new = rig.namespace().await;
        assert_eq!((new.block_size(), old.block_size()), (4096, 512));
        new.write(0, vec![7; 4096]).await.expect("writes");
        // Not even the old format helps the old handle: what it knew of the data is wrong.
        soft.change_namespace(format(512)).expect("is formatted");
        next_change(&mut events).await;
        assert_eq!(changed(new.read(0, 4096).await), how);
        assert_eq!(changed(old.read(0, 512).await), how);
        rig.namespace().await.read(0, 512).await.expect("reads");
        drop((old, new));
        rig.close().await;
    });
}

#[test]
fn a_namespace_that_is_new_can_be_opened() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE)
            .config(|config| config.max_namespaces = 5)
            .open()
            .await;
        let mut events = rig.controller().events();
        let store = MemoryStore::new(SIZE / 2).expect("a little memory");
        let added = rig
            .device
            .controller()
            .add_namespace(NamespaceConfig::new(store, 4096));
        assert_eq!(added.expect("there is room"), 2);
        let attached = Change::Attached { capacity: SIZE / 2 };
        assert_eq!(next_change(&mut events).await, (2, attached));
        let active = rig.controller().active_namespaces().await;
        assert_eq!(active.expect("lists"), [1, 2]);
        let namespace = rig.controller().namespace(2).await.expect("is there");
        namespace.write(0, vec![1; 4096]).await.expect("writes");
        drop(namespace);
        rig.close().await;
    });
}

/// One of many tasks that read and write while the namespace changes. Each has blocks of its own.
async fn work(namespace: Namespace, area: u64, stop: Arc<AtomicBool>) -> usize {
    let mut expected = None;
    let mut refused = 0;
    let mut fill = 0u8;
    while !stop.load(Ordering::SeqCst) {
        fill = fill.wrapping_add(1);
        let write = namespace.write(area, vec![fill; 4096]).await;
        match write.map_err(Error::from) {
            Ok(_) => expected = Some(fill),
            Err(error) => {
                assert_is_change(&error);
                refused += 1;
            }
        }
        match namespace.read(area, 4096).await {
            Ok(read) => {
                if let Some(fill) = expected {
                    assert_eq!(read, vec![fill; 4096], "at {area}");
                }
            }
            Err(error) => {
                assert_is_change(&error);
                refused += 1;
            }
        }
        tokio::task::yield_now().await;
    }
    refused
}

#[track_caller]
fn assert_is_change(error: &Error) {
    let expected = match error {
        Error::NamespaceGone { .. } | Error::OutOfRange { .. } => true,
        // Sent before the change was known.
        Error::Command(failed) => {
            failed.status.is(Status::LBA_OUT_OF_RANGE) || failed.status.is(Status::INVALID_FIELD)
        }
        _ => false,
    };
    assert!(expected, "{error:?}");
}

#[test]
fn changes_under_load_are_typed_errors_and_lose_nothing() {
    on_both_flavours(async || {
        const TASKS: u64 = 16;
        let rig = Setup::memory(SIZE).open().await;
        let namespace = rig.namespace().await;
        let stop = Arc::new(AtomicBool::new(false));
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let stop = stop.clone();
                tokio::spawn(work(namespace.clone(), task * 4096, stop))
            })
            .collect();
        let soft = rig.device.controller();
        let rounds = if full() { 60 } else { 6 };
        for _ in 0..rounds {
            soft.detach_namespace(1).expect("goes");
            tokio::time::sleep(Duration::from_millis(20)).await;
            soft.attach_namespace(1).expect("comes back");
            tokio::time::sleep(Duration::from_millis(20)).await;
            soft.resize_namespace(1, 2 * SIZE).expect("grows");
            tokio::time::sleep(Duration::from_millis(20)).await;
            // All tasks stay inside.
            soft.resize_namespace(1, TASKS * 4096).expect("shrinks");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        stop.store(true, Ordering::SeqCst);
        let mut refused = 0;
        for task in tasks {
            refused += task.await.expect("no panics");
        }
        assert!(refused > 0, "the changes were not felt");
        comes_true("the last size is known", || {
            namespace.capacity() == TASKS * 4096
        })
        .await;
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn more_changes_than_the_list_has_room_for() {
    on_both_flavours(async || {
        let mut setup = Setup::empty();
        for _ in 0..1100 {
            setup = setup.store(MemoryStore::new(64 << 10).expect("a little memory"), 512);
        }
        let rig = setup.open().await;
        let soft = rig.device.controller();
        let first = rig.controller().namespace(1).await.expect("is there");
        let last = rig.controller().namespace(1100).await.expect("is there");
        let mut events = rig.controller().events();
        // The list is not read meanwhile.
        soft.hold();
        for nsid in 1..1100 {
            soft.resize_namespace(nsid, 4096).expect("shrinks");
        }
        soft.detach_namespace(1100).expect("goes");
        soft.release();
        let mut seen = Vec::new();
        loop {
            match events.next().await.expect("goes on") {
                ControllerEvent::ManyNamespacesChanged => break,
                ControllerEvent::NamespaceChanged { nsid, change } => seen.push((nsid, change)),
                event => panic!("{event:?}"),
            }
        }
        let shrunk = Change::Resized {
            from: 64 << 10,
            to: 4096,
        };
        assert_eq!(seen, [(1100, Change::Detached), (1, shrunk)]);
        assert_eq!((first.capacity(), last.capacity()), (4096, 0));
        drop((first, last));
        rig.close().await;
    });
}

#[test]
fn without_reports_a_scan_finds_out() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let namespace = rig.namespace().await;
        let mut events = rig.controller().events();
        switch_events_off(rig.controller()).await;
        let soft = rig.device.controller();
        soft.resize_namespace(1, SIZE / 2).expect("shrinks");
        namespace.read(0, 512).await.expect("reads");
        assert_eq!(namespace.capacity(), SIZE, "nobody said");
        rig.controller().rescan().await.expect("scans");
        assert_eq!(namespace.capacity(), SIZE / 2);
        let shrunk = Change::Resized {
            from: SIZE,
            to: SIZE / 2,
        };
        assert_eq!(next_change(&mut events).await, (1, shrunk));
        soft.detach_namespace(1).expect("goes");
        rig.controller().rescan().await.expect("scans");
        assert!(gone(namespace.read(0, 512).await));
        drop(namespace);
        rig.close().await;
    });
}

async fn switch_events_off(controller: &Controller) {
    use nvme_async::CommandData;
    use nvme_spec::{admin, feature};
    let off = admin::set_features(feature::id::ASYNC_EVENT_CONFIGURATION, 0, false);
    let queue = controller.admin_queue();
    // SAFETY: it transfers nothing.
    let done = unsafe { queue.submit(off, CommandData::None) }.await;
    assert!(done.expect("completes").cqe.status().is_success());
}

#[test]
fn an_event_outlives_the_runtime_that_deals_with_it() {
    bounded(|| {
        let first = multi_thread();
        let (rig, namespace) = first.block_on(async {
            let rig = Setup::memory(SIZE).open().await;
            let namespace = rig.namespace().await;
            // The event is reported, and its log page is never read here.
            let soft = rig.device.controller();
            soft.hold();
            let commands = rig.device.counters().admin_commands;
            soft.resize_namespace(1, SIZE / 2).expect("shrinks");
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(rig.device.counters().admin_commands, commands);
            (rig, namespace)
        });
        drop(first);
        rig.device.controller().release();
        assert_eq!(namespace.capacity(), SIZE);
        multi_thread().block_on(async {
            rig.controller().active_namespaces().await.expect("lists");
            comes_true("the size is known", || namespace.capacity() == SIZE / 2).await;
            // And the next event is asked for.
            rig.device
                .controller()
                .resize_namespace(1, SIZE)
                .expect("grows");
            comes_true("the size is known", || namespace.capacity() == SIZE).await;
            drop(namespace);
            rig.close().await;
        });
    });
}

#[test]
fn a_change_that_overtakes_the_opening_is_not_missed() {
    on_both_flavours(async || {
        for is_detached in [false, true] {
            let liar = Liar::open(Setup::memory(SIZE)).await;
            // What the namespace is was asked and answered; its identifiers are asked for.
            liar.hold_at(Cns::NAMESPACE_DESCRIPTORS);
            let mut opening = Box::pin(liar.controller.namespace(1));
            let asks = |command: &Sqe| {
                AdminOpcode(command.opcode()) == AdminOpcode::IDENTIFY
                    && Cns(command.cdw10() as u8) == Cns::NAMESPACE_DESCRIPTORS
            };
            while !liar.take_seen().iter().any(asks) {
                assert!(poll!(opening.as_mut()).is_pending());
                tokio::task::yield_now().await;
            }
            liar.soft.controller().release();
            let soft = liar.soft.controller();
            match is_detached {
                true => soft.detach_namespace(1).expect("goes"),
                false => soft.resize_namespace(1, SIZE / 2).expect("shrinks"),
            }
            liar.controller.rescan().await.expect("scans");
            let namespace = opening.await.expect("it was there");
            let expected = if is_detached { 0 } else { SIZE / 2 };
            assert_eq!(namespace.capacity(), expected);
            drop(namespace);
            liar.close().await;
        }
    });
}

#[test]
fn a_namespace_that_changes_while_it_is_opened() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let soft = rig.device.controller();
        for round in 1..=20u64 {
            let size = SIZE + round * 512;
            let (opened, ()) = tokio::join!(rig.controller().namespace(1), async {
                for _ in 0..round % 7 {
                    tokio::task::yield_now().await;
                }
                soft.resize_namespace(1, size).expect("grows");
            });
            let namespace = opened.expect("is there");
            comes_true("the size is known", || namespace.capacity() == size).await;
        }
        rig.close().await;
    });
}
