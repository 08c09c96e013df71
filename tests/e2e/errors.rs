//! Errors: their types, what they say, and what becomes of the buffers.

use std::time::Duration;

use futures::{FutureExt, poll};
use nvme_async::nvme_spec::Status;
use nvme_async::{
    CommandData, ControllerState, DmaBuf, Error, Fate, IoError, Namespace, OpenOptions, PollMode,
    Zeroes,
};
use nvme_soft::store::MemoryStore;
use nvme_spec::nvm;

use crate::support::bounded::{comes_true, on_both_flavours, on_current_thread};
use crate::support::faulty::{FaultyStore, Script};
use crate::support::owners::Ledger;
use crate::support::rig::{Rig, Setup};

const SIZE: u64 = 1 << 20;

async fn with_faults(change: impl FnOnce(Setup) -> Setup) -> (Rig, Namespace, Script) {
    let script = Script::default();
    let healthy = MemoryStore::new(SIZE).expect("a little memory");
    let setup = Setup::empty()
        .store(healthy, 512)
        .store(FaultyStore::new(SIZE, &script), 4096);
    let rig = change(setup).open().await;
    let namespace = rig.controller().namespace(2).await.expect("is there");
    (rig, namespace, script)
}

#[test]
fn a_command_that_fails_says_which_and_why() {
    on_both_flavours(async || {
        let (rig, namespace, script) = with_faults(|setup| setup).await;
        script.fail_at(5 * 4096..5 * 4096 + 1);

        let error = namespace
            .read(4 * 4096, 2 * 4096)
            .await
            .expect_err("a bad block");
        let Error::Command(failed) = &error else {
            panic!("{error:?}");
        };
        assert!(failed.status.is(Status::UNRECOVERED_READ_ERROR));
        assert_eq!(
            (failed.command.nsid, &failed.command.blocks),
            (Some(2), &Some(4..6))
        );
        let text = error.to_string();
        for part in [
            "soft",
            "namespace 2",
            "Read",
            "LBA 4",
            "Unrecovered Read Error",
        ] {
            assert!(text.contains(part), "{part:?} is missing in {text:?}");
        }

        let ledger = Ledger::default();
        let write = namespace.write(5 * 4096, ledger.bytes(4096, 7)).await;
        let IoError { error, buffer, .. } = write.expect_err("a bad block");
        assert_eq!(buffer.map(|bytes| bytes.len()), Some(4096));
        assert_eq!(ledger.alive(), 0);
        let Error::Command(failed) = error else {
            panic!("{error:?}");
        };
        assert!(failed.status.is(Status::WRITE_FAULT));
        assert_eq!(failed.command.blocks, Some(5..6));

        let zeroed = namespace.write_zeroes(0, SIZE, Zeroes::Allocated).await;
        assert!(matches!(zeroed, Err(Error::Command(_))));
        // Others are not affected, nor is this one once it is well.
        namespace.read(0, 5 * 4096).await.expect("reads");
        script.heal();
        namespace.read(0, 8 * 4096).await.expect("reads");
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn a_split_request_says_which_parts_failed() {
    on_both_flavours(async || {
        let (rig, namespace, script) =
            with_faults(|setup| setup.config(|config| config.mdts = 2)).await;
        // Four blocks a part; the second and the last part are hit.
        script.fail_at(6 * 4096..7 * 4096);
        script.fail_at(19 * 4096..20 * 4096);
        let ledger = Ledger::default();
        let write = namespace
            .write(0, ledger.bytes(18 * 4096 + 2 * 4096, 7))
            .await;
        let IoError { error, buffer, .. } = write.expect_err("bad blocks");
        assert!(buffer.is_some(), "the device is done with all parts");
        let Error::Split(split) = &error else {
            panic!("{error:?}");
        };
        let ranges: Vec<_> = split
            .parts
            .iter()
            .map(|(blocks, _)| blocks.clone())
            .collect();
        assert_eq!(ranges, [0..4, 4..8, 8..12, 12..16, 16..20]);
        let failed: Vec<_> = split.failures().map(|(blocks, _)| blocks.clone()).collect();
        assert_eq!(failed, [4..8, 16..20]);
        for (_, error) in split.failures() {
            assert!(matches!(error, Error::Command(_)), "{error:?}");
        }
        let text = error.to_string();
        assert!(
            text.contains("2 of 5") && text.contains("Write Fault"),
            "{text}"
        );
        drop((error, buffer));
        assert_eq!(ledger.alive(), 0);
        let read = namespace.read_into(0, DmaBuf::heap(20 * 4096)).await;
        let IoError { error, buffer, .. } = read.expect_err("bad blocks");
        assert!(matches!(error, Error::Split(_)), "{error:?}");
        assert!(buffer.is_some());
        // The other parts were written.
        script.heal();
        for (offset, fill) in [(0, 7), (4, 0), (8, 7), (12, 7), (16, 0)] {
            let read = namespace
                .read(offset * 4096, 4 * 4096)
                .await
                .expect("reads");
            assert_eq!(read, vec![fill; 4 * 4096], "at {offset}");
        }
        drop((buffer, namespace));
        rig.close().await;
    });
}

#[test]
fn a_namespace_that_is_not_there() {
    on_both_flavours(async || {
        let (rig, namespace, _) = with_faults(|setup| setup).await;
        match rig.controller().namespace(3).await {
            Err(Error::NoNamespace {
                nsid: 3, active, ..
            }) => assert_eq!(active, [1, 2]),
            other => panic!("{other:?}"),
        }
        drop(namespace);
        rig.close().await;
        let error = nvme_async::open("mem:?size=1M&namespaces=2&ns=5")
            .await
            .err();
        assert!(
            matches!(error, Some(Error::NoNamespace { nsid: 5, .. })),
            "{error:?}"
        );
    });
}

#[test]
fn devices_that_can_not_be_opened() {
    on_current_thread(async || {
        let directory = tempfile::tempdir().expect("a directory");
        let missing = format!("file:{}/missing.img", directory.path().display());
        let error = nvme_async::open(&missing).await.expect_err("is not there");
        assert!(matches!(error, Error::Open { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains("missing.img") && text.contains("size="),
            "{text}"
        );
        for url in [
            "",
            "mem:",
            "file:",
            "floppy:a",
            "mem:?size=1000",
            "mem:?sise=1M",
        ] {
            let error = nvme_async::open(url).await.expect_err("is no URL");
            assert!(matches!(error, Error::Url(_)), "{error:?}");
        }
        let error = OpenOptions::new()
            .open()
            .await
            .expect_err("names no device");
        assert!(matches!(error, Error::Url(_)), "{error:?}");
    });
}

#[test]
fn after_shutdown_everything_is_closed() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let namespace = rig.namespace().await;
        let kept = namespace.read(0, 4096).await.expect("reads");
        let controller = rig.controller().clone();
        controller.shutdown().await.expect("shuts down");

        let closed = |error: &Error| matches!(error, Error::Closed { .. });
        let failed = namespace.write(0, vec![1; 512]).await.expect_err("closed");
        assert!(closed(&failed.error) && failed.buffer == Some(vec![1; 512]));
        let failed = namespace.read_into(0, DmaBuf::heap(512)).await;
        let failed = failed.expect_err("closed");
        assert!(closed(&failed.error) && failed.buffer.is_some());
        assert!(closed(&namespace.read(0, 512).await.expect_err("closed")));
        assert!(closed(&namespace.flush().await.expect_err("closed")));
        let zeroed = namespace.write_zeroes(0, 512, Zeroes::Allocated).await;
        assert!(closed(&zeroed.expect_err("closed")));
        assert!(closed(
            &namespace
                .discard(&[0..512, 1024..1536])
                .await
                .expect_err("closed")
        ));
        assert!(closed(&namespace.local().expect_err("closed")));
        assert!(closed(&controller.namespace(1).await.expect_err("closed")));
        namespace
            .quiesce()
            .await
            .expect("nothing is left to wait for");
        // Memory outlives its controller.
        assert_eq!(kept, vec![0; 4096]);
        drop((kept, namespace, controller));
        rig.abandon().await;
    });
}

/// What is in flight when the controller is shut down completes first.
#[test]
fn shutdown_waits_for_what_is_in_flight() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE)
            .config(|config| config.latency = Duration::from_millis(5))
            .open()
            .await;
        let namespace = rig.namespace().await;
        rig.device.controller().hold_io();
        let writes = (0..8).map(|index| namespace.write(index * 512, vec![1; 512]));
        let mut writes: Vec<_> = writes.map(Box::pin).collect();
        for write in &mut writes {
            assert!(poll!(write).is_pending());
        }
        rig.device.controller().release();
        let writes = futures::future::join_all(writes);
        let (shut_down, written) = futures::join!(rig.controller().shutdown(), writes);
        shut_down.expect("shuts down");
        for written in written {
            written.expect("was in flight before");
        }
        drop(namespace);
        rig.abandon().await;
    });
}

