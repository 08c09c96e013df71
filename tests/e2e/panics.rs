//! Code of others that panics in the thread that recovers: everybody else hears of it.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use futures::{join, poll};
use nvme_async::device::Notice;
use nvme_async::device::soft::SoftDevice;
use nvme_async::{ControllerState, Error, Fate, ResetCause};
use nvme_soft::fault::{Behaviour, Fault};
use nvme_spec::opcode::NvmOpcode;

use crate::support::bounded::{comes_true, on_both_flavours};
use crate::support::owners::Ledger;
use crate::support::rig::{Setup, assert_harmless};
use crate::support::tampered::Tampered;

const SIZE: u64 = 1 << 20;

struct BadWaker;

impl Wake for BadWaker {
    fn wake(self: Arc<Self>) {
        panic!("on purpose: a waker");
    }
}

struct BadOwner;

impl Drop for BadOwner {
    fn drop(&mut self) {
        panic!("on purpose: the owner of memory");
    }
}

impl AsRef<[u8]> for BadOwner {
    fn as_ref(&self) -> &[u8] {
        &[7; 512]
    }
}

/// The controller never completes the next two writes.
fn hold_writes(device: &SoftDevice) {
    let fault = Fault::new(Behaviour::Hold).opcode(NvmOpcode::WRITE);
    let injected = device.controller().inject(fault.times(2));
    injected.expect("makes sense");
}

#[test]
fn a_waker() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let namespace = rig.namespace().await;
        hold_writes(&rig.device);
        let ledger = Ledger::default();
        let mut first = Box::pin(namespace.write(0, ledger.bytes(512, 1)));
        let mut second = Box::pin(namespace.write(512, ledger.bytes(512, 2)));
        let panics = Waker::from(Arc::new(BadWaker));
        assert!(
            first
                .as_mut()
                .poll(&mut Context::from_waker(&panics))
                .is_pending()
        );
        assert!(poll!(&mut second).is_pending());
        let fetched = || rig.device.counters().commands == 2;
        comes_true("the controller has both", fetched).await;
        rig.device.notify(Notice::Failed);
        let failed = second.await.expect_err("it may have been executed");
        let Error::Reset { cause, fate, .. } = failed.error else {
            panic!("{failed:?}");
        };
        assert_eq!((cause, fate), (ResetCause::Reported, Fate::Unknown));
        let mut states = rig.controller().watch_state();
        let live = |state: &ControllerState| *state == ControllerState::Live;
        states.wait_for(live).await.expect("it is open");
        assert!(first.await.is_err());
        assert_eq!(namespace.read(0, 512).await.expect("reads").len(), 512);
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn the_owner_of_memory() {
    on_both_flavours(async || {
        let rig = Setup::memory(SIZE).open().await;
        let namespace = rig.namespace().await;
        hold_writes(&rig.device);
        {
            let bytes = bytes::Bytes::from_owner(BadOwner);
            let mut dropped = pin!(namespace.write(0, bytes));
            assert!(poll!(&mut dropped).is_pending());
        }
        let mut write = Box::pin(namespace.write(512, vec![2; 512]));
        assert!(poll!(&mut write).is_pending());
        let fetched = || rig.device.counters().commands == 2;
        comes_true("the controller has both", fetched).await;
        rig.device.notify(Notice::Failed);
        write.await.expect_err("it may have been executed");
        let mut states = rig.controller().watch_state();
        let live = |state: &ControllerState| *state == ControllerState::Live;
        states.wait_for(live).await.expect("it is open");
        drop(namespace);
        rig.close().await;
    });
}

#[test]
fn a_device() {
    on_both_flavours(async || {
        for for_ever in [false, true] {
            let timeout = Some(Duration::from_millis(200));
            let setup = Setup::memory(SIZE).options(|options| options.timeout(timeout));
            let (soft, options) = setup.start();
            let device = Tampered::new(soft.clone());
            let controller = options.attach(device.clone()).await.expect("comes up");
            let namespace = controller.namespace(1).await.expect("is there");
            hold_writes(&soft);
            device.panic_when_read(for_ever);
            let ledger = Ledger::default();
            let write = |offset| namespace.write(offset, ledger.bytes(512, 1));
            let (first, second) = join!(write(0), write(512));
            for failed in [first, second] {
                let failed = failed.expect_err("nobody recovers it");
                let fails = matches!(failed.error, Error::ControllerFailed { .. });
                assert!(fails, "{failed}");
                assert_eq!(failed.error.fate(), Fate::Unknown);
                assert!(failed.buffer.is_some());
            }
            let state = controller.state();
            assert!(matches!(state, ControllerState::Failed { .. }), "{state:?}");
            let refused = namespace.read(0, 512).await.expect_err("is not used");
            assert_eq!(refused.fate(), Fate::NotExecuted);
            controller.shutdown().await.expect_err("it has failed");
            drop((namespace, controller));
            comes_true("all memory is unmapped", || soft.iommu().mappings() == 0).await;
            assert_harmless(&soft);
        }
    });
}
