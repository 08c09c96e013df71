//! Controllers that are pulled out of their slots.

use std::time::Duration;

use nvme_async::{Error, OpenOptions};

use super::is_of_recovery;
use super::load::{DEPTH, LEN, Load};
use super::slot::Slot;
use crate::harness::{self, run, url};
use crate::monitor::wait_until_deleted;

/// QEMU's report comes a second after the kernel has switched the slot off.
const LIMIT: Duration = Duration::from_secs(60);

fn is_closed(error: &Error) -> bool {
    matches!(error, Error::Closed { .. })
}

fn is_of_removal(error: &Error) -> bool {
    matches!(error, Error::Removed { .. }) || is_of_recovery(error)
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
        assert!(outcome.errors().all(is_closed), "{outcome:?}");

        slot.wait_until_empty();
        wait_until_deleted("removable", LIMIT);
        drop((namespace, buffer));
        slot.plug();
        let namespace = harness::open("removable").await;
        outcome.verify(&namespace).await;
        harness::close(namespace).await;
    });
}

/// Where registers of a controller that is gone read as zeros, as in QEMU's machines, commands run
/// into their deadlines.
#[test]
fn gone_all_at_once() {
    run(300, async || {
        let slot = Slot::of("removable");
        let options = OpenOptions::new().url(&url("removable", 1));
        let options = options.timeout(Some(Duration::from_secs(2)));
        let namespace = options.open().await.expect("opens");
        let mut load = Load::start(&namespace, is_of_removal).await;
        load.reaches(5 * DEPTH).await;
        slot.yank();
        let mut outcome = load.join().await;
        assert!(outcome.errors().all(is_of_removal), "{outcome:?}");
        drop(namespace);
        slot.wait_until_empty();

        slot.plug();
        let namespace = harness::open("removable").await;
        outcome.verify(&namespace).await;
        harness::close(namespace).await;
    });
}