#[test]
fn a_command_that_takes_too_long() {
    for mode in [PollMode::Adaptive, PollMode::Interrupt, PollMode::Busy] {
        on_both_flavours(async move || {
            let rig = Setup::memory(SIZE)
                .options(|options| options.poll_mode(mode))
                .open()
                .await;
            let namespace = rig.namespace().await;
            let ledger = Ledger::default();
            let timeout = Duration::from_millis(20);
            rig.device.controller().hold_io();
            let write = namespace.write(512, ledger.bytes(512, 7)).timeout(timeout);
            let IoError { error, buffer, .. } = write.await.expect_err("held back");
            let Error::TimedOut { command, after, .. } = &error else {
                panic!("{error:?}");
            };
            assert!(*after >= timeout);
            assert_eq!((command.nsid, &command.blocks), (Some(1), &Some(1..2)));
            assert_eq!(error.fate(), Fate::Unknown);
            assert!(
                error.to_string().contains("it may have been executed"),
                "{error}"
            );
            assert_eq!(buffer.expect("comes back"), vec![7; 512]);
            assert_eq!(ledger.alive(), 0);
            let read = namespace.read(0, 4096).timeout(timeout).await;
            assert!(matches!(read, Err(Error::TimedOut { .. })), "{read:?}");
            let read = namespace
                .read_into(0, DmaBuf::heap(4096))
                .timeout(timeout)
                .await;
            assert!(read.is_err_and(|failed| failed.buffer.is_some()));

            rig.device.controller().release();
            namespace.quiesce().await.expect("quiesces");
            let read = namespace.read(512, 512).await.expect("reads");
            assert!(read == vec![0; 512], "its queue pair was created anew");
            let controller = rig.controller();
            comes_true("recovery ends", || {
                controller.state() == ControllerState::Live
            })
            .await;
            drop((read, namespace));
            rig.close().await;
        });
    }
}

