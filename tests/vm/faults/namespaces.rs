//! Namespaces that are detached from their controller, and attached again, under open handles.

use futures::StreamExt;
use nvme_async::nvme_spec::opcode::AdminOpcode;
use nvme_async::nvme_spec::{Sqe, Status};
use nvme_async::{
    CommandData, Controller, ControllerEvent, Error, EventStream, NamespaceChange, OpenOptions,
};

use super::load::{DEPTH, Load};
use crate::harness::{self, run, url};

/// Select field of the command Namespace Attachment (NVMe base specification 2.0, section 5.20).
#[derive(Clone, Copy, Debug)]
enum Select {
    Attach = 0,
    Detach = 1,
}

/// Has the controller attach namespace 2 to itself, or detach it.
async fn attachment(controller: &Controller, select: Select) {
    let mut list = controller.allocate(4096).expect("memory");
    list.fill(0);
    // A controller list of one entry.
    list[0] = 1;
    list[2..4].copy_from_slice(&controller.identify().cntlid.get().to_le_bytes());
    let command = Sqe::new(AdminOpcode::NAMESPACE_ATTACHMENT.0)
        .with_nsid(2)
        .with_cdw10(select as u32);
    let queue = controller.admin_queue();
    // SAFETY: the command reads 4096 bytes, as many as there are.
    let ended = unsafe { queue.submit(command, CommandData::ToDevice(list)) }.await;
    let status = ended.expect("it completes").cqe.status();
    assert!(status.is_success(), "{select:?}: {status}");
}

/// What operations on a namespace that is not attached fail with. Until the driver has heard of it,
/// they reach the controller, and QEMU's answers Invalid Field in Command.
fn is_of_detachment(error: &Error) -> bool {
    match error {
        Error::Command(error) => error.status.is(Status::INVALID_FIELD),
        error => is_gone(error),
    }
}

/// Waits for this news about namespace 2; open handles have it then.
async fn hear_of(events: &mut EventStream, expected: NamespaceChange) {
    match events.next().await.expect("the controller is open") {
        ControllerEvent::NamespaceChanged { nsid: 2, change } => assert_eq!(change, expected),
        other => panic!("{other:?}"),
    }
}

fn is_gone(error: &Error) -> bool {
    matches!(error, Error::NamespaceGone { nsid: 2, .. })
}

#[test]
fn detached_and_attached_under_load() {
    run(300, async || {
        let options = OpenOptions::new().url(&url("attachable", 1));
        let controller = options.open_controller().await.expect("opens");
        let mut events = controller.events();
        let staying = controller.namespace(1).await.expect("opens");
        let going = controller.namespace(2).await.expect("opens");
        for round in 0..3 {
            let undisturbed = Load::start(&staying, |_| false).await;
            let mut load = Load::start(&going, |_| false).await;
            load.reaches(5 * DEPTH).await;
            attachment(&controller, Select::Detach).await;
            hear_of(&mut events, NamespaceChange::Detached).await;
            load.reaches(5 * DEPTH).await;

            let active = controller.active_namespaces().await.expect("lists");
            assert_eq!(active, [1], "round {round}");
            let opened = controller.namespace(2).await;
            let error = opened.expect_err("it is not attached");
            assert!(matches!(error, Error::NoNamespace { .. }), "{error:?}");
            let failed = going.write(0, vec![1; 4096]).await.expect_err("detached");
            assert!(is_gone(&failed.error), "{failed:?}");
            assert_eq!(failed.buffer, Some(vec![1; 4096]));
            let error = going.flush().await.expect_err("detached");
            assert!(is_gone(&error), "{error:?}");

            attachment(&controller, Select::Attach).await;
            let capacity = staying.capacity();
            hear_of(&mut events, NamespaceChange::Attached { capacity }).await;
            let active = controller.active_namespaces().await.expect("lists");
            assert_eq!(active, [1, 2], "round {round}");
            let again = controller.namespace(2).await.expect("opens again");
            assert_eq!(again.capacity(), going.capacity());
            // The handle of before is as good.
            going.read(0, 4096).await.expect("reads");
            load.reaches(5 * DEPTH).await;
            let mut outcome = load.end().await;
            outcome.assert_errors(is_of_detachment);
            assert!(outcome.errors().next().is_some(), "round {round}");
            outcome.verify(&again).await;

            let mut outcome = undisturbed.end().await;
            assert_eq!(outcome.errors().count(), 0, "{outcome:?}");
            outcome.verify(&staying).await;
        }
        drop(controller);
        harness::close(staying).await;
    });
}
