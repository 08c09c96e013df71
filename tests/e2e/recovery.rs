//! What a program sees of recovery: the controller's state, and what it may choose.

use std::time::Duration;

use futures::future::join_all;
use futures::poll;
use nvme_async::device::Notice;
use nvme_async::{ControllerState, Error, Fate, OnRecovery, ResetCause};
use nvme_soft::fault::{Behaviour, Fault, FaultStatus};
use nvme_spec::Status;
use nvme_spec::opcode::NvmOpcode;

use crate::support::bounded::{comes_true, on_both_flavours};
use crate::support::owners::Ledger;
use crate::support::rig::Setup;

const SIZE: u64 = 1 << 20;

#[test]
fn states_are_told_in_order() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let namespace = rig.namespace().await;
        let controller = rig.controller();
        let mut states = controller.watch_state();
        assert_eq!(*states.borrow_and_update(), ControllerState::Live);
        rig.device
            .controller()
            .inject(Fault::new(Behaviour::SlowReady(Duration::from_millis(50))))
            .expect("makes sense");
        rig.device.controller().fail();
        // It is noticed where something waits for the device.
        let read = namespace.read(0, 4096);
        let (read, recovering) = futures::join!(read, async {
            states.changed().await.expect("it is open");
            *states.borrow_and_update()
        });
        read.expect("is sent again");
        let ControllerState::Recovering { cause } = recovering else {
            panic!("{recovering:?}");
        };
        assert!(matches!(cause, ResetCause::Fatal { .. }), "{cause:?}");
        states.changed().await.expect("it is open");
        assert_eq!(*states.borrow_and_update(), ControllerState::Live);
        assert_eq!(controller.counters().retries, 1);
        controller.shutdown().await.expect("shuts down");
        assert_eq!(controller.state(), ControllerState::Closed);
        drop(namespace);
        rig.abandon().await;
    });
}

#[test]
fn times_that_no_clock_reaches() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE)
            .options(|options| {
                let options = options.timeout(Some(Duration::MAX));
                options.max_window(Duration::MAX)
            })
            .open()
            .await;
        let namespace = rig.namespace().await;
        rig.device.controller().fail();
        let read = namespace.read(0, 4096).timeout(Duration::MAX);
        read.await.expect("is sent again");
        assert_eq!(rig.controller().counters().retries, 1);
        rig.controller().shutdown().await.expect("shuts down");
        drop(namespace);
        rig.abandon().await;
    });
}

#[test]
fn commands_that_do_not_want_to_wait_for_recovery() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE)
            .options(|options| options.on_recovery(OnRecovery::Fail))
            .open()
            .await;
        let namespace = rig.namespace().await;
        let soft = rig.device.controller();
        let slow = Behaviour::SlowReady(Duration::from_millis(300));
        soft.inject(Fault::new(slow)).expect("makes sense");
        let mut states = rig.controller().watch_state();
        rig.device.notify(Notice::Failed);
        let reset = |state: &ControllerState| matches!(state, ControllerState::Recovering { .. });
        states.wait_for(reset).await.expect("it is open");
        let ledger = Ledger::default();
        let failed = namespace.write(0, ledger.bytes(512, 7)).await;
        let failed = failed.expect_err("it is being recovered");
        assert!(matches!(failed.error, Error::Recovering { .. }), "{failed}");
        assert_eq!(failed.error.fate(), Fate::NotExecuted);
        assert!(failed.buffer.is_some());
        let live = |state: &ControllerState| *state == ControllerState::Live;
        states.wait_for(live).await.expect("it is open");
        namespace.write(0, vec![8; 512]).await.expect("writes");
        drop((namespace, failed));
        rig.close().await;
    });
}

#[test]
fn writes_are_sent_again_only_if_that_is_allowed() {
    on_both_flavours(async || {
        for repeats in [false, true] {
            let rig = Setup::memory(SIZE)
                .options(|options| options.repeat_writes(repeats))
                .open()
                .await;
            let namespace = rig.namespace().await;
            let soft = rig.device.controller();
            let status = FaultStatus::after_execution(Status::INTERNAL_ERROR);
            let fault = Fault::new(Behaviour::Status(status)).opcode(NvmOpcode::WRITE);
            soft.inject(fault.clone()).expect("makes sense");
            let written = namespace.write(0, vec![1; 512]).await;
            assert_eq!(written.is_ok(), repeats);
            soft.clear_faults();
            soft.inject(fault).expect("makes sense");
            let allowed = namespace.write(0, vec![2; 512]).repeatable().await;
            allowed.expect("is sent again");
            drop((namespace, written));
            rig.close().await;
        }
    });
}

#[test]
fn a_device_that_the_host_asks_for() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let namespace = rig.namespace().await;
        let soft = rig.device.controller();
        let ledger = Ledger::default();
        soft.hold_io();
        let writes = (0..32u64).map(|index| namespace.write(index * 512, ledger.bytes(512, 1)));
        let mut writes: Vec<_> = writes.map(Box::pin).collect();
        for write in &mut writes {
            assert!(poll!(write).is_pending());
        }
        rig.device.notify(Notice::ReleaseRequested);
        for written in join_all(writes).await {
            let failed = written.expect_err("it is gone");
            assert!(matches!(failed.error, Error::Removed { .. }), "{failed}");
            assert!(failed.buffer.is_some());
        }
        assert_eq!(ledger.alive(), 0);
        assert_eq!(rig.controller().state(), ControllerState::Removed);
        let late = namespace.read(0, 512).await;
        assert!(matches!(late, Err(Error::Removed { .. })), "{late:?}");
        let opened = rig.controller().namespace(1).await;
        assert!(matches!(opened, Err(Error::Removed { .. })), "{opened:?}");
        namespace.quiesce().await.expect("nothing is under way");
        let closed = rig.controller().shutdown().await;
        assert!(matches!(closed, Err(Error::Removed { .. })), "{closed:?}");
        soft.release();
        drop(namespace);
        rig.abandon().await;
    });
}

#[test]
fn an_error_that_the_transport_reports_leads_to_a_reset() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let namespace = rig.namespace().await;
        let mut states = rig.controller().watch_state();
        rig.device.notify(Notice::Failed);
        states.changed().await.expect("it is open");
        comes_true("it works again", || {
            rig.controller().state() == ControllerState::Live
        })
        .await;
        namespace.write(0, vec![3; 512]).await.expect("writes");
        drop(namespace);
        rig.close().await;
    });
}