/// The parts of a split request, those that wait for a slot included.
#[test]
fn a_split_request_that_takes_too_long() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE)
            .config(|config| {
                config.io_queue_pairs = 1;
                config.mdts = 1;
            })
            .options(|options| options.queue_entries(3))
            .open()
            .await;
        let namespace = rig.namespace().await;
        let ledger = Ledger::default();
        rig.device.controller().hold_io();
        let write = namespace.write(0, ledger.bytes(64 << 10, 7));
        let write = write.timeout(Duration::from_millis(50)).await;
        let IoError { error, buffer, .. } = write.expect_err("held back");
        let Error::Split(split) = &error else {
            panic!("{error:?}");
        };
        assert_eq!(split.failures().count(), 8);
        for (_, error) in split.failures() {
            assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
        }
        assert!(buffer.is_some_and(|buffer| buffer == vec![7; 64 << 10]));
        assert_eq!(ledger.alive(), 0);
        rig.device.controller().release();
        namespace.write(0, vec![1; 64 << 10]).await.expect("writes");
        drop(namespace);
        rig.close().await;
    });
}

/// Slots that are lost for a while do not take others with them for longer than allowed.
#[test]
fn a_queue_whose_slots_are_all_lost() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE)
            .config(|config| config.io_queue_pairs = 1)
            .options(|options| options.queue_entries(2))
            .open()
            .await;
        let namespace = rig.namespace().await;
        rig.device.controller().hold_io();
        for _ in 0..3 {
            let timeout = Duration::from_millis(20);
            let reads = (0..3).map(|_| namespace.read(0, 512).timeout(timeout));
            for read in futures::future::join_all(reads).await {
                assert!(matches!(read, Err(Error::TimedOut { .. })), "{read:?}");
            }
        }
        rig.device.controller().release();
        namespace.quiesce().await.expect("quiesces");
        namespace.read(0, 512).await.expect("reads");
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn shutting_down_a_controller_that_does_not_answer() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE)
            .options(|options| options.queues(1).local_queues(0))
            .options(|options| options.timeout(Some(Duration::from_secs(1))))
            .open()
            .await;
        let namespace = rig.namespace().await;
        let ledger = Ledger::default();
        rig.device.controller().hold();
        let write = namespace.write(0, ledger.bytes(512, 1));
        assert!(write.now_or_never().is_none());
        let error = rig
            .controller()
            .shutdown()
            .await
            .expect_err("nothing answers");
        assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
        drop(namespace);
        rig.abandon().await;
        assert_eq!(ledger.alive(), 0);
    });
}

#[test]
fn raw_commands_return_what_the_controller_says() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let queue = rig.controller().io_queues().next().expect("there is one");
        let buffer = rig.controller().allocate(512).expect("room");
        // SAFETY: one block of 512 bytes, as many as the buffer has, from the device.
        let read =
            unsafe { queue.submit(nvm::read(1, 0, 1, false), CommandData::FromDevice(buffer)) };
        let read = read.await.expect("completes");
        assert!(read.cqe.status().is_success());
        let buffer = read.data.expect("comes back");
        assert!(buffer.iter().all(|&byte| byte == 0));

        let past_the_end = nvm::read(1, SIZE / 512, 1, false);
        // SAFETY: as above.
        let refused = unsafe { queue.submit(past_the_end, CommandData::FromDevice(buffer)) };
        let refused = refused.await.expect("completes");
        assert!(refused.cqe.status().is(Status::LBA_OUT_OF_RANGE));
        assert!(refused.cqe.status().dnr());
        assert!(refused.data.is_some());

        // SAFETY: no data.
        let flush = unsafe { queue.submit(nvm::flush(7), CommandData::None) };
        let flush = flush.await.expect("completes");
        assert!(flush.cqe.status().is(Status::INVALID_NAMESPACE_OR_FORMAT));
        drop((refused, queue));
        rig.close().await;
    });
}
