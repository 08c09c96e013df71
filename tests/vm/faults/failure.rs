//! Controllers that fail by themselves. The driver resets them, and the handles go on.

use std::time::Duration;

use nvme_async::{ControllerState, Error, Namespace, OpenOptions, ResetCause};

use super::load::{DEPTH, Load, Outcome};
use super::{is_of_recovery, registers};
use crate::harness::{self, run, url};

async fn open() -> Namespace {
    let options = OpenOptions::new().url(&url("plain", 1));
    let namespace = options.timeout(Some(Duration::from_secs(2))).open().await;
    namespace.expect("opens")
}

/// Has it fail while it has commands, and checks that all is as before afterwards.
async fn fails(namespace: &Namespace, fail: fn()) -> Outcome {
    let mut load = Load::start(namespace, |_| false).await;
    load.reaches(5 * DEPTH).await;
    fail();
    load.reaches(20 * DEPTH).await;
    let mut outcome = load.end().await;
    outcome.assert_errors(is_of_recovery);
    let mut states = namespace.controller().watch_state();
    let live = states.wait_for(|state| *state == ControllerState::Live);
    live.await.expect("the controller is open");
    outcome.verify(namespace).await;
    outcome
}

/// As after a loss of power: it has forgotten its queues, and what was outstanding.
#[test]
fn the_controller_loses_its_state() {
    run(300, async || {
        let namespace = open().await;
        for _ in 0..3 {
            let outcome = fails(&namespace, registers::disable).await;
            let lost = |error: &&Error| {
                let cause = ResetCause::StateLost;
                matches!(error, Error::Reset { cause: found, .. } if *found == cause)
            };
            assert!(outcome.errors().any(|error| lost(&error)), "unnoticed");
        }
        harness::close(namespace).await;
    });
}

/// QEMU's controller may go on in spite of it, and then nobody need notice.
#[test]
fn the_controller_reports_a_fatal_error() {
    run(300, async || {
        let namespace = open().await;
        for _ in 0..3 {
            fails(&namespace, registers::fail).await;
        }
        harness::close(namespace).await;
    });
}
