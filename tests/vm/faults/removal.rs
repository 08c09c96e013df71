//! Controllers that are pulled out of their slots.

use std::time::Instant;

use nvme_async::{ControllerState, Error, Namespace};

use super::load::{DEPTH, LEN, Load};
use super::slot::Slot;
use crate::harness::{self, run};

fn is_closed(error: &Error) -> bool {
    matches!(error, Error::Closed { .. })
}

fn is_removed(error: &Error) -> bool {
    matches!(error, Error::Removed { .. })
}

/// Checks that everything that is asked of these handles fails at once, and as it should.
async fn assert_removed(namespace: &Namespace) {
    let controller = namespace.controller();
    let mut states = controller.watch_state();
    let removed = states.wait_for(|state| *state == ControllerState::Removed);
    removed.await.expect("handles exist");
    let read = namespace.read(0, LEN).await;
    assert!(is_removed(&read.expect_err("removed")));
    let written = namespace.write(0, vec![7; LEN]).await;
    let failed = written.expect_err("removed");
    assert!(is_removed(&failed.error), "{failed:?}");
    assert_eq!(failed.buffer, Some(vec![7; LEN]));
    let errors = [
        namespace.flush().await.expect_err("removed"),
        controller.namespace(1).await.expect_err("removed"),
        controller.active_namespaces().await.expect_err("removed"),
    ];
    assert!(errors.iter().all(is_removed), "{errors:?}");
}

/// The program closes the controller before the kernel asks for it; handles and memory of it that
/// are kept do not hold up the removal.
#[test]
fn closed_before_it_is_pulled_out() {
    run(300, async || {
        let slot = Slot::of("removable");
        let namespace = harness::open("removable").await;
        let buffer = namespace.controller().allocate(LEN).expect("memory");
        let mut load = Load::start(&namespace, is_closed).await;
        slot.press_button();
        load.reaches(5 * DEPTH).await;
        namespace.controller().shutdown().await.expect("shuts down");
        let mut outcome = load.join().await;
        outcome.assert_errors(is_closed);

        slot.wait_until_empty();
        drop((namespace, buffer));
        slot.plug();
        let namespace = harness::open("removable").await;
        outcome.verify(&namespace).await;
        harness::close(namespace).await;
    });
}

/// The kernel asks for the controller, and gets it, though the program keeps its handles and
/// memory of it.
#[test]
fn pulled_out_in_order() {
    removed_under_load(Slot::press_button);
}

/// Nobody is asked, and registers read as zeros at once.
#[test]
fn gone_all_at_once() {
    removed_under_load(Slot::yank);
}

fn removed_under_load(remove: fn(&Slot)) {
    run(300, async move || {
        let slot = Slot::of("removable");
        let before = harness::open("removable").await;
        let mut buffer = before.controller().allocate(LEN).expect("memory");
        let mut load = Load::start(&before, is_removed).await;
        load.reaches(5 * DEPTH).await;
        let start = Instant::now();
        remove(&slot);
        let mut outcome = load.join().await;
        println!("all resolved after {:.1?}", start.elapsed());
        outcome.assert_errors(is_removed);
        slot.wait_until_empty();
        println!("empty after {:.1?}", start.elapsed());
        assert_removed(&before).await;
        buffer.fill(0x77);

        slot.plug();
        let after = harness::open("removable").await;
        outcome.verify(&after).await;
        // Those of the old controller have nothing to do with the new one.
        assert_removed(&before).await;
        drop((before, buffer));
        outcome.verify(&after).await;
        harness::close(after).await;
    });
}
